"""What answers say, by hand: abstaining, the last word, and sums."""

import pytest

from pertoken.answers import abstains, equations, final_answer, right_steps, same_answer, solves


def sums(text: str) -> list[tuple[str, bool]]:
    return [(each.said, each.holds) for each in equations(text)]


@pytest.mark.parametrize(
    "text", ["", " . ", "unanswerable", "No answer.", "I don't know", "I do not know, sorry", "无法回答。"]
)
def test_saying_that_one_does_not_know_is_abstaining(text):
    assert abstains(text)


@pytest.mark.parametrize("text", ["Paris", "answerable", "no", "I know", "knowing that I do not know", "知道"])
def test_an_answer_is_none(text):
    assert not abstains(text)


@pytest.mark.parametrize(
    ("text", "said", "marked"),
    [
        ("2 + 2 = 4\n#### 4", "4", True),
        ("#### 4\nNo: #### 5", "5", True),
        ("The answer is 12 apples, not 13.", "12", True),
        ("Final answer: Paris.", "Paris", True),
        (r"so \boxed{\frac{1}{2}} it is, 7", r"\frac{1}{2}", True),
        ("first 3 then -4.5", "-4.5", False),
        ("costs $1,234.50 in all", "$1,234.50", False),
        ("it is 3/4", "3/4", False),
    ],
)
def test_the_last_word_of_a_solution(text, said, marked):
    found = final_answer(text)
    assert (found.said, found.marked) == (said, marked)
    assert text[found.start : found.stop] == said


def test_a_text_without_number_and_mark_has_no_final_answer():
    assert final_answer("I wonder.") is None
    assert solves("I wonder.", ["#### 4"]) == 0


@pytest.mark.parametrize(
    ("one", "other"), [("1,000", "1000.0"), ("$5", "5"), ("1/4", "25%"), ("Paris.", "paris"), ("−3", "-3")]
)
def test_answers_are_the_same_as_numbers_or_as_words(one, other):
    assert same_answer(one, other)
    assert same_answer(other, one)


@pytest.mark.parametrize(("one", "other"), [("5", "6"), ("5", "five"), ("", ""), ("a", "the")])
def test_others_are_not(one, other):
    assert not same_answer(one, other)


def test_a_solution_is_held_against_the_final_answers_of_the_references():
    assert solves("so 2 * 27 = 54", ["In all 54 cars.\n#### 54"]) == 1
    assert solves("#### 54", ["53", "54"]) == 1
    assert solves("54 and then 55", ["#### 54"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16 * .5 = 8 cars", [("16*.5=8", True)]),
        ("16*.5=<<16*.5=8>>8", [("16*.5=8", True)]),
        ("2 + 3 * 4 = 14, (2 + 3) * 4 = 21", [("2+3*4=14", True), ("(2+3)*4=21", False)]),
        ("$1,000 - $250.50 = $749.50", [("$1,000-$250.50=$749.50", True)]),
        ("200 * 15% = 30 and 5 / 20 = 25%", [("200*15%=30", True), ("5/20=25%", True)]),
        ("10 / 3 = 3.3, 10 / 3 = 3.34, 10 / 3 = 3", [("10/3=3.3", True), ("10/3=3.34", False), ("10/3=3", False)]),
        ("6 x 7 = 42; 6 × 7 = 43; 8 ÷ 2 = 4", [("6x7=42", True), ("6×7=43", False), ("8÷2=4", True)]),
        ("- 3 + 4 = 7\n- 3 + 5 = 9", [("3+4=7", True), ("3+5=9", False)]),
        ("He left in 2020. 2 + 2 = 4 (1 + 1 = 2)", [("2+2=4", True), ("(1+1=2", True)]),
        ("1 - 3 = -2", [("1-3=-2", True)]),
        ("15 / 60 * 100 = 25%, 1 / 4 = 26%", [("15/60*100=25%", True), ("1/4=26%", False)]),
    ],
)
def test_sums_are_checked(text, expected):
    assert sums(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "5 apples + 2 * 3 = 11 apples",  # what the apples are added to is not known
        "2 * 4 = 8 * 3 = 24 is no sum by itself"[:13],
        "x = 5", "5 = 5", "7 / 0 = 0", "1 + 1 == 2", "v1.2.3 + 1 = 4", "08 + 1 = 9", "no sums",
        "60/3/4 = 80", "half of 6 / 3 / 4 = 1",
    ],
)  # fmt: skip
def test_what_is_no_plain_sum_is_passed_over(text):
    assert sums(text) == []


def test_a_chain_is_checked_where_it_ends():
    assert sums("4 * 4 = 16 * .5 = 8") == [("16*.5=8", True)]


def test_the_place_of_a_sum_is_its_result():
    text = "So 2 + 2 = 5 it is."
    (found,) = equations(text)
    assert text[found.start : found.stop] == "5"


def test_the_share_of_sums_that_hold():
    assert right_steps("1 + 1 = 2, 1 + 2 = 4") == 0.5
    assert right_steps("nothing to add") == 1


def test_long_texts_without_an_end_take_no_time():
    assert sums("1+" * 3000 + "1") == []
    assert sums("(" * 3000 + "1 + 1 = 2") in ([], [("(" * 3000 + "1+1=2", True)])
