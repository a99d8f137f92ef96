"""A run as a whole: its sections, what cannot work together, and chains of runs."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from pertoken.config.reading import Section, merge, merge_settings, validate
from pertoken.config.sections import (
    ByWorth,
    CheckpointConfig,
    CreditConfig,
    DocstringsTask,
    EvaluationConfig,
    FileTask,
    GuardConfig,
    KLConfig,
    LeaveOneOutProcess,
    LogConfig,
    MethodConfig,
    MixtureTask,
    MonteCarlo,
    ObjectiveConfig,
    OfflineConfig,
    Pairs,
    PolicyConfig,
    Reinforcement,
    ReplayConfig,
    RewardConfig,
    RolloutConfig,
    SelfCritical,
    StopConfig,
    TaskConfig,
    UpdateConfig,
)
from pertoken.errors import ConfigError, closest
from pertoken.presets import PRESETS


class RunConfig(Section):
    """Everything that a run depends on."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
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
        return _expand(values) if isinstance(values, dict) else values

    @property
    def offline(self) -> OfflineConfig | None:
        """The method, if it learns from answers in the data."""
        return None if isinstance(self.method, Reinforcement) else self.method

    @model_validator(mode="after")
    def _can_work(self) -> "RunConfig":
        for impossible, sentence in self._impossible():
            if impossible:
                raise ValueError(sentence)
        return self

    def _impossible(self) -> Iterable[tuple[bool, str]]:
        rollout, credit, stop = self.rollout, self.credit, self.stop
        group_credit = credit.type not in ("reward_to_go", "gae", "self_critical", "monte_carlo")
        beside = isinstance(credit, SelfCritical | MonteCarlo | ByWorth)  # further texts are scored beside the samples
        objective = self.objective
        named = [reward.name or str(reward.fn).rpartition(":")[2] for reward in self.rewards]
        measured = [reward.name or str(reward.fn).rpartition(":")[2] for reward in self.guards.beside]
        both = [part for part in measured if part in named]
        strangers = [part for part in getattr(credit, "parts", {}) if part not in (*named, "kl", "env")]
        rows = rollout.prompts_per_step * rollout.samples_per_prompt
        needs_evaluation = stop.metric is not None or stop.patience is not None
        yield (
            rollout.ahead and self.objective.importance_cap is None,
            "rollout.ahead samples with the weights of one update before, and objective.importance_cap null does not "
            "correct for it. Set a cap (2.0), or rollout.ahead=false.",
        )
        yield (
            rollout.sampling.greedy,
            "rollout.sampling.temperature is 0: a greedy token has no probability to learn from. Use a temperature "
            "above 0 for training; evaluation.sampling may be greedy.",
        )
        yield (
            rollout.mask is not None and rollout.engine != "native",
            "rollout.mask asks a second model at each token, and transformers.generate asks one: set "
            "rollout.engine=native.",
        )
        yield (
            credit.type == "gae" and self.policy.value_head is None,
            "credit.type gae needs a critic: set policy.value_head (for its defaults: policy.value_head={}).",
        )
        yield (
            credit.type != "gae" and self.policy.value_head is not None,
            f"policy.value_head is set, but credit.type {credit.type} never asks it: use credit.type gae or drop it.",
        )
        yield (
            group_credit and rollout.samples_per_prompt < 2,
            f"credit.type {credit.type} compares the samples of a prompt: rollout.samples_per_prompt must be at least "
            "2 (or use credit.type reward_to_go).",
        )
        yield (
            objective.importance_outside == "truncate"
            and (objective.importance_level == "geometric" or objective.importance_floor > 0),
            "objective.importance_level geometric and objective.importance_floor say what is left out: set "
            "objective.importance_outside=mask.",
        )
        yield (
            objective.importance_cap is not None and objective.importance_floor >= objective.importance_cap,
            f"objective.importance_floor {objective.importance_floor} is not below objective.importance_cap "
            f"{objective.importance_cap}: every weight would be left out.",
        )
        yield (
            objective.entropy_floor is not None and not objective.entropy_coefficient,
            "objective.entropy_floor is set, but nothing is paid below it: set objective.entropy_coefficient (0.01).",
        )
        yield (
            rollout.redraws > 0 and rollout.ahead,
            "rollout.redraws needs the rewards of a step before its samples are complete, and rollout.ahead draws "
            "without them: leave one of them out.",
        )
        yield (
            rollout.redraws > 0 and not group_credit,
            f"rollout.redraws leaves out groups without a difference; credit.type {credit.type} learns from them too.",
        )
        yield (
            rollout.redraws > 0 and any(r.constraint or r.normalise == "running" for r in self.rewards),
            "rollout.redraws scores samples that are then left out; a reward with a constraint or normalise: running "
            "would remember them. Leave one of them out.",
        )
        if rollout.replay is not None:
            yield from self._impossible_replay(rollout.replay)
        yield (
            beside and any(r.constraint or r.normalise != "none" for r in self.rewards),
            f"credit.type {credit.type} compares a sample with others (greedy answers, rollouts from prefixes, itself "
            "without some tokens) in the same units; a reward with a constraint or normalise has others for each "
            "batch. Leave them out.",
        )
        yield (
            credit.type == "monte_carlo" and self.kl.place == "reward" and self.kl.coefficient > 0,
            "kl.place reward pays each token of a sample, and rollouts from prefixes (credit.type monte_carlo) do not "
            "pay it: set kl.place to loss or none.",
        )
        yield (
            credit.type == "gae" and credit.macro_size > 1 and credit.length_adaptive is not None,
            "credit.length_adaptive counts tokens, credit.macro_size makes actions of several: leave one of them out.",
        )
        yield (
            bool(strangers),
            f"credit.parts.{''.join(strangers[:1])}: no reward has that name; there are {', '.join(named)}.",
        )
        yield (
            bool(both),
            f"guards.beside: {''.join(both[:1])} is in the reward already; what is measured beside it must not be.",
        )
        yield (
            self.update.minibatches > rows,
            f"update.minibatches {self.update.minibatches} exceeds the {rows} samples of a step.",
        )
        yield from self._no_trust_region()
        offline, method = self.offline is not None, f"method.type {self.method.type}"
        yield (
            offline and (self.update.minibatches > 1 or self.update.epochs > 1),
            f"{method} makes one update of each batch: update.minibatches and update.epochs must be 1; method.batch "
            "and stop.steps say how much is seen in an update, and how often.",
        )
        yield (
            offline and self.policy.value_head is not None,
            f"policy.value_head is set, but {method} trains no critic: drop it.",
        )
        yield (
            offline and (stop.kl is not None or self.kl.target is not None),
            f"{method} samples nothing, so there is no KL to look at: leave out stop.kl and kl.target.",
        )
        tasks = list(self.task.tasks.values()) if isinstance(self.task, MixtureTask) else [self.task]
        pairs_of = [(t.rejected, t.desirable) if isinstance(t, FileTask) else (None, None) for t in tasks]
        yield (
            isinstance(self.method, Pairs) and any(rejected is None for rejected, _ in pairs_of),
            f"{method} compares two answers: name the column of the worse one in task.rejected"
            f"{', of each task' * (len(tasks) > 1)}.",
        )
        kinds = {(rejected is None, desirable is None) for rejected, desirable in pairs_of}
        yield (
            self.method.type == "kto" and kinds not in ({(True, False)}, {(False, True)}),
            f"{method} needs to know which answers are good: name a column of true and false in task.desirable, or one "
            f"of worse answers in task.rejected (and not both){', alike for all tasks' * (len(tasks) > 1)}.",
        )
        yield from self._impossible_tasks()
        yield (
            all(value is None for value in stop.model_dump().values()),
            "stop: nothing would end this run; set at least one of " + ", ".join(StopConfig.model_fields) + ".",
        )
        yield (
            self.update.schedule in ("linear", "cosine") and stop.steps is None,
            f"update.schedule {self.update.schedule} falls towards the last step: set stop.steps.",
        )
        yield (
            self.update.schedule == "plateau" and (self.evaluation.items == 0 or self.evaluation.every is None),
            "update.schedule plateau goes by evaluations while training: set evaluation.items and evaluation.every.",
        )
        yield (
            self.update.schedule == "kl" and (offline or self.update.epochs * self.update.minibatches < 2),
            "update.schedule kl measures how far an update has moved the policy before its last optimiser step: "
            "it needs method rl, and update.epochs or update.minibatches above 1.",
        )
        yield (
            (self.update.schedule == "kl") != (self.update.target_kl is not None),
            "update.target_kl is what update.schedule kl goes by: set both, or neither.",
        )
        yield (
            self.kl.refresh_every is not None and self.policy.lora is not None,
            "kl.refresh_every moves the reference, and with policy.lora that is the model without its adapters: leave "
            "it out, or train all weights.",
        )
        yield (
            needs_evaluation and (self.evaluation.items == 0 or self.evaluation.every is None),
            "stop.metric and stop.patience need evaluations while training: set evaluation.items and evaluation.every.",
        )
        yield (
            stop.kl is not None and self.kl.place == "none" and not self.kl.measure,
            "stop.kl needs the KL to be measured: set kl.measure=true.",
        )
        yield (
            self.kl.target is not None and self.kl.place == "none",
            "kl.target adapts a penalty, but kl.place is none: set kl.place to reward or loss.",
        )

    def _impossible_tasks(self) -> Iterable[tuple[bool, str]]:
        several, names = isinstance(self.task, MixtureTask), list(getattr(self.task, "tasks", {}))
        for reward in (*self.rewards, *self.guards.beside):
            called = reward.name or reward.fn
            yield (
                not several and (reward.tasks is not None or reward.normalise == "task"),
                f"reward {called!r} tells tasks apart (tasks, normalise: task), and there is one only: leave that out, "
                "or name several in task.tasks (task.type mixture).",
            )
            stranger = next((name for name in reward.tasks or () if name not in names), "")
            yield several and bool(stranger), f"reward {called!r}: no task {stranger!r}; {closest(stranger, names)}"
        yield (
            self.update.balance != "none" and (len(names) < 2 or self.offline is not None),
            f"update.balance {self.update.balance} weighs the gradients of several tasks against each other, and "
            + ("there is one only: name several in task.tasks (task.type mixture), or leave it out."
               if len(names) < 2 else f"method.type {self.method.type} does not keep them apart: leave it out."),
        )  # fmt: skip
        unpaid = [name for name in names if all(r.tasks is not None and name not in r.tasks for r in self.rewards)]
        yield (
            self.offline is None and bool(unpaid),
            f"task.tasks.{''.join(unpaid[:1])}: no reward is about this task: name it in the `tasks` of one.",
        )
        yield (
            self.offline is not None and getattr(self.task, "progress", None) is not None,
            f"task.progress goes by the rewards of samples, and method.type {self.method.type} has none: leave it out.",
        )

    def _impossible_replay(self, replay: ReplayConfig) -> Iterable[tuple[bool, str]]:
        again, prompts = round(replay.share * self.rollout.prompts_per_step), self.rollout.prompts_per_step
        credit = self.credit.type
        yield (
            not 0 < again < prompts,
            f"rollout.replay.share {replay.share:g} of rollout.prompts_per_step {prompts} is {again} prompts: at least "
            "one must be taken from earlier steps, and one sampled.",
        )
        yield (
            self.objective.importance_cap is None,
            "rollout.replay learns from samples of earlier weights, and objective.importance_cap null does not correct "
            "for that. Set a cap (2.0).",
        )
        yield (
            self.rollout.ahead,
            "rollout.replay and rollout.ahead both learn from samples of earlier weights: leave one of them out.",
        )
        yield (
            credit in ("gae", "self_critical", "monte_carlo"),
            f"credit.type {credit} compares a sample with what the policy of now is worth (a critic, a greedy answer, "
            "rollouts), and rollout.replay brings samples of earlier policies: use a credit.type that compares the "
            "samples of a prompt, or reward_to_go.",
        )
        yield (
            any(r.constraint or r.normalise == "running" for r in self.rewards),
            "rollout.replay scores samples again; a reward with a constraint or normalise: running would count them "
            "twice. Leave one of them out.",
        )

    def _no_trust_region(self) -> Iterable[tuple[bool, str]]:
        """What a step of TRPO cannot go with."""
        update, policy, region = self.update, self.policy, "update.trust_region"
        if update.trust_region is None:
            return
        pulls = ("weight_decay", "max_grad_value", "l2_to_initial", "l1_to_initial", "stop_kl")
        set_here = [f"update.{name}" for name in pulls if getattr(update, name)]
        set_here += ["update.balance"] if update.balance != "none" else []
        yield (self.offline is not None, f"{region} bounds how far samples of a policy move it: it needs method rl.")
        yield (
            update.epochs * update.minibatches > 1,
            f"{region} makes one step of all samples, and its bound is on the way from the policy that drew them: "
            "update.epochs and update.minibatches must be 1.",
        )
        yield (
            policy.precision != "float32",
            f"{region} compares passes of weights that differ by a thousandth, which bfloat16 rounds away: set "
            "policy.precision=float32.",
        )
        yield (
            self.rollout.replay is not None,
            f"{region} bounds the way from the policy that drew the samples, and rollout.replay brings samples of "
            "others: leave one of them out.",
        )
        yield (policy.dropout, f"{region} compares passes, and dropout makes each another: set policy.dropout=false.")
        yield (
            policy.value_head is not None and not policy.value_head.detach_trunk,
            f"{region} moves the trunk by the loss of the policy alone: set policy.value_head.detach_trunk=true.",
        )
        yield (
            self.kl.place == "loss" and self.kl.estimator == "exact",
            f"{region} looks at the whole vocabulary for its own KL: take another kl.estimator (ratio_k3).",
        )
        yield (bool(set_here), f"{region} takes the place of AdamW: leave out {', '.join(set_here)}.")


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of YAML `files` (later over earlier) and `key.sub=value` overrides.

    Raises ConfigError naming the file or key, what was expected, and the nearest known name.
    """
    merged = _merged_run(files, overrides)
    if "stages" in merged:
        raise ConfigError(
            "stages: only `pertoken train` takes a chain; for all else there is config.yaml in the folder of each stage"
        )
    return validate(merged, RunConfig)


def load_stages(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The configurations of a chain, one per entry of `stages`; of a file without `stages` that of its one run.

    An entry has a `name` and what differs from the rest of the file. Its run folder lies in that of the chain, and its
    `policy.model` is what the stage before it has trained, unless it says otherwise. Anywhere in an entry `stage:NAME`
    stands for the model that an earlier stage has trained.
    """
    merged = _merged_run(files, overrides)
    if "stages" not in merged:
        return [validate(merged, RunConfig)]
    stages = merged.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError("stages: expected a list of sections, each with a `name` and what differs in it")
    folder, found = validate(merged, RunConfig).run_folder, list[RunConfig]()
    for place, stage in enumerate(stages):
        where = f"stages.{place}"
        if not isinstance(stage.get("name"), str) or stage["name"] in (config.name for config in found):
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
    """`values` over the settings that their `algorithm` stands for."""
    name = values.get("algorithm")
    if name is None:
        return values
    if name not in PRESETS:
        raise ConfigError(f"algorithm: unknown name {str(name)[:60]!r}; {closest(str(name), PRESETS)}")
    return merge(copy.deepcopy(dict(PRESETS[name].settings)), values)
