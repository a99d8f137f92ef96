"""The figures of a run, told also to where people already look: TensorBoard, Weights & Biases, MLflow, Trackio.

By the trackers of `accelerate`, under the names of the glossary; held-out metrics have their split before them. Of each
step whose samples are kept, the one that earned most and the one that earned least go along as a table, a row for each
token with all its numbers: as a table where a tracker has such, as Markdown in the texts of TensorBoard. The run
folder stays what counts: a tracker that fails is named once and told nothing more, and the run goes on.
"""

import hashlib
import importlib.util
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pertoken.display import harmless
from pertoken.errors import MissingExtraError
from pertoken.tracking.files import Number, Row
from pertoken.tracking.index import total
from pertoken.tracking.settings import settings_of

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",),
            "trackio": ("trackio",)}  # fmt: skip
"""What has to be installed for each, any one of them."""


@dataclass(frozen=True)
class Table:
    """Some tokens with their numbers."""

    columns: list[str]
    rows: list[list[Any]]


def token_table(step: int, records: Sequence[Mapping[str, Any]]) -> Table | None:
    """The best and the worst of the samples of a step by their reward, a row for each token that the model chose;
    None if there is none. Numbers that are not finite are None."""
    chosen = [sample for sample, record in enumerate(records) if any(record["tokens"]["action"])]
    if not chosen:
        return None
    earned = {sample: total(records[sample]["streams"].get("reward/total", ())) for sample in chosen}
    shown = sorted({max(chosen, key=earned.__getitem__), min(chosen, key=earned.__getitem__)})
    names = list(dict.fromkeys(name for sample in shown for name in records[sample]["streams"]))
    rows: list[list[Any]] = []
    for sample in shown:
        tokens, streams = records[sample]["tokens"], records[sample]["streams"]
        for at in (at for at, acts in enumerate(tokens["action"]) if acts):
            values = [streams[name][at] if name in streams else None for name in names]
            numbers = [float(value) if value is not None and math.isfinite(value) else None for value in values]
            rows.append([step, sample, str(records[sample]["item"]), at, harmless(tokens["piece"][at]), *numbers])
    return Table(["step", "sample", "item", "position", "token", *names], rows)


def _wandb_table(tracker: Any, table: Table, step: int) -> None:
    tracker.log_table(TOKENS, columns=table.columns, data=table.rows, step=step)


def _mlflow_table(tracker: Any, table: Table, step: int) -> None:
    """Into one table that grows: MLflow lists tables in a tag, which has room for some dozens of names only."""
    import mlflow

    columns = dict(zip(table.columns, map(list, zip(*table.rows, strict=True)), strict=True))
    mlflow.log_table(columns, f"{TOKENS}.json", run_id=tracker.tracker.info.run_id)


def _trackio_table(tracker: Any, table: Table, step: int) -> None:
    import pandas as pd  # comes with trackio
    import trackio

    tracker.log({TOKENS: trackio.Table(dataframe=pd.DataFrame(table.rows, columns=table.columns))}, step=step)


def _tensorboard_table(tracker: Any, table: Table, step: int) -> None:
    tracker.log({TOKENS: markdown(table)}, step=step)


def markdown(table: Table) -> str:
    """A table as Markdown in which nothing that a model wrote can act.

    >>> markdown(Table(["token", "kl"], [["a|b", 0.123456]])).splitlines()[2]
    '| a&#124;b | 0.1235 |'
    """
    lines = [[_spelled(cell) for cell in row] for row in (table.columns, *table.rows)]
    lines.insert(1, ["---"] * len(table.columns))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spelled(cell: object) -> str:
    """A cell of a table of Markdown: whatever may mean something there goes by its number."""
    if cell is None or isinstance(cell, float):
        return "" if cell is None else f"{cell:.4g}"
    return re.sub(r"[^\w .,/]|_", lambda found: f"&#{ord(found[0])};", str(cell).replace("\n", "↵"))


TOKENS = "tokens"
"""Name of the table."""

TABLES: dict[str, Callable[[Any, Table, int], None]] = {
    "tensorboard": _tensorboard_table, "wandb": _wandb_table, "mlflow": _mlflow_table, "trackio": _trackio_table,
}  # fmt: skip


class Trackers:
    """Some trackers that hear of a run as it goes on."""

    def __init__(self, live: Mapping[str, Any], on_problem: Callable[[str], None]) -> None:
        """live: trackers as `accelerate` has them, by name. `on_problem` hears of the first failure of each."""
        self._live, self._on_problem = dict(live), on_problem

    def start(self, config_text: str) -> None:
        """Begin, with the settings of the run by their dotted names."""
        settings = settings_of(config_text)
        self._tell(lambda tracker, name: tracker.start())
        self._tell(lambda tracker, name: tracker.store_init_configuration(settings))

    def step(self, step: int, metrics: Mapping[str, Number | None]) -> None:
        """The figures of a step; those that are not finite are left out."""
        self._log(step, metrics)

    def evaluation(self, step: int, split: str, metrics: Mapping[str, Number | None]) -> None:
        """The held-out metrics of a split, as `<split>/<name>`."""
        self._log(step, {f"{split}/{name}": value for name, value in metrics.items()})

    def episodes(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Tokens of a step whose samples are kept, for trackers that can show a table."""
        table = token_table(step, records)
        if table is not None:
            self._tell(lambda tracker, name: TABLES[name](tracker, table, step) if name in TABLES else None)

    def finish(self) -> None:
        """End; what waits to be sent is sent."""
        self._tell(lambda tracker, name: tracker.finish())
        self._live.clear()

    def _log(self, step: int, metrics: Mapping[str, Number | None]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self._tell(lambda tracker, name: tracker.log(finite, step=step))

    def _tell(self, what: Callable[[Any, str], object]) -> None:
        for name, tracker in list(self._live.items()):
            try:
                what(tracker, name)
            except Exception as error:  # whatever it is, the run is worth more
                del self._live[name]
                self._on_problem(f"tracker {name}: {type(error).__name__}: {error}; it is told nothing more")


def refuse_missing(names: Sequence[str]) -> None:
    """Raises MissingExtraError for a tracker whose package is not installed."""
    for name in names:
        for packages in (PACKAGES[name], ("accelerate",)):
            if not any(importlib.util.find_spec(package) for package in packages):
                raise MissingExtraError(packages[0], name, f"log.trackers: {name}")


def trackers_of(
    names: Sequence[str], folder: Path, run: Row, *, project: str, step: int, on_problem: Callable[[str], None]
) -> Trackers:
    """The trackers of a run that goes on behind `step`; `run` is its run.json. They begin when they are told to.

    TensorBoard writes into the run folder. A resumed run goes on where it was in TensorBoard, Weights & Biases and
    Trackio, and is a run of its own in MLflow. Raises MissingExtraError for what is not installed.
    """
    if not names:
        return Trackers({}, on_problem)
    refuse_missing(names)
    from accelerate import tracking

    same = hashlib.sha256(f"{folder.resolve().name} {run['started']}".encode()).hexdigest()[:16]
    makers: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: tracking.TensorBoardTracker("tensorboard", folder, purge_step=step + 1),
        "wandb": lambda: tracking.WandBTracker(project, name=folder.name, id=same, resume="allow", dir=str(folder)),
        "mlflow": lambda: tracking.MLflowTracker(project, run_name=folder.name),
        "trackio": lambda: tracking.TrackioTracker(project, name=folder.name, resume="allow"),
    }
    return Trackers({name: makers[name]() for name in names}, on_problem)
