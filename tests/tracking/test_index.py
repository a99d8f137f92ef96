"""The index of the samples: it says what they say, is never believed against them, and costs a run nothing."""

import json
import math

import pytest

from pertoken.errors import RunFolderError
from pertoken.tracking import RunLog, RunReader, index, records
from pertoken.tracking.comparison import compare
from pertoken.tracking.runlog import episodes_path, evaluation_path
from pertoken.tracking.samples import browse, samples_with, scene_of, training_groups


def a_record(item: str, reward: float = 1.0, group: int = 0, text: str = "answer", **streams) -> dict:
    tokens = {"id": [0, 1, 2], "piece": ["ask ", "an", "swer"], "action": [0, 1, 1]}
    columns = {"reward/total": [0, reward, 0], **{name: [0, *values] for name, values in streams.items()}}
    texts = {"prompt": "ask", "answer": "gold", "completion": text}
    return {"id": item, "item": item, "group": group, "stop": "eos", **texts, "tokens": tokens, "streams": columns}


def an_item(name: str, score: float, output: str = "y", kl: float = 0.5) -> dict:
    tokens = {"id": [1, 2], "piece": ["a", "b"], "action": [0, 1]}
    texts = {"prompt": "p", "answer": "x", "output": output}
    return {"id": name, **texts, "metrics": {"rouge_l": score}, "tokens": tokens, "streams": {"kl": [0, kl]}}


@pytest.fixture
def log(tmp_path):
    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        yield log


def evaluate(log: RunLog, step: int, *rows: dict) -> None:
    log.evaluation(step, "test", {"main": "rouge_l", "metrics": {"rouge_l": 0.5}}, rows)


def place(log: RunLog, step: int = 1):
    return log.folder / "index" / "episodes" / f"{step:06d}.json"


def test_it_has_the_figures_of_each_sample_and_leads_to_its_line(log):
    log.episodes(1, [a_record("a", 0.25, text="é\u2028\n"), a_record("b", -1.0, group=1)])
    reader = RunReader(log.folder)
    found = reader.episode_index(1)
    assert [(row["item"], row["group"], row["reward"], row["tokens"]) for row in found.rows] == [
        ("a", 0, 0.25, 2),
        ("b", 1, -1.0, 2),
    ]
    assert reader.some_episodes(1, [1, 0]) == reader.episodes(1)[::-1]


def test_of_a_held_out_item_it_has_the_metrics_and_the_distance(log):
    evaluate(log, 0, an_item("i", 0.5, kl=-0.25))
    found = RunReader(log.folder).evaluation_index(0, "test").rows[0]
    assert (found["id"], found["metrics"], found["far"]) == ("i", {"rouge_l": 0.5}, 0.25)


def test_a_page_reads_the_samples_that_it_shows_and_no_others(log, monkeypatch):
    for step in (1, 2):
        log.episodes(step, [a_record(f"e{k}", k, group=k) for k in range(40)])
    evaluate(log, 0, *(an_item(f"i{k}", 0.1) for k in range(20)))
    evaluate(log, 2, *(an_item(f"i{k}", 0.01 * k) for k in range(20)))
    read = []
    monkeypatch.setattr(records, "read_rows", lambda path: pytest.fail(f"all of {path} was read"))
    single = records.read_row
    monkeypatch.setattr(records, "read_row", lambda *where: read.append(where) or single(*where))
    reader = RunReader(log.folder)
    monkeypatch.setattr("pertoken.tracking.samples.MAX_BYTES_SERVED", 150)
    evaluations = [
        json.loads(line) for line in (log.folder / "evaluations.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = browse(reader, compare(evaluations), served=True)
    assert len(found["lists"]["training"]["id"]) == 80
    assert len(found["lists"]["held_out"]["id"]) == 20
    assert 0 < len(read) < 10
    assert None not in found["lists"]["training"]["scene"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"format": 1}', "other", "negative", "unsorted", "nan", "far"])
def test_one_that_is_not_of_its_file_is_made_anew(log, damage):
    log.episodes(1, [a_record("a", 0.25), a_record("b", 0.5)])
    sound = json.loads(place(log).read_text())
    if damage == "other":
        episodes_path(log.folder, 1).write_bytes(
            b"".join(json.dumps(a_record(name)).encode() + b"\n" for name in ("c", "d"))
        )
    elif damage in ("negative", "unsorted", "nan", "far"):
        first, last = sound["ends"]
        changed = {
            "negative": {"ends": [-1, last]},
            "unsorted": {"ends": [last, first]},
            "nan": {"rows": [row | {"reward": math.nan} for row in sound["rows"]]},
            "far": {"ends": [first, last + 5]},
        }[damage]
        place(log).write_text(json.dumps(sound | changed))
    else:
        place(log).write_text(damage)
    reader = RunReader(log.folder)
    expected = ["c", "d"] if damage == "other" else ["a", "b"]
    assert [row["item"] for row in reader.episode_index(1).rows] == expected
    assert [row["item"] for row in reader.some_episodes(1, [0, 1])] == expected
    assert json.loads(place(log).read_text())["rows"][0]["item"] == expected[0]


def test_without_it_a_run_reads_the_same_and_has_it_afterwards(log):
    log.episodes(1, [a_record("a", 0.25), a_record("b", 0.5)])
    made = place(log).read_bytes()
    groups = training_groups(RunReader(log.folder))
    place(log).unlink()
    assert training_groups(RunReader(log.folder)) == groups
    assert place(log).read_bytes() == made


def test_a_folder_that_cannot_be_written_is_read_and_written_all_the_same(log, monkeypatch):
    def full(*_):
        raise RunFolderError("disk full")

    monkeypatch.setattr(index, "write_whole", full)
    log.episodes(1, [a_record("a", 0.25)])
    assert not place(log).exists()
    assert RunReader(log.folder).episode_index(1).rows[0]["reward"] == 0.25


def test_numbers_that_are_not_finite_end_no_run(log):
    log.episodes(1, [a_record("a", math.nan, value=[math.inf, 1e300], **{"return": [-math.inf, -1e300]})])
    assert RunReader(log.folder).episode_index(1).rows[0]["reward"] == 0


def test_resuming_drops_it_with_its_samples(log):
    for step in (1, 2):
        log.step(step, {"x": 1.0})
        log.episodes(step, [a_record("a")])
    log.close()
    RunLog.open(log.folder, step=1).close()
    assert place(log).exists()
    assert not place(log, 2).exists()


def test_a_torn_last_line_is_not_in_it(log):
    log.episodes(1, [a_record("a")])
    place(log).unlink()
    with open(episodes_path(log.folder, 1), "ab") as file:
        file.write(b'{"item": "b", "comp')
    assert [row["item"] for row in RunReader(log.folder).episode_index(1).rows] == ["a"]


def test_words_are_found_in_every_text_whatever_the_order_of_the_fields(log):
    log.episodes(1, [a_record("a", text='Say "ÄH"\n'), a_record("b"), a_record("c")])
    path = episodes_path(log.folder, 1)
    lines = path.read_bytes().splitlines()
    turned = dict(reversed(json.loads(lines[2]).items())) | {"completion": 'say "äh" again'}
    path.write_bytes(b"\n".join([*lines[:2], json.dumps(turned).encode(), b""]))
    evaluate(log, 0, an_item("i", 0.1, output='a "äh" before'), an_item("j", 0.1))
    evaluate(log, 1, an_item("i", 0.1), an_item("j", 0.1))
    reader = RunReader(log.folder)
    assert samples_with(reader, '"Äh"') == ["test.1.0", "1.0", "1.2"]
    assert samples_with(reader, "nothing like this") == []


def test_long_texts_are_searched_to_their_end(log):
    log.episodes(1, [a_record("a", text="x" * 2 * index._HEAD + " needle")])
    assert samples_with(RunReader(log.folder), "needle") == ["1.0"]


def test_a_scene_is_found_by_any_of_its_samples(log):
    log.episodes(3, [a_record(f"e{k}", k % 7, group=k // 12) for k in range(24)])
    evaluate(log, 0, an_item("i", 0.1), an_item("j", 0.2))
    evaluate(log, 3, an_item("j", 0.3), an_item("i", 0.4))
    reader = RunReader(log.folder)
    for sample in range(24):
        key, scene = scene_of(reader, f"3.{sample}")
        assert f"3.{sample}" in [panel["id"] for panel in scene["panels"]]
        assert len(scene["panels"]) == 8
        assert key in (f"3.{sample}", "3.0", "3.12")
    for sample in ("test.0.0", "test.3.0"):
        key, scene = scene_of(reader, sample)
        assert (key, scene["title"]) == ("test.0", "j")
        assert [panel["id"] for panel in scene["panels"]] == ["test.0.0", "test.3.0"]
    for wrong in ("3.24", "4.0", "test.1.0", "test.3.2", "other.3.0", "", "3", "..", "a.b", "3.-1", "9" * 99 + ".0"):
        with pytest.raises(RunFolderError, match="has no sample"):
            scene_of(reader, wrong)


def test_a_damaged_file_is_named(log):
    evaluate(log, 0, an_item("i", 0.1))
    evaluation_path(log.folder, 0, "test").write_text('{"id": 1.5}\n')
    with pytest.raises(RunFolderError, match="line 1"):
        RunReader(log.folder).evaluation_index(0, "test")
