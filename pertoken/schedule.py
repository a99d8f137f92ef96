"""Numbers that change over steps, as a person writes them: a list of points."""

from dataclasses import dataclass
from itertools import pairwise

from pertoken.errors import ConfigError

Points = tuple[tuple[int, float], ...]
"""Steps, and the number at each."""


@dataclass(frozen=True)
class Schedule:
    """A number that changes over steps: points (step, number), linear between them, constant outside.

    >>> warm = Schedule(((10, 0.0), (20, 1.0)))
    >>> [warm(step) for step in (1, 10, 15, 20, 99)]
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """

    points: Points

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.points]
        if not steps or any(later <= step for step, later in pairwise(steps)):
            raise ConfigError(f"a schedule needs points [step, number] whose steps rise, got {list(self.points)}")

    def __call__(self, step: int) -> float:
        for (begin, low), (end, high) in pairwise(self.points):
            if begin <= step < end:
                return low + (high - low) * (step - begin) / (end - begin)
        return self.points[0][1] if step < self.points[0][0] else self.points[-1][1]

    @property
    def last(self) -> float:
        """The number that it ends with."""
        return self.points[-1][1]
