"""Several tasks as one: shares, counts, the items of each step, and shares that follow what is learnt."""

import json
import math
from collections import Counter

import pytest

from pertoken.errors import TaskError
from pertoken.tasks.base import ItemTask
from pertoken.tasks.course import Course, Limit, Pool
from pertoken.tasks.mixture import LearningProgress, counts_of, evenly, mixed, offset_of, shares_of
from pertoken.types import Item


def items(count, prefix="", split=""):
    return [Item(f"{k}", f"{prefix}{split} {k}", "yes") for k in range(count)]


def two(**sizes):
    sizes = sizes or {"a": 7, "b": 5}
    return {
        name: Pool(tuple(Item(f"{name}/{k}", f"{name} {k}", task=name) for k in range(n))) for name, n in sizes.items()
    }


def test_shares_go_by_weight_and_by_a_root_of_the_size():
    weights, sizes = {"a": 1.0, "b": 3.0}, {"a": 90, "b": 10}
    assert shares_of(weights, sizes, None) == {"a": 0.25, "b": 0.75}
    assert shares_of(weights, sizes, 1.0) == {"a": 0.75, "b": 0.25}  # 90 to 30
    even = shares_of({"a": 1.0, "b": 1.0}, sizes, 1e9)
    assert even["a"] == pytest.approx(0.5)
    assert shares_of({"a": 1.0, "b": 1.0}, sizes, 2.0)["a"] == pytest.approx(0.75)  # sqrt(90) to sqrt(10): 3 to 1


def test_counts_are_shares_rounded_and_right_on_average():
    shares = {"a": 0.55, "b": 0.3, "c": 0.15}
    total = Counter()
    for k in range(1000):
        counts = counts_of(shares, 4, (k + 0.5) / 1000)
        assert sum(counts.values()) == 4
        assert all(math.floor(4 * shares[n]) <= count <= math.ceil(4 * shares[n]) for n, count in counts.items())
        total.update(counts)
    assert {name: count / 4000 for name, count in total.items()} == pytest.approx(shares, abs=1e-3)


def test_offsets_are_uniform_and_depend_on_seed_and_step_alone():
    drawn = [offset_of(3, step) for step in range(1, 401)]
    assert drawn == [offset_of(3, step) for step in range(1, 401)] != [offset_of(4, step) for step in range(1, 401)]
    assert min(drawn) >= 0
    assert max(drawn) < 1
    assert abs(sum(drawn) / 400 - 0.5) < 0.05


def test_equal_ids_of_two_tasks_stay_apart_and_an_item_knows_its_task():
    task = mixed({name: ItemTask(name, {"train": items(3, name), "test": items(1, name, "t")}) for name in "ab"})
    assert [item.id for item in task.items("train")] == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    assert [item.task for item in task.items("test")] == ["a", "b"]
    assert task.items("train")[4].prompt == "b 1"


def test_what_one_task_holds_out_no_other_may_train_on():
    same = [Item("0", "the same")]
    with pytest.raises(TaskError, match=r"1 prompts are in two splits, b/0 \(train and test\)"):
        mixed({"a": ItemTask("a", {"train": same}), "b": ItemTask("b", {"test": same})})


def test_held_out_items_are_taken_evenly_and_small_tasks_leave_room():
    pool = [item for pool in two(a=5, b=1, c=3).values() for item in pool.items]
    assert Counter(item.task for item in evenly(pool, 6)) == {"a": 3, "b": 1, "c": 2}
    assert [item.id for item in evenly(pool, 3)] == ["a/0", "b/0", "c/0"]
    plain = items(9)
    assert evenly(plain, 4) == plain[:4]
    assert evenly(plain, 99) == plain


def test_each_pool_is_gone_through_in_passes():
    """Over 12 steps of 4, a quarter of them of `a`: its 12 prompts are one pass over its 6 items, and another."""
    pools = two(a=6, b=9)
    course = Course(pools, {"a": 0.25, "b": 0.75}, size=4, seed=0)
    steps = [course.items(step) for step in range(1, 13)]
    seen = [item.id for step in steps for item in step if item.task == "a"]
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(item.id for item in pools["a"].items)
    assert seen[:6] != seen[6:]
    assert all(len({item.id for item in step}) == 4 for step in steps)


def test_across_the_end_of_a_pass_no_item_is_taken_twice():
    pool = Pool(items(5))
    for place in range(25):
        found, end = pool.take(1, place, 4, seed=1)
        assert len({item.id for item in found}) == 4
        assert end >= place + 4


def test_a_step_is_a_function_of_seed_step_and_state():
    """Asked for once or twice, ahead or not, in one process or after another: the same items."""

    def course():
        return Course(two(), {"a": 0.6, "b": 0.4}, size=3, seed=5)

    whole = course()
    expected = [whole.items(step) for step in range(1, 9)]
    parts, found = course(), []
    for step in range(1, 9):
        found.append(parts.items(step))
        ahead = parts.items(step + 1) if step % 2 else None
        assert parts.items(step) == found[-1]
        assert parts.items(1) == expected[0]
        again = course()
        again.set_state(json.loads(json.dumps(parts.get_state())))
        parts = again
        assert ahead is None or parts.items(step + 1) == ahead
    assert found == expected
    assert [item.id for item in expected[0]] != [item.id for item in Course(two(), whole.base, size=3, seed=6).items(1)]


def test_other_items_in_their_place_are_of_the_same_tasks():
    course = Course(two(a=40, b=40), {"a": 0.5, "b": 0.5}, size=8, seed=0)
    first, other = course.items(1), course.items(1, again=1)
    assert [item.task for item in first] == [item.task for item in other]
    assert first != other


def test_a_step_that_is_long_past_is_refused():
    course = Course(two(), {"a": 0.5, "b": 0.5}, size=2, seed=0)
    for step in (1, 2, 3, 4):
        course.items(step)
    with pytest.raises(ValueError, match="step 2 cannot be planned"):
        course.items(2)


def test_other_tasks_and_sizes_after_a_resume_begin_anew_and_go_on():
    before = Course(two(), {"a": 0.5, "b": 0.5}, size=4, seed=0)
    before.items(1), before.items(2)
    after = Course(two(b=5, c=8), {"b": 0.5, "c": 0.5}, size=6, seed=0)
    after.set_state(before.get_state())
    found = after.items(2)  # drawn ahead by the old settings, planned anew by the new ones
    assert Counter(item.task for item in found) == {"b": 3, "c": 3}
    assert found[0] not in before.items(1)


@pytest.mark.parametrize(
    ("size", "progress", "needed"), [(8, None, "4 distinct items of task b, 50% of 8"), (5, True, "5 distinct items")]
)
def test_a_task_with_too_few_items_is_refused(size, progress, needed):
    progress = progress and LearningProgress(smoothing=0.1, temperature=0.1, explore=0.2)
    with pytest.raises(TaskError, match=needed):
        Course(two(a=20, b=3), {"a": 0.5, "b": 0.5}, size=size, seed=0, progress=progress)


def test_progress_is_the_smoothed_change_in_deviations():
    """Means 1, 3, 4 and variances 1, 3, 2 with smoothing 1/2."""
    progress = LearningProgress(smoothing=0.5, temperature=0.1, explore=0.2)
    progress.observe({"a": [0.0, 2.0]})
    assert progress.change("a") == progress.change("never seen") == 0.0
    progress.observe({"a": [3.0 - 3**0.5, 3.0 + 3**0.5]})  # variance (1 + 3) / 2 = 2: up by 2 / sqrt 2
    assert progress.change("a") == pytest.approx(0.5 * 2 / 2**0.5)
    progress.observe({"b": [7.0, 7.0]})
    progress.observe({"a": [4.0 - 2**0.5, 4.0 + 2**0.5], "b": [7.0, 7.0]})  # variance 2 again: up by 1 / sqrt 2
    assert progress.change("a") == pytest.approx(0.5 * 1 / 2**0.5 + 0.25 * 2 / 2**0.5)
    assert progress.change("b") == 0.0


def test_progress_does_not_depend_on_the_scale_of_a_reward():
    changes = []
    for scale in (1.0, 100.0):
        progress = LearningProgress(smoothing=0.1, temperature=0.1, explore=0.2)
        for values in ([1.0, 2.0], [2.0, 4.0], [5.0, 4.0]):
            progress.observe({"a": [scale * value for value in values]})
        changes.append(progress.change("a"))
    assert changes[0] == pytest.approx(changes[1]) != 0.0


def test_what_changes_gets_more_prompts_whichever_way_it_changes():
    """Changes of +0.2 and -0.2, and none, at temperature 0.2: e to e to 1, mixed with a fifth of the base."""
    progress = LearningProgress(smoothing=0.1, temperature=0.2, explore=0.2)
    base = {"up": 1 / 3, "down": 1 / 3, "still": 1 / 3}
    assert progress.shares(base) == pytest.approx(base)
    progress.set_state({"up": [0.0, 1.0, 0.2], "down": [0.0, 1.0, -0.2], "still": [0.0, 1.0, 0.0]})
    shares = progress.shares(base)
    assert shares["up"] == shares["down"] == pytest.approx(0.8 * math.e / (2 * math.e + 1) + 0.2 / 3)
    assert sum(shares.values()) == pytest.approx(1.0)
    progress.set_state({"up": [0.0, 1.0, 1e6], "still": [0.0, 1.0, 0.0]})
    assert progress.shares(base) == pytest.approx(
        {"up": progress.largest(base, "up"), "down": 0.2 / 3, "still": 0.2 / 3}
    )


def test_shares_follow_from_the_next_planned_step_on_and_after_a_resume():
    def course():
        progress = LearningProgress(smoothing=1.0, temperature=0.01, explore=0.1)
        return Course(two(a=40, b=40), {"a": 0.5, "b": 0.5}, size=10, seed=0, progress=progress)

    whole = course()
    assert whole.figures(1)["task_share/a"] == 0.5
    whole.observe({"a": [0.0, 1.0], "b": [0.0, 1.0]})
    whole.items(2)  # drawn ahead: what comes now does not move it
    whole.observe({"a": [0.0, 1.0], "b": [0.5, 1.5]})
    assert whole.figures(2)["task_share/b"] == 0.5
    assert whole.figures(2)["task_change/b"] == pytest.approx(1.0)
    resumed = course()
    resumed.set_state(json.loads(json.dumps(whole.get_state())))
    assert resumed.items(2) == whole.items(2)
    assert resumed.items(3) == whole.items(3)
    assert whole.figures(3)["task_share/b"] >= 0.9


def test_items_come_in_over_steps_and_those_that_wait_come_later():
    """Items of 1 to 8; 4 are let in first, one more with every second step. All are seen once before one is twice as
    often as what came in last."""
    pool = Pool(items(8), [Limit("size", [float(k) for k in range(1, 9)], lambda step: 4 + (step - 1) / 2)])
    course = Course({"": pool}, {"": 1.0}, size=2, seed=0)
    seen = []
    for step in range(1, 20):
        taken = [int(item.id) + 1 for item in course.items(step)]
        assert len(set(taken)) == 2
        assert max(taken) <= course.figures(step)["curriculum/size"] == 4 + (step - 1) / 2
        seen += taken
    assert set(seen) == set(range(1, 9))
    assert course.figures(1)["curriculum/items"] == 0.5
    assert course.figures(9)["curriculum/items"] == 1.0
    assert "task_share/" not in course.figures(1)


def test_two_limits_hold_at_once_and_a_curriculum_that_begins_with_too_little_is_refused():
    numbers = [float(k) for k in range(8)]
    odd, size = Limit("odd", [k % 2 for k in numbers], lambda step: 0.0), Limit("size", numbers, lambda step: 4.0)
    found, _ = Pool(items(8), [odd, size]).take(1, 0, 3, seed=0)
    assert {item.id for item in found} == {"0", "2", "4"}
    with pytest.raises(TaskError, match=r"only 3 of its 8 training items.* let its curriculum begin with more"):
        Course({"": Pool(items(8), [odd, size])}, {"": 1.0}, size=4, seed=0)
