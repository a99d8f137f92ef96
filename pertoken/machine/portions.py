"""How much goes through a model at once, and less of it from where memory runs out.

Work that can be cut, a batch into micro-batches or prompts into those that are sampled together, is done in portions.
Where one does not fit, what it has left behind is given back, and the work is done again in portions of half the size,
which stay so. Whoever cuts its work sees to it that the result does not depend on the size.
"""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from pertoken.errors import OutOfMemoryError, PertokenError
from pertoken.machine.memory import give_back_freed_memory, ran_out

T = TypeVar("T")

REMEDY = (
    "Shorten rows (rollout.sampling.max_new_tokens, rollout.max_prompt_tokens), set update.recompute_activations=true, "
    "train with policy.lora, or take a smaller model."
)


class Portion:
    """The size of a portion: as it was set, and from where memory ran out as it fits."""

    def __init__(self, name: str, whole: int, unit: str) -> None:
        """whole: the size that was set. unit: what is counted, in words, as in "16 rows of a rollout"."""
        self.name, self.whole, self.unit = name, whole, unit
        self.size = whole
        self._cuts: list[str] = []

    def attempt(
        self, work: Callable[[int], T], *, there: int, least: int, undo: Callable[[], object] = lambda: None
    ) -> T:
        """`work(size)`; where memory runs out, `undo()`, and again with half the size.

        there: as much as there is to do. least: what cannot be cut apart. Raises OutOfMemoryError where that alone does
        not fit; any other error passes.
        """
        while True:
            size = min(self.size, there)
            try:
                return work(self.size)
            except PertokenError:
                raise
            except Exception as error:
                if not ran_out(error):
                    raise
                cause = _first_line(error)
                if size <= least:
                    raise OutOfMemoryError(
                        f"memory ran out with {size} {self.unit} at once, and one row alone takes {least}: {cause}. "
                        f"{REMEDY}"
                    ) from error
            # Behind the handler: the exception holds the frames, and they hold the tensors, of what did not fit.
            undo()
            gc.collect()
            give_back_freed_memory()
            self.size = max(size // 2, least)
            self._cuts.append(f"memory ran out with {size} {self.unit} at once ({cause}); from here on {self.size}")

    def told(self) -> list[str]:
        """A sentence on each cut since it was last asked."""
        cuts, self._cuts = self._cuts, []
        return cuts


def states(portions: Mapping[str, Portion]) -> dict[str, list[int]]:
    """Of those that were cut: the size that was set, and the one that fits."""
    return {name: [portion.whole, portion.size] for name, portion in portions.items() if portion.size < portion.whole}


def set_states(portions: Mapping[str, Portion], states: Mapping[str, list[int]]) -> None:
    """Go on with the sizes that fitted; one that was set anew since is tried anew."""
    for name, (whole, size) in states.items():
        if name in portions and portions[name].whole == whole:
            portions[name].size = size


@contextmanager
def nothing_to_cut(remedy: str = REMEDY) -> Iterator[None]:
    """Names the error of work that cannot be done in smaller portions, and what to do."""
    try:
        yield
    except PertokenError:
        raise
    except Exception as error:
        if not ran_out(error):
            raise
        raise OutOfMemoryError(f"memory ran out where nothing can be cut: {_first_line(error)}. {remedy}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
