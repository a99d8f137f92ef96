"""Functions of other systems, taken out of their files as they stand, to compare ours with.

    python benchmarks/oracles.py        # fetches what is missing into build/oracles (or $PERTOKEN_ORACLES)

verl, TRL, OpenRLHF and SkyRL come from PyPI, RL4LMs from GitHub; none of what they depend on is installed. A function
is read out of its file, freed of decorators and annotations, and given the names that it uses: its body is run
unchanged. Where the maths stands in the middle of a method, the statements are run with variables of ours. For
development: nothing of the package imports this, and tests that need it are skipped where a system is not there.
"""

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

FOLDER = Path(os.environ.get("PERTOKEN_ORACLES", Path(__file__).parents[1] / "build" / "oracles"))

PACKAGES = ("verl-0.9.1", "trl-1.16.0", "trl-1.10.0", "openrlhf-0.11.2", "skyrl-0.3.0")
"""TRL 1.10 for its PPO, which 1.16 no longer has."""
RL4LMS = "https://github.com/allenai/RL4LMs"

FILES = {
    "verl": "verl-0.9.1/verl/trainer/ppo/core_algos.py",
    "verl tensors": "verl-0.9.1/verl/utils/torch_functional.py",
    "verl groups": "verl-0.9.1/verl/utils/groupwise.py",
    "verl mismatch": "verl-0.9.1/verl/trainer/ppo/rollout_corr_helper.py",
    "trl grpo": "trl-1.16.0/trl/trainer/grpo_trainer.py",
    "trl rloo": "trl-1.16.0/trl/trainer/rloo_trainer.py",
    "trl utils": "trl-1.16.0/trl/trainer/utils.py",
    "trl ppo": "trl-1.10.0/trl/experimental/ppo/ppo_trainer.py",
    "openrlhf": "openrlhf-0.11.2/openrlhf/trainer/ppo_utils/experience_maker.py",
    "skyrl": "skyrl-0.3.0/skyrl/backends/skyrl_train/utils/ppo_utils.py",
    "skyrl tensors": "skyrl-0.3.0/skyrl/backends/skyrl_train/utils/torch_utils.py",
    "rl4lms": "rl4lms/rl4lms/envs/text_generation/reward.py",
    "rl4lms batches": "rl4lms/rl4lms/envs/text_generation/alg_wrappers.py",
}


def at_hand(system: str) -> bool:
    """Whether every file of a system (`verl`, `trl`, ...) is there."""
    return all((FOLDER / path).is_file() for name, path in FILES.items() if name.split()[0] == system)


def functions(file: str, *names: str, **given: Any) -> SimpleNamespace:
    """Functions (of classes too, by their bare names) and classes of a file, able to see each other and `given`.

    Without `names`: all functions at the top of the file.
    """
    tree = _parsed(file)
    if names:
        found = {node.name: node for node in _definitions(tree) if node.name in names}
        missing = set(names) - set(found)
        if missing:
            raise LookupError(f"{FILES[file]}: no {sorted(missing)}")
        wanted: list[ast.stmt] = list(found.values())
    else:
        wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    scope = dict(given)
    _run(wanted, scope, file)
    return SimpleNamespace(**{node.name: scope[node.name] for node in wanted if hasattr(node, "name")})


def statements(file: str, function: str, first: str, last: str, **given: Any) -> dict[str, Any]:
    """The variables after the statements of a function, from the line that begins with `first` to that with `last`."""
    (body,) = [node for node in _definitions(_parsed(file)) if node.name == function]
    lines = _text(file).splitlines()
    for block in _blocks(body):
        texts = [lines[node.lineno - 1].lstrip() for node in block]
        starts = [k for k, text in enumerate(texts) if text.startswith(first)]
        ends = [k for k, text in enumerate(texts) if text.startswith(last)]
        if starts and ends:
            scope = dict(given)
            _run(block[starts[0] : ends[-1] + 1], scope, file)
            return scope
    raise LookupError(f"{FILES[file]}: no statements {first!r} to {last!r} in {function}")


def _text(file: str) -> str:
    return (FOLDER / FILES[file]).read_text(encoding="utf-8")


@functools.cache
def _parsed(file: str) -> ast.Module:
    return ast.parse(_text(file))


def _definitions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        yield from (block for name in ("body", "orelse") if isinstance(block := getattr(node, name, None), list))


def _run(nodes: list[ast.stmt], scope: dict[str, Any], file: str) -> None:
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
    exec(compile(ast.Module(nodes, []), FILES[file], "exec"), scope)


def main() -> None:
    """Fetch what is missing."""
    for package in PACKAGES:
        name, _, version = package.rpartition("-")
        if not (FOLDER / package).is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(FOLDER / package)]
            subprocess.run([*pip, f"{name}=={version}"], check=True)
    if not (FOLDER / "rl4lms").is_dir():
        subprocess.run(["git", "clone", "--depth", "1", RL4LMS, str(FOLDER / "rl4lms")], check=True)
    for system in ("verl", "trl", "openrlhf", "skyrl", "rl4lms"):
        print(f"{system}: {'at hand' if at_hand(system) else 'missing'}")


if __name__ == "__main__":
    main()
