"""The rewards, with their weights, and what cannot be asked of them."""

from collections.abc import Sequence

from pertoken.config import ByWorth, MonteCarlo, RewardConfig, RunConfig, SelfCritical
from pertoken.errors import ConfigError, closest
from pertoken.rewards import (
    Isolated,
    Learns,
    Multiplier,
    Normaliser,
    Reward,
    Schedule,
    Stateful,
    Weighted,
    make,
    resolve,
)


def build_rewards(configs: Sequence[RewardConfig], where: str = "rewards") -> list[Weighted]:
    """The weighted parts; parameters are checked against the fields of the reward.

    where: what the configuration calls them.
    """
    parts: list[Weighted] = []
    for index, config in enumerate(configs):
        name, place = config.name or str(config.fn).rpartition(":")[2], f"{where}.{index}"
        if name in (part.name for part in parts):
            raise ConfigError(f"{place}: a second part named {name!r}; give `fn` parts a `name` of their own")
        reward = _reward(config, place)
        try:
            part = Weighted(
                reward,
                _weight(config),
                name,
                None if config.processes else config.time_limit,  # which its processes keep
                config.clip,
                None if config.normalise == "none" else Normaliser(config.normalise),
                config.attempts,
                config.max_failed_share,
                config.tasks,
            )
        except ConfigError as error:  # of a schedule, a constraint or a clip
            raise ConfigError(f"{place}: {error}") from error
        parts.append(part)
    return parts


def _reward(config: RewardConfig, where: str) -> Reward:
    """The reward itself, in this process or in some of its own."""
    name = config.fn or config.name or ""
    if not config.processes:
        return make(name, config.parameters, where)
    if hasattr(resolve(name), "learn"):
        raise ConfigError(f"{where}: {name} learns beside the policy: it has no `processes` of its own")
    return Isolated(
        name, config.parameters, processes=config.processes, time_limit=config.time_limit,
        memory_limit=config.memory_limit, place=where,
    )  # fmt: skip


def _weight(config: RewardConfig) -> float | Schedule | Multiplier:
    if config.constraint is not None:
        return Multiplier(**config.constraint.model_dump())
    return config.weight if isinstance(config.weight, float) else Schedule(config.weight)


def refuse_learning_from_nothing(rewards: Sequence[Weighted]) -> None:
    """A reward that learns needs the part that says what is right, in that part's own units."""
    for part in rewards:
        if not isinstance(part.reward, Learns):
            continue
        name, others = part.reward.outcome, [other.name for other in rewards if other is not part]
        if name not in others:
            raise ConfigError(f"reward {part.name!r}: outcome: no other part {name!r}; {closest(name, others)}")
        if any(other.normaliser for other in rewards if other.name == name):
            raise ConfigError(f"reward {part.name!r}: outcome {name!r} has `normalise`: it has no fixed threshold then")


def refuse_scored_twice(config: RunConfig, rewards: Sequence[Weighted]) -> None:
    """Methods that score samples beside those they learn from, or again, would make a reward that remembers count them
    too; one that learns would learn from samples of earlier policies."""
    replays = config.rollout.replay is not None
    asking = "rollout.redraws" if config.rollout.redraws else f"credit.type {config.credit.type}"
    asks_further = isinstance(config.credit, SelfCritical | MonteCarlo | ByWorth)
    if not replays and not config.rollout.redraws and not asks_further:
        return
    for part in rewards:
        if isinstance(part.reward, Stateful) or (replays and isinstance(part.reward, Learns)):
            further = "rollout.replay scores samples again" if replays else f"{asking} scores further texts"
            raise ConfigError(
                f"reward {part.name!r} remembers what it has scored, and {further}: leave one of them out"
            )
