"""A language model of transformers by its own forward pass, and what differs between the two kinds of them.

A causal model reads a prompt and goes on with it. An encoder-decoder model reads the prompt with its encoder, and its
decoder writes behind ids of its own. In this package both are a prompt and what follows it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pertoken.errors import ModelError


def decoder_start(model: Any) -> tuple[int, ...]:
    """Ids that the decoder of an encoder-decoder model begins with; () for a causal model, which has none.

    Its start token, and behind it the one that the first place is held to (the language, in models that know several).
    Nobody chooses them, so they are no actions. Raises ModelError if the model names no start.
    """
    if not model.config.is_encoder_decoder:
        return ()
    sources = (getattr(model, "generation_config", None), model.config)

    def named(name: str) -> int | None:
        return next((value for source in sources if isinstance(value := getattr(source, name, None), int)), None)

    first, forced = named("decoder_start_token_id"), named("forced_bos_token_id")
    first = named("bos_token_id") if first is None else first
    if first is None:
        raise ModelError(
            f"policy.model: {type(model).__name__} does not say what its decoder begins with; set "
            "decoder_start_token_id in its generation_config.json."
        )
    return (first,) if forced is None else (first, forced)


def encode(model: Any, ids: Int[Tensor, "N L"], mask: Bool[Tensor, "N L"]) -> Float[Tensor, "N L H"]:
    """What the encoder makes of sources."""
    states: Tensor = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    return states


def decode(
    model: Any, ids: Int[Tensor, "R S"], read: Float[Tensor, "R L H"], mask: Bool[Tensor, "R L"], **more: Any
) -> Float[Tensor, "R S H"]:
    """The last hidden states of the decoder behind each of `ids`; `read` and `mask` are of the source of each row.

    Embeddings go in, not ids: M2M100 takes the place of a token from how many ids before it are not padding, so that a
    sampled padding token would move all that follow, and move them otherwise where earlier ones lie in a memory.
    """
    decoder = model.get_decoder()
    states: Tensor = decoder(
        inputs_embeds=decoder.get_input_embeddings()(ids),
        encoder_hidden_states=read,
        encoder_attention_mask=mask,
        **more,
    ).last_hidden_state
    return states


def some_ids(model: Any, count: int) -> Int[Tensor, " N"]:
    """Arbitrary ids to try a model with; none is that of padding, which some families take for no token at all."""
    pad = getattr(model.config, "pad_token_id", None)
    ids = (torch.arange(count, device=model.device) * 7 + 3) % model.get_input_embeddings().weight.shape[0]
    return ids if pad is None else torch.where(ids == pad, ids + 1 if pad == 0 else ids - 1, ids)


def own_logits(
    model: Any, prompts: Int[Tensor, "R P"], rests: Int[Tensor, "R N"], mask: Tensor | None = None
) -> Float[Tensor, "R N1 V"]:
    """The logits of the model's own forward that predict each token of `rests`, and those behind the last.

    mask: which cells of `prompts` are tokens (encoder-decoder models alone); None if all are.
    """
    start = decoder_start(model)
    if not start:
        causal: Tensor = model(input_ids=torch.cat([prompts, rests], 1), use_cache=False).logits
        return causal[:, prompts.shape[1] - 1 :]
    written = torch.cat([torch.tensor(start, device=rests.device).expand(len(rests), -1), rests], 1)
    logits: Tensor = model(
        input_ids=prompts, attention_mask=mask, decoder_input_ids=written, use_cache=False
    ).logits  # fmt: skip
    return logits[:, len(start) - 1 :]
