"""The section `policy`: the language model that is trained."""

from typing import Literal

from pydantic import Field

from pertoken.config.reading import Section


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


class LanguagesConfig(Section):
    """What a model that translates between many languages reads and writes, as its tokenizer names them."""

    source: str
    """Language of the prompts, `eng_Latn` for instance (NLLB), `en_XX` (mBART-50) or `en` (M2M100)."""
    target: str
    """Language of the completions: each of them stands behind the token of this language."""


class PolicyConfig(Section):
    """The language model that is trained."""

    model: str = "smollm2-135m-instruct"
    """Embedded name, hub name, model folder, or .gguf file."""
    trust_remote_code: str | None = Field(default=None, pattern="^([0-9a-f]{40}|[0-9a-f]{64})$")
    """Python code of the model that may run: the commit of its repository on the hub as you have read it (its weights
    are taken from there too), or of a folder the digest that its refusal names. null runs none."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Matrix work in bfloat16 (master weights stay float32), or all in float32. auto: bfloat16 where it is fast."""
    languages: LanguagesConfig | None = None
    """For models that translate between many languages; null for all others."""
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
