"""Samples beside those that are learnt from: rollouts from prefixes, and what they say of the states between."""

import itertools

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.config import MonteCarlo, RunConfig
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rewards import Scene, Weighted, episode_reward, score
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, episode, tiny_model
from pertoken.training.resampling import beside, continuation, step_starts
from pertoken.types import Completion, Item


@episode_reward
def letters(sample):
    """How many characters the completion has."""
    return float(len(sample.text))


@pytest.fixture(scope="module")
def engine():
    return NativeEngine(tiny_model(), byte_tokenizer(), head_logits=head_logits)


def ids(text):
    return byte_tokenizer().encode(text)


# --- the engine goes on from a prefix -----------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"min_new_tokens": 6}, {"no_repeat_ngram": 2}, {"repetition_penalty": 1.5}])
def test_going_on_from_a_prefix_is_going_on(engine, sampling):
    """Greedily the rest is what it would have been: with its lengths, penalties and bans."""
    controls = Controls.resolve(Sampling(temperature=0.0, max_new_tokens=8, **sampling), byte_tokenizer(), (256,))
    (whole,) = engine.generate([ids("say 1:")], controls, seeds=[0])
    for cut in range(1, len(whole.tokens)):
        prompt = ids("say 1:") + whole.tokens[:cut]
        (rest,) = engine.generate([prompt], controls, seeds=[0], taken=[cut])
        assert rest.tokens == whole.tokens[cut:]
        assert rest.stop == whole.stop


def test_a_stop_string_that_began_in_the_prefix_ends_the_row(engine):
    controls = Controls(Sampling(max_new_tokens=8), ())
    (plain,) = engine.generate([ids("a:") + ids("no")], controls, seeds=[3], taken=[2])
    text = byte_tokenizer().decode(plain.tokens)
    stop = "o" + text[0]
    controls = Controls(Sampling(max_new_tokens=8, stop=(stop,)), ())
    (ended,) = engine.generate([ids("a:") + ids("no")], controls, seeds=[3], taken=[2])
    assert (ended.tokens, ended.stop) == (plain.tokens[:1], "stop_string")
    (whole,) = engine.generate([ids("a:") + ids("no")], controls, seeds=[3])
    assert whole.tokens[:6] == plain.tokens  # what the prompt says is not looked at


def test_prefixes_of_all_lengths_share_the_budget_of_the_whole(engine):
    controls = Controls(Sampling(max_new_tokens=6), ())
    prompts = [ids("a:") + ids("word!")[:k] for k in range(6)]
    found = engine.generate(prompts, controls, seeds=range(6), taken=range(6))
    assert [len(completion.tokens) for completion in found] == [6, 5, 4, 3, 2, 1]
    assert {completion.stop for completion in found} == {"length"}


# --- where steps begin --------------------------------------------------------------------------------------


def starts(text, **settings):
    answer = ids(text)
    found = step_starts(episode([1, 2], answer), MonteCarlo(**settings), byte_tokenizer())
    return [text.encode()[begin - 2 : end - 2].decode() for begin, end in itertools.pairwise([*found, len(answer) + 2])]


def test_steps_are_lines_or_so_many_tokens():
    assert starts("one\ntwo\n\nthree") == ["one\n", "two\n", "\n", "three"]
    assert starts("one\n") == ["one\n"]
    assert starts("a. b. c", after=". ") == ["a. ", "b. ", "c"]
    assert starts("...", after="..") == ["..", "."]
    assert starts("no end") == ["no end"]
    assert starts("abcdefgh", every=3) == ["abc", "def", "gh"]
    assert starts("abcdefgh", every=3, max_states=2) == ["abc", "defgh"]
    assert starts("a\nb\nc", max_states=1) == ["a\nb\nc"]


def test_a_continuation_is_one_text(engine):
    first = episode([1, 2], [5, 6, 7], stop="eos")
    whole = continuation(first, 4, Completion([8, 9], [-0.5, -0.25], "length"), "x", 3)
    assert whole.tokens == [1, 2, 5, 6, 8, 9]
    assert whole.action_mask == [False, False, True, True, True, True]
    assert whole.logprobs == [0, 0, -1, -1, -0.5, -0.25]
    assert (whole.stop, whole.group, whole.prompt_length) == ("length", 3, 2)


# --- what states are worth ----------------------------------------------------------------------------------


class Scripted:
    """Says one letter more for each call of a prefix, and remembers what it was asked."""

    version = 4

    def generate(self, prompts, controls, *, seeds, taken=None):
        self.prompts, self.seeds, self.taken = [list(p) for p in prompts], list(seeds), list(taken)
        said, counts = [], {}
        for prompt in map(tuple, self.prompts):
            counts[prompt] = counts.get(prompt, 0) + 1
            said.append(Completion(ids("x" * counts[prompt]), [-1.0] * counts[prompt], "eos"))
        return said

    def load_weights(self, weights, version):
        """There are none."""

    def release(self):
        """Nothing."""


def test_values_are_means_over_rollouts_and_equal_prefixes_share_them():
    tokenizer, engine = byte_tokenizer(), Scripted()
    item = Item("i", "p")
    episodes = [
        episode([1, 2], ids("ab\ncd"), id="0", item=item),
        episode([1, 2], ids("ab\nee\n"), id="1", item=item),
    ]
    config = RunConfig.model_validate({
        "credit": {"type": "monte_carlo", "rollouts": 3}, "kl": {"place": "none"}, "rewards": [{"name": "length"}],
    })  # fmt: skip
    controls = Controls(config.rollout.sampling, (256,))
    scene = Scene(to_batch(episodes, controls), episodes, tokenizer, step=7)
    policy = Policy(tiny_model(), tokenizer, precision="float32", compile=False)
    rewards = [Weighted(letters, 1.0, "letters")]
    found = beside(scene, config, engine, policy, controls, rewards, score(rewards, scene))
    assert len(engine.prompts) == 2 * 3, "the prompt, and the first line that both rows share"
    assert sorted(set(engine.taken)) == [0, 3]
    assert len(set(engine.seeds)) == 6
    # x, xx, xxx from the prompt: 2 letters; behind "ab" and the line break: 5
    rows = [[0, 0, 2, 0, 0, 5, 0, 0], [0, 0, 2, 0, 0, 5, 0, 0]]
    assert found.states.values.tolist() == rows
    assert found.states.starts.tolist() == [[bool(value) for value in row] for row in rows]
    assert found.tokens == 2 * (1 + 2 + 3)
    assert found.figures() == {"tokens/beside": 12.0}
    assert torch.equal(found.states.starts, found.states.values > 0)
