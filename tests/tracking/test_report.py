"""The page: whole, harmless, small, and drawn from whatever the folder has."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pertoken.errors import MissingExtraError, RunFolderError
from pertoken.tracking import RunLog, RunReader
from pertoken.tracking.comparison import compare
from pertoken.tracking.report import render, verdict, write_report

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> \x1b[31mred"


class Page(HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def html(run_folder) -> str:
    return write_report(run_folder).read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def a_run(folder: Path, **about) -> RunLog:
    return RunLog.create(folder, config_text=f"note: {HOSTILE}\n", seed=1, about=about)


def a_hostile_sample(item: str = "a") -> dict:
    return {"id": item, "prompt": HOSTILE, "answer": HOSTILE, "output": HOSTILE, "metrics": {"rouge_l": 0.5}}


def test_the_page_of_a_300_step_run_is_small_and_has_every_section(html, page):
    assert len(html.encode()) < 8_000_000
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == [
        "result",
        "tokens",
        "curves",
        "certificate",
        "configuration",
    ]
    assert "SmolLM2-135M on documentation summaries" in html
    assert html.count("* plotly.js v") == 1
    assert len(page.data["charts"]) > 20
    assert len(page.data["lists"]["training"]["id"]) == 7 * 32
    assert len(page.data["lists"]["held_out"]["id"]) == 128
    assert len(page.data["scenes"]) == 7 * 8 + 128


def test_the_page_loads_nothing(page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith("#")
        assert not [name for name in attrs if name.startswith("on")]


def test_the_content_policy_allows_our_two_scripts_and_no_request(page):
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv"))
    assert policy.startswith("default-src 'none';")
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]]
    assert re.search(r"script-src (.*?);", policy).group(1) == " ".join(f"'sha256-{digest}'" for digest in digests)


def test_hostile_text_stays_text(tmp_path):
    log = a_run(tmp_path / "run", model=HOSTILE, task=HOSTILE)
    log.step(1, {HOSTILE: 1.0})
    for step in (0, 1):
        log.evaluation(
            step, "test", {"metrics": {"rouge_l": 0.5}, "baselines": {HOSTILE: {"rouge_l": 0.1}}}, [a_hostile_sample()]
        )
    log.finish("failed", HOSTILE)
    text = write_report(tmp_path / "run").read_text()
    page = Page(text)
    assert [tag for tag, _ in page.tags if tag in ("script", "img")] == ["script"] * 3
    assert page.data["scenes"]["test.0"]["panels"][0]["text"] == HOSTILE
    assert "\x1b" not in text.split('id="run"')[1].split("</script>")[0]


def test_the_shown_numbers_are_those_of_the_run(page, run_folder):
    columns = page.data["lists"]["training"]
    row = max(range(len(columns["id"])), key=lambda row: columns["reward"][row])
    step, sample = map(int, columns["id"][row].split("."))
    record = RunReader(run_folder).episodes(step)[sample]
    scene = page.data["scenes"][columns["scene"][row]]
    panel = next(panel for panel in scene["panels"] if panel["id"] == columns["id"][row])
    start = record["tokens"]["action"].index(1)
    assert columns["reward"][row] == pytest.approx(sum(record["streams"]["reward/total"]), rel=1e-3)
    assert panel["tokens"]["piece"] == record["tokens"]["piece"][start:]
    assert scene["prompt"] + "".join(panel["tokens"]["piece"]) == "".join(record["tokens"]["piece"])
    assert panel["streams"]["advantage"] == pytest.approx(record["streams"]["advantage"][start:], rel=1e-3)
    assert {scale["name"] for scale in page.data["scales"]} == set(record["streams"])


def test_a_run_without_a_step_or_an_evaluation_has_a_page(tmp_path):
    a_run(tmp_path / "run")
    text = write_report(tmp_path / "run").read_text()
    assert "No step has been logged yet" in text
    assert "Held-out quality was not measured" in text
    assert 'id="tokens"' not in text


def test_one_step_one_evaluation_and_a_torn_line_have_a_page(tmp_path):
    log = a_run(tmp_path / "run", model="tiny")
    log.step(1, {"reward/total": float("nan"), "entropy": 1.0})
    log.evaluation(0, "test", {"metrics": {"rouge_l": 0.5}}, [a_hostile_sample()])
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2, "ti')
    page = Page(write_report(tmp_path / "run").read_text())
    assert [chart["data"][0]["y"] for chart in page.data["charts"]] == [[1.0]]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="is not a run folder"):
        write_report(tmp_path)


def test_without_plotly_the_error_names_the_extra(tmp_path, monkeypatch):
    a_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[report\]'"):
        render(RunReader(tmp_path / "run"))


def an_evaluation(step: int, scores: list[float], name: str = "rouge_l", **more) -> dict:
    items = {"id": [str(i) for i in range(len(scores))], name: scores}
    return {"step": step, "split": "test", "metrics": {name: sum(scores) / len(scores)}, "items": items, **more}


@pytest.mark.parametrize(
    ("name", "shift", "judgement"),
    [
        ("rouge_l", 0.05, "better"),
        ("rouge_l", -0.05, "worse"),
        ("rouge_l", 0.0, "not proven"),
        ("repetition", -0.05, "better"),
        ("repetition", 0.05, "worse"),
        ("words", 0.05, "not proven"),
    ],
)
def test_the_verdict_follows_the_interval_and_the_good_direction(name, shift, judgement):
    before = [0.1, 0.2, 0.3, 0.4]
    noise = [0.01, -0.01, 0.01, -0.01]
    after = [b + shift + n for b, n in zip(before, noise, strict=True)]
    rows = [an_evaluation(0, before, name), an_evaluation(9, after, name)]
    assert verdict(compare(rows), rows)[0] == judgement


def test_the_verdict_is_a_sentence_with_its_numbers_and_the_baseline():
    baselines = {"first sentence": {"rouge_l": 0.175}, "empty": {"rouge_l": 0.0}}
    rows = [an_evaluation(0, [0.1, 0.2]), an_evaluation(9, [0.2, 0.3], baselines=baselines)]
    assert verdict(compare(rows), rows)[1] == (
        "Held-out ROUGE-L went from 0.150 to 0.250 on the same 2 items (+0.100, 95% interval +0.100 to +0.100). "
        "The model now passes the best trivial baseline, first sentence (0.175)."
    )
    assert verdict(None, rows[:1]) == (
        "unknown",
        "Held-out quality was measured once; a verdict needs it before and after the training.",
    )


def test_a_reward_that_rises_while_quality_falls_is_gamed():
    rising = {"reward/total": [0.1, 0.11, 0.09] * 5 + [0.5, 0.51, 0.49] * 5}
    flat = {"reward/total": [0.1, 0.11, 0.09] * 10}
    worse = [an_evaluation(0, [0.3, 0.4]), an_evaluation(9, [0.2, 0.3])]
    assert verdict(compare(worse), worse, flat)[0] == "worse"
    judgement, sentence = verdict(compare(worse), worse, rising)
    assert judgement == "gamed"
    assert sentence.endswith("the training reward rose from 0.100 to 0.500: it pays for something else than quality.")
    same = [an_evaluation(0, [0.3, 0.4]), an_evaluation(9, [0.2, 0.5])]
    judgement, sentence = verdict(compare(same), same, rising)
    assert judgement == "not proven"
    assert sentence.endswith("which alone proves nothing.")


def test_better_at_a_price_names_the_price():
    rows = [an_evaluation(0, [0.1, 0.2]), an_evaluation(9, [0.2, 0.3])]
    for row, repetition in zip(rows, ([0.0, 0.1], [0.5, 0.6]), strict=True):
        row["items"]["repetition"] = repetition
        row["metrics"]["repetition"] = sum(repetition) / 2
    assert verdict(compare(rows), rows)[1].endswith("At a price, see the table: repetition.")


def test_the_page_says_which_part_moved_the_reward(html):
    table = html[html.index("What moved the training reward") :]
    rows = re.findall(r'<th scope="row"[^>]*>(\w+)</th>.*?<td>(−?\d+%)</td></tr>', table)
    assert [name for name, _ in rows] == ["total", "rouge_l", "brevity", "repetition"]
    shares = [int(share.rstrip("%")) for _, share in rows]
    assert shares[0] == 100
    assert abs(sum(shares[1:]) - 100) <= 1
