"""Log-probs, entropies and values of actions: the only place that knows how tokens lie in a forward pass.

Everyone else sees `[B, T]` tensors. In here the rows of a batch are laid out in one of three ways:

* `packed`: all tokens in one long row, the common prompt of a group once and each of its rows behind it, without
  padding but for a few idle tokens at the end (`attention.py`);
* `padded`: each row for itself, right-padded. The slow, obvious twin: the fallback for models whose attention
  cannot be packed, and the oracle in tests;
* `encoder_decoder`: the encoder reads each distinct prompt once, the decoder writes what follows it, each row for
  itself behind the ids that a decoder begins with. What is a prompt elsewhere is a source here, and nothing else
  changes: the cells of a row are those of its prompt and then those of its completion.

The language-model head runs on the hidden states that predict actions and on nothing else, and never makes
float32 logits of all of them (`head.py`). The shift from logits at `t-1` to token `t` is made here, once, in
`_lay_out`.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from pertoken.errors import ModelError, NumericsError
from pertoken.forward import decode, decoder_start, encode, own_logits, some_ids
from pertoken.policy.attention import last_layer, packed
from pertoken.policy.gradients import into_grad
from pertoken.policy.head import linear_logprobs
from pertoken.policy.layers import fused_rotation
from pertoken.policy.packs import Pack
from pertoken.policy.pointwise import Pointwise
from pertoken.sampling import NO_TOKEN, Controls, processed_logits
from pertoken.types import PolicyOutput, TokenBatch

Layout = Literal["packed", "padded", "encoder_decoder"]

ACTIONS_PER_CHUNK = 256
"""Head rows at once where sampling controls are rebuilt: 256 x 49k vocabulary x 4 bytes = 50 MB of logits."""

EVEN = 16
"""Matrix products get a multiple of so many rows: one or two rows left over at the end make them a fifth slower."""


@dataclass(frozen=True)
class Trunk:
    """What a scoring pass needs of a policy."""

    model: Any
    value_head: nn.Module | None
    autocast_dtype: torch.dtype | None
    layout: Layout
    recompute: bool = False
    """Keep each layer's input alone for the backward pass, and run the layer again there."""
    into_grad: bool = False
    """Let the backward pass add gradients of matrices straight to `.grad` (`gradients.py`)."""
    pointwise: Pointwise | None = None
    """Modules that run compiled (`pointwise.py`)."""


@dataclass(frozen=True)
class _Sources:
    """What the encoder of an encoder-decoder model reads: N prompts of at most L tokens."""

    input_ids: Int[Tensor, "N L"]
    mask: Bool[Tensor, "N L"]
    of_row: Int[Tensor, " R"]
    """Which of them the decoder's rows look at."""


@dataclass(frozen=True)
class _Rows:
    """A batch as the model will see it: R rows of width S, and where each action is predicted."""

    input_ids: Int[Tensor, "R S"]
    position_ids: Int[Tensor, "R S"]
    mask: Bool[Tensor, "R S"] | None
    """Which cells are tokens; None in the packed layout, where all are."""
    packs: tuple[Pack, ...]
    """How the tokens of the packed layout attend; () in the padded one."""
    predictors: Int[Tensor, " A"]
    """Flat index (into R * S) of the hidden state that predicts each action, in row-major order of the batch."""
    last: Int[Tensor, " B"]
    """Flat index of the hidden state after each row's last token."""
    cells: Int[Tensor, "B T"]
    """Flat index of each token; anything where there is none, or where it is read by an encoder."""
    sources: _Sources | None = None
    """Read by the encoder, where there is one."""


@dataclass(frozen=True)
class Against:
    """Another policy that the scored one is compared with over the whole vocabulary."""

    logits: Callable[[Float[Tensor, "A H"]], Float[Tensor, "A V"]]
    """Its head."""
    hidden: Float[Tensor, "B T H"]
    """Its hidden states, from a pass of its own (`hidden=True`)."""
    forward: bool = False
    """KL from the other policy to the scored one, in place of KL from the scored one to the other."""

    @classmethod
    def uniform(cls, batch: TokenBatch, vocab: int) -> "Against":
        """All `vocab` tokens alike: the KL from it is the mean over the vocabulary of -log p, less log `vocab`."""
        no_state = torch.zeros(*batch.tokens.shape, 1, device=batch.tokens.device)
        return cls(lambda hidden: hidden.new_zeros(len(hidden), vocab), no_state, forward=True)


def score_batch(
    trunk: Trunk,
    batch: TokenBatch,
    *,
    entropy_grad: bool = False,
    hidden: bool = False,
    against: Against | None = None,
) -> PolicyOutput:
    """Log-prob, entropy and value of every action of `batch`; 0 elsewhere. Gradients flow if enabled.

    Log-probs and entropies are those of the processed distribution of `batch.controls` (temperature,
    penalties, bans), restricted to the stored kept sets, as at sampling time. The entropy carries a gradient
    only with `entropy_grad`: it costs another pass over the vocabulary. `hidden` asks for the states behind them;
    with `against` comes the KL to that policy, of the same processed distributions.
    """
    rows = _rows(trunk, batch)
    device = batch.tokens.device.type
    with torch.autocast(device, dtype=trunk.autocast_dtype, enabled=trunk.autocast_dtype is not None):
        flat = _hidden_states(trunk, rows)
        at_actions = flat.index_select(0, rows.predictors)
        logprobs, entropy, *kl = _head(trunk, at_actions, batch, entropy_grad, against)
        values = bootstrap = None
        if trunk.value_head is not None:
            values = _to_cells(trunk.value_head(at_actions), batch)
            bootstrap = trunk.value_head(flat.index_select(0, rows.last))
    return PolicyOutput(
        _to_cells(logprobs, batch),
        _to_cells(entropy, batch),
        values,
        bootstrap,
        _to_cells(at_actions, batch) if hidden else None,
        _to_cells(kl[0], batch) if kl else None,
    )


@torch.no_grad()
def last_attention(trunk: Trunk, batch: TokenBatch) -> Float[Tensor, "B T"]:
    """How much the last token of each row attends to each of its actions in the last layer, 0 elsewhere; mean of heads.

    Of attention to the whole row, prompt included, which sums to 1. The packed pass never makes these numbers: they are
    computed beside it, for the one token. Raises ModelError for a model whose attention cannot be packed.
    """
    if trunk.layout != "packed":
        raise ModelError(f"{type(trunk.model).__name__} attends in a way of its own, which cannot be looked into here")
    rows = _lay_out(batch, "packed")
    kind = batch.tokens.device.type
    with (
        torch.autocast(kind, dtype=trunk.autocast_dtype, enabled=trunk.autocast_dtype is not None),
        last_layer() as seen,
    ):
        _hidden_states(trunk, rows)
    ((query, key, scaling, window),) = seen
    q, k = query[0, :, rows.last].float(), key[0, :, rows.cells].float()  # [Hq, B, D], [Hk, B, T, D]
    logits = torch.einsum("hgbd,hbtd->hgbt", q.view(len(k), -1, *q.shape[1:]), k) * scaling
    length, column = batch.attention_mask.sum(1, keepdim=True), torch.arange(logits.shape[-1], device=q.device)
    visible = batch.attention_mask & (column >= length - window) if window else batch.attention_mask
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1).mean((0, 1))
    return torch.where(batch.action_mask, weights, 0.0)


def _hidden_states(trunk: Trunk, rows: _Rows) -> Float[Tensor, "RS H"]:
    """Last hidden states of the trunk, row after row, without the head."""
    model, mask = trunk.model, {} if rows.packs else {"attention_mask": rows.mask}

    @contextlib.contextmanager
    def set_up() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if rows.packs:
                stack.enter_context(packed(model, rows.packs))
                stack.enter_context(fused_rotation(model))
            if trunk.pointwise is not None:
                stack.enter_context(trunk.pointwise.in_use())
            if trunk.into_grad:
                stack.enter_context(into_grad(model, trunk.autocast_dtype))
            yield

    again = trunk.recompute and torch.is_grad_enabled()
    with set_up(), _recomputed(model, set_up) if again else contextlib.nullcontext():
        states: Tensor
        if rows.sources is None:
            states = model.base_model(
                input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, return_dict=True, **mask
            ).last_hidden_state
        else:
            sources = rows.sources
            read = encode(model, sources.input_ids, sources.mask)[sources.of_row]
            states = decode(model, rows.input_ids, read, sources.mask[sources.of_row], use_cache=False, **mask)
    return states.flatten(0, 1)


def recomputable(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The layers whose activations need not be kept; [] for a model that does not use transformers' own layer class."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def _recomputed(model: nn.Module, set_up: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within it, each layer keeps its input alone; its second run, in the backward pass, is under `set_up()`.

    Transformers looks for this wish in the layer and in its training mode, and then makes the call that it is given.
    Both runs are made in the mode that the layer is in now, so that dropout is off, or the same, in both.
    """
    layers = recomputable(model)
    modes = [layer.training for layer in layers]

    def calls(layer: nn.Module, mode: bool) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *args: Any) -> Any:
            outside = layer.training
            layer.train(mode)
            try:
                return function(*args)
            finally:
                layer.train(outside)

        def again(function: Callable[..., Any], *args: Any) -> Any:
            contexts = (contextlib.nullcontext(), set_up())
            return checkpoint(partial(run, function), *args, use_reentrant=False, context_fn=lambda: contexts)

        return again

    for layer, mode in zip(layers, modes, strict=True):
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = calls(layer, mode)  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.gradient_checkpointing = False
            layer.train(mode)
            del layer._gradient_checkpointing_func


def head_logits(model: Any, hidden: Float[Tensor, "A H"]) -> Float[Tensor, "A V"]:
    """Logits of hidden states, with what some families put behind the head (scale, bias, soft cap)."""
    logits: Tensor = model.get_output_embeddings()(hidden) * _head_scale(model)
    bias, cap = _bias_behind_head(model), _soft_cap(model)
    logits = logits if bias is None else logits + bias
    return cap * torch.tanh(logits / cap) if cap else logits


def _head_scale(model: Any) -> float:
    """What a family multiplies the head's product by: Cohere multiplies, Granite divides, T5 scales what goes in."""
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return float(scale * config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else scale)


def _bias_behind_head(model: Any) -> Float[Tensor, " V"] | None:
    """What BART and those after it add to the logits; a constant."""
    bias: Tensor | None = getattr(model, "final_logits_bias", None)
    return None if bias is None else bias[0]


def _soft_cap(model: Any) -> float:
    """Gemma's bound of the logits; 0 without one."""
    return float(getattr(model.config.get_text_config(), "final_logit_softcapping", None) or 0.0)


def _to_cells(per_action: Float[Tensor, "A *more"], batch: TokenBatch) -> Float[Tensor, "B T *more"]:
    more = per_action.shape[1:]
    cells = torch.zeros(*batch.tokens.shape, *more, dtype=per_action.dtype, device=per_action.device)
    return cells.masked_scatter(batch.action_mask.view(*batch.tokens.shape, *[1] * len(more)), per_action)


# --- layouts ---------------------------------------------------------------------------------------------


def _rows(trunk: Trunk, batch: TokenBatch) -> _Rows:
    return _behind_sources(trunk.model, batch) if trunk.layout == "encoder_decoder" else _lay_out(batch, trunk.layout)


def _lay_out(batch: TokenBatch, layout: Layout) -> _Rows:
    row, column = batch.action_mask.nonzero(as_tuple=True)
    lengths = batch.attention_mask.sum(1)
    if layout == "packed":
        return _pack(batch, lengths, row, column)
    width, device = batch.tokens.shape[1], batch.tokens.device
    positions = torch.arange(width, device=device).expand_as(batch.tokens)
    cells = torch.arange(batch.tokens.numel(), device=device).view_as(batch.tokens)
    last = cells.gather(1, (lengths - 1).clamp_min(0)[:, None])[:, 0]
    return _Rows(batch.tokens, positions, batch.attention_mask, (), row * width + column - 1, last, cells)


def _pack(batch: TokenBatch, lengths: Tensor, row: Tensor, column: Tensor) -> _Rows:
    """One row for all: the prompt of each group once, then what is left of each of its rows."""
    tokens, device, sizes = batch.tokens.cpu(), batch.tokens.device, lengths.tolist()
    prefix = batch.prompt_lengths()
    ids, positions, packs = [], [], []
    # Column t of row b stands at cell prompt_at[b] + t inside the prompt, and at rest_at[b] + t behind it.
    prompt_at, rest_at = torch.zeros(2, len(sizes), dtype=torch.long)
    start = 0
    for members in batch.prompt_groups():
        prompt, end = prefix[members[0]], start + prefix[members[0]]
        ids.append(tokens[members[0], :prompt])
        positions.append(torch.arange(prompt))
        for b in members:
            ids.append(tokens[b, prompt : sizes[b]])
            positions.append(torch.arange(prompt, sizes[b]))
            prompt_at[b], rest_at[b] = start, end - prompt
            end += sizes[b] - prompt
        packs.append(Pack.of(start, prompt, [sizes[b] - prompt for b in members], device))
        start = end
    if idle := -start % EVEN:  # a sequence that no action looks at
        ids.append(torch.zeros(idle, dtype=tokens.dtype))
        positions.append(torch.arange(idle))
        packs.append(Pack.of(start, idle, [], device))
    prompt_at, rest_at, prefixes = prompt_at.to(device), rest_at.to(device), torch.tensor(prefix, device=device)

    def cell(b: Tensor, t: Tensor) -> Tensor:
        return torch.where(t < prefixes[b], prompt_at[b], rest_at[b]) + t

    everyone = torch.arange(len(sizes), device=device)
    return _Rows(
        torch.cat(ids)[None].to(device),
        torch.cat(positions)[None].to(device),
        None,
        tuple(packs),
        cell(row, column - 1),
        cell(everyone, (lengths - 1).clamp_min(0)),
        cell(everyone[:, None], torch.arange(tokens.shape[1], device=device)).clamp_max(start + idle - 1),
    )


def _behind_sources(model: Any, batch: TokenBatch) -> _Rows:
    """Each distinct prompt to the encoder; the rest of each row to the decoder, behind the ids that it begins with."""
    tokens, device = batch.tokens.cpu(), batch.tokens.device
    sizes, prompts, groups = batch.attention_mask.sum(1).tolist(), batch.prompt_lengths(), batch.prompt_groups()
    start = torch.tensor(decoder_start(model))
    of_row = torch.empty(len(sizes), dtype=torch.long)
    for place, members in enumerate(groups):
        of_row[members] = place
    read, mask = _side_by_side([tokens[members[0], : prompts[members[0]]] for members in groups], device)
    written, own = _side_by_side(
        [torch.cat([start, tokens[b, prompts[b] : sizes[b]]]) for b in range(len(sizes))], device
    )
    row, column = batch.action_mask.nonzero(as_tuple=True)
    width, everyone = written.shape[1], torch.arange(len(sizes), device=device)
    first = torch.tensor(prompts, device=device) - len(start)
    places = torch.arange(batch.tokens.shape[1], device=device) - first[:, None]
    return _Rows(
        written,
        torch.arange(width, device=device).expand_as(written),
        own,
        (),
        row * width + column - first[row] - 1,
        everyone * width + own.sum(1) - 1,
        everyone[:, None] * width + places.clamp(0, width - 1),
        _Sources(read, mask, of_row.to(device)),
    )


def _side_by_side(
    rows: Sequence[Int[Tensor, "_"]], device: torch.device
) -> tuple[Int[Tensor, "R S"], Bool[Tensor, "R S"]]:
    """Rows padded on the right, and where their own cells are."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), mask.to(device)


# --- head ------------------------------------------------------------------------------------------------


def _head(
    trunk: Trunk, hidden: Float[Tensor, "A H"], batch: TokenBatch, entropy_grad: bool, against: Against | None
) -> tuple[Float[Tensor, " A"], ...]:
    """Log-prob and entropy of each action under the processed distribution, and the KL `against` another policy."""
    model, controls = trunk.model, batch.controls
    targets = batch.tokens[batch.action_mask]
    if not len(targets):
        nothing = hidden.float().sum(1)
        return (nothing,) * (2 if against is None else 3)
    layer = model.get_output_embeddings()
    scale, bias = _head_scale(model), _bias_behind_head(model)
    plain = controls.only_temperature and type(layer) is nn.Linear and not _soft_cap(model)
    if plain and against is None and (bias is None or (scale == 1.0 and layer.bias is None)):
        dtype = trunk.autocast_dtype or layer.weight.dtype
        temperature = (controls.sampling.temperature or 1.0) / scale
        idle = -len(targets) % EVEN
        logprobs, entropy = linear_logprobs(
            pad(hidden.to(dtype), (0, 0, 0, idle)), layer.weight, layer.bias if bias is None else bias,
            pad(targets, (0, idle)),
            temperature=temperature, entropy_grad=entropy_grad, into_grad=trunk.into_grad,
        )  # fmt: skip
        return logprobs[: len(targets)], entropy[: len(targets)]
    return _head_in_chunks(model, hidden, targets, batch, entropy_grad, against)


def _head_in_chunks(
    model: Any,
    hidden: Float[Tensor, "A H"],
    targets: Int[Tensor, " A"],
    batch: TokenBatch,
    entropy_grad: bool,
    against: Against | None,
) -> tuple[Float[Tensor, " A"], ...]:
    """For any head and any controls: autograd chunk by chunk, logits computed again in the backward pass."""
    generated = num_generated(batch)
    history = histories(batch) if batch.controls.needs_history else None
    other = None if against is None else against.hidden[batch.action_mask]
    vocab = model.get_output_embeddings().weight.shape[0]
    found = []
    for at in torch.arange(len(targets), device=hidden.device).split(ACTIONS_PER_CHUNK):
        keep = None if batch.support is None else unpack_support(batch.support[at.to(batch.support.device)], vocab)
        inputs = (
            model,
            hidden[at],
            targets[at],
            generated[at],
            None if history is None else history[at],
            None if keep is None else keep.to(hidden.device),
            batch.controls,
            entropy_grad,
            None if against is None or other is None else partial(against.logits, other[at]),
            against is not None and against.forward,
        )
        needs_graph = torch.is_grad_enabled() and hidden.requires_grad
        found.append(checkpoint(_head_chunk, *inputs, use_reentrant=False) if needs_graph else _head_chunk(*inputs))
    return tuple(torch.cat(column) for column in zip(*found, strict=True))


def _head_chunk(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    generated: Tensor,
    history: Tensor | None,
    keep: Tensor | None,
    controls: Controls,
    entropy_grad: bool,
    other: Callable[[], Tensor] | None,
    forward: bool,
) -> tuple[Tensor, ...]:
    def log_softmax(logits: Tensor) -> Tensor:
        z = processed_logits(logits, controls, generated, history)
        return (z if keep is None else z.masked_fill(~keep, -torch.inf)).log_softmax(1)

    logp = log_softmax(head_logits(model, hidden))
    logprobs = logp.gather(1, targets[:, None]).squeeze(1)
    # Forbidden tokens have p = 0 and must not make 0 * -inf, nor -inf - -inf.
    possible = logp > -torch.inf
    probs, finite = logp.exp(), logp.masked_fill(~possible, 0.0)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        entropy = -(probs * finite).sum(1)
    if other is None:
        return logprobs, entropy
    with torch.no_grad():
        reference = log_softmax(other()).masked_fill(~possible, 0.0)
    if forward:
        return logprobs, entropy, (reference.exp() * possible * (reference - finite)).sum(1)
    return logprobs, entropy, (probs * (finite - reference)).sum(1)


def num_generated(batch: TokenBatch) -> Int[Tensor, " A"]:
    """How many tokens of its completion precede each action."""
    before = 0 if batch.whole is None else batch.whole.before[:, None]
    return (batch.action_mask.cumsum(1) - 1 + before)[batch.action_mask]


def histories(batch: TokenBatch) -> Int[Tensor, "A L"]:
    """Ids before each action, right-aligned."""
    row, column = batch.action_mask.nonzero(as_tuple=True)
    widest = int(column.max()) if len(column) else 0
    at = column[:, None] - torch.arange(widest, 0, -1, device=column.device)
    return torch.where(at >= 0, batch.tokens[row[:, None], at.clamp_min(0)], NO_TOKEN)


def pack_support(keep: Bool[Tensor, "A V"]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Kept sets as packed bits `[A, ceil(V / 8)]`."""
    return np.packbits(keep.cpu().numpy(), axis=1)


def unpack_support(packed: Tensor, vocab: int) -> Bool[Tensor, "A V"]:
    """The inverse of `pack_support`."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1, count=vocab)).bool()


# --- choosing the layout ---------------------------------------------------------------------------------


def find_layout(model: Any) -> Layout:
    """`packed` if this model gives the same log-probs with it as row by row, else `padded`; measured, not assumed.

    The probe is a batch of two groups with ragged rows of arbitrary tokens, in float32. The result row by row is
    itself compared with the model's own forward, which shows a head that `head_logits` does not know.
    """
    rows = probe(model, [9, 7, 8, 6], prompt=3, groups=[0, 0, 1, 1])
    plain: Layout = "encoder_decoder" if decoder_start(model) else "padded"
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            by_row = score_batch(Trunk(model, None, None, plain), rows).logprobs
            worst = (by_row - by_own_logits(model, rows)).abs().max().item()
            if not worst < 1e-3:
                raise NumericsError(
                    f"{type(model).__name__}: log-probs by hidden states and head are {worst:.3g} nats off those "
                    "of the model's own logits. Its head does something unknown here; please report the model."
                )
            if plain == "encoder_decoder":
                return plain
            try:
                in_one = score_batch(Trunk(model, None, None, "packed"), rows).logprobs
            except Exception:  # a model whose attention cannot be replaced may fail in any way
                return "padded"
            return "packed" if (in_one - by_row).abs().max().item() < 1e-3 else "padded"
    finally:
        model.train(mode)


def by_own_logits(model: Any, batch: TokenBatch) -> Float[Tensor, "B T"]:
    """Log-probs of the actions of `batch` by the model's own forward pass, row after row and without any padding.

    The oracle of the layouts: softmax(logits), whatever `batch.controls` say.
    """
    found = torch.zeros(batch.tokens.shape, device=batch.tokens.device)
    lengths, prompts = batch.attention_mask.sum(1).tolist(), batch.prompt_lengths()
    for b, (size, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        ids, rest = batch.tokens[b : b + 1, :size], batch.tokens[b, prompt:size]
        logprobs = own_logits(model, ids[:, :prompt], ids[:, prompt:])[0, : size - prompt].float().log_softmax(1)
        found[b, prompt:size] = logprobs.gather(1, rest[:, None])[:, 0]
    return torch.where(batch.action_mask, found, 0.0)


def probe(model: Any, lengths: Sequence[int], *, prompt: int, groups: Sequence[int]) -> TokenBatch:
    """Rows of arbitrary tokens, `lengths` of them; rows of one group begin with the same `prompt` tokens."""
    width, device = max(lengths), model.device
    column, rows = torch.arange(width), len(lengths)
    tokens = some_ids(model, rows * width).cpu().view(rows, width)
    tokens[:, :prompt] = tokens[[groups.index(g) for g in groups], :prompt]
    inside = column < torch.tensor(lengths)[:, None]
    zeros = torch.zeros(rows, width, device=device)
    return TokenBatch(
        tokens=torch.where(inside, tokens, 0).to(device),
        attention_mask=inside.to(device),
        action_mask=(inside & (column >= prompt)).to(device),
        sample_logprobs=zeros,
        env_rewards=zeros,
        turn=torch.zeros(rows, width, dtype=torch.long, device=device),
        group=torch.tensor(groups, device=device),
        terminated=torch.ones(rows, dtype=torch.bool, device=device),
        episode_ids=tuple(map(str, range(rows))),
    )
