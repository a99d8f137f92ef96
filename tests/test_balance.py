"""Gradients of several tasks: the projection by hand, what it leaves alone, and that of a real update."""

import itertools

import pytest
import torch

from pertoken.training.balance import Gradients, pcgrad


def projected(gradients, orders):
    """The sum of the projected gradients, vector by vector as the paper writes it."""
    total = torch.zeros_like(gradients[0])
    for i, order in enumerate(orders):
        own = gradients[i].clone()
        for j in order:
            if own @ gradients[j] < 0:
                own -= own @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        total += own
    return total


def combined(gradients, orders):
    rows = torch.stack(gradients)
    return pcgrad(rows @ rows.T, orders) @ rows


def vectors(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_two_that_conflict_by_hand():
    """(1, 0) and (-1, 1): the first loses half of the second, (0.5, 0.5), the second all of the first, (0, 1)."""
    assert combined(vectors([1, 0], [-1, 1]), [[1], [0]]).tolist() == [0.5, 1.5]


def test_the_order_matters_and_is_followed():
    """(1, 0) freed of (-1, 1) is (0.5, 0.5), and then of (-1, -2) (0.2, -0.1); the other way round it is (0.2, 0.2)."""
    three = vectors([1, 0], [-1, 1], [-1, -2])
    for order, wanted in ([1, 2], [0.2, -0.1]), ([2, 1], [0.2, 0.2]):
        alone = combined(three, [order, [], []]) - three[1] - three[2]
        assert alone.tolist() == pytest.approx(wanted)
    for orders in itertools.product([[1, 2], [2, 1]], [[0, 2], [2, 0]], [[0, 1], [1, 0]]):
        assert torch.allclose(combined(three, orders), projected(three, orders))


@pytest.mark.parametrize("seed", range(5))
def test_dot_products_are_enough(seed):
    """The same as projecting vectors, whatever they are."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(4)]
    orders = [[j for j in torch.randperm(4, generator=generator).tolist() if j != i] for i in range(4)]
    assert torch.allclose(combined(rows, orders), projected(rows, orders))


def test_without_a_conflict_it_is_the_plain_sum():
    for rows in (vectors([1, 0], [0, 2]), vectors([1, 2], [3, 1]), vectors([1, 1], [0, 0]), vectors([3, 4])):
        orders = [[j for j in range(len(rows)) if j != i] for i in range(len(rows))]
        assert torch.equal(combined(rows, orders), sum(rows))


def test_of_two_neither_loses_by_the_sum():
    """For two tasks the sum of the projections works against neither: what plain addition does not promise."""
    one, other = vectors([1, 0], [-5, 1])
    assert (one + other) @ one < 0
    total = combined([one, other], [[1], [0]])
    assert total @ one >= 0
    assert total @ other >= 0


def test_gradients_are_put_aside_and_come_back_combined():
    parameters = {"a": torch.nn.Parameter(torch.zeros(1)), "b": torch.nn.Parameter(torch.zeros(1))}
    gradients = Gradients(parameters, seed=0)
    for first, second in ([1.0, 0.0], [-1.0, 1.0]):
        (first * parameters["a"] + second * parameters["b"]).sum().backward()
        gradients.put_aside()
        assert not any(p.grad.any() for p in parameters.values())
    gradients.combine()
    assert [p.grad.item() for p in parameters.values()] == [0.5, 1.5]
    assert gradients.figures() == {"balance/cosine": pytest.approx(-(0.5**0.5)), "balance/conflicts": 1.0}


def test_one_task_alone_comes_back_as_it_was():
    parameter = torch.nn.Parameter(torch.zeros(3))
    gradients = Gradients({"p": parameter}, seed=0)
    (parameter * torch.tensor([1.0, -2.0, 3.0])).sum().backward()
    gradients.put_aside()
    gradients.combine()
    assert parameter.grad.tolist() == [1.0, -2.0, 3.0]
    assert gradients.figures() == {}
