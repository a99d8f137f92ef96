"""The runs below a folder, by the names that they have in addresses, and what a table says of each."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.errors import RunFolderError
from pertoken.tracking.comparison import compare
from pertoken.tracking.glossary import HELD_OUT, label
from pertoken.tracking.lock import is_locked
from pertoken.tracking.reader import RunReader
from pertoken.tracking.report import facts_of, title_of, verdict
from pertoken.tracking.runs import run_folders, status_of


@dataclass(frozen=True)
class Line:
    """One run in the table."""

    name: str
    title: str
    status: str
    """As `pertoken runs list` has it."""
    steps: str
    verdict: str
    why: str
    """The sentences of the verdict."""
    metric: str
    """The held-out metric that the run goes by; empty without evaluations."""
    before: float | None
    after: float | None
    tokens: str
    time: str
    started: str


class Listing:
    """The runs below `root`. Names lead to folders that were found there, and to nothing else."""

    def __init__(self, root: Path) -> None:
        run_folders(root)  # no such folder: it says so now
        self.root = root
        self._lines: dict[Path, tuple[str, Line]] = {}

    def folders(self) -> dict[str, Path]:
        """Run folders by name: the path below `root`; of a `root` that is a run itself, its own name."""
        found = run_folders(self.root)
        if found == [self.root]:
            return {self.root.resolve().name: self.root}
        return {folder.relative_to(self.root).as_posix(): folder for folder in found}

    def folder(self, name: str) -> Path:
        """The run of that name. RunFolderError if there is none."""
        found = self.folders().get(name)
        if found is None:
            raise RunFolderError(f"no run {name!r} below {self.root}")
        return found

    def lines(self) -> list[Line]:
        """What the table says of each run; only what has changed since is read again."""
        found = {}
        for name, folder in self.folders().items():
            now = version(folder)["metrics"]
            known = self._lines.get(folder)
            found[folder] = known if known is not None and known[0] == now else (now, _line(name, folder))
        self._lines = found
        return [line for _, line in found.values()]


def version(folder: Path) -> dict[str, str]:
    """What changes whenever there is something new to see, in the figures and in the samples of a run."""
    figures = ("run.json", "metrics.jsonl", "evaluations.jsonl", "certificate.json")
    samples = ("episodes", "evaluations.jsonl")
    return {
        "metrics": _digest([*map(_stamp, (folder / name for name in figures)), is_locked(folder)]),
        "samples": _digest(map(_stamp, (folder / name for name in samples))),
    }


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:16]


def _line(name: str, folder: Path) -> Line:
    try:
        reader = RunReader(folder)
        run, metrics, evaluations = reader.run(), reader.metrics(), reader.evaluations()
        comparison = compare(evaluations)
        judgement, why = verdict(comparison, evaluations, metrics)
        facts = facts_of(run, metrics)
        status = status_of(folder, run)
    except (RunFolderError, KeyError, TypeError, ValueError, AttributeError) as error:  # one of many
        return Line(name, name, "damaged", "", "", str(error), "", None, None, "", "", "")
    change = comparison.changes[comparison.main] if comparison else None
    last = evaluations[-1] if evaluations else {}
    main = comparison.main if comparison else str(last.get("main", ""))
    return Line(
        name,
        title_of(run),
        status,
        facts["Steps"],
        judgement,
        why,
        label(main, HELD_OUT) if main else "",
        change.before if change else (last.get("metrics") or {}).get(main),
        change.after if change else None,
        facts["Tokens"],
        facts["Time"],
        facts["Started"],
    )
