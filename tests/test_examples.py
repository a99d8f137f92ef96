"""Each example runs as a person runs it: as a script, from another folder."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

SAYS = {
    "own_data.py": ["'train': ", "step 3", "made all 3 steps; held-out ROUGE-L "],
    "span_reward.py": ["spell out 12", "'reward/digits': -", "made all 3 steps"],
    "stages_by_hand.py": ["step  1", "step 20"],
    "two_turns.py": ["step  1", "step 20", "observation '\\n"],
}


@functools.cache
def run(name: str) -> tuple[str, list[str]]:
    """What an example prints, and what it leaves in the folder that it is run from."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name)], cwd=folder, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, os.listdir(folder)


def test_every_example_is_tested():
    assert set(SAYS) == {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs_and_leaves_nothing_behind(name):
    out, left = run(name)
    for words in SAYS[name]:
        assert words in out
    assert left == []


def test_the_loop_by_hand_learns():
    rewards = [float(line.split()[3]) for line in run("stages_by_hand.py")[0].splitlines() if "letter_e" in line]
    assert rewards[-1] > 0.5 > 0.1 > rewards[0]


def test_both_turns_learn():
    lines = [line.split() for line in run("two_turns.py")[0].splitlines() if line.startswith("step")]
    first, second = ([float(line[column]) for line in lines] for column in (4, 7))
    assert min(first[-1], second[-1]) > 0.25 > 0.05 > max(first[0], second[0])
