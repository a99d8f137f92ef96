"""Long texts as the segments that they were written by, and what was found of segments put back in its place.

A completion that is sampled with `sampling.segment` is one row wherever it is judged: rewards, baselines, returns and
advantages are those of the whole text, so credit flows over the end of a segment as over any other token, and with a
critic the last token of one is followed by the value of the next one's first state. Only a pass of the model sees
segments, each with what stood before it when it was written: prompt, the end of the text so far, and its own tokens.
So scoring makes the distribution that was sampled, and neither it nor the update holds more than a segment's row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pertoken.sampling import Segment
from pertoken.types import Credit, PolicyOutput, TokenBatch, Whole


@dataclass(frozen=True)
class Cut:
    """The rows of a batch, cut into S segments of at most W tokens with what each of them sees."""

    batch: TokenBatch
    """The segments, text by text; their actions are those of the texts, each once."""
    column: Int[Tensor, "S W"]
    """Which column of its text each cell is."""
    shape: tuple[int, int]
    """Of the batch that was cut."""

    def take(self, cells: Float[Tensor, "B T *more"]) -> Float[Tensor, "S W *more"]:
        """What is known of the actions of the texts, at those of the segments; 0 elsewhere."""
        acts = self.batch.action_mask.view(*self.column.shape, *[1] * (cells.ndim - 2))
        return torch.where(acts, cells[self._text[:, None], self.column], 0.0)

    def put(self, cells: Float[Tensor, "S W *more"]) -> Float[Tensor, "B T *more"]:
        """The inverse of `take`; gradients flow."""
        acts = self.batch.action_mask
        at = self._text[:, None].expand_as(self.column)[acts], self.column[acts]
        return cells.new_zeros(*self.shape, *cells.shape[2:]).index_put(at, cells[acts])

    def taken(self, output: PolicyOutput) -> PolicyOutput:
        """A pass over the texts, as one over the segments; behind a segment it knows no value."""
        return PolicyOutput(**self._cells(output, self.take))

    def joined(self, output: PolicyOutput) -> PolicyOutput:
        """A pass over the segments, as one over the texts, whose last value is that behind their last segment."""
        last = torch.bincount(self._text).cumsum(0) - 1  # each text has a segment
        behind = None if output.bootstrap is None else output.bootstrap[last]
        return PolicyOutput(**self._cells(output, self.put), bootstrap=behind)

    def credit(self, credit: Credit) -> Credit:
        """The credit of the texts, at the segments."""
        return Credit(self.take(credit.advantages), None if credit.returns is None else self.take(credit.returns))

    def _cells(self, output: PolicyOutput, move: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """What a pass has of each token, moved."""
        cells = {name: cell for name, cell in vars(output).items() if name != "bootstrap"}
        return {name: None if cell is None else move(cell) for name, cell in cells.items()}

    @property
    def _text(self) -> Int[Tensor, " S"]:
        assert self.batch.whole is not None
        return self.batch.whole.text


def cut(batch: TokenBatch) -> Cut | None:
    """`batch` cut into the segments that its controls say it was written by; None if those say nothing of segments.

    A segment is so many columns behind the prompt (what precedes the first action); a text without actions keeps one.
    """
    sampling, device = batch.controls.sampling, batch.tokens.device
    if sampling.segment is None:
        return None
    text, begins, ends, columns = zip(*_places(batch, sampling.segment), strict=True)
    row, begin, end = (torch.tensor(numbers, device=device) for numbers in (text, begins, ends))
    column = pad_sequence(list(columns), batch_first=True).to(device)
    sizes = torch.tensor([len(own) for own in columns], device=device)
    inside = torch.arange(column.shape[1], device=device) < sizes[:, None]
    acts = inside & (column >= begin[:, None]) & batch.action_mask[row[:, None], column]
    total = batch.action_mask.sum(1)
    so_far = torch.cat([torch.zeros_like(total)[:, None], batch.action_mask.cumsum(1)], 1)  # before each column

    def pick(cells: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, cells[row[:, None], column], 0)

    rows = TokenBatch(
        tokens=pick(batch.tokens, inside),
        attention_mask=inside,
        action_mask=acts,
        sample_logprobs=pick(batch.sample_logprobs, acts),
        env_rewards=pick(batch.env_rewards, acts),
        turn=pick(batch.turn, inside),
        group=batch.group[row],
        terminated=batch.terminated[row] & (end == batch.attention_mask.sum(1)[row]),
        episode_ids=tuple(
            f"{batch.episode_ids[b]}, its part from token {at}" for b, at in zip(text, begins, strict=True)
        ),
        controls=replace(batch.controls, sampling=sampling.model_copy(update={"segment": None})),
        support=batch.support,
        sample_entropy=None if batch.sample_entropy is None else pick(batch.sample_entropy, acts),
        whole=Whole(row, so_far[row, begin], total[row]),
    )
    return Cut(rows, column, (batch.tokens.shape[0], batch.tokens.shape[1]))


def _places(batch: TokenBatch, segment: Segment) -> Iterator[tuple[int, int, int, Int[Tensor, " C"]]]:
    """Of each segment: its row, where its own columns begin and end, and all columns that are seen in it."""
    lengths, prompts = batch.attention_mask.sum(1).tolist(), batch.prompt_lengths()
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        for begin in range(prompt, max(length, prompt + 1), segment.tokens):
            end, seen = min(begin + segment.tokens, length), prompt + segment.seen_from(begin - prompt)
            yield row, begin, end, torch.cat([torch.arange(prompt), torch.arange(seen, end)])
