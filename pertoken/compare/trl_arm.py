"""An arm by GRPO of TRL, in a process of its own: its training, our items, rewards and held-out evaluation.

    python -m pertoken.compare.trl_arm JOB.json

What is sampled is paid what the rewards of the run pay for all of it, token by token summed up. Held out, the
checkpoints that TRL saves answer the same items in the same way as every other arm, so that one metric compares them.
The run folder is an ordinary one; a process that was ended goes on from TRL's newest checkpoint.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from pertoken.assembly import build_engine, build_evaluator, build_rewards, build_task, fitting
from pertoken.batching import to_batch
from pertoken.config import RunConfig, validate
from pertoken.errors import ConfigError, PertokenError
from pertoken.hub import NO_CODE, SAFE
from pertoken.jobs.run import load_policy
from pertoken.policy.model import Policy, Reference
from pertoken.prompts import prompt_ids
from pertoken.rewards import Isolated, Scene, Weighted, score
from pertoken.rollout.collect import to_episode
from pertoken.sampling import Controls
from pertoken.tasks.base import ItemTask
from pertoken.tracking.reader import RunReader
from pertoken.tracking.runlog import RunLog
from pertoken.types import Completion, Item, StopReason

TRAINING_STATE = {"optimizer.pt", "scheduler.pt", "scaler.pt", "trainer_state.json", "training_args.bin"}
"""What of a checkpoint is no part of the model."""
SCHEDULES = {"linear": "linear", "cosine": "cosine"}
"""Names of learning-rate schedules there; all others are constant after the warm-up."""


def arguments(config: RunConfig, given: dict[str, Any], *, bfloat16: bool, cpu: bool) -> dict[str, Any]:
    """Arguments of GRPOConfig: those that follow from the recipe, under those that are `given`.

    A step there samples and learns as many completions as one here. What has no counterpart is TRL's default.
    """
    rollout, update, sampling = config.rollout, config.update, config.rollout.sampling
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    each = int(given.get("per_device_train_batch_size", rollout.samples_per_prompt))
    if rows % each:
        raise ConfigError(f"trl.per_device_train_batch_size {each} does not divide the {rows} completions of a step")
    return {
        "per_device_train_batch_size": each,
        "gradient_accumulation_steps": rows // each,
        "num_generations": rollout.samples_per_prompt,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p or None,
        "repetition_penalty": sampling.repetition_penalty,
        "learning_rate": update.learning_rate,
        "lr_scheduler_type": SCHEDULES.get(update.schedule, "constant_with_warmup"),
        "warmup_steps": update.warmup_steps,
        "weight_decay": update.weight_decay,
        "adam_beta1": update.betas[0],
        "adam_beta2": update.betas[1],
        "max_grad_norm": update.max_grad_norm or 0.0,
        "num_iterations": update.epochs,
        "epsilon": config.objective.clip_low,
        "epsilon_high": config.objective.clip_high,
        "beta": 0.0 if config.kl.place == "none" else config.kl.coefficient,
        "max_steps": config.stop.steps if config.stop.steps is not None else 1_000_000,
        "seed": config.seed % 2**32,
        "bf16": bfloat16,
        "use_cpu": cpu,
        "gradient_checkpointing": update.recompute_activations,
        "save_strategy": "no",  # the recorder says when
        "save_total_limit": 1,
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
    } | given


@dataclass
class Recorder:
    """What is written down of TRL's training, and when it saves, is measured, and ends."""

    config: RunConfig
    log: RunLog
    task: ItemTask
    rewards: Sequence[Weighted]
    judge: Reference
    """The model that the run began with, under which answers are judged as natural or not unless the recipe names
    another one."""
    asked: bool = False
    """To end, as soon as the step is saved."""
    reason: str = ""
    """Why training has ended for good."""
    tokens: int = 0
    seconds: float = 0.0
    drawn: list[tuple[int, float]] = field(default_factory=list)
    """Of the completions of the step: tokens, reward."""
    _begun: float = 0.0

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def end(self, step: int) -> None:
        """Write down the step."""
        took = time.perf_counter() - self._begun
        tokens = sum(count for count, _ in self.drawn)
        figures: dict[str, float] = {"tokens/generated": float(tokens), "time/step": took}
        if self.drawn:
            figures |= {
                "reward/total": fmean(reward for _, reward in self.drawn),
                "completion/length": tokens / len(self.drawn),
                "tokens/per_second": tokens / took,
            }
        self.drawn.clear()
        self.log.step(step, figures)
        self.tokens += tokens
        self.seconds += took
        self.reason = self.stop_reason(step)

    def stop_reason(self, step: int) -> str:
        """Why training ends for good after `step`; empty while it goes on."""
        stop = self.config.stop
        conditions = (
            (stop.steps, step, f"made all {stop.steps} steps"),
            (stop.tokens, self.tokens, f"generated {self.tokens} tokens (stop.tokens {stop.tokens})"),
            (stop.seconds, self.seconds, f"trained for {self.seconds:.0f} s (stop.seconds {stop.seconds})"),
        )
        return next((words for limit, reached, words in conditions if limit is not None and reached >= limit), "")

    def due(self, step: int) -> bool:
        """Whether the step is saved."""
        every = [n for n in (self.config.evaluation.every, self.config.checkpoint.every) if n]
        return bool(self.asked or self.reason) or any(step % n == 0 for n in every)

    def evaluate(self, step: int, policy: Policy) -> None:
        """Measure a model, if it is its turn and has not been."""
        evaluation = self.config.evaluation
        of_turn = not step or self.reason or (evaluation.every and step % evaluation.every == 0)
        if not of_turn or self.log.has_evaluation(step, evaluation.split):
            return
        evaluator, _ = build_evaluator(self.config, self.task, policy)
        if evaluator is not None:
            found = evaluator(build_engine(policy, self.config.rollout), policy, self.judge, self.rewards)
            self.log.evaluation(step, evaluation.split, found.summary, found.rows)


def paid(
    ids: Sequence[Sequence[int]],
    items: Sequence[Item],
    rewards: Sequence[Weighted],
    policy: Policy,
    *,
    step: int,
    group: int,
) -> list[float]:
    """What the rewards pay for each completion in all; those of one prompt stand side by side, `group` of them."""
    tokenizer = policy.tokenizer
    episodes = []
    for k, (said, item) in enumerate(zip(ids, items, strict=True)):
        stop: StopReason = "eos" if said and said[-1] in policy.eos_ids else "length"
        completion = Completion(list(said), [0.0] * len(said), stop)
        episodes.append(
            to_episode(f"{step}/{k}", item, k // group, prompt_ids(item, tokenizer), completion, version=step)
        )
    scene = Scene(to_batch(episodes, Controls(eos_ids=policy.eos_ids)), episodes, tokenizer, step=step)
    return [float(total) for total in score(rewards, scene).total.sum(1)]


def train(config: RunConfig, given: dict[str, Any]) -> None:
    """Train the run of `config` by TRL from its start, or from the newest checkpoint in its folder."""
    import datasets
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    place, parent = config.run_folder / "trl", os.getppid()
    policy = load_policy(config, config.policy.model)
    if policy.hf_model.config.is_encoder_decoder:
        raise ConfigError("GRPO of TRL trains no encoder-decoder models: leave the arm out")
    settings = arguments(
        config, given, bfloat16=policy.autocast_dtype is torch.bfloat16, cpu=policy.device.type == "cpu"
    )
    asked_for = GRPOConfig(output_dir=str(place), **settings)  # before there is a run folder
    task, rewards = build_task(config.task), build_rewards(config.rewards)
    items, _ = fitting(task, "train", policy, config.rollout)
    saved = _newest(place)
    log, recorder = _recorder(config, task, rewards, policy.reference(), saved)
    with log:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: setattr(recorder, "asked", True))
        if saved is None:
            recorder.evaluate(0, policy)
        else:
            recorder.evaluate(_step_of(saved), load_policy(config, str(_whole(saved))))
        start = _start(policy, place)

        def reward(
            completion_ids: list[list[int]], place_in_items: list[int], trainer_state: Any, **_: Any
        ) -> list[float]:
            of, step = [items[k] for k in place_in_items], int(trainer_state.global_step) + 1
            totals = paid(completion_ids, of, rewards, policy, step=step, group=config.rollout.samples_per_prompt)
            recorder.drawn += [(len(said), total) for said, total in zip(completion_ids, totals, strict=True)]
            return totals

        class Recording(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                recorder.begin()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
                recorder.end(state.global_step)
                recorder.asked |= os.getppid() != parent  # nobody is there any more who waits for this
                control.should_save = recorder.due(state.global_step)
                control.should_training_stop = bool(recorder.asked or recorder.reason)
                return control

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                at = _whole(place / f"checkpoint-{state.global_step}")
                recorder.evaluate(state.global_step, load_policy(config, str(at)))

        chats = bool(policy.tokenizer.chat_template)
        rows = [{"prompt": _prompt(item, chats), "place_in_items": k} for k, item in enumerate(items)]
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32, **SAFE),
            reward_funcs=reward,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=policy.tokenizer,
            peft_config=_lora(config),
            callbacks=[Recording()],
            args=asked_for,
        )
        if not recorder.reason and not recorder.asked:
            trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
        _finish(recorder, place)
    for part in rewards:
        if isinstance(part.reward, Isolated):
            part.reward.close()


def _recorder(
    config: RunConfig, task: ItemTask, rewards: Sequence[Weighted], judge: Reference, saved: Path | None
) -> tuple[RunLog, Recorder]:
    """The run folder, new or cut back to the checkpoint that training goes on from, and what writes to it."""
    folder = config.run_folder
    if (folder / "run.json").is_file():
        log = RunLog.open(folder, step=-1 if saved is None else _step_of(saved), config_text=config.to_yaml())
    else:
        about = {"model": config.policy.model, "algorithm": f"GRPO of TRL {version('trl')}"}
        log = RunLog.create(folder, config_text=config.to_yaml(), seed=config.seed, about=about)
    recorder = Recorder(config, log, task, rewards, judge)
    made = RunReader(folder).metrics()
    recorder.tokens = int(sum(count or 0 for count in made.get("tokens/generated", [])))
    recorder.seconds = math.fsum(took or 0.0 for took in made.get("time/step", []))
    recorder.reason = "" if saved is None else recorder.stop_reason(_step_of(saved))
    return log, recorder


def _start(policy: Policy, place: Path) -> Path:
    """The model that training begins with, as a folder that transformers reads."""
    start, draft = place / "start", place / "start.part"
    if not start.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        policy.save(draft)
        draft.rename(start)
    return start


def _newest(place: Path) -> Path | None:
    """TRL's newest checkpoint that is complete: its state is what is written last."""
    found = [path for path in place.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _whole(checkpoint: Path) -> Path:
    """A checkpoint that can be loaded by itself: of adapters, with the model that they were added to."""
    if (checkpoint / "config.json").is_file():
        return checkpoint
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    merged = checkpoint / "merged"
    model = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **SAFE)
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(checkpoint, **NO_CODE).save_pretrained(merged)
    return merged


def _finish(recorder: Recorder, place: Path) -> None:
    """Keep the model of a run that has come to its end; mark one that has not."""
    newest = _newest(place)
    if not recorder.reason or newest is None:
        recorder.log.finish("interrupted", "interrupted")
        return
    model = recorder.log.folder / "model"
    shutil.rmtree(model, ignore_errors=True)
    draft = place / "model"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for path in _whole(newest).iterdir():
        if path.is_file() and path.name not in TRAINING_STATE and not path.name.startswith("rng_state"):
            shutil.copy2(path, draft / path.name)
    draft.rename(model)
    recorder.log.finish("finished", recorder.reason)
    shutil.rmtree(place, ignore_errors=True)


def _lora(config: RunConfig) -> Any:
    lora = config.policy.lora
    if lora is None:
        return None
    from peft import LoraConfig

    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=modules, task_type="CAUSAL_LM"
    )


def _prompt(item: Item, chats: bool) -> str | list[dict[str, str]]:
    """As TRL takes it; the model is prompted as `prompt_ids` has it."""
    if isinstance(item.prompt, str):
        return item.prompt
    return [dict(message) for message in item.prompt] if chats else item.prompt[0]["content"]


def main() -> None:
    """The process: a named error is its last line."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        train(validate(job["run"], RunConfig), job["trl"])
    except PertokenError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
