"""What cannot work together in a run: each combination that is refused, and what to set instead.

A section refuses by itself what is wrong in it alone. Here are pairs of a condition and the sentence that a person
reads when it holds, by what they are about.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pertoken.config.credit import ByWorth, MonteCarlo, SelfCritical
from pertoken.config.method import Pairs
from pertoken.config.monitoring import StopConfig
from pertoken.config.reward import RewardConfig
from pertoken.config.task import FileTask, MixtureTask
from pertoken.errors import closest

if TYPE_CHECKING:
    from pertoken.config.run import RunConfig

OF_FAMILIES = ("style", "columns", "source_language", "target_language")
"""Keys of a task that its family reads, and nothing else."""

Refusals = Iterator[tuple[bool, str]]
"""Whether a combination is there, and why it cannot be."""


def refusals(run: "RunConfig") -> Refusals:
    """Everything that is looked at, in the order in which it is told."""
    for about in (
        _rollouts,
        _segments,
        _credit,
        _objective,
        _guards,
        _replay,
        _trust_region,
        _given_answers,
        _tasks,
        _ends,
    ):
        yield from about(run)


def _compares_samples(run: "RunConfig") -> bool:
    """Whether credit is assigned by comparing the samples of a prompt."""
    return run.credit.type not in ("reward_to_go", "gae", "self_critical", "monte_carlo")


def _parts(rewards: Iterable[RewardConfig]) -> list[str]:
    """What the parts of a reward are called."""
    return [reward.name or str(reward.fn).rpartition(":")[2] for reward in rewards]


def _rollouts(run: "RunConfig") -> Refusals:
    rollout, credit = run.rollout, run.credit
    rows = run.rollout.prompts_per_step * run.rollout.samples_per_prompt
    yield (
        rollout.ahead and run.objective.importance_cap is None,
        "rollout.ahead samples with the weights of one update before, and objective.importance_cap null does not "
        "correct for it. Set a cap (2.0), or rollout.ahead=false.",
    )
    yield (
        rollout.sampling.greedy,
        "rollout.sampling.temperature is 0: a greedy token has no probability to learn from. Use a temperature "
        "above 0 for training; evaluation.sampling may be greedy.",
    )
    yield (
        rollout.mask is not None and rollout.engine != "native",
        "rollout.mask asks a second model at each token, and transformers.generate asks one: set "
        "rollout.engine=native.",
    )
    yield (
        rollout.redraws > 0 and rollout.ahead,
        "rollout.redraws needs the rewards of a step before its samples are complete, and rollout.ahead draws "
        "without them: leave one of them out.",
    )
    yield (
        rollout.redraws > 0 and not _compares_samples(run),
        f"rollout.redraws leaves out groups without a difference; credit.type {credit.type} learns from them too.",
    )
    yield (
        rollout.redraws > 0 and any(r.constraint or r.normalise == "running" for r in run.rewards),
        "rollout.redraws scores samples that are then left out; a reward with a constraint or normalise: running "
        "would remember them. Leave one of them out.",
    )
    yield (
        rollout.turns is not None and (rollout.ahead or rollout.redraws > 0),
        "rollout.turns draws turn by turn: leave out rollout.ahead and rollout.redraws.",
    )
    yield (
        rollout.turns is not None and isinstance(credit, SelfCritical | MonteCarlo | ByWorth),
        f"credit.type {credit.type} samples or shortens texts of one turn; rollout.turns has several: use another.",
    )
    yield (
        run.update.minibatches > rows,
        f"update.minibatches {run.update.minibatches} exceeds the {rows} samples of a step.",
    )


def _segments(run: "RunConfig") -> Refusals:
    if run.rollout.sampling.segment is None:
        return
    objective, segment = run.objective, "rollout.sampling.segment"
    for key, value in (("level", objective.level), ("importance_level", objective.importance_level)):
        yield (
            value != "token",
            f"objective.{key} {value} is about the ratio of a whole text, and {segment} trains its segments one by "
            f"one: set objective.{key}=token.",
        )
    yield (
        run.credit.type == "attention" and run.credit.model is None,
        f"credit.type attention looks back from the last token, which with {segment} does not see the whole text: name "
        "a model that reads it (credit.model), or use credit.type shapley.",
    )


def _credit(run: "RunConfig") -> Refusals:
    rollout, credit, named = run.rollout, run.credit, _parts(run.rewards)
    beside = isinstance(credit, SelfCritical | MonteCarlo | ByWorth)  # further texts are scored beside the samples
    strangers = [part for part in getattr(credit, "parts", {}) if part not in (*named, "kl", "env")]
    yield (
        credit.type == "gae" and run.policy.value_head is None,
        "credit.type gae needs a critic: set policy.value_head (for its defaults: policy.value_head={}).",
    )
    yield (
        credit.type != "gae" and run.policy.value_head is not None,
        f"policy.value_head is set, but credit.type {credit.type} never asks it: use credit.type gae or drop it.",
    )
    yield (
        _compares_samples(run) and rollout.samples_per_prompt < 2,
        f"credit.type {credit.type} compares the samples of a prompt: rollout.samples_per_prompt must be at least "
        "2 (or use credit.type reward_to_go).",
    )
    yield (
        beside and any(r.constraint or r.normalise != "none" for r in run.rewards),
        f"credit.type {credit.type} compares a sample with others (greedy answers, rollouts from prefixes, itself "
        "without some tokens) in the same units; a reward with a constraint or normalise has others for each "
        "batch. Leave them out.",
    )
    yield (
        credit.type == "monte_carlo" and run.kl.place == "reward" and run.kl.coefficient > 0,
        "kl.place reward pays each token of a sample, and rollouts from prefixes (credit.type monte_carlo) do not "
        "pay it: set kl.place to loss or none.",
    )
    yield (
        credit.type == "gae" and credit.macro_size > 1 and credit.length_adaptive is not None,
        "credit.length_adaptive counts tokens, credit.macro_size makes actions of several: leave one of them out.",
    )
    yield (
        credit.type == "online_dpo" and run.kl.place == "none" and not run.kl.measure,
        "credit.type online_dpo compares with the reference model: set kl.measure=true.",
    )
    yield (
        bool(strangers),
        f"credit.parts.{''.join(strangers[:1])}: no reward has that name; there are {', '.join(named)}.",
    )


def _objective(run: "RunConfig") -> Refusals:
    objective = run.objective
    yield (
        objective.importance_outside == "truncate"
        and (objective.importance_level == "geometric" or objective.importance_floor > 0),
        "objective.importance_level geometric and objective.importance_floor say what is left out: set "
        "objective.importance_outside=mask.",
    )
    yield (
        objective.importance_cap is not None and objective.importance_floor >= objective.importance_cap,
        f"objective.importance_floor {objective.importance_floor} is not below objective.importance_cap "
        f"{objective.importance_cap}: every weight would be left out.",
    )
    yield (
        objective.entropy_floor is not None and not objective.entropy_coefficient,
        "objective.entropy_floor is set, but nothing is paid below it: set objective.entropy_coefficient (0.01).",
    )


def _guards(run: "RunConfig") -> Refusals:
    both = [part for part in _parts(run.guards.beside) if part in _parts(run.rewards)]
    yield (
        bool(both),
        f"guards.beside: {''.join(both[:1])} is in the reward already; what is measured beside it must not be.",
    )


def _replay(run: "RunConfig") -> Refusals:
    replay = run.rollout.replay
    if replay is None:
        return
    again, prompts = round(replay.share * run.rollout.prompts_per_step), run.rollout.prompts_per_step
    credit = run.credit.type
    yield (
        not 0 < again < prompts,
        f"rollout.replay.share {replay.share:g} of rollout.prompts_per_step {prompts} is {again} prompts: at least "
        "one must be taken from earlier steps, and one sampled.",
    )
    yield (
        run.objective.importance_cap is None,
        "rollout.replay learns from samples of earlier weights, and objective.importance_cap null does not correct "
        "for that. Set a cap (2.0).",
    )
    yield (
        run.rollout.ahead,
        "rollout.replay and rollout.ahead both learn from samples of earlier weights: leave one of them out.",
    )
    yield (
        credit in ("gae", "self_critical", "monte_carlo"),
        f"credit.type {credit} compares a sample with what the policy of now is worth (a critic, a greedy answer, "
        "rollouts), and rollout.replay brings samples of earlier policies: use a credit.type that compares the "
        "samples of a prompt, or reward_to_go.",
    )
    yield (
        any(r.constraint or r.normalise == "running" for r in run.rewards),
        "rollout.replay scores samples again; a reward with a constraint or normalise: running would count them "
        "twice. Leave one of them out.",
    )


def _trust_region(run: "RunConfig") -> Refusals:
    """What a step of TRPO cannot go with."""
    update, policy, region = run.update, run.policy, "update.trust_region"
    if update.trust_region is None:
        return
    pulls = ("weight_decay", "max_grad_value", "l2_to_initial", "l1_to_initial", "stop_kl")
    set_here = [f"update.{name}" for name in pulls if getattr(update, name)]
    set_here += ["update.balance"] if update.balance != "none" else []
    yield (run.offline is not None, f"{region} bounds how far samples of a policy move it: it needs method rl.")
    yield (
        update.epochs * update.minibatches > 1,
        f"{region} makes one step of all samples, and its bound is on the way from the policy that drew them: "
        "update.epochs and update.minibatches must be 1.",
    )
    yield (
        policy.precision != "float32",
        f"{region} compares passes of weights that differ by a thousandth, which bfloat16 rounds away: set "
        "policy.precision=float32.",
    )
    yield (
        run.rollout.replay is not None,
        f"{region} bounds the way from the policy that drew the samples, and rollout.replay brings samples of "
        "others: leave one of them out.",
    )
    yield (policy.dropout, f"{region} compares passes, and dropout makes each another: set policy.dropout=false.")
    yield (
        policy.value_head is not None and not policy.value_head.detach_trunk,
        f"{region} moves the trunk by the loss of the policy alone: set policy.value_head.detach_trunk=true.",
    )
    yield (
        run.kl.place == "loss" and run.kl.estimator == "exact",
        f"{region} looks at the whole vocabulary for its own KL: take another kl.estimator (ratio_k3).",
    )
    yield (bool(set_here), f"{region} takes the place of AdamW: leave out {', '.join(set_here)}.")


def _given_answers(run: "RunConfig") -> Refusals:
    offline, method, stop = run.offline is not None, f"method.type {run.method.type}", run.stop
    tasks = list(run.task.tasks.values()) if isinstance(run.task, MixtureTask) else [run.task]
    pairs_of = [(t.rejected, t.desirable) if isinstance(t, FileTask) else (None, None) for t in tasks]
    kinds = {(rejected is None, desirable is None) for rejected, desirable in pairs_of}
    yield (
        offline and (run.update.minibatches > 1 or run.update.epochs > 1),
        f"{method} makes one update of each batch: update.minibatches and update.epochs must be 1; method.batch "
        "and stop.steps say how much is seen in an update, and how often.",
    )
    yield (
        offline and run.policy.value_head is not None,
        f"policy.value_head is set, but {method} trains no critic: drop it.",
    )
    yield (
        offline and (stop.kl is not None or run.kl.target is not None),
        f"{method} samples nothing, so there is no KL to look at: leave out stop.kl and kl.target.",
    )
    yield (
        isinstance(run.method, Pairs) and any(rejected is None for rejected, _ in pairs_of),
        f"{method} compares two answers: name the column of the worse one in task.rejected"
        f"{', of each task' * (len(tasks) > 1)}.",
    )
    yield (
        run.method.type == "kto" and kinds not in ({(True, False)}, {(False, True)}),
        f"{method} needs to know which answers are good: name a column of true and false in task.desirable, or one "
        f"of worse answers in task.rejected (and not both){', alike for all tasks' * (len(tasks) > 1)}.",
    )


def _tasks(run: "RunConfig") -> Refusals:
    several, names = isinstance(run.task, MixtureTask), list(getattr(run.task, "tasks", {}))
    yield (
        isinstance(run.task, MixtureTask) and any(task.balance for task in run.task.tasks.values()),
        "task.balance takes as many items of each class, and a mixture takes them by the shares of its tasks: leave it "
        "out, or make a task of each class (a file each, and equal weights).",
    )
    for task in run.task.tasks.values() if isinstance(run.task, MixtureTask) else [run.task]:
        of_families = [key for key in OF_FAMILIES if getattr(task, key, None) and not getattr(task, "family", None)]
        yield (
            bool(of_families),
            f"task.{''.join(of_families[:1])} says how a family asks: name one in task.family, or leave it out.",
        )
        yield (
            isinstance(task, FileTask) and task.fold is not None and task.augment is not None,
            "task.fold divides the items anew, and copies of one that is held out would be learnt from: leave out "
            "task.augment, or cross-validate without it.",
        )
    for reward in (*run.rewards, *run.guards.beside, *run.evaluation.beside):
        called = reward.name or reward.fn
        yield (
            not several and (reward.tasks is not None or reward.normalise == "task"),
            f"reward {called!r} tells tasks apart (tasks, normalise: task), and there is one only: leave that out, "
            "or name several in task.tasks (task.type mixture).",
        )
        stranger = next((name for name in reward.tasks or () if name not in names), "")
        yield several and bool(stranger), f"reward {called!r}: no task {stranger!r}; {closest(stranger, names)}"
    yield (
        run.update.balance != "none" and (len(names) < 2 or run.offline is not None),
        f"update.balance {run.update.balance} weighs the gradients of several tasks against each other, and "
        + ("there is one only: name several in task.tasks (task.type mixture), or leave it out."
           if len(names) < 2 else f"method.type {run.method.type} does not keep them apart: leave it out."),
    )  # fmt: skip
    unpaid = [name for name in names if all(r.tasks is not None and name not in r.tasks for r in run.rewards)]
    yield (
        run.offline is None and bool(unpaid),
        f"task.tasks.{''.join(unpaid[:1])}: no reward is about this task: name it in the `tasks` of one.",
    )
    yield (
        run.offline is not None and getattr(run.task, "progress", None) is not None,
        f"task.progress goes by the rewards of samples, and method.type {run.method.type} has none: leave it out.",
    )


def _ends(run: "RunConfig") -> Refusals:
    stop, offline = run.stop, run.offline is not None
    needs_evaluation = stop.metric is not None or stop.patience is not None
    yield (
        all(value is None for value in stop.model_dump().values()),
        "stop: nothing would end this run; set at least one of " + ", ".join(StopConfig.model_fields) + ".",
    )
    yield (
        run.update.schedule in ("linear", "cosine") and stop.steps is None,
        f"update.schedule {run.update.schedule} falls towards the last step: set stop.steps.",
    )
    yield (
        run.update.schedule == "plateau" and (run.evaluation.items == 0 or run.evaluation.every is None),
        "update.schedule plateau goes by evaluations while training: set evaluation.items and evaluation.every.",
    )
    yield (
        run.update.schedule == "kl" and (offline or run.update.epochs * run.update.minibatches < 2),
        "update.schedule kl measures how far an update has moved the policy before its last optimiser step: "
        "it needs method rl, and update.epochs or update.minibatches above 1.",
    )
    yield (
        (run.update.schedule == "kl") != (run.update.target_kl is not None),
        "update.target_kl is what update.schedule kl goes by: set both, or neither.",
    )
    yield (
        run.kl.refresh_every is not None and run.policy.lora is not None,
        "kl.refresh_every moves the reference, and with policy.lora that is the model without its adapters: leave "
        "it out, or train all weights.",
    )
    yield (
        needs_evaluation and (run.evaluation.items == 0 or run.evaluation.every is None),
        "stop.metric and stop.patience need evaluations while training: set evaluation.items and evaluation.every.",
    )
    yield (
        stop.kl is not None and run.kl.place == "none" and not run.kl.measure,
        "stop.kl needs the KL to be measured: set kl.measure=true.",
    )
    yield (
        run.kl.target is not None and run.kl.place == "none",
        "kl.target adapts a penalty, but kl.place is none: set kl.place to reward or loss.",
    )
