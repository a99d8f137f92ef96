"""What share of the time of a rollout does each metric reward take, on the very completions of that rollout?

    python benchmarks/reward_share.py
    python benchmarks/reward_share.py --rounds 5 --only bleu ter

64 completions of 128 tokens (8 prompts, 8 samples) of SmolLM2-135M by the native engine, with references of 20 words.
In each round the rollout is made and then scored by every reward, so that both see the same machine; CPU seconds of one
thread are compared, which other processes do not lengthen. Prints medians over rounds; exits with 1 if a reward as
it comes takes 5% or more.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pertoken.batching import to_batch
from pertoken.policy.model import fast_in_bfloat16, load_model
from pertoken.policy.scoring import head_logits
from pertoken.rewards import Scene, resolve
from pertoken.rollout.collect import collect
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls, Sampling
from pertoken.types import Item

DOCS = Path(__file__).parents[1] / "docs"
PROMPTS, SAMPLES, TOKENS, WORDS = 8, 8, 128, 20
LIMIT = 0.05
METRICS = ("rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "bleu", "chrf", "ter", "meteor")


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.process_time()
    result = run()
    return time.process_time() - begun, result


def items() -> list[Item]:
    """Prompts and references cut out of the pages of docs/."""
    words = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))).split(" ")
    cuts = [k * len(words) // PROMPTS for k in range(PROMPTS)]
    return [
        Item(str(k), " ".join(words[at : at + 40]), answer=" ".join(words[at + 40 : at + 40 + WORDS]))
        for k, at in enumerate(cuts)
    ]


def measure(names: list[str], rounds: int, model_name: str) -> tuple[list[float], dict[str, list[float]]]:
    """CPU seconds of each rollout, and of each reward on it."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(model_name)
    dtype = torch.bfloat16 if fast_in_bfloat16(torch.device("cpu")) else None  # as a run samples here
    engine = NativeEngine(model, tokenizer, head_logits=head_logits, dtype=dtype, max_rows=PROMPTS * SAMPLES)
    sampling = Sampling(min_new_tokens=TOKENS, max_new_tokens=TOKENS)
    controls = Controls.resolve(sampling, tokenizer, [tokenizer.eos_token_id])
    rollouts, scored = list[float](), {"alignment": list[float](), **{name: list[float]() for name in names}}
    for step in range(rounds):
        seconds, episodes = cpu_seconds(
            lambda step=step: collect(engine, items(), tokenizer, controls, samples_per_prompt=SAMPLES, step=step)
        )
        rollouts.append(seconds)
        scene = Scene(to_batch(episodes, controls), episodes, tokenizer)
        assert scene.batch.num_actions == PROMPTS * SAMPLES * TOKENS, "a completion ended early"
        scored["alignment"].append(cpu_seconds(lambda scene=scene: scene.samples)[0])
        for name in names:
            reward = resolve(name)()
            scored[name].append(cpu_seconds(lambda reward=reward, scene=scene: reward(scene))[0])
        print(f"round {step + 1}: rollout {seconds:.1f} s", flush=True)
    return rollouts, scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(METRICS), help="names of rewards")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    arguments = parser.parse_args()
    rollouts, scored = measure(arguments.only, arguments.rounds, arguments.model)
    print(f"\nrollout: {statistics.median(rollouts):.1f} s\n\n| reward | s | share of the rollout |\n|---|---|---|")
    missed = []
    for name, times in scored.items():
        share = statistics.median(t / whole for t, whole in zip(times, rollouts, strict=True))
        missed += [name] if share >= LIMIT else []
        print(f"| {name} | {statistics.median(times):.3f} | {share:.2%} |")
    raise SystemExit(f"{LIMIT:.0%} or more: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
