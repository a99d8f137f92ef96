"""Where each sample lies in its file and what it is sorted by, so that a large run opens without all of it being read.

`index/` mirrors `episodes/` and `evaluations/`. The writer of a run makes it as it goes; for a folder without it (an
older run, a part of a copy) it is made when it is first needed, and kept if the folder can be written. It says nothing
that the samples do not, so it may be removed at any time; one that is not of its file is made anew.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pertoken.errors import RunFolderError
from pertoken.tracking.files import Number, Row, encode, line_ends, read_bytes, read_row, write_whole
from pertoken.tracking.records import read_episodes, read_items

FORMAT = 2

_HEAD = 16_384
"""Bytes of a line that are read at first to find its texts."""

_TAIL = 4096
"""Bytes at the end of a file by which an index knows it again: copying a file changes its times, but not these."""


@dataclass(frozen=True)
class Index:
    """The samples of one file, in the order of its lines."""

    ends: Sequence[int]
    """Byte behind each line."""
    rows: Sequence[Row]
    """Of an episode `item`, `group` and what `figures` returns; of a held-out item `id`, `metrics`, and where they
    are known `far`, how far it is from the reference (Σ |KL|), and `reward`, the total; of both `size`, see `_size`."""

    def span(self, line: int) -> tuple[int, int]:
        """First and last byte (excluded) of a line."""
        return (self.ends[line - 1] if line else 0), self.ends[line]


def read_index(path: Path) -> Index:
    """The index of a file of `episodes/` or `evaluations/`: the one that is kept if it is of this file, else a new one.

    Raises RunFolderError where the file itself is damaged.
    """
    mark = _mark(path)
    kept = _kept(_place(path))
    if kept is not None and (kept["bytes"], kept["tail"]) == mark:
        return Index(kept["ends"], kept["rows"])
    rows = _kind(path).read(path)[0]
    return _keep(path, rows, line_ends(read_bytes(path))[: len(rows)])


def read_texts(path: Path) -> Iterator[str]:
    """What can be searched of each sample of a file, in the order of its lines: its item and its texts.

    The writer puts the texts before the tokens and their numbers, which are most of a line and are not read.
    """
    kind, index = _kind(path), read_index(path)
    if not index.rows:
        return
    with open(path, "rb") as file:
        for line in range(len(index.rows)):
            start, stop = index.span(line)
            file.seek(start)
            head = file.read(min(stop - start, _HEAD))
            if (end := head.find(b',"tokens":{')) < 0:
                head += file.read(stop - start - len(head))
                end = head.find(b',"tokens":{')
            try:
                row = json.loads(head[:end] + b"}")
                texts = [row[name] for name in kind.texts]
            except (ValueError, KeyError):  # not in the order of our writer
                texts = [read_row(path, start, stop).get(name) for name in kind.texts]
            yield "\n".join(str(text) for text in texts if text)


def write_index(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Makes the index of a file that was just written from `rows`. An aid: where it cannot be kept, nothing is lost."""
    with suppress(KeyError, TypeError, AttributeError):  # rows that no reader takes: it says what is wrong with them
        _keep(path, rows, line_ends(read_bytes(path)))


def drop_index(path: Path) -> None:
    """Removes the index of a file that is to go."""
    with suppress(OSError):
        _place(path).unlink(missing_ok=True)


def figures(record: Row) -> dict[str, Number]:
    """What an episode is sorted by, as far as its streams tell.

    `reward`, the total; `clipped`, share of its actions; `value_error`, root of the mean square of target − value;
    `kl`, summed; `disagreement`, how much reward the parts took from each other: (Σ |part| − |Σ part|) / 2.
    """
    streams, count = record["streams"], max(1, sum(record["tokens"]["action"]))
    sums = {name: total(values) for name, values in streams.items()}
    found: dict[str, Number] = {"reward": sums.get("reward/total", 0.0), "tokens": count}
    if "clipped" in streams:
        found["clipped"] = sums["clipped"] / count
    errors = streams.get("value_error")
    if errors is None and "value" in streams and "return" in streams:
        pairs = zip(streams["return"], streams["value"], strict=True)
        errors = [(r or 0.0) - (v or 0.0) for r, v in pairs]
    if errors is not None:
        found["value_error"] = math.sqrt(total(error * error for error in errors if error) / count)
    if "kl" in streams:
        found["kl"] = sums["kl"]
    if len(parts := part_names(record)) > 1:
        found["disagreement"] = (total(abs(sums[part]) for part in parts) - abs(total(sums[p] for p in parts))) / 2
    return {name: four_digits(value) or 0 for name, value in found.items()}


def part_names(record: Row) -> list[str]:
    """The streams of a record that are parts of the reward."""
    return [name for name in record.get("streams") or {} if name.startswith("reward/") and name != "reward/total"]


def total(values: Iterable[Number | None]) -> float:
    """The sum of the numbers of a stream that are finite; 0 where that is not."""
    try:
        return math.fsum(value for value in values if value is not None and math.isfinite(value))
    except OverflowError:
        return 0.0


def four_digits(value: Number | None) -> Number | None:
    """`value` as the pages show it."""
    return value if value is None else float(f"{value:.4g}") or 0


# ---- what is said of a sample


def _of_episode(record: Row) -> Row:
    group = record.get("group")
    found: Row = {"item": str(record["item"]), "group": group if isinstance(group, int | str) else None}
    return found | figures(record) | {"size": _size(record, record["completion"])}


def _of_item(row: Row) -> Row:
    streams = row.get("streams") or {}
    distances, paid = streams.get("kl"), streams.get("reward/total")
    far = None if distances is None else total(abs(value) for value in distances if value is not None)
    found = {"id": str(row["id"]), "metrics": row["metrics"], "far": far, "size": _size(row, row["output"])}
    return found if paid is None else found | {"reward": total(paid)}


def _size(record: Row, output: str) -> int:
    """About how many bytes of a page a sample takes: a zero two, another number seven, a token fourteen, and so an
    alternative with its log-prob."""
    tokens = (record.get("tokens") or {"action": []})["action"]
    prompt = len(record.get("prompt") or "")
    if 1 not in tokens:
        return len(output) + prompt
    shown, streams = len(tokens) - tokens.index(1), (record.get("streams") or {}).values()
    zeros = sum(values.count(0) for values in streams) - tokens.index(1) * len(streams)
    others = sum(map(len, (record.get("alternatives") or {"id": []})["id"]))
    return int(2 * zeros + 7 * (shown * len(streams) - zeros) + 14 * (shown + others) + prompt)


@dataclass(frozen=True)
class _Kind:
    read: Callable[[Path], tuple[list[Row], bool]]
    about: Callable[[Row], Row]
    texts: tuple[str, ...]
    """Fields that can be searched."""


_KINDS = {
    "episodes": _Kind(read_episodes, _of_episode, ("item", "prompt", "answer", "completion")),
    "evaluations": _Kind(read_items, _of_item, ("id", "prompt", "answer", "output")),
}


def _kind(path: Path) -> _Kind:
    return _KINDS[path.parent.name]


# ---- the files


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


class _Row(TypedDict, total=False):
    size: Required[_Count]
    item: str
    group: int | str | None
    reward: _Finite
    tokens: _Finite
    clipped: _Finite
    value_error: _Finite
    kl: _Finite
    disagreement: _Finite
    id: str
    metrics: dict[str, _Finite | None]
    far: _Finite | None


class _Kept(TypedDict):
    format: Literal[2]
    bytes: _Count
    tail: _Count
    ends: list[_Count]
    rows: list[_Row]


_KEPT: Any = TypeAdapter(_Kept)


def _place(path: Path) -> Path:
    return path.parents[1] / "index" / path.parent.name / f"{path.stem}.json"


def _kept(place: Path) -> Row | None:
    """What lies there, if it is an index: the folder may be anybody's."""
    try:
        found: Row = _KEPT.validate_python(json.loads(read_bytes(place) or b"null"), strict=True)
    except (ValueError, RecursionError, RunFolderError, ValidationError):
        return None
    needed = {"episodes": ("item", "reward", "tokens"), "evaluations": ("id", "metrics")}[place.parent.name]
    ends, rows = found["ends"], found["rows"]
    in_file = ends == sorted(ends) and (not ends or ends[-1] <= found["bytes"])
    sound = in_file and len(ends) == len(rows) and all(name in row for row in rows for name in needed)
    return found if sound else None


def _keep(path: Path, rows: Sequence[Mapping[str, Any]], ends: Sequence[int]) -> Index:
    index = Index(ends, [_kind(path).about(dict(row)) for row in rows])
    size, tail = _mark(path)
    kept = {"format": FORMAT, "bytes": size, "tail": tail, "ends": index.ends, "rows": index.rows}
    with suppress(RunFolderError):  # a folder that cannot be written is read all the same
        if rows:
            write_whole(_place(path), encode(kept), "the index of the samples")
    return index


def _mark(path: Path) -> tuple[int, int]:
    """Size and a checksum of the end of a file."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL))
            return size, zlib.crc32(file.read())
    except OSError:
        return 0, 0
