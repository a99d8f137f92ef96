"""The data of token-level reinforcement learning, in the order in which a token meets it.

    Item -> Completion -> Episode -> TokenBatch -> PolicyOutput, TokenRewards -> Credit -> TokenLoss

One convention holds for every per-token field: **the cell `[b, t]` speaks of token `t` itself**: its
log-prob given the tokens before it, the value of the state *before* it was chosen, its reward, its advantage.
The shift from logits at `t-1` to token `t` happens in `policy/scoring.py` and nowhere else.

Fields are 0 / False where they do not apply. Column 0 is never an action. Padding is on the right.
Letters in shapes: B rows, T tokens, V vocabulary, N prompts, G samples per prompt (B = N * G),
A actions (the number of True cells of `action_mask`, listed row by row).

Each stage returns a new type, so credit before rewards cannot be written; nothing is mutated.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pertoken.display import episode_html, grids_html
from pertoken.sampling import Controls

Message = Mapping[str, str]
"""One turn of a chat: `{"role": "user", "content": "..."}`."""

StopReason = Literal["eos", "stop_string", "length", "context"]
"""Why a completion ended. `eos` and `stop_string` terminate the episode; `length` (token budget) and
`context` (the model's window is full) truncate it: it did not end, it was cut off."""

CUT_OFF: frozenset[StopReason] = frozenset({"length", "context"})
"""The reasons that truncate an episode."""


@dataclass(frozen=True)
class Item:
    """One problem: what the model is asked, and what is known about a good answer."""

    id: str
    prompt: str | tuple[Message, ...]
    answer: str | None = None
    info: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of the data row, for rewards that need them (e.g. `source`)."""
    task: str = ""
    """Name of the task that it is of, where a run learns several at once; its id begins with it then."""


@dataclass(frozen=True)
class Completion:
    """What an engine returns for one sample: token ids in, token ids out; no text."""

    tokens: list[int]
    """Sampled ids, the end-of-sequence token included if it was sampled; never re-tokenised or edited."""
    logprobs: list[float]
    """Log-prob of each token under the processed distribution that it was really drawn from (nats)."""
    stop: StopReason
    support: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    """Kept set of each draw as packed bits `[len(tokens), ceil(V / 8)]` (`numpy.packbits`, big-endian bit
    order), or None when nothing truncates the distribution (top-k, top-p, min-p off, no mask policy)."""
    entropies: list[float] | None = None
    """Entropy of the distribution that each token was drawn from (nats); None from engines that do not tell."""


@dataclass(frozen=True)
class Span:
    """Tokens `[start, stop)` of an episode that one side wrote."""

    start: int
    stop: int
    role: Literal["prompt", "action", "observation"]
    turn: int


@dataclass(frozen=True)
class Episode:
    """One finished (or cut off) sample: ragged, plain Python, one line of JSON; what the report shows."""

    id: str
    item: Item
    group: int
    """Samples of the same prompt in one step share this number and have identical prompt ids."""
    tokens: list[int]
    """Exactly what the model saw and sampled."""
    action_mask: list[bool]
    logprobs: list[float]
    """Log-prob at sampling time of each action; 0.0 elsewhere. Same length as `tokens`."""
    env_rewards: list[float]
    spans: list[Span]
    stop: StopReason
    policy_version: tuple[int, int]
    """Version of the weights that sampled the first and the last action."""
    info: dict[str, Any] = field(default_factory=dict)
    support: np.ndarray[Any, np.dtype[np.uint8]] | None = field(default=None, repr=False, compare=False)
    """Kept sets of the actions, as in `Completion.support`; lives in memory only, never in the run folder."""
    entropies: list[float] | None = field(default=None, repr=False)
    """Entropy at sampling time of each action; 0.0 elsewhere. Same length as `tokens`; None if it is not known."""

    def __post_init__(self) -> None:
        lengths = [len(self.tokens), len(self.action_mask), len(self.logprobs), len(self.env_rewards)]
        lengths += [] if self.entropies is None else [len(self.entropies)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"episode {self.id}: tokens, action_mask, logprobs, env_rewards, entropies differ in length: {lengths}"
            )

    @property
    def terminated(self) -> bool:
        """True if the episode ended by itself; False if it was cut off (truncated)."""
        return self.stop in ("eos", "stop_string")

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first action (all of them if there is no action)."""
        return self.action_mask.index(True) if any(self.action_mask) else len(self.tokens)

    def _repr_html_(self) -> str:
        return episode_html(self)


@dataclass(frozen=True)
class Whole:
    """The texts that the rows of a batch are segments of (`segments.py`)."""

    text: Int[Tensor, " B"]
    """Number of the row's text: its row in the batch that was cut. The segments of a text follow each other."""
    before: Int[Tensor, " B"]
    """How many actions of the text precede the row's first one."""
    actions: Int[Tensor, " B"]
    """How many actions the text has."""

    def rows(self, index: Int[Tensor, " R"]) -> "Whole":
        """Those of the rows `index`, in that order."""
        return Whole(self.text[index], self.before[index], self.actions[index])


@dataclass(frozen=True)
class TokenBatch:
    """Episodes as right-padded tensors."""

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    action_mask: Bool[Tensor, "B T"]
    """True where the policy chose the token. Built from lengths, never from token ids."""
    sample_logprobs: Float[Tensor, "B T"]
    env_rewards: Float[Tensor, "B T"]
    turn: Int[Tensor, "B T"]
    group: Int[Tensor, " B"]
    terminated: Bool[Tensor, " B"]
    episode_ids: tuple[str, ...]
    controls: Controls = field(default_factory=Controls)
    """The controls that the tokens were drawn with: scoring reproduces their distribution."""
    support: UInt8[Tensor, "A V8"] | None = None
    """Kept sets of the actions (packed bits, see `Completion.support`), row by row."""
    sample_entropy: Float[Tensor, "B T"] | None = None
    """Entropy of the distribution that each action was drawn from (nats); None if an episode does not know it."""
    whole: Whole | None = None
    """What the rows are segments of; None where each is a text by itself."""

    def __post_init__(self) -> None:
        if bool((self.action_mask & ~self.attention_mask).any()):
            raise ValueError("an action lies on padding: action_mask must be a subset of attention_mask")
        if bool(self.action_mask[:, :1].any()):
            raise ValueError("column 0 cannot be an action: the first token has no prefix to be chosen from")
        if self.support is not None and self.support.shape[0] != int(self.action_mask.sum()):
            raise ValueError(f"support has {self.support.shape[0]} rows for {int(self.action_mask.sum())} actions")

    @property
    def num_actions(self) -> int:
        return int(self.action_mask.sum())

    def prompt_lengths(self) -> list[int]:
        """Tokens before each row's first action; rows without actions are all prompt."""
        first = self.action_mask.int().argmax(1)
        return torch.where(self.action_mask.any(1), first, self.attention_mask.sum(1)).tolist()

    def prompt_groups(self) -> list[list[int]]:
        """The rows that share a prompt, in order of first appearance: same group and the same ids before the actions.

        What is computed for a prompt can be computed once for each of these lists.
        """
        tokens, prompts = self.tokens.tolist(), self.prompt_lengths()
        found: dict[tuple[int, ...], list[int]] = {}
        for b, group in enumerate(self.group.tolist()):
            found.setdefault((group, *tokens[b][: prompts[b]]), []).append(b)
        return list(found.values())

    def parts(self, tokens: int) -> list[Int[Tensor, " R"]]:
        """All rows in parts of at most about `tokens` tokens each, a shared prompt counted once per part.

        Groups are torn apart only where one alone is larger. Groups of long rows come first, so that rows of about the
        same length are in one part: whatever pads its rows to the longest one computes little in vain.
        """
        sizes, prompts = self.attention_mask.sum(1).tolist(), self.prompt_lengths()
        parts: list[list[int]] = []
        room = 0
        for members in sorted(self.prompt_groups(), key=lambda members: -max(sizes[b] for b in members)):
            prompt = prompts[members[0]]
            whole = prompt + sum(sizes[b] - prompt for b in members)
            begin = not parts or whole > room
            for b in members:
                rest = sizes[b] - prompt
                if begin or rest > room:
                    parts.append([])
                    room, begin = tokens - prompt, False
                elif b == members[0]:
                    room -= prompt
                parts[-1].append(b)
                room -= rest
        return [torch.tensor(part) for part in parts]

    def rows(self, index: Int[Tensor, " R"]) -> "TokenBatch":
        """The batch made of the rows `index`, in that order."""
        support = None
        if self.support is not None:
            per_row = torch.split(self.support, self.action_mask.sum(1).tolist())
            support = torch.cat([per_row[i] for i in index.tolist()]) if len(index) else self.support[:0]
        return TokenBatch(
            **{f.name: getattr(self, f.name)[index] for f in fields(self) if f.name not in _NOT_BY_ROW},
            episode_ids=tuple(self.episode_ids[i] for i in index.tolist()),
            controls=self.controls,
            support=support,
            sample_entropy=None if self.sample_entropy is None else self.sample_entropy[index],
            whole=None if self.whole is None else self.whole.rows(index),
        )


_NOT_BY_ROW = ("episode_ids", "controls", "support", "sample_entropy", "whole")


@dataclass(frozen=True)
class TokenRewards:
    """Reward of every token: named parts, already weighted, that sum to the total."""

    total: Float[Tensor, "B T"]
    parts: dict[str, Float[Tensor, "B T"]]
    abstained: dict[str, Bool[Tensor, " B"]] = field(default_factory=dict)
    """Rows on which a part has no opinion or failed, by its name; parts that speak about all rows are not in it."""
    weights: dict[str, float] = field(default_factory=dict)
    """What each part was multiplied by in this step; 1 for those that are not in it."""
    figures: dict[str, float] = field(default_factory=dict)
    """What is logged of the making of the parts: weights of the step, shares clipped and abstained."""
    failures: dict[str, dict[int, str]] = field(default_factory=dict)
    """Why a part failed on a row, by its name and the row; parts that never did are not in it."""
    earned: Float[Tensor, " B"] | None = None
    """What each row earns in units that stay the same from step to step: the parts as they were before they were
    clipped or normalised, by the weights that they end with."""

    def _repr_html_(self) -> str:
        return grids_html("Rewards", {"total": self.total, **self.parts})


@dataclass(frozen=True)
class PolicyOutput:
    """One scoring pass (of the old, the new or the reference policy) at the actions of a batch."""

    logprobs: Float[Tensor, "B T"]
    """Under the processed distribution that the sampling controls define (nats)."""
    entropy: Float[Tensor, "B T"]
    """Of the same distribution (nats)."""
    values: Float[Tensor, "B T"] | None = None
    """Value of the state before the token was chosen; None without a value head."""
    bootstrap: Float[Tensor, " B"] | None = None
    """Value of the state after the last token: what a truncated episode is still worth."""
    hidden: Float[Tensor, "B T H"] | None = None
    """Last hidden state that each action is predicted from, where it was asked for."""
    kl: Float[Tensor, "B T"] | None = None
    """KL over the whole vocabulary from this policy to the one that it was scored against, or from that one to this if
    so asked (nats); None without one."""

    def rows(self, index: Int[Tensor, " R"]) -> "PolicyOutput":
        """The output of the rows `index`, in that order."""

        def pick(cells: Tensor | None) -> Tensor | None:
            return None if cells is None else cells[index]

        chosen = (pick(cells) for cells in (self.values, self.bootstrap, self.hidden, self.kl))
        return PolicyOutput(self.logprobs[index], self.entropy[index], *chosen)


@dataclass(frozen=True)
class StateValues:
    """What states on the way are worth, as rollouts from them say."""

    values: Float[Tensor, "B T"]
    """At the first action of each step: mean total reward of the texts that go on from before it; 0 elsewhere."""
    starts: Bool[Tensor, "B T"]
    """True at the first action of each step."""


@dataclass(frozen=True)
class Credit:
    """What the update makes of the rewards: each action's advantage, and the critic's targets."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"] | None = None
    """Regression target of the value head; None when the estimator has no critic."""

    def rows(self, index: Int[Tensor, " R"]) -> "Credit":
        """The credit of the rows `index`, in that order."""
        return Credit(self.advantages[index], None if self.returns is None else self.returns[index])

    def _repr_html_(self) -> str:
        return grids_html("Credit", vars(self))


@dataclass(frozen=True)
class TokenLoss:
    """A loss that is not yet reduced: the trainer aggregates it, the report colours it."""

    per_token: Float[Tensor, "B T"]
    aux: dict[str, Float[Tensor, "B T"]] = field(default_factory=dict)
    """Detached per-token figures by name: ratio, clipped, kl ..."""
