"""Items in, Episodes out: prompts become ids, the engine samples, and what it did is written down."""

import hashlib
from collections.abc import Sequence
from typing import Any

from pertoken.errors import ModelError
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls
from pertoken.types import Completion, Episode, Item, Span


def prompt_ids(item: Item, tokenizer: Any) -> list[int]:
    """The ids that the model is prompted with: text as it is, messages through the chat template.

    A model without a chat template takes a single message as plain text; a conversation it cannot take.
    """
    if isinstance(item.prompt, str):
        return list(tokenizer.encode(item.prompt))
    if not tokenizer.chat_template:
        if len(item.prompt) == 1:
            return list(tokenizer.encode(item.prompt[0]["content"]))
        raise ModelError(
            f"item {item.id}: its prompt is a conversation of {len(item.prompt)} messages, but this tokenizer has no "
            "chat template. Give the task a plain text prompt instead."
        )
    text = tokenizer.apply_chat_template([dict(m) for m in item.prompt], add_generation_prompt=True, tokenize=False)
    return list(tokenizer.encode(text, add_special_tokens=False))


def sample_seed(run_seed: int, step: int, item_id: str, sample: int) -> int:
    """The seed of one sample: a hash of its place in the run, so it depends on nothing else.

    >>> sample_seed(0, 1, "a", 0) == sample_seed(0, 1, "a", 0) != sample_seed(0, 1, "a", 1)
    True
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{item_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
    """Episodes of `samples_per_prompt` samples for each item; the samples of one item form a group."""
    prompts = [prompt_ids(item, tokenizer) for item in items]
    each = range(samples_per_prompt)
    completions = engine.generate(
        [prompt for prompt in prompts for _ in each],
        controls,
        seeds=[sample_seed(run_seed, step, item.id, k) for item in items for k in each],
    )
    version = engine.version
    return [
        to_episode(
            f"{step}/{item.id}/{k}", item, group, prompts[group], completions[group * len(each) + k], version=version
        )
        for group, item in enumerate(items)
        for k in each
    ]


def to_episode(
    episode_id: str, item: Item, group: int, prompt: list[int], completion: Completion, *, version: int
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
