"""Learned rewards: values that add up, on the right tokens, whatever the batch; folders that load the same."""

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaModel,
    T5Config,
)

from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.rewards import Classifier, TokenModel, classifier, token_model
from pertoken.rewards.align import sentence_spans
from pertoken.rewards.token_model import TokenScorer, scored
from pertoken.testing import byte_tokenizer
from pertoken.types import Item

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh.!", "##b", "##c", "猫", "##猫", "😀", "é"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A small random encoder with a window of 16 tokens, and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(PIECES), max_position_embeddings=16, **SIZES)).eval()
    return model, BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16)


@pytest.fixture(scope="session")
def llama():
    """A small random causal model on bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    return LlamaModel(config).eval(), byte_tokenizer()


@pytest.fixture(params=["bert", "llama"])
def trunk(request):
    return request.getfixturevalue(request.param)


def scorer_of(trunk, **how):
    torch.manual_seed(1)
    made = TokenScorer(*trunk, **how).eval()
    torch.nn.init.normal_(made.head.weight)
    return made


@pytest.fixture
def use(monkeypatch):
    """Makes every path lead to this scorer."""

    def use(scorer):
        monkeypatch.setattr(token_model, "scorer_of", lambda path: scorer)
        return scorer

    return use


TEXTS = ["a bc. d!", "猫猫a", "é 😀b 👩‍👩‍👧 x", "abc" * 20, "a. b! " * 12, " \n", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("total", ["sum", "mean"])
def test_values_on_the_tokens_of_the_policy_add_up_to_the_score(text, total, trunk, use, make_episode, make_scene):
    scorer = use(scorer_of(trunk, total=total))
    sample = make_scene(make_episode(text)).samples[0]
    values = TokenModel("x").token_values(sample)
    assert sum(values) == pytest.approx(sum(value for _, value in scorer.values(text)), abs=1e-9)
    assert bool(text.strip()) <= any(values)
    assert values[-1] == 0.0  # the end of the sequence is no text


def test_a_value_is_on_the_tokens_that_share_its_characters(bert, use, make_episode, make_scene, letters):
    scorer = use(scorer_of(bert))
    sample = make_scene(make_episode(letters("abc d"))).samples[0]
    (first, *rest), last = scorer.values("abc d")[:-1], scorer.values("abc d")[-1]
    assert [span for span, _ in (first, *rest, last)] == [(0, 1), (1, 2), (2, 3), (4, 5)]  # a ##b ##c d
    assert TokenModel("x").token_values(sample) == pytest.approx([first[1], rest[0][1], rest[1][1], 0.0, last[1]])


def test_the_score_is_that_of_the_head_on_the_trunk(bert):
    scorer = scorer_of(bert)
    inputs = bert[1]("a d", return_tensors="pt")
    with torch.no_grad():
        wanted = scorer.head(bert[0](**inputs).last_hidden_state)[0, 1:-1, 0].tolist()
    assert [value for _, value in scorer.values("a d")] == pytest.approx(wanted, abs=1e-6)
    cost = scorer_of(bert, sign="cost")
    assert [value for _, value in cost.values("a d")] == pytest.approx(
        (-torch.nn.functional.softplus(torch.tensor(wanted) - 2.0)).tolist(), abs=1e-5
    )  # the same weights, and the bias that it begins with
    mean = scorer_of(bert, total="mean")
    assert sum(value for _, value in mean.values("a d")) == pytest.approx(sum(wanted) / 2, abs=1e-6)


def test_padding_rows_changes_nothing(trunk):
    scorer = scorer_of(trunk)
    pieces = [piece for text in ("a", "a b c d e f", "abc. d") for piece in scorer.encode(text)]
    with torch.no_grad():
        together = scorer(pieces)
        for row, piece in enumerate(pieces):
            alone = scorer([piece])[0]
            assert together[row, : len(alone)].tolist() == pytest.approx(alone.tolist(), abs=1e-5)
            assert not together[row, len(alone) :].any()
    assert torch.equal(together != 0, scored(pieces, together.shape[1]))


@pytest.mark.parametrize("context", [False, True])
def test_long_texts_are_taken_in_windows_with_each_token_once(context, trunk):
    scorer = scorer_of(trunk, context=context)
    text = "a b c d e f g h. " * 6
    pieces = scorer.encode(text, "h " * 50 if context else "")
    window = trunk[0].config.max_position_embeddings
    assert len(pieces) > 1
    assert all(len(piece.ids) <= window for piece in pieces)
    spans = [span for piece in pieces for span in piece.spans]
    wanted = trunk[1](text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    assert spans == [tuple(span) for span in wanted]


def test_a_context_is_read_and_not_scored(bert, use, make_episode, make_scene):
    scorer = use(scorer_of(bert, context=True))
    spans = [span for span, _ in scorer.values("a b", "c d e")]
    assert spans == [(0, 1), (2, 3)]
    assert scorer.values("a b", "c d e") != scorer.values("a b", "c d f")
    episode = make_episode("a b")
    item = Item("item-0", "c d e", None, {"source": "c d f"})
    sample = make_scene(episode.__class__(**{**vars(episode), "item": item})).samples[0]
    for against, text in (("prompt", "c d e"), ("source", "c d f")):
        wanted = sum(value for _, value in scorer.values("a b", text))
        assert sum(TokenModel("x", against=against).token_values(sample)) == pytest.approx(wanted)
    with pytest.raises(RewardError, match=r"token_model\.against: item 'item-0' has no text 'other'"):
        TokenModel("x", against="other").token_values(sample)


def test_neither_order_nor_size_of_the_batch_matters(trunk, use, make_episode, make_scene):
    episodes = [make_episode(text, id=str(k)) for k, text in enumerate(["a b", "a", "", "abc def. " * 5])]
    use(scorer_of(trunk))
    together = TokenModel("x")(make_scene(*episodes))
    use(scorer_of(trunk))  # nothing remembered
    for row, episode in reversed(list(enumerate(episodes))):
        alone = TokenModel("x")(make_scene(episode))[0]
        assert torch.equal(alone, together[row, : len(alone)])


def test_a_saved_model_is_the_same(trunk, tmp_path):
    before = scorer_of(trunk, sign="cost", total="mean", max_tokens=12)
    before.save(tmp_path, {"figures": {"accuracy": 1.0}})
    after = TokenScorer.load(tmp_path)
    assert after.values("a b c. d" * 4) == before.values("a b c. d" * 4)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".jinja",
        ".txt",
    }
    assert TokenModel(str(tmp_path)).path == str(tmp_path)


def test_folders_that_are_none(bert, tmp_path):
    with pytest.raises(ModelError, match=r"is no folder of a token reward: reward\.json cannot be read"):
        TokenScorer.load(tmp_path)
    scorer_of(bert).save(tmp_path, {})
    about = json.loads((tmp_path / "reward.json").read_text())
    (tmp_path / "reward.json").write_text(json.dumps(about | {"version": 99}))
    with pytest.raises(ModelError, match="is of version 99, and this version of pertoken reads 1"):
        TokenScorer.load(tmp_path)
    (tmp_path / "reward.json").write_text(json.dumps(about | {"sign": "odd"}))
    with pytest.raises(ModelError, match="expected a sign and a total that are known here"):
        TokenScorer.load(tmp_path)
    (tmp_path / "reward.json").write_text(json.dumps(about))
    (tmp_path / "head.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"head\.safetensors cannot be read"):
        TokenScorer.load(tmp_path)


def test_trunks_that_cannot_be(bert):
    class Both:
        config = T5Config()

    with pytest.raises(ModelError, match="Both has an encoder and a decoder"):
        TokenScorer(Both(), bert[1])
    with pytest.raises(ModelError, match="object cannot say which characters a token is of"):
        TokenScorer(bert[0], object())
    with pytest.raises(ModelError, match="a window of 3 tokens has no room for text"):
        TokenScorer(*bert, max_tokens=3)


# --- classifiers ------------------------------------------------------------------------------------------


@pytest.fixture
def classify(bert, tmp_path):
    """A random classifier saved as a folder; a reward on it, and what the model says of a text by itself."""

    def of(labels, problem=None, **how):
        torch.manual_seed(2)
        names = {"id2label": dict(enumerate(labels)), "label2id": {label: k for k, label in enumerate(labels)}}
        config = BertConfig(
            vocab_size=len(PIECES), max_position_embeddings=16, num_labels=len(labels), problem_type=problem,
            **(names if len(labels) > 1 else {}), **SIZES,
        )  # fmt: skip
        model = BertForSequenceClassification(config).eval()
        torch.nn.init.normal_(model.classifier.weight)
        folder = tmp_path / "-".join(labels)
        model.save_pretrained(folder)
        bert[1].save_pretrained(folder)

        @torch.no_grad()
        def outputs(*texts):
            return model(**bert[1](*texts, return_tensors="pt")).logits[0].double()

        classifier.classifier_of.cache_clear()
        return Classifier(str(folder), **how), outputs

    return of


def test_the_probability_of_a_label_is_paid_at_the_end(classify, make_episode, make_scene):
    reward, outputs = classify(["bad", "good"], label="Good")
    sample = make_scene(make_episode("a bc.")).samples[0]
    values = reward.token_values(sample)
    assert values[-1] == pytest.approx(outputs("a bc.").softmax(0)[1].item(), abs=1e-6)
    assert not any(values[:-1])
    spread = Classifier(reward.model, label="1", output="log_odds", place="spread").token_values(sample)
    logits = outputs("a bc.")
    assert sum(spread) == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
    assert len(set(spread)) == 1


def test_sentence_by_sentence_it_pays_the_mean_on_their_tokens(classify, make_episode, make_scene):
    reward, outputs = classify(["bad", "good"], label="good", granularity="sentence")
    sample = make_scene(make_episode("A b. C d e!")).samples[0]
    wanted = [outputs(text).softmax(0)[1].item() / 2 for text in ("A b.", "C d e!")]
    values = reward.token_values(sample)
    found = [
        sum(v for v, (a, b) in zip(values, sample.aligned.char_spans, strict=True) if start <= a < b <= stop)
        for start, stop in sentence_spans(sample.text)
    ]
    assert sum(values) == pytest.approx(sum(wanted), abs=1e-6)
    assert found == pytest.approx(wanted, abs=1e-6)
    assert reward.findings(sample)[0].message == f"good {2 * wanted[0]:.2f}"


def test_regressors_and_labels_that_are_questions_of_their_own(classify, make_episode, make_scene):
    sample = make_scene(make_episode("a bc.")).samples[0]
    reward, outputs = classify(["score"])
    assert sum(reward.token_values(sample)) == pytest.approx(outputs("a bc.")[0].item(), abs=1e-6)
    with pytest.raises(ConfigError, match="is a regressor; leave out `label`"):
        Classifier(reward.model, label="1").token_values(sample)
    reward, outputs = classify(["rude", "kind"], "multi_label_classification", label="kind")
    assert sum(reward.token_values(sample)) == pytest.approx(outputs("a bc.")[1].sigmoid().item(), abs=1e-6)


def test_a_long_text_is_the_mean_of_parts_that_fit(classify, make_episode, make_scene):
    reward, outputs = classify(["bad", "good"], label="good")
    sample = make_scene(make_episode("A b c d e f. G h. A b c d e f g h.")).samples[0]
    first, second = "A b c d e f. G h.", "A b c d e f g h."  # 10 and 9 tokens of the 14 that fit
    wanted = (10 * outputs(first).softmax(0)[1].item() + 9 * outputs(second).softmax(0)[1].item()) / 19
    assert sum(reward.token_values(sample)) == pytest.approx(wanted, abs=1e-6)


def test_a_pair_is_read_in_its_order(classify, make_episode, make_scene):
    reward, outputs = classify(["no", "yes"], label="yes", against="prompt")
    episode = make_episode("a bc.")
    sample = make_scene(episode.__class__(**{**vars(episode), "item": Item("i", "d e.", None)})).samples[0]
    assert sum(reward.token_values(sample)) == pytest.approx(outputs("d e.", "a bc.").softmax(0)[1].item(), abs=1e-6)


def test_what_it_cannot_classify(classify, make_episode, make_scene):
    reward, _ = classify(["bad", "good"], label="god")
    sample = make_scene(make_episode("a")).samples[0]
    with pytest.raises(ConfigError, match=r"classifier\.label: .* has no label 'god'; did you mean 'good'\?"):
        reward.token_values(sample)
    assert not any(reward.token_values(make_scene(make_episode(" ")).samples[0]))
    with pytest.raises(ModelError, match=r"classifier\.model: '/no/such' is no folder of a classifier"):
        Classifier("/no/such").token_values(sample)


def test_neither_order_nor_size_of_the_batch_matters_to_a_classifier(classify, make_episode, make_scene):
    reward, _ = classify(["bad", "good"], label="good", granularity="sentence")
    episodes = [make_episode(text, id=str(k)) for k, text in enumerate(["A b.", "A. B c d!", "", "abc def. " * 5])]
    together = reward(make_scene(*episodes))
    classifier.classifier_of.cache_clear()
    for row, episode in reversed(list(enumerate(episodes))):
        alone = reward(make_scene(episode))[0]
        assert torch.equal(alone, together[row, : len(alone)])
