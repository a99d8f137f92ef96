"""A task that a function makes: named in a recipe, its parameters beside its name."""

import sys

import pytest

from pertoken import assembly
from pertoken.config import RunConfig, load_config
from pertoken.errors import ConfigError, TaskError
from pertoken.jobs import run

SOURCE = """
from pertoken.tasks.base import ItemTask
from pertoken.types import Item

class Failing:
    name = "failing"

    def __init__(self, items):
        self._items = items

    def items(self, split):
        return iter(self._items) if split == "train" else []


def fails(*, how):
    if how == "at once":
        raise FileNotFoundError("no sums.csv")
    return Failing([{"prompt": "1 + 1 ="}] if how == "dicts" else (1 / 0 for _ in "a"))


def sums(*, highest=4, wrong=False):
    items = [Item(f"{a}+{b}", f"{a} + {b} =", str(a + b)) for a in range(highest) for b in range(highest)]
    return 3 if wrong else ItemTask("sums", {"train": items[2:], "validation": items[:2]})
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_tasks", None)


def test_the_function_gets_its_parameters(place):
    (place / "recipe.yaml").write_text("task: {fn: 'my_tasks:sums', highest: 5, limit: 9}")
    config = load_config(["recipe.yaml"])
    task = assembly.build_task(config.task)
    assert [len(task.items(split)) for split in ("train", "validation", "test")] == [9, 2, 0]
    assert load_config(["recipe.yaml"], ["task.highest=3"]).task.parameters == {"highest": 3}
    (place / "again.yaml").write_text(config.to_yaml())  # as the run folder keeps it
    assert load_config(["again.yaml"]) == config
    assert run._about(config)["task"] == "my_tasks:sums"


def test_folds_and_mixtures_take_it(place):
    task = {"fn": "my_tasks:sums", "fold": {"count": 4, "held_out": 1}}
    assert len(assembly.build_task(RunConfig.model_validate({"task": task}).task).items("validation")) == 4
    several = {"tasks": {"a": {"fn": "my_tasks:sums", "weight": 2.0, "highest": 3}}}
    mixture = assembly.build_task(RunConfig.model_validate({"task": several}).task)
    assert len(mixture.items("train")) == 7


@pytest.mark.parametrize(
    ("task", "error", "words"),
    [
        ({"fn": "my_tasks:sum"}, ConfigError, "did you mean 'sums'"),
        ({"fn": "no_module:x"}, ConfigError, "task 'no_module:x': cannot import"),
        ({"fn": "my_tasks:sums", "hihgest": 3}, ConfigError, "hihgest"),
        ({"fn": "my_tasks:sums", "wrong": True}, TaskError, "expected a task"),
        ({"fn": "my_tasks:fails", "how": "at once"}, ConfigError, "raised FileNotFoundError: no sums.csv"),
        ({"fn": "my_tasks:fails", "how": "dicts"}, TaskError, "train item 0 is dict, expected an Item"),
        ({"fn": "my_tasks:fails", "how": "late"}, TaskError, r"items\('train'\) raised ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_said(place, task, error, words):
    with pytest.raises(error, match=words):
        assembly.build_task(RunConfig.model_validate({"task": task}).task)
