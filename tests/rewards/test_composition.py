"""Parts before they are added up: weights over steps, clipping, normalising, abstaining; all numbers by hand."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pertoken.assembly import build_rewards
from pertoken.config import GroupRelative, LeaveOneOut, LeaveOneOutProcess, PerPart, RewardConfig, RunConfig
from pertoken.errors import ConfigError, RewardError
from pertoken.rewards import (
    NO_OPINION,
    CompletionsReward,
    Multiplier,
    Normaliser,
    Opinions,
    SampleReward,
    Schedule,
    Weighted,
    episode_reward,
    score,
    span_reward,
    token_reward,
)
from pertoken.training.assignment import assign
from pertoken.types import PolicyOutput

EPS = 1e-4


@episode_reward
def given(sample):
    """The number that the item has as its answer; no opinion where it says so."""
    return NO_OPINION if sample.reference == "?" else float(sample.reference)


@token_reward
def ids(sample):
    return [float(token) for token in sample.tokens]


@pytest.fixture
def scene_of(make_episode, make_scene):
    """A scene whose rows have these numbers as answers, two tokens each unless said otherwise."""

    def make(*answers, groups=None, lengths=None, step=0):
        lengths, groups = lengths or [2] * len(answers), groups or [0] * len(answers)
        rows = zip(answers, groups, lengths, strict=True)
        episodes = [make_episode([7] * n, str(a), id=str(k), group=g) for k, (a, g, n) in enumerate(rows)]
        return make_scene(*episodes, step=step)

    return make


def sums(part, scene):
    return score([part], scene).parts[part.name].double().sum(1).tolist()


# ---- weights ---------------------------------------------------------------------------------------------------


def test_a_weight_goes_along_its_points_and_is_logged(scene_of):
    part = Weighted(given, Schedule(((2, 1.0), (6, 3.0), (7, -1.0))), "given")
    found = {}
    for step in (0, 2, 3, 5, 6, 7, 50):
        rewards = score([part], scene_of(10, step=step))
        found[step] = rewards.figures["weight/given"]
        assert rewards.total.sum().item() == pytest.approx(10 * found[step])
        assert rewards.figures["raw/given"] == 10
    assert found == {0: 1.0, 2: 1.0, 3: 1.5, 5: 2.5, 6: 3.0, 7: -1.0, 50: -1.0}


def test_a_constraint_finds_the_price_of_its_bound(scene_of):
    """By hand: the weight moves by rate * (least - mean) and is felt in the next step; it stays in [0, largest]."""
    part = Weighted(given, Multiplier(-2.0, rate=0.5, start=1.0, largest=3.0), "given")
    weights = []
    for step, answers in enumerate([(-4, -2), (-9, -9), (-9, -9), (0, 0), (0, 0), (0, 0), (0, 0), (-2, -2)], 1):
        rewards = score([part], scene_of(*answers, step=step))
        weights.append(rewards.figures["weight/given"])
        assert rewards.total.sum().item() == pytest.approx(weights[-1] * sum(answers))
        assert part.weight_at(step) == weights[-1]  # until the step is over
        assert rewards.figures["raw/given"] == sum(answers) / 2
    assert weights == [1.0, 1.5, 3.0, 3.0, 2.0, 1.0, 0.0, 0.0]


def test_a_constraint_settles_where_the_bound_is_kept(scene_of):
    """A policy whose mistakes fall as their price rises, mean = -4 / (1 + weight): the bound of -2 costs 1."""
    part = Weighted(given, Multiplier(-2.0, rate=0.2), "given")
    for step in range(1, 200):
        score([part], scene_of(-4 / (1 + part.weight_at(step)), step=step))
    assert part.weight_at(200) == pytest.approx(1.0, abs=1e-3)


def test_a_constraint_goes_on_from_its_state_and_is_a_yardstick_of_1(scene_of):
    parts = [Weighted(given, Multiplier(0.0, rate=1.0), "given") for _ in range(2)]
    score([parts[0]], scene_of(-3, step=4))
    parts[1].weight.set_state(json.loads(json.dumps(parts[0].weight.get_state())))
    assert [part.weight_at(4) for part in parts] == [0.0, 0.0]
    assert [part.weight_at(5) for part in parts] == [3.0, 3.0]
    assert parts[0].fixed().weight == 1.0


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.0, "start": -1.0}, {"rate": 1.0, "start": 11.0}])
def test_constraints_that_cannot_be(settings):
    with pytest.raises(ConfigError, match="a constraint needs rate > 0"):
        Multiplier(0.0, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint": {"least": 0.2, "rate": 0.5, "start": 20.0}}, "a constraint needs rate > 0"),
        ({"weight": [[5, 0.0], [5, 1.0]]}, "a schedule needs points"),
        ({"clip": [0.1, 0.5]}, r"reward 'rouge_l': clip \[0.1, 0.5\]"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_with_its_place(settings, message):
    entries = [{"name": "bleu"}, {"name": "rouge_l", **settings}]
    with pytest.raises(ConfigError, match=rf"^guards\.beside\.1: {message}"):
        build_rewards([RewardConfig.model_validate(entry) for entry in entries], "guards.beside")


@pytest.mark.parametrize("points", [(), ((3, 1.0), (3, 2.0)), ((3, 1.0), (2, 2.0))])
def test_points_of_a_schedule_must_rise(points):
    with pytest.raises(ConfigError, match="steps rise"):
        Schedule(points)


def test_a_schedule_of_numbers_that_are_none_is_refused():
    with pytest.raises(ConfigError, match="weight must be a finite number"):
        Weighted(given, Schedule(((0, 1.0), (5, math.nan))), "given")


def test_a_part_that_uses_nothing_of_it_is_what_it_was(scene_of):
    rewards = score([Weighted(given, 0.3, "given")], scene_of(1, 2))
    assert not rewards.figures
    assert not rewards.abstained


# ---- clipping --------------------------------------------------------------------------------------------------


def test_each_token_is_clipped_before_the_weight(make_episode, make_scene):
    scene = make_scene(make_episode([1, 5, 0, 9]), make_episode([2]))
    rewards = score([Weighted(ids, 10.0, "ids", clip=(-1.0, 4.0))], scene)
    assert rewards.total[:, 2:].tolist() == [[10, 40, 0, 40], [20, 0, 0, 0]]
    assert rewards.figures["clipped/ids"] == 2 / 4  # the 0 is no value that could be clipped


@pytest.mark.parametrize("place", ["last", "spread"])
def test_of_an_episode_reward_the_number_is_clipped_wherever_it_lies(scene_of, place):
    reward = episode_reward(place=place)(given.fn)
    part = Weighted(reward, 2.0, "given", clip=(1.0, 4.0))
    rewards = score([part], scene_of(8, 0, 2, "?", lengths=[4, 4, 4, 4]))
    assert rewards.total.sum(1).tolist() == [8, 2, 4, 0]
    assert rewards.figures["clipped/given"] == 2 / 3
    assert rewards.total[0, 2:].tolist() == ([2, 2, 2, 2] if place == "spread" else [0, 0, 0, 8])


@pytest.mark.parametrize(("clip", "words"), [((2.0, 2.0), "low < high"), ((0.5, 2.0), "does not hold 0")])
def test_a_clip_that_pays_or_is_no_interval_is_refused(clip, words):
    with pytest.raises(ConfigError, match=words):
        Weighted(ids, 1.0, "ids", clip=clip)


# ---- normalising -----------------------------------------------------------------------------------------------


def test_over_the_batch_sums_become_deviations(scene_of):
    found = sums(Weighted(given, 3.0, "given", normaliser=Normaliser("batch")), scene_of(1, 3, 5))
    assert found == pytest.approx([-6 / (2 + EPS), 0, 6 / (2 + EPS)], abs=1e-6)  # mean 3, deviation 2


def test_over_the_group_each_prompt_has_its_own_mean(scene_of):
    scene = scene_of(1, 10, 3, 30, 7, groups=[4, 9, 4, 9, 5])
    found = sums(Weighted(given, 1.0, "given", normaliser=Normaliser("group")), scene)
    root = math.sqrt(2)
    small, large = 1 / (root + EPS), 10 / (10 * root + EPS)
    assert found == pytest.approx(
        [-small, -large, small, large, 0], abs=1e-6
    )  # alone, there is nothing to compare with


def test_tokens_are_divided_and_the_mean_is_taken_off_at_the_end(make_episode, make_scene):
    scene = make_scene(make_episode([1, 2, 1]), make_episode([2]))  # sums 4 and 2: mean 3, deviation sqrt(2)
    part = Weighted(ids, 1.0, "ids", normaliser=Normaliser("batch"))
    unit = math.sqrt(2) + EPS
    expected = [[1 / unit, 2 / unit, (1 - 3) / unit], [(2 - 3) / unit, 0, 0]]
    assert torch.allclose(score([part], scene).total[:, 2:], torch.tensor(expected).double())


@pytest.mark.parametrize("over", ["batch", "task", "group", "running"])
def test_a_part_without_spread_is_0_and_does_not_blow_up(make_episode, make_scene, over):
    scene = make_scene(make_episode([8, 1]), make_episode([1, 8]), make_episode([3, 3, 3]))
    part = Weighted(ids, 1.0, "ids", normaliser=Normaliser(over))
    assert not score([part], scene).total.any()
    tenths = token_reward(lambda sample: [token / 10 for token in sample.tokens])
    scene = make_scene(make_episode([1, 2]), make_episode([3]), make_episode([2, 1]))  # 0.3, but for rounding
    assert not score([Weighted(tenths, 1.0, "tenths", normaliser=Normaliser(over))], scene).total.any()


def test_running_statistics_are_those_of_all_episodes_so_far(scene_of):
    part = Weighted(given, 1.0, "given", normaliser=Normaliser("running"))
    sums(part, scene_of(1, 3))
    found = sums(part, scene_of(5, 7))  # 1 3 5 7: mean 4, deviation sqrt(20 / 3)
    unit = math.sqrt(20 / 3) + EPS
    assert found == pytest.approx([1 / unit, 3 / unit], abs=1e-6)
    assert part.normaliser.get_state() == {"count": 4, "mean": 4.0, "squares": 20.0}


def test_running_statistics_go_on_where_they_were_saved(scene_of):
    whole, before, after = (Weighted(given, 1.0, "g", normaliser=Normaliser("running")) for _ in range(3))
    sums(whole, scene_of(1, 3))
    sums(before, scene_of(1, 3))
    after.normaliser.set_state(before.normaliser.get_state())
    assert sums(after, scene_of(5, 9)) == sums(whole, scene_of(5, 9))


@pytest.mark.parametrize("over", ["batch", "task", "group", "running"])
def test_order_of_rows_does_not_matter(scene_of, over):
    numbers, groups = [1.0, 4.0, "?", 2.5, 8.0, 3.0], [0, 1, 0, 1, 0, 1]
    part = lambda: Weighted(given, 1.0, "given", normaliser=Normaliser(over))  # noqa: E731
    straight = sums(part(), scene_of(*numbers, groups=groups))
    turned = sums(part(), scene_of(*numbers[::-1], groups=groups[::-1]))
    assert straight == pytest.approx(turned[::-1], abs=1e-6)


def test_trap_22_a_part_is_normalised_before_the_others_are_added(scene_of):
    """A penalty beside it, of whatever size, is not in its mean and deviation."""
    scene = scene_of(1, 3, 8)
    penalty = Weighted(lambda scene: -100.0 * scene.batch.action_mask.double().cumsum(1), 1.0, "penalty")
    alone, beside = (
        score([Weighted(given, 1.0, "given", normaliser=Normaliser("batch")), *others], scene)
        for others in ([], [penalty])
    )
    assert torch.equal(alone.parts["given"], beside.parts["given"])
    assert torch.equal(beside.total, alone.total + beside.parts["penalty"])


def test_clipped_first_then_normalised_then_weighed(scene_of):
    part = Weighted(given, 2.0, "given", clip=(-5.0, 5.0), normaliser=Normaliser("batch"))
    found = sums(part, scene_of(1, 3, 500))
    assert found == pytest.approx([-4 / (2 + EPS), 0, 4 / (2 + EPS)], abs=1e-6)


def test_held_out_texts_are_measured_by_a_yardstick_that_does_not_move(scene_of):
    part = Weighted(given, Schedule(((0, 0.0), (9, 2.0))), "given", clip=(0.0, 4.0), normaliser=Normaliser("running"))
    assert sums(part.fixed(), scene_of(1, 3, 9)) == [2, 6, 8]
    assert part.normaliser.count == 0


# ---- several tasks ---------------------------------------------------------------------------------------------


@pytest.fixture
def scene_of_tasks(scene_of):
    """A scene whose rows have these tasks and numbers as answers."""

    def make(*rows, groups=None):
        scene = scene_of(*(answer for _, answer in rows), groups=groups)
        episodes = [
            replace(episode, item=replace(episode.item, task=task))
            for episode, (task, _) in zip(scene.episodes, rows, strict=True)
        ]
        return replace(scene, episodes=episodes)

    return make


def test_over_the_task_each_has_its_own_mean_and_deviation(scene_of_tasks):
    """Rewards of 1 to 3 and of 100 to 500 count alike; a task with one episode has nothing to compare."""
    rows = [("a", 1), ("b", 100), ("a", 3), ("b", 500), ("b", 300), ("c", 7)]
    found = sums(Weighted(given, 1.0, "given", normaliser=Normaliser("task")), scene_of_tasks(*rows))
    root = math.sqrt(2)
    assert found == pytest.approx([-1 / (root + EPS), -1, 1 / (root + EPS), 1, 0, 0], abs=1e-5)


def test_a_part_is_asked_about_its_tasks_alone_and_abstains_elsewhere(scene_of_tasks):
    asked = []

    @episode_reward
    def nosy(sample):
        asked.append(sample.item.task)
        return NO_OPINION if sample.reference == "?" else float(sample.reference)

    part = Weighted(nosy, 2.0, "nosy", tasks=("a", "c"), clip=(-9.0, 9.0))
    rewards = score([part], scene_of_tasks(("a", 1), ("b", 50), ("c", 3), ("a", "?"), ("b", 7)))
    assert asked == ["a", "c", "a"]
    assert rewards.total.sum(1).tolist() == [2, 0, 6, 0, 0]
    assert rewards.abstained["nosy"].tolist() == [False, True, False, True, True]
    assert rewards.figures["raw/nosy"] == 2.0  # of those that it speaks about
    nothing = score([part], scene_of_tasks(("b", 1), ("d", 2)))
    assert not nothing.total.any()
    assert nothing.abstained["nosy"].all()
    assert len(asked) == 3


def test_a_part_that_sees_the_whole_scene_sees_that_of_its_tasks(scene_of_tasks):
    """Deviations over the batch are those over the rows of its tasks, and failures are told by the row."""

    def whole(scene):
        values = torch.tensor([[float(episode.item.answer)] for episode in scene.episodes]).double()
        return torch.where(
            scene.batch.action_mask & (scene.batch.action_mask.cumsum(1) == 1), values / values.max(), 0.0
        )

    rows = [("b", 99), ("a", 1), ("b", 98), ("a", 4)]
    assert sums(Weighted(whole, 1.0, "whole", tasks=("a",)), scene_of_tasks(*rows)) == [0, 0.25, 0, 1]

    @episode_reward
    def broken(sample):
        return 1.0 / (float(sample.reference) - 4.0)

    rewards = score([Weighted(broken, 1.0, "broken", tasks=("a",), max_failed_share=0.5)], scene_of_tasks(*rows))
    assert list(rewards.failures["broken"]) == [3]
    assert rewards.abstained["broken"].tolist() == [True, False, True, True]


def test_what_a_row_earns_is_told_in_units_that_stay(scene_of_tasks):
    """Before clipping and normalising, by the weight that a schedule ends with."""
    late = Weighted(given, Schedule(((5, 0.0), (9, 2.0))), "late", clip=(0.0, 4.0), normaliser=Normaliser("task"))
    rows = [("a", 1), ("a", 3), ("b", 9)]
    rewards = score([late, Weighted(given, 1.0, "given", tasks=("b",))], scene_of_tasks(*rows))
    assert rewards.earned.tolist() == [2, 6, 27]


# ---- abstaining ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["batch", "group", "running"])
def test_trap_29_who_abstains_takes_no_part_in_the_statistics(scene_of, over):
    part = Weighted(given, 1.0, "given", normaliser=Normaliser(over))
    rewards = score([part], scene_of(1, "?", 3, "?", 5))
    expected = torch.tensor([-1.0, 0, 0, 0, 1]).double() * 2 / (2 + EPS)
    assert torch.allclose(rewards.total.sum(1), expected)
    assert rewards.figures["abstained/given"] == 2 / 5
    assert rewards.abstained["given"].tolist() == [False, True, False, True, False]


class Undecided(SampleReward):
    def token_values(self, sample):
        return NO_OPINION


def trl(prompts, completions, **columns):
    return [None for _ in completions]


def raw(scene):
    return Opinions(torch.zeros(scene.batch.tokens.shape), torch.ones(len(scene.episodes)).bool())


@pytest.mark.parametrize(
    "reward",
    [
        given,
        span_reward(lambda sample: NO_OPINION),
        token_reward(lambda sample: NO_OPINION),
        Undecided(),
        CompletionsReward(trl),
        raw,
    ],
    ids=["episode", "span", "token", "class", "trl", "raw"],
)
def test_every_kind_of_reward_can_abstain(scene_of, reward):
    rewards = score([Weighted(reward, 1.0, "r")], scene_of("?"))
    assert rewards.abstained["r"].tolist() == [True]
    assert not rewards.total.any()


def test_a_forgotten_return_is_an_error_and_no_abstention(scene_of):
    with pytest.raises(RewardError, match=r"item 'item-0'.*NO_OPINION"):
        score([Weighted(episode_reward(lambda sample: None), 1.0, "r")], scene_of(1))


def test_to_abstain_and_to_pay_is_a_contradiction(scene_of):
    def both(scene):
        return Opinions(torch.ones(scene.batch.tokens.shape), torch.ones(len(scene.episodes)).bool())

    with pytest.raises(RewardError, match=r"'both': abstains.*'item-0'"):
        score([Weighted(both, 1.0, "both")], scene_of(1))


def advantages(credit, scene, *parts):
    empty = torch.zeros_like(scene.batch.sample_logprobs)
    credit = assign(credit, score(parts, scene), scene.batch, PolicyOutput(empty, empty))
    first = scene.batch.action_mask.int().argmax(1, keepdim=True)
    return credit.advantages.gather(1, first)[:, 0].tolist()


GIVEN = Weighted(given, 1.0, "given")
NUMBER = Weighted(episode_reward(lambda sample: float(sample.item.id.removeprefix("item-"))), 1.0, "number")


@pytest.mark.parametrize("credit", [LeaveOneOut(), LeaveOneOutProcess()], ids=lambda credit: credit.type)
def test_trap_29_who_abstains_is_no_baseline_of_the_part(scene_of, credit):
    found = advantages(credit, scene_of(1, "?", 5), GIVEN)
    assert found == [1 - 5, 0, 5 - 1]
    # beside a part on all rows (0, 1, 2: advantages -1.5, 0, 1.5)
    assert advantages(credit, scene_of(1, "?", 5), GIVEN, NUMBER) == [-5.5, 0, 5.5]


def test_where_all_abstain_or_none_does_the_other_parts_are_untouched(scene_of):
    alone = advantages(LeaveOneOut(), scene_of(1, 1, 1), NUMBER)
    assert advantages(LeaveOneOut(), scene_of("?", "?", "?"), GIVEN, NUMBER) == alone == [-1.5, 0, 1.5]


def test_group_relative_without_those_who_abstain(scene_of):
    plain = GroupRelative(scale_by_std=False)
    assert advantages(plain, scene_of(1, "?", 5), GIVEN) == [-2, 0, 2]
    scaled = advantages(GroupRelative(scale_by_std=True), scene_of(1, "?", 5), GIVEN)
    assert scaled == pytest.approx([-2 / (2 + EPS), 0, 2 / (2 + EPS)])


@pytest.mark.parametrize("more", [{"weight": 2.0}, {"weight": [[0, 1.0]]}, {"normalise": "batch"}])
def test_a_constraint_leaves_no_room_for_a_weight(more):
    entry = {"name": "rouge_l", "constraint": {"least": 0.2, "rate": 0.5, "start": 1.5}}
    assert RewardConfig.model_validate(entry).constraint.least == 0.2
    (part,) = build_rewards([RewardConfig.model_validate(entry)])
    assert part.weight_at(1) == 1.5
    with pytest.raises(ValueError, match="a constraint finds the weight"):
        RewardConfig.model_validate(entry | more)


def test_the_configuration_names_all_of_it():
    entry = {"name": "rouge_l", "weight": [[0, 0.5], [10, 1]], "clip": [-1, 1], "normalise": "running"}
    config = RunConfig.model_validate({"rewards": [entry]})
    (part,) = build_rewards(config.rewards)
    assert (part.weight_at(5), part.clip, part.normaliser.over) == (0.75, (-1.0, 1.0), "running")
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_parts_are_credited_by_themselves_and_added_by_weight(scene_of):
    """Totals 1 and 5: mean 3, deviation sqrt(8); ids 0 and 1: deviation sqrt(1 / 2)."""
    parts = [Weighted(given, -3.0, "given"), Weighted(NUMBER.reward, 0.5, "number"), Weighted(ids, 0.0, "off")]
    credit = PerPart(by="episode", normalize="none", parts={"number": {"by": "token", "scale": "none"}})
    expected = -3 * 2 / (math.sqrt(8) + EPS) + 0.5 * 1
    assert advantages(credit, scene_of(1, 5), *parts) == pytest.approx([-expected, expected])


def test_credit_of_a_part_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"credit\.parts\.rouge: no reward has that name; there are rouge_l"):
        RunConfig.model_validate({"credit": {"type": "per_part", "parts": {"rouge": {}}}})
