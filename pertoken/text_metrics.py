"""What held-out text is measured by: overlap with the reference, length, repetition, variety, what it copies or solves.

Pure functions of texts; the scores are those of `rouge-score` and `sacrebleu`, with their own tokenisation.
What each name means, and which direction is good, stands in `tracking/glossary.py`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any

import numpy as np
from jaxtyping import Float

from pertoken.answers import UNSPACED, abstains, answer_f1, exact_match, right_steps, solves
from pertoken.errors import ConfigError

Texts = Sequence[str]
References = Sequence[Sequence[str]]
"""The references of each text; several count as the best of them (ROUGE) or together (BLEU, chrF)."""

ITEM_METRICS = ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "exact_match", "answer_f1", "words", "repetition")
"""Metrics with one value per item, whose mean over items is reported with an interval."""
CORPUS_METRICS = ("corpus_bleu", "corpus_chrf", "distinct_1", "distinct_2")
"""Metrics of all texts together."""
FURTHER_ITEM_METRICS = (
    "rouge_lsum", "ter", "coverage", "density", "compression", "abstained", "abstention_right", "final_answer",
    "right_steps",
)  # fmt: skip
"""Metrics of single texts that are measured where they are asked for."""
FURTHER_CORPUS_METRICS = ("corpus_ter", "self_bleu")
"""The same of all texts together."""


def item_metrics(
    texts: Texts,
    references: References,
    *,
    further: Collection[str] = (),
    sources: Texts | None = None,
    language: str | None = None,
) -> dict[str, list[float]]:
    """Each metric of `ITEM_METRICS`, one value per text; those with a reference only where all items have one.

    further: names of `FURTHER_ITEM_METRICS` beside them; sources: what each text is about, which some of those need;
    language: of the texts, by which BLEU and TER cut words (`bleu_tokenizer`).

    >>> scores = item_metrics(["the cat sat"], [["the cat sat down"]])
    >>> {name: round(scores[name][0], 3) for name in ("rouge_1", "rouge_2", "rouge_l", "bleu", "chrf", "words")}
    {'rouge_1': 0.857, 'rouge_2': 0.8, 'rouge_l': 0.857, 'bleu': 71.653, 'chrf': 66.018, 'words': 3.0}
    """
    columns: dict[str, list[float]] = {}
    if _comparable(references):
        rouge = [_rouge(text, known) for text, known in zip(texts, references, strict=True)]
        columns |= {name: [scores[name] for scores in rouge] for name in rouge[0]}
        cut = {"tokenize": bleu_tokenizer(language)}
        columns["bleu"] = [
            _sacrebleu("sentence_bleu", t, list(r), **cut) for t, r in zip(texts, references, strict=True)
        ]
        columns["chrf"] = [_sacrebleu("sentence_chrf", t, list(r)) for t, r in zip(texts, references, strict=True)]
        for name, measure in (("exact_match", exact_match), ("answer_f1", answer_f1)):
            columns[name] = [max(measure(t, one) for one in r) for t, r in zip(texts, references, strict=True)]
    columns["words"] = [float(len(words(text))) for text in texts]
    columns["repetition"] = [repetition(text) for text in texts]
    for name in (name for name in FURTHER_ITEM_METRICS if name in further):
        if name in _OF_SOURCE:
            columns[name] = [_OF_SOURCE[name](t, source) for t, source in zip(texts, sources or (), strict=True)]
        elif name in _OF_TEXT:
            columns[name] = [_OF_TEXT[name](text) for text in texts]
        elif _comparable(references):
            columns[name] = [_against(name, t, list(r), language) for t, r in zip(texts, references, strict=True)]
    return columns


def corpus_metrics(
    texts: Texts, references: References, *, further: Collection[str] = (), language: str | None = None
) -> dict[str, float]:
    """Each metric of `CORPUS_METRICS`; those with a reference only where all items have one.

    further: names of `FURTHER_CORPUS_METRICS` beside them; language: as for `item_metrics`.
    """
    found: dict[str, float] = {}
    for name in _countable(references, further):
        counted = Counted.of(name, texts, references, language=language)
        found[name] = counted.of_sums(counted.rows.sum(0))
    if "self_bleu" in further:
        found["self_bleu"] = self_bleu(texts, language=language)
    return found | {"distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2)}


def corpus_shares(
    texts: Texts, references: References, *, further: Collection[str] = (), language: str | None = None
) -> dict[str, list[float]]:
    """What each text makes of each of the `corpus_metrics`, by `pseudo_values`; of all but self_bleu.

    With them a metric of all texts has the intervals of a mean over texts, also of differences of pairs.

    >>> shares = corpus_shares(["the cat sat on a mat", "a dog"], [["the cat sat on the mat"], ["a dog"]])
    >>> round(sum(shares["corpus_bleu"]) / 2, 2)  # their mean is the metric
    55.84
    """
    found = {}
    for name in _countable(references, further):
        counted = Counted.of(name, texts, references, language=language)
        sums = counted.rows.sum(0)
        found[name] = pseudo_values(counted.of_sums(sums), [counted.of_sums(sums - row) for row in counted.rows])
    return found | {f"distinct_{n}": distinct_shares(texts, n) for n in (1, 2)}


def pseudo_values(whole: float, without: Sequence[float]) -> list[float]:
    """What each of k texts makes of a metric: its jackknife pseudo-value, all moved so that their mean is the metric.

        whole + (k - 1) (mean of the metric without one text - the metric without this text)

    Efron & Stein 1981, https://doi.org/10.1214/aos/1176345462.

    >>> pseudo_values(2.0, [2.5, 1.5])  # without the first the metric would be higher
    [1.5, 2.5]
    """
    mean = fmean(without) if without else 0.0
    return [whole + (len(without) - 1) * (mean - one) for one in without]


@dataclass(frozen=True)
class Counted:
    """What sacrebleu counts in each text for a metric of all of them: of the sums over texts it makes the metric."""

    rows: Float[np.ndarray, "N C"]
    measure: Any

    @classmethod
    def of(cls, metric: str, texts: Texts, references: References, *, language: str | None = None) -> "Counted":
        """Of `metric`, one of `COUNTED`. Raises ConfigError if the package that cuts words of `language` is missing."""
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
        from sacrebleu.metrics.ter import TER

        deepest = max(map(len, references))
        # sacrebleu wants one list per reference number; a text with fewer references repeats its first.
        by_number = [[known[n] if n < len(known) else known[0] for known in references] for n in range(deepest)]
        with _dictionaries(metric):
            if metric == "corpus_bleu":
                measure: Any = BLEU(tokenize=bleu_tokenizer(language))
            else:
                measure = CHRF() if metric == "corpus_chrf" else TER(**_ter_settings(language))
            rows = measure._extract_corpus_statistics(list(texts), by_number)
        return cls(np.asarray(rows, dtype=float), measure)

    def of_sums(self, sums: Float[np.ndarray, " C"]) -> float:
        """The metric of texts whose rows add up to `sums`."""
        return float(self.measure._compute_score_from_stats(sums.tolist()).score)


COUNTED = ("corpus_bleu", "corpus_chrf", "corpus_ter")
"""What `Counted` knows."""


def _countable(references: References, further: Collection[str]) -> list[str]:
    """Those of `COUNTED` that are measured: all items need references."""
    asked = {*CORPUS_METRICS, *further}
    return [name for name in COUNTED if name in asked] if _comparable(references) else []


def _comparable(references: References) -> bool:
    if any(isinstance(known, str) for known in references):
        raise ValueError("references: expected a list of texts for each text, got a plain string")
    return bool(references) and all(references)


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


def distinct_shares(texts: Texts, n: int) -> list[float]:
    """What each text makes of `distinct`, by `pseudo_values`.

    >>> [round(share, 3) for share in distinct_shares(["a b a", "a c"], 1)]  # without the first 1, the second 2/3
    [0.433, 0.767]
    """
    grams = [Counter(_ngrams(text, n)) for text in texts]
    of_all = Counter[tuple[str, ...]]()
    for own in grams:
        of_all.update(own)
    different, total = len(of_all), of_all.total()
    without = []
    for own in grams:
        left, alone = total - own.total(), sum(count == of_all[gram] for gram, count in own.items())
        without.append((different - alone) / left if left else 0.0)
    return pseudo_values(different / total if total else 0.0, without)


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


_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+(?:[.,'’-][^\W{UNSPACED}]+)*")


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


def _sacrebleu(function: str, text: str, references: list[str], **settings: Any) -> float:
    """A metric of one text."""
    import sacrebleu

    with _dictionaries(function):
        return float(getattr(sacrebleu, function)(text, references, **settings).score)


@contextmanager
def _dictionaries(metric: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # how the tokenisers of sacrebleu say that the package of a dictionary is missing
        raise ConfigError(f"{metric}: {' '.join(str(error).split())}") from error


def bleu_tokenizer(language: str | None) -> str:
    """The tokeniser of sacrebleu for BLEU in a language (`zh`, `zh-CN`, `zho_Hans` ...).

    `zh` for Chinese, `ja-mecab` and `ko-mecab` for Japanese and Korean (which need `pip install 'sacrebleu[ja]'` or
    `[ko]`), `13a` for all others and for None, as sacrebleu itself chooses.

    >>> [bleu_tokenizer(name) for name in ("de", "zho_Hans", "ja", "ko-KR", None)]
    ['13a', 'zh', 'ja-mecab', 'ko-mecab', '13a']
    """
    return _TOKENIZERS.get(_base(language), "13a")


_TOKENIZERS = {
    "zh": "zh", "zho": "zh", "cmn": "zh", "yue": "zh", "ja": "ja-mecab", "jpn": "ja-mecab", "ko": "ko-mecab",
    "kor": "ko-mecab",
}  # fmt: skip


def _base(language: str | None) -> str:
    return re.split("[-_]", language or "")[0].lower()


def _ter_settings(language: str | None) -> dict[str, Any]:
    """Characters of Chinese and Japanese are words of TER, which Tercom otherwise takes a sentence of for one."""
    return dict.fromkeys(("normalized", "asian_support"), _TOKENIZERS.get(_base(language)) in ("zh", "ja-mecab"))


def _against(name: str, text: str, references: list[str], language: str | None) -> float:
    """One of the further metrics that compare with references."""
    if name == "ter":
        return _sacrebleu("sentence_ter", text, references, **_ter_settings(language))
    if name == "rouge_lsum":
        return float(max(_summary_scorer().score(known, text)["rougeLsum"].fmeasure for known in references))
    if name == "final_answer":
        return solves(text, references)
    return float(abstains(text) == any(map(abstains, references)))


@cache
def _summary_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"])


def fragments(text: str, source: str) -> list[int]:
    """Lengths, in words, of the pieces of `text` that are copied from `source`, each as long as it can be.

    From left to right, as Grusky et al. 2018 (https://aclanthology.org/N18-1065, fig. 3) define extractive fragments.

    >>> fragments("the cat sat on a mat", "A mat! The cat sat.")
    [3, 2]
    """
    said, read = words(text), words(source)
    places: dict[str, list[int]] = {}
    for place, word in enumerate(read):
        places.setdefault(word, []).append(place)
    found, at = list[int](), 0
    while at < len(said):
        longest = max((_common(said, at, read, place) for place in places.get(said[at], ())), default=0)
        found += [longest] if longest else []
        at += max(longest, 1)
    return found


def _common(one: Sequence[str], i: int, other: Sequence[str], j: int) -> int:
    length = 0
    while i + length < len(one) and j + length < len(other) and one[i + length] == other[j + length]:
        length += 1
    return length


def coverage(text: str, source: str) -> float:
    """Share of the words of `text` that are in a fragment copied from `source`; 0 without words."""
    return sum(fragments(text, source)) / max(len(words(text)), 1)


def density(text: str, source: str) -> float:
    """Mean length of the fragment that a word of `text` is copied in: long where whole sentences are.

    >>> density("the cat sat on a mat", "A mat! The cat sat.")  # (3² + 2²) / 6
    2.1666666666666665
    """
    return sum(length**2 for length in fragments(text, source)) / max(len(words(text)), 1)


def compression(text: str, source: str) -> float:
    """Words of `source` per word of `text`; 0 for a text without words."""
    said = len(words(text))
    return len(words(source)) / said if said else 0.0


_OF_SOURCE: dict[str, Callable[[str, str], float]] = {
    "coverage": coverage, "density": density, "compression": compression,
}  # fmt: skip
_OF_TEXT: dict[str, Callable[[str], float]] = {
    "abstained": lambda text: float(abstains(text)), "right_steps": right_steps,
}  # fmt: skip


MOST_ALIKE = 100
"""So many texts are compared with each other."""


def self_bleu(texts: Texts, *, language: str | None = None) -> float:
    """Mean BLEU (0 to 100) of each text against all others: high where texts are alike; 0 for a single one.

    Of the first `MOST_ALIKE` texts, since it takes their number squared. Zhu et al. 2018,
    https://arxiv.org/abs/1802.01886.
    """
    texts = texts[:MOST_ALIKE]
    if len(texts) < 2:
        return 0.0
    cut = {"tokenize": bleu_tokenizer(language)}
    scores = (_sacrebleu("sentence_bleu", t, [*texts[:k], *texts[k + 1 :]], **cut) for k, t in enumerate(texts))
    return fmean(scores)
