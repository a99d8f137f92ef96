"""Formats and banned content, by hand; the cost falls where the form breaks."""

import json
import sys
from importlib.util import find_spec

import jaxtyping
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from pertoken.errors import ConfigError, MissingExtraError, RewardError
from pertoken.rewards import Banned, Format, form

needs_jsonschema = pytest.mark.skipif(not find_spec("jsonschema"), reason="needs jsonschema (the extra form)")


@pytest.fixture
def values(make_episode, make_scene, letters):
    """What each character of an ASCII text earns, if each is a token."""
    return lambda reward, text: reward(make_scene(make_episode(letters(text))))[0, 2:].tolist()


@pytest.fixture
def found(make_episode, make_scene):
    """The findings as (text of the range, value, message)."""

    def of(reward, text):
        (sample,) = make_scene(make_episode(text)).samples
        return [(sample.text[s.start : s.stop], pytest.approx(s.value), s.message) for s in reward.findings(sample)]

    return of


# ---- patterns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab12", [0.25, 0.25, 0.25, 0.25]),
        ("ab1x", [0, 0, 0, -1]),  # the x can be part of no match
        ("a?12", [0, -1, 0, 0]),  # what follows costs nothing
        ("ab1", [0, 0, -1]),  # a second digit is missing: the token that it should follow
    ],
)
def test_a_pattern_pays_all_or_costs_where_no_match_is_possible_any_more(text, expected, values):
    assert values(Format(pattern=r"[a-z]+\d\d"), text) == expected


def test_parts_earn_where_they_are_and_cost_the_end(values):
    reward = Format(parts=["ab", r"\d"], reward=2.0, cost=4.0)
    assert values(reward, "xab") == [0, 0.5, 0.5 - 2]
    assert values(reward, "xab7") == [0, 0.5, 0.5, 1]


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab1", max_size=8))
def test_the_break_is_the_first_character_that_no_continuation_mends(text, make_episode, make_scene):
    """Against every continuation of up to 4 characters, written out."""
    pattern = "(ab|b1)*1?"
    continuations = ["", *"ab1", "b1", "1b", "b1b"]
    viable = [any(regex.fullmatch(pattern, text[:k] + more) for more in continuations) for k in range(len(text) + 1)]
    (sample,) = make_scene(make_episode(text, eos=True)).samples
    (finding,) = Format(pattern=pattern).findings(sample)
    if regex.fullmatch(pattern, text):
        assert (finding.start, finding.stop, finding.value) == (0, len(text), 1)
    else:
        broken = viable.index(False) - 1 if False in viable else len(text)
        assert (finding.start, finding.value) == (broken, -1)


# ---- JSON -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1]", [1 / 3, 1 / 3, 1 / 3]),
        ("[1 2]", [0, 0, 0, -1, 0]),
        ("[1", [0, -1]),
        ("", []),
        ("[NaN]", [0, -1, 0, 0, 0]),
    ],
)
def test_json_costs_where_the_decoder_stops(text, expected, values):
    assert values(Format(json=True), text) == pytest.approx(expected)


def test_each_span_is_json_of_its_own(values, found):
    reward = Format(within=r"<(.*?)>")
    assert values(reward, "<1> <x>") == [0, 0.5, 0, 0, 0, -0.5, 0]
    assert found(reward, "none") == [("", -1, "no '<(.*?)>' in the text")]


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000])
def test_json_that_python_cannot_read_costs_all_of_it(text, found):
    ((where, value, _),) = found(Format(json=True), text)
    assert value == -1
    assert len(where) >= 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(value=JSON, indent=st.sampled_from([None, 2]), ascii_only=st.booleans())
def test_every_value_is_found_where_it_stands(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    places = dict(form._places(text, 0, ()))
    for path, (start, stop) in places.items():
        inner = value
        for key in path:
            inner = inner[key]
        assert json.loads(text[start:stop]) == inner
    assert places[()] == (0, len(text))


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["age"],
}


@needs_jsonschema
def test_the_value_that_the_schema_refuses_pays(values, found):
    text = '{"age": 1, "tags": ["a", 22, 33]}'
    refused = found(Format(schema=SCHEMA, cost=3.0), text)
    assert [finding[:2] for finding in refused] == [("22", -1.5), ("33", -1.5)]
    assert "22 is not of type 'string'" in refused[0][2]
    paid = values(Format(schema=SCHEMA), text)
    assert {text[k]: paid[k] for k in range(len(text)) if paid[k]} == {"2": -0.25, "3": -0.25}
    assert found(Format(schema=SCHEMA), "{}") == [("{}", -1, "'age' is a required property")]
    assert found(Format(schema=SCHEMA), '{"age": 1}')[0][:2] == ('{"age": 1}', 1)


@needs_jsonschema
def test_a_schema_may_be_a_file_and_its_references_stay_at_home(tmp_path, make_episode, make_scene):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert Format(schema=str(path))(make_scene(make_episode('{"age": 1}'))).sum().item() == pytest.approx(1)
    elsewhere = Format(schema={"$ref": path.as_uri()})
    with pytest.raises(RewardError, match=r"schema\.json"):
        elsewhere(make_scene(make_episode("{}")))


def test_without_its_package_a_schema_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pertoken\[form\]'"):
        Format(schema=SCHEMA)


# ---- banned -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text", "hits"),
    [
        (["ass"], "class ass Ass. assess ass-", ["ass", "Ass", "ass"]),
        (["new york"], "New\n York, newyork", ["New\n York"]),
        (["york", "new york"], "new york york", ["new york", "york"]),
        (["坏词"], "这是坏词语", ["坏词"]),
        (["cat"], "猫cat猫 cats", ["cat"]),
        (["straße"], "STRASSE Straßen", ["STRASSE"]),
        (["c++"], "c++ or C++11", ["c++", "C++"]),
        (["über"], "Über überall", ["Über"]),
    ],
)
def test_words_match_whole_whatever_their_case(words, text, hits, found):
    assert found(Banned(words=words), text) == [(hit, -1, f"banned: {hit!r}") for hit in hits]


def test_a_hit_costs_the_tokens_of_its_characters(values):
    assert values(Banned(words=["bad"], cost=3.0), "a bad b") == [0, 0, -1, -1, -1, 0, 0]


def test_case_may_count_and_patterns_are_searched(found):
    assert [hit for hit, *_ in found(Banned(words=["No"], ignore_case=False), "no No NO")] == ["No"]
    assert [hit for hit, *_ in found(Banned(patterns=[r"\d{3,}"], words=["x"]), "12 x 345")] == ["x", "345"]


def test_a_file_has_a_word_on_each_line(tmp_path, found):
    path = tmp_path / "words.txt"
    path.write_text("# comment\nbad word\n\n坏\n", encoding="utf-8")
    assert [hit for hit, *_ in found(Banned(file=str(path)), "Bad word: 坏 #")] == ["Bad word", "坏"]


# ---- faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Format, "set pattern, parts, json, within or schema"),
        (lambda: Format(pattern="(a"), r"format.pattern: expected a regular expression, got '\(a'.*backslash"),
        (lambda: Format(parts=["a", "["]), r"format.parts.1: expected a regular expression"),
        (lambda: Format(parts="abc"), r"format.parts: expected a list of regular expressions, got 'abc'"),
        (lambda: Format(within="*"), "format.within: expected a regular expression"),
        (Banned, "set words, patterns or file"),
        (lambda: Banned(words="bad"), "banned.words: expected a list of words, got 'bad'"),
        (lambda: Banned(words=["a", " "]), "banned.words: an empty word"),
        (lambda: Banned(patterns=["x*"]), r"'x\*' matches the empty text"),
        (lambda: Banned(file="/nowhere/words.txt"), "banned.file: '/nowhere/words.txt' cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@needs_jsonschema
@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"age": {"type": "number of years"}}}, r"format.schema: at \$.properties.age.type: expected a"),
        (3, "expected a mapping such as"),
        ("/nowhere.json", r"format.schema \(/nowhere.json\): expected the path of a JSON file"),
    ],
)
def test_a_schema_that_is_none_is_refused(schema, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker sees some of them first
    with pytest.raises(ConfigError, match=message):
        Format(schema=schema)


def test_a_pattern_without_end_is_cut_off(make_episode, make_scene, monkeypatch):
    monkeypatch.setattr(form, "SECONDS", 0.05)
    scene = make_scene(make_episode("a" * 40 + "b"))
    with pytest.raises(RewardError, match=r"Format, episode '0'.*took longer than 0.05 s.*repetitions inside"):
        Format(parts=[r"^(?:(?:a|aa)+)+$"])(scene)
