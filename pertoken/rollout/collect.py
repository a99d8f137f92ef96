"""Items in, Episodes out: prompts become ids, the engine samples, and what it did is written down."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pertoken.prompts import prompt_ids
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls
from pertoken.types import Completion, Episode, Item, Span


def sample_seed(run_seed: int, step: int, item_id: str, sample: int) -> int:
    """The seed of one sample: a hash of its place in the run, so it depends on nothing else.

    >>> sample_seed(0, 1, "a", 0) == sample_seed(0, 1, "a", 0) != sample_seed(0, 1, "a", 1)
    True
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{item_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Draws:
    """What was sampled in a step, before it is told as episodes: that alone cannot be had again once weights move."""

    completions: list[Completion]
    """Those of each item side by side, in the order of the items."""
    version: int
    """Of the weights that sampled them."""
    origin: str
    """Digest of the prompts and the sampling controls that they came from."""

    def state(self) -> dict[str, Any]:
        """All of it as JSON."""
        completions = [completion_state(completion) for completion in self.completions]
        return {"completions": completions, "version": self.version, "origin": self.origin}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> "Draws":
        """The inverse of `state`."""
        return cls([of_completion_state(c) for c in state["completions"]], state["version"], state["origin"])


def draw_completions(
    engine: RolloutEngine,
    items: Sequence[Item],
    tokenizer: Any,
    controls: Controls,
    *,
    samples_per_prompt: int = 1,
    run_seed: int = 0,
    step: int = 0,
) -> Draws:
    """`samples_per_prompt` samples for each item."""
    each = range(samples_per_prompt)
    prompts = [prompt for prompt in _prompts(items, tokenizer) for _ in each]
    seeds = [sample_seed(run_seed, step, item.id, k) for item in items for k in each]
    return Draws(engine.generate(prompts, controls, seeds=seeds), engine.version, _origin(prompts, controls))


def stem_from(draws: Draws, items: Sequence[Item], tokenizer: Any, controls: Controls, samples_per_prompt: int) -> bool:
    """Whether `draw_completions` with these arguments, and some weights, is where `draws` come from."""
    prompts = [prompt for prompt in _prompts(items, tokenizer) for _ in range(samples_per_prompt)]
    return draws.origin == _origin(prompts, controls)


def to_episodes(draws: Draws, items: Sequence[Item], tokenizer: Any, *, step: int) -> list[Episode]:
    """Draws told as episodes; the samples of one item form a group."""
    each = len(draws.completions) // len(items)
    return [
        to_episode(f"{step}/{item.id}/{k}", item, group, prompt, draws.completions[group * each + k], draws.version)
        for group, (item, prompt) in enumerate(zip(items, _prompts(items, tokenizer), strict=True))
        for k in range(each)
    ]


def collect(
    engine: RolloutEngine,
    items: Sequence[Item],
    tokenizer: Any,
    controls: Controls,
    *,
    samples_per_prompt: int = 1,
    run_seed: int = 0,
    step: int = 0,
) -> list[Episode]:
    """Episodes of `samples_per_prompt` samples for each item: drawn and told."""
    draws = draw_completions(
        engine, items, tokenizer, controls, samples_per_prompt=samples_per_prompt, run_seed=run_seed, step=step
    )
    return to_episodes(draws, items, tokenizer, step=step)


def to_episode(
    episode_id: str, item: Item, group: int, prompt: list[int], completion: Completion, version: int
) -> Episode:
    """A single-turn episode: the prompt, then what the model said, ids untouched."""
    n, m = len(prompt), len(completion.tokens)
    spans = [Span(0, n, "prompt", 0)] + ([Span(n, n + m, "action", 1)] if m else [])
    return Episode(
        id=episode_id,
        item=item,
        group=group,
        tokens=prompt + completion.tokens,
        action_mask=[False] * n + [True] * m,
        logprobs=[0.0] * n + completion.logprobs,
        env_rewards=[0.0] * (n + m),
        spans=spans,
        stop=completion.stop,
        policy_version=(version, version),
        support=completion.support,
        entropies=None if completion.entropies is None else [0.0] * n + completion.entropies,
    )


def _prompts(items: Sequence[Item], tokenizer: Any) -> list[list[int]]:
    return [prompt_ids(item, tokenizer) for item in items]


def _origin(prompts: Sequence[Sequence[int]], controls: Controls) -> str:
    return hashlib.sha256(f"{prompts} {controls}".encode()).hexdigest()


def completion_state(completion: Completion) -> dict[str, Any]:
    """All of it as JSON."""
    support = completion.support
    packed = None if support is None else [base64.b64encode(support.tobytes()).decode(), *support.shape]
    return vars(completion) | {"support": packed}


def of_completion_state(state: Mapping[str, Any]) -> Completion:
    """The inverse of `completion_state`."""
    support = None
    if state["support"] is not None:
        text, *shape = state["support"]
        support = np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)
    return Completion(**{**state, "support": support})
