"""From rewards to advantages, as the configuration asks: which estimator of `credit.py`, for which parts."""

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken import credit as estimators
from pertoken import preferences
from pertoken.config import CreditConfig, Gae, LeaveOneOutProcess, PerPart, Redistributed
from pertoken.types import Credit, PolicyOutput, StateValues, TokenBatch, TokenRewards


def assign(
    config: CreditConfig,
    rewards: TokenRewards,
    batch: TokenBatch,
    old: PolicyOutput,
    greedy: Float[Tensor, " B"] | None = None,
    states: StateValues | None = None,
    ref: PolicyOutput | None = None,
) -> Credit:
    """Advantages (and critic targets) of every action, by the estimator that the configuration names.

    `greedy`: what the greedy answer to each row's prompt earns, for credit.type self_critical. `states`: what
    rollouts from prefixes earn, for credit.type monte_carlo. `ref`: the reference model's pass, for credit.type
    online_dpo. For the types that place rewards anew, `rewards` are those that were (`redistribution.py`).
    """
    total, mask, group = rewards.total.to(old.logprobs.dtype), batch.action_mask, batch.group
    returns = None
    if config.type == "gae":
        if old.values is None or old.bootstrap is None:
            raise ValueError("credit.type gae needs values: the policy has no value head")
        after = estimators.bootstrap_values(batch.terminated, old.bootstrap)
        advantages, returns = _by_critic(config, total, old.values, mask, after)
    elif config.type == "self_critical":
        if greedy is None:
            raise ValueError("credit.type self_critical needs what the greedy answers earn")
        advantages = estimators.self_critical(total, mask, greedy.to(total))
    elif config.type == "monte_carlo":
        if states is None:
            raise ValueError("credit.type monte_carlo needs what rollouts from prefixes earn")
        advantages = estimators.monte_carlo(total, states.values.to(total), states.starts, mask)
    elif config.type == "online_dpo":
        if ref is None:
            raise ValueError("credit.type online_dpo needs what the reference model makes of the samples")
        among = _apart_if_silent(rewards, group)
        advantages = preferences.online_dpo(total, old.logprobs, ref.logprobs, mask, among, beta=config.beta)
    elif config.type == "optimal_token_baseline":
        energies = 1.0 - old.logprobs.exp()
        advantages = estimators.optimal_token_baseline(total, energies, mask, group, gamma=config.gamma)
    elif config.type == "per_part":
        advantages = estimators.per_part(_streams(config, rewards), mask, group).to(total)
    elif rewards.abstained and config.type not in ("reward_to_go", "group_process"):
        advantages = _among_speakers(config, rewards, mask, group).to(total)
    else:
        advantages = _estimate(config, total, mask, group)
    return Credit(_transformed(config, advantages, batch, old), returns)


def _transformed(config: CreditConfig, advantages: Tensor, batch: TokenBatch, old: PolicyOutput) -> Tensor:
    """What all estimators have in common: normalising over the batch, and tokens or rows that learn nothing."""
    mask, group = batch.action_mask, batch.group
    if config.normalize == "whiten":
        advantages = estimators.whiten(advantages, mask, group)
    elif config.normalize == "scale":
        advantages = estimators.scale_only(advantages, mask, group)
    if config.entropy_share < 1.0:
        advantages = estimators.keep_high_entropy(advantages, mask, old.entropy, share=config.entropy_share)
    if config.truncated == "drop":
        advantages = torch.where(batch.terminated[:, None], advantages, 0.0)
    return advantages


def _by_critic(config: Gae, rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages with the lambda of the policy, critic targets with that of the critic."""
    lam: float | Tensor = config.lam
    if config.length_adaptive is not None:
        lam = estimators.length_adaptive_lambda(mask, alpha=config.length_adaptive, dtype=rewards.dtype)

    def estimate(lam: float | Tensor) -> tuple[Tensor, Tensor]:
        if config.macro_size == 1:
            return estimators.gae(rewards, values, mask, after, gamma=config.gamma, lam=lam)
        return estimators.macro_gae(
            rewards, values, mask, after, size=config.macro_size, gamma=config.gamma, lam=lam
        )  # fmt: skip

    advantages, returns = estimate(lam)
    if config.lam_critic is not None:
        returns = estimate(config.lam_critic)[1]
    return advantages, returns


def _streams(config: PerPart, rewards: TokenRewards) -> list[estimators.Stream]:
    """The parts of the reward, each freed of its weight; one that does not count in this step has no stream."""
    streams = [estimators.Stream(torch.zeros_like(rewards.total))]
    for name, values in rewards.parts.items():
        size, own = abs(rewards.weights.get(name, 1.0)), config.of(name)
        if size:
            abstained = rewards.abstained.get(name)
            streams.append(estimators.Stream(values / size, size, own.gamma, own.by, own.scale, abstained))
    return streams


def _estimate(config: CreditConfig, rewards: Tensor, mask: Tensor, group: Tensor) -> Tensor:
    """Advantages without a critic, by the estimator that the configuration names."""
    match config.type:
        case "reward_to_go":
            return estimators.reward_to_go(rewards, mask, gamma=config.gamma)
        case "group_relative":
            return estimators.group_relative(rewards, mask, group, scale_by_std=config.scale_by_std)
        case "group_process":
            return estimators.group_process(rewards, mask, group, gamma=config.gamma, scale_by_std=config.scale_by_std)
        case "leave_one_out":
            return estimators.leave_one_out(rewards, mask, group)
    if isinstance(config, LeaveOneOutProcess | Redistributed):
        return estimators.leave_one_out_process(rewards, mask, group, gamma=config.gamma)
    raise ValueError(f"credit.type {config.type} needs a critic")


def _apart_if_silent(rewards: TokenRewards, group: Tensor) -> Tensor:
    """The groups, with each row that a part of the reward abstains on in one of its own."""
    alone = group.max() + 1 + torch.arange(len(group), device=group.device)
    for abstained in rewards.abstained.values():
        group = torch.where(abstained.to(group.device), alone, group)
    return group


def _among_speakers(config: CreditConfig, rewards: TokenRewards, mask: Tensor, group: Tensor) -> Tensor:
    """Advantages where a row that a part abstains on is no baseline for that part, and is not compared by it.

    Estimators with a mean as baseline are linear in the reward, so the parts that abstain are credited one by one, each
    among the rows that it speaks about. The standard deviation of `group_relative` is that of the sum.
    """
    scale = config.type == "group_relative" and config.scale_by_std
    linear = config.model_copy(update={"scale_by_std": False}) if scale else config
    common = torch.zeros_like(rewards.total)
    for name, values in rewards.parts.items():
        if name not in rewards.abstained:
            common = common + values
    advantages = _estimate(linear, common, mask, group)
    for name, abstained in rewards.abstained.items():
        rows = (~abstained).nonzero()[:, 0]
        if len(rows):
            advantages[rows] += _estimate(linear, rewards.parts[name][rows], mask[rows], group[rows])
    if scale:
        first = mask & (mask.cumsum(1) == 1)
        advantages = estimators.group_relative(torch.where(first, advantages, 0.0), mask, group, scale_by_std=True)
    return advantages
