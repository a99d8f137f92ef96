"""The loop: generate tokens, score each of them, assign credit, update the policy, until a stop condition holds.

`loop` is the whole method on one screen; every stage that it calls is a function or method that can be called
alone. All state that a step depends on hangs on one `Run`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pertoken.batching import to_batch
from pertoken.config import CreditConfig, RunConfig
from pertoken.evaluation import Evaluation
from pertoken.machine.background import Background
from pertoken.machine.memory import Heap, peak_memory
from pertoken.machine.portions import states
from pertoken.objectives import effective_share, importance_weights
from pertoken.observe import StepReport, alternative_columns, episode_records, observe
from pertoken.policy.checkpoint import state_size, state_writer
from pertoken.rewards import Learns, Scene, Stateful, Weighted, findings, score
from pertoken.rewards.kl import KLToReference
from pertoken.rollout.collect import Draws, draw_completions, to_episodes
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.glossary import goodness
from pertoken.tracking.runlog import RunLog
from pertoken.training.assignment import assign
from pertoken.training.guards import beside_figures, writing_figures
from pertoken.training.replay import Group, renumbered
from pertoken.training.resampling import beside, with_differences
from pertoken.training.state import Progress, Run, items_of
from pertoken.training.updating import check_sampled, head_only_at, is_exact, settle, update
from pertoken.training.weights import Average
from pertoken.types import Credit, Episode, Item, PolicyOutput, TokenBatch, TokenRewards


def loop(
    run: Run, log: RunLog, *, on_step: Callable[[StepReport], None], interrupted: Callable[[], bool] = lambda: False
) -> str:
    """Train until a stop condition holds or `interrupted()`; returns why it ended. Each step is one policy version."""
    heap = Heap(run.policy.device)
    evaluate(run, log)
    while not (reason := run.stop_reason()) and not interrupted():
        begun, step = time.monotonic(), run.progress.step + 1
        run.before_step = run.moment()
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
        how, paid = credit_of(run.config, step), drawn.rewards or rewards
        credit = assign(how, paid, batch, old, drawn.greedy, drawn.states, ref)
        keep(run, episodes, credit, step)
        clock.lap("reward")
        run.before_step = None
        run.engine.release()  # the update needs the room, and makes its packed weights old
        others = alternatives(run, batch, step)
        heap.before_update()
        updated = update(run, batch, old, ref, credit, step, scene.task)
        learnt = learn_rewards(run, scene, rewards)
        heap.after_update()
        settle(run, step, updated.metrics.get("update/kl"))
        run.engine.load_weights(run.policy.trainable(), version=step)
        clock.lap("update")
        measured = clock.seconds | memory(run) | writing_figures(scene) | beside_figures(run.beside, scene)
        measured |= drawn.figures() | learnt | curriculum_figures(run, step) | replay_figures(run, scene)
        run.notes += cuts(run, step)
        report = guard(run, observe(step, episodes, batch, old, ref, rewards, credit, updated, measured, run.sampled))
        advance(run, report, seconds=time.monotonic() - begun)
        record(run, log, report, others, scene)
        evaluate(run, log)
        checkpoint_if_due(run, log)  # after the evaluation: what is saved has counted it
        on_step(report)
    return reason or "interrupted"


# --- stages ----------------------------------------------------------------------------------------------


def generate(run: Run, step: int) -> list[Episode]:
    """The episodes of `step`, drawn ahead or now: items and random numbers depend on the seed and `step` alone."""
    again = taken_again(run, step)
    items = items_of(run, step)[len(again) :]
    if run.converse is None:
        draws, run.ahead = run.ahead or draw(run, step, items), None
        run.staleness = step - 1 - draws.version
        episodes = to_episodes(draws, items, run.policy.tokenizer, step=step)
    else:
        episodes = run.converse(
            run.engine, items, run.policy.tokenizer, run.controls_at(step),
            samples_per_prompt=run.config.rollout.samples_per_prompt, run_seed=run.config.seed, step=step,
        )  # fmt: skip
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
    if head_only_at(config, step) and config.credit.type == "gae":
        return config.credit.model_copy(update={"lam_critic": 1.0})
    return config.credit


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
    several = config.minibatches > 1 or (config.epochs > 1 and not is_exact(run))
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


def score_reference(run: Run, batch: TokenBatch) -> PolicyOutput | None:
    """The reference at the actions of `batch`, if the run has one."""
    if run.reference is None:
        return None
    kl = run.config.kl
    return run.reference.score(batch, hidden=kl.place == "loss" and kl.estimator == "exact")


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


def memory(run: Run) -> dict[str, float]:
    """The memory that the run has taken at its height, beside what was expected (GB), and portions that were cut."""
    peak = peak_memory(run.policy.device)
    found = {"memory/estimate": run.memory_estimate} | ({} if peak is None else {"memory/peak": peak})
    return found | {f"portion/{name}": float(size) for name, (_, size) in states(run.portions()).items()}


def cuts(run: Run, step: int) -> list[str]:
    """A sentence on each portion that did not fit into memory since this was last asked."""
    return [f"step {step}: {sentence}" for portion in run.portions().values() for sentence in portion.told()]


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


def shows(run: Run, step: int) -> bool:
    """Whether the samples of `step` are written down, whatever comes of it; those of a run's last step are too."""
    config = run.config.log
    due = step % config.episodes_every == 0 or step in (1, run.config.stop.steps)
    return due and config.episodes_per_step > 0


def alternatives(run: Run, batch: TokenBatch, step: int) -> list[dict[str, Any]]:
    """What could have stood in the samples of `batch` that will be written down, as the policy of now sees it.

    Before the update, as their other streams. So of a last step that nobody could foresee it is not known.
    """
    count = run.config.log.alternatives
    if not count or not shows(run, step):
        return []
    some = torch.arange(min(run.config.log.episodes_per_step, len(batch.episode_ids)), device=batch.group.device)
    shown = batch.rows(some)
    _, found = run.policy.score_with_alternatives(shown, shown.controls, count)
    return alternative_columns(found, shown, run.policy.tokenizer)


def record(
    run: Run, log: RunLog, report: StepReport, others: Sequence[dict[str, Any]], scene: Scene | None = None
) -> None:
    """Write the step to the run folder: its figures always, its samples every so often, with what else could have stood
    there (`others`) and, of a `scene` with rewards, what these found in them."""
    step, most = report.step, run.config.log.episodes_per_step
    log.step(step, report.metrics)
    if shows(run, step) or (most and run.stop_reason() is not None):
        # A reward that remembers must not be asked twice about a sample.
        asked = [part for part in run.rewards if not isinstance(part.reward, Stateful)]
        records = episode_records(
            report.episodes[:most], report.streams, run.policy.tokenizer, step=step,
            findings=findings(asked, scene) if scene else (), alternatives=others,
        )  # fmt: skip
        log.episodes(step, records)


def checkpoint_if_due(run: Run, log: RunLog) -> None:
    """Save the step that was made if it is one of those, with `checkpoint.background` beside the next ones."""
    config = run.config.checkpoint
    if not config.every or run.progress.step % config.every:
        return
    if config.background:
        run.writing = Background(_saving(run, log, copied=True), "pertoken-checkpoint")
    else:
        checkpoint(run, log)


def checkpoint(run: Run, log: RunLog) -> Path:
    """Save all that is needed to go on from here; older checkpoints that `checkpoint` does not keep are removed.

    A step whose update has not begun is forgotten: what goes on makes it again. What rewards have spent on it stays
    spent.
    """
    return _saving(run, log)()


def written(run: Run) -> None:
    """Wait for the checkpoint that is being written beside the steps; raises what went wrong with it."""
    writing, run.writing = run.writing, None
    if writing is not None:
        writing.result()


def _saving(run: Run, log: RunLog, *, copied: bool = False) -> Callable[[], Path]:
    """What saves the state of now, behind any that is still being written; if `copied`, whenever it is called."""
    written(run)
    step, metric, config = run.progress.step, run.progress.metric, run.config.checkpoint
    state, drawn = run.before_step or run.moment()
    state = state | {"spent": run.spent()}
    write = state_writer(run.policy, run.optimizer, state, run.tensors(), drawn, copied=copied)
    size = state_size(run.policy, run.optimizer, run.tensors())
    known = metric is not None and run.progress.evaluated == step
    goal = goodness(run.config.evaluation.metric, metric) if metric is not None and known else None
    store = CheckpointStore(log.folder / "checkpoints")
    return lambda: store.save(step, write, size=size, metric=goal, keep=config.keep, keep_best=config.keep_best)


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
    if (good := goodness(config.metric, value)) > run.progress.best_metric:
        run.progress.best_metric, run.progress.evaluations_since_best = good, 0
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
        value = result.summary["metrics"][f"{metric}/{task}"]
        start, best = progress.tasks.get(task, (value, value))
        best = max(best, value, key=lambda each: goodness(metric, each))
        progress.tasks = progress.tasks | {task: [start, best]}
        since, below = goodness(metric, value - start), goodness(metric, best - value)
        figures |= {f"since_start/{task}": since, f"below_best/{task}": below}
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
