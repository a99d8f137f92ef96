"""The section `method`: what is learnt from, samples and their rewards or answers in the data."""

from typing import Annotated, Literal

from pydantic import Field

from pertoken.config.reading import Section


class Reinforcement(Section):
    """Learn from samples of its own and what rewards say of them; `credit` and `objective` say how."""

    type: Literal["rl"] = "rl"


class GivenAnswers(Section):
    """What all methods have that learn from answers in the data, not from samples."""

    batch: int = Field(default=8, ge=1)
    """Items per step; a step is one update."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Leave out training items with longer rows, prompt and answer together (counted and told); null keeps all, and
    names the first one that the context cannot hold. Held-out items are answered in any case."""


class Sft(GivenAnswers):
    """Supervised fine-tuning on the reference answers; prompts are read and not learnt."""

    type: Literal["sft"] = "sft"
    over: Literal["token", "sequence"] = "token"
    """Average over all tokens of the answers, or over answers of their token means."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that all tokens of the vocabulary get alike, instead of the answer's own: keeps the model
    from being too sure. 0.1 is usual where translation is learnt from the beginning."""


class Pairs(GivenAnswers):
    """What all methods have that compare `task.answer` with `task.rejected`."""

    sft_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the supervised loss of the chosen answers, per token: keeps their probability from falling."""


class Dpo(Pairs):
    """Direct preference optimisation: the chosen answer gains on the rejected one, compared with the reference."""

    type: Literal["dpo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)
    """Implicit reward per nat of log-ratio to the reference; larger stays closer to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of labels that are taken to be wrong."""


class Ipo(Pairs):
    """DPO with a goal for the margin in place of a sigmoid, which cannot be overshot."""

    type: Literal["ipo"] = "ipo"
    beta: float = Field(default=0.1, gt=0)
    """The goal is 1 / (2 beta) nats."""


class Tdpo(Pairs):
    """DPO that holds back the KL to the reference at each token (TDPO2)."""

    type: Literal["tdpo"] = "tdpo"
    beta: float = Field(default=0.1, gt=0)
    """Implicit reward per nat of log-ratio to the reference."""
    alpha: float | None = Field(default=0.5, ge=0)
    """Weight of the KL of the rejected answer exceeding that of the chosen one; null is TDPO1, where both have a
    gradient and weight 1."""


class Simpo(Pairs):
    """Preferences by the mean log-prob of a token, without a reference."""

    type: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0)
    """Score per nat of mean log-prob."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin that the chosen answer must have."""


class Kto(GivenAnswers):
    """Answers that are desirable or not, by themselves (`task.desirable`), or both of each pair (`task.rejected`)."""

    type: Literal["kto"] = "kto"
    batch: int = Field(default=8, ge=2)
    """Items per step, at least two: the baseline takes prompts with the answers of other items."""
    beta: float = Field(default=0.1, gt=0)
    """Implicit reward per nat of log-ratio to the reference."""
    desirable_weight: float = Field(default=1.0, gt=0)
    """Weight of desirable answers."""
    undesirable_weight: float = Field(default=1.0, gt=0)
    """Weight of the others. Weight times number should be about the same for both kinds."""


PairConfig = Dpo | Ipo | Tdpo | Simpo
PreferenceConfig = PairConfig | Kto
OfflineConfig = Sft | PreferenceConfig
"""Methods that learn from answers in the data."""
MethodConfig = Annotated[Reinforcement | OfflineConfig, Field(discriminator="type")]
