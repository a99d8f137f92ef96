"""What the rows of a run folder hold, seen to when they are read: a folder may be anybody's.

The fields are those of docs/run-folder.md. What a row has beside them is welcome: it may be of a later version.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from pertoken.errors import RunFolderError
from pertoken.tracking.files import Row, read_row, read_rows

_Number = Annotated[float, Field(allow_inf_nan=False)] | None
_Adapter = Any
"""`TypeAdapter[...]`, which the shape checker of the tests does not know."""
_Step = Annotated[int, Field(ge=0, lt=10**9)]


class _Finding(TypedDict, total=False):
    part: Required[str]
    start: Required[Annotated[int, Field(ge=0)]]
    stop: Required[Annotated[int, Field(ge=0)]]
    value: Required[Annotated[float, Field(allow_inf_nan=False)]]
    message: Required[str]


class _Tokens(TypedDict):
    id: list[int]
    piece: list[str]
    action: list[int]


class _Alternatives(TypedDict):
    rank: list[Annotated[int, Field(ge=0)]]
    id: list[list[int]]
    logprob: list[list[Annotated[float, Field(allow_inf_nan=False)]]]
    piece: dict[str, str]


class _Text(TypedDict, total=False):
    prompt: str | None
    answer: str | None
    tokens: _Tokens | None
    streams: dict[str, list[_Number]] | None
    findings: list[_Finding]
    alternatives: _Alternatives


class _Episode(_Text, total=False):
    item: Required[str | int]
    completion: Required[str]
    stop: Required[str]
    group: str | int | None
    tokens: Required[_Tokens]  # type: ignore[misc]
    streams: Required[dict[str, list[_Number]]]  # type: ignore[misc]


class _Item(_Text, total=False):
    id: Required[str | int]
    output: Required[str]
    metrics: Required[dict[str, _Number]]


class _Evaluation(TypedDict, total=False):
    step: Required[_Step]
    split: Required[Annotated[str, Field(pattern=r"^[\w-]+$")]]  # it becomes part of a file name
    metrics: Required[dict[str, _Number]]
    main: str | None
    intervals: dict[str, Annotated[list[_Number], Field(min_length=2, max_length=2)]] | None
    differences: dict[str, Annotated[list[_Number], Field(min_length=3, max_length=3)]] | None
    baselines: dict[str, dict[str, _Number]] | None
    items: Required[dict[str, list[str | _Number]]]


class _Run(TypedDict, total=False):
    format_version: Required[int]
    status: Required[str]
    reason: str | None
    about: dict[str, str | int | float]
    resumed: list[dict[str, Any]]
    versions: dict[str, str]


_METRICS, _EPISODES = TypeAdapter(list[dict[str, _Number]]), TypeAdapter(list[_Episode])
_ITEMS, _EVALUATIONS, _RUN = TypeAdapter(list[_Item]), TypeAdapter(list[_Evaluation]), TypeAdapter(_Run)


def read_metrics(path: Path) -> tuple[list[Row], bool]:
    """The rows of `metrics.jsonl`, and whether a torn last line was left out."""
    rows, torn = _read(path, _METRICS)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("step"), int):
            raise _damaged(path, number, f"step: expected a number, got {row.get('step')!r}")
    return rows, torn


def read_evaluations(path: Path) -> tuple[list[Row], bool]:
    """The rows of `evaluations.jsonl`, and whether a torn last line was left out."""
    rows, torn = _read(path, _EVALUATIONS)
    for number, row in enumerate(rows, 1):
        columns = row["items"]
        if "id" not in columns or len({len(column) for column in columns.values()}) > 1:
            raise _damaged(path, number, "items: expected columns of one length, `id` among them")
        for name, column in columns.items():
            if name != "id" and any(isinstance(cell, str) for cell in column):
                raise _damaged(path, number, f"items.{name}: expected numbers")
    return rows, torn


def read_episodes(path: Path) -> tuple[list[Row], bool]:
    """The rows of a file of `episodes/`, and whether a torn last line was left out."""
    return _sound(path, read_rows(path), _EPISODES)


def read_episode(path: Path, start: int, stop: int) -> Row:
    """The row of a file of `episodes/` that lies between two bytes."""
    return _sound(path, ([read_row(path, start, stop)], False), _EPISODES)[0][0]


def read_items(path: Path) -> tuple[list[Row], bool]:
    """The rows of a file of `evaluations/`, and whether a torn last line was left out."""
    return _sound(path, read_rows(path), _ITEMS)


def read_item(path: Path, start: int, stop: int) -> Row:
    """The row of a file of `evaluations/` that lies between two bytes."""
    return _sound(path, ([read_row(path, start, stop)], False), _ITEMS)[0][0]


def check_run(path: Path, run: object) -> None:
    """Raise RunFolderError if `run` is not what `run.json` holds."""
    _check(path, [run], _RUN)


def _sound(path: Path, found: tuple[list[Row], bool], kind: _Adapter) -> tuple[list[Row], bool]:
    """Rows with texts, as they were read from `path`, seen to."""
    rows, torn = found
    _check(path, rows, kind)
    for number, row in enumerate(rows, 1):
        tokens = row.get("tokens") or {"id": []}
        count = len(tokens["id"])
        others = row.get("alternatives", {})
        beside = [others[name] for name in ("rank", "id", "logprob") if name in others]
        columns = [*tokens.values(), *(row.get("streams") or {}).values(), *beside]
        if any(len(column) != count for column in columns):
            raise _damaged(path, number, f"columns and streams of other lengths than its {count} tokens")
        if any(len(ids) != len(nats) for ids, nats in zip(*beside[1:], strict=True)):
            raise _damaged(path, number, "alternatives: not as many log-probs as tokens")
        if any(found["start"] > found["stop"] or found["stop"] > count for found in row.get("findings", ())):
            raise _damaged(path, number, f"findings: beyond its {count} tokens")
    return rows, torn


def _read(path: Path, kind: _Adapter) -> tuple[list[Row], bool]:
    rows, torn = read_rows(path)
    _check(path, rows, kind)
    return rows, torn


def _check(path: Path, rows: Sequence[object], kind: _Adapter) -> None:
    try:
        kind.validate_python(rows[0] if kind is _RUN else rows, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = [] if kind is _RUN else [int(first["loc"][0]) + 1]
        where = ".".join(map(str, first["loc"][len(place) :]))
        raise _damaged(path, place[0] if place else None, f"{where}: {first['msg']}") from None


def _damaged(path: Path, number: int | None, what: str) -> RunFolderError:
    line = f" line {number}" if number else ""
    return RunFolderError(f"{path}{line}: {what[:300]}; no run writes that: restore the file, or remove it")
