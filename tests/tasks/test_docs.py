"""What docs/tasks.md shows must work as it stands there."""

import re
from pathlib import Path

import pytest
import yaml

from pertoken.config import FileTask, RunConfig, validate
from pertoken.rows import READERS
from pertoken.tasks.base import SPLITS
from pertoken.tasks.docstrings import LARGE_PACKAGES

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_the_recipes_are_valid_configurations(text: str):
    validate(yaml.safe_load(text), RunConfig)


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    rows = "".join(f"Body {k}.,Headline {k}\n" for k in range(50))
    (tmp_path / "articles.csv").write_text("body,headline\n" + rows)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for text in blocks("python"):
        exec(text, scope)
    assert "Summarise in one sentence: Body " in capsys.readouterr().out


def test_every_key_and_ending_is_documented():
    keys = set(re.findall(r"`(\w+)`", "".join(line for line in PAGE.splitlines() if line.startswith("| `"))))
    assert set(FileTask.model_fields) - {"type"} <= keys
    for name in (*READERS, *LARGE_PACKAGES, *SPLITS):
        assert name in PAGE
