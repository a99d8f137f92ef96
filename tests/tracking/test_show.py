"""Single samples by number or name: the right ones, their numbers, and what is said when they are not there."""

import csv

import pytest

from pertoken.errors import ConfigError, MissingExtraError, RunFolderError
from pertoken.tracking import RunLog, RunReader, show
from pertoken.tracking.export import export_curves, export_sample


def test_a_sample_has_the_tokens_and_numbers_of_its_line(run_folder):
    record = RunReader(run_folder).episodes(50)[9]
    start = record["tokens"]["action"].index(1)
    shown = show.sample(run_folder, 50, 9, by="kl")
    assert shown.texts[0].pieces == record["tokens"]["piece"][start:]
    assert shown.texts[0].values == pytest.approx(record["streams"]["kl"][start:], rel=1e-3)
    assert shown.answer == record["answer"]
    assert show.sample(run_folder, 50, 9).texts[0].name == "advantage"


def test_an_item_is_shown_before_and_after(run_folder):
    shown = show.item(run_folder, "math.hypot#96", by="entropy")
    assert [text.title for text in shown.texts] == ["Before (step 0)", "After (step 300)"]
    outputs = ["".join(text.pieces) for text in shown.texts]
    rows = [
        next(row for row in RunReader(run_folder).evaluation_items(step, "validation") if row["id"] == "math.hypot#96")
        for step in (0, 300)
    ]
    assert outputs == [row["output"] for row in rows]
    assert shown._repr_html_().count("line-height:1.8") == 2


def test_a_run_is_its_verdict_and_its_table(run_folder, tmp_path):
    shown = show.run(run_folder)
    assert shown.judgement == "better"
    assert "ROUGE-L went from" in shown._repr_html_()
    assert "<table>" in shown._repr_html_()
    RunLog.create(tmp_path / "run", config_text="", seed=0, about={"model": "<script>", "task": "x"})
    assert "<script" not in show.run(tmp_path / "run")._repr_html_()


def test_findings_stand_with_their_text(run_folder):
    record = RunReader(run_folder).episodes(50)[12]  # of the group that says everything twice
    finding = record["findings"][0]
    shown = show.sample(run_folder, 50, 12)
    assert len(shown.findings[0]) == len(record["findings"])
    text = record["tokens"]["piece"][finding["start"]]
    assert shown.findings[0][0] == f"repetition -0.02 for {text!r}: said before: {text!r}"
    assert "said before: &#x27;script&#x27;" in shown._repr_html_()


def test_the_difference_is_after_minus_before_where_both_have_the_token():
    def panel(title, ids, values):
        tokens = {"id": ids, "piece": [str(i) for i in ids], "action": [1] * len(ids)}
        return {"title": title, "tokens": tokens, "streams": {"logprob": values}}

    before = panel("Before", [1, 2, 3], [-1.0, -2.0, -3.0]) | {"match": [0, -1, 2]}
    after = panel("After", [1, 9, 3, 4], [-0.5, -9.0, -5.0, -1.0]) | {"match": [0, -1, 2, -1]}
    texts = show.differences([before, after], "logprob")
    assert texts[0].values == [0.5, None, -2.0]
    assert texts[1].values == [0.5, None, -2.0, None]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda folder: show.sample(folder, 3, 0), "no episodes of step 3; kept were those of steps: 1, 50, 100"),
        (lambda folder: show.sample(folder, 50, 32), "has no sample 32: expected 0 to 31"),
        (lambda folder: show.item(folder, "math.hypo#96"), "did you mean 'math.hypot#96'?"),
        (lambda folder: show.item(folder, "???"), "it has 128, such as"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(run_folder, call, words):
    with pytest.raises(RunFolderError) as caught:
        call(run_folder)
    assert words in str(caught.value)


def test_an_unknown_stream_and_a_run_without_evaluations(run_folder, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'advantage'"):
        show.sample(run_folder, 50, 0, by="advantag")
    RunLog.create(tmp_path / "run", config_text="", seed=0)
    with pytest.raises(RunFolderError, match="expected two evaluations"):
        show.item(tmp_path / "run", "x")


def test_a_sample_is_exported_with_its_data(run_folder, tmp_path):
    shown = show.sample(run_folder, 300, 24, by="logprob")
    paths = export_sample(shown, tmp_path / "paper")
    assert [path.name for path in paths] == [
        f"scripts-chinese-step-300-sample-24-logprob.{suffix}" for suffix in ("html", "svg", "tex", "csv")
    ]
    with open(paths[-1], encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == list(shown.texts[0].pieces)
    assert [float(row["logprob"]) for row in rows] == shown.texts[0].values


def test_curves_are_exported_with_their_data(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plots'")
    log = RunLog.create(tmp_path / "run", config_text="", seed=0)
    for step in (1, 2, 3):
        log.step(step, {"reward/a": 0.5 * step, "reward/b": float("nan") if step == 2 else -1.0})
    for step in (0, 3):
        summary = {"main": "rouge_l", "metrics": {"rouge_l": 0.1 * step}, "intervals": {"rouge_l": [0.0, 0.5]}}
        log.evaluation(step, "test", summary, [{"id": "i", "metrics": {"rouge_l": 0.1 * step}}])
    paths = {path.name: path for path in export_curves(tmp_path / "run", tmp_path / "paper")}
    name = "training-reward-parts-of-the-reward"
    assert {f"{name}.{kind}" for kind in ("svg", "pdf", "png", "csv")} <= set(paths)
    assert paths[f"{name}.png"].read_bytes().startswith(b"\x89PNG")
    assert paths[f"{name}.pdf"].read_bytes().startswith(b"%PDF")
    assert paths[f"{name}.csv"].read_text() == "step,a,b\n1,0.5,-1.0\n2,1.0,\n3,1.5,-1.0\n"
    assert paths["held-out-rouge-l.csv"].read_text().splitlines()[1] == "0,0.0,0.5,0.0"
    before = paths[f"{name}.svg"].read_bytes()
    export_curves(tmp_path / "run", tmp_path / "paper")
    assert paths[f"{name}.svg"].read_bytes() == before


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    log = RunLog.create(tmp_path / "run", config_text="", seed=0)
    log.step(1, {"entropy": 1.0})
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[plots\]'"):
        export_curves(tmp_path / "run", tmp_path / "paper")
