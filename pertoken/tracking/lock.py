"""One run folder, one writer: a lock of the operating system, which ends with its process however that ends."""

import contextlib
import json
import os
import signal
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from pertoken.errors import RunFolderError
from pertoken.tracking.files import read_bytes, write_whole, writing

LOCK = ".lock"
WRITER = "writer.json"
"""Who holds the lock. A file of its own: on Windows nobody else can read a file that is locked."""


class RunLock:
    """The right to write to a run folder, from `RunLock(folder)` until `release()` or the end of the process.

    Raises RunFolderError, naming the other process, if somebody else has it. What a killed process left behind
    is no obstacle: the lock is the system's, the files only say who had it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The half second outlasts somebody who only looks whether the folder is locked.
        self._lock = FileLock(folder / LOCK, timeout=0.5, thread_local=False)
        with writing("the lock", folder / LOCK):
            try:
                self._lock.acquire()
            except Timeout as busy:
                raise RunFolderError(
                    f"{folder} is being written by {writer(folder)}. Wait until it ends, or end it; two writers would "
                    "mix their rows."
                ) from busy
        try:
            write_whole(folder / WRITER, _myself(), "the name of the writer")
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Let others write. A second call does nothing."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # the file alone locks nobody out
                (self._folder / WRITER).unlink(missing_ok=True)
            self._lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a living process writes to this folder now."""
    if not (folder / WRITER).exists():  # so that looking at a folder leaves no lock file in it
        return False
    probe = FileLock(folder / LOCK, timeout=0)
    try:
        probe.acquire()
    except Timeout:
        return True
    except OSError:  # a folder that may only be read has no writer here
        return False
    probe.release()
    return False


def writer(folder: Path) -> str:
    """The process that holds the lock, in words."""
    try:
        found = json.loads(read_bytes(folder / WRITER))
        return f"process {found['pid']} on {found['host']} (since {found['since']}: {found['command']})"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not said its name yet
        return "another process"


def ask_to_end(folder: Path) -> str:
    """SIGTERM to the process that writes to this folder, which lets a run end its step and save; who it is, in words.

    Raises RunFolderError if nobody writes, or somebody who cannot be reached from here.
    """
    if not is_locked(folder):
        raise RunFolderError(f"{folder} is not being written: there is nothing to stop")
    who = writer(folder)
    try:
        found = json.loads(read_bytes(folder / WRITER))
        pid, host = int(found["pid"]), found["host"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder} is being written by {who}, which has not said its name yet") from error
    if host != socket.gethostname() or pid <= 1:
        raise RunFolderError(f"{folder} is being written by {who}: end it there")
    try:
        os.kill(pid, signal.SIGTERM)
    except OSError as error:
        raise RunFolderError(f"{who} cannot be ended: {(error.strerror or str(error)).lower()}") from error
    return who


def _myself() -> bytes:
    me = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv)[:200],
    }
    return json.dumps(me).encode() + b"\n"
