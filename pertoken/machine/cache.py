"""Where this package keeps what it has to make only once: converted models, compiled code."""

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """`$PERTOKEN_CACHE`, else `pertoken` in the user's cache folder. It can be deleted at any time."""
    base = os.environ.get("PERTOKEN_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pertoken"


def keep(path: Path, text: str) -> None:
    """Put `text` into a file of the cache, whole or not at all: a kill leaves no half of it, another writer no mixture.

    Raises OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as draft:
        try:
            draft.write(text)
            draft.close()
            os.replace(draft.name, path)
        except BaseException:
            draft.close()
            Path(draft.name).unlink(missing_ok=True)
            raise
