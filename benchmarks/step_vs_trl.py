"""Seconds of a whole training step, here and in TRL's GRPO: same model, prompts, group, lengths, reward, one run.

    pip install trl==1.16.0
    python benchmarks/step_vs_trl.py
    python benchmarks/step_vs_trl.py --completions 16 --prompt-tokens 512 512 --arms pertoken trl/bfloat16/8
    python benchmarks/step_vs_trl.py --table

Each arm is a process of its own that makes one step when it is told to, while all others sleep; the arms take turns.
An arm is `pertoken`, with settings behind slashes: `generic` (without the compiled decoder, norms, activations and
rotation of the Llama family: what any Hugging Face model gets), `float32`, `lora`, `micro=<tokens per micro-batch>`,
`recompute` (activations computed again in the backward pass); or
`trl/<precision>/<rows per micro-batch>[/lora]`. TRL runs without gradient checkpointing, which makes it faster. Both
sides log their usual metrics. `--table` runs the scaling table, each shape in turns with the job; `--plot FILE` draws
the steps (extra `plots`).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
ARMS = ("pertoken", "pertoken/generic", "trl/bfloat16/8", "trl/float32/8")
LEARNING_RATE = 1e-6


def distinct_words(text: str) -> float:
    """The reward of both sides: it costs nothing, and differs between samples."""
    words = text.split()
    return len(set(words)) / (1 + len(words))


# --- the job ------------------------------------------------------------------------------------------------


def make_job(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that an arm must know, as JSON: the prompts of all steps among it."""
    from transformers import AutoTokenizer

    from pertoken.policy.model import EMBEDDED, load_model

    model = args.model
    if model in EMBEDDED:
        model = load_model(model)[0].name_or_path
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer.encode(text, add_special_tokens=False)
    draw = random.Random(0)
    low, high = args.prompt_tokens
    prompts = []
    for _ in range((args.warmup + args.steps) * args.prompts):
        length = draw.randint(low, high)
        start = draw.randrange(len(ids) - length)
        prompts.append(tokenizer.decode(ids[start : start + length]))
    return {
        "model": model, "prompts": prompts, "prompts_per_step": args.prompts, "completions": args.completions,
        "new_tokens": args.new_tokens, "natural": args.natural, "kl": args.kl, "steps": args.warmup + args.steps,
    }  # fmt: skip


# --- the arms, each in its own process ----------------------------------------------------------------------


class Turn:
    """An arm's side of the pipe: waits for its turn, and reports the step that it made."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = os.fdopen(read), os.fdopen(write, "w")
        self._begun: float | None = None

    def wait(self) -> None:
        if not self._read.readline():
            sys.exit(0)
        self._begun = time.perf_counter()

    def report(self, **figures: Any) -> None:
        if self._begun is not None:
            self._write.write(json.dumps({"seconds": time.perf_counter() - self._begun} | figures) + "\n")
            self._write.flush()
            self._begun = None


def own_arm(name: str, job: dict[str, Any], turn: Turn) -> None:
    """Steps of pertoken's own loop, with all that it logs and checks."""
    from pertoken import assembly
    from pertoken.config import RunConfig
    from pertoken.jobs import profiling
    from pertoken.machine.memory import peak_memory
    from pertoken.policy import model, scoring
    from pertoken.rewards import Weighted, episode_reward
    from pertoken.rollout import engine
    from pertoken.sampling import Controls
    from pertoken.tracking.runlog import RunLog
    from pertoken.training import trainer
    from pertoken.types import Item

    settings = name.split("/")[1:]
    if "generic" in settings:
        engine.fused_decoder = lambda model: None  # type: ignore[assignment]
        model.fuse_layers = lambda model: 0  # type: ignore[assignment]
        scoring.fused_rotation = lambda model: nullcontext()  # type: ignore[assignment]
    micro = next((int(s.removeprefix("micro=")) for s in settings if s.startswith("micro=")), None)
    config = RunConfig.model_validate({
        "name": "speed",
        "policy": {"model": job["model"], "precision": "float32" if "float32" in settings else "auto",
                   **({"lora": {"rank": 16, "alpha": 32}} if "lora" in settings else {})},
        "task": {"path": job["data"], "answer": None},
        "rollout": {"prompts_per_step": job["prompts_per_step"], "samples_per_prompt": job["completions"],
                    "sampling": {"max_new_tokens": job["new_tokens"]}},
        "rewards": [{"name": "length", "max_words": 20}],
        "kl": {"place": "loss", "coefficient": job["kl"]} if job["kl"] else {"place": "none", "measure": False},
        "credit": {"type": "group_relative"},
        "update": {"learning_rate": LEARNING_RATE, "recompute_activations": "recompute" in settings,
                   **({"tokens_per_micro_batch": micro} if micro else {})},
        "stop": {"steps": job["steps"]},
        "evaluation": {"items": 0},
    })  # fmt: skip
    run = assembly.build_run(config)
    run.rewards = [Weighted(episode_reward(lambda sample: distinct_words(sample.text)), 1.0, "distinct")]
    run.items = [Item(str(k), text, None) for k, text in enumerate(job["prompts"])]
    if not job["natural"]:
        run.controls = Controls(run.controls.sampling, ())  # nothing ends a completion
    trainer.batch_of = lambda items, step, size, seed: items[step * size : (step + 1) * size]  # in order
    with tempfile.TemporaryDirectory() as folder, profiling.watched(run) as watch:
        log = RunLog.create(Path(folder) / "run", config_text=config.to_yaml(), seed=0)

        def after(report: Any) -> None:
            turn.report(
                parts=watch.take(), tokens=report.metrics["tokens/generated"], peak=peak_memory(run.policy.device)
            )
            if report.step < job["steps"]:
                turn.wait()

        turn.wait()
        with log:
            trainer.loop(run, log, on_step=after)


def trl_arm(name: str, job: dict[str, Any], turn: Turn) -> None:
    """Steps of TRL's GRPOTrainer."""
    import resource

    import datasets
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from pertoken.machine.stopwatch import Stopwatch

    _, precision, rows, *more = name.split("/")
    accumulate = job["prompts_per_step"] * job["completions"] // int(rows)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lora = None
    if "lora" in more:
        from peft import LoraConfig

        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tokens = 0

    def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        nonlocal tokens
        tokens = sum(map(len, completion_ids))
        return [distinct_words(text) for text in completions]

    class InTurn(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._report()
            turn.wait()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self._report()

        def _report(self) -> None:
            turn.report(parts=watch.take(), tokens=tokens,
                        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)  # fmt: skip

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            train_dataset=datasets.Dataset.from_dict({"prompt": job["prompts"]}),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[InTurn()],
            args=GRPOConfig(
                output_dir=folder, per_device_train_batch_size=int(rows), gradient_accumulation_steps=accumulate,
                num_generations=job["completions"], max_completion_length=job["new_tokens"], temperature=1.0,
                beta=job["kl"], bf16=precision == "bfloat16", learning_rate=LEARNING_RATE, max_steps=job["steps"],
                report_to="none", save_strategy="no", logging_steps=1, shuffle_dataset=False, use_cpu=True,
                gradient_checkpointing=False, disable_tqdm=True,
                generation_kwargs=None if job["natural"] else {"min_new_tokens": job["new_tokens"]},
            ),
        )  # fmt: skip
        watch = Stopwatch()

        def around(owner: Any, attribute: str, phase: str | Callable[..., str]) -> None:
            stack.enter_context(watch.around(owner, attribute, phase))

        around(trainer, "_generate_single_turn", "generation")
        around(trainer, "_calculate_rewards", "rewards, credit")
        around(trainer, "_get_per_token_logps_and_entropies",
               lambda *_, **__: "forward" if torch.is_grad_enabled() else "reference pass")  # fmt: skip
        around(trainer.accelerator, "backward", "backward")
        trainer.create_optimizer()
        around(trainer.optimizer, "step", "optimiser")
        trainer.train()


# --- taking turns -------------------------------------------------------------------------------------------


class Arm:
    """The parent's side: one process, one step at a time."""

    def __init__(self, name: str, job: Path) -> None:
        self.name = name
        self.steps: list[dict[str, Any]] = []
        read, write = os.pipe()
        back_read, back_write = os.pipe()
        command = [sys.executable, __file__, "--worker", name, "--job", str(job), "--pipe", str(read), str(back_write)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, pass_fds=(read, back_write), stdout=self._log, stderr=self._log, cwd=ROOT
        )
        os.close(read)
        os.close(back_write)
        self._go, self._back = os.fdopen(write, "w"), os.fdopen(back_read)

    def step(self) -> None:
        """One step; its figures, and how busy other processes kept this machine meanwhile (cores)."""
        busy, own, begun = _busy_seconds(), _cpu_seconds(self._process.pid), time.perf_counter()
        self._go.write("go\n")
        self._go.flush()
        line = self._back.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self._log.read()[-3000:]}")
        foreign = (_busy_seconds() - busy) - (_cpu_seconds(self._process.pid) - own)
        self.steps.append(json.loads(line) | {"foreign": foreign / (time.perf_counter() - begun)})

    def close(self) -> None:
        self._go.close()
        self._process.wait(timeout=60)


def _busy_seconds() -> float:
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(args: argparse.Namespace, jobs: dict[str, tuple[str, argparse.Namespace]]) -> dict[str, Arm]:
    """All jobs, each an arm and its settings, over all steps, in turns; the first `warmup` steps are thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        arms = {}
        for label, (name, settings) in jobs.items():
            job, place = make_job(settings), Path(folder) / str(len(arms))
            place.mkdir()
            rows = (json.dumps({"prompt": prompt, "reference": ""}) for prompt in job["prompts"])
            (place / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
            (place / "job.json").write_text(json.dumps(job | {"data": str(place / "prompts.jsonl")}), encoding="utf-8")
            arms[label] = Arm(name, place / "job.json")
        for turn in range(args.warmup + args.steps):
            for label, arm in arms.items():
                arm.step()
                last = arm.steps[-1]
                print(f"  {label} step {turn + 1}: {last['seconds']:.2f} s, {last['tokens']:.0f} tokens, "
                      f"foreign load {last['foreign']:.2f}", file=sys.stderr, flush=True)  # fmt: skip
        for arm in arms.values():
            arm.close()
            arm.steps = arm.steps[args.warmup :]
    return arms


def table(arms: dict[str, Arm]) -> str:
    """Medians per arm, and how many times longer than the first arm each one takes."""
    first = next(iter(arms.values()))
    phases = list(dict.fromkeys(phase for arm in arms.values() for step in arm.steps for phase in step["parts"]))
    lines = [
        "| arm | s/step (spread) | ratio (spread) | tokens/s | peak GB | foreign load | " + " | ".join(phases) + " |",
        "| --- |" + " --- |" * (5 + len(phases)),
    ]
    for arm in arms.values():
        seconds = [step["seconds"] for step in arm.steps]
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(arm.steps, first.steps, strict=True)]
        rate = median(step["tokens"] / step["seconds"] for step in arm.steps)
        parts = (median(step["parts"].get(phase, 0.0) for step in arm.steps) for phase in phases)
        lines.append(
            f"| {arm.name} | {median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) | {median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}) | {rate:.0f} | {arm.steps[-1]['peak']:.1f} | "
            f"{max(step['foreign'] for step in arm.steps):.2f} | "
            + " | ".join(f"{part:.2f}" if part else "" for part in parts) + " |"
        )  # fmt: skip
    return "\n".join(lines)


PARTS = {
    "rollout": ("prompts", "decoding", "sampling", "generation"),
    "other passes": ("old-policy pass", "reference pass"),
    "forward": ("forward",),
    "backward": ("backward",),
}
"""What the picture tells apart: the phases that each side names in its own way."""


def plot(arms: dict[str, Arm], file: Path) -> None:
    """Seconds of a step by arm, as bars of their parts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.45 * len(arms)), layout="constrained")
    totals = [median(step["seconds"] for step in arm.steps) for arm in arms.values()]
    left = [0.0] * len(arms)
    for colour, (name, phases) in zip(("#4269d0", "#97bbf5", "#efb118", "#ff725c"), PARTS.items(), strict=True):
        widths = [
            median(sum(step["parts"].get(phase, 0.0) for phase in phases) for step in arm.steps)
            for arm in arms.values()
        ]
        if any(widths):
            axes.barh(list(arms), widths, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    # Medians of parts may add up to more than the median of steps.
    rest = [max(total - parts, 0.0) for total, parts in zip(totals, left, strict=True)]
    axes.barh(list(arms), rest, left=left, color="#9c9c9c", label="all else")
    for k, (total, parts) in enumerate(zip(totals, left, strict=True)):
        axes.text(max(total, parts), k, f" {total:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(totals))
    axes.set_xlabel("seconds of a training step (median)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.45, -0.32))
    figure.savefig(file, dpi=144)


def scaling(args: argparse.Namespace) -> str:
    """One axis at a time around the job, in turns with the job itself: group size, prompt length, completion length."""
    rows = ["| completions | prompt tokens | new tokens | s/step | packed tokens | ms / packed token | of the job's |",
            "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    shapes = [(8, 94, 64), (16, 94, 64), (4, 64, 64), (4, 256, 64), (4, 1024, 64)]
    shapes += [(4, 94, 32), (4, 94, 128), (4, 94, 512)]

    def of(completions: int, prompt: int, new: int) -> argparse.Namespace:
        return argparse.Namespace(**vars(args) | {
            "completions": completions, "prompt_tokens": (prompt, prompt), "new_tokens": new
        })  # fmt: skip

    def packed(job: argparse.Namespace) -> int:
        return int(job.prompts * (job.prompt_tokens[0] + job.completions * job.new_tokens))

    job = of(4, 94, 64)
    for shape in (of(*sizes) for sizes in shapes):
        arms = measure(args, {"the job": (args.arms[0], job), "shape": (args.arms[0], shape)})
        steps = {label: [step["seconds"] for step in arm.steps] for label, arm in arms.items()}
        times = [a / packed(shape) / (b / packed(job)) for a, b in zip(steps["shape"], steps["the job"], strict=True)]
        seconds = median(steps["shape"])
        rows.append(
            f"| {shape.completions} | {shape.prompt_tokens[0]} | {shape.new_tokens} | {seconds:.2f} | {packed(shape)} "
            f"| {1000 * seconds / packed(shape):.2f} | {median(times):.2f} ({min(times):.2f}-{max(times):.2f}) |"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="folder, or the embedded model")
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--completions", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(62, 119), metavar=("LEAST", "MOST"))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--natural", action="store_true", help="let sequences end by themselves")
    parser.add_argument("--kl", type=float, default=0.0, help="coefficient of the KL penalty in the loss")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="the scaling table of the first arm instead")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the steps as a picture (PNG, SVG)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pipe", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        arm = trl_arm if args.worker.startswith("trl/") else own_arm
        arm(args.worker, json.loads(args.job.read_text()), Turn(*args.pipe))
        return
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores: {args.prompts} prompts "
          f"x {args.completions} completions, prompts of {args.prompt_tokens[0]}-{args.prompt_tokens[1]} tokens, "
          f"{'at most ' if args.natural else ''}{args.new_tokens} new tokens, KL {args.kl}")  # fmt: skip
    if args.table:
        print(scaling(args))
        return
    arms = measure(args, {name: (name, args) for name in args.arms})
    print(table(arms))
    if args.plot:
        plot(arms, args.plot)


if __name__ == "__main__":
    main()
