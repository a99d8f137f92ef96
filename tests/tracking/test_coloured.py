"""Coloured texts: the colour says the number, and no text can act where it is shown."""

import re
from xml.etree import ElementTree

import pytest

from pertoken.tracking.coloured import MAGNITUDE, NEGATIVE, POSITIVE, WHITE, ColouredText, harmless

HOSTILE = "<script>alert(1)</script>\x1b]0;owned\x07\x9b31m\u202eevil"
SCALE = {"name": "advantage", "label": "advantage", "meaning": "", "kind": "signed", "bound": 2.0}


def mixed(ink: tuple[int, int, int], strength: float) -> tuple[int, ...]:
    return tuple(round(p + (i - p) * strength) for p, i in zip(WHITE, ink, strict=True))


def test_colours_follow_sign_and_size_up_to_the_bound():
    text = ColouredText(["a", "b", "c", "d", "e"], [1.0, -2.0, 9.0, 0.0, None], "advantage", scale=SCALE)
    assert text.colours() == [mixed(POSITIVE, 0.31), mixed(NEGATIVE, 0.62), mixed(POSITIVE, 0.62), None, None]


def test_a_ratio_is_neutral_at_one_and_a_log_prob_has_a_size_only():
    ratio = ColouredText(["a", "b", "c"], [1.0, 0.8, 1.2], "ratio")
    assert ratio.colours() == [None, mixed(NEGATIVE, 0.62), mixed(POSITIVE, 0.62)]
    assert ColouredText(["a"], [-3.0], "logprob").colours() == [mixed(MAGNITUDE, 0.62)]


def test_a_number_too_few_is_refused():
    with pytest.raises(ValueError, match="values has 1 numbers, expected one for each of 2 pieces"):
        ColouredText(["a", "b"], [1.0])


def test_nothing_that_steers_a_terminal_or_turns_the_text_is_left():
    shown = harmless(HOSTILE)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", shown)
    assert "evil" in shown
    assert harmless("👩\u200d👧 نمی\u200cخواهم\n") == "👩\u200d👧 نمی\u200cخواهم\n"
    assert harmless("\ud800") == "⟨U+D800⟩"


def hostile_text() -> ColouredText:
    return ColouredText([HOSTILE, " end"], [0.5, -0.5], "<b>stream</b>", title=HOSTILE, numbers={"<i>": [1.0, 2.0]})


def test_hostile_text_is_text_in_a_notebook_and_on_a_page():
    for made in (hostile_text()._repr_html_(), hostile_text().page()):
        assert "<script" not in made
        assert "<b>stream" not in made
        assert "<i>" not in made
        assert "\x1b" not in made
    assert "default-src 'none'" in hostile_text().page()


def test_a_drawing_is_valid_and_loads_nothing():
    drawn = hostile_text().svg()
    tree = ElementTree.fromstring(drawn)
    assert {tag.tag.rpartition("}")[2] for tag in tree.iter()} <= {
        "svg",
        "style",
        "defs",
        "clipPath",
        "rect",
        "g",
        "text",
    }
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in drawn.replace("url(#text-", "")


def test_wide_characters_take_two_cells_in_a_drawing():
    drawn = ColouredText(["列表", "ab"], [1.0, -1.0], "advantage").svg()
    lengths = dict(re.findall(r'textLength="([\d.]+)"[^>]*>(列表|ab)<', drawn))
    assert lengths == {"48.8": "列表", "24.4": "ab"}


def test_latex_has_no_open_command_and_breaks_lines_between_words():
    made = ColouredText(
        ["50%", " of_x", "\\end{document}", "\n", " {"], [1.0, -1.0, 0.5, 0.0, 0.0], "advantage"
    ).latex()
    body = made.partition("\n")[2]
    assert r"\strut 50\%" in body
    assert r"\hspace{0pt}\colorbox" in body
    assert r"\ of\_x" in body
    assert r"\textbackslash{}end\{document\}" in body
    assert "\\par\\noindent%" in body
    plain = re.sub(r"\\[{}]", "", body)
    assert plain.count("{") == plain.count("}")


def test_the_terminal_gets_the_text_itself():
    assert hostile_text().terminal().plain == harmless(HOSTILE) + " end"
    assert ColouredText(["", "é"], [0.0, 0.0]).terminal().plain == "▯é"


def test_a_legend_has_minus_signs_in_its_numbers_and_hyphens_in_its_words():
    scale = SCALE | {"label": "log-prob", "meaning": "A re-read of x − y."}
    assert ColouredText(["a"], [1.0], "x", scale=scale).legend == "log-prob, −2 to 2: A re-read of x − y."
    assert ColouredText(["a"], [-3.0], "logprob").legend.startswith("log-prob, 0 to ±3: ")


def test_the_name_of_a_stream_cannot_act_in_a_drawing_or_in_latex():
    text = ColouredText(["a"], [1.0], "x", scale=SCALE | {"label": "a\n\\input{secret}\x1b"})
    assert [line for line in text.latex().splitlines() if "secret" in line] == [f"% {text.legend}"]
    ElementTree.fromstring(text.svg())
