"""Templates, splits, the order of visits and the check of a task."""

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import TaskError
from pertoken.tasks.base import (
    SPLITS,
    ItemTask,
    LengthWindows,
    PromptTemplate,
    Task,
    batch_of,
    check_task,
    sample_order,
    split_by,
)
from pertoken.types import Item


def items_named(*names: str) -> list[Item]:
    return [Item(name, f"prompt of {name}", f"answer of {name}") for name in names]


# --- templates ---


@given(st.text(), st.text())
def test_a_template_puts_the_cell_in_its_place_whatever_either_holds(around: str, cell: str):
    literal = around.replace("{", "{{").replace("}", "}}")
    rendered = PromptTemplate(f"{literal}{{body}}{literal}").render({"body": cell})
    assert rendered == f"{around}{cell}{around}"


def test_a_cell_with_braces_is_not_rendered_again():
    assert PromptTemplate("{a} {b}").render({"a": "{b}", "b": "{{x}}"}) == "{b} {{x}}"


def test_braces_double_to_mean_themselves_also_around_a_place():
    assert PromptTemplate("{{{a}}} {{}} {{a}}").render({"a": "x"}) == "{x} {} {a}"


def test_columns_may_be_named_in_any_way_and_are_listed_once_in_order():
    template = PromptTemplate("{a b} {größe} {a b} {x.y}")
    assert template.columns == ("a b", "größe", "x.y")
    assert template.render({"a b": "1", "größe": "2", "x.y": "3"}) == "1 2 1 3"


def test_chat_templates_render_each_content_and_leave_roles_alone():
    template = PromptTemplate([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sum up {t}"}])
    assert template.columns == ("t",)
    assert template.render({"t": "{role}"}) == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum up {role}"},
    )


def test_an_unknown_column_is_named_with_the_closest_one():
    with pytest.raises(TaskError, match=r"'boddy'.*did you mean 'body'"):
        PromptTemplate("{boddy}").render({"body": "x", "title": "y"})


@pytest.mark.parametrize("template", ["{", "}", "a {b", "{}", "b} c", "{a{b}}"])
def test_a_lone_brace_is_refused_when_the_template_is_made(template: str):
    with pytest.raises(TaskError, match=r"lone .* double the brace"):
        PromptTemplate(template)


def test_formats_and_indices_are_columns_that_are_not_there():
    with pytest.raises(TaskError, match=r"'body\[:400\]'.*did you mean 'body'"):
        PromptTemplate("{body[:400]}").render({"body": "x"})


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": "x", "name": "y"}]])
def test_messages_have_a_role_and_a_content(messages: list[dict[str, str]]):
    with pytest.raises(TaskError, match="role and"):
        PromptTemplate(messages)


# --- splits ---


def test_the_split_is_the_place_of_the_sha256_in_the_fractions():
    place = int(hashlib.sha256(b"7/json").hexdigest()[:16], 16) / 2**64
    below, above = place - 1e-9, place + 1e-9
    assert split_by("json", (above, 1 - above, 0.0), seed=7) == "train"
    assert split_by("json", (below, 1 - below, 0.0), seed=7) == "validation"
    assert split_by("json", (0.0, below, 1 - below), seed=7) == "test"


@given(st.lists(st.text(), unique=True, max_size=30), st.integers(0, 5))
def test_other_keys_do_not_move_a_key(keys: list[str], seed: int):
    alone = {key: split_by(key, seed=seed) for key in keys}
    assert alone == {key: split_by(key, seed=seed) for key in reversed(keys)}


def test_shares_come_out_as_asked_and_the_seed_changes_who_is_where():
    counts = Counter(split_by(f"key {k}") for k in range(4000))
    assert [round(counts[split] / 4000, 1) for split in SPLITS] == [0.8, 0.1, 0.1]
    assert [split_by(f"key {k}", seed=1) for k in range(50)] != [split_by(f"key {k}", seed=2) for k in range(50)]


@pytest.mark.parametrize("fractions", [(0.8, 0.1), (0.9, 0.2, 0.1), (1.2, -0.1, -0.1), (float("nan"), 0.5, 0.5)])
def test_fractions_that_are_no_shares_are_refused(fractions: tuple[float, ...]):
    with pytest.raises(TaskError, match="sum to 1"):
        split_by("x", fractions)


# --- the order of visits ---


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3))
def test_a_batch_has_distinct_items_and_a_pass_repeats_none(num_items: int, size: int, seed: int):
    items = items_named(*map(str, range(num_items)))
    if size > num_items:
        with pytest.raises(TaskError, match=f"only {num_items} training items"):
            batch_of(items, 0, size, seed)
        return
    steps = num_items // size
    first_pass = [item.id for step in range(steps) for item in batch_of(items, step, size, seed)]
    assert len(set(first_pass)) == steps * size


def test_step_k_sees_the_same_items_in_any_run():
    items = items_named(*"abcdefghijk")
    late_first = [batch_of(items, step, 4, seed=3) for step in (9, 2, 5)]
    assert [batch_of(items, step, 4, seed=3) for step in (9, 2, 5)] == late_first
    assert batch_of(items, 9, 4, seed=3) != batch_of(items, 9, 4, seed=4)


def test_each_pass_has_its_own_order_so_the_leftover_changes():
    items = items_named(*"abcdefgh")
    leftovers = {frozenset("abcdefgh") - {i.id for i in batch_of(items, step, 7, seed=0)} for step in range(40)}
    assert len(leftovers) == 8  # every item is left out now and then, and none for ever


def test_like_lengths_by_hand():
    """Two windows of two batches of two; the second batch of a window comes first or last."""
    found = LengthWindows([9, 1, 5, 1, 7, 8, 2, 2], window=2).sort([0, 1, 2, 3, 4, 5, 6, 7], 2, seed=0, epoch=0)
    windows = [found[:4], found[4:]]
    assert sorted([windows[0][:2], windows[0][2:]]) == [[1, 3], [2, 0]]
    assert sorted([windows[1][:2], windows[1][2:]]) == [[4, 5], [6, 7]]


@given(st.lists(st.integers(1, 9), min_size=8, max_size=24), st.integers(1, 4), st.integers(2, 4), st.integers(0, 3))
def test_windows_keep_their_items_and_batches_their_lengths(lengths, size, window, seed):
    items, alike = items_named(*map(str, range(len(lengths)))), LengthWindows(lengths, window)
    steps = len(items) // size
    for begin in range(steps, 2 * steps, window):  # the second pass
        place = range(begin, min(begin + window, 2 * steps))
        plain = [int(item.id) for step in place for item in batch_of(items, step, size, seed)]
        batches = [[int(item.id) for item in batch_of(items, step, size, seed, alike)] for step in reversed(place)]
        assert sorted(k for batch in batches for k in batch) == sorted(plain)
        by_length = sorted(batches, key=lambda batch: [lengths[k] for k in batch])
        assert [lengths[k] for batch in by_length for k in batch] == sorted(lengths[k] for k in plain)


def test_lengths_neither_rise_nor_fall_over_steps():
    items, alike = items_named(*map(str, range(400))), LengthWindows(list(range(400)), 10)
    firsts = [max(int(item.id) for item in batch_of(items, 10 * k, 4, 0, alike)) for k in range(10)]
    assert min(firsts) < 200 < max(firsts)


def test_an_order_is_a_permutation_that_depends_on_seed_and_epoch():
    assert sorted(sample_order(50, 1, 2)) == list(range(50))
    assert len({tuple(sample_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


# --- the check ---


def test_a_sound_task_passes():
    task = ItemTask("sound", {"train": items_named("a", "b"), "test": items_named("c")})
    assert isinstance(task, Task)
    check_task(task)


def test_everything_wrong_is_listed_at_once():
    train = [*items_named("a", "b", "a"), Item("c", "", "x"), Item("d", "d", None)]
    task = ItemTask("broken", {"train": train, "test": [Item("z", "prompt of b", "x")]})
    with pytest.raises(TaskError) as error:
        check_task(task)
    for part in (
        "task broken",
        "1 ids occur more than once: a",
        "1 prompts occur in two splits: z (train and test)",
        "1 items have no prompt: c",
        "1 items have no answer: d",
    ):
        assert part in str(error.value)


def test_a_task_without_train_or_without_held_out_items_is_named():
    with pytest.raises(TaskError, match="train split is empty"):
        check_task(ItemTask("t", {"test": items_named("a")}))
    with pytest.raises(TaskError, match="nothing is held out"):
        check_task(ItemTask("t", {"train": items_named("a")}))


def test_answers_may_be_absent_where_none_are_claimed():
    task = ItemTask("open", {"train": [Item("a", "x")], "test": [Item("b", "y")]})
    check_task(task, answers=False)
    with pytest.raises(TaskError, match="2 items have no answer: a, b"):
        check_task(task)


def test_a_split_that_a_task_does_not_have_is_empty_and_an_unknown_one_is_refused():
    task = ItemTask("t", {"train": items_named("a")})
    assert task.items("validation") == ()
    with pytest.raises(TaskError, match="did you mean 'validation'"):
        task.items("validations")
