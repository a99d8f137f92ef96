"""Rewards placed anew: what is taken out of a text, what the rest is worth, who is paid, and that no sum moves."""

import itertools
from dataclasses import replace

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.config import AttentionCredit, Differences, LeaveOneTokenOut, Shapley
from pertoken.rewards import Scene, Weighted, episode_reward, score, token_reward
from pertoken.rewards.align import align
from pertoken.rewards.kl import KLToReference
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, episode
from pertoken.training.redistribution import blocks_of, by_attention, by_worth, place, without
from pertoken.types import PolicyOutput, Span, TokenRewards

TOKENIZER = byte_tokenizer()
EOS = 256


def ids(text):
    return TOKENIZER.encode(text)


@episode_reward
def both(sample):
    """1 for a text with an a and a b in it, paid at its end."""
    return float("a" in sample.text and "b" in sample.text)


@episode_reward
def vowels(sample):
    """How many there are, less a quarter if the text was cut off."""
    return sum(letter in "aeiou" for letter in sample.text) - 0.25 * (sample.stop == "length")


@token_reward
def first(sample):
    """2 at the first token, whatever it is."""
    return [2.0, *[0.0] * (len(sample.tokens) - 1)]


def scene_of(*answers, stop="eos", **sampling):
    rows = [
        episode([1, 2], ids(text) + [EOS] * (stop == "eos"), id=str(k), stop=stop) for k, text in enumerate(answers)
    ]
    controls = Controls(Sampling(**sampling), (EOS,))
    return Scene(to_batch(rows, controls), rows, TOKENIZER, step=3)


def parts(*rewards):
    return [Weighted(reward, weight, reward.name) for reward, weight in rewards]


def paid(config, scene, rewards, *, seed=0):
    earned = score(rewards, scene)
    return by_worth(config, earned, scene, rewards, seed=seed)


def row(rewards, name, k=0):
    return [round(value, 6) for value in rewards.parts[name][k, 2:].tolist()]


# --- what is taken out ------------------------------------------------------------------------------------------


def texts_of(text, config, longest=64, tail=()):
    answer = [*ids(text), *tail]
    one = episode([1, 2], answer)
    blocks = blocks_of(config, one, align(answer, TOKENIZER), longest)
    assert [column for block in blocks for column in block] == list(range(2, 2 + len(answer)))
    return [TOKENIZER.decode([one.tokens[column] for column in block]) for block in blocks]


def test_words_take_the_space_before_them_along_and_the_end_token_is_a_unit_of_its_own():
    word = Shapley(unit="word")
    # a byte tokenizer writes the space as a token, which goes with the word before it
    assert texts_of("a cat, well-fed", word, tail=[EOS]) == ["a ", "cat", ", ", "well-fed", "<eos>"]
    assert texts_of("你好 x", word) == ["你", "好 ", "x"]
    assert texts_of("", word, tail=[EOS]) == ["<eos>"]


def test_tokens_of_one_character_stay_together():
    assert texts_of("é!", LeaveOneTokenOut()) == ["é", "!"]
    assert texts_of("é!", Differences()) != ["é", "!"], "a prefix may end anywhere: it is exact all the same"


def test_more_units_than_samples_allow_become_runs_of_equal_length():
    assert texts_of("abcdefgh", LeaveOneTokenOut(samples=4)) == ["ab", "cd", "ef", "gh"]
    assert texts_of("abcde", LeaveOneTokenOut(samples=3)) == ["ab", "cd", "e"]
    assert texts_of("abcdefgh", Shapley(samples=7)) == ["ab", "cd", "ef", "gh"]
    assert texts_of("abc", Shapley(samples=64)) == ["a", "b", "c"]


def test_blocks_of_differences_do_not_depend_on_the_length_of_the_text():
    config = Differences(samples=4)
    assert texts_of("abcdef", config, longest=8) == ["ab", "cd", "ef"]
    assert texts_of("abc", config, longest=8) == ["ab", "c"]
    assert texts_of("abc", config, longest=9) == ["abc"]


def test_a_text_without_some_tokens_is_an_episode_again():
    tool = replace(
        episode([1, 2], [5, 6, 7, 8], stop="stop_string"),
        action_mask=[False, False, True, False, True, True],
        spans=[Span(0, 2, "prompt", 0), Span(2, 3, "action", 1), Span(3, 4, "observation", 1), Span(4, 6, "action", 2)],
    )
    short = without(tool, {4}, EOS)
    assert (short.tokens, short.stop) == ([1, 2, 5, 6, 8], "stop_string")
    assert short.action_mask == [False, False, True, False, True]
    assert [(span.start, span.stop) for span in short.spans] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert without(tool, {5}, EOS).stop == "length", "it lost the token that ended it"
    nothing = without(tool, {2, 4, 5}, EOS)
    assert (nothing.tokens, nothing.action_mask[-1], nothing.stop) == ([1, 2, 6, EOS], True, "eos")
    assert not any(without(tool, {2, 4, 5}, None).action_mask)


# --- who is paid ------------------------------------------------------------------------------------------------


def test_by_hand():
    """v: 1 where a and b are left. 'xab': x does nothing, a and b do it together."""
    scene, rewards = scene_of("xab", stop="length"), parts((both, 1.0))
    assert row(paid(Shapley(), scene, rewards)[0], "both") == [0, 0.5, 0.5]
    assert row(paid(Differences(), scene, rewards)[0], "both") == [0, 0, 1]
    # a and b are worth 1 each to the whole, which is 1: what is too much is taken back on the first token
    assert row(paid(LeaveOneTokenOut(), scene, rewards)[0], "both") == [-1, 1, 1]


def test_blocks_share_what_they_add_but_differences_pay_where_they_are_known():
    scene, rewards = scene_of("xaba", stop="length", max_new_tokens=6), parts((both, 1.0))
    assert row(paid(Differences(samples=3), scene, rewards)[0], "both") == [0, 0, 0, 1]
    assert row(paid(Shapley(samples=3), scene, rewards)[0], "both") == [0, 0, 0.5, 0.5]  # "ba" is enough


def test_what_the_empty_text_is_worth_is_on_the_first_token():
    scene, rewards = scene_of("za"), parts((first, 1.0), (vowels, 1.0))
    shapley, _ = paid(Shapley(), scene, rewards)
    assert row(shapley, "first") == [2, 0, 0]
    # cut off costs a quarter, but the empty text is one that has ended: z joins it at -1/4, in a third of the orders
    assert row(shapley, "vowels") == pytest.approx([-1 / 12, 11 / 12, 1 / 6], abs=1e-6)
    # z alone, za, za and the end
    assert row(paid(Differences(), scene, rewards)[0], "vowels") == pytest.approx([-0.25, 1.0, 0.25])


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize(
    "config",
    [
        Shapley(samples=9), Shapley(unit="word", samples=5), LeaveOneTokenOut(samples=4), LeaveOneTokenOut(unit="word"),
        Differences(samples=5),
    ],
)  # fmt: skip
def test_sums_of_texts_and_parts_stay(config, share):
    config = config.model_copy(update={"share": share})
    scene = scene_of("a bad cab", "oh", "", "bear, you say", max_new_tokens=20)
    rewards = parts((both, 1.0), (vowels, -0.5), (first, 2.0))
    earned, (got, texts) = score(rewards, scene), paid(config, scene, rewards)
    for name, cells in got.parts.items():
        torch.testing.assert_close(cells.sum(1), earned.parts[name].sum(1), atol=1e-5, rtol=0)
        assert not cells[~scene.batch.action_mask].any()
    torch.testing.assert_close(got.total, sum(got.parts.values()))
    assert torch.equal(got.total, earned.total) == (share == 0)
    assert 0 < texts <= 4 * config.samples


def test_attention_spreads_a_share_and_leaves_the_rest_where_it_was_paid():
    scene, rewards = scene_of("ab", "c"), parts((first, 1.0), (vowels, 1.0))
    weights = torch.tensor([[9.0, 9, 1, 3, 0], [0, 0, 0, 0, 0]])
    got = by_attention(
        AttentionCredit(share=0.5), score(rewards, scene), ["first", "vowels"], weights, scene.batch.action_mask
    )
    assert row(got, "first") == [1 + 0.25, 0.75, 0]
    assert row(got, "first", 1) == [1, 1, 0], "without any attention on the last action"
    assert row(got, "vowels") == [0.125, 0.375, 0.5]
    assert torch.equal(got.total, got.parts["first"] + got.parts["vowels"])


def test_the_kl_and_what_the_environment_paid_stay_where_they_are():
    scene = scene_of("ab", "ba")
    ones = torch.where(scene.batch.action_mask, 1.0, 0.0)
    scene = replace(scene, old=PolicyOutput(-ones, ones), ref=PolicyOutput(-2 * ones, ones))
    rewards = parts((both, 1.0))
    earned = score([*rewards, Weighted(KLToReference(), 0.1, "kl")], scene)
    got, _ = by_worth(Shapley(), earned, scene, rewards, seed=0)
    assert torch.equal(got.parts["kl"], earned.parts["kl"])
    assert bool(got.parts["kl"].any())
    torch.testing.assert_close(got.total, got.parts["both"] + got.parts["kl"])


# --- what is scored for it --------------------------------------------------------------------------------------


class Counting:
    """Pays the length of the text, and remembers each text that it was asked about, and how many at once."""

    def __init__(self):
        self.asked, self.most = [], 0

    def __call__(self, scene):
        self.most = max(self.most, len(scene.episodes))
        self.asked += [tuple(sample.tokens) for sample in scene.samples]
        assert len(set(scene.batch.group.tolist())) == len(scene.episodes)
        values = torch.zeros(scene.batch.tokens.shape, dtype=torch.float64)
        for k, (one, sample) in enumerate(zip(scene.episodes, scene.samples, strict=True)):
            values[k, one.prompt_length] = len(sample.text)
        return values


@pytest.mark.parametrize("config", [Shapley(samples=30), LeaveOneTokenOut(samples=30), Differences(samples=30)])
def test_equal_texts_are_scored_once_no_more_at_once_than_there_are_samples_and_never_the_samples_again(config):
    scene, counting = scene_of("aaaa", "aab"), Counting()
    scene = replace(scene, episodes=[replace(one, group=7) for one in scene.episodes])
    rewards = [Weighted(counting, 1.0, "length")]
    earned = TokenRewards(torch.zeros(2, 7), {"length": torch.zeros(2, 7)})
    _, texts = by_worth(config, earned, scene, rewards, seed=0)
    assert len(counting.asked) == len(set(counting.asked)) == texts
    assert not {tuple(one.tokens[2:]) for one in scene.episodes} & set(counting.asked)
    assert counting.most == 2


@pytest.mark.parametrize(("n", "samples"), [(2, 3), (9, 17), (9, 16), (9, 40), (5, 64), (6, 64), (30, 64), (1, 3)])
def test_shapley_scores_no_more_texts_than_it_may(n, samples):
    asked = set()

    def worth(kept):
        asked.update(map(tuple, kept.tolist()))
        return kept.double().sum(1)

    config = Shapley(samples=samples)
    blocks = blocks_of(config, episode([1, 2], ids("x" * n)), align(ids("x" * n), TOKENIZER), 64)
    cells = place(config, worth, blocks, n + 2, seed=1)
    assert len(asked - {(True,) * len(blocks)}) <= samples
    assert cells.sum() == len(blocks)


def test_few_units_are_joined_in_all_orders():
    """3 tokens worth 1 if 0 and 2, or 1 and 2, are left: by hand 1/6, 1/6, 4/6."""

    def worth(kept):
        return ((kept[:, 0] | kept[:, 1]) & kept[:, 2]).double()

    cells = place(Shapley(samples=7), worth, [[2], [3], [4]], 5, seed=0)
    torch.testing.assert_close(cells, torch.tensor([0, 0, 1, 1, 4]).double() / torch.tensor([1, 1, 6, 6, 6]))


def test_orders_come_from_the_seed_and_the_step():
    rewards = parts((both, 1.0), (vowels, 1.0))
    scene = scene_of("abcab aei", "bab uoi ab")
    found = {
        (seed, step): paid(Shapley(samples=20), replace(scene, step=step), rewards, seed=seed)[0].total
        for seed, step in itertools.product((0, 1), (3, 4))
    }
    again = paid(Shapley(samples=20), scene, rewards)[0].total
    assert torch.equal(found[0, 3], again)
    assert not any(torch.equal(found[0, 3], other) for key, other in found.items() if key != (0, 3))


def test_shortened_texts_of_truncated_sampling_need_no_kept_sets():
    answer = ids("ab")
    one = episode([1, 2], answer)
    scene = Scene(to_batch([one], Controls()), [one], TOKENIZER)
    scene = replace(scene, batch=replace(scene.batch, controls=Controls(Sampling(top_k=3), (EOS,))))
    assert paid(Shapley(), scene, parts((both, 1.0)))[0].total.sum() == 1.0
