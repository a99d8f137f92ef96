"""The configuration of a run: typed, frozen, checked before anything is loaded.

Values come from, later over earlier: the defaults here, YAML files from left to right, and `key.sub=value`
pairs. `algorithm: NAME` stands for a table of settings (`presets.py`) at the place where it is named.
`train(RunConfig(...))` in Python is the same path. Unknown keys are refused with the nearest known name;
combinations that cannot work are refused with what to change.
"""

import copy
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from pertoken.errors import ConfigError, closest
from pertoken.presets import PRESETS
from pertoken.sampling import Sampling


class Section(BaseModel):
    """A part of the configuration: frozen, unknown keys refused, fields documented by the text under them."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def to_yaml(self) -> str:
        """This configuration as YAML, all defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (extra `lora`)."""

    rank: int = Field(default=16, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on adapter inputs; only active with policy.dropout."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter."""


class ValueHeadConfig(Section):
    """A critic: one value per token from the policy's own hidden states."""

    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate of the head; the trunk keeps update.learning_rate."""
    detach_trunk: bool = False
    """Stop the gradient of the value loss at the trunk."""
    coefficient: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    clip: float | None = Field(default=0.2, gt=0)
    """Clip range of the value around its old estimate; null is off."""
    pretrain_steps: int = Field(default=0, ge=0)
    """First steps in which the head alone learns, by the returns that were really had (lambda 1), while the policy
    stays as it is."""


class PolicyConfig(Section):
    """The language model that is trained."""

    model: str = "smollm2-135m-instruct"
    """Embedded name, hub name, model folder, or .gguf file."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix work in bfloat16 (master weights stay float32), or all in float32. auto: bfloat16 where it is fast."""
    device: str = "auto"
    """auto takes a GPU if there is one."""
    lora: LoraConfig | None = None
    """Adapters; null trains all weights."""
    value_head: ValueHeadConfig | None = None
    """Critic; needed by credit.type gae and by nothing else."""
    compile: bool = True
    """Run activations and norms that have no code of their own here through torch.compile where a trial, made once on
    this machine and remembered, says that it pays; false never does."""
    dropout: bool = False
    """Keep the model's dropout in the update pass. Off, log-probs of the same weights are always the same."""


class DocstringsTask(Section):
    """The embedded task: one-line summaries of the documentation of installed Python packages."""

    type: Literal["docstrings"] = "docstrings"
    packages: tuple[str, ...] | None = None
    """Top-level packages to read; null takes the standard library and what pertoken depends on."""
    num_train: int | None = Field(default=None, ge=1)
    """At most this many training items."""
    num_validation: int | None = Field(default=256, ge=1)
    """At most this many validation items."""
    num_test: int | None = Field(default=256, ge=1)
    """At most this many test items."""
    seed: int = 0
    """Orders the items before they are cut."""


class ChatMessage(Section):
    """One message of a chat prompt; `content` is a template over the columns."""

    role: Literal["system", "user", "assistant"]
    """Who speaks."""
    content: str
    """Text with {column} places."""


class FileTask(Section):
    """Your own data: JSONL, JSON, CSV, TSV, Parquet, a folder of them, or a Hugging Face dataset."""

    type: Literal["file"] = "file"
    path: str | dict[Literal["train", "validation", "test"], str]
    """A file, a folder, a hub name, or one path per split."""
    prompt: str | tuple[ChatMessage, ...] = (ChatMessage(role="user", content="{prompt}"),)
    """Template over the columns, plain text or chat messages; double a brace to mean the brace."""
    answer: str | None = "reference"
    """Column with the reference answer (text or list of texts); null if there is none."""
    id: str | None = None
    """Column with a unique id; null numbers the rows."""
    info: tuple[str, ...] = ()
    """Further columns handed to rewards and baselines."""
    rejected: str | None = None
    """Column with an answer that is worse than `answer`, for methods that learn from preferences."""
    desirable: str | None = None
    """Column with true or false: whether `answer` is a good one (method kto)."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Skip and list up to this many unusable rows; one more ends the run."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many items per split."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation, test where the data has no splits."""
    seed: int = 0
    """Decides which rows fall into which split."""


class Reinforcement(Section):
    """Learn from samples of its own and what rewards say of them; `credit` and `objective` say how."""

    type: Literal["rl"] = "rl"


class GivenAnswers(Section):
    """What all methods have that learn from answers in the data, not from samples."""

    batch: int = Field(default=8, ge=1)
    """Items per step; a step is one update."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Leave out items with longer rows, prompt and answer together (counted and told); null keeps all, and names the
    first one that the context cannot hold."""


class Sft(GivenAnswers):
    """Supervised fine-tuning on the reference answers; prompts are read and not learnt."""

    type: Literal["sft"] = "sft"
    over: Literal["token", "sequence"] = "token"
    """Average over all tokens of the answers, or over answers of their token means."""


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


class RolloutConfig(Section):
    """What is sampled in each step."""

    prompts_per_step: int = Field(default=8, ge=1)
    """Distinct prompts per step."""
    samples_per_prompt: int = Field(default=8, ge=1)
    """Completions of each prompt: the group that baselines compare."""
    redraws: int = Field(default=0, ge=0)
    """Replace groups whose samples all earn the same, which teach nothing, by those of other prompts, drawn in at most
    this many further rounds (dynamic sampling); 0 takes groups as they come."""
    sampling: Sampling = Sampling()
    """Sampling controls; the update trains exactly the distribution that they define."""
    engine: Literal["native", "transformers"] = "native"
    """Who generates: the engine made for rollouts, or plain transformers.generate, which is slower and takes any model
    that can generate; both draw the same tokens."""
    max_rows: int = Field(default=64, ge=1)
    """Most sequences decoded at once."""
    ahead: bool = False
    """Draw the samples of the next step while the rewards of this one are computed, with the weights before its update.
    It pays where rewards take long. Importance weights (`objective.importance_cap`) correct for the update between."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Leave out training items with longer prompts (counted and told); null keeps all."""


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
    weight: float | tuple[tuple[int, float], ...] = 1.0
    """Factor of this part in the total; or points [step, weight], linear between them and constant outside."""
    clip: tuple[float, float] | None = None
    """Bounds [low, high] of each token's value (of an episode reward: of its number) before normalising and weight."""
    normalise: Literal["none", "batch", "group", "running"] = "none"
    """Sums of the part over an episode become deviations from their mean: in the batch, in the prompt's group, or over
    all episodes so far (running, saved in checkpoints). Then the weight."""
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
    measure: bool = True
    """Score the reference even if no penalty needs it, to log the KL."""


Normalize = Literal["none", "whiten", "scale"]


class CreditSection(Section):
    """What every estimator of credit can be told."""

    normalize: Normalize = "none"
    """Over the batch: whiten to mean 0 and deviation 1, scale to deviation 1 (signs stay), or none."""
    entropy_share: float = Field(default=1.0, gt=0, le=1)
    """Keep the advantages of this share of the batch's tokens, those with the highest entropy; the others learn nothing
    and still count in averages."""
    truncated: Literal["keep", "drop"] = "keep"
    """drop: completions that were cut off get advantage 0; they stay in statistics of their group and in averages."""


class RewardToGo(CreditSection):
    """Credit each token with the discounted rewards from it on."""

    type: Literal["reward_to_go"] = "reward_to_go"
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""
    normalize: Normalize = "whiten"
    """Over the batch: whiten to mean 0 and deviation 1, scale to deviation 1 (signs stay), or none."""


class Gae(CreditSection):
    """Generalised advantage estimation with the value head."""

    type: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """1: unbiased, high variance; 0: one-step, as good as the critic."""
    lam_critic: float | None = Field(default=None, ge=0, le=1)
    """Lambda of what the critic learns (VC-PPO takes 1); null is lam."""
    length_adaptive: float | None = Field(default=None, gt=0)
    """In place of lam: max(0, 1 - 1 / (this * number of tokens)), for each completion its own; VAPO takes 0.05."""
    macro_size: int = Field(default=1, ge=1)
    """Tokens that make one action of the estimator (MA-RLHF takes 5); gamma and lam then count these."""
    normalize: Normalize = "whiten"
    """Over the batch: whiten to mean 0 and deviation 1, scale to deviation 1 (signs stay), or none."""


class GroupRelative(CreditSection):
    """Row total minus the mean of its group, for every action of the row (GRPO)."""

    type: Literal["group_relative"] = "group_relative"
    scale_by_std: bool = True
    """Divide by the group's standard deviation (GRPO); off is Dr. GRPO."""


class GroupProcess(CreditSection):
    """Scored tokens normalised over the group, then summed to go (GRPO with process rewards)."""

    type: Literal["group_process"] = "group_process"
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""
    scale_by_std: bool = True
    """Divide by the group's standard deviation of token rewards."""


class LeaveOneOut(CreditSection):
    """Row total minus the mean of the other rows of its group (RLOO)."""

    type: Literal["leave_one_out"] = "leave_one_out"


class LeaveOneOutProcess(CreditSection):
    """Reward-to-go of each token minus the mean reward-to-go of the other rows at the same position."""

    type: Literal["leave_one_out_process"] = "leave_one_out_process"
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""


class OptimalTokenBaseline(CreditSection):
    """Reward-to-go of each token minus the group's mean of it, rows weighted by the size of their gradients so far."""

    type: Literal["optimal_token_baseline"] = "optimal_token_baseline"
    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token."""


class SelfCritical(CreditSection):
    """Row total minus that of the greedy answer to the same prompt, which is drawn for it (SCST, ReMax)."""

    type: Literal["self_critical"] = "self_critical"


class PartCredit(Section):
    """How one part of the reward becomes advantages."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token, with by: token."""
    by: Literal["token", "episode"] = "token"
    """token: as leave_one_out_process; episode: as group_relative."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divide by the standard deviation of the part's totals over the group or the batch, or not."""


class PerPart(PartCredit, CreditSection):
    """Each part of the reward in its own scale, then added up by weight (GDPO, by tokens)."""

    type: Literal["per_part"] = "per_part"
    parts: dict[str, PartCredit] = Field(default_factory=dict)
    """Other settings for single parts, by name."""
    normalize: Normalize = "whiten"
    """Over the batch: whiten to mean 0 and deviation 1, scale to deviation 1 (signs stay), or none."""

    def of(self, part: str) -> PartCredit:
        """The settings of a part."""
        return self.parts.get(part, self)


CreditConfig = Annotated[
    RewardToGo
    | Gae
    | GroupRelative
    | GroupProcess
    | LeaveOneOut
    | LeaveOneOutProcess
    | OptimalTokenBaseline
    | SelfCritical
    | PerPart,
    Field(discriminator="type"),
]


def _task_type(values: Any) -> str:
    """A task that names a path reads files; so a recipe is moved to other data by `task.path=...` alone."""
    if not isinstance(values, dict):
        return str(getattr(values, "type", ""))
    return str(values.get("type") or ("file" if "path" in values else "docstrings"))


TaskConfig = Annotated[
    Annotated[DocstringsTask, Tag("docstrings")] | Annotated[FileTask, Tag("file")], Discriminator(_task_type)
]


class ObjectiveConfig(Section):
    """From advantages to the loss: ratio, surrogate, corrections, aggregation."""

    surrogate: Literal["policy_gradient", "clipped", "cispo"] = "clipped"
    """policy_gradient: -log-prob * advantage; clipped: PPO's clipped ratio; cispo: -log-prob * advantage * the clipped
    ratio as a constant, so that every token keeps a gradient."""
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


class UpdateConfig(Section):
    """How the loss moves the weights."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to final_share of the peak at stop.steps."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises linearly to its peak."""
    final_share: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak learning rate left at the last step (linear, cosine)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay on matrices."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's averaging factors."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the global gradient norm; null is off."""
    epochs: int = Field(default=1, ge=1)
    """Passes over each step's samples."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps per pass."""
    stop_kl: float | None = Field(default=None, gt=0)
    """End the update of a step before an optimiser step at which the policy has moved this many nats per token (mean of
    k3 between the policy before the update and now); null makes all epochs and minibatches."""
    tokens_per_micro_batch: int = Field(default=2048, ge=1)
    """Tokens per forward and backward, a prompt that rows share counted once; less takes less memory, and gradients
    add up to the same as in one piece."""
    recompute_activations: bool = False
    """Keep the input of each layer alone for the backward pass and compute the rest again there: the same gradient,
    far less memory per token, about a third more time."""
    max_skipped: int = Field(default=5, ge=0)
    """Updates with a non-finite loss or gradient are skipped; one more than this ends the run."""


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
    """How many items; 0 turns evaluation off."""
    every: int | None = Field(default=None, ge=1)
    """Also after every so many steps; null evaluates before and after only."""
    metric: str = "rouge_l"
    """The metric that stop conditions, the verdict and the best checkpoint go by."""
    sampling: Sampling = Sampling(temperature=0.0)
    """How held-out answers are generated; greedy unless set."""


class CheckpointConfig(Section):
    """What is kept to go on from."""

    every: int | None = Field(default=None, ge=1)
    """Save after every so many steps; an interrupted run saves in any case."""
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


class RunConfig(Section):
    """Everything that a run depends on."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Names the run folder."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides items, samples and minibatches."""
    folder: str | None = None
    """Run folder; null makes runs/<name>-<seed>."""
    algorithm: str | None = None
    """A published method by its name (`pertoken algorithms` lists them): stands for the settings of its table, over
    which keys beside it and in later files or overrides win; null is the settings below."""
    policy: PolicyConfig = PolicyConfig()
    method: MethodConfig = Reinforcement()
    """Learn from samples and rewards (rl), or from answers in the data; sections that a method does not use are named
    when the run begins."""
    task: TaskConfig = DocstringsTask()
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = Field(default=(RewardConfig(name="rouge_l"),), min_length=1)
    """Parts of the reward; each scores the tokens that it is about, and they add up."""
    kl: KLConfig = KLConfig()
    credit: CreditConfig = LeaveOneOutProcess()
    objective: ObjectiveConfig = ObjectiveConfig()
    update: UpdateConfig = UpdateConfig()
    stop: StopConfig = StopConfig(steps=100)
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guards: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()

    @property
    def run_folder(self) -> Path:
        return Path(self.folder or f"runs/{self.name}-{self.seed}")

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, values: Any) -> Any:
        return _expand(values) if isinstance(values, dict) else values

    @property
    def offline(self) -> OfflineConfig | None:
        """The method, if it learns from answers in the data."""
        return None if isinstance(self.method, Reinforcement) else self.method

    @model_validator(mode="after")
    def _can_work(self) -> "RunConfig":
        for impossible, sentence in self._impossible():
            if impossible:
                raise ValueError(sentence)
        return self

    def _impossible(self) -> Iterable[tuple[bool, str]]:
        rollout, credit, stop = self.rollout, self.credit, self.stop
        group_credit = credit.type not in ("reward_to_go", "gae", "self_critical")
        objective = self.objective
        named = [reward.name or str(reward.fn).rpartition(":")[2] for reward in self.rewards]
        beside = [reward.name or str(reward.fn).rpartition(":")[2] for reward in self.guards.beside]
        both = [part for part in beside if part in named]
        strangers = [part for part in getattr(credit, "parts", {}) if part not in (*named, "kl", "env")]
        rows = rollout.prompts_per_step * rollout.samples_per_prompt
        needs_evaluation = stop.metric is not None or stop.patience is not None
        yield (
            rollout.ahead and self.objective.importance_cap is None,
            "rollout.ahead samples with the weights of one update before, and objective.importance_cap null does not "
            "correct for it. Set a cap (2.0), or rollout.ahead=false.",
        )
        yield (
            rollout.sampling.greedy,
            "rollout.sampling.temperature is 0: a greedy token has no probability to learn from. Use a temperature "
            "above 0 for training; evaluation.sampling may be greedy.",
        )
        yield (
            credit.type == "gae" and self.policy.value_head is None,
            "credit.type gae needs a critic: set policy.value_head (for its defaults: policy.value_head={}).",
        )
        yield (
            credit.type != "gae" and self.policy.value_head is not None,
            f"policy.value_head is set, but credit.type {credit.type} never asks it: use credit.type gae or drop it.",
        )
        yield (
            group_credit and rollout.samples_per_prompt < 2,
            f"credit.type {credit.type} compares the samples of a prompt: rollout.samples_per_prompt must be at least "
            "2 (or use credit.type reward_to_go).",
        )
        yield (
            objective.importance_outside == "truncate"
            and (objective.importance_level == "geometric" or objective.importance_floor > 0),
            "objective.importance_level geometric and objective.importance_floor say what is left out: set "
            "objective.importance_outside=mask.",
        )
        yield (
            objective.importance_cap is not None and objective.importance_floor >= objective.importance_cap,
            f"objective.importance_floor {objective.importance_floor} is not below objective.importance_cap "
            f"{objective.importance_cap}: every weight would be left out.",
        )
        yield (
            objective.entropy_floor is not None and not objective.entropy_coefficient,
            "objective.entropy_floor is set, but nothing is paid below it: set objective.entropy_coefficient (0.01).",
        )
        yield (
            rollout.redraws > 0 and rollout.ahead,
            "rollout.redraws needs the rewards of a step before its samples are complete, and rollout.ahead draws "
            "without them: leave one of them out.",
        )
        yield (
            rollout.redraws > 0 and not group_credit,
            f"rollout.redraws leaves out groups without a difference; credit.type {credit.type} learns from them too.",
        )
        yield (
            rollout.redraws > 0 and any(r.constraint or r.normalise == "running" for r in self.rewards),
            "rollout.redraws scores samples that are then left out; a reward with a constraint or normalise: running "
            "would remember them. Leave one of them out.",
        )
        yield (
            credit.type == "self_critical" and any(r.constraint or r.normalise != "none" for r in self.rewards),
            "credit.type self_critical compares a sample with the greedy answer in the same units; a reward with a "
            "constraint or normalise has others for each batch. Leave them out.",
        )
        yield (
            credit.type == "gae" and credit.macro_size > 1 and credit.length_adaptive is not None,
            "credit.length_adaptive counts tokens, credit.macro_size makes actions of several: leave one of them out.",
        )
        yield (
            bool(strangers),
            f"credit.parts.{''.join(strangers[:1])}: no reward has that name; there are {', '.join(named)}.",
        )
        yield (
            bool(both),
            f"guards.beside: {''.join(both[:1])} is in the reward already; what is measured beside it must not be.",
        )
        yield (
            self.update.minibatches > rows,
            f"update.minibatches {self.update.minibatches} exceeds the {rows} samples of a step.",
        )
        offline, method = self.offline is not None, f"method.type {self.method.type}"
        yield (
            offline and (self.update.minibatches > 1 or self.update.epochs > 1),
            f"{method} makes one update of each batch: update.minibatches and update.epochs must be 1; method.batch "
            "and stop.steps say how much is seen in an update, and how often.",
        )
        yield (
            offline and self.policy.value_head is not None,
            f"policy.value_head is set, but {method} trains no critic: drop it.",
        )
        yield (
            offline and (stop.kl is not None or self.kl.target is not None),
            f"{method} samples nothing, so there is no KL to look at: leave out stop.kl and kl.target.",
        )
        pairs_of = self.task if isinstance(self.task, FileTask) else None
        yield (
            isinstance(self.method, Pairs) and (pairs_of is None or pairs_of.rejected is None),
            f"{method} compares two answers: name the column of the worse one in task.rejected.",
        )
        yield (
            self.method.type == "kto"
            and (pairs_of is None or (pairs_of.rejected is None) == (pairs_of.desirable is None)),
            f"{method} needs to know which answers are good: name a column of true and false in task.desirable, or one "
            "of worse answers in task.rejected (and not both).",
        )
        yield (
            all(value is None for value in stop.model_dump().values()),
            "stop: nothing would end this run; set at least one of " + ", ".join(StopConfig.model_fields) + ".",
        )
        yield (
            self.update.schedule != "constant" and stop.steps is None,
            f"update.schedule {self.update.schedule} falls towards the last step: set stop.steps.",
        )
        yield (
            needs_evaluation and (self.evaluation.items == 0 or self.evaluation.every is None),
            "stop.metric and stop.patience need evaluations while training: set evaluation.items and evaluation.every.",
        )
        yield (
            stop.kl is not None and self.kl.place == "none" and not self.kl.measure,
            "stop.kl needs the KL to be measured: set kl.measure=true.",
        )
        yield (
            self.kl.target is not None and self.kl.place == "none",
            "kl.target adapts a penalty, but kl.place is none: set kl.place to reward or loss.",
        )


def load_config(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration of YAML `files` (later over earlier) and `key.sub=value` overrides.

    Raises ConfigError naming the file or key, what was expected, and the nearest known name.
    """
    merged = _merged_run(files, overrides)
    if "stages" in merged:
        raise ConfigError(
            "stages: only `pertoken train` takes a chain; for all else there is config.yaml in the folder of each stage"
        )
    return validate(merged)


def load_stages(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[RunConfig]:
    """The configurations of a chain, one per entry of `stages`; of a file without `stages` that of its one run.

    An entry has a `name` and what differs from the rest of the file. Its run folder lies in that of the chain, and its
    `policy.model` is what the stage before it has trained.
    """
    merged = _merged_run(files, overrides)
    if "stages" not in merged:
        return [validate(merged)]
    stages = merged.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError("stages: expected a list of sections, each with a `name` and what differs in it")
    folder, found = validate(merged).run_folder, list[RunConfig]()
    for place, stage in enumerate(stages):
        where = f"stages.{place}"
        if not isinstance(stage.get("name"), str) or stage["name"] in (config.name for config in found):
            raise ConfigError(f"{where}.name: each stage needs a name of its own, got {stage.get('name')!r}")
        if "folder" in stage or "seed" in stage:
            raise ConfigError(f"{where}: `folder` and `seed` are those of the chain; set them at the top of the file")
        values = _merge(merged, _expand(stage)) | {"folder": str(folder / stage["name"])}
        if found:
            if "model" in (stage.get("policy") or {}):
                raise ConfigError(
                    f"{where}.policy.model: it is what stage {found[-1].name!r} has trained; leave it out"
                )
            values["policy"] = {**values["policy"], "model": str(found[-1].run_folder / "model")}
        try:
            found.append(validate(values))
        except ConfigError as error:
            raise ConfigError(f"{where} ({stage['name']}): {error}") from None
    return found


S = TypeVar("S", bound=Section)


def load_settings(kind: type[S], files: Sequence[str | Path], overrides: Sequence[str] = ()) -> S:
    """Settings of another kind, with errors as of `load_config`."""
    return validate(_merged({}, files, overrides), kind)


def overrides_of(texts: Sequence[str]) -> dict[str, Any]:
    """The values of `key.sub=value` pairs, nested."""
    values: dict[str, Any] = {}
    for text in texts:
        _set(values, text)
    return values


def _merged_run(files: Sequence[str | Path], overrides: Sequence[str]) -> dict[str, Any]:
    """Of a run: the defaults, under the files from left to right, under the overrides."""
    return _merged(RunConfig().model_dump(mode="json", exclude={"task"}), files, overrides, _expand)


def _merged(
    merged: dict[str, Any],
    files: Sequence[str | Path],
    overrides: Sequence[str],
    expand: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Files over `merged`, overrides over them; `expand` tells what the values of a file stand for."""
    for file in files:
        merged = _merge(merged, expand(_read_yaml(Path(file))))
    for override in sorted(overrides, key=lambda text: not text.startswith("algorithm=")):
        _set(merged, override)
        if override.startswith("algorithm="):
            merged = _merge(merged, expand({"algorithm": merged["algorithm"]}))
    return merged


def _expand(values: dict[str, Any]) -> dict[str, Any]:
    """`values` over the settings that their `algorithm` stands for."""
    name = values.get("algorithm")
    if name is None:
        return values
    if name not in PRESETS:
        raise ConfigError(f"algorithm: unknown name {str(name)[:60]!r}; {closest(str(name), PRESETS)}")
    return _merge(copy.deepcopy(dict(PRESETS[name].settings)), values)


@overload
def validate(values: Mapping[str, Any]) -> RunConfig: ...
@overload
def validate(values: Mapping[str, Any], kind: type[S]) -> S: ...
def validate(values: Mapping[str, Any], kind: type[Section] = RunConfig) -> Section:
    """`kind(**values)` with every error in plain words, one line each."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_in_words(each, kind) for each in error.errors()))) from None


MAX_VALUES = 100_000
"""Most values in one YAML text, aliases written out: a few lines of aliases can stand for billions."""


class _Loader(yaml.SafeLoader):
    """The safe loader (plain values only), with a bound on what merge keys (`<<`) copy."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "merge keys copy too much", node.start_mark)


def _parse(text: str, where: str) -> Any:
    """The value of a YAML text; ConfigError if it is too deep, too large, or holds text that cannot be written."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply for a configuration") from None
    except ValueError as error:  # a number of thousands of digits, a day that no calendar has
        raise ConfigError(f"{where}: {error}") from None
    open_values, seen = [value], 0
    while open_values:
        part = open_values.pop()
        seen += 1
        if seen > MAX_VALUES:
            raise ConfigError(f"{where}: more than {MAX_VALUES} values, or one that holds itself; are aliases meant?")
        if isinstance(part, dict):
            open_values += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            open_values += part
        elif isinstance(part, str):
            _refuse_unwritable(part, where)
    return value


def _refuse_unwritable(text: str, where: str) -> None:
    """Text that has no place in a file or in a file name is found here, not when the run has begun."""
    if "\0" in text:
        raise ConfigError(f"{where}: a NUL character in {text[:60]!a}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: half a character (U+{ord(text[error.start]):04X}) at {error.start} of {text[:60]!a}; "
            "only whole Unicode characters can be written to files"
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = _parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" {closest(str(path), near)}" if near else ""
        raise ConfigError(f"no configuration file {str(path)!r}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top, got {type(content).__name__}")
    return content


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section; a section of another `type` replaces the old one whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        same_type = (
            isinstance(old, dict) and isinstance(value, dict) and old.get("type") == value.get("type", old.get("type"))
        )
        merged[key] = _merge(old, value) if same_type and isinstance(old, dict) else value
    return merged


def _set(target: Any, override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"{override!r}: expected key.sub=value, for instance update.learning_rate=1e-5")
    *path, last = key.split(".")
    try:
        value = _parse(text, ascii(key))
    except yaml.YAMLError:
        value = _parse(json.dumps(text), ascii(key))
    for depth, name in enumerate(path):
        if isinstance(target, list):
            target = target[_index(target, name, key)]
            continue
        if not isinstance(target.get(name), dict | list):
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict | list):
            raise ConfigError(f"{key}: {'.'.join(path[: depth + 1])} is not a section")
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    elif last == "type" and target.get("type") != value:
        target.clear()  # the old type's fields mean nothing to the new one
        target["type"] = value
    else:
        target[last] = value


def _index(target: list[Any], name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(target):
        raise ConfigError(f"{key}: {name!r} is not a place in a list of {len(target)}")
    return int(name)


def _in_words(error: Any, kind: type[BaseModel]) -> str:
    """One pydantic error as `where: what, hint`."""
    location = [part for part in error["loc"] if not (isinstance(part, str) and "[" in part)]
    section, path = _walk(location, kind)
    where = ".".join(path) or "config"
    if error["type"] == "extra_forbidden":
        known = section.model_fields if section is not None else {}
        parent = ".".join(path[:-1])
        return f"{where}: unknown key{f' in {parent}' if parent else ''}; {closest(path[-1], known)}"
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip("' ") for tag in error["ctx"]["expected_tags"].split(",")]
        return f"{where}.type: unknown type {error['ctx']['tag']!r}; {closest(error['ctx']['tag'], tags)}"
    if error["type"] == "value_error" and not path:
        return str(error["ctx"]["error"])
    return f"{where}: {error['msg'].removeprefix('Value error, ')} (got {error['input']!r})"[:400]


def _walk(location: Sequence[Any], kind: type[BaseModel]) -> tuple[type[BaseModel] | None, list[str]]:
    """The section of `kind` that a pydantic location lies in, and the location without the tags of unions."""
    section: type[BaseModel] | None = kind
    path: list[str] = []
    options: list[type[BaseModel]] = []
    for k, part in enumerate(location):
        tagged = [m for m in options if _tag(m) == part]
        if tagged:
            section, options = tagged[0], []
            continue
        path.append(str(part))
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            if k < len(location) - 1 and not isinstance(part, int):
                section = None
            continue
        options = _models_in(field.annotation)
        if k < len(location) - 1:
            section = options[0] if options else None
    return section, path


def _tag(model: type[BaseModel]) -> str | None:
    return str(model.model_fields["type"].default) if "type" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that an annotation can hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def explain(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every field as (dotted name, type, default, description), in the order of the configuration."""
    rows = []
    for name, field in model.model_fields.items():
        sections = _models_in(field.annotation)
        optional = type(None) in typing.get_args(field.annotation)
        listed = typing.get_origin(field.annotation) is tuple
        default = "(required)" if field.is_required() else _short(field.default)
        if not sections or optional or listed or field.description:
            rows.append((prefix + name, _type_name(field.annotation), default, field.description or ""))
        for section in sections:
            tag = _tag(section)
            label = f"{prefix}{name}.0" if listed else prefix + name
            if tag is not None:
                rows.append((f"{label} (type: {tag})", "section", "", (section.__doc__ or "").split("\n")[0]))
            elif not optional and not listed:
                rows.append((label, "section", "", (section.__doc__ or "").split("\n")[0]))
            rows += [row for row in explain(section, label + ".") if not row[0].endswith(".type")]
    return rows


def _short(value: Any) -> str:
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value and isinstance(value[0], BaseModel)):
        return ""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " | ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        names = [_type_name(a) for a in typing.get_args(annotation)]
        return " | ".join("null" if n == "NoneType" else n for n in names)
    if typing.get_origin(annotation) is Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (tuple, dict):
        return "list" if typing.get_origin(annotation) is tuple else "map"
    name = str(annotation.__name__)
    return {"str": "text", "bool": "true | false"}.get(name, name)
