"""A decoder for Llama-shaped models on CPUs: a whole step in compiled code, weights packed once per policy version.

The code is `native/decoding.cpp`. What it gains over `HFDecoder`: no Python between layers, matrix products on packed
bfloat16 weights, and a prompt's keys and values in memory once for all the rows behind it. It is compared with the
model before it is trusted; where that fails, or nothing could be compiled, the engine goes on with `HFDecoder`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pertoken import native
from pertoken.rollout.decoder import agrees, in_passes
from pertoken.rollout.packing import multiply, pack, packs

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s whose layers have the shape that the code computes."""

PROBE_TOLERANCE = 0.3
"""Largest difference of a probe's logits from the model's own, in standard deviations of the logits (bfloat16)."""

LANES = 16
"""Positions in a block of keys (`kLanes` in the compiled code); values lie in pairs of positions."""

_NO_PROMPT = (torch.empty(0), torch.empty(0), 0)
_NO_ROWS = (torch.empty(0), torch.empty(0, 0, 0, 0, 0, 0))


def fused_decoder(model: Any) -> "FusedDecoder | None":
    """A decoder that reads the weights of `model` (adapters included), or None where it does not apply."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inner.device.type != "cpu" or not _has_the_shape(inner) or not native.available() or not packs():
        return None
    decoder = FusedDecoder(inner)
    return decoder if agrees(decoder, inner, tolerance=PROBE_TOLERANCE) else None


class FusedDecoder:
    """See `Decoder`. A row is its prompt, shared with others, and an own part that grows."""

    def __init__(self, model: Any) -> None:
        self._model, self._config = model, model.config.get_text_config()
        self._weights: list[Tensor] = []
        self._head = torch.empty(0)
        self._own = _NO_ROWS
        self._prompts: list[tuple[Tensor, Tensor, int]] = []
        self._lengths: list[int] = []
        self._table = (torch.empty(0, 0), torch.empty(0, 0))
        self.load({})

    @property
    def _width(self) -> int:
        c = self._config
        return int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Pack the weights that the model has now."""
        packed: list[Tensor] = []
        with torch.no_grad():
            for layer in self._model.base_model.layers:
                a, m = layer.self_attn, layer.mlp
                qkv = (a.q_proj, a.k_proj, a.v_proj)
                biases = [p.bias for p in qkv if p.bias is not None]
                packed += [
                    layer.input_layernorm.weight.float(),
                    pack(torch.cat([_weight(p) for p in qkv])),
                    torch.cat(biases).bfloat16() if biases else torch.empty(0, dtype=torch.bfloat16),
                    pack(_weight(a.o_proj)),
                    pack(torch.cat([_weight(m.gate_proj), _weight(m.up_proj)])),
                    pack(_weight(m.down_proj)),
                    layer.post_attention_layernorm.weight.float(),
                    a.q_norm.weight.float() if hasattr(a, "q_norm") else torch.empty(0),
                    a.k_norm.weight.float() if hasattr(a, "k_norm") else torch.empty(0),
                ]
            self._weights, self._head = packed, pack(_weight(self._model.get_output_embeddings()))

    def release(self) -> None:
        self._weights, self._head, self._own, self._prompts = [], torch.empty(0), _NO_ROWS, []

    def reserve(self, slots: int, prompt: int, own: int) -> None:
        c = self._config
        outer = (slots, c.num_hidden_layers, c.num_key_value_heads)
        wanted = (*outer, -(-own // LANES) * LANES // 2, self._width, 2)
        if any(has < wants for has, wants in zip(self._own[1].shape, wanted, strict=True)):
            self._own = self._room(outer, own)
        self._prompts, self._lengths = [_NO_PROMPT] * slots, [0] * slots
        if prompt + own > len(self._table[0]):
            positions = torch.arange(prompt + own)[None]
            cos, sin = self._model.base_model.rotary_emb(torch.empty(1, dtype=torch.float32), positions)
            self._table = cos[0].contiguous(), sin[0].contiguous()

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        c, logits = self._config, []
        outer = (c.num_hidden_layers, c.num_key_value_heads)
        for part in in_passes(prompts):
            lengths = [len(prompts[k]) for k in part]
            rooms = [self._room(outer, length) for length in lengths]
            hidden = torch.ops.pertoken.prefill(
                torch.tensor([token for k in part for token in prompts[k]]), torch.tensor(lengths), self._embedding,
                self._weights, self._last_norm, *self._table, [keys for keys, _ in rooms],
                [values for _, values in rooms], c.num_attention_heads, c.rms_norm_eps,
            )  # fmt: skip
            for k, room, length in zip(part, rooms, lengths, strict=True):
                for slot in slots[k]:
                    self._prompts[slot], self._lengths[slot] = (*room, length), length
            logits.append(self._logits(hidden))
        return torch.cat(logits)

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        rows, c = len(tokens), self._config
        keys, values, lengths = zip(*self._prompts[:rows], strict=True)
        hidden = torch.ops.pertoken.step(
            tokens, torch.tensor(self._lengths[:rows]), torch.tensor(lengths), self._embedding, self._weights,
            self._last_norm, *self._table, keys, values, *self._own, c.num_attention_heads, c.rms_norm_eps,
        )  # fmt: skip
        for slot in range(rows):
            self._lengths[slot] += 1
        return self._logits(hidden)

    def move(self, source: int, target: int) -> None:
        own = self._lengths[source] - self._prompts[source][2]
        for memory, positions in zip(self._own, (LANES, 2), strict=True):
            used = -(-own // positions)
            memory[target, :, :, :used] = memory[source, :, :, :used]
        self._prompts[target], self._lengths[target] = self._prompts[source], self._lengths[source]

    def _room(self, outer: tuple[int, ...], positions: int) -> tuple[Tensor, Tensor]:
        """Memory for keys and values of so many positions, as the compiled code wants it, behind `outer`."""
        blocks = -(-positions // LANES)
        keys = torch.empty(*outer, blocks, self._width // 2, LANES, 2, dtype=torch.bfloat16)
        return keys, torch.empty(*outer, blocks * LANES // 2, self._width, 2, dtype=torch.bfloat16)

    @property
    def _embedding(self) -> Tensor:
        weight: Tensor = self._model.get_input_embeddings().weight
        return weight

    @property
    def _last_norm(self) -> Tensor:
        weight: Tensor = self._model.base_model.norm.weight
        return weight

    def _logits(self, hidden: Tensor) -> Tensor:
        return multiply(hidden, self._head)


def _weight(layer: Any) -> Tensor:
    """The weight that a linear layer multiplies with now, adapters merged."""
    if not hasattr(layer, "get_delta_weight"):
        weight: Tensor = layer.weight
        return weight
    total: Tensor = layer.get_base_layer().weight
    for name in layer.active_adapters:
        total = total + layer.get_delta_weight(name)
    return total


def _has_the_shape(model: Any) -> bool:
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return bool(
        config.model_type in FAMILIES
        and config.hidden_act == "silu"
        and width % 16 == 0
        and getattr(config, "sliding_window", None) is None
        and "sliding_attention" not in (getattr(config, "layer_types", None) or ())
        and rope.get("rope_type", "default") in ("default", "linear", "llama3", "yarn")
        and not getattr(config, "mlp_bias", False)
        and type(model.get_output_embeddings()) is nn.Linear
        and getattr(model.base_model.layers[0].self_attn.o_proj, "bias", None) is None
    )
