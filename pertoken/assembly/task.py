"""The task: its data read and checked, its items in the order of the steps, those that do not fit left out."""

import math
from collections.abc import Sequence
from typing import Any

from pertoken.augmentation import build_augmentation
from pertoken.config import (
    CurriculumConfig,
    Data,
    DocstringsTask,
    FunctionTask,
    Member,
    MixtureTask,
    OfflineConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
)
from pertoken.config.refusals import OF_FAMILIES
from pertoken.errors import ModelError, PertokenError, TaskError
from pertoken.forward import decoder_start
from pertoken.policy.model import Policy
from pertoken.prompts import prompt_ids
from pertoken.rewards import Schedule
from pertoken.rewards.names import make_with
from pertoken.sampling import Sampling
from pertoken.tasks.base import SPLITS, ItemTask, LengthWindows, Split, Task, folded
from pertoken.tasks.course import Course, Limit, Pool
from pertoken.tasks.docstrings import load_docstring_task
from pertoken.tasks.files import load_file_task
from pertoken.tasks.layouts import Layout
from pertoken.tasks.mixture import LearningProgress, mixed, shares_of
from pertoken.training import offline
from pertoken.training.examples import Examples
from pertoken.types import Item


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
    splits = dict[Split, Sequence[Item]]()
    for split in SPLITS:
        try:
            splits[split] = tuple(made.items(split))[: config.limit]
        except PertokenError:
            raise
        except Exception as error:
            raise TaskError(f"task.fn {config.fn}: items({split!r}) raised {type(error).__name__}: {error}") from error
        for place, item in enumerate(splits[split]):
            if not isinstance(item, Item):
                raise TaskError(f"task.fn {config.fn}: {split} item {place} is {type(item).__name__}, expected an Item")
    return ItemTask(made.name, splits)


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


def build_examples(method: OfflineConfig, task: ItemTask, policy: Policy) -> Examples:
    """How the items of `task` become rows of answers that `method` learns from."""
    train = task.items("train")
    if not train:
        raise TaskError(f"task {task.name}: the train split is empty")
    kind = offline.kind_of(method, train)
    start = decoder_start(policy.hf_model)
    return Examples.of(kind, policy.tokenizer, policy.eos_ids, policy.context_length, start)


def fitting(task: ItemTask, split: Split, policy: Policy, rollout: RolloutConfig) -> tuple[Sequence[Item], list[str]]:
    """The items whose prompts are not longer than asked for, and a note on how many were left out."""
    items = task.items(split)
    if rollout.max_prompt_tokens is None:
        refuse_too_long(items, policy, rollout.sampling, "set rollout.max_prompt_tokens to leave such items out")
        return items, []
    limit = min(rollout.max_prompt_tokens, policy.context_length - rollout.sampling.least_room)
    fitting = [item for item in items if len(prompt_ids(item, policy.tokenizer)) <= limit]
    if not fitting:
        what_to_do = (
            "raise rollout.max_prompt_tokens"
            if limit == rollout.max_prompt_tokens
            else f"this model's context is {policy.context_length}: shorten the prompt template"
        )
        raise TaskError(f"task {task.name}: no {split} item has a prompt of at most {limit} tokens; {what_to_do}")
    left_out = len(items) - len(fitting)
    return fitting, [
        f"left out {left_out} of {len(items)} {split} items: prompt over {limit} tokens"
    ] if left_out else []


def refuse_too_long(items: Sequence[Item], policy: Policy, sampling: Sampling, remedy: str) -> None:
    """Prompts that leave the model no room to write. remedy: what else can be done about them in this split."""
    most = policy.context_length - sampling.least_room
    for item in items:
        if isinstance(item.prompt, str) and len(item.prompt.encode()) + 7 < most:
            continue  # a token is at least one byte of text, and a tokenizer adds a few marks at most: it fits
        length = len(prompt_ids(item, policy.tokenizer))
        if length > most:
            beside = f", of which a segment and what it sees take {sampling.least_room}" if sampling.segment else ""
            raise TaskError(
                f"item {item.id}: its prompt has {length} tokens, and this model's context is {policy.context_length}"
                f"{beside}. Shorten the prompt template, or {remedy}."
            )


def refuse_unknown_tokens(items: Sequence[Item], policy: Policy) -> None:
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
