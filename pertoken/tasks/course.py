"""Which items each step takes, where that is more than one pass after the other over all of them.

A step takes so many items of each pool, by shares that may follow what is learnt. Each pool is gone through in passes
of its own, and may let its items in over steps. What a step takes is a function of the seed, the step and the state
that checkpoints hold: how far each pool had been gone through before it, and what was learnt by then.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pertoken.errors import TaskError
from pertoken.tasks.base import sample_order
from pertoken.tasks.mixture import LearningProgress, Shares, counts_of, offset_of
from pertoken.types import Item

Stretch = tuple[int, int, int]
"""Of one pool in one step: where its items begin, how many they are, and where those of the next step begin. Places
count on through passes."""


@dataclass(frozen=True)
class Limit:
    """What an item may measure at most to be let into a step."""

    name: str
    measures: Sequence[float]
    """Of each item of a pool."""
    most: Callable[[int], float]
    """The bound of each step; it never falls."""


@dataclass(frozen=True)
class Pool:
    """The training items of one task, or of one class."""

    items: Sequence[Item]
    limits: Sequence[Limit] = ()

    def let_in(self, step: int) -> list[bool]:
        """Whether each item is let into `step`."""
        bounds = [(limit.measures, limit.most(step)) for limit in self.limits]
        return [all(measures[k] <= most for measures, most in bounds) for k in range(len(self.items))]

    def take(self, step: int, place: int, count: int, seed: int) -> tuple[list[Item], int]:
        """`count` distinct items from `place` on that are let into `step`, and the place behind them.

        Place k is number k of pass k // len(items), whose order is that of `sample_order`. An item that is not let in
        is passed over and waits for another pass. Across the end of a pass an item may come up twice: it counts once,
        since both copies would draw the same random numbers.
        """
        let_in, chosen = self.let_in(step), dict[int, None]()
        epoch, order = -1, list[int]()
        assert sum(let_in) >= count, f"step {step} takes {count} items of {sum(let_in)}"
        while len(chosen) < count:
            if place // len(self.items) != epoch:
                epoch = place // len(self.items)
                order = sample_order(len(self.items), seed, epoch)
            item = order[place % len(self.items)]
            if let_in[item]:
                chosen[item] = None
            place += 1
        return [self.items[k] for k in chosen], place


class Course:
    """The items of each step: of every pool as many as its share of the step says."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        shares: Shares,
        *,
        size: int,
        seed: int,
        progress: LearningProgress | None = None,
        kind: str = "task",
    ) -> None:
        """pools: by task or class ("" where there is one), `kind` says which. shares: of each pool. size: items per
        step. progress: moves shares.

        Raises TaskError if a pool cannot give as many distinct items as a step may take of it. Limits never fall, so
        what the first step lets in is the least.
        """
        self.pools, self.base, self.size, self.seed, self.progress = pools, shares, size, seed, progress
        self.kind = kind
        self._plans: dict[int, dict[str, Stretch]] = {}
        """Of the steps that may still be asked for."""
        for name, pool in pools.items():
            share = progress.largest(shares, name) if progress else shares[name]
            needed, given = min(math.ceil(share * size - 1e-9), size), sum(pool.let_in(1))
            if given < needed:
                of_task, advice = (f" of {kind} {name}", ", lower its weight" * (kind == "task")) if name else ("", "")
                advice += ", let its curriculum begin with more" if pool.limits else ""
                raise TaskError(
                    f"a step may take {needed} distinct items{of_task}, {share:.0%} of {size}, but the first step has "
                    f"only {given} of its {len(pool.items)} training items: give more data{advice}, or take fewer "
                    "prompts per step"
                )

    def items(self, step: int, again: int = 0) -> list[Item]:
        """The distinct items of `step` (from 1); with `again` > 0 others in their place, as many of each pool.

        A step can be asked for until the second one behind it is.
        """
        plan = self._plan(step)
        seed = self.seed + again * 7_368_787
        return [
            item
            for name, (place, count, _) in plan.items()
            for item in self.pools[name].take(step, place, count, seed)[0]
        ]

    def observe(self, earned: Mapping[str, Sequence[float]]) -> None:
        """Hear what the episodes of a step have earned, by pool: shares of steps that are not planned yet may move."""
        if self.progress is not None:
            self.progress.observe(earned)

    def figures(self, step: int) -> dict[str, float]:
        """What is logged of a step: each task's part of its items, the change that shares follow, what is let in."""
        names = [name for name in self.pools if name]
        found = {f"{self.kind}_share/{name}": self._plan(step)[name][1] / self.size for name in names}
        found |= {f"task_change/{name}": self.progress.change(name) for name in names if self.progress}
        for name, pool in self.pools.items():
            behind = f"/{name}" if name else ""
            found |= {f"curriculum/{limit.name}{behind}": limit.most(step) for limit in pool.limits}
            if pool.limits:
                found[f"curriculum/items{behind}"] = sum(pool.let_in(step)) / len(pool.items)
        return found

    def _plan(self, step: int) -> dict[str, Stretch]:
        known = self._plans.get(step)
        if (
            known is not None
            and known.keys() == self.pools.keys()
            and sum(n for _, n, _ in known.values()) == self.size
        ):
            return known
        before = self._plans.get(step - 1)
        if before is None and self._plans and step != 1:
            raise ValueError(f"step {step} cannot be planned: the one before it is not known")
        plan = self._planned(step, before)
        if before is not None:
            self._plans = {step - 1: before, step: plan}
        elif not self._plans:  # else the first step is asked for in hindsight, which depends on nothing
            self._plans = {step: plan}
        return plan

    def _planned(self, step: int, before: Mapping[str, Stretch] | None) -> dict[str, Stretch]:
        shares = self.progress.shares(self.base) if self.progress and before else self.base
        counts, plan = counts_of(shares, self.size, offset_of(self.seed, step)), dict[str, Stretch]()
        for name, pool in self.pools.items():
            place = before[name][2] if before and name in before else 0
            plan[name] = (place, counts[name], pool.take(step, place, counts[name], self.seed)[1])
        return plan

    def get_state(self) -> dict[str, Any]:
        """What the next step depends on, as JSON."""
        plans = {
            str(step): {name: list(stretch) for name, stretch in plan.items()} for step, plan in self._plans.items()
        }
        return {"plans": plans, "progress": self.progress.get_state() if self.progress else {}}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Pools that it does not know begin at their beginning."""
        self._plans = {
            int(step): {name: (place, count, end) for name, (place, count, end) in plan.items()}
            for step, plan in state["plans"].items()
        }
        if self.progress is not None:
            self.progress.set_state(state["progress"])
