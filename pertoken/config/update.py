"""The sections `objective` and `update`: from advantages to a loss, and from that to weights that have moved."""

from typing import Literal

from pydantic import Field, model_validator

from pertoken.config.reading import Section


class ObjectiveConfig(Section):
    """From advantages to the loss: ratio, surrogate, corrections, aggregation."""

    surrogate: Literal["policy_gradient", "clipped", "cispo", "dppo"] = "clipped"
    """policy_gradient: -log-prob * advantage; clipped: PPO's clipped ratio; cispo: -log-prob * advantage * the clipped
    ratio as a constant, so that every token keeps a gradient; dppo: the same without tokens whose probability has moved
    by more than clip_low or clip_high already."""
    level: Literal["token", "sequence", "sequence_token"] = "token"
    """Ratio of each token; or the geometric mean over its row (GSPO), or that value with each token's own gradient
    (GSPO-token), which keeps token-level credit."""
    clip_low: float = Field(default=0.2, gt=0, le=1)
    """The ratio counts down to 1 - clip_low; 1 sets no lower bound."""
    clip_high: float = Field(default=0.2, gt=0)
    """The ratio counts up to 1 + clip_high."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound on the loss of tokens with negative advantage, as a multiple of it; null is off."""
    importance_cap: float | None = Field(default=2.0, gt=0)
    """Weight tokens by min(training / sampling probability, cap), which corrects the drift of a bfloat16 rollout;
    null is off."""
    importance_floor: float = Field(default=0.0, ge=0)
    """With importance_outside mask: tokens (or rows) whose weight is below this are left out too."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """Weight each token by its own ratio, all by the product over the row, or (mask) each by its own while the
    geometric mean over the row decides whether the row is left out."""
    importance_outside: Literal["truncate", "mask"] = "truncate"
    """What becomes of weights over the cap: held at it (TIS), or 0 (IcePop by token, MIS by row)."""
    entropy_coefficient: float = 0.0
    """Reward for a broad next-token distribution, in the loss."""
    entropy_floor: float | None = Field(default=None, gt=0)
    """Pay entropy_coefficient only in steps whose mean entropy per token (nats) is below this; null always pays it."""
    over: Literal["token", "sequence", "constant"] = "token"
    """Average over all tokens, over sequences of their token means, or divide by rows * max_new_tokens."""

    @model_validator(mode="after")
    def _by_token(self) -> "ObjectiveConfig":
        if self.surrogate == "dppo" and self.level != "token":
            raise ValueError(f"surrogate dppo bounds each token by itself: level token, not {self.level}")
        return self


class TrustRegionConfig(Section):
    """One natural-gradient step of all samples, as far as a bound on the KL lets it, in place of AdamW (TRPO)."""

    kl: float = Field(default=0.01, gt=0)
    """Nats per token that a step may move the policy: mean over tokens of KL(before || after) over the vocabulary."""
    iterations: int = Field(default=10, ge=1)
    """Of conjugate gradients; each takes two forward and backward passes over the samples."""
    damping: float = Field(default=0.1, ge=0)
    """Added to the curvature in every direction; more is nearer to the plain gradient, and makes shorter steps."""
    shrink: float = Field(default=0.8, gt=0, lt=1)
    """What a step that does not lower the loss, or exceeds the KL, is multiplied by."""
    tries: int = Field(default=10, ge=1)
    """Lengths that are tried; if none will do the policy stays as it is."""


class UpdateConfig(Section):
    """How the loss moves the weights."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine", "kl", "plateau"] = "constant"
    """After warm-up: stay; fall to final_share of the peak at stop.steps (linear, cosine); follow how far an update
    moves the policy (kl, by target_kl); or fall when held-out evaluation.metric gets no better (plateau)."""
    target_kl: float | None = Field(default=None, gt=0)
    """For schedule kl: nats per token that an update should move the policy. After one of more than twice as many the
    rate is divided by 1.5, after one of less than half multiplied, between final_share of the peak and the peak."""
    plateau_patience: int = Field(default=2, ge=1)
    """For schedule plateau: evaluations without a new best after which the rate falls."""
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    """For schedule plateau: what the rate is multiplied by then, down to final_share of the peak."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly to its peak."""
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak learning rate left at the last step (linear, cosine), or least share of it (kl, plateau)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging factors."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm; null is off."""
    max_grad_value: float | None = Field(default=None, gt=0)
    """Clip each number of the gradient to +-this, before its norm; null is off."""
    balance: Literal["none", "pcgrad"] = "none"
    """Of a mixture of tasks: add their gradients up as they are, or take out of each what pulls against another first
    (pcgrad); that keeps a gradient of each task in memory."""
    l2_to_initial: float = Field(default=0.0, ge=0)
    """Add this times half the squared distance to the weights before training to the loss; keeps a copy of them."""
    l1_to_initial: float = Field(default=0.0, ge=0)
    """The same with absolute differences."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Keep a running average of the weights, taking 1 - this of the new ones after each step; it is evaluated (as split
    `<split>-ema`) and saved (`model-ema`) beside the policy. null keeps none."""
    trust_region: TrustRegionConfig | None = None
    """Move the policy by TRPO's step, all samples at once; the critic keeps AdamW, whose settings are for it alone
    then. null moves all by AdamW."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each step's samples."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps per pass."""
    stop_kl: float | None = Field(default=None, gt=0)
    """End the update of a step before an optimiser step at which the policy has moved this many nats per token (mean of
    k3 between the policy before the update and now); null makes all epochs and minibatches."""
    tokens_per_micro_batch: int = Field(default=2048, ge=1)
    """Tokens per forward and backward, a prompt that rows share counted once; less takes less memory, and gradients
    add up to the same as in one piece. Halved where they do not fit into memory."""
    recompute_activations: bool = False
    """Keep the input of each layer alone for the backward pass and compute the rest again there: the same gradient,
    far less memory per token, about a third more time."""
    max_skipped: int = Field(default=5, ge=0)
    """Updates with a non-finite loss or gradient are skipped; one more than this ends the run."""
