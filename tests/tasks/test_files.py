"""Files in, items out; and every way in which a file can be wrong, each ending in one clear sentence."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pertoken import rows as rows_module
from pertoken.errors import MissingExtraError, TaskError
from pertoken.tasks.base import SPLITS, check_task
from pertoken.tasks.files import BadRow, FileTask, load_file_task

ROWS = [{"title": f"Title {k}", "body": f"Body of {k}, 中文 🎈", "n": str(k)} for k in range(40)]


def load(path: Any, **settings: Any) -> FileTask:
    return load_file_task(path, **({"prompt": "Title of: {body}", "answer": "title"} | settings))


def everything(task: FileTask) -> list[tuple[str, str | tuple[Any, ...], str | None]]:
    return sorted((item.id, item.prompt, item.answer) for split in SPLITS for item in task.items(split))


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_delimited(delimiter: str) -> Callable[[Path, list[Any]], Path]:
    def write(path: Path, rows: list[Any]) -> Path:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def write_parquet(path: Path, rows: list[Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(arrow.Table.from_pylist(rows), path)
    return path


WRITERS = {
    "jsonl": write_jsonl,
    "ndjson": write_jsonl,
    "json": write_json,
    "csv": write_delimited(","),
    "tsv": write_delimited("\t"),
    "parquet": write_parquet,
}


# --- formats ---


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_items(tmp_path: Path, ending: str):
    task = load(WRITERS[ending](tmp_path / f"news.{ending}", ROWS), id="n", info=["n"])
    assert task.name == "news"
    assert task.bad_rows == ()
    assert everything(task) == sorted((r["n"], f"Title of: {r['body']}", r["title"]) for r in ROWS)
    assert all(item.info == {"n": item.id} for item in task.items("train"))
    check_task(task)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_cells_hold_quotes_delimiters_and_line_breaks(tmp_path: Path, ending: str):
    rows = [{"title": 'He said "no",\tthen left', "body": "one\ntwo\r\n\nthree, four"}, {"title": "t", "body": "b"}]
    task = load(WRITERS[ending](tmp_path / f"t.{ending}", rows), fractions=(1.0, 0.0, 0.0))
    assert [(i.prompt, i.answer) for i in task.items("train")] == [(f"Title of: {r['body']}", r["title"]) for r in rows]


@given(rows=st.lists(st.tuples(*[st.text(st.characters(codec="utf-8", exclude_characters="\0"))] * 2), max_size=8))
def test_any_text_survives_every_text_format(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]):
    folder = tmp_path_factory.mktemp("any")
    cells = [{"title": title, "body": body} for title, body in [*rows, ("t", "b")]]
    usable = [(f"Title of: {c['body']}", c["title"]) for c in cells if c["body"].strip() and c["title"].strip()]
    for ending in ("jsonl", "json", "csv", "tsv"):
        path = WRITERS[ending](folder / f"x.{ending}", cells)
        task = load(path, fractions=(1.0, 0.0, 0.0), max_bad_rows=99)
        assert [(item.prompt, item.answer) for item in task.items("train")] == usable


def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_data(tmp_path: Path):
    csv_file, jsonl_file = tmp_path / "a.csv", tmp_path / "a.jsonl"
    csv_file.write_bytes(b"\xef\xbb\xbfbody,title\r\nx,y\r\n")
    jsonl_file.write_bytes(b'\xef\xbb\xbf{"body": "x", "title": "y"}\r\n\r\n')
    for path in (csv_file, jsonl_file):
        assert everything(load(path)) == [("row-1", "Title of: x", "y")]


def test_a_line_separator_inside_a_json_string_does_not_end_the_row(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"body": "x\u2028y\x85z", "title": "t"}\n', encoding="utf-8")
    assert everything(load(path)) == [("row-1", "Title of: x\u2028y\x85z", "t")]


def test_json_lines_under_the_name_json_are_read_too(tmp_path: Path):
    assert len(everything(load(write_jsonl(tmp_path / "a.json", ROWS)))) == 40


def test_chat_messages_as_prompt(tmp_path: Path):
    task = load(write_jsonl(tmp_path / "a.jsonl", ROWS[:1]), prompt=[{"role": "user", "content": "{body}!"}])
    assert everything(task)[0][1] == ({"role": "user", "content": ROWS[0]["body"] + "!"},)


def test_several_references_give_the_first_as_answer_and_all_as_info(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": ["one", "two"]}])
    (item,) = load(path, fractions=(1.0, 0.0, 0.0)).items("train")
    assert (item.answer, item.info) == ("one", {"references": ["one", "two"]})


def test_data_without_answers_is_fine_if_none_are_asked_for(tmp_path: Path):
    assert everything(load(write_jsonl(tmp_path / "a.jsonl", [{"body": "x"}]), answer=None))[0][2] is None


def test_ids_may_be_numbers(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y", "key": 7}])
    assert everything(load(path, id="key"))[0][0] == "7"


# --- splits ---


def test_one_file_falls_into_the_same_splits_whatever_its_order(tmp_path: Path):
    forward = load(write_jsonl(tmp_path / "a.jsonl", ROWS), id="n")
    backward = load(write_jsonl(tmp_path / "b.jsonl", [*ROWS[::-1], {"title": "t", "body": "new", "n": "new"}]), id="n")
    for split in SPLITS:
        ids = {item.id for item in forward.items(split)}
        assert ids
        assert ids <= {item.id for item in backward.items(split)}
    assert load(tmp_path / "a.jsonl", id="n", seed=1).splits != forward.splits


def test_rows_with_the_same_prompt_stay_in_one_split(tmp_path: Path):
    rows = [{"title": f"answer {k}", "body": f"question {k % 10}"} for k in range(100)]
    task = load(write_jsonl(tmp_path / "a.jsonl", rows), fractions=(0.4, 0.3, 0.3))
    check_task(task)
    assert len(everything(task)) == 100


def test_a_folder_has_a_file_per_split_in_any_format_and_shards(tmp_path: Path):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", ROWS[:10])
    write_json(tmp_path / "train-00001-of-00002.json", ROWS[10:20])
    write_delimited(",")(tmp_path / "dev.csv", ROWS[20:30])
    write_delimited("\t")(tmp_path / "test.tsv", ROWS[30:])
    write_jsonl(tmp_path / "test_other.jsonl", ROWS)  # not a split
    task = load(tmp_path)
    assert {split: len(task.items(split)) for split in SPLITS} == {"train": 20, "validation": 10, "test": 10}
    assert [item.id for item in task.items("train")][9:11] == ["train-10", "train-11"]


def test_a_folder_with_one_data_file_is_that_file(tmp_path: Path):
    write_jsonl(tmp_path / "everything.jsonl", ROWS)
    assert len(everything(load(tmp_path))) == 40


def test_one_path_per_split(tmp_path: Path):
    first, second = write_jsonl(tmp_path / "a.jsonl", ROWS[:30]), write_jsonl(tmp_path / "b.jsonl", ROWS[30:])
    task = load({"train": str(first), "test": str(second)})
    assert {split: len(task.items(split)) for split in SPLITS} == {"train": 30, "validation": 0, "test": 10}
    with pytest.raises(TaskError, match=r"no split 'dev'"):
        load({"dev": str(first)})


def test_the_limit_holds_for_each_split(tmp_path: Path):
    task = load(write_jsonl(tmp_path / "a.jsonl", ROWS), limit=2, fractions=(0.4, 0.3, 0.3))
    assert [len(task.items(split)) for split in SPLITS] == [2, 2, 2]


def test_a_held_out_row_that_is_also_in_train_is_unusable(tmp_path: Path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:5])
    write_jsonl(tmp_path / "test.jsonl", ROWS[4:])
    with pytest.raises(TaskError, match=r"test.jsonl:1: its prompt is also in train \(.*train.jsonl:5\)"):
        load(tmp_path)
    assert len(load(tmp_path, max_bad_rows=1).items("test")) == 35


# --- Hugging Face ---


def test_a_saved_dataset_folder_keeps_its_splits(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(ROWS[:30]), "test": datasets.Dataset.from_list(ROWS[30:])}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    task = load(tmp_path / "saved", info=["n"])
    assert {split: len(task.items(split)) for split in SPLITS} == {"train": 30, "validation": 0, "test": 10}
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")
    assert [r[1:] for r in everything(load(tmp_path / "single"))] != []


def test_a_folder_as_the_hub_lays_it_out(tmp_path: Path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", ROWS[:30])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", ROWS[30:])
    assert len(load(tmp_path).items("validation")) == 10


def test_a_hub_name_is_asked_for_with_its_configuration(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[str, str | None]] = []

    def load_dataset(name: str, part: str | None) -> Any:
        asked.append((name, part))
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "unsupervised": None})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(everything(load("owner/news:small"))) == 40
    load("news")
    assert asked == [("owner/news", "small"), ("news", None)]


def test_a_name_that_is_nothing_says_so(monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, part: str | None) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(TaskError, match=r"no/such: no file or folder of rows.*Couldn't reach the Hub"):
        load("no/such")


def test_without_the_extra_the_message_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for data in ("owner/name", path):
        with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[data\]'"):
            load(data)


# --- bad rows ---

GOOD = b'{"body": "b", "title": "t"}'
BAD_LINES = {
    b'{"body": "b", "title": ': "not valid JSON",
    b"[1, 2]": "expected an object {...}, got list",
    b'{"body": "b"}': "no column 'title'",
    b'{"body": "b", "title": null}': "column 'title': expected text, got empty",
    b'{"body": "b", "title": "  "}': "column 'title' is empty",
    b'{"body": 12, "title": "t"}': "column 'body': expected text, got int '12'",
    b'{"body": "b", "title": []}': "column 'title' is an empty list",
    b'{"body": "b", "title": ["t", 3]}': "column 'title': expected text, got int '3'",
    b'{"body": "b\xff", "title": "t"}': "not UTF-8: byte 0xff at 11",
    b'{"body": "b\0", "title": "t"}': "holds a NUL byte",
    b'{"body": "b\\u0000", "title": "t"}': "column 'body' holds a NUL character",
    b'{"body": "b\\ud83d", "title": "t"}': "column 'body' is not UTF-8 at character 1",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items())
def test_a_bad_line_is_named_with_its_place_and_reason(tmp_path: Path, line: bytes, reason: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD.replace(b'"b"', b'"c"') + b"\n")
    with pytest.raises(TaskError) as error:
        load(path)
    assert f"{path}:3: {reason}" in str(error.value)
    assert "1 unusable rows, task.max_bad_rows allows 0" in str(error.value)
    task = load(path, max_bad_rows=1)
    assert [(bad.file, bad.line) for bad in task.bad_rows] == [(str(path), 3)]
    assert reason in task.bad_rows[0].reason
    assert [row[1] for row in everything(task)] == ["Title of: b", "Title of: c"]


def test_rows_beyond_the_size_limit_are_named_and_the_next_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"body": "' + b"x" * 5000 + b'", "title": "t"}\n' + GOOD + b"\n")
    task = load(path, max_bad_rows=1)
    assert "1:" in str(task.bad_rows[0])
    assert "larger than" in task.bad_rows[0].reason
    assert len(everything(task)) == 1


def test_a_repeated_id_is_named_with_its_first_place(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], ROWS[1] | {"n": "0"}])
    with pytest.raises(TaskError, match=r"a.jsonl:2: id '0' is already that of .*a.jsonl:1"):
        load(path, id="n")


def test_csv_rows_with_other_cells_than_the_header_name_the_line_they_begin_in(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'body,title\n"one\ntwo",t\nlonely\n\na,b,c\nbad\xff,t\n')
    task = load(path, max_bad_rows=3)
    assert task.bad_rows == (
        BadRow(str(path), 4, "expected 2 cells as in the header, got 1"),
        BadRow(str(path), 6, "expected 2 cells as in the header, got 3"),
        BadRow(str(path), 7, "column 'body' is not UTF-8 at character 3"),
    )
    assert everything(task) == [("row-1", "Title of: one\ntwo", "t")]


def test_an_open_quote_is_named_where_it_begins(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text('body,title\na,b\n"c,d\ne,f\n')
    with pytest.raises(TaskError, match=r"a.csv:3: .*is a quote left open"):
        load(path)


def test_a_long_cell_is_read_and_the_limit_of_the_csv_module_is_put_back(tmp_path: Path):
    before = csv.field_size_limit()
    path = write_delimited(",")(tmp_path / "a.csv", [{"body": "x" * (before + 1), "title": "t"}])
    assert len(everything(load(path))) == 1
    assert csv.field_size_limit() == before


def test_many_bad_rows_show_the_first_few_and_their_number(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [*ROWS, *[{"body": "", "title": "t"}] * 9])
    with pytest.raises(TaskError) as error:
        load(path, max_bad_rows=8)
    assert "9 unusable rows, task.max_bad_rows allows 8" in str(error.value)
    assert str(error.value).count("column 'body' is empty") == 5
    assert "... and 4 more" in str(error.value)


# --- files that cannot be used at all ---


def test_a_wrong_column_names_the_closest_and_all_there_are(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(TaskError, match=r"no column 'tittle'.*did you mean 'title'.*columns: title, body, n"):
        load(path, answer="tittle", max_bad_rows=100)
    for setting in ({"prompt": "{nobody}"}, {"id": "key"}, {"info": ["meta"]}):
        with pytest.raises(TaskError, match="no column"):
            load(path, **setting)


def test_a_column_that_only_the_first_row_lacks_is_a_bad_row_not_a_wrong_name(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "b"}, *ROWS])
    with pytest.raises(TaskError, match=r"a.jsonl:1: no column 'title'"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "there are no rows in it"),
        ("a.csv", b"body,title\n", "there are no rows in it"),
        ("a.csv", b"body,body\nx,y\n", "names the column 'body' twice"),
        ("a.csv", b'"body,title\nx,y\n', "the header cannot be read"),
        ("a.json", b"[]", "there are no rows in it"),
        ("a.json", b'{"rows": []}', "expected a list of objects"),
        ("a.json", b"[{]", "not valid JSON"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.json", b'["\xff"]', "not UTF-8 at byte 2"),
        ("a.parquet", b"PAR1 is not enough", "not a readable Parquet file"),
        ("a.xlsx", b"PK", "cannot read '.xlsx'; known: .jsonl"),
        ("a.jsonl", b'{"body": 1, "title": "t"}\n', "no usable row"),
    ],
)
def test_a_file_that_gives_nothing_ends_in_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TaskError) as error:
        load(path, max_bad_rows=5)
    assert str(path) in str(error.value)
    assert sentence in str(error.value)


def test_missing_files_and_folders_without_data_say_so(tmp_path: Path):
    with pytest.raises(TaskError, match="no such file"):
        load(tmp_path / "absent.jsonl")
    with pytest.raises(TaskError, match="no such file"):
        load({"train": str(tmp_path / "absent.csv")})
    with pytest.raises(TaskError, match="expected data files named train, validation or test"):
        load(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(TaskError, match=r"found a.jsonl, b.jsonl"):
        load(tmp_path)
