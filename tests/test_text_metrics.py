"""Text metrics against numbers worked out by hand, intervals against exact ones."""

import importlib.util
from itertools import product
from math import exp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import ConfigError
from pertoken.text_metrics import (
    CORPUS_METRICS,
    COUNTED,
    FURTHER_CORPUS_METRICS,
    FURTHER_ITEM_METRICS,
    ITEM_METRICS,
    bleu_tokenizer,
    bootstrap_mean,
    compression,
    corpus_metrics,
    corpus_shares,
    coverage,
    density,
    distinct,
    distinct_shares,
    first_sentence,
    fragments,
    item_metrics,
    repetition,
    self_bleu,
    words,
)


def one(text: str, *references: str) -> dict[str, float]:
    return {name: values[0] for name, values in item_metrics([text], [references]).items()}


def test_rouge_by_hand():
    scores = one("the cat sat on mat", "the cat sat on the mat")
    # 5 of 5 words and 5 of 6; 3 of 4 pairs and 3 of 5; the longest common sequence has 5 words
    assert scores["rouge_1"] == pytest.approx(2 * 1 * (5 / 6) / (1 + 5 / 6))
    assert scores["rouge_2"] == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert scores["rouge_l"] == pytest.approx(2 * 1 * (5 / 6) / (1 + 5 / 6))


def test_sentence_bleu_by_hand():
    # precisions 5/5, 3/4, 2/3, 1/2 and a brevity penalty of exp(1 - 6/5)
    expected = 100 * exp(1 - 6 / 5) * (1 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert one("the cat sat on mat", "the cat sat on the mat")["bleu"] == pytest.approx(expected)
    # two words have no runs of three: those orders are left out, only brevity is punished
    assert one("the cat", "the cat sat")["bleu"] == pytest.approx(100 * exp(1 - 3 / 2))


def test_scores_of_another_implementation():
    # shared/fixtures/algorithms.json, case text_metrics: BLEU with exponential smoothing of missing orders
    scores = one("a cat sat on a mat", "the cat sat on the mat")
    assert scores["bleu"] == pytest.approx(32.4667915475)
    scores = one("the cat sat on mat", "the cat sat on the mat")
    assert scores["bleu"] == pytest.approx(57.8930067467)
    assert scores["rouge_l"] == pytest.approx(0.909090909091)


def test_chrf_by_hand():
    # "ab" and "abc": runs of 1: 2/2 and 2/3; of 2: 1/1 and 1/2; of 3 only in the reference, so left out
    precision, recall = (2 / 2 + 1 / 1) / 2, (2 / 3 + 1 / 2) / 2
    assert one("ab", "abc")["chrf"] == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_the_best_of_several_references_counts_whatever_their_order():
    both = one("a cat sat", "dogs bark", "a cat sat")
    assert both == one("a cat sat", "a cat sat", "dogs bark")
    assert both["rouge_l"] == 1
    assert both["chrf"] == pytest.approx(100)


def test_an_empty_text_scores_nothing_and_repeats_nothing():
    assert one("", "a cat") == dict.fromkeys(ITEM_METRICS, 0.0)


def test_metrics_that_compare_need_a_reference_for_every_text():
    assert set(item_metrics(["a", "b"], [["a"], []])) == {"words", "repetition"}
    assert set(corpus_metrics(["a", "b"], [["a"], []])) == {"distinct_1", "distinct_2"}
    assert set(item_metrics(["a"], [["a"]])) == set(ITEM_METRICS)
    assert set(corpus_metrics(["a"], [["a"]])) == set(CORPUS_METRICS)
    assert item_metrics([], []) == {"words": [], "repetition": []}


def test_a_plain_string_of_references_is_not_taken_for_a_list_of_letters():
    with pytest.raises(ValueError, match="plain string"):
        item_metrics(["a"], ["a"])
    with pytest.raises(ValueError, match="plain string"):
        corpus_metrics(["a"], ["a"])


def test_corpus_bleu_pools_counts_where_the_mean_of_items_does_not():
    texts, references = ["a b c d e", "x"], [["a b c d e"], ["y"]]
    # matches 5, 4, 3, 2 of 6, 4, 3, 2
    assert corpus_metrics(texts, references)["corpus_bleu"] == pytest.approx(100 * (5 / 6) ** 0.25)
    assert np.mean(item_metrics(texts, references)["bleu"]) == pytest.approx(50)


def test_texts_may_have_different_numbers_of_references():
    scores = corpus_metrics(["a b c d", "e f g h"], [["x", "a b c d"], ["e f g h i j k l m n"]])
    # all runs are found; 8 words stand against references of 4 and 10 words
    assert scores["corpus_bleu"] == pytest.approx(100 * exp(1 - 14 / 8))


def test_repetition_is_the_share_of_runs_of_three_words_seen_before():
    assert repetition("A cat sat. a cat sat!") == pytest.approx(1 - 3 / 4)  # acs, cs-a, s-ac, acs
    assert repetition("no no no no no") == pytest.approx(2 / 3)
    assert repetition("two words") == 0


def test_distinct_pools_all_texts():
    assert distinct(["a b a", "a b"], 1) == 2 / 5
    assert distinct(["a b a", "a b"], 2) == 2 / 3  # ab, ba, ab: no pair reaches over two texts
    assert distinct([], 1) == 0


SAID = ["the cat sat on the mat", "a dog ran", "it rains in the town today", "nothing at all to say here", ""]
KNOWN = [
    ["the cat sat on a mat"],
    ["the dog ran away", "a dog ran off"],
    ["it rains in town today"],
    ["there is nothing to say here"],
    ["a word"],
]


@pytest.mark.parametrize("metric", COUNTED)
def test_shares_of_a_metric_of_all_texts_are_what_leaving_out_a_text_changes(metric):
    def of(texts, known):
        return corpus_metrics(texts, known, further={"corpus_ter"})[metric]

    whole, shares = of(SAID, KNOWN), corpus_shares(SAID, KNOWN, further={"corpus_ter"})[metric]
    without = [of(SAID[:k] + SAID[k + 1 :], KNOWN[:k] + KNOWN[k + 1 :]) for k in range(5)]
    assert sum(shares) / 5 == pytest.approx(whole)
    for share, one in zip(shares, without, strict=True):
        assert share - whole == pytest.approx(4 * (sum(without) / 5 - one))


@pytest.mark.parametrize("n", [1, 2])
def test_shares_of_distinct_are_what_leaving_out_a_text_changes(n):
    texts = ["the cat sat on the mat", "the dog sat", "", "a dog and a cat and a dog", "on the mat"]
    whole, shares = distinct(texts, n), distinct_shares(texts, n)
    without = [distinct(texts[:k] + texts[k + 1 :], n) for k in range(5)]
    assert sum(shares) / 5 == pytest.approx(whole)
    for share, one in zip(shares, without, strict=True):
        assert share - whole == pytest.approx(4 * (sum(without) / 5 - one))
    assert distinct_shares(["alone"], n) == [distinct(["alone"], n)]
    assert distinct_shares([], n) == []


def test_words_of_languages_without_spaces_are_counted():
    assert words("我喜欢猫。") == list("我喜欢猫")
    assert one("我喜欢猫。", "我喜欢猫。")["words"] == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("It rains. It pours.", "It rains."),
        ("It rains (e.g. today), vs. sun. So?", "It rains (e.g. today), vs. sun."),
        ('He said "stop." Then he left.', 'He said "stop."'),
        ("Version 2.0 of the U.S. law is out! More.", "Version 2.0 of the U.S. law is out!"),
        ("Call f.open on graph G. Then wait.", "Call f.open on graph G."),
        ("雨が降る。雪も。", "雨が降る。"),
        ("  no end at all ", "no end at all"),
        ("", ""),
    ],
)
def test_the_first_sentence(text: str, sentence: str):
    assert first_sentence(text) == sentence


@given(st.text())
def test_the_first_sentence_is_the_beginning_of_the_text(text: str):
    assert text.strip().startswith(first_sentence(text))


def test_the_bootstrap_agrees_with_all_resamples_of_three_values():
    values = [0.0, 1.0, 5.0]
    exact = sorted(float(np.mean(draw)) for draw in product(values, repeat=3))  # 27 equally likely means
    interval = bootstrap_mean(values)
    assert interval.mean == pytest.approx(2)
    assert interval.low == pytest.approx(exact[0])  # 0: one in 27 is more than 2.5%
    assert interval.high == pytest.approx(exact[-1])


def test_the_bootstrap_is_as_wide_as_theory_says_and_the_same_each_time():
    values = np.random.default_rng(1).normal(size=400).tolist()
    interval = bootstrap_mean(values)
    half = 1.96 * np.std(values) / 20
    assert interval.low == pytest.approx(np.mean(values) - half, abs=0.1 * half)
    assert interval.high == pytest.approx(np.mean(values) + half, abs=0.1 * half)
    assert bootstrap_mean(values) == interval
    assert bootstrap_mean(values, seed=1) != interval


def test_pairs_find_a_small_gain_that_means_alone_do_not():
    rng = np.random.default_rng(0)
    before = rng.normal(size=100) * 10
    after = before + 0.5 + rng.normal(size=100) * 0.5
    gain = bootstrap_mean((after - before).tolist())
    assert gain.low > 0.3
    assert bootstrap_mean(before.tolist()).high > bootstrap_mean(after.tolist()).low  # side by side they overlap


def test_answers_are_compared_by_their_words():
    """4 words of which 2 are shared with 3: 2 * 2 / (4 + 3)."""
    assert one("It is the Eiffel Tower", "the Eiffel Tower, Paris")["answer_f1"] == pytest.approx(4 / 7)
    assert one("Eiffel tower.", "The Eiffel Tower")["exact_match"] == 1
    assert one("tower Eiffel", "Eiffel Tower") == one("tower Eiffel", "Eiffel Tower") | {
        "exact_match": 0,
        "answer_f1": 1,
    }
    assert one("b b", "b")["answer_f1"] == pytest.approx(2 / 3)  # a word counts as often as both have it
    several = item_metrics(["Rome"], [["Paris", "Rome"]])
    assert (several["exact_match"], several["answer_f1"]) == ([1], [1])


# --- metrics that are asked for ---


def test_fragments_are_the_longest_copies_from_left_to_right():
    """Grusky et al. 2018: after a fragment the search goes on behind it, and what is copied nowhere is passed over."""
    source = "The dog ran home. A dog ran away today."
    assert fragments("A dog ran home today", source) == [3, 1, 1]
    assert fragments("nothing in common", source) == []
    assert fragments("", source) == fragments("dog", "") == []
    assert fragments("我在家", "今天我在学校") == [2]


def test_coverage_density_and_compression_by_hand():
    text, source = "the cat ate two mice", "the cat sat. it ate mice, and the dog slept"
    # "the cat", "ate", "mice": 4 of 5 words; (4 + 1 + 1) / 5; 10 words / 5
    assert coverage(text, source) == pytest.approx(4 / 5)
    assert density(text, source) == pytest.approx(6 / 5)
    assert compression(text, source) == pytest.approx(2)
    assert (coverage("", source), density("", source), compression("", source)) == (0, 0, 0)
    assert (coverage(source, source), density(source, source)) == (1, 10)


def test_a_metric_is_measured_where_it_is_asked_for_and_can_be():
    everything = {*FURTHER_ITEM_METRICS, *FURTHER_CORPUS_METRICS}
    found = item_metrics(["a"], [["a"]], further=everything, sources=["a b"])
    assert list(found) == [*ITEM_METRICS[:-2], "words", "repetition", *FURTHER_ITEM_METRICS]
    assert set(corpus_metrics(["a"], [["a"]], further=everything)) == {*CORPUS_METRICS, *FURTHER_CORPUS_METRICS}
    without = set(item_metrics(["a"], [[]], further=everything, sources=["a b"]))
    assert without == {"words", "repetition", "coverage", "density", "compression", "abstained", "right_steps"}
    assert set(corpus_metrics(["a"], [[]], further=everything)) == {"distinct_1", "distinct_2", "self_bleu"}


def test_edits_are_counted_by_words_and_in_chinese_by_characters():
    assert one_of("ter", "the cat sat", "the dog sat") == pytest.approx(100 / 3)
    assert one_of("ter", "我在家", "我在校") == pytest.approx(100)  # a word of three characters
    assert one_of("ter", "我在家", "我在校", language="zh") == pytest.approx(100 / 3)


def one_of(name, text, reference, **settings):
    return item_metrics([text], [[reference]], further=[name], **settings)[name][0]


def test_bleu_cuts_words_as_the_language_is_written():
    spaced = item_metrics(["我 在 家 里"], [["我 在 家 里"]])["bleu"]
    assert spaced == pytest.approx(item_metrics(["我在家里"], [["我在家里"]], language="zh-CN")["bleu"])
    apart = item_metrics(["我在家里吃饭"], [["我在家里睡觉"]])["bleu"]
    assert apart[0] < 1 < 40 < item_metrics(["我在家里吃饭"], [["我在家里睡觉"]], language="zh")["bleu"][0]
    assert corpus_metrics(["我在家里"], [["我在家里"]], language="zh")["corpus_bleu"] == pytest.approx(100)


def test_a_language_without_its_package_is_named_with_what_to_install():
    pytest.importorskip("sacrebleu")
    if importlib.util.find_spec("MeCab"):
        pytest.skip("the package is here")
    assert bleu_tokenizer("ja_XX") == "ja-mecab"
    with pytest.raises(ConfigError, match=r"pip install sacrebleu\[ja\]"):
        item_metrics(["a"], [["a"]], language="ja")


def test_abstaining_is_right_where_the_reference_does():
    texts, references = ["unanswerable", "I do not know", "Rome"], [["unanswerable"], ["Rome"], ["Rome"]]
    found = item_metrics(texts, references, further=["abstained", "abstention_right"])
    assert (found["abstained"], found["abstention_right"]) == ([1, 1, 0], [1, 0, 1])


def test_self_bleu_is_the_mean_against_the_others():
    a, b = "the cat sat on the mat", "the cat sat on a mat"
    one_way = item_metrics([a], [[b, "no"]])["bleu"][0], item_metrics([b], [[a, "no"]])["bleu"][0]
    third = item_metrics(["no"], [[a, b]])["bleu"][0]
    assert self_bleu([a, b, "no"]) == pytest.approx((sum(one_way) + third) / 3)
    assert self_bleu([a, a]) == pytest.approx(100)
    assert self_bleu([a]) == 0
