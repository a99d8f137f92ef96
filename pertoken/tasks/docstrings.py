"""The embedded task: from the body of a Python docstring, write its summary line.

Every installed package documents its functions and classes with a one-line summary, a blank line and some
paragraphs. Body in, summary out: a summarisation task of real text by many authors that needs no download.

    package -> files -> docstrings -> (summary_line, prose) -> good pairs -> items, split by package

Files are parsed, never imported. A package lies in one split only, and which one depends on its name alone:
a model trained with one seed, or on one machine, never saw the held-out packages of another.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path

from pertoken.errors import TaskError
from pertoken.tasks.base import SPLITS, ItemTask, PromptTemplate, Split, Template, split_by
from pertoken.types import Item

LARGE_PACKAGES = ("torch", "transformers", "numpy", "sympy", "networkx")
"""Always in train: each of them would be most of a held-out split, which should hold many authors."""

SMALL_PACKAGES = (
    *("huggingface_hub", "nltk", "pydantic", "rich", "fsspec", "anyio", "absl", "joblib", "packaging", "filelock"),
    *("click", "jinja2", "markdown_it", "pygments", "lxml", "sacrebleu", "rouge_score", "safetensors", "tokenizers"),
    *("typer", "tqdm", "jaxtyping", "setuptools"),
)
_NOT_READ = ("antigravity", "distutils", "idlelib", "lib2to3", "this", "turtledemo")
STANDARD_LIBRARY = tuple(sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in _NOT_READ))

DEFAULT_PACKAGES = (*LARGE_PACKAGES, *SMALL_PACKAGES, *STANDARD_LIBRARY)
"""What Python and `pip install pertoken` bring along: nearly the same for everyone. Absent ones are passed over."""

SMALL_FRACTIONS = (0.35, 0.25, 0.4)
"""Shares of train, validation, test among the packages that are not large."""

DEFAULT_PROMPT: Template = (
    {
        "role": "user",
        "content": "Here is the documentation of a Python {kind}, without its first line:\n\n{body}\n\n"
        "Write the missing first line: one short sentence that says what the {kind} does.",
    },
)


def load_docstring_task(
    packages: Sequence[str] | None = None,
    *,
    num_train: int | None = None,
    num_validation: int | None = 256,
    num_test: int | None = 256,
    num_per_package: int = 400,
    min_body_words: int = 30,
    max_body_words: int = 110,
    prompt: Template = DEFAULT_PROMPT,
    seed: int = 0,
) -> ItemTask:
    """The task of writing the summary line of a docstring from its body; the same list on the same machine.

    `packages` are top-level names (None: DEFAULT_PACKAGES). The template may use {body}, {kind} (function, method or
    class), {name} and {package}; `info` holds name, kind, package and `source`, the body. `seed` orders the items
    before they are cut to `num_...`; it moves no package to another split.
    """
    template = PromptTemplate(prompt)
    pool: dict[Split, list[Item]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for package in DEFAULT_PACKAGES if packages is None else packages:
        files = _files(package)
        if packages is not None and not files:
            raise TaskError(
                f"package {package!r}: no Python files found; give the names of installed top-level packages"
            )
        items = _items(package, files, template, min_body_words=min_body_words, max_body_words=max_body_words)
        new = (item for item in items if _is_new(item, seen))
        pool[split_of(package)] += islice(new, num_per_package)
    if not pool["train"]:
        raise TaskError(
            f"task docstrings: none of {', '.join(packages or ())} gives a training item; packages that always train: "
            + ", ".join(LARGE_PACKAGES)
        )
    caps = {"train": num_train, "validation": num_validation, "test": num_test}
    ordered = {split: sorted(items, key=lambda item: _digest(f"{seed}/{item.id}")) for split, items in pool.items()}
    return ItemTask("docstrings", {split: tuple(items[: caps[split]]) for split, items in ordered.items()})


def split_of(package: str) -> Split:
    """The split that the docstrings of `package` are in."""
    return "train" if package in LARGE_PACKAGES else split_by(package, SMALL_FRACTIONS)


def _is_new(item: Item, seen: set[str]) -> bool:
    """True if nothing like `item` was seen; remembers it. Packages copy docstrings, also across splits."""
    keys = {item.id, _letters(item.answer or ""), _letters(item.info["source"])}
    known = not seen.isdisjoint(keys)
    seen |= keys
    return not known


def _items(
    package: str,
    files: Sequence[tuple[str, Path]],
    template: PromptTemplate,
    *,
    min_body_words: int,
    max_body_words: int,
) -> Iterator[Item]:
    for name, kind, docstring in _docstrings(files):
        summary = summary_line(docstring)
        if not is_good_summary(summary):
            continue
        body = prose(docstring, max_words=max_body_words)
        if is_good_body(body, summary, min_words=min_body_words):
            row = {"body": body, "kind": kind, "name": name, "package": package}
            info = {"source": body, "kind": kind, "name": name, "package": package}
            yield Item(name, template.render(row), summary, info)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- from a package to docstrings -------------------------------------------------------------------------

_SKIPPED = re.compile(
    r"(^|/)(tests?|testing|benchmarks?|_?vendor(ed)?|_distutils|externals?|third_party|site-packages)/"
    r"|(^|/)(test_[^/]*|[^/]*_test|[^/]*_pb2|conftest)\.py$"
    r"|^transformers/models/"  # thousands of files, copied from each other
)
_MAX_FILE_BYTES = 1_000_000


def _files(package: str) -> list[tuple[str, Path]]:
    """(path from the package's name on, file), in an order by hash: a cap then takes a fair sample."""
    if "." in package:
        return []
    # PathFinder first: to importlib, `os` and others are frozen, without a file. Neither imports anything.
    spec = PathFinder.find_spec(package) or importlib.util.find_spec(package)
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        module = Path(spec.origin or "")
        paths = [(module.parent, module)] if module.suffix == ".py" else []
    else:
        folders = [Path(folder) for folder in spec.submodule_search_locations]
        paths = [(folder.parent, path) for folder in folders for path in folder.rglob("*.py")]
    named = [(path.relative_to(parent).as_posix(), path) for parent, path in paths]
    kept = [(name, path) for name, path in named if not _SKIPPED.search(name) and path.is_file()]
    return sorted(kept, key=lambda file: _digest(file[0]))


def _docstrings(files: Sequence[tuple[str, Path]]) -> Iterator[tuple[str, str, str]]:
    """(qualified name, kind, docstring) of the public functions, methods and classes in `files`."""
    for name, path in files:
        if path.stat().st_size <= _MAX_FILE_BYTES and (tree := _parsed(path.read_bytes())):
            yield from _documented(tree, name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def _parsed(source: bytes) -> ast.Module | None:
    """The syntax tree, or None for templates, files for other Pythons and the like."""
    collects = gc.isenabled()
    gc.disable()  # a tree is a million new objects without a cycle; looking for one takes half of all the time
    try:
        with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return None
    finally:
        if collects:
            gc.enable()


def _documented(scope: ast.Module | ast.ClassDef, name: str) -> Iterator[tuple[str, str, str]]:
    for node in scope.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        is_class, in_class = isinstance(node, ast.ClassDef), isinstance(scope, ast.ClassDef)
        kind = "class" if is_class else "method" if in_class else "function"
        if text := ast.get_docstring(node, clean=False):
            yield f"{name}.{node.name}", kind, text
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{name}.{node.name}")


# --- from a docstring to a pair ---------------------------------------------------------------------------

_FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_GOOGLE_SECTION = re.compile(r"^(?=[A-Z][a-z]+( [a-z]+){0,2}:\n +\S)", re.MULTILINE)
_UNDERLINE = re.compile(r"([-=~^*#])\1{2,}$")
_PROSE_SECTIONS = ("notes", "explanation", "description", "details", "overview", "extended summary")
_NOT_PROSE = re.compile(r"\s|>|\.\. |\[|:\w|@\w|[-*+#|] |\d+[.)] |\$ |[<{|+]|\w+ ?: |[A-Z][\w ]*:$")
"""Starts of lines that no sentence has: code, doctests, directives, fields, bullets, tables, headings."""
_SENTENCE_END = re.compile(r"""(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bcf)[.!?][)"'`]?(?=\s+[A-Z`*"'(]|$)""")

_MARKUP = (
    (re.compile(r":[\w:]+:`~?([^`<]+?)(\s*<[^`]*>)?`"), r"`\1`"),  # :func:`~os.path.join`
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`__?"), r"\1"),  # `the manual <https://...>`_
    (re.compile(r"`([^`]+)`__?(?!\w)"), r"\1"),  # `the manual`_
    (re.compile(r"\[`?~?([\w .()-]+)`?\]\([^)]*\)"), r"\1"),  # [the manual](https://...)
    (re.compile(r"\[(`[^`]+`)\]"), r"\1"),  # [`Trainer`]
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"(\[\w+\])_"), r"\1"),  # footnote [1]_
    (re.compile(r"(?<![\w*])\*{1,2}([\w.-]+)\*{1,2}(?![\w*])"), r"\1"),  # *emphasis*
    (re.compile(r"\s+"), " "),
)


def summary_line(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line, markup taken off; a missing period is added."""
    first = _plain(inspect.cleandoc(docstring).partition("\n\n")[0])
    end = _SENTENCE_END.search(first)
    return first[: end.end()] if end else first + "." * first[-1:].isalnum()


def prose(docstring: str, *, max_words: int = sys.maxsize) -> str:
    """What a docstring says in sentences after its summary: at most `max_words` words, whole sentences only.

    Parameter lists, examples, doctests, tables, bullets and directives are left out, with the sentence that
    introduces them, and markup is taken off.

    >>> prose('''Add a key.
    ...
    ... The key goes to :attr:`Map.keys`. For instance::
    ...
    ...     add(key)
    ...
    ... Args:
    ...     key: its name
    ... ''')
    'The key goes to `Map.keys`.'
    """
    text = inspect.cleandoc(docstring)
    summary = _SENTENCE_END.search(text.partition("\n\n")[0])
    rest = text[summary.end() :].lstrip() if summary else text.partition("\n\n")[2]
    kept: list[str] = []
    for paragraph in _paragraphs(rest):
        kept += filter(None, [_whole_sentences(paragraph)])
        if sum(part.count(" ") + 1 for part in kept) >= max_words:
            break
    return _whole_sentences(" ".join(kept), max_words)


def _paragraphs(text: str) -> Iterator[str]:
    """The paragraphs of `text` that hold nothing but prose."""
    text = _GOOGLE_SECTION.sub("\n", _FENCED.sub("", text))
    skipping = False
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.split("\n")
        if len(lines) > 1 and _UNDERLINE.match(lines[1].strip()):  # a numpydoc section lasts until the next
            skipping = lines[0].strip().lower() not in _PROSE_SECTIONS
            lines = lines[2:]
        if not skipping and lines and not lines[0][:1].islower() and not any(map(_NOT_PROSE.match, lines)):
            yield _plain(" ".join(lines))


def _plain(text: str) -> str:
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _whole_sentences(text: str, max_words: int = sys.maxsize) -> str:
    """The longest beginning of `text` that ends with a sentence and has at most `max_words` words."""
    ends = [end.end() for end in _SENTENCE_END.finditer(text)]
    return text[: max((end for end in ends if text.count(" ", 0, end) < max_words), default=0)]


# --- what makes a good pair -------------------------------------------------------------------------------

_UNWANTED = re.compile(r"https?:|\\|[^\x20-\x7e]|\bdeprecat|\bTODO\b|\bFIXME\b|\bXXX\b|%\(|\{|>>>|\|", re.IGNORECASE)
_MIN_SHARE_OF_LETTERS = 0.85
_MIN_SHARE_TOLD = 0.4


def is_good_summary(summary: str) -> bool:
    """True if `summary` is one plain sentence of 4 to 20 words."""
    return (
        4 <= len(summary.split()) <= 20
        and summary[0].isupper()
        and summary.endswith(".")
        and not _UNWANTED.search(summary)
    )


def is_good_body(body: str, summary: str, *, min_words: int) -> bool:
    """True if `body` is text to read from which `summary` can be written, but not copied.

    It speaks of what the summary says (shares its long words, endings aside) and does not hold it word for word.
    """
    letters = sum(char.isalpha() or char in " ,.'" for char in body)
    told = _stems(summary)
    return (
        len(body.split()) >= min_words
        and not _UNWANTED.search(body)
        and letters >= _MIN_SHARE_OF_LETTERS * len(body)
        and _letters(summary) not in _letters(body)
        and len(told & _stems(body)) >= _MIN_SHARE_TOLD * len(told)
    )


def _stems(text: str) -> set[str]:
    return {word[:5] for word in _letters(text).split() if len(word) > 3}


def _letters(text: str) -> str:
    """What is compared when two texts are called the same: lower-case letters and digits."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()
