"""What a notebook shows: the numbers that are there, in their colours, and nothing that acts."""

import re

import pytest
import torch

from pertoken import display
from pertoken.display import FULL_STRENGTH, MAGNITUDE, NEGATIVE, POSITIVE, escaped
from pertoken.testing import episode
from pertoken.tracking import RunLog, RunReader, show
from pertoken.tracking.coloured import ColouredText
from pertoken.types import Credit, Item, TokenRewards

HOSTILE = "<script>alert(1)</script>\x1b]0;owned\x07\x9b31m\u202e\"'><img src=x onerror=alert(2)>"


def cells(html):
    """The numbers of a table, and how strong their colours are (below 0: orange)."""
    signs = {",".join(map(str, POSITIVE)): 1, ",".join(map(str, NEGATIVE)): -1}
    found = []
    for style, text in re.findall(r'<td style="([^"]*)">([^<]*)</td>', html):
        colour = re.search(r"rgba\((\d+,\d+,\d+),([\d.]+)\)", style)
        found.append((text, signs[colour[1]] * float(colour[2]) if colour else 0.0))
    return found


def test_credit_is_a_table_whose_colours_are_its_numbers():
    advantages = torch.tensor([[0.0, 0.0, 1.0, -0.5], [0.0, 0.0, 0.5, 0.0]])
    shown = Credit(advantages)._repr_html_()
    assert cells(shown) == [("1", FULL_STRENGTH), ("−0.5", -0.31), ("0.5", 0.31), ("·", 0.0)]
    assert re.findall(r"<th>(\d*)</th>", shown) == ["", "2", "3", "0", "1"]  # the prompt is left out
    assert "returns" not in shown
    assert "returns" in Credit(advantages, advantages)._repr_html_()


def test_numbers_that_are_none_have_no_colour():
    shown = Credit(torch.tensor([[float("nan"), float("inf"), 2.0]]))._repr_html_()
    assert cells(shown) == [("nan", 0.0), ("inf", 0.0), ("2", FULL_STRENGTH)]


def test_rewards_are_the_total_and_each_part():
    part = torch.tensor([[0.0, 0.5]])
    shown = TokenRewards(2 * part, {"rouge_l": part, "<b>part</b>": part})._repr_html_()
    assert [name for name in ("total", "rouge_l", "&lt;b&gt;part") if name not in shown] == []
    assert "<b>" not in shown


def test_of_a_large_batch_a_part_is_shown_and_the_rest_is_counted():
    shown = Credit(torch.ones(display.MOST_ROWS + 3, display.MOST_COLUMNS + 5))._repr_html_()
    assert len(cells(shown)) == display.MOST_ROWS * display.MOST_COLUMNS
    assert "3 more rows and 5 more columns" in shown
    assert Credit(torch.zeros(0, 0))._repr_html_().count("<td") == 0


def test_an_episode_is_its_ids_and_how_probable_each_was():
    one = episode([7, 8], [300, 301, 302], stop="length", item=Item("sum", "2 + 2 =", "4"))
    one.logprobs[2:] = [-0.5, -4.0, 0.0]
    shown = one._repr_html_()
    spans = re.findall(r'<span style="([^"]*)" title="([^"]*)">(\d+)</span>', shown)
    assert [int(token) for *_, token in spans] == one.tokens
    assert ["given" in title for _, title, _ in spans] == [True, True, False, False, False]
    strengths = [float(re.search(r"([\d.]+)\);", style)[1]) for style, *_ in spans[2:]]
    assert strengths[1] == FULL_STRENGTH
    assert strengths[2] < strengths[0] < strengths[1]
    assert "3 of 5 tokens chosen by the policy" in shown
    assert "stopped by length" in shown
    assert "2 + 2 =" in shown
    assert "log-prob −4.5" in shown


def test_a_chat_and_a_long_text_are_shown():
    chat = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."})
    assert "user: Why?\nassistant: So." in episode([1], [2], item=Item("i", chat))._repr_html_()
    shown = episode([1], [2] * (display.MOST_IDS + 9))._repr_html_()
    assert shown.count("<span") == display.MOST_IDS
    assert "… 10 more" in shown


def hostile_displays(folder):
    item = Item(HOSTILE, HOSTILE, HOSTILE)
    part = torch.tensor([[0.0, 0.5]])
    RunLog.create(folder, config_text="", seed=0, about={"model": HOSTILE, "task": HOSTILE})
    yield episode([1], [2, 3], id=HOSTILE, item=item)
    yield episode([1], [2], item=Item("i", ({"role": HOSTILE, "content": HOSTILE},)))
    yield TokenRewards(part, {HOSTILE: part})
    yield ColouredText([HOSTILE, "x"], [0.5, -0.5], HOSTILE, title=HOSTILE, numbers={HOSTILE: [1.0, 2.0]})
    yield show.Sheet([HOSTILE], [[HOSTILE]])
    yield show.Shown(HOSTILE, HOSTILE, HOSTILE, [[HOSTILE]], [ColouredText([HOSTILE], [1.0])], [[HOSTILE]])
    yield show.ShownRun(HOSTILE, "better", HOSTILE, None)
    yield RunReader(folder)


def test_nothing_that_is_shown_acts(tmp_path):
    for one in hostile_displays(tmp_path / "run"):
        made = one._repr_html_()
        assert "<script" not in made, type(one)
        assert "<img" not in made, type(one)
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", made), type(one)
        assert "&lt;script&gt;" in made, type(one)


def test_a_browser_runs_nothing_of_what_is_shown(browser, tmp_path):
    """Each display in a page of its own: no dialog, no script, no picture, no request; the text is all there."""
    page = browser.new_page()
    heard = []
    page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: heard.append(request.url))
    for one in hostile_displays(tmp_path / "run"):
        page.set_content(f"<!doctype html><body>{one._repr_html_()}</body>")
        assert page.locator("script, img").count() == 0
        assert "<script>alert(1)</script>" in page.locator("body").inner_text()
    assert heard == []
    page.close()


@pytest.mark.parametrize(("paper", "ink"), [((255, 255, 255), (29, 33, 37)), ((17, 17, 17), (232, 233, 235))])
@pytest.mark.parametrize("colour", [POSITIVE, NEGATIVE, MAGNITUDE])
def test_the_strongest_colour_can_be_read_on_light_and_on_dark_paper(colour, paper, ink):
    """A contrast of at least 4.5 to 1 (WCAG AA)."""
    mixed = [p + (i - p) * FULL_STRENGTH for p, i in zip(paper, colour, strict=True)]
    dark, light = sorted((luminance(mixed), luminance(ink)))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (part / 255 for part in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_what_cannot_be_seen_is_spelled_out():
    assert escaped("a\x1b<\u202e") == "a␛&lt;⟨U+202E⟩"
