"""Runs as a person keeps them: what lies in a folder of runs, and whether a run folder is sound."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pertoken.errors import RunFolderError
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.files import Row
from pertoken.tracking.lock import is_locked
from pertoken.tracking.records import read_episodes, read_evaluations, read_items, read_metrics
from pertoken.tracking.runlog import evaluation_path, read_run


@dataclass(frozen=True)
class RunSummary:
    """One line of `pertoken runs list`."""

    folder: Path
    status: str
    """As in run.json; `killed` if it says running and no process is writing; `damaged` if it cannot be read."""
    step: int
    steps: int | None
    """Planned steps, if the run has a plan."""
    main: str
    """Name of the held-out metric that the run goes by; empty without evaluations."""
    metric: float | None
    """Its last value."""
    checkpoints: int
    size: int
    """Bytes on disk."""


def find_runs(root: Path) -> list[RunSummary]:
    """The runs below `root`, in the order of their names."""
    return [_summary(folder) for folder in run_folders(root)]


def run_folders(root: Path) -> list[Path]:
    """The run folders below `root` (at any depth, but not inside of runs, nor where a link leads), by name."""
    return sorted(_folders(root))


def status_of(folder: Path, run: Row) -> str:
    """That of run.json; `killed` if it says running and no process is writing."""
    status = str(run.get("status"))
    return "killed" if status == "running" and not is_locked(folder) else status


def verify_run(folder: Path) -> list[str]:
    """What is wrong with a run folder, in sentences; empty if every row and every byte of a checkpoint is sound."""
    read_run(folder)
    problems = [] if (folder / "config.yaml").is_file() else ["config.yaml is missing: the run cannot be resumed"]
    metrics = _rows(read_metrics, folder / "metrics.jsonl", problems)
    steps = [row.get("step") for row in metrics]
    if steps != list(range(1, len(steps) + 1)):
        at = next(k for k, step in enumerate(steps, start=1) if step != k)
        problems.append(f"metrics.jsonl: row {at} is of step {steps[at - 1]}, expected every step from 1 on once")
    for row in _rows(read_evaluations, folder / "evaluations.jsonl", problems):
        path = evaluation_path(folder, row["step"], row["split"])
        if not path.is_file():
            problems.append(f"{path.relative_to(folder)} is missing, but evaluations.jsonl has its row")
    for name, read in {"episodes": read_episodes, "evaluations": read_items}.items():
        for path in sorted((folder / name).glob("*.jsonl")):
            _rows(read, path, problems)
    store = CheckpointStore(folder / "checkpoints")
    problems += [f"checkpoints/{path.name}: {problem}" for path in store.paths() if (problem := store.problem(path))]
    beyond = [checkpoint for checkpoint in store.complete() if checkpoint.step > len(metrics)]
    problems += [
        f"checkpoints/{checkpoint.path.name}: metrics.jsonl ends before it, at step {len(metrics)}"
        for checkpoint in beyond
    ]
    return problems


def standing(folder: Path) -> Literal["", "begun", "finished"]:
    """How far the run in `folder` has come; empty if there is none."""
    if not (folder / "run.json").is_file():
        return ""
    return "finished" if read_run(folder)["status"] == "finished" else "begun"


def _folders(root: Path) -> Iterator[Path]:
    if (root / "run.json").is_file():
        yield root
        return
    if not root.is_dir():
        raise RunFolderError(f"no folder {root}: give the folder that the runs are in")
    for path in root.iterdir():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            yield from _folders(path)


def _summary(folder: Path) -> RunSummary:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        run = read_run(folder)
        metrics = read_metrics(folder / "metrics.jsonl")[0]
        evaluations = read_evaluations(folder / "evaluations.jsonl")[0]
        checkpoints = CheckpointStore(folder / "checkpoints").complete()
    except RunFolderError:  # one of many: `runs verify` says what is wrong with it
        return RunSummary(folder, "damaged", 0, None, "", None, 0, size)
    last = evaluations[-1] if evaluations else {}
    main = str(last.get("main", ""))
    return RunSummary(
        folder,
        status_of(folder, run),
        step=int(metrics[-1]["step"]) if metrics else 0,
        steps=run.get("about", {}).get("steps"),
        main=main,
        metric=last.get("metrics", {}).get(main),
        checkpoints=len(checkpoints),
        size=size,
    )


def _rows(read: Callable[[Path], tuple[list[Row], bool]], path: Path, problems: list[str]) -> list[Row]:
    try:
        rows, torn = read(path)
    except RunFolderError as error:
        problems.append(str(error))
        return []
    if torn:
        problems.append(f"{path.name}: the last line is torn, as a kill leaves it; resuming cuts it off")
    return rows
