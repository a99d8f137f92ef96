"""What a text claims: pairs of names with words between them that stand for a relation.

A pattern is a sentence with two places, "[X] was born in [Y]."; X is the subject. Names are found first, by asking the
graph about each run of words, so a pattern never guesses where a name ends.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan
from pertoken.rewards.knowledge.graph import Graph

LONGEST = 8
"""Words of a name, at most."""

_WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[\p{L}\p{N}\p{M}]+")
"""A word; a character of its own in scripts without spaces."""


@dataclass(frozen=True)
class Pattern:
    """A way to say that X and Y stand in a relation: the words before, between and behind the two names."""

    relation: str
    before: str
    between: str
    behind: str
    subject_first: bool = True
    """Whether X comes first."""

    @staticmethod
    def of(relation: str, sentence: str, where: str = "pattern") -> "Pattern":
        """From a sentence with [X] and [Y], each once, and words between them."""
        parts = regex.split(r"\[([XY])\]", sentence)
        if len(parts) != 5 or {parts[1], parts[3]} != {"X", "Y"} or not parts[2].strip():
            raise ConfigError(f"{where}: expected a sentence with [X], words, and [Y], such as '[X] lives in [Y].'; "
                              f"got {sentence!r}")  # fmt: skip
        return Pattern(relation, parts[0], parts[2], parts[4].rstrip(" .。"), parts[1] == "X")

    @cached_property
    def searched(self) -> "tuple[Any, Any, Any]":
        """Compiled: what ends where the first name begins, what lies between, what begins where the second ends."""
        before, between, behind = map(_loosely, (self.before, self.between, self.behind))
        return (
            regex.compile(before + "$" if before else "", regex.IGNORECASE),
            regex.compile(r"\.?" + between, regex.IGNORECASE),  # the full stop of "S.p.A." belongs to no word
            regex.compile(behind, regex.IGNORECASE),
        )


def _loosely(words: str) -> str:
    """A regular expression of `words`: any spaces, both kinds of apostrophe."""
    pieces = [regex.escape(piece) if not piece.isspace() else r"\s+" for piece in regex.split(r"(\s+)", words) if piece]
    return "".join(pieces).replace("'", "['’]")


@dataclass(frozen=True)
class Claim:
    """That `subject` has `object` by `relation`, and where the text says so."""

    subject: str
    relation: str
    object: str
    first: CharSpan
    """Characters of the name that comes first."""
    second: CharSpan
    """Characters of the other, with which the claim is made."""


def claims(text: str, patterns: Sequence[Pattern], graph: Graph, articles: Sequence[str] = ()) -> Iterator[Claim]:
    """All claims that the patterns see in `text`. One place may be read in several ways: longest names come first."""
    begins, ends = _names(text, graph)
    if not begins:
        return
    article = f"(?:(?<!\\w)(?:{'|'.join(map(regex.escape, articles))})\\s+)?" if articles else ""
    skip, skip_back = (regex.compile(words, regex.IGNORECASE) for words in (article, article + "$"))
    for pattern in patterns:
        before, between, behind = pattern.searched
        for match in between.finditer(text):
            starts = [
                s for s in ends.get(match.start(), ()) if before.search(text, 0, skip_back.search(text, 0, s).start())
            ]
            at = skip.match(text, match.end()).end()
            stops = [s for s in begins.get(at, begins.get(match.end(), ())) if behind.match(text, s)]
            for start in sorted(starts):
                for stop in sorted(stops, reverse=True):
                    second = (at if at in begins else match.end(), stop)
                    names = text[start : match.start()], text[slice(*second)]
                    subject, thing = names if pattern.subject_first else names[::-1]
                    yield Claim(subject, pattern.relation, thing, (start, match.start()), second)


def _names(text: str, graph: Graph) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Where each name that begins at a character ends, and where each that ends at one begins."""
    words = [match.span() for match in _WORD.finditer(text)]
    begins, ends = defaultdict(list), defaultdict(list)
    for first, (start, _) in enumerate(words):
        for _, stop in words[first : first + LONGEST]:
            if "\n" not in text[start:stop] and graph.may_name(text[start:stop]):
                begins[start].append(stop)
                ends[stop].append(start)
    return dict(begins), dict(ends)


def load_patterns(path: str) -> tuple[Pattern, ...]:
    """From JSON lines: {"relation": "P20", "patterns": ["[X] died in [Y].", ...]}."""
    found: list[Pattern] = []
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"facts.patterns: cannot read {path!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            relation, sentences = row["relation"], row["patterns"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where}: expected an object with relation and patterns ({error!r})") from error
        if not isinstance(relation, str) or not isinstance(sentences, list):
            raise ConfigError(f"{where}: expected a text as relation and a list of sentences as patterns")
        found += [Pattern.of(relation, str(sentence), where) for sentence in sentences]
    if not found:
        raise ConfigError(f"facts.patterns: {path} has no pattern; expected lines with relation and patterns")
    return tuple(found)
