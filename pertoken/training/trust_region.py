"""The step of TRPO: along the natural gradient, as far as a bound on the KL lets it, in place of an optimiser's.

    least g^T s  with  1/2 s^T F s <= kl          F: Fisher matrix, the curvature of the KL to the policy of before
    x = (F + damping)^-1 g by conjugate gradients          s = -sqrt(2 kl / x^T (F + damping) x) x
    the first of s, shrink s, shrink^2 s, ... at which the loss has fallen and the KL keeps the bound

Weights are one vector here, P numbers; what measures a loss or a gradient is a function that the caller brings.
Schulman et al. 2015, https://arxiv.org/abs/1502.05477, app. C.
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


def conjugate_gradient(
    product: Callable[[Float[Tensor, " P"]], Float[Tensor, " P"]],
    b: Float[Tensor, " P"],
    *,
    iterations: int,
    tolerance: float = 1e-6,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """An approximate x with A x = b, and what is left, b - A x; `product` multiplies by A, symmetric and positive.

    Ends after `iterations`, when what is left is shorter than `tolerance` times b, or where A is not positive.
    Hestenes & Stiefel 1952, https://doi.org/10.6028/jres.049.044.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda v: A @ v, torch.tensor([1.0, 2.0]), iterations=2)[0]
    tensor([0.0909, 0.6364])
    """
    x, left = torch.zeros_like(b), b.clone()
    direction, squared = left.clone(), left @ left
    enough = tolerance**2 * squared
    for _ in range(iterations):
        if squared <= enough:
            break
        along = product(direction)
        curvature = direction @ along
        if curvature <= 0:
            break
        length = squared / curvature
        x += length * direction
        left -= length * along
        before, squared = squared, left @ left
        direction.mul_(squared / before).add_(left)
    return x, left


def natural_step(
    gradient: Float[Tensor, " P"],
    product: Callable[[Float[Tensor, " P"]], Float[Tensor, " P"]],
    *,
    kl: float,
    iterations: int,
    damping: float,
) -> Float[Tensor, " P"]:
    """The step s of the module's docstring; 0 for a gradient of 0.

    product: multiplies by F. Damping counts as curvature, so a large one makes the step shorter than the bound asks.

    >>> F = torch.diag(torch.tensor([4.0, 1.0]))
    >>> natural_step(torch.tensor([2.0, 0.0]), lambda v: F @ v, kl=0.02, iterations=5, damping=0.0)
    tensor([-0.1000, -0.0000])
    """
    x, left = conjugate_gradient(lambda v: product(v).add_(v, alpha=damping), gradient, iterations=iterations)
    squared = float(x @ (gradient - left))  # x^T (F + damping) x
    return x.mul_(-((2.0 * kl / squared) ** 0.5)) if squared > 0 else torch.zeros_like(x)


class Fisher:
    """Multiplies by F, by the difference of two gradients of KL(policy at the start || policy):

        F v = (grad KL(start + h v) - grad KL(start - h v)) / 2h

    At the start the gradient is 0 and its derivative is F; the difference is off by something of order h^2. Too small
    an h drowns in rounding, and too large a one leaves the place whose curvature is asked for. How large that is
    differs a thousandfold from direction to direction, so h is chosen by the KL that it leads to.
    """

    NEAR, AIM, FAR = 1e-7, 3e-6, 1e-4
    """Nats per token. Between them float32 is off by a thousandth or less (`test_products_are_those_of_the_model`)."""

    def __init__(
        self, kl_and_gradient: Callable[[Float[Tensor, " P"]], tuple[float, Float[Tensor, " P"]]], *, reach: float
    ) -> None:
        """kl_and_gradient: at the start plus its argument. reach: |h v| to begin with; ten times it is the most."""
        self._at, self._reach, self._most = kl_and_gradient, reach, 10.0 * reach

    def __call__(self, v: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """F v."""
        length = v.norm()
        if not length > 0:
            return torch.zeros_like(v)
        kl, ahead = self._at(v * (self._reach / length))
        for _ in range(4):
            wanted = min(self._reach * min(max((self.AIM / max(kl, 1e-30)) ** 0.5, 0.01), 10.0), self._most)
            if self.NEAR < kl < self.FAR or wanted == self._reach:
                break
            self._reach = wanted
            kl, ahead = self._at(v * (self._reach / length))
        _, behind = self._at(v * (-self._reach / length))
        return ahead.sub_(behind).mul_(length / (2.0 * self._reach))


def line_search(
    measure: Callable[[float], tuple[float, float]], *, loss: float, kl: float, shrink: float, tries: int
) -> tuple[float, float]:
    """The first of 1, shrink, shrink^2, ... at which the loss is below `loss` and the KL not above `kl`, and that KL.

    measure: loss and KL at a share of the step. Of no share out of `tries` it is (0, 0): the step is refused.

    >>> line_search(lambda share: (-share, share**2), loss=0.0, kl=0.3, shrink=0.5, tries=3)
    (0.5, 0.25)
    """
    for k in range(tries):
        share = shrink**k
        new_loss, new_kl = measure(share)
        if new_loss < loss and new_kl <= kl:
            return share, new_kl
    return 0.0, 0.0


class Weights:
    """Trained weights as one vector that is moved from where they stood."""

    def __init__(self, named: Mapping[str, nn.Parameter], start: Mapping[str, Tensor]) -> None:
        """start: where they stand now, in tensors that do not move with them."""
        self._pairs = [(parameter, start[name]) for name, parameter in named.items()]
        self._sizes = [parameter.numel() for parameter, _ in self._pairs]

    @torch.no_grad()
    def move(self, step: Float[Tensor, " P"], share: float = 1.0) -> None:
        """Put them at start + share * step; at share 0 to the last bit where they stood."""
        for (parameter, cell), piece in zip(self._pairs, step.split(self._sizes), strict=True):
            if share:
                torch.add(cell, piece.view_as(cell), alpha=share, out=parameter.data)
            else:
                parameter.copy_(cell)

    def gradient(self) -> Float[Tensor, " P"]:
        """A copy of their gradients, 0 where there is none."""
        return torch.cat([
            parameter.new_zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()
            for parameter, _ in self._pairs
        ])  # fmt: skip

    def length(self) -> float:
        """|start|."""
        return float(torch.stack([cell.norm() for _, cell in self._pairs]).norm())
