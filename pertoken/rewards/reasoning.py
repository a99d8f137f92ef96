"""Worked solutions: the final answer, and the sums on the way to it, each on its own characters."""

from dataclasses import dataclass

from pertoken.answers import equations, final_answer, solves
from pertoken.errors import ConfigError
from pertoken.rewards.base import Sample, SampleReward, ScoredSpan, place_spans
from pertoken.rewards.metrics.base import references


@dataclass(frozen=True)
class FinalAnswer(SampleReward):
    """Pays for a final answer that is one of the references', on its characters; numbers are compared as numbers.

    Final is what stands behind the last `####`, in the last `\\boxed{}`, behind the last `answer is` or `answer:`, else
    the last number of the text. References may be whole solutions: they are read the same way.
    """

    reward: float = 1.0
    """Earned by the right answer."""
    wrong: float = 0.0
    """Paid by another one, on its characters, or by none, at the end of the text."""
    marked: bool = False
    """Take an answer for final only where a mark announces it: a number alone earns nothing."""

    def __post_init__(self) -> None:
        if self.reward < 0 or self.wrong < 0:
            raise ConfigError(f"final_answer: expected amounts of at least 0, got {self.reward} and {self.wrong}")

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """The answer and whether it is right, or that there is none."""
        said, end = final_answer(sample.text), len(sample.text)
        if said is None or (self.marked and not said.marked):
            return [ScoredSpan(end, end, -self.wrong, "no final answer")]
        if solves(sample.text, references(sample)):
            return [ScoredSpan(said.start, said.stop, self.reward, "the right answer")]
        return [ScoredSpan(said.start, said.stop, -self.wrong, "not the answer")]

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample) if sample.tokens else [], sample)


@dataclass(frozen=True)
class Steps(SampleReward):
    """Checks each sum that a text works out (`16 * .5 = 8`): right results earn, wrong ones cost, on their characters.

    It knows nothing of the question: sums that lead nowhere earn too, so let it weigh little beside `final_answer`. A
    sum that came before earns nothing again.
    """

    reward: float = 0.1
    """Earned by each different sum that holds."""
    cost: float = 0.2
    """Paid for each that does not hold."""
    most: int = 6
    """So many sums earn at most."""

    def __post_init__(self) -> None:
        if min(self.reward, self.cost, self.most) < 0:
            raise ConfigError(
                f"steps: expected numbers of at least 0, got reward {self.reward}, cost {self.cost}, most {self.most}"
            )

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One span for each sum: its result."""
        found, earned = list[ScoredSpan](), set[str]()
        for each in equations(sample.text):
            if not each.holds:
                found.append(ScoredSpan(each.start, each.stop, -self.cost, f"{each.said} is wrong"))
            elif each.said not in earned and len(earned) < self.most:
                earned.add(each.said)
                found.append(ScoredSpan(each.start, each.stop, self.reward, f"{each.said} holds"))
        return found

    def token_values(self, sample: Sample) -> list[float]:
        return place_spans(self.findings(sample) if sample.tokens else [], sample)
