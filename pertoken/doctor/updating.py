"""Checks of the update: gradients of the user's own model, and going on from a checkpoint."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pertoken import assembly
from pertoken.batching import Part
from pertoken.config import RunConfig
from pertoken.doctor.base import GRADIENT_TOLERANCE, Probe, Verdict, changed, check, numbers, within
from pertoken.policy.checkpoint import load_state
from pertoken.policy.model import Policy
from pertoken.rewards import Scene, Weighted
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.runlog import RunLog
from pertoken.training import trainer, updating
from pertoken.training.guards import Guards
from pertoken.training.state import Progress, Run
from pertoken.types import Credit

WHOLE = 10**9
"""Tokens of a micro-batch that holds everything."""

NOISE = 1e-2
"""Size of the numbers that adapters get while it is asked what the gradient reaches: at their start half of them get
none, since the other half is 0."""


@check(
    "the gradient is the same however the batch is cut into micro-batches, and in whatever order",
    remedy="The loss of a part is divided by something of the part: it must be a count of the whole optimiser step "
    "(`Part.num_actions`, `Part.num_rows`). Meanwhile set update.tokens_per_micro_batch so high that there is one.",
)
def micro_batches(probe: Probe) -> Verdict:
    """The update's own gradient of the batch in one piece, against its rows shuffled and cut two by two."""
    batch, parameters = probe.batch, list(probe.run.policy.trainable().values())
    rows = torch.arange(len(batch.group))
    credit = _made_up_credit(probe)
    _accumulate(probe, rows, credit, WHOLE)
    whole = _norm(parameters)
    for parameter in parameters:  # what the second pass adds to, so that the difference is left, without a copy
        if parameter.grad is not None:
            parameter.grad.neg_()
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    two_of_a_group = max(batch.prompt_lengths()) + 2 * int(batch.action_mask.sum(1).max())
    pieces = _accumulate(probe, shuffled, credit, two_of_a_group)
    difference = _norm(parameters)
    probe.run.policy.model.zero_grad(set_to_none=True)
    if not whole > 0:
        return Verdict("fail", words="the loss has no gradient at all")
    return within(
        difference / whole, GRADIENT_TOLERANCE[probe.dtype], "of its norm", seen=f"in one piece and in {pieces}",
        wrong=f"cut in {pieces} pieces, the gradient differs by {difference / whole:.2g} of its norm",
    )  # fmt: skip


@check(
    "the gradient reaches every parameter that is trained, and no frozen one",
    remedy="A parameter without gradient is not part of what is computed (an expert that no token chose, a layer that "
    "is skipped): freeze it, or see policy.lora.target_modules. A frozen one with gradient is trained by mistake.",
)
def gradient_reach(probe: Probe) -> Verdict:
    """One backward pass of the trainer's loss, on the first group."""
    policy, rows = probe.run.policy, torch.arange(len(probe.batch.group))
    rows = rows[(probe.batch.group == probe.batch.group[0]).cpu()]
    trained = policy.trainable()
    with _no_zeros(policy):
        part = _part(probe, rows)
        new = policy.score(part.batch, grad=True, entropy_grad=True, into_grad=True)
        part = replace(part, old=replace(part.old, logprobs=new.logprobs.detach()))
        sums = {"loss/policy": 0.0, "loss/value": 0.0}
        run: Run = replace(probe.run, config=changed(probe.config, "kl.place", "none"))
        entropy = run.config.objective.entropy_coefficient
        loss = updating.part_loss(run, part, new, sums, {}, part.batch, entropy, head_only=False)
        loss.backward()
    without = [name for name, p in trained.items() if p.grad is None or not bool(p.grad.any())]
    inside = {id(p) for p in trained.values()}
    frozen = [
        name for name, p in policy.model.named_parameters()
        if id(p) not in inside and p.grad is not None and bool(p.grad.any())
    ]  # fmt: skip
    policy.model.zero_grad(set_to_none=True)
    if policy.value_head is not None:
        policy.value_head.zero_grad(set_to_none=True)
    words = [
        *([f"{len(without)} of {len(trained)} trained parameters get none: {_some(without)}"] if without else []),
        *([f"{len(frozen)} frozen parameters get one: {_some(frozen)}"] if frozen else []),
    ]
    return within(
        len(without) + len(frozen), 0, "parameters", seen=f"{len(trained)} trained parameters", wrong="; ".join(words)
    )


@check(
    "a run that is saved and loaded makes the same next step, bit for bit, as one that goes on",
    remedy="Something that a step depends on is not in the checkpoint. A reward that remembers needs `get_state` and "
    "`set_state`; one that draws random numbers must take them from the global generators of Python, NumPy or torch.",
)
def resume(probe: Probe) -> Verdict:
    """Two steps of the real loop; then all is forgotten, loaded from behind the first, and the second made again."""
    run = _two_steps(probe)
    run.policy.dropout = run.config.policy.dropout
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _go_on(run, folder / "whole", 1)
        with RunLog.create(folder / "saved", config_text="", seed=0) as log:
            trainer.checkpoint(run, log)
        figures = _go_on(run, folder / "whole", 2)
        digests = _digests(run)
        again = _forgotten(run)
        saved, problems = CheckpointStore(folder / "saved" / "checkpoints").newest()
        if saved is None:
            return Verdict("fail", words="; ".join(problems) or "the checkpoint is not there")
        again.load_state_dict(load_state(saved.path, again.policy, again.optimizer, again.tensors()))
        again.engine.load_weights(again.policy.trainable(), version=again.progress.step)
        repeated = _go_on(again, folder / "again", 2)
    different = [name for name, digest in _digests(again).items() if digests.get(name) != digest]
    odd = [name for name, value in repeated.items() if figures.get(name) != value]
    notes = f"; first: {_some(different)}" if different else ""
    return within(
        len(different) + len(odd), 0, "tensors and figures",
        seen=f"{len(digests)} tensors and {len(figures)} figures of the second step",
        wrong=f"{len(different)} of {len(digests)} tensors differ after the second step{notes}"
        + (f"; figures: {_some(odd)}" if odd else ""),
    )  # fmt: skip


# --- gradients -------------------------------------------------------------------------------------------


class _Held(torch.optim.Optimizer):
    """Leaves weights and gradients as they are."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(list(policy.trainable().values()), {"lr": 0.0, "peak_lr": 0.0})

    def step(self, closure: Any = None) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...


def _accumulate(probe: Probe, rows: Tensor, credit: Credit, tokens: int) -> int:
    """Let the trainer's update add the gradient of `rows`, in that order, to `.grad`; in how many pieces it did."""
    config = changed(_plain(probe.config), "update.tokens_per_micro_batch", tokens)
    run: Run = replace(probe.run, config=config, optimizer=_Held(probe.run.policy))
    batch, old, ref = probe.batch.rows(rows), probe.scene.old, probe.scene.ref
    assert old is not None
    updating.update(run, batch, old.rows(rows), None if ref is None else ref.rows(rows), credit.rows(rows), 1)
    return len(batch.parts(tokens))


def _plain(config: RunConfig) -> RunConfig:
    """One optimiser step over the batch, nothing clipped."""
    for path, value in (("update.epochs", 1), ("update.minibatches", 1), ("update.max_grad_norm", None)):
        config = changed(config, path, value)
    return config


def _made_up_credit(probe: Probe) -> Credit:
    """Advantages and targets that differ from token to token, so that a wrong denominator shows."""
    mask = probe.batch.action_mask
    first, second = ((numbers(mask, seed) + 0.5).to(probe.batch.sample_logprobs) * mask for seed in (7, 8))
    return Credit(first, second)


def _part(probe: Probe, rows: Tensor) -> Part:
    batch, old, ref = probe.batch.rows(rows), probe.scene.old, probe.scene.ref
    assert old is not None
    credit = _made_up_credit(probe).rows(rows)
    return Part(
        rows, batch, old.rows(rows), None if ref is None else ref.rows(rows), credit, batch.num_actions, len(rows),
        last_of_task=True,
    )  # fmt: skip


def _norm(parameters: list[torch.nn.Parameter]) -> float:
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


@contextmanager
def _no_zeros(policy: Policy) -> Iterator[None]:
    """Trained parameters that are 0 throughout, as adapters and critics begin, hold small numbers meanwhile."""
    zero = [p for p in policy.trainable().values() if not bool(p.any())]
    with torch.no_grad():
        for parameter in zero:
            parameter.copy_(NOISE * numbers(parameter, 9))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")


# --- resuming --------------------------------------------------------------------------------------------


def _two_steps(probe: Probe) -> Run:
    """The run, set to make short steps, two and then a third, each with something to learn."""
    config = changed(probe.config, "rollout.prompts_per_step", 1)
    config = changed(config, "rollout.samples_per_prompt", min(2, config.rollout.samples_per_prompt))
    config = changed(config, "update.minibatches", min(config.update.minibatches, config.rollout.samples_per_prompt))
    config = changed(changed(config, "stop", type(config.stop)(steps=3)), "guards.stop", False)
    config = changed(changed(config, "checkpoint.keep", 1), "log.episodes_per_step", 0)
    return replace(probe.run, config=config, rewards=[*probe.run.rewards, _uneven()], ahead=None, evaluator=None)


def _uneven() -> Weighted:
    """A reward that differs from token to token: without it a batch of equal rewards would make no update."""

    def reward(scene: Scene) -> Tensor:
        return ((scene.batch.tokens * 7919) % 101 / 101 - 0.5).double() * scene.batch.action_mask

    return Weighted(reward, 1.0, "doctor")


def _go_on(run: Run, folder: Path, step: int) -> dict[str, float]:
    """Make steps up to `step` by the loop; the figures of the last one, times and memory left out."""
    figures: dict[str, float] = {}
    logged = folder / f"{step}"
    with RunLog.create(logged, config_text="", seed=run.config.seed) as log:
        trainer.loop(
            run,
            log,
            on_step=lambda report: figures.update(report.metrics),
            interrupted=lambda: run.progress.step >= step,
        )
    return {n: v for n, v in figures.items() if not n.startswith(("time/", "memory/", "tokens/per"))}


def _forgotten(run: Run) -> Run:
    """The run as a new process has it before it loads: weights, averages, counters and random states are others."""
    with torch.no_grad():
        for parameter in run.policy.trainable().values():
            parameter.zero_()
            parameter.grad = None
        for cell in run.tensors().values():
            cell.zero_()
    run.optimizer.state.clear()
    torch.manual_seed(run.config.seed + 1)
    return replace(
        run, optimizer=assembly.build_optimizer(run.config, run.policy), kl=assembly.build_kl(run.config),
        rewards=[*assembly.build_rewards(run.config.rewards), _uneven()], guards=Guards(run.config.guards.window),
        progress=Progress(), ahead=None, notes=[],
    )  # fmt: skip


def _digests(run: Run) -> dict[str, str]:
    """SHA-256 of every weight and every average of the optimiser, by name."""
    found = {}
    for name, parameter in run.policy.trainable().items():
        tensors = {"": parameter} | {
            f" ({key})": value for key, value in run.optimizer.state.get(parameter, {}).items()
        }
        for key, tensor in tensors.items():
            found[name + key] = sha256(tensor)
    return found


def sha256(tensor: Tensor) -> str:
    """Of the bytes of a tensor."""
    content: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()
