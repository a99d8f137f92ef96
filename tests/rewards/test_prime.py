"""A process reward that learns beside the policy: what it pays, what it learns, and that nothing of it is lost."""

import pytest
import torch

from pertoken import assembly
from pertoken.assembly.rewards import refuse_learning_from_nothing
from pertoken.batching import to_batch
from pertoken.config import RewardConfig
from pertoken.errors import ConfigError, ModelError
from pertoken.rewards import Learns, Prime, Scene
from pertoken.rewards.prime import outcome_loss
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode
from pertoken.types import Item

OUTCOMES = {"exact": torch.tensor([1.0, 0.0, 1.0, float("nan")])}


@pytest.fixture
def scene():
    tokenizer = byte_tokenizer()
    rows = [
        episode(tokenizer.encode("say:"), tokenizer.encode(text), id=str(k), item=Item(str(k), "say:"))
        for k, text in enumerate(("yes", "no", "yes!", "what"))
    ]
    return Scene(to_batch(rows, Controls()), rows, tokenizer)


def learner(model_folder, **changes):
    return Prime(**{"model": str(model_folder), "outcome": "exact", "learning_rate": 1e-2, **changes})


def test_the_loss_by_hand():
    sums, right = torch.tensor([0.4, -0.6], dtype=torch.float64), torch.tensor([True, False])
    assert outcome_loss(sums, right, beta=0.05).mean().item() == pytest.approx(0.680728428, abs=1e-9)
    assert outcome_loss(sums, ~right, beta=1.0).tolist() == pytest.approx([0.9130152523999526, 1.0374879504858854])


def test_it_pays_nothing_before_it_has_learnt_and_then_what_was_right(model_folder, scene):
    reward = learner(model_folder)
    assert isinstance(reward, Learns)
    assert not reward(scene).any()
    figures = reward.learn(scene, OUTCOMES)
    assert figures == {"prime/loss": pytest.approx(0.6931472, abs=1e-6), "prime/accuracy": 0.5}
    for _ in range(5):
        figures = reward.learn(scene, OUTCOMES)
    assert figures["prime/accuracy"] == 1.0
    assert figures["prime/loss"] < 0.69
    paid = reward(scene)
    assert not paid[~scene.batch.action_mask].any()
    sums = paid.sum(1)
    assert min(sums[0], sums[2]) > 0 > sums[1]
    again = learner(model_folder, beta=0.1)
    again.__dict__["_models"] = reward._models
    torch.testing.assert_close(again(scene), 2 * paid)


def test_its_gradient_is_that_of_the_mean_over_rows_with_an_opinion(model_folder, scene):
    """One step of plain gradient descent in the place of its own optimiser."""
    reward, other = learner(model_folder, max_grad_norm=1e9), learner(model_folder)
    reward.__dict__["_optimizer"] = torch.optim.SGD(reward._models[0].parameters(), lr=0.5)
    reward.learn(scene, OUTCOMES)
    trained = other._models[0]
    sums = torch.stack([other._log_ratios(e).sum() for e in scene.episodes[:3]])
    outcome_loss(sums, torch.tensor([True, False, True]), beta=0.05).mean().backward()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.sub_(0.5 * parameter.grad)
    for got, wanted in zip(reward._models[0].parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_all_that_learning_changes_is_in_its_tensors(model_folder, scene):
    whole, before, after = (learner(model_folder) for _ in range(3))
    whole.learn(scene, OUTCOMES)
    before.learn(scene, OUTCOMES)
    saved = {name: cell.clone() for name, cell in before.tensors().items()}
    for name, cell in after.tensors().items():
        cell.copy_(saved[name])
    for reward in (whole, after):
        reward.learn(scene, OUTCOMES)
    assert all(torch.equal(cell, after.tensors()[name]) for name, cell in whole.tensors().items())


def test_rows_without_an_opinion_teach_nothing(model_folder, scene):
    reward = learner(model_folder)
    assert reward.learn(scene, {"exact": torch.full((4,), float("nan"))}) == {}
    assert not reward(scene).any()


def test_what_it_cannot_learn_from_is_refused(model_folder, scene):
    with pytest.raises(ConfigError, match=r"prime\.beta"):
        learner(model_folder, beta=0.0)
    fields = {"name": "prime", "model": str(model_folder), "outcome": "exact"}
    with pytest.raises(ConfigError, match="no `processes` of its own"):
        assembly.build_rewards([RewardConfig(**fields, processes=1)])
    parts = assembly.build_rewards([RewardConfig(**fields), RewardConfig(name="rouge_l")])
    with pytest.raises(ConfigError, match="outcome: no other part 'exact'"):
        refuse_learning_from_nothing(parts)
    both = [RewardConfig(**fields | {"outcome": "rouge_l"}), RewardConfig(name="rouge_l", normalise="batch")]
    parts = assembly.build_rewards(both)
    with pytest.raises(ConfigError, match="no fixed threshold"):
        refuse_learning_from_nothing(parts)
    other = byte_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(ModelError, match="another tokenizer than the policy"):
        learner(model_folder)(Scene(scene.batch, scene.episodes, other))
