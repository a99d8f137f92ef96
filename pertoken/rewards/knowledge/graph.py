"""Graphs of facts: triples of subject, relation and object, by their names.

A graph answers questions about names, whatever it is kept in: a file (JSON lines, CSV, TSV), an SQLite database, or
a SPARQL end point.
"""

import functools
import json
import sqlite3
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import regex

from pertoken.errors import ConfigError, RewardError
from pertoken.rows import READERS, Row, rows_of

Triple = tuple[str, str, str]
"""Subject, relation, object."""

SEVERAL = 0.02
"""A relation of which more than this share of the subjects have several objects is one of many objects: that a graph
has another object for a subject then contradicts nothing."""


@runtime_checkable
class Graph(Protocol):
    """What is known, by name. Names are compared as `normal` has them."""

    def may_name(self, text: str) -> bool:
        """Whether `text` can be the name of a subject or an object."""
        ...

    def objects(self, subject: str, relation: str) -> tuple[str, ...]:
        """All objects that the subject has by the relation; () if nothing is known."""
        ...

    def is_object(self, name: str, relation: str) -> bool:
        """Whether any subject has an object of this name by the relation."""
        ...

    def has_many(self, relation: str) -> bool:
        """Whether a subject may have several objects by the relation."""
        ...


def normal(name: str) -> str:
    """How names are compared: case, spaces and marks at the ends do not count.

    >>> normal("  The  S.p.A. ")
    'the s.p.a'
    """
    return str(regex.sub(r"^[^\w]+|[^\w]+$", "", " ".join(name.split()))).casefold()


class Triples:
    """A graph in memory."""

    def __init__(self, triples: Iterable[Triple]) -> None:
        self._objects: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
        self._named: dict[str, set[str]] = defaultdict(set)
        self._names: set[str] = set()
        for subject, relation, thing in triples:
            self._objects[normal(subject), relation].setdefault(normal(thing), thing)
            self._named[relation].add(normal(thing))
            self._names |= {normal(subject), normal(thing)}
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for (_, relation), things in self._objects.items():
            counts[relation][0] += len(things) > 1
            counts[relation][1] += 1
        self._many = {relation for relation, (several, all_) in counts.items() if several > SEVERAL * all_}

    def may_name(self, text: str) -> bool:
        return normal(text) in self._names

    def objects(self, subject: str, relation: str) -> tuple[str, ...]:
        return tuple(self._objects.get((normal(subject), relation), {}).values())

    def is_object(self, name: str, relation: str) -> bool:
        return normal(name) in self._named.get(relation, ())

    def has_many(self, relation: str) -> bool:
        return relation in self._many


class Database:
    """A graph in an SQLite file: a table `triples` with the columns subject, relation and object; only read.

    For a large one: `CREATE INDEX by_subject ON triples (subject COLLATE NOCASE)`, and the same of `object`.
    """

    def __init__(self, path: Path) -> None:
        try:
            # One connection for all threads, one of them at a time: a reward may run in a thread of its own.
            self._open = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False)
            self._lock = threading.Lock()
            self._rows("SELECT subject, relation, object FROM triples LIMIT 1")
        except sqlite3.Error as error:
            raise ConfigError(
                f"facts.graph: {path}: {error}; expected an SQLite database with a table "
                "triples(subject, relation, object)"
            ) from error

    def may_name(self, text: str) -> bool:
        query = "SELECT 1 FROM triples WHERE {} COLLATE NOCASE IN (?, ?) LIMIT 1"
        return any(self._rows(query.format(column), *_spellings(text)) for column in ("subject", "object"))

    def objects(self, subject: str, relation: str) -> tuple[str, ...]:
        query = "SELECT object FROM triples WHERE subject COLLATE NOCASE IN (?, ?) AND relation = ? ORDER BY rowid"
        return tuple(dict.fromkeys(row[0] for row in self._rows(query, *_spellings(subject), relation)))

    def is_object(self, name: str, relation: str) -> bool:
        query = "SELECT 1 FROM triples WHERE object COLLATE NOCASE IN (?, ?) AND relation = ? LIMIT 1"
        return bool(self._rows(query, *_spellings(name), relation))

    def has_many(self, relation: str) -> bool:
        return relation in self._many

    @functools.cached_property
    def _many(self) -> frozenset[str]:
        rows = self._rows(
            "SELECT relation, AVG(things > 1.0) FROM (SELECT relation, COUNT(DISTINCT object COLLATE NOCASE) AS things "
            "FROM triples GROUP BY relation, subject COLLATE NOCASE) GROUP BY relation"
        )
        return frozenset(relation for relation, share in rows if share > SEVERAL)

    def _rows(self, query: str, *values: str) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._open.execute(query, values).fetchall()


def _spellings(name: str) -> tuple[str, str]:
    """As SQLite compares them, without case for ASCII letters: a name may end in the full stop of an abbreviation."""
    spaced = " ".join(name.split())
    return spaced, spaced + "."


WIKIDATA = {
    "objects": 'SELECT DISTINCT ?name WHERE {{ ?s rdfs:label "{subject}"@{language} ; wdt:{relation} ?o . '
    '?o rdfs:label ?name . FILTER(LANG(?name) = "{language}") }} LIMIT 100',
    "is_object": 'ASK {{ ?o rdfs:label "{name}"@{language} . ?s wdt:{relation} ?o }}',
}
"""Questions as Wikidata's end point takes them; other vocabularies have others (`facts.queries`)."""


class Endpoint:
    """A graph behind a SPARQL end point. It cannot be asked for every word, so only capitals begin names here, and
    answers are remembered."""

    def __init__(
        self, url: str, *, queries: Mapping[str, str] = {}, language: str = "en", seconds: float = 20.0
    ) -> None:
        self._url, self._seconds, self._language = url, seconds, language
        unknown = queries.keys() - WIKIDATA.keys()
        if unknown:
            raise ConfigError(f"facts.queries: unknown {sorted(unknown)}; known: {', '.join(WIKIDATA)}")
        self._queries = {**WIKIDATA, **queries}
        self._answer = functools.lru_cache(maxsize=100_000)(self._ask)

    def may_name(self, text: str) -> bool:
        return text[:1].isupper() or text[:1].isdecimal()

    def objects(self, subject: str, relation: str) -> tuple[str, ...]:
        found = self._answer("objects", ("subject", subject), ("relation", relation))
        rows = found.get("results", {}).get("bindings", [])
        return tuple(value["value"] for row in rows for value in row.values())

    def is_object(self, name: str, relation: str) -> bool:
        return bool(self._answer("is_object", ("name", name), ("relation", relation)).get("boolean", False))

    def has_many(self, relation: str) -> bool:
        return False

    def _ask(self, question: str, *names: tuple[str, str]) -> dict[str, Any]:
        values = {key: _escaped(value) for key, value in names}
        query = self._queries[question].format(**values, language=self._language)
        request = urllib.request.Request(
            self._url,
            urllib.parse.urlencode({"query": query}).encode(),
            {"Accept": "application/sparql-results+json", "User-Agent": "pertoken"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                found = json.load(answer)
        except (OSError, ValueError) as error:
            raise RewardError(
                f"facts: {self._url} gave no answer to {query!r} ({error}); is the end point up?"
            ) from error
        if not isinstance(found, dict):
            raise RewardError(f"facts: {self._url} answered {str(found)[:80]!r}, expected SPARQL results in JSON")
        return found


def _escaped(value: str) -> str:
    """Inside of a SPARQL string."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ").replace("\r", " ")


def load_graph(source: str, *, queries: Mapping[str, str] = {}, language: str = "en") -> Graph:
    """The graph at `source`: the path of a file, or the address of a SPARQL end point.

    A file is JSON lines, JSON, CSV, TSV or Parquet, with the columns subject, relation and object (which may lie under
    `meta`), or an SQLite database with a table of that shape.
    """
    if source.startswith(("http://", "https://")):
        return Endpoint(source, queries=queries, language=language)
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"facts.graph: no file {source!r}; expected {', '.join(READERS)}, .sqlite or .db, or an address"
        )
    if path.suffix in (".sqlite", ".sqlite3", ".db"):
        return Database(path)
    if path.suffix not in READERS:
        raise ConfigError(
            f"facts.graph: {source!r} ends in {path.suffix!r}; expected {', '.join(READERS)}, .sqlite or .db"
        )
    return Triples(_triple(row, f"{path}:{line}") for line, row in rows_of(path))


def _triple(row: Row | str, where: str) -> Triple:
    if isinstance(row, str):
        raise ConfigError(f"{where}: {row}")
    fields = row if "subject" in row else row.get("meta") or {}
    found = [fields.get(key) for key in ("subject", "relation", "object")] if isinstance(fields, dict) else []
    parts = [part for part in found if isinstance(part, str) and part.strip()]
    if len(parts) != 3:
        raise ConfigError(f"{where}: expected the texts subject, relation and object, got {str(row)[:120]}")
    return parts[0], parts[1], parts[2]
