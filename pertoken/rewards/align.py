"""Characters <-> tokens of a sampled id list.

A policy acts in tokens, a reward speaks of characters. The text is decoded from the very ids that were
sampled and never tokenised again: a model may sample a spelling that its tokenizer would not choose, and the
reward must fall on the tokens it really chose.

The idea: every token contributes *bytes*, the text is those bytes decoded, and a character belongs to each
token that holds one of its bytes. Tokenizers differ only in which bytes a token stands for; `_Decoder` knows
that for the usual families, and what it says is accepted only if it reproduces `tokenizer.decode`. All others
are read off the decoded prefixes, which is slower (quadratic) and needs no knowledge of the tokenizer.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any
from weakref import WeakKeyDictionary

from pertoken.errors import AlignmentError

CharSpan = tuple[int, int]
"""Characters `[start, stop)` of a text."""


@dataclass(frozen=True)
class AlignedText:
    """A decoded id list and the characters that each token produced or took part in."""

    text: str
    char_spans: tuple[CharSpan, ...]
    """One range per token. Ranges overlap where tokens share a character (a Chinese character in three
    byte-level pieces), and are empty for special tokens. Starts and stops of the others never decrease."""

    def completed(self) -> list[int]:
        """Number of characters that are finished after each token.

        A shared character counts from its last piece on, so `text[:completed[k]]` is what a reader has
        seen after token k.
        """
        ends, end = [], len(self.text)
        for start, stop in reversed(self.char_spans):
            ends.append(end)
            end = start if stop > start else end
        return ends[::-1]


def tokens_of(aligned: AlignedText, start: int, stop: int) -> list[int]:
    """Indices of the tokens that share a character with the range `[start, stop)`; none if it is empty.

    >>> tokens_of(AlignedText("a cat", ((0, 1), (1, 4), (4, 5), (5, 5))), 2, 5)
    [1, 2]
    """
    found: list[int] = []
    spans = aligned.char_spans
    for k in range(bisect_right(spans, start, key=lambda span: span[1]), len(spans)):
        first, end = spans[k]
        if end > first >= stop:
            break
        if first < end:
            found.append(k)
    return found if start < stop else []


def token_before(aligned: AlignedText, position: int) -> int:
    """Index of the token that produced the last character before `position`; 0 if there is none."""
    return max(tokens_of(aligned, position - 1, position), default=0)


def spread(aligned: AlignedText, start: int, stop: int, value: float) -> list[tuple[int, float]]:
    """`value` split evenly over the tokens of a character range, as (token, share) pairs.

    A range without characters (something is missing *here*) falls on the nearest token before it.
    """
    tokens = tokens_of(aligned, start, stop) or [token_before(aligned, start)]
    return [(token, value / len(tokens)) for token in tokens]


# Scripts written without spaces: a word is one character there, which is what `zh` tokenisers do as well.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
LETTER = f"(?:(?![{_UNSPACED}])\\w)"
_WORD = re.compile(f"[{_UNSPACED}]|{LETTER}+(?:[.,'’-]{LETTER}+)*")
_WORD_OR_MARK = re.compile(f"{_WORD.pattern}|[^\\w\\s]")


def word_spans(text: str, *, marks: bool = False) -> list[CharSpan]:
    """Character ranges of the words of a text; with `marks`, punctuation marks are words of their own.

    >>> text = "It's 3.5 well-made 汉字."
    >>> [text[start:stop] for start, stop in word_spans(text, marks=True)]
    ["It's", '3.5', 'well-made', '汉', '字', '.']
    """
    return [match.span() for match in (_WORD_OR_MARK if marks else _WORD).finditer(text)]


# A mark that ends a sentence, what closes it, and space that no small letter follows ("e.g. this" goes on); or a line.
_END = re.compile(r"""[.!?…]+["'”’)\]]*\s+(?![a-z])|[。！？]["'”’」』）]*|\n+""")


def sentence_spans(text: str) -> list[CharSpan]:
    """Character ranges of the sentences of a text, without the white space between them.

    >>> text = 'A dog, e.g. this one. "Why?" 它跑了。'
    >>> [text[start:stop] for start, stop in sentence_spans(text)]
    ['A dog, e.g. this one.', '"Why?"', '它跑了。']
    """
    spans, start = [], 0
    for stop in [*(match.end() for match in _END.finditer(text)), len(text)]:
        sentence = text[start:stop].strip()
        if sentence:
            first = text.index(sentence, start)
            spans.append((first, first + len(sentence)))
        start = stop
    return spans


def align(ids: Sequence[int], tokenizer: Any) -> AlignedText:
    """The text of `ids` without special tokens, and the characters of each token."""
    try:
        text = _decode(ids, tokenizer)
    except Exception as error:
        raise AlignmentError(f"{type(tokenizer).__name__} cannot decode the ids {list(ids)[:20]}: {error}") from error
    decoder = _DECODERS.get(tokenizer)
    if decoder is None:
        decoder = _DECODERS[tokenizer] = _Decoder.of(tokenizer)
    aligned = decoder.align(ids)
    return aligned if aligned is not None and aligned.text == text else _from_prefixes(ids, tokenizer, text)


@dataclass(frozen=True)
class _Piece:
    """What one token contributes. `loose` bytes may be parts of characters; others are whole ones."""

    content: bytes
    loose: bool = False


@dataclass(frozen=True)
class _Decoder:
    """The `decoder` of a fast tokenizer, restated as bytes per token; without steps it knows nothing."""

    backend: Any
    special: frozenset[str]
    steps: tuple[dict[str, Any], ...]
    pieces: dict[tuple[int, bool], _Piece] = field(default_factory=dict)

    @classmethod
    def of(cls, tokenizer: Any) -> "_Decoder":
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return cls(None, frozenset(), ())
        state = {"type": "Joined"} if backend.decoder is None else _state(backend.decoder)
        steps = tuple(state["decoders"] if state["type"] == "Sequence" else [state])
        special = frozenset(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
        return cls(backend, special, steps if all(map(_is_known, steps)) else ())

    def align(self, ids: Sequence[int]) -> AlignedText | None:
        """The alignment, or None if this decoder is of a kind that is not known here."""
        if not self.steps:
            return None
        pieces: list[_Piece] = []
        begun = False
        for token_id in ids:
            token = self.backend.id_to_token(token_id)
            if token is None or token in self.special:
                pieces.append(_Piece(b""))
                continue
            key = (token_id, not begun)
            if key not in self.pieces:
                self.pieces[key] = _piece(token, self.steps, first=not begun)
            pieces.append(self.pieces[key])
            begun = True
        return _assemble(pieces, self.steps[-1], per_byte=self.steps[0]["type"] != "ByteLevel")


_DECODERS: "WeakKeyDictionary[Any, _Decoder]" = WeakKeyDictionary()

_KNOWN = {"ByteLevel", "ByteFallback", "Fuse", "Joined", "Metaspace", "Replace", "Strip", "WordPiece"}


def _state(decoder: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(decoder.__getstate__()))
    except Exception:  # a decoder written in Python has no state to show: `_from_prefixes` serves it
        return {"type": "Custom"}


def _is_known(step: dict[str, Any]) -> bool:
    match step["type"]:
        case "Replace":
            return "String" in step["pattern"]
        case "Strip":
            return bool(step["stop"] == 0 and step["content"].isascii())
    return step["type"] in _KNOWN


def _byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level BPE writes the 256 bytes: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_FALLBACK_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_WORDPIECE_CLEANUP = (
    *((" " + mark, mark) for mark in (".", "?", "!", ",")),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    *((" " + ending, ending) for ending in ("'s", "'ve", "'re")),
)


def _piece(token: str, steps: Sequence[dict[str, Any]], *, first: bool) -> _Piece:
    """The bytes of one vocabulary entry, which may depend on whether it opens the text."""
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                known = all(c in _BYTE_OF for c in token)  # an added token with a space in it stands for itself
                return _Piece(bytes(_BYTE_OF[c] for c in token) if known else token.encode(), loose=True)
            case "ByteFallback" if hit := _FALLBACK_BYTE.fullmatch(token):
                return _Piece(bytes.fromhex(hit[1]), loose=True)
            case "Replace":
                token = token.replace(step["pattern"]["String"], step["content"])
            case "Metaspace":
                drop = first and step["prepend_scheme"] != "never"
                token = token.replace(step["replacement"], "" if drop else " ")
            case "Joined" if not first:
                token = " " + token
            case "WordPiece":
                if not first:
                    joins = token.startswith(step["prefix"])
                    token = token.removeprefix(step["prefix"]) if joins else " " + token
                for dirty, clean in _WORDPIECE_CLEANUP if step["cleanup"] else ():
                    token = token.replace(dirty, clean)
    return _Piece(token.encode())


def _assemble(pieces: Sequence[_Piece], last_step: dict[str, Any], *, per_byte: bool) -> AlignedText:
    """Decode the joined bytes, then hand each token the characters that its bytes lie in.

    last_step: if it is a `Strip`, some (ASCII) characters are taken off the start of the decoded text.
    per_byte: a run of loose bytes that is no UTF-8 becomes one replacement character per byte (SentencePiece);
    otherwise one per malformed sequence (byte-level BPE).
    """
    text: list[str] = []
    char_of_byte: list[int] = []
    solid = (piece for piece in pieces if piece.content)  # a special token does not break a character in two
    for loose, run in groupby(solid, key=lambda piece: piece.loose):
        for char, width in _characters(b"".join(piece.content for piece in run), per_byte=loose and per_byte):
            char_of_byte += [len(text)] * width
            text.append(char)
    stripped = 0
    if last_step["type"] == "Strip":
        while text[stripped : stripped + 1] == [last_step["content"]] and stripped < last_step["start"]:
            stripped += 1
    spans: list[CharSpan] = []
    before = 0
    for end, piece in zip(accumulate(len(piece.content) for piece in pieces), pieces, strict=True):
        start, stop = max(end - len(piece.content), stripped), end
        if start < stop:
            spans.append((char_of_byte[start] - stripped, char_of_byte[stop - 1] + 1 - stripped))
            before = spans[-1][1]
        else:
            spans.append((before, before))
    return AlignedText("".join(text[stripped:]), tuple(spans))


def _characters(raw: bytes, *, per_byte: bool) -> list[tuple[str, int]]:
    """The characters of UTF-8 bytes with the number of bytes of each, malformed parts as U+FFFD."""
    found: list[tuple[str, int]] = []
    position = 0
    while True:
        try:
            good, bad = raw[position:].decode(), None
        except UnicodeDecodeError as error:
            if per_byte:
                return [("\ufffd", 1)] * len(raw)
            good, bad = raw[position : position + error.start].decode(), error
        found += [(char, len(char.encode())) for char in good]
        if bad is None:
            return found
        found.append(("\ufffd", bad.end - bad.start))
        position += bad.end


def _from_prefixes(ids: Sequence[int], tokenizer: Any, text: str) -> AlignedText:
    """Alignment with any tokenizer, from the decodings of the prefixes of `ids`.

    After k tokens the first `settled[k]` characters of the text stand for good. Token k produced those that
    it settled; while the end of a prefix is still going to change, a character is being built out of several
    tokens, and each of them takes part in it. A tokenizer may also show nothing of a character before its last
    byte: then tokens before it that added nothing take part, as many as the character has more bytes.
    """
    special = _special_ids(tokenizer)
    kept = [k for k, token_id in enumerate(ids) if token_id not in special]
    if text and not kept:
        raise AlignmentError(f"{type(tokenizer).__name__} decodes special tokens only, {list(ids)[:20]}, to {text!r}")
    shown = {k: _decode([ids[k]], tokenizer) for k in kept}
    if "".join(shown.values()) == text:  # nothing is made out of several tokens
        ends = list(accumulate(len(shown.get(k, "")) for k in range(len(ids))))
        return AlignedText(text, tuple((end - len(shown.get(k, "")), end) for k, end in enumerate(ends)))
    prefixes = [_decode([ids[k] for k in kept[:n]], tokenizer) for n in range(1, len(kept))] + [text] * bool(kept)
    agreed = [_common_length(prefix, text) for prefix in prefixes]
    settled = list(accumulate(reversed(agreed), min))[::-1]
    spans: list[CharSpan] = []
    unseen: list[int] = []  # tokens since the last character that showed nothing
    start = before = 0
    steps = dict(zip(kept, zip(prefixes, settled, strict=True), strict=True))
    for k in range(len(ids)):
        prefix, stop = steps.get(k, (text[:start], start))
        shared = stop + (len(prefix) > stop)  # the next character is begun, but not finished
        if k in steps and shared == start and text[:start].endswith("\ufffd") and shown[k]:
            start -= 1  # one more byte of a character that never was finished
        spans.append((start, min(shared, len(text))) if start < shared else (before, before))
        if start < shared:
            seen = shown[k] and shown[k][0] in (text[start], "\ufffd")
            earlier = 0 if seen else len(text[start].encode(errors="surrogatepass")) - 1
            parts = unseen[max(len(unseen) - earlier, 0) :]
            for j in range(parts[0], k) if parts else ():
                spans[j] = (start, start + 1) if j in parts else (start + 1, start + 1)  # a special token inside
            unseen = []
        elif k in steps:
            unseen.append(k)
        start, before = stop, spans[-1][1]
    return AlignedText(text, tuple(spans))


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _common_length(one: str, other: str) -> int:
    """Number of characters at the start in which two texts agree."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}
