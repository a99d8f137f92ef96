"""Compiled operators, and gradients added up where they stay, against autograd through plain torch."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from pertoken import native
from pertoken.policy import attention, compiled, layers
from pertoken.policy import gradients as in_place
from pertoken.policy.gradients import ROWS_AT_ONCE, add_product, into_grad, linear
from pertoken.policy.layers import FusedGatedMLP, FusedNorm, fuse_layers, fused_rotation
from pertoken.policy.model import Lora, Policy
from pertoken.policy.packs import Pack
from pertoken.testing import FAMILIES, byte_tokenizer, family_model, tiny_model
from tests.policy.test_families import ragged

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler here")
needs_products = pytest.mark.skipif(not native.attends(torch.float32), reason="oneDNN lacks the products of attention")


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def same_with_gradients(got, wanted, inputs, *, atol=1e-5):
    torch.testing.assert_close(got, wanted, atol=atol, rtol=1e-4)
    by = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9))
    one = torch.autograd.grad((got.float() * by).sum(), inputs)
    other = torch.autograd.grad((wanted.float() * by).sum(), inputs)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=1e-3)


def plain_norm(x, weight, eps):
    return weight * x.float() / (x.float().pow(2).mean(-1, keepdim=True) + eps).sqrt()


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 7, 33), (3, 2, 5, 16), (1, 1)])
def test_norm(shape):
    x, weight = draw(*shape), draw(shape[-1], seed=1)
    same_with_gradients(compiled.rms_norm(x, weight, 1e-5, torch.float32), plain_norm(x, weight, 1e-5), (x, weight))


@needs_compiler
def test_norm_rounds_its_result_once():
    x, weight = draw(1, 70, 96), draw(96, seed=1)
    got = compiled.rms_norm(x, weight, 1e-5, torch.bfloat16)
    assert got.dtype is torch.bfloat16
    wanted = plain_norm(x, weight, 1e-5)
    assert ((got.float() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-6).all()


@needs_compiler
def test_gated_activation():
    gate, up = draw(1, 9, 37), draw(1, 9, 37, seed=1)
    with torch.no_grad():
        gate *= 5
    same_with_gradients(compiled.gated_silu(gate, up), nn.functional.silu(gate) * up, (gate, up))


@needs_compiler
@pytest.mark.parametrize("x", [0.0, -1.0, 1.0, 50.0, -50.0, -86.9, -200.0, 87.9])
def test_the_exponential(x):
    """silu(x) / x is the sigmoid, whose numbers are known at every size."""
    got = compiled.gated_silu(torch.tensor([x or 1e-30]), torch.ones(1)).double() / (x or 1e-30)
    wanted = 1 / (1 + torch.tensor([-x]).double().exp())
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=2e-38)


@needs_compiler
@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(lost):
    """A loss must not look sound because a compiled loop took NaN for a number."""
    assert compiled.gated_silu(torch.tensor([lost]), torch.tensor([float("nan")])).isnan().all()
    assert compiled.rms_norm(torch.tensor([[lost, 1.0]]), torch.ones(2), 1e-5, torch.bfloat16).isnan().any()
    logits = torch.tensor([[0.0, lost, 1.0]])
    assert torch.ops.pertoken.softmax_at(logits, torch.tensor([0]), 1.0)[0].isnan().all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(dtype):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, angles = draw(1, 3, 5, 8, dtype=dtype), torch.rand(1, 5, 4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    wanted = apply_rotary_pos_emb(q, q, cos, sin)[0]
    got = compiled.rotate(q, cos, sin)
    assert got.dtype is wanted.dtype is torch.float32
    same_with_gradients(got, wanted, (q,), atol=1e-5 if dtype is torch.float32 else 0.02)


PACKS = (
    Pack.of(0, 5, [3, 0, 4, 2], torch.device("cpu")),
    Pack.of(14, 3, [6], torch.device("cpu")),
    Pack.of(23, 4, [1, 1], torch.device("cpu")),
    Pack.of(29, 2, [], torch.device("cpu")),
)


LONG = (
    Pack.of(0, 70, [150, 1, 64, 65], torch.device("cpu")),
    Pack.of(350, 64, [3, 128], torch.device("cpu")),
    Pack.of(545, 2, [200], torch.device("cpu")),
)
"""Prompts and rows of several tiles, full ones and others."""


def attended(packs, q, k, v, window):
    token = attention._packs.set(packs)
    try:
        return attention.packed_attention(nn.Module(), q, k, v, None, sliding_window=window, scaling=0.3)[0]
    finally:
        attention._packs.reset(token)


@needs_products
@pytest.mark.parametrize(("packs", "tokens"), [(PACKS, 31), (LONG, 747)])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize(("heads", "width"), [((2, 2), 64), ((6, 2), 8), ((4, 1), 7)])
def test_attention(packs, tokens, heads, width, window, monkeypatch):
    """Groups of unequal size, rows of unequal length, one row, none, rows of one token."""
    q, k, v = (draw(1, h, tokens, width, seed=s) for s, h in enumerate((heads[0], heads[1], heads[1])))
    got = attended(packs, q, k, v, window)
    monkeypatch.setattr(native, "takes", lambda *tensors: False)
    same_with_gradients(got, attended(packs, q, k, v, window), (q, k, v), atol=2e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_attention_in_bfloat16_is_off_by_its_rounding(threads, monkeypatch):
    """Sums are float32: the error of a token does not grow with the number of those that it sees."""
    exact = [draw(1, h, 747, 64, seed=s) for s, h in enumerate((9, 3, 3))]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    by = torch.randn(1, 747, 9, 64, generator=torch.Generator().manual_seed(9))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = attended(LONG, *rounded, None)
        found = [got, *torch.autograd.grad((got.float() * by).sum(), rounded)]
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(native, "takes", lambda *tensors: False)
    wanted = attended(LONG, *exact, None)
    for a, b in zip(found, [wanted, *torch.autograd.grad((wanted * by).sum(), exact)], strict=True):
        assert a.dtype is torch.bfloat16
        assert (a.float() - b).norm() < 0.01 * b.norm()


@needs_compiler
def test_under_autocast_a_rotation_has_the_type_of_the_products():
    q, angles = draw(1, 3, 5, 8, dtype=torch.bfloat16), torch.rand(1, 5, 4).repeat(1, 1, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled.rotate(q, angles.cos(), angles.sin()).dtype is torch.bfloat16


@needs_compiler
def test_a_second_derivative_is_refused_not_wrong():
    x, weight = draw(1, 3, 4), draw(4, seed=1)
    loss = compiled.rms_norm(x, weight, 1e-5, torch.float32).square().sum()
    first = torch.autograd.grad(loss, x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# --- which layers ---------------------------------------------------------------------------------------------


@needs_compiler
def test_layers_are_taken_for_what_they_compute():
    """Gemma's norms add 1 to their weight, and its MLP has another activation: both stay as they are."""
    counts = {name: fuse_layers(family_model(name)) for name in FAMILIES}
    assert (
        counts["llama"] == counts["mistral"] == counts["qwen2"] == 7
    )  # two layers: two norms and an MLP; the last norm
    assert counts["qwen3"] == 11  # and norms of queries and keys
    assert counts["gemma"] == counts["gemma2"] == counts["gemma3"] == counts["gpt2"] == counts["opt"] == 0


@needs_compiler
def test_a_norm_that_only_has_the_name_stays():
    class ShiftedRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return (x - x.mean(-1, keepdim=True)) * self.weight

    model = nn.Sequential(ShiftedRMSNorm())
    assert fuse_layers(model) == 0
    assert type(model[0]) is ShiftedRMSNorm


@needs_compiler
def test_a_fused_model_is_saved_copied_and_fused_again(tmp_path):
    model = family_model("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    count = fuse_layers(model)
    assert fuse_layers(model) == count
    assert fuse_layers(copy.deepcopy(model)) == count
    assert sum(isinstance(m, FusedNorm | FusedGatedMLP) for m in model.modules()) == count
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


@needs_compiler
def test_types_that_are_not_compiled_go_the_own_way():
    model = family_model("llama").double()
    ids = torch.tensor([[1, 2, 3]])
    wanted = model(ids).logits
    fuse_layers(model)
    assert torch.equal(model(ids).logits, wanted)


@needs_compiler
def test_a_family_s_rotation_comes_back():
    from transformers.models.llama import modeling_llama

    own = modeling_llama.apply_rotary_pos_emb

    def fail():
        with fused_rotation(family_model("llama")):
            assert modeling_llama.apply_rotary_pos_emb is not own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modeling_llama.apply_rotary_pos_emb is own


def test_without_a_compiler_all_goes_on(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    model = family_model("llama")
    assert fuse_layers(model) == 0
    assert not native.takes(torch.ones(1))
    with fused_rotation(model):
        policy = Policy(model, byte_tokenizer(), precision="float32")
    policy.score(ragged(), grad=True, into_grad=True).logprobs.sum().backward()
    assert policy.layout == "packed"
    assert layers.fuse_layers(model) == 0


@pytest.mark.parametrize("missing", ["compiler", "failure"])
def test_code_that_cannot_be_built_is_done_without(missing, monkeypatch, tmp_path):
    native.available.cache_clear()
    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None if missing == "compiler" else "/bin/false")
    try:
        assert not native.available()
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.available.cache_clear()


def test_processes_that_begin_together_build_once(monkeypatch, tmp_path):
    built = []

    def build(compiler, target):
        time.sleep(0.05)
        built.append(target)
        target.touch()

    monkeypatch.setenv("PERTOKEN_CACHE", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: "/bin/true")
    monkeypatch.setattr(native, "_build", build)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: native.available.__wrapped__(), range(4))) == [True] * 4
    assert len(built) == 1


def test_what_a_killed_compiler_left_goes_with_the_next_one(monkeypatch, tmp_path):
    target = tmp_path / "pertoken-1.so"
    for name in ("pertoken-1-killed", "pertoken-2-building"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "products.o").touch()

    def run(*commands):
        Path(commands[-1][-1]).touch()

    monkeypatch.setattr(native, "_run", run)
    native._build("c++", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pertoken-1.so", "pertoken-2-building"]


# --- gradients that are added up in place -----------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN has no choice")
@pytest.mark.parametrize("maker", ["GenuineIntel", "AuthenticAMD", ""])
def test_products_in_float32_are_made_by_what_is_faster_on_the_processor(maker, monkeypatch):
    monkeypatch.setattr(native, "vendor", lambda: maker)
    in_place._takes_onednn.cache_clear()
    try:
        assert in_place._takes_onednn() is not (maker == "GenuineIntel" and torch.backends.mkl.is_available())
        with torch.no_grad():
            x, weight, bias = draw(2, 9, 24), draw(40, 24, seed=1), draw(40, seed=2)
            torch.testing.assert_close(linear(x, weight, bias), torch.einsum("bsi,oi->bso", x, weight) + bias)
            torch.testing.assert_close(linear(x, weight.T.contiguous().T), torch.einsum("bsi,oi->bso", x, weight))
    finally:
        in_place._takes_onednn.cache_clear()


def gradients(policy, batch, by, *, into_grad, halves=False):
    policy.model.zero_grad()
    parts = [torch.arange(0, 3), torch.arange(3, 6)] if halves else [torch.arange(6)]
    for rows in parts:
        out = policy.score(batch.rows(rows), grad=True, into_grad=into_grad)
        (out.logprobs * by[rows]).sum().backward()
    return {name: p.grad.clone() for name, p in policy.trainable().items() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *product(("llama", "qwen2", "opt", "gpt2"), ({}, {"recompute_activations": True}, {"layout": "padded"})),
        ("llama", {"lora": Lora(rank=4)}),
    ],
)
def test_in_place_they_are_what_autograd_hands_over(name, settings):
    """Tied matrices, biases, an embedding with a padding row; in one micro-batch and in two."""
    model, batch = family_model(name), ragged()
    by = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    policy = Policy(model, byte_tokenizer(), precision="float32", **settings)
    for parameter in policy.trainable().values():
        if not parameter.any():  # LoRA begins at 0, where half of its gradient is 0
            nn.init.normal_(parameter)
    wanted = gradients(policy, batch, by, into_grad=False)
    for halves in (False, True):
        got = gradients(policy, batch, by, into_grad=True, halves=halves)
        assert got.keys() == wanted.keys()
        for key, gradient in wanted.items():
            torch.testing.assert_close(got[key], gradient, atol=2e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_pass_has_the_weights_of_now(precision):
    """Whatever a pass might keep of the weights may not outlive a step; fused optimisers tell torch of none."""
    policy = Policy(tiny_model(), byte_tokenizer(), precision=precision)
    for _ in range(2):
        got = policy.score(ragged(), grad=True, into_grad=True).logprobs
        assert torch.equal(got, policy.score(ragged(), grad=True).logprobs)
        for parameter in policy.trainable().values():
            parameter.data.mul_(1.5)  # as a fused optimiser: the tensor's version stays


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_sweep_makes_again_is_not_kept(dtype):
    """Neither normed nor gated inputs, nor weights in the type of the products; and gradients are as if they were."""
    x, weight = draw(1, 6, 32), draw(32, seed=1)
    matrices = nn.ModuleList([nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False), nn.Linear(48, 8)])
    kept = []

    def out():
        normed = compiled.rms_norm(x, weight, 1e-5, dtype)
        return matrices[2](compiled.gated_silu(matrices[0](normed), matrices[1](normed)))

    with torch.autocast("cpu", dtype=dtype, enabled=dtype is torch.bfloat16):
        wanted = torch.autograd.grad(out().float().sum(), [x, weight, *matrices.parameters()])
        watch = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with into_grad(matrices, dtype), watch:
            got = out()
    got.float().sum().backward()
    expected = (6 * 32, 32, 6, 6 * 48)  # the norm's input, weight and factors; gate and up
    assert {t.numel() for t in kept} == set(expected)
    assert not any(t.dtype is torch.bfloat16 and t.numel() == 6 * 32 for t in kept)
    for parameter, gradient in zip([x, weight, *matrices.parameters()], wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4)


@needs_compiler
def test_what_was_changed_in_place_has_no_origin_any_more():
    out = compiled.gated_silu(draw(2, 8), draw(2, 8, seed=1))
    assert torch.equal(compiled.Origin.of(out).function(*compiled.Origin.of(out).tensors), out)
    out.mul_(2)
    assert compiled.Origin.of(out) is None
    with torch.inference_mode():  # where no version is counted
        bare = compiled.gated_silu(draw(2, 8), draw(2, 8, seed=1))
        assert compiled.Origin.of(bare) is None


def test_in_bfloat16_they_are_added_up_in_float32():
    model, batch = tiny_model(), ragged()
    by = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    policy = Policy(model, byte_tokenizer(), precision="bfloat16")
    wanted, got = (gradients(policy, batch, by, into_grad=way, halves=True) for way in (False, True))
    for key, gradient in wanted.items():
        assert got[key].dtype is torch.float32
        similarity = nn.functional.cosine_similarity(got[key].flatten(), gradient.flatten(), dim=0)
        assert similarity > 0.999, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_to_what_is_there(dtype):
    parameter = nn.Parameter(torch.zeros(3, 2))
    left, right = torch.eye(3, dtype=dtype), torch.arange(6.0).view(3, 2).to(dtype)
    for times in (1, 2):
        add_product(parameter, left, right)
        assert torch.equal(parameter.grad, times * right.float())
        assert parameter.grad.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_many_rows_is_added_whole(dtype):
    parameter = nn.Parameter(torch.zeros(2 * ROWS_AT_ONCE + 5, 3))
    left, right = draw(len(parameter), 4, dtype=dtype).detach(), draw(4, 3, dtype=dtype).detach()
    add_product(parameter, left, right)
    assert torch.equal(parameter.grad, (left @ right).float())
