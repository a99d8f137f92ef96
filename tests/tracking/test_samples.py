"""Which samples are shown, how they are sorted and compared, and the scale of their colours."""

import json

import pytest

from pertoken.tracking import RunLog, RunReader, samples
from pertoken.tracking.comparison import compare
from pertoken.tracking.index import figures
from pertoken.tracking.samples import browse, stream_scales


def a_record(name: str, rewards: list[float], group: int = 0, **streams) -> dict:
    tokens = {"id": [0, 1, 2], "piece": ["ask ", "an", "swer"], "action": [0, 1, 1]}
    columns = {"reward/total": [0, *rewards]} | {stream.replace("__", "/"): [0, *v] for stream, v in streams.items()}
    text = {"prompt": "ask", "answer": "answer", "completion": "answer"}
    return {"id": name, "item": name, "group": group, "stop": "eos", "tokens": tokens, "streams": columns, **text}


@pytest.fixture
def log(tmp_path) -> RunLog:
    return RunLog.create(tmp_path / "run", config_text="", seed=0)


def evaluate(log: RunLog, step: int, scores: dict[str, float], ids: list[int] | None = None) -> None:
    text = {"prompt": "p", "answer": "x", "output": "y"}
    if ids is not None:
        columns = {"id": ids, "piece": [chr(96 + k) for k in ids], "action": [1] * len(ids)}
        text |= {"tokens": columns, "streams": {"logprob": [-float(step + k) for k in ids]}}
    rows = [{"id": item, "metrics": {"rouge_l": score}, **text} for item, score in scores.items()]
    log.evaluation(step, "test", {"main": "rouge_l", "metrics": {"rouge_l": 0.5}}, rows)


def page_data(log: RunLog) -> dict:
    reader = RunReader(log.folder)
    return browse(reader, compare(reader.evaluations()))


def sorted_by(data: dict, label: str) -> list[str]:
    """What the list shows in an order, as the page sorts it."""
    order = next(order for order in data["orders"] if order["label"] == label)
    columns = data["lists"][order["list"]]
    values = columns[order["column"]]
    rows = sorted(range(len(values)), key=lambda row: values[row], reverse=order["descending"])
    return [columns["title"][row] for row in rows]


def test_the_list_has_every_sample_and_a_scene_is_a_group(log):
    for step in (1, 20):
        log.episodes(step, [a_record(f"e{i}", [0.0, float(i)], group=i // 2) for i in (3, 0, 2, 1, 4)])
    data = page_data(log)
    assert data["lists"]["training"]["id"] == [f"{step}.{line}" for step in (1, 20) for line in range(5)]
    assert data["lists"]["training"]["scene"][:5] == ["1.0", "1.1", "1.0", "1.1", "1.4"]
    assert [panel["id"] for panel in data["scenes"]["20.1"]["panels"]] == ["20.1", "20.3"]
    assert sorted_by(data, "Best reward")[:2] == ["e4", "e4"]
    assert sorted_by(data, "Worst reward")[:2] == ["e0", "e0"]
    assert [order["label"] for order in data["orders"]] == ["Best reward", "Worst reward", "In order of steps"]


def test_items_are_listed_by_their_reward_where_they_have_no_metric_of_their_own(log):
    """`distinct_2` is one of all texts together; what was said before and after is to be read all the same."""
    for step, rewards in ((0, {"a": 0.5, "b": 0.25, "c": 0.0}), (3, {"a": 0.25, "b": 0.5, "c": 1.0})):
        tokens = {"id": [1], "piece": ["y"], "action": [1]}
        text = {"prompt": "p", "answer": "x", "output": "y", "tokens": tokens}
        rows = [
            {"id": item, "metrics": {"words": 1.0}, **text, "streams": {"reward/total": [paid]}}
            for item, paid in rewards.items()
        ]
        log.evaluation(step, "test", {"main": "distinct_2", "metrics": {"distinct_2": 0.5, "words": 1.0}}, rows)
    data = page_data(log)
    assert data["gain_of"] == "reward"
    assert sorted_by(data, "Largest gain") == ["c", "b", "a"]
    assert sorted_by(data, "In the order of the data") == ["a", "b", "c"]
    assert data["lists"]["held_out"]["gain"] == [-0.25, 0.25, 1.0]


def test_nothing_is_most_clipped_where_nothing_was(log):
    log.episodes(1, [a_record("e", [0.0, 1.0], clipped=[0.0, 0.0]) for _ in range(2)])
    assert "Most clipped" not in [order["label"] for order in page_data(log)["orders"]]
    log.episodes(2, [a_record("e", [0.0, 1.0], clipped=[0.0, 1.0])])
    assert "Most clipped" in [order["label"] for order in page_data(log)["orders"]]


def test_figures_of_an_episode_by_hand():
    streams = {"reward__a": [0.5, 0.5], "reward__b": [-0.25, -0.5], "clipped": [1, 0], "kl": [0.1, 0.2]}
    record = a_record("e", [0.25, 0.0], **streams, value=[0.0, 0.5], **{"return": [0.6, 1.3]})
    assert figures(record) == pytest.approx(
        {"reward": 0.25, "tokens": 2, "clipped": 0.5, "kl": 0.3, "disagreement": 0.75, "value_error": 0.5**0.5},
        rel=1e-3,
    )


def test_the_orders_answer_who_is_clipped_wrong_and_torn(log):
    quiet = {"clipped": [0, 0], "value": [1, 1], "return": [1, 1], "reward__a": [1, 0], "reward__b": [0, 0]}
    log.episodes(
        1,
        [
            a_record("quiet", [1.0, 0.0], **quiet),
            a_record("clipped", [1.0, 0.0], **quiet | {"clipped": [1, 1]}),
            a_record("unforeseen", [1.0, 0.0], **quiet | {"value": [9, 1]}),
            a_record("torn", [0.0, 0.0], **quiet | {"reward__b": [-1, 0]}),
        ],
    )
    data = page_data(log)
    firsts = ("Most clipped", "Largest value error", "Parts disagree most")
    assert [sorted_by(data, label)[0] for label in firsts] == ["clipped", "unforeseen", "torn"]


def test_held_out_items_are_sorted_by_their_change(log):
    evaluate(log, 0, {f"i{i:02}": 0.5 for i in range(20)})
    evaluate(log, 9, {f"i{i:02}": 0.5 + (i - 10) / 100 for i in range(20)})
    data = page_data(log)
    typical = sorted_by(data, "Typical change")
    assert typical[:2] == ["i09", "i08"]  # the middle of those that changed, which i10 did not
    assert set(typical[-2:]) == {"i10", "i19"}  # it comes last, with the one that is furthest from the middle
    assert len(typical) == 20
    assert sorted_by(data, "Largest gain")[:2] == ["i19", "i18"]
    assert sorted_by(data, "Largest loss")[:2] == ["i00", "i01"]
    scene = data["scenes"][data["lists"]["held_out"]["scene"][19]]
    assert [panel["title"] for panel in scene["panels"]] == ["Before (step 0)", "After (step 9)"]


def test_tokens_of_both_texts_are_aligned(log):
    evaluate(log, 0, {"i": 0.5}, ids=[1, 2, 3, 5])
    evaluate(log, 9, {"i": 0.6}, ids=[1, 4, 3, 5, 6])
    before, after = page_data(log)["scenes"]["test.0"]["panels"]
    assert before["match"] == [0, -1, 2, 3]
    assert after["match"] == [0, -1, 2, 3, -1]


@pytest.mark.parametrize(("distances", "same"), [([0.0, 0.0], True), ([0.0, 0.2], False)])
def test_the_reference_is_the_model_before_if_nothing_lies_between_them(log, distances, same):
    evaluate(log, 0, {"i": 0.5}, ids=[1, 2])
    evaluate(log, 9, {"i": 0.6}, ids=[1, 2])
    path = log.folder / "evaluations" / "000000-test.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"streams": {"kl": distances}}) + "\n")
    assert page_data(log)["reference_is_before"] is same


def test_samples_beyond_the_room_are_listed_without_a_scene(log, monkeypatch):
    log.episodes(1, [a_record(f"e{i}", [0.0, float(i)], group=i) for i in range(5)])
    monkeypatch.setattr(samples, "MAX_BYTES", 100)
    data = page_data(log)
    assert data["lists"]["training"]["scene"] == ["1.0", None, None, None, "1.4"]  # the worst and the best come first
    assert set(data["scenes"]) == {"1.0", "1.4"}


def test_of_a_large_group_the_leaders_are_shown(log):
    log.episodes(1, [a_record(f"e{i}", [0.0, float(i == 19)]) for i in range(20)])
    panels = page_data(log)["scenes"]["1.0"]["panels"]
    assert len(panels) == samples.MAX_PANELS
    assert panels[-1]["id"] == "1.19"


def test_the_scale_ignores_single_outliers_and_tokens_that_were_not_chosen():
    streams = {
        "advantage": [99.0, *[0.5] * 98, -70.0],
        "ratio": [0.0, *[1.2] * 99],
        "reward/none": [0.0] * 100,
        "plugin": [0.0, *[-0.25] * 99],
    }
    panel = {"tokens": {"action": [0] + [1] * 99}, "streams": streams}
    scales = {scale["name"]: scale for scale in stream_scales([{"panels": [panel]}])}
    assert {name: (scale["kind"], scale["bound"]) for name, scale in scales.items() if not scale["flat"]} == {
        "advantage": ("signed", 0.5),
        "ratio": ("around_one", 0.2),
        "plugin": ("signed", 0.25),
    }
    assert scales["reward/none"]["flat"]  # a number to read, and nothing to colour
