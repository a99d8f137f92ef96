"""Commands that tell what a run would be made of: its settings, its data, the methods that it can name."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from pertoken.cli.arguments import Settings, config_of
from pertoken.cli.printing import out, print_wide
from pertoken.config import RunConfig, explain
from pertoken.errors import ConfigError, closest

app = typer.Typer(rich_markup_mode=None)


@app.command(name="config")
def show_config(
    settings: Settings = None,
    explain_fields: Annotated[bool, typer.Option("--explain", help="Document each field instead.")] = False,
) -> None:
    """Print the resolved configuration as YAML, or (--explain) what each field means."""
    if not explain_fields:
        out.print(config_of(settings).to_yaml(), markup=False, end="")
        return
    table = Table("field", "type", "default", "meaning", box=None, pad_edge=False)
    for name, kind, default, meaning in explain(RunConfig):
        style = "bold" if kind == "section" else ""
        table.add_row(*(Text(cell, style=style) for cell in (name, kind, default, " ".join(meaning.split()))))
    print_wide(table)


@app.command()
def data(
    settings: Settings = None,
    alike: Annotated[float, typer.Option(help="From this similarity on, two prompts say nearly the same.")] = 0.8,
    shown: Annotated[int, typer.Option(help="So many pairs are shown.")] = 10,
) -> None:
    """Look at a task's data: sizes, lengths, answers, the first item as it is asked, prompts that say nearly the same;
    exit code 1 if any of these is both learnt from and held out."""
    from pertoken.assembly import build_task
    from pertoken.tasks.overview import overview
    from pertoken.tracking.runlog import prompt_text

    task = build_task(config_of(settings).task, augment=False)
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
    if len(found.alike) > shown:
        out.print(f"... and {len(found.alike) - shown:,} more: --shown {len(found.alike)} shows all", markup=False)
    out.print(f"{len(found.alike)} pairs alike, {found.leaks} of them across train and what is held out")
    if found.leaks:
        raise typer.Exit(1)


@app.command()
def algorithms(
    name: Annotated[str | None, typer.Argument(help="One of them; all are listed without it.")] = None,
) -> None:
    """List the published methods that `algorithm: NAME` stands for, or tell of one: formula, settings, differences."""
    from pertoken.config.presets import PRESETS

    if name is None:
        table = Table("algorithm", "method", "paper", box=None, pad_edge=False)
        for key, preset in PRESETS.items():
            table.add_row(key, preset.title, preset.paper)
        print_wide(table)
        return
    if name not in PRESETS:
        raise ConfigError(f"no algorithm {name!r}; {closest(name, PRESETS)}")
    for label, text in PRESETS[name].told().items():
        out.print(Text(label, "bold"), Text(text), sep="\n", end="\n\n")
