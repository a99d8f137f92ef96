"""English word order by Link Grammar, a parser: words that no parse of their sentence can use.

The C library is called as it is (Debian's `liblink-grammar5`), since its Python bindings are built for the Python of
the system alone and no environment of its own sees them.
"""

import ctypes
import functools
import re
import threading
from collections.abc import Iterator
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any

from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan, sentence_spans, word_spans
from pertoken.rewards.base import NO_OPINION, NoOpinion, Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.grammar.base import protected_spans

INSTALL = (
    "apt-get install liblink-grammar5 link-grammar-dictionaries-en (Debian, Ubuntu) or brew install link-grammar "
    "(macOS); pip has no package of it"
)
LIBRARIES = ("liblink-grammar.so.5", "liblink-grammar.5.dylib", "liblink-grammar.dylib")
PARSES = 20
"""Best parses of a sentence that are looked at."""
SECONDS = 30
"""After which a sentence is given up. Sentences of 25 words took 0.3 s at most, of 40 words 12 s."""
MOST_WORDS = 40
REMEMBERED = 20_000
"""Sentences whose words are kept."""


@dataclass(frozen=True)
class LinkGrammar(SampleReward):
    """A soft cost on words that Link Grammar has to leave out to parse their sentence.

    Of each sentence the parses that leave out fewest words are taken, and a word is blamed by the share of them that
    leave it out. A text pays cost x (blame of its words / number of its words and marks), each word on its own tokens;
    only sentences that are judged are counted. It sees what rules miss, scrambled words above all, and is wrong about
    a good sentence now and then: a hint beside other rewards. It does not speak of a sentence where it cannot tell:
    without a closing mark, of fewer than three words or more than `max_words` (the time of a parse explodes), with
    code, addresses or letters beyond Latin-1, in headings, lists and tables. A text without a sentence to judge
    has `NO_OPINION`. Sleator & Temperley 1991, https://arxiv.org/abs/cmp-lg/9508004.
    """

    cost: float = 1.0
    """Paid by a text none of whose words fits; others in proportion."""
    max_words: int = 25
    """Longer sentences are not judged; at most 40."""

    def __post_init__(self) -> None:
        if not 3 <= self.max_words <= MOST_WORDS:
            raise ConfigError(f"link_grammar.max_words: expected 3 to {MOST_WORDS}, got {self.max_words}")
        _parser()

    def token_values(self, sample: Sample) -> list[float] | NoOpinion:
        spans = self._judged(sample.text)
        return NO_OPINION if spans is None else place_spans(spans, sample) if sample.tokens else []

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One per word that does not fit, with the share of the best parses that leave it out."""
        return self._judged(sample.text) or []

    def _judged(self, text: str) -> list[ScoredSpan] | None:
        """None if no sentence of the text can be judged."""
        blamed: list[tuple[CharSpan, float]] = []
        words = 0
        for start, stop in prose_sentences(text):
            sentence = text[start:stop]
            found = None
            if 3 <= len(word_spans(sentence)) <= self.max_words:
                found = _parser().left_out(sentence)
            if found is not None:
                words += len(word_spans(sentence, marks=True))
                blamed += [((start + first, start + last), share) for (first, last), share in found]
        if not words:
            return None
        return [
            ScoredSpan(*span, -self.cost * share / words, f"WordOrder: left out of {share:.0%} of the best parses")
            for span, share in blamed
        ]


_CLOSED = re.compile(r"""[.!?]["'”’)\]]*$""")
_MARKED = re.compile(r"^[-*+#>•]|[|\x00-\x1f]")
_PLAIN_NUMBER = re.compile(r"[$€£¥]?\d[\d.,:/-]*%?")
# The parser counts bytes of lower case, which letters such as U+0130 have more of than bytes of their own.
_OTHER_LETTER = re.compile(r"(?![A-Za-z\u00aa-\u00ff])[^\W\d_]")


def prose_sentences(text: str) -> Iterator[CharSpan]:
    """Character ranges of closed sentences of running text in the letters of Latin-1.

    >>> text = "It rains. 你好。 Run `ls -l` now. - one. So do 3.5 cats! And the"
    >>> [text[start:stop] for start, stop in prose_sentences(text)]
    ['It rains.', 'So do 3.5 cats!']
    """
    protected = [span for span in protected_spans(text) if not _PLAIN_NUMBER.fullmatch(text[slice(*span)])]
    for start, stop in sentence_spans(text):
        sentence = text[start:stop]
        if (
            _CLOSED.search(sentence)
            and not _MARKED.search(sentence)
            and not _OTHER_LETTER.search(sentence)
            and not any(first < stop and start < last for first, last in protected)
        ):
            yield start, stop


class _Parser:
    """The library with its English dictionary; one sentence at a time."""

    def __init__(self) -> None:
        self._library = _library()
        pointer, whole, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self._declare("lg_error_set_handler", pointer, pointer, pointer)(None, None)  # it prints to stderr else
        self._forget_errors = self._declare("lg_error_clearall", whole)
        self._dictionary = self._declare("dictionary_create_lang", pointer, ctypes.c_char_p)(b"en")
        if not self._dictionary:
            raise ConfigError(f"link_grammar: the library has no English dictionary: {INSTALL}")
        self._options = self._declare("parse_options_create", pointer)()
        settings = {
            "verbosity": 0, "linkage_limit": 1000, "max_null_count": 250, "spell_guess": 0, "max_parse_time": SECONDS,
        }  # fmt: skip
        for name, value in settings.items():
            self._declare(f"parse_options_set_{name}", None, pointer, whole)(self._options, value)
        self._reset = self._declare("parse_options_reset_resources", None, pointer)
        self._exhausted = self._declare("parse_options_resources_exhausted", ctypes.c_bool, pointer)
        self._sentence = self._declare("sentence_create", pointer, ctypes.c_char_p, pointer)
        self._parse = self._declare("sentence_parse", whole, pointer, pointer)
        self._num_parses = self._declare("sentence_num_valid_linkages", whole, pointer)
        self._null_count = self._declare("sentence_null_count", whole, pointer)
        self._delete_sentence = self._declare("sentence_delete", None, pointer)
        self._linkage = self._declare("linkage_create", pointer, size, pointer, pointer)
        self._delete_linkage = self._declare("linkage_delete", None, pointer)
        self._num_words = self._declare("linkage_get_num_words", size, pointer)
        self._word = self._declare("linkage_get_word", ctypes.c_char_p, pointer, size)
        self._begin = self._declare("linkage_get_word_byte_start", size, pointer, size)
        self._end = self._declare("linkage_get_word_byte_end", size, pointer, size)
        self._lock = threading.Lock()
        self.left_out = functools.lru_cache(REMEMBERED)(self._left_out)
        """Characters of each word that some of the best parses of a sentence leave out, and the share of them that do;
        None if there is no parse."""

    def _declare(self, name: str, returned: Any, *taken: Any) -> Any:
        function = getattr(self._library, name)
        function.restype, function.argtypes = returned, taken
        return function

    def _left_out(self, text: str) -> tuple[tuple[CharSpan, float], ...] | None:
        raw = text.encode()
        with self._lock:
            self._reset(self._options)
            sentence = self._sentence(raw, self._dictionary)
            try:
                if self._parse(sentence, self._options) <= 0 or self._exhausted(self._options):
                    return None
                if not self._null_count(sentence):
                    return ()
                parses = min(self._num_parses(sentence), PARSES)
                found = [span for k in range(parses) for span in self._of_parse(k, sentence)]
            finally:
                self._delete_sentence(sentence)
                self._forget_errors()
        return tuple(
            ((len(raw[:begin].decode()), len(raw[:end].decode())), found.count((begin, end)) / parses)
            for begin, end in sorted(set(found))
        )

    def _of_parse(self, k: int, sentence: Any) -> list[tuple[int, int]]:
        """Bytes of the words that a parse leaves out: the library shows them in brackets."""
        linkage = self._linkage(k, sentence, self._options)
        try:
            return [
                (self._begin(linkage, word), self._end(linkage, word))
                for word in range(self._num_words(linkage))
                if re.fullmatch(rb"\[.+\]", self._word(linkage, word))
            ]
        finally:
            self._delete_linkage(linkage)


def _library() -> Any:
    for name in (*LIBRARIES, find_library("link-grammar")):
        try:
            if name:  # None would be this program itself
                return ctypes.CDLL(name)
        except OSError:
            continue
    raise ConfigError(f"link_grammar: the library of Link Grammar is not installed: {INSTALL}")


@functools.cache
def _parser() -> _Parser:
    return _Parser()
