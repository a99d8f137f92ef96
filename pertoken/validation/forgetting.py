"""What a model has forgotten: tasks of the lm-evaluation-harness before and after, as differences with their errors.

https://github.com/EleutherAI/lm-evaluation-harness (extra `lm-eval`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from pertoken.errors import ConfigError, MissingExtraError
from pertoken.policy.model import Policy
from pertoken.validation.outcomes import Failure, Outcome
from pertoken.validation.suite import Harness

SIDES = 1.96
"""Standard errors from a mean to either end of its 95% interval."""


@dataclass(frozen=True)
class Scored:
    """A metric of a task."""

    value: float
    stderr: float
    """NaN where the harness does not know it."""
    better: int
    """1 if more is better, -1 if less is."""
    documents: Mapping[int, tuple[float, str, str]]
    """Of each document: its own value, the prompt, the answer; empty for a metric that no document has by itself."""


def harness(check: Harness, policy: Policy) -> dict[str, Scored]:
    """Every metric of the tasks of `check` that has a good direction, as `<task>/<metric>`.

    Raises ConfigError for a task that the harness does not know, or a metric that none of them has.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm_eval", "lm-eval", "a check of type lm_eval") from error
    manager = TaskManager(include_path=check.folder)
    if unknown := [name for name in check.tasks if name not in manager.all_tasks]:
        raise ConfigError(f"lm_eval.tasks: the harness knows no task {unknown[0]!r} (`lm_eval ls tasks` lists them)")
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=policy.hf_model, tokenizer=policy.tokenizer, batch_size=8),
        tasks=list(check.tasks),
        task_manager=manager,
        num_fewshot=check.few_shot,
        limit=check.limit,
        bootstrap_iters=1000,
        log_samples=True,
    )
    scored = {
        f"{task}/{key.removesuffix(',none')}": of
        for task, figures in found["results"].items()
        for key in figures
        if (of := _scored(found, task, key, check.metrics)) is not None
    }
    if not scored:
        raise ConfigError(f"lm_eval: {', '.join(check.tasks)} have no metric to judge; see `metrics`")
    return scored


def _scored(found: Mapping[str, Any], task: str, key: str, wanted: tuple[str, ...] | None) -> Scored | None:
    """The figure `metric,filter` of a task; None where it is no metric, has no direction, or is not wanted."""
    metric, comma, chosen = key.partition(",")
    better = found.get("higher_is_better", {}).get(task, {}).get(metric)
    value, stderr = found["results"][task][key], found["results"][task].get(f"{metric}_stderr,{chosen}")
    if not comma or better is None or not isinstance(value, int | float) or (wanted and metric not in wanted):
        return None
    documents = {
        sample["doc_id"]: (float(sample[metric]), _prompt(sample), str(sample.get("filtered_resps", "")))
        for sample in found.get("samples", {}).get(task, ())
        if sample.get("filter", chosen) == chosen and isinstance(sample.get(metric), int | float)
    }
    error = float(stderr) if isinstance(stderr, int | float) else math.nan
    return Scored(float(value), error, 1 if better else -1, documents)


def _prompt(sample: Mapping[str, Any]) -> str:
    """What the model was shown of a document."""
    first = next(iter(sample.get("arguments") or ("",)))
    return str(first[0] if isinstance(first, list | tuple) and first else first)


def forgotten(check: Harness, before: Mapping[str, Scored], after: Mapping[str, Scored]) -> list[Outcome]:
    """For each metric that both have, what was gained: above 0 is better.

    The standard error is that of the differences document by document, where both have the documents by themselves;
    else of two measurements that know nothing of each other.
    """
    return [_outcome(check, name, before[name], after[name]) for name in after if name in before]


def _outcome(check: Harness, name: str, before: Scored, after: Scored) -> Outcome:
    shared = [doc for doc in after.documents if doc in before.documents]
    gains = {doc: after.better * (after.documents[doc][0] - before.documents[doc][0]) for doc in shared}
    if len(gains) > 1:
        gain, error = fmean(gains.values()), stdev(gains.values()) / math.sqrt(len(gains))
    else:
        gain, error = after.better * (after.value - before.value), math.hypot(before.stderr, after.stderr)
    low, high = gain - SIDES * error, gain + SIDES * error
    judged = low if check.by == "interval" else gain
    failures = [
        Failure(
            str(doc), after.documents[doc][1], after.documents[doc][2], f"worse by {-gains[doc]:.4g}",
            before=before.documents[doc][2],
        )
        for doc in sorted(shared, key=gains.__getitem__)
        if gains[doc] < 0
    ]  # fmt: skip
    return Outcome(
        name=f"{check.name or 'gain'}, {name}",
        type=check.type,
        passed=judged >= -check.max_drop,  # NaN passes nothing
        measured=gain,
        bound=f"at least {-check.max_drop:g}{', with its interval' if check.by == 'interval' else ''}",
        samples=len(gains),
        low=None if math.isnan(low) else low,
        high=None if math.isnan(high) else high,
        failures=tuple(failures),
    )
