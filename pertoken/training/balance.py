"""Gradients of several tasks as one: what pulls against another task is taken out before they are added up."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def pcgrad(products: Float[Tensor, "K K"], orders: Sequence[Sequence[int]]) -> Float[Tensor, " K"]:
    """Weights w such that sum_k w_k g_k is the sum of the gradients g_k after each was freed of its conflicts.

        p_i = g_i;   for j in orders[i]:   p_i <- p_i - (p_i . g_j) / |g_j|^2 g_j   where p_i . g_j < 0

    products: g_i . g_j. orders: for each i the others, in random order. Each p_i is made of gradients, so their dot
    products are all that is asked for. "Projecting conflicting gradients", Yu et al. 2020,
    https://arxiv.org/abs/2001.06782, algorithm 1.

    >>> pcgrad(torch.tensor([[1.0, -1.0], [-1.0, 2.0]]), [[1], [0]])  # of (1, 0) and (-1, 1)
    tensor([2.0000, 1.5000])
    """
    made_of = torch.eye(len(products), dtype=products.dtype)
    for i, order in enumerate(orders):
        for j in order:
            along = made_of[i] @ products[:, j]
            if along < 0:
                made_of[i, j] -= along / products[j, j]
    return made_of.sum(0)


class Gradients:
    """The gradients of the tasks of an optimiser step, each kept apart until all are there."""

    def __init__(self, named: Mapping[str, Tensor], *, seed: int) -> None:
        """named: what is trained. seed: of the random orders."""
        self._parameters = list(named.values())
        self._apart: list[list[Tensor]] = []
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        self._cosines: list[float] = []

    def forget(self) -> None:
        """Drop what was put aside and not yet combined."""
        self._apart.clear()

    def put_aside(self) -> None:
        """Take what is in `.grad` as the gradient of one task, and leave 0 there."""
        gradients = []
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad.clone())
            parameter.grad.zero_()
        self._apart.append(gradients)

    def combine(self) -> None:
        """Put the sum of all that was put aside, without conflicts, into `.grad`."""
        count = len(self._apart)
        products = torch.zeros(count, count, dtype=torch.float64)
        for i, left in enumerate(self._apart):
            for j, right in enumerate(self._apart[: i + 1]):
                dots = [torch.dot(a.flatten(), b.flatten()).item() for a, b in zip(left, right, strict=True)]
                products[i, j] = products[j, i] = sum(dots)
        lengths = products.diagonal().sqrt()
        self._cosines += [
            (products[i, j] / (lengths[i] * lengths[j])).item()
            for i in range(count)
            for j in range(i)
            if lengths[i] > 0 and lengths[j] > 0
        ]
        orders = [
            [j for j in torch.randperm(count, generator=self._generator).tolist() if j != i] for i in range(count)
        ]
        weights = pcgrad(products, orders).tolist()
        for weight, gradients in zip(weights, self._apart, strict=True):
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(gradient, alpha=weight)
        self._apart.clear()

    def figures(self) -> dict[str, float]:
        """What is logged of all that was combined: how far tasks pull the same way, and how many pairs do not."""
        count = len(self._cosines)
        if not count:
            return {}
        against = sum(cosine < 0 for cosine in self._cosines)
        return {"balance/cosine": sum(self._cosines) / count, "balance/conflicts": against / count}
