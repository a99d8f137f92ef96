"""Shared prompts, gathered heads and chunks give what one plain padded forward gives."""

from dataclasses import replace

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from pertoken.batching import to_batch
from pertoken.errors import ModelError, NumericsError
from pertoken.policy import scoring
from pertoken.policy.model import Lora, Policy, ValueHead
from pertoken.sampling import Controls, Sampling, processed_logits
from pertoken.testing import byte_tokenizer, episode, family_model, tiny_model
from pertoken.types import Span


def ragged_batch():
    """Groups of unequal size, rows of unequal length, an observation inside a row, a one-token answer, none."""
    rows = [
        episode([1, 2, 3, 4], [5, 6, 7, 8, 9], id="a", group=0),
        episode([1, 2, 3, 4], [9, 8], id="b", group=0),
        episode([1, 2, 3, 4], [9], id="c", group=0, stop="length"),
        episode([4, 4], [1, 2, 3, 4, 5, 6, 7], id="d", group=1),
        episode([7, 7, 7], [], id="e", group=2),
        episode([4, 4], [2, 2, 2], id="f", group=1),
    ]
    tool = rows[3]
    mask = list(tool.action_mask)
    mask[4:6] = [False, False]
    spans = [Span(0, 2, "prompt", 0), Span(2, 4, "action", 1), Span(4, 6, "observation", 1), Span(6, 9, "action", 2)]
    rows[3] = replace(tool, action_mask=mask, spans=spans)
    return to_batch(rows, Controls())


def oracle(model, batch):
    """The textbook: one padded forward, log-softmax, shift."""
    logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits.float()
    logprobs = torch.zeros(batch.tokens.shape)
    entropy = torch.zeros(batch.tokens.shape)
    full = logits.log_softmax(-1)
    logprobs[:, 1:] = full[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    entropy[:, 1:] = -(full.exp() * full).sum(-1)[:, :-1]
    return torch.where(batch.action_mask, logprobs, 0.0), torch.where(batch.action_mask, entropy, 0.0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trap_11_logprobs_and_entropy_equal_the_plain_forward(kind, layout):
    model, batch = tiny_model(kind), ragged_batch()
    out = Policy(model, byte_tokenizer(), precision="float32", layout=layout).score(batch)
    logprobs, entropy = oracle(model, batch)
    torch.testing.assert_close(out.logprobs, logprobs.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.entropy, entropy.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_gradients_equal_the_plain_forward(layout, monkeypatch):
    monkeypatch.setattr(scoring, "ACTIONS_PER_CHUNK", 3)
    batch, weights = ragged_batch(), torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    reference, model = tiny_model(), tiny_model()
    (oracle(reference, batch)[0] * weights).sum().backward()
    policy = Policy(model, byte_tokenizer(), precision="float32", layout=layout)
    (policy.score(batch, grad=True).logprobs * weights).sum().backward()
    for (name, wanted), got in zip(reference.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, repetition_penalty=1.3)])
@pytest.mark.parametrize("lora", [None, Lora(rank=2)])
def test_the_kl_over_the_vocabulary_is_exact_and_so_is_its_gradient(monkeypatch, lora, sampling):
    monkeypatch.setattr(scoring, "ACTIONS_PER_CHUNK", 3)
    batch, weights = ragged_batch(), torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    batch = replace(batch, controls=Controls(sampling, ()))
    policy = Policy(tiny_model(), byte_tokenizer(), precision="float32", lora=lora)
    reference = policy.reference()
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    other = reference.score(batch, hidden=True)

    def processed(model):
        logits = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).logits
        rows = batch.action_mask.nonzero().tolist()
        generated = (batch.action_mask.cumsum(1) - 1)[batch.action_mask]
        history = scoring.histories(batch)
        z = processed_logits(torch.stack([logits[b, t - 1] for b, t in rows]), batch.controls, generated, history)
        return z.log_softmax(1)

    new = processed(policy.model)
    with reference._frozen(), torch.no_grad():
        old = processed(reference._model)
    wanted = (new.exp() * (new - old)).sum(1)
    parameters = list(policy.trainable().values())
    by_hand = torch.autograd.grad((wanted * weights[batch.action_mask]).sum(), parameters)
    got = policy.score(batch, grad=True, against=reference.against(other)).kl
    torch.testing.assert_close(got[batch.action_mask], wanted, atol=1e-5, rtol=1e-4)
    assert not got[~batch.action_mask].any()
    for a, b in zip(torch.autograd.grad((got * weights).sum(), parameters), by_hand, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    without = policy.score(batch, against=reference.against(other))
    torch.testing.assert_close(without.kl, got.detach())
    assert (policy.score(batch).kl, reference.score(batch).hidden) == (None, None)


def test_the_kl_over_kept_sets_counts_what_could_be_drawn():
    policy, batch = Policy(tiny_model(), byte_tokenizer(), precision="float32"), ragged_batch()
    keep = torch.zeros(batch.num_actions, 258, dtype=torch.bool)
    keep[torch.arange(len(keep)), batch.tokens[batch.action_mask]] = True
    support = torch.from_numpy(scoring.pack_support(keep))
    alone = replace(batch, controls=Controls(Sampling(top_k=1), ()), support=support)
    reference = policy.reference()
    kl = policy.score(alone, against=reference.against(reference.score(alone, hidden=True))).kl
    assert torch.equal(kl, torch.zeros_like(kl))


def test_a_pass_without_hidden_states_cannot_be_compared_with():
    policy, batch = Policy(tiny_model(), byte_tokenizer(), precision="float32"), ragged_batch()
    reference = policy.reference()
    with pytest.raises(ValueError, match="kept no hidden states"):
        reference.against(reference.score(batch))


def test_entropy_has_a_gradient_only_when_asked():
    policy = Policy(tiny_model(), byte_tokenizer(), precision="float32")
    assert not policy.score(ragged_batch(), grad=True).entropy.requires_grad
    batch, model = ragged_batch(), tiny_model()
    policy = Policy(model, byte_tokenizer(), precision="float32")
    policy.score(batch, grad=True, entropy_grad=True).entropy.sum().backward()
    twin = tiny_model()
    oracle(twin, batch)[1].sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, twin.lm_head.weight.grad, atol=1e-4, rtol=1e-3)


def test_values_speak_of_the_state_before_the_token_and_bootstrap_of_the_one_after_the_last():
    torch.manual_seed(0)
    head = ValueHead(32, detach_trunk=False)
    torch.nn.init.normal_(head.linear.weight)
    model, batch = tiny_model(), ragged_batch()
    hidden = model.model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long()).last_hidden_state
    values = head(hidden.flatten(0, 1)).view(batch.tokens.shape)
    lengths = batch.attention_mask.sum(1)
    wanted = torch.zeros(batch.tokens.shape)
    wanted[:, 1:] = torch.where(batch.action_mask[:, 1:], values[:, :-1], 0.0)
    for layout in ("packed", "padded"):
        out = Policy(model, byte_tokenizer(), precision="float32", value_head=head, layout=layout).score(batch)
        torch.testing.assert_close(out.values, wanted.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.bootstrap, values[range(6), lengths - 1].detach(), atol=1e-5, rtol=0)


def test_stopping_the_gradient_keeps_the_value_loss_off_the_trunk():
    for detach in (True, False):
        model, head = tiny_model(), ValueHead(32, detach_trunk=detach)
        torch.nn.init.ones_(head.linear.weight)
        policy = Policy(model, byte_tokenizer(), precision="float32", value_head=head)
        policy.score(ragged_batch(), grad=True).values.sum().backward()
        touched = any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert touched is not detach
        assert head.linear.weight.grad.abs().sum() > 0


def test_rows_do_not_depend_on_their_neighbours():
    policy, batch = Policy(tiny_model(), byte_tokenizer(), precision="float32"), ragged_batch()
    whole, order = policy.score(batch), torch.tensor([5, 0, 3, 1, 4, 2])
    torch.testing.assert_close(policy.score(batch.rows(order)).logprobs, whole.logprobs[order], atol=1e-5, rtol=0)
    for row in range(6):
        alone = policy.score(batch.rows(torch.tensor([row])))
        torch.testing.assert_close(alone.logprobs[0], whole.logprobs[row], atol=1e-5, rtol=0)


def test_trap_13_dropout_is_off_unless_asked_for():
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch = ragged_batch()
    policy = Policy(model, byte_tokenizer(), precision="float32")
    quiet = policy.score(batch)
    torch.testing.assert_close(policy.score(batch, grad=True).logprobs.detach(), quiet.logprobs, atol=1e-6, rtol=0)
    noisy = Policy(model, byte_tokenizer(), precision="float32", dropout=True)
    assert (noisy.score(batch, grad=True).logprobs.detach() - quiet.logprobs).abs().max() > 1e-3
    torch.testing.assert_close(noisy.score(batch).logprobs, quiet.logprobs)


def test_reference_stays_while_the_policy_moves():
    for lora in (None, Lora(rank=2)):
        model, batch = tiny_model(), ragged_batch()
        before = Policy(tiny_model(), byte_tokenizer(), precision="float32").score(batch).logprobs
        policy = Policy(model, byte_tokenizer(), precision="float32", lora=lora)
        reference = policy.reference()
        with torch.no_grad():
            for parameter in policy.trainable().values():
                parameter.add_(0.1)
        torch.testing.assert_close(reference.score(batch).logprobs, before, atol=1e-5, rtol=0)
        assert (policy.score(batch).logprobs - before).abs().max() > 1e-2


def test_the_reference_keeps_its_matrices_in_the_type_they_are_multiplied_in():
    policy, batch = Policy(tiny_model(), byte_tokenizer(), precision="bfloat16"), ragged_batch()
    reference = policy.reference()
    assert torch.equal(reference.score(batch).logprobs, policy.score(batch).logprobs)
    kept = {p.dtype for name, p in reference._copy.named_parameters() if "proj" in name}
    others = {p.dtype for name, p in reference._copy.named_parameters() if "norm" in name or "embed" in name}
    assert (kept, others) == ({torch.bfloat16}, {torch.float32})
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"precision": "bfloat16"}, {"lora": Lora(rank=2)}, {"lora": Lora(rank=2, dropout=0.5), "dropout": True}],
)
def test_recomputed_activations_give_the_same_gradient(layout, settings):
    batch = ragged_batch()
    settings = {"precision": "float32", "layout": layout} | settings

    def gradients(recompute):
        policy = Policy(tiny_model(), byte_tokenizer(), recompute_activations=recompute, **settings)
        runs = []
        layer = policy.hf_model.base_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        if settings.get("dropout"):
            torch.nn.init.ones_(next(p for name, p in policy.trainable().items() if "lora_B" in name))
        torch.manual_seed(0)
        policy.score(batch, grad=True).logprobs.sum().backward()
        assert (layer.training, layer.gradient_checkpointing) == (False, False)
        return len(runs), {name: p.grad for name, p in policy.trainable().items()}

    torch.manual_seed(0)
    once, kept = gradients(recompute=False)
    torch.manual_seed(0)
    twice, again = gradients(recompute=True)
    assert (once, twice) == (1, 2)
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-5)


def test_a_model_whose_layers_cannot_run_again_is_named(monkeypatch):
    monkeypatch.setattr("pertoken.policy.model.recomputable", lambda model: [])
    with pytest.raises(ModelError, match="recompute_activations: LlamaForCausalLM"):
        Policy(tiny_model(), byte_tokenizer(), precision="float32", recompute_activations=True)


def test_bfloat16_stays_near_float32():
    model, batch = tiny_model(), ragged_batch()
    exact = Policy(model, byte_tokenizer(), precision="float32").score(batch).logprobs
    near = Policy(model, byte_tokenizer(), precision="bfloat16").score(batch).logprobs
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.5


def test_a_head_that_is_not_understood_is_refused():
    model = tiny_model()
    plain = model.forward
    model.forward = lambda **inputs: _doubled(plain(**inputs))
    with pytest.raises(NumericsError, match="Its head does something"):
        scoring.find_layout(model)


def _doubled(output):
    output.logits = 2 * output.logits
    return output


def test_layout_is_measured_and_falls_back():
    model = tiny_model()
    assert scoring.find_layout(model) == "packed"
    alibi = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert scoring.find_layout(alibi) == "padded"  # distances between tokens are in a mask that it makes by itself


def test_an_even_number_of_rows_goes_through_the_products_and_changes_nothing(monkeypatch):
    """The tokens that fill up are a sequence of their own: nobody sees them, and no gradient comes from them."""
    found = []
    for even in (1, 16, 64):
        monkeypatch.setattr(scoring, "EVEN", even)
        policy = Policy(tiny_model(seed=2), byte_tokenizer(), precision="float32", layout="packed")
        batch = scoring.probe(policy.hf_model, [9, 7, 8], prompt=3, groups=[0, 0, 1])
        assert scoring._lay_out(batch, "packed").input_ids.shape[1] == -(-21 // even) * even
        logprobs = policy.score(batch, grad=True).logprobs
        logprobs.sum().backward()
        found.append([logprobs.detach(), *(p.grad for p in policy.trainable().values())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# --- attention of the last token ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "gpt_neox", "opt"])
def test_attention_of_the_last_token_is_what_the_plain_forward_returns(name):
    """Grouped heads, windows, an observation inside a row, one token, none; in parts and at once."""
    model, batch = family_model(name), ragged_batch()
    policy = Policy(model, byte_tokenizer(), precision="float32", tokens_per_pass=9)
    got = policy.last_attention(batch)
    own = model(input_ids=batch.tokens, attention_mask=batch.attention_mask.long(), output_attentions=True)
    rows, last = torch.arange(len(got)), batch.attention_mask.sum(1) - 1
    wanted = own.attentions[-1][rows, :, last].mean(1)  # family_model attends by `eager`
    torch.testing.assert_close(got, torch.where(batch.action_mask, wanted, 0.0).detach(), atol=1e-5, rtol=1e-4)
    assert (got.sum(1) > 0).tolist() == batch.action_mask.any(1).tolist()


def test_attention_that_cannot_be_looked_into_is_refused():
    policy = Policy(tiny_model(), byte_tokenizer(), precision="float32", layout="padded")
    with pytest.raises(ModelError, match="attends in a way of its own"):
        policy.last_attention(ragged_batch())
