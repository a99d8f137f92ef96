"""Learning curves of all arms in one picture: the mean over seeds, and a band from the lowest to the highest."""

import io
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pertoken.compare.curves import Axis, Curve, mean_curve
from pertoken.compare.figures import Measured
from pertoken.compare.resamples import interval
from pertoken.errors import MissingExtraError
from pertoken.tracking.charts import PALETTE
from pertoken.tracking.glossary import HELD_OUT, label

PICTURES = ("svg", "pdf", "png")
UNITS = {"tokens": "generated tokens", "seconds": "seconds of training"}


def draw(measured: Measured, metric: str, axis: Axis) -> dict[str, bytes]:
    """A metric over an axis: the picture in every format of `PICTURES`, its data as `csv`.

    With one seed the band is the 95% interval over items. Arms that generate nothing are a dashed line at their end.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plots", "drawing curves") from error
    rows = ["arm,seed," + axis + "," + metric]
    with mpl.rc_context({"svg.hashsalt": "pertoken", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, curves), colour in zip(measured.curves.items(), _colours(len(measured.curves)), strict=True):
            values = [measured.points(curve, metric) for curve in curves]
            for curve, own in zip(curves, values, strict=True):
                places = curve.along(axis)
                rows += [f"{name},{curve.seed},{x:.6g},{y:.6g}" for x, y in zip(places, own, strict=True)]
            if name not in measured.learners:
                axes.axhline(fmean(own[-1] for own in values), color=colour, linestyle="--", linewidth=1.2, label=name)
                continue
            places, each = mean_curve([(curve.along(axis), own) for curve, own in zip(curves, values, strict=True)])
            columns = list(zip(*each, strict=True))
            band = places, list(map(min, columns)), list(map(max, columns))
            if len(curves) == 1:
                band = curves[0].along(axis), *_over_items(measured, curves[0], metric)
            axes.fill_between(*band, color=colour, alpha=0.16, linewidth=0)
            means = list(map(fmean, columns))
            axes.plot(places, means, color=colour, linewidth=1.6, marker="o", markersize=2.5, label=name)
        axes.set_xlabel(UNITS[axis], fontsize=9)
        axes.set_ylabel(label(metric, HELD_OUT), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.25)
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        return _saved(figure) | {"csv": ("\n".join(rows) + "\n").encode()}


def _colours(count: int) -> Sequence[str]:
    return [PALETTE[k % len(PALETTE)] for k in range(count)]


def _over_items(measured: Measured, curve: Curve, metric: str) -> tuple[list[float], list[float]]:
    """The ends of the intervals over items at each evaluation of a run; the value itself where there is none."""
    lows, highs = [], []
    for values in measured.resampled(curve, metric):
        found = interval(values)
        lows.append(float(values[0]) if found is None else found.low)
        highs.append(float(values[0]) if found is None else found.high)
    return lows, highs


def _saved(figure: Any) -> dict[str, bytes]:
    """The same data give the same bytes."""
    undated: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}
    found = {}
    for kind in PICTURES:
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, dpi=200, metadata=undated[kind])
        found[kind] = drawn.getvalue()
    return found
