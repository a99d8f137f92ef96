"""The answers of a run in words, tables and colours, for a terminal."""

import math
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text as Words

from pertoken.display import harmless
from pertoken.errors import ConfigError
from pertoken.inquiry.asking import Answers, Text, WhatIf
from pertoken.inquiry.questions import Choice, Place
from pertoken.tracking.coloured import ColouredText

Part = str | Words | Table


def told(
    run: Answers,
    sample: str,
    *,
    token: int | None,
    swap: str | None,
    model: str | None,
    against: str | None,
    causes: bool,
    gradients: str | None,
    samples: int,
    seed: int,
) -> Iterator[Part]:
    """What was asked of a sample, part by part. `token` counts from 1; without any question, all tokens are listed."""
    if swap is not None and token is not None:
        yield from _what_if(run.what_if(sample, token - 1, text=swap, model=model, samples=samples, seed=seed), token)
        return
    if gradients is not None:
        yield from _attributions(run, sample, gradients, token, model, against)
        against = None  # is in these numbers
        if not causes:
            return
    if not causes and against is None:
        yield _alternatives(run.alternatives(sample, model=model), token)
        return
    if against is not None:
        name = f"log-prob, {model or run.models()[-1]} − {against}"
        yield from _coloured(run, sample, model, name, run.difference(sample, model=model, against=against))
    if causes:
        found = run.causes(sample)
        yield from found.notes
        for part, values in found.parts.items():
            yield from _coloured(run, sample, model, f"lost without the token: {part}", values)


def _alternatives(places: Sequence[Place], token: int | None) -> Table:
    if token is not None:
        if token > len(places):
            raise ConfigError(f"--token {token}: this sample has {len(places)}, counted from 1")
        place = places[token - 1]
        table = Table("instead", "probability", "log-prob", box=None, pad_edge=False)
        for other in place.others:
            mark = " (is there)" if other.token == place.chosen.token else ""
            table.add_row(Words(_quoted(other) + mark), _percent(other), f"{other.logprob:.4g}")
        if place.rank > len(place.others):
            table.add_row(Words(f"{_quoted(place.chosen)} (is there)"), _percent(place.chosen), f"rank {place.rank}")
        return table
    table = Table("token", "text", "probability", "rank", "entropy", "most probable", box=None, pad_edge=False)
    for number, place in enumerate(places, start=1):
        others = "  ".join(f"{_quoted(other)} {_percent(other)}" for other in place.others[:4])
        cells = (Words(_quoted(place.chosen)), _percent(place.chosen), str(place.rank), f"{place.entropy:.3f}")
        table.add_row(str(number), *cells, Words(others))
    return table


def _what_if(found: WhatIf, token: int) -> Iterator[Part]:
    added = len(found.would_be.pieces) - len(found.was.pieces)
    old = repr(harmless(found.was.pieces[token - 1]))
    new = repr(harmless("".join(found.would_be.pieces[token - 1 : token + added if added >= 0 else None])))
    yield from found.notes
    yield f"{new} in the place of {old}"
    yield f"the same text with it: {_paid(found.would_be)}, was {_paid(found.was)}"
    if found.effect is not None:
        interval = f"95% interval {found.effect.low:+.4g} to {found.effect.high:+.4g}"
        yield f"sampled on behind it, texts earn {found.effect.mean:+.4g} against those behind {old} ({interval})"
    for title, texts in ((old, found.onward), (new, found.onward_instead)):
        table = Table(f"behind {title}", "reward", "log-prob", "stop", box=None, pad_edge=False)
        for text in texts:
            rest = Words(harmless("".join(text.pieces[: text.begun])), "dim")
            rest += Words(harmless("".join(text.pieces[text.begun :])), "")
            earned = "" if text.paid is None else f"{text.paid['total']:.4g}"
            table.add_row(rest, earned, f"{sum(text.logprobs[text.begun :]):.4g}", text.stop)
        if texts:
            yield table


def _attributions(
    run: Answers, sample: str, of: str, token: int | None, model: str | None, against: str | None
) -> Iterator[Part]:
    if of not in ("policy", "reward"):
        raise ConfigError(f"--gradients {of}: expected policy or reward")
    asked = None if token is None else token - 1
    found = run.attributions(sample, of=of, token=asked, model=model, against=against)  # type: ignore[arg-type]
    yield from found.notes
    for name, one in found.scores.items():
        yield f"{name}: {one.score:.4g}; with neutral tokens in the place of these: {one.neutral:.4g}"
        yield from _shown(found.pieces, f"adds to: {name}", one.values)


def _coloured(run: Answers, sample: str, model: str | None, name: str, values: Sequence[float]) -> Iterator[Part]:
    pieces = [place.chosen.piece for place in run.alternatives(sample, model=model, count=1)]
    yield from _shown(pieces, name, values)


def _shown(pieces: Sequence[str], name: str, values: Sequence[float]) -> Iterator[Part]:
    text = ColouredText(pieces, list(values), name)
    yield Words(harmless(text.legend), "dim")
    yield text.terminal()
    ranked = sorted(range(len(pieces)), key=lambda k: -abs(values[k]))[:5]
    yield "largest: " + ", ".join(f"{k + 1} {harmless(pieces[k])!r} {values[k]:+.4g}" for k in ranked)


def _paid(text: Text) -> str:
    return "not rewarded" if text.paid is None else f"reward {text.paid['total']:.4g}"


def _quoted(choice: Choice) -> str:
    return repr(harmless(choice.piece))


def _percent(choice: Choice) -> str:
    return f"{100 * math.exp(choice.logprob):.3g}%"
