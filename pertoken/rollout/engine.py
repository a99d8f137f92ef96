"""Token ids in, sampled token ids out: the rollout engine on plain Hugging Face models.

The engine knows nothing of text (stop strings apart), tasks or rewards. Each distinct prompt is computed
once however many samples it gets; keys and values are cached; a row that has finished leaves the batch; and
every token comes with its log-prob under the processed distribution that it was really drawn from. The
model's own `generation_config` is never consulted.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from pertoken.errors import ModelError
from pertoken.sampling import NO_TOKEN, Controls, draw, keep_set, processed_logits
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


class HFEngine:
    """The engine on a Hugging Face causal LM, `max_rows` sequences at a time."""

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
        self._shares_weights = dtype is None
        self._model = model if dtype is None else copy.deepcopy(model).to(dtype).requires_grad_(False)
        self._model.eval()
        self._hf = self._model.get_base_model() if hasattr(self._model, "get_base_model") else self._model
        self._tokenizer = tokenizer
        self._head_logits = head_logits
        self._max_rows = max_rows
        self._context = context_length or getattr(self._hf.config, "max_position_embeddings", None) or 1 << 30

    def load_weights(self, weights: Mapping[str, Tensor], version: int) -> None:
        """Copy the trained parameters into the engine's model; nothing to copy if it is the policy's own."""
        if not self._shares_weights:
            own = dict(self._model.named_parameters())
            with torch.no_grad():
                for name, value in weights.items():
                    if name in own:  # the value head's parameters are not the engine's
                        own[name].copy_(value)
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
        # Prompts of like length side by side waste little padding; equal prompts must not be torn apart.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), tuple(prompts[i]), i))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self._max_rows):
            part = order[start : start + self._max_rows]
            tell = _renumbered(on_token, part) if on_token else None
            batch = _Decoding(self, [list(prompts[i]) for i in part], controls, [seeds[i] for i in part], tell)
            done.update(zip(part, batch.run(), strict=True))
        return [done[i] for i in range(len(prompts))]

    def forward(self, **inputs: Any) -> Any:
        return self._hf.base_model(use_cache=True, return_dict=True, **inputs)

    def logits(self, hidden: Float[Tensor, "A H"]) -> Float[Tensor, "A V"]:
        logits: Tensor = self._head_logits(self._hf, hidden)
        return logits

    @property
    def device(self) -> torch.device:
        device: torch.device = self._hf.device
        return device

    @property
    def context(self) -> int:
        return int(self._context)

    def decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class _Decoding:
    """One batch on its way from prompts to completions. Arrays over rows shrink as rows finish."""

    def __init__(
        self,
        engine: HFEngine,
        prompts: list[list[int]],
        controls: Controls,
        seeds: list[int],
        tell: OnToken | None,
    ) -> None:
        self.engine, self.prompts, self.controls, self.tell = engine, prompts, controls, tell
        budget = controls.sampling.max_new_tokens
        self.uniforms = torch.stack([_uniforms(seed, budget) for seed in seeds]).to(engine.device)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.entropies: list[list[float]] = [[] for _ in prompts]
        self.support: list[list[np.ndarray[Any, np.dtype[np.uint8]]]] = [[] for _ in prompts]
        self.stop: list[StopReason] = ["length"] * len(prompts)

    def run(self) -> list[Completion]:
        eos = torch.tensor(self.controls.eos_ids or (NO_TOKEN,), device=self.engine.device)
        logits, cache, visible, position = self._prefill()
        alive = torch.arange(len(self.prompts), device=self.engine.device)
        history = _left_padded(self.prompts, self.engine.device) if self.controls.needs_history else None
        for step in range(self.controls.sampling.max_new_tokens):
            chosen = self._choose(logits, alive, step, history)
            finished = torch.isin(chosen, eos)
            finished |= self._stops(alive, chosen, finished, position)
            if bool(finished.all()) or step + 1 == self.controls.sampling.max_new_tokens:
                break
            if bool(finished.any()):
                keep = (~finished).nonzero().squeeze(1)
                alive, chosen, position, visible = alive[keep], chosen[keep], position[keep], visible[keep]
                history = None if history is None else history[keep]
                cache.batch_select_indices(keep)
            if history is not None:
                history = torch.cat([history, chosen[:, None]], 1)
            visible = torch.cat([visible, torch.ones_like(visible[:, :1])], 1)
            output = self.engine.forward(
                input_ids=chosen[:, None],
                position_ids=position[:, None],
                attention_mask=visible[:, None, None, :],
                past_key_values=cache,
            )
            position = position + 1
            logits = self.engine.logits(output.last_hidden_state[:, -1])
        return [
            Completion(t, lp, stop, np.stack(kept) if kept else None, entropies)
            for t, lp, stop, kept, entropies in zip(
                self.tokens, self.logprobs, self.stop, self.support, self.entropies, strict=True
            )
        ]

    def _prefill(self) -> tuple[Float[Tensor, "B V"], DynamicCache, Bool[Tensor, "B L"], Int[Tensor, " B"]]:
        """Compute each distinct prompt once; then give every row its prompt's logits, keys and values."""
        distinct = list(dict.fromkeys(map(tuple, self.prompts)))
        index = {prompt: n for n, prompt in enumerate(distinct)}
        row_of = torch.tensor([index[tuple(p)] for p in self.prompts], device=self.engine.device)
        ids = _left_padded([list(p) for p in distinct], self.engine.device)
        real = ids != NO_TOKEN
        position = (real.long().cumsum(1) - 1).clamp_min(0)
        cache = DynamicCache()
        output = self.engine.forward(
            input_ids=ids.clamp_min(0), position_ids=position, attention_mask=real, past_key_values=cache
        )
        logits = self.engine.logits(output.last_hidden_state[:, -1])
        cache.batch_select_indices(row_of)
        return logits[row_of], cache, real[row_of], position[row_of, -1] + 1

    def _choose(self, logits: Tensor, alive: Tensor, step: int, history: Tensor | None) -> Int[Tensor, " R"]:
        """Draw one token per live row and record it with its log-prob (and kept set)."""
        sampling = self.controls.sampling
        z = processed_logits(logits, self.controls, torch.full_like(alive, step), history)
        keep = None if sampling.greedy else keep_set(z, sampling)
        logprobs = (z if keep is None else z.masked_fill(~keep, -torch.inf)).log_softmax(1)
        chosen = logprobs.argmax(1) if sampling.greedy else draw(logprobs, self.uniforms[alive, step])
        taken = logprobs.gather(1, chosen[:, None]).squeeze(1)
        entropy = -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(1)
        packed = None if keep is None else np.packbits(keep.cpu().numpy(), axis=1)
        columns = zip(alive.tolist(), chosen.tolist(), taken.tolist(), entropy.tolist(), strict=True)
        for k, (b, token, logprob, nats) in enumerate(columns):
            self.tokens[b].append(token)
            self.logprobs[b].append(logprob)
            self.entropies[b].append(nats)
            if packed is not None:
                self.support[b].append(packed[k])
            if self.tell is not None:
                self.tell(b, token, logprob, nats)
        return chosen

    def _stops(self, alive: Tensor, chosen: Tensor, ended: Tensor, position: Tensor) -> Bool[Tensor, " R"]:
        """Record why rows end now; True for those that a stop string or the context's end stops."""
        sampling = self.controls.sampling
        more = torch.zeros_like(ended)
        full = (position + 1 >= self.engine.context).tolist()
        for k, (b, by_eos) in enumerate(zip(alive.tolist(), ended.tolist(), strict=True)):
            if by_eos:
                self.stop[b] = "eos"
            elif sampling.stop and len(self.tokens[b]) >= sampling.min_new_tokens and self._says_stop(self.tokens[b]):
                self.stop[b], more[k] = "stop_string", True
            elif full[k]:
                self.stop[b], more[k] = "context", True
        return more

    def _says_stop(self, tokens: list[int]) -> bool:
        # A token adds at least one character, save for pieces of a multi-byte one: 4 per character is enough.
        longest = max(map(len, self.controls.sampling.stop))
        tail = self.engine.decode(tokens[-(4 * longest + 4) :])
        return any(stop in tail for stop in self.controls.sampling.stop)


def _renumbered(on_token: OnToken, places: list[int]) -> OnToken:
    return lambda k, token, logprob, entropy: on_token(places[k], token, logprob, entropy)


def _uniforms(seed: int, count: int) -> Float[Tensor, " T"]:
    """The random numbers of one sample: a function of its seed alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _left_padded(rows: list[list[int]], device: torch.device) -> Int[Tensor, "R L"]:
    width = max(map(len, rows))
    return torch.tensor([[NO_TOKEN] * (width - len(row)) + row for row in rows], device=device)
