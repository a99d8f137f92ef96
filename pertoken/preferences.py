"""Log-probs of given answers -> losses of supervised and preference training: pure functions.

A preference method is a *score* of every token and a *link* from sums of scores to a loss:

    method   score of token t                             link of the sums s
    DPO      beta (lp - lp_ref)                           -log sigmoid(s_chosen - s_rejected)
    TDPO     beta (lp - lp_ref + alpha KL(ref || pi))     the same
    SimPO    beta lp / |y|                                -log sigmoid(s_chosen - s_rejected - gamma)
    IPO      lp - lp_ref                                  (s_chosen - s_rejected - 1 / (2 beta))^2
    KTO      beta (lp - lp_ref)                           1 - sigmoid(+-(s - beta z))

Where the pairs are samples of the policy itself, DPO is a policy gradient, and its advantages are `online_dpo`.

The score is what a method learns to pay each token: after training it is a reward (`rewards/implicit.py`).
`lp` is the log-prob of a token under the policy that is trained, `lp_ref` under the frozen reference. Per-token
tensors are `[B, T]` and 0 where `action_mask` is False; what lies in masked cells, NaN included, reaches neither
results nor gradients. Reference log-probs are constants to the gradient. N pairs, B answers.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def negative_log_likelihood(
    logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    mean_logprobs: Float[Tensor, "B T"] | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "B T"]:
    """The loss of supervised fine-tuning at each token of the answer, `-lp`; prompts have none (completion-only).

    With `label_smoothing` e it is (1 - e) times that and e times the mean of -log p over the vocabulary, whose log p
    `mean_logprobs` are the means of: the cross-entropy to a target that gives the share e to all tokens alike, as in
    `torch.nn.functional.cross_entropy`. Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, sec. 7.
    Raises ValueError for `label_smoothing` without `mean_logprobs`.

    >>> lp, mask = torch.tensor([[-9.0, -2.0]]), torch.tensor([[False, True]])
    >>> negative_log_likelihood(lp, mask)
    tensor([[0., 2.]])
    >>> negative_log_likelihood(lp, mask, torch.tensor([[-9.0, -4.0]]), label_smoothing=0.1)
    tensor([[0.0000, 2.2000]])
    """
    losses = torch.where(action_mask, -logprobs, 0.0)
    if not label_smoothing:
        return losses
    if mean_logprobs is None:
        raise ValueError("label_smoothing needs the mean log-probs over the vocabulary")
    return (1 - label_smoothing) * losses - label_smoothing * torch.where(action_mask, mean_logprobs, 0.0)


def log_ratios(
    logprobs: Float[Tensor, "B T"], ref_logprobs: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """`lp - lp_ref` of each token; times beta the implicit reward of DPO, whose sum is that of the whole answer.

    Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, sec. 4; by tokens: Rafailov et al. 2024,
    https://arxiv.org/abs/2404.12358.

    >>> log_ratios(torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, -3.0]]), torch.tensor([[False, True]]))
    tensor([[0., 2.]])
    """
    return torch.where(action_mask, logprobs - ref_logprobs.detach(), 0.0)


def tdpo_scores(
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    forward_kl: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    chosen: Bool[Tensor, " B"],
    *,
    beta: float,
    alpha: float | None = 0.5,
) -> Float[Tensor, "B T"]:
    """Scores of TDPO: those of DPO, and KL(ref || policy) over the whole vocabulary at each token.

        TDPO1 (alpha None)   beta (lp - lp_ref + KL)
        TDPO2                beta (lp - lp_ref + alpha KL), without gradient through the KL of chosen answers

    The KL of the rejected answer exceeding that of the chosen one lowers the margin, so it is held back.
    Zeng et al. 2024, https://arxiv.org/abs/2404.11999, eq. 13 and 17.

    >>> one, yes = torch.ones(1, 1), torch.tensor([[True]])
    >>> tdpo_scores(-one, -3 * one, 0.5 * one, yes, torch.tensor([True]), beta=0.1, alpha=0.5)
    tensor([[0.2250]])
    """
    kl = torch.where(action_mask, forward_kl, 0.0)
    if alpha is not None:
        kl = alpha * torch.where(chosen[:, None], kl.detach(), kl)
    return beta * (log_ratios(logprobs, ref_logprobs, action_mask) + kl)


def simpo_scores(
    logprobs: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"], *, beta: float
) -> Float[Tensor, "B T"]:
    """Scores of SimPO, `beta lp / |y|`: without a reference, and no answer earns by its length.

    Meng et al. 2024, https://arxiv.org/abs/2405.14734, eq. 4.

    >>> simpo_scores(torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[False, True, True]]), beta=2.0)
    tensor([[ 0., -1., -3.]])
    """
    return beta * torch.where(action_mask, logprobs, 0.0) / action_mask.sum(1, keepdim=True).clamp_min(1)


def bradley_terry(
    chosen: Float[Tensor, " N"],
    rejected: Float[Tensor, " N"],
    *,
    margin: float = 0.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " N"]:
    """`-log sigmoid(s_chosen - s_rejected - margin)` of each pair: log 2 where nothing is known yet.

    With `label_smoothing` e it is (1 - e) times that and e times the loss of the pair the other way round: for
    labels of which a share e is wrong. DPO: https://arxiv.org/abs/2305.18290, eq. 7; margin: SimPO; smoothing: Mitchell
    2023, https://ericmitchell.ai/cdpo.pdf.

    >>> bradley_terry(torch.tensor([0.2]), torch.tensor([-0.1]))
    tensor([0.5544])
    """
    difference = chosen - rejected - margin
    return -(1 - label_smoothing) * logsigmoid(difference) - label_smoothing * logsigmoid(-difference)


def online_dpo(
    rewards: Float[Tensor, "B T"],
    logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    group: Int[Tensor, " B"],
    *,
    beta: float,
) -> Float[Tensor, "B T"]:
    """Advantages that prefer, of each prompt's samples, the best paid one to the worst; the others learn nothing.

        A = +-beta sigmoid(-beta (h_best - h_worst)) at each action of the two          h = sum_t (lp - lp_ref)

    The loss `-lp A` has the gradient of DPO's loss of the pair, beta pulling back to the reference included, while the
    policy is the one that `logprobs` are of: in the first optimiser step on the samples. What tokens earn is added up.
    Where several are the best, or the worst, it is the mean over all of their pairs; where all earn the same, 0.
    Guo et al. 2024, https://arxiv.org/abs/2402.04792, with a reward in the place of the judge.

    >>> lp, one = torch.full((2, 1), -1.0), torch.ones(2, 1)
    >>> online_dpo(torch.tensor([[0.0], [2.0]]), lp, lp, one.bool(), torch.tensor([7, 7]), beta=0.1)
    tensor([[-0.0500],
            [ 0.0500]])
    """
    totals = torch.where(action_mask, rewards, 0.0).sum(1)
    ratios = log_ratios(logprobs.detach(), ref_logprobs, action_mask).sum(1)
    weights = torch.zeros_like(ratios)
    for rows in (torch.nonzero(group == g)[:, 0] for g in group.unique()):
        paid = totals[rows]
        if paid.max() > paid.min():
            best, worst = rows[paid == paid.max()], rows[paid == paid.min()]
            push = beta * torch.sigmoid(beta * (ratios[worst] - ratios[best, None])) / (len(best) * len(worst))
            weights[best], weights[worst] = push.sum(1), -push.sum(0)
    return torch.where(action_mask, weights[:, None], 0.0)


def ipo_loss(chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"], *, beta: float) -> Float[Tensor, " N"]:
    """`(h_chosen - h_rejected - 1 / (2 beta))^2` of each pair: a margin is a goal, not to be passed.

    h are sums of `log_ratios` over whole answers, as in the paper (TRL takes their means over tokens).
    Azar et al. 2023, https://arxiv.org/abs/2310.12036, eq. 17.

    >>> ipo_loss(torch.tensor([2.0]), torch.tensor([-1.0]), beta=0.1)
    tensor([4.])
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


def kto_loss(
    ratios: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    baseline: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """Loss of each answer by itself, desirable or not: no pairs are needed.

        desirable     w_d (1 - sigmoid(beta (h - z)))
        undesirable   w_u (1 - sigmoid(beta (z - h)))

    h are sums of `log_ratios`; z, the `baseline`, is a constant to the gradient (`kto_baseline`).
    Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, eq. 7.

    >>> kto_loss(torch.tensor([2.0, -1.0]), torch.tensor([True, False]), torch.tensor(0.05), beta=0.1)
    tensor([0.4514, 0.4738])
    """
    gain = beta * (ratios - baseline.detach())
    good = desirable_weight * torch.sigmoid(-gain)
    bad = undesirable_weight * torch.sigmoid(gain)
    return torch.where(desirable, good, bad)


def kto_baseline(ratios: Float[Tensor, " M"]) -> Float[Tensor, ""]:
    """z of KTO: what an answer that has nothing to do with its prompt gets, at least 0.

    `ratios` are sums of `log_ratios` of prompts with the answers of *other* prompts, of the whole step: their mean
    stands for the KL of policy and reference. https://arxiv.org/abs/2402.01306, sec. 4.1.

    >>> kto_baseline(torch.tensor([0.3, -0.1])), kto_baseline(torch.tensor([-0.3]))
    (tensor(0.1000), tensor(0.))
    """
    return ratios.detach().sum().div(max(len(ratios), 1)).clamp_min(0.0)


def outcome_loss(ratios: Float[Tensor, " B"], outcomes: Float[Tensor, " B"], *, beta: float) -> Float[Tensor, " B"]:
    """Cross-entropy of sigmoid(beta h) against the outcome in [0, 1]: how PRIME trains its implicit reward online.

    h are sums of `log_ratios` of the reward model over whole answers. Cui et al. 2025,
    https://arxiv.org/abs/2502.01456, eq. 5.

    >>> outcome_loss(torch.tensor([0.4, -0.6]), torch.tensor([1.0, 0.0]), beta=0.05).mean()
    tensor(0.6807)
    """
    return softplus(beta * ratios) - outcomes * beta * ratios
