"""What an engine decodes with: rows of tokens in numbered slots, each with its own length, on any Hugging Face model.

A decoder knows ids, weights and memory; who samples what, and when a row ends, is the engine's business.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

NAME = "pertoken_slots"
"""Under this name transformers finds `slot_attention`; it has no mask function, so no mask is ever built."""


@runtime_checkable
class Decoder(Protocol):
    """Rows in slots 0, 1, ...; the first R of them are live."""

    def reserve(self, slots: int, prompt: int, own: int) -> None:
        """Make room for `slots` rows of at most `prompt` tokens and `own` more; what was in them is gone."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        """Compute each of n prompts once, put it into each of its `slots`, and return the logits behind them."""
        ...

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        """Append one token to each of the first R slots, and return the logits behind them."""
        ...

    def move(self, source: int, target: int) -> None:
        """Put the row of slot `source` into slot `target`."""
        ...

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over changed weights (names as in `Policy.trainable()`)."""
        ...

    def release(self) -> None:
        """Give up rows and packed weights; `load` comes before the next `reserve`."""
        ...


class HFDecoder:
    """On any model that attends through the attention interface of transformers, with memory of its own.

    Keys and values lie in buffers that are allocated once, `[slots, heads, length, width]` a layer; a row begins at
    column 0 whatever its neighbours do, so prompts need no padding and a free slot can be given to the next prompt.
    """

    def __init__(self, model: Any, head_logits: Any) -> None:
        """head_logits: maps (model, hidden states `[A, H]`) to logits, as `policy.scoring.head_logits` does."""
        self._model, self._head_logits = model, head_logits
        self._memory: list[tuple[Tensor, Tensor] | None] = []
        self._lengths: list[int] = []
        self._size = (0, 0)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing to do: the engine's model holds the weights."""

    def release(self) -> None:
        self._size, self._memory = (0, 0), []

    def reserve(self, slots: int, prompt: int, own: int) -> None:
        if slots > self._size[0] or prompt + own > self._size[1]:
            self._size, self._memory = (slots, prompt + own), []
        self._lengths = [0] * self._size[0]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        return torch.stack([self._prefill(*one) for one in zip(prompts, slots, strict=True)])

    def _prefill(self, prompt: Sequence[int], slots: Sequence[int]) -> Float[Tensor, " V"]:
        ids = torch.tensor([list(prompt)], device=self._model.device)
        hidden = self._forward(ids, torch.arange(len(prompt), device=ids.device)[None], list(slots), [0])
        for slot in slots:
            self._lengths[slot] = len(prompt)
        logits: Tensor = self._head_logits(self._model, hidden[0, -1:])
        return logits[0]

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        before = self._lengths[: len(tokens)]
        positions = torch.tensor(before, device=tokens.device)[:, None]
        hidden = self._forward(tokens[:, None], positions, list(range(len(tokens))), before)
        for slot in range(len(tokens)):
            self._lengths[slot] += 1
        logits: Tensor = self._head_logits(self._model, hidden[:, -1])
        return logits

    def move(self, source: int, target: int) -> None:
        length = self._lengths[source]
        for layer in self._memory:
            for buffer in layer or ():
                buffer[target, :, :length] = buffer[source, :, :length]
        self._lengths[target] = length

    def _forward(self, ids: Tensor, positions: Tensor, slots: list[int], before: list[int]) -> Float[Tensor, "R S H"]:
        with _writing(self._model, _Writing(self, slots, before, ids.shape[1])):
            states: Tensor = self._model.base_model(
                input_ids=ids, position_ids=positions, past_key_values=_SlotCache(), use_cache=True,
                return_dict=True,
            ).last_hidden_state  # fmt: skip
        return states

    def buffers(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of a layer; allocated when the layer is met for the first time."""
        while len(self._memory) <= layer:
            self._memory.append(None)
        found = self._memory[layer]
        if found is None:
            slots, length = self._size
            found = tuple(x.new_zeros(slots, x.shape[1], length, x.shape[3]) for x in (keys, values))  # type: ignore[assignment]
            self._memory[layer] = found
        assert found is not None
        return found


class RecomputingDecoder:
    """The slow, obvious twin: keeps ids and nothing else, and runs the whole text through the model at each step.

    For models that attend in ways of their own (ALiBi, recurrence), and as the oracle of tests.
    """

    def __init__(self, model: Any, head_logits: Any) -> None:
        self._model, self._head_logits = model, head_logits
        self._rows: list[list[int]] = []

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing to do: the engine's model holds the weights."""

    def reserve(self, slots: int, prompt: int, own: int) -> None:
        self._rows = [[] for _ in range(slots)]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        for prompt, places in zip(prompts, slots, strict=True):
            for slot in places:
                self._rows[slot] = list(prompt)
        return torch.cat([self._logits([list(prompt)]) for prompt in prompts])

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        for row, token in zip(self._rows, tokens.tolist(), strict=False):
            row.append(token)
        return self._logits(self._rows[: len(tokens)])

    def release(self) -> None:
        self._rows = []

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def _logits(self, rows: list[list[int]]) -> Float[Tensor, "R V"]:
        lengths = torch.tensor([len(row) for row in rows], device=self._model.device)
        width = int(lengths.max())
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=lengths.device)
        mask = torch.arange(width, device=lengths.device) < lengths[:, None]
        states = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits: Tensor = self._head_logits(self._model, states[torch.arange(len(rows)), lengths - 1])
        return logits


@torch.no_grad()
def agrees(decoder: Decoder, model: Any, *, tolerance: float) -> bool:
    """Whether a prompt and a few steps behind it give the model's own logits; measured, not assumed.

    tolerance: largest difference in standard deviations of the logits.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(12, device=model.device) * 31 + 7) % vocabulary
    try:
        decoder.reserve(2, 8, 4)
        found = [decoder.prefill([ids[:8].tolist()], [[0, 1]])[0]]
        found += [decoder.step(ids[k : k + 1].expand(2))[1] for k in range(8, 12)]
    except Exception:  # attention that cannot be replaced, or an operator that is missing, may fail in any way
        return False
    wanted = model(input_ids=ids[None], use_cache=False).logits[0, 7:].float()
    return bool((torch.stack(found).float() - wanted).abs().max() < tolerance * wanted.std())


class _Writing:
    """One forward: which slots it extends, and from where on."""

    def __init__(self, decoder: HFDecoder, slots: list[int], before: list[int], count: int) -> None:
        self.decoder, self.slots, self.before, self.count = decoder, slots, before, count
        self.prefill = count > 1 or before == [0]
        device = decoder._model.device
        self.rows = torch.tensor(slots, device=device)
        if not self.prefill:
            self.at = torch.tensor(before, device=device)
            self.width = max(before) + 1
            self.distance = self.at[:, None] - torch.arange(self.width, device=device)

    def visible(self, window: int | None) -> Tensor:
        """`[R, 1, 1, width]`: which columns of its slot each row's new token sees."""
        seen = self.distance >= 0
        return (seen & (self.distance < window) if window else seen)[:, None, None]


_now: ContextVar[_Writing] = ContextVar("writing")


@contextlib.contextmanager
def _writing(model: Any, what: _Writing) -> Iterator[None]:
    config = model.config.get_text_config()
    before, token = config._attn_implementation, _now.set(what)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _now.reset(token)


class _SlotLayer(CacheLayerMixin):
    """Hands the new keys and values on as they are: `slot_attention` stores them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return max(_now.get().before)

    def get_max_length(self) -> int:
        return -1


class _SlotCache(Cache):
    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_SlotLayer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(_now.get().before)


def slot_attention(
    module: torch.nn.Module,
    query: Float[Tensor, "R Hq S D"],
    key: Float[Tensor, "R Hk S D"],
    value: Float[Tensor, "R Hk S Dv"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "R S Hq Dv"], None]:
    """The attention function that a model calls in each layer: store what is new, attend to what is stored.

    Raises NotImplementedError for a kind of attention that it does not compute (soft caps, sinks, biases).
    """
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if options.get(name) is not None:
            raise NotImplementedError(f"slot attention without {name}")
    writing = _now.get()
    keys, values = writing.decoder.buffers(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    shared = query.shape[1] // key.shape[1]
    if writing.prefill:
        keys[writing.rows, :, : writing.count] = key
        values[writing.rows, :, : writing.count] = value
        mask = None
        if sliding_window and writing.count > sliding_window:
            distance = torch.arange(writing.count, device=key.device)
            distance = distance[:, None] - distance[None]
            mask = (distance >= 0) & (distance < sliding_window)
        k, v = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
        out = scaled_dot_product_attention(query, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        return out.transpose(1, 2), None
    keys[writing.rows, :, writing.at] = key[:, :, 0]
    values[writing.rows, :, writing.at] = value[:, :, 0]
    rows, heads = query.shape[:2]
    # Query heads that share a key head become queries of that head: nothing is repeated in memory.
    folded = query.reshape(rows, heads // shared, shared, query.shape[3])
    k, v = keys[:rows, :, : writing.width], values[:rows, :, : writing.width]
    mask = writing.visible(sliding_window).expand(-1, 1, shared, -1)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(rows, 1, heads, out.shape[3]), None


AttentionInterface.register(NAME, slot_attention)
