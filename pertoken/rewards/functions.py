"""Reward functions of whole batches, as TRL's trainers take them, unchanged: one number per completion.

    def reward(prompts, completions, ground_truth, **kwargs) -> list[float | None]

See https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function.
"""

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import RewardError
from pertoken.rewards.base import Opinions, Scene, place_number


def takes_completions(function: Any) -> bool:
    """Whether `function` is one of these: it has a parameter of the name `completions`."""
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


class CompletionsReward:
    """A function of `prompts`, `completions` and columns of the data, its numbers on the last action of each row.

    It is given what it asks for by name, all of it if it takes `**kwargs`: `prompts` and `completions` (texts, or lists
    of messages where the task has messages), `completion_ids`, `answer`, and a list for each further column of the item
    (`task.info`), None where an item lacks it. None in what it returns says "no opinion": such a completion abstains.
    Coroutines are awaited.
    """

    of_episodes = True
    """It gives one number per episode."""

    def __init__(self, fn: Callable[..., Any], parameters: Mapping[str, Any] = {}) -> None:
        self.fn = fn
        self._parameters = dict(parameters)
        functools.update_wrapper(self, fn)

    def __call__(self, scene: Scene) -> Float[Tensor, "B T"] | Opinions:
        numbers = self.fn(**self._arguments(scene))
        if inspect.isawaitable(numbers):
            numbers = asyncio.run(_wait(numbers))
        numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
        if not isinstance(numbers, Sequence) or isinstance(numbers, str):
            raise RewardError(f"returned {type(numbers).__name__}, expected a list of {len(scene.samples)} numbers")
        if len(numbers) != len(scene.samples):
            raise RewardError(f"returned {len(numbers)} numbers, expected {len(scene.samples)}: one per completion")
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        for row, (episode, sample, number) in enumerate(zip(scene.episodes, scene.samples, numbers, strict=True)):
            if number is not None:
                placed = place_number(number, sample, "last")
                start = episode.prompt_length
                values[row, start : start + len(placed)] = torch.tensor(placed, dtype=torch.float64)
        abstained = torch.tensor([number is None for number in numbers], dtype=torch.bool)
        return Opinions(values, abstained) if bool(abstained.any()) else values

    def _arguments(self, scene: Scene) -> dict[str, Any]:
        items = [sample.item for sample in scene.samples]
        known: dict[str, list[Any]] = {
            "prompts": [
                item.prompt if isinstance(item.prompt, str) else [dict(m) for m in item.prompt] for item in items
            ],
            "completions": [
                sample.text if isinstance(item.prompt, str) else [{"role": "assistant", "content": sample.text}]
                for item, sample in zip(items, scene.samples, strict=True)
            ],
            "completion_ids": [list(sample.tokens) for sample in scene.samples],
            "answer": [item.answer for item in items],
        }
        for name in {name for item in items for name in item.info}:
            known.setdefault(name, [item.info.get(name) for item in items])
        parameters = inspect.signature(self.fn).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known | self._parameters
        asked = {p.name for p in parameters}
        missing = [
            p.name for p in parameters
            if p.default is p.empty and p.name not in known and p.name not in self._parameters
        ]  # fmt: skip
        if missing:
            raise RewardError(
                f"asks for {', '.join(map(repr, missing))}, but an item has only {', '.join(sorted(known))}; name the "
                "columns that rewards need in task.info"
            )
        return {name: column for name, column in known.items() if name in asked} | self._parameters


async def _wait(numbers: Any) -> Any:
    return await numbers
