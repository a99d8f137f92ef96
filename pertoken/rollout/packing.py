"""Weights in the layout that products of few rows want on CPUs: bfloat16, in pieces that are read from end to end.

Compiled code of our own multiplies where the processor has dot products of bfloat16 pairs and no matrix unit
(`native/products.cpp`), oneDNN elsewhere; each has a layout of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pertoken import native

ROWS = 64
"""The number of rows that oneDNN's layout is chosen for; products of any number are right."""


def packs() -> bool:
    """Whether this processor has a layout for weights: oneDNN's begins with AVX-512."""
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return native.multiplies() or bool(supported)


def pack(weight: Tensor) -> Tensor:
    """`weight` in bfloat16, laid out for `multiply`."""
    weight = weight.detach().bfloat16()
    rows, columns = weight.shape
    packed: Tensor
    if native.multiplies() and rows % 16 == 0 and columns % 2 == 0:
        packed = torch.ops.pertoken.pack(weight.contiguous())
    else:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    return packed


def multiply(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` of a packed weight."""
    product: Tensor
    if packed.is_mkldnn:
        product = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    else:
        product = torch.ops.pertoken.multiply(x, packed, bias)
    return product


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with a packed copy of its weight, while it has one."""

    packed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.packed is None:
            return super().forward(input)
        return multiply(input, self.packed, self.bias)


def pack_linears(model: nn.Module) -> None:
    """Let the linear layers of `model` multiply with packed copies of the weights that they have now.

    Only where they can be packed (bfloat16 on a CPU); call it again when weights have changed.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module) in (nn.Linear, PackedLinear) and _takes(module.weight):
            module.__class__ = PackedLinear
            module.packed = pack(module.weight)


def unpack_linears(model: nn.Module) -> None:
    """Drop the packed copies: the layers multiply with their own weights again."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.packed = None


def _takes(weight: Any) -> bool:
    return bool(weight.device.type == "cpu" and weight.dtype is torch.bfloat16 and packs())
