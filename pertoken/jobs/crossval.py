"""Cross-validation: as many ordinary runs as there are folds, each held out from one of them, and what they agree on.

Each fold is `task.fold` of the same configuration, so a fold can be looked at, resumed and repeated like any other run.
Rewards and held-out metrics of one fold say nothing of chance in the data; those of all of them do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pertoken.config import RunConfig
from pertoken.errors import ConfigError
from pertoken.text_metrics import Interval, t_mean
from pertoken.tracking import RunReader


def folds_of(config: RunConfig, count: int) -> list[RunConfig]:
    """The runs of a cross-validation with `count` folds, in `crossval/<name>-<seed>/fold-<k>` (or below `folder`).

    Raises ConfigError for several tasks at once, and without held-out evaluation on the validation split.
    """
    if config.task.type == "mixture":
        raise ConfigError("crossval: a mixture of tasks has no folds of its own; cross-validate one task at a time")
    if not config.evaluation.items or config.evaluation.split != "validation":
        raise ConfigError(
            "crossval measures what is held out, the validation split of each fold: set evaluation.split=validation "
            f"and evaluation.items above 0 (now {config.evaluation.split}, {config.evaluation.items})"
        )
    root = Path(config.folder or f"crossval/{config.name}-{config.seed}")
    seed = config.task.fold.seed if config.task.fold else 0
    values = config.model_dump(exclude={"task": {"fold"}})
    return [
        RunConfig.model_validate(
            values
            | {
                "name": f"fold-{held_out}",
                "folder": str(root / f"fold-{held_out}"),
                "task": values["task"] | {"fold": {"count": count, "held_out": held_out, "seed": seed}},
            }
        )
        for held_out in range(count)
    ]


@dataclass(frozen=True)
class OverFolds:
    """One held-out metric over the folds; intervals are Student's t, 95%."""

    before: Interval
    after: Interval
    change: Interval
    """Of the differences fold by fold."""
    by_fold: tuple[float, ...]
    """After training."""


def over_folds(folders: Sequence[Path]) -> dict[str, OverFolds]:
    """Every metric that all of the finished runs in `folders` have, before and after training.

    The training sets of two folds overlap, so that intervals are somewhat too narrow (Bengio and Grandvalet 2004,
    https://jmlr.org/papers/v5/grandvalet04a.html).
    """
    runs = [RunReader(folder).evaluations() for folder in folders]
    ends = [(evaluations[0]["metrics"], evaluations[-1]["metrics"]) for evaluations in runs]
    shared = [name for name in ends[0][0] if all(name in metrics for pair in ends for metrics in pair)]
    found = {}
    for name in shared:
        before, after = ([pair[k][name] for pair in ends] for k in (0, 1))
        change = [two - one for one, two in zip(before, after, strict=True)]
        found[name] = OverFolds(t_mean(before), t_mean(after), t_mean(change), tuple(after))
    return found
