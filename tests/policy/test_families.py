"""Packed rows give what the plain padded forward of each family gives: log-probs, and gradients of every parameter."""

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.policy.model import Policy
from pertoken.policy.scoring import find_layout
from pertoken.sampling import Controls
from pertoken.testing import FAMILIES, byte_tokenizer, episode, family_model

UNPACKED = {"bloom": "distances are in its own mask", "gemma2": "its attention has a soft cap"}


def ragged():
    """Unequal groups and lengths, longer than the window of the families that have one."""
    rows = [
        episode([1, 2, 3, 4, 9, 8, 7, 6], [5, 6, 7, 8, 9, 10, 11], id="a", group=0),
        episode([1, 2, 3, 4, 9, 8, 7, 6], [9, 8], id="b", group=0),
        episode([1, 2, 3, 4, 9, 8, 7, 6], [9, 30, 31, 32, 33, 34, 35, 36, 37], id="c", group=0),
        episode([4, 4], [1, 2, 3, 4, 5, 6, 7], id="d", group=1),
        episode([4, 4], [2, 2, 2], id="f", group=1),
        episode([7, 5, 3], [2, 2, 2, 9, 11, 13, 15], id="g", group=2),
    ]
    return to_batch(rows, Controls())


def plain_logprobs(model, batch):
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), use_cache=False).logits
    chosen = logits[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    return torch.nn.functional.pad(chosen, (1, 0)).masked_fill(~batch.action_mask, 0.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_and_gradients_are_those_of_the_plain_forward(name):
    model, batch = family_model(name), ragged()
    weights = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    wanted = plain_logprobs(model, batch)
    (wanted * weights).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = Policy(model, byte_tokenizer(), precision="float32")
    assert policy.layout == ("padded" if name in UNPACKED else "packed")
    got = policy.score(batch, grad=True).logprobs
    assert (got - wanted).abs().max() < 1e-4
    (got * weights).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys()
    one, other = (torch.cat([g[key].flatten() for key in gradients]) for g in (found, gradients))
    assert torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0) > 0.99999
    torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_packed_is_found_by_measuring():
    model = family_model("llama")
    assert find_layout(model) == "packed"
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2  # read by the plain forward and by the attention function alike
    assert find_layout(model) == "packed"
    plain = model.model.forward
    model.model.forward = lambda **inputs: plain(**{**inputs, "position_ids": None})  # ignores where tokens stand
    assert find_layout(model) == "padded"
