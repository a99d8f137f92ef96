"""Gradients of weights added up where they stay: straight into `.grad`, without a copy of each matrix on the way.

Under autocast autograd makes of every weight in every micro-batch: its gradient in bfloat16, that in float32, and for a
matrix that embedding and head share, dense sums of both, before it adds the result to `.grad`. For a small model this
moves more memory than the products do. Here the product is added to `.grad` at once.

Nor is anything kept for the backward pass that a sweep makes again: weights in the type of the products, and inputs
with an `Origin` (`compiled.py`). A sweep over a layer's weights costs a hundredth of its products; kept, they would be
a tenth of all memory.

It holds for `backward()` only: `torch.autograd.grad` and hooks on parameters see nothing. So a pass does it where it is
asked to (`Policy.score(..., into_grad=True)`), as the training loop does.
"""

import contextlib
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pertoken import native
from pertoken.policy.compiled import Origin

ROWS_AT_ONCE = 8192
"""Of a weight that is cast, or a product that is made before it is added: one of a head's size, 50,000 rows, would make
the peak of memory."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; `weight` may be a transposed view.

    In float32 on a CPU oneDNN makes it where torch would take MKL, which makes less of AMD's processors. Not so if `x`
    is transposed: oneDNN copies it first. On Intel's MKL is the faster one, and has no code to generate for each new
    number of rows, which for a small model takes longer than the product.
    """
    if x.device.type == "cpu" and x.dtype is torch.float32 and _takes_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


@cache
def _takes_onednn() -> bool:
    """Whether products in float32 are better left to oneDNN than to what torch takes."""
    of_intel = native.vendor() == "GenuineIntel" and torch.backends.mkl.is_available()
    return torch.backends.mkldnn.is_available() and not of_intel


def add_product(parameter: Tensor, left: Tensor, right: Tensor, at: slice = slice(None)) -> None:
    """parameter.grad[at] += left @ right"""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad[at]
    if gradient.dtype == left.dtype:
        gradient.addmm_(left, right)
        return
    compiled = left.dtype is torch.bfloat16 and gradient.is_contiguous() and native.takes(left)
    add = torch.ops.pertoken.add_ if compiled else Tensor.add_
    for part, rows in zip(gradient.split(ROWS_AT_ONCE), left.split(ROWS_AT_ONCE), strict=True):
        add(part, rows @ right)


@contextlib.contextmanager
def into_grad(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it, trained linear layers and embeddings of `model` add their gradients up by themselves.

    Products are made in `dtype` (None: the weight's own). It need not last until the backward pass.
    """
    changed = []
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or not module.weight.requires_grad:
            continue
        if type(module) is nn.Linear:
            forward = partial(_Linear.apply, module.weight, module.bias, dtype or module.weight.dtype)
        elif type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
            forward = partial(_Embedding.apply, module.weight, module.padding_idx)
        else:
            continue
        module.forward = forward  # type: ignore[method-assign]
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, x: Tensor) -> Tensor:
        ctx.parameter, ctx.from_dtype, ctx.dtype = weight, x.dtype, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        origin = Origin.of(x) if x.dtype is dtype else None
        x = x.to(dtype)
        ctx.function = origin and origin.function
        ctx.save_for_backward(*(origin.tensors if origin else [x]))
        return linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept = ctx.parameter, ctx.saved_tensors
        x = ctx.function(*kept) if ctx.function else kept[0]
        gradient = gradient.to(ctx.dtype)
        by_row = gradient.flatten(0, -2)
        add_product(weight, by_row.T, x.flatten(0, -2))
        to_bias = by_row.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.bias_dtype is not None else None
        to_x = linear(gradient, weight.to(ctx.dtype).T).to(ctx.from_dtype) if ctx.needs_input_grad[3] else None
        return None, to_bias, None, to_x


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, padding: int | None, ids: Tensor) -> Tensor:
        ctx.parameter, ctx.padding = weight, padding
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        (ids,), parameter = ctx.saved_tensors, ctx.parameter
        if ctx.padding is not None:  # the row of the padding never learns
            gradient = gradient.masked_fill((ids == ctx.padding)[..., None], 0.0)
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(parameter.dtype))
        return None, None, None
