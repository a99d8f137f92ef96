"""Blind sheets: they say nothing of whose an answer is, nothing in them acts, and choices find their way back."""

import json
import re

import pytest

from pertoken.compare.curves import read_curve
from pertoken.compare.sheets import read_choices, write_sheets
from pertoken.errors import TaskError
from pertoken.text_metrics import bootstrap_mean

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> '\"$& ${x}"
ITEMS = ("a", "b", "c", "d")


@pytest.fixture
def sheet(plan_of, made):
    """A comparison of the arms `ours` and `theirs`, which differ on three of four items, and its sheet."""
    plan = plan_of(
        "compare.arms={theirs: {}, ours: {kl: {coefficient: 0}}}", "compare.seeds=1", "compare.terminal=null",
        "evaluation.metric=chrf",
    )  # fmt: skip
    values = {"chrf": [1.0, 2.0, 3.0, 4.0]}
    said = {"a": "the same", "b": "Bravo", "c": HOSTILE, "d": "Delta"}
    made(plan.arms["theirs"].runs[0], [(0, 0, values)], outputs=said)
    made(plan.arms["ours"].runs[0], [(0, 0, values)],
         outputs={item: text if item == "a" else f"better {text}" for item, text in said.items()})  # fmt: skip
    curves = {name: [read_curve(arm.runs[0].run_folder, 0, plan.split)] for name, arm in plan.arms.items()}
    (page,), notes = write_sheets(plan, curves)
    assert notes == ["Sheet of theirs and ours: they differ on 3 of 4 items."]
    return plan, curves, page


def test_a_sheet_is_blind_and_acts_by_its_own_script_alone(sheet):
    plan, curves, page = sheet
    text = page.read_text()
    for name in ("theirs", "ours"):
        assert not re.search(rf"\b{name}\b", text)
    assert text.count("<script") == 2
    assert "<img" not in text
    assert "default-src &#x27;none&#x27;" in text
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert sorted(item["id"] for item in data["items"]) == ["b", "c", "d"], "where both say the same none is better"
    key = json.loads(page.with_suffix(".key.json").read_text())
    for item in data["items"]:
        ours, theirs = (item["left"], item["right"])[:: 1 if key["left"][item["id"]] == "ours" else -1]
        assert ours == f"better {theirs}"
    again = page.read_bytes()
    write_sheets(plan, curves)
    assert page.read_bytes() == again, "choices on it keep their meaning"


def test_sides_are_shuffled_by_the_seed(plan_of, made):
    plan = plan_of("compare.arms={x: {}, y: {kl: {coefficient: 0}}}", "compare.seeds=1", "evaluation.metric=chrf")
    for name in plan.arms:
        made(plan.arms[name].runs[0], [(0, 0, {"chrf": [1.0] * 4})])
    curves = {name: [read_curve(arm.runs[0].run_folder, 0, plan.split)] for name, arm in plan.arms.items()}
    seen = set()
    for seed in range(8):
        other = plan_of("compare.arms={x: {}, y: {kl: {coefficient: 0}}}", "compare.seeds=1",
                        "evaluation.metric=chrf", f"compare.sheets.seed={seed}")  # fmt: skip
        (page,), _ = write_sheets(other, curves)
        seen.add(tuple(sorted(json.loads(page.with_suffix(".key.json").read_text())["left"].items())))
    assert len(seen) > 3


def choose(page, tmp_path, name, wanted):
    """What a person saves who chooses `wanted` (an arm, or same) for each item."""
    key = json.loads(page.with_suffix(".key.json").read_text())
    choices = {
        item: "same" if arm == "same" else "left" if key["left"][item] == arm else "right"
        for item, arm in wanted.items()
    }
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps({"sheet": key["sheet"], "rater": name, "choices": choices}))
    return path


def test_choices_become_a_win_rate(sheet, tmp_path, pertoken):
    plan, _, page = sheet
    one = choose(page, tmp_path, "one", {"b": "ours", "c": "ours", "d": "same"})
    two = choose(page, tmp_path, "two", {"b": "ours", "c": "theirs"})
    (found,) = read_choices(plan.folder, [one, two])
    assert (found.arms, found.wins, found.ties, found.losses) == (("theirs", "ours"), 3, 1, 1)
    assert (found.items, found.raters, found.agreement) == (3, 2, 0.5)
    assert found.rate == bootstrap_mean([1.0, 0.5, 0.5])
    code, out, _ = pertoken("compare", f"compare.folder={plan.folder}", "--choices", one, "--choices", two)
    assert code == 0
    assert out.startswith("ours against theirs: win rate 66.7% [")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ('{"sheet": "gone", "choices": {"b": "left"}}', "choices on no sheet of"),
        ('{"sheet": "SHEET", "choices": {}}', "expected a map `choices`"),
        ('{"sheet": "SHEET", "choices": {"z": "left"}}', "item 'z'"),
        ('{"sheet": "SHEET", "choices": {"b": "up"}}', "choice 'up'"),
    ],
)
def test_files_that_are_no_choices(sheet, tmp_path, content, words):
    plan, _, page = sheet
    path = tmp_path / "choices.json"
    path.write_text(content.replace("SHEET", json.loads(page.with_suffix(".key.json").read_text())["sheet"]))
    with pytest.raises(TaskError) as error:
        read_choices(plan.folder, [path])
    assert words in str(error.value)


def test_a_person_chooses_comes_back_and_saves(sheet, tmp_path, browser):
    plan, _, address = sheet
    faults = []
    page = browser.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url)
            if not request.url.startswith(("file:", "blob:")) else None)  # fmt: skip
    page.goto(address.as_uri())
    assert page.title() == "Which answer is better?"
    for card in page.locator("article").all():
        better = "Left" if "better" in card.locator(".sides > div").first.inner_text() else "Right"
        card.get_by_role("button", name=f"{better} is better").click()
    page.get_by_label("Your name").fill("Ada")
    page.reload()
    assert page.locator("#progress").inner_text() == "3 of 3 judged"
    assert page.get_by_label("Your name").input_value() == "Ada"
    with page.expect_download() as download:
        page.get_by_role("button", name="Save choices").click()
    download.value.save_as(tmp_path / "saved.json")
    page.close()
    assert faults == []
    (found,) = read_choices(plan.folder, [tmp_path / "saved.json"])
    assert (found.wins, found.losses) == (3, 0)
