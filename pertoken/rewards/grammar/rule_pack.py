r"""Rules of any language as regular expressions in a YAML file.

    language: en
    rules:
      - id: alot
        pattern: '\balot\b'
        message: two words, "a lot"
        category: Spelling
        bad: ["I like it alot."]
        good: ["I like it a lot."]

`pattern` is Python's, and what it matches is the finding: look-around keeps the context out. `ignore_case` and `weight`
are optional. The examples are part of the rule: loading a pack fails if one of `bad` is not found or one of `good` is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from pertoken.errors import ConfigError, closest
from pertoken.rewards.grammar.base import Finding, GrammarReward

PACKS = files("pertoken.rewards.grammar") / "packs"


@dataclass(frozen=True)
class Rule:
    """One mistake: how to find it, and what it is."""

    id: str
    pattern: re.Pattern[str]
    message: str
    category: str = "Grammar"
    weight: float = 1.0

    def check(self, text: str) -> list[Finding]:
        """Where the rule finds its mistake."""
        return [
            Finding(*match.span(), self.category, f"{self.message} ({self.id})", self.weight)
            for match in self.pattern.finditer(text)
        ]


@dataclass(frozen=True)
class RulePack(GrammarReward):
    """A cost on what the regular expressions of a rule pack find, in any language."""

    pack: str = "en"
    """A pack that comes with the package (en, zh), or the path of a YAML file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {rule.category for rule in self._rules}
        for category in self.weights or {}:
            if category not in known:
                raise ConfigError(f"rule_pack.weights.{category}: {self.pack} has no such category; known: {known}")

    @cached_property
    def _rules(self) -> tuple[Rule, ...]:
        return load_pack(self.pack)

    def check(self, text: str) -> list[Finding]:
        return sorted((found for rule in self._rules for found in rule.check(text)), key=lambda each: each.start)


@lru_cache
def load_pack(name: str) -> tuple[Rule, ...]:
    """The rules of a shipped pack (`en`, `zh`) or of a YAML file, each tried on its own examples."""
    shipped = {path.name.removesuffix(".yaml"): path for path in PACKS.iterdir() if path.name.endswith(".yaml")}
    source: Any = shipped.get(name, Path(name).expanduser())
    if name not in shipped and not source.is_file():
        raise ConfigError(f"rule pack {name!r}: no such file, and no pack of this name; {closest(name, shipped)}")
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"rule pack {name!r} is no valid YAML: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("rules"), list) or not content["rules"]:
        raise ConfigError(f"rule pack {name!r}: expected a mapping with a list `rules`")
    rules = tuple(_rule(entry, f"rule pack {name!r}, rule {k}") for k, entry in enumerate(content["rules"], 1))
    repeated = {rule.id for rule in rules if sum(other.id == rule.id for other in rules) > 1}
    if repeated:
        raise ConfigError(f"rule pack {name!r}: ids are used twice: {sorted(repeated)}")
    return rules


_TYPES: dict[str, tuple[Any, str]] = {
    "id": (str, "a text"),
    "pattern": (str, "a regular expression"),
    "message": (str, "a text"),
    "category": (str, "a text"),
    "weight": ((int, float), "a number"),
    "ignore_case": (bool, "true or false"),
    "bad": (list, "a list of texts"),
    "good": (list, "a list of texts"),
}
_REQUIRED = ("id", "pattern", "message", "bad")


def _rule(entry: Any, where: str) -> Rule:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected a mapping, got {entry!r}")
    where = f"{where} ({entry.get('id', '?')})"
    for key, value in entry.items():
        if key not in _TYPES:
            raise ConfigError(f"{where}: unknown key {key!r}; {closest(str(key), _TYPES)}")
        kind, expected = _TYPES[key]
        if not isinstance(value, kind):
            raise ConfigError(f"{where}: {key} is {value!r}, expected {expected}")
    for key in _REQUIRED:
        if not entry.get(key):
            raise ConfigError(f"{where}: {key} is missing; expected {_TYPES[key][1]}")
    try:
        pattern = re.compile(entry["pattern"], re.IGNORECASE if entry.get("ignore_case") else 0)
    except re.error as error:
        raise ConfigError(f"{where}: pattern is no regular expression: {error}") from error
    for wanted, key in ((True, "bad"), (False, "good")):
        for example in entry.get(key, []):
            if bool(pattern.search(str(example))) != wanted:
                raise ConfigError(f"{where}: {example!r} is listed as {key}, but is {'not ' * wanted}found")
    optional = {key: entry[key] for key in ("category", "weight") if key in entry}
    return Rule(entry["id"], pattern, entry["message"], **optional)
