"""BLEU of sacrebleu.

Its tokenisers are lists of substitutions that look one character around, so what stands between two spaces is
tokenised apart from the rest; the exceptions are a hyphen at the end of a line, which `13a` joins with the next one,
and the beginning and end of the text, which `zh` and `intl` do not pad. Tokenisers that need a dictionary or a model
see each prefix anew.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan
from pertoken.rewards.metrics.base import (
    Granularity,
    MetricDelta,
    Ngram,
    NgramMatches,
    Piece,
    PrefixScore,
    check_choice,
    count_ngrams,
)

Smoothing = Literal["exp", "floor", "add-k", "none"]

ORDERS = range(1, MAX_NGRAM_ORDER + 1)


@dataclass(frozen=True)
class Bleu(MetricDelta):
    """Sentence BLEU of sacrebleu as a fraction of 1 (up to 4-grams, effective order), several references natively."""

    key = "bleu"
    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change, or the last with all."""
    smooth_method: Smoothing = "exp"
    """What stands in for n-gram orders without a match: exp (sacrebleu's default), floor, add-k, none."""
    smooth_value: float | None = None
    """Parameter of floor (default 0.1) and add-k (default 1)."""
    tokenize: str = "13a"
    """Tokeniser of sacrebleu: 13a, intl, zh, char, none, ... (some need further packages)."""
    lowercase: bool = False
    """Ignore case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("bleu.smooth_method", self.smooth_method, get_args(Smoothing))
        check_choice("bleu.tokenize", self.tokenize, BLEU.TOKENIZERS)
        try:
            _ = self._metric
        except (RuntimeError, ImportError, OSError) as error:
            raise ConfigError(f"bleu.tokenize: {self.tokenize!r} {' '.join(str(error).split())}") from error

    @cached_property
    def _metric(self) -> BLEU:
        return BLEU(self.lowercase, tokenize=self.tokenize, smooth_method=self.smooth_method, effective_order=True)

    def chunks(self, text: str) -> list[CharSpan]:
        match self.tokenize:
            case "13a":
                found = _SPACED_OR_HYPHENATED
            case "intl":
                found = _SPACED_OR_INDENTED
            case "none":
                found = _SPACED
            case "char":
                found = _SPACED if self.lowercase else _CHARACTER  # lower case may depend on the neighbours
            case "zh":
                return _chinese_chunks(text) if not self.lowercase else [m.span() for m in _SPACED.finditer(text)]
            case _:
                return [(0, len(text))] if text else []
        return [match.span() for match in found.finditer(text)]

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        chunk = chunk.lower() if self.lowercase else chunk
        chunk = chunk.rstrip() if last else chunk
        if self.tokenize == "zh":  # a Chinese character is the only neighbour that it does not take off again
            before, after = "" if first else "一", "" if last else "一"
            words = str(self._metric.tokenizer(before + chunk + after)).split()
            return words[len(before) : len(words) - len(after)]
        if self.tokenize == "intl":
            chunk = ("" if first else " ") + chunk + ("" if last else " ")
        return str(self._metric.tokenizer(chunk)).split()

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return BleuScore([self.text_pieces(text) for text in references], self.smooth_method, self.smooth_value)


_CHARACTER = re.compile(r"\S")
_SPACED = re.compile(r"\S+")
_SPACED_OR_HYPHENATED = re.compile(r"(?:\S|(?<=[->])\n)+")  # "-<skipped>\n" is a hyphen at the end of a line as well
_SPACED_OR_INDENTED = re.compile(r"\A\s+\S*|\S+")


def _chinese_chunks(text: str) -> list[CharSpan]:
    """Each character that sacrebleu takes for Chinese, and what stands between them and white space."""
    found: list[CharSpan] = []
    joins = False
    for k, character in enumerate(text):
        alone = TokenizerZh._is_chinese_char(character)
        if character.isspace():
            joins = False
        elif joins and not alone:
            found[-1] = (found[-1][0], k + 1)
        else:
            found.append((k, k + 1))
            joins = not alone
    return found


class BleuScore:
    """Sentence BLEU of a list of words from running counts of matched n-grams, as a fraction of 1."""

    def __init__(self, references: Sequence[Sequence[str]], smooth_method: str, smooth_value: float | None) -> None:
        self._smooth_method, self._smooth_value = smooth_method, smooth_value
        self._lengths = [len(words) for words in references]
        allowed: Counter[Ngram] = Counter()
        for words in references:
            allowed |= count_ngrams(words, ORDERS)
        self._ngrams = NgramMatches([allowed], ORDERS)
        self.push, self.pop = self._ngrams.push, self._ngrams.pop

    def value(self) -> float:
        size = len(self._ngrams)
        score = BLEU.compute_bleu(
            correct=list(self._ngrams.matches[0]),
            total=[max(size - n + 1, 0) for n in ORDERS],
            sys_len=size,
            ref_len=min(self._lengths, key=lambda length: (abs(size - length), length)),
            smooth_method=self._smooth_method,
            smooth_value=self._smooth_value,
            effective_order=True,
        )
        return float(score.score) / 100
