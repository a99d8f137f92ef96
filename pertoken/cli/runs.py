"""`pertoken runs`: the run folders below a folder."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pertoken.cli.arguments import MaxTime, RunFolder, seconds
from pertoken.cli.printing import out, print_wide
from pertoken.cli.training import train_run
from pertoken.config import load_config

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(name="list")
def list_runs(root: Annotated[Path, typer.Argument(help="Folder with runs in it.")] = Path("runs")) -> None:
    """List the runs in a folder: how they stand, how far they came, what they take on disk."""
    from pertoken.tracking.runs import find_runs

    table = Table("run", "status", "step", "held-out metric", "checkpoints", "size", box=None, pad_edge=False)
    for run in find_runs(root):
        step = f"{run.step}/{run.steps}" if run.steps else str(run.step)
        metric = "" if run.metric is None else f"{run.main} {run.metric:.4g}"
        cells = (str(run.folder), run.status, step, metric, str(run.checkpoints), f"{run.size / 1e6:,.1f} MB")
        table.add_row(*map(Text, cells))
    print_wide(table)


@app.command()
def verify(folder: RunFolder) -> None:
    """Check every row of the logs and every byte of the checkpoints; exit code 1 if something is wrong."""
    from pertoken.tracking.runs import verify_run

    problems = verify_run(folder)
    for problem in problems:
        out.print(problem, markup=False)
    if problems:
        raise typer.Exit(1)
    out.print(f"{folder}: sound", markup=False)


@app.command()
def prune(
    folder: RunFolder,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest checkpoints to keep.")] = 1,
    keep_best: Annotated[bool, typer.Option(help="Also keep the one with the best held-out metric.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:
    """Remove checkpoints that are not needed to go on, and those that are damaged."""
    from pertoken.tracking.checkpoints import CheckpointStore
    from pertoken.tracking.lock import RunLock
    from pertoken.tracking.runlog import read_run

    read_run(folder)
    lock = RunLock(folder)
    try:
        removed = CheckpointStore(folder / "checkpoints").prune(keep=keep, keep_best=keep_best, dry_run=dry_run)
    finally:
        lock.release()
    for path in removed:
        out.print(f"{'would remove' if dry_run else 'removed'} {path}", markup=False)
    out.print(f"{len(removed)} checkpoints {'would go' if dry_run else 'removed'}")


@app.command()
def resume(
    folder: RunFolder,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides for the rest of the run.")
    ] = None,
    max_time: MaxTime = None,
) -> None:
    """Go on with a run from its newest sound checkpoint; the same as train --resume."""
    train_run(load_config([folder / "config.yaml"], settings or []), folder, seconds(max_time))
