"""Chains of runs in one file: each begins with the model of the one before, and goes on where it was stopped."""

import hashlib
import json

import pytest
import yaml

from pertoken.config import load_config, load_stages
from pertoken.errors import ConfigError
from pertoken.jobs import run


@pytest.fixture
def chain(tmp_path, model_folder, monkeypatch):
    """Three stages on a tiny model; runs land in the folder that is worked in."""
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {k}", "good": f"yes {k}", "bad": "no"} for k in range(40)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    values = {
        "name": "chain",
        "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu", "compile": False},
        "task": {"path": "pairs.jsonl", "prompt": "{prompt}:", "answer": "good", "rejected": "bad"},
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4}},
        "update": {"learning_rate": 1e-3},
        "kl": {"measure": False},
        "evaluation": {"items": 0},
        "stop": {"steps": 2},
        "stages": [
            {"name": "sft", "method": {"type": "sft", "batch": 4}},
            {"name": "dpo", "method": {"type": "dpo", "batch": 4}, "update": {"learning_rate": 5e-4}},
            {
                "name": "rto",
                "rewards": [
                    {"name": "implicit", "model": "stage:dpo", "reference": "stage:sft", "clip": [-0.05, 0.05]},
                    {"name": "length", "min_words": 1},
                ],
                "algorithm": "rto",
                "policy": {"model": "stage:sft"},
            },
        ],
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump(values))
    return values


def weights(stage):
    return hashlib.sha256((stage.run_folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_stage_is_the_file_with_what_differs_and_the_model_of_the_one_before(chain):
    sft, dpo, rto = load_stages(["chain.yaml"], ["seed=3", "stages.0.stop.steps=7"])
    assert [str(stage.run_folder) for stage in (sft, dpo, rto)] == [f"runs/chain-3/{n}" for n in ("sft", "dpo", "rto")]
    assert [stage.method.type for stage in (sft, dpo, rto)] == ["sft", "dpo", "rl"]
    assert [stage.policy.model for stage in (dpo, rto)] == ["runs/chain-3/sft/model"] * 2
    assert rto.rewards[0].parameters == {"model": "runs/chain-3/dpo/model", "reference": "runs/chain-3/sft/model"}
    assert (rto.credit.type, rto.kl.coefficient) == ("gae", 0.01)
    assert [stage.stop.steps for stage in (sft, dpo, rto)] == [7, 2, 2]
    assert [stage.update.learning_rate for stage in (sft, dpo)] == [1e-3, 5e-4]
    assert dpo.policy.precision == "float32"


def test_a_chain_goes_on_where_it_was_stopped_and_ends_as_if_it_never_was(chain, pertoken):
    whole = load_stages(["chain.yaml"], ["folder=whole"])
    for stage in whole[:2]:
        run.train(stage)
    stages = load_stages(["chain.yaml"])
    assert [resume for _, resume in run.stages_left(stages)] == [None, None, None]
    run.train(stages[0])
    made = []
    run.train(stages[1], on_step=lambda report, _: made.append(report.step), interrupted=lambda: len(made) == 1)
    assert [(stage.name, resume is None) for stage, resume in run.stages_left(stages)] == [
        ("dpo", False),
        ("rto", True),
    ]
    code, out, _ = pertoken("train", "chain.yaml")
    assert code == 0
    assert "stage 2 of 3, dpo: dpo" in out
    assert "stage 1 of 3" not in out
    assert [weights(stage) for stage in stages[:2]] == [weights(stage) for stage in whole[:2]]
    assert "all 3 stages have finished" in pertoken("train", "chain.yaml")[1]
    code, _, error = pertoken("train", "chain.yaml", "stages.0.stop.steps=3")
    assert code == 2
    assert "stage 'sft' has finished with another configuration" in error


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "expected a list of sections"),
        ([{"method": {"type": "sft"}}], r"stages.0.name: each stage needs a name of its own, got None"),
        ([{"name": "a"}, {"name": "a"}], r"stages.1.name: .* got 'a'"),
        ([{"name": "a"}, {"name": "b", "policy": {"model": "x"}}], "it is what stage 'a' has trained; leave it out"),
        ([{"name": "sft"}, {"name": "b", "policy": {"model": "stage:sfd"}}], "stages.1.policy.model: .* 'sft'"),
        ([{"name": "a", "rewards": [{"name": "x", "model": "stage:a"}]}], "stages.0.rewards.0.model: no stage 'a'"),
        ([{"name": "a", "seed": 4}], "are those of the chain"),
        ([{"name": "a", "method": {"type": "dop"}}], r"stages.0 \(a\): method.type: unknown type 'dop'"),
    ],
)
def test_what_is_no_chain_is_named(chain, tmp_path, stages, words):
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({**chain, "stages": stages}))
    with pytest.raises(ConfigError, match=words):
        load_stages(["chain.yaml"])


def test_other_commands_take_the_configuration_of_a_stage(chain):
    with pytest.raises(ConfigError, match="only `pertoken train` takes a chain"):
        load_config(["chain.yaml"])
