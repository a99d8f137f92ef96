"""The language-model head with its loss: log-prob and entropy of given tokens, without float32 logits of all of them.

Logits of `[tokens, vocabulary]` are by far the largest tensors of training: 2,000 tokens of a 49k vocabulary
take 400 MB in float32, and autograd keeps several of them. `linear_logprobs` keeps them once in the precision of
the matrix product (or computes them again in the backward pass where even that is much), works through them in
blocks that stay in the processor's cache, and turns them into their own gradient in place.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pertoken import native
from pertoken.policy.gradients import ROWS_AT_ONCE, add_product, linear

BLOCK_BYTES = 8_000_000
"""Float32 logits at once: what fits into the last-level cache of a small machine."""

KEPT_BYTES = 300_000_000
"""Logits up to this size wait for the backward pass; larger ones are computed again."""

PASSING_BYTES = 30_000_000
"""Logits at once where none are kept."""


def linear_logprobs(
    hidden: Float[Tensor, "A H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " A"],
    *,
    temperature: float,
    entropy_grad: bool,
    into_grad: bool = False,
) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
    """log softmax((hidden @ weight.T + bias) / temperature) at `targets`, and that distribution's entropy (nats).

    The products are made in the dtype of `hidden`, whatever that of the weight; sums over the vocabulary are float32.
    The entropy carries a gradient only with `entropy_grad`; with `into_grad` that of the weight goes straight to its
    `.grad` (`gradients.py`).

    >>> hidden, weight = torch.zeros(1, 2), torch.ones(4, 2)
    >>> linear_logprobs(hidden, weight, None, torch.tensor([3]), temperature=1.0, entropy_grad=False)
    (tensor([-1.3863]), tensor([1.3863]))
    """
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, into_grad)  # type: ignore[no-untyped-call]
    return logprobs, entropy if entropy_grad else entropy.detach()


class _LinearLogprobs(torch.autograd.Function):
    """Keeps the logits and what `_summary` says of them; the backward pass makes them their own gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        into_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.parameter, ctx.into_grad, ctx.temperature = weight, into_grad, temperature
        ctx.bias_dtype = None if bias is None else bias.dtype
        bias = None if bias is None else bias.to(hidden.dtype)
        if ctx.needs_input_grad[0] and len(hidden) * len(weight) * hidden.element_size() <= KEPT_BYTES:
            kept = [_logits(hidden, weight, bias)]
            logprobs, total, entropy = _summary(kept[0], targets, temperature)
        else:
            kept = []
            parts = [
                _summary(_logits(hidden[piece], weight, bias), targets[piece], temperature)
                for piece in _pieces(len(hidden), len(weight) * hidden.element_size(), PASSING_BYTES)
            ]
            logprobs, total, entropy = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, bias, targets, total, entropy, *kept)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, bias, targets, total, entropy, *kept = ctx.saved_tensors
        weight, (to_hidden, to_weight, to_bias) = ctx.parameter, ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight) if to_weight and not ctx.into_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and to_bias else None
        for piece in _pieces(len(hidden), len(weight) * hidden.element_size(), KEPT_BYTES):
            logits = kept[0] if kept else _logits(hidden[piece], weight, bias)
            _to_gradient_(
                logits, targets[piece], total[piece], entropy[piece], grad_logprobs[piece], grad_entropy[piece],
                ctx.temperature,
            )  # fmt: skip
            for rows in _slices(weight, hidden.dtype):
                if to_hidden:
                    grad_hidden[piece] += linear(logits[:, rows], weight[rows].to(hidden.dtype).T)
                if grad_weight is not None:
                    grad_weight[rows] += logits[:, rows].T @ hidden[piece]
                elif to_weight:
                    add_product(weight, logits[:, rows].T, hidden[piece], rows)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
        to_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, to_bias, None, None, None


def _logits(hidden: Float[Tensor, "A H"], weight: Float[Tensor, "V H"], bias: Float[Tensor, " V"] | None) -> Tensor:
    """hidden @ weight.T + bias in the dtype of `hidden`."""
    if weight.dtype is hidden.dtype:
        return linear(hidden, weight, bias)
    logits = hidden.new_empty(len(hidden), len(weight))
    for rows in _slices(weight, hidden.dtype):
        logits[:, rows] = linear(hidden, weight[rows].to(hidden.dtype), None if bias is None else bias[rows])
    return logits


def _slices(weight: Float[Tensor, "V H"], dtype: torch.dtype) -> list[slice]:
    """The vocabulary; in slices where the weight is cast first, so that there is never a copy of all of it."""
    return _pieces(len(weight), 1, len(weight) if weight.dtype is dtype else ROWS_AT_ONCE)


def _summary(
    logits: Float[Tensor, "A V"], targets: Int[Tensor, " A"], temperature: float
) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"], Float[Tensor, " A"]]:
    """Of softmax(logits / temperature): log-prob of the target, log of the normaliser, and entropy."""
    if logits.is_contiguous() and native.takes(logits):
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.pertoken.softmax_at(logits, targets, temperature)
        return found
    logprobs, total, entropy = (torch.empty(len(logits), device=logits.device) for _ in range(3))
    buffer = _buffer(logits)
    for rows in _pieces(len(logits), 4 * logits.shape[1], BLOCK_BYTES):
        z = buffer[: rows.stop - rows.start].copy_(logits[rows]).div_(temperature)
        top = z.amax(1, keepdim=True)
        shifted = z.sub_(top)
        p = shifted.exp()
        mass = p.sum(1)
        log_mass = mass.log()
        logprobs[rows] = shifted.gather(1, targets[rows, None]).squeeze(1) - log_mass
        total[rows] = log_mass + top.squeeze(1)
        entropy[rows] = log_mass - p.mul_(shifted).sum(1) / mass  # H = log sum exp z - sum p z
    return logprobs, total, entropy


def _to_gradient_(
    logits: Float[Tensor, "A V"],
    targets: Int[Tensor, " A"],
    total: Float[Tensor, " A"],
    entropy: Float[Tensor, " A"],
    by_logprob: Float[Tensor, " A"],
    by_entropy: Float[Tensor, " A"],
    temperature: float,
) -> None:
    """In place: with p = softmax(z / T),  dlogp/dz = (onehot - p) / T  and  dH/dz = -p (log p + H) / T."""
    if logits.is_contiguous() and native.takes(logits):
        torch.ops.pertoken.softmax_gradient_(
            logits, targets, total, entropy, by_logprob.contiguous(), by_entropy.contiguous(), temperature
        )
        return
    buffer, with_entropy = _buffer(logits), bool(by_entropy.any())
    for rows in _pieces(len(logits), 4 * logits.shape[1], BLOCK_BYTES):
        logp = buffer[: rows.stop - rows.start].copy_(logits[rows]).div_(temperature).sub_(total[rows, None])
        weight = -by_logprob[rows, None]
        if with_entropy:
            weight = weight - (logp + entropy[rows, None]) * by_entropy[rows, None]
        gradient = logp.exp_().mul_(weight)
        gradient[torch.arange(len(gradient)), targets[rows]] += by_logprob[rows]
        logits[rows] = gradient.div_(temperature)


def _buffer(logits: Tensor) -> Tensor:
    """Room for a block of logits in float32, used again for each block: new memory costs more than the arithmetic."""
    rows = min(len(logits), max(1, BLOCK_BYTES // (4 * logits.shape[1])))
    return torch.empty(rows, logits.shape[1], device=logits.device)


def _pieces(count: int, size: int, most: int) -> list[slice]:
    """`count` rows of `size` in slices of at most `most` (of one row at least)."""
    step = max(1, most // size)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
