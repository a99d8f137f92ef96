"""The published numbers: every fixture that a function of `credit`, `objectives` or `sampling` can reproduce.

The literals at the end are copied from `algorithms.json`, whose own numbers were checked against verl 0.9.1 and
TRL 1.16; where that file is at hand, the last test checks the copy. In the names below, `lp` is a log-prob.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pertoken import credit
from pertoken.objectives import (
    AdaptiveKL,
    aggregate,
    cispo,
    clipped_surrogate,
    dppo,
    importance_weights,
    kl_loss,
    kl_per_token,
    policy_gradient,
    ratio,
    truncated_importance_weights,
    value_loss,
)
from pertoken.sampling import Controls, Sampling, keep_set, processed_logits


def case(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs (lists become float64 tensors, `mask` a bool one) and outputs of a fixture."""
    inputs = {key: tensor(x) if isinstance(x, list) else x for key, x in CASES[name]["inputs"].items()}
    if "mask" in inputs:
        inputs["mask"] = inputs["mask"].bool()
    return inputs, CASES[name]["outputs"]


def tensor(numbers: Any) -> Tensor:
    if isinstance(numbers, list) and "-inf" in numbers:
        numbers = [float(x) for x in numbers]
    return torch.tensor(numbers, dtype=torch.float64)


def equal(got: Tensor, expected: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(got.detach(), tensor(expected), rtol=0, atol=atol)


def gradient(loss: Tensor, parameter: Tensor) -> Tensor:
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


def outcome(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, mask and group of one-token answers with these scores."""
    return scores[:, None], torch.ones(len(scores), 1, dtype=torch.bool), torch.zeros(len(scores), dtype=torch.long)


# --- credit -------------------------------------------------------------------------------------------------


def test_reinforce_reward_to_go() -> None:
    i, o = case("reinforce_reward_to_go")
    lp, mask = i["new_logp"].requires_grad_(), i["mask"]
    undiscounted = credit.reward_to_go(i["rewards"], mask, gamma=1.0)
    discounted = credit.reward_to_go(i["rewards"], mask, gamma=0.9)
    equal(undiscounted, o["return_gamma1"])
    equal(discounted, o["return_gamma0.9"])
    loss = policy_gradient(lp, discounted, mask)
    equal(aggregate(loss, mask, over="constant", denominator=2), o["loss_seq_mean_token_sum_gamma0.9"])
    exact = loss * credit.discount_weights(mask, 0.9, dtype=torch.float64)
    equal(aggregate(exact, mask, over="constant", denominator=2), o["loss_with_gamma_pow_t_factor"])
    total = torch.where(mask, i["rewards"].sum(1, keepdim=True), 0.0)
    no_causality = policy_gradient(lp, total, mask)
    equal(
        aggregate(no_causality, mask, over="constant", denominator=2), o["loss_undiscounted_full_return_no_causality"]
    )
    token_mean = aggregate(policy_gradient(lp, undiscounted, mask), mask)
    equal(token_mean, o["loss_gamma1_token_mean"])
    equal(gradient(token_mean, lp), o["grad_gamma1_token_mean"])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (1.0, 1.0), (1.0, 0.0)])
def test_gae(gamma: float, lam: float) -> None:
    i, o = case("gae")
    advantages, returns = credit.gae(i["rewards"], i["values"], i["mask"], tensor([0, 0]), gamma=gamma, lam=lam)
    equal(advantages, o[f"gamma{gamma}_lam{lam}"]["adv"])
    equal(returns, o[f"gamma{gamma}_lam{lam}"]["ret"])


def test_gae_truncated() -> None:
    i, o = case("gae")
    bootstrap = credit.bootstrap_values(torch.tensor([False, True]), tensor([i["bootstrap_row0"], 99.0]))
    advantages, returns = credit.gae(i["rewards"], i["values"], i["mask"], bootstrap, gamma=0.99, lam=0.95)
    equal(advantages, o["gamma0.99_lam0.95_row0_truncated_bootstrap0.5"]["adv"])
    equal(returns, o["gamma0.99_lam0.95_row0_truncated_bootstrap0.5"]["ret"])


def test_gae_with_an_observation() -> None:
    """The fixture leaves a reward of 0.1 on the observation, which we refuse to lose in silence."""
    i, o = case("gae")
    expected = o["gamma1_lam0.95_row0_token1_is_observation"]
    mask, nothing = tensor(expected["mask"]).bool(), tensor([0, 0])
    with pytest.raises(ValueError, match="row 0, token 1"):
        credit.gae(i["rewards"], i["values"], mask, nothing, gamma=1.0, lam=0.95)
    rewards = torch.where(mask, i["rewards"], 0.0)
    advantages, returns = credit.gae(rewards, i["values"], mask, nothing, gamma=1.0, lam=0.95)
    equal(advantages, expected["adv"])
    equal(returns, expected["ret"])


def test_whitening() -> None:
    i, o = case("gae")
    advantages, _ = credit.gae(i["rewards"], i["values"], i["mask"], tensor([0, 0]), gamma=1.0, lam=0.95)
    group = torch.tensor([0, 1])
    equal(credit.whiten(advantages, i["mask"], group), o["whiten_bessel_gamma1_lam0.95"])
    population = credit.whiten(advantages, i["mask"], group, unbiased=False, eps=0.0)
    equal(population, o["whiten_population_gamma1_lam0.95"])


def test_decoupled_gae() -> None:
    i, o = case("vapo_decoupled_length_adaptive")
    arguments = i["rewards"], i["values"], i["mask"], tensor([0, 0])
    equal(credit.gae(*arguments, gamma=1.0, lam=i["lambda_actor"])[0], o["adv_actor"])
    equal(credit.gae(*arguments, gamma=1.0, lam=i["lambda_critic"])[1], o["returns_critic"])


def test_length_adaptive_lambda() -> None:
    i, o = case("vapo_decoupled_length_adaptive")
    mask = torch.arange(1000) < i["lengths"][:, None]
    equal(credit.length_adaptive_lambda(mask, alpha=i["alpha"], dtype=torch.float64), o["lambda_clamped"])


def test_macro_actions() -> None:
    i, o = case("macro_actions")
    arguments = i["rewards"][None], i["values"][None], torch.ones(1, 4, dtype=torch.bool), tensor([0])
    advantages, returns = credit.macro_gae(*arguments, size=i["n"], gamma=i["gamma"], lam=i["lam"])
    equal(advantages, [o["adv_paper"]])
    equal(returns[:, ::2], [o["returns"]])


def test_optimal_token_baseline() -> None:
    i, o = case("optimal_token_baseline")
    energies = 1 - 2 * i["old_logp"].exp() + i["sum_pi_squared"]
    energies = torch.where(i["mask"], energies, torch.nan)
    equal(torch.where(i["mask"], energies, 0.0), o["w"])
    group = torch.zeros(2, dtype=torch.long)
    got = credit.optimal_token_baseline(i["rewards"], energies, i["mask"], group, gamma=1.0)
    equal(got, o["adv_zero_tail"])


def test_entropy_selection() -> None:
    i, o = case("entropy_selection")
    kept = credit.keep_high_entropy(torch.ones_like(i["adv"]), i["mask"], i["entropy"], share=i["rho"])
    equal(kept, o["top20pct_mask"])
    shaped = credit.entropy_shaped(i["adv"], i["mask"], i["entropy"], alpha=i["alpha"], kappa=i["kappa"])
    equal(shaped, o["entropy_shaped_adv"])


def test_attention_redistribution() -> None:
    i, o = case("abc_and_red")
    weights = i["attention_last_row"][None]
    got = credit.redistribute(tensor([i["rm_score"]]), 7 * weights, weights > 0, share=i["abc_beta"])
    equal(got, [o["abc_rewards"]])


def test_shapley_and_leaving_one_out() -> None:
    i, o = case("occlusion_shapley")

    def worth(kept: Tensor) -> Tensor:
        return tensor([i["v"][",".join(map(str, row.nonzero()[:, 0].tolist()))] for row in kept])

    equal(credit.leave_one_token_out(worth, 3), o["leave_one_out"])
    equal(credit.prefix_differences(worth, 3), o["prefix_delta"])
    exact = credit.shapley(worth, 3, num_orders=None)
    equal(exact, o["shapley"])
    generator = torch.Generator().manual_seed(0)
    equal(credit.shapley(worth, 3, num_orders=5_000, generator=generator), exact.tolist(), atol=1e-2)
    assert float(exact.sum()) == pytest.approx(o["shapley_sum"], abs=1e-12)
    few = credit.shapley(worth, 3, num_orders=1, generator=generator)
    assert float(few.sum()) == pytest.approx(o["shapley_sum"], abs=1e-12)


def test_group_advantages() -> None:
    i, o = case("group_advantages")
    answers = outcome(i["scores"])
    equal(credit.leave_one_out(*answers)[:, 0], o["rloo"])
    equal(credit.leave_one_out_process(*answers, gamma=1.0)[:, 0], o["rloo"])
    equal(credit.leave_one_out(*outcome(tensor([1, 0])))[:, 0], o["rloo_two_samples_1_0"])
    centred = credit.group_relative(*answers, scale_by_std=False)[:, 0]
    equal(centred, o["mean_baseline_dr_grpo"])
    equal(centred * 4 / 3, o["identity_rloo_equals_k_over_k_minus_1_times_mean"])
    for eps, name in (
        (1e-4, "grpo_trl_ddof1_eps1e-4"),
        (1e-6, "grpo_verl_ddof1_eps1e-6"),
        (1e-9, "grpo_openrlhf_ddof1_eps1e-9"),
    ):
        equal(credit.group_relative(*answers, scale_by_std=True, eps=eps)[:, 0], o[name])


def test_kl_in_reward_variants() -> None:
    i, o = case("kl_in_reward_variants")
    mask, group = i["mask"], torch.tensor([0, 0])
    k1 = kl_per_token(i["old_logp"], i["ref_logp"], mask, estimator="k1")
    equal(k1, o["k1"])
    scores = torch.zeros_like(k1)
    scores[0, 3], scores[1, 2] = i["scores"]
    inside = credit.leave_one_out(scores - i["beta"] * k1, mask, group)
    equal(inside[:, 0], o["rloo_trl_sequence_kl_inside_baseline"])
    to_go = credit.reward_to_go(-i["beta"] * k1, mask, gamma=1.0)
    equal(credit.leave_one_out(scores, mask, group) + to_go, o["rloo_openrlhf_kl_to_go_outside_baseline"])
    returns = credit.reward_to_go(scores - i["beta"] * k1, mask, gamma=1.0)
    equal(returns, o["reinforcepp_returns"])
    equal(credit.whiten(returns, mask, group), o["reinforcepp_adv_whitened"])


def test_prefix_metric_deltas() -> None:
    i, o = case("prefix_metric_deltas")
    metric, gamma, mask = i["metric_of_prefix_0_to_4"], i["gamma"], torch.ones(1, 4, dtype=torch.bool)
    sparse = tensor([[0, 0, 0, float(metric[-1])]])

    def to_go(rewards: Tensor, gamma: float) -> Tensor:
        return credit.reward_to_go(rewards.view(1, 4), mask, gamma=gamma)[0]

    deltas = metric[1:] - metric[:-1]
    equal(deltas, o["delta_rewards"])
    equal(to_go(deltas, 1.0), o["gamma1_return_to_go"])
    equal(to_go(sparse, 1.0) - metric[:-1], o["gamma1_sparse_return_minus_potential"])
    invariant = gamma * metric[1:] - metric[:-1]
    invariant[-1] = metric[-1] - metric[-2]  # the end has no potential: the metric itself is paid out
    equal(invariant, o["invariant_shaped_rewards_gamma0.9"])
    equal(to_go(invariant, gamma), o["invariant_return_to_go"])
    equal(to_go(sparse, gamma) - metric[:-1], o["sparse_return_minus_potential_gamma0.9"])
    equal(to_go(deltas, gamma), o["naive_delta_return_gamma0.9_NOT_invariant"])


# --- objectives ---------------------------------------------------------------------------------------------


def test_value_loss_clipped() -> None:
    i, o = case("value_loss_clipped")
    arguments = i["values_new"], i["values_old"], i["returns"], i["mask"]
    clipped = value_loss(*arguments, clip=i["cliprange_value"])
    equal(2 * clipped, o["loss_matrix"])
    equal(aggregate(clipped, i["mask"]), o["half_token_mean"])
    equal(aggregate(value_loss(*arguments), i["mask"]), o["unclipped_half_token_mean"])


def test_aggregation() -> None:
    i, o = case("aggregation")
    losses, mask = i["loss_matrix"], i["mask"]
    equal(aggregate(losses, mask), o["token-mean"])
    equal(aggregate(losses, mask, over="constant", denominator=1), o["token-sum"])
    equal(aggregate(losses, mask, over="constant", denominator=2), o["seq-mean-token-sum"])
    equal(aggregate(losses, mask, over="sequence"), o["seq-mean-token-mean"])
    equal(aggregate(losses, mask, over="constant", denominator=2 * i["L_max"]), o["seq-mean-token-sum-norm"])


@pytest.mark.parametrize(("clip_high", "name"), [(0.2, "ppo_0.2_0.2"), (0.28, "dapo_0.2_0.28")])
def test_ppo_grpo_dapo_losses(clip_high: float, name: str) -> None:
    i, o = case("ppo_grpo_dapo_losses")
    lp, mask = i["new_logp"].requires_grad_(), i["mask"]
    w = ratio(lp, i["old_logp"], mask)
    equal(torch.where(mask, w, 0.0), o["ratio"])
    losses = clipped_surrogate(w, i["adv"], mask, clip_low=0.2, clip_high=clip_high)
    equal(losses, o[name]["loss_tokens"])
    equal(aggregate(losses, mask), o[name]["token_mean"])
    equal(aggregate(losses, mask, over="sequence"), o[name]["seq_mean_token_mean"])
    equal(aggregate(losses, mask, over="constant", denominator=2 * i["L_max"]), o[name]["dr_grpo_Lmax8"])
    equal(gradient(aggregate(losses, mask), lp), o[name]["grad_token_mean"])


def test_dual_clip() -> None:
    o = case("ppo_grpo_dapo_losses")[1]["dual_clip_c3"]
    lp, mask = tensor([o["log_ratio"]]).requires_grad_(), torch.ones(1, 3, dtype=torch.bool)
    w = ratio(lp, torch.zeros_like(lp), mask)
    losses = clipped_surrogate(w, tensor([o["adv"]]), mask, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    equal(losses, [o["loss"]])
    equal(gradient(losses.sum(), lp), [o["dloss_dlogp"]])


def test_grpo_end_to_end() -> None:
    i, o = case("grpo_end_to_end")
    lp, old, ref, mask = i["new_logp"], i["old_logp"], i["ref_logp"], i["mask"]
    rewards = torch.zeros_like(lp)
    rewards[0, 3], rewards[1, 2] = i["scores"]
    advantages = credit.group_relative(rewards, mask, torch.tensor([0, 0]), scale_by_std=True, eps=i["std_eps"])
    equal(advantages[:, 0], o["adv"])
    equal(kl_per_token(lp, ref, mask, estimator="k3"), o["k3"])
    losses = clipped_surrogate(ratio(lp, old, mask), advantages, mask, clip_low=i["eps"], clip_high=i["eps"])
    equal(aggregate(losses, mask, over="sequence"), o["loss_no_kl"])
    for estimator, name in (("k3", "loss_original_grpo"), ("ratio_k3", "loss_k3_times_ratio_DeepSeekV3.2")):
        penalised = losses + i["beta"] * kl_loss(lp, old, ref, mask, estimator=estimator)
        equal(aggregate(penalised, mask, over="sequence"), o[name])


@pytest.mark.parametrize(("low", "high", "name"), [(3e-4, 4e-4, "eps_3e-4_4e-4"), (0.2, 0.28, "eps_0.2_0.28")])
def test_gspo(low: float, high: float, name: str) -> None:
    i, o = case("gspo")
    lp, mask = i["new_logp"].requires_grad_(), i["mask"]
    s = ratio(lp, i["old_logp"], mask, level="sequence")
    equal(s[:, 0], o["s"])
    losses = clipped_surrogate(s, i["adv_seq"][:, None].expand_as(s), mask, clip_low=low, clip_high=high)
    equal(losses[:, 0], o[name]["seq_loss"])
    equal(aggregate(losses, mask, over="sequence"), o[name]["loss"])
    equal(gradient(aggregate(losses, mask, over="sequence"), lp), o[name]["grad"])


def test_gspo_token() -> None:
    i, o = case("gspo")
    lp, mask, expected = i["new_logp"].requires_grad_(), i["mask"], o["gspo_token_with_token_adv"]
    s = ratio(lp, i["old_logp"], mask, level="sequence_token")
    losses = clipped_surrogate(s, i["adv_token"], mask, clip_low=0.2, clip_high=0.28)
    equal(losses, expected["loss_tokens"])
    equal(aggregate(losses, mask, over="sequence"), expected["loss"])
    equal(gradient(aggregate(losses, mask, over="sequence"), lp), expected["grad"])


def test_truncated_importance_sampling() -> None:
    i, o = case("tis_mis")
    lp, old, sample, mask = i["new_logp"].requires_grad_(), i["old_logp"], i["rollout_logp"], i["mask"]
    equal(truncated_importance_weights(old, sample, mask, cap=1e9), o["rho_token"])
    weights = truncated_importance_weights(old, sample, mask, cap=2.0)
    equal(weights, o["token_truncate_2"]["weight"])
    losses = weights * clipped_surrogate(ratio(lp, old, mask), i["adv"], mask, clip_low=i["eps"], clip_high=i["eps"])
    equal(aggregate(losses, mask), o["token_truncate_2"]["loss_token_mean"])
    equal(gradient(aggregate(losses, mask), lp), o["token_truncate_2"]["grad_token_mean"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("token_truncate_2", {"high": 2.0}),
        ("token_mask_0.5_2", {"low": 0.5, "high": 2.0, "outside": "mask"}),
        ("sequence_truncate_2", {"high": 2.0, "level": "sequence"}),
        ("sequence_mask_upper3", {"high": 3.0, "level": "sequence", "outside": "mask"}),
        (
            "geometric_mask_0.9_1.2_token_weights_raw",
            {"low": 0.9, "high": 1.2, "level": "geometric", "outside": "mask"},
        ),
    ],
)
def test_importance_weights(name: str, settings: dict[str, Any]) -> None:
    i, o = case("tis_mis")
    lp, old, mask = i["new_logp"].requires_grad_(), i["old_logp"], i["mask"]
    weights = importance_weights(old, i["rollout_logp"], mask, **settings)
    equal(weights, o[name]["weight"])
    losses = weights * clipped_surrogate(ratio(lp, old, mask), i["adv"], mask, clip_low=i["eps"], clip_high=i["eps"])
    equal(aggregate(losses, mask), o[name]["loss_token_mean"])
    equal(gradient(aggregate(losses, mask), lp), o[name]["grad_token_mean"])


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("verl_slime_nemo_0.2_0.28", 0.2, 0.28),
        ("open_instruct_upper_only_1.272", 1.0, 0.272),
        ("trl_absolute_cap_5.0", 1.0, 4.0),
    ],
)
def test_cispo(name: str, low: float, high: float) -> None:
    i, o = case("cispo")
    lp, mask = i["new_logp"].requires_grad_(), i["mask"]
    w = ratio(lp, i["old_logp"], mask)
    equal(torch.where(mask, w.clamp(1 - low, 1 + high), 0.0), o[name]["weight"])
    loss = aggregate(cispo(lp, w, i["adv"], mask, clip_low=low, clip_high=high), mask)
    equal(loss, o[name]["loss_token_mean"])
    equal(gradient(loss, lp), o[name]["grad_token_mean"])


def test_dppo() -> None:
    i, o = case("sapo_dppo_gmpo")
    loss, left_out = dppo(i["new_logp"], i["old_logp"], i["adv"], i["mask"], clip_low=0.05, clip_high=0.05)
    equal((i["mask"] & ~left_out).double(), o["dppo_tv_keep"])
    equal(aggregate(loss, i["mask"]), o["dppo_tv_loss"])


def test_bypassing_the_old_policy() -> None:
    i, o = case("tis_mis")
    expected = o["bypass_reinforce_token_truncate_2"]
    weights = truncated_importance_weights(i["new_logp"], i["rollout_logp"], i["mask"], cap=2.0)
    equal(weights, expected["weight"])
    losses = weights * policy_gradient(i["new_logp"], i["adv"], i["mask"])
    equal(aggregate(losses, i["mask"]), expected["loss_token_mean"])


# --- KL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimators(estimator: Any) -> None:
    i, o = case("kl_estimators")
    lp, mask = i["logp"].requires_grad_(), i["mask"]
    estimates = kl_per_token(lp, i["ref_logp"], mask, estimator=estimator)
    equal(estimates, o[estimator])
    equal(aggregate(estimates, mask), o["token_mean"][estimator])
    equal(gradient(estimates.sum(), lp), o[f"d{estimator}_dlogp"])


def test_kl_ratio_times_k3_derivative() -> None:
    i, o = case("kl_estimators")
    lp = i["logp"].requires_grad_()
    losses = kl_loss(lp, lp.detach(), i["ref_logp"], i["mask"], estimator="ratio_k3")
    equal(gradient(losses.sum(), lp), o["d_ratio_k3_dlogp_at_ratio1"])


def test_kl_gradients_one_token() -> None:
    """One row per token of the vocabulary, weighted by its probability: the exact expectation."""
    i, o = case("kl_gradients_one_token_exact_expectation")
    logits, mask = i["logits"].requires_grad_(), torch.ones(4, 1, dtype=torch.bool)
    lp, ref = logits.log_softmax(0)[:, None], i["ref_logits"].log_softmax(0)[:, None]
    p, old = lp.exp()[:, 0], lp.detach()
    k1, k2, k3 = (kl_per_token(lp, ref, mask, estimator=k) for k in ("k1", "k2", "k3"))
    reverse, forward = (p * k1[:, 0]).sum(), (ref.exp() * (ref - lp)).sum()
    equal(reverse, o["reverse_kl"])
    equal(forward, o["forward_kl"])
    equal((p * k2[:, 0]).sum(), o["E_k2"])
    equal((p * k3[:, 0]).sum(), o["E_k3"])
    in_expectation = {
        "k1_in_loss": k1,
        "k2_in_loss": kl_loss(lp, old, ref, mask, estimator="k2"),
        "k3_in_loss": kl_loss(lp, old, ref, mask, estimator="k3"),
        "k1_in_reward_detached": policy_gradient(lp, -k1, mask),
        "k3_in_reward_detached": policy_gradient(lp, -k3, mask),
        "ratio_times_k3_in_loss": kl_loss(lp, old, ref, mask, estimator="ratio_k3"),
        "ratio_times_k1_in_loss": ratio(lp, old, mask) * k1,
    }
    expected = o["expected_gradients_wrt_logits"]
    equal(gradient(reverse, logits), expected["exact_grad_reverse_kl"])
    equal(gradient(forward, logits), expected["exact_grad_forward_kl"])
    assert {"exact_grad_reverse_kl", "exact_grad_forward_kl", *in_expectation} == set(expected)
    for name, losses in in_expectation.items():
        equal(gradient((p.detach() * losses[:, 0]).sum(), logits), expected[name])


def two_token_world(logits: Tensor) -> Tensor:
    """Log-probs `[4, 2]` of the sequences 00, 01, 10, 11; P(t1=1) = sigmoid(a), P(t2=1|t1) = sigmoid(b_t1)."""
    sign = tensor([-1.0, 1.0])
    first, second = torch.nn.functional.logsigmoid(sign * logits[0]), logits[1:, None] * sign
    return torch.stack([first.repeat_interleave(2), torch.nn.functional.logsigmoid(second).flatten()], 1)


def test_kl_gradients_two_tokens() -> None:
    """Only k1 as a reward, summed to go, sees that token 1 decides which KL token 2 will have."""
    i, o = case("kl_gradients_two_token_sequence")
    logits, mask = i["logits_a_b0_b1"].requires_grad_(), torch.ones(4, 2, dtype=torch.bool)
    lp, ref = two_token_world(logits), two_token_world(i["ref_logits_a_b0_b1"])
    p, k1 = lp.sum(1).exp(), kl_per_token(lp, ref, mask, estimator="k1")
    sequence_kl = (p * k1.sum(1)).sum()
    equal(sequence_kl, o["sequence_kl"])
    equal(gradient(sequence_kl, logits), o["grad_true"])
    to_go = credit.reward_to_go(-k1.detach(), mask, gamma=1.0)
    for name, losses in (
        ("grad_k1_reward_to_go", policy_gradient(lp, to_go, mask)),
        ("grad_own_token_only_partial", policy_gradient(lp, -k1, mask)),
        ("grad_k2_token_loss_partial", kl_loss(lp, lp.detach(), ref, mask, estimator="k2")),
        ("grad_k3_token_loss", kl_loss(lp, lp.detach(), ref, mask, estimator="k3")),
    ):
        equal(gradient((p.detach() * losses.sum(1)).sum(), logits), o[name])


def test_redistribution_gradient_bias() -> None:
    """A reward split along the sequence keeps the sparse gradient only if the split is a potential."""
    i, o = case("redistribution_gradient_bias")
    logits, mask = i["logits_a_b0_b1"].requires_grad_(), torch.ones(4, 2, dtype=torch.bool)
    lp, names = two_token_world(logits), ("00", "01", "10", "11")
    total = tensor([i["R"][n] for n in names])
    share = total * tensor([i["attention_share_on_token1"][n] for n in names])
    prefix = tensor([i["prefix_score"][n[0]] for n in names])
    for name, on_first in (
        ("sparse", torch.zeros_like(total)),
        ("attention_redistribution", share),
        ("prefix_difference", prefix),
    ):
        to_go = credit.reward_to_go(torch.stack([on_first, total - on_first], 1), mask, gamma=1.0)
        expected_return = -(lp.sum(1).exp().detach() * policy_gradient(lp, to_go, mask).sum(1)).sum()
        equal(gradient(expected_return, logits), o[name])


def test_kl_controller_ziegler() -> None:
    i, o = case("kl_controllers")
    controller = AdaptiveKL(i["beta"], target=i["target"], horizon=i["horizon"])
    controller.update(sequence_kl=i["kl"], num_episodes=i["n_steps"])
    assert controller.coefficient == pytest.approx(o["ziegler_trl_verl"], abs=1e-12)


# --- sampling: computed in float32 by design ------------------------------------------------------------------


def test_sampling_transforms() -> None:
    i, o = case("sampling_transforms")
    logits, history = i["logits"][None], i["history"].long()[None]

    def steps(**controls: Any) -> tuple[Tensor, Tensor]:
        """Processed logits, and the same with what truncation removed."""
        sampling = Sampling(**controls)
        z = processed_logits(logits, Controls(sampling), torch.tensor([4]), history)
        kept = keep_set(z, sampling)
        return z[0].double(), (z if kept is None else z.masked_fill(~kept, -torch.inf))[0].double()

    penalty = {"repetition_penalty": i["repetition_penalty"]}
    bans = {**penalty, "no_repeat_ngram": i["no_repeat_ngram"]}
    heated = {**bans, "temperature": i["temperature"]}
    truncated = {**heated, "top_k": i["top_k"]}
    for controls, name in (
        (penalty, "after_rep_penalty"),
        (bans, "after_no_repeat_bigram"),
        (heated, "after_temperature"),
        (truncated, "after_top_k"),
        ({**truncated, "top_p": i["top_p"]}, "after_top_p"),
        ({"temperature": 0.7, "top_p": 0.8}, "T0.7_top_p0.8_logits"),
    ):
        equal(steps(**controls)[1], o[name], atol=1e-6)
    for controls, name in (
        ({}, "raw_logp"),
        ({"temperature": 0.7}, "temperature_only_logp"),
        ({**truncated, "top_p": i["top_p"]}, "behaviour_logp"),
        ({"temperature": 0.7, "top_p": 0.8}, "T0.7_top_p0.8_logp"),
    ):
        equal(steps(**controls)[1].log_softmax(0), o[name], atol=1e-6)
    gap = steps(temperature=0.7, top_p=0.8)[1].log_softmax(0) - steps(temperature=0.7)[0].log_softmax(0)
    bias = torch.where(gap.isfinite(), gap, 0.0)
    equal(bias, o["log_ratio_bias_T0.7_top_p0.8_vs_temperature_only"], atol=1e-6)


# --- the copy and its source ----------------------------------------------------------------------------------


def test_literals_agree_with_the_fixture_file() -> None:
    shared = Path(os.environ.get("PERTOKEN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    source = shared / "fixtures" / "algorithms.json"
    if not source.exists():
        pytest.skip(f"{source} is not at hand")
    assert_within(CASES, json.loads(source.read_text(encoding="utf-8"))["cases"], path="cases")


def assert_within(part: Any, whole: Any, path: str) -> None:
    """Every number of `part` is in `whole` at the same place."""
    if isinstance(part, Mapping):
        for key, value in part.items():
            assert_within(value, whole[key], f"{path}.{key}")
    else:
        assert part == whole, path


CASES: dict[str, Any] = {
    "sampling_transforms": {
        "inputs": {
            "logits": [2.0, 1.0, 0.5, 0.0, -1.0],
            "history": [1, 4, 2, 1],
            "repetition_penalty": 1.2,
            "no_repeat_ngram": 2,
            "temperature": 0.7,
            "top_k": 3,
            "top_p": 0.9,
        },
        "outputs": {
            "raw_logp": [-0.574437939628, -1.57443793963, -2.07443793963, -2.57443793963, -3.57443793963],
            "temperature_only_logp": [-0.356391529756, -1.78496295833, -2.49924867261, -3.2135343869, -4.64210581547],
            "after_rep_penalty": [2.0, 0.833333333333, 0.416666666667, 0.0, -1.2],
            "after_no_repeat_bigram": [2.0, 0.833333333333, 0.416666666667, 0.0, "-inf"],
            "after_temperature": [2.85714285714, 1.19047619048, 0.595238095238, 0.0, "-inf"],
            "after_top_k": [2.85714285714, 1.19047619048, 0.595238095238, "-inf", "-inf"],
            "after_top_p": [2.85714285714, 1.19047619048, "-inf", "-inf", "-inf"],
            "behaviour_logp": [-0.173007988886, -1.83967465555, "-inf", "-inf", "-inf"],
            "T0.7_top_p0.8_logits": [2.85714285714, 1.42857142857, "-inf", "-inf", "-inf"],
            "T0.7_top_p0.8_logp": [-0.214829917786, -1.64340134636, "-inf", "-inf", "-inf"],
            "log_ratio_bias_T0.7_top_p0.8_vs_temperature_only": [0.141561611971, 0.141561611971, 0.0, 0.0, 0.0],
        },
    },
    "reinforce_reward_to_go": {
        "inputs": {
            "rewards": [[0.0, 0.1, -0.05, 1.0], [0.05, 0.0, -0.2, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "gamma": 0.9,
        },
        "outputs": {
            "return_gamma1": [[1.05, 1.05, 0.95, 1.0], [-0.15, -0.2, -0.2, 0.0]],
            "return_gamma0.9": [[0.7785, 0.865, 0.85, 1.0], [-0.112, -0.18, -0.2, 0.0]],
            "loss_seq_mean_token_sum_gamma0.9": 1.189175,
            "loss_with_gamma_pow_t_factor": 1.0284875,
            "loss_undiscounted_full_return_no_causality": 1.55625,
            "loss_gamma1_token_mean": 0.407142857143,
            "grad_gamma1_token_mean": [
                [-0.15, -0.15, -0.135714285714, -0.142857142857],
                [0.0214285714286, 0.0285714285714, 0.0285714285714, 0.0],
            ],
        },
    },
    "gae": {
        "inputs": {
            "rewards": [[0.0, 0.1, -0.05, 1.0], [0.05, 0.0, -0.2, 0.0]],
            "values": [[0.1, 0.2, 0.4, 0.6], [0.3, 0.1, -0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "bootstrap_row0": 0.5,
        },
        "outputs": {
            "gamma1.0_lam0.95": {
                "adv": [[0.863325, 0.8035, 0.53, 0.4], [-0.43975, -0.305, 0.1, 0.0]],
                "ret": [[0.963325, 1.0035, 0.93, 1.0], [-0.13975, -0.205, -0.2, 0.0]],
            },
            "gamma0.99_lam0.95": {
                "adv": [[0.83652583805, 0.7852481, 0.5202, 0.4], [-0.435924475, -0.30295, 0.1, 0.0]],
                "ret": [[0.93652583805, 0.9852481, 0.9202, 1.0], [-0.135924475, -0.20295, -0.2, 0.0]],
            },
            "gamma1.0_lam1.0": {
                "adv": [[0.95, 0.85, 0.55, 0.4], [-0.45, -0.3, 0.1, 0.0]],
                "ret": [[1.05, 1.05, 0.95, 1.0], [-0.15, -0.2, -0.2, 0.0]],
            },
            "gamma1.0_lam0.0": {
                "adv": [[0.1, 0.3, 0.15, 0.4], [-0.15, -0.4, 0.1, 0.0]],
                "ret": [[0.2, 0.5, 0.55, 1.0], [0.15, -0.3, -0.2, 0.0]],
            },
            "gamma0.99_lam0.95_row0_truncated_bootstrap0.5": {
                "adv": [[1.24832134009, 1.22309552375, 0.9857475, 0.895], [-0.435924475, -0.30295, 0.1, 0.0]],
                "ret": [[1.34832134009, 1.42309552375, 1.3857475, 1.495], [-0.135924475, -0.20295, -0.2, 0.0]],
            },
            "whiten_bessel_gamma1_lam0.95": [
                [1.13754253374, 1.0211037445, 0.488784331891, 0.235762307618],
                [-1.39866265303, -1.13639559325, -0.348134671475, 0.0],
            ],
            "whiten_population_gamma1_lam0.95": [
                [1.22868638904, 1.10291811993, 0.527947428738, 0.254652401845],
                [-1.51072835842, -1.22744755169, -0.376028429448, 0.0],
            ],
            "gamma1_lam0.95_row0_token1_is_observation": {
                "mask": [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
                "adv": [[0.8035, 0.0, 0.53, 0.4], [-0.43975, -0.305, 0.1, 0.0]],
                "ret": [[0.9035, 0.0, 0.93, 1.0], [-0.13975, -0.205, -0.2, 0.0]],
            },
        },
    },
    "value_loss_clipped": {
        "inputs": {
            "values_old": [[0.1, 0.2, 0.4, 0.6], [0.3, 0.1, -0.3, 0.0]],
            "values_new": [[0.15, 0.45, 0.35, 0.9], [0.05, 0.12, -0.45, 0.0]],
            "returns": [[0.963325, 1.0035, 0.93, 1.0], [-0.13975, -0.205, -0.2, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "cliprange_value": 0.2,
        },
        "outputs": {
            "loss_matrix": [[0.661497555625, 0.36421225, 0.3364, 0.04], [0.0574800625, 0.105625, 0.0625, 0.0]],
            "half_token_mean": 0.116265347723,
            "unclipped_half_token_mean": 0.108456419152,
        },
    },
    "vapo_decoupled_length_adaptive": {
        "inputs": {
            "alpha": 0.05,
            "lengths": [10, 20, 40, 100, 1000],
            "rewards": [[0.0, 0.1, -0.05, 1.0], [0.05, 0.0, -0.2, 0.0]],
            "values": [[0.1, 0.2, 0.4, 0.6], [0.3, 0.1, -0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "lambda_actor": 0.95,
            "lambda_critic": 1.0,
        },
        "outputs": {
            "lambda_clamped": [0.0, 0.0, 0.5, 0.8, 0.98],
            "adv_actor": [[0.863325, 0.8035, 0.53, 0.4], [-0.43975, -0.305, 0.1, 0.0]],
            "returns_critic": [[1.05, 1.05, 0.95, 1.0], [-0.15, -0.2, -0.2, 0.0]],
        },
    },
    "group_advantages": {
        "inputs": {"scores": [1.0, 0.0, 0.5, 0.25]},
        "outputs": {
            "rloo": [0.75, -0.583333333333, 0.0833333333333, -0.25],
            "rloo_two_samples_1_0": [1.0, -1.0],
            "mean_baseline_dr_grpo": [0.5625, -0.4375, 0.0625, -0.1875],
            "grpo_trl_ddof1_eps1e-4": [1.31715659931, -1.02445513279, 0.146350733256, -0.439052199769],
            "grpo_verl_ddof1_eps1e-6": [1.31746201277, -1.0246926766, 0.146384668086, -0.439154004258],
            "grpo_openrlhf_ddof1_eps1e-9": [1.31746509539, -1.0246950742, 0.146385010599, -0.439155031798],
            "identity_rloo_equals_k_over_k_minus_1_times_mean": [0.75, -0.583333333333, 0.0833333333333, -0.25],
        },
    },
    "kl_in_reward_variants": {
        "inputs": {
            "scores": [1.0, 0.2],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "ref_logp": [[-1.3, -0.6, -1.9, -0.25], [-0.7, -1.6, -0.55, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "beta": 0.1,
        },
        "outputs": {
            "k1": [[0.1, 0.1, -0.1, -0.05], [-0.1, 0.1, 0.15, 0.0]],
            "rloo_trl_sequence_kl_inside_baseline": [0.81, -0.81],
            "rloo_openrlhf_kl_to_go_outside_baseline": [[0.795, 0.805, 0.815, 0.805], [-0.815, -0.825, -0.815, 0.0]],
            "reinforcepp_returns": [[0.995, 1.005, 1.015, 1.005], [0.185, 0.175, 0.185, 0.0]],
            "reinforcepp_adv_whitened": [
                [0.778971718037, 0.80169172648, 0.824411734923, 0.80169172648],
                [-1.06134896583, -1.08406897427, -1.06134896583, 0.0],
            ],
        },
    },
    "aggregation": {
        "inputs": {
            "loss_matrix": [[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 9.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "L_max": 8,
        },
        "outputs": {
            "token-mean": 1.0,
            "token-sum": 7.0,
            "seq-mean-token-sum": 3.5,
            "seq-mean-token-mean": 1.125,
            "seq-mean-token-sum-norm": 0.4375,
        },
    },
    "ppo_grpo_dapo_losses": {
        "inputs": {
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "adv": [[0.5, 0.5, -1.0, 2.0], [-0.7, -0.7, 0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "L_max": 8,
        },
        "outputs": {
            "ratio": [
                [1.22140275816, 0.860707976425, 1.82211880039, 0.951229424501],
                [0.860707976425, 1.34985880758, 0.606530659713, 0.0],
            ],
            "ppo_0.2_0.2": {
                "loss_tokens": [
                    [-0.6, -0.430353988213, 1.82211880039, -1.902458849],
                    [0.602495583498, 0.944901165303, -0.181959197914, 0.0],
                ],
                "token_mean": 0.0363919305805,
                "seq_mean_token_mean": 0.0887361705449,
                "dr_grpo_Lmax8": 0.015921469629,
                "grad_token_mean": [
                    [0.0, -0.0614791411732, 0.26030268577, -0.271779835572],
                    [0.0860707976425, 0.134985880758, -0.0259941711305, 0.0],
                ],
            },
            "dapo_0.2_0.28": {
                "loss_tokens": [
                    [-0.61070137908, -0.430353988213, 1.82211880039, -1.902458849],
                    [0.602495583498, 0.944901165303, -0.181959197914, 0.0],
                ],
                "token_mean": 0.0348631621405,
                "seq_mean_token_mean": 0.0873984981599,
                "dr_grpo_Lmax8": 0.0152526334365,
                "grad_token_mean": [
                    [-0.0872430541543, -0.0614791411732, 0.26030268577, -0.271779835572],
                    [0.0860707976425, 0.134985880758, -0.0259941711305, 0.0],
                ],
            },
            "dual_clip_c3": {
                "log_ratio": [1.5, 0.3, -1.5],
                "adv": [-1, -1, -1],
                "loss": [3.0, 1.34985880758, 0.8],
                "dloss_dlogp": [0.0, 1.34985880758, 0.0],
            },
        },
    },
    "grpo_end_to_end": {
        "inputs": {
            "scores": [1.0, 0.0],
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "ref_logp": [[-1.3, -0.6, -1.9, -0.25], [-0.7, -1.6, -0.55, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "eps": 0.2,
            "beta": 0.04,
            "std_eps": 0.0001,
        },
        "outputs": {
            "adv": [0.707006795327, -0.707006795327],
            "k3": [
                [0.0408182206817, 0.00127109637602, 0.106530659713, 0.00517091807565],
                [0.0340254166877, 0.0703200460356, 0.0690675485933, 0.0],
            ],
            "loss_original_grpo": -0.0155599752645,
            "loss_k3_times_ratio_DeepSeekV3.2": -0.0151277864815,
            "loss_no_kl": -0.0174850164809,
        },
    },
    "gspo": {
        "inputs": {
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "adv_seq": [1.0, -0.5],
            "adv_token": [[0.5, 0.5, -1.0, 2.0], [-0.7, -0.7, 0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
        },
        "outputs": {
            "s": [1.16183424273, 0.889881770988],
            "eps_3e-4_4e-4": {
                "seq_loss": [-1.0004, 0.49985],
                "loss": -0.250275,
                "grad": [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
            },
            "eps_0.2_0.28": {
                "seq_loss": [-1.16183424273, 0.444940885494],
                "loss": -0.358446678617,
                "grad": [
                    [-0.145229280341, -0.145229280341, -0.145229280341, -0.145229280341],
                    [0.074156814249, 0.074156814249, 0.074156814249, 0.0],
                ],
            },
            "gspo_token_with_token_adv": {
                "loss_tokens": [
                    [-0.580917121364, -0.580917121364, 1.16183424273, -2.32366848546],
                    [0.622917239692, 0.622917239692, -0.266964531296, 0.0],
                ],
                "loss": -0.127313569334,
                "grad": [
                    [-0.0726146401705, -0.0726146401705, 0.145229280341, -0.290458560682],
                    [0.103819539949, 0.103819539949, -0.0444940885494, 0.0],
                ],
            },
        },
    },
    "tis_mis": {
        "inputs": {
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "rollout_logp": [[-1.25, -0.45, -3.0, -0.3], [-0.8, -1.4, -0.7, 0.0]],
            "adv": [[0.5, 0.5, -1.0, 2.0], [-0.7, -0.7, 0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "eps": 0.2,
        },
        "outputs": {
            "token_mask_0.5_2": {
                "weight": [[1.05127109638, 0.951229424501, 0.0, 1.0], [1.0, 0.904837418036, 1.34985880758, 0.0]],
                "loss_token_mean": -0.247246942154,
                "grad_token_mean": [
                    [0.0, -0.058480768077, 0.0, -0.271779835572],
                    [0.0860707976425, 0.122140275816, -0.0350884608462, 0.0],
                ],
            },
            "sequence_truncate_2": {
                "weight": [[2.0, 2.0, 2.0, 2.0], [1.22140275816, 1.22140275816, 1.22140275816, 0.0]],
                "loss_token_mean": -0.0790912689854,
                "grad_token_mean": [
                    [0.0, -0.122958282346, 0.52060537154, -0.543559671143],
                    [0.105127109638, 0.16487212707, -0.0317493523149, 0.0],
                ],
            },
            "sequence_mask_upper3": {
                "weight": [
                    [2.71828182846, 2.71828182846, 2.71828182846, 2.71828182846],
                    [1.22140275816, 1.22140275816, 1.22140275816, 0.0],
                ],
                "loss_token_mean": -0.193061460932,
                "grad_token_mean": [
                    [0.0, -0.16711763228, 0.707576060628, -0.738774188376],
                    [0.105127109638, 0.16487212707, -0.0317493523149, 0.0],
                ],
            },
            "geometric_mask_0.9_1.2_token_weights_raw": {
                "weight": [[0.0, 0.0, 0.0, 0.0], [1.0, 0.904837418036, 1.34985880758, 0.0]],
                "loss_token_mean": 0.173122612612,
                "grad_token_mean": [[0.0, 0.0, 0.0, 0.0], [0.0860707976425, 0.122140275816, -0.0350884608462, 0.0]],
            },
            "rho_token": [
                [1.05127109638, 0.951229424501, 2.71828182846, 1.0],
                [1.0, 0.904837418036, 1.34985880758, 0.0],
            ],
            "token_truncate_2": {
                "weight": [[1.05127109638, 0.951229424501, 2.0, 1.0], [1.0, 0.904837418036, 1.34985880758, 0.0]],
                "loss_token_mean": 0.273358429386,
                "grad_token_mean": [
                    [0.0, -0.058480768077, 0.52060537154, -0.271779835572],
                    [0.0860707976425, 0.122140275816, -0.0350884608462, 0.0],
                ],
            },
            "bypass_reinforce_token_truncate_2": {
                "weight": [
                    [1.28402541669, 0.818730753078, 2.0, 0.951229424501],
                    [0.860707976425, 1.22140275816, 0.818730753078, 0.0],
                ],
                "loss_token_mean": -0.371904431086,
            },
        },
    },
    "kl_estimators": {
        "inputs": {
            "logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "ref_logp": [[-1.3, -0.6, -1.9, -0.25], [-0.7, -1.6, -0.55, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
        },
        "outputs": {
            "k1": [[0.3, -0.05, 0.5, -0.1], [-0.25, 0.4, -0.35, 0.0]],
            "k2": [[0.045, 0.00125, 0.125, 0.005], [0.03125, 0.08, 0.06125, 0.0]],
            "k3": [
                [0.0408182206817, 0.00127109637602, 0.106530659713, 0.00517091807565],
                [0.0340254166877, 0.0703200460356, 0.0690675485933, 0.0],
            ],
            "token_mean": {"k1": 0.0642857142857, "k2": 0.0498214285714, "k3": 0.0467434151661},
            "dk1_dlogp": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "dk2_dlogp": [[0.3, -0.05, 0.5, -0.1], [-0.25, 0.4, -0.35, 0.0]],
            "dk3_dlogp": [
                [0.259181779318, -0.051271096376, 0.393469340287, -0.105170918076],
                [-0.284025416688, 0.329679953964, -0.419067548593, 0.0],
            ],
            "d_ratio_k3_dlogp_at_ratio1": [[0.3, -0.05, 0.5, -0.1], [-0.25, 0.4, -0.35, 0.0]],
        },
    },
    "kl_gradients_one_token_exact_expectation": {
        "inputs": {"logits": [0.2, -0.1, 0.5, -0.6], "ref_logits": [0.0, 0.3, 0.1, -0.4]},
        "outputs": {
            "reverse_kl": 0.0529517236374,
            "forward_kl": 0.0547197819749,
            "E_k2": 0.0518441504853,
            "E_k3": 0.0529517236374,
            "expected_gradients_wrt_logits": {
                "exact_grad_reverse_kl": [0.028268501805, -0.10462037653, 0.114421566511, -0.0380696917862],
                "exact_grad_forward_kl": [0.0400817092706, -0.117940424017, 0.113417895168, -0.0355591804219],
                "k1_in_loss": [0.0, 0.0, 0.0, 0.0],
                "k2_in_loss": [0.028268501805, -0.10462037653, 0.114421566511, -0.0380696917862],
                "k3_in_loss": [0.0400817092706, -0.117940424017, 0.113417895168, -0.0355591804219],
                "k1_in_reward_detached": [0.028268501805, -0.10462037653, 0.114421566511, -0.0380696917862],
                "k3_in_reward_detached": [-0.0118132074656, 0.0133200474869, 0.00100367134296, -0.00251051136428],
                "ratio_times_k3_in_loss": [0.028268501805, -0.10462037653, 0.114421566511, -0.0380696917862],
                "ratio_times_k1_in_loss": [0.028268501805, -0.10462037653, 0.114421566511, -0.0380696917862],
            },
        },
    },
    "kl_gradients_two_token_sequence": {
        "inputs": {
            "logits_a_b0_b1": [0.3, -0.5, 0.8],
            "ref_logits_a_b0_b1": [-0.2, 0.4, 0.1],
            "model": "P(t1=1)=sigmoid(a); P(t2=1|t1)=sigmoid(b_t1)",
        },
        "outputs": {
            "sequence_kl": 0.105528168048,
            "grad_true": [0.111748363769, -0.090006829474, 0.0860151771077],
            "grad_k1_reward_to_go": [0.111748363769, -0.090006829474, 0.0860151771077],
            "grad_own_token_only_partial": [0.122229155845, -0.090006829474, 0.0860151771077],
            "grad_k2_token_loss_partial": [0.122229155845, -0.090006829474, 0.0860151771077],
            "grad_k3_token_loss": [0.124276514124, -0.0941107570384, 0.0947803117456],
        },
    },
    "kl_controllers": {
        "inputs": {"beta": 0.2, "kl": 8.0, "target": 6.0, "n_steps": 256, "horizon": 10000},
        "outputs": {"ziegler_trl_verl": 0.201024},
    },
    "prefix_metric_deltas": {
        "inputs": {"metric_of_prefix_0_to_4": [0.0, 0.2, 0.5, 0.4, 0.8], "gamma": 0.9},
        "outputs": {
            "delta_rewards": [0.2, 0.3, -0.1, 0.4],
            "gamma1_return_to_go": [0.8, 0.6, 0.3, 0.4],
            "gamma1_sparse_return_minus_potential": [0.8, 0.6, 0.3, 0.4],
            "invariant_shaped_rewards_gamma0.9": [0.18, 0.25, -0.14, 0.4],
            "invariant_return_to_go": [0.5832, 0.448, 0.22, 0.4],
            "sparse_return_minus_potential_gamma0.9": [0.5832, 0.448, 0.22, 0.4],
            "naive_delta_return_gamma0.9_NOT_invariant": [0.6806, 0.534, 0.26, 0.4],
        },
    },
    "redistribution_gradient_bias": {
        "inputs": {
            "logits_a_b0_b1": [0.3, -0.5, 0.8],
            "R": {"00": 0.2, "01": -0.5, "10": 1.0, "11": 0.3},
            "attention_share_on_token1": {"00": 0.3, "01": 0.8, "10": 0.6, "11": 0.1},
            "prefix_score": {"0": 0.4, "1": -0.7},
        },
        "outputs": {
            "sparse": [0.142102719759, -0.0700053118131, -0.0860151771077],
            "attention_redistribution": [0.142102719759, -0.0240018211931, -0.0159742471771],
            "prefix_difference": [0.142102719759, -0.0700053118131, -0.0860151771077],
        },
    },
    "optimal_token_baseline": {
        "inputs": {
            "rewards": [[0.0, 0.1, -0.05, 1.0], [0.05, 0.0, -0.2, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "sum_pi_squared": [[0.3, 0.5, 0.2, 0.6], [0.35, 0.25, 0.55, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
        },
        "outputs": {
            "w": [
                [0.697611576176, 0.286938680575, 0.929329433527, 0.118363558637],
                [0.451342071766, 0.803739679703, 0.209359907929, 0.0],
            ],
            "cumulative_w": [
                [0.697611576176, 0.98455025675, 1.91387969028, 2.03224324891],
                [0.451342071766, 1.25508175147, 1.4644416594, 0.0],
            ],
            "baseline": [0.578605446464, 0.349504477935, 0.451495642804, 0.999999995079],
            "adv_no_tail_rule": [
                [0.471394553536, 0.700495522065, 0.498504357196, 4.92067075974e-09],
                [-0.728605446464, -0.549504477935, -0.651495642804, 0.0],
            ],
            "adv_zero_tail": [
                [0.471394553536, 0.700495522065, 0.498504357196, 1.0],
                [-0.728605446464, -0.549504477935, -0.651495642804, 0.0],
            ],
        },
    },
    "sapo_dppo_gmpo": {
        "inputs": {
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "adv": [[0.5, 0.5, -1.0, 2.0], [-0.7, -0.7, 0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "dppo_tv": 0.05,
        },
        "outputs": {
            "dppo_tv_keep": [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]],
            "dppo_tv_loss": -0.367927678757,
        },
    },
    "cispo": {
        "inputs": {
            "new_logp": [[-1.0, -0.65, -1.4, -0.35], [-0.95, -1.2, -0.9, 0.0]],
            "old_logp": [[-1.2, -0.5, -2.0, -0.3], [-0.8, -1.5, -0.4, 0.0]],
            "adv": [[0.5, 0.5, -1.0, 2.0], [-0.7, -0.7, 0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
        },
        "outputs": {
            "verl_slime_nemo_0.2_0.28": {
                "weight": [[1.22140275816, 0.860707976425, 1.28, 0.951229424501], [0.860707976425, 1.28, 0.8, 0.0]],
                "loss_token_mean": -0.238182676536,
                "grad_token_mean": [
                    [-0.0872430541543, -0.0614791411732, 0.182857142857, -0.271779835572],
                    [0.0860707976425, 0.128, -0.0342857142857, 0.0],
                ],
            },
            "open_instruct_upper_only_1.272": {
                "weight": [
                    [1.22140275816, 0.860707976425, 1.272, 0.951229424501],
                    [0.860707976425, 1.272, 0.606530659713, 0.0],
                ],
                "loss_token_mean": -0.243085065376,
                "grad_token_mean": [
                    [-0.0872430541543, -0.0614791411732, 0.181714285714, -0.271779835572],
                    [0.0860707976425, 0.1272, -0.0259941711305, 0.0],
                ],
            },
            "trl_absolute_cap_5.0": {
                "weight": [
                    [1.22140275816, 0.860707976425, 1.82211880039, 0.951229424501],
                    [0.860707976425, 1.34985880758, 0.606530659713, 0.0],
                ],
                "loss_token_mean": -0.362451882363,
                "grad_token_mean": [
                    [-0.0872430541543, -0.0614791411732, 0.26030268577, -0.271779835572],
                    [0.0860707976425, 0.134985880758, -0.0259941711305, 0.0],
                ],
            },
        },
    },
    "entropy_selection": {
        "inputs": {
            "entropy": [[0.1, 1.2, 2.0, 0.4], [0.9, 0.05, 1.6, 7.0]],
            "adv": [[0.5, 0.5, -1.0, 2.0], [-0.7, -0.7, 0.3, 0.0]],
            "mask": [[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]],
            "rho": 0.2,
            "alpha": 0.4,
            "kappa": 2.0,
        },
        "outputs": {
            "top20pct_mask": [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
            "entropy_shaped_adv": [[0.54, 0.75, -0.5, 2.16], [-0.35, -0.68, 0.45, 0.0]],
        },
    },
    "abc_and_red": {
        "inputs": {
            "attention_last_row": [0.1, 0.2, 0.3, 0.4],
            "rm_score": 1.5,
            "abc_beta": 0.8,
        },
        "outputs": {
            "abc_rewards": [0.12, 0.24, 0.36, 0.78],
        },
    },
    "occlusion_shapley": {
        "inputs": {
            "v": {"": 0.0, "0": 0.1, "1": 0.0, "2": 0.2, "0,1": 0.5, "0,2": 0.4, "1,2": 0.2, "0,1,2": 1.0},
        },
        "outputs": {
            "shapley": [0.416666666667, 0.266666666667, 0.316666666667],
            "shapley_sum": 1.0,
            "leave_one_out": [0.8, 0.6, 0.5],
            "leave_one_out_sum": 1.9,
            "prefix_delta": [0.1, 0.4, 0.5],
        },
    },
    "macro_actions": {
        "inputs": {
            "rewards": [0.0, 0.1, -0.05, 1.0],
            "values": [0.1, 0.2, 0.4, 0.6],
            "n": 2,
            "gamma": 1.0,
            "lam": 0.95,
        },
        "outputs": {
            "adv_paper": [0.8775, 0.8775, 0.45, 0.45],
            "returns": [1.0275, 0.95],
        },
    },
}
