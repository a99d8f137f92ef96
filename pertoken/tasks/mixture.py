"""Several tasks as one: their items side by side, and how many prompts of a step each of them gets.

Shares are proportional to weights, tempered by sizes if that is asked for, and may follow what is learnt. A share of a
few prompts is seldom a whole number, so counts are drawn around it, by a function of the seed and the step.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pvariance
from typing import Any

import numpy as np

from pertoken.errors import TaskError
from pertoken.tasks.base import SPLITS, ItemTask, leaks
from pertoken.tasks.files import FileTask
from pertoken.types import Item

Shares = Mapping[str, float]
"""How much of the prompts each task gets; they sum to 1."""


def mixed(tasks: Mapping[str, ItemTask]) -> FileTask:
    """The items of all `tasks`, one task after the other, each marked with the name of its task.

    Raises TaskError if a prompt that one task holds out is what another trains on.
    """
    splits = {
        split: tuple(
            replace(item, id=f"{name}/{item.id}", task=name)
            for name, task in tasks.items()
            for item in task.items(split)
        )
        for split in SPLITS
    }
    if found := leaks(splits):
        raise TaskError(
            f"task.tasks: {len(found)} prompts are in two splits, {found[0]} for one: what one task holds out another "
            "trains on. Give the tasks the same splits, or templates that tell them apart."
        )
    bad = [row for task in tasks.values() if isinstance(task, FileTask) for row in task.bad_rows]
    notes = [f"{name}: {note}" for name, task in tasks.items() if isinstance(task, FileTask) for note in task.notes]
    return FileTask(" + ".join(tasks), splits, tuple(dict.fromkeys(bad)), tuple(notes))


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """The first `count` items, as many of each task as there are; what a small task lacks the others give.

    >>> [item.id for item in evenly([Item("1", "", task="a"), Item("2", "", task="a"), Item("3", "", task="b")], 2)]
    ['1', '3']
    """
    seen, rank = Counter[str](), list[int]()
    for item in items:
        rank.append(seen[item.task])
        seen[item.task] += 1
    chosen = sorted(range(len(items)), key=rank.__getitem__)[:count]
    return [items[k] for k in sorted(chosen)]


def shares_of(weights: Mapping[str, float], sizes: Mapping[str, int], temperature: float | None) -> dict[str, float]:
    """Each task's share of the prompts: proportional to weight * size^(1 / temperature), or to weight alone.

    Temperature 1 goes by size, a high one evens tasks out. Arivazhagan et al. 2019 (https://arxiv.org/abs/1907.05019,
    sec. 4.2) sample languages so, with 5.

    >>> shares_of({"a": 1.0, "b": 1.0}, {"a": 900, "b": 100}, 2.0)
    {'a': 0.75, 'b': 0.25}
    """
    raw = {
        name: weight * (1.0 if temperature is None else sizes[name] ** (1.0 / temperature))
        for name, weight in weights.items()
    }
    return {name: value / sum(raw.values()) for name, value in raw.items()}


def counts_of(shares: Shares, size: int, offset: float) -> dict[str, int]:
    """How many of `size` prompts each task gets: its share of them rounded up or down, and on average exactly that.

    The points (j + offset) / size for j = 0, 1, ... fall into the tasks' stretches of [0, 1), laid end to end
    (systematic sampling); `offset` is uniform in [0, 1).

    >>> [counts_of({"a": 0.625, "b": 0.375}, 4, offset) for offset in (0.25, 0.75)]
    [{'a': 3, 'b': 1}, {'a': 2, 'b': 2}]
    """
    counts, before, end = dict[str, int](), 0, 0.0
    last = list(shares)[-1]
    for name, share in shares.items():
        end += share
        upto = size if name == last else math.ceil(end * size - offset)
        counts[name], before = upto - before, upto
    return counts


def offset_of(seed: int, step: int) -> float:
    """A number in [0, 1) for `step`, seeded by (seed, step) alone."""
    return float(np.random.Generator(np.random.PCG64([seed, step, 1])).random())


@dataclass(frozen=True)
class Learnt:
    """What is known of one task: mean and variance of its rewards, and its mean change per step, in deviations."""

    mean: float
    variance: float
    change: float = 0.0


class LearningProgress:
    """Shares that follow what is learnt: tasks whose reward changes, up or down, get more prompts.

        r = (mean of the step - mean when it was last seen) / s        Q <- smoothing * r + (1 - smoothing) * Q
        share = (1 - explore) * base * exp(|Q| / temperature) / sum of the same + explore * base

    The online algorithm of teacher-student curriculum learning (Matiisen et al. 2017,
    https://arxiv.org/abs/1707.00183) with its Boltzmann policy over |Q|: progress and forgetting both call for
    practice, and what stands still, learnt or hopeless, does not. Two things differ. Changes are measured in s, the
    standard deviation of the task's rewards (its variance smoothed as Q is), so that tasks with other scales can be
    compared; and the base shares stand for the uniform distribution that the paper starts from.
    """

    def __init__(self, *, smoothing: float, temperature: float, explore: float) -> None:
        self.smoothing, self.temperature, self.explore = smoothing, temperature, explore
        self.learnt: dict[str, Learnt] = {}

    def observe(self, earned: Mapping[str, Sequence[float]]) -> None:
        """Look at what the episodes of a step have earned, by task; one that is not in it stays as it is."""
        for name, values in earned.items():
            mean, variance, old = fmean(values), pvariance(values), self.learnt.get(name)
            if old is None:
                self.learnt[name] = Learnt(mean, variance)
                continue
            keep = 1.0 - self.smoothing
            variance = self.smoothing * variance + keep * old.variance
            change = (mean - old.mean) / math.sqrt(variance) if variance > 0 else 0.0
            self.learnt[name] = Learnt(mean, variance, self.smoothing * change + keep * old.change)

    def change(self, name: str) -> float:
        """Q of a task: standard deviations per step; 0 while it is not known."""
        return self.learnt[name].change if name in self.learnt else 0.0

    def shares(self, base: Shares) -> dict[str, float]:
        """The shares of now, around those of `base`."""
        most = max(abs(self.change(name)) for name in base)
        raw = {
            name: share * math.exp((abs(self.change(name)) - most) / self.temperature) for name, share in base.items()
        }
        total = sum(raw.values())
        return {name: (1.0 - self.explore) * raw[name] / total + self.explore * share for name, share in base.items()}

    def largest(self, base: Shares, name: str) -> float:
        """What the share of a task can rise to."""
        return 1.0 - self.explore * (1.0 - base[name])

    def get_state(self) -> dict[str, Any]:
        """What it knows, as JSON."""
        return {name: [known.mean, known.variance, known.change] for name, known in self.learnt.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.learnt = {name: Learnt(*known) for name, known in state.items()}
