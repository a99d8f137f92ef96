"""Losses of learned rewards: pure functions of scores."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def centring(chosen: Float[Tensor, " P"], rejected: Float[Tensor, " P"]) -> Float[Tensor, ""]:
    """Mean over pairs of (chosen + rejected)^2. Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244.

    >>> centring(torch.tensor([1.0]), torch.tensor([-3.0]))
    tensor(4.)
    """
    return (chosen + rejected).square().mean()


def length_correlation(scores: Float[Tensor, " N"], lengths: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """Squared Pearson correlation of scores and lengths; 0 where one of them does not vary.

    A penalty on it takes out of the score what length explains. Chen et al. 2024 (ODIN),
    https://arxiv.org/abs/2402.07319, use the correlation itself.

    >>> length_correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 6.0, 3.0]))
    tensor(1.)
    """
    scores, lengths = scores - scores.mean(), lengths - lengths.mean()
    spread = scores.square().sum() * lengths.square().sum()
    return torch.where(spread > 0, (scores * lengths).sum().square() / spread.clamp_min(1e-12), 0.0)


def segment_sums(scores: Float[Tensor, "B T"], segments: Int[Tensor, "B T"], count: int) -> Float[Tensor, " count"]:
    """The sum of the scores of each segment 0..count-1; cells of segment -1 are left out.

    >>> segment_sums(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, -1, 0]]), 2)
    tensor([5., 0.])
    """
    chosen = segments >= 0
    return scores.new_zeros(count).index_add(0, segments[chosen], scores[chosen])


def squared_error(
    scores: Float[Tensor, "B T"], targets: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], num_texts: int
) -> Float[Tensor, ""]:
    """Sum over the masked cells of (score - target)^2, per text.

    >>> one = torch.ones(1, 2)
    >>> squared_error(one, torch.tensor([[0.0, -1.0]]), one.bool(), 1)
    tensor(5.)
    """
    return ((scores - targets).square() * mask).sum() / num_texts
