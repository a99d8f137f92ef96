"""What this machine can do, and what share of it a run reaches: memory bandwidth, matrix rate, rollout, training.

    python benchmarks/roofline.py
    python benchmarks/roofline.py recipes/quickstart.yaml rollout.samples_per_prompt=16

The floor of a rollout is the larger of two times: reading the weights once per decoding step, and their arithmetic.
The floor of training is its arithmetic: three times that of one pass over prompts (once per group) and samples.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pertoken import assembly
from pertoken.config import load_config
from pertoken.jobs.profiling import BACKWARD, DECODE, FORWARD, PREFILL, SAMPLE, matrix_parameters, matrix_rate, profile

ROOT = Path(__file__).parents[1]
BLOCK = 64_000_000
"""Float32 numbers per array: 256 MB, far more than any cache."""


def best_rate(work: Callable[[], object], gigabytes: float, seconds: float = 2.0) -> float:
    """GB/s of the fastest of several goes."""
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        best = max(best, gigabytes / (time.perf_counter() - begun))
    return best


def bandwidth() -> dict[str, float]:
    """GB/s from and to memory: reading, copying, and a + s * b (which reads two arrays and writes one)."""
    a, b, c = (torch.ones(BLOCK) for _ in range(3))
    size = 4 * BLOCK / 1e9
    return {
        "read": best_rate(a.sum, size),
        "copy": best_rate(lambda: c.copy_(a), 2 * size),
        "triad": best_rate(lambda: torch.add(a, b, alpha=2.0, out=c), 3 * size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=[str(ROOT / "recipes" / "quickstart.yaml")])
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    files = [s for s in args.settings if "=" not in s]
    config = load_config(files, [s for s in args.settings if "=" in s])

    memory = bandwidth()
    print("memory: " + ", ".join(f"{name} {rate:.0f} GB/s" for name, rate in memory.items()))
    policy = assembly.build_policy(config)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"matrix products in {dtype}: {matrix_rate(policy, dtype, seconds=2.0):.0f} GFLOP/s")

    result = profile(config, steps=args.steps)
    body, head = matrix_parameters(policy)
    width = 2 if policy.autocast_dtype is torch.bfloat16 else 4
    rows = min(config.rollout.max_rows, config.rollout.prompts_per_step * config.rollout.samples_per_prompt)
    read = (body + head) * width / 1e9 / max(memory.values())
    count = 2 * (body + head) * rows / 1e9 / result.machine
    print(f"one decoding step of {rows} rows: at least {1000 * max(read, count):.1f} ms "
          f"({1000 * read:.1f} to read the weights, {1000 * count:.1f} to multiply)")  # fmt: skip
    rollout = sum(result.seconds.get(phase, 0.0) for phase in (PREFILL, DECODE, SAMPLE))
    floor = sum(result.rates.get(p, 0.0) / result.machine * result.seconds.get(p, 0.0) for p in (PREFILL, DECODE))
    print(f"rollout: {rollout:.2f} s, {floor / rollout:.0%} of it are the floor of its arithmetic")
    training = result.seconds[FORWARD] + result.seconds[BACKWARD]
    print(f"training: {training:.2f} s, {result.rates['training']:.0f} GFLOP/s, "
          f"{result.rates['training'] / result.machine:.0%} of the matrix rate")  # fmt: skip


if __name__ == "__main__":
    main()
