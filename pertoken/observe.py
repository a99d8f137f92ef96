"""Looking at a step: the figures that are logged, and the streams that colour each token.

Every mean is over actions, with the mask of the loss. The names are explained in `tracking/glossary.py`.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.credit import reward_to_go
from pertoken.objectives import kl_per_token
from pertoken.policy.alternatives import Alternatives
from pertoken.rewards import Finding
from pertoken.rewards.align import align
from pertoken.tracking.coloured import ColouredText
from pertoken.tracking.runlog import episode_record
from pertoken.types import Credit, Episode, PolicyOutput, TokenBatch, TokenRewards


@dataclass(frozen=True)
class Updated:
    """What the update saw: its figures, and per-token streams: of its last pass over the batch, but `kl` of the policy
    that it began with."""

    metrics: dict[str, float]
    streams: dict[str, Float[Tensor, "B T"]]


@dataclass(frozen=True)
class StepReport:
    """What one step did: figures for the log, streams for the eye."""

    step: int
    metrics: dict[str, float]
    episodes: Sequence[Episode]
    streams: dict[str, Float[Tensor, "B T"]]


def observe(
    step: int,
    episodes: Sequence[Episode],
    batch: TokenBatch,
    old: PolicyOutput,
    ref: PolicyOutput | None,
    rewards: TokenRewards,
    credit: Credit,
    updated: Updated,
    extra: Mapping[str, float],
    sampled: int | None = None,
) -> StepReport:
    """The report of one step out of what its stages returned; `extra` are figures that they measured themselves.

    sampled: number of rows, the first ones, that were sampled for this step; figures are about these, streams about
    all. None: all were.
    """
    rows = len(episodes) if sampled is None else sampled
    mask = batch.action_mask & (torch.arange(len(episodes), device=batch.group.device) < rows)[:, None]
    actions = int(mask.sum())
    count = max(actions, 1)
    streams = token_streams(batch, old, ref, rewards) | {"advantage": credit.advantages} | updated.streams
    per_episode = {name: cells[:rows].sum().item() / rows for name, cells in streams.items() if "reward/" in name}
    seconds = sum(value for name, value in extra.items() if name.startswith("time/"))
    metrics = per_episode | {
        "entropy": _mean(old.entropy, mask),
        "advantage/mean": _mean(credit.advantages, mask),
        "advantage/std": credit.advantages[mask].std().item() if count > 1 else 0.0,
        "completion/length": actions / rows,
        "completion/terminated_share": batch.terminated[:rows].float().mean().item(),
        "tokens/generated": float(actions),
        "tokens/per_second": actions / seconds if seconds else 0.0,
    }
    if ref is not None:
        metrics |= {
            "kl/reference": _mean(streams["kl"], mask),
            "kl/sequence": streams["kl"][:rows].sum().item() / rows,
        }
    metrics |= task_figures(episodes, streams)
    if old.values is not None and credit.returns is not None:
        error, returns = (credit.returns - old.values)[mask], credit.returns[mask]
        metrics |= {
            "value/error": error.square().mean().sqrt().item() if actions else 0.0,
            "value/explained_variance": 1.0 - (error.var() / returns.var()).item() if _varies(returns) else 0.0,
        }
    return StepReport(step, metrics | rewards.figures | updated.metrics | dict(extra), episodes, streams)


def task_figures(episodes: Sequence[Episode], streams: Mapping[str, Float[Tensor, "B T"]]) -> dict[str, float]:
    """Of a mixture, figures of the episodes of each task; one that has none in this step has no figure."""
    found: dict[str, float] = {}
    for task in sorted({episode.item.task for episode in episodes} - {""}):
        rows = [row for row, episode in enumerate(episodes) if episode.item.task == task]
        found[f"task_reward/{task}"] = streams["reward/total"][rows].sum().item() / len(rows)
        found[f"task_length/{task}"] = sum(sum(episodes[row].action_mask) for row in rows) / len(rows)
        if "kl" in streams:
            found[f"task_kl/{task}"] = streams["kl"][rows].sum().item() / len(rows)
    return found


def token_streams(
    batch: TokenBatch, old: PolicyOutput, ref: PolicyOutput | None, rewards: TokenRewards
) -> dict[str, Float[Tensor, "B T"]]:
    """What is known of every action before any update, by name; 0 off actions."""
    mask = batch.action_mask
    streams = {f"reward/{name}": cells for name, cells in rewards.parts.items()}
    streams |= {
        "reward/total": rewards.total,
        "return": reward_to_go(rewards.total, mask, gamma=1.0),
        "logprob": batch.sample_logprobs,
        "entropy": old.entropy,
    }
    if old.values is not None:
        streams["value"] = old.values
    if ref is not None:
        streams |= {
            "ref_logprob": ref.logprobs,
            "kl": kl_per_token(old.logprobs, ref.logprobs, mask, estimator="k1"),
        }
    return streams


def token_rows(
    episodes: Sequence[Episode], streams: Mapping[str, Float[Tensor, "B T"]], tokenizer: Any
) -> list[tuple[Episode, list[str], dict[str, list[float]]]]:
    """Each episode with the text of each of its tokens and its own row of every stream."""
    return [
        (
            episode,
            token_pieces(episode.tokens, tokenizer),
            {name: cells[row, : len(episode.tokens)].tolist() for name, cells in streams.items()},
        )
        for row, episode in enumerate(episodes)
    ]


def episode_records(
    episodes: Sequence[Episode],
    streams: Mapping[str, Float[Tensor, "B T"]],
    tokenizer: Any,
    *,
    step: int,
    findings: Sequence[Sequence[Finding]] = (),
    alternatives: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """The lines of `episodes/<step>.jsonl`; `findings`, if any, are those of each episode (`rewards.findings`), and so
    are `alternatives` (`alternative_columns`)."""
    rows = token_rows(episodes, streams, tokenizer)
    beside = zip(findings or itertools.repeat(()), alternatives or itertools.repeat({}), strict=False)
    return [
        episode_record(episode, pieces, row, step=step) | finding_columns(found) | others
        for (episode, pieces, row), (found, others) in zip(rows, beside, strict=False)
    ]


def alternative_columns(found: Alternatives, batch: TokenBatch, tokenizer: Any) -> list[dict[str, Any]]:
    """The entry of each row's record that says what could have stood at its actions, as was `found` of `batch`.

    Columns have one entry per token, 0 and [] where the model chose nothing.
    """
    actions = zip(found.rank.tolist(), found.ids.tolist(), found.logprobs.tolist(), strict=True)
    rows = []
    for acts, length in zip(batch.action_mask.tolist(), batch.attention_mask.sum(1).tolist(), strict=True):
        ranks, ids, logprobs = (
            [0] * length,
            [list[int]() for _ in range(length)],
            [list[float]() for _ in range(length)],
        )
        for at in (column for column in range(length) if acts[column]):
            ranks[at], tokens, nats = next(actions)
            possible = [k for k, value in enumerate(nats) if value > -math.inf]
            ids[at], logprobs[at] = [tokens[k] for k in possible], [float(f"{nats[k]:.4g}") for k in possible]
        pieces = {str(token): piece_of(token, tokenizer) for token in sorted({t for at in ids for t in at})}
        rows.append({"alternatives": {"rank": ranks, "id": ids, "logprob": logprobs, "piece": pieces}})
    return rows


def finding_columns(found: Sequence[Finding]) -> dict[str, Any]:
    """The entry of a record that says what rewards found in it; nothing if they found nothing."""
    return {"findings": [dataclasses.asdict(finding) for finding in found]} if found else {}


def coloured_texts(
    episodes: Sequence[Episode], streams: Mapping[str, Float[Tensor, "B T"]], tokenizer: Any, *, by: str
) -> list[ColouredText]:
    """The completion of each episode, coloured by the stream `by`: what a notebook shows of a stage driven by hand.

    `streams` are tensors of any stage by a name of yours: `{"advantage": credit.advantages, **rewards.parts}`.
    """
    texts = []
    for episode, pieces, row in token_rows(episodes, streams, tokenizer):
        start, acts = episode.prompt_length, episode.action_mask[episode.prompt_length :]
        columns = {
            name: [value if chosen else None for value, chosen in zip(values[start:], acts, strict=True)]
            for name, values in row.items()
        }
        texts.append(ColouredText(pieces[start:], columns[by], by, episode.item.id, columns))
    return texts


def token_pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; special tokens show their name. A character that several tokens share comes
    with the last of them, so the pieces of ordinary tokens join to the text."""
    aligned, special, pieces, shown = align(ids, tokenizer), set(tokenizer.all_special_ids), [], 0
    for token, end in zip(ids, aligned.completed(), strict=True):
        if token in special:
            pieces.append(str(tokenizer.convert_ids_to_tokens(token)))
        else:
            pieces.append(aligned.text[shown:end])
            shown = end
    return pieces


def piece_of(token: int, tokenizer: Any) -> str:
    """What a token says inside a text: behind itself, since some tokenizers drop the space that a text begins with."""
    return token_pieces([token, token], tokenizer)[-1]


def _varies(values: Tensor) -> bool:
    return len(values) > 1 and bool(values.var() > 0)


def _mean(cells: Tensor, mask: Tensor) -> float:
    return torch.where(mask, cells, 0.0).sum().item() / max(int(mask.sum()), 1)
