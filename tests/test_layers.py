"""Who may import whom: the tree is the architecture. Files are parsed, never imported.

A module may import what `MAY` lists for the layer that it belongs to, and modules of its own package. A new module
belongs to no layer until it is named here.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pertoken"

MATHS = {"credit", "objectives", "preferences"}
STAGES = {"policy", "rollout", "rewards", "batching"}

MAY: dict[str, set[str]] = {
    # what everyone may know
    "errors": set(),
    "answers": set(),
    "cache": set(),
    "native": {"cache"},
    "memory": {"native"},
    "portions": {"errors", "memory"},
    "stopwatch": set(),
    "background": set(),
    "workers": {"errors", "memory"},
    "rows": {"errors"},
    "schedule": {"errors"},
    "sampling": {"errors"},
    "types": {"errors", "sampling"},
    "segments": {"sampling", "types"},
    "prompts": {"errors", "types"},
    "forward": {"errors"},
    "hub": {"errors"},
    # the stages of a step: each knows the types, none knows a sibling
    **{
        stage: {
            "errors",
            "cache",
            "native",
            "background",
            "workers",
            "portions",
            "rows",
            "schedule",
            "sampling",
            "types",
            "segments",
            "prompts",
            "forward",
            "hub",
        }
        for stage in STAGES
    },
    **{maths: {"types"} for maths in MATHS},
    # beside the stages
    "presets": set(),
    "families": {"errors", "answers", "text_metrics"},
    "config": {"errors", "schedule", "sampling", "presets", "families"},
    "text_metrics": {"errors", "types", "answers"},
    "tasks": {"errors", "answers", "sampling", "types", "rows"},
    "tracking": {"errors", "types", "text_metrics"},
    "testing": {"errors", "types"},
    # what joins them
    "observe": {"types", "credit", "objectives", "rewards", "tracking"},
    "guards": {"rewards"},
    "examples": {"errors", "types", "prompts", "rollout"},
    "mauve": {"errors", "rewards"},
    "evaluation": {"errors", "sampling", "types", "text_metrics", "mauve", "tracking", "observe", *STAGES, "config"},
    "trainer": {
        *(
            "errors",
            "memory",
            "portions",
            "background",
            "schedule",
            "sampling",
            "types",
            "config",
            "tasks",
            "tracking",
            "observe",
            "guards",
            "examples",
            "turns",
            "prompts",
            "evaluation",
        ),
        *(STAGES | MATHS),
    },
}
MAY["rewards"] = MAY["rewards"] | {"answers"}
MAY["weights"] = MAY["balance"] = MAY["trust_region"] = set()
MAY["replay"] = {"types", "rollout"}
MAY["trainer"] |= {"weights", "balance", "replay", "trust_region"}
MAY["assignment"] = {"types", "config", "credit"}
MAY["state"] = MAY["trainer"] - {"errors", "memory", "background", "observe", "prompts"}
MAY["redistribution"] = {"types", "config", "credit", "batching", "rewards", "rollout"}
MAY["resampling"] = MAY["state"] | {"state", "redistribution"}
MAY["updating"] = {
    "errors",
    "types",
    "segments",
    "config",
    "batching",
    "objectives",
    "observe",
    "state",
    "policy",
    "balance",
    "trust_region",
}
MAY["trainer"] = MAY["trainer"] - {"balance", "trust_region"} | {"assignment", "state", "resampling", "updating"}
MAY["offline"] = MAY["trainer"] | {"trainer"}
MAY["augmentation"] = {
    *("errors", "cache", "sampling", "types", "config", "tasks", "policy", "rollout", "rewards"),
}
MAY["build"] = MAY["offline"] | {"offline", "text_metrics", "forward", "augmentation"}
MAY["profiling"] = MAY["build"] | {"build", "stopwatch"}
MAY["doctor"] = MAY["build"] | {"build", "reward_check"}
MAY["run"] = MAY["build"] | {"build", "doctor"}
MAY["kept"] = MAY["build"] | {"build", "redistribution", "hub"}
MAY["questions"] = {
    "errors", "types", "sampling", "config", "text_metrics", "batching", "forward", "observe", "policy",
    "redistribution", "resampling", "rewards", "rollout",
}  # fmt: skip
MAY["asking"] = MAY["questions"] | {"questions", "build", "kept", "run", "tracking"}
MAY["told"] = {"errors", "tracking", "questions", "asking"}
MAY["studio"] = {"errors", "config", "sampling", "tracking", "asking"}
MAY["crossval"] = {"errors", "config", "text_metrics", "tracking"}
MAY["credit_compare"] = {"errors", "types", "config", "credit", "tracking", "redistribution", "kept"}
MAY["reward_check"] = {"errors", "sampling", "types", "rewards", "batching", "rollout", "observe"}
MAY["reward_models"] = {
    "errors",
    "hub",
    "portions",
    "config",
    "preferences",
    "rows",
    "tasks",
    "rewards",
    "text_metrics",
    "tracking",
}
MAY["turns"] = {"errors", "sampling", "types", "prompts", "rewards", "rollout"}
MAY["integrations"] = MAY["turns"] | {"background", "batching", "config", "tasks", "build"}
MAY["validation"] = MAY["run"] | {"run"}
MAY["generation"] = MAY["run"] | {"run"}
MAY["many"] = {"config", "run", "tracking"}
MAY["search"] = {"errors", "config", "many", "text_metrics", "tracking"}
MAY["compare"] = MAY["run"] | {"run", "many", "hub"}
MAY["cli"] = MAY["run"] | {
    "presets",
    "run",
    "doctor",
    "profiling",
    "reward_check",
    "reward_models",
    "testing",
    "credit_compare",
    "crossval",
    "search",
    "validation",
    "compare",
    "generation",
    "asking",
    "told",
    "studio",
}
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
}
"""Packages of the extras: imported where they are used, so that everything else works without them."""

HEAVY = (
    *("nltk", "sklearn", "sentence_transformers", "peft", "datasets", "matplotlib", "optuna", "lm_eval", "gymnasium"),
    "trl",
)
"""What no run loads that does not use it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


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
        if name.split(".")[0] == "pertoken" and name.split(".")[1] not in {own, *allowed}
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
    code = f"import sys, pertoken.cli, pertoken.run; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
