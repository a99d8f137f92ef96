"""Commands that train: a run or a chain of runs, and jobs of many runs."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pertoken.cli.arguments import MaxTime, Settings, config_of, files_and_overrides, is_override, seconds
from pertoken.cli.printing import StepDisplay, out, print_evaluations, print_wide, table_of
from pertoken.config import RunConfig, load_config, load_stages
from pertoken.errors import ConfigError

app = typer.Typer(rich_markup_mode=None)

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""
TIME_IS_UP = 75
"""Exit code when --max-time was over before the run was: the "try again later" of sysexits.h."""


@app.command()
def train(
    settings: Settings = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    max_time: MaxTime = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a policy, or the stages of a chain. Ctrl-C finishes the step, saves, and says how to resume."""
    if resume is not None:
        if settings and any(not is_override(s) for s in settings):
            raise ConfigError("--resume takes its configuration from the run folder; only KEY=VALUE may follow")
        stages = [load_config([resume / "config.yaml"], settings or [])]
    else:
        stages = load_stages(*files_and_overrides(settings))
    if dry_run:
        out.print("---\n".join(stage.to_yaml() for stage in stages), markup=False, end="")
    elif len(stages) > 1:
        _train_stages(stages, seconds(max_time))
    else:
        train_run(stages[0], resume, seconds(max_time))


def _train_stages(stages: Sequence[RunConfig], max_seconds: float) -> None:
    from pertoken.jobs.run import stages_left

    end = time.monotonic() + max_seconds
    left = stages_left(stages)
    for config, resume in left:
        out.print(f"stage {stages.index(config) + 1} of {len(stages)}, {config.name}: {config.method.type}")
        train_run(config, resume, end - time.monotonic())
    if not left:
        out.print(f"all {len(stages)} stages have finished; model: {stages[-1].run_folder / 'model'}")


def train_run(config: RunConfig, resume: Path | None, max_seconds: float) -> None:
    """Train one run, told step by step; an exit code of its own where it was interrupted or out of time."""
    from pertoken.jobs.run import train as run_training

    with _interrupts() as interrupted, StepDisplay(config) as display:
        try:
            result = run_training(
                config,
                resume=resume,
                on_step=display.step,
                on_note=display.note,
                interrupted=interrupted,
                max_seconds=max_seconds,
            )
        except KeyboardInterrupt:
            Console(stderr=True).print("[yellow]stopped at once; what was written before stays[/]")
            raise typer.Exit(INTERRUPTED) from None
    out.print(f"\n{result.reason}; run folder: {result.folder}")
    if result.comparison is not None:
        print_evaluations(result.comparison.before, result.comparison, ("before", "after"))
    if result.interrupted:
        out.print(f"resume with: pertoken train --resume {result.folder}")
        raise typer.Exit(TIME_IS_UP if result.out_of_time else INTERRUPTED)
    out.print(f"model:  {result.folder / 'model'}\nreport: {result.report or 'not written (see above)'}")


@app.command()
def crossval(
    settings: Settings = None,
    folds: Annotated[int, typer.Option(min=2, help="How many parts; each is held out once.")] = 5,
    max_time: MaxTime = None,
) -> None:
    """Train a run for each fold of the data, and tell held-out metrics over all. The same command goes on with it."""
    from pertoken.jobs.crossval import folds_of, over_folds

    runs = folds_of(config_of(settings), folds)
    _train_stages(runs, seconds(max_time))
    table = Table("metric", "before [95%]", "after [95%]", "change [95%]", "by fold", box=None, pad_edge=False)
    for name, found in over_folds([run.run_folder for run in runs]).items():
        cells = (f"{i.mean:.4g} [{i.low:.4g}, {i.high:.4g}]" for i in (found.before, found.after, found.change))
        table.add_row(name, *cells, "  ".join(f"{value:.4g}" for value in found.by_fold))
    print_wide(table)


@app.command()
def search(
    search_file: Annotated[list[str], typer.Argument(metavar="SEARCH.yaml [KEY=VALUE]...", help="What to search.")],
    max_time: MaxTime = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check keys and ranges, print them, and stop.")] = False,
) -> None:
    """Search ranges of the configuration for the best held-out metric. The same command goes on with a search."""
    from pertoken.jobs.search import load_search
    from pertoken.jobs.search import search as run_search

    config = load_search(*files_and_overrides(search_file))
    if dry_run:
        out.print(config.to_yaml(), markup=False, end="")
        return
    found = _as_far_as_it_goes(run_search, config, max_time)
    head, *rows = found.table()
    out.print()
    print_wide(table_of(head, rows))
    for text in found.words():
        out.print(text, markup=False)
    _exit_unless_complete(found.ended)


@app.command()
def compare(
    settings: Settings = None,
    choices: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Choices saved from a blind sheet: who won? Repeatable.")
    ] = None,
    max_time: MaxTime = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the run of each arm and stop.")] = False,
) -> None:
    """Train arms of one recipe over several seeds, and compare them on equal tokens and equal time. The same command
    goes on with it.

    Without a section `compare` the arms are the model as it is, after supervised tuning, and after RL with credit for
    whole texts, with credit by token, and by GRPO of TRL where that is installed.
    """
    from pertoken.compare import compare as run_comparison
    from pertoken.compare import load_comparison
    from pertoken.compare.sheets import read_choices

    plan = load_comparison(*files_and_overrides(settings))
    if dry_run:
        out.print("---\n".join(arm.runs[0].to_yaml() for arm in plan.arms.values()), markup=False, end="")
        return
    if choices:
        for found in read_choices(plan.folder, choices):
            out.print(found.told(), markup=False)
        return
    outcome = _as_far_as_it_goes(run_comparison, plan, max_time)
    for part in outcome.report.tables:
        out.print(f"\n{part.title}", markup=False)
        print_wide(table_of(part.head, part.rows))
    out.print("\n".join(["", *outcome.report.words, *map(str, outcome.files)]), markup=False)
    _exit_unless_complete(outcome.ended)


def _as_far_as_it_goes(job: Callable[..., Any], plan: Any, max_time: str | None) -> Any:
    """A job of many runs, until it is complete, interrupted or out of time."""
    with _interrupts() as interrupted:
        try:
            return job(
                plan,
                on_note=lambda text: out.print(text, markup=False),
                interrupted=interrupted,
                max_seconds=seconds(max_time),
            )
        except KeyboardInterrupt:
            Console(stderr=True).print("[yellow]stopped at once; the same command goes on[/]")
            raise typer.Exit(INTERRUPTED) from None


def _exit_unless_complete(ended: str) -> None:
    """The exit code of a job that has something left to do."""
    if ended:
        raise typer.Exit(TIME_IS_UP if ended == "time is up" else INTERRUPTED)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or SIGTERM asks the loop to end after its step; a second Ctrl-C ends at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        Console(stderr=True).print("\n[yellow]finishing this step, then saving (again: stop at once)[/]")

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
