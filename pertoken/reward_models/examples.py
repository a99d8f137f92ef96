"""From rows of data to examples: each is checked, or listed as a bad row with its file, line and reason."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pertoken.errors import closest
from pertoken.reward_models.settings import DataSection, ObjectiveSection, Pairs, Preferences, Spans, Steps
from pertoken.rewards.align import CharSpan
from pertoken.rows import Row
from pertoken.tasks.base import SPLITS, Split, sample_order, split_by
from pertoken.tasks.files import BadRow, check_rows
from pertoken.tasks.layouts import UnusableRowError, cell_of, text_in
from pertoken.tasks.sources import sources_of


@dataclass(frozen=True)
class Preference:
    """Two texts for one prompt, of which the first is better."""

    prompt: str
    chosen: str
    rejected: str

    @property
    def key(self) -> str:
        """Examples of one key fall into one split."""
        return self.prompt or self.chosen

    @property
    def length(self) -> int:
        """In characters: examples of about one length go together."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Labelled:
    """A text with a value for each of some ranges of it: spans, or the steps of a solution."""

    prompt: str
    text: str
    spans: tuple[tuple[CharSpan, float], ...]

    @property
    def key(self) -> str:
        """As above."""
        return self.prompt or self.text

    @property
    def length(self) -> int:
        """As above."""
        return len(self.prompt) + len(self.text)


@dataclass(frozen=True)
class Pair:
    """A text or two with a label."""

    first: str
    second: str | None
    label: str

    @property
    def key(self) -> str:
        """As above."""
        return self.first

    @property
    def length(self) -> int:
        """As above."""
        return len(self.first) + len(self.second or "")


Example = Preference | Labelled | Pair


@dataclass(frozen=True)
class Examples:
    """The examples of each split, and the rows that could not be used."""

    splits: Mapping[Split, Sequence[Any]]
    bad_rows: tuple[BadRow, ...]


def read_examples(objective: ObjectiveSection, data: DataSection, seed: int = 0) -> Examples:
    """The examples at `data.path`, in a seeded order, the limits of `data` kept.

    Data without splits is divided by the hash of each prompt (else text), so that no prompt is in two of them. In data
    with splits, an example that is also in another one is a bad row.
    """
    make = _MAKERS[objective.type]
    path: Any = data.path
    sources = sources_of(path)
    undivided = all(source.split is None for source in sources)
    pool: dict[Split, list[Any]] = {split: [] for split in SPLITS}
    seen: dict[Any, tuple[Split, str]] = {}
    columns: dict[str, None] = {}
    bad: list[BadRow] = []
    for source in sources:
        for line, row in source.rows:
            try:
                if isinstance(row, str):
                    raise UnusableRowError(row)
                columns |= dict.fromkeys(row)
                example = make(row, objective)
                split = split_by(example.key, data.fractions, seed) if undivided else source.split or "train"
                home, place = seen.setdefault(example, (split, f"{source.file}:{line}"))
                if home != split:
                    raise UnusableRowError(f"it is also in {home} ({place}), so it cannot be in {split}")
            except UnusableRowError as reason:
                bad.append(BadRow(source.file, line, str(reason)))
            else:
                pool[split].append(example)
    needed = [getattr(objective, name) for name in _COLUMNS[objective.type]]
    check_rows(
        data.path, filter(None, needed), columns, bad, data.max_bad_rows, "data", num_items=sum(map(len, pool.values()))
    )
    limits = {"train": data.limit, "validation": data.held_out, "test": data.held_out}
    splits = {
        split: [examples[k] for k in sample_order(len(examples), seed, 0)][: limits[split]]
        for split, examples in pool.items()
    }
    return Examples(splits, tuple(bad))


def _preference(row: Row, objective: Preferences) -> Preference:
    chosen, rejected = _text(row, objective.chosen), _text(row, objective.rejected)
    if chosen == rejected:
        raise UnusableRowError(f"columns {objective.chosen!r} and {objective.rejected!r} are the same text")
    return Preference(_prompt(row, objective.prompt), chosen, rejected)


def _with_spans(row: Row, objective: Spans) -> Labelled:
    text, labels = _parsed(cell_of(row, objective.text)), _parsed(cell_of(row, objective.spans))
    if not isinstance(labels, list):
        raise UnusableRowError(f"column {objective.spans!r}: expected a list, got {_shown(labels)}")
    if isinstance(text, list):
        words = [text_in(word, objective.text) for word in text]
        if len(words) != len(labels):
            raise UnusableRowError(f"{len(words)} words in {objective.text!r} and {len(labels)} in {objective.spans!r}")
        text, spans, start = " ".join(words), [], 0
        for word, label in zip(words, labels, strict=True):
            if label is not None and (value := _value(label, objective)):
                spans.append(((start, start + len(word)), value))
            start += len(word) + 1
        return Labelled(_prompt(row, objective.prompt), text, tuple(spans))
    text, spans = _text(row, objective.text), []
    for entry in labels:
        if not isinstance(entry, list | tuple) or len(entry) != 3:
            raise UnusableRowError(f"column {objective.spans!r}: expected [start, stop, value], got {_shown(entry)}")
        start, stop, label = entry
        if not (type(start) is type(stop) is int and 0 <= start < stop <= len(text)):
            raise UnusableRowError(
                f"column {objective.spans!r}: [{start!r}, {stop!r}] is no range of the text's {len(text)} characters"
            )
        spans.append(((start, stop), _value(label, objective)))
    return Labelled(_prompt(row, objective.prompt), text, tuple(spans))


def _with_steps(row: Row, objective: Steps) -> Labelled:
    steps, labels = _parsed(cell_of(row, objective.steps)), _parsed(cell_of(row, objective.labels))
    for column, cell in ((objective.steps, steps), (objective.labels, labels)):
        if not isinstance(cell, list) or not cell:
            raise UnusableRowError(f"column {column!r}: expected a list that is not empty, got {_shown(cell)}")
    if len(steps) != len(labels):
        raise UnusableRowError(f"{len(steps)} steps in {objective.steps!r} and {len(labels)} in {objective.labels!r}")
    spans, start = [], 0
    for step, label in zip(steps, labels, strict=True):
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            raise UnusableRowError(f"column {objective.labels!r}: expected labels from 0 to 1, got {_shown(label)}")
        stop = start + len(text_in(step, objective.steps))
        spans.append(((start, stop), float(label)))
        start = stop + len(objective.separator)
    return Labelled(_prompt(row, objective.prompt), objective.separator.join(steps), tuple(spans))


def _pair(row: Row, objective: Pairs) -> Pair:
    label = cell_of(row, objective.label)
    label = str(label) if isinstance(label, int) else text_in(label, objective.label)
    if objective.labels and label not in objective.labels:
        raise UnusableRowError(f"column {objective.label!r}: {label!r} is no label; {closest(label, objective.labels)}")
    second = None if objective.second is None else _text(row, objective.second)
    return Pair(_text(row, objective.first), second, label)


_MAKERS: dict[str, Callable[[Row, Any], Any]] = {
    "preferences": _preference,
    "spans": _with_spans,
    "steps": _with_steps,
    "pairs": _pair,
}
_COLUMNS = {
    "preferences": ("prompt", "chosen", "rejected"),
    "spans": ("prompt", "text", "spans"),
    "steps": ("prompt", "steps", "labels"),
    "pairs": ("first", "second", "label"),
}
"""The fields of each objective that name a column."""


def _text(row: Row, column: str) -> str:
    return text_in(cell_of(row, column), column)


def _prompt(row: Row, column: str | None) -> str:
    return "" if column is None else _text(row, column)


def _parsed(cell: Any) -> Any:
    """A list, written as JSON where a table has text only."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return list(cell) if isinstance(cell, tuple) else cell


def _value(label: Any, objective: Spans) -> float:
    if isinstance(label, int | float):
        return float(label)
    if label not in objective.values:
        known = closest(str(label), objective.values) if objective.values else "objective.values is empty"
        raise UnusableRowError(f"column {objective.spans!r}: label {label!r} has no value; {known}")
    return objective.values[label]


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"
