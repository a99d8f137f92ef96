"""Costs and earnings of form: a wanted shape (regular expression, JSON, JSON schema), and content that is banned."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from pertoken.errors import ConfigError, MissingExtraError, RewardError
from pertoken.rewards.align import LETTER, CharSpan
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans

SECONDS = 5.0
"""Longest search for one pattern in one text: a pattern that tries all ways to cut a long text would never end."""

JsonPath = tuple[str | int, ...]


@dataclass(frozen=True)
class Format(SampleReward):
    """Pays for a form: each of `pattern`, `parts` and JSON that is asked for earns `reward` if kept, else costs `cost`.

    What is kept earns on the tokens of its characters; what is broken costs the very place: the character where no
    continuation can match any more, where the decoder of JSON stops, the value that the schema refuses. What is missing
    costs the end of the text.
    """

    pattern: str | None = None
    """Regular expression that the whole text matches."""
    parts: Sequence[str] = ()
    """Regular expressions that are each found somewhere; each is worth an equal share."""
    json: bool = False
    """The text parses as JSON (implied by `within` and `schema`)."""
    within: str | None = None
    """Regular expression of the JSON in the text (its first group, if it has one); several are worth equal shares."""
    schema: Mapping[str, Any] | str | None = None
    """JSON schema, or the path of its file, that the JSON conforms to; needs the extra `form`."""
    reward: float = 1.0
    """Earned by what is kept."""
    cost: float = 1.0
    """Paid for what is broken."""

    def __post_init__(self) -> None:
        if self.pattern is None and not self.parts and not self._wants_json:
            raise ConfigError("format: nothing to reward; set pattern, parts, json, within or schema")
        _ = self._pattern, self._parts, self._within, self._validator

    @cached_property
    def _pattern(self) -> Any:
        return None if self.pattern is None else compile_pattern(self.pattern, "format.pattern")

    @cached_property
    def _parts(self) -> list[Any]:
        return _compile_all(self.parts, "format.parts")

    @cached_property
    def _within(self) -> Any:
        return None if self.within is None else compile_pattern(self.within, "format.within")

    @cached_property
    def _validator(self) -> Any:
        return None if self.schema is None else _load_validator(self.schema)

    @property
    def _wants_json(self) -> bool:
        return self.json or self.within is not None or self.schema is not None

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """What is kept, and each place where the form breaks."""
        text = sample.text
        found = [] if self._pattern is None else [self._whole(text)]
        found += [self._part(text, part, 1 / len(self._parts)) for part in self._parts]
        return found + (self._json_findings(text) if self._wants_json else [])

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample) if sample.tokens else [], sample)

    def _whole(self, text: str) -> ScoredSpan:
        if in_time(self._pattern.fullmatch, text):
            return ScoredSpan(0, len(text), self.reward, "matches the pattern")
        # A beginning that can still become a match has only such beginnings itself: the first that cannot is bisected.
        low, high = 0, len(text) + 1
        while low + 1 < high:
            middle = (low + high) // 2
            viable = in_time(self._pattern.fullmatch, text[:middle], partial=True)
            low, high = (middle, high) if viable else (low, middle)
        reason = "ends before the pattern is complete" if low == len(text) else "leaves the pattern here"
        return ScoredSpan(low, min(low + 1, len(text)), -self.cost, reason)

    def _part(self, text: str, part: Any, share: float) -> ScoredSpan:
        match = in_time(part.search, text)
        if match is None:
            return ScoredSpan(len(text), len(text), -self.cost * share, f"no {part.pattern!r} in the text")
        return ScoredSpan(match.start(), match.end(), self.reward * share, f"has {part.pattern!r}")

    def _json_findings(self, text: str) -> list[ScoredSpan]:
        spans = [(0, len(text))]
        if self._within is not None:
            group = min(self._within.groups, 1)
            matches = in_time(lambda text, **limit: list(self._within.finditer(text, **limit)), text)
            spans = [match.span(group) for match in matches if match.start(group) >= 0]
        if not spans:
            return [ScoredSpan(len(text), len(text), -self.cost, f"no {self.within!r} in the text")]
        return [found for start, stop in spans for found in self._one_json(text, start, stop, 1 / len(spans))]

    def _one_json(self, text: str, start: int, stop: int, share: float) -> list[ScoredSpan]:
        document = text[start:stop]
        try:
            value = json.loads(document)
            places = dict(_places(document, _after_space(document, 0), ()))
        except json.JSONDecodeError as error:
            at = start + error.pos
            return [ScoredSpan(at, min(at + 1, stop), -self.cost * share, f"no JSON: {error.msg}")]
        except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
            return [ScoredSpan(start, stop, -self.cost * share, f"no JSON that can be read: {type(error).__name__}")]
        errors = [] if self._validator is None else sorted(self._validator.iter_errors(value), key=_in_order)
        found = []
        for breach in errors:
            first, end = places[tuple(breach.absolute_path)]
            paid = -self.cost * share / len(errors)
            found.append(ScoredSpan(start + first, start + end, paid, str(breach.message)[:200]))
        return found or [ScoredSpan(start, stop, self.reward * share, "JSON as asked for")]


@dataclass(frozen=True)
class Banned(SampleReward):
    """A cost on each banned word, phrase or match of a pattern, shared by the tokens of its characters.

    Words match whole: "ass" is not found in "class". Scripts that are written without spaces have no such bounds, so a
    Chinese word is found wherever its characters stand. Of words that overlap, the first and longest counts.
    """

    words: Sequence[str] = ()
    """Words and phrases; any white space of the text stands for that of a phrase."""
    patterns: Sequence[str] = ()
    """Regular expressions."""
    file: str | None = None
    """Text file with a further word or phrase on each line; empty lines and those that begin with # are skipped."""
    cost: float = 1.0
    """Paid per hit."""
    ignore_case: bool = True
    """Compare folded case (straße is STRASSE); for patterns, ignore case."""

    def __post_init__(self) -> None:
        if self._words is None and not self._patterns:
            raise ConfigError("banned: nothing to look for; set words, patterns or file")
        for pattern in self._patterns:
            if pattern.search(""):
                raise ConfigError(
                    f"banned.patterns: {pattern.pattern!r} matches the empty text, so it is found everywhere; expected "
                    "a pattern of at least one character: + in place of *?"
                )

    @cached_property
    def _patterns(self) -> list[Any]:
        return _compile_all(self.patterns, "banned.patterns", regex.IGNORECASE if self.ignore_case else 0)

    @cached_property
    def _words(self) -> Any:
        """All words as one pattern of (folded) text; None if there are none."""
        _refuse_text(self.words, "banned.words", "words")
        words = {" ".join(self._fold(word)[0].split()) for word in [*self.words, *self._lines()]}
        if "" in words:
            raise ConfigError("banned.words: an empty word, which is found everywhere; expected text: remove it")
        return (
            regex.compile("|".join(map(_bounded, sorted(words, key=lambda word: (-len(word), word)))))
            if words
            else None
        )

    def _lines(self) -> list[str]:
        if self.file is None:
            return []
        try:
            lines = Path(self.file).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"banned.file: {self.file!r} cannot be read ({error}); expected a text file in UTF-8 with a word on "
                "each line"
            ) from error
        return [line for line in lines if line.strip() and not line.startswith("#")]

    def _fold(self, text: str) -> tuple[str, Sequence[int]]:
        """The text as it is compared, and the place in `text` of each of its characters."""
        if not self.ignore_case:
            return text, range(len(text))
        folded = [character.casefold() for character in text]
        return "".join(folded), [k for k, characters in enumerate(folded) for _ in characters]

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span per hit, in the order of the text."""
        hits = [match.span() for pattern in self._patterns for match in in_time(_all_of(pattern), sample.text)]
        if self._words is not None:
            text, places = self._fold(sample.text)
            for match in in_time(_all_of(self._words), text):
                hits.append((places[match.start()], places[match.end() - 1] + 1))
        return [
            ScoredSpan(start, stop, -self.cost, f"banned: {sample.text[start:stop]!r}")
            for start, stop in sorted(hits)
            if start < stop
        ]

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample), sample)


def _bounded(word: str) -> str:
    """`word` as a pattern that does not match inside of a longer word."""
    before = f"(?<!{LETTER})" if regex.match(LETTER, word[0]) else ""
    after = f"(?!{LETTER})" if regex.match(LETTER, word[-1]) else ""
    return before + r"\s+".join(map(regex.escape, word.split())) + after


def _all_of(pattern: Any) -> Any:
    return lambda text, **limit: list(pattern.finditer(text, **limit))


def in_time(search: Any, text: str, **options: Any) -> Any:
    """What the search for a pattern in `text` finds; RewardError if it takes longer than `SECONDS`."""
    try:
        return search(text, timeout=SECONDS, **options)
    except TimeoutError as error:
        raise RewardError(
            f"a pattern took longer than {SECONDS:g} s for a text of {len(text)} characters: it can match in too many "
            "ways; avoid repetitions inside of repetitions, such as (a+)+"
        ) from error


def compile_pattern(pattern: Any, where: str, flags: int = 0) -> Any:
    """The regular expression; ConfigError, which begins with `where` in the configuration, if it is none."""
    if not isinstance(pattern, str):
        raise ConfigError(f"{where}: expected a regular expression (text), got {pattern!r}")
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise ConfigError(
            f"{where}: expected a regular expression, got {pattern!r} ({error}); put a backslash before characters "
            "that are meant as they stand"
        ) from error


def _compile_all(patterns: Any, where: str, flags: int = 0) -> list[Any]:
    _refuse_text(patterns, where, "regular expressions")
    return [compile_pattern(pattern, f"{where}.{k}", flags) for k, pattern in enumerate(patterns)]


def _refuse_text(values: Any, where: str, kind: str) -> None:
    """One text in the place of a list of texts would be taken letter by letter."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not all(isinstance(v, str) for v in values):
        raise ConfigError(f"{where}: expected a list of {kind}, got {values!r}; write [...] even for a single one")


def _load_validator(schema: Mapping[str, Any] | str) -> Any:
    """What finds the errors of a value; a `$ref` to another document is never fetched."""
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
        from referencing import Registry
    except ImportError as error:
        raise MissingExtraError("jsonschema", "form", "format.schema") from error
    where = "format.schema"
    if isinstance(schema, str):
        where = f"format.schema ({schema})"
        try:
            schema = json.loads(Path(schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{where}: expected the path of a JSON file in UTF-8: {error}") from error
    if not isinstance(schema, Mapping):
        raise ConfigError(f"{where}: expected a mapping such as {{type: object}}, got {schema!r}")
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(
            f"{where}: at {error.json_path}: expected a JSON schema, but {str(error.message)[:200]}; see "
            "https://json-schema.org"
        ) from error
    return kind(schema, registry=Registry())


def _in_order(error: Any) -> tuple[str, str]:
    return error.json_path, error.message


_CONSTANTS = ("NaN", "Infinity", "-Infinity")
_DECODER = json.JSONDecoder()


def _places(text: str, at: int, path: JsonPath) -> Iterator[tuple[JsonPath, CharSpan]]:
    """The characters of each value inside of the value that begins at `at`, itself last; `text` is known to parse.

    >>> dict(_places('{"a": [1, 22]}', 0, ()))
    {('a', 0): (7, 8), ('a', 1): (10, 12), ('a',): (6, 13), (): (0, 14)}
    """
    start, opening = at, text[at]
    if opening not in "{[":
        if text.startswith(_CONSTANTS, at):
            raise json.JSONDecodeError("NaN and Infinity are Python's, not JSON's", text, at)
        yield path, (start, _DECODER.raw_decode(text, at)[1])
        return
    count, at = 0, _after_space(text, at + 1)
    while text[at] not in "}]":
        key: str | int = count
        if opening == "{":
            key, at = _DECODER.raw_decode(text, at)
            at = _after_space(text, _after_space(text, at) + 1)
        for inner, span in _places(text, at, (*path, key)):
            yield inner, span
        at = _after_space(text, span[1])
        at = _after_space(text, at + 1) if text[at] == "," else at
        count += 1
    yield path, (start, at + 1)


def _after_space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at
