"""`pertoken reward check`: it finds what is wrong with a reward before a run does."""

import pytest

from pertoken.reward_check import check_reward
from pertoken.rewards import Length, Repetition, RougeL, SampleReward, Weighted, episode_reward, token_reward
from pertoken.rewards.functions import CompletionsReward
from pertoken.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()


def checked(reward):
    return check_reward(Weighted(reward, 1.0, "mine"), TOKENIZER)


def broken(reward):
    return {verdict.promise: verdict.broken for verdict in checked(reward).verdicts if verdict.broken}


@pytest.mark.parametrize("reward", [RougeL(), Repetition(), Length(max_words=3)])
def test_built_in_rewards_are_sound(reward):
    found = checked(reward)
    assert found.sound
    assert found.milliseconds > 0
    by_kind = {example.kind: example for example in found.examples}
    assert {"good", "repeated", "scrambled", "empty", "odd", "cut off", "one token"} == by_kind.keys()
    for example in found.examples:
        assert "".join(example.pieces).removesuffix("<eos>") == example.text
        assert len(example.pieces) == len(example.values)


def test_findings_are_shown():
    repeated = next(example for example in checked(Repetition()).examples if example.kind == "repeated")
    assert repeated.findings
    assert all(finding.value < 0 for finding in repeated.findings)


def test_one_that_raises_for_some_text_is_named_with_the_text():
    @episode_reward
    def divides(sample):
        return 1 / len(sample.text)

    (words,) = broken(divides).values()
    assert words.startswith("empty completion of item 'rain'")
    assert "ZeroDivisionError" in words


def test_one_that_counts_characters_instead_of_tokens():
    @token_reward
    def by_letter(sample):
        return [1.0 for _ in sample.text]

    assert "one per token" in broken(by_letter)["answers every completion"]


def test_one_that_looks_at_the_others():
    def ranks(completions):
        return [1 + sorted(completions).index(text) for text in completions]

    assert set(broken(CompletionsReward(ranks))) == {
        "gives a completion the same alone and among others", "does not depend on the order of the batch",
    }  # fmt: skip


def test_one_without_an_opinion():
    assert set(broken(episode_reward(lambda sample: 0.0))) == {"has an opinion"}


class Remembers(SampleReward):
    def __init__(self, loses):
        self.seen, self.loses = 0, loses

    def token_values(self, sample):
        self.seen += 1
        return [float(self.seen)] * len(sample.tokens)

    def get_state(self):
        return self.seen

    def set_state(self, state):
        self.seen = state + self.loses


def test_one_that_remembers_is_asked_for_its_state_and_not_for_the_same_again():
    assert checked(Remembers(0)).sound
    assert set(broken(Remembers(1))) == {"remembers what JSON can hold"}


def test_by_the_command_line(pertoken, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def ends(completions, **kw):\n    return [t.endswith('.') for t in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, shown, _ = pertoken("reward", "check", "mine:ends")
    assert code == 0
    assert "kept    answers every completion" in shown
    assert "ms per 1,000 tokens" in shown
    assert pertoken("reward", "check", "length", "max_words=2")[0] == 0
    code, _, wrong = pertoken("reward", "check", "no_such_reward")
    assert code
    assert "unknown reward 'no_such_reward'" in wrong


def test_one_that_hangs_is_ended_and_named(pertoken, tmp_path, monkeypatch):
    (tmp_path / "waits.py").write_text(
        "def on(completions):\n    while not all(completions):\n        pass\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, shown, _ = pertoken("reward", "check", "waits:on", "--time-limit", "1")
    assert code == 1
    assert "broken  answers every completion: empty completion of item 'rain'" in shown
    assert "no answer within 1 s; it was at" in shown
    assert "waits.py:2, in on" in shown
