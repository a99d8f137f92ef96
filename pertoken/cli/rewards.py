"""`pertoken reward`: rewards before one trains with them, and learned ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text

from pertoken.cli.arguments import Settings, files_and_overrides
from pertoken.cli.printing import out, table_of
from pertoken.config import load_config, overrides_of

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@app.command(name="check")
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
    from pertoken import assembly
    from pertoken.display import harmless
    from pertoken.reward_check import ITEMS, check_reward
    from pertoken.testing import byte_tokenizer
    from pertoken.tracking.coloured import ColouredText
    from pertoken.types import Item

    one = json.dumps([{"fn" if ":" in name else "name": name}])
    overrides = [f"rewards={one}", *(f"rewards.0.{parameter}" for parameter in parameters or ())]
    if time_limit is not None:
        overrides += ["rewards.0.processes=1", f"rewards.0.time_limit={time_limit}"]
    config = load_config([recipe] if recipe else [], overrides)
    (part,) = assembly.build_rewards(config.rewards)
    tokenizer: Any = byte_tokenizer()
    items: Sequence[Item] = ITEMS
    if recipe is not None:
        tokenizer = assembly.build_policy(config).tokenizer
        items = assembly.build_task(config.task).items("train")[:4]
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


@app.command(name="train")
def train_reward(
    config_files: Settings,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved configuration and stop.")] = False,
) -> None:
    """Train a reward from preferences, labelled spans, labelled steps, or labelled pairs of texts."""
    from pertoken.reward_models import load_training
    from pertoken.reward_models import train as run_training
    from pertoken.reward_models.evaluation import table

    config = load_training(*files_and_overrides(config_files))
    if dry_run:
        out.print(config.to_yaml(), markup=False, end="")
        return
    result = run_training(config, on_note=lambda text: out.print(text, markup=False))
    out.print(table_of(["", f"{result.split} examples"], table(result.figures)))
    out.print(f"\nmodel: {result.folder}", markup=False)


@app.command(name="evaluate")
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
    out.print(table_of(["", f"{found.split} of {found.data}"], found.rows()))
    place = to or folder / "evaluation.json"
    found.write(place)
    out.print(f"\nfigures: {place}", markup=False)
