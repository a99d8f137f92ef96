"""From a row to its prompt and its answers: which columns they are in, and in what shape.

    row -> `Layout.fits` -> `Layout.read` -> `Reading`

Data of one kind come under many names (`document` and `summary`, `article` and `highlights`), as prompts that are
ready, and as conversations. A layout is one of these; a row is read by the first one that it fits.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pertoken.errors import TaskError
from pertoken.rows import Row
from pertoken.tasks.base import PromptTemplate, Template
from pertoken.types import Message


class UnusableRowError(ValueError):
    """Why a row cannot become an item; caught where the row's place is known."""


@dataclass(frozen=True)
class Reading:
    """What a row says."""

    prompt: str | tuple[Message, ...]
    answers: list[str]
    """The references; none where there are none."""
    several: bool = False
    """Whether the row has a list of them."""
    source: str | None = None
    """The text that the prompt is about."""


@dataclass(frozen=True)
class Layout:
    """One way to read a row. A column `a.b` that is not there itself is `b` in what `a` holds."""

    prompt: Template | None = None
    """Template over the columns; None where `messages` has the prompt."""
    messages: str | None = None
    """Column with a conversation: messages with `role` and `content` (or `from` and `value`), or texts in turn. If
    there is no `answer`, its last turn is the answer, of the assistant."""
    answer: str | None = None
    """Column with the answer: a text, a list of texts, or messages of the assistant."""
    source: str | None = None
    """Column of the text that the prompt is about, for metrics and rewards that compare with it."""
    opening: int | None = None
    """The prompt's one column holds prompt and answer: so many words are the prompt, the rest is the answer."""

    def __post_init__(self) -> None:
        asked = self.template.columns if self.template else ()  # a template with a fault is found here
        if self.opening is not None and len(asked) != 1:
            raise TaskError(
                f"a layout with an opening asks by the one column that it divides, got {len(asked)} in its prompt"
            )

    @cached_property
    def template(self) -> PromptTemplate | None:
        return None if self.prompt is None else PromptTemplate(self.prompt)

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """All that it needs."""
        asked = self.template.columns if self.template else ()
        named = [name for name in (self.messages, self.answer, self.source) if name is not None]
        return tuple(dict.fromkeys((*asked, *named)))

    def fits(self, row: Row) -> bool:
        """Whether `row` has all columns, and lists where conversations are expected and nowhere else."""
        if not all(_has(row, name) for name in self.columns):
            return False
        asked = self.template.columns if self.template else ()
        talks = self.messages is None or isinstance(cell_of(row, self.messages), list | tuple)
        return talks and not any(isinstance(cell_of(row, name), list | tuple) for name in asked)

    def read(self, row: Row, *, no_answer: str | None = None, template: PromptTemplate | None = None) -> Reading:
        """What `row` says; UnusableRowError if it cannot be read so.

        no_answer: what the answer is where there is none in the column. template: to put in place of its own.
        """
        source = None if self.source is None else text_in(cell_of(row, self.source), self.source)
        given = None if self.answer is None else cell_of(row, self.answer)
        answers = [] if self.answer is None else answers_in(given, self.answer, no_answer)
        several = self.answer is not None and not isinstance(given, str | None)
        if self.messages is not None:
            turns = conversation(cell_of(row, self.messages), self.messages, answered=self.answer is None)
            if self.answer is None:
                turns, answers = turns[:-1], [turns[-1]["content"]]
            return Reading(turns, answers, several, source)
        template = template or self.template
        assert template is not None, "a layout has a prompt or messages"
        texts = {name: text_in(cell_of(row, name), name) for name in template.columns}
        if self.opening is not None:
            (name,) = texts
            texts[name], rest = _opened(texts[name], self.opening, name)
            answers = [rest]
        return Reading(template.render(texts), answers, several, source)

    def rewritable(self, row: Row) -> dict[str, str]:
        """The texts of the prompt that may be said otherwise, by column: of a conversation the user's last turn."""
        if self.messages is not None:
            turn = self._last_of_user(row)
            return {} if turn is None else {self.messages: _said(cell_of(row, self.messages)[turn])}
        if self.template is None or self.opening is not None:
            return {}
        return {name: str(cell_of(row, name)) for name in self.template.columns}

    def rewritten(self, row: Row, texts: Mapping[str, str]) -> Row:
        """`row` with other texts in these columns."""
        if self.messages is None or self.messages not in texts:
            return {**row, **texts}
        turns, turn = list(cell_of(row, self.messages)), self._last_of_user(row)
        assert turn is not None
        said = turns[turn]
        key = "content" if isinstance(said, Mapping) and "content" in said else "value"
        turns[turn] = texts[self.messages] if isinstance(said, str) else {**said, key: texts[self.messages]}
        return {**row, self.messages: turns}

    def _last_of_user(self, row: Row) -> int | None:
        assert self.messages is not None
        turns = conversation(cell_of(row, self.messages), self.messages, answered=self.answer is None)
        return max((k for k, turn in enumerate(turns) if turn["role"] == "user"), default=None)


def cell_of(row: Row, column: str) -> Any:
    """What stands in a column, or at a path into one; UnusableRowError if there is neither.

    >>> cell_of({"translation": {"en": "Hello", "de": "Hallo"}}, "translation.de")
    'Hallo'
    """
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UnusableRowError(f"no column {column!r}")
        value = value[name]
    return value


def _has(row: Row, column: str) -> bool:
    try:
        cell_of(row, column)
    except UnusableRowError:
        return False
    return True


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""Names of who speaks, as ShareGPT and others have them."""


def conversation(value: object, column: str, *, answered: bool) -> tuple[Message, ...]:
    """The turns in a cell, `answered` if the last one is the answer: then it is the assistant's, and not the only one.

    >>> conversation(["Hi!", "Hello.", "How are you?"], "dialog", answered=False)[0]
    {'role': 'user', 'content': 'Hi!'}
    """
    if not isinstance(value, list | tuple) or not value:
        raise UnusableRowError(f"column {column!r}: expected a list of messages, got {str(value)[:40]!r}")
    turns: list[Message] = []
    for k, turn in enumerate(value):
        back = len(value) - 1 - k
        role = ("assistant", "user")[(back + (not answered)) % 2]
        if isinstance(turn, Mapping):
            role = str(turn.get("role") or turn.get("from") or "")
            role = _ROLES.get(role, role)
        if not role:
            raise UnusableRowError(f"column {column!r}: message {k} does not say whose it is (role)")
        turns.append({"role": role, "content": text_in(_said(turn), f"{column}.{k}")})
    if answered and (turns[-1]["role"] != "assistant" or len(turns) < 2):
        raise UnusableRowError(
            f"column {column!r}: expected some messages and an answer of the assistant, got {len(turns)} that end with "
            f"one of {turns[-1]['role']!r}"
        )
    return tuple(turns)


def _said(turn: Any) -> Any:
    """The text of a message."""
    return turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else turn


def answers_in(value: object, column: str, no_answer: str | None = None) -> list[str]:
    """The answers in a cell: a text, texts, or the last of some messages; `no_answer` where there is none."""
    if no_answer is not None and (value is None or value == "" or value in ([], ())):
        return [no_answer]
    if not isinstance(value, list | tuple):
        return [text_in(value, column)]
    if not value:
        raise UnusableRowError(f"column {column!r} is an empty list")
    if all(isinstance(turn, Mapping) for turn in value):
        return [text_in(_said(value[-1]), column)]
    return [text_in(text, column) for text in value]


def text_in(value: object, column: str) -> str:
    """The text of a cell; UnusableRowError if it is none, or none that can be written."""
    if not isinstance(value, str):
        kind = "empty" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise UnusableRowError(f"column {column!r}: expected text, got {kind}")
    if not value.strip():
        raise UnusableRowError(f"column {column!r} is empty")
    if "\0" in value:
        raise UnusableRowError(f"column {column!r} holds a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # a byte that was no UTF-8, or half a surrogate pair written as \ud83d
        raise UnusableRowError(f"column {column!r} is not UTF-8 at character {error.start}") from None
    return value


def _opened(text: str, words: int, column: str) -> tuple[str, str]:
    """The first `words` words of a text, and the rest."""
    first = re.match(rf"\s*(?:\S+\s+){{{words - 1}}}\S+", text)
    rest = text[first.end() :].strip() if first else ""
    if first is None or not rest:
        raise UnusableRowError(
            f"column {column!r}: its {len(text.split())} words leave nothing behind an opening of {words}"
        )
    return first[0].strip(), rest


def expected(layouts: Sequence[Layout]) -> str:
    """The columns of each layout, in words."""
    return "; ".join(dict.fromkeys(", ".join(layout.columns) for layout in layouts))
