"""The run folder: what is written comes back, and no accident costs more than the row that it hit."""

import errno
import json
import math
import os
import resource
from pathlib import Path

import pytest

from pertoken.errors import RunFolderError
from pertoken.tracking import RunLog, RunReader, episode_record
from pertoken.types import Episode, Item, Span


def new_run(folder: Path) -> RunLog:
    return RunLog.create(folder, config_text="seed: 7\n", seed=7, about={"model": "tiny", "task": "echo", "steps": 4})


def an_episode(**changes) -> Episode:
    fields = {
        "id": "s1-i3-0",
        "item": Item(id="i3", prompt=({"role": "user", "content": "Say hé."},), answer="hé"),
        "group": 0,
        "tokens": [5, 6, 7, 8],
        "action_mask": [False, False, True, True],
        "logprobs": [0.0, 0.0, -0.5, -1.25],
        "env_rewards": [0.0] * 4,
        "spans": [Span(0, 2, "prompt", 0), Span(2, 4, "action", 0)],
        "stop": "eos",
        "policy_version": (3, 3),
    }
    return Episode(**(fields | changes))


A_RECORD = episode_record(
    an_episode(),
    ["Say", " hé.", "hé", "<eos>"],
    {"reward/total": [0.0, 0.0, 0.25, 1 / 3], "value": [0, 0, 0.1, 0.2]},
    step=1,
)


def evaluate(log: RunLog, step: int) -> None:
    rows = [
        {"id": "a", "prompt": "p", "answer": "x", "output": "y", "metrics": {"rouge_l": 0.1 * step, "words": 3}},
        {"id": "b", "prompt": "q", "answer": "x", "output": "z", "metrics": {"rouge_l": 0.3, "words": 5}},
    ]
    summary = {"main": "rouge_l", "metrics": {"rouge_l": 0.2}, "intervals": {"rouge_l": [0.1, 0.3]}}
    log.evaluation(step, "validation", summary, rows)


def test_everything_written_is_read_back(tmp_path):
    log = new_run(tmp_path / "run")
    evaluate(log, 0)
    log.step(1, {"reward/total": 0.5, "tokens/generated": 12})
    log.episodes(1, [A_RECORD])
    log.step(2, {"reward/total": 0.75, "kl/reference": 0.01})
    evaluate(log, 2)
    log.finish("finished", "all 2 steps are done")

    reader = RunReader(tmp_path / "run")
    run, metrics = reader.run(), reader.metrics()
    assert (run["status"], run["reason"], run["seed"]) == ("finished", "all 2 steps are done", 7)
    assert run["format_version"] == 1
    assert run["about"]["model"] == "tiny"
    assert set(run["versions"]) == {"python", "pertoken", "torch", "transformers"}
    assert reader.config_text() == "seed: 7\n"
    assert metrics["step"] == [1, 2]
    assert metrics["reward/total"] == [0.5, 0.75]
    assert metrics["kl/reference"] == [None, 0.01]
    assert metrics["tokens/generated"] == [12, None]
    assert metrics["time"] == sorted(metrics["time"])
    assert reader.episode_steps() == [1]
    assert reader.episodes(1) == [A_RECORD]
    assert [row["step"] for row in reader.evaluations()] == [0, 2]
    assert reader.evaluations()[1]["items"] == {"id": ["a", "b"], "rouge_l": [0.2, 0.3], "words": [3, 5]}
    assert [row["output"] for row in reader.evaluation_items(2, "validation")] == ["y", "z"]


def test_what_items_make_of_a_metric_of_all_of_them_stands_with_their_own_metrics(tmp_path):
    log = new_run(tmp_path / "run")
    summary = {"metrics": {"distinct_2": 0.5}, "shares": {"distinct_2": [0.4, 0.6]}}
    rows = [{"id": k, "prompt": "", "answer": "", "output": "", "metrics": {"words": 1}} for k in "ab"]
    log.evaluation(0, "validation", summary, rows)
    (row,) = RunReader(tmp_path / "run").evaluations()
    assert row["items"] == {"id": ["a", "b"], "words": [1, 1], "distinct_2": [0.4, 0.6]}
    assert "shares" not in row


def test_an_episode_record_aligns_every_stream_with_the_tokens():
    assert A_RECORD["prompt"] == "user: Say hé."
    assert A_RECORD["completion"] == "hé<eos>"
    assert A_RECORD["tokens"] == {"id": [5, 6, 7, 8], "piece": ["Say", " hé.", "hé", "<eos>"], "action": [0, 0, 1, 1]}
    assert A_RECORD["streams"]["reward/total"] == [0, 0, 0.25, 0.333333]
    with pytest.raises(ValueError, match="value has 3 entries for 4 tokens"):
        episode_record(an_episode(), ["a"] * 4, {"value": [0.0] * 3}, step=1)


def test_an_empty_completion_has_a_record():
    episode = an_episode(action_mask=[False] * 4, spans=[Span(0, 4, "prompt", 0)], stop="context")
    assert episode_record(episode, ["a"] * 4, {}, step=1)["completion"] == ""


def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = new_run(tmp_path / "run")
    log.step(1, {"loss/policy": math.nan, "grad/norm": math.inf, "reward/total": 1.0})
    line = (tmp_path / "run" / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (row["loss/policy"], row["grad/norm"], row["reward/total"]) == (None, None, 1.0)


def test_half_a_surrogate_pair_does_not_stop_the_log(tmp_path):
    log = new_run(tmp_path / "run")
    log.episodes(1, [A_RECORD | {"completion": "\ud83d"}])
    assert RunReader(tmp_path / "run").episodes(1)[0]["completion"] == "?"


def test_a_folder_in_use_is_refused_and_the_message_says_what_to_do(tmp_path):
    new_run(tmp_path / "run")
    with pytest.raises(RunFolderError, match="already holds a run: resume it"):
        new_run(tmp_path / "run")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(RunFolderError, match="choose a new or an empty folder"):
        new_run(tmp_path / "photos")
    with pytest.raises(RunFolderError, match="is not a run folder"):
        RunLog.open(tmp_path / "photos", step=0)
    with pytest.raises(RunFolderError, match="is not a run folder"):
        RunReader(tmp_path / "nowhere")


def test_a_step_or_an_evaluation_is_logged_once(tmp_path):
    log = new_run(tmp_path / "run")
    log.step(1, {"x": 1.0})
    evaluate(log, 1)
    with pytest.raises(ValueError, match="logged once"):
        log.step(1, {"x": 1.0})
    with pytest.raises(ValueError, match="logged once"):
        evaluate(log, 1)
    with pytest.raises(ValueError, match="split name"):
        log.evaluation(1, "../test", {"metrics": {}}, [])


def test_a_line_torn_at_any_byte_is_cut_off_on_resume_and_invisible_to_readers(tmp_path):
    log = new_run(tmp_path / "run")
    for step in (1, 2):
        log.step(step, {"reward/total": 0.5, "grad/norm": 1.5})
    log.close()
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    second_row = whole.index(b"\n") + 1
    for size in range(second_row, len(whole)):
        path.write_bytes(whole[:size])
        complete = size == len(whole) - 1  # only the newline is missing: the row is all there
        assert RunReader(tmp_path / "run").metrics()["step"] == ([1, 2] if complete else [1])
        resumed = RunLog.open(tmp_path / "run", step=2)
        resumed.close()
        torn = size > second_row and not complete
        assert resumed.notes == (("metrics.jsonl: the last line was torn and has been cut off",) if torn else ())
        assert path.read_bytes() == (whole if complete else whole[:second_row])


def test_a_damaged_line_in_the_middle_is_named_not_skipped(tmp_path):
    new_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'{"step": 1, "time": 0}\n\x00\x00\n{"step": 3, "time": 1}\n')
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl line 2 is not a JSON object"):
        RunReader(tmp_path / "run").metrics()


def test_resume_drops_what_lies_beyond_the_step_and_goes_on(tmp_path):
    log = new_run(tmp_path / "run")
    evaluate(log, 0)
    for step in range(1, 6):
        log.step(step, {"reward/total": float(step)})
        log.episodes(step, [A_RECORD])
    evaluate(log, 4)
    log.finish("interrupted", "Ctrl-C")
    log.close()

    resumed = RunLog.open(tmp_path / "run", step=3, config_text="seed: 7\nsteps: 9\n")
    assert "dropped 2 rows of steps 4 to 5" in resumed.notes[0]
    assert resumed.has_evaluation(0, "validation")
    assert not resumed.has_evaluation(4, "validation")
    resumed.step(4, {"reward/total": 40.0})
    evaluate(resumed, 4)

    reader = RunReader(tmp_path / "run")
    assert reader.metrics()["reward/total"] == [1.0, 2.0, 3.0, 40.0]
    assert reader.metrics()["time"] == sorted(reader.metrics()["time"])
    assert reader.episode_steps() == [1, 2, 3]
    assert [row["step"] for row in reader.evaluations()] == [0, 4]
    assert reader.config_text() == "seed: 7\nsteps: 9\n"
    run = reader.run()
    assert (run["status"], run["finished"], run["resumed"][0]["step"]) == ("running", None, 3)


def test_a_full_disk_is_one_sentence_and_harms_no_earlier_row(tmp_path, monkeypatch):
    log = new_run(tmp_path / "run")
    log.step(1, {"reward/total": 0.5})
    log.episodes(1, [A_RECORD])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(RunFolderError, match=r"metrics of step 2 to .*metrics\.jsonl: no space left .* free some"):
            log.step(2, {"reward/total": 0.6})
        with pytest.raises(RunFolderError, match="the episodes of step 1"):
            log.episodes(1, [A_RECORD, A_RECORD])
        with pytest.raises(RunFolderError, match=r"run\.json"):
            log.finish("finished")
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    log.step(2, {"reward/total": 0.6})  # space was made
    assert RunReader(tmp_path / "run").metrics()["step"] == [1, 2]


def test_half_a_line_on_an_almost_full_disk_is_taken_back(tmp_path):
    """A limit on the file size makes the kernel take ten bytes of the row and refuse the rest, as a full disk does."""
    log = new_run(tmp_path / "run")
    log.step(1, {"reward/total": 0.5})
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(RunFolderError, match="cannot write the metrics of step 2"):
            log.step(2, {"reward/total": 0.6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="a part of this path is a file"):
        new_run(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_folder_is_one_sentence(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(RunFolderError, match="a run folder that you may write to"):
        new_run(tmp_path / "locked" / "run")


def test_a_read_only_disk_is_one_sentence(tmp_path, monkeypatch):
    log = new_run(tmp_path / "run")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(RunFolderError, match="read-only file system; choose a run folder on a disk"):
        log.step(1, {"x": 1.0})


def test_a_newer_format_is_refused(tmp_path):
    new_run(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(RunFolderError, match="upgrade pertoken"):
        RunReader(tmp_path / "run")
    path.write_text("{")
    with pytest.raises(RunFolderError, match="damaged"):
        RunReader(tmp_path / "run")


ODD_ROWS = {
    ("metrics.jsonl", '{"step": "one"}'): r"line 2: step: Input should be a valid number",
    ("metrics.jsonl", '{"loss": 1.0}'): r"line 2: step: expected a number, got None",
    ("metrics.jsonl", '{"step": 2, "loss": [1]}'): r"line 2: loss: Input should be a valid number",
    ("metrics.jsonl", '{"step": 2, "loss": 1e999}'): r"line 2: loss: Input should be a finite number",
    ("evaluations.jsonl", '{"step": 0}'): r"line 1: split: Field required",
    ("evaluations.jsonl", '{"step": 0, "split": "../x", "metrics": {}, "items": {"id": []}}'): "line 1: split: String",
    ("evaluations.jsonl", '{"step": 0, "split": "x", "metrics": {}, "items": {"a": [1]}}'): "line 1: items: expected",
    ("evaluations.jsonl", '{"step": -1, "split": "x", "metrics": {}, "items": {"id": []}}'): "line 1: step: Input",
    ("episodes/000001.jsonl", '{"item": "a"}'): r"line 1: .*Field required",
    (
        "episodes/000001.jsonl",
        '{"item": 1, "completion": "", "stop": "eos", "streams": {}, "tokens": {"id": [1], "piece": [], "action": []}}',
    ): "line 1: columns and streams of other lengths than its 1 tokens",
    (
        "episodes/000001.jsonl",
        '{"item": 1, "completion": "", "stop": "eos", "streams": {}, "tokens": {"id": [1], "piece": ["a"], "action": '
        '[1]}, "alternatives": {"rank": [1], "id": [[1], [2]], "logprob": [[-1.0]], "piece": {}}}',
    ): "line 1: columns and streams of other lengths than its 1 tokens",
    (
        "episodes/000001.jsonl",
        '{"item": 1, "completion": "", "stop": "eos", "streams": {}, "tokens": {"id": [1], "piece": ["a"], "action": '
        '[1]}, "alternatives": {"rank": [1], "id": [[1, 2]], "logprob": [[-1.0]], "piece": {}}}',
    ): "line 1: alternatives: not as many log-probs as tokens",
    (
        "episodes/000001.jsonl",
        '{"item": 1, "completion": "", "stop": "eos", "streams": {}, "tokens": {"id": [1], "piece": ["a"], "action": '
        '[1]}, "alternatives": {"rank": [1]}}',
    ): "line 1: alternatives.id: Field required",
    ("run.json", '{"format_version": 1, "status": 3}'): "status: Input should be a valid string",
}


@pytest.mark.parametrize(("name", "line"), ODD_ROWS)
def test_rows_that_no_run_writes_are_named_with_their_line(tmp_path, name, line):
    """A run folder may be anybody's; the words are the same for report, list, export and resume."""
    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        log.step(1, {"loss": 1.0})
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    with path.open("w" if name == "run.json" else "a") as file:
        file.write(line + "\n")

    def read():
        reader = RunReader(tmp_path / "run")
        return reader.metrics(), reader.evaluations(), reader.episodes(1)

    with pytest.raises(RunFolderError, match=ODD_ROWS[name, line]) as caught:
        read()
    assert str(path) in str(caught.value)
    assert "no run writes that" in str(caught.value)
