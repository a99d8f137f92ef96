"""Facts against graphs: what a text claims, by hand; verdicts with their evidence; a SPARQL evaluator as end point."""

import json
import sqlite3
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from pertoken.errors import ConfigError, RewardError
from pertoken.rewards import Facts
from pertoken.rewards.knowledge import Pattern, Triples, claims, load_graph

FACTS = [
    ("Tomaso Albinoni", "died", "Venice"),
    ("Johann Sebastian Bach", "died", "Leipzig"),
    ("Bach", "died", "Leipzig"),
    ("Gianni Versace S.p.A.", "seat", "Milan"),
    ("Kewpee", "seat", "Lima"),
    ("Hauser & Wirth", "seat", "Zürich"),
    ("Singel", "country", "Netherlands"),
    ("Lima", "country", "Peru"),
    ("France", "neighbour", "Spain"),
    ("France", "neighbour", "Italy"),
    ("Peru", "neighbour", "Chile"),
    ("北京", "capital", "中国"),
    ("东京", "capital", "日本"),
]
PATTERNS = {
    "died": ["[X] died in [Y].", "[Y] is where [X] died."],
    "seat": ["The headquarters of [X] are in [Y].", "[X]'s headquarters are in [Y].", "[X] is located in [Y]."],
    "country": ["[X] is located in [Y]."],
    "neighbour": ["[X] borders [Y]."],
    "capital": ["[X]是[Y]的首都。"],
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The graph in each kind of file, and the patterns."""
    folder = tmp_path_factory.mktemp("facts")
    keys = ("subject", "relation", "object")
    rows = [dict(zip(keys, fact, strict=True)) for fact in FACTS]
    (folder / "graph.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "meta.jsonl").write_text("\n".join(json.dumps({"id": 1, "meta": row}) for row in rows), encoding="utf-8")
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        lines = [comma.join(keys), *(comma.join(fact) for fact in FACTS)]
        (folder / f"graph{suffix}").write_text("\n".join(lines), encoding="utf-8")
    with sqlite3.connect(folder / "graph.sqlite") as database:
        database.execute("CREATE TABLE triples (subject TEXT, relation TEXT, object TEXT)")
        database.executemany("INSERT INTO triples VALUES (?, ?, ?)", FACTS)
    database.close()
    lines = [json.dumps({"relation": name, "patterns": sentences}) for name, sentences in PATTERNS.items()]
    (folder / "patterns.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def facts(folder):
    return lambda graph="graph.jsonl", **settings: Facts(
        graph if "://" in graph else str(folder / graph), str(folder / "patterns.jsonl"), **settings
    )


@pytest.fixture
def found(make_episode, make_scene):
    """Findings as (text of the range, value, first word of the message)."""

    def of(reward, text):
        (sample,) = make_scene(make_episode(text)).samples
        return [(sample.text[s.start : s.stop], s.value, s.message.split(":")[0]) for s in reward.findings(sample)]

    return of


# --- verdicts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Tomaso Albinoni died in Venice.", [("Venice", 1.0, "supported")]),
        ("tomaso  albinoni DIED in venice", [("venice", 1.0, "supported")]),  # neither case nor spaces count
        ("Tomaso Albinoni died in Leipzig.", [("Leipzig", -1.0, "contradicted")]),
        ("Tomaso Albinoni died in Paris.", []),  # a name that the graph does not know
        ("Tomaso Albinoni died in Peru.", [("Peru", 0.0, "unknown")]),  # known, but nobody's place of death
        ("Leipzig is where Johann Sebastian Bach died.", [("Johann Sebastian Bach", 1.0, "supported")]),
        ("Leipzig is where Tomaso Albinoni died.", [("Tomaso Albinoni", -1.0, "contradicted")]),
        ("Gianni Versace S.p.A.'s headquarters are in Milan.", [("Milan", 1.0, "supported")]),
        ("The headquarters of Hauser & Wirth are in Lima", [("Lima", -1.0, "contradicted")]),
        ("headquarters of Kewpee are in Lima", []),  # the words before do not fit
        ("Kewpee’s headquarters are in Lima.", [("Lima", 1.0, "supported")]),  # either apostrophe
        ("Singel is located in the Netherlands.", [("Netherlands", 1.0, "supported")]),  # an article
        ("Kewpee is located in Lima.", [("Lima", 1.0, "supported")]),  # one of two relations of these words has it
        ("France borders Chile.", [("Chile", 0.0, "unknown")]),  # a relation of many objects contradicts nothing
        ("France borders Italy.", [("Italy", 1.0, "supported")]),
        ("Albinoni died in Venice.", []),  # no name of the graph
        ("Tomaso Albinoni lived in Venice.", []),  # no relation
        ("Tomaso Albinoni died in Veniceland.", []),  # names are whole words
        ("北京是中国的首都。", [("中国", 1.0, "supported")]),
        ("北京是日本的首都。", [("日本", -1.0, "contradicted")]),
        ("", []),
    ],
)
@pytest.mark.parametrize("graph", ["graph.jsonl", "graph.sqlite"])
def test_verdicts(graph, text, expected, facts, found):
    assert found(facts(graph), text) == expected


@pytest.mark.parametrize("graph", ["meta.jsonl", "graph.csv", "graph.tsv"])
def test_other_files_hold_the_same(graph, facts, found):
    assert found(facts(graph), "Bach died in Venice. Bach died in Leipzig.") == [
        ("Venice", -1.0, "contradicted"),
        ("Leipzig", 1.0, "supported"),
    ]


def test_the_evidence_is_in_the_message(facts, make_episode, make_scene):
    (sample,) = make_scene(make_episode("Tomaso Albinoni died in Leipzig.")).samples
    (span,) = facts().findings(sample)
    assert span.message == "contradicted: Tomaso Albinoni — died — Leipzig; the graph has Venice"


def test_a_fact_earns_once_and_costs_each_time(facts, found):
    """Else a policy would say the one thing that it knows again and again."""
    assert [value for _, value, _ in found(facts(), "Bach died in Leipzig. " * 3)] == [1.0, 0.0, 0.0]
    assert [value for _, value, _ in found(facts(), "Bach died in Venice. " * 3)] == [-1.0, -1.0, -1.0]
    both = "Leipzig is where Bach died. Bach died in Leipzig."  # in other words
    assert [value for _, value, _ in found(facts(), both)] == [1.0, 0.0]


def test_longest_names_are_read_first(facts, found):
    assert found(facts(), "Johann Sebastian Bach died in Leipzig.") == [("Leipzig", 1.0, "supported")]
    read = list(
        claims("Johann Sebastian Bach died in Leipzig.", [Pattern.of("died", "[X] died in [Y].")], Triples(FACTS))
    )
    assert [claim.subject for claim in read] == ["Johann Sebastian Bach", "Bach"]


def test_many_objects_by_hand(facts, found):
    assert found(facts(many=["died"]), "Bach died in Venice.") == [("Venice", 0.0, "unknown")]


def test_values_fall_on_the_tokens_of_the_name(facts, letters, make_episode, make_scene):
    text = "Bach died in Venice. Kewpee is located in Lima."
    values = facts(supported=2.0, contradicted=-3.0)(make_scene(make_episode(letters(text))))[0, 2:].tolist()
    at, there = text.index("Venice"), text.index("Lima")
    assert values[at : at + 6] == [-0.5] * 6
    assert values[there : there + 4] == [0.5] * 4
    assert sum(map(abs, values)) == 5.0


def test_a_claim_that_begins_in_the_prompt(facts, make_episode, make_scene):
    """As in cloze tasks; what the prompt says by itself earns nothing."""
    episode = make_episode(" Venice, and Bach died in Leipzig.")
    item = episode.item.__class__(id="1", prompt="Singel is located in Netherlands. Tomaso Albinoni died in")
    scene = make_scene(episode.__class__(**{**vars(episode), "item": item}))
    (sample,) = scene.samples
    assert [sample.text[s.start : s.stop] for s in facts(continues=True).findings(sample)] == ["Venice", "Leipzig"]
    assert [sample.text[s.start : s.stop] for s in facts().findings(sample)] == ["Leipzig"]
    assert facts(continues=True)(scene).sum() == 2.0


# --- an end point -----------------------------------------------------------------------------------------

QUERIES = {
    "objects": 'SELECT ?name WHERE {{ ?s <urn:name> "{subject}" ; <urn:{relation}> ?o . ?o <urn:name> ?name }}',
    "is_object": 'ASK {{ ?o <urn:name> "{name}" . ?s <urn:{relation}> ?o }}',
}


@pytest.fixture(scope="session")
def endpoint():
    """An address that answers as a SPARQL end point does, and how often each question was put."""
    rdflib = pytest.importorskip("rdflib")
    graph, asked = rdflib.Graph(), Counter()
    for subject, relation, thing in FACTS:
        nodes = [rdflib.URIRef("urn:" + name.replace(" ", "_")) for name in (subject, thing)]
        graph.add((nodes[0], rdflib.URIRef(f"urn:{relation}"), nodes[1]))
        for node, name in zip(nodes, (subject, thing), strict=True):
            graph.add((node, rdflib.URIRef("urn:name"), rdflib.Literal(name)))

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            (query,) = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["query"]
            asked[query] += 1
            body = graph.query(query).serialize(format="json")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/sparql", asked
    server.shutdown()


def test_an_end_point_gives_the_same_verdicts_and_is_asked_once(endpoint, facts, found):
    address, asked = endpoint
    reward = facts(address, queries=QUERIES)
    for _ in range(2):
        assert found(reward, "Tomaso Albinoni died in Venice.") == [("Venice", 1.0, "supported")]
        assert found(reward, "Bach died in Venice.") == [("Venice", -1.0, "contradicted")]
        assert found(reward, 'The "Bach\\ died in Paris.') == []
    assert set(asked.values()) == {1}


def test_an_end_point_that_is_down(facts, make_episode, make_scene):
    reward = facts("http://127.0.0.1:9/none")
    with pytest.raises(RewardError, match=r"episode '0'.*127\.0\.0\.1:9/none gave no answer to 'SELECT .*is the end"):
        reward(make_scene(make_episode("Bach died in Venice.")))


# --- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("{", "a.jsonl", r"a\.jsonl:1: not valid JSON"),
        ('{"subject": "a"}', "a.jsonl", r"a\.jsonl:1: expected the texts subject, relation and object"),
        ("subject,relation\na,b", "a.csv", r"a\.csv:2: expected the texts"),
        ("", "a.txt", r"ends in '\.txt'; expected \.jsonl"),
        ("no database", "a.db", r"a\.db: .*expected an SQLite database with a table triples"),
    ],
)
def test_a_graph_that_cannot_be_read(content, name, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_graph(str(tmp_path / name))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "patterns.jsonl:1: expected an object with relation and patterns"),
        ('{"relation": "a", "patterns": ["[X] is."]}', r"expected a sentence with \[X\], words, and \[Y\]"),
        ('{"relation": "a", "patterns": ["[X] [Y]"]}', r"expected a sentence with \[X\], words, and \[Y\]"),
        ('{"relation": 1, "patterns": []}', "expected a text as relation"),
        ("", "has no pattern"),
    ],
)
def test_patterns_that_cannot_be_read(line, message, folder, tmp_path):
    (tmp_path / "patterns.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=message):
        Facts(str(folder / "graph.jsonl"), str(tmp_path / "patterns.jsonl"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supported": -1.0}, "facts.supported: expected a number >= 0"),
        ({"contradicted": 1.0}, "facts.contradicted: expected a number <= 0"),
        ({"many": "died"}, "facts.many: expected a list"),
        ({"graph": "http://x", "queries": {"subjects": ""}}, "facts.queries: unknown"),
        ({"graph": "none.jsonl"}, "no file 'none.jsonl'"),
    ],
)
def test_settings_that_cannot_be(settings, message, folder):
    with pytest.raises(ConfigError, match=message):
        Facts(**{"graph": str(folder / "graph.jsonl"), "patterns": str(folder / "patterns.jsonl"), **settings})


# --- real facts -------------------------------------------------------------------------------------------

DATA = Path("/work/shared/data/knowledge")


@pytest.mark.skipif(not DATA.is_dir(), reason="the data are not at hand")
def test_wikidata_sentences_get_the_verdicts_that_they_deserve(found):
    """Cloze sentences of 18,000 facts with their own objects, and with an object of another subject."""
    reward = Facts(str(DATA / "train.jsonl"), str(DATA / "relations.jsonl"))
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[::60]]
    right, wrong, read = Counter(), Counter(), 0
    others: dict[str, str] = {}
    for row in rows:
        relation, thing = row["meta"]["relation"], row["meta"]["object"]
        verdicts = found(reward, f"{row['prompt']} {thing}.")
        read += bool(verdicts)
        right.update(word for *_, word in verdicts[-1:])
        if (other := others.get(relation)) and other != thing:
            wrong.update(word for *_, word in found(reward, f"{row['prompt']} {other}.")[-1:])
        others[relation] = thing
    assert read > 0.8 * len(rows)  # some prompts are in words that no pattern has
    assert right["supported"] > 0.97 * right.total()
    assert wrong["contradicted"] > 0.7 * wrong.total()
    assert wrong["supported"] < 0.1 * wrong.total()  # relations of many objects, and chance
