"""The studio by its addresses: what it shows, what it answers, and whom it lets do what."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

from pertoken.errors import ConfigError, MissingExtraError, RunFolderError
from pertoken.tracking import RunLog, RunReader
from pertoken.tracking.files import encode

pytest.importorskip("starlette.testclient", reason="needs the extra studio")
from starlette.testclient import TestClient

from pertoken.studio import pages, server
from pertoken.studio.guard import COOKIE, Guard, is_local
from pertoken.studio.listing import Listing, version

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \x1b[31mred"
HERE = "http://127.0.0.1:8600"


@pytest.fixture(scope="module")
def runs(asked_run, tmp_path_factory):
    """A folder of runs: one finished, one that is about to begin and says hostile things, something else."""
    root = tmp_path_factory.mktemp("studio")
    shutil.copytree(asked_run, root / "first")
    shutil.copytree(asked_run, root / "deep" / "second")
    config = (root / "deep" / "second" / "config.yaml").read_text().replace("learning_rate: 0.01", "learning_rate: 0.5")
    (root / "deep" / "second" / "config.yaml").write_text(config)
    with RunLog.create(root / "odd", config_text=f"note: {HOSTILE!r}\n", seed=1, about={"model": HOSTILE}) as log:
        log.step(1, {HOSTILE: 1.0, "reward/total": 2.0})
    (root / "notes").mkdir()
    (root / "secret.txt").write_text("secret")
    return root


class Tags(HTMLParser):
    """The tags of a page; what stands in a script is text."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def loads_or_runs(html):
    """Tags of a page that could act; its own are three scripts."""
    return [tag for tag in Tags(html).found if tag in ("script", "img", "iframe", "object", "embed", "link", "base")]


def client_of(app, base=HERE):
    return TestClient(app, base_url=base, headers={"accept": "*/*"})


@pytest.fixture
def app(runs):
    return server.application(runs)


@pytest.fixture
def client(app):
    with client_of(app) as client:
        yield client


@pytest.fixture
def post(client, app):
    def post(path, body=None, **headers):
        ours = {"origin": HERE, "x-pertoken": app.page_token, "content-type": "application/json"}
        kept = {name: value for name, value in (ours | headers).items() if value is not None}
        return client.post(path, content=json.dumps(body or {}), headers=kept)

    return post


# --- looking ------------------------------------------------------------------------------------------------


def test_the_table_has_every_run_with_its_verdict_and_metric(client, runs):
    text = client.get("/").text
    assert re.findall(r'<a href="/run/([^"]+)">', text) == ["deep/second", "first", "odd"]
    change = RunReader(runs / "first").evaluations()
    before, after = (row["metrics"]["rouge_l"] for row in (change[0], change[-1]))
    row = text.split('<a href="/run/first">')[1].split("</tr>")[0]
    assert f"{before:.4g} → {after:.4g}<small>ROUGE-L</small>" in row
    assert ">finished<" in row
    assert "3 of 3" in row
    assert ">killed<" in text.split('<a href="/run/odd">')[1].split("</tr>")[0]


def test_the_table_is_read_again_only_where_something_has_changed(runs, monkeypatch):
    listing = Listing(runs)
    listing.lines()
    monkeypatch.setattr("pertoken.studio.listing._line", lambda name, folder: pytest.fail(f"read {name} again"))
    assert len(listing.lines()) == 3


def test_a_damaged_run_is_a_line_like_others(asked_run, tmp_path):
    (shutil.copytree(asked_run, tmp_path / "torn") / "run.json").write_text("{")
    (line,) = Listing(tmp_path).lines()
    assert (line.name, line.status) == ("torn", "damaged")


def test_a_run_itself_can_be_looked_at(asked_run):
    assert list(Listing(asked_run).folders()) == ["first"]
    with client_of(server.application(asked_run)) as client:
        assert client.get("/run/first").status_code == 200


def test_the_page_of_a_run_is_the_report_with_more_to_do(client, runs):
    text = client.get("/run/deep/second").text
    ids = re.findall(r'<section id="(\w+)">', text)
    assert ids == ["result", "tokens", "curves", "certificate", "configuration"]
    assert "connect-src 'self'" in text
    data = json.loads(text.split('id="run">')[1].split("</script>")[0])
    assert data["studio"]["run"] == "deep/second"
    assert data["studio"]["status"] == "finished"
    assert data["lists"]["training"]["id"]


def test_hostile_text_stays_text(client):
    for path in ("/", "/run/odd", "/compare?run=odd&run=first"):
        text = client.get(path).text
        assert "<script>document.title" not in text
        assert "<img src=x" not in text
        assert loads_or_runs(text) == ["script"] * 3
    assert "<script>" not in client.get("/runs.json").json()["table"]
    now = client.get("/live/odd").json()
    assert not any("<script" in html or "<img" in html for html in (*now["sections"].values(), now["summary"]))


def test_what_a_problem_says_is_text_too(client):
    found = client.get(f"/run/{'%3Cscript%3E'}", headers={"accept": "text/html"})
    assert found.status_code == 404
    assert "&lt;script&gt;" in found.text
    assert loads_or_runs(found.text) == ["script"] * 3


@pytest.mark.parametrize(
    "name",
    ["..", "../secret.txt", "../../etc/passwd", "/etc/passwd", "first/..", "first/../../secret.txt", "notes", ".", "",
     "first/config.yaml", "first/", "first\0", "FIRST", "deep", "./first"],
)  # fmt: skip
def test_names_lead_nowhere_but_to_runs(app, post, name):
    for beginning in ("/run/", "/live/", "/models/"):
        status, text = asked_raw(app, beginning + name)
        assert status == 404
        assert "secret" not in text.replace("secret.txt", "")
    if name:
        for beginning in ("/stop/", "/resume/", "/ask/", "/speak/"):
            assert post(beginning + quote(name, safe="").replace(".", "%2E")).status_code == 404


def asked_raw(app, path):
    """GET of a path as it stands: clients take dots out of it before they send it."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": "GET", "scheme": "http", "http_version": "1.1", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [(b"host", b"127.0.0.1:8600")],
        "server": ("127.0.0.1", 8600), "client": ("127.0.0.1", 1), "extensions": {},
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


def test_a_link_out_of_the_folder_is_no_run(asked_run, tmp_path):
    (tmp_path / "inside").symlink_to(asked_run)
    assert Listing(tmp_path).folders() == {}


def test_following_a_run_tells_what_is_new_and_nothing_else(tmp_path):
    with (
        RunLog.create(tmp_path / "run", config_text="", seed=0) as log,
        client_of(server.application(tmp_path)) as client,
    ):
        page = client.get("/run/run").text
        seen = json.loads(page.split('id="run">')[1].split("</script>")[0])["studio"]
        assert seen["status"] == "running"
        where = f"/live/run?metrics={seen['metrics']}&samples={seen['samples']}"
        assert "page" not in client.get(where).json()
        log.step(1, {"reward/total": 0.25})
        now = client.get(where).json()
        assert "scenes" not in now["page"]
        assert now["page"]["charts"][0]["data"][0]["y"] == [0.25]
        assert 'data-chart="0"' in now["sections"]["curves"]
        where = f"/live/run?metrics={now['metrics']}&samples={now['samples']}"
        assert "page" not in client.get(where).json()
        record = {"item": "i", "group": 0, "stop": "eos", "prompt": "a", "answer": "b", "completion": "b"}
        tokens = {"id": [1, 2], "piece": ["a", "b"], "action": [0, 1]}
        log.episodes(1, [record | {"tokens": tokens, "streams": {"reward/total": [0, 1]}}])
        log.step(2, {"reward/total": 0.5})
        now = client.get(where).json()
        assert now["page"]["lists"]["training"]["id"] == ["1.0"]
    assert client.get(where).json()["status"] == "killed"


def test_versions_change_with_the_files(runs):
    now = version(runs / "first")
    assert version(runs / "first") == now
    os.utime(runs / "first" / "metrics.jsonl")
    assert version(runs / "first")["metrics"] != now["metrics"]
    assert version(runs / "first")["samples"] == now["samples"]


def test_runs_are_compared_curve_by_curve_and_setting_by_setting(client, runs):
    text = client.get("/compare?run=first&run=deep/second").text
    data = json.loads(text.split('id="run">')[1].split("</script>")[0])
    assert all({trace["name"] for trace in chart["data"]} == {"first", "deep/second"} for chart in data["charts"])
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert "ROUGE-L" in titles
    at = titles.index("ROUGE-L")
    rows = [row for row in RunReader(runs / "first").evaluations()]
    assert data["charts"][at]["data"][0]["y"] == [row["metrics"]["rouge_l"] for row in rows]
    settings = text.split("Settings that differ")[1]
    assert re.findall(r'<tr><th scope="row">(.*?)</th>', settings) == ["update.learning_rate"]
    assert text.count("Split validation") == 2


@pytest.mark.parametrize("query", ["", "run=first", "run=first&run=first", "&".join(["run=first"] * 9)])
def test_one_run_is_not_compared(client, query):
    found = client.get(f"/compare?{query}")
    assert found.status_code == 400
    assert "choose 2 to 8 runs" in found.json()["error"]


def test_the_playground_offers_the_runs(client):
    assert re.findall(r'<option value="([^"]+)">', client.get("/playground").text) == ["deep/second", "first", "odd"]
    assert client.get("/models/first").json() == {"models": ["before", "step-1", "step-2", "step-3", "trained"]}


def test_pages_without_charts_are_small(client):
    assert len(client.get("/").content) < 120_000
    assert len(client.get("/playground").content) < 120_000


def test_pages_load_nothing_from_elsewhere(client):
    for path in ("/", "/run/first", "/compare?run=first&run=deep/second", "/playground", "/new", "/nothing"):
        html = re.sub(r"<script.*?</script>", "", client.get(path).text, flags=re.DOTALL)
        assert not re.findall(r"""(?:src|href|action)=["']?(?:https?:|//)""", html)


# --- asking -------------------------------------------------------------------------------------------------


def test_questions_are_answered(post):
    found = post("/ask/first", {"question": "alternatives", "sample": "2.1", "model": "step-1", "count": 4})
    places = found.json()["answer"]
    assert [len(place["others"]) for place in places] == [4] * 6
    assert set(places[0]) == {"chosen", "rank", "entropy", "others"}
    ids = [places[0]["chosen"]["token"]]
    body = {"question": "what_if", "sample": "2.1", "token": 0, "ids": ids, "samples": 2}
    answer = post("/ask/first", body).json()["answer"]
    assert answer["effect"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert answer["onward"] == answer["onward_instead"]
    assert len(post("/ask/first", {"question": "difference", "sample": "2.1"}).json()["answer"]) == 6
    assert set(post("/ask/first", {"question": "causes", "sample": "2.1"}).json()["answer"]) == {"parts", "notes"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"question": "what"}, "question"),
        ({"question": "alternatives"}, "sample"),
        ({"question": "alternatives", "sample": "2.1", "more": 1}, "more"),
        ({"question": "what_if", "sample": "2.1", "token": 0, "samples": 100_000}, "samples"),
        ({"question": "alternatives", "sample": "../../x"}, "expected STEP.SAMPLE"),
        ({"question": "alternatives", "sample": "2.1", "model": "../../model"}, "no model"),
    ],
)
def test_a_question_that_cannot_be_asked_is_refused_in_words(post, body, words):
    found = post("/ask/first", body)
    assert found.status_code in (400, 404)
    assert words in found.json()["error"]


def test_a_body_without_end_is_refused(client, app):
    headers = {"origin": HERE, "x-pertoken": app.page_token, "content-type": "application/json"}
    found = client.post("/ask/first", content=b" " * (server.MOST_BYTES + 1), headers=headers)
    assert found.status_code == 400


def test_an_answer_comes_token_by_token(post):
    body = {"prompt": "say 1:", "model": "before", "chat": False, "sampling": {"max_new_tokens": 5}, "seed": 2}
    found = post("/speak/first", body)
    rows = [json.loads(line) for line in found.text.splitlines()]
    assert rows[0] == {"begun": True}
    assert 1 <= len(rows[1:]) <= 5
    assert all(set(row) == {"piece", "logprob", "entropy"} for row in rows[1:])
    assert post("/speak/first", body).text == found.text
    assert post("/speak/first", body | {"seed": 3}).text != found.text


def test_what_goes_wrong_on_the_way_is_told_at_the_end(post):
    found = post("/speak/first", {"prompt": "say", "model": "none"})
    assert "no model 'none'" in json.loads(found.text.splitlines()[-1])["error"]
    found = post("/speak/first", {"prompt": "x" * 500, "chat": False})
    assert "Shorten" in json.loads(found.text.splitlines()[-1])["error"]


def test_numbers_that_are_none_are_null():
    assert pages.as_json({"a": float("-inf"), "b": pages._Json("[1]")}) == b'{"a":null,"b":[1]}\n'
    assert pages.as_json({"b": pages._Json("[1]")}) == b'{"b":[1]}\n'
    assert encode({"a": float("nan")}) == pages.as_json({"a": float("nan")})


# --- doing --------------------------------------------------------------------------------------------------

WRITES = """
import signal, sys, time
from pertoken.tracking import RunLog
log = RunLog.create(sys.argv[1], config_text="", seed=0)
signal.signal(signal.SIGTERM, lambda *_: (log.finish("interrupted", "asked"), log.close(), sys.exit(0)))
print("begun", flush=True)
time.sleep(60)
"""


def test_a_run_that_goes_on_is_asked_to_end(tmp_path):
    app = server.application(tmp_path)
    headers = {"origin": HERE, "x-pertoken": app.page_token, "content-type": "application/json"}
    other = subprocess.Popen([sys.executable, "-c", WRITES, tmp_path / "run"], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"begun\n"
        with client_of(app) as client:
            found = client.post("/stop/run", content="{}", headers=headers)
            assert f"asked process {other.pid} on " in found.json()["said"]
            assert other.wait(20) == 0
            assert RunReader(tmp_path / "run").run()["status"] == "interrupted"
            assert "nothing to stop" in client.post("/stop/run", content="{}", headers=headers).json()["error"]
    finally:
        other.kill()
        other.wait()


def test_a_writer_on_another_machine_is_left_alone(tmp_path, monkeypatch):
    from pertoken.tracking import lock

    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("nobody here"))
    with RunLog.create(tmp_path / "run", config_text="", seed=0):
        told = json.loads((tmp_path / "run" / lock.WRITER).read_text()) | {"host": "elsewhere"}
        (tmp_path / "run" / lock.WRITER).write_text(json.dumps(told))
        with pytest.raises(RunFolderError, match="end it there"):
            lock.ask_to_end(tmp_path / "run")


def test_resuming_goes_on_in_a_process_of_its_own(asked_run, tmp_path, monkeypatch):
    folder = shutil.copytree(asked_run, tmp_path / "run")
    begun = []
    real = subprocess.Popen

    def started(command, **options):
        begun.append(command)
        return real([sys.executable, "-c", "print('going on')"], **options)

    monkeypatch.setattr(subprocess, "Popen", started)
    app = server.application(tmp_path)
    headers = {"origin": HERE, "x-pertoken": app.page_token, "content-type": "application/json"}
    with client_of(app) as client:
        assert "goes on with the run" in client.post("/resume/run", content="{}", headers=headers).json()["said"]
    assert begun[0][1:] == ["-m", "pertoken.cli", "train", "--resume", str(folder)]
    end = time.monotonic() + 10
    while (folder / "studio.log").read_text() != "going on\n" and time.monotonic() < end:
        time.sleep(0.05)
    assert (folder / "studio.log").read_text() == "going on\n"


def test_a_run_that_goes_on_is_not_resumed(tmp_path):
    app = server.application(tmp_path)
    headers = {"origin": HERE, "x-pertoken": app.page_token, "content-type": "application/json"}
    with RunLog.create(tmp_path / "run", config_text="", seed=0), client_of(app) as client:
        found = client.post("/resume/run", content="{}", headers=headers)
    assert "is being written by" in found.json()["error"]


# --- who may ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost:8600", "127.0.0.1:9999", "[::1]:8600", "LOCALHOST"])
def test_our_own_names_are_ours(client, host):
    assert client.get("/runs.json", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8600", "localhost.evil.example", "10.0.0.7", ""]
)
def test_a_name_that_somebody_pointed_here_is_refused(client, host):
    """DNS rebinding: the browser believes that the site is here, and says the name of the site."""
    for path in ("/", "/run/first", "/nothing"):
        assert client.get(path, headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": None}, {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "https://127.0.0.1:8600"},
        {"origin": "http://127.0.0.1:1"}, {"x-pertoken": None}, {"x-pertoken": "guess"}, {"x-pertoken": "é"},
        {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"},
    ],
)  # fmt: skip
def test_nothing_is_done_for_a_page_of_somebody_else(post, monkeypatch, headers):
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("resumed"))
    latin = {name: value.encode("latin-1") if value else value for name, value in headers.items()}
    for path in ("/resume/first", "/stop/first", "/ask/first", "/speak/first"):
        assert post(path, **latin).status_code == 403


@pytest.mark.parametrize("path", ["/resume/first", "/stop/first", "/ask/first", "/speak/first"])
def test_to_look_does_nothing(client, path):
    assert client.get(path).status_code == 405


def test_answers_cannot_be_framed_or_read_by_others(client):
    for path in ("/", "/runs.json", "/nothing"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers


def test_each_page_allows_its_own_scripts_and_no_request_elsewhere(client):
    import base64
    import hashlib

    for path in ("/", "/run/first", "/playground"):
        text = client.get(path).text
        policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
        assert policy.startswith("default-src 'none';")
        scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        source = re.search(r'<script type="text/plain" id="plotly"(?: data-source="(.*?)")?></script>', text)[1]
        scripts.insert(0, client.get(source).text if source else "")
        digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        assert re.search(r"script-src (.*?);", policy)[1] == " ".join(f"'sha256-{digest}'" for digest in digests)


def test_the_library_of_charts_is_sent_once(client):
    first = client.get("/plotly.js")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/plotly.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/").headers["cache-control"] == "no-store"


def test_from_other_machines_nothing_is_told_without_the_token(runs):
    app = server.application(runs, "0.0.0.0")
    assert not is_local("0.0.0.0")
    with client_of(app, "http://10.1.2.3:8600") as client:
        for path in ("/", "/runs.json", "/?token=guess", "/?token=", "/run/first"):
            assert client.get(path).status_code == 401
        assert client.get("/", cookies={COOKIE: "guess"}).status_code == 401
        first = client.get(f"/run/first?token={app.access_token}&a=b", follow_redirects=False)
        assert (first.status_code, first.headers["location"]) == (303, "/run/first?a=b")
        cookie = first.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        client.cookies.set(COOKIE, app.access_token)
        assert client.get("/runs.json").status_code == 200
        assert client.get("/", headers={"host": "evil.example"}).status_code == 421
        assert client.post("/resume/first").status_code == 403


def test_the_link_cannot_lead_elsewhere(runs):
    app = server.application(runs, "0.0.0.0")
    with client_of(app, "http://10.1.2.3:8600") as client:
        found = client.get(f"http://10.1.2.3:8600//evil.example/?token={app.access_token}", follow_redirects=False)
    assert found.headers["location"].startswith("/evil.example")


def test_tokens_are_new_each_time(runs):
    one, other = server.application(runs, "0.0.0.0"), server.application(runs, "0.0.0.0")
    assert len({one.page_token, other.page_token, one.access_token, other.access_token}) == 4
    assert len(one.access_token) >= 32


def test_an_address_that_cannot_be_had_is_named(runs):
    import socket

    pytest.importorskip("uvicorn", reason="needs the extra studio")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="choose another"):
        server.serve(runs, host="127.0.0.1", port=taken.getsockname()[1], on_address=print)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunFolderError, match="no folder"):
        server.application(tmp_path / "none")


def test_without_the_extra_it_says_what_to_install(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[studio\]'"):
        server.application(runs)


def test_it_serves_until_ctrl_c(runs):
    pytest.importorskip("uvicorn", reason="needs the extra studio")
    command = [sys.executable, "-m", "pertoken.cli", "studio", str(runs), "--port", "0"]
    going = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        from urllib.request import urlopen

        address = going.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with urlopen(f"{address}runs.json", timeout=20) as answer:
            assert "deep/second" in json.load(answer)["table"]
        going.send_signal(signal.SIGINT)
        assert going.wait(20) in (0, 130, -signal.SIGINT)
    finally:
        going.kill()
        going.wait()


def test_the_guard_refuses_what_is_no_request():

    sent = []

    async def app(scope, receive, send):
        pytest.fail("it has come through")

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app, "127.0.0.1")({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# --- new runs -----------------------------------------------------------------------------------------------


def test_the_form_has_every_setting_that_is_no_part_of_a_list():
    from pertoken.config import RunConfig, explain
    from pertoken.studio.launching import groups

    offered = [setting.name for settings in groups().values() for setting in settings]
    for name, kind, _, _ in explain(RunConfig):
        of_sections = "section" in kind or re.search(r"\b[A-Z]", kind)
        if not of_sections and not re.search(r"\.0|task\.tasks\.|task\.prompt\.|credit\.parts\.|^folder$", name):
            assert name in offered, name
    assert "folder" not in offered
    assert not [name for name in offered if ".0" in name or name.startswith("task.tasks.")]
    by_name = {setting.name: setting for settings in groups().values() for setting in settings}
    assert by_name["policy.precision"].options == ["auto", "float32", "bfloat16"]
    assert by_name["policy.compile"].options == ["true", "false"]
    assert by_name["seed"].options == by_name["stop.tokens"].options == []
    assert {"rl", "sft", "dpo"} <= set(by_name["method.type"].options)


def test_the_form_is_harmless_and_whole(client):
    text = client.get("/new").text
    assert 'data-name="update.learning_rate"' in text
    assert loads_or_runs(text) == ["script"] * 3
    assert re.findall(r'<option value="([^"]+)">', text)[:3] == ["deep/second", "first", "odd"]


def test_what_a_run_would_be_is_said_before_it_is_started(post, runs):
    found = post("/launch", {"settings": ["name=mine", "seed=4", "rewards=[{name: bleu}]"]}).json()
    assert found["said"] == f"would train in {runs / 'mine-4'}"
    assert "name: bleu" in found["config"]
    assert "seed: 4" in found["config"]
    based = post("/launch", {"base": "first", "settings": ["name=more"]}).json()["config"]
    assert "learning_rate: 0.01" in based
    assert f"folder: {runs / 'more-0'}" in based
    assert not (runs / "mine-4").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["update.learnin_rate=1"], "did you mean 'learning_rate'"),
        (["folder=/tmp/elsewhere"], "by its name and seed"),
        ([" folder =/tmp/elsewhere"], "folder"),
        (["name=../../elsewhere"], "name"),
        (["nonsense"], "expected key.sub=value"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_words(post, settings, words):
    found = post("/launch", {"settings": settings, "start": True})
    assert found.status_code == 400
    assert words in found.json()["error"]


def test_a_run_is_started_in_a_process_of_its_own(asked_run, tmp_path, monkeypatch):
    shutil.copytree(asked_run, tmp_path / "first")
    begun, real = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: begun.append(command) or real(["true"], **options)
    )
    app = server.application(tmp_path)
    headers = {"origin": HERE, "x-pertoken": app.page_token, "content-type": "application/json"}
    body = {"base": "first", "settings": ["name=again", "stop.steps=1"], "start": True}
    with client_of(app) as client:
        found = client.post("/launch", content=json.dumps(body), headers=headers)
        assert f"trains in {tmp_path / 'again-0'}" in found.json()["said"]
        taken = client.post("/launch", content=json.dumps(body | {"settings": ["name=again"]}), headers=headers)
    assert begun[0][1:] == ["-m", "pertoken.cli", "train", str(tmp_path / "again-0.yaml")]
    from pertoken.config import load_config

    config = load_config([tmp_path / "again-0.yaml"])
    assert (config.stop.steps, config.run_folder) == (1, tmp_path / "again-0")
    assert "choose another name" in taken.json()["error"]


def test_a_folder_that_is_taken_is_no_place_for_a_new_run(post, runs):
    (runs / "taken-0").mkdir(exist_ok=True)
    found = post("/launch", {"settings": ["name=taken"]})
    assert "choose another name or seed" in found.json()["error"]
