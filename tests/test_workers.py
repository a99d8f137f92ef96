"""Work in processes of its own: what hangs, crashes, leaks, forks or prints there costs one job, and leaves nothing."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pertoken.errors import ConfigError, WorkerError
from pertoken.machine.workers import Fault, Workers

JOBS = """
import ctypes, os, re, sys, time

hoard = []

def entry(argument):
    if argument == "refuses":
        raise ValueError("not like this")
    if argument == "dies":
        os._exit(4)
    if argument == "hangs":
        time.sleep(60)
    return {"argument": argument, "threads": os.environ["OMP_NUM_THREADS"]}, handle

def handle(job):
    kind, _, rest = job.partition(" ")
    if kind == "pid":
        time.sleep(float(rest or 0))
        return os.getpid()
    if kind == "loop":
        while True:
            pass
    if kind == "c-loop":  # holds the interpreter's lock
        re.match(r"(a+)+$", "a" * 60 + "b")
    if kind == "exit":
        print("before the end")
        os._exit(3)
    if kind == "quit":
        sys.exit(5)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "kill":
        os.kill(os.getpid(), 9)
    if kind == "raise":
        raise KeyError("colour")
    if kind == "print":
        print("x" * 100_000)
        os.system("echo from a child; echo and its errors >&2")
        sys.stdin.read()
    if kind == "fork":
        if not os.fork():
            return "the child"
    if kind == "fork-sleep":
        if not os.fork():
            time.sleep(60)
    if kind == "sleep":
        time.sleep(float(rest))
    if kind == "lambda":
        return lambda: 0
    if kind == "hoard":
        hoard.append(b'x' * 10**8)
    if kind == "explode":
        bytearray(10**11)
    return job
"""


@pytest.fixture
def importable(tmp_path, monkeypatch):
    (tmp_path / "their_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]))


@pytest.fixture
def start(importable):
    started = []

    def make(argument=None, *, count=1, **settings):
        started.append(Workers("their_jobs:entry", argument, name="theirs", **settings))
        started[-1].enlarge(count)
        return started[-1]

    yield make
    for workers in started:
        workers.close()


def answers(workers, *jobs, together=1):
    return [answer for _, answer in sorted(workers.ask(jobs, together=together), key=lambda pair: pair[0])]


def lives(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone(pid, seconds=5.0):
    end = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not lives(pid)


@pytest.mark.parametrize(("count", "together"), [(1, 1), (1, 100), (3, 1), (2, 7)])
def test_every_job_has_its_answer_whoever_gives_it(start, count, together):
    jobs = [f"job {k}" for k in range(20)]
    assert answers(start(count=count), *jobs, together=together) == jobs


def test_they_work_at_the_same_time_on_one_thread_each(start):
    workers = start("hello", count=2)
    assert workers.greeting == {"argument": "hello", "threads": "1"}
    pids = set()
    while len(pids) < 2:  # the second comes when it is ready
        pids |= set(answers(workers, "pid 0.05", "pid 0.05"))
    begun = time.monotonic()
    answers(workers, "sleep 0.6", "sleep 0.6")
    assert time.monotonic() - begun < 1.1


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ("loop", r"no answer within 0\.5 s; it was at .*their_jobs\.py:\d+, in handle"),
        ("c-loop", r"no answer within 0\.5 s; it was at .*, in match"),
        ("sleep 60", r"no answer within 0\.5 s; it was at .*their_jobs\.py:\d+, in handle"),
        ("exit", r"its process died with exit code 3"),
        ("crash", r"its process died with signal SIGSEGV; it was at .*ctypes.*, in string_at"),
        ("kill", r"its process died with signal SIGKILL \(out of memory\?\)"),
        ("quit", "raised SystemExit: 5"),
        ("raise", "raised KeyError: 'colour'"),
        ("lambda", "returned what cannot be sent to another process"),
    ],
)
def test_a_fault_is_that_of_its_job_alone(start, job, words):
    workers = start(time_limit=0.5)
    before, (pid,), after = ["a", "b"], answers(workers, "pid"), ["c", "d"]
    *others, fault = [answer for _, answer in sorted(workers.ask([*before, *after, job], together=5))]
    assert others == before + after
    assert isinstance(fault, Fault)
    assert re.search(words, fault.message), fault.message
    said = answers(workers, "a", job, "b", "c", together=4)
    assert said[:1] + said[2:] == ["a", "b", "c"], "what comes behind it is asked of the next worker"
    assert isinstance(said[1], Fault)
    assert lives(pid) if fault.message.startswith(("raised", "returned")) else gone(pid)


def test_what_is_printed_goes_to_the_log_with_a_name(start, tmp_path, capfd):
    workers = start()
    assert answers(workers, "print", "a") == ["print", "a"]
    workers.log.to(tmp_path / "log")
    assert answers(workers, "print") == ["print"]
    workers.close()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines.count("[theirs] from a child") == lines.count("[theirs] and its errors") == 2
    assert max(map(len, lines)) <= 100_000 + len("[theirs] ")
    assert capfd.readouterr() == ("", "")


def test_what_forks_answers_once_and_leaves_no_child(start):
    workers = start(time_limit=5.0)
    assert answers(workers, "fork", "fork-sleep", "a") == ["fork", "fork-sleep", "a"]
    (pid,) = answers(workers, "pid")
    group = [int(p.name) for p in Path("/proc").glob("[0-9]*") if _group(p) == pid]
    assert len(group) > 1, "the sleeping child"
    workers.close()
    assert all(gone(member) for member in group)


def _group(place):
    with contextlib.suppress(OSError):
        return int((place / "stat").read_text().rpartition(")")[2].split()[2])


def test_one_that_dies_at_rest_is_replaced_and_nobody_blamed(start):
    workers = start()
    (pid,) = answers(workers, "pid")
    os.kill(pid, signal.SIGKILL)
    (worker,) = workers._staff
    while worker.can_be_asked():  # a process is not over before the last of its threads is
        time.sleep(0.01)
    assert answers(workers, "a", "b") == ["a", "b"]


def test_whoever_stops_listening_waits_for_nobody(start):
    workers = start(count=2)
    for _, answer in workers.ask(["a", "sleep 60", "sleep 60"]):
        assert answer == "a"
        break
    begun = time.monotonic()
    assert answers(workers, "b") == ["b"]
    assert time.monotonic() - begun < 10


def test_one_that_cannot_start_says_why(start):
    with pytest.raises(ConfigError, match="ValueError: not like this"):
        start("refuses")
    with pytest.raises(WorkerError, match="cannot be started: its process died with exit code 4"):
        start("dies")
    with pytest.raises(WorkerError, match=r"cannot be started: no answer within 0\.1 s"):
        start("hangs", start_limit=0.1)


def test_after_the_end_there_is_no_answer(start):
    workers = start()
    workers.close()
    with pytest.raises(WorkerError, match="ended already"):
        answers(workers, "a")


@pytest.mark.skipif(sys.platform != "linux", reason="the bound is known on Linux alone")
def test_one_that_leaks_is_replaced_and_one_that_explodes_gets_no_memory(start):
    workers = start(memory_limit=0.6)
    exploded, after = answers(workers, "explode", "a")
    assert "MemoryError" in exploded.message
    assert after == "a"
    said = answers(workers, *["pid", "hoard"] * 6)
    assert len(set(said[::2])) == 2, "replaced by one that has nothing yet"
    assert said[1::2] == ["hoard"] * 6, "before it asked for too much"


PARENT = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background begins without it
from pertoken.machine.workers import Workers
workers = Workers("their_jobs:entry", None)
((_, pid),) = workers.ask(["pid"])
print(pid, flush=True)
how = sys.argv[1]
if how == "exception":
    raise KeyError("colour")
if how == "busy":  # a worker that holds its interpreter's lock, to the end of its time
    workers.time_limit = 1.0
    threading.Thread(target=lambda: list(workers.ask(["loop"])), daemon=True).start()
    time.sleep(0.2)
if how != "end":
    time.sleep(60)
"""


@pytest.mark.parametrize(
    ("how", "number"),
    [("end", None), ("exception", None), ("wait", signal.SIGINT), ("wait", signal.SIGTERM), ("wait", signal.SIGKILL),
     ("busy", signal.SIGKILL)],
)  # fmt: skip
def test_none_outlives_its_parent(importable, how, number):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    if number is not None:
        time.sleep(0.5)
        assert lives(pid)
        parent.send_signal(number)
    parent.communicate(timeout=20)
    assert gone(pid)
