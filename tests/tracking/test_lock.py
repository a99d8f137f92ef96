"""One run folder, one writer, and no lock that outlives its process."""

import os
import signal

import pytest

from pertoken.errors import RunFolderError
from pertoken.tracking import RunLog
from pertoken.tracking.lock import RunLock, is_locked


@pytest.fixture
def other_process(tmp_path):
    """The id of a process that holds the lock of `tmp_path`; it is killed afterwards, or by the test."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        lock = RunLock(tmp_path)  # noqa: F841 - it ends with its object
        os.write(writing, b"held")
        signal.pause()
    assert os.read(reading, 4) == b"held"
    yield pid
    os.kill(pid, signal.SIGKILL)  # one that is dead already, and not yet waited for, takes it too
    os.waitpid(pid, 0)


def test_a_second_process_is_refused_by_name_and_a_killed_one_holds_nothing(tmp_path, other_process):
    assert is_locked(tmp_path)
    with pytest.raises(RunFolderError, match=rf"is being written by process {other_process} on .* two writers would"):
        RunLock(tmp_path)
    os.kill(other_process, signal.SIGKILL)
    os.waitid(os.P_PID, other_process, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "writer.json").exists()
    assert not is_locked(tmp_path)
    RunLock(tmp_path).release()


def test_a_child_of_the_writer_does_not_hold_the_lock_for_it(tmp_path):
    """A worker that a reward started may outlive the run: that must not lock the folder."""
    reading, writing = os.pipe()
    writer = os.fork()
    if not writer:
        lock = RunLock(tmp_path)  # noqa: F841
        worker = os.fork()
        if not worker:
            signal.pause()
        os.write(writing, worker.to_bytes(8, "big"))
        signal.pause()
    worker = int.from_bytes(os.read(reading, 8), "big")
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    try:
        assert not is_locked(tmp_path)
        RunLock(tmp_path).release()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_two_logs_of_one_folder_exclude_each_other_in_one_process_too(tmp_path):
    with RunLog.create(tmp_path / "run", config_text="", seed=0) as log:
        with pytest.raises(RunFolderError, match=f"is being written by process {os.getpid()} on"):
            RunLog.open(tmp_path / "run", step=0)
        log.step(1, {"x": 1.0})
    with RunLog.open(tmp_path / "run", step=1) as again:
        again.step(2, {"x": 2.0})
    again.close()  # a second time does nothing
    assert not (tmp_path / "run" / "writer.json").exists()


def test_a_run_that_died_while_it_made_its_folder_leaves_it_usable(tmp_path, killed_at):
    def create():
        RunLog.create(tmp_path / "run", config_text="seed: 1\n", seed=1)

    for operation in range(1, 200):
        if not killed_at(operation, create):
            break
        if (tmp_path / "run" / "run.json").exists():
            RunLog.open(tmp_path / "run", step=-1).close()
            (tmp_path / "run" / "run.json").unlink()
    assert 10 < operation < 199
    RunLog.open(tmp_path / "run", step=-1).close()


def test_a_folder_of_something_else_gets_no_file_of_ours(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(RunFolderError, match="choose a new or an empty folder"):
        RunLog.create(tmp_path, config_text="", seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_that_cannot_be_locked_is_one_sentence(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(RunFolderError, match="cannot write the lock to"):
        RunLock(tmp_path)
