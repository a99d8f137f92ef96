"""Ours against the functions of verl 0.9.1, on random batches: equal where the definitions are, told apart where not.

`python benchmarks/oracles.py` fetches verl's file; without it everything here is skipped. Tests named
`test_differs_...` pin a difference that is meant, with its reason.
"""

import importlib.util
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pertoken import credit, objectives

SPEC = importlib.util.spec_from_file_location("oracles", Path(__file__).parents[2] / "benchmarks" / "oracles.py")
oracles = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(oracles)

pytestmark = pytest.mark.skipif(not oracles.at_hand("verl"), reason="verl is not at hand: python benchmarks/oracles.py")

SEEDS = range(10)
every_seed = pytest.mark.parametrize("seed", SEEDS)


class Settings(dict):
    """An actor's configuration, as verl's functions read it."""

    def __getattr__(self, name):
        return self[name]


class Other:
    """A type of verl's that ours are no instances of."""


@pytest.fixture(scope="module")
def verl():
    tensors = oracles.functions(
        "verl tensors", "masked_sum", "masked_mean", "masked_var", "masked_whiten", "clip_by_value", torch=torch
    )
    groups = oracles.functions(
        "verl groups", "as_torch_index", "group_mean_std", "_to_1d_numpy_object_array", "_resolve_device",
        np=np, torch=torch, get_device_name=lambda: "cpu", os=SimpleNamespace(environ={}),
    )  # fmt: skip
    found = oracles.functions(
        "verl", verl_F=tensors, np=np, torch=torch, defaultdict=defaultdict, AlgoConfig=Other, ActorConfig=Settings,
        as_torch_index=groups.as_torch_index, group_mean_std=groups.group_mean_std,
        AdaptiveKLController=None, FixedKLController=None, ADV_ESTIMATOR_REGISTRY={}, POLICY_LOSS_REGISTRY={},
        Callable=Any, Optional=dict[str, Any], Any=Any, PolicyLossFn=Any, AdvantageEstimator=Other,
    )  # fmt: skip
    mismatch = oracles.functions(
        "verl mismatch", "compute_rollout_correction_weights", "compute_rollout_rejection_mask",
        "_parse_rollout_is_threshold", "_parse_rollout_rs_thresholds",
        torch=torch, math=math, verl_F=tensors, SAFETY_BOUND=20.0, Optional=dict[str, Any],
        SUPPORTED_ROLLOUT_RS_OPTIONS={"seq_mean_k1"}, TOKEN_LEVEL_ROLLOUT_RS_OPTIONS=set(),
        compute_is_metrics=lambda **_: {}, compute_rs_metrics=lambda **_: {},
    )  # fmt: skip
    controllers = oracles.functions("verl", "AdaptiveKLController", np=np)
    return SimpleNamespace(**vars(found), **vars(mismatch), **vars(controllers), masked_whiten=tensors.masked_whiten)


class Batch:
    """Random rows with holes in their masks, groups of two and more, numbers in float64 that are 0 at masked cells."""

    def __init__(self, seed: int, rows: int = 8, width: int = 9, *, holes: bool = True, off_policy: float = 0.5):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        lengths = torch.randint(2, width + 1, (rows,), generator=g)
        self.mask = torch.arange(width) < lengths[:, None]
        if holes:
            self.mask &= torch.rand(rows, width, generator=g) < 0.7
            self.mask[:, 0] = True
        self.m = self.mask.double()
        self.rewards, self.values, self.advantages = (
            normal(rows, width) * self.m,
            normal(rows, width),
            normal(rows, width),
        )
        self.values, self.advantages = self.values * self.m, self.advantages * self.m
        self.old = -normal(rows, width).abs() * self.m
        self.new = ((self.old + off_policy * normal(rows, width)).clamp_max(0) * self.m).requires_grad_()
        self.ref = (self.old + 0.5 * normal(rows, width)) * self.m
        self.sample = (self.old + 0.5 * normal(rows, width)) * self.m
        self.group = torch.tensor([7, -3, 7, 2, -3, 7, 2, 2])[:rows]
        self.index = np.array([f"prompt {number}" for number in self.group.tolist()], dtype=object)
        self.terminal = torch.where(self.mask.cumsum(1) == self.mask.sum(1, keepdim=True), self.rewards, 0.0) * self.m

    def slope(self, loss):
        return torch.autograd.grad(loss, self.new, retain_graph=True)[0]


def same(ours, theirs, atol=1e-6):
    """To 1e-6: verl adds 1e-8 to denominators."""
    torch.testing.assert_close(ours.detach(), theirs.detach().to(ours.dtype), rtol=0, atol=atol)


def same_loss(batch, ours, theirs, atol=1e-6):
    same(ours, theirs, atol)
    same(batch.slope(ours), batch.slope(theirs), atol)


def actor(low=0.2, high=0.2, dual=3.0):
    return Settings(clip_ratio=low, clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=dual, global_batch_info={})


# --- advantages ---------------------------------------------------------------------------------------------


@every_seed
def test_gae_then_whitening(verl, seed):
    b = Batch(seed)
    theirs, targets = verl.compute_gae_advantage_return(b.rewards, b.values, b.m, gamma=0.9, lam=0.8)
    ours, returns = credit.gae(b.rewards, b.values, b.mask, b.rewards.new_zeros(8), gamma=0.9, lam=0.8)
    same(credit.whiten(ours, b.mask, b.group), theirs * b.m)
    same(returns, targets * b.m)


@every_seed
def test_reinforce_plus_plus(verl, seed):
    b = Batch(seed)
    theirs, returns = verl.compute_reinforce_plus_plus_outcome_advantage(b.rewards, b.m, Settings(gamma=0.9))
    ours = credit.reward_to_go(b.rewards, b.mask, gamma=0.9)
    same(ours, returns)
    same(credit.whiten(ours, b.mask, b.group), theirs)


@every_seed
@pytest.mark.parametrize("scale", [True, False])
def test_group_relative(verl, seed, scale):
    b = Batch(seed)
    ours = credit.group_relative(b.rewards, b.mask, b.group, scale_by_std=scale, eps=1e-6)
    arguments = b.rewards, b.m, b.index
    same(ours, verl.compute_grpo_outcome_advantage(*arguments, norm_adv_by_std_in_grpo=scale)[0])
    same(ours, verl.compute_grpo_vectorized_outcome_advantage(*arguments, norm_adv_by_std_in_grpo=scale)[0], atol=1e-4)


@every_seed
def test_group_mean_then_whitening_is_reinforce_plus_plus_baseline(verl, seed):
    b = Batch(seed)
    theirs, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(b.rewards, b.m, b.index)
    ours = credit.group_relative(b.rewards, b.mask, b.group, scale_by_std=False)
    same(credit.whiten(ours, b.mask, b.group), theirs)


@every_seed
def test_leave_one_out(verl, seed):
    b = Batch(seed)
    ours = credit.leave_one_out(b.rewards, b.mask, b.group)
    same(ours, verl.compute_rloo_outcome_advantage(b.rewards, b.m, b.index)[0])
    same(ours, verl.compute_rloo_vectorized_outcome_advantage(b.rewards, b.m, b.index)[0])


@every_seed
def test_self_critical_with_terminal_rewards(verl, seed):
    b = Batch(seed)
    greedy = b.values[:, 0]
    same(
        credit.self_critical(b.terminal, b.mask, greedy),
        verl.compute_remax_outcome_advantage(b.terminal, greedy, b.m)[0] * b.m,
    )


@every_seed
def test_optimal_token_baseline_without_holes(verl, seed):
    b = Batch(seed, holes=False)
    squares = b.old.exp().square() + 0.1
    theirs, _ = verl.compute_optimal_token_baseline_advantage(b.rewards, b.m, b.index, b.old, squares)
    energies = 1 - 2 * b.old.exp() + squares
    same(credit.optimal_token_baseline(b.rewards, energies, b.mask, b.group, gamma=1.0), theirs)


@every_seed
def test_per_part_then_whitening_is_gdpo(verl, seed):
    b = Batch(seed)
    totals = {"right": b.rewards.sum(1), "short": b.values.sum(1)}
    first = b.mask & (b.mask.cumsum(1) == 1)
    streams = [
        credit.Stream(torch.where(first, scores[:, None], 0.0), weight, by="episode")
        for scores, weight in zip(totals.values(), (1.0, 0.5), strict=True)
    ]
    theirs, _ = verl.compute_gdpo_outcome_advantage(
        b.rewards, b.m, b.index,
        config=Settings(gdpo_reward_keys=list(totals), gdpo_reward_weights=[1.0, 0.5]),
        non_tensor_batch={name: scores.numpy() for name, scores in totals.items()},
        batch={"prompts": torch.zeros(8, 0), "attention_mask": torch.ones(8, 9, dtype=torch.long)},
    )  # fmt: skip
    ours = credit.per_part(streams, b.mask, b.group, eps=1e-6)
    same(credit.whiten(ours, b.mask, b.group), theirs, atol=1e-4)  # verl's scores are float32


@every_seed
def test_whiten_and_scale_only(verl, seed):
    b = Batch(seed)
    same(credit.whiten(b.advantages, b.mask, b.group), verl.masked_whiten(b.advantages, b.m) * b.m)
    mean = b.advantages[b.mask].mean()
    same(
        credit.scale_only(b.advantages, b.mask, b.group),
        (verl.masked_whiten(b.advantages, b.m) + mean / (b.advantages[b.mask].var() + 1e-8).sqrt()) * b.m,
    )


# --- losses -------------------------------------------------------------------------------------------------


@every_seed
@pytest.mark.parametrize(("low", "high", "dual"), [(0.2, 0.2, 3.0), (0.2, 0.28, 1.5), (0.1, 0.3, 10.0)])
def test_clipped_surrogate_with_dual_clip(verl, seed, low, high, dual):
    b = Batch(seed, off_policy=1.0)
    weights = objectives.importance_weights(b.old, b.sample, b.mask, high=2.0)
    theirs, figures = verl.compute_policy_loss_vanilla(
        b.old, b.new, b.advantages, b.m, config=actor(low, high, dual), rollout_is_weights=weights
    )
    ratio = objectives.ratio(b.new, b.old, b.mask)
    ours = objectives.clipped_surrogate(ratio, b.advantages, b.mask, clip_low=low, clip_high=high, dual_clip=dual)
    same_loss(b, objectives.aggregate(ours * weights, b.mask), theirs)
    kl = objectives.kl_per_token(b.old, b.new, b.mask, estimator="k1")
    assert objectives.aggregate(kl, b.mask).item() == pytest.approx(figures["actor/ppo_kl"], abs=1e-6)


@every_seed
def test_gspo_is_the_ratio_of_sequence_token(verl, seed):
    b = Batch(seed)
    theirs, _ = verl.compute_policy_loss_gspo(b.old, b.new, b.advantages, b.m, config=actor(0.1, 0.2))
    ratio = objectives.ratio(b.new, b.old, b.mask, level="sequence_token")
    ours = objectives.clipped_surrogate(ratio, b.advantages, b.mask, clip_low=0.1, clip_high=0.2)
    same_loss(b, objectives.aggregate(ours, b.mask, over="sequence"), theirs)


@every_seed
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (1.0, 4.0)])
def test_cispo(verl, seed, low, high):
    b = Batch(seed, off_policy=1.0)
    theirs, _ = verl.compute_policy_loss_cispo(b.old, b.new, b.advantages, b.m, config=actor(low, high))
    ratio = objectives.ratio(b.new, b.old, b.mask)
    ours = objectives.cispo(b.new, ratio, b.advantages, b.mask, clip_low=low, clip_high=high)
    same_loss(b, objectives.aggregate(ours, b.mask), theirs)


@every_seed
def test_dppo(verl, seed):
    b = Batch(seed)
    theirs, _ = verl.compute_policy_loss_dppo_tv(b.old, b.new, b.advantages, b.m, config=actor(0.1, 0.2, 20.0))
    ours, _ = objectives.dppo(b.new, b.old, b.advantages, b.mask, clip_low=0.1, clip_high=0.2)
    same_loss(b, objectives.aggregate(ours, b.mask), theirs)


@every_seed
def test_policy_gradient(verl, seed):
    b = Batch(seed)
    theirs, _ = verl.compute_policy_loss_reinforce(b.sample, b.new, b.advantages, b.m, config=actor())
    ours = objectives.policy_gradient(b.new, b.advantages, b.mask)
    same_loss(b, objectives.aggregate(ours, b.mask, over="constant", denominator=8), theirs)


@every_seed
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_value_loss(verl, seed, clip):
    b = Batch(seed)
    returns = b.advantages
    theirs, _ = verl.compute_value_loss(b.new, returns, b.values, b.m, clip)
    ours = objectives.value_loss(b.new, b.values, returns, b.mask, clip=clip)
    same_loss(b, objectives.aggregate(ours, b.mask), theirs)


@every_seed
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates(verl, seed, estimator):
    b = Batch(seed)
    ours = objectives.kl_per_token(b.new, b.ref, b.mask, estimator=estimator)
    same_loss(b, ours.sum(), (verl.kl_penalty(b.new, b.ref, estimator) * b.m).sum())


@every_seed
def test_on_policy_the_ratio_times_k3_is_verls_straight_through_k3(verl, seed):
    b = Batch(seed, off_policy=0.0)
    ours = objectives.kl_loss(b.new, b.old, b.ref, b.mask, estimator="ratio_k3")
    same_loss(b, ours.sum(), (verl.kl_penalty(b.new, b.ref, "k3+") * b.m).sum())


@every_seed
def test_averages(verl, seed):
    b = Batch(seed)
    b.mask[3] = False  # a row without actions
    b.m = b.mask.double()
    losses, acting = b.new * b.advantages, 7
    for mode, over, denominator in (
        ("token-mean", "token", None),
        ("seq-mean-token-mean", "sequence", None),
        ("token-sum", "constant", 1),
        ("seq-mean-token-sum", "constant", acting),
        ("seq-mean-token-sum-norm", "constant", acting * 9),
    ):
        ours = objectives.aggregate(losses, b.mask, over=over, denominator=denominator)
        same_loss(b, ours, verl.agg_loss(losses, b.m, mode))
    parts = [
        verl.agg_loss(losses[rows], b.m[rows], "token-mean", batch_num_tokens=b.m.sum())
        for rows in (slice(3), slice(3, 8))
    ]
    same_loss(b, objectives.aggregate(losses, b.mask), sum(parts))


@every_seed
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    ("theirs", "ours"), [(2.0, {"high": 2.0}), ("0.5_2", {"low": 0.5, "high": 2.0, "outside": "mask"})]
)
def test_importance_weights(verl, seed, level, theirs, ours):
    b = Batch(seed)
    expected, _ = verl.compute_rollout_correction_weights(b.old - b.sample, b.m, level, theirs)
    same(objectives.importance_weights(b.old, b.sample, b.mask, level=level, **ours), expected)


@every_seed
def test_adaptive_kl_coefficient(verl, seed):
    g = torch.Generator().manual_seed(seed)
    theirs = verl.AdaptiveKLController(0.2, 6.0, 10_000)
    ours = objectives.AdaptiveKL(0.2, target=6.0, horizon=10_000)
    for kl in (torch.rand(50, generator=g) * 12).tolist():
        theirs.update(kl, 256)
        ours.update(kl, 256)
        assert ours.coefficient == pytest.approx(theirs.value, rel=1e-12)


# --- what differs, and why ----------------------------------------------------------------------------------


ONE = torch.ones(1, 1, dtype=torch.float64)


def test_differs_a_cut_off_row_is_worth_what_the_critic_says(verl):
    """verl has no bootstrap: running out of room counts as an end that is worth nothing."""
    rewards, values, mask = torch.zeros(1, 2), torch.full((1, 2), 0.5), torch.ones(1, 2)
    _, targets = verl.compute_gae_advantage_return(rewards, values, mask, gamma=1.0, lam=1.0)
    same(targets, torch.zeros(1, 2))
    _, returns = credit.gae(rewards, values, mask.bool(), torch.tensor([0.5]), gamma=1.0, lam=1.0)
    same(returns, torch.full((1, 2), 0.5))


def test_differs_a_group_of_one_learns_nothing_from_its_own_mean(verl):
    """verl takes 0 for the mean of a lonely row, so that it is paid its raw score; its own mean is its score."""
    rewards, index = 3 * ONE, np.array([0])
    same(verl.compute_grpo_outcome_advantage(rewards.clone(), ONE, index)[0], 3 * ONE, atol=1e-5)
    same(credit.group_relative(rewards, ONE.bool(), torch.tensor([0]), scale_by_std=True), 0 * ONE)


def test_differs_leave_one_out_of_one_row(verl):
    """No others: baseline 0, which is REINFORCE, and what verl's first form does; its vectorised form gives 0."""
    rewards, index = 3 * ONE, np.array([0])
    same(credit.leave_one_out(rewards, ONE.bool(), torch.tensor([0])), 3 * ONE)
    same(verl.compute_rloo_outcome_advantage(rewards.clone(), ONE, index)[0], 3 * ONE)
    same(verl.compute_rloo_vectorized_outcome_advantage(rewards, ONE, index)[0], 0 * ONE)


def test_differs_greedy_baseline_of_dense_rewards(verl):
    """verl takes the greedy total from the reward-to-go, and so pays late tokens less than early ones for nothing."""
    rewards, greedy = torch.tensor([[1.0, 1.0]]), torch.tensor([2.0])
    same(verl.compute_remax_outcome_advantage(rewards, greedy, torch.ones(1, 2))[0], torch.tensor([[0.0, -1.0]]))
    same(credit.self_critical(rewards, torch.ones(1, 2).bool(), greedy), torch.zeros(1, 2))


def test_differs_rows_are_compared_action_by_action_and_not_column_by_column(verl):
    """The same two answers, one with a tool reply in between: ours does not see the reply, verl's baseline does."""
    rewards = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    even = torch.zeros(2, 3)
    theirs, _ = verl.compute_optimal_token_baseline_advantage(rewards, mask, np.array([0, 0]), even - 99, even)
    ours = credit.optimal_token_baseline(rewards, mask, mask.bool(), torch.tensor([0, 0]), gamma=1.0)
    same(ours[0], torch.tensor([0.0, 0.0, -0.5]))  # returns 2, 1 against 2, 2
    same(theirs[0], torch.tensor([0.0, 0.0, 0.0]))  # its second action faces nobody


def test_differs_one_action_is_whitened_to_zero(verl):
    """verl raises; a step must not end because a filter left one token."""
    with pytest.raises(ValueError, match="sum of the mask is one"):
        verl.masked_whiten(ONE, ONE)
    same(credit.whiten(ONE, ONE.bool(), torch.tensor([0])), 0 * ONE)


def test_differs_dual_clip_is_off_unless_asked_for(verl):
    """verl's PPO cannot go without: the published one bounds no loss."""
    new, mask = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True), ONE.bool()
    theirs, _ = verl.compute_policy_loss_vanilla(0 * ONE, new, -ONE, ONE, config=actor())
    assert theirs.item() == pytest.approx(3.0)
    ratio = objectives.ratio(new, 0 * ONE, mask)
    ours = objectives.clipped_surrogate(ratio, -ONE, mask, clip_low=0.2, clip_high=0.2)
    assert ours.item() == pytest.approx(math.exp(2.0))


def test_differs_k3_is_not_cut_at_10(verl):
    """verl cuts the estimate at 10 nats, and its gradient with it, where the policies are furthest apart."""
    new = torch.tensor([[-5.0]], dtype=torch.float64, requires_grad=True)
    theirs, ours = (
        verl.kl_penalty(new, 0 * ONE, "k3"),
        objectives.kl_per_token(new, 0 * ONE, ONE.bool(), estimator="k3"),
    )
    assert theirs.item() == 10.0
    assert torch.autograd.grad(theirs.sum(), new)[0].item() == 0.0
    assert ours.item() == pytest.approx(math.exp(5.0) - 6.0)
    assert torch.autograd.grad(ours.sum(), new)[0].item() == pytest.approx(1 - math.exp(5.0))


def test_differs_sequence_ratios_are_bounded_at_20_nats_like_all_others(verl):
    """verl bounds those of GSPO at 10 nats and all others at 20."""
    new = 15 * ONE.clone().requires_grad_()
    theirs, _ = verl.compute_policy_loss_gspo(0 * ONE, new, -ONE, ONE, config=actor())
    assert theirs.item() == pytest.approx(math.exp(10.0))
    assert objectives.ratio(new, 0 * ONE, ONE.bool(), level="sequence_token").item() == pytest.approx(math.exp(15.0))


@every_seed
def test_differs_rows_are_judged_by_training_over_sampling(verl, seed):
    """verl's seq_mean_k1 judges sampling over training, the inverse: its bounds 0.5_1.25 are our 0.8 to 2."""
    b = Batch(seed)
    kept, _ = verl.compute_rollout_rejection_mask(b.old - b.sample, b.m, "seq_mean_k1", "0.5_1.25")
    settings = {"low": 0.8, "high": 2.0, "level": "geometric", "outside": "mask"}
    same(objectives.importance_weights(b.old, b.sample, b.mask, **settings), kept * (b.old - b.sample).exp() * b.m)
