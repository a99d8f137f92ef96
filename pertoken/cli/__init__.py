"""The command line. A module for each thing that a person does: `training`, `using` a model, `examining` and `looking`
at runs, `settings`, `runs`, `rewards`; `arguments` is what they are told, `printing` how they answer."""

import io
import os
import sys

# Bars and warnings of the libraries below would tear our own lines; they read these when imported.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.markup import escape

from pertoken.cli import examining, looking, rewards, runs, settings, training, using
from pertoken.errors import PertokenError

app = typer.Typer(
    name="pertoken",
    help="Reinforcement learning of language models, one token at a time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (training, using, examining, looking, settings):
    app.add_typer(part.app)
app.add_typer(runs.app, name="runs", help="List, verify, prune and resume runs.")
app.add_typer(
    rewards.app, name="reward", help="Look at a reward before training with it; train and measure learned ones."
)
app.add_typer(looking.credit_app, name="credit", help="Compare ways to credit tokens on the samples of a run.")


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
