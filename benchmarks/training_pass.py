"""Forward and backward alone, here and in TRL's GRPO: the same weights, rows, advantages and loss, in turns.

    pip install trl==1.16.0
    python benchmarks/training_pass.py
    python benchmarks/training_pass.py --model FOLDER --prompts 4 --completions 8 --rounds 7

The ways take turns; medians of several rounds after one to warm up. Before that, in float32, log-probs and gradients
are compared. TRL takes a micro-batch of padded rows; ours is the scoring pass and the loss of the training loop. Where
the machine multiplies in bfloat16, each is measured in both types.

TRL has a process of its own, which sleeps while it is not its turn: our training loop keeps freed memory, TRL's leaves
glibc as it is, and where glibc's moving thresholds come to rest cannot be had in a process that has ever set them.
`--kept` keeps freed memory on both sides.
"""

import argparse
import multiprocessing
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pertoken.batching import optimizer_steps, to_batch
from pertoken.jobs.profiling import matrix_parameters, matrix_rate
from pertoken.machine import memory
from pertoken.objectives import aggregate, policy_loss
from pertoken.policy.model import EMBEDDED, Policy, fast_in_bfloat16, load_model
from pertoken.rollout.collect import to_episode
from pertoken.sampling import Controls
from pertoken.types import Completion, Credit, Item, PolicyOutput, TokenBatch

ROOT = Path(__file__).parents[1]


def rows(args: argparse.Namespace, tokenizer: Any) -> tuple[TokenBatch, Credit]:
    """Groups of completions behind prompts cut from the documentation; their tokens are cut from it too."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids, draw = tokenizer.encode(text, add_special_tokens=False), random.Random(0)

    def piece(length: int) -> list[int]:
        start = draw.randrange(len(ids) - length)
        return list(ids[start : start + length])

    episodes = []
    for group in range(args.prompts):
        prompt = piece(draw.randint(*args.prompt_tokens))
        for k in range(args.completions):
            said = Completion(piece(args.new_tokens), [0.0] * args.new_tokens, "length")
            episodes.append(to_episode(f"{group}/{k}", Item(str(group), "", None), group, prompt, said, version=0))
    batch = to_batch(episodes, Controls())
    values = torch.tensor([draw.gauss(0, 1) for _ in episodes])
    return batch, Credit(values[:, None] * batch.action_mask, None)


def own_pass(
    policy: Policy, batch: TokenBatch, credit: Credit, tokens: int
) -> tuple[PolicyOutput, dict[str, torch.Tensor]]:
    """As `trainer.update` makes it, without the optimiser; log-probs of all rows, and where gradients are.

    Gradients of the pass before are emptied where they are, as the loop does; TRL's loop drops them.
    """
    for parameter in policy.trainable().values():
        if parameter.grad is not None:
            parameter.grad.zero_()
    logprobs = torch.zeros_like(batch.sample_logprobs)
    nothing = PolicyOutput(batch.sample_logprobs, batch.sample_logprobs)
    (cut,) = optimizer_steps(batch, nothing, None, credit, epochs=1, num_minibatches=1, seed=0)
    for part in cut(tokens):
        new = policy.score(part.batch, grad=True, into_grad=True)
        old = PolicyOutput(new.logprobs.detach(), new.entropy)
        loss = policy_loss(new, old, None, part.credit, part.batch).per_token
        aggregate(loss, part.batch.action_mask, over="token", denominator=part.num_actions).backward()
        logprobs[part.rows] = new.logprobs.detach()
    return PolicyOutput(logprobs, logprobs), policy.trainable()


def padded(batch: TokenBatch, credit: Credit, size: int) -> list[dict[str, Any]]:
    """The rows as TRL has them, `size` at a time: prompts padded on the left, completions on the right."""
    starts = torch.tensor(batch.prompt_lengths())
    lengths = batch.attention_mask.sum(1)
    found = []
    for first in range(0, len(starts), size):
        some = range(first, min(first + size, len(starts)))
        prompt, said = int(starts[some].max()), int((lengths - starts)[some].max())
        inputs: dict[str, Any] = {
            "prompt_ids": torch.zeros(len(some), prompt, dtype=torch.long),
            "completion_ids": torch.zeros(len(some), said, dtype=torch.long),
        }
        inputs["prompt_mask"], inputs["completion_mask"] = (torch.zeros_like(x) for x in inputs.values())
        for k, row in enumerate(some):
            at, end = int(starts[row]), int(lengths[row])
            inputs["prompt_ids"][k, prompt - at :], inputs["prompt_mask"][k, prompt - at :] = batch.tokens[row, :at], 1
            inputs["completion_ids"][k, : end - at] = batch.tokens[row, at:end]
            inputs["completion_mask"][k, : end - at] = 1
        inputs["advantages"] = torch.stack([credit.advantages[row, starts[row]] for row in some])
        found.append(inputs | {"num_items_in_batch": torch.tensor(batch.num_actions)})
    return found


def trl_side(turns: Connection, model: str, inputs: list[dict[str, Any]], completions: int, kept: bool) -> None:
    """TRL's process. Told "gradients", a file: one pass in float32 into it; told a type: the seconds of a pass."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    if kept:
        memory.keep_freed_memory()
    rows = sum(len(part["prompt_ids"]) for part in inputs)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train(),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            processing_class=AutoTokenizer.from_pretrained(model),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["a"] * (rows // completions)}),
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=len(inputs[0]["prompt_ids"]),
                num_generations=completions, gradient_accumulation_steps=len(inputs), beta=0.0, report_to="none",
                use_cpu=True, gradient_checkpointing=False, bf16=False,
                max_completion_length=inputs[0]["completion_ids"].shape[1],
            ),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1

    def one_pass(dtype: torch.dtype | None) -> float:
        begun = time.perf_counter()
        trainer.model.zero_grad(set_to_none=True)
        for part in inputs:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                loss = trainer._compute_loss(trainer.model, part)
            loss.backward()
        return time.perf_counter() - begun

    while (word := turns.recv()) != "end":
        if isinstance(word, Path):
            one_pass(None)
            found = {name: each.grad for name, each in trainer.model.named_parameters() if each.grad is not None}
            save_file({name: grad.contiguous() for name, grad in found.items()}, word)
            turns.send(None)
        else:
            turns.send(one_pass(word))


def cosine(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Between the gradients of all weights, as one vector."""
    dot = own = other = 0.0
    for name, parameter in ours.items():
        a, b = parameter.grad.double().flatten(), theirs[name].double().flatten()
        dot, own, other = dot + float(a @ b), own + float(a @ a), other + float(b @ b)
    return dot / (own * other) ** 0.5


def compare(
    batch: TokenBatch,
    found: tuple[PolicyOutput, dict[str, torch.Tensor]],
    turns: Connection,
    name: str,
) -> None:
    """Prints how far log-probs are from those of the plain model, and gradients from TRL's."""
    output, gradients = found
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradients.safetensors"
        turns.send(file)
        turns.recv()
        alike = cosine(gradients, load_file(file))
    with torch.no_grad():
        plain = load_model(name, device="cpu")[0](
            input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        wanted = plain[:, :-1].log_softmax(-1).gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    gap = torch.where(batch.action_mask[:, 1:], output.logprobs[:, 1:] - wanted, 0.0).abs().max().item()
    print(f"float32: log-probs within {gap:.1e} nats of the model's own padded forward, gradient cosine to TRL's "
          f"{alike:.8f}", flush=True)  # fmt: skip


def in_turns(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            taken = way()
            if turn:
                seconds[name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, or the embedded model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(62, 119), metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="rows of TRL's micro-batch")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of our micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kept", action="store_true", help="keep freed memory in TRL's turns too")
    args = parser.parse_args()
    low, high = args.prompt_tokens
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores: {args.prompts} prompts of {low}-{high} "
          f"tokens x {args.completions} completions of {args.new_tokens}")  # fmt: skip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_model(args.model, device="cpu")
    types = [None, torch.bfloat16] if fast_in_bfloat16(device) else [None]
    exact = Policy(model, tokenizer, precision="float32")
    batch, credit = rows(args, tokenizer)
    memory.keep_freed_memory()
    name = args.model if args.model not in EMBEDDED else model.name_or_path
    spawn = multiprocessing.get_context("spawn")
    turns, other = spawn.Pipe()
    inputs = padded(batch, credit, args.rows)
    spawn.Process(target=trl_side, args=(other, name, inputs, args.completions, args.kept), daemon=True).start()
    compare(batch, own_pass(exact, batch, credit, args.tokens), turns, args.model)

    def theirs(dtype: torch.dtype | None) -> float:
        turns.send(dtype)
        return float(turns.recv())

    def ours(policy: Policy) -> float:
        begun = time.perf_counter()
        own_pass(policy, batch, credit, args.tokens)
        return time.perf_counter() - begun

    ways: dict[str, Callable[[], float]] = {}
    for dtype in types:
        kind = "float32" if dtype is None else "bfloat16"
        policy = exact if dtype is None else Policy(model, tokenizer, precision="bfloat16")
        ways[f"TRL {kind}"] = lambda dtype=dtype: theirs(dtype)  # type: ignore[misc]
        ways[f"pertoken {kind}"] = lambda policy=policy: ours(policy)  # type: ignore[misc]
    seconds = in_turns(ways, args.rounds)
    turns.send("end")
    body, head = matrix_parameters(exact)
    packed = sum(batch.prompt_lengths()[:: args.completions]) + batch.num_actions
    flop = 6.0 * (body * packed + head * batch.num_actions)
    print("| pass | s (spread) | TRL float32 takes times as long (spread) | of the matrix rate |")
    print("| --- | --- | --- | --- |")
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(seconds["TRL float32"], taken, strict=True)]
        rate = matrix_rate(exact, torch.bfloat16 if "bfloat16" in name else torch.float32)
        share = f"{flop / median(taken) / 1e9 / rate:.0%}" if name.startswith("pertoken") else ""
        print(f"| {name} | {median(taken):.2f} ({min(taken):.2f}-{max(taken):.2f}) | {median(ratios):.2f} "
              f"({min(ratios):.2f}-{max(ratios):.2f}) | {share} |")  # fmt: skip


if __name__ == "__main__":
    main()
