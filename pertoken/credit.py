"""Rewards of tokens `r[b, t]` -> advantages of tokens `A[b, t]`: pure functions.

Time is counted in a row's actions: prompt, tool and padding cells take no time, so gamma discounts what the
policy did and not how long a tool replied. The cell `[b, t]` speaks of token `t` itself; results are 0 where
`action_mask` is False.

What lies in masked cells of `values` and `advantages` is never read, NaN included. Rewards are different: a
reward that nobody can earn is a mistake upstream, so a finite nonzero reward on a masked cell raises
`ValueError` (move it to the last action before it). NaN and infinity there are taken for padding garbage.

Group ids are arbitrary integers, rows of a group need not be neighbours. Statistics are those of the rows
that are passed: call these functions on the whole batch, before it is split for the update.

Estimators map rewards to advantages:

| function | baseline | exact policy gradient? (held by tests/test_exact_gradient.py) |
|---|---|---|
| `reward_to_go` | none | yes |
| `gae` | the critic | with lam = 1 for any critic; with any lam for the true value function |
| `leave_one_out` | return of the other rows | yes |
| `leave_one_out_process` | return-to-go of the other rows at the same action | yes |
| `group_relative` | mean of the group, the row included | times (G-1)/G; no with `scale_by_std` |
| `group_process` | mean over the group's scored tokens | no |
| `self_critical` | return of the greedy answer | yes |
| `monte_carlo` | mean return of rollouts from the state that a step of the text begins in | yes |
| `optimal_token_baseline` | weighted return-to-go of the group, the row included | no (of order 1/G) |
| `macro_gae` | the critic, averaged over macro actions | with lam = 1 and size = 1 for any critic; else no |
| `per_part` | of each part its own | with `scale="none"` and `by="token"` |

Transforms `(advantages, action_mask, group) -> advantages` can be chained: `whiten`, `scale_only`,
`center_by_group`, `clip`. `keep_high_entropy` and `entropy_shaped` weigh advantages by the entropy of their tokens.
`redistribute`, `leave_one_token_out`, `shapley` and `prefix_differences` make token rewards out of one number for the
whole text.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def reward_to_go(
    rewards: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    gamma: float,
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T"]:
    """Discounted sum of the rewards from each action on.

        G_k = r_k + gamma * G_{k+1}          G_K = bootstrap

    k counts a row's K actions. `bootstrap` is what the state after the last action is still worth
    (`bootstrap_values`); None means nothing, for terminated and truncated rows alike.
    Williams 1992, https://doi.org/10.1007/BF00992696; Sutton et al. 2000 for dropping past rewards.

    >>> mask = torch.tensor([[False, True, False, True]])  # prompt, action, tool, action
    >>> reward_to_go(torch.tensor([[0.0, 1.0, 0.0, 2.0]]), mask, gamma=0.5)
    tensor([[0., 2., 0., 2.]])
    """
    rewards = _earned(rewards, action_mask)
    return _discounted_sum(
        rewards, action_mask, gamma, rewards.new_zeros(len(rewards)) if bootstrap is None else bootstrap
    )


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"],
    *,
    gamma: float,
    lam: float | Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalised advantage estimates, and the critic's regression targets A + V.

        delta_k = r_k + gamma * V_{k+1} - V_k          A_k = delta_k + gamma * lam * A_{k+1}

    k counts a row's K actions, so V_{k+1} is the value at the row's next action, however long a tool replied
    in between. V_K is `bootstrap`: 0 if the row ended by itself, the critic's value of the cut-off state if
    it was truncated (`bootstrap_values`). lam = 1 gives A + V = reward-to-go; lam = 0 the TD error. One lam for each
    row is allowed (`length_adaptive_lambda`).
    Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.

    >>> one = torch.ones(1, 2)
    >>> gae(torch.tensor([[0.0, 1.0]]), 0.5 * one, one.bool(), torch.zeros(1), gamma=1.0, lam=1.0)[0]
    tensor([[0.5000, 0.5000]])
    """
    rewards = _earned(rewards, action_mask)
    next_values = torch.cat([values, bootstrap[:, None]], 1).gather(1, _next_action(action_mask))
    deltas = rewards + gamma * next_values - values
    advantages = _discounted_sum(deltas, action_mask, gamma * lam, torch.zeros_like(bootstrap))
    return advantages, torch.where(action_mask, advantages + values, 0.0)


def length_adaptive_lambda(
    action_mask: Bool[Tensor, "B T"], *, alpha: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " B"]:
    """A lambda for each row that grows with its number of actions L, so that the reward at the end reaches the start.

        lam = max(0, 1 - 1 / (alpha * L))

    The published formula is negative below 1 / alpha actions (20, with its alpha of 0.05); it is held at 0 there.
    VAPO: Yue et al. 2025, https://arxiv.org/abs/2504.05118, sec. 4.1.

    >>> length_adaptive_lambda(torch.ones(1, 40).bool(), alpha=0.05)
    tensor([0.5000])
    """
    lengths = action_mask.sum(1).clamp_min(1).to(dtype)
    return (1.0 - 1.0 / (alpha * lengths)).clamp_min(0.0)


def macro_gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"],
    *,
    size: int,
    gamma: float,
    lam: float | Float[Tensor, " B"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """`gae` over macro actions of `size` actions each; every action gets advantage and target of its macro action.

        R_m = sum of r in m          V_m = mean of V in m          delta_m = R_m + gamma * V_{m+1} - V_m

    The last macro action of a row may be shorter. gamma and lam count macro actions. Rewards are summed as the paper
    has it; its published code averages them, which shrinks a KL penalty `size`-fold. size = 1 is `gae`.
    MA-RLHF: Chai et al. 2024, https://arxiv.org/abs/2410.02743, sec. 3.2.

    >>> one = torch.ones(1, 4)
    >>> macro_gae(one, 0 * one, one.bool(), torch.zeros(1), size=2, gamma=1.0, lam=1.0)[0]
    tensor([[4., 4., 2., 2.]])
    """
    macro = _action_index(action_mask) // size
    width = int(macro.max()) + 1 if macro.numel() else 1
    empty = rewards.new_zeros(len(rewards), width)
    members = empty.scatter_add(1, macro, action_mask.to(rewards.dtype))
    summed = empty.scatter_add(1, macro, _earned(rewards, action_mask))
    means = empty.scatter_add(1, macro, torch.where(action_mask, values, 0.0)) / members.clamp_min(1)
    advantages, returns = gae(summed, means, members > 0, bootstrap, gamma=gamma, lam=lam)
    return (
        torch.where(action_mask, advantages.gather(1, macro), 0.0),
        torch.where(action_mask, returns.gather(1, macro), 0.0),
    )


def bootstrap_values(terminated: Bool[Tensor, " B"], values_after_last: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """What each row is still worth after its last action: 0 if it ended by itself, V if it was cut off.

    Pardo et al. 2018, Time limits in reinforcement learning, https://arxiv.org/abs/1712.00378.

    >>> bootstrap_values(torch.tensor([True, False]), torch.tensor([0.5, 0.5]))
    tensor([0.0000, 0.5000])
    """
    return torch.where(terminated, 0.0, values_after_last)


def discount_weights(
    action_mask: Bool[Tensor, "B T"], gamma: float, *, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "B T"]:
    """gamma^k at the k-th action (k from 0): the factor that the discounted objective's gradient carries.

        grad E[sum_k gamma^k r_k] = E[sum_k gamma^k * grad(log pi_k) * A_k]

    Practice drops it (late tokens would hardly learn); what is left for gamma < 1 is then not the gradient
    of the discounted return. Nota & Thomas 2020, https://arxiv.org/abs/1906.07073.

    >>> discount_weights(torch.tensor([[False, True, False, True]]), 0.5)
    tensor([[0.0000, 1.0000, 0.0000, 0.5000]])
    """
    return torch.where(action_mask, gamma ** _action_index(action_mask).to(dtype), 0.0)


def group_relative(
    rewards: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    scale_by_std: bool,
    eps: float = 1e-4,
) -> Float[Tensor, "B T"]:
    """Each row's total reward against its group, given to every action of the row.

        A_i = R_i - mean_g R          divided by (std_g R + eps) if `scale_by_std`; std with G - 1

    Equal totals, and a group of one, give exactly 0. *When* within the row a reward fell is lost: see
    `has_token_level_rewards`, and `leave_one_out_process` for the estimator that keeps it.
    GRPO: Shao et al. 2024, https://arxiv.org/abs/2402.03300, sec. 4.1.2. Without the std, Dr. GRPO: Liu et
    al. 2025, https://arxiv.org/abs/2503.20783.

    >>> rewards, group = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([7, 7])
    >>> group_relative(rewards, torch.ones(2, 2).bool(), group, scale_by_std=False)
    tensor([[ 1.,  1.],
            [-1., -1.]])
    """
    totals = _earned(rewards, action_mask).sum(1, keepdim=True)
    centered, variance = _moments(totals, torch.ones_like(totals, dtype=torch.bool), group, unbiased=True)
    return torch.where(
        action_mask, _divide(centered, variance.sqrt() + eps, variance) if scale_by_std else centered, 0.0
    )


def group_process(
    rewards: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    gamma: float,
    scale_by_std: bool,
    eps: float = 1e-4,
    scored: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Rewards of scored tokens normalised over the group's scored tokens, then summed to go.

        n_t = r_t - mean_g r  [/ (std_g r + eps)]  where scored, else 0          A_k = n_k + gamma * A_{k+1}

    Only scored tokens enter mean and std; otherwise the zeros of the tokens that nobody judged would drown
    them. `scored` defaults to `rewards != 0`, which cannot tell a judged 0 from no judgement: pass the mask
    if a score can be 0. It is not an unbiased gradient: how many centred terms a token collects depends on
    the length of its own row. A group with fewer than two scored tokens gives 0.
    Shao et al. 2024, https://arxiv.org/abs/2402.03300, sec. 4.1.3 (process supervision).

    >>> rewards, group = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0]]), torch.tensor([7, 7])
    >>> group_process(rewards, torch.ones(2, 3).bool(), group, gamma=1.0, scale_by_std=False)
    tensor([[0., 1., 1.],
            [0., 0., 0.]])
    """
    rewards = _earned(rewards, action_mask)
    scored = action_mask & (rewards != 0 if scored is None else scored)
    centered, variance = _moments(rewards, scored, group, unbiased=True)
    normalised = _divide(centered, variance.sqrt() + eps, variance) if scale_by_std else centered
    return reward_to_go(normalised, action_mask, gamma=gamma)


def leave_one_out(
    rewards: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """Each row's total reward minus the mean total of the *other* rows of its group, at every action.

        A_i = R_i - sum_{j != i} R_j / (G - 1) = G / (G - 1) * (R_i - mean_g R)

    Unbiased, since the baseline of a row does not depend on the row. A group of one has no others: its
    baseline is 0 and A = R (plain REINFORCE), unlike `group_relative`, where it learns nothing.
    RLOO: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; Kool et al. 2019.

    >>> rewards, group = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([7, 7])
    >>> leave_one_out(rewards, torch.ones(2, 2).bool(), group)
    tensor([[ 2.,  2.],
            [-2., -2.]])
    """
    totals = _earned(rewards, action_mask).sum(1, keepdim=True)
    return torch.where(action_mask, _minus_mean_of_others(totals, group), 0.0)


def leave_one_out_process(
    rewards: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"], *, gamma: float
) -> Float[Tensor, "B T"]:
    """Reward-to-go of each action minus the other rows' mean reward-to-go at the same action index.

        A_ik = G_ik - sum_{j != i} G_jk / (G - 1)          G_ik = r_ik + gamma * G_i,k+1

    k counts actions, so rows whose tool replies differ in length are still compared action by action. A row
    that is over stays in an absorbing state without reward: G_jk = 0 beyond its end, which keeps the divisor
    G - 1 for all k. Unbiased, since the baseline of a row depends on the other rows only. A group of one
    has baseline 0: A = G. With one reward at the end of equally long rows and gamma = 1 this is RLOO.

    >>> rewards, group = torch.tensor([[1.0, 3.0], [1.0, 0.0]]), torch.tensor([7, 7])
    >>> leave_one_out_process(rewards, torch.ones(2, 2).bool(), group, gamma=1.0)
    tensor([[ 3.,  3.],
            [-3., -3.]])
    """
    returns, index = reward_to_go(rewards, action_mask, gamma=gamma), _action_index(action_mask)
    # scatter_add: masked cells share an index with an action, and add their 0 to it
    by_action = torch.zeros_like(returns).scatter_add(1, index, returns)
    return torch.where(action_mask, _minus_mean_of_others(by_action, group).gather(1, index), 0.0)


def self_critical(
    rewards: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], greedy: Float[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """Each row's total reward minus that of the greedy answer to the same prompt, at every action.

        A_i = R_i - R(greedy)

    Unbiased: the greedy answer depends on the policy, not on the sample. A sample that does as well as the greedy
    answer teaches nothing. SCST: Rennie et al. 2017, https://arxiv.org/abs/1612.00563, eq. 9; for language models
    ReMax: Li et al. 2023, https://arxiv.org/abs/2310.10505.

    >>> self_critical(torch.tensor([[0.0, 3.0]]), torch.ones(1, 2).bool(), torch.tensor([1.0]))
    tensor([[2., 2.]])
    """
    totals = _earned(rewards, action_mask).sum(1)
    return torch.where(action_mask, (totals - greedy)[:, None], 0.0)


def optimal_token_baseline(
    rewards: Float[Tensor, "B T"],
    energies: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    gamma: float,
    eps: float = 1e-8,
) -> Float[Tensor, "B T"]:
    """Reward-to-go minus the group's mean of it at the same action, rows weighted by their gradients so far.

        A_ik = G_ik - sum_j W_jk G_jk / (sum_j W_jk + eps)          W_ik = sum_{s <= k} energy_is

    `energies` are the squared norms of the score of each token in the logits, 1 - 2 pi(y) + sum_v pi(v)^2; 1 - pi(y)
    has the same mean over y and needs no pass over the vocabulary. The weighted mean is what makes the variance of the
    gradient least. Rows that are over take no part; where one row of the group is left its baseline is 0, since it
    would be its own. The row itself is in its baseline: a bias of order 1/G.
    Optimal token baseline, 2026 (PMLR 306), as verl implements it (with its `handle_zero_tail`).

    >>> rewards, group = torch.tensor([[0.0, 3.0], [1.0, 0.0]]), torch.tensor([7, 7])
    >>> energies = torch.tensor([[0.75, 0.0], [0.25, 0.0]])
    >>> optimal_token_baseline(rewards, energies, torch.ones(2, 2).bool(), group, gamma=1.0, eps=0.0)
    tensor([[ 0.5000,  0.7500],
            [-1.5000, -2.2500]])
    """
    returns, index = reward_to_go(rewards, action_mask, gamma=gamma), _action_index(action_mask)
    weights = torch.where(action_mask, torch.where(action_mask, energies, 0.0).cumsum(1), 0.0)
    empty = torch.zeros_like(returns)
    by_action, weight = empty.scatter_add(1, index, weights * returns), empty.scatter_add(1, index, weights)
    alive = _over_group(empty.scatter_add(1, index, action_mask.to(returns.dtype)), group, "sum")
    total = _over_group(weight, group, "sum") + eps
    baseline = torch.where((alive > 1) & (total > 0), _over_group(by_action, group, "sum") / total, 0.0)
    return torch.where(action_mask, returns - baseline.gather(1, index), 0.0)


def monte_carlo(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    starts: Bool[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """What each step of a row added to the total reward that was to be expected, at every action of the step.

        A_t = V(state behind the step of t) - V(state before it)          V behind the last step: what the row earned

    `starts` marks the first action of each step; `values` there is the mean total reward (of the whole text, gamma 1)
    of rollouts from the state before it. Since totals are of whole texts, rewards on the way need no term of their own
    and may come from anywhere in the text. Unbiased, however few rollouts: V before a step does not depend on it, and
    a step ends where the tokens up to there say so. Raises ValueError if a row's first action starts no step.
    VinePPO: Kazemnejad et al. 2024, https://arxiv.org/abs/2410.01679, sec. 4.

    >>> starts = torch.tensor([[True, False, True]])
    >>> values = torch.tensor([[0.5, 0.0, 0.75]])
    >>> monte_carlo(torch.tensor([[0.0, 0.0, 1.0]]), values, starts, torch.ones(1, 3).bool())
    tensor([[0.2500, 0.2500, 0.2500]])
    """
    starts = starts & action_mask
    step = starts.cumsum(1) - 1
    if bool((step[action_mask] < 0).any()):
        raise ValueError("the first action of a row starts no step: mark it, and give the value of the state before it")
    totals = _earned(rewards, action_mask).sum(1, keepdim=True)
    width = rewards.shape[1]
    place = torch.where(starts, step, width + 1)
    known = totals.expand(-1, width + 2).scatter(1, place, torch.where(starts, values, 0.0))
    step = step.clamp_min(0)
    return torch.where(action_mask, known.gather(1, step + 1) - known.gather(1, step), 0.0)


@dataclass(frozen=True)
class Stream:
    """One part of the reward, and how it becomes advantages of its own before the parts are added."""

    rewards: Float[Tensor, "B T"]
    """Without its weight: dividing by the spread would cancel it."""
    weight: float = 1.0
    gamma: float = 1.0
    """Discount per action, with `by="token"`."""
    by: Literal["token", "episode"] = "token"
    """Reward-to-go against the other rows at the same action (`leave_one_out_process`), or the total of the row against
    the mean of its group, at every action (`group_relative`)."""
    scale: Literal["group", "batch", "none"] = "group"
    """Whose totals the advantages are divided by the standard deviation of."""
    abstained: Bool[Tensor, " B"] | None = None
    """Rows that the part has no opinion on: advantage 0, and no baseline for others."""


def per_part(
    streams: Sequence[Stream], action_mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"], *, eps: float = 1e-4
) -> Float[Tensor, "B T"]:
    """Advantages of each part of the reward in its own scale, added up by weight.

        A = sum_p w_p * A_p / (std R_p + eps)          R_p: totals of the rows, std with n - 1

    A part whose totals lie close together counts as much as one that varies widely, and rows that earn the same
    total by different parts stay distinct. The spread is one of rows and not of tokens, so long rows do not
    weigh more in it; a part without spread gives exactly 0. With `by="episode"` this is GDPO (Liu et al. 2026,
    https://arxiv.org/abs/2601.05242) before its last step, which `whiten` makes; `by="token"` keeps
    which token earned what. With one gamma and `scale="none"` it is `leave_one_out_process` of the weighted sum.

    >>> streams = [Stream(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), weight=2.0, by="episode", scale="none")]
    >>> per_part(streams, torch.ones(2, 2).bool(), torch.tensor([7, 7]))
    tensor([[ 2.,  2.],
            [-2., -2.]])
    """
    advantages = torch.zeros_like(streams[0].rewards)
    for stream in streams:
        speaking = torch.ones_like(group, dtype=torch.bool) if stream.abstained is None else ~stream.abstained
        rows = speaking.nonzero()[:, 0]
        if len(rows):
            own = _in_own_scale(stream, stream.rewards[rows], action_mask[rows], group[rows], eps)
            advantages[rows] += stream.weight * own
    return advantages


def _in_own_scale(
    stream: Stream,
    rewards: Float[Tensor, "R T"],
    action_mask: Bool[Tensor, "R T"],
    group: Int[Tensor, " R"],
    eps: float,
) -> Float[Tensor, "R T"]:
    if stream.by == "token":
        advantages = leave_one_out_process(rewards, action_mask, group, gamma=stream.gamma)
    else:
        advantages = group_relative(rewards, action_mask, group, scale_by_std=False)
    if stream.scale == "none":
        return advantages
    totals = _earned(rewards, action_mask).sum(1, keepdim=True)
    among = group if stream.scale == "group" else torch.zeros_like(group)
    _, variance = _moments(totals, torch.ones_like(totals, dtype=torch.bool), among, unbiased=True)
    return _divide(advantages, variance.sqrt() + eps, variance)


def has_token_level_rewards(rewards: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]) -> bool:
    """True if some action other than its row's last carries a reward.

    Outcome estimators (`group_relative`, `leave_one_out`) sum such rewards over the row and thereby lose
    which token earned them: ask this first, and tell the user.

    >>> has_token_level_rewards(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[True, True, False]]))
    False
    """
    is_last = action_mask & (_next_action(action_mask) == action_mask.shape[1])
    return bool((_earned(rewards, action_mask)[~is_last] != 0).any())


def whiten(
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "B T"]:
    """Advantages with mean 0 and variance 1 over all actions of the batch, whatever their group.

        (A - mean) / sqrt(var + eps)          var divided by n - 1 if `unbiased`, else by n

    Fewer than two actions, or no spread, give exactly 0.

    >>> mask, group = torch.tensor([[True, True, False]]), torch.tensor([0])
    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), mask, group, unbiased=False)
    tensor([[-1.,  1.,  0.]])
    """
    centered, variance = _moments(advantages, action_mask, torch.zeros_like(group), unbiased=unbiased)
    return torch.where(action_mask, _divide(centered, (variance + eps).sqrt(), variance), 0.0)


def scale_only(
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Float[Tensor, "B T"]:
    """Advantages divided by their standard deviation over all actions of the batch; signs are kept.

        A / sqrt(var + eps)          var about the mean, divided by n - 1 if `unbiased`, else by n

    For advantages that already have a baseline. Fewer than two actions, or no spread, leave no scale to
    divide by and give exactly 0, as in `whiten`.

    >>> mask, group = torch.tensor([[True, True, False]]), torch.tensor([0])
    >>> scale_only(torch.tensor([[1.0, 3.0, 9.0]]), mask, group, unbiased=False)
    tensor([[1., 3., 0.]])
    """
    _, variance = _moments(advantages, action_mask, torch.zeros_like(group), unbiased=unbiased)
    return torch.where(action_mask, _divide(advantages, (variance + eps).sqrt(), variance), 0.0)


def center_by_group(
    advantages: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    """Advantages minus the mean over all actions of their group; long rows weigh more in it.

    >>> center_by_group(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.ones(2, 2).bool(), torch.tensor([4, 9]))
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    return _moments(advantages, action_mask, group, unbiased=True)[0]


def clip(
    advantages: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], group: Int[Tensor, " B"], *, limit: float
) -> Float[Tensor, "B T"]:
    """Advantages confined to [-limit, limit].

    This clips what is left after the baseline. To bound raw rewards, do it where they are made.

    >>> clip(torch.tensor([[-3.0, 0.5]]), torch.ones(1, 2).bool(), torch.zeros(1).int(), limit=1.0)
    tensor([[-1.0000,  0.5000]])
    """
    return torch.where(action_mask, advantages.clamp(-limit, limit), 0.0)


def keep_high_entropy(
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """Advantages of the `share` of actions with the highest entropy in the batch, 0 for the others.

    The bound is the linear quantile 1 - share over all actions of the batch; actions that tie with it are kept. The
    number of actions that a loss is divided by does not change, so the loss shrinks with the share.
    Wang et al. 2025, Beyond the 80/20 rule, https://arxiv.org/abs/2506.01939.

    >>> entropy = torch.tensor([[0.0, 2.0, 1.0]])
    >>> keep_high_entropy(torch.ones(1, 3), torch.ones(1, 3).bool(), entropy, share=0.34)
    tensor([[0., 1., 0.]])
    """
    if not bool(action_mask.any()):
        return torch.zeros_like(advantages)
    ordered = entropy[action_mask].sort().values  # torch.quantile refuses more than 16 million entries
    place = (1.0 - share) * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    bound = torch.lerp(ordered[below], ordered[above], place - below)
    return torch.where(action_mask & (entropy >= bound), advantages, 0.0)


def entropy_shaped(
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    *,
    alpha: float = 0.4,
    kappa: float = 2.0,
) -> Float[Tensor, "B T"]:
    """Advantages that are a little larger where the policy was undecided; no sign ever flips.

        A + min(alpha * H, |A| / kappa)          kappa > 1

    Cheng et al. 2025, https://arxiv.org/abs/2506.14758.

    >>> one = torch.ones(1, 1)
    >>> entropy_shaped(-one, one.bool(), 9 * one)
    tensor([[-0.5000]])
    """
    shaped = advantages + torch.minimum(alpha * entropy, advantages.abs() / kappa)
    return torch.where(action_mask, shaped, 0.0)


def redistribute(
    totals: Float[Tensor, " B"],
    weights: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    share: float,
) -> Float[Tensor, "B T"]:
    """Token rewards out of one number a row: a `share` of it spread by `weights`, the rest on the last action.

        r_t = share * R * w_t / sum_s w_s + [t is last] (1 - share) * R

    The sum of a row stays R. Weights may be attention of a reward model's last position (ABC); the policy gradient of
    such rewards with reward-to-go is *not* that of R, since a weight may know what came later. A row whose weights are
    all 0 has everything on its last action.
    ABC: Chan et al. 2024, https://arxiv.org/abs/2402.00782.

    >>> redistribute(torch.tensor([1.0]), torch.tensor([[0.0, 1.0, 3.0]]), torch.ones(1, 3).bool(), share=0.8)
    tensor([[0.0000, 0.2000, 0.8000]])
    """
    weights = torch.where(action_mask, weights, 0.0)
    whole = weights.sum(1, keepdim=True)
    spread = torch.where(whole > 0, share * weights / whole, 0.0)
    last = action_mask & (_next_action(action_mask) == action_mask.shape[1])
    return totals[:, None] * torch.where(last, spread + 1.0 - spread.sum(1, keepdim=True), spread)


Worth = Callable[[Bool[Tensor, "S N"]], Float[Tensor, " S"]]
"""What each of S texts is worth in which only the tokens (or words, or sentences) marked True, of N, are left."""


def leave_one_token_out(worth: Worth, num_tokens: int) -> Float[Tensor, " N"]:
    """What each token adds to the whole: v(all) - v(all without it).

    They do not sum to v(all) - v(none): two tokens that do the same work get nothing, two that need each other get it
    all, twice. N + 1 evaluations.

    >>> leave_one_token_out(lambda kept: kept.all(1).double(), 2)
    tensor([1., 1.], dtype=torch.float64)
    """
    without = torch.ones(num_tokens + 1, num_tokens, dtype=torch.bool)
    without[1:].fill_diagonal_(False)
    values = worth(without)
    return values[0] - values[1:]


def shapley(
    worth: Worth, num_tokens: int, *, num_orders: int | None, generator: torch.Generator | None = None
) -> Float[Tensor, " N"]:
    """What each token adds when it joins, averaged over random orders of joining; over all orders if None (N! of them).

        phi_t = mean over orders of v(those before t, and t) - v(those before t)

    Sums to v(all) - v(none) whatever `num_orders`; unbiased for the Shapley value. Each order is used forwards and
    backwards, which lowers the variance. 2 * num_orders * (N - 1) + 2 evaluations at most, equal ones once.
    Shapley 1953; sampling: Castro et al. 2009, https://doi.org/10.1016/j.cor.2008.04.004.

    >>> shapley(lambda kept: kept.all(1).double(), 2, num_orders=1)
    tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    if num_orders is None:
        orders = torch.tensor(list(itertools.permutations(range(num_tokens))))
    else:
        orders = torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(num_orders)])
        orders = torch.cat([orders, orders.flip(1)])
    rank = orders.argsort(1)
    sizes = torch.arange(num_tokens + 1)[:, None]
    coalitions = (rank[:, None] < sizes).reshape(-1, num_tokens)  # of each order: none, the first, the first two ...
    different, where = torch.unique(coalitions, dim=0, return_inverse=True)
    values = worth(different)[where].reshape(len(orders), num_tokens + 1)
    return values.diff(dim=1).gather(1, rank).mean(0)


def prefix_differences(worth: Worth, num_tokens: int) -> Float[Tensor, " N"]:
    """What each token adds to those before it: v(the first t) - v(the first t - 1).

    Sums to v(all) - v(none). What the tokens before t earned is known before t is chosen, so reward-to-go of these is
    as unbiased as that of one reward at the end, whatever v says of prefixes. N + 1 evaluations.
    RUDDER: Arjona-Medina et al. 2019, https://arxiv.org/abs/1806.07857, sec. 2, with v itself where it learns an LSTM.

    >>> prefix_differences(lambda kept: kept.all(1).double(), 2)
    tensor([0., 1.], dtype=torch.float64)
    """
    return worth(torch.ones(num_tokens + 1, num_tokens).tril(-1).bool()).diff()


def _earned(rewards: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`rewards` with masked cells set to 0; raises if a finite reward would be lost by that."""
    lost = ~action_mask & rewards.isfinite() & (rewards != 0)
    if bool(lost.any()):
        row, column = lost.nonzero()[0].tolist()
        raise ValueError(
            f"rewards: {int(lost.sum())} nonzero cells where action_mask is False, first at row {row}, token {column} "
            f"({rewards[row, column].item():g}); no action can earn them: move each to the last action before it"
        )
    return torch.where(action_mask, rewards, 0.0)


def _discounted_sum(
    x: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    decay: float | Float[Tensor, " B"],
    tail: Float[Tensor, " B"],
) -> Float[Tensor, "B T"]:
    """S_k = x_k + decay * S_{k+1} over a row's actions, S_K = tail; 0 at masked cells."""
    sums, running = torch.zeros_like(x), tail
    for t in reversed(range(x.shape[1])):
        running = torch.where(action_mask[:, t], x[:, t] + decay * running, running)
        sums[:, t] = torch.where(action_mask[:, t], running, 0.0)
    return sums


def _next_action(action_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Column of the first action after each cell; T where none follows."""
    width = action_mask.shape[1]
    columns = torch.where(action_mask, torch.arange(width, device=action_mask.device), width)
    from_here_on = columns.flip(1).cummin(1).values.flip(1)
    return torch.cat([from_here_on[:, 1:], torch.full_like(columns[:, :1], width)], 1)


def _action_index(action_mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """How many actions of the row precede each action; meaningless but in range at masked cells."""
    return (action_mask.cumsum(1) - 1).clamp_min(0)


def _moments(
    x: Float[Tensor, "B W"], counted: Bool[Tensor, "B W"], group: Int[Tensor, " B"], *, unbiased: bool
) -> tuple[Float[Tensor, "B W"], Float[Tensor, "B 1"]]:
    """`x` minus the mean over its group's counted cells (0 elsewhere), and the group's variance, row by row."""
    count = _over_group(counted.to(x.dtype).sum(1, keepdim=True), group, "sum")
    # Shifted by the group's own minimum first: equal numbers then have mean 0 without rounding.
    lowest = _over_group(torch.where(counted, x, torch.inf).amin(1, keepdim=True), group, "amin")
    shifted = torch.where(counted, x - lowest, 0.0)
    mean = _over_group(shifted.sum(1, keepdim=True), group, "sum") / count.clamp_min(1)
    centered = torch.where(counted, shifted - mean, 0.0)
    squares = _over_group(centered.square().sum(1, keepdim=True), group, "sum")
    return centered, squares / (count - 1 if unbiased else count).clamp_min(1)


def _divide(
    x: Float[Tensor, "B W"], scale: Float[Tensor, "B 1"], variance: Float[Tensor, "B 1"]
) -> Float[Tensor, "B W"]:
    """x / scale, and exactly 0 where there was no spread."""
    return torch.where(variance > 0, x / scale, 0.0)


def _minus_mean_of_others(x: Float[Tensor, "B W"], group: Int[Tensor, " B"]) -> Float[Tensor, "B W"]:
    """Each row minus the mean of the other rows of its group, column by column; itself if there are none."""
    size = _over_group(torch.ones_like(x[:, :1]), group, "sum")
    shifted = x - _over_group(x, group, "amin")  # as in `_moments`: equal rows give exactly 0
    others = (_over_group(shifted, group, "sum") - shifted) / (size - 1).clamp_min(1)
    return torch.where(size > 1, shifted - others, x)


def _over_group(x: Float[Tensor, "B W"], group: Int[Tensor, " B"], how: Literal["sum", "amin"]) -> Float[Tensor, "B W"]:
    """For each row, the sum or the minimum over the rows of its group, column by column."""
    ids, slot = torch.unique(group, return_inverse=True)
    start = x.new_zeros(len(ids), x.shape[1])
    return start.scatter_reduce(0, slot[:, None].expand_as(x), x, how, include_self=False)[slot]
