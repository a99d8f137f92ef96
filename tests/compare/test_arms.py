"""Whole comparisons of a tiny model: runs are made once, gone on with, and told; TRL is an arm like the others."""

import importlib.util
import json

import pytest

from pertoken.compare import compare, load_comparison
from pertoken.errors import ConfigError, TaskError, WorkerError
from pertoken.tracking import RunReader
from pertoken.tracking.runs import verify_run


@pytest.fixture
def settings(tmp_path, model_folder):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    data.write_text("\n".join(map(json.dumps, rows)))
    return [
        f"policy.model={model_folder}", "policy.precision=float32", "policy.compile=false", f"task.path={data}",
        "task.prompt='{prompt}'", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2",
        "rollout.sampling.max_new_tokens=6", "evaluation.sampling.max_new_tokens=6", "evaluation.items=3",
        "evaluation.every=1", "evaluation.metric=chrf", "stop.steps=2", "update.learning_rate=1e-3",
        "rewards=[{name: chrf}]", f"compare.folder={tmp_path / 'comparison'}",
    ]  # fmt: skip


ARMS = "compare.arms={base: {}, sft: {}, sequence: {}, token: {}}"


def test_all_arms_are_made_once_and_told(settings, pertoken):
    pytest.importorskip("matplotlib")
    code, out, err = pertoken("compare", *settings, ARMS, "compare.seeds=2")
    assert (code, err) == (0, "")
    plan = load_comparison([], [*settings, ARMS, "compare.seeds=2"])
    runs = [run.run_folder for arm in plan.arms.values() for run in arm.runs]
    assert len(runs) == 1 + 2 + 2 + 2
    for folder in runs:
        assert verify_run(folder) == []
    begun = RunReader(plan.folder / "token" / "seed-1").evaluations()[0]["metrics"]["chrf"]
    assert begun == RunReader(plan.folder / "sft" / "seed-1").evaluations()[-1]["metrics"]["chrf"], "the shared start"
    assert "arm token, seed 1: chrf" in out
    assert "chrF at the end of each run" in out
    assert "of sequence" in out
    for name in ("comparison.md", "comparison.html", "comparison.tex", "comparison.json", "curves/chrf-tokens.svg"):
        assert (plan.folder / name).stat().st_size > 100
    made = {folder: (folder / "run.json").stat().st_mtime_ns for folder in runs}
    assert pertoken("compare", *settings, ARMS, "compare.seeds=2")[0] == 0
    assert made == {folder: (folder / "run.json").stat().st_mtime_ns for folder in runs}, "nothing is made twice"
    with pytest.raises(ConfigError, match="was begun with another configuration"):
        compare(load_comparison([], [*settings, ARMS, "compare.seeds=2", "update.learning_rate=1e-4"]))


def test_an_interrupt_saves_and_the_same_call_goes_on(settings):
    plan = load_comparison([], [*settings, ARMS, "compare.seeds=1", "stop.steps=3"])
    asked = 0

    def interrupted():
        nonlocal asked
        asked += 1
        return asked > 9

    outcome = compare(plan, interrupted=interrupted)
    assert outcome.ended == "interrupted"
    assert any("not finished" in word for word in outcome.report.words)
    done = {name for name, arm in plan.arms.items() if (arm.runs[0].run_folder / "model").is_dir()}
    assert "sft" in done
    assert len(done) < 4
    outcome = compare(plan)
    assert outcome.ended == ""
    assert not any("not finished" in word for word in outcome.report.words)
    for arm in plan.arms.values():
        steps = [row for row in RunReader(arm.runs[0].run_folder).metrics().get("step", [])]
        assert steps == list(range(1, len(steps) + 1))


def test_without_trl_its_arm_is_left_out_and_said_so(settings, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *of: None if name == "trl" else found(name, *of))
    notes = []
    plan = load_comparison([], [*settings, "compare.arms={token: {}, trl: {}}", "compare.seeds=1"])
    outcome = compare(plan, on_note=notes.append)
    assert "arm trl is left out: trl is not installed (pip install 'pertoken[trl]')" in outcome.report.words
    assert sum(note.startswith("arm trl") for note in notes) == 1
    assert {line.arm for line in outcome.report.scores[0].lines} == {"token"}


def test_trl_is_an_arm_whose_runs_are_ordinary_folders(settings):
    pytest.importorskip("trl")
    plan = load_comparison([], [*settings, "compare.arms={token: {}, trl: {}}", "compare.seeds=1"])
    outcome = compare(plan)
    run = plan.arms["trl"].runs[0]
    reader = RunReader(run.run_folder)
    assert reader.run()["status"] == "finished"
    assert reader.run()["about"]["algorithm"].startswith("GRPO of TRL")
    assert verify_run(run.run_folder) == []
    metrics = reader.metrics()
    assert metrics["step"] == [1, 2]
    assert all(0 < count <= 2 * 2 * 6 for count in metrics["tokens/generated"])
    evaluations = reader.evaluations()
    assert [row["step"] for row in evaluations] == [0, 1, 2]
    ours = RunReader(plan.arms["token"].runs[0].run_folder).evaluations()[0]
    assert evaluations[0]["metrics"] == ours["metrics"], "the same model, measured in the same way"
    assert evaluations[0]["items"] == ours["items"]
    assert (run.run_folder / "model" / "config.json").is_file()
    assert not (run.run_folder / "trl").exists()
    assert {line.arm for line in outcome.report.scores[0].lines} == {"token", "trl"}


def test_an_arm_that_cannot_be_made_is_named_in_front_of_what_to_set(settings):
    plan = load_comparison([], [*settings, "compare.arms.sft.method.max_tokens=2"])
    with pytest.raises(TaskError, match=r"^compare\.arms\.sft: no item .* raise method\.max_tokens"):
        compare(plan)


def test_what_trl_refuses_is_told_with_its_last_words(settings):
    pytest.importorskip("trl")
    plan = load_comparison([], [*settings, "compare.arms={trl: {trl: {betta: 1}}}", "compare.seeds=1"])
    with pytest.raises(WorkerError, match=r"arm trl, seed 0: TRL ended with code 1: .*betta.*compare\.arms\.trl\.trl"):
        compare(plan)


def test_the_rewards_that_trl_hears_of_are_those_of_the_run(settings, model_folder):
    from pertoken.assembly import build_rewards
    from pertoken.compare.trl_arm import paid
    from pertoken.config import load_config
    from pertoken.jobs.run import load_policy
    from pertoken.types import Item

    config = load_config([], [s for s in settings if not s.startswith("compare")])
    policy = load_policy(config, str(model_folder))
    items = [Item("1", "say 1", "the answer 1"), Item("2", "say 2", "the answer 2")]
    ids = [policy.tokenizer.encode(text) for text in ("the answer 1", "zzz")]
    right, wrong = paid(ids, items, build_rewards(config.rewards), policy, step=1, group=1)
    assert right == pytest.approx(1.0)
    assert wrong == pytest.approx(0.0, abs=0.05)


def test_settings_of_trl_follow_from_the_recipe(settings):
    from pertoken.compare.trl_arm import arguments
    from pertoken.config import load_config

    config = load_config([], [*[s for s in settings if not s.startswith("compare")], "kl.coefficient=0.3",
                              "rollout.sampling.top_p=0.9", "objective.clip_high=0.28"])  # fmt: skip
    found = arguments(config, {"beta": 0.0}, bfloat16=False, cpu=True)
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 4
    assert (found["num_generations"], found["max_completion_length"], found["top_p"]) == (2, 6, 0.9)
    assert (found["beta"], found["epsilon_high"], found["max_steps"]) == (0.0, 0.28, 2)
    assert arguments(config, {}, bfloat16=False, cpu=True)["beta"] == 0.3
    with pytest.raises(ConfigError, match="does not divide the 4 completions"):
        arguments(config, {"per_device_train_batch_size": 3}, bfloat16=False, cpu=True)
