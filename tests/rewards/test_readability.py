"""The formulas of Flesch by hand, and the sentence that pays."""

import pytest

from pertoken.errors import ConfigError
from pertoken.rewards import Readability
from pertoken.rewards.readability import flesch, syllables

EASY, HARD = "The cat sat on the mat.", "International organisations communicate."
"""6 words of 6 syllables, and 3 words of 5 + 5 + 4."""


@pytest.mark.parametrize(
    ("word", "count"),
    [
        *(("cat", 1), ("made", 1), ("table", 2), ("tables", 2), ("mile", 1), ("the", 1), ("see", 1), ("boxes", 2)),
        *(("walked", 1), ("wanted", 2), ("sampled", 2), ("nation", 2), ("delicious", 3), ("various", 3), ("lion", 2)),
        *(("being", 2), ("language", 2), ("actual", 3), ("safely", 2), ("careless", 2), ("movement", 2)),
        *(("rhythm", 1), ("Müller", 2), ("don't", 1), ("well-known", 2), ("x", 1), ("international", 5)),
    ],
)
def test_syllables_of_common_words(word, count):
    assert syllables(word) == syllables(word.upper()) == count


def test_the_formulas_of_flesch():
    """By hand: 14 syllables of 3 words."""
    assert flesch("grade", 3, 14) == pytest.approx(0.39 * 3 + 11.8 * 14 / 3 - 15.59) == pytest.approx(40.6467, abs=1e-4)
    assert flesch("ease", 3, 14) == pytest.approx(206.835 - 1.015 * 3 - 84.6 * 14 / 3) == pytest.approx(-191.01)


@pytest.fixture
def found(make_episode, make_scene):
    def of(reward, text):
        (sample,) = make_scene(make_episode(text)).samples
        return [(sample.text[s.start : s.stop], s.value, s.message) for s in reward.findings(sample)]

    return of


def test_the_sentence_that_is_off_pays_by_its_distance_and_its_words(found):
    """The hard sentence is 30.6467 grades above 10, and has 3 of the 9 words."""
    ((where, value, message),) = found(Readability(most=10.0, cost=0.3), f"{EASY} {HARD}")
    assert where == HARD
    assert value == pytest.approx(-0.3 * 30.6467 * 3 / 9, abs=1e-4)
    assert message == "grade 40.6 is above the band"


def test_too_easy_is_outside_of_a_band_as_well(found):
    ((where, value, message),) = found(Readability(least=0.0, most=50.0), f"{EASY} {HARD}")
    assert (where, message) == (EASY, "grade -1.4 is below the band")
    assert value == pytest.approx(-0.1 * 1.45 * 6 / 9)
    ((where, value, _),) = found(Readability("ease", least=0.0), f"{EASY} {HARD}")
    assert where == HARD
    assert value == pytest.approx(-0.1 * 191.01 * 3 / 9)


def test_the_tokens_of_the_sentence_share_its_cost(make_episode, make_scene, letters):
    paid = Readability(most=-20.0)(make_scene(make_episode(letters("No. A b"))))[0, 2:].tolist()
    a, b = -0.1 * (0.39 - 3.79 + 20) / 3, -0.1 * (0.78 - 3.79 + 20) * 2 / 3
    assert paid == pytest.approx([a / 3] * 3 + [0] + [b / 3] * 3)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Go e.g. there. Stay!\nA list", ["Go e.g. there.", "Stay!", "A list"]),
        ('He said "no." Then 3.5 left.', ['He said "no."', "Then 3.5 left."]),
        ("你好。Good day。再见", ["Good day。"]),
        ("123. * A point", ["A point"]),
        ("123 ... !!!", []),
        ("", []),
    ],
)
def test_sentences_are_those_with_words(text, sentences, found):
    assert [where for where, *_ in found(Readability(most=-100.0), text)] == sentences


def test_length_is_free(make_episode, make_scene):
    one, four = (Readability(most=5.0)(make_scene(make_episode(" ".join([HARD] * k)))).sum().item() for k in (1, 4))
    assert one == pytest.approx(four)
    assert one < -1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Readability, "set least or most"),
        (lambda: Readability(least=9.0, most=8.0), "expected least <= most, got 9.0 and 8.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
