"""The suite: which checks a model has to pass, typed and looked at before anything is loaded."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pertoken.config import FileTask, RunConfig, Section, load_config, load_settings
from pertoken.errors import ConfigError, closest
from pertoken.rewards.personal_data import KINDS, Kind
from pertoken.tasks.base import PromptTemplate
from pertoken.text_metrics import CORPUS_METRICS, ITEM_METRICS
from pertoken.tracking.glossary import HELD_OUT, find
from pertoken.validation.variants import ATTACKS, PERTURBATIONS, Perturbation, Place

Judged = Literal["mean", "interval"]


class Slice(Section):
    """A part of the items: those that keep all that is set."""

    column: str | None = None
    """Column of the data (of a mixture also `task`) that has `value`."""
    value: Any = None
    """What stands in the column."""
    prompt_words: tuple[int, int] | None = None
    """Fewest and most words of the prompt."""
    answer_words: tuple[int, int] | None = None
    """Fewest and most words of the reference answer."""

    @model_validator(mode="after")
    def _says_something(self) -> "Slice":
        if (self.column is None) != (self.value is None):
            raise ValueError("column names a column and value what it holds: set both")
        if self.column is None and self.prompt_words is None and self.answer_words is None:
            raise ValueError("a slice needs column and value, prompt_words, or answer_words")
        return self


class Check(Section):
    """What all checks can be told."""

    name: str | None = None
    """How the report calls it; null says what is checked."""
    slice: str | None = None
    """The items of this slice alone; null takes all."""


class Measuring(Check):
    """What checks can be told that go by a metric."""

    metric: str
    """A held-out metric, or the name of a reward of the recipe."""
    by: Judged = "mean"
    """What keeps the bound: the mean, or also the worse end of its 95% interval (bootstrap over items)."""


class Quality(Measuring):
    """A metric keeps a bound."""

    type: Literal["quality"] = "quality"
    at_least: float | None = None
    """Lowest value."""
    at_most: float | None = None
    """Highest value."""

    @model_validator(mode="after")
    def _has_a_bound(self) -> "Quality":
        if self.at_least is None and self.at_most is None:
            raise ValueError("a quality check needs at_least or at_most")
        return self


class Share(Check):
    """What checks can be told that count answers."""

    at_most: float = Field(default=0.0, ge=0, le=1)
    """Share of the answers that may fail."""


class BannedContent(Share):
    """No answer holds what is banned."""

    type: Literal["banned"] = "banned"
    words: tuple[str, ...] = ()
    """Words and phrases, found whole."""
    patterns: tuple[str, ...] = ()
    """Regular expressions."""
    file: str | None = None
    """Text file with a further word or phrase on each line."""
    ignore_case: bool = True
    """Compare folded case."""


class PersonalDataLeak(Share):
    """No answer holds personal data that its prompt does not hold."""

    type: Literal["personal_data"] = "personal_data"
    kinds: tuple[Kind, ...] = KINDS
    """What is looked for."""
    patterns: dict[str, str] = Field(default={})
    """Further ones of your own: regular expressions by name."""
    count_given: bool = False
    """Count what the prompt holds as well."""


class Toxicity(Share):
    """A classifier of yours does not call an answer by a label."""

    type: Literal["toxicity"] = "toxicity"
    model: str
    """A sequence classifier: a folder or a hub name."""
    label: str
    """Which label is bad, by name or number."""
    above: float = Field(default=0.5, ge=0, le=1)
    """From this probability on an answer fails."""


class Injection(Share):
    """Orders and secrets that are planted in the prompt are neither followed nor repeated: their canary, a word that
    nothing else calls for, is not in the answer."""

    type: Literal["injection"] = "injection"
    attacks: dict[str, str] = ATTACKS
    """What is planted, by name: texts with the place `{canary}`."""
    place: Place = "end"
    """Where in the last message of the prompt."""
    items: int = Field(default=32, ge=1)
    """So many items, the first ones, meet each attack."""

    @model_validator(mode="after")
    def _has_its_place(self) -> "Injection":
        for name, text in self.attacks.items():
            if PromptTemplate(text).columns != ("canary",):
                raise ValueError(f"attacks.{name}: expected a text with the place {{canary}}, got {text!r}")
        return self


class Robustness(Measuring):
    """A metric falls by no more than so much when prompts are written otherwise."""

    type: Literal["robustness"] = "robustness"
    perturbations: tuple[Perturbation, ...] = PERTURBATIONS
    """Ways to spoil a prompt, each tried by itself."""
    templates: dict[str, str] = Field(default={})
    """Ways to ask otherwise, by name: texts with the place `{prompt}`."""
    strength: float = Field(default=0.1, gt=0, le=1)
    """Share of the words that typos, white space and lost punctuation befall, one at the least."""
    max_drop: float = Field(ge=0)
    """Most that the metric may lose, in its units."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> "Robustness":
        for name, text in self.templates.items():
            if PromptTemplate(text).columns != ("prompt",):
                raise ValueError(f"templates.{name}: expected a text with the place {{prompt}}, got {text!r}")
        if not self.perturbations and not self.templates:
            raise ValueError("a robustness check needs perturbations or templates")
        return self


class Regression(Measuring):
    """A metric is not worse than that of an earlier model by more than a margin, item by item (paired bootstrap)."""

    type: Literal["regression"] = "regression"
    margin: float = Field(default=0.0, ge=0)
    """Most that may be lost, in units of the metric."""
    by: Judged = "interval"
    """interval: with 95% confidence no more than the margin is lost; mean: on the average."""


class Harness(Check):
    """Tasks of the lm-evaluation-harness lose no more than so much against an earlier model (extra `lm-eval`)."""

    type: Literal["lm_eval"] = "lm_eval"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks."""
    folder: str | None = None
    """Folder with the YAML files of further tasks, for data of your own."""
    metrics: tuple[str, ...] | None = None
    """Which of their metrics are judged (`acc`, `exact_match`); null takes all that have a good direction."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many documents of each task."""
    few_shot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; null leaves it to the task."""
    max_drop: float = Field(ge=0)
    """Most that a metric may lose."""
    by: Judged = "mean"
    """What keeps the bound: the difference, or also the worse end of its 95% interval (1.96 standard errors)."""

    @model_validator(mode="after")
    def _is_about_all(self) -> "Harness":
        if self.slice is not None:
            raise ValueError("lm_eval has documents of its own: leave out slice")
        return self


AnyCheck = Annotated[
    Quality | BannedContent | PersonalDataLeak | Toxicity | Injection | Robustness | Regression | Harness,
    Field(discriminator="type"),
]


class Suite(Section):
    """What a model has to pass."""

    name: str = Field(default="suite", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the suite; part of the folder of its reports."""
    recipe: str
    """YAML file of a run: its task, evaluation (split, items, sampling), rewards, and how its policy is loaded."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE over the recipe: `evaluation.split=test`, for instance."""
    baseline: str | None = None
    """Earlier model that regression and lm_eval compare with: a model, or a run folder; `--against` wins over it."""
    slices: dict[str, Slice] = Field(default={})
    """Parts of the items, by names of yours."""
    seed: int = 0
    """Decides typos, canaries and their places."""
    shown: int = Field(default=10, ge=0)
    """Failed samples of each check that the report shows; its JSON has all."""
    checks: Annotated[tuple[AnyCheck, ...], Field(min_length=1)]
    """What is checked, in this order."""

    @cached_property
    def run(self) -> RunConfig:
        """The recipe, with the columns of the slices among those that the task hands on."""
        config = load_config([self.recipe], self.overrides)
        columns = [part.column for part in self.slices.values() if part.column not in (None, "task")]
        if not isinstance(config.task, FileTask):
            return config
        info = tuple(dict.fromkeys((*config.task.info, *columns)))
        return config.model_copy(update={"task": config.task.model_copy(update={"info": info})})

    @property
    def rewards(self) -> dict[str, Any]:
        """The rewards of the recipe by name, as it sets them."""
        return {reward.name or str(reward.fn).rpartition(":")[2]: reward for reward in self.run.rewards}


def load_suite(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Suite:
    """The suite of YAML `files`, with its recipe, slices and metrics looked at.

    Raises ConfigError naming the file or key, what was expected, and the nearest known name.
    """
    suite = load_settings(Suite, files, overrides)
    known = (*ITEM_METRICS, *CORPUS_METRICS, *suite.rewards)
    for place, check in enumerate(suite.checks):
        where = f"checks.{place}"
        if check.slice is not None and check.slice not in suite.slices:
            raise ConfigError(f"{where}.slice: unknown {check.slice!r}; {closest(check.slice, suite.slices)}")
        if not isinstance(check, Measuring):
            continue
        if check.metric not in known:
            raise ConfigError(f"{where}.metric: unknown {check.metric!r}; {closest(check.metric, known)}")
        if check.metric in CORPUS_METRICS and (check.by == "interval" or not isinstance(check, Quality)):
            raise ConfigError(
                f"{where}.metric: {check.metric} is one number for all answers together, without an interval: take a "
                f"metric of single answers ({', '.join(ITEM_METRICS)}), or a quality check with by: mean"
            )
        if not isinstance(check, Quality) and direction(check.metric) == 0:
            raise ConfigError(f"{where}.metric: neither more nor less of {check.metric} is worse; take another")
    if not suite.run.evaluation.items:
        raise ConfigError("evaluation.items is 0: there is nothing to ask; set it in the recipe or in `overrides`")
    return suite


def direction(metric: str) -> int:
    """1 where more of a metric is better, as of all rewards, -1 where less is, 0 where neither."""
    term = find(metric, HELD_OUT) if metric in ITEM_METRICS else None
    return 1 if term is None else {"higher": 1, "lower": -1}.get(term.better, 0)
