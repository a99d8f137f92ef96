"""Costs of form, by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import ConfigError
from pertoken.rewards import Length, Overlong, Repetition

# ---- repetition -------------------------------------------------------------------------------------------------


def test_the_word_that_closes_a_repeated_ngram_pays(make_episode, make_scene, letters):
    """ "a b a B": the second "a b" is closed by the last letter, whatever its case."""
    scene = make_scene(make_episode(letters("a b a B")))
    assert Repetition(n=2, cost=0.5)(scene)[0, 2:].tolist() == [0, 0, 0, 0, 0, 0, -0.5]


def test_a_word_of_several_tokens_shares_the_cost(make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("ab ab")))
    assert Repetition(n=1)(scene)[0, 2:].tolist() == [0, 0, 0, -0.5, -0.5]


def test_normalised_repetition_is_the_share_of_repeated_ngrams(make_episode, make_scene):
    """1 of 4 bigrams is distinct: -0.75 (shared/fixtures, repetition_penalty_trl_n2_of_5_5_5_5_5)."""
    scene = make_scene(make_episode("5 5 5 5 5"))
    assert Repetition(n=2, normalised=True)(scene).sum().item() == pytest.approx(-0.75)


def test_a_loop_of_marks_is_a_repetition(make_episode, make_scene):
    assert Repetition()(make_scene(make_episode("!" * 5))).sum().item() == pytest.approx(-2)


@pytest.mark.parametrize("text", ["", "a", "one two three four", "ha"])
def test_text_without_repetition_costs_nothing(text, make_episode, make_scene):
    assert not Repetition()(make_scene(make_episode(text))).any()


def test_findings_say_what_is_repeated(make_episode, make_scene):
    (sample,) = make_scene(make_episode("so it is so it is")).samples
    (finding,) = Repetition().findings(sample)
    assert sample.text[finding.start : finding.stop] == "is"
    assert finding.message == "repeats 'so it is'"


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.sampled_from("abc"), max_size=12), n=st.integers(1, 4))
def test_the_sum_counts_the_ngrams_seen_before(words, n, make_episode, make_scene):
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    scene = make_scene(make_episode(" ".join(words)))
    assert Repetition(n=n)(scene).sum().item() == pytest.approx(len(set(ngrams)) - len(ngrams))


# ---- length -----------------------------------------------------------------------------------------------------


def test_words_beyond_the_bound_pay_on_their_own_tokens(make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("a b, cd")))
    assert Length(max_words=1, cost=1.0)(scene)[0, 2:].tolist() == [0, 0, -1, 0, 0, -0.5, -0.5]


def test_missing_words_cost_the_action_that_ended_the_text(make_episode, make_scene):
    scene = make_scene(make_episode("a b"), padding=1)
    values = Length(min_words=5, cost=0.5)(scene)
    assert values[0, scene.batch.action_mask[0]].tolist()[-1] == pytest.approx(-1.5)
    assert values.sum().item() == pytest.approx(-1.5)


@pytest.mark.parametrize(("stop", "cost"), [("eos", 0), ("stop_string", 0), ("length", -2), ("context", -2)])
def test_being_cut_off_has_its_own_cost(stop, cost, make_episode, make_scene):
    scene = make_scene(make_episode([7, 8, 9], mask=[1, 1, 0], stop=stop))
    assert Length(unfinished_cost=2.0)(scene)[0].tolist() == [0, 0, 0, cost, 0]


def test_between_the_bounds_length_costs_nothing(make_episode, make_scene):
    assert not Length(min_words=2, max_words=4, unfinished_cost=1.0)(make_scene(make_episode("a b c"))).any()


@pytest.mark.parametrize("words", range(8))
def test_the_cost_is_linear_in_the_words_outside_the_bounds(words, make_episode, make_scene):
    scene = make_scene(make_episode(" ".join("abcdefgh"[:words])))
    expected = -0.1 * (max(3 - words, 0) + max(words - 5, 0))
    assert Length(min_words=3, max_words=5, cost=0.1)(scene).sum().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Repetition(n=0), "repetition.n: expected at least 1"),
        (lambda: Length(min_words=5, max_words=4), "expected 0 <= min_words <= max_words, got 5 and 4"),
        (lambda: Length(min_words=-1), "expected 0 <= min_words"),
        (Length, "set min_words, max_words or unfinished_cost"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


# ---- overlong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "cost"), [(70, 0.0), (80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0)])
def test_the_soft_cost_of_long_completions(length, cost, make_episode, make_scene):
    """The published formula (shared/fixtures, dapo_overlong_and_filter)."""
    said = make_episode("a" * (length - 1))  # and the token that ends it
    assert sum(said.action_mask) == length
    values = Overlong(max_tokens=100, buffer=20)(make_scene(said))
    assert values.sum().item() == pytest.approx(cost, abs=1e-6)


def test_the_tokens_of_the_buffer_pay_and_no_other(make_episode, make_scene, letters):
    """Tokens that the policy did not choose are not counted: the third and fourth of its own pay."""
    scene = make_scene(make_episode(letters("abcdef"), mask=[1, 0, 1, 1, 1, 1]))
    assert Overlong(max_tokens=4, buffer=2)(scene)[0, 2:].tolist() == [0, 0, 0, -0.5, -0.5, 0]


@pytest.mark.parametrize(("max_tokens", "buffer"), [(4, 0), (4, 5), (0, 0)])
def test_an_overlong_without_a_buffer_is_refused(max_tokens, buffer):
    with pytest.raises(ConfigError, match="overlong: expected 1 <= buffer <= max_tokens"):
        Overlong(max_tokens=max_tokens, buffer=buffer)
