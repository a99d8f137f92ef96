"""Where the tokens of a packed row lie: one prompt and the rows behind it, one after another, in a pack.

[prompt of pack 0 | row 0 | row 1 | prompt of pack 1 | row 2 | ...]
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Pack:
    """One prompt and the rows behind it: cells `[start, start + prompt + rows)` of the packed row."""

    start: int
    prompt: int
    """Tokens of the prompt."""
    rows: int
    """Tokens of all rows together."""
    rectangle: Int[Tensor, "n L"] | None
    """Cell of each row's tokens, counted from `start`; rows shorter than L end in copies of a cell that exists,
    which nothing reads. None if the pack is one sequence (a single row, or none): it is plainly causal."""
    inside: Bool[Tensor, "n L"] | None
    """True where `rectangle` holds a token of the row."""
    _masks: dict[tuple[int, int, int | None], Tensor | None] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(start: int, prompt: int, lengths: list[int], device: torch.device) -> "Pack":
        """The pack of a prompt and of rows with `lengths` tokens behind it; rows without tokens take no part."""
        rows = [length for length in lengths if length]
        if len(rows) < 2:
            return Pack(start, prompt, sum(rows), None, None)
        length = torch.tensor(rows, device=device)
        first = prompt + length.cumsum(0) - length
        step = torch.arange(max(rows), device=device)
        inside = step < length[:, None]
        return Pack(start, prompt, sum(rows), torch.where(inside, first[:, None] + step, first[:, None]), inside)

    @property
    def cells(self) -> int:
        return self.prompt + self.rows

    @cached_property
    def sequences(self) -> tuple[tuple[int, int], ...]:
        """First cell in the packed row, and tokens: of the prompt (of all, in a single sequence), then of each row."""
        if self.rectangle is None or self.inside is None:
            return ((self.start, self.cells),)
        firsts, lengths = self.rectangle[:, 0].tolist(), self.inside.sum(1).tolist()
        rows = ((self.start + first, length) for first, length in zip(firsts, lengths, strict=True))
        return ((self.start, self.prompt), *rows)

    def mask(self, length: int, before: int, window: int | None, device: torch.device) -> Bool[Tensor, "L K"] | None:
        """Which of `before + length` keys each of the last `length` positions sees; None for the plain triangle."""
        key = (length, before, window)
        if key not in self._masks:
            plain = before == 0 and (window is None or length <= window)
            at = torch.arange(before + length, device=device)
            distance = at[before:, None] - at
            seen = (distance >= 0) & (distance < window) if window else distance >= 0
            self._masks[key] = None if plain else seen
        return self._masks[key]
