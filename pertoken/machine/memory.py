"""Memory of the process: what it took, and how freed memory goes back to the system."""

import contextlib
import ctypes
import errno
import math
import os
import re
import sys
from pathlib import Path

import torch

from pertoken import native

GIGABYTE = 1e9

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
"""oneDNN keeps the code that it generated for 1,024 shapes of matrices, 0.3 GB; rows of text rarely have one again."""


_RAN_OUT = re.compile(
    r"(can't|cannot) allocate memory|not enough memory|out of memory|bad_alloc|ALLOC_FAILED|could not create a memory",
    re.IGNORECASE,
)
"""What torch's allocators, C++, CUDA's libraries and oneDNN say; only some of them have a type for it."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` says that there was not enough memory, in Python, in torch on any device, or in the system."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_RAN_OUT.search(str(error)))


def keep_freed_memory() -> None:
    """From now on, memory that is freed stays with the process until `give_back_freed_memory()`; glibc alone knows how.

    Left to itself glibc gives large tensors back at once, and the next one's pages are handed over, emptied by the
    system, one by one: a quarter of a training step went into that. And of the few bytes that it cuts off to align a
    tensor it makes fast chunks, which do not grow together with what is freed beside them: the room of a tensor does
    not fit the next one of its size, and the heap creeps.
    """
    _set_heap(fast_chunks=0, own_pages=0, own_pages_from=2**25, kept_at_end=2**31 - 1)


def return_freed_memory(size: int) -> None:
    """From now on a tensor of `size` bytes or more has pages of its own, which go back as soon as it is freed.

    32 MB is where glibc's own threshold, which moves, comes to rest if such tensors are freed again and again.
    """
    _set_heap(fast_chunks=128, own_pages=2**16, own_pages_from=size, kept_at_end=2 * size)


def _set_heap(*, fast_chunks: int, own_pages: int, own_pages_from: int, kept_at_end: int) -> None:
    """Of glibc: largest size (bytes) of chunks that do not grow together, how many tensors may have pages of their own
    and from which size on (bytes), and how much freed memory stays at the end of the heap (bytes)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # numbers of the parameters: <malloc.h>
        for parameter, value in ((1, fast_chunks), (-4, own_pages), (-3, own_pages_from), (-1, kept_at_end)):
            mallopt(parameter, value)


class Heap:
    """Keeps freed memory in use, and from growing.

    What the first update makes and leaves, gradients and the optimiser's averages, gets pages of its own: in the heap,
    among activations, each would part the room that they leave. From then on freed memory is kept.

    Activations have another length in each pass, and leave the heap in pieces that the next ones do not fit into: a
    training process grew from 4.4 GB in its first step to 7.7 GB. To give everything back before each update costs
    a second of page faults a step, so it is done when the process has grown by `GROWTH` since its second one (the
    optimiser's averages are new in the first).
    """

    GROWTH = 0.1
    LASTING = 2**18
    """Bytes of a tensor from which on it gets pages of its own in the first update."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._usual: float | None = None
        self._updates = 0
        if device.type == "cpu" and sys.platform == "linux" and native.available():
            torch.ops.pertoken.use_heap()
        return_freed_memory(self.LASTING)

    def before_update(self) -> bool:
        """Give freed memory back if the process has grown; whether it had."""
        grown = self._usual is None or used_memory(self._device) > (1 + self.GROWTH) * self._usual
        if grown:
            give_back_freed_memory()
        return grown

    def after_update(self) -> None:
        self._updates += 1
        if self._updates == 1:
            keep_freed_memory()
        if self._updates == 2:
            self._usual = used_memory(self._device)


def give_back_freed_memory() -> None:
    """Hand memory that was freed, but is kept for later, back to the system; glibc's heap and CUDA's cache."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def used_memory(device: torch.device) -> float:
    """What is in use now (GB): of the GPU if `device` is one, else of the process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIGABYTE
    return process_memory()


def process_memory() -> float:
    """What the process has in use now (GB); 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / GIGABYTE


CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much a container may take, in its newer and its older way."""


def installed_memory(device: torch.device) -> float:
    """What there is (GB), of the GPU if `device` is one, else what a container allows of it; infinite where the system
    does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIGABYTE
    limits = [math.inf]
    with contextlib.suppress(AttributeError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return min(limits) / GIGABYTE


def peak_memory(device: torch.device) -> float | None:
    """The most memory that was in use so far (GB): of the GPU if `device` is one, else of the process.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIGABYTE
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIGABYTE
