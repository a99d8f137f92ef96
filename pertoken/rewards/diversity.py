"""Diversity: of the words within a text (distinct-n), and of the texts of one prompt (self-BLEU)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan, word_spans
from pertoken.rewards.base import Sample, SampleReward, Scene, ScoredSpan, place_spans
from pertoken.rewards.metrics.base import Ngram, count_ngrams
from pertoken.rewards.metrics.bleu import ORDERS, Bleu, BleuScore


@dataclass(frozen=True)
class Distinct(SampleReward):
    """Distinct-n of the text, word by word: different n-grams over all n-grams (Li et al. 2016, arXiv 1510.03055).

    The word that closes an n-gram earns the change of the share: 1 for the first, less than 0 for one seen before. The
    sum is the distinct-n of the text, 0 for a text of less than n words. Punctuation marks are words, case is ignored.
    """

    n: int = 2
    """Length of the n-grams in words."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ConfigError(f"distinct.n: expected at least 1 word, got {self.n}")

    def token_values(self, sample: Sample) -> list[float]:
        spans = word_spans(sample.text, marks=True)
        words = [sample.text[start:stop].casefold() for start, stop in spans]
        seen: set[tuple[str, ...]] = set()
        changes, before = [], 0.0
        for last in range(self.n - 1, len(words)):
            seen.add(tuple(words[last - self.n + 1 : last + 1]))
            share = len(seen) / (last - self.n + 2)
            changes.append(ScoredSpan(*spans[last], share - before))
            before = share
        return place_spans(changes, sample)


@dataclass(frozen=True)
class SelfBleu:
    """Minus the BLEU of each text against the other texts of its prompt (self-BLEU, Zhu et al. 2018, arXiv 1802.01886).

    The sum over a text is -BLEU of sacrebleu (as a fraction of 1) with the others as references. It falls on the words
    that the others have, too: evenly on the orders with a match, within an order on the matches, within a match on its
    words. A text without another one of its prompt costs nothing.
    """

    tokenize: str = "13a"
    """Tokeniser of sacrebleu: 13a, intl, zh, char, none, ... (some need further packages)."""
    lowercase: bool = False
    """Ignore case."""

    def __post_init__(self) -> None:
        _ = self._bleu

    @cached_property
    def _bleu(self) -> Bleu:
        try:
            return Bleu(tokenize=self.tokenize, lowercase=self.lowercase)
        except ConfigError as error:
            raise ConfigError(f"self_{error}") from error

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"]:
        """The values of all samples in their rows, 0 elsewhere; in float64, so that sums stay exact."""
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        texts = [self._words(sample.text) for sample in scene.samples]
        counts = [count_ngrams([word for word, _ in text], ORDERS) for text in texts]
        groups = scene.batch.group.tolist()
        for row, (episode, sample) in enumerate(zip(scene.episodes, scene.samples, strict=True)):
            others = [k for k, group in enumerate(groups) if group == groups[row] and k != row]
            if not others or not sample.tokens:
                continue
            spans = self._costs(
                texts[row], [[word for word, _ in texts[k]] for k in others], [counts[k] for k in others]
            )
            placed = place_spans(spans, sample)
            start = episode.prompt_length
            values[row, start : start + len(placed)] = torch.tensor(placed, dtype=torch.float64)
        return values

    def _costs(
        self, text: Sequence[tuple[str, CharSpan]], others: Sequence[Sequence[str]], allowed: Sequence[Counter[Ngram]]
    ) -> list[ScoredSpan]:
        """What each word of `text` pays; `allowed` counts the n-grams of the others."""
        words = [word for word, _ in text]
        score = BleuScore(others, self._bleu.smooth_method, self._bleu.smooth_value)
        for word in words:
            score.push(word)
        shares = [0.0] * len(words)
        orders = 0
        for n in ORDERS:
            own = count_ngrams(words, [n])
            # Of an n-gram that the others have less often, every occurrence is a match in part.
            common = {ngram: min(count, max(c[ngram] for c in allowed)) / count for ngram, count in own.items()}
            matches = sum(common[ngram] * count for ngram, count in own.items())
            orders += matches > 0
            for first in range(len(words) - n + 1 if matches else 0):
                for k in range(first, first + n):
                    shares[k] += common[tuple(words[first : first + n])] / matches / n
        paid = -score.value() / orders if orders else 0.0
        return [ScoredSpan(*span, paid * share) for (_, span), share in zip(text, shares, strict=True) if share]

    def _words(self, text: str) -> list[tuple[str, CharSpan]]:
        """The words that sacrebleu compares and their characters; of a changed one, those of what it stands in."""
        found = []
        chunks = self._bleu.chunks(text)
        for k, (start, stop) in enumerate(chunks):
            at = start
            for word in self._bleu.pieces(text[start:stop], first=k == 0, last=k == len(chunks) - 1):
                place = text.find(word, at, stop)
                at = place + len(word) if place >= 0 else at
                found.append((word, (place, at) if place >= 0 else (start, stop)))
        return found
