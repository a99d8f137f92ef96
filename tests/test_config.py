"""What the configuration accepts, and how it says no."""

import re

import pytest
import yaml

from pertoken.config import FileTask, RunConfig, explain, load_config, validate
from pertoken.errors import ConfigError


def write(folder, text, name="run.yaml"):
    path = folder / name
    path.write_text(text)
    return path


def test_later_files_and_then_overrides_win(tmp_path):
    one = write(tmp_path, "seed: 1\nupdate: {learning_rate: 1e-4, epochs: 2}\n", "one.yaml")
    two = write(tmp_path, "update: {epochs: 3}\n", "two.yaml")
    config = load_config([one, two], ["seed=5", "rollout.sampling.top_k=7"])
    assert (config.seed, config.update.learning_rate, config.update.epochs) == (5, 1e-4, 3)
    assert config.rollout.sampling.top_k == 7


def test_resolved_configuration_reads_back_as_itself(tmp_path):
    config = load_config([], ["policy.lora.rank=4", "credit.type=gae", "policy.value_head={}", "stop.tokens=9"])
    again = load_config([write(tmp_path, config.to_yaml())])
    assert again == config
    assert again.policy.lora.rank == 4


def test_another_type_replaces_the_section_whole(tmp_path):
    file = write(tmp_path, "task: {type: file, path: data.jsonl, answer: summary}\ncredit: {type: gae, lam: 0.9}\n")
    config = load_config([file], ["credit.type=leave_one_out", "stop.steps=1"])
    assert isinstance(config.task, FileTask)
    assert config.task.answer == "summary"
    assert config.credit.type == "leave_one_out"


def test_a_recipe_moves_to_other_data_by_its_path_alone(tmp_path):
    recipe = write(tmp_path, "stop: {steps: 3}\n")
    assert load_config([recipe]).task.type == "docstrings"
    assert load_config([recipe], ["task.path=data.jsonl"]).task == FileTask(path="data.jsonl")


def test_lists_are_reached_by_number():
    config = load_config([], ["rewards.0.weight=2", "rewards.0.granularity=token"])
    assert config.rewards[0].weight == 2
    assert config.rewards[0].parameters == {"granularity": "token"}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("update.lerning_rate=1", "update.lerning_rate: unknown key in update; did you mean 'learning_rate'?"),
        ("polcy.model=x", "polcy: unknown key; did you mean 'policy'?"),
        ("rollout.sampling.temprature=2", "did you mean 'temperature'?"),
        ("credit.lam=1", "credit.lam: unknown key in credit"),
        ("credit.type=ppo", "credit.type: unknown type 'ppo'; known: attention, "),
        ("task.type=fil", "task.type: unknown type 'fil'; did you mean 'file'?"),
        ("stop.steps=-1", "stop.steps: Input should be greater than or equal to 0"),
        ("rewards.3.weight=2", "'3' is not a place in a list of 1"),
        ("seed", "'seed': expected key.sub=value"),
        ("rewards=[]", "rewards"),
        ("name=../../etc", "name"),
        ("seed.sub=1", "seed"),
    ],
)
def test_mistakes_are_named_with_their_place(override, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config([], [override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.sampling.temperature=0"], "a greedy token has no probability to learn from"),
        (["credit.type=gae"], "needs a critic"),
        (["policy.value_head={}"], "never asks it"),
        (["rollout.samples_per_prompt=1"], "must be at least 2"),
        (["update.minibatches=999"], "exceeds the 64 samples"),
        (["stop.steps=null"], "nothing would end this run"),
        (["stop.steps=null", "stop.tokens=5", "update.schedule=cosine"], "set stop.steps"),
        (["stop.patience=2"], "need evaluations while training"),
        (["stop.kl=3", "kl.place=none", "kl.measure=false"], "kl.measure=true"),
        (["kl.target=3", "kl.place=none"], "set kl.place to reward or loss"),
        (["rollout.sampling.min_new_tokens=99"], "min_new_tokens 99 exceeds max_new_tokens 64"),
        (["rollout.sampling.stop=['']"], "an empty string"),
        (["task.path=x.jsonl", "task.target_language=de"], "task.target_language says how a family asks"),
        (["task={tasks: {a: {path: x, balance: c}}}"], "task.balance takes as many items of each class"),
        (["task={path: x, layouts: [{answer: a}]}"], "a layout has either `prompt`, a template, or `messages`"),
        (["task={path: x, layouts: [{prompt: '{a}', answer: a, opening: 2}]}"], "opening divides the column"),
        (["algorithm=dppo", "objective.level=sequence"], "dppo bounds each token by itself: level token, not sequence"),
        (["algorithm=online_dpo", "kl.measure=false"], "compares with the reference model: set kl.measure=true"),
        (["algorithm=online_dpo", "rollout.samples_per_prompt=1"], "credit.type online_dpo compares the samples"),
    ],
)
def test_impossible_combinations_are_refused_with_what_to_change(overrides, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config([], overrides)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "expected `key: value` lines at the top"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config([write(tmp_path, content)])
    assert load_config([write(tmp_path, "", "empty.yaml")]) == RunConfig()


def aliases(levels, line):
    """The laughing billions: each level holds the one below it nine times."""
    return "".join(line.format(name=f"n{k}", below=",".join([f"*n{k - 1}"] * 9)) for k in range(1, levels))


HOSTILE = {
    "billion laughs": ("n0: &n0 [x]\n" + aliases(9, "{name}: &{name} [{below}]\n"), "more than 100000 values"),
    "a list in itself": ("rewards: &r\n - *r\n", "one that holds itself"),
    "a section in itself": ("kl: &k\n  estimator: *k\n", "one that holds itself"),
    "a tag that calls": ("name: !!python/object/apply:os.system ['exit 1']", "could not determine a constructor"),
    "a tag that imports": ("name: !!python/name:os.system", "could not determine a constructor"),
    "deep lists": ("name: " + "[" * 1500, "nested too deeply"),
    "deep sections": ("{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "a huge number": ("seed: " + "9" * 5000, "digits"),
    "a large seed": ("seed: " + "9" * 30, "seed: Input should be less than"),
    "an infinite rate": ("update: {learning_rate: .inf}", "finite number"),
    "no day": ("name: 2020-99-99", "month must be in 1..12"),
    "no number": ('seed: !!int ""', "line 1: not valid YAML: '' is no int"),
    "no truth": ("\nkl: {measure: !!bool x}", "line 2: not valid YAML: 'x' is no bool"),
    "no time": ("name: !!timestamp x", "'x' is no timestamp"),
    "half a character": ('task: {path: x, prompt: "a \\ud83d b"}', "half a character (U+D83D) at 2 of 'a \\ud83d b'"),
    "NUL in a path": ('folder: "a\\0b"', "a NUL character in 'a\\x00b'"),
    "a path as a name": ("name: ../../x", "name: String should match pattern"),
    "the folder above as a name": ("name: ..", "name: String should match pattern"),
    "a line end in a name": ('name: "a\\n"', "name: String should match pattern"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_sentence_at_once(tmp_path, name):
    content, words = HOSTILE[name]
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config([write(tmp_path, content)])


def test_merge_keys_that_copy_a_billion_values_end_at_once(tmp_path):
    content = "n0: &n0 {x: 1}\n" + aliases(9, "{name}: &{name} {{<<: [{below}]}}\n")
    with pytest.raises(ConfigError, match=r"copy too much|^n0: unknown key"):  # PyYAML 6.0.4 copies each key once
        load_config([write(tmp_path, content)])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name=" + "[" * 1500, "'name': nested too deeply"),
        (
            "task.path=\udcff.jsonl",
            "'task.path': half a character (U+DCFF)",
        ),  # a byte of a command line that is no text
        ("kl.estimator=&r [*r]", "one that holds itself"),
        ("rewards.\u00b2=1", "is not a place in a list of 1"),
    ],
)
def test_hostile_overrides_too(override, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        load_config([], [override])


def test_aliases_within_reason_are_welcome(tmp_path):
    content = "rollout: {sampling: &s {top_p: 0.9}}\nevaluation: {sampling: {<<: *s, temperature: 0.0}}\n"
    assert load_config([write(tmp_path, content)]).evaluation.sampling.top_p == 0.9


def test_a_missing_file_names_the_nearest(tmp_path):
    write(tmp_path, "", "quickstart.yaml")
    with pytest.raises(ConfigError, match=r"quickstrat\.yaml.*did you mean '.*quickstart\.yaml'"):
        load_config([tmp_path / "quickstrat.yaml"])


def test_every_field_is_explained():
    rows = explain(RunConfig)
    assert {"policy.model", "rollout.sampling.top_p", "task.max_bad_rows", "stop.kl", "rewards.0.weight"} <= {
        row[0] for row in rows
    }
    assert [row[0] for row in rows if not row[3]] == []


def test_the_configuration_cannot_be_changed_under_a_run():
    with pytest.raises(Exception, match="frozen"):
        RunConfig().seed = 2
    assert validate(yaml.safe_load(RunConfig().to_yaml()), RunConfig) == RunConfig()
