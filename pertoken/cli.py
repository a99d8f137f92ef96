"""The command line: train, evaluate, generate, profile, report, show, export, config, runs, reward."""

import io
import json
import math
import os
import re
import signal
import sys
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
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pertoken.config import RunConfig, explain, load_config
from pertoken.errors import ConfigError, PertokenError

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
app.add_typer(reward_app, help="Look at a reward before training with it.")

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
    """Train a policy. Ctrl-C finishes the step, saves, and says how to resume."""
    if resume is not None:
        if settings and any(not _is_override(s) for s in settings):
            raise ConfigError("--resume takes its configuration from the run folder; only KEY=VALUE may follow")
        config = load_config([resume / "config.yaml"], settings or [])
    else:
        config = _config(settings)
    if dry_run:
        out.print(config.to_yaml(), markup=False, end="")
        return
    _train(config, resume, _seconds(max_time))


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
def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model; - reads standard input.")],
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Model, or run folder (its trained model).")] = None,
    by: Annotated[str, typer.Option(help="Colour tokens by: none, logprob, entropy, advantage.")] = "none",
    answer: Annotated[str | None, typer.Option(help="Reference answer, for --by advantage.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Prompt as plain text, not as a chat message.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
) -> None:
    """Generate text, token by token; `rollout.sampling.*` overrides set the sampling controls."""
    from pertoken.run import Speaker
    from pertoken.tracking.coloured import harmless

    if by not in ("none", "logprob", "entropy", "advantage"):
        raise ConfigError(f"--by {by}: expected none, logprob, entropy or advantage")
    text = (sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)).decode(errors="replace")
    speaker = Speaker(_config(settings), model=model, chat=not plain)
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
    for name, kind, default, meaning in explain():
        style = "bold" if kind == "section" else ""
        table.add_row(*(Text(cell, style=style) for cell in (name, kind, default, " ".join(meaning.split()))))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


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
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


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


def _config(settings: Sequence[str] | None) -> RunConfig:
    files = [s for s in settings or () if not _is_override(s)]
    return load_config(files, [s for s in settings or () if _is_override(s)])


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
        line = f"reward {m['reward/total']:+.4f}"
        if "kl/sequence" in m:
            line += f"  KL {m['kl/sequence']:.3f}"
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
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


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
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
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
