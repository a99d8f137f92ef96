"""Decoders against each other and against `generate`, over families, slots and moves."""

import pytest
import torch

from pertoken import native
from pertoken.policy.model import Lora, Policy
from pertoken.policy.scoring import head_logits
from pertoken.rollout import decoder as decoders
from pertoken.rollout import rows
from pertoken.rollout.decoder import HFDecoder, RecomputingDecoder, agrees
from pertoken.rollout.engine import NativeEngine
from pertoken.rollout.fused import FusedDecoder, fused_decoder
from pertoken.sampling import Controls, Sampling
from pertoken.testing import FAMILIES, byte_tokenizer, family_model, tiny_model

PROMPTS = [[5, 9, 12, 7, 31, 40], [1, 2, 3], [8] * 9, [5, 9, 12, 7, 31, 40], [33, 20, 1, 5]]
GREEDY = Controls(Sampling(temperature=0.0, max_new_tokens=20), (63,))


def by_generate(model, prompt):
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": 63}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_equals_generate_token_for_token(name):
    """Three slots for five prompts, so that rows end, move and make room for others."""
    model = family_model(name)
    engine = NativeEngine(model, byte_tokenizer(), head_logits=head_logits, max_rows=3)
    got = [c.tokens for c in engine.generate(PROMPTS, GREEDY, seeds=[0] * 5)]
    assert got == [by_generate(model, prompt) for prompt in PROMPTS]
    wanted = RecomputingDecoder if name in ("bloom", "gemma2") else HFDecoder
    assert type(engine.decoder) is wanted


@pytest.mark.parametrize(("name", "dtype"), [("llama", None), ("llama", torch.bfloat16), ("bloom", None)])
def test_a_released_engine_samples_the_same_when_loaded_again(name, dtype):
    model = family_model(name)
    engine = NativeEngine(model, byte_tokenizer(), head_logits=head_logits, max_rows=3, dtype=dtype)
    before = engine.generate(PROMPTS, GREEDY, seeds=[0] * 5)
    engine.release()
    engine.load_weights(dict(model.named_parameters()), version=1)
    after = engine.generate(PROMPTS, GREEDY, seeds=[0] * 5)
    assert [c.tokens for c in after] == [c.tokens for c in before]


def test_waiting_prompts_take_free_slots():
    model, c = tiny_model(), Controls(Sampling(max_new_tokens=20), (256,))
    alone = NativeEngine(model, byte_tokenizer(), head_logits=head_logits).generate(PROMPTS, c, seeds=range(5))
    calls = []
    engine = NativeEngine(model, byte_tokenizer(), head_logits=head_logits, max_rows=2)
    step = engine.decoder.step
    engine.decoder.step = lambda tokens: calls.append(len(tokens)) or step(tokens)
    assert [r.tokens for r in engine.generate(PROMPTS, c, seeds=range(5))] == [r.tokens for r in alone]
    assert sum(calls) == sum(len(r.tokens) - 1 for r in alone)  # nothing is computed for a row that has ended
    assert max(calls) == 2


def test_each_prompt_is_computed_once_for_its_group():
    engine = NativeEngine(tiny_model(), byte_tokenizer(), head_logits=head_logits)
    seen = []
    prefill = engine.decoder.prefill
    engine.decoder.prefill = lambda prompts, slots: seen.extend(map(list, slots)) or prefill(prompts, slots)
    engine.generate([[1, 2, 3]] * 4 + [[4, 5]] * 3, Controls(Sampling(max_new_tokens=3), ()), seeds=range(7))
    assert seen == [[0, 1, 2, 3], [4, 5, 6]]


@torch.no_grad()
def test_the_measurement_sees_a_decoder_that_is_wrong():
    model = tiny_model()
    decoder = HFDecoder(model, head_logits)
    assert agrees(decoder, model, tolerance=1e-3)
    decoder._head_logits = lambda m, hidden: head_logits(m, hidden.roll(1, -1))
    assert not agrees(decoder, model, tolerance=1e-3)


@torch.no_grad()
def test_the_measurement_sees_prompts_that_see_each_other(monkeypatch):
    model = tiny_model()
    decoder = HFDecoder(model, head_logits)
    assert agrees(decoder, model, tolerance=1e-3)
    own = decoders._Prompts.__init__

    def leaky(self, decoder, lengths, slots):
        own(self, decoder, lengths, slots)
        self.lengths, self.ends = [sum(lengths)], [sum(lengths)]

    monkeypatch.setattr(decoders._Prompts, "__init__", leaky)
    assert not agrees(decoder, model, tolerance=1e-3)


@pytest.mark.skipif(
    not native.attends(torch.float32), reason="no C++ compiler here, or a processor that oneDNN does not know"
)
@pytest.mark.parametrize(("heads", "shared", "width", "v_width"), [(2, 3, 64, 64), (1, 7, 24, 8), (3, 1, 80, 80)])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_of_slots_is_that_of_plain_torch(heads, shared, width, v_width, window, dtype, monkeypatch):
    """Prompts of several lengths, then two tokens for each row, in memory that held something else before."""
    draw, lengths = torch.Generator().manual_seed(0), [9, 1, 33]

    def numbers(*shape):
        return torch.randn(*shape, generator=draw).to(dtype)

    def inputs(rows, count):
        return (
            numbers(rows, heads * shared, count, width),
            numbers(rows, heads, count, width),
            numbers(rows, heads, count, v_width),
        )

    decoder = HFDecoder(tiny_model(), head_logits)
    prompts, slots = decoders._Prompts(decoder, lengths, [[0], [2, 3], [1]]), [9, 33, 1, 1]
    passes = [(prompts, inputs(1, sum(lengths)))]
    passes += [(decoders._Step(decoder, [n + k for n in slots]), inputs(4, 1)) for k in range(2)]
    memory = numbers(5, heads, 40, width), numbers(5, heads, 40, v_width)

    def run():
        keys, values = (x.clone() for x in memory)
        return [*(now.attend(*x, keys, values, window, 0.2) for now, x in passes), keys, values]

    got = run()
    with monkeypatch.context() as without:
        without.setattr(native, "takes", lambda *tensors: False)
        wanted = run()
    for a, b in zip(got[:3], wanted[:3], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 if dtype is torch.float32 else 0.03, rtol=0.01)
    for a, b in zip(got[3:], wanted[3:], strict=True):
        assert torch.equal(a, b)


# --- the fused decoder --------------------------------------------------------------------------------------


def fused_model(name="llama"):
    """A family whose heads are as wide as the compiled code wants them (a multiple of 16)."""
    kind, settings = FAMILIES[name]
    FAMILIES["wide"] = (kind, settings | {"head_dim": 16, "hidden_size": 64, "sliding_window": None})
    try:
        model = family_model("wide")
    finally:
        del FAMILIES["wide"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(0.5)
    return model


def needs_compiler(decoder):
    if decoder is None:
        pytest.skip("no C++ compiler, or a processor that the packed products do not know")
    return decoder


@pytest.mark.parametrize("together", [2048, 20])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_fused_logits_are_the_models_own_up_to_bfloat16(name, together, monkeypatch):
    """Two prompts in one pass or in one each, of which one is no multiple of a block of keys."""
    monkeypatch.setattr(decoders, "PREFILL_TOKENS", together)
    model = fused_model(name)
    decoder = needs_compiler(fused_decoder(model))
    ids = torch.arange(30) * 7 % 64
    decoder.reserve(3, 20, 10)
    other, one = decoder.prefill([[3, 4], ids[:20].tolist()], [[1], [0, 2]])
    assert (other.float() - model(input_ids=torch.tensor([[3, 4]])).logits[0, -1]).abs().mean() < 0.02 * other.std()
    found = [one]
    for k in range(20, 30):
        found.append(decoder.step(torch.tensor([ids[k], 9, ids[k]]))[2])
        if k == 24:  # the row goes on in another slot
            decoder.move(2, 1)
            decoder.move(1, 2)
    wanted = model(input_ids=ids[None], use_cache=False).logits[0, 19:]
    assert (torch.stack(found).float() - wanted).abs().mean() < 0.02 * wanted.std()


@pytest.mark.skipif(not native.available(), reason="no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_draws_are_those_of_plain_torch(dtype, monkeypatch):
    logits = (torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    uniforms = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for temperature in (1.0, 0.6, 1.8, 0.0):
        got = rows.draw_plain(logits, temperature, uniforms)
        with monkeypatch.context() as without:
            without.setattr(native, "available", lambda: False)
            wanted = rows.draw_plain(logits, temperature, uniforms)
        assert torch.equal(got[0], wanted[0])
        for a, b in zip(got[1:], wanted[1:], strict=True):
            torch.testing.assert_close(a.float(), b, atol=2e-5, rtol=1e-5)


def test_the_fused_decoder_follows_the_weights_and_the_adapters():
    model = fused_model()
    needs_compiler(fused_decoder(model))
    policy = Policy(model, byte_tokenizer(), precision="bfloat16", lora=Lora(rank=2))
    engine = NativeEngine(policy.model, byte_tokenizer(), head_logits=head_logits, dtype=torch.bfloat16)
    assert isinstance(engine.decoder, FusedDecoder)
    c = Controls(Sampling(max_new_tokens=12), (63,))
    before = engine.generate(PROMPTS, c, seeds=range(5))
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            if "lora_B" in name:
                parameter.add_(0.5)
    assert [r.tokens for r in engine.generate(PROMPTS, c, seeds=range(5))] == [r.tokens for r in before]
    engine.load_weights(policy.trainable(), version=1)
    after = engine.generate(PROMPTS, c, seeds=range(5))
    assert [r.tokens for r in after] != [r.tokens for r in before]
    assert engine.version == 1


def test_shapes_that_the_code_does_not_know_are_left_to_the_plain_decoder():
    for name in ("gemma", "gpt2", "mistral"):  # another norm, another layout, a window
        assert fused_decoder(family_model(name)) is None
