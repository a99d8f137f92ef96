"""The shape checker is on in every test: each annotated tensor is checked at each call."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

_hook = install_import_hook("pertoken", "beartype.beartype")

import pytest  # noqa: E402 - after the hook


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random Llama with a byte tokenizer, saved as users save theirs."""
    from pertoken.testing import byte_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("model")
    tiny_model(seed=1).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
