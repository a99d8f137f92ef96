"""What a reward is, and how the author of one says what tokens are worth.

A reward maps a `Scene` (one scored batch) to a number for every cell of `[B, T]`. Most rewards look at one
sample at a time and are written as a plain function of a `Sample`; a decorator lowers it:

    @episode_reward   fn(sample) -> float               one number, on the last action or spread over all
    @span_reward      fn(sample) -> list[ScoredSpan]    scored character ranges of `sample.text`
    @token_reward     fn(sample) -> list[float]         one number per token of the completion

How several of them become the reward of every token is in `parts.py`.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any, Literal, Protocol, overload, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pertoken.errors import ConfigError, RewardError
from pertoken.reading import Reading
from pertoken.rewards.align import AlignedText, align, spread
from pertoken.types import Episode, Item, PolicyOutput, StopReason, TokenBatch

Place = Literal["last", "spread"]
"""Where one number per sample goes: on the last action, or evenly on all of them."""


@dataclass(frozen=True)
class Sample:
    """What the author of a reward sees: one completion and what is known about its problem."""

    item: Item
    tokens: list[int]
    """Ids from the first action to the end of the row (replies of tools in between included)."""
    action_mask: list[bool]
    """True where the policy chose the token. Same length as `tokens`."""
    aligned: AlignedText
    """The text of `tokens` and the characters of each of them."""
    stop: StopReason
    step: int = 0
    """Training step, for rewards that change over time."""

    @property
    def text(self) -> str:
        """The completion, without special tokens."""
        return self.aligned.text

    @property
    def reference(self) -> str | None:
        return self.item.answer


@dataclass(frozen=True)
class Scene:
    """One scored batch: all that a reward may look at."""

    batch: TokenBatch
    episodes: Sequence[Episode]
    """One per row of the batch, in the same order."""
    tokenizer: Any
    old: PolicyOutput | None = None
    ref: PolicyOutput | None = None
    step: int = 0

    def __post_init__(self) -> None:
        ids = tuple(episode.id for episode in self.episodes)
        if ids != self.batch.episode_ids:
            raise ValueError(
                f"episodes {ids} are not the rows of the batch, {self.batch.episode_ids}: same order needed"
            )

    @functools.cached_property
    def samples(self) -> tuple[Sample, ...]:
        """One sample per row; texts are decoded and aligned at the first use, once for all rewards."""
        return tuple(self._sample(episode) for episode in self.episodes)

    @functools.cached_property
    def task(self) -> Int[Tensor, " B"]:
        """A number for the task of each row; all are 0 where there is one task."""
        names = sorted({episode.item.task for episode in self.episodes})
        return torch.tensor([names.index(episode.item.task) for episode in self.episodes])

    def part(self, rows: Sequence[int]) -> "Scene":
        """The scene of these rows alone, in that order."""
        index = torch.tensor(rows)
        old, ref = (None if output is None else output.rows(index) for output in (self.old, self.ref))
        episodes = [self.episodes[row] for row in rows]
        return Scene(self.batch.rows(index), episodes, self.tokenizer, old, ref, self.step)

    def _sample(self, episode: Episode) -> Sample:
        start = episode.prompt_length
        tokens = episode.tokens[start:]
        return Sample(
            item=episode.item,
            tokens=tokens,
            action_mask=episode.action_mask[start:],
            aligned=align(tokens, self.tokenizer),
            stop=episode.stop,
            step=self.step,
        )


class NoOpinion(Enum):
    """The type of `NO_OPINION`."""

    NO_OPINION = "no opinion"


NO_OPINION = NoOpinion.NO_OPINION
"""What a reward of samples returns where it abstains: the sample counts 0, and is compared with no other."""


@dataclass(frozen=True)
class Opinions:
    """What a reward returns that abstains on some rows: 0 there, and a mark that says so."""

    values: Float[Tensor, "B T"]
    abstained: Bool[Tensor, " B"]


@dataclass(frozen=True)
class Failure:
    """What stands in the place of a sample's values where a reward failed on it: why."""

    message: str


Said = list[float] | NoOpinion | Failure
"""What a reward says of one sample: a value for each of its tokens, or why there is none."""


@runtime_checkable
class Reward(Protocol):
    """Anything that gives every token of a scene a number; 0.0 pays nothing, `Opinions` marks rows without a say."""

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"] | Opinions: ...


@runtime_checkable
class Stateful(Protocol):
    """A reward that remembers something from batch to batch (a running mean, say) and goes on so after a resume."""

    def get_state(self) -> Any:
        """All that it remembers, as JSON has it: numbers, text, lists, and dicts with text as keys."""
        ...

    def set_state(self, state: Any) -> None:
        """Remember this instead."""
        ...


@runtime_checkable
class Spends(Protocol):
    """A reward that keeps count of what it costs, money above all. What it says does not depend on that count, so it
    may be asked again, and still a resumed run counts on."""

    def get_spent(self) -> Any:
        """The count so far, as JSON has it."""
        ...

    def set_spent(self, spent: Any) -> None:
        """Count on from there."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A reward that is trained beside the policy, on the samples that it has just paid."""

    outcome: str
    """Name of the part of the reward that it learns from."""

    def learn(self, scene: Scene, outcomes: Mapping[str, Float[Tensor, " B"]]) -> dict[str, float]:
        """Learn from what each part paid each row (without its weight; NaN where it abstained); figures to log."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that learning changes, by name; a checkpoint holds it and fills it in again."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A reward that has figures of its own to log: money spent, answers known already."""

    def figures(self) -> Mapping[str, float]:
        """By name, after it has looked at a scene; each is logged as `<name>/<part>`."""
        ...


@runtime_checkable
class Explains(Protocol):
    """A reward that can say of a sample what it found."""

    def findings(self, sample: Sample) -> "Sequence[ScoredSpan]":
        """What, where, and in words."""
        ...


@runtime_checkable
class Reads(Protocol):
    """A reward by a learned model that can say how its score depends on what the model reads."""

    def readings(self, sample: Sample) -> Sequence[Reading]:
        """The passes of the model whose scores sum to what the reward pays the sample."""
        ...


@runtime_checkable
class WarmsUp(Protocol):
    """A reward whose first sample would have to wait for something, such as a model that is loaded."""

    def warm_up(self) -> None:
        """Load it now. Called where each sample has its time."""
        ...


@runtime_checkable
class AsksOthers(Protocol):
    """A reward that is made of what others say."""

    def others(self) -> Mapping[str, Reward]:
        """These, by a name for each."""
        ...


def with_others(name: str, reward: Reward) -> Iterator[tuple[str, Reward]]:
    """A reward and all that it asks, by name: `<name>`, `<name>.<other>` ..."""
    yield name, reward
    if isinstance(reward, AsksOthers):
        for other, asked in reward.others().items():
            yield from with_others(f"{name}.{other}", asked)


class SampleReward(ABC):
    """A reward that looks at one sample at a time, so that it cannot depend on batch order or batch size."""

    @property
    def name(self) -> str:
        """How error messages call it."""
        return type(self).__name__

    @abstractmethod
    def token_values(self, sample: Sample) -> list[float] | NoOpinion:
        """One value per token of `sample.tokens`, or `NO_OPINION`."""

    def findings(self, sample: Sample) -> "Sequence[ScoredSpan]":
        """What the reward found, where, and in words; empty for a reward that does not speak of ranges."""
        return []

    @property
    def apart(self) -> bool:
        """Whether the samples of a scene are looked at one after the other and nothing else is done."""
        return type(self).__call__ is SampleReward.__call__

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"] | Opinions:
        """The values of all samples in their rows, 0 elsewhere; in float64, so that sums stay exact."""
        values, abstained, _ = in_rows(self.each(scene, attempts=1, tolerated=0), scene)
        return Opinions(values, abstained) if bool(abstained.any()) else values

    def each(self, scene: Scene, *, attempts: int, tolerated: int) -> list[Said]:
        """What it says of each sample, tried up to `attempts` times; RewardError if more than `tolerated` fail."""
        said: list[Said] = []
        failures = 0
        for episode, sample in zip(scene.episodes, scene.samples, strict=True):
            for attempt in range(attempts):
                try:
                    said.append(self.say(sample, episode.prompt_length))
                    break
                except (Exception, SystemExit) as error:
                    message = f"{self.name}, {where(episode)}: {reason(error)}"
                    if attempt == attempts - 1:
                        failures += 1
                        if failures > tolerated:
                            raise RewardError(message) from error
                        said.append(Failure(message))
        return said

    def say(self, sample: Sample, start: int) -> list[float] | NoOpinion:
        """`token_values`, checked; the sample begins at token `start` of its row."""
        said = self.token_values(sample)
        values = [] if said is NO_OPINION else _place_list(said, sample)
        for k, value in enumerate(values):
            if not math.isfinite(value):
                raise RewardError(f"{value} at token {start + k} of the row, {FINITE}")
        return NO_OPINION if said is NO_OPINION else values


FINITE = "expected finite numbers; return 0.0 where it has no opinion"


def in_rows(said: Sequence[Said], scene: Scene) -> tuple[Float[Tensor, "B T"], Bool[Tensor, " B"], dict[int, str]]:
    """What was said of each sample, in its row (float64, 0 elsewhere); the rows without opinion; failures by row."""
    values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
    abstained = torch.zeros(len(values), dtype=torch.bool)
    failures: dict[int, str] = {}
    for row, (episode, of_sample) in enumerate(zip(scene.episodes, said, strict=True)):
        if isinstance(of_sample, Failure):
            failures[row] = of_sample.message
        elif of_sample is NO_OPINION:
            abstained[row] = True
        else:
            start = episode.prompt_length
            values[row, start : start + len(of_sample)] = torch.tensor(of_sample, dtype=torch.float64)
    return values, abstained, failures


def reason(error: BaseException) -> str:
    """Why a reward failed, in words."""
    return str(error) if isinstance(error, RewardError) else f"raised {type(error).__name__}: {error}"


def where(episode: Episode) -> str:
    """An episode in words."""
    return f"episode {episode.id!r} (item {episode.item.id!r})"


@dataclass(frozen=True)
class ScoredSpan:
    """A finding: characters `[start, stop)` of the text are worth `value`, and why."""

    start: int
    stop: int
    value: float
    message: str = ""


class DecoratedReward(SampleReward):
    """A plain function of a sample together with the way its result is placed on the tokens."""

    def __init__(
        self, fn: Callable[..., Any], place: Callable[[Any, Sample], list[float]], parameters: Mapping[str, Any] = {}
    ) -> None:
        self.fn = fn
        """The undecorated function, for direct use and tests."""
        self._place = place
        self._parameters = dict(parameters)
        functools.update_wrapper(self, fn)

    @property
    def name(self) -> str:
        return str(getattr(self.fn, "__name__", type(self.fn).__name__))

    @property
    def of_episodes(self) -> bool:
        """Whether the function gives one number per episode."""
        return getattr(self._place, "func", None) is place_number

    @property
    def of_spans(self) -> bool:
        """Whether the function gives scored ranges of the text."""
        return self._place is place_spans

    def token_values(self, sample: Sample) -> list[float] | NoOpinion:
        said = self.fn(sample, **self._parameters)
        return NO_OPINION if said is NO_OPINION else self._place(said, sample)

    def findings(self, sample: Sample) -> Sequence[ScoredSpan]:
        said = self.fn(sample, **self._parameters) if self.of_spans else NO_OPINION
        return [] if said is NO_OPINION else list(said)

    def bind(self, **parameters: Any) -> "DecoratedReward":
        """The same reward with keyword parameters of its function set."""
        return DecoratedReward(self.fn, self._place, {**self._parameters, **parameters})


@overload
def episode_reward(fn: Callable[..., float]) -> DecoratedReward: ...
@overload
def episode_reward(*, place: Place = ...) -> Callable[[Callable[..., float]], DecoratedReward]: ...
def episode_reward(fn: Callable[..., float] | None = None, *, place: Place = "last") -> Any:
    """Make `fn(sample) -> float` a reward: the number goes to the last action, or evenly to all of them.

    >>> @episode_reward(place="spread")
    ... def brief(sample):
    ...     return -0.01 * len(sample.text)
    """
    if place not in ("last", "spread"):
        raise ConfigError(f"episode_reward: place is 'last' or 'spread', got {place!r}")

    def decorate(function: Callable[..., float]) -> DecoratedReward:
        return DecoratedReward(function, functools.partial(place_number, place=place))

    return decorate if fn is None else decorate(fn)


def span_reward(fn: Callable[..., Sequence[ScoredSpan]]) -> DecoratedReward:
    """Make `fn(sample) -> list[ScoredSpan]` a reward: each value is split evenly over the tokens of its range.

    An empty range (something is missing here) is credited to the nearest token before it.
    """
    return DecoratedReward(fn, place_spans)


def token_reward(fn: Callable[..., Sequence[float]]) -> DecoratedReward:
    """Make `fn(sample) -> list[float]`, one number per token of `sample.tokens`, a reward."""
    return DecoratedReward(fn, _place_list)


def place_number(value: Any, sample: Sample, place: Place) -> list[float]:
    """One value per token: a number on the last action, or evenly on all of them."""
    number = _number(value)
    actions = [k for k, acts in enumerate(sample.action_mask) if acts]
    chosen = actions if place == "spread" else actions[-1:]
    if number and not chosen:
        raise RewardError(f"returned {number}, but the row has no action to credit; return 0.0 for such samples")
    values = [0.0] * len(sample.tokens)
    for k in chosen:
        values[k] = number / len(chosen)
    return values


def place_spans(spans: Any, sample: Sample) -> list[float]:
    """One value per token: that of each span, split evenly over the tokens of its characters."""
    values = [0.0] * len(sample.tokens)
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise RewardError(f"returned {type(spans).__name__}, expected a list of ScoredSpan (empty if there is none)")
    for span in spans:
        if not isinstance(span, ScoredSpan):
            raise RewardError(f"returned a list with {span!r} in it, expected ScoredSpan(start, stop, value) only")
        if not 0 <= span.start <= span.stop <= len(sample.text):
            raise RewardError(
                f"{span} lies outside the text of {len(sample.text)} characters; expected 0 <= start <= stop <= "
                f"{len(sample.text)}: count characters of sample.text, not bytes or tokens"
            )
        if span.value and not values:
            raise RewardError(f"returned {span}, but the row has no action to credit; return [] for such samples")
        for token, share in spread(sample.aligned, span.start, span.stop, _number(span.value)) if values else ():
            values[token] += share
    return values


def _place_list(values: Any, sample: Sample) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RewardError(f"returned {type(values).__name__}, expected a list of {len(sample.tokens)} numbers")
    if len(values) != len(sample.tokens):
        raise RewardError(
            f"returned {len(values)} values, expected {len(sample.tokens)}: one per token of sample.tokens "
            f"(end-of-sequence token included)"
        )
    return [_number(value) for value in values]


def _number(value: Any) -> float:
    if not isinstance(value, Real):
        raise RewardError(
            f"returned {value!r} ({type(value).__name__}), expected a number: 0.0 pays nothing, a whole sample without "
            f"opinion is NO_OPINION, a tensor needs .item()"
        )
    return float(value)
