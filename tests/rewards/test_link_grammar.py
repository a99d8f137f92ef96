"""Link Grammar: which words do not fit, how softly they cost, and where the parser does not speak."""

import re

import pytest

from pertoken.errors import ConfigError
from pertoken.rewards import NO_OPINION, LinkGrammar, resolve, score
from pertoken.rewards.grammar import link_grammar
from pertoken.rewards.grammar.link_grammar import prose_sentences
from pertoken.rewards.parts import Weighted


def _installed():
    try:
        link_grammar._parser()
    except ConfigError:
        return False
    return True


needs_the_library = pytest.mark.skipif(not _installed(), reason="needs liblink-grammar5 and its English dictionary")


class Canned:
    """A parser that leaves out "mat" in half of the parses and "very" in all of them; it cannot parse "zzz"."""

    def left_out(self, sentence):
        if "zzz" in sentence:
            return None
        words = [(match.span(), match[0]) for match in re.finditer("mat|very", sentence)]
        return tuple((span, 0.5 if word == "mat" else 1.0) for span, word in words)


@pytest.fixture
def canned(monkeypatch):
    monkeypatch.setattr(link_grammar, "_parser", Canned)


@pytest.fixture
def sample_of(make_episode, make_scene, letters):
    return lambda text: make_scene(make_episode(letters(text))).samples[0]


def test_a_word_pays_its_share_of_the_parses_over_the_words_of_the_text(canned, sample_of):
    sample = sample_of("a cat mat on. I am very so.")  # 4 + 4 words and 2 marks
    values = LinkGrammar(cost=2.0).token_values(sample)
    assert values[6:9] == pytest.approx([-2 * 0.5 / 10 / 3] * 3)
    assert values[19:23] == pytest.approx([-2 * 1.0 / 10 / 4] * 4)
    assert sum(values) == pytest.approx(-2 * 1.5 / 10)
    said = [span.message for span in LinkGrammar().findings(sample)]
    assert said == [f"WordOrder: left out of {share}% of the best parses" for share in (50, 100)]


def test_what_is_not_judged_is_neither_blamed_nor_counted(canned, sample_of):
    alone = sum(LinkGrammar().token_values(sample_of("I am very so.")))
    assert alone == -1 / 5
    for other in ("He zzz is very odd.", "Very.", "Is " + "very " * 25 + "long.", "Here is very_odd().", "It is very"):
        assert sum(LinkGrammar().token_values(sample_of(f"I am very so. {other}"))) == pytest.approx(alone), other
        assert LinkGrammar().token_values(sample_of(other)) is NO_OPINION, other
    assert LinkGrammar(max_words=27).token_values(sample_of("Is " + "very " * 25 + "long.")) is not NO_OPINION
    assert LinkGrammar().token_values(sample_of("")) is NO_OPINION


def test_only_closed_sentences_of_running_text_are_judged():
    text = (
        '# A heading is here.\n- An item is here.\n| a | b. |\n1. One is here.\n"He ran," I said. 他跑了. Мы тут были. '
        "It was 3.5 km (about $40). See http://a.b/c. Then x = foo_bar. He said: “No.” İt is here. Unfinished it"
    )
    found = [text[start:stop] for start, stop in prose_sentences(text)]
    assert found == ["1.", "One is here.", '"He ran," I said.', "It was 3.5 km (about $40).", "He said: “No.”"]


def test_without_the_library_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(link_grammar, "_parser", link_grammar._Parser)
    monkeypatch.setattr(link_grammar, "LIBRARIES", ("no-such-library.so.5",))
    monkeypatch.setattr(link_grammar, "find_library", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed: apt-get install liblink-grammar5 .* or brew install"):
        LinkGrammar()


@pytest.mark.parametrize("number", [2, 41])
def test_sentences_that_would_take_for_ever_are_not_asked_for(number, canned):
    with pytest.raises(ConfigError, match=f"link_grammar.max_words: expected 3 to 40, got {number}"):
        LinkGrammar(max_words=number)


@needs_the_library
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cat sat on the mat.", []),
        ("the cat sat mat on the.", ["mat", "the"]),
        ("Me and him was going to the store.", ["was"]),
        ("The naïve café 😀 was the very old mat and.", ["and"]),  # characters, not bytes
        ("The snorkiest wug was glimming happily.", []),  # unknown words have a place in a sentence
    ],
)
def test_words_that_do_not_fit_are_found(text, words, sample_of):
    found = link_grammar._parser().left_out(text)
    assert [text[start:stop] for (start, stop), share in found if share == 1] == words


@needs_the_library
def test_the_blame_is_shared_by_the_parses():
    found = link_grammar._parser().left_out("Cat the the the mat dog.")
    assert len(found) == 4
    assert sum(share for _, share in found) == pytest.approx(3)  # each of the best parses leaves out three words


@needs_the_library
def test_scrambled_sentences_pay_more(make_episode, make_scene):
    good = "Once upon a time, there was a little girl named Lily. She loved to play with her dog in the park."
    bad = "Once a upon time, was there a little named girl Lily. She to loved play her with dog the in park."
    scene = make_scene(make_episode(good, id="1"), make_episode(bad, id="2"), make_episode("猫。", id="3"))
    rewards = score([Weighted(resolve("link_grammar")(), 1.0, "link_grammar")], scene)
    assert rewards.total.sum(1)[0] == 0 > rewards.total.sum(1)[1] > -0.5
    assert rewards.abstained["link_grammar"].tolist() == [False, False, True]


@needs_the_library
def test_nothing_is_printed_whatever_the_text(capfd, sample_of):
    for text in (
        "\\ % & {} ~ is here.",
        "a\x00b is here.",
        "He " * 24 + ".",
        "İt is aĀ here.",
        "LEFT-WALL x.v [!] is.",
    ):
        LinkGrammar().token_values(sample_of(text))
    assert capfd.readouterr() == ("", "")
