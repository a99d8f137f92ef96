"""Rewards in processes of their own: the same numbers, and every fault is that of its completion."""

import json
import pickle
import re
import sys
from dataclasses import replace

import pytest
import torch

from pertoken.assembly import build_rewards
from pertoken.config import RewardConfig
from pertoken.errors import ConfigError, RewardError
from pertoken.jobs import run
from pertoken.machine.workers import Fault
from pertoken.rewards import Isolated, Measured, Stateful, Weighted, findings, isolation, make, score
from pertoken.types import PolicyOutput
from tests.test_trainer import data, metrics_of, settings  # noqa: F401

TEXTS = {
    "0": ("the cat sat on the mat. the cat sat on the mat.", "the cat sat on a mat"),
    "1": ("", "nothing"),
    "2": ("猫坐在垫子上。 a dog!", "猫在垫子上"),
    "3": ("It is is a very very long sentence, that says {nothing} at all", "it says nothing"),
    "4": ("a cat", "a cat"),
}

MINE = """
import os, random, sys, time
from pertoken.rewards import NO_OPINION, SampleReward, ScoredSpan, episode_reward, span_reward, token_reward

@episode_reward
def does(sample):
    print("a word", sample.text)
    order = sample.text.strip(" .")
    if order == "hang":
        while True:
            pass
    if order == "exit":
        os._exit(3)
    if order == "raise":
        raise KeyError("colour")
    if order == "nan":
        return float("nan")
    if order == "wrong":
        return "1.0"
    if order == "fork":
        os.fork()
    if order == "silent":
        return NO_OPINION
    return float(len(sample.text))

@span_reward
def cats(sample, *, cost=1.0):
    at = sample.text.find("cat")
    return [] if at < 0 else [ScoredSpan(at, at + 3, -cost, "a cat")]

@token_reward
def dice(sample):
    return [random.random() for _ in sample.tokens]

class Remembers(SampleReward):
    def __init__(self, fails_at=None):
        self.seen, self.fails_at = 0, fails_at

    def token_values(self, sample):
        self.seen += 1
        if sample.item.id == self.fails_at:
            raise ValueError("not this one")
        return [float(self.seen)] * len(sample.tokens)

    def get_state(self):
        return {"seen": self.seen}

    def set_state(self, state):
        self.seen = state["seen"]

    def figures(self):
        return {"seen": float(self.seen)}

def longest(completions, answer, **columns):
    return [None if not text else float(len(text) == max(map(len, completions))) for text in completions]

def of_models(scene):
    assert scene.ref.hidden is None and scene.batch.support is None
    assert scene.tokenizer.decode(scene.samples[0].tokens, skip_special_tokens=True) == scene.samples[0].text
    return (scene.ref.logprobs + scene.batch.sample_logprobs) * scene.batch.action_mask

def wrong_shape(scene):
    return scene.batch.sample_logprobs[:1, :1]
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "their_rewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_rewards", None)


class Here:
    """Workers whose work is done here and now, the messages pickled as on their way to a process."""

    def __init__(self, entry, argument, *, name, **limits):
        self.argument, self.limits, self.count, self.restarted = argument, limits, 1, 0
        assert entry == "pertoken.rewards.isolation:serve"
        self.greeting = self.start()

    def start(self):
        greeting, self.handle = isolation.serve(pickle.loads(pickle.dumps(self.argument)))
        return pickle.loads(pickle.dumps(greeting))

    def enlarge(self, count):
        self.count = count

    def close(self):
        pass

    @property
    def log(self):
        return self

    def to(self, path):
        pass

    def ask(self, jobs, *, together):
        order = range(len(jobs)) if self.count == 1 else reversed(range(len(jobs)))  # any order, if there are several
        for k in order:
            try:
                answer = self.handle(pickle.loads(pickle.dumps(jobs[k])))
            except RewardError as error:
                answer = Fault(str(error))
            except Exception as error:
                answer = Fault(f"raised {type(error).__name__}: {error}")
            yield k, pickle.loads(pickle.dumps(answer))
            if getattr(jobs[k], "what", None) is not None and "die" in str(getattr(jobs[k].what, "text", "")):
                self.restarted += 1
                self.start()


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(isolation, "Workers", Here)


@pytest.fixture
def scene(make_episode, make_scene):
    def make(texts=TEXTS):
        rows = [make_episode(text, answer, id=k, group=int(k) // 3) for k, (text, answer) in texts.items()]
        whole = make_scene(*rows, padding=2, step=3)
        logprobs = torch.linspace(-2, 0, whole.batch.tokens.numel()).reshape(whole.batch.tokens.shape).double()
        return replace(whole, old=PolicyOutput(logprobs, logprobs), ref=PolicyOutput(logprobs / 2, logprobs))

    return make


BUILT_INS = {
    "rouge_1": {}, "rouge_2": {}, "rouge_l": {}, "rouge_lsum": {}, "bleu": {}, "chrf": {}, "ter": {}, "meteor": {},
    "repetition": {"n": 1}, "length": {"max_words": 3}, "format": {"parts": ["cat", "[0-9]"]},
    "banned": {"words": ["very", "猫"]}, "distinct": {}, "self_bleu": {}, "readability": {"most": 3.0},
    "rule_pack": {}, "shaping": {}, "kl": {},
    "ensemble": {"members": [{"name": "rouge_l"}, {"name": "bleu", "weight": 2.0}]},
    "their_rewards:cats": {"cost": 0.5}, "their_rewards:longest": {},
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT_INS)
def test_a_reward_says_the_same_as_in_this_process(name, here, scene):
    parameters, whole = BUILT_INS[name], scene()
    own = make(name, parameters, "here")
    isolated = Isolated(name, parameters, processes=3)
    wanted, got = (score([Weighted(r, 1.0, "r")], whole) for r in (own, isolated))
    assert torch.equal(wanted.total, got.total)
    assert wanted.total.any()
    assert wanted.abstained.keys() == got.abstained.keys()
    both = [findings([Weighted(r, 1.0, "r")], whole) for r in (own, isolated)]
    assert both[0] == both[1]
    assert isolated.of_episodes == bool(getattr(own, "of_episodes", False))
    assert isolated._workers.count == (3 if isolated._about.manner == "samples" else 1)


def test_what_is_drawn_depends_on_the_sample_and_the_step_alone(here, scene):
    whole = scene()
    one, many = (Isolated("their_rewards:dice", processes=n)(whole) for n in (1, 4))
    assert torch.equal(one, many)
    assert not torch.equal(one, Isolated("their_rewards:dice")(replace(whole, step=4)))
    assert one[0, 2] != one[4, 2]


def test_one_that_remembers_goes_on_as_if_it_were_here(here, scene):
    whole = scene()
    own, isolated = make("their_rewards:Remembers", {}, ""), Isolated("their_rewards:Remembers", processes=4)
    assert isinstance(isolated, Stateful)
    assert isinstance(isolated, Measured)
    assert not isinstance(Isolated("rouge_l"), Stateful | Measured)
    for _ in range(2):
        wanted, got = (score([Weighted(r, 1.0, "r")], whole) for r in (own, isolated))
        assert torch.equal(wanted.total, got.total)
        assert wanted.figures == got.figures
    state = Weighted(isolated, 1.0, "r").state()
    assert state == own.get_state() == {"seen": 10}
    later = Isolated("their_rewards:Remembers")
    later.set_state(json.loads(json.dumps(state)))
    assert torch.equal(later(whole), own(whole))


def test_a_new_process_knows_what_the_one_before_had_answered(here, scene):
    texts = TEXTS | {"2": ("die", None)}
    isolated = Isolated("their_rewards:Remembers")
    sums = isolated(scene(texts))[:, 2]
    assert isolated._workers.restarted == 1
    assert sums.tolist() == [1, 2, 3, 4, 5]


def test_a_scene_is_handed_over_whole_without_what_only_models_read(here, scene):
    whole = scene()
    whole = replace(whole, ref=replace(whole.ref, hidden=torch.ones(*whole.batch.tokens.shape, 4)))
    got = Isolated("their_rewards:of_models", processes=2)(whole)
    assert torch.equal(got, (whole.ref.logprobs + whole.batch.sample_logprobs) * whole.batch.action_mask)
    with pytest.raises(RewardError, match=r"reward 'w': returned torch.float64 of shape \[1, 1\], expected"):
        score([Weighted(Isolated("their_rewards:wrong_shape"), 1.0, "w")], whole)


def test_a_tokenizer_that_cannot_be_sent_is_named_where_it_is_asked_for(here, scene, tokenizer):
    class Mine:
        decode, all_special_ids, eos_token_id = tokenizer.decode, tokenizer.all_special_ids, tokenizer.eos_token_id

    mine = replace(scene(), tokenizer=Mine())
    told = r"reward 'm': .*asks for the tokenizer, and Mine \(\w+: .*\) cannot be sent .* without `processes`"
    with pytest.raises(RewardError, match=told):
        score([Weighted(Isolated("their_rewards:of_models"), 1.0, "m")], mine)
    assert Isolated("their_rewards:longest")(mine).values.any()  # it does not ask


def test_a_configuration_asks_for_it(here):
    entry = {"name": "rouge_l", "granularity": "token", "processes": 2, "time_limit": 3, "memory_limit": 2,
             "attempts": 2, "max_failed_share": 0.25}  # fmt: skip
    (part,) = build_rewards([RewardConfig.model_validate(entry)])
    assert isinstance(part.reward, Isolated)
    assert part.reward._workers.argument[:2] == ("rouge_l", {"granularity": "token"})
    assert (part.reward._workers.limits["time_limit"], part.reward._workers.limits["memory_limit"]) == (3, 2)
    assert (part.time_limit, part.attempts, part.max_failed_share) == (None, 2, 0.25)
    with pytest.raises(ConfigError, match=r"rewards\.0\.granularty: rouge_l has no such field; did you mean 'gran"):
        build_rewards([RewardConfig.model_validate({"name": "rouge_l", "granularty": 1, "processes": 1})])
    with pytest.raises(ValueError, match="set `processes`"):
        RewardConfig.model_validate({"name": "rouge_l", "memory_limit": 2})
    with pytest.raises(ConfigError, match="processes >= 1"):
        Isolated("rouge_l", processes=0)


# ---- in real processes ------------------------------------------------------------------------------------------

ORDERS = ["well.", "raise", "nan", "wrong", "fork", "silent", "well done.", "hang", "exit"]
FAILING = {
    "raise": "raised KeyError: 'colour'",
    "nan": "nan at token .* of the row, expected finite numbers",
    "wrong": r"returned '1.0' \(str\), expected a number",
    "hang": "no answer within 1 s; it was at .*their_rewards.py:1[01], in does",
    "exit": "its process died with exit code 3; the last that it said: 'a word exit'",
}


def test_trap_30_each_fault_is_that_of_its_completion(make_episode, make_scene, tmp_path, capfd):
    episodes = [make_episode(order, id=str(k)) for k, order in enumerate(ORDERS)]
    isolated = Isolated("their_rewards:does", time_limit=1.0)
    isolated.log_to(tmp_path / "rewards.log")
    with pytest.raises(RewardError, match=r"^reward 'does': does, episode '1' \(item 'item-1'\): raised KeyError"):
        score([Weighted(isolated, 1.0, "does")], make_scene(episodes[1]))
    whole = make_scene(*episodes)
    got = score([Weighted(isolated, 1.0, "does", max_failed_share=0.6)], whole)
    assert got.total.sum(1).tolist() == [5.0, 0, 0, 0, 4.0, 0, 10.0, 0, 0]
    assert {ORDERS[row] for row in got.abstained["does"].nonzero()[:, 0]} == {*FAILING, "silent"}
    assert got.figures == {"errors/does": 5.0, "abstained/does": pytest.approx(1 / 9)}
    for row, message in got.failures["does"].items():
        assert re.match(rf"does, episode '{row}' \(item 'item-{row}'\): {FAILING[ORDERS[row]]}", message)
    isolated.close()
    assert "[their_rewards:does] a word well." in (tmp_path / "rewards.log").read_text()
    assert capfd.readouterr() == ("", "")


# ---- in a run ---------------------------------------------------------------------------------------------------


def test_a_run_with_one_that_remembers_is_resumed_to_the_bit(here, model_folder, data, tmp_path):  # noqa: F811
    def trained(name, stops=None):
        rewards = [{"fn": "their_rewards:Remembers", "name": "seen", "processes": 2, "weight": 0.1},
                   {"fn": "their_rewards:dice", "name": "dice", "processes": 2}]  # fmt: skip
        config = settings(
            model_folder, data, tmp_path, folder=str(tmp_path / name), rewards=rewards, stop__steps=3,
            evaluation__items=0,
        )  # fmt: skip
        made = []
        run.train(config, on_step=lambda report, _: made.append(1), interrupted=lambda: len(made) == stops)
        if stops is not None:
            run.train(config, resume=config.run_folder)
        return metrics_of(config.run_folder)

    whole, resumed = trained("whole"), trained("parts", stops=1)
    kept = ("reward/seen", "reward/dice", "seen/seen", "grad/norm", "kl/sequence")
    assert [[row[name] for name in kept] for row in resumed] == [[row[name] for name in kept] for row in whole]
    assert [row["seen/seen"] for row in whole] == [16, 32, 48]
