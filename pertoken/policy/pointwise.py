"""Activations and norms of a model through `torch.compile`, where that pays: tried once on a machine, and remembered.

Layers that `layers.py` knows by formula have code of their own. What is left, the GELU of GPT-2 in eight operations or
the norm of Gemma, is tried as it will be used: forward and backward on rows of the width and type that the model hands
to it, by itself and compiled. Lengths are symbols in what is compiled: no length costs another compilation.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from pertoken import native
from pertoken.forward import own_logits
from pertoken.machine.cache import cache_folder, keep
from pertoken.policy.layers import FusedGatedMLP, FusedNorm

LEAST_WIDTH = 512
"""Narrower rows are not worth the seconds that a trial takes."""

ROWS, PROBED_ROWS, ROUNDS = 1024, 5, 7
"""Of a trial."""

GAIN = 1.25
"""How many times faster the compiled form must be to be used."""

TOLERANCE = 1e-5
"""Largest difference from the module's own output, in float32 on inputs of size 1."""


@dataclass(frozen=True)
class Trial:
    """Milliseconds of a module, forward and backward."""

    name: str
    own: float
    compiled: float | None
    """None: it could not be compiled, or computed something else."""

    @property
    def pays(self) -> bool:
        return self.compiled is not None and self.own > GAIN * self.compiled


@dataclass(frozen=True)
class Pointwise:
    """The modules of a model that run compiled in passes over many tokens, and the trials that decided so."""

    compiled: dict[nn.Module, Callable[[Tensor], Tensor]]
    trials: tuple[Trial, ...]

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it the modules run their compiled form. They are as they were outside: copies must not share it."""
        for module, forward in self.compiled.items():
            module.forward = forward
        try:
            yield
        finally:
            for module in self.compiled:
                del module.forward


@dataclass(frozen=True)
class _Use:
    """How a module is used: the rows that it is given."""

    name: str
    width: int
    dtype: torch.dtype
    device: torch.device

    def rows(self, count: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(count, self.width, generator=torch.Generator().manual_seed(0)).to(
            self.device, dtype or self.dtype
        )


def compile_pointwise(model: nn.Module, dtype: torch.dtype | None, *, least_width: int = LEAST_WIDTH) -> Pointwise:
    """Compile the modules of `model` that map rows to rows of the same shape, where it pays.

    dtype: of autocast, None without.
    """
    trials: dict[_Use, Trial] = {}
    compiled = {}
    for module, use in _candidates(model, dtype).items():
        if use.width < least_width:
            continue
        if use not in trials:
            trials[use] = _remembered(module, use)
        if trials[use].pays:
            compiled[module] = torch.compile(module.forward, dynamic=True)
    return Pointwise(compiled, tuple(trials.values()))


def _candidates(model: nn.Module, dtype: torch.dtype | None) -> dict[nn.Module, _Use]:
    """Modules of transformers without children that answer a tensor with one like it."""
    seen: dict[nn.Module, _Use] = {}

    def look(module: nn.Module, given: tuple[Any, ...], answer: Any) -> None:
        x = given[0] if len(given) == 1 else None
        if isinstance(x, Tensor) and isinstance(answer, Tensor) and x.is_floating_point() and x.shape == answer.shape:
            name = f"{type(module).__module__}.{type(module).__qualname__}({module.extra_repr()})"
            seen[module] = _Use(name, x.shape[-1], x.dtype, x.device)

    leaves = [
        module
        for module in model.modules()
        if type(module).__module__.startswith("transformers.")
        and not isinstance(module, FusedNorm | FusedGatedMLP)
        and not list(module.children())
        and all(p.ndim == 1 for p in module.parameters())
    ]
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        for module in leaves:
            stack.callback(module.register_forward_hook(look).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, dtype=dtype, enabled=dtype is not None))
        ids = torch.arange(4, device=device)[None]
        own_logits(model, ids[:, :2], ids[:, 2:])
    return seen


def _remembered(module: nn.Module, use: _Use) -> Trial:
    """The trial of an earlier run on a machine like this one, or one made now."""
    what = (use, torch.__version__, torch.get_num_threads(), native.processor())
    place = cache_folder() / "compile" / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:20]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Trial(**json.loads(place.read_text(encoding="utf-8")))
    trial = _try(module, use)
    if trial.compiled is None:  # a compiler may come
        return trial
    with contextlib.suppress(OSError):
        keep(place, json.dumps(asdict(trial)))
    return trial


def _try(module: nn.Module, use: _Use) -> Trial:
    own = _milliseconds(module.forward, module, use)
    try:
        compiled = torch.compile(module.forward, dynamic=True)
        with torch.no_grad():
            some = use.rows(PROBED_ROWS, torch.float32)
            wanted, found = module.forward(some).float(), compiled(some).float()
        same = (found - wanted).abs().max() < TOLERANCE * wanted.abs().max().clamp_min(1.0)
        return Trial(use.name, own, _milliseconds(compiled, module, use) if same else None)
    except Exception:  # a compiler that is missing, or code that it cannot take, may fail in any way
        return Trial(use.name, own, None)


def _milliseconds(forward: Callable[[Tensor], Tensor], module: nn.Module, use: _Use) -> float:
    """Forward and backward; gradients are thrown away: the module is that of the policy, whose `.grad` must stay."""
    x, taken = use.rows(ROWS).requires_grad_(), []
    inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        torch.autograd.grad(forward(x).sum(), inputs)
        if use.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - begun))
    return median(taken[1:])
