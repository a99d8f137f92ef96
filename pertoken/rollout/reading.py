"""What an engine decodes with on encoder-decoder models: the encoder reads the prompt, the decoder writes.

See `Decoder`. All rows of a decoder that begin together are of one length for as long as they live, since none of them
has a prompt to begin with. So rows that were let in together stay together, with one memory of transformers' own kind
between them, and positions are what each family makes of them: relative, learned, or waves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from pertoken.forward import decode, decoder_start, encode
from pertoken.rollout.decoder import in_passes, padded


@dataclass
class _Together:
    """Rows that began at the same time."""

    slots: list[int | None]
    """Where each row stands, in the order of the memory; None: forgotten, and left out with the next step."""
    memory: EncoderDecoderCache
    read: Float[Tensor, "R L H"]
    """What the encoder made of the prompt of each row, and which of it is there."""
    mask: Tensor

    def keep(self, rows: Sequence[int]) -> None:
        """Compute these rows alone from now on, in this order; one may be there several times."""
        at = torch.tensor(rows, device=self.read.device)
        self.slots = [self.slots[row] for row in rows]
        self.memory.reorder_cache(cast(torch.LongTensor, at))
        self.read, self.mask = self.read[at], self.mask[at]


class ReadingDecoder:
    """See `Decoder`; on any encoder-decoder model of transformers that keeps its memory in an `EncoderDecoderCache`."""

    def __init__(self, model: Any, head_logits: Any) -> None:
        """head_logits: maps (model, hidden states `[A, H]`) to logits, as `policy.scoring.head_logits` does."""
        self._model, self._head_logits = model, head_logits
        self._start = decoder_start(model)
        self._cohorts: list[_Together] = []

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Nothing to do: the engine's model holds the weights."""

    def release(self) -> None:
        self._cohorts = []

    def reserve(self, slots: int, prompt: int, own: int) -> None:
        self._cohorts = []  # memory grows as it is needed

    def prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        logits = []
        for part in in_passes(prompts):
            logits.append(self._begin([prompts[k] for k in part], [slots[k] for k in part]))
        return torch.cat(logits)

    def _begin(self, prompts: Sequence[Sequence[int]], slots: Sequence[Sequence[int]]) -> Float[Tensor, "n V"]:
        device = self._model.device
        ids, mask = padded(prompts, device)
        memory = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cohort = _Together([places[0] for places in slots], memory, encode(self._model, ids, mask), mask)
        logits = self._run(cohort, torch.tensor([self._start], device=device).expand(len(prompts), -1))
        if any(len(places) > 1 for places in slots):
            cohort.keep([k for k, places in enumerate(slots) for _ in places])  # the samples of a prompt begin alike
        taken = [slot for places in slots for slot in places]
        self._forget(set(taken))
        cohort.slots = list(taken)
        self._cohorts.append(cohort)
        return logits

    def step(self, tokens: Int[Tensor, " R"]) -> Float[Tensor, "R V"]:
        live = len(tokens)
        self._forget({slot for cohort in self._cohorts for slot in cohort.slots if slot is not None and slot >= live})
        logits: Tensor | None = None
        for cohort in self._cohorts:
            if None in cohort.slots:  # the memory of all others is copied: once for all that have ended
                cohort.keep([row for row, slot in enumerate(cohort.slots) if slot is not None])
            at = torch.tensor(cohort.slots, device=tokens.device)
            found = self._run(cohort, tokens[at][:, None])
            logits = found.new_empty(live, found.shape[1]) if logits is None else logits
            logits[at] = found
        assert logits is not None
        return logits

    def move(self, source: int, target: int) -> None:
        self._forget({target})
        for cohort in self._cohorts:
            cohort.slots = [target if slot == source else slot for slot in cohort.slots]

    def _forget(self, slots: set[int]) -> None:
        """Rows in `slots` are of no use any more."""
        for cohort in self._cohorts:
            cohort.slots = [None if slot in slots else slot for slot in cohort.slots]
        self._cohorts = [cohort for cohort in self._cohorts if any(slot is not None for slot in cohort.slots)]

    def _run(self, cohort: _Together, ids: Int[Tensor, "R S"]) -> Float[Tensor, "R V"]:
        states = decode(self._model, ids, cohort.read, cohort.mask, past_key_values=cohort.memory, use_cache=True)
        logits: Tensor = self._head_logits(self._model, states[:, -1])
        return logits
