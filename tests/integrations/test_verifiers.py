"""Environments of verifiers as tasks; what is used of the package is stood in for, so that it need not be there."""

import sys
import types

import pytest

from pertoken.assembly import build_rewards, build_task
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import ConfigError, MissingExtraError, TaskError
from pertoken.integrations import verifiers as adapter
from pertoken.rewards import Scene, score
from pertoken.sampling import Controls
from pertoken.tasks.base import check_task
from pertoken.testing import byte_tokenizer, episode

FN = "pertoken.integrations.verifiers"


class Rubric:
    """Looks at a state as the package's own does: by its keys, and leaves the reward in it."""

    async def score_rollout(self, state):
        assert state["prompt"][-1]["role"] == "user"
        assert state["trajectory"] == []
        right = state["completion"][-1]["content"] == state["answer"]
        state["reward"] = float(right) * state["info"]["worth"]
        state["metrics"] = {"right": float(right)}


class Env:
    max_turns = 1
    rubric = Rubric()

    def __init__(self, count=6, shared=False):
        self.count, self.shared = count, shared

    def rows(self, start):
        return [
            {
                "example_id": k,
                "prompt": [{"role": "user", "content": f"{start + k} + 1 ="}],
                "answer": str(start + k + 1),
                "info": '{"worth": 2.0}',
                "task": "sums",
            }
            for k in range(self.count)
        ]

    def get_dataset(self):
        return self.rows(0)

    def get_eval_dataset(self):
        return self.rows(0 if self.shared else 100)


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("verifiers")

    def load_environment(name, **arguments):
        if name != "sums":
            raise ValueError(f"no module {name}")
        env = Env(**{key: value for key, value in arguments.items() if key != "turns"})
        env.max_turns = arguments.get("turns", 1)
        return env

    module.load_environment = load_environment
    monkeypatch.setitem(sys.modules, "verifiers", module)
    adapter._environment.cache_clear()
    yield
    adapter._environment.cache_clear()


def config_of(environment="sums", **arguments):
    named = {"environment": environment, "arguments": arguments}
    return RunConfig.model_validate(
        {
            "task": {"fn": f"{FN}:load_task", **named},
            "rewards": [{"name": "rubric", "fn": f"{FN}:Score", **named}],
        }
    )


def test_the_items_are_the_rows_of_the_environment(package):
    task = build_task(config_of().task)
    check_task(task)
    assert [len(task.items(split)) for split in ("train", "validation", "test")] == [6, 6, 0]
    item = task.items("train")[2]
    assert item.prompt == ({"role": "user", "content": "2 + 1 ="},)
    assert (item.id, item.answer, item.info) == ("train-2", "3", {"info": {"worth": 2.0}, "task": "sums"})


def test_an_environment_that_evaluates_on_what_it_trains_on_is_divided(package):
    task = build_task(config_of(count=60, shared=True).task)
    sizes = [len(task.items(split)) for split in ("train", "validation", "test")]
    assert sum(sizes) == 60
    assert min(sizes) > 0
    check_task(task)


def test_the_rubric_pays_the_last_token(package):
    config = config_of()
    item = build_task(config.task).items("train")[2]
    said = [episode([1], [*byte_tokenizer().encode(text), 256], id=text, item=item) for text in ("3", "4")]
    batch = to_batch(said, Controls())
    total = score(build_rewards(config.rewards), Scene(batch, said, byte_tokenizer())).total
    assert total.tolist() == [[0, 0, 2.0], [0, 0, 0]]


def test_what_cannot_be_read_is_named(package, monkeypatch):
    with pytest.raises(TaskError, match="several turns"):
        build_task(config_of(turns=3).task)
    with pytest.raises(ConfigError, match="cannot load"):
        build_task(config_of("other").task)
    adapter._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "verifiers", types.ModuleType("verifiers"))
    with pytest.raises(ConfigError, match="this version"):
        build_task(config_of().task)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(MissingExtraError, match=r"pertoken\[verifiers\]"):
        build_task(config_of().task)


SUMS = """
import verifiers
from datasets import Dataset

def load_environment(count=6):
    def rows(start):
        return Dataset.from_list([
            {"question": f"{start + k} + 1 =", "answer": str(start + k + 1), "info": {"worth": 2.0}}
            for k in range(count)
        ])

    def right(completion, answer, info, **others):
        return float(completion[-1]["content"] == answer) * info["worth"]

    def brief(completion):
        return float(len(completion[-1]["content"]) < 4)

    return verifiers.SingleTurnEnv(
        dataset=rows(0), eval_dataset=rows(100), system_prompt="Answer.",
        rubric=verifiers.Rubric(funcs=[right, brief], weights=[1.0, 0.25]),
    )
"""


def test_an_environment_of_the_package_itself(tmp_path, monkeypatch):
    """Where verifiers is installed: what the tests above stand in for is what it has."""
    pytest.importorskip("verifiers")
    (tmp_path / "sums_of_ours.py").write_text(SUMS)
    monkeypatch.syspath_prepend(tmp_path)
    adapter._environment.cache_clear()
    config = config_of("sums-of-ours", count=5)
    task = build_task(config.task)
    check_task(task)
    assert [len(task.items(split)) for split in ("train", "validation")] == [5, 5]
    items = task.items("train")[:3]
    assert [message["role"] for message in items[0].prompt] == ["system", "user"]
    said = [items[0].answer, "no", f"{items[2].answer} I think"]
    tokenizer = byte_tokenizer()
    rows = [
        episode([1, 2], [*tokenizer.encode(text), 256], id=str(k), group=k, item=item)
        for k, (text, item) in enumerate(zip(said, items, strict=True))
    ]
    total = score(build_rewards(config.rewards), Scene(to_batch(rows, Controls()), rows, tokenizer)).total
    assert total.sum(1).tolist() == [2.25, 0.25, 0.0]
    adapter._environment.cache_clear()
