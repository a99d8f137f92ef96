"""Prefix deltas: hand numbers, and sums that equal the official libraries' scores."""

import dataclasses
from functools import partial

import jaxtyping
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from pertoken.errors import ConfigError, RewardError
from pertoken.rewards import Bleu, RougeL

HYPOTHESIS, REFERENCE = "the cat sat on mat", "the cat sat on the mat"
# shared/fixtures/algorithms.json, case text_metrics
ROUGE_DELTAS = [0.285714285714, 0.214285714286, 0.166666666667, 0.133333333333, 0.109090909091]
BLEU_ADD1_DELTAS = [0.00673794699909, 0.128597336238, 0.232544157935, 0.238651218541, 0.0445819429517]
GRANULARITIES = ["word", "token"]

VOCABULARY = [
    "the",
    "a",
    "cat",
    "sat",
    "on",
    "mat.",
    "runs",
    "running,",
    "3.5",
    "well-made",
    "İx",
    "K",
    "&",
    "...",
    "\n",
]
words = st.lists(st.sampled_from(VOCABULARY), max_size=12)
texts = st.one_of(
    words.map(" ".join),
    st.text(max_size=20),
    st.text(alphabet="the cat猫坐在。İKΣß😀\u200d\u0301&lt;.,-\n ", max_size=24),
)


def official_rouge(text, references, *, stemmer=False):
    return RougeScorer(["rougeL"], use_stemmer=stemmer).score_multi(references, text)["rougeL"].fmeasure


def official_bleu(text, references, **options):
    return sacrebleu.sentence_bleu(text, references, **options).score / 100


def word_ends(sample):
    """Index of the token that ends each word of a text written with single spaces."""
    text, ends = sample.text, sample.aligned.completed()
    return [k for k, end in enumerate(ends) if (end == len(text) or text[end] == " ") and ends[k - 1] != end]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("metric", "deltas"), [(RougeL, ROUGE_DELTAS), (partial(Bleu, smooth_method="add-k"), BLEU_ADD1_DELTAS)]
)
def test_each_word_earns_its_change_of_the_score(metric, deltas, granularity, make_episode, make_scene):
    scene = make_scene(make_episode(HYPOTHESIS, REFERENCE))
    values = metric(granularity=granularity)(scene)[0, 2:]
    until = values.cumsum(0)[word_ends(scene.samples[0])]
    torch.testing.assert_close(until, torch.tensor(deltas, dtype=torch.float64).cumsum(0), atol=1e-10, rtol=0)
    assert values[-1] == 0  # the end-of-sequence token writes nothing


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (HYPOTHESIS, {}, 0.578930067467),
        (HYPOTHESIS, {"smooth_method": "add-k"}, 0.651112602664),
        ("the cat", {}, 0.135335283237),
        ("a cat sat on a mat", {}, 0.324667915475),
        ("a cat sat on a mat", {"smooth_method": "floor"}, 0.217118520811),
        ("a cat sat on a mat", {"smooth_method": "none"}, 0.0),
    ],
)
def test_bleu_sums_to_the_numbers_of_the_fixture(text, options, expected, make_episode, make_scene):
    total = Bleu(**options)(make_scene(make_episode(text, REFERENCE))).sum().item()
    assert total == pytest.approx(expected, abs=1e-10)


def test_a_word_shares_its_credit_evenly_over_its_tokens(make_episode, make_scene, letters):
    """Of " cat" in four pieces the three that write the word earn the change from F1 2/7 to 4/8."""
    values = RougeL()(make_scene(make_episode(letters("the cat"), REFERENCE)))[0, 2:].tolist()
    assert values == pytest.approx([2 / 7 / 3] * 3 + [0] + [3 / 14 / 3] * 3)


def test_token_credit_sees_half_written_words(make_episode, make_scene, letters):
    """The prefix "the ca" has a wrong second word, the last letter makes it right."""
    values = RougeL("token")(make_scene(make_episode(letters("the cat"), REFERENCE)))[0, 2:].tolist()
    assert values == pytest.approx([0, 0, 2 / 7, 0, 2 / 8 - 2 / 7, 0, 4 / 8 - 2 / 8])


@settings(max_examples=80, deadline=None)
@given(text=texts, references=st.lists(texts, min_size=1, max_size=3), data=st.data())
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_deltas_sum_to_the_official_score(granularity, stemmer, text, references, data, make_episode, make_scene):
    if data.draw(st.booleans()):
        references = [text[: data.draw(st.integers(0, 30))], *references]  # so that something matches
    scene = make_scene(make_episode(text, info={"references": references}))
    total = RougeL(granularity, stemmer)(scene).sum().item()
    expected = official_rouge(scene.samples[0].text, references, stemmer=stemmer)
    assert total == pytest.approx(expected, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    text=texts,
    references=st.lists(texts, min_size=1, max_size=3),
    tokenize=st.sampled_from(["13a", "intl", "zh", "char", "none"]),
    smooth_method=st.sampled_from(["exp", "floor", "add-k", "none"]),
    lowercase=st.booleans(),
    data=st.data(),
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bleu_deltas_sum_to_the_official_score(
    granularity, text, references, data, make_episode, make_scene, **options
):
    if data.draw(st.booleans()):
        references = [text[: data.draw(st.integers(0, 30))], *references]
    scene = make_scene(make_episode(text, info={"references": references}))
    total = Bleu(granularity, **options)(scene).sum().item()
    assert total == pytest.approx(official_bleu(scene.samples[0].text, references, **options), abs=1e-9)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("text", "references"),
    [
        ("a b", ["a b c", "a"]),  # two references equally near in length: the shorter one counts
        ("the the the", ["the cat", "the dog"]),  # matches are clipped by the most in one reference, not by the sum
        ("so well-\n", ["so well -"]),  # white space at the end is dropped before a hyphenated line is joined
        ("a-\nb a&amp;b", ["ab a & b"]),
    ],
)
def test_corners_of_the_official_bleu(granularity, text, references, make_episode, make_scene):
    scene = make_scene(make_episode(text, info={"references": references}))
    assert Bleu(granularity)(scene).sum().item() == pytest.approx(official_bleu(text, references), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(text=texts, reference=texts)
def test_each_token_has_earned_the_official_score_of_its_prefix(text, reference, make_episode, make_scene):
    scene = make_scene(make_episode(text, reference))
    sample = scene.samples[0]
    prefixes = [sample.text[:end] for end in sample.aligned.completed()]
    for metric, official in [(RougeL("token"), official_rouge), (Bleu("token"), official_bleu)]:
        earned = metric(scene)[0, 2:].cumsum(0).tolist()
        assert earned == pytest.approx([official(prefix, [reference]) for prefix in prefixes], abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("metric", [RougeL, Bleu])
def test_any_sampled_ids_in_any_tokenizer_sum_to_the_score(metric, any_tokenizer, data, make_episode, make_scene):
    ids = data.draw(st.lists(st.integers(0, len(any_tokenizer) - 1), min_size=1, max_size=20))
    reference = any_tokenizer.decode(ids[::2], skip_special_tokens=True)
    scene = make_scene(make_episode(ids, reference, prompt=[1, 1]), tokenizer=any_tokenizer)
    official = official_rouge if metric is RougeL else official_bleu
    for granularity in GRANULARITIES:
        total = metric(granularity)(scene).sum().item()
        assert total == pytest.approx(official(scene.samples[0].text, [reference]), abs=1e-9)


def test_the_best_of_several_references_counts(make_episode, make_scene):
    scene = make_scene(make_episode("a dog ran", "no match", info={"references": ["the dog", "a dog ran off"]}))
    assert RougeL()(scene).sum().item() == pytest.approx(2 * 3 / (3 + 4))


@pytest.mark.parametrize("metric", [RougeL(), Bleu()])
@pytest.mark.parametrize("info", [{}, {"references": []}, {"references": "a string"}, {"references": [None]}])
def test_an_item_without_reference_is_named(metric, info, make_episode, make_scene):
    with pytest.raises(RewardError, match="item 'item-e7' has no reference"):
        metric(make_scene(make_episode("a cat", None, id="e7", info=info)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RougeL("words"), "rouge_l.granularity: unknown value 'words'; did you mean 'word'?"),
        (lambda: Bleu("sentence"), "bleu.granularity"),
        (lambda: Bleu(smooth_method="add1"), "bleu.smooth_method: unknown value 'add1'"),
        (lambda: Bleu(tokenize="13b"), "did you mean '13a'?"),
    ],
)
def test_unknown_settings_are_refused(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker would refuse them, too
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        make()


def test_settings_are_documented_fields():
    for metric in (RougeL, Bleu):
        assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(metric))
