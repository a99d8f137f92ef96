"""A text as the embeddings that a policy reads, and the log-prob of what it wrote as a function of them.

The model's own forward pass over one row: no packing and no compiled layers, for questions about single texts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pertoken.forward import decoder_start
from pertoken.policy.scoring import head_logits
from pertoken.reading import Reading


def embedded(
    model: Any, tokens: Sequence[int], targets: Sequence[int], *, prompt: int, neutral: int, temperature: float = 1.0
) -> Reading:
    """The tokens before the last target as a policy reads them, all of them asked about, each standing for itself.

    The score is the sum of the log-probs, under softmax(logits / temperature), of the tokens in the columns `targets`
    given those before them (nats). What is written stays the same whatever is read: a neutral token changes what the
    later ones are predicted from, and never which ones they are.

    prompt: how many tokens are asked. An encoder-decoder model reads these with its encoder, and the others with its
    decoder, behind the ids that it begins with; nobody asks about those.
    """
    device, length = model.device, max(targets)
    ids, columns = torch.tensor(list(tokens), device=device), torch.tensor(list(targets), device=device)
    written, start = ids[columns], torch.tensor(decoder_start(model), dtype=torch.long, device=device)
    encoder, decoder = (model.get_encoder(), model.get_decoder()) if len(start) else (None, model.base_model)

    def embeddings(of: Int[Tensor, " L"]) -> Float[Tensor, "L H"]:
        if encoder is None:
            found: Tensor = decoder.get_input_embeddings()(of)
            return found
        return torch.cat([encoder.get_input_embeddings()(of[:prompt]), decoder.get_input_embeddings()(of[prompt:])])

    def states(rows: Float[Tensor, "N L H"]) -> Float[Tensor, "N A H"]:
        """What each target is predicted from."""
        if encoder is None:
            hidden: Tensor = decoder(inputs_embeds=rows, use_cache=False, return_dict=True).last_hidden_state
            return hidden[:, columns - 1]
        # Some families scale the embeddings of ids, and not those that they are given: ids go in, and rows in between.
        hook = encoder.get_input_embeddings().register_forward_hook(lambda *_: rows[:, :prompt])
        try:
            read = encoder(input_ids=ids[:prompt].expand(len(rows), -1), return_dict=True).last_hidden_state
        finally:
            hook.remove()
        begun = decoder.get_input_embeddings()(start).expand(len(rows), -1, -1)
        hidden = decoder(
            inputs_embeds=torch.cat([begun, rows[:, prompt:]], 1), encoder_hidden_states=read, use_cache=False,
            return_dict=True,
        ).last_hidden_state  # fmt: skip
        return hidden[:, columns - prompt + len(start) - 1]

    def score(rows: Float[Tensor, "N L H"]) -> Float[Tensor, " N"]:
        logits = head_logits(model, states(rows).flatten(0, 1)).float() / temperature
        found: Tensor = logits.log_softmax(1).gather(1, written.repeat(len(rows))[:, None])
        return found.view(len(rows), -1).sum(1)

    with torch.no_grad():
        read, blank = embeddings(ids[:length]), embeddings(torch.full_like(ids[:length], neutral))
    return Reading(read, blank, score, [[(column, 1.0)] for column in range(length)])
