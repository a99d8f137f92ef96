"""TER of sacrebleu: edits between words, where a block that was moved counts as one edit.

The search for blocks starts anew with every word: over the prefixes of a long text it costs minutes, which is why it
is left to the whole text unless asked for.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from sacrebleu.metrics.lib_ter import translation_edit_rate
from sacrebleu.metrics.ter import TER

from pertoken.rewards.align import CharSpan
from pertoken.rewards.base import Sample
from pertoken.rewards.metrics.base import (
    Granularity,
    MetricDelta,
    Piece,
    PrefixScore,
    check_choice,
    references,
)

Shifts = Literal["last", "every"]


@dataclass(frozen=True)
class Ter(MetricDelta):
    """1 - sentence TER of sacrebleu (edits per reference word), the fewest edits to any of several references.

    The sum is TER("") - TER(text), where TER("") is 1 with a single reference: nothing written earns nothing, and
    more edits than words cost.
    """

    key = "ter"
    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change, or the last with all."""
    shifts: Shifts = "last"
    """When moved blocks count as one edit: with the last word of the text only (prefixes are compared by plain edit
    distance), or every: each prefix has its official TER, which is slow for long texts."""
    normalized: bool = False
    """Tokenise punctuation and undo XML escapes, as Tercom does."""
    no_punct: bool = False
    """Leave punctuation out."""
    asian_support: bool = False
    """With normalized: each Chinese or Japanese character is a word; with no_punct: their punctuation, too."""
    case_sensitive: bool = False
    """Tell capitals from small letters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ter.shifts", self.shifts, get_args(Shifts))

    @cached_property
    def _metric(self) -> TER:
        return TER(self.normalized, self.no_punct, self.asian_support, self.case_sensitive)

    def chunks(self, text: str) -> list[CharSpan]:
        found = _SPACED_OR_HYPHENATED if self.normalized else _SPACED
        return [match.span() for match in found.finditer(text)]

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        return str(self._metric.tokenizer(chunk.rstrip() if last else chunk)).split()

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        expected = [self._reference(text) for text in references]
        return _ShiftScore(expected) if self.shifts == "every" else _EditScore(expected)

    def _reference(self, text: str) -> list[str]:
        """Its words, tokenised twice: so does sacrebleu, and ".,5" becomes three words at the second time only."""
        return self.text_pieces(" ".join(self.text_pieces(text)))

    def paid_values(self, sample: Sample, ends: Sequence[int]) -> list[float]:
        values = self.prefix_values(sample, ends)
        if self.shifts == "every" or not sample.text:
            return values
        score = _ShiftScore([self._reference(text) for text in references(sample)])
        for word in self.text_pieces(sample.text):
            score.push(word)
        whole = score.value()
        return values[:1] + [
            whole if end == len(sample.text) else value for end, value in zip(ends, values[1:], strict=True)
        ]


_SPACED = re.compile(r"\S+")
# Tercom joins a line with the one before if it begins with "-", and only a plain space after "'s" makes that a word.
_SPACED_OR_HYPHENATED = re.compile(r"(?:\S|\n(?=-))(?:[^ \n]|\n(?=-))*")


def _rate(edits: Sequence[int], references: Sequence[Sequence[str]]) -> float:
    """1 - TER: the fewest edits per word of a reference of mean length."""
    length = sum(map(len, references)) / len(references)
    return 1.0 - (min(edits) / length if length else float(min(edits) > 0))


class _ShiftScore:
    """1 - TER of a list of words by sacrebleu itself, searched from the beginning each time."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._references = [list(words) for words in references]
        self._words: list[str] = []

    def push(self, word: str) -> None:
        self._words.append(word)

    def pop(self) -> None:
        self._words.pop()

    def value(self) -> float:
        edits = [translation_edit_rate(self._words, words)[0] for words in self._references]
        return _rate(edits, self._references)


class _EditScore:
    """1 - edits per reference word, without moved blocks: a row of the table of edit distances per word."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._references = references
        self._rows = [[list(range(len(words) + 1)) for words in references]]

    def push(self, word: str) -> None:
        self._rows.append(
            [_next_row(row, word, words) for row, words in zip(self._rows[-1], self._references, strict=True)]
        )

    def pop(self) -> None:
        self._rows.pop()

    def value(self) -> float:
        return _rate([row[-1] for row in self._rows[-1]], self._references)


def _next_row(row: Sequence[int], word: str, reference: Sequence[str]) -> list[int]:
    """Edit distances of one word more to each beginning of the reference.

    >>> _next_row([0, 1, 2], "b", ["a", "b"])
    [1, 1, 1]
    """
    new = [row[0] + 1]
    for k, expected in enumerate(reference):
        new.append(min(row[k] + (word != expected), row[k + 1] + 1, new[k] + 1))
    return new
