"""Tasks from your own data: JSONL, JSON, CSV, TSV, Parquet, a folder of them, or a Hugging Face dataset.

    path -> `sources_of`: rows of each split -> `_Recipe`: a row becomes an item or a reason -> `FileTask`

No row is dropped in silence: what cannot be used is listed with file, line and reason, and more than
`max_bad_rows` of it ends the loading. A held-out row whose prompt is also in train counts as unusable.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from pertoken.errors import TaskError, closest
from pertoken.rows import MAX_ROW_BYTES, Row
from pertoken.tasks.augment import Augmentation, augmented
from pertoken.tasks.base import FRACTIONS, SPLITS, ItemTask, PromptTemplate, Split, Template, split_by
from pertoken.tasks.layouts import Layout, UnusableRowError, cell_of, expected, text_in
from pertoken.tasks.sources import sources_of
from pertoken.types import Item


@dataclass(frozen=True)
class BadRow:
    """A row that was left out."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class FileTask(ItemTask):
    """A task that was read from files."""

    bad_rows: tuple[BadRow, ...] = ()
    notes: tuple[str, ...] = ()
    """What else there is to say of how it was read."""


def load_file_task(
    path: str | Path | Mapping[str, str | Path],
    *,
    prompt: Template = ({"role": "user", "content": "{prompt}"},),
    answer: str | None = "reference",
    id: str | None = None,
    info: Sequence[str] = (),
    rejected: str | None = None,
    desirable: str | None = None,
    layouts: Sequence[Layout] = (),
    no_answer: str | None = None,
    augment: Augmentation | None = None,
    max_bad_rows: int = 0,
    limit: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seed: int = 0,
) -> FileTask:
    """The task in a file, a folder with a file per split, one path per split, or a Hugging Face dataset.

    `prompt` is a template over the columns. `answer` is a column of text, or of lists of texts: then the first is the
    answer and `info["references"]` holds all. `id` is a column of unique values (None: rows are numbered), `info`
    names columns to hand on as they are, `limit` bounds the items of each split. Where the data has no held-out
    split, the hash of each prompt with `seed` decides by `fractions`, so the order of the rows decides nothing.

    `layouts` are ways to read a row in place of `prompt` and `answer`: the first that it fits is taken. `no_answer` is
    the answer of rows whose column has none (None: they are unusable). `augment` adds changed copies of train items.
    """
    ways = tuple(layouts) or (Layout(prompt, answer=answer),)
    recipe = _Recipe(ways, no_answer, id, tuple(info), rejected, desirable)
    sources = sources_of(path)
    undivided = all(source.split in (None, "train") for source in sources)
    pool: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    numbers = {source.split: count(1) for source in sources}
    columns: dict[str, None] = {}
    seen, bad, read = _Seen(), list[BadRow](), dict[str, Row]()
    for source in sources:
        targets = SPLITS if undivided else (source.split,)
        for line, row in source.rows:
            if limit is not None and all(len(pool[split]) >= limit for split in targets if split):
                break
            try:
                columns |= dict.fromkeys(row if isinstance(row, Mapping) else ())
                item = recipe.item(row, f"{source.split or 'row'}-{next(numbers[source.split])}")
                split = split_by(str(item.prompt), fractions, seed) if undivided else source.split or "train"
                seen.add(item, split, f"{source.file}:{line}")
            except UnusableRowError as reason:
                bad.append(BadRow(source.file, line, str(reason)))
            else:
                pool[split].append(item)
                if augment is not None and split == "train" and isinstance(row, Mapping):
                    read[item.id] = row
    check_rows(path, recipe.columns, columns, bad, max_bad_rows, "task", num_items=sum(map(len, pool.values())))
    name = "files" if isinstance(path, Mapping) else Path(path).stem
    splits = {split: tuple(items[:limit]) for split, items in pool.items()}
    notes = tuple[str, ...]()
    if augment is not None:
        copies, notes = augmented(
            [(item, read[item.id]) for item in splits["train"]], recipe, augment, set(seen.prompts)
        )
        splits["train"] += copies
    return FileTask(name, splits, tuple(bad), notes)


def check_rows(
    path: object,
    needed: Iterable[str],
    columns: Iterable[str],
    bad: list[BadRow],
    max_bad_rows: int,
    section: str,
    *,
    num_items: int,
) -> None:
    """Raise TaskError, with the deepest cause first: no rows, a column that no row has, too many bad rows.

    needed: the columns that are asked for; columns: those that rows have; section: of the configuration.
    """
    shown = "\n  ".join(map(str, bad[:5])) + (f"\n  ... and {len(bad) - 5} more" if len(bad) > 5 else "")
    if not num_items and not bad:
        raise TaskError(f"{path}: there are no rows in it")
    known = list(columns)
    columns_there = set(known)
    if known and (missing := [name for name in needed if not {name, name.partition(".")[0]} & columns_there]):
        raise TaskError(f"{path}: no column {missing[0]!r}: {closest(missing[0], known)}; columns: {', '.join(known)}")
    if len(bad) > max_bad_rows:
        raise TaskError(
            f"{path}: {len(bad)} unusable rows, {section}.max_bad_rows allows {max_bad_rows}; repair them or raise it:"
            f"\n  {shown}"
        )
    if not num_items:
        raise TaskError(f"{path}: no usable row:\n  {shown}")


# --- from a row to an item --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recipe:
    """Which columns make an item, and how."""

    layouts: tuple[Layout, ...]
    no_answer: str | None
    id: str | None
    info: tuple[str, ...]
    rejected: str | None
    desirable: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """What every row needs."""
        read = self.layouts[0].columns if len(self.layouts) == 1 else ()
        optional = [name for name in (self.id, self.rejected, self.desirable) if name is not None]
        return tuple(dict.fromkeys((*read, *optional, *self.info)))

    def layout(self, row: Row) -> Layout:
        """How `row` is read."""
        if len(self.layouts) == 1:
            return self.layouts[0]
        found = next((layout for layout in self.layouts if layout.fits(row)), None)
        if found is None:
            raise UnusableRowError(
                f"it fits none of the layouts: expected {expected(self.layouts)}; got {', '.join(map(str, row))}"
            )
        return found

    def item(self, row: Row | str, number: str, template: PromptTemplate | None = None) -> Item:
        """The item of `row`, by its id or else `number`; asked by `template`, if that is given."""
        if isinstance(row, str):
            raise UnusableRowError(row)
        for name in self.columns:
            cell_of(row, name)
        read = self.layout(row).read(row, no_answer=self.no_answer, template=template)
        info = {name: cell_of(row, name) for name in self.info}
        if read.source is not None:
            info.setdefault("source", read.source)
        if read.several:
            info["references"] = read.answers
        if self.rejected is not None:
            info["rejected"] = text_in(cell_of(row, self.rejected), self.rejected)
            if info["rejected"] in read.answers:
                raise UnusableRowError(f"column {self.rejected!r} is the same text as the answer: nothing to prefer")
        if self.desirable is not None:
            info["desirable"] = _truth(cell_of(row, self.desirable), self.desirable)
        said = [read.prompt] if isinstance(read.prompt, str) else [turn["content"] for turn in read.prompt]
        if sum(map(len, (*said, *read.answers, info.get("rejected", "")))) > MAX_ROW_BYTES:
            raise UnusableRowError(f"larger than {MAX_ROW_BYTES / 1e6:.0f} MB")
        name = number if self.id is None else _id(cell_of(row, self.id), self.id)
        return Item(name, read.prompt, read.answers[0] if read.answers else None, info)


def _truth(value: object, column: str) -> bool:
    """True or false, as data have it: a boolean, 1 or 0, or one of these words."""
    known = {"true": True, "1": True, "false": False, "0": False}
    found = known.get(str(value).strip().casefold()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise UnusableRowError(f"column {column!r}: expected true or false, got {str(value)[:40]!r}")
    return found


def _id(value: object, column: str) -> str:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_in(value, column)


class _Seen:
    """Ids and prompts so far, with their places."""

    def __init__(self) -> None:
        self.ids: dict[str, str] = {}
        self.prompts: dict[str, tuple[Split, str]] = {}

    def add(self, item: Item, split: Split, place: str) -> None:
        if item.id in self.ids:
            raise UnusableRowError(f"id {item.id!r} is already that of {self.ids[item.id]}")
        home, first = self.prompts.setdefault(str(item.prompt), (split, place))
        if home != split:
            raise UnusableRowError(f"its prompt is also in {home} ({first}), so it cannot be in {split}")
        self.ids[item.id] = place
