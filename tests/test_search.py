"""Searches: what is drawn, what ends early, what a kill costs, and which mistakes are told at once."""

import builtins
import json
import os
import time
from statistics import median

import pytest
import yaml

from pertoken.config import load_config
from pertoken.errors import ConfigError, MissingExtraError, NumericsError, RunFolderError
from pertoken.jobs import many
from pertoken.jobs.run import RunResult
from pertoken.jobs.search import SEED_STRIDE, SearchConfig, load_search, search
from pertoken.tracking import RunLog, RunReader, runlog
from pertoken.tracking.runlog import read_run

RECIPE = """
evaluation: {items: 2, every: 1, metric: chrf}
stop: {steps: 3}
seed: 7
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**given):
    values = {
        "recipe": "recipe.yaml",
        "keys": {"update.learning_rate": {"low": 0.1, "high": 1.0}},
        "trials": 3,
        "sampler": "random",
        "prune": None,
    }
    return SearchConfig.model_validate(values | given)


class Trainer:
    """In place of `train`: the metric after `step` is learning rate * step + seed / 1000; every evaluation is kept."""

    def __init__(self, dies_at=None):
        self.evaluated, self.dies_at = [], dies_at

    def value(self, config, step):
        return config.update.learning_rate * step + config.seed / 1000

    def __call__(self, config, *, resume, interrupted, max_seconds):
        folder, done = config.run_folder, 0
        if resume is None:
            log = RunLog.create(folder, config_text=config.to_yaml(), seed=config.seed)
        else:
            assert resume == folder
            assert read_run(folder)["status"] != "finished"
            done = 1 + max((row["step"] for row in RunReader(folder).evaluations()), default=-1)
            log = RunLog.open(folder, step=done - 1)
        with log:
            for step in range(done, config.stop.steps + 1):
                if len(self.evaluated) == self.dies_at:
                    raise Killed
                summary = {"metrics": {"chrf": self.value(config, step)}}
                log.evaluation(step, "validation", summary, [{"id": "a", "metrics": summary["metrics"]}])
                self.evaluated.append((str(folder.relative_to(folder.parents[1])), step))
                if step < config.stop.steps and interrupted():
                    log.finish("interrupted")
                    return RunResult(folder, "interrupted", True, False, None, None)
            log.finish("finished")
        return RunResult(folder, "made all steps", False, False, None, None)


class Killed(BaseException):
    """Nothing that is left to say."""


@pytest.fixture
def trainer(monkeypatch):
    """`train` is a `Trainer`; and no test waits for the disk, which would be most of its time."""
    pytest.importorskip("optuna")
    trainer = Trainer()
    monkeypatch.setattr(many, "train", trainer)
    monkeypatch.setattr(runlog, "versions", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    return trainer


def test_a_trial_is_the_mean_of_its_seeds_and_the_best_one_a_recipe(place, trainer):
    notes = []
    found = search(settings(), on_note=notes.append)
    assert [row.state for row in found.rows] == ["complete"] * 3
    rates = [row.values["update.learning_rate"] for row in found.rows]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3
    best = found.rows[0]
    assert best.scores == pytest.approx((3 * rates[0] + 0.007, 3 * rates[0] + 0.008), abs=1e-12)
    assert best.interval.mean == pytest.approx(3 * rates[0] + 0.0075)
    # s = 0.001 / sqrt(2), n = 2: half the width is 12.706 * s / sqrt(2)
    assert best.interval.high - best.interval.mean == pytest.approx(12.7062 * 0.0005, rel=1e-4)
    head, first, *_ = found.table()
    assert head == ("trial", "state", "chrf [95%]", "by seed", "update.learning_rate")
    assert first[0] == str(best.number)
    config = load_config([found.best])
    assert config.update.learning_rate == rates[0]
    assert (config.seed, config.name, config.folder, config.evaluation.metric) == (9, "search-best", None, "chrf")
    assert len(notes) == 3 * 3
    assert read_run(place / "searches/search/trial-002/seed-8")["status"] == "finished"
    made = len(trainer.evaluated)
    assert search(settings()).rows == found.rows
    assert len(trainer.evaluated) == made, "what has ended is not made again"
    assert len(search(settings(trials=4)).rows) == 4


def test_a_search_that_is_killed_at_any_evaluation_ends_as_one_that_never_was(place, trainer, monkeypatch):
    keys = {"update.learning_rate": {"low": 0.1, "high": 1.0}, "update.epochs": {"low": 1, "high": 9}}
    common = {"keys": keys, "sampler": "tpe", "trials": 7, "prune": {"startup_trials": 2}}
    whole = search(settings(folder="whole", **common))
    assert {row.state for row in whole.rows} == {"complete", "pruned"}
    lives, evaluated = 0, []
    while True:
        life = Trainer(dies_at=1 + lives % 5)
        monkeypatch.setattr(many, "train", life)
        lives += 1
        try:
            parts = search(settings(folder="parts", **common))
        except Killed:
            continue
        finally:
            evaluated += life.evaluated
        break
    assert lives > 7
    assert parts.rows == whole.rows
    assert len(evaluated) == len(set(evaluated)) == len(trainer.evaluated), "nothing is made twice"


@pytest.mark.parametrize("operation", [3, 20, 80])
def test_a_kill_at_a_file_operation_leaves_a_search_that_goes_on(place, trainer, killed_at, operation):
    assert killed_at(operation, lambda: search(settings(trials=2)))
    assert [row.state for row in search(settings(trials=2)).rows] == ["complete"] * 2


def test_a_torn_line_and_a_lock_that_a_kill_left_are_no_obstacle(place, trainer, monkeypatch):
    search(settings(trials=1))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for the lock"))
    journal = place / "searches/search/study.log"
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_')
    journal.with_name("study.log.lock").touch()
    assert [row.number for row in search(settings(trials=2)).rows if row.state == "complete"] in ([0, 1], [1, 0])


def test_what_is_worse_than_the_median_is_ended_before_its_next_seed(place, trainer):
    found = search(settings(trials=9, prune={"startup_trials": 2}, overrides=["stop.steps=2"]))
    complete = [row for row in found.rows if row.state == "complete"]
    pruned = [row for row in found.rows if row.state == "pruned"]
    assert len(pruned) >= 2
    for row in found.rows[2:]:
        before = [other for other in complete if other.number < row.number]
        if len(before) >= 2:
            worse = row.values["update.learning_rate"] < median(r.values["update.learning_rate"] for r in before)
            assert (row.state == "pruned") == worse
    for row in pruned:
        folder = place / f"searches/search/trial-{row.number:03d}"
        assert [path.name for path in folder.iterdir()] == ["seed-7"]
        assert RunReader(folder / "seed-7").evaluations()[-1]["step"] == 1, "at its first evaluation"
        assert row.scores == ()


def test_a_trial_that_is_bad_at_the_end_of_a_seed_is_ended_there(place, trainer, monkeypatch):
    """Without evaluations in between there is one at the end of each seed; the last seed has nothing to save."""
    monkeypatch.setattr(Trainer, "value", lambda self, config, step: config.update.learning_rate * (step == 1))
    found = search(settings(trials=6, seeds=3, prune={"startup_trials": 1}, overrides=["stop.steps=1"]))
    pruned = [row for row in found.rows if row.state == "pruned"]
    assert {len(row.scores) for row in pruned} == {1}
    assert {len(row.scores) for row in found.rows if row.state == "complete"} == {3}


def test_lower_is_better_where_the_glossary_says_so(place, trainer, monkeypatch):
    monkeypatch.setattr(Trainer, "__call__", _renamed(Trainer.__call__, "perplexity"))
    found = search(settings(metric="perplexity"))
    rates = [row.values["update.learning_rate"] for row in found.rows]
    assert rates == sorted(rates)


def _renamed(call, name):
    def renamed(self, config, **how):
        result = call(self, config, **how)
        path = config.run_folder / "evaluations.jsonl"
        path.write_text(path.read_text().replace("chrf", name))
        return result

    return renamed


def test_combinations_that_are_refused_are_told_and_counted(place, trainer):
    notes = []
    found = search(
        settings(keys={"rollout.samples_per_prompt": [1, 2], "update.learning_rate": [0.1, 0.2]}, trials=8),
        on_note=notes.append,
    )
    failed = [row for row in found.rows if row.state == "failed"]
    assert len(found.rows) == 8
    assert 0 < len(failed) < 8
    assert {row.values["rollout.samples_per_prompt"] for row in failed} == {1}
    assert {row.values["rollout.samples_per_prompt"] for row in found.rows if row.state == "complete"} == {2}
    assert all("must be at least 2" in row.failed for row in failed)
    assert sum("failed: credit.type" in note for note in notes) == len(failed)
    assert any(f"trial {failed[0].number} failed" in line for line in found.words())


def test_if_nothing_works_the_search_ends(place, trainer, monkeypatch):
    def raises(self, config, **how):
        raise NumericsError("no number")

    monkeypatch.setattr(Trainer, "__call__", raises)
    with pytest.raises(ConfigError, match=r"all 3 trials have failed; the search ends\. The last: no number"):
        search(settings())


def test_a_full_disk_ends_the_search_and_costs_no_trial(place, trainer, monkeypatch):
    def raises(self, config, **how):
        raise RunFolderError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "__call__", raises)
        with pytest.raises(RunFolderError):
            search(settings())
    assert [row.state for row in search(settings()).rows] == ["complete"] * 3


def test_an_interrupt_saves_and_the_same_call_goes_on(place, trainer):
    found = search(settings(), interrupted=lambda: len(trainer.evaluated) >= 6)
    assert found.ended == "interrupted"
    assert [row.state for row in found.rows] == ["cut off"]
    assert found.best is None
    assert found.words()[-1] == "interrupted: the same command goes on"
    assert search(settings(), max_seconds=0.0).ended == "time is up"
    assert search(settings()).ended == ""
    assert len(trainer.evaluated) == len(set(trainer.evaluated)) == 3 * 2 * 4


def test_models_of_all_but_the_best_are_removed(place, trainer, monkeypatch):
    call = Trainer.__call__

    def saves(self, config, **how):
        result = call(self, config, **how)
        for name in ("model", "checkpoints"):
            (config.run_folder / name).mkdir()
        return result

    monkeypatch.setattr(Trainer, "__call__", saves)
    found = search(settings())
    kept = sorted(path.parts[-3] for path in (place / "searches/search").glob("*/*/model"))
    assert kept == [f"trial-{found.rows[0].number:03d}"] * 2
    search(settings(name="all", keep_models="all"))
    assert len(list((place / "searches/all").glob("*/*/checkpoints"))) == 6


def test_values_are_drawn_as_their_keys_take_them(place, trainer):
    keys = {
        "rollout.samples_per_prompt": {"low": 2, "high": 8, "step": 3},
        "kl.coefficient": {"low": 0, "high": 1},
        "update.learning_rate": {"low": "1e-6", "high": "1e-4", "log": True},
        "rewards.0.min_words": {"low": 1, "high": 4},
        "credit": [{"type": "reward_to_go", "gamma": 0.5}, {"type": "leave_one_out"}],
        "kl.target": [None, 0.1],
    }
    found = search(settings(keys=keys, trials=9, seeds=1, overrides=["stop.steps=1"]))
    rows = [row.values for row in found.rows]
    assert {row["rollout.samples_per_prompt"] for row in rows} == {2, 5, 8}
    assert all(0 < row["kl.coefficient"] < 1 for row in rows)
    assert all(1e-6 <= row["update.learning_rate"] <= 1e-4 for row in rows)
    assert {type(row["rewards.0.min_words"]) for row in rows} == {int}
    assert {row["kl.target"] for row in rows} == {None, 0.1}
    for row in found.rows:
        config = load_config([place / f"searches/search/trial-{row.number:03d}/seed-7/config.yaml"])
        assert config.credit.type == row.values["credit"]["type"]
        assert getattr(config.credit, "gamma", 0.5) == 0.5
        assert config.kl.coefficient == row.values["kl.coefficient"]
        assert config.rewards[0].parameters == {"min_words": row.values["rewards.0.min_words"]}
    assert sum(found.importance.values()) == pytest.approx(1.0)
    assert all(place.interval.low == -float("inf") for place in found.rows)
    assert "inf" not in json.dumps(found.table())


def test_steps_that_the_study_hears_of_name_seed_and_step(place, trainer):
    optuna = pytest.importorskip("optuna")
    search(settings(trials=1))
    backend = optuna.storages.journal.JournalFileBackend("searches/search/study.log")
    (trial,) = optuna.load_study(study_name="search", storage=optuna.storages.JournalStorage(backend)).trials
    steps = [1, 2, 3, *(SEED_STRIDE + step for step in (1, 2))]
    assert sorted(trial.intermediate_values) == steps
    assert trial.user_attrs["scores"] == pytest.approx([trial.value - 0.0005, trial.value + 0.0005])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"keys": {"update.learning_rat": {"low": 1, "high": 2}}}, "did you mean 'learning_rate'"),
        ({"keys": {"updat.learning_rate": [1.0]}}, "did you mean 'update'"),
        ({"keys": {"rewards.3.weight": [1.0]}}, "not a place in a list of 1"),
        ({"keys": {"update.learning_rate": {"low": -1.0, "high": 1.0}}}, "greater than 0"),
        ({"keys": {"credit.gamma": {"low": 0.5, "high": 1.5}}}, "keys.credit.gamma: .*less than or equal to 1"),
        ({"keys": {"update.epochs": {"low": 1.5, "high": 3.0}}}, "valid integer"),
        ({"keys": {"credit.type": ["gae", "gea"]}}, "unknown type 'gea'; did you mean 'gae'"),
        ({"keys": {"update.epochs": {"low": 3, "high": 3}}}, "low 3 is not below high 3"),
        ({"keys": {"update.learning_rate": {"low": 0, "high": 1, "log": True}}}, "needs low above 0"),
        ({"keys": {"credit.type": ["gae", "gae"]}}, "the same value twice"),
        ({"keys": {"seed": [1, 2]}}, "keys.seed: the search sets it"),
        ({"metric": "rouge"}, "unknown 'rouge'; did you mean 'rouge_"),
        ({"metric": "words"}, "say higher or lower"),
        ({"overrides": ["evaluation.items=0"]}, "evaluation.items is 0"),
        ({"recipe": "recip.yaml"}, "did you mean 'recipe.yaml'"),
        ({"trails": 3}, "did you mean 'trials'"),
    ],
)
def test_mistakes_are_told_before_anything_is_made(place, given, words):
    values = {"recipe": "recipe.yaml", "keys": {"update.learning_rate": [0.1, 0.2]}}
    (place / "search.yaml").write_text(yaml.safe_dump(values | given))
    with pytest.raises(ConfigError, match=words):
        load_search(["search.yaml"])
    assert not (place / "searches").exists()


def test_a_key_may_belong_to_a_type_that_is_drawn(place):
    """`credit.lam` is a key of gae alone, and gae needs a value head: told when it is drawn, if it is missing."""
    keys = {"credit.type": ["gae", "leave_one_out"], "credit.lam": {"low": 0.5, "high": 1.0}}
    (place / "search.yaml").write_text(yaml.safe_dump({"recipe": "recipe.yaml", "keys": keys}))
    assert load_search(["search.yaml"], ["trials=3"]).trials == 3


def test_a_folder_of_another_search_is_refused(place, trainer):
    search(settings())
    with pytest.raises(ConfigError, match="keys is not what it was"):
        search(settings(keys={"update.learning_rate": [0.1, 0.2]}))
    (place / "recipe.yaml").write_text(RECIPE + "rollout: {prompts_per_step: 2}\n")
    with pytest.raises(ConfigError, match="rollout of the recipe is not what it was"):
        search(settings())
    (place / "other").mkdir()
    (place / "other" / "mine.txt").write_text("")
    with pytest.raises(RunFolderError, match="not of a search"):
        search(settings(folder="other"))


def test_without_the_extra_its_pip_line_is_told(place, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("optuna"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[search\]'"):
        search(settings())
    assert not (place / "searches").exists()


def test_a_search_at_the_command_line(tmp_path, monkeypatch, model_folder, pertoken):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = {
        "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
        "task": {"type": "file", "path": "data.jsonl", "prompt": "{prompt}:"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4}},
        "evaluation": {"items": 2, "metric": "chrf", "sampling": {"temperature": 0, "max_new_tokens": 4}},
        "stop": {"steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = {"recipe": "recipe.yaml", "keys": {"update.learning_rate": [0.01, 0.02]}, "trials": 2}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(values))
    code, out, err = pertoken("search", "search.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert yaml.safe_load(out)["trials"] == 2
    code, out, _ = pertoken("search", "search.yaml", "--max-time", "0")
    assert code == 75
    code, out, _ = pertoken("search", "search.yaml", "seeds=1", "name=one", "trials=1")
    assert code == 0
    assert "trial 0, seed 0: chrf" in out
    assert "complete" in out
    assert "pertoken train searches/one/best.yaml" in out
    code, out, _ = pertoken("train", "searches/one/best.yaml", "--dry-run")
    assert code == 0
    assert yaml.safe_load(out)["update"]["learning_rate"] in (0.01, 0.02)
    assert pertoken("runs", "verify", "searches/one/trial-000/seed-0")[0] == 0
