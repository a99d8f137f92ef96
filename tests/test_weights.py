"""Copies of the weights, and what else goes on around an update: hand numbers, effects in a run, exact resuming."""

import contextlib
import importlib.util
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pertoken import assembly
from pertoken.config import RunConfig
from pertoken.jobs import run
from pertoken.tracking import RunReader
from pertoken.training import trainer, updating
from pertoken.training.updating import rate_by_kl
from pertoken.training.weights import Anchor, Average

SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).parents[1] / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)


def named(*numbers):
    return {"w": nn.Parameter(torch.tensor(numbers))}


def test_the_average_by_hand():
    weights = named(0.0, 8.0)
    average = Average(weights, 0.75)
    for value in (1.0, 2.0):
        with torch.no_grad():
            weights["w"].fill_(value)
        average.update(weights)
    # 0 -> 0.25 -> 0.6875, and 8 -> 6.25 -> 5.1875
    assert average.cells["w"].tolist() == [0.6875, 5.1875]


def test_the_average_is_lent_and_given_back_to_the_last_bit():
    weights = named(0.1, 0.2)
    average = Average(weights, 0.9)
    with torch.no_grad():
        weights["w"].add_(0.3)
    held, kept = weights["w"].detach().clone(), average.cells["w"].clone()
    with contextlib.suppress(ZeroDivisionError), average.applied(weights):
        assert torch.equal(weights["w"].detach(), kept)
        raise ZeroDivisionError
    assert torch.equal(weights["w"].detach(), held)
    assert torch.equal(average.cells["w"], kept)


def test_the_pull_is_the_gradient_of_its_penalty():
    weights = named(1.0, -2.0, 3.0)
    anchor = Anchor(weights, l2=0.5, l1=0.25)
    with torch.no_grad():
        weights["w"].add_(torch.tensor([2.0, -4.0, 0.0]))
    assert anchor.distance(weights) == pytest.approx(20**0.5)
    weights["w"].grad = torch.ones(3)
    anchor.pull(weights)
    assert weights["w"].grad.tolist() == [1 + 0.5 * 2 + 0.25, 1 - 0.5 * 4 - 0.25, 1]
    w = weights["w"].detach().clone().requires_grad_()
    away = w - anchor.cells["w"]
    (0.25 * away.square().sum() + 0.25 * away.abs().sum()).backward()
    assert torch.allclose(weights["w"].grad - 1, w.grad)


def test_the_rate_follows_the_kl_between_its_bounds():
    assert rate_by_kl(1.0, 0.0, target=0.01, least=0.1) == 1.0
    assert rate_by_kl(1.0, 0.021, target=0.01, least=0.1) == 1 / 1.5
    assert rate_by_kl(0.5, 0.019, target=0.01, least=0.1) == 0.5
    assert rate_by_kl(0.5, 0.0051, target=0.01, least=0.1) == 0.5
    assert rate_by_kl(0.5, 0.0049, target=0.01, least=0.1) == 0.75
    assert rate_by_kl(0.11, 9.0, target=0.01, least=0.1) == 0.1


# --- in a run -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights")
    kills.prepare(place)
    return place


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


def configuration(place, folder, **sections):
    """A small run without the moody reward; each section over the defaults here."""
    values = kills.configuration(place, "full", folder).model_dump(exclude={"credit", "rewards"})
    values |= {"stop": {"steps": 3}, "checkpoint": {"every": 1}, "rewards": [{"name": "chrf", "granularity": "token"}]}
    values["kl"] = {"coefficient": 0.1}
    values["update"] = {"learning_rate": 1e-2, "epochs": 2}
    values["rollout"] |= {"sampling": {"max_new_tokens": 6}}
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields} if isinstance(fields, dict) else fields
    for reward in values["rewards"]:
        if reward["name"] == "prime":
            reward["model"] = str(place / "model")
    return RunConfig.model_validate(values)


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def metrics(folder, name):
    return RunReader(folder).metrics()[name]


def test_the_average_is_saved_and_evaluated_beside_the_policy(place, tmp_path):
    config = configuration(place, tmp_path / "run", update={"ema_decay": 0.75}, stop={"steps": 1})
    run.train(config)
    first, last, average = (
        weights_of(f) for f in (place / "model", config.run_folder / "model", tmp_path / "run/model-ema")
    )
    for name, cell in average.items():
        assert torch.allclose(cell, 0.75 * first[name] + 0.25 * last[name], atol=1e-6), name
    assert any(not torch.equal(average[name], last[name]) for name in last)
    rows = {(row["step"], row["split"]): row["metrics"] for row in RunReader(config.run_folder).evaluations()}
    assert set(rows) == {(step, split) for step in (0, 1) for split in ("validation", "validation-ema")}
    assert rows[0, "validation"] == rows[0, "validation-ema"]
    assert rows[1, "validation"]["perplexity"] != rows[1, "validation-ema"]["perplexity"]


def test_a_pull_keeps_the_weights_near_where_they_began(place, tmp_path):
    far = configuration(place, tmp_path / "far", update={"l2_to_initial": 1e-12})
    near = configuration(place, tmp_path / "near", update={"l2_to_initial": 100.0, "max_grad_norm": None})
    for config in (far, near):
        run.train(config)
    assert (
        0 < metrics(tmp_path / "near", "distance/initial")[-1] < 0.8 * metrics(tmp_path / "far", "distance/initial")[-1]
    )


def test_numbers_of_the_gradient_are_clipped_before_its_norm(place, tmp_path):
    built = assembly.build_run(
        configuration(place, tmp_path / "run", update={"max_grad_value": 0.5, "max_grad_norm": None})
    )
    for parameter in built.policy.trainable().values():
        parameter.grad = torch.full_like(parameter, -3.0)
    count = sum(parameter.numel() for parameter in built.policy.trainable().values())
    assert updating.step_optimizer(built, "", 1) == pytest.approx(0.5 * count**0.5, rel=1e-4)


def test_a_reference_that_is_moved_begins_at_a_kl_of_0_again(place, tmp_path):
    kl = {"coefficient": 0.1, "refresh_every": 2}
    run.train(configuration(place, tmp_path / "moved", kl=kl, update={"epochs": 1}))
    run.train(configuration(place, tmp_path / "still", update={"epochs": 1}))
    moved, still = (metrics(tmp_path / name, "kl/sequence") for name in ("moved", "still"))
    assert moved[:2] == still[:2]
    assert abs(moved[2]) < 1e-4 < abs(still[2])


def test_a_reference_can_go_a_part_of_the_way(place, tmp_path):
    built = assembly.build_run(configuration(place, tmp_path / "run"))
    before = {name: cell.clone() for name, cell in built.reference.tensors().items()}
    with torch.no_grad():
        for parameter in built.policy.trainable().values():
            parameter.add_(1.0)
    built.reference.follow(0.25)
    for name, cell in built.reference.tensors().items():
        assert torch.allclose(cell, before[name] + 0.25, atol=1e-5), name


def test_the_rate_falls_on_a_plateau_and_on_large_updates(place, tmp_path):
    plateau = {"schedule": "plateau", "plateau_patience": 1, "learning_rate": 1e-9, "final_share": 0.3}
    config = configuration(
        place, tmp_path / "plateau", update=plateau, evaluation={"every": 1, "metric": "rouge_l"}, stop={"steps": 4}
    )
    run.train(config)
    assert metrics(tmp_path / "plateau", "learning_rate") == pytest.approx([1e-9, 0.5e-9, 0.3e-9, 0.3e-9])
    large = configuration(place, tmp_path / "large", update={"schedule": "kl", "target_kl": 1e-9})
    run.train(large)
    rates, moved = metrics(tmp_path / "large", "learning_rate"), metrics(tmp_path / "large", "update/kl")
    assert min(moved) > 2e-9
    assert rates == pytest.approx([1e-2, 1e-2 / 1.5, 1e-2 / 1.5**2])


EVERYTHING = {
    "averaged, anchored, moved": {
        "update": {"ema_decay": 0.5, "l2_to_initial": 0.1, "l1_to_initial": 1e-4, "schedule": "kl", "target_kl": 1e-3},
        "kl": {"refresh_every": 2, "refresh_share": 0.5},
        "credit": {"type": "shapley", "samples": 9},
    },
    "plateau": {
        "update": {"schedule": "plateau", "plateau_patience": 1, "learning_rate": 1e-9},
        "evaluation": {"every": 1, "metric": "rouge_l"},
    },
    "a reward that learns": {
        "rewards": [
            {"name": "length", "min_words": 3},
            {"name": "prime", "model": "", "outcome": "length", "threshold": 0.0, "learning_rate": 1e-2},
        ],
        "kl": {"place": "none"},
    },
    "a mask policy": {
        "rollout": {"mask": {"top_p": 0.5, "refresh_every": 2}, "sampling": {"max_new_tokens": 6}},
        "credit": {"type": "reward_to_go"},
    },
    "a trust region": {"update": {"epochs": 1, "trust_region": {"iterations": 2}}, "credit": {"type": "reward_to_go"}},
    "monte_carlo": {"credit": {"type": "monte_carlo", "every": 2, "rollouts": 2}, "kl": {"place": "none"}},
}  # fmt: skip


@pytest.mark.parametrize("sections", EVERYTHING.values(), ids=EVERYTHING)
def test_interrupted_after_each_step_it_ends_as_if_it_never_was(place, tmp_path, sections):
    def outcome(folder):
        found = kills.outcome(folder)
        average = folder / "model-ema"
        cells = weights_of(average) if average.exists() else {}
        return found | {"average": {name: cell.tolist() for name, cell in cells.items()}}

    run.train(configuration(place, tmp_path / "whole", **sections))
    parts = configuration(place, tmp_path / "parts", **sections)
    begun = False
    while True:
        torch.manual_seed(random.randrange(10**6))
        np.random.seed(random.randrange(10**6))
        made = []
        result = run.train(
            parts, resume=parts.run_folder if begun else None, on_step=lambda report, _, made=made: made.append(report),
            interrupted=lambda made=made: len(made) >= 1,
        )  # fmt: skip
        begun = True
        if not result.interrupted:
            break
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


def test_an_average_that_a_checkpoint_has_not_begins_with_the_weights_of_now(place, tmp_path):
    config = configuration(place, tmp_path / "run")
    made = []
    run.train(config, on_step=lambda report, _: made.append(report), interrupted=lambda: bool(made))
    path = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    built = assembly.build_run(configuration(place, tmp_path / "run", update={"ema_decay": 0.5}), checkpoint=path)
    assert any("no average of this run: it starts anew" in note for note in built.notes)
    for name, parameter in built.policy.trainable().items():
        assert torch.equal(built.average.cells[name], parameter)


def test_a_mask_policy_that_a_checkpoint_has_not_begins_with_the_weights_of_now(place, tmp_path):
    config = configuration(place, tmp_path / "run")
    made = []
    run.train(config, on_step=lambda report, _: made.append(report), interrupted=lambda: bool(made))
    path = next((tmp_path / "run" / "checkpoints").glob("step-*"))
    built = assembly.build_run(configuration(place, tmp_path / "run", rollout={"mask": {}}), checkpoint=path)
    assert any("no mask of this run: it starts anew" in note for note in built.notes)
    cells = built.mask.parameters()
    for name, parameter in built.policy.trainable().items():
        assert torch.equal(cells[name], parameter)


def test_the_mask_policy_is_moved_every_so_many_steps_and_not_between(place, tmp_path):
    built = assembly.build_run(configuration(place, tmp_path / "run", rollout={"mask": {"refresh_every": 3}}))
    name, parameter = next(iter(built.policy.trainable().items()))
    for step in range(1, 7):
        before = built.mask.parameters()[name].clone()
        with torch.no_grad():
            parameter.add_(1.0)
        trainer.settle(built, step)
        built.engine.load_weights(built.policy.trainable(), version=step)
        assert torch.equal(built.mask.parameters()[name], parameter if step % 3 == 0 else before), step


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rollout": {"mask": {}, "engine": "transformers"}},
            r"rollout\.mask asks a second model .* rollout\.engine=native",
        ),
        ({"update": {"schedule": "plateau"}, "evaluation": {"every": None}}, "goes by evaluations while training"),
        ({"update": {"schedule": "kl"}}, "set both, or neither"),
        ({"update": {"schedule": "kl", "target_kl": 0.1, "epochs": 1, "minibatches": 1}}, "above 1"),
        ({"kl": {"refresh_every": 1}, "policy": {"lora": {}}}, "without its adapters"),
    ],
)
def test_what_cannot_work_is_refused(place, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        configuration(place, tmp_path / "run", **changes)
