"""Models that read with an encoder and write with a decoder go the whole way that causal ones go."""

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedTokenizerFast

from pertoken import assembly
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.doctor import examine
from pertoken.errors import ConfigError, ModelError
from pertoken.forward import decoder_start
from pertoken.jobs import run
from pertoken.policy.model import Lora, Policy, ValueHead, load_model, set_languages
from pertoken.policy.scoring import by_own_logits, head_logits
from pertoken.rollout.by_generate import TransformersEngine, own_settings_aside
from pertoken.rollout.collect import to_episode
from pertoken.rollout.decoder import RecomputingDecoder
from pertoken.rollout.engine import NativeEngine
from pertoken.rollout.reading import ReadingDecoder, _Together
from pertoken.sampling import Controls, Sampling
from pertoken.testing import ENCODER_DECODERS, byte_tokenizer, episode, family_model, tiny_encoder_decoder
from pertoken.training.examples import Examples
from pertoken.types import Item

PROMPTS = [[5, 6, 7, 63], [8, 9, 63], [5, 6, 7, 63], [10, 11, 12, 13, 14, 63], [5, 6, 7, 63]]


def ragged():
    """Unequal groups and lengths; a hole in the actions; a start token among what is said."""
    rows = [
        episode([12, 2, 3, 63], [5, 6, 7, 8, 9, 10, 11], id="a", group=0),
        episode([12, 2, 3, 63], [9, 63], id="b", group=0),
        episode([4, 63], [3, 2, 30, 31, 2], id="c", group=1),
        episode([7, 5, 3, 22, 21, 63], [63], id="d", group=2),
    ]
    rows[0].action_mask[6] = False
    return to_batch(rows, Controls())


def by_padded_forward(model, batch):
    """The whole model on right-padded sources and targets, as a supervised loss would call it."""
    start = torch.tensor(decoder_start(model))
    lengths = batch.attention_mask.sum(1).tolist()
    prompts = [batch.tokens[b, :n] for b, n in enumerate(batch.prompt_lengths())]
    rests = [batch.tokens[b, len(p) : lengths[b]] for b, p in enumerate(prompts)]
    read = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=model.config.pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True)
    written = torch.nn.utils.rnn.pad_sequence([torch.cat([start, r]) for r in rests], batch_first=True)
    logits = model(input_ids=read, attention_mask=mask, decoder_input_ids=written, use_cache=False).logits
    found = torch.zeros(batch.tokens.shape)
    for b, (prompt, rest) in enumerate(zip(prompts, rests, strict=True)):
        logprobs = logits[b, len(start) - 1 :][: len(rest)].log_softmax(1).gather(1, rest[:, None])[:, 0]
        found[b, len(prompt) : lengths[b]] = logprobs
    return found.masked_fill(~batch.action_mask, 0.0)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_logprobs_and_gradients_are_those_of_the_plain_forward(name):
    model, batch = family_model(name), ragged()
    weights = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    wanted = by_padded_forward(model, batch)
    (wanted * weights).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for into_grad in (False, True):
        model.zero_grad()
        policy = Policy(model, byte_tokenizer(), precision="float32", compile=False)
        assert policy.layout == "encoder_decoder"
        got = policy.score(batch, grad=True, into_grad=into_grad).logprobs
        assert (got - wanted).abs().max() < 1e-4
        (got * weights).sum().backward()
        found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == gradients.keys()
        one, other = (torch.cat([g[key].flatten() for key in gradients]) for g in (found, gradients))
        assert torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0) > 0.99999
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_greedy_answers_are_those_of_generate(name):
    model = family_model(name)
    controls = Controls(Sampling(temperature=0.0, max_new_tokens=12), eos_ids=(63,))
    found = NativeEngine(model, byte_tokenizer(), head_logits=head_logits).generate(PROMPTS, controls, seeds=range(5))
    start = list(decoder_start(model))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=63, decoder_start_token_id=start[0])
        with own_settings_aside(model):  # BART's would hold the last place to the end of the text
            out = model.generate(
                torch.tensor([prompt]), decoder_input_ids=torch.tensor([start]), generation_config=config
            )
        assert completion.tokens == out[0, len(start) :].tolist()


@pytest.mark.parametrize("name", ["t5", "marian", "bart, first token forced", "m2m_100"])
def test_the_engines_draw_the_same_tokens_and_scoring_says_their_logprobs(name):
    """Fewer places than rows: rows leave, others begin later, and lengths differ all the time.

    Padding (id 1) ends a text here: behind it `generate` and one pass of the whole text disagree on places in M2M100.
    """
    model, tokenizer = family_model(name), byte_tokenizer()
    controls = Controls(Sampling(max_new_tokens=20, temperature=1.3, top_k=40), eos_ids=(63, 1, 17, 18, 19, 20, 21))
    policy = Policy(model, tokenizer, precision="float32", compile=False)
    native = NativeEngine(model, tokenizer, head_logits=head_logits, max_rows=2)
    slow = NativeEngine(model, tokenizer, head_logits=head_logits, max_rows=3)
    slow.decoder = RecomputingDecoder(model, head_logits)
    plain = TransformersEngine(model, tokenizer, context_length=128)
    prompts = PROMPTS * 2
    found = [engine.generate(prompts, controls, seeds=range(10)) for engine in (native, slow, plain)]
    assert isinstance(native.decoder, ReadingDecoder)  # and not its slow twin, which stands in for one that fails
    assert len({len(c.tokens) for c in found[0]}) > 3
    for other in found[1:]:
        assert [c.tokens for c in other] == [c.tokens for c in found[0]]
        assert [c.stop for c in other] == [c.stop for c in found[0]]
    rows = [
        to_episode(str(k), Item(str(k), ""), k, p, c, 0) for k, (p, c) in enumerate(zip(prompts, found[0], strict=True))
    ]
    batch = to_batch(rows, controls)
    gap = (policy.score(batch).logprobs - batch.sample_logprobs)[batch.action_mask].abs().max()
    assert gap < 5e-4  # logits of these weights go to 30


def test_waiting_rows_are_let_in_together():
    """Rows that began at different times are computed apart: let in one by one, each would cost a call for itself."""
    model, tokenizer, slots = family_model("marian"), byte_tokenizer(), 8
    controls = Controls(Sampling(max_new_tokens=20), eos_ids=tuple(range(0, 64, 8)))
    engine = NativeEngine(model, tokenizer, head_logits=head_logits, max_rows=slots)
    prompts = [[5, 6, 7 + k, 63] for k in range(40)]
    sizes: list[int] = []
    run = engine.decoder._run

    def counted(cohort, ids):
        sizes.append(len(ids))
        return run(cohort, ids)

    engine.decoder._run = counted
    found = engine.generate(prompts, controls, seeds=range(40))
    assert len({len(c.tokens) for c in found}) > 5
    assert max(sizes) <= slots
    assert sum(sizes) / len(sizes) > slots / 4


def test_rows_that_end_in_one_step_cost_one_copy_of_the_memory(monkeypatch):
    """Each copy is of the memory of all rows left: one for each row that ends would cost more than the model does."""
    kept: list[int] = []
    keep = _Together.keep
    monkeypatch.setattr(_Together, "keep", lambda cohort, rows: (kept.append(len(rows)), keep(cohort, rows)))
    decoder = ReadingDecoder(family_model("marian"), head_logits)
    decoder.prefill([[5, 6, 7, 63], [8, 9, 63]], [range(4), range(4, 8)])
    assert kept == [8]
    for free, last in ((6, 7), (2, 6), (0, 5)):  # rows 6, 2 and 0 have ended, and the last ones take their slots
        decoder.move(last, free)
    decoder.step(torch.arange(5))
    decoder.step(torch.arange(5))
    assert kept == [8, 5]


def test_neighbours_and_padding_change_nothing():
    model, batch = family_model("marian"), ragged()
    policy = Policy(model, byte_tokenizer(), precision="float32", compile=False)
    alone = torch.cat([policy.score(batch.rows(torch.tensor([b]))).logprobs for b in range(4)])
    torch.testing.assert_close(policy.score(batch).logprobs, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, by_own_logits(model, batch), atol=1e-5, rtol=0)


def test_the_context_holds_prompt_and_completion_each_for_itself():
    model = family_model("marian")
    engine = NativeEngine(model, byte_tokenizer(), head_logits=head_logits, context_length=9)
    found = engine.generate([[5] * 8], Controls(Sampling(max_new_tokens=30)), seeds=[0])[0]
    assert (found.stop, len(found.tokens)) == ("context", 8)  # the start token is one of nine
    with pytest.raises(ModelError, match="1 to 8"):
        engine.generate([[5] * 9], Controls(Sampling(max_new_tokens=30)), seeds=[0])


def test_answers_stand_behind_the_start_and_are_measured_without_their_prompt():
    examples = Examples.of("answers", byte_tokenizer(), (256,), 6, (0,))
    items = [Item("a", "12345", "1234"), Item("b", "1", "12345")]
    assert [item.id for item in examples.fitting(items, 6)[0]] == ["a"]


def test_a_model_that_does_not_say_how_it_begins_is_refused():
    model = family_model("bart")
    for source in (model.config, model.generation_config):
        source.decoder_start_token_id = source.bos_token_id = source.forced_bos_token_id = None
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        decoder_start(model)


class Polyglot(PreTrainedTokenizerFast):
    """Marks prompts as NLLB's tokenizer does, with a byte alphabet."""

    src_lang = "eng_Latn"

    def encode(self, text, **settings):
        return [self.convert_tokens_to_ids(self.src_lang), *super().encode(text), self.eos_token_id]


def polyglot():
    tokenizer = Polyglot(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["eng_Latn", "deu_Latn"], "unk_token": "<unk>"})
    return tokenizer


@pytest.mark.parametrize("name", ["m2m_100", "mbart"])
def test_a_translator_between_many_languages_writes_the_one_it_is_told(name):
    """NLLB's and mBART's architectures: `generate` holds the first place to the language, here it is begun with."""
    model, tokenizer = family_model(name), polyglot()
    model.resize_token_embeddings(len(tokenizer))
    set_languages(model, tokenizer, "eng_Latn", "deu_Latn")
    german = tokenizer.convert_tokens_to_ids("deu_Latn")
    assert decoder_start(model) == (2, german)
    prompts = [tokenizer.encode(text) for text in ("a cat", "two more cats")]
    engine = NativeEngine(model, tokenizer, head_logits=head_logits)
    greedy = Controls(Sampling(temperature=0.0, max_new_tokens=8), eos_ids=(256,))
    for prompt, completion in zip(prompts, engine.generate(prompts, greedy, seeds=range(2)), strict=True):
        settings = GenerationConfig(
            max_new_tokens=9, do_sample=False, eos_token_id=256, decoder_start_token_id=2, forced_bos_token_id=german
        )
        with own_settings_aside(model):
            theirs = model.generate(torch.tensor([prompt]), generation_config=settings)
        assert theirs[0, :2].tolist() == [2, german]
        assert completion.tokens == theirs[0, 2:].tolist()
    controls = Controls(Sampling(max_new_tokens=8), eos_ids=(256, 1))
    drawn = engine.generate(prompts, controls, seeds=range(2))
    rows = [
        to_episode(str(k), Item(str(k), ""), k, p, c, 0) for k, (p, c) in enumerate(zip(prompts, drawn, strict=True))
    ]
    batch = to_batch(rows, controls)
    policy = Policy(model, tokenizer, precision="float32", compile=False)
    assert (policy.score(batch).logprobs - batch.sample_logprobs).abs().max() < 5e-4
    assert all(german not in episode.tokens[: episode.prompt_length] for episode in rows), "nobody chose it"


def test_a_language_is_begun_with_and_not_learnt():
    model, tokenizer = tiny_encoder_decoder("marian"), polyglot()
    model.resize_token_embeddings(len(tokenizer))
    set_languages(model, tokenizer, "deu_Latn", "eng_Latn")
    english, german = tokenizer.convert_tokens_to_ids(["eng_Latn", "deu_Latn"])
    assert decoder_start(model) == (257, english)
    assert tokenizer.encode("a")[0] == german
    with pytest.raises(ModelError, match="did you mean 'deu_Latn'"):
        set_languages(model, tokenizer, "eng_Latn", "deu_Latin")
    with pytest.raises(ModelError, match="knows no languages by name"):
        set_languages(model, byte_tokenizer(), "eng_Latn", "deu_Latn")


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_adapters_leave_the_reference_as_it_was(kind, tmp_path):
    pytest.importorskip("peft")
    model, batch = tiny_encoder_decoder(kind), ragged()
    policy = Policy(
        model,
        byte_tokenizer(),
        precision="float32",
        compile=False,
        lora=Lora(rank=2),
        value_head=ValueHead(32, detach_trunk=False),
    )
    before, reference = policy.score(batch), policy.reference()
    optimizer = torch.optim.SGD(policy.trainable().values(), lr=1.0)
    for _ in range(2):  # the first moves one factor of each adapter, whose other is 0
        out = policy.score(batch, grad=True, into_grad=True)
        (out.logprobs.sum() + out.values.sum()).backward()
        optimizer.step()
    assert (policy.score(batch).logprobs - before.logprobs).abs().max() > 1e-2
    torch.testing.assert_close(reference.score(batch).logprobs, before.logprobs, atol=1e-5, rtol=0)
    policy.save(tmp_path / "merged")
    again = Policy(*load_model(str(tmp_path / "merged")), precision="float32", compile=False)
    torch.testing.assert_close(again.score(batch).logprobs, policy.score(batch).logprobs, atol=1e-4, rtol=0)


@pytest.fixture(scope="module", params=["t5", "marian"])
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    tiny_encoder_decoder(request.param).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def configuration(model, place, **sections):
    data = place / "data.jsonl"
    data.write_text("".join(f'{{"q": "{k} and {k + 1}", "a": "{k}"}}\n' for k in range(120)), encoding="utf-8")
    values = {
        "folder": str(place / "run"),
        "policy": {"model": str(model), "precision": "float32", "compile": False},
        "task": {"path": str(data), "prompt": "{q}", "answer": "a"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 8}},
        "rewards": [{"name": "chrf"}],
        "update": {"learning_rate": 1e-3, "tokens_per_micro_batch": 64},
        "stop": {"steps": 3},
        "evaluation": {"items": 0},
    }
    return RunConfig.model_validate(values | sections)


def trained(config, folder, ends):
    """A run that is interrupted and goes on at each of `ends` but the last."""
    made = []
    for end in ends:
        run.train(
            config, resume=folder if made else None, on_step=lambda report, _: made.append(report),
            interrupted=lambda end=end: len(made) >= end,
        )  # fmt: skip
    assert len(made) == ends[-1]


def test_a_run_resumes_to_the_last_bit_and_its_model_is_transformers_own(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)
    weights = {}
    for name, ends in (("whole", [3]), ("resumed", [1, 3])):
        place = tmp_path / name
        place.mkdir()
        config = configuration(
            folder, place, kl={"place": "loss", "coefficient": 0.05, "estimator": "exact"}, credit={"type": "gae"},
            policy={"model": str(folder), "precision": "float32", "compile": False, "value_head": {}},
        )  # fmt: skip
        trained(config, place / "run", ends)
        weights[name] = AutoModelForSeq2SeqLM.from_pretrained(place / "run" / "model").state_dict()
    first = AutoModelForSeq2SeqLM.from_pretrained(folder).state_dict()
    assert any(not torch.equal(first[key], cell) for key, cell in weights["whole"].items())
    for key, cell in weights["whole"].items():
        assert torch.equal(cell, weights["resumed"][key]), key


def test_what_looks_into_attention_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"credit.type attention"):
        assembly.build_run(configuration(folder, tmp_path, credit={"type": "attention"}, kl={"place": "none"}))


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_completion_is_gone_on_with_from_its_middle(name):
    """From any place of its own greedy answer a model says the rest of it, in each row from another one.

    Repetition is penalised, so that what was said before has to be known.
    """
    model, tokenizer = family_model(name), byte_tokenizer()
    controls = Controls(Sampling(temperature=0.0, max_new_tokens=9, repetition_penalty=1.3), eos_ids=(63, 1))
    native = NativeEngine(model, tokenizer, head_logits=head_logits, max_rows=2)
    slow = NativeEngine(model, tokenizer, head_logits=head_logits)
    slow.decoder = RecomputingDecoder(model, head_logits)
    whole = native.generate(PROMPTS, controls, seeds=range(5))
    cuts = [min(k, len(completion.tokens) - 1) for k, completion in enumerate(whole)]
    assert len(set(cuts)) > 2
    asked = [[*prompt, *c.tokens[:cut]] for prompt, c, cut in zip(PROMPTS, whole, cuts, strict=True)]
    for engine in (native, slow, TransformersEngine(model, tokenizer, context_length=128)):
        found = engine.generate(asked, controls, seeds=range(5), taken=cuts)
        assert [c.tokens for c in found] == [c.tokens[cut:] for c, cut in zip(whole, cuts, strict=True)]
        assert [c.stop for c in found] == [c.stop for c in whole]
        for rest, completion, cut in zip(found, whole, cuts, strict=True):
            assert rest.logprobs == pytest.approx(completion.logprobs[cut:], abs=1e-4)


def test_states_on_the_way_are_worth_what_rollouts_from_them_earn(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)
    credit = {"type": "monte_carlo", "every": 2, "rollouts": 2}
    reports = []
    run.train(
        configuration(folder, tmp_path, credit=credit, kl={"place": "none"}, stop={"steps": 1}),
        on_step=lambda report, _: reports.append(report),
    )
    assert reports[0].metrics["tokens/beside"] > 0
    assert reports[0].streams["advantage"].any()


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_activations_that_are_made_again_give_the_same_gradients(kind):
    gradients = []
    for again in (False, True):
        policy = Policy(
            tiny_encoder_decoder(kind),
            byte_tokenizer(),
            precision="float32",
            compile=False,
            recompute_activations=again,
        )
        policy.score(ragged(), grad=True, into_grad=True).logprobs.sum().backward()
        gradients.append({name: p.grad for name, p in policy.trainable().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-5)


def test_the_doctor_certifies_it(folder, tmp_path):
    certificate = examine(configuration(folder, tmp_path))
    assert [line for line in certificate.lines if line.outcome == "fail"] == []


def test_supervised_learning_on_given_answers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)
    config = configuration(folder, tmp_path, method={"type": "sft", "batch": 4}, stop={"steps": 10})
    losses = []
    run.train(config, on_step=lambda report, _: losses.append(report.metrics["loss/policy"]))
    assert losses[-1] < losses[0] - 0.1
