"""Items that say nearly the same: what was learnt by heart must not count as held-out quality.

Rows whose prompts are equal never share splits (`files.py`); this finds those that are changed a little. Texts are
compared by the pieces of five letters or digits that they share (Jaccard), and every pair above the threshold is found,
not only likely ones: two sets that are alike share one of their rarest pieces (Bayardo et al. 2007,
https://doi.org/10.1145/1242572.1242591), so few pairs have to be looked at.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from pertoken.errors import TaskError
from pertoken.tasks.base import SPLITS, Split
from pertoken.types import Item

PIECE = 5
"""Letters or digits in a piece."""


@dataclass(frozen=True)
class Alike:
    """Two items that say nearly the same."""

    first: Item
    second: Item
    splits: tuple[Split, Split]
    similarity: float
    """Share of the pieces of both that each of them has: 1 is the same letters."""

    @property
    def leaks(self) -> bool:
        """Whether one of them is learnt from and the other is held out."""
        return "train" in self.splits and self.splits[0] != self.splits[1]


def alike_items(items: Mapping[Split, Sequence[Item]], *, least: float = 0.8) -> list[Alike]:
    """All pairs of items whose prompts are alike, the most alike first; leaks come before repetitions.

    Raises TaskError unless 0 < least <= 1.
    """
    everyone = [(split, item) for split in SPLITS for item in items.get(split, ())]
    found = [
        Alike(everyone[i][1], everyone[j][1], (everyone[i][0], everyone[j][0]), similarity)
        for i, j, similarity in alike([said(item) for _, item in everyone], least=least)
    ]
    return sorted(found, key=lambda pair: (not pair.leaks, -pair.similarity))


def said(item: Item) -> str:
    """The prompt of an item as one text."""
    return item.prompt if isinstance(item.prompt, str) else "\n".join(message["content"] for message in item.prompt)


def alike(texts: Sequence[str], *, least: float) -> Iterator[tuple[int, int, float]]:
    """Every pair of `texts` (i < j) of which the Jaccard similarity of their pieces is at least `least`.

    >>> list(alike(["The cat sat here.", "the CAT sat, here", "A dog barked."], least=0.8))
    [(0, 1, 1.0)]
    """
    if not 0 < least <= 1:
        raise TaskError(f"least: expected a similarity above 0, of 1 at most, got {least}")
    sets = [_pieces(text) for text in texts]
    rarity = Counter(piece for pieces in sets for piece in pieces)
    holders: dict[str, list[int]] = defaultdict(list)
    for j, pieces in enumerate(sets):
        ordered = sorted(pieces, key=lambda piece: (rarity[piece], piece))
        looked_at = ordered[: len(ordered) - ceil(least * len(ordered)) + 1]
        for i in sorted({i for piece in looked_at for i in holders[piece]}):
            shared = len(sets[i] & pieces)
            similarity = shared / (len(sets[i]) + len(pieces) - shared)
            if similarity >= least:
                yield i, j, similarity
        for piece in looked_at:
            holders[piece].append(j)


def _pieces(text: str) -> frozenset[str]:
    """The pieces of a text; all of it if it is shorter than one."""
    bare = "".join(character for character in text.casefold() if character.isalnum())
    return frozenset(bare[k : k + PIECE] for k in range(max(1, len(bare) - PIECE + 1)))
