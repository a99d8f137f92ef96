"""Puzzles of reasoning-gym as items, scored by what comes with them."""

import dataclasses

import pytest

from pertoken.assembly import build_rewards, build_task
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import ConfigError
from pertoken.rewards import Scene, score
from pertoken.sampling import Controls
from pertoken.tasks.base import check_task
from pertoken.testing import byte_tokenizer, episode

pytest.importorskip("reasoning_gym")
FN = "pertoken.integrations.reasoning_gym"


def config_of(**task):
    return RunConfig.model_validate(
        {"task": {"fn": f"{FN}:load_task", "dataset": "basic_arithmetic", "num_train": 40} | task}
    )


def paid(item, text, **parameters):
    reward = {"name": "right", "fn": f"{FN}:Score"} | parameters
    parts = build_rewards(RunConfig.model_validate({"rewards": [reward]}).rewards)
    said = episode([1, 2], [*byte_tokenizer().encode(text), 256], item=item)
    batch = to_batch([said], Controls())
    return score(parts, Scene(batch, [said], byte_tokenizer())).total[0, 2:].tolist()


def test_a_task_is_sound_and_the_same_for_a_seed():
    task = build_task(config_of(seed=3).task)
    check_task(task)
    assert [len(task.items(split)) for split in ("validation", "test")] == [100, 100]
    assert 30 <= len(task.items("train")) <= 40
    assert task.items("train") == build_task(config_of(seed=3).task).items("train")
    assert task.items("train") != build_task(config_of(seed=4).task).items("train")
    assert len(build_task(config_of(limit=5).task).items("train")) == 5


def test_parameters_are_those_of_the_data_set():
    task = build_task(config_of(min_terms=2, max_terms=2, max_digits=1).task)
    assert max(len(item.prompt[0]["content"]) for item in task.items("test")) < 40


def test_its_scorer_pays_the_last_token():
    item = build_task(config_of().task).items("train")[0]
    assert paid(item, item.answer) == [0.0] * len(item.answer) + [1.0]
    assert paid(item, "nonsense")[-1] < 1.0
    assert paid(item, f"so <a>{item.answer}</a>", within="<a>(.*?)</a>")[-1] == 1.0
    assert paid(item, item.answer, within="<a>(.*?)</a>")[-1] == 0.0


def test_a_small_data_set_holds_out_no_prompt_that_it_trains_on():
    """Sixteen sums of one digit and one operator: most are asked twice."""
    task = build_task(
        config_of(min_terms=2, max_terms=2, max_digits=1, num_train=300, num_test=5, num_validation=5).task
    )
    held_out = {str(item.prompt) for split in ("validation", "test") for item in task.items(split)}
    assert not held_out & {str(item.prompt) for item in task.items("train")}


def test_unknown_names_and_parameters_are_named():
    with pytest.raises(ConfigError, match="did you mean 'basic_arithmetic'"):
        build_task(config_of(dataset="basic_aritmetic").task)
    with pytest.raises(Exception, match="no_such"):
        build_task(config_of(no_such=1).task)


def test_items_can_be_sent_to_other_processes():
    import pickle

    item = build_task(config_of().task).items("train")[0]
    assert pickle.loads(pickle.dumps(dataclasses.replace(item))) == item
