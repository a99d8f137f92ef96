"""The command line: train, crossval, search, compare, evaluate, validate, generate, profile, doctor, report, show, ask,
studio, export, config, data, algorithms, runs, reward, credit."""

import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

# Bars and warnings of the libraries below would tear our own lines; they read these when imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pertoken.config import RunConfig, explain, load_config, load_stages, overrides_of
from pertoken.errors import ConfigError, PertokenError, RunFolderError, closest

app = typer.Typer(
    name="pertoken",
    help="Reinforcement learning of language models, one token at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True)

runs_app = typer.Typer(name="runs", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(runs_app, help="List, verify, prune and resume runs.")

reward_app = typer.Typer(name="reward", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(reward_app, help="Look at a reward before training with it; train and measure learned ones.")

credit_app = typer.Typer(name="credit", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(credit_app, help="Compare ways to credit tokens on the samples of a run.")

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""
TIME_IS_UP = 75
"""Exit code when --max-time was over before the run was: the "try again later" of sysexits.h."""

Settings = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG.yaml... [KEY=VALUE]...", help="YAML files, then overrides.")
]


MaxTime = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Save and end within this time (90, 45m, 1h30m), to be resumed."),
]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]


def main() -> None:
    """Entry point: named errors become one sentence on stderr and a non-zero exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A log file shows each step when it is made, and what a terminal has no character for ends no run.
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.path.insert(0, os.getcwd())  # so that `fn: my_rewards:brevity` finds my_rewards.py here
    try:
        app()
    except PertokenError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(error.exit_code)


@app.command()
def train(
    settings: Settings = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    max_time: MaxTime = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a policy, or the stages of a chain. Ctrl-C finishes the step, saves, and says how to resume."""
    if resume is not None:
        if settings and any(not _is_override(s) for s in settings):
            raise ConfigError("--resume takes its configuration from the run folder; only KEY=VALUE may follow")
        stages = [load_config([resume / "config.yaml"], settings or [])]
    else:
        stages = load_stages(*_split(settings))
    if dry_run:
        out.print("---\n".join(stage.to_yaml() for stage in stages), markup=False, end="")
    elif len(stages) > 1:
        _train_stages(stages, _seconds(max_time))
    else:
        _train(stages[0], resume, _seconds(max_time))


def _train_stages(stages: Sequence[RunConfig], max_seconds: float) -> None:
    from pertoken.run import stages_left

    end = time.monotonic() + max_seconds
    left = stages_left(stages)
    for config, resume in left:
        out.print(f"stage {stages.index(config) + 1} of {len(stages)}, {config.name}: {config.method.type}")
        _train(config, resume, end - time.monotonic())
    if not left:
        out.print(f"all {len(stages)} stages have finished; model: {stages[-1].run_folder / 'model'}")


def _train(config: RunConfig, resume: Path | None, max_seconds: float) -> None:
    from pertoken.run import train as run_training

    with _interrupts() as interrupted, _StepDisplay(config) as display:
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
        _print_table(result.comparison.before, result.comparison, ("before", "after"))
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
    from pertoken.crossval import folds_of, over_folds

    runs = folds_of(_config(settings), folds)
    _train_stages(runs, _seconds(max_time))
    table = Table("metric", "before [95%]", "after [95%]", "change [95%]", "by fold", box=None, pad_edge=False)
    for name, found in over_folds([run.run_folder for run in runs]).items():
        cells = (f"{i.mean:.4g} [{i.low:.4g}, {i.high:.4g}]" for i in (found.before, found.after, found.change))
        table.add_row(name, *cells, "  ".join(f"{value:.4g}" for value in found.by_fold))
    _print_wide(table)


@app.command()
def search(
    search_file: Annotated[list[str], typer.Argument(metavar="SEARCH.yaml [KEY=VALUE]...", help="What to search.")],
    max_time: MaxTime = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check keys and ranges, print them, and stop.")] = False,
) -> None:
    """Search ranges of the configuration for the best held-out metric. The same command goes on with a search."""
    from pertoken.search import load_search
    from pertoken.search import search as run_search

    config = load_search(*_split(search_file))
    if dry_run:
        out.print(config.to_yaml(), markup=False, end="")
        return
    found = _as_far_as_it_goes(run_search, config, max_time)
    head, *rows = found.table()
    out.print()
    _print_wide(_table(head, rows))
    for text in found.words():
        out.print(text, markup=False)
    _exit_unless_complete(found.ended)


def _as_far_as_it_goes(job: Callable[..., Any], plan: Any, max_time: str | None) -> Any:
    """A job of many runs, until it is complete, interrupted or out of time."""
    with _interrupts() as interrupted:
        try:
            return job(
                plan,
                on_note=lambda text: out.print(text, markup=False),
                interrupted=interrupted,
                max_seconds=_seconds(max_time),
            )
        except KeyboardInterrupt:
            Console(stderr=True).print("[yellow]stopped at once; the same command goes on[/]")
            raise typer.Exit(INTERRUPTED) from None


def _exit_unless_complete(ended: str) -> None:
    """The exit code of a job that has something left to do."""
    if ended:
        raise typer.Exit(TIME_IS_UP if ended == "time is up" else INTERRUPTED)


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

    plan = load_comparison(*_split(settings))
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
        _print_wide(_table(part.head, part.rows))
    out.print("\n".join(["", *outcome.report.words, *map(str, outcome.files)]), markup=False)
    _exit_unless_complete(outcome.ended)


@app.command()
def evaluate(
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Model, or run folder (its trained model).")] = None,
    against: Annotated[str | None, typer.Option(help="Second model: same items, paired intervals.")] = None,
    split: Annotated[str | None, typer.Option(help="validation or test.")] = None,
    items: Annotated[int | None, typer.Option(help="How many held-out items.")] = None,
) -> None:
    """Measure held-out quality of a model on a task, beside the trivial baselines."""
    from pertoken.run import evaluate as run_evaluation
    from pertoken.tracking.comparison import compare

    overrides = [f"evaluation.split={split}"] if split else []
    overrides += [f"evaluation.items={items}"] if items is not None else []
    config = _config([*(settings or []), *overrides])
    rows = run_evaluation(config, model=model, against=against)
    _print_table(rows[0], compare(rows), (model or config.policy.model, against or ""))


@app.command()
def validate(
    model: Annotated[str, typer.Argument(help="Model, or run folder (its trained model).")],
    suite: Annotated[Path, typer.Option(metavar="FILE", help="YAML file with the checks.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Over the suite.")] = None,
    against: Annotated[str | None, typer.Option(help="Earlier model to compare with; default: the suite's.")] = None,
    to: Annotated[Path | None, typer.Option(help="Folder of the report; default: validation/<name of suite>.")] = None,
) -> None:
    """Check a model before it is used: quality, safety, robustness, regression. Exit code 1 if a check failed, 2 if the
    suite cannot be used."""
    from pertoken.validation import load_suite
    from pertoken.validation import validate as run_validation
    from pertoken.validation.outcomes import HEADS

    checks = load_suite([suite], overrides or [])
    note = Console(stderr=True, highlight=False, soft_wrap=True)
    found = run_validation(checks, model, against=against, on_note=lambda text: note.print(text, style="dim"))
    table = Table(*HEADS, box=None, pad_edge=False)
    for one in found.outcomes:
        verdict = Text(one.verdict, "green" if one.passed else "bold red")
        table.add_row(verdict, *map(Text, (one.name, one.figure, one.bound, str(one.samples), str(len(one.failures)))))
    _print_wide(table)
    out.print(f"\n{found.sentence}", markup=False)
    for path in found.write(to or Path("validation") / checks.name):
        out.print(f"{path}", markup=False)
    if not found.passed:
        raise typer.Exit(1)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads standard input.")],
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Model, or run folder (its trained model).")] = None,
    by: Annotated[str, typer.Option(help="Colour tokens by: none, logprob, entropy, advantage.")] = "none",
    answer: Annotated[
        str | None, typer.Option(help="Reference answer, for rewards that want one; with --prompts its column.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Prompt as plain text, not as a chat message.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    n: Annotated[int, typer.Option("--n", min=1, help="So many samples.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="The best of so many samples, by the rewards.")
    ] = None,
    beams: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="The best of so many beams, by the rewards.")
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--show", help="All that there was to choose from, tokens coloured by their rewards.")
    ] = False,
    segments: Annotated[
        int, typer.Option(min=1, metavar="N", help="Go on for up to so many times the longest length.")
    ] = 1,
    carry: Annotated[
        int, typer.Option(min=0, metavar="N", help="Tokens of its own text that a further segment sees.")
    ] = 128,
    prompts: Annotated[
        Path | None, typer.Option(help="File of rows to answer; the prompt is a template, as '{column}'.")
    ] = None,
    to: Annotated[Path | None, typer.Option(help="New JSONL file for the answers; default: print them.")] = None,
    temperature: Annotated[float | None, typer.Option(help="As rollout.sampling.temperature; 0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="As rollout.sampling.top_p.")] = None,
    top_k: Annotated[int | None, typer.Option(help="As rollout.sampling.top_k.")] = None,
    min_p: Annotated[float | None, typer.Option(help="As rollout.sampling.min_p.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="As rollout.sampling.repetition_penalty.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="As rollout.sampling.max_new_tokens.")] = None,
) -> None:
    """Generate text: one sample, token by token as it is drawn; several; the best of many by the rewards; long texts by
    segments; answers to a file of prompts."""
    from pertoken.run import Speaker
    from pertoken.tracking.coloured import harmless

    if by not in ("none", "logprob", "entropy", "advantage"):
        raise ConfigError(f"--by {by}: expected none, logprob, entropy or advantage")
    ways = [f"--{name}" for name, given in (("n", n > 1), ("best-of", best_of), ("beams", beams)) if given]
    several = bool(ways or prompts or to)
    alone = ["--by"] if by != "none" else []
    if len(ways) > 1 or (several and alone):
        raise ConfigError(f"{' and '.join([*ways, *alone])}: one way to generate at a time")
    if show_all and not (best_of or beams):
        raise ConfigError("--show shows what --best-of or --beams has to choose from: add one of them")
    controls = {
        "temperature": temperature or None, "top_p": top_p, "top_k": top_k, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    overrides = [f"rollout.sampling.{name}={value}" for name, value in controls.items() if value is not None]
    text = (sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)).decode(errors="replace")
    config = _config([*(settings or []), *overrides])
    if segments > 1:
        length = config.rollout.sampling.max_new_tokens
        overrides += [f"rollout.sampling.max_new_tokens={segments * length}"]
        overrides += [f"rollout.sampling.segment={{tokens: {length}, context: {carry}}}"]
        config = _config([*(settings or []), *overrides])
    speaker = Speaker(config, model=model, chat=not plain, greedy=temperature == 0)
    if several:
        way = ("best", best_of) if best_of else ("beams", beams) if beams else ("sample", n)
        _answer(speaker, way, text, answer, seed=seed, prompts=prompts, to=to, show_all=show_all)
        return
    if by == "advantage":
        for pieces, advantages, total in speaker.group(text, answer, seed=seed):
            out.print(_coloured(pieces, advantages), Text(f"\n  reward {total:.3f}\n", style="dim"))
        return
    worst = 5.0  # nats: at and beyond this the colour is at its strongest

    def show(piece: str, logprob: float, entropy: float) -> None:
        value = {"none": 0.0, "logprob": logprob / worst, "entropy": -entropy / worst}[by]
        out.print(Text(harmless(piece), style=_shade(value)), end="")

    speaker.stream(text, seed=seed, on_piece=show)
    out.print()


def _answer(
    speaker: Any,
    way: tuple[Any, int],
    text: str,
    answer: str | None,
    *,
    seed: int,
    prompts: Path | None,
    to: Path | None,
    show_all: bool,
) -> None:
    """Several samples or the best of them, for one prompt or for a file of them; onto the screen or into a file."""
    from pertoken.generation import Generator, generate_all, read_prompts
    from pertoken.tracking.coloured import harmless
    from pertoken.tracking.files import append_row, encode

    if to is not None and to.exists():
        raise RunFolderError(f"--to {to}: there is such a file already; name a new one")
    generator = Generator(speaker, *way)
    shown = way[1] if way[0] == "sample" or show_all else 1
    if prompts is None:
        found: Any = generator([speaker.item(text, answer)], [text], seed=seed)
    else:
        items, bad = read_prompts(prompts, text, answer=answer, chat=speaker.chats)
        for row in bad:
            Console(stderr=True, highlight=False, soft_wrap=True).print(f"skipped {row}", markup=False)
        found = generate_all(generator, items, at_once=speaker.config.rollout.max_rows, seed=seed)
    for each in found:
        for row in each.rows(shown) if to is not None or prompts is not None else ():
            if to is None:
                out.print(encode(row).decode().rstrip("\n"), markup=False)
            else:
                append_row(to, row, "an answer")
        if to is not None or prompts is not None:
            continue
        for place, said in enumerate(each.said[:shown]):
            if shown > 1:
                out.print(Text(f"{way[0]} {place + 1}", "dim"))
            out.print(_coloured(said.pieces, said.rewards) if said.rewards else Text(harmless(said.text)))
        if each.said[0].reward is not None:
            scores = "  ".join(f"{said.reward:.4g}" for said in each.said)
            out.print(Text(f"rewards, best first: {scores}", "dim"))


@app.command()
def profile(
    settings: Settings = None,
    steps: Annotated[int, typer.Option(min=1, help="How many steps to measure, after one to warm up.")] = 3,
    trace: Annotated[Path | None, typer.Option(help="Also record one step, for ui.perfetto.dev.")] = None,
) -> None:
    """Tell where the time and memory of a run go, and what to change; nothing is kept of its training."""
    from pertoken.profiling import profile as run_profile

    result = run_profile(_config(settings), steps=steps, trace=trace)
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
        found, note = _examine(_config(settings), only or (), quiet=as_json)
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
    _print_wide(table)
    machine, versions = found.machine, ", ".join(f"{name} {number}" for name, number in found.versions.items())
    out.print(f"\n{found.model['name']}, {machine['precision']} on {machine['device']}; {versions}", markup=False)
    out.print(f"{found.kind} certificate of {found.date}, {found.seconds:.1f} s: {found.verdict}", markup=False)
    if note:
        out.print(note, markup=False)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write report.html, one self-contained page, from what a run folder holds."""
    from pertoken.tracking.report import write_report

    out.print(f"{write_report(folder)}")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    step: Annotated[int | None, typer.Option(help="Step whose episodes were kept.")] = None,
    sample: Annotated[int | None, typer.Option(help="Episode of that step, counted from 0.")] = None,
    item: Annotated[str | None, typer.Option(help="Held-out item, before and after the training.")] = None,
    by: Annotated[str | None, typer.Option(help="Stream that colours the tokens.")] = None,
    difference: Annotated[bool, typer.Option("--difference", help="With --item: colour by after - before.")] = False,
    numbers: Annotated[bool, typer.Option("--numbers", help="All numbers, one token per line.")] = False,
) -> None:
    """Show a sample in colour, token by token; without --sample or --item, list what there is."""
    shown = _chosen(folder, step, sample, item, by, difference)
    if shown is None:
        _print_samples(folder, step)
    else:
        _print_shown(shown, numbers)


@app.command()
def ask(
    folder: RunFolder,
    sample: Annotated[str, typer.Option(metavar="STEP.SAMPLE", help="Sample, as the report names it.")],
    token: Annotated[int | None, typer.Option(min=1, help="Token of it, counted from 1.")] = None,
    swap: Annotated[str | None, typer.Option(metavar="TEXT", help="What if the token had been this?")] = None,
    model: Annotated[str | None, typer.Option(help="before, step-N or trained; default: the newest.")] = None,
    against: Annotated[str | None, typer.Option(help="Model that log-probs are compared with.")] = None,
    causes: Annotated[bool, typer.Option("--causes", help="Which tokens the text owes its reward to.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="With --swap: texts sampled on from there.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Ask the model of a run about a sample: what else could stand at a token, what if it had been another one."""
    from pertoken.asking import Answers
    from pertoken.told import told

    if swap is not None and token is None:
        raise ConfigError(f"--swap {swap!r}: in the place of which token? Add --token")
    parts = told(
        Answers(folder), sample, token=token, swap=swap, model=model, against=against, causes=causes, samples=samples,
        seed=seed,
    )  # fmt: skip
    for part in parts:
        if isinstance(part, str):
            out.print(part, markup=False)
        else:
            _print_wide(part)


@app.command()
def studio(
    folder: Annotated[Path, typer.Argument(help="Folder with runs in it.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address; other machines reach one that is not 127.0.0.1.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8600,
) -> None:
    """Look at runs in the browser while they go on, compare them, and ask their models (extra `studio`)."""
    from pertoken.studio import serve

    serve(folder, host=host, port=port, on_address=lambda url: out.print(f"{url}\nCtrl-C ends it", markup=False))


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    to: Annotated[Path | None, typer.Option(help="Where the files go; default: export/ in the run folder.")] = None,
    step: Annotated[int | None, typer.Option(help="Step whose episodes were kept.")] = None,
    sample: Annotated[int | None, typer.Option(help="Episode of that step, counted from 0.")] = None,
    item: Annotated[str | None, typer.Option(help="Held-out item, before and after the training.")] = None,
    by: Annotated[str | None, typer.Option(help="Stream that colours the tokens.")] = None,
    difference: Annotated[bool, typer.Option("--difference", help="With --item: colour by after - before.")] = False,
) -> None:
    """Write curves (SVG, PDF, PNG) or a coloured sample (HTML, SVG, LaTeX), data beside them."""
    from pertoken.tracking.export import export_curves, export_sample

    shown = _chosen(folder, step, sample, item, by, difference)
    if shown is None and step is not None:
        raise ConfigError(f"--step {step}: which sample of it? Add --sample, or leave both out for the curves")
    target = to or folder / "export"
    paths = export_curves(folder, target) if shown is None else export_sample(shown, target)
    for path in paths:
        out.print(str(path), markup=False)


@app.command(name="config")
def show_config(
    settings: Settings = None,
    explain_fields: Annotated[bool, typer.Option("--explain", help="Document each field instead.")] = False,
) -> None:
    """Print the resolved configuration as YAML, or (--explain) what each field means."""
    if not explain_fields:
        out.print(_config(settings).to_yaml(), markup=False, end="")
        return
    table = Table("field", "type", "default", "meaning", box=None, pad_edge=False)
    for name, kind, default, meaning in explain(RunConfig):
        style = "bold" if kind == "section" else ""
        table.add_row(*(Text(cell, style=style) for cell in (name, kind, default, " ".join(meaning.split()))))
    _print_wide(table)


@app.command()
def data(
    settings: Settings = None,
    alike: Annotated[float, typer.Option(help="From this similarity on, two prompts say nearly the same.")] = 0.8,
    shown: Annotated[int, typer.Option(help="So many pairs are shown.")] = 10,
) -> None:
    """Look at a task's data: sizes, lengths, answers, the first item as it is asked, prompts that say nearly the same;
    exit code 1 if any of these is both learnt from and held out."""
    from pertoken.build import build_task
    from pertoken.tasks.overview import overview
    from pertoken.tracking.runlog import prompt_text

    task = build_task(_config(settings).task, augment=False)
    found = overview(task, least=alike)
    table = Table("split", "items", "characters of prompts: 25%, 50%, 75%, all", "of answers", box=None, pad_edge=False)
    for split, each in found.splits.items():
        lengths = [
            " ".join(f"{size:,.0f}" for size in vars(of).values()) if of else "" for of in (each.prompts, each.answers)
        ]
        table.add_row(split, f"{each.items:,}", *lengths)
    out.print(table)
    for split, each in found.splits.items():
        if each.classes:
            shares = ", ".join(f"{answer!r} {count / each.items:.0%}" for answer, count in each.classes.items())
            out.print(f"{split}: {shares}", markup=False)
    for item in task.items("train")[:1]:
        out.print(f"{item.id} asks {prompt_text(item.prompt)!r}", markup=False)
        out.print(f"and is answered {item.answer!r}", markup=False)
    for pair in found.alike[:shown]:
        where = f"{pair.first.id} ({pair.splits[0]}) and {pair.second.id} ({pair.splits[1]})"
        out.print(f"{pair.similarity:.0%} alike{' (a leak)' if pair.leaks else ''}: {where}", markup=False)
    out.print(f"{len(found.alike)} pairs alike, {found.leaks} of them across train and what is held out")
    if found.leaks:
        raise typer.Exit(1)


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="One of them; all are listed without it.")] = None,
) -> None:
    """List the published methods that `algorithm: NAME` stands for, or tell of one: formula, settings, differences."""
    from pertoken.presets import PRESETS

    if name is None:
        table = Table("algorithm", "method", "paper", box=None, pad_edge=False)
        for key, preset in PRESETS.items():
            table.add_row(key, preset.title, preset.paper)
        _print_wide(table)
        return
    if name not in PRESETS:
        raise ConfigError(f"no algorithm {name!r}; {closest(name, PRESETS)}")
    for label, text in PRESETS[name].told().items():
        out.print(Text(label, "bold"), Text(text), sep="\n", end="\n\n")


@runs_app.command(name="list")
def list_runs(root: Annotated[Path, typer.Argument(help="Folder with runs in it.")] = Path("runs")) -> None:
    """List the runs in a folder: how they stand, how far they came, what they take on disk."""
    from pertoken.tracking.runs import find_runs

    table = Table("run", "status", "step", "held-out metric", "checkpoints", "size", box=None, pad_edge=False)
    for run in find_runs(root):
        step = f"{run.step}/{run.steps}" if run.steps else str(run.step)
        metric = "" if run.metric is None else f"{run.main} {run.metric:.4g}"
        cells = (str(run.folder), run.status, step, metric, str(run.checkpoints), f"{run.size / 1e6:,.1f} MB")
        table.add_row(*map(Text, cells))
    _print_wide(table)


@runs_app.command()
def verify(folder: RunFolder) -> None:
    """Check every row of the logs and every byte of the checkpoints; exit code 1 if something is wrong."""
    from pertoken.tracking.runs import verify_run

    problems = verify_run(folder)
    for problem in problems:
        out.print(problem, markup=False)
    if problems:
        raise typer.Exit(1)
    out.print(f"{folder}: sound", markup=False)


@runs_app.command()
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


@runs_app.command()
def resume(
    folder: RunFolder,
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides for the rest of the run.")
    ] = None,
    max_time: MaxTime = None,
) -> None:
    """Go on with a run from its newest sound checkpoint; the same as train --resume."""
    _train(load_config([folder / "config.yaml"], settings or []), folder, _seconds(max_time))


@credit_app.callback()
def credit() -> None:
    """Compare ways to credit tokens on the samples of a run."""


@credit_app.command(name="compare")
def compare_credit(
    folder: RunFolder,
    step: Annotated[int | None, typer.Option(help="The episodes of this step alone.")] = None,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="This method; repeatable.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model for `attention`; default: the one that the run made.")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="What scoring shortened texts may take, for each method.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
) -> None:
    """Credit the kept episodes of a run in several ways: do they agree, how noisy and how biased is each?"""
    from pertoken.credit_compare import compare_credit

    found = compare_credit(folder, step=step, only=only or (), model=model, budget=budget)
    if as_json:
        out.print(json.dumps(found.as_json(), indent=2), markup=False)
        return
    for part in found.told():
        if isinstance(part, str):
            out.print(part, markup=False)
        else:
            _print_wide(part.terminal())


@reward_app.command(name="check")
def check_reward(
    name: Annotated[str, typer.Argument(help="Name of a reward, or module:function of your own.")],
    parameters: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Parameters of the reward.")
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file whose task and tokenizer are taken; default: made-up texts, bytes."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(min=0.1, help="Try it in a process of its own, ended after so many seconds for one completion."),
    ] = None,
) -> None:
    """Try a reward on texts good and odd: does it keep its contract, what does it cost, whom does it pay?"""
    from pertoken import build
    from pertoken.reward_check import ITEMS, check_reward
    from pertoken.testing import byte_tokenizer
    from pertoken.tracking.coloured import ColouredText, harmless
    from pertoken.types import Item

    one = json.dumps([{"fn" if ":" in name else "name": name}])
    overrides = [f"rewards={one}", *(f"rewards.0.{parameter}" for parameter in parameters or ())]
    if time_limit is not None:
        overrides += ["rewards.0.processes=1", f"rewards.0.time_limit={time_limit}"]
    config = load_config([recipe] if recipe else [], overrides)
    (part,) = build.build_rewards(config.rewards)
    tokenizer: Any = byte_tokenizer()
    items: Sequence[Item] = ITEMS
    if recipe is not None:
        tokenizer = build.build_policy(config).tokenizer
        items = build.build_task(config.task).items("train")[:4]
    found = check_reward(part, tokenizer, items)
    for verdict in found.verdicts:
        word, why = ("[green]kept  [/]", "") if not verdict.broken else ("[bold red]broken[/]", f": {verdict.broken}")
        out.print(f"{word}  {verdict.promise}{escape(why)}")
    if found.milliseconds is not None:
        out.print(f"\n{found.milliseconds:.3g} ms per 1,000 tokens")
    for example in found.examples:
        text = ColouredText(example.pieces, example.values, "reward")
        out.print(Text(f"\n{example.kind}: {sum(example.values):+.4g}", "dim"))
        out.print(text.terminal())
        for finding in example.findings:
            out.print(Text(f"  {finding.value:+.4g} {harmless(finding.message)}", "yellow"))
    if not found.sound:
        raise typer.Exit(1)


@reward_app.command(name="train")
def train_reward(
    config_files: Settings,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a reward from preferences, labelled spans, labelled steps, or labelled pairs of texts."""
    from pertoken.reward_models import load_training
    from pertoken.reward_models import train as run_training
    from pertoken.reward_models.evaluation import table

    files = [s for s in config_files or () if not _is_override(s)]
    config = load_training(files, [s for s in config_files or () if _is_override(s)])
    if dry_run:
        out.print(config.to_yaml(), markup=False, end="")
        return
    result = run_training(config, on_note=lambda text: out.print(text, markup=False))
    _print_figures(table(result.figures), f"{result.split} examples")
    out.print(f"\nmodel: {result.folder}", markup=False)


@reward_app.command(name="evaluate")
def evaluate_reward(
    folder: Annotated[Path, typer.Argument(help="Folder that `pertoken reward train` made.")],
    data: Annotated[str, typer.Argument(help="File, folder or hub name with held-out examples.")],
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields of the objective: columns, type.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="train, validation or test; default: test if there is one.")] = None,
    to: Annotated[
        Path | None, typer.Option(help="Where the figures go as JSON; default: evaluation.json there.")
    ] = None,
) -> None:
    """Measure a learned reward: accuracy with its interval, calibration, length bias, what spans it finds."""
    from pertoken.reward_models import evaluate as run_evaluation

    found = run_evaluation(folder, data, overrides_of(fields or []), split=split)
    for bad in found.bad_rows:
        out.print(f"skipped {bad}", markup=False)
    _print_figures(found.rows(), f"{found.split} of {found.data}")
    place = to or folder / "evaluation.json"
    found.write(place)
    out.print(f"\nfigures: {place}", markup=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print_wide(table: RenderableType) -> None:
    """As wide as the terminal, or as a page of a log where there is none."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _print_figures(rows: Sequence[tuple[str, str]], heading: str) -> None:
    table = Table("", heading, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    out.print(table)


def _seconds(text: str | None) -> float:
    """A duration: seconds, or hours, minutes and seconds with their letters.

    >>> _seconds("90"), _seconds("1h30m"), _seconds("2.5m")
    (90.0, 5400.0, 150.0)
    """
    if text is None:
        return math.inf
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"(?:{number}d)?(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text.strip())
    if not found or not text.strip():
        raise ConfigError(f"--max-time {text!r}: expected seconds, or a time such as 45m, 1h30m or 2d")
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


def _is_override(setting: str) -> bool:
    return "=" in setting and not Path(setting).exists()


def _split(settings: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Files, and overrides."""
    files = [s for s in settings or () if not _is_override(s)]
    return files, [s for s in settings or () if _is_override(s)]


def _config(settings: Sequence[str] | None) -> RunConfig:
    return load_config(*_split(settings))


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


class _StepDisplay:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, config: RunConfig) -> None:
        self._total = config.stop.steps
        self._bar: Progress | None = None
        if out.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(),
                console=out,
            )  # fmt: skip
            self._task = self._bar.add_task("loading", total=self._total)

    def __enter__(self) -> "_StepDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, report: Any, seconds: float) -> None:
        m = report.metrics
        line = f"reward {m['reward/total']:+.4f}" if "reward/total" in m else f"loss {m['loss/policy']:.4f}"
        for name, label in (("kl/sequence", "KL"), ("preference/margin", "margin"), ("preference/accuracy", "right")):
            line += f"  {label} {m[name]:.3f}" if name in m else ""
        line += f"  length {m['completion/length']:.1f}  {m['tokens/per_second']:.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=report.step, description=line)
            return
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and report.step:
            minutes, rest = divmod(int(seconds / report.step * (self._total - report.step)), 60)
            left = f"  {minutes}:{rest:02d} left"
        out.print(f"step {report.step}{of}  {line}{left}")

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(Text(text, style="dim"))
        else:
            out.print(text, markup=False)


def _print_table(row: dict[str, Any], comparison: Any, names: tuple[str, str]) -> None:
    """One evaluation, or two with the difference and its interval, beside the trivial baselines."""
    both = [names[1], "difference [95% interval]"] if comparison else []
    table = Table("metric", names[0], *both, *row["baselines"], box=None, pad_edge=False)
    for name, value in row["metrics"].items():
        cells = [name, f"{value:.4g}"]
        if comparison:
            change = comparison.changes[name]
            interval = "" if change.low is None else f" [{change.low:+.4f}, {change.high:+.4f}]"
            cells += [f"{change.after:.4g}", f"{change.difference:+.4f}{interval}"]
        baselines = (scores.get(name) for scores in row["baselines"].values())
        table.add_row(*cells, *("" if score is None else f"{score:.4g}" for score in baselines))
    out.print()
    _print_wide(table)


def _chosen(
    folder: Path, step: int | None, sample: int | None, item: str | None, by: str | None, difference: bool
) -> Any:
    """The sample that the options name; None if they name none."""
    from pertoken.tracking import show as showing

    if item is not None:
        return showing.item(folder, item, by, difference=difference)
    if sample is None:
        return None
    if step is None:
        raise ConfigError(f"--sample {sample}: of which step? Add --step, or leave both out")
    return showing.sample(folder, step, sample, by)


def _print_samples(folder: Path, step: int | None) -> None:
    """The kept episodes, those of one step or of all, with the figures that they can be sorted by; held-out items."""
    from pertoken.tracking import RunReader
    from pertoken.tracking.coloured import harmless
    from pertoken.tracking.comparison import compare
    from pertoken.tracking.samples import training_groups

    reader = RunReader(folder)
    rows = [row for rows in training_groups(reader).values() for row in rows if step in (None, row["step"])]
    known = ("reward", "tokens", "clipped", "value_error", "disagreement", "kl")
    figures = [name for name in known if any(name in row for row in rows)]
    table = Table("step", "sample", "item", *figures, box=None, pad_edge=False)
    for row in sorted(rows, key=lambda row: int(row["place"])):
        cells = (f"{row[name]:.4g}" if name in row else "" for name in figures)
        table.add_row(str(row["step"]), row["id"].partition(".")[2], Text(harmless(row["title"])), *cells)
    _print_wide(table)
    if step is None and (comparison := compare(reader.evaluations())):
        names = "  ".join(map(str, comparison.after["items"]["id"]))
        out.print(Text(f"\nheld-out items, for --item: {harmless(names)}"))


def _print_shown(shown: Any, numbers: bool) -> None:
    """The texts of a sample in colour, or all their numbers as tables."""
    from pertoken.tracking.coloured import harmless

    out.print(Text(harmless(shown.title), "bold"))
    if shown.answer:
        out.print(Text("reference answer: ", "dim") + Text(harmless(shown.answer)))
    for text, facts, findings in zip(shown.texts, shown.facts, shown.findings, strict=True):
        out.print(Text(f"\n{harmless(text.title)}: {harmless(' · '.join(facts))}", "dim"))
        if not numbers:
            out.print(text.terminal())
            for finding in findings:
                out.print(Text(f"  {harmless(finding)}", "yellow"))
            continue
        table = Table("token", "text", *text.numbers, box=None, pad_edge=False)
        for index, piece in enumerate(text.pieces):
            cells = ("" if column[index] is None else f"{column[index]:.4g}" for column in text.numbers.values())
            table.add_row(str(index + 1), Text(repr(harmless(piece))), *cells)
        Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(table)
    out.print(Text(f"\n{shown.texts[-1].legend}", "dim"))


def _shade(value: float) -> Style:
    """Colour-blind-safe diverging background: orange for -1, none at 0, blue for +1."""
    strength = min(1.0, abs(value))
    if strength < 0.02:
        return Style()
    target = (38, 110, 190) if value > 0 else (200, 100, 20)
    red, green, blue = (int(30 + (channel - 30) * strength) for channel in target)
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="white")


def _coloured(pieces: Sequence[str], values: Sequence[float]) -> Text:
    from pertoken.tracking.coloured import harmless

    limit = max((abs(v) for v in values), default=0.0) or 1.0
    text = Text()
    for piece, value in zip(pieces, values, strict=True):
        text.append(harmless(piece), _shade(value / limit))
    return text


if __name__ == "__main__":
    main()
