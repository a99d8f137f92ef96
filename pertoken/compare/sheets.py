"""Blind sheets: which of two answers is the better one? Whose they are stands in a file of its own.

A sheet is one page without network: items on which the last models of two arms differ, side by side. Its seed decides
which items, and who is on the left. A person's choices are kept in the browser and saved as JSON; `read_choices` looks
up whose they were.
"""

import base64
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from pertoken.compare.curves import Curve
from pertoken.compare.settings import Plan
from pertoken.errors import TaskError
from pertoken.text_metrics import Interval, bootstrap_mean
from pertoken.tracking.files import Row, encode, read_bytes, write_whole
from pertoken.tracking.reader import RunReader

FOLDER = "sheets"
CHOICES = ("left", "right", "same")


def write_sheets(plan: Plan, curves: Mapping[str, Sequence[Curve]]) -> tuple[list[Path], list[str]]:
    """A page and a key for each pair of arms that have a finished run of the same seed; and notes.

    A sheet that is there stays as it is while the answers are the same, so that choices on it keep their meaning.
    """
    pages, notes, wanted = list[Path](), list[str](), plan.settings.sheets
    for pair in plan.pairs() if wanted.items else []:
        runs = _runs(plan, pair, curves)
        if runs is None:
            continue
        rows = [_answers(run) for run in runs]
        shared = [item for item in rows[0] if item in rows[1]]
        differ = [item for item in shared if rows[0][item]["output"] != rows[1][item]["output"]]
        if not differ:
            notes.append(f"No sheet of {' and '.join(pair)}: they say the same on all {len(shared)} items.")
            continue
        drawn = random.Random(f"{wanted.seed}/{'/'.join(pair)}")
        items = drawn.sample(differ, min(wanted.items, len(differ)))
        swapped = [drawn.random() < 0.5 for _ in items]
        sides = [(rows[swap][item], rows[not swap][item]) for item, swap in zip(items, swapped, strict=True)]
        page = plan.folder / FOLDER / f"{'-vs-'.join(pair)}.html"
        lines = [_line(left, right) for left, right in sides]
        sheet = hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]
        key = {
            "sheet": sheet,
            "arms": list(pair),
            "seeds": [run.seed for run in runs],
            "differ": len(differ),
            "of": len(shared),
            "left": {item: pair[swap] for item, swap in zip(items, swapped, strict=True)},
        }
        write_whole(page.with_suffix(".key.json"), encode(key), "the key of a sheet")
        write_whole(page, _page(sheet, lines).encode(errors="replace"), "a sheet")
        pages.append(page)
        notes.append(f"Sheet of {' and '.join(pair)}: they differ on {len(differ)} of {len(shared)} items.")
    return pages, notes


def _runs(plan: Plan, pair: tuple[str, str], curves: Mapping[str, Sequence[Curve]]) -> list[Curve] | None:
    """The runs that are shown: of the first seed that both arms have; what is never trained has any seed."""
    found = [{curve.seed: curve for curve in curves.get(name, [])} for name in pair]
    if not all(found):
        return None
    fixed = [not plan.arms[name].trains for name in pair]
    seeds = [seed for seed in found[fixed[0]] if fixed[0] or fixed[1] or seed in found[1]]
    if not seeds:
        return None
    return [next(iter(own.values())) if stays else own[seeds[0]] for own, stays in zip(found, fixed, strict=True)]


def _answers(curve: Curve) -> dict[str, Row]:
    rows = RunReader(curve.folder).evaluation_items(curve.last.step, curve.split)
    return {row["id"]: row for row in rows}


def _line(left: Row, right: Row) -> dict[str, str]:
    return {
        "id": left["id"],
        "prompt": left["prompt"],
        "reference": left["answer"] or "",
        "left": left["output"],
        "right": right["output"],
    }


def _page(sheet: str, lines: Sequence[Mapping[str, str]]) -> str:
    script = _resource("sheet.js")
    data = json.dumps({"sheet": sheet, "items": list(lines)}, separators=(",", ":")).replace("<", "\\u003c")
    return Template(_resource("sheet.html")).substitute(
        policy=escape(_content_policy(script)), count=len(lines), data=data, script=script
    )


def _content_policy(script: str) -> str:
    """This script may run, and nothing else: no other code, no request."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"


def _resource(name: str) -> str:
    return files("pertoken.compare").joinpath(name).read_text(encoding="utf-8")


# --- what people said ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preference:
    """What people said of two arms."""

    arms: tuple[str, str]
    wins: int
    """Choices for the second arm."""
    ties: int
    losses: int
    items: int
    """That anybody judged."""
    raters: int
    rate: Interval
    """Win rate of the second arm, ties half, items drawn again with replacement; raters of an item count together."""
    agreement: float | None
    """Share of pairs of raters who said the same of an item; None with one rater."""

    def told(self) -> str:
        """In a sentence."""
        first, second = self.arms
        agreed = "" if self.agreement is None else f"; raters agree on {self.agreement:.0%}"
        return (
            f"{second} against {first}: win rate {self.rate.mean:.1%} [{self.rate.low:.1%}, {self.rate.high:.1%}] "
            f"({self.wins} better, {self.ties} as good, {self.losses} worse; {self.items} items, {self.raters} "
            f"rater{'s' * (self.raters != 1)}{agreed}). The interval is over items, on which the two differ."
        )


def read_choices(folder: Path, choices: Sequence[Path]) -> list[Preference]:
    """What people chose on the sheets of a comparison, by pair of arms.

    Raises TaskError for a file that is not of one of its sheets as they are now.
    """
    keys = {key["sheet"]: key for path in sorted((folder / FOLDER).glob("*.key.json")) if (key := _json(path))}
    by_sheet: dict[str, list[dict[str, float]]] = {}
    for path in choices:
        said = _json(path)
        sheet = str(said.get("sheet"))
        if sheet not in keys:
            raise TaskError(
                f"{path}: choices on no sheet of {folder / FOLDER} as it is now. Its answers were others then: keep "
                "the folder that the sheet came from, or judge the new one"
            )
        given = said.get("choices")
        if not isinstance(given, dict) or not given:
            raise TaskError(f"{path}: expected a map `choices` from items to {', '.join(CHOICES)}")
        by_sheet.setdefault(sheet, []).append(
            {item: _score(path, keys[sheet], item, choice) for item, choice in given.items()}
        )
    return [_preference(keys[sheet], raters) for sheet, raters in by_sheet.items()]


def _score(path: Path, key: Row, item: str, choice: Any) -> float:
    """1 if the second arm was chosen, 0 if the first, a half for neither."""
    if item not in key["left"] or choice not in CHOICES:
        expected = f"expected an item of the sheet, and one of {', '.join(CHOICES)}"
        raise TaskError(f"{path}: item {item!r}, choice {choice!r}: {expected}")
    if choice == "same":
        return 0.5
    return float((choice == "left") == (key["left"][item] == key["arms"][1]))


def _preference(key: Row, raters: Sequence[Mapping[str, float]]) -> Preference:
    scores = [score for rater in raters for score in rater.values()]
    items = list(dict.fromkeys(item for rater in raters for item in rater))
    means = [fmean(rater[item] for rater in raters if item in rater) for item in items]
    alike = [one[item] == two[item] for one, two in combinations(raters, 2) for item in one if item in two]
    return Preference(
        arms=(key["arms"][0], key["arms"][1]),
        wins=scores.count(1.0),
        ties=scores.count(0.5),
        losses=scores.count(0.0),
        items=len(items),
        raters=len(raters),
        rate=bootstrap_mean(means),
        agreement=fmean(alike) if alike else None,
    )


def _json(path: Path) -> Row:
    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise TaskError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise TaskError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
