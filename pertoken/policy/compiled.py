"""Autograd functions over the compiled operators (`pertoken/native`): one sweep over memory each.

Every one computes what the plain torch it stands for computes, and keeps less of it for the backward pass: its inputs,
and a number or two for each row. Tests hold each against autograd through that plain torch.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from pertoken.policy.packs import Pack


@dataclass(frozen=True)
class Origin:
    """How a tensor was made, in one cheap sweep: what a backward pass may keep in place of it.

    `function(*tensors)` is the tensor again, bit by bit. The tensors are kept for the sweep's own backward pass anyway.
    """

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]

    @staticmethod
    def of(x: Tensor) -> "Origin | None":
        """That of `x`, if it has one and was not changed in place since."""
        origin, version = getattr(x, "_pertoken_origin", (None, None))
        return origin if origin is not None and version == x._version else None

    def put_on(self, x: Tensor) -> Tensor:
        """`x`, which has this origin from now on; not without a backward pass, which alone asks for it."""
        if x.requires_grad:
            x._pertoken_origin = self, x._version  # type: ignore[attr-defined]
        return x


def wanted(*dtypes: torch.dtype) -> torch.dtype:
    """The type that matrix products of something in these types will be made in: autocast's, or what it is without."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return functools.reduce(torch.promote_types, dtypes)


def rms_norm(
    x: Float[Tensor, "*rows H"], weight: Float[Tensor, " H"], eps: float, dtype: torch.dtype
) -> Float[Tensor, "*rows H"]:
    """weight * x / sqrt(mean(x^2) + eps) in `dtype` (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467)."""
    x = x.contiguous()
    out: Tensor = _Norm.apply(x, weight, eps, dtype)  # type: ignore[no-untyped-call]
    return Origin(functools.partial(_normed, eps=eps, dtype=dtype), (x, weight)).put_on(out)


def gated_silu(gate: Float[Tensor, "*n"], up: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """silu(gate) * up (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    gate, up = gate.contiguous(), up.contiguous()
    out: Tensor = _GatedSilu.apply(gate, up)  # type: ignore[no-untyped-call]
    return Origin(torch.ops.pertoken.gated_silu, (gate, up)).put_on(out)


def rotate(
    x: Float[Tensor, "1 heads N D"], cos: Float[Tensor, "1 N D"], sin: Float[Tensor, "1 N D"]
) -> Float[Tensor, "1 heads N D"]:
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), halves of D in pairs.

    Under autocast it has the type that products of it will be made in.
    """
    out: Tensor = _Rotation.apply(x, cos[0].contiguous(), sin[0].contiguous(), wanted(x.dtype, cos.dtype))  # type: ignore[no-untyped-call]
    return out


def attend(
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N Dv"],
    packs: Sequence[Pack],
    window: int | None,
    scale: float | None,
) -> Float[Tensor, "1 N Hq Dv"]:
    """Attention of packed rows, its products in the type of `value`, its sums in float32 (`native/attention.cpp`)."""
    q, k, v = (x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(q, k, v, _sequences(packs), window or 0, scale)  # type: ignore[no-untyped-call]
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


def _normed(x: Tensor, weight: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    out: Tensor = torch.ops.pertoken.rms_norm(x, weight.float(), eps, dtype)[0]
    return out


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
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotated(x, cos, sin, back=False, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _rotated(gradient, *ctx.saved_tensors, back=True, dtype=ctx.dtype), None, None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool, dtype: torch.dtype) -> Tensor:
    by_cell = _last_in_line(x[0].transpose(0, 1))
    out: Tensor = torch.ops.pertoken.rotate(by_cell, cos, sin, back, dtype)
    return out.transpose(0, 1)[None]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sequences: Tensor, window: int, scale: float) -> Tensor:
        ctx.window, ctx.scale = window, scale
        out, masses = torch.ops.pertoken.attend(q, k, v, sequences, window, scale)
        ctx.save_for_backward(q, k, v, out, masses, sequences)
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        to_inputs = torch.ops.pertoken.attend_backward(gradient.contiguous(), *ctx.saved_tensors, ctx.window, ctx.scale)
        return *to_inputs, None, None, None


def _sequences(packs: Sequence[Pack]) -> Int[Tensor, "n 3"]:
    """First cell, length, and number of the sequence that each one continues (-1: none)."""
    rows: list[tuple[int, int, int]] = []
    for pack in packs:
        prompt = len(rows)
        rows += [(first, length, prompt if k else -1) for k, (first, length) in enumerate(pack.sequences)]
    return torch.tensor(rows)


def _last_in_line(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
