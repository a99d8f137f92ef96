"""COMET: a trained model's opinion of a translation, by the package `unbabel-comet` in an environment of its own."""

import atexit
import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ConfigError, RewardError
from pertoken.rewards.base import Sample, Scene, place_number

WORKER = Path(__file__).with_name("worker.py")


@dataclass(frozen=True)
class Comet:
    """COMET of each translation, on its last action (Rei et al. 2020, https://aclanthology.org/2020.emnlp-main.213).

    `unbabel-comet` wants a transformers before 5 and a numpy before 2, which this package does not run with: so it is
    asked in a process of its own, by the Python of an environment that has it. Made for `evaluation.beside`; a model
    of COMET has 0.5 billion parameters or more, and each step of training would wait for it.
    """

    python: str
    """The Python of that environment: `comet-env/bin/python`."""
    model: str = "Unbabel/wmt22-comet-da"
    """A model of COMET: a hub name, or a file `checkpoints/model.ckpt` with `hparams.yaml` in the folder above."""
    source: str = "source"
    """Column of `task.info` with what was translated; items without it are read by their prompts."""
    batch: int = 8
    """Translations that go through the model at once."""

    def warm_up(self) -> None:
        """Start the process, and load the model in it."""
        _judge(self.python, self.model, self.batch)

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"]:
        """The scores in their rows, 0 elsewhere; in float64."""
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        rows = [row for row, sample in enumerate(scene.samples) if True in sample.action_mask]
        scores = _judge(self.python, self.model, self.batch)([self._asked(scene.samples[row]) for row in rows])
        for row, score in zip(rows, scores, strict=True):
            placed = place_number(score, scene.samples[row], "last")
            start = scene.episodes[row].prompt_length
            values[row, start : start + len(placed)] = torch.tensor(placed, dtype=torch.float64)
        return values

    def _asked(self, sample: Sample) -> dict[str, str]:
        """What COMET is told of one translation; models that need no reference are told none where there is none."""
        item = sample.item
        given = item.info.get(self.source)
        if not isinstance(given, str):
            given = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
        known = item.info.get("references") or ([] if item.answer is None else [item.answer])
        return {"src": given, "mt": sample.text} | ({"ref": str(known[0])} if known else {})


@functools.cache
def _judge(python: str, model: str, batch: int) -> "_Judge":
    """One process for all rewards that ask the same."""
    return _Judge(python, model, batch)


class _Judge:
    """A process that has a model of COMET."""

    def __init__(self, python: str, model: str, batch: int) -> None:
        self._ask = f"comet.model {model!r}"
        command = [os.path.expanduser(python), str(WORKER), model, str(batch)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError as error:
            raise ConfigError(f"comet.python: {python!r} cannot be started: {error}. {INSTALL}") from error
        atexit.register(self._process.kill)
        assert self._process.stdin is not None  # both were asked for
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        told = self._read()
        if "error" in told:
            raise ConfigError(f"{self._ask}: {told['error']}. {INSTALL}")

    def __call__(self, translations: list[dict[str, str]]) -> list[float]:
        """A score for each translation."""
        if not translations:
            return []
        try:
            self._questions.write(json.dumps(translations) + "\n")
            self._questions.flush()
        except OSError as error:
            raise RewardError(f"{self._ask}: its process has ended ({error})") from error
        told = self._read()
        scores = told.get("scores")
        if not isinstance(scores, list) or len(scores) != len(translations):
            raise RewardError(
                f"{self._ask}: {told.get('error', f'expected {len(translations)} scores, got {scores!r}')}"
            )
        return [float(score) for score in scores]

    def _read(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            return {"error": f"its process ended with code {self._process.wait()}"}
        found: dict[str, Any] = json.loads(line)
        return found


INSTALL = "Make an environment for it: python -m venv comet-env; comet-env/bin/pip install 'unbabel-comet>=2.2,<3'"
