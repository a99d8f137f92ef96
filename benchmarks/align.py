"""Does every character belong to exactly the tokens that produced it? Real tokenizers, many strings, an oracle apart.

    python benchmarks/align.py PATH/models/stories260k
    python benchmarks/align.py PATH/models/stories260k --strings 100000

Tokenizers: byte-level BPE (SmolLM2), SentencePiece with byte fallback (the folder), WordPiece (MiniLM), characters
(CANINE: code points), and bytes (ByT5). Each string, drawn by hypothesis, is tokenised by each of them and cut
anywhere; beside it goes a list of ids that no text encodes to. The oracle knows no decoder: it joins what each token
stands for by the definition of its family, decodes that with Python's own codec, and reads WordPiece off its growing
prefixes. Prints how many id lists were checked per tokenizer; a list that fails is shrunk and shown.
"""

import argparse
import codecs
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer

from pertoken.policy.model import load_model
from pertoken.rewards.align import align
from pertoken.rewards.semantics import minilm_folder

Owned = list[tuple[str, set[int]]]
"""The characters of a text, each with the tokens that produced it."""

FRAGMENTS = (
    *("👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "😀", "1️⃣", "e\u0301", "Zu\u0308rich", "a\u0300\u0316\u0323", "\u0301", "ﬁ", "Å"),
    *(
        "القطة على السجادة",
        "שָׁלוֹם",
        "\u202eabc\u202c",
        "\u200f",
        "مرحبا 123",
        "猫坐在垫子上。",
        "你好，世界！",
        "東京",
        "한국어",
        "𠀀𪛖",
    ),
    *(
        "นั่งบนเสื่อ",
        "नमस्ते",
        "\x00",
        "\x07\x1b[0m",
        "\x7f\x85",
        "\u200d",
        "\ufeff",
        "\ufffd",
        "\u2028",
        "\t\r\n",
        "  ",
        "\u00a0",
    ),
    *("▁", "##s", "Ġthe", "<0x41>", "<0xE7>", "<s>", "</s>", "<unk>", "[CLS]", "[UNK]", "<|im_start|>", "<extra_id_0>"),
    *("don't", " 's", "do not", "U.S.A.", "a . , ! ?", " ' ", "3.5%", "It's well-made", "ſ", "İ", "ß", "\U0010ffff"),
)
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(FRAGMENTS),
        st.text(max_size=8),
        st.characters(categories=("Mn", "Cc", "Cf", "So", "Lo", "Co")),
        st.text(alphabet="the cat sat on a mat. ", max_size=12),
    ),
    max_size=6,
).map("".join)
BYTES_EVERY = 8
"""ByT5 is written in Python, and what is made of several tokens is read off prefixes: slow, so not on every string."""
NUMBERS = st.lists(st.integers(0, 2**24), max_size=12)


@dataclass(frozen=True)
class Family:
    """A tokenizer, and the oracle of its kind."""

    tokenizer: Any
    owners: Callable[[Sequence[int], Any], Owned]


def families(stories: Path) -> dict[str, Family]:
    wordpiece = AutoTokenizer.from_pretrained(minilm_folder())
    return {
        "byte-level BPE": Family(load_model("smollm2-135m-instruct")[1], of_byte_level),
        "SentencePiece": Family(AutoTokenizer.from_pretrained(stories), of_sentencepiece),
        "WordPiece": Family(wordpiece, of_prefixes),
        "characters": Family(CanineTokenizer(), of_characters),
        "bytes": Family(ByT5Tokenizer(), of_bytes),
    }


def shown(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[int, int]]:
    """(place, id) of the tokens that are not special."""
    special = special_ids(tokenizer)
    return ((k, number) for k, number in enumerate(ids) if number not in special)


@functools.cache
def special_ids(tokenizer: Any) -> set[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


@functools.cache
def letters_of_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for themselves, the others follow from U+0100 on."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
    rest = iter(range(0x100, 0x200))
    return {chr(byte) if byte in printable else chr(next(rest)): byte for byte in range(256)}


def decoded(parts: Sequence[tuple[int, bytes]], errors: str) -> Owned:
    """The characters of joined bytes by Python's codec, each with the tokens that its bytes came from.

    errors: `replace` shows a malformed sequence as one U+FFFD, `ignore` does not show it.
    """
    raw, owner = b"".join(part for _, part in parts), [k for k, part in parts for _ in part]
    malformed: list[tuple[int, int]] = []

    def note(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        malformed.append((error.start, error.end))
        return ("\ufffd" if errors == "replace" else "", error.end)

    codecs.register_error("pertoken-note", note)
    raw.decode(errors="pertoken-note")
    edges = [0, *(edge for pair in malformed for edge in pair), len(raw)]
    found: Owned = []
    for n, (start, stop) in enumerate(pairwise(edges)):
        if n % 2 and errors == "replace":
            found.append(("\ufffd", set(owner[start:stop])))
        text = "" if n % 2 else raw[start:stop].decode()
        widths = [len(char.encode()) for char in text]
        for char, width, end in zip(text, widths, accumulate(widths), strict=True):
            found.append((char, set(owner[start + end - width : start + end])))
    return found


def of_byte_level(ids: Sequence[int], tokenizer: Any) -> Owned:
    """Each character of a vocabulary entry is a byte."""
    letters = letters_of_bytes()
    entries = [(k, tokenizer.convert_ids_to_tokens(number)) for k, number in shown(ids, tokenizer)]
    return decoded([(k, bytes(letters[char] for char in entry)) for k, entry in entries], "replace")


def of_sentencepiece(ids: Sequence[int], tokenizer: Any) -> Owned:
    """A metaspace is a space, `<0xE7>` a byte; a run of bytes that is no UTF-8 is one U+FFFD per byte; the first space
    of the text is left out."""
    found: Owned = []
    entries = [(k, tokenizer.convert_ids_to_tokens(number)) for k, number in shown(ids, tokenizer)]
    for loose, run in groupby(entries, key=lambda pair: len(pair[1]) == 6 and pair[1].startswith("<0x")):
        if not loose:
            found += [(char, {k}) for k, entry in run for char in entry.replace("▁", " ")]
            continue
        parts = [(k, bytes([int(entry[3:5], 16)])) for k, entry in run]
        try:
            b"".join(part for _, part in parts).decode()
            found += decoded(parts, "replace")
        except UnicodeDecodeError:
            found += [("\ufffd", {k}) for k, _ in parts]
    return found[1:] if found and found[0][0] == " " else found


def of_prefixes(ids: Sequence[int], tokenizer: Any) -> Owned:
    """What a token adds to the text of those before it."""
    found: Owned = []
    so_far: list[int] = []
    for k, number in shown(ids, tokenizer):
        so_far.append(number)
        text = decode(so_far, tokenizer)
        assert text.startswith("".join(char for char, _ in found)), "the oracle's prefixes do not grow"
        found += [(char, {k}) for char in text[len(found) :]]
    return found


def of_characters(ids: Sequence[int], tokenizer: Any) -> Owned:
    return [(chr(number), {k}) for k, number in shown(ids, tokenizer)]


def of_bytes(ids: Sequence[int], tokenizer: Any) -> Owned:
    """Ids from 3 on are bytes; what is no UTF-8 is not shown."""
    return decoded([(k, bytes([number - 3])) for k, number in shown(ids, tokenizer)], "ignore")


def decode(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def check(ids: Sequence[int], family: Family) -> None:
    """AssertionError unless each character of the text has the owners that the oracle names, and no other token."""
    aligned, expected = align(ids, family.tokenizer), family.owners(ids, family.tokenizer)
    assert aligned.text == decode(ids, family.tokenizer) == "".join(char for char, _ in expected), "the text differs"
    assert len(aligned.char_spans) == len(ids), "not one range per token"
    owners: list[set[int]] = [set() for _ in aligned.text]
    for k, (start, stop) in enumerate(aligned.char_spans):
        for place in range(start, stop):
            owners[place].add(k)
    assert owners == [tokens for _, tokens in expected], f"{ids}: {owners}, expected {expected}"


def ids_of(text: str, cuts: tuple[int, int], tokenizer: Any) -> list[int]:
    """The ids of a text, cut at both ends."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    start, stop = cuts[0] % (len(ids) + 1), cuts[1] % (len(ids) + 1)
    return list(ids[start:] if start == stop else ids[min(start, stop) : max(start, stop)])


def strange(numbers: Sequence[int], text_ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Ids as a model may sample them: any, single bytes and letters more often, and pieces of a text among them."""
    found: list[int] = []
    for number in numbers:
        kind, rest = number % 4, number // 4
        if kind == 0 and text_ids:
            found.append(text_ids[rest % len(text_ids)])
        else:
            found.append(rest % (len(tokenizer) if kind == 1 else 300))
    return found


def run(everyone: Mapping[str, Family], strings: int, seed: int) -> Counter[str]:
    """How many id lists were checked per tokenizer; raises at the first that fails."""
    counted = Counter[str]()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=strings,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(text=TEXTS, cuts=st.tuples(st.integers(0, 40), st.integers(0, 40)), numbers=NUMBERS)
    def every_character_has_its_owners(text: str, cuts: tuple[int, int], numbers: list[int]) -> None:
        counted["strings"] += 1
        for name, family in everyone.items():
            if name == "bytes" and counted["strings"] % BYTES_EVERY:
                continue
            ids = ids_of(text, cuts, family.tokenizer)
            for each in (ids, strange(numbers, ids, family.tokenizer)):
                check(each, family)
                counted[name] += 1

    every_character_has_its_owners()
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stories", type=Path, help="folder of a SentencePiece tokenizer with byte fallback")
    parser.add_argument("--strings", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=5000, help="strings that hypothesis draws with one seed")
    arguments = parser.parse_args()
    everyone = families(arguments.stories)
    total, begun, seed = Counter[str](), time.perf_counter(), arguments.seed
    while total["strings"] < arguments.strings:
        total += run(everyone, min(arguments.batch, arguments.strings - total["strings"]), seed)
        seed += 1
        print(f"{total['strings']} strings, {time.perf_counter() - begun:.0f} s", flush=True)
    for name, count in total.items():
        print(f"| {name} | {count} |")


if __name__ == "__main__":
    main()
