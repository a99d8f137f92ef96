"""Curves and coloured samples as files for a paper or a talk; the data of every picture lies beside it."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from pertoken.errors import MissingExtraError
from pertoken.tracking.charts import Chart, held_out_charts, training_charts
from pertoken.tracking.comparison import compare
from pertoken.tracking.files import Row, write_whole
from pertoken.tracking.reader import RunReader
from pertoken.tracking.show import Shown

PICTURES = ("svg", "pdf", "png")


def export_curves(folder: str | Path, to: str | Path) -> list[Path]:
    """Draws every curve of the report as SVG, PDF and PNG, with its data as CSV; returns the files."""
    reader = RunReader(folder)
    groups = {f"training, {name}": charts for name, charts in training_charts(reader.metrics()).items()}
    evaluations = reader.evaluations()
    if comparison := compare(evaluations):
        groups["held out"] = held_out_charts(evaluations, comparison)
    return [path for name, charts in groups.items() for chart in charts for path in _export(chart, name, Path(to))]


def export_sample(shown: Shown, to: str | Path) -> list[Path]:
    """Writes each text of a sample as HTML, SVG and LaTeX, with its numbers as CSV; returns the files."""
    paths = []
    for text in shown.texts:
        name = _slug(
            f"{shown.title} {text.name}" if len(shown.texts) == 1 else f"{shown.title} {text.title} {text.name}"
        )
        columns: dict[str, list[Any]] = {"token": list(range(1, len(text.pieces) + 1)), "text": list(text.pieces)}
        columns |= {stream: list(values) for stream, values in text.numbers.items()}
        for suffix, content in {
            "html": text.page(),
            "svg": text.svg(),
            "tex": text.latex(),
            "csv": _csv(columns),
        }.items():
            paths.append(_write(Path(to) / f"{name}.{suffix}", content.encode()))
    return paths


def _export(chart: Chart, group: str, to: Path) -> list[Path]:
    traces = json.loads(chart.figure)["data"]
    name = _slug(f"{group} {chart.title}")
    pictures = [_write(to / f"{name}.{kind}", _picture(chart, traces, kind)) for kind in PICTURES]
    return [*pictures, _write(to / f"{name}.csv", _csv(_columns(traces)).encode())]


def _picture(chart: Chart, traces: list[Row], kind: str) -> bytes:
    """The chart drawn by matplotlib; the same data give the same bytes."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "exporting curves") from error
    with mpl.rc_context({"svg.hashsalt": "pertoken", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.5, 2.8), layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, traces)
        axes.set_title(chart.title, loc="left", fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.25)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=8)
        drawn = io.BytesIO()
        undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
        figure.savefig(drawn, format=kind, dpi=200, metadata=undated[kind])
    return drawn.getvalue()


def _draw(axes: Any, traces: list[Row]) -> None:
    """The traces of the report's figure: lines, noise behind them, bands of intervals."""
    below: list[float] = []
    for trace in traces:
        x, line = trace["x"], trace["line"]
        y = [float("nan") if value is None else value for value in trace["y"]]
        if line["width"] == 0:  # the edges of a band; the upper one fills
            if "fill" in trace:
                axes.fill_between(x, below, y, color="#2f7fc1", alpha=0.18, linewidth=0)
            below = y
            continue
        axes.plot(
            x,
            y,
            color=line["color"],
            linewidth=line["width"] * 0.75,
            linestyle="--" if line.get("dash") else "-",
            marker="o" if "markers" in trace["mode"] else "",
            markersize=3,
            alpha=trace.get("opacity", 1.0),
            label="_" if trace.get("showlegend") is False else trace["name"],
        )


def _columns(traces: list[Row]) -> dict[str, list[Any]]:
    """The step, then a column per trace; where a moving mean was drawn, the noise that it is of has the plain name."""
    steps = sorted({x for trace in traces for x in trace["x"]})
    columns: dict[str, list[Any]] = {"step": steps}
    noisy = {trace.get("legendgroup") for trace in traces if "opacity" in trace}
    for index, trace in enumerate(traces):
        name = trace.get("name") or ("interval_high" if "fill" in trace else "interval_low")
        if trace.get("legendgroup") in noisy and trace.get("legendgroup") and "opacity" not in trace:
            name += " (moving mean)"
        known = dict(zip(trace["x"], trace["y"], strict=True))
        columns[name if name not in columns else f"{name} {index}"] = [known.get(step) for step in steps]
    return columns


def _csv(columns: dict[str, list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def _slug(name: str) -> str:
    """A file name out of words.

    >>> _slug("math.hypot#96 Before (step 0)")
    'math.hypot-96-before-step-0'
    """
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.")[:100] or "sample"


def _write(path: Path, content: bytes) -> Path:
    write_whole(path, content, "the exported file")
    return path
