"""The section `credit`: from rewards to the advantage of each token, one class for each way."""

from typing import Annotated, Literal

from pydantic import Field

from pertoken.config.reading import Section

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


class OnlineDpo(CreditSection):
    """The best paid sample of a prompt is preferred to the worst, as DPO prefers; the others learn nothing."""

    type: Literal["online_dpo"] = "online_dpo"
    beta: float = Field(default=0.1, gt=0)
    """How strongly the reference holds: a pair that is told apart by some 1 / this nats already teaches little."""


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
    | OnlineDpo
    | MonteCarlo
    | PerPart
    | Shapley
    | LeaveOneTokenOut
    | Differences
    | AttentionCredit,
    Field(discriminator="type"),
]
