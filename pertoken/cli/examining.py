"""Commands that examine a run by some steps of it: where its time goes, and whether its token maths is right."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from pertoken.cli.arguments import Settings, config_of
from pertoken.cli.printing import out, print_wide
from pertoken.config import RunConfig
from pertoken.errors import RunFolderError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def profile(
    settings: Settings = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to measure, after one to warm up.")] = 3,
    trace: Annotated[Path | None, typer.Option(help="Also record one step, for ui.perfetto.dev.")] = None,
) -> None:
    """Tell where the time and memory of a run go, and what to change; nothing is kept of its training."""
    from pertoken.jobs.profiling import profile as run_profile

    result = run_profile(config_of(settings), steps=steps, trace=trace)
    table = Table("phase", "seconds", "share", box=None, pad_edge=False)
    for name, seconds in result.seconds.items():
        table.add_row(name, f"{seconds:.2f}", f"{seconds / result.total:.0%}")
    table.add_row("whole step", f"{result.total:.2f}", "")
    out.print(table)
    out.print(f"\n{result.tokens:.0f} tokens sampled per step, {result.tokens / result.total:.0f} a second")
    for name, rate in result.rates.items():
        share = f"{rate / result.machine:.0%} of what plain matrix products reach here"
        out.print(f"{name}: {rate:.0f} GFLOP/s, {share} ({result.machine:.0f})")
    peak = "" if result.peak is None else f", taken {result.peak:.1f} GB"
    out.print(f"memory: expected {result.estimated:.1f} GB{peak}")
    for sentence in result.advice:
        out.print(f"- {sentence}")
    if trace is not None:
        out.print(f"trace: {trace}")


@app.command()
def doctor(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="CONFIG.yaml... [KEY=VALUE]... | RUN_FOLDER", help="What to examine; or a run."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Make this check alone; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
) -> None:
    """Check that the token maths is right on your model, tokenizer, task and rewards, before you train.

    Prints a certificate and keeps it with the run; of a run folder it prints the one that is there. Exit code 1 if a
    check failed.
    """
    from pertoken.tracking.certificate import read_certificate

    folder = Path(settings[0]) if settings and len(settings) == 1 else None
    if folder is not None and folder.is_dir():
        found = read_certificate(folder)
        if found is None:
            raise RunFolderError(f"{folder} has no certificate. Make one: pertoken doctor {folder / 'config.yaml'}")
        note = ""
    else:
        found, note = _examine(config_of(settings), only or (), quiet=as_json)
    if as_json:
        out.print(json.dumps(found.as_json(), indent=2, ensure_ascii=False), markup=False)
    else:
        _print_certificate(found, note)
    if not found.passed:
        raise typer.Exit(1)


def _examine(config: RunConfig, only: Sequence[str], *, quiet: bool) -> tuple[Any, str]:
    """The certificate of `config`, kept with its run if it is whole; and where it is kept."""
    from pertoken.doctor import CHECKS, examine

    with Progress(
        BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"), console=out, transient=True,
        disable=quiet or not out.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("loading", total=len(only) or len(CHECKS))
        found = examine(config, only=only, on_line=lambda line: bar.update(task, advance=1, description=line.name))
    if only:
        return found, "not kept: it is a part (--only)"
    return found, _keep(found, config)


def _keep(found: Any, config: RunConfig) -> str:
    from pertoken.tracking.certificate import write_certificate
    from pertoken.tracking.runlog import read_run

    folder = config.run_folder
    if (folder / "run.json").is_file():
        made_with = hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest(), read_run(folder)["versions"]
        if made_with != (found.config_sha256, found.versions):
            return f"not kept: {folder} is a run of another configuration, or of other versions"
    elif folder.is_dir() and any(path.name != "certificate.json" for path in folder.iterdir()):
        return f"not kept: {folder} is no run folder"
    return f"kept: {write_certificate(found, folder)}"


def _print_certificate(found: Any, note: str) -> None:
    """A line for each check; on failure what is wrong and how to mend it."""
    marks = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "skipped": "[dim]skipped[/]"}
    table = Table("", "check", "measured", "at most", "seconds", box=None, pad_edge=False)
    for line in found.lines:
        what = Text(line.name, "bold") + Text(f"  {line.title}", "")
        if line.outcome != "pass":
            what += Text(f"\n{line.words}", "red" if line.outcome == "fail" else "dim")
        if line.remedy:
            what += Text(f"\n{line.remedy}", "yellow")
        measured = "" if line.figure is None else f"{line.figure:.2g} {line.unit}".strip()
        limit = "" if line.tolerance is None else f"{line.tolerance:g}"
        table.add_row(marks[line.outcome], what, measured, limit, f"{line.seconds:.1f}")
    print_wide(table)
    machine, versions = found.machine, ", ".join(f"{name} {number}" for name, number in found.versions.items())
    out.print(f"\n{found.model['name']}, {machine['precision']} on {machine['device']}; {versions}", markup=False)
    out.print(f"{found.kind} certificate of {found.date}, {found.seconds:.1f} s: {found.verdict}", markup=False)
    if note:
        out.print(note, markup=False)
