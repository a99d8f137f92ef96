"""Completions on their way: each row draws its tokens with its own random numbers, records them, and ends.

The one place that decides what is drawn and when a row ends, for whatever computes the logits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pertoken import native
from pertoken.errors import ModelError
from pertoken.sampling import (
    NO_TOKEN,
    Controls,
    Segment,
    draw,
    entropy_of,
    keep_set,
    let_through,
    processed_logits,
    refuse_lost,
)
from pertoken.types import Completion, StopReason

OnToken = Callable[[int, int, float, float], None]
"""Hears of each token as it is drawn: index of its prompt, id, log-prob, entropy of the distribution (nats)."""

Drawn = tuple[Int[Tensor, " R"], Float[Tensor, " R"], Float[Tensor, " R"]]
"""Ids, their log-probs, the entropies of their distributions (nats)."""


def draw_plain(logits: Float[Tensor, "R V"], temperature: float, uniforms: Float[Tensor, " R"]) -> Drawn:
    """Ids drawn from softmax(logits / temperature), one uniform number each; the most probable one at temperature 0."""
    if logits.is_contiguous() and native.takes(logits):
        ids, logprobs, entropies = torch.ops.pertoken.sample(logits, temperature, uniforms.double())
        refuse_lost(logprobs.exp())
        return ids, logprobs, entropies
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(1)
    ids = draw(logprobs, uniforms) if temperature else logprobs.argmax(1)
    return ids, logprobs.gather(1, ids[:, None])[:, 0], entropy_of(logprobs)


@dataclass
class Row:
    """One completion on its way."""

    index: int
    """Its place in what `generate` was asked for."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    support: list[np.ndarray[Any, np.dtype[np.uint8]]] = field(default_factory=list)
    stop: StopReason | None = None
    """Why it ended; None while it goes on."""
    taken: int = 0
    """How many tokens at the end of its prompt are the beginning of the completion."""
    held: tuple[int, ...] = ()
    """What of that beginning is still to be said before anything is drawn: where prompts are read apart, it is no part
    of what a decoder is given first."""
    last: int = NO_TOKEN
    """The token that it said last, drawn or held to."""
    begun: int = 0
    """How many of `tokens` were there when its segment began: what it then stood behind is in `Rows.prompts`."""
    full: bool = False
    """Its segment has all of its tokens, and it goes on in the next one (`Rows.turn`)."""

    @property
    def count(self) -> int:
        """Tokens of the completion so far."""
        return self.taken + len(self.tokens)

    @property
    def waits(self) -> bool:
        """Whether it draws no further token behind what it stands behind now."""
        return self.full or self.stop is not None

    def completion(self) -> Completion:
        assert self.stop is not None
        support = np.stack(self.support) if self.support else None
        return Completion(self.tokens, self.logprobs, self.stop, support, self.entropies)


class Rows:
    """All completions of one call of `generate`."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        controls: Controls,
        seeds: Sequence[int],
        *,
        device: torch.device,
        context: int,
        tokenizer: Any,
        start: Sequence[int] = (),
        taken: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        """context: most tokens that a row may have, prompt included. tokenizer: makes text of ids, for stop strings.
        start: what completions stand behind where prompts are read apart from them (`decoder_start`); then the context
        holds it, and each prompt by itself. taken: see `RolloutEngine.generate`; behind `start` these tokens are said
        one by one before any is drawn.

        Raises ModelError for a prompt that is empty or fills the context, or leaves less than a segment needs.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
        sampling = controls.sampling
        if start and sampling.segment:
            raise ValueError("an encoder-decoder model writes completions from their beginning: no segments")
        self.rows = [Row(index, taken=count) for index, count in enumerate(taken or [0] * len(prompts))]
        self._given, most = [tuple(prompt) for prompt in prompts], context - sampling.least_room
        for prompt, row in zip(prompts, self.rows, strict=True):
            row.held = tuple(prompt[len(prompt) - row.taken :]) if start else ()
            length = len(prompt) - (row.taken if sampling.segment or start else 0)
            if not prompt or length > most:
                raise ModelError(
                    f"a prompt has {length} tokens; this model takes 1 to {most}, room to answer included. "
                    "Shorten the prompt template or leave long items out (rollout.max_prompt_tokens)."
                )
        self.controls, self.budget = controls, sampling.max_new_tokens
        self._device, self._context, self._tokenizer = device, context, tokenizer
        self._start, self._tell = start, on_token
        self._uniforms = torch.stack([_uniforms(seed, self.budget) for seed in seeds])
        self._eos = torch.tensor(controls.eos_ids or (NO_TOKEN,), device=device)
        self.prompts = [self._behind(row) for row in self.rows]
        """What each row's segment stands behind; without segments its prompt, without what it is held to."""

    def room(self) -> tuple[int, int]:
        """The longest prompt that a decoder will be given, and how many tokens may follow one."""
        longest, shortest, segment = max(map(len, self.prompts)), min(map(len, self.prompts)), self._segment
        own = min(self.budget, self._context - shortest)
        if segment is None:
            return longest, own
        sources = (len(given) - row.taken for given, row in zip(self._given, self.rows, strict=True))
        return max(longest, max(sources) + min(segment.context, self.budget)), min(own, segment.tokens)

    def turn(self, row: Row) -> None:
        """Begin the next segment of a row whose segment is full: `prompts` has what it stands behind."""
        self.prompts[row.index] = self._behind(row)
        row.begun, row.full = len(row.tokens), False

    def _behind(self, row: Row) -> tuple[int, ...]:
        given = self._given[row.index]
        if self._segment is None:
            return given[: len(given) - len(row.held)]
        source, text = given[: len(given) - row.taken], (*given[len(given) - row.taken :], *row.tokens)
        return (*source, *text[self._segment.seen_from(row.count) :])

    @property
    def _segment(self) -> Segment | None:
        return self.controls.sampling.segment

    def choose(
        self, logits: Float[Tensor, "R V"], rows: Sequence[Row], mask_logits: Float[Tensor, "R V"] | None = None
    ) -> Int[Tensor, " R"]:
        """Draw one token for each of `rows` and record it with its log-prob, entropy and kept set; the ids.

        A row that is held to a beginning says the next token of that instead, and nothing of it is recorded.
        mask_logits: those of the mask policy, where the controls have a mask.
        """
        ids, logprobs, entropies, support = self._draw(logits, rows, mask_logits)
        by_eos = torch.isin(ids, self._eos).tolist()
        columns = (ids.tolist(), logprobs.tolist(), entropies.tolist(), by_eos)
        for k, (row, token, logprob, nats, ended) in enumerate(zip(rows, *columns, strict=True)):
            if row.held:
                row.last, *rest = row.held
                row.held, ids[k] = tuple(rest), row.last
                continue
            row.last = token
            row.tokens.append(token)
            row.logprobs.append(logprob)
            row.entropies.append(nats)
            if support is not None:
                row.support.append(support[k])
            if self._tell is not None:
                self._tell(row.index, token, logprob, nats)
            row.stop = self._end(row, ended)
            row.full = row.stop is None and self._ends_segment(row)
        return ids

    def _draw(
        self, logits: Float[Tensor, "R V"], rows: Sequence[Row], mask_logits: Float[Tensor, "R V"] | None
    ) -> tuple[Tensor, Tensor, Tensor, np.ndarray[Any, np.dtype[np.uint8]] | None]:
        """Ids, their log-probs, the entropies, and the kept sets where a control truncates."""
        sampling, device = self.controls.sampling, logits.device
        uniforms = torch.stack([self._uniforms[row.index, len(row.tokens)] for row in rows]).to(device)
        if self.controls.only_temperature:
            return *draw_plain(logits, sampling.temperature, uniforms), None
        taken = torch.tensor([row.count for row in rows], device=device)
        history = self._history(rows)
        z = processed_logits(logits, self.controls, taken, history)
        if self.controls.mask is not None and mask_logits is not None:
            # By the same bans as the policy: something that it may say is always let through.
            masking = processed_logits(mask_logits, self.controls, taken, history)
            z = z.masked_fill(~let_through(masking, self.controls.mask, self.controls.eos_ids), -torch.inf)
        keep = keep_set(z, sampling) if self.controls.truncates and not sampling.greedy else None
        logprobs = (z if keep is None else z.masked_fill(~keep, -torch.inf)).log_softmax(1)
        ids = logprobs.argmax(1) if sampling.greedy else draw(logprobs, uniforms)
        support = None if keep is None else np.packbits(keep.cpu().numpy(), axis=1)
        return ids, logprobs.gather(1, ids[:, None])[:, 0], entropy_of(logprobs), support

    def _history(self, rows: Sequence[Row]) -> Int[Tensor, "R L"] | None:
        if not self.controls.needs_history:
            return None
        # What is said behind a source has it in front, as if the prompt had been gone on with.
        before = self._given if self._start else self.prompts
        texts = [[*before[row.index], *row.tokens[row.begun :]] for row in rows]
        width = max(map(len, texts))
        return torch.tensor([[NO_TOKEN] * (width - len(ids)) + ids for ids in texts], device=self._device)

    def _end(self, row: Row, by_eos: bool) -> StopReason | None:
        """Why the last token of `row` ends it, if it does."""
        sampling, count = self.controls.sampling, row.count
        if by_eos:
            return "eos"
        if sampling.stop and count >= sampling.min_new_tokens and self._says_stop(row):
            return "stop_string"
        begun = len(self._start) + row.taken if self._start else len(self.prompts[row.index])
        width = begun + len(row.tokens) - row.begun
        if width >= self._context and not self._ends_segment(row):
            return "context"
        return "length" if count >= self.budget else None

    def _ends_segment(self, row: Row) -> bool:
        return self._segment is not None and row.count % self._segment.tokens == 0

    def _says_stop(self, row: Row) -> bool:
        prompt = self._given[row.index]
        tokens = [*prompt[len(prompt) - row.taken :], *row.tokens]
        # A token adds at least one character, save for pieces of a multi-byte one: 4 per character is enough.
        longest = max(map(len, self.controls.sampling.stop))
        tail = self._tokenizer.decode(
            tokens[-(4 * longest + 4) :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return any(stop in tail for stop in self.controls.sampling.stop)


def _uniforms(seed: int, count: int) -> Float[Tensor, " T"]:
    """The random numbers of one sample: a function of its seed alone."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
