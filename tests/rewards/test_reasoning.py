"""Final answers, sums on the way, and words of answers, each paid on its own tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.answers import answer_f1
from pertoken.errors import ConfigError, RewardError
from pertoken.rewards import AnswerF1, FinalAnswer, Steps

SOLUTION = "2 + 3 = 5\n#### 5"


def paid(reward, scene):
    """Of each token of the completion."""
    return reward(scene)[0, 2:].tolist()


def test_the_right_answer_earns_on_its_own_characters(make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("a #### 12"), "x = 12\n#### 12"))
    assert paid(FinalAnswer(reward=2.0), scene) == [0] * 7 + [1, 1]


def test_another_answer_costs_there_and_none_costs_the_end(make_episode, make_scene, letters):
    wrong = make_scene(make_episode(letters("#### 13"), "#### 12"))
    assert paid(FinalAnswer(wrong=0.5), wrong) == [0] * 5 + [-0.25, -0.25]
    none = make_scene(make_episode(letters("ab"), "#### 12"))
    assert paid(FinalAnswer(wrong=0.5), none) == [0, -0.5]
    assert not FinalAnswer()(wrong).any()


def test_a_number_without_a_mark_counts_unless_marks_are_asked_for(make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("so 5"), SOLUTION))
    assert paid(FinalAnswer(), scene) == [0, 0, 0, 1]
    assert paid(FinalAnswer(marked=True, wrong=1.0), scene) == [0, 0, 0, -1]


def test_any_of_several_references_will_do(make_episode, make_scene):
    scene = make_scene(make_episode("#### 7", info={"references": ["#### 6", "7"]}))
    assert FinalAnswer()(scene).sum().item() == pytest.approx(1)


def test_an_item_without_an_answer_is_an_error(make_episode, make_scene):
    with pytest.raises(RewardError, match="no reference to compare with"):
        FinalAnswer()(make_scene(make_episode("#### 7")))


def test_sums_earn_and_cost_on_their_results(make_episode, make_scene, letters):
    scene = make_scene(make_episode(letters("1+1=2 1+1=3")))
    assert paid(Steps(reward=0.1, cost=0.2), scene) == [0, 0, 0, 0, 0.1, 0, 0, 0, 0, 0, -0.2]


def test_a_sum_earns_once_and_no_more_than_so_many_do(make_episode, make_scene):
    again = make_scene(make_episode("1 + 1 = 2, 1 + 1 = 2, 1+1=2"))
    assert Steps(reward=0.5)(again).sum().item() == pytest.approx(0.5)
    many = make_scene(make_episode(", ".join(f"{k} + 1 = {k + 1}" for k in range(2, 9))))
    assert Steps(reward=1.0, most=3)(many).sum().item() == pytest.approx(3)


def test_findings_say_what_is_wrong(make_episode, make_scene):
    (sample,) = make_scene(make_episode("2 * 3 = 7")).samples
    (found,) = Steps().findings(sample)
    assert (sample.text[found.start : found.stop], found.message) == ("7", "2*3=7 is wrong")


@pytest.mark.parametrize("reward", [FinalAnswer(wrong=1.0), Steps(), AnswerF1(wrong=1.0)])
def test_a_completion_of_no_tokens_earns_nothing(reward, make_episode, make_scene):
    assert not reward(make_scene(make_episode([], "#### 1"))).any()


def test_negative_amounts_are_refused():
    for make in (lambda: FinalAnswer(wrong=-1.0), lambda: Steps(cost=-1.0), lambda: AnswerF1(wrong=-1.0)):
        with pytest.raises(ConfigError, match="at least 0"):
            make()


# --- words of answers ---


def test_each_word_of_an_answer_earns_what_it_adds(make_episode, make_scene, letters):
    """ "the" is no word here; "b" alone is 1 of 1 and 1 of 2; with "x" beside it 1 of 2 and 1 of 2."""
    scene = make_scene(make_episode(letters("the b x"), "b, c"))
    values = paid(AnswerF1(), scene)
    assert values[:4] == [0, 0, 0, 0]
    assert values[4:] == pytest.approx([2 / 3, 0, 2 / 4 - 2 / 3])


WORDS = st.sampled_from(["Paris", "the", "a", "1999", "U.S.", "don't", "猫猫", "x-y", "."])


@settings(max_examples=80, deadline=None)
@given(
    text=st.lists(WORDS, max_size=8),
    reference=st.lists(WORDS, max_size=4),
    granularity=st.sampled_from(["word", "token", "text"]),
)
def test_the_sum_is_the_f1_that_is_measured_held_out(text, reference, granularity, make_episode, make_scene):
    said, known = " ".join(text), " ".join(["Rome", *reference])
    scene = make_scene(make_episode(said, known))
    assert AnswerF1(granularity)(scene).sum().item() == pytest.approx(answer_f1(said, known))


def test_a_wrong_answer_costs_and_one_that_is_withheld_does_not(make_episode, make_scene):
    def total(said, known):
        return AnswerF1(wrong=0.25)(make_scene(make_episode(said, known))).sum().item()

    assert total("Paris", "Rome") == pytest.approx(-0.25)
    assert total("I do not know", "Rome") == 0
    assert total("unanswerable", "unanswerable") == pytest.approx(1)
    assert total("Rome, Italy", "Rome") == pytest.approx(2 / 3)
