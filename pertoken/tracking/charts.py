"""The curves of a run as plotly figures: small multiples in a few groups, only what the run has logged."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pertoken.tracking.comparison import Comparison
from pertoken.tracking.files import Number, Row, encode
from pertoken.tracking.glossary import HELD_OUT, METRICS, Term, find, label

Column = Sequence[Number | None]

# Middle tones that stand out from white and from near-black, and from each other for colour-blind readers.
PALETTE = ("#2f7fc1", "#d9730d", "#1b9e85", "#b8559d", "#7d6bd0", "#96831a", "#cf4a5c", "#6b7a8f")

MAX_POINTS = 1000
"""More steps than this are drawn as means of several steps, so that a long run's page stays small."""

PLAN: dict[str, dict[str, str]] = {
    "Reward": {
        "Reward": r"reward/total",
        "Parts of the reward": r"reward/(?!total$).*",
        "Beside the reward": r"beside/.*",
        "Weights of the parts": r"weight/.*",
        "Without opinion": r"abstained/.*",
        "Failed": r"errors/.*",
    },
    "Answers in the data": {
        "Their loss": r"answer/nats",
        "Implicit reward": r"preference/(chosen|rejected)",
        "Margin": r"preference/margin",
        "Right order": r"preference/accuracy",
        "Tokens learnt from": r"tokens/learnt",
    },
    "Signs of a gamed reward": {
        "Alarms": r"alarm/.*",
        "Said again": r"completion/repetition",
        "Empty": r"completion/empty_share",
    },
    "Tasks": {
        "Tokens let in": r"curriculum/(prompt|new)_tokens.*",
        "Highest difficulty let in": r"curriculum/hardest.*",
        "Share of the items let in": r"curriculum/items.*",
        "Reward of each task": r"task_reward/.*",
        "Prompts of each task": r"task_share/.*",
        "Change of each task": r"task_change/.*",
        "Completion length of each task": r"task_length/.*",
        "KL of each task": r"task_kl/.*",
        "Tasks against each other": r"balance/.*",
    },
    "How far the policy has moved": {
        "KL to the reference": r"kl/reference",
        "KL per completion": r"kl/sequence",
        "Weight of the KL": r"kl/coefficient",
        "Entropy": r"entropy",
        "Completion length": r"completion/length",
        "Ended by themselves": r"completion/terminated_share",
    },
    "Health of the update": {
        "Clipped tokens": r"(clip/share|importance/clipped_share)",
        "Drift, sampled against scored": r"drift/.*",
        "Gradient norm": r"grad/norm",
        "Clipped gradients": r"grad/clipped_share",
        "Advantages": r"advantage/.*",
        "Critic's error": r"value/error",
        "Critic's explained variance": r"value/explained_variance",
        "Losses": r"loss/.*",
        "Learning rate": r"learning_rate",
        "Skipped updates": r"skipped/.*",
        "Versions behind": r"(replay/)?staleness",
    },
    "Speed": {
        "Tokens per second": r"tokens/per_second",
        "Tokens generated": r"tokens/generated",
        "Seconds per stage": r"time/.*",
        "Memory": r"memory/.*",
        "At once, as memory allows": r"portion/.*",
    },
}
"""Group -> title of a chart -> pattern of the metrics that it shows."""


@dataclass(frozen=True)
class Chart:
    """A figure and the words that go with it."""

    title: str
    note: str
    figure: str
    """Plotly's own JSON."""


def training_charts(metrics: Mapping[str, Column]) -> dict[str, list[Chart]]:
    """The curves by group; what the plan does not know (a plug-in's metrics) comes last, one chart each."""
    left = [name for name in metrics if name not in ("step", "time") and any(v is not None for v in metrics[name])]
    groups: dict[str, list[Chart]] = {}
    for group, charts in PLAN.items():
        for title, pattern in charts.items():
            if names := [name for name in left if re.fullmatch(pattern, name)]:
                groups.setdefault(group, []).append(_training_chart(title, names, metrics))
                left = [name for name in left if name not in names]
    if gauge := _gauge_chart(metrics):
        groups.setdefault("Reward", []).append(gauge)
    if left:
        groups["Other"] = [_training_chart(name, [name], metrics) for name in left]
    return groups


def held_out_charts(evaluations: Sequence[Row], comparison: Comparison) -> list[Chart]:
    """One chart per held-out metric over the run, with interval band and trivial baselines; the main one first."""
    rows = [row for row in evaluations if row["split"] == comparison.split]
    return [_held_out_chart(name, rows, comparison.baselines) for name in comparison.changes]


def _training_chart(title: str, names: Sequence[str], metrics: Mapping[str, Column]) -> Chart:
    per_point = -(-len(metrics["step"]) // MAX_POINTS)
    steps = _means(metrics["step"], per_point)
    one_family = len({name.partition("/")[0] for name in names}) == 1
    traces: list[Row] = []
    for name, color in zip(names, itertools.cycle(PALETTE), strict=False):
        values = _means(metrics[name], per_point)
        shown = name.partition("/")[2] if one_family and "/" in name else label(name, METRICS)
        traces += _curve(shown, steps, values, color)
    return Chart(title, _note([find(name, METRICS) for name in names]), _figure(traces, legend=len(names) > 1))


def overlaid_charts(runs: Mapping[str, Mapping[str, Column]]) -> dict[str, list[Chart]]:
    """Metrics of several runs, each in a chart of its own with a curve for each run that has it, by group."""
    names = dict.fromkeys(name for metrics in runs.values() for name in metrics if name not in ("step", "time"))
    groups: dict[str, list[Chart]] = {group: [] for group in PLAN}
    for name in names:
        chart = _overlaid(name, {run: metrics for run, metrics in runs.items() if name in metrics}, METRICS)
        groups.setdefault(_group_of(name), []).append(chart)
    return {group: charts for group, charts in groups.items() if charts}


def overlaid_held_out(runs: Mapping[str, Sequence[Row]]) -> list[Chart]:
    """Held-out metrics of several runs, whose evaluations of one split are given, over one another."""
    columns = {
        run: {
            "step": [row["step"] for row in rows],
            **{name: [row["metrics"].get(name) for row in rows] for name in rows[-1]["metrics"]},
        }
        for run, rows in runs.items()
        if rows
    }
    names = dict.fromkeys(name for metrics in columns.values() for name in metrics if name != "step")
    return [
        _overlaid(name, {run: metrics for run, metrics in columns.items() if name in metrics}, HELD_OUT)
        for name in names
    ]


def _overlaid(name: str, runs: Mapping[str, Mapping[str, Column]], glossary: Mapping[str, Term]) -> Chart:
    traces: list[Row] = []
    for (run, metrics), color in zip(runs.items(), itertools.cycle(PALETTE), strict=False):
        per_point = -(-len(metrics["step"]) // MAX_POINTS)
        traces += _curve(run, _means(metrics["step"], per_point), _means(metrics[name], per_point), color)
    return Chart(label(name, glossary), _note([find(name, glossary)]), _figure(traces, legend=True))


def _group_of(name: str) -> str:
    """The group whose charts show a metric of training."""
    groups = (group for group, charts in PLAN.items() for pattern in charts.values() if re.fullmatch(pattern, name))
    return next(groups, "Other")


def _curve(name: str, steps: Column, values: Column, color: str) -> list[Row]:
    """One metric as a line; where it is noisy, the noise stays visible behind its moving mean."""
    curve: Row = {"name": name, "x": steps, "legendgroup": name, "line": {"color": color, "width": 2}}
    mode, traces = "lines" if len(steps) > 1 else "markers", list[Row]()
    if _is_noisy(values):
        traces.append(curve | {"y": values, "mode": "lines", "opacity": 0.3, "showlegend": False, "hoverinfo": "skip"})
        values = _moving_mean(values)
    return [*traces, curve | {"y": values, "mode": mode}]


def _gauge_chart(metrics: Mapping[str, Column]) -> Chart | None:
    """The reward and the metrics beside it over the square root of the KL, each between its own lowest and highest."""
    names = ["reward/total", *(name for name in metrics if name.startswith("beside/"))]
    distances = [
        math.sqrt(max(value, 0.0)) if value is not None else None
        for value in _moving_mean(metrics.get("kl/sequence", []))
    ]
    traces: list[Row] = []
    for name, color in zip(names, itertools.cycle(PALETTE), strict=False):
        values = _moving_mean(metrics.get(name, []))
        points = [(x, y) for x, y in zip(distances, values, strict=False) if x is not None and y is not None]
        per_point = max(1, -(-len(points) // MAX_POINTS))
        points = points[::per_point]
        low, high = min((y for _, y in points), default=0.0), max((y for _, y in points), default=0.0)
        if high > low:
            traces.append(
                {
                    "name": "reward" if name == "reward/total" else name.partition("/")[2],
                    "x": [x for x, _ in points],
                    "y": [float(f"{(y - low) / (high - low):.4g}") for _, y in points],
                    "customdata": [y for _, y in points],
                    "hovertemplate": "%{customdata}",
                    "mode": "lines",
                    "line": {"color": color, "width": 2},
                }
            )
    if len(traces) < 2:
        return None
    note = (
        "Each curve between its own lowest (0) and highest (1), over the square root of the KL per completion. While "
        "both rise, the reward pays for quality; where it goes on and the other falls, it pays for something else."
    )
    return Chart("Reward and what is beside it, over √KL", note, _figure(traces, legend=True))


def _held_out_chart(name: str, rows: Sequence[Row], baselines: Mapping[str, Mapping[str, Number]]) -> Chart:
    steps = [row["step"] for row in rows]
    lows, highs = zip(*[(row.get("intervals") or {}).get(name) or (None, None) for row in rows], strict=True)
    hidden = {"x": steps, "mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    traces: list[Row] = []
    if None not in lows:
        fill = {"fill": "tonexty", "fillcolor": "rgba(47,127,193,0.18)"}
        traces += [hidden | {"y": lows}, hidden | fill | {"y": highs}]
    values = [row["metrics"].get(name) for row in rows]
    line = {"color": PALETTE[0], "width": 2}
    traces.append({"name": "model", "x": steps, "y": values, "mode": "lines+markers", "line": line})
    for (baseline, scores), color in zip(baselines.items(), PALETTE[1:], strict=False):
        if name in scores:
            dashed = {"color": color, "width": 1.5, "dash": "dash"}
            flat = {"name": baseline, "x": [steps[0], steps[-1]], "y": [scores[name]] * 2}
            traces.append(flat | {"mode": "lines", "line": dashed})
    return Chart(label(name, HELD_OUT), _note([find(name, HELD_OUT)]), _figure(traces, legend=len(traces) > 3))


def _figure(traces: Sequence[Row], *, legend: bool) -> str:
    """Plotly's JSON, written here: its own Python classes take 20 ms for a figure, a page has dozens."""
    layout: Row = {
        "margin": {"l": 46, "r": 10, "t": 6, "b": 26},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 11, "family": "system-ui, sans-serif"},
        "hovermode": "x unified",
        "showlegend": legend,
        "legend": {"orientation": "h", "y": -0.16, "yanchor": "top", "x": 0},
        "xaxis": {"showgrid": False, "zeroline": False, "automargin": True, "nticks": 6},
        "yaxis": {
            "gridcolor": "rgba(128,128,128,0.18)",
            "zeroline": False,
            "automargin": True,
            "nticks": 5,
            "exponentformat": "e",
            **_range_of(traces),
        },
    }
    return encode({"data": [{"type": "scatter", **trace} for trace in traces], "layout": layout}).decode().rstrip()


def _range_of(traces: Sequence[Row]) -> Row:
    """The range of the upward axis where all curves are one flat line: from 0 to twice its height, to 1 if it is 0."""
    found = {value for trace in traces for value in trace["y"] if value is not None}
    if len(found) != 1:
        return {}
    (height,) = found
    return {"range": sorted((0.0, 2.0 * height or 1.0))}


def _note(terms: Sequence[Term | None]) -> str:
    known = [term for term in terms if term is not None]
    if len(terms) == 1 and known:
        return known[0].explanation
    return "; ".join(dict.fromkeys(term.formula for term in known))


def _means(values: Column, size: int) -> list[Number | None]:
    """Means of runs of `size` entries, without what is missing."""
    return list(values) if size == 1 else [_mean(values[i : i + size]) for i in range(0, len(values), size)]


def _is_noisy(values: Column) -> bool:
    """Whether a long curve goes up and down much more than it goes anywhere: a schedule does not."""
    known = [value for value in values if value is not None]
    travelled = sum(abs(after - before) for before, after in itertools.pairwise(known))
    return len(known) >= 40 and travelled > 3 * (max(known) - min(known))


def _moving_mean(values: Column) -> list[Number | None]:
    """Mean of the 20th part of the curve around each place."""
    reach = max(1, len(values) // 40)
    return [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _mean(values: Column) -> float | None:
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.5g}") if known else None
