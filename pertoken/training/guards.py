"""Alarms: signs in a run's own figures that the policy games its reward instead of writing better.

    length_drift       completions much longer or shorter than in the first steps
    empty              completions without text
    endless            completions that no longer end
    repetition         completions that say the same again and again
    entropy_collapse   the policy hardly chooses any more
    part_trade         one part of the reward rises while another falls
    over_optimised     the reward and the KL rise while a metric beside the reward has fallen from its height

The first steps are the yardstick, and a sign counts when it was there in each of the last steps, so that one odd batch
trips nothing. Alarms are read off figures that are logged, and change nothing of the training.

The gauge of over-optimisation asks for a metric that is measured on the samples of each step and is no part of the
reward (`beside_figures`). What is optimised rises with the distance to the reference; what is meant rises at first, and
falls later on (Gao, Schulman & Hilton 2022, https://arxiv.org/abs/2210.10760, over the square root of the KL).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from pertoken.rewards import Scene, Weighted, score

STEPS = 3
"""How many steps are the first ones, and in how many a sign must be seen one after the other."""

LENGTH_FACTOR = 1.5
"""Longer or shorter by this than at first is a drift."""

EMPTY_SHARE = 0.25
"""Share of completions without text that is no accident."""

ENDLESS_RISE = 0.3
"""By how much the share of completions that were cut off may rise."""

REPEATED_RISE = 0.25
"""By how much the share of repeated n-grams may rise."""

ENTROPY_SHARE = 0.2
"""Share of the first steps' entropy below which a policy has collapsed."""

TREND = 5.0
"""Slopes over standard errors that count as a trend: of white noise over 10 steps, one line in 2,000 rises so."""

FALL = 5.0
"""Standard errors by which the means of two windows of steps must differ to be a rise or a fall."""

NGRAM = 3
"""Tokens that make a repetition if they come again in a completion."""

WATCHED = (
    "completion/length",
    "completion/terminated_share",
    "completion/repetition",
    "completion/empty_share",
    "entropy",
)
NAMES = ("length_drift", "empty", "endless", "repetition", "entropy_collapse", "part_trade", "over_optimised")

REWARD, DISTANCE, BESIDE = "reward", "kl/sequence", "beside/"
"""What the gauge compares: all parts but the KL penalty, the KL, and metrics by this prefix."""


@dataclass(frozen=True)
class Alarm:
    """One sign, and a sentence on what was seen and what to do."""

    name: str
    sentence: str


def writing_figures(scene: Scene) -> dict[str, float]:
    """What alarms look at beside what is logged anyway: the shares of repeated n-grams and of empty completions."""
    repeated = []
    for sample in scene.samples:
        ids = [token for token, acts in zip(sample.tokens, sample.action_mask, strict=True) if acts]
        ngrams = [tuple(ids[k : k + NGRAM]) for k in range(len(ids) - NGRAM + 1)]
        repeated.append(1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0)
    empty = [not sample.text.strip() for sample in scene.samples]
    return {"completion/repetition": fmean(repeated), "completion/empty_share": fmean(empty)}


def beside_figures(rewards: Sequence[Weighted], scene: Scene) -> dict[str, float]:
    """`beside/<name>`: mean per completion of each metric that is measured and not paid, where it has an opinion."""
    figures: dict[str, float] = {}
    if not rewards:
        return figures
    measured = score(rewards, scene)
    for part in rewards:
        sums = measured.parts[part.name].double().sum(1)
        silent = measured.abstained.get(part.name)
        speaking = sums if silent is None else sums[~silent]
        if len(speaking):
            figures[f"{BESIDE}{part.name}"] = speaking.mean().item()
    return figures


@dataclass
class _Gauge:
    """Means over windows of steps, the height of each metric among them, and the noise between steps."""

    window: int
    rows: list[dict[str, float]] = field(default_factory=list)
    """The last two windows."""
    heights: dict[str, dict[str, float]] = field(default_factory=dict)
    """Per metric: the means over the window in which it was highest."""
    squares: dict[str, list[float]] = field(default_factory=dict)
    """Per figure: sum of the squared differences between steps, and how many there are."""

    def look(self, metrics: Mapping[str, float]) -> Iterator[Alarm]:
        """An alarm for each metric that fell beyond noise while reward and KL rose, since its height."""
        row = {name: value for name, value in metrics.items() if name.startswith(BESIDE)}
        if not row:
            return
        row[REWARD] = float(sum(_parts(metrics).values()))
        if DISTANCE in metrics:
            row[DISTANCE] = metrics[DISTANCE]
        for name, value in row.items():
            if self.rows and name in self.rows[-1]:
                total, count = self.squares.get(name, [0.0, 0.0])
                self.squares[name] = [total + (value - self.rows[-1][name]) ** 2, count + 1.0]
        self.rows = [*self.rows, row][-2 * self.window :]
        if len(self.rows) < 2 * self.window:
            return
        before, now = self._means(self.rows[: self.window]), self._means(self.rows[self.window :])
        for name in [name for name in now if name.startswith(BESIDE)]:
            if name in before and before[name] > self.heights.get(name, {}).get(name, -math.inf):
                self.heights[name] = before
            if name in self.heights and self._fell(name, self.heights[name], now):
                yield _over_optimised(name.removeprefix(BESIDE), self.heights[name], now, name)

    def _fell(self, name: str, height: Mapping[str, float], now: Mapping[str, float]) -> bool:
        further = DISTANCE not in now or now[DISTANCE] > height.get(DISTANCE, -math.inf)
        return (
            further
            and now[REWARD] - height[REWARD] > FALL * self._error(REWARD)
            and height[name] - now[name] > FALL * self._error(name)
        )

    def _means(self, rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Over the steps that have a figure, if half of them do."""
        known = {name: [row[name] for row in rows if name in row] for name in rows[-1]}
        return {name: fmean(values) for name, values in known.items() if 2 * len(values) >= len(rows)}

    def _error(self, name: str) -> float:
        """Standard error of the difference between two windows, by the noise that neighbouring steps differ by."""
        total, count = self.squares[name]
        return math.sqrt(total / count / self.window) + 1e-9 * max(abs(row.get(name, 0.0)) for row in self.rows)


def _over_optimised(name: str, height: Mapping[str, float], now: Mapping[str, float], column: str) -> Alarm:
    distance = f", {height[DISTANCE]:.2f} -> {now[DISTANCE]:.2f} nats from the reference" if DISTANCE in now else ""
    return Alarm(
        "over_optimised",
        f"since {name} was highest the reward rose from {height[REWARD]:.3g} to {now[REWARD]:.3g} and {name}, which is "
        f"not in it, fell from {height[column]:.3g} to {now[column]:.3g}{distance}. The policy has found what the "
        "reward pays for beside quality: take an earlier checkpoint, raise kl.coefficient, or mend the reward.",
    )


class Guards:
    """Looks at the figures of each step in turn, and remembers what it needs of the earlier ones."""

    def __init__(self, window: int) -> None:
        self.window = window
        """Steps over which parts of the reward are compared."""
        self._first: list[dict[str, float]] = []
        self._recent: list[dict[str, float]] = []
        self._gauge = _Gauge(window)
        self.sounding: tuple[str, ...] = ()
        """Alarms of the last step that was looked at."""

    def look(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms of this step that did not sound in the one before."""
        over = list(self._gauge.look(metrics))
        row = {name: value for name, value in metrics.items() if name in WATCHED} | _parts(metrics)
        if len(self._first) < STEPS:
            self._first.append(row)
            return []
        self._recent = [*self._recent, row][-max(self.window, STEPS) :]
        seen = [*self._drifts(), *self._trades(), *over] if len(self._recent) >= STEPS else []
        new = [alarm for alarm in seen if alarm.name not in self.sounding]
        self.sounding = tuple(alarm.name for alarm in seen)
        return new

    def figures(self) -> dict[str, float]:
        """1 for each alarm that sounds, 0 for the others, as metrics."""
        return {f"alarm/{name}": float(name in self.sounding) for name in NAMES}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON."""
        gauge = {
            "rows": list(self._gauge.rows),
            "heights": dict(self._gauge.heights),
            "squares": dict(self._gauge.squares),
        }
        first, recent = list(self._first), list(self._recent)
        return {"first": first, "recent": recent, "sounding": list(self.sounding), "gauge": gauge}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._first, self._recent = list(state["first"]), list(state["recent"])
        self.sounding = tuple(state["sounding"])
        gauge = state.get("gauge", {"rows": [], "heights": {}, "squares": {}})
        self._gauge = _Gauge(self.window, list(gauge["rows"]), dict(gauge["heights"]), dict(gauge["squares"]))

    def _drifts(self) -> Iterator[Alarm]:
        """Signs in how the completions look, against the first steps."""
        first, low, high = {}, {}, {}
        for name in WATCHED:
            last = [row[name] for row in self._recent[-STEPS:]]
            first[name], low[name], high[name] = fmean(row[name] for row in self._first), min(last), max(last)
        length, entropy = "completion/length", "entropy"
        ended, repeated, empty = "completion/terminated_share", "completion/repetition", "completion/empty_share"
        if low[length] > LENGTH_FACTOR * first[length]:
            yield Alarm(
                "length_drift",
                f"completions have {low[length]:.0f} tokens or more, {first[length]:.0f} at first. If they do not "
                "say more, a reward pays for length: divide it by length, or add `length` with max_words.",
            )
        elif high[length] < first[length] / LENGTH_FACTOR:
            yield Alarm(
                "length_drift",
                f"completions have {high[length]:.0f} tokens or less, {first[length]:.0f} in the first steps. If they "
                "leave out what they should say, a cost is best avoided by silence: add `length` with min_words.",
            )
        if low[empty] > EMPTY_SHARE:
            yield Alarm(
                "empty",
                f"{low[empty]:.0%} or more of the completions are empty. Saying nothing costs nothing: add a reward "
                "for what is to be said, `length` with min_words, or rollout.sampling.min_new_tokens.",
            )
        if high[ended] < first[ended] - ENDLESS_RISE:
            yield Alarm(
                "endless",
                f"{1 - high[ended]:.0%} or more of the completions are cut off, {1 - first[ended]:.0%} in the first "
                "steps. Going on pays more than ending: add `length` with unfinished_cost, or a reward that saturates.",
            )
        if low[repeated] > first[repeated] + REPEATED_RISE:
            yield Alarm(
                "repetition",
                f"{low[repeated]:.0%} or more of the runs of {NGRAM} tokens were said before in the same completion, "
                f"{first[repeated]:.0%} in the first steps. A reward counts the same thing again: let it count "
                "once, or add `repetition`.",
            )
        if high[entropy] < ENTROPY_SHARE * first[entropy]:
            yield Alarm(
                "entropy_collapse",
                f"the entropy is {high[entropy]:.3f} nats or less, {first[entropy]:.3f} in the first steps. The policy "
                "hardly tries anything else: lower update.learning_rate, set objective.entropy_coefficient or a kl "
                "penalty, and look whether all samples are alike.",
            )

    def _trades(self) -> Iterator[Alarm]:
        """One part up, another down, both more than their spread allows."""
        if len(self._recent) < self.window:
            return
        rows = self._recent[-self.window :]
        names = [name for name in rows[-1] if name not in WATCHED and all(name in row for row in rows)]
        slopes = {name: trend([row[name] for row in rows]) for name in names}
        rising = [name for name in names if slopes[name] > TREND]
        falling = [name for name in names if slopes[name] < -TREND]
        if rising and falling:
            yield Alarm(
                "part_trade",
                f"over {self.window} steps {' and '.join(rising)} rose while {' and '.join(falling)} fell. Read "
                "samples: if they are no better, the one is bought by the other: raise the weight of what falls.",
            )


def trend(values: Sequence[float]) -> float:
    """Slope of the line of least squares through `values` over its standard error (0 if they are all the same).

    >>> trend([1.0, 2.0, 3.0, 4.0]), trend([2.0, 2.0, 2.0]), round(trend([0.0, 1.0, 0.0, 1.0]), 3)
    (inf, 0.0, 0.707)
    """
    middle, mean = (len(values) - 1) / 2, fmean(values)
    across = sum((k - middle) ** 2 for k in range(len(values)))
    slope = sum((k - middle) * (value - mean) for k, value in enumerate(values)) / across
    size = max(abs(value) for value in values)
    if abs(slope) * len(values) <= 1e-9 * size or not size:
        return 0.0
    rest = sum((value - mean - slope * (k - middle)) ** 2 for k, value in enumerate(values))
    error = math.sqrt(rest / (len(values) - 2) / across)
    return slope / error if error > 1e-12 * abs(slope) else math.copysign(math.inf, slope)


def _parts(metrics: Mapping[str, float]) -> dict[str, float]:
    """Each part of the reward by name, as it was before normalising and a weight that changes.

    The KL penalty is a price that rises in every run that learns, and no aim that could be given up.
    """
    parts = {}
    for name, value in metrics.items():
        kind, _, part = name.partition("/")
        if kind == "reward" and part not in ("total", "kl"):
            raw = metrics.get(f"raw/{part}")
            parts[part] = value if raw is None else raw * math.copysign(1.0, metrics[f"weight/{part}"])
    return parts
