"""Ragged episodes to padded tensors, and batches to minibatches with their global denominators."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pertoken.sampling import Controls
from pertoken.types import Credit, Episode, PolicyOutput, TokenBatch


def to_batch(episodes: Sequence[Episode], controls: Controls, *, pad_id: int = 0, device: str = "cpu") -> TokenBatch:
    """Episodes as right-padded tensors. Masks come from lengths and roles; token ids are never searched."""
    width = max(len(e.tokens) for e in episodes)

    def padded(rows: Sequence[Sequence[int] | Sequence[float]], fill: int | float, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=dtype, device=device)

    turns = [[0] * len(e.tokens) for e in episodes]
    for row, episode in zip(turns, episodes, strict=True):
        for span in episode.spans:
            row[span.start : span.stop] = [span.turn] * (span.stop - span.start)
    support = None
    if controls.truncates and not controls.sampling.greedy:
        kept = [e.support for e in episodes if any(e.action_mask)]
        if any(k is None for k in kept):
            raise ValueError(
                "top-k, top-p, min-p or a mask policy is on, but an episode brings no kept sets, so the distribution "
                "that its tokens were drawn from cannot be rebuilt. Episodes read from a file can only be scored "
                "without truncation."
            )
        support = torch.from_numpy(np.concatenate(kept)) if kept else None  # type: ignore[arg-type]
    return TokenBatch(
        tokens=padded([e.tokens for e in episodes], pad_id, torch.long),
        attention_mask=padded([[True] * len(e.tokens) for e in episodes], False, torch.bool),
        action_mask=padded([e.action_mask for e in episodes], False, torch.bool),
        sample_logprobs=padded([e.logprobs for e in episodes], 0.0, torch.float32),
        env_rewards=padded([e.env_rewards for e in episodes], 0.0, torch.float32),
        turn=padded(turns, 0, torch.long),
        group=torch.tensor([e.group for e in episodes], device=device),
        terminated=torch.tensor([e.terminated for e in episodes], device=device),
        episode_ids=tuple(e.id for e in episodes),
        controls=controls,
        support=support,
        sample_entropy=None
        if any(e.entropies is None for e in episodes)
        else padded([e.entropies or [] for e in episodes], 0.0, torch.float32),
    )


@dataclass(frozen=True)
class Part:
    """A micro-batch: rows that go through the model together, and what their loss is divided by."""

    rows: Int[Tensor, " R"]
    """Where the part's rows are in the whole batch."""
    batch: TokenBatch
    old: PolicyOutput
    ref: PolicyOutput | None
    credit: Credit
    num_actions: int
    """Actions of the whole optimiser step (not of this part): the global denominator."""
    num_rows: int
    """Texts of the whole optimiser step: rows, where those are no segments."""
    last_of_task: bool
    """True when the next part is of another task (if they are kept apart), or there is none."""


Cut = Callable[[int], Iterator[Part]]
"""The micro-batches of an optimiser step, of at most about so many tokens each; may be asked again for smaller ones."""


def optimizer_steps(
    batch: TokenBatch,
    old: PolicyOutput,
    ref: PolicyOutput | None,
    credit: Credit,
    *,
    epochs: int,
    num_minibatches: int,
    seed: int,
    left_out: Bool[Tensor, " B"] | None = None,
    tasks: Int[Tensor, " B"] | None = None,
) -> Iterator[Cut]:
    """`epochs` passes over the batch in `num_minibatches` optimiser steps each, each still to be cut.

    Micro-batches are cut by tokens, a prompt that rows share counted once; groups stay whole wherever their size
    allows, and the segments of a text are of one optimiser step. Every row is used exactly once per epoch; the order is
    a function of `seed` and epoch. Rows in `left_out` are counted in the denominators and not computed; an optimiser
    step of which nothing is left is not made. With `tasks`, a number for each row, a part holds rows of one task alone,
    and those of a task follow each other.
    """
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        groups = [torch.nonzero(batch.group.cpu() == g).squeeze(1) for g in batch.group.unique().tolist()]
        order = torch.cat([groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()])
        texts = order if batch.whole is None else batch.whole.text.cpu()[order]
        for of_step in texts.unique_consecutive().tensor_split(num_minibatches):
            rows = order[torch.isin(texts, of_step)]
            used = rows if left_out is None else rows[~left_out.cpu()[rows]]
            if len(used):
                apart = [used] if tasks is None else [used[tasks[used] == task] for task in tasks[used].unique()]
                yield partial(_cut, batch, old, ref, credit, rows, apart)


def _cut(
    batch: TokenBatch,
    old: PolicyOutput,
    ref: PolicyOutput | None,
    credit: Credit,
    rows: Int[Tensor, " R"],
    apart: Sequence[Tensor],
    tokens: int,
) -> Iterator[Part]:
    """The optimiser step of `rows` in parts of about `tokens` tokens; those to compute lie `apart`, task by task."""
    num_actions = int(batch.action_mask[rows].sum())
    num_texts = len(rows) if batch.whole is None else len(batch.whole.text[rows].unique())
    pieces, ends = list[Tensor](), set[int]()
    for of_task in apart:
        cut = [of_task[part] for part in batch.rows(of_task).parts(tokens)]
        # Largest first: the memory that its activations leave behind has room for those of the others.
        pieces += sorted(cut, key=lambda piece: -int(batch.attention_mask[piece].sum()))
        ends.add(len(pieces) - 1)
    for k, piece in enumerate(pieces):
        yield Part(
            rows=piece,
            batch=batch.rows(piece),
            old=old.rows(piece),
            ref=None if ref is None else ref.rows(piece),
            credit=credit.rows(piece),
            num_actions=num_actions,
            num_rows=num_texts,
            last_of_task=k in ends,
        )
