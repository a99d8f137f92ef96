"""Held-out quality: the same items, answered by the policy before and after, with intervals and trivial baselines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, closest
from pertoken.observe import token_rows, token_streams
from pertoken.policy.model import Policy, Reference
from pertoken.rewards import Scene, Weighted, score
from pertoken.rewards.align import align
from pertoken.rollout.collect import collect
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls
from pertoken.text_metrics import (
    CORPUS_METRICS,
    ITEM_METRICS,
    bootstrap_mean,
    corpus_metrics,
    first_sentence,
    item_metrics,
)
from pertoken.tracking.runlog import prompt_text, token_columns
from pertoken.types import Episode, Item

PERPLEXITY = "perplexity"
"""exp of the mean negative log-prob per token of the answers under the reference: how natural they read to it."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: figures over all items, and a row for each."""

    summary: dict[str, Any]
    """`metrics` by name, `main`, `intervals` (95%, bootstrap over items), `baselines`, `differences`."""
    rows: list[dict[str, Any]]
    """Item by item: id, prompt, answer, output, metrics; the first few with tokens and streams."""

    def logged(self, step: int, split: str) -> dict[str, Any]:
        """The row that `evaluations.jsonl` keeps of it: the summary, and each per-item metric as one column."""
        items = {name: [row["metrics"][name] for row in self.rows] for name in self.rows[0]["metrics"]}
        return {"step": step, "split": split, **self.summary, "items": {"id": [row["id"] for row in self.rows]} | items}


@dataclass(frozen=True)
class Evaluator:
    """Answers fixed held-out items and measures the answers; the same call before, during and after training."""

    items: Sequence[Item]
    controls: Controls
    metric: str
    samples_shown: int = 0

    def __post_init__(self) -> None:
        known = (*ITEM_METRICS, *CORPUS_METRICS, PERPLEXITY)
        if self.metric not in known:
            raise ConfigError(f"evaluation.metric: unknown {self.metric!r}; {closest(self.metric, known)}")

    def __call__(
        self, engine: RolloutEngine, policy: Policy, reference: Reference | None, rewards: Sequence[Weighted] = ()
    ) -> Evaluation:
        """Measure the weights that `engine` samples from now (`policy` and `reference` score what it says)."""
        episodes = collect(engine, self.items, policy.tokenizer, self.controls)
        outputs = [align(e.tokens[e.prompt_length :], policy.tokenizer).text for e in episodes]
        per_item, summary = _measure(outputs, self.items)
        nats = _surprise(episodes, reference or policy, policy)
        per_item["nats_per_token"] = [total / max(count, 1) for total, count in nats]
        summary["metrics"][PERPLEXITY] = float(np.exp(sum(t for t, _ in nats) / max(sum(c for _, c in nats), 1)))
        summary["main"] = self.metric
        rows = [
            {
                "id": item.id,
                "prompt": prompt_text(item.prompt),
                "answer": item.answer,
                "output": output,
                "metrics": {name: float(values[k]) for name, values in per_item.items()},
            }
            for k, (item, output) in enumerate(zip(self.items, outputs, strict=True))
        ]
        shown = _tokens_of(episodes[: self.samples_shown], policy, reference, rewards)
        shown += [{}] * (len(rows) - len(shown))
        return Evaluation(summary, [row | extra for row, extra in zip(rows, shown, strict=True)])


def _measure(outputs: Sequence[str], items: Sequence[Item]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Per-item metrics, and the summary with intervals and what the trivial baselines would get."""
    references = [_references(item) for item in items]
    per_item = item_metrics(outputs, references)
    summary: dict[str, Any] = {"metrics": {name: float(np.mean(v)) for name, v in per_item.items()}}
    summary["metrics"] |= corpus_metrics(outputs, references)
    summary["intervals"] = {}
    for name, values in per_item.items():
        interval = bootstrap_mean(values)
        summary["intervals"][name] = [interval.low, interval.high]
    sources = [_source(item) for item in items]
    trivial = {"first sentence": [first_sentence(s) for s in sources], "copy": sources, "empty": [""] * len(items)}
    summary["baselines"] = {
        name: {metric: float(np.mean(v)) for metric, v in item_metrics(texts, references).items()}
        | corpus_metrics(texts, references)
        for name, texts in trivial.items()
    }
    return per_item, summary


def _references(item: Item) -> list[str]:
    if item.answer is None:
        return []
    return list(item.info.get("references") or [item.answer])


def _source(item: Item) -> str:
    """The text that the item is about: its `source` or `body` column, else the prompt itself."""
    for column in ("source", "body"):
        if isinstance(item.info.get(column), str):
            return str(item.info[column])
    return item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]


def _surprise(episodes: Sequence[Episode], judge: Any, policy: Policy) -> list[tuple[float, int]]:
    """Negative log-prob and number of tokens of each answer under `judge`, undistorted by sampling controls."""
    batch = to_batch(episodes, Controls(), device=str(policy.device))
    logprobs = judge.score(batch).logprobs
    return list(zip((-logprobs.sum(1)).tolist(), batch.action_mask.sum(1).tolist(), strict=True))


def _tokens_of(
    episodes: Sequence[Episode], policy: Policy, reference: Reference | None, rewards: Sequence[Weighted]
) -> list[dict[str, Any]]:
    """Tokens and streams of the samples that the report shows."""
    if not episodes:
        return []
    batch = to_batch(episodes, Controls(), device=str(policy.device))
    old = policy.score(batch)
    ref = reference.score(batch) if reference else None
    parts = score(rewards, Scene(batch, episodes, policy.tokenizer, old, ref))
    streams = token_streams(batch, old, ref, parts)
    return [
        {"tokens": token_columns(e.tokens, pieces, e.action_mask), "streams": row}
        for e, pieces, row in token_rows(episodes, streams, policy.tokenizer)
    ]
