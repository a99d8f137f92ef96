"""METEOR of nltk, with matches of words and of stems.

Matches of synonyms need WordNet, which is no part of the package; without them the score is what nltk computes when
its `wordnet` knows no word.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan, word_spans
from pertoken.rewards.metrics.base import Granularity, MetricDelta, Piece, PrefixScore, porter_stemmer


@dataclass(frozen=True)
class Meteor(MetricDelta):
    """Sentence METEOR of nltk without synonyms (same words, then same stems); the best of several references.

    Words are those of the other rewards: punctuation marks count as words, and so does each Chinese character.
    """

    key = "meteor"
    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change, or the last with all."""
    alpha: float = 0.9
    """Share of recall against precision in their harmonic mean."""
    beta: float = 3.0
    """Exponent of the penalty for matches in many pieces."""
    gamma: float = 0.5
    """Largest penalty for matches in many pieces."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1 or not 0 <= self.gamma <= 1:
            raise ConfigError(f"meteor: expected alpha and gamma from 0 to 1, got {self.alpha} and {self.gamma}")

    def warm_up(self) -> None:
        _stem("warm")

    def chunks(self, text: str) -> list[CharSpan]:
        return word_spans(text, marks=True)

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        return [chunk[start:stop].lower() for start, stop in word_spans(chunk, marks=True)]

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return _BestScore([_MeteorScore(self.text_pieces(text), self) for text in references])


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return str(porter_stemmer().stem(word))


class _BestScore:
    """The best of several scores of one list of words."""

    def __init__(self, scores: Sequence["_MeteorScore"]) -> None:
        self._scores = scores

    def push(self, word: str) -> None:
        for score in self._scores:
            score.push(word)

    def pop(self) -> None:
        for score in self._scores:
            score.pop()

    def value(self) -> float:
        return max(score.value() for score in self._scores)


class _MeteorScore:
    """METEOR of a list of words against one reference.

    nltk matches from the ends: the last "the" with the last "the", then stems with what is left. A new word can only
    change the matches of words with its own stem, so only those are matched again.
    """

    def __init__(self, reference: Sequence[str], metric: Meteor) -> None:
        self._metric = metric
        self._expected = _by_stem(reference)
        self._num_expected = len(reference)
        self._words: list[str] = []
        self._given: defaultdict[str, defaultdict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self._match: dict[int, int] = {}
        self._neighbours = 0  # matches whose left neighbours match each other, too

    def push(self, word: str) -> None:
        self._given[_stem(word)][word].append(len(self._words))
        self._words.append(word)
        self._match_again(_stem(word))

    def pop(self) -> None:
        word = self._words.pop()
        self._given[_stem(word)][word].pop()
        self._link(len(self._words), None)
        self._match_again(_stem(word))

    def _match_again(self, stem: str) -> None:
        """Match all words of one stem: places of the same word from the end on, then what is left."""
        expected = self._expected.get(stem)
        if expected is None:
            return
        pairs: dict[int, int | None] = {}
        left: list[int] = []
        free: list[int] = []
        given = self._given[stem]
        for word in given.keys() | expected.keys():
            ours, theirs = given.get(word, []), expected.get(word, [])
            common = min(len(ours), len(theirs))
            pairs |= zip(ours[len(ours) - common :], theirs[len(theirs) - common :], strict=True)
            left += ours[: len(ours) - common]
            free += theirs[: len(theirs) - common]
        left, free = sorted(left), sorted(free)
        common = min(len(left), len(free))
        pairs |= zip(left[len(left) - common :], free[len(free) - common :], strict=True)
        pairs |= dict.fromkeys(left[: len(left) - common])
        for place, other in pairs.items():
            self._link(place, other)

    def _link(self, place: int, other: int | None) -> None:
        """Match a word with a place in the reference, or with none."""
        if self._match.get(place) == other:
            return
        self._neighbours -= self._adjacent(place) + self._adjacent(place + 1)
        if other is None:
            self._match.pop(place, None)
        else:
            self._match[place] = other
        self._neighbours += self._adjacent(place) + self._adjacent(place + 1)

    def _adjacent(self, place: int) -> bool:
        here, before = self._match.get(place), self._match.get(place - 1)
        return here is not None and before is not None and here == before + 1

    def value(self) -> float:
        """(1 - gamma * (stretches / matches)^beta) * P * R / (alpha * P + (1 - alpha) * R)."""
        hits, metric = len(self._match), self._metric
        if not hits:
            return 0.0
        precision, recall = hits / len(self._words), hits / self._num_expected
        mean = precision * recall / (metric.alpha * precision + (1 - metric.alpha) * recall)
        stretches = (hits - self._neighbours) / hits
        return float(1 - metric.gamma * stretches**metric.beta) * mean


def _by_stem(words: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """The places of each word, grouped by stem."""
    found: dict[str, dict[str, list[int]]] = {}
    for place, word in enumerate(words):
        found.setdefault(_stem(word), {}).setdefault(word, []).append(place)
    return found
