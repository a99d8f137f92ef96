"""The sections of a run's configuration: policy, task, rollout, rewards, credit, objective, and the rest."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from pertoken.config.reading import Section
from pertoken.sampling import Sampling
from pertoken.schedule import Points, Schedule


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


class CurriculumConfig(Section):
    """Training items come in over steps, short prompts or easy ones first; held-out items are all there at any time."""

    prompt_tokens: Points | None = None
    """Longest prompt that a step takes: points [step, tokens], linear between them and constant outside; longer ones
    wait. null sets no bound."""
    difficulty: str | None = None
    """Column with a number, higher for what is harder; of your own data it joins `info`."""
    hardest: Points | None = None
    """Highest difficulty that a step takes: points [step, number], as above."""

    @model_validator(mode="after")
    def _grows(self) -> "CurriculumConfig":
        if (self.difficulty is None) != (self.hardest is None):
            raise ValueError("difficulty names a column and hardest says how much of it is let in: set both")
        if not self.limits:
            raise ValueError("a curriculum needs prompt_tokens, or difficulty and hardest")
        for name, points in self.limits.items():
            if any(later < number for (_, number), (_, later) in pairwise(Schedule(points).points)):
                raise ValueError(f"{name} lets in more over steps, so its numbers never fall; got {list(points)}")
        return self

    @property
    def limits(self) -> dict[str, Points]:
        """What is bounded, and by which points."""
        found = {"prompt_tokens": self.prompt_tokens, "hardest": self.hardest}
        return {name: points for name, points in found.items() if points is not None}


class FoldConfig(Section):
    """One of several equal parts of the items is held out as validation, and the others are learnt from."""

    count: int = Field(default=5, ge=2)
    """How many parts."""
    held_out: int = Field(default=0, ge=0)
    """Which of them is held out, from 0."""
    seed: int = 0
    """Decides which items fall into which part, with the prompts alone: the order of the rows decides nothing."""

    @model_validator(mode="after")
    def _is_one_of_them(self) -> "FoldConfig":
        if self.held_out >= self.count:
            raise ValueError(f"held_out {self.held_out} is none of {self.count} folds: they are 0 to {self.count - 1}")
        return self


class Data(Section):
    """What every task can be told whose items come from one place."""

    fold: FoldConfig | None = None
    """Divide train and validation anew into folds (`pertoken crossval` makes a run of each); null takes them as they
    are. The test split stays what it is."""
    curriculum: CurriculumConfig | None = None
    """Let training items in over steps; null has all of them there from the first."""
    balance: str | None = None
    """Column whose values are classes: each step takes as many items of one as of another. Of your own data it joins
    `info`, unless it is that of `answer`. null takes items as they come."""
    length_window: int | None = Field(default=None, ge=2)
    """Steps that share their items out by length, so that those of one step are alike: by the tokens of their prompts,
    and of their answers where those are learnt from. null takes items as they come."""

    @model_validator(mode="after")
    def _one_order(self) -> "Data":
        if self.length_window is not None and (self.curriculum is not None or self.balance is not None):
            raise ValueError(
                "length_window shares out the items of whole passes, and curriculum and balance pass some over: leave "
                "one of them out"
            )
        return self


class DocstringsTask(Data):
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


class LayoutConfig(Section):
    """One way to read a row."""

    prompt: str | tuple[ChatMessage, ...] | None = None
    """Template over the columns; `{a.b}` is `b` in what column `a` holds. null where `messages` has the prompt."""
    messages: str | None = None
    """Column with a conversation, whose last turn is the answer unless `answer` names another column."""
    answer: str | None = None
    """Column with the answer: a text, a list of texts, or messages of the assistant; null if there is none."""
    source: str | None = None
    """Column of the text that the prompt is about, handed on as `source`."""
    opening: int | None = Field(default=None, ge=1)
    """The column in `prompt` holds a whole text: so many words of it are the prompt, the rest is the answer."""

    @model_validator(mode="after")
    def _has_one_prompt(self) -> "LayoutConfig":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a layout has either `prompt`, a template, or `messages`, a column")
        if self.opening is not None and (self.answer is not None or self.messages is not None):
            raise ValueError("opening divides the column of `prompt` into prompt and answer: leave out `answer`")
        return self


class BackTranslationConfig(Section):
    """Two models that translate: out of the language of the prompts, and back."""

    there: str
    """Model folder or hub name."""
    back: str
    """The same."""
    prompt: str = "{text}"
    """What both are asked, for models that need telling (T5, chat models): a template over `text`, one sentence."""


class AugmentConfig(Section):
    """Changed copies of training items, with the same answers. Held-out items are never touched."""

    word_dropout: float = Field(default=0.0, ge=0, lt=1)
    """A copy of each item without this share of the words of its texts; 0 makes none."""
    synonyms: float = Field(default=0.0, ge=0, le=1)
    """A copy with this share of the words that have synonyms in WordNet replaced by one (English; `python -m
    nltk.downloader wordnet`)."""
    prompts: tuple[str | tuple[ChatMessage, ...], ...] = ()
    """A copy by each of these templates over the columns of the data, in place of the task's own."""
    back_translation: BackTranslationConfig | None = None
    """A copy that was translated and back again, sentence by sentence."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training items that each of these makes copies of."""
    seed: int = 0
    """Decides which items, and what is drawn."""


class FileTask(Data):
    """Your own data: JSONL, JSON, CSV, TSV, Parquet, a folder of them, or a Hugging Face dataset."""

    type: Literal["file"] = "file"
    path: str | dict[Literal["train", "validation", "test"], str]
    """A file, a folder, a hub name, or one path per split."""
    family: str | None = None
    """A family of tasks by its name (docs/tasks.md): stands for ways to read rows, and for rewards, sampling and
    metrics where nothing else is set; null is the settings below."""
    style: Literal["chat", "plain", "bare"] | None = None
    """How a family asks: as a message of the user, as text to go on from, or by the columns alone, for models that do
    one thing; null is as the family does."""
    columns: dict[str, str] | None = None
    """What the names in a family's question are called in the data, such as {document: article}; null looks for the
    usual ones."""
    source_language: str | None = None
    """Of translation: code of the language that is read, such as en."""
    target_language: str | None = None
    """Code of the language that is written, such as de."""
    prompt: str | tuple[ChatMessage, ...] = (ChatMessage(role="user", content="{prompt}"),)
    """Template over the columns, plain text or chat messages; double a brace to mean the brace."""
    answer: str | None = "reference"
    """Column with the reference answer (text or list of texts); null if there is none."""
    layouts: tuple[LayoutConfig, ...] = ()
    """Ways to read a row, in place of `prompt` and `answer`: the first one whose columns a row has is taken."""
    no_answer: str | None = None
    """What the answer is where its column is empty or an empty list; null: such rows are unusable."""
    augment: AugmentConfig | None = None
    """Add changed copies of the training items; null learns from the items as they are."""
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


class FunctionTask(Data):
    """A task that a function makes; further keys are its parameters."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    fn: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`, which returns a task (`pertoken.integrations.reasoning_gym:load_task`, or one of your own)."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many items per split."""

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Reinforcement(Section):
    """Learn from samples of its own and what rewards say of them; `credit` and `objective` say how."""

    type: Literal["rl"] = "rl"


class GivenAnswers(Section):
    """What all methods have that learn from answers in the data, not from samples."""

    batch: int = Field(default=8, ge=1)
    """Items per step; a step is one update."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Leave out training items with longer rows, prompt and answer together (counted and told), and held-out ones that
    the context cannot hold; null keeps all, and names the first one that the context cannot hold."""


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


class ReplayConfig(Section):
    """Learn from samples of earlier steps again, weighted by what the policy makes of them now."""

    share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the prompts of a step whose samples are taken from earlier steps, as far as there are any; as many fewer
    are sampled."""
    steps: int = Field(default=4, ge=1)
    """How many steps back they reach."""
    priority: Literal["none", "advantage"] = "none"
    """none: all kept groups are as likely; advantage: by the mean |advantage| of their tokens when they were new."""


class MaskConfig(Section):
    """A mask policy: an older copy of the policy, whose most probable tokens are all that the policy may sample (NLPO).
    Held-out answers go without it."""

    top_p: float = Field(default=0.9, gt=0, lt=1)
    """Let through the smallest set of its most probable tokens whose mass reaches this, and the end of the text."""
    least: int = Field(default=1, ge=1)
    """But at least so many of them; RL4LMs takes 100."""
    refresh_every: int = Field(default=5, ge=1)
    """Make it the policy of now after every so many steps."""


class TurnsConfig(Section):
    """Several turns in each episode: a tool or a user answers the policy, and what it says is no action. Held-out
    answers are the last turn of such a conversation."""

    fn: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:name` of a class or function that makes who answers: an object with `reply(item, messages)`."""
    parameters: dict[str, Any] = Field(default={})
    """What it is made with."""
    max_turns: int = Field(default=2, ge=1)
    """Most turns of the policy; where the environment would go on, the episode is truncated. sampling.max_new_tokens
    bounds each turn."""
    go_on_when_cut: bool = False
    """Go on behind a turn that its budget of tokens has cut off."""


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
    length_schedule: Points | None = None
    """Most tokens of a completion over steps: points [step, tokens], linear between them (rounded down) and constant
    outside. None is above sampling.max_new_tokens, which stays what objective.over constant divides by; null always
    takes that."""
    mask: MaskConfig | None = None
    """Restrict what may be sampled by an older copy of the policy; a second model in memory and in each step of
    decoding, and the engine must be native. null asks the policy alone."""
    turns: TurnsConfig | None = None
    """Let an environment answer, and the policy go on; null samples one turn."""
    engine: Literal["native", "transformers"] = "native"
    """Who generates: the engine made for rollouts, or plain transformers.generate, which is slower and takes any model
    that can generate; both draw the same tokens."""
    max_rows: int = Field(default=64, ge=1)
    """Most sequences decoded at once."""
    ahead: bool = False
    """Draw the samples of the next step while the rewards of this one are computed, with the weights before its update.
    It pays where rewards take long. Importance weights (`objective.importance_cap`) correct for the update between."""
    replay: ReplayConfig | None = None
    """Take a part of each step from the samples of earlier ones; null samples all anew. Importance weights
    (`objective.importance_cap`) correct for the updates since."""
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Leave out training items with longer prompts (counted and told); null keeps all."""

    @model_validator(mode="after")
    def _lengths_fit(self) -> "RolloutConfig":
        least, most = max(self.sampling.min_new_tokens, 1), self.sampling.max_new_tokens
        for step, tokens in Schedule(self.length_schedule).points if self.length_schedule is not None else ():
            if not least <= tokens <= most:
                raise ValueError(
                    f"length_schedule: {tokens:g} tokens at step {step} are not between {least} and "
                    f"sampling.max_new_tokens, {most}: set that to what the schedule ends with"
                )
        return self


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


class MonteCarlo(CreditSection):
    """What each step of a text adds to the reward that is to be expected, by rollouts from before it (VinePPO)."""

    type: Literal["monte_carlo"] = "monte_carlo"
    rollouts: int = Field(default=4, ge=1)
    """Samples from each state; VinePPO takes 9."""
    after: str = Field(default="\n", min_length=1)
    """A step of the text ends with the token that completes this."""
    every: int | None = Field(default=None, ge=1)
    """A step is so many tokens, whatever the text; null goes by `after`."""
    max_states: int = Field(default=20, ge=1)
    """States of a completion that rollouts begin in; what comes behind the last of them is one step."""
    normalize: Normalize = "whiten"
    """Over the batch: whiten to mean 0 and deviation 1, scale to deviation 1 (signs stay), or none."""


class Redistributed(CreditSection):
    """What all ways have that place the reward of a text anew on its tokens, then credit as leave_one_out_process."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount per action token; 0 gives each token its own share of the reward alone."""
    share: float = Field(default=1.0, ge=0, le=1)
    """How much of the reward is placed anew; the rest stays where it was paid."""


class ByWorth(Redistributed):
    """What all ways have that score texts with tokens taken out, by the rewards of the run."""

    samples: int = Field(default=64, ge=3)
    """Texts that are scored of each completion, at most; where it has more tokens, several of them are one."""


class Shapley(ByWorth):
    """What each token adds to the reward when it joins the others, averaged over random orders of joining."""

    type: Literal["shapley"] = "shapley"
    unit: Literal["token", "word"] = "token"
    """What joins: tokens, or whole words, whose tokens share what they add."""


class LeaveOneTokenOut(ByWorth):
    """What a text loses in reward when a token is taken out; what these do not add up to is on the first token."""

    type: Literal["leave_one_token_out"] = "leave_one_token_out"
    unit: Literal["token", "word"] = "token"
    """What is taken out: a token, or a whole word, whose tokens share what it adds."""


class Differences(ByWorth):
    """What each token adds to the reward of the text up to there (RUDDER, with the rewards themselves)."""

    type: Literal["differences"] = "differences"


class AttentionCredit(Redistributed):
    """Reward by the attention that the last token pays to the others in the last layer (ABC)."""

    type: Literal["attention"] = "attention"
    share: float = Field(default=0.8, ge=0, le=1)
    """How much of the reward is placed anew; the rest stays where it was paid."""
    model: str | None = None
    """Who reads prompt and completion: a folder or hub name, such as the trunk of a reward model; null is the policy
    as it sampled."""


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
    | MonteCarlo
    | PerPart
    | Shapley
    | LeaveOneTokenOut
    | Differences
    | AttentionCredit,
    Field(discriminator="type"),
]


def _task_type(values: Any) -> str:
    """A task that names a path reads files; so a recipe is moved to other data by `task.path=...` alone."""
    if not isinstance(values, dict):
        return str(getattr(values, "type", ""))
    return str(values.get("type") or next((kind for key, kind in _TOLD_BY.items() if key in values), "docstrings"))


_TOLD_BY = {"path": "file", "family": "file", "tasks": "mixture", "fn": "function"}
"""What a section without a type is of, by a key in it."""


class Member(Section):
    """What a task can be told as one of several."""

    weight: float = Field(default=1.0, gt=0)
    """Its share of the prompts is proportional to this."""
    metric: str | None = None
    """Held-out metric that it is followed by; null is evaluation.metric."""


class DocstringsMember(Member, DocstringsTask):
    """The embedded task, as one of several."""


class FileMember(Member, FileTask):
    """Your own data, as one of several tasks."""


class FunctionMember(Member, FunctionTask):
    """A task that a function makes, as one of several."""


class ProgressConfig(Section):
    """More prompts for tasks whose reward changes most, up or down (teacher-student curriculum learning)."""

    smoothing: float = Field(default=0.1, gt=0, le=1)
    """Share of the newest step in the running mean of a task's change of reward per step."""
    temperature: float = Field(default=0.05, gt=0)
    """A task that changes by so many standard deviations of its reward per step more than another gets e times as many
    prompts (before explore)."""
    explore: float = Field(default=0.2, gt=0, le=1)
    """Share of the prompts that is handed out by weights alone."""


class MixtureTask(Section):
    """Several tasks at once: each step takes prompts of all of them, by shares."""

    type: Literal["mixture"] = "mixture"
    tasks: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")],
        Annotated[
            Annotated[DocstringsMember, Tag("docstrings")]
            | Annotated[FileMember, Tag("file")]
            | Annotated[FunctionMember, Tag("function")],
            Discriminator(_task_type),
        ],
    ] = Field(min_length=1)
    """The tasks by names of yours, each a task section with a weight. Names stand before the ids of items."""
    temperature: float | None = Field(default=None, gt=0)
    """Shares proportional to weight * (number of training items)^(1 / this): 1 goes by size, more evens out; null goes
    by weights alone."""
    progress: ProgressConfig | None = None
    """Let shares follow what is learnt; null keeps them."""

    @model_validator(mode="after")
    def _no_windows(self) -> "MixtureTask":
        for name, member in self.tasks.items():
            if member.length_window is not None:
                raise ValueError(
                    f"tasks.{name}.length_window shares out the items of a task that is alone: leave it out"
                )
        return self


TaskConfig = Annotated[
    Annotated[DocstringsTask, Tag("docstrings")]
    | Annotated[FileTask, Tag("file")]
    | Annotated[MixtureTask, Tag("mixture")]
    | Annotated[FunctionTask, Tag("function")],
    Discriminator(_task_type),
]


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
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where else the figures go; each needs the extra of its name. One that fails is named and the run goes on."""
    project: str = Field(default="pertoken", min_length=1)
    """What the runs are kept under there."""
