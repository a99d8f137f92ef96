"""A run as a whole: its sections, what cannot work together, and chains of runs."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pertoken.config.credit import CreditConfig, LeaveOneOutProcess
from pertoken.config.families import bound, read_by, settings_of
from pertoken.config.method import MethodConfig, OfflineConfig, Reinforcement
from pertoken.config.monitoring import CheckpointConfig, EvaluationConfig, GuardConfig, LogConfig, StopConfig
from pertoken.config.policy import PolicyConfig
from pertoken.config.presets import PRESETS
from pertoken.config.reading import Name, Section, merge, merge_settings, validate
from pertoken.config.refusals import refusals
from pertoken.config.reward import KLConfig, RewardConfig
from pertoken.config.rollout import RolloutConfig
from pertoken.config.task import DocstringsTask, FileTask, TaskConfig
from pertoken.config.update import ObjectiveConfig, UpdateConfig
from pertoken.errors import ConfigError, closest


class RunConfig(Section):
    """Everything that a run depends on."""

    name: Name = "run"
    """Names the run folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides items, samples and minibatches."""
    folder: str | None = None
    """Run folder; null makes runs/<name>-<seed>."""
    algorithm: str | None = None
    """A published method by its name (`pertoken algorithms` lists them): stands for the settings of its table, over
    which keys beside it and in later files or overrides win; null is the settings below."""
    policy: PolicyConfig = PolicyConfig()
    method: MethodConfig = Reinforcement()
    """Learn from samples and rewards (rl), or from answers in the data; sections that a method does not use are named
    when the run begins."""
    task: TaskConfig = DocstringsTask()
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = Field(default=(RewardConfig(name="rouge_l"),), min_length=1)
    """Parts of the reward; each scores the tokens that it is about, and they add up."""
    kl: KLConfig = KLConfig()
    credit: CreditConfig = LeaveOneOutProcess()
    objective: ObjectiveConfig = ObjectiveConfig()
    update: UpdateConfig = UpdateConfig()
    stop: StopConfig = StopConfig(steps=100)
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    @property
    def run_folder(self) -> Path:
        return Path(self.folder or f"runs/{self.name}-{self.seed}")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        return _resolved(values) if isinstance(values, dict) else values

    @property
    def offline(self) -> OfflineConfig | None:
        """The method, if it learns from answers in the data."""
        return None if isinstance(self.method, Reinforcement) else self.method

    @model_validator(mode="after")
    def _can_work(self) -> "RunConfig":
        for impossible, sentence in refusals(self):
            if impossible:
                raise ValueError(sentence)
        return self


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of YAML `files` (later over earlier) and `key.sub=value` overrides.

    Raises ConfigError naming the file or key, what was expected, and the nearest known name.
    """
    merged = _merged_run(files, overrides)
    _refuse_several(merged, stages=("train", "a chain"), compare=("compare", "several arms"))
    return validate(merged, RunConfig)


def load_stages(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The configurations of a chain, one per entry of `stages`; of a file without `stages` that of its one run.

    An entry has a `name` and what differs from the rest of the file. Its run folder lies in that of the chain, and its
    `policy.model` is what the stage before it has trained, unless it says otherwise. Anywhere in an entry `stage:NAME`
    stands for the model that an earlier stage has trained.
    """
    merged = _merged_run(files, overrides)
    _refuse_several(merged, compare=("compare", "several arms"))
    if "stages" not in merged:
        return [validate(merged, RunConfig)]
    stages = merged.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError("stages: expected a list of sections, each with a `name` and what differs in it")
    folder, found = validate(merged, RunConfig).run_folder, list[RunConfig]()
    for place, stage in enumerate(stages):
        where = f"stages.{place}"
        taken = {config.name.lower() for config in found}  # folders that differ in case alone are one on macOS
        if not isinstance(stage.get("name"), str) or stage["name"].lower() in taken:
            raise ConfigError(f"{where}.name: each stage needs a name of its own, got {stage.get('name')!r}")
        if "folder" in stage or "seed" in stage:
            raise ConfigError(f"{where}: `folder` and `seed` are those of the chain; set them at the top of the file")
        given = (stage.get("policy") or {}).get("model")
        if found and given is not None and not str(given).startswith(STAGE):
            raise ConfigError(
                f"{where}.policy.model: it is what stage {found[-1].name!r} has trained; leave it out, or name another "
                f"stage ({STAGE}{found[0].name})"
            )
        models = {config.name: str(config.run_folder / "model") for config in found}
        values = merge(merged, _expand(_with_models(stage, models, where)))
        values |= {"folder": str(folder / stage["name"])}
        if found and given is None:
            values["policy"] = {**values["policy"], "model": models[found[-1].name]}
        try:
            found.append(validate(values, RunConfig))
        except ConfigError as error:
            raise ConfigError(f"{where} ({stage['name']}): {error}") from None
    return found


def recipe_values(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a recipe as they are merged, not validated yet; sections that are of no run among them."""
    return _merged_run(files, overrides)


def with_changes(recipe: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`changes` over the values of a recipe, with all that names in them stand for."""
    return merge(dict(recipe), _expand(dict(changes)))


def _refuse_several(merged: Mapping[str, Any], **known: tuple[str, str]) -> None:
    """Files that stand for several runs: which command takes them."""
    for key, (command, what) in known.items():
        if key in merged:
            raise ConfigError(
                f"{key}: only `pertoken {command}` takes {what}; for all else there is config.yaml in the folder of "
                "each run"
            )


STAGE = "stage:"
"""Begins a text in an entry of `stages` that stands for the model of an earlier one."""


def _with_models(value: Any, models: Mapping[str, str], where: str) -> Any:
    """`value` with each `stage:NAME` in it replaced by the model of that stage."""
    if isinstance(value, dict):
        return {key: _with_models(inner, models, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_models(inner, models, f"{where}.{place}") for place, inner in enumerate(value)]
    if not isinstance(value, str) or not value.startswith(STAGE):
        return value
    name = value.removeprefix(STAGE)
    if name not in models:
        raise ConfigError(f"{where}: no stage {name!r} before this one; {closest(name, models)}")
    return models[name]


def _merged_run(files: Sequence[str | Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Of a run: the defaults, under the files from left to right, under the overrides."""
    return merge_settings(RunConfig().model_dump(mode="json", exclude={"task"}), files, overrides, _expand)


def _expand(values: dict[str, Any]) -> dict[str, Any]:
    """`values` over the settings that their `algorithm` and the family of their task stand for."""
    name, task = values.get("algorithm"), values.get("task")
    below = settings_of(task) if isinstance(task, dict) else {}
    if name is not None:
        if not isinstance(name, str) or name not in PRESETS:
            raise ConfigError(f"algorithm: unknown name {str(name)[:60]!r}; {closest(str(name), PRESETS)}")
        below = merge(below, copy.deepcopy(dict(PRESETS[name].settings)))
    return merge(below, values) if below else values


def _resolved(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with all that names in them stand for, the data of the task included, as they stand in the end."""
    task: Any = values.get("task")
    if isinstance(task, FileTask) and task.family:  # made in Python
        values = values | {"task": (task := task.model_dump(exclude_unset=True))}
    if not isinstance(task, dict):
        return _expand(values)
    if task.get("family"):
        return {**bound(_expand(values), task), "task": read_by(task)}
    tasks = task.get("tasks")
    if isinstance(tasks, dict):
        tasks = {name: read_by(member) if isinstance(member, dict) else member for name, member in tasks.items()}
        values = values | {"task": task | {"tasks": tasks}}
    return _expand(values)
