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

BLOCK_BYTES = 8_000_000
"""Float32 logits at once: what fits into the last-level cache of a small machine."""

KEPT_BYTES = 300_000_000
"""Logits up to this size wait for the backward pass; larger ones are computed again."""


def linear_logprobs(
    hidden: Float[Tensor, "A H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " A"],
    *,
    temperature: float,
    entropy_grad: bool,
) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
    """log softmax((hidden @ weight.T + bias) / temperature) at `targets`, and that distribution's entropy (nats).

    hidden and weight must have one dtype, which the products are made in; sums over the vocabulary are float32.
    The entropy carries a gradient only with `entropy_grad`.

    >>> hidden, weight = torch.zeros(1, 2), torch.ones(4, 2)
    >>> linear_logprobs(hidden, weight, None, torch.tensor([3]), temperature=1.0, entropy_grad=False)
    (tensor([-1.3863]), tensor([1.3863]))
    """
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy if entropy_grad else entropy.detach()


class _LinearLogprobs(torch.autograd.Function):
    """With p = softmax(z / T):  dlogp/dz = (onehot - p) / T,  dH/dz = -p (log p + H) / T."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        keep = ctx.needs_input_grad[0] and len(hidden) * len(weight) * hidden.element_size() <= KEPT_BYTES
        total, entropy, chosen = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        kept: list[Tensor] = []
        blocks = list(_blocks(len(hidden), len(weight)))
        whole = torch.nn.functional.linear(hidden, weight, bias) if keep else None
        for block in blocks:
            raw = torch.nn.functional.linear(hidden[block], weight, bias) if whole is None else whole[block]
            z = raw.float() / temperature
            chosen[block] = z.gather(1, targets[block, None]).squeeze(1)
            top = z.amax(1, keepdim=True)
            p = z.sub(top).exp_()
            mass = p.sum(1)
            log_total = mass.log() + top.squeeze(1)
            total[block] = log_total
            entropy[block] = log_total - p.mul_(z).sum(1) / mass  # H = log sum exp z - sum p z
        if whole is not None:
            kept = [whole]
        ctx.save_for_backward(hidden, weight, bias, targets, total, entropy, *kept)
        ctx.temperature = temperature
        return chosen - total, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, total, entropy, *kept = ctx.saved_tensors
        by_entropy = bool(grad_entropy.any())
        grad_hidden = torch.empty_like(hidden)
        grad_weight, grad_bias = None, None
        for piece in _pieces(len(hidden), len(weight) * hidden.element_size()):
            logits = kept[0] if kept else torch.nn.functional.linear(hidden[piece], weight, bias)
            for inner in _blocks(len(logits), len(weight)):
                rows = slice(piece.start + inner.start, piece.start + inner.stop)
                logp = logits[inner].float().div_(ctx.temperature).sub_(total[rows, None])
                p = logp.exp()
                gradient = p * -grad_logprobs[rows, None]
                if by_entropy:
                    gradient -= p * (logp + entropy[rows, None]) * grad_entropy[rows, None]
                gradient[torch.arange(len(gradient)), targets[rows]] += grad_logprobs[rows]
                logits[inner] = gradient.div_(ctx.temperature)
            grad_hidden[piece] = logits @ weight
            if ctx.needs_input_grad[1]:
                share = logits.T @ hidden[piece]
                grad_weight = share if grad_weight is None else grad_weight.add_(share)
            if bias is not None and ctx.needs_input_grad[2]:
                share = logits.sum(0, dtype=torch.float32).to(bias.dtype)
                grad_bias = share if grad_bias is None else grad_bias.add_(share)
        return grad_hidden, grad_weight, grad_bias, None, None


def _blocks(count: int, vocabulary: int) -> list[slice]:
    size = max(1, BLOCK_BYTES // (4 * vocabulary))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _pieces(count: int, bytes_per_row: int) -> list[slice]:
    size = max(1, KEPT_BYTES // bytes_per_row)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
