"""The engine against `transformers.generate`, and what it promises about seeds, ends and batches."""

import numpy as np
import pytest
import torch

from pertoken.errors import ModelError
from pertoken.policy.scoring import head_logits
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model

PROMPTS = [[5, 9, 12, 7, 31, 40], [1, 2, 3], [8] * 9, [5, 9, 12, 7, 31, 40]]


def engine_of(model, **settings):
    return NativeEngine(model, byte_tokenizer(), head_logits=head_logits, **settings)


def controls(**settings):
    return Controls.resolve(Sampling(**{"max_new_tokens": 20, **settings}), byte_tokenizer(), (256,))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram": 2},
        {"min_new_tokens": 8},
        {"repetition_penalty": 1.1, "no_repeat_ngram": 3, "min_new_tokens": 5},
    ],
)
def test_greedy_equals_transformers_token_for_token(kind, settings):
    model = tiny_model(kind, seed=3)
    got = engine_of(model).generate(PROMPTS, controls(temperature=0.0, **settings), seeds=[0] * 4)
    for prompt, completion in zip(PROMPTS, got, strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=20, pad_token_id=257, eos_token_id=256,
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            no_repeat_ngram_size=settings.get("no_repeat_ngram", 0),
            min_new_tokens=settings.get("min_new_tokens") or None,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert completion.tokens == wanted


def test_banned_words_equal_transformers():
    model = tiny_model(seed=3)
    plain = engine_of(model).generate(PROMPTS[:1], controls(temperature=0.0), seeds=[0])[0].tokens
    word = byte_tokenizer().decode(plain[2:4])
    c = controls(temperature=0.0, banned_words=(word,))
    got = engine_of(model).generate(PROMPTS[:1], c, seeds=[0])[0].tokens
    wanted = model.generate(
        torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=20, pad_token_id=257, eos_token_id=256,
        bad_words_ids=[list(ids) for ids in c.banned_ids],
    )[0, len(PROMPTS[0]) :].tolist()  # fmt: skip
    assert got == wanted != plain


def test_a_sample_depends_on_its_seed_and_not_on_its_batch():
    model = tiny_model()
    together = engine_of(model).generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    for k in (3, 0, 2, 1):
        alone = engine_of(model, max_rows=1).generate([PROMPTS[k]], controls(), seeds=[k + 1])[0]
        assert alone.tokens == together[k].tokens
    assert together[0].tokens != together[3].tokens  # same prompt, other seed


def test_sampled_frequencies_are_those_of_the_processed_distribution():
    """Chi-square on the first token over a vocabulary of 12, under every truncation and the temperature."""
    model = tiny_model(vocab=12, eos=11)
    for settings in (
        {},
        {"temperature": 0.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"repetition_penalty": 2.0},
    ):
        c = Controls(Sampling(max_new_tokens=1, **settings), (11,))
        count = 4000
        got = engine_of(model, max_rows=4000).generate([[1, 2, 3]] * count, c, seeds=range(count))
        seen = torch.bincount(torch.tensor([g.tokens[0] for g in got]), minlength=12).double()
        expected = torch.zeros(12, dtype=torch.double)
        for g in got:
            expected[g.tokens[0]] = torch.tensor(g.logprobs[0]).exp() * count
        assert abs(expected.sum().item() - count) < count * 0.02  # the log-probs are normalised
        chi = ((seen - expected).square() / expected.clamp_min(1e-9))[expected > 5].sum().item()
        assert chi < 40, (settings, chi)  # 11 degrees of freedom: 40 has probability 4e-5


def test_ends_are_told_apart():
    model = tiny_model(seed=1)
    completions = engine_of(model).generate(
        [[1, 2, 3]] * 40, controls(max_new_tokens=300, stop=("A",)), seeds=range(40)
    )
    tokenizer = byte_tokenizer()
    reasons = {c.stop for c in completions}
    assert reasons <= {"eos", "stop_string", "context"}
    assert {"eos", "stop_string"} <= reasons
    for c in completions:
        text = tokenizer.decode(c.tokens, skip_special_tokens=True)
        assert (c.stop == "eos") == (c.tokens[-1] == 256)
        assert (c.stop == "stop_string") == ("A" in text)
        assert 256 not in c.tokens[:-1]
    short = engine_of(model).generate([[1, 2, 3]] * 8, controls(max_new_tokens=2, min_new_tokens=2), seeds=range(8))
    assert {c.stop for c in short} == {"length"}
    assert {len(c.tokens) for c in short} == {2}


def test_the_context_ends_a_completion_and_refuses_a_prompt():
    engine = engine_of(tiny_model(eos=None), context_length=10)
    c = Controls(Sampling(max_new_tokens=50), ())
    done = engine.generate([[1] * 6], c, seeds=[0])[0]
    assert done.stop == "context"
    assert 6 + len(done.tokens) == 10
    with pytest.raises(ModelError, match="prompt has 10 tokens"):
        engine.generate([[1] * 10], c, seeds=[0])


def test_trap_17_generation_config_never_leaks_in():
    model = tiny_model()
    before = engine_of(model).generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    model.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=3.0, max_length=4, do_sample=False)
    after = engine_of(model).generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    assert [c.tokens for c in before] == [c.tokens for c in after]


def test_trap_8_pad_equal_to_eos_changes_nothing():
    model, tokenizer = tiny_model(seed=1), byte_tokenizer()
    wanted = engine_of(model).generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    tokenizer.pad_token = tokenizer.eos_token
    got = NativeEngine(model, tokenizer, head_logits=head_logits).generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    assert [c.tokens for c in got] == [c.tokens for c in wanted]


def test_a_copy_samples_from_the_weights_that_it_was_given():
    model = tiny_model()
    engine = engine_of(model, dtype=torch.float32)
    before = engine.generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    with torch.no_grad():
        model.lm_head.weight.mul_(-1.0)
    assert [c.tokens for c in engine.generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])] == [c.tokens for c in before]
    engine.load_weights(dict(model.named_parameters()), version=7)
    after = engine.generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])
    assert engine.version == 7
    assert (
        [c.tokens for c in after]
        == [c.tokens for c in engine_of(model).generate(PROMPTS, controls(), seeds=[1, 2, 3, 4])]
        != [c.tokens for c in before]
    )


# --- the engine on transformers.generate ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}, {"min_p": 0.05},
        {"repetition_penalty": 1.3}, {"no_repeat_ngram": 2}, {"min_new_tokens": 6}, {"stop": ("a", "e")},
        {"banned_words": ("e",)},
    ],
)  # fmt: skip
def test_both_engines_draw_the_same_tokens(settings):
    model, c = tiny_model(seed=2), controls(**settings)
    model.generation_config.repetition_penalty = 5.0  # what a model brings along never reaches a rollout
    model.generation_config.eos_token_id = 7
    slow = TransformersEngine(model, byte_tokenizer(), max_rows=3, context_length=128)
    got = slow.generate(PROMPTS, c, seeds=[1, 2, 3, 4])
    wanted = engine_of(model).generate(PROMPTS, c, seeds=[1, 2, 3, 4])
    assert model.generation_config.eos_token_id == 7
    for a, b in zip(got, wanted, strict=True):
        assert (a.tokens, a.stop) == (b.tokens, b.stop)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.entropies == pytest.approx(b.entropies, abs=1e-4)
        assert (a.support is None) == (b.support is None)
        assert a.support is None or np.array_equal(a.support, b.support)


def test_the_engine_on_generate_takes_new_weights_and_the_edge_of_the_context():
    model, other = tiny_model(), tiny_model(seed=5)
    slow = TransformersEngine(model, byte_tokenizer(), dtype=torch.float32, context_length=128)
    slow.load_weights(dict(other.named_parameters()), version=3)
    c = controls(max_new_tokens=20)
    got = slow.generate([[1] * 120, [4, 5]], c, seeds=[0, 1])
    wanted = engine_of(other).generate([[1] * 120, [4, 5]], c, seeds=[0, 1])
    assert slow.version == 3
    assert [x.tokens for x in got] == [x.tokens for x in wanted]
    assert [x.stop for x in got] == [x.stop for x in wanted]
    with pytest.raises(ModelError, match="128 tokens"):
        slow.generate([[1] * 128], c, seeds=[0])
