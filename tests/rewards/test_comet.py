"""COMET in an environment of its own: what it is told and says, with a stand-in that has the interface of 2.2.7."""

import sys

import pytest

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, RewardError
from pertoken.rewards import Comet, Scene, Weighted, score
from pertoken.sampling import Controls
from pertoken.testing import byte_tokenizer, episode
from pertoken.types import Item

PACKAGE = """
import os
print("libraries say this and that")

class Prediction(dict):
    __getattr__ = dict.__getitem__

class Model:
    def __init__(self, path):
        self.path = path

    def predict(self, samples, batch_size=16, gpus=1, progress_bar=True):
        assert (batch_size, gpus, progress_bar) == (4, 0, False)
        print("predicting")
        if any(sample["mt"] == "die" for sample in samples):
            os._exit(3)
        if any("ref" not in sample for sample in samples):
            raise KeyError("ref")
        return Prediction(scores=[len(s["src"]) + len(s["mt"]) / 10 + (s["mt"] == s["ref"]) for s in samples])

def download_model(name):
    if name != "known":
        raise KeyError(f"Model '{name}' not supported by COMET.")
    return "path"

def load_from_checkpoint(path):
    return Model(path)
"""


@pytest.fixture
def environment(tmp_path, monkeypatch):
    (tmp_path / "comet").mkdir()
    (tmp_path / "comet" / "__init__.py").write_text(PACKAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return sys.executable


def scene_of(*said):
    tokenizer = byte_tokenizer()
    rows = [
        episode(tokenizer.encode("x"), [*tokenizer.encode(text), 256], id=str(k), group=k, item=item)
        for k, (text, item) in enumerate(said)
    ]
    return Scene(to_batch(rows, Controls()), rows, tokenizer)


ITEM = Item("a", "Translate: good day", "guten Tag", {"source": "good day"})


def test_a_score_of_each_translation_falls_on_its_last_token(environment):
    reward = Comet(environment, "known", batch=4)
    reward.warm_up()
    scene = scene_of(
        ("guten Tag", ITEM), ("gut", ITEM), ("gut", Item("b", "good", "gut", {"references": ["gute", "g"]}))
    )
    total = score([Weighted(reward, 1.0, "comet")], scene).total
    assert total.sum(1).tolist() == pytest.approx([8 + 0.9 + 1, 8.3, 4.3])
    assert (total != 0).sum(1).tolist() == [1, 1, 1]
    assert total[0].nonzero().item() == len(scene.episodes[0].tokens) - 1


def test_what_goes_wrong_there_is_told_here(environment):
    with pytest.raises(ConfigError, match=r"'unknown'.*not supported by COMET.*unbabel-comet"):
        Comet(environment, "unknown", batch=4).warm_up()
    with pytest.raises(ConfigError, match=r"comet.python: '/no/python' cannot be started"):
        Comet("/no/python", "known").warm_up()
    reward = Comet(environment, "known", batch=4)
    with pytest.raises(RewardError, match="KeyError: 'ref'"):
        reward(scene_of(("gut", Item("b", "good"))))
    with pytest.raises(RewardError, match="ended with code 3"):
        reward(scene_of(("die", ITEM)))
