"""A text whose tokens are coloured by one stream: for the terminal, a notebook, a web page, a paper.

The colours are those of the report (`display.py`): orange below the neutral value, blue above it, violet where only the
size counts. Whatever a model wrote is escaped, so that no text can act in the place where it is shown.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

from pertoken.display import FULL_STRENGTH, MAGNITUDE, NEGATIVE, POSITIVE, Colour, background, escaped, harmless
from pertoken.tracking.files import Number, Row
from pertoken.tracking.samples import neutral, stream_scales

WHITE, BLACK = (255, 255, 255), (24, 26, 30)


@dataclass(frozen=True)
class ColouredText:
    """The tokens of one text, and the numbers of a stream that colour them. A notebook shows it in colour."""

    pieces: Sequence[str]
    values: Sequence[Number | None]
    """One per piece; None and the neutral value have no colour."""
    name: str = ""
    """Of the stream, as the glossary has it."""
    title: str = ""
    numbers: Mapping[str, Sequence[Number | None]] = field(default_factory=dict)
    """Other streams of the same tokens, to be shown when a reader points at one."""
    scale: Row | None = None
    """As `stream_scales` returns it; None measures it on `values` alone."""

    def __post_init__(self) -> None:
        for name, column in {"values": self.values, **self.numbers}.items():
            if len(column) != len(self.pieces):
                raise ValueError(
                    f"{name} has {len(column)} numbers, expected one for each of {len(self.pieces)} pieces"
                )
        if self.scale is None:
            object.__setattr__(self, "scale", self._own_scale())

    @classmethod
    def of_panel(cls, panel: Row, name: str, scale: Row | None = None) -> "ColouredText":
        """A text of a scene (`samples.episode_panel`, `samples.pair_scene`), coloured by one of its streams."""
        tokens, streams = panel["tokens"], panel["streams"]
        acts = tokens["action"]
        values = [value if act else None for value, act in zip(streams[name], acts, strict=True)]
        return cls(tokens["piece"], values, name, panel["title"], streams, scale)

    def _own_scale(self) -> Row:
        panel = {"tokens": {"action": [1] * len(self.values)}, "streams": {self.name: self.values}}
        found = stream_scales([{"panels": [panel]}])
        return (
            found[0]
            if found
            else {"name": self.name, "label": self.name, "meaning": "", "kind": "signed", "bound": 1.0}
        )

    @property
    def legend(self) -> str:
        """What the colours mean, in one line."""
        assert self.scale is not None
        zero, bound = neutral(self.name), self.scale["bound"]
        ends = f"0 to ±{bound:g}" if self.scale["kind"] == "magnitude" else f"{zero - bound:g} to {zero + bound:g}"
        meaning = f": {self.scale['meaning']}" if self.scale["meaning"] else ""
        numbers = ends.replace("-", "−")  # in numbers alone: "log-prob" keeps its hyphen
        return harmless(f"{self.scale['label']}, {numbers}{meaning}").replace("\n", " ")

    def _inks(self) -> list[tuple[Colour, float]]:
        """Of each piece, its colour and how much of it, 0 to `FULL_STRENGTH`."""
        assert self.scale is not None
        zero, found = neutral(self.name), []
        for value in self.values:
            distance = 0.0 if value is None else value - zero
            ink = MAGNITUDE if self.scale["kind"] == "magnitude" else POSITIVE if distance > 0 else NEGATIVE
            found.append((ink, min(1.0, abs(distance) / self.scale["bound"]) * FULL_STRENGTH))
        return found

    def colours(self, paper: Colour = WHITE) -> list[Colour | None]:
        """The background of each piece on `paper`; None where it has no colour."""
        found = list[Colour | None]()
        for ink, strength in self._inks():
            mixed = tuple(round(p + (i - p) * strength) for p, i in zip(paper, ink, strict=True))
            found.append((mixed[0], mixed[1], mixed[2]) if strength >= 0.01 else None)
        return found

    def terminal(self, *, paper: Colour = BLACK) -> Text:
        """For `rich`: pieces on their colours, the rest as the terminal has it."""
        ink = "black" if sum(paper) > 382 else "white"
        text = Text()
        for piece, colour in zip(self.pieces, self.colours(paper), strict=True):
            style = Style(bgcolor=f"rgb({colour[0]},{colour[1]},{colour[2]})", color=ink) if colour else Style()
            text.append(harmless(piece) or "▯", style)
        return text

    def html(self) -> str:
        """A piece of HTML with all colours in it, for light and dark paper; pointing at a token shows its numbers."""
        spans = "".join(
            f'<span style="{background(ink, strength)}border-radius:3px" title="{escaped(self._numbers(index))}">'
            f"{escaped(piece) or '▯'}</span>"
            for index, (piece, (ink, strength)) in enumerate(zip(self.pieces, self._inks(), strict=True))
        )
        head = f"<strong>{escaped(self.title)}</strong>" if self.title else ""
        return (
            f'<div style="margin:0.5em 0">{head}'
            '<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext;'
            f'line-height:1.8">{spans}</div><small>{escaped(self.legend)}</small></div>'
        )

    _repr_html_ = html

    def page(self) -> str:
        """`html` as a file of its own, which loads nothing."""
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{escaped(self.title)}</title></head>"
            '<body style="font:16px/1.6 system-ui,sans-serif;max-width:48em;margin:2em auto;padding:0 1em">'
            f"{self.html()}</body></html>\n"
        )

    def svg(self, *, columns: int = 80) -> str:
        """A drawing, `columns` characters wide, in a monospaced font; no font and nothing else is loaded.

        Tokens stand from left to right: for right-to-left scripts take `page` or `latex`.
        """
        console = Console(record=True, width=columns, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        for line in (Text(harmless(self.title), "bold"), self.terminal(paper=WHITE), Text(self.legend, "dim"), Text()):
            console.print(line)
        drawn = console.export_svg(title="", theme=DEFAULT_TERMINAL_THEME, code_format=_SVG, unique_id="text")
        return _TEXT_LENGTH.sub(_cells_wide, drawn)

    def latex(self) -> str:
        r"""For `\input` in a paper with the package xcolor; other scripts than Latin need XeLaTeX or LuaLaTeX."""
        lines = [f"% {self.legend}", "{\\fboxsep=0pt\\raggedright\\noindent%"]
        for piece, colour in zip(self.pieces, self.colours(), strict=True):
            for part in re.findall(r"\n|[^\n]+", harmless(piece)) or ["▯"]:
                if part == "\n":
                    lines.append("\\par\\noindent%")
                    continue
                body = f"\\strut {_tex(part)}"
                box = f"\\colorbox[HTML]{{{_hex(colour)}}}{{{body}}}" if colour else f"\\mbox{{{body}}}"
                lines.append(("\\hspace{0pt}" if part[0].isspace() else "") + box + "%")
        return "\n".join([*lines, "\\par}", ""])

    def _numbers(self, index: int) -> str:
        columns = {**self.numbers} or {self.name: self.values}
        shown = (
            f"{name}: {'–' if column[index] is None else f'{column[index]:.4g}'}" for name, column in columns.items()
        )
        return "\n".join([repr(harmless(self.pieces[index])), *shown])


def _hex(colour: Colour | None, before: str = "") -> str:
    red, green, blue = colour or WHITE
    return f"{before}{red:02X}{green:02X}{blue:02X}"


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", " ": r"\ ", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "-": "-{}", "`": "`{}", "'": "'{}",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


_TEXT_LENGTH = re.compile(r'textLength="[\d.]+"([^>]*)>([^<]*)</text>')


def _cells_wide(match: re.Match[str]) -> str:
    """rich counts characters here; Chinese ones and emoji are two cells wide."""
    cells = cell_len(html.unescape(match[2]).replace("\xa0", " ").strip("\n"))
    return f'textLength="{12.2 * max(1, cells):.1f}"{match[1]}>{match[2]}</text>'


# The drawing of rich without its window, and without the fonts that it would load from the network.
_SVG = """\
<svg viewBox="0 0 {terminal_width} {terminal_height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
<rect width="100%" height="100%" fill="#ffffff"/>
<g clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""
