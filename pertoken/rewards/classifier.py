"""Any sequence classifier or regressor as a reward, of the whole text or sentence by sentence."""

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from pertoken.errors import ConfigError, closest
from pertoken.rewards.align import sentence_spans
from pertoken.rewards.base import Place, Sample, SampleReward, ScoredSpan, place_number, place_spans
from pertoken.rewards.metrics.base import check_choice
from pertoken.rewards.semantics import SequenceClassifier, other_texts

Unit = Literal["text", "sentence"]
Output = Literal["probability", "log_odds"]


@dataclass(frozen=True)
class Classifier(SampleReward):
    """What a classifier says of the completion: the probability of a label, or a regressor's number.

    A text beyond the model's window is taken in runs of whole sentences, and their mean by length counts. Sentence by
    sentence, each pays its value on its own tokens, divided by their number: the sum is the mean over the sentences.
    """

    model: str
    """A sequence classifier or regressor: a folder or a hub name."""
    label: str = ""
    """Which label is good, by name or number. A regressor, which has one output, needs none."""
    output: Output = "probability"
    """`probability` of the label, or its `log_odds`, log(p / (1 - p)), which has no ceiling. A regressor's number is
    taken as it is."""
    against: str = ""
    """A text that is read first, for classifiers of pairs: `prompt`, `reference`, or a column of `task.info`."""
    granularity: Unit = "text"
    """What is classified: the whole text, or each sentence."""
    place: Place = "last"
    """Where the number of a whole text goes: on the `last` action, or `spread` over all."""

    def __post_init__(self) -> None:
        check_choice("classifier.granularity", self.granularity, get_args(Unit))
        check_choice("classifier.output", self.output, get_args(Output))
        check_choice("classifier.place", self.place, get_args(Place))

    def token_values(self, sample: Sample) -> list[float]:
        if self.granularity == "sentence":
            return place_spans(self.findings(sample), sample)
        if not sample.text.strip() or True not in sample.action_mask:
            return [0.0] * len(sample.tokens)
        return place_number(self._value(sample.text, self._before(sample)), sample, self.place)

    def findings(self, sample: Sample) -> list[ScoredSpan]:
        """One per sentence, with what the model says of it; none for whole texts."""
        sentences = sentence_spans(sample.text) if self.granularity == "sentence" else []
        before = self._before(sample) if sentences else None
        found = []
        for start, stop in sentences:
            value = self._value(sample.text[start:stop], before)
            found.append(ScoredSpan(start, stop, value / len(sentences), f"{self.label or 'score'} {value:.2f}"))
        return found

    def _before(self, sample: Sample) -> str | None:
        return "\n\n".join(other_texts(sample, self.against, "classifier")) if self.against else None

    def _value(self, text: str, before: str | None) -> float:
        """Of the parts of `text` that fit, the mean by length."""
        model = classifier_of(self.model)
        room = model.room(pair=before is not None)
        if before is not None:
            room -= min(model.length(before), room // 2)
        parts = [text] if model.length(text) <= room else model.parts(text, room)
        sizes = [model.length(part) for part in parts]
        values = [self._of_part(model, part, before) for part in parts]
        return sum(size * value for size, value in zip(sizes, values, strict=True)) / max(sum(sizes), 1)

    def _of_part(self, model: SequenceClassifier, text: str, before: str | None) -> float:
        outputs = model.outputs(text, None) if before is None else model.outputs(before, text)
        column = self._column(model.labels)
        if len(outputs) == 1:
            return outputs[0]
        if model.independent:
            log_odds = outputs[column]
        else:
            others = torch.tensor([each for k, each in enumerate(outputs) if k != column], dtype=torch.float64)
            log_odds = outputs[column] - others.logsumexp(0).item()
        return log_odds if self.output == "log_odds" else _sigmoid(log_odds)

    def _column(self, labels: list[str]) -> int:
        """The output that `label` names."""
        if len(labels) == 1:
            if self.label or self.output != "probability":
                raise ConfigError(f"classifier: {self.model!r} is a regressor; leave out `label` and `output`")
            return 0
        known = {name.casefold(): k for k, name in enumerate(labels)}
        column = known.get(self.label.casefold())
        if column is None and self.label.isdecimal() and int(self.label) < len(labels):
            column = int(self.label)
        if column is None:
            raise ConfigError(
                f"classifier.label: {self.model!r} has no label {self.label!r}; {closest(self.label, labels)}"
            )
        return column


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))


classifier_of = functools.cache(functools.partial(SequenceClassifier.load, where="classifier.model"))
"""The classifier of a model's name."""
