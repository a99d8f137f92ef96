"""More training items out of those that there are: prompts with words left out or said otherwise, same answers.

A way to say a text otherwise takes texts and a seed for each, and gives as many texts. Each way makes a copy of every
training item that its share is drawn for, by a hash of seed, way and item, so that nothing depends on order. Copies
that came out unchanged, that ask what another item asks (held-out ones above all), or that have lost an answer which
stood in their text, are left out and counted. Held-out items are never touched.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np

from pertoken.answers import UNSPACED
from pertoken.errors import TaskError
from pertoken.rows import Row
from pertoken.tasks.base import PromptTemplate
from pertoken.tasks.layouts import Layout, UnusableRowError
from pertoken.types import Item

Rewrite = Callable[[Sequence[str], Sequence[int]], Sequence[str]]
"""Texts, and a seed for each -> as many texts that should mean the same."""


@dataclass(frozen=True)
class Augmentation:
    """Which copies are made."""

    rewrites: Mapping[str, Rewrite]
    """Ways to say the texts of a prompt otherwise, by name."""
    prompts: tuple[PromptTemplate, ...] = ()
    """Other templates to ask by."""
    share: float = 1.0
    """Of the training items, for each way and template."""
    seed: int = 0


@runtime_checkable
class Recipe(Protocol):
    """How rows become items."""

    def layout(self, row: Row) -> Layout:
        """How a row is read."""
        ...

    def item(self, row: Row, number: str, template: PromptTemplate | None = None) -> Item:
        """The item of a row."""
        ...


def augmented(
    pairs: Sequence[tuple[Item, Row]], recipe: Recipe, settings: Augmentation, asked: set[str]
) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """Changed copies of the training items in `pairs`, each with its row, and a note on each way: how many came of it.

    asked: the prompts of all items, those held out too. Copies have the name of their way behind their id.
    """
    copies, notes, asked = list[Item](), list[str](), set(asked)
    ways: dict[str, Rewrite | PromptTemplate] = dict(settings.rewrites)
    ways |= {f"prompts.{k}": template for k, template in enumerate(settings.prompts)}
    for name, way in ways.items():
        chosen = [pair for pair in pairs if seed_of(settings.seed, name, pair[0].id) < settings.share * 2**63]
        before = len(copies)
        template = way if isinstance(way, PromptTemplate) else None
        changed = (
            [{} for _ in chosen] if isinstance(way, PromptTemplate) else _rewritten(chosen, recipe, name, way, settings)
        )
        for (item, row), texts in zip(chosen, changed, strict=True):
            layout = recipe.layout(row)
            if (template and (layout.template is None or layout.opening)) or _lost(item, layout.rewritable(row), texts):
                continue
            try:
                copy = recipe.item(layout.rewritten(row, texts), item.id, template)
            except UnusableRowError:  # all words gone, or a column that the template names and the row lacks
                continue
            if str(copy.prompt) not in asked:
                asked.add(str(copy.prompt))
                copies.append(replace(copy, id=f"{item.id}~{name}"))
        made = len(copies) - before
        left = f", {len(chosen) - made} left out" if made < len(chosen) else ""
        notes.append(f"task.augment.{name}: {made} more train items from {len(chosen)}{left}")
    return tuple(copies), tuple(notes)


def _rewritten(
    pairs: Sequence[tuple[Item, Row]], recipe: Recipe, name: str, way: Rewrite, settings: Augmentation
) -> list[dict[str, str]]:
    """The texts of each row said otherwise, all of them asked for at once."""
    known = [recipe.layout(row).rewritable(row) for _, row in pairs]
    places = [(k, column) for k, texts in enumerate(known) for column in texts]
    seeds = [seed_of(settings.seed, name, f"{pairs[k][0].id}/{column}") for k, column in places]
    said = way([known[k][column] for k, column in places], seeds)
    found: list[dict[str, str]] = [{} for _ in pairs]
    for (k, column), text in zip(places, said, strict=True):
        found[k][column] = text
    return found


def _lost(item: Item, before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    """Whether an answer that is read off the text is no longer in it."""
    return item.answer is not None and any(
        item.answer in text and item.answer not in after[column] for column, text in before.items() if column in after
    )


def seed_of(seed: int, way: str, place: str) -> int:
    """A number below 2^63 that depends on its arguments alone."""
    digest = hashlib.sha256(f"{seed}/{way}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- ways ---

_PIECE = re.compile(rf"(?:[{UNSPACED}]|[^\s{UNSPACED}]+)\s*")


def word_dropout(share: float) -> Rewrite:
    """Leave out `share` of the words, each drawn by itself; one stays at least. Chinese characters count as words.

    Of translation: Sennrich et al. 2016, https://aclanthology.org/W16-2323.

    >>> word_dropout(0.5)(["one two three four"], [3])
    ['three four']
    """

    def rewrite(texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return [_thinned(text, share, np.random.default_rng(seed)) for text, seed in zip(texts, seeds, strict=True)]

    return rewrite


def _thinned(text: str, share: float, generator: np.random.Generator) -> str:
    pieces = _PIECE.findall(text)
    if not pieces:
        return text
    kept = generator.random(len(pieces)) >= share
    if not kept.any():
        kept[generator.integers(len(pieces))] = True
    return "".join(piece for piece, stays in zip(pieces, kept, strict=True) if stays).strip()


def synonyms(share: float, known: Callable[[str], Sequence[str]]) -> Rewrite:
    """Replace `share` of the words that have synonyms by one of them; `known` gives those of a word in small letters.

    >>> synonyms(1.0, {"quick": ["fast"]}.get)(["Quick, be quick!"], [0])
    ['Fast, be fast!']
    """

    def one(text: str, generator: np.random.Generator) -> str:
        def said(match: re.Match[str]) -> str:
            others = known(match[0].lower())
            if not others or generator.random() >= share:
                return match[0]
            other = others[int(generator.integers(len(others)))]
            return other[0].upper() + other[1:] if match[0][0].isupper() else other

        return re.sub(r"\b[A-Za-z]{3,}\b", said, text)

    def rewrite(texts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        return [one(text, np.random.default_rng(seed)) for text, seed in zip(texts, seeds, strict=True)]

    return rewrite


def wordnet() -> Callable[[str], Sequence[str]]:
    """The synonyms of an English word by WordNet: other members of the sense that it has most often.

    Words that are no dictionary forms (`ran`, `houses`) have none, since their synonyms would stand in another form.
    """
    from nltk.corpus import wordnet as reader

    try:
        reader.ensure_loaded()
    except LookupError as error:
        raise TaskError(
            "task.augment.synonyms: WordNet is not on this machine, and nltk does not bring it: run `python -m "
            "nltk.downloader wordnet`, or name a folder that has corpora/wordnet in NLTK_DATA"
        ) from error

    @lru_cache(maxsize=1 << 16)
    def known(word: str) -> Sequence[str]:
        senses = [sense for sense in reader.synsets(word) if word in sense.lemma_names()][:1]
        names = (name for sense in senses for name in sense.lemma_names())
        return [name.replace("_", " ") for name in names if name != word and name.islower()]

    return known
