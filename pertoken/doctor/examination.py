"""All checks in order, asked of a run: before training (`examine`), and of its first step (`quick_certificate`)."""

import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch

from pertoken import assembly
from pertoken.config import DocstringsTask, MixtureTask, RunConfig, TaskConfig
from pertoken.doctor import crediting, inputs, scoring, updating
from pertoken.doctor.base import Check, Probe, Verdict, changed
from pertoken.errors import ConfigError, closest
from pertoken.observe import StepReport
from pertoken.policy.model import Policy
from pertoken.sampling import Segment
from pertoken.tracking.certificate import Certificate, Line
from pertoken.tracking.runlog import now, versions
from pertoken.training.state import Run

CHECKS: tuple[Check, ...] = (
    inputs.data, inputs.rewards,
    scoring.ratio, scoring.padding, scoring.order, scoring.controls, scoring.greedy, scoring.seeds,
    crediting.conservation, crediting.eos, crediting.pad_is_eos, crediting.truncation, crediting.coefficients,
    crediting.kl_gradient,
    updating.micro_batches, updating.gradient_reach, updating.resume,
)  # fmt: skip
"""In the order in which they are made; the last one trains."""

PROMPTS, SAMPLES, NEW_TOKENS, SEGMENT = 2, 4, 8, 3
"""At most so many prompts, samples of each, tokens of each and of a segment are looked at."""

ITEMS = 512
"""How many of the task's items are loaded."""

SHORT_PROMPTS = 64
"""How many of the task's prompts, the shortest ones, the samples are taken from."""


def examine(
    config: RunConfig, *, only: Sequence[str] = (), on_line: Callable[[Line], None] = lambda line: None
) -> Certificate:
    """Every check (or those named in `only`) on the model, tokenizer, task and rewards of `config`, before training.

    `on_line` hears of each when it is made. The model is loaded once more than training needs; nothing of the run is
    touched. Raises ConfigError for a name that no check has, and for a method that samples nothing.
    """
    begun, checks = time.monotonic(), _chosen(only)
    if config.offline is not None:
        raise ConfigError(
            f"method.type {config.method.type} learns from answers in the data, and the doctor looks at samples and "
            "their rewards: examine the run that goes on from its model (method.type=rl)"
        )
    run = assembly.build_run(small(config))
    run.policy.dropout = False  # a pass of the same weights must give the same numbers
    run.course = None  # which items is no matter here
    run.items = sorted(run.items, key=lambda item: len(str(item.prompt)))[:SHORT_PROMPTS]
    model = {"name": config.policy.model, "sha256": _weights_sha256(run.policy)}
    lines = _ask(checks, Probe.of_run(run), on_line)
    return _certificate("full", run, config, model, lines, time.monotonic() - begun)


def quick_certificate(run: Run, report: StepReport) -> Certificate:
    """The checks that cost next to nothing, on what a step of the loop has sampled and paid."""
    begun = time.monotonic()
    lines = _ask([one for one in CHECKS if one.quick], Probe.of_step(run, report))
    return _certificate("quick", run, run.config, {"name": run.config.policy.model}, lines, time.monotonic() - begun)


def small(config: RunConfig) -> RunConfig:
    """`config` with few and short samples, and nothing that is for later steps."""
    rollout = config.rollout
    tokens = min(rollout.sampling.max_new_tokens, NEW_TOKENS)
    fewest = min(rollout.sampling.min_new_tokens, tokens)
    changes = {
        "rollout.prompts_per_step": min(rollout.prompts_per_step, PROMPTS),
        "rollout.samples_per_prompt": min(rollout.samples_per_prompt, SAMPLES),
        "rollout.sampling.max_new_tokens": tokens,
        "rollout.sampling.min_new_tokens": fewest,
        "rollout.sampling.segment": _short(rollout.sampling.segment),
        "rollout.length_schedule": None,
        "update.minibatches": min(config.update.minibatches, 2),
        "task": _few_items(config.task),
        "evaluation.items": 0,
        "checkpoint.every": None,
    }
    for path, value in changes.items():
        config = changed(config, path, value)
    return config


def _short(segment: Segment | None) -> Segment | None:
    """Segments so short that a few tokens need several of them."""
    if segment is None:
        return None
    return Segment(tokens=min(segment.tokens, SEGMENT), context=min(segment.context, SEGMENT))


def _few_items(task: TaskConfig) -> TaskConfig:
    if isinstance(task, MixtureTask):
        return task.model_copy(update={"tasks": {name: _few_items(member) for name, member in task.tasks.items()}})
    few = "num_train" if isinstance(task, DocstringsTask) else "limit"
    return task.model_copy(update={few: ITEMS, "curriculum": None})


def _chosen(only: Sequence[str]) -> list[Check]:
    known = {one.name: one for one in CHECKS}
    for name in only:
        if name not in known:
            raise ConfigError(f"--only {name}: no check has that name; {closest(name, known)}")
    return [one for one in CHECKS if not only or one.name in only]


def _ask(
    checks: Iterable[Check], probe: Probe, on_line: Callable[[Line], None] = lambda line: None
) -> tuple[Line, ...]:
    lines = []
    for one in checks:
        begun = time.monotonic()
        try:
            verdict = one.ask(probe)
        except Exception as error:  # whatever breaks in a check is what the check is for
            verdict = Verdict("fail", words=f"{type(error).__name__}: {error}")
        remedy = one.remedy if verdict.outcome == "fail" else ""
        seconds = round(time.monotonic() - begun, 3)
        line = Line(one.name, one.title, **vars(verdict), remedy=remedy, seconds=seconds)
        lines.append(line)
        on_line(line)
    return tuple(lines)


def _certificate(
    kind: Literal["full", "quick"],
    run: Run,
    config: RunConfig,
    model: dict[str, str],
    lines: tuple[Line, ...],
    seconds: float,
) -> Certificate:
    policy = run.policy
    machine: dict[str, str | int] = {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "device": str(policy.device),
        "precision": str(policy.autocast_dtype or torch.float32).removeprefix("torch."),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
    }
    digest = hashlib.sha256(config.to_yaml().encode()).hexdigest()
    return Certificate(kind, now(), versions(), machine, model, digest, round(seconds, 3), lines)


def _weights_sha256(policy: Policy) -> str:
    """Of all weights in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in sorted(policy.model.named_parameters()):
        digest.update(f"{name} {updating.sha256(parameter)}".encode())
    return digest.hexdigest()
