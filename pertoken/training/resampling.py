"""Samples that a method draws beside those that it learns from, and what it makes of them.

Other groups in place of dull ones (dynamic sampling), greedy answers to compare with, and rollouts from prefixes that
say what a state is worth. All of them are functions of the seed, the step and the samples of the step, so that a
resumed run draws the same ones.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.batching import to_batch
from pertoken.config import AttentionCredit, ByWorth, MonteCarlo, RunConfig
from pertoken.policy.model import Policy
from pertoken.rewards import Scene, Weighted, score
from pertoken.rewards.align import align
from pertoken.rewards.attention import reader_of
from pertoken.rollout.collect import collect, sample_seed
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls
from pertoken.training.redistribution import by_attention, by_worth
from pertoken.training.state import Run, items_of
from pertoken.types import Completion, Episode, Span, StateValues, TokenRewards


def with_differences(run: Run, episodes: list[Episode], step: int) -> list[Episode]:
    """`episodes` with each group whose samples all earn the same replaced by one of another prompt, where one is found.

    Dynamic sampling of DAPO (Yu et al. 2025, https://arxiv.org/abs/2503.14476, sec. 3.2), bounded: `rollout.redraws`
    rounds of as many prompts of the same task as are missing; what is still missing then stays as it was. The items of
    a round are others for each round, and depend on what those of the step do.
    """
    rollout, seed, run.redrawn = run.config.rollout, run.config.seed, 0
    used, of_group = {episode.item.id for episode in episodes}, {e.group: e.item.task for e in episodes}
    dull: dict[str, list[int]] = {}
    for group in sorted(_groups_without_difference(run, episodes, step)):
        dull.setdefault(of_group[group], []).append(group)
    for again in range(1, rollout.redraws + 1):
        order = [item for item in items_of(run, step, again) if item.id not in used]
        items = [item for task, groups in dull.items() for item in [i for i in order if i.task == task][: len(groups)]]
        if not items:
            continue
        used |= {item.id for item in items}
        found = collect(
            run.engine, items, run.policy.tokenizer, run.controls_at(step),
            samples_per_prompt=rollout.samples_per_prompt, run_seed=seed, step=step,
        )  # fmt: skip
        useless = _groups_without_difference(run, found, step)
        for group in sorted({episode.group for episode in found} - useless):
            place, run.redrawn = dull[items[group].task].pop(), run.redrawn + 1
            rows = [k for k, episode in enumerate(episodes) if episode.group == place]
            fresh = [replace(episode, group=place) for episode in found if episode.group == group]
            for row, episode in zip(rows, fresh, strict=True):
                episodes[row] = episode
    return episodes


def _groups_without_difference(run: Run, episodes: Sequence[Episode], step: int) -> set[int]:
    """Groups whose samples all earn the same, by the rewards alone: a KL penalty makes no difference that teaches."""
    batch = to_batch(episodes, run.controls_at(step), device=str(run.policy.device))
    totals = score(run.rewards, Scene(batch, episodes, run.policy.tokenizer, step=step)).total.sum(1)
    return {group for group in batch.group.tolist() if not float(totals[batch.group == group].std()) > 1e-6}


@dataclass(frozen=True)
class Beside:
    """What credit is assigned against, where the samples alone do not say it."""

    greedy: Float[Tensor, " B"] | None = None
    """What the greedy answer to each row's prompt earns."""
    states: StateValues | None = None
    """What rollouts from prefixes earn."""
    rewards: TokenRewards | None = None
    """The rewards of the samples, placed anew on their tokens."""
    tokens: int = 0
    """Tokens that were sampled for it."""
    texts: int = 0
    """Shortened texts that were scored for it."""

    def figures(self) -> dict[str, float]:
        """What is logged of it."""
        found = {"tokens/beside": float(self.tokens), "texts/beside": float(self.texts)}
        return {name: figure for name, figure in found.items() if figure}


def beside(
    scene: Scene,
    config: RunConfig,
    engine: RolloutEngine,
    policy: Policy,
    controls: Controls,
    rewards: Sequence[Weighted],
    earned: TokenRewards,
) -> Beside:
    """What `config.credit` asks for beside the samples of `scene`, which have `earned` that; `rewards` pay it, without
    the KL penalty."""
    credit = config.credit
    if isinstance(credit, ByWorth):
        placed, texts = by_worth(credit, earned, scene, rewards, seed=config.seed)
        return Beside(rewards=placed, texts=texts)
    if isinstance(credit, AttentionCredit):
        weights = policy.last_attention(scene.batch) if credit.model is None else reader_of(credit.model).weights(scene)
        names = [part.name for part in rewards]
        return Beside(rewards=by_attention(credit, earned, names, weights, scene.batch.action_mask))
    probe = _Probe(scene, config, engine, policy, controls, rewards)
    if config.credit.type == "self_critical":
        return probe.greedy()
    if config.credit.type == "monte_carlo":
        return probe.states(config.credit)
    return Beside()


@dataclass(frozen=True)
class _Probe:
    """Draws further samples for the rows of a scene."""

    scene: Scene
    config: RunConfig
    engine: RolloutEngine
    policy: Policy
    controls: Controls
    rewards: Sequence[Weighted]

    def greedy(self) -> Beside:
        """One greedy answer for each prompt."""
        group, tokenizer = self.scene.batch.group, self.policy.tokenizer
        of_group = {episode.group: episode.item for episode in self.scene.episodes}
        greedily = self._untruncated(temperature=0.0)
        episodes = collect(self.engine, list(of_group.values()), tokenizer, greedily, step=self.scene.step)
        earned = dict(zip(of_group, self._totals(episodes), strict=True))
        paid = torch.tensor([earned[each] for each in group.tolist()], device=group.device)
        return Beside(greedy=paid, tokens=sum(sum(episode.action_mask) for episode in episodes))

    def states(self, credit: MonteCarlo) -> Beside:
        """`credit.rollouts` samples from each state that a step of a row begins in; equal prefixes share them."""
        episodes, seed = self.scene.episodes, self.config.seed
        starts = [step_starts(episode, credit, self.policy.tokenizer) for episode in episodes]
        cuts = [(row, cut) for row, of_row in enumerate(starts) for cut in of_row]
        first = {(episodes[row].group, *episodes[row].tokens[:cut]): (row, cut) for row, cut in reversed(cuts)}
        asked = [(episodes[row], cut, k) for row, cut in first.values() for k in range(credit.rollouts)]
        found = self.engine.generate(
            [episode.tokens[:cut] for episode, cut, _ in asked],
            self.controls,
            seeds=[sample_seed(seed, self.scene.step, f"{episode.id}>{cut}", k) for episode, cut, k in asked],
            taken=[sum(episode.action_mask[:cut]) for episode, cut, _ in asked],
        )
        continued = [
            continuation(episode, cut, completion, f"{episode.id}>{cut}/{k}", place // credit.rollouts)
            for place, ((episode, cut, k), completion) in enumerate(zip(asked, found, strict=True))
        ]
        means = torch.tensor(self._totals(continued), dtype=torch.float64).view(-1, credit.rollouts).mean(1)
        worth = dict(zip(first, means.tolist(), strict=True))
        values = torch.zeros(self.scene.batch.tokens.shape, dtype=torch.float64)
        begins = torch.zeros(self.scene.batch.tokens.shape, dtype=torch.bool)
        for row, cut in cuts:
            values[row, cut] = worth[(episodes[row].group, *episodes[row].tokens[:cut])]
            begins[row, cut] = True
        device = self.scene.batch.tokens.device
        states = StateValues(values.to(device), begins.to(device))
        return Beside(states=states, tokens=sum(len(completion.tokens) for completion in found))

    def _totals(self, episodes: Sequence[Episode]) -> list[float]:
        """What each of `episodes` earns by the rewards."""
        if not episodes:
            return []
        # kept sets are no business of rewards, and what is continued here has none for its first tokens
        batch = to_batch(episodes, self._untruncated(), device=str(self.policy.device))
        scene = Scene(batch, episodes, self.policy.tokenizer, step=self.scene.step)
        totals: list[float] = score(self.rewards, scene).total.sum(1).tolist()
        return totals

    def _untruncated(self, **changes: float) -> Controls:
        return replace(self.controls, sampling=self.controls.sampling.untruncated(**changes), mask=None)


def step_starts(episode: Episode, credit: MonteCarlo, tokenizer: Any) -> list[int]:
    """Columns of the first token of each step of a row: every `credit.every` actions, or behind each `credit.after`.

    At most `credit.max_states`; what follows is part of the last step. Whether a step ends behind a token is known
    from the tokens up to it, which is what keeps the estimator unbiased.
    """
    actions = [column for column, chosen in enumerate(episode.action_mask) if chosen]
    if credit.every is not None:
        return actions[:: credit.every][: credit.max_states]
    begin = episode.prompt_length
    ends = align(episode.tokens[begin:], tokenizer)
    text, completed = ends.text, ends.completed()
    starts, seen = actions[:1], 0
    for before, column in itertools.pairwise(actions):
        end = completed[before - begin]
        place = text.rfind(credit.after, max(seen - len(credit.after) + 1, 0), end)
        if place >= 0 and place + len(credit.after) > seen:
            starts.append(column)
            seen = end
    return starts[: credit.max_states]


def continuation(episode: Episode, cut: int, completion: Completion, name: str, group: int) -> Episode:
    """The first `cut` tokens of `episode` and what was sampled behind them, as one episode."""
    new = len(completion.tokens)
    turn = episode.spans[-1].turn if episode.spans else 1
    kept = [replace(span, stop=min(span.stop, cut)) for span in episode.spans if span.start < cut]
    return Episode(
        id=name,
        item=episode.item,
        group=group,
        tokens=episode.tokens[:cut] + completion.tokens,
        action_mask=episode.action_mask[:cut] + [True] * new,
        logprobs=episode.logprobs[:cut] + completion.logprobs,
        env_rewards=episode.env_rewards[:cut] + [0.0] * new,
        spans=[*kept, Span(cut, cut + new, "action", turn)],
        stop=completion.stop,
        policy_version=episode.policy_version,
    )
