"""Resuming is exact: a run that is interrupted after any step ends like one that never was, bit for bit."""

import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pertoken import assembly
from pertoken.config import RunConfig
from pertoken.errors import RewardError, RunFolderError
from pertoken.jobs import run
from pertoken.policy import checkpoint
from pertoken.policy.checkpoint import load_state, state_writer
from pertoken.rewards import Weighted, episode_reward
from pertoken.tracking import RunReader, checkpoints
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.runs import verify_run

SPEC = importlib.util.spec_from_file_location("kills", Path(__file__).parents[1] / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kills)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("resume")
    kills.prepare(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        yield place


def configuration(place, folder, **sections):
    """As `benchmarks/kills.py` has it: adaptive KL, cosine schedule, evaluations, early stopping, a moody reward."""
    values = kills.configuration(place, "full", folder).model_dump(exclude={"credit"})
    values |= {"stop": {"steps": 3, "patience": 50}, "checkpoint": {}}
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return RunConfig.model_validate(values)


@pytest.fixture(autouse=True)
def without_reports(monkeypatch):
    monkeypatch.setattr(run, "_write_report", lambda folder, on_note: None)


@pytest.fixture(scope="module")
def whole_gae(place):
    """What an undisturbed run with a critic comes to."""
    return finished(configuration(place, place / "whole", **CREDITS["gae"]))


def unsettle():
    """Leave the global random states somewhere else, as another process has them."""
    torch.manual_seed(random.randrange(10**6))
    np.random.seed(random.randrange(10**6))
    random.seed(random.randrange(10**6))


def interrupted_after(config, steps):
    """Make so many more steps and stop there."""
    unsettle()
    made = []
    resume = config.run_folder if config.run_folder.exists() else None
    return run.train(
        config, resume=resume, on_step=lambda report, _: made.append(report.step),
        interrupted=lambda: len(made) >= steps,
    )  # fmt: skip


def finished(config):
    unsettle()
    result = run.train(config, resume=config.run_folder if config.run_folder.exists() else None)
    assert not result.interrupted
    return kills.outcome(config.run_folder)


BY_SEGMENTS = {"max_new_tokens": 6, "top_p": 0.95, "segment": {"tokens": 2, "context": 3}}
CREDITS = {
    "per_part": {
        "credit": {"type": "per_part", "parts": {"moody": {"gamma": 0.9, "by": "episode"}}},
        "update": {"epochs": 1, "minibatches": 1},
    },
    "group_process": {
        "credit": {"type": "group_process"},
        "kl": {"place": "loss"},
        "objective": {"level": "sequence", "entropy_coefficient": 0.01},
    },
    "gae": {"credit": {"type": "gae"}, "policy": {"value_head": {}}},
    "lora and dropout": {"credit": {"type": "leave_one_out"}, "policy": {"lora": {"rank": 2}, "dropout": True}},
    "drawn ahead": {"credit": {"type": "leave_one_out"}, "rollout": {"ahead": True}},
    "by segments": {
        "credit": {"type": "gae"},
        "policy": {"value_head": {}},
        "rollout": {"sampling": BY_SEGMENTS},
    },
    "by segments, drawn ahead": {
        "credit": {"type": "leave_one_out"},
        "rollout": {"sampling": BY_SEGMENTS, "ahead": True},
    },
    "bfloat16": {"credit": {"type": "leave_one_out"}, "policy": {"precision": "bfloat16"}},
}


@pytest.mark.parametrize("sections", CREDITS.values(), ids=CREDITS)
def test_trap_27_interrupted_after_each_step_it_ends_as_if_it_never_was(place, tmp_path, sections):
    whole = finished(configuration(place, tmp_path / "whole", **sections))
    parts = configuration(place, tmp_path / "parts", **sections)
    while interrupted_after(parts, 1).interrupted:
        pass
    assert len(RunReader(tmp_path / "parts").run()["resumed"]) == 2
    assert kills.outcome(tmp_path / "parts") == whole
    coefficients = whole["metrics"]["kl/coefficient"]
    assert len(set(coefficients)) == len(coefficients), "the adaptive KL is at work"


# --- checkpoints beside the steps -----------------------------------------------------------------------------

BESIDE = {"credit": {"type": "leave_one_out"}, "checkpoint": {"every": 1, "background": True}}


def test_what_is_written_in_the_background_is_the_state_of_its_step(place, tmp_path, monkeypatch):
    """However far the run has gone meanwhile: here the next step is made before the first byte is written."""
    gone_on, save = threading.Event(), checkpoint.save_file

    def late(*what):
        assert gone_on.wait(60)
        save(*what)

    written = []
    for background in (False, True):
        every_second = {"checkpoint": {"every": 2, "background": background}}
        config = configuration(place, tmp_path / str(background), **(BESIDE | every_second))
        monkeypatch.setattr(checkpoint, "save_file", late if background else save)
        run.train(config, on_step=lambda report, _: gone_on.set() if report.step == 3 else None)
        written.append((config.run_folder / "checkpoints" / "step-000002" / "state.safetensors").read_bytes())
        gone_on.clear()
    assert written[0] == written[1]


def test_a_checkpoint_in_the_background_is_not_seen_before_it_is_whole(place, tmp_path, monkeypatch):
    """The run goes on meanwhile, and waits for it at the next one; ended at once, it leaves a whole one too."""
    kept = {"checkpoint": {"every": 1, "background": True, "keep": 3}}  # nothing is removed while this test looks
    config = configuration(place, tmp_path / "run", **(BESIDE | kept))
    store, begun, let_go = CheckpointStore(tmp_path / "run" / "checkpoints"), threading.Event(), threading.Event()
    manifest = checkpoints._manifest

    def slowly(folder, step, metric):
        assert threading.current_thread().name == "pertoken-checkpoint"
        begun.set()
        assert let_go.wait(60)
        return manifest(folder, step, metric)

    def look(report, _):
        assert begun.wait(60)
        if report.step == 1:
            assert [path.name for path in store.folder.iterdir()] == [".partial-000001"]
            assert store.newest() == (None, [])
            let_go.set()
        else:
            assert store.newest()[0].step >= report.step - 1
        if report.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "_manifest", slowly)
    with pytest.raises(KeyboardInterrupt):
        run.train(config, on_step=look)
    assert store.newest()[0].step == 3
    assert all(path.name.startswith("step-") for path in store.folder.iterdir())


@pytest.mark.parametrize("at", [1, 3], ids=["found at the next one", "found at the end"])
def test_a_checkpoint_in_the_background_that_fails_ends_the_run_by_name(place, tmp_path, monkeypatch, at):
    manifest = checkpoints._manifest

    def full(folder, step, metric):
        if step >= at:
            raise OSError(28, "No space left on device")
        return manifest(folder, step, metric)

    config, made = configuration(place, tmp_path / "run", **BESIDE), []
    monkeypatch.setattr(checkpoints, "_manifest", full)
    with pytest.raises(RunFolderError, match=r"cannot write the checkpoint .*No space left"):
        run.train(config, on_step=lambda report, _: made.append(report.step))
    assert made == list(range(1, at + 1))
    assert RunReader(tmp_path / "run").run()["status"] == "failed"


def test_weights_on_their_way_and_running_statistics_go_on(place, tmp_path):
    """A schedule is a function of the step; what the normaliser remembers is in the checkpoint."""
    parts = [
        {"name": "rouge_l", "granularity": "token", "weight": [[1, 0.0], [3, 1.0]], "normalise": "group"},
        {"fn": "moody:Moody", "name": "moody", "normalise": "running", "clip": [-1, 0.02]},
        {"name": "length", "min_words": 30, "constraint": {"least": -0.1, "rate": 0.5}},
    ]

    def config(folder):
        values = configuration(place, folder, credit={"type": "leave_one_out_process"}).model_dump()
        return RunConfig.model_validate(values | {"rewards": parts})

    whole = finished(config(tmp_path / "whole"))
    while interrupted_after(config(tmp_path / "parts"), 1).interrupted:
        pass
    assert kills.outcome(tmp_path / "parts") == whole
    assert whole["metrics"]["weight/rouge_l"] == [0.0, 0.5, 1.0]
    assert 0.0 == whole["metrics"]["weight/length"][0] < whole["metrics"]["weight/length"][1]
    assert min(whole["metrics"]["clipped/moody"]) > 0


@pytest.mark.parametrize("step", [0, 1, 2])
def test_interrupted_once_after_step_k_it_ends_as_if_it_never_was(place, tmp_path, whole_gae, step):
    config = configuration(place, tmp_path / "parts", **CREDITS["gae"])
    interrupted_after(config, step)
    assert finished(config) == whole_gae


def test_without_a_checkpoint_it_begins_again_at_the_beginning(place, tmp_path):
    """Evaluation 0 too: the rewards draw from global random states there."""
    config = configuration(place, tmp_path / "run")
    whole = finished(config)
    assert finished(config) == whole
    assert RunReader(tmp_path / "run").run()["resumed"][0]["step"] == 0


def test_early_stopping_counts_on_after_a_resume(place, tmp_path):
    """Three evaluations without a better one in a row, and an interruption between them."""
    stop = {"stop": {"steps": 9, "patience": 3}, "evaluation": {"every": 1}, "update": {"learning_rate": 1e-9}}
    whole = configuration(place, tmp_path / "whole", **stop)
    assert "no better chrf in 3 evaluations" in run.train(whole).reason
    parts = configuration(place, tmp_path / "parts", **stop)
    while (result := interrupted_after(parts, 1)).interrupted:
        pass
    assert "no better chrf in 3 evaluations" in result.reason
    assert kills.outcome(tmp_path / "parts") == kills.outcome(tmp_path / "whole")


def test_a_damaged_checkpoint_costs_steps_and_changes_nothing(place, tmp_path):
    config = configuration(place, tmp_path / "run", checkpoint={"every": 1, "keep": 3})
    whole = finished(config)
    for damaged in (1, 3):
        for step in range(3, 3 - damaged, -1):
            path = tmp_path / "run" / "checkpoints" / f"step-{step:06d}" / "state.safetensors"
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 255
            path.write_bytes(content)
        assert finished(config) == whole
        assert RunReader(tmp_path / "run").run()["resumed"][-1]["step"] == 3 - damaged
        assert verify_run(tmp_path / "run") == []


def test_all_that_a_step_depends_on_is_in_a_checkpoint(place, tmp_path):
    """Directly: save, do something else, load, and look at each part."""
    config = configuration(place, tmp_path / "run", **CREDITS["gae"])
    interrupted_after(config, 2)
    path = tmp_path / "run" / "checkpoints" / "step-000002"
    first = assembly.build_run(config, checkpoint=path)
    drawn = (torch.rand(3).tolist(), np.random.random(3).tolist(), random.random())
    unsettle()
    again = assembly.build_run(config, checkpoint=path)
    assert (torch.rand(3).tolist(), np.random.random(3).tolist(), random.random()) == drawn
    assert again.progress == first.progress
    assert again.progress.step == 2
    assert again.engine.version == 2
    assert again.kl.coefficient == first.kl.coefficient != config.kl.coefficient
    assert again.rewards[1].state() == first.rewards[1].state() != {"mean": 0.0}
    for name, parameter in again.policy.trainable().items():
        state, known = again.optimizer.state[parameter], first.optimizer.state[first.policy.trainable()[name]]
        assert state.keys() == known.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(state[key], known[key]) for key in state), name


def test_a_checkpoint_of_another_policy_is_refused_by_name(place, tmp_path):
    config = configuration(place, tmp_path / "run", **CREDITS["lora and dropout"])
    interrupted_after(config, 1)
    for change, words in (
        ({"lora": {"rank": 4}}, r"lora_A\.default\.weight \(and 27 more\) this one needs \[4, 64\].* holds \[2, 64\]"),
        ({"lora": None}, r"needs nothing, and the checkpoint holds \[2, 64\]"),
    ):
        other = configuration(place, tmp_path / "run", credit={"type": "leave_one_out"}, policy=change)
        with pytest.raises(RunFolderError, match=words):
            run.train(other, resume=tmp_path / "run")


def test_what_is_loaded_is_no_pickle_and_nonsense_is_one_sentence(place, tmp_path):
    built = assembly.build_run(configuration(place, tmp_path / "run"))
    (tmp_path / "saved").mkdir()
    state_writer(built.policy, built.optimizer, built.state_dict())(tmp_path / "saved")
    for name in ("state.json", "state.safetensors"):
        whole = (tmp_path / "saved" / name).read_bytes()
        for content in (b"", b"\x80\x04\x95.", whole[: len(whole) // 2], b"{}", b"null", b"[" * 100_000):
            (tmp_path / "saved" / name).write_bytes(content)
            with pytest.raises(RunFolderError, match="not a readable checkpoint"):
                load_state(tmp_path / "saved", built.policy, built.optimizer)
        (tmp_path / "saved" / name).write_bytes(whole)
    load_state(tmp_path / "saved", built.policy, built.optimizer)


@pytest.mark.parametrize("state", [{1: 2}, (1, 2), {"a": torch.ones(1)}, object()])
def test_a_state_that_json_cannot_give_back_is_the_reward_s_fault(state):
    reward = episode_reward(lambda sample: 0.0)
    reward.get_state, reward.set_state = lambda: state, lambda _: None
    with pytest.raises(RewardError, match=r"reward 'mine': get_state\(\)"):
        Weighted(reward, 1.0, "mine").state()


def test_other_controllers_and_rewards_begin_anew_and_say_so(place, tmp_path):
    config = configuration(place, tmp_path / "run")
    interrupted_after(config, 1)
    notes = []
    changed = configuration(place, tmp_path / "run", kl={"target": None})
    changed = changed.model_copy(update={"rewards": (*changed.rewards, changed.rewards[1].model_copy(
        update={"name": "new"}))})  # fmt: skip
    run.train(changed, resume=tmp_path / "run", on_note=notes.append, interrupted=lambda: True)
    assert any("its coefficient starts anew" in note for note in notes)
    assert any("no state of 'new'" in note for note in notes)


def test_on_another_machine_it_says_that_the_last_bits_may_differ(place, tmp_path, monkeypatch):
    config = configuration(place, tmp_path / "run")
    interrupted_after(config, 1)
    here = checkpoint.machine()
    for changed, said in (
        ({}, []),
        ({"threads": "99"}, [f"threads {here['threads']} there, 99 here: from here on the"]),
    ):
        monkeypatch.setattr(checkpoint, "machine", lambda changed=changed: here | changed)
        notes = []
        run.train(config, resume=tmp_path / "run", on_note=notes.append, interrupted=lambda: True)
        assert [note.partition(" last")[0] for note in notes if "last bits" in note] == said


def test_a_trained_model_is_replaced_whole(place, tmp_path):
    config = configuration(place, tmp_path / "run", stop={"steps": 1})
    finished(config)
    before = hashlib.sha256((tmp_path / "run" / "model" / "model.safetensors").read_bytes()).hexdigest()
    built = assembly.build_run(config)
    built.policy.save = lambda folder: (folder.mkdir(), (folder / "half").touch(), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run._save_model(built.policy, tmp_path / "run" / "model")
    assert hashlib.sha256((tmp_path / "run" / "model" / "model.safetensors").read_bytes()).hexdigest() == before
    run._save_model(assembly.build_policy(config), tmp_path / "run" / "model")
    assert hashlib.sha256((tmp_path / "run" / "model" / "model.safetensors").read_bytes()).hexdigest() != before
    assert not list((tmp_path / "run").glob(".*model"))


def test_killed_processes_leave_runs_that_end_as_if_they_never_were():
    """A few kills; `python benchmarks/kills.py --kills 200` makes more of them."""
    arguments = ["--kills", "3", "--settings", "gae", "--seed", str(random.SystemRandom().randrange(10**6))]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", kills.__file__, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(kills.__file__).parents[1])}, capture_output=True, text=True,
        check=False, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + str(arguments)
    assert ", 0 of them ended otherwise" in done.stdout


# --- power cuts ---------------------------------------------------------------------------------------------


@pytest.fixture
def disk(monkeypatch):
    """What a power cut would leave: it looks at each rename of a sound file or folder, and at what was promised."""

    class Disk:
        """Content that was brought to the disk, and folders whose names were not yet."""

        def __init__(self):
            self.brought, self.open_names, self.renames = set(), set(), 0

        def has(self, path):
            return all(self._mark(os.stat(each)) in self.brought for each in (path, *path.rglob("*")))

        def sync(self, descriptor):
            found = os.fstat(descriptor)
            self.brought.add(self._mark(found))
            self.open_names = {folder for folder in self.open_names if os.stat(folder).st_ino != found.st_ino}

        def rename(self, source, target):
            source, target = Path(source), Path(target)
            if not target.name.startswith(".removed-"):  # a cut that undoes a removal harms nobody
                assert self.has(source), f"{source} became {target} before its content was brought to the disk"
                self.open_names.add(target.parent)
                self.renames += 1

        @staticmethod
        def _mark(found):
            return found.st_ino, found.st_size, found.st_mtime_ns

    disk = Disk()
    fsync, rename, replace = os.fsync, os.rename, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), disk.sync(descriptor)))
    monkeypatch.setattr(os, "rename", lambda source, target: (disk.rename(source, target), rename(source, target)))
    monkeypatch.setattr(os, "replace", lambda source, target: (disk.rename(source, target), replace(source, target)))
    return disk


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_power_cut_finds_all_that_was_promised_on_the_disk(place, tmp_path, disk):
    """Nothing gets its name before its content is on the disk, and no step is told before its row and name are."""
    config = configuration(place, tmp_path / "run", stop={"steps": 2}, checkpoint={"every": 1, "keep": 1})

    def told(report, seconds):
        assert disk.has(tmp_path / "run" / "metrics.jsonl")
        assert not disk.open_names, f"names in {disk.open_names} can be lost"
        assert disk.has(tmp_path / "run" / "checkpoints" / f"step-{report.step:06d}")

    run.train(config, on_step=told)
    assert disk.has(tmp_path / "run" / "model")
    assert not disk.open_names
    assert disk.renames > 10
