"""Norms and gated activations of a model in one sweep each, forward and backward, where compiled code is at hand.

In plain torch an RMS norm under autocast makes six tensors of its input's size and keeps three for the backward pass,
most of them float32 copies; what it hands to the matrix products is cast once more for each of them. Here it makes
one, in the type that the products want, and keeps its input. So it is with `silu(gate) * up`.

A module is replaced by what it computes, not by its name: `fuse_layers` runs each kind of candidate on numbers and
leaves it alone if it gives others than the formula.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pertoken import native
from pertoken.policy import compiled

TOLERANCE = 1e-5
"""Largest difference from the module's own output, in float32 on inputs of size 1."""

PROBED_ROWS = 5


def fuse_layers(model: nn.Module) -> int:
    """Give the layers of `model` that compute a known formula its compiled form; how many they are.

    Names and weights stay: the model is saved, copied and adapted as before. Inputs that the compiled form does not
    take (another device or type) go the module's own way.
    """
    if not native.available():
        return 0
    verdicts: dict[tuple[Any, ...], bool] = {}
    fused = 0
    for module in model.modules():
        if isinstance(module, FusedNorm | FusedGatedMLP):
            fused += 1
            continue
        kind = next((kind for kind in (FusedNorm, FusedGatedMLP) if kind.may_stand_for(module)), None)
        if kind is None:
            continue
        as_it_is, fast = type(module), _with(kind, type(module))
        key = (as_it_is, *(tuple(p.shape) for p in module.parameters()))
        if key not in verdicts:
            verdicts[key] = _same(module, fast)
        if verdicts[key]:
            module.__class__ = fast
            fused += 1
    return fused


class FusedNorm(nn.Module):
    """See `compiled.rms_norm`."""

    weight: Tensor

    @staticmethod
    def may_stand_for(module: nn.Module) -> bool:
        parameters = [name for name, _ in module.named_parameters()]
        return "RMSNorm" in type(module).__name__ and parameters == ["weight"] and _epsilon(module) is not None

    def forward(self, x: Tensor) -> Tensor:
        epsilon = _epsilon(self)
        if epsilon is None or not native.takes(x):
            return super().forward(x)  # type: ignore[no-any-return]
        return compiled.rms_norm(x, self.weight, epsilon, compiled.wanted(x.dtype, self.weight.dtype))


class FusedGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)); see `compiled.gated_silu`."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    @staticmethod
    def may_stand_for(module: nn.Module) -> bool:
        children = dict(module.named_children())
        named = children.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        return named and type(children["act_fn"]).__name__ in ("SiLU", "SiLUActivation")

    def forward(self, x: Tensor) -> Tensor:
        if not native.takes(x):
            return super().forward(x)  # type: ignore[no-any-return]
        out: Tensor = self.down_proj(compiled.gated_silu(self.gate_proj(x), self.up_proj(x)))
        return out


@contextlib.contextmanager
def fused_rotation(model: nn.Module) -> Iterator[None]:
    """Within it, the code of this family rotates queries and keys in one sweep, if it does what `compiled.rotate` does.

    Transformers keeps the rotation in a function of each family's module, which layers call by its name.
    """
    code = sys.modules[type(getattr(model, "base_model", model)).__module__]
    own = getattr(code, "apply_rotary_pos_emb", None)
    if own is None or not native.available() or not _rotates_halves(own):
        yield
        return

    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if rest or named or len(q) != 1 or q.shape[-1] != cos.shape[-1] or not native.takes(q, k, cos, sin):
            return own(q, k, cos, sin, *rest, **named)  # type: ignore[no-any-return]
        return compiled.rotate(q, cos, sin), compiled.rotate(k, cos, sin)

    code.apply_rotary_pos_emb = fused  # type: ignore[attr-defined]
    try:
        yield
    finally:
        code.apply_rotary_pos_emb = own  # type: ignore[attr-defined]


@cache
def _rotates_halves(own: Callable[..., Any]) -> bool:
    """Whether a family's rotation is `compiled.rotate`; measured."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=draw), torch.randn(1, 1, 3, 8, generator=draw)
    angles = torch.rand(1, 3, 4, generator=draw).repeat(1, 1, 2)
    try:
        wanted = own(q, k, angles.cos(), angles.sin())
        found = [compiled.rotate(x, angles.cos(), angles.sin()) for x in (q, k)]
        return all(torch.allclose(a, b, atol=TOLERANCE) for a, b in zip(wanted, found, strict=True))
    except Exception:  # a function of that name may take and give anything
        return False


def _with(kind: type[nn.Module], own: type[nn.Module]) -> type[nn.Module]:
    """A class that is both: the forward of `kind`, everything else (and its name) of `own`."""
    return type(own.__name__, (kind, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


@torch.no_grad()
def _same(module: nn.Module, fast: type[nn.Module]) -> bool:
    """Whether `module` computes the same as one of class `fast`; measured on seeded inputs, by the weights it has."""
    own, first = type(module), next(module.parameters())
    x = torch.randn(PROBED_ROWS, first.shape[-1], generator=torch.Generator().manual_seed(0)).to(first)
    wanted = module(x)
    module.__class__ = fast
    try:
        difference = (module(x) - wanted).abs().max() / wanted.abs().max().clamp_min(1.0)
    finally:
        module.__class__ = own
    return bool(difference < TOLERANCE)
