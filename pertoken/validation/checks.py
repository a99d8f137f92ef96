"""What each check says of answers: pure functions of rows as a held-out evaluation has them.

A row is one item with its output: `id`, `prompt`, `answer`, `output`, `metrics`, and the `streams` and `findings` of
the rewards that looked at it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pertoken.errors import ConfigError
from pertoken.evaluation import references_of
from pertoken.text_metrics import CORPUS_METRICS, ITEM_METRICS, bootstrap_mean, corpus_metrics
from pertoken.types import Item
from pertoken.validation.outcomes import Failure, Outcome
from pertoken.validation.suite import Harness, Injection, Quality, Regression, Robustness, Share, direction
from pertoken.validation.variants import canary_of, echoes

Row = Mapping[str, Any]


def values_of(metric: str, rows: Sequence[Row]) -> list[float]:
    """A metric or a reward of each row; a held-out metric goes before a reward of its name."""
    if metric not in ITEM_METRICS:
        return [earned(metric, row) for row in rows]
    if any(metric not in row["metrics"] for row in rows):
        raise ConfigError(f"metric {metric}: it compares with reference answers, and not every item has one")
    return [row["metrics"][metric] for row in rows]


def earned(part: str, row: Row) -> float:
    """What a reward pays for the whole row."""
    return float(sum(row["streams"][f"reward/{part}"]))


def quality(check: Quality, rows: Sequence[Row], items: Sequence[Item]) -> Outcome:
    """A metric against its bounds; failed are the answers that are beyond a bound by themselves."""
    low = high = None
    failures: list[tuple[float, Failure]] = []
    if check.metric in CORPUS_METRICS:
        found = corpus_metrics([row["output"] for row in rows], [references_of(item) for item in items])
        if check.metric not in found:
            raise ConfigError(f"metric {check.metric}: it compares with reference answers, and not every item has one")
        mean = found[check.metric]
    else:
        values = values_of(check.metric, rows)
        interval = bootstrap_mean(values)
        mean, low, high = interval.mean, interval.low, interval.high
        for row, value in zip(rows, values, strict=True):
            if beyond := _beyond(check, value, value):
                failures.append((beyond, _failure(row, f"{check.metric} {value:.4g}")))
    ends = (low, high) if check.by == "interval" and low is not None and high is not None else (mean, mean)
    bounds = {"at least": check.at_least, "at most": check.at_most}
    return Outcome(
        name=check.name or f"{check.metric}{_of(check)}",
        type=check.type,
        passed=not _beyond(check, *ends),
        measured=mean,
        bound=_judged(" and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None), check),
        samples=len(rows),
        low=low,
        high=high,
        failures=_worst_first(failures),
    )


def _beyond(check: Quality, low: float, high: float) -> float:
    """How far a value, or an interval, goes beyond the bounds; 0 within them."""
    under = 0.0 if check.at_least is None else check.at_least - low
    return max(under, 0.0 if check.at_most is None else high - check.at_most, 0.0)


def share(check: Share, part: str, rows: Sequence[Row], *, least: float = 0.5, of: str) -> Outcome:
    """Share of the answers to which the reward `part` pays `least` or more in size, with what it found there.

    of: what is counted, in words.
    """
    failures = []
    for row in rows:
        value = abs(earned(part, row))
        if value >= least:
            found = [finding["message"] for finding in row.get("findings", ()) if finding["part"] == part]
            failures.append((value, _failure(row, "; ".join(found) or f"{of} {value:.2f}")))
    return _share(check, f"{of}{_of(check)}", failures, len(rows))


def injection(check: Injection, attack: str, items: Sequence[Item], rows: Sequence[Row], *, seed: int) -> Outcome:
    """Share of the answers to attacked prompts that say the canary."""
    failures = [
        (1.0, _failure(row, f"says {canary}"))
        for item, row in zip(items, rows, strict=True)
        if echoes(row["output"], canary := canary_of(item, attack, seed))
    ]
    return _share(check, f"injection, {attack}{_of(check)}", failures, len(rows))


def robustness(check: Robustness, variant: str, rows: Sequence[Row], otherwise: Sequence[Row]) -> Outcome:
    """How much a metric loses from `rows` to the answers to prompts written otherwise."""
    lost = [-each for each in _gains(check.metric, rows, otherwise)]
    interval = bootstrap_mean(lost)
    failures = [
        (loss, _failure(after, f"{check.metric} falls by {loss:.4g}", before["output"]))
        for loss, before, after in zip(lost, rows, otherwise, strict=True)
        if loss > check.max_drop
    ]
    return Outcome(
        name=f"{check.name or f'drop of {check.metric}{_of(check)}'}, {variant}",
        type=check.type,
        passed=(interval.high if check.by == "interval" else interval.mean) <= check.max_drop,
        measured=interval.mean,
        bound=_judged(f"at most {check.max_drop:g}", check),
        samples=len(rows),
        low=interval.low,
        high=interval.high,
        failures=_worst_first(failures),
    )


def regression(check: Regression, earlier: Sequence[Row], rows: Sequence[Row]) -> Outcome:
    """What the model gains on the earlier one, item by item; above 0 is better whatever the metric's direction."""
    gains = _gains(check.metric, earlier, rows)
    interval = bootstrap_mean(gains)
    failures = [
        (-gain, _failure(after, f"{check.metric} is worse by {-gain:.4g}", before["output"]))
        for gain, before, after in zip(gains, earlier, rows, strict=True)
        if gain < -check.margin
    ]
    return Outcome(
        name=check.name or f"gain of {check.metric}{_of(check)}",
        type=check.type,
        passed=(interval.low if check.by == "interval" else interval.mean) >= -check.margin,
        measured=interval.mean,
        bound=_judged(f"at least {-check.margin:g}", check),
        samples=len(rows),
        low=interval.low,
        high=interval.high,
        failures=_worst_first(failures),
    )


def _gains(metric: str, before: Sequence[Row], after: Sequence[Row]) -> list[float]:
    """By how much each row became better; 0 where nothing changed."""
    pairs = zip(values_of(metric, before), values_of(metric, after), strict=True)
    return [direction(metric) * (new - old) for old, new in pairs]


def _share(check: Share, name: str, failures: list[tuple[float, Failure]], samples: int) -> Outcome:
    failed = len(failures) / samples
    return Outcome(
        name=check.name or name,
        type=str(getattr(check, "type", "")),
        passed=failed <= check.at_most,
        measured=failed,
        bound=f"at most {check.at_most:g} of the answers",
        samples=samples,
        failures=_worst_first(failures),
    )


def _failure(row: Row, reason: str, before: str | None = None) -> Failure:
    return Failure(row["id"], row["prompt"], row["output"], reason, row["answer"], before)


def _worst_first(failures: list[tuple[float, Failure]]) -> tuple[Failure, ...]:
    return tuple(failure for _, failure in sorted(failures, key=lambda one: -one[0]))


def _of(check: Quality | Share | Robustness | Regression) -> str:
    return f" of {check.slice}" if check.slice else ""


def _judged(bound: str, check: Quality | Robustness | Regression | Harness) -> str:
    return f"{bound}, with its interval" if check.by == "interval" else bound
