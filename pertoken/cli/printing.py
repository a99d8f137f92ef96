"""What commands print: tables, texts in colour, and the steps of a run while it goes on."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pertoken.config import RunConfig

out = Console(highlight=False, soft_wrap=True)


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Plain cells under their heads."""
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_wide(table: RenderableType) -> None:
    """As wide as the terminal, or as a page of a log where there is none."""
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def print_evaluations(row: dict[str, Any], comparison: Any, names: tuple[str, str]) -> None:
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
    print_wide(table)


def coloured(pieces: Sequence[str], values: Sequence[float]) -> Text:
    """A text whose tokens are shaded by their values, the largest of them at full strength."""
    from pertoken.display import harmless

    limit = max((abs(v) for v in values), default=0.0) or 1.0
    text = Text()
    for piece, value in zip(pieces, values, strict=True):
        text.append(harmless(piece), shade(value / limit))
    return text


def shade(value: float) -> Style:
    """Colour-blind-safe diverging background: orange for -1, none at 0, blue for +1."""
    strength = min(1.0, abs(value))
    if strength < 0.02:
        return Style()
    target = (38, 110, 190) if value > 0 else (200, 100, 20)
    red, green, blue = (int(30 + (channel - 30) * strength) for channel in target)
    return Style(bgcolor=f"rgb({red},{green},{blue})", color="white")


class StepDisplay:
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

    def __enter__(self) -> "StepDisplay":
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
