"""Writing and reading the files of a run so that a kill, a full disk or a torn line costs one row at most."""

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pertoken.errors import RunFolderError

Row = dict[str, Any]
Number = int | float

_ADVICE = {
    errno.ENOSPC: "free some space, then resume the run",
    errno.EDQUOT: "free some of your quota, then resume the run",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), then resume the run",
    errno.EROFS: "choose a run folder on a disk that can be written",
    errno.EACCES: "choose a run folder that you may write to, or change its permissions",
    errno.EPERM: "choose a run folder that you may write to, or change its permissions",
    errno.ENOTDIR: "a part of this path is a file: choose another run folder",
    errno.ENAMETOOLONG: "choose a shorter path",
}


@contextmanager
def writing(what: str, path: Path) -> Iterator[None]:
    """Turns an `OSError` of the block into a `RunFolderError` that says what, where, why and what to do."""
    try:
        yield
    except RunFolderError:  # an OSError that says all this already
        raise
    except OSError as error:
        cause = (error.strerror or str(error)).lower()
        advice = _ADVICE.get(error.errno or 0, "check the disk, then resume the run")
        raise RunFolderError(f"cannot write {what} to {path}: {cause}; {advice}. Earlier rows are intact.") from error


def encode(value: object) -> bytes:
    """`value` as one line of strict JSON, newline included; NaN and infinities become null.

    >>> encode({"loss": float("nan"), "text": "é"}).decode()
    '{"loss":null,"text":"é"}\\n'
    """
    try:
        text = _dumps(value)
    except ValueError:  # rare, so only then is every number looked at
        text = _dumps(_finite(value))
    # A lone surrogate (half a character, as a hostile file may hold) has no UTF-8 form.
    return text.encode("utf-8", errors="replace") + b"\n"


def _dumps(value: object) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"), default=str)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case _:
            return value


def append_row(path: Path, row: Mapping[str, Any], what: str) -> None:
    """Adds one row to a JSONL file and waits until the disk has it; after a failure the file is as it was."""
    with writing(what, path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        rest = memoryview(encode(row))
        try:
            while rest:  # an almost full disk takes a part of the line before it refuses
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:  # Ctrl-C included: a half line must not be continued by the next row
            with suppress(OSError):
                file.truncate(end)
            raise
        if not end:
            sync_folder(path.parent)


def write_whole(path: Path, content: bytes, what: str) -> None:
    """Replaces a file in one step: whoever reads it sees the old content or the new, never a part."""
    draft = path.with_name(path.name + ".tmp")
    with writing(what, path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Waits until the disk has the names in `folder`: without this a power cut can undo a rename."""
    if os.name == "nt":  # Windows has no such call, and keeps the order by itself
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_whole(folder: Path) -> None:
    """Waits until the disk has all that is in `folder`, so that a rename can put it in the place of something older."""
    inside = [folder, *folder.rglob("*")]
    for path in inside:
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    for path in inside:
        if path.is_dir():
            sync_folder(path)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]], what: str) -> None:
    """Replaces a JSONL file in one step."""
    write_whole(path, b"".join(encode(row) for row in rows), what)


def read_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a JSONL file, and whether a torn last line was left out.

    A missing file has no rows. Only the last line can be torn by a kill; a bad line before it means that
    something else wrote to the file, which no guess should paper over.
    """
    lines = read_bytes(path).split(b"\n")
    unfinished = lines.pop()  # empty when the file ends with a newline
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            raise RunFolderError(f"{path} line {number} is not a JSON object: remove that line, or restore the file")
        rows.append(row)
    last = _parse(unfinished)
    if last is not None:  # only its newline is missing
        rows.append(last)
    return rows, bool(unfinished) and last is None


def line_ends(content: bytes) -> list[int]:
    """The byte behind each line of a JSONL file, as `read_rows` counts them.

    >>> line_ends(b'{}\\n{"a":1}')
    [3, 10]
    """
    ends, at = [], content.find(b"\n")
    while at >= 0:
        ends.append(at + 1)
        at = content.find(b"\n", at + 1)
    return ends if content.endswith(b"\n") or not content else [*ends, len(content)]


def read_row(path: Path, start: int, stop: int) -> Row:
    """The row of a JSONL file that lies between two bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            row = _parse(file.read(stop - start))
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if row is None:
        raise RunFolderError(f"{path}: no JSON object at byte {start}; it may just have been written anew: try again")
    return row


def read_bytes(path: Path) -> bytes:
    """The content of a file of the run; nothing if it does not exist (yet)."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunFolderError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
