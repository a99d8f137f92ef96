"""The shape checker is on in every test: each annotated tensor is checked at each call."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

_hook = install_import_hook("pertoken", "beartype.beartype")
