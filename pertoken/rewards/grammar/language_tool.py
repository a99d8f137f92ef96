"""Many languages by a LanguageTool server (https://dev.languagetool.org/public-http-api), your own or a hosted one."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from pertoken.errors import ConfigError, RewardError
from pertoken.rewards.grammar.base import Finding, GrammarReward


@dataclass(frozen=True)
class LanguageTool(GrammarReward):
    """A cost on what a LanguageTool server finds; one request per completion.

    Categories (keys of `weights`) are the ids of LanguageTool's rule categories: GRAMMAR, TYPOS, PUNCTUATION, CASING,
    CONFUSED_WORDS, REDUNDANCY, TYPOGRAPHY, STYLE, ... STYLE counts 0 by default.
    """

    url: str = "http://localhost:8081"
    """Where the server listens; `/v2/check` is added."""
    language: str = "en-US"
    """Language code of the texts, or auto."""
    disabled_rules: Sequence[str] = ()
    """Ids of rules that are not checked."""
    timeout: float = 10.0
    """Seconds to wait for an answer."""
    tries: int = 2
    """How often a request is made before it has failed."""

    default_weights: ClassVar[Mapping[str, float]] = {"STYLE": 0.0}
    spelling: ClassVar[frozenset[str]] = frozenset({"TYPOS", "CASING"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if urllib.parse.urlsplit(self.url).scheme not in ("http", "https"):
            raise ConfigError(f"language_tool.url: expected http:// or https://, got {self.url!r}")
        if self.tries < 1 or self.timeout <= 0:
            raise ConfigError(f"language_tool: expected tries >= 1 and timeout > 0, got {self.tries}, {self.timeout}")

    def check(self, text: str) -> list[Finding]:
        fields = {"text": text, "language": self.language}
        if self.disabled_rules:
            fields["disabledRules"] = ",".join(self.disabled_rules)
        answer = _ask(self.url.rstrip("/") + "/v2/check", tuple(fields.items()), self.timeout, self.tries)
        try:
            return [_finding(match, text) for match in json.loads(answer)["matches"]]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise RewardError(
                f"the answer of {self.url} is not LanguageTool's ({type(error).__name__}: {error}): {answer[:200]!r}"
            ) from error


def _finding(match: Mapping[str, Any], text: str) -> Finding:
    """A match; its offsets count UTF-16 units, in which an emoji is two."""
    start, length = int(match["offset"]), int(match["length"])
    units = text.encode("utf-16-le")
    before, inside = units[: 2 * start], units[2 * start : 2 * (start + length)]
    first = len(before.decode("utf-16-le", "replace"))
    return Finding(
        first,
        min(first + len(inside.decode("utf-16-le", "replace")), len(text)),
        str(match["rule"]["category"]["id"]),
        f"{match['message']} ({match['rule']['id']})",
    )


@lru_cache(maxsize=4096)
def _ask(url: str, fields: tuple[tuple[str, str], ...], timeout: float, tries: int) -> str:
    """The body of the answer to a POST; the same text is asked about once."""
    body = urllib.parse.urlencode(fields).encode()
    request = urllib.request.Request(url, body, {"Accept": "application/json"})
    for left in reversed(range(tries)):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return str(response.read().decode("utf-8", "replace"))
        except urllib.error.HTTPError as error:
            said = error.read().decode("utf-8", "replace").strip()[:200]
            if error.code < 500 or not left:
                raise RewardError(
                    f"{url} answered {error.code} {error.reason}: {said!r}; check url and language"
                ) from error
        except OSError as error:
            if not left:
                raise RewardError(
                    f"no answer from {url} in {tries} tries of {timeout} s ({error}); is the server running? set "
                    f"language_tool.url"
                ) from error
    raise AssertionError("unreachable: the last try returns or raises")
