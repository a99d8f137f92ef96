"""What held-out text is measured by: overlap with the reference, length, repetition, variety.

Pure functions of texts; the scores are those of `rouge-score` and `sacrebleu`, with their own tokenisation.
What each name means, and which direction is good, stands in `tracking/glossary.py`.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

import numpy as np

Texts = Sequence[str]
References = Sequence[Sequence[str]]
"""The references of each text; several count as the best of them (ROUGE) or together (BLEU, chrF)."""

ITEM_METRICS = ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "exact_match", "answer_f1", "words", "repetition")
"""Metrics with one value per item, whose mean over items is reported with an interval."""
CORPUS_METRICS = ("corpus_bleu", "corpus_chrf", "distinct_1", "distinct_2")
"""Metrics of all texts together."""


def item_metrics(texts: Texts, references: References) -> dict[str, list[float]]:
    """Each metric of `ITEM_METRICS`, one value per text; those with a reference only where all items have one.

    >>> scores = item_metrics(["the cat sat"], [["the cat sat down"]])
    >>> {name: round(scores[name][0], 3) for name in ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "words")}
    {'rouge_1': 0.857, 'rouge_2': 0.8, 'rouge_l': 0.857, 'bleu': 71.653, 'chrf': 66.018, 'words': 3.0}
    """
    columns: dict[str, list[float]] = {}
    if _comparable(references):
        rouge = [_rouge(text, known) for text, known in zip(texts, references, strict=True)]
        columns |= {name: [scores[name] for scores in rouge] for name in rouge[0]}
        columns["bleu"] = [_sacrebleu("sentence_bleu", t, list(r)) for t, r in zip(texts, references, strict=True)]
        columns["chrf"] = [_sacrebleu("sentence_chrf", t, list(r)) for t, r in zip(texts, references, strict=True)]
        for name, measure in (("exact_match", exact_match), ("answer_f1", answer_f1)):
            columns[name] = [max(measure(t, one) for one in r) for t, r in zip(texts, references, strict=True)]
    columns["words"] = [float(len(words(text))) for text in texts]
    columns["repetition"] = [repetition(text) for text in texts]
    return columns


def corpus_metrics(texts: Texts, references: References) -> dict[str, float]:
    """Each metric of `CORPUS_METRICS`; those with a reference only where all items have one."""
    columns: dict[str, float] = {}
    if _comparable(references):
        deepest = max(map(len, references))
        # sacrebleu wants one list per reference number; a text with fewer references repeats its first.
        by_number = [[known[n] if n < len(known) else known[0] for known in references] for n in range(deepest)]
        columns["corpus_bleu"] = _sacrebleu("corpus_bleu", list(texts), by_number)
        columns["corpus_chrf"] = _sacrebleu("corpus_chrf", list(texts), by_number)
    return columns | {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}


def _comparable(references: References) -> bool:
    if any(isinstance(known, str) for known in references):
        raise ValueError("references: expected a list of texts for each text, got a plain string")
    return bool(references) and all(references)


_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Chinese and Japanese set no spaces: each of their characters counts as a word."""
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def answer_words(text: str) -> list[str]:
    """What counts of an answer: words in small letters, without English articles and ASCII punctuation.

    Those of SQuAD's script (Rajpurkar et al. 2016, https://aclanthology.org/D16-1264), and of Chinese and Japanese each
    character by itself.

    >>> answer_words("The U.S. Navy!"), answer_words("在 1999 年")
    (['us', 'navy'], ['在', '1999', '年'])
    """
    bare = re.sub(r"\b(?:a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION))
    return re.sub(f"([{_UNSPACED}])", r" \1 ", bare).split()


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


def repetition(text: str, n: int = 3) -> float:
    """Share of the word n-grams of `text` that occurred before in it.

    >>> repetition("a b c a b c a b c"), repetition("a b c d"), repetition("")
    (0.5714285714285714, 0.0, 0.0)
    """
    grams = _ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(texts: Texts, n: int) -> float:
    """Different word n-grams over all word n-grams of all texts; 0 if there are none.

    Li et al. 2016, https://aclanthology.org/N16-1014.

    >>> distinct(["a b a", "a b"], 1), distinct(["a b a", "a b"], 2)
    (0.4, 0.6666666666666666)
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


_SENTENCE_END = re.compile(
    r"(?<!\be\.g)(?<!\bi\.e)(?<!\b[A-Z]\.[A-Z])(?<!\b(?:Mr|Ms|Dr|St|vs))(?<!\b(?:Mrs|etc))[.!?]+[\"'”’)\]]*(?=\s|$)"
    r"|[。！？]+[”」』）]*"
)


def first_sentence(text: str) -> str:
    """The first sentence of `text`: the baseline that a summary has to beat.

    >>> first_sentence("Version 2.0 (e.g. by Mr. Li) is out. It is fast.")
    'Version 2.0 (e.g. by Mr. Li) is out.'
    """
    found = _SENTENCE_END.search(text)
    return text[: found.end()].strip() if found else text.strip()


@dataclass(frozen=True)
class Interval:
    """A mean with its 95% interval."""

    mean: float
    low: float
    high: float


DRAWS = 4000
"""Bootstrap resamples: the ends of a 95% interval then move by about 1% of its width from seed to seed."""


def bootstrap_mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of `values` and its 95% percentile-bootstrap interval; items are drawn with replacement.

    Given the differences of pairs, this is the paired bootstrap: what is hard for both models cancels out.
    Koehn 2004, https://aclanthology.org/W04-3250.

    >>> bootstrap_mean([0.1, 0.1])
    Interval(mean=0.1, low=0.1, high=0.1)
    """
    sample = np.asarray(values, dtype=float)
    count = len(sample)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    low, high = np.quantile(draws @ sample / count, [0.025, 0.975])
    return Interval(round(float(sample.mean()), 12), round(float(low), 12), round(float(high), 12))


def t_mean(values: Sequence[float]) -> Interval:
    """The mean of `values` and its 95% Student-t interval: for a few runs, too few to draw from with replacement.

        mean -+ t * s / sqrt(n)      s with n - 1; t the 0.975 quantile at n - 1 degrees of freedom

    One value has no ends: they are infinite.

    >>> t_mean([1.0, 2.0, 3.0])
    Interval(mean=2.0, low=-0.48413771..., high=4.48413771...)
    """
    count, mean = len(values), fmean(values)
    half = math.inf if count < 2 else t_quantile(count - 1) * stdev(values) / math.sqrt(count)
    return Interval(round(mean, 12), round(mean - half, 12), round(mean + half, 12))


def t_quantile(degrees: int) -> float:
    """What |t| stays below with probability 0.95, for Student's t with so many degrees of freedom.

    With t = sqrt(degrees) tan(a) the probability is a finite sum: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.

    >>> [round(t_quantile(degrees), 3) for degrees in (1, 2, 3, 10)]
    [12.706, 4.303, 3.182, 2.228]
    """

    def probability(a: float) -> float:
        odd = degrees % 2
        term = math.cos(a) if odd else 1.0
        total = term if degrees > 1 else 0.0
        for k in range(2 + odd, degrees - 1, 2):
            term *= (k - 1) / k * math.cos(a) ** 2
            total += term
        return 2.0 / math.pi * (a + math.sin(a) * total) if odd else math.sin(a) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < 0.95 else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:[.,'’-][^\W{_UNSPACED}]+)*")


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation.

    >>> words("It's 3.5 well-made 汉字.")
    ["it's", '3.5', 'well-made', '汉', '字']
    """
    return _WORD.findall(text.lower())


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    sequence = words(text)
    return list(zip(*(sequence[k:] for k in range(n)), strict=False))


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"])


def _rouge(text: str, references: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L against the reference that each likes best."""
    scores = [_rouge_scorer().score(reference, text) for reference in references]
    names = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
    return {name: float(max(score[key].fmeasure for score in scores)) for name, key in names.items()}


def _sacrebleu(function: str, texts: Any, references: Any) -> float:
    import sacrebleu

    measure: Callable[..., Any] = getattr(sacrebleu, function)
    return float(measure(texts, references).score)
