"""The rewards of a batch, placed anew on its tokens: the sum of a text stays, and which tokens are paid changes.

By what the text is worth with tokens taken out (Shapley values, leaving one out, differences of prefixes), which the
rewards of the run say of shortened texts; or by attention. Credit is then assigned as from any other rewards. All of
it is a function of the seed, the step and the samples of the step, so that a resumed run places alike.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pertoken import credit
from pertoken.batching import to_batch
from pertoken.config import AttentionCredit, ByWorth, Differences, LeaveOneTokenOut, Redistributed, Shapley
from pertoken.rewards import AlignedText, Scene, Weighted, score
from pertoken.rewards.align import word_spans
from pertoken.rollout.collect import sample_seed
from pertoken.types import Episode, TokenRewards

Block = Sequence[int]
"""Columns of a row that are taken out, or left, together."""


def by_attention(
    config: AttentionCredit,
    earned: TokenRewards,
    names: Sequence[str],
    weights: Float[Tensor, "B T"],
    action_mask: Bool[Tensor, "B T"],
) -> TokenRewards:
    """The parts `names` on tokens by `weights` (`credit.redistribute`); other parts, the KL say, as they are."""
    return _mixed(
        config,
        earned,
        {
            name: credit.redistribute(earned.parts[name].sum(1), weights.to(earned.total), action_mask, share=1.0)
            for name in names
        },
    )


def by_worth(
    config: ByWorth, earned: TokenRewards, scene: Scene, rewards: Sequence[Weighted], *, seed: int
) -> tuple[TokenRewards, int]:
    """The parts that `rewards` have paid, by what shortened texts are worth; and how many texts were scored for it.

    A text that has lost its last token was cut off; one without any is an answer that ends at once. Each is scored in a
    group of its own, so a reward that compares the samples of a prompt sees it alone. Where a part abstains on it or
    fails, it is worth 0.
    """
    texts, batch = _Texts(scene, rewards, earned), scene.batch
    anew = {part.name: torch.zeros(batch.tokens.shape, dtype=torch.float64) for part in rewards}
    for row, episode in enumerate(scene.episodes):
        blocks = blocks_of(config, episode, scene.samples[row].aligned, batch.controls.sampling.max_new_tokens)
        draw = sample_seed(seed, scene.step, f"{episode.id}, joining", 0)
        for name, cells in anew.items():
            cells[row] = place(config, texts.worth(row, blocks, name), blocks, len(cells[row]), seed=draw)
    return _mixed(config, earned, anew), texts.scored


def place(
    config: ByWorth, worth: credit.Worth, blocks: Sequence[Block], width: int, *, seed: int
) -> Float[Tensor, " T"]:
    """Rewards of a row of `width` cells, by what it is worth with some of its `blocks` left; they sum to v(all).

    The tokens of a block share what it adds; differences are paid at its last token, where they are known. What they do
    not add up to is on the first action, whose reward-to-go is that of the whole text in any case: v(none), which all
    samples of a prompt have, so that a baseline of the group takes it away again; and of leaving one out the rest.
    """
    cells, n = torch.zeros(width, dtype=torch.float64), len(blocks)
    if not n:
        return cells
    if isinstance(config, LeaveOneTokenOut):
        added = credit.leave_one_token_out(worth, n)
    elif isinstance(config, Differences):
        added = credit.prefix_differences(worth, n)
    else:
        few = n <= 5 and 2**n - 1 <= config.samples  # all orders score no more texts than that
        orders = None if few else max(1, (config.samples - 1) // (2 * (n - 1)))
        added = credit.shapley(worth, n, num_orders=orders, generator=torch.Generator().manual_seed(seed))
    for block, value in zip(blocks, added.tolist(), strict=True):
        paid = list(block[-1:] if isinstance(config, Differences) else block)
        cells[paid] += value / len(paid)
    rest = worth(torch.ones(1, n, dtype=torch.bool)).item() - added.sum().item()
    cells[blocks[0][0]] += rest
    return cells


def blocks_of(config: ByWorth, episode: Episode, aligned: AlignedText, longest: int) -> list[list[int]]:
    """What of `episode` is taken out together: a token or word, or as many as it takes to score `config.samples` texts.

    aligned: the text from the first action on. longest: most tokens that a completion can have; the blocks of
    differences follow from it and not from the length of this one, which would pay tokens by what comes later.
    """
    if isinstance(config, Differences):
        actions = [column for column, chosen in enumerate(episode.action_mask) if chosen]
        every = math.ceil(longest / config.samples)
        return [actions[k : k + every] for k in range(0, len(actions), every)]
    words = isinstance(config, Shapley | LeaveOneTokenOut) and config.unit == "word"
    most = (config.samples + 1) // 2 if isinstance(config, Shapley) else config.samples
    units = _units(episode, aligned, words=words)
    blocks: list[list[int]] = [[] for _ in range(min(len(units), most))]
    for k, columns in enumerate(units):
        blocks[k * len(blocks) // len(units)] += columns
    return blocks


def most_texts(config: ByWorth, num_blocks: int) -> int:
    """How many texts are scored of a row with so many blocks, at most."""
    return min(config.samples, 2**num_blocks - 1) if isinstance(config, Shapley) else num_blocks


def _units(episode: Episode, aligned: AlignedText, *, words: bool) -> list[list[int]]:
    """The actions of a row, token by token or word by word. Tokens that share a character stay together.

    A word begins with the token that holds its first character, and so takes the space before it along.
    """
    starts, units = [start for start, _ in word_spans(aligned.text, marks=True)], list[list[int]]()
    word = end = -1
    for column, (start, stop) in enumerate(aligned.char_spans, episode.prompt_length):
        if not episode.action_mask[column]:
            word = -1
            continue
        begun = bisect_left(starts, stop) if start < stop else -1  # words that begin before the token ends
        if start < stop and (start < end or (words and begun == word)):
            units[-1].append(column)
        else:
            units.append([column])
        word, end = begun, max(end, stop)
    return units


def without(episode: Episode, columns: Collection[int], end: int | None) -> Episode:
    """`episode` without the tokens in `columns`; of one that has no action left, the answer `end` alone."""
    stays = [column not in columns for column in range(len(episode.tokens))]
    at = list(accumulate(stays, initial=0))
    kept = [column for column, stay in enumerate(stays) if stay]
    last = max((column for column, chosen in enumerate(episode.action_mask) if chosen), default=-1)
    short = replace(
        episode,
        tokens=[episode.tokens[column] for column in kept],
        action_mask=[episode.action_mask[column] for column in kept],
        logprobs=[episode.logprobs[column] for column in kept],
        env_rewards=[0.0] * len(kept),
        spans=[replace(span, start=at[span.start], stop=at[span.stop]) for span in episode.spans],
        stop=episode.stop if last in kept else "length",
        support=None,
        entropies=None,
    )
    if any(short.action_mask) or end is None:
        return short
    return replace(
        short, tokens=[*short.tokens, end], action_mask=[*short.action_mask, True], logprobs=[*short.logprobs, 0.0],
        env_rewards=[*short.env_rewards, 0.0], stop="eos",
    )  # fmt: skip


class _Texts:
    """What the parts of the reward pay texts of a scene with some tokens left; equal texts are scored once."""

    def __init__(self, scene: Scene, rewards: Sequence[Weighted], earned: TokenRewards) -> None:
        self._scene, self._rewards = scene, rewards
        self._known: dict[tuple[int, str, tuple[int, ...]], dict[str, float]] = {}
        self._learn(scene.episodes, earned)
        self.scored = 0

    def worth(self, row: int, blocks: Sequence[Block], part: str) -> credit.Worth:
        """What the episode of `row` is worth to a part with some of `blocks` left."""
        episode, end = self._scene.episodes[row], self._scene.tokenizer.eos_token_id

        def worth(kept: Bool[Tensor, "S N"]) -> Float[Tensor, " S"]:
            texts = [
                without(
                    episode, {c for block, stays in zip(blocks, left, strict=True) if not stays for c in block}, end
                )
                for left in kept.tolist()
            ]
            self._score([text for text in texts if _key(text) not in self._known])
            return torch.tensor([self._known[_key(text)][part] for text in texts], dtype=torch.float64)

        return worth

    def _score(self, texts: Sequence[Episode]) -> None:
        scene, several = self._scene, list({_key(text): text for text in texts}.values())
        controls = replace(scene.batch.controls, sampling=scene.batch.controls.sampling.untruncated(), mask=None)
        size = len(scene.episodes)  # a reward has its time limit for so many
        for at in range(0, len(several), size):
            some = several[at : at + size]
            alone = [replace(text, id=f"{text.id}, shortened {k}", group=k) for k, text in enumerate(some)]
            batch = to_batch(alone, controls, device=str(scene.batch.tokens.device))
            self._learn(some, score(self._rewards, Scene(batch, alone, scene.tokenizer, step=scene.step)))
            self.scored += len(some)

    def _learn(self, texts: Sequence[Episode], paid: TokenRewards) -> None:
        sums = {part.name: paid.parts[part.name].double().sum(1).tolist() for part in self._rewards}
        for row, text in enumerate(texts):
            self._known[_key(text)] = {name: of_part[row] for name, of_part in sums.items()}


def _key(text: Episode) -> tuple[int, str, tuple[int, ...]]:
    """Texts that are equal in this are worth the same."""
    return text.group, text.stop, tuple(text.tokens)


def _mixed(config: Redistributed, earned: TokenRewards, anew: Mapping[str, Float[Tensor, "B T"]]) -> TokenRewards:
    """`config.share` of the parts in `anew` as it says, the rest where it was paid."""
    parts = dict(earned.parts)
    for name, cells in anew.items():
        parts[name] = config.share * cells.to(earned.total) + (1.0 - config.share) * parts[name]
    total = torch.zeros_like(earned.total)
    for cells in parts.values():
        total = total + cells
    return replace(earned, parts=parts, total=total)
