"""What commands are told: configuration files and overrides, run folders, durations."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pertoken.config import RunConfig, load_config
from pertoken.errors import ConfigError

Settings = Annotated[
    list[str] | None, typer.Argument(metavar="CONFIG.yaml... [KEY=VALUE]...", help="YAML files, then overrides.")
]
MaxTime = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="Save and end within this time (90, 45m, 1h30m), to be resumed."),
]
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]


def config_of(settings: Sequence[str] | None) -> RunConfig:
    """The run that the settings describe."""
    return load_config(*files_and_overrides(settings))


def files_and_overrides(settings: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Settings as they were given: the files, and the overrides."""
    files = [s for s in settings or () if not is_override(s)]
    return files, [s for s in settings or () if is_override(s)]


def is_override(setting: str) -> bool:
    """Whether a setting is `KEY=VALUE`, and no file of such a name."""
    return "=" in setting and not Path(setting).exists()


def seconds(text: str | None) -> float:
    """A duration: seconds, or hours, minutes and seconds with their letters.

    >>> seconds("90"), seconds("1h30m"), seconds("2.5m")
    (90.0, 5400.0, 150.0)
    """
    if text is None:
        return math.inf
    number = r"(\d+(?:\.\d+)?)"
    found = re.fullmatch(rf"(?:{number}d)?(?:{number}h)?(?:{number}m)?(?:{number}s?)?", text.strip())
    if not found or not text.strip():
        raise ConfigError(f"--max-time {text!r}: expected seconds, or a time such as 45m, 1h30m or 2d")
    return sum(float(part or 0) * unit for part, unit in zip(found.groups(), (86400, 3600, 60, 1), strict=True))
