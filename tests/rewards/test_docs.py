"""docs/rewards.md runs, and names every built-in reward with its parameters and defaults."""

import dataclasses
import re
from pathlib import Path

import pytest

from pertoken.rewards import resolve
from pertoken.rewards.names import BUILT_IN

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they write files
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[1:]:  # the first one only shows the protocol
        exec(block, names)


def test_the_table_of_costs_has_every_reward():
    """Missing ones are put there by `python benchmarks/reward_cost.py --only <names> --write`."""
    table = PAGE[PAGE.index("<!-- cost -->") : PAGE.index("<!-- end -->")]
    assert {name for name in BUILT_IN if f"| `{name}` |" not in table} == set()


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_parameter_is_documented_with_its_default(name):
    table = PAGE[PAGE.index(f"| `{name}` |") :].split("\n| `")[0]
    documented = re.findall(r"^\| \| `(\w+)` \| `(.*?)` \|", table, flags=re.MULTILINE)
    expected = [
        (field.name, "required" if field.default is dataclasses.MISSING else repr(field.default).replace("'", '"'))
        for field in dataclasses.fields(resolve(name))
    ]
    assert documented == expected
