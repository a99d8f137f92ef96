"""Ragged to padded and back, and parts that add up to the whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pertoken.batching import optimizer_steps, to_batch
from pertoken.sampling import Controls, Sampling
from pertoken.testing import episode
from pertoken.types import Credit, PolicyOutput


def rows(num=12, group_size=3):
    return [
        episode(
            [1] * (2 + k % 3), [2] * (1 + k % 5), id=str(k), group=k // group_size, stop="eos" if k % 2 else "length"
        )
        for k in range(num)
    ]


def steps_of(batch, tokens=5, **settings):
    """The parts of each optimiser step."""
    values = PolicyOutput(batch.sample_logprobs, batch.sample_logprobs)
    settings = {"epochs": 1, "num_minibatches": 1, "seed": 0} | settings
    cuts = optimizer_steps(batch, values, None, Credit(batch.sample_logprobs), **settings)
    return [list(cut(tokens)) for cut in cuts]


def parts_of(batch, tokens=5, **settings):
    return [part for step in steps_of(batch, tokens, **settings) for part in step]


def test_masks_come_from_lengths():
    batch = to_batch(rows(), Controls())
    assert batch.attention_mask.sum(1).tolist() == [2 + k % 3 + 1 + k % 5 for k in range(12)]
    assert batch.action_mask.sum(1).tolist() == [1 + k % 5 for k in range(12)]
    assert batch.terminated.tolist() == [k % 2 == 1 for k in range(12)]
    assert (batch.tokens[~batch.attention_mask] == 0).all()


def test_trap_8_a_token_that_looks_like_padding_stays_an_action():
    batch = to_batch([episode([5, 0], [0, 0, 7])], Controls(), pad_id=0)
    assert batch.action_mask.tolist() == [[False, False, True, True, True]]


@pytest.mark.parametrize(("epochs", "steps", "micro"), [(1, 1, 100), (1, 3, 5), (2, 2, 1), (3, 5, 4)])
def test_every_row_is_used_once_per_epoch_and_counts_are_global(epochs, steps, micro):
    batch = to_batch(rows(), Controls())
    found = steps_of(batch, micro, epochs=epochs, num_minibatches=steps)
    assert len(found) == epochs * steps
    assert sorted(torch.cat([p.rows for step in found for p in step]).tolist()) == sorted(list(range(12)) * epochs)
    for step in found:
        assert {p.num_actions for p in step} == {sum(p.batch.num_actions for p in step)}
        assert {p.num_rows for p in step} == {sum(len(p.rows) for p in step)}
        assert all(p.batch.episode_ids == tuple(str(k) for k in p.rows.tolist()) for p in step)


def test_an_optimiser_step_can_be_cut_again():
    """Into other parts of the same rows, in the same order of optimiser steps."""
    batch = to_batch(rows(), Controls())
    values = PolicyOutput(batch.sample_logprobs, batch.sample_logprobs)
    for cut in optimizer_steps(batch, values, None, Credit(values.logprobs), epochs=2, num_minibatches=2, seed=0):
        large, small = list(cut(100)), list(cut(4))
        assert len(large) < len(small)
        assert sorted(torch.cat([p.rows for p in large])) == sorted(torch.cat([p.rows for p in small]))
        assert {(p.num_actions, p.num_rows) for p in large} == {(p.num_actions, p.num_rows) for p in small}


def test_groups_stay_together():
    for part in parts_of(to_batch(rows(), Controls()), 3, num_minibatches=2):
        assert len(part.batch.group.unique()) == 1


def test_the_largest_micro_batch_of_a_step_comes_first():
    for parts in steps_of(to_batch(rows(), Controls()), 12, num_minibatches=2):
        sizes = [int(part.batch.attention_mask.sum()) for part in parts]
        assert len(sizes) > 1
        assert sizes == sorted(sizes, reverse=True)


def test_order_depends_on_seed_and_epoch_alone():
    batch = to_batch(rows(), Controls())
    orders = {
        seed: torch.cat([part.rows for part in parts_of(batch, epochs=2, seed=seed)]).tolist() for seed in (0, 1, 0)
    }
    assert orders[0] != orders[1]
    assert orders[0] == torch.cat([part.rows for part in parts_of(batch, epochs=2, seed=0)]).tolist()
    assert orders[0][:12] != orders[0][12:]


def test_any_seed_that_a_configuration_takes_gives_an_order():
    batch = to_batch(rows(), Controls())
    for seed in (20_241_231 * 1_000_003, (2**63 - 1) * 1_000_003 + 7):
        assert sum(len(part.rows) for part in parts_of(batch, seed=seed)) == 12


def test_parts_count_a_shared_prompt_once_and_tear_no_group_that_fits():
    shared = [episode([1, 2, 3, 4], [5] * n, id=str(n), group=0) for n in (1, 2, 3)]
    other = [episode([9, 9], [5] * n, id=f"b{n}", group=1) for n in (4, 1)]
    batch = to_batch([shared[0], other[0], shared[1], other[1], shared[2]], Controls())
    assert [part.tolist() for part in batch.parts(17)] == [[0, 2, 4, 1, 3]]  # 4 + 1 + 2 + 3 and 2 + 4 + 1
    assert [part.tolist() for part in batch.parts(16)] == [[0, 2, 4], [1, 3]]
    assert [part.tolist() for part in batch.parts(7)] == [[0, 2], [4], [1, 3]]
    assert [part.tolist() for part in batch.parts(1)] == [[0], [2], [4], [1], [3]]


def test_parts_hold_rows_of_about_one_length():
    long, short = ([episode([1], [5] * n, id=f"{n}-{k}", group=n + k) for k in range(3)] for n in (19, 4))
    batch = to_batch([row for pair in zip(short, long, strict=True) for row in pair], Controls())
    assert [part.tolist() for part in batch.parts(60)] == [[1, 3, 5], [0, 2, 4]]  # padded to the longest: no cell idle


def test_rows_that_are_left_out_count_and_are_not_computed():
    batch = to_batch(rows(), Controls())
    left_out = torch.arange(12) % 2 == 0
    parts = parts_of(batch, left_out=left_out, num_minibatches=2)
    assert sorted(torch.cat([part.rows for part in parts]).tolist()) == [1, 3, 5, 7, 9, 11]
    assert sum({(p.num_actions, p.num_rows): p.num_actions for p in parts}.values()) == batch.num_actions
    assert parts_of(batch, left_out=torch.ones(12, dtype=torch.bool)) == []


def test_kept_sets_follow_their_rows():
    episodes = [replace(e, support=np.full((sum(e.action_mask), 2), k, dtype=np.uint8)) for k, e in enumerate(rows())]
    batch = to_batch(episodes, Controls(Sampling(top_k=2)))
    picked = batch.rows(torch.tensor([7, 2]))
    assert picked.support[:, 0].tolist() == [7] * 3 + [2] * 3
    with pytest.raises(ValueError, match="brings no kept sets"):
        to_batch(rows(), Controls(Sampling(top_p=0.9)))


def test_a_batch_refuses_what_cannot_be():
    batch = to_batch(rows(2), Controls())
    with pytest.raises(ValueError, match="an action lies on padding"):
        replace(batch, action_mask=torch.ones_like(batch.action_mask))
    first = batch.action_mask.clone()
    first[:, 0] = True
    with pytest.raises(ValueError, match="column 0 cannot be an action"):
        replace(batch, action_mask=first)
    with pytest.raises(ValueError, match="differ in length"):
        replace(rows(1)[0], logprobs=[0.0])
