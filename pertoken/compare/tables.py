"""What a comparison has found, as Markdown, as one HTML page, as LaTeX and as JSON; its curves as pictures."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from statistics import fmean

from pertoken.compare.curves import Axis
from pertoken.compare.figures import Figure, Line, Measured, Reached, Score
from pertoken.compare.pictures import PICTURES, draw
from pertoken.errors import MissingExtraError
from pertoken.text_metrics import DRAWS, Interval
from pertoken.tracking.files import encode, write_whole
from pertoken.tracking.glossary import HELD_OUT, label

NAME = "comparison"
"""What the files are called."""

STYLE = """
:root { color-scheme: light dark; font: 16px/1.55 system-ui, sans-serif; }
body { max-width: 1340px; margin: 32px auto; padding: 0 24px; }
h2 { font-size: 1.1rem; margin: 36px 0 8px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; width: 100%; }
td { white-space: nowrap; }
th, td { text-align: right; padding: 6px 0 6px 16px; border-bottom: 1px solid rgba(128, 128, 128, 0.35); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { vertical-align: bottom; }
figure { display: inline-block; margin: 12px 12px 0 0; }
img { background: #fff; max-width: 100%; border-radius: 8px; }
"""


@dataclass(frozen=True)
class Table:
    """Plain cells under heads; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A pipe table under its title."""
        lines = [self.head, ("---", *["---:"] * (len(self.head) - 1)), *self.rows]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        return f"## {self.title}\n\n{table}\n"

    def html(self) -> str:
        """The same as elements."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.head)
        rows = "".join(
            f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
            for first, *rest in self.rows
        )
        return (
            f'<h2>{escape(self.title)}</h2><div class="scroll" tabindex="0" role="region" '
            f'aria-label="{escape(self.title)}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )

    def latex(self) -> str:
        """The same with the rules of booktabs."""
        lines = [" & ".join(map(_tex, line)) + r" \\" for line in (self.head, *self.rows)]
        body = "\n".join([r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"])
        columns = "l" + "r" * (len(self.head) - 1)
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{_tex(self.title)}}}\n\\begin{{tabular}}{{{columns}}}\n{body}\n"
            "\\end{tabular}\n\\end{table}\n"
        )


@dataclass(frozen=True)
class Report:
    """All that is said of a comparison."""

    title: str
    scores: tuple[Score, ...]
    reached: tuple[Reached, ...]
    tables: tuple[Table, ...]
    words: tuple[str, ...]
    """Below the tables: what the intervals are, who is how fast, what is missing."""

    @classmethod
    def of(cls, measured: Measured, notes: Sequence[str] = ()) -> "Report":
        """What the curves come to; `notes` are said at the end."""
        plan, scores = measured.plan, tuple(measured.scores())
        reached = tuple(measured.reached())
        tables = [table_of(score, plan.against) for score in scores]
        words = [*_about_intervals(measured, scores), *_about_start(measured), *_about_speed(measured, reached), *notes]
        return cls(f"{plan.folder.name}: {', '.join(measured.curves)}", scores, reached, tuple(tables), tuple(words))

    def as_json(self) -> dict[str, object]:
        """All figures, unrounded."""
        return {
            "title": self.title,
            "scores": [asdict(score) for score in self.scores],
            "reached": [asdict(each) for each in self.reached],
            "words": list(self.words),
        }


def table_of(score: Score, against: str) -> Table:
    """One metric at one reading, a row for each arm."""
    name = label(score.metric, HELD_OUT)
    change = f"minus {against}"
    head = (
        "arm", name, "95%, items", "95%, seeds", "by seed", change, "95%, items", "95%, seeds", "relative",
        "95%, items", "proven", "tokens", "seconds",
    )  # fmt: skip
    rows = tuple(_row(line) for line in score.lines)
    return Table(f"{name} {score.reading.title}", head, rows)


def _row(line: Line) -> tuple[str, ...]:
    by_seed = "  ".join(f"{value:.4g}" for value in line.by_seed)
    return (
        line.arm,
        f"{line.figure.value:.4g}",
        *_ends(line.figure),
        by_seed,
        *(["", "", ""] if line.change is None else [f"{line.change.value:+.3g}", *_ends(line.change, signed=True)]),
        *(["", ""] if line.relative is None else [f"{line.relative.value:+.1%}", _percent(line.relative.items)]),
        line.judgement or "",
        f"{line.tokens:,.0f}" if line.tokens else "",
        f"{line.seconds:,.0f}" if line.seconds else "",
    )


def _ends(figure: Figure, *, signed: bool = False) -> list[str]:
    """Its two intervals; a dash where there is none."""
    sign = "+" if signed else ""
    return ["–" if i is None else f"[{i.low:{sign}.3g}, {i.high:{sign}.3g}]" for i in (figure.items, figure.seeds)]


def _percent(interval: Interval | None) -> str:
    return "–" if interval is None else f"[{interval.low:+.1%}, {interval.high:+.1%}]"


def _about_intervals(measured: Measured, scores: Sequence[Score]) -> list[str]:
    seeds = max(len(line.by_seed) for score in scores for line in score.lines)
    items = ", ".join(sorted({f"{score.num_items}" for score in scores}))
    over_seeds = (
        f"over seeds: Student's t over the {seeds} runs of an arm (paired by seed for differences): training once more"
        if seeds > 1
        else "over seeds: none, there is one seed; what another run would give is not known"
    )
    fewer = [
        f"Only {score.num_items} of {score.most_items} held-out items are in all runs, and the others are left out: an "
        "arm that answers fewer (its context cannot hold them with their answers) costs all arms those items."
        for score in scores[:1]
        if score.num_items < score.most_items
    ]
    return [
        *fewer,
        f"Intervals over items: paired bootstrap, {DRAWS} resamples of the {items} held-out items, with the trained "
        "models as they are. A dash: the metric is not known item by item.",
        f"Intervals {over_seeds}. Proven: a difference whose intervals both leave out 0; `on these items` where only "
        "that over items does.",
        "Values between two evaluations lie on the straight line between them. Tokens are generated ones; seconds are "
        "those of training alone, without loading, evaluations and saving.",
    ]


def _about_start(measured: Measured) -> list[str]:
    """What it took to make the model that others begin with: it is in nobody's tokens and seconds."""
    start = measured.plan.start
    if start is None or start not in measured.curves:
        return []
    seconds = fmean(curve.last.seconds for curve in measured.curves[start])
    return [f"Arms that begin with {start} need its {seconds:,.0f} s of training first; they are in none of the rows."]


def _about_speed(measured: Measured, reached: Sequence[Reached]) -> list[str]:
    terminal, metric = measured.plan.terminal, label(measured.plan.metrics[0], HELD_OUT)
    found = []
    for each in reached:
        by_seed = ", ".join("never" if share is None else f"{share:.0%}" for share in each.by_seed)
        whose = f"the final {metric} of {terminal} ({each.target:.4g})"
        if each.tokens is None:
            told = f"{each.arm} does not reach {whose}"
        else:
            seconds = "" if each.seconds is None else f" and {each.seconds:.0%} of its seconds"
            told = f"{each.arm} reaches {whose} after {each.tokens:.0%} of its tokens{seconds}"
        found.append(f"{told}, by mean curves over seeds; share of tokens seed by seed: {by_seed or 'no common seed'}.")
    return found


def write_report(report: Report, measured: Measured, sheets: Sequence[Path]) -> list[Path]:
    """Write tables, page, figures and curves into the folder of the comparison; the files."""
    folder = measured.plan.folder
    curves, words = _curves(measured), list(report.words)
    if isinstance(curves, str):
        words.append(curves)
        curves = {}
    texts = {
        "md": _markdown(report, words),
        "html": _html(report, words, curves, [sheet.relative_to(folder).as_posix() for sheet in sheets]),
        "tex": "\n".join(["% needs \\usepackage{booktabs}", *(table.latex() for table in report.tables)])
        + "".join(f"% {word}\n" for word in words),
    }
    files = []
    for suffix, text in texts.items():
        files.append(folder / f"{NAME}.{suffix}")
        write_whole(files[-1], text.encode(errors="replace"), "the tables of the comparison")
    files.append(folder / f"{NAME}.json")
    write_whole(files[-1], encode(report.as_json()), "the figures of the comparison")
    for name, drawn in curves.items():
        for kind, content in drawn.items():
            files.append(folder / "curves" / f"{name}.{kind}")
            write_whole(files[-1], content, "a picture of the comparison")
    return files


def _curves(measured: Measured) -> dict[str, dict[str, bytes]] | str:
    """Every metric over tokens and over seconds, in every format; or why there are none."""
    axes: tuple[Axis, ...] = ("tokens", "seconds")
    if not measured.learners:
        return {}
    try:
        return {f"{metric}-{axis}": draw(measured, metric, axis) for metric in measured.plan.metrics for axis in axes}
    except MissingExtraError as error:
        return f"No curves were drawn: {error}"


def _markdown(report: Report, words: Sequence[str]) -> str:
    tables = "\n".join(table.markdown() for table in report.tables)
    return f"# {report.title}\n\n{tables}\n" + "".join(f"- {word}\n" for word in words)


def _html(
    report: Report, words: Sequence[str], curves: Mapping[str, Mapping[str, bytes]], sheets: Sequence[str]
) -> str:
    """One page that asks nothing of the network and runs nothing."""
    images = "".join(
        f'<figure><img alt="{escape(name)}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(drawn[PICTURES[0]]).decode()}"></figure>'
        for name, drawn in curves.items()
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    links = "".join(f'<li><a href="{escape(sheet)}">{escape(sheet)}</a></li>' for sheet in sheets)
    blind = f"<h2>Blind sheets for people</h2><ul>{links}</ul>" if sheets else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{STYLE}</style></head><body><h1>{escape(report.title)}</h1>"
        f"{''.join(table.html() for table in report.tables)}"
        f"<ul>{''.join(f'<li>{escape(word)}</li>' for word in words)}</ul>"
        f"<h2>Learning curves</h2>{images or '<p>None.</p>'}{blind}</body></html>\n"
    )


_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
}  # fmt: skip


def _tex(text: str) -> str:
    """Text as LaTeX takes it.

    >>> print(_tex("a_b: 5%"))
    a\\_b: 5\\%
    """
    return re.sub(r"[&%$#_{}\\~^–]", lambda found: _TEX[found[0]], text)
