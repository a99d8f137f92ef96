"""What other systems, other machines and the package index ask of the project: seen to on this one."""

import ast
import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pertoken.config import RunConfig, load_config, load_stages
from pertoken.errors import ConfigError
from pertoken.jobs.search import SearchConfig
from pertoken.tracking.checkpoints import CheckpointStore, _misfit
from pertoken.tracking.export import _slug
from pertoken.tracking.runlog import episodes_path, evaluation_path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "pertoken").rglob("*.py"))


def relative(path):
    return path.relative_to(ROOT / "pertoken").as_posix()


# --- systems without what POSIX has ------------------------------------------------------------------------------

POSIX_ALONE = {
    "os": ("fork", "killpg", "getpgrp", "setsid", "getuid", "geteuid", "sysconf", "statvfs", "mkfifo"),
    "signal": ("SIGKILL", "SIGALRM", "SIGUSR1", "SIGHUP", "alarm", "pause", "setitimer"),
}
GUARDED = {
    ("workers.py", "os.killpg"), ("workers.py", "signal.SIGKILL"), ("workers.py", "os.getpgrp"),
    ("workers.py", "os.sysconf"), ("memory.py", "os.sysconf"),
}  # fmt: skip
"""Behind `if _POSIX`, `sys.platform`, or where the file of /proc that is read first is missing elsewhere."""


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_what_only_posix_has_is_used_behind_a_question(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    found = {name for module, own in POSIX_ALONE.items() for name in (f"{module}.{each}" for each in own)} & names
    assert {(path.name, name) for name in found} <= GUARDED


def test_every_module_is_imported_without_what_only_posix_has():
    """In a process that has lost fcntl, resource, fork and the rest once the libraries are there."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]
    code = (
        "import importlib, os, signal, sys\n"
        "import torch, transformers.modeling_utils, transformers.generation\n"
        "import filelock, typer, rich.console, sacrebleu, nltk, rouge_score\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'tty', 'pty'): sys.modules[name] = None\n"
        f"for name in {POSIX_ALONE['os']}: hasattr(os, name) and delattr(os, name)\n"
        f"for name in {POSIX_ALONE['signal']}: hasattr(signal, name) and delattr(signal, name)\n"
        f"for name in {modules}:\n"
        "    if not name.endswith(('__init__', '__main__')): importlib.import_module(name)\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "imported", done.stderr[-6000:]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_text_files_are_opened_in_a_named_encoding(path):
    """Windows takes another one than UTF-8 where none is named."""
    without = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [str(a.value) for a in node.args if isinstance(a, ast.Constant) and not str(a.value).strip("rwabxt+")]
        plain = isinstance(node.func, ast.Name) or all(isinstance(a, ast.Constant) for a in node.args)
        of_text = name in ("read_text", "write_text") or (name == "open" and plain and "b" not in "".join(modes))
        positional = name == "read_text" and bool(node.args)
        if of_text and "encoding" not in given and not positional:
            without.append(f"{relative(path)}:{node.lineno}: {ast.unparse(node)[:80]}")
    assert without == []


# --- names of files and folders -----------------------------------------------------------------------------------

DEVICES = ["con", "CON", "Prn", "aux.txt", "NUL", "com1", "LPT9.log"]


def can_be_named(name):
    """Whether Windows lets a file have this name."""
    stem = name.split(".", maxsplit=1)[0].lower()
    device = re.fullmatch(r"con|prn|aux|nul|com[1-9]|lpt[1-9]", stem)
    return not device and not re.search(r'[<>:"/\\|?*\x00-\x1f]', name) and not name.endswith((".", " "))


@pytest.mark.parametrize("name", [*DEVICES, "run.", "..", "a/b", "a\\b", "C:x", "a:b", "~", "-x", "a b", "", "x\n"])
def test_names_that_cannot_be_those_of_folders_somewhere_are_refused(name):
    with pytest.raises(ConfigError, match="name"):
        load_config([], [f"name={json.dumps(name)}"])
    with pytest.raises(ValueError, match="name"):
        SearchConfig(recipe="r.yaml", keys={"seed": [1, 2]}, name=name)


def test_stages_whose_folders_would_be_one_on_macos_are_refused(tmp_path):
    path = tmp_path / "chain.yaml"
    path.write_text("stages:\n- {name: First}\n- {name: first}\n")
    with pytest.raises(ConfigError, match=r"stages.1.name: each stage needs a name of its own, got 'first'"):
        load_stages([path])
    path.write_text("stages:\n- {name: first}\n- {name: nul}\n")
    with pytest.raises(ConfigError, match="that of a device"):
        load_stages([path])


def test_the_names_that_a_run_gives_its_files_are_welcome_everywhere(tmp_path):
    made = [
        RunConfig(name="a.b-c_d").run_folder.name, episodes_path(tmp_path, 7).name,
        evaluation_path(tmp_path, 7, "validation-ema").name,
        *(_slug(text) for text in ("a/b\\c:d", "?*<>|", "x" * 300, "è.é", "...")),
    ]  # fmt: skip
    assert all(can_be_named(f"{name}.csv") for name in made), made
    with pytest.raises(ValueError, match="use letters"):
        evaluation_path(tmp_path, 1, "a:b")
    written = {"size": 1, "metric": None, "keep": 1, "keep_best": False}
    path = CheckpointStore(tmp_path).save(3, lambda folder: (folder / "state").write_bytes(b"x"), **written)
    assert can_be_named(path.name)


@pytest.mark.parametrize("name", ["..\\state", "C:state", "C:\\state", "a\\b", "state:stream", "a/b", "../x", "/x"])
def test_a_manifest_points_out_of_its_folder_on_no_system(tmp_path, name):
    """What is a plain name here may be a path there, and a copied run is read there."""
    assert "not a file beside it" in str(_misfit(tmp_path, name, 1))


# --- the package ------------------------------------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements():
    from packaging.requirements import Requirement

    extras = PROJECT["project"]["optional-dependencies"]
    listed = [*PROJECT["project"]["dependencies"], *(r for name, rs in extras.items() if name != "dev" for r in rs)]
    return [found for found in map(Requirement, listed) if found.name != "pertoken"]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_dependency_has_bounds_and_the_tested_version_lies_within(requirement):
    from packaging.utils import canonicalize_name

    operators = {each.operator for each in requirement.specifier}
    assert ">=" in operators
    assert operators & {"<", "<=", "=="}, f"{requirement}: no upper bound"
    pins = dict(
        line.strip().split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    tested = {canonicalize_name(name): version for name, version in pins.items()}.get(
        canonicalize_name(requirement.name)
    )
    assert tested is None or requirement.specifier.contains(tested), f"constraints.txt tests {tested}"


def test_every_file_of_the_package_that_is_no_module_is_packed():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["pertoken"]
    others = [
        path.relative_to(ROOT / "pertoken").as_posix()
        for path in (ROOT / "pertoken").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".pyo") and "__pycache__" not in path.parts
    ]
    assert {Path(name).suffix for name in others} >= {".cpp", ".h", ".html", ".js", ".css", ".yaml"}
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []


def test_every_folder_with_modules_is_a_package():
    """setuptools.packages.find passes over a folder without `__init__.py`."""
    assert [path.parent for path in FILES if not (path.parent / "__init__.py").is_file()] == []
