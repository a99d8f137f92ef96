"""Rows from disk or hub: what there is to read under a path, split by split, each row with its line.

A row that cannot be read is handed on as the reason why; what makes a whole file unreadable is a TaskError.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pertoken.errors import MissingExtraError, TaskError, closest
from pertoken.tasks.base import SPLITS, Split

MAX_ROW_BYTES = 8_000_000
"""A longer row is a broken file (a missing quote or line break), not a problem to put to a model."""

SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""Names of files, or of splits of a Hugging Face dataset, that stand for each split."""

Row = Mapping[str, Any]
Numbered = tuple[int, Row | str]
"""Line (where there are no lines: number of the row), from 1, and the row, or why it cannot be read."""


# --- from a path to rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The rows of one file, or of one split of a Hugging Face dataset."""

    split: Split | None
    file: str
    rows: Iterable[Numbered]


def sources_of(path: str | Path | Mapping[str, str | Path]) -> list[Source]:
    """What there is to read, train first; `split` is None where the data does not say."""
    if isinstance(path, Mapping):
        if unknown := [name for name in path if name not in SPLITS]:
            raise TaskError(f"task.path: no split {unknown[0]!r}: {closest(unknown[0], SPLITS)}")
        return [_file_source(split, Path(path[split]).expanduser()) for split in SPLITS if split in path]
    place = Path(path).expanduser()
    if place.is_file():
        return [_file_source(None, place)]
    if not place.is_dir():
        return _hub_sources(str(path))
    if any((place / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        return _dataset_sources(_dataset("load_from_disk", str(place)), str(path))
    return _folder_sources(place)


def _folder_sources(folder: Path) -> list[Source]:
    """train.jsonl, validation.csv, test-00000-of-00002.parquet ...; or the one data file that there is."""
    inside = [*folder.iterdir(), *(folder / "data").glob("*")]  # `data` is where the hub keeps them
    files = sorted(file for file in inside if file.suffix in READERS and file.is_file())
    named = [(split, file) for split in SPLITS for file in files if _split_named(file.name) == split]
    if named:
        return [_file_source(split, file) for split, file in named]
    if len(files) == 1:
        return [_file_source(None, files[0])]
    found = f"found {', '.join(file.name for file in files)}" if files else f"known: {', '.join(READERS)}"
    raise TaskError(f"{folder}: expected data files named train, validation or test ({found})")


def _split_named(name: str) -> Split | None:
    stem = re.split(r"[-.]", name)[0].lower()
    return next((split for split, names in SPLIT_NAMES.items() if stem in names), None)


def _hub_sources(name: str) -> list[Source]:
    if Path(name).suffix in READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?", name):
        raise TaskError(f"{name}: no such file or folder")
    hub_name, _, part = name.partition(":")
    return _dataset_sources(_dataset("load_dataset", hub_name, part or None), name)


def _dataset_sources(dataset: Any, name: str) -> list[Source]:
    """Of a `datasets.DatasetDict`, or of a single `Dataset`, whose split is not known."""
    if not isinstance(dataset, dict):
        return [Source(None, name, enumerate(dataset, 1))]
    parts = {split: part for part in dataset if (split := _split_named(part))}
    if not parts:
        raise TaskError(f"{name}: expected a split named train, validation or test, got {', '.join(dataset)}")
    return [Source(s, f"{name}[{parts[s]}]", enumerate(dataset[parts[s]], 1)) for s in SPLITS if s in parts]


def _dataset(loader: str, name: str, *arguments: Any) -> Any:
    """What `datasets` loads under a name: of the hub (`owner/name`), or a folder that it saved."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "data", f"{name} is no file here; to read it as a dataset") from error
    try:
        return getattr(datasets, loader)(name, *arguments)
    except Exception as error:  # from a missing name to a broken Arrow file, the library raises about anything
        sentence = " ".join(str(error).split())[:300]
        raise TaskError(f"{name}: no file or folder of rows, and not readable as a dataset: {sentence}") from error


# --- from a file to rows ----------------------------------------------------------------------------------


def _file_source(split: Split | None, file: Path) -> Source:
    if file.suffix not in READERS:
        raise TaskError(f"{file}: cannot read {file.suffix or 'a file without ending'!r}; known: {', '.join(READERS)}")
    return Source(split, str(file), _opened(file))


def _opened(file: Path) -> Iterator[Numbered]:
    """The rows of a file; what makes the whole of it unreadable is a TaskError."""
    try:
        if not file.stat().st_size:
            raise TaskError(f"{file}: the file is empty")
        yield from READERS[file.suffix](file)
    except FileNotFoundError:
        raise TaskError(f"{file}: no such file") from None
    except OSError as error:
        raise TaskError(f"{file}: cannot be read: {error.strerror or error}") from error


def _json_lines(file: Path) -> Iterator[Numbered]:
    with file.open("rb") as lines:
        for number in count(1):
            line = lines.readline(MAX_ROW_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(MAX_ROW_BYTES)
                yield number, f"larger than {MAX_ROW_BYTES / 1e6:.0f} MB"
            elif content := line.removeprefix(b"\xef\xbb\xbf" if number == 1 else b"").strip():
                yield number, _json_object(content)


def _json_object(content: bytes) -> Row | str:
    try:
        row = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return f"not UTF-8: byte 0x{content[error.start]:02x} at {error.start}"
    except (ValueError, RecursionError) as error:
        return "holds a NUL byte" if b"\0" in content else f"not valid JSON: {error}"
    return _an_object(row)


def _an_object(row: Any) -> Row | str:
    return row if isinstance(row, dict) else f"expected an object {{...}}, got {type(row).__name__}"


def _json_array(file: Path) -> Iterator[Numbered]:
    """A list of objects; many a `.json` holds JSON lines, so those are read too."""
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TaskError(f"{file}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        if "Extra data" not in str(error):
            raise TaskError(f"{file}: not valid JSON: {error}") from None
        yield from _json_lines(file)
        return
    if not isinstance(rows, list):
        raise TaskError(f"{file}: expected a list of objects [...], got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield number, _an_object(row)


def _delimited(delimiter: str) -> Callable[[Path], Iterator[Numbered]]:
    def read(file: Path) -> Iterator[Numbered]:
        # Bytes that are no UTF-8 become lone surrogates: the cell that holds them is refused later, not the file.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            records = _records(csv.reader(lines, delimiter=delimiter, strict=True))
            _, header = next(records)
            if isinstance(header, str):
                raise TaskError(f"{file}: the header cannot be read: {header}")
            if twice := [name for name in header if header.count(name) > 1]:
                raise TaskError(f"{file}: the header names the column {twice[0]!r} twice")
            for line, cells in records:
                if isinstance(cells, str):
                    yield line, cells
                elif len(cells) == len(header):
                    yield line, dict(zip(header, cells, strict=True))
                elif cells:  # a blank line has none
                    yield line, f"expected {len(header)} cells as in the header, got {len(cells)}"

    return read


def _records(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """Each record, or what is wrong with it, and the line that it begins in: cells may hold line breaks."""
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    try:
        while True:
            line = reader.line_num + 1
            try:
                yield line, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, f"{error}; is a quote left open?"
    finally:
        csv.field_size_limit(limit)


def _parquet(file: Path) -> Iterator[Numbered]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "data", f"reading {file}") from error
    try:
        batches = pq.ParquetFile(file).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except pa.ArrowInvalid as error:
        raise TaskError(f"{file}: not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".parquet": _parquet,
}
"""How to read each kind of file."""
