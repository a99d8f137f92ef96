"""What came of the checks, and the same as Markdown, as one self-contained page, and as JSON."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from pertoken.tracking.files import encode, write_whole


@dataclass(frozen=True)
class Failure:
    """A sample that did not keep what a check asks for."""

    id: str
    prompt: str
    output: str
    reason: str
    """What is wrong with it, in words."""
    answer: str | None = None
    """The reference answer."""
    before: str | None = None
    """The output that it is compared with: of the earlier model, or to the prompt as it was."""


@dataclass(frozen=True)
class Outcome:
    """What came of one check, or of one part of it that is judged by itself."""

    name: str
    type: str
    passed: bool
    measured: float
    bound: str
    """What it has to keep, in words."""
    samples: int
    """How many it was measured on."""
    low: float | None = None
    high: float | None = None
    """95% interval of `measured`; None where it has none."""
    failures: tuple[Failure, ...] = ()
    """Samples that failed, worst first; a check of shares or means may pass with some."""

    @property
    def figure(self) -> str:
        """`measured`, with its interval."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.measured:.4g}{interval}"

    @property
    def verdict(self) -> str:
        return "pass" if self.passed else "FAIL"


@dataclass(frozen=True)
class Report:
    """What came of a suite."""

    suite: str
    model: str
    baseline: str | None
    date: str
    versions: Mapping[str, str]
    outcomes: Sequence[Outcome]
    shown: int = 10
    """Failed samples of each check that a page shows; the JSON has all."""

    @property
    def passed(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        failed = [outcome.name for outcome in self.outcomes if not outcome.passed]
        if not failed:
            return f"{self.model} passes all {len(self.outcomes)} checks of {self.suite}."
        return f"{self.model} fails {len(failed)} of {len(self.outcomes)} checks of {self.suite}: {'; '.join(failed)}."

    def as_json(self) -> dict[str, Any]:
        """All of it, every failed sample included."""
        about = {"suite": self.suite, "model": self.model, "baseline": self.baseline, "date": self.date}
        outcomes = [dataclasses.asdict(outcome) for outcome in self.outcomes]
        return about | {"versions": dict(self.versions), "passed": self.passed, "checks": outcomes}

    def markdown(self) -> str:
        """A table, and the failed samples of each check."""
        lines = [f"# Validation: {self.suite}", "", _cell(self.sentence), "", _cell(self._about()), ""]
        lines += [_row(HEADS), "|---" * len(HEADS) + "|"]
        for one in self.outcomes:
            lines.append(_row((one.verdict, one.name, one.figure, one.bound, str(one.samples), str(len(one.failures)))))
        for one in self.outcomes:
            if one.failures:
                lines += ["", f"## {_cell(one.name)}"]
            for failure in one.failures[: self.shown]:
                lines += ["", f"**{_cell(failure.id)}**: {_cell(failure.reason)}", ""]
                lines += [f"- {label}: {_code(text)}" for label, text in _texts(failure)]
            lines += _more(one, self.shown)
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """The same as one page that asks nothing of the network and runs no script."""
        rows = "".join(
            f'<tr><th scope="row">{escape(one.name)}</th><td class="{"better" if one.passed else "worse"}">'
            f"<em>{one.verdict}</em></td><td>{one.figure}</td><td>{escape(one.bound)}</td><td>{one.samples}</td>"
            f"<td>{len(one.failures)}</td></tr>"
            for one in self.outcomes
        )
        heads = "".join(f'<th scope="col">{head}</th>' for head in (HEADS[1], HEADS[0], *HEADS[2:]))
        judgement = "better" if self.passed else "worse"
        body = (
            f'<p class="verdict {judgement}"><strong>{"Passed" if self.passed else "Failed"}</strong> '
            f"{escape(self.sentence)}</p><p><small>{escape(self._about())}</small></p>"
            f'<div class="scroll" tabindex="0" role="region" aria-label="Checks"><table><thead><tr>{heads}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>" + "".join(self._failed(one) for one in self.outcomes if one.failures)
        )
        css = files("pertoken.tracking").joinpath("report.css").read_text(encoding="utf-8")
        return _PAGE.format(title=escape(f"Validation: {self.suite}"), css=css, body=body)

    def write(self, folder: Path) -> list[Path]:
        """Write `report.md`, `report.html` and `report.json` into `folder`; their paths."""
        pages = {"md": self.markdown(), "html": self.html(), "json": encode(self.as_json()).decode()}
        for kind, page in pages.items():
            write_whole(folder / f"report.{kind}", page.encode(errors="replace"), "the report")
        return [folder / f"report.{kind}" for kind in pages]

    def _about(self) -> str:
        against = f"against {self.baseline}; " if self.baseline else ""
        return f"{against}{self.date}; {', '.join(f'{name} {number}' for name, number in self.versions.items())}"

    def _failed(self, one: Outcome) -> str:
        samples = ""
        for failure in one.failures[: self.shown]:
            texts = "".join(
                f'<h3>{label}</h3><div class="prompt">{escape(text)}</div>' for label, text in _texts(failure)
            )
            samples += (
                f'<div class="panel"><p class="about">{escape(failure.id)}: {escape(failure.reason)}</p>{texts}</div>'
            )
        more = "".join(f"<p>{line}</p>" for line in _more(one, self.shown) if line)
        opened = "" if one.passed else " open"
        return (
            f"<section><details{opened}><summary>{escape(one.name)}: {len(one.failures)} failed samples</summary>"
            f'<div class="panels">{samples}</div>{more}</details></section>'
        )


HEADS = ("verdict", "check", "measured [95%]", "bound", "samples", "failed")
"""Columns of the table of outcomes."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="pertoken">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header style="margin-bottom:14px"><div><p class="kicker">pertoken validate</p><h1>{title}</h1></div></header>
<main>{body}</main>
</body>
</html>
"""


def _texts(failure: Failure) -> list[tuple[str, str]]:
    texts = {"prompt": failure.prompt, "reference": failure.answer, "before": failure.before, "answer": failure.output}
    return [(label, text) for label, text in texts.items() if text is not None]


def _more(one: Outcome, shown: int) -> list[str]:
    left = len(one.failures) - shown
    return ["", f"{left} more in report.json"] if left > 0 else []


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """On one line, and no mark-up of Markdown in it."""
    for mark in "\\`*_<>[]|#":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _code(text: str) -> str:
    """`text` on one line as code, whatever marks it holds."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}"
