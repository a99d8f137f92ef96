"""Potential-based shaping: hints on the way that do not change which policy is best.

    F_t = gamma * Phi(s_{t+1}) - Phi(s_t)          Phi(terminal) = 0

Discounted and summed along any episode this is -Phi(s_0), the same number for every policy: whatever is paid beside it
keeps its order of policies, and the policy gradient stays the same in expectation (Ng, Harada & Russell 1999,
https://people.eecs.berkeley.edu/~russell/papers/icml99-shaping.pdf). That needs three things: the gamma of the returns,
a Phi that looks at the state alone (here: the text so far and the item), and 0 at the end.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pertoken.errors import ConfigError, RewardError
from pertoken.rewards.base import Sample, SampleReward
from pertoken.rewards.metrics import MetricDelta
from pertoken.rewards.metrics.base import check_choice
from pertoken.rewards.names import load_attribute, resolve
from pertoken.types import CUT_OFF, Item

Potential = Callable[[str, Item], float]
"""Phi(text so far, item)."""

Truncated = Literal["end", "bootstrap"]


@dataclass(frozen=True)
class Shaping(SampleReward):
    """gamma * Phi(next state) - Phi(state) for each action, with Phi = 0 where the episode ends.

    Time is counted in actions: what a tool wrote belongs to the state in which the next action is chosen.
    """

    potential: str | Potential = "rouge_l"
    """A metric (rouge_l, bleu, chrf, ...) of the text so far, or `module:function` of a function of the text so far
    and the item that returns a number."""
    parameters: Mapping[str, Any] | None = None
    """Settings of the potential."""
    gamma: float = 1.0
    """Discount per action; the guarantee holds for returns with the same one (credit.gamma)."""
    truncated: Truncated = "end"
    """What a cut-off episode is: its end, with Phi = 0 as after the last token; or bootstrap: it goes on, Phi of its
    last state stays, and a critic that was trained on shaped rewards says what is still to come."""

    def __post_init__(self) -> None:
        check_choice("shaping.truncated", self.truncated, get_args(Truncated))
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"shaping.gamma: expected a number above 0 and up to 1, got {self.gamma}")
        _ = self._states

    @cached_property
    def _states(self) -> Callable[[Sample, Sequence[int]], list[float]]:
        """Phi of the empty text and of the text up to each of the ascending ends."""
        parameters = dict(self.parameters or {})
        if isinstance(self.potential, str) and ":" not in self.potential:
            try:
                metric = resolve(self.potential)(**parameters)
            except TypeError as error:
                raise ConfigError(f"shaping.parameters: {error}") from error
            if not isinstance(metric, MetricDelta):
                raise ConfigError(
                    f"shaping.potential: {self.potential!r} is no function of the text so far; expected a metric such "
                    f"as rouge_l, or module:function of a function of (text, item)"
                )
            return metric.prefix_values
        named = isinstance(self.potential, str)
        function: Any = load_attribute(self.potential, self.potential) if named else self.potential  # type: ignore[arg-type]
        try:
            inspect.signature(function).bind("", None, **parameters)
        except TypeError as error:
            raise ConfigError(f"shaping.potential: {self.potential}: {error}; expected fn(text, item, ...)") from error
        return functools.partial(_by_prefix, functools.partial(function, **parameters))

    def token_values(self, sample: Sample) -> list[float]:
        values = [0.0] * len(sample.tokens)
        actions = [k for k, acts in enumerate(sample.action_mask) if acts]
        states = self._states(sample, sample.aligned.completed()) if actions else []
        for number in states:
            if not math.isfinite(number):
                raise RewardError(f"the potential {self.potential} is {number} for a prefix of {sample.text[:80]!r}")
        goes_on = self.truncated == "bootstrap" and sample.stop in CUT_OFF
        for k, following in zip(actions, [*actions[1:], None], strict=True):
            after = states[following] if following is not None else states[-1] * goes_on
            values[k] = self.gamma * after - states[k]
        return values


def _by_prefix(potential: Potential, sample: Sample, ends: Sequence[int]) -> list[float]:
    """The potential of the empty text and of each prefix; texts that stay the same are asked about once."""
    values, last = [potential("", sample.item)], 0
    for end in ends:
        values.append(values[-1] if end == last else potential(sample.text[:end], sample.item))
        last = end
    return values
