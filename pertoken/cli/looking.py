"""Commands that look at what a run has left: its report, its samples, and further questions to its models."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pertoken.cli.arguments import RunFolder
from pertoken.cli.printing import out, print_wide
from pertoken.errors import ConfigError

app = typer.Typer(rich_markup_mode=None)
credit_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


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
    gradients: Annotated[
        str | None,
        typer.Option(metavar="policy|reward", help="Which tokens a log-prob, or a learned reward, is seen in."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="With --swap: texts sampled on from there.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
) -> None:
    """Ask the model of a run about a sample: what else could stand at a token, what if it had been another one."""
    from pertoken.inquiry.asking import Answers
    from pertoken.inquiry.told import told

    if swap is not None and token is None:
        raise ConfigError(f"--swap {swap!r}: in the place of which token? Add --token")
    parts = told(
        Answers(folder), sample, token=token, swap=swap, model=model, against=against, causes=causes,
        gradients=gradients, samples=samples, seed=seed,
    )  # fmt: skip
    for part in parts:
        if isinstance(part, str):
            out.print(part, markup=False)
        else:
            print_wide(part)


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
    from pertoken.display import harmless
    from pertoken.tracking import RunReader
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
    print_wide(table)
    if step is None and (comparison := compare(reader.evaluations())):
        names = "  ".join(map(str, comparison.after["items"]["id"]))
        out.print(Text(f"\nheld-out items, for --item: {harmless(names)}"))


def _print_shown(shown: Any, numbers: bool) -> None:
    """The texts of a sample in colour, or all their numbers as tables."""
    from pertoken.display import harmless

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
    from pertoken.inquiry.credit_compare import compare_credit

    found = compare_credit(folder, step=step, only=only or (), model=model, budget=budget)
    if as_json:
        out.print(json.dumps(found.as_json(), indent=2), markup=False)
        return
    for part in found.told():
        if isinstance(part, str):
            out.print(part, markup=False)
        else:
            print_wide(part.terminal())
