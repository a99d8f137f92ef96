"""Perplexity: the model's own loss, carried to the policy's tokens; long texts by windows."""

import math

import pytest
import torch

from pertoken.errors import ModelError, RewardError
from pertoken.rewards import Perplexity, resolve
from pertoken.rewards.perplexity import _reader
from pertoken.testing import byte_tokenizer, tiny_model

TEXT = "the cat sat"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    tokenizer = byte_tokenizer()
    tiny_model(vocab=len(tokenizer), eos=len(tokenizer) - 1, seed=5).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sample_of(make_episode, make_scene):
    return lambda text, answer=None, **more: make_scene(make_episode(text, answer, **more)).samples[0]


def loss(model, before, text):
    """Mean of the negative log-probs of the bytes of `text`, as transformers computes it."""
    reader = _reader(model)
    ids = reader.tokenizer.encode(text, add_special_tokens=False)
    row = torch.tensor([[*before, *ids]])
    labels = row.clone()
    labels[0, : len(before)] = -100
    with torch.no_grad():
        return reader._model(row, labels=labels).loss.item()


def test_the_sum_is_minus_the_log_of_the_perplexity(model, sample_of):
    end = _reader(model).tokenizer.eos_token_id  # the tokenizer has no mark of the beginning
    expected = loss(model, [end], TEXT)
    assert sum(Perplexity(model).token_values(sample_of(TEXT))) == pytest.approx(-expected, abs=1e-5)
    whole = sum(Perplexity(model, normalised=False).token_values(sample_of(TEXT)))
    assert whole == pytest.approx(-expected * len(TEXT), abs=1e-4)
    assert math.exp(expected) > 1


def test_each_token_gets_what_the_model_says_of_its_characters(model, sample_of, letters):
    """The policy's tokens are letters here, and so are the model's; then a token of several letters gets their sum."""
    said = _reader(model)(TEXT, ())
    assert [TEXT[start:stop] for (start, stop), _ in said] == list(TEXT)
    by_letter = [logprob / len(TEXT) for _, logprob in said]
    assert Perplexity(model).token_values(sample_of(letters(TEXT))) == pytest.approx(by_letter)
    sample = sample_of(TEXT)
    assert len(sample.tokens) - 1 < len(TEXT)
    sums = [sum(by_letter[start:stop]) for start, stop in sample.aligned.char_spans]
    assert Perplexity(model).token_values(sample) == pytest.approx(sums)


def test_what_is_read_before_counts_and_is_not_judged(model, sample_of):
    encode = _reader(model).tokenizer.encode
    sample = sample_of(TEXT, "a dog", info={"source": "so much"})
    for against, before in (("prompt", "?"), ("reference", "a dog"), ("source", "so much")):
        value = sum(Perplexity(model, against=against).token_values(sample))
        assert value == pytest.approx(-loss(model, encode(before), TEXT), abs=1e-5)
    with pytest.raises(RewardError, match=r"perplexity\.against: item 'item-0' has no text 'article'"):
        Perplexity(model, against="article").token_values(sample)


def test_a_text_beyond_the_context_is_read_in_windows(model, monkeypatch):
    """Each token has at least half a context before it; nothing changes where the text fits."""
    reader = _reader(model)
    ids = reader.tokenizer.encode("the cat sat on the mat and")
    whole = reader.logprobs([256, *ids], 1)
    asked = []

    def ask(input_ids, inner=reader._model):
        asked.append(input_ids.shape[1])
        return inner(input_ids=input_ids)

    monkeypatch.setattr(reader, "_context", 8)
    monkeypatch.setattr(reader, "_model", type("Model", (), {"__call__": lambda _, **k: ask(**k), "device": "cpu"})())
    cut = reader.logprobs([256, *ids], 1)
    assert cut[:7] == pytest.approx(whole[:7])  # the first window
    assert max(asked) == 8
    assert len(cut) == len(whole)
    row = [256, *ids]
    for k, value in enumerate(cut[7:], 8):  # windows of 8 that begin every 4
        begin = k - k % 4 - 4 if k - k % 4 + 4 <= len(row) else len(row) - 8
        assert value == pytest.approx(reader.logprobs(row[begin : k + 1], k - begin)[0])
    late = reader.logprobs([256, *ids], 20)  # a prompt that is longer than the context
    assert len(late) == len(row) - 20
    assert late == pytest.approx(cut[19:], abs=1)


def test_nothing_is_said_of_nothing(model, sample_of):
    assert not any(Perplexity(model).token_values(sample_of("")))
    assert Perplexity(model).token_values(sample_of([])) == []


def test_order_and_size_of_the_batch_do_not_matter(model, make_episode, make_scene):
    episodes = [make_episode(text, id=str(k)) for k, text in enumerate(["the cat", "", "猫坐在 the mat", "a"])]
    reward = resolve("perplexity")(model=model)
    together = {e.id: row.tolist() for e, row in zip(episodes, reward(make_scene(*episodes)), strict=True)}
    _reader.cache_clear()
    for episode in episodes[::-1]:
        alone = reward(make_scene(episode))[0].tolist()
        assert alone == together[episode.id][: len(alone)]


def test_what_is_wrong_is_named(sample_of):
    with pytest.raises(ModelError, match=r"perplexity\.model: '/no/such' is no folder of a causal language model"):
        Perplexity("/no/such").token_values(sample_of("the"))
