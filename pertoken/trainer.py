"""The loop: generate tokens, score each of them, assign credit, update the policy, until a stop condition holds.

`loop` is the whole method on one screen; every stage that it calls is a function or method that can be called
alone. All state that a step depends on hangs on one `Run`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from pertoken.assignment import assign
from pertoken.background import Background
from pertoken.balance import Gradients
from pertoken.batching import Part, minibatches, to_batch
from pertoken.config import CreditConfig, RunConfig
from pertoken.errors import NumericsError
from pertoken.evaluation import Evaluation
from pertoken.guards import beside_figures, writing_figures
from pertoken.memory import Heap, peak_memory
from pertoken.objectives import aggregate, critic_loss, effective_share, importance_weights, kl_per_token, policy_loss
from pertoken.observe import StepReport, Updated, episode_records, observe
from pertoken.policy.checkpoint import save_state, state_size
from pertoken.replay import Group, renumbered
from pertoken.resampling import beside, with_differences
from pertoken.rewards import Learns, Scene, Stateful, Weighted, findings, score
from pertoken.rewards.kl import KLToReference
from pertoken.rollout.collect import Draws, draw_completions, to_episodes
from pertoken.state import Progress, Run, items_of
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.glossary import HELD_OUT, find
from pertoken.tracking.runlog import RunLog
from pertoken.trust_region import Fisher, Weights, line_search, natural_step
from pertoken.types import Credit, Episode, Item, PolicyOutput, TokenBatch, TokenRewards
from pertoken.weights import Average

RATIO_TOLERANCE = 1e-4
"""Largest |scored - sampled| log-prob of a token under the same float32 weights (nats)."""


def loop(
    run: Run, log: RunLog, *, on_step: Callable[[StepReport], None], interrupted: Callable[[], bool] = lambda: False
) -> str:
    """Train until a stop condition holds or `interrupted()`; returns why it ended. Each step is one policy version."""
    heap = Heap(run.policy.device)
    evaluate(run, log)
    while not (reason := run.stop_reason()) and not interrupted():
        begun, step = time.monotonic(), run.progress.step + 1
        run.before_step = run.state_dict()
        clock = Clock()
        episodes, controls = generate(run, step), run.controls_at(step)
        clock.lap("rollout")
        batch = to_batch(episodes, controls, device=str(run.policy.device))
        old, ref = score_old(run, batch), score_reference(run, batch)
        clock.lap("score")
        scene = Scene(batch, episodes, run.policy.tokenizer, old, ref, step)
        rewards = reward_and_draw_ahead(run, scene)
        run.notes += failure_notes(scene, rewards)
        observe_tasks(run, scene, rewards)
        drawn = beside(scene, run.config, run.engine, run.policy, controls, run.rewards, rewards)
        credit = assign(credit_of(run.config, step), drawn.rewards or rewards, batch, old, drawn.greedy, drawn.states)
        keep(run, episodes, credit, step)
        clock.lap("reward")
        run.before_step = None
        run.engine.release()  # the update needs the room, and makes its packed weights old
        heap.before_update()
        updated = update(run, batch, old, ref, credit, step, scene.task)
        learnt = learn_rewards(run, scene, rewards)
        heap.after_update()
        settle(run, step, updated.metrics.get("update/kl"))
        run.engine.load_weights(run.policy.trainable(), version=step)
        clock.lap("update")
        measured = clock.seconds | memory(run) | writing_figures(scene) | beside_figures(run.beside, scene)
        measured |= drawn.figures() | learnt | curriculum_figures(run, step) | replay_figures(run, scene)
        report = guard(run, observe(step, episodes, batch, old, ref, rewards, credit, updated, measured, run.sampled))
        advance(run, report, seconds=time.monotonic() - begun)
        record(run, log, report, scene)
        evaluate(run, log)
        if run.config.checkpoint.every and step % run.config.checkpoint.every == 0:
            checkpoint(run, log)  # after the evaluation: what is saved has counted it
        on_step(report)
    return reason or "interrupted"


# --- stages ----------------------------------------------------------------------------------------------


def generate(run: Run, step: int) -> list[Episode]:
    """The episodes of `step`, drawn ahead or now: items and random numbers depend on the seed and `step` alone."""
    again = taken_again(run, step)
    items = items_of(run, step)[len(again) :]
    draws, run.ahead = run.ahead or draw(run, step, items), None
    run.staleness = step - 1 - draws.version
    episodes = to_episodes(draws, items, run.policy.tokenizer, step=step)
    if run.config.rollout.redraws:
        episodes = with_differences(run, episodes, step)
    run.sampled = len(episodes) if again else None
    return episodes + renumbered(again, len(items))


def taken_again(run: Run, step: int) -> list[Group]:
    """The groups of earlier steps that `step` learns from too, in place of as many new ones."""
    rollout = run.config.rollout
    if run.replay is None or rollout.replay is None:
        return []
    return run.replay.take(step, round(rollout.replay.share * rollout.prompts_per_step))


def keep(run: Run, episodes: Sequence[Episode], credit: Credit, step: int) -> None:
    """Put what was sampled for `step` where later steps find it."""
    if run.replay is not None:
        run.replay.add(step, episodes[: run.sampled], credit.advantages[: run.sampled])


def credit_of(config: RunConfig, step: int) -> CreditConfig:
    """How credit is assigned in `step`: while the critic alone learns, it learns from the returns that were had."""
    if _head_only(config, step) and config.credit.type == "gae":
        return config.credit.model_copy(update={"lam_critic": 1.0})
    return config.credit


def _head_only(config: RunConfig, step: int) -> bool:
    head = config.policy.value_head
    return head is not None and step <= head.pretrain_steps


def draw(run: Run, step: int, items: Sequence[Item]) -> Draws:
    """Samples of `step` for `items`, by the weights of now."""
    rollout, seed = run.config.rollout, run.config.seed
    return draw_completions(
        run.engine, items, run.policy.tokenizer, run.controls_at(step),
        samples_per_prompt=rollout.samples_per_prompt, run_seed=seed, step=step,
    )  # fmt: skip


def score_old(run: Run, batch: TokenBatch) -> PolicyOutput:
    """The policy before the update at the actions of `batch`: what the sampler knows of it, or a pass of its own.

    A pass is made where the sampler cannot stand in: for values, and where weights move before all rows have been
    scored (minibatches; further epochs too, if the sampler drifts from the scores). Otherwise the first
    pass of the update scores the same weights anyway, and checks the ratio there.
    """
    config = run.config.update
    several = config.minibatches > 1 or (config.epochs > 1 and not _exact(run))
    if run.policy.value_head is None and not several and not run.policy.dropout and batch.sample_entropy is not None:
        known = PolicyOutput(batch.sample_logprobs, batch.sample_entropy)
        return known if run.sampled is None else _scored_anew(run, batch, known)
    old = run.policy.score(batch)
    check_sampled(run, batch, old)
    return old


def _scored_anew(run: Run, batch: TokenBatch, known: PolicyOutput) -> PolicyOutput:
    """`known` with the rows that are replayed as the policy of now sees them: their sampler was an earlier one."""
    replayed = torch.arange(run.sampled or 0, len(batch.episode_ids), device=batch.group.device)
    now = run.policy.score(batch.rows(replayed))
    return replace(
        known,
        logprobs=known.logprobs.index_copy(0, replayed, now.logprobs),
        entropy=known.entropy.index_copy(0, replayed, now.entropy),
    )


def check_sampled(run: Run, batch: TokenBatch, old: PolicyOutput, rows: Tensor | None = None) -> dict[str, float]:
    """`check_ratio` of the rows that were sampled for this step: of those that are replayed the sampler was another.

    rows: where the rows of `batch` are in the step's batch; None if it is all of it.
    """
    if run.sampled is not None:
        places = torch.arange(len(batch.episode_ids)) if rows is None else rows.cpu()
        kept = (places < run.sampled).nonzero()[:, 0].to(batch.group.device)
        batch, old = batch.rows(kept), old.rows(kept)
    return check_ratio(batch, old, exact=_exact(run))


def _exact(run: Run) -> bool:
    """Whether sampled log-probs are those of the policy before the update: float32, and no update in between."""
    return run.policy.autocast_dtype is None and not run.staleness


def score_reference(run: Run, batch: TokenBatch) -> PolicyOutput | None:
    """The reference at the actions of `batch`, if the run has one."""
    if run.reference is None:
        return None
    kl = run.config.kl
    return run.reference.score(batch, hidden=kl.place == "loss" and kl.estimator == "exact")


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


def reward(run: Run, scene: Scene) -> TokenRewards:
    """Every token's reward; a KL penalty in the reward takes the coefficient of now."""
    parts = run.rewards
    if run.config.kl.place == "reward" and run.kl.coefficient:
        parts = [*parts, Weighted(KLToReference(), run.kl.coefficient, "kl")]
    return score(parts, scene)


def learn_rewards(run: Run, scene: Scene, paid: TokenRewards) -> dict[str, float]:
    """Let the parts of the reward learn that do, from what was paid for the samples of the step; figures of it."""
    learners = [(part, part.reward) for part in run.rewards if isinstance(part.reward, Learns)]
    if not learners:
        return {}
    outcomes = {}
    for name, cells in paid.parts.items():
        weight = paid.weights.get(name, 1.0)
        sums = cells.sum(1).cpu() / (weight or math.nan)  # one that is not paid now says nothing
        outcomes[name] = sums.masked_fill(paid.abstained[name].cpu(), math.nan) if name in paid.abstained else sums
    found: dict[str, float] = {}
    for part, learner in learners:
        strangers = torch.tensor([not part.is_about(episode.item) for episode in scene.episodes])
        found |= learner.learn(scene, {name: sums.masked_fill(strangers, math.nan) for name, sums in outcomes.items()})
    return found


def observe_tasks(run: Run, scene: Scene, rewards: TokenRewards) -> None:
    """Tell what shares the prompts out what the samples of each task have earned, the KL penalty left out."""
    if run.course is None or rewards.earned is None:
        return
    earned = rewards.earned
    if run.config.kl.place == "reward" and "kl" in rewards.parts:
        earned = earned - rewards.parts["kl"].sum(1).cpu()
    by_task: dict[str, list[float]] = {}
    for episode, amount in zip(scene.episodes, earned.tolist(), strict=True):
        by_task.setdefault(episode.item.task, []).append(amount)
    run.course.observe(by_task)


def curriculum_figures(run: Run, step: int) -> dict[str, float]:
    """What is logged of that which changes over steps: shares of tasks, items let in, tokens of a completion."""
    found = run.course.figures(step) if run.course else {}
    most = run.controls_at(step).sampling.max_new_tokens
    return found if run.config.rollout.length_schedule is None else found | {"curriculum/new_tokens": float(most)}


def failure_notes(scene: Scene, rewards: TokenRewards) -> list[str]:
    """A sentence on each part of the reward that failed on some completions of the step."""
    return [
        f"step {scene.step}: reward {name!r} failed on {len(failed)} of {len(scene.episodes)} completions: "
        f"{failed[min(failed)]}"
        for name, failed in rewards.failures.items()
    ]


def reward_and_draw_ahead(run: Run, scene: Scene) -> TokenRewards:
    """Every token's reward; with `rollout.ahead` the samples of the next step are drawn while rewards are computed."""
    if not run.config.rollout.ahead or scene.step == run.config.stop.steps:
        return reward(run, scene)
    rewards = Background(lambda: reward(run, scene), "pertoken-rewards")
    run.ahead = draw(run, scene.step + 1, items_of(run, scene.step + 1))
    return rewards.result()


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

    tasks: a number for the task of each row, which `update.balance` goes by.
    """
    config, seed = run.config.update, run.config.seed * 1_000_003 + step
    balanced = tasks is not None and config.balance == "pcgrad"
    gradients = Gradients(run.policy.trainable(), seed=seed) if balanced else None
    rate = set_learning_rate(run, step)
    streams: dict[str, Tensor] = {}
    sums = {"loss/policy": 0.0, "loss/value": 0.0}
    norms: list[float] = []
    first = old.logprobs.clone()  # of the weights before the update; where a pass of the update is the first to know
    steps, moved, bad = 0, False, ""
    seen: list[Part] = []
    region: dict[str, float] = {}
    head_only = _head_only(run.config, step)
    natural = config.trust_region is not None and not head_only
    entropy_coefficient = _entropy_coefficient(run.config, batch, old)
    drift = _Drift(config.stop_kl, adapts=config.schedule == "kl")
    parts = minibatches(
        batch, old, ref, credit, epochs=config.epochs, num_minibatches=config.minibatches,
        tokens_per_micro_batch=config.tokens_per_micro_batch, seed=seed, left_out=_without_effect(run, credit),
        tasks=tasks if gradients else None,
    )  # fmt: skip
    for part in parts:
        new = _pass(run, part, entropy_grad=entropy_coefficient != 0)
        if not moved and not run.policy.dropout:
            # Until the weights move, old and new are the same policy; taking the same pass for both removes the
            # rounding noise between passes of different shapes (and the drift of the sampler).
            part = replace(part, old=replace(part.old, logprobs=new.logprobs.detach()))  # noqa: PLW2901
            check_sampled(run, part.batch, part.old, part.rows)
            first[part.rows] = part.old.logprobs
        loss = part_loss(run, part, new, sums, streams, batch, entropy_coefficient, head_only=head_only)
        bad = bad or _backward(loss, part)
        drift.add(part, new)
        if gradients and part.last_of_task:
            gradients.put_aside()
        seen += [part] if natural else []
        if part.last_of_step:
            steps += 1
            if drift.too_far():
                run.optimizer.zero_grad(set_to_none=False)
                break
            if gradients:
                gradients.combine()
            if natural:
                norm, region = natural_step_of(run, seen, batch, sums["loss/policy"], entropy_coefficient, bad, step)
            else:
                norm = step_optimizer(run, bad, step, head_only=head_only)
            moved = moved or norm is not None
            norms += [] if norm is None else [norm]
            bad = ""
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
    return Updated(metrics, streams)


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


def _norm_figures(norms: Sequence[float], steps: int, limit: float | None) -> dict[str, float]:
    """Of the gradients of the optimiser steps that were made, of `steps` that were tried."""
    return {
        "grad/norm": sum(norms) / len(norms) if norms else math.nan if steps else 0.0,
        "grad/clipped_share": sum(n > limit for n in norms) / len(norms) if limit and norms else 0.0,
    }


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


class _Drift:
    """How far an update has moved the policy, looked at before each of its optimiser steps (`update.stop_kl`)."""

    def __init__(self, limit: float | None, *, adapts: bool) -> None:
        self._limit, self._nats, self._actions, self._ended = limit, 0.0, 0, False
        self._looks, self._moved = limit is not None or adapts, 0.0

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
        self._nats, self._actions = 0.0, 0
        return self._ended

    def figures(self) -> dict[str, float]:
        """What is logged of it."""
        found = {"update/kl": self._moved} if self._looks else {}
        return found if self._limit is None else found | {"update/stopped": float(self._ended)}


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


def replay_figures(run: Run, scene: Scene) -> dict[str, float]:
    """How many rows of the step are replayed, how many policy versions ago they were sampled, what their weights leave
    of them."""
    if run.replay is None:
        return {}
    objective, replayed = run.config.objective, [] if run.sampled is None else scene.episodes[run.sampled :]
    figures = {"replay/rows": float(len(replayed))}
    if replayed and scene.old is not None and objective.importance_cap is not None:
        mask = scene.batch.action_mask[run.sampled :]
        weights = importance_weights(
            scene.old.logprobs[run.sampled :], scene.batch.sample_logprobs[run.sampled :], mask,
            high=objective.importance_cap, low=objective.importance_floor, level=objective.importance_level,
            outside=objective.importance_outside,
        )  # fmt: skip
        figures["replay/staleness"] = sum(scene.step - 1 - e.policy_version[0] for e in replayed) / len(replayed)
        figures["replay/effective_share"] = effective_share(weights[mask])
    return figures


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
    loss = aggregate(tokens.per_token, mask, over=objective.over, denominator=denominators[objective.over])
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


def distance_figures(run: Run) -> dict[str, float]:
    """How far the weights are from where they began, where the run keeps those."""
    return {} if run.anchor is None else {"distance/initial": run.anchor.distance(run.policy.trainable())}


def memory(run: Run) -> dict[str, float]:
    """The memory that the run has taken at its height, beside what was expected (GB)."""
    peak = peak_memory(run.policy.device)
    return {"memory/estimate": run.memory_estimate} | ({} if peak is None else {"memory/peak": peak})


def guard(run: Run, report: StepReport) -> StepReport:
    """`report` with the alarms of the step; a new one is told in a sentence."""
    for alarm in run.guards.look(report.metrics):
        run.notes.append(f"step {report.step}: alarm {alarm.name}: {alarm.sentence}")
        run.progress.alarm = run.progress.alarm or f"{alarm.name} in step {report.step}"
    return replace(report, metrics=report.metrics | run.guards.figures())


def advance(run: Run, report: StepReport, *, seconds: float) -> None:
    """Count the step, and let the KL controller look at it."""
    now = run.progress
    now.step = report.step
    now.tokens += int(report.metrics["tokens/generated"])
    now.seconds += seconds
    now.last_kl = report.metrics.get("kl/sequence", 0.0)
    run.kl.update(now.last_kl, len(report.episodes))


# --- writing down ----------------------------------------------------------------------------------------


def record(run: Run, log: RunLog, report: StepReport, scene: Scene) -> None:
    """Write the step to the run folder: its figures always, its samples (and what rewards found) every so often."""
    step = report.step
    log.step(step, report.metrics)
    due = step % run.config.log.episodes_every == 0 or step == 1 or run.stop_reason() is not None
    if due and run.config.log.episodes_per_step:
        shown = report.episodes[: run.config.log.episodes_per_step]
        # A reward that remembers must not be asked twice about a sample.
        found = findings([part for part in run.rewards if not isinstance(part.reward, Stateful)], scene)
        records = episode_records(shown, report.streams, run.policy.tokenizer, step=step, findings=found)
        log.episodes(step, records)


def checkpoint(run: Run, log: RunLog) -> Path:
    """Save all that is needed to go on from here; older checkpoints that `checkpoint` does not keep are removed.

    A step whose update has not begun is forgotten: what goes on makes it again.
    """
    now, config = run.progress, run.config.checkpoint
    state = run.before_step or run.state_dict()
    return CheckpointStore(log.folder / "checkpoints").save(
        now.step,
        lambda folder: save_state(folder, run.policy, run.optimizer, state, run.tensors()),
        size=state_size(run.policy, run.optimizer, run.tensors()),
        metric=now.metric if now.evaluated == now.step else None,
        keep=config.keep,
        keep_best=config.keep_best,
    )


def evaluate(run: Run, log: RunLog) -> Evaluation | None:
    """Held-out evaluation of the policy as it is, if one is due: before training, every so often, at the end."""
    config, step = run.config.evaluation, run.progress.step
    if run.evaluator is None or log.has_evaluation(step, config.split):
        return None
    due = step == 0 or (config.every and step % config.every == 0) or run.stop_reason() is not None
    if not due:
        return None
    run.engine.load_weights(run.policy.trainable(), version=step)
    result = run.evaluator(run.engine, run.policy, run.reference, run.rewards)
    result = with_history(result, run.evaluator.by_task, run.progress)
    log.evaluation(step, config.split, result.summary, result.rows)
    value = result.summary["metrics"][config.metric]
    run.progress.evaluated, run.progress.metric = step, value
    if value > run.progress.best_metric:
        run.progress.best_metric, run.progress.evaluations_since_best = value, 0
    elif step:
        run.progress.evaluations_since_best += 1
        update = run.config.update
        if update.schedule == "plateau" and run.progress.evaluations_since_best % update.plateau_patience == 0:
            run.progress.rate = max(run.progress.rate * update.plateau_factor, update.final_share)
    if run.average is not None:
        _evaluate_average(run, run.average, log)
    return result


def with_history(result: Evaluation, by_task: Mapping[str, str], progress: Progress) -> Evaluation:
    """`result` with how much better the metric of each task is than where it began, and how much worse than its best.

    by_task: the metric that a task is followed by. progress: what was best so far; hears of this evaluation.
    """
    figures: dict[str, float] = {}
    for task, metric in by_task.items():
        value, term = result.summary["metrics"][f"{metric}/{task}"], find(metric, HELD_OUT)
        sign = -1.0 if term is not None and term.better == "lower" else 1.0
        start, best = progress.tasks.get(task, (value, value))
        best = sign * max(sign * best, sign * value)
        progress.tasks = progress.tasks | {task: [start, best]}
        figures |= {f"since_start/{task}": sign * (value - start), f"below_best/{task}": sign * (best - value)}
    return replace(result, summary=result.summary | {"metrics": result.summary["metrics"] | figures})


def _evaluate_average(run: Run, average: Average, log: RunLog) -> None:
    """The same of the averaged weights, as a split of its own name."""
    assert run.evaluator is not None
    step, named, split = run.progress.step, run.policy.trainable(), f"{run.config.evaluation.split}-ema"
    if log.has_evaluation(step, split):
        return
    with average.applied(named):
        run.engine.load_weights(named, version=step)
        result = run.evaluator(run.engine, run.policy, run.reference, run.rewards)
    run.engine.load_weights(named, version=step)
    log.evaluation(step, split, result.summary, result.rows)


class Clock:
    """Seconds of each stage of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[f"time/{stage}"] = now - self._last
        self._last = now
