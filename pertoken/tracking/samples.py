"""The samples of a run as a reader meets them: a list of all, and scenes of texts to be read side by side.

A scene is one prompt: a held-out item answered before and after the training, or the completions of one group in
one step. Every sample of the run folder is in the list with its figures; as many scenes as there is room for come
with all their tokens. Which ones is decided by rule, so that nobody picks the pretty ones: the first places of each
order (best, worst, most clipped, ...) in turn.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from pertoken.tracking.comparison import Comparison, matches
from pertoken.tracking.files import Number, Row, encode
from pertoken.tracking.glossary import HELD_OUT, STREAMS, find, label
from pertoken.tracking.reader import RunReader

MAX_BYTES = 3_000_000
"""About how large all scenes may be together, as JSON: the page must open at once, on a phone too."""

MAX_PANELS = 8
"""Texts side by side; of a larger group those that lead an order, then the first ones."""


@dataclass(frozen=True)
class Order:
    """A way to sort the samples, and the answer to a question: which are the best, the most clipped, ..."""

    label: str
    held_out: bool
    column: str
    """The figure that sorts."""
    descending: bool = True

    def key(self, figures: Row) -> float:
        """Larger comes first; what lacks the figure comes last."""
        value = figures.get(self.column)
        return -math.inf if value is None else float(value if self.descending else -value)


ORDERS = (
    Order("Typical change", held_out=True, column="oddity", descending=False),
    Order("Largest gain", held_out=True, column="gain"),
    Order("Largest loss", held_out=True, column="gain", descending=False),
    Order("Best reward", held_out=False, column="reward"),
    Order("Worst reward", held_out=False, column="reward", descending=False),
    Order("Most clipped", held_out=False, column="clipped"),
    Order("Largest value error", held_out=False, column="value_error"),
    Order("Parts disagree most", held_out=False, column="disagreement"),
    Order("Furthest from the reference", held_out=False, column="kl"),
    Order("In order of steps", held_out=False, column="place", descending=False),
)


def browse(reader: RunReader, comparison: Comparison | None) -> Row:
    """All that the page needs to show samples, as plain JSON: `lists`, `orders`, `scenes` by key, `scales`.

    A list has one column per figure; its column `scene` is the key of the scene that shows the sample, or null.
    `reference_is_before` says that the first evaluation found no distance to the reference: they are one model.
    """
    pairs = {str(scene["key"]): scene for scene in _held_out_scenes(reader, comparison)}
    groups = training_groups(reader)
    candidates = [
        *(_Candidate(key, [scene["figures"]], len(encode(scene)), held_out=True) for key, scene in pairs.items()),
        *(_Candidate(key, rows, _group_size(rows), held_out=False) for key, rows in groups.items()),
    ]
    chosen = _as_many_as_fit(candidates)
    shown = {
        key: {name: value for name, value in scene.items() if name not in ("key", "figures")}
        for key, scene in pairs.items()
        if key in chosen
    }
    shown |= dict(_group_scenes(reader, {key: rows for key, rows in groups.items() if key in chosen}))
    homes = {panel["id"]: key for key, scene in shown.items() for panel in scene["panels"]}
    lists = {
        "held_out": [{"id": scene["panels"][-1]["id"], **scene["figures"]} for scene in pairs.values()],
        "training": sorted((row for rows in groups.values() for row in rows), key=lambda row: int(row["place"])),
    }
    orders = [
        {"label": order.label, "list": _list_of(order), "column": order.column, "descending": order.descending}
        for order in ORDERS
        if any(row.get(order.column) is not None for row in lists[_list_of(order)])
    ]
    columns = {name: _columns([row | {"scene": homes.get(row["id"])} for row in rows]) for name, rows in lists.items()}
    distances = [value for scene in pairs.values() for value in scene["panels"][0].get("streams", {}).get("kl", [])]
    return {
        "lists": columns,
        "orders": orders,
        "scenes": shown,
        "scales": stream_scales(list(shown.values())),
        "reference_is_before": bool(distances) and not any(distances),
    }


def stream_scales(shown: Sequence[Row]) -> list[Row]:
    """How to colour each stream: one scale for all samples, so that a colour means one number on the whole page.

    The bound is the 95th percentile of the distances from the neutral value: one odd token must not make all
    others pale. Streams that are neutral everywhere are left out.
    """
    distances: dict[str, list[Number]] = {}
    for name, value in _cells(shown):
        distances.setdefault(name, []).append(abs(value - neutral(name)))
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


def neutral(name: str) -> float:
    """The value of a stream that has no colour: 1 for a ratio, else 0."""
    term = find(name, STREAMS)
    return 1.0 if term is not None and term.scale == "around_one" else 0.0


def figures(record: Row) -> dict[str, Number]:
    """What an episode is sorted by, as far as its streams tell.

    `reward`, the total; `clipped`, share of its actions; `value_error`, root of the mean square of target − value;
    `kl`, summed; `disagreement`, how much reward the parts took from each other: (Σ |part| − |Σ part|) / 2.
    """
    streams, count = record["streams"], max(1, sum(record["tokens"]["action"]))
    sums = {name: _total(values) for name, values in streams.items()}
    found: dict[str, Number] = {"reward": sums.get("reward/total", 0.0), "tokens": count}
    if "clipped" in streams:
        found["clipped"] = sums["clipped"] / count
    errors = streams.get("value_error")
    if errors is None and "value" in streams and "return" in streams:
        pairs = zip(streams["return"], streams["value"], strict=True)
        errors = [(r or 0.0) - (v or 0.0) for r, v in pairs]
    if errors is not None:
        found["value_error"] = math.sqrt(math.fsum((error or 0.0) ** 2 for error in errors) / count)
    if "kl" in streams:
        found["kl"] = sums["kl"]
    if len(parts := part_names(record)) > 1:
        found["disagreement"] = (math.fsum(abs(sums[p]) for p in parts) - abs(math.fsum(sums[p] for p in parts))) / 2
    return {name: _short(value) or 0 for name, value in found.items()}


def part_names(record: Row) -> list[str]:
    """The streams of a record that are parts of the reward."""
    return [name for name in record.get("streams") or {} if name.startswith("reward/") and name != "reward/total"]


def episode_panel(record: Row, step: int, sample: int) -> Row:
    """A panel about line `sample` of the episodes of `step`."""
    sums = {name: _total(record["streams"][name]) for name in part_names(record)}
    facts = [f"{name.removeprefix('reward/')} {value:.3g}" for name, value in sums.items()]
    facts = [f"reward {figures(record)['reward']:.3g}", *facts, f"stopped by {record['stop']}"]
    title = f"Step {step}, sample {sample}"
    return {"id": f"{step}.{sample}", "title": title, "facts": _minus(facts), **_text(record, record["completion"])}


def pair_scene(before: Row, after: Row, comparison: Comparison, sample: int) -> Row:
    """A scene about one held-out item: its texts before and after the training, and which tokens both have.

    `match[t]` is the token of the other text that token `t` is aligned with, or -1.
    """
    split, main = comparison.split, comparison.main
    panels: list[Row] = []
    for name, evaluation, row in (("Before", comparison.before, before), ("After", comparison.after, after)):
        known = {metric: value for metric, value in row["metrics"].items() if value is not None}
        facts = [f"{label(metric, HELD_OUT)} {value:.3g}" for metric, value in known.items()]
        step = evaluation["step"]
        panel = {"id": f"{split}.{step}.{sample}", "title": f"{name} (step {step})", "facts": _minus(facts)}
        panels.append(panel | _text(row, row["output"]))
    if all("tokens" in panel for panel in panels):
        panels[0]["match"], panels[1]["match"] = matches(*(panel["tokens"]["id"] for panel in panels))
    scores = [row["metrics"].get(main) for row in (before, after)]
    found = {"before": scores[0], "after": scores[1], "gain": None if None in scores else scores[1] - scores[0]}
    return {
        "key": f"{split}.{sample}",
        "kind": "pair",
        "title": str(after["id"]),
        "figures": {"title": str(after["id"]), **{name: _short(value) for name, value in found.items()}},
        "prompt": panels[1].pop("prompt") or panels[0]["prompt"],
        "answer": after.get("answer") or "",
        "panels": [{key: value for key, value in panel.items() if key != "prompt"} for panel in panels],
    }


def held_out_rows(reader: RunReader, comparison: Comparison) -> list[tuple[Row, Row]]:
    """The held-out items that were answered before and after, in the order of the last evaluation."""
    split = comparison.split
    before = {row["id"]: row for row in reader.evaluation_items(comparison.before["step"], split)}
    after = reader.evaluation_items(comparison.after["step"], split)
    return [(before[row["id"]], row) for row in after if row["id"] in before]


def _held_out_scenes(reader: RunReader, comparison: Comparison | None) -> Iterator[Row]:
    if comparison is None:
        return
    scenes = [
        pair_scene(before, after, comparison, sample)
        for sample, (before, after) in enumerate(held_out_rows(reader, comparison))
    ]
    gains = [scene["figures"]["gain"] for scene in scenes if scene["figures"]["gain"] is not None]
    for scene in scenes:
        gain = scene["figures"]["gain"]
        scene["figures"]["oddity"] = None if gain is None else _short(abs(gain - median(gains)))
        yield scene


def training_groups(reader: RunReader) -> dict[str, list[Row]]:
    """The figures of all episodes that were kept, group by group; one step is in memory at a time."""
    groups: dict[str, list[Row]] = {}
    place = 0
    for step in reader.episode_steps():
        keys: dict[object, str] = {}
        for sample, record in enumerate(reader.episodes(step)):
            row: Row = {"id": f"{step}.{sample}", "title": str(record["item"]), "step": step, "place": place}
            key = keys.setdefault(record.get("group", sample), str(row["id"]))
            groups.setdefault(key, []).append(row | figures(record) | {"size": _size(record)})
            place += 1
    return groups


def _group_scenes(reader: RunReader, groups: Mapping[str, list[Row]]) -> Iterator[tuple[str, Row]]:
    """The scenes of these groups; each step is read once."""
    for step, keys in itertools.groupby(groups, key=lambda key: int(groups[key][0]["step"])):
        records = reader.episodes(step)
        for key in keys:
            samples = [int(row["id"].partition(".")[2]) for row in _side_by_side(groups[key])]
            panels = [episode_panel(records[sample], step, sample) for sample in samples]
            first = records[samples[0]]
            yield (
                key,
                {
                    "kind": "group",
                    "title": f"{first['item']}, step {step}",
                    "prompt": panels[0]["prompt"],
                    "answer": first.get("answer") or "",
                    "panels": [{name: value for name, value in panel.items() if name != "prompt"} for panel in panels],
                },
            )


def _side_by_side(rows: Sequence[Row]) -> list[Row]:
    """Those that lead an order, then the first ones, as many as are shown; in the order of the file."""
    leaders = [max(rows, key=order.key) for order in ORDERS if not order.held_out]
    chosen = {row["id"]: row for row in [*leaders, *rows]}
    return sorted(list(chosen.values())[:MAX_PANELS], key=lambda row: int(row["place"]))


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A scene that may be shown: the figures of its samples, and about how large it is as JSON."""

    key: str
    rows: Sequence[Row]
    size: int
    held_out: bool

    def rank(self, order: Order) -> float:
        return max(map(order.key, self.rows)) if order.held_out == self.held_out else -math.inf


def _as_many_as_fit(candidates: Sequence[_Candidate]) -> set[str]:
    """The keys of the first places of all orders, then of the second ones, and so on while there is room."""
    ranked = []
    for order in ORDERS:
        ranks = {candidate: rank for candidate in candidates if (rank := candidate.rank(order)) > -math.inf}
        ranked.append(sorted(ranks, key=lambda candidate: -ranks[candidate]))
    chosen: set[str] = set()
    room = MAX_BYTES
    for place in range(max(map(len, ranked), default=0)):
        for candidate in (places[place] for places in ranked if place < len(places)):
            if candidate.key not in chosen and candidate.size <= room:
                room -= candidate.size
                chosen.add(candidate.key)
    return chosen


def _group_size(rows: Sequence[Row]) -> int:
    return sum(int(row["size"]) for row in _side_by_side(rows))


def _size(record: Row) -> int:
    """About how many bytes of the page an episode takes: a zero two, another number seven, a token fourteen."""
    tokens = record["tokens"]["action"]
    if 1 not in tokens:
        return len(str(record["completion"]))
    shown, streams = len(tokens) - tokens.index(1), record["streams"].values()
    zeros = sum(int(values.count(0)) for values in streams) - tokens.index(1) * len(streams)
    return int(2 * zeros + 7 * (shown * len(streams) - zeros) + 14 * shown + len(record.get("prompt") or ""))


def _list_of(order: Order) -> str:
    return "held_out" if order.held_out else "training"


def _columns(rows: Sequence[Row]) -> Row:
    names = dict.fromkeys(name for row in rows for name in row if name != "size")
    return {name: [row.get(name) for row in rows] for name in names}


def _text(row: Row, output: str) -> Row:
    """What a panel shows of a sample: the tokens from the first action on, the prompt as plain text."""
    panel = {"prompt": row.get("prompt") or ""}
    tokens = row.get("tokens")
    if not tokens or 1 not in tokens["action"]:
        return panel | {"text": output}
    start = tokens["action"].index(1)
    streams = {name: [_short(value) for value in values[start:]] for name, values in (row.get("streams") or {}).items()}
    prompt = "".join(tokens["piece"][:start]) or panel["prompt"]
    panel |= {"prompt": prompt, "tokens": {key: tokens[key][start:] for key in tokens}, "streams": streams}
    if found := row.get("findings"):
        panel["findings"] = [{**f, "start": f["start"] - start, "stop": f["stop"] - start} for f in found]
    return panel


def _minus(facts: Sequence[str]) -> list[str]:
    return [fact.replace(" -", " −") for fact in facts]


def _total(values: Sequence[Number | None]) -> float:
    return math.fsum(values if None not in values else [value or 0.0 for value in values])  # type: ignore[arg-type]


def _cells(shown: Sequence[Row]) -> Iterator[tuple[str, Number]]:
    for scene in shown:
        for panel in scene["panels"]:
            for name, values in panel.get("streams", {}).items():
                for value, acts in zip(values, panel["tokens"]["action"], strict=True):
                    if acts and value is not None:
                        yield name, value


def _percentile_95(values: Sequence[Number]) -> Number:
    return max(values) if len(values) < 2 else min(max(values), quantiles(values, n=20)[-1])


def _short(value: Number | None) -> Number | None:
    return value if value is None else float(f"{value:.4g}") or 0
