"""What an update is expected to take, beside sizes that are known by hand."""

import gc

import pytest
import torch

from pertoken import native
from pertoken.policy.footprint import OPTIMISER_COPIES, footprint
from pertoken.policy.model import Lora, Policy
from pertoken.testing import byte_tokenizer, tiny_model


def policy(**settings):
    return Policy(tiny_model(), byte_tokenizer(), **settings)


def bytes_of(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)


def test_gradients_and_averages_of_what_is_trained():
    full = policy(precision="float32")
    assert footprint(full).trained == OPTIMISER_COPIES * bytes_of(full.model.parameters())
    lora = policy(precision="float32", lora=Lora(rank=2))
    assert footprint(lora).trained == OPTIMISER_COPIES * bytes_of(lora.trainable().values()) < footprint(full).trained


def test_a_pass_keeps_casts_of_frozen_weights_alone():
    exact, fast = footprint(policy(precision="float32")), footprint(policy(precision="bfloat16"))
    frozen = footprint(policy(precision="bfloat16", lora=Lora(rank=2)))
    linears = {name: m for name, m in tiny_model().named_modules() if isinstance(m, torch.nn.Linear)}
    layers = [m.weight for name, m in linears.items() if "head" not in name]
    assert max(exact.per_pass, fast.per_pass) < 1000
    if native.attends(torch.bfloat16):  # else attention keeps squares, and a line through two sizes is no measure
        assert frozen.per_pass == pytest.approx(bytes_of(layers) / 2, rel=0.2)
        assert fast.per_token < exact.per_token


def test_a_token_keeps_what_its_layers_keep():
    # Each of the two layers keeps at least the inputs of its 7 matrices: 4 x 32 + 3 of the MLP, 64 wide, 4 bytes each.
    per_token = footprint(policy(precision="float32")).per_token
    assert 2 * 4 * (4 * 32 + 64) < per_token < 2 * 4 * 40 * 64


def test_an_update_grows_with_its_micro_batch():
    of = footprint(policy(precision="float32"))
    assert of.update(2000) - of.update(1000) == 1000 * of.per_token


def test_the_probe_draws_no_random_number():
    noisy = policy(precision="float32", dropout=True)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    footprint(noisy)
    assert torch.equal(torch.rand(1), expected)


def test_the_probe_leaves_nothing_behind():
    policy_ = policy(precision="bfloat16")
    footprint(policy_)
    gc.collect()
    before = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    gc.disable()
    try:
        footprint(policy_)
        assert sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) <= before
    finally:
        gc.enable()
