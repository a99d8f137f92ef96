"""The benchmarks run: on a tiny model, so that a change of the loop does not break them unseen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name, *arguments):
    command = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_step_of_each_own_arm_is_timed_and_drawn(model_folder, tmp_path):
    picture = tmp_path / "steps.png"
    arms = ("pertoken", "pertoken/generic/micro=64")
    shape = ("--prompts", 2, "--completions", 2, "--prompt-tokens", 5, 9, "--new-tokens", 4, "--steps", 1)
    out = run("step_vs_trl.py", "--model", model_folder, *shape, "--plot", picture, "--arms", *arms)
    for arm in arms:
        row = next(line for line in out.splitlines() if line.startswith(f"| {arm} |"))
        seconds, ratio, tokens = re.findall(r"[\d.]+", row.removeprefix(f"| {arm} |"))[0:9:3]
        assert float(seconds) > 0
        assert float(ratio) > 0
        assert float(tokens) > 0
    assert picture.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_every_benchmark_says_how_it_is_called(path):
    assert f"python benchmarks/{path.name}" in path.read_text(encoding="utf-8").split('"""')[1]
