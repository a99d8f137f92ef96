"""Sentences against a collection of documents: found by words and by meaning, then held against what was found."""

import functools
import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pertoken.errors import ConfigError, TaskError
from pertoken.machine.cache import cache_folder
from pertoken.rewards.align import sentence_spans, word_spans
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.metrics.base import check_choice
from pertoken.rewards.semantics import EMBEDDED, encoder, judge_of
from pertoken.rows import READERS, rows_of

Search = Literal["words", "meaning", "both"]

SENTENCES = 4
"""Sentences of a passage."""
SHOWN = 160
"""Characters of a passage in a message."""


@dataclass(frozen=True)
class Documents(SampleReward):
    """Each sentence by what a collection of documents says of it, on the tokens of the sentence.

    The passages nearest to a sentence are looked up. With a `model` of entailment the sentence is supported or
    contradicted if one of them entails or contradicts it with a probability of at least `sure`; without one it is
    supported if a passage has at least that share of its words, rare ones counting more, and nothing contradicts it.
    Everything else is unknown, and neutral. A text is paid the mean over its sentences; one said again earns nothing.
    """

    path: str
    """The documents: a .txt file (a paragraph each), a table (.jsonl, .csv ...), or a folder of .txt and .md files."""
    column: str = "text"
    """Of a table: the column with the text."""
    search: Search = "words"
    """Find passages by their words, by their meaning (sentence embeddings), or half by each."""
    passages: int = 4
    """How many of them a sentence is held against."""
    model: str = ""
    """A classifier of entailment (see `entailment`); without one, words decide, and nothing is contradicted."""
    embeddings: str = EMBEDDED
    """A sentence-transformers model, for search by meaning."""
    sure: float = 0.7
    """Least probability of a verdict, or share of the words."""
    supported: float = 1.0
    """Earned by a text of supported sentences."""
    contradicted: float = -1.0
    """Paid by a text of contradicted ones."""

    def __post_init__(self) -> None:
        check_choice("documents.search", self.search, get_args(Search))
        if self.passages < 1 or not 0 < self.sure <= 1:
            raise ConfigError(f"documents: expected passages >= 1 and 0 < sure <= 1, got {self.passages}, {self.sure}")
        if self.supported < 0 or self.contradicted > 0:
            raise ConfigError(
                f"documents: expected supported >= 0 and contradicted <= 0, got {self.supported}, {self.contradicted}"
            )
        _ = self._collection

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span per sentence with its verdict, and the passage that it rests on."""
        spans = sentence_spans(sample.text)
        found, earned = [], set[str]()
        for start, stop in spans:
            sentence = sample.text[start:stop]
            sign, evidence = self._verdict(sentence)
            value = {1: self.supported, -1: self.contradicted, 0: 0.0}[sign] / len(spans)
            if sign > 0 and sentence.casefold() in earned:
                value, evidence = 0.0, f"{evidence}, said before"
            earned.add(sentence.casefold())
            found.append(ScoredSpan(start, stop, value, evidence))
        return found

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)

    @cached_property
    def _collection(self) -> "Collection":
        return _load(self.path, self.column)

    @cached_property
    def _verdict(self) -> Any:
        return functools.lru_cache(maxsize=20_000)(self._judge)

    def _judge(self, sentence: str) -> tuple[int, str]:
        """1 supported, -1 contradicted, 0 unknown; and the evidence in words."""
        passages = self._collection.near(sentence, self.passages, self.search, self.embeddings)
        if not passages:
            return 0, "unknown: no passage has a word of it"
        if self.model:
            judge = judge_of(self.model)
            says = [(*judge(passage, sentence), passage) for passage in passages]
            entailed, contradicted = max(says), max(says, key=lambda said: said[1])
            if max(entailed[0], contradicted[1]) < self.sure:
                return 0, f"unknown: nearest is {_short(passages[0])}"
            sign = 1 if entailed[0] >= contradicted[1] else -1
            sure, passage = (entailed[0], entailed[2]) if sign > 0 else (contradicted[1], contradicted[2])
            return sign, f"{'supported' if sign > 0 else 'contradicted'} ({sure:.2f}) by {_short(passage)}"
        share, passage = max((self._collection.share(sentence, passage), passage) for passage in passages)
        verdict, sign = ("supported", 1) if share >= self.sure else ("unknown", 0)
        return sign, f"{verdict}: {share:.0%} of its words are in {_short(passage)}"


class Collection:
    """Passages, searched by words (SQLite's FTS5, ranked by BM25) and by meaning (cosine of embeddings)."""

    def __init__(self, passages: Sequence[str]) -> None:
        self._passages = passages
        self._lock = threading.Lock()
        self._index = sqlite3.connect(":memory:", check_same_thread=False)
        self._index.execute(
            "CREATE VIRTUAL TABLE passages USING fts5(text, tokenize = 'unicode61 remove_diacritics 0')"
        )
        self._index.executemany(
            "INSERT INTO passages(rowid, text) VALUES (?, ?)",
            ((k, " ".join(_words(p))) for k, p in enumerate(passages)),
        )

    def near(self, sentence: str, count: int, search: Search, model: str) -> list[str]:
        """The passages nearest to a sentence, nearest first, without repetition."""
        found: list[int] = []
        if search != "meaning":
            found += self._by_words(sentence, count if search == "words" else (count + 1) // 2)
        if search != "words":
            scores = self._vectors(model) @ encoder(model)(sentence)
            by_meaning = [int(k) for k in np.argsort(-scores, kind="stable")[:count]]
            found += [k for k in by_meaning if k not in found][: count - len(found)]
        return [self._passages[k] for k in found]

    def share(self, sentence: str, passage: str) -> float:
        """How much of a sentence's words a passage has, each word weighed by how rare it is in the collection."""
        inside = set(_words(passage))
        weights = {word: self._rarity(word) for word in set(_words(sentence))}
        total = sum(weights.values())
        return sum(weight for word, weight in weights.items() if word in inside) / total if total else 0.0

    def _by_words(self, sentence: str, count: int) -> list[int]:
        words = list(dict.fromkeys(_words(sentence)))
        if not words:
            return []
        query = " OR ".join(f'"{word}"' for word in words)
        rows = self._rows(
            "SELECT rowid FROM passages WHERE passages MATCH ? ORDER BY rank, rowid LIMIT ?", query, count
        )
        return [row[0] for row in rows]

    @functools.lru_cache(maxsize=100_000)  # noqa: B019  (a collection lives as long as the process)
    def _rarity(self, word: str) -> float:
        ((having,),) = self._rows("SELECT COUNT(*) FROM passages WHERE passages MATCH ?", f'"{word}"')
        return float(np.log((len(self._passages) + 1) / (having + 0.5)))

    def _rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._index.execute(query, values).fetchall()

    @functools.lru_cache(maxsize=4)  # noqa: B019
    def _vectors(self, model: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Of all passages; made once, and kept in the cache folder."""
        what = hashlib.sha256(json.dumps([model, *self._passages]).encode()).hexdigest()[:20]
        place = cache_folder() / "embeddings" / f"{what}.npy"
        if place.is_file():
            return np.load(place)  # type: ignore[no-any-return]
        embed = encoder(model)
        vectors = np.stack([embed(passage) for passage in self._passages])
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{threading.get_ident()}.npy")
        np.save(unfinished, vectors)
        unfinished.replace(place)  # whole, or not there
        return vectors


def _words(text: str) -> list[str]:
    return [text[start:stop].casefold() for start, stop in word_spans(text)]


def _short(passage: str) -> str:
    text = " ".join(passage.split())
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


@functools.cache
def _load(path: str, column: str) -> Collection:
    texts = list(_texts(Path(path).expanduser(), column))
    passages: dict[str, None] = {}
    for text in texts:
        sentences = iter(sentence_spans(text))
        while group := list(islice(sentences, SENTENCES)):
            passages[text[group[0][0] : group[-1][1]]] = None
    if not passages:
        raise ConfigError(f"documents.path: {path!r} has no text")
    return Collection(tuple(passages))


def _texts(path: Path, column: str) -> Iterator[str]:
    try:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.suffix in (".txt", ".md")):
                yield from file.read_text(encoding="utf-8").split("\n\n")
        elif path.suffix == ".txt":
            yield from path.read_text(encoding="utf-8").split("\n\n")
        elif path.suffix in READERS:
            yield from _column(path, column)
        else:
            raise ConfigError(f"documents.path: {str(path)!r}: expected a folder, .txt, or {', '.join(READERS)}")
    except (OSError, UnicodeDecodeError, TaskError) as error:
        raise ConfigError(f"documents.path: cannot read {str(path)!r}: {error}") from error


def _column(path: Path, column: str) -> Iterator[str]:
    for line, row in rows_of(path):
        text = row.get(column) if not isinstance(row, str) else row
        if isinstance(row, str) or not isinstance(text, str):
            wrong = row if isinstance(row, str) else f"expected a text in the column {column!r}, got {str(row)[:120]}"
            raise ConfigError(f"{path}:{line}: {wrong}")
        yield text
