"""Which items each step takes, where that is more than one pass after the other over all of them.

A step takes so many items of each pool, by shares that may follow what is learnt. Each pool is gone through in passes
of its own. What a step takes is a function of the seed, the step and the state that checkpoints hold: how far each pool
had been gone through before it, and what was learnt by then.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pertoken.errors import TaskError
from pertoken.tasks.base import sample_order
from pertoken.tasks.mixture import LearningProgress, Shares, counts_of, offset_of
from pertoken.types import Item

Stretch = tuple[int, int, int]
"""Of one pool in one step: where its items begin, how many they are, and where those of the next step begin. Places
count on through passes."""


def take(items: Sequence[Item], place: int, count: int, seed: int) -> tuple[list[Item], int]:
    """`count` distinct items from `place` on, and the place behind them.

    Place k is number k of pass k // len(items), whose order is that of `sample_order`. Across the end of a pass an item
    may come up twice: it is passed over then, since both copies would draw the same random numbers.
    """
    chosen: dict[int, None] = {}
    epoch, order = -1, list[int]()
    while len(chosen) < count:
        if place // len(items) != epoch:
            epoch = place // len(items)
            order = sample_order(len(items), seed, epoch)
        chosen[order[place % len(items)]] = None
        place += 1
    return [items[k] for k in chosen], place


class Course:
    """The items of each step: of every pool as many as its share of the step says."""

    def __init__(
        self,
        pools: Mapping[str, Sequence[Item]],
        shares: Shares,
        *,
        size: int,
        seed: int,
        progress: LearningProgress | None = None,
    ) -> None:
        """pools: the training items by task. shares: of each pool. size: items per step. progress: moves the shares.

        Raises TaskError if a pool cannot give as many distinct items as a step may take of it.
        """
        self.pools, self.base, self.size, self.seed, self.progress = pools, shares, size, seed, progress
        self._plans: dict[int, dict[str, Stretch]] = {}
        """Of the steps that may still be asked for."""
        for name, items in pools.items():
            share = progress.largest(shares, name) if progress else shares[name]
            needed = min(math.ceil(share * size - 1e-9), size)
            if len(items) < needed:
                raise TaskError(
                    f"a step may take {needed} distinct items of task {name}, {share:.0%} of {size}, but it has only "
                    f"{len(items)} training items: give more data, lower its weight, or take fewer prompts per step"
                )

    def items(self, step: int, again: int = 0) -> list[Item]:
        """The distinct items of `step` (from 1); with `again` > 0 others in their place, as many of each pool.

        A step can be asked for until the second one behind it is.
        """
        plan = self._plan(step)
        seed = self.seed + again * 7_368_787
        return [
            item for name, (place, count, _) in plan.items() for item in take(self.pools[name], place, count, seed)[0]
        ]

    def observe(self, earned: Mapping[str, Sequence[float]]) -> None:
        """Hear what the episodes of a step have earned, by pool: shares of steps that are not planned yet may move."""
        if self.progress is not None:
            self.progress.observe(earned)

    def figures(self, step: int) -> dict[str, float]:
        """What is logged of a step: the part of its items that each task has, and the change that shares follow."""
        names = [name for name in self.pools if name]
        found = {f"task_share/{name}": self._plan(step)[name][1] / self.size for name in names}
        return found | {f"task_change/{name}": self.progress.change(name) for name in names if self.progress}

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
        for name, items in self.pools.items():
            place = before[name][2] if before and name in before else 0
            plan[name] = (place, counts[name], take(items, place, counts[name], self.seed)[1])
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
