"""The parts that published methods are made of, as a run uses them: each setting has an effect, and the right one."""

import json
import math
import sys

import pytest
import torch

from pertoken import assembly
from pertoken.batching import to_batch
from pertoken.config import (
    CreditSection,
    Gae,
    GroupRelative,
    LeaveOneOutProcess,
    OnlineDpo,
    OptimalTokenBaseline,
    RunConfig,
    SelfCritical,
)
from pertoken.credit import gae, macro_gae, optimal_token_baseline
from pertoken.errors import ConfigError
from pertoken.rewards import Scene, episode_reward, token_reward
from pertoken.sampling import Controls
from pertoken.testing import episode
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.training.resampling import beside
from pertoken.types import Credit, PolicyOutput, TokenRewards


@token_reward
def small_numbers(sample):
    """Something else for each token."""
    return [token / 256 for token in sample.tokens]


@episode_reward
def by_prompt(sample):
    """The same for all samples of a prompt with an even number; else it differs."""
    return 1.0 if int(sample.item.id) % 2 == 0 else float(sum(sample.tokens) % 7)


class Remembers:
    """A reward with a memory."""

    def __call__(self, scene):
        return torch.zeros_like(scene.batch.sample_logprobs)

    def get_state(self):
        return 0

    def set_state(self, state):
        """Nothing."""


@pytest.fixture
def make(model_folder, tmp_path, monkeypatch):
    """`make(key__sub=value)`: the parts of a small run with these settings."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__))
    for name in ("small_numbers", "by_prompt", "Remembers"):
        monkeypatch.setattr(sys.modules[__name__], name, globals()[name], raising=False)
    rows = [{"id": str(k), "prompt": f"say {k}"} for k in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(**changes):
        values = {
            "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu", "compile": False},
            "task": {
                "type": "file", "path": str(tmp_path / "data.jsonl"), "prompt": "{prompt}:", "answer": None, "id": "id",
                "fractions": (1.0, 0.0, 0.0),
            },
            "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 6}},
            "rewards": [{"fn": f"{__name__}:small_numbers"}],
            "update": {"learning_rate": 1e-2},
            "kl": {"place": "none", "measure": False},
            "evaluation": {"items": 0},
        }  # fmt: skip
        for dotted, value in changes.items():
            target = values
            *path, last = dotted.split("__")
            for name in path:
                target = target.setdefault(name, {})
            target[last] = value
        return assembly.build_run(RunConfig.model_validate(values))

    return make


def one_step(run, step=1):
    """Credit and figures of one step, as the loop makes it."""
    episodes = trainer.generate(run, step)
    batch = to_batch(episodes, run.controls)
    old = trainer.score_old(run, batch)
    scene = Scene(batch, episodes, run.policy.tokenizer, old, None, step)
    rewards = trainer.reward(run, scene)
    drawn = beside(scene, run.config, run.engine, run.policy, run.controls, run.rewards, rewards)
    paid = drawn.rewards or rewards
    given = assign(trainer.credit_of(run.config, step), paid, batch, old, drawn.greedy, drawn.states)
    return scene, given, updating.update(run, batch, old, None, given, step).metrics


def weights(run):
    return {name: p.detach().clone() for name, p in run.policy.trainable().items()}


# --- credit -------------------------------------------------------------------------------------------------


def rows():
    """Two finished rows and one that was cut off, with rewards, values and entropies."""
    answers = ([5, 6, 7, 8], [5, 6, 9, 4], [5, 4, 4, 4])
    stops = ("eos", "eos", "length")
    episodes = [
        episode([1, 2], tokens, id=str(k), stop=stop)
        for k, (tokens, stop) in enumerate(zip(answers, stops, strict=True))
    ]
    batch = to_batch(episodes, Controls())
    g = torch.Generator().manual_seed(0)
    cells = [torch.where(batch.action_mask, torch.rand(3, 6, generator=g), 0.0) for _ in range(4)]
    rewards, values, entropy, logprobs = cells
    old = PolicyOutput(-logprobs, entropy, values, bootstrap=torch.tensor([9.0, 9.0, 0.5]))
    return TokenRewards(rewards, {"r": rewards}), batch, old


def advantages_of(config: CreditSection) -> torch.Tensor:
    rewards, batch, old = rows()
    return assign(config, rewards, batch, old).advantages


def test_what_was_cut_off_teaches_nothing_and_stays_in_the_statistics_of_its_group():
    keep = advantages_of(GroupRelative(scale_by_std=False))
    drop = advantages_of(GroupRelative(scale_by_std=False, truncated="drop"))
    assert torch.equal(drop[:2], keep[:2])
    assert keep[2].any()
    assert not drop[2].any()


def test_a_share_of_the_tokens_is_chosen_by_entropy():
    _, batch, old = rows()
    keep = advantages_of(GroupRelative())
    some = advantages_of(GroupRelative(entropy_share=0.25))
    chosen = (some != 0) & batch.action_mask
    assert int(chosen.sum()) == 3  # of 12
    assert torch.equal(some[chosen], keep[chosen])
    assert old.entropy[chosen].min() > old.entropy[batch.action_mask & ~chosen].max()


def test_critic_and_policy_can_have_a_lambda_each():
    rewards, batch, old = rows()
    after = torch.tensor([0.0, 0.0, 0.5])
    arguments = rewards.total, old.values, batch.action_mask, after

    def given(**settings):
        return assign(Gae(normalize="none", **settings), rewards, batch, old)

    decoupled = given(lam=0.5, lam_critic=1.0)
    torch.testing.assert_close(decoupled.advantages, gae(*arguments, gamma=1.0, lam=0.5)[0])
    torch.testing.assert_close(decoupled.returns, gae(*arguments, gamma=1.0, lam=1.0)[1])
    adaptive = given(lam=0.0, length_adaptive=0.5)
    torch.testing.assert_close(adaptive.advantages, gae(*arguments, gamma=1.0, lam=0.5)[0])  # 1 - 1 / (0.5 * 4)
    merged = given(lam=0.5, macro_size=2)
    torch.testing.assert_close(merged.advantages, macro_gae(*arguments, size=2, gamma=1.0, lam=0.5)[0])
    assert not torch.allclose(merged.advantages, given(lam=0.5).advantages)


def test_the_optimal_baseline_weighs_rows_by_how_unlikely_their_tokens_were():
    rewards, batch, old = rows()
    energies = 1 - old.logprobs.exp()
    expected = optimal_token_baseline(rewards.total, energies, batch.action_mask, batch.group, gamma=0.9)
    torch.testing.assert_close(advantages_of(OptimalTokenBaseline(gamma=0.9)), expected)


def test_pairs_are_of_rows_that_every_part_speaks_about_and_need_the_reference():
    rewards, batch, old = rows()
    with pytest.raises(ValueError, match="reference"):
        advantages_of(OnlineDpo())

    def signs(rewards):
        given = assign(OnlineDpo(beta=0.5), rewards, batch, old, ref=old).advantages
        assert torch.equal(given != 0, batch.action_mask & (given != 0).any(1, keepdim=True))
        return (given.sum(1) / batch.action_mask.sum(1)).tolist()

    ranks = rewards.total.sum(1).argsort().argsort().tolist()
    assert signs(rewards) == [{0: -0.25, 1: 0.0, 2: 0.25}[rank] for rank in ranks]
    silent = torch.tensor([rank == 2 for rank in ranks])
    told = TokenRewards(rewards.total, rewards.parts, {"r": silent})
    assert signs(told) == [{0: -0.25, 1: 0.25, 2: 0.0}[rank] for rank in ranks]


def test_self_critical_needs_the_greedy_answers():
    rewards, batch, old = rows()
    with pytest.raises(ValueError, match="greedy"):
        advantages_of(SelfCritical())
    given = assign(SelfCritical(), rewards, batch, old, torch.tensor([1.0, 1.0, 2.0])).advantages
    totals = rewards.total.sum(1) - torch.tensor([1.0, 1.0, 2.0])
    torch.testing.assert_close(given, torch.where(batch.action_mask, totals[:, None], 0.0))


# --- the run ------------------------------------------------------------------------------------------------


def test_the_greedy_answer_is_drawn_once_a_prompt_and_rewarded(make, monkeypatch):
    run = make(credit={"type": "self_critical"}, rollout__sampling__top_k=3)
    asked = []
    generate = run.engine.generate
    monkeypatch.setattr(
        run.engine, "generate", lambda prompts, *a, **k: asked.append(len(prompts)) or generate(prompts, *a, **k)
    )
    scene, given, _ = one_step(run)
    assert asked == [16, 4]
    mask = scene.batch.action_mask
    earned = torch.where(mask, scene.batch.tokens / 256, 0.0).sum(1)
    greedy = earned - _at_first_action(given.advantages, mask)
    for group in range(4):
        assert greedy[scene.batch.group == group].std() < 1e-5
    # of the model itself: the most probable token at each place
    prompt = scene.episodes[0].tokens[: scene.episodes[0].prompt_length]
    fresh = make().policy.hf_model
    ids = torch.tensor([prompt])
    for _ in range(6):
        ids = torch.cat([ids, fresh(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == 256:
            break
    assert greedy[0].item() == pytest.approx(ids[0, len(prompt) :].sum().item() / 256, abs=1e-4)


def _at_first_action(cells, mask):
    return cells.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]


def test_groups_without_a_difference_are_drawn_anew(make):
    plain = make(rewards=[{"fn": f"{__name__}:by_prompt"}])
    dull = {e.item.id for e in trainer.generate(plain, 1) if int(e.item.id) % 2 == 0}
    assert dull
    run = make(rewards=[{"fn": f"{__name__}:by_prompt"}], rollout__redraws=6)
    episodes = trainer.generate(run, 1)
    kept = {e.item.id for e in episodes}
    assert run.redrawn == len(dull)
    assert all(int(name) % 2 for name in kept)
    assert [e.group for e in episodes] == [k // 4 for k in range(16)]
    assert len({e.id for e in episodes}) == 16
    again = trainer.generate(run, 1)
    assert [e.tokens for e in again] == [e.tokens for e in episodes]  # a function of seed and step


def test_redrawing_is_bounded_and_leaves_what_it_cannot_mend(make):
    nothing = [{"fn": f"{__name__}:by_prompt", "weight": 0.0}]
    run = make(rewards=nothing, rollout__redraws=2)
    assert len(trainer.generate(run, 1)) == 16
    assert run.redrawn == 0


def test_a_reward_that_remembers_is_not_asked_about_further_samples(make):
    rewards = [{"fn": f"{__name__}:Remembers"}]
    beside = ("self_critical", "monte_carlo", "shapley", "leave_one_token_out", "differences")
    for changes in ({"rollout__redraws": 1}, *({"credit": {"type": name}} for name in beside)):
        with pytest.raises(ConfigError, match="remembers"):
            make(rewards=rewards, **changes)


@pytest.mark.parametrize("settings", [
    {"type": "shapley", "samples": 9}, {"type": "shapley", "unit": "word"}, {"type": "leave_one_token_out"},
    {"type": "differences"}, {"type": "attention"}, {"type": "attention", "model": ""},
])  # fmt: skip
def test_each_way_to_place_rewards_anew_takes_one_line(make, model_folder, settings):
    """What is paid at the end is credited by token, and a step learns from it."""
    if "model" in settings:
        settings = settings | {"model": str(model_folder)}
    run = make(credit=settings, rewards=[{"fn": f"{__name__}:by_prompt"}])
    scene, given, metrics = one_step(run)
    terminal = assign(LeaveOneOutProcess(), trainer.reward(run, scene), scene.batch, scene.old)
    assert not torch.allclose(given.advantages, terminal.advantages)
    assert given.advantages[scene.batch.action_mask].any()
    assert metrics["grad/norm"] > 0
    drawn = beside(scene, run.config, run.engine, run.policy, run.controls, run.rewards, trainer.reward(run, scene))
    assert set(drawn.figures()) == (set() if settings["type"] == "attention" else {"texts/beside"})


def test_attention_of_a_policy_that_cannot_tell_is_refused_before_the_first_token(make, monkeypatch):
    monkeypatch.setattr("pertoken.policy.model.find_layout", lambda model: "padded")
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM attends in a way of its own.*credit\.model"):
        make(credit={"type": "attention"})


def test_an_update_ends_early_where_the_policy_has_moved_too_far(make):
    settings = {"update__epochs": 4, "update__learning_rate": 3e-2}
    free, held = make(**settings), make(**settings, update__stop_kl=1e-3)
    for run in (free, held):
        before = weights(run)
        metrics = one_step(run)[2]
        moved = sum((p.detach() - before[name]).abs().sum().item() for name, p in run.policy.trainable().items())
        run.notes.append(str(moved))
        assert metrics.get("update/stopped") == (1.0 if run is held else None)
    assert 0 < float(held.notes[-1]) < 0.8 * float(free.notes[-1])
    assert one_step(make(**settings, update__stop_kl=1e6))[2]["update/stopped"] == 0.0


def test_the_critic_alone_learns_first_and_by_the_returns(make):
    gae_credit = {"type": "gae", "lam": 0.0, "normalize": "none"}
    head = {"pretrain_steps": 1, "learning_rate": 1e-2}
    run = make(credit=gae_credit, policy__value_head=head, update__weight_decay=0.5)
    before = weights(run)
    scene, given, _ = one_step(run, 1)
    changed = {name for name, p in run.policy.trainable().items() if not torch.equal(p, before[name])}
    assert changed == {"value_head.linear.weight", "value_head.linear.bias"}
    totals = trainer.reward(run, scene).total.sum(1)
    first = scene.batch.action_mask & (scene.batch.action_mask.cumsum(1) == 1)
    ended = scene.batch.terminated
    assert torch.allclose(given.returns[first][ended], totals[ended])
    before = weights(run)
    one_step(run, 2)
    changed = {name for name, p in run.policy.trainable().items() if not torch.equal(p, before[name])}
    assert len(changed) > 10


@pytest.mark.parametrize(("floor", "paid"), [(None, True), (1e3, True), (1e-3, False)])
def test_entropy_is_paid_below_its_floor_alone(make, floor, paid):
    """Without advantages the entropy is the only thing that can move the weights."""
    run = make(objective__entropy_coefficient=0.1, objective__entropy_floor=floor, rewards=[
        {"fn": f"{__name__}:by_prompt", "weight": 0.0}
    ])  # fmt: skip
    before = weights(run)
    one_step(run)
    moved = any(not torch.equal(p, before[name]) for name, p in run.policy.trainable().items())
    assert moved == paid


def test_masked_importance_weights_leave_tokens_of_older_weights_out(make):
    """What another policy sampled: all tokens beyond a cap of next to 1 are left out, and counted."""
    run = make(objective__importance_cap=1.0001, objective__importance_outside="mask")
    episodes = trainer.generate(run, 1)
    batch = to_batch(episodes, run.controls)
    old = run.policy.score(batch)
    shifted = PolicyOutput(old.logprobs + batch.action_mask * 0.1, old.entropy)
    given = Credit(batch.action_mask.float())
    run.staleness = 1  # so that the shift is no mistake
    new = run.policy.score(batch, grad=True)
    cut = next(updating.optimizer_steps(batch, shifted, None, given, epochs=1, num_minibatches=1, seed=0))
    part = next(cut(10**6))
    sums, streams = {"loss/policy": 0.0, "loss/value": 0.0}, {}
    loss = updating.part_loss(run, part, new, sums, streams, batch, 0.0, head_only=False)
    assert loss.item() == 0.0
    assert not streams["importance_weight"].any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"importance_level": "geometric"}}, "importance_outside=mask"),
        ({"objective": {"importance_floor": 0.5}}, "importance_outside=mask"),
        ({"objective": {"importance_floor": 3.0, "importance_outside": "mask"}}, "every weight would be left out"),
        ({"objective": {"entropy_floor": 1.0}}, "entropy_coefficient"),
        ({"rollout": {"redraws": 1, "ahead": True}}, "rollout.ahead"),
        ({"rollout": {"redraws": 1}, "credit": {"type": "reward_to_go"}}, "learns from them too"),
        ({"rollout": {"redraws": 1}, "rewards": [{"name": "rouge_l", "normalise": "running"}]}, "remember"),
        ({"credit": {"type": "self_critical"}, "rewards": [{"name": "rouge_l", "normalise": "group"}]}, "greedy"),
        (
            {"credit": {"type": "shapley"}, "rewards": [{"name": "rouge_l", "normalise": "batch"}]},
            "without some tokens",
        ),
        ({"credit": {"type": "attention"}, "rollout": {"samples_per_prompt": 1}}, "compares the samples"),
        (
            {
                "credit": {"type": "gae", "macro_size": 5, "length_adaptive": 0.05},
                "policy": {"value_head": {}},
            },
            "leave one of them out",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        RunConfig.model_validate(changes)
    assert math.isfinite(RunConfig().objective.importance_floor)
