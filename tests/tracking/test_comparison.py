"""Intervals against known numbers, and the choice of what is compared."""

import random
from statistics import mean, stdev

import pytest

from pertoken.text_metrics import bootstrap_mean
from pertoken.tracking.comparison import compare


def row(step: int, split: str = "test", scores: dict | None = None, **more) -> dict:
    scores = scores or {"a": 0.1, "b": 0.3}
    items = {"id": list(scores), "rouge_l": list(scores.values())}
    return {"step": step, "split": split, "metrics": {"rouge_l": mean(scores.values())}, "items": items} | more


def test_the_interval_is_that_of_the_normal_approximation_on_many_items():
    draw = random.Random(0)
    before = [draw.random() for _ in range(400)]
    after = [value + draw.gauss(0.02, 0.1) for value in before]
    differences = [b - a for a, b in zip(before, after, strict=True)]
    half = 1.96 * stdev(differences) / 400**0.5
    expected = (mean(differences) - half, mean(differences) + half)
    interval = bootstrap_mean(differences)
    assert (interval.low, interval.high) == pytest.approx(expected, abs=0.1 * half)


def test_pairs_are_matched_by_item_not_by_place():
    changed = compare([row(0, scores={"a": 0.1, "b": 0.3}), row(5, scores={"b": 0.4, "a": 0.2, "c": 0.9})])
    assert changed.num_items == 2
    assert (changed.changes["rouge_l"].low, changed.changes["rouge_l"].high) == (0.1, 0.1)


def test_an_interval_that_the_evaluation_recorded_counts():
    changed = compare([row(0), row(5, differences={"rouge_l": [0.0, -0.7, 0.7]})])
    assert (changed.changes["rouge_l"].low, changed.changes["rouge_l"].high) == (-0.7, 0.7)


def test_the_test_split_decides_if_it_was_evaluated_twice():
    rows = [row(0, "test"), row(0, "validation"), row(5, "validation"), row(9, "test"), row(10, "validation")]
    compared = compare(rows)
    assert (compared.split, compared.before["step"], compared.after["step"]) == ("test", 0, 9)
    assert compare([rows[0], *rows[1:3]]).split == "validation"
    assert compare([row(0, "test"), row(0, "validation")]) is None
    assert compare([]) is None


def test_the_main_metric_comes_first_and_a_missing_one_is_left_out():
    first = row(0, metrics={"words": 9.0, "rouge_l": 0.2, "bleu": None})
    last = row(5, metrics={"words": 5.0, "rouge_l": 0.3, "bleu": 1.0, "new": 1.0}, main="rouge_l")
    assert list(compare([first, last]).changes) == ["rouge_l", "words"]
    assert compare([first, last]).changes["words"].low is None
