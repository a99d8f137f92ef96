"""Several turns in one episode: the policy speaks, a tool or a user answers, the policy goes on.

What the environment says stands in the episode and is no action: it gets no log-prob, no credit, and takes no time.
Everything behind the rollout (scoring, rewards, credit, losses) steps over it.

    prompt  action action  observation observation  action action action
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from pertoken.errors import ConfigError, ModelError, RewardError
from pertoken.machine.background import Background, StillRunningError
from pertoken.prompts import prompt_ids
from pertoken.rewards import ScoredSpan
from pertoken.rewards.align import align, spread
from pertoken.rewards.base import reason
from pertoken.rollout.collect import sample_seed
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls
from pertoken.types import Completion, Episode, Item, Message, Span, StopReason


@dataclass(frozen=True)
class Reply:
    """What an environment makes of a turn."""

    text: str | None = None
    """What it says, as it is put before the model; None ends the episode."""
    role: str = "user"
    """Who says it, for the chat template: user, or tool where the template knows tools."""
    reward: float | Sequence[ScoredSpan] = 0.0
    """What the turn earned: a number, on its last token, or ranges of its text, each on its own tokens."""


@runtime_checkable
class Environment(Protocol):
    """Who answers the policy: a tool, a simulated user, a game. It keeps nothing: all that was said is told it."""

    def reply(self, item: Item, messages: Sequence[Message]) -> Reply | str | None:
        """What is said to the last of `messages`, which the policy has just written; None ends the episode."""
        ...


def converse(
    engine: RolloutEngine,
    items: Sequence[Item],
    tokenizer: Any,
    controls: Controls,
    *,
    environment: Environment,
    max_turns: int,
    context_length: int,
    go_on_when_cut: bool = False,
    time_limit: float | None = None,
    samples_per_prompt: int = 1,
    run_seed: int = 0,
    step: int = 0,
) -> list[Episode]:
    """`samples_per_prompt` episodes of up to `max_turns` turns for each item; those of an item form a group.

    `controls.sampling.max_new_tokens` bounds each turn; a turn that it cuts off is the last, unless `go_on_when_cut`.
    A chat prompt goes on through the model's chat template, behind a prompt of plain text the replies stand as they
    are. An episode has ended by itself if the environment ended it behind a turn that ended by itself; it is truncated
    if a turn was cut off, if the environment would have gone on after `max_turns`, or if its reply does not fit into
    `context_length` tokens. It always ends with an action. What the environment pays is `Episode.env_rewards`, the part
    `env` of the reward.

    Raises ConfigError for sampling.min_new_tokens, which would be counted over all turns, ModelError for
    encoder-decoder models, which cannot go on from what they have written, and RewardError, which names item and turn,
    for an environment that raises, answers what is no reply, or takes longer than `time_limit` seconds for it.
    """
    if max_turns < 1:
        raise ConfigError(f"max_turns is {max_turns}: expected at least 1")
    if controls.sampling.min_new_tokens:
        raise ConfigError("sampling.min_new_tokens has no meaning in several turns: leave it out")
    if getattr(engine, "reads_apart", False):
        raise ModelError("an encoder-decoder model cannot go on from what it has written: use a causal model for turns")
    talks = [
        _Talk(item, group, sample, prompt_ids(item, tokenizer))
        for group, item in enumerate(items)
        for sample in range(samples_per_prompt)
    ]
    live = talks
    while live:
        seeds = [talk.seed(run_seed, step) for talk in live]
        completions = engine.generate([talk.tokens for talk in live], controls, seeds=seeds)
        for talk, completion in zip(live, completions, strict=True):
            talk.says(completion, tokenizer)
            reply = talk.asks(environment, time_limit)
            talk.hears(reply, completion, tokenizer, last=max_turns, room=context_length, go_on=go_on_when_cut)
        live = [talk for talk in live if talk.stop is None]
    return [talk.episode(step, engine.version) for talk in talks]


@dataclass
class _Talk:
    """One episode on its way."""

    item: Item
    group: int
    sample: int
    tokens: list[int]
    stop: StopReason | None = None
    turns: int = 0
    text: Any = None
    """What the policy said last, aligned with its tokens."""
    messages: list[Message] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] | None = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    support: list[np.ndarray[Any, np.dtype[np.uint8]]] = field(default_factory=list)
    stops: list[StopReason] = field(default_factory=list)
    """Why each turn ended, whatever the environment made of it."""

    def __post_init__(self) -> None:
        prompt, ids = self.item.prompt, self.tokens
        self.messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        self.tokens = []
        self._given(ids, "prompt")

    def seed(self, run_seed: int, step: int) -> int:
        """Of the next turn; the first one is that of a single turn."""
        name = f"{self.item.id}/turn {self.turns + 1}" if self.turns else self.item.id
        return sample_seed(run_seed, step, name, self.sample)

    def says(self, said: Completion, tokenizer: Any) -> None:
        """Write down what the policy said."""
        self.turns += 1
        self.stops.append(said.stop)
        self._chosen(said)
        self.text = align(said.tokens, tokenizer)
        self.messages.append({"role": "assistant", "content": self.text.text})

    def asks(self, environment: Environment, time_limit: float | None) -> Reply:
        """What the environment makes of that."""
        told = tuple(self.messages)
        try:
            if time_limit is None:
                reply: Any = environment.reply(self.item, told)
            else:
                work = Background(lambda: environment.reply(self.item, told), "pertoken-environment")
                reply = work.result(time_limit)
        except StillRunningError as error:
            raise RewardError(f"{self._where}: no answer within {time_limit:g} s. {error}") from error
        except (Exception, SystemExit) as error:
            raise RewardError(f"{self._where}: {reason(error)}") from error
        text, role = (reply.text, reply.role) if isinstance(reply, Reply) else (reply, "user")
        if text is not None and not (_is_text(text) and _is_text(role)):
            raise RewardError(
                f"{self._where}: it said {text!r} as {role!r}, expected texts, or None to end the episode"
            )
        return reply if isinstance(reply, Reply) else Reply(text)

    def hears(self, reply: Reply, said: Completion, tokenizer: Any, *, last: int, room: int, go_on: bool) -> None:
        """Write down what the environment makes of what was said."""
        self._pay(reply.reward, len(self.tokens) - len(said.tokens))
        if reply.text is None or said.stop == "context" or (said.stop == "length" and not go_on):
            self.stop = said.stop
        elif self.turns == last:
            self.stop = "length"
        else:
            message = {"role": reply.role, "content": reply.text}
            ids = self._between(message, said, tokenizer)
            if len(self.tokens) + len(ids) >= room:
                self.stop = "context"
            else:
                self.messages.append(message)
                self._given(ids, "observation")

    def episode(self, step: int, version: int) -> Episode:
        assert self.stop is not None
        return Episode(
            id=f"{step}/{self.item.id}/{self.sample}", item=self.item, group=self.group, tokens=self.tokens,
            action_mask=self.action_mask, logprobs=self.logprobs, env_rewards=self.rewards, spans=self.spans,
            stop=self.stop, policy_version=(version, version),
            info={"turns": self.turns, "messages": self.messages, "stops": self.stops},
            support=np.concatenate(self.support) if self.support else None,
            entropies=self.entropies,
        )  # fmt: skip

    def _given(self, ids: Sequence[int], role: Any) -> None:
        """Tokens that the policy did not choose."""
        self._write(ids, [0.0] * len(ids), [0.0] * len(ids), acts=False)
        self.spans.append(Span(len(self.tokens) - len(ids), len(self.tokens), role, self.turns))

    def _chosen(self, said: Completion) -> None:
        """Tokens that it did."""
        self._write(said.tokens, said.logprobs, said.entropies, acts=True)
        self.spans.append(Span(len(self.tokens) - len(said.tokens), len(self.tokens), "action", self.turns))
        if said.support is not None:
            self.support.append(said.support)

    def _write(
        self, ids: Sequence[int], logprobs: Sequence[float], entropies: Sequence[float] | None, *, acts: bool
    ) -> None:
        self.tokens = [*self.tokens, *ids]
        self.action_mask += [acts] * len(ids)
        self.logprobs += logprobs
        self.rewards += [0.0] * len(ids)
        self.entropies = None if entropies is None or self.entropies is None else [*self.entropies, *entropies]

    def _pay(self, reward: Any, start: int) -> None:
        """Put what the turn that begins at token `start` has earned on its tokens."""
        if not isinstance(reward, Sequence) or isinstance(reward, str):
            self.rewards[-1] += self._number(reward)
            return
        for span in reward:
            if not isinstance(span, ScoredSpan) or not 0 <= span.start <= span.stop <= len(self.text.text):
                raise RewardError(
                    f"{self._where}: {span} lies outside the {len(self.text.text)} characters of what the policy said; "
                    "expected a ScoredSpan with 0 <= start <= stop <= that"
                )
            for token, share in spread(self.text, span.start, span.stop, self._number(span.value)):
                self.rewards[start + token] += share

    def _number(self, paid: Any) -> float:
        try:
            number = math.nan if isinstance(paid, str) else float(paid)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(f"{self._where}: it paid {paid!r}, expected a finite number, or a list of ScoredSpan")
        return number

    @property
    def _where(self) -> str:
        return f"the environment, item {self.item.id!r}, turn {self.turns}"

    def _between(self, message: Message, said: Completion, tokenizer: Any) -> list[int]:
        """The ids that stand between this turn and the next: the message, and what the chat template puts around it.

        What the policy sampled is never tokenised again: the template renders the conversation with a mark in the place
        of its last turn, and what follows the mark is encoded. An end token that the policy has written itself is not
        written twice.
        """
        if isinstance(self.item.prompt, str) or not tokenizer.chat_template:
            return list(tokenizer.encode(message["content"], add_special_tokens=False))
        shown = [*self.messages[:-1], {"role": "assistant", "content": _MARK}, message]
        try:
            whole = tokenizer.apply_chat_template(
                [dict(one) for one in shown], add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template in Jinja raises
            raise ModelError(
                f"item {self.item.id}: the chat template takes no message of the role {message['role']!r} here: {error}"
            ) from error
        _, mark, behind = whole.partition(_MARK)
        if not mark:
            raise ModelError(f"item {self.item.id}: the chat template leaves out what the assistant said before")
        ids = list(tokenizer.encode(behind, add_special_tokens=False))
        return ids[1:] if said.stop == "eos" and ids[:1] == said.tokens[-1:] else ids


def _is_text(text: Any) -> bool:
    """Whether `text` is one that a tokenizer takes: half a character, as broken tools write it, is none."""
    try:
        return isinstance(text, str) and text.encode() is not None
    except UnicodeEncodeError:
        return False


_MARK = "(what the assistant said: 5f0b7c)"
"""Stands for the last turn of the policy while a template is rendered."""
