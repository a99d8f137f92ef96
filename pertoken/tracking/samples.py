"""The samples of a run as a reader meets them: a list of all, and scenes of texts to be read side by side.

A scene is one prompt: a held-out item answered before and after the training, or the completions of one group in
one step. Every sample of the run folder is in the list with its figures; as many scenes as there is room for come
with all their tokens. Which ones is decided by rule, so that nobody picks the pretty ones: the first places of each
order (best, worst, most clipped, ...) in turn. A page that can ask for the others (the studio) gets a few; `scene_of`
has any of them.

Figures and places of samples come from the index of the run (`index.py`): only what is shown is read.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from pertoken.errors import RunFolderError
from pertoken.tracking.comparison import Comparison, compare, matches
from pertoken.tracking.files import Number, Row
from pertoken.tracking.glossary import HELD_OUT, STREAMS, find, label
from pertoken.tracking.index import four_digits, part_names, total
from pertoken.tracking.reader import RunReader

MAX_BYTES = 3_000_000
"""About how large all scenes may be together, as JSON: the page must open at once, on a phone too."""

MAX_BYTES_SERVED = 300_000
"""The same for a page that can ask for more: as many as the scales of the streams are measured on."""

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
    Order("In the order of the data", held_out=True, column="place", descending=False),
    Order("Best reward", held_out=False, column="reward"),
    Order("Worst reward", held_out=False, column="reward", descending=False),
    Order("Most clipped", held_out=False, column="clipped"),
    Order("Largest value error", held_out=False, column="value_error"),
    Order("Parts disagree most", held_out=False, column="disagreement"),
    Order("Furthest from the reference", held_out=False, column="kl"),
    Order("In order of steps", held_out=False, column="place", descending=False),
)


def browse(reader: RunReader, comparison: Comparison | None, *, served: bool = False) -> Row:
    """All that the page needs to show samples, as plain JSON: `lists`, `orders`, `scenes` by key, `scales`.

    A list has one column per figure; its column `scene` is the key of the scene that shows the sample. If the page is
    not `served`, it is null for those that there is no room for: nobody could be asked for them.
    `reference_is_before` says that the first evaluation found no distance to the reference: they are one model.
    """
    pairs = _held_out_pairs(reader, comparison)
    groups = training_groups(reader)
    candidates = [
        *(_Candidate(key, [pair], int(pair["size"]), held_out=True) for key, pair in pairs.items()),
        *(_Candidate(key, rows, _group_size(rows), held_out=False) for key, rows in groups.items()),
    ]
    chosen = _as_many_as_fit(candidates, MAX_BYTES_SERVED if served else MAX_BYTES)
    shown = {key: _pair_of(reader, comparison, pair) for key, pair in pairs.items() if comparison and key in chosen}
    shown |= {key: _group_scene(reader, _side_by_side(rows)) for key, rows in groups.items() if key in chosen}
    homes = {row["id"]: key for key, row in pairs.items()}
    homes |= {row["id"]: key for key, rows in groups.items() for row in _side_by_side(rows)}
    lists = {
        "held_out": list(pairs.values()),
        "training": sorted((row for rows in groups.values() for row in rows), key=lambda row: int(row["place"])),
    }
    orders = [
        {"label": order.label, "list": _list_of(order), "column": order.column, "descending": order.descending}
        for order in ORDERS
        if _says(order, lists[_list_of(order)])
    ]

    def home(row: Row) -> str | None:
        key = homes.get(row["id"])
        return (key or str(row["id"])) if served else key if key in chosen else None

    columns = {name: _columns([row | {"scene": home(row)} for row in rows]) for name, rows in lists.items()}
    distances = [pair["far"] for pair in pairs.values() if pair["far"] is not None]
    return {
        "lists": columns,
        "orders": orders,
        "scenes": shown,
        "scales": stream_scales(list(shown.values())),
        "gain_of": _gain_of(reader, comparison),
        "reference_is_before": bool(distances) and not any(distances),
    }


def _says(order: Order, rows: Sequence[Row]) -> bool:
    """Whether the order says anything of the rows: nothing is most clipped where nothing was."""
    return any(row.get(order.column) for row in rows) or (order.column == "place" and bool(rows))


def scene_of(reader: RunReader, sample: str) -> tuple[str, Row]:
    """The scene that shows a sample, and its key; RunFolderError if the run has no such sample.

    sample: `STEP.SAMPLE`, or `SPLIT.STEP.SAMPLE` of the first or the last evaluation, as the lists have it.
    """
    *split, step, line = ["", *sample.rsplit(".", 2)][-3:]
    if split == [""] and step.isdecimal():
        for key, rows in _groups_of(reader, int(step), 0).items():
            if wanted := next((row for row in rows if row["id"] == sample), None):
                beside = _side_by_side(rows)
                shown = wanted in beside
                return (key if shown else sample), _group_scene(
                    reader, beside if shown else _side_by_side(rows, wanted)
                )
    elif split != [""] and (comparison := compare(reader.evaluations())) and split == [comparison.split]:
        pair = _held_out_pairs(reader, comparison).get(f"{comparison.split}.{line}")
        if pair is not None and step in (str(comparison.before["step"]), str(comparison.after["step"])):
            return f"{comparison.split}.{line}", _pair_of(reader, comparison, pair)
    raise RunFolderError(f"{reader.folder} has no sample {sample}")


def samples_with(reader: RunReader, words: str) -> list[str]:
    """The samples whose item, prompt, answer or text has the words, whatever their case, by the ids of the lists."""
    words = words.lower()
    found = []
    if comparison := compare(reader.evaluations()):
        split, steps = comparison.split, (comparison.before["step"], comparison.after["step"])
        having = [
            {line for line, text in enumerate(reader.evaluation_texts(step, split)) if words in text.lower()}
            for step in steps
        ]
        for pair in _held_out_pairs(reader, comparison).values():
            if any(line in lines for line, lines in zip(pair["lines"], having, strict=True)):
                found.append(str(pair["id"]))
    for step in reader.episode_steps():
        texts = enumerate(reader.episode_texts(step))
        found += [f"{step}.{sample}" for sample, text in texts if words in text.lower()]
    return found


def stream_scales(shown: Sequence[Row]) -> list[Row]:
    """How to colour each stream: one scale for all samples, so that a colour means one number on the whole page.

    The bound is the 95th percentile of the distances from the neutral value: one odd token must not make all
    others pale. `flat` is a stream that is neutral everywhere: there is nothing to colour, only a number to read.
    """
    distances: dict[str, list[Number]] = {}
    for name, values in _cells(shown):
        zero = neutral(name)
        distances.setdefault(name, []).extend([abs(value - zero) for value in values])
    scales = []
    for name, found in distances.items():
        marked = [distance for distance in found if distance > 0]
        term = find(name, STREAMS)
        scales.append(
            {
                "name": name,
                "label": label(name, STREAMS),
                "meaning": term.explanation if term else "",
                "kind": term.scale if term else "signed",
                "bound": float(f"{_percentile_95(marked):.2g}") if marked else 1.0,
                "flat": not marked,
            }
        )
    order = {name: place for place, name in enumerate(STREAMS)}
    return sorted(scales, key=lambda scale: order.get(str(scale["name"]), -1))


def neutral(name: str) -> float:
    """The value of a stream that has no colour: 1 for a ratio, else 0."""
    term = find(name, STREAMS)
    return 1.0 if term is not None and term.scale == "around_one" else 0.0


def episode_panel(record: Row, step: int, sample: int) -> Row:
    """A panel about line `sample` of the episodes of `step`."""
    sums = {name: total(record["streams"][name]) for name in part_names(record)}
    facts = [f"{name.removeprefix('reward/')} {value:.3g}" for name, value in sums.items()]
    facts = [f"reward {total(record['streams'].get('reward/total', ())):.3g}", *facts, f"stopped by {record['stop']}"]
    title = f"Step {step}, sample {sample}"
    return {"id": f"{step}.{sample}", "title": title, "facts": _minus(facts), **_text(record, record["completion"])}


def pair_scene(before: Row, after: Row, comparison: Comparison, sample: int) -> Row:
    """A scene about one held-out item: its texts before and after the training, and which tokens both have.

    `match[t]` is the token of the other text that token `t` is aligned with, or -1.
    """
    split = comparison.split
    panels: list[Row] = []
    for name, evaluation, row in (("Before", comparison.before, before), ("After", comparison.after, after)):
        known = {metric: value for metric, value in row["metrics"].items() if value is not None}
        facts = [f"{label(metric, HELD_OUT)} {value:.3g}" for metric, value in known.items()]
        step = evaluation["step"]
        panel = {"id": f"{split}.{step}.{sample}", "title": f"{name} (step {step})", "facts": _minus(facts)}
        panels.append(panel | _text(row, row["output"]))
    if all("tokens" in panel for panel in panels):
        panels[0]["match"], panels[1]["match"] = matches(*(panel["tokens"]["id"] for panel in panels))
    return {
        "kind": "pair",
        "title": str(after["id"]),
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


def _held_out_pairs(reader: RunReader, comparison: Comparison | None) -> dict[str, Row]:
    """The items of `held_out_rows` by the key of their scene: figures, and `lines`, where both answers lie."""
    if comparison is None:
        return {}
    split = comparison.split
    steps = [comparison.before["step"], comparison.after["step"]]
    earlier, later = (reader.evaluation_index(step, split).rows for step in steps)
    before = {row["id"]: line for line, row in enumerate(earlier)}
    shared = [(before[row["id"]], line) for line, row in enumerate(later) if row["id"] in before]
    gain_of, pairs = _gain_of(reader, comparison), dict[str, Row]()

    def score(row: Row) -> Number | None:
        found: Number | None = row.get("reward") if gain_of == "reward" else row["metrics"].get(comparison.main)
        return found

    for sample, (first, last) in enumerate(shared):
        was, now = score(earlier[first]), score(later[last])
        pairs[f"{split}.{sample}"] = {
            "id": f"{split}.{steps[1]}.{sample}",
            "title": later[last]["id"],
            "before": four_digits(was),
            "after": four_digits(now),
            "gain": None if was is None or now is None else four_digits(now - was),
            "far": earlier[first].get("far"),
            "size": earlier[first]["size"] + later[last]["size"],
            "lines": (first, last),
            "place": sample,
            "oddity": None,
        }
    known = [pair for pair in pairs.values() if pair["gain"] is not None]
    typical = median([pair["gain"] for pair in known if pair["gain"]] or [0.0])
    for pair in known:
        pair["oddity"] = four_digits(abs(pair["gain"] - typical))
    furthest = max((pair["oddity"] for pair in known), default=0.0)
    for pair in known:
        if not pair["gain"]:  # often most of them: they come last, and are still found by their name
            pair["oddity"] = furthest
    return pairs


def _gain_of(reader: RunReader, comparison: Comparison | None) -> str:
    """What sorts items: the metric of the comparison, or their reward where single items have no such metric."""
    if comparison is None:
        return ""
    rows = reader.evaluation_index(comparison.after["step"], comparison.split).rows
    has_metric = any(row["metrics"].get(comparison.main) is not None for row in rows)
    return label(comparison.main, HELD_OUT) if has_metric else "reward"


def _pair_of(reader: RunReader, comparison: Comparison, pair: Row) -> Row:
    """The scene of one of `_held_out_pairs`."""
    steps = (comparison.before["step"], comparison.after["step"])
    (before,), (after,) = (
        reader.some_evaluation_items(step, comparison.split, [line])
        for step, line in zip(steps, pair["lines"], strict=True)
    )
    return pair_scene(before, after, comparison, pair["place"])


def training_groups(reader: RunReader) -> dict[str, list[Row]]:
    """The figures of all episodes that were kept, group by group."""
    groups: dict[str, list[Row]] = {}
    for step in reader.episode_steps():
        groups |= _groups_of(reader, step, sum(map(len, groups.values())))
    return groups


def _groups_of(reader: RunReader, step: int, place: int) -> dict[str, list[Row]]:
    """Those of one step; `place` samples came before it."""
    groups: dict[str, list[Row]] = {}
    keys: dict[object, str] = {}
    for sample, found in enumerate(reader.episode_index(step).rows):
        own = {name: value for name, value in found.items() if name not in ("item", "group")}
        row: Row = {"id": f"{step}.{sample}", "title": found["item"], "step": step, "place": place + sample} | own
        group = found.get("group")
        key = keys.setdefault(("alone", sample) if group is None else group, str(row["id"]))
        groups.setdefault(key, []).append(row)
    return groups


def _group_scene(reader: RunReader, rows: Sequence[Row]) -> Row:
    """A scene of some samples of one group."""
    step, samples = int(rows[0]["step"]), [int(row["id"].partition(".")[2]) for row in rows]
    records = reader.some_episodes(step, samples)
    panels = [episode_panel(record, step, sample) for record, sample in zip(records, samples, strict=True)]
    return {
        "kind": "group",
        "title": f"{records[0]['item']}, step {step}",
        "prompt": panels[0]["prompt"],
        "answer": records[0].get("answer") or "",
        "panels": [{name: value for name, value in panel.items() if name != "prompt"} for panel in panels],
    }


def _side_by_side(rows: Sequence[Row], wanted: Row | None = None) -> list[Row]:
    """Those that lead an order, then the first ones, as many as are shown; in the order of the file."""
    if len(rows) <= MAX_PANELS:
        return list(rows)
    leaders = [max(rows, key=order.key) for order in ORDERS if not order.held_out]
    chosen = {row["id"]: row for row in [*([wanted] if wanted else []), *leaders, *rows]}
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


def _as_many_as_fit(candidates: Sequence[_Candidate], room: int) -> set[str]:
    """The keys of the first places of all orders, then of the second ones, and so on while there is room."""
    ranked = []
    for order in ORDERS:
        ranks = {candidate: rank for candidate in candidates if (rank := candidate.rank(order)) > -math.inf}
        ranked.append(sorted(ranks, key=lambda candidate: -ranks[candidate]))
    chosen: set[str] = set()
    for place in range(max(map(len, ranked), default=0)):
        for candidate in (places[place] for places in ranked if place < len(places)):
            if candidate.key not in chosen and candidate.size <= room:
                room -= candidate.size
                chosen.add(candidate.key)
    return chosen


def _group_size(rows: Sequence[Row]) -> int:
    return sum(int(row["size"]) for row in _side_by_side(rows))


def _list_of(order: Order) -> str:
    return "held_out" if order.held_out else "training"


HIDDEN = ("size", "lines", "far")
"""What is known of a sample and not shown in a list."""


def _columns(rows: Sequence[Row]) -> Row:
    names = dict.fromkeys(name for row in rows for name in row if name not in HIDDEN)
    return {name: [row.get(name) for row in rows] for name in names}


def _text(row: Row, output: str) -> Row:
    """What a panel shows of a sample: the tokens from the first action on, the prompt as plain text."""
    panel = {"prompt": row.get("prompt") or ""}
    tokens = row.get("tokens")
    if not tokens or 1 not in tokens["action"]:
        return panel | {"text": output}
    start = tokens["action"].index(1)
    streams = {
        name: [four_digits(value) for value in values[start:]] for name, values in (row.get("streams") or {}).items()
    }
    prompt = "".join(tokens["piece"][:start]) or panel["prompt"]
    panel |= {"prompt": prompt, "tokens": {key: tokens[key][start:] for key in tokens}, "streams": streams}
    if others := row.get("alternatives"):
        kept = {name: others[name][start:] for name in ("rank", "id", "logprob")}
        panel["alternatives"] = kept | {"piece": others["piece"]}
    if found := row.get("findings"):
        panel["findings"] = [{**f, "start": f["start"] - start, "stop": f["stop"] - start} for f in found]
    return panel


def _minus(facts: Sequence[str]) -> list[str]:
    return [re.sub(r"(?<=[ e])-(?=\d)", "−", fact) for fact in facts]


def _cells(shown: Sequence[Row]) -> Iterator[tuple[str, list[Number]]]:
    """The streams of all texts, at the tokens that the model chose."""
    for scene in shown:
        for panel in scene["panels"]:
            for name, values in panel.get("streams", {}).items():
                pairs = zip(values, panel["tokens"]["action"], strict=True)
                yield name, [value for value, acts in pairs if acts and value is not None]


def _percentile_95(values: Sequence[Number]) -> Number:
    return max(values) if len(values) < 2 else min(max(values), quantiles(values, n=20)[-1])
