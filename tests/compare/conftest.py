"""Comparisons made up of run folders with known numbers: no model, no training."""

import os

import pytest

from pertoken.compare.settings import load_comparison
from pertoken.tracking import RunLog, runlog

ITEMS = ("a", "b", "c", "d")


def tokens_of(count):
    """A prompt of one token and an answer of so many."""
    return {"id": [0] * (1 + count), "piece": ["."] * (1 + count), "action": [0, *[1] * count]}


@pytest.fixture
def quick(monkeypatch):
    """No test waits for the disk."""
    monkeypatch.setattr(runlog, "versions", dict)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def plan_of(tmp_path):
    """`plan_of("compare.seeds=2", ...)`: a plan whose folder is in a temporary place."""

    def make(*settings):
        return load_comparison([], [f"compare.folder={tmp_path / 'comparison'}", *settings])

    return make


@pytest.fixture
def made(quick):
    """`made(run, [(tokens, seconds, {metric: values by item}), ...])`: the finished folder of a run."""

    def make(run, points, *, metrics=None, outputs=None, ids=ITEMS, lengths=None):
        outputs = outputs or {item: f"{run.name} says {item}" for item in ids}
        with RunLog.create(run.run_folder, config_text=run.to_yaml(), seed=run.seed) as log:
            before = (0.0, 0.0)
            for step, (tokens, seconds, items) in enumerate(points):
                if step:
                    beside = {"tokens/generated": tokens - before[0], "time/update": seconds - before[1]}
                    log.step(step, beside)
                before = (tokens, seconds)
                means = {name: sum(values) / len(values) for name, values in items.items()}
                rows = [
                    {
                        "id": item,
                        "prompt": f"prompt {item}",
                        "answer": f"answer {item}",
                        "output": outputs[item],
                        "metrics": {name: values[ITEMS.index(item)] for name, values in items.items()},
                        **({"tokens": tokens_of(lengths[item])} if lengths else {}),
                    }
                    for item in ids
                ]
                log.evaluation(step, run.evaluation.split, {"metrics": means | (metrics or {})}, rows)
            log.finish("finished")

    return make
