"""Distinct-n and self-BLEU: by hand, and against the official figures."""

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import ConfigError
from pertoken.rewards import Distinct, SelfBleu
from pertoken.text_metrics import distinct

# ---- distinct-n -------------------------------------------------------------------------------------------------


def test_the_word_that_closes_a_repeated_ngram_lowers_the_share(make_episode, make_scene, letters):
    """ "a b a b": bigrams ab, ba, ab; the share of different ones is 1, 2/2, 2/3."""
    values = Distinct(n=2)(make_scene(make_episode(letters("a b A b"))))[0, 2:].tolist()
    assert values == pytest.approx([0, 0, 1, 0, 0, 0, -1 / 3])


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(["a", "B", "b", "cd"]), max_size=12), n=st.integers(1, 4))
def test_the_sum_is_the_share_that_evaluations_report(words, n, make_episode, make_scene):
    text = " ".join(words)
    expected = distinct([text], n)
    assert Distinct(n=n)(make_scene(make_episode(text))).sum().item() == pytest.approx(expected, abs=1e-12)


# ---- self-BLEU --------------------------------------------------------------------------------------------------


def self_bleu(texts, k, **options):
    metric = sacrebleu.BLEU(effective_order=True, **options)
    return metric.sentence_score(texts[k], texts[:k] + texts[k + 1 :]).score / 100


@pytest.fixture(scope="session")
def values(make_episode, make_scene):
    """The values of each text, as texts of one prompt (or of `groups`)."""

    def of(reward, texts, groups=None):
        groups = groups or [0] * len(texts)
        episodes = [make_episode(t, id=str(k), group=g) for k, (t, g) in enumerate(zip(texts, groups, strict=True))]
        return reward(make_scene(*episodes))

    return of


WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "Cat,", "&quot;", "3.5", "don't", "猫坐", "-\n"]), max_size=9)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(WORDS.map(" ".join), min_size=2, max_size=4), tokenize=st.sampled_from(["13a", "zh", "char"]))
def test_each_text_pays_its_official_bleu_against_the_others(texts, tokenize, values):
    sums = values(SelfBleu(tokenize=tokenize), texts).sum(1).tolist()
    expected = [-self_bleu(texts, k, tokenize=tokenize) for k in range(len(texts))]
    assert sums == pytest.approx(expected, abs=1e-9)


def test_only_words_that_the_others_have_pay(make_episode, make_scene, letters):
    """ "a b c" beside "x b c": of order 1 match b and c, of order 2 "b c"; each order has half of the cost."""
    scene = make_scene(make_episode(letters("a b c"), id="0"), make_episode(letters("x b c"), id="1"))
    paid = SelfBleu()(scene)[0, 2:].tolist()
    cost = -self_bleu(["a b c", "x b c"], 0)
    assert cost < -0.1
    assert paid == pytest.approx([0, 0, cost / 2, 0, cost / 2])


def test_longer_matches_weigh_on_their_words(make_episode, make_scene, letters):
    """ "a x b c" beside "a y b c": a, b, c share order 1; order 2 is of b and c alone."""
    scene = make_scene(make_episode(letters("a x b c"), id="0"), make_episode(letters("a y b c"), id="1"))
    cost = -self_bleu(["a x b c", "a y b c"], 0)
    a, b = cost / 2 / 3, cost / 2 / 3 + cost / 2 / 2
    assert SelfBleu()(scene)[0, 2:].tolist() == pytest.approx([a, 0, 0, 0, b, 0, b])


def test_an_ngram_that_the_others_have_once_is_half_a_match_when_it_stands_twice(make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("a x a b"), id="0"), make_episode(letters("a y z b"), id="1"))
    cost = -self_bleu(["a x a b", "a y z b"], 0)
    assert SelfBleu()(scene)[0, 2:].tolist() == pytest.approx([cost / 4, 0, 0, 0, cost / 4, 0, cost / 2])


def test_texts_of_other_prompts_and_single_ones_do_not_count(values):
    sums = values(SelfBleu(), ["the cat sat", "the cat sat", "the cat sat"], groups=[0, 1, 1]).sum(1).tolist()
    assert sums == pytest.approx([0, -1, -1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distinct(n=0), "distinct.n: expected at least 1 word, got 0"),
        (lambda: SelfBleu(tokenize="13b"), "self_bleu.tokenize: unknown value '13b'"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
