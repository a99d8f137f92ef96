"""Checks from rewards to the loss: what is paid is credited, the end counts, coefficients act. No pass of the model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pertoken import batching, credit
from pertoken.batching import Part
from pertoken.config import RunConfig
from pertoken.doctor.base import (
    Probe,
    Verdict,
    changed,
    check,
    credited,
    largest,
    made_up,
    made_up_batch,
    numbers,
    skipped,
    vocabulary,
    within,
)
from pertoken.objectives import FixedKL
from pertoken.rewards import Scene, ScoredSpan, Weighted, episode_reward, score, span_reward, token_reward
from pertoken.training import trainer, updating
from pertoken.training.state import Run
from pertoken.types import Credit, PolicyOutput, TokenBatch, TokenRewards

SUM_TOLERANCE = 1e-4
"""Largest difference of two sums of rewards of a row, beside their size: they are float32."""

EFFECT = 1e-6
"""A coefficient that moves everything by less than this share has no effect."""

KL_TOLERANCE = 1e-6


# --- conservation ----------------------------------------------------------------------------------------


@check(
    "every reward that is paid is credited to an action: sums in are sums out, whatever the granularity",
    remedy="A reward is lost on its way to the tokens. If a part of yours is named, see that it returns one value for "
    "each token of sample.tokens (`pertoken reward check`); otherwise report it.",
    quick=True,
)
def conservation(probe: Probe) -> Verdict:
    """The parts of the batch against their total, and a reward of each granularity that pays 1 a row."""
    if probe.unpaid:
        return Verdict("fail", words=probe.unpaid)
    rewards, mask, gaps = probe.rewards, probe.batch.action_mask, {}
    zero, size = torch.zeros_like(rewards.total), 1 + largest(rewards.total.sum(1))
    gaps["the parts of the rewards"] = largest(sum(rewards.parts.values(), zero) - rewards.total)
    gaps["rewards off actions"] = largest(rewards.total[~mask])
    returns = credit.reward_to_go(torch.where(mask, rewards.total, 0.0), mask, gamma=1.0)
    first = mask & (mask.cumsum(1) == 1)
    gaps["reward-to-go of first actions"] = (
        largest(torch.where(first, returns, 0.0).sum(1) - rewards.total.sum(1)) / size
    )
    paid = Scene(probe.batch, probe.scene.episodes, probe.scene.tokenizer)
    acting = mask.any(1).double()
    payers = _payers()
    for part in payers:
        got = score([part], paid).total.double().sum(1)
        gaps[f"a reward of {part.name}"] = largest(got - acting.to(got))
    worst = max(gaps, key=lambda name: gaps[name])
    return within(
        gaps[worst], SUM_TOLERANCE,
        seen=f"{len(mask)} samples, {len(rewards.parts)} parts, {len(payers)} granularities",
        wrong=f"{worst}: what was paid and what was credited differ",
    )  # fmt: skip


def _payers() -> list[Weighted]:
    """A reward of each granularity that pays 1 for each completion, one of them on cells that are no actions, too."""

    def everywhere(scene: Scene) -> Tensor:
        cells = scene.batch.attention_mask.double()
        cells = cells * scene.batch.action_mask.any(1, keepdim=True)
        return cells / cells.sum(1, keepdim=True).clamp_min(1)

    kinds: dict[str, Any] = {
        "whole texts": episode_reward(lambda sample: float(any(sample.action_mask))),
        "whole texts, spread": episode_reward(place="spread")(lambda sample: float(any(sample.action_mask))),
        "character ranges": span_reward(lambda sample: [ScoredSpan(0, len(sample.text), 1.0)] if sample.tokens else []),
        "tokens": token_reward(lambda sample: [1 / len(sample.tokens)] * len(sample.tokens)),
        "cells, prompts included": everywhere,
    }
    return [Weighted(reward, 1.0, name) for name, reward in kinds.items()]


# --- the end of a completion -----------------------------------------------------------------------------


@check(
    "the end-of-sequence token is an action: it gets its reward, its advantage and its gradient",
    remedy="The action mask leaves the last token out, or was made by looking for token ids: masks must come from "
    "lengths. Use `to_episode` and `to_batch` as they are, and return completions with the end token in them.",
    quick=True,
)
def eos(probe: Probe) -> Verdict:
    """Two made-up answers that end by it, one paid better than the other for ending so."""
    ends = probe.run.policy.eos_ids
    if not ends:
        return skipped("the model has no end-of-sequence token: completions end by length or stop strings only")
    vocab = vocabulary(probe)
    episodes = made_up(probe, [[7 % vocab, 11 % vocab, ends[0]], [7 % vocab, ends[0]]], ["eos", "eos"], group_size=2)
    batch = batching.to_batch(episodes, type(probe.run.controls)())
    last = torch.tensor([4, 3])
    rows = torch.arange(2)
    if not bool(batch.action_mask[rows, last].all()):
        return Verdict("fail", 0.0, 0.0, words="the end token is not an action: it can neither be paid nor learn")
    paid = episode_reward(lambda sample: 0.25 if len(sample.tokens) == 2 else 1.0)
    rewards = score([Weighted(paid, 1.0, "end")], Scene(batch, episodes, probe.scene.tokenizer))
    lost = largest(rewards.total[rows, last] - torch.tensor([1.0, 0.25]))
    zeros = torch.zeros_like(batch.sample_logprobs)
    old = PolicyOutput(batch.sample_logprobs, zeros, zeros, zeros[:, 0])
    given = credited(probe.config.credit, rewards, batch, old)
    slope = _slope(probe, batch, old, given)[rows, last].abs().min().item()
    own = given.advantages[rows, last].abs().max().item()
    real = [e for e in probe.scene.episodes if e.stop == "eos"]
    masked = sum(not e.action_mask[-1] or e.tokens[-1] not in ends for e in real)
    words = [
        *([f"its reward is off by {lost:.2g}"] if not lost < SUM_TOLERANCE else []),
        *(["it has no advantage"] if not own > 0 else []),
        *(["the loss has no gradient there"] if not slope > 0 else []),
        *([f"{masked} samples that ended by it do not have it as their last action"] if masked else []),
    ]
    seen = f"two made-up answers, and {len(real)} samples that ended by it"
    return Verdict("fail" if words else "pass", lost, SUM_TOLERANCE, words="; ".join(words) or seen)


@check(
    "padding with the end-of-sequence id takes no real token away",
    remedy="Something searches the ids for the padding id: masks must come from lengths. Make batches by `to_batch`.",
    quick=True,
)
def pad_is_eos(probe: Probe) -> Verdict:
    """Answers of different lengths that end by the id that the rest of their rows is filled with."""
    ends, vocab = probe.run.policy.eos_ids or (0,), vocabulary(probe)
    answers = [[7 % vocab] * k + [ends[0]] for k in (1, 4, 2)]
    batch = batching.to_batch(
        made_up(probe, answers, ["eos"] * 3, group_size=3), type(probe.run.controls)(), pad_id=ends[0]
    )
    missing = sum(map(len, answers)) - batch.num_actions
    extra = int(batch.attention_mask.sum()) - sum(len(ids) + 2 for ids in answers)
    return within(
        max(abs(missing), abs(extra)), 0, "tokens", seen="three made-up answers, padded with their own last id",
        wrong=f"with the end token as padding {missing} actions are missing and {extra} idle cells count as tokens",
    )  # fmt: skip


@check(
    "a completion that was cut off is credited as cut off, and not as ended",
    remedy="`terminated` must come from why a completion stopped (length, context: cut off), and the value after its "
    "last token belongs into its advantage: use `bootstrap_values`. Without a critic nothing may depend on it.",
    quick=True,
)
def truncation(probe: Probe) -> Verdict:
    """The same rows once ended and once cut off: with a critic they differ by its value of what follows."""
    batch, config = made_up_batch(probe), changed(probe.config, "credit.normalize", "none").credit
    wrong = int((batch.terminated != torch.tensor([bool(row % 2) for row in range(8)])).sum())
    if wrong:
        return Verdict(
            "fail", float(wrong), 0.0, "rows", f"{wrong} of 8 rows do not know whether they ended or were cut off"
        )
    values, rewards = numbers(batch.tokens, 1) * batch.action_mask, _numbers_as_rewards(batch)
    old = PolicyOutput(batch.sample_logprobs, values, values, bootstrap=1 + values.sum(1).abs())
    ended, cut = (
        credited(config, rewards, replace(batch, terminated=torch.full_like(batch.terminated, flag)), old)
        for flag in (True, False)
    )
    last = batch.action_mask & (batch.action_mask.flip(1).cumsum(1).flip(1) == 1)
    differences = (cut.advantages - ended.advantages)[last]
    if config.type == "gae":
        assert old.bootstrap is not None
        gap = largest(differences - config.gamma * old.bootstrap)
        seen = "with a critic the last advantage of a cut-off row holds the value of what follows"
        return within(
            gap, KL_TOLERANCE, seen=seen, wrong="the last advantage of a cut-off row lacks the critic's value"
        )
    gap = largest(cut.advantages - ended.advantages)
    seen = f"credit.type {config.type} has no critic: cut-off rows keep what they earned, and nothing is added"
    return within(gap, KL_TOLERANCE, seen=seen, wrong="cut-off rows get other advantages, though there is no critic")


# --- coefficients ----------------------------------------------------------------------------------------


@check(
    "every coefficient that is configured has an effect",
    remedy="The setting that is named is read nowhere, or something behind it cancels it: leave it out, or see whether "
    "credit.normalize or a clip hides it.",
    quick=True,
)
def coefficients(probe: Probe) -> Verdict:
    """Each one changed by itself: weights and the KL penalty on the batch, the others on made-up rows."""
    effects = dict(_effects(probe))
    if not effects:
        return skipped("no coefficient is set to anything that acts")
    dead = [name for name, effect in effects.items() if not effect > EFFECT]
    seen = f"changed one by one: {', '.join(effects)}"
    if dead:
        return Verdict("fail", min(effects.values()), words=f"no effect: {', '.join(dead)}")
    return Verdict("pass", min(effects.values()), words=seen)


def _effects(probe: Probe) -> Iterator[tuple[str, float]]:
    yield from _effects_of_weights(probe)
    config, batch = probe.config, made_up_batch(probe)
    before = _made_up_loss(probe, config, batch)
    for path, value in _other_settings(config):
        yield path, _difference(before, _made_up_loss(probe, changed(config, path, value), batch))


def _effects_of_weights(probe: Probe) -> Iterator[tuple[str, float]]:
    """Of the weight of each part, and of the KL penalty in the reward; a part that said nothing here is left out."""
    run, scene, config = probe.run, probe.scene, probe.config
    parts = [
        Weighted(_Said(cells / weight), weight, name)
        for name, cells in probe.rewards.parts.items()
        if name not in ("kl", "env") and (weight := probe.rewards.weights.get(name, 1.0)) and bool(cells.any())
    ]
    noisy, old = _with_noise(scene)
    penalty = config.kl.place == "reward" and run.kl.coefficient > 0

    def outcome(rewards: list[Weighted], coefficient: float) -> tuple[Tensor, Tensor]:
        settled: Run = replace(run, rewards=rewards, kl=FixedKL(coefficient))
        paid = trainer.reward(settled, noisy)
        return paid.total, credited(config.credit, paid, noisy.batch, old).advantages

    # A baseline takes away what is the same in all rows, a normaliser the scale of what is alone; rightly so.
    differs = [bool(outcome([part], 0.0)[1].any()) for part in parts]
    alone = sum(differs) + penalty < 2
    before = outcome(parts, run.kl.coefficient)

    def effect(after: tuple[Tensor, Tensor], on_total: bool) -> float:
        return _difference(before[:1], after[:1]) if on_total else _difference(before[1:], after[1:])

    for k, part in enumerate(parts):
        others = [*parts[:k], replace(part, weight=3 * part.weight_at(scene.step)), *parts[k + 1 :]]
        yield f"weight of {part.name}", effect(outcome(others, run.kl.coefficient), alone or not differs[k])
    if penalty:
        yield "kl.coefficient", effect(outcome(parts, 3 * run.kl.coefficient), alone)


class _Said:
    """A reward that has spoken already."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.double()

    def __call__(self, scene: Scene) -> Tensor:
        return self._values


def _with_noise(scene: Scene) -> tuple[Scene, PolicyOutput]:
    """The scene with a reference that differs from the policy, as after some steps, and a critic that speaks."""
    mask, old = scene.batch.action_mask, scene.old
    assert old is not None
    noise = numbers(old.logprobs, 3).to(old.logprobs) * mask
    ref = PolicyOutput(old.logprobs - noise, old.entropy)
    old = replace(old, values=noise, bootstrap=noise.sum(1))
    return replace(scene, old=old, ref=ref), old


def _other_settings(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """Settings of credit and loss that act, each with another value to compare."""
    objective, critic = config.objective, config.policy.value_head
    for name in ("gamma", "lam", "beta"):
        value = getattr(config.credit, name, None)
        if value is not None and getattr(config.credit, "by", "token") == "token":
            yield f"credit.{name}", value - 0.5 if value > 0.5 else value + 0.25
    if hasattr(config.credit, "scale_by_std"):
        yield "credit.scale_by_std", not config.credit.scale_by_std
    if objective.surrogate == "clipped":
        yield "objective.clip_low", 0.5 * objective.clip_low
        yield "objective.clip_high", 0.5 * objective.clip_high
        if objective.dual_clip is not None:
            yield "objective.dual_clip", objective.dual_clip + 0.5
    if objective.importance_cap is not None:
        yield "objective.importance_cap", 0.5 * objective.importance_cap
    if objective.entropy_coefficient:
        yield "objective.entropy_coefficient", 3 * objective.entropy_coefficient
    if config.kl.place == "loss" and config.kl.coefficient:
        yield "kl.coefficient", 3 * config.kl.coefficient
    if critic is not None:
        yield "policy.value_head.coefficient", 3 * critic.coefficient
        if critic.clip is not None:
            yield "policy.value_head.clip", 0.1 * critic.clip


def _made_up_loss(probe: Probe, config: RunConfig, batch: TokenBatch) -> list[Tensor]:
    """Advantages of made-up rewards, and the loss of a policy that has moved so far that every clip binds.

    How far that is comes from the run's own configuration, so that only what reads `config` can tell the two apart.
    """
    objective, critic = probe.config.objective, probe.config.policy.value_head
    rewards, mask = _numbers_as_rewards(batch), batch.action_mask
    values = numbers(batch.tokens, 1) * mask
    bounds = (1 + objective.clip_high, objective.dual_clip or 1, objective.importance_cap or 1)
    size = max(math.log(max(bounds)), -math.log(1 - objective.clip_low)) + 1
    step = 1 + ((critic and critic.clip) or 0.0)
    # Up and down, each with a good and a bad advantage: every bound is met by some row.
    rows = torch.tensor([1.0, -1.0, -1.0, 1.0] * 2, dtype=torch.float64)[:, None]
    old = PolicyOutput(batch.sample_logprobs + size * rows * mask, values.abs(), values, values.sum(1))
    given = credited(config.credit, rewards, batch, old)
    moved = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2, dtype=torch.float64)[:, None]
    new = PolicyOutput(
        old.logprobs + size * moved * mask, values.abs() + 1, values + step * rows, values.sum(1), kl=values.square()
    )
    signed = Credit(rows * mask * (1 + values.abs()), values + 2 * step)
    ref = PolicyOutput(old.logprobs - 0.5 * values, values)
    return [given.advantages, _loss(probe, config, batch, new, old, ref, signed)]


def _loss(
    probe: Probe, config: RunConfig, batch: TokenBatch, new: PolicyOutput, old: PolicyOutput,
    ref: PolicyOutput | None, given: Credit,
) -> Tensor:  # fmt: skip
    """The loss of the trainer, of `batch` in one piece."""
    run: Run = replace(probe.run, config=config, kl=FixedKL(config.kl.coefficient))
    rows = torch.arange(len(batch.group))
    part = Part(rows, batch, old, ref, given, batch.num_actions, len(rows), last_of_task=True)
    sums = {"loss/policy": 0.0, "loss/value": 0.0}
    return updating.part_loss(run, part, new, sums, {}, batch, config.objective.entropy_coefficient, head_only=False)


def _slope(probe: Probe, batch: TokenBatch, old: PolicyOutput, given: Credit) -> Tensor:
    """Gradient of the policy's loss by the log-prob of each action."""
    logprobs = old.logprobs.clone().requires_grad_()
    new = replace(old, logprobs=logprobs, kl=torch.zeros_like(logprobs))
    _loss(probe, changed(probe.config, "policy.value_head", None), batch, new, old, old, given).backward()
    assert logprobs.grad is not None
    return logprobs.grad


def _difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    return max(largest(a - b) / (1e-12 + max(largest(a), largest(b))) for a, b in zip(before, after, strict=True))


def _numbers_as_rewards(batch: TokenBatch) -> TokenRewards:
    """Made-up rewards of each action."""
    cells = numbers(batch.tokens, 4) * batch.action_mask
    return TokenRewards(cells, {"made up": cells})


# --- KL --------------------------------------------------------------------------------------------------


@check(
    "the KL penalty gives the gradient of the KL that the configuration asks for",
    remedy="The penalty pulls somewhere else than towards the reference: a sign, a factor, or k1 where it has no "
    "gradient. See kl.place and kl.estimator in docs/config.md; if they are as you want them, report it.",
    quick=True,
)
def kl_gradient(probe: Probe) -> Verdict:
    """Five tokens: the mean over all samples of the trainer's gradient, against finite differences of the KL."""
    config, kl = probe.config, probe.config.kl
    if kl.place == "none" or not kl.coefficient:
        return skipped("no KL penalty is configured")
    theta, reference = (numbers(torch.empty(5), seed) for seed in (5, 6))
    reference = reference.log_softmax(0)
    forward = kl.place == "loss" and kl.estimator == "k3"

    def divergence(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(0)
        above, below = (reference, policy) if forward else (policy, reference)
        return (above.exp() * (above - below)).sum()

    expected, step = torch.zeros(5, dtype=torch.float64), 1e-5
    for k in range(5):
        bump = torch.zeros(5, dtype=torch.float64)
        bump[k] = step
        expected[k] = kl.coefficient * (divergence(theta + bump) - divergence(theta - bump)) / (2 * step)
    got = _mean_gradient(probe, _only_kl(config), theta, reference, divergence)
    error = largest(got - expected) / largest(expected)
    name = f"{kl.place}: {'k1' if kl.place == 'reward' else kl.estimator}"
    which = "KL(reference || policy)" if forward else "KL(policy || reference)"
    return within(
        error, KL_TOLERANCE, seen=f"{name}, against finite differences of {which}",
        wrong=f"{name}: the gradient is off that of {which}, by this share of it",
    )  # fmt: skip


def _only_kl(config: RunConfig) -> RunConfig:
    """The configuration with nothing but the KL penalty in its loss."""
    config = changed(changed(config, "policy.value_head", None), "objective.entropy_coefficient", 0.0)
    return changed(config, "objective.level", "token")


def _mean_gradient(
    probe: Probe, config: RunConfig, theta: Tensor, reference: Tensor, divergence: Callable[[Tensor], Tensor]
) -> Tensor:
    """Sum over all tokens of their probability times the gradient of the trainer's loss of a sample of them."""
    vocab, total = vocabulary(probe), torch.zeros_like(theta)
    for token in range(len(theta)):
        episodes = made_up(probe, [[token % vocab]], ["eos"], group_size=1)
        batch = batching.to_batch(episodes, type(probe.run.controls)())
        logits = theta.clone().requires_grad_()
        logprob, at = logits.log_softmax(0)[token], batch.action_mask.double()
        new = PolicyOutput(at * logprob, at, kl=at * divergence(logits))
        old, ref = PolicyOutput(new.logprobs.detach(), at), PolicyOutput(at * reference[token], at)
        batch = replace(batch, sample_logprobs=old.logprobs)
        scene = Scene(batch, episodes, probe.scene.tokenizer, old, ref, 1)
        paid = trainer.reward(replace(probe.run, config=config, rewards=[], kl=FixedKL(config.kl.coefficient)), scene)
        given = Credit(credit.reward_to_go(paid.total.double(), batch.action_mask, gamma=1.0))
        _loss(probe, config, batch, new, old, ref, given).backward()
        assert logits.grad is not None
        total += logprob.detach().exp() * logits.grad
    return total
