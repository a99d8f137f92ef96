"""What it saves to compute a slow reward in processes of its own, while the next samples are drawn.

    python benchmarks/rewards_beside.py --model /path/to/stories260k

A reward in plain Python that takes about as long as a rollout, in several ways, in turn, several times over: medians of
the seconds of a step, and their ratios to the first way.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from pertoken.config import RunConfig
from pertoken.jobs import run
from pertoken.rewards import episode_reward

WAYS = {
    "in this process": {},
    "in this process, ahead": {"ahead": True},
    "one process, ahead": {"ahead": True, "processes": 1},
    "two processes": {"processes": 2},
    "two processes, ahead": {"ahead": True, "processes": 2},
}


@episode_reward
def slow(sample, *, rounds: int = 100_000) -> float:
    """A hash of the text that takes a while."""
    value = len(sample.text)
    for k in range(rounds):
        value = (value * 31 + k) % 1_000_003
    return value / 1_000_003


def steps(model: str, folder: Path, rounds: int, *, ahead: bool = False, processes: int = 0) -> list[dict[str, float]]:
    """The metrics of a short run, its first step left out."""
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Once upon a time {k}", "reference": "x"}) for k in range(64)))
    config = RunConfig.model_validate(
        {
            "folder": str(folder / "run"),
            "policy": {"model": model, "precision": "float32", "device": "cpu", "compile": False},
            "task": {"type": "file", "path": str(data), "prompt": "{prompt}"},
            "rollout": {"samples_per_prompt": 4, "sampling": {"max_new_tokens": 64}, "ahead": ahead},
            "rewards": [{"fn": "rewards_beside:slow", "rounds": rounds, "processes": processes}],
            "evaluation": {"items": 0},
            "stop": {"steps": 6},
        }
    )
    run.train(config)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows[1:-1]  # the last step draws nothing ahead


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=100_000, help="of the reward's loop, per completion")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(chosen.repeats):
        for way, settings in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                for row in steps(chosen.model, Path(folder), chosen.rounds, **settings):
                    phases = {name: row[f"time/{name}"] for name in ("rollout", "score", "reward", "update")}
                    seconds[way].append(sum(phases.values()))
            print(f"{way}: {', '.join(f'{name} {value:.2f}' for name, value in phases.items())} s", file=sys.stderr)
    first = statistics.median(seconds["in this process"])
    for way, values in seconds.items():
        middle = statistics.median(values)
        print(
            f"{way}: {middle:.2f} s a step ({min(values):.2f} to {max(values):.2f}), {middle / first:.2f} of the first"
        )


if __name__ == "__main__":
    main()
