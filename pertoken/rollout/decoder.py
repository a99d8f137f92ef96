"""What an engine decodes with: rows of tokens in numbered slots, each with its own length, on any Hugging Face model.

A decoder knows ids, weights and memory; who samples what, and when a row ends, is the engine's business.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache
from transformers.cache_utils import CacheLayerMixin

from pertoken import native
from pertoken.forward import decoder_start, own_logits, some_ids

NAME = "pertoken_slots"
"""Under this name transformers finds `slot_attention`; it has no mask function, so no mask is ever built."""

PREFILL_TOKENS = 2048
"""Tokens of prompts that are computed at once."""


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
    column 0 whatever its neighbours do, so a free slot can be given to the next prompt. Prompts go through the model
    side by side in one row, and none sees another.
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
        logits = []
        for part in in_passes(prompts):
            now = _Prompts(self, [len(prompts[k]) for k in part], [list(slots[k]) for k in part])
            ids = [token for k in part for token in prompts[k]]
            hidden = self._forward(torch.tensor([ids], device=self._model.device), now)
            logits.append(self._head_logits(self._model, hidden[0, [last - 1 for last in now.ends]]))
            for k in part:
                for slot in slots[k]:
                    self._lengths[slot] = len(prompts[k])
        return torch.cat(logits)

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        hidden = self._forward(tokens[:, None], _Step(self, self._lengths[: len(tokens)]))
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

    def _forward(self, ids: Tensor, now: "_Prompts | _Step") -> Float[Tensor, "R S H"]:
        with _attending(self._model, now):
            states: Tensor = self._model.base_model(
                input_ids=ids, position_ids=now.positions, past_key_values=_SlotCache(), use_cache=True,
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
        self._rows: list[tuple[list[int], list[int]]] = []
        """Prompt and what follows it."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing to do: the engine's model holds the weights."""

    def reserve(self, slots: int, prompt: int, own: int) -> None:
        self._rows = [([], []) for _ in range(slots)]

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        for prompt, places in zip(prompts, slots, strict=True):
            for slot in places:
                self._rows[slot] = (list(prompt), [])
        return torch.cat([self._logits([(list(prompt), [])]) for prompt in prompts])

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        for (_, own), token in zip(self._rows, tokens.tolist(), strict=False):
            own.append(token)
        return self._logits(self._rows[: len(tokens)])

    def release(self) -> None:
        self._rows = []

    def move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]

    def _logits(self, rows: list[tuple[list[int], list[int]]]) -> Float[Tensor, "R V"]:
        device, everyone = self._model.device, torch.arange(len(rows))
        if decoder_start(self._model):
            prompts, mask = padded([prompt for prompt, _ in rows], device)
            written, _ = padded([own for _, own in rows], device)
            return own_logits(self._model, prompts, written, mask)[everyone, [len(own) for _, own in rows]]
        ids, mask = padded([prompt + own for prompt, own in rows], device)
        states = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        logits: Tensor = self._head_logits(self._model, states[everyone, mask.sum(1) - 1])
        return logits


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "R L"], Bool[Tensor, "R L"]]:
    """Rows of ids, padded on the right, and which cells are theirs."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long, device=device)
    return ids, torch.arange(width, device=device) < torch.tensor([len(row) for row in rows], device=device)[:, None]


def in_passes(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Numbers of prompts that go through the layers together: `PREFILL_TOKENS` at most, one prompt at least."""
    part: list[int] = []
    taken = 0
    for k, prompt in enumerate(prompts):
        if part and taken + len(prompt) > PREFILL_TOKENS:
            yield part
            part, taken = [], 0
        part.append(k)
        taken += len(prompt)
    if part:
        yield part


@torch.no_grad()
def agrees(decoder: Decoder, model: Any, *, tolerance: float) -> bool:
    """Whether prompts and a few steps behind one give the model's own logits; measured, not assumed.

    tolerance: largest difference in standard deviations of the logits.
    """
    ids = some_ids(model, 12)
    try:
        decoder.reserve(3, 8, 4)
        found = [*decoder.prefill([ids[2:7].tolist(), ids[:8].tolist()], [[1], [0, 2]])]
        found += [decoder.step(ids[k : k + 1].expand(3))[2] for k in range(8, 12)]
    except Exception:  # attention that cannot be replaced, or an operator that is missing, may fail in any way
        return False
    short, full = own_logits(model, ids[None, 2:7], ids[None, :0]), own_logits(model, ids[None, :8], ids[None, 8:])
    wanted = torch.cat([short[0], full[0]]).float()
    return bool((torch.stack(found).float() - wanted).abs().max() < tolerance * wanted.std())


class _Prompts:
    """One forward over prompts side by side in one row."""

    seen = 0
    """Tokens of the memory that the new ones look back at, for what asks for one number."""

    def __init__(self, decoder: HFDecoder, lengths: Sequence[int], slots: Sequence[list[int]]) -> None:
        """slots: where each prompt goes."""
        device = decoder._model.device
        self.decoder, self.lengths, self.slots = decoder, lengths, [torch.tensor(s, device=device) for s in slots]
        self.ends = list(accumulate(lengths))
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, window: int, scale: float
    ) -> Float[Tensor, "1 N Hq Dv"]:
        by_prompt = [x.split(list(self.lengths), 2) for x in (query, key, value)]
        for slots, n, k, v in zip(self.slots, self.lengths, *by_prompt[1:], strict=True):
            keys[slots, :, :n], values[slots, :, :n] = k, v
        if native.takes(query, key, value) and native.attends(value.dtype):
            q, k, v = (x[0].transpose(0, 1).to(value.dtype).contiguous() for x in (query, key, value))
            rows = [[end - n, n, -1] for end, n in zip(self.ends, self.lengths, strict=True)]
            out: Tensor = torch.ops.pertoken.attend(q, k, v, torch.tensor(rows), window, scale)[0]
            return out[None]
        parts = zip(*by_prompt, strict=True)
        return torch.cat([_causal(q, k, v, window, scale) for q, k, v in parts], 1)


class _Step:
    """One forward that gives each of the first rows a token."""

    def __init__(self, decoder: HFDecoder, before: list[int]) -> None:
        """before: tokens that each row has."""
        device = decoder._model.device
        self.decoder, self.seen = decoder, max(before)
        self.before = torch.tensor(before, device=device)
        self.positions = self.before[:, None]
        self.rows = torch.arange(len(before), device=device)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, window: int, scale: float
    ) -> Float[Tensor, "R 1 Hq Dv"]:
        if native.takes(query, key, value):
            q, k, v = (x[:, :, 0].to(keys.dtype).contiguous() for x in (query, key, value))
            compiled: Tensor = torch.ops.pertoken.attend_slots(q, k, v, self.before, keys, values, window, scale)
            return compiled[:, None]
        keys[self.rows, :, self.before], values[self.rows, :, self.before] = key[:, :, 0], value[:, :, 0]
        rows, heads, width = len(self.rows), query.shape[1], self.seen + 1
        shared = heads // key.shape[1]
        distance = self.positions - torch.arange(width, device=key.device)
        mask = (distance >= 0) & (distance < (window or width))
        # Query heads that share a key head become queries of that head: nothing is repeated in memory.
        folded = query.reshape(rows, heads // shared, shared, query.shape[3])
        out = scaled_dot_product_attention(
            folded, keys[:rows, :, :width], values[:rows, :, :width],
            attn_mask=mask[:, None, None].expand(-1, 1, shared, -1), scale=scale,
        )  # fmt: skip
        return out.reshape(rows, 1, heads, out.shape[3])


def _causal(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float) -> Float[Tensor, "1 S Hq Dv"]:
    """Attention of one prompt with itself."""
    shared, count = query.shape[1] // key.shape[1], query.shape[2]
    mask = None
    if window and count > window:
        distance = torch.arange(count, device=key.device)
        distance = distance[:, None] - distance
        mask = (distance >= 0) & (distance < window)
    key, value = (x.repeat_interleave(shared, 1) if shared > 1 else x for x in (key, value))
    out = scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


_now: ContextVar[_Prompts | _Step] = ContextVar("now")


@contextlib.contextmanager
def _attending(model: Any, now: _Prompts | _Step) -> Iterator[None]:
    """Within it, the layers of `model` attend by `now`."""
    config = model.config.get_text_config()
    before, token = config._attn_implementation, _now.set(now)
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
        return _now.get().seen

    def get_max_length(self) -> int:
        return -1


class _SlotCache(Cache):
    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_SlotLayer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return _now.get().seen


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
    now = _now.get()
    keys, values = now.decoder.buffers(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return now.attend(query, key, value, keys, values, sliding_window or 0, scale), None


AttentionInterface.register(NAME, slot_attention)
