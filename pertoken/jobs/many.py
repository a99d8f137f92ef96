"""Many runs as one job: each is begun, gone on with or left as it is, until all have ended or the job has."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pertoken.config import RunConfig
from pertoken.jobs.run import train
from pertoken.tracking.runs import standing

Ended = Literal["", "interrupted", "time is up"]
"""Why a job stops before all its runs have finished, if it does."""


@dataclass(frozen=True)
class Job:
    """What runs one after the other hear from outside; run folders alone say how far each of them has come."""

    on_note: Callable[[str], None] = lambda note: None
    interrupted: Callable[[], bool] = lambda: False
    max_seconds: float = math.inf
    """The job ends in so many seconds from when it was made; a run that is being made then is saved."""
    _begun: float = field(default_factory=time.monotonic, init=False)

    @property
    def left(self) -> float:
        """Seconds."""
        return self._begun + self.max_seconds - time.monotonic()

    def ended(self) -> Ended:
        if self.interrupted():
            return "interrupted"
        return "time is up" if self.left <= 0 else ""

    def train(self, config: RunConfig, *, ends: Callable[[], bool] = lambda: False) -> bool:
        """Train the run of `config`, or go on with it; whether it has finished, now or before.

        `ends` is asked before each step, beside `interrupted`, whether the run is to be saved and left.
        """
        folder = config.run_folder
        come = standing(folder)
        if come == "finished":
            return True
        if self.ended():
            return False
        result = train(
            config,
            resume=folder if come else None,
            interrupted=lambda: ends() or self.interrupted(),
            max_seconds=self.left,
        )
        return not result.interrupted
