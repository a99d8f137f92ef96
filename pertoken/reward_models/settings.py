"""The configuration of `pertoken reward train`: what is learned, from which data, by which model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pertoken.config import Section, load_settings


class Preferences(Section):
    """From which of two texts is better: Bradley-Terry over the scores of whole texts, each the sum over its tokens."""

    type: Literal["preferences"] = "preferences"
    prompt: str | None = "prompt"
    """Column with what both texts answer; null if there is none. The model reads it before the text."""
    chosen: str = "chosen"
    """Column with the better text."""
    rejected: str = "rejected"
    """Column with the worse text."""
    total: Literal["sum", "mean"] = "sum"
    """The score of a text is the sum over its tokens, or their mean, for which length by itself counts nothing."""
    shared: float = Field(default=0.0, ge=0)
    """Penalty on |difference| of the scores that a token which both texts share has in each: what decides between two
    versions of a text is then put on the tokens in which they differ. The texts are compared, no label is needed."""
    sparsity: float = Field(default=0.0, ge=0)
    """Penalty on the sum of a text's |token scores|: tokens that decide nothing go to 0."""
    centre: float = Field(default=0.0, ge=0)
    """Penalty on (chosen + rejected)^2, which keeps scores around 0; Bradley-Terry alone fixes differences only."""
    length: float = Field(default=0.0, ge=0)
    """Penalty on the squared correlation of score and number of tokens among the texts of a batch."""


class Spans(Section):
    """From spans of a text with a value: the scores of the tokens of a span add up to it, all others are 0."""

    type: Literal["spans"] = "spans"
    prompt: str | None = None
    """Column with what the text answers; null if there is none. The model reads it before the text."""
    text: str = "text"
    """Column with the text, or with its words as a list."""
    spans: str = "spans"
    """Column with a list of [start, stop, value or label] in characters; for words as a list, a value or label (null:
    none) for each."""
    values: dict[str, float] = Field(default={})
    """What each label is worth; a label that is not named is refused."""


class Steps(Section):
    """From labelled steps of a solution (a process reward): a step's scores add up to the log-odds that it is right."""

    type: Literal["steps"] = "steps"
    prompt: str | None = "prompt"
    """Column with the problem; null if there is none. The model reads it before the steps."""
    steps: str = "steps"
    """Column with the steps, a list of texts."""
    labels: str = "labels"
    """Column with a label for each step: 1 or true for right, 0 or false for wrong, or a share between them."""
    separator: str = "\n"
    """What stands between two steps in a completion."""


class Pairs(Section):
    """From a label of a text or of a pair of texts, as in inference: an ordinary classifier of Hugging Face."""

    type: Literal["pairs"] = "pairs"
    first: str = "premise"
    """Column with the first text."""
    second: str | None = "hypothesis"
    """Column with the second text; null if there is one text only."""
    label: str = "label"
    """Column with the label."""
    labels: tuple[str, ...] = ()
    """The labels, in the order of the model's outputs; empty takes those of the training data, sorted."""


ObjectiveSection = Annotated[Preferences | Spans | Steps | Pairs, Field(discriminator="type")]


class DataSection(Section):
    """Where the examples are; a column may be a path into an object, such as meta.premise."""

    path: str | dict[Literal["train", "validation", "test"], str]
    """A file (JSONL, JSON, CSV, TSV, Parquet), a folder with one per split, a hub name, or one path per split."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Skip and list up to this many unusable rows; one more ends the training before it begins."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many training examples, the first of a seeded order."""
    held_out: int = Field(default=1000, ge=2)
    """At most this many held-out examples, for early stopping and for the figures at the end."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test where the data has no splits; examples of one prompt stay together."""


class ModelSection(Section):
    """The trunk under the new head."""

    trunk: str = "all-minilm-l6-v2"
    """An encoder or causal model of Hugging Face in safetensors: the embedded one (extra `semantics`), a folder or a
    hub name."""
    layers: int | None = Field(default=None, ge=1)
    """Keep the first so many layers only, whose states are closer to their own token; null keeps all."""
    trained: Literal["all", "layers", "head"] = "layers"
    """What learns beside the head: the whole trunk, its layers without the embeddings, or nothing."""
    sign: Literal["free", "cost"] = "free"
    """free: a token's score is any number; cost: it is at most 0, so that text without fault is worth 0."""
    max_tokens: int | None = Field(default=None, ge=8)
    """Largest window; null takes the model's. Longer texts are taken in windows that overlap; a pair is cut."""


class OptimiserSection(Section):
    """How it is trained."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training examples."""
    batch: int = Field(default=16, ge=1)
    """Examples of a step; those of about one length go together."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW; it falls linearly to 0."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """Share of the training, in steps or in `seconds`, in which it rises."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay on matrices."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Clip the global gradient norm."""
    dropout: bool = False
    """Keep the trunk's dropout while training. Its noise hides what `objective.shared` compares."""
    evaluate_every: int | None = Field(default=None, ge=1)
    """Steps between looks at the held-out loss; null looks four times an epoch."""
    patience: int = Field(default=4, ge=1)
    """End after so many looks without a lower held-out loss; the best weights are kept."""
    seconds: float | None = Field(default=None, gt=0)
    """End after this much time, with the best weights so far; null takes the time that it takes."""


class RewardTraining(Section):
    """All of it."""

    folder: str
    """Where the model goes; a folder that does not exist yet."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides the head's first weights, the order of examples, and splits."""
    objective: ObjectiveSection
    data: DataSection
    model: ModelSection = ModelSection()
    optimiser: OptimiserSection = OptimiserSection()

    @model_validator(mode="after")
    def _can_work(self) -> "RewardTraining":
        objective, model = self.objective, self.model
        if objective.type == "steps" and model.sign == "cost":
            raise ValueError("objective.type steps learns log-odds, which may be positive: use model.sign=free")
        if objective.type == "pairs" and (model.sign, model.layers) != ("free", None):
            raise ValueError("objective.type pairs makes an ordinary classifier: leave out model.sign and model.layers")
        if objective.type == "spans" and model.sign == "cost" and any(value > 0 for value in objective.values.values()):
            raise ValueError("objective.values has positive values, and with model.sign=cost no score is: use free")
        return self


def load_training(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> RewardTraining:
    """The settings of YAML `files` (later over earlier) and `key.sub=value` overrides; errors as of `load_config`."""
    return load_settings(RewardTraining, files, overrides)
