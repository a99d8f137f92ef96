"""Samples of earlier steps are learnt from again: which ones, by which weights, and exactly so after a resume."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pertoken import assembly, credit
from pertoken.errors import ConfigError
from pertoken.jobs import run
from pertoken.objectives import importance_weights, policy_gradient
from pertoken.policy.model import Policy
from pertoken.rewards import SampleReward
from pertoken.testing import episode
from pertoken.training import trainer, updating
from pertoken.training.replay import Buffer, Group, renumbered
from pertoken.types import Item
from tests.test_exact_gradient import EXACT, world
from tests.test_trainer import data, importable, metrics_of, settings  # noqa: F401

ITEMS = {name: Item(name, "prompt", "answer") for name in "abcd"}


def group(name, step, advantage=1.0, support=None):
    """Two samples of the item `name`, drawn in `step`."""
    episodes = []
    for k in range(2):
        one = episode([1, 2], [3 + k, 4, 5], id=f"{step}/{name}/{k}", item=ITEMS[name], stop="length")
        known = {"entropies": [0.0, 0.0, 0.5, 0.25, 1.0], "support": support, "policy_version": (step - 1, step - 1)}
        episodes.append(replace(one, **known))
    return Group(step, tuple(episodes), advantage)


def test_only_groups_of_the_last_steps_are_taken_each_once():
    buffer = Buffer(2, "none", seed=0, groups=[group("a", 1), group("b", 2), group("c", 3)])
    assert {g.step for g in buffer.take(4, 5)} == {2, 3}
    assert len(buffer.take(4, 5)) == 2
    assert len(buffer.take(4, 1)) == 1
    assert buffer.take(6, 5) == []
    assert buffer.take(4, 2) == buffer.take(4, 2), "by seed and step alone"


@pytest.mark.parametrize(("priority", "shares"), [("none", [1 / 3] * 3), ("advantage", [0.0, 0.25, 0.75])])
def test_how_often_a_group_is_taken(priority, shares):
    groups = [group("a", 1, 0.0), group("b", 1, 1.0), group("c", 1, 3.0)]
    buffer = Buffer(10_000, priority, seed=3, groups=groups)
    taken = [buffer.take(step, 1)[0] for step in range(2, 4002)]
    assert [taken.count(g) / 4000 for g in groups] == pytest.approx(shares, abs=0.03)
    assert len(buffer.take(2, 3)) == (3 if priority == "none" else 2), "where nothing is to be learnt, nothing is taken"


def test_what_is_kept_and_how_much_it_has_to_teach():
    """Mean |advantage| over the actions of a group: (1 + 2 + 3 + 0 + 0 + 0) / 6, and the same tenfold."""
    first, second = group("a", 5), group("b", 5)
    rows = [*first.episodes, *(replace(e, group=1) for e in second.episodes)]
    advantages = torch.zeros(4, 5)
    advantages[0, 2:] = torch.tensor([1.0, -2.0, 3.0])
    advantages[2, 2:] = torch.tensor([10.0, -20.0, 30.0])
    buffer = Buffer(3, "advantage", seed=0, groups=[group("c", 2), group("d", 3)])
    buffer.add(5, rows, advantages)
    assert [(g.step, g.advantage) for g in buffer.groups] == [(3, 1.0), (5, 1.0), (5, 10.0)]
    assert [e.item.id for g in buffer.groups for e in g.episodes] == list("ddaabb")


def test_saved_and_read_it_is_the_same():
    support = np.array([[1, 0], [7, 255], [0, 3]], np.uint8)
    buffer = Buffer(9, "advantage", seed=1, groups=[group("a", 1, 0.25), group("b", 2, 0.5, support), group("c", 2)])
    other = Buffer(9, "advantage", seed=1)
    other.set_state(json.loads(json.dumps(buffer.state())), ITEMS)
    assert other == buffer
    assert np.array_equal(other.groups[1].episodes[0].support, support)
    assert other.groups[0].episodes[0].entropies == [0.0, 0.0, 0.5, 0.25, 1.0]
    assert other.take(3, 2) == buffer.take(3, 2)
    other.set_state(buffer.state(), {name: item for name, item in ITEMS.items() if name != "b"})
    assert [g.episodes[0].item.id for g in other.groups] == ["a", "c"], "items that are gone"


def test_taken_groups_get_numbers_of_their_own():
    again = renumbered([group("a", 1), group("a", 2)], 3)
    assert [e.group for e in again] == [3, 3, 4, 4]


@pytest.mark.parametrize("cap", [1e9, 1.5])
def test_weights_by_sequence_make_replayed_groups_unbiased_up_to_the_cap(cap):
    """Pairs of an earlier policy mu, all of them, compared with each other and weighed by min(pi / mu, cap).

    The mean is the gradient of E[R] under pi if nothing is capped; else sum_y min(pi, cap mu)(y) (R(y) - E_mu R) grad
    log pi(y): the baseline is that of mu, which changes nothing where the weights are whole.
    """
    w = world(vocabulary=3, length=3)
    mask, mu = w.action_mask, w.sample_logprobs.sum(1).exp()
    pairs = torch.cartesian_prod(*[torch.arange(len(mu))] * 2)
    rows, group_of = pairs.flatten(), torch.arange(len(pairs)).repeat_interleave(2)
    advantages = credit.leave_one_out(w.rewards[rows], mask[rows], group_of)
    weights = importance_weights(w.logprobs, w.sample_logprobs, mask, high=cap, level="sequence")[rows]
    loss = (policy_gradient(w.logprobs[rows], advantages, mask[rows]) * weights).sum(1)
    probability = mu[pairs].prod(1)[group_of]
    mean = torch.autograd.grad(-(probability * loss).sum() / 2, w.logits, retain_graph=True)[0]

    exact = w.objective_gradient(1.0, bootstrapped=False)
    returns = (w.rewards * mask).sum(1)
    kept = torch.minimum(w.probability.detach(), cap * mu) * (returns - (mu * returns).sum())
    capped = torch.autograd.grad((kept * w.logprobs.sum(1)).sum(), w.logits, retain_graph=True)[0]
    assert (mean - capped).abs().max() < EXACT
    assert ((mean - exact).abs().max() < EXACT) == (cap == 1e9)


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


def replaying(model_folder, data, tmp_path, **changes):  # noqa: F811
    rewards = [{"fn": "tests.test_trainer:token_numbers", "name": "numbers"}]
    given = {"rollout__replay": {"share": 0.5, "steps": 2}, "rewards": rewards, "stop__steps": 3}
    given |= {"evaluation": {"items": 0}} | changes
    return settings(model_folder, data, tmp_path, **given)


def without_times(rows):
    left_out = ("time", "memory/", "tokens/per_second")
    return [{k: v for k, v in row.items() if not k.startswith(left_out)} for row in rows]


def test_half_of_a_step_is_of_earlier_ones_and_figures_are_of_the_new_half(model_folder, data, tmp_path):  # noqa: F811
    """Large steps: log-probs of replayed rows are far from those at sampling, and the exact check must not see them."""
    reports = []
    config = replaying(model_folder, data, tmp_path, update__learning_rate=1e-2)
    run.train(config, on_step=lambda report, _: reports.append(report))
    rows = metrics_of(config.run_folder)
    assert [row["replay/rows"] for row in rows] == [0, 8, 8]
    assert all(row["drift/max"] < updating.RATIO_TOLERANCE for row in rows)
    assert all(row["staleness"] == 0 for row in rows)
    assert all(0 < row["replay/effective_share"] < 1 for row in rows[1:])
    for step, (report, row) in enumerate(zip(reports, rows, strict=True), start=1):
        new = [e for e in report.episodes if e.policy_version[0] == step - 1]
        old = [e for e in report.episodes if e.policy_version[0] < step - 1]
        assert list(report.episodes) == [*new, *old]
        assert (len(new), len(old)) == ((16, 0) if step == 1 else (8, 8))
        assert all(1 <= step - 1 - e.policy_version[0] <= 2 for e in old)
        assert row["tokens/generated"] == sum(sum(e.action_mask) for e in new)
        assert row["completion/length"] == sum(sum(e.action_mask) for e in new) / len(new)
        total = report.streams["reward/total"][: len(new)].sum().item() / len(new)
        assert row["reward/total"] == pytest.approx(total)
        if old:
            ages = [step - 1 - e.policy_version[0] for e in old]
            assert row["replay/staleness"] == sum(ages) / len(ages)
    assert [e.id for e in reports[1].episodes if e.policy_version[0] == 0] != []


@pytest.mark.parametrize("update", [{}, {"epochs": 2}, {"minibatches": 2}])
def test_weights_compare_now_with_the_sample(model_folder, data, tmp_path, monkeypatch, update):  # noqa: F811
    own, seen = updating.update, []

    def watched(running, batch, old, *rest):
        now = running.policy.score(batch).logprobs
        updated = own(running, batch, old, *rest)
        seen.append((batch, old, now, updated.streams["importance_weight"], running.sampled))
        return updated

    monkeypatch.setattr(trainer, "update", watched)
    changes = {f"update__{name}": value for name, value in update.items()}
    run.train(replaying(model_folder, data, tmp_path, update__learning_rate=3e-3, stop__steps=3, **changes))
    for batch, old, now, weights, sampled in seen[1:]:
        expected = torch.where(batch.action_mask, (now - batch.sample_logprobs).exp().clamp_max(2.0), 0.0)
        assert torch.allclose(weights, expected, atol=2e-4)
        assert (old.logprobs - now)[sampled:].abs().max() < 1e-4
        assert (now - batch.sample_logprobs)[batch.action_mask][-20:].abs().max() > 1e-3


def test_with_weights_that_stay_the_same_all_weights_are_one(model_folder, data, tmp_path):  # noqa: F811
    config = replaying(model_folder, data, tmp_path, update__learning_rate=1e-30)
    run.train(config)
    assert all(row["replay/effective_share"] == pytest.approx(1.0) for row in metrics_of(config.run_folder)[1:])


def test_the_old_policy_is_scored_for_replayed_rows_alone(model_folder, data, tmp_path, monkeypatch):  # noqa: F811
    own, rows = Policy.score, []

    def score(self, batch, **how):
        if not how:
            rows.append(len(batch.episode_ids))
        return own(self, batch, **how)

    running = assembly.build_run(replaying(model_folder, data, tmp_path))
    monkeypatch.setattr(Policy, "score", score)
    for step in (1, 2):
        batch = trainer.to_batch(trainer.generate(running, step), running.controls)
        trainer.score_old(running, batch)
        running.replay.groups = [group("a", 1), group("b", 1)]
        running.progress.step = 1
    assert rows == [4]


@pytest.mark.parametrize("priority", ["none", "advantage"])
def test_interrupted_after_each_step_it_ends_as_if_it_never_was(model_folder, data, tmp_path, priority):  # noqa: F811
    changes = {
        "rollout__replay": {"share": 0.5, "steps": 2, "priority": priority},
        "rollout__sampling": {"max_new_tokens": 6, "top_p": 0.9},
        "kl": {"coefficient": 0.05},
    }
    whole = replaying(model_folder, data, tmp_path, folder=str(tmp_path / "whole"), **changes)
    run.train(whole)
    parts = replaying(model_folder, data, tmp_path, folder=str(tmp_path / "parts"), **changes)
    lives = 0
    while True:
        made = []
        result = run.train(
            parts, resume=parts.run_folder if lives else None, on_step=lambda report, _: made.append(report.step),  # noqa: B023
            interrupted=lambda: bool(made),  # noqa: B023
        )  # fmt: skip
        lives += 1
        if not result.interrupted:
            break
    assert lives == 3
    assert without_times(metrics_of(parts.run_folder)) == without_times(metrics_of(whole.run_folder))
    weights = [(config.run_folder / "model" / "model.safetensors").read_bytes() for config in (parts, whole)]
    assert weights[0] == weights[1]


def test_resumed_with_other_sampling_it_gathers_anew_and_says_so(model_folder, data, tmp_path):  # noqa: F811
    first, made, notes = replaying(model_folder, data, tmp_path), [], []
    run.train(first, on_step=lambda report, _: made.append(1), interrupted=lambda: len(made) >= 2)
    other = replaying(model_folder, data, tmp_path, rollout__sampling={"max_new_tokens": 8, "top_k": 5})
    run.train(other, resume=first.run_folder, on_note=notes.append)
    assert any("gathered anew" in note for note in notes)
    assert [row["replay/rows"] for row in metrics_of(first.run_folder)] == [0, 8, 0]


class Remembers(SampleReward):
    """Counts what it has scored."""

    def __init__(self):
        self.seen = 0

    def token_values(self, sample):
        self.seen += 1
        return [0.1] * len(sample.tokens)

    def get_state(self):
        return self.seen

    def set_state(self, state):
        self.seen = state


def test_a_reward_that_remembers_is_refused(model_folder, data, tmp_path):  # noqa: F811
    config = replaying(model_folder, data, tmp_path, rewards=[{"fn": f"{__name__}:Remembers"}])
    with pytest.raises(ConfigError, match=r"rollout\.replay scores samples again"):
        assembly.build_run(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollout__replay": {"share": 0.1}}, "is 0 prompts"),
        ({"rollout__replay": {"share": 0.9}}, "is 4 prompts"),
        ({"objective__importance_cap": None}, "importance_cap null"),
        ({"rollout__ahead": True}, "leave one of them out"),
        ({"credit": {"type": "gae"}, "policy__value_head": {}}, "what the policy of now is worth"),
        ({"credit": {"type": "self_critical"}}, "what the policy of now is worth"),
        ({"rewards": [{"name": "length", "normalise": "running"}]}, "would count them twice"),
    ],
)
def test_what_makes_no_sense_is_refused(model_folder, data, tmp_path, changes, words):  # noqa: F811
    with pytest.raises(ValidationError, match=words):
        replaying(model_folder, data, tmp_path, **changes)
