"""One training run: its parts, its progress, and what of them a checkpoint holds.

All state that a step depends on hangs on one `Run`; what is done with it is in `trainer.py` and `offline.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from pertoken.config import RunConfig
from pertoken.evaluation import Evaluator
from pertoken.machine.background import Background
from pertoken.machine.portions import Portion, set_states, states
from pertoken.objectives import AdaptiveKL, FixedKL
from pertoken.policy.checkpoint import RandomStates, moved
from pertoken.policy.model import Policy, Reference
from pertoken.rewards import Learns, Multiplier, Spends, Stateful, Weighted, with_others
from pertoken.rollout.collect import Draws, stem_from
from pertoken.rollout.engine import NativeEngine, RolloutEngine
from pertoken.sampling import Controls
from pertoken.schedule import Schedule
from pertoken.tasks.base import LengthWindows, batch_of
from pertoken.tasks.course import Course
from pertoken.tracking.glossary import goodness
from pertoken.training.examples import Examples
from pertoken.training.guards import Guards
from pertoken.training.replay import Buffer
from pertoken.training.weights import Anchor, Average
from pertoken.types import Episode, Item


@dataclass
class Progress:
    """The counters of a run: what stop conditions look at and what a checkpoint holds."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    last_kl: float = 0.0
    """Mean KL per sequence to the reference in the last step (nats)."""
    best_metric: float = -math.inf
    """The best that evaluation.metric was, as `goodness`: more is better."""
    evaluations_since_best: int = 0
    evaluated: int | None = None
    """Step of the last evaluation, and what its main metric was."""
    metric: float | None = None
    rate: float = 1.0
    """What the learning rate is multiplied by beside its schedule of steps (`update.schedule` kl, plateau)."""
    alarm: str | None = None
    """The first alarm that sounded, and in which step."""
    tasks: dict[str, list[float]] = field(default_factory=dict)
    """Of a mixture, each task's held-out metric: at its start, and at its best so far."""


@dataclass
class Run:
    """One training run: its parts, and its progress."""

    config: RunConfig
    policy: Policy
    reference: Reference | None
    engine: RolloutEngine
    controls: Controls
    items: Sequence[Item]
    rewards: list[Weighted]
    kl: FixedKL | AdaptiveKL
    optimizer: torch.optim.Optimizer
    evaluator: Evaluator | None
    guards: Guards
    """What looks for signs that the reward is gamed."""
    memory_estimate: float = 0.0
    """What the run was expected to take at its height, before it began (GB)."""
    course: Course | None = None
    """Which items a step takes, where that is more than one pass after the other over all of them."""
    windows: LengthWindows | None = None
    """How the items of such a pass are shared out by length (`task.length_window`)."""
    beside: list[Weighted] = field(default_factory=list)
    """Rewards that are measured on the samples of each step and paid for never."""
    task_name: str = ""
    examples: Examples | None = None
    """How items become rows, where the run learns from answers in the data."""
    notes: list[str] = field(default_factory=list)
    """What was decided or left out while setting up, in sentences for a person."""
    progress: Progress = field(default_factory=Progress)
    ahead: Draws | None = None
    """What was sampled for the next step, while the rewards of this one were computed (`rollout.ahead`)."""
    staleness: int = 0
    """Policy versions between the weights that sampled the tokens of this step and those that it starts from."""
    redrawn: int = 0
    """Groups of this step that stand in for others, whose samples all earned the same (`rollout.redraws`)."""
    replay: Buffer | None = None
    """Samples of earlier steps that are learnt from again (`rollout.replay`)."""
    sampled: int | None = None
    """Rows of this step, the first ones, that were sampled for it; those behind are replayed. None: all were."""
    converse: Callable[..., list[Episode]] | None = None
    """How items become episodes of several turns (`rollout.turns`), called as `collect` is; None samples one turn."""
    mask: NativeEngine | None = None
    """The older copy of the policy that says what may be sampled (`rollout.mask`)."""
    average: Average | None = None
    """The running average of the weights (`update.ema_decay`)."""
    anchor: Anchor | None = None
    """Where the weights began, if something pulls them back there (`update.l2_to_initial`)."""
    before_update: Reference | None = None
    """A copy of the policy that stays where the update of a step began (`update.trust_region`)."""
    before_step: tuple[dict[str, Any], RandomStates] | None = None
    """`moment()` from before the step that is being made, until its update begins: what can still be saved."""
    writing: Background[Path] | None = None
    """A checkpoint that is being written beside the steps (`checkpoint.background`)."""
    _micro_batch: Portion | None = field(default=None, repr=False)

    @property
    def micro_batch(self) -> Portion:
        """How many tokens of an update go through the model at once."""
        tokens = self.config.update.tokens_per_micro_batch
        if self._micro_batch is None or self._micro_batch.whole != tokens:
            self._micro_batch = Portion("micro_batch", tokens, "tokens of a micro-batch")
        return self._micro_batch

    def portions(self) -> dict[str, Portion]:
        """What is cut smaller where memory runs out, by name."""
        found = (self.micro_batch, self.policy.portion, getattr(self.engine, "portion", None))
        return {portion.name: portion for portion in found if portion is not None}

    def controls_at(self, step: int) -> Controls:
        """The sampling controls of `step`: with as many tokens as `rollout.length_schedule` gives it."""
        points = self.config.rollout.length_schedule
        if points is None:
            return self.controls
        most = {"max_new_tokens": math.floor(Schedule(points)(step) + 1e-9)}
        return replace(self.controls, sampling=self.controls.sampling.model_copy(update=most))

    def stop_reason(self) -> str | None:
        """Why the run ends now, in words; None while it goes on."""
        stop, now, metric = self.config.stop, self.progress, self.config.evaluation.metric
        learnt = "generated" if self.config.offline is None else "learnt from"
        wanted = None if stop.metric is None else goodness(metric, stop.metric)
        reached = f"{metric} reached {goodness(metric, now.best_metric):.4f} (stop.metric {stop.metric})"
        conditions = [
            (stop.steps, now.step, f"made all {stop.steps} steps"),
            (stop.tokens, now.tokens, f"{learnt} {now.tokens} tokens (stop.tokens {stop.tokens})"),
            (stop.seconds, now.seconds, f"trained for {now.seconds:.0f} s (stop.seconds {stop.seconds})"),
            (wanted, now.best_metric, reached),
            (stop.patience, now.evaluations_since_best, f"no better {metric} in {stop.patience} evaluations"),
            (stop.kl, now.last_kl, f"KL per sequence {now.last_kl:.2f} nats is over the budget (stop.kl {stop.kl})"),
        ]
        alarm = f"alarm {now.alarm} (guards.stop)" if self.config.guards.stop and now.alarm else None
        reached_first = (words for limit, value, words in conditions if limit is not None and value >= limit)
        return next(reached_first, alarm)

    def state_dict(self) -> dict[str, Any]:
        """Everything beside weights, optimiser and random states that the next step depends on, as JSON."""
        everyone = (*self.rewards, *self.beside)
        rewards = {part.name: part.state() for part in everyone if isinstance(part.reward, Stateful)}
        normalisers = {part.name: part.normaliser.get_state() for part in self.rewards if part.normaliser}
        found = {part.name: part.weight.get_state() for part in self.rewards if isinstance(part.weight, Multiplier)}
        ahead = None if self.ahead is None else self.ahead.state()
        return {
            "progress": vars(self.progress).copy(),
            "kl": self.kl.state_dict(),
            "rewards": rewards,
            "normalisers": normalisers,
            "multipliers": found,
            "guards": self.guards.state_dict(),
            "ahead": ahead,
            "course": None if self.course is None else self.course.get_state(),
            "replay": None if self.replay is None else self._replay_state(self.replay),
            "portions": states(self.portions()),
        }

    def spending(self) -> dict[str, Spends]:
        """Rewards that keep count of what they cost, wherever they are asked, by name."""
        named: dict[str, Any] = {part.name: part.reward for part in (*self.rewards, *self.beside)}
        if self.evaluator is not None:
            named |= {f"evaluation/{part.name}": part.reward for part in self.evaluator.beside}
        everyone = (each for name, reward in named.items() for each in with_others(name, reward))
        return {name: reward for name, reward in everyone if isinstance(reward, Spends)}

    def spent(self) -> dict[str, Any]:
        """What these have spent until now, as JSON."""
        return {name: reward.get_spent() for name, reward in self.spending().items()}

    def moment(self) -> tuple[dict[str, Any], RandomStates]:
        """All that a checkpoint of now holds beside tensors."""
        return self.state_dict(), RandomStates.of_now()

    def tensors(self) -> dict[str, Tensor]:
        """What else of this run is trained or moves, by name: a checkpoint holds it beside weights and optimiser."""
        found: dict[str, Tensor] = {}
        if self.average is not None:
            found |= {f"average/{name}": cell for name, cell in self.average.cells.items()}
        if self.reference is not None and self.config.kl.refresh_every is not None:
            found |= {f"reference/{name}": cell for name, cell in self.reference.tensors().items()}
        if self.mask is not None:
            cells = self.mask.parameters()
            found |= {f"mask/{name}": cells[name] for name in self.policy.trainable() if name in cells}
        for part in self.rewards:
            if isinstance(part.reward, Learns):
                found |= {f"reward/{part.name}/{name}": cell for name, cell in part.reward.tensors().items()}
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. A controller or reward that it does not speak of starts anew, and a note says so."""
        self.progress = TypeAdapter(Progress).validate_python(state["progress"])
        self.notes += moved(state.get("machine"))
        if state["kl"].keys() == self.kl.state_dict().keys():
            self.kl.load_state_dict(state["kl"])
        else:
            self.notes.append("kl: the checkpoint is from a run with another controller; its coefficient starts anew")
        for part in (*self.rewards, *self.beside):
            self.notes += _go_on(part, state)
        self._count_on(state.get("spent", {}))
        anew = sorted({name.partition("/")[0] for name in state.get("anew", [])})
        if self.average is not None and "average" in anew:
            self.average = Average(self.policy.trainable(), self.average.decay)
        if self.mask is not None and "mask" in anew:
            self.mask.load_weights(self.policy.trainable(), version=self.progress.step)
        self.notes += [f"the checkpoint has no {kind} of this run: it starts anew" for kind in anew]
        set_states(self.portions(), state.get("portions", {}))
        if "guards" in state:
            self.guards.load_state_dict(state["guards"])
        if self.course is not None and state.get("course") is not None:
            self.course.set_state(state["course"])
        elif self.course is not None:
            self.notes.append("task: the checkpoint does not say how far each task has come; all begin anew")
        if self.replay is not None:
            self._fill(self.replay, state.get("replay"))
        if state.get("ahead") is not None:
            ahead, step, rollout = Draws.of_state(state["ahead"]), self.progress.step + 1, self.config.rollout
            items, controls = items_of(self, step), self.controls_at(step)
            if stem_from(ahead, items, self.policy.tokenizer, controls, rollout.samples_per_prompt):
                self.ahead = ahead
            else:
                self.notes.append("rollout: prompts or sampling are others now; what was drawn ahead is drawn anew")

    def _count_on(self, spent: Mapping[str, Any]) -> None:
        for name, reward in self.spending().items():
            if name in spent:
                reward.set_spent(spent[name])
            else:
                self.notes.append(f"rewards: the checkpoint does not say what {name!r} has spent; it counts anew")

    def _replay_state(self, replay: Buffer) -> dict[str, Any]:
        return {"groups": replay.state(), "controls": str(self.controls)}

    def _fill(self, replay: Buffer, state: Mapping[str, Any] | None) -> None:
        if state is None:
            self.notes.append("rollout.replay: the checkpoint has no earlier samples; they are gathered anew")
        elif state["controls"] != str(self.controls):
            self.notes.append("rollout.replay: sampling is another now; earlier samples are gathered anew")
        else:
            replay.set_state(state["groups"], {item.id: item for item in self.items})


def _go_on(part: Weighted, state: Mapping[str, Any]) -> list[str]:
    """Let a part of the reward remember what the checkpoint says of it; a note for what it does not say."""
    notes = []
    if isinstance(part.reward, Stateful) and part.name in state["rewards"]:
        part.reward.set_state(state["rewards"][part.name])
    elif isinstance(part.reward, Stateful):
        notes.append(f"rewards: the checkpoint has no state of {part.name!r}; it starts anew")
    if part.normaliser and part.name in state.get("normalisers", {}):
        part.normaliser.set_state(state["normalisers"][part.name])
    elif part.normaliser and part.normaliser.over == "running":
        notes.append(f"rewards: the checkpoint has no statistics of {part.name!r}; they start anew")
    if isinstance(part.weight, Multiplier) and part.name in state.get("multipliers", {}):
        part.weight.set_state(state["multipliers"][part.name])
    elif isinstance(part.weight, Multiplier):
        notes.append(f"rewards: the checkpoint has no weight of {part.name!r}; its search starts anew")
    return notes


def items_of(run: Run, step: int, again: int = 0) -> Sequence[Item]:
    """The items that `step` learns from; with `again` > 0 others in their place."""
    if run.course is not None:
        return run.course.items(step, again)
    method, seed = run.config.offline, run.config.seed + again * 7_368_787
    size = run.config.rollout.prompts_per_step if method is None else method.batch
    return batch_of(run.items, step - 1, size, seed, run.windows)
