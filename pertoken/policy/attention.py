"""Attention of packed rows: every token of a batch in one long row, each prompt once, nothing padded.

    [prompt of pack 0 | row 0 | row 1 | prompt of pack 1 | row 2 | ...]

A token sees its own prompt and what stands before it in its own row. A dense mask over such a row would cost
the square of its length. Compiled code goes through such a row as it is (`compiled.attend`); without it, each pack
is two small calls: its prompt with itself, and its rows, side by side in a rectangle, with prompt and row. It
reaches the model through the attention interface of transformers (`ALL_ATTENTION_FUNCTIONS`), so any model that
uses that interface takes it; `scoring.find_layout` measures whether a model gives the right numbers with it.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from pertoken import native
from pertoken.policy import compiled
from pertoken.policy.packs import Pack

NAME = "pertoken_packed"
"""Under this name transformers finds `packed_attention`; it has no mask function, so no mask is ever built."""


_packs: ContextVar[tuple[Pack, ...]] = ContextVar("packs")


@contextlib.contextmanager
def packed(model: Any, packs: tuple[Pack, ...]) -> Iterator[None]:
    """Within it, `model` attends as `packs` say (forward only: the backward pass knows by itself)."""
    config = model.config.get_text_config()
    before, token = config._attn_implementation, _packs.set(packs)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _packs.reset(token)


_looked_at: ContextVar[list[tuple[Tensor, Tensor, float, int | None]] | None] = ContextVar("looked_at", default=None)


@contextlib.contextmanager
def last_layer() -> Iterator[list[tuple[Tensor, Tensor, float, int | None]]]:
    """Within it, what the layer that attended last did so with: query, key, scaling, sliding window. A list of one."""
    found: list[tuple[Tensor, Tensor, float, int | None]] = []
    token = _looked_at.set(found)
    try:
        yield found
    finally:
        _looked_at.reset(token)


def packed_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "1 Hq N D"],
    key: Float[Tensor, "1 Hk N D"],
    value: Float[Tensor, "1 Hk N Dv"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 N Hq Dv"], None]:
    """The attention function that a model calls in each layer; heads behind tokens in what it returns.

    Raises NotImplementedError for a kind of attention that it does not compute (soft caps, sinks, biases).
    """
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"packed attention without {name}")
    packs, looked_at = _packs.get(), _looked_at.get()
    if looked_at is not None:
        looked_at[:] = [(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window)]
    if dropout == 0.0 and native.takes(query, key, value) and native.attends(value.dtype):
        return compiled.attend(query, key, value, packs, sliding_window, scaling), None
    common = torch.float32 if query.device.type == "cpu" else value.dtype  # on CPUs bfloat16 attention is no faster
    settings: dict[str, Any] = {"scale": scaling, "dropout_p": dropout}
    outputs: list[Tensor] = []
    with torch.autocast(query.device.type, enabled=False):
        sizes = [pack.cells for pack in packs]  # one split: its backward pass makes one tensor, not one a pack
        parts = [x[0].to(common).split(sizes, 1) for x in (query, key, value)]
        for pack, q, k, v in zip(packs, *parts, strict=True):
            outputs += _one_pack(q, k, v, pack, sliding_window, settings)
    return torch.cat(outputs)[None].to(value.dtype), None


AttentionInterface.register(NAME, packed_attention)


def _one_pack(
    q: Float[Tensor, "Hq S D"],
    k: Float[Tensor, "Hk S D"],
    v: Float[Tensor, "Hk S Dv"],
    pack: Pack,
    window: int | None,
    settings: dict[str, Any],
) -> list[Float[Tensor, "_ Hq Dv"]]:
    """Outputs of the prompt's tokens and of the rows' tokens, in their order in the packed row."""
    size = pack.prompt if pack.rectangle is not None else pack.cells
    itself = _attend(
        q[None, :, :size], k[None, :, :size], v[None, :, :size], pack.mask(size, 0, window, q.device), settings
    )
    outputs = [itself[0].transpose(0, 1)]
    if pack.rectangle is None or pack.inside is None:
        return outputs
    n, width = pack.rectangle.shape
    flat = pack.rectangle.flatten()

    def rows_of(x: Tensor) -> Tensor:  # [H, S, D] -> [n, H, L, D]
        return x.transpose(0, 1).index_select(0, flat).view(n, width, *x.shape[::2]).transpose(1, 2)

    def behind_prompt(x: Tensor) -> Tensor:
        return torch.cat([x[:, : pack.prompt].expand(n, -1, -1, -1), rows_of(x)], 2)

    rows = _attend(
        rows_of(q), behind_prompt(k), behind_prompt(v), pack.mask(width, pack.prompt, window, q.device), settings
    )  # [n, Hq, L, Dv]
    return [*outputs, rows.transpose(1, 2)[pack.inside]]


def _attend(
    q: Float[Tensor, "n Hq L D"],
    k: Float[Tensor, "n Hk K D"],
    v: Float[Tensor, "n Hk K Dv"],
    mask: Bool[Tensor, "L K"] | None,
    settings: dict[str, Any],
) -> Float[Tensor, "n Hq L Dv"]:
    """Scaled dot-product attention; query heads that share a key head become more queries of that head."""
    n, heads, length, width = q.shape
    shared = heads // k.shape[1]
    if shared == 1:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **settings)
    if mask is None:  # `is_causal` speaks of one triangle, so heads cannot be folded into it
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        return scaled_dot_product_attention(q, k, v, is_causal=True, **settings)
    folded = q.reshape(n, k.shape[1], shared * length, width)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask.repeat(shared, 1), **settings)
    return out.view(n, heads, length, v.shape[-1])
