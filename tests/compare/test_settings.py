"""Arms of a recipe: what each name stands for, what all begin with, and what cannot be compared."""

import pytest

from pertoken.compare.settings import load_comparison
from pertoken.config import load_config, load_stages
from pertoken.errors import ConfigError


def test_without_a_section_there_are_five_arms(plan_of):
    plan = plan_of("seed=3", "name=mine")
    assert list(plan.arms) == ["base", "sft", "sequence", "token", "trl"]
    assert {name: len(arm.runs) for name, arm in plan.arms.items()} == {
        "sft": 3, "base": 1, "sequence": 3, "token": 3, "trl": 3,
    }  # fmt: skip
    base, sft, sequence, token, trl = (arm.runs[0] for arm in plan.arms.values())
    assert (sft.method.type, base.stop.steps, sequence.credit.type) == ("sft", 0, "leave_one_out")
    assert token.credit.type == trl.credit.type == "leave_one_out_process"
    assert plan.arms["trl"].trl == {}
    assert [run.seed for run in plan.arms["token"].runs] == [3, 4, 5]
    assert base.policy.model == sft.policy.model == "smollm2-135m-instruct"
    second = plan.arms["token"].runs[1]
    assert second.policy.model == str(plan.folder / "sft" / "seed-4" / "model")
    assert second.run_folder == plan.folder / "token" / "seed-4"
    assert (plan.against, plan.terminal, plan.metrics, plan.start) == ("sft", "sequence", ("rouge_l",), "sft")
    assert plan.pairs() == [
        ("sft", "sequence"), ("sft", "token"), ("sft", "trl"), ("sequence", "token"), ("sequence", "trl"),
    ]  # fmt: skip
    assert str(load_comparison([], ["name=mine"]).folder) == "comparisons/mine"


def test_what_is_set_in_an_arm_is_over_its_name(plan_of):
    plan = plan_of(
        "compare.arms={sft: {stop: {steps: 7}}, one: {algorithm: grpo}, two: {policy: {model: elsewhere}}}",
        "stop.steps=20",
    )
    assert plan.arms["sft"].runs[0].stop.steps == 7
    assert plan.arms["sft"].runs[0].method.type == "sft"
    assert plan.arms["one"].runs[0].credit.type == "group_relative"
    assert plan.arms["one"].runs[0].stop.steps == 20
    assert plan.arms["two"].runs[0].policy.model == "elsewhere"
    assert plan.terminal is None
    assert plan_of("compare.arms={a: {}, b: {seed_: 0}}".replace("seed_: 0", "kl: {coefficient: 0}")).against == "a"


def test_an_override_of_one_arm_leaves_the_others_that_there_would_be(plan_of, tmp_path):
    plan = plan_of("compare.arms.sft.stop.steps=7", "compare.arms.mine.algorithm=grpo")
    assert list(plan.arms) == ["base", "sft", "sequence", "token", "trl", "mine"]
    assert plan.arms["sft"].runs[0].stop.steps == 7
    assert plan.arms["sft"].runs[0].method.type == "sft"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("compare: {arms: {sft: {}, token: {}}}")
    assert list(load_comparison([recipe], ["name=x", "compare.arms.sft.stop.steps=7"]).arms) == ["sft", "token"]
    assert list(plan_of("compare.arms={a: {}}", "compare.arms.a.stop.steps=7").arms) == ["a"]


def test_one_model_judges_all_arms(plan_of):
    """Each arm began with another model, under which the same words are natural or odd."""
    plan = plan_of("compare.metrics=[chrf, nats_per_token, perplexity]", "policy.model=small")
    assert {run.evaluation.judge for arm in plan.arms.values() for run in arm.runs} == {"small"}
    assert plan.arms["token"].runs[0].policy.model != "small"
    named = plan_of("evaluation.metric=perplexity", "evaluation.judge=large")
    assert {run.evaluation.judge for arm in named.arms.values() for run in arm.runs} == {"large"}
    assert plan_of().arms["token"].runs[0].evaluation.judge is None


FAULTS = {
    "unknown key": ("compare.sed=2", "compare.sed: unknown key; did you mean 'seeds'?"),
    "unknown key of an arm": ("compare.arms={a: {updat: {}}}", "compare.arms.a: updat: unknown key; did you mean 'up"),
    "seed of an arm": ("compare.arms={a: {seed: 1}}", "compare.arms.a.seed: the comparison sets it"),
    "same arms": ("compare.arms={a: {}, token: {}}", "compare.arms.token: the same as arm 'a'"),
    "credit of whole texts": ("credit.type=leave_one_out", "compare.arms.token: the same as arm 'sequence'"),
    "other items": ("compare.arms={a: {}, b: {evaluation: {items: 3}}}", "evaluation.items is another"),
    "no items": ("evaluation.items=0", "evaluation.items is 0"),
    "no such start": ("compare.shared_start=warm", "compare.shared_start: no arm 'warm'"),
    "start that trains nothing": ("compare.shared_start=base", "arm 'base' trains nothing"),
    "no such arm": ("compare.against=tokn", "compare.against: no arm 'tokn'; did you mean 'token'?"),
    "no such pair": ("compare.sheets.pairs=[[sft, tokn]]", "compare.sheets.pairs: no arm 'tokn'"),
    "another judge": (
        "compare.arms={a: {}, b: {evaluation: {judge: elsewhere}}}",
        "evaluation.judge is another than that of 'a'",
    ),
    "no such metric": ("compare.metrics=[rouge_x]", "compare.metrics: unknown 'rouge_x'"),
    "TRL is told nothing": ("compare.arms={trl: {trl: true}}", "compare.arms.trl.trl: expected a map"),
    "TRL on answers": ("compare.arms={trl: {method: {type: sft}}}", "GRPO learns from samples"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_compared_is_told_before_anything_is_made(plan_of, name):
    setting, words = FAULTS[name]
    with pytest.raises(ConfigError) as error:
        plan_of(setting)
    assert words in str(error.value)


def test_other_commands_say_who_takes_such_a_file():
    for load in (load_config, load_stages):
        with pytest.raises(ConfigError, match="compare: only `pertoken compare` takes several arms"):
            load([], ["compare.seeds=2"])
