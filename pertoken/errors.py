"""Every error that a person can cause or meet, each with one clear sentence.

All derive from `PertokenError`; each also inherits the standard-library error that it refines, so
`except ValueError` keeps working for people who do not know this package.

To add one: pick the standard error that it refines, write `class XError(PertokenError, ThatError)`, say in
its docstring when it is raised, and raise it where the cause is known. The message names *where* (config
path, file and line, episode id, tensor), *expected*, *got*, and *what to do*.
"""

import difflib
from collections.abc import Iterable


class PertokenError(Exception):
    """Root of all named errors. The command line prints its message and exits with `exit_code`."""

    exit_code = 1


class ConfigError(PertokenError, ValueError):
    """A configuration value, key or combination that cannot work; raised before anything is loaded."""

    exit_code = 2


class TaskError(PertokenError, ValueError):
    """Task data that cannot be read: no file, no such column, no usable row, too many bad rows."""


class ModelError(PertokenError, RuntimeError):
    """A model or tokenizer that cannot be found, loaded or used for what was asked."""


class RewardError(PertokenError, RuntimeError):
    """A reward function that raised, or returned NaN, a wrong type, or a wrong length."""


class WorkerError(PertokenError, RuntimeError):
    """A process for work beside the training that cannot be started, or was ended already."""


class AlignmentError(PertokenError, ValueError):
    """Characters that could not be matched with the tokens that produced them."""


class NumericsError(PertokenError, ArithmeticError):
    """A check of the token maths failed: ratio before the first update, non-finite losses in a row."""


class OutOfMemoryError(PertokenError, MemoryError):
    """Memory ran out, and the work cannot be cut into smaller portions."""


class RunFolderError(PertokenError, OSError):
    """A run folder or checkpoint that cannot be written or read: no space, no permission, wrong version."""


class MissingExtraError(PertokenError, ImportError):
    """An optional package is not installed; the message names the `pip install` line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'pertoken[{extra}]'")


def closest(name: str, known: Iterable[str]) -> str:
    """A sentence that helps with an unknown name: the nearest known one, else all known ones.

    >>> closest("rouge", ["rouge_l", "bleu"])
    "did you mean 'rouge_l'?"
    >>> closest("xyz", ["rouge_l", "bleu"])
    'known: bleu, rouge_l'
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
