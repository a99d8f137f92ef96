"""Rewrites the generated parts of these pages: help texts, exit codes, configuration fields, algorithms, the doctor's
checks, the signatures of the token maths, and the outputs of the tour.

    python docs/generate.py            # writes what has changed, names it
    python docs/generate.py --check    # names it only, exit code 1

A generated part stands between `<!-- generated: name -->` and `<!-- end -->`; in the tour it is the ```text block
after a ```python block. Everything around such parts is written by hand and left alone.
"""

import ast
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from pertoken import cli, errors
from pertoken.cli.training import INTERRUPTED, TIME_IS_UP
from pertoken.compare import CompareConfig
from pertoken.config import RunConfig, Section, explain
from pertoken.config.families import FAMILIES, bound
from pertoken.config.presets import PRESETS
from pertoken.doctor import CHECKS
from pertoken.jobs.search import SearchConfig
from pertoken.reward_models import RewardTraining
from pertoken.validation import Suite

DOCS = Path(__file__).parent
GENERATED = (
    *("tasks.md", "cli.md", "config.md", "algorithms.md", "reward-models.md", "doctor.md", "reference.md", "search.md"),
    *("validation.md", "compare.md"),
)
MARKED = re.compile(r"(<!-- generated: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TOUR_BLOCK = re.compile(r"(```python\n(.*?)```\n)(?:\n```text\n.*?```\n)?", re.DOTALL)

TABLE = "| field | type | default | meaning |\n|---|---|---|---|\n"


def pages() -> dict[Path, str]:
    """Every page with generated parts, as it should be now."""
    pages = {DOCS / name: marked(_read(DOCS / name)) for name in GENERATED}
    return pages | {DOCS / "tour.md": tour(_read(DOCS / "tour.md"))}


def marked(text: str) -> str:
    """`text` with each marked part made anew."""

    def part(match: re.Match[str]) -> str:
        kind, _, name = match[2].partition(" ")
        makers = {
            "help": lambda: help_text(name),
            "exit-codes": exit_codes,
            "fields": fields,
            "reward-fields": lambda: fields_of(RewardTraining),
            "search-fields": lambda: fields_of(SearchConfig),
            "suite-fields": lambda: fields_of(Suite),
            "compare-fields": lambda: fields_of(CompareConfig),
            "algorithms": algorithms,
            "families": families,
            "checks": checks,
            "module": lambda: module(name),
        }
        made = makers[kind]()
        return match[1] + made.strip("\n") + "\n" + match[3]

    return MARKED.sub(part, text)


def help_text(command: str) -> str:
    """What `pertoken COMMAND --help` prints, 80 columns wide; of `pertoken` itself for an empty name."""
    runner = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    result = runner.invoke(cli.app, [*command.split(), "--help"], prog_name="pertoken")
    if result.exit_code:
        raise SystemExit(f"pertoken {command} --help failed: {result.output}")
    lines = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
    return f"```text\n{lines}\n```"


def exit_codes() -> str:
    """The table of exit codes; the errors behind them are the classes of `errors.py`."""
    by_code: dict[int, list[str]] = {}
    for error in named_errors():
        by_code.setdefault(error.exit_code, []).append(f"`{error.__name__}`: {_first_paragraph(error)}")
    rows = [
        (0, "The command did what it was asked to."),
        (1, "<br>".join(by_code[1])),
        (2, "<br>".join([*by_code[2], "an option or command that does not exist"])),
        (TIME_IS_UP, "`--max-time` is over: the run was saved, and the last line says how to resume."),
        (
            INTERRUPTED,
            "Ctrl-C or SIGTERM: the step was finished and saved, and the last line says how to resume.<br>"
            "a second Ctrl-C: ended at once, to be resumed from the newest checkpoint",
        ),
    ]
    return "| code | when |\n|---|---|\n" + "\n".join(f"| {code} | {when} |" for code, when in rows)


def checks() -> str:
    """The table of the doctor's checks."""
    rows = [f"| `{one.name}` | {one.title} | {_cell(one.ask.__doc__ or '')} | {'yes' * one.quick} |" for one in CHECKS]
    return "| check | what holds | what is looked at | quick |\n|---|---|---|---|\n" + "\n".join(rows)


def module(name: str) -> str:
    """The public names of a module of the package, in the order of its file: signature, shapes, what it gives."""
    source = _read(DOCS.parent / "pertoken" / f"{name}.py")
    return "\n\n".join(entry for node in ast.parse(source).body if (entry := _entry(node, source)))


def _entry(node: ast.stmt, source: str) -> str:
    """A public function, class or name in Markdown; nothing for what is private."""

    def lines(first: int, last: int) -> list[str]:
        return source.splitlines()[first - 1 : last]

    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        name, code = node.targets[0].id, lines(node.lineno, node.end_lineno or node.lineno)
    elif isinstance(node, ast.FunctionDef):
        name, code = node.name, lines(node.lineno, node.body[0].lineno - 1)
    elif isinstance(node, ast.ClassDef):
        name, code = node.name, lines(node.lineno, node.lineno)
        for part in node.body:
            if isinstance(part, ast.AnnAssign):
                code += lines(part.lineno, part.end_lineno or part.lineno)
            elif isinstance(part, ast.FunctionDef):
                code += lines(part.lineno, part.body[0].lineno - 1)
    else:
        return ""
    if name.startswith("_"):
        return ""
    documented = "" if isinstance(node, ast.Assign) else ast.get_docstring(node) or ""
    summary = " ".join(documented.split("\n\n")[0].split())
    signature = "\n".join(code).removesuffix(":")
    return f"### {name}\n\n```text\n{signature}\n```\n\n{summary}".rstrip()


def named_errors() -> list[type[errors.PertokenError]]:
    """The error classes that a person can meet, in the order of the file."""
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    return [kind for kind in found if issubclass(kind, errors.PertokenError) and kind is not errors.PertokenError]


def fields() -> str:
    """A heading per section and a table row per field, out of `pertoken.config.explain`."""
    rows, seen = explain(RunConfig), set[str]()
    typed = {name.partition(" ")[0] for name, *_ in rows if " (type: " in name}
    defaults = RunConfig().model_dump(mode="json", exclude=typed)
    lines = ["## At the top", "", TABLE.rstrip("\n")]
    for name, kind, default, meaning in rows:
        if kind == "section" and name in seen:  # said already, as a field of its own
            continue
        top, _, rest = name.partition(".")
        if not rest and (kind == "section" or top == "rewards"):
            key = top.partition(" ")[0]
            heading = f"### {top[len(key) + 1 :].strip('()')}" if " " in top else f"## {top}"
            if " " in top and key not in seen:
                lines += ["", f"## {key}"]
                seen.add(key)
            lines += ["", heading, "", meaning, "", TABLE.rstrip("\n")]
        else:
            value = _default(name, defaults, default)
            lines.append(f"| `{name}` | {_cell(_kind(kind))} | {value} | {_cell(meaning)} |")
        seen.add(name)
    return "\n".join(lines)


def algorithms() -> str:
    """A table of the methods in `pertoken.config.presets`, and a section for each."""
    lines = [
        "| `algorithm` | method | credit | surrogate | average over | KL | passes x steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, preset in PRESETS.items():
        keys = preset.keys()
        ratio = keys["objective.level"].replace("_", " ")
        surrogate = keys["objective.surrogate"]
        if surrogate != "policy_gradient":
            surrogate += f", {ratio} ratio, {keys['objective.clip_low']:g} / {keys['objective.clip_high']:g}"
        kl = "none" if keys["kl.place"] == "none" else f"{keys['kl.coefficient']:g} in the {keys['kl.place']}"
        cells = [
            f"[`{name}`](#{name})", preset.title, f"`{keys['credit.type']}`", surrogate, keys["objective.over"], kl,
            f"{keys['update.epochs']} x {keys['update.minibatches']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    for name, preset in PRESETS.items():
        lines += ["", f"## {name}", "", f"{preset.title}. {preset.paper}.", "", "```text", preset.formula, "```", ""]
        keys = ", ".join(f"`{key}={json.dumps(value)}`" for key, value in preset.keys().items())
        lines += [f"- **Sets** {keys}.", f"- **Published with** {preset.published}."]
        lines += [f"- **Differs from the paper**: {preset.differs.rstrip('.')}."]
        lines += [f"- **Needs** {preset.needs}."] if preset.needs else []
    return "\n".join(lines)


def families() -> str:
    """A section for each family of tasks in `pertoken.config.families`."""
    lines = list[str]()
    for name, family in FAMILIES.items():
        recipe, settings = f"recipes/{name}.yaml", family.settings
        lines += ["", f"### {family.title}", "", family.about, "", "```bash"]
        lines += [f"pertoken train {recipe} task.path=my_data.jsonl", "```", ""]
        lines += ["| what is asked | columns, the first that a row has |", "|---|---|"]
        for question in family.questions:
            columns = [" ".join(question.names), *question.columns]
            lines.append(
                f"| {_shown(question.ask)} | {', '.join('`' + each.replace(' ', '`+`') + '`' for each in columns)} |"
            )
        others = "".join(f"; {_named(layout)}" for layout in family.further)
        lines += ["", "Then `messages` and other conversations, and a `prompt` that is ready, with `completion`, "]
        lines[-1] += f"`response`, `reference` or `answer`{others}."
        lines += ["", "```yaml", _flow(bound(settings, {})), "```"]
        lines += [f"\nIts rewards need {family.needs}."] if family.needs else []
    return "\n".join(lines)


def _named(layout: Mapping[str, Any]) -> str:
    """A layout in a few words."""
    if "messages" in layout:
        return f"`{layout['messages']}` as messages, with `{layout['answer']}`"
    words = f", of which {layout['opening']} words are the prompt" if "opening" in layout else " alone"
    return f"`{layout['prompt']}`{words}"


def _shown(ask: str) -> str:
    return "`" + " / ".join(part for part in ask.split("\n") if part) + "`"


def _flow(settings: Mapping[str, Any]) -> str:
    """Sections as YAML: rewards one a line, the rest in braces."""
    lines = ["rewards:", *(f"  - {_braces(reward)}" for reward in settings["rewards"])]
    return "\n".join(
        [*lines, *(f"{name}: {_braces(section)}" for name, section in settings.items() if name != "rewards")]
    )


def _braces(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.strip()


def fields_of(settings: type[Section]) -> str:
    """A table of all fields of a kind of settings."""
    lines = [TABLE.rstrip("\n")]
    for name, kind, default, meaning in explain(settings):
        shown = default.encode("unicode_escape").decode()
        stated = "required" if default == "(required)" else f"`{shown}`" if default else ""
        lines.append(f"| `{name}` | {_cell(_kind(kind))} | {stated} | {_cell(meaning)} |")
    return "\n".join(lines)


def _default(name: str, defaults: Any, stated: str) -> str:
    """The default of a field as a run has it: a section may set other ones than its fields have elsewhere."""
    for part in name.split("."):
        if not isinstance(defaults, dict) or part not in defaults:
            return "required" if stated == "(required)" else f"`{stated}`" if stated else ""
        defaults = defaults[part]
    if isinstance(defaults, dict) or (defaults and isinstance(defaults, list) and isinstance(defaults[0], dict)):
        return ""
    return f"`{json.dumps(defaults) if not isinstance(defaults, str) else defaults}`"


def _kind(kind: str) -> str:
    return re.sub(r"\b[A-Z]\w*", "section", kind)


def _cell(text: str) -> str:
    """`text` on one line, with bars that do not end a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def tour(text: str) -> str:
    """The tour with what each block prints under it; the blocks run in order, in one namespace."""
    names: dict[str, Any] = {"__name__": "tour"}

    def run(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[2], "docs/tour.md", "exec"), names)
        output = printed.getvalue()
        return match[1] + (f"\n```text\n{output}```\n" if output else "")

    return TOUR_BLOCK.sub(run, text)


def _first_paragraph(kind: type) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def stale() -> Iterator[tuple[Path, str]]:
    """The pages that differ from what they should be."""
    for path, text in pages().items():
        if text != _read(path):
            yield path, text


def main() -> None:
    """Write what is stale, or with --check name it."""
    check, found = "--check" in sys.argv[1:], False
    for path, text in stale():
        found = True
        print(f"{path.name}: {'stale; run: python docs/generate.py' if check else 'written'}")
        if not check:
            path.write_text(text, encoding="utf-8")
    sys.exit(int(check and found))


if __name__ == "__main__":
    main()
