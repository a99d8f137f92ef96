"""Text metrics paid out token by token: each token earns the change that it makes to the score.

    r_t = m(text up to token t) - m(text up to token t-1)          sum_t r_t = m(whole text) - m("")

`m` is the official sentence score (rouge-score, sacrebleu, nltk), tokenisation included, so the sum over the tokens is
the figure that an evaluation reports. With gamma = 1 this is the final score as a reward, shaped by the potential
m(prefix): the policy gradient is the same, its variance is lower (Ng, Harada & Russell 1999; Bahdanau et al. 2017,
https://arxiv.org/abs/1607.07086). With gamma < 1 it is not: plain differences then also reward haste.

A prefix is never scored from its beginning. A metric cuts the text into chunks that its tokeniser treats apart from
one another (white space, mostly, is where they part); of each further prefix only the chunk that it ends in is
tokenised again, and the score is told which pieces to take off its end and which to put there.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from pertoken.errors import ConfigError, RewardError, closest
from pertoken.rewards.align import CharSpan, spread, word_spans
from pertoken.rewards.base import Sample, SampleReward

Granularity = Literal["word", "token", "text"]

Piece = Any
"""What a metric compares: a word, a character, ... ; hashable."""


@runtime_checkable
class PrefixScore(Protocol):
    """The score of a list of pieces that grows and shrinks at its end."""

    def push(self, piece: Piece) -> None: ...
    def pop(self) -> None: ...
    def value(self) -> float: ...


class MetricDelta(SampleReward):
    """A metric of the text against references, paid out as differences between prefixes.

    word: the change that a completed word makes is split evenly over the tokens of that word, so a word earns the
    same however it is cut into pieces. token: each token earns the change between the real texts before and after
    it, half-written words included. text: the last action earns everything. All sum to the same score. Special tokens
    earn 0 unless they are the last action.
    """

    key: ClassVar[str]
    """Its name in a configuration."""
    granularity: Granularity

    def __post_init__(self) -> None:
        check_choice(f"{self.key}.granularity", self.granularity, get_args(Granularity))

    @abstractmethod
    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        """The score of no pieces yet."""

    @abstractmethod
    def chunks(self, text: str) -> Sequence[CharSpan]:
        """Character ranges that the metric's tokeniser treats apart from one another, in order."""

    @abstractmethod
    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        """What the official metric makes of a chunk, or of its beginning, where the text or the prefix ends in it.

        first, last: whether no other chunk comes before, or after it.
        """

    def word_spans(self, text: str) -> list[CharSpan]:
        """Character ranges of the words, whose tokens share the credit."""
        return word_spans(text, marks=True)

    def text_pieces(self, text: str) -> list[Piece]:
        """What the official metric makes of a whole text."""
        chunks = self.chunks(text)
        final = len(chunks) - 1
        return [
            piece
            for k, (start, stop) in enumerate(chunks)
            for piece in self.pieces(text[start:stop], first=k == 0, last=k == final)
        ]

    def prefix_values(self, sample: Sample, ends: Sequence[int]) -> list[float]:
        """m("") and m(text[:end]) for each of the ascending `ends`, which close with the whole text."""
        text, score = sample.text, self.prefix_score(references(sample))
        values = [score.value()]
        chunks = self.chunks(text)
        current, pushed = 0, list[Piece]()  # the chunk that the prefix ends in, and what the score has of it
        for end in ends:
            changed = False
            while current + 1 < len(chunks) and chunks[current + 1][0] < end:
                start, stop = chunks[current]
                changed |= _replace(score, pushed, self.pieces(text[start:stop], first=current == 0, last=False))
                current, pushed = current + 1, []
            if chunks and chunks[current][0] < end:
                start, stop = chunks[current]
                pieces = self.pieces(text[start : min(stop, end)], first=current == 0, last=True)
                changed |= _replace(score, pushed, pieces)
                pushed = pieces
            values.append(score.value() if changed else values[-1])
        return values

    def paid_values(self, sample: Sample, ends: Sequence[int]) -> list[float]:
        """The values whose changes are paid; a metric that cannot afford its score at every prefix settles here."""
        return self.prefix_values(sample, ends)

    def token_values(self, sample: Sample) -> list[float]:
        values = [0.0] * len(sample.tokens)
        if not values:
            return values
        if self.granularity == "token":
            return _changes(self.paid_values(sample, sample.aligned.completed()))
        if self.granularity == "text":
            if True in sample.action_mask:
                last_action = len(values) - 1 - sample.action_mask[::-1].index(True)
                values[last_action] = sum(_changes(self.paid_values(sample, [len(sample.text)])))
            return values
        words = self.word_spans(sample.text) or [(0, len(sample.text))]
        ends = [stop for _, stop in words[:-1]] + [len(sample.text)]  # the last word closes with the text
        for (start, stop), change in zip(words, _changes(self.paid_values(sample, ends)), strict=True):
            for token, share in spread(sample.aligned, start, stop, change):
                values[token] += share
        return values


def _changes(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


def _replace(score: PrefixScore, old: Sequence[Piece], new: Sequence[Piece]) -> bool:
    """Make the pieces `old` at the end of the score to `new`; False if they are the same already."""
    pairs = enumerate(zip(old, new, strict=False))
    common = next((k for k, (one, other) in pairs if one != other), min(len(old), len(new)))
    for _ in old[common:]:
        score.pop()
    for piece in new[common:]:
        score.push(piece)
    return len(old) > common or len(new) > common


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


def check_choice(where: str, value: str, known: Iterable[str]) -> None:
    """Refuse a setting that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{where}: unknown value {value!r}; {closest(value, known)}")


Ngram = tuple[Hashable, ...]


def count_ngrams(pieces: Sequence[Piece], orders: Iterable[int]) -> Counter[Ngram]:
    """How often each n-gram of the given orders occurs.

    >>> sorted(count_ngrams("aab", [1, 2]).items())
    [(('a',), 2), (('a', 'a'), 1), (('a', 'b'), 1), (('b',), 1)]
    """
    return Counter(tuple(pieces[i : i + n]) for n in orders for i in range(len(pieces) - n + 1))


class NgramMatches:
    """The n-grams of a growing list that are also in each reference, no more often than there."""

    def __init__(self, allowed: Sequence[Counter[Ngram]], orders: Sequence[int]) -> None:
        self.matches = [[0] * len(orders) for _ in allowed]
        """Per reference and order."""
        self._allowed, self._orders = allowed, orders
        self._pieces: list[Piece] = []
        self._counts: dict[Ngram, int] = {}

    def __len__(self) -> int:
        return len(self._pieces)

    def push(self, piece: Piece) -> None:
        self._pieces.append(piece)
        for k, ngram in self._last_ngrams():
            count = self._counts[ngram] = self._counts.get(ngram, 0) + 1
            for matches, allowed in zip(self.matches, self._allowed, strict=True):
                matches[k] += count <= allowed.get(ngram, 0)

    def pop(self) -> None:
        for k, ngram in self._last_ngrams():
            count = self._counts[ngram]
            self._counts[ngram] = count - 1
            for matches, allowed in zip(self.matches, self._allowed, strict=True):
                matches[k] -= count <= allowed.get(ngram, 0)
        self._pieces.pop()

    def _last_ngrams(self) -> list[tuple[int, Ngram]]:
        pieces, size = self._pieces, len(self._pieces)
        return [(k, tuple(pieces[size - n :])) for k, n in enumerate(self._orders) if n <= size]


@cache
def porter_stemmer() -> Any:
    """Of nltk, which is imported here because it imports scikit-learn where that is installed: seconds, 0.2 GB."""
    from nltk.stem.porter import PorterStemmer

    return PorterStemmer()
