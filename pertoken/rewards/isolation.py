"""A reward in processes of its own: one that hangs, crashes, leaks, forks or prints costs a completion, not the run.

Only plain data crosses the border: the reward is built in the worker from its name and parameters, and looks there at
samples (text, ids, item), whose values, findings, figures and state come back.
"""

import contextlib
import functools
import hashlib
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ConfigError, RewardError, WorkerError
from pertoken.machine.workers import START_LIMIT, Fault, Workers
from pertoken.rewards.base import (
    DecoratedReward,
    Explains,
    Failure,
    Measured,
    Opinions,
    Said,
    Sample,
    SampleReward,
    Scene,
    ScoredSpan,
    Spends,
    Stateful,
    WarmsUp,
    in_rows,
    where,
    with_others,
)
from pertoken.rewards.names import make

Manner = Literal["samples", "in order", "scene"]
"""samples: any worker looks at any sample; in order: one worker at one by one; scene: one worker at all together."""

RUNS = 4
"""Runs of samples that each worker is handed per scene: fewer wait for the slowest, more cost messages."""


@dataclass(frozen=True)
class _About:
    """What is to be known of a reward outside of its process."""

    name: str
    manner: Manner
    of_episodes: bool
    explains: bool
    remembers: bool
    spends: bool
    state: Any
    """What it remembers, or else has spent."""
    measures: bool


@dataclass(frozen=True)
class _Job:
    """Something to be looked at such that the answer depends on nothing else, not even on random numbers before."""

    what: Sample | Scene
    seed: int
    start: int = 0
    """At which token of its row a sample begins."""
    findings: bool = False
    tokenizer: bytes = b""
    """Pickled, of a scene."""


@dataclass(frozen=True)
class _NotSent:
    """In the place of a tokenizer that pickle refuses: which one, and why."""

    tokenizer: str


@dataclass(frozen=True)
class _NewState:
    state: Any


@dataclass(frozen=True)
class _Answer:
    said: Any
    state: Any = None
    figures: Mapping[str, float] | None = None


class Isolated:
    """The reward `reward` (a name, or `module:function`) with `parameters`, in `processes` processes of its own.

    A reward of samples is asked about each of them by whichever process is free; what it says is the same as in this
    process, however many there are. One that remembers, has figures of its own, or looks at the scene as a whole has
    one process; a whole scene is handed over without what only models can read (kept sets of the draws, hidden states).
    Random numbers that it draws depend on the sample and the step alone.

    time_limit: seconds for one sample (for the scene, if it looks at it as a whole). A process that takes longer, or
    dies, is replaced, and has failed on what it was at.
    memory_limit: GB that one process may take. One that has grown beyond is replaced; far more at once it does not get
    (on Linux).
    """

    def __init__(
        self,
        reward: str,
        parameters: Mapping[str, Any] = {},
        *,
        processes: int = 1,
        time_limit: float | None = None,
        memory_limit: float | None = None,
        start_limit: float = START_LIMIT,
        place: str = "",
    ) -> None:
        if processes < 1:
            raise ConfigError(f"reward {reward!r}: expected processes >= 1, got {processes}")
        self._order = (reward, dict(parameters), place or f"reward {reward!r}")
        try:
            self._workers = Workers(
                "pertoken.rewards.isolation:serve", (*self._order, None), time_limit=time_limit,
                memory_limit=memory_limit, start_limit=start_limit, name=reward,
            )  # fmt: skip
        except WorkerError as error:
            raise WorkerError(f"{self._order[-1]}: {error}") from error
        self._about: _About = self._workers.greeting
        if self._about.manner == "samples":
            self._workers.enlarge(processes)
        self._state = self._about.state
        self._tokenizer: tuple[Any, bytes] | None = None
        self._figures: Mapping[str, float] = {}
        self._failed: Sequence[Sample] = ()
        # Whether it has these is asked of the object (`Stateful`, `Spends`, `Measured`), and only its process knows.
        if self._about.remembers:
            self.get_state, self.set_state = self._get_state, self._set_state
        elif self._about.spends:
            self.get_spent, self.set_spent = self._get_state, self._set_state
        if self._about.measures:
            self.figures = self._get_figures

    @property
    def name(self) -> str:
        """How error messages call it."""
        return self._about.name

    @property
    def of_episodes(self) -> bool:
        """Whether it gives one number per episode."""
        return self._about.of_episodes

    @property
    def apart(self) -> bool:
        """Whether it looks at the samples of a scene one by one."""
        return self._about.manner != "scene"

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"] | Opinions:
        """What the reward says; RewardError at the first failure."""
        if self.apart:
            values, abstained, _ = in_rows(self.each(scene, attempts=1, tolerated=0), scene)
            return Opinions(values, abstained) if bool(abstained.any()) else values
        self._failed = scene.samples
        seed = _seed(scene.step, *scene.batch.episode_ids)
        job = _Job(_portable(scene), seed, tokenizer=self._pickled(scene.tokenizer))
        said: Any = self._ask([job])[0]
        if isinstance(said, Fault):
            raise RewardError(f"{self.name}, {len(scene.episodes)} completions: {said.message}")
        self._failed = ()
        return said  # type: ignore[no-any-return]  # `score` looks whether it is what it should be

    def each(self, scene: Scene, *, attempts: int, tolerated: int) -> list[Said]:
        """What it says of each sample, tried up to `attempts` times; RewardError if more than `tolerated` fail."""
        said: dict[int, Said] = {}
        left = list(range(len(scene.episodes)))
        for attempt in range(attempts):
            jobs = []
            for row in left:
                sample = scene.samples[row]
                seed = _seed(scene.step, sample.item.id, *sample.tokens, attempt)
                jobs.append(_Job(sample, seed, scene.episodes[row].prompt_length))
            last = attempt == attempts - 1
            for k, answer in self._ask(jobs, tolerated if last else len(jobs)).items():
                failed = isinstance(answer, Fault)
                message = f"{self.name}, {where(scene.episodes[left[k]])}: {answer.message}" if failed else ""
                said[left[k]] = Failure(message) if failed else answer
            failures = [row for row in left if isinstance(said.get(row), Failure)]
            self._failed = [scene.samples[row] for row in failures]
            if last and len(failures) > tolerated:
                raise RewardError(said[failures[0]].message)  # type: ignore[union-attr]
            left = failures
            if not left:
                break
        return [said[row] for row in range(len(scene.episodes))]

    def findings(self, sample: Sample) -> Sequence[ScoredSpan]:
        """What the reward found, where, and in words; nothing of a sample that it has failed on."""
        if not self._about.explains or any(sample is failed for failed in self._failed):
            return []
        found = self._ask([_Job(sample, _seed(sample.step, sample.item.id, *sample.tokens), findings=True)])[0]
        if isinstance(found, Fault):
            raise RewardError(found.message)
        return list(found)

    def log_to(self, path: Path) -> None:
        """Append what its processes print to the file `path`."""
        self._workers.log.to(path)

    def close(self) -> None:
        """End its processes; they end with this one in any case."""
        self._workers.close()

    def _ask(self, jobs: Sequence[Any], tolerated: int = 0) -> dict[int, Any]:
        """Answers by the index of their job; no more than that of the first failure beyond what is tolerated."""
        spread = self._about.manner == "samples"
        together = -(-len(jobs) // (self._workers.count * RUNS)) if spread else max(len(jobs), 1)
        said: dict[int, Any] = {}
        failures = 0
        try:
            with contextlib.closing(self._workers.ask(jobs, together=together)) as answers:
                for k, answer in answers:
                    said[k] = answer
                    if isinstance(answer, _Answer):
                        said[k] = answer.said
                        self._take_over(answer)
                    else:
                        failures += 1
                        if failures > tolerated:
                            break
        except (WorkerError, ConfigError) as error:
            raise RewardError(str(error)) from error
        return said

    def _take_over(self, answer: _Answer) -> None:
        if self._about.remembers or self._about.spends:
            self._set(answer.state)
        if answer.figures is not None:
            self._figures = answer.figures

    def _set(self, state: Any) -> None:
        """A process that is started from now on begins with this state."""
        self._state = state
        self._workers.argument = (*self._order, (state,))

    def _pickled(self, tokenizer: Any) -> bytes:
        """A reward that asks for a tokenizer that cannot be sent is told so; most do not ask."""
        if self._tokenizer is None or self._tokenizer[0] is not tokenizer:
            try:
                raw = pickle.dumps(tokenizer)
            except Exception as error:  # tokenizers written in Python, with whatever they hold
                raw = pickle.dumps(_NotSent(f"{type(tokenizer).__name__} ({type(error).__name__}: {error})"))
            self._tokenizer = (tokenizer, raw)
        return self._tokenizer[1]

    def _get_state(self) -> Any:
        return self._state

    def _set_state(self, state: Any) -> None:
        answer = self._ask([_NewState(state)])[0]
        if isinstance(answer, Fault):
            raise RewardError(f"{self.name}, what it remembers or has spent: {answer.message}")

    def _get_figures(self) -> Mapping[str, float]:
        return self._figures


def _portable(scene: Scene) -> Scene:
    """The scene as plain data on the CPU, its texts decoded already."""
    batch, old, ref = _on_cpu(scene.batch), _on_cpu(scene.old), _on_cpu(scene.ref)
    episodes = [replace(episode, support=None) for episode in scene.episodes]
    portable = replace(scene, batch=batch, episodes=episodes, tokenizer=None, old=old, ref=ref)
    portable.__dict__["samples"] = scene.samples  # where `cached_property` keeps them
    return portable


def _on_cpu(data: Any) -> Any:
    """A `TokenBatch`, a `PolicyOutput` or None without what lies on other devices, and what is large."""
    if data is None:
        return None
    cells = {field.name: getattr(data, field.name) for field in fields(data)}
    cells = {name: cell.detach().cpu() if isinstance(cell, Tensor) else cell for name, cell in cells.items()}
    return replace(data, **(cells | dict.fromkeys(_LEFT_OUT & cells.keys())))


_LEFT_OUT = {"support", "hidden"}


def _seed(*about: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(about).encode("utf-8", "replace"), digest_size=4).digest())


# --- inside of a worker -----------------------------------------------------------------------------------


def serve(argument: tuple[str, dict[str, Any], str, tuple[Any] | None]) -> tuple[_About, Callable[[Any], _Answer]]:
    """What `Workers` calls in a process: builds the reward; what it is, and the function that answers jobs."""
    name, parameters, place, known = argument
    reward: Any = make(name, parameters, place)
    remembers, measures = isinstance(reward, Stateful), isinstance(reward, Measured)
    spends = isinstance(reward, Spends) and not remembers
    for _, each in with_others(name, reward):
        if isinstance(each, WarmsUp):
            each.warm_up()

    def state() -> Any:
        return reward.get_state() if remembers else reward.get_spent() if spends else None

    def go_on(state: Any) -> None:
        (reward.set_state if remembers else reward.set_spent)(state)

    if known is not None:
        go_on(known[0])
    manner: Manner = "scene"
    if getattr(reward, "apart", False):
        manner = "in order" if remembers or measures else "samples"
    about = _About(
        name=reward.name if isinstance(reward, SampleReward) else getattr(reward, "__name__", type(reward).__name__),
        manner=manner,
        of_episodes=bool(getattr(reward, "of_episodes", False)),
        explains=_explains(reward),
        remembers=remembers,
        spends=spends,
        state=state(),
        measures=measures,
    )

    def answer(job: _Job | _NewState) -> _Answer:
        said: Any = None
        if isinstance(job, _NewState):
            go_on(job.state)
        else:
            _draw_from(job.seed)
            if isinstance(job.what, Scene):
                said = reward(_Arrived.of(job.what, job.tokenizer))
                said = said.detach().cpu() if isinstance(said, Tensor) else said
            elif job.findings:
                said = list(reward.findings(job.what))
            else:
                said = reward.say(job.what, job.start)
        return _Answer(said, state(), dict(reward.figures()) if measures else None)

    return about, answer


def _explains(reward: Any) -> bool:
    """Whether it has findings of its own; those of a decorated function are known by its kind."""
    if isinstance(reward, DecoratedReward):
        return reward.of_spans
    return isinstance(reward, Explains) and getattr(type(reward), "findings", None) is not SampleReward.findings


class _Arrived(Scene):
    """A scene whose tokenizer is made when it is asked for: few rewards do, and to import it takes seconds."""

    @classmethod
    def of(cls, scene: Scene, pickled: bytes) -> "_Arrived":
        arrived = object.__new__(cls)
        arrived.__dict__.update({name: value for name, value in vars(scene).items() if name != "tokenizer"})
        arrived.__dict__["_pickled"] = pickled
        return arrived

    @functools.cached_property
    def tokenizer(self) -> Any:
        tokenizer = _unpickled(self.__dict__["_pickled"])
        if isinstance(tokenizer, _NotSent):
            raise RewardError(
                f"asks for the tokenizer, and {tokenizer.tokenizer} cannot be sent to another process: use the texts "
                "of scene.samples, or run this reward without `processes`"
            )
        return tokenizer


@functools.lru_cache(1)
def _unpickled(raw: bytes) -> Any:
    return pickle.loads(raw)


def _draw_from(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
