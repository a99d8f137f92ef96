"""From a configuration to the parts of a run: policy, task, rewards, engine, optimiser, evaluator."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken import offline
from pertoken.augmentation import build_augmentation
from pertoken.config import (
    AttentionCredit,
    ByWorth,
    CurriculumConfig,
    Data,
    DocstringsTask,
    FunctionTask,
    KLConfig,
    Member,
    MixtureTask,
    MonteCarlo,
    OfflineConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    SelfCritical,
    TaskConfig,
)
from pertoken.config.refusals import OF_FAMILIES
from pertoken.errors import ConfigError, ModelError, PertokenError, RunFolderError, TaskError, closest
from pertoken.evaluation import Evaluator
from pertoken.examples import Examples
from pertoken.forward import decoder_start
from pertoken.guards import Guards
from pertoken.memory import GIGABYTE, installed_memory, used_memory
from pertoken.objectives import AdaptiveKL, FixedKL
from pertoken.policy.checkpoint import load_state
from pertoken.policy.footprint import footprint
from pertoken.policy.model import Lora, Policy, Reference, ValueHead, copy_of, load_model, set_languages
from pertoken.policy.scoring import head_logits
from pertoken.prompts import prompt_ids
from pertoken.replay import Buffer
from pertoken.rewards import (
    Isolated,
    Learns,
    Multiplier,
    Normaliser,
    Reward,
    Schedule,
    Stateful,
    Weighted,
    make,
    resolve,
)
from pertoken.rewards.attention import reader_of
from pertoken.rewards.names import make_with
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.collect import collect
from pertoken.rollout.decoder import RecomputingDecoder
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Mask, Sampling
from pertoken.state import Run
from pertoken.tasks.base import SPLITS, ItemTask, LengthWindows, Split, Task, batch_of, folded
from pertoken.tasks.course import Course, Limit, Pool
from pertoken.tasks.docstrings import load_docstring_task
from pertoken.tasks.files import FileTask, load_file_task
from pertoken.tasks.layouts import Layout
from pertoken.tasks.mixture import LearningProgress, evenly, mixed, shares_of
from pertoken.turns import Environment, converse
from pertoken.types import Episode, Item
from pertoken.weights import Anchor, Average


def build_run(config: RunConfig, *, checkpoint: Path | None = None) -> Run:
    """All parts of the run that `config` describes, at its start or as `checkpoint` left them.

    Everything that can be wrong with data, model or rewards is found here, before the first token.
    """
    # The package draws from no global generator; rewards of others may, and should do so alike in each run.
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    task = build_task(config.task)
    rewards = build_rewards(config.rewards)
    _refuse_scored_twice(config, rewards)
    _refuse_learning_from_nothing(rewards)
    policy = build_policy(config)
    _refuse_of_model(config, policy)
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
    if course is None and config.offline is not None and len(items) < size:
        raise TaskError(
            f"a step takes {size} distinct items (method.batch), but there are only {len(items)} training items: lower "
            "method.batch, give more data, or raise method.max_tokens, which leaves longer ones out"
        )
    if course is None:
        batch_of(items, 0, size, config.seed)  # or there are too few
    _refuse_unknown_tokens(items, policy)
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
    )


def copies_of(config: RunConfig, policy: Policy) -> tuple[Average | None, Anchor | None]:
    """What the run keeps of the weights before training: made before a checkpoint is loaded."""
    update, named = config.update, policy.trainable()
    pulls = update.l2_to_initial or update.l1_to_initial
    return (
        None if update.ema_decay is None else Average(named, update.ema_decay),
        Anchor(named, l2=update.l2_to_initial, l1=update.l1_to_initial) if pulls else None,
    )


def _refuse_learning_from_nothing(rewards: Sequence[Weighted]) -> None:
    """A reward that learns needs the part that says what is right, in that part's own units."""
    for part in rewards:
        if not isinstance(part.reward, Learns):
            continue
        name, others = part.reward.outcome, [other.name for other in rewards if other is not part]
        if name not in others:
            raise ConfigError(f"reward {part.name!r}: outcome: no other part {name!r}; {closest(name, others)}")
        if any(other.normaliser for other in rewards if other.name == name):
            raise ConfigError(f"reward {part.name!r}: outcome {name!r} has `normalise`: it has no fixed threshold then")


def _refuse_scored_twice(config: RunConfig, rewards: Sequence[Weighted]) -> None:
    """Methods that score samples beside those they learn from, or again, would make a reward that remembers count them
    too; one that learns would learn from samples of earlier policies."""
    replays = config.rollout.replay is not None
    asking = "rollout.redraws" if config.rollout.redraws else f"credit.type {config.credit.type}"
    asks_further = isinstance(config.credit, SelfCritical | MonteCarlo | ByWorth)
    if not replays and not config.rollout.redraws and not asks_further:
        return
    for part in rewards:
        if isinstance(part.reward, Stateful) or (replays and isinstance(part.reward, Learns)):
            further = "rollout.replay scores samples again" if replays else f"{asking} scores further texts"
            raise ConfigError(
                f"reward {part.name!r} remembers what it has scored, and {further}: leave one of them out"
            )


def _refuse_of_model(config: RunConfig, policy: Policy) -> None:
    """What the configuration asks of a model and this one cannot give."""
    _refuse_credit(config, policy)
    refuse_segments(config, policy)


def _refuse_credit(config: RunConfig, policy: Policy) -> None:
    """What a way to credit asks of a model and this one cannot give; a reader of texts is loaded and asked once."""
    name = type(policy.hf_model).__name__
    if isinstance(config.credit, AttentionCredit) and config.credit.model is not None:
        reader_of(config.credit.model)
    elif config.credit.type == "attention" and policy.layout != "packed":
        raise ConfigError(
            f"credit.type attention: {name} attends in a way of its own, which cannot be looked into here. Let another "
            "model read the texts (credit.model: this one before training, say), or use credit.type shapley."
        )


def refuse_segments(config: RunConfig, policy: Policy) -> None:
    """Segments that the model cannot write, or that its context has no room for."""
    rollout, evaluation = config.rollout.sampling, config.evaluation.sampling
    for where, sampling in (("rollout.sampling", rollout), ("evaluation.sampling", evaluation)):
        if sampling.segment is None:
            continue
        if decoder_start(policy.hf_model):
            raise ConfigError(
                f"{where}.segment: encoder-decoder models ({type(policy.hf_model).__name__}) read a prompt and write "
                "from the beginning; they cannot go on from the middle of a text: leave it out."
            )
        if sampling.least_room >= policy.context_length:
            raise ConfigError(
                f"{where}.segment: tokens and context are {sampling.least_room} together, and the context of this "
                f"model is {policy.context_length}: nothing is left for a prompt. Lower one of them."
            )


LEAST_PLANNED = 128
"""Tokens of a micro-batch below which no run is planned: if those do not fit, it is something else that does not."""


def plan_memory(run: Run) -> None:
    """Estimate what `run` will take, and let it begin with micro-batches that fit into nine tenths of what there is.

    Of what is installed and allowed here, not of what is free now: two runs of one configuration are cut alike.
    """
    policy, rollout, portion = run.policy, run.config.rollout, run.micro_batch
    kept = footprint(policy, natural=run.before_update is not None)
    base = used_memory(policy.device)
    if run.config.update.balance != "none":  # a gradient of each task
        trained = sum(p.numel() * p.element_size() for p in policy.trainable().values())
        base += len({item.task for item in run.items}) * trained / GIGABYTE
    most = rollout.prompts_per_step * rollout.samples_per_prompt * policy.context_length

    def estimate(tokens: int) -> float:
        return base + kept.update(min(tokens, most)) / GIGABYTE

    installed, size = installed_memory(policy.device), portion.size
    while estimate(size) > 0.9 * installed and size > LEAST_PLANNED:
        size //= 2
    wanted, run.memory_estimate = estimate(portion.whole), estimate(portion.size)
    about = f"this run will take about {wanted:.1f} GB of memory at its height, and {installed:.1f} GB are installed: "
    if estimate(size) > 0.9 * installed:
        run.notes.append(about + "lower update.tokens_per_micro_batch, or train with policy.lora")
    elif size < portion.size:
        portion.size, run.memory_estimate = size, estimate(size)
        run.notes.append(about + f"it begins with {size} tokens per micro-batch, which changes no gradient")


def build_policy(config: RunConfig) -> Policy:
    """The policy with its value head and adapters; the seed makes their initial weights the same each time."""
    settings = config.policy
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(settings.model, device=device, trusted=settings.trust_remote_code)
    if settings.languages is not None:
        set_languages(model, tokenizer, **settings.languages.model_dump())
    head = None
    if settings.value_head is not None:
        head = ValueHead(model.config.get_text_config().hidden_size, detach_trunk=settings.value_head.detach_trunk)
    return Policy(
        model,
        tokenizer,
        precision=settings.precision,
        lora=Lora(**settings.lora.model_dump()) if settings.lora else None,
        value_head=head,
        dropout=settings.dropout,
        compile=settings.compile,
        recompute_activations=config.update.recompute_activations,
    )


def build_controls(config: RolloutConfig, policy: Policy) -> Controls:
    """What the samples of training are drawn by."""
    controls, mask = Controls.resolve(config.sampling, policy.tokenizer, policy.eos_ids), config.mask
    return controls if mask is None else replace(controls, mask=Mask(mask.top_p, mask.least))


def build_mask(config: RunConfig, policy: Policy) -> NativeEngine | None:
    """The engine of the mask policy, on a copy of the policy as it is now that shares what is not trained; or None."""
    if config.rollout.mask is None or config.offline is not None:
        return None
    return _native_engine(policy, copy_of(policy.model), config.rollout.max_rows)


def build_engine(
    policy: Policy, config: RolloutConfig, mask: NativeEngine | None = None
) -> NativeEngine | TransformersEngine:
    """The rollout engine on the policy's own model, or on a bfloat16 copy of it where bfloat16 is in use."""
    if config.engine == "transformers":
        return TransformersEngine(
            policy.model,
            policy.tokenizer,
            dtype=policy.autocast_dtype,
            max_rows=config.max_rows,
            context_length=policy.context_length,
        )
    return _native_engine(policy, policy.model, config.max_rows, mask)


def _native_engine(policy: Policy, model: Any, max_rows: int, mask: NativeEngine | None = None) -> NativeEngine:
    """The native engine on `model`, which is the policy's or a copy of it."""
    return NativeEngine(
        model,
        policy.tokenizer,
        head_logits=head_logits,
        dtype=policy.autocast_dtype,
        max_rows=max_rows,
        context_length=policy.context_length,
        mask=mask,
    )


def build_task(config: TaskConfig, *, augment: bool = True) -> ItemTask:
    """The task that the configuration names, its data read and checked; `augment`: with copies, if it asks for some."""
    if isinstance(config, MixtureTask):
        tasks = dict[str, ItemTask]()
        for name, member in config.tasks.items():
            try:
                tasks[name] = build_task(member, augment=augment)
            except TaskError as error:
                raise TaskError(f"task.tasks.{name}: {error}") from error
        return mixed(tasks)
    if isinstance(config, FunctionTask):
        task = _made_task(config)
        return folded(task, **config.fold.model_dump()) if config.fold else task
    settings = config.model_dump(exclude={*Member.model_fields, *Data.model_fields, "type", "family", *OF_FAMILIES})
    if isinstance(config, DocstringsTask):
        task = load_docstring_task(**settings)
    else:
        asked_for = (config.curriculum and config.curriculum.difficulty, config.balance)
        settings["info"] = tuple(dict.fromkeys((*config.info, *(c for c in asked_for if c and c != config.answer))))
        settings["layouts"] = [Layout(**layout.model_dump()) for layout in config.layouts]
        settings["augment"] = build_augmentation(config.augment) if config.augment and augment else None
        task = load_file_task(**settings)
    return folded(task, **config.fold.model_dump()) if config.fold else task


def _made_task(config: FunctionTask) -> ItemTask:
    """What the function of `config` returns, its items in memory."""
    made = make_with(config.fn, config.parameters, "task")
    if not isinstance(made, Task):
        raise TaskError(f"task.fn {config.fn}: expected a task (name, items), got {type(made).__name__}")
    return ItemTask(made.name, {split: tuple(made.items(split))[: config.limit] for split in SPLITS})


def build_course(config: RunConfig, items: Sequence[Item], size: int, policy: Policy) -> Course | None:
    """Which of `items` each step takes, `size` at a time; None where that is one pass after the other over all."""
    task, seed = config.task, config.seed
    if not isinstance(task, MixtureTask):
        if task.curriculum is None and task.balance is None:
            return None
        classes = _classes(items, task.balance, getattr(task, "answer", None))
        pools = {name: _pool(found, task.curriculum, policy) for name, found in classes.items()}
        return Course(pools, dict.fromkeys(pools, 1 / len(pools)), size=size, seed=seed, kind="class")
    by_task: dict[str, list[Item]] = {name: [] for name in task.tasks}
    for item in items:
        by_task[item.task].append(item)
    for name, found in by_task.items():
        if not found:
            raise TaskError(f"task.tasks.{name}: it has no training items")
    weights = {name: member.weight for name, member in task.tasks.items()}
    shares = shares_of(weights, {name: len(found) for name, found in by_task.items()}, task.temperature)
    pools = {name: _pool(found, task.tasks[name].curriculum, policy) for name, found in by_task.items()}
    progress = LearningProgress(**task.progress.model_dump()) if task.progress else None
    return Course(pools, shares, size=size, seed=seed, progress=progress)


def build_windows(
    task: TaskConfig, items: Sequence[Item], policy: Policy, examples: Examples | None
) -> LengthWindows | None:
    """How several steps share their items out by length, if they do: that of prompts, or of the rows that are learnt
    from."""
    if isinstance(task, MixtureTask) or task.length_window is None:
        return None

    def length(item: Item) -> int:
        if examples is None:
            return len(prompt_ids(item, policy.tokenizer))
        return max(len(row.tokens) for row in examples.episodes([item])[0])

    return LengthWindows([length(item) for item in items], task.length_window)


def _classes(items: Sequence[Item], column: str | None, answer: str | None) -> dict[str, list[Item]]:
    """The items by what a column says of them; all under "" without one. `answer` is the column of the answers."""
    classes: dict[str, list[Item]] = {}
    for item in items:
        value = "" if column is None else item.answer if column == answer else item.info.get(column)
        if value is None or (column is not None and str(value) == ""):
            raise TaskError(f"item {item.id}: task.balance {column!r}: expected the name of a class, got {value!r}")
        classes.setdefault(str(value), []).append(item)
    return dict(sorted(classes.items()))


def _pool(items: Sequence[Item], curriculum: CurriculumConfig | None, policy: Policy) -> Pool:
    """`items`, with what the curriculum measures each of them by."""
    limits = curriculum.limits if curriculum else {}

    def measure(name: str, item: Item) -> float:
        if name == "prompt_tokens" or curriculum is None:
            return float(len(prompt_ids(item, policy.tokenizer)))
        return _number(item, str(curriculum.difficulty))

    return Pool(items, [Limit(n, [measure(n, i) for i in items], Schedule(points)) for n, points in limits.items()])


def _number(item: Item, column: str) -> float:
    """The number in a column of an item."""
    value = item.info.get(column)
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise TaskError(f"item {item.id}: curriculum.difficulty {column!r}: expected a number, got {str(value)[:40]!r}")
    return number


def build_rewards(configs: Sequence[RewardConfig], where: str = "rewards") -> list[Weighted]:
    """The weighted parts; parameters are checked against the fields of the reward.

    where: what the configuration calls them.
    """
    parts: list[Weighted] = []
    for index, config in enumerate(configs):
        name, place = config.name or str(config.fn).rpartition(":")[2], f"{where}.{index}"
        if name in (part.name for part in parts):
            raise ConfigError(f"{place}: a second part named {name!r}; give `fn` parts a `name` of their own")
        reward = _reward(config, place)
        try:
            part = Weighted(
                reward,
                _weight(config),
                name,
                None if config.processes else config.time_limit,  # which its processes keep
                config.clip,
                None if config.normalise == "none" else Normaliser(config.normalise),
                config.attempts,
                config.max_failed_share,
                config.tasks,
            )
        except ConfigError as error:  # of a schedule, a constraint or a clip
            raise ConfigError(f"{place}: {error}") from error
        parts.append(part)
    return parts


def _reward(config: RewardConfig, where: str) -> Reward:
    """The reward itself, in this process or in some of its own."""
    name = config.fn or config.name or ""
    if not config.processes:
        return make(name, config.parameters, where)
    if hasattr(resolve(name), "learn"):
        raise ConfigError(f"{where}: {name} learns beside the policy: it has no `processes` of its own")
    return Isolated(
        name, config.parameters, processes=config.processes, time_limit=config.time_limit,
        memory_limit=config.memory_limit, place=where,
    )  # fmt: skip


def _weight(config: RewardConfig) -> float | Schedule | Multiplier:
    if config.constraint is not None:
        return Multiplier(**config.constraint.model_dump())
    return config.weight if isinstance(config.weight, float) else Schedule(config.weight)


def build_kl(config: RunConfig) -> FixedKL | AdaptiveKL:
    """The controller of the KL coefficient; the fixed one where no target is set."""
    kl = config.kl
    coefficient = 0.0 if kl.place == "none" else kl.coefficient
    return FixedKL(coefficient) if kl.target is None else AdaptiveKL(coefficient, kl.target, kl.horizon)


def build_optimizer(config: RunConfig, policy: Policy) -> torch.optim.Optimizer:
    """AdamW: weight decay on matrices only, the value head at its own learning rate."""
    update, head = config.update, config.policy.value_head
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in policy.trainable().items():
        own = name.startswith("value_head.") and head is not None
        rate = head.learning_rate if own and head is not None else update.learning_rate
        decay = update.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": rate, "peak_lr": rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=update.betas,
        fused=True,
    )


def build_examples(method: OfflineConfig, task: ItemTask, policy: Policy) -> Examples:
    """How the items of `task` become rows of answers that `method` learns from."""
    train = task.items("train")
    if not train:
        raise TaskError(f"task {task.name}: the train split is empty")
    kind = offline.kind_of(method, train)
    start = decoder_start(policy.hf_model)
    return Examples.of(kind, policy.tokenizer, policy.eos_ids, policy.context_length, start)


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
    if config.offline is not None:
        examples = build_examples(config.offline, task, policy)
        # What is too long to be learnt from is answered all the same: all methods are measured on the same items.
        items, left_out = examples.fitting(items, config.offline.max_tokens and examples.context_length)
        notes += [f"{evaluation.split}: {note}" for note in left_out]
        given = offline.HeldOutAnswers(config.offline, examples, evenly(items, evaluation.items))
    items, by_task = evenly(items, evaluation.items), dict[str, str]()
    if isinstance(config.task, MixtureTask):
        present = {item.task for item in items}
        notes += [
            f"task.tasks.{name}: none of the {len(items)} {evaluation.split} items is of it, so it is not followed"
            for name in config.task.tasks
            if name not in present
        ]
        by_task = {name: m.metric or evaluation.metric for name, m in config.task.tasks.items() if name in present}
    _refuse_too_long(items, policy, evaluation.sampling)
    _refuse_unknown_tokens(items, policy)
    controls = Controls.resolve(evaluation.sampling, policy.tokenizer, policy.eos_ids)
    return Evaluator(
        items, controls, metric=evaluation.metric, given=given, by_task=by_task, further=evaluation.further,
        beside=[part.fixed() for part in build_rewards(evaluation.beside, "evaluation.beside")],
        language=evaluation.language, judge=build_judge(config, policy), gather=build_turns(config, policy) or collect,
    ), notes  # fmt: skip


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


def fitting(task: ItemTask, split: Split, policy: Policy, rollout: RolloutConfig) -> tuple[Sequence[Item], list[str]]:
    """The items whose prompts are not longer than asked for, and a note on how many were left out."""
    items = task.items(split)
    if rollout.max_prompt_tokens is None:
        _refuse_too_long(items, policy, rollout.sampling)
        return items, []
    limit = min(rollout.max_prompt_tokens, policy.context_length - rollout.sampling.least_room)
    fitting = [item for item in items if len(prompt_ids(item, policy.tokenizer)) <= limit]
    if not fitting:
        raise TaskError(f"task {task.name}: no {split} item has a prompt of at most {limit} tokens; raise the limit")
    left_out = len(items) - len(fitting)
    return fitting, [
        f"left out {left_out} of {len(items)} {split} items: prompt over {limit} tokens"
    ] if left_out else []


def _refuse_too_long(items: Sequence[Item], policy: Policy, sampling: Sampling) -> None:
    most = policy.context_length - sampling.least_room
    for item in items:
        if isinstance(item.prompt, str) and len(item.prompt.encode()) + 7 < most:
            continue  # a token is at least one byte of text, and a tokenizer adds a few marks at most: it fits
        length = len(prompt_ids(item, policy.tokenizer))
        if length > most:
            beside = f", of which a segment and what it sees take {sampling.least_room}" if sampling.segment else ""
            raise TaskError(
                f"item {item.id}: its prompt has {length} tokens, and this model's context is {policy.context_length}"
                f"{beside}. Shorten the prompt template, or set rollout.max_prompt_tokens to leave such training items "
                "out."
            )


def _refuse_unknown_tokens(items: Sequence[Item], policy: Policy) -> None:
    """A token that was added to the tokenizer alone has no embedding: found here, not deep inside of the model."""
    embeddings: Any = policy.hf_model.get_input_embeddings()
    known = int(embeddings.weight.shape[0])
    if max(policy.tokenizer.get_vocab().values(), default=0) < known:
        return
    for item in items:
        for token in prompt_ids(item, policy.tokenizer):
            if token >= known:
                raise ModelError(
                    f"item {item.id}: its prompt has the token {policy.tokenizer.convert_ids_to_tokens(token)!r} (id "
                    f"{token}), but this model has embeddings for {known} ids: the tokenizer was extended, the model "
                    "was not. Call model.resize_token_embeddings(len(tokenizer)) and save both."
                )
