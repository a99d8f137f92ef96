"""F1 of the words of an answer, as SQuAD counts them, with a price on answers that are wrong and not withheld."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pertoken.answers import abstains, answer_words
from pertoken.errors import ConfigError
from pertoken.rewards.align import CharSpan
from pertoken.rewards.base import Sample, place_number
from pertoken.rewards.metrics.base import Granularity, MetricDelta, Piece, PrefixScore
from pertoken.rewards.metrics.rouge import OverlapScore

_SPACED = re.compile(r"\S+")


@dataclass(frozen=True)
class AnswerF1(MetricDelta):
    """F1 of the words that answer and reference share, in small letters and without articles and punctuation (SQuAD).

    The best of several references. A reference without a word gives 0 (held out, an answer without words meets it).
    """

    key = "answer_f1"
    granularity: Granularity = "word"
    """Share the credit of a word over its tokens, or credit each token with its own change, or the last with all."""
    wrong: float = 0.0
    """Paid on the last action by an answer that shares no word with any reference and does not say that it does not
    know."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wrong < 0:
            raise ConfigError(f"answer_f1.wrong: expected a cost of at least 0, got {self.wrong}")

    def chunks(self, text: str) -> list[CharSpan]:
        return [match.span() for match in _SPACED.finditer(text)]

    def pieces(self, chunk: str, *, first: bool, last: bool) -> list[Piece]:
        return answer_words(chunk)

    def prefix_score(self, references: Sequence[str]) -> PrefixScore:
        return OverlapScore([self.text_pieces(text) for text in references], 1)

    def token_values(self, sample: Sample) -> list[float]:
        values = super().token_values(sample)
        if not self.wrong or True not in sample.action_mask or abstains(sample.text):
            return values
        missed = abs(sum(values)) < 1e-9
        costs = place_number(-self.wrong * missed, sample, "last")
        return [value + cost for value, cost in zip(values, costs, strict=True)]
