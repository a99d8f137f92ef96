"""The loop on a tiny model: it learns, stops, checks, skips, resumes, and says what is wrong."""

import json
import math
import random
import sys
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from pertoken import assembly
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import NumericsError, RewardError, RunFolderError, TaskError
from pertoken.jobs import run
from pertoken.rewards import Scene, episode_reward, token_reward
from pertoken.sampling import Controls
from pertoken.testing import episode
from pertoken.tracking import RunReader
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.training.updating import learning_rate_factor
from pertoken.types import Credit, PolicyOutput


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@episode_reward
def letters(sample):
    """Share of the letter e among the characters: something that a tiny model can learn in seconds."""
    return sample.text.count("e") / max(len(sample.text), 1)


@token_reward
def letter_by_letter(sample):
    """An eighth for each e, a little off for each other letter."""
    pieces = [sample.text[start:stop] for start, stop in sample.aligned.char_spans]
    return [0.125 if piece == "e" else -0.02 for piece in pieces]


@token_reward
def token_numbers(sample):
    """Something else for each token, so that no two rows are worth the same."""
    return [token / 256 for token in sample.tokens]


def settings(model_folder, data, tmp_path, **changes):
    values = {
        "name": "tiny",
        "folder": str(tmp_path / "run"),
        "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
        "task": {"type": "file", "path": str(data), "prompt": "{prompt}:", "answer": "reference", "id": "id"},
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "sampling": {"max_new_tokens": 8}},
        "rewards": [{"fn": f"{__name__}:letters", "name": "letters"}],
        "update": {"learning_rate": 3e-3, "tokens_per_micro_batch": 90},
        "kl": {"coefficient": 0.0},
        "stop": {"steps": 3},
        "evaluation": {"items": 4, "sampling": {"temperature": 0.0, "max_new_tokens": 8}},
    }
    for dotted, value in changes.items():
        target = values
        *path, last = dotted.split("__")
        for name in path:
            target = target.setdefault(name, {})
        target[last] = value
    return RunConfig.model_validate(values)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """`fn: module:function` finds this file under the name that pytest gave it."""
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or __import__("types").ModuleType(__name__))
    for reward in (letters, letter_by_letter, token_numbers, broken):
        monkeypatch.setattr(sys.modules[__name__], reward.name, reward, raising=False)


def metrics_of(folder, file="metrics.jsonl"):
    path = folder / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_prompts_that_are_too_long_are_why_there_are_too_few(model_folder, data, tmp_path):
    """`say 0:` to `say 9:` have 6 bytes, the others 7."""
    with pytest.raises(TaskError, match=r"prompt of at most 5 tokens; raise rollout\.max_prompt_tokens"):
        assembly.build_run(settings(model_folder, data, tmp_path, rollout__max_prompt_tokens=5))
    too_many = settings(
        model_folder, data, tmp_path, rollout__max_prompt_tokens=6, rollout__prompts_per_step=11, evaluation__items=0
    )
    with pytest.raises(TaskError, match=r"takes 11 .* are left \(left out .* items: prompt over 6 tokens\): lower"):
        assembly.build_run(too_many)


@pytest.mark.parametrize("update", [{}, {"epochs": 3}, {"epochs": 2, "minibatches": 2}], ids=str)
def test_the_kl_is_that_of_the_policy_that_wrote_the_samples(model_folder, data, tmp_path, update):
    """0 in the first step, whose samples the reference itself wrote, however far the update goes on from there."""
    changes = {f"update__{name}": value for name, value in update.items()}
    changes |= {"rewards": [{"fn": f"{__name__}:token_numbers", "name": "numbers"}], "kl__measure": True}
    it = assembly.build_run(settings(model_folder, data, tmp_path, update__learning_rate=3e-2, **changes))
    episodes = trainer.generate(it, 1)
    batch = to_batch(episodes, it.controls_at(1))
    old, ref = trainer.score_old(it, batch), trainer.score_reference(it, batch)
    scene = Scene(batch, episodes, it.policy.tokenizer, old, ref, 1)
    rewards = trainer.reward(it, scene)
    credit = assign(it.config.credit, rewards, batch, old)
    credit.advantages[:2] = 0  # of rows without effect too, which no pass of the update looks at
    updated = updating.update(it, batch, old, ref, credit, 1)
    moved = it.policy.score(batch).logprobs - ref.logprobs
    assert moved.abs().max() > 0.1
    assert updated.streams["kl"].abs().max() < 1e-5
    it.progress.step = 1
    it.engine.load_weights(it.policy.trainable(), version=1)
    episodes = trainer.generate(it, 2)
    batch = to_batch(episodes, it.controls_at(2))
    old, ref = trainer.score_old(it, batch), trainer.score_reference(it, batch)
    began = it.policy.score(batch).logprobs
    updated = updating.update(it, batch, old, ref, Credit(torch.ones_like(old.logprobs) * batch.action_mask), 2)
    torch.testing.assert_close(updated.streams["kl"], began - ref.logprobs, rtol=1e-4, atol=1e-4)


def test_what_is_written_down_has_its_alternatives_as_the_sampler_saw_them(model_folder, data, tmp_path):
    """Before the update, however far it goes; so they and the log-probs beside them are of one policy."""
    log = {"alternatives": 20, "episodes_every": 2, "episodes_per_step": 5}
    run.train(settings(model_folder, data, tmp_path, update__learning_rate=3e-2, update__epochs=2, log=log))
    reader = RunReader(tmp_path / "run")
    assert reader.episode_steps() == [1, 2, 3]
    records = [record for step in (1, 2, 3) for record in reader.episodes(step)]
    assert len(records) == 15
    seen = 0
    for record in [*records, *reader.evaluation_items(3, "validation")]:
        found = record["alternatives"]
        assert [rank > 0 for rank in found["rank"]] == [acts == 1 for acts in record["tokens"]["action"]]
        for at in (at for at, rank in enumerate(found["rank"]) if 0 < rank <= 20):
            assert found["id"][at][found["rank"][at] - 1] == record["tokens"]["id"][at]
            known = found["logprob"][at][found["rank"][at] - 1]
            assert known == pytest.approx(record["streams"]["logprob"][at], abs=1e-3)
            seen += 1
    assert seen > 20


def test_alternatives_may_be_left_out(model_folder, data, tmp_path):
    run.train(settings(model_folder, data, tmp_path, log={"alternatives": 0}))
    reader = RunReader(tmp_path / "run")
    records = [*reader.episodes(1), *reader.evaluation_items(3, "validation")]
    assert not any("alternatives" in record for record in records)


@pytest.mark.parametrize(
    "credit",
    [
        {"type": "group_process"},
        {"type": "gae"},
    ],
    ids=lambda credit: credit["type"],
)
def test_an_estimator_of_each_kind_learns_a_letter(model_folder, data, tmp_path, credit):
    """By tokens, with a critic; `test_presets.py` has one by rows, `benchmarks/known_answers.py` asks all of them."""
    changes = {"credit": credit, "stop__steps": 25, "evaluation__items": 0, "update__learning_rate": 1e-2}
    changes |= {"rollout__samples_per_prompt": 16, "update__tokens_per_micro_batch": 2000}
    if credit["type"] == "gae":
        changes["policy__value_head"] = {"learning_rate": 1e-2}
    if credit["type"] == "group_process":  # takes 0 for "not scored", so it needs a reward that scores each token
        changes["rewards"] = [{"fn": f"{__name__}:letter_by_letter", "name": "letters"}]
    config = settings(model_folder, data, tmp_path, **changes)
    run.train(config)
    rewards = [row["reward/letters"] for row in metrics_of(tmp_path / "run")]
    assert sum(rewards[-4:]) / 4 > 0.8 > 0.1 > rewards[0]


def test_lora_learns_and_saves_a_plain_model(model_folder, data, tmp_path):
    from transformers import AutoModelForCausalLM

    config = settings(
        model_folder, data, tmp_path, policy__lora={"rank": 8, "alpha": 64}, stop__steps=20, update__learning_rate=2e-2,
        rollout__samples_per_prompt=16, update__tokens_per_micro_batch=2000,
    )  # fmt: skip
    run.train(config)
    rows = metrics_of(tmp_path / "run")
    # The head is frozen and its input normalised, so this random model cannot say e much more often than that.
    assert sum(row["reward/letters"] for row in rows[-5:]) / 5 > 5 * rows[0]["reward/letters"] > 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(saved).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name for name, _ in saved.named_parameters())


def test_the_saved_model_is_the_trained_policy(model_folder, data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = settings(model_folder, data, tmp_path)
    built = assembly.build_run(config)
    built.evaluator = None
    log = run.RunLog.create(tmp_path / "run", config_text=config.to_yaml(), seed=0)
    trainer.loop(built, log, on_step=lambda report: None)
    built.policy.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode([104, 105])
    for (name, trained), again in zip(built.policy.hf_model.named_parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(again, trained, msg=name)


def test_same_seed_same_run_and_another_seed_another(model_folder, data, tmp_path):
    def rewards(name, seed):
        run.train(settings(model_folder, data, tmp_path, folder=str(tmp_path / name), seed=seed))
        return [(row["reward/letters"], row["grad/norm"]) for row in metrics_of(tmp_path / name)]

    assert rewards("a", 0) == rewards("b", 0) != rewards("c", 1)


@pytest.mark.parametrize("change", [{"rollout__engine": "transformers"}, {"update__recompute_activations": True}])
def test_other_engine_or_kept_activations_same_run(model_folder, data, tmp_path, change):
    rows = []
    for name, changes in (("usual", {}), ("other", change)):
        run.train(settings(model_folder, data, tmp_path, folder=str(tmp_path / name), stop__steps=3, **changes))
        rows.append([(row["reward/letters"], row["grad/norm"]) for row in metrics_of(tmp_path / name)])
    for usual, other in zip(*rows, strict=True):
        assert other == pytest.approx(usual, rel=1e-3)


def test_a_checkpoint_in_the_background_is_in_the_memory_that_is_expected(model_folder, data, tmp_path):
    waiting, beside = (
        assembly.build_run(settings(model_folder, data, tmp_path, checkpoint={"background": background}))
        for background in (False, True)
    )
    trained = sum(p.nbytes for p in beside.policy.trainable().values())
    grown = (beside.memory_estimate - waiting.memory_estimate) * 1e9
    assert grown >= 3 * trained > 0


def test_memory_is_expected_and_measured(model_folder, data, tmp_path, monkeypatch):
    run.train(settings(model_folder, data, tmp_path, stop__steps=1))
    row = metrics_of(tmp_path / "run")[0]
    assert 0 < row["memory/estimate"] < 2 * row["memory/peak"]
    monkeypatch.setattr(assembly.policy, "installed_memory", lambda device: 0.1)
    built = assembly.build_run(settings(model_folder, data, tmp_path, folder=str(tmp_path / "other")))
    assert any("0.1 GB are installed: lower update.tokens_per_micro_batch" in note for note in built.notes)


@pytest.mark.parametrize("tokens", [2000, 90, 30, 1])
def test_trap_19_micro_batches_give_the_same_update(model_folder, data, tmp_path, tokens):
    norms = []
    for size in (2000, tokens):
        config = settings(
            model_folder, data, tmp_path, update__tokens_per_micro_batch=size, stop__steps=1,
            rewards=[{"fn": f"{__name__}:token_numbers", "name": "numbers"}],
        )  # fmt: skip
        built = assembly.build_run(config)
        episodes = trainer.generate(built, 1)
        batch = to_batch(episodes, built.controls)
        old = built.policy.score(batch)
        scored = trainer.reward(built, trainer.Scene(batch, episodes, built.policy.tokenizer, old, None, 1))
        credit = assign(config.credit, scored, batch, old)
        updated = updating.update(built, batch, old, None, credit, 1)
        norms.append(updated.metrics["grad/norm"])
        assert updated.metrics["drift/max"] < 1e-4
    assert 0 < norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_interrupted_and_resumed_goes_on_where_it_was(model_folder, data, tmp_path):
    whole = settings(model_folder, data, tmp_path, stop__steps=6, folder=str(tmp_path / "whole"))
    run.train(whole)
    config = settings(model_folder, data, tmp_path, stop__steps=6, folder=str(tmp_path / "parts"))
    steps = []
    result = run.train(config, on_step=lambda r, s: steps.append(r.step), interrupted=lambda: len(steps) >= 3)
    assert result.interrupted
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "interrupted"
    result = run.train(config, resume=tmp_path / "parts")
    assert not result.interrupted
    kept = ("step", "reward/letters", "grad/norm", "kl/sequence")
    wanted, got = ([{k: row[k] for k in kept} for row in metrics_of(tmp_path / n)] for n in ("whole", "parts"))
    assert got == wanted


def test_checkpoints_are_kept_as_told_and_a_torn_one_is_not_taken(model_folder, data, tmp_path):
    config = settings(model_folder, data, tmp_path, checkpoint__every=1, checkpoint__keep=2, stop__steps=4)
    run.train(config)
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert [path.name for path in store.paths()] == ["step-000003", "step-000004"]
    (store.folder / "step-000004" / "state.json").unlink()
    notes = []
    run.train(config, resume=tmp_path / "run", on_note=notes.append)
    assert notes[0].startswith("checkpoint step-000004 cannot be used: state.json is missing; an older one is taken")
    assert "resumed after step 3" in notes
    assert store.problem(store.folder / "step-000004") is None


def test_a_full_disk_leaves_what_was_written(model_folder, data, tmp_path, monkeypatch):
    config = settings(model_folder, data, tmp_path, checkpoint__every=2, stop__steps=4)

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pertoken.policy.checkpoint.save_file", no_space)
    with pytest.raises(RunFolderError, match="No space left"):
        run.train(config)
    assert len(metrics_of(tmp_path / "run")) == 2
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ({"steps": 2}, "made all 2 steps"),
        ({"tokens": 60}, "tokens"),
        ({"seconds": 0.01}, "trained for"),
        ({"kl": 1e-6, "steps": 9}, "KL per sequence"),
        ({"metric": -1.0, "steps": 9}, "reached"),
        ({"patience": 1, "steps": 9}, "no better"),
    ],
)
def test_stop_conditions(model_folder, data, tmp_path, stop, words):
    config = settings(model_folder, data, tmp_path, stop=stop, evaluation__every=1, update__learning_rate=1e-2)
    result = run.train(config)
    assert words in result.reason
    assert len(metrics_of(tmp_path / "run")) < 9


@pytest.mark.parametrize(("wanted", "words"), [(1e9, "perplexity reached"), (0.5, "made all 2 steps")])
def test_of_perplexity_less_is_better(model_folder, data, tmp_path, wanted, words):
    stop = {"metric": wanted, "steps": 2}
    config = settings(
        *(model_folder, data, tmp_path), stop=stop, evaluation__every=1, evaluation__metric="perplexity",
        checkpoint__every=1, checkpoint__keep=9, update__learning_rate=1e-2,
    )  # fmt: skip
    assert words in run.train(config).reason
    held = [row["metrics"]["perplexity"] for row in metrics_of(tmp_path / "run", "evaluations.jsonl")]
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    assert [found.metric for found in store.complete()] == [-value for value in held[1:]]


def test_zero_steps_only_evaluates(model_folder, data, tmp_path):
    run.train(settings(model_folder, data, tmp_path, stop__steps=0))
    assert (tmp_path / "run" / "evaluations.jsonl").read_text().count("\n") == 1
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_trap_13_a_wrong_ratio_is_a_named_error():
    batch = to_batch([episode([1, 2], [3, 4], id="odd")], Controls())
    right = PolicyOutput(batch.sample_logprobs.clone(), torch.zeros(1, 4))
    updating.check_ratio(batch, right, exact=True)
    wrong = PolicyOutput(batch.sample_logprobs + torch.tensor([[0, 0, 0, 2e-4]]), torch.zeros(1, 4))
    with pytest.raises(NumericsError, match=r"episode odd, token 3: sampled with log-prob -1\.000000"):
        updating.check_ratio(batch, wrong, exact=True)
    assert updating.check_ratio(batch, wrong, exact=False)["drift/max"] == pytest.approx(2e-4, rel=1e-2)
    broken = PolicyOutput(torch.full((1, 4), math.nan), torch.zeros(1, 4))
    with pytest.raises(NumericsError):
        updating.check_ratio(batch, broken, exact=False)


def test_non_finite_updates_are_skipped_counted_and_end_the_run(model_folder, data, tmp_path):
    config = settings(model_folder, data, tmp_path, update__max_skipped=1, stop__steps=9)
    built = assembly.build_run(config)
    built.evaluator = None
    before = {name: p.detach().clone() for name, p in built.policy.trainable().items()}
    log = run.RunLog.create(tmp_path / "run", config_text="", seed=0)
    whole = updating.policy_loss
    updating.policy_loss = lambda *a, **k: type(whole(*a, **k))(whole(*a, **k).per_token * math.nan)
    try:
        with pytest.raises(NumericsError, match="2 updates had a non-finite loss"):
            trainer.loop(built, log, on_step=lambda report: None)
    finally:
        updating.policy_loss = whole
    assert metrics_of(tmp_path / "run")[-1]["skipped/updates"] == 1
    assert any("update skipped, loss nan in episodes" in note for note in built.notes)
    for name, parameter in built.policy.trainable().items():
        assert torch.equal(parameter, before[name]), name


@episode_reward
def broken(sample):
    """Raises on every sample."""
    raise KeyError("no such thing")


def test_a_reward_that_raises_ends_the_run_with_its_name(model_folder, data, tmp_path):
    config = settings(model_folder, data, tmp_path, rewards=[{"fn": f"{__name__}:broken"}], evaluation__items=0)
    with pytest.raises(RewardError, match=r"broken.*KeyError"):
        run.train(config)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def failing(tmp_path, how):
    """A reward that counts the letter e, off by what it draws from each global source of random numbers; it fails in
    its fourth step, on the second sample, if a file tells it to."""
    asked = []

    @episode_reward
    def fails(sample):
        noise = random.random() + np.random.random() + torch.rand(()).item()
        asked.append(sample.step)
        if asked.count(4) == 2 and (tmp_path / "fail").exists():
            if how == "hangs":
                threading.Event().wait(60)
            return math.nan if how == "nan" else {}["no such thing"]
        return sample.text.count("e") + noise

    return fails


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", r"fails.*KeyError"),
        ("nan", "fails.*nan"),
        ("hangs", r"fails.*no answer for 16 completions within 2 s\. It is at .*threading\.py:\d+, in wait"),
    ],
)
def test_a_reward_that_fails_costs_the_step_that_it_fails_in(model_folder, data, tmp_path, monkeypatch, how, words):
    """What was made before is saved; mended and resumed, the run ends as one that never failed."""
    monkeypatch.setattr(sys.modules[__name__], "fails", failing(tmp_path, how), raising=False)
    rewards = [{"fn": f"{__name__}:fails", "time_limit": 2.0 if how == "hangs" else None}]
    (tmp_path / "fail").touch()
    config = settings(model_folder, data, tmp_path, rewards=rewards, stop__steps=6)
    with pytest.raises(RewardError, match=words + r".*step 3 is saved: `--resume`"):
        run.train(config)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    (tmp_path / "fail").unlink()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)  # as another process has them
    run.train(config, resume=tmp_path / "run")
    whole = settings(model_folder, data, tmp_path, rewards=rewards, stop__steps=6, folder=str(tmp_path / "whole"))
    run.train(whole)
    kept = ("step", "reward/fails", "grad/norm", "kl/sequence")
    got, wanted = ([{k: row[k] for k in kept} for row in metrics_of(tmp_path / n)] for n in ("run", "whole"))
    assert got == wanted


def test_a_prompt_longer_than_the_context_is_found_before_the_first_token(model_folder, data, tmp_path):
    config = settings(model_folder, data, tmp_path, task__prompt="{prompt} " + "long " * 40)
    with pytest.raises(TaskError, match=r"its prompt has 2.. tokens, and this model's context is 128"):
        run.train(config)
    assert not (tmp_path / "run").exists()


def test_an_occupied_folder_is_refused(model_folder, data, tmp_path):
    config = settings(model_folder, data, tmp_path, stop__steps=1)
    run.train(config)
    with pytest.raises(RunFolderError, match="already holds a run"):
        run.train(config)


def test_the_exact_kl_holds_a_policy_back(model_folder, data, tmp_path):
    """The same run with a penalty of next to nothing and with a heavy one."""

    def kl_at_the_end(coefficient):
        folder = tmp_path / str(coefficient)
        kl = {"place": "loss", "estimator": "exact", "coefficient": coefficient}
        rewards = [{"fn": f"{__name__}:letter_by_letter", "name": "letters"}]
        run.train(settings(model_folder, data, tmp_path, folder=str(folder), kl=kl, rewards=rewards, stop__steps=8))
        return metrics_of(folder)[-1]["kl/sequence"]

    free, held = kl_at_the_end(1e-6), kl_at_the_end(10.0)
    assert abs(held) < 0.5 * free


def test_adaptive_kl_follows_the_measured_kl(model_folder, data, tmp_path):
    kl = {"coefficient": 0.1, "target": 0.05, "horizon": 100}
    run.train(settings(model_folder, data, tmp_path, kl=kl, stop__steps=12, update__learning_rate=1e-2))
    rows = metrics_of(tmp_path / "run")
    assert rows[0]["kl/coefficient"] == 0.1
    for row, following in pairwise(rows):
        rises = following["kl/coefficient"] > row["kl/coefficient"]
        assert rises == (row["kl/sequence"] > 0.05)
    assert rows[-1]["kl/coefficient"] > 0.1  # it has moved away by then


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_schedules(schedule):
    config = RunConfig(stop={"steps": 11}, update={"schedule": schedule, "warmup_steps": 2, "final_share": 0.1})
    factors = [learning_rate_factor(config, step) for step in range(1, 12)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert factors[6] == pytest.approx({"constant": 1.0, "linear": 0.55, "cosine": 0.55}[schedule])
    assert all(a >= b for a, b in pairwise(factors[1:]))
