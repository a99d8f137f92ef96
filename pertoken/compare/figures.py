"""What the runs come to: two readings of the same curves, differences with their intervals, and who is how fast.

Two questions have two intervals. *Over items*: would these very models answer other items as well? Items are drawn
again, the same for all arms (`resamples.py`). *Over seeds*: would training once more end as well? Student's t over the
runs; a single run has none. Neither interval holds the doubt of the other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Literal

import numpy as np

from pertoken.compare.curves import Axis, Curve, Point, crossing, mean_curve
from pertoken.compare.resamples import BySeed, Resamples, Values, interval, together
from pertoken.compare.settings import Plan
from pertoken.errors import ConfigError, closest
from pertoken.text_metrics import COUNTED, DRAWS, Interval, t_mean
from pertoken.tracking.files import Row
from pertoken.tracking.glossary import HELD_OUT, find
from pertoken.tracking.reader import RunReader

SAME = 1e-5
"""Share by which a metric of all texts together, counted anew, may differ from the recorded one (which may have been
summed in float32); else it is another one, without draws."""

Judgement = Literal["better", "worse", "better on these items", "worse on these items", "not proven"]


@dataclass(frozen=True)
class Reading:
    """Where curves are read off."""

    title: str
    axis: Axis | None
    """None is the end of each run."""
    place: float = 0.0


@dataclass(frozen=True)
class Figure:
    """A number, and the two intervals around it."""

    value: float
    items: Interval | None
    """None for metrics that are not known by item."""
    seeds: Interval | None
    """None where there are no two seeds."""


@dataclass(frozen=True)
class Line:
    """An arm at a reading."""

    arm: str
    figure: Figure
    by_seed: tuple[float, ...]
    change: Figure | None
    """Minus the arm that differences are to, seed by seed; None for that arm itself."""
    relative: Figure | None
    """The change over the value of that arm; over items alone."""
    tokens: float
    """Generated, mean over seeds."""
    seconds: float
    judgement: Judgement | None


@dataclass(frozen=True)
class Score:
    """A metric at a reading, arm by arm."""

    metric: str
    reading: Reading
    num_items: int
    """Held-out items that all runs have: the others are left out."""
    most_items: int
    """That some run has."""
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Reached:
    """After which share of the tokens and seconds of the terminal arm another one is as good as that is at its end."""

    arm: str
    target: float
    tokens: float | None
    """Of the mean curves over seeds; None if it never is."""
    seconds: float | None
    by_seed: tuple[float | None, ...]
    """Shares of tokens."""


@dataclass(frozen=True)
class Measured:
    """All curves of a comparison, arm by arm and seed by seed."""

    plan: Plan
    curves: Mapping[str, Sequence[Curve]]
    """Of arms that have any."""

    @property
    def learners(self) -> list[str]:
        """Arms whose curves go over generated tokens; others are read at their end."""
        return [name for name in self.curves if self.plan.arms[name].samples]

    def readings(self) -> list[Reading]:
        """At the tokens and the seconds that all runs have reached, and at the end of each."""
        found = []
        runs = [curve for name in self.learners for curve in self.curves[name]]
        if runs and (tokens := min(curve.last.tokens for curve in runs)):
            found.append(Reading(f"at {tokens:,.0f} generated tokens", "tokens", tokens))
        if runs and (seconds := min(curve.last.seconds for curve in runs)):
            found.append(Reading(f"at {seconds:,.0f} s of training", "seconds", seconds))
        return [*found, Reading("at the end of each run", None)]

    def scores(self) -> list[Score]:
        """Every metric at every reading."""
        return [self.score(metric, reading) for metric in self.plan.metrics for reading in self.readings()]

    def score(self, metric: str, reading: Reading) -> Score:
        """One metric at one reading."""
        values = {name: self._by_seed(name, metric, reading) for name in self.curves}
        lines = tuple(self._line(name, metric, reading, values) for name in self.curves)
        measure = self._measure(metric)
        return Score(metric, reading, len(measure.ids), measure.most, lines)

    def points(self, curve: Curve, metric: str) -> list[float]:
        """The metric at each evaluation of a run."""
        return [self._measure(metric).value(curve, point) for point in curve.points]

    def resampled(self, curve: Curve, metric: str) -> list[Values]:
        """The same on each resample of the items."""
        return [self._measure(metric).values(curve, point) for point in curve.points]

    def reached(self) -> list[Reached]:
        """How soon each arm is as good as the terminal one at its end, by the main metric."""
        terminal, metric = self.plan.terminal, self.plan.metrics[0]
        if terminal is None or terminal not in self.curves:
            return []
        return [self._reached(name, terminal, metric) for name in self.learners if name != terminal]

    def _reached(self, name: str, terminal: str, metric: str) -> Reached:
        lower = _better(metric) == "lower"
        final = {curve.seed: self.points(curve, metric)[-1] for curve in self.curves[terminal]}
        target = fmean(final.values())
        by_axis = {}
        for axis in ("tokens", "seconds"):
            runs = [(curve.along(axis), self.points(curve, metric)) for curve in self.curves[name]]
            places, values = mean_curve(runs)
            met = crossing(places, [fmean(column) for column in zip(*values, strict=True)], target, lower=lower)
            whole = fmean(curve.along(axis)[-1] for curve in self.curves[terminal])
            by_axis[axis] = None if met is None or not whole else met / whole
        by_seed = []
        for other in self.curves[terminal]:
            for curve in self.curves[name]:
                if curve.seed == other.seed:
                    met = crossing(curve.along("tokens"), self.points(curve, metric), final[other.seed], lower=lower)
                    by_seed.append(None if met is None or not other.last.tokens else met / other.last.tokens)
        return Reached(name, target, by_axis["tokens"], by_axis["seconds"], tuple(by_seed))

    def _by_seed(self, name: str, metric: str, reading: Reading) -> dict[int, Values]:
        measure, found = self._measure(metric), {}
        for curve in self.curves[name]:
            parts = self._read(name, curve, reading)
            width = min(len(measure.values(curve, point)) for point, _ in parts)
            found[curve.seed] = np.sum([share * measure.values(curve, point)[:width] for point, share in parts], axis=0)
        return found

    def _read(self, name: str, curve: Curve, reading: Reading) -> list[tuple[Point, float]]:
        if reading.axis is None or name not in self.learners:
            return [(curve.last, 1.0)]
        return curve.around(reading.axis, reading.place)

    def _line(self, name: str, metric: str, reading: Reading, values: Mapping[str, Mapping[int, Values]]) -> Line:
        own, against = values[name], self.plan.against
        change = relative = None
        if name != against and against in values:
            pairs = self._pairs(name, values)
            if pairs:
                rows = together([each for pair in pairs for each in pair])
                mine, theirs = rows[::2], rows[1::2]
                change, relative = figure(mine - theirs), _relative(mine.mean(0), theirs.mean(0))
        parts = [self._read(name, curve, reading) for curve in self.curves[name]]
        return Line(
            name,
            figure(together(list(own.values()))),
            tuple(float(each[0]) for each in own.values()),
            change,
            relative,
            fmean(sum(share * point.tokens for point, share in each) for each in parts),
            fmean(sum(share * point.seconds for point, share in each) for each in parts),
            None if change is None else judgement(change, _better(metric)),
        )

    def _pairs(self, name: str, values: Mapping[str, Mapping[int, Values]]) -> list[tuple[Values, Values]]:
        """The arm and the one that differences are to, for every seed that both have; what is never trained has all."""
        mine, theirs = values[name], values[self.plan.against]
        fixed = [arm for arm in (name, self.plan.against) if not self.plan.arms[arm].trains]
        if len(fixed) == 2:
            return [(next(iter(mine.values())), next(iter(theirs.values())))]
        if name in fixed:
            return [(next(iter(mine.values())), theirs[seed]) for seed in theirs]
        if fixed:
            return [(mine[seed], next(iter(theirs.values()))) for seed in mine]
        return [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]

    def _measure(self, metric: str) -> "_Measure":
        if metric not in self._measures:
            language = next(iter(self.plan.arms.values())).runs[0].evaluation.language
            curves = [curve for runs in self.curves.values() for curve in runs]
            self._measures[metric] = _Measure(metric, curves, language)
        return self._measures[metric]

    @cached_property
    def _measures(self) -> dict[str, "_Measure"]:
        return {}


class _Measure:
    """One metric, on the items that all evaluations of all runs have."""

    def __init__(self, metric: str, curves: Sequence[Curve], language: str | None) -> None:
        self.metric = metric
        points = [point for curve in curves for point in curve.points]
        self._by_item = metric not in COUNTED and all(metric in point.items for point in points)
        known = [set(point.items[metric] if self._by_item else point.ids) for point in points]
        self.ids = tuple(item for item in points[0].ids if all(item in each for each in known))
        self.most = max(map(len, known))
        """Items of the run that has most of them."""
        self._resamples, self._language = Resamples(self.ids), language
        self._found: dict[tuple[str, int], Values] = {}

    def value(self, curve: Curve, point: Point) -> float:
        """At one evaluation of one run, on all items."""
        if self._by_item and self.ids:
            return fmean(point.items[self.metric][item] for item in self.ids)
        return self._recorded(curve, point) if self._all(point) else float(self.values(curve, point)[0])

    def values(self, curve: Curve, point: Point) -> Values:
        """The same, and on each resample of the items."""
        key = str(curve.folder), point.step
        if key not in self._found:
            self._found[key] = self._values(curve, point)
        return self._found[key]

    def _values(self, curve: Curve, point: Point) -> Values:
        if self._by_item and self.ids:
            return self._resamples.mean([point.items[self.metric][item] for item in self.ids])
        recorded = self._recorded(curve, point)
        rows = {row["id"]: row for row in RunReader(curve.folder).evaluation_items(point.step, curve.split)}
        own = self._anew(Resamples(tuple(point.ids)), point, rows, draws=0)
        if own is not None and self.ids and math.isclose(own[0], recorded, rel_tol=SAME, abs_tol=SAME):
            found = self._anew(self._resamples, point, rows)
            assert found is not None  # of fewer items of the same evaluation
            return found
        if self._all(point):
            return np.array([recorded])
        raise ConfigError(
            f"compare.metrics: {self.metric} is of all texts of a run together, and {curve.folder} has items that "
            "other runs do not have: leave it out, or let all arms answer the same items"
        )

    def _anew(self, resamples: Resamples, point: Point, rows: Mapping[str, Row], draws: int = DRAWS) -> Values | None:
        """The metric of all texts together, counted from what is known of each; None where it is another one."""
        ids, nats = resamples.ids, point.items.get("nats_per_token", {})
        if any(item not in rows for item in ids):
            return None
        if self.metric in COUNTED and all(rows[item]["answer"] for item in ids):
            return resamples.corpus(self.metric, *_texts(rows, ids), language=self._language, draws=draws)
        if self.metric == "perplexity" and all(item in nats and "tokens" in rows[item] for item in ids):
            tokens = [max(sum(rows[item]["tokens"]["action"]), 1) for item in ids]
            return resamples.perplexity([nats[item] * n for item, n in zip(ids, tokens, strict=True)], tokens)
        return None

    def _recorded(self, curve: Curve, point: Point) -> float:
        recorded = point.row["metrics"].get(self.metric)
        if recorded is None:
            known = [name for name, value in point.row["metrics"].items() if value is not None]
            what = f"{curve.folder} has no {self.metric} at step {point.step}"
            raise ConfigError(f"compare.metrics: {what}; {closest(self.metric, known)}")
        return float(recorded)

    def _all(self, point: Point) -> bool:
        """Whether the evaluation has the items that are compared, and no others."""
        return len(self.ids) == len(point.ids)


def _texts(rows: Mapping[str, Row], ids: Sequence[str]) -> tuple[list[str], list[str]]:
    """What was said to these items, and their answers."""
    return [rows[item]["output"] for item in ids], [rows[item]["answer"] for item in ids]


def figure(values: BySeed) -> Figure:
    """The mean over seeds, and its intervals."""
    points = [float(point) for point in values[:, 0]]
    mean: Values = values.mean(0)
    return Figure(float(mean[0]), interval(mean), t_mean(points) if len(points) > 1 else None)


def judgement(change: Figure, better: str) -> Judgement:
    """What a change proves: better or worse only if both intervals say so; on these items alone if only that one does.

    >>> judgement(Figure(1.0, Interval(1.0, 0.5, 1.5), Interval(1.0, 0.9, 1.1)), "higher")
    'better'
    >>> judgement(Figure(1.0, Interval(1.0, 0.5, 1.5), None), "lower")
    'worse on these items'
    """
    if better == "either" or change.items is None or change.items.low <= 0 <= change.items.high:
        return "not proven"
    good = (change.items.low > 0) == (better == "higher")
    seeds = change.seeds
    if seeds is None or seeds.low <= 0 <= seeds.high or (seeds.low > 0) != (change.items.low > 0):
        return "better on these items" if good else "worse on these items"
    return "better" if good else "worse"


def _better(metric: str) -> str:
    term = find(metric, HELD_OUT)
    return "higher" if term is None else term.better


def _relative(mine: Values, theirs: Values) -> Figure | None:
    """The change over what it is to, over items alone; None where that is not above 0 on every resample."""
    if not (theirs > 0).all():
        return None
    ratio = mine / theirs - 1.0
    return Figure(float(ratio[0]), interval(ratio), None)
