"""Held-out quality: the same items, answered by the policy before and after, with intervals and trivial baselines."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, Protocol, runtime_checkable

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, closest
from pertoken.mauve import embedder, mauve
from pertoken.observe import alternative_columns, finding_columns, token_rows, token_streams
from pertoken.policy.model import Policy, Reference
from pertoken.rewards import Scene, Weighted, findings, score
from pertoken.rewards.align import align
from pertoken.rollout.collect import collect
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls, Sampling
from pertoken.text_metrics import (
    CORPUS_METRICS,
    FURTHER_CORPUS_METRICS,
    FURTHER_ITEM_METRICS,
    ITEM_METRICS,
    bootstrap_mean,
    corpus_metrics,
    corpus_shares,
    first_sentence,
    item_metrics,
    self_bleu,
)
from pertoken.tracking.runlog import evaluation_row, prompt_text, six_digits, token_columns
from pertoken.types import Episode, Item

PERPLEXITY = "perplexity"
"""exp of the mean negative log-prob per token of the answers under the judge or else the reference: how natural they
read to it."""
MAUVE = "mauve"
"""Of all answers together, where it is asked for."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: figures over all items, and a row for each."""

    summary: dict[str, Any]
    """`metrics` by name, `main`, `intervals` (95%, bootstrap over items), `baselines`, `differences`; `shares`: what
    each item makes of metrics of all items, for intervals of their differences."""
    rows: list[dict[str, Any]]
    """Item by item: id, prompt, answer, output, metrics, and its tokens with their streams."""

    def logged(self, step: int, split: str) -> dict[str, Any]:
        """The row that `evaluations.jsonl` keeps of it: the summary, and each per-item metric as one column."""
        return evaluation_row(step, split, self.summary, self.rows)


@runtime_checkable
class GivenAnswers(Protocol):
    """Measures what a policy makes of the answers that the held-out items bring."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its metrics."""
        ...

    def __call__(self, policy: Policy, reference: Reference | None) -> Mapping[str, Sequence[float | None]]:
        """Each metric for each item, in the order of the evaluator's items; None where it has none."""
        ...


@dataclass(frozen=True)
class Evaluator:
    """Answers fixed held-out items and measures the answers; the same call before, during and after training."""

    items: Sequence[Item]
    controls: Controls
    metric: str
    given: GivenAnswers | None = None
    """Metrics of the answers in the data, where a method learns from such."""
    by_task: Mapping[str, str] = field(default_factory=dict)
    """Of a mixture, the metric that each task is followed by: measured on its items alone, as `<metric>/<task>`."""
    gather: Callable[..., list[Episode]] = collect
    """How items become episodes, called as `collect` is; of several turns the last is the answer."""
    further: Sequence[str] = ()
    """Further metrics of `text_metrics` that are measured; those that are followed need not be among them."""
    beside: Sequence[Weighted] = ()
    """Rewards that the answers are measured by, as `beside/<name>`."""
    language: str | None = None
    """Of the answers, by which some metrics cut words."""
    judge: Reference | None = None
    """Under which answers are judged as natural or not; None is the reference of the run."""
    alternatives: int = 0
    """How many of the most probable tokens the rows have at each place of an answer."""

    def __post_init__(self) -> None:
        further = (*FURTHER_ITEM_METRICS, *FURTHER_CORPUS_METRICS, MAUVE)
        known = (*ITEM_METRICS, *CORPUS_METRICS, *further, PERPLEXITY, *(self.given.names if self.given else ()))
        known += tuple(f"beside/{part.name}" for part in self.beside)
        named = {"evaluation.metric": self.metric} | {f"task.tasks.{t}.metric": m for t, m in self.by_task.items()}
        for where, metric in named.items():
            if metric not in known:
                raise ConfigError(f"{where}: unknown {metric!r}; {closest(metric, known)}")
        for metric in self.further:
            if metric not in further:
                raise ConfigError(f"evaluation.further: unknown {metric!r}; {closest(metric, further)}")
        item_metrics(["."], [["."]], language=self.language)  # the package that cuts its words is here
        if MAUVE in self._asked:
            embedder()

    @property
    def _asked(self) -> set[str]:
        """The metrics that are measured if they are asked for."""
        return {*self.further, self.metric, *self.by_task.values()}

    def __call__(
        self, engine: RolloutEngine, policy: Policy, reference: Reference | None, rewards: Sequence[Weighted] = ()
    ) -> Evaluation:
        """Measure the weights that `engine` samples from now (`policy` and `reference` score what it says)."""
        episodes = self.gather(engine, self.items, policy.tokenizer, self.controls)
        outputs = [align(e.tokens[_answer_start(e) :], policy.tokenizer).text for e in episodes]
        per_item, summary = self._measure(outputs)
        if self.given is not None:
            given = self.given(policy, reference)
            per_item |= given
            for name, values in given.items():
                if known := _known(values):
                    summary["metrics"][name], summary["intervals"][name] = fmean(known), _interval(known)
        # Scored without the sampling controls: what is asked is how natural the words are, not how they were drawn.
        # What a segment saw is another matter: a longer text has no place in the context.
        scoring = Controls(Sampling(segment=self.controls.sampling.segment))
        batch = to_batch(episodes, scoring, device=str(policy.device))
        others: list[dict[str, Any]] = [{} for _ in self.items]
        if self.alternatives:
            old, found = policy.score_with_alternatives(batch, self.controls, self.alternatives)
            others = alternative_columns(found, batch, policy.tokenizer)
        else:
            old = policy.score(batch)
        ref = reference.score(batch) if reference else None
        scene = Scene(batch, episodes, policy.tokenizer, old, ref)
        for name, part in (score(self.beside, scene).parts if self.beside else {}).items():
            per_item[f"beside/{name}"] = sums = part.sum(1).tolist()
            summary["metrics"][f"beside/{name}"], summary["intervals"][f"beside/{name}"] = fmean(sums), _interval(sums)
        judged = self.judge.score(batch) if self.judge else ref or old
        nats, counts = -judged.logprobs.sum(1), batch.action_mask.sum(1).clamp_min(1)
        per_item["nats_per_token"] = (nats / counts).tolist()
        summary["metrics"][PERPLEXITY] = float((nats.sum() / counts.sum()).exp())
        summary["main"] = self.metric
        for task, metric in self.by_task.items():
            chosen = [k for k, item in enumerate(self.items) if item.task == task]
            name = f"{metric}/{task}"
            if metric in per_item:
                values = _known([per_item[metric][k] for k in chosen])
                summary["metrics"][name], summary["intervals"][name] = fmean(values), _interval(values)
            elif metric == PERPLEXITY:
                summary["metrics"][name] = float((nats[chosen].sum() / counts[chosen].sum()).exp())
            else:
                answers = [self._references[k] for k in chosen]
                of_task, shares = self._of_all([outputs[k] for k in chosen], answers)
                summary["metrics"][name] = of_task[metric]
                if metric in shares:
                    of_item = dict(zip(chosen, shares[metric], strict=True))
                    summary["shares"][name] = [of_item.get(k) for k in range(len(self.items))]
                    summary["intervals"][name] = _interval(shares[metric])
        fixed = [part.fixed() for part in rewards]
        parts, marked = score(fixed, scene), findings(fixed, scene)
        tokens = token_rows(episodes, token_streams(batch, old, ref, parts), policy.tokenizer)
        rows = [
            {
                "id": item.id,
                "prompt": prompt_text(item.prompt),
                "answer": item.answer,
                "output": output,
                "metrics": self._of_item(item, per_item, k),
                "tokens": token_columns(episode.tokens, pieces, episode.action_mask),
                "streams": {name: six_digits(values) for name, values in streams.items()},
                **finding_columns(marked[k]),
                **others[k],
            }
            for k, (item, output, (episode, pieces, streams)) in enumerate(
                zip(self.items, outputs, tokens, strict=True)
            )
        ]
        return Evaluation(summary, rows)

    def _measure(self, outputs: Sequence[str]) -> tuple[dict[str, Sequence[float | None]], dict[str, Any]]:
        """Per-item metrics, and the summary with intervals and what the trivial baselines would get."""
        measured = self._each(outputs, self._asked)
        summary: dict[str, Any] = {"metrics": {name: fmean(v) for name, v in measured.items()}}
        of_all, summary["shares"] = self._of_all(outputs, self._references)
        summary["metrics"] |= of_all
        summary["intervals"] = {name: _interval(v) for name, v in (measured | summary["shares"]).items()}
        summary["baselines"] = {name: dict(figures) for name, figures in self._baselines.items()}
        return {**measured}, summary

    def _each(self, texts: Sequence[str], further: Collection[str]) -> dict[str, list[float]]:
        return item_metrics(texts, self._references, further=further, sources=self._sources, language=self.language)

    @cached_property
    def _references(self) -> list[list[str]]:
        return [references_of(item) for item in self.items]

    @cached_property
    def _sources(self) -> list[str]:
        return [_source(item) for item in self.items]

    @cached_property
    def _baselines(self) -> dict[str, dict[str, float]]:
        """What trivial answers get; the same at every evaluation, so measured at the first one alone."""
        trivial = {
            "first sentence": [first_sentence(s) for s in self._sources], "copy": self._sources,
            "empty": [""] * len(self.items),
        }  # fmt: skip
        cheap = self._asked - {"ter", "self_bleu", "corpus_ter"}  # whose time grows with the square of what is copied
        return {
            name: {metric: fmean(v) for metric, v in self._each(texts, cheap).items()}
            | corpus_metrics(texts, self._references, language=self.language)
            for name, texts in trivial.items()
        }

    def _of_all(
        self, texts: Sequence[str], references: Sequence[Sequence[str]]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics of all texts together, and what each text makes of those that have such shares."""
        shares = corpus_shares(texts, references, further=self._asked, language=self.language)
        found = {name: fmean(values) for name, values in shares.items()}
        if "self_bleu" in self._asked:
            found["self_bleu"] = self_bleu(texts, language=self.language)
        if MAUVE in self._asked and references and all(references):
            found[MAUVE] = mauve(texts, [known[0] for known in references])
        return found, shares

    def _of_item(self, item: Item, per_item: Mapping[str, Sequence[float | None]], k: int) -> dict[str, float]:
        """What is known of item `k`, the metric that its task is followed by under a name of its own too."""
        known = {name: float(value) for name, values in per_item.items() if (value := values[k]) is not None}
        metric = self.by_task.get(item.task, "")
        return known | {f"{metric}/{item.task}": known[metric]} if metric in known else known


def _answer_start(episode: Episode) -> int:
    """Where the last turn of the policy begins."""
    return max((span.start for span in episode.spans if span.role == "action"), default=len(episode.tokens))


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _interval(values: Sequence[float]) -> list[float]:
    interval = bootstrap_mean(values)
    return [interval.low, interval.high]


def references_of(item: Item) -> list[str]:
    """What a good answer to `item` may say; nothing where that is not known."""
    if item.answer is None:
        return []
    return list(item.info.get("references") or [item.answer])


def _source(item: Item) -> str:
    """The text that the item is about: its `source` or `body` column, else the prompt itself."""
    for column in ("source", "body"):
        if isinstance(item.info.get(column), str):
            return str(item.info[column])
    return item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
