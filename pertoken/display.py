"""What a notebook shows of tokens and numbers: HTML with all of its colours in it, on light and on dark paper.

The colours are those of the report: orange below 0, blue above it, violet where only the size counts; pairs that
colour-blind readers tell apart. They are laid thinly over whatever the paper is, so that its own ink stays readable.
Whatever a model wrote is escaped, and what cannot be seen is spelled out, so that no text can act where it is shown.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Colour = tuple[int, int, int]

POSITIVE, NEGATIVE, MAGNITUDE = (47, 134, 209), (232, 130, 26), (125, 91, 196)
FULL_STRENGTH = 0.62
"""Share of the colour at the bound of the scale: the text on it stays readable."""

MOST_ROWS, MOST_COLUMNS = 16, 32
"""Of a grid of numbers; what more there is, is counted."""
MOST_IDS = 512
"""Of a text."""

_UNSEEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def harmless(text: str) -> str:
    """`text` with everything spelled out that could steer a terminal or turn the direction of what follows.

    Line ends stay, and so do joiners, which scripts and emoji need.

    >>> harmless("a\\x1b[31mb\\u202e")
    'a␛[31mb⟨U+202E⟩'
    """

    def spelled(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"

    return _UNSEEN.sub(spelled, text)


def escaped(text: str) -> str:
    """`text` as HTML that says what it says and does nothing."""
    return html.escape(harmless(text))


def background(ink: Colour, strength: float) -> str:
    """A CSS declaration: this much of a colour over the paper; none where it could not be seen.

    >>> background(POSITIVE, 0.31)
    'background:rgba(47,134,209,0.31);'
    """
    return f"background:rgba({ink[0]},{ink[1]},{ink[2]},{strength:.2g});" if strength >= 0.01 else ""


def signed_background(value: float, bound: float) -> str:
    """The background of a number that is neutral at 0."""
    strength = min(1.0, abs(value) / bound) * FULL_STRENGTH if bound > 0 and math.isfinite(value) else 0.0
    return background(POSITIVE if value > 0 else NEGATIVE, strength)


def grids_html(title: str, grids: Mapping[str, Tensor | None]) -> str:
    """Tables of numbers `[B, T]` by name, a line a row of the batch; columns in which all is 0 are left out."""
    tables = "".join(_grid(name, cells) for name, cells in grids.items() if cells is not None)
    return f"<div><strong>{escaped(title)}</strong>{tables}</div>"


def _grid(name: str, cells: Tensor) -> str:
    numbers = cells.detach().double().cpu()
    columns = (numbers != 0).any(0).nonzero()[:, 0].tolist()
    shown = columns[:MOST_COLUMNS]
    bound = numbers.nan_to_num(posinf=0.0, neginf=0.0).abs().max().item() if numbers.numel() else 0.0
    head = "".join(f"<th>{column}</th>" for column in shown)
    body = "".join(
        f"<tr><th>{row}</th>{''.join(_cell(numbers[row, column].item(), bound) for column in shown)}</tr>"
        for row in range(min(len(numbers), MOST_ROWS))
    )
    left = [
        f"{count - most} more {what}"
        for what, count, most in (("rows", len(numbers), MOST_ROWS), ("columns", len(columns), MOST_COLUMNS))
        if count > most
    ]
    count = f"{len(numbers)} row{'s' * (len(numbers) != 1)}"
    about = f"{count}, tokens by column; · is 0{'; ' + ' and '.join(left) if left else ''}"
    return (
        f'<p style="margin:0.6em 0 0.2em">{escaped(name)} <small>{about}</small></p>'
        f'<div style="overflow-x:auto"><table style="{_FIGURES}"><tr><th></th>{head}</tr>{body}</table></div>'
    )


_FIGURES = "border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:0.85em"


def _cell(value: float, bound: float) -> str:
    text = "·" if value == 0 else f"{value:.3g}".replace("-", "−")
    return f'<td style="{signed_background(value, bound)}text-align:right;padding:2px 6px">{text}</td>'


def episode_html(episode: Any) -> str:
    """An `Episode`: what was asked, how it ended, and its ids coloured by the log-prob that they were sampled with.

    An episode is ids; their text needs the tokenizer (`observe.coloured_texts`).
    """
    item, acts = episode.item, episode.action_mask
    facts = (
        f"{sum(acts)} of {len(acts)} tokens chosen by the policy, version {episode.policy_version[1]}; "
        f"stopped by {episode.stop}; group {episode.group}; log-prob {_short(sum(episode.logprobs))}"
    )
    prompt = (
        item.prompt if isinstance(item.prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in item.prompt)
    )
    answer = f"<p>Reference answer: {escaped(item.answer)}</p>" if item.answer else ""
    bound = max((-logprob for logprob, act in zip(episode.logprobs, acts, strict=True) if act), default=0.0)
    ids = "".join(_id(episode, k, bound) for k in range(min(len(acts), MOST_IDS)))
    more = f" … {len(acts) - MOST_IDS} more" if len(acts) > MOST_IDS else ""
    return (
        f"<div><strong>Episode {escaped(episode.id)}</strong>, item {escaped(item.id)}<br>"
        f"<small>{escaped(facts)}</small>"
        f'<pre style="white-space:pre-wrap;margin:0.4em 0">{escaped(prompt)}</pre>{answer}'
        f'<div style="overflow-wrap:anywhere;line-height:1.9;font-variant-numeric:tabular-nums">{ids}{more}</div>'
        "<small>ids of the tokens; violet: chosen by the policy, the less probable the stronger; pale: given</small>"
        "</div>"
    )


def _id(episode: Any, k: int, bound: float) -> str:
    if not episode.action_mask[k]:
        return f'<span style="opacity:0.55" title="token {k}, given">{episode.tokens[k]}</span> '
    told = f"token {k}, log-prob {_short(episode.logprobs[k])}"
    if episode.entropies is not None:
        told += f", entropy {_short(episode.entropies[k])}"
    strength = 0.12 + (FULL_STRENGTH - 0.12) * (-episode.logprobs[k] / bound if bound > 0 else 0.0)
    style = f"{background(MAGNITUDE, strength)}border-radius:3px;padding:0 2px"
    return f'<span style="{style}" title="{told}">{episode.tokens[k]}</span> '


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, escaped."""
    lines = [("th", head), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in row) for tag, row in lines)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _short(number: float) -> str:
    return f"{number:.4g}".replace("-", "−")
