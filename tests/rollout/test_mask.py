"""The mask policy: what it lets through, that nothing else is sampled, and that scoring knows the same distribution."""

import copy

import pytest
import torch

from pertoken.assembly import build_run
from pertoken.batching import to_batch
from pertoken.config import RunConfig
from pertoken.errors import ConfigError
from pertoken.policy.model import Policy
from pertoken.policy.scoring import head_logits, unpack_support
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.collect import to_episode
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Mask, Sampling, let_through
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.types import Item

PROMPTS = [[5, 9, 12, 7, 31, 40], [1, 2, 3], [8] * 9, [5, 9, 12, 7, 31, 40], [1, 2, 3]]
RULES = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.8},
    {"top_k": 3},
    {"min_p": 0.1},
    {"repetition_penalty": 1.3, "no_repeat_ngram": 2, "min_new_tokens": 6, "banned_words": ("e",)},
]


def engines(mask_model, model=None, **settings):
    tokenizer = byte_tokenizer()
    mask = NativeEngine(mask_model, tokenizer, head_logits=head_logits, **settings)
    return NativeEngine(model or tiny_model(), tokenizer, head_logits=head_logits, mask=mask, **settings), mask


def controls(mask, **sampling):
    resolved = Controls.resolve(Sampling(**{"max_new_tokens": 12, **sampling}), byte_tokenizer(), (256,))
    return Controls(resolved.sampling, resolved.eos_ids, resolved.banned_ids, mask)


def test_what_is_let_through_by_hand():
    z = torch.tensor([[0.5, 0.3, 0.15, 0.04, 0.01], [0.01, 0.04, 0.05, 0.1, 0.8]]).log()

    def found(**settings):
        return [row.nonzero()[:, 0].tolist() for row in let_through(z, Mask(**settings), (1,))]

    assert found(top_p=0.75) == [[0, 1], [1, 4]]
    assert found(top_p=0.85) == [[0, 1, 2], [1, 3, 4]]
    assert found(top_p=0.01) == [[0, 1], [1, 4]]
    assert found(top_p=0.01, least=3) == [[0, 1, 2], [1, 2, 3, 4]]
    assert found(top_p=0.01, least=99) == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("rows", [3, 64])
def test_kept_sets_are_those_of_the_other_model(rows):
    """Computed again by a plain forward of that model, whatever slots the rows stood in."""
    other = tiny_model(seed=7)
    engine, _ = engines(other, max_rows=rows)
    prompts = PROMPTS * 3
    found = engine.generate(prompts, controls(Mask(0.6), stop=tuple("abcdefghijklm")), seeds=range(len(prompts)))
    assert len({len(completion.tokens) for completion in found}) > 2, "rows leave the batch one after the other"
    refused = 0
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *completion.tokens]])
        logits = other(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        probs, order = logits.softmax(1).sort(dim=1, descending=True)
        before = probs.cumsum(1) - probs
        wanted = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order, before < 0.6)
        wanted[:, 256] = True
        kept = unpack_support(torch.from_numpy(completion.support), 258)
        assert torch.equal(kept, wanted)
        assert kept[torch.arange(len(kept)), completion.tokens].all()
        own = engine._model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        refused += int((~kept.gather(1, own.argmax(1, keepdim=True))).sum())
    assert refused, "the policy alone would have said something else"


@pytest.mark.parametrize("sampling", RULES, ids=lambda rules: "-".join(rules) or "plain")
def test_the_ratio_is_one_under_a_mask_beside_every_control(sampling):
    c, model = controls(Mask(0.6), **sampling), tiny_model()
    engine, _ = engines(tiny_model(seed=7), model)
    found = engine.generate(PROMPTS, c, seeds=range(5))
    episodes = [
        to_episode(str(k), Item(str(k), "p"), k, prompt, completion, 0)
        for k, (prompt, completion) in enumerate(zip(PROMPTS, found, strict=True))
    ]
    batch = to_batch(episodes, c)
    for layout in ("packed", "padded"):
        policy = Policy(model, byte_tokenizer(), precision="float32", layout=layout)
        gap = (policy.score(batch).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
        assert gap.max() < 1e-4
    without = to_batch(episodes, controls(None, **sampling | {"top_k": 0, "top_p": 1.0, "min_p": 0.0}))
    gap = (policy.score(without).logprobs - batch.sample_logprobs)[batch.action_mask].abs()
    assert gap.max() > 1e-2, "log-probs are those of the restricted distribution"


def test_a_mask_that_wants_the_end_alone_leaves_something_where_the_end_is_forbidden():
    other = tiny_model(seed=7)
    forward, bias = other.lm_head.forward, torch.zeros(258).index_fill(0, torch.tensor([256]), 50.0)
    other.lm_head.forward = lambda x: forward(x) + bias  # the logit of the end is far above all others
    engine, _ = engines(other)
    found = engine.generate(PROMPTS, controls(Mask(0.5), min_new_tokens=3), seeds=range(5))
    assert [len(completion.tokens) for completion in found] == [4] * 5
    assert {completion.stop for completion in found} == {"eos"}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_mask_keeps_its_weights_until_it_is_given_others(dtype):
    model = tiny_model()
    engine, mask = engines(copy.deepcopy(model), model, dtype=dtype)
    c = controls(Mask(1e-6), min_new_tokens=12)  # so narrow that the mask alone decides

    def sampled():
        return [completion.tokens for completion in engine.generate(PROMPTS, c, seeds=range(5))]

    first = sampled()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    weights = dict(model.named_parameters())
    engine.release()
    engine.load_weights(weights, version=1)
    assert sampled() == first
    mask.load_weights(weights, version=1)
    assert sampled() != first
    for name, cell in mask.parameters().items():
        assert torch.equal(cell, weights[name].to(cell.dtype))


def test_adapters_alone_are_copied(model_folder, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "data.jsonl").write_text("".join(f'{{"prompt": "say {k}"}}\n' for k in range(60)))
    built = build_run(
        RunConfig.model_validate({
            "policy": {"model": str(model_folder), "precision": "float32", "lora": {"rank": 2}},
            "task": {"path": str(tmp_path / "data.jsonl"), "answer": None},
            "rewards": [{"name": "length", "min_words": 3}],
            "rollout": {"mask": {}},
            "evaluation": {"items": 0},
        })
    )  # fmt: skip
    own, copied = dict(built.policy.model.named_parameters()), built.mask.parameters()
    assert own.keys() == copied.keys()
    for name, parameter in own.items():
        assert (copied[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
    assert {name for name in built.tensors() if name.startswith("mask/")} == {
        f"mask/{name}" for name in built.policy.trainable()
    }


def test_an_engine_that_has_no_mask_policy_refuses_to_go_without():
    model = tiny_model()
    with pytest.raises(ConfigError, match="this engine has no mask policy"):
        NativeEngine(model, byte_tokenizer(), head_logits=head_logits).generate(
            PROMPTS, controls(Mask(0.5)), seeds=range(5)
        )
    with pytest.raises(ConfigError, match=r"transformers\.generate asks one: set rollout\.engine=native"):
        TransformersEngine(model, byte_tokenizer(), context_length=128).generate(
            PROMPTS, controls(Mask(0.5)), seeds=range(5)
        )
