"""Groups of samples that are learnt from again in later steps: which are kept, which are taken, how they are saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from pertoken.rollout.collect import completion_state, of_completion_state, to_episode
from pertoken.types import Completion, Episode, Item


@dataclass(frozen=True)
class Group:
    """The samples of one prompt in one step."""

    step: int
    episodes: tuple[Episode, ...]
    advantage: float
    """Mean |advantage| of its tokens when they were learnt from first."""


@dataclass
class Buffer:
    """The groups that the last `steps` steps have sampled; whole ones, since their samples are compared."""

    steps: int
    priority: Literal["none", "advantage"]
    seed: int
    groups: list[Group] = field(default_factory=list)

    def take(self, step: int, count: int) -> list[Group]:
        """At most `count` different groups for `step`, drawn by its number and the seed alone.

        Each is as likely as the others, or by its |advantage| (`priority`), and then none of which nothing can be
        learnt. Fewer where there are fewer.
        """
        known = [group for group in self.groups if group.step >= step - self.steps]
        weights = np.array([1.0 if self.priority == "none" else group.advantage for group in known])
        count = min(count, int((weights > 0).sum()))
        if not count:
            return []
        draws = np.random.default_rng([self.seed, step])
        return [known[k] for k in draws.choice(len(known), count, replace=False, p=weights / weights.sum())]

    def add(self, step: int, episodes: Sequence[Episode], advantages: Float[Tensor, "B T"]) -> None:
        """Keep the groups of `step`, and forget those that no later step takes. Rows of `advantages` are `episodes`."""
        sizes = advantages.abs().sum(1).tolist()
        members: dict[int, list[int]] = {}
        for row, episode in enumerate(episodes):
            members.setdefault(episode.group, []).append(row)
        self.groups = [group for group in self.groups if group.step > step - self.steps]
        for rows in members.values():
            actions = sum(sum(episodes[row].action_mask) for row in rows)
            size = sum(sizes[row] for row in rows) / max(actions, 1)
            self.groups.append(Group(step, tuple(episodes[row] for row in rows), size))

    def state(self) -> list[dict[str, Any]]:
        """All of it as JSON."""
        return [
            {
                "step": group.step,
                "advantage": group.advantage,
                "episodes": [
                    {
                        "id": episode.id,
                        "item": episode.item.id,
                        "prompt": episode.tokens[: episode.prompt_length],
                        "version": episode.policy_version[0],
                        "completion": completion_state(_completion(episode)),
                    }
                    for episode in group.episodes
                ],
            }
            for group in self.groups
        ]

    def set_state(self, state: Sequence[Mapping[str, Any]], items: Mapping[str, Item]) -> None:
        """The inverse of `state`; groups of items that are not among `items` are left out."""
        self.groups = []
        for group in state:
            if all(told["item"] in items for told in group["episodes"]):
                episodes = tuple(
                    to_episode(
                        told["id"], items[told["item"]], 0, told["prompt"], of_completion_state(told["completion"]),
                        told["version"],
                    )
                    for told in group["episodes"]
                )  # fmt: skip
                self.groups.append(Group(group["step"], episodes, group["advantage"]))


def renumbered(groups: Sequence[Group], first: int) -> list[Episode]:
    """The episodes of `groups` with group numbers from `first` on: in the step that takes them they are groups anew."""
    return [replace(e, group=first + k) for k, group in enumerate(groups) for e in group.episodes]


def _completion(episode: Episode) -> Completion:
    begin = episode.prompt_length
    return Completion(
        episode.tokens[begin:], episode.logprobs[begin:], episode.stop, episode.support,
        None if episode.entropies is None else episode.entropies[begin:],
    )  # fmt: skip
