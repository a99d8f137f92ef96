"""Broken input that once ended in an unnamed error, and a little more of the kind (`benchmarks/fuzz.py`)."""

import importlib.util
import random
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

KEPT = [(path.parent.name, path) for path in sorted(fuzz.CASES.rglob("*.json"))]


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    made = {}

    def target(name):
        if name not in made:
            made[name] = fuzz.TARGETS[name](tmp_path_factory.mktemp(name))
        return made[name]

    return target


@pytest.mark.parametrize(("name", "path"), KEPT, ids=lambda value: getattr(value, "stem", value))
def test_what_was_found_ends_in_a_named_error_or_in_none(targets, name, path):
    targets(name).check(*fuzz.kept(path))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_two_seconds_of_more(targets, name):
    tried, found = fuzz.search(targets(name), 2.0, random.Random(7))
    assert tried > 0
    assert not found, "\n".join(f"{fault}: {case}\n{words}" for fault, (case, words) in found.items())


def test_what_is_drawn_stays_as_it_was():
    """Values of the list of odd ones are put into others and have parts exchanged: in the list nothing changes."""
    before = repr(fuzz.ODD)

    @fuzz.seed(3)
    @fuzz.settings(max_examples=300, deadline=None, database=None)
    @fuzz.given(fuzz.exchanged([{"a": fuzz.ODD}]))
    def draw(value):
        repr(value)

    draw()
    assert repr(fuzz.ODD) == before


def test_a_fault_is_found_and_made_small(monkeypatch, tmp_path):
    """A planted one: rows that mention a cat end in a KeyError."""
    whole = fuzz.load_file_task

    def allergic(path, **settings):
        if b'"key"' in path.read_bytes():
            raise KeyError("cat")
        return whole(path, **settings)

    monkeypatch.setattr(fuzz, "load_file_task", allergic)
    monkeypatch.setattr(fuzz, "CASES", tmp_path / "cases")
    _, found = fuzz.search(fuzz.Data(tmp_path), 1.0, random.Random(0))
    ((case, words),) = found.values()
    assert "KeyError: 'cat'" in words
    assert fuzz.kept(fuzz.keep("data", case)) == case
