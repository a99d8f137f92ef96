"""A text as a Gymnasium environment: its checker is content, and what it pays is what training pays."""

import sys
import warnings

import jaxtyping
import numpy as np
import pytest

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, MissingExtraError, TaskError
from pertoken.rewards import RougeL, Scene, Weighted, score, token_reward
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, episode
from pertoken.types import Item

gymnasium = pytest.importorskip("gymnasium")
ITEMS = [Item("a", "say it", "the cat sat"), Item("b", "again", "a dog")]
MAKE = "pertoken.integrations.gymnasium:pertoken/Tokens-v0"


@token_reward
def vowels(sample):
    return [float(sample.text[start:stop] in set("aeiou")) for start, stop in sample.aligned.char_spans]


REWARDS = [Weighted(vowels, 0.5, "vowels"), Weighted(RougeL("token"), 1.0, "rouge_l")]


def env_of(rewards=REWARDS, **settings):
    settings = {"sampling": Sampling(max_new_tokens=8, stop=("!",)), "context_length": 32} | settings
    return gymnasium.make(
        MAKE, items=ITEMS, tokenizer=byte_tokenizer(), rewards=rewards, disable_env_checker=True, **settings
    ).unwrapped


def write(env, text, *, item="a", end=True):
    """Rewards of each step, and the last step."""
    env.reset(options={"item": item})
    steps = [env.step(token) for token in byte_tokenizer().encode(text) + [256] * end]
    return [reward for _, reward, *_ in steps], steps[-1]


def test_the_checker_of_gymnasium_has_nothing_to_say():
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env_of(render_mode="ansi"))
        check_env(env_of(pay="end"))


def test_an_observation_is_the_ids_so_far():
    env = env_of()
    seen, info = env.reset(options={"item": "a"})
    prompt = byte_tokenizer().encode("say it")
    assert seen.tolist() == prompt + [-1] * (32 - len(prompt))
    assert info == {"item": "a", "prompt_length": 6}
    seen, *_ = env.step(65)
    assert seen.tolist() == [*prompt, 65] + [-1] * 25


def test_each_step_pays_what_training_pays_the_token():
    rewards, (_, _, terminated, truncated, info) = write(env_of(), "the ca")
    ids = byte_tokenizer().encode("say it"), [*byte_tokenizer().encode("the ca"), 256]
    batch_of = [episode(*ids, item=ITEMS[0])]
    batch = to_batch(batch_of, Controls())
    wanted = score(REWARDS, Scene(batch, batch_of, byte_tokenizer())).total[0, 6:].tolist()
    assert rewards == pytest.approx(wanted, abs=1e-6)
    assert info["token_rewards"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert sum(info["parts"].values()) == pytest.approx(sum(rewards))
    assert (terminated, truncated, info["text"], info["stop"]) == (True, False, "the ca", "eos")


def test_all_at_the_end_is_the_same_sum():
    little, _ = write(env_of(), "a dog")
    once, _ = write(env_of(pay="end"), "a dog")
    assert once[:-1] == [0.0] * 5
    assert once[-1] == pytest.approx(sum(little))


@pytest.mark.parametrize(
    ("text", "settings", "ends"),
    [
        ("abcdefgh", {}, (False, True, "length")),
        ("abc!", {}, (True, False, "stop_string")),
        ("abcdef", {"context_length": 12}, (False, True, "context")),
    ],
)
def test_an_end_terminates_and_a_limit_truncates(text, settings, ends):
    _, (_, _, terminated, truncated, info) = write(env_of(**settings), text, end=False)
    assert (terminated, truncated, info["stop"]) == ends


def test_a_seed_decides_the_item_and_a_text_that_has_ended_is_over():
    env = env_of()
    assert [env.reset(seed=k)[1]["item"] for k in range(8)] == [env.reset(seed=k)[1]["item"] for k in range(8)]
    assert {env.reset()[1]["item"] for _ in range(20)} == {"a", "b"}
    write(env, "x")
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(65)


def test_the_environment_of_a_run(model_folder, tmp_path):
    from pertoken.config import RunConfig
    from pertoken.integrations.gymnasium import TokenEnv

    (tmp_path / "data.csv").write_text("prompt,reference\n" + "".join(f"say {k},it {k}\n" for k in range(20)))
    config = RunConfig.model_validate(
        {
            "policy": {"model": str(model_folder), "precision": "float32", "compile": False},
            "task": {"path": str(tmp_path / "data.csv"), "prompt": "{prompt}"},
            "rollout": {"sampling": {"max_new_tokens": 3}},
        }
    )
    env = TokenEnv.from_config(config)
    assert env.action_space.n == 258
    env.reset(seed=0)
    assert [env.step(k)[3] for k in (65, 66, 67)] == [False, False, True]
    assert env.observation_space.contains(np.asarray(env.reset()[0]))


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(TaskError, match="no item 'z'"):
        env_of().reset(options={"item": "z"})
    with pytest.raises(TaskError, match="context_length"):
        env_of(context_length=6).reset(options={"item": "a"})
    with pytest.raises((ConfigError, jaxtyping.TypeCheckError), match="progress"):
        env_of(pay="later")
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    monkeypatch.delitem(sys.modules, "pertoken.integrations.gymnasium")
    with pytest.raises(MissingExtraError, match=r"pertoken\[gymnasium\]"):
        __import__("pertoken.integrations.gymnasium")
