"""Runs tests with the lowest or the highest versions that `pyproject.toml` allows, in an environment of their own.

    python benchmarks/versions.py lowest                        # all but torch and transformers
    python benchmarks/versions.py highest                       # all but torch; or both: make versions
    python benchmarks/versions.py lowest --keep numpy -- tests/test_cli.py   # not numpy either, and these tests

These versions are installed, with what they pin themselves, in front of the packages of this environment. Those that
are kept stay as they are here: torch is a gigabyte, and the lowest transformers would want one of its own. What the
kept ones demand counts too: the lowest version of a package is the lowest that an installer can choose beside them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from package import ROOT, call, environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

TESTS = ("tests/test_cli.py", "tests/test_config.py", "tests/test_stages.py", "tests/tracking", "tests/tasks")
KEPT = {"lowest": {"torch", "transformers"}, "highest": {"torch"}}


def dependencies(keep: set[str]) -> list[Requirement]:
    """Those of the project without an extra that are not kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [Requirement(text) for text in project["dependencies"]]
    return [one for one in asked if canonicalize_name(one.name) not in keep]


def lowest(keep: set[str]) -> list[str]:
    """`name==version` of each dependency that is not kept."""
    bounds = bounds_of(dependencies(keep))
    for kept in keep:
        for name, version in bounds_of([Requirement(text) for text in metadata.requires(kept) or []]).items():
            if name in bounds:
                bounds[name] = max(bounds[name], version)
    return [f"{name}=={version}" for name, version in bounds.items()]


def bounds_of(requirements: Sequence[Requirement]) -> dict[str, Version]:
    """The lowest version of each package that is asked for without an extra."""
    return {
        canonicalize_name(each.name): Version(bound.version)
        for each in requirements
        if each.marker is None or each.marker.evaluate({"extra": ""})
        for bound in each.specifier
        if bound.operator == ">="
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=KEPT)
    parser.add_argument("--keep", nargs="*", default=[], help="also these as they are here")
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    keep: set[str] = {canonicalize_name(name) for name in (*options.keep, *KEPT[options.which])}
    wanted = lowest(keep) if options.which == "lowest" else ["--upgrade", *map(str, dependencies(keep))]
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        python = environment(Path(name), dependencies=False)
        kept = Path(name) / "kept.txt"
        kept.write_text("".join(f"{each}=={metadata.version(each)}\n" for each in sorted(keep)), encoding="utf-8")
        call(python, "-m", "pip", "install", "-q", "-c", kept, *wanted)
        print("with", *call(python, "-m", "pip", "freeze", "--local").split(), flush=True)
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "auto", "--dist", "loadfile", *options.tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
