"""Which samples the report shows, and in which colours: scenes of one to three texts to be read side by side."""

import math
from collections.abc import Iterator, Sequence
from statistics import quantiles

from pertoken.tracking.comparison import Comparison
from pertoken.tracking.files import Number, Row, encode
from pertoken.tracking.glossary import HELD_OUT, STREAMS, find, label
from pertoken.tracking.reader import RunReader

MAX_BYTES = 2_000_000
"""Scenes beyond this size are left out: the page must open at once, on a phone too."""

PAIRS_PER_KIND = 4


def scenes(reader: RunReader, comparison: Comparison | None) -> list[Row]:
    """The samples to show, as plain JSON: held-out pairs, then training episodes, as far as there is room.

    The choice is made by rule, so that nobody picks the pretty ones: held-out items with the typical change, the
    largest gain and the largest loss; training episodes with the best, the median and the worst reward of the
    first, a middle and the last step.
    """
    chosen, room = [], MAX_BYTES
    for scene in [*_training_scenes(reader), *_held_out_scenes(reader, comparison)]:
        room -= len(encode(scene))
        if room >= 0:
            chosen.append(scene)
    return sorted(chosen, key=lambda scene: not scene["held_out"])


def stream_scales(shown: Sequence[Row]) -> list[Row]:
    """How to colour each stream: one scale for all samples, so that a colour means one number on the whole page.

    The bound is the 95th percentile of the distances from the neutral value: one odd token must not make all
    others pale. Streams that are neutral everywhere are left out.
    """
    distances: dict[str, list[Number]] = {}
    for name, value in _cells(shown):
        distances.setdefault(name, []).append(abs(value - _neutral(name)))
    scales = []
    for name, found in distances.items():
        marked = [distance for distance in found if distance > 0]
        if not marked:
            continue
        term = find(name, STREAMS)
        scales.append(
            {
                "name": name,
                "label": label(name, STREAMS),
                "meaning": term.explanation if term else "",
                "kind": term.scale if term else "signed",
                "bound": float(f"{_percentile_95(marked):.2g}"),
            }
        )
    order = {name: place for place, name in enumerate(STREAMS)}
    return sorted(scales, key=lambda scale: order.get(str(scale["name"]), -1))


def _held_out_scenes(reader: RunReader, comparison: Comparison | None) -> Iterator[Row]:
    if comparison is None:
        return
    split, main = comparison.split, comparison.main
    steps = (comparison.before["step"], comparison.after["step"])
    before, after = ({row["id"]: row for row in reader.evaluation_items(step, split)} for step in steps)

    def gain(item: str) -> float:
        scores = [rows[item]["metrics"].get(main) for rows in (before, after)]
        return 0.0 if None in scores else float(scores[1] - scores[0])

    ranked = sorted(before.keys() & after.keys(), key=lambda item: (gain(item), item))
    middle = max(0, (len(ranked) - PAIRS_PER_KIND) // 2)
    kinds = {
        "typical": ranked[middle : middle + PAIRS_PER_KIND],
        "largest gain": ranked[::-1][:PAIRS_PER_KIND],
        "largest loss": ranked[:PAIRS_PER_KIND],
    }
    seen: set[str] = set()
    for kind, items in kinds.items():
        for item in items:
            if item in seen:  # few items: one may be of two kinds
                continue
            seen.add(item)
            yield {
                "held_out": True,
                "group": f"Held-out items: {kind} change" if kind == "typical" else f"Held-out items: {kind}",
                "title": f"{item} ({label(main, HELD_OUT)} {gain(item):+.3f})",
                "panels": [
                    _held_out_panel(f"Before (step {steps[0]})", before[item]),
                    _held_out_panel(f"After (step {steps[1]})", after[item]),
                ],
            }


def _held_out_panel(title: str, row: Row) -> Row:
    facts = [f"{label(name, HELD_OUT)} {value:.3g}" for name, value in row["metrics"].items() if value is not None]
    return {"title": title, "facts": facts, **_text(row, row["output"])}


def _training_scenes(reader: RunReader) -> Iterator[Row]:
    steps = reader.episode_steps()
    for step in dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]] if steps else []):
        ranked = sorted(reader.episodes(step), key=_reward, reverse=True)
        if not ranked:
            continue
        picks = {"Best": ranked[0], "Median": ranked[len(ranked) // 2], "Worst": ranked[-1]}
        distinct = {record["id"]: (name, record) for name, record in reversed(picks.items())}
        yield {
            "held_out": False,
            "group": "Training episodes",
            "title": f"step {step}: best, median and worst of {len(ranked)}",
            "panels": [_episode_panel(name, record) for name, record in reversed(distinct.values())],
        }


def _episode_panel(title: str, record: Row) -> Row:
    facts = [f"total reward {_reward(record):.3f}", f"item {record['item']}", f"stopped by {record['stop']}"]
    return {"title": title, "facts": facts, **_text(record, record["completion"])}


def _text(row: Row, output: str) -> Row:
    """What a panel shows of a sample: the tokens from the first action on, the prompt as plain text."""
    panel = {"prompt": row.get("prompt") or "", "answer": row.get("answer") or ""}
    tokens = row.get("tokens")
    if not tokens or 1 not in tokens["action"]:
        return panel | {"text": output}
    start = tokens["action"].index(1)
    streams = {name: [_short(value) for value in values[start:]] for name, values in (row.get("streams") or {}).items()}
    prompt = "".join(tokens["piece"][:start]) or panel["prompt"]
    return panel | {"prompt": prompt, "tokens": {key: tokens[key][start:] for key in tokens}, "streams": streams}


def _reward(record: Row) -> float:
    return math.fsum(value or 0.0 for value in record["streams"].get("reward/total", []))


def _cells(shown: Sequence[Row]) -> Iterator[tuple[str, Number]]:
    for scene in shown:
        for panel in scene["panels"]:
            for name, values in panel.get("streams", {}).items():
                for value, acts in zip(values, panel["tokens"]["action"], strict=True):
                    if acts and value is not None:
                        yield name, value


def _neutral(name: str) -> float:
    term = find(name, STREAMS)
    return 1.0 if term is not None and term.scale == "around_one" else 0.0


def _percentile_95(values: Sequence[Number]) -> Number:
    return max(values) if len(values) < 2 else min(max(values), quantiles(values, n=20)[-1])


def _short(value: Number | None) -> Number | None:
    return value if value is None else float(f"{value:.4g}") or 0
