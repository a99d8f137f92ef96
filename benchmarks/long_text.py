"""What a long text costs to score and train in one piece and by segments: seconds, and memory at its height.

    python benchmarks/long_text.py
    python benchmarks/long_text.py --model FOLDER --length 4096 --arms whole 256:256 512:1024

An arm is `whole`, or `tokens:context` of `sampling.segment`. Each is a process of its own, with a peak of its own: it
scores the texts once without gradient and makes one forward and backward pass of the loop's loss. Tokens are cut from
the documentation.
"""

import argparse
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from pertoken.batching import optimizer_steps, to_batch
from pertoken.machine.memory import keep_freed_memory, peak_memory, used_memory
from pertoken.objectives import aggregate, policy_loss
from pertoken.policy.model import Policy, load_model
from pertoken.sampling import Controls, Sampling, Segment
from pertoken.segments import cut
from pertoken.testing import episode
from pertoken.types import Credit

ROOT = Path(__file__).parents[1]


def measure(name: str, arm: str, texts: int, length: int, tokens: int, threads: int) -> None:
    """One arm: its row of the table."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    policy = Policy(*load_model(name))
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = policy.tokenizer.encode(pages, add_special_tokens=False)
    pieces = [ids[k * (length + 64) : (k + 1) * (length + 64)] for k in range(texts)]
    segment = (
        None if arm == "whole" else Segment(**dict(zip(("tokens", "context"), map(int, arm.split(":")), strict=True)))
    )
    controls = Controls(Sampling(segment=segment, max_new_tokens=length))
    batch = to_batch(
        [episode(p[:64], p[64:], id=str(k), group=k, stop="length") for k, p in enumerate(pieces)], controls
    )
    before, begun = used_memory(policy.device), time.perf_counter()
    old = policy.score(batch)
    scored = time.perf_counter() - begun
    given = Credit(torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(0)) * batch.action_mask)
    rows, found = cut(batch), batch
    if rows is not None:
        found, old, given = rows.batch, rows.taken(old), rows.credit(given)
    begun = time.perf_counter()
    (whole,) = optimizer_steps(found, old, None, given, epochs=1, num_minibatches=1, seed=0)
    for part in whole(tokens):
        new = policy.score(part.batch, grad=True, into_grad=True)
        loss = policy_loss(new, part.old, None, part.credit, part.batch).per_token
        aggregate(loss, part.batch.action_mask, denominator=part.num_actions).backward()
    trained, widest = time.perf_counter() - begun, int(found.attention_mask.sum(1).max())
    peak = peak_memory(policy.device)
    print(f"| {arm} | {len(found.group)} x {widest} | {scored:.1f} | {trained:.1f} | {(peak or 0) - before:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, or the embedded model")
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text, behind a prompt of 64")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a micro-batch, longer rows apart")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=["whole", "256:256", "256:1024"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.model, args.one, args.texts, args.length, args.tokens, args.threads)
        return
    print(f"{date.today()}: {args.texts} texts of {args.length} tokens, {args.model}\n")
    print("| arm | rows x widest | scoring, s | training pass, s | GB above the model, at the height |")
    print("|---|---|---|---|---|", flush=True)
    for arm in args.arms:
        subprocess.run([sys.executable, *sys.argv, "--one", arm], check=True)


if __name__ == "__main__":
    main()
