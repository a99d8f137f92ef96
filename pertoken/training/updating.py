"""One update of the policy: from the samples of a step and their credit to weights that have moved.

Everything around it, what is sampled, scored and written down, is in `trainer.py`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from pertoken.batching import Cut, Part, optimizer_steps
from pertoken.config import RunConfig
from pertoken.errors import NumericsError
from pertoken.objectives import aggregate, critic_loss, kl_per_token, policy_loss
from pertoken.observe import Updated
from pertoken.segments import cut
from pertoken.training.balance import Gradients
from pertoken.training.state import Run
from pertoken.training.trust_region import Fisher, Weights, line_search, natural_step
from pertoken.types import Credit, PolicyOutput, TokenBatch

RATIO_TOLERANCE = 1e-4
"""Largest |scored - sampled| log-prob of a token under the same float32 weights (nats)."""


def update(
    run: Run,
    batch: TokenBatch,
    old: PolicyOutput,
    ref: PolicyOutput | None,
    credit: Credit,
    step: int,
    tasks: Int[Tensor, " B"] | None = None,
) -> Updated:
    """All optimiser steps on one batch. A non-finite loss or gradient skips its optimiser step and is counted.

    tasks: a number for the task of each row, which `update.balance` goes by. Texts that were written by segments are
    learnt from segment by segment, by the credit that the whole text gave their tokens.
    """
    pieces = cut(batch)
    if pieces is None:
        return _update(run, batch, old, ref, credit, step, tasks)
    of_row = None if tasks is None or pieces.batch.whole is None else tasks[pieces.batch.whole.text]
    beside = None if ref is None else pieces.taken(ref)
    updated = _update(run, pieces.batch, pieces.taken(old), beside, pieces.credit(credit), step, of_row)
    return replace(updated, streams={name: pieces.put(cells) for name, cells in updated.streams.items()})


def _update(
    run: Run,
    batch: TokenBatch,
    old: PolicyOutput,
    ref: PolicyOutput | None,
    credit: Credit,
    step: int,
    tasks: Int[Tensor, " B"] | None,
) -> Updated:
    config, seed = run.config.update, run.config.seed * 1_000_003 + step
    balanced = tasks is not None and config.balance == "pcgrad"
    gradients = Gradients(run.policy.trainable(), seed=seed) if balanced else None
    rate = set_learning_rate(run, step)
    norms: list[float] = []
    steps = 0
    region: dict[str, float] = {}
    head_only = head_only_at(run.config, step)
    natural = config.trust_region is not None and not head_only
    entropy_coefficient = _entropy_coefficient(run.config, batch, old)
    drift = _Drift(config.stop_kl, adapts=config.schedule == "kl")
    passes = _Passes(run, batch, entropy_coefficient, head_only, gradients, drift, first=old.logprobs.clone())
    cuts = optimizer_steps(
        batch, old, ref, credit, epochs=config.epochs, num_minibatches=config.minibatches, seed=seed,
        left_out=_without_effect(run, credit), tasks=tasks if gradients else None,
    )  # fmt: skip
    for of_step in cuts:
        passes.add_up(of_step)
        steps += 1
        if drift.too_far():
            run.optimizer.zero_grad(set_to_none=False)
            break
        if gradients:
            gradients.combine()
        if natural:
            loss = passes.sums["loss/policy"]
            norm, region = natural_step_of(run, passes.parts, batch, loss, entropy_coefficient, passes.bad, step)
        else:
            norm = step_optimizer(run, passes.bad, step, head_only=head_only)
        passes.moved = passes.moved or norm is not None
        norms += [] if norm is None else [norm]
    first, streams, sums = passes.first, passes.streams, passes.sums
    metrics = check_sampled(run, batch, replace(old, logprobs=first)) | {
        "loss/policy": sums["loss/policy"] / max(steps, 1),
        "clip/share": streams["clipped"].sum().item() / max(batch.num_actions, 1) if streams else 0.0,
        "kl/coefficient": run.kl.coefficient,
        "learning_rate": config.learning_rate * rate,
        "skipped/updates": float(run.progress.skipped),
        "staleness": float(run.staleness),
    }
    metrics |= _norm_figures(norms, steps, None if natural else config.max_grad_norm)
    metrics |= distance_figures(run) | region | drift.figures() | _importance_figures(run, batch, streams)
    metrics |= gradients.figures() if gradients else {}
    metrics |= {"groups/redrawn": float(run.redrawn)} if run.config.rollout.redraws else {}
    metrics |= {"loss/value": sums["loss/value"] / max(steps, 1)} if run.policy.value_head is not None else {}
    if ref is not None:  # of the policy that wrote the samples, whatever the update has made of it since
        streams["kl"] = kl_per_token(first, ref.logprobs, batch.action_mask, estimator="k1")
    return Updated(metrics, streams)


@dataclass
class _Passes:
    """The passes over the parts of an update, and what they add up."""

    run: Run
    batch: TokenBatch
    entropy_coefficient: float
    head_only: bool
    gradients: Gradients | None
    drift: "_Drift"
    first: Tensor
    """Log-probs under the weights before the update, of the samplers where no pass has seen them yet."""
    streams: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=lambda: {"loss/policy": 0.0, "loss/value": 0.0})
    """Losses of all optimiser steps."""
    parts: list[Part] = field(default_factory=list)
    """Those of the optimiser step that was added up last, where its step asks for them again (a trust region)."""
    bad: str = ""
    """What is wrong with its gradient, in words."""
    moved: bool = False
    """Whether an optimiser step has changed the weights."""

    def add_up(self, cut: Cut) -> None:
        """Add up the gradient of an optimiser step; where its micro-batches do not fit, of smaller ones."""
        lengths, before, start_over = self.batch.attention_mask.sum(1), self.sums, from_here(self.run)

        def undo() -> None:
            start_over()
            self.drift.begin()
            if self.gradients:
                self.gradients.forget()

        def passes(tokens: int) -> None:
            self.sums, self.parts, self.bad = dict(before), [], ""
            for part in cut(tokens):
                self._add(part)

        self.run.micro_batch.attempt(passes, there=int(lengths.sum()), least=int(lengths.max()), undo=undo)

    def _add(self, part: Part) -> None:
        run = self.run
        new = _pass(run, part, entropy_grad=self.entropy_coefficient != 0)
        if not self.moved and not run.policy.dropout:
            # Until the weights move, old and new are the same policy; taking the same pass for both removes the
            # rounding noise between passes of different shapes (and the drift of the sampler).
            part = replace(part, old=replace(part.old, logprobs=new.logprobs.detach()))
            check_sampled(run, part.batch, part.old, part.rows)
            self.first[part.rows] = part.old.logprobs
        loss = part_loss(
            run, part, new, self.sums, self.streams, self.batch, self.entropy_coefficient, head_only=self.head_only
        )
        self.bad = self.bad or _backward(loss, part)
        self.drift.add(part, new)
        if self.gradients and part.last_of_task:
            self.gradients.put_aside()
        if run.config.update.trust_region is not None:
            self.parts.append(part)


def from_here(run: Run) -> Callable[[], None]:
    """What takes back the gradients that are added up from now on, and puts random states back to where they are."""
    device = run.policy.device
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def start_over() -> None:
        run.optimizer.zero_grad(set_to_none=False)
        torch.set_rng_state(states[0])
        if states[1] is not None:
            torch.cuda.set_rng_state(states[1], device)

    return start_over


def head_only_at(config: RunConfig, step: int) -> bool:
    """Whether `step` is one of those at the beginning in which the critic alone learns."""
    head = config.policy.value_head
    return head is not None and step <= head.pretrain_steps


def _pass(run: Run, part: Part, *, entropy_grad: bool) -> PolicyOutput:
    """The policy of now on a part, with gradient; beside the whole distribution of the reference where it was kept."""
    against = None
    if run.reference is not None and part.ref is not None and part.ref.hidden is not None:
        against = run.reference.against(part.ref)
    return run.policy.score(part.batch, grad=True, entropy_grad=entropy_grad, into_grad=True, against=against)


def _backward(loss: Tensor, part: Part) -> str:
    """Add the gradients of a loss up; what is wrong, in words, if there are none."""
    if not math.isfinite(loss.item()):
        return f"loss {loss.item()} in episodes {', '.join(part.batch.episode_ids[:4])} ..."
    loss.backward()
    return ""


def part_loss(
    run: Run,
    part: Part,
    new: PolicyOutput,
    sums: dict[str, float],
    streams: dict[str, Tensor],
    batch: TokenBatch,
    entropy_coefficient: float,
    *,
    head_only: bool,
) -> Tensor:
    """The part's share of the loss of its optimiser step: all denominators are those of the whole step."""
    objective, kl, mask = run.config.objective, run.config.kl, part.batch.action_mask
    tokens = policy_loss(
        new, part.old, part.ref, part.credit, part.batch,
        surrogate=objective.surrogate, level=objective.level, clip_low=objective.clip_low,
        clip_high=objective.clip_high, dual_clip=objective.dual_clip, importance_cap=objective.importance_cap,
        importance_floor=objective.importance_floor, importance_level=objective.importance_level,
        importance_outside=objective.importance_outside,
        kl_coefficient=run.kl.coefficient if kl.place == "loss" else 0.0, kl_estimator=kl.estimator,
        entropy_coefficient=entropy_coefficient,
    )  # fmt: skip
    denominators = {
        "token": part.num_actions,
        "sequence": part.num_rows,
        "constant": part.num_rows * run.config.rollout.sampling.max_new_tokens,
    }
    lengths = None if part.batch.whole is None else part.batch.whole.actions
    loss = aggregate(
        tokens.per_token, mask, over=objective.over, denominator=denominators[objective.over], lengths=lengths
    )
    sums["loss/policy"] += loss.item()
    seen = dict(tokens.aux)
    head = run.config.policy.value_head
    if head is not None:
        errors = critic_loss(new, part.old, part.credit, part.batch, clip=head.clip)
        value = aggregate(errors.per_token, mask, over="token", denominator=part.num_actions)
        sums["loss/value"] += value.item()
        loss = head.coefficient * value if head_only else loss + head.coefficient * value
        seen |= errors.aux
    for name, cells in seen.items():
        neutral = batch.action_mask.float() * (name in ("ratio", "importance_weight"))  # of rows that are left out
        streams.setdefault(name, neutral)[part.rows] = cells.to(torch.float32)
    return loss


def _without_effect(run: Run, credit: Credit) -> Tensor | None:
    """Rows whose loss and gradient are 0 whatever the weights: no advantage, and no other term of the loss."""
    config = run.config
    if config.kl.place == "loss" or config.objective.entropy_coefficient or run.policy.value_head is not None:
        return None
    if config.update.trust_region is not None:
        return None  # they have no loss, and bound the step as all others do
    return ~credit.advantages.any(1)


def _entropy_coefficient(config: RunConfig, batch: TokenBatch, old: PolicyOutput) -> float:
    """The weight of the entropy in this step: 0 where there is a floor and the policy is still above it."""
    objective = config.objective
    if objective.entropy_floor is None or not batch.num_actions:
        return objective.entropy_coefficient
    mean = old.entropy[batch.action_mask].mean().item()
    return objective.entropy_coefficient if mean < objective.entropy_floor else 0.0


def step_optimizer(run: Run, bad: str, step: int, *, head_only: bool = False) -> float | None:
    """Clip and step; None if the gradient could not be used. With `head_only`, all but the value head stays put."""
    named = run.policy.trainable()
    kept = {name: p.grad for name, p in named.items() if head_only and not name.startswith("value_head.")}
    for name in kept:
        named[name].grad = None  # the optimiser passes over it, and its averages do not move
    parameters = list(named.values())
    if run.anchor is not None:
        run.anchor.pull(named)
    if run.config.update.max_grad_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, run.config.update.max_grad_value)
    limit = run.config.update.max_grad_norm
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf).item()
    usable = _usable(run, bad, norm, step)
    if usable:
        run.optimizer.step()
    for name, gradient in kept.items():
        named[name].grad = gradient
    run.optimizer.zero_grad(set_to_none=False)  # gradients stay where they are: new ones would leave the heap in pieces
    return norm if usable else None


def _usable(run: Run, bad: str, norm: float, step: int) -> bool:
    """Whether loss and gradient are finite; what is not is counted, and too much of it ends the run."""
    if not bad and math.isfinite(norm):
        return True
    run.progress.skipped += 1
    run.notes.append(f"step {step}: update skipped, {bad or f'gradient norm {norm}'}")
    if run.progress.skipped > run.config.update.max_skipped:
        raise NumericsError(
            f"step {step}: {run.progress.skipped} updates had a non-finite loss or gradient (update.max_skipped "
            f"{run.config.update.max_skipped}); the last: {bad or f'gradient norm {norm}'}. Lower "
            "update.learning_rate, or use policy.precision float32."
        )
    return False


def natural_step_of(
    run: Run, parts: Sequence[Part], batch: TokenBatch, loss: float, entropy_coefficient: float, bad: str, step: int
) -> tuple[float | None, dict[str, float]]:
    """Move the policy by TRPO's step, and the critic by AdamW's, from the gradients that are there.

    parts, loss: of the pass that made the gradients. Returns their norm (of the policy's; None if they could not be
    used) and what is logged of the step.
    """
    settings, before = run.config.update.trust_region, run.before_update
    assert settings is not None
    assert before is not None
    before.follow(1.0)
    named = {name: p for name, p in run.policy.hf_model.named_parameters() if p.requires_grad}
    weights = Weights(named, before.tensors())
    gradient = weights.gradient()
    norm = gradient.norm().item()
    usable = _usable(run, bad, norm, step)
    step_optimizer(run, "", step, head_only=True) if usable else run.optimizer.zero_grad(set_to_none=False)
    if not usable or not norm:
        return (norm if usable else None), {"trust/step_share": 0.0, "trust/kl": 0.0}
    others = [before.against(before.score(part.batch, hidden=True), forward=True) for part in parts]

    def kl_and_gradient(at: Tensor) -> tuple[float, Tensor]:
        weights.move(at)
        run.optimizer.zero_grad(set_to_none=False)
        nats = 0.0
        for part, other in zip(parts, others, strict=True):
            new = run.policy.score(part.batch, grad=True, into_grad=True, against=other)
            assert new.kl is not None
            kl = new.kl.sum() / part.num_actions
            kl.backward()
            nats += kl.item()
        return nats, weights.gradient()

    def measure(share: float) -> tuple[float, float]:
        weights.move(way, share)
        sums, kl = {"loss/policy": 0.0, "loss/value": 0.0}, 0.0
        for part, other in zip(parts, others, strict=True):
            new = run.policy.score(part.batch, against=other)
            assert new.kl is not None
            part_loss(run, part, new, sums, {}, batch, entropy_coefficient, head_only=True)
            kl += new.kl.sum().item() / part.num_actions
        return sums["loss/policy"], kl

    way = natural_step(
        gradient, Fisher(kl_and_gradient, reach=1e-3 * weights.length()),
        kl=settings.kl, iterations=settings.iterations, damping=settings.damping,
    )  # fmt: skip
    run.optimizer.zero_grad(set_to_none=False)
    share, kl = line_search(measure, loss=loss, kl=settings.kl, shrink=settings.shrink, tries=settings.tries)
    weights.move(way, share)
    return norm, {"trust/step_share": share, "trust/kl": kl}


def set_learning_rate(run: Run, step: int) -> float:
    """Give each group of parameters the learning rate of `step`; returns its share of the peak."""
    share = learning_rate_factor(run.config, step) * run.progress.rate
    for group in run.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
    return share


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """Share of the peak learning rate in step 1, 2, ...: linear warm-up, then a schedule of steps."""
    update, total = config.update, config.stop.steps or 0
    if step <= update.warmup_steps:
        return step / update.warmup_steps
    if update.schedule not in ("linear", "cosine"):
        return 1.0
    done = min(1.0, (step - update.warmup_steps - 1) / max(1, total - update.warmup_steps - 1))
    left = 1.0 - done if update.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return update.final_share + (1.0 - update.final_share) * left


class _Drift:
    """How far an update has moved the policy, looked at before each of its optimiser steps (`update.stop_kl`)."""

    def __init__(self, limit: float | None, *, adapts: bool) -> None:
        self._limit, self._nats, self._actions, self._ended = limit, 0.0, 0, False
        self._looks, self._moved = limit is not None or adapts, 0.0

    def begin(self) -> None:
        """Forget the parts since the last optimiser step."""
        self._nats, self._actions = 0.0, 0

    def add(self, part: Part, new: PolicyOutput) -> None:
        """Look at a part. The tokens are samples of the policy before the update: k3 to the one of now."""
        if self._looks:
            before, now, mask = part.old.logprobs, new.logprobs.detach(), part.batch.action_mask
            self._nats += kl_per_token(before, now, mask, estimator="k3").sum().item()
            self._actions += part.batch.num_actions

    def too_far(self) -> bool:
        """Whether the parts since the last time say that the update should end."""
        self._moved = self._nats / max(self._actions, 1)
        self._ended = self._limit is not None and self._moved > self._limit
        self.begin()
        return self._ended

    def figures(self) -> dict[str, float]:
        """What is logged of it."""
        found = {"update/kl": self._moved} if self._looks else {}
        return found if self._limit is None else found | {"update/stopped": float(self._ended)}


def check_sampled(run: Run, batch: TokenBatch, old: PolicyOutput, rows: Tensor | None = None) -> dict[str, float]:
    """`check_ratio` of the rows that were sampled for this step: of those that are replayed the sampler was another.

    rows: where the rows of `batch` are in the step's batch; None if it is all of it. Segments know their text.
    """
    if run.sampled is not None:
        places = torch.arange(len(batch.episode_ids)) if rows is None else rows.cpu()
        places = places if batch.whole is None else batch.whole.text.cpu()
        kept = (places < run.sampled).nonzero()[:, 0].to(batch.group.device)
        batch, old = batch.rows(kept), old.rows(kept)
    return check_ratio(batch, old, exact=is_exact(run))


def check_ratio(batch: TokenBatch, old: PolicyOutput, *, exact: bool) -> dict[str, float]:
    """Drift between the log-probs at sampling and at scoring, under the same weights: the ratio must be 1.

    In float32 (`exact`) a token beyond `RATIO_TOLERANCE` raises NumericsError: then the distribution that is
    trained is not the one that was sampled. In bfloat16 the drift is reported, and importance weights repair it.
    """
    if not batch.num_actions:
        return {"drift/mean": 0.0, "drift/max": 0.0}
    gap = torch.where(batch.action_mask, old.logprobs - batch.sample_logprobs, 0.0).abs()
    worst = gap.max().item()
    if not worst < math.inf or (exact and worst > RATIO_TOLERANCE):
        row, column = divmod(int(gap.nan_to_num(math.inf).argmax()), gap.shape[1])
        raise NumericsError(
            f"episode {batch.episode_ids[row]}, token {column}: sampled with log-prob "
            f"{batch.sample_logprobs[row, column].item():.6f}, but the same weights score it "
            f"{old.logprobs[row, column].item():.6f}. The ratio before the first update must be 1 "
            f"(tolerance {RATIO_TOLERANCE} nats in float32). Please report the model and the sampling controls."
        )
    return {"drift/mean": gap.sum().item() / batch.num_actions, "drift/max": worst}


def is_exact(run: Run) -> bool:
    """Whether sampled log-probs are those of the policy before the update: float32, and no update in between."""
    return run.policy.autocast_dtype is None and not run.staleness


def _norm_figures(norms: Sequence[float], steps: int, limit: float | None) -> dict[str, float]:
    """Of the gradients of the optimiser steps that were made, of `steps` that were tried."""
    return {
        "grad/norm": sum(norms) / len(norms) if norms else math.nan if steps else 0.0,
        "grad/clipped_share": sum(n > limit for n in norms) / len(norms) if limit and norms else 0.0,
    }


def _importance_figures(run: Run, batch: TokenBatch, streams: dict[str, Tensor]) -> dict[str, float]:
    """The share of tokens whose importance weight was bounded."""
    if "importance_weight" not in streams:
        return {}
    weights, objective = streams["importance_weight"], run.config.objective
    if objective.importance_outside == "mask":
        bounded = batch.action_mask & (weights == 0)
    else:
        bounded = batch.action_mask & (weights >= (objective.importance_cap or math.inf))
    return {"importance/clipped_share": bounded.sum().item() / max(batch.num_actions, 1)}


def distance_figures(run: Run) -> dict[str, float]:
    """How far the weights are from where they began, where the run keeps those."""
    return {} if run.anchor is None else {"distance/initial": run.anchor.distance(run.policy.trainable())}


def settle(run: Run, step: int, moved: float | None = None) -> None:
    """What follows an update of the weights: their average, copies that are moved, a learning rate that adapts.

    moved: nats per token that the update had moved the policy before its last optimiser step, where that was measured.
    """
    config, kl, mask = run.config.update, run.config.kl, run.config.rollout.mask
    if run.average is not None:
        run.average.update(run.policy.trainable())
    if run.reference is not None and kl.refresh_every and step % kl.refresh_every == 0:
        run.reference.follow(kl.refresh_share)
    if run.mask is not None and mask is not None and step % mask.refresh_every == 0:
        run.mask.load_weights(run.policy.trainable(), version=step)
    if config.schedule == "kl" and config.target_kl is not None and moved is not None:
        run.progress.rate = rate_by_kl(run.progress.rate, moved, target=config.target_kl, least=config.final_share)


def rate_by_kl(rate: float, moved: float, *, target: float, least: float) -> float:
    """The share of the peak learning rate after an update that moved the policy by `moved` nats per token.

    Divided by 1.5 if that is more than twice the target, multiplied by it if less than half, as Schulman et al. 2017
    (https://arxiv.org/abs/1707.06347, sec. 4) move a penalty; between `least` and 1.

    >>> [rate_by_kl(0.6, moved, target=0.01, least=0.1) for moved in (0.03, 0.01, 0.004)]
    [0.39999999999999997, 0.6, 0.8999999999999999]
    """
    if moved > 2.0 * target:
        rate /= 1.5
    elif moved < target / 2.0:
        rate *= 1.5
    return min(max(rate, least), 1.0)
