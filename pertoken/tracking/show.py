"""Single samples of a run folder, for a shell, a notebook or a paper.

>>> from pertoken.tracking import show
>>> show.run("runs/quickstart-0")                                   # doctest: +SKIP
>>> show.sample("runs/quickstart-0", 50, 3, by="advantage")         # doctest: +SKIP
>>> show.item("runs/quickstart-0", "math.hypot", difference=True)   # doctest: +SKIP
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pertoken.display import escaped, table_html
from pertoken.errors import ConfigError, RunFolderError, closest
from pertoken.tracking.coloured import ColouredText
from pertoken.tracking.comparison import Comparison, compare
from pertoken.tracking.files import Number, Row
from pertoken.tracking.reader import RunReader
from pertoken.tracking.report import before_after_table, title_of, verdict
from pertoken.tracking.samples import episode_panel, held_out_rows, pair_scene

DEFAULTS = ("advantage", "reward/total", "logprob")
"""The stream that colours, if none is named: the first of these that was kept."""


@dataclass(frozen=True)
class Shown:
    """A sample to be looked at: one text, or before and after. A notebook shows it in colour."""

    title: str
    prompt: str
    answer: str
    facts: Sequence[Sequence[str]]
    """Per text: its reward part by part, or its metrics."""
    texts: Sequence[ColouredText]
    findings: Sequence[Sequence[str]]
    """Per text: what rewards found in it, a line each."""

    def _repr_html_(self) -> str:
        answer = f"<p>Reference answer: {escaped(self.answer)}</p>" if self.answer else ""
        prompt = f"<details><summary>Prompt</summary><pre>{escaped(self.prompt)}</pre></details>"
        texts = ""
        for text, facts, found in zip(self.texts, self.facts, self.findings, strict=True):
            lines = (escaped(line) for line in (" · ".join(facts), *found))
            texts += f"{text.html()}<small>{'<br>'.join(lines)}</small>"
        return f"<h4>{escaped(self.title)}</h4>{prompt}{answer}{texts}"


@dataclass(frozen=True)
class ShownRun:
    """A run in brief. A notebook shows the verdict and the table of the held-out metrics."""

    title: str
    judgement: str
    """better, not proven, worse, gamed or unknown."""
    sentences: str
    comparison: Comparison | None

    def _repr_html_(self) -> str:
        table = before_after_table(self.comparison) if self.comparison else ""
        return (
            f"<h4>{escaped(self.title)}</h4><p><strong>{self.judgement.capitalize()}.</strong> "
            f"{escaped(self.sentences)}</p>{table}"
        )


@dataclass(frozen=True)
class Sheet:
    """A table of figures. A terminal and a notebook show it."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def terminal(self) -> Table:
        """As rich prints it."""
        table = Table(*self.head, box=None, pad_edge=False)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _repr_html_(self) -> str:
        return table_html(self.head, self.rows)


def run(folder: str | Path) -> ShownRun:
    """The verdict on a run, finished or live, and its held-out metrics before and after."""
    reader = RunReader(folder)
    evaluations = reader.evaluations()
    comparison = compare(evaluations)
    return ShownRun(title_of(reader.run()), *verdict(comparison, evaluations, reader.metrics()), comparison)


def sample(folder: str | Path, step: int, sample: int, by: str | None = None) -> Shown:
    """Episode `sample` (counted from 0, the lines of its file) of `step`, coloured by the stream `by`."""
    reader = RunReader(folder)
    records = reader.episodes(step)
    if not records:
        kept = ", ".join(map(str, reader.episode_steps())) or "none"
        raise RunFolderError(f"{folder} has no episodes of step {step}; kept were those of steps: {kept}")
    if not 0 <= sample < len(records):
        raise RunFolderError(f"{folder}, step {step} has no sample {sample}: expected 0 to {len(records) - 1}")
    record = records[sample]
    panel = episode_panel(record, step, sample)
    text = ColouredText.of_panel(panel, _stream(panel, by))
    title = f"{record['item']}, step {step}, sample {sample}"
    return Shown(title, panel["prompt"], record.get("answer") or "", [panel["facts"]], [text], [_findings(panel)])


def item(folder: str | Path, item: str, by: str | None = None, *, difference: bool = False) -> Shown:
    """A held-out item before and after the training (first and last evaluation), coloured by the stream `by`.

    `difference` colours by after − before at the tokens that both texts have. Up to the first token that only one
    of them has, both stand after the same words, so that this is the change of the policy itself.
    """
    reader = RunReader(folder)
    comparison = compare(reader.evaluations())
    if comparison is None:
        raise RunFolderError(f"{folder} has no split that was evaluated before and after: expected two evaluations")
    scene = pair_scene(*_rows_of(reader, comparison, item), comparison, 0)
    panels = scene["panels"]
    if not all("tokens" in panel for panel in panels):
        raise RunFolderError(f"{folder}: the evaluations were logged without tokens, so {item!r} cannot be coloured")
    name = _stream(panels[1], by)
    texts = [ColouredText.of_panel(panel, name) for panel in panels]
    if difference:
        texts = differences(panels, name)
    facts, found = [panel["facts"] for panel in panels], [_findings(panel) for panel in panels]
    return Shown(scene["title"], scene["prompt"], scene["answer"], facts, texts, found)


def _findings(panel: Row) -> list[str]:
    """What rewards found in a text, a line each."""
    pieces = panel["tokens"]["piece"]
    lines = []
    for found in panel.get("findings", ()):
        text = "".join(pieces[found["start"] : found["stop"]])
        lines.append(f"{found['part']} {found['value']:+.3g} for {text!r}: {found['message']}")
    return lines


def differences(panels: Sequence[Row], name: str) -> list[ColouredText]:
    """Both texts of a pair, coloured by after − before of a stream; no colour where only one text has the token."""
    before, after = (panel["streams"][name] for panel in panels)
    moved: list[list[Number | None]] = [
        [
            _difference(before[t], after[partner]) if partner >= 0 else None
            for t, partner in enumerate(panels[0]["match"])
        ],
        [
            _difference(before[partner], after[t]) if partner >= 0 else None
            for t, partner in enumerate(panels[1]["match"])
        ],
    ]
    label = f"{name}, after − before"
    return [
        ColouredText(panel["tokens"]["piece"], values, label, panel["title"], {**panel["streams"], label: values})
        for panel, values in zip(panels, moved, strict=True)
    ]


def _difference(before: Number | None, after: Number | None) -> Number | None:
    return None if before is None or after is None else after - before


def _rows_of(reader: RunReader, comparison: Comparison, item: str) -> tuple[Row, Row]:
    pairs = held_out_rows(reader, comparison)
    for before, after in pairs:
        if after["id"] == item:
            return before, after
    names = [str(after["id"]) for _, after in pairs]
    hint = closest(item, names)
    known = hint if hint.startswith("did you mean") else f"it has {len(names)}, such as {', '.join(names[:3])}"
    raise RunFolderError(f"{reader.folder} has no held-out item {item!r}; {known}")


def _stream(panel: Row, by: str | None) -> str:
    streams = panel.get("streams") or {}
    if not streams:
        raise RunFolderError(f"{panel['title']} was logged without numbers per token: there is nothing to colour by")
    if by is None:
        return next((name for name in DEFAULTS if name in streams), next(iter(streams)))
    if by not in streams:
        raise ConfigError(f"--by {by}: this sample has no such stream; {closest(by, streams)}")
    return by
