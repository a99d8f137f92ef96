"""Reading settings of any kind: YAML files, overrides, errors in plain words, and a table of what can be set."""

import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pertoken.errors import ConfigError, closest


class _Dumper(yaml.SafeDumper):
    """Escapes what YAML would take for the end of a line, so that it is read back as what it was."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted)


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused, fields documented by the text under them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """This configuration as YAML, all defaults written out."""
        return str(yaml.dump(self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


_DEVICES = {"con", "prn", "aux", "nul", *(f"{kind}{number}" for kind in ("com", "lpt") for number in range(1, 10))}
"""What Windows takes for a device in any folder, whatever follows behind a dot."""


def _can_be_a_folder(name: str) -> str:
    """`name`, if every system lets a folder have it: folders are copied from one to the other."""
    if name.partition(".")[0].lower() in _DEVICES or name.endswith("."):
        raise ValueError(
            "Windows gives no folder such a name: it is that of a device (con, nul ...), or ends with a dot"
        )
    return name


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"), AfterValidator(_can_be_a_folder)]
"""A name that becomes that of a folder."""

S = TypeVar("S", bound=Section)


def load_settings(kind: type[S], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> S:
    """Settings of another kind, with errors as of `load_config`."""
    return validate(merge_settings({}, files, overrides), kind)


def overrides_of(texts: Sequence[str]) -> dict[str, Any]:
    """The values of `key.sub=value` pairs, nested."""
    values: dict[str, Any] = {}
    for text in texts:
        _set(values, text)
    return values


def merge_settings(
    merged: dict[str, Any],
    files: Sequence[str | Path],
    overrides: Sequence[str],
    expand: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Files over `merged`, overrides over them; `expand` tells what the values of a file stand for."""
    for file in files:
        merged = merge(merged, expand(_read_yaml(Path(file))))
    for override in sorted(overrides, key=lambda text: not text.startswith(NAMES)):
        _set(merged, override)
        if override.startswith(NAMES):
            merged = merge(merged, expand(overrides_of([override])))
    return merged


NAMES = ("algorithm=", "task.family=", "task=")
"""Begin overrides that stand, or may stand, for a table of settings, over which all others win."""


def validate(values: Mapping[str, Any], kind: type[S]) -> S:
    """`kind(**values)` with every error in plain words, one line each."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_in_words(each, kind) for each in error.errors()))) from None


MAX_VALUES = 100_000
"""Most values in one YAML text, aliases written out: a few lines of aliases can stand for billions."""


class _Loader(yaml.SafeLoader):
    """The safe loader (plain values only), with a bound on what merge keys (`<<`) copy, and words for a bad value."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # `!!int ""`, `!!bool x`, `!!timestamp x`
            why = f"{str(node.value)[:60]!r} is no {node.tag.rpartition(':')[2]}"
            more = f": {error}" if isinstance(error, ValueError) else ""  # others speak of the library's inside
            raise yaml.constructor.ConstructorError(None, None, why + more, node.start_mark) from None

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "merge keys copy too much", node.start_mark)


def _parse(text: str, where: str) -> Any:
    """The value of a YAML text; ConfigError if it is too deep, too large, or holds text that cannot be written."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply for a configuration") from None
    open_values, seen = [value], 0
    while open_values:
        part = open_values.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigError(f"{where}: more than {MAX_VALUES} values, or one that holds itself; are aliases meant?")
        if isinstance(part, dict):
            open_values += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            open_values += part
        elif isinstance(part, str):
            _refuse_unwritable(part, where)
    return value


def _refuse_unwritable(text: str, where: str) -> None:
    """Text that has no place in a file or in a file name is found here, not when the run has begun."""
    if "\0" in text:
        raise ConfigError(f"{where}: a NUL character in {text[:60]!a}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: half a character (U+{ord(text[error.start]):04X}) at {error.start} of {text[:60]!a}; "
            "only whole Unicode characters can be written to files"
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" {closest(str(path), near)}" if near else ""
        raise ConfigError(f"no configuration file {str(path)!r}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, got {type(content).__name__}")
    return content


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section; a section of another `type` replaces the old one whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        same_type = (
            isinstance(old, dict) and isinstance(value, dict) and old.get("type") == value.get("type", old.get("type"))
        )
        merged[key] = merge(old, value) if same_type and isinstance(old, dict) else value
    return merged


def _set(target: Any, override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r}: expected key.sub=value, for instance update.learning_rate=1e-5")
    *path, last = key.split(".")
    try:
        value = _parse(text, ascii(key))
    except yaml.YAMLError:
        value = _parse(json.dumps(text), ascii(key))
    for depth, name in enumerate(path):
        if isinstance(target, list):
            target = target[_index(target, name, key)]
            continue
        if not isinstance(target.get(name), dict | list):
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict | list):
            raise ConfigError(f"{key}: {'.'.join(path[: depth + 1])} is not a section")
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    elif last == "type" and target.get("type") != value:
        target.clear()  # the old type's fields mean nothing to the new one
        target["type"] = value
    else:
        target[last] = value


def _index(target: list[Any], name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(target):
        raise ConfigError(f"{key}: {name!r} is not a place in a list of {len(target)}")
    return int(name)


def _in_words(error: Any, kind: type[BaseModel]) -> str:
    """One pydantic error as `where: what, hint`."""
    unknown = error["type"] == "extra_forbidden"  # its last part is what somebody wrote, whatever that looks like
    known_parts, last = (error["loc"][:-1], error["loc"][-1:]) if unknown else (error["loc"], ())
    location = [*(part for part in known_parts if not (isinstance(part, str) and "[" in part)), *last]
    section, path = _walk(location, kind)
    where = ".".join(path) or "config"
    if unknown:
        known = section.model_fields if section is not None else {}
        parent = ".".join(path[:-1])
        return f"{where}: unknown key{f' in {parent}' if parent else ''}; {closest(path[-1], known)}"
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip("' ") for tag in error["ctx"]["expected_tags"].split(",")]
        return f"{where}.type: unknown type {error['ctx']['tag']!r}; {closest(error['ctx']['tag'], tags)}"
    if error["type"] == "value_error" and not path:
        return str(error["ctx"]["error"])
    return f"{where}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"[:400]


def _walk(location: Sequence[Any], kind: type[BaseModel]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section of `kind` that a pydantic location lies in, and the location without the tags of unions."""
    section: type[BaseModel] | None = kind
    path: list[str] = []
    options: list[type[BaseModel]] = []
    for k, part in enumerate(location):
        tagged = [m for m in options if _tag(m) == part]
        if tagged:
            section, options = tagged[0], []
            continue
        path.append(str(part))
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            if k < len(location) - 1 and not isinstance(part, int):
                section = None
            continue
        options = _models_in(field.annotation)
        if k < len(location) - 1:
            section = options[0] if options else None
    return section, path


def _tag(model: type[BaseModel]) -> str | None:
    return str(model.model_fields["type"].default) if "type" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def explain(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, description), in the order of the configuration."""
    rows = []
    for name, field in model.model_fields.items():
        sections = _models_in(field.annotation)
        optional = type(None) in typing.get_args(field.annotation)
        listed = typing.get_origin(field.annotation) is tuple
        default = "(required)" if field.is_required() else _short(field.default)
        if not sections or optional or listed or field.description:
            rows.append((prefix + name, _type_name(field.annotation), default, field.description or ""))
        for section in sections:
            tag = _tag(section)
            label = f"{prefix}{name}.0" if listed else prefix + name
            if tag is not None:
                rows.append((f"{label} (type: {tag})", "section", "", (section.__doc__ or "").split("\n")[0]))
            elif not optional and not listed:
                rows.append((label, "section", "", (section.__doc__ or "").split("\n")[0]))
            rows += [row for row in explain(section, label + ".") if not row[0].endswith(".type")]
    return rows


def _short(value: Any) -> str:
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value and isinstance(value[0], BaseModel)):
        return ""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in typing.get_args(annotation)]
        return " | ".join("null" if n == "NoneType" else n for n in names)
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (tuple, dict):
        return "list" if typing.get_origin(annotation) is tuple else "map"
    name = str(annotation.__name__)
    return {"str": "text", "bool": "true | false"}.get(name, name)
