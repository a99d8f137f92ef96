"""Samples of the next step are drawn while the rewards of this one are computed: `rollout.ahead`."""

import json
import threading

import pytest
from pydantic import ValidationError

from pertoken.errors import RewardError
from pertoken.jobs import run
from pertoken.training import trainer, updating
from tests.test_trainer import data, importable, metrics_of, settings  # noqa: F401


def numbers(model_folder, data, tmp_path, **changes):  # noqa: F811
    """No two rows are worth the same, so that each step moves the weights."""
    rewards = [{"fn": "tests.test_trainer:token_numbers", "name": "numbers"}]
    return settings(model_folder, data, tmp_path, rewards=rewards, **changes)


def without_times(rows):
    left_out = ("time", "memory/", "tokens/per_second", "staleness")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def trained(config):
    run.train(config)
    return metrics_of(config.run_folder)


def test_with_weights_that_stay_the_same_it_changes_nothing(model_folder, data, tmp_path):  # noqa: F811
    both = [
        trained(numbers(model_folder, data, tmp_path, folder=str(tmp_path / str(ahead)), rollout__ahead=ahead,
                         update__learning_rate=1e-30, stop__steps=4))
        for ahead in (False, True)
    ]  # fmt: skip
    assert without_times(both[0]) == without_times(both[1])
    assert [row["staleness"] for row in both[1]] == [0, 1, 1, 1]


def test_the_update_between_is_weighed(model_folder, data, tmp_path):  # noqa: F811
    """The first step is as without; from then on, sampled and scored log-probs are those of two policies."""
    at_once = trained(numbers(model_folder, data, tmp_path, folder=str(tmp_path / "a"), stop__steps=3))
    ahead = trained(
        numbers(model_folder, data, tmp_path, folder=str(tmp_path / "b"), stop__steps=3, rollout__ahead=True)
    )
    assert without_times(at_once[:1]) == without_times(ahead[:1])
    assert all(row["drift/max"] < updating.RATIO_TOLERANCE for row in at_once)
    assert all(row["drift/max"] > 1e-3 for row in ahead[1:])
    assert ahead[1]["reward/numbers"] != at_once[1]["reward/numbers"]


def test_rewards_and_sampling_go_on_at_the_same_time(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    """Each side waits for the other: one after the other they would wait for ever."""
    rewarding, drawn = threading.Event(), threading.Event()
    own_reward, own_draw = trainer.reward, trainer.draw

    def reward(*args):
        rewarding.set()
        assert drawn.wait(20)
        return own_reward(*args)

    def draw(running, step, items):
        if step == 2:
            assert rewarding.wait(20)
            drawn.set()
        return own_draw(running, step, items)

    monkeypatch.setattr(trainer, "reward", reward)
    monkeypatch.setattr(trainer, "draw", draw)
    rows = trained(numbers(model_folder, data, tmp_path, rollout__ahead=True, stop__steps=2))
    assert len(rows) == 2


def test_what_fails_beside_the_sampling_is_told_as_ever(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    own = trainer.reward

    def reward(running, scene):
        if scene.step == 3:
            raise RewardError("reward 'judge': no answer")
        return own(running, scene)

    config = numbers(model_folder, data, tmp_path, rollout__ahead=True, stop__steps=5)
    with monkeypatch.context() as broken:
        broken.setattr(trainer, "reward", reward)
        with pytest.raises(RewardError, match=r"judge.*step 2 is saved"):
            run.train(config)
    run.train(config, resume=config.run_folder)
    whole = trained(
        numbers(model_folder, data, tmp_path, rollout__ahead=True, stop__steps=5, folder=str(tmp_path / "w"))
    )
    assert without_times(metrics_of(config.run_folder)) == without_times(whole)


def test_resumed_with_other_sampling_it_draws_anew_and_says_so(model_folder, data, tmp_path):  # noqa: F811
    first = numbers(model_folder, data, tmp_path, rollout__ahead=True, stop__steps=5)
    made = []
    run.train(first, on_step=lambda report, _: made.append(1), interrupted=lambda: len(made) >= 2)
    state = next((first.run_folder / "checkpoints").glob("step-*/state.json"))
    assert json.loads(state.read_text())["ahead"]["version"] == 1
    other = numbers(model_folder, data, tmp_path, rollout__ahead=True, stop__steps=5,
                     rollout__sampling={"max_new_tokens": 6})  # fmt: skip
    notes = []
    run.train(other, resume=first.run_folder, on_note=notes.append)
    assert any("drawn anew" in note for note in notes)
    assert [row["staleness"] for row in metrics_of(first.run_folder)] == [0, 1, 0, 1, 1]


def test_without_a_cap_it_is_refused(model_folder, data, tmp_path):  # noqa: F811
    with pytest.raises(ValidationError, match=r"rollout\.ahead.*importance_cap"):
        numbers(model_folder, data, tmp_path, rollout__ahead=True, objective__importance_cap=None)
