"""Products with packed weights against plain ones, where both are exact."""

import pytest
import torch

from pertoken import native
from pertoken.rollout.packing import multiply, pack

needs_products = pytest.mark.skipif(not native.multiplies(), reason="oneDNN multiplies on this processor")


def integers(*shape, seed):
    """Small enough that neither products nor sums of them are rounded in bfloat16."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(-1, 2, shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.3)).bfloat16()


@pytest.mark.parametrize(("n", "k"), [(16, 2), (48, 64), (64, 30), (176, 128), (960, 576), (50, 32), (32, 7)])
@pytest.mark.parametrize("rows", [1, 3, 8, 13, 75])
def test_products_of_integers_are_exact(n, k, rows):
    """Panels with one, two and three vectors, rows that fill no block, and shapes that oneDNN is left with."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no products in bfloat16 on this processor")
    x, weight, bias = integers(rows, k, seed=1), integers(n, k, seed=2), integers(n, seed=3)
    wanted = x.float() @ weight.float().T
    assert wanted.abs().max() < 256
    packed = pack(weight.float())
    assert torch.equal(multiply(x, packed).float(), wanted)
    assert torch.equal(multiply(x, packed, bias).float(), wanted + bias.float())
    assert torch.equal(multiply(x[None], packed)[0].float(), wanted)


@needs_products
def test_a_row_has_the_same_product_whatever_else_is_in_the_batch():
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 576, generator=draw).bfloat16() for n in (21, 192))
    packed = pack(weight)
    together = multiply(x, packed)
    for k in range(len(x)):
        assert torch.equal(multiply(x[k : k + 1], packed)[0], together[k])


@needs_products
def test_weights_that_do_not_lie_in_panels_are_refused_by_name():
    with pytest.raises(RuntimeError, match="50 x 32"):
        torch.ops.pertoken.pack(torch.zeros(50, 32, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match=r"\[\.\.\., 32\]"):
        multiply(torch.zeros(2, 30, dtype=torch.bfloat16), pack(torch.zeros(48, 32)))
