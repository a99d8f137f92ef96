"""Any sequence classifier or regressor as a reward, of the whole text or sentence by sentence."""

import functools
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pertoken.errors import ConfigError, closest
from pertoken.reading import Reading
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

    def readings(self, sample: Sample) -> list[Reading]:
        """One per part of the text that the model sees at once."""
        model, before = classifier_of(self.model), self._before(sample)
        units = sentence_spans(sample.text) if self.granularity == "sentence" else [(0, len(sample.text))]
        found = []
        for start, stop in units if sample.text.strip() else []:
            at, parts = start, self._parts(model, sample.text[start:stop], before)
            for part, share in parts:
                at = sample.text.index(part, at)

                def number(outputs: Tensor, share: float = share / len(units)) -> Tensor:
                    return share * self._number(model, outputs)

                found.append(model.reading(sample.aligned, at, part, before, number))
                at += len(part)
        return found

    def _value(self, text: str, before: str | None) -> float:
        """Of the parts of `text` that fit, the mean by length."""
        model = classifier_of(self.model)
        return sum(share * self._of_part(model, part, before) for part, share in self._parts(model, text, before))

    def _parts(self, model: SequenceClassifier, text: str, before: str | None) -> list[tuple[str, float]]:
        """The text in parts that fit, and what share of its value each has."""
        room = model.room(pair=before is not None)
        if before is not None:
            room -= min(model.length(before), room // 2)
        parts = [text] if model.length(text) <= room else model.parts(text, room)
        sizes = [model.length(part) for part in parts]
        return [(part, size / max(sum(sizes), 1)) for part, size in zip(parts, sizes, strict=True)]

    def _of_part(self, model: SequenceClassifier, text: str, before: str | None) -> float:
        outputs = model.outputs(text, None) if before is None else model.outputs(before, text)
        return self._number(model, torch.tensor([outputs], dtype=torch.float64)).item()

    def _number(self, model: SequenceClassifier, outputs: Float[Tensor, "N labels"]) -> Float[Tensor, " N"]:
        """The value of each of N rows of raw outputs."""
        column = self._column(model.labels)
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        log_odds = outputs[:, column]
        if not model.independent:
            others = [k for k in range(outputs.shape[1]) if k != column]
            log_odds = log_odds - outputs[:, others].logsumexp(1)
        return log_odds if self.output == "log_odds" else log_odds.sigmoid()

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


classifier_of = functools.cache(functools.partial(SequenceClassifier.load, where="classifier.model"))
"""The classifier of a model's name."""
