"""All parts of a run, at its start or where a checkpoint left them."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from pertoken.assembly.policy import (
    build_controls,
    build_engine,
    build_mask,
    build_optimizer,
    build_policy,
    copies_of,
    plan_memory,
    refuse_of_model,
)
from pertoken.assembly.rewards import build_rewards, refuse_learning_from_nothing, refuse_scored_twice
from pertoken.assembly.task import (
    build_course,
    build_examples,
    build_task,
    build_windows,
    fitting,
    refuse_too_long,
    refuse_unknown_tokens,
)
from pertoken.config import KLConfig, MixtureTask, RolloutConfig, RunConfig
from pertoken.errors import ConfigError, PertokenError, RunFolderError, TaskError
from pertoken.evaluation import Evaluator
from pertoken.forward import decoder_start
from pertoken.objectives import AdaptiveKL, FixedKL
from pertoken.policy.checkpoint import load_state
from pertoken.policy.model import Policy, Reference
from pertoken.rewards.names import make_with
from pertoken.rollout.collect import collect
from pertoken.rollout.decoder import RecomputingDecoder
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls
from pertoken.tasks.base import ItemTask, batch_of
from pertoken.tasks.files import FileTask
from pertoken.tasks.mixture import evenly
from pertoken.training import offline
from pertoken.training.guards import Guards
from pertoken.training.replay import Buffer
from pertoken.training.state import Run
from pertoken.turns import Environment, converse
from pertoken.types import Episode, Item


def build_run(config: RunConfig, *, checkpoint: Path | None = None) -> Run:
    """All parts of the run that `config` describes, at its start or as `checkpoint` left them.

    Everything that can be wrong with data, model or rewards is found here, before the first token.
    """
    # The package draws from no global generator; rewards of others may, and should do so alike in each run.
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    task = build_task(config.task)
    rewards = build_rewards(config.rewards)
    refuse_scored_twice(config, rewards)
    refuse_learning_from_nothing(rewards)
    policy = build_policy(config)
    refuse_of_model(config, policy)
    examples = None
    if config.offline is None:
        size = config.rollout.prompts_per_step
        items, notes = fitting(task, "train", policy, config.rollout)
    else:
        examples = build_examples(config.offline, task, policy)
        items, notes = examples.fitting(task.items("train"), config.offline.max_tokens)
        size = config.offline.batch
        notes += _not_used(config)
    course = build_course(config, items, size, policy)
    if course is None:
        _refuse_too_few(config, items, size, notes)
    refuse_unknown_tokens(items, policy)
    if isinstance(task, FileTask):
        notes += [*task.notes, *(f"skipped {bad}" for bad in task.bad_rows)]
    if policy.layout == "padded":
        notes.append("this model's attention cannot be packed: rows are scored one by one and padded, which is slower")
    notes += [
        f"torch.compile runs {trial.name}: {trial.own:.2f} -> {trial.compiled:.2f} ms for 1,024 tokens"
        for trial in (policy.pointwise.trials if policy.pointwise else ())
        if trial.pays
    ]
    mask = build_mask(config, policy)
    engine = build_engine(policy, config.rollout, mask)
    if isinstance(engine, NativeEngine) and isinstance(engine.decoder, RecomputingDecoder):
        notes.append("this model's attention keeps no memory here: each token recomputes its text, which is slow "
                     "(rollout.engine=transformers may know how to keep it)")  # fmt: skip
    needs_reference = config.kl.measure or config.kl.place != "none"
    if config.offline is not None:
        needs_reference = config.kl.measure or offline.needs_reference(config.offline)
    reference = policy.reference() if needs_reference else None
    optimizer = build_optimizer(config, policy)
    evaluator, about_held_out = build_evaluator(config, task, policy)
    notes += about_held_out
    average, anchor = copies_of(config, policy)
    before = None if config.update.trust_region is None else policy.snapshot()
    run = Run(
        config=config,
        policy=policy,
        reference=reference,
        engine=engine,
        controls=build_controls(config.rollout, policy),
        items=items,
        course=course,
        windows=build_windows(config.task, items, policy, examples),
        rewards=rewards,
        kl=build_kl(config),
        optimizer=optimizer,
        guards=Guards(config.guards.window),
        beside=[part.fixed() for part in build_rewards(config.guards.beside, "guards.beside")],
        evaluator=evaluator,
        converse=build_turns(config, policy),
        mask=mask,
        average=average,
        anchor=anchor,
        replay=build_replay(config),
        before_update=before,
        examples=examples,
        notes=notes,
    )
    plan_memory(run)
    if checkpoint is not None:
        _go_on(run, checkpoint)
    return run


def _refuse_too_few(config: RunConfig, items: Sequence[Item], size: int, notes: Sequence[str]) -> None:
    """Raise TaskError if a step takes more items than there are. notes: what was left out of them."""
    if len(items) < size and config.offline is not None:
        raise TaskError(
            f"a step takes {size} distinct items (method.batch), but there are only {len(items)} training items: lower "
            "method.batch, give more data, or raise method.max_tokens, which leaves longer ones out"
        )
    if len(items) < size and notes:  # not that there were too few
        raise TaskError(
            f"a step takes {size} distinct items (rollout.prompts_per_step), but of the training items {len(items)} "
            f"are left ({'; '.join(notes)}): lower rollout.prompts_per_step, or raise rollout.max_prompt_tokens if the "
            "context has room"
        )
    batch_of(items, 0, size, config.seed)  # or there are too few


def _go_on(run: Run, checkpoint: Path) -> None:
    """Put `run` where `checkpoint` left it. Checkpoints may come from anybody: what they say may be anything."""
    state = load_state(checkpoint, run.policy, run.optimizer, run.tensors())
    try:
        run.load_state_dict(state)
    except PertokenError:
        raise
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise RunFolderError(
            f"{checkpoint}: not a checkpoint that this run can go on from: {error!r}. Resume from an older one."
        ) from error
    run.engine.load_weights(run.policy.trainable(), version=run.progress.step)


def build_replay(config: RunConfig) -> Buffer | None:
    """Where samples are kept to be learnt from again."""
    replay = config.rollout.replay
    return None if replay is None or config.offline is not None else Buffer(replay.steps, replay.priority, config.seed)


def build_turns(config: RunConfig, policy: Policy) -> Callable[..., list[Episode]] | None:
    """How items become episodes of several turns, where the configuration wants that."""
    turns = config.rollout.turns
    if turns is None or config.offline is not None:
        return None
    if decoder_start(policy.hf_model):
        raise ConfigError(
            f"rollout.turns goes on from what was written, and encoder-decoder models "
            f"({type(policy.hf_model).__name__}) cannot: leave it out, or take a causal model."
        )
    environment = make_with(turns.fn, turns.parameters, "rollout.turns")
    if not isinstance(environment, Environment):
        raise ConfigError(f"rollout.turns.fn {turns.fn}: what it makes has no method reply(item, messages)")
    return partial(
        converse,
        environment=environment,
        max_turns=turns.max_turns,
        context_length=policy.context_length,
        go_on_when_cut=turns.go_on_when_cut,
        time_limit=turns.time_limit,
    )


def build_kl(config: RunConfig) -> FixedKL | AdaptiveKL:
    """The controller of the KL coefficient; the fixed one where no target is set."""
    kl = config.kl
    coefficient = 0.0 if kl.place == "none" else kl.coefficient
    return FixedKL(coefficient) if kl.target is None else AdaptiveKL(coefficient, kl.target, kl.horizon)


def build_evaluator(config: RunConfig, task: ItemTask, policy: Policy) -> tuple[Evaluator | None, list[str]]:
    """The held-out evaluation, or None if it is turned off; and notes on what was left out of it."""
    evaluation, given, notes = config.evaluation, None, list[str]()
    if evaluation.items == 0:
        return None, notes
    items = task.items(evaluation.split)
    if not items:
        raise TaskError(
            f"task {task.name}: the {evaluation.split} split is empty; set evaluation.items=0 to go without"
        )
    items, by_task = evenly(items, evaluation.items), dict[str, str]()
    if config.offline is not None:
        # What is too long to be learnt from is answered all the same: all methods are measured on the same items.
        given = offline.HeldOutAnswers(config.offline, build_examples(config.offline, task, policy), items)
        if unknown := given.fits.count(False):
            notes.append(
                f"{evaluation.split}: {unknown} of {len(items)} items have no {', '.join(given.names)}: prompt and "
                f"answer are over {policy.context_length} tokens"
            )
    if isinstance(config.task, MixtureTask):
        present = {item.task for item in items}
        notes += [
            f"task.tasks.{name}: none of the {len(items)} {evaluation.split} items is of it, so it is not followed"
            for name in config.task.tasks
            if name not in present
        ]
        by_task = {name: m.metric or evaluation.metric for name, m in config.task.tasks.items() if name in present}
    refuse_too_long(
        items, policy, evaluation.sampling,
        f"take such items out of the {evaluation.split} split: what is held out is never left out by itself",
    )  # fmt: skip
    refuse_unknown_tokens(items, policy)
    if given is not None:
        _refuse_unknown(given, evaluation.metric, by_task)
    controls = Controls.resolve(evaluation.sampling, policy.tokenizer, policy.eos_ids)
    return Evaluator(
        items, controls, metric=evaluation.metric, given=given, by_task=by_task, further=evaluation.further,
        beside=[part.fixed() for part in build_rewards(evaluation.beside, "evaluation.beside")],
        language=evaluation.language, judge=build_judge(config, policy), gather=build_turns(config, policy) or collect,
        alternatives=config.log.alternatives,
    ), notes  # fmt: skip


def _refuse_unknown(given: offline.HeldOutAnswers, metric: str, by_task: Mapping[str, str]) -> None:
    """What a run is followed by must be known of at least one held-out item, of each task that it is about."""
    known = {item.task for item, fits in zip(given.items, given.fits, strict=True) if fits}
    followed = {"evaluation.metric": (metric, bool(known))}
    followed |= {f"task.tasks.{task}.metric": (by, task in known) for task, by in by_task.items()}
    for where, (name, is_known) in followed.items():
        if name in given.names and not is_known:
            raise TaskError(
                f"{where} {name}: of no held-out item prompt and answer fit together into the {given.context_length} "
                "tokens of this model's context. Shorten them, or follow a metric of generated answers."
            )


def build_judge(config: RunConfig, policy: Policy) -> Reference | None:
    """The model of `evaluation.judge`; None where answers are judged by the model that the run began with."""
    name = config.evaluation.judge
    if name is None:
        return None
    settings = config.policy.model_copy(update={"model": name, "lora": None, "value_head": None})
    judge = build_policy(config.model_copy(update={"policy": settings}))
    if judge.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise ConfigError(
            f"evaluation.judge {name!r} has another vocabulary than {config.policy.model!r}, whose tokens it is to "
            f"judge: measure by evaluation.beside=[{{name: perplexity, model: {name}}}], which reads texts"
        )
    return judge.reference()


def _not_used(config: RunConfig) -> list[str]:
    """A note on what is set and has no effect without samples and rewards of one's own."""
    default = RunConfig()
    rollout = ("prompts_per_step", "samples_per_prompt", "sampling", "mask", "turns", "ahead", "max_prompt_tokens")
    found = [name for name in ("credit", "objective") if getattr(config, name) != getattr(default, name)]
    found += [
        f"kl.{name}" for name in ("place", "coefficient") if getattr(config.kl, name) != getattr(KLConfig(), name)
    ]
    found += [f"rollout.{name}" for name in rollout if getattr(config.rollout, name) != getattr(RolloutConfig(), name)]
    return [f"method {config.method.type} does not use {', '.join(found)}"] if found else []
