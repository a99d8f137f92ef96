"""ROUGE of rouge-score: words in common, pairs of words in common, longest common subsequences."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rouge_score.scoring import fmeasure
from rouge_score.tokenize import tokenize

from pertoken.rewards.align import CharSpan
from pertoken.rewards.metrics.base import (
    Granularity,
    MetricDelta,
    NgramMatches,
    Piece,
    PrefixScore,
    count_ngrams,
    porter_stemmer,
)

# The two letters beyond ASCII whose lower case begins with an ASCII letter: the Kelvin sign, and the dotted capital I,
# which becomes "i" and a combining dot that ends the word.
_WORD = re.compile("[A-Za-z0-9\u212a]+\u0130?|\u0130")
_WORD_OR_LINE = re.compile(f"{_WORD.pattern}|\n")


@dataclass(frozen=True)
class _Rouge(MetricDelta):
    """What the variants share: rouge-score's words, and the best of several references."""

    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change, or the last with all."""
    stemmer: bool = False
    """Compare Porter stems, as `use_stemmer` of rouge-score."""

    def warm_up(self) -> None:
        _stem("warm", self.stemmer)

    def word_spans(self, text: str) -> list[CharSpan]:
        return [match.span() for match in _WORD.finditer(text)]

    def chunks(self, text: str) -> list[CharSpan]:
        return self.word_spans(text)

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        return [_stem(chunk, self.stemmer)]


@lru_cache(maxsize=1 << 16)
def _stem(characters: str, stemmer: bool) -> str:
    """What rouge-score makes of the characters of one word: lower case, stemmed if asked for."""
    return str(tokenize(characters, porter_stemmer() if stemmer else None)[0])


@dataclass(frozen=True)
class Rouge1(_Rouge):
    """ROUGE-1 F1 of rouge-score (words in common); the best of several references."""

    key = "rouge_1"

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return OverlapScore([self.text_pieces(text) for text in references], 1)


@dataclass(frozen=True)
class Rouge2(_Rouge):
    """ROUGE-2 F1 of rouge-score (pairs of neighbouring words in common); the best of several references."""

    key = "rouge_2"

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return OverlapScore([self.text_pieces(text) for text in references], 2)


@dataclass(frozen=True)
class RougeL(_Rouge):
    """ROUGE-L F1 of rouge-score (longest common subsequence of words); the best of several references."""

    key = "rouge_l"

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return _LcsScore([self.text_pieces(text) for text in references])


@dataclass(frozen=True)
class RougeLsum(_Rouge):
    """ROUGE-Lsum F1 of rouge-score (common subsequences of each pair of lines, united); the best of several references.

    A line break ends a sentence, as rouge-score has it by default.
    """

    key = "rouge_lsum"

    def chunks(self, text: str) -> list[CharSpan]:
        return [match.span() for match in _WORD_OR_LINE.finditer(text)]

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        return ["\n"] if chunk == "\n" else super().pieces(chunk, first=first, last=last)

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return _SummaryScore([self.text_pieces(text) for text in references])


def _f1(hits: int, num_words: int, num_expected: int) -> float:
    return float(fmeasure(hits / num_words, hits / num_expected)) if hits else 0.0


class OverlapScore:
    """F1 of the n-grams in common with the best reference, from running counts."""

    def __init__(self, references: Sequence[Sequence[str]], n: int) -> None:
        self._n = n
        self._expected = [max(len(words) - n + 1, 0) for words in references]
        self._ngrams = NgramMatches([count_ngrams(words, [n]) for words in references], [n])
        self.push, self.pop = self._ngrams.push, self._ngrams.pop

    def value(self) -> float:
        size = len(self._ngrams) - self._n + 1
        hits = (matches for (matches,) in self._ngrams.matches)
        return max(_f1(hit, size, expected) for hit, expected in zip(hits, self._expected, strict=True))


class _Sequence:
    """Longest common subsequences of one list of words with others, in bits.

    A row of the table of their lengths rises by 0 or 1 from cell to cell, so it fits into one integer whose zero
    bits mark the rises. Hyyro 2004, "Bit-parallel LCS-length computation revisited".
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.full = (1 << len(words)) - 1
        self.places: dict[str, int] = {}
        for position, word in enumerate(words):
            self.places[word] = self.places.get(word, 0) | 1 << position

    def next_row(self, row: int, word: str) -> int:
        """The row after one more word of the other list; the first one is `full`."""
        hits = row & self.places.get(word, 0)
        return ((row + hits) | (row - hits)) & self.full

    def length(self, row: int) -> int:
        return (row ^ self.full).bit_count()

    def chosen(self, words: Sequence[str], rows: Sequence[int]) -> int:
        """The places, as bits, of the very subsequence that rouge-score reads off the table; `rows` has `full` first.

        From the corner: a match is taken, else the way goes to the side with the longer subsequence.
        """
        found, i, j = 0, self.full.bit_length(), len(words)
        rises = [row ^ self.full for row in rows]
        while i and j:
            here = 1 << (i - 1)
            if self.places.get(words[j - 1], 0) & here:
                found |= here
                i, j = i - 1, j - 1
            elif (rises[j - 1] & (2 * here - 1)).bit_count() > (rises[j] & (here - 1)).bit_count():
                j -= 1
            else:
                i -= 1
        return found


class _LcsScore:
    """ROUGE-L F1 against the best reference; each word costs a few operations on integers of |reference| bits."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._references = [_Sequence(words) for words in references]
        self._rows = [[reference.full for reference in self._references]]

    def push(self, word: str) -> None:
        rows = zip(self._references, self._rows[-1], strict=True)
        self._rows.append([reference.next_row(row, word) for reference, row in rows])

    def pop(self) -> None:
        self._rows.pop()

    def value(self) -> float:
        size, rows = len(self._rows) - 1, zip(self._references, self._rows[-1], strict=True)
        return max(_f1(ref.length(row), size, ref.full.bit_length()) for ref, row in rows)


class _SummaryScore:
    """ROUGE-Lsum F1 against the best reference; a piece "\\n" ends a sentence.

    Each sentence of a reference is compared with each sentence of the text, and the words on any of the common
    subsequences are hits, none more often than the text has it. Finished sentences are settled: a word more costs one
    row and one walk through the table of its own sentence.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._references = [[_Sequence(words) for words in _sentences(pieces)] for pieces in references]
        self._expected = [sum(piece != "\n" for piece in pieces) for pieces in references]
        self._all = [sentence for sentences in self._references for sentence in sentences]
        self._counts: Counter[str] = Counter()
        self._open = [_OpenSentence([], [[sentence.full for sentence in self._all]], [0] * len(self._all))]

    def push(self, piece: str) -> None:
        sentence = self._open[-1]
        if piece == "\n":
            self._open.append(_OpenSentence([], sentence.rows[:1], self._hits()))
            return
        self._counts[piece] += 1
        sentence.words.append(piece)
        rows = zip(self._all, sentence.rows[-1], strict=True)
        sentence.rows.append([reference.next_row(row, piece) for reference, row in rows])

    def pop(self) -> None:
        sentence = self._open[-1]
        if sentence.words:
            self._counts[sentence.words.pop()] -= 1
            sentence.rows.pop()
        else:
            self._open.pop()

    def _hits(self) -> list[int]:
        """For each sentence of the references, the places that a subsequence has touched so far."""
        words, rows, settled = (sentence := self._open[-1]).words, sentence.rows, sentence.settled
        if not words:
            return settled
        columns = zip(*rows, strict=True)
        return [
            before | reference.chosen(words, column)
            for before, reference, column in zip(settled, self._all, columns, strict=True)
        ]

    def value(self) -> float:
        size, places = self._counts.total(), iter(self._hits())
        scores = []
        for sentences, expected in zip(self._references, self._expected, strict=True):
            found: Counter[str] = Counter()
            for sentence, hits in zip(sentences, places, strict=False):
                found.update({word: (bits & hits).bit_count() for word, bits in sentence.places.items() if bits & hits})
            scores.append(_f1((found & self._counts).total(), size, expected))
        return max(scores)


@dataclass
class _OpenSentence:
    """The sentence that is being written: its words, a row per word, and the hits of the sentences before it."""

    words: list[str]
    rows: list[list[int]]
    settled: list[int]


def _sentences(pieces: Sequence[str]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for piece in pieces:
        if piece == "\n":
            found.append([])
        else:
            found[-1].append(piece)
    return [words for words in found if words]
