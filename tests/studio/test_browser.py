"""The studio as a reader meets it, in real Chromium: it follows a run, answers, and asks nothing of the network.

Skipped where there is no browser: they need `pip install -e ".[browser,studio]"` and a `chromium` on the path.
"""

import json
import re
import shutil
import socket
import threading

import pytest

from pertoken.tracking import RunLog, RunReader

pytest.importorskip("uvicorn", reason="needs the extra studio")
import uvicorn

from pertoken.studio.server import application

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \x1b[31mred"


@pytest.fixture(scope="module")
def root(asked_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("studio")
    shutil.copytree(asked_run, root / "first")
    shutil.copytree(asked_run, root / "deep" / "second")
    return root


@pytest.fixture(scope="module")
def address(root):
    """Where the studio is, served by a thread of this process."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(root), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def load(browser, address):
    """Opens a page. What goes wrong in it, or asks something of anybody else, is a fault."""
    faults, pages = [], []

    def new(path, width=1440, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(120_000)  # a question loads a model first
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(address) else faults.append(request.url))
        page.goto(address + path)
        pages.append(page)
        return page

    new.faults = faults
    yield new
    for page in pages:
        page.close()
    assert faults == []


def record(text="b", group=0):
    tokens = {"id": [1, 2], "piece": ["a", text], "action": [0, 1]}
    row = {"item": "i", "group": group, "stop": "eos", "prompt": "a", "answer": "b", "completion": text}
    return row | {"tokens": tokens, "streams": {"reward/total": [0, 1], "logprob": [0, -0.5]}}


def test_the_table_follows_the_runs_and_keeps_what_was_chosen(load, root):
    page = load("/")
    assert page.locator("table.runs tbody tr").count() == 2
    page.check('input[value="first"]')
    with RunLog.create(root / "new", config_text="", seed=0):
        page.wait_for_selector('a[href="/run/new"]')
        assert page.locator("tr:has(a[href='/run/new']) .status").inner_text() == "running"
        assert page.is_checked('input[value="first"]')
    page.check('input[value="deep/second"]')
    page.click("text=Compare the chosen runs")
    page.wait_for_load_state()
    assert page.locator("h1").inner_text() == "deep/second against first"
    page.locator(".plot").first.scroll_into_view_if_needed()
    page.locator(".plot .main-svg").first.wait_for()
    shutil.rmtree(root / "new")


def test_the_page_follows_a_run_that_goes_on(load, root):
    with RunLog.create(root / "live", config_text="", seed=0) as log:
        log.step(1, {"reward/total": 0.25})
        log.episodes(1, [record(), record(HOSTILE)])
        page = load("/run/live")
        page.locator("#curves .plot").first.scroll_into_view_if_needed()
        page.locator("#curves .main-svg").first.wait_for()
        page.evaluate("window.here = true")
        page.locator(".token").first.focus()
        log.step(2, {"reward/total": 0.5})
        page.wait_for_function("() => run.charts[0].data[0].y.length === 2")
        plotted = page.evaluate("document.querySelector('#curves .js-plotly-plot').data[0].y")
        assert plotted == [0.25, 0.5]
        log.episodes(2, [record("c", group=1)])
        log.step(3, {"reward/total": 0.75})
        page.wait_for_function("() => run.lists.training.id.length === 3")
        assert page.evaluate("document.activeElement.className").startswith("token")
        assert page.evaluate("window.here"), "the page was loaded again"
        assert "owned" not in page.title()
        assert page.locator("#status strong").inner_text() == "running"
        assert page.locator("#status button").inner_text() == "Stop"
    page.wait_for_selector("#status strong.killed", timeout=20_000)
    assert page.locator("#status button").inner_text() == "Resume"
    shutil.rmtree(root / "live")


def stream_of(root, step, sample, name):
    """The numbers of a stream at the tokens that the model chose."""
    record = RunReader(root / "first").episodes(step)[sample]
    return [value for value, acts in zip(record["streams"][name], record["tokens"]["action"], strict=True) if acts]


def shown_number(page, label):
    row = page.locator(f"#tip tr:has(th:text-is('{label}')) td").first
    return float(row.inner_text().replace("−", "-").split()[0])


@pytest.fixture
def nothing_in_the_page(monkeypatch):
    """As of a run that is far larger than a page: every text has to be asked for."""
    monkeypatch.setattr("pertoken.tracking.samples.MAX_BYTES_SERVED", 0)


def test_texts_that_are_not_in_the_page_come_when_they_are_opened(load, root, nothing_in_the_page):
    page = load("/run/first#sample=2.1&by=logprob&token=3")
    page.wait_for_selector("#tip:visible")
    logprobs = stream_of(root, 2, 1, "logprob")
    assert shown_number(page, "log-prob") == pytest.approx(logprobs[2], rel=0.01)
    page.keyboard.press("ArrowRight")
    assert shown_number(page, "log-prob") == pytest.approx(logprobs[3], rel=0.01)
    page.locator('[data-id="2.1"] .token').first.hover()
    assert shown_number(page, "log-prob") == pytest.approx(logprobs[0], rel=0.01)
    page.select_option("#order", label="Worst reward")
    page.wait_for_function("() => currentScene() && view.id === run.lists.training.id[found[0]]")
    page.locator("#list").focus()
    page.keyboard.press("End")
    best = max((sum(stream_of(root, *at, "reward/total")), at) for at in ((s, k) for s in (1, 2, 3) for k in range(4)))
    page.wait_for_selector(f'.panel[data-id="{best[1][0]}.{best[1][1]}"].picked .token')
    assert page.evaluate("Object.keys(run.scenes).length") <= 4


def test_a_link_to_the_text_before_training_restores_it(load, nothing_in_the_page):
    page = load("/run/first#sample=validation.0.1&by=logprob&token=2&against=1&marks=1")
    page.wait_for_selector("#tip:visible")
    state = "[view.id, view.token, byId('stream').value, byId('against').checked, byId('scene').className, order.list]"
    assert page.evaluate(state) == ["validation.0.1", 2, "logprob", True, "marks", "held_out"]
    assert page.locator(".panel h3").all_inner_texts() == ["Before (step 0)", "After (step 3)"]


def test_the_search_goes_through_texts_that_are_not_in_the_page(load, root, nothing_in_the_page):
    page = load("/run/first")
    page.select_option("#order", label="In order of steps")
    reader = RunReader(root / "first")
    records = [record for step in (1, 2, 3) for record in reader.episodes(step)]
    words = records[0]["answer"]
    page.fill("#search", words.upper())
    shown = sum(words in "\n".join(record[name] for name in ("answer", "completion", "prompt")) for record in records)
    assert 0 < shown < len(records)
    page.wait_for_function("count => byId('count').textContent.startsWith(`${count} sample`)", arg=shown)
    page.fill("#search", "no text has this")
    page.wait_for_function("() => byId('count').textContent.startsWith('No training sample')")


def test_what_is_read_stays_while_samples_come_that_the_page_has_not(load, root, nothing_in_the_page):
    with RunLog.create(root / "large", config_text="", seed=0) as log:
        log.step(1, {"reward/total": 0.25})
        log.episodes(1, [record(), record("c", group=1)])
        page = load("/run/large#sample=1.1&by=logprob&token=1")
        page.wait_for_selector("#tip:visible")
        log.episodes(2, [record("d")])
        log.step(2, {"reward/total": 0.5})
        page.wait_for_function("() => run.lists.training.id.length === 3")
        assert page.evaluate("[view.id, document.activeElement.textContent]") == ["1.1", "c"]
        assert page.locator("#tip").is_visible()
    shutil.rmtree(root / "large")


def test_a_token_shows_what_else_could_stand_there(load, root):
    page = load("/run/first#sample=2.1&by=logprob&token=3")
    page.wait_for_function("() => document.querySelector('#ask select').options.length === 5")
    assert page.locator("#place .others button").count() == 3  # as the run wrote them down, before any model is asked
    page.select_option("#ask label select", "step-1")
    page.click("text=What else could stand here")
    page.wait_for_function("() => document.querySelectorAll('#place .others button').length > 3")
    logprob = [value for value in RunReader(root / "first").episodes(2)[1]["streams"]["logprob"] if value][2]
    page.locator('[data-id="2.1"] .token').nth(2).hover()
    shown = page.locator("#tip tr:has(th:text('log-prob of step-1')) td").first.inner_text()
    assert float(shown.replace("−", "-").split()[0]) == pytest.approx(logprob, rel=0.01)
    assert "Most probable here" in page.locator("#tip").inner_text()


def test_what_if_by_a_button_and_by_a_text(load):
    page = load("/run/first#sample=2.1&by=logprob&token=2")
    page.click("text=What else could stand here")
    page.locator("#place .others button:enabled").first.click()
    page.wait_for_selector("#answer li")
    assert page.locator("#answer li").count() == 16
    assert "95% interval" in page.locator("#answer").inner_text()
    page.fill("#place input[type=text]", HOSTILE)
    page.fill("#place input[type=number] >> nth=0", "2")
    page.click("#place >> button:text-is('What if')")
    page.wait_for_function("() => document.querySelectorAll('#answer li').length === 4")
    assert "<script>document.title" in page.locator("#answer").inner_text()
    assert "owned" not in page.title()


def test_answers_become_streams(load):
    page = load("/run/first#sample=2.1")
    page.click("text=Which tokens caused the score")
    page.wait_for_function("() => byId('stream').value === 'caused: total'")
    page.click("text=Difference to")
    page.wait_for_function("() => byId('stream').value.startsWith('log-prob, trained')")
    assert "The same text under two models" in page.locator("#legend").inner_text()
    strengths = page.locator('[data-id="2.1"] .token').evaluate_all(
        "all => all.map((token) => parseFloat(token.style.getPropertyValue('--strength')))"
    )
    assert max(strengths) > 0


def test_gradients_become_a_stream_and_the_prompt_is_shown_in_its_colours(load, root):
    pytest.importorskip("captum", reason="needs captum, of the extra 'attribution'", exc_type=ImportError)
    page = load("/run/first#sample=2.1&token=4")
    page.click("text=Gradients of the log-prob")
    page.wait_for_function("() => byId('stream').value === 'adds to: log-prob of token 4'")
    colours = "all => all.map((token) => parseFloat(token.style.getPropertyValue('--strength')))"
    text = page.locator('[data-id="2.1"] .token').evaluate_all(colours)
    assert all(text[:3])
    assert not any(text[3:])
    prompt = page.locator("#answer .read .token")
    start = RunReader(root / "first").episodes(2)[1]["tokens"]["action"].index(1)
    assert prompt.count() == start
    assert max(prompt.evaluate_all(colours)) > 0
    page.click("text=Gradients of the reward")
    page.wait_for_function("() => document.querySelector('#asked').textContent.includes('no part of the reward')")
    load.faults[:] = [fault for fault in load.faults if "status of 400" not in fault]


def test_what_cannot_be_answered_is_said(load):
    page = load("/run/first#sample=2.1&token=2")
    page.click("#place >> button:text-is('What if')")
    page.wait_for_function("() => document.querySelector('#asked').textContent.includes('there must be a token')")
    load.faults.clear()  # the browser itself tells its console that the answer is 400


def test_two_models_answer_beside_each_other(load):
    page = load("/playground")
    page.select_option("#run-name", "first")
    page.wait_for_function("() => byId('right').value === 'trained'")
    page.fill("#prompt", "say 3:")
    page.uncheck("#chat")
    page.fill("#most", "5")
    page.click("#speak button[type=submit]")
    page.wait_for_function("() => byId('said').textContent === '' && document.querySelectorAll('.panel').length === 2")
    assert page.locator(".panel h3").all_inner_texts() == ["before", "trained"]
    assert page.locator(".panel").first.locator(".token").count() >= 1
    page.locator(".token").first.focus()
    assert "log-prob" in page.locator("#tip").inner_text()


@pytest.mark.parametrize("path", ["/", "/run/first", "/compare?run=first&run=deep/second", "/playground", "/new"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_is_wider_than_the_window(load, path, width):
    page = load(path, width=width)
    page.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


@pytest.mark.parametrize(
    "path", ["/", "/run/first#sample=2.1&token=2", "/compare?run=first&run=deep/second", "/playground", "/new"]
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_accessibility_fault(load, path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = load(path, scheme=scheme)
    found = axe.Axe().run(page).response["violations"]
    serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
    assert [(fault["id"], fault["nodes"][0]["html"][:200]) for fault in serious] == []


def test_no_page_says_what_it_was_not_told(load, root):
    text = load("/run/first").locator("#run").text_content()
    assert json.loads(text)["studio"].keys() == {"run", "status", "metrics", "samples", "token"}
    assert not re.search(r"access", text)
