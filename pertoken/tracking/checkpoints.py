"""The checkpoints of a run: each is complete and unaltered, or is not taken. What is in them, the trainer knows.

    checkpoints/step-000050/manifest.json   format, step, held-out metric; size and SHA-256 of each file beside it
    checkpoints/step-000050/...             the files themselves

A checkpoint is written under another name, brought to the disk, and renamed: a kill or a power cut leaves the
old ones as they were. Removing one is a rename first too, so that nothing half removed looks like a checkpoint.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pertoken.errors import RunFolderError
from pertoken.tracking.files import read_bytes, sync_folder, sync_whole, writing

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SPARE = 1 << 20
"""Bytes that stay free beside a new checkpoint, for the rows of the log."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a sound manifest and files of the right size; `problem` looks at their content too."""

    path: Path
    step: int
    metric: float | None
    """The held-out metric of these weights, turned so that more is better, if they were evaluated."""
    size: int
    """Bytes on disk."""


class CheckpointStore:
    """The checkpoints in one folder, `checkpoints/` of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(
        self, step: int, write: Callable[[Path], None], *, size: int, metric: float | None, keep: int, keep_best: bool
    ) -> Path:
        """The checkpoint of `step`, whose files `write(folder)` writes; then `prune(keep, keep_best)`.

        `size` is about how many bytes they take: a full disk is found before the first of them is written. A
        sound checkpoint of this step is left as it is: the same steps gave the same state.
        """
        target, draft = self.folder / f"step-{step:06d}", self.folder / f".partial-{step:06d}"
        if self.problem(target) is None:  # by a process that was killed before it could prune
            self.prune(keep=keep, keep_best=keep_best)
            return target
        with _saving(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            free = shutil.disk_usage(self.folder).free
            if free < size + SPARE:
                raise OSError(f"it takes {_megabytes(size)}, and only {_megabytes(free)} are free")
            try:
                draft.mkdir()
                write(draft)
                known = metric if metric is not None and math.isfinite(metric) else None
                (draft / MANIFEST).write_bytes(_manifest(draft, step, known))
                sync_whole(draft)
                if target.exists():  # damaged, or it would have been left
                    self._remove(target)
                draft.rename(target)
                sync_folder(self.folder)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        self.prune(keep=keep, keep_best=keep_best)
        return target

    def complete(self) -> list[Checkpoint]:
        """The checkpoints whose manifest is sound and whose files are all there, oldest first."""
        return [found for path in self.paths() if isinstance(found := _look(path), Checkpoint)]

    def paths(self) -> list[Path]:
        """Everything that is named like a checkpoint, sound or not, oldest first."""
        return sorted(self.folder.glob("step-*"), key=lambda path: (_step_of(path), path.name))

    def problem(self, path: Path) -> str | None:
        """What is wrong with the checkpoint, every byte looked at; None if it can be loaded."""
        found = _look(path)
        if isinstance(found, str):
            return found
        for name, entry in _read_manifest(path)["files"].items():
            if _sha256(path / name) != entry["sha256"]:
                return f"{name} was altered: its SHA-256 is not that of the manifest"
        return None

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and a sentence on each newer one that is not."""
        notes: list[str] = []
        for path in reversed(self.paths()):
            problem = self.problem(path)
            found = _look(path)
            if problem is None and isinstance(found, Checkpoint):
                return found, notes
            notes.append(f"checkpoint {path.name} cannot be used: {problem}; an older one is taken")
        return None, notes

    def prune(self, *, keep: int, keep_best: bool, dry_run: bool = False) -> list[Path]:
        """Remove all but the newest `keep` complete checkpoints and, with `keep_best`, the one with the best metric."""
        complete = self.complete()
        kept = {checkpoint.path for checkpoint in complete[-keep:]}
        measured = [checkpoint for checkpoint in complete if checkpoint.metric is not None]
        if keep_best and measured:
            kept.add(max(measured, key=lambda checkpoint: (checkpoint.metric, checkpoint.step)).path)
        removed = [path for path in self.paths() if path not in kept]
        if not dry_run:
            with writing("the list of checkpoints", self.folder):
                for path in removed:
                    self._remove(path)
                self._sweep()
        return removed

    def _remove(self, path: Path) -> None:
        gone = path.with_name(f".removed-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)

    def _sweep(self) -> None:
        """Remove what a killed process left half written or half removed."""
        for pattern in (".partial-*", ".removed-*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path)


@contextmanager
def _saving(target: Path) -> Iterator[None]:
    try:
        yield
    except RunFolderError:  # an OSError that says all this already
        raise
    except OSError as error:
        raise RunFolderError(
            f"cannot write the checkpoint {target}: {error}. Earlier checkpoints and logs are as they were. Free some "
            "space or choose another run folder, then resume."
        ) from error


def _look(path: Path) -> Checkpoint | str:
    """The checkpoint at `path` by its manifest and the sizes of its files, or what is wrong with it."""
    if not (path / MANIFEST).is_file():
        return f"it has no {MANIFEST}: it was not written to its end"
    try:
        manifest = _read_manifest(path)
        step, metric, files = int(manifest["step"]), manifest["metric"], manifest["files"]
        size = sum(int(entry["bytes"]) for entry in files.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST} is damaged"
    if step != _step_of(path):
        return f"its {MANIFEST} is that of step {step}"
    problems = [problem for name, entry in files.items() if (problem := _misfit(path, name, entry["bytes"]))]
    return problems[0] if problems else Checkpoint(path, step, metric, size)


def _misfit(folder: Path, name: str, size: int) -> str | None:
    if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or ":" in name:
        return f"its {MANIFEST} names {name!r}, which is not a file beside it"
    if not (folder / name).is_file():
        return f"{name} is missing"
    found = (folder / name).stat().st_size
    return None if found == size else f"{name} has {found} bytes, expected {size}"


def _manifest(folder: Path, step: int, metric: float | None) -> bytes:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    content = {"format": FORMAT_VERSION, "step": step, "metric": metric, "files": files}
    return json.dumps(content | {"sha256": _digest(content)}, indent=1, allow_nan=False).encode() + b"\n"


def _read_manifest(path: Path) -> dict[str, Any]:
    """The content of a manifest; ValueError if it was altered, RunFolderError if it is of another format."""
    content: dict[str, Any] = json.loads(read_bytes(path / MANIFEST))
    if content.pop("sha256") != _digest(content):
        raise ValueError("the digest of the manifest itself is wrong")
    if content["format"] != FORMAT_VERSION:
        newer = content["format"] > FORMAT_VERSION
        raise RunFolderError(
            f"{path} is a checkpoint of format {content['format']}, this version of pertoken reads {FORMAT_VERSION}: "
            + ("upgrade pertoken" if newer else "resume it with the version that wrote it")
        )
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"step-(\d+)", path.name)
    return int(found[1]) if found else -1


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
