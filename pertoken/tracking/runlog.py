"""The writer of a run folder: everything that a run leaves behind, in plain files. See `docs/run-folder.md`.

One convention for `step` everywhere: **the number of updates made**. The first row of `metrics.jsonl` is step 1,
`episodes/000001.jsonl` holds the episodes of that update, evaluation 0 is that of the untrained model.
"""

import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pertoken.errors import RunFolderError
from pertoken.tracking.files import (
    Number,
    Row,
    append_row,
    encode,
    read_bytes,
    write_rows,
    write_whole,
    writing,
)
from pertoken.tracking.index import drop_index, write_index
from pertoken.tracking.lock import LOCK, WRITER, RunLock
from pertoken.tracking.records import check_run, read_evaluations, read_metrics
from pertoken.tracking.trackers import Trackers
from pertoken.types import Episode, Message

FORMAT_VERSION = 1

Status = Literal["running", "finished", "interrupted", "failed"]

CERTIFICATE = "certificate.json"

BEFORE_RUN_JSON = {
    LOCK,
    WRITER,
    *(name + end for name in (WRITER, "config.yaml", "run.json", CERTIFICATE) for end in ("", ".tmp")),
}
"""What may be in a folder before its run is: what a run that was killed while it made its folder left there, and the
certificate of a check before training. No reason to refuse the folder."""


class RunLog:
    """The one writer of a run folder: `RunLog.create(...)` for a new run, `RunLog.open(...)` to resume one.

    Every method has written to disk when it returns. What it cannot write it reports as `RunFolderError`, and
    leaves all earlier rows as they were. It holds the folder's `RunLock` until `close()` or the end of the process.
    """

    folder: Path
    notes: tuple[str, ...]
    """What `open` had to repair or drop, in sentences for a person."""
    trackers: Trackers | None = None
    """Who else hears of steps, samples and evaluations, when they are on disk."""

    def __init__(self, folder: Path, run: Row, lock: RunLock, notes: Sequence[str] = ()) -> None:
        self.folder = folder
        self._lock = lock
        self.notes = tuple(notes)
        self._run = run
        metrics = read_metrics(folder / "metrics.jsonl")[0]
        self._last_step = int(metrics[-1]["step"]) if metrics else 0
        self._evaluated = {(row["step"], row["split"]) for row in read_evaluations(folder / "evaluations.jsonl")[0]}
        # The clock goes on from the last row: `time` is time spent running, pauses between sessions left out.
        self._clock_zero = time.monotonic() - (float(metrics[-1]["time"]) if metrics else 0.0)

    @classmethod
    def create(
        cls,
        folder: str | Path,
        *,
        config_text: str,
        seed: int,
        about: Mapping[str, str | int | float] | None = None,
        command: Sequence[str] | None = None,
    ) -> "RunLog":
        """A new run in `folder`, which must be new or empty.

        `about` is the run in a few words for the head of the report: `model`, `task`, `algorithm`, `steps` (planned).
        """
        folder = Path(folder)
        with writing("the run folder", folder):
            folder.mkdir(parents=True, exist_ok=True)
        _refuse_occupied(folder)  # before the lock: a folder of something else gets no file of ours
        lock = RunLock(folder)
        with ExitStack() as on_error:
            on_error.callback(lock.release)
            _refuse_occupied(folder)  # another process may have been first
            run: Row = {
                "format_version": FORMAT_VERSION,
                "status": "running",
                "reason": "",
                "started": now(),
                "finished": None,
                "resumed": [],
                "about": dict(about or {}),
                "seed": seed,
                "command": shlex.join(sys.argv if command is None else command),
                "versions": versions(),
                "platform": platform.platform(),
            }
            write_whole(folder / "config.yaml", config_text.encode(), "the configuration")
            log = cls(folder, run, lock)
            log._save_run()
            on_error.pop_all()
        return log

    @classmethod
    def open(
        cls, folder: str | Path, *, step: int, config_text: str | None = None, lock: RunLock | None = None
    ) -> "RunLog":
        """The run in `folder`, to go on after `step` (the step of the checkpoint that is loaded).

        Without any checkpoint, `step` is -1: then the evaluation of the untrained model is made again too.
        `lock` is the folder's lock if the caller has it already.
        A torn last line is cut off, and all rows and files beyond `step` are dropped: the steps that are about
        to be made again occur once. `config_text`, if given, replaces the stored configuration.
        """
        folder = Path(folder)
        run = read_run(folder)
        lock = lock or RunLock(folder)
        with ExitStack() as on_error:
            on_error.callback(lock.release)
            notes = [*_rewind(folder / "metrics.jsonl", step), *_rewind(folder / "evaluations.jsonl", step)]
            for name in ("episodes", "evaluations"):
                for path in sorted((folder / name).glob("*.jsonl")):
                    if step_of(path) > step:
                        drop_index(path)
                        with writing("the resumed run", path):
                            path.unlink()
            run.setdefault("resumed", []).append(
                {"time": now(), "step": max(step, 0), "versions": versions(), "notes": notes}
            )
            run |= {"status": "running", "reason": "", "finished": None}
            if config_text is not None:
                write_whole(folder / "config.yaml", config_text.encode(), "the configuration")
            log = cls(folder, run, lock, notes)
            log._save_run()
            on_error.pop_all()
        return log

    def step(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Adds the row of update `step` to `metrics.jsonl`; steps must rise."""
        if step <= self._last_step:
            raise ValueError(f"metrics of step {step} after those of step {self._last_step}: each step is logged once")
        elapsed = round(time.monotonic() - self._clock_zero, 3)
        row = {"step": step, "time": elapsed, **{name: _number(value) for name, value in metrics.items()}}
        append_row(self.folder / "metrics.jsonl", row, f"the metrics of step {step}")
        self._last_step = step
        if self.trackers is not None:
            self.trackers.step(step, metrics)

    def episodes(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes `episodes/<step>.jsonl`, one `episode_record` per line."""
        path, rows = episodes_path(self.folder, step), list(records)
        write_rows(path, rows, f"the episodes of step {step}")
        write_index(path, rows)
        if self.trackers is not None:
            self.trackers.episodes(step, rows)

    def evaluation(self, step: int, split: str, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds one evaluation: its row in `evaluations.jsonl`, its items in `evaluations/<step>-<split>.jsonl`.

        `summary` needs `metrics` (name -> number) and may have `main` (name of the metric that the verdict is
        about), `intervals` (name -> [low, high]), `baselines` (baseline -> name -> number) and `differences` (name ->
        [difference to the first evaluation, low, high]; for metrics that are no mean over items), or `shares` (name ->
        what each of `rows` makes of such a metric, whose mean it is then).
        Each of `rows` has `id`, `prompt`, `answer`, `output`, `metrics`, and `tokens` and `streams` as an episode
        has them if each token is to be shown.
        """
        if self.has_evaluation(step, split):
            raise ValueError(f"split {split!r} was already evaluated at step {step}: each evaluation is logged once")
        if "metrics" not in summary:
            raise ValueError(f"the summary of evaluation {step} {split} has no 'metrics', only {sorted(summary)}")
        what = f"the evaluation of step {step}"
        # The items first: a row in evaluations.jsonl promises that they are there.
        path = evaluation_path(self.folder, step, split)
        write_rows(path, rows, what)
        write_index(path, rows)
        append_row(self.folder / "evaluations.jsonl", evaluation_row(step, split, summary, rows), what)
        self._evaluated.add((step, split))
        if self.trackers is not None:
            self.trackers.evaluation(step, split, summary["metrics"])

    def has_evaluation(self, step: int, split: str) -> bool:
        """Whether this evaluation is on disk: a resumed run need not make it again."""
        return (step, split) in self._evaluated

    def finish(self, status: Status, reason: str = "") -> None:
        """Writes down how the run ended; `reason` is one sentence."""
        self._run |= {"status": status, "reason": reason, "finished": now()}
        self._save_run()

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self.trackers is not None:
            self.trackers.finish()
        self._lock.release()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    @property
    def run(self) -> Row:
        """What run.json says."""
        return dict(self._run)

    def _save_run(self) -> None:
        text = json.dumps(self._run, indent=2, ensure_ascii=False, default=str) + "\n"
        write_whole(self.folder / "run.json", text.encode(), "the state of the run")


def episode_record(
    episode: Episode, pieces: Sequence[str], streams: Mapping[str, Sequence[Number]], *, step: int
) -> Row:
    """The public JSON form of an episode, one line of `episodes/<step>.jsonl`.

    `pieces[t]` is the text that token `t` adds, so that the pieces joined are the text that the model saw and wrote.
    Each stream has one number per token, 0 where it does not apply; `tokens.action` says where it does.
    Numbers keep six digits, about what float32 holds.
    """
    for name, column in {"pieces": pieces, **streams}.items():
        if len(column) != len(episode.tokens):
            raise ValueError(f"episode {episode.id}: {name} has {len(column)} entries for {len(episode.tokens)} tokens")
    return {
        "id": episode.id,
        "step": step,
        "item": episode.item.id,
        "group": episode.group,
        "policy_version": list(episode.policy_version),
        "stop": episode.stop,
        "prompt": prompt_text(episode.item.prompt),
        "answer": episode.item.answer,
        "completion": "".join(pieces[episode.prompt_length :]),
        "tokens": token_columns(episode.tokens, pieces, episode.action_mask),
        "streams": {name: six_digits(values) for name, values in streams.items()},
    }


def token_columns(ids: Sequence[int], pieces: Sequence[str], action_mask: Sequence[bool]) -> Row:
    """The tokens of a record, by column: three short lists take a third of the room of one list of objects."""
    return {"id": list(ids), "piece": list(pieces), "action": [int(acts) for acts in action_mask]}


def six_digits(values: Iterable[Number]) -> list[Number]:
    """`values` as JSON should show them: exact zeros, which most cells of a stream are, take one character.

    >>> six_digits([0.0, -0.123456789, 1e-9])
    [0, -0.123457, 1e-09]
    """
    return [float(f"{value:.6g}") if value else 0 for value in values]


def prompt_text(prompt: str | Sequence[Message]) -> str:
    """A prompt as a person reads it: chat turns become paragraphs that name who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _refuse_occupied(folder: Path) -> None:
    if (folder / "run.json").exists():
        raise RunFolderError(f"{folder} already holds a run: resume it, or choose another folder for the new one")
    with writing("the run folder", folder):
        occupied = any(path.name not in BEFORE_RUN_JSON for path in folder.iterdir())
    if occupied:
        raise RunFolderError(f"{folder} holds files that are not of a run: choose a new or an empty folder")


def read_run(folder: Path) -> Row:
    """The content of `run.json`, refused if this version of the package cannot understand the folder."""
    raw = read_bytes(folder / "run.json")
    if not raw:
        raise RunFolderError(
            f"{folder} is not a run folder: it has no run.json. Give the folder that a run was made in"
        )
    try:
        run = json.loads(raw)
        found = int(run["format_version"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise RunFolderError(f"{folder / 'run.json'} is damaged ({error}): restore it from a copy") from error
    if found > FORMAT_VERSION:
        raise RunFolderError(
            f"{folder} has run-folder format {found}, this version of pertoken knows {FORMAT_VERSION}: upgrade pertoken"
        )
    check_run(folder / "run.json", run)
    return dict(run)


def episodes_path(folder: Path, step: int) -> Path:
    """Where the episodes of an update lie."""
    return folder / "episodes" / f"{step:06d}.jsonl"


def evaluation_row(step: int, split: str, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Row:
    """What `evaluations.jsonl` keeps of an evaluation: its summary, and a column for each metric of its items."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"])
    columns = {name: [row["metrics"].get(name) for row in rows] for name in names} | summary.get("shares", {})
    kept = {name: value for name, value in summary.items() if name != "shares"}
    return {"step": step, "split": split, **kept, "items": {"id": [row["id"] for row in rows]} | columns}


def evaluation_path(folder: Path, step: int, split: str) -> Path:
    """Where the items of an evaluation lie."""
    if not re.fullmatch(r"[\w-]+", split):  # it becomes part of a file name
        raise ValueError(f"split name {split!r}: use letters, digits, _ and - only")
    return folder / "evaluations" / f"{step:06d}-{split}.jsonl"


def step_of(path: Path) -> int:
    """The step in the name of an episode or evaluation file; -1 for a file that somebody else put there."""
    found = re.match(r"\d{6,}(?=[-.])", path.name)
    return int(found.group()) if found else -1


def _rewind(path: Path, step: int) -> list[str]:
    """Cuts a JSONL file back to its rows up to `step`; returns what was cut, in words."""
    rows, torn = read_metrics(path) if path.name == "metrics.jsonl" else read_evaluations(path)
    kept = [row for row in rows if row["step"] <= step]
    content = b"".join(encode(row) for row in kept)
    if content != read_bytes(path):
        write_whole(path, content, "the resumed run")
    notes = []
    if torn:
        notes.append(f"{path.name}: the last line was torn and has been cut off")
    if len(kept) < len(rows):
        dropped = [row["step"] for row in rows if row["step"] > step]
        notes.append(
            f"{path.name}: dropped {len(dropped)} rows of steps {min(dropped)} to {max(dropped)}, to be made again"
        )
    return notes


def _number(value: Number) -> Number:
    return value if isinstance(value, int) else float(value)


def versions() -> dict[str, str]:
    """Of python, and of the packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in ("pertoken", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def now() -> str:
    """The time in UTC, as run folders write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
