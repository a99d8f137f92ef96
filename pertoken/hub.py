"""Models that others made, from a folder or the Hugging Face hub: nothing in them runs unless it was named.

Weights are safetensors and never pickles, which can run anything when they are opened. Python files of a model run only
if the configuration names what was read and found good: the commit of a repository, or the digest of a folder's files.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from pertoken.errors import ModelError

NO_CODE: dict[str, Any] = {"trust_remote_code": False}
"""Of `from_pretrained`. Left out, transformers would ask on the terminal, and take a yes from whoever sits there."""

SAFE: dict[str, Any] = {**NO_CODE, "use_safetensors": True}
"""The same, for weights."""


def code_arguments(name: str, trusted: str | None) -> dict[str, Any]:
    """What `from_pretrained` is told about the code of the model `name`; `trusted` is `policy.trust_remote_code`.

    Raises ModelError if the code is not the one that `trusted` names.
    """
    if trusted is None:
        return dict(NO_CODE)
    folder = Path(name)
    if not folder.is_dir():
        if not re.fullmatch("[0-9a-f]{40}", trusted):
            raise ModelError(
                f"policy.trust_remote_code: {name!r} is no folder: expected the commit of its repository, 40 hex digits"
            )
        return {"trust_remote_code": True, "revision": trusted, "code_revision": trusted}
    found = code_digest(folder)
    if found is not None and found != trusted:
        raise ModelError(
            f"policy.trust_remote_code: the code in {folder} is not the one that was named. Read it again: its digest "
            f"is {found} now."
        )
    return {"trust_remote_code": True, "code_revision": trusted}  # without code of its own it may name a repository


def code_digest(folder: Path) -> str | None:
    """SHA-256 of the Python files of a folder, their names included; None if there are none."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    if not files:
        return None
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name}\n".encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def why_not(name: str, error: Exception) -> str | None:
    """What to do about a model that was refused for its code or its pickles, in a sentence; None if it was not."""
    folder, said = Path(name), str(error)
    if "trust_remote_code" in said:
        digest = code_digest(folder) if folder.is_dir() else None
        named = digest or "the commit, 40 hex digits, of the repository as you have read it"
        return (
            "it brings Python code of its own, which would run with your rights. Read it; if you trust it, set "
            f"policy.trust_remote_code to {named}"
        )
    pickles = [path.name for path in sorted(folder.glob("*.bin"))] if folder.is_dir() else []
    without = not any(folder.glob("*.safetensors")) if pickles else not folder.is_dir() and "safetensors" in said
    if without:
        held = f" ({', '.join(pickles[:3])})" if pickles else ""
        return (
            f"it has no weights in safetensors, and pickles{held} are not opened here: they can run anything. Convert "
            "them where that does no harm: AutoModel.from_pretrained(name).save_pretrained(folder)"
        )
    return None
