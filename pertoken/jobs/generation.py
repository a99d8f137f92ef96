"""A model in use: several samples of a prompt, the best of many by the rewards, beams, and a file of prompts.

Samples come from the rollout engine, with the seeds that it would give them alone: what stands in a file beside what
changes nothing. Beams are those of transformers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from pertoken.assembly import build_rewards
from pertoken.batching import to_batch
from pertoken.errors import ConfigError
from pertoken.forward import decoder_start
from pertoken.jobs.run import Speaker
from pertoken.observe import token_pieces
from pertoken.prompts import prompt_ids
from pertoken.rewards import Scene, Weighted, score
from pertoken.rewards.align import align
from pertoken.rollout.by_generate import begun, greedy_settings, own_settings_aside
from pertoken.rollout.collect import sample_seed, to_episode
from pertoken.sampling import Controls, processed_logits
from pertoken.tasks.files import BadRow, load_file_task
from pertoken.tracking.files import Row
from pertoken.tracking.runlog import prompt_text
from pertoken.types import Completion, Item

Way = Literal["sample", "best", "beams"]


@dataclass(frozen=True)
class Said:
    """One answer."""

    text: str
    pieces: list[str]
    """What each token adds to the text."""
    logprob: float
    """Of all its tokens: under the controls that drew them; of a beam, under the model."""
    stop: str
    """Why it ended, as in an episode."""
    reward: float | None = None
    """By all rewards together; None if none was asked."""
    rewards: list[float] = field(default_factory=list)
    """The same token by token."""


@dataclass(frozen=True)
class Answers:
    """What is said to an item."""

    item: Item
    said: list[Said]
    """The best one first, where rewards were asked."""

    def rows(self, shown: int) -> list[Row]:
        """Lines of a JSONL file: `shown` of the answers, each with the rewards of all if they were asked."""
        others = {} if self.said[0].reward is None else {"rewards": [each.reward for each in self.said]}
        return [
            {
                "id": self.item.id,
                "sample": place,
                "prompt": prompt_text(self.item.prompt),
                "text": each.text,
                "stop": each.stop,
                "tokens": len(each.pieces),
                "logprob": round(each.logprob, 4),
                **({} if each.reward is None else {"reward": each.reward}),
                **(others if not place else {}),
            }
            for place, each in enumerate(self.said[:shown])
        ]


@dataclass(frozen=True)
class Generator:
    """Answers by one model in one way."""

    speaker: Speaker
    way: Way = "sample"
    count: int = 1
    """Samples or beams of each prompt; of the best, how many there are to choose from."""

    def __post_init__(self) -> None:
        sampling = self.speaker.controls.sampling
        if self.way == "beams" and sampling.repetition_penalty != 1.0:
            raise ConfigError(
                "beams: rollout.sampling.repetition_penalty works on logits, and a beam search sees log-probs: set it "
                "to 1; no_repeat_ngram and banned_words do work"
            )
        if self.way == "best" and self.count > 1 and sampling.greedy:
            raise ConfigError(
                f"the best of {self.count} at temperature 0 is the best of one: they are all the same; raise the "
                "temperature"
            )

    @cached_property
    def rewards(self) -> list[Weighted]:
        """Those of the configuration, made once."""
        return build_rewards(self.speaker.config.rewards)

    def __call__(self, items: Sequence[Item], keys: Sequence[str], *, seed: int = 0) -> list[Answers]:
        """What is said to each item; `keys` tell the samples of one from those of another, whatever else there is."""
        if self.way == "beams":
            return [self._answers(item, self._beams(item)) for item in items]
        tokenizer, each = self.speaker.policy.tokenizer, range(self.count)
        prompts = [prompt for item in items for prompt in [prompt_ids(item, tokenizer)] * self.count]
        seeds = [sample_seed(seed, 0, key, k) for key in keys for k in each]
        drawn = self.speaker.engine.generate(prompts, self.speaker.controls, seeds=seeds)
        return [self._answers(item, drawn[k * self.count : (k + 1) * self.count]) for k, item in enumerate(items)]

    def _answers(self, item: Item, completions: Sequence[Completion]) -> Answers:
        tokenizer = self.speaker.policy.tokenizer
        plain = [
            Said(
                align(one.tokens, tokenizer).text,
                token_pieces(one.tokens, tokenizer),
                math.fsum(one.logprobs),
                one.stop,
            )
            for one in completions
        ]
        return Answers(item, plain if self.way == "sample" else self._by_reward(item, completions, plain))

    def _by_reward(self, item: Item, completions: Sequence[Completion], plain: Sequence[Said]) -> list[Said]:
        """The answers with what the rewards pay them, the best one first; of equals the likelier one."""
        policy = self.speaker.policy
        prompt = prompt_ids(item, policy.tokenizer)
        episodes = [to_episode(f"{k}", item, 0, prompt, one, version=0) for k, one in enumerate(completions)]
        batch = to_batch(episodes, Controls(eos_ids=policy.eos_ids), device=str(policy.device))
        scene = Scene(batch, episodes, policy.tokenizer, policy.score(batch), None)
        cells = score(self.rewards, scene).total
        rated = [
            Said(
                said.text, said.pieces, said.logprob, said.stop, cells[k].sum().item(),
                cells[k, len(prompt) : len(prompt) + len(said.pieces)].tolist(),
            )
            for k, said in enumerate(plain)
        ]  # fmt: skip
        return sorted(rated, key=lambda said: (-(said.reward or 0.0), -said.logprob))

    @torch.no_grad()
    def _beams(self, item: Item) -> list[Completion]:
        """As many likely answers as there are beams, by their mean log-prob per token: beam search over the whole
        distribution, with its bans and lengths; temperature, top-k, top-p and min-p have no part in it."""
        policy, controls = self.speaker.policy, self.speaker.controls
        model, start = policy.hf_model, decoder_start(policy.hf_model)
        generate: Any = model.generate
        prompt = prompt_ids(item, policy.tokenizer)
        ids = torch.tensor([prompt], device=policy.device)
        room = policy.context_length - (len(start) if start else len(prompt))
        settings = greedy_settings(
            start,
            num_beams=self.count,
            num_return_sequences=self.count,
            max_new_tokens=min(controls.sampling.max_new_tokens, room),
            eos_token_id=list(controls.eos_ids) or None,
            pad_token_id=controls.eos_ids[0] if controls.eos_ids else 0,
            stop_strings=list(controls.sampling.stop) or None,
        )
        before = len(start) if start else len(prompt)
        half = policy.autocast_dtype
        with own_settings_aside(model), torch.autocast(policy.device.type, half, enabled=half is not None):
            found = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                tokenizer=policy.tokenizer,
                logits_processor=LogitsProcessorList([_Banned(controls, prompt if start else [], before)]),
                **begun(start, 1, policy.device),
            )
        return [self._completion(prompt, row[before:].tolist()) for row in found]

    def _completion(self, prompt: list[int], ids: list[int]) -> Completion:
        """A beam without its padding, each token with its log-prob under the model."""
        policy, ends = self.speaker.policy, self.speaker.controls.eos_ids
        last = next((k for k, token in enumerate(ids) if token in ends), len(ids) - 1)
        said = ids[: last + 1]
        text = align(said, policy.tokenizer).text
        stopped = any(stop in text for stop in self.speaker.controls.sampling.stop)
        stop: Any = "eos" if said[-1] in ends else "stop_string" if stopped else "length"
        episode = to_episode("0", Item("0", ""), 0, prompt, Completion(said, [0.0] * len(said), stop), version=0)
        scored = policy.score(to_batch([episode], Controls(eos_ids=ends), device=str(policy.device)))
        return Completion(said, scored.logprobs[0, len(prompt) :].tolist(), stop)


class _Banned(LogitsProcessor):
    """What must not be said next, by the definition that sampling has."""

    def __init__(self, controls: Controls, prompt: Sequence[int], before: int) -> None:
        """prompt: what `generate` does not show because an encoder reads it; before: ids before the first answer."""
        self._controls = Controls(controls.sampling.untruncated(temperature=1.0), controls.eos_ids, controls.banned_ids)
        self._prompt, self._before = prompt, before

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids[:, self._before :]
        count = torch.full((len(scores),), said.shape[1], device=scores.device)
        read = torch.tensor(self._prompt, dtype=torch.long, device=scores.device).expand(len(scores), -1)
        history = torch.cat([read, said], 1) if self._prompt else input_ids
        return processed_logits(scores, self._controls, count, history)


def read_prompts(
    path: Path, template: str, *, answer: str | None = None, chat: bool = True
) -> tuple[Sequence[Item], Sequence[BadRow]]:
    """The prompts of a file of rows, and rows that are none; `template` has {column} places, `answer` is a column."""
    prompt = [{"role": "user", "content": template}] if chat else template
    task = load_file_task({"test": path}, prompt=prompt, answer=answer, max_bad_rows=10**9)
    return task.items("test"), task.bad_rows


def generate_all(generator: Generator, items: Sequence[Item], *, at_once: int, seed: int = 0) -> Iterator[Answers]:
    """What is said to each of many items, in their order; so many prompts go through the engine together."""
    for begin in range(0, len(items), at_once):
        part = items[begin : begin + at_once]
        yield from generator(part, [item.id for item in part], seed=seed)
