"""Alarms: signs in a run's own figures that the policy games its reward instead of writing better.

    length_drift       completions much longer or shorter than in the first steps
    empty              completions without text
    endless            completions that no longer end
    repetition         completions that say the same again and again
    entropy_collapse   the policy hardly chooses any more
    part_trade         one part of the reward rises while another falls

The first steps are the yardstick, and a sign counts when it was there in each of the last steps, so that one odd batch
trips nothing. Alarms are read off figures that are logged, and change nothing of the training.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pertoken.rewards import Scene

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

NGRAM = 3
"""Tokens that make a repetition if they come again in a completion."""

WATCHED = (
    "completion/length",
    "completion/terminated_share",
    "completion/repetition",
    "completion/empty_share",
    "entropy",
)
NAMES = ("length_drift", "empty", "endless", "repetition", "entropy_collapse", "part_trade")


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


class Guards:
    """Looks at the figures of each step in turn, and remembers what it needs of the earlier ones."""

    def __init__(self, window: int) -> None:
        self.window = window
        """Steps over which parts of the reward are compared."""
        self._first: list[dict[str, float]] = []
        self._recent: list[dict[str, float]] = []
        self.sounding: tuple[str, ...] = ()
        """Alarms of the last step that was looked at."""

    def look(self, metrics: Mapping[str, float]) -> list[Alarm]:
        """The alarms of this step that did not sound in the one before."""
        row = {name: value for name, value in metrics.items() if name in WATCHED} | _parts(metrics)
        if len(self._first) < STEPS:
            self._first.append(row)
            return []
        self._recent = [*self._recent, row][-max(self.window, STEPS) :]
        seen = [*self._drifts(), *self._trades()] if len(self._recent) >= STEPS else []
        new = [alarm for alarm in seen if alarm.name not in self.sounding]
        self.sounding = tuple(alarm.name for alarm in seen)
        return new

    def figures(self) -> dict[str, float]:
        """1 for each alarm that sounds, 0 for the others, as metrics."""
        return {f"alarm/{name}": float(name in self.sounding) for name in NAMES}

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as JSON."""
        return {"first": list(self._first), "recent": list(self._recent), "sounding": list(self.sounding)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._first, self._recent = list(state["first"]), list(state["recent"])
        self.sounding = tuple(state["sounding"])

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
