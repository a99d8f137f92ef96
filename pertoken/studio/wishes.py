"""What pages may send: questions, prompts, new runs. Everything is checked before anybody looks at it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from pertoken.inquiry.asking import BEFORE, Answers
from pertoken.sampling import Sampling

MOST_BYTES = 1 << 20
"""Of what a page may send."""


class _Question(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    sample: str = Field(max_length=200)
    model: str | None = None


class AskAlternatives(_Question):
    """What else could have stood in each place?"""

    question: Literal["alternatives"]
    count: int = Field(default=8, ge=1, le=50)

    def put(self, run: Answers) -> Any:
        """The answer."""
        return run.alternatives(self.sample, model=self.model, count=self.count)


class AskWhatIf(_Question):
    """What if this token had been another one?"""

    question: Literal["what_if"]
    token: int = Field(ge=0)
    text: str = Field(default="", max_length=2000)
    ids: tuple[int, ...] = Field(default=(), max_length=200)
    samples: int = Field(default=8, ge=0, le=64)
    seed: int = Field(default=0, ge=0, lt=2**31)

    def put(self, run: Answers) -> Any:
        """The answer."""
        return run.what_if(
            self.sample, self.token, text=self.text, ids=self.ids, model=self.model, samples=self.samples,
            seed=self.seed,
        )  # fmt: skip


class AskDifference(_Question):
    """Which tokens do two checkpoints see differently?"""

    question: Literal["difference"]
    against: str = BEFORE

    def put(self, run: Answers) -> Any:
        """The answer."""
        return run.difference(self.sample, model=self.model, against=self.against)


class AskCauses(_Question):
    """Which tokens does the text owe its reward to?"""

    question: Literal["causes"]

    def put(self, run: Answers) -> Any:
        """The answer."""
        return run.causes(self.sample)


class AskAttributions(_Question):
    """Which tokens do learned models see a score in?"""

    question: Literal["attributions"]
    of: Literal["policy", "reward"]
    token: int | None = Field(default=None, ge=0)
    against: str | None = None

    def put(self, run: Answers) -> Any:
        """The answer."""
        return run.attributions(self.sample, of=self.of, token=self.token, model=self.model, against=self.against)


class Speak(BaseModel):
    """A prompt of the playground."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompt: str = Field(min_length=1, max_length=100_000)
    model: str | None = None
    chat: bool = True
    seed: int = Field(default=0, ge=0, lt=2**31)
    sampling: Sampling = Sampling()


class Launch(BaseModel):
    """A new run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    base: str | None = None
    """Name of the run whose configuration it begins with."""
    settings: tuple[str, ...] = Field(default=(), max_length=2000)
    """KEY=VALUE, as on the command line."""
    start: bool = False
    """Or else only say what it would be."""


QUESTIONS: TypeAdapter[Any] = TypeAdapter(
    Annotated[
        AskAlternatives | AskWhatIf | AskDifference | AskCauses | AskAttributions, Field(discriminator="question")
    ]
)
SPEAK: TypeAdapter[Any] = TypeAdapter(Speak)
LAUNCH: TypeAdapter[Any] = TypeAdapter(Launch)
