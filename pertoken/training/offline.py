"""Training on answers that are in the data: the loop, the losses, and what they come to on held-out answers.

The loop is that of `trainer.py` without rollout, rewards and credit: rows, reference, update. Configuration, run
folder, checkpoints, evaluations and stop conditions are the same, so a run of one kind begins where one of the other
ended. The loss of a step does not depend on how it is cut into micro-batches.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pertoken.batching import to_batch
from pertoken.config import Dpo, Ipo, Kto, OfflineConfig, PairConfig, PreferenceConfig, Sft, Simpo, Tdpo
from pertoken.machine.memory import Heap
from pertoken.objectives import aggregate
from pertoken.observe import StepReport
from pertoken.policy.model import Policy, Reference
from pertoken.policy.scoring import Against
from pertoken.preferences import (
    bradley_terry,
    ipo_loss,
    kto_baseline,
    kto_loss,
    log_ratios,
    negative_log_likelihood,
    simpo_scores,
    tdpo_scores,
)
from pertoken.sampling import Controls
from pertoken.tracking.runlog import RunLog
from pertoken.training.examples import Examples, Kind
from pertoken.training.state import Run, items_of
from pertoken.training.trainer import (
    Clock,
    alternatives,
    checkpoint_if_due,
    curriculum_figures,
    cuts,
    evaluate,
    memory,
    record,
)
from pertoken.training.updating import distance_figures, from_here, set_learning_rate, settle, step_optimizer
from pertoken.types import Episode, Item, PolicyOutput, TokenBatch


def kind_of(method: OfflineConfig, items: Sequence[Item]) -> Kind:
    """What `method` takes the items to hold."""
    if isinstance(method, Sft):
        return "answers"
    return "labels" if isinstance(method, Kto) and "desirable" in items[0].info else "pairs"


def needs_reference(method: OfflineConfig) -> bool:
    """Whether the method compares the policy with the model before training."""
    return isinstance(method, Dpo | Ipo | Tdpo | Kto)


def loop(
    run: Run, log: RunLog, *, on_step: Callable[[StepReport], None], interrupted: Callable[[], bool] = lambda: False
) -> str:
    """Train until a stop condition holds or `interrupted()`; returns why it ended. Each step is one update."""
    heap = Heap(run.policy.device)
    evaluate(run, log)
    while not (reason := run.stop_reason()) and not interrupted():
        begun, step = time.monotonic(), run.progress.step + 1
        clock = Clock()
        rows = rows_of(run, step)
        clock.lap("score")
        run.engine.release()
        others = alternatives(run, rows.batch, step)
        heap.before_update()
        metrics, streams = update(run, rows, step)
        heap.after_update()
        settle(run, step)
        clock.lap("update")
        seconds = sum(clock.seconds.values())
        metrics |= {"tokens/per_second": rows.batch.num_actions / seconds} | clock.seconds | memory(run)
        metrics |= curriculum_figures(run, step)
        run.notes += cuts(run, step)
        report = StepReport(step, metrics, rows.episodes, streams)
        run.progress.step = step
        run.progress.tokens += rows.batch.num_actions
        run.progress.seconds += time.monotonic() - begun
        record(run, log, report, others)
        evaluate(run, log)
        checkpoint_if_due(run, log)  # after the evaluation: what is saved has counted it
        on_step(report)
    return reason or "interrupted"


def _method(run: Run) -> OfflineConfig:
    assert run.config.offline is not None
    return run.config.offline


def _examples(run: Run) -> Examples:
    assert run.examples is not None
    return run.examples


def _reference(run: Run) -> Reference:
    assert run.reference is not None
    return run.reference


# --- what a step learns from ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of a step or of a part of it."""

    episodes: Sequence[Episode]
    batch: TokenBatch
    desirable: Bool[Tensor, " B"]
    """True for answers to learn; of a pair the first."""
    ref: PolicyOutput | None
    """The reference, where the method compares with it."""
    baseline: Float[Tensor, ""] | None
    """z of KTO."""

    @property
    def num_learnt(self) -> int:
        """Tokens of the answers to learn."""
        return int((self.batch.action_mask & self.desirable[:, None]).sum())

    def part(self, index: Int[Tensor, " R"]) -> "Rows":
        """The rows `index`, in that order."""
        episodes = [self.episodes[i] for i in index.tolist()]
        ref = None if self.ref is None else self.ref.rows(index)
        return Rows(episodes, self.batch.rows(index), self.desirable[index], ref, self.baseline)

    @property
    def largest(self) -> int:
        """Tokens of the answers that are compared, at most: they stay together."""
        sizes, prompts = self.batch.attention_mask.sum(1).tolist(), self.batch.prompt_lengths()
        groups = self.batch.prompt_groups()
        return int(max(prompts[rows[0]] + sum(sizes[b] - prompts[b] for b in rows) for rows in groups))

    def parts(self, tokens: int) -> list[Int[Tensor, " R"]]:
        """Micro-batches of at most about `tokens` tokens, largest first; answers that are compared stay together."""
        sizes = self.batch.attention_mask.sum(1).tolist()
        parts = self.batch.parts(max(tokens, self.largest))
        return sorted(parts, key=lambda rows: -sum(sizes[b] for b in rows.tolist()))


def rows_of(run: Run, step: int) -> Rows:
    """The rows of `step`, which depend on the seed and `step` alone, scored by the reference where it is needed."""
    method, examples = _method(run), _examples(run)
    items = items_of(run, step)
    episodes, desirable = examples.episodes(items, step=step)
    device = str(run.policy.device)
    batch = to_batch(episodes, Controls(), device=device)
    ref = baseline = None
    if needs_reference(method):
        ref = _reference(run).score(batch, hidden=isinstance(method, Tdpo))
    if isinstance(method, Kto):
        strangers = to_batch(examples.mismatched(items, step=step), Controls(), device=device)
        theirs = _reference(run).score(strangers)
        ratios = log_ratios(run.policy.score(strangers).logprobs, theirs.logprobs, strangers.action_mask)
        baseline = kto_baseline(ratios.sum(1))
    return Rows(episodes, batch, torch.tensor(desirable, device=device), ref, baseline)


# --- losses --------------------------------------------------------------------------------------------------


def scores(
    method: PreferenceConfig,
    new: PolicyOutput,
    ref: PolicyOutput | None,
    batch: TokenBatch,
    desirable: Bool[Tensor, " B"],
) -> Float[Tensor, "B T"]:
    """What `method` pays each token of each answer: an implicit reward."""
    mask = batch.action_mask
    if isinstance(method, Simpo):
        return simpo_scores(new.logprobs, mask, beta=method.beta)
    if ref is None:
        raise ValueError(f"method {method.type} needs the log-probs of the reference")
    if isinstance(method, Tdpo) and new.kl is not None:
        return tdpo_scores(new.logprobs, ref.logprobs, new.kl, mask, desirable, beta=method.beta, alpha=method.alpha)
    return method.beta * log_ratios(new.logprobs, ref.logprobs, mask)


def compared_with(run: Run, part: Rows) -> Against | None:
    """What the loss of the run's method compares the policy with over the whole vocabulary, at each token of `part`."""
    method = _method(run)
    if isinstance(method, Tdpo) and part.ref is not None:
        return _reference(run).against(part.ref, forward=True)
    if isinstance(method, Sft) and method.label_smoothing:
        return Against.uniform(part.batch, run.policy.num_logits)
    return None


def part_loss(
    method: OfflineConfig, new: PolicyOutput, part: Rows, whole: Rows, *, vocab: int
) -> tuple[Float[Tensor, ""], Float[Tensor, "B T"] | None]:
    """The part's share of the loss of the `whole` step, and the scores of its tokens; SFT has none.

    new: of a pass of `part` against what `compared_with` names. vocab: tokens that the policy's head knows.
    """
    good, learnt = part.desirable, part.batch.action_mask & part.desirable[:, None]
    if isinstance(method, Sft):
        means = None if new.kl is None else -new.kl - math.log(vocab)  # KL from the uniform distribution
        losses = negative_log_likelihood(new.logprobs, learnt, means, label_smoothing=method.label_smoothing)
        count = whole.num_learnt if method.over == "token" else len(whole.episodes)
        return aggregate(losses, learnt, over=method.over, denominator=count), None
    paid = scores(method, new, part.ref, part.batch, good)
    sums = paid.sum(1)
    if isinstance(method, Kto):
        assert part.baseline is not None
        each = kto_loss(
            sums / method.beta, good, part.baseline, beta=method.beta,
            desirable_weight=method.desirable_weight, undesirable_weight=method.undesirable_weight,
        )  # fmt: skip
        return each.sum() / len(whole.episodes), paid
    loss = _pair_losses(method, sums[good], sums[~good]).sum() / int(whole.desirable.sum())
    if method.sft_coefficient:
        losses = negative_log_likelihood(new.logprobs, learnt)
        likelihood = aggregate(losses, learnt, over="token", denominator=whole.num_learnt)
        loss = loss + method.sft_coefficient * likelihood
    return loss, paid


def _pair_losses(method: PairConfig, chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    if isinstance(method, Ipo):
        return ipo_loss(chosen / method.beta, rejected / method.beta, beta=method.beta)
    margin = method.gamma if isinstance(method, Simpo) else 0.0
    smoothing = method.label_smoothing if isinstance(method, Dpo) else 0.0
    return bradley_terry(chosen, rejected, margin=margin, label_smoothing=smoothing)


def update(run: Run, rows: Rows, step: int) -> tuple[dict[str, float], dict[str, Float[Tensor, "B T"]]]:
    """One optimiser step on `rows`: figures of it, and what is known of every token from before it.

    A non-finite loss or gradient skips the step and is counted.
    """
    config, method, examples = run.config.update, _method(run), _examples(run)
    rate = set_learning_rate(run, step)
    logprobs, paid = torch.zeros_like(rows.batch.sample_logprobs), torch.zeros_like(rows.batch.sample_logprobs)

    def passes(tokens: int) -> tuple[float, str]:
        total, bad = 0.0, ""
        for index in rows.parts(tokens):
            part = rows.part(index)
            new = run.policy.score(part.batch, grad=True, into_grad=True, against=compared_with(run, part))
            loss, scored = part_loss(method, new, part, rows, vocab=run.policy.num_logits)
            logprobs[index] = new.logprobs.detach().float()
            if scored is not None:
                paid[index] = scored.detach().float()
            total += loss.item()
            if math.isfinite(loss.item()):
                loss.backward()
            else:
                bad = bad or f"loss {loss.item()} in {', '.join(part.batch.episode_ids[:4])} ..."
        return total, bad

    tokens = int(rows.batch.attention_mask.sum())
    total, bad = run.micro_batch.attempt(passes, there=tokens, least=rows.largest, undo=from_here(run))
    norm = step_optimizer(run, bad, step)
    limit = config.max_grad_norm
    streams = {"logprob": logprobs}
    if rows.ref is not None:
        streams["ref_logprob"] = rows.ref.logprobs
    if not isinstance(method, Sft):
        streams |= {"reward/implicit": paid, "reward/total": paid}
    metrics = {
        "loss/policy": total,
        "answer/nats": -logprobs[rows.desirable].sum().item() / max(rows.num_learnt, 1),
        "completion/length": rows.batch.num_actions / len(rows.episodes),
        "tokens/learnt": float(rows.batch.num_actions),
        "grad/norm": math.nan if norm is None else norm,
        "grad/clipped_share": float(bool(limit and norm and norm > limit)),
        "learning_rate": config.learning_rate * rate,
        "skipped/updates": float(run.progress.skipped),
    }
    metrics |= distance_figures(run)
    if not isinstance(method, Sft):
        metrics |= preference_metrics(paid.sum(1), rows.desirable, paired=examples.kind == "pairs")
    return metrics, streams


def preference_metrics(sums: Float[Tensor, " B"], desirable: Bool[Tensor, " B"], *, paired: bool) -> dict[str, float]:
    """What answers earn by the scores of the method: good ones, others, and of pairs how often the right one more."""
    chosen, rejected = sums[desirable], sums[~desirable]
    figures = {}
    if len(chosen):
        figures["preference/chosen"] = chosen.mean().item()
    if len(rejected):
        figures["preference/rejected"] = rejected.mean().item()
    if paired:
        figures["preference/margin"] = (chosen - rejected).mean().item()
        figures["preference/accuracy"] = _right(chosen - rejected).mean().item()
    return figures


def _mean_nats(logprobs: Float[Tensor, "B T"], rows: Rows) -> float:
    learnt = rows.batch.action_mask & rows.desirable[:, None]
    return -torch.where(learnt, logprobs, 0.0).sum().item() / max(int(learnt.sum()), 1)


def _right(margins: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1 for a pair whose chosen answer earns more, half for a tie, as where nothing was learnt yet."""
    return (margins.sign() + 1) / 2


# --- held out ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOutAnswers:
    """What a policy makes of the answers of held-out items: their probability, and whether it prefers the right one."""

    method: OfflineConfig
    examples: Examples
    items: Sequence[Item]

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that it gives each item."""
        if self.examples.kind == "pairs":
            return ("answer_logprob", "preference_margin", "preference_accuracy")
        return ("answer_logprob",) if self.examples.kind == "answers" else ("preference_score",)

    @cached_property
    def fits(self) -> list[bool]:
        """Of each item, whether the context holds its prompt and answers together."""
        return [self.examples.longest(item) <= self.context_length for item in self.items]

    @property
    def context_length(self) -> int:
        return self.examples.context_length

    def __call__(self, policy: Policy, reference: Reference | None) -> dict[str, list[float | None]]:
        """Each metric for each item, None for one that the context cannot hold with its answer.

        reference: what implicit rewards compare with.
        """
        fitting = [item for item, fits in zip(self.items, self.fits, strict=True) if fits]
        if not fitting:
            return {name: [None] * len(self.items) for name in self.names}
        found = dict[str, list[float | None]]()
        for name, values in self._measure(fitting, policy, reference).items():
            known = iter(values.tolist())
            found[name] = [next(known) if fits else None for fits in self.fits]
        return found

    def _measure(
        self, items: Sequence[Item], policy: Policy, reference: Reference | None
    ) -> dict[str, Float[Tensor, " N"]]:
        episodes, good = self.examples.episodes(items)
        batch = to_batch(episodes, Controls(), device=str(policy.device))
        desirable = torch.tensor(good, device=batch.tokens.device)
        new = policy.score(batch)
        ref = reference.score(batch) if reference is not None and needs_reference(self.method) else None
        means = new.logprobs.sum(1) / batch.action_mask.sum(1)
        if isinstance(self.method, Sft):
            return {"answer_logprob": means}
        sums = scores(self.method, new, ref, batch, desirable).sum(1)
        if self.examples.kind == "labels":
            return {"preference_score": torch.where(desirable, sums, -sums)}
        margin = sums[desirable] - sums[~desirable]
        return {
            "answer_logprob": means[desirable],
            "preference_margin": margin,
            "preference_accuracy": _right(margin),
        }
