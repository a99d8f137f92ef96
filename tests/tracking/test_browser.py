"""The page as a reader meets it, in real Chromium: what it shows is what the run holds, and nothing leaves the machine.

Skipped where there is no browser: they need `pip install -e ".[browser]"` and a `chromium` on the path.
"""

import json
import math
from pathlib import Path

import pytest

from pertoken.tracking import RunLog, RunReader, samples
from pertoken.tracking.report import write_report


@pytest.fixture(scope="module")
def address(run_folder) -> str:
    return write_report(run_folder).as_uri()


@pytest.fixture(scope="module")
def load(browser):
    """Opens an address in a page of its own. What goes wrong in it, or asks something of the network, is a fault."""
    faults = []

    def new(url: str):
        page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="light")
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: faults.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(url)
        return page

    new.faults = faults
    return new


@pytest.fixture(scope="module")
def shared(load, address):
    return load(address)


@pytest.fixture
def page(shared, load):
    """The page of the run, opened once for all tests; each begins at the first sample."""
    shared.mouse.move(0, 0)
    shared.fill("#search", "")
    for box in ("#against", "#marks"):
        shared.uncheck(box, force=True) if shared.locator(box).is_visible() else None
    shared.select_option("#order", index=0)
    shared.evaluate("chooseOrder(0), openSample(run.lists.held_out.id[found[0]]), hideTip()")
    yield shared
    assert load.faults == []


def follow(page, link: str) -> None:
    """Goes where a link within the page leads."""
    page.evaluate("link => { history.replaceState(null, '', link); restore(); }", link)


def record_of(run_folder: Path, step: int, sample: int) -> dict:
    return RunReader(run_folder).episodes(step)[sample]


def number(text: str) -> float:
    return float(text.replace("−", "-").split(" ")[0])


def tip_numbers(page) -> dict[str, float]:
    rows = page.locator("#tip tr:has(th):not(.other)").all()
    return {row.locator("th").inner_text(): number(row.locator("td").first.inner_text()) for row in rows}


def test_pointing_and_keyboard_show_the_numbers_of_the_run(page, run_folder):
    follow(page, "#sample=300.16&by=advantage&token=2")
    record = record_of(run_folder, 300, 16)
    at = record["tokens"]["action"].index(1) + 1
    names = {
        "reward: rouge_l": "reward/rouge_l",
        "advantage": "advantage",
        "log-prob": "logprob",
        "ratio": "ratio",
        "KL": "kl",
    }

    def expected(index: int) -> dict[str, float]:
        return {shown: pytest.approx(record["streams"][name][index], rel=0.01) for shown, name in names.items()}

    def shown() -> dict[str, float]:
        return {name: value for name, value in tip_numbers(page).items() if name in names}

    assert shown() == expected(at)  # the link put the focus there
    assert len(tip_numbers(page)) == len(record["streams"])
    page.keyboard.press("ArrowRight")
    assert shown() == expected(at + 1)
    page.keyboard.press("Home")
    assert shown() == expected(at - 1)
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()
    page.locator('[data-id="300.16"] .token').nth(3).hover()
    assert shown() == expected(at + 2)


@pytest.mark.parametrize("sample", ["300.16", "validation.300.0"])
def test_the_numbers_of_a_token_begin_with_what_else_could_have_stood_there(page, run_folder, sample):
    follow(page, f"#sample={sample}&token=2")
    reader, line = RunReader(run_folder), int(sample.rpartition(".")[2])
    rows = reader.episodes(300) if sample == "300.16" else reader.evaluation_items(300, "validation")
    record = rows[line]
    at = record["tokens"]["action"].index(1) + 1
    found = record["alternatives"]
    shown = page.locator("#tip tr.other").all()
    assert [row.locator("th").inner_text() for row in shown] == [f"“{found['piece'][str(t)]}”" for t in found["id"][at]]
    shares = [float(row.locator("td").inner_text().strip("<%")) for row in shown]
    assert shares == pytest.approx([100 * math.exp(nats) for nats in found["logprob"][at]], rel=0.05, abs=0.01)
    own = [found["id"][at].index(record["tokens"]["id"][at])]
    chosen = page.locator("#tip tr.other").evaluate_all("all => all.map((row) => row.classList.contains('chosen'))")
    assert [place for place, is_chosen in enumerate(chosen) if is_chosen] == own
    assert "this one is number 2" in page.locator("#tip").inner_text()


@pytest.mark.parametrize("height", [900, 700, 500])
def test_the_numbers_of_a_token_do_not_end_below_the_window(page, height):
    """Below it, above it, or beside it where there is room for neither."""
    page.set_viewport_size({"width": 1440, "height": height})
    try:
        follow(page, "#sample=300.16&token=2")
        size = page.locator("#tip").bounding_box()["height"]
        for at in (2, 20, 60):
            box = page.evaluate(
                "at => { const all = document.querySelectorAll('#scene .token');"
                " const node = all[Math.min(at, all.length - 1)];"
                " node.scrollIntoView({ block: 'center' }); node.focus({ preventScroll: true });"
                " const { top, bottom, left, right } = byId('tip').getBoundingClientRect();"
                " const own = node.getClientRects()[0];"
                " return { top, bottom, left, right, own: [own.left, own.top, own.right, own.bottom] }; }",
                at,
            )
            assert box["bottom"] <= max(height, size + 8)
            assert 0 <= box["left"] < box["right"] <= 1440
            left, top, right, bottom = box["own"]
            covers = box["left"] < right and box["right"] > left and box["top"] < bottom and box["bottom"] > top
            assert not covers
    finally:
        page.set_viewport_size({"width": 1440, "height": 900})


def test_the_second_column_is_the_mean_of_the_group_at_this_place(page, run_folder):
    follow(page, "#sample=300.16&by=logprob&token=1")
    records = [record_of(run_folder, 300, sample) for sample in (17, 18, 19)]
    others = [record["streams"]["logprob"][record["tokens"]["action"].index(1)] for record in records]
    row = page.locator("#tip tr.chosen:not(.other) td").all_inner_texts()
    assert number(row[1]) == pytest.approx(sum(others) / 3, rel=0.01)


def test_streams_switch_and_their_colour_follows_the_numbers(page, run_folder):
    follow(page, "#sample=300.16")
    record = record_of(run_folder, 300, 16)
    start = record["tokens"]["action"].index(1)
    scales = {scale["name"]: scale for scale in json.loads(page.locator("#run").text_content())["scales"]}
    for name in page.locator("#stream option").evaluate_all("all => all.map((option) => option.value)"):
        page.select_option("#stream", name)
        scale, zero = scales[name], float(scales[name]["kind"] == "around_one")
        strengths = page.locator('[data-id="300.16"] .token').evaluate_all(
            "all => all.map((token) => parseFloat(token.style.getPropertyValue('--strength')))"
        )
        expected = [62 * min(1, abs(value - zero) / scale["bound"]) for value in record["streams"][name][start:]]
        assert strengths == pytest.approx(expected, abs=0.3), name
        assert scale["meaning"] in page.locator("#legend").inner_text()


def test_a_finding_is_underlined_and_says_its_message(page, run_folder):
    follow(page, "#sample=300.12&by=reward/repetition")
    record = record_of(run_folder, 300, 12)
    start = record["tokens"]["action"].index(1)
    found = page.locator('[data-id="300.12"] .token.found')
    indices = [int(index) for index in found.evaluate_all("all => all.map((token) => token.dataset.index)")]
    assert indices == [finding["start"] - start for finding in record["findings"]]
    found.first.hover()
    assert page.locator("#tip .finding").inner_text() == f"repetition −0.02: {record['findings'][0]['message']}"


def test_what_slanted_text_is_stands_in_the_legend_where_there_is_some(page):
    follow(page, "#sample=300.12&by=reward/total")
    assert "slanted" not in page.locator("#legend").inner_text()
    page.evaluate("currentScene().panels[0].tokens.action[0] = 0; repaint()")
    assert "slanted: given, not chosen by the model" in page.locator("#legend").inner_text()
    page.evaluate("currentScene().panels[0].tokens.action[0] = 1")


def test_a_finding_of_several_tokens_says_that_its_number_is_of_all_of_them(page):
    follow(page, "#sample=300.12&by=reward/repetition")
    page.evaluate("currentScene().panels.find((panel) => panel.id === '300.12').findings[0].stop += 2")
    page.locator('[data-id="300.12"] .token.found').first.hover()
    assert page.locator("#tip .finding").inner_text().startswith("repetition −0.02 for 3 tokens together: said")
    page.evaluate("currentScene().panels.find((panel) => panel.id === '300.12').findings[0].stop -= 2")


def test_after_minus_before_is_the_difference_at_aligned_tokens(page):
    page.select_option("#stream", "logprob")
    page.check("#against")
    scene = page.evaluate("currentScene()")
    before, after = scene["panels"]
    strengths = page.locator(".panel:nth-child(2) .token").evaluate_all(
        "all => all.map((token) => parseFloat(token.style.getPropertyValue('--strength')))"
    )
    for index, partner in enumerate(after["match"]):
        moved = 0.0 if partner < 0 else after["streams"]["logprob"][index] - before["streams"]["logprob"][partner]
        assert (strengths[index] > 0) == (moved != 0)
    assert "After − before" in page.locator("#legend").inner_text()


def test_a_link_restores_what_was_on_the_screen(page, load, address):
    page.select_option("#order", label="Most clipped")
    page.locator(".row").nth(2).click()
    page.select_option("#stream", "kl")
    page.check("#marks")
    page.locator(".panel.picked .token").nth(4).focus()
    state = (
        "[view.id, view.token, byId('stream').value, document.querySelector('#scene').className, byId('tip').innerText]"
    )
    there = page.evaluate(state)
    again = load(address + page.locator("#link").get_attribute("href"))
    assert again.evaluate(state) == there
    assert there[1:4] == [5, "kl", "marks"]


def test_every_view_opens(page):
    for link in page.locator("nav a").all():
        link.click()
        section = page.locator(link.get_attribute("href"))
        assert section.is_visible()
        assert section.inner_text().strip()
    for label in page.locator("#order option").all_inner_texts():
        page.select_option("#order", label=label)
        assert page.locator("#scene .panel .token").count() > 0, label
        assert page.locator(".row[aria-selected=true]").count() == 1, label


def test_a_pair_says_which_parts_changed_its_reward(page, run_folder):
    row = page.evaluate("run.lists.held_out.title.indexOf(currentScene().title)")
    reader = RunReader(run_folder)

    def earned(step: int) -> dict[str, float]:
        streams = reader.evaluation_items(step, "validation")[row]["streams"]
        return {name: sum(values) for name, values in streams.items() if name.startswith("reward/")}

    before, after = earned(0), earned(300)
    moved = {name.partition("/")[2]: after[name] - before[name] for name in after}
    text = page.locator(".earned").inner_text().replace("−", "-")
    assert text.startswith("Reward ")
    shown = dict(part.rsplit(" ", 1) for part in text.partition("by its parts: ")[2].split(", "))
    assert list(shown) == sorted(shown, key=lambda name: -abs(moved[name]))
    total = float(text.partition("(")[2].partition(")")[0])
    assert {name: float(value) for name, value in shown.items()} | {"total": total} == pytest.approx(moved, rel=0.02)


def test_search_finds_words_of_texts_and_items(page):
    page.select_option("#order", label="Best reward")
    assert page.locator("#count").inner_text() == "224 samples"
    page.fill("#search", "重复项")
    assert page.locator("#count").inner_text() == "28 samples"
    assert set(page.locator(".row .name").all_inner_texts()) == {"scripts/chinese"}
    page.fill("#search", "scripts/arabic")
    assert page.locator("#count").inner_text() == "28 samples"
    assert page.locator("#scene h3").first.inner_text().startswith("scripts/arabic")  # what is read is among the found
    page.fill("#search", "nothing like this")
    assert page.locator("#count").inner_text() == "No training sample has these words."


def test_an_item_that_is_searched_by_its_name_comes_first(page):
    page.select_option("#order", label="In the order of the data")
    name, was = page.evaluate("[run.lists.held_out.title[9], run.lists.held_out.title[2]]")
    rename = "title => { run.lists.held_out.title[2] = title; haystacks.clear(); }"
    page.evaluate(rename, f"{name}7")
    page.fill("#search", name)
    assert page.locator(".row .name").all_inner_texts() == [name, f"{name}7"]
    page.evaluate(rename, was)


def test_the_list_keeps_few_rows_in_the_page_and_moves_by_keyboard(page):
    page.select_option("#order", label="In order of steps")
    assert page.locator(".row").count() < 30
    page.locator("#list").focus()
    page.keyboard.press("End")
    assert page.evaluate("view.id") == "300.31"
    page.wait_for_selector("#row-223[aria-selected=true]")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("view.id") == "300.30"


def test_hostile_text_stays_text(page):
    follow(page, "#sample=300.12")
    text = page.locator('[data-id="300.12"] .text').inner_text()
    assert "<script>document.title='owned'</script>" in text
    assert "␛[31mred" in text
    assert "owned" not in page.title()


def test_marks_that_turn_the_direction_show_themselves_in_prompts_and_answers(page):
    scene = {"kind": "group", "title": "", "prompt": "a\u202eb", "answer": "c\u202ed", "panels": []}
    shown = page.evaluate("scene => sceneNodes(scene).map((node) => node.textContent).join()", scene)
    assert "a⟨U+202E⟩b" in shown
    assert "c⟨U+202E⟩d" in shown


def test_letters_that_join_do_so_over_a_token_that_is_a_part_of_one(page):
    """Of a script whose letters do not, the part has room of its own, to be pointed at."""
    width = """pieces => {
        const list = tokenList({ title: "", tokens: { piece: pieces, action: pieces.map(() => 1) } });
        [...list.children].forEach((node, index) => node.append(...tokenText(pieces[index])));
        document.body.append(list);
        const text = document.createRange();
        text.selectNodeContents(list);
        const found = text.getBoundingClientRect().width;
        list.remove();
        return found;
    }"""
    assert page.evaluate(width, ["جم", "", "", "يل"]) == pytest.approx(page.evaluate(width, ["جميل"]), abs=0.1)
    assert page.evaluate(width, ["今", "", "", "天"]) > page.evaluate(width, ["今天"]) + 5


@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    follow(page, "#sample=300.20")
    page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)
    directions = page.locator('[data-id="300.20"] .text').evaluate("node => getComputedStyle(node).direction")
    assert directions == "rtl"


def test_charts_are_drawn_when_they_come_near(load, address):
    page = load(address)
    plots = page.locator("#curves .plot")
    assert page.locator("#curves .js-plotly-plot").count() < plots.count()
    plots.last.scroll_into_view_if_needed()
    plots.last.locator(".main-svg").first.wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_fault(page, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page.emulate_media(color_scheme=scheme)
    follow(page, "#sample=300.16&by=advantage&token=2")
    found = axe.Axe().run(page).response["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    assert [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in serious] == []


def test_a_sample_without_room_says_where_to_find_it(load, tmp_path, monkeypatch):
    log = RunLog.create(tmp_path / "run", config_text="", seed=0)
    tokens = {"id": [1, 2], "piece": ["a", "b"], "action": [0, 1]}
    record = {"item": "i", "stop": "eos", "prompt": "a", "answer": "b", "completion": "b", "tokens": tokens}
    log.episodes(7, [record | {"group": k, "streams": {"reward/total": [0, k]}} for k in range(5)])
    monkeypatch.setattr(samples, "MAX_BYTES", 100)
    page = load(write_report(tmp_path / "run").as_uri() + "#sample=7.2")
    assert f"pertoken show {tmp_path / 'run'} --step 7 --sample 2" in page.locator("#scene").inner_text()
    page.locator("#list").focus()
    page.keyboard.press("Home")
    assert page.locator(".token").count() == 1
    assert load.faults == []
