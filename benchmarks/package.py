"""Builds wheel and sdist, looks into them, installs each in an environment of its own, and trains with it.

    python benchmarks/package.py                     # beside the packages of this environment, without a network
    python benchmarks/package.py --dependencies      # dependencies from the package index, as a user gets them

Needs the package `build`. The wheel must hold every file of `pertoken/`, the sdist what a developer needs beside it;
what is installed must be what was built, start, build its compiled code, train a step and write its report.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

TRY = """
import json, sys
from pathlib import Path
import pertoken
from pertoken import native
from pertoken.jobs import run
from pertoken.config import RunConfig
from pertoken.testing import byte_tokenizer, tiny_model
place = Path(sys.argv[1])
tiny_model(seed=1).save_pretrained(place / "model")
byte_tokenizer().save_pretrained(place / "model")
rows = [{"prompt": f"say {k}", "reference": f"answer {k}"} for k in range(20)]
(place / "data.jsonl").write_text("\\n".join(map(json.dumps, rows)))
result = run.train(RunConfig.model_validate({
    "folder": str(place / "run"),
    "policy": {"model": str(place / "model"), "device": "cpu"},
    "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:"},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 3}},
    "evaluation": {"items": 2, "sampling": {"max_new_tokens": 3}},
    "stop": {"steps": 1},
}))
print(json.dumps({"from": pertoken.__file__, "native": native.available(), "report": str(result.report)}))
"""


def call(*command: object, **named: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **named)  # type: ignore[call-overload]
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return str(done.stdout)


def expected() -> set[str]:
    """The files of the package as git knows them."""
    return set(call("git", "ls-files", "pertoken", cwd=ROOT).split())


def packed(path: Path) -> set[str]:
    """The files in a wheel or an sdist, as paths from the project's root."""
    if path.suffix == ".whl":
        return set(zipfile.ZipFile(path).namelist())
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def environment(place: Path, *, dependencies: bool) -> Path:
    """A new virtual environment; its python. Without `dependencies` it sees the packages of this one behind its own."""
    venv.create(place, with_pip=True)
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not dependencies:
        call(python, "-m", "pip", "uninstall", "-q", "-y", "setuptools")  # that of Python 3.11 is too old
        site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def tried(built: Path, place: Path, *, dependencies: bool) -> dict[str, object]:
    """Install what was built into an environment of its own, and train a step with it there."""
    python = environment(place / "environment", dependencies=dependencies)
    if dependencies:
        call(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{built}[report]")
    else:
        offline = ("--no-deps", "--no-index", "--no-build-isolation")
        call(python, "-m", "pip", "install", "-q", *offline, built)
    work = place / "work"
    work.mkdir()
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = call(python, "-c", TRY, work, cwd=work, env=clean | {"OMP_NUM_THREADS": "1"})
    help_text = call(python.parent / "pertoken", "--help", cwd=work, env=clean)
    found: dict[str, object] = json.loads(said.splitlines()[-1])
    assert "train" in help_text
    assert str(place / "environment") in str(found["from"]), f"tried {found['from']}, which was not installed here"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dependencies", action="store_true", help="install dependencies from the package index")
    options = parser.parse_args()
    isolation = [] if options.dependencies else ["--no-isolation"]
    with tempfile.TemporaryDirectory(prefix="package-") as name:
        place = Path(name)
        source = place / "source"
        call("git", "clone", "-q", ROOT, source)  # what is committed, and nothing that lies about
        call(sys.executable, "-m", "build", *isolation, "--outdir", place / "dist", source, cwd=place)
        for built in sorted((place / "dist").iterdir()):
            files = packed(built)
            missing = sorted(expected() - files)
            if built.suffix != ".whl":
                missing += [
                    n for n in ("recipes/quickstart.yaml", "constraints.txt", "tests/conftest.py") if n not in files
                ]
            strangers = sorted(n for n in files if "__pycache__" in n or n.startswith((".git", "runs/")))
            if missing or strangers:
                sys.exit(f"{built.name}: missing {missing}, too many {strangers}")
            (place / built.name.replace(".", "-")).mkdir()
            found = tried(built, place / built.name.replace(".", "-"), dependencies=options.dependencies)
            print(f"{built.name}: {len(files)} files, {built.stat().st_size / 1e3:.0f} kB; {found}", flush=True)


if __name__ == "__main__":
    main()
