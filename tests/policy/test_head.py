"""The head with its own gradient against autograd through float logits."""

import pytest
import torch

from pertoken import native
from pertoken.policy import head
from pertoken.policy.head import linear_logprobs


def by_autograd(hidden, weight, bias, targets, temperature):
    z = torch.nn.functional.linear(hidden, weight, bias) / temperature
    logp = z.log_softmax(1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kept", [1 << 30, 200])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_autograd(monkeypatch, compiled, kept, with_bias, temperature):
    """With logits kept for the backward pass or made again, in blocks that do not divide the number of rows."""
    if not compiled:
        monkeypatch.setattr(native, "takes", lambda *tensors: False)
    monkeypatch.setattr(head, "KEPT_BYTES", kept)
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * 17 * 3)
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=draw, requires_grad=True) for s in ((11, 5), (17, 5), (17,)))
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    targets = torch.randint(17, (11,), generator=draw)
    one, other = torch.randn(2, 11, generator=draw)
    given = (hidden, weight, bias if with_bias else None, targets)
    got = linear_logprobs(*given, temperature=temperature, entropy_grad=True)
    wanted = by_autograd(*given, temperature)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((got[0] * one + got[1] * other).sum(), inputs)
    for a, b in zip(gradients, torch.autograd.grad((wanted[0] * one + wanted[1] * other).sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_the_entropy_pulls_only_when_asked():
    hidden, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    targets = torch.tensor([0, 1, 2])
    _, entropy = linear_logprobs(hidden, weight, None, targets, temperature=1.0, entropy_grad=False)
    assert not entropy.requires_grad


def test_a_huge_logit_is_no_overflow():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[1e4], [-1e4], [0.0]])
    logprobs, entropy = linear_logprobs(hidden, weight, None, torch.tensor([0]), temperature=1.0, entropy_grad=False)
    assert logprobs.item() == 0.0
    assert entropy.item() == 0.0
