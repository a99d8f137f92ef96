"""The distribution that tokens are drawn from: one definition for the rollout and for every scoring pass.

A sampled token does not come from `softmax(logits)` but from the *processed* distribution: penalties, bans,
temperature and truncation included. The rollout engine draws from `processed_logits` + `keep_set`; scoring
passes rebuild the same logits (with gradient) and take the stored kept set, so that the ratio of scored to
sampled probability is 1 before the first update, for every control.

Order of the controls, as in Hugging Face `generate`: repetition penalty, no-repeat n-gram, banned words,
minimum length, temperature, top-k, top-p, min-p. "History" means prompt and output, as it does there. Before top-k
comes what a mask policy lets through, where there is one.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pertoken.errors import NumericsError

NO_TOKEN = -1
"""Fills the left of a history shorter than the widest one."""


class Segment(BaseModel):
    """Write a completion by segments, each behind the prompt and the end of what was written before it: no pass of the
    model holds more than that, however long the completion becomes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tokens: int = Field(ge=1)
    """Tokens of a segment; the last one of a completion may have fewer."""
    context: int = Field(ge=0)
    """Tokens of the completion before a segment that it sees, right behind the prompt."""

    def seen_from(self, count: int) -> int:
        """The first token of a completion (from 0) that stands behind the prompt when its token `count` is chosen.

        >>> [Segment(tokens=4, context=2).seen_from(count) for count in (0, 3, 4, 7, 8)]
        [0, 0, 2, 2, 6]
        """
        return max(count - count % self.tokens - self.context, 0)


class Sampling(BaseModel):
    """How tokens are drawn. The defaults are the plain distribution of the model: softmax(logits)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    temperature: float = Field(default=1.0, ge=0.0, le=100.0)
    """Divides the logits. 0 means greedy decoding: for evaluation only, since a greedy token has no density."""
    top_k: int = Field(default=0, ge=0)
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Keep the smallest set of most probable tokens whose mass reaches p; 1 keeps all."""
    min_p: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Keep tokens with at least min_p times the probability of the most probable one; 0 keeps all."""
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    """Divide positive (multiply negative) logits of tokens already in prompt or output by this; 1 is off."""
    no_repeat_ngram: int = Field(default=0, ge=0)
    """Forbid tokens that complete an n-gram already in prompt or output; 0 is off."""
    min_new_tokens: int = Field(default=0, ge=0)
    """Forbid the end of the sequence before this many tokens; stop strings are not looked for before it either."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Cut a completion off after this many tokens (it then counts as truncated, not as terminated)."""
    banned_words: tuple[str, ...] = ()
    """Words never to be written, with or without a space before them."""
    stop: tuple[str, ...] = ()
    """Strings that end the completion; the token that completes one is kept and is the last action."""
    segment: Segment | None = None
    """Write completions by segments, in a context of bounded length, and learn from them so; null keeps each completion
    in one context. Penalties and n-grams then look at what the segment sees."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "Sampling":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        if any(not text for text in (*self.stop, *self.banned_words)):
            raise ValueError("an empty string can neither be a stop string nor a banned word")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """True if some control removes tokens by their rank or probability."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def window(self) -> int:
        """Most tokens of a completion that stand behind its prompt at once."""
        if self.segment is None:
            return self.max_new_tokens
        return min(self.segment.tokens + self.segment.context, self.max_new_tokens)

    @property
    def least_room(self) -> int:
        """Tokens that must fit behind a prompt: all of a segment and what it sees; without segments a first one."""
        return 1 if self.segment is None else self.window

    def untruncated(self, **changes: float) -> "Sampling":
        """The same without top-k, top-p and min-p: for episodes that come without kept sets, and are not scored."""
        return self.model_copy(update={"top_k": 0, "top_p": 1.0, "min_p": 0.0, **changes})


@dataclass(frozen=True)
class Mask:
    """What a second model, the mask policy, lets through of the policy's distribution (NLPO)."""

    top_p: float
    """Its most probable tokens, the smallest set whose mass reaches this, ..."""
    least: int = 1
    """... but at least so many."""


@dataclass(frozen=True)
class Controls:
    """`Sampling` resolved for one tokenizer: ids instead of strings. Travels with every batch."""

    sampling: Sampling = field(default_factory=Sampling)
    eos_ids: tuple[int, ...] = ()
    banned_ids: tuple[tuple[int, ...], ...] = ()
    mask: Mask | None = None
    """How the engine's mask policy restricts the distribution; None asks no other model."""

    @classmethod
    def resolve(cls, sampling: Sampling, tokenizer: Any, eos_ids: tuple[int, ...]) -> "Controls":
        """Controls for `tokenizer`; a banned word becomes each id sequence it is written with."""
        spellings = [form for word in sampling.banned_words for form in (word, " " + word)]
        sequences = {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in spellings}
        return cls(sampling, eos_ids, tuple(sorted(s for s in sequences if s)))

    @property
    def truncates(self) -> bool:
        """True if tokens are removed by their rank or probability, in whatever model, so that kept sets are stored."""
        return self.mask is not None or self.sampling.truncates

    @property
    def only_temperature(self) -> bool:
        """True if the processed distribution is softmax(logits / temperature) at every place."""
        s = self.sampling
        return not (self.truncates or s.min_new_tokens or s.no_repeat_ngram or self.banned_ids or self.needs_history)

    @property
    def needs_history(self) -> bool:
        s = self.sampling
        return s.repetition_penalty != 1.0 or s.no_repeat_ngram > 0 or any(len(ids) > 1 for ids in self.banned_ids)


def processed_logits(
    logits: Float[Tensor, "A V"],
    controls: Controls,
    num_generated: Int[Tensor, " A"],
    history: Int[Tensor, "A L"] | None = None,
) -> Float[Tensor, "A V"]:
    """Logits after penalties, bans and temperature, in float32; forbidden tokens are -inf. Differentiable.

    num_generated: how many tokens of the completion precede this draw.
    history: ids of prompt and output before this draw, right-aligned, `NO_TOKEN` on the left; needed only
    where `controls.needs_history`. Greedy (temperature 0) leaves the temperature at 1.
    """
    s, z = controls.sampling, logits.float()
    if controls.needs_history:
        if history is None:
            raise ValueError("these sampling controls depend on the history: pass it")
        if s.repetition_penalty != 1.0:
            seen = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device)
            seen.scatter_(1, torch.where(history == NO_TOKEN, z.shape[1], history), True)
            penalised = torch.where(z > 0, z / s.repetition_penalty, z * s.repetition_penalty)
            z = torch.where(seen[:, :-1], penalised, z)
    banned = _banned(controls, num_generated, history, z.shape[1])
    if banned is not None:
        z = z.masked_fill(banned, -torch.inf)
    return z if s.temperature in (0.0, 1.0) else z / s.temperature


def _banned(
    controls: Controls, num_generated: Int[Tensor, " A"], history: Int[Tensor, "A L"] | None, vocab: int
) -> Bool[Tensor, "A V"] | None:
    s = controls.sampling
    if not (s.no_repeat_ngram or s.min_new_tokens or controls.banned_ids):
        return None
    banned = torch.zeros(num_generated.shape[0], vocab + 1, dtype=torch.bool, device=num_generated.device)
    if s.min_new_tokens:
        early = num_generated < s.min_new_tokens
        for eos in controls.eos_ids:
            banned[:, eos] |= early
    for ids in controls.banned_ids:
        banned[:, ids[-1]] |= _ends_with(history, ids[:-1], num_generated)
    if s.no_repeat_ngram and history is not None and history.shape[1] >= s.no_repeat_ngram:
        n = s.no_repeat_ngram
        windows = history.unfold(1, n, 1)  # [A, L - n + 1, n]
        context = history[:, history.shape[1] - (n - 1) :]
        repeats = (windows[:, :, : n - 1] == context[:, None, :]).all(-1) & (windows[:, :, 0] != NO_TOKEN)
        banned.scatter_(1, torch.where(repeats, windows[:, :, -1], vocab), True)
    return banned[:, :-1]


def _ends_with(
    history: Int[Tensor, "A L"] | None, ids: tuple[int, ...], num_generated: Int[Tensor, " A"]
) -> Bool[Tensor, " A"]:
    if not ids:
        return torch.ones_like(num_generated, dtype=torch.bool)
    if history is None or history.shape[1] < len(ids):
        return torch.zeros_like(num_generated, dtype=torch.bool)
    tail = torch.tensor(ids, device=history.device)
    return (history[:, -len(ids) :] == tail).all(1)


def let_through(z: Float[Tensor, "A V"], mask: Mask, eos_ids: tuple[int, ...]) -> Bool[Tensor, "A V"]:
    """Tokens that the mask policy lets through, of its own processed logits; the end of the text always is.

    NLPO: Ramamurthy et al. 2022, https://arxiv.org/abs/2210.01241, sec. 4.

    >>> let_through(torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log(), Mask(top_p=0.8), eos_ids=(3,))
    tensor([[ True,  True, False,  True]])
    """
    allowed = keep_set(z, Sampling(top_p=mask.top_p))
    allowed |= z >= z.topk(min(mask.least, z.shape[1]), dim=1).values[:, -1:]
    allowed[:, list(eos_ids)] = True
    return allowed


def keep_set(z: Float[Tensor, "A V"], sampling: Sampling) -> Bool[Tensor, "A V"]:
    """Tokens that top-k, top-p and min-p leave, applied in this order, of those that are possible.

    Ties at the edge follow Hugging Face: top-k keeps every token equal to the k-th.
    """
    z = z.detach()
    if 0 < sampling.top_k < z.shape[1]:
        kth = z.topk(sampling.top_k, dim=1).values[:, -1:]
        z = z.masked_fill(z < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ascending, order = z.sort(dim=1)
        below = ascending.softmax(1).cumsum(1) <= 1.0 - sampling.top_p
        below[:, -1] = False
        z = z.masked_fill(torch.zeros_like(below).scatter(1, order, below), -torch.inf)
    if sampling.min_p > 0.0:
        probs = z.softmax(1)
        z = z.masked_fill(probs < sampling.min_p * probs.max(1, keepdim=True).values, -torch.inf)
    return z > -torch.inf


def draw(logprobs: Float[Tensor, "A V"], uniform: Float[Tensor, " A"]) -> Int[Tensor, " A"]:
    """One token per row by inverse CDF of `exp(logprobs)`, from one uniform number in [0, 1) per row.

    One number per row, instead of V, makes a row's tokens independent of which rows share its batch.
    Works in two levels (blocks, then inside the block), so float32 rounding cannot reach a token of
    probability 0. Raises NumericsError where there is no distribution to draw from.
    """
    rows, vocab = logprobs.shape
    width = 256
    probs = torch.nn.functional.pad(logprobs.exp(), (0, -vocab % width)).view(rows, -1, width)
    cumulative = probs.sum(2, dtype=torch.float64).cumsum(1)
    refuse_lost(cumulative[:, -1])
    point = uniform.double() * cumulative[:, -1]
    block = (cumulative <= point[:, None]).sum(1).clamp_max(cumulative.shape[1] - 1)
    everyone = torch.arange(rows, device=logprobs.device)
    inside = probs[everyone, block].double()
    rest = point - (cumulative[everyone, block] - inside.sum(1))
    index = (inside.cumsum(1) <= rest[:, None]).sum(1)
    last_possible = torch.where(inside > 0, torch.arange(width, device=inside.device), -1).max(1).values
    return block * width + torch.minimum(index, last_possible)


def entropy_of(logprobs: Float[Tensor, "A V"]) -> Float[Tensor, " A"]:
    """Entropy of each row in nats; tokens of probability 0 (log-prob -inf) add nothing.

    >>> entropy_of(torch.tensor([[0.5, 0.5, 0.0]]).log())
    tensor([0.6931])
    """
    return -(logprobs.exp() * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(1)


def refuse_lost(mass: Float[Tensor, " A"]) -> None:
    """Raises NumericsError if a row has no distribution: its mass is not above 0 (NaN is not either)."""
    lost = ~(mass > 0)
    if bool(lost.any()):
        raise NumericsError(
            f"row {int(lost.nonzero()[0])} of {len(mass)} in this rollout: the model gives no distribution over the "
            "next token, its logits are not finite. If it has trained for a while, lower update.learning_rate and "
            "resume from an earlier checkpoint; if not, its weights are broken or need policy.precision float32."
        )
