"""Prefix deltas: hand numbers, and sums that equal the official libraries' scores."""

import pytest
import sacrebleu
import torch
from rouge_score.rouge_scorer import RougeScorer

from pertoken.rewards import Bleu, RougeL

HYPOTHESIS, REFERENCE = "the cat sat on mat", "the cat sat on the mat"
ROUGE_DELTAS = [0.285714285714, 0.214285714286, 0.166666666667, 0.133333333333, 0.109090909091]
BLEU_ADD1_DELTAS = [0.00673794699909, 0.128597336238, 0.232544157935, 0.238651218541, 0.0445819429517]


def word_ends(sample):
    """Index of the token that ends each word of a text written with single spaces."""
    text, ends = sample.text, sample.aligned.completed()
    return [k for k, end in enumerate(ends) if (end == len(text) or text[end] == " ") and ends[k - 1] != end]


@pytest.mark.parametrize("granularity", ["word", "token"])
@pytest.mark.parametrize(
    ("metric", "deltas"),
    [(RougeL, ROUGE_DELTAS), (lambda granularity: Bleu(granularity, smooth_method="add-k"), BLEU_ADD1_DELTAS)],
)
def test_each_word_earns_its_change_of_the_score(metric, deltas, granularity, make_episode, make_scene):
    scene = make_scene(make_episode(HYPOTHESIS, REFERENCE))
    values = metric(granularity=granularity)(scene)[0, 2:]
    until = values.cumsum(0)[word_ends(scene.samples[0])]
    torch.testing.assert_close(until, torch.tensor(deltas, dtype=torch.float64).cumsum(0), atol=1e-10, rtol=0)
    assert values[-1] == 0  # the end-of-sequence token writes nothing
