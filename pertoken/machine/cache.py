"""Where this package keeps what it has to make only once: converted models, compiled code."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$PERTOKEN_CACHE`, else `pertoken` in the user's cache folder. It can be deleted at any time."""
    base = os.environ.get("PERTOKEN_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pertoken"
