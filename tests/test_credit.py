"""Estimators and transforms: hand numbers, identities, invariances, and the traps other systems fell into."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pertoken import credit

# The worked row of the design notes: prompt, prompt, action, action, tool, action, action, padding.
MASK = torch.tensor([[False, False, True, True, False, True, True, False]])
REWARDS = torch.tensor([[0, 0, 0, 0.5, 0, 0, 1.0, 0]], dtype=torch.float64)
VALUES = torch.tensor([[0, 0, 0.2, 0.3, 0, 0.4, 0.5, 0]], dtype=torch.float64)
NOTHING = torch.zeros(1, dtype=torch.float64)


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def equal(got: Tensor, expected: object, atol: float = 1e-12) -> None:
    expected = expected if isinstance(expected, Tensor) else f64(expected)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def random_rows(seed: int, rows: int = 6, width: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards (0 at masked cells), values, action mask with holes, groups of mixed size in mixed order."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, width, generator=g) < 0.6
    mask[:, 0] = False
    rewards = torch.where(mask, torch.randn(rows, width, generator=g, dtype=torch.float64), 0.0)
    values = torch.randn(rows, width, generator=g, dtype=torch.float64)
    group = torch.tensor([-7, 10**9, 3])[torch.randint(3, (rows,), generator=g)]
    return rewards, values, mask, group


# Every function of the module as (rewards, values, mask, group) -> [B, T], for the invariances all must have.
ESTIMATORS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "reward_to_go": lambda r, v, m, g: credit.reward_to_go(r, m, gamma=0.9),
    "gae advantages": lambda r, v, m, g: credit.gae(r, v, m, r.new_full((len(r),), 0.3), gamma=0.9, lam=0.8)[0],
    "gae returns": lambda r, v, m, g: credit.gae(r, v, m, r.new_full((len(r),), 0.3), gamma=0.9, lam=0.8)[1],
    "gae, a lambda a row": lambda r, v, m, g: credit.gae(
        r, v, m, r.new_full((len(r),), 0.3), gamma=0.9, lam=credit.length_adaptive_lambda(m, alpha=0.6, dtype=r.dtype)
    )[0],
    "macro_gae advantages": lambda r, v, m, g: macro(r, v, m)[0],
    "macro_gae returns": lambda r, v, m, g: macro(r, v, m)[1],
    "self_critical": lambda r, v, m, g: credit.self_critical(r, m, r.new_full((len(r),), 0.3)),
    "monte_carlo": lambda r, v, m, g: credit.monte_carlo(r, v, m, m),
    "optimal_token_baseline": lambda r, v, m, g: credit.optimal_token_baseline(r, v.abs(), m, g, gamma=0.9),
    "group_relative": lambda r, v, m, g: credit.group_relative(r, m, g, scale_by_std=True),
    "group_relative centred": lambda r, v, m, g: credit.group_relative(r, m, g, scale_by_std=False),
    "group_process": lambda r, v, m, g: credit.group_process(r, m, g, gamma=0.9, scale_by_std=True),
    "leave_one_out": lambda r, v, m, g: credit.leave_one_out(r, m, g),
    "leave_one_out_process": lambda r, v, m, g: credit.leave_one_out_process(r, m, g, gamma=0.9),
    "per_part": lambda r, v, m, g: credit.per_part([credit.Stream(r, 2.0, 0.9), credit.Stream(r, by="episode")], m, g),
    "whiten": lambda r, v, m, g: credit.whiten(v, m, g),
    "scale_only": lambda r, v, m, g: credit.scale_only(v, m, g),
    "center_by_group": lambda r, v, m, g: credit.center_by_group(v, m, g),
    "clip": lambda r, v, m, g: credit.clip(v, m, g, limit=0.5),
    "keep_high_entropy": lambda r, v, m, g: credit.keep_high_entropy(v, m, v.abs(), share=0.4),
    "entropy_shaped": lambda r, v, m, g: credit.entropy_shaped(v, m, v.abs()),
    "redistribute": lambda r, v, m, g: credit.redistribute(m.to(v.dtype).sum(1), v.abs(), m, share=0.7),
}
NOT_REWARDS = ("whiten", "scale_only", "center_by_group", "clip", "keep_high_entropy", "entropy_shaped", "redistribute")
"""Those that read no rewards."""


def macro(rewards: Tensor, values: Tensor, mask: Tensor, size: int = 2) -> tuple[Tensor, Tensor]:
    return credit.macro_gae(
        rewards, values, mask, rewards.new_full((len(rewards),), 0.3), size=size, gamma=0.9, lam=0.8
    )


every_function = pytest.mark.parametrize("function", ESTIMATORS.values(), ids=ESTIMATORS.keys())


# --- hand numbers -----------------------------------------------------------------------------------------


def test_reward_to_go_of_the_worked_row() -> None:
    equal(credit.reward_to_go(REWARDS, MASK, gamma=0.9), [[0, 0, 1.179, 1.31, 0, 0.9, 1.0, 0]])


def test_gae_of_the_worked_row_terminated() -> None:
    advantages, returns = credit.gae(REWARDS, VALUES, MASK, NOTHING, gamma=0.9, lam=0.5)
    equal(advantages, [[0, 0, 0.3776875, 0.68375, 0, 0.275, 0.5, 0]])
    equal(returns, [[0, 0, 0.5776875, 0.98375, 0, 0.675, 1.0, 0]])


def test_gae_of_the_worked_row_truncated() -> None:
    bootstrap = credit.bootstrap_values(torch.tensor([False]), f64([0.6]))
    advantages, _ = credit.gae(REWARDS, VALUES, MASK, bootstrap, gamma=0.9, lam=0.5)
    equal(advantages, [[0, 0, 0.4268950, 0.7931, 0, 0.518, 1.04, 0]])


def test_reward_to_go_with_a_bootstrap() -> None:
    got = credit.reward_to_go(REWARDS, MASK, gamma=0.5, bootstrap=f64([2.0]))
    equal(got, [[0, 0, 0.5 * (0.5 + 0.5), 0.5 + 0.5 * 1.0, 0, 1.0, 2.0, 0]])


def test_bootstrap_values_ignore_garbage_of_terminated_rows() -> None:
    got = credit.bootstrap_values(torch.tensor([True, False]), f64([torch.nan, 0.6]))
    equal(got, [0.0, 0.6])


def test_discount_weights_count_actions() -> None:
    equal(credit.discount_weights(MASK, 0.9, dtype=torch.float64), [[0, 0, 1, 0.9, 0, 0.81, 0.729, 0]])


def test_group_estimators_by_hand() -> None:
    # Totals 1, 3 | 5; the first row acts at columns 1 and 3 with a tool between.
    mask = torch.tensor([[False, True, False, True], [False, True, True, False], [False, True, False, False]])
    rewards, group = f64([[0, 0.5, 0, 0.5], [0, 1, 2, 0], [0, 5, 0, 0]]), torch.tensor([8, 8, 2])
    equal(credit.group_relative(rewards, mask, group, scale_by_std=False), [[0, -1, 0, -1], [0, 1, 1, 0], [0, 0, 0, 0]])
    scaled = 1 / (2**0.5 + 0.1)
    equal(
        credit.group_relative(rewards, mask, group, scale_by_std=True, eps=0.1),
        [[0, -scaled, 0, -scaled], [0, scaled, scaled, 0], [0, 0, 0, 0]],
    )
    equal(credit.leave_one_out(rewards, mask, group), [[0, -2, 0, -2], [0, 2, 2, 0], [0, 5, 0, 0]])


def test_leave_one_out_process_compares_the_same_action_not_the_same_column() -> None:
    # G = [1, .5] at columns 1, 3 and [3, 2] at columns 1, 2: the second actions face each other.
    mask = torch.tensor([[False, True, False, True], [False, True, True, False]])
    rewards, group = f64([[0, 0.5, 0, 0.5], [0, 1, 2, 0]]), torch.tensor([0, 0])
    got = credit.leave_one_out_process(rewards, mask, group, gamma=1.0)
    equal(got, [[0, 1 - 3, 0, 0.5 - 2], [0, 3 - 1, 2 - 0.5, 0]])


def test_leave_one_out_process_counts_finished_rows_as_zero() -> None:
    # Row 0 is over after one action, so at k = 1 the others' mean for row 1 is (0 + 4) / 2.
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    rewards, group = f64([[6, 0], [0, 2], [0, 4]]), torch.tensor([0, 0, 0])
    got = credit.leave_one_out_process(rewards, mask, group, gamma=1.0)
    equal(got, [[6 - 3, 0], [2 - 5, 2 - 2], [4 - 4, 4 - 1]])


def test_group_process_by_hand_with_a_hole() -> None:
    # Scored 1, 3 and 2 over the group: mean 2, unbiased std 1.
    mask = torch.tensor([[True, False, True, True], [True, True, True, False]])
    rewards, group = f64([[1, 0, 0, 3], [0, 2, 0, 0]]), torch.tensor([5, 5])
    got = credit.group_process(rewards, mask, group, gamma=0.5, scale_by_std=True, eps=1.0)
    equal(got, [[-0.5 + 0.25 * 0.5, 0, 0.25, 0.5], [0, 0, 0, 0]])


def test_group_process_takes_a_judged_zero_as_a_score_only_if_told() -> None:
    mask, rewards, group = torch.ones(1, 3, dtype=torch.bool), f64([[0, 2, 4]]), torch.tensor([0])
    default = credit.group_process(rewards, mask, group, gamma=1.0, scale_by_std=False)
    equal(default, [[0, 0, 1]])
    told = credit.group_process(rewards, mask, group, gamma=1.0, scale_by_std=False, scored=mask)
    equal(told, [[0, 2, 2]])


def test_length_adaptive_lambda_is_used_row_by_row() -> None:
    """Rows of 4 and 2 actions at alpha 0.5: lambda 0.5 and 0; the second row is the TD error."""
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    lam = credit.length_adaptive_lambda(mask, alpha=0.5, dtype=torch.float64)
    equal(lam, [0.5, 0.0])
    rewards, values = f64([[0, 0, 0, 1.0], [0, 1.0, 0, 0]]), f64([[0, 0, 0, 0.5], [0.25, 0.5, 0, 0]])
    advantages, _ = credit.gae(rewards, values, mask, f64([0, 0]), gamma=1.0, lam=lam)
    equal(advantages, [[0.1875, 0.375, 0.75, 0.5], [0.25, 0.5, 0, 0]])


def test_macro_actions_by_hand_with_a_hole_and_a_short_end() -> None:
    """Actions in columns 2 3 | 5 6 of the worked row; three of them leave a last one alone."""
    advantages, returns = credit.macro_gae(REWARDS, VALUES, MASK, NOTHING, size=2, gamma=1.0, lam=0.5)
    # macro values 0.25 and 0.45, rewards 0.5 and 1: deltas 0.7 and 0.55
    equal(advantages, [[0, 0, 0.975, 0.975, 0, 0.55, 0.55, 0]])
    equal(returns, [[0, 0, 1.225, 1.225, 0, 1.0, 1.0, 0]])
    advantages, _ = credit.macro_gae(REWARDS, VALUES, MASK, NOTHING, size=3, gamma=1.0, lam=0.0)
    # values 0.3 and 0.5, rewards 0.5 and 1: the first bootstraps from the second
    equal(advantages, [[0, 0, 0.7, 0.7, 0, 0.7, 0.5, 0]])


def test_macro_actions_of_one_token_are_gae() -> None:
    rewards, values, mask, _ = random_rows(3)
    after = rewards.new_full((len(rewards),), 0.3)
    one = macro(rewards, values, mask, size=1)
    for got, expected in zip(one, credit.gae(rewards, values, mask, after, gamma=0.9, lam=0.8), strict=True):
        equal(got, expected)


def test_optimal_token_baseline_by_hand_with_groups_and_a_hole() -> None:
    """Row 0 and 1 share a group and are compared action by action; row 2 is alone and has no baseline."""
    mask = torch.tensor([[True, False, True], [True, True, False], [True, True, True]])
    rewards = f64([[1, 0, 2], [0, 4, 0], [1, 1, 1]])
    energies = f64([[1, 9, 1], [3, 3, 9], [1, 1, 1]])
    got = credit.optimal_token_baseline(rewards, energies, mask, torch.tensor([5, 5, 6]), gamma=1.0, eps=0.0)
    # G: 3, 2 and 4, 4; W: 1, 2 and 3, 6 -> baselines (3 + 12) / 4 and (4 + 24) / 8
    equal(got, [[-0.75, 0, -1.5], [0.25, 0.5, 0], [3, 2, 1]])


def test_equal_weights_make_it_the_group_mean_at_the_same_action() -> None:
    rewards, group = f64([[1, 3], [1, 0]]), torch.tensor([2, 2])
    energies, mask = f64([[1, 0], [1, 0]]), torch.ones(2, 2).bool()
    got = credit.optimal_token_baseline(rewards, energies, mask, group, gamma=1.0, eps=0.0)
    equal(2 * got, credit.leave_one_out_process(rewards, mask, group, gamma=1.0))


def test_monte_carlo_by_hand() -> None:
    # two steps: the actions at 2 and 3, and those at 5 and 6, behind the reply of a tool; the row earns 1.5
    starts = torch.tensor([[False, False, True, False, False, True, False, False]])
    values = f64([[9, 9, 0.25, 9, 9, 0.75, 9, 9]])
    got = credit.monte_carlo(REWARDS, values, starts, MASK)
    equal(got, [[0, 0, 0.5, 0.5, 0, 0.75, 0.75, 0]])
    one = torch.tensor([[False, False, True, False, False, False, False, False]])
    equal(credit.monte_carlo(REWARDS, values, one, MASK), torch.where(MASK, 1.25, f64(0.0)))
    with pytest.raises(ValueError, match=r"^the first action of a row starts no step: .* before it$"):
        credit.monte_carlo(REWARDS, values, starts & (torch.arange(8) > 2), MASK)


def test_monte_carlo_of_as_many_steps_as_the_row_has_room_for() -> None:
    """What stands where no step starts is never read, even where steps and columns are nearly as many."""
    rewards, every = f64([[0.5, 0.0, 1.0]]), torch.ones(1, 3).bool()
    steps = torch.tensor([[True, False, True]])
    equal(credit.monte_carlo(rewards, f64([[0.5, 9, 0.75]]), steps, every), [[0.25, 0.25, 0.75]])
    equal(credit.monte_carlo(rewards, f64([[0.5, 1, 0.75]]), every, every), [[0.5, -0.25, 0.75]])


def test_monte_carlo_of_every_token_telescopes_to_total_minus_value_of_the_prompt() -> None:
    rewards, values, mask, _ = random_rows(3)
    got = credit.monte_carlo(rewards, values, mask, mask).sum(1)
    first = torch.where(mask & (mask.cumsum(1) == 1), values, 0.0).sum(1)
    equal(got, torch.where(mask.any(1), rewards.sum(1) - first, 0.0))


def test_self_critical_by_hand() -> None:
    got = credit.self_critical(REWARDS, MASK, f64([2.0]))
    equal(got, [[0, 0, -0.5, -0.5, 0, -0.5, -0.5, 0]])
    equal(credit.self_critical(REWARDS, MASK, f64([1.5])), torch.zeros_like(REWARDS))


@pytest.mark.parametrize(("share", "kept"), [(1.0, 5), (0.4, 2), (0.2, 1), (0.01, 1)])
def test_high_entropy_is_kept_over_the_whole_batch(share: float, kept: int) -> None:
    """Not by row: the second row, which the policy is sure of, keeps nothing of a small share."""
    mask = torch.tensor([[True, True, True, False], [False, True, True, False]])
    entropy = f64([[3, 4, 5, 9], [9, 1, 2, 9]])
    got = credit.keep_high_entropy(-torch.ones_like(entropy), mask, entropy, share=share)
    assert int((got == -1).sum()) == kept
    assert (share == 1.0) == bool(got[1].any())
    assert not got[~mask].any()


def test_entropy_never_flips_a_sign() -> None:
    advantages, mask = f64([[-1.0, 0.5, 0.0]]), torch.ones(1, 3).bool()
    equal(credit.entropy_shaped(advantages, mask, f64([[9, 9, 9]]), alpha=1.0, kappa=2.0), [[-0.5, 0.75, 0]])
    equal(credit.entropy_shaped(advantages, mask, f64([[0.1, 0.1, 0.1]]), alpha=1.0, kappa=2.0), [[-0.9, 0.6, 0]])


def test_redistribution_keeps_the_sum() -> None:
    weights = f64([[0, 0, 1, 2, 5, 3, 2, 9], [0] * 8])
    mask = MASK.expand(2, -1)
    got = credit.redistribute(f64([2.0, 3.0]), weights, mask, share=0.5)
    equal(got, [[0, 0, 0.125, 0.25, 0, 0.375, 1.25, 0], [0, 0, 0, 0, 0, 0, 3, 0]])


def test_shapley_values_of_a_sum_are_its_terms_and_of_a_product_its_equal_parts() -> None:
    terms = f64([0.5, -1.0, 2.0])
    generator = torch.Generator().manual_seed(1)
    got = credit.shapley(lambda kept: (kept * terms).sum(1), 3, num_orders=1, generator=generator)
    equal(got, terms)
    equal(credit.leave_one_token_out(lambda kept: (kept * terms).sum(1), 3), terms)
    asked = []

    def both(kept: Tensor) -> Tensor:
        asked.append(len(kept))
        return kept.all(1).double()

    equal(credit.shapley(both, 2, num_orders=5, generator=generator), [0.5, 0.5])
    assert asked == [4]  # each of the coalitions once, however many orders


def test_transforms_by_hand() -> None:
    advantages, group = f64([[1, 99, 3], [5, 7, 99]]), torch.tensor([1, 2])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    unit = 5**0.5  # population std of 1, 3, 5, 7
    equal(credit.whiten(advantages, mask, group, unbiased=False, eps=0.0), f64([[-3, 0, -1], [1, 3, 0]]) / unit)
    equal(credit.whiten(advantages, mask, group, eps=0.0), f64([[-3, 0, -1], [1, 3, 0]]) / (20 / 3) ** 0.5)
    equal(credit.scale_only(advantages, mask, group, unbiased=False, eps=0.0), f64([[1, 0, 3], [5, 7, 0]]) / unit)
    equal(credit.center_by_group(advantages, mask, group), [[-1, 0, 1], [-1, 1, 0]])
    equal(credit.clip(advantages, mask, group, limit=4.0), [[1, 0, 3], [4, 4, 0]])


# --- identities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_1_gives_reward_to_go(gamma: float) -> None:
    rewards, values, mask, _ = random_rows(0)
    bootstrap = values[:, 0]
    advantages, returns = credit.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=1.0)
    expected = credit.reward_to_go(rewards, mask, gamma=gamma, bootstrap=bootstrap)
    equal(returns, expected)
    equal(advantages, torch.where(mask, expected - values, 0.0))


def test_gae_with_lambda_0_gives_the_td_error() -> None:
    advantages, _ = credit.gae(REWARDS, VALUES, MASK, f64([0.6]), gamma=0.9, lam=0.0)
    expected = [0.9 * 0.3 - 0.2, 0.5 + 0.9 * 0.4 - 0.3, 0.9 * 0.5 - 0.4, 1.0 + 0.9 * 0.6 - 0.5]
    equal(advantages[MASK], expected)


def test_gae_without_critic_and_discount_is_reward_to_go() -> None:
    rewards, values, mask, _ = random_rows(1)
    zero = torch.zeros_like(values)
    equal(
        credit.gae(rewards, zero, mask, zero[:, 0], gamma=1.0, lam=1.0)[0],
        credit.reward_to_go(rewards, mask, gamma=1.0),
    )


def test_bootstrap_equals_adding_the_discounted_value_to_the_last_reward() -> None:
    moved = REWARDS.clone()
    moved[0, 6] += 0.9 * 0.6
    truncated = credit.gae(REWARDS, VALUES, MASK, f64([0.6]), gamma=0.9, lam=0.5)[0]
    equal(truncated, credit.gae(moved, VALUES, MASK, NOTHING, gamma=0.9, lam=0.5)[0])


def test_leave_one_out_is_the_scaled_group_mean_form() -> None:
    rewards, _, mask, group = random_rows(2, rows=12)
    size = (group[:, None] == group[None, :]).sum(1, keepdim=True).double()
    assert bool((size > 1).all())
    centred = credit.group_relative(rewards, mask, group, scale_by_std=False)
    equal(credit.leave_one_out(rewards, mask, group), centred * size / (size - 1))


def test_group_advantages_sum_to_zero() -> None:
    rewards, _, _, group = random_rows(3, rows=12)
    mask = torch.ones_like(rewards, dtype=torch.bool)
    for advantages in (
        credit.leave_one_out(rewards, mask, group),
        credit.leave_one_out_process(rewards, mask, group, gamma=0.9),
        credit.group_relative(rewards, mask, group, scale_by_std=True),
    ):
        for g in group.unique():
            equal(advantages[group == g].sum(0), torch.zeros(rewards.shape[1], dtype=torch.float64))


def test_process_form_with_one_final_reward_on_equal_lengths_is_rloo() -> None:
    rewards, mask, group = torch.zeros(4, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.bool), torch.zeros(4)
    rewards[:, -1] = f64([1, 0, 0.5, 0.25])
    group = group.long()
    process = credit.leave_one_out_process(rewards, mask, group, gamma=1.0)
    equal(process, credit.leave_one_out(rewards, mask, group))


def test_a_group_of_one_has_no_baseline_when_left_out_and_no_signal_when_relative() -> None:
    group = torch.tensor([3])
    equal(credit.leave_one_out(REWARDS, MASK, group), torch.where(MASK, 1.5, 0.0).double())
    equal(credit.leave_one_out_process(REWARDS, MASK, group, gamma=0.9), credit.reward_to_go(REWARDS, MASK, gamma=0.9))
    for scale_by_std in (True, False):
        equal(credit.group_relative(REWARDS, MASK, group, scale_by_std=scale_by_std), torch.zeros_like(REWARDS))


def test_whiten_gives_mean_0_and_variance_1_over_actions() -> None:
    _, values, mask, group = random_rows(4)
    white = credit.whiten(values, mask, group, eps=0.0)[mask]
    equal(white.mean(), 0.0)
    equal(white.var(), 1.0)


# --- invariances every function must have ------------------------------------------------------------------


@every_function
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_garbage_in_masked_cells_changes_nothing(function: Callable[..., Tensor], garbage: float) -> None:
    rewards, values, mask, group = random_rows(5)
    clean = function(rewards, torch.where(mask, values, 0.0), mask, group)
    dirty = function(torch.where(mask, rewards, garbage), torch.where(mask, values, garbage), mask, group)
    equal(dirty, clean)
    assert bool((clean[~mask] == 0).all())


@every_function
def test_appended_padding_changes_nothing(function: Callable[..., Tensor]) -> None:
    rewards, values, mask, group = random_rows(6)
    wider = [torch.cat([x, x.new_full((len(x), 3), fill)], 1) for x, fill in ((rewards, torch.nan), (values, 5.0))]
    wider_mask = torch.cat([mask, mask.new_zeros(len(mask), 3)], 1)
    equal(function(*wider, wider_mask, group)[:, :-3], function(rewards, values, mask, group))


@every_function
def test_a_tool_reply_of_any_length_takes_no_time(function: Callable[..., Tensor]) -> None:
    rewards, values, mask, group = random_rows(7)

    def with_gap(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x[:, :4], x.new_full((len(x), 5), fill), x[:, 4:]], 1)

    got = function(with_gap(rewards, 0.0), with_gap(values, 9.0), with_gap(mask, False), group)
    expected = function(rewards, values, mask, group)
    equal(torch.cat([got[:, :4], got[:, 9:]], 1), expected)


@every_function
def test_row_order_changes_nothing(function: Callable[..., Tensor]) -> None:
    rewards, values, mask, group = random_rows(8)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    got = function(rewards[order], values[order], mask[order], group[order])
    equal(got, function(rewards, values, mask, group)[order])


@every_function
def test_group_names_change_nothing(function: Callable[..., Tensor]) -> None:
    rewards, values, mask, group = random_rows(9)
    renamed = torch.where(group == 3, -(2**60), group + 11)
    equal(function(rewards, values, mask, renamed), function(rewards, values, mask, group))


@every_function
def test_rows_without_actions_give_zeros(function: Callable[..., Tensor]) -> None:
    rewards, values, mask, group = random_rows(10)
    nothing = torch.zeros_like(mask)
    equal(function(torch.zeros_like(rewards), values, nothing, group), torch.zeros_like(rewards))


@every_function
def test_one_action_per_row_stays_finite(function: Callable[..., Tensor]) -> None:
    rewards, values, _, group = random_rows(11)
    mask = torch.zeros_like(rewards, dtype=torch.bool)
    mask[:, 2] = True
    assert bool(function(torch.where(mask, rewards, 0.0), values, mask, group).isfinite().all())


@given(seed=st.integers(0, 10_000), gamma=st.floats(0.0, 1.0), lam=st.floats(0.0, 1.0))
@settings(max_examples=30)
def test_gae_equals_its_definition_row_by_row(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask, _ = random_rows(seed, rows=2, width=6)
    bootstrap = f64([0.7, 0.0])
    advantages, _ = credit.gae(rewards, values, mask, bootstrap, gamma=gamma, lam=lam)
    for b in range(2):
        r, v = rewards[b][mask[b]].tolist(), [*values[b][mask[b]].tolist(), float(bootstrap[b])]
        deltas = [r[k] + gamma * v[k + 1] - v[k] for k in range(len(r))]
        expected = [sum((gamma * lam) ** (s - k) * deltas[s] for s in range(k, len(r))) for k in range(len(r))]
        equal(advantages[b][mask[b]], f64(expected), atol=1e-10)


# --- traps ------------------------------------------------------------------------------------------------

REWARD_READERS = [name for name in ESTIMATORS if name not in NOT_REWARDS]


@pytest.mark.parametrize("name", REWARD_READERS)
@pytest.mark.parametrize("column", [0, 4, 7], ids=["prompt", "tool", "tail"])
def test_trap_r1_reward_on_masked_cell_raises(name: str, column: int) -> None:
    rewards = REWARDS.clone()
    rewards[0, column] = 1.0
    with pytest.raises(ValueError, match=rf"row 0, token {column} \(1\).*last action before it"):
        ESTIMATORS[name](rewards, VALUES, MASK, torch.tensor([0]))


def test_trap_r1_reward_in_equals_reward_credited() -> None:
    rewards, _, mask, _ = random_rows(12)
    to_go = credit.reward_to_go(rewards, mask, gamma=1.0)
    first = mask & (mask.cumsum(1) == 1)
    equal(to_go[first], rewards.sum(1)[mask.any(1)])


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_trap_r2_constant_value_is_no_advantage_across_any_holes(lam: float) -> None:
    _, _, mask, _ = random_rows(13)
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    values = torch.where(mask, 0.8, 0.0).double()
    advantages, _ = credit.gae(
        torch.where(last, 0.8, 0.0).double(), values, mask, values.new_zeros(6), gamma=1.0, lam=lam
    )
    equal(advantages, torch.zeros_like(values))


def test_trap_r3_pad_values_do_not_leak_into_gae() -> None:
    dirty = torch.where(MASK, VALUES, 5.0)
    expected = credit.gae(REWARDS, VALUES, MASK, NOTHING, gamma=1.0, lam=0.95)
    for got, clean in zip(credit.gae(REWARDS, dirty, MASK, NOTHING, gamma=1.0, lam=0.95), expected, strict=True):
        equal(got, clean)


def test_trap_r4_reward_to_go_passes_a_hole() -> None:
    mask = torch.tensor([[True, False, True]])
    equal(credit.reward_to_go(f64([[0, 0, 1]]), mask, gamma=0.5), [[0.5, 0, 1]])


@pytest.mark.parametrize("padding", [0, 3])
def test_trap_r5_advantage_of_eos_is_reward_minus_value(padding: int) -> None:
    mask = torch.tensor([[True, True, True] + [False] * padding])
    rewards, values = f64([[0, 0, 1.0] + [0] * padding]), f64([[0.4, 0.1, 0.3] + [0.9] * padding])
    advantages, _ = credit.gae(rewards, values, mask, NOTHING, gamma=0.99, lam=0.95)
    assert advantages[0, 2].item() == 1.0 - 0.3


def test_trap_10_truncated_and_terminated_differ_by_the_bootstrap_whatever_the_width() -> None:
    rewards, values = REWARDS.repeat(2, 1), VALUES.repeat(2, 1)
    bootstrap = credit.bootstrap_values(torch.tensor([True, False]), f64([0.6, 0.6]))
    advantages, _ = credit.gae(rewards, values, MASK.repeat(2, 1), bootstrap, gamma=0.9, lam=1.0)
    difference = (advantages[1] - advantages[0])[MASK[0]]
    equal(difference, [0.6 * 0.9**4, 0.6 * 0.9**3, 0.6 * 0.9**2, 0.6 * 0.9])


def test_trap_21_whitening_ignores_padding_and_keeps_its_sense() -> None:
    advantages, mask = f64([[1, 3, 100, 100]]), torch.tensor([[True, True, False, False]])
    group = torch.tensor([0])
    equal(credit.whiten(advantages, mask, group, unbiased=False, eps=0.0), [[-1, 1, 0, 0]])
    equal(credit.scale_only(advantages, mask, group, unbiased=False, eps=0.0), [[1, 3, 0, 0]])


@pytest.mark.parametrize("transform", [credit.whiten, credit.scale_only])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("num_actions", [0, 1])
def test_trap_21_whitening_none_or_one_action_gives_zero(
    transform: Callable[..., Tensor], unbiased: bool, num_actions: int
) -> None:
    advantages, mask = f64([[7.0, 8.0]]), torch.tensor([[num_actions > 0, False]])
    equal(transform(advantages, mask, torch.tensor([0]), unbiased=unbiased, eps=0.0), [[0, 0]])


def test_trap_23_no_estimator_clips_rewards_on_its_own() -> None:
    mask, group = torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 0])
    equal(credit.leave_one_out(f64([[1000], [0]]), mask, group), [[1000], [-1000]])


def test_trap_32_interleaved_groups_stay_apart() -> None:
    mask, group = torch.ones(4, 1, dtype=torch.bool), torch.tensor([5, -2, 5, -2])
    got = credit.leave_one_out(f64([[1], [10], [3], [30]]), mask, group)
    equal(got, [[-2], [-20], [2], [20]])


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e6])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
def test_trap_33_equal_rewards_give_exactly_zero(reward: float, eps: float) -> None:
    # Three times 0.1 sums to 0.30000000000000004: a mean taken plainly would leave 1e-17, and eps=0 blow it up.
    mask, group = torch.ones(3, 1, dtype=torch.bool), torch.tensor([4, 4, 4])
    rewards = torch.full((3, 1), reward, dtype=torch.float64)
    for advantages in (
        credit.group_relative(rewards, mask, group, scale_by_std=True, eps=eps),
        credit.group_relative(rewards, mask, group, scale_by_std=False),
        credit.group_process(rewards, mask, group, gamma=1.0, scale_by_std=True, eps=eps, scored=mask),
        credit.leave_one_out(rewards, mask, group),
        credit.leave_one_out_process(rewards, mask, group, gamma=1.0),
        credit.whiten(rewards, mask, group, eps=eps),
        credit.scale_only(rewards, mask, group, eps=eps),
        credit.center_by_group(rewards, mask, group),
    ):
        assert bool((advantages == 0).all())


def test_trap_34_process_estimators_tell_where_a_reward_fell() -> None:
    mask, group = torch.ones(2, 3, dtype=torch.bool), torch.tensor([0, 0])
    early, late = f64([[1, 0, 0], [0, 0, 2]]), f64([[0, 0, 1], [0, 0, 2]])
    relative = [credit.group_relative(r, mask, group, scale_by_std=True) for r in (early, late)]
    equal(relative[0], relative[1])  # flattened, as documented
    for process in (
        lambda r: credit.group_process(r, mask, group, gamma=1.0, scale_by_std=True),
        lambda r: credit.leave_one_out_process(r, mask, group, gamma=1.0),
    ):
        assert bool((process(early)[0] != process(late)[0]).any())
    assert credit.has_token_level_rewards(early, mask)
    assert not credit.has_token_level_rewards(late, mask)
    assert not credit.has_token_level_rewards(f64([[0, 1, 0, 0]]), torch.tensor([[True, True, False, False]]))


def test_trap_35_unscored_tokens_do_not_enter_group_statistics() -> None:
    short = credit.group_process(
        f64([[1.0], [3.0]]), torch.ones(2, 1, dtype=torch.bool), torch.tensor([0, 0]), gamma=1.0, scale_by_std=True
    )
    rewards = torch.zeros(2, 50, dtype=torch.float64)
    rewards[:, -1] = f64([1.0, 3.0])
    long = credit.group_process(
        rewards, torch.ones(2, 50, dtype=torch.bool), torch.tensor([0, 0]), gamma=1.0, scale_by_std=True
    )
    equal(long, short.expand(2, 50))


# ---- parts of the reward, each in its own scale ----------------------------------------------------------------

TWO = torch.tensor([3, 3])
ALL = torch.ones(2, 2).bool()


def test_per_part_by_hand():
    """Part one by tokens: A [[3, 3], [-3, -3]] at gamma 1, totals 4 and 1; part two by episode: totals 1 and 0."""
    one = credit.Stream(torch.tensor([[1.0, 3.0], [1.0, 0.0]]), weight=2.0)
    two = credit.Stream(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), weight=3.0, by="episode")
    first, second = 2 * 3 / (4.5**0.5 + 1e-4), 3 * 0.5 / (0.5**0.5 + 1e-4)
    expected = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]) * (first + second)
    assert torch.allclose(credit.per_part([one, two], ALL, TWO), expected)


def test_each_part_has_its_own_gamma():
    rewards = torch.tensor([[1.0, 3.0], [1.0, 0.0]])
    half = credit.Stream(rewards, gamma=0.5, scale="none")  # returns 2.5, 3 and 1, 0
    assert credit.per_part([half], ALL, TWO).tolist() == [[1.5, 3.0], [-1.5, -3.0]]
    both = credit.per_part([half, credit.Stream(rewards, scale="none")], ALL, TWO)
    assert both.tolist() == [[4.5, 6.0], [-4.5, -6.0]]


def test_a_part_counts_by_its_weight_and_not_by_its_size():
    rewards = torch.tensor([[1.0, 3.0], [1.0, 0.0]])
    for scale in ("group", "batch"):
        small = credit.per_part([credit.Stream(rewards, scale=scale)], ALL, TWO, eps=0.0)
        assert torch.allclose(credit.per_part([credit.Stream(1000 * rewards, scale=scale)], ALL, TWO, eps=0.0), small)


def test_rows_of_the_same_total_stay_distinct():
    """Half a point for either part: a sum could not tell these rows; nor would it move anything."""
    one = credit.Stream(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), by="episode")
    two = credit.Stream(torch.tensor([[0.0, 0.0], [0.0, 1.0]]), weight=0.5, by="episode")
    assert not credit.leave_one_out(one.rewards + two.rewards, ALL, TWO).any()
    assert credit.per_part([one, two], ALL, TWO)[0, 0] > 0.3


def test_gdpo_over_sequences():
    """Two prompts of four samples; after whitening 2 / sqrt(8 / 7) for one sample of the second, less for eps."""
    totals = [[1.0, 0, 1, 0, 1, 1, 0, 0], [0.0, 1, 0, 1, 0, 1, 1, 0]]
    mask, group = torch.ones(8, 1).bool(), torch.tensor([0] * 4 + [1] * 4)
    summed = credit.per_part([credit.Stream(torch.tensor(part)[:, None], by="episode") for part in totals], mask, group)
    expected = torch.tensor([0, 0, 0, 0, 0, 2, 0, -2]) / (8 / 7) ** 0.5
    assert torch.allclose(credit.whiten(summed, mask, group)[:, 0], expected, atol=1e-4)


def test_per_part_without_scale_is_leave_one_out_of_the_sum():
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 1, 1, 0]]).bool()
    one, two = torch.randn(2, 4, 5) * mask
    group = torch.tensor([1, 2, 1, 2])
    parts = credit.per_part(
        [credit.Stream(one, 2.0, 0.9, scale="none"), credit.Stream(two, -1.0, 0.9, scale="none")], mask, group
    )
    assert torch.allclose(parts, credit.leave_one_out_process(2 * one - two, mask, group, gamma=0.9), atol=1e-6)


def test_a_part_without_spread_gives_0_and_a_row_that_abstains_is_no_baseline():
    equal = credit.Stream(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert not credit.per_part([equal], ALL, TWO).any()
    three, mask = torch.tensor([3, 3, 3]), torch.ones(3, 1).bool()
    part = credit.Stream(
        torch.tensor([[1.0], [0.0], [5.0]]), by="episode", scale="none", abstained=torch.tensor([False, True, False])
    )
    assert credit.per_part([part], mask, three).tolist() == [[-2.0], [0.0], [2.0]]


# --- edges and defaults -----------------------------------------------------------------------------------


def test_defaults_are_those_that_the_docstrings_state() -> None:
    rewards, values, mask, group = random_rows(21, rows=12)
    entropy = values.abs()
    equal(
        credit.group_relative(rewards, mask, group, scale_by_std=True),
        credit.group_relative(rewards, mask, group, scale_by_std=True, eps=1e-4),
    )
    equal(
        credit.group_process(rewards, mask, group, gamma=1.0, scale_by_std=True),
        credit.group_process(rewards, mask, group, gamma=1.0, scale_by_std=True, eps=1e-4),
    )
    equal(credit.scale_only(values, mask, group), credit.scale_only(values, mask, group, unbiased=True, eps=1e-8))
    equal(
        credit.entropy_shaped(values, mask, entropy),
        credit.entropy_shaped(values, mask, entropy, alpha=0.4, kappa=2.0),
    )


def test_scale_only_adds_eps_to_the_variance() -> None:
    got = credit.scale_only(f64([[1, 3]]), torch.ones(1, 2).bool(), torch.tensor([0]), unbiased=False, eps=3.0)
    equal(got, [[0.5, 1.5]])


def test_clip_has_two_sides() -> None:
    got = credit.clip(f64([[-9, -1, 2, 9]]), torch.ones(1, 4).bool(), torch.tensor([0]), limit=4.0)
    equal(got, [[-4, -1, 2, 4]])


def test_parts_are_scaled_by_the_spread_of_their_group_or_of_the_batch() -> None:
    """Totals 0, 2 and 10, 14: spreads of the groups sqrt(2) and sqrt(8), of the batch sqrt(131 / 3)."""
    rewards, group = f64([[0.0], [2.0], [10.0], [14.0]]), torch.tensor([3, 3, 8, 8])
    mask = torch.ones(4, 1).bool()
    for scale, spreads in (("group", (2**0.5, 8**0.5)), ("batch", ((131 / 3) ** 0.5,) * 2)):
        streams = [credit.Stream(rewards, by="episode", scale=scale)]
        got = credit.per_part(streams, mask, group, eps=0.0)
        equal(got, [[-1 / spreads[0]], [1 / spreads[0]], [-2 / spreads[1]], [2 / spreads[1]]])


def test_optimal_token_baseline_of_rows_with_small_or_no_gradients() -> None:
    """The weights are relative, however small; without any there is no baseline, and no 0 / 0."""
    rewards, mask, group = f64([[1.0], [4.0]]), torch.ones(2, 1).bool(), torch.tensor([0, 0])
    small = credit.optimal_token_baseline(rewards, f64([[1e-3], [2e-3]]), mask, group, gamma=1.0, eps=0.0)
    equal(small, [[-2.0], [1.0]])
    none = credit.optimal_token_baseline(rewards, f64([[0.0], [0.0]]), mask, group, gamma=1.0, eps=0.0)
    equal(none, [[1.0], [4.0]])


def test_one_action_alone_has_the_highest_entropy() -> None:
    mask = torch.tensor([[False, True]])
    equal(credit.keep_high_entropy(f64([[9, 2]]), mask, f64([[5, 1]]), share=0.2), [[0, 2]])


def test_redistribution_looks_at_each_row_alone_however_small_its_weights() -> None:
    weights = f64([[0.125, 0.375], [3, 1]])
    got = credit.redistribute(f64([2.0, 4.0]), weights, torch.ones(2, 2).bool(), share=1.0)
    equal(got, [[0.5, 1.5], [3, 1]])


def test_texts_with_tokens_left_out_are_named_by_booleans() -> None:
    kinds = set()

    def worth(kept: Tensor) -> Tensor:
        kinds.add(kept.dtype)
        return kept.double().sum(1)

    credit.leave_one_token_out(worth, 2)
    credit.shapley(worth, 2, num_orders=1)
    credit.prefix_differences(worth, 2)
    assert kinds == {torch.bool}


def test_shapley_orders_come_from_the_generator_alone() -> None:
    terms = torch.arange(1.0, 8.0, dtype=torch.float64)

    def worth(kept: Tensor) -> Tensor:
        return (kept * terms).sum(1) ** 3

    def drawn(seed: int) -> Tensor:
        return credit.shapley(worth, 7, num_orders=1, generator=torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    first = drawn(5)
    assert torch.get_rng_state().equal(before)
    equal(drawn(5), first)
    assert not drawn(6).equal(first)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches_give_empty_advantages(shape: tuple[int, int]) -> None:
    none, mask = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
    assert macro(none, none, mask)[0].shape == shape
    assert credit.reward_to_go(none, mask, gamma=0.9).shape == shape
