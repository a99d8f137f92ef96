"""Before against after: what changed on the same held-out items and in the training reward, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from statistics import fmean, variance
from typing import Any, Literal

from pertoken.text_metrics import bootstrap_mean
from pertoken.tracking.files import Number, Row
from pertoken.tracking.glossary import HELD_OUT, find

Judgement = Literal["better", "not proven", "worse"]


@dataclass(frozen=True)
class Change:
    """One metric, before and after."""

    name: str
    before: Number
    after: Number
    low: Number | None
    high: Number | None
    """95% interval of `after - before`; None if it is not known."""

    @property
    def difference(self) -> Number:
        return self.after - self.before

    @property
    def judgement(self) -> Judgement:
        """Better or worse only if the interval excludes 0; a metric without a good direction proves nothing."""
        term = find(self.name, HELD_OUT)
        direction = "higher" if term is None else term.better
        if self.low is None or self.high is None or direction == "either" or self.low <= 0 <= self.high:
            return "not proven"
        return "better" if (self.low > 0) == (direction == "higher") else "worse"


@dataclass(frozen=True)
class Comparison:
    """The first and the last evaluation of one split."""

    split: str
    before: Row
    after: Row
    changes: dict[str, Change]
    """By metric, the main one first."""
    main: str
    """Name of the metric that the verdict is about."""
    num_items: int
    """Held-out items that both evaluations have."""

    @property
    def baselines(self) -> dict[str, dict[str, Number]]:
        """Metrics of the trivial baselines, by baseline."""
        recorded = self.after.get("baselines") or self.before.get("baselines") or {}
        return {name: {key: v for key, v in scores.items() if v is not None} for name, scores in recorded.items()}


def compare(evaluations: Sequence[Row]) -> Comparison | None:
    """The first against the last evaluation; None if no split was evaluated twice.

    The test split decides if it was evaluated before and after, else the split that was evaluated last.
    """
    by_split: dict[str, list[Row]] = {}
    for row in evaluations:
        by_split.setdefault(row["split"], []).append(row)
    twice = [split for split, rows in by_split.items() if len(rows) > 1]
    if not twice:
        return None
    split = "test" if "test" in twice else max(twice, key=lambda name: by_split[name][-1]["step"])
    before, after = by_split[split][0], by_split[split][-1]
    names = [name for name, value in after["metrics"].items() if None not in (value, before["metrics"].get(name))]
    if not names:
        return None
    main = str(after.get("main")) if after.get("main") in names else names[0]
    names.sort(key=lambda name: name != main)  # the rest keeps its order
    return Comparison(
        split=split,
        before=before,
        after=after,
        changes={name: _change(name, before, after) for name in names},
        main=main,
        num_items=len(set(before["items"]["id"]) & set(after["items"]["id"])),
    )


@dataclass(frozen=True)
class Shift:
    """A figure of the training in its first and its last fifth."""

    name: str
    before: float
    after: float
    margin: float
    """Half the width of the 95% interval of the difference, from the noise between steps."""

    @property
    def rose(self) -> bool:
        return self.after - self.before > self.margin


def shifts(metrics: Mapping[str, Sequence[Number | None]], names: Sequence[str]) -> dict[str, Shift]:
    """The means of the first and the last fifth of the steps; nothing if a fifth is less than three steps.

    >>> shifts({"reward/total": [0, 1, 2] * 2 + [9] * 6 + [4, 5, 6]}, ["reward/total"])["reward/total"].rose
    True
    """
    found = {}
    for name in names:
        known = [value for value in metrics.get(name, []) if value is not None]
        count = len(known) // 5
        if count >= 3:
            early, late = known[:count], known[-count:]
            margin = 1.96 * math.sqrt((variance(early) + variance(late)) / count)
            found[name] = Shift(name, fmean(early), fmean(late), margin)
    return found


def matches(before: Sequence[int], after: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each token of either text, the token of the other that it is aligned with, or -1.

    The longest common runs are aligned, so what is left was rewritten.

    >>> matches([5, 6, 7], [5, 9, 7])
    ([0, -1, 2], [0, -1, 2])
    """
    here, there = [-1] * len(before), [-1] * len(after)
    for a, b, size in SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        for k in range(size):
            here[a + k], there[b + k] = b + k, a + k
    return here, there


def _change(name: str, before: Row, after: Row) -> Change:
    """An interval that the evaluation wrote down counts (BLEU of a corpus is no mean over items), else from items."""
    low = high = None
    if recorded := (after.get("differences") or {}).get(name):
        _, low, high = recorded
    elif pairs := _pairs(name, before["items"], after["items"]):
        interval = bootstrap_mean([new - old for old, new in pairs])
        low, high = interval.low, interval.high
    return Change(name, before["metrics"][name], after["metrics"][name], low, high)


def _pairs(name: str, before: Mapping[str, list[Any]], after: Mapping[str, list[Any]]) -> list[tuple[Number, Number]]:
    if name not in before or name not in after:
        return []
    earlier = dict(zip(before["id"], before[name], strict=True))
    pairs = [(earlier.get(item), value) for item, value in zip(after["id"], after[name], strict=True)]
    return [(old, new) for old, new in pairs if old is not None and new is not None]
