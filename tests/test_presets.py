"""Published methods by name: what a name stands for, what wins over it, and that it learns."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import yaml

from pertoken.config import RunConfig, load_config
from pertoken.config.presets import PRESETS
from pertoken.errors import ConfigError
from pertoken.rewards import Sample
from pertoken.rewards.align import align
from pertoken.testing import byte_tokenizer
from pertoken.types import Item

every_preset = pytest.mark.parametrize("name", PRESETS)


def value_at(values, dotted):
    for key in dotted.split("."):
        values = values[key]
    return values


@every_preset
def test_a_name_stands_for_its_settings_in_python_files_and_overrides(name, tmp_path):
    (tmp_path / "run.yaml").write_text(f"algorithm: {name}\n")
    config = RunConfig(algorithm=name)
    assert load_config([tmp_path / "run.yaml"]) == config == load_config([], [f"algorithm={name}"])
    resolved = yaml.safe_load(config.to_yaml())
    for key, value in PRESETS[name].keys().items():
        got = value_at(resolved, key)
        assert got == value or (value == {} and isinstance(got, dict)), key


@every_preset
def test_what_is_saved_names_every_value_and_reads_back_as_itself(name, tmp_path):
    config = load_config([], [f"algorithm={name}", "objective.entropy_coefficient=0.125"])
    assert config.objective.entropy_coefficient == 0.125
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert load_config([tmp_path / "config.yaml"], ["seed=3"]) == config.model_copy(update={"seed": 3})


@every_preset
def test_every_method_is_told_in_full(name, pertoken):
    preset = PRESETS[name]
    assert all([preset.title, preset.paper, preset.formula, preset.published, preset.differs])
    code, out, _ = pertoken("algorithms", name)
    assert code == 0
    for text in preset.told().values():
        assert text in out


def test_two_names_are_never_the_same_settings():
    rows = [json.dumps(preset.keys(), sort_keys=True) for preset in PRESETS.values()]
    assert len(set(rows)) == len(rows)


def test_what_is_named_later_or_beside_it_wins(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("objective: {clip_high: 0.9}\nkl: {coefficient: 0.5}\nalgorithm: grpo\n")
    config = load_config([one])
    assert (config.objective.clip_high, config.kl.coefficient, config.kl.place) == (0.9, 0.5, "loss")
    two.write_text("algorithm: dapo\n")
    config = load_config([one, two])  # over the keys of the file before it
    assert (config.algorithm, config.objective.clip_high, config.kl.place) == ("dapo", 0.28, "none")
    config = load_config(
        [one], ["objective.clip_low=0.1", "algorithm=ppo", "credit.lam=0.5", "policy.value_head.clip=9"]
    )
    assert (config.credit.type, config.credit.lam, config.policy.value_head.clip) == ("gae", 0.5, 9)
    assert (config.objective.clip_low, config.objective.clip_high, config.kl.coefficient) == (0.1, 0.2, 0.05)
    # the table itself is not what was changed
    assert PRESETS["ppo"].settings["policy"]["value_head"]["clip"] == 0.2
    assert load_config([], ["algorithm=ppo"]).policy.value_head.clip == 0.2


def test_another_estimator_beside_a_name_replaces_that_of_the_method(tmp_path):
    config = RunConfig(algorithm="grpo", credit={"type": "leave_one_out"})
    assert (config.credit.type, config.objective.over) == ("leave_one_out", "sequence")


def test_a_method_replaces_a_critic_that_it_does_not_ask(tmp_path):
    (tmp_path / "run.yaml").write_text("policy: {value_head: {}}\ncredit: {type: gae}\n")
    assert load_config([tmp_path / "run.yaml"], ["algorithm=rloo"]).policy.value_head is None


def test_an_unknown_name_is_answered_with_the_nearest(pertoken):
    with pytest.raises(ConfigError, match="algorithm: unknown name 'dapi'; did you mean 'dapo'"):
        load_config([], ["algorithm=dapi"])
    code, _, err = pertoken("algorithms", "dapi")
    assert (code, "did you mean 'dapo'" in err) == (2, True)


def test_the_list_names_each(pertoken):
    _, out, _ = pertoken("algorithms")
    assert all(name in out for name in PRESETS)


@pytest.fixture(scope="module")
def known_answers():
    path = Path(__file__).parents[1] / "benchmarks" / "known_answers.py"
    spec = importlib.util.spec_from_file_location("known_answers", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["known_answers"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["known_answers"]


def test_the_benchmark_has_an_arm_for_every_method(known_answers, tmp_path):
    for name in PRESETS:
        config = RunConfig.model_validate(known_answers.settings(tmp_path, 0, known_answers.preset_arm(name)))
        assert config.algorithm == name
    assert known_answers.TUNED.keys() <= PRESETS.keys()


def test_what_the_benchmark_pays_at_the_end_is_what_it_pays_by_token(known_answers):
    for text in ("", "a", "Bcd7", "cAbe"):
        tokens = byte_tokenizer().encode(text)
        sample = Sample(Item("i", "p"), tokens, [True] * len(tokens), align(tokens, byte_tokenizer()), "length", 3)
        for right, lure in itertools.product(("letters", "key"), ("token", "coin")):
            number = known_answers.number_right.fn(sample, right=right)
            by_token = known_answers.lured.fn(sample, right=right, lure=lure)
            assert len(by_token) == len(tokens)
            assert known_answers.lured_at_the_end.fn(sample, right=right, lure=lure) == sum(by_token)
            assert abs(sum(by_token) - number) == (known_answers.LURE if text else 0.0)


def test_a_key_asks_another_thing_of_each_place(known_answers):
    tokens = [2 * k + bit for k, bit in enumerate(known_answers.KEY[:48])]
    assert {0, 1} == set(known_answers.KEY[:24])

    def right(tokens):
        text = align(tokens, byte_tokenizer())
        return known_answers.number_right.fn(
            Sample(Item("i", "p"), tokens, [True] * len(tokens), text, "length", 3), right="key"
        )

    assert (right(tokens), right([token ^ 1 for token in tokens]), right([*tokens[:40], *tokens[:8]])) == (48, 0, 41)


@pytest.mark.parametrize("name", ["rloo", "cispo", "dppo"])
def test_a_method_finds_the_known_best_policy(known_answers, name):
    """The benchmark's task with 3 tokens in place of 8."""
    small = {"rollout": {"prompts_per_step": 2, "sampling": {"max_new_tokens": 3}}, "update": {"learning_rate": 3e-2}}
    bound = known_answers.ENOUGH * 3
    curve, _ = known_answers.returns(0, known_answers.merged(known_answers.preset_arm(name), small), bound)
    assert curve[0] < 0.5 * bound
    assert known_answers.steps_until(curve, bound) is not None
