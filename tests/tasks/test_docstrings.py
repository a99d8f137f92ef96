"""Documentation summaries: from files that are never imported to pairs that a person could write."""

import sys
from pathlib import Path

import pytest

from pertoken.errors import TaskError
from pertoken.tasks import docstrings
from pertoken.tasks.base import SPLITS, check_task
from pertoken.tasks.docstrings import (
    DEFAULT_PACKAGES,
    LARGE_PACKAGES,
    is_good_body,
    is_good_summary,
    load_docstring_task,
    prose,
    split_of,
    summary_line,
)

BODY = "The gate opens when the key turns. It stays open until somebody closes the gate, at night at the latest. "
LONG_BODY = BODY + "Visitors who arrive later ring the bell and wait until a guard has seen them and turns the key."


def documented(summary: str, body: str = LONG_BODY, indent: str = "    ") -> str:
    return f'{indent}"""{summary}\n\n{indent}{body}\n{indent}"""\n'


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable folder `gatehouse`, which must never be imported."""
    folder = tmp_path / "gatehouse"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "LARGE_PACKAGES", ("gatehouse",))  # in train, whatever its hash
    return folder


def names(num_per_package: int = 400) -> list[str]:
    task = load_docstring_task(["gatehouse"], num_per_package=num_per_package)
    return sorted(item.id for item in task.items("train"))


# --- from a docstring to a pair ---


def test_a_summary_is_the_first_sentence_without_markup():
    assert summary_line("Open the :func:`~gate.of.home`\n    with *key*.  Then wait.\n\n    More.") == (
        "Open the `gate.of.home` with key."
    )
    assert summary_line("Open the gate\n\nMore.") == "Open the gate."
    assert summary_line("Return e.g. a key.") == "Return e.g. a key."


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("See ``open(key)`` now.", "See `open(key)` now."),
        ("See :class:`Gate <house.Gate>` now.", "See `Gate` now."),
        ("See `the manual <https://example.org>`_ now.", "See the manual now."),
        ("See `the manual`_ now.", "See the manual now."),
        ("See [the manual](https://example.org) now.", "See the manual now."),
        ("See [`Gate`] now.", "See `Gate` now."),
        ("See *this* and **that** now, not `*args`.", "See this and that now, not `*args`."),
        ("See\n  it [1]_ now.", "See it [1] now."),
    ],
)
def test_markup_is_taken_off(markup: str, plain: str):
    assert summary_line(markup) == plain


def test_prose_leaves_out_all_that_is_not_written_in_sentences():
    docstring = """Open the gate.

    The key is turned. For example::

        open(key)

    >>> open(1)
    2

    .. versionadded:: 3.2
       The bell.

    - a bullet
    - another

    1. first

    :param key: the key

    | a | table |

    which goes on after the table.

    The bell rings. These are the keys:

    Args:
        key (str): Turns. Needs oil.

    It ends here.
    Returns:
        A gate. Open.

    Parameters
    ----------
    key : int
        A number.

    A sentence inside the parameters.

    Notes
    -----
    Guards sleep at night.
    """
    assert prose(docstring) == "The key is turned. The bell rings. It ends here. Guards sleep at night."


def test_prose_takes_in_what_follows_the_first_sentence_of_the_first_paragraph():
    assert prose("Open the gate. It is heavy.\n\nMind the step.") == "It is heavy. Mind the step."


def test_prose_is_cut_at_the_end_of_a_sentence():
    docstring = "Open.\n\nOne two three. Four five.\n\nSix seven eight."
    assert prose(docstring, max_words=5) == "One two three. Four five."
    assert prose(docstring, max_words=4) == "One two three."
    assert prose(docstring, max_words=2) == ""


@pytest.mark.parametrize(
    "summary",
    [
        "Open it now.",  # too short
        " ".join(["word"] * 21) + ".",
        "open the heavy gate.",
        "Open the heavy gate:",
        "Öffne das schwere Tor.",
        "Deprecated since the last gate.",
        "See https://example.org for the gate.",
        "Open {name} with the key.",
    ],
)
def test_summaries_that_nobody_should_learn_from(summary: str):
    assert is_good_summary("Open the heavy gate.")
    assert not is_good_summary(summary)


def test_a_good_body_is_prose_about_what_the_summary_says_but_does_not_hold_it():
    assert is_good_body(LONG_BODY, "Open the gate with a key.", min_words=30)
    assert not is_good_body(BODY, "Open the gate with a key.", min_words=30)  # too short
    assert not is_good_body(LONG_BODY, "Compute eigenvalues of matrices.", min_words=30)  # about something else
    assert not is_good_body(LONG_BODY, "The gate opens, when the KEY turns.", min_words=30)  # could be copied
    assert not is_good_body(LONG_BODY + " x=1; y=2; z=[3]; w={4}", "Open the gate with a key.", min_words=30)
    assert not is_good_body(
        LONG_BODY + " a=1 b=2 (c+d)/e**4 == [1, 2, 3] // 7 != 9 * 10" * 2, "Open the gate.", min_words=1
    )


# --- from a package to items ---


def test_public_functions_methods_and_classes_become_items(package: Path):
    (package / "doors.py").write_text(
        "def open_gate():\n"
        + documented("Open the gate with a key.")
        + "async def wait():\n"
        + documented("Wait until the guard comes to the gate.", "Slowly. " + LONG_BODY)
        + "def _hidden():\n"
        + documented("Turn the key of a hidden gate.", "Hidden. " + LONG_BODY)
        + "class Gate:\n"
        + documented("A gate that visitors open.", "Wooden. " + LONG_BODY)
        + "    def close(self):\n"
        + documented("Close the gate at night.", "Bang. " + LONG_BODY, indent=" " * 8)
    )
    task = load_docstring_task(["gatehouse"])
    kinds = {item.id: item.info["kind"] for item in task.items("train")}
    assert kinds == {
        "gatehouse.doors.open_gate": "function",
        "gatehouse.doors.wait": "function",
        "gatehouse.doors.Gate": "class",
        "gatehouse.doors.Gate.close": "method",
    }
    item = next(item for item in task.items("train") if item.id == "gatehouse.doors.open_gate")
    assert item.answer == "Open the gate with a key."
    assert item.info["source"] == LONG_BODY
    assert item.prompt[0]["role"] == "user"
    assert LONG_BODY in item.prompt[0]["content"]
    assert item.answer not in item.prompt[0]["content"]
    assert "gatehouse" not in sys.modules


def test_tests_vendored_code_broken_and_huge_files_are_not_read(package: Path, monkeypatch: pytest.MonkeyPatch):
    function = "def f():\n" + documented("Open the gate with a key.")
    for file in ("tests/a.py", "_vendor/a.py", "sub/testing/a.py", "test_a.py", "a_test.py", "conftest.py"):
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(function)
    (package / "broken.py").write_text(function + "def (:\n")
    (package / "null.py").write_bytes(function.encode() + b"\0")
    (package / "huge.py").write_text(function + "#" * 1_000_000)
    (package / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe4\n" + function.encode())
    assert names() == ["gatehouse.latin.f"]


def test_what_was_seen_is_not_taken_again(package: Path):
    (package / "a.py").write_text("def f():\n" + documented("Open the gate with a key."))
    (package / "b.py").write_text("def f():\n" + documented("Open *the* gate with a key"))  # same summary
    (package / "c.py").write_text("def f():\n" + documented("Turn the key of the gate."))  # same body
    assert len(names()) == 1


def test_a_package_gives_at_most_so_many_items_and_always_the_same(package: Path):
    for k in range(9):
        summary, body = f"Open the gate of key {k}.", f"Number {k}. {LONG_BODY}"
        (package / f"m{k}.py").write_text("def f():\n" + documented(summary, body))
    assert len(names()) == 9
    assert len(names(4)) == 4
    assert names(4) == names(4)


def test_the_seed_orders_items_and_the_caps_cut_them(package: Path):
    for k in range(9):
        summary, body = f"Open the gate of key {k}.", f"Number {k}. {LONG_BODY}"
        (package / f"m{k}.py").write_text("def f():\n" + documented(summary, body))
    first = [[i.id for i in load_docstring_task(["gatehouse"], seed=s).items("train")] for s in (0, 1)]
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1])
    assert [i.id for i in load_docstring_task(["gatehouse"], num_train=3).items("train")] == first[0][:3]


def test_a_template_may_use_name_kind_and_package(package: Path):
    (package / "a.py").write_text("def f():\n" + documented("Open the gate with a key."))
    (item,) = load_docstring_task(["gatehouse"], prompt="{package} {name} {kind}").items("train")
    assert item.prompt == "gatehouse gatehouse.a.f function"


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(TaskError, match=r"'no_such_package'.*top-level"):
        load_docstring_task(["no_such_package"])
    with pytest.raises(TaskError, match=r"'xml\.email'.*top-level"):
        load_docstring_task(["xml.email"])


def test_packages_that_give_no_training_item_are_named():
    with pytest.raises(TaskError, match="none of asyncio gives a training item"):
        load_docstring_task(["asyncio"])


# --- the real thing ---


def test_the_standard_library_gives_sound_items_by_package():
    assert split_of("asyncio") == split_of("logging") == "test"  # fixed by their names, on every machine
    assert split_of("email") == "validation"
    task = load_docstring_task(["http", "graphlib", "email", "asyncio", "logging", "os"])
    check_task(task)
    assert {item.info["package"] for item in task.items("test")} == {"asyncio", "logging"}
    assert {item.info["package"] for item in task.items("validation")} == {"email"}
    assert len(task.items("test")) > 30
    for split in SPLITS:
        for item in task.items(split):
            assert is_good_summary(item.answer or "")
            assert 30 <= len(item.info["source"].split()) <= 110


def test_large_packages_are_never_held_out():
    assert {split_of(package) for package in LARGE_PACKAGES} == {"train"}
    assert len(set(DEFAULT_PACKAGES)) == len(DEFAULT_PACKAGES)
    assert {split_of(package) for package in DEFAULT_PACKAGES} == set(SPLITS)
