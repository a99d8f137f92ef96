"""Does a recipe improve held-out quality, seed by seed? Each seed is a run of its own process.

    python benchmarks/learning.py recipes/quickstart.yaml --seeds 0 1 2
    python benchmarks/learning.py recipes/quickstart.yaml --seeds 0 -- name=news task.path=PATH/summarization

Prints one Markdown row per seed for RESULTS.md: the main held-out metric before and after with the paired 95%
interval, the best trivial baseline, seconds of training, peak memory. Run folders stay in `--runs`.
"""

import argparse
import platform
import resource
import subprocess
import sys
from datetime import date
from pathlib import Path

from pertoken.tracking.comparison import compare
from pertoken.tracking.reader import RunReader


def run(recipe: Path, seed: int, runs: Path, overrides: list[str]) -> tuple[Path, float]:
    """Train; the run folder, and the peak resident memory of the process so far in GB."""
    folder = runs / f"{recipe.stem}-{date.today():%Y%m%d}-{seed}"
    command = [
        sys.executable,
        "-m",
        "pertoken.cli",
        "train",
        str(recipe),
        *overrides,
        f"seed={seed}",
        f"folder={folder}",
    ]
    subprocess.run(command, check=True)
    return folder, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6


def row(folder: Path, seed: int, peak: float) -> str:
    """The outcome of one run as a Markdown row."""
    reader = RunReader(folder)
    comparison = compare(reader.evaluations())
    if comparison is None:
        return f"| {seed} | no two evaluations in {folder} |"
    change = comparison.changes[comparison.main]
    trivial = max((scores[comparison.main], name) for name, scores in comparison.baselines.items())
    metrics = reader.metrics()
    seconds = sum(sum(v or 0.0 for v in column) for name, column in metrics.items() if name.startswith("time/"))
    words = comparison.changes["words"]
    return (
        f"| {seed} | {comparison.main} | {change.before:.4f} | {change.after:.4f} | {change.difference:+.4f} "
        f"[{change.low:+.4f}, {change.high:+.4f}] | {trivial[0]:.4f} ({trivial[1]}) | {words.before:.1f} -> "
        f"{words.after:.1f} | {comparison.num_items} | {len(metrics['step'])} | {seconds / 60:.1f} | {peak:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE, after --")
    options = parser.parse_intermixed_args()  # overrides stand behind the options
    results = []
    for seed in options.seeds:
        folder, peak = run(options.recipe, seed, options.runs, options.overrides)
        results.append(row(folder, seed, peak))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"\n{date.today()}, commit {commit.stdout.strip()}, {platform.platform()}: {' '.join(sys.argv)}\n")
    print("| seed | metric | before | after | difference [95%] | best trivial | words | items | steps | minutes | GB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    print("\n".join(results))


if __name__ == "__main__":
    main()
