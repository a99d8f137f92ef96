"""The KL to the reference as a reward of each token."""

import pytest
import torch

from pertoken.errors import RewardError
from pertoken.rewards import KLToReference, Weighted, score
from pertoken.types import PolicyOutput


def outputs(*rows):
    return [PolicyOutput(torch.tensor([row], dtype=torch.float64), torch.zeros(1, len(row))) for row in rows]


def test_each_action_pays_its_log_ratio(make_episode, make_scene):
    """k1 of shared/fixtures, case kl_estimators, weighted with beta 0.1; what is no action pays nothing."""
    old, ref = outputs([9.0, 9.0, -1.0, -2.0, 9.0, -0.5], [0.0, 0.0, -1.3, -1.95, 0.0, -1.0])
    scene = make_scene(make_episode([5, 6, 7, 8], mask=[1, 1, 0, 1]), old=old, ref=ref)
    rewards = score([Weighted(KLToReference(), 0.1, "kl")], scene)
    torch.testing.assert_close(rewards.total, torch.tensor([[0, 0, -0.03, 0.005, 0, -0.05]], dtype=torch.float64))


def test_reward_to_go_of_k1_is_the_exact_gradient_of_the_sequence_kl():
    """P(t1=1) = sigmoid(a), P(t2=1|t1) = sigmoid(b_t1); shared/fixtures, case kl_gradients_two_token_sequence."""
    theta = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64)

    def logprobs(parameters, first, second):
        one = torch.nn.functional.logsigmoid(parameters[0] * (2 * first - 1))
        two = torch.nn.functional.logsigmoid(parameters[1 + first] * (2 * second - 1))
        return torch.stack([one, two])

    loss = torch.zeros((), dtype=torch.float64)
    for first in (0, 1):
        for second in (0, 1):
            now, then = logprobs(theta, first, second), logprobs(reference, first, second)
            reward = (then - now).detach()
            to_go = torch.stack([reward.sum(), reward[1]])
            loss -= now.sum().exp().detach() * (now * to_go).sum()
    (gradient,) = torch.autograd.grad(loss, theta)
    expected = torch.tensor([0.1117483638, -0.09000682947, 0.08601517711], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("present", "missing"), [("ref", "old"), ("old", "ref")])
def test_a_missing_scoring_pass_is_named(present, missing, make_episode, make_scene):
    (output,) = outputs([0.0, 0.0, -1.0])
    with pytest.raises(RewardError, match=rf"reward 'kl': .*Scene\.{missing}"):
        score([Weighted(KLToReference(), 0.1, "kl")], make_scene(make_episode([7]), **{present: output}))
