"""Trackers beside the run folder: what they are told, and that none can end a run."""

import json
import sys
from types import SimpleNamespace

import pytest

from pertoken.config import RunConfig
from pertoken.errors import ConfigError, MissingExtraError
from pertoken.jobs import run
from pertoken.tracking import RunLog, RunReader, trackers
from pertoken.tracking.glossary import HELD_OUT, METRICS, find
from pertoken.tracking.settings import settings_of
from pertoken.tracking.trackers import Trackers, trackers_of


class Told:
    """A tracker that remembers what it is told, and fails at one thing."""

    def __init__(self, fails=""):
        self.fails, self.told = fails, []

    def _hear(self, what, *told):
        if what == self.fails:
            raise ConnectionError("no network")
        self.told.append((what, *told))

    def start(self):
        self._hear("start")

    def store_init_configuration(self, values):
        self._hear("settings", values)

    def log(self, values, step):
        self._hear("log", step, values)

    def finish(self):
        self._hear("finish")


def test_a_tracker_hears_what_the_run_folder_gets(tmp_path):
    told = Told()
    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        log.trackers = Trackers({"a": told}, pytest.fail)
        log.trackers.start("stop: {steps: 2}")
        log.evaluation(0, "validation", {"metrics": {"rouge_l": 0.25}}, [])
        log.step(1, {"reward/total": 1.5, "loss/policy": float("nan")})
    assert told.told == [
        ("start",),
        ("settings", {"stop.steps": "2"}),
        ("log", 0, {"validation/rouge_l": 0.25}),
        ("log", 1, {"reward/total": 1.5}),
        ("finish",),
    ]


@pytest.mark.parametrize("fails", ["start", "settings", "log", "finish"])
def test_one_that_fails_is_named_once_and_left_alone(fails):
    problems, good, bad = [], Told(), Told(fails)
    both = Trackers({"bad": bad, "good": good}, problems.append)
    both.start("seed: 1")
    both.step(1, {"x": 1})
    both.step(2, {"x": 2})
    both.finish()
    assert problems == ["tracker bad: ConnectionError: no network; it is told nothing more"]
    assert [told[0] for told in good.told] == ["start", "settings", "log", "log", "finish"]


def test_a_row_is_on_disk_before_it_is_told(tmp_path):
    class Looks(Told):
        def log(self, values, step):
            assert RunReader(tmp_path / "run").metrics()["step"] == [step]
            super().log(values, step)

    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        log.trackers = Trackers({"a": Looks()}, pytest.fail)
        log.step(1, {"x": 1.0})


def a_record(item, rewards, piece="ok", kl=0.5):
    tokens = {"id": [0, 1, 2], "piece": ["ask", " so", piece], "action": [0, 1, 1]}
    return {"item": item, "tokens": tokens, "streams": {"reward/total": [0, *rewards], "kl": [0, 0.25, kl]}}


def test_a_table_has_the_tokens_of_the_best_and_the_worst_sample():
    records = [a_record("a", [0, 1]), a_record("b", [1, 2]), a_record("c", [0, -1], "\x1b[31m", kl=float("nan"))]
    found = trackers.token_table(7, records)
    assert found.columns == ["step", "sample", "item", "position", "token", "reward/total", "kl"]
    assert found.rows == [
        [7, 1, "b", 1, " so", 1.0, 0.25],
        [7, 1, "b", 2, "ok", 2.0, 0.5],
        [7, 2, "c", 1, " so", 0.0, 0.25],
        [7, 2, "c", 2, "␛[31m", -1.0, None],
    ]
    assert len(trackers.token_table(7, records[:1]).rows) == 2  # one sample is both
    unchosen = a_record("a", [0, 1]) | {"tokens": {"id": [1], "piece": ["a"], "action": [0]}}
    assert trackers.token_table(7, [unchosen]) is None


def test_nothing_in_a_table_of_markdown_can_act():
    drawn = trackers.markdown(trackers.Table(["token", "a_b"], [["|<script>*_`[x](y)\n", -0.123456], [None, 1e-7]]))
    head, rule, first, second = drawn.splitlines()
    assert (head, rule) == ("| token | a&#95;b |", "| --- | --- |")
    assert first.endswith("&#8629; | -0.1235 |")
    assert not set("<>*_`[]()") & set(first)
    assert first.count("|") == 3
    assert second == "|  | 1e-07 |"


def test_each_tracker_gets_the_table_in_its_own_way(tmp_path, monkeypatch):
    told = []
    kept = SimpleNamespace(log_table=lambda *arguments, **more: told.append((arguments, more)))
    monkeypatch.setitem(sys.modules, "mlflow", kept)
    frames = SimpleNamespace(DataFrame=lambda rows, columns: (columns, rows))
    monkeypatch.setitem(sys.modules, "pandas", frames)
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Table=lambda dataframe: dataframe))

    class Has(Told):
        tracker = SimpleNamespace(info=SimpleNamespace(run_id="r"))

        def log_table(self, name, columns, data, step):
            self._hear("table", name, columns, data, step)

    live = {name: Has() for name in ("tensorboard", "wandb", "mlflow", "trackio")}
    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        log.trackers = Trackers(live, pytest.fail)
        log.episodes(3, [a_record("a", [0, 1]) | {"completion": "so ok", "stop": "eos"}])
    table = trackers.token_table(3, [a_record("a", [0, 1])])
    assert live["tensorboard"].told[0] == ("log", 3, {"tokens": trackers.markdown(table)})
    assert live["wandb"].told[0] == ("table", "tokens", table.columns, table.rows, 3)
    assert live["trackio"].told[0] == ("log", 3, {"tokens": (table.columns, table.rows)})
    columns = {name: [row[at] for row in table.rows] for at, name in enumerate(table.columns)}
    assert told == [((columns, "tokens.json"), {"run_id": "r"})]


def test_settings_are_dotted_names():
    assert settings_of("a: {b: [1, {c: x}]}\nd: null\ne: []") == {"a.b.0": "1", "a.b.1.c": "x", "d": "None", "e": "[]"}
    assert settings_of("a: [") == settings_of("&a [*a]") == {}  # no YAML, and one that holds itself
    assert settings_of("") == {}


def test_what_is_not_installed_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = RunConfig.model_validate({"folder": str(tmp_path / "run"), "log": {"trackers": ["wandb"]}})
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[wandb\]'"):
        run.train(config)
    assert not (tmp_path / "run").exists()


def test_unknown_trackers_are_refused():
    from pertoken.config import load_config

    with pytest.raises(ConfigError, match="trackers"):
        load_config([], ["log.trackers=[excel]"])


def test_each_is_made_as_accelerate_wants_it_and_a_resumed_run_is_the_same_one(tmp_path, monkeypatch):
    made = []

    def maker(kind):
        return lambda *arguments, **options: made.append((kind, arguments, options))

    fake = SimpleNamespace(**{f"{kind}Tracker": maker(kind) for kind in ("TensorBoard", "WandB", "MLflow", "Trackio")})
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace(tracking=fake))
    monkeypatch.setattr(trackers, "refuse_missing", lambda names: None)
    names, began = ("tensorboard", "wandb", "mlflow", "trackio"), {"started": "2026-01-01"}
    for step in (0, 7):
        trackers_of(names, tmp_path / "mine-0", began, project="p", step=step, on_problem=pytest.fail)
    first, again = made[:4], made[4:]
    assert first[1:] == again[1:]
    assert first[1][2]["name"] == "mine-0"
    assert (first[0][2], again[0][2]) == ({"purge_step": 1}, {"purge_step": 8})


def test_a_run_in_tensorboard_has_the_names_of_the_glossary(tmp_path, model_folder):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.model_validate(
        {
            "folder": str(tmp_path / "run"),
            "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(tmp_path / "data.jsonl"), "prompt": "{prompt}:"},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4}},
            "evaluation": {"items": 3, "every": 1, "sampling": {"temperature": 0.0, "max_new_tokens": 4}},
            "stop": {"steps": 2},
            "log": {"trackers": ["tensorboard"]},
        }
    )
    notes = []
    run.train(config, on_note=notes.append)
    assert not [note for note in notes if "tracker" in note]
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    table = found.Tensors("tokens/text_summary")[0]
    first = RunReader(tmp_path / "run").episodes(1)
    expected = trackers.markdown(trackers.token_table(1, first))
    assert (table.step, table.tensor_proto.string_val[0].decode()) == (1, expected)
    names = found.Tags()["scalars"]
    for name in names:
        split, _, metric = name.partition("/")
        assert find(metric, HELD_OUT) if split == "validation" else find(name, METRICS), name
    reader = RunReader(tmp_path / "run")
    told = [event.value for event in found.Scalars("reward/total")]
    assert told == pytest.approx(reader.metrics()["reward/total"])
    told = [(event.step, event.value) for event in found.Scalars("validation/rouge_l")]
    expected = [(row["step"], pytest.approx(row["metrics"]["rouge_l"])) for row in reader.evaluations()]
    assert told == expected
