"""Disks that are full or cannot be written: one sentence, nothing lost, and the run goes on when there is room."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pertoken.config import RunConfig
from pertoken.errors import RunFolderError
from pertoken.jobs import run
from pertoken.tracking.runs import verify_run


@contextlib.contextmanager
def mounted(folder, options):
    """A small file system of its own at `folder`; skips the test where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs root and a kernel that mounts a tmpfs here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


def configuration(model_folder, data, folder, steps=3):
    return RunConfig.model_validate(
        {
            "folder": str(folder),
            "policy": {"model": str(model_folder), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(data), "prompt": "{prompt}:"},
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "sampling": {"max_new_tokens": 4}},
            "evaluation": {"items": 3, "sampling": {"temperature": 0.0, "max_new_tokens": 4}},
            "checkpoint": {"every": 1},
            "stop": {"steps": steps},
        }
    )


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    other = ("time", "per_second", "memory")
    return [{key: value for key, value in row.items() if not any(word in key for word in other)} for row in rows]


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves about so many bytes free."""
    ballast = folder / "ballast"
    free = os.statvfs(folder)
    ballast.write_bytes(b"x" * max(0, free.f_bavail * free.f_frsize - leave))
    return ballast


@pytest.mark.parametrize("leave", [0, 20_000, 300_000, 1_300_000])
def test_a_disk_that_fills_up_costs_nothing_but_time(model_folder, data, tmp_path, leave):
    """The disk is full for rows, for the items of an evaluation, in the middle of a checkpoint, before the model."""
    whole = configuration(model_folder, data, tmp_path / "whole")
    run.train(whole)
    with mounted(tmp_path / "small", "size=8m") as small:
        config = configuration(model_folder, data, small / "run")
        made = []

        def fill_after_the_first_step(report, seconds):
            made.append(report.step)
            if len(made) == 1:
                fill(small, leave)

        with pytest.raises(RunFolderError, match=r"(?i)(no space left|free)"):
            run.train(config, on_step=fill_after_the_first_step)
        rows = metrics(small / "run")
        assert rows == metrics(tmp_path / "whole")[: len(rows)]
        with pytest.raises(RunFolderError, match=r"(?i)(no space left|free)"):
            run.train(config, resume=small / "run")  # still full: the same sentence, and still nothing lost
        (small / "ballast").unlink()
        run.train(config, resume=small / "run")
        assert verify_run(small / "run") == []
        assert metrics(small / "run") == metrics(tmp_path / "whole")
        model = (small / "run" / "model" / "model.safetensors").read_bytes()
        assert model == (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
        leftovers = [path for path in (small / "run").rglob("*") if ".partial" in path.name or ".tmp" in path.name]
        assert not leftovers


def test_a_full_disk_from_the_start_is_one_sentence(model_folder, data, tmp_path, pertoken):
    with mounted(tmp_path / "small", "size=64k,nr_inodes=5") as small:
        fill(small, 0)
        with pytest.raises(RunFolderError, match="no space left on device; free some space"):
            run.train(configuration(model_folder, data, small / "a" / "b" / "run"))


def test_a_read_only_folder_is_one_sentence(model_folder, data, tmp_path, pertoken):
    with mounted(tmp_path / "disk", "size=8m") as disk:
        config = configuration(model_folder, data, disk / "run")
        run.train(config)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for arguments in (["runs", "resume", disk / "run", "stop.steps=5"], ["runs", "prune", disk / "run"]):
            code, _, err = pertoken(*arguments)
            assert (code, "read-only file system; choose a run folder on a disk that can be written" in err) == (
                1,
                True,
            )
        code, _, err = pertoken("train", disk / "run" / "config.yaml", f"folder={disk / 'new'}")
        assert (code, "read-only file system" in err) == (1, True)
        assert pertoken("runs", "verify", disk / "run")[0] == 0
        assert "finished" in pertoken("runs", "list", disk)[1]
