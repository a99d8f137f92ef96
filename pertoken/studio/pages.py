"""The pages of the studio, out of the parts of the report: a run, the table of runs, runs compared, the playground."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from string import Template
from typing import Any
from urllib.parse import quote

from pertoken.errors import ConfigError
from pertoken.studio.launching import Setting
from pertoken.studio.listing import Line, version
from pertoken.tracking.charts import Chart, overlaid_charts, overlaid_held_out
from pertoken.tracking.comparison import compare
from pertoken.tracking.files import Row, encode
from pertoken.tracking.reader import RunReader
from pertoken.tracking.report import Content, Host, before_after_table, chart_places, content, page, verdict
from pertoken.tracking.runs import status_of
from pertoken.tracking.samples import scene_of, stream_scales
from pertoken.tracking.settings import settings_of

PLOTLY = "/plotly.js"

MOST_RUNS = 8
"""So many are compared at most: as many as there are colours."""


def run_page(name: str, reader: RunReader, studio: Row) -> str:
    """The report of a run, which follows the run and takes questions; `studio` is what its script needs to know."""
    seen = version(reader.folder)
    known = {"run": name, "status": status_of(reader.folder, reader.run()), **seen, **studio}
    found = content(reader, served=True)
    found = replace(found, data=found.data | {"studio": known})
    return page(found, kicker=_links("run"), host=_host("run.js"))


def changes(reader: RunReader, seen: Mapping[str, str]) -> Row:
    """What the page of a run has to know since it was `seen`: figures and samples by their versions."""
    now = version(reader.folder)
    found: Row = {"status": status_of(reader.folder, reader.run()), **now}
    if now["metrics"] == seen.get("metrics"):
        return found
    new = now["samples"] != seen.get("samples")
    fresh = content(reader, samples=new, served=True)
    shown = {heading.lower(): html for heading, html in fresh.sections.items() if heading != "Tokens"}
    return found | {"summary": fresh.summary, "sections": shown, "page": _Json(fresh.as_json())}


def scene(reader: RunReader, sample: str) -> Row:
    """The scene that shows a sample, by its key, and how its streams are coloured if the page does not know yet."""
    key, found = scene_of(reader, sample)
    return {"key": key, "scene": found, "scales": stream_scales([found])}


class _Json(str):
    """Text that is JSON already."""


def as_json(row: Row) -> bytes:
    """A row of strict JSON; what is JSON already goes in as it is."""
    ready = {name: value for name, value in row.items() if isinstance(value, _Json)}
    rest = encode({name: value for name, value in row.items() if name not in ready}).decode().rstrip()
    parts = [rest[1:-1], *(f'"{name}":{value}' for name, value in ready.items())]
    return f"{{{','.join(filter(None, parts))}}}\n".encode()


def list_page(root: str, lines: Sequence[Line], studio: Row) -> str:
    """All runs in a table, some of which can be chosen to be compared."""
    sections = {
        "Runs": f'<form action="/compare" method="get"><div id="table">{table(lines)}</div>'
        '<p><button type="submit">Compare the chosen runs</button></p></form>'
        f'<p id="note" role="status">{len(lines)} run{"s" * (len(lines) != 1)} below <code>{escape(root)}</code></p>'
    }
    data = {"studio": studio}
    return page(Content("Runs", "", sections, data), kicker=_links("list"), plots=False, host=_host("list.js"))


def problem_page(sentence: str) -> str:
    """What went wrong, in a sentence."""
    sections = {"Problem": f"<p>{escape(sentence)}</p>"}
    return page(Content("This cannot be shown", "", sections, {}), kicker=_links(""), plots=False, host=_host())


def new_page(names: Sequence[str], found: Mapping[str, Sequence[Setting]], studio: Row) -> str:
    """A form for a new run, a field for each setting."""
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    fields = "".join(
        f"<details{' open' if place == 'run' else ''}><summary>{escape(place)}</summary>"
        f"{''.join(map(_field, settings))}</details>"
        for place, settings in found.items()
    )
    html = Template(_resource("new.html")).substitute(runs=options, fields=fields)
    return page(Content("New run", "", {"Configuration": html}, {"studio": studio}), kicker=_links("new"), plots=False,
                host=_host("new.js"))  # fmt: skip


def _field(setting: Setting) -> str:
    name, default = escape(setting.name), escape(setting.default)
    if setting.options:
        choices = "".join(f"<option>{escape(option)}</option>" for option in setting.options)
        node = f'<select data-name="{name}"><option value="">{default}</option>{choices}</select>'
    else:
        node = f'<input type="text" data-name="{name}" placeholder="{default}" autocomplete="off">'
    meaning = escape(" ".join(setting.meaning.split()))
    return f'<label class="setting"><code>{name}</code> {node}<small>{meaning}</small></label>'


def table(lines: Sequence[Line]) -> str:
    """The table of runs as HTML."""
    if not lines:
        return "<p>No run yet. <code>pertoken train</code> makes one.</p>"
    heads = ("Run", "Status", "Steps", "Verdict", "Held out, before → after", "Tokens", "Time", "Started")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Runs"><table class="runs"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(map(_row, lines))}</tbody></table></div>"
    )


def compare_page(runs: Mapping[str, RunReader], studio: Row) -> str:
    """Runs beside each other: verdicts and tables, each metric with a curve for each run, what was set otherwise."""
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ConfigError(f"compare: choose 2 to {MOST_RUNS} runs, got {len(runs)}")
    charts: list[Chart] = []
    metrics = {name: reader.metrics() for name, reader in runs.items()}
    evaluations = {name: reader.evaluations() for name, reader in runs.items()}
    results = "".join(_result(name, evaluations[name], metrics[name]) for name in runs)
    held_out = overlaid_held_out({name: _of_one_split(rows) for name, rows in evaluations.items()})
    groups = {"Held out": held_out, **overlaid_charts(metrics)}
    curves = "".join(f"<h3>{escape(group)}</h3>{chart_places(of, charts)}" for group, of in groups.items() if of)
    sections = {
        "Results": f'<div class="beside">{results}</div>',
        "Curves": curves or "<p>No step has been logged yet.</p>",
        "Settings": _differences({name: reader.config_text() for name, reader in runs.items()}),
    }
    title = " against ".join(runs)
    found = Content(title, "", sections, {"studio": studio}, charts)
    return page(found, kicker=_links("compare"), host=_host())


def playground_page(names: Sequence[str], studio: Row) -> str:
    """A prompt, sampling controls, and two models beside each other that answer it."""
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names)
    html = Template(_resource("playground.html")).substitute(runs=options)
    data = {"studio": studio, "scenes": {}, "lists": {}, "scales": _SCALES, "reference_is_before": False}
    return page(Content("Playground", "", {"Talk": html}, data), kicker=_links("playground"), plots=False,
                host=_host("play.js"))  # fmt: skip


_SCALES = [
    {"name": "logprob", "label": "log-prob", "meaning": "How probable the token was.", "kind": "signed", "bound": 5.0},
    {"name": "entropy", "label": "entropy", "meaning": "How open the choice was.", "kind": "magnitude", "bound": 4.0},
]


def _row(line: Line) -> str:
    name, address = escape(line.name), f"/run/{quote(line.name)}"
    kind = line.verdict.replace(" ", "-")
    numbers = [None if value is None else f"{value:.4g}" for value in (line.before, line.after)]
    moved = " → ".join(value for value in numbers if value is not None)
    metric = f"{escape(moved)}<small>{escape(line.metric)}</small>" if moved else ""
    chosen = f'<input type="checkbox" name="run" value="{name}" aria-label="Compare {name}">'
    return (
        f'<tr><th scope="row">{chosen} <a href="{escape(address)}">{name}</a><small>{escape(line.title)}</small></th>'
        f'<td class="status {escape(line.status)}">{escape(line.status)}</td><td>{escape(line.steps)}</td>'
        f'<td class="{escape(kind)}" title="{escape(line.why)}"><em>{escape(line.verdict)}</em></td><td>{metric}</td>'
        f"<td>{escape(line.tokens)}</td><td>{escape(line.time)}</td><td>{escape(line.started)}</td></tr>"
    )


def _result(name: str, evaluations: Sequence[Row], metrics: Mapping[str, Any]) -> str:
    comparison = compare(evaluations)
    judgement, why = verdict(comparison, evaluations, metrics)
    moved = before_after_table(comparison) if comparison else ""
    return (
        f'<article><h3><a href="/run/{escape(quote(name))}">{escape(name)}</a></h3>'
        f'<div class="verdict {judgement.replace(" ", "-")}"><strong>{judgement.capitalize()}</strong>'
        f"<p>{escape(why)}</p></div>{moved}</article>"
    )


def _of_one_split(evaluations: Sequence[Row]) -> list[Row]:
    """The evaluations of the split that the verdict is about, else of the last one."""
    if not evaluations:
        return []
    comparison = compare(evaluations)
    split = comparison.split if comparison else evaluations[-1]["split"]
    return [row for row in evaluations if row["split"] == split]


def _differences(configs: Mapping[str, str]) -> str:
    """The settings in which runs differ, as a table."""
    flat = {name: settings_of(text) for name, text in configs.items()}
    keys = dict.fromkeys(key for settings in flat.values() for key in settings)
    rows = {key: [settings.get(key, "") for settings in flat.values()] for key in keys}
    different = {key: values for key, values in rows.items() if len(set(values)) > 1}
    if not different:
        return "<p>They were configured alike.</p>"
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("Setting", *configs))
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>{"".join(f"<td>{escape(value)}</td>" for value in values)}</tr>'
        for key, values in different.items()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Settings that differ"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _links(here: str) -> str:
    pages = {"list": ("/", "Runs"), "new": ("/new", "New run"), "playground": ("/playground", "Playground")}
    links = [
        f'<a href="{address}"{" aria-current=page" if name == here else ""}>{title}</a>'
        for name, (address, title) in pages.items()
    ]
    return f"pertoken studio · {' · '.join(links)}"


def _host(*scripts: str) -> Host:
    return Host("\n".join(map(_resource, ("call.js", *scripts))), _resource("studio.css"), PLOTLY)


def _resource(name: str) -> str:
    return files("pertoken.studio").joinpath(name).read_text(encoding="utf-8")
