"""The figures of a run, told also to where people already look: TensorBoard, Weights & Biases, MLflow, Trackio.

By the trackers of `accelerate`, under the names of the glossary; held-out metrics have their split before them. The run
folder stays what counts: a tracker that fails is named once and told nothing more, and the run goes on.
"""

import hashlib
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pertoken.errors import MissingExtraError
from pertoken.tracking.files import Number, Row
from pertoken.tracking.settings import settings_of

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",),
            "trackio": ("trackio",)}  # fmt: skip
"""What has to be installed for each, any one of them."""


class Trackers:
    """Some trackers that hear of a run as it goes on."""

    def __init__(self, live: Mapping[str, Any], on_problem: Callable[[str], None]) -> None:
        """live: trackers as `accelerate` has them, by name. `on_problem` hears of the first failure of each."""
        self._live, self._on_problem = dict(live), on_problem

    def start(self, config_text: str) -> None:
        """Begin, with the settings of the run by their dotted names."""
        settings = settings_of(config_text)
        self._tell(lambda tracker: tracker.start())
        self._tell(lambda tracker: tracker.store_init_configuration(settings))

    def step(self, step: int, metrics: Mapping[str, Number | None]) -> None:
        """The figures of a step; those that are not finite are left out."""
        self._log(step, metrics)

    def evaluation(self, step: int, split: str, metrics: Mapping[str, Number | None]) -> None:
        """The held-out metrics of a split, as `<split>/<name>`."""
        self._log(step, {f"{split}/{name}": value for name, value in metrics.items()})

    def finish(self) -> None:
        """End; what waits to be sent is sent."""
        self._tell(lambda tracker: tracker.finish())
        self._live.clear()

    def _log(self, step: int, metrics: Mapping[str, Number | None]) -> None:
        finite = {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
        self._tell(lambda tracker: tracker.log(finite, step=step))

    def _tell(self, what: Callable[[Any], object]) -> None:
        for name, tracker in list(self._live.items()):
            try:
                what(tracker)
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
