"""Token ids in, sampled token ids out: the rollout engine on plain Hugging Face models.

The engine knows nothing of text (stop strings apart), tasks or rewards. Each distinct prompt is computed
once however many samples it gets; a row that has finished leaves the batch, and a waiting prompt takes its
place; and every token comes with its log-prob under the processed distribution that it was really drawn from. The
model's own `generation_config` is never consulted.
"""

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pertoken.errors import ModelError
from pertoken.rollout.decoder import Decoder, HFDecoder, RecomputingDecoder, agrees
from pertoken.rollout.fused import fused_decoder
from pertoken.sampling import NO_TOKEN, Controls, draw, entropy_of, keep_set, processed_logits
from pertoken.types import Completion, StopReason

OnToken = Callable[[int, int, float, float], None]
"""Hears of each token as it is drawn: index of its prompt, id, log-prob, entropy of the distribution (nats)."""


@runtime_checkable
class RolloutEngine(Protocol):
    """Anything that turns prompts into completions under a known version of the weights."""

    version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], controls: Controls, *, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per entry of `prompts` (repeat a prompt for several samples), in that order.

        Same weights, prompt, controls and seed: same tokens, whatever else is in the batch (up to the
        floating-point noise of different batch shapes).
        """
        ...

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Sample from these weights from now on; names as in `Policy.trainable()`."""
        ...


class NativeEngine:
    """The engine on a Hugging Face causal LM, at most `max_rows` sequences at a time."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        head_logits: Any,
        dtype: torch.dtype | None = None,
        max_rows: int = 64,
        context_length: int | None = None,
    ) -> None:
        """Sample from `model` itself (dtype None), or from an own copy of it in `dtype`.

        model: the module whose parameters `load_weights` speaks of (a PEFT model stays wrapped).
        head_logits: maps (model, hidden states `[A, H]`) to logits, as `policy.scoring.head_logits` does.
        """
        self.version = 0
        fused = fused_decoder(model) if dtype is torch.bfloat16 else None
        self._shares_weights = dtype is None or fused is not None
        self._model = model if self._shares_weights else copy.deepcopy(model).to(dtype).requires_grad_(False)
        self._model.eval()
        self._hf = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._tokenizer = tokenizer
        self._max_rows = max_rows
        self._context = context_length or getattr(self._hf.config, "max_position_embeddings", None) or 1 << 30
        self.decoder: Decoder = fused or HFDecoder(self._hf, head_logits)
        if fused is None and not agrees(self.decoder, self._hf, tolerance=1e-3 if dtype is None else 0.3):
            self.decoder = RecomputingDecoder(self._hf, head_logits)

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the trained parameters into the engine's model; nothing to copy if it is the policy's own."""
        if not self._shares_weights:
            own = dict(self._model.named_parameters())
            with torch.no_grad():
                for name, value in weights.items():
                    if name in own:  # the value head's parameters are not the engine's
                        own[name].copy_(value)
        self.decoder.load(weights)
        self.version = version

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        *,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
    ) -> list[Completion]:
        """See `RolloutEngine.generate`. `on_token` hears of each token at once."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        for prompt in prompts:
            if not prompt or len(prompt) >= self._context:
                raise ModelError(
                    f"a prompt has {len(prompt)} tokens; this model takes 1 to {self._context - 1}, room to "
                    "answer included. Shorten the prompt template or leave long items out (rollout.max_prompt_tokens)."
                )
        if not prompts:
            return []
        return _Decoding(self, prompts, controls, seeds, on_token).run()

    @property
    def device(self) -> torch.device:
        device: torch.device = self._hf.device
        return device

    @property
    def context(self) -> int:
        return int(self._context)

    @property
    def max_rows(self) -> int:
        return self._max_rows

    def decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


@dataclass
class _Row:
    """One completion on its way."""

    index: int
    """Its place in what `generate` was asked for."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    support: list[np.ndarray[Any, np.dtype[np.uint8]]] = field(default_factory=list)
    stop: StopReason = "length"

    def completion(self) -> Completion:
        support = np.stack(self.support) if self.support else None
        return Completion(self.tokens, self.logprobs, self.stop, support, self.entropies)


class _Decoding:
    """All prompts on their way to completions: live rows stand in slots 0, 1, ...; a slot that becomes free takes
    the last live row, and waiting prompts are let in behind."""

    def __init__(
        self,
        engine: NativeEngine,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        seeds: Sequence[int],
        tell: OnToken | None,
    ) -> None:
        self.engine, self.decoder, self.controls, self.tell = engine, engine.decoder, controls, tell
        self.prompts = [tuple(prompt) for prompt in prompts]
        self.budget = controls.sampling.max_new_tokens
        self.uniforms = torch.stack([_uniforms(seed, self.budget) for seed in seeds])
        self.eos = torch.tensor(controls.eos_ids or (NO_TOKEN,), device=engine.device)
        # Equal prompts side by side are computed once; long ones first, so that the last to run are short.
        order = sorted(range(len(prompts)), key=lambda i: (-len(self.prompts[i]), self.prompts[i], i))
        self.waiting = deque(order)
        self.live: list[_Row] = []
        self.done: dict[int, Completion] = {}

    def run(self) -> list[Completion]:
        longest = max(map(len, self.prompts))
        slots = min(self.engine.max_rows, len(self.prompts))
        self.decoder.reserve(slots, longest, min(self.budget, self.engine.context - min(map(len, self.prompts))))
        while self.waiting or self.live:
            fresh = self._admit(slots)
            if fresh:  # they draw their first token before they join the others
                first = len(self.live) - sum(count for _, count in fresh)
                self._choose(torch.cat([logits.expand(count, -1) for logits, count in fresh]), self.live[first:])
                self._retire()
            if self.live:
                last = torch.tensor([row.tokens[-1] for row in self.live], device=self.engine.device)
                self._choose(self.decoder.step(last), self.live)
                self._retire()
        return [self.done[i] for i in range(len(self.prompts))]

    def _admit(self, slots: int) -> list[tuple[Float[Tensor, "1 V"], int]]:
        """Let waiting prompts into free slots: the logits behind each distinct prompt, and how many rows take it.

        A group enters together, or into whatever room there is if it is larger than all slots.
        """
        fresh = []
        while self.waiting:
            _, members = next(groupby(self.waiting, key=lambda i: self.prompts[i]))
            group = list(members)[:slots]
            if len(self.live) + len(group) > slots:
                break
            places = range(len(self.live), len(self.live) + len(group))
            self.live += [_Row(self.waiting.popleft()) for _ in group]
            fresh.append((self.decoder.prefill(self.prompts[group[0]], places)[None], len(group)))
        return fresh

    def _choose(self, logits: Float[Tensor, "R V"], rows: Sequence[_Row]) -> None:
        """Draw one token for each of `rows` and record it with its log-prob, entropy and kept set."""
        ids, logprobs, entropies, support = self._draw(logits, rows)
        by_eos = torch.isin(ids, self.eos).tolist()
        columns = (ids.tolist(), logprobs.tolist(), entropies.tolist(), by_eos)
        for k, (row, token, logprob, nats, ended) in enumerate(zip(rows, *columns, strict=True)):
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.entropies.append(nats)
            if support is not None:
                row.support.append(support[k])
            if self.tell is not None:
                self.tell(row.index, token, logprob, nats)
            self._note_end(row, ended)

    def _draw(
        self, logits: Float[Tensor, "R V"], rows: Sequence[_Row]
    ) -> tuple[Tensor, Tensor, Tensor, np.ndarray[Any, np.dtype[np.uint8]] | None]:
        """Ids, their log-probs, the entropies, and the kept sets where a control truncates."""
        sampling, device = self.controls.sampling, logits.device
        uniforms = torch.stack([self.uniforms[row.index, len(row.tokens)] for row in rows]).to(device)
        if self.controls.only_temperature and not sampling.greedy:
            return *self.decoder.draw(logits, sampling.temperature, uniforms), None
        taken = torch.tensor([len(row.tokens) for row in rows], device=device)
        z = processed_logits(logits, self.controls, taken, self._history(rows))
        keep = None if sampling.greedy else keep_set(z, sampling)
        logprobs = (z if keep is None else z.masked_fill(~keep, -torch.inf)).log_softmax(1)
        ids = logprobs.argmax(1) if sampling.greedy else draw(logprobs, uniforms)
        support = None if keep is None else np.packbits(keep.cpu().numpy(), axis=1)
        return ids, logprobs.gather(1, ids[:, None])[:, 0], entropy_of(logprobs), support

    def _history(self, rows: Sequence[_Row]) -> Int[Tensor, "R L"] | None:
        if not self.controls.needs_history:
            return None
        return _left_padded([[*self.prompts[row.index], *row.tokens] for row in rows], self.engine.device)

    def _note_end(self, row: _Row, by_eos: bool) -> None:
        """Take the row off the decoder's hands if its last token ends it."""
        sampling, count = self.controls.sampling, len(row.tokens)
        if by_eos:
            row.stop = "eos"
        elif sampling.stop and count >= sampling.min_new_tokens and self._says_stop(row.tokens):
            row.stop = "stop_string"
        elif len(self.prompts[row.index]) + count >= self.engine.context:
            row.stop = "context"
        elif count < self.budget:
            return
        self.done[row.index] = row.completion()

    def _retire(self) -> None:
        """Free the slots of rows that have ended."""
        for slot in reversed([k for k, row in enumerate(self.live) if row.index in self.done]):
            last = len(self.live) - 1
            if slot != last:
                self.decoder.move(last, slot)
                self.live[slot] = self.live[last]
            self.live.pop()

    def _says_stop(self, tokens: list[int]) -> bool:
        # A token adds at least one character, save for pieces of a multi-byte one: 4 per character is enough.
        longest = max(map(len, self.controls.sampling.stop))
        tail = self.engine.decode(tokens[-(4 * longest + 4) :])
        return any(stop in tail for stop in self.controls.sampling.stop)


def _uniforms(seed: int, count: int) -> Float[Tensor, " T"]:
    """The random numbers of one sample: a function of its seed alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _left_padded(rows: list[list[int]], device: torch.device) -> Int[Tensor, "R L"]:
    width = max(map(len, rows))
    return torch.tensor([[NO_TOKEN] * (width - len(row)) + row for row in rows], device=device)
