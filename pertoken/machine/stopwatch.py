"""Where time goes: seconds by phase, measured around functions while they are called. Needs nothing but Python."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Exclusive seconds of each phase: while an inner phase runs, the outer one stands still.

    >>> watch = Stopwatch(clock=iter([0.0, 1.0, 4.0, 6.0]).__next__)
    >>> with watch.phase("outer"):
    ...     with watch.phase("inner"):
    ...         pass
    >>> watch.take()
    {'outer': 3.0, 'inner': 3.0}
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._clock = clock
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside as `name`."""
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def _switch(self) -> None:
        now = self._clock()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def around(self, owner: Any, attribute: str, name: str | Callable[..., str]) -> Iterator[None]:
        """Time each call of `owner.attribute` as `name`, or as what `name` makes of the call's arguments."""
        function, own = getattr(owner, attribute), attribute in vars(owner)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name if isinstance(name, str) else name(*args, **kwargs)):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, attribute, function)
            else:
                delattr(owner, attribute)

    def take(self) -> dict[str, float]:
        """The seconds since the last `take`, by phase."""
        seconds, self.seconds = dict(self.seconds), defaultdict(float)
        return seconds
