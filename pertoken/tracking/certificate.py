"""The certificate of a run: which checks of the token maths were made, what was measured, and what is wrong.

`pertoken doctor` makes it, `pertoken train` makes the quick part of it in its first step. It lies in the run folder as
`certificate.json`; see `docs/run-folder.md`.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pertoken.errors import RunFolderError
from pertoken.tracking.files import encode, read_bytes, write_whole
from pertoken.tracking.runlog import CERTIFICATE

FORMAT_VERSION = 1

Outcome = Literal["pass", "fail", "skipped"]


@dataclass(frozen=True)
class Line:
    """One check, and how it came out."""

    name: str
    title: str
    """What holds if it passed, in plain words."""
    outcome: Outcome
    figure: float | None = None
    """What was measured; at most `tolerance` if it passed."""
    tolerance: float | None = None
    unit: str = ""
    words: str = ""
    """On failure what is wrong, else what was looked at, or why it was skipped."""
    remedy: str = ""
    """On failure how to mend it."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Certificate:
    """All checks of one examination, and what they were made on."""

    kind: Literal["full", "quick"]
    date: str
    """UTC, ISO 8601."""
    versions: dict[str, str]
    machine: dict[str, str | int]
    model: dict[str, str]
    """`name` as configured, and in a full one `sha256` of its weights as they were loaded."""
    config_sha256: str
    seconds: float
    lines: tuple[Line, ...]

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> list[Line]:
        return [line for line in self.lines if line.outcome == "fail"]

    @property
    def verdict(self) -> str:
        """One sentence."""
        counts = {kind: sum(line.outcome == kind for line in self.lines) for kind in ("pass", "fail", "skipped")}
        rest = f", {counts['skipped']} skipped" if counts["skipped"] else ""
        if self.failed:
            return (
                f"{counts['fail']} of {len(self.lines)} checks failed: {', '.join(x.name for x in self.failed)}{rest}"
            )
        return f"all {counts['pass']} checks passed{rest}"

    def of_same(self, other: "Certificate") -> bool:
        """Whether `other` speaks of the same configuration, model and versions."""
        mine, its = ((c.config_sha256, c.model["name"], c.versions) for c in (self, other))
        return mine == its

    def renewed(self, newer: "Certificate") -> "Certificate":
        """This one with the lines that `newer` has, too; it must be of the same."""
        lines = {line.name: line for line in (*self.lines, *newer.lines)}
        return dataclasses.replace(self, lines=tuple(lines.values()))

    def as_json(self) -> dict[str, Any]:
        """What `certificate.json` holds."""
        fields = dataclasses.asdict(self)
        return {"format_version": FORMAT_VERSION, "passed": self.passed, "verdict": self.verdict} | fields


def write_certificate(certificate: Certificate, folder: Path) -> Path:
    """Write `certificate.json` into a run folder (made if it is not there yet); its path."""
    path = folder / CERTIFICATE
    content = json.loads(encode(certificate.as_json()))  # figures that are not finite are null
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, text.encode(), "the certificate")
    return path


def read_certificate(folder: Path) -> Certificate | None:
    """The certificate of a run folder; None if it has none. RunFolderError if it cannot be understood."""
    raw = read_bytes(folder / CERTIFICATE)
    if not raw:
        return None
    try:
        content = json.loads(raw)
        found = int(content.pop("format_version"))
        if found > FORMAT_VERSION:
            raise RunFolderError(
                f"{folder / CERTIFICATE} has format {found}, this version of pertoken knows {FORMAT_VERSION}: upgrade "
                "pertoken"
            )
        del content["passed"], content["verdict"]
        certificate = TypeAdapter(Certificate).validate_python(content)
        for told, name in (
            (certificate.machine, "device"),
            (certificate.machine, "precision"),
            (certificate.model, "name"),
        ):
            if name not in told:
                raise ValueError(f"it does not say the {name}")
        return certificate
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunFolderError(
            f"{folder / CERTIFICATE} is damaged ({error}): remove it, and run pertoken doctor again"
        ) from error
