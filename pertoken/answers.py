"""What an answer says: its words, whether it abstains, its last word on the matter, and the sums on the way there.

Pure functions of texts, for held-out metrics and for rewards, so that both count alike.
"""

import ast
import operator
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Chinese and Japanese set no spaces: each of their characters counts as a word."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)

# --- words ---


def answer_words(text: str) -> list[str]:
    """What counts of an answer: words in small letters, without English articles and ASCII punctuation.

    Those of SQuAD's script (Rajpurkar et al. 2016, https://aclanthology.org/D16-1264), and of Chinese and Japanese each
    character by itself.

    >>> answer_words("The U.S. Navy!"), answer_words("在 1999 年")
    (['us', 'navy'], ['在', '1999', '年'])
    """
    bare = re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION))
    return re.sub(f"([{UNSPACED}])", r" \1 ", bare).split()


def exact_match(text: str, reference: str) -> float:
    """1 if both say the same words in the same order, as `answer_words` counts them, else 0.

    >>> exact_match("the cat.", "Cat"), exact_match("a cat sat", "cat")
    (1.0, 0.0)
    """
    return float(answer_words(text) == answer_words(reference))


def answer_f1(text: str, reference: str) -> float:
    """F1 of the words that two answers share, each as often as both have it; without words in one of them, exact match.

    >>> answer_f1("in the city of Paris", "Paris, France"), answer_f1("", "")
    (0.3333333333333333, 1.0)
    """
    said, known = Counter(answer_words(text)), Counter(answer_words(reference))
    if not said or not known:
        return float(said == known)
    return 2 * (said & known).total() / (said.total() + known.total())


UNANSWERABLE = "unanswerable"
"""The answer to a question that has none."""
_ABSTENTIONS = (
    UNANSWERABLE, "no answer", "not answerable", "not enough information", "i do not know", "i don't know",
    "i am not sure", "i'm not sure", "it is unknown", "it cannot be answered", "it can't be answered",
    "the question cannot be answered", "the question can't be answered", "the context does not say",
    "the text does not say", "无法回答", "不知道", "我不知道", "わかりません", "分かりません",
)  # fmt: skip
_ABSTAINS = tuple(tuple(answer_words(phrase)) for phrase in _ABSTENTIONS)


def abstains(text: str) -> bool:
    """Whether an answer says that it does not know: no words at all, or some that begin by saying so.

    >>> [abstains(text) for text in ("Unanswerable.", "I don't know who did.", "", "An unanswerable one", "不知道。")]
    [True, True, True, True, True]
    >>> abstains("In 1999; I do not know the month.")
    False
    """
    said = tuple(answer_words(text.replace("。", "")))
    return not said or any(said[: len(phrase)] == phrase for phrase in _ABSTAINS)


# --- the last word ---

_AMOUNT = r"\$?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?"
_NUMBER = re.compile(rf"[-\u2212]?\$?\d+/\d+|[-\u2212]?{_AMOUNT}")
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_MARKED = re.compile(r"(?:####|\b(?i:answer)(?:[ \t]+is\b|[ \t]*:))[ \t]*([^\n]+)")


@dataclass(frozen=True)
class Final:
    """What a text says in the end: characters `[start, stop)` of it."""

    start: int
    stop: int
    said: str
    marked: bool
    """Whether a mark announces it: `####`, `\\boxed{}`, `answer is` or `answer:`."""


def final_answer(text: str) -> Final | None:
    """The final answer of a solution: what stands behind the last mark, else its last number; None if there is neither.

    In a box all of it counts; behind another mark the first number, or all of the line if there is none.

    >>> final_answer("4 + 5 = 9\\n#### 9").said, final_answer("So the answer is $1,200 a year.").said
    ('9', '$1,200')
    >>> final_answer("She has 3, then 4 left.").said, final_answer("Hence \\\\boxed{x+1}.").said, final_answer("Hm.")
    ('4', 'x+1', None)
    """
    if boxed := _last(_BOXED, text):
        start, stop = boxed.span(1)
    elif marked := _last(_MARKED, text):
        start, stop = marked.span(1)
        if number := _NUMBER.search(text, start, stop):
            start, stop = number.span()
        else:
            stop -= len(marked[1]) - len(marked[1].rstrip(" \t."))
    else:
        number = _last(_NUMBER, text)
        return Final(*number.span(), number[0], marked=False) if number else None
    return Final(start, stop, text[start:stop], marked=True)


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def same_answer(said: str, known: str) -> bool:
    """Whether two final answers are the same: as numbers if both are, else as words.

    >>> same_answer("$1,200.00", "1200"), same_answer("0.5", "1/2"), same_answer("50%", "0.5"), same_answer("7", "x")
    (True, True, True, False)
    """
    one, other = _value(said), _value(known)
    return one == other if None not in (one, other) else answer_words(said) == answer_words(known) != []


def solves(text: str, references: list[str]) -> float:
    """1 if the final answer of `text` is that of one of the reference solutions, else 0."""
    said = final_answer(text)
    known = [found.said if (found := final_answer(one)) else one.strip() for one in references]
    return float(said is not None and any(same_answer(said.said, one) for one in known))


def _value(written: str) -> Fraction | None:
    """The number that is written; None if it is none."""
    bare = written.strip().replace("\u2212", "-").replace("$", "").replace(",", "")
    try:
        return Fraction(bare[:-1]) / 100 if bare.endswith("%") else Fraction(bare)
    except (ValueError, ZeroDivisionError):
        return None


# --- sums on the way ---


@dataclass(frozen=True)
class Equation:
    """A sum that a text works out: `2 + 3 = 5`."""

    start: int
    stop: int
    """Characters of its right-hand side."""
    said: str
    """All of it, without spaces."""
    holds: bool


_OPERATOR = r"[-+*/\u2212\u00d7\u00f7x]"
_EQUATION = re.compile(
    rf"(?P<left>\(*{_AMOUNT}\)*(?:[ ]*{_OPERATOR}[ ]*\(*{_AMOUNT}\)*){{1,50}})[ ]*=[ ]*"
    rf"(?=(?P<right>[-\u2212]?{_AMOUNT}))"  # which may begin the next sum
)
_GOES_BEFORE = re.compile(rf"(?:[\d.,^]|\S[ \t]*{_OPERATOR}[ \t]*)\Z")
_GOES_ON = re.compile(rf"[.,]?\d|[ ]*{_OPERATOR}[ ]*[\d(.$]|[ ]+\d+/\d")
_PLAIN = str.maketrans({"\u2212": "-", "\u00d7": "*", "x": "*", "\u00f7": "/", "$": None, ",": None, " ": None})
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip


def equations(text: str) -> Iterator[Equation]:
    """Each sum of plain numbers in `text`, and whether it holds: exactly, or rounded to the decimals that are written.

    Sums that go on (`... = 8 * 3`), that other things than numbers are added to (`5 apples + 2 * 3 = 11`), that can be
    read in two ways (`60/3/4`), or that are none at all are passed over: of those nothing is known.

    >>> [(sum.said, sum.holds) for sum in equations("She has 16 * .5 = 8 and 10 / 3 = 3.33, so 8 + 3 = 12 in all.")]
    [('16*.5=8', True), ('10/3=3.33', True), ('8+3=12', False)]
    """
    for found in _EQUATION.finditer(text):
        if _GOES_BEFORE.search(text, 0, found.start()) or _GOES_ON.match(text, found.end("right")):
            continue
        left, right = found["left"].translate(_PLAIN), _value(found["right"])
        worth = _worth(left[max(left.count("(") - left.count(")"), 0) :])  # "(2 + 3 = 5)" opens before it begins
        if worth is None or right is None or re.search(r"/[\d.%]+/", left):  # 60/3/4 may be meant as 60/(3/4)
            continue
        decimals = len(found["right"].rstrip("%").partition(".")[2])
        unit = Fraction(1, 10 ** (decimals + 2 * found["right"].endswith("%")))
        in_percent = found["right"].endswith("%") and worth == 100 * right  # 15/60*100 = 25%
        holds = worth == right or in_percent or (decimals > 0 and abs(worth - right) <= unit / 2)
        yield Equation(*found.span("right"), re.sub(r"\s", "", found[0] + found["right"]), holds)


def right_steps(text: str) -> float:
    """Share of the sums in `text` that hold; 1 without any."""
    found = [sum.holds for sum in equations(text)]
    return sum(found) / len(found) if found else 1.0


def _worth(expression: str) -> Fraction | None:
    """The value of a sum of numbers; None if it has none."""
    try:
        return _evaluate(ast.parse(re.sub(r"([\d.]+)%", r"(\1/100)", expression), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluate(node.left), _evaluate(node.right))
    raise ValueError(f"{ast.dump(node)[:40]} is no number")
