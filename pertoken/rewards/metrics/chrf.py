"""chrF and chrF++ of sacrebleu: character n-grams, and in chrF++ word n-grams as well."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan
from pertoken.rewards.metrics.base import (
    Granularity,
    MetricDelta,
    NgramMatches,
    Piece,
    PrefixScore,
    count_ngrams,
)


@dataclass(frozen=True)
class ChrF(MetricDelta):
    """Sentence chrF of sacrebleu as a fraction of 1 (chrF++ with word_order 2); the best of several references."""

    key = "chrf"
    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change, or the last with all."""
    char_order: int = 6
    """Longest n-grams of characters."""
    word_order: int = 0
    """Longest n-grams of words: 0 is chrF, 2 is chrF++."""
    beta: int = 2
    """How many times recall counts what precision does."""
    lowercase: bool = False
    """Ignore case."""
    whitespace: bool = False
    """White space counts as characters."""
    eps_smoothing: bool = False
    """Orders without n-grams count as almost 0, as in Moses and NLTK; else they are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.char_order < 1 or self.word_order < 0 or self.beta < 1:
            raise ConfigError(
                f"chrf: expected char_order >= 1, word_order >= 0, beta >= 1, got {self.char_order}, "
                f"{self.word_order}, {self.beta}"
            )

    def chunks(self, text: str) -> list[CharSpan]:
        whole_words = self.lowercase or self.word_order  # lower case, too, depends on neighbours in some scripts
        found = _WORD_OR_SPACE if whole_words else _CHARACTER
        return [m.span() for m in found.finditer(text) if self.whitespace or not m[0].isspace()]

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        """Its characters as strings, then its words as tuples."""
        chunk = chunk.lower() if self.lowercase else chunk
        characters = list(chunk) if self.whitespace else [c for c in chunk if not c.isspace()]
        return characters + [(word,) for part in chunk.split() if self.word_order for word in _words(part)]

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return _ChrFScore([self.text_pieces(text) for text in references], self)


_CHARACTER = re.compile(r".", re.DOTALL)
_WORD_OR_SPACE = re.compile(r"\s+|\S+")


def _words(part: str) -> list[str]:
    """A word without the punctuation mark at its end, or else at its beginning, which is a word of its own."""
    if len(part) > 1 and part[-1] in string.punctuation:
        return [part[:-1], part[-1]]
    if len(part) > 1 and part[0] in string.punctuation:
        return [part[0], part[1:]]
    return [part]


class _ChrFScore:
    """chrF against the best reference, from running counts of matched n-grams of characters and of words."""

    def __init__(self, references: Sequence[Sequence[Piece]], metric: ChrF) -> None:
        self._metric = metric
        self._orders = (range(1, metric.char_order + 1), range(1, metric.word_order + 1))
        streams = [
            [[p for p in pieces if isinstance(p, tuple) == words] for words in (False, True)] for pieces in references
        ]
        self._expected = [self._totals([len(characters), len(words)]) for characters, words in streams]
        self._ngrams = [
            NgramMatches([count_ngrams(of_reference[k], orders) for of_reference in streams], orders)
            for k, orders in enumerate(self._orders)
        ]
        self._pushed: list[NgramMatches] = []

    def push(self, piece: Piece) -> None:
        self._pushed.append(self._ngrams[isinstance(piece, tuple)])
        self._pushed[-1].push(piece)

    def pop(self) -> None:
        self._pushed.pop().pop()

    def value(self) -> float:
        given = self._totals([len(ngrams) for ngrams in self._ngrams])
        hits = ([h for ngrams in self._ngrams for h in ngrams.matches[k]] for k in range(len(self._expected)))
        beta, eps_smoothing = self._metric.beta, self._metric.eps_smoothing
        scores = (
            _f_score(found, given, expected, beta=beta, eps_smoothing=eps_smoothing)
            for found, expected in zip(hits, self._expected, strict=True)
        )
        return max(scores)

    def _totals(self, sizes: Sequence[int]) -> list[int]:
        """Number of n-grams of each order, of characters first, in lists of these sizes."""
        return [max(size - n + 1, 0) for size, orders in zip(sizes, self._orders, strict=True) for n in orders]


def _f_score(
    hits: Sequence[int], given: Sequence[int], expected: Sequence[int], *, beta: int, eps_smoothing: bool
) -> float:
    """F-beta of mean precision and recall over the orders that both sides have; or the mean of F-beta over all orders.

    hits, given, expected: n-grams in common, of the text, of the reference; one number per order.

    >>> round(_f_score([2, 0], [2, 1], [4, 3], beta=2, eps_smoothing=False), 4)
    0.2778
    """
    orders = [(hit, num if want else 0, want) for hit, num, want in zip(hits, given, expected, strict=True)]
    if eps_smoothing:
        means = [_f_beta(hit / num if num else _EPS, hit / want if want else _EPS, beta) for hit, num, want in orders]
        return sum(means) / len(means)
    shared = [(hit / num, hit / want) for hit, num, want in orders if num and want]
    if not any(precision for precision, _ in shared):
        return 0.0
    precisions, recalls = zip(*shared, strict=True)
    return _f_beta(sum(precisions) / len(shared), sum(recalls) / len(shared), beta)


_EPS = 1e-16


def _f_beta(precision: float, recall: float, beta: int) -> float:
    bottom = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / bottom if bottom else _EPS
