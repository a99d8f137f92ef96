"""Several rewards for the same thing, trusted as far as they agree."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pertoken.errors import ConfigError
from pertoken.rewards.base import Opinions, Reward, Scene
from pertoken.rewards.metrics.base import check_choice
from pertoken.rewards.names import make_entry
from pertoken.rewards.parts import move_to_actions

Combination = Literal["least", "mean_less_spread", "mean"]


@dataclass(frozen=True)
class Ensemble:
    """Rewards of one quantity, on one scale, combined cautiously: what only some of them like earns little.

    least: of each completion, the member that pays it least counts, with its credit of the tokens. mean_less_spread:
    each token earns the mean of the members, and the last action pays `caution` times the standard deviation (n - 1) of
    what they give the completion. A policy that has found the weak spot of one member gains nothing by it, or less
    (Coste et al. 2023, https://arxiv.org/abs/2310.02743). Members that abstain on a sample are left out of it.
    """

    members: Sequence[Mapping[str, Any]]
    """Each as an entry of `rewards`: `name` or `fn`, `weight` (to bring it on the common scale), and its parameters."""
    combine: Combination = "least"
    """`least`, `mean_less_spread` or `mean`."""
    caution: float = 1.0
    """Of mean_less_spread."""

    def __post_init__(self) -> None:
        check_choice("ensemble.combine", self.combine, get_args(Combination))
        if isinstance(self.members, str | Mapping) or len(self.members) < 2:
            raise ConfigError(f"ensemble.members: expected a list of at least two rewards, got {self.members!r}")
        _ = self._members

    @cached_property
    def _members(self) -> list[tuple[Reward, float]]:
        return [make_entry(entry, f"ensemble.members.{k}") for k, entry in enumerate(self.members)]

    def others(self) -> dict[str, Reward]:
        """The members, by their place."""
        return {str(place): member for place, (member, _) in enumerate(self._members)}

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"] | Opinions:
        """The combined values, in float64."""
        said = [_said(reward, weight, scene) for reward, weight in self._members]
        values = torch.stack([values for values, _ in said])  # [M, B, T]
        speaks = torch.stack([speaks for _, speaks in said])  # [M, B]
        count, sums = speaks.sum(0).clamp_min(1), values.sum(2)
        if self.combine == "least":
            least = sums.masked_fill(~speaks, torch.inf).argmin(0)
            combined = values[least, torch.arange(len(least))]
        else:
            combined = values.sum(0) / count[:, None]
        if self.combine == "mean_less_spread":
            off = (sums - sums.sum(0) / count).masked_fill(~speaks, 0.0)
            spread = (off.square().sum(0) / (count - 1).clamp_min(1)).sqrt()
            combined = combined - self.caution * _at_the_end(spread, scene)
        silent = ~speaks.any(0)
        return Opinions(combined, silent) if bool(silent.any()) else combined


def _said(reward: Reward, weight: float, scene: Scene) -> tuple[Float[Tensor, "B T"], Bool[Tensor, " B"]]:
    """A member's values, and the rows that it speaks of."""
    said = reward(scene)
    values, silent = (said.values, said.abstained) if isinstance(said, Opinions) else (said, None)
    values = weight * values.detach().cpu().double()
    return values, torch.ones(len(values), dtype=torch.bool) if silent is None else ~silent.cpu()


def _at_the_end(numbers: Float[Tensor, " B"], scene: Scene) -> Float[Tensor, "B T"]:
    """Each number on the last action of its row; rows without an action have none."""
    cells = torch.zeros(scene.batch.tokens.shape, dtype=numbers.dtype)
    cells[:, -1] = numbers
    return move_to_actions(cells, scene.batch.action_mask.cpu())
