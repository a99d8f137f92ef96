"""Which tokens a score of a learned model depends on: integrated gradients over the embeddings that it reads.

    a_t = (x_t - n_t) . integral over s in [0, 1] of  d score(n + s (x - n)) / d x_t
    sum_t a_t = score(x) - score(n)

x is what the model reads, n the same with a neutral token in the place of each one that is asked about.
Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365. The integral is Captum's (extra `attribution`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pertoken.batching import to_batch
from pertoken.errors import ConfigError, MissingExtraError
from pertoken.policy.embedded import embedded
from pertoken.policy.model import Policy
from pertoken.reading import Reading, neutral_id
from pertoken.rewards import Reads, Scene, Weighted
from pertoken.sampling import Controls
from pertoken.types import Episode

POINTS, MOST_POINTS = 16, 256
"""Of the integral, at which the gradient is taken: twice as many until what it leaves open is small."""
OPEN_SHARE = 0.02
"""What is small: of the sum of the absolute attributions."""
TOKENS_PER_PASS = 512
"""Of a pass with gradient: its logits are kept for the way back."""


@dataclass(frozen=True)
class Attribution:
    """What each token of a text adds to a score, read along with the others."""

    values: tuple[float, ...]
    score: float
    """Of the text, ..."""
    neutral: float
    """... and of neutral tokens in its place."""
    open: float
    """score - neutral - sum of the values: what the integral has not found."""
    points: int
    """Of the integral."""

    def minus(self, other: "Attribution") -> "Attribution":
        """What each token adds to the difference of two scores."""
        return Attribution(
            tuple(one - two for one, two in zip(self.values, other.values, strict=True)),
            self.score - other.score,
            self.neutral - other.neutral,
            self.open - other.open,
            max(self.points, other.points),
        )


def attribute(readings: Sequence[Reading], num_tokens: int, *, weight: float = 1.0) -> Attribution:
    """Attributions of `weight` times the sum of the scores of `readings` to the `num_tokens` tokens asked about.

    Raises MissingExtraError without Captum.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise MissingExtraError("captum", "attribution", "gradient attribution") from error
    values, score, neutral, left, most = [0.0] * num_tokens, 0.0, 0.0, 0.0, 0
    for reading in readings:
        integral = IntegratedGradients(reading.score)
        text, none = reading.embeddings[None], reading.neutral[None]
        rows = max(1, TOKENS_PER_PASS // max(1, len(reading.embeddings)))
        with torch.no_grad():
            here, there = (reading.score(each).item() for each in (text, none))
        points = POINTS
        while True:
            found = integral.attribute(text, none, n_steps=points, internal_batch_size=rows)[0].double().sum(1)
            gap = here - there - found.sum().item()
            if abs(gap) <= OPEN_SHARE * found.abs().sum().item() or points >= MOST_POINTS:
                break
            points *= 2
        for of_token, shares in zip(found.tolist(), reading.shares, strict=True):
            for token, share in shares:
                values[token] += weight * share * of_token
        score, neutral, left = score + weight * here, neutral + weight * there, left + weight * gap
        most = max(most, points)
    return Attribution(tuple(values), score, neutral, left, most)


def policy_attribution(
    policy: Policy, episode: Episode, *, column: int | None = None, temperature: float = 1.0
) -> Attribution:
    """What each token of the episode, prompt included, adds to the log-prob of the token in `column` (nats).

    None asks about all that the model chose. What is written stays the same; what it is predicted from changes.
    ConfigError for a column that the model did not choose.
    """
    chosen = [at for at, acts in enumerate(episode.action_mask) if acts]
    if column is not None and column not in chosen:
        raise ConfigError(f"{episode.id}: token {column} is none that the model chose")
    columns = chosen if column is None else [column]
    neutral = neutral_id(policy.tokenizer)
    reading = embedded(
        policy.hf_model, episode.tokens, columns,
        prompt=episode.prompt_length, neutral=neutral, temperature=temperature,
    )  # fmt: skip
    return attribute([reading], len(episode.tokens))


def reward_attributions(
    rewards: Sequence[Weighted], episode: Episode, tokenizer: Any, step: int
) -> tuple[dict[str, Attribution], list[str]]:
    """By part of the reward, what each token behind the prompt adds to what its learned model pays in `step`.

    And a note for each part that has no gradient, or pays something else than the score of its model.
    ConfigError if no part has a gradient.
    """
    (sample,) = Scene(to_batch([episode], Controls()), [episode], tokenizer, step=step).samples
    found: dict[str, Attribution] = {}
    notes = []
    for part in rewards:
        if not part.is_about(episode.item):
            continue
        if not isinstance(part.reward, Reads):
            notes.append(f"reward {part.name!r} has no gradient here: it is not in these numbers")
            continue
        if part.clip is not None:
            notes.append(f"reward {part.name!r} is clipped, which these numbers leave out")
        weight = part.weight_at(step)
        found[part.name] = attribute(part.reward.readings(sample), len(sample.tokens), weight=weight)
    if not found:
        raise ConfigError(
            "no part of the reward is a learned model whose gradient can be taken (token_model, classifier); what any "
            "reward pays for is asked by leaving tokens out"
        )
    return found, notes
