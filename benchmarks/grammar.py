"""Does the grammar reward make text more correct, and nothing worse? Stories, continued by SmolLM2; Harper counts.

    python benchmarks/grammar.py PATH/stories --seeds 0 1 2

For each seed a run of its own: completions are drawn with temperature 1 for held-out prompts before and after training,
with the same random numbers. Printed with 95% intervals (items drawn with replacement, pairs kept together): findings
per 100 words over all texts, cosine of the sentence embeddings of prompt and completion, and words per completion.
"""

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pertoken.rewards.align import AlignedText, word_spans
from pertoken.rewards.base import Sample
from pertoken.rewards.grammar import Harper
from pertoken.rewards.semantics import EMBEDDED, encoder
from pertoken.tracking.reader import RunReader
from pertoken.types import Item

Array = np.ndarray[Any, np.dtype[np.float64]]

CONFIG = {
    "name": "grammar",
    "rollout": {"prompts_per_step": 6, "samples_per_prompt": 8, "sampling": {"max_new_tokens": 48}},
    "rewards": [
        {"name": "harper", "cost": 0.04, "normalised": True},
        {"name": "similarity", "against": "prompt", "weight": 0.5},
        {"name": "repetition", "cost": 0.05},
        {"name": "length", "min_words": 30, "max_words": 60, "cost": 0.01},
    ],
    "kl": {"coefficient": 0.03},
    "credit": {"type": "leave_one_out_process"},
    "update": {"learning_rate": 3e-5, "warmup_steps": 2, "schedule": "linear", "tokens_per_micro_batch": 768},
}


def train(seed: int, steps: int, data: Path, folder: Path) -> Path:
    """The folder of a finished run."""
    run = folder / f"grammar-{seed}"
    config = CONFIG | {
        "seed": seed,
        "folder": str(run),
        "task": {
            "path": {"train": str(data / "train.jsonl"), "test": str(folder / "held-out.jsonl")},
            "prompt": "{prompt}",
        },
        "stop": {"steps": steps},
        "evaluation": {"split": "test", "items": 1000, "sampling": {"temperature": 1.0, "max_new_tokens": 48}},
    }
    recipe = folder / f"grammar-{seed}.yaml"
    recipe.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "pertoken.cli", "train", str(recipe)], check=True)
    return run


def figures(prompt: str, text: str) -> tuple[float, float, float]:
    """Findings, words, and similarity to the prompt."""
    sample = Sample(Item("held-out", prompt), [], [], AlignedText(text, ()), "length")
    embed = encoder(EMBEDDED)
    alike = float(embed(prompt) @ embed(text)) if text.strip() else 0.0
    return len(Harper().findings(sample)), len(word_spans(text)), alike


MEASURES: dict[str, Callable[[Array], Array]] = {
    "findings per 100 words": lambda sums: 100 * sums[..., 0] / sums[..., 1],
    "words": lambda sums: sums[..., 1],
    "similarity": lambda sums: sums[..., 2],
}
"""Of the means of `figures` over items, `[..., 3]`."""


def rows(run: Path, seed: int, split: str = "test") -> list[str]:
    """What a run changed, as Markdown rows."""
    reader = RunReader(run)
    steps = [evaluation["step"] for evaluation in reader.evaluations()]
    before, after = (
        np.array([figures(item["prompt"], item["output"]) for item in reader.evaluation_items(step, split)])
        for step in (steps[0], steps[-1])
    )
    drawn = np.random.default_rng(0).multinomial(len(before), np.full(len(before), 1 / len(before)), size=2000)
    found = []
    for name, measure in MEASURES.items():
        one, two = (measure(each.mean(0)) for each in (before, after))
        draws = [measure(drawn @ each / len(each)) for each in (before, after)]
        change, relative = draws[1] - draws[0], draws[1] / draws[0] - 1
        low, high, low_share, high_share = (np.quantile(x, q) for x in (change, relative) for q in (0.025, 0.975))
        found.append(
            f"| {seed} | {name} | {one:.3f} | {two:.3f} | {two - one:+.3f} [{low:+.3f}, {high:+.3f}] | "
            f"{two / one - 1:+.1%} [{low_share:+.1%}, {high_share:+.1%}] |"
        )
    return found


def samples(run: Path, split: str = "test", count: int = 5) -> str:
    """Some completions before and after, to be read."""
    reader = RunReader(run)
    steps = [evaluation["step"] for evaluation in reader.evaluations()]
    pairs = zip(*(reader.evaluation_items(step, split)[:count] for step in (steps[0], steps[-1])), strict=True)
    return "\n".join(f"{one['prompt']!r}\n  - {one['output']!r}\n  + {two['output']!r}" for one, two in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train, validation and test.jsonl")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--runs", type=Path, default=Path("runs/grammar"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    held_out = [(options.data / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("validation", "test")]
    (options.runs / "held-out.jsonl").write_text("".join(held_out), encoding="utf-8")
    results = []
    for seed in options.seeds:
        run = train(seed, options.steps, options.data, options.runs)
        results += rows(run, seed)
        print("\n".join(results[-3:]), samples(run), sep="\n", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(f"\n{date.today()}, commit {commit.stdout.strip()}, {platform.platform()}: {' '.join(sys.argv)}\n")
    print("| seed | measure | before | after | difference [95%] | relative [95%] |")
    print("|---|---|---|---|---|---|")
    print("\n".join(results))


if __name__ == "__main__":
    main()
