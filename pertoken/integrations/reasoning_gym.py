"""Data sets of reasoning-gym as tasks, with its own scorers as reward (extra `reasoning-gym`).

    task: {fn: "pertoken.integrations.reasoning_gym:load_task", dataset: basic_arithmetic}
    rewards: [{name: right, fn: "pertoken.integrations.reasoning_gym:Score"}]

https://github.com/open-thought/reasoning-gym: puzzles made by procedures, as many as wanted, each with what scores an
answer to it. Nothing is downloaded.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pertoken.errors import ConfigError, MissingExtraError, TaskError, closest
from pertoken.integrations.splits import task_of
from pertoken.rewards.base import Sample, SampleReward, place_number
from pertoken.rewards.form import compile_pattern, in_time
from pertoken.tasks.base import ItemTask, PromptTemplate, Split, Template
from pertoken.types import Item

QUESTION: Template = ({"role": "user", "content": "{question}"},)


def load_task(
    dataset: str,
    *,
    num_train: int = 1000,
    num_validation: int = 100,
    num_test: int = 100,
    seed: int = 0,
    prompt: Template = QUESTION,
    **parameters: Any,
) -> ItemTask:
    """The task of a data set by its name; `parameters` are those of its configuration (`max_digits`, say).

    prompt: template over the column `question`. All items come from one stream of the data set: streams of
    neighbouring seeds share most of theirs. A question that is held out is not learnt from, so small data sets give
    fewer training items than were asked for.
    """
    gym = _gym()
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise ConfigError(f"task.dataset: reasoning-gym has no {dataset!r}; {closest(dataset, DATASETS)}")
    sizes: dict[Split, int] = {"test": num_test, "validation": num_validation, "train": num_train}
    template = PromptTemplate(prompt)
    try:
        entries = gym.create_dataset(dataset, size=sum(sizes.values()), seed=seed, **parameters)
        items = iter([_item(dataset, k, entry, template) for k, entry in enumerate(entries)])
    except (TypeError, ValueError, AssertionError) as error:
        raise TaskError(f"task.dataset {dataset}: reasoning-gym cannot make it so: {error}") from error
    return task_of(dataset, {split: [next(items) for _ in range(size)] for split, size in sizes.items()}, seed=seed)


def _item(dataset: str, place: int, entry: Mapping[str, Any], template: PromptTemplate) -> Item:
    answer = entry["answer"]
    return Item(
        id=f"{dataset}-{place}",
        prompt=template.render({"question": entry["question"]}),
        answer=None if answer is None else str(answer),
        info={"dataset": dataset, "entry": dict(entry)},
    )


@dataclass(frozen=True)
class Score(SampleReward):
    """What the data set's own scorer gives for the answer, 0 to 1, on the last action."""

    within: str | None = None
    """Regular expression of the answer in the text (its first group, if it has one): the last match counts, and
    without one nothing is paid. None takes the whole text."""

    def __post_init__(self) -> None:
        _ = self._within

    @cached_property
    def _within(self) -> Any:
        return None if self.within is None else compile_pattern(self.within, "within")

    def token_values(self, sample: Sample) -> list[float]:
        answer = self.answer(sample.text)
        entry = sample.item.info["entry"]
        name = entry["metadata"].get("source_dataset", sample.item.info["dataset"])
        value = 0.0 if answer is None or True not in sample.action_mask else float(_scorer(name)(answer, entry))
        return place_number(value, sample, "last")

    def answer(self, text: str) -> str | None:
        """What is taken for the answer."""
        if self._within is None:
            return text.strip()
        found = in_time(lambda text, **limit: list(self._within.finditer(text, **limit)), text)
        return str(found[-1][min(self._within.groups, 1)] or "").strip() if found else None


@functools.cache
def _scorer(dataset: str) -> Callable[[str, Mapping[str, Any]], float]:
    scorer: Callable[[str, Mapping[str, Any]], float] = _gym().get_score_answer_fn(dataset)
    return scorer


def _gym() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise MissingExtraError("reasoning_gym", "reasoning-gym", "a task of reasoning-gym") from error
    return reasoning_gym
