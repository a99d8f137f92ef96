"""How named parts become the reward of every token.

`score` asks each reward, weighs and names what it says, and puts all of it on actions. Nothing is ever dropped: what
falls on a token that the policy did not choose moves to the last action before it. `findings` is the same for the eye.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pertoken.errors import ConfigError, RewardError
from pertoken.machine.background import Background, StillRunningError
from pertoken.rewards.align import spread
from pertoken.rewards.base import (
    FINITE,
    Explains,
    Measured,
    Opinions,
    Reward,
    Sample,
    Scene,
    ScoredSpan,
    Stateful,
    in_rows,
    reason,
    where,
    with_others,
)
from pertoken.rewards.composition import Multiplier, Normaliser, check_clip, clip_episodes, clip_tokens, speaks
from pertoken.schedule import Schedule
from pertoken.types import Episode, Item, TokenRewards


@dataclass(frozen=True)
class Weighted:
    """A reward as a task uses it: how much it counts, and the name of its part."""

    reward: Reward
    weight: float | Schedule | Multiplier
    name: str
    time_limit: float | None = None
    """Seconds that one call may take; None waits for ever."""
    clip: tuple[float, float] | None = None
    """Bounds of each token's value, or of the number of an episode reward, before anything else."""
    normaliser: Normaliser | None = None
    """What the clipped part is measured by, before the weight."""
    attempts: int = 1
    """How often a completion that it fails on is tried in all."""
    max_failed_share: float = 0.0
    """Share of the completions of a scene that it may fail on: those count 0 and are compared with no other."""
    tasks: tuple[str, ...] | None = None
    """The tasks that it is about: on rows of others it has no opinion, and is not asked; None is about all."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or not 0 <= self.max_failed_share <= 1:
            raise ConfigError(
                f"reward {self.name!r}: expected attempts >= 1 and max_failed_share of 0 to 1, got {self.attempts} and "
                f"{self.max_failed_share}"
            )
        points = self.weight.points if isinstance(self.weight, Schedule) else ((0, self.weight_at(0)),)
        for _, weight in points:
            if not math.isfinite(weight):
                raise ConfigError(f"reward {self.name!r}: weight must be a finite number, got {weight}")
        if self.clip is not None:
            check_clip(self.name, self.clip, of_episodes=self._of_episodes)

    @property
    def _of_episodes(self) -> bool:
        return bool(getattr(self.reward, "of_episodes", False))

    def weight_at(self, step: int) -> float:
        """How much it counts in a step."""
        return self.weight if isinstance(self.weight, int | float) else self.weight(step)

    def is_about(self, item: Item) -> bool:
        """Whether the task of `item` is one of those that it is about."""
        return self.tasks is None or item.task in self.tasks

    def fixed(self) -> "Weighted":
        """The part as a yardstick that does not move: the weight that it ends with (1 for one that is found), nothing
        normalised."""
        weight = self.weight.last if isinstance(self.weight, Schedule) else self.weight
        return replace(self, weight=1.0 if isinstance(weight, Multiplier) else weight, normaliser=None)

    def prepare(
        self, raw: Float[Tensor, "B T"], scene: Scene, abstained: Bool[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B T"], dict[str, float]]:
        """What the weight is applied to, and figures of it by name."""
        if not (self.clip or self.normaliser or isinstance(self.weight, Schedule | Multiplier)):
            return raw, {}
        action_mask, values = scene.batch.action_mask.cpu(), raw
        speaking = speaks(abstained, action_mask)
        figures = {f"weight/{self.name}": self.weight_at(scene.step), f"raw/{self.name}": _per_row(raw, speaking)}
        if self.clip is not None:
            if self._of_episodes:
                values, share = clip_episodes(values, speaking, action_mask, *self.clip)
            else:
                values, share = clip_tokens(values, *self.clip)
            figures[f"clipped/{self.name}"] = share
        if isinstance(self.weight, Multiplier) and bool(speaking.any()):
            self.weight.observe(_per_row(values, speaking))
        if self.normaliser is not None:
            compared = scene.task if self.normaliser.over == "task" else scene.batch.group.cpu()
            values = self.normaliser(values, speaking, compared, action_mask)
        return values, figures

    def state(self) -> Any:
        """What a stateful reward remembers, if JSON gives the same back; None if it remembers nothing."""
        if not isinstance(self.reward, Stateful):
            return None
        state = self.reward.get_state()
        try:
            same = json.loads(json.dumps(state)) == state
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name!r}: get_state() cannot be saved as JSON: {error}") from error
        if not same:
            raise RewardError(
                f"reward {self.name!r}: get_state() is not the same after a trip through JSON: use lists instead of "
                "tuples, and text as keys of dicts"
            )
        return state


def score(rewards: Sequence[Weighted], scene: Scene) -> TokenRewards:
    """The reward of every token: weighted parts by name, all of it on actions, in the dtype of the batch.

    What the environment paid is the part "env" (absent if it paid nothing). The total is the sum of the parts.
    """
    names = [part.name for part in rewards]
    if len({"env", *names}) <= len(names):
        raise ConfigError(f"rewards need different names, and 'env' is taken by the environment: got {names}")
    env = scene.batch.env_rewards
    parts = {"env": _credited("env", env, scene)} if bool(env.any()) else {}
    silent: dict[str, Tensor] = {}
    failures: dict[str, dict[int, str]] = {}
    figures: dict[str, float] = {}
    earned = torch.zeros(len(scene.episodes), dtype=torch.float64)
    for part in rewards:
        said, abstained, failed = _of_its_tasks(part, scene)
        if abstained is not None:
            figures[f"abstained/{part.name}"] = abstained.double().mean().item()
        if failed:
            failures[part.name], figures[f"errors/{part.name}"] = failed, float(len(failed))
            abstained = torch.zeros(len(said), dtype=torch.bool) if abstained is None else abstained
            abstained[list(failed)] = True  # compared with no other, either
        raw = _credited(part.name, said, scene)
        earned += part.fixed().weight_at(scene.step) * raw.sum(1)
        values, measured = part.prepare(raw, scene, abstained)
        parts[part.name] = part.weight_at(scene.step) * values
        figures |= measured
        for place, reward in with_others(part.name, part.reward):
            if isinstance(reward, Measured):
                figures |= {f"{name}/{place}": value for name, value in reward.figures().items()}
        if abstained is not None:
            silent[part.name] = abstained.to(env.device)
    total = torch.zeros_like(scene.batch.sample_logprobs)
    for name, values in parts.items():
        parts[name] = values.to(total)
        total = total + parts[name]
    weights = {part.name: part.weight_at(scene.step) for part in rewards}
    return TokenRewards(total, parts, silent, weights, figures, failures, earned)


@dataclass(frozen=True)
class Finding:
    """A `ScoredSpan` as tokens: `[start, stop)` of the episode, what it is worth there with its weight, and why."""

    part: str
    start: int
    stop: int
    value: float
    message: str


def findings(rewards: Sequence[Weighted], scene: Scene) -> list[list[Finding]]:
    """Per row of the scene, what the rewards of spans found: for the eye, `score` has paid it already.

    The rewards look at each sample once more, so ask for the rows that will be looked at.
    """
    found: list[list[Finding]] = []
    for episode, sample in zip(scene.episodes, scene.samples, strict=True):
        row = []
        for part in rewards:
            for span in _findings(part, episode, sample):
                tokens = [token for token, _ in spread(sample.aligned, span.start, span.stop, 0.0)]
                start, stop = episode.prompt_length + min(tokens), episode.prompt_length + max(tokens) + 1
                row.append(Finding(part.name, start, stop, part.weight_at(scene.step) * span.value, span.message))
        found.append(row)
    return found


def _findings(part: Weighted, episode: Episode, sample: Sample) -> Sequence[ScoredSpan]:
    if not isinstance(part.reward, Explains) or not sample.tokens or not part.is_about(sample.item):
        return []
    try:
        return part.reward.findings(sample)
    except (Exception, SystemExit) as error:
        if part.max_failed_share:  # whether it fails on too many is counted where it pays
            return [ScoredSpan(0, len(sample.text), 0.0, f"no findings: {reason(error)}")]
        raise RewardError(f"reward {part.name!r}, findings in {where(episode)}: {reason(error)}") from error


def move_to_actions(values: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`values` with everything moved onto actions: to the last action before it, else to the first after it.

    Row sums are kept, except in rows without any action, which become 0.

    >>> mask = torch.tensor([[False, True, False, True, False]])
    >>> move_to_actions(torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]), mask)
    tensor([[ 0.,  7.,  0., 24.,  0.]])
    """
    columns = torch.arange(values.shape[1], device=values.device).expand_as(values)
    before = torch.where(action_mask, columns, -1).cummax(1).values
    first = action_mask.int().argmax(1, keepdim=True)
    target = torch.where(before >= 0, before, first)
    return torch.zeros_like(values).scatter_add(1, target, values) * action_mask


def _credited(name: str, values: Float[Tensor, "B T"], scene: Scene) -> Float[Tensor, "B T"]:
    """`values` checked and moved onto actions, in float64 on the CPU."""
    exact, action_mask = values.detach().cpu().double(), scene.batch.action_mask.cpu()
    for row, column in (~exact.isfinite()).nonzero().tolist()[:1]:
        raise RewardError(
            f"reward {name!r}: {exact[row, column].item()} at token {column} of {where(scene.episodes[row])}, "
            f"expected finite numbers; return 0.0 where it has no opinion"
        )
    for row in (exact.any(1) & ~action_mask.any(1)).nonzero()[:1, 0].tolist():
        raise RewardError(
            f"reward {name!r}: {exact[row].sum().item()} for {where(scene.episodes[row])}, which has no action "
            f"to credit; expected 0 there"
        )
    moved = move_to_actions(exact, action_mask)
    lost = (moved.sum(1) - exact.sum(1)).abs() > 1e-9 * (1 + exact.abs().sum(1))
    assert not lost.any(), f"reward {name!r}: the sum changed on its way to the actions"
    return moved


def _of_its_tasks(
    part: Weighted, scene: Scene
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, " B"] | None, dict[int, str]]:
    """As `_evaluate`, of the rows whose tasks the part is about; it abstains on the others."""
    if all(part.is_about(episode.item) for episode in scene.episodes):
        return _evaluate(part, scene)
    rows = [row for row, episode in enumerate(scene.episodes) if part.is_about(episode.item)]
    values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
    abstained = torch.ones(len(values), dtype=torch.bool)
    if not rows:
        return values, abstained, {}
    said, silent, failures = _evaluate(part, scene.part(rows))
    values[rows] = said.double()
    abstained[rows] = torch.zeros(len(rows), dtype=torch.bool) if silent is None else silent
    return values, abstained, {rows[row]: why for row, why in failures.items()}


def _evaluate(part: Weighted, scene: Scene) -> tuple[Float[Tensor, "B T"], Bool[Tensor, " B"] | None, dict[int, str]]:
    """What the reward returns, 0 in the rows that it failed on; the rows on which it abstains (None: no row); and
    why it failed, by row. Every fault names the reward; more of them than the part tolerates raise."""
    reward: Any = part.reward
    values: Tensor
    abstained: Tensor | None
    tolerated = math.floor(part.max_failed_share * len(scene.episodes) + 1e-9)
    try:
        if getattr(reward, "apart", False):
            said = _in_time(part, scene, lambda: reward.each(scene, attempts=part.attempts, tolerated=tolerated))
            values, abstained, failures = in_rows(said, scene)
        else:
            values, abstained, failures = _whole(part, scene, tolerated)
    except (Exception, SystemExit) as error:
        many = f" failed on more than {tolerated} of {len(scene.episodes)} completions" if tolerated else ""
        raise RewardError(f"reward {part.name!r}{many}: {reason(error)}") from error
    return values, abstained if abstained is not None and bool(abstained.any()) else None, failures


def _whole(
    part: Weighted, scene: Scene, tolerated: int
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, " B"] | None, dict[int, str]]:
    """As `_evaluate`, of a reward that looks at the scene as a whole: it is tried again as a whole, and where it raises
    it has failed on every row."""
    rows = len(scene.episodes)
    for left in reversed(range(part.attempts)):
        try:
            values, abstained = _checked(_in_time(part, scene, lambda: part.reward(scene)), scene)
            odd = (~values.isfinite()).nonzero().tolist()
            failures = {
                row: f"{values[row, column].item()} at token {column} of {where(scene.episodes[row])}, {FINITE}"
                for row, column in reversed(odd)
            }
            if len(failures) > tolerated:
                raise RewardError(failures[min(failures)])
        except _TimeUpError:
            raise  # a thread that hangs goes on hanging
        except (Exception, SystemExit) as error:
            if left:
                continue
            if tolerated < rows:
                raise
            return torch.zeros(scene.batch.tokens.shape), None, dict.fromkeys(range(rows), reason(error))
        if not (failures and left):
            break
    if failures:
        values = values.clone()
        values[list(failures)] = 0.0
    return values, abstained, failures


def _checked(values: Any, scene: Scene) -> tuple[Float[Tensor, "B T"], Bool[Tensor, " B"] | None]:
    """What a reward returned, on the CPU, if it is of the right type and shape, and the rows on which it abstains."""
    abstained = None
    if isinstance(values, Opinions):
        values, abstained = values.values, values.abstained.cpu()
    expected = f"expected a floating-point tensor of shape {list(scene.batch.tokens.shape)}, one value per token"
    if not isinstance(values, Tensor):
        raise RewardError(f"returned {type(values).__name__}, {expected}; see @episode_reward")
    if values.shape != scene.batch.tokens.shape or not values.is_floating_point():
        raise RewardError(f"returned {values.dtype} of shape {list(values.shape)}, {expected}")
    values = values.detach().cpu()
    if abstained is not None:
        for row in (abstained & (values != 0).any(1)).nonzero()[:1, 0].tolist():
            raise RewardError(f"abstains on {where(scene.episodes[row])} and pays it too; expected 0 there")
    return values, abstained


def _per_row(values: Float[Tensor, "B T"], speaking: Bool[Tensor, " B"]) -> float:
    """Mean over the speaking rows of their sums."""
    return values.sum(1)[speaking].sum().item() / max(int(speaking.sum()), 1)


class _TimeUpError(RewardError):
    """A reward in this process that takes too long."""


def _in_time(part: Weighted, scene: Scene, work: Callable[[], Any]) -> Any:
    """What `work` returns; RewardError, with the line that it is at, if that takes longer than the part may."""
    if part.time_limit is None:
        return work()
    try:
        return Background(work, "pertoken-reward").result(part.time_limit)
    except StillRunningError as error:
        waited = f"no answer for {len(scene.episodes)} completions within {part.time_limit:g} s"
        raise _TimeUpError(f"{waited}. {error} Mend it, or raise `time_limit`.") from error
