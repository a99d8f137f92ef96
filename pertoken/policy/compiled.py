"""Autograd functions over the compiled operators (`pertoken/native/training.cpp`): one sweep over memory each.

Every one computes what the plain torch it stands for computes, and keeps less of it for the backward pass: its inputs,
and a number or two for each row. Tests hold each against autograd through that plain torch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pertoken import native
from pertoken.policy.packs import Pack

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def takes(*tensors: Tensor) -> bool:
    """Whether the operators are there and know these tensors."""
    known = all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) for x in tensors)
    return known and native.available()


def rms_norm(
    x: Float[Tensor, "*rows H"], weight: Float[Tensor, " H"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*rows H"]:
    """weight * x / sqrt(mean(x^2) + eps) in `dtype` (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    out: Tensor = _Norm.apply(x.contiguous(), weight, eps, dtype)  # type: ignore[no-untyped-call]
    return out


def gated_silu(gate: Float[Tensor, "*n"], up: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    out: Tensor = _GatedSilu.apply(gate.contiguous(), up.contiguous())  # type: ignore[no-untyped-call]
    return out


def rotate(
    x: Float[Tensor, "1 heads N D"], cos: Float[Tensor, "1 N D"], sin: Float[Tensor, "1 N D"]
) -> Float[Tensor, "1 heads N D"]:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), halves of D in pairs."""
    out: Tensor = _Rotation.apply(x, cos[0].contiguous(), sin[0].contiguous())  # type: ignore[no-untyped-call]
    return out


def attend(
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N Dv"],
    packs: Sequence[Pack],
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "1 N Hq Dv"]:
    """Attention of packed rows in float32; what it returns has the type of `value`."""
    by_cell = (_last_in_line(x[0].transpose(0, 1)) for x in (query, key, value))
    out: Tensor = _Attention.apply(*by_cell, packs, window, scale)  # type: ignore[no-untyped-call]
    return out[None]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        out, factors = torch.ops.pertoken.rms_norm(x, weight.float(), eps, dtype)
        ctx.save_for_backward(x, weight, factors)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factors = ctx.saved_tensors
        to_x, to_weight = torch.ops.pertoken.rms_norm_backward(gradient.contiguous(), x, weight.float(), factors)
        return to_x, to_weight.to(weight.dtype), None, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = torch.ops.pertoken.gated_silu(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        to_gate, to_up = torch.ops.pertoken.gated_silu_backward(gradient.contiguous(), *ctx.saved_tensors)
        return to_gate, to_up


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin, back=False, dtype=torch.promote_types(x.dtype, cos.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _rotated(gradient, *ctx.saved_tensors, back=True, dtype=ctx.dtype), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool, dtype: torch.dtype) -> Tensor:
    by_cell = _last_in_line(x[0].transpose(0, 1))
    out: Tensor = torch.ops.pertoken.rotate(by_cell, cos, sin, back, dtype)
    return out.transpose(0, 1)[None]


class _Attention(torch.autograd.Function):
    """A prompt with itself, then its rows side by side; lays them out again for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, packs: Sequence[Pack], window: int | None, scale: float | None
    ) -> Tensor:
        ctx.packs, ctx.window, ctx.scale = packs, window, scale
        out = torch.empty(len(q), q.shape[1], v.shape[2], dtype=v.dtype)  # each cell asks once
        kept: list[Tensor] = []
        for part in _parts(packs, window, q.shape[1] // k.shape[1]):
            o, mass = _flash(*part.laid_out(q, k, v), 0.0, part.mask is None, attn_mask=part.mask, scale=scale)
            part.put_queries(out, o)
            kept += [o, mass]
        ctx.save_for_backward(q, k, v, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        to_q, to_k, to_v = torch.empty(q.shape, dtype=q.dtype), torch.zeros(k.shape), torch.zeros(v.shape)
        parts = _parts(ctx.packs, ctx.window, q.shape[1] // k.shape[1])
        for part, o, mass in zip(parts, kept[::2], kept[1::2], strict=True):
            laid_out = part.laid_out(q, k, v)
            by = part.queries_of(_last_in_line(gradient))
            dq, dk, dv = _flash_backward(
                by, *laid_out, o, mass, 0.0, part.mask is None, attn_mask=part.mask, scale=ctx.scale
            )
            part.put_queries(to_q, dq)
            for total, share in ((to_k, dk), (to_v, dv)):
                torch.ops.pertoken.add_cells_(total, share, part.keys, part.copies)
        return to_q, to_k.to(k.dtype), to_v.to(v.dtype), None, None, None


class _Part:
    """Some queries of a pack and the keys that they see, as one call of attention.

    Query heads that share a key head become more queries of that head; but where a plain triangle is the mask, keys
    are copied for each of them instead.
    """

    def __init__(self, queries: Tensor, keys: Tensor, mask: Tensor | None, shared: int) -> None:
        self.queries, self.keys, self.mask, self._shared = queries, keys, mask, shared
        self.copies = shared if mask is None else 1

    def queries_of(self, x: Float[Tensor, "N Hq D"]) -> Float[Tensor, "n H L D"]:
        laid: Tensor = torch.ops.pertoken.gather_cells(x, self.queries, 1)
        n, heads, length, width = laid.shape
        return laid if self.mask is None else laid.view(n, heads // self._shared, self._shared * length, width)

    def laid_out(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        gather = torch.ops.pertoken.gather_cells
        return [self.queries_of(q), gather(k, self.keys, self.copies), gather(v, self.keys, self.copies)]

    def put_queries(self, total: Float[Tensor, "N Hq D"], laid: Float[Tensor, "n H L D"]) -> None:
        n, length = self.queries.shape
        by_head = laid.reshape(n, total.shape[1], length, total.shape[2])
        torch.ops.pertoken.put_cells_(total, by_head, self.queries)


def _parts(packs: Sequence[Pack], window: int | None, shared: int) -> list[_Part]:
    parts = []
    for pack in packs:
        itself = pack.itself
        mask = pack.bias(itself.shape[1], 0, window)
        parts.append(_Part(itself, itself, None if mask is None else mask.repeat(shared, 1), shared))
        if pack.side_by_side is not None:
            queries, keys = pack.side_by_side
            mask = pack.bias(queries.shape[1], pack.prompt, window)
            assert mask is not None  # there is a prompt before the rows
            parts.append(_Part(queries, keys, mask.repeat(shared, 1), shared))
    return parts


def _last_in_line(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
