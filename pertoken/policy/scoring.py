"""Log-probs, entropies and values of actions: the only place that knows how tokens lie in a forward pass.

Everyone else sees `[B, T]` tensors. In here the rows of a batch are laid out in one of two ways:

* `shared`: the rows of a group stand behind one copy of their common prompt, which is computed once:
  `[prompt | rest of row 1 | rest of row 2 | ...]`, with each row's own positions and a mask that lets a token
  see the prompt and its own row only;
* `padded`: each row for itself, right-padded. The slow, obvious twin: the fallback for models whose attention
  takes no such mask, and the oracle in tests.

The language-model head runs on the hidden states that predict actions and on nothing else, in chunks, so
logits of `[tokens, vocabulary]` never exist at once. The shift from logits at `t-1` to token `t` is made
here, once, in `_lay_out`.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pertoken.errors import NumericsError
from pertoken.sampling import NO_TOKEN, Controls, processed_logits
from pertoken.types import PolicyOutput, TokenBatch

Layout = Literal["shared", "padded"]

ACTIONS_PER_CHUNK = 256
"""Head rows at once: 256 x 49k vocabulary x 4 bytes = 50 MB of float32 logits."""


@dataclass(frozen=True)
class Trunk:
    """What a scoring pass needs of a policy."""

    model: Any
    value_head: nn.Module | None
    autocast_dtype: torch.dtype | None
    layout: Layout


@dataclass(frozen=True)
class _Rows:
    """A batch as the model will see it: R packed rows of width S, and where each action is predicted."""

    input_ids: Int[Tensor, "R S"]
    position_ids: Int[Tensor, "R S"]
    mask: Bool[Tensor, "R 1 S S"] | Bool[Tensor, "R S"]
    predictors: Int[Tensor, " A"]
    """Flat index (into R * S) of the hidden state that predicts each action, in row-major order of the batch."""
    last: Int[Tensor, " B"]
    """Flat index of the hidden state after each row's last token."""


def score_batch(trunk: Trunk, batch: TokenBatch, *, entropy_grad: bool = False) -> PolicyOutput:
    """Log-prob, entropy and value of every action of `batch`; 0 elsewhere. Gradients flow if enabled.

    Log-probs and entropies are those of the processed distribution of `batch.controls` (temperature,
    penalties, bans), restricted to the stored kept sets, as at sampling time. The entropy carries a gradient
    only with `entropy_grad`: it costs another pass over the vocabulary.
    """
    rows = _lay_out(batch, trunk.layout)
    device = batch.tokens.device.type
    with torch.autocast(device, dtype=trunk.autocast_dtype, enabled=trunk.autocast_dtype is not None):
        hidden = hidden_states(trunk.model, rows.input_ids, rows.position_ids, rows.mask)
        flat = hidden.flatten(0, 1)
        at_actions = flat.index_select(0, rows.predictors)
        logprobs, entropy = _head(trunk.model, at_actions, batch, entropy_grad)
        values = bootstrap = None
        if trunk.value_head is not None:
            values = _to_cells(trunk.value_head(at_actions), batch)
            bootstrap = trunk.value_head(flat.index_select(0, rows.last))
    return PolicyOutput(_to_cells(logprobs, batch), _to_cells(entropy, batch), values, bootstrap)


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, mask: Tensor) -> Float[Tensor, "R S H"]:
    """Last hidden states of the trunk, without the head."""
    output = model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=mask, use_cache=False, return_dict=True
    )
    states: Tensor = output.last_hidden_state
    return states


def head_logits(model: Any, hidden: Float[Tensor, "A H"]) -> Float[Tensor, "A V"]:
    """Logits of hidden states, with what some families put behind the head (soft cap, scale)."""
    logits: Tensor = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    if isinstance(scale, float):
        logits = logits * scale
    scaling = getattr(config, "logits_scaling", None)  # Granite
    if isinstance(scaling, float):
        logits = logits / scaling
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits


def _to_cells(per_action: Float[Tensor, " A"], batch: TokenBatch) -> Float[Tensor, "B T"]:
    cells = torch.zeros(batch.tokens.shape, dtype=per_action.dtype, device=per_action.device)
    return cells.masked_scatter(batch.action_mask, per_action)


# --- layouts ---------------------------------------------------------------------------------------------


def _lay_out(batch: TokenBatch, layout: Layout) -> _Rows:
    row, column = batch.action_mask.nonzero(as_tuple=True)
    lengths = batch.attention_mask.sum(1)
    if layout == "padded":
        width = batch.tokens.shape[1]
        positions = torch.arange(width, device=batch.tokens.device).expand_as(batch.tokens)
        start = torch.arange(len(lengths), device=batch.tokens.device) * width
        return _Rows(
            batch.tokens, positions, batch.attention_mask, row * width + column - 1, start + (lengths - 1).clamp_min(0)
        )
    return _share_prompts(batch, lengths, row, column)


def _share_prompts(batch: TokenBatch, lengths: Tensor, row: Tensor, column: Tensor) -> _Rows:
    """Each group as one packed row: its prompt once, then what is left of each of its rows."""
    tokens, device = batch.tokens.cpu(), batch.tokens.device
    prefix = _prefix_lengths(batch)
    sizes = lengths.tolist()
    packs: list[list[int]] = []  # the batch rows of each packed row; [0] is the one whose prompt is computed
    open_pack: dict[int, list[int]] = {}
    for b, group in enumerate(batch.group.tolist()):
        pack = open_pack.get(group)
        same = pack is not None and prefix[pack[0]] == prefix[b]
        if pack is not None and same and torch.equal(tokens[b, : prefix[b]], tokens[pack[0], : prefix[b]]):
            pack.append(b)
        else:
            open_pack[group] = [b]
            packs.append(open_pack[group])
    width = max(prefix[p[0]] + sum(sizes[b] - prefix[b] for b in p) for p in packs)

    ids = torch.zeros(len(packs), width, dtype=tokens.dtype)
    positions = torch.zeros(len(packs), width, dtype=torch.long)
    segment = torch.full((len(packs), width), -1)  # -1 padding, 0 prompt, 1.. the rows of the pack
    offset = torch.zeros(len(sizes), dtype=torch.long)  # flat cell of column 0 of row b, as if its prompt stood there
    prompt_at = torch.zeros(len(sizes), dtype=torch.long)
    for r, pack in enumerate(packs):
        end = prefix[pack[0]]
        ids[r, :end] = tokens[pack[0], :end]
        positions[r, :end] = torch.arange(end)
        segment[r, :end] = 0
        for k, b in enumerate(pack, start=1):
            size = sizes[b] - prefix[b]
            ids[r, end : end + size] = tokens[b, prefix[b] : sizes[b]]
            positions[r, end : end + size] = torch.arange(prefix[b], sizes[b])
            segment[r, end : end + size] = k
            offset[b] = r * width + end - prefix[b]
            prompt_at[b] = r * width
            end += size

    before = torch.arange(width)[:, None] >= torch.arange(width)[None, :]
    query, key = segment[:, :, None], segment[:, None, :]
    # Padding queries see the prompt too: a row of the mask with nothing in it would make the softmax NaN.
    mask = before & (key >= 0) & ((key == 0) | (query == key))

    offset, prompt_at = offset.to(device), prompt_at.to(device)
    prefixes = torch.tensor(prefix, device=device)

    def cell(b: Tensor, t: Tensor) -> Tensor:
        return torch.where(t < prefixes[b], prompt_at[b], offset[b]) + t

    everyone = torch.arange(len(sizes), device=device)
    return _Rows(
        ids.to(device),
        positions.to(device),
        mask[:, None].to(device),
        cell(row, column - 1),
        cell(everyone, (lengths - 1).clamp_min(0)),
    )


def _prefix_lengths(batch: TokenBatch) -> list[int]:
    """Tokens before each row's first action; rows without actions are all prefix."""
    has_action = batch.action_mask.any(1)
    first = batch.action_mask.int().argmax(1)
    return torch.where(has_action, first, batch.attention_mask.sum(1)).tolist()


# --- head ------------------------------------------------------------------------------------------------


def _head(
    model: Any, hidden: Float[Tensor, "A H"], batch: TokenBatch, entropy_grad: bool
) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
    """Log-prob and entropy of each action, chunk by chunk; logits are recomputed in the backward pass."""
    targets = batch.tokens[batch.action_mask]
    generated = (batch.action_mask.cumsum(1) - 1)[batch.action_mask]
    history = _histories(batch) if batch.controls.needs_history else None
    vocab = model.get_output_embeddings().weight.shape[0]
    logprobs, entropies = [], []
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
        )
        needs_graph = torch.is_grad_enabled() and hidden.requires_grad
        chunk = checkpoint(_head_chunk, *inputs, use_reentrant=False) if needs_graph else _head_chunk(*inputs)
        logprobs.append(chunk[0])
        entropies.append(chunk[1])
    if not logprobs:
        nothing = hidden.float().sum(1)
        return nothing, nothing
    return torch.cat(logprobs), torch.cat(entropies)


def _head_chunk(
    model: Any,
    hidden: Tensor,
    targets: Tensor,
    generated: Tensor,
    history: Tensor | None,
    keep: Tensor | None,
    controls: Controls,
    entropy_grad: bool,
) -> tuple[Tensor, Tensor]:
    z = processed_logits(head_logits(model, hidden), controls, generated, history)
    if keep is not None:
        z = z.masked_fill(~keep, -torch.inf)
    total = z.logsumexp(1)
    logprobs = z.gather(1, targets[:, None]).squeeze(1) - total
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        # H = logsumexp(z) - sum_v p_v z_v; forbidden tokens have p = 0 and must not make 0 * -inf
        probs = (z - total[:, None]).exp()
        entropy = total - (probs * z.masked_fill(z == -torch.inf, 0.0)).sum(1)
    return logprobs, entropy


def _histories(batch: TokenBatch) -> Int[Tensor, "A L"]:
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
    """`shared` if this model gives the same log-probs with it as row by row, else `padded`; measured, not assumed.

    The probe is a batch of two groups with ragged rows of arbitrary tokens, in float32. The padded result is
    itself compared with the model's own forward, which shows a head that `head_logits` does not know.
    """
    probe = _probe(model)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            padded = score_batch(Trunk(model, None, None, "padded"), probe).logprobs
            own = model(input_ids=probe.tokens, attention_mask=probe.attention_mask, use_cache=False).logits.float()
            oracle = own[:, :-1].log_softmax(-1).gather(2, probe.tokens[:, 1:, None]).squeeze(2)
            oracle = oracle.masked_fill(~probe.action_mask[:, 1:], 0.0)
            worst = (padded[:, 1:] - oracle).abs().max().item()
            if not worst < 1e-3:
                raise NumericsError(
                    f"{type(model).__name__}: log-probs by hidden states and head are {worst:.3g} nats off those "
                    "of the model's own logits. Its head does something unknown here; please report the model."
                )
            try:
                shared = score_batch(Trunk(model, None, None, "shared"), probe).logprobs
            except Exception:  # a model that takes no 4-dimensional mask may fail in any way
                return "padded"
            return "shared" if (shared - padded).abs().max().item() < 1e-3 else "padded"
    finally:
        model.train(mode)


def _probe(model: Any) -> TokenBatch:
    vocab = model.get_output_embeddings().weight.shape[0]
    lengths = torch.tensor([9, 7, 8, 6])
    column = torch.arange(9)
    tokens = (torch.arange(36).reshape(4, 9) * 7 + 3) % vocab
    tokens[1, :3], tokens[3, :3] = tokens[0, :3], tokens[2, :3]
    inside = column < lengths[:, None]
    actions = inside & (column >= 3)
    zeros = torch.zeros(4, 9)
    device = model.device
    return TokenBatch(
        tokens=torch.where(inside, tokens, 0).to(device),
        attention_mask=inside.to(device),
        action_mask=actions.to(device),
        sample_logprobs=zeros.to(device),
        env_rewards=zeros.to(device),
        turn=torch.zeros(4, 9, dtype=torch.long, device=device),
        group=torch.tensor([0, 0, 1, 1], device=device),
        terminated=torch.ones(4, dtype=torch.bool, device=device),
        episode_ids=("a", "b", "c", "d"),
    )
