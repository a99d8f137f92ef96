"""The section `task`: where items come from, which of them are held out, and in which order they come in."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from pertoken.config.reading import Section
from pertoken.schedule import Points, Schedule


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


def _task_type(values: Any) -> str:
    """A task that names a path reads files; so a recipe is moved to other data by `task.path=...` alone."""
    if not isinstance(values, dict):
        return str(getattr(values, "type", ""))
    return str(values.get("type") or next((kind for key, kind in _TOLD_BY.items() if key in values), "docstrings"))


_TOLD_BY = {"path": "file", "family": "file", "tasks": "mixture", "fn": "function"}
"""What a section without a type is of, by a key in it."""


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
