"""Single-turn environments of the package verifiers as tasks, with their rubrics as reward (extra `verifiers`).

    task: {fn: "pertoken.integrations.verifiers:load_task", environment: my-env, arguments: {level: 2}}
    rewards: [{name: rubric, fn: "pertoken.integrations.verifiers:Score", environment: my-env, arguments: {level: 2}}]

https://github.com/PrimeIntellect-ai/verifiers: what is used of an environment, as `verifiers.load_environment` returns
it, is `get_dataset()` and `get_eval_dataset()` (rows with `prompt`, and `answer` and `info` if they have them) and
`rubric.score_rollout(state)`. Environments with several turns or tools need their own rollout and are refused.
"""

import asyncio
import functools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pertoken.errors import ConfigError, MissingExtraError, RewardError, TaskError
from pertoken.integrations.splits import task_of
from pertoken.machine.background import Background
from pertoken.rewards.base import Sample, SampleReward, place_number
from pertoken.tasks.base import ItemTask
from pertoken.types import CUT_OFF, Item


def load_task(environment: str, *, arguments: Mapping[str, Any] | None = None, seed: int = 0) -> ItemTask:
    """The items of an environment by its name; `arguments` are those of its `load_environment`.

    What its evaluation asks is held out, as validation. An environment that evaluates on what it trains on is divided
    by the hashes of its prompts.
    """
    found = _environment(environment, _key(arguments))
    if getattr(found, "max_turns", 1) != 1:
        raise TaskError(f"task.environment {environment}: it has several turns; expected a single-turn environment")
    train = _items("train", found.get_dataset())
    return task_of(environment, {"train": train, "validation": _items("eval", found.get_eval_dataset())}, seed=seed)


def _items(kind: str, rows: Iterable[Mapping[str, Any]]) -> list[Item]:
    items = []
    for k, row in enumerate(rows):
        info = row.get("info") or {}
        columns = {"info": json.loads(info) if isinstance(info, str) else info, "task": row.get("task", "default")}
        answer = row.get("answer")
        prompt = row["prompt"] if isinstance(row["prompt"], str) else tuple(map(_message, row["prompt"]))
        items.append(
            Item(f"{kind}-{row.get('example_id', k)}", prompt, None if answer is None else str(answer), columns)
        )
    return items


def _message(message: Mapping[str, Any]) -> dict[str, str]:
    """A chat message as text alone."""
    if not isinstance(message["content"], str):
        raise TaskError("verifiers: a prompt holds more than text (pictures, say), which is not read here")
    return {"role": str(message["role"]), "content": message["content"]}


@dataclass(frozen=True)
class Score(SampleReward):
    """What the environment's rubric gives for the answer, on the last action."""

    environment: str
    """Name of the environment."""
    arguments: Mapping[str, Any] | None = None
    """Those of its `load_environment`; the same as of the task."""

    def token_values(self, sample: Sample) -> list[float]:
        if True not in sample.action_mask:
            return [0.0] * len(sample.tokens)
        state = self._state(sample)
        rubric = _environment(self.environment, _key(self.arguments)).rubric
        # In a thread of its own: a notebook has a loop that runs in this one.
        Background(lambda: asyncio.run(rubric.score_rollout(state)), "pertoken-verifiers").result(None)
        if not isinstance(state.get("reward"), int | float):
            raise RewardError(f"the rubric of {self.environment} left no reward in the state: {state.get('reward')!r}")
        return place_number(float(state["reward"]), sample, "last")

    def _state(self, sample: Sample) -> dict[str, Any]:
        """What a rubric looks at, as after a rollout of one turn."""
        prompt, item = sample.item.prompt, sample.item
        return {
            "prompt": prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
            "completion": sample.text if isinstance(prompt, str) else [{"role": "assistant", "content": sample.text}],
            "answer": item.answer or "",
            "info": dict(item.info.get("info", {})),
            "task": item.info.get("task", "default"),
            "example_id": item.id,
            "trajectory": [],
            "is_completed": True,
            "is_truncated": sample.stop in CUT_OFF,
            "reward": None,
            "metrics": {},
            "timing": defaultdict(float),
        }


@functools.cache
def _environment(name: str, arguments: str) -> Any:
    """Each environment is loaded once, by task and reward together."""
    try:
        import verifiers
    except ImportError as error:
        raise MissingExtraError("verifiers", "verifiers", "an environment of verifiers") from error
    if not hasattr(verifiers, "load_environment"):
        raise ConfigError(
            "this version of verifiers has no load_environment any more: pip install 'pertoken[verifiers]'"
        )
    try:
        return verifiers.load_environment(name, **json.loads(arguments))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"environment {name!r}: verifiers cannot load it: {error}") from error


def _key(arguments: Mapping[str, Any] | None) -> str:
    return json.dumps(dict(arguments or {}), sort_keys=True)
