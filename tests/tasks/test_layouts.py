"""Rows of every usual shape are read, and others say why not."""

import json
from pathlib import Path
from typing import Any

import pytest

from pertoken.errors import TaskError
from pertoken.tasks.files import FileTask, load_file_task
from pertoken.tasks.layouts import Layout, UnusableRowError, cell_of, conversation

SUMMARY = Layout("Sum up: {document}", answer="summary", source="document")


def load(folder: Path, rows: list[Any], layouts: list[Layout], **settings: Any) -> FileTask:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_file_task(path, layouts=layouts, fractions=(1.0, 0.0, 0.0), **settings)


def test_a_path_leads_into_what_a_column_holds_unless_a_column_has_that_name():
    row = {"a": {"b": {"c": 1}}, "x.y": 2, "x": {"y": 3}}
    assert (cell_of(row, "a.b.c"), cell_of(row, "x.y")) == (1, 2)
    for column in ("a.c", "a.b.c.d", "z"):
        with pytest.raises(UnusableRowError, match=f"no column '{column}'"):
            cell_of(row, column)


def test_a_template_fills_in_what_a_path_leads_to(tmp_path):
    layout = Layout("{translation.en}", answer="translation.de", source="translation.en")
    (item,) = load(tmp_path, [{"translation": {"en": "Hello", "de": "Hallo"}}], [layout]).items("train")
    assert (item.prompt, item.answer, item.info) == ("Hello", "Hallo", {"source": "Hello"})


def test_each_row_is_read_by_the_first_layout_that_it_fits(tmp_path):
    rows = [
        {"document": "D", "summary": "S", "prompt": "P", "completion": "C"},
        {"prompt": "P", "completion": "C"},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    ]
    layouts = [
        SUMMARY,
        Layout("{prompt}", answer="completion"),
        Layout(messages="prompt", answer="completion"),
        Layout(messages="messages"),
    ]
    items = load(tmp_path, rows, layouts).items("train")
    assert [(item.prompt, item.answer) for item in items] == [
        ("Sum up: D", "S"),
        ("P", "C"),
        (({"role": "user", "content": "Q"},), "A"),
        (({"role": "user", "content": "Hi"},), "Hello"),
    ]


def test_a_row_that_fits_none_names_what_was_expected(tmp_path):
    with pytest.raises(
        TaskError, match=r"rows.jsonl:1: it fits none of the layouts: expected document, summary; prompt; got text"
    ):
        load(tmp_path, [{"text": "x"}], [SUMMARY, Layout("{prompt}")])


def test_with_one_layout_a_column_that_no_row_has_is_named(tmp_path):
    with pytest.raises(TaskError, match="no column 'document': did you mean 'documents'"):
        load(tmp_path, [{"documents": "x", "summary": "y"}], [SUMMARY])


def test_an_answer_that_is_not_there_is_what_no_answer_says(tmp_path):
    rows = [
        {"question": "a?", "answers": {"text": ["b", "c"]}},
        {"question": "d?", "answers": {"text": []}},
    ]
    layout = Layout("{question}", answer="answers.text")
    first, second = load(tmp_path, rows, [layout], no_answer="unanswerable").items("train")
    assert (first.answer, first.info["references"]) == ("b", ["b", "c"])
    assert (second.answer, second.info["references"]) == ("unanswerable", ["unanswerable"])
    with pytest.raises(TaskError, match=r"rows.jsonl:2: column 'answers.text' is an empty list"):
        load(tmp_path, rows, [layout])


def test_an_opening_divides_a_text(tmp_path):
    layout = Layout("Go on: {text}", opening=3)
    (item,) = load(tmp_path, [{"text": " Once upon a\ntime there was. "}], [layout]).items("train")
    assert (item.prompt, item.answer) == ("Go on: Once upon a", "time there was.")
    with pytest.raises(TaskError, match="its 3 words leave nothing behind an opening of 3"):
        load(tmp_path, [{"text": "Once upon a"}], [layout])


@pytest.mark.parametrize(
    ("turns", "answered", "roles"),
    [
        (["a", "b"], True, ["user", "assistant"]),
        (["a", "b", "c"], True, ["assistant", "user", "assistant"]),
        (["a", "b"], False, ["assistant", "user"]),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], True, ["user", "assistant"]),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], False, ["system", "user"]),
    ],
)
def test_conversations_of_every_kind(turns, answered, roles):
    found = conversation(turns, "x", answered=answered)
    assert [turn["role"] for turn in found] == roles
    assert [turn["content"] for turn in found] == ["a", "b", "c"][: len(turns)]


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ("Hi", "expected a list of messages, got 'Hi'"),
        ([], "expected a list of messages"),
        (["Hello."], "an answer of the assistant, got 1"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "end with one of 'user'"),
        ([{"content": "a"}, {"role": "assistant", "content": "b"}], "message 0 does not say whose it is"),
        ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "'x.0': expected text, got empty"),
    ],
)
def test_what_is_no_conversation_says_so(turns, words):
    with pytest.raises(UnusableRowError, match=words):
        conversation(turns, "x", answered=True)


def test_what_may_be_said_otherwise_and_is_put_back():
    row = {"document": "D", "summary": "S"}
    assert SUMMARY.rewritable(row) == {"document": "D"}
    assert SUMMARY.rewritten(row, {"document": "E"}) == {"document": "E", "summary": "S"}
    for turns in (["a", "b", "c", "d"], [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]):
        layout, row = Layout(messages="dialog"), {"dialog": turns}
        assert layout.rewritable(row) == {"dialog": "c"}
        changed = layout.rewritten(row, {"dialog": "C"})
        assert layout.read(changed).prompt[-1] == {"role": "user", "content": "C"}
        assert layout.read(changed).answers == ["d"]
    assert Layout("{text}", opening=3).rewritable({"text": "a b c d"}) == {}
