"""Copies of the trained weights that a run keeps beside them: their running average, and where they began."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

Named = Mapping[str, nn.Parameter]
"""Trained parameters by name, as `Policy.trainable()` has them."""


class Average:
    """The exponential moving average of the weights, which is often better than any of them.

        m_k = decay * m_{k-1} + (1 - decay) * w_k          m_0 = w_0, the weights before training

    Polyak & Juditsky 1992, https://doi.org/10.1137/0330046; for language models with RL e.g. WARP, Rame et al. 2024,
    https://arxiv.org/abs/2406.16768.
    """

    def __init__(self, named: Named, decay: float) -> None:
        self.decay = decay
        self.cells = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def update(self, named: Named) -> None:
        """Take the weights of now in."""
        for name, cell in self.cells.items():
            cell.lerp_(named[name].detach(), 1.0 - self.decay)

    @contextmanager
    def applied(self, named: Named) -> Iterator[None]:
        """Meanwhile the parameters hold the average; afterwards what they held before, bit for bit."""
        self._swap(named)
        try:
            yield
        finally:
            self._swap(named)

    @torch.no_grad()
    def _swap(self, named: Named) -> None:
        for name, cell in self.cells.items():
            held = named[name].detach().clone()
            named[name].copy_(cell)
            cell.copy_(held)


class Anchor:
    """Where the weights began, and what pulls them back there.

        loss += l2 / 2 * |w - w_0|^2 + l1 * |w - w_0|_1

    L2-SP: Li et al. 2018, https://arxiv.org/abs/1802.01483. It goes into the gradient before that is clipped, once for
    each optimiser step.
    """

    def __init__(self, named: Named, *, l2: float, l1: float) -> None:
        self.l2, self.l1 = l2, l1
        self.cells = {name: parameter.detach().clone() for name, parameter in named.items()}

    @torch.no_grad()
    def pull(self, named: Named) -> None:
        """Add the gradient of the penalty to each `.grad` that is there."""
        for name, cell in self.cells.items():
            parameter = named[name]
            if parameter.grad is None:
                continue
            away = parameter.detach() - cell
            parameter.grad.add_(away, alpha=self.l2)
            if self.l1:
                parameter.grad.add_(away.sign_(), alpha=self.l1)

    @torch.no_grad()
    def distance(self, named: Named) -> float:
        """|w - w_0|."""
        squares = [(named[name].detach() - cell).double().square().sum() for name, cell in self.cells.items()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
