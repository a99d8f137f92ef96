"""Folds divide the items, always in the same way; their runs are ordinary ones, and the table says what they share."""

import json
import re

import pytest

from pertoken.config import RunConfig
from pertoken.errors import ConfigError, TaskError
from pertoken.jobs.crossval import folds_of, over_folds
from pertoken.tasks.base import ItemTask, folded
from pertoken.types import Item


def task(count=23):
    items = [Item(f"i{k}", f"question {k // 2 if k < 4 else k}") for k in range(count)]  # two pairs of equal prompts
    return ItemTask("toy", {"train": items[:15], "validation": items[15:], "test": [Item("t", "of the test")]})


def test_every_item_is_held_out_once_and_learnt_from_otherwise():
    parts = [folded(task(), count=5, held_out=k) for k in range(5)]
    held_out = [item.id for part in parts for item in part.items("validation")]
    assert sorted(held_out) == sorted(f"i{k}" for k in range(23))
    for part in parts:
        assert {item.id for item in part.items("train")} == set(held_out) - {i.id for i in part.items("validation")}
        assert not {i.prompt for i in part.items("train")} & {i.prompt for i in part.items("validation")}
        assert [item.id for item in part.items("test")] == ["t"]
        assert 4 <= len({item.prompt for item in part.items("validation")}) <= 5


def test_folds_go_by_seed_and_prompts_alone():
    moved = ItemTask(
        "toy", {"train": task().items("validation")[::-1], "validation": task().items("train"), "test": ()}
    )

    def held_out(of, **settings):
        return {item.id for item in folded(of, count=4, held_out=1, **settings).items("validation")}

    assert held_out(task()) == held_out(moved) != held_out(task(), seed=1)


def test_more_folds_than_prompts():
    with pytest.raises(TaskError, match="2 prompts cannot be divided into 3 folds"):
        folded(ItemTask("toy", {"train": [Item("a", "x"), Item("b", "y"), Item("c", "y")]}), count=3, held_out=0)


def test_what_cannot_be_cross_validated():
    with pytest.raises(ConfigError, match=r"evaluation\.split=validation"):
        folds_of(RunConfig.model_validate({"evaluation": {"split": "test"}}), 3)
    with pytest.raises(ConfigError, match="mixture"):
        folds_of(RunConfig.model_validate({"task": {"tasks": {"a": {}, "b": {"path": "x"}}}}), 3)
    with pytest.raises(ValueError, match="held_out 3 is none of 3 folds: they are 0 to 2"):
        RunConfig.model_validate({"task": {"fold": {"count": 3, "held_out": 3}}})


def test_the_command_trains_each_fold_and_goes_on_where_it_stopped(pertoken, model_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "crossval", f"policy.model={model_folder}", "policy.precision=float32", "policy.compile=false",
        f"task.path={data}", "task.prompt='{prompt}'", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2",
        "rollout.sampling.max_new_tokens=4", "evaluation.sampling.max_new_tokens=4", "stop.steps=1",
        f"folder={tmp_path / 'folds'}", "--folds", "2",
    ]  # fmt: skip
    code, output, _ = pertoken(*arguments)
    assert code == 0
    folders = [tmp_path / "folds" / f"fold-{k}" for k in (0, 1)]
    found = over_folds(folders)["words"]
    ends = [json.loads((f / "evaluations.jsonl").read_text().splitlines()[-1])["metrics"]["words"] for f in folders]
    assert found.by_fold == tuple(ends)
    assert found.after.mean == pytest.approx(sum(ends) / 2)
    assert re.search(rf"^words +{found.before.mean:.4g} \[", output, re.MULTILINE)
    begun = (folders[0] / "run.json").stat().st_mtime_ns
    assert pertoken(*arguments)[0] == 0
    assert (folders[0] / "run.json").stat().st_mtime_ns == begun
