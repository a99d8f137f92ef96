"""The section `rollout`: what is sampled in each step, and by which controls."""

from typing import Any, Literal

from pydantic import Field, model_validator

from pertoken.config.reading import Section
from pertoken.sampling import Sampling
from pertoken.schedule import Points, Schedule


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
    time_limit: float | None = Field(default=None, gt=0)
    """Seconds that it may take for an answer, after which the run ends, saved; null waits for ever."""


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
