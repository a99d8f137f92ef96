"""TRPO's step: hand quadratics, Fisher products against explicit matrices, and what it does in an update of a run."""

import json
import math
import sys
import types

import pytest
import torch
from torch import nn

from pertoken.assembly import build_run
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.rewards import Scene, token_reward
from pertoken.testing import tiny_model
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.training.trust_region import Fisher, Weights, conjugate_gradient, line_search, natural_step

# --- the maths ----------------------------------------------------------------------------------------------


def test_conjugate_gradients_by_hand():
    A, b = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([1.0, 1.0])
    x, left = conjugate_gradient(lambda v: A @ v, b, iterations=1)
    # the first direction is b: b.b / b.Ab = 2 / 5
    assert x.tolist() == pytest.approx([0.4, 0.4])
    assert left.tolist() == pytest.approx([0.6, -0.6])
    x, left = conjugate_gradient(lambda v: A @ v, b, iterations=2)
    assert x.tolist() == pytest.approx([1.0, 0.25])
    assert left.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_conjugate_gradients_end_where_there_is_nothing_to_gain():
    calls = []

    def product(v):
        calls.append(v)
        return 2.0 * v

    x, _ = conjugate_gradient(product, torch.tensor([3.0, 5.0]), iterations=50)
    assert (x.tolist(), len(calls)) == ([1.5, 2.5], 1)
    x, left = conjugate_gradient(product, torch.zeros(2), iterations=50)
    assert (x.tolist(), left.tolist(), len(calls)) == ([0, 0], [0, 0], 1)
    x, left = conjugate_gradient(lambda v: -v, torch.ones(2), iterations=50)
    assert (x.tolist(), left.tolist()) == ([0, 0], [1, 1])


def random_curvature(size=6):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_the_step_is_the_natural_one_and_spends_the_bound():
    F = random_curvature()
    g = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    step = natural_step(g, lambda v: F @ v, kl=0.03, iterations=20, damping=0.0)
    assert 0.5 * (step @ F @ step).item() == pytest.approx(0.03, rel=1e-6)
    wanted = -torch.linalg.solve(F, g)
    torch.testing.assert_close(step / step.norm(), wanted / wanted.norm(), atol=1e-5, rtol=0)
    # the length of the gradient says nothing, and damping shortens
    torch.testing.assert_close(natural_step(7 * g, lambda v: F @ v, kl=0.03, iterations=20, damping=0.0), step)
    damped = natural_step(g, lambda v: F @ v, kl=0.03, iterations=20, damping=5.0)
    assert 0.5 * (damped @ (F + 5.0 * torch.eye(6)) @ damped).item() == pytest.approx(0.03, rel=1e-6)
    assert 0.5 * (damped @ F @ damped).item() < 0.03
    assert not natural_step(0 * g, lambda v: F @ v, kl=0.03, iterations=20, damping=0.1).any()


def test_the_line_search_takes_the_first_length_that_will_do():
    asked = []

    def measure(share):
        asked.append(share)
        return share - 0.6, 0.1 * share

    assert line_search(measure, loss=0.0, kl=1.0, shrink=0.5, tries=4) == (0.5, 0.05)
    assert asked == [1.0, 0.5]
    assert line_search(measure, loss=0.0, kl=0.03, shrink=0.5, tries=4) == (0.25, 0.025)
    assert line_search(measure, loss=0.0, kl=0.03, shrink=0.5, tries=2) == (0.0, 0.0)
    assert line_search(lambda share: (0.0, 0.0), loss=0.0, kl=1.0, shrink=0.5, tries=3) == (0.0, 0.0)
    for nothing in ((math.nan, 0.0), (-1.0, math.nan)):
        assert line_search(lambda share, n=nothing: n, loss=0.0, kl=1.0, shrink=0.5, tries=3) == (0.0, 0.0)


@pytest.mark.parametrize("reach", [1e-6, 1e-3, 10.0])
def test_products_of_a_softmax_are_those_of_its_explicit_matrix(reach):
    """F = diag(p) - p p^T; whatever the first reach is, the one that is used fits the direction."""
    start = torch.tensor([3.0, 0.0, -1.0, -6.0, 0.5], dtype=torch.float64)
    p = start.softmax(0)

    def at(v):
        new = (start + v).log_softmax(0)
        return (p * (p.log() - new)).sum().item(), new.exp() - p

    F = torch.diag(p) - torch.outer(p, p)
    fisher = Fisher(at, reach=reach)
    for v in (F[0], F[3], torch.eye(5, dtype=torch.float64)[3], torch.arange(5.0, dtype=torch.float64)):
        torch.testing.assert_close(fisher(v), F @ v, rtol=1e-3, atol=1e-3 * (F @ v).norm().item())
    assert fisher(torch.ones(5, dtype=torch.float64)).norm() < 1e-6, "all logits together are no direction"
    assert not fisher(torch.zeros(5, dtype=torch.float64)).any()


def test_weights_move_as_one_vector_and_come_back_to_the_last_bit():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    named = dict(layer.named_parameters())
    start = {name: p.detach().clone() for name, p in named.items()}
    weights = Weights(named, start)
    step = torch.arange(8.0)
    weights.move(step, 0.5)
    torch.testing.assert_close(layer.weight.detach(), start["weight"] + 0.5 * torch.arange(6.0).view(2, 3))
    torch.testing.assert_close(layer.bias.detach(), start["bias"] + torch.tensor([3.0, 3.5]))
    layer.bias.grad = torch.tensor([1.0, 2.0])
    assert weights.gradient().tolist() == [0.0] * 6 + [1.0, 2.0]
    weights.move(step, 0.0)
    assert all(torch.equal(p, start[name]) for name, p in named.items())


# --- in a run -------------------------------------------------------------------------------------------------


@token_reward
def token_numbers(sample):
    """Something else for each token, so that no two rows are worth the same."""
    return [token / 256 for token in sample.tokens]


@pytest.fixture
def make(model_folder, tmp_path, monkeypatch):
    """`make(**sections)`: a run by TRPO, and what `updating.update` wants of a step. moved: since the run was built."""

    # `fn: module:function` finds this file under the name that pytest gave it
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or types.ModuleType(__name__))
    monkeypatch.setattr(sys.modules[__name__], "token_numbers", token_numbers, raising=False)

    def of(*, moved=0.0, **sections):
        rows = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(60)]
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
        values = {
            "algorithm": "trpo",
            "task": {"path": str(tmp_path / "data.jsonl"), "prompt": "{prompt}:", "answer": "reference", "id": "id"},
            "rewards": [{"fn": f"{__name__}:token_numbers", "name": "numbers"}],
            "rollout": {"prompts_per_step": 3, "samples_per_prompt": 3, "sampling": {"max_new_tokens": 6}},
            "evaluation": {"items": 0},
            **sections,
        }
        values["policy"] = {"model": str(model_folder), "device": "cpu", **sections.get("policy", {})}
        built = build_run(RunConfig.model_validate(values))
        with torch.no_grad():  # as by the steps before
            for parameter in built.policy.trainable().values():
                parameter.mul_(1.0 + moved)
        episodes = trainer.generate(built, 1)
        batch = to_batch(episodes, built.controls)
        old, ref = trainer.score_old(built, batch), trainer.score_reference(built, batch)
        rewards = trainer.reward(built, Scene(batch, episodes, built.policy.tokenizer, old, ref, 1))
        return built, (batch, old, ref, assign(built.config.credit, rewards, batch, old), 1)

    return of


def held(run):
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


def explicit_product(batch, v):
    """The curvature of the KL by double backward in float64, on the model as transformers has it."""
    model = tiny_model(seed=1).double()
    model.config._attn_implementation = "eager"
    parameters = list(model.parameters())
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits
    logp = logits[:, :-1].log_softmax(-1)[batch.action_mask[:, 1:]]
    kl = (logp.detach().exp() * (logp.detach() - logp)).sum() / batch.num_actions
    gradient = torch.autograd.grad(kl, parameters, create_graph=True)
    along = torch.cat([g.flatten() for g in gradient]) @ v.double()
    return torch.cat([g.flatten() for g in torch.autograd.grad(along, parameters)])


@pytest.mark.parametrize("tokens", [4096, 40])
def test_products_are_those_of_the_model(make, monkeypatch, tokens):
    """Through packed rows, compiled layers and micro-batches, along a random direction and that of the gradient."""
    built, step = make(update={"tokens_per_micro_batch": tokens})
    found = []

    def spy(gradient, product, **settings):
        random = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))
        found.extend((v, product(v)) for v in (random, gradient))
        return torch.zeros_like(gradient)

    monkeypatch.setattr(updating, "natural_step", spy)
    updating.update(built, *step)
    assert len(found) == 2
    for v, got in found:
        wanted = explicit_product(step[0], v)
        assert (got - wanted).norm() < 1e-3 * wanted.norm()


def test_a_step_lowers_the_loss_within_the_bound_however_it_is_cut(make):
    after = []
    for tokens in (4096, 40):
        built, step = make(moved=0.1, update={"tokens_per_micro_batch": tokens})
        before = held(built)
        metrics = updating.update(built, *step).metrics
        assert 0 < metrics["trust/kl"] <= 0.01
        assert 0 < metrics["trust/step_share"] <= 1
        new = built.policy.score(step[0])
        ratio = (new.logprobs - step[1].logprobs).exp()
        gained = (ratio * step[3].advantages)[step[0].action_mask].mean()
        assert gained > step[3].advantages[step[0].action_mask].mean()
        after.append({name: cell - before[name] for name, cell in held(built).items()})
        assert all(moved.any() for name, moved in after[-1].items() if not name.startswith("value_head"))
    whole, cut = (torch.cat([cell.flatten() for cell in moved.values()]) for moved in after)
    assert (whole - cut).norm() < 0.02 * whole.norm()


def test_a_step_that_no_length_makes_good_leaves_the_policy_to_the_last_bit(make, monkeypatch):
    built, step = make(moved=0.1)
    monkeypatch.setattr(updating, "natural_step", lambda gradient, product, **_: (product(gradient), gradient)[1])
    before = held(built)
    metrics = updating.update(built, *step).metrics  # uphill, and far
    assert (metrics["trust/step_share"], metrics["trust/kl"]) == (0.0, 0.0)
    for name, cell in held(built).items():
        assert torch.equal(cell, before[name]) == (not name.startswith("value_head")), name
    assert all(p.grad is None or not p.grad.any() for p in built.policy.trainable().values())


def test_it_goes_without_a_critic_and_with_adapters(make):
    pytest.importorskip("peft")
    built, step = make(policy={"value_head": None, "lora": {"rank": 2}}, credit={"type": "group_relative"})
    frozen = {name: p.detach().clone() for name, p in built.policy.model.named_parameters() if not p.requires_grad}
    before = held(built)
    assert updating._without_effect(built, step[3]) is None  # rows without advantage bound the step all the same
    metrics = updating.update(built, *step).metrics
    assert 0 < metrics["trust/kl"] <= 0.01
    assert any(not torch.equal(cell, before[name]) for name, cell in held(built).items())
    for name, parameter in built.policy.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name]), name


def test_while_the_critic_alone_learns_the_policy_stays(make):
    built, step = make(policy={"value_head": {"pretrain_steps": 1}})
    before = held(built)
    metrics = updating.update(built, *step).metrics
    assert "trust/kl" not in metrics
    for name, cell in held(built).items():
        assert torch.equal(cell, before[name]) == (not name.startswith("value_head")), name


def test_a_loss_that_is_not_finite_moves_nothing_and_is_counted(make):
    built, (batch, old, ref, credit, step) = make()
    before = held(built)
    updating.update(built, batch, old, ref, type(credit)(credit.advantages * math.nan, credit.returns), step)
    assert built.progress.skipped == 1
    assert all(torch.equal(cell, before[name]) for name, cell in held(built).items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"update": {"minibatches": 2}}, "one step of all samples"),
        ({"update": {"epochs": 2}}, "one step of all samples"),
        ({"update": {"weight_decay": 0.1, "stop_kl": 0.1}}, r"leave out update\.weight_decay, update\.stop_kl"),
        ({"policy": {"precision": "auto"}}, r"set policy\.precision=float32"),
        ({"policy": {"dropout": True}}, r"set policy\.dropout=false"),
        ({"policy": {"value_head": {"detach_trunk": False}}}, r"set policy\.value_head\.detach_trunk=true"),
        ({"kl": {"place": "loss", "estimator": "exact"}}, "another kl.estimator"),
        (
            {"method": {"type": "sft"}, "policy": {"value_head": None}, "credit": {"type": "reward_to_go"}},
            "needs method rl",
        ),
    ],
)
def test_what_it_cannot_go_with_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate({"algorithm": "trpo"} | changes)
