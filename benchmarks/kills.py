"""Kills training processes, resumes them, and compares what comes out with an undisturbed run, bit for bit.

    python benchmarks/kills.py --kills 200           # at random moments, and before random file operations
    python benchmarks/kills.py --operations          # before each file operation of a run, one after the other
    python benchmarks/kills.py --kills 10 --cli      # processes of `pertoken train`, instead of forks of this one
    python benchmarks/kills.py --signals 20          # SIGTERM, Ctrl-C and Ctrl-C twice, to `pertoken train`
    python benchmarks/kills.py --disks 20            # disks that fill up, or are read-only on resuming (needs root)

A life is a process that begins or resumes a run. A run is killed one to five times and then lives to its end. What
counts: the SHA-256 of the trained weights, all rows of metrics and evaluations but their timings, and a folder in
which `verify_run` finds nothing. What a signal or a disk ends has to end by a named error or as it was asked to. Exits
with 1 if any run ended in another way, and names its folder.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pertoken.config import RunConfig
from pertoken.errors import PertokenError
from pertoken.jobs import run
from pertoken.testing import byte_tokenizer, tiny_model
from pertoken.tracking import RunReader
from pertoken.tracking.runs import verify_run
from pertoken.training import trainer

STEPS = 6
LOOK = 0.003
"""Seconds between looks at how far a process has come."""
NAMED = 3
"""Exit code of a process that ended by a named error."""
LEFT = (0, 5_000, 20_000, 100_000, 300_000, 1_200_000)
"""Bytes that stay free on a disk that is filled up: for no row, for half a row, for half a checkpoint, for no model."""
STAGES = ("building", "between", "evaluate", "generate", "update", "record", "checkpoint", "finishing")
SETTINGS = {
    "gae": {"credit": {"type": "gae"}, "policy": {"value_head": {}}, "objective": {"entropy_coefficient": 0.01}},
    "lora": {
        "credit": {"type": "leave_one_out_process"},
        "policy": {"lora": {"rank": 2}, "dropout": True},
        "checkpoint": {"background": True},
    },
    "full": {"credit": {"type": "group_relative"}, "update": {"epochs": 2, "minibatches": 2}},
}


REWARD = '''
"""A reward that depends on all that a reward can: its own memory, and every global random state."""
import random

import numpy as np
import torch

from pertoken.rewards import SampleReward


class Moody(SampleReward):
    def __init__(self):
        self.mean = 0.0

    def token_values(self, sample):
        self.mean = 0.9 * self.mean + 0.1 * sample.text.count("e")
        noise = random.random() + np.random.random() + torch.rand(()).item()
        return [self.mean + 0.01 * noise * (k + 1) for k in range(len(sample.tokens))]

    def get_state(self):
        return {"mean": self.mean}

    def set_state(self, state):
        self.mean = state["mean"]
'''


def prepare(place: Path) -> None:
    """The model, the data and the reward that all runs share."""
    (place / "moody.py").write_text(REWARD, encoding="utf-8")
    tiny_model(seed=1).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    rows = [{"id": str(k), "prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(60)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def configuration(place: Path, setting: str, folder: Path) -> RunConfig:
    """A run with everything in it that has a state: adaptive KL, schedule, evaluations, early stopping, checkpoints."""
    values = {
        "folder": str(folder),
        "policy": {"model": str(place / "model"), "precision": "float32", "device": "cpu"},
        "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:", "id": "id"},
        "rollout": {"prompts_per_step": 3, "samples_per_prompt": 3, "sampling": {"max_new_tokens": 6, "top_p": 0.95}},
        "rewards": [{"name": "rouge_l", "granularity": "token"}, {"fn": "moody:Moody", "name": "moody"}],
        "kl": {"coefficient": 0.1, "target": 0.05, "horizon": 50},
        "update": {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2},
        "evaluation": {"items": 3, "every": 2, "metric": "chrf", "sampling": {"temperature": 0, "max_new_tokens": 6}},
        "checkpoint": {"every": 1, "keep": 1},
        "log": {"episodes_every": 2},
        "stop": {"steps": STEPS, "patience": 50},
    }
    for section, fields in SETTINGS[setting].items():
        values[section] = {**values.get(section, {}), **fields}
    return RunConfig.model_validate(values)


def outcome(folder: Path) -> dict[str, object]:
    """All that must be equal between two runs of one configuration."""
    reader = RunReader(folder)
    weights = hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()
    metrics = {name: column for name, column in reader.metrics().items() if not of_the_machine(name)}
    episodes = {step: reader.episodes(step) for step in reader.episode_steps()}
    faults = verify_run(folder)
    return {"weights": weights, "metrics": metrics, "evaluations": reader.evaluations(), "episodes": episodes} | (
        {"faults": faults} if faults else {}
    )


def of_the_machine(name: str) -> bool:
    """Figures that differ between two runs of the same thing: of time and memory."""
    return name in ("time", "tokens/per_second") or name.startswith(("time/", "memory/"))


# --- lives --------------------------------------------------------------------------------------------------


def live(config: RunConfig) -> None:
    """Begin the run of `config`, or go on with it."""
    folder = config.run_folder
    run.train(config, resume=folder if (folder / "run.json").exists() else None)


def fork(work: Callable[[], None]) -> int:
    """The process that does `work`. This process never computes with torch, so that its children can."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except PertokenError:
            code = NAMED
        except BaseException:
            traceback.print_exc()  # os._exit below would swallow it
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> str:
    """How a process ended: `finished`, `killed`, or what else."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) == signal.SIGKILL else f"signal {os.WTERMSIG(status)}"
    code = os.WEXITSTATUS(status)
    return {0: "finished", NAMED: "a named error"}.get(code, f"exit code {code}")


def run_for(pid: int, seconds: float) -> None:
    """Return when a child has computed for so many seconds, or has ended (it is not waited for, and keeps its number).

    Seconds of its own: how much of a clock's it gets depends on what else the machine does.
    """
    clock = (~pid << 3) | 2  # of the processor time of a process, as Linux numbers them
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.clock_gettime(clock) >= seconds:
            break
        time.sleep(LOOK)


def computed_by_children() -> float:
    """Seconds that the children which were waited for have computed."""
    used = os.times()
    return used.children_user + used.children_system


def import_what_lives_do(work: Callable[[], None]) -> None:
    """Do `work` in a process, and import here what that has imported: no process that is forked then needs to."""
    reading, writing = os.pipe()

    def told() -> None:
        work()
        os.write(writing, json.dumps(sorted(sys.modules)).encode())

    pid = fork(told)
    os.close(writing)
    with open(reading, "rb") as names:
        modules = json.loads(names.read() or b"[]")
    assert ended(pid) == "finished"
    for name in modules:
        if name not in sys.modules and name not in ("__mp_main__", "moody"):
            with contextlib.suppress(Exception):  # some cannot be imported by their name
                importlib.import_module(name)


def count_operations(made: mmap.mmap, *, die_at: int | None) -> None:
    """Write the number of file operations of this process into shared memory: of what Python reports to auditors, and
    fsync. SIGKILL right before the one of the number `die_at`."""

    def count(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and len(arguments) > 2 and int(str(arguments[2] or 0)) & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.fsync", "os.truncate"):
            number = int.from_bytes(made[:]) + 1
            made[:] = number.to_bytes(len(made))
            if number == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: (count("os.fsync", ()), fsync(descriptor))[1]  # type: ignore[assignment]
    sys.addaudithook(count)


def mark_stages(place: mmap.mmap) -> None:
    """Write down in shared memory which stage the process is in."""

    def marked(stage: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            before, place[0] = place[0], STAGES.index(stage)
            try:
                return function(*arguments, **named)
            finally:
                place[0] = before or STAGES.index("between")

        return call

    place[0] = 0
    for stage in ("evaluate", "generate", "update", "record", "checkpoint"):
        setattr(trainer, stage, marked(stage, getattr(trainer, stage)))
    run._save_model = marked("finishing", run._save_model)
    run._write_report = marked("finishing", run._write_report)


def cli(folder: Path, config: Path) -> list[str]:
    arguments = ["--resume", str(folder)] if (folder / "run.json").exists() else [str(config)]
    return [sys.executable, "-m", "pertoken.cli", "train", *arguments]


# --- experiments --------------------------------------------------------------------------------------------


class Experiment:
    """Undisturbed runs of each setting, and disturbed ones that are compared with them."""

    def __init__(self, place: Path, settings: list[str], *, as_cli: bool = False) -> None:
        self.place, self.settings, self.as_cli = place, settings, as_cli
        self.kills, self.runs, self.failures = 0, 0, list[str]()
        self.stages: Counter[str] = Counter()
        self.ends: Counter[str] = Counter()
        self.stage, self.made = mmap.mmap(-1, 1), mmap.mmap(-1, 4)
        assert ended(fork(lambda: prepare(place))) == "finished"
        sys.path.insert(0, str(place))
        import_what_lives_do(lambda: live(configuration(place, settings[0], place / "first")))
        self.expected, self.seconds, self.operations = dict[str, object](), dict[str, float](), dict[str, int]()
        for setting in settings:
            folder, before = place / f"whole-{setting}", computed_by_children()
            assert self.life(setting, folder) == "finished", f"the undisturbed run in {folder} failed"
            self.seconds[setting] = computed_by_children() - before
            self.operations[setting] = int.from_bytes(self.made[:])
            self.expected[setting] = outcome(folder)

    def life(self, setting: str, folder: Path, *, after: float | None = None, operation: int | None = None) -> str:
        """One process on the run in `folder`, killed when it has computed for so many seconds, or at that operation, or
        never."""
        if self.as_cli:
            job = self._cli(setting, folder)
            if after is not None:
                run_for(job.pid, after)
                job.kill()
            code = job.wait()
            return {0: "finished", -9: "killed"}.get(code, f"exit code {code}")
        config = configuration(self.place, setting, folder)

        def work() -> None:
            mark_stages(self.stage)
            count_operations(self.made, die_at=operation)
            live(config)

        self.made[:] = bytes(len(self.made))
        pid = fork(work)
        if after is not None:
            run_for(pid, after)
            os.kill(pid, signal.SIGKILL)
        return ended(pid)

    def disturbed(self, setting: str, folder: Path, deaths: list[dict[str, float]]) -> int:
        """Run through these deaths and then to the end, compare; returns how many of the deaths it died."""
        kills = 0
        for death in deaths:
            end = self.life(setting, folder, **death)  # type: ignore[arg-type]
            if end == "killed":
                kills += 1
                half = (folder / "checkpoints").is_dir() and any((folder / "checkpoints").glob(".*"))
                self.stages["inside a checkpoint" if half else STAGES[self.stage[0]]] += 1
            elif end != "finished":
                self.failures.append(f"{folder}: a life ended with {end}")
        self.kills += kills
        self._last_life(setting, folder)
        return kills

    def at_random(self, kills: int, seed: int) -> None:
        """Runs with one to five deaths each, until there were `kills`."""
        source = random.Random(seed)
        while self.kills < kills:
            setting = source.choice(self.settings)
            deaths = [self._death(setting, source) for _ in range(source.randint(1, 5))]
            self.disturbed(setting, self.place / f"run-{self.runs}", deaths)
            print(f"so far: {self.report()}", flush=True)

    def _death(self, setting: str, source: random.Random) -> dict[str, float]:
        """A random moment of a life, or right before a random one of its file operations: these take little time."""
        if self.as_cli or source.random() < 0.6:
            return {"after": source.uniform(0, self.seconds[setting])}
        return {"operation": source.randint(1, self.operations[setting])}

    def at_operations(self, every: int = 1, first: int = 1) -> None:
        """A run per file operation of the undisturbed one, killed right before it (before every n-th of them)."""
        for setting in self.settings:
            operation = first
            while self.disturbed(setting, self.place / f"run-{self.runs}", [{"operation": operation}]):
                operation += every
                print(f"so far: {self.report()}", flush=True)

    def by_signals(self, count: int, seed: int) -> None:
        """Runs of `pertoken train` that get a signal at a random moment, or two, and then live to their end."""
        source, self.as_cli = random.Random(seed), True
        before = computed_by_children()
        assert self.life(self.settings[0], self.place / "by-cli") == "finished"
        span = computed_by_children() - before
        for number in range(count):
            setting, folder = source.choice(self.settings), self.place / f"signalled-{number}"
            ask = source.choice([[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]])
            job = self._cli(setting, folder)
            run_for(job.pid, source.uniform(0, span))
            for asked in ask:
                job.send_signal(asked)
                time.sleep(source.uniform(0, 0.3))
            code = job.wait(1200)
            self.ends[f"{' '.join(a.name for a in ask)} -> {code}"] += 1
            self._last_life(setting, folder)
            print(f"so far: {self.report()}", flush=True)

    def on_disks(self, count: int, seed: int) -> None:
        """Runs whose disk fills up at a random moment, or is read-only when they are resumed after a kill."""
        source = random.Random(seed)
        for number in range(count):
            setting, disk = source.choice(self.settings), self.place / f"disk-{number}"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
            try:
                self._on_disk(source, setting, disk)
            finally:
                subprocess.run(["umount", str(disk)], check=True)
            print(f"so far: {self.report()}", flush=True)

    def _on_disk(self, source: random.Random, setting: str, disk: Path) -> None:
        folder, after = disk / "run", source.uniform(0, self.seconds[setting])
        if source.random() < 0.7:
            pid = fork(lambda: live(configuration(self.place, setting, folder)))
            run_for(pid, after)
            free, left = shutil.disk_usage(disk).free, source.choice(LEFT)
            with contextlib.suppress(OSError):  # there is less left where the run has written something meanwhile
                (disk / "ballast").write_bytes(b"x" * max(0, free - left))
            end = ended(pid)
            self.ends[f"full -> {end}"] += 1
            if end == "a named error":  # and again, as long as there is no room
                end = self.life(setting, folder)
                self.ends[f"still full -> {end}"] += 1
            (disk / "ballast").unlink()
        else:
            self.life(setting, folder, after=after)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            end = self.life(setting, folder)
            self.ends[f"read-only -> {end}"] += 1
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        if end not in ("finished", "a named error"):
            self.failures.append(f"{folder}: a life ended with {end}")
        self._last_life(setting, folder)

    def _cli(self, setting: str, folder: Path) -> "subprocess.Popen[bytes]":
        """A process of `pertoken train` on the run in `folder`."""
        path = self.place / f"{folder.name}.yaml"
        path.write_text(configuration(self.place, setting, folder).to_yaml(), encoding="utf-8")
        paths = os.pathsep.join([str(self.place), *sys.path[1:]])
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(cli(folder, path), env=os.environ | {"PYTHONPATH": paths}, **quiet)  # type: ignore[call-overload,no-any-return]

    def _last_life(self, setting: str, folder: Path) -> None:
        """Let a run live to its end, and compare it with the undisturbed one."""
        self.runs += 1
        end = self.life(setting, folder)
        if end != "finished":
            self.failures.append(f"{folder}: the last life ended with {end}")
            return
        found, expected = outcome(folder), self.expected[setting]
        if found == expected:
            shutil.rmtree(folder)
            return
        parts = [name for name in found if found[name] != expected.get(name)]  # type: ignore[attr-defined]
        self.failures.append(f"{folder}: other {', '.join(parts)} than undisturbed")

    def report(self) -> str:
        stages = ", ".join(f"{name} {count}" for name, count in self.stages.most_common())
        head = f"{self.kills} kills in {self.runs} runs, {len(self.failures)} of them ended otherwise"
        ends = [f"{end}: {count}" for end, count in sorted(self.ends.items())]
        return "\n".join([head, f"killed while: {stages}", *ends, *self.failures])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, help="at least so many kills at random moments")
    parser.add_argument("--operations", action="store_true", help="a kill before each file operation")
    parser.add_argument("--every", type=int, default=1, help="with --operations: before every n-th only")
    parser.add_argument("--signals", type=int, default=0, help="so many runs that are asked to end by signals")
    parser.add_argument("--disks", type=int, default=0, help="so many runs on disks that fill up or are read-only")
    parser.add_argument("--cli", action="store_true", help="kill processes of `pertoken train`")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    experiment = Experiment(place, options.settings, as_cli=options.cli)
    experiment.at_random(options.kills, options.seed)
    if options.operations:
        experiment.at_operations(options.every)
    experiment.on_disks(options.disks, options.seed)
    if options.signals:
        experiment.by_signals(options.signals, options.seed)
    print(experiment.report())
    if experiment.failures:
        sys.exit(1)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
