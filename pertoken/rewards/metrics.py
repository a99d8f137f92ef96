"""Text metrics paid out token by token: each token earns the change that it makes to the score.

    r_t = m(text up to token t) - m(text up to token t-1)          sum_t r_t = m(whole text) - m("")

`m` is the official sentence score (rouge-score, sacrebleu), tokenisation included, so the sum over the tokens is
the figure that an evaluation reports. With gamma = 1 this is the final score as a reward, shaped by the potential
m(prefix): the policy gradient is the same, its variance is lower (Ng, Harada & Russell 1999; Bahdanau et al. 2017,
https://arxiv.org/abs/1607.07086). With gamma < 1 it is not: plain differences then also reward haste.

Cost per completion of W words against a reference of R: ROUGE-L takes W big-integer steps on R bits; BLEU counts
the n-grams of new words only, but sacrebleu's tokeniser reads each prefix anew (it may change its mind about the
last word), which is quadratic in the characters: one prefix per word, or per token with granularity "token".
"""

import re
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from rouge_score.scoring import fmeasure
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from pertoken.errors import ConfigError, RewardError, closest
from pertoken.rewards.align import CharSpan, spread, word_spans
from pertoken.rewards.base import Sample, SampleReward

Granularity = Literal["word", "token"]
Smoothing = Literal["exp", "floor", "add-k", "none"]


@runtime_checkable
class PrefixScore(Protocol):
    """The score of a list of words that grows and shrinks at its end."""

    def push(self, word: str) -> None: ...
    def pop(self) -> None: ...
    def value(self) -> float: ...


class MetricDelta(SampleReward):
    """A metric of the text against references, paid out as differences between prefixes.

    word: the change that a completed word makes is split evenly over the tokens of that word, so a word earns the
    same however it is cut into pieces. token: each token earns the change between the real texts before and after
    it, half-written words included. Both sum to the same score. Special tokens earn 0.
    """

    granularity: Granularity

    @abstractmethod
    def word_spans(self, text: str) -> list[CharSpan]:
        """Character ranges of the words, whose tokens share the credit."""

    @abstractmethod
    def prefix_words(self, text: str, ends: Sequence[int]) -> Iterable[list[str]]:
        """The words of `text[:end]` for each of the ascending `ends`, as the official metric tokenises them."""

    @abstractmethod
    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        """The score of no words yet."""

    def token_values(self, sample: Sample) -> list[float]:
        score = self.prefix_score(references(sample))
        if self.granularity == "token":
            return self._changes(sample.text, sample.aligned.completed(), score)
        words = self.word_spans(sample.text)
        ends = [stop for _, stop in words[:-1]] + [len(sample.text)] * bool(words)  # the last closes with the text
        values = [0.0] * len(sample.tokens)
        for (start, stop), change in zip(words, self._changes(sample.text, ends, score), strict=True):
            for token, share in spread(sample.aligned, start, stop, change):
                values[token] += share
        return values

    def _changes(self, text: str, ends: Sequence[int], score: PrefixScore) -> list[float]:
        """Change of the score from each prefix of the text to the next, starting from the empty one."""
        changes: list[float] = []
        pushed: list[str] = []
        last = score.value()
        for words in self.prefix_words(text, ends):
            common = min(len(pushed), len(words))
            while pushed[:common] != words[:common]:
                common -= 1
            for _ in pushed[common:]:
                score.pop()
            for word in words[common:]:
                score.push(word)
            pushed, value = words, score.value()
            changes.append(value - last)
            last = value
        return changes


def references(sample: Sample) -> list[str]:
    """The reference texts of a sample: `item.info["references"]` if present, else its answer."""
    given: Any = sample.item.info.get("references")
    if given is None and sample.reference is not None:
        return [sample.reference]
    if not given or isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise RewardError(
            f"item {sample.item.id!r} has no reference to compare with (answer is None, info['references'] is "
            f"{given!r}); expected an answer or a list of strings: name the column in the task, or drop this reward"
        )
    return list(given)


@dataclass(frozen=True)
class RougeL(MetricDelta):
    """ROUGE-L F1 of rouge-score (longest common subsequence of words); the best of several references."""

    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change."""
    stemmer: bool = False
    """Compare Porter stems, as `use_stemmer` of rouge-score."""

    def __post_init__(self) -> None:
        _check("rouge_l.granularity", self.granularity, get_args(Granularity))

    def word_spans(self, text: str) -> list[CharSpan]:
        return [match.span() for match in _ROUGE_WORD.finditer(text)]

    def prefix_words(self, text: str, ends: Sequence[int]) -> Iterable[list[str]]:
        # rouge-score decides character by character, so a prefix has the words of the text, the last one cut off.
        spans = self.word_spans(text)
        words = [_rouge_word(text[start:stop], self.stemmer) for start, stop in spans]
        for end in ends:
            whole = bisect_right(spans, end, key=lambda span: span[1])
            begun = whole < len(spans) and spans[whole][0] < end
            yield words[:whole] + ([_rouge_word(text[spans[whole][0] : end], self.stemmer)] if begun else [])

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        tokenizer = DefaultTokenizer(self.stemmer)
        return _LcsScore([tokenizer.tokenize(text) for text in references])


@dataclass(frozen=True)
class Bleu(MetricDelta):
    """Sentence BLEU of sacrebleu as a fraction of 1 (up to 4-grams, effective order), several references natively."""

    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change."""
    smooth_method: Smoothing = "exp"
    """What stands in for n-gram orders without a match: exp (sacrebleu's default), floor, add-k, none."""
    smooth_value: float | None = None
    """Parameter of floor (default 0.1) and add-k (default 1)."""
    tokenize: str = "13a"
    """Tokeniser of sacrebleu: 13a, intl, zh, char, none, ... (some need further packages)."""
    lowercase: bool = False
    """Ignore case."""

    def __post_init__(self) -> None:
        _check("bleu.granularity", self.granularity, get_args(Granularity))
        _check("bleu.smooth_method", self.smooth_method, get_args(Smoothing))
        _check("bleu.tokenize", self.tokenize, BLEU.TOKENIZERS)

    @cached_property
    def _metric(self) -> BLEU:
        return BLEU(self.lowercase, tokenize=self.tokenize, smooth_method=self.smooth_method, effective_order=True)

    def _words(self, text: str) -> list[str]:
        prepared = (text.lower() if self.lowercase else text).rstrip()
        return str(self._metric.tokenizer(prepared)).split()

    def word_spans(self, text: str) -> list[CharSpan]:
        return word_spans(text, marks=True)

    def prefix_words(self, text: str, ends: Sequence[int]) -> Iterable[list[str]]:
        return (self._words(text[:end]) for end in ends)

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return _NgramScore([self._words(text) for text in references], self.smooth_method, self.smooth_value)


def _check(where: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"{where}: unknown value {value!r}; {closest(value, known)}")


# The two letters beyond ASCII whose lower case begins with an ASCII letter: the Kelvin sign, and the dotted capital I,
# which becomes "i" and a combining dot that ends the word.
_ROUGE_WORD = re.compile("[A-Za-z0-9\u212a]+\u0130?|\u0130")


@lru_cache(maxsize=1 << 16)
def _rouge_word(characters: str, stemmer: bool) -> str:
    """What rouge-score makes of the characters of one word: lower case, stemmed if asked for."""
    return str(DefaultTokenizer(stemmer).tokenize(characters)[0])


class _LcsScore:
    """ROUGE-L F1 against the best reference; each word costs a few operations on integers of |reference| bits.

    A row of the table of longest common subsequences rises by 0 or 1 from cell to cell, so it fits into one integer
    whose zero bits mark the rises. Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._full = [(1 << len(words)) - 1 for words in references]
        self._places: list[Counter[str]] = [Counter() for _ in references]
        for places, words in zip(self._places, references, strict=True):
            for position, word in enumerate(words):
                places[word] |= 1 << position
        self._rows = [self._full]

    def push(self, word: str) -> None:
        row: list[int] = []
        for flat, places, full in zip(self._rows[-1], self._places, self._full, strict=True):
            hits = flat & places[word]
            row.append(((flat + hits) | (flat - hits)) & full)
        self._rows.append(row)

    def pop(self) -> None:
        self._rows.pop()

    def value(self) -> float:
        return max(map(self._f1, self._rows[-1], self._full))

    def _f1(self, row: int, full: int) -> float:
        common, num_words, num_expected = (row ^ full).bit_count(), len(self._rows) - 1, full.bit_length()
        return float(fmeasure(common / num_words, common / num_expected)) if common else 0.0


class _NgramScore:
    """Sentence BLEU of a list of words from running counts of matched n-grams, as a fraction of 1."""

    def __init__(self, references: Sequence[Sequence[str]], smooth_method: str, smooth_value: float | None) -> None:
        self._smooth_method, self._smooth_value = smooth_method, smooth_value
        self._lengths = [len(words) for words in references]
        self._allowed: Counter[tuple[str, ...]] = Counter()
        for words in references:
            self._allowed |= extract_all_word_ngrams(" ".join(words), 1, MAX_NGRAM_ORDER)[0]
        self._words: list[str] = []
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._matches = [0] * MAX_NGRAM_ORDER

    def push(self, word: str) -> None:
        self._words.append(word)
        for ngram in self._last_ngrams():
            self._counts[ngram] += 1
            self._matches[len(ngram) - 1] += self._counts[ngram] <= self._allowed[ngram]

    def pop(self) -> None:
        for ngram in self._last_ngrams():
            self._matches[len(ngram) - 1] -= self._counts[ngram] <= self._allowed[ngram]
            self._counts[ngram] -= 1
        self._words.pop()

    def value(self) -> float:
        size = len(self._words)
        score = BLEU.compute_bleu(
            correct=list(self._matches),
            total=[max(size - n, 0) for n in range(MAX_NGRAM_ORDER)],
            sys_len=size,
            ref_len=min(self._lengths, key=lambda length: (abs(size - length), length)),
            smooth_method=self._smooth_method,
            smooth_value=self._smooth_value,
            effective_order=True,
        )
        return float(score.score) / 100

    def _last_ngrams(self) -> list[tuple[str, ...]]:
        tail = tuple(self._words[-MAX_NGRAM_ORDER:])
        return [tail[n:] for n in range(len(tail))]
