"""`benchmarks/traps.py`: the other systems still fall into the seven traps, and ours into none."""

import subprocess
import sys
from pathlib import Path

import pytest

TRAPS = Path(__file__).parents[2] / "benchmarks" / "traps.py"


@pytest.fixture(scope="module")
def table():
    done = subprocess.run([sys.executable, TRAPS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_the_recorded_table_is_that_of_now(table):
    rows = table.splitlines()[2:]
    if len(rows) < 8:
        pytest.skip("not every system is at hand: python benchmarks/oracles.py")
    assert [row[2:4] for row in rows] == ["R1", "R1", "R2", "R3", "R4", "R5", "R6", "R7"]
    assert "no longer in the trap" not in table
    page = (TRAPS.parents[1] / "docs" / "correctness.md").read_text(encoding="utf-8")
    assert all(row in page for row in rows)
