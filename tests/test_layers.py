"""Who may import whom: the tree is the architecture. Files are parsed, never imported.

A module may import what `MAY` lists for the layer that it belongs to, and modules of its own layer. A layer is a module
or a package; where `MAY` names modules of a package (`config.presets`), those are layers of their own. A new module
belongs to no layer until it is named here.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pertoken"

MATHS = {"credit", "objectives", "preferences"}
STAGES = {"policy", "rollout", "rewards", "batching"}

MAY: dict[str, set[str]] = {
    # what everyone may know
    "errors": set(),
    "display": set(),
    "answers": set(),
    "machine.cache": set(),
    "native": {"machine.cache"},
    "machine.memory": {"native"},
    "machine.portions": {"errors", "machine.memory"},
    "machine.stopwatch": set(),
    "machine.background": set(),
    "machine.workers": {"errors", "machine.memory"},
    "rows": {"errors"},
    "schedule": {"errors"},
    "sampling": {"errors"},
    "types": {"errors", "display", "sampling"},
    "segments": {"sampling", "types"},
    "prompts": {"errors", "types"},
    "forward": {"errors"},
    "hub": {"errors"},
    "reading": {"errors"},
    # the stages of a step: each knows the types, none knows a sibling
    **{
        stage: {
            "errors",
            "machine.cache",
            "native",
            "machine.background",
            "machine.workers",
            "machine.portions",
            "rows",
            "schedule",
            "sampling",
            "types",
            "segments",
            "prompts",
            "forward",
            "hub",
            "reading",
        }
        for stage in STAGES
    },
    **{maths: {"types"} for maths in MATHS},
    # beside the stages
    "config.presets": set(),
    "config.families": {"errors", "answers", "text_metrics"},
    "config": {"errors", "schedule", "sampling", "config.presets", "config.families"},
    "text_metrics": {"errors", "types", "answers"},
    "tasks": {"errors", "answers", "sampling", "types", "rows"},
    "tracking": {"errors", "display", "types", "text_metrics"},
    "testing": {"errors", "types"},
    # what joins them
    "observe": {"types", "credit", "objectives", "rewards", "policy", "tracking"},
    "training.guards": {"rewards"},
    "training.examples": {"errors", "types", "prompts", "rollout"},
    "mauve": {"errors", "rewards"},
    "evaluation": {"errors", "sampling", "types", "text_metrics", "mauve", "tracking", "observe", *STAGES, "config"},
    "training.trainer": {
        *(
            "errors",
            "machine.memory",
            "machine.portions",
            "machine.background",
            "schedule",
            "sampling",
            "types",
            "config",
            "tasks",
            "tracking",
            "observe",
            "training.guards",
            "training.examples",
            "turns",
            "prompts",
            "evaluation",
        ),
        *(STAGES | MATHS),
    },
}
MAY["rewards"] = MAY["rewards"] | {"answers"}
MAY["training.weights"] = MAY["training.balance"] = MAY["training.trust_region"] = set()
MAY["training.replay"] = {"types", "rollout"}
MAY["training.trainer"] |= {"training.weights", "training.balance", "training.replay", "training.trust_region"}
MAY["training.assignment"] = {"types", "config", "credit", "preferences"}
MAY["training.state"] = MAY["training.trainer"] - {
    "errors",
    "machine.memory",
    "observe",
    "prompts",
}
MAY["training.redistribution"] = {"types", "config", "credit", "batching", "rewards", "rollout"}
MAY["training.resampling"] = MAY["training.state"] - {"machine.background"} | {
    "training.state",
    "training.redistribution",
}
MAY["training.updating"] = {
    "errors",
    "types",
    "segments",
    "config",
    "batching",
    "objectives",
    "observe",
    "training.state",
    "policy",
    "training.balance",
    "training.trust_region",
}
MAY["training.trainer"] = MAY["training.trainer"] - {"training.balance", "training.trust_region"} | {
    "training.assignment",
    "training.state",
    "training.resampling",
    "training.updating",
}
MAY["training.offline"] = MAY["training.trainer"] | {"training.trainer"}
MAY["augmentation"] = {
    *("errors", "machine.cache", "sampling", "types", "config", "tasks", "policy", "rollout", "rewards"),
}
MAY["assembly"] = MAY["training.offline"] | {"training.offline", "text_metrics", "forward", "augmentation"}
MAY["jobs.profiling"] = MAY["assembly"] | {"assembly", "machine.stopwatch"}
MAY["doctor"] = MAY["assembly"] | {"assembly", "reward_check"}
MAY["jobs.run"] = MAY["assembly"] | {"assembly", "doctor"}
MAY["inquiry.kept"] = MAY["assembly"] | {"assembly", "training.redistribution", "hub"}
MAY["inquiry.attribution"] = {"errors", "reading", "types", "sampling", "batching", "policy", "rewards"}
MAY["inquiry.questions"] = {
    "errors", "types", "sampling", "config", "text_metrics", "batching", "forward", "observe", "policy",
    "training.redistribution", "training.resampling", "rewards", "rollout",
}  # fmt: skip
MAY["inquiry.asking"] = MAY["inquiry.questions"] | {
    "inquiry.questions",
    "inquiry.attribution",
    "assembly",
    "inquiry.kept",
    "jobs.run",
    "tracking",
}
MAY["inquiry.told"] = {"errors", "display", "tracking", "inquiry.questions", "inquiry.asking"}
MAY["studio"] = {"errors", "config", "sampling", "tracking", "inquiry.asking"}
MAY["jobs.crossval"] = {"errors", "config", "text_metrics", "tracking"}
MAY["inquiry.credit_compare"] = {
    "errors",
    "types",
    "config",
    "credit",
    "tracking",
    "training.redistribution",
    "inquiry.kept",
}
MAY["reward_check"] = {"errors", "sampling", "types", "rewards", "batching", "rollout", "observe"}
MAY["reward_models"] = {
    "errors",
    "hub",
    "machine.portions",
    "config",
    "preferences",
    "rows",
    "tasks",
    "rewards",
    "text_metrics",
    "tracking",
}
MAY["turns"] = {"machine.background", "errors", "sampling", "types", "prompts", "rewards", "rollout"}
MAY["integrations"] = MAY["turns"] | {"batching", "config", "tasks", "assembly"}
MAY["validation"] = MAY["jobs.run"] | {"jobs.run"}
MAY["jobs.generation"] = MAY["jobs.run"] | {"jobs.run"}
MAY["jobs.many"] = {"config", "jobs.run", "tracking"}
MAY["jobs.search"] = {"errors", "config", "jobs.many", "text_metrics", "tracking"}
MAY["compare"] = MAY["jobs.run"] | {"jobs.run", "jobs.many", "hub"}
MAY["cli"] = MAY["jobs.run"] | {
    "display",
    "config.presets",
    "jobs.run",
    "doctor",
    "jobs.profiling",
    "reward_check",
    "reward_models",
    "testing",
    "inquiry.credit_compare",
    "jobs.crossval",
    "jobs.search",
    "validation",
    "compare",
    "jobs.generation",
    "inquiry.asking",
    "inquiry.told",
    "studio",
}
MAY["__main__"] = {"cli"}
MAY["training"] = MAY["jobs"] = MAY["machine"] = MAY["inquiry"] = set()  # what is said of these packages
MAY["__init__"] = set()  # names are looked up when they are asked for

OPTIONAL = {
    "accelerate",
    "peft",
    "datasets",
    "plotly",
    "gguf",
    "pyarrow",
    "harper",
    "evaluate",
    "jsonschema",
    "referencing",
    "matplotlib",
    "optuna",
    "lm_eval",
    "reasoning_gym",
    "verifiers",
    "trl",
    "starlette",
    "uvicorn",
    "captum",
}
"""Packages of the extras: imported where they are used, so that everything else works without them."""

HEAVY = (
    *("nltk", "sklearn", "sentence_transformers", "peft", "datasets", "matplotlib", "optuna", "lm_eval", "gymnasium"),
    "trl",
)
"""What no run loads that does not use it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    return layer_of(path.relative_to(PACKAGE).with_suffix("").parts)


def layer_of(parts: Sequence[str]) -> str:
    """The longest beginning of a dotted name in the package that is a layer."""
    beginnings = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((name for name in beginnings if name in MAY), parts[0])


def imports(path: Path, *, only_at_import_time: bool = False) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, with their lines; `from a import b` counts as `a.b`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _outside_functions(tree) if only_at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: a relative import; name the module in full"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _outside_functions(child)


def violations(path: Path) -> list[str]:
    own, allowed = layer(path), MAY[layer(path)]
    return [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {own} imports {name}"
        for name, line in imports(path)
        if name.split(".")[0] == "pertoken" and layer_of(name.split(".")[1:]) not in {own, *allowed}
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_knows_only_the_layers_below_it(path):
    assert layer(path) in MAY, f"{layer(path)} belongs to no layer yet: give it one in this test"
    assert not violations(path)


def test_the_rule_has_no_circle_and_no_stale_name():
    assert set(MAY) == {layer(path) for path in FILES}

    def below(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, " -> ".join((*above, name))
        for lower in MAY[name]:
            below(lower, (*above, name))

    for name in MAY:
        below(name)


@pytest.mark.parametrize("source", ["from pertoken import config", "import pertoken.policy.scoring"])
def test_the_rule_sees_what_it_forbids(tmp_path, monkeypatch, source):
    path = tmp_path / "pertoken" / "credit.py"
    path.parent.mkdir()
    path.write_text(f"def late():\n    {source}\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", path.parent)
    assert len(violations(path)) == 1


@pytest.mark.parametrize("name", sorted(MATHS))
def test_the_maths_imports_torch_and_types_only(name):
    for module, line in imports(PACKAGE / f"{name}.py"):
        known = module.startswith("pertoken.types.") or module.split(".")[0] in {"torch", "jaxtyping"}
        assert known or module.split(".")[0] in sys.stdlib_module_names, f"{name}.py:{line}: imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_optional_packages_are_imported_where_they_are_used(path):
    found = [name for name, _ in imports(path, only_at_import_time=True) if name.split(".")[0] in OPTIONAL]
    assert not found


def test_to_import_the_jobs_loads_nothing_heavy():
    code = f"import sys, pertoken.cli, pertoken.jobs.run; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
