"""Ours against TRL 1.16, on random batches: its own `_compute_loss`, and the statements between rewards and advantages.

`python benchmarks/oracles.py` fetches TRL's files; without them everything here is skipped. The loss is called with the
model's log-probs handed in; nothing of it is rewritten. Tests named `test_differs_...` pin a difference that is meant.
"""

import copy
import importlib.util
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pertoken import credit, objectives
from pertoken.types import Credit, PolicyOutput, TokenBatch

SPEC = importlib.util.spec_from_file_location("oracles", Path(__file__).parents[2] / "benchmarks" / "oracles.py")
oracles = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(oracles)

pytestmark = pytest.mark.skipif(not oracles.at_hand("trl"), reason="TRL is not at hand: python benchmarks/oracles.py")

every_seed = pytest.mark.parametrize("seed", range(10))
LONGEST = 16
ROUGHLY = 1e-6
"""TRL's n / (n - 1) is a float32 whatever its rewards are."""

ALONE = SimpleNamespace(
    num_processes=1, process_index=0, sync_gradients=True,
    gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
    pad_across_processes=lambda x, dim, pad_index: x,
)  # fmt: skip
"""What TRL asks of the one process among none others."""


class Batch:
    """Random rows of a prompt token and up to six actions, some with a tool reply inside, in groups of four."""

    def __init__(self, seed: int, *, off_policy: float = 0.5, longest: int = 7, rows: int = 8):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        lengths = torch.randint(2, longest + 1, (rows,), generator=g)
        self.mask = torch.arange(longest) < lengths[:, None]
        self.mask &= torch.rand(rows, longest, generator=g) < 0.8
        self.mask[:, 0], self.mask[:, 1] = False, True  # a prompt, an action
        self.m = self.mask.double()
        self.old = -normal(rows, longest).abs() * self.m
        self.new = ((self.old + off_policy * normal(rows, longest)) * self.m).requires_grad_()
        self.ref, self.sample = (self.old + 0.5 * normal(rows, longest) * self.m for _ in range(2))
        self.entropy = normal(rows, longest).abs()
        self.advantages = normal(rows, longest) * self.m
        self.scores = normal(rows)
        self.group = torch.arange(rows) // 4

    def rows(self, chosen):
        part = copy.copy(self)
        for name, value in vars(self).items():
            setattr(part, name, value[chosen])
        return part

    def rewards(self, scores):
        """The score of each row on its first action: where it lies is lost on estimators of whole rows."""
        return torch.where(self.mask & (self.mask.cumsum(1) == 1), scores[:, None], 0.0)

    def policy_loss(self, **choices):
        zero, yes = torch.zeros_like(self.old), torch.ones_like(self.mask)
        batch = TokenBatch(
            yes.long(), yes, self.mask, self.sample, zero, yes.long(), self.group, yes[:, 0], ("",) * len(self.group)
        )  # fmt: skip
        new, old, ref = (PolicyOutput(x, self.entropy) for x in (self.new, self.old, self.ref))
        return objectives.policy_loss(new, old, ref, Credit(self.advantages), batch, **choices).per_token


@pytest.fixture(scope="module")
def trl():
    utils = oracles.functions("trl utils", "nanstd", "nanmin", "nanmax", torch=torch)
    grpo = oracles.functions(
        "trl grpo", "_compute_loss", "get_high_entropy_mask", torch=torch, nanmin=utils.nanmin, nanmax=utils.nanmax
    )
    rloo = oracles.functions("trl rloo", "_compute_loss", torch=torch, nanmin=utils.nanmin, nanmax=utils.nanmax)

    def trainer(b: Batch, **settings):
        chosen = {"beta": 0.0, "loss_type": "bnpo", "level": "token", "low": 0.2, "high": 0.2, "delta": None,
                  "corrected_kl": False, "mismatch": None, "top": 1.0} | settings  # fmt: skip
        self = SimpleNamespace(
            beta=chosen["beta"], loss_type=chosen["loss_type"], importance_sampling_level=chosen["level"],
            epsilon_low=chosen["low"], epsilon_high=chosen["high"], max_completion_length=LONGEST,
            args=SimpleNamespace(
                delta=chosen["delta"], use_bias_correction_kl=chosen["corrected_kl"], steps_per_generation=1
            ),
            top_entropy_quantile=chosen["top"], off_policy_mask_threshold=None, aux_loss_enabled=False,
            use_vllm=chosen["mismatch"] is not None, vllm_importance_sampling_correction=True,
            model=SimpleNamespace(training=True), accelerator=ALONE, current_gradient_accumulation_steps=1,
            _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
            _get_per_token_logps_and_entropies=lambda *_, **__: (b.new, b.entropy, None),
        )  # fmt: skip
        self.get_high_entropy_mask = lambda *arguments: grpo.get_high_entropy_mask(self, *arguments)
        return self, chosen

    def loss(b: Batch, **settings):
        self, chosen = trainer(b, **settings)
        empty = torch.zeros(len(b.m), 0)
        inputs = {
            "prompt_ids": empty, "prompt_mask": empty, "completion_ids": b.m, "completion_mask": torch.ones_like(b.m),
            "tool_mask": b.m, "advantages": b.advantages, "old_per_token_logps": b.old, "ref_per_token_logps": b.ref,
            "num_items_in_batch": b.m.sum(), "importance_sampling_ratio": chosen["mismatch"],
        }  # fmt: skip
        return grpo._compute_loss(self, None, inputs)

    def rloo_loss(b: Batch, advantages):
        self, _ = trainer(b)
        empty = torch.zeros(len(b.m), 0)
        inputs = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": b.m, "completion_mask": b.m,
                  "advantages": advantages, "old_logps": (b.old * b.m).sum(1)}  # fmt: skip
        return rloo._compute_loss(self, None, inputs)

    def group_advantages(scores, scale, parts=None, weights=None):
        columns = scores[:, None] if parts is None else torch.stack(parts, 1)
        self = SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize" if parts is None else "normalize_then_sum",
            reward_weights=torch.tensor(weights or [1.0], dtype=scores.dtype), scale_rewards=scale,
            reward_funcs=columns[0].tolist(),
        )  # fmt: skip
        return oracles.statements(
            "trl grpo", "_generate_and_score_completions", "unscorable_mask =", "advantages = torch.nan_to_num",
            self=self, rewards_per_func=columns, num_generations=4, torch=torch, nanstd=utils.nanstd, device="cpu",
        )["advantages"]  # fmt: skip

    def leave_one_out(scores, *, normalised=False, generations=4):
        return oracles.statements(
            "trl rloo", "_generate_and_score_completions", "grouped_rewards =", "advantages = torch.nan_to_num",
            self=SimpleNamespace(normalize_advantages=normalised), rewards=scores, num_generations=generations,
            torch=torch, nanstd=utils.nanstd,
        )["advantages"]  # fmt: skip

    def mismatch(b: Batch, mode, low, high, sample=None):
        self = SimpleNamespace(
            vllm_importance_sampling_mode=mode,
            vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high,
        )  # fmt: skip
        return oracles.statements(
            "trl grpo", "_generate_and_score_completions", "mask = completion_mask if tool_mask",
            "if self.vllm_importance_sampling_mode in", self=self, completion_mask=torch.ones_like(b.m), tool_mask=b.m,
            old_per_token_logps=b.old, sampling_per_token_logps=b.sample if sample is None else sample,
            torch=torch, math=math,
        )["vllm_importance_sampling_ratio"]  # fmt: skip

    return SimpleNamespace(
        loss=loss,
        rloo_loss=rloo_loss,
        group_advantages=group_advantages,
        leave_one_out=leave_one_out,
        mismatch=mismatch,
    )


def same(ours, theirs, atol=1e-9):
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=0, atol=atol)


def same_loss(b, ours, theirs):
    same(ours, theirs)
    slopes = (torch.autograd.grad(loss, b.new, retain_graph=True)[0] for loss in (ours, theirs))
    same(*slopes)


AVERAGES = {
    "bnpo": {"over": "token"},
    "dapo": {"over": "token"},
    "grpo": {"over": "sequence"},
    "dr_grpo": {"over": "constant", "denominator": 8 * LONGEST},
    "luspo": {"over": "constant", "denominator": 8},
}


@every_seed
@pytest.mark.parametrize("loss_type", AVERAGES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_clipped_losses_and_averages(trl, seed, loss_type, level):
    b = Batch(seed)
    if level == "sequence":  # one advantage a row, as TRL has it there
        b.advantages = b.scores[:, None] * b.m
    ours = b.policy_loss(level=level, clip_low=0.1, clip_high=0.28)
    theirs = trl.loss(b, loss_type=loss_type, level=level, low=0.1, high=0.28)
    same_loss(b, objectives.aggregate(ours, b.mask, **AVERAGES[loss_type]), theirs)


@every_seed
def test_dual_clip_is_delta(trl, seed):
    b = Batch(seed, off_policy=1.5)
    same_loss(b, objectives.aggregate(b.policy_loss(dual_clip=2.0), b.mask), trl.loss(b, delta=2.0))


@every_seed
@pytest.mark.parametrize(("estimator", "corrected"), [("k3", False), ("ratio_k3", True)])
def test_kl_in_the_loss(trl, seed, estimator, corrected):
    b = Batch(seed)
    ours = b.policy_loss(kl_coefficient=0.04, kl_estimator=estimator)
    theirs = trl.loss(b, beta=0.04, corrected_kl=corrected, loss_type="grpo")
    same_loss(b, objectives.aggregate(ours, b.mask, over="sequence"), theirs)


@every_seed
def test_cispo_with_the_bound_as_a_bare_number(trl, seed):
    b = Batch(seed, off_policy=1.5)
    ours = b.policy_loss(surrogate="cispo", clip_low=1.0, clip_high=4.0)
    same_loss(b, objectives.aggregate(ours, b.mask), trl.loss(b, loss_type="cispo", high=5.0))


@every_seed
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_high_entropy_tokens(trl, seed, share):
    b = Batch(seed)
    b.entropy = b.entropy.float().double()  # TRL takes the quantile in float32
    theirs = trl.loss(b, top=share)
    b.advantages = credit.keep_high_entropy(b.advantages, b.mask, b.entropy.float(), share=share)
    same_loss(b, objectives.aggregate(b.policy_loss(), b.mask), theirs)


MODES = {
    "token_truncate": {"high": 2.0},
    "sequence_truncate": {"high": 2.0, "level": "sequence"},
    "token_mask": {"low": 0.5, "high": 2.0, "outside": "mask"},
    "sequence_mask": {"low": 0.5, "high": 3.0, "level": "sequence", "outside": "mask"},
}


@every_seed
@pytest.mark.parametrize("mode", MODES)
def test_importance_weights_and_where_they_enter(trl, seed, mode):
    b, settings = Batch(seed), MODES[mode]
    theirs = trl.mismatch(b, mode, settings.get("low"), settings["high"])
    same(objectives.importance_weights(b.old, b.sample, b.mask, **settings), theirs * b.m)
    ours = b.policy_loss(
        kl_coefficient=0.1, kl_estimator="k3",
        importance_cap=settings["high"], importance_floor=settings.get("low", 0.0),
        importance_level=settings.get("level", "token"), importance_outside=settings.get("outside", "truncate"),
    )  # fmt: skip
    same_loss(b, objectives.aggregate(ours, b.mask), trl.loss(b, beta=0.1, mismatch=theirs))


@every_seed
@pytest.mark.parametrize("scale", ["group", "none"])
def test_group_relative(trl, seed, scale):
    b = Batch(seed)
    ours = credit.group_relative(b.rewards(b.scores), b.mask, b.group, scale_by_std=scale == "group")
    same(ours, trl.group_advantages(b.scores, scale)[:, None] * b.m, ROUGHLY)


@every_seed
def test_scaled_by_the_spread_of_the_batch(trl, seed):
    b = Batch(seed)
    ours = credit.per_part([credit.Stream(b.rewards(b.scores), by="episode", scale="batch")], b.mask, b.group)
    same(ours, trl.group_advantages(b.scores, "batch")[:, None] * b.m, ROUGHLY)


@every_seed
def test_leave_one_out(trl, seed):
    b = Batch(seed)
    ours = credit.leave_one_out(b.rewards(b.scores), b.mask, b.group)
    same(ours, trl.leave_one_out(b.scores)[:, None] * b.m)


@every_seed
def test_on_policy_its_sequence_ratio_has_the_gradient_of_the_policy_gradient(trl, seed):
    b = Batch(seed, off_policy=0.0)
    advantages = trl.leave_one_out(b.scores)
    ours = objectives.policy_gradient(b.new, advantages[:, None] * b.m, b.mask)
    ours = objectives.aggregate(ours, b.mask, over="constant", denominator=8)
    slopes = (torch.autograd.grad(loss, b.new)[0] for loss in (ours, trl.rloo_loss(b, advantages)))
    same(*slopes)


# --- what differs, and why ----------------------------------------------------------------------------------


def test_differs_rows_without_actions_are_not_averaged_in(trl):
    """TRL divides by all rows, so that a row whose tokens are all masked shrinks the step of the others."""
    b = Batch(0)
    b.mask[:4] = False
    b.m = b.mask.double()
    ours = objectives.aggregate(b.policy_loss(), b.mask, over="sequence")
    same(ours, 2 * trl.loss(b, loss_type="grpo"))


@every_seed
def test_differs_the_spread_after_normalised_parts_is_one_of_tokens(trl, seed):
    """TRL's last step of GDPO whitens over rows, verl's and ours over tokens: equal where rows are equally long."""
    b = Batch(seed)
    b.mask, b.m = torch.ones_like(b.mask), torch.ones_like(b.m)
    parts = [b.scores, b.old.sum(1)]
    streams = [credit.Stream(b.rewards(s), w, by="episode") for s, w in zip(parts, (1.0, 0.5), strict=True)]
    theirs = trl.group_advantages(b.scores, "group", parts, [1.0, 0.5])
    ours = credit.whiten(credit.per_part(streams, b.mask, b.group), b.mask, b.group, unbiased=False)
    same(ours[:, 0], theirs * theirs.numel() ** 0.5 / (theirs.numel() - 1) ** 0.5, atol=1e-3)
    b.mask[:, 1:] = torch.arange(1, 7) < torch.arange(8)[:, None]
    uneven = credit.whiten(credit.per_part(streams, b.mask, b.group), b.mask, b.group, unbiased=False)
    assert (uneven[:, 0] - ours[:, 0]).abs().max() > 0.01


def test_differs_leave_one_out_of_one_row(trl):
    """TRL's gives 0 to a row without others; ours has no baseline for it, which is REINFORCE."""
    same(trl.leave_one_out(torch.tensor([3.0]), generations=1), torch.tensor([0.0]))
    yes = torch.ones(1, 1, dtype=torch.bool)
    same(credit.leave_one_out(torch.tensor([[3.0]]), yes, torch.tensor([0])), torch.tensor([[3.0]]))


def test_differs_a_part_of_the_batch_takes_the_mean_of_the_whole(trl):
    """TRL's bnpo averages each micro-batch by itself; ours divides by the count of the optimiser step."""
    b = Batch(1)
    whole = objectives.count(b.mask, over="token")
    parts = [b.rows(slice(3)), b.rows(slice(3, 8))]
    ours = sum(objectives.aggregate(part.policy_loss(), part.mask, denominator=whole) for part in parts)
    same(ours, objectives.aggregate(b.policy_loss(), b.mask))
    theirs = sum(trl.loss(part) for part in parts) / 2  # as accumulated over two micro-batches
    same(trl.loss(b), ours)
    assert (ours - theirs).abs() > 1e-3


def test_differs_ratios_are_bounded_at_20_nats(trl):
    """A token that became exp(50) times as probable gives TRL a loss of 5e21, and a step of the same size."""
    b = Batch(2, longest=2, rows=4)
    b.old, b.advantages = torch.zeros(4, 2).double(), -torch.ones(4, 2).double()
    b.new = 50 * torch.ones(4, 2).double().requires_grad_()
    assert trl.loss(b).item() == pytest.approx(math.exp(50))
    assert objectives.aggregate(b.policy_loss(), b.mask).item() == pytest.approx(math.exp(20))


def test_differs_the_kl_of_a_token_is_weighted_by_its_own_ratio(trl):
    """With ratios of whole sequences TRL weights a token's KL by the mean ratio of its row: no gradient of a KL."""
    b = Batch(3)
    b.advantages = b.scores[:, None] * b.m
    ours = b.policy_loss(level="sequence", kl_coefficient=0.5)
    theirs = trl.loss(b, level="sequence", beta=0.5, corrected_kl=True, loss_type="grpo")
    estimates = objectives.kl_per_token(b.new, b.ref, b.mask, estimator="k3")
    ratios = [objectives.ratio(b.new, b.old, b.mask, level=level) for level in ("token", "sequence")]
    gap = objectives.aggregate(0.5 * estimates * (ratios[0] - ratios[1]), b.mask, over="sequence")
    same(objectives.aggregate(ours, b.mask, over="sequence") - gap, theirs)
    assert gap.abs() > 1e-3


def test_differs_a_missing_log_prob_stays_missing(trl):
    """TRL takes weight 1 for a token whose sampler told no log-prob; ours says NaN, and the step is refused."""
    b = Batch(4)
    told = b.sample.clone()
    told[0, 1] = torch.nan
    assert trl.mismatch(b, "token_truncate", None, 2.0, told)[0, 1].item() == 1.0
    assert objectives.importance_weights(b.old, told, b.mask, high=2.0)[0, 1].isnan()


def test_differs_the_default_bound_of_cispo(trl):
    """TRL's epsilon_high is the bound itself, so that its own default of 0.2 weighs every token with 0.2."""
    b = Batch(5, off_policy=0.0)
    theirs = torch.autograd.grad(trl.loss(b, loss_type="cispo", high=0.2), b.new)[0]
    ours = objectives.aggregate(b.policy_loss(surrogate="cispo", clip_low=1.0, clip_high=0.2), b.mask)
    same(0.2 * torch.autograd.grad(ours, b.new)[0], theirs)


def test_differs_there_is_no_ratio_of_whole_sequences_without_the_root(trl):
    """TRL's RLOO clips prod_t w_t, which leaves the interval after a few tokens; ours is its L-th root (GSPO)."""
    b = Batch(6)
    root = objectives.ratio(b.new, b.old, b.mask, level="sequence")[:, 1]
    product = root ** b.m.sum(1)
    same(-torch.minimum(product, product.clamp(0.8, 1.2)).mean(), trl.rloo_loss(b, torch.ones_like(b.scores)))
    inside = [((w - 1).abs() <= 0.2).sum() for w in (product, root)]
    assert inside[0] < inside[1]
