"""Alarms: each sign trips the one that is named for it, noise trips none, and a planted hack is found by a real run."""

import importlib.util
import json
import math
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.jobs import run
from pertoken.rewards import Scene
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode
from pertoken.tracking import RunReader
from pertoken.tracking.runlog import read_run
from pertoken.training.guards import NAMES, Guards, trend, writing_figures

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SPEC = importlib.util.spec_from_file_location("hacks", BENCHMARKS / "hacks.py")
hacks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hacks)

QUIET = {
    "completion/length": 40.0,
    "completion/terminated_share": 0.9,
    "completion/repetition": 0.05,
    "completion/empty_share": 0.0,
    "entropy": 2.0,
    "reward/total": 1.0,
    "reward/rouge_l": 0.5,
    "reward/harper": -0.5,
    "reward/kl": -0.1,
}


def heard(rows, window=10):
    """The alarms of a run with these figures: (step, name), in the order in which they began."""
    guards = Guards(window)
    return [(step, alarm.name) for step, row in enumerate(rows, 1) for alarm in guards.look(QUIET | row)]


def after_three(name, *values):
    return [{}] * 3 + [{name: value} for value in values]


@pytest.mark.parametrize(
    ("name", "value", "alarm"),
    [
        ("completion/length", 61.0, "length_drift"),
        ("completion/length", 26.0, "length_drift"),
        ("completion/empty_share", 0.26, "empty"),
        ("completion/terminated_share", 0.59, "endless"),
        ("completion/repetition", 0.31, "repetition"),
        ("entropy", 0.39, "entropy_collapse"),
    ],
)
def test_a_sign_counts_when_three_steps_have_it(name, value, alarm):
    assert heard(after_three(name, value, value, value, value)) == [(6, alarm)]
    assert heard(after_three(name, value, value, QUIET[name], value, value)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("completion/length", 59.0),
        ("completion/length", 27.0),
        ("completion/empty_share", 0.24),
        ("completion/terminated_share", 0.61),
        ("completion/repetition", 0.29),
        ("entropy", 0.41),
    ],
)
def test_less_than_that_is_none(name, value):
    assert heard(after_three(name, *[value] * 9)) == []


def test_an_alarm_that_lasts_is_told_once_and_again_when_it_comes_back():
    rows = after_three("completion/empty_share", *[0.5] * 5, 0.0, *[0.5] * 4)
    assert heard(rows) == [(6, "empty"), (12, "empty")]


def slopes(rise, fall, noise=0.01, steps=14):
    drawn = random.Random(0)
    return [
        {"reward/rouge_l": rise * k + drawn.gauss(0, noise), "reward/harper": fall * k + drawn.gauss(0, noise)}
        for k in range(steps)
    ]


def test_one_part_that_rises_while_another_falls_is_told_by_name():
    guards = Guards(10)
    (alarm,) = [alarm for row in slopes(0.02, -0.02) for alarm in guards.look(QUIET | row)]
    assert alarm.name == "part_trade"
    assert "rouge_l rose while harper fell" in alarm.sentence
    assert heard(slopes(0.02, 0.02)) == []
    assert heard(slopes(0.02, -0.02, noise=0.3)) == []


def test_a_trend_is_that_of_the_part_and_not_of_its_weight_or_normaliser():
    weights = [{"reward/harper": -0.5 * k, "weight/harper": float(k), "raw/harper": -0.5} for k in range(1, 15)]
    rising = [row | weight for row, weight in zip(slopes(0.02, 0), weights, strict=True)]
    assert heard(rising) == []
    # a cost by its weight: what is counted rises, so the part falls
    costs = [{"reward/harper": 0.0, "weight/harper": -1.0, "raw/harper": 0.02 * k} for k in range(14)]
    assert [name for _, name in heard([r | c for r, c in zip(slopes(0.02, 0), costs, strict=True)])] == ["part_trade"]


def test_a_penalty_for_leaving_the_reference_is_no_part_that_is_given_up():
    assert heard([{"reward/kl": -0.02 * k, "reward/rouge_l": 0.02 * k} for k in range(14)]) == []


def test_a_trend_is_a_slope_over_its_error():
    # 1, 2, 2, 3: slope 0.6, residuals -0.1, 0.3, -0.3, 0.1, error sqrt(0.2 / 2 / 5)
    assert trend([1.0, 2.0, 2.0, 3.0]) == pytest.approx(0.6 / math.sqrt(0.2 / 2 / 5))
    assert trend([0.1 + 0.2, 0.3, 0.3]) == 0


def test_noise_trips_nothing():
    """200 runs of 100 steps, with the spread that batches of a few dozen completions have."""
    drawn = random.Random(7)
    for _ in range(200):
        rows = [
            {
                "completion/length": 40 + drawn.gauss(0, 4),
                "completion/terminated_share": 0.8 + drawn.gauss(0, 0.05),
                "completion/repetition": 0.1 + drawn.gauss(0, 0.03),
                "completion/empty_share": abs(drawn.gauss(0, 0.05)),
                "entropy": 2 + drawn.gauss(0, 0.1),
                "reward/rouge_l": drawn.gauss(0, 1),
                "reward/harper": drawn.gauss(0, 1),
            }
            for _ in range(100)
        ]
        assert heard(rows) == []


def test_what_is_remembered_goes_through_a_checkpoint():
    rows = [QUIET | row for row in after_three("completion/length", *[70.0] * 9)]
    for cut in range(len(rows)):
        whole, before, after = Guards(10), Guards(10), Guards(10)
        for row in rows[:cut]:
            whole.look(row), before.look(row)
        after.load_state_dict(before.state_dict())
        for row in rows[cut:]:
            assert after.look(row) == whole.look(row)
            assert after.figures() == whole.figures()


def test_repeated_and_empty_completions_are_counted():
    tokenizer = byte_tokenizer()
    texts = ["abcabc", "abcdef", "  ", ""]
    episodes = [episode([65], [*tokenizer.encode(text), 256], id=str(k)) for k, text in enumerate(texts)]
    scene = Scene(to_batch(episodes, Controls()), episodes, tokenizer)
    # "abcabc<eos>" has 5 runs of three tokens, and one of them twice
    figures = {"completion/repetition": (1 / 5) / 4, "completion/empty_share": 2 / 4}
    assert writing_figures(scene) == pytest.approx(figures)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("hacks")
    hacks.prepare(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(run, "_write_report", lambda folder, on_note: None)
        yield place


@pytest.mark.parametrize("name", [name for name in hacks.RUNS if name != "says nothing"])
def test_a_planted_hack_trips_its_alarm_within_20_steps_and_an_honest_run_none(place, name):
    """The test after this one has the other."""
    expected, notes = hacks.RUNS[name][1], []
    config = hacks.configuration(place, name, steps=hacks.WITHIN)
    run.train(config, on_note=notes.append)
    found = hacks.alarms(config.run_folder)
    assert expected in found if expected else not found
    for alarm, step in found.items():
        assert any(note.startswith(f"step {step}: alarm {alarm}: ") for note in notes)
    columns = RunReader(config.run_folder).metrics()
    assert {f"alarm/{known}" for known in NAMES} <= set(columns)


def test_a_run_that_asked_for_it_ends_at_the_first_alarm(place):
    config = hacks.configuration(place, "says nothing", steps=hacks.WITHIN, seed=5)
    config = config.model_copy(update={"guards": config.guards.model_copy(update={"stop": True})})
    result = run.train(config)
    steps = len(RunReader(config.run_folder).metrics()["alarm/empty"])
    assert steps < hacks.WITHIN
    assert result.reason.startswith("alarm ")
    assert result.reason.endswith(f" in step {steps} (guards.stop)")
    assert read_run(config.run_folder)["status"] == "finished"


# --- the gauge of over-optimisation ------------------------------------------------------------------------


def paid_and_meant(steps, *, peak, noise=0.02, fall=0.02, seed=0):
    """A reward that rises with the KL all along, and a metric beside it that falls after step `peak`."""
    drawn = random.Random(seed)
    return [
        {
            "kl/sequence": 0.1 * k,
            "reward/rouge_l": 0.02 * k + drawn.gauss(0, noise),
            "reward/harper": 0.0,
            "beside/chrf": 0.02 * min(k, peak) - fall * max(k - peak, 0) + drawn.gauss(0, noise),
        }
        for k in range(steps)
    ]


def test_a_metric_beside_the_reward_that_falls_while_it_rises_is_over_optimised():
    guards = Guards(10)
    rows = paid_and_meant(60, peak=25)
    told = [(step, alarm) for step, row in enumerate(rows, 1) for alarm in guards.look(QUIET | row)]
    ((step, alarm),) = told
    assert alarm.name == "over_optimised"
    assert 30 <= step <= 45
    assert "chrf, which is not in it, fell from" in alarm.sentence
    assert "nats from the reference" in alarm.sentence


def test_no_over_optimisation_without_all_of_its_signs():
    rows = paid_and_meant(60, peak=25)
    assert heard(paid_and_meant(60, peak=60)) == []  # both rise
    assert heard(paid_and_meant(60, peak=25, noise=0.5)) == []  # within the noise
    assert heard([row | {"reward/rouge_l": 0.5} for row in rows]) == []  # all of it fell
    assert heard([row | {"kl/sequence": 10 - row["kl/sequence"]} for row in rows]) == []  # on the way back
    unmeasured = [{k: v for k, v in row.items() if not k.startswith("beside/")} for row in rows]
    assert heard(unmeasured) == []
    # A KL penalty falls as the KL rises: it is no part of what is paid for.
    assert heard([row | {"reward/kl": -10 * row["kl/sequence"]} for row in rows]) != []


def test_noise_beside_a_rising_reward_is_no_over_optimisation():
    for seed in range(30):
        assert heard(paid_and_meant(100, peak=0, fall=0.0, seed=seed)) == []


def test_the_gauge_goes_on_after_a_checkpoint():
    rows = [QUIET | row for row in paid_and_meant(50, peak=20)]
    whole = Guards(10)
    told = [whole.look(row) for row in rows]
    for cut in (5, 19, 33):
        before, after = Guards(10), Guards(10)
        for row in rows[:cut]:
            before.look(row)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert [after.look(row) for row in rows[cut:]] == told[cut:]


def test_what_is_measured_beside_the_reward_is_logged_and_not_paid(place):
    config = hacks.configuration(place, "says nothing", steps=2, seed=7)
    guards = {"beside": [{"name": "length", "max_words": 0}, {"fn": "hacks:thorough", "name": "tokens", "weight": 10}]}
    config = RunConfig.model_validate(config.model_dump() | {"guards": guards})
    run.train(config)
    columns = RunReader(config.run_folder).metrics()
    assert columns["beside/tokens"] == pytest.approx(columns["completion/length"], rel=1e-4)
    assert all(value <= 0 for value in columns["beside/length"])
    assert columns["reward/total"] == pytest.approx(
        [a + b for a, b in zip(columns["reward/brief"], columns["reward/repetition"], strict=True)], abs=1e-4
    )


def test_a_metric_cannot_be_paid_and_stand_beside(place):
    config = hacks.configuration(place, "says nothing", steps=2)
    with pytest.raises(ValidationError, match=r"guards\.beside: repetition is in the reward already"):
        RunConfig.model_validate(config.model_dump() | {"guards": {"beside": [{"name": "repetition"}]}})
