"""The sections `stop`, `evaluation`, `checkpoint`, `guards` and `log`: when a run ends, what is measured and kept."""

from typing import Literal

from pydantic import Field

from pertoken.config.reading import Section
from pertoken.config.reward import RewardConfig
from pertoken.sampling import Sampling


class StopConfig(Section):
    """When to end; the first condition that holds. At least one must be set."""

    steps: int | None = Field(default=None, ge=0)
    """After this many steps."""
    tokens: int | None = Field(default=None, ge=1)
    """After this many generated tokens (of answers, where a method learns from those in the data)."""
    seconds: float | None = Field(default=None, gt=0)
    """After this much wall time of training."""
    metric: float | None = None
    """When the held-out evaluation.metric reaches this."""
    patience: int | None = Field(default=None, ge=1)
    """After this many evaluations without a new best."""
    kl: float | None = Field(default=None, gt=0)
    """When the mean KL per sequence to the reference exceeds this many nats."""


class EvaluationConfig(Section):
    """Held-out quality, before, during and after training, on the same items."""

    split: Literal["validation", "test"] = "validation"
    """Which split."""
    items: int = Field(default=128, ge=0)
    """How many items, of a mixture as many of each task as there are; 0 turns evaluation off."""
    every: int | None = Field(default=None, ge=1)
    """Also after every so many steps; null evaluates before and after only."""
    metric: str = "rouge_l"
    """The metric that stop conditions, the verdict and the best checkpoint go by."""
    further: tuple[str, ...] = ()
    """Metrics to measure beside the usual ones: rouge_lsum, ter, coverage, density, compression, abstained,
    abstention_right, final_answer, right_steps; corpus_ter, self_bleu, mauve."""
    beside: tuple[RewardConfig, ...] = ()
    """Rewards that held-out answers are measured by, as `beside/<name>`, and that need not be paid in training: a
    classifier, entailment by the source, perplexity under another model. Written as those in `rewards`."""
    judge: str | None = None
    """Model that `perplexity` and `nats_per_token` are measured under, a name or folder with the vocabulary of the
    policy; null is the one that the run began with. For one with a vocabulary of its own there is the reward
    `perplexity` in `beside`."""
    language: str | None = None
    """Code of the language of the answers: BLEU and TER cut Chinese, Japanese and Korean by their own rules; null cuts
    at spaces and marks."""
    sampling: Sampling = Sampling(temperature=0.0)
    """How held-out answers are generated; greedy unless set."""


class CheckpointConfig(Section):
    """What is kept to go on from."""

    every: int | None = Field(default=None, ge=1)
    """Save after every so many steps; an interrupted run saves in any case."""
    background: bool = False
    """Write it beside the next steps, which takes its memory once more meanwhile. What goes wrong is told at the next
    one, or at the end."""
    keep: int = Field(default=1, ge=1)
    """How many of the newest to keep."""
    keep_best: bool = True
    """Also keep the one with the best held-out evaluation.metric, among those that were evaluated when saved."""


class GuardConfig(Section):
    """Alarms for a reward that is gamed; told and logged (`alarm/<name>`), they change nothing by themselves."""

    window: int = Field(default=10, ge=5)
    """Steps over which a part of the reward that rises is compared with one that falls."""
    stop: bool = False
    """End the run at the first alarm, saved."""
    beside: tuple[RewardConfig, ...] = ()
    """Rewards that are measured on the samples of every step and paid for never, written as those in `rewards`; if one
    falls while the reward rises, `over_optimised` sounds."""


class LogConfig(Section):
    """What is written down besides the figures of every step."""

    episodes_every: int = Field(default=10, ge=1)
    """Write the samples of every so many steps (and of the first and last) with all their token streams."""
    episodes_per_step: int = Field(default=32, ge=0)
    """How many samples of such a step."""
    alternatives: int = Field(default=3, ge=0, le=20)
    """Write down so many of the most probable tokens at each place of a text that is written down, held-out answers
    among them; 0 saves a pass over the samples of such a step, and about 30% of the room of all these texts."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where else the figures go; each needs the extra of its name. One that fails is named and the run goes on."""
    project: str = Field(default="pertoken", min_length=1)
    """What the runs are kept under there."""
