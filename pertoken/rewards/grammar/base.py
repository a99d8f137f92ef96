"""What the grammar rewards share: categories and their weights, and what is never punished.

A checker knows prose. Code, addresses, numbers and names are not prose: a finding that touches one of them is dropped,
whoever made it. A checker takes a text for whole, too. Where the limit of tokens cut a completion off, it is no mistake
that a quotation is open and a word half written; punished for it, a policy learns not to let anyone speak.
"""

import math
import re
from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan, word_spans
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.types import CUT_OFF


@dataclass(frozen=True)
class Finding:
    """Characters `[start, stop)` of a text that a checker objects to."""

    start: int
    stop: int
    category: str
    message: str
    weight: float = 1.0
    """How bad it is beside others of its category."""


@dataclass(frozen=True)
class GrammarReward(SampleReward):
    """A cost on each finding of a checker, shared by the tokens of its characters."""

    cost: float = 1.0
    """Per finding of weight 1."""
    weights: Mapping[str, float | int] | None = None
    """How much a category counts, by its name; 0 ignores it."""
    normalised: bool = False
    """Cost per 100 words: findings are divided by words / 100, so that saying less is no way to pay less."""
    protect: bool = True
    """Drop findings on code, addresses, numbers, and misspellings that are names."""

    default_weights: ClassVar[Mapping[str, float]] = {}
    """Of categories that do not count 1; `weights` comes before them."""
    spelling: ClassVar[frozenset[str]] = frozenset()
    """Categories that object to words as such: names are no mistakes there."""

    def __post_init__(self) -> None:
        for category, weight in (self.weights or {}).items():
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise ConfigError(f"{self.name}.weights.{category}: expected a number, got {weight!r}")

    @abstractmethod
    def check(self, text: str) -> list[Finding]:
        """What the checker finds in a text."""

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """What is punished in a completion, and by how much."""
        cut = sample.stop in CUT_OFF
        found = self.check(_closed(sample.text) if cut else sample.text) if sample.text.strip() else []
        if cut:
            end = _HALF_WRITTEN.search(sample.text)
            found = [each for each in found if each.stop <= (end.start() if end else len(sample.text))]
        if self.protect and found:
            found = self._on_prose(found, sample)
        weights = {**self.default_weights, **(self.weights or {})}
        price = self.cost
        if self.normalised:
            price *= 100 / max(len(word_spans(sample.text)), 1)
        return [
            ScoredSpan(each.start, each.stop, -price * value, f"{each.category}: {each.message}")
            for each in found
            if (value := each.weight * weights.get(each.category, 1.0))
        ]

    def token_values(self, sample: Sample) -> list[float]:
        spans = self.findings(sample)
        return place_spans(spans, sample) if sample.tokens else []

    def _on_prose(self, found: list[Finding], sample: Sample) -> list[Finding]:
        spans = protected_spans(sample.text)
        known = _names([sample.text]) | _words(_given_texts(sample))
        return [
            each
            for each in found
            if not _touches(spans, each.start, each.stop)
            and not (each.category in self.spelling and _core(sample.text[each.start : each.stop]) in known)
        ]


_HALF_WRITTEN = re.compile(r"[\w'’-]*\w\Z")
"""The last word of a text that no mark ends."""
_CLOSING = {pair[0]: pair[1] for pair in ("()", "[]", "“”", "„“", "«»", "‘’", "（）", "「」", "『』", "《》", "【】")}
"""By the mark that opens; one that closes what is open opens nothing."""


def _closed(text: str) -> str:
    """A text that was cut off, with marks behind it that close what it left open.

    >>> _closed('She said (softly): "Who is'), _closed("Sie sagte „ja“ und „ne")
    ('She said (softly): "Who is"', 'Sie sagte „ja“ und „ne“')
    """
    left = list[str]()
    for mark in text:
        if left and mark == left[-1]:
            left.pop()
        elif mark == '"':
            left.append(mark)
        elif mark in _CLOSING:
            left.append(_CLOSING[mark])
    return text + "".join(reversed(left))


_PROTECTED = re.compile(
    r"""
    ^(?P<fence>```+|~~~+)[\s\S]*?(?:^(?P=fence)[^\S\n]*$|\Z)      # fenced code, closed or cut off
    | (?P<ticks>`+)[^`\n](?:[^\n]*?[^`\n])??(?P=ticks)(?!`)       # code in a line
    | \b(?:https?|ftp)://\S+ | \bwww\.\S+                         # addresses
    | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | (?<![\w/])~?(?:/[\w.-]+){2,}/?                              # paths
    | (?<![A-Za-z0-9_.])(?:                                       # identifiers, and calls
        [A-Za-z_][A-Za-z0-9_.]*\([^()\n]*\) | [A-Za-z_][A-Za-z0-9]*(?:_[A-Za-z0-9]+)+ | [a-z]+[A-Z][A-Za-z0-9]*
        | [A-Za-z_][A-Za-z0-9]*(?:\.[a-z_][A-Za-z0-9_]+)+ )
    | [$€£¥]?[A-Za-z]*\d[A-Za-z0-9]*(?:[.,:/-]\d[A-Za-z0-9]*)*%?  # numbers, and what contains one
    """,
    re.VERBOSE | re.MULTILINE,
)


def protected_spans(text: str) -> list[CharSpan]:
    """Character ranges that are not prose: code, addresses, paths, identifiers, numbers.

    >>> text = "Run `ls` on 3.5 kg of foo_bar at http://a.b/c now"
    >>> [text[start:stop] for start, stop in protected_spans(text)]
    ['`ls`', '3.5', 'foo_bar', 'http://a.b/c']
    """
    return [match.span() for match in _PROTECTED.finditer(text)]


def _touches(spans: list[CharSpan], start: int, stop: int) -> bool:
    """Whether a range shares a character with one of the spans, which are in order and apart from one another."""
    k = bisect_left(spans, start + 1, key=lambda span: span[1])
    return k < len(spans) and spans[k][0] < max(stop, start + 1)


# A capital that no beginning of a sentence, line, quotation or bracket explains.
_NAME = re.compile(r"(?<=[\w,;] )[A-Z\u00c0-\u00de][\w'’-]+")


def _names(texts: Iterable[str]) -> set[str]:
    return {_core(word) for text in texts for word in _NAME.findall(text)}


def _words(texts: Iterable[str]) -> set[str]:
    return {_core(text[start:stop]) for text in texts for start, stop in word_spans(text)}


def _given_texts(sample: Sample) -> list[str]:
    """Prompt and references: their spelling is not the policy's."""
    prompt: Any = sample.item.prompt
    given = [prompt] if isinstance(prompt, str) else [str(message.get("content", "")) for message in prompt]
    listed = sample.item.info.get("references")
    return given + [sample.reference or ""] + [text for text in listed or [] if isinstance(text, str)]


def _core(word: str) -> str:
    """A word without a genitive."""
    return re.sub(r"['’]s?$", "", word.strip())
