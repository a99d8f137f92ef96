"""A run of several tasks: each followed by itself, rewards for one of them, and resumed exactly."""

import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pertoken import assembly
from pertoken.batching import to_batch
from pertoken.config import RunConfig, load_config, validate
from pertoken.doctor.examination import small
from pertoken.errors import ConfigError, TaskError
from pertoken.evaluation import Evaluation
from pertoken.jobs import run
from pertoken.rewards import Scene, Weighted, episode_reward
from pertoken.tracking import RunReader
from pertoken.training import updating
from pertoken.training.balance import pcgrad
from pertoken.training.resampling import with_differences
from pertoken.training.state import Progress, items_of
from pertoken.training.trainer import generate, score_old, with_history
from pertoken.types import Credit

SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).parents[1] / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)


STEPS = 3


@pytest.fixture
def values(model_folder, tmp_path):
    """The sections of a run of two tasks, whose items have the same ids."""
    for name in ("say", "ask"):
        rows = [
            {"id": str(k), "prompt": f"{name} {k}", "reference": f"the {name} {k}", "bad": "no", "level": k}
            for k in range(60)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    member = {"prompt": "{prompt}:", "id": "id"}
    return {
        "folder": str(tmp_path / "run"),
        "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
        "task": {
            "type": "mixture",
            "tasks": {
                "say": member | {"path": str(tmp_path / "say.jsonl"), "weight": 3, "metric": "corpus_chrf"},
                "ask": member | {"path": str(tmp_path / "ask.jsonl")},
            },
        },
        "rollout": {"prompts_per_step": 4, "samples_per_prompt": 3, "sampling": {"max_new_tokens": 6}},
        "rewards": [
            {"name": "rouge_l", "tasks": ["say"]},
            {"name": "chrf", "tasks": ["ask"], "normalise": "task"},
            {"name": "length", "min_words": 3},
        ],
        "update": {"learning_rate": 1e-2},
        "evaluation": {"items": 6, "every": 1, "metric": "chrf", "sampling": {"temperature": 0, "max_new_tokens": 6}},
        "stop": {"steps": STEPS},
    }


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


def config_of(values, **sections):
    return RunConfig.model_validate(values | {name: values.get(name, {}) | fields for name, fields in sections.items()})


def in_parts(config):
    """The run interrupted behind each step, its global random states elsewhere each time."""
    interrupted = True
    while interrupted:
        torch.manual_seed(random.randrange(10**6))
        np.random.seed(random.randrange(10**6))
        made = list[int]()
        interrupted = run.train(
            config,
            resume=config.run_folder if config.run_folder.exists() else None,
            on_step=lambda report, _, made=made: made.append(report.step),
            interrupted=lambda made=made: bool(made),
        ).interrupted
    return kills.outcome(config.run_folder)


PROGRESS = {"smoothing": 0.5, "temperature": 0.05, "explore": 0.3}


def test_interrupted_after_each_step_it_ends_as_if_it_never_was(values, tmp_path):
    """What is drawn ahead is planned before the step in between has been looked at; that is saved, too."""
    values["task"] = values["task"] | {"progress": PROGRESS, "temperature": 2}
    values["task"]["tasks"]["say"]["curriculum"] = {"prompt_tokens": [[1, 6], [3, 8]]}
    values["task"]["tasks"]["ask"]["curriculum"] = {"difficulty": "level", "hardest": [[1, 9], [2, 30]]}
    schedule = {"ahead": True, "length_schedule": [[1, 2], [3, 6]]}
    sections = {"rollout": schedule, "evaluation": {"every": None}}
    run.train(config_of(values | {"folder": str(tmp_path / "whole")}, **sections))
    parts = in_parts(config_of(values | {"folder": str(tmp_path / "parts")}, **sections))
    assert parts == kills.outcome(tmp_path / "whole")
    metrics = parts["metrics"]
    shares = metrics["task_share/say"]
    assert [a + b for a, b in zip(shares, metrics["task_share/ask"], strict=True)] == [1.0] * STEPS
    assert len(set(metrics["task_change/say"])) > 1, "what is learnt is followed"
    assert metrics["curriculum/prompt_tokens/say"] == [6, 7, 8]
    assert metrics["curriculum/hardest/ask"] == [9, 30, 30]
    assert metrics["curriculum/new_tokens"] == [2, 4, 6]
    assert metrics["curriculum/items/say"] < [1.0] * STEPS
    items = {step: {row["item"] for row in rows} for step, rows in parts["episodes"].items()}
    assert len(items[1]) == 4
    assert max(int(item.partition("/")[2]) for item in items[1]) <= 9, "a digit is a token, and of `ask` no higher"
    lengths = {s: max(sum(row["tokens"]["action"]) for row in rows) for s, rows in parts["episodes"].items()}
    assert lengths == {1: 2, STEPS: 6}


def test_each_task_is_followed_in_training_and_held_out(values):
    config = config_of(values)
    run.train(config)
    reader = RunReader(config.run_folder)
    metrics, evaluations = reader.metrics(), reader.evaluations()
    assert metrics["task_share/say"] == [0.75] * STEPS
    for k in range(STEPS):
        both = 0.75 * metrics["task_reward/say"][k] + 0.25 * metrics["task_reward/ask"][k]
        assert metrics["reward/total"][k] == pytest.approx(both, abs=1e-5)
        assert metrics["abstained/rouge_l"][k] == 0.25
        assert metrics["completion/length"][k] == pytest.approx(
            0.75 * metrics["task_length/say"][k] + 0.25 * metrics["task_length/ask"][k]
        )
    for name, metric in {"say": "corpus_chrf", "ask": "chrf"}.items():
        column = [row["metrics"][f"{metric}/{name}"] for row in evaluations]
        assert [row["metrics"][f"since_start/{name}"] for row in evaluations] == [now - column[0] for now in column]
        best = [max(column[: k + 1]) - now for k, now in enumerate(column)]
        assert [row["metrics"][f"below_best/{name}"] for row in evaluations] == best
    last = evaluations[-1]
    of_ask = [value for value in last["items"]["chrf/ask"] if value is not None]
    assert len(of_ask) == 3 == len([name for name in last["items"]["id"] if name.startswith("ask/")])
    assert last["metrics"]["chrf/ask"] == pytest.approx(sum(of_ask) / 3)
    low, high = last["intervals"]["chrf/ask"]
    assert low <= last["metrics"]["chrf/ask"] <= high


def test_below_its_best_knows_which_way_is_up():
    progress, found = Progress(), []
    for value in (5.0, 3.0, 4.0):
        result = Evaluation({"metrics": {"perplexity/a": value, "bleu/b": value}}, [])
        found.append(with_history(result, {"a": "perplexity", "b": "bleu"}, progress).summary["metrics"])
    assert [row["since_start/a"] for row in found] == [0, 2, 1]
    assert [row["below_best/a"] for row in found] == [0, 0, 1]
    assert [row["since_start/b"] for row in found] == [0, -2, -1]
    assert [row["below_best/b"] for row in found] == [0, 2, 1]
    assert progress.tasks == {"a": [5.0, 3.0], "b": [5.0, 5.0]}


def test_groups_are_redrawn_from_their_own_task(values):
    """All groups of `ask` are dull: other prompts of `ask` stand in for them, and `say` keeps its own."""
    values["rewards"] = [{"name": "length", "min_words": 3}]
    config = config_of(values, rollout={"redraws": 2, "prompts_per_step": 8})
    made = assembly.build_run(config)

    @episode_reward
    def dull(sample):
        return 0.0 if sample.item.id in firsts else float(sum(sample.tokens))

    firsts = {item.id for item in items_of(made, 1) if item.task == "ask"}
    made.rewards = [Weighted(dull, 1.0, "dull")]
    made.config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"redraws": 0})})
    episodes = generate(made, 1)
    made.config = config
    before = [(episode.group, episode.item) for episode in episodes]
    after = [(episode.group, episode.item) for episode in with_differences(made, episodes, 1)]
    assert made.redrawn == len(firsts) == 2
    for (group, old), (same, new) in zip(before, after, strict=True):
        assert group == same
        assert old.task == new.task
        assert (old == new) == (old.task == "say")


@pytest.fixture
def gradient_of(values, monkeypatch):
    """What an update puts into `.grad`, as one vector, of a run with these settings, and its figures."""
    values["kl"] = {"place": "none", "coefficient": 0.0}
    values["rewards"] = [{"name": "length", "min_words": 3}]

    def gradient(only=None, **update):
        made = assembly.build_run(config_of(values, update=update))
        episodes = generate(made, 1)
        batch = to_batch(episodes, made.controls)
        scene = Scene(batch, episodes, made.policy.tokenizer)
        old, tasks = score_old(made, batch), scene.task
        # tasks that are rewarded for opposite things: the same tokens are good for one and bad for the other
        advantages = (
            torch.where(batch.action_mask, batch.tokens % 7 - 3.0, 0.0) * torch.where(tasks == 0, 1.0, -1.0)[:, None]
        )
        if only is not None:
            advantages[tasks != only] = 0.0
        found = []
        monkeypatch.setattr(
            updating, "step_optimizer",
            lambda run, bad, step, head_only: found.append(
                torch.cat([p.grad.flatten() for p in run.policy.trainable().values()]).double()
            ),
        )  # fmt: skip
        metrics = updating.update(made, batch, old, None, Credit(advantages), 1, tasks).metrics
        return found[0], metrics

    return gradient


def test_an_update_takes_conflicts_out_whatever_its_micro_batches(gradient_of):
    """Beside the gradients of each task by itself, projected as vectors; for two tasks there is one order."""
    apart = [gradient_of(only=task)[0] for task in (0, 1)]
    plain, _ = gradient_of()
    assert torch.allclose(plain, apart[0] + apart[1], atol=1e-6)
    cosine = torch.dot(*apart) / apart[0].norm() / apart[1].norm()
    assert cosine < 0
    rows = torch.stack(apart)
    wanted = pcgrad(rows @ rows.T, [[1], [0]]) @ rows
    assert not torch.allclose(wanted, plain, atol=1e-3)
    for tokens in (4000, 30):
        found, metrics = gradient_of(balance="pcgrad", tokens_per_micro_batch=tokens)
        assert torch.allclose(found, wanted, atol=1e-5)
        assert metrics["balance/cosine"] == pytest.approx(cosine.item(), abs=1e-4)
        assert metrics["balance/conflicts"] == 1.0


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_answers_of_several_tasks_are_learnt_together(values, method):
    values["task"] = {"tasks": {n: m | {"rejected": "bad"} for n, m in values["task"]["tasks"].items()}}
    config = config_of(
        values | {"rewards": [{"name": "rouge_l"}]}, method={"type": method, "batch": 4}, stop={"steps": 1}
    )
    run.train(config)
    rows = RunReader(config.run_folder).episodes(1)
    assert len({row["item"] for row in rows if row["item"].startswith("say/")}) == 3
    assert len({row["item"] for row in rows}) == 4


REFUSED = {
    "rewards.0: no task 'sya'; did you mean 'say'": {"rewards": [{"name": "rouge_l", "tasks": ["sya"]}]},
    "task.tasks.ask: no reward is about this task": {"rewards": [{"name": "rouge_l", "tasks": ["say"]}]},
    "task.progress goes by the rewards of samples": {"method": {"type": "sft"}, "progress": True},
    "task.rejected, of each task": {"method": {"type": "dpo"}},
    "and there is one only: name several": {
        "task": {"path": "a.jsonl"},
        "update": {"balance": "pcgrad"},
        "rewards": [{"name": "chrf"}],
    },
    "tells tasks apart": {"task": {"path": "a.jsonl"}},
    "length_schedule: 9 tokens at step 3 are not between 1 and": {"rollout": {"length_schedule": [[1, 2], [3, 9]]}},
    "hardest lets in more over steps": {"curriculum": {"difficulty": "level", "hardest": [[1, 2], [2, 1]]}},
    "steps rise": {"curriculum": {"prompt_tokens": [[2, 2], [1, 3]]}},
    "set both": {"curriculum": {"hardest": [[2, 2]]}},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_work_is_refused(values, sentence):
    changes = dict(REFUSED[sentence])
    if "curriculum" in changes:
        changes = {"task": {"path": "a.jsonl", "curriculum": changes["curriculum"]}}
    elif "rollout" in changes:
        changes["rollout"] = values["rollout"] | changes["rollout"]
    if changes.pop("progress", False):
        changes["task"] = values["task"] | {"progress": {}}
    with pytest.raises(ValueError, match=sentence.removeprefix("rewards.0: ")):
        RunConfig.model_validate(values | changes)


def test_faults_of_a_member_name_it(values, tmp_path):
    config = config_of(values)
    member = values["task"]["tasks"]["ask"]
    (tmp_path / "ask.jsonl").write_text('{"id": "1"}')
    with pytest.raises(TaskError, match=r"task\.tasks\.ask: .*no column 'prompt'"):
        assembly.build_task(config.task)
    values["task"]["tasks"]["ask"] = member | {"metric": "chfr"}
    (tmp_path / "ask.jsonl").write_text((tmp_path / "say.jsonl").read_text().replace("say", "ask"))
    with pytest.raises(ConfigError, match=r"task\.tasks\.ask\.metric: unknown 'chfr'; did you mean 'chrf'"):
        assembly.build_run(config_of(values))
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"task\.tasks\.ask\.weight: .*greater than 0"):
        load_config([tmp_path / "recipe.yaml"], ["task.tasks.ask.weight=0"])
    with pytest.raises(ConfigError, match=r"task\.tasks\.ask\.wieght: unknown key"):
        load_config([tmp_path / "recipe.yaml"], ["task.tasks.ask.wieght=1"])


def test_the_doctor_takes_few_items_of_each(values):
    task = small(config_of(values)).task
    assert [member.limit for member in task.tasks.values()] == [task.tasks["say"].limit] * 2
    assert task.tasks["say"].limit


def test_classes_come_up_alike_however_many_there_are_of_each(values, tmp_path):
    """55 items of one class and 5 of the other, two of each in a step of four; resumed exactly, with a curriculum."""
    rows = [{"prompt": f"p {k}", "reference": f"r {k}", "kind": "rare" if k % 12 == 0 else "usual"} for k in range(60)]
    rows += [{"prompt": f"held {k}", "reference": "r", "kind": "rare"} for k in range(4)]
    for split, part in (("train", rows[:60]), ("validation", rows[60:])):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    paths = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "validation")}
    task = {"path": paths, "prompt": "{prompt}", "balance": "kind", "curriculum": {"prompt_tokens": [[1, 9]]}}
    values |= {"task": task, "rewards": [{"name": "rouge_l"}], "folder": str(tmp_path / "whole")}
    run.train(config_of(values, evaluation={"every": None}))
    parts = in_parts(config_of(values | {"folder": str(tmp_path / "parts")}, evaluation={"every": None}))
    assert parts == kills.outcome(tmp_path / "whole")
    assert parts["metrics"]["class_share/rare"] == parts["metrics"]["class_share/usual"] == [0.5] * STEPS
    kinds = {row["prompt"]: row["kind"] for row in rows}
    seen = {row["prompt"] for row in RunReader(tmp_path / "whole").episodes(1)}
    assert sorted(kinds[prompt] for prompt in seen) == ["rare", "rare", "usual", "usual"]


def test_classes_that_cannot_be_told_or_are_too_small_are_named(values, tmp_path):
    values |= {"rewards": [{"name": "rouge_l"}]}
    path = str(tmp_path / "say.jsonl")
    task = {"path": path, "prompt": "{prompt}", "answer": "bad", "balance": "bad"}  # all answers are of one class
    assert list(assembly.build_run(config_of(values | {"task": task})).course.pools) == ["no"]
    rows = [json.dumps({"prompt": f"p {k}", "reference": "r", "class": int(k == 3)}) for k in range(30)]
    (tmp_path / "say.jsonl").write_text("\n".join(rows))
    task = {"path": {"train": path, "test": str(tmp_path / "ask.jsonl")}, "balance": "class", "max_bad_rows": 60}
    with pytest.raises(TaskError, match=r"2 distinct items of class 1, .* give more data, or take fewer"):
        assembly.build_run(config_of(values | {"task": task}))
    with pytest.raises(ConfigError, match="as many items of each class, and a mixture"):
        validate({"task": {"tasks": {"a": {"path": path, "balance": "class"}}}}, RunConfig)
