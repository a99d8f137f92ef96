"""Runs that are given too little memory (`RLIMIT_AS`, as `ulimit -v` sets it), beside one that needs less at the start.

    python benchmarks/out_of_memory.py                   # a random model of 5M parameters, a minute
    python benchmarks/out_of_memory.py --shares 0.7 0.3  # how much of what it would take is left to it

Three kinds of runs of one configuration, each a process of its own: with small micro-batches, with large ones, and with
large ones under limits between what those two take. Those must end with the weights of the first, up to rounding.
Exits with 1 if one does not, or if none of them had to cut anything.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from pertoken.config import RunConfig

SMALL, LARGE = 256, 16384
TOLERANCE = 1e-4
"""Of weights, after steps of AdamW with a learning rate of 1e-3 that make them move by about as much each."""


def prepare(place: Path) -> None:
    """The model and the data."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pertoken.testing import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, eos_token_id=256, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "model")
    byte_tokenizer().save_pretrained(place / "model")
    rows = [{"prompt": f"say {k}", "reference": f"the answer {k}"} for k in range(64)]
    (place / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def configuration(place: Path, name: str, tokens: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "folder": str(place / name),
            "policy": {"model": str(place / "model"), "precision": "float32", "device": "cpu"},
            "task": {"type": "file", "path": str(place / "data.jsonl"), "prompt": "{prompt}:"},
            "rollout": {"prompts_per_step": 8, "samples_per_prompt": 8, "sampling": {"max_new_tokens": 100}},
            "rewards": [{"name": "rouge_l", "granularity": "token"}, {"name": "repetition"}],
            "update": {"learning_rate": 1e-3, "tokens_per_micro_batch": tokens},
            "kl": {"place": "none", "measure": False},
            "evaluation": {"items": 0},
            "stop": {"steps": 3},
        }
    )


def train(path: Path, limit: int) -> None:
    """In a process of its own: one run, and the most address space that it has taken (bytes)."""
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from pertoken.jobs import run

    run._write_report = lambda folder, on_note: None  # type: ignore[assignment]
    run.train(RunConfig.model_validate_json(path.read_text(encoding="utf-8")), on_note=print)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print("peak", int(re.search(r"VmPeak:\s+(\d+)", status)[1]) * 1024)  # type: ignore[index]


def child(config: RunConfig, place: Path, limit: int = 0) -> tuple[int, list[str]]:
    """The peak of a run (0 if it failed), and what it said."""
    path = place / f"{config.run_folder.name}.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    command = [sys.executable, __file__, "--child", str(path), "--limit", str(limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode:
        return 0, [*lines, *done.stderr.splitlines()[-3:]]
    return int(lines[-1].split()[1]), lines[:-1]


def farthest(one: Path, other: Path) -> float:
    """The largest difference of a weight between two trained models."""
    from safetensors.torch import load_file

    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train(options.child, options.limit)
        return
    failed, cuts = False, 0
    with tempfile.TemporaryDirectory(prefix="out-of-memory-") as name:
        place = Path(name)
        prepare(place)
        peaks = {}
        for kind, tokens in (("small", SMALL), ("large", LARGE)):
            peaks[kind], lines = child(configuration(place, kind, tokens), place)
            assert peaks[kind], "\n".join(lines)
            print(f"{kind}: micro-batches of {tokens} tokens, {peaks[kind] / 1e9:.2f} GB of address space", flush=True)
        print(f"small and large differ by {farthest(place / 'small', place / 'large'):.2g} at most")
        for share in options.shares:
            limit = int(peaks["small"] + share * (peaks["large"] - peaks["small"]))
            folder = f"limited-{share:g}"
            peak, lines = child(configuration(place, folder, LARGE), place, limit)
            said = [line for line in lines if "memory ran out" in line]
            cuts += len(said)
            if not peak:
                failed = True
                print(f"ulimit -v {limit // 1024}: FAILED", *lines[-5:], sep="\n  ")
                continue
            gap = farthest(place / "small", place / folder)
            failed |= gap > TOLERANCE
            print(f"ulimit -v {limit // 1024}: peak {peak / 1e9:.2f} GB, {len(said)} cuts, weights differ by {gap:.2g}")
            print(*said, sep="\n", flush=True)
    sys.exit(1 if failed or not cuts else 0)


if __name__ == "__main__":
    main()
