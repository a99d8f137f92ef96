"""Keeping runs: `pertoken runs list, verify, prune, resume`, and the time budget."""

import json
import os
import shutil
import signal
import sys

import pytest

from pertoken import assembly
from pertoken.config import RunConfig
from pertoken.jobs import run
from pertoken.tracking.lock import RunLock
from pertoken.tracking.runs import find_runs, verify_run
from pertoken.training import trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder):
    """A finished run with an evaluation and a checkpoint after each of its three steps; treat it as read-only."""
    place = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = RunConfig.model_validate(
        {
            "folder": str(place / "runs" / "first"),
            "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:"},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4}},
            "evaluation": {"items": 3, "every": 1, "sampling": {"temperature": 0.0, "max_new_tokens": 4}},
            "checkpoint": {"every": 1, "keep": 3},
            "stop": {"steps": 3},
        }
    )
    run.train(config)
    return place / "runs" / "first"


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs" / "first")


def test_list_says_how_each_run_stands(folder, pertoken):
    other = shutil.copytree(folder, folder.parent / "deep" / "killed")
    state = json.loads((other / "run.json").read_text()) | {"status": "running"}
    (other / "run.json").write_text(json.dumps(state))
    broken = shutil.copytree(folder, folder.parent / "torn")
    (broken / "run.json").write_text("{")
    assert [(found.folder.name, found.status) for found in find_runs(folder.parent)] == [
        ("killed", "killed"), ("first", "finished"), ("torn", "damaged"),
    ]  # fmt: skip
    lock = RunLock(other)
    assert find_runs(other)[0].status == "running"
    lock.release()
    code, out, _ = pertoken("runs", "list", folder.parent)
    assert code == 0
    line = next(line for line in out.splitlines() if "first" in line)
    assert "finished" in line
    assert "3/3" in line
    assert "rouge_l" in line
    code, _, err = pertoken("runs", "list", folder.parent / "nothing")
    assert (code, err.startswith("error: no folder")) == (1, True)


def test_verify_is_silent_about_sound_runs_and_names_each_fault(folder, pertoken):
    code, out, _ = pertoken("runs", "verify", folder)
    assert (code, out) == (0, f"{folder}: sound\n")
    rows = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(rows[0] + rows[2] + b'{"step": 4')
    (folder / "checkpoints" / "step-000002" / "state.json").write_text("{}")
    (folder / "evaluations" / "000001-validation.jsonl").unlink()
    (folder / "episodes" / "000001.jsonl").write_bytes(b"\x00\n\x00\n")
    (folder / "config.yaml").unlink()
    code, out, _ = pertoken("runs", "verify", folder)
    assert code == 1
    for words in (
        "config.yaml is missing",
        "metrics.jsonl: row 2 is of step 3, expected every step from 1 on once",
        "metrics.jsonl: the last line is torn",
        "checkpoints/step-000002: state.json has 2 bytes",
        "000001-validation.jsonl is missing",
        "000001.jsonl line 1 is not a JSON object",
        "step-000003: metrics.jsonl ends before it, at step 2",
    ):
        assert words in out
    assert len(verify_run(folder)) == 7


def test_prune_keeps_what_is_needed_and_refuses_a_run_at_work(folder, pertoken):
    store = folder / "checkpoints"
    code, out, _ = pertoken("runs", "prune", folder, "--no-keep-best", "--dry-run")
    assert (code, out.count("would remove")) == (0, 2)
    assert len(list(store.iterdir())) == 3
    lock = RunLock(folder)
    code, _, err = pertoken("runs", "prune", folder)
    assert (code, f"is being written by process {os.getpid()}" in err) == (1, True)
    lock.release()
    code, out, _ = pertoken("runs", "prune", folder, "--keep", "2", "--no-keep-best")
    assert (code, out.splitlines()[-1]) == (0, "1 checkpoints removed")
    assert [path.name for path in sorted(store.iterdir())] == ["step-000002", "step-000003"]


def test_resume_takes_overrides_and_a_time_limit_and_goes_on(folder, pertoken):
    code, out, _ = pertoken("runs", "resume", folder, "stop.steps=1000", "--max-time", "1.5s")
    assert code == 75
    assert "time is up (1.5 s)" in out
    assert f"resume with: pertoken train --resume {folder}" in out
    made = len((folder / "metrics.jsonl").read_text().splitlines())
    assert 3 <= made < 1000
    assert verify_run(folder) == []
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    code, out, _ = pertoken("runs", "resume", folder, f"stop.steps={made + 1}")
    assert code == 0
    assert f"resumed after step {made}" in out
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == made + 1
    assert verify_run(folder) == []


def test_a_run_in_use_cannot_be_resumed(folder, pertoken):
    lock = RunLock(folder)
    code, _, err = pertoken("train", "--resume", folder, "stop.steps=9")
    lock.release()
    assert (code, "two writers would mix their rows" in err) == (1, True)


@pytest.mark.parametrize("text", ["", "soon", "-5", "1h 30m", "1e3"])
def test_a_time_that_is_none_is_refused(folder, pertoken, text):
    code, _, err = pertoken("runs", "resume", folder, "--max-time", text)
    assert (code, "expected seconds, or a time such as 45m" in err) == (2, True)


def test_a_time_budget_leaves_room_for_a_step_as_long_as_the_longest():
    now = 0.0
    budget = run.TimeBudget(100.0, clock=lambda: now)
    spent = []
    for now in (5.0, 15.0, 45.0, 60.0, 69.0, 70.0):  # noqa: B007 - the clock reads it
        spent.append(budget.is_spent())
    assert spent == [False] * 5 + [True]
    now = 101.0
    assert run.TimeBudget(0.0, clock=lambda: now).is_spent()


def test_a_second_ctrl_c_ends_at_once_and_the_run_can_be_resumed(folder, pertoken, monkeypatch):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("pertoken.training.trainer.record", twice)
        code, _, err = pertoken("train", "--resume", folder, "stop.steps=5")
    assert (code, "stopped at once" in err) == (130, True)
    state = json.loads((folder / "run.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", "stopped at once, in the middle of a step")
    code, _, _ = pertoken("train", "--resume", folder, "stop.steps=5")
    assert code == 0
    assert verify_run(folder) == []


def test_sigterm_finishes_the_step_and_saves(folder, pertoken, monkeypatch):
    """The notice that a cluster gives before it takes a machine away."""
    with monkeypatch.context() as patch:
        whole = trainer.record
        patch.setattr(trainer, "record", lambda *parts: (os.kill(os.getpid(), signal.SIGTERM), whole(*parts)))
        code, out, err = pertoken("train", "--resume", folder, "stop.steps=9")
    assert (code, "finishing this step, then saving" in err) == (130, True)
    assert f"resume with: pertoken train --resume {folder}" in out
    assert (folder / "checkpoints" / "step-000004").is_dir()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert verify_run(folder) == []


def test_sigterm_while_the_model_is_loaded_starts_nothing(folder, pertoken, monkeypatch):
    whole = assembly.build_policy
    patched = lambda config: (os.kill(os.getpid(), signal.SIGTERM), whole(config))[1]  # noqa: E731
    monkeypatch.setattr(assembly.run, "build_policy", patched)
    config, new = folder / "config.yaml", folder.parent / "new"
    code, out, _ = pertoken("train", config, f"folder={new}", "stop.steps=1")
    assert (code, "resume with" in out) == (130, True)
    assert not (new / "checkpoints").exists()
    assert not (new / "evaluations.jsonl").exists()
    monkeypatch.setattr(assembly.run, "build_policy", whole)
    assert pertoken("runs", "resume", new)[0] == 0
    assert verify_run(new) == []


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
def test_a_folder_whose_name_is_no_text_ends_in_sentences(folder, pertoken):
    odd = folder.rename(folder.with_name(os.fsdecode(b"run-\xff")))
    code, out, _ = pertoken("runs", "list", odd.parent)
    assert (code, "run-\\udcff" in out) == (0, True)
    assert pertoken("runs", "verify", odd)[0] == 0
    code, _, err = pertoken("runs", "resume", odd, "stop.steps=4")  # safetensors takes no such name
    assert (code, err.startswith("error: "), "is not valid UTF-8" in err) == (1, True, True)


def test_a_prompt_of_bytes_that_are_no_text_is_answered(folder, pertoken):
    code, _, err = pertoken("generate", "say \udcff:", folder / "config.yaml", "--plain")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("a/rows.jsonl", "a/rows.jsonl"),
        ({"test": "t.jsonl", "train": "n.jsonl"}, "n.jsonl"),
        ({"test": "t.jsonl"}, "t.jsonl"),
    ],
)
def test_a_run_is_called_after_the_data_that_it_learns_from(path, words):
    assert run._about(RunConfig.model_validate({"task": {"path": path}}))["task"] == words
