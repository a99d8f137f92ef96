"""Held-out items drawn again with replacement, the same draws for every arm: the paired bootstrap.

Koehn 2004, https://aclanthology.org/W04-3250. Everything that is compared is a vector: the value on all items, and
behind it the value on each resample. Sums, means, differences and ratios of such vectors keep items paired.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from pertoken.text_metrics import DRAWS, Counted, Interval

Values = Float[np.ndarray, " D"]
"""The value on all items, then on each resample; of length 1 where it is known on all items alone."""
BySeed = Float[np.ndarray, "S D"]
"""The same of several runs, one per row."""


@dataclass(frozen=True)
class Resamples:
    """Resamples of some items."""

    ids: tuple[str, ...]
    seed: int = 0

    @cached_property
    def counts(self) -> Float[np.ndarray, "D N"]:
        """How often each resample has each item; the first row has each of them once."""
        count = len(self.ids)
        drawn = np.random.default_rng(self.seed).multinomial(count, np.full(count, 1 / count), size=DRAWS)
        return np.vstack([np.ones((1, count)), drawn.astype(float)])

    def mean(self, values: Sequence[float]) -> Values:
        """Of a metric that is the mean over items, given item by item.

        >>> Resamples(("a", "b")).mean([1.0, 3.0])[0]
        np.float64(2.0)
        """
        sums: Values = self.counts @ np.asarray(values, dtype=float)
        return sums / len(self.ids)

    def perplexity(self, nats: Sequence[float], tokens: Sequence[int]) -> Values:
        """Of the perplexity of all texts together: exp of all nats over all tokens, both given item by item.

        >>> Resamples(("a", "b")).perplexity([0.5, 2.5], [1, 2])[0].round(6)  # exp(3 / 3)
        np.float64(2.718282)
        """
        sums = self.counts @ np.stack([np.asarray(nats, dtype=float), np.asarray(tokens, dtype=float)], 1)
        found: Values = np.exp(sums[:, 0] / sums[:, 1])
        return found

    def corpus(
        self,
        metric: str,
        texts: Sequence[str],
        references: Sequence[str],
        *,
        language: str | None = None,
        draws: int = DRAWS,
    ) -> Values:
        """Of a metric of all texts together, one of `COUNTED`.

        language: of the texts, by which BLEU and TER cut words.
        """
        counted = Counted.of(metric, texts, [[known] for known in references], language=language)
        return np.array([counted.of_sums(sums) for sums in self.counts[: draws + 1] @ counted.rows])


def interval(values: Values) -> Interval | None:
    """The value on all items and its 95% percentile interval over resamples; None where it has none.

    >>> interval(np.array([2.0])) is None
    True
    """
    if len(values) == 1:
        return None
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def together(values: Sequence[Values]) -> BySeed:
    """Several of them as rows; on all items alone if one of them is known there alone."""
    width = min(map(len, values))
    return np.stack([each[:width] for each in values])
