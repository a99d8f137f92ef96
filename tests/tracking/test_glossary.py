"""The glossary knows every logged name, and the page in docs/ is made from it."""

import json
from pathlib import Path

from pertoken.tracking import RunReader
from pertoken.tracking.glossary import HELD_OUT, METRICS, STREAMS, find, glossary_markdown, label

DOCS = Path(__file__).parents[2] / "docs"


def test_the_documented_glossary_is_the_one_in_code():
    assert (DOCS / "metrics.md").read_text() == glossary_markdown()


def test_every_name_of_a_run_is_known(run_folder):
    reader = RunReader(run_folder)
    logged = set(reader.metrics()) - {"step", "time"}
    assert {name for name in logged if find(name, METRICS) is None} == set()
    assert {name for name in reader.episodes(1)[0]["streams"] if find(name, STREAMS) is None} == set()
    assert {name for name in reader.evaluations()[0]["metrics"] if find(name, HELD_OUT) is None} == set()


def test_families_and_labels():
    assert find("distinct_2", HELD_OUT) is HELD_OUT["distinct_<n>"]
    assert label("distinct_2", HELD_OUT) == "distinct-2"
    assert find("reward/", METRICS) is None
    assert find("made/up", METRICS) is None


def test_every_field_of_the_run_folder_is_documented(run_folder):
    text = (DOCS / "run-folder.md").read_text()
    reader = RunReader(run_folder)
    evaluation = reader.evaluations()[-1]
    fields = {*json.loads((run_folder / "run.json").read_text()), *reader.run()["about"], *reader.episodes(1)[0]}
    fields |= {*reader.episodes(1)[0]["tokens"], *evaluation, *reader.evaluation_items(0, "validation")[0]}
    assert {name for name in fields if f"`{name}`" not in text} == set()
