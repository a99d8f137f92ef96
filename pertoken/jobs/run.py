"""Whole jobs, as the command line and notebooks call them: train, evaluate, generate."""

import contextlib
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pertoken import assembly, doctor
from pertoken.batching import to_batch
from pertoken.config import DocstringsTask, FunctionTask, MixtureTask, RewardConfig, RunConfig, TaskConfig
from pertoken.errors import ConfigError, MissingExtraError, PertokenError, RewardError, RunFolderError
from pertoken.machine.portions import nothing_to_cut
from pertoken.observe import StepReport, token_pieces
from pertoken.policy.model import Policy
from pertoken.prompts import prompt_ids
from pertoken.rewards import Isolated, Scene, score
from pertoken.rewards.align import align
from pertoken.rollout.by_generate import TransformersEngine
from pertoken.rollout.collect import collect, sample_seed
from pertoken.rollout.engine import NativeEngine
from pertoken.sampling import Controls
from pertoken.tracking.certificate import read_certificate, write_certificate
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.comparison import Comparison, compare
from pertoken.tracking.files import sync_folder, sync_whole
from pertoken.tracking.lock import RunLock
from pertoken.tracking.reader import RunReader
from pertoken.tracking.report import write_report
from pertoken.tracking.runlog import RunLog, Status, read_run
from pertoken.tracking.runs import standing
from pertoken.tracking.trackers import refuse_missing, trackers_of
from pertoken.training import offline
from pertoken.training.assignment import assign
from pertoken.training.resampling import beside
from pertoken.training.state import Run
from pertoken.training.trainer import checkpoint, loop, written
from pertoken.types import Item


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and where its folder is."""

    folder: Path
    reason: str
    interrupted: bool
    """It is not finished and can be resumed."""
    out_of_time: bool
    """It was interrupted because `max_seconds` were over."""
    comparison: Comparison | None
    """Held-out quality before and after; None without evaluation or if the run was interrupted."""
    report: Path | None

    def _repr_html_(self) -> str:
        return RunReader(self.folder)._repr_html_()


def train(
    config: RunConfig,
    *,
    resume: Path | None = None,
    on_step: Callable[[StepReport, float], None] = lambda report, seconds: None,
    on_note: Callable[[str], None] = lambda note: None,
    interrupted: Callable[[], bool] = lambda: False,
    max_seconds: float = math.inf,
) -> RunResult:
    """Train as `config` says, in its run folder; or go on with the run in `resume` from its last checkpoint.

    `on_step` hears of each step, with the seconds of training so far; `on_note` of what a person should know.
    Whatever happens, what was written stays: a named error or an interrupt leaves a run folder in order. `max_seconds`
    is for a machine that is yours for a while: the run saves and ends in time, to be resumed.
    """
    folder = resume or config.run_folder
    budget = TimeBudget(max_seconds)
    with contextlib.ExitStack() as stack:
        saved, lock = None, None
        notes: list[str] = []
        refuse_missing(config.log.trackers)
        if resume is None:
            _refuse_occupied(folder)
        else:
            read_run(folder)  # a folder that is no run gets no lock
            lock = RunLock(folder)
            stack.callback(lock.release)
            saved, notes = CheckpointStore(folder / "checkpoints").newest()
        with nothing_to_cut():
            run = assembly.build_run(config, checkpoint=saved.path if saved else None)
        stack.callback(_end_processes, run)
        if lock is None:
            log = RunLog.create(
                folder,
                config_text=config.to_yaml(),
                seed=config.seed,
                about=_about(config),
                command=["pertoken", *sys.argv[1:]],
            )
        else:
            step = run.progress.step if saved else -1
            log = RunLog.open(folder, step=step, config_text=config.to_yaml(), lock=lock)
            run.notes += [*notes, *log.notes, f"resumed after step {run.progress.step}"]
        stack.enter_context(log)
        log.trackers = trackers_of(
            config.log.trackers, folder, log.run, project=config.log.project, step=run.progress.step,
            on_problem=run.notes.append,
        )  # fmt: skip
        log.trackers.start(config.to_yaml())
        for reward in _isolated(run):
            reward.log_to(folder / "rewards.log")
        return _train(run, log, on_step, _Notes(run, on_note), interrupted, budget)


def _isolated(run: Run) -> list[Isolated]:
    """The rewards that have processes of their own."""
    return [part.reward for part in (*run.rewards, *run.beside) if isinstance(part.reward, Isolated)]


def _end_processes(run: Run) -> None:
    for reward in _isolated(run):
        reward.close()


def stages_left(stages: Sequence[RunConfig]) -> list[tuple[RunConfig, Path | None]]:
    """The stages of a chain that have not finished, in their order, each with the folder to go on in if it has begun.

    Raises ConfigError if a stage has finished with another configuration than it has now.
    """
    left = list[tuple[RunConfig, Path | None]]()
    for config in stages:
        folder = config.run_folder
        come = standing(folder)
        if come != "finished":
            left.append((config, folder if come else None))
        elif (folder / "config.yaml").read_text(encoding="utf-8") != config.to_yaml():
            raise ConfigError(
                f"{folder}: stage {config.name!r} has finished with another configuration than it has now (see "
                "config.yaml there). Give the chain another name, seed or folder, or remove it and those behind."
            )
        elif left:
            raise ConfigError(
                f"{folder}: stage {config.name!r} has finished, but stage {left[0][0].name!r} before it has not: it "
                "began with another model. Remove its folder."
            )
    return left


def _train(
    run: Run,
    log: RunLog,
    on_step: Callable[[StepReport, float], None],
    notes: "_Notes",
    interrupted: Callable[[], bool],
    budget: "TimeBudget",
) -> RunResult:
    certified = run.config.offline is not None  # what is certified is a step of samples and rewards

    def after_step(report: StepReport) -> None:
        nonlocal certified
        if not certified:
            certified = True
            _certify(run, log.folder, report)
        notes.tell()
        on_step(report, run.progress.seconds)

    def should_end() -> bool:
        return interrupted() or budget.is_spent()

    notes.tell()
    try:
        # What ends before the first evaluation has nothing to save: resumed, it begins at the beginning.
        reason = "interrupted"
        if not should_end():
            train_by = loop if run.config.offline is None else offline.loop
            with nothing_to_cut():
                reason = train_by(run, log, on_step=after_step, interrupted=should_end)
            if run.stop_reason() is None:
                checkpoint(run, log)
            written(run)
        stopped_early = run.stop_reason() is None
        out_of_time = stopped_early and not interrupted()
        if out_of_time:
            reason = f"time is up ({budget.seconds:g} s)"
        if not stopped_early:
            _save_model(run.policy, log.folder / "model")
            if run.average is not None:
                with run.average.applied(run.policy.trainable()):
                    _save_model(run.policy, log.folder / "model-ema")
        log.finish("interrupted" if stopped_early else "finished", reason)
    except RewardError as error:
        _mark(log, "failed", str(error))
        if run.before_step is None or not run.progress.step:
            raise
        checkpoint(run, log)
        raise RewardError(f"{error} (step {run.progress.step} is saved: `--resume` goes on behind it)") from error
    except PertokenError as error:
        _mark(log, "failed", str(error))
        raise
    except KeyboardInterrupt:
        _mark(log, "interrupted", "stopped at once, in the middle of a step")
        raise
    finally:
        with contextlib.suppress(PertokenError):  # what has ended the run is what is told
            written(run)
    comparison = None if stopped_early else compare(RunReader(log.folder).evaluations())
    return RunResult(
        log.folder, reason, stopped_early, out_of_time, comparison, _write_report(log.folder, notes.on_note)
    )


def evaluate(config: RunConfig, *, model: str | None = None, against: str | None = None) -> list[dict[str, Any]]:
    """Held-out quality of `model` (default: `policy.model`) on the task of `config`, and of `against` if given.

    Returns one row per model, as `evaluations.jsonl` has them; two can be given to `tracking.comparison.compare`.
    A run folder stands for the model trained in it. The perplexity is under `policy.model` as configured.
    """
    names = [model or config.policy.model, *([against] if against else [])]
    judge = assembly.build_policy(config).reference()
    task = assembly.build_task(config.task, augment=False)
    rows: list[dict[str, Any]] = []
    for name in names:
        policy = load_policy(config, name)
        evaluator, _ = assembly.build_evaluator(config, task, policy)
        if evaluator is None:
            raise ConfigError("evaluation.items is 0: there is nothing to evaluate")
        result = evaluator(assembly.build_engine(policy, config.rollout), policy, judge)
        rows.append(result.logged(len(rows), config.evaluation.split))
    return rows


def _certify(run: Run, folder: Path, report: StepReport) -> None:
    """Keep the quick part of the certificate with the run, beside the rest if that is of the same configuration."""
    found, kept = doctor.quick_certificate(run, report), None
    with contextlib.suppress(RunFolderError):  # a damaged one is replaced
        kept = read_certificate(folder)
    try:
        write_certificate(kept.renewed(found) if kept is not None and kept.of_same(found) else found, folder)
    except RunFolderError as error:  # a run does not fail for want of it
        run.notes.append(f"no certificate: {error}")
    run.notes += [f"certificate: {line.name}: {line.words}. {line.remedy}" for line in found.failed]


class Speaker:
    """A model to talk to: text in, pieces of text with figures out."""

    def __init__(
        self,
        config: RunConfig,
        *,
        model: str | None = None,
        chat: bool = True,
        greedy: bool = False,
        loaded: tuple[Policy, NativeEngine | TransformersEngine] | None = None,
    ) -> None:
        """`greedy`: say what is most probable, token by token, whatever `rollout.sampling.temperature` is.

        `loaded`: a policy and its engine that are there already, in place of `model`.
        """
        self.config, self.chat = config, chat
        self.policy = load_policy(config, model or config.policy.model) if loaded is None else loaded[0]
        self.engine = assembly.build_engine(self.policy, config.rollout) if loaded is None else loaded[1]
        assembly.refuse_segments(config, self.policy)
        sampling = config.rollout.sampling.model_copy(update={"temperature": 0.0} if greedy else {})
        self.controls = Controls.resolve(sampling, self.policy.tokenizer, self.policy.eos_ids)

    def item(self, text: str, answer: str | None = None) -> Item:
        """A prompt as the model takes it."""
        return Item("prompt", ({"role": "user", "content": text},) if self.chats else text, answer)

    @property
    def chats(self) -> bool:
        """Whether prompts are chat messages: they are meant to be, and the model has a template for them."""
        return self.chat and bool(self.policy.tokenizer.chat_template)

    def stream(self, text: str, *, seed: int = 0, on_piece: Callable[[str, float, float], None]) -> str:
        """Sample an answer; `on_piece(text, log-prob, entropy)` hears of each token as it is drawn."""
        ids: list[int] = []
        shown = 0

        def token(index: int, token_id: int, logprob: float, entropy: float) -> None:
            nonlocal shown
            ids.append(token_id)
            done = align(ids, self.policy.tokenizer)
            end = done.completed()[-1] if not done.text.endswith("\ufffd") else shown
            on_piece(done.text[shown:end], logprob, entropy)
            shown = max(shown, end)

        prompt = prompt_ids(self.item(text), self.policy.tokenizer)
        self.engine.generate([prompt], self.controls, seeds=[sample_seed(seed, 0, text, 0)], on_token=token)
        return align(ids, self.policy.tokenizer).text

    def group(self, text: str, answer: str | None, *, seed: int = 0) -> Iterator[tuple[list[str], list[float], float]]:
        """A group of samples, best first: pieces, advantages and total reward, by the configured rewards and credit;
        the policy stands for its reference model too, which is not loaded here."""
        config, policy = self.config, self.policy
        item = self.item(text, answer)
        episodes = collect(
            self.engine, [item], policy.tokenizer, self.controls,
            samples_per_prompt=config.rollout.samples_per_prompt, run_seed=seed,
        )  # fmt: skip
        batch = to_batch(episodes, self.controls, device=str(policy.device))
        old = policy.score(batch)
        parts, scene = assembly.build_rewards(config.rewards), Scene(batch, episodes, policy.tokenizer, old, None)
        rewards = score(parts, scene)
        drawn = beside(scene, config, self.engine, policy, self.controls, parts, rewards)
        credit = assign(config.credit, drawn.rewards or rewards, batch, old, drawn.greedy, drawn.states, ref=old)
        totals = rewards.total.sum(1)
        for row in totals.argsort(descending=True).tolist():
            start = episodes[row].prompt_length
            pieces = token_pieces(episodes[row].tokens, policy.tokenizer)[start:]
            advantages = credit.advantages[row, start : start + len(pieces)].tolist()
            yield pieces, advantages, totals[row].item()


class TimeBudget:
    """Tells a loop that asks before each step when to stop, so that it ends within `seconds` from now.

    A step is not begun if, taking as long as the longest one so far, it would not end in time.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self._clock = seconds, clock
        self._end = clock() + seconds
        self._last: float | None = None
        self._longest = 0.0

    def is_spent(self) -> bool:
        now = self._clock()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now + self._longest >= self._end


class _Notes:
    """Tells each note of a run once."""

    def __init__(self, run: Run, on_note: Callable[[str], None]) -> None:
        self._run, self.on_note, self._told = run, on_note, 0

    def tell(self) -> None:
        for note in self._run.notes[self._told :]:
            self.on_note(note)
        self._told = len(self._run.notes)


def load_policy(config: RunConfig, name: str) -> Policy:
    """The policy of `config` with another model: a name, a file, or a run folder."""
    folder = Path(name)
    if (folder / "run.json").is_file():
        if not (folder / "model").is_dir():
            raise RunFolderError(f"{folder} holds no trained model yet: its run has not finished (resume it)")
        name = str(folder / "model")
    settings = config.policy.model_copy(update={"model": name, "lora": None, "value_head": None})
    return assembly.build_policy(config.model_copy(update={"policy": settings}))


def _about(config: RunConfig) -> dict[str, str | int | float]:
    """The run in a few words, for the head of its report."""
    trained = f"LoRA rank {config.policy.lora.rank}" if config.policy.lora else "all weights"
    about: dict[str, str | int | float] = {
        "model": f"{config.policy.model} ({trained})",
        "task": _task_in_words(config.task),
    }
    if config.offline is not None:
        about["algorithm"] = config.offline.type
    else:
        about["rewards"] = " + ".join(f"{_weight(r)} x {r.name or r.fn}" for r in config.rewards)
        about["algorithm"] = f"{config.credit.type}, {config.objective.surrogate}"
    return about | ({"steps": config.stop.steps} if config.stop.steps is not None else {})


def _task_in_words(task: TaskConfig) -> str:
    if isinstance(task, MixtureTask):
        return " + ".join(f"{member.weight:g} x {name}" for name, member in task.tasks.items())
    if isinstance(task, DocstringsTask):
        return task.type
    if isinstance(task, FunctionTask):
        return task.fn
    return task.path if isinstance(task.path, str) else task.path.get("train", ", ".join(task.path.values()))


def _weight(reward: RewardConfig) -> str:
    """A number, or the numbers that it goes through."""
    if isinstance(reward.weight, float):
        return f"{reward.weight:g}"
    return f"({' to '.join(f'{weight:g}' for _, weight in reward.weight)})"


def _refuse_occupied(folder: Path) -> None:
    """Find out before the model is loaded, not after, that the folder cannot be used."""
    if (folder / "run.json").is_file():
        raise RunFolderError(
            f"{folder} already holds a run. Go on with it: pertoken train --resume {folder}; or start another: "
            "set folder=... (or name, or seed)."
        )


def _save_model(policy: Policy, folder: Path) -> None:
    """Write the trained model so that a kill or a power cut leaves the folder of before, the new one, or none: never a
    part."""
    draft, old = folder.with_name(f".partial-{folder.name}"), folder.with_name(f".removed-{folder.name}")
    try:
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        policy.save(draft)
        sync_whole(draft)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise RunFolderError(
            f"cannot write the trained model to {folder}: {error}. Logs and checkpoints are as they were; free some "
            "space and resume the run."
        ) from error


def _mark(log: RunLog, status: Status, reason: str) -> None:
    with contextlib.suppress(RunFolderError):  # on a full disk the reason for the failure counts, not this mark
        log.finish(status, reason)


def _write_report(folder: Path, on_note: Callable[[str], None]) -> Path | None:
    """The report; a run does not fail for want of it."""
    try:
        return write_report(folder)
    except (MissingExtraError, RunFolderError) as error:
        on_note(f"no report.html: {error}")
        return None
