"""How easy English is to read: the formulas of Flesch, sentence by sentence, kept within a band."""

import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan, sentence_spans, word_spans
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.metrics.base import check_choice

Measure = Literal["grade", "ease"]


@dataclass(frozen=True)
class Readability(SampleReward):
    """A cost on each sentence of English whose Flesch measure lies outside of a band, shared by its tokens.

    A sentence pays `cost` x its distance to the band x its share of the words, so the text pays the mean distance over
    its words and length is free. What has no Latin letters is no word here, and a sentence without words pays nothing.
    """

    measure: Measure = "grade"
    """grade: Flesch-Kincaid, years of school, 0.39 words + 11.8 syllables / words - 15.59; ease: Flesch reading ease,
    206.835 - 1.015 words - 84.6 syllables / words, about 0 (hard) to 100 (easy)."""
    least: float | None = None
    """Lower end of the band; null: none."""
    most: float | None = None
    """Upper end of the band; null: none."""
    cost: float = 0.1
    """Per point outside of the band; a grade is about six points of ease."""

    def __post_init__(self) -> None:
        check_choice("readability.measure", self.measure, get_args(Measure))
        if self.least is None and self.most is None:
            raise ConfigError("readability: nothing to reward; set least or most, for instance most: 8 (a grade)")
        if self._least > self._most:
            raise ConfigError(f"readability: expected least <= most, got {self.least} and {self.most}")

    @property
    def _least(self) -> float:
        return -math.inf if self.least is None else self.least

    @property
    def _most(self) -> float:
        return math.inf if self.most is None else self.most

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span per sentence outside of the band."""
        sentences = list(_sentences(sample.text))
        all_words = sum(len(words) for _, words in sentences)
        found = []
        for (start, stop), words in sentences:
            level = flesch(self.measure, len(words), sum(map(syllables, words)))
            distance = max(self._least - level, level - self._most, 0.0)
            if distance:
                side = "below" if level < self._least else "above"
                paid = -self.cost * distance * len(words) / all_words
                found.append(ScoredSpan(start, stop, paid, f"{self.measure} {level:.1f} is {side} the band"))
        return found

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)


def flesch(measure: Measure, num_words: int, num_syllables: int) -> float:
    """The measure of one sentence (Flesch 1948; Kincaid et al. 1975).

    >>> round(flesch("ease", 6, 6), 3), round(flesch("grade", 6, 6), 3)  # The cat sat on the mat.
    (116.145, -1.45)
    """
    per_word = num_syllables / num_words
    if measure == "ease":
        return 206.835 - 1.015 * num_words - 84.6 * per_word
    return 0.39 * num_words + 11.8 * per_word - 15.59


_LATIN = re.compile(r"[^\W\d_]")


def _sentences(text: str) -> Iterator[tuple[CharSpan, list[str]]]:
    """The sentences that have words, from their first word to their end, and those words."""
    words = [span for span in word_spans(text) if _is_latin(text[span[0] : span[1]])]
    next_word = 0
    for _, stop in sentence_spans(text):
        inside = []
        while next_word < len(words) and words[next_word][0] < stop:
            inside.append(words[next_word])
            next_word += 1
        if inside:
            yield (inside[0][0], stop), [text[first:last] for first, last in inside]


def _is_latin(word: str) -> bool:
    return any("LATIN" in unicodedata.name(letter, "") for letter in _LATIN.findall(word))


_GROUP = re.compile("[aeiouy]+")
_TWO_VOWELS = re.compile(
    "(?<![tscgx])i[aou]|(?<=[tscgx])i(?=a[^nl]|o[^nu])|eo|(?<![gq])ua|[aeiouy]i(?=ng)|ism$|iet|uou"
    "|rie(?=[nt])|dien|y[ao](?!u)"
)
_SILENT = re.compile(
    "(?<=[^aeiouyl])e$|(?<=[aeiouyr])le$|(?<=[^aeiouydt])(?<![^aeiouy]l)ed$|(?<=[^aeiouyscgzxl])(?<![sc]h)es$"
    "|(?<=[aeiouy])les$|(?<=[^aeiouy])e(?=ly$|less|ful|ment|ness)"
)


def syllables(word: str) -> int:
    """Syllables of an English word by its spelling: groups of vowels, those that are spoken apart, less silent ones.

    >>> [syllables(word) for word in ("cat", "table", "made", "nation", "piano", "well-made", "naïve")]
    [1, 2, 1, 2, 3, 2, 1]
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", word.casefold()) if not unicodedata.combining(c))
    parts = re.findall("[a-z]+", re.sub("['’]", "", plain))
    return sum(map(_syllables_of_part, parts)) or 1


def _syllables_of_part(part: str) -> int:
    spoken = len(_GROUP.findall(part)) + len(_TWO_VOWELS.findall(part))
    return max(spoken - len(_SILENT.findall(part)), 1)
