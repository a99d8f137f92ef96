"""A long life in a short time: one run in many sessions, each resumed by a process of its own with other batch sizes.

    python benchmarks/life.py --hours 24             # 96 sessions

A session stands for a slot of a quarter of an hour on a machine that is shared: 96 of them are a day. What is
simulated is the coming and going, not the waiting: nothing in a run looks at the time of day. A session makes one to
five steps with its own numbers of prompts, samples and tokens per micro-batch, its own retention of checkpoints, now
and then with a reward in processes of its own, and ends as asked, by SIGKILL, or where its time is up. Between
sessions nothing may be left that a run folder does not hold: no draft, no temporary file, no process, no checkpoint
beyond the retention; the log has each step once. Each session ends with as many open files and threads as the one
before, and the memory of sessions has no slope. The last session makes many steps: open files and memory at its end
are those of its beginning. Exits with 1, and names the folder, if anything is otherwise.
"""

import argparse
import gc
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kills import configuration, ended, fork, import_what_lives_do, prepare, run_for

from pertoken.config import RunConfig
from pertoken.jobs import run
from pertoken.tracking import RunReader
from pertoken.tracking.runs import verify_run

MARK = "PERTOKEN_LIFE"
"""In the environment of all that a session starts: what outlives it is found by this."""
SLOT = 0.25
"""Hours that a session stands for."""
GROWTH = 1.15
"""How much more memory the last session may have at its end than at a third of its way."""
DRIFT = 0.05
"""By how much of their median the memory of sessions may rise from the first to the last, if that is no chance."""
KNOWN = re.compile(
    r"run\.json|config\.yaml|metrics\.jsonl|evaluations\.jsonl|certificate\.json|rewards\.log|report\.html|\.lock|"
    r"episodes/\d{6}\.jsonl|evaluations/\d{6}-validation\.jsonl|model/[\w.-]+|"
    r"index/episodes/\d{6}\.json|index/evaluations/\d{6}-validation\.json|"
    r"checkpoints/step-\d{6}/(manifest\.json|state\.json|state\.safetensors)"
)
"""Files that a run folder holds between sessions."""


def session_config(source: random.Random, place: Path, folder: Path) -> RunConfig:
    """The run with the batch sizes and the retention of a session."""
    values = configuration(place, "full", folder).model_dump()
    values["rollout"] |= {"prompts_per_step": source.randint(2, 6), "samples_per_prompt": source.randint(2, 5)}
    values["update"] |= {
        "tokens_per_micro_batch": source.choice([8, 64, 2048]),
        "schedule": "constant",
        "minibatches": 1,
    }
    values["checkpoint"] |= {"every": source.randint(1, 3), "keep": source.randint(1, 4)}
    values["stop"] |= {"steps": 10**6, "patience": None}
    for reward in values["rewards"]:
        if reward["fn"]:
            reward["processes"] = source.choice([0, 0, 0, 1])
    return RunConfig.model_validate(values)


def figures() -> dict[str, int]:
    """Of this process now: open files, threads, and memory (bytes)."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    count = {name: len(list(Path(f"/proc/self/{name}").iterdir())) for name in ("fd", "task")}
    return {"files": count["fd"], "threads": count["task"], "memory": pages * os.sysconf("SC_PAGE_SIZE")}


def live(config: RunConfig, steps: int, told: Path, max_seconds: float) -> None:
    """In a process of its own: some steps of the run, and what it held after each of them."""
    seen: list[dict[str, int]] = []

    def after_step(report: Any, seconds: float) -> None:
        seen.append(figures())
        told.write_text(json.dumps(seen), encoding="utf-8")

    folder = config.run_folder
    begun = (folder / "run.json").exists()
    run.train(
        config, resume=folder if begun else None, on_step=after_step, interrupted=lambda: len(seen) >= steps,
        max_seconds=max_seconds,
    )  # fmt: skip


def left_behind(folder: Path, temporary: Path) -> list[str]:
    """What should not be there when no process works on the run."""
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    found = [f"file {name}" for name in files if not KNOWN.fullmatch(name)]
    found += [f"temporary {path.name}" for path in temporary.iterdir()]
    mark = f"{MARK}={temporary}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes():
                found.append(f"process {process.name}")
        except (OSError, ValueError):
            continue
    return found


def inconsistent(folder: Path, keep: int | None) -> list[str]:
    """What is wrong with the log and the checkpoints; keep: how many of these there may be beside the best one."""
    steps = RunReader(folder).metrics().get("step", [])
    found = verify_run(folder)
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"steps {steps[-5:]} after {len(steps)} rows")
    checkpoints = len(list((folder / "checkpoints").iterdir()))
    if keep is not None and checkpoints > keep + 1:
        found.append(f"{checkpoints} checkpoints, and {keep} are to be kept")
    return found


class Life:
    """Sessions of one run, and what was wrong after them."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.source = place, random.Random(seed)
        self.folder, self.temporary, self.told = place / "run", place / "temporary", place / "told.json"
        self.temporary.mkdir()
        os.environ |= {"TMPDIR": str(self.temporary), MARK: str(self.temporary)}
        tempfile.tempdir = None
        assert ended(fork(lambda: prepare(place))) == "finished"
        sys.path.insert(0, str(place))
        import_what_lives_do(lambda: run.train(configuration(place, "full", place / "first")))
        self.faults, self.ends = list[str](), Counter[str]()
        self.peaks, self.last = list[tuple[int, int]](), Counter[tuple[int, int]]()
        """Of sessions without processes of rewards: (number of the session, most memory), and how often one ended with
        so many open files and threads."""

    def session(self, steps: int, *, way: str) -> list[dict[str, int]]:
        """One session that ends in some `way`; what it held after each step."""
        config = session_config(self.source, self.place, self.folder)
        seconds = 3.0 if way == "time is up" else 1e9
        self.told.unlink(missing_ok=True)
        pid = fork(lambda: live(config, steps, self.told, seconds))
        if way == "killed":
            run_for(pid, self.source.uniform(0.1, 3.0))
            os.kill(pid, signal.SIGKILL)
        end = ended(pid)
        self.ends[f"{way}: {end}"] += 1
        if end not in ("finished", "killed") or (end == "killed") > (way == "killed"):
            self.faults.append(f"a session ended with {end}")
        seen: list[dict[str, int]] = json.loads(self.told.read_text(encoding="utf-8")) if self.told.exists() else []
        if end == "finished":  # what a kill leaves is seen to by the next session
            keep = config.checkpoint.keep if seen else None  # one whose time is up before its first step saves nothing
            self.faults += left_behind(self.folder, self.temporary) + inconsistent(self.folder, keep)
        if seen and end == "finished" and not any(reward.processes for reward in config.rewards):
            self.peaks.append((sum(self.ends.values()), max(each["memory"] for each in seen)))
            self.last[seen[-1]["files"], seen[-1]["threads"]] += 1
        return seen

    def many(self, sessions: int) -> None:
        for number in range(sessions):
            way = self.source.choices(["asked to end", "killed", "time is up"], [6, 3, 1])[0]
            self.session(self.source.randint(1, 5), way=way)
            if number % 10 == 9 or self.faults:
                print(self.report(), flush=True)
            if self.faults:
                return

    def long(self, steps: int) -> None:
        """The last session: what it holds does not grow."""
        seen = self.session(steps, way="asked to end")
        early, late = seen[len(seen) // 3], seen[-1]
        print(f"the last session: {early} after {len(seen) // 3} steps, {late} after {len(seen)}", flush=True)
        if late["files"] > early["files"] or late["threads"] > early["threads"]:
            self.faults.append(f"files or threads leaked: {early} -> {late}")
        if late["memory"] > GROWTH * early["memory"]:
            self.faults.append(f"memory grew: {early} -> {late}")

    def trends(self) -> None:
        """Find a fault in what rises from session to session."""
        if len(self.last) > 1:
            self.faults.append(f"sessions end with different numbers of (open files, threads): {dict(self.last)}")
        if len(self.peaks) > 2:
            numbers, memory = zip(*self.peaks, strict=True)
            (slope, _), error = statistics.linear_regression(numbers, memory), error_of_slope(numbers, memory)
            rise = slope * (numbers[-1] - numbers[0])
            print(f"memory rises by {slope / 1e3:.1f} kB a session, standard error {error / 1e3:.1f} kB", flush=True)
            if slope > 3 * error and rise > DRIFT * statistics.median(memory):
                self.faults.append(f"memory of sessions rose by {rise / 1e6:.0f} MB")

    def report(self) -> str:
        metrics = RunReader(self.folder).metrics()
        resumed = len(RunReader(self.folder).run()["resumed"])
        size = sum(path.stat().st_size for path in (self.folder / "checkpoints").rglob("*") if path.is_file())
        ends = ", ".join(f"{end} {count}" for end, count in sorted(self.ends.items()))
        peaks = [memory / 1e9 for _, memory in self.peaks] or [0.0]
        files = ", ".join(f"{files} open files and {threads} threads" for files, threads in self.last)
        count, steps = sum(self.ends.values()), len(metrics.get("step", []))
        return (
            f"{SLOT * count:g} hours in {count} sessions ({ends}), {resumed} resumed, {steps} steps, "
            f"memory of a session {statistics.median(peaks):.2f} GB (at most {max(peaks):.2f}), {files}, checkpoints "
            f"{size / 1e6:.1f} MB, {len(self.faults)} faults" + "".join(f"\n  {fault}" for fault in self.faults)
        )


def error_of_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Standard error of the slope of a least-squares line."""
    slope, intercept = statistics.linear_regression(x, y)
    rest = sum((b - intercept - slope * a) ** 2 for a, b in zip(x, y, strict=True))
    return math.sqrt(rest / (len(x) - 2) / sum((a - statistics.mean(x)) ** 2 for a in x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=12.0, help="of simulated life")
    parser.add_argument("--last", type=int, default=60, help="steps of the last session")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="life-"))
    life = Life(place, options.seed)
    life.many(round(options.hours / SLOT))
    life.trends()
    if not life.faults:
        life.long(options.last)
    print(life.report())
    if life.faults:
        print(f"see {place}")
        sys.exit(1)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
