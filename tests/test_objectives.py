"""Losses: hand numbers, invariances, gradients against finite differences, and the traps other systems fell into."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from pertoken import objectives
from pertoken.objectives import AdaptiveKL, FixedKL, aggregate, count, policy_loss
from pertoken.types import Credit, PolicyOutput, TokenBatch

OVERS = ("token", "sequence", "constant")


def f64(numbers: object) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def equal(got: Tensor, expected: object, atol: float = 1e-12) -> None:
    expected = expected if isinstance(expected, Tensor) else f64(expected)
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=atol)


def token_batch(action_mask: Tensor, sample_logprobs: Tensor) -> TokenBatch:
    rows = len(action_mask)
    return TokenBatch(
        tokens=torch.ones_like(action_mask).long(),
        attention_mask=torch.ones_like(action_mask),
        action_mask=action_mask,
        sample_logprobs=sample_logprobs,
        env_rewards=torch.zeros_like(sample_logprobs),
        turn=torch.ones_like(action_mask).long(),
        group=torch.zeros(rows, dtype=torch.long),
        terminated=torch.ones(rows, dtype=torch.bool),
        episode_ids=tuple(str(i) for i in range(rows)),
    )


class Case:
    """Random arguments of `policy_loss` and `critic_loss`: rows of unequal length, with holes; `x` has gradient."""

    def __init__(self, seed: int = 0, rows: int = 4, width: int = 7, off_policy: float = 0.3) -> None:
        g = torch.Generator().manual_seed(seed)

        def random(scale: float = 1.0) -> Tensor:
            return scale * torch.randn(rows, width, generator=g, dtype=torch.float64)

        self.mask = torch.rand(rows, width, generator=g) < 0.6
        self.mask[:, 0] = False
        self.mask[0, 1:] = True
        base = -random().abs()
        self.x = (base + random(off_policy)).requires_grad_()
        self.entropy, self.values = random().abs().requires_grad_(), random().requires_grad_()
        self.old = PolicyOutput(base, random().abs(), values=random())
        self.ref = PolicyOutput(base + random(0.5), random().abs())
        self.credit = Credit(random(), returns=random())
        self.batch = token_batch(self.mask, base + random(0.5))

    @property
    def new(self) -> PolicyOutput:
        return PolicyOutput(self.x, self.entropy, values=self.values)

    def poisoned(self, garbage: float) -> "Case":
        """The same with garbage in the masked cells of everything."""
        other = Case.__new__(Case)

        def spoil(x: Tensor) -> Tensor:
            return torch.where(self.mask, x.detach(), garbage)

        def spoil_output(out: PolicyOutput) -> PolicyOutput:
            values = None if out.values is None else spoil(out.values)
            return PolicyOutput(spoil(out.logprobs), spoil(out.entropy), values=values)

        assert self.credit.returns is not None
        other.mask, other.old, other.ref = self.mask, spoil_output(self.old), spoil_output(self.ref)
        other.x = spoil(self.x).requires_grad_()
        other.entropy, other.values = spoil(self.entropy).requires_grad_(), spoil(self.values).requires_grad_()
        other.credit = Credit(spoil(self.credit.advantages), spoil(self.credit.returns))
        other.batch = token_batch(self.mask, spoil(self.batch.sample_logprobs))
        return other

    def policy(self, **choices: Any) -> objectives.TokenLoss:
        return policy_loss(self.new, self.old, self.ref, self.credit, self.batch, **choices)


CHOICES: dict[str, dict[str, Any]] = {
    "reinforce": {"surrogate": "policy_gradient"},
    "ppo": {},
    "dapo": {"clip_high": 0.28},
    "dual clip": {"dual_clip": 1.1},
    "gspo": {"level": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    "gspo-token": {"level": "sequence_token", "clip_low": 0.05, "clip_high": 0.05},
    "cispo": {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1},
    "dppo": {"surrogate": "dppo", "clip_low": 0.05, "clip_high": 0.05},
    "tis": {"importance_cap": 1.2},
    "tis by sequence": {"importance_cap": 1.2, "importance_level": "sequence"},
    "icepop": {"importance_cap": 1.2, "importance_floor": 0.8, "importance_outside": "mask"},
    "mis": {"importance_cap": 1.1, "importance_level": "geometric", "importance_outside": "mask"},
    "grpo": {"kl_coefficient": 0.5, "kl_estimator": "k3"},
    "k2": {"kl_coefficient": 0.5, "kl_estimator": "k2"},
    "ratio k3": {"kl_coefficient": 0.5},
    "entropy": {"entropy_coefficient": 0.3},
    "all": {"importance_cap": 1.2, "kl_coefficient": 0.5, "entropy_coefficient": 0.3, "dual_clip": 1.1},
}
every_choice = pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES.keys())
one_action = torch.tensor([[True]])


# --- hand numbers -------------------------------------------------------------------------------------------


def test_ratio_levels_with_a_hole() -> None:
    new, old = f64([[9, -1, 9, -2, 9]]), f64([[7, -1.2, 0, -1.6, 1]])
    mask = torch.tensor([[False, True, False, True, False]])
    token, mean = [torch.tensor(x).exp().item() for x in (0.2, -0.4)], torch.tensor(-0.1).exp().item()
    equal(objectives.ratio(new, old, mask), [[1, token[0], 1, token[1], 1]], atol=1e-7)
    for level in ("sequence", "sequence_token"):
        equal(objectives.ratio(new, old, mask, level=level), [[1, mean, 1, mean, 1]], atol=1e-7)


@pytest.mark.parametrize(
    ("w", "advantage", "loss", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -1.0),
        (1.5, -1.0, 1.5, 1.0),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 2.0, -2.2, -2.0),
        (1.1, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_by_hand(w: float, advantage: float, loss: float, slope: float) -> None:
    ratio = f64([[w]]).requires_grad_()
    got = objectives.clipped_surrogate(ratio, f64([[advantage]]), one_action, clip_low=0.2, clip_high=0.2)
    equal(got, [[loss]])
    equal(torch.autograd.grad(got.sum(), ratio)[0], [[slope]])


def test_clip_range_has_two_sides() -> None:
    w, up = f64([[1.25, 0.7]]), torch.ones(1, 2, dtype=torch.bool)
    got = objectives.clipped_surrogate(w, f64([[1, -1]]), up, clip_low=0.4, clip_high=0.1)
    equal(got, [[-1.1, 0.7]])


def test_dppo_leaves_out_what_has_moved_far_already_and_keeps_what_moves_back() -> None:
    """Probabilities 0.2 and 0.8, each way, for a good and a bad token; the bounds themselves are kept."""
    new, old = f64([[0.8, 0.8, 0.2, 0.2]]).log().requires_grad_(), f64([[0.2, 0.2, 0.8, 0.8]]).log()
    up, advantages = torch.ones(1, 4, dtype=torch.bool), f64([[1, -1, 1, -1]])
    loss, left_out = objectives.dppo(new, old, advantages, up, clip_low=0.5, clip_high=0.5)
    assert left_out.tolist() == [[True, False, False, True]]
    equal(torch.autograd.grad(loss.sum(), new)[0], [[0, 4, -0.25, 0]])
    for side in ({"clip_low": 0.5, "clip_high": 0.7}, {"clip_low": 0.7, "clip_high": 0.5}):
        assert objectives.dppo(new, old, advantages, up, **side)[1].sum() == 1
    nothing = objectives.dppo(new, old, torch.zeros_like(old), up, clip_low=0.5, clip_high=0.5)[1]
    assert nothing.tolist() == [[False, False, True, True]]
    for start, end, sign in ((0.5, 1.0, 1.0), (1.0, 0.5, -1.0)):  # a move of 0.5 is on the bound, and counts
        there, back = f64([[end]]).log(), f64([[start]]).log()
        assert not objectives.dppo(there, back, f64([[sign]]), one_action, clip_low=0.5, clip_high=0.5)[1]
    weight = objectives.dppo(f64([[-1.0]]), f64([[-9.0]]), f64([[1.0]]), one_action, clip_low=0.5, clip_high=0.5)[0]
    equal(weight, [[20.0]])


def test_dual_clip_bounds_bad_tokens_only() -> None:
    w, mask = f64([[9, 9, 2]]), torch.ones(1, 3, dtype=torch.bool)
    got = objectives.clipped_surrogate(w, f64([[-1, 1, -1]]), mask, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    equal(got, [[3, -1.2, 2]])


def test_value_loss_by_hand() -> None:
    # unclipped 0.5 * 0.8^2; clipped to 0.2: 0.5 * 0.8^2 is worse than 0.5 * 0.5^2
    values, old, returns = f64([[0.2, 0.5]]), f64([[1.0, 0.0]]), f64([[1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    equal(objectives.value_loss(values, old, returns, mask), [[0.32, 0.125]])
    equal(objectives.value_loss(values, old, returns, mask, clip=0.2), [[0.32, 0.32]])


def test_policy_loss_is_the_sum_of_its_parts() -> None:
    c = Case(1)
    loss = c.policy(importance_cap=1.2, kl_coefficient=0.5, kl_estimator="k3", entropy_coefficient=0.3)
    w = objectives.ratio(c.x, c.old.logprobs, c.mask)
    surrogate = objectives.clipped_surrogate(w, c.credit.advantages, c.mask, clip_low=0.2, clip_high=0.2)
    weight = (c.old.logprobs - c.batch.sample_logprobs).exp().clamp_max(1.2)
    kl = objectives.kl_per_token(c.x, c.ref.logprobs, c.mask, estimator="k3")
    equal(loss.per_token, torch.where(c.mask, surrogate * weight + 0.5 * kl - 0.3 * c.entropy, 0.0).detach())
    assert set(loss.aux) == {"ratio", "clipped", "kl", "importance_weight"}
    equal(loss.aux["importance_weight"], torch.where(c.mask, weight, 0.0))
    equal(loss.aux["kl"], torch.where(c.mask, c.x.detach() - c.ref.logprobs, 0.0))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_marks_exactly_the_actions_whose_gradient_is_cut(level: Any) -> None:
    c = Case(2, off_policy=0.6)
    loss = c.policy(level=level)
    w, advantages = loss.aux["ratio"], c.credit.advantages
    expected = c.mask & (((advantages > 0) & (w > 1.2)) | ((advantages < 0) & (w < 0.8)))
    equal(loss.aux["clipped"], expected.double())
    assert 0 < expected.sum() < c.mask.sum()
    if level == "token":
        slope = torch.autograd.grad(loss.per_token.sum(), c.x)[0]
        assert torch.equal(slope == 0, expected | ~c.mask)


def test_cispo_marks_the_weights_that_it_cut_and_still_moves_them() -> None:
    c = Case(2, off_policy=0.6)
    loss = c.policy(surrogate="cispo", clip_low=0.3, clip_high=0.2)
    w = loss.aux["ratio"]
    expected = c.mask & ((w > 1.2) | (w < 0.7))
    equal(loss.aux["clipped"], expected.double())
    assert 0 < expected.sum() < c.mask.sum()
    slope = torch.autograd.grad(loss.per_token.sum(), c.x)[0]
    equal(slope, torch.where(c.mask, -w.clamp(0.7, 1.2) * c.credit.advantages, 0.0))


def test_what_importance_weights_leave_of_a_sample() -> None:
    assert objectives.effective_share(f64([2.0, 2.0])) == 1.0
    assert objectives.effective_share(f64([3.0, 1.0])) == pytest.approx(16 / 20)
    assert objectives.effective_share(f64([0.0, 0.0, 0.0])) == 0.0
    assert objectives.effective_share(f64([])) == 0.0


def test_what_importance_weights_leave_out() -> None:
    """Ratios 1, 2, 1/2: products 1; 4 and 1/4 in the second row, whose geometric mean is below 1."""
    log2 = torch.tensor(2.0, dtype=torch.float64).log().item()
    old, mask = f64([[0, log2, -log2], [log2, -3 * log2, 0]]), torch.tensor([[True, True, True], [True, True, False]])
    sample, weights = torch.zeros_like(old), objectives.importance_weights
    equal(weights(old, sample, mask, high=1.5), [[1, 1.5, 0.5], [1.5, 0.125, 0]])
    equal(weights(old, sample, mask, high=1.5, outside="mask"), [[1, 0, 0.5], [0, 0.125, 0]])
    equal(weights(old, sample, mask, high=9.0, low=0.2, outside="mask"), [[1, 2, 0.5], [2, 0, 0]])
    equal(weights(old, sample, mask, high=9.0, level="sequence"), [[1, 1, 1], [0.25, 0.25, 0]])
    equal(weights(old, sample, mask, high=9.0, low=0.3, level="sequence", outside="mask"), [[1, 1, 1], [0, 0, 0]])
    equal(
        weights(old, sample, mask, high=1.1, low=0.3, level="geometric", outside="mask"), [[1, 2, 0.5], [2, 0.125, 0]]
    )
    with pytest.raises(ValueError, match="outside='mask'"):
        weights(old, sample, mask, high=1.1, level="geometric")
    with pytest.raises(ValueError, match="outside='mask'"):
        weights(old, sample, mask, high=1.1, low=0.5)


@pytest.mark.parametrize("outside", ["truncate", "mask"])
def test_a_sampler_that_says_nan_is_not_taken_for_weight_0(outside: Any) -> None:
    got = objectives.importance_weights(f64([[0.0]]), f64([[torch.nan]]), one_action, high=2.0, outside=outside)
    assert bool(got.isnan().all())


def test_critic_loss_reports_its_error() -> None:
    c = Case(3)
    loss = objectives.critic_loss(c.new, c.old, c.credit, c.batch, clip=0.2)
    assert c.credit.returns is not None
    equal(loss.aux["value_error"], torch.where(c.mask, c.credit.returns - c.values.detach(), 0.0))
    assert not loss.aux["value_error"].requires_grad


def test_missing_inputs_are_named() -> None:
    c = Case(4)
    with pytest.raises(ValueError, match="ref is None"):
        policy_loss(c.new, c.old, None, c.credit, c.batch, kl_coefficient=0.1)
    with pytest.raises(ValueError, match="value head"):
        objectives.critic_loss(c.new, c.old, Credit(c.credit.advantages), c.batch)
    with pytest.raises(ValueError, match="pass denominator"):
        aggregate(c.x, c.mask, over="constant")


# --- invariances --------------------------------------------------------------------------------------------


@every_choice
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_garbage_in_masked_cells_reaches_neither_loss_nor_gradient(choices: dict[str, Any], garbage: float) -> None:
    clean, dirty = Case(5), Case(5).poisoned(garbage)
    losses = [c.policy(**choices) for c in (clean, dirty)]
    equal(losses[1].per_token, losses[0].per_token.detach())
    assert bool((losses[1].per_token[~dirty.mask] == 0).all())
    for over in ("token", "sequence"):
        gradients = [
            torch.autograd.grad(aggregate(loss.per_token, c.mask, over=over), c.x, retain_graph=True)[0]
            for loss, c in zip(losses, (clean, dirty), strict=True)
        ]
        equal(gradients[1], gradients[0])
    for name, figure in losses[1].aux.items():
        equal(figure, losses[0].aux[name])


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_in_masked_cells_does_not_reach_the_critic(clip: float | None, garbage: float) -> None:
    results = []
    for c in (Case(6), Case(6).poisoned(garbage)):
        loss = objectives.critic_loss(c.new, c.old, c.credit, c.batch, clip=clip)
        results.append((loss, torch.autograd.grad(aggregate(loss.per_token, c.mask), c.values)[0]))
    (clean, clean_gradient), (dirty, dirty_gradient) = results
    equal(dirty.per_token, clean.per_token.detach())
    equal(dirty.aux["value_error"], clean.aux["value_error"])
    equal(dirty_gradient, clean_gradient)


@every_choice
def test_row_order_changes_nothing(choices: dict[str, Any]) -> None:
    c, order = Case(7), torch.tensor([2, 0, 3, 1])
    shuffled = policy_loss(
        c.new.rows(order), c.old.rows(order), c.ref.rows(order), c.credit.rows(order), c.batch.rows(order), **choices
    )
    equal(shuffled.per_token, c.policy(**choices).per_token.detach()[order])


def split_result(c: Case, cuts: list[list[int]], over: Any, choices: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the batch, computed part by part; each part is trimmed to its own width."""
    denominator = 4 * 32 if over == "constant" else count(c.mask, over=over)
    total, slope = f64(0.0), torch.zeros_like(c.x)
    for rows in cuts:
        index = torch.tensor(rows)
        parts = (x.rows(index) for x in (c.new, c.old, c.ref, c.credit, c.batch))
        loss = aggregate(policy_loss(*parts, **choices).per_token, c.mask[index], over=over, denominator=denominator)
        total, slope = total + loss.detach(), slope + torch.autograd.grad(loss, c.x)[0]
    return total, slope


@every_choice
@pytest.mark.parametrize("over", OVERS)
def test_trap_19_any_split_gives_the_gradient_of_one_batch(over: str, choices: dict[str, Any]) -> None:
    c = Case(8, rows=8)
    c.mask[3] = False  # a filtered row
    whole = split_result(c, [list(range(8))], over, choices)
    for cuts in ([[i] for i in range(8)], [[0, 1, 2, 3], [4, 5, 6, 7]], [[7, 2], [3], [0, 6, 5, 1, 4]]):
        for got, expected in zip(split_result(c, cuts, over, choices), whole, strict=True):
            equal(got, expected)


@pytest.mark.parametrize("over", ["token", "sequence"])
def test_the_default_denominator_is_that_of_the_batch(over: Any) -> None:
    c = Case(9)
    own = aggregate(c.x, c.mask, over=over)
    equal(own, aggregate(c.x, c.mask, over=over, denominator=count(c.mask, over=over)).detach())


def test_rows_without_actions_are_not_counted() -> None:
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    assert (count(mask, over="token"), count(mask, over="sequence")) == (3, 2)
    equal(aggregate(f64([[1, 3], [4, 9], [9, 9]]), mask, over="sequence"), 3.0)


def test_rows_that_are_segments_are_averaged_over_the_length_of_their_text() -> None:
    losses, mask = f64([[1, 2], [6, 0], [9, 9]]), torch.tensor([[True, True], [True, False], [False, False]])
    lengths = torch.tensor([3, 3, 0])
    equal(aggregate(losses, mask, over="sequence", denominator=1, lengths=lengths), 3.0)
    equal(aggregate(losses, mask, over="token", lengths=lengths), 3.0)


def test_means_of_means_are_not_the_mean() -> None:
    losses, mask = f64([[1, 1], [4, 0]]), torch.tensor([[True, True], [True, False]])
    equal(aggregate(losses, mask), 2.0)
    equal((aggregate(losses[:1], mask[:1]) + aggregate(losses[1:], mask[1:])) / 2, 2.5)


@pytest.mark.parametrize("over", OVERS)
@pytest.mark.parametrize("denominator", [None, 0, 7])
def test_a_batch_without_actions_is_zero_with_zero_gradient(over: Any, denominator: int | None) -> None:
    if over == "constant" and denominator is None:
        denominator = 8
    c = Case(10)
    c.mask[:] = False
    loss = aggregate(c.policy(**CHOICES["all"]).per_token, c.mask, over=over, denominator=denominator)
    assert loss.item() == 0.0
    equal(torch.autograd.grad(loss, c.x)[0], torch.zeros_like(c.x))


# --- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CHOICES if name not in ("gspo-token", "cispo", "dppo")])
@pytest.mark.parametrize("over", ["token", "sequence"])
def test_gradient_equals_finite_differences(name: str, over: Any) -> None:
    """All but gspo-token, cispo and dppo, whose gradients are by design not those of their values."""
    c = Case(11, rows=3, width=5)

    def loss_of(x: Tensor, entropy: Tensor) -> Tensor:
        new = PolicyOutput(x, entropy)
        return aggregate(
            policy_loss(new, c.old, c.ref, c.credit, c.batch, **CHOICES[name]).per_token, c.mask, over=over
        )

    assert torch.autograd.gradcheck(loss_of, (c.x, c.entropy), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_critic_gradient_equals_finite_differences(clip: float | None) -> None:
    c = Case(12, rows=3, width=5)

    def loss_of(values: Tensor) -> Tensor:
        new = PolicyOutput(c.old.logprobs, c.old.entropy, values=values)
        return aggregate(objectives.critic_loss(new, c.old, c.credit, c.batch, clip=clip).per_token, c.mask)

    assert torch.autograd.gradcheck(loss_of, (c.values,), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["ppo", "dapo", "dual clip", "gspo-token", "cispo", "dppo"])
def test_on_policy_every_surrogate_has_the_policy_gradient(name: str) -> None:
    c = Case(13, off_policy=0.0)
    expected = torch.autograd.grad(c.policy(surrogate="policy_gradient").per_token.sum(), c.x)[0]
    equal(torch.autograd.grad(c.policy(**CHOICES[name]).per_token.sum(), c.x)[0], expected)


def test_on_policy_gspo_has_the_policy_gradient_of_the_rows_mean_advantage() -> None:
    c = Case(14, off_policy=0.0)
    advantages = c.credit.advantages
    mean = torch.where(c.mask, advantages, 0.0).sum(1, keepdim=True) / c.mask.sum(1, keepdim=True).clamp_min(1)
    expected = objectives.policy_gradient(c.x, mean.expand_as(advantages), c.mask)
    got = c.policy(level="sequence")
    equal(torch.autograd.grad(got.per_token.sum(), c.x)[0], torch.autograd.grad(expected.sum(), c.x)[0])


def test_constants_get_no_gradient() -> None:
    c = Case(15)
    constants = [c.old.logprobs, c.ref.logprobs, c.credit.advantages, c.batch.sample_logprobs]
    for x in constants:
        x.requires_grad_()
    for choices in CHOICES.values():
        loss = c.policy(**choices)
        assert all(g is None for g in torch.autograd.grad(loss.per_token.sum(), constants, allow_unused=True))
        assert not any(figure.requires_grad for figure in loss.aux.values())


@pytest.mark.parametrize("log_ratio", [50.0, -50.0, 1e4, -torch.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_stay_finite(
    log_ratio: float, advantage: float, dual_clip: float | None, level: Any, dtype: torch.dtype
) -> None:
    x = torch.tensor([[-1.0, log_ratio]], dtype=dtype, requires_grad=True)
    mask, old = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-1.0, 0.0]], dtype=dtype)
    w = objectives.ratio(x, old, mask, level=level)
    advantages = torch.full_like(old, advantage)
    loss = objectives.clipped_surrogate(w, advantages, mask, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)
    assert bool(loss.isfinite().all())
    assert bool(torch.autograd.grad(loss.sum(), x)[0].isfinite().all())
    if log_ratio > 0 and advantage > 0:
        assert loss[0, 1].item() == pytest.approx(-1.2)


@pytest.mark.parametrize("gap", [50.0, -50.0, torch.inf, -torch.inf])
def test_extreme_mismatch_is_capped(gap: float) -> None:
    weights = objectives.truncated_importance_weights(f64([[gap]]), f64([[0.0]]), one_action, cap=2.0)
    equal(weights, [[2.0 if gap > 0 else 0.0]], atol=1e-8)


@pytest.mark.parametrize("difference", [50.0, -50.0])
@pytest.mark.parametrize("estimator", ["k2", "k3", "ratio_k3"])
def test_extreme_kl_stays_finite(difference: float, estimator: Any) -> None:
    x = torch.tensor([[difference]], requires_grad=True)
    loss = objectives.kl_loss(x, torch.zeros(1, 1), torch.zeros(1, 1), one_action, estimator=estimator)
    assert bool(loss.isfinite().all())
    assert bool(torch.autograd.grad(loss.sum(), x)[0].isfinite().all())


def test_exact_kl_takes_what_was_scored_and_nothing_in_its_place() -> None:
    """Value and gradient are tested where the vocabulary is known (test_scoring); here: who asks for it, gets it."""
    zeros, yes = f64([[0.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    kl = f64([[7.0, 0.5]]).requires_grad_()
    new, ref = PolicyOutput(zeros, zeros, kl=kl), PolicyOutput(zeros, zeros)
    mask, one = torch.tensor([[False, True]]), torch.tensor([1])
    batch = TokenBatch(yes.long(), yes, mask, zeros, zeros, yes.long(), one, one.bool(), ("a",))
    settings: dict[str, Any] = {"kl_coefficient": 0.1, "kl_estimator": "exact"}
    loss = objectives.policy_loss(new, ref, ref, Credit(zeros), batch, **settings)
    equal(loss.per_token, [[0.0, 0.05]])
    equal(torch.autograd.grad(loss.per_token.sum(), kl)[0], [[0.0, 0.1]])
    with pytest.raises(ValueError, match="score the new policy against the reference"):
        objectives.policy_loss(ref, ref, ref, Credit(zeros), batch, **settings)


def test_a_token_that_the_reference_forbids_costs_infinity_and_not_nan() -> None:
    kl = objectives.kl_per_token(f64([[-1.0]]), f64([[-torch.inf]]), one_action, estimator="k1")
    assert kl.item() == torch.inf


# --- further traps ----------------------------------------------------------------------------------------------


def test_trap_20_length_bias_of_each_aggregation() -> None:
    """The weight of one token in a row of 1 and in a row of 4: the documented choice."""
    mask = torch.tensor([[True, False, False, False], [True, True, True, True]])
    losses = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    for over, short, long in (("token", 1 / 5, 1 / 5), ("sequence", 1 / 2, 1 / 8), ("constant", 1 / 16, 1 / 16)):
        loss = aggregate(losses, mask, over=over, denominator=16 if over == "constant" else None)
        weight = torch.autograd.grad(loss, losses)[0]
        equal(weight, [[short, 0, 0, 0], [long] * 4])


@pytest.mark.parametrize("estimator", ["k2", "k3", "ratio_k3"])
def test_trap_24_kl_counts_exactly_once(estimator: Any) -> None:
    c = Case(16)
    without = c.policy(importance_cap=1.2).per_token
    with_kl = c.policy(importance_cap=1.2, kl_coefficient=0.7, kl_estimator=estimator).per_token
    kl = objectives.kl_loss(c.x, c.old.logprobs, c.ref.logprobs, c.mask, estimator=estimator)
    equal(with_kl - without, 0.7 * kl.detach())
    equal(c.policy(kl_coefficient=0.0).per_token, policy_loss(c.new, c.old, None, c.credit, c.batch).per_token.detach())


def vocabulary_gradients(off_policy: bool) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Expected gradient of each KL loss over a 5-token vocabulary; exact gradients of KL(new||ref), KL(ref||new)."""
    g = torch.Generator().manual_seed(17)
    logits, ref_logits, other = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    lp, ref, mask = logits.log_softmax(0)[:, None], ref_logits.log_softmax(0)[:, None], torch.ones(5, 1).bool()
    old = other.log_softmax(0)[:, None] if off_policy else lp.detach()

    def expected(losses: Tensor) -> Tensor:
        return torch.autograd.grad((old.exp() * losses).sum(), logits, retain_graph=True)[0]

    gradients = {k: expected(objectives.kl_loss(lp, old, ref, mask, estimator=k)) for k in ("k2", "k3", "ratio_k3")}
    gradients["k1"] = expected(objectives.kl_per_token(lp, ref, mask, estimator="k1"))
    reverse = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), logits, retain_graph=True)[0]
    forward = torch.autograd.grad((ref.exp() * (ref - lp)).sum(), logits)[0]
    return gradients, reverse, forward


def test_trap_25_which_kl_each_loss_descends() -> None:
    gradients, reverse, forward = vocabulary_gradients(off_policy=False)
    equal(gradients["k2"], reverse)
    equal(gradients["ratio_k3"], reverse)
    equal(gradients["k3"], forward)
    equal(gradients["k1"], torch.zeros_like(reverse))
    assert (forward - reverse).abs().max() > 0.01
    with pytest.raises(Exception, match=r"k1|estimator"):
        objectives.kl_loss(f64([[0.0]]), f64([[0.0]]), f64([[0.0]]), one_action, estimator="k1")  # type: ignore[arg-type]


def test_trap_25_only_the_ratio_form_survives_old_samples() -> None:
    gradients, reverse, _ = vocabulary_gradients(off_policy=True)
    equal(gradients["ratio_k3"], reverse)
    assert (gradients["k2"] - reverse).abs().max() > 0.01


@pytest.mark.parametrize("start", [0.01, 20.0])
@pytest.mark.parametrize("num_episodes", [16, 256])
def test_trap_26_controller_reaches_its_target_in_sequence_nats(start: float, num_episodes: int) -> None:
    """A policy whose KL falls with the coefficient, as 12 / (1 + coefficient); 6 nats are reached at 1."""
    controller = AdaptiveKL(start, target=6.0, horizon=1_000)
    for _ in range(60_000 // num_episodes):
        controller.update(sequence_kl=12.0 / (1.0 + controller.coefficient), num_episodes=num_episodes)
    assert controller.coefficient == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("num_episodes", [10, 25])
def test_trap_26_one_step_is_bounded_per_episode(num_episodes: int) -> None:
    for kl, sign in ((1e9, 1), (-1e9, -1)):
        controller = AdaptiveKL(1.0, target=6.0, horizon=100)
        controller.update(sequence_kl=kl, num_episodes=num_episodes)
        assert controller.coefficient == pytest.approx(1 + sign * 0.002 * num_episodes)


def test_trap_27_controller_state_survives_a_restart_bit_for_bit() -> None:
    uninterrupted = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    uninterrupted.update(7.1, 48)
    resumed = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    resumed.load_state_dict(json.loads(json.dumps(uninterrupted.state_dict())))
    for controller in (uninterrupted, resumed):
        controller.update(5.3, 48)
    assert resumed.coefficient == uninterrupted.coefficient != 0.2


def test_a_fixed_coefficient_stays() -> None:
    controller = FixedKL(0.05)
    controller.update(sequence_kl=100.0, num_episodes=10)
    controller.load_state_dict(controller.state_dict())
    assert controller.coefficient == 0.05


def test_trap_28_figures_are_zero_outside_the_loss_mask() -> None:
    c = Case(18).poisoned(3.0)
    for figure in c.policy(importance_cap=2.0).aux.values():
        assert bool((figure[~c.mask] == 0).all())


def test_trap_34_sequence_token_keeps_the_place_of_credit_and_sequence_does_not() -> None:
    mask, old = torch.ones(1, 2, dtype=torch.bool), f64([[-1.0, -1.0]])
    slopes: dict[str, Tensor] = {}
    levels: tuple[Any, ...] = ("sequence", "sequence_token")
    for level in levels:
        x = old.clone().requires_grad_()
        w = objectives.ratio(x, old, mask, level=level)
        loss = objectives.clipped_surrogate(w, f64([[1.0, 0.0]]), mask, clip_low=0.2, clip_high=0.2)
        slopes[level] = torch.autograd.grad(loss.sum(), x)[0]
    equal(slopes["sequence"], [[-0.5, -0.5]])
    equal(slopes["sequence_token"], [[-1.0, 0.0]])


# --- edges and defaults ---------------------------------------------------------------------------------------


def test_a_row_of_one_action_has_its_own_ratio_at_every_level() -> None:
    x, old, mask = f64([[9, -1.0]]), f64([[7, -1.5]]), torch.tensor([[False, True]])
    levels: tuple[Any, ...] = ("token", "sequence", "sequence_token")
    for level in levels:
        equal(objectives.ratio(x, old, mask, level=level)[0, 1], torch.tensor(0.5).double().exp())
    settings: Any = {"level": "geometric", "outside": "mask"}
    equal(objectives.importance_weights(x, old, mask, high=1.6, **settings), [[0, 0]])  # exp(0.5) = 1.65
    equal(objectives.importance_weights(x, old, mask, high=1.7, **settings), f64([[0, 0.5]]).exp() * mask)


def test_weights_on_the_bounds_are_kept() -> None:
    one = f64([[0.0]])
    equal(objectives.importance_weights(one, one, one_action, high=1.0, low=1.0, outside="mask"), [[1.0]])


def test_ratios_beyond_20_nats_are_held_there_on_both_sides() -> None:
    bound = f64([[20.0]]).exp()
    equal(objectives.ratio(f64([[25.0]]), f64([[0.0]]), one_action) / bound, [[1.0]])
    equal(objectives.ratio(f64([[-25.0]]), f64([[0.0]]), one_action) * bound, [[1.0]])


def test_defaults_are_those_that_the_docstrings_state() -> None:
    c = Case(22)
    weights = objectives.importance_weights(c.old.logprobs, c.batch.sample_logprobs, c.mask, high=1.2)
    settings: Any = {"high": 1.2, "low": 0.0, "level": "token", "outside": "truncate"}
    equal(weights, objectives.importance_weights(c.old.logprobs, c.batch.sample_logprobs, c.mask, **settings))
    arguments = c.x, c.old.logprobs, c.ref.logprobs, c.mask
    equal(objectives.kl_loss(*arguments), objectives.kl_loss(*arguments, estimator="ratio_k3").detach())
    plain = objectives.clipped_surrogate(
        objectives.ratio(c.x, c.old.logprobs, c.mask), c.credit.advantages, c.mask, clip_low=0.2, clip_high=0.2
    )
    equal(c.policy().per_token, plain.detach())


def test_policy_loss_hands_its_choices_on() -> None:
    c = Case(27, off_policy=1.0)
    w = objectives.ratio(c.x, c.old.logprobs, c.mask)
    advantages, sample = c.credit.advantages, c.batch.sample_logprobs
    bounded = objectives.clipped_surrogate(w, advantages, c.mask, clip_low=0.2, clip_high=0.2, dual_clip=1.1)
    equal(c.policy(dual_clip=1.1).per_token, bounded.detach())
    kept, left_out = objectives.dppo(c.x, c.old.logprobs, advantages, c.mask, clip_low=0.1, clip_high=0.1)
    divergence = c.policy(surrogate="dppo", clip_low=0.1, clip_high=0.1)
    equal(divergence.per_token, kept.detach())
    equal(divergence.aux["clipped"], left_out.double())
    assert 0 < left_out.sum() < c.mask.sum()
    cases: tuple[tuple[Any, float], ...] = (("token", 1.5), ("sequence", 1.5), ("geometric", 1.2))
    for level, high in cases:
        expected = objectives.importance_weights(
            c.old.logprobs, sample, c.mask, high=high, low=1 / high, level=level, outside="mask"
        )
        got = c.policy(
            importance_cap=high, importance_floor=1 / high, importance_level=level, importance_outside="mask"
        ).aux["importance_weight"]
        equal(got, expected)
        assert 0 < (expected != 0).sum() < c.mask.sum()


def test_a_weight_on_its_bound_does_not_count_as_clipped() -> None:
    c = Case(24, off_policy=0.0)
    aux = c.policy(surrogate="cispo", clip_low=0.0, clip_high=0.0).aux
    equal(aux["clipped"], torch.zeros_like(c.x))


def test_critic_loss_hands_its_clip_on() -> None:
    c = Case(25)
    assert c.old.values is not None
    assert c.credit.returns is not None
    expected = objectives.value_loss(c.values, c.old.values, c.credit.returns, c.mask, clip=0.1)
    got = objectives.critic_loss(c.new, c.old, c.credit, c.batch, clip=0.1).per_token
    equal(got, expected.detach())
    assert not got.equal(objectives.critic_loss(c.new, c.old, c.credit, c.batch).per_token)


def test_what_is_missing_is_named() -> None:
    c = Case(26)
    bare = PolicyOutput(c.old.logprobs, c.old.entropy)
    for new, old, given in ((c.new, bare, c.credit), (bare, c.old, c.credit), (c.new, c.old, Credit(c.x.detach()))):
        with pytest.raises(ValueError, match=r"^critic_loss needs .* an estimator with a critic$"):
            objectives.critic_loss(new, old, given, c.batch)
    with pytest.raises(ValueError, match=r"^importance_weights: .* for outside='mask'$"):
        objectives.importance_weights(c.x, c.x, c.mask, high=2.0, low=0.5)
    with pytest.raises(ValueError, match=r"^exact KL: score .* \(Policy.score\(..., against=...\)\)$"):
        objectives.exact_kl(bare, c.mask)
    with pytest.raises(ValueError, match=r"^over='constant' has no count .* \(e.g. rows \* max_new_tokens\)$"):
        count(c.mask, over="constant")
