"""What a person asks of one text: what else could have stood here, what if it had, which tokens caused the score.

Pure functions over a policy, an engine and rewards, on episodes of a single turn; `asking.py` puts them to a run. A
column counts the tokens of the episode, prompt included; results have one entry per token that the model chose.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pertoken.batching import to_batch
from pertoken.config import LeaveOneTokenOut
from pertoken.errors import ConfigError, ModelError
from pertoken.forward import decoder_start
from pertoken.observe import piece_of
from pertoken.policy.model import Policy
from pertoken.rewards import Scene, Weighted, score
from pertoken.rewards.align import align
from pertoken.rollout.collect import sample_seed
from pertoken.rollout.engine import RolloutEngine
from pertoken.sampling import Controls
from pertoken.text_metrics import Interval, bootstrap_mean
from pertoken.training.redistribution import blocks_of, without
from pertoken.training.resampling import continuation
from pertoken.types import Completion, Episode, TokenBatch

TEXTS_AT_ONCE = 16
"""A reward may have a time limit for a scene, so scenes stay small."""


@dataclass(frozen=True)
class Choice:
    """A token that could stand at a place."""

    token: int
    piece: str
    logprob: float
    """Under the distribution that tokens are drawn from (nats); -inf if its controls forbid it."""


@dataclass(frozen=True)
class Place:
    """One token that the model chose, and what it could have chosen."""

    chosen: Choice
    rank: int
    """Of the chosen one among all tokens, counted from 1."""
    entropy: float
    """Of the distribution (nats)."""
    others: tuple[Choice, ...]
    """The most probable tokens, the chosen one among them if it is."""


def alternatives(policy: Policy, episode: Episode, controls: Controls, *, count: int = 8) -> list[Place]:
    """For each token that the model chose, the `count` most probable ones that `controls` let it choose from."""
    batch = _batch(policy, [episode], controls)
    _, found = policy.score_with_alternatives(batch, controls, count)
    chosen = batch.tokens[batch.action_mask].tolist()
    names = {token: piece_of(token, policy.tokenizer) for token in {*chosen, *found.ids.flatten().tolist()}}
    columns = (chosen, found.own.tolist(), found.rank.tolist(), found.entropy.tolist(), found.ids.tolist())
    return [
        Place(
            Choice(token, names[token], logprob),
            rank,
            entropy,
            tuple(
                Choice(other, names[other], nats)
                for other, nats in zip(ids, logprobs, strict=True)
                if nats > float("-inf")
            ),
        )
        for token, logprob, rank, entropy, ids, logprobs in zip(*columns, found.logprobs.tolist(), strict=True)
    ]


def logprobs_of(policy: Policy, episodes: Sequence[Episode], controls: Controls) -> list[list[float]]:
    """Of each text, the log-prob of each token that the model chose, with all of the vocabulary kept (nats)."""
    batch = _batch(policy, episodes, controls)
    cells = policy.score(batch).logprobs
    return [row[chosen].tolist() for row, chosen in zip(cells, batch.action_mask, strict=True)]


def swapped(episode: Episode, column: int, ids: Sequence[int], eos_ids: Sequence[int]) -> Episode:
    """The text with `ids` in the place of the token in `column`, and the rest as it was; log-probs are unknown, 0.

    An end among `ids` is the end of the text. One that no longer ends by itself was cut off.
    """
    _refuse_column(episode, column)
    if not ids:
        raise ConfigError("swap: there must be a token in the place of the old one; give one or more")
    ends = [k for k, token in enumerate(ids) if token in eos_ids]
    written = list(ids[: ends[0] + 1]) if ends else [*ids, *episode.tokens[column + 1 :]]
    ended = "eos" if ends else episode.stop
    if not ends and episode.stop == "eos" and column == len(episode.tokens) - 1:
        ended = "length"
    told = Completion(written, [0.0] * len(written), ended)
    return continuation(episode, column, told, f"{episode.id}, swapped", episode.group)


def rolled(
    engine: RolloutEngine,
    episode: Episode,
    column: int,
    ids: Sequence[int],
    controls: Controls,
    *,
    samples: int,
    seed: int = 0,
) -> list[Episode]:
    """Texts that are the episode up to `column`, then `ids`, and from there on what the engine samples.

    Sample k draws with the same random numbers whatever `ids` are, so that two sets of texts differ by them and little
    else. Where no room is left behind `ids`, or they end the text, all samples are that text.
    """
    _refuse_column(episode, column)
    group = episode.group
    begun = continuation(episode, column, Completion(list(ids), [0.0] * len(ids), "length"), episode.id, group)
    taken = sum(begun.action_mask)
    names = [f"{episode.id}>{column}/{k}" for k in range(samples)]
    ended = bool(ids) and ids[-1] in controls.eos_ids
    if ended or taken >= controls.sampling.max_new_tokens:
        return [replace(begun, id=name, stop="eos" if ended else "length") for name in names]
    seeds = [sample_seed(seed, 0, f"{episode.id}>{column}", k) for k in range(samples)]
    found = engine.generate([begun.tokens] * samples, controls, seeds=seeds, taken=[taken] * samples)
    return [
        continuation(begun, len(begun.tokens), completion, name, group)
        for name, completion in zip(names, found, strict=True)
    ]


def paid(rewards: Sequence[Weighted], episodes: Sequence[Episode], tokenizer: Any, step: int) -> list[dict[str, float]]:
    """What each text earns in `step`, by part and in `total`; each is scored in a group of its own."""
    earned = []
    for at in range(0, len(episodes), TEXTS_AT_ONCE):
        some = [
            replace(episode, id=f"{episode.id} ({k})", group=k)
            for k, episode in enumerate(episodes[at : at + TEXTS_AT_ONCE])
        ]
        found = score(rewards, Scene(to_batch(some, Controls()), some, tokenizer, step=step))
        columns = {name: cells.sum(1).tolist() for name, cells in {**found.parts, "total": found.total}.items()}
        earned += [{name: values[row] for name, values in columns.items()} for row in range(len(some))]
    return earned


def effect(was: Sequence[Mapping[str, float]], would_be: Sequence[Mapping[str, float]]) -> Interval:
    """How much more the texts of `would_be` earn than those of `was`, sample by sample: mean and 95% interval."""
    return bootstrap_mean([new["total"] - old["total"] for old, new in zip(was, would_be, strict=True)])


def causes(
    rewards: Sequence[Weighted], episode: Episode, tokenizer: Any, step: int, *, most: int = 256
) -> dict[str, list[float]]:
    """What the text loses of each part, and in `total`, without each of its tokens: worth with it - worth without.

    Tokens that share a character go together and share what they add. At most `most` shortened texts are scored: of a
    longer text several tokens are taken out as one.
    """
    columns = [column for column, chosen in enumerate(episode.action_mask) if chosen]
    aligned = align(episode.tokens[episode.prompt_length :], tokenizer)
    blocks = blocks_of(LeaveOneTokenOut(samples=max(3, most)), episode, aligned, len(columns))
    texts = [without(episode, set(block), tokenizer.eos_token_id) for block in blocks]
    whole, *shortened = paid(rewards, [episode, *texts], tokenizer, step)
    found = {name: [0.0] * len(episode.tokens) for name in whole}
    for block, rest in zip(blocks, shortened, strict=True):
        for name, cells in found.items():
            for column in block:
                cells[column] = (whole[name] - rest[name]) / len(block)
    return {name: [cells[column] for column in columns] for name, cells in found.items()}


def refuse_encoder_decoder(policy: Policy) -> None:
    """Raises ModelError for a model that cannot go on from the middle of a text here."""
    if decoder_start(policy.hf_model):
        raise ModelError(
            f"{type(policy.hf_model).__name__} is an encoder-decoder model: its texts are written from their "
            "beginning, and cannot be sampled on from the middle. Alternatives can be asked, and swaps with 0 samples."
        )


def _batch(policy: Policy, episodes: Sequence[Episode], controls: Controls) -> TokenBatch:
    """The episodes as a batch, with no kept sets: a file has none."""
    for episode in episodes:
        if not any(episode.action_mask):
            raise ConfigError(f"{episode.id} has no token that the model chose: there is nothing to ask about")
    kept = replace(controls, sampling=controls.sampling.untruncated(), mask=None)
    return to_batch(episodes, kept, device=str(policy.device))


def _refuse_column(episode: Episode, column: int) -> None:
    if not (0 <= column < len(episode.tokens) and episode.action_mask[column]):
        raise ConfigError(f"{episode.id}: token {column} is none that the model chose")
