"""A text as the embeddings that a policy reads, and the log-prob of what it wrote as a function of them.

The model's own forward pass over one row: no packing and no compiled layers, for questions about single texts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ModelError
from pertoken.forward import decoder_start
from pertoken.policy.scoring import head_logits
from pertoken.reading import Reading


def embedded(
    model: Any, tokens: Sequence[int], targets: Sequence[int], *, neutral: int, temperature: float = 1.0
) -> Reading:
    """The tokens before the last target as a policy reads them, all of them asked about, each standing for itself.

    The score is the sum of the log-probs, under softmax(logits / temperature), of the tokens in the columns `targets`
    given those before them (nats). What is written stays the same whatever is read: a neutral token changes what the
    later ones are predicted from, and never which ones they are. Raises ModelError for encoder-decoder models.
    """
    if decoder_start(model):
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder model: gradients of what it reads cannot be asked here yet"
        )
    device, length = model.device, max(targets)
    ids, columns = torch.tensor(list(tokens), device=device), torch.tensor(list(targets), device=device)
    written = ids[columns]

    def score(rows: Float[Tensor, "N L H"]) -> Float[Tensor, " N"]:
        hidden = model.base_model(inputs_embeds=rows, use_cache=False, return_dict=True).last_hidden_state
        logits = head_logits(model, hidden[:, columns - 1].flatten(0, 1)).float() / temperature
        found: Tensor = logits.log_softmax(1).gather(1, written.repeat(len(rows))[:, None])
        return found.view(len(rows), -1).sum(1)

    with torch.no_grad():
        table = model.get_input_embeddings()
        read, blank = table(ids[:length]), table(torch.full_like(ids[:length], neutral))
    return Reading(read, blank, score, [[(column, 1.0)] for column in range(length)])
