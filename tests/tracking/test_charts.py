"""Curves: everything logged is drawn once, long runs stay small, means are means."""

import json
import math

import pytest

from pertoken.tracking.charts import _is_noisy, _means, _moving_mean, training_charts


def traces(charts: dict) -> list[dict]:
    return [trace for group in charts.values() for chart in group for trace in json.loads(chart.figure)["data"]]


def test_every_logged_metric_is_drawn_once_and_unknown_ones_come_last():
    metrics = {
        "step": [1, 2],
        "time": [0.5, 1.0],
        "plugin/score": [1, 2],
        "reward/total": [0.1, 0.2],
        "entropy": [2, 1],
    }
    charts = training_charts(metrics)
    assert list(charts) == ["Reward", "How far the policy has moved", "Other"]
    assert [trace["y"] for trace in traces(charts)] == [[0.1, 0.2], [2, 1], [1, 2]]


def test_a_metric_that_was_never_finite_is_not_drawn():
    assert training_charts({"step": [1], "time": [0.1], "loss/policy": [None]}) == {}


@pytest.mark.parametrize(("height", "axis"), [(0.0, [0, 1]), (0.3, [0, 0.6]), (-2, [-4, 0])])
def test_a_flat_line_has_an_axis_from_zero(height, axis):
    flat = {"step": [1, 2], "time": [1, 2], "entropy": [height, height]}
    ((chart,),) = training_charts(flat).values()
    assert json.loads(chart.figure)["layout"]["yaxis"]["range"] == axis
    ((moving,),) = training_charts(flat | {"entropy": [height, height + 1]}).values()
    assert "range" not in json.loads(moving.figure)["layout"]["yaxis"]


def test_a_legend_has_names_that_people_read():
    ((chart,),) = training_charts(
        {"step": [1], "time": [1], "clip/share": [0.1], "importance/clipped_share": [0.2]}
    ).values()
    assert [trace["name"] for trace in json.loads(chart.figure)["data"]] == ["clipped ratio", "importance weight cut"]


def test_a_long_run_is_drawn_as_means_of_several_steps():
    steps = list(range(1, 5001))
    drawn = traces(training_charts({"step": steps, "time": steps, "reward/total": steps}))
    assert drawn[0]["x"][:2] == [3.0, 8.0]  # the means of 1..5 and 6..10
    assert len(drawn[0]["x"]) == 1000


def test_means_leave_out_what_is_missing():
    assert _means([1, None, 3, 5, None], 2) == [1.0, 4.0, None]


def test_a_noisy_curve_gets_a_mean_and_a_schedule_does_not():
    noisy = [float(step % 2) for step in range(80)]
    schedule = [math.cos(math.pi * step / 80) for step in range(80)]
    assert _is_noisy(noisy)
    assert not _is_noisy(schedule)
    assert _moving_mean(noisy)[40] == 0.4  # steps 38 to 42: 0 1 0 1 0
    drawn = traces(training_charts({"step": list(range(80)), "entropy": noisy, "learning_rate": schedule}))
    assert [len(trace["y"]) for trace in drawn] == [80, 80, 80]
    assert [trace.get("opacity") for trace in drawn] == [0.3, None, None]


def test_what_is_beside_the_reward_is_drawn_over_the_root_of_the_kl():
    metrics = {
        "step": [1, 2, 3],
        "reward/total": [1.0, 2.0, 4.0],
        "kl/sequence": [0.0, 1.0, 4.0],
        "beside/chrf": [3.0, 5.0, 1.0],
    }
    (group,) = [charts for name, charts in training_charts(metrics).items() if name == "Reward"]
    gauge = group[-1]
    assert "√KL" in gauge.title
    reward, chrf = json.loads(gauge.figure)["data"]
    # each place is the mean of itself and its neighbours: KL 0.5, 5 / 3, 2.5
    assert reward["x"] == chrf["x"] == pytest.approx([0.5**0.5, (5 / 3) ** 0.5, 2.5**0.5], abs=1e-4)
    assert (reward["name"], chrf["name"]) == ("reward", "chrf")
    assert reward["y"] == pytest.approx([0.0, (7 / 3 - 1.5) / 1.5, 1.0], abs=1e-3)
    assert chrf["y"][0] == 1.0
    assert min(chrf["y"]) == 0.0
    alone = {name: column for name, column in metrics.items() if name != "beside/chrf"}
    assert all("√KL" not in chart.title for charts in training_charts(alone).values() for chart in charts)
