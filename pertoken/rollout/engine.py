"""Token ids in, sampled token ids out: the rollout engine on plain Hugging Face models.

The engine knows nothing of text (stop strings apart), tasks or rewards. Each distinct prompt is computed
once however many samples it gets; a row that has finished leaves the batch, and a waiting prompt takes its
place; and every token comes with its log-prob under the processed distribution that it was really drawn from. The
model's own `generation_config` is never consulted.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pertoken.errors import ConfigError
from pertoken.forward import decoder_start
from pertoken.machine.portions import Portion
from pertoken.rollout.decoder import Decoder, HFDecoder, RecomputingDecoder, agrees
from pertoken.rollout.fused import fused_decoder
from pertoken.rollout.packing import pack_linears, unpack_linears
from pertoken.rollout.reading import ReadingDecoder
from pertoken.rollout.rows import OnToken, Row, Rows
from pertoken.sampling import Controls
from pertoken.types import Completion


@runtime_checkable
class RolloutEngine(Protocol):
    """Anything that turns prompts into completions under a known version of the weights."""

    version: int

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        *,
        seeds: Sequence[int],
        taken: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion per entry of `prompts` (repeat a prompt for several samples), in that order.

        `taken`: how many tokens at the end of each prompt are the beginning of its completion already (none unless
        given); lengths and stop strings count them, and they are not in what is returned.

        Same weights, prompt, controls and seed: same tokens, whatever else is in the batch (up to the
        floating-point noise of different batch shapes).
        """
        ...

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Sample from these weights from now on; names as in `Policy.trainable()`."""
        ...

    def release(self) -> None:
        """Give up the memory that can be had again; `load_weights` comes before the next `generate`."""
        ...


class NativeEngine:
    """The engine on a Hugging Face causal or encoder-decoder LM, at most `max_rows` sequences at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        head_logits: Any,
        dtype: torch.dtype | None = None,
        max_rows: int = 64,
        context_length: int | None = None,
        mask: "NativeEngine | None" = None,
    ) -> None:
        """Sample from `model` itself (dtype None), or from an own copy of it in `dtype`.

        model: the module whose parameters `load_weights` speaks of (a PEFT model stays wrapped).
        head_logits: maps (model, hidden states `[A, H]`) to logits, as `policy.scoring.head_logits` does.
        mask: the engine of the mask policy, which is asked at each token where controls have a `Mask`; it keeps the
        weights that it was last given.
        """
        self.version = 0
        self._mask = mask
        fused = fused_decoder(model) if dtype is torch.bfloat16 else None
        self._shares_weights = dtype is None or fused is not None
        self._model = model if self._shares_weights else copy.deepcopy(model).to(dtype).requires_grad_(False)
        self._model.eval()
        if not self._shares_weights:
            pack_linears(self._model)
        self._hf = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._tokenizer = tokenizer
        self.portion = Portion("rollout", max_rows, "rows of a rollout")
        self._context = context_length or getattr(self._hf.config, "max_position_embeddings", None) or 1 << 30
        self._start = decoder_start(self._hf)
        own = ReadingDecoder if self._start else HFDecoder
        self.decoder: Decoder = fused or own(self._hf, head_logits)
        if fused is None and not agrees(self.decoder, self._hf, tolerance=1e-3 if dtype is None else 0.3):
            self.decoder = RecomputingDecoder(self._hf, head_logits)

    @property
    def reads_apart(self) -> bool:
        """Whether an encoder reads the prompt, so that nothing can be put behind a completion for the model to read."""
        return bool(self._start)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the trained parameters into the engine's model; nothing to copy if it is the policy's own."""
        copy_parameters(weights, self._model)
        if not self._shares_weights:
            pack_linears(self._model)
        self.decoder.load(weights)
        self.version = version
        if self._mask is not None:
            self._mask.load_weights({}, self._mask.version)  # it has its own, and was released with this engine

    def release(self) -> None:
        """See `RolloutEngine.release`."""
        if not self._shares_weights:
            unpack_linears(self._model)
        self.decoder.release()
        if self._mask is not None:
            self._mask.release()

    def parameters(self) -> dict[str, Tensor]:
        """The weights that it samples from, by name."""
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        *,
        seeds: Sequence[int],
        taken: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. `on_token` hears of each token at once."""
        if not prompts:
            return []
        decoders = self._decoders(controls)

        def sample(most: int) -> list[Completion]:
            rows = Rows(
                prompts, controls, seeds, device=self._hf.device, context=self._context, tokenizer=self._tokenizer,
                start=self._start, taken=taken, on_token=on_token,
            )  # fmt: skip
            slots = min(most, len(prompts))
            return _Decoding(rows, decoders, slots, self._hf.device, apart=self.reads_apart).run()

        def forget() -> None:  # a decoder keeps its rows, so that they need not be made for each call
            for decoder in decoders:
                decoder.release()
                decoder.load({})

        return self.portion.attempt(sample, there=len(prompts), least=1, undo=forget)

    def _decoders(self, controls: Controls) -> list[Decoder]:
        """The policy's, and behind it that of the mask policy if `controls` ask for one."""
        if controls.mask is None:
            return [self.decoder]
        if self._mask is None:
            raise ConfigError("these sampling controls have a mask, and this engine has no mask policy: give it one.")
        return [self.decoder, self._mask.decoder]


class _Decoding:
    """All prompts on their way to completions: live rows stand in slots 0, 1, ...; a slot that becomes free takes
    the last live row, and waiting prompts are let in behind."""

    def __init__(
        self, rows: Rows, decoders: Sequence[Decoder], slots: int, device: torch.device, *, apart: bool = False
    ) -> None:
        """decoders: whose logits `Rows.choose` takes, in its order; they all see the same tokens in the same slots.

        apart: what is let in at different times is computed apart (`ReadingDecoder`). It waits until half of the slots
        are free then: let in one by one, rows would be computed one by one.
        """
        self.rows, self.decoders, self.slots, self.device = rows, decoders, slots, device
        self.most_live = slots // 2 if apart else slots
        # Equal prompts side by side are computed once; long ones first, so that the last to run are short.
        prompts = rows.prompts
        self.waiting = deque(sorted(rows.rows, key=lambda r: (-len(prompts[r.index]), prompts[r.index], r.index)))
        self.live: list[Row] = []

    def run(self) -> list[Completion]:
        """All completions."""
        for decoder in self.decoders:
            decoder.reserve(self.slots, *self.rows.room())
        while self.waiting or self.live:
            first = len(self.live)
            places = self._admit()
            if places:  # they draw their first token before they join the others
                prompts = [self.rows.prompts[self.live[slots[0]].index] for slots in places]
                of_row = torch.tensor([k for k, slots in enumerate(places) for _ in slots], device=self.device)
                logits, *behind = (decoder.prefill(prompts, places)[of_row] for decoder in self.decoders)
                self.rows.choose(logits, self.live[first:], *behind)
                self._retire()
            if self.live:
                last = torch.tensor([row.last for row in self.live], device=self.device)
                logits, *behind = (decoder.step(last) for decoder in self.decoders)
                self.rows.choose(logits, self.live, *behind)
                self._retire()
        return [row.completion() for row in self.rows.rows]

    def _admit(self) -> list[range]:
        """Let waiting prompts into free slots: for each distinct prompt, the slots of its rows.

        A group enters together, or into whatever room there is if it is larger than all slots.
        """
        places = list[range]()
        if len(self.live) > self.most_live:
            return places
        while self.waiting:
            _, members = next(groupby(self.waiting, key=lambda row: self.rows.prompts[row.index]))
            count = min(len(list(members)), self.slots)
            if len(self.live) + count > self.slots:
                break
            places.append(range(len(self.live), len(self.live) + count))
            self.live += [self.waiting.popleft() for _ in range(count)]
        return places

    def _retire(self) -> None:
        """Free the slots of rows that have ended; those whose segment is full wait to be let in for the next one."""
        for slot in reversed([k for k, row in enumerate(self.live) if row.waits]):
            row = self.live[slot]
            if row.full:
                self.rows.turn(row)
                self.waiting.append(row)
            last = len(self.live) - 1
            if slot != last:
                for decoder in self.decoders:
                    decoder.move(last, slot)
                self.live[slot] = self.live[last]
            self.live.pop()


def copy_parameters(weights: Mapping[str, Tensor], model: Any) -> None:
    """Copy into `model` what it has of `weights` (the value head's parameters are not an engine's), save its own."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if name in own and own[name] is not value:
                own[name].copy_(value)
