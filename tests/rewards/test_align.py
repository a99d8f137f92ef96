"""Every character belongs to exactly the tokens that produced it, for every family of tokenizers."""

from typing import ClassVar

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from pertoken.errors import AlignmentError
from pertoken.rewards.align import (
    _BYTE_OF,
    AlignedText,
    _Decoder,
    _from_prefixes,
    _special_ids,
    align,
    spread,
    token_before,
    tokens_of,
    word_spans,
)

ODD = [
    "The cat sat.",
    "👩‍👩‍👧 family 😀😀",
    "e\u0301 naïve Zu\u0308rich",
    "猫坐在垫子上。你好，世界！",
    "القطة على السجادة.",
    "  two  spaces \n\n and lines\t",
    "don't do not . , ! ' s",
    "▁ metaspace ## pieces <0x41>",
    "\ufffd\x00\x7f",
    "",
]
TEXTS = st.one_of(
    st.sampled_from(ODD), st.text(max_size=24), st.text(alphabet="the cat猫é😀\u200d\u0301\n ", max_size=24)
)
QUICK = settings(max_examples=60, deadline=None)


def encode(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False)


def decode(ids, tokenizer):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check(aligned: AlignedText, ids, tokenizer):
    """The text is the tokenizer's; no character is lost; special tokens own none; spans go forward."""
    assert aligned.text == decode(ids, tokenizer)
    assert len(aligned.char_spans) == len(ids)
    assert {c for span in aligned.char_spans for c in range(*span)} == set(range(len(aligned.text)))
    solid = [span for span in aligned.char_spans if span[0] < span[1]]
    assert solid == sorted(solid)
    assert [stop for _, stop in aligned.char_spans] == sorted(stop for _, stop in aligned.char_spans)
    for token_id, (start, stop) in zip(ids, aligned.char_spans, strict=True):
        assert token_id not in _special_ids(tokenizer) or start == stop


@QUICK
@given(text=TEXTS)
def test_no_character_is_lost_in_any_text(any_tokenizer, text):
    ids = encode(text, any_tokenizer)
    check(align(ids, any_tokenizer), ids, any_tokenizer)


@QUICK
@given(data=st.data())
def test_no_character_is_lost_in_any_id_list(any_tokenizer, data):
    """Models sample ids that no text encodes to: halves of characters, special tokens in the middle."""
    ids = data.draw(st.lists(st.integers(0, len(any_tokenizer) - 1), max_size=16))
    check(align(ids, any_tokenizer), ids, any_tokenizer)


@QUICK
@given(data=st.data())
def test_known_decoders_need_no_fallback(any_tokenizer, data):
    decoder = _Decoder.of(any_tokenizer)
    ids = data.draw(st.lists(st.integers(0, len(any_tokenizer) - 1), max_size=16))
    fast = decoder.align(ids)
    if decoder.steps:
        assert fast is not None
        assert fast.text == decode(ids, any_tokenizer)
    else:
        assert fast is None


@QUICK
@given(text=TEXTS, cut=st.integers(0, 30))
def test_reading_prefixes_finds_the_same_owners(any_tokenizer, text, cut):
    """Two independent roads: bytes per token, and how the decoded prefix grows."""
    ids = encode(text, any_tokenizer)[:cut]
    full = align(ids, any_tokenizer)
    # Prefixes cannot tell which byte made which replacement character, nor see into a run of bytes of which
    # SentencePiece gives up the good ones, too, as long as the last one is missing.
    grown = [len(decode(ids[:n], any_tokenizer).rstrip("\ufffd")) for n in range(len(ids) + 1)]
    assume("\ufffd" not in full.text and grown == sorted(grown))
    assert _from_prefixes(ids, any_tokenizer, full.text) == full


@QUICK
@given(text=TEXTS)
def test_byte_level_owners_are_the_offsets_of_the_tokenizer(tokenizer, text):
    """The tokenizers library reports where in the text each piece came from; only for text that it tokenised."""
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    assert list(align(encoding.ids, tokenizer).char_spans) == encoding.offsets


def test_pieces_of_one_character_share_it(tokenizer):
    ids = [1, *byte_ids("猫", tokenizer), 2]
    aligned = align(ids, tokenizer)
    assert aligned == AlignedText("猫", ((0, 0), (0, 1), (0, 1), (0, 1), (1, 1)))
    assert aligned.completed() == [0, 0, 0, 1, 1]  # the character can be read after its last piece only


def test_a_special_token_inside_a_character_owns_nothing(tokenizer):
    one, two, three, four = byte_ids("😀", tokenizer)
    ids = [one, two, 1, three, four, *byte_ids("a", tokenizer)]
    aligned = align(ids, tokenizer)
    assert aligned == _Decoder.of(tokenizer).align(ids)
    assert aligned == AlignedText("😀a", ((0, 1), (0, 1), (1, 1), (0, 1), (0, 1), (1, 2)))
    assert tokens_of(aligned, 0, 1) == [0, 1, 3, 4]


def test_a_character_cut_off_belongs_to_the_pieces_that_were_written(tokenizer):
    first, second, _ = byte_ids("猫", tokenizer)
    ids = [*byte_ids("a", tokenizer), first, second, *byte_ids("b", tokenizer), first]
    assert align(ids, tokenizer) == AlignedText("a\ufffdb\ufffd", ((0, 1), (1, 2), (1, 2), (2, 3), (3, 4)))


def test_malformed_fallback_bytes_are_one_character_each(sentencepiece):
    """SentencePiece gives up the whole run of bytes, even the good character in it."""
    good, cut = "猫".encode(), "猫".encode()[:1]
    ids = sentencepiece.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in good + cut])
    assert align(ids[:3], sentencepiece) == AlignedText("猫", ((0, 1), (0, 1), (0, 1)))
    assert align(ids, sentencepiece) == AlignedText("\ufffd" * 4, ((0, 1), (1, 2), (2, 3), (3, 4)))


def test_only_a_space_that_can_be_read_is_stripped(sentencepiece):
    space, half = sentencepiece.convert_tokens_to_ids(["<0x20>", "<0xE7>"])
    assert align([space, space], sentencepiece) == AlignedText(" ", ((0, 0), (0, 1)))
    assert align([space, half], sentencepiece) == AlignedText("\ufffd\ufffd", ((0, 1), (1, 2)))


def test_an_added_token_that_is_not_special_is_text(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["<tool call>", "</s>", "a"])
    assert align(ids, tokenizer) == AlignedText("<tool call>a", ((0, 11), (11, 11), (11, 12)))


def test_ids_without_a_vocabulary_entry_own_nothing(tokenizer):
    """Embedding tables are padded to a round size, so a model can sample ids that the tokenizer does not know."""
    assert align([len(tokenizer) + 7, *byte_ids("a", tokenizer)], tokenizer).char_spans == ((0, 0), (0, 1))


def test_a_tokenizer_without_a_backend_is_read_by_prefixes():
    class Spelling:
        all_special_ids: ClassVar = [0]

        def decode(self, ids, **options):
            return "".join(chr(96 + k) for k in ids if k).replace("ch", "χ")

    assert align([1, 3, 0, 8, 2, 0], Spelling()) == AlignedText("aχb", ((0, 1), (1, 2), (2, 2), (1, 2), (2, 3), (3, 3)))


def test_prefixes_give_every_byte_of_a_broken_character_its_share():
    class Bytes:
        all_special_ids: ClassVar = []

        def decode(self, ids, **options):
            return bytes(ids).decode(errors="replace")

    assert align([*"猫".encode()[:2], *b"ab"], Bytes()) == AlignedText("\ufffdab", ((0, 1), (0, 1), (1, 2), (2, 3)))


def byt5_ids(text):
    return [byte + 3 for byte in text.encode()]


def test_bytes_that_show_nothing_share_the_character_that_they_make():
    """ByT5 shows no part of a character: it comes whole, with its last byte."""
    bytes_only = ByT5Tokenizer()
    assert align(byt5_ids("a猫"), bytes_only) == AlignedText("a猫", ((0, 1), (1, 2), (1, 2), (1, 2)))
    cut, end = byt5_ids("猫")[:2], bytes_only.eos_token_id
    assert align([*cut, *byt5_ids("b")], bytes_only) == AlignedText("b", ((0, 0), (0, 0), (0, 1)))  # never finished
    first, *rest = byt5_ids("猫")
    assert align([*cut, first, end, *rest], bytes_only) == AlignedText(
        "猫", ((0, 0), (0, 0), (0, 1), (1, 1), (0, 1), (0, 1))
    )


def test_a_replacement_character_that_was_written_takes_no_bytes_of_the_next_one():
    aligned = align(byt5_ids("\ufffd👩"), ByT5Tokenizer())
    assert aligned == AlignedText("\ufffd👩", (*[(0, 1)] * 3, *[(1, 2)] * 4))


def test_ids_that_cannot_be_decoded_are_refused(tokenizer):
    with pytest.raises(AlignmentError, match="cannot decode the ids"):
        align([-1], tokenizer)


def byte_ids(text, tokenizer):
    """The ids of the single bytes of a text, whatever the tokenizer would merge."""
    alphabet = {byte: char for char, byte in _BYTE_OF.items()}
    return tokenizer.convert_tokens_to_ids([alphabet[byte] for byte in text.encode()])


def test_ranges_without_characters_fall_on_the_token_before(tokenizer):
    aligned = AlignedText("ab c", ((0, 0), (0, 2), (2, 4), (4, 4)))
    assert tokens_of(aligned, 1, 3) == [1, 2]
    assert tokens_of(aligned, 2, 2) == []
    assert [token_before(aligned, position) for position in (0, 1, 2, 3, 4)] == [0, 1, 1, 2, 2]
    assert spread(aligned, 1, 3, 1.0) == [(1, 0.5), (2, 0.5)]
    assert spread(aligned, 4, 4, 1.0) == [(2, 1.0)]


def test_words_of_unspaced_scripts_are_single_characters():
    text = "It's 3.5 well-made 汉字, ありがとう!"
    words = [text[start:stop] for start, stop in word_spans(text)]
    assert words == ["It's", "3.5", "well-made", "汉", "字", *"ありがとう"]
    marks = [text[start:stop] for start, stop in word_spans(text, marks=True)]
    assert [mark for mark in marks if mark not in words] == [",", "!"]
