"""Which samples are shown, and the scale of their colours."""

import pytest

from pertoken.tracking import RunLog, RunReader, samples
from pertoken.tracking.comparison import compare
from pertoken.tracking.samples import scenes, stream_scales


def a_record(name: str, rewards: list[float]) -> dict:
    tokens = {"id": [0, 1, 2], "piece": ["ask ", "an", "swer"], "action": [0, 1, 1]}
    streams = {"reward/total": [0, *rewards]}
    text = {"prompt": "ask", "answer": "answer", "completion": "answer"}
    return {"id": name, "item": name, "stop": "eos", "tokens": tokens, "streams": streams, **text}


@pytest.fixture
def log(tmp_path) -> RunLog:
    return RunLog.create(tmp_path / "run", config_text="", seed=0)


def evaluate(log: RunLog, step: int, scores: dict[str, float]) -> None:
    text = {"prompt": "p", "answer": "x", "output": "y"}
    rows = [{"id": item, "metrics": {"rouge_l": score}, **text} for item, score in scores.items()]
    log.evaluation(step, "test", {"main": "rouge_l", "metrics": {"rouge_l": 0.5}}, rows)


def test_best_median_and_worst_of_the_first_middle_and_last_step(log):
    for step in (1, 20, 30, 40, 50):
        log.episodes(step, [a_record(f"e{i}", [0.0, float(i)]) for i in (3, 0, 4, 1, 2)])
    shown = scenes(RunReader(log.folder), None)
    assert [scene["title"].split(":")[0] for scene in shown] == ["step 1", "step 30", "step 50"]
    assert [(p["title"], p["facts"][1]) for p in shown[0]["panels"]] == [
        ("Best", "item e4"),
        ("Median", "item e2"),
        ("Worst", "item e0"),
    ]


def test_a_single_episode_is_shown_once(log):
    log.episodes(1, [a_record("only", [0.0, 1.0])])
    assert [panel["title"] for panel in scenes(RunReader(log.folder), None)[0]["panels"]] == ["Best"]


def test_held_out_pairs_are_the_typical_the_gains_and_the_losses_each_once(log):
    evaluate(log, 0, {f"i{i:02}": 0.5 for i in range(20)})
    evaluate(log, 9, {f"i{i:02}": 0.5 + (i - 10) / 100 for i in range(20)})
    reader = RunReader(log.folder)
    shown = scenes(reader, compare(reader.evaluations()))
    assert [scene["title"][:3] for scene in shown[:4]] == ["i08", "i09", "i10", "i11"]
    assert [scene["title"] for scene in shown[4:6]] == ["i19 (ROUGE-L +0.090)", "i18 (ROUGE-L +0.080)"]
    assert [scene["title"][:3] for scene in shown[8:]] == ["i00", "i01", "i02", "i03"]
    assert [panel["title"] for panel in shown[0]["panels"]] == ["Before (step 0)", "After (step 9)"]


def test_samples_beyond_the_room_are_left_out(log, monkeypatch):
    for step in (1, 2, 3):
        log.episodes(step, [a_record("e", [0.0, 1.0])])
    monkeypatch.setattr(samples, "MAX_BYTES", 700)
    assert len(scenes(RunReader(log.folder), None)) == 2


def test_the_scale_ignores_single_outliers_and_tokens_that_were_not_chosen():
    streams = {
        "advantage": [99.0, *[0.5] * 98, -70.0],
        "ratio": [0.0, *[1.2] * 99],
        "reward/none": [0.0] * 100,
        "plugin": [0.0, *[-0.25] * 99],
    }
    panel = {"tokens": {"action": [0] + [1] * 99}, "streams": streams}
    scales = {scale["name"]: scale for scale in stream_scales([{"panels": [panel]}])}
    assert {name: (scale["kind"], scale["bound"]) for name, scale in scales.items()} == {
        "advantage": ("signed", 0.5),
        "ratio": ("around_one", 0.2),
        "plugin": ("signed", 0.25),
    }
