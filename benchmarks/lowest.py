"""Runs tests with the lowest versions that `pyproject.toml` allows, in an environment of their own.

    python benchmarks/lowest.py                                   # all but torch and transformers
    python benchmarks/lowest.py --keep numpy -- tests/test_cli.py # not numpy either, and these tests

The lowest versions are installed, without their own dependencies, in front of the packages of this environment. Those
that are kept (`--keep`; torch and transformers unless given) stay as they are here: the lowest torch is a gigabyte.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from package import ROOT, call, environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = ("tests/test_cli.py", "tests/test_config.py", "tests/test_stages.py", "tests/tracking", "tests/tasks")


def lowest(keep: set[str]) -> list[str]:
    """`name==version` of each dependency that is not kept."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [requirement for text in project["dependencies"] if (requirement := Requirement(text)).name not in keep]
    bounds = {r.name: next(each.version for each in r.specifier if each.operator == ">=") for r in found}
    return [f"{canonicalize_name(name)}=={version}" for name, version in bounds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", nargs="*", default=["torch", "transformers"])
    parser.add_argument("tests", nargs="*", default=list(TESTS))
    options = parser.parse_args()
    wanted = lowest(set(options.keep) | {"torch", "transformers"})
    with tempfile.TemporaryDirectory(prefix="lowest-") as name:
        python = environment(Path(name), dependencies=False)
        call(python, "-m", "pip", "install", "-q", "--no-deps", *wanted)
        print("with", *wanted, flush=True)
        command = [python, "-m", "pytest", "-p", "no:cacheprovider", *options.tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
