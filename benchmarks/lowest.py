"""Runs tests with the lowest versions that `pyproject.toml` allows, in an environment of their own.

    python benchmarks/lowest.py                                   # all but torch and transformers
    python benchmarks/lowest.py --keep numpy -- tests/test_cli.py # not numpy either, and these tests

The lowest versions are installed, with what they pin themselves, in front of the packages of this environment. Those
that are kept (`--keep`; torch and transformers unless given) stay as they are here: the lowest torch is a gigabyte.
What these demand counts too: the lowest version of a package is the lowest that an installer can choose beside them.
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


def lowest(keep: set[str]) -> list[str]:
    """`name==version` of each dependency that is not kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = {name: version for name, version in bounds_of(project["dependencies"]).items() if name not in keep}
    for kept in keep:
        for name, version in bounds_of(metadata.requires(kept) or []).items():
            if name in bounds:
                bounds[name] = max(bounds[name], version)
    return [f"{name}=={version}" for name, version in bounds.items()]


def bounds_of(requirements: Sequence[str]) -> dict[str, Version]:
    """The lowest version of each package that is asked for without an extra."""
    found = [Requirement(text) for text in requirements]
    return {
        canonicalize_name(each.name): Version(bound.version)
        for each in found
        if each.marker is None or each.marker.evaluate({"extra": ""})
        for bound in each.specifier
        if bound.operator == ">="
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="*", default=["torch", "transformers"])
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    keep = {canonicalize_name(name) for name in (*options.keep, "torch", "transformers")}
    wanted = lowest(keep)
    with tempfile.TemporaryDirectory(prefix="lowest-") as name:
        python = environment(Path(name), dependencies=False)
        kept = Path(name) / "kept.txt"
        kept.write_text("".join(f"{each}=={metadata.version(each)}\n" for each in sorted(keep)), encoding="utf-8")
        call(python, "-m", "pip", "install", "-q", "-c", kept, *wanted)
        print("with", *wanted, flush=True)
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", *options.tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
