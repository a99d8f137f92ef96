"""What a check looks at, what it says, and how it is named."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pertoken import batching
from pertoken.config import CreditConfig, RunConfig
from pertoken.errors import RewardError
from pertoken.observe import StepReport
from pertoken.rewards import Scene
from pertoken.rollout.collect import to_episode
from pertoken.training import trainer, updating
from pertoken.training.assignment import assign
from pertoken.training.state import Run
from pertoken.types import (
    Completion,
    Credit,
    Episode,
    Item,
    PolicyOutput,
    StateValues,
    StopReason,
    TokenBatch,
    TokenRewards,
)

LOGPROB_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.3}
"""Largest difference of one token's log-prob between two ways to compute it (nats), by the type of matrix products: the
bounds that layouts and engines are chosen by."""

RATIO_TOLERANCE = {None: updating.RATIO_TOLERANCE, torch.bfloat16: 0.1}
"""Of `Probe.drift` (nats); the loop of training ends at that of float32."""

GRADIENT_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.05}
"""Largest norm of the difference of two gradients, as a share of the gradient's own norm."""


@dataclass(frozen=True)
class Probe:
    """A run, and one batch of its samples before the first update."""

    run: Run
    scene: Scene
    """The samples, with what the old policy and the reference say of them."""
    rewards: TokenRewards
    drift: float
    """|scored - sampled| log-prob (nats): of the worst action, in bfloat16 the mean over all, since the worst of many
    is far off there."""
    unpaid: str = ""
    """Why the rewards could not be had; they are 0 then."""

    @classmethod
    def of_run(cls, run: Run) -> "Probe":
        """Samples of its own, by the stages of the loop."""
        episodes = trainer.generate(run, 1)
        batch = batching.to_batch(episodes, run.controls, device=str(run.policy.device))
        old = run.policy.score(batch)
        scene = Scene(batch, episodes, run.policy.tokenizer, old, trainer.score_reference(run, batch), 1)
        drift = _drift(run, updating.check_ratio(batch, old, exact=False))
        try:
            return cls(run, scene, trainer.reward(run, scene), drift)
        except RewardError as error:
            return cls(run, scene, TokenRewards(torch.zeros_like(batch.sample_logprobs), {}), drift, str(error))

    @classmethod
    def of_step(cls, run: Run, report: StepReport) -> "Probe":
        """What a step of the loop has sampled and paid: nothing is computed again, no reward is asked."""
        episodes = report.episodes[: run.sampled]  # what is replayed was sampled by another policy
        batch = batching.to_batch(episodes, run.controls, device=str(run.policy.device))
        streams = {name: cells[: run.sampled, : batch.tokens.shape[1]] for name, cells in report.streams.items()}
        parts = {name.removeprefix("reward/"): cells for name, cells in streams.items() if name.startswith("reward/")}
        total = parts.pop("total")
        weights = {part.name: part.weight_at(report.step) for part in run.rewards} | {"kl": run.kl.coefficient}
        old = PolicyOutput(streams["logprob"], streams["entropy"], streams.get("value"))
        ref = PolicyOutput(streams["ref_logprob"], streams["entropy"]) if "ref_logprob" in streams else None
        scene = Scene(batch, episodes, run.policy.tokenizer, old, ref, report.step)
        return cls(run, scene, TokenRewards(total, parts, weights=weights), _drift(run, report.metrics))

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def batch(self) -> TokenBatch:
        return self.scene.batch

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the matrix products; None is float32."""
        return self.run.policy.autocast_dtype


def _drift(run: Run, metrics: Mapping[str, float]) -> float:
    return metrics["drift/max" if run.policy.autocast_dtype is None else "drift/mean"]


@dataclass(frozen=True)
class Verdict:
    """What a check found."""

    outcome: Literal["pass", "fail", "skipped"]
    figure: float | None = None
    tolerance: float | None = None
    unit: str = ""
    words: str = ""
    """What was looked at; on failure what is wrong; why it was skipped."""


def within(figure: float | int, tolerance: float | int, unit: str = "", *, seen: str, wrong: str) -> Verdict:
    """Passed if `figure` is at most `tolerance`; NaN never is."""
    good = figure <= tolerance
    return Verdict("pass" if good else "fail", float(figure), float(tolerance), unit, seen if good else wrong)


def skipped(why: str) -> Verdict:
    """Not made, and why not."""
    return Verdict("skipped", words=why)


@dataclass(frozen=True)
class Check:
    """A named question about a probe."""

    name: str
    title: str
    remedy: str
    quick: bool
    """It needs no pass of the model and asks no reward, so that `pertoken train` can afford it always."""
    ask: Callable[[Probe], Verdict]


def check(title: str, *, remedy: str, quick: bool = False) -> Callable[[Callable[[Probe], Verdict]], Check]:
    """Make a function of a probe a check of its name."""

    def decorate(ask: Callable[[Probe], Verdict]) -> Check:
        return Check(ask.__name__, title, remedy, quick, ask)

    return decorate


# --- made-up batches -------------------------------------------------------------------------------------


def made_up(
    probe: Probe, answers: Sequence[Sequence[int]], stops: Sequence[StopReason], *, group_size: int
) -> list[Episode]:
    """Episodes of given answers behind a prompt of two tokens, sampled with log-prob -1 each."""
    item, vocab = Item("made-up", "prompt", "answer"), vocabulary(probe)
    episodes = []
    for k, (ids, stop) in enumerate(zip(answers, stops, strict=True)):
        group = k // group_size
        said = Completion(list(ids), [-1.0] * len(ids), stop, entropies=[1.0] * len(ids))
        prompt = [(3 + group) % vocab, 5 % vocab]
        episodes.append(to_episode(f"made-up/{k}", item, group, prompt, said, version=0))
    return episodes


def made_up_batch(probe: Probe) -> TokenBatch:
    """Two groups of four rows of 2 to 5 actions, every second one cut off; float64, no sampling controls."""
    lengths, vocab = (3, 5, 2, 4, 4, 2, 5, 3), vocabulary(probe)
    answers = [[(7 * row + t) % vocab for t in range(length)] for row, length in enumerate(lengths)]
    stops: list[StopReason] = ["eos" if row % 2 else "length" for row in range(len(lengths))]
    batch = batching.to_batch(made_up(probe, answers, stops, group_size=4), type(probe.run.controls)())
    exact = {name: getattr(batch, name).double() for name in ("sample_logprobs", "env_rewards", "sample_entropy")}
    return replace(batch, **exact)


def vocabulary(probe: Probe) -> int:
    """How many ids the model has embeddings for."""
    embeddings: Any = probe.run.policy.hf_model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def numbers(like: Tensor, seed: int) -> Tensor:
    """Numbers of a normal distribution, the same for the same seed and shape; float64, on the CPU."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def largest(difference: Tensor) -> float:
    """The largest absolute entry; infinite if one is not a number, 0 if there is none."""
    return float(difference.detach().abs().nan_to_num(math.inf).max()) if difference.numel() else 0.0


def changed(config: RunConfig, path: str, value: Any) -> RunConfig:
    """`config` with another value at a dotted path; not checked again."""
    sections: list[Any] = [config]
    *outer, last = path.split(".")
    for name in outer:
        sections.append(getattr(sections[-1], name))
    for name, section in zip([last, *reversed(outer)], reversed(sections), strict=True):
        value = section.model_copy(update={name: value})
    return value  # type: ignore[no-any-return]


def credited(config: CreditConfig, rewards: TokenRewards, batch: TokenBatch, old: PolicyOutput) -> Credit:
    """`assign`; where credit compares with the greedy answer or rollouts from the prompt, those earn nothing; the
    reference model is taken to be the policy."""
    begins = batch.action_mask & (batch.action_mask.cumsum(1) == 1)
    states = StateValues(torch.zeros_like(begins, dtype=torch.float64), begins)
    return assign(config, rewards, batch, old, torch.zeros(len(batch.group)), states, old)
