"""Work in a thread of its own, beside the main one: a result to wait for, within a time if need be."""

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class StillRunningError(Exception):
    """A result was not there in time; the message says at which line the work is."""


class Background(Generic[T]):
    """`work()`, begun now in its own thread.

    Nothing in Python can end a thread: work that hangs is left behind, and goes with the process.
    """

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._returned: list[T] = []
        self._raised: list[BaseException] = []

        def run() -> None:
            try:
                self._returned.append(work())
            except BaseException as error:
                self._raised.append(error)

        self._thread = threading.Thread(target=run, daemon=True, name=name)
        self._thread.start()

    def result(self, seconds: float | None = None) -> T:
        """What `work` returned or raised; StillRunningError if that takes longer."""
        self._thread.join(seconds)
        if self._raised:
            raise self._raised[0]
        if not self._returned:
            frame = sys._current_frames().get(self._thread.ident or 0)
            at = traceback.extract_stack(frame)[-1] if frame else None
            raise StillRunningError(
                f"It is at {at.filename}:{at.lineno}, in {at.name}." if at else "It is about to end."
            )
        return self._returned[0]
