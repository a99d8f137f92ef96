"""What a task's data looks like before anything learns from it: how much, how long, which answers, what comes twice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import quantiles

from pertoken.errors import TaskError
from pertoken.tasks.base import SPLITS, ItemTask, Split
from pertoken.tasks.duplicates import Alike, alike_items, said
from pertoken.types import Item

FEW_ANSWERS = 20
"""Up to so many different answers they are classes, and how often each occurs is told."""


@dataclass(frozen=True)
class Lengths:
    """Characters of texts: those that a quarter, half, three quarters and all of them stay within."""

    quarter: float
    half: float
    three_quarters: float
    longest: float

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Lengths":
        """Of at least one text."""
        sizes = [float(len(text)) for text in texts]
        quarter, half, three_quarters = quantiles(sizes, n=4, method="inclusive") if len(sizes) > 1 else sizes * 3
        return cls(quarter, half, three_quarters, max(sizes))


@dataclass(frozen=True)
class SplitOverview:
    """One split."""

    items: int
    prompts: Lengths
    answers: Lengths | None
    """None if an item has none."""
    classes: dict[str, int]
    """How often each answer occurs, the most frequent first; {} if there are more than `FEW_ANSWERS` of them."""


@dataclass(frozen=True)
class Overview:
    """All of a task's data."""

    splits: dict[Split, SplitOverview]
    alike: list[Alike]
    """Pairs of items that say nearly the same, leaks first."""

    @property
    def leaks(self) -> int:
        """Pairs of which one is learnt from and the other held out."""
        return sum(pair.leaks for pair in self.alike)


def overview(task: ItemTask, *, least: float = 0.8) -> Overview:
    """Look at all items of `task`; `least` is the similarity from which two count as alike.

    Raises TaskError if there is no item at all.
    """
    items = {split: found for split in SPLITS if (found := task.items(split))}
    if not items:
        raise TaskError(f"task {task.name}: there are no items")
    return Overview({split: _split(found) for split, found in items.items()}, alike_items(items, least=least))


def _split(items: Sequence[Item]) -> SplitOverview:
    answers = [item.answer for item in items if item.answer is not None]
    counts = Counter(answers)
    return SplitOverview(
        len(items),
        Lengths.of([said(item) for item in items]),
        Lengths.of(answers) if len(answers) == len(items) else None,
        dict(counts.most_common()) if len(counts) <= min(FEW_ANSWERS, len(items) // 2) else {},
    )
