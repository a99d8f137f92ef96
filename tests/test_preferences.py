"""Losses of supervised and preference training: hand numbers, identities, masks, exact gradients, TRL."""

import math
from types import SimpleNamespace

import pytest
import torch

from pertoken.objectives import policy_gradient
from pertoken.preferences import (
    bradley_terry,
    ipo_loss,
    kto_baseline,
    kto_loss,
    log_ratios,
    negative_log_likelihood,
    online_dpo,
    outcome_loss,
    simpo_scores,
    tdpo_scores,
)

LENGTHS = torch.tensor([5, 7])
MASK = torch.arange(9)[None] - 1 < LENGTHS[:, None]
MASK[:, 0] = False
GOOD = torch.tensor([True, False])


def spread(*sums: float) -> torch.Tensor:
    """A chosen and a rejected answer of 5 and 7 tokens with these sums, and NaN where no action is."""
    each = torch.tensor(sums, dtype=torch.float64) / LENGTHS
    return torch.where(MASK, each[:, None], math.nan)


# The published numbers of `preference_losses`: log-probs -10 and -14, of the reference -12 and -13.
LP, REF = spread(-10.0, -14.0), spread(-12.0, -13.0)
KL = spread(0.4, 0.7)


def test_published_numbers():
    chosen, rejected = (0.1 * log_ratios(LP, REF, MASK)).sum(1)[:, None]
    assert bradley_terry(chosen, rejected).item() == pytest.approx(0.554355244469, abs=1e-9)
    assert chosen.item() == pytest.approx(0.2, abs=1e-12)
    assert ipo_loss(10 * chosen, 10 * rejected, beta=0.1).item() == pytest.approx(4.0, abs=1e-9)
    for alpha, expected in ((None, 0.567232135122), (0.5, 0.560766128508)):
        one, other = tdpo_scores(LP, REF, KL, MASK, GOOD, beta=0.1, alpha=alpha).sum(1)[:, None]
        assert bradley_terry(one, other).item() == pytest.approx(expected, abs=1e-9)
    one, other = simpo_scores(LP, MASK, beta=2.0).sum(1)[:, None]
    assert bradley_terry(one, other, margin=1.0).item() == pytest.approx(1.31326168752, abs=1e-9)
    z = torch.tensor(0.05, dtype=torch.float64)
    each = kto_loss(torch.tensor([2.0, -1.0], dtype=torch.float64), GOOD, z, beta=0.1)
    assert each.tolist() == pytest.approx([0.451403891417, 0.473774090628], abs=1e-9)


def test_smoothed_labels_by_hand():
    """p = (1/2, 1/4, 1/4), the first one is right: 0.9 log 2 + 0.1 (log 2 + 2 log 4) / 3 = 0.9 log 2 + log 2 / 6."""
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    lp, mean = p[:1].log()[None], p.log().mean()[None, None]
    loss = negative_log_likelihood(lp, torch.tensor([[True]]), mean, label_smoothing=0.1)
    assert loss.item() == pytest.approx(0.7393569926, abs=1e-9)
    torch_own = torch.nn.functional.cross_entropy(p.log()[None], torch.tensor([0]), label_smoothing=0.1)
    assert loss.item() == pytest.approx(torch_own.item(), abs=1e-12)
    off = negative_log_likelihood(lp, torch.tensor([[False]]), mean * math.nan, label_smoothing=0.1)
    assert off.item() == 0
    with pytest.raises(ValueError, match="needs the mean"):
        negative_log_likelihood(lp, torch.tensor([[True]]), label_smoothing=0.1)


def test_the_published_number_of_prime():
    ratios = torch.tensor([[0.2, -0.1, 0.3, 0.0], [-0.4, 0.1, -0.3, 0.0]], dtype=torch.float64).sum(1)
    loss = outcome_loss(ratios, torch.tensor([1.0, 0.0], dtype=torch.float64), beta=0.05).mean()
    assert loss.item() == pytest.approx(0.680728428034, abs=1e-9)


def test_where_policy_and_reference_agree_nothing_is_known_yet():
    same = log_ratios(LP, LP, MASK).sum(1)
    assert bradley_terry(same[:1], same[1:]).item() == pytest.approx(math.log(2), abs=1e-12)
    assert bradley_terry(same[:1], same[1:], label_smoothing=0.3).item() == pytest.approx(math.log(2), abs=1e-12)
    assert kto_loss(same, GOOD, kto_baseline(same), beta=0.1).tolist() == pytest.approx([0.5, 0.5])
    assert outcome_loss(same, torch.tensor([1.0, 0.0]).double(), beta=0.05).tolist() == pytest.approx([math.log(2)] * 2)


def test_tdpo_without_kl_is_dpo():
    plain = 0.1 * log_ratios(LP, REF, MASK)
    torch.testing.assert_close(tdpo_scores(LP, REF, 0 * KL, MASK, GOOD, beta=0.1, alpha=None), plain)
    torch.testing.assert_close(tdpo_scores(LP, REF, KL, MASK, GOOD, beta=0.1, alpha=0.0), plain)


def test_smoothing_is_a_mixture_of_both_labels():
    one, other = torch.tensor([0.7]), torch.tensor([-0.4])
    mixed = 0.8 * bradley_terry(one, other) + 0.2 * bradley_terry(other, one)
    torch.testing.assert_close(bradley_terry(one, other, label_smoothing=0.2), mixed)


def pair_loss(lp, name):
    if name == "dpo":
        s = (0.1 * log_ratios(lp, REF, MASK)).sum(1)
        return bradley_terry(s[:1], s[1:]).sum()
    if name == "ipo":
        s = log_ratios(lp, REF, MASK).sum(1)
        return ipo_loss(s[:1], s[1:], beta=0.1).sum()
    if name == "simpo":
        s = simpo_scores(lp, MASK, beta=2.0).sum(1)
        return bradley_terry(s[:1], s[1:], margin=1.0).sum()
    if name == "kto":
        return kto_loss(log_ratios(lp, REF, MASK).sum(1), GOOD, torch.tensor(0.05).double(), beta=0.1).sum()
    return negative_log_likelihood(lp, MASK).sum()


# d loss / d lp of a chosen and of a rejected token, by hand; s is the sigmoid.
S = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
GRADIENTS = {
    "dpo": (-0.1 * S(-0.3), 0.1 * S(-0.3)),
    "ipo": (2 * (3 - 5), -2 * (3 - 5)),
    "simpo": (-2.0 / 5 * S(1.0), 2.0 / 7 * S(1.0)),  # margin: 2 (-2 + 2) - 1 = -1
    "kto": (-0.1 * S(0.195) * S(-0.195), 0.1 * S(-0.105) * S(0.105)),
    "sft": (-1.0, -1.0),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_by_hand_and_prompts_and_padding_have_none(name):
    lp = LP.clone().requires_grad_()
    pair_loss(lp, name).backward()
    wanted = torch.where(MASK, torch.tensor(GRADIENTS[name], dtype=torch.float64)[:, None], 0.0)
    torch.testing.assert_close(lp.grad, wanted)


def test_the_kl_of_chosen_answers_has_a_gradient_in_tdpo1_alone():
    for alpha, chosen in ((None, True), (0.5, False)):
        kl = KL.clone().requires_grad_()
        tdpo_scores(LP, REF, kl, MASK, GOOD, beta=0.1, alpha=alpha).sum().backward()
        assert bool(kl.grad[0].any()) is chosen
        assert bool(kl.grad[1].any())
        assert not kl.grad[~MASK].any()


def test_an_answer_without_tokens_costs_and_earns_nothing():
    lp = torch.full((1, 3), math.nan, requires_grad=True)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    total = simpo_scores(lp, nothing, beta=2.0).sum() + log_ratios(lp, lp, nothing).sum()
    (total + negative_log_likelihood(lp, nothing).sum()).backward()
    assert total.item() == 0
    assert not lp.grad.any()


def test_the_baseline_of_kto_is_a_mean_that_is_never_negative_and_has_no_gradient():
    ratios = torch.tensor([0.5, -0.1], requires_grad=True)
    assert kto_baseline(ratios).item() == pytest.approx(0.2)
    assert not kto_baseline(ratios).requires_grad
    assert kto_baseline(-ratios).item() == 0.0
    assert kto_baseline(ratios[:0]).item() == 0.0


def test_links_are_those_of_trl():
    """Its losses of pairs take sums; fed with log-ratios to the reference, they are those of DPO and IPO."""
    cpo = pytest.importorskip("trl.experimental.cpo", reason="TRL is no dependency")
    chosen, rejected = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(5)
    plain = {"alpha": 0.0, "accelerator": SimpleNamespace(device="cpu"), "beta": 0.3, "simpo_gamma": 0.7}

    def theirs(kind, smoothing=0.0):
        it = SimpleNamespace(**plain, loss_type=kind, label_smoothing=smoothing)
        return cpo.CPOTrainer.cpo_loss(it, chosen, rejected)[0]

    scored = 0.3 * chosen, 0.3 * rejected
    torch.testing.assert_close(bradley_terry(*scored), theirs("sigmoid"), rtol=0, atol=1e-12)
    torch.testing.assert_close(bradley_terry(*scored, label_smoothing=0.2), theirs("sigmoid", 0.2), rtol=0, atol=1e-12)
    torch.testing.assert_close(bradley_terry(*scored, margin=0.7), theirs("simpo"), rtol=0, atol=1e-12)
    torch.testing.assert_close(ipo_loss(chosen, rejected, beta=0.3), theirs("ipo"), rtol=0, atol=1e-12)


# ---- pairs of the policy's own samples ---------------------------------------------------------------------------

PAID = torch.tensor([[0, 1, 0, 2], [0, 4, 0, 0], [0, 0, 1, 0], [0, 7, 0, 0], [0, 7, 0, 0]], dtype=torch.float64)
ACTS = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 0, 0], [0, 1, 0, 0]]).bool()
GROUPS = torch.tensor([5, 5, 5, -1, -1])


def test_the_best_and_the_worst_of_a_prompt_learn_and_equal_ones_do_not():
    """h of the best (4) is 0.5, of the worst (1) -0.3; the third (3) is between them; the other prompt has 7 twice."""
    ref = torch.zeros(5, 4, dtype=torch.float64)
    lp = ref.clone()
    lp[1, 1:] = torch.tensor([0.2, 0.2, 0.1], dtype=torch.float64)
    lp[2, 1:3] = torch.tensor([-0.4, 0.1], dtype=torch.float64)
    garbage = torch.where(ACTS, 0.0, math.nan).double()
    got = online_dpo(PAID + garbage, lp + garbage, ref + garbage, ACTS, GROUPS, beta=2.0)
    push = 2.0 / (1.0 + math.exp(2.0 * 0.8))
    wanted = torch.tensor([0.0, push, -push, 0.0, 0.0], dtype=torch.float64)[:, None] * ACTS
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    order = torch.tensor([4, 1, 3, 2, 0])
    turned = online_dpo(PAID[order], lp[order], ref[order], ACTS[order], GROUPS[order], beta=2.0)
    assert torch.equal(turned, got[order])


def test_several_that_are_the_best_share_what_is_preferred():
    lp = torch.full((4, 1), -1.0)
    paid, together = torch.tensor([[3.0], [1.0], [3.0], [2.0]]), torch.zeros(4, dtype=torch.long)
    got = online_dpo(paid, lp, lp, torch.ones(4, 1).bool(), together, beta=0.4)
    torch.testing.assert_close(got, torch.tensor([[0.1], [-0.2], [0.1], [0.0]]))


def test_its_policy_gradient_is_the_gradient_of_dpo_on_the_pair():
    g = torch.Generator().manual_seed(0)
    lp = torch.randn(5, 4, generator=g, dtype=torch.float64).requires_grad_(True)
    ref = torch.randn(5, 4, generator=g, dtype=torch.float64)
    scores = 0.7 * log_ratios(lp, ref, ACTS).sum(1)
    (wanted,) = torch.autograd.grad(bradley_terry(scores[1:2], scores[2:3]).sum(), lp)
    advantages = online_dpo(PAID, lp, ref, ACTS, GROUPS, beta=0.7)
    assert not advantages.requires_grad
    (got,) = torch.autograd.grad(policy_gradient(lp, advantages, ACTS).sum(), lp)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert wanted.any()
