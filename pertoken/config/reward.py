"""The sections `rewards` and `kl`: what is paid, and what the distance to the reference costs."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pertoken.config.reading import Section
from pertoken.schedule import Points


class ConstraintConfig(Section):
    """A bound that a part of the reward keeps on average; its weight is found while training."""

    least: float
    """What the part's sum over an episode is at least, on average: of a cost of 1 a mistake, -2 means two."""
    rate: float = Field(default=0.05, gt=0)
    """How much the weight moves in a step, per unit that the mean is off the bound."""
    start: float = Field(default=0.0, ge=0)
    """The weight of the first step."""
    largest: float = Field(default=10.0, gt=0)
    """What the weight never exceeds."""


class RewardConfig(BaseModel):
    """One part of the reward. Keys beyond these are parameters of the reward itself."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    name: str | None = None
    """Name of a built-in or installed reward; also names the part in logs."""
    fn: str | None = None
    """`module:function` of your own reward."""
    weight: float | Points = 1.0
    """Factor of this part in the total; or points [step, weight], linear between them and constant outside."""
    clip: tuple[float, float] | None = None
    """Bounds [low, high] of each token's value (of an episode reward: of its number) before normalising and weight."""
    normalise: Literal["none", "batch", "task", "group", "running"] = "none"
    """Sums of the part over an episode become deviations from their mean: in the batch, in the batch's episodes of the
    same task, in the prompt's group, or over all episodes so far (running, saved in checkpoints). Then the weight."""
    tasks: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Of a mixture, the tasks that it is about: it has no opinion on the others; null is about all."""
    constraint: ConstraintConfig | None = None
    """Find the weight that keeps a bound, in place of `weight`."""
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds that it may take for the completions of a step; with `processes`, for each of them (for all, if it looks
    at them together). Then it has failed. null waits for ever."""
    processes: int = Field(default=0, ge=0)
    """Run it in so many processes of its own: they share the completions, and one that hangs or crashes is replaced. A
    reward that remembers or looks at completions together has one. 0 runs it in the training process."""
    memory_limit: float | None = Field(default=None, gt=0)
    """With processes: GB that each may take; one that has grown beyond is replaced. null is without bound."""
    attempts: int = Field(default=1, ge=1)
    """How often a completion that it fails on is tried in all."""
    max_failed_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the completions of a step that it may fail on: they count 0, are compared with no other, and are told.
    One more ends the run, saved."""

    @model_validator(mode="after")
    def _named(self) -> "RewardConfig":
        if not (self.name or self.fn):
            raise ValueError("a reward needs `name` (built-in) or `fn` (module:function)")
        if self.constraint and (self.weight != 1.0 or self.normalise != "none"):
            raise ValueError("a constraint finds the weight, in units of the part: leave out `weight` and `normalise`")
        if self.memory_limit is not None and not self.processes:
            raise ValueError("memory_limit bounds processes of the reward's own: set `processes`")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class KLConfig(Section):
    """How far the policy may move from the reference (the model before training)."""

    place: Literal["reward", "loss", "none"] = "reward"
    """reward: each token pays coefficient * (log-prob - reference log-prob), the exact gradient of the sequence KL
    with reward-to-go; loss: a per-token term in the loss; none: no penalty."""
    coefficient: float = Field(default=0.05, ge=0)
    """Weight of the penalty (its starting value if target is set)."""
    target: float | None = Field(default=None, gt=0)
    """Adapt the coefficient to keep the KL per sequence near this many nats; null keeps it fixed."""
    horizon: int = Field(default=2000, ge=1)
    """Sequences over which the adaptive coefficient moves; larger is slower."""
    estimator: Literal["ratio_k3", "k2", "k3", "exact"] = "ratio_k3"
    """Only for place: loss. ratio_k3 and k2 give the gradient of KL(policy || reference) from the sampled tokens, k3
    that of KL(reference || policy); exact sums over the vocabulary: no noise, and another pass of the head."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Move the reference to the policy after every so many steps; null leaves it where it is. The KL of before is gone
    from the figures then, and from stop.kl."""
    refresh_share: float = Field(default=1.0, gt=0, le=1)
    """How far: 1 makes it the policy of now, TR-DPO takes 0.6."""
    measure: bool = True
    """Score the reference even if no penalty needs it, to log the KL."""
