"""docs/tour.md runs from top to bottom, and prints what stands there."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)

PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")


def test_every_block_runs_and_prints_what_stands_under_it():
    made = generate.tour(PAGE)
    for written, printed in zip(PAGE.splitlines(), made.splitlines(), strict=False):
        assert written == printed, "docs/tour.md is stale; run: python docs/generate.py"
    assert made == PAGE


def test_ten_steps_in_order():
    assert re.findall(r"^## (\d+)\. ", PAGE, flags=re.MULTILINE) == [str(k) for k in range(1, 11)]
