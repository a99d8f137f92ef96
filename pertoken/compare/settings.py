"""What is compared: arms, each of them a recipe with some settings changed, and the seeds of their runs."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from pertoken.config import RunConfig, Section, validate
from pertoken.config.reading import merge
from pertoken.config.run import recipe_values, with_changes
from pertoken.errors import ConfigError, closest
from pertoken.tracking.glossary import HELD_OUT, find

TEMPLATES: Mapping[str, Mapping[str, Any]] = {
    "base": {"stop": {"steps": 0}},
    "sft": {"method": {"type": "sft"}},
    "sequence": {"credit": {"type": "leave_one_out"}},
    "token": {},
    "trl": {"trl": {}},
}
"""What arms of these names are, before what is set in them."""

JUDGED = ("perplexity", "nats_per_token")
"""Metrics under a model, which is the same for all arms: that of the recipe, unless `evaluation.judge` is set."""

ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SheetConfig(Section):
    """Sheets for people, who say which of two answers is the better one without knowing whose it is."""

    pairs: tuple[tuple[str, str], ...] | None = None
    """Pairs of arms; null takes `against` with every arm that learns from samples, and `terminal` with the others of
    those."""
    items: int = Field(default=20, ge=0)
    """Items of a sheet, of those on which the two arms differ; 0 writes no sheets."""
    seed: int = 0
    """Decides which items, and who stands on the left."""


class CompareConfig(Section):
    """Several arms of one recipe, compared."""

    folder: str | None = None
    """Where runs, tables and sheets go; null makes comparisons/<name>."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each arm, with the seed of the recipe, the next one, and so on. May be raised later, to go on."""
    arms: Annotated[dict[ArmName, dict[str, Any] | None], Field(min_length=1)] | None = None
    """Name -> what differs from the recipe; null takes all five that follow (an override of one, such as
    compare.arms.sft.stop.steps=80, leaves the others). These names stand for something already: base (0 steps), sft
    (method sft), sequence (credit.type leave_one_out), token (as the recipe is), trl (by GRPO of TRL). The key `trl` in
    an arm has it trained by TRL, with these arguments of its GRPOConfig over those that follow from the recipe."""
    shared_start: str | None = "sft"
    """Arm whose model all arms begin with that learn from samples, seed by seed, unless they name a policy.model; it is
    trained once per seed. null (or sft, where no arm has that name) has them begin with that of the recipe."""
    against: str | None = None
    """Arm that differences are to; null takes sft, or the first one."""
    terminal: str | None = "sequence"
    """Arm whose final score the others are timed to; nothing is timed if no arm has that name."""
    metrics: tuple[str, ...] = ()
    """Held-out metrics of the tables; none takes evaluation.metric of the recipe alone."""
    sheets: SheetConfig = SheetConfig()


@dataclass(frozen=True)
class Arm:
    """One arm: its runs, seed by seed."""

    name: str
    runs: tuple[RunConfig, ...]
    """One for each seed; a single one where seeds make no difference, because nothing is trained."""
    trl: Mapping[str, Any] | None = None
    """Arguments of TRL's GRPOConfig; None is trained here."""

    @property
    def samples(self) -> bool:
        """It learns from samples, so that its generated tokens count."""
        return self.runs[0].offline is None and self.trains

    @property
    def trains(self) -> bool:
        return self.runs[0].stop.steps != 0


@dataclass(frozen=True)
class Plan:
    """A comparison as it is to be made."""

    settings: CompareConfig
    folder: Path
    arms: Mapping[str, Arm]
    """In the order of the file."""
    metrics: tuple[str, ...]
    """The main one first."""
    split: str
    against: str
    terminal: str | None
    start: str | None
    """The arm whose model others begin with."""

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of arms that there are sheets of."""
        if self.settings.sheets.pairs is not None:
            return list(self.settings.sheets.pairs)
        learners = [name for name, arm in self.arms.items() if arm.samples]
        firsts = dict.fromkeys(name for name in (self.against, self.terminal) if name is not None)
        pairs = [(first, other) for first in firsts for other in learners if other != first]
        return [pair for k, pair in enumerate(pairs) if pair[::-1] not in pairs[:k]]


def load_comparison(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Plan:
    """The comparison of YAML `files`: a recipe, and in its section `compare` what `CompareConfig` says.

    Raises ConfigError for an arm that cannot be, and for arms that cannot be compared.
    """
    recipe = recipe_values(files, [*_arms_that_stay(files, overrides), *overrides])
    try:
        settings = validate(recipe.pop("compare", None) or {}, CompareConfig)
    except ConfigError as error:
        raise ConfigError("\n".join(f"compare.{line}" for line in str(error).splitlines())) from None
    base = validate(recipe, RunConfig)
    metrics = _metrics(settings, base)
    if base.evaluation.judge is None and any(metric in JUDGED for metric in metrics):
        recipe["evaluation"] = {**(recipe.get("evaluation") or {}), "judge": base.policy.model}
    folder = Path(settings.folder or f"comparisons/{base.name}")
    given = settings.arms or dict.fromkeys(TEMPLATES)
    own = {name: merge(dict(TEMPLATES.get(name, {})), changes or {}) for name, changes in given.items()}
    start = _start(settings, own)
    arms = {name: _arm(name, changes, recipe, settings, folder, start) for name, changes in own.items()}
    _refuse_equals(arms)
    _refuse_other_evaluations(arms)
    if start is not None and not arms[start].trains:
        raise ConfigError(f"compare.shared_start: arm {start!r} trains nothing that others could begin with")
    pairs = settings.sheets.pairs or ()
    for field, name in [("against", settings.against), *(("sheets.pairs", name) for pair in pairs for name in pair)]:
        if name is not None and name not in arms:
            raise ConfigError(f"compare.{field}: no arm {name!r}; {closest(name, arms)}")
    against = settings.against or ("sft" if "sft" in arms else next(iter(arms)))
    terminal = settings.terminal if settings.terminal in arms and arms[settings.terminal].samples else None
    return Plan(settings, folder, arms, metrics, base.evaluation.split, against, terminal, start)


def _arms_that_stay(files: Sequence[str | Path], overrides: Sequence[str]) -> list[str]:
    """An override that reaches into an arm names none to the exclusion of others: where nothing else says which arms
    there are, it stands beside the usual ones."""
    others = [text for text in overrides if not text.startswith("compare.arms.")]
    if len(others) == len(overrides) or (recipe_values(files, others).get("compare") or {}).get("arms") is not None:
        return []
    return [f"compare.arms.{name}={{}}" for name in TEMPLATES]


def _start(settings: CompareConfig, names: Collection[str]) -> str | None:
    start = settings.shared_start
    if start is None or start in names:
        return start
    if "shared_start" in settings.model_fields_set:
        raise ConfigError(f"compare.shared_start: no arm {start!r}; {closest(start, names)}")
    return None


def _arm(
    name: str,
    own: dict[str, Any],
    recipe: Mapping[str, Any],
    settings: CompareConfig,
    folder: Path,
    start: str | None,
) -> Arm:
    where = f"compare.arms.{name}"
    for key in ("seed", "folder", "name", "compare", "stages"):
        if key in own:
            raise ConfigError(f"{where}.{key}: the comparison sets it for each of its runs; leave it out")
    trl = own.pop("trl", None)
    if trl is not None and not isinstance(trl, dict):
        raise ConfigError(f"{where}.trl: expected a map of GRPOConfig's arguments, {{}} for none; got {trl!r}")
    values = with_changes(recipe, own)
    runs = []
    for place in range(settings.seeds):
        seed = int(recipe["seed"]) + place
        run = values | {"name": name, "seed": seed, "folder": str(_run_folder(folder, name, seed))}
        try:
            config = validate(run, RunConfig)
            if start not in (None, name) and Arm(name, (config,)).samples and "model" not in (own.get("policy") or {}):
                model = str(_run_folder(folder, str(start), seed) / "model")
                config = validate(run | {"policy": {**values["policy"], "model": model}}, RunConfig)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        runs.append(config)
    arm = Arm(name, tuple(runs), trl)
    if trl is not None and not arm.samples:
        raise ConfigError(f"{where}.trl: GRPO learns from samples: leave method and stop.steps of this arm as they are")
    return arm if arm.trains else Arm(name, arm.runs[:1])


def _run_folder(folder: Path, arm: str, seed: int) -> Path:
    return folder / arm / f"seed-{seed}"


def _refuse_equals(arms: Mapping[str, Arm]) -> None:
    """Two arms that are the same, as the templates are of a recipe that credits whole texts, would compare chance."""
    seen: dict[str, str] = {}
    for name, arm in arms.items():
        told = arm.runs[0].model_copy(update={"name": "arm", "folder": None}).to_yaml() + str(arm.trl)
        if told in seen:
            raise ConfigError(
                f"compare.arms.{name}: the same as arm {seen[told]!r}; leave one out, or set what differs (the credit "
                "of the arm `token` is that of the recipe)"
            )
        seen[told] = name


def _refuse_other_evaluations(arms: Mapping[str, Arm]) -> None:
    first_name, first = next((name, arm.runs[0].evaluation) for name, arm in arms.items())
    if not first.items:
        raise ConfigError("evaluation.items is 0: arms are compared by held-out items; set it in the recipe")
    for name, arm in arms.items():
        other = arm.runs[0].evaluation
        for key in ("split", "items", "sampling", "judge"):
            if getattr(other, key) != getattr(first, key):
                raise ConfigError(
                    f"compare.arms.{name}: evaluation.{key} is another than that of {first_name!r}: arms are compared "
                    "on the same held-out items, answered and judged in the same way; set it for all of them"
                )


def _metrics(settings: CompareConfig, base: RunConfig) -> tuple[str, ...]:
    metrics = settings.metrics or (base.evaluation.metric,)
    for metric in metrics:
        if find(metric, HELD_OUT) is None:
            raise ConfigError(f"compare.metrics: unknown {metric!r}; {closest(metric, HELD_OUT)}")
    return tuple(dict.fromkeys(metrics))
