"""MAUVE: how close what a model writes is to what people write, as distributions of texts.

Both sets of texts are embedded and clustered together, and the two histograms over clusters are compared: texts of a
kind that people do not write, and kinds that the model never writes, both cost. Pillutla et al. 2021,
https://arxiv.org/abs/2102.01454, with the settings of their package `mauve-text`, but embeddings of sentences in the
place of the last hidden states of GPT-2: compare its values with each other alone, of the same number of texts.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from pertoken.errors import MissingExtraError
from pertoken.rewards.semantics import EMBEDDED, encoder

TEXTS_PER_CLUSTER = 10
VARIANCE = 0.9
"""Share of the variance that the principal components keep in which texts are clustered."""
POINTS = 25
"""Mixtures on the divergence curve."""
SCALE = 5.0
"""c in exp(-c KL)."""


def mauve(texts: Sequence[str], humans: Sequence[str]) -> float:
    """MAUVE of `texts` against `humans`, 0 to 1: 1 where the histograms over clusters are the same.

    There is a cluster for every ten texts of either side, two at the least. Of few texts it is mostly noise: have a
    few hundred. Needs the extra `semantics`; the embedded encoder reads English.
    """
    embed = embedder()
    clusters = max(2, round(min(len(texts), len(humans)) / TEXTS_PER_CLUSTER))
    labels = cluster(np.stack([embed(text) for text in (*humans, *texts)]), clusters)
    counts = [np.bincount(part, minlength=clusters) for part in np.split(labels, [len(humans)])]
    return of_histograms(counts[0] / len(humans), counts[1] / len(texts))


def embedder() -> Callable[[str], NDArray[np.float32]]:
    """Text -> embedding; MissingExtraError where there is none."""
    try:
        return encoder(EMBEDDED)
    except MissingExtraError as error:
        raise MissingExtraError("sentence-transformers", "semantics", "the metric mauve") from error


def cluster(vectors: Float[np.ndarray, "N D"], count: int, *, seed: int = 0) -> NDArray[np.int64]:
    """The cluster of each vector: k-means, the best of five beginnings, in the first principal components."""
    from sklearn.cluster import KMeans  # comes with sentence-transformers

    unit = vectors.astype(np.float64) / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    centred = unit - unit.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    shares = np.cumsum(sizes**2) / max(float((sizes**2).sum()), 1e-12)
    kept = int(np.argmax(shares >= VARIANCE)) + 1
    count = min(count, len(np.unique(unit, axis=0)))
    found: NDArray[np.int64] = KMeans(count, n_init=5, max_iter=500, random_state=seed).fit_predict(
        left[:, :kept] * sizes[:kept]
    )
    return found.astype(np.int64)


def of_histograms(p: Float[np.ndarray, " K"], q: Float[np.ndarray, " K"]) -> float:
    """The area under the divergence curve of two distributions over the same clusters.

        r = w p + (1 - w) q      the curve: (exp(-c KL(q | r)), exp(-c KL(p | r)))      0 < w < 1

    from (1, 0) at w = 0 to (0, 1) at w = 1, by trapezoids. Two that share nothing have w^c against (1 - w)^c:
    c B(c + 1, c), which is 0.00397 for c = 5, and 0.00407 by trapezoids. Points with the same x stay in the order of w,
    unlike in the package, which says 0.75 of two that are the same.

    >>> of_histograms(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    1.0
    """
    weights = np.linspace(1e-6, 1 - 1e-6, POINTS)
    mixtures = [w * p + (1 - w) * q for w in weights]
    x = np.exp(-SCALE * np.array([0.0, *(_kl(q, r) for r in mixtures), np.inf]))
    y = np.exp(-SCALE * np.array([np.inf, *(_kl(p, r) for r in mixtures), 0.0]))
    return round(float(((x[1:] + x[:-1]) * (y[1:] - y[:-1])).sum()) / 2, 12)


def _kl(p: Float[np.ndarray, " K"], q: Float[np.ndarray, " K"]) -> float:
    """KL divergence of two distributions, of which q is nowhere 0 where p is not."""
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / q[there])))
