"""A task is named splits of items; here are its contract, its prompts, its splits and the order it is visited in.

Everything is a pure function of its arguments: no generator is kept, so step k of a resumed run sees the
items that it would have seen without the interruption.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np

from pertoken.errors import TaskError, closest
from pertoken.types import Item, Message

Split = Literal["train", "validation", "test"]
Template = str | Sequence[Message]
"""A prompt over columns: plain text, or chat messages."""
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
FRACTIONS = (0.8, 0.1, 0.1)
"""Shares of train, validation and test where the data has no splits of its own."""


@runtime_checkable
class Task(Protocol):
    """Where problems come from. Items of one split never change while a run lasts."""

    @property
    def name(self) -> str: ...

    def items(self, split: Split) -> Sequence[Item]:
        """The items of a split, in a fixed order; empty if the task has no such split."""
        ...


@dataclass(frozen=True)
class ItemTask:
    """A task whose items are all in memory."""

    name: str
    splits: Mapping[Split, Sequence[Item]]

    def items(self, split: str) -> Sequence[Item]:
        if split not in SPLITS:
            raise TaskError(f"task {self.name}: no split {split!r}: {closest(split, SPLITS)}")
        return self.splits.get(split, ())


_PLACE = re.compile(r"\{\{|\}\}|\{(?P<column>[^{}]*)\}|(?P<stray>[{}])")


class PromptTemplate:
    """Renders the prompt of a row: text with `{column}` places, or chat messages whose contents are such texts.

    A brace itself is written twice. There are no formats, indices or attributes: a column that is not there is
    refused when the template meets its first row, not guessed.

    >>> PromptTemplate("Summarise {{briefly}}: {body}").render({"body": "It rains."})
    'Summarise {briefly}: It rains.'
    >>> PromptTemplate([{"role": "user", "content": "{body}"}]).render({"body": "It rains."})
    ({'role': 'user', 'content': 'It rains.'},)
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        texts = [template] if isinstance(template, str) else [_content(message) for message in template]
        if not texts:
            raise TaskError("the prompt template has no messages: give it at least one with a role and a content")
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(name for text in texts for name in _columns(text)))
        """The columns that the template needs, in order of appearance."""

    def render(self, row: Mapping[str, Any]) -> str | tuple[Message, ...]:
        """The prompt of `row`."""
        if missing := [name for name in self.columns if name not in row]:
            raise TaskError(
                f"the prompt template names a column {missing[0]!r} that is not there: {closest(missing[0], row)}"
            )
        if isinstance(self.template, str):
            return _fill(self.template, row)
        return tuple({"role": message["role"], "content": _fill(message["content"], row)} for message in self.template)


def _content(message: Message) -> str:
    if set(message) != {"role", "content"}:
        raise TaskError(
            f"a message of a prompt template has the keys role and content, got {', '.join(sorted(message))}"
        )
    return message["content"]


def _columns(text: str) -> list[str]:
    for place in _PLACE.finditer(text):
        if place["stray"] or place["column"] == "":
            raise TaskError(
                f"the prompt template has a lone {place[0]!r} at character {place.start()} of {text[:60]!r}: "
                "name a column between braces, or double the brace to mean the brace itself"
            )
    return [place["column"] for place in _PLACE.finditer(text) if place["column"]]


def _fill(text: str, row: Mapping[str, Any]) -> str:
    return _PLACE.sub(lambda place: str(row[place["column"]]) if place["column"] else place[0][0], text)


def split_by(key: str, fractions: Sequence[float] = FRACTIONS, seed: int = 0) -> Split:
    """The split that `key` falls into: its hash as a number in [0, 1) against the cumulative `fractions`.

    The same on every machine and whatever else the data holds, so added rows move no old one. Rows that share
    a key share a split.

    >>> [split_by(name) for name in ("json", "asyncio", "zipfile")]
    ['train', 'validation', 'train']
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or not abs(sum(fractions) - 1) < 1e-6:
        raise TaskError(
            f"split fractions are three numbers >= 0 (train, validation, test) that sum to 1, got {fractions}"
        )
    place = int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "big") / 2**64
    if place < fractions[0]:
        return "train"
    return "validation" if place < fractions[0] + fractions[1] else "test"


T = TypeVar("T", bound=ItemTask)


def folded(task: T, *, count: int, held_out: int, seed: int = 0) -> T:
    """`task` with train and validation divided anew: part `held_out` of `count` is validation, the others are train.

    Prompts in the order of their hashes with `seed` are dealt out in turn, so that parts differ by one prompt at most;
    items that share a prompt share a part. Raises TaskError if there are fewer prompts than parts.
    """
    items = [*task.items("train"), *task.items("validation")]

    def hashed(prompt: str) -> bytes:
        return hashlib.sha256(f"{seed}/{prompt}".encode()).digest()

    place = {prompt: k % count for k, prompt in enumerate(sorted({str(item.prompt) for item in items}, key=hashed))}
    if len(place) < count:
        raise TaskError(f"task {task.name}: {len(place)} prompts cannot be divided into {count} folds")
    parts: dict[bool, list[Item]] = {True: [], False: []}
    for item in items:
        parts[place[str(item.prompt)] == held_out].append(item)
    splits: dict[Split, Sequence[Item]] = {
        "train": tuple(parts[False]), "validation": tuple(parts[True]), "test": task.items("test"),
    }  # fmt: skip
    return replace(task, splits=splits)


def sample_order(num_items: int, seed: int, epoch: int) -> list[int]:
    """The order in which pass `epoch` visits the items: a permutation seeded by (seed, epoch) alone."""
    order: list[int] = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_items).tolist()
    return order


@dataclass(frozen=True)
class LengthWindows:
    """Windows of batches that share their items out by length: less padding in each of them."""

    lengths: Sequence[int]
    """Of each item, in tokens."""
    window: int
    """So many batches share their items out by length."""

    def sort(self, order: Sequence[int], size: int, seed: int, epoch: int) -> list[int]:
        """`order`, a pass over items in batches of `size`, with like lengths side by side.

        Of the items of each `window` batches, as they come in the pass, the shortest make one batch, the next ones
        another, and so on; equal lengths stay in the order of the pass. These batches are then shuffled, by (seed,
        epoch, window) alone, so that lengths neither rise nor fall over steps. What a window holds does not change.
        """
        found = list[int]()
        for begin in range(0, len(order), self.window * size):
            items = sorted(order[begin : begin + self.window * size], key=lambda k: self.lengths[k])
            batches = [items[k : k + size] for k in range(0, len(items), size)]
            shuffled = np.random.Generator(np.random.PCG64([seed, epoch, begin, 2])).permutation(len(batches))
            found += [item for k in shuffled for item in batches[k]]
        return found


def batch_of(
    items: Sequence[Item], step: int, size: int, seed: int, windows: LengthWindows | None = None
) -> list[Item]:
    """The `size` items of step `step` (from 0): distinct ones, and every step of a pass other ones.

    A pass is as many full batches as the items give; what is left over waits for a later pass, whose order is
    another one. A batch never holds an item twice: both copies would draw the same random numbers. With `windows`
    the same items of a pass fall into batches by their lengths.
    """
    if size > len(items):
        raise TaskError(
            f"a step takes {size} distinct items, but there are only {len(items)} training items: "
            "lower rollout.prompts_per_step (and raise rollout.samples_per_prompt) or give more data"
        )
    batches = len(items) // size
    epoch, batch = divmod(step, batches)
    order = sample_order(len(items), seed, epoch)[: batches * size]
    if windows is not None:
        order = windows.sort(order, size, seed, epoch)
    return [items[k] for k in order[batch * size : (batch + 1) * size]]


def check_task(task: Task, *, answers: bool = True) -> None:
    """Raise TaskError listing everything wrong with `task`; say nothing if it is sound.

    Sound: train items and at least one held-out split, ids unique, no prompt in two splits (nothing learned by
    heart counts as held-out quality) and, with `answers`, an answer for every item.
    """
    items = {split: task.items(split) for split in SPLITS}
    wrong = [] if items["train"] else ["the train split is empty"]
    if not items["validation"] and not items["test"]:
        wrong.append("the validation and test splits are both empty: nothing is held out")
    everything = [item for split in SPLITS for item in items[split]]
    repeated = [name for name, count in Counter(item.id for item in everything).items() if count > 1]
    wrong += _listed("ids occur more than once", repeated)
    wrong += _listed("prompts occur in two splits", leaks(items))
    wrong += _listed("items have no prompt", [item.id for item in everything if not item.prompt])
    if answers:
        wrong += _listed("items have no answer", [item.id for item in everything if not item.answer])
    if wrong:
        raise TaskError(f"task {task.name}: " + "; ".join(wrong))


def leaks(splits: Mapping[Split, Sequence[Item]]) -> list[str]:
    """The items whose prompts are in an earlier split too, each with both."""
    home: dict[str, Split] = {}
    return [
        f"{item.id} ({home[prompt]} and {split})"
        for split in SPLITS
        for item in splits[split]
        if home.setdefault(prompt := str(item.prompt), split) != split
    ]


def _listed(problem: str, names: list[str], shown: int = 3) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {problem}: {', '.join(names[:shown])}{' ...' if len(names) > shown else ''}"]
