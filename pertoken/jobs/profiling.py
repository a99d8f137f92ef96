"""Where the time and memory of a run go: some steps of the real loop, measured; what `pertoken profile` prints.

The rate of arithmetic is set beside what this machine reaches in plain matrix products of the same shapes and type,
so that the table says not only which part is long, but which has room left.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from pertoken import assembly
from pertoken.config import RunConfig
from pertoken.errors import ConfigError
from pertoken.machine.memory import installed_memory, peak_memory
from pertoken.machine.stopwatch import Stopwatch
from pertoken.observe import StepReport
from pertoken.policy.model import Policy, fast_in_bfloat16
from pertoken.rollout import rows
from pertoken.rollout.decoder import HFDecoder, RecomputingDecoder
from pertoken.tracking.runlog import RunLog
from pertoken.training import trainer
from pertoken.training.state import Run

PREFILL, DECODE, SAMPLE = "prompts", "decoding", "sampling"
OLD, REFERENCE, REWARD = "old-policy pass", "reference pass", "rewards, credit"
FORWARD, BACKWARD, OPTIMISER, HAND_OVER, REST = "forward", "backward", "optimiser", "weights to engine", "all else"
PHASES = (PREFILL, DECODE, SAMPLE, OLD, REFERENCE, REWARD, FORWARD, BACKWARD, OPTIMISER, HAND_OVER, REST)


@dataclass(frozen=True)
class Work:
    """Matrix arithmetic of one step (FLOP), by what it is for; attention scores and element-wise work not counted."""

    prefill: float
    decode: float
    reference: float
    training: float


@dataclass(frozen=True)
class Profile:
    """Medians over the measured steps."""

    steps: int
    seconds: dict[str, float]
    """Of each phase that took part, in the order of `PHASES`."""
    tokens: float
    """Sampled per step."""
    rates: dict[str, float]
    """GFLOP/s that rollout and training reach."""
    machine: float
    """GFLOP/s of plain matrix products here, in the type that the policy computes in."""
    peak: float | None
    """Peak memory (GB)."""
    estimated: float
    advice: list[str]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


@contextlib.contextmanager
def watched(run: Run) -> Iterator[Stopwatch]:
    """A stopwatch around the phases of `run`, while its loop or any of its stages is driven."""
    watch = Stopwatch()
    decoder: Any = getattr(run.engine, "decoder", None)
    with ExitStack() as stack:

        def around(owner: Any, name: str, phase: str | Callable[..., str]) -> None:
            stack.enter_context(watch.around(owner, name, phase))

        if decoder is not None:
            around(decoder, "prefill", PREFILL)
            around(decoder, "step", DECODE)
        around(rows, "draw_plain", SAMPLE)
        around(run.policy, "score", lambda *_, grad=False, **__: FORWARD if grad else OLD)
        if run.reference is not None:
            around(run.reference, "score", REFERENCE)
        around(trainer, "reward_and_draw_ahead", REWARD)
        around(trainer, "assign", REWARD)
        around(torch.Tensor, "backward", BACKWARD)
        around(run.optimizer, "step", OPTIMISER)
        around(run.engine, "load_weights", HAND_OVER)
        yield watch


def profile(config: RunConfig, *, steps: int = 3, trace: Path | None = None) -> Profile:
    """Run `steps` steps of `config` after one to warm up, without evaluation and in a folder that is thrown away.

    trace: one more step is recorded in there, for chrome://tracing or https://ui.perfetto.dev.
    """
    if config.offline is not None:
        raise ConfigError(f"profile measures rollouts and updates of method rl; this is method {config.offline.type}")
    last = 1 + steps + (trace is not None)
    config = config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(update={"items": 0}),
            "checkpoint": config.checkpoint.model_copy(update={"every": None}),
            "stop": type(config.stop)(steps=last),
        }
    )
    run = assembly.build_run(config)
    taken: list[dict[str, float]] = []
    reports: list[StepReport] = []
    with tempfile.TemporaryDirectory() as folder, watched(run) as watch, ExitStack() as stack:
        log = stack.enter_context(RunLog.create(Path(folder) / "run", config_text=config.to_yaml(), seed=config.seed))
        begun = time.perf_counter()

        def after(report: StepReport) -> None:
            nonlocal begun
            phases = watch.take()
            phases[REST] = time.perf_counter() - begun - sum(phases.values())
            taken.append(phases)
            reports.append(report)
            if trace is not None and report.step == 1 + steps:
                recorder = torch.profiler.profile(acc_events=True)
                stack.callback(lambda: recorder.export_chrome_trace(str(trace)))  # when it has stopped
                stack.enter_context(recorder)
            begun = time.perf_counter()

        trainer.loop(run, log, on_step=after)
    measured, seen = taken[1 : 1 + steps], reports[1 : 1 + steps]
    seconds = {name: median(step.get(name, 0.0) for step in measured) for name in PHASES}
    seconds = {name: value for name, value in seconds.items() if value}
    rates = _rates(run, seconds, seen)
    peak, estimated = peak_memory(run.policy.device), seen[-1].metrics["memory/estimate"]
    machine = matrix_rate(run.policy, run.policy.autocast_dtype or torch.float32)
    tokens = median(report.metrics["tokens/generated"] for report in seen)
    return Profile(
        steps, seconds, tokens, rates, machine, peak, estimated, advice(run, seconds, rates, machine, seen, peak)
    )


def _rates(run: Run, seconds: dict[str, float], reports: list[StepReport]) -> dict[str, float]:
    works = [work(run, report) for report in reports]

    def rate(flop: Callable[[Work], float], *phases: str) -> float:
        spent = sum(seconds.get(phase, 0.0) for phase in phases)
        return median(map(flop, works)) / spent / 1e9 if spent else 0.0

    rates = {
        PREFILL: rate(lambda w: w.prefill, PREFILL),
        DECODE: rate(lambda w: w.decode, DECODE),
        REFERENCE: rate(lambda w: w.reference, REFERENCE),
        "training": rate(lambda w: w.training, FORWARD, BACKWARD),
    }
    return {name: value for name, value in rates.items() if value}


def work(run: Run, report: StepReport) -> Work:
    """The matrix arithmetic that the episodes of a step need, each prompt once per group."""
    body, head = matrix_parameters(run.policy)
    prompts = {(episode.item.id, tuple(episode.tokens[: episode.prompt_length])) for episode in report.episodes}
    prompt_tokens = sum(len(prompt) for _, prompt in prompts)
    sampled = report.metrics["tokens/generated"]
    packed = 2 * (body * (prompt_tokens + sampled) + head * sampled)
    return Work(
        prefill=2.0 * (body * prompt_tokens + head * len(prompts)),
        decode=2 * (body + head) * (sampled - len(report.episodes)),
        reference=packed if run.reference is not None else 0.0,
        training=3 * packed * run.config.update.epochs,
    )


def matrix_parameters(policy: Policy) -> tuple[int, int]:
    """Parameters of the linear layers of the body, and of the head: what one token is multiplied with."""
    head = policy.hf_model.get_output_embeddings()
    body = sum(m.weight.numel() for m in policy.hf_model.modules() if isinstance(m, nn.Linear) and m is not head)
    return body, int(head.weight.numel())


def matrix_rate(policy: Policy, dtype: torch.dtype, *, rows: int = 1024, seconds: float = 1.0) -> float:
    """GFLOP/s of `x @ weight.T` over the body's own matrices, with `rows` tokens at once."""
    layers = [m for m in policy.hf_model.modules() if isinstance(m, nn.Linear)][:7]
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    inputs = [torch.randn(rows, w.shape[1], dtype=dtype, device=w.device) for w in weights]
    flop = sum(2.0 * rows * w.numel() for w in weights)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(x, weight)
        if policy.device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, flop / (time.perf_counter() - begun) / 1e9)
    return best


def advice(
    run: Run,
    seconds: dict[str, float],
    rates: dict[str, float],
    machine: float,
    reports: list[StepReport],
    peak: float | None,
) -> list[str]:
    """What to change, in sentences, the longest phase first."""
    config, total, device = run.config, sum(seconds.values()), run.policy.device
    share = {name: seconds.get(name, 0.0) / total for name in PHASES}
    rollout, training = share[PREFILL] + share[DECODE] + share[SAMPLE], share[FORWARD] + share[BACKWARD]
    decoder: Any = getattr(run.engine, "decoder", None)
    cut = median(1 - report.metrics["completion/terminated_share"] for report in reports)
    reached = rates.get("training", machine) / machine
    small = config.update.tokens_per_micro_batch < 2048
    candidates = [
        (isinstance(decoder, RecomputingDecoder), rollout,
         "The engine computes the whole text again for each token: this model's attention keeps no memory there. Try "
         "rollout.engine=transformers, or a model of another family."),
        (isinstance(decoder, HFDecoder) and device.type == "cpu" and rollout > 0.25, rollout,
         "Rollouts run on the model's own Python code. The compiled decoder serves Llama, Mistral and Qwen models in "
         "policy.precision bfloat16 where a C++ compiler is installed."),
        (cut > 0.5 and rollout > 0.25, rollout,
         f"{cut:.0%} of the samples are cut off at rollout.sampling.max_new_tokens "
         f"{config.rollout.sampling.max_new_tokens}: their length is paid for in each phase."),
        (share[REFERENCE] > 0.1 and config.kl.place == "none", share[REFERENCE],
         "The reference policy is only measured (kl.place none): kl.measure=false saves its pass and its copy of the "
         "weights."),
        (share[REWARD] > 0.15, share[REWARD],
         "Rewards take a good part of the step; see which by leaving one out at a time."
         + " With rollout.ahead=true they are computed while the next samples are drawn." * (not config.rollout.ahead)),
        (share[OLD] > 0.05, share[OLD],
         "The old policy is scored in a pass of its own: update.minibatches 1, epochs 1 and no value head make it "
         "unnecessary."),
        (run.policy.layout == "padded", training,
         "Rows are scored one by one and padded: this model's attention cannot be packed."),
        (run.policy.autocast_dtype is None and fast_in_bfloat16(device), training,
         "This processor computes faster in bfloat16 than in float32: policy.precision=auto."),
        (training > 0.3 and not run.controls.only_temperature, training / 2,
         "Sampling controls other than the temperature are rebuilt in each training pass: without top_k, top_p, "
         "penalties and bans the head is cheaper."),
        (training > 0.3 and reached < 0.5, training,
         f"Training reaches {reached:.0%} of this machine's matrix rate."
         + " More tokens per micro-batch (update.tokens_per_micro_batch) help, and take memory." * small
         + " Another process on these cores costs most of all: see that there is none."),
        (peak is not None and peak > 0.8 * installed_memory(device), 1.0,
         "Memory is nearly full: lower update.tokens_per_micro_batch, or train with policy.lora."),
    ]  # fmt: skip
    return [sentence for holds, _, sentence in sorted(candidates, key=lambda one: -one[1]) if holds]
