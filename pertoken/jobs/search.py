"""Hyper-parameter search: which values of some keys of a configuration give the best held-out metric?

A search is a folder with a study of Optuna in it (`study.log`) and a folder for each trial. A trial is one choice of
values; it trains one ordinary run for each of a few successive seeds, and what counts is the mean of their last
held-out metric. The study knows which values were drawn and how each trial ended, the run folders all the rest: so a
search that was killed goes on where its last run stood, and what had begun is not drawn again.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from pertoken.config import Name, RunConfig, Section, explain, load_config, load_settings
from pertoken.errors import (
    ConfigError,
    MissingExtraError,
    ModelError,
    NumericsError,
    RewardError,
    RunFolderError,
    TaskError,
    closest,
)
from pertoken.jobs.many import Ended, Job
from pertoken.text_metrics import Interval, t_mean
from pertoken.tracking import RunReader
from pertoken.tracking.files import read_bytes, write_whole, writing
from pertoken.tracking.glossary import HELD_OUT, find
from pertoken.tracking.lock import LOCK, WRITER, RunLock

STUDY = "study.log"
"""Optuna's journal in the folder of a search."""
SEED_STRIDE = 1_000_000
"""What Optuna is told as the step of an evaluation: place of the seed * this + the run's own step."""
HOPELESS = 3
"""So many trials that failed, and none that did not, end a search: it is not their values then."""
FAULTS = (ConfigError, ModelError, NumericsError, RewardError, TaskError, MemoryError, torch.OutOfMemoryError)
"""What makes a trial fail; all else (a full disk, an extra that is missing) ends the search, to be gone on with."""


class Range(Section):
    """Numbers from `low` to `high`, both included; whole ones if the key or both ends are."""

    low: int | float
    """Least value."""
    high: int | float
    """Largest value."""
    step: int | float | None = Field(default=None, gt=0)
    """Only low, low + step, low + 2 step, ...; null takes all in between."""
    log: bool = False
    """Draw evenly over orders of magnitude."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log: true needs low above 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        """All its numbers are written as whole ones."""
        return all(isinstance(number, int) for number in (self.low, self.high, self.step or 1))


Choices = Annotated[tuple[Any, ...], Field(min_length=1)]
Values = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(lambda value: "choices" if isinstance(value, list | tuple) else "range"),
]


class Prune(Section):
    """When a trial is ended before its time, at a held-out evaluation of any of its seeds."""

    startup_trials: int = Field(default=4, ge=1)
    """So many trials run to their end first."""
    percentile: float = Field(default=50.0, gt=0, lt=100)
    """It goes on if its best value so far is among this many percent best that complete trials had at the same step of
    the same seed; 50 is the median."""
    warmup_steps: int = Field(default=0, ge=0)
    """No trial is ended before this step of its first seed."""


class SearchConfig(Section):
    """A search: what is drawn, how often, and by what it is judged."""

    name: Name = "search"
    """Name of the search; part of its folder and of the names of its runs."""
    folder: str | None = None
    """Folder of the study; null makes searches/<name>."""
    recipe: str
    """YAML file of the run that is varied, as `pertoken train` takes it."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE over the recipe, for all trials."""
    keys: dict[str, Values] = Field(min_length=1)
    """Key of the configuration -> a list of values, or a range (low, high, step, log)."""
    trials: int = Field(default=20, ge=1)
    """How many choices of values are tried, failed ones included. May be raised later, to go on."""
    seeds: int = Field(default=2, ge=1)
    """Runs of each trial, with the recipe's seed, the next one, and so on."""
    metric: str | None = None
    """Held-out metric that decides, as evaluation.metric; null takes that of the recipe."""
    direction: Literal["higher", "lower"] | None = None
    """Which values of it are better; null takes what the glossary says."""
    sampler: Literal["tpe", "random"] = "tpe"
    """tpe: after ten trials at random, values like those of the better trials (Bergstra et al. 2011); random: all at
    random."""
    seed: int = Field(default=0, ge=0)
    """Decides the draws."""
    prune: Prune | None = Prune()
    """When a trial is ended early; null lets each run to its end."""
    keep_models: Literal["best", "all"] = "best"
    """Whose models and checkpoints stay on disk; logs, samples and reports stay of all."""

    @model_validator(mode="after")
    def _different_choices(self) -> "SearchConfig":
        for key, values in self.keys.items():
            if not isinstance(values, Range) and len(set(map(_label, values))) < len(values):
                raise ValueError(f"keys.{key}: the same value twice")
        return self

    @property
    def study_folder(self) -> Path:
        return Path(self.folder or f"searches/{self.name}")

    def load_run(self, settings: Sequence[str] = ()) -> RunConfig:
        """The recipe with `settings` over it."""
        metric = [f"evaluation.metric={self.metric}"] if self.metric else []
        return load_config([self.recipe], [*self.overrides, *metric, *settings])


@dataclass(frozen=True)
class TrialRow:
    """One trial, as the table has it."""

    number: int
    state: Literal["complete", "pruned", "failed", "cut off"]
    values: dict[str, Any]
    scores: tuple[float, ...]
    """The last held-out metric of each seed that came to its end."""
    failed: str = ""
    """Why it failed."""

    @property
    def interval(self) -> Interval | None:
        """Mean over the seeds and its 95% t interval (of one seed it has no ends); None without a seed."""
        return t_mean(self.scores) if self.scores else None


@dataclass(frozen=True)
class Found:
    """What a search has come to so far."""

    folder: Path
    metric: str
    keys: tuple[str, ...]
    rows: list[TrialRow]
    """Complete trials from best to worst, then the others."""
    importance: dict[str, float]
    """Share of each key in how good a trial is (PED-ANOVA); empty where there are too few trials or keys."""
    best: Path | None
    """The best configuration as YAML."""
    ended: Ended
    """Why it is not complete."""

    def table(self) -> list[tuple[str, ...]]:
        """Head and rows: trial, state, mean and interval over the seeds, each seed, each key."""
        rows: list[tuple[str, ...]] = [("trial", "state", f"{self.metric} [95%]", "by seed", *self.keys)]
        for row in self.rows:
            mean, place = "", row.interval
            if place is not None:
                ends = f" [{place.low:.4g}, {place.high:.4g}]" if math.isfinite(place.low) else ""
                mean = f"{place.mean:.4g}{ends}"
            values = (_label(row.values[key], digits=4) if key in row.values else "" for key in self.keys)
            scores = "  ".join(f"{score:.4g}" for score in row.scores)
            rows.append((str(row.number), row.state, mean, scores, *values))
        return rows

    def words(self) -> list[str]:
        """What is to be said below the table."""
        lines = [f"intervals: Student t over the seeds of a trial; folder: {self.folder}"]
        lines += [f"trial {row.number} failed: {row.failed}" for row in self.rows if row.failed]
        if self.importance:
            shares = (f"{key} {share:.0%}" for key, share in self.importance.items())
            lines.append(f"what decides how good a trial is (PED-ANOVA): {', '.join(shares)}")
        if self.best is not None:
            lines.append(
                f"best: {self.best}. The best of several looks better than it is; with a seed of its own it says how "
                f"good it is: pertoken train {self.best}"
            )
        return [*lines, f"{self.ended}: the same command goes on"] if self.ended else lines


def load_search(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> SearchConfig:
    """The search of YAML `files`, with every key and range looked at.

    Raises ConfigError for a key that does not exist, a value that the section of its key refuses by itself, and for
    what a search cannot be judged by. Combinations that a run refuses are found when they are drawn.
    """
    config = load_settings(SearchConfig, files, overrides)
    base = config.load_run()
    for key in config.keys:
        if key in ("seed", "folder", "name"):
            raise ConfigError(f"keys.{key}: the search sets it for each of its runs; leave it out")
        for value in _ends(config.keys[key]):
            if problem := _refusal(config, key, value):
                raise ConfigError(f"keys.{key}: {problem}")
    evaluation = base.evaluation
    if not evaluation.items:
        raise ConfigError("evaluation.items is 0: a search goes by held-out items; set it in the recipe or `overrides`")
    if find(evaluation.metric, HELD_OUT) is None:
        raise ConfigError(f"metric: unknown {evaluation.metric!r}; {closest(evaluation.metric, HELD_OUT)}")
    _direction(config, evaluation.metric)
    return config


def search(
    config: SearchConfig,
    *,
    on_note: Callable[[str], None] = lambda note: None,
    interrupted: Callable[[], bool] = lambda: False,
    max_seconds: float = math.inf,
) -> Found:
    """Make the trials of `config` that its study does not have yet, and tell how all of them ended.

    `interrupted` and `max_seconds` end it as they end a run: the run is saved, and the same call goes on with it.
    """
    _optuna()  # before anything is written
    folder, base = config.study_folder, config.load_run()
    with writing("the search", folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = RunLock(folder)
    try:
        _keep_settings(config, base, folder)
        trials = _Trials(config, base, Job(on_note, interrupted, max_seconds))
        ended = trials.run()
        rows = trials.rows()
        return Found(
            folder,
            base.evaluation.metric,
            tuple(config.keys),
            rows,
            trials.importance(),
            trials.write_best(rows),
            ended,
        )
    finally:
        lock.release()


class _Trials:
    """The trials of a search: drawn, trained, told to the study."""

    def __init__(self, config: SearchConfig, base: RunConfig, job: Job) -> None:
        self._optuna = optuna = _optuna()
        self._config, self._base, self._job, self._on_note = config, base, job, job.on_note
        prune = config.prune
        self._study = optuna.create_study(
            storage=_storage(config.study_folder / STUDY),
            study_name=config.name,
            direction={"higher": "maximize", "lower": "minimize"}[_direction(config, base.evaluation.metric)],
            pruner=optuna.pruners.NopPruner()
            if prune is None
            else optuna.pruners.PercentilePruner(prune.percentile, prune.startup_trials, prune.warmup_steps),
            load_if_exists=True,
        )

    def run(self) -> Ended:
        """Make all trials that have not ended; why it stopped before, if it did."""
        for number in range(self._config.trials):
            before = self._study.get_trials(deepcopy=False)
            if number < len(before) and before[number].state.is_finished():
                continue
            if not self._job.ended():
                self._make(number)
            if ended := self._job.ended():
                return ended
            rows = self.rows()
            if len(rows) >= HOPELESS and all(row.state == "failed" for row in rows):
                raise ConfigError(f"all {len(rows)} trials have failed; the search ends. The last: {rows[-1].failed}")
        return ""

    def _make(self, number: int) -> None:
        """Draw trial `number`, or go on with it, until it has ended or the search has."""
        study, states = self._study, self._optuna.trial.TrialState
        study.sampler = self._sampler(number)
        begun = study.get_trials(deepcopy=False)[number:]
        trial = self._optuna.trial.Trial(study, begun[0]._trial_id) if begun else study.ask()
        values = {key: self._draw(trial, key) for key in self._config.keys}
        told = ", ".join(f"{key} {_label(value, digits=4)}" for key, value in values.items())
        self._on_note(f"trial {number} of {self._config.trials}: {told}")
        try:
            scores = self._scores(trial, values)
        except FAULTS as error:
            trial.set_user_attr("failed", f"{error}")
            study.tell(trial, state=states.FAIL)
            self._on_note(f"trial {number} failed: {error}")
        except self._optuna.TrialPruned:
            study.tell(trial, state=states.PRUNED)
            self._on_note(f"trial {number} pruned: worse than others were at this step")
        else:
            if scores is None:  # it goes on when the search does
                return
            study.tell(trial, fmean(scores))
        self._tidy()

    def _sampler(self, number: int) -> Any:
        """A sampler of its own for each trial: one with the seed of the search would draw the first trials again
        whenever the search goes on."""
        samplers = self._optuna.samplers
        seed = int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        return samplers.TPESampler(seed=seed) if self._config.sampler == "tpe" else samplers.RandomSampler(seed=seed)

    def _draw(self, trial: Any, key: str) -> Any:
        """The value of `key` in this trial."""
        values = self._config.keys[key]
        if not isinstance(values, Range):
            label = trial.suggest_categorical(key, list(map(_label, values)))
            return next(value for value in values if _label(value) == label)
        if values.whole and not _takes_fractions(key):
            return trial.suggest_int(key, values.low, values.high, step=values.step or 1, log=values.log)
        return trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)

    def _run_config(self, number: int, values: Mapping[str, Any], place: int) -> RunConfig:
        folder = self._config.study_folder / f"trial-{number:03d}" / f"seed-{self._base.seed + place}"
        name, seed = f"{self._config.name}-{number}", self._base.seed + place
        own = _settings({"folder": str(folder), "name": name, "seed": seed})
        return self._config.load_run([*_settings(values), *own])

    def _scores(self, trial: Any, values: Mapping[str, Any]) -> list[float] | None:
        """The metric of each seed; None if the search has ended before the trial."""
        scores: list[float] = []
        for place in range(self._config.seeds):
            config = self._run_config(trial.number, values, place)
            if not self._train(trial, config, place):
                return None
            scores.append(_last(config))
            trial.set_user_attr("scores", scores)
            self._on_note(f"trial {trial.number}, seed {config.seed}: {config.evaluation.metric} {scores[-1]:.4g}")
            if place + 1 < self._config.seeds and self._hopeless(trial, config, place):
                raise self._optuna.TrialPruned
        return scores

    def _train(self, trial: Any, config: RunConfig, place: int) -> bool:
        """Train a run to its end; False if the search has ended before. Raises TrialPruned."""
        pruned = False

        def ends() -> bool:
            nonlocal pruned
            pruned = pruned or self._hopeless(trial, config, place)
            return pruned

        finished = self._job.train(config, ends=ends)
        if pruned and not finished:
            raise self._optuna.TrialPruned
        return finished

    def _hopeless(self, trial: Any, config: RunConfig, place: int) -> bool:
        """Tell the study of the evaluations that the run has made, but that of the untrained model; shall it end?"""
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for row in RunReader(config.run_folder).evaluations():
            step, value = place * SEED_STRIDE + row["step"], row["metrics"].get(config.evaluation.metric)
            if row["split"] == config.evaluation.split and row["step"] and value is not None and step not in known:
                trial.report(value, step)
        return bool(trial.should_prune())

    def _tidy(self) -> None:
        """Remove models and checkpoints of trials that have ended, but those of the best one."""
        if self._config.keep_models == "all":
            return
        rows = self.rows()
        kept = [row.number for row in rows if row.state == "cut off" or row is _best(rows)]
        for row in rows:
            for run in (self._config.study_folder / f"trial-{row.number:03d}").glob("seed-*"):
                for name in ("model", "model-ema", "checkpoints"):
                    if row.number not in kept:
                        shutil.rmtree(run / name, ignore_errors=True)

    def rows(self) -> list[TrialRow]:
        """All trials so far, complete ones first, best of all at the top."""
        states = self._optuna.trial.TrialState
        names: dict[Any, Any] = {states.COMPLETE: "complete", states.PRUNED: "pruned", states.FAIL: "failed"}
        found = [
            TrialRow(
                trial.number, names.get(trial.state, "cut off"), self._values(trial.params),
                tuple(trial.user_attrs.get("scores", ())), trial.user_attrs.get("failed", ""),
            )
            for trial in self._study.get_trials(deepcopy=False)
        ]  # fmt: skip
        sign = -1.0 if self._study.direction.name == "MAXIMIZE" else 1.0
        return sorted(found, key=lambda row: (row.state != "complete", sign * fmean(row.scores or [0.0]), row.number))

    def _values(self, drawn: Mapping[str, Any]) -> dict[str, Any]:
        """The values that stand behind what the study has of them."""
        found = {}
        for key, value in drawn.items():
            values = self._config.keys[key]
            choices = {} if isinstance(values, Range) else {_label(choice): choice for choice in values}
            found[key] = choices.get(value, value)
        return found

    def importance(self) -> dict[str, float]:
        """Share of each key in how good a trial is; from so many trials on that it says something."""
        complete = sum(row.state == "complete" for row in self.rows())
        if len(self._config.keys) < 2 or complete < 8:
            return {}
        return dict(self._optuna.importance.get_param_importances(self._study))

    def write_best(self, rows: Sequence[TrialRow]) -> Path | None:
        """The configuration of the best trial with a seed that the search has not seen, to be trained anew."""
        best = _best(rows)
        if best is None:
            return None
        seed = self._base.seed + self._config.seeds
        own = _settings({"name": f"{self._config.name}-best", "seed": seed})
        config = self._config.load_run([*_settings(best.values), *own]).model_copy(update={"folder": None})
        path = self._config.study_folder / "best.yaml"
        head = f"# Trial {best.number} of the search {self._config.name}, with a seed that it has not seen.\n"
        write_whole(path, (head + config.to_yaml()).encode(), "the best configuration")
        return path


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "search", "a search over the configuration") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _storage(path: Path) -> Any:
    """The study's journal, mended: a kill may leave a torn last line and a lock, and nobody else writes here now."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    raw = read_bytes(path)
    if not raw.endswith(b"\n"):
        write_whole(path, raw[: raw.rfind(b"\n") + 1], "the study")
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def _best(rows: Sequence[TrialRow]) -> TrialRow | None:
    return rows[0] if rows and rows[0].state == "complete" else None


def _direction(config: SearchConfig, metric: str) -> str:
    """Which values of the metric are better."""
    term = find(metric, HELD_OUT)
    known = config.direction or (term.better if term else "either")
    if known == "either":
        raise ConfigError(f"direction: neither more nor less of {metric} is better by itself; say higher or lower")
    return known


def _last(config: RunConfig) -> float:
    """The held-out metric that a run has ended with."""
    rows = [r for r in RunReader(config.run_folder).evaluations() if r["split"] == config.evaluation.split]
    value = rows[-1]["metrics"].get(config.evaluation.metric) if rows else None
    if value is None:
        raise NumericsError(f"{config.run_folder}: {config.evaluation.metric} is no finite number at the end")
    return float(value)


def _label(value: Any, *, digits: int | None = None) -> str:
    """A value as a choice of the study, or in the table.

    >>> _label("gae"), _label(0.00012345678, digits=4), _label({"type": "gae"}), _label(None)
    ('gae', '0.0001235', '{"type": "gae"}', 'null')
    """
    if isinstance(value, str):
        return value
    return f"{value:.{digits}g}" if digits and isinstance(value, float) else json.dumps(value, default=str)


def _settings(values: Mapping[str, Any]) -> list[str]:
    """Values as KEY=VALUE: a section, and a `type`, which replaces its section, before what is set in it.

    >>> _settings({"credit.gamma": 1e-06, "credit.type": "gae", "kl": {"place": "none"}})
    ['kl={place: none}', 'credit.type=gae', 'credit.gamma=1.0e-06']
    """
    order = sorted(values, key=lambda key: (key.count("."), not key.endswith(".type")))
    texts = (yaml.safe_dump(values[key], default_flow_style=True, width=math.inf, allow_unicode=True) for key in order)
    return [f"{key}={text.removesuffix(_DOCUMENT_END).strip()}" for key, text in zip(order, texts, strict=True)]


_DOCUMENT_END = "...\n"
"""What YAML sets behind a plain value."""


@cache
def _takes_fractions(key: str) -> bool:
    """Whether the configuration says of the key that it is no whole number."""
    name = ".".join("0" if part.isdecimal() else part for part in key.split("."))
    return any(field == name and "float" in kind for field, kind, *_ in explain(RunConfig))


def _ends(values: Range | Sequence[Any]) -> Sequence[Any]:
    return (values.low, values.high) if isinstance(values, Range) else values


def _refusal(config: SearchConfig, key: str, value: Any) -> str | None:
    """Why the section of `key` has no such value, whatever type of section is drawn beside it; None if it may."""
    problem = None
    for context in _contexts(config, key):
        try:
            config.load_run(_settings({**context, key: value}))
        except ConfigError as error:
            of_key = [line for line in str(error).splitlines() if _is_about(line, key)]
            if not of_key:
                return None
            problem = of_key[0]
        else:
            return None
    return problem


def _contexts(config: SearchConfig, key: str) -> Iterator[dict[str, Any]]:
    """What else is drawn that decides which keys there are: types of sections around `key`, and `algorithm`."""
    deciding = {
        name: values
        for name, values in config.keys.items()
        if name != key and not isinstance(values, Range)
        and (name == "algorithm" or (name.endswith(".type") and key.startswith(name.removesuffix("type"))))
    }  # fmt: skip
    for chosen in product(*deciding.values()):
        yield dict(zip(deciding, chosen, strict=True))


def _is_about(line: str, key: str) -> bool:
    """Whether a line of a ConfigError is about the value of `key`, and not about several that do not go together.

    >>> _is_about("credit.gama: unknown key in credit", "credit.gama"), _is_about("credit.type gae needs a", "credit")
    (True, False)
    """
    where, colon, problem = line.partition(": ")
    inside = where == key or where.startswith(f"{key}.") or (problem.startswith("unknown key") and where in key)
    return bool(colon) and " " not in where and inside


def _keep_settings(config: SearchConfig, base: RunConfig, folder: Path) -> None:
    """Write what is searched beside the study; refuse to go on with one that has searched something else."""
    path, files = folder / "search.yaml", {"search.yaml", "search.yaml.tmp", LOCK, WRITER, f"{WRITER}.tmp"}
    what = {"name", "keys", "seeds", "direction", "sampler", "seed"}
    now = {"search": config.model_dump(mode="json"), "run": base.model_dump(mode="json")}
    if raw := read_bytes(path):
        before = yaml.safe_load(raw)
        changed = [key for key in sorted(what) if now["search"][key] != before["search"].get(key)]
        changed += [f"{key} of the recipe" for key, value in now["run"].items() if value != before["run"].get(key)]
        if changed:
            raise ConfigError(
                f"{folder} has a search of something else: {changed[0]} is not what it was (see search.yaml there). "
                "Give this one another name or folder, or remove that one; trials, prune and keep_models may change."
            )
    elif any(path.name not in files for path in folder.iterdir()):
        raise RunFolderError(f"{folder} holds files that are not of a search: choose a new or an empty folder")
    write_whole(path, yaml.safe_dump(now, sort_keys=False, allow_unicode=True).encode(), "the settings of the search")
