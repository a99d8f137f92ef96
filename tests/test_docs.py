"""What the pages say is true: snippets run, links resolve, generated parts are fresh, nothing is left out."""

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from pertoken import cli, credit, objectives
from pertoken.assembly import build_rewards
from pertoken.compare import load_comparison
from pertoken.config import RunConfig, explain, load_config, load_stages
from pertoken.jobs.search import load_search
from pertoken.reward_models import load_training
from pertoken.rewards import resolve
from pertoken.rewards.names import BUILT_IN
from pertoken.validation import load_suite

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
COMMANDS = typer.main.get_command(cli.app).commands
ALL_COMMANDS = COMMANDS | {f"runs {name}": command for name, command in COMMANDS["runs"].commands.items()}

SPEC = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)


def read(name) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- links and names ----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Heading anchors as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    text = read(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if linked.name == "report.png" and not linked.exists():
            continue  # the picture of the last run
        assert linked.exists(), f"{name_of(page)}: {target} is not there"
        assert not anchor or anchor in anchors(read(linked)), f"{name_of(page)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_tests_that_a_page_names_exist(page):
    text = read(page)
    for path in re.findall(r"`((?:tests|pertoken|docs|examples|recipes|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).is_file(), f"{name_of(page)}: {path}"
    known = {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", read(path))}
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named <= known, f"{name_of(page)}: {named - known}"


# --- generated parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", generate.GENERATED)
def test_generated_parts_are_fresh(name):
    text = read(f"docs/{name}")
    assert generate.marked(text) == text, f"docs/{name} is stale; run: python docs/generate.py"


def test_every_field_is_on_the_configuration_page():
    page = read("docs/config.md")
    for name, kind, _, meaning in explain(RunConfig):
        if kind != "section":
            assert f"| `{name}` |" in page or f"## {name}\n" in page
            assert " ".join(meaning.split()).replace("|", "\\|") in page
    assert all(f"\n## {name}\n" in page or f"| `{name}` |" in page for name in RunConfig.model_fields)


def test_defaults_on_the_configuration_page_are_those_of_a_run():
    shown = dict(re.findall(r"^\| `([\w.]+)` \| .*? \| `(.*?)` \|", read("docs/config.md"), flags=re.MULTILINE))
    config = RunConfig()
    assert shown["evaluation.sampling.temperature"] == str(config.evaluation.sampling.temperature)
    assert shown["rollout.sampling.temperature"] == str(config.rollout.sampling.temperature)
    assert shown["stop.steps"] == str(config.stop.steps)


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_and_option_is_documented(command):
    page = read("docs/cli.md")
    assert f"# pertoken {command}\n" in page
    for parameter in ALL_COMMANDS[command].params:
        assert parameter.param_type_name != "option" or parameter.opts[0] in page


def test_every_error_says_when_it_is_raised():
    assert len(generate.named_errors()) > 5
    for kind in generate.named_errors():
        assert kind.__doc__ not in (None, "", kind.__base__.__doc__)
        assert f"`{kind.__name__}`" in read("docs/cli.md")
        assert len(kind.__bases__) == 2, f"{kind.__name__} refines no standard error"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_reward_is_documented(name):
    page = read("docs/rewards.md")
    assert f"`{name}`" in page
    for field in dataclasses.fields(resolve(name)):
        assert f"`{field.name}`" in page


def test_the_reference_names_all_of_the_token_maths_with_shapes():
    """All that is public, with every parameter, and the names that users were promised."""
    page = read("docs/reference.md")
    for module in (credit, objectives):
        own = {k: v for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
        for name, thing in own.items():
            if name.startswith("_") or not callable(thing):
                continue
            entry = page.split(f"### {name}\n")[1].split("###")[0]
            assert all(re.search(rf"\b{parameter}\b", entry) for parameter in inspect.signature(thing).parameters)
    promised = (
        "reward_to_go gae group_relative group_process center_by_group whiten clip "
        "policy_gradient clipped_surrogate aggregate"
    )
    assert all(f"### {name}\n" in page for name in promised.split())
    assert page.count('"B T"') > 100


def test_the_python_of_the_reference_runs():
    (block,) = blocks(read("docs/reference.md"), "python")
    names = {}
    exec(compile(block, "reference.md", "exec"), names)
    assert names["new"].grad.abs().sum() > 0


# --- snippets -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch, model_folder):
    """A folder with what the snippets speak of: a model, data, and the modules that begin with `# name.py`."""
    rows = [{"prompt": f"It is day {k}.", "reference": f"day {k}"} for k in range(60)]
    (tmp_path / "my_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["prompt"], "chosen": row["reference"], "rejected": "no"} for row in rows]
    (tmp_path / "my_pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "facts.jsonl").write_text(json.dumps({"subject": "day 1", "relation": "after", "object": "day 0"}))
    (tmp_path / "relations.jsonl").write_text(json.dumps({"relation": "after", "patterns": ["[X] follows [Y]."]}))
    (tmp_path / "my_model").symlink_to(model_folder)
    for block in blocks(read("README.md"), "python"):
        if match := re.match(r"# ((\w+)\.py)\n", block):
            (tmp_path / match[1]).write_text(block)
            monkeypatch.delitem(sys.modules, match[2], raising=False)  # another test may have imported its namesake
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_python_of_the_readme_runs(place, capsys):
    names = {}
    for block in blocks(read("README.md"), "python"):
        exec(compile(block, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"^made all 2 steps: [\d.]+ -> [\d.]+ \[[+-][\d.]+, [+-][\d.]+\]$", out, flags=re.MULTILINE)
    assert (place / "runs" / "mine-0" / "model" / "config.json").is_file()


@pytest.mark.parametrize("page", [path for path in PAGES if blocks(read(path), "yaml")], ids=name_of)
def test_recipes_on_pages_are_valid(page, place):
    for text in blocks(read(page), "yaml"):
        (place / "recipe.yaml").write_text(text)
        if "data" in yaml.safe_load(text):  # a learned reward and no run
            load_training([place / "recipe.yaml"])
            continue
        if "compare" in yaml.safe_load(text):  # several arms
            load_comparison([place / "recipe.yaml"])
            continue
        if "keys" in yaml.safe_load(text):  # a search
            load_search([place / "recipe.yaml"], [f"recipe={ROOT / yaml.safe_load(text)['recipe']}"])
            continue
        if "checks" in yaml.safe_load(text):  # a suite
            load_suite([place / "recipe.yaml"], [f"recipe={ROOT / yaml.safe_load(text)['recipe']}"])
            continue
        assert set(yaml.safe_load(text)) <= {*RunConfig.model_fields, "stages"}
        for config in load_stages([place / "recipe.yaml"]):
            build_rewards(config.rewards)  # names lead somewhere, parameters exist


def test_recipes_of_the_project_are_valid():
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        build_rewards(load_config([recipe]).rewards)


@pytest.mark.parametrize("page", [path for path in PAGES if blocks(read(path), "bash")], ids=name_of)
def test_commands_on_pages_exist(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in "\n".join(blocks(read(page), "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words:
            check_command(words)


def check_command(words: list[str]) -> None:
    program, *rest = words
    if program == "pertoken" and rest[0] in ("runs", "reward", "credit"):
        check_pertoken(COMMANDS[rest[0]].commands[rest[1]], rest[2:])
    elif program == "pertoken":
        check_pertoken(COMMANDS[rest[0]], rest[1:])
    elif program == "make":
        assert f"\n{rest[0]}:" in read("Makefile")
    elif program == "python" and rest[0] != "-m":
        assert (ROOT / rest[0]).is_file(), rest[0]
    elif program in ("pytest", "mypy", "ruff"):
        assert all((ROOT / word).exists() for word in rest if "/" in word)
    else:
        assert program in ("python", "pip", "."), f"unknown command {program}"


def check_pertoken(command, arguments: list[str]) -> None:
    """The options exist, the recipes and the keys of the overrides too. Run folders are only made by running."""
    options = {name: parameter for parameter in command.params for name in parameter.opts if name.startswith("--")}
    settings = []
    while arguments:
        word, *arguments = arguments
        if not word.startswith("--"):
            settings.append(word)
        elif not options[word].is_flag:
            arguments = arguments[1:]
    takes_settings = "settings" in {parameter.name for parameter in command.params}
    takes_one_first = command.name in ("generate", "resume")
    settings = settings[1:] if takes_one_first else settings if takes_settings else []
    load = load_comparison if command.name == "compare" else load_config
    load([s for s in settings if "=" not in s], [s for s in settings if "=" in s])


# --- two languages ------------------------------------------------------------------------------------------


def test_both_readmes_are_in_step():
    english, chinese = map(read, READMES)
    for pattern in (r"^## ", r"^\|", r"^- ", r"^<!-- "):
        found = [len(re.findall(pattern, text, flags=re.MULTILINE)) for text in (english, chinese)]
        assert found[0] == found[1], f"lines that begin with {pattern}: {found}"
    fences = [re.findall(r"^```.*?^```$", text, flags=re.DOTALL | re.MULTILINE) for text in (english, chinese)]
    assert fences[0] == fences[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) - set(READMES) for text in (english, chinese)]
    assert links[0] == links[1]
    tests = [re.findall(r"`(tests/[\w/.]+|test_\w+)`", text) for text in (english, chinese)]
    assert tests[0] == tests[1]


# --- promises -----------------------------------------------------------------------------------------------


def test_each_promise_names_a_test_that_there_is():
    text = read("docs/reliability.md")
    named = set(re.findall(r"`(test_\w+)`", text))
    there = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert named
    assert named <= there, f"no such tests: {sorted(named - there)}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise ")]
    assert [row for row in rows if "`test_" not in row.rsplit("|", 2)[1]] == []


# --- examples in docstrings ---------------------------------------------------------------------------------


MODULES = sorted(path for path in (ROOT / "pertoken").rglob("*.py") if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstring_examples_give_what_they_show(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    outcome = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert outcome.attempted > 0, f"{name}: its examples are not found"
    assert outcome.failed == 0
