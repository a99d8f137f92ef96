"""New runs: the settings that a form offers, the configuration that comes of what was filled in, and its process."""

import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pertoken.config import RunConfig, explain, load_config
from pertoken.errors import ConfigError, RunFolderError
from pertoken.tracking.files import write_whole, writing


@dataclass(frozen=True)
class Setting:
    """One setting of the form."""

    name: str
    kind: str
    """As the configuration page has it: `int`, `float | null`, `a | b`."""
    default: str
    meaning: str

    @property
    def options(self) -> list[str]:
        """What can be chosen; nothing where anything can be written."""
        kinds = self.kind.split(" | ")
        free = {"text", "int", "float", "list", "map"} & set(kinds)
        return [] if free or len(kinds) < 2 else kinds


def groups() -> dict[str, list[Setting]]:
    """All settings by section, those of a `type` under the name of section and type.

    A list or a map is one setting, written as a whole: `rewards` is `[{name: rouge_l}]`.
    """
    found: dict[str, list[Setting]] = {"run": []}
    types: dict[str, list[str]] = {}
    wholes: list[str] = ["folder"]  # which follows from the name
    heading = ""
    for name, kind, default, meaning in explain(RunConfig):
        if any(name == whole or re.match(rf"{re.escape(whole)}[. ]", name) for whole in wholes):
            continue
        if kind == "section":
            heading = name
            if tagged := re.fullmatch(r"(\S+) \(type: (\w+)\)", name):
                types.setdefault(tagged[1], []).append(tagged[2])
        elif not any(each[:1].isupper() for each in kind.split(" | ")):  # the classes of sections
            section = name.rpartition(".")[0]
            place = heading if heading and name.startswith(heading.partition(" ")[0] + ".") else section or "run"
            found.setdefault(place, []).append(Setting(name, kind, default, meaning))
        if {"list", "map"} & set(kind.split(" | ")):
            wholes.append(name)
    ordered: dict[str, list[Setting]] = {}
    for place, settings in found.items():
        section, _, kind = place.partition(" ")
        if kind and section not in ordered:
            names = " | ".join(types[section])
            ordered[section] = [Setting(f"{section}.type", names, "", "Which of these it is; its settings are below.")]
        ordered.setdefault(place, []).extend(settings)
    return ordered


def prepared(root: Path, base: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The configuration of a run below `root`: that of the run in `base`, or the defaults, and `overrides` over it.

    Raises ConfigError for what cannot be, and RunFolderError if its folder is taken.
    """
    for override in overrides:
        if override.partition("=")[0].strip() == "folder":
            raise ConfigError(f"folder: a run of the studio lies in {root}, by its name and seed")
    config = load_config([base / "config.yaml"] if base else [], list(overrides))
    folder = root / f"{config.name}-{config.seed}"
    if folder.exists():
        raise RunFolderError(f"{folder} is there already: choose another name or seed")
    return config.model_copy(update={"folder": str(folder)})


def launch(root: Path, config: RunConfig) -> tuple[int, Path]:
    """Start the run that `prepared` has made; the id of its process, and the file that has what it says."""
    if (root / "run.json").is_file():
        raise RunFolderError(f"{root} is a run itself: start the studio over the folder that it lies in")
    beside = root / config.run_folder.name
    recipe, log = beside.with_name(f"{beside.name}.yaml"), beside.with_name(f"{beside.name}.log")
    if recipe.exists():
        raise RunFolderError(f"{recipe} is there already: choose another name or seed, or remove it")
    write_whole(recipe, config.to_yaml().encode(), "the configuration of the run")
    return begin([str(recipe)], log), log


def begin(arguments: Sequence[str], log: Path) -> int:
    """`pertoken train` in a process that outlives this one, what it says added to `log`; its id."""
    command = [sys.executable, "-m", "pertoken.cli", "train", *arguments]
    with writing("what the run says", log), open(log, "ab") as output:
        going = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    threading.Thread(target=going.wait, daemon=True).start()  # or it stays a zombie when it ends
    return going.pid
