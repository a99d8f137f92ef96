"""Before the first update the scored and the sampled probability of every token are the same."""

import pytest
import torch

from pertoken.batching import to_batch
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits
from pertoken.rollout.collect import to_episode
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.types import Item

CONTROLS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram": {"no_repeat_ngram": 2},
    "min_new_tokens": {"min_new_tokens": 10},
    "banned_words": {"banned_words": ("e", "th")},
    "stop": {"stop": ("a", "\u00e9")},
}
CONTROLS["all"] = {
    "temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
    "no_repeat_ngram": 3, "min_new_tokens": 4, "banned_words": ("x", "qu"), "stop": ("zz",),
}  # fmt: skip

PROMPTS = [[5, 9, 12, 9, 12, 7, 31, 40], [1, 2, 3], [8] * 9 + [1, 8]]
"""Of three lengths, so that prompts are padded on the left in prefill; one repeats itself."""


def rollout(model, controls, *, group_size=4, seed=0):
    tokenizer = byte_tokenizer()
    engine = NativeEngine(model, tokenizer, head_logits=head_logits)
    prompts = [p for p in PROMPTS for _ in range(group_size)]
    completions = engine.generate(prompts, controls, seeds=list(range(seed, seed + len(prompts))))
    return [
        to_episode(str(i), Item(str(i), "p"), i // group_size, prompts[i], c, version=0)
        for i, c in enumerate(completions)
    ]


def resolve(**settings):
    return Controls.resolve(Sampling(max_new_tokens=24, **settings), byte_tokenizer(), (256,))


def widened(batch, pad):
    """The batch with `pad` more columns of garbage on the right."""
    from dataclasses import replace

    def more(x, fill):
        return torch.nn.functional.pad(x, (0, pad), value=fill)

    return replace(
        batch, tokens=more(batch.tokens, 77), attention_mask=more(batch.attention_mask, False),
        action_mask=more(batch.action_mask, False), sample_logprobs=more(batch.sample_logprobs, 0.0),
        env_rewards=more(batch.env_rewards, 0.0), turn=more(batch.turn, 0),
        sample_entropy=more(batch.sample_entropy, 0.0),
    )  # fmt: skip


TRAPS = {
    "temperature": 14, "top_k": 15, "top_p": 15, "min_p": 15, "repetition_penalty": 16, "no_repeat_ngram": 16,
    "min_new_tokens": 16,
}  # fmt: skip
"""What each control is the trap of (docs/correctness.md)."""


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", pytest.param("gpt2", id="trap_12_absolute_positions")])
@pytest.mark.parametrize("name", CONTROLS, ids=lambda name: f"trap_{TRAPS[name]}_{name}" if name in TRAPS else name)
def test_ratio_is_one_before_the_first_update(name, kind, layout):
    controls, model = resolve(**CONTROLS[name]), tiny_model(kind)
    episodes = rollout(model, controls)
    policy = Policy(model, byte_tokenizer(), precision="float32", layout=layout, tokens_per_pass=130)
    for pad in (0, 1, 7):
        batch = widened(to_batch(episodes, controls), pad)
        gap = (policy.score(batch).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
        assert gap.max() < 1e-4, f"{gap.max():.2e} at padding {pad}"
        assert (batch.sample_logprobs[batch.action_mask] < 0).any()  # something was really drawn


def test_the_check_sees_each_control_that_is_left_out():
    """A control that only the sampler knows shows as a ratio other than 1: the test above can fail."""
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram", "min_new_tokens"):
        controls, model = resolve(**CONTROLS[name]), tiny_model()
        episodes = rollout(model, controls)
        policy = Policy(model, byte_tokenizer(), precision="float32")
        from dataclasses import replace

        batch = replace(to_batch(episodes, controls), controls=Controls(), support=None)
        gap = (policy.score(batch).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
        assert gap.max() > 1e-3, name


def test_truncated_distribution_keeps_its_gradient_after_an_update():
    """Kept sets are those of the rollout, so a token can leave the new policy's own nucleus without -inf."""
    controls, model = resolve(top_k=2), tiny_model()
    episodes = rollout(model, controls)
    policy = Policy(model, byte_tokenizer(), precision="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    out = policy.score(to_batch(episodes, controls), grad=True)
    assert out.logprobs.isfinite().all()
    out.logprobs.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
