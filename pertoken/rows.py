"""From a file to its rows: JSON lines, JSON, CSV, TSV or Parquet, each row with its line.

A row that cannot be read is handed on as the reason why.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from pertoken.errors import MissingExtraError, TaskError

MAX_ROW_BYTES = 8_000_000
"""A longer row is a broken file (a missing quote or line break), not a problem to put to a model."""

MAX_ARRAY_BYTES = 1_000_000_000
"""A JSON array is read whole, and takes some ten times its size; what is larger than this should be JSON lines."""

Row = Mapping[str, Any]
Numbered = tuple[int, Row | str]
"""Line (where there are no lines: number of the row), from 1, and the row, or why it cannot be read."""


def rows_of(file: Path) -> Iterator[Numbered]:
    """The rows of a file of a kind in `READERS`; what makes the whole of it unreadable is a TaskError."""
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
    if file.stat().st_size > MAX_ARRAY_BYTES:
        with file.open("rb") as beginning:
            is_array = beginning.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
        if is_array:
            raise TaskError(
                f"{file}: a JSON array of more than {MAX_ARRAY_BYTES / 1e9:.0f} GB, which cannot be read row by row: "
                "write it as JSON lines (one object per line)"
            )
        yield from _json_lines(file)
        return
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
            records = _records(_Lines(lines), delimiter)
            _, header = next(records, (1, "there is none"))
            if isinstance(header, str):
                raise TaskError(f"{file}: the header cannot be read: {header}")
            if odd := [name for name in header if not _writable(name)]:
                raise TaskError(f"{file}: the header names a column that is no UTF-8 text: {odd[0][:40]!a}")
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


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Lines:
    """The lines of a file for the csv module, none of them read beyond what a row may have."""

    def __init__(self, file: Any) -> None:
        """file: opened for text."""
        self._file = file
        self.count = 0
        """Lines read so far."""
        self.size = 0
        """Characters of the record that is being read: cells may hold line breaks."""

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line: str = self._file.readline(MAX_ROW_BYTES + 1)
        if not line:
            raise StopIteration
        self.count += 1
        self.size += len(line)
        if self.size > MAX_ROW_BYTES:
            while line and not line.endswith(("\n", "\r")):
                line = self._file.readline(MAX_ROW_BYTES)
            raise csv.Error(f"larger than {MAX_ROW_BYTES / 1e6:.0f} MB")
        return line


def _records(lines: _Lines, delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    """Each record, or what is wrong with it, and the line that it begins in."""
    limit = csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        while True:
            line, lines.size = lines.count + 1, 0
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
    except (
        pa.ArrowException,
        ValueError,
        OverflowError,
    ) as error:  # broken pages, text that is no UTF-8, days of no calendar
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
