"""The runs of a comparison: made once, seed by seed, and gone on with where a job before ended."""

import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pertoken.compare.curves import read_curve
from pertoken.compare.figures import Measured
from pertoken.compare.settings import Arm, Plan
from pertoken.compare.sheets import write_sheets
from pertoken.compare.tables import Report, write_report
from pertoken.config import RunConfig
from pertoken.errors import ConfigError, TaskError, WorkerError
from pertoken.jobs.many import Ended, Job
from pertoken.tracking.files import read_bytes, write_whole, writing
from pertoken.tracking.lock import RunLock
from pertoken.tracking.runs import standing

WAIT = 0.5
"""Seconds between two looks at a process of TRL's."""


@dataclass(frozen=True)
class Outcome:
    """What a comparison has come to so far."""

    report: Report
    files: tuple[Path, ...]
    """Tables, curves and sheets."""
    ended: Ended
    """Why it is not complete."""


def compare(
    plan: Plan,
    *,
    on_note: Callable[[str], None] = lambda note: None,
    interrupted: Callable[[], bool] = lambda: False,
    max_seconds: float = math.inf,
) -> Outcome:
    """Make the runs of `plan` that have not finished yet, and write down how all that have compare.

    `interrupted` and `max_seconds` end it as they end a run: the run is saved, and the same call goes on with it.
    Raises ConfigError if a run there is of another configuration.
    """
    with writing("the comparison", plan.folder):
        plan.folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(plan.folder)
    try:
        _refuse_others(plan)
        job = Job(on_note, interrupted, max_seconds)
        skipped = _make(plan, job)
        curves = {
            name: [read_curve(run.run_folder, run.seed, plan.split) for run in arm.runs if _finished(run)]
            for name, arm in plan.arms.items()
        }
        missing = [
            f"{name}, seed {run.seed}: not finished"
            for name, arm in plan.arms.items()
            for run in arm.runs
            if name not in skipped and not _finished(run)
        ]
        measured = Measured(plan, {name: found for name, found in curves.items() if found})
        notes = [*skipped.values(), *missing]
        if not measured.curves:
            return Outcome(Report("no run has finished yet", (), (), (), tuple(notes)), (), job.ended())
        sheets, about_sheets = write_sheets(plan, measured.curves)
        report = Report.of(measured, [*notes, *about_sheets])
        return Outcome(report, (*write_report(report, measured, sheets), *sheets), job.ended() if missing else "")
    finally:
        lock.release()


def _make(plan: Plan, job: Job) -> dict[str, str]:
    """Make the runs, all arms of a seed before the next one; arms that are left out, and why."""
    skipped: dict[str, str] = {}
    order = sorted(plan.arms.items(), key=lambda each: each[0] != plan.start)  # others begin with its model
    for place in range(plan.settings.seeds):
        for name, arm in order:
            if name in skipped or place >= len(arm.runs):
                continue
            run = arm.runs[place]
            if _finished(run):
                continue
            if arm.trl is not None and importlib.util.find_spec("trl") is None:
                skipped[name] = f"arm {name} is left out: trl is not installed (pip install 'pertoken[trl]')"
                job.on_note(skipped[name])
                continue
            if job.ended():
                return skipped
            job.on_note(f"arm {name}, seed {run.seed}: {run.run_folder}")
            try:
                made = job.train(run) if arm.trl is None else _train_by_trl(arm, run, job)
            except (ConfigError, TaskError) as error:  # what is to be set is to be set there
                raise type(error)(f"compare.arms.{name}: {error}") from error
            if not made:
                return skipped
            if not arm.trains:  # what it has saved is the model that it began with
                shutil.rmtree(run.run_folder / "model", ignore_errors=True)
            last = read_curve(run.run_folder, run.seed, plan.split).last
            value = last.row["metrics"].get(plan.metrics[0])
            told = "" if value is None else f"{plan.metrics[0]} {value:.4g} "
            job.on_note(
                f"arm {name}, seed {run.seed}: {told}after {last.tokens:,.0f} generated tokens, {last.seconds:,.0f} s"
            )
    return skipped


def _finished(run: RunConfig) -> bool:
    return standing(run.run_folder) == "finished"


def _refuse_others(plan: Plan) -> None:
    """Runs that were begun with other settings are no arms of this comparison."""
    for name, arm in plan.arms.items():
        for run in arm.runs:
            if not standing(run.run_folder):
                continue
            was = read_bytes(run.run_folder / "config.yaml").decode()
            other = was != run.to_yaml() or (arm.trl is not None and read_bytes(_job_file(run)) != _job(arm, run))
            if other:
                raise ConfigError(
                    f"{run.run_folder}: arm {name!r} was begun with another configuration than it has now (see "
                    "config.yaml there). Give the comparison another name or folder, or remove the runs of this arm, "
                    "and of those that begin with it."
                )


# --- TRL ----------------------------------------------------------------------------------------------------


def _job_file(run: RunConfig) -> Path:
    return run.run_folder.with_name(f"{run.run_folder.name}.json")


def _job(arm: Arm, run: RunConfig) -> bytes:
    return json.dumps({"run": run.model_dump(mode="json"), "trl": arm.trl}, indent=1).encode()


def _train_by_trl(arm: Arm, run: RunConfig, job: Job) -> bool:
    """Train a run by TRL in a process of its own; whether it has finished. Raises WorkerError if it fails."""
    write_whole(_job_file(run), _job(arm, run), "the job for TRL")
    said = run.run_folder.with_name(f"{run.run_folder.name}.log")
    with open(said, "ab") as log, _process(_job_file(run), log) as process:
        asked = False
        while process.poll() is None:
            if not asked and job.ended():
                asked = True
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(WAIT)
            except subprocess.TimeoutExpired:
                continue
    if process.returncode and not asked:  # one that was asked before it could hear has begun nothing
        lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise WorkerError(
            f"arm {arm.name}, seed {run.seed}: TRL ended with code {process.returncode}: {last[:300]} (all of it: "
            f"{said}). Leave the arm out, or set what it wants in compare.arms.{arm.name}.trl"
        )
    return _finished(run)


@contextmanager
def _process(job_file: Path, log: object) -> "Iterator[subprocess.Popen[bytes]]":
    """TRL's process, which does not outlive this block."""
    command = [sys.executable, "-m", "pertoken.compare.trl_arm", str(job_file)]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
