"""Commands for a model that is there: measure it, check it before it is used, let it write."""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from pertoken.cli.arguments import Settings, config_of
from pertoken.cli.printing import coloured, out, print_evaluations, print_wide, shade
from pertoken.errors import ConfigError, RunFolderError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def evaluate(
    settings: Settings = None,
    model: Annotated[str | None, typer.Option(help="Model, or run folder (its trained model).")] = None,
    against: Annotated[str | None, typer.Option(help="Second model: same items, paired intervals.")] = None,
    split: Annotated[str | None, typer.Option(help="validation or test.")] = None,
    items: Annotated[int | None, typer.Option(help="How many held-out items.")] = None,
) -> None:
    """Measure held-out quality of a model on a task, beside the trivial baselines."""
    from pertoken.jobs.run import evaluate as run_evaluation
    from pertoken.tracking.comparison import compare

    overrides = [f"evaluation.split={split}"] if split else []
    overrides += [f"evaluation.items={items}"] if items is not None else []
    config = config_of([*(settings or []), *overrides])
    rows = run_evaluation(config, model=model, against=against)
    print_evaluations(rows[0], compare(rows), (model or config.policy.model, against or ""))


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
    print_wide(table)
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
    from pertoken.display import harmless
    from pertoken.jobs.run import Speaker

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
    config = config_of([*(settings or []), *overrides])
    if segments > 1:
        length = config.rollout.sampling.max_new_tokens
        overrides += [f"rollout.sampling.max_new_tokens={segments * length}"]
        overrides += [f"rollout.sampling.segment={{tokens: {length}, context: {carry}}}"]
        config = config_of([*(settings or []), *overrides])
    speaker = Speaker(config, model=model, chat=not plain, greedy=temperature == 0)
    if several:
        way = ("best", best_of) if best_of else ("beams", beams) if beams else ("sample", n)
        _answer(speaker, way, text, answer, seed=seed, prompts=prompts, to=to, show_all=show_all)
        return
    if by == "advantage":
        for pieces, advantages, total in speaker.group(text, answer, seed=seed):
            out.print(coloured(pieces, advantages), Text(f"\n  reward {total:.3f}\n", style="dim"))
        return
    worst = 5.0  # nats: at and beyond this the colour is at its strongest

    def show(piece: str, logprob: float, entropy: float) -> None:
        value = {"none": 0.0, "logprob": logprob / worst, "entropy": -entropy / worst}[by]
        out.print(Text(harmless(piece), style=shade(value)), end="")

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
    from pertoken.jobs.generation import Generator, generate_all, read_prompts
    from pertoken.tracking.files import append_row, encode

    if to is not None and to.exists():
        raise RunFolderError(f"--to {to}: there is such a file already; name a new one")
    note = Console(stderr=True, highlight=False, soft_wrap=True)
    generator = Generator(speaker, *way)
    shown = way[1] if way[0] == "sample" or show_all else 1
    if prompts is None:
        items: Any = [speaker.item(text, answer)]
        found: Any = generator(items, [text], seed=seed)
    else:
        items, bad = read_prompts(prompts, text, answer=answer, chat=speaker.chats)
        for row in bad:
            note.print(f"skipped {row}", markup=False)
        found = generate_all(generator, items, at_once=speaker.config.rollout.max_rows, seed=seed)
    if to is not None:
        count = 0
        for each in track(found, "answering", total=len(items), console=note, disable=not note.is_terminal):
            for row in each.rows(shown):
                append_row(to, row, "an answer")
                count += 1
        out.print(f"{count} answers to {len(items)} prompts: {to}", markup=False)
        return
    for each in found:
        if prompts is None:
            _show(each, shown, name=way[0])
            continue
        for row in each.rows(shown):
            out.print(encode(row).decode().rstrip("\n"), markup=False)


def _show(answers: Any, count: int, *, name: str) -> None:
    """The first `count` of the answers to a prompt, coloured by their rewards if they have some."""
    from pertoken.display import harmless

    for place, said in enumerate(answers.said[:count]):
        if count > 1:
            out.print(Text(f"{name} {place + 1}", "dim"))
        out.print(coloured(said.pieces, said.rewards) if said.rewards else Text(harmless(said.text)))
    if answers.said[0].reward is not None:
        scores = "  ".join(f"{said.reward:.4g}" for said in answers.said)
        out.print(Text(f"rewards, best first: {scores}", "dim"))
