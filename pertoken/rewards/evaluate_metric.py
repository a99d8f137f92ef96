"""A metric of the library `evaluate` of Hugging Face as a reward of whole texts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any, get_args

from pertoken.errors import ConfigError, MissingExtraError, RewardError
from pertoken.rewards.base import Place, Sample, SampleReward, place_number
from pertoken.rewards.metrics.base import check_choice, references


@dataclass(frozen=True)
class EvaluateMetric(SampleReward):
    """What a metric of `evaluate` says of one text against its references; needs the extra `evaluate`.

    The metric sees one text at a time. If it takes one reference only, the best of several counts.
    """

    metric: str
    """Name of a metric (exact_match, rouge, ...), or the path of its script or folder: code that is run."""
    key: str | None = None
    """Which of its results; null: the only one, or the one called like the metric."""
    settings: Mapping[str, Any] | None = None
    """Keyword arguments of its `compute`."""
    place: Place = "last"
    """On the last action, or spread over all of them."""

    def __post_init__(self) -> None:
        check_choice("evaluate.place", self.place, get_args(Place))
        _ = self._module

    @cached_property
    def _module(self) -> Any:
        try:
            import evaluate
        except ImportError as error:
            raise MissingExtraError("evaluate", "evaluate", "the reward 'evaluate'") from error
        try:
            return evaluate.load(self.metric, module_type="metric", keep_in_memory=True)
        except Exception as error:  # no file, no network, a package that the script imports
            raise ConfigError(
                f"evaluate.metric: expected a metric that can be loaded, got {self.metric!r} ({error}). Its script "
                "comes from the Hugging Face hub at the first use: connect once, or give the path of a folder with it"
            ) from error

    @cached_property
    def _takes_several(self) -> bool:
        """Whether the metric compares a text with a list of references."""
        from datasets import Value

        features = self._module.features
        options = features if isinstance(features, list) else [features]
        return any(not isinstance(option["references"], Value) for option in options)

    def token_values(self, sample: Sample) -> list[float]:
        if not sample.tokens:
            return []
        known = references(sample)
        value = (
            self._value(sample.text, known) if self._takes_several else max(self._value(sample.text, r) for r in known)
        )
        return place_number(value, sample, self.place)

    def _value(self, text: str, reference: str | list[str]) -> float:
        results = self._module.compute(predictions=[text], references=[reference], **(self.settings or {}))
        key = self.key or (next(iter(results)) if len(results) == 1 else self._module.name)
        if key not in results:
            raise RewardError(f"{self.metric} has no result {key!r}; set key to one of {', '.join(results)}")
        value = results[key]
        if isinstance(value, list) and len(value) == 1:  # one number per text
            value = value[0]
        if not isinstance(value, Real):
            raise RewardError(f"{self.metric}: {key} is {value!r}, expected a number: set key to another result")
        return float(value)
