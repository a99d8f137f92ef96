"""Advantages of tokens `A[b, t]` -> losses of tokens `loss[b, t]` -> one number: pure functions.

An objective factors into four choices, each one function:

    level of the ratio -> surrogate per token -> extra terms (KL, entropy) -> `aggregate`

`policy_loss` joins the first three as the trainer calls them; named algorithms are rows in a table of its
keywords. Three policies occur: `sample` drew the tokens (log-probs from the engine), `old` is the trainer's
own score at the same weights, `new` is being trained. `update ratio` means new/old, mismatch means old/sample.

Everything per token is `[B, T]` and 0 where `action_mask` is False (a ratio is 1 there); what lies in masked
cells of the inputs, NaN included, reaches neither results nor gradients. Advantages, old, sample and
reference log-probs are constants to the gradient.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pertoken.types import Credit, PolicyOutput, TokenBatch, TokenLoss

Level = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["policy_gradient", "clipped", "cispo", "dppo"]
Mismatch = Literal["token", "sequence", "geometric"]
Outside = Literal["truncate", "mask"]
KLEstimate = Literal["k2", "k3", "ratio_k3"]
KLLoss = Literal["k2", "k3", "ratio_k3", "exact"]
Over = Literal["token", "sequence", "constant"]

MAX_LOG_RATIO = 20.0
"""Log ratios enter `exp` clamped to +-20 nats, so that one absurd token cannot turn a step into inf or NaN.
Beyond it the gradient through the ratio is 0; no clip range in use reaches that far."""


def ratio(
    new_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    level: Level = "token",
) -> Float[Tensor, "B T"]:
    """Update ratio of each action, with gradient; 1 at masked cells.

        token            w_t = pi_new(y_t) / pi_old(y_t)
        sequence         s   = (prod_t w_t)^(1/L), the same at all L actions of the row (GSPO)
        sequence_token   value of s, gradient of w_t: s * pi_new(y_t) / sg(pi_new(y_t)) (GSPO-token)

    `sequence` mixes the gradients of a row's tokens, so advantages that differ within the row lose their
    place; `sequence_token` keeps it.
    PPO: https://arxiv.org/abs/1707.06347; GSPO: Zheng et al. 2025, https://arxiv.org/abs/2507.18071.

    >>> new, old = torch.tensor([[0.0, -1.0, -0.5]]), torch.tensor([[0.0, -1.0, -1.5]])
    >>> mask = torch.tensor([[False, True, True]])
    >>> ratio(new, old, mask), ratio(new, old, mask, level="sequence")
    (tensor([[1.0000, 1.0000, 2.7183]]), tensor([[1.0000, 1.6487, 1.6487]]))
    """
    new, old = _at_actions(action_mask, new_logprobs, old_logprobs)
    log_ratio = new - old.detach()
    if level != "token":
        row_mean = log_ratio.sum(1, keepdim=True) / action_mask.sum(1, keepdim=True).clamp_min(1)
        own_gradient = (new - new.detach()).nan_to_num()  # 0 with gradient 1; -inf - -inf would be NaN
        log_ratio = row_mean if level == "sequence" else row_mean.detach() + own_gradient
        log_ratio = torch.where(action_mask, log_ratio, 0.0)
    return _bounded_exp(log_ratio)


def policy_gradient(
    new_logprobs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Score-function loss `-log pi(y_t) * A_t`: right for one update on the policy's own samples.

    Williams 1992, https://doi.org/10.1007/BF00992696.

    >>> policy_gradient(torch.tensor([[0.0, -2.0]]), torch.tensor([[9.0, 0.5]]), torch.tensor([[False, True]]))
    tensor([[0., 1.]])
    """
    logprobs, advantages = _at_actions(action_mask, new_logprobs, advantages)
    return torch.where(action_mask, -logprobs * advantages.detach(), 0.0)


def clipped_surrogate(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Float[Tensor, "B T"]:
    """PPO's pessimistic loss: no reward for moving the ratio out of the trust interval.

        l = max(-A w, -A clip(w, 1 - clip_low, 1 + clip_high));  where A < 0 also l = min(l, -A dual_clip)

    `dual_clip` > 1 bounds the loss of a bad token that became much more probable; None leaves it unbounded.
    PPO: https://arxiv.org/abs/1707.06347, eq. 7; dual clip: Ye et al. 2020, https://arxiv.org/abs/1912.09729;
    two-sided ranges: DAPO, https://arxiv.org/abs/2503.14476.

    >>> w, A = torch.tensor([[1.5, 0.5, 1.5, 0.5]]), torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    >>> clipped_surrogate(w, A, torch.ones(1, 4).bool(), clip_low=0.2, clip_high=0.2)
    tensor([[-1.2000, -0.5000,  1.5000,  0.8000]])
    """
    ratio, advantages = _at_actions(action_mask, ratio, advantages.detach())
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return torch.where(action_mask, loss, 0.0)


def cispo(
    new_logprobs: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "B T"]:
    """CISPO's loss: the weight is clipped and not the objective, so that every token keeps a gradient.

        l = -sg(clip(w, 1 - clip_low, 1 + clip_high)) * A * log pi(y_t)

    clip_low = 1 sets no lower bound, as the paper does. The bound is 1 + clip_high as in verl, and not the bare number
    that TRL takes for it. The value of this loss says nothing; its gradient does.
    MiniMax-M1: Chen et al. 2025, https://arxiv.org/abs/2506.13585, sec. 3.1.

    >>> w, mask = torch.tensor([[2.0]]), torch.tensor([[True]])
    >>> cispo(torch.tensor([[-1.0]]), w, torch.tensor([[1.0]]), mask, clip_low=1.0, clip_high=0.5)
    tensor([[1.5000]])
    """
    weights = ratio.detach().clamp(1 - clip_low, 1 + clip_high)
    return torch.where(action_mask, weights * policy_gradient(new_logprobs, advantages, action_mask), 0.0)


def dppo(
    new_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """DPPO's loss, bounded by how far a token's probability has moved and not by its ratio; and the tokens left out.

        l = -sg(min(w, 20)) * A * log pi(y_t)     left out: pi - pi_old > clip_high if A > 0, < -clip_low otherwise

    |pi - pi_old| of the sampled token bounds the total variation from below (the paper's binary form): a rare token may
    grow a hundredfold, a sure one may not fall from 0.99 to 0.8. What moves back is kept, however far it is.
    Qi et al. 2026, https://arxiv.org/abs/2602.04879.

    >>> new, old = torch.tensor([[0.02, 0.8]]).log(), torch.tensor([[0.01, 0.99]]).log()
    >>> dppo(new, old, torch.tensor([[1.0, -1.0]]), torch.ones(1, 2).bool(), clip_low=0.15, clip_high=0.15)
    (tensor([[7.8240, -0.0000]]), tensor([[False,  True]]))
    """
    new, old = _at_actions(action_mask, new_logprobs.detach(), old_logprobs.detach())
    moved = new.exp() - old.exp()
    left_out = action_mask & torch.where(advantages > 0, moved > clip_high, moved < -clip_low)
    weights = torch.where(left_out, 0.0, _bounded_exp(new - old).clamp_max(20.0))
    return weights * policy_gradient(new_logprobs, advantages, action_mask), left_out


def importance_weights(
    old_logprobs: Float[Tensor, "B T"],
    sample_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    high: float,
    low: float = 0.0,
    level: Mismatch = "token",
    outside: Outside = "truncate",
) -> Float[Tensor, "B T"]:
    """Detached weights pi_old / pi_sample: repair the gap between the sampler (or older weights) and the trainer.

        token       rho_t, each token's own
        sequence    prod_t rho_t for all tokens of the row: without bias before it is bounded, of high variance
        geometric   each token's own rho_t, and the row is judged by (prod_t rho_t)^(1/L); only with `mask`

    What exceeds `high` is held there (`truncate`: TIS), or what is outside [low, high] becomes 0 (`mask`: IcePop by
    token, MIS by row). They multiply the surrogate beside the update ratio. Where the sampler's log-probs are already
    used as `old`, the ratio holds them: do not weight again. The loss keeps its full denominator. A NaN log-prob
    from the sampler at an action stays NaN.
    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl; IcePop: https://arxiv.org/abs/2510.18855.

    >>> old, sample = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.0, -3.0]])
    >>> mask = torch.tensor([[False, True, True]])
    >>> importance_weights(old, sample, mask, high=2.0), importance_weights(old, sample, mask, high=2.0, outside="mask")
    (tensor([[0., 1., 2.]]), tensor([[0., 1., 0.]]))
    """
    if outside == "truncate" and (level == "geometric" or low):
        raise ValueError("importance_weights: level='geometric' and low are for outside='mask'")
    old, sample = _at_actions(action_mask, old_logprobs.detach(), sample_logprobs.detach())
    own = old - sample
    row = own.sum(1, keepdim=True).expand_as(own)
    weights = _bounded_exp(row if level == "sequence" else own)
    if outside == "truncate":
        return torch.where(action_mask, weights.clamp_max(high), 0.0)
    judged = weights if level != "geometric" else _bounded_exp(row / action_mask.sum(1, keepdim=True).clamp_min(1))
    # Dropped is what is known to be outside: NaN compares as False, and must not pass for a weight of 0.
    return torch.where(action_mask & ~(judged < low) & ~(judged > high), weights, 0.0)


def effective_share(weights: Float[Tensor, " A"]) -> float:
    """What importance weights leave of a sample, as a share of it: (mean w)^2 / mean w^2; 1 if all are equal.

    Kish 1965, Survey Sampling, sec. 11.7. 0 if there is none, or all are 0.

    >>> effective_share(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    0.75
    """
    squares = weights.square().sum().item()
    return weights.sum().item() ** 2 / (len(weights) * squares) if squares else 0.0


def truncated_importance_weights(
    old_logprobs: Float[Tensor, "B T"],
    sample_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    cap: float,
) -> Float[Tensor, "B T"]:
    """`importance_weights` by token, truncated: min(pi_old / pi_sample, cap), the usual choice.

    >>> old, sample = torch.tensor([[0.0, -1.0, -1.0]]), torch.tensor([[0.0, -1.0, -3.0]])
    >>> truncated_importance_weights(old, sample, torch.tensor([[False, True, True]]), cap=2.0)
    tensor([[0., 1., 2.]])
    """
    return importance_weights(old_logprobs, sample_logprobs, action_mask, high=cap)


def value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    clip: float | None = None,
) -> Float[Tensor, "B T"]:
    """Half the squared error of the critic; with `clip`, the worse of it and the one after a bounded move.

        0.5 * max((V - R)^2, (V_old + clamp(V - V_old, -clip, clip) - R)^2)

    Schulman et al. 2016, https://arxiv.org/abs/1506.02438 (the clip is from OpenAI Baselines' PPO2).

    >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    >>> value_loss(one, zero, one, torch.tensor([[True]]), clip=0.5)
    tensor([[0.1250]])
    """
    values, old_values, returns = _at_actions(action_mask, values, old_values.detach(), returns.detach())
    squares = (values - returns).square()
    if clip is not None:
        squares = torch.maximum(squares, (old_values + (values - old_values).clamp(-clip, clip) - returns).square())
    return 0.5 * squares


def entropy_bonus(entropy: Float[Tensor, "B T"], action_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The loss `-H_t` at actions: minimising it keeps the policy undecided.

    >>> entropy_bonus(torch.tensor([[0.7, 0.5]]), torch.tensor([[False, True]]))
    tensor([[ 0.0000, -0.5000]])
    """
    return torch.where(action_mask, -entropy, 0.0)


def kl_per_token(
    new_logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    estimator: Literal["k1", "k2", "k3"],
) -> Float[Tensor, "B T"]:
    """One-sample estimates of KL(new || ref) at each action, in nats, from tokens that `new` sampled.

        d = log new - log ref        k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d

    As *values*: k1 and k3 are unbiased, k2 is not; k2 and k3 are never negative; k1 summed over a row is the
    estimate of the sequence KL. As *losses* they are something else: see `kl_loss`. Both policies must have
    the same support (full vocabulary or the same kept sets); a token that `ref` forbids costs infinity.
    Schulman 2020, http://joschu.net/blog/kl-approx.html.

    >>> new, ref, mask = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[True]])
    >>> [round(kl_per_token(new, ref, mask, estimator=k).item(), 4) for k in ("k1", "k2", "k3")]
    [1.0, 0.5, 0.3679]
    """
    new, ref = _at_actions(action_mask, new_logprobs, ref_logprobs.detach())
    difference = new - ref
    if estimator == "k1":
        return difference
    return 0.5 * difference.square() if estimator == "k2" else _bounded_exp(-difference) - 1 + difference


def kl_loss(
    new_logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    ref_logprobs: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    estimator: KLEstimate = "ratio_k3",
) -> Float[Tensor, "B T"]:
    """A KL penalty to differentiate. What each choice does to the expected gradient of one token:

        ratio_k3   (new/old) * k3, the ratio with gradient: grad KL(new || ref), off-policy too
        k2         grad KL(new || ref) while new = old
        k3         grad KL(ref || new) while new = old: the *forward* KL, in GRPO's paper all the same
        k1         0: refused here; as a penalty it belongs into the reward

    All of them see a token's own KL only, as `exact_kl` does, and not how it leads to states where the policies differ
    more. The exact gradient of the sequence KL comes from -k1 as a detached *reward* with reward-to-go.
    Tang & Munos 2025, https://arxiv.org/abs/2506.09477; ratio_k3 is DeepSeek-V3.2's.

    >>> new, mask = torch.tensor([[-1.0]]), torch.tensor([[True]])
    >>> kl_loss(new, new, torch.tensor([[-2.0]]), mask)
    tensor([[0.3679]])
    """
    if estimator == "ratio_k3":
        estimates = kl_per_token(new_logprobs, ref_logprobs, action_mask, estimator="k3")
        return ratio(new_logprobs, old_logprobs, action_mask) * estimates
    if estimator not in ("k2", "k3"):
        raise ValueError(f"kl_loss: estimator must be 'k2', 'k3' or 'ratio_k3', got {estimator!r}; k1 has no gradient")
    return kl_per_token(new_logprobs, ref_logprobs, action_mask, estimator=estimator)


def exact_kl(new: PolicyOutput, action_mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """KL(new || ref) at each action, summed over the vocabulary: value and gradient without noise.

    The state is taken as it is: how a token leads to others is not seen, as in `kl_loss`. Raises ValueError if `new`
    was not scored against a reference.
    """
    if new.kl is None:
        raise ValueError("exact KL: score the new policy against the reference (Policy.score(..., against=...))")
    return torch.where(action_mask, new.kl, 0.0)


@dataclass(frozen=True)
class FixedKL:
    """A KL coefficient that stays what it is."""

    coefficient: float

    def update(self, sequence_kl: float, num_episodes: int) -> None:
        """Nothing to do: here so that trainers need not ask which controller they have."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Nothing to load: the coefficient is configuration."""


@dataclass
class AdaptiveKL:
    """A KL coefficient that grows while the KL exceeds `target`, and shrinks below it.

        coefficient *= 1 + clip(KL / target - 1, -0.2, 0.2) * num_episodes / horizon

    KL and target are in nats per *sequence* (k1 summed over a row, averaged over rows), not per token; the
    step is per episode, so it does not depend on the batch size.
    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, sec. 2.2.

    >>> controller = AdaptiveKL(coefficient=0.2, target=6.0, horizon=10_000)
    >>> controller.update(sequence_kl=8.0, num_episodes=256)
    >>> round(controller.coefficient, 6)
    0.201024
    """

    coefficient: float
    target: float
    horizon: int

    def update(self, sequence_kl: float, num_episodes: int) -> None:
        error = min(max(sequence_kl / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * num_episodes / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


def policy_loss(
    new: PolicyOutput,
    old: PolicyOutput,
    ref: PolicyOutput | None,
    credit: Credit,
    batch: TokenBatch,
    *,
    surrogate: Surrogate = "clipped",
    level: Level = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    importance_cap: float | None = None,
    importance_floor: float = 0.0,
    importance_level: Mismatch = "token",
    importance_outside: Outside = "truncate",
    kl_coefficient: float = 0.0,
    kl_estimator: KLLoss = "ratio_k3",
    entropy_coefficient: float = 0.0,
) -> TokenLoss:
    """The policy's loss at each action, not yet reduced.

        l = surrogate * importance weight + kl_coefficient * kl_loss - entropy_coefficient * H

    `level`: ignored by `policy_gradient` and `dppo`; the clips by the former. `importance_cap` None: no mismatch
    weight (it never touches the KL term). `aux`, all detached: `ratio` and `clipped` (1 where a clip changed the
    gradient), with a reference `kl` (k1: its sum over a row is the sequence's), with a cap `importance_weight`.

    >>> score = PolicyOutput(logprobs=torch.tensor([[0.0, -0.7]]), entropy=torch.zeros(1, 2))
    >>> no, yes, one = torch.tensor([[False, False]]), torch.tensor([[True, True]]), torch.tensor([1])
    >>> batch = TokenBatch(yes.int(), yes, torch.tensor([[False, True]]), score.logprobs, score.entropy, yes.int(),
    ...                    one, one.bool(), ("a",))
    >>> policy_loss(score, score, None, Credit(torch.tensor([[0.0, 2.0]])), batch).per_token
    tensor([[ 0., -2.]])
    """
    mask, advantages = batch.action_mask, credit.advantages
    if kl_coefficient and ref is None:
        raise ValueError(f"policy_loss: kl_coefficient is {kl_coefficient} but ref is None; score the reference policy")
    w = ratio(new.logprobs, old.logprobs, mask, level=level)
    if surrogate == "clipped":
        loss = clipped_surrogate(w, advantages, mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip)
        was_clipped = (loss != -w * torch.where(mask, advantages, 0.0)).to(loss.dtype)
    elif surrogate == "cispo":
        loss = cispo(new.logprobs, w, advantages, mask, clip_low=clip_low, clip_high=clip_high)
        was_clipped = (mask & ((w < 1 - clip_low) | (w > 1 + clip_high))).to(loss.dtype)
    elif surrogate == "dppo":
        loss, left_out = dppo(new.logprobs, old.logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
        was_clipped = left_out.to(loss.dtype)
    else:
        loss, was_clipped = policy_gradient(new.logprobs, advantages, mask), torch.zeros_like(w)
    aux = {"ratio": torch.where(mask, w, 0.0).detach(), "clipped": was_clipped.detach()}
    if importance_cap is not None:
        weights = importance_weights(
            old.logprobs, batch.sample_logprobs, mask,
            high=importance_cap, low=importance_floor, level=importance_level, outside=importance_outside,
        )  # fmt: skip
        loss, aux["importance_weight"] = loss * weights, weights
    if ref is not None:
        aux["kl"] = kl_per_token(new.logprobs, ref.logprobs, mask, estimator="k1").detach()
        if kl_coefficient:
            if kl_estimator == "exact":
                penalty = exact_kl(new, mask)
            else:
                penalty = kl_loss(new.logprobs, old.logprobs, ref.logprobs, mask, estimator=kl_estimator)
            loss = loss + kl_coefficient * penalty
    if entropy_coefficient:
        loss = loss + entropy_coefficient * entropy_bonus(new.entropy, mask)
    return TokenLoss(loss, aux)


def critic_loss(
    new: PolicyOutput, old: PolicyOutput, credit: Credit, batch: TokenBatch, *, clip: float | None = None
) -> TokenLoss:
    """The critic's loss at each action (`value_loss`), not yet reduced.

    `aux`: `value_error` (R - V), detached.

    >>> score = PolicyOutput(torch.zeros(1, 2), torch.zeros(1, 2), values=torch.tensor([[0.0, 0.5]]))
    >>> yes, one = torch.tensor([[True, True]]), torch.tensor([1])
    >>> batch = TokenBatch(yes.int(), yes, torch.tensor([[False, True]]), score.logprobs, score.entropy, yes.int(),
    ...                    one, one.bool(), ("a",))
    >>> critic_loss(score, score, Credit(torch.zeros(1, 2), returns=torch.tensor([[0.0, 1.5]])), batch).per_token
    tensor([[0.0000, 0.5000]])
    """
    if new.values is None or old.values is None or credit.returns is None:
        raise ValueError(
            "critic_loss needs new.values, old.values and credit.returns: a value head and an estimator with a critic"
        )
    per_token = value_loss(new.values, old.values, credit.returns, batch.action_mask, clip=clip)
    error = torch.where(batch.action_mask, credit.returns - new.values, 0.0)
    return TokenLoss(per_token, {"value_error": error.detach()})


def aggregate(
    per_token: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
    *,
    over: Over = "token",
    denominator: int | float | None = None,
    lengths: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """One number from the losses of the actions.

        token      sum_{b,t} l / denominator               default: number of actions         (DAPO, PPO)
        sequence   sum_b (mean_t l) / denominator          default: number of rows that act   (GRPO)
        constant   sum_{b,t} l / denominator               no default; e.g. B * L_max         (Dr. GRPO)

    `sequence` gives each token of a long row less weight than one of a short row; `token` weighs all tokens
    alike, so long rows count more. Pass the counts of the *whole* optimiser step (`count`, summed over its
    parts) as denominator: then the parts' results add up to that of one big batch, however it is cut.
    Where rows are segments of longer sequences, `lengths` are the actions of those, which `sequence` takes means over.
    A batch without actions gives 0, with gradient 0.

    >>> losses, mask = torch.tensor([[1.0, 1.0], [4.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> aggregate(losses, mask), aggregate(losses, mask, over="sequence")
    (tensor(2.), tensor(2.5000))
    >>> aggregate(losses[:1], mask[:1], denominator=3) + aggregate(losses[1:], mask[1:], denominator=3)
    tensor(2.)
    """
    (per_token,) = _at_actions(action_mask, per_token)
    row_sums = per_token.sum(1)
    if over == "sequence":
        row_sums = row_sums / (action_mask.sum(1) if lengths is None else lengths).clamp_min(1)
    divisor = count(action_mask, over=over) if denominator is None else denominator
    return row_sums.sum() / (divisor or 1)


def count(action_mask: Bool[Tensor, "B T"], *, over: Over) -> int:
    """What `aggregate` divides by when it is given no denominator: actions, or rows that act.

    >>> mask = torch.tensor([[True, True], [True, False], [False, False]])
    >>> count(mask, over="token"), count(mask, over="sequence")
    (3, 2)
    """
    if over == "constant":
        raise ValueError("over='constant' has no count of its own: pass denominator (e.g. rows * max_new_tokens)")
    return int(action_mask.sum() if over == "token" else action_mask.any(1).sum())


def _at_actions(action_mask: Bool[Tensor, "B T"], *tensors: Float[Tensor, "B T"]) -> tuple[Float[Tensor, "B T"], ...]:
    """The tensors with 0 at masked cells.

    Inputs are cleaned, not only results: a NaN that a later `where` hides comes back as 0 * NaN in the gradient.
    """
    return tuple(torch.where(action_mask, x, 0.0) for x in tensors)


def _bounded_exp(log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
