"""What becomes of one part of the reward before the parts are added up: clipped, normalised, weighed.

    part = weight(step) * normalise(clip(raw))

All of it is off unless asked for. A sample that abstains takes no part in the statistics of its part.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pertoken.errors import ConfigError

EPS = 1e-4
"""Added to each standard deviation, as in `credit.group_relative`."""

NO_SPREAD = 1e-9
"""Sums whose spread is below this share of their size are the same number but for rounding."""

Over = Literal["batch", "task", "group", "running"]
"""Which episodes a part is compared with: those of the batch, of their task in it, of the prompt, or all since the run
began."""


class Multiplier:
    """A weight that is found while training: the price at which the part keeps a bound on average.

        weight <- min(max(weight + rate * (least - mean), 0), largest)

    mean: over the episodes of a step, of their sums of the part, clipped if that is asked for. Below the bound the
    price rises, above it falls, down to 0: gradient ascent on the Lagrange multiplier of "as much of the other parts as
    can be had while the mean of this one is at least `least`" (Altman 1999; for language models, Dai et al. 2023,
    https://arxiv.org/abs/2310.12773). What a step has seen is in the weight from the next step on.
    """

    def __init__(self, least: float, *, rate: float, start: float = 0.0, largest: float = 10.0) -> None:
        if not (rate > 0 and 0 <= start <= largest):
            raise ConfigError(
                f"a constraint needs rate > 0 and 0 <= start <= largest, got {rate}, {start} and {largest}"
            )
        self.least, self.rate, self.largest = least, rate, largest
        self._step, self._weight, self._next = 0, start, start

    def __call__(self, step: int) -> float:
        if step > self._step:
            self._step, self._weight = step, self._next
        return self._weight

    def observe(self, mean: float) -> None:
        """The mean of the step that the weight was last asked for."""
        self._next = min(max(self._weight + self.rate * (self.least - mean), 0.0), self.largest)

    def get_state(self) -> dict[str, int | float]:
        """What it has found so far."""
        return {"step": self._step, "weight": self._weight, "next": self._next}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._step, self._weight, self._next = int(state["step"]), float(state["weight"]), float(state["next"])


def clip_tokens(values: Float[Tensor, "B T"], low: float, high: float) -> tuple[Float[Tensor, "B T"], float]:
    """Each token's value confined to [low, high], and the share of values other than 0 that this changed.

    >>> clip_tokens(torch.tensor([[0.0, 3.0, -0.5, 1.0]]), -1.0, 2.0)
    (tensor([[ 0.0000,  2.0000, -0.5000,  1.0000]]), 0.3333333333333333)
    """
    clipped = values.clamp(low, high)
    return clipped, int((clipped != values).sum()) / max(int((values != 0).sum()), 1)


def clip_episodes(
    values: Float[Tensor, "B T"],
    speaking: Bool[Tensor, " B"],
    action_mask: Bool[Tensor, "B T"],
    low: float,
    high: float,
) -> tuple[Float[Tensor, "B T"], float]:
    """Rows scaled so that their sums lie in [low, high], and the share of speaking rows that this changed.

    A row of sum 0 that must not be 0 has its number on the last action.
    """
    sums = values.sum(1)
    wanted = torch.where(speaking, sums.clamp(low, high), sums)
    changed = wanted != sums
    scaled = values * torch.where(changed & (sums != 0), wanted / torch.where(sums == 0, 1.0, sums), 1.0)[:, None]
    placed = torch.where(changed & (sums == 0), wanted, 0.0)
    return _add_at_last_action(scaled, placed, action_mask), int(changed.sum()) / max(int(speaking.sum()), 1)


class Normaliser:
    """A part measured in its own spread: the sum of each episode becomes how many deviations it is off the mean.

        sum_e' = (sum_e - mean) / (std + 1e-4)          std with n - 1

    mean and std are those of the episodes' sums of this part, over the batch, over its episodes of the same task, over
    the prompt's group, or over all episodes since the run began, those of this batch included (`running`; Chan et al.
    1979 merge batches). Each token's value is divided by the same number, and the mean is taken off on the last action:
    a shift per token would pay
    for length. Episodes that cannot be compared (no spread, fewer than two) get 0.
    """

    def __init__(self, over: Over) -> None:
        self.over = over
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        """For `running`: episodes so far, the mean of their sums, the sum of squared distances from it."""

    def __call__(
        self,
        values: Float[Tensor, "B T"],
        speaking: Bool[Tensor, " B"],
        group: Int[Tensor, " B"],
        action_mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B T"]:
        """`values` normalised; rows that do not speak are given back as they are.

        group: rows with the same number are compared, over `task` and `group`.
        """
        result = values.clone()
        if self.over == "running":
            self._remember(values.sum(1)[speaking])
        for rows in self._compared(speaking, group):
            sums = values[rows].sum(1)
            mean, std = (self.mean, self._std()) if self.over == "running" else _moments(sums)
            # Against the largest of them: equal numbers that were added up in different orders differ by rounding.
            size = max(abs(mean), float(sums.abs().max()))
            if std <= NO_SPREAD * size:
                result[rows] = 0.0
            else:
                shift = sums.new_full(sums.shape, -mean / (std + EPS))
                result[rows] = _add_at_last_action(values[rows] / (std + EPS), shift, action_mask[rows])
        return result

    def _compared(self, speaking: Bool[Tensor, " B"], group: Int[Tensor, " B"]) -> list[Tensor]:
        """Rows that share mean and std."""
        apart = self.over in ("task", "group")
        groups = [speaking & (group == g) for g in group.unique()] if apart else [speaking]
        return [rows.nonzero()[:, 0] for rows in groups if bool(rows.any())]

    def _remember(self, sums: Float[Tensor, " N"]) -> None:
        if not len(sums):
            return
        here = float(sums.mean())
        count, apart = self.count + len(sums), here - self.mean
        self.squares += float((sums - here).square().sum()) + apart**2 * self.count * len(sums) / count
        self.mean += apart * len(sums) / count
        self.count = count

    def _std(self) -> float:
        return float((self.squares / (self.count - 1)) ** 0.5) if self.count > 1 else 0.0

    def get_state(self) -> dict[str, int | float]:
        """What `running` remembers."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


def speaks(abstained: Bool[Tensor, " B"] | None, action_mask: Bool[Tensor, "B T"]) -> Bool[Tensor, " B"]:
    """Rows that a part has an opinion on: they have an action, and it does not abstain."""
    acting = action_mask.any(1)
    return acting if abstained is None else acting & ~abstained


def _moments(sums: Float[Tensor, " N"]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for one number)."""
    return float(sums.mean()), float(sums.std()) if len(sums) > 1 else 0.0


def _add_at_last_action(
    values: Float[Tensor, "B T"], numbers: Float[Tensor, " B"], action_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    columns = torch.arange(values.shape[1], device=values.device)
    last = torch.where(action_mask, columns, -1).amax(1, keepdim=True)
    return values + torch.where((columns == last) & action_mask, numbers[:, None], 0.0)


def check_clip(name: str, clip: Sequence[float], *, of_episodes: bool) -> None:
    """ConfigError if `clip` is no interval, or would pay tokens that nobody judged."""
    low, high = clip
    if not low < high:
        raise ConfigError(f"reward {name!r}: clip needs [low, high] with low < high, got {list(clip)}")
    if not of_episodes and not low <= 0.0 <= high:
        raise ConfigError(
            f"reward {name!r}: clip {list(clip)} does not hold 0, so each token that it says nothing of would be paid; "
            "expected low <= 0 <= high"
        )
