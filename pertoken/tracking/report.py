"""One self-contained page about a run: verdict, curves, and samples in which every token shows its numbers.

The page asks nothing of the network and nothing that a model wrote can act in it: text goes in as JSON with `<`
escaped, comes out through `textContent`, and a content-security policy allows the page's own two scripts only.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from pertoken.errors import MissingExtraError, RunFolderError
from pertoken.tracking.certificate import Certificate, read_certificate
from pertoken.tracking.charts import Chart, Column, held_out_charts, training_charts
from pertoken.tracking.comparison import Change, Comparison, Shift, compare, shifts
from pertoken.tracking.files import Number, Row, write_whole
from pertoken.tracking.glossary import HELD_OUT, METRICS, find, label
from pertoken.tracking.reader import RunReader
from pertoken.tracking.samples import browse

SCRIPTS = ("tokens.js", "browser.js", "report.js")


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder, finished or live, and returns its path."""
    path = Path(folder) / "report.html"
    write_whole(path, render(RunReader(folder)).encode(), "the report")
    return path


@dataclass(frozen=True)
class Content:
    """What stands on a page; HTML is escaped already."""

    title: str
    summary: str
    """HTML below the title."""
    sections: Mapping[str, str]
    """HTML by heading."""
    data: Row
    """What the scripts read. A page with samples has all that `samples.browse` returns, another one has no `orders`."""
    charts: Sequence[Chart] = ()
    """In the order of their places in the sections."""

    def as_json(self) -> str:
        """What the scripts read, charts included."""
        data = json.dumps({"orders": []} | self.data, allow_nan=False, separators=(",", ":"))
        return f'{data[:-1]}, "charts": [{",".join(chart.figure for chart in self.charts)}]}}'


@dataclass(frozen=True)
class Host:
    """What a server that shows the page adds to it. The page may talk to that server, and to nobody else."""

    script: str
    style: str
    plotly: str
    """Address of `plotly_source`."""


def render(reader: RunReader) -> str:
    """The page of a run as text."""
    return page(content(reader))


def content(reader: RunReader, *, samples: bool = True, served: bool = False) -> Content:
    """What the page of a run says; without `samples` it is made faster, and has no list of them. A `served` page holds
    few of their texts and asks for the others."""
    plotly_source()  # without it the charts would fail, and not say what to install
    run, metrics, evaluations = reader.run(), reader.metrics(), reader.evaluations()
    comparison = compare(evaluations)
    charts: list[Chart] = []
    sections = {
        "Result": _result(comparison, evaluations, metrics, charts),
        "Tokens": _resource("tokens.html"),
        "Curves": _curves(metrics, charts),
        "Certificate": _certificate(reader.folder),
        "Configuration": _configuration(run, reader.config_text()),
    }
    facts = {"folder": str(reader.folder)}
    found = browse(reader, comparison, served=served) if samples else {}
    if samples and not found["orders"]:
        sections.pop("Tokens")
    return Content(title_of(run), _summary(run, metrics), sections, facts | found, charts)


def page(content: Content, *, kicker: str = "pertoken run", plots: bool = True, host: Host | None = None) -> str:
    """The page as text. `kicker` is HTML above the title; `plots` says whether charts may come to stand on it."""
    plotly, script = (
        plotly_source() if plots else "",
        "\n".join([*map(_resource, SCRIPTS), host.script if host else ""]),
    )
    return Template(_resource("report.html")).substitute(
        policy=_policy(plotly, script, served=host is not None),
        title=escape(content.title),
        kicker=kicker,
        css=_resource("report.css") + (host.style if host else ""),
        summary=content.summary,
        navigation="".join(
            f'<a href="#{name.lower()}">{name}</a>' for name in content.sections if len(content.sections) > 1
        ),
        sections="\n".join(
            f'<section id="{name.lower()}"><h2>{name}</h2>{html}</section>' for name, html in content.sections.items()
        ),
        data=content.as_json().replace("<", "\\u003c"),
        source=f' data-source="{host.plotly}"' if host and plots else "",
        plotly="" if host else plotly,
        script=script,
    )


def plotly_source() -> str:
    """The library that draws the charts, which stands in the page or beside it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report", "the report") from error
    return str(get_plotlyjs())


def verdict(
    comparison: Comparison | None, evaluations: Sequence[Row], metrics: Mapping[str, Column] | None = None
) -> tuple[str, str]:
    """The judgement (better, not proven, worse, gamed, unknown) and the sentences that a person can repeat.

    Gamed: the training reward rose beyond its noise while held-out quality fell.
    """
    reward = shifts(metrics or {}, ["reward/total"]).get("reward/total")
    risen = reward is not None and reward.rose
    if comparison is None:
        times = "measured once" if evaluations else "not measured"
        alone = " The rise of the training reward alone proves nothing." if risen else ""
        return "unknown", f"Held-out quality was {times}; a verdict needs it before and after the training.{alone}"
    change = comparison.changes[comparison.main]
    moved = (
        f"Held-out {label(change.name, HELD_OUT)} went from {_number(change.before)} to {_number(change.after)} "
        f"on the same {comparison.num_items} items"
    )
    if change.low is None or change.high is None:
        return "not proven", f"{moved}; no interval is known, so this may be chance."
    interval = f"{_signed(change.difference)}, 95% interval {_signed(change.low)} to {_signed(change.high)}"
    doubt = ", which may be chance" if change.low <= 0 <= change.high else ""
    sentences = f"{moved} ({interval}){doubt}.{_against_baseline(change, comparison)}{_price(comparison)}"
    if reward is None or not risen or change.judgement == "better":
        return change.judgement, sentences
    rise = f" Meanwhile the training reward rose from {_number(reward.before)} to {_number(reward.after)}"
    if change.judgement == "worse":
        return "gamed", f"{sentences}{rise}: it pays for something else than quality."
    return change.judgement, f"{sentences}{rise}, which alone proves nothing."


def _price(comparison: Comparison) -> str:
    """What got worse with confidence although the main metric did not."""
    changes = comparison.changes
    if changes[comparison.main].judgement != "better":
        return ""
    worse = [label(name, HELD_OUT) for name, change in changes.items() if change.judgement == "worse"]
    return f" At a price, see the table: {', '.join(worse)}." if worse else ""


def _against_baseline(change: Change, comparison: Comparison) -> str:
    scores = {name: row[change.name] for name, row in comparison.baselines.items() if change.name in row}
    term = find(change.name, HELD_OUT)
    if not scores or (term is not None and term.better != "higher"):
        return ""
    best = max(scores, key=lambda name: scores[name])
    passed = "now passes" if change.before <= scores[best] < change.after else "is above"
    relation = passed if change.after > scores[best] else "does not reach"
    return f" The model {relation} the best trivial baseline, {best} ({_number(scores[best])})."


def title_of(run: Row) -> str:
    """The run as a heading: the model, and what it was trained on."""
    about = run.get("about", {})
    model, task = str(about.get("model", "A model")).rstrip("/").rpartition("/")[2], about.get("task")
    return f"{model} on {task}" if task else model


def facts_of(run: Row, metrics: Mapping[str, Column]) -> dict[str, str]:
    """The run in a few facts, by name; empty where one is not known."""
    about, steps = run.get("about", {}), metrics.get("step") or [0]
    tokens = sum(count or 0 for count in metrics.get("tokens/generated", []))
    seconds = (metrics.get("time") or [0])[-1] or 0
    status = {
        "running": "running, or killed without a word",
        "finished": "finished",
        "interrupted": "interrupted",
        "failed": "failed",
    }.get(run["status"], str(run["status"]))
    return {
        "Algorithm": str(about.get("algorithm", "")),
        "Steps": f"{steps[-1]} of {about['steps']}" if "steps" in about else str(steps[-1]),
        "Tokens": _count(tokens) if tokens else "",
        "Time": _duration(seconds),
        "Seed": str(run.get("seed", "")),
        "Started": str(run.get("started", ""))[:16].replace("T", " "),
        "Status": f"{status}: {run['reason']}" if run.get("reason", status) not in ("", status) else status,
    }


def _summary(run: Row, metrics: Mapping[str, Column]) -> str:
    """The facts of the run as a short definition list."""
    facts = facts_of(run, metrics)
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(fact)}</dd></div>" for name, fact in facts.items() if fact)
    return f'<dl class="facts">{rows}</dl>'


def _result(
    comparison: Comparison | None, evaluations: Sequence[Row], metrics: Mapping[str, Column], charts: list[Chart]
) -> str:
    judgement, sentence = verdict(comparison, evaluations, metrics)
    html = (
        f'<div class="verdict {judgement.replace(" ", "-")}"><strong>{judgement.capitalize()}</strong>'
        f"<p>{escape(sentence)}</p></div>"
    )
    if comparison is None:
        return html + _reward_table(metrics)
    main, *others = held_out_charts(evaluations, comparison)
    html += f'<div class="columns">{chart_places([main], charts, "large")}{before_after_table(comparison)}</div>'
    html += _reward_table(metrics)
    if others:
        html += (
            f"<details><summary>Curves of the other held-out metrics</summary>{chart_places(others, charts)}</details>"
        )
    return html


def before_after_table(comparison: Comparison) -> str:
    """The held-out metrics before and after, with intervals and trivial baselines, as an HTML table."""
    baselines = comparison.baselines
    heads = ["Metric", "Before", "After", "Difference", *(escape(name) for name in baselines)]
    rows = []
    for name, change in comparison.changes.items():
        term = find(name, HELD_OUT)
        hint = escape(term.explanation if term else name)
        arrow = {"better": "▲ better", "worse": "▼ worse", "not proven": ""}[change.judgement]
        interval = "" if change.low is None else f"<small>{_signed(change.low)} to {_signed(change.high)}</small>"
        cells = [_number(change.before), _number(change.after)]
        trivial = [_number(scores[name]) if name in scores else "" for scores in baselines.values()]
        rows.append(
            f'<tr><th scope="row" title="{hint}">{escape(label(name, HELD_OUT))}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="{change.judgement.replace(" ", "-")}">{_signed(change.difference)}'
            + f" <em>{arrow}</em>{interval}</td>"
            + "".join(f'<td class="baseline">{cell}</td>' for cell in trivial)
            + "</tr>"
        )
    caption = (
        f"Split {escape(comparison.split)}, {comparison.num_items} items, step {comparison.before['step']} against "
        f"step {comparison.after['step']}. Small: 95% interval of the difference. Right: trivial baselines."
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Before and after"><table><caption>{caption}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _reward_table(metrics: Mapping[str, Column]) -> str:
    """Which part moved the training reward: its parts in the first and the last fifth of the steps."""
    names = [name for name in metrics if name.startswith("reward/") and name != "reward/total"]
    found = shifts(metrics, ["reward/total", *names])
    if "reward/total" not in found:
        return ""
    total = found.pop("reward/total")
    moved = total.after - total.before if abs(total.after - total.before) > total.margin else None
    ranked = [total, *sorted(found.values(), key=lambda shift: shift.before - shift.after)]
    rows = "".join(_reward_row(shift, moved) for shift in ranked)
    heads = ("Training reward", "First fifth", "Last fifth", "Difference", "Share")
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    caption = (
        "Mean per completion in the first and the last fifth of the steps; the parts add up to the total. "
        "Small: 95% interval, from the noise between steps. Reward is what was trained on: its rise is no proof."
    )
    return (
        f"<h3>What moved the training reward</h3><p>{escape(what_moved(total, list(found.values())))}</p>"
        '<div class="scroll parts" tabindex="0" role="region" aria-label="What moved the training reward"><table>'
        f"<caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def what_moved(total: Shift, parts: Sequence[Shift]) -> str:
    """Which parts drove the change of the training reward, in a sentence or three.

    >>> rouge, length = Shift("reward/rouge", 0.1, 0.4, 0.05), Shift("reward/length", 0.0, -0.1, 0.05)
    >>> what_moved(Shift("reward/total", 0.1, 0.3, 0.05), [length, rouge])
    'It rose by 0.200 per completion. What drove it is rouge: +0.300. Against it went length: −0.100.'
    """
    moved = total.after - total.before
    beyond = [part for part in parts if abs(part.after - part.before) > part.margin]
    named = {part.name: f"{part.name.removeprefix('reward/')}: {_signed(part.after - part.before)}" for part in parts}
    if abs(moved) <= total.margin:
        whole = f"It moved by {_signed(moved)} per completion, which is within its noise."
        return f"{whole} Beyond theirs moved {', '.join(named[part.name] for part in beyond)}." if beyond else whole
    sign = math.copysign(1.0, moved)
    ranked = sorted(beyond, key=lambda part: -sign * (part.after - part.before))
    drove = [named[part.name] for part in ranked if sign * (part.after - part.before) > 0]
    against = [named[part.name] for part in reversed(ranked) if sign * (part.after - part.before) < 0]
    sentences = [f"It {'rose' if moved > 0 else 'fell'} by {_number(abs(moved))} per completion."]
    if drove:
        sentences.append(f"What drove it is {drove[0]}{''.join(f', then {name}' for name in drove[1:])}.")
    if against:
        sentences.append(f"Against it went {', '.join(against)}.")
    return " ".join(sentences)


def _reward_row(shift: Shift, moved: float | None) -> str:
    """One part; `moved` is the difference of the total, None where that is within the noise."""
    difference, name = shift.after - shift.before, shift.name.removeprefix("reward/")
    term = find(shift.name, METRICS)
    interval = f"{_signed(difference - shift.margin)} to {_signed(difference + shift.margin)}"
    share = "" if moved is None else f"{round(100 * difference / moved)}%".replace("-", "−")
    return (
        f'<tr><th scope="row" title="{escape(term.explanation if term else shift.name)}">{escape(name)}</th>'
        f"<td>{_signed(shift.before)}</td><td>{_signed(shift.after)}</td>"
        f"<td>{_signed(difference)}<small>{interval}</small></td><td>{share}</td></tr>"
    )


def _curves(metrics: Mapping[str, Column], charts: list[Chart]) -> str:
    groups = training_charts(metrics)
    if not groups:
        return "<p>No step has been logged yet.</p>"
    intro = (
        "<p>By training step. Where a curve is noisy, each step is pale and the mean of the steps around it strong.</p>"
    )
    return intro + "".join(f"<h3>{name}</h3>{chart_places(group, charts)}" for name, group in groups.items())


def chart_places(group: Sequence[Chart], charts: list[Chart], size: str = "") -> str:
    """Places for the charts of a group; the figures themselves are added to `charts`, which the script draws."""
    html = ""
    for chart in group:
        title, note = escape(chart.title), escape(chart.note)
        html += (
            f'<figure><figcaption><b>{title}</b> <span title="{note}">{note}</span></figcaption>'
            f'<div class="plot" data-chart="{len(charts)}" role="img" aria-label="Curve: {title}"></div></figure>'
        )
        charts.append(chart)
    return f'<div class="charts {size}">{html}</div>'


def _certificate(folder: Path) -> str:
    """What was checked of the token maths of this run, or that nothing was."""
    try:
        found = read_certificate(folder)
    except RunFolderError as error:
        return f"<p>{escape(str(error))}</p>"
    if found is None:
        return (
            "<p>No certificate: the token maths of this run was not checked. <code>pertoken doctor</code> checks it, "
            "and <code>pertoken train</code> the quick part.</p>"
        )
    judgement = "better" if found.passed else "worse"
    title = "Sound" if found.passed else "Not sound"
    made = f"{found.kind} certificate of {found.date[:16].replace('T', ' ')}"
    where = f"{found.machine['precision']} on {found.machine['device']}"
    return (
        f'<div class="verdict {judgement}"><strong>{title}</strong><p>{escape(found.verdict.capitalize())}: '
        f"{escape(made)}, {escape(where)}.</p></div>"
        f"{_checks(found)}"
    )


def _checks(found: Certificate) -> str:
    rows = ""
    for line in found.lines:
        kind = {"pass": "better", "fail": "worse", "skipped": ""}[line.outcome]
        measured = "" if line.figure is None else f"{line.figure:.2g} {line.unit}"
        limit = "" if line.tolerance is None else f"{line.tolerance:g}"
        said = (
            "" if line.outcome == "pass" else f"<small>{escape(line.words)}</small><small>{escape(line.remedy)}</small>"
        )
        rows += (
            f'<tr><th scope="row" title="{escape(line.words)}">{escape(line.title)}{said}</th>'
            f'<td class="{kind}"><em>{line.outcome}</em></td><td>{escape(measured)}</td><td>{limit}</td></tr>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Check", "Outcome", "Measured", "At most"))
    return (
        '<div class="scroll checks" tabindex="0" role="region" aria-label="Checks of the token maths"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _configuration(run: Row, config_text: str) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in run.get("versions", {}).items())
    return (
        f"<p>{escape(versions)}; {escape(str(run.get('platform', '')))}</p>"
        f"<p>Command: <code>{escape(str(run.get('command', '')))}</code></p>"
        f"<details><summary>config.yaml</summary><pre>{escape(config_text)}</pre></details>"
    )


def _policy(*scripts: str, served: bool) -> str:
    """A content-security policy that lets these scripts run, and nothing else: no other code, and no request, or if the
    page is served none but to where it comes from."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    own = "; connect-src 'self'; form-action 'self'" if served else ""
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:{own}"


def _resource(name: str) -> str:
    return files("pertoken.tracking").joinpath(name).read_text(encoding="utf-8")


def _number(value: Number) -> str:
    """Three digits that matter: 0.187, 41.2, 1,240."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _signed(value: Number | None) -> str:
    if value is None:
        return ""
    return f"{'+' if value >= 0 else '−'}{_number(abs(value))}"


def _count(value: Number) -> str:
    return f"{value / 1e6:.2f} million" if value >= 1e6 else f"{value:,.0f}"


def _duration(seconds: Number) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
