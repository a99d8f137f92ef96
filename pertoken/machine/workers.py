"""Work in processes of its own, where it can hang, crash or leak without taking this one along.

A worker is a new Python process that is asked through a pipe, one job at a time. It is made by `subprocess` and not by
`multiprocessing` or a pool on top of it: those import the main script again in each child, which a script must be
written for, and their pools neither say which job a dead process was at nor end a single one.
Nothing here rests on signals or on `fork`, so it is the same on every system.

A worker ends when its pipe does, so none outlives this process, however that ends.
"""

import contextlib
import faulthandler
import functools
import importlib
import itertools
import json
import os
import pickle
import queue
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pertoken.errors import ConfigError, PertokenError, WorkerError

START_LIMIT = 600.0
"""Seconds that a worker may take until it is ready: imports, models that are loaded."""
MARGIN = 1.0
"""Seconds after its limit in which a worker should have ended itself, having said where it was; then it is ended."""
GRACE = 0.5
"""Seconds in which the last words of a dead worker must have arrived."""
LOOK = 0.2
"""Seconds between looks at workers whose pipe a child of theirs keeps open."""
GREETED = "greeted"
"""That a worker is ready."""
LOG_LIMIT = 10_000_000
"""Characters of what workers print that are kept in the log."""
TAIL = 4000
"""Characters of what a worker printed last that are looked at when it dies."""

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS", "RAYON_NUM_THREADS"), "1"
)
"""Environment of a worker: the processors are for the training and the other workers."""

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pertoken.machine.workers import serve; serve()"
_POSIX = os.name == "posix"


@dataclass(frozen=True)
class Fault:
    """What stands in the place of an answer: why there is none."""

    message: str


@dataclass(frozen=True)
class _Order:
    """What a worker is told first."""

    entry: str
    argument: Any
    time_limit: float | None
    memory_limit: float | None


class Workers:
    """Processes that have run `entry(argument)` and answer jobs by the function that it gave.

    entry: `module:function`, which makes a pair (greeting, handle) of `argument`; `handle(job)` answers a job.
    What crosses the border is pickled.
    time_limit: seconds for one job, after which the worker is ended.
    memory_limit: GB above which a worker is replaced after its job; one that asks for far more gets nothing (Linux).

    What a worker prints goes to the log. There is one, which is ready when this returns; `enlarge` makes it several.
    Raises ConfigError if `entry` does, and WorkerError if no worker can be started.
    """

    def __init__(
        self,
        entry: str,
        argument: Any,
        *,
        time_limit: float | None = None,
        memory_limit: float | None = None,
        start_limit: float = START_LIMIT,
        name: str = "worker",
    ) -> None:
        self.entry, self.argument = entry, argument
        self.count, self.time_limit, self.memory_limit, self.start_limit = 1, time_limit, memory_limit, start_limit
        self.log = _Log(name)
        self._inbox: queue.SimpleQueue[tuple[_Worker, Any]] = queue.SimpleQueue()
        self._staff: list[_Worker] = []
        self._lock = threading.Lock()
        self.close = weakref.finalize(self, _end_all, self._staff, os.getpid())
        """Ends all workers; done as well when nobody knows this object any more, and at the end of the process."""
        self._hire()
        self.greeting: Any = self._await_first()

    def ask(self, jobs: Sequence[Any], *, together: int = 1) -> Generator[tuple[int, Any], None, None]:
        """(index of a job, its answer or `Fault`) as they come in; runs of `together` jobs are handed out at once.

        Whoever stops listening ends the workers that are still at it.
        """
        if not self.close.alive:
            raise WorkerError("its processes were ended already")
        with self._lock:
            waiting = deque(deque(part) for part in _runs(len(jobs), together))
            busy: dict[_Worker, deque[int]] = {}
            self.enlarge(self.count)
            try:
                while waiting or busy:
                    free = [worker for worker in self._staff if worker not in busy and worker.can_be_asked()]
                    for worker in free[: len(waiting)]:
                        busy[worker] = waiting.popleft()
                        worker.tell([jobs[k] for k in busy[worker]], self.time_limit)
                    worker, frame = self._next(busy)
                    if frame is None and worker not in busy:
                        self._lost_at_rest(worker)
                        self._hire()
                    elif frame is None:
                        rest = busy.pop(worker)
                        culprit = rest.popleft()
                        if rest:
                            waiting.appendleft(rest)
                        fault = Fault(self._bury(worker))
                        yield culprit, fault
                        self._hire()  # only now: what the listener made of the answers before belongs to `argument`
                    elif frame != GREETED:
                        worker.begins(self.time_limit)
                        answer, grown = frame
                        index = busy[worker].popleft()
                        if not busy[worker]:
                            del busy[worker]
                            worker.rests()
                        yield index, answer
                        if grown and worker not in busy:
                            self._dismiss(worker)
                            self._hire()
            finally:
                for worker in busy:
                    self._dismiss(worker)

    def _hire(self) -> None:
        order = _Order(self.entry, self.argument, self.time_limit, self.memory_limit)
        self._staff.append(_Worker(order, self._inbox, self.log, self.start_limit))

    def _await_first(self) -> Any:
        """The greeting of the first worker."""
        try:
            worker, frame = self._next({})
            if frame is None:
                self._lost_at_rest(worker)
        except BaseException:
            self.close()
            raise
        return worker.greeting

    def enlarge(self, count: int) -> None:
        """Have `count` workers; further ones are as the first, and are asked as soon as they are ready."""
        self.count = count
        while len(self._staff) < count:
            self._hire()

    def _next(self, busy: Mapping["_Worker", Any]) -> tuple["_Worker", Any]:
        """What happens next: a worker and its answer, or None for one that is no more, or `GREETED`."""
        while True:
            with contextlib.suppress(queue.Empty):
                worker, frame = self._inbox.get(timeout=LOOK)
                if worker not in self._staff:  # a last word of one that was ended
                    continue
                if frame is None or worker.ready:
                    return worker, frame
                kind, greeting = frame
                if kind == "refused":
                    raise ConfigError(greeting)
                worker.greets(greeting)
                return worker, GREETED
            for worker in self._staff:
                if (worker in busy or not worker.ready) and (worker.overdue() or worker.dead()):
                    return worker, None

    def _lost_at_rest(self, worker: "_Worker") -> None:
        """One that ends when it has nothing to do can be replaced; where it did not start, no other would."""
        ready, words = worker.ready, self._bury(worker)
        if not ready:
            raise WorkerError(f"a process for it cannot be started: {words}")

    def _bury(self, worker: "_Worker") -> str:
        """Take a lost worker off the list; what became of it, in words."""
        self._staff.remove(worker)
        return worker.obituary()

    def _dismiss(self, worker: "_Worker") -> None:
        self._staff.remove(worker)
        worker.kill()


def _runs(count: int, together: int) -> list[range]:
    return [range(first, min(first + together, count)) for first in range(0, count, together)]


def _end_all(staff: "list[_Worker]", owner: int) -> None:
    if os.getpid() == owner:  # a fork of this process has the list, but not the right
        for worker in staff:
            worker.kill()
    staff.clear()


class _Worker:
    """One process, seen from outside."""

    def __init__(
        self, order: _Order, inbox: "queue.SimpleQueue[tuple[_Worker, Any]]", log: "_Log", start_limit: float
    ) -> None:
        self._limit: float | None = start_limit
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, json.dumps([place for place in sys.path if isinstance(place, str)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | ONE_THREAD,
            # A group of its own: Ctrl-C in the terminal is for the training, and what a reward forks ends with it.
            start_new_session=_POSIX,
            creationflags=0 if _POSIX else getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        self.greeting: Any = None
        self.ready = False
        self._begun: float | None = time.monotonic()
        self._found_dead: float | None = None
        self._ended = False
        self._tail = ""
        self._listener = threading.Thread(target=self._listen, args=(inbox,), daemon=True, name="pertoken-worker")
        self._listener.start()
        self._overhearer = threading.Thread(target=self._overhear, args=(log,), daemon=True, name="pertoken-worker-log")
        self._overhearer.start()
        self._send(order)

    def can_be_asked(self) -> bool:
        """It has greeted and lives."""
        return self.ready and self._process.poll() is None

    def greets(self, greeting: Any) -> None:
        self.greeting, self.ready = greeting, True
        self.rests()

    def tell(self, jobs: list[Any], limit: float | None) -> None:
        """Hand it jobs; their answers come into the inbox."""
        self._send(jobs)
        self.begins(limit)

    def begins(self, limit: float | None) -> None:
        """It is at a job from now on, and may take `limit` seconds for it."""
        self._begun, self._limit = time.monotonic(), limit

    def rests(self) -> None:
        self._begun = None

    def overdue(self, margin: float = MARGIN) -> bool:
        """Whether it takes longer than it may."""
        late = self._begun is not None and self._limit is not None
        return late and time.monotonic() - self._begun > self._limit + margin  # type: ignore[operator]

    def dead(self) -> bool:
        """Whether it ended, and its last words had time to arrive."""
        if self._process.poll() is None:
            return False
        self._found_dead = self._found_dead or time.monotonic()
        return time.monotonic() - self._found_dead > GRACE

    def kill(self) -> None:
        """End it, and what it started."""
        if self._ended:
            return
        self._ended = True
        if _POSIX:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        for thread in (self._listener, self._overhearer):
            thread.join(GRACE)

    def obituary(self) -> str:
        """How it ended, in words."""
        late = self.overdue(0.0)
        with contextlib.suppress(subprocess.TimeoutExpired):  # so that an exit code is its own
            self._process.wait(0 if late else GRACE)
        self.kill()
        if late or "\nTimeout (" in f"\n{self._tail}":
            return f"no answer within {self._limit:g} s{_place(self._tail, '(most recent call first):')}"
        fatal = "Fatal Python error" in self._tail
        last = [] if fatal else [line.strip() for line in self._tail.splitlines() if line.strip()]
        words = _place(self._tail, "Current thread") if fatal else ""
        words += f"; the last that it said: {last[-1][:200]!r}" if last else ""
        return f"its process died with {_exit_code(self._process.returncode)}{words}"

    def _send(self, message: Any) -> None:
        # A broken pipe is the end of the worker, and that is heard by the listener.
        with contextlib.suppress(OSError):
            _write(self._process.stdin, message)  # type: ignore[arg-type]

    def _listen(self, inbox: "queue.SimpleQueue[tuple[_Worker, Any]]") -> None:
        with contextlib.suppress(OSError, EOFError, ValueError):
            while True:
                raw = _read(self._process.stdout)  # type: ignore[arg-type]
                try:
                    frame = pickle.loads(raw)
                except Exception as error:  # of a class that only the worker could import, say
                    frame = (Fault(f"returned what cannot be read in another process: {error}"), False)
                inbox.put((self, frame))
        inbox.put((self, None))

    def _overhear(self, log: "_Log") -> None:
        pipe: Any = self._process.stderr
        with contextlib.suppress(OSError, ValueError):
            while raw := pipe.read1(1 << 16):
                said = raw.decode("utf-8", "replace")
                self._tail = (self._tail + said)[-TAIL:]
                log.write(said)


class _Log:
    """What workers print: kept until there is a file, then in the file."""

    def __init__(self, name: str) -> None:
        self._name, self._lock = name, threading.Lock()
        self._kept: deque[str] = deque(maxlen=1000)
        self._path: Path | None = None
        self._left = LOG_LIMIT
        self._open_line = ""

    def to(self, path: Path) -> None:
        """From now on lines are appended to `path`, those from before first."""
        with self._lock:
            self._path = path
            kept = list(self._kept)
            self._kept.clear()
            self._append(kept)

    def write(self, said: str) -> None:
        with self._lock:
            *lines, rest = (self._open_line + said).split("\n")
            self._open_line = rest if len(rest) < TAIL else ""
            self._append([*lines, *([] if self._open_line == rest else [rest])])

    def _append(self, lines: list[str]) -> None:
        tagged = [f"[{self._name}] {line}" for line in lines]
        if self._path is None:
            self._kept.extend(lines)
        elif tagged and self._left > 0:
            self._left -= sum(map(len, tagged))
            tagged += [f"[{self._name}] (from here on nothing is kept)"] * (self._left <= 0)
            with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="replace") as file:
                file.write("\n".join(tagged) + "\n")


def _place(tail: str, heading: str) -> str:
    """The innermost call of the main thread, which `faulthandler` shows last, or of the one that it calls current."""
    found = re.search(r'\n  File "(.+)", line (\d+) in (.+)', tail[max(tail.rfind(heading), 0) :])
    return f"; it was at {found[1]}:{found[2]}, in {found[3]}" if found else ""


def _exit_code(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}" + (" (out of memory?)" if -code == 9 else "")
    return f"signal {-code}"


# --- messages ---------------------------------------------------------------------------------------------


def _write(pipe: BinaryIO, message: Any) -> None:
    raw = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(struct.pack("<Q", len(raw)) + raw)
    pipe.flush()


def _read(pipe: BinaryIO) -> bytes:
    head = pipe.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    raw = pipe.read(size)
    if len(raw) < size:
        raise EOFError
    return raw


# --- inside of a worker -----------------------------------------------------------------------------------


def serve() -> None:
    """The life of a worker: it is told what it is, and answers until the pipe ends."""
    requests, answers = _private_pipes()
    me = os.getpid()
    if hasattr(os, "register_at_fork"):  # what a job forks must not keep the pipes open
        for pipe in (requests, answers):
            os.register_at_fork(after_in_child=functools.partial(os.close, pipe.fileno()))
    faulthandler.enable()
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(requests, told, me), daemon=True, name="pertoken-parent").start()
    order: _Order = told.get()
    try:
        module, _, name = order.entry.partition(":")
        greeting, handle = getattr(importlib.import_module(module), name)(order.argument)
        if order.memory_limit is not None:
            _bound_memory(order.memory_limit)
        _write(answers, ("ready", greeting))
    except BaseException as error:
        words = str(error) if isinstance(error, PertokenError) else f"{type(error).__name__}: {error}"
        _write(answers, ("refused", words))
        return
    for job in itertools.chain.from_iterable(iter(told.get, None)):
        answer = _answered(handle, job, order.time_limit)
        if os.getpid() != me:  # the job forked, and this is the child
            os._exit(0)
        grown = order.memory_limit is not None and (_out_of_memory(answer) or _memory() > order.memory_limit)
        try:
            _write(answers, (answer, grown))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            _write(answers, (Fault(f"returned what cannot be sent to another process: {error}"), grown))


def _answered(handle: Callable[[Any], Any], job: Any, limit: float | None) -> Any:
    """What `handle` says; or why it says nothing, as a `Fault`. A job beyond its limit ends this process."""
    if limit is not None:  # by a thread that needs nothing of the interpreter, so that no loop in C stops it
        faulthandler.dump_traceback_later(limit, exit=True)
    try:
        return handle(job)
    except PertokenError as error:
        return Fault(str(error))
    except BaseException as error:
        return Fault(f"raised {type(error).__name__}: {error}")
    finally:
        if limit is not None:
            faulthandler.cancel_dump_traceback_later()


def _private_pipes() -> tuple[BinaryIO, BinaryIO]:
    """The pipes from and to the parent, where nothing that is printed or read by a job gets in between."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, answers


def _receive(requests: BinaryIO, told: "queue.SimpleQueue[Any]", me: int) -> None:
    with contextlib.suppress(OSError, EOFError):
        while True:
            told.put(pickle.loads(_read(requests)))
    # The parent is gone, or wants no more: whatever is going on here is for nobody.
    if _POSIX and os.getpgrp() == me:
        os.killpg(me, signal.SIGKILL)
    os._exit(0)


def _out_of_memory(answer: Any) -> bool:
    return isinstance(answer, Fault) and answer.message.startswith("raised MemoryError")


def _memory() -> float:
    """What this process has taken (GB)."""
    from pertoken.machine.memory import process_memory  # which takes seconds to import

    return process_memory()


def _bound_memory(gigabytes: float) -> None:
    """From now on an allocation far beyond the limit fails, where the system has such a bound.

    What is mapped is bounded, which is more than what is taken: half of the limit is left to the difference.
    """
    taken = _memory()
    if taken > gigabytes:
        raise ConfigError(f"memory_limit is {gigabytes:g} GB, and it begins with {taken:.2f} GB")
    if sys.platform == "linux":
        import resource

        mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        bound = int(mapped + (1.5 * gigabytes - taken) * 1e9)
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (bound if hard < 0 else min(bound, hard), hard))
