"""Rewards of one quantity, combined: by hand, cell by cell."""

import jaxtyping
import pytest
import torch

from pertoken.errors import ConfigError
from pertoken.rewards import NO_OPINION, Ensemble, Opinions, token_reward


@token_reward
def one(sample):
    return NO_OPINION if sample.reference == "silent" else [1.0] * len(sample.tokens)


@token_reward
def numbers(sample, *, by=1.0):
    return NO_OPINION if sample.reference in ("silent", "half") else [by * k for k in range(len(sample.tokens))]


HERE = __name__
TWO = [{"fn": f"{HERE}:one"}, {"fn": f"{HERE}:numbers", "weight": 0.5, "by": 2.0}]  # 1 1 1 and 0 1 2


@pytest.fixture
def values(make_episode, make_scene):
    """The cells of rows of 3 and 2 tokens."""

    def of(ensemble, *answers):
        rows = [make_episode([7] * n, answer, id=str(n)) for n, answer in zip((3, 2), answers, strict=True)]
        said = ensemble(make_scene(*rows))
        cells = said.values if isinstance(said, Opinions) else said
        silent = said.abstained.tolist() if isinstance(said, Opinions) else [False, False]
        return [cells[0, 2:5].tolist(), cells[1, 2:4].tolist()], silent

    return of


def test_the_least_of_each_completion_keeps_its_own_credit(values):
    assert values(Ensemble(TWO), "", "") == ([[1.0, 1.0, 1.0], [0.0, 1.0]], [False, False])  # 3 = 3, the first; 2 > 1
    assert values(Ensemble(TWO[::-1]), "", "")[0] == [[0.0, 1.0, 2.0], [0.0, 1.0]]


def test_mean_and_spread(values):
    assert values(Ensemble(TWO, "mean"), "", "")[0] == [[0.5, 1.0, 1.5], [0.5, 1.0]]
    spread = 0.5**0.5  # of 2 and 1
    found = values(Ensemble(TWO, "mean_less_spread", caution=2.0), "", "")[0]
    assert found[0] == [0.5, 1.0, 1.5]  # they agree on the sum
    assert found[1] == pytest.approx([0.5, 1.0 - 2.0 * spread])


@pytest.mark.parametrize("combine", ["least", "mean_less_spread", "mean"])
def test_members_that_abstain_are_left_out(combine, values):
    assert values(Ensemble(TWO, combine), "half", "silent") == ([[1.0, 1.0, 1.0], [0.0, 0.0]], [False, True])


@pytest.mark.parametrize("combine", ["least", "mean_less_spread", "mean"])
def test_order_and_size_of_the_batch_do_not_matter(combine, make_episode, make_scene):
    members = [{"name": "repetition", "n": 1}, {"name": "distinct", "weight": 2.0}, {"name": "length", "max_words": 2}]
    ensemble = Ensemble(members, combine)
    rows = [make_episode(text, id=text) for text in ("a cat a cat", "the", "", "a dog the dog the dog")]
    together = ensemble(make_scene(*rows))
    for k, row in enumerate(rows):
        alone = ensemble(make_scene(row))[0]
        assert torch.equal(alone, together[k, : len(alone)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"members": TWO[:1]}, "at least two rewards"),
        ({"members": {"name": "bleu"}}, "at least two rewards"),
        ({"members": [*TWO, {"weight": 1.0}]}, r"ensemble\.members\.2: expected a mapping with `name` or `fn`"),
        ({"members": [*TWO, {"name": "bleu", "weight": "much"}]}, r"members\.2\.weight: expected a number"),
        ({"members": [*TWO, {"name": "bleu", "colour": 1}]}, r"members\.2\.colour: bleu has no such field"),
        ({"members": [*TWO, {"name": "blue"}]}, "did you mean 'bleu'"),
        ({"members": TWO, "combine": "most"}, r"ensemble\.combine: unknown value 'most'"),
    ],
)
def test_settings_that_cannot_be(settings, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a run: the checker would refuse some first
    with pytest.raises(ConfigError, match=message):
        Ensemble(**settings)
