"""What could have stood at each action: the most probable tokens, and how the one that stands there compares."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pertoken.policy.scoring import ACTIONS_PER_CHUNK, Trunk, head_logits, histories, num_generated
from pertoken.sampling import Controls, entropy_of, keep_set, processed_logits
from pertoken.types import TokenBatch


@dataclass(frozen=True)
class Alternatives:
    """What could have stood at each of A actions, the K most probable tokens first, and how the one there compares."""

    ids: Int[Tensor, "A K"]
    logprobs: Float[Tensor, "A K"]
    """-inf where fewer than K tokens are possible."""
    own: Float[Tensor, " A"]
    """Log-prob of the token that stands there; -inf if the controls would not have allowed it."""
    rank: Int[Tensor, " A"]
    """Its place among all tokens, counted from 1."""
    entropy: Float[Tensor, " A"]
    """Of the distribution (nats)."""

    @classmethod
    def joined(
        cls, found: Sequence["Alternatives"], sizes: Int[Tensor, " B"], parts: Sequence[Int[Tensor, " R"]]
    ) -> "Alternatives":
        """Those of all rows in order, from those of `parts` of the rows; `sizes` are the actions of each row."""
        rows = torch.cat(list(parts))
        of_row = rows.repeat_interleave(sizes.to(rows.device)[rows])  # of each action that was found
        back = of_row.argsort(stable=True).to(found[0].own.device)
        return cls(*(torch.cat([getattr(one, f.name) for one in found])[back] for f in fields(cls)))


@torch.no_grad()
def alternatives(
    trunk: Trunk, batch: TokenBatch, hidden: Float[Tensor, "B T H"], controls: Controls, count: int
) -> Alternatives:
    """The `count` most probable tokens at each action, of the distribution that `controls` let tokens be drawn from.

    hidden: the states behind the actions, from the pass that scored them. Kept sets are made anew from the logits, so
    `batch` needs none and its own controls play no part.
    """
    kind = batch.tokens.device.type
    states, targets = hidden[batch.action_mask], batch.tokens[batch.action_mask]
    generated = num_generated(batch)
    history = histories(batch) if controls.needs_history else None
    truncates = controls.truncates and not controls.sampling.greedy
    found = []
    with torch.autocast(kind, dtype=trunk.autocast_dtype, enabled=trunk.autocast_dtype is not None):
        for at in torch.arange(len(targets), device=states.device).split(ACTIONS_PER_CHUNK):
            before = None if history is None else history[at]
            z = processed_logits(head_logits(trunk.model, states[at]), controls, generated[at], before)
            z = z.masked_fill(~keep_set(z, controls.sampling), -torch.inf) if truncates else z
            logprobs = z.log_softmax(1)
            own, best = logprobs.gather(1, targets[at][:, None]), logprobs.topk(min(count, z.shape[1]), dim=1)
            rank = (logprobs > own).sum(1) + 1
            found.append((best.indices, best.values, own[:, 0], rank, entropy_of(logprobs)))
    return Alternatives(*(torch.cat(column) for column in zip(*found, strict=True)))
