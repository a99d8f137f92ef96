"""The store of checkpoints: whole or not taken, whatever happens while one is written and afterwards."""

import json
import shutil
from collections import namedtuple

import pytest

from pertoken.errors import RunFolderError
from pertoken.tracking.checkpoints import MANIFEST, CheckpointStore


def save(store, step, *, metric=None, keep=9, keep_best=True, content=b"weights of step "):
    def write(folder):
        (folder / "state.safetensors").write_bytes(content + str(step).encode())
        (folder / "state.json").write_text(json.dumps({"progress": step}))

    return store.save(step, write, size=100, metric=metric, keep=keep, keep_best=keep_best)


def names(store):
    return [path.name for path in store.paths()]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def test_the_newest_is_taken_and_steps_are_numbers(store):
    assert store.newest() == (None, [])
    for step in (9, 999_999, 1_000_000):
        save(store, step)
    newest, notes = store.newest()
    assert (newest.step, notes) == (1_000_000, [])
    assert [checkpoint.step for checkpoint in store.complete()] == [9, 999_999, 1_000_000]
    assert newest.size == sum(path.stat().st_size for path in newest.path.iterdir() if path.name != MANIFEST)


def test_a_change_of_any_byte_is_seen_and_the_previous_checkpoint_taken(store):
    save(store, 1)
    for path in sorted(save(store, 2).iterdir()):
        whole = path.read_bytes()
        for place in range(len(whole)):
            for altered in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], whole[:place]):
                path.write_bytes(altered)
                newest, notes = store.newest()
                if newest.step == 2:  # the same in other words: a line end of the manifest, say
                    assert (path.name, json.loads(altered)) == (MANIFEST, json.loads(whole))
                    continue
                assert newest.step == 1
                assert notes[0].startswith("checkpoint step-000002 cannot be used: ")
        path.write_bytes(whole)
        path.rename(path.with_name("elsewhere"))
        assert store.newest()[0].step == 1
        path.with_name("elsewhere").rename(path)
    assert store.newest()[0].step == 2


def test_each_fault_has_a_name(store):
    path = save(store, 3)
    assert store.problem(path) is None
    (path / "state.json").write_text("{}")
    assert store.problem(path) == "state.json has 2 bytes, expected 15"
    (path / "state.json").write_text(json.dumps({"progress": 4}))
    assert store.problem(path) == "state.json was altered: its SHA-256 is not that of the manifest"
    (path / "state.json").unlink()
    assert store.problem(path) == "state.json is missing"
    path.rename(store.folder / "step-000004")
    path = store.folder / "step-000004"
    assert store.problem(path) == "its manifest.json is that of step 3"
    (path / MANIFEST).write_text("[" * 100_000)
    assert store.problem(path) == "its manifest.json is damaged"
    (path / MANIFEST).unlink()
    assert store.problem(path) == "it has no manifest.json: it was not written to its end"


@pytest.mark.parametrize(("number", "words"), [(3, "upgrade pertoken"), (1, "with the version that wrote it")])
def test_another_format_is_refused_not_skipped(store, monkeypatch, number, words):
    save(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr("pertoken.tracking.checkpoints.FORMAT_VERSION", number)
        save(CheckpointStore(store.folder / "other"), 2).rename(store.folder / "step-000002")
    with pytest.raises(RunFolderError, match=f"step-000002 is a checkpoint of format {number}.* reads 2: .*{words}"):
        store.newest()


def test_a_manifest_cannot_point_out_of_its_folder(store, monkeypatch, tmp_path):
    (tmp_path / "secret").write_text("x")
    monkeypatch.setattr("pertoken.tracking.checkpoints._sha256", lambda path: "0" * 64)
    path = save(store, 1)
    content = json.loads((path / MANIFEST).read_text()) | {"files": {"../../secret": {"bytes": 1, "sha256": "0" * 64}}}
    del content["sha256"]
    from pertoken.tracking.checkpoints import _digest

    (path / MANIFEST).write_text(json.dumps(content | {"sha256": _digest(content)}))
    assert "'../../secret', which is not a file beside it" in store.problem(path)


def test_retention_keeps_the_newest_and_the_best(store):
    for step, metric in enumerate([0.1, 0.5, None, 0.3, float("nan"), 0.2, None], start=1):
        save(store, step, metric=metric, keep=2)
    assert names(store) == ["step-000002", "step-000006", "step-000007"]
    assert store.complete()[0].metric == 0.5
    assert store.prune(keep=1, keep_best=False, dry_run=True) == store.paths()[:2]
    assert len(names(store)) == 3
    store.prune(keep=1, keep_best=False)
    assert names(store) == ["step-000007"]


def test_what_a_killed_process_could_not_prune_goes_when_its_step_is_saved_again(store):
    for step in (1, 2, 3):
        save(store, step)
    save(store, 3, keep=1, keep_best=False)
    assert names(store) == ["step-000003"]


def test_a_damaged_checkpoint_does_not_count_and_is_replaced_when_its_step_comes_again(store):
    save(store, 1)
    torn = save(store, 2)
    (torn / "state.json").unlink()
    save(store, 1, content=b"never written: step 1 is whole")
    assert (store.folder / "step-000001" / "state.safetensors").read_bytes() == b"weights of step 1"
    save(store, 2, keep=1)
    assert names(store) == ["step-000002"]
    assert store.problem(torn) is None


def test_a_full_disk_is_found_before_the_first_byte(store, monkeypatch):
    save(store, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1_000_000))
    with pytest.raises(RunFolderError, match=r"step-000002: it takes 0\.0 MB, and only 1\.0 MB are free"):
        save(store, 2)
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]


def test_a_failure_while_writing_leaves_nothing_behind(store):
    save(store, 1)

    def write(folder):
        (folder / "state.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        RunFolderError, match=r"No space left on device\. Earlier checkpoints and logs are as they were"
    ):
        store.save(2, write, size=1, metric=None, keep=1, keep_best=False)
    assert [path.name for path in store.folder.iterdir()] == ["step-000001"]


def test_a_kill_at_any_file_operation_of_saving_costs_no_checkpoint(store, killed_at):
    """The step is saved anew over and over, each time killed one operation later, with only one checkpoint kept."""
    save(store, 1, keep=1)
    for operation in range(1, 200):
        if not killed_at(operation, lambda: save(store, 2, keep=1)):
            break
        newest, notes = store.newest()
        assert newest is not None
        assert store.problem(newest.path) is None
        assert not notes, "what is half written or half removed must not be named like a checkpoint"
        shutil.rmtree(store.folder / "step-000002", ignore_errors=True)
        save(store, 1, keep=1)
        store.prune(keep=1, keep_best=False)
        assert [path.name for path in store.folder.iterdir()] == ["step-000001"], "leftovers are swept"
    assert 20 < operation < 199
    assert names(store) == ["step-000002"]
