"""A reward that is given for each of the policy's turns, on the tokens of that turn."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.rewards.base import Opinions, Reward, Scene
from pertoken.rewards.names import make_entry
from pertoken.types import Episode, Message, Span, StopReason


@dataclass(frozen=True)
class EachTurn:
    """Another reward, asked about each turn of the policy by itself: what was said before it is its prompt.

    What it pays for a turn falls on tokens of that turn, a number on its last one; a conversation earns the sum over
    its turns. Rewards that compare samples (`self_bleu`) compare the k-th turns of a prompt. It abstains on a
    conversation if it has no opinion on any turn of it.
    """

    reward: Mapping[str, Any]
    """As an entry of `rewards`: `name` or `fn`, `weight`, and its parameters."""

    def __post_init__(self) -> None:
        _ = self._asked

    @cached_property
    def _asked(self) -> tuple[Reward, float]:
        return make_entry(self.reward, "each_turn.reward")

    def others(self) -> dict[str, Reward]:
        """The reward."""
        return {"reward": self._asked[0]}

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"] | Opinions:
        """The values of all turns in their rows, 0 elsewhere; in float64."""
        reward, weight = self._asked
        turns, rows = apart(scene)
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        if not len(rows):
            return values
        said = reward(turns)
        cells, silent = (said.values, said.abstained.cpu()) if isinstance(said, Opinions) else (said, None)
        values.index_add_(0, rows, weight * cells.detach().cpu().double())
        if silent is None or not bool(silent.any()):
            return values
        spoken = torch.zeros(len(values), dtype=torch.long).index_add_(0, rows, (~silent).long())
        asked = torch.zeros(len(values), dtype=torch.long).index_add_(0, rows, torch.ones_like(rows))
        return Opinions(values, (asked > 0) & (spoken == 0))


def apart(scene: Scene) -> tuple[Scene, Tensor]:
    """The scene with a row for each turn of the policy, as long as the conversation was then, and the rows they are of.

    Its actions are those of the turn alone. It knows no log-probs of other models, which are of whole conversations.
    """
    episodes, rows = list[Episode](), list[int]()
    groups: dict[tuple[int, int], int] = {}
    for row, episode in enumerate(scene.episodes):
        for place, span in enumerate(_spans(episode)):
            group = groups.setdefault((episode.group, place), len(groups))
            episodes.append(_turn(episode, span, place, group))
            rows.append(row)
    index = torch.tensor(rows, dtype=torch.long)
    device = scene.batch.tokens.device
    batch = replace(scene.batch, support=None, sample_entropy=None).rows(index.to(device))
    columns = torch.arange(batch.tokens.shape[1], device=device)
    stops = torch.tensor([len(episode.tokens) for episode in episodes], device=device)
    starts = torch.tensor([episode.prompt_length for episode in episodes], device=device)
    shown = columns < stops[:, None]
    acts = batch.action_mask & shown & (columns >= starts[:, None])
    turns = replace(
        batch,
        attention_mask=batch.attention_mask & shown,
        action_mask=acts,
        sample_logprobs=torch.where(acts, batch.sample_logprobs, 0.0),
        env_rewards=torch.zeros_like(batch.env_rewards),
        group=torch.tensor([episode.group for episode in episodes], dtype=batch.group.dtype, device=device),
        terminated=torch.tensor([episode.terminated for episode in episodes], dtype=torch.bool, device=device),
        episode_ids=tuple(episode.id for episode in episodes),
    )
    return Scene(turns, episodes, scene.tokenizer, step=scene.step), index


def _spans(episode: Episode) -> list[Span]:
    """The policy's turns; of an episode that was made by hand, all from its first action on."""
    found = [span for span in episode.spans if span.role == "action"]
    begin, end = episode.prompt_length, len(episode.tokens)
    return found or ([Span(begin, end, "action", 1)] if begin < end else [])


def _turn(episode: Episode, span: Span, place: int, group: int) -> Episode:
    """The conversation up to the end of a turn, everything before it a prompt."""
    stop = span.stop
    stops: list[StopReason] = episode.info.get("stops") or [episode.stop]
    return replace(
        episode,
        id=f"{episode.id}/turn {place + 1}",
        item=replace(episode.item, prompt=_before(episode, place)) if place else episode.item,
        group=group,
        tokens=episode.tokens[:stop],
        action_mask=[False] * span.start + episode.action_mask[span.start : stop],
        logprobs=episode.logprobs[:stop],
        env_rewards=[0.0] * stop,
        spans=[Span(0, span.start, "prompt", span.turn - 1), span],
        stop=stops[place],
        support=None,
        entropies=None,
    )


def _before(episode: Episode, place: int) -> tuple[Message, ...]:
    """What was said before the policy's turn number `place`, from 0."""
    said: list[Message] = episode.info["messages"]
    turns = [k for k, message in enumerate(said) if message["role"] == "assistant"]
    return tuple(said[: turns[len(turns) - episode.info["turns"] + place]])
