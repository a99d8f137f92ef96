"""From the run folders of an arm to its learning curves: held-out items over generated tokens and over seconds."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np

from pertoken.tracking.files import Number, Row
from pertoken.tracking.reader import RunReader

Axis = Literal["tokens", "seconds"]


@dataclass(frozen=True)
class Point:
    """One held-out evaluation of a run."""

    step: int
    tokens: float
    """Generated so far, to learn from or beside (greedy answers, rollouts from prefixes)."""
    seconds: float
    """Of training so far; evaluations, saving and loading do not count."""
    row: Row
    """As `evaluations.jsonl` has it."""

    @property
    def ids(self) -> list[str]:
        """Of its items."""
        return list(self.row["items"]["id"])

    @cached_property
    def items(self) -> dict[str, dict[str, float]]:
        """Metric -> id of an item -> its value, where it has one."""
        columns = self.row["items"]
        return {
            name: {item: float(value) for item, value in zip(columns["id"], values, strict=True) if value is not None}
            for name, values in columns.items()
            if name != "id"
        }


@dataclass(frozen=True)
class Curve:
    """One run, evaluation by evaluation."""

    folder: Path
    seed: int
    split: str
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        return self.points[-1]

    def along(self, axis: Axis) -> list[float]:
        """Where its evaluations lie."""
        return [getattr(point, axis) for point in self.points]

    def around(self, axis: Axis, place: float) -> list[tuple[Point, float]]:
        """The evaluations before and behind a place of the axis, each with its share in the value there.

        Before the first and behind the last one it is that one alone.
        """
        places = self.along(axis)
        if place >= places[-1]:
            return [(self.last, 1.0)]
        behind = bisect_right(places, place)
        if not behind:
            return [(self.points[0], 1.0)]
        share = (place - places[behind - 1]) / (places[behind] - places[behind - 1])
        return [(self.points[behind - 1], 1.0 - share), (self.points[behind], share)]


def read_curve(folder: Path, seed: int, split: str) -> Curve:
    """The curve of a run that was evaluated on `split` at least once."""
    reader = RunReader(folder)
    metrics = reader.metrics()
    steps = [step for step in metrics.get("step", []) if step is not None]
    tokens = _so_far(metrics, [name for name in ("tokens/generated", "tokens/beside") if name in metrics], len(steps))
    seconds = _so_far(metrics, [name for name in metrics if name.startswith("time/")], len(steps))
    points = []
    for row in reader.evaluations():
        if row["split"] == split:
            made = bisect_right(steps, row["step"])
            points.append(Point(row["step"], tokens[made], seconds[made], row))
    return Curve(folder, seed, split, tuple(points))


def _so_far(metrics: Mapping[str, Sequence[Number | None]], names: Sequence[str], steps: int) -> list[float]:
    """Sums of these figures over the steps so far: before the first one, behind it, ..."""
    of_step = [sum((float(metrics[name][k] or 0.0) for name in names), 0.0) for k in range(steps)]
    return [0.0, *accumulate(of_step)]


def mean_curve(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[list[float]]]:
    """Several curves of (places, values) at all places that any has, as far as all go: places, and values by curve.

    >>> mean_curve([([0.0, 2.0], [1.0, 3.0]), ([0.0, 1.0, 4.0], [0.0, 1.0, 4.0])])
    ([0.0, 1.0, 2.0], [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])
    """
    end = min(max(places) for places, _ in runs)
    places = sorted({float(place) for own, _ in runs for place in own if place <= end} | {float(end)})
    return places, [[float(value) for value in np.interp(places, own, values)] for own, values in runs]


def crossing(places: Sequence[float], values: Sequence[float], target: float, *, lower: bool = False) -> float | None:
    """Where a curve, straight between its points, first is as good as `target`; None if it never is.

    >>> crossing([0.0, 10.0, 20.0], [1.0, 2.0, 4.0], 3.0), crossing([0.0, 10.0], [1.0, 2.0], 3.0)
    (15.0, None)
    >>> crossing([0.0, 10.0], [5.0, 1.0], 3.0, lower=True), crossing([0.0, 10.0], [1.0, 2.0], 0.5)
    (5.0, 0.0)
    """
    sign = -1.0 if lower else 1.0
    for k, (place, value) in enumerate(zip(places, values, strict=True)):
        if sign * value >= sign * target:
            if not k:
                return float(place)
            share = (target - values[k - 1]) / (value - values[k - 1])
            return float(places[k - 1] + share * (place - places[k - 1]))
    return None
