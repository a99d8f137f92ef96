"""What a learned model reads of a text, as embeddings that the gradient of its score can be taken of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ModelError


@dataclass(frozen=True)
class Reading:
    """One pass of a model over L of its own tokens, and the score that it gives."""

    embeddings: Float[Tensor, "L H"]
    neutral: Float[Tensor, "L H"]
    """The same with a neutral token in the place of each one that is asked about."""
    score: Callable[[Float[Tensor, "N L H"]], Float[Tensor, " N"]]
    """Differentiable; of each of N rows of embeddings, whatever the others are."""
    shares: Sequence[Sequence[tuple[int, float]]]
    """Of each of the L tokens, the tokens of the text asked about that it stands for, and how much of it each takes."""


def neutral_id(tokenizer: Any) -> int:
    """The token that says least: that of masks, else of padding, else of what is unknown, else the end."""
    for name in ("mask", "pad", "unk", "eos"):
        found = getattr(tokenizer, f"{name}_token_id", None)
        if isinstance(found, int):
            return found
    raise ModelError(
        f"{type(tokenizer).__name__} has no token for masks, padding, the unknown or the end: there is nothing neutral "
        "to hold a text against"
    )
