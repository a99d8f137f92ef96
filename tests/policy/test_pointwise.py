"""Activations and norms through torch.compile: only where a trial says so, and with the same numbers."""

import copy
import json

import pytest
import torch
from torch._dynamo.utils import counters

from pertoken import native
from pertoken.policy import pointwise
from pertoken.policy.model import Policy
from pertoken.policy.pointwise import Trial, compile_pointwise
from pertoken.testing import byte_tokenizer, family_model
from tests.policy.test_families import ragged

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    return tmp_path / "compile"


def always(monkeypatch):
    """As if each trial said that it pays."""
    monkeypatch.setattr(pointwise, "_milliseconds", lambda forward, module, use: next(times))
    times = iter([10.0, 1.0] * 50)


@needs_compiler
def test_gradients_and_log_probs_are_those_of_the_plain_model_and_one_compilation_serves_all_lengths(monkeypatch):
    always(monkeypatch)
    torch._dynamo.reset()
    counters.clear()
    plain = Policy(family_model("gpt2"), byte_tokenizer(), precision="float32", compile=False)
    model = family_model("gpt2")
    fast = Policy(model, byte_tokenizer(), precision="float32", compile=False)
    fast.pointwise = compile_pointwise(model, None, least_width=1)
    assert {type(module).__name__ for module in fast.pointwise.compiled} == {"NewGELUActivation"}
    assert len(fast.pointwise.compiled) > 1
    batch = ragged()
    for some in (batch, batch.rows(torch.tensor([0, 1])), batch.rows(torch.tensor([2]))):
        outputs = [policy.score(some, grad=True).logprobs for policy in (plain, fast)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        for output in outputs:
            output.sum().backward()
    for (name, a), b in zip(plain.trainable().items(), fast.trainable().values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4, msg=name)
    assert counters["stats"]["unique_graphs"] <= 2  # the trial's without gradient, and the passes'


@needs_compiler
def test_what_pays_is_measured_once_and_remembered(monkeypatch, own_cache):
    always(monkeypatch)
    first = compile_pointwise(family_model("gpt2"), None, least_width=1)
    (file,) = own_cache.glob("*.json")
    assert Trial(**json.loads(file.read_text())) == first.trials[0]
    assert first.trials[0].pays
    monkeypatch.setattr(pointwise, "_try", None)  # it would fail
    again = compile_pointwise(family_model("gpt2"), None, least_width=1)
    assert again.trials == first.trials
    file.write_text("{}")
    with pytest.raises(TypeError):
        compile_pointwise(family_model("gpt2"), None, least_width=1)


def test_what_does_not_pay_or_cannot_be_compiled_stays_as_it_is(monkeypatch):
    model = family_model("gpt2")
    monkeypatch.setattr(pointwise, "_try", lambda module, use: Trial(use.name, 10.0, 9.0))
    assert not compile_pointwise(model, None, least_width=1).compiled
    assert not Trial("one", 10.0, None).pays


def test_without_a_compiler_the_trial_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fail)
    found = compile_pointwise(family_model("gpt2"), None, least_width=1)
    assert [trial.compiled for trial in found.trials] == [None]
    assert not found.compiled


def test_narrow_rows_are_not_tried_and_fused_layers_neither(monkeypatch):
    monkeypatch.setattr(pointwise, "_try", None)
    assert compile_pointwise(family_model("gpt2"), None).trials == ()
    llama = Policy(family_model("llama"), byte_tokenizer(), compile=False).hf_model
    if native.available():
        assert compile_pointwise(llama, None, least_width=1).trials == ()


@needs_compiler
def test_a_compiled_form_is_in_use_in_passes_alone_and_copies_do_not_share_it(monkeypatch):
    always(monkeypatch)
    model = family_model("gpt2")
    found = compile_pointwise(model, None, least_width=1)
    module = next(iter(found.compiled))
    with found.in_use():
        assert "forward" in vars(module)
    assert "forward" not in vars(module)
    twin = copy.deepcopy(model)
    assert not any("forward" in vars(m) for m in twin.modules())


@needs_compiler
def test_a_trial_leaves_no_gradient_behind():
    """The modules are the policy's own: what a trial leaves in `.grad` would be part of the first update."""
    model = family_model("gemma")
    found = compile_pointwise(model, None, least_width=1)
    assert any("RMSNorm" in trial.name for trial in found.trials)
    assert all(p.grad is None for p in model.parameters())
