"""The processed distribution against Hugging Face's processors, and the draw against the distribution."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pertoken.sampling import Controls, Sampling, draw, keep_set, processed_logits

HISTORY = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]])


def logits():
    return 3 * torch.randn(2, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "processor"),
    [
        ({"repetition_penalty": 1.4}, RepetitionPenaltyLogitsProcessor(1.4)),
        ({"no_repeat_ngram": 2}, NoRepeatNGramLogitsProcessor(2)),
        ({"no_repeat_ngram": 1}, NoRepeatNGramLogitsProcessor(1)),
        ({"temperature": 0.6}, TemperatureLogitsWarper(0.6)),
        ({"top_k": 3}, TopKLogitsWarper(3)),
        ({"top_p": 0.7}, TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, MinPLogitsWarper(0.1)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_control_equals_hugging_face(settings, processor):
    controls, z = Controls(Sampling(**settings)), logits()
    got = processed_logits(z, controls, torch.tensor([3, 3]), HISTORY)
    keep = keep_set(got, controls.sampling)
    got = got if keep is None else got.masked_fill(~keep, -torch.inf)
    torch.testing.assert_close(got, processor(HISTORY, z.clone()))


def test_banned_sequences_equal_hugging_face():
    banned = ((4,), (5, 3, 7), (2, 8, 11), (9, 9))
    controls = Controls(Sampling(), banned_ids=banned)
    wanted = NoBadWordsLogitsProcessor([list(b) for b in banned], eos_token_id=torch.tensor([0]))(HISTORY, logits())
    torch.testing.assert_close(processed_logits(logits(), controls, torch.tensor([3, 3]), HISTORY), wanted)


def test_the_end_is_forbidden_until_the_least_length():
    controls = Controls(Sampling(min_new_tokens=4), eos_ids=(3, 7))
    z = processed_logits(logits(), controls, torch.tensor([3, 4]))
    assert torch.isneginf(z[0, [3, 7]]).all()
    assert z[1].isfinite().all()


def test_padding_of_the_history_is_no_token():
    controls = Controls(Sampling(repetition_penalty=1.5, no_repeat_ngram=2), banned_ids=((5, 3, 7),))
    wide = torch.cat([torch.full((2, 5), -1), HISTORY], 1)
    torch.testing.assert_close(
        processed_logits(logits(), controls, torch.tensor([3, 3]), wide),
        processed_logits(logits(), controls, torch.tensor([3, 3]), HISTORY),
    )


def test_controls_that_need_the_history_refuse_to_guess():
    with pytest.raises(ValueError, match="depend on the history"):
        processed_logits(logits(), Controls(Sampling(repetition_penalty=2.0)), torch.tensor([0, 0]))


def test_draws_follow_the_distribution_and_never_take_what_is_forbidden():
    logprobs = (2 * torch.randn(1, 700, generator=torch.Generator().manual_seed(1))).log_softmax(1)
    logprobs[0, 100:] = -torch.inf
    logprobs = logprobs.log_softmax(1)
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = torch.bincount(draw(logprobs.expand(len(uniform), -1), uniform), minlength=700) / len(uniform)
    assert seen[100:].sum() == 0
    assert (seen - logprobs.exp()[0]).abs().max() < 0.005


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_draws_at_the_edges(uniform):
    logprobs = torch.tensor([[-torch.inf, 0.5, -torch.inf, 0.5, -torch.inf]]).log_softmax(1)
    token = draw(logprobs, torch.tensor([uniform], dtype=torch.float64)).item()
    assert token == (1 if uniform < 0.5 else 3)
