"""Pairs of items that say nearly the same are found, all of them, and leaks are told from repetitions."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken.errors import TaskError
from pertoken.tasks.duplicates import _pieces, alike, alike_items
from pertoken.types import Item


def by_every_pair(texts, least):
    sets = [_pieces(text) for text in texts]
    pairs = ((i, j, len(sets[i] & sets[j]) / len(sets[i] | sets[j])) for j in range(len(sets)) for i in range(j))
    return {(i, j, similarity) for i, j, similarity in pairs if similarity >= least}


@given(st.lists(st.text("ab c", max_size=14), max_size=12), st.sampled_from([0.2, 0.5, 0.8, 1.0]))
def test_no_pair_is_missed(texts, least):
    assert set(alike(texts, least=least)) == by_every_pair(texts, least)


def test_similarity_by_hand():
    """abcdefgh has the pieces abcde bcdef cdefg defgh; abcdefgx has cdefg and three others: 3 shared of 5."""
    assert list(alike(["abcdefgh", "abcdefgx"], least=0.5)) == [(0, 1, 0.6)]


def test_planted_copies_are_found_among_many_and_nothing_else():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=40)) for _ in range(300)]
    train = [Item(f"t{k}", text) for k, text in enumerate(texts[:250])]
    held_out = [Item(f"h{k}", text) for k, text in enumerate(texts[250:])]
    held_out[7] = Item("h7", train[3].prompt.upper() + "!")
    held_out[9] = Item("h9", train[5].prompt.replace(train[5].prompt.split()[10], "entirely", 1))
    train[20] = Item("t20", (({"role": "user", "content": train[21].prompt}),))
    found = alike_items({"train": train, "test": held_out})
    assert [(pair.first.id, pair.second.id, pair.leaks) for pair in found] == [
        ("t3", "h7", True), ("t5", "h9", True), ("t20", "t21", False),
    ]  # fmt: skip
    assert found[0].similarity == 1 > found[1].similarity > 0.8


@pytest.mark.parametrize("least", [0.0, -1.0, 1.1])
def test_a_similarity_that_is_none(least):
    with pytest.raises(TaskError, match="least"):
        list(alike(["a"], least=least))


def test_the_data_command_tells_of_sizes_classes_and_leaks(pertoken, tmp_path):
    rows = [f'{{"q": "is number {k} an even one or not", "a": "{"yes" if k % 2 == 0 else "no"}"}}' for k in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:30]) + "\n")
    (tmp_path / "test.jsonl").write_text("\n".join(rows[30:]).replace("is number 33", "Is  number 3!") + "\n")
    arguments = ["data", f"task.path={tmp_path}", "task.prompt='{q}'", "task.answer=a"]
    code, output, _ = pertoken(*arguments, "--alike", "1")
    assert code == 1
    assert "100% alike (a leak): train-4 (train) and test-4 (test)" in output
    assert "train: 'yes' 50%, 'no' 50%" in output
    assert "1 pairs alike, 1 of them across train and what is held out" in output
    assert "more" not in output
    output = pertoken(*arguments, "--alike", "0.4", "--shown", "2")[1]
    total = int(output.splitlines()[-1].split()[0])
    assert total > 2
    assert output.count("% alike") == 2
    assert f"... and {total - 2} more: --shown {total} shows all" in output
    (tmp_path / "test.jsonl").write_text('{"q": "something else altogether", "a": "yes"}\n')
    assert pertoken(*arguments, "--alike", "1")[0] == 0
