"""Gradients of weights added up where they stay: straight into `.grad`, without a copy of each matrix on the way.

Under autocast autograd makes of every weight in every micro-batch: its gradient in bfloat16, that in float32, and for a
matrix that embedding and head share, dense sums of both, before it adds the result to `.grad`. For a small model this
moves more memory than the products do. Here the product is added to `.grad` at once.

It holds for `backward()` only: `torch.autograd.grad` and hooks on parameters see nothing. So a pass does it where it is
asked to (`Policy.score(..., into_grad=Casts())`), as the training loop does.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pertoken import native


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`; `weight` may be a transposed view.

    In float32 on a CPU oneDNN makes it: torch would take MKL, which makes less of AMD's processors. Not so if `x` is
    transposed: oneDNN copies it first.
    """
    if x.device.type == "cpu" and x.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return nn.functional.linear(x, weight, bias)


def add_product(parameter: Tensor, left: Tensor, right: Tensor) -> None:
    """parameter.grad += left @ right"""
    if parameter.grad is None:
        parameter.grad = (left @ right).to(parameter.dtype)
    elif parameter.grad.dtype == left.dtype:
        parameter.grad.addmm_(left, right)
    else:
        share = left @ right
        compiled = share.dtype is torch.bfloat16 and parameter.grad.is_contiguous() and native.takes(share)
        add = torch.ops.pertoken.add_ if compiled else Tensor.add_
        add(parameter.grad, share)


class Casts:
    """Trained weights in the type of the matrix products, made once for several passes.

    It is for as long as the weights stay as they are: after a step of the optimiser a new one is due. (Nothing in
    torch tells: fused optimisers change weights without counting it as a new version of the tensor.)
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, without gradient."""
        if weight.dtype is dtype:
            return weight.detach()
        key = (id(weight), dtype)
        if key not in self._made:
            self._made[key] = weight.detach().to(dtype)
        return self._made[key]


@contextlib.contextmanager
def into_grad(model: nn.Module, dtype: torch.dtype | None, casts: Casts) -> Iterator[None]:
    """Within it, trained linear layers and embeddings of `model` add their gradients up by themselves.

    Products are made in `dtype` (None: the weight's own). It need not last until the backward pass.
    """
    changed = []
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding) or not module.weight.requires_grad:
            continue
        if type(module) is nn.Linear:
            casts(module.weight, dtype or module.weight.dtype)
            forward = partial(_Linear.apply, module.weight, module.bias, casts, dtype or module.weight.dtype)
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
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, casts: Casts, dtype: torch.dtype, x: Tensor) -> Tensor:
        ctx.parameter, ctx.from_dtype = weight, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        x, weight, bias = x.to(dtype), casts(weight, dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        by_row = gradient.flatten(0, -2)
        add_product(ctx.parameter, by_row.T, x.flatten(0, -2))
        to_bias = by_row.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if ctx.bias_dtype is not None else None
        to_x = linear(gradient, weight.T).to(ctx.from_dtype) if ctx.needs_input_grad[4] else None
        return None, to_bias, None, None, to_x


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
