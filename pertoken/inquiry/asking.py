"""A run folder that questions are put to: its samples, its models as they were and are, its rewards.

>>> from pertoken.inquiry.asking import Answers
>>> run = Answers("runs/quickstart-0")                              # doctest: +SKIP
>>> run.alternatives("50.3")[4].others                              # doctest: +SKIP
>>> run.what_if("50.3", 4, text=" value", samples=16).effect        # doctest: +SKIP

A sample has the name that the report gives it: `STEP.SAMPLE`, both as the files count them, or `SPLIT.STEP.SAMPLE` of
an evaluation. A token is counted from 0, the first that the model chose. Models are loaded when they are first asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pertoken.assembly import build_controls, build_engine, build_policy, build_task
from pertoken.config import RunConfig, load_config
from pertoken.errors import ConfigError, PertokenError, RunFolderError, closest
from pertoken.inquiry import questions
from pertoken.inquiry.attribution import OPEN_SHARE, Attribution, policy_attribution, reward_attributions
from pertoken.inquiry.kept import episode_of, steady_rewards
from pertoken.inquiry.questions import Place
from pertoken.jobs.run import Speaker
from pertoken.observe import token_pieces
from pertoken.policy.checkpoint import load_weights
from pertoken.policy.model import Policy
from pertoken.rewards import Weighted
from pertoken.sampling import Controls, Sampling
from pertoken.text_metrics import Interval
from pertoken.tracking.checkpoints import CheckpointStore
from pertoken.tracking.comparison import compare
from pertoken.tracking.reader import RunReader
from pertoken.tracking.samples import held_out_rows
from pertoken.types import Episode, Item

BEFORE, TRAINED = "before", "trained"
"""The model that training began with, and the one that it ended with; between them `step-N`."""

MODELS_AT_ONCE = 2
"""So many are kept in memory: two are compared."""


@dataclass(frozen=True)
class Asked:
    """A sample of the run."""

    episode: Episode
    step: int
    """Whose rewards it was paid."""
    earned: Mapping[str, float]
    """What each part of the reward paid it in the run."""
    columns: Sequence[int]
    """Of the tokens that the model chose."""

    def column(self, token: int) -> int:
        """The column of a token. ConfigError if there is none."""
        if not 0 <= token < len(self.columns):
            raise ConfigError(f"token {token + 1}: this sample has {len(self.columns)}, counted from 1")
        return self.columns[token]


@dataclass(frozen=True)
class Text:
    """A text that was sampled on, or changed, for a question."""

    pieces: Sequence[str]
    """The text of each token that the model chose."""
    logprobs: Sequence[float]
    begun: int
    """So many tokens at its beginning were given."""
    stop: str
    paid: Mapping[str, float] | None
    """By part and in `total`; None where the rewards cannot be asked."""


@dataclass(frozen=True)
class WhatIf:
    """What would be if a token had been another one."""

    was: Text
    """The text as it is, scored by the model that was asked."""
    would_be: Text
    """The same with the other token in it."""
    onward: Sequence[Text]
    """Sampled on behind the token that is there, ..."""
    onward_instead: Sequence[Text]
    """... and behind the other one, with the same random numbers."""
    effect: Interval | None
    """How much more the latter earn on average; None without rewards or samples."""
    notes: Sequence[str]


@dataclass(frozen=True)
class Causes:
    """Which tokens a text owes its reward to."""

    parts: Mapping[str, Sequence[float]]
    """By part and in `total`: what the text loses without each of its tokens."""
    notes: Sequence[str]


@dataclass(frozen=True)
class Attributed:
    """What each token adds to a score of a learned model, by the gradient of what the model reads."""

    pieces: Sequence[str]
    """Of the tokens that were asked about."""
    prompt: int
    """So many of them, the first ones, are the prompt."""
    scores: Mapping[str, Attribution]
    """By name; their values are of `pieces`."""
    notes: Sequence[str]


class Answers:
    """The questions of `questions.py`, put to a run. Not for several threads at once: it keeps models."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.reader = Path(folder), RunReader(folder)
        self._loaded: dict[tuple[str, float], tuple[Policy, Any]] = {}

    @cached_property
    def config(self) -> RunConfig:
        return load_config([self.folder / "config.yaml"])

    @cached_property
    def rewards(self) -> list[Weighted]:
        """Those of the run; RunFolderError if they would not pay the same here (`kept.steady_rewards`)."""
        return steady_rewards(self.config)

    @cached_property
    def items(self) -> dict[str, Item]:
        """All items of the task, since rewards may need more of them than the run folder keeps; none if it is gone."""
        try:
            task = build_task(self.config.task)
        except PertokenError:  # a folder that somebody sent: prompt and answer are in it
            return {}
        return {item.id: item for split in ("train", "validation", "test") for item in task.items(split)}

    def models(self) -> list[str]:
        """What can be asked, oldest first: `before`, `step-N` for each checkpoint, `trained` when the run has ended."""
        steps = [f"step-{found.step}" for found in CheckpointStore(self.folder / "checkpoints").complete()]
        ended = self.reader.run()["status"] == "finished" and (self.folder / "model").is_dir()
        return [BEFORE, *steps, *([TRAINED] if ended else [])]

    def policy(self, model: str | None = None) -> Policy:
        """One of `models()`; the newest unless it is named."""
        return self._load(model)[0]

    def controls(self, sampling: Sampling | None = None) -> Controls:
        """How tokens are drawn: as in training, unless otherwise said."""
        rollout = self.config.rollout
        if sampling is not None:
            rollout = rollout.model_copy(update={"sampling": sampling})
        return replace(build_controls(rollout, self.policy(self._newest_loaded())), mask=None)

    def alternatives(self, sample: str, *, model: str | None = None, count: int = 8) -> list[Place]:
        """For each token of a sample, the most probable ones in its place and their log-probs."""
        policy = self.policy(model)
        return questions.alternatives(policy, self._asked(sample, policy).episode, self.controls(), count=count)

    def difference(self, sample: str, *, model: str | None = None, against: str = BEFORE) -> list[float]:
        """For each token of a sample, its log-prob under `model` minus that under `against` (nats)."""
        asked, controls = self._asked(sample, self.policy(model)), self.controls()
        (ours,), (theirs,) = (
            questions.logprobs_of(self.policy(name), [asked.episode], controls) for name in (model, against)
        )
        return [one - other for one, other in zip(ours, theirs, strict=True)]

    def what_if(
        self,
        sample: str,
        token: int,
        *,
        text: str = "",
        ids: Sequence[int] = (),
        model: str | None = None,
        samples: int = 8,
        seed: int = 0,
    ) -> WhatIf:
        """What if this token had been `ids`, or `text`: the same text with it, and `samples` texts sampled on from it.

        As many are sampled on behind the token that is there: `effect` is the difference of what the rewards pay.
        """
        policy, engine = self._load(model)
        asked, controls = self._asked(sample, policy), self.controls()
        column = asked.column(token)
        instead = list(ids) or policy.tokenizer.encode(text, add_special_tokens=False)
        changed = questions.swapped(asked.episode, column, instead, controls.eos_ids)
        texts = [asked.episode, changed]
        if samples:
            questions.refuse_encoder_decoder(policy)
            for begin in ([asked.episode.tokens[column]], instead):
                texts += questions.rolled(engine, asked.episode, column, begin, controls, samples=samples, seed=seed)
        earned, notes = self._paid(asked, texts, policy.tokenizer)
        begun = (
            [len(asked.columns), sum(changed.action_mask)] + [token + 1] * samples + [token + len(instead)] * samples
        )
        scored = questions.logprobs_of(policy, texts, controls)
        told = [
            Text(
                token_pieces(one.tokens, policy.tokenizer)[one.prompt_length :], logprobs, count, one.stop,
                None if earned is None else earned[k],
            )
            for k, (one, logprobs, count) in enumerate(zip(texts, scored, begun, strict=True))
        ]  # fmt: skip
        effect = None
        if earned is not None and samples:
            effect = questions.effect(earned[2 : 2 + samples], earned[2 + samples :])
        return WhatIf(told[0], told[1], told[2 : 2 + samples], told[2 + samples :], effect, notes)

    def causes(self, sample: str, *, most: int = 256) -> Causes:
        """Which tokens the text owes its reward to: what it loses of it without each of them.

        RunFolderError if the rewards of the run cannot be asked again.
        """
        tokenizer = self.policy(self._newest_loaded()).tokenizer
        asked = self._asked(sample, self.policy(self._newest_loaded()))
        rewards, episode = self.rewards, self._with_item(asked.episode)
        notes = _changed(asked, questions.paid(rewards, [episode], tokenizer, asked.step)[0])
        return Causes(questions.causes(rewards, episode, tokenizer, asked.step, most=most), notes)

    def attributions(
        self,
        sample: str,
        *,
        of: Literal["policy", "reward"] = "reward",
        token: int | None = None,
        model: str | None = None,
        against: str | None = None,
    ) -> Attributed:
        """Which tokens learned models see a score in: the learned parts of the reward, or the policy a log-prob.

        Of the policy: the log-prob of `token`, or of all that was chosen; with `against` what it is more under `model`.
        Raises MissingExtraError without Captum, ConfigError if no part of the reward is learned.
        """
        if of == "reward" and (token is not None or against is not None):
            raise ConfigError("a token, or another model, can be asked about of the policy; rewards score whole texts")
        policy = self.policy(self._newest_loaded() if of == "reward" else model)
        asked = self._asked(sample, policy)
        pieces, start = token_pieces(asked.episode.tokens, policy.tokenizer), asked.episode.prompt_length
        if of == "reward":
            episode = self._with_item(asked.episode)
            scores, notes = reward_attributions(self.rewards, episode, policy.tokenizer, asked.step)
            return Attributed(pieces[start:], 0, scores, [*notes, *_left_open(scores)])
        sampling = self.config.rollout.sampling
        if sampling.segment is not None:
            raise ConfigError("this text was written by segments: no pass of the model reads all of it")
        column = None if token is None else asked.column(token)
        found, *other = (
            policy_attribution(self.policy(name), asked.episode, column=column, temperature=sampling.temperature or 1.0)
            for name in (model, against)[: 1 if against is None else 2]
        )
        name = "log-prob of the text" if token is None else f"log-prob of token {token + 1}"
        scores = {name: found} if not other else {f"{name}, difference to {against}": found.minus(other[0])}
        return Attributed(pieces, start, scores, _left_open(scores))

    def speaker(self, sampling: Sampling, *, model: str | None = None, chat: bool = True) -> Speaker:
        """The model to talk to, with these sampling controls."""
        rollout = self.config.rollout.model_copy(update={"sampling": sampling})
        config = self.config.model_copy(update={"rollout": rollout})
        return Speaker(config, chat=chat, loaded=self._load(model))

    def _load(self, model: str | None) -> tuple[Policy, Any]:
        """Policy and engine; the least recently asked goes when there are too many."""
        known = self.models()
        name = known[-1] if model is None else model
        if name not in known:
            raise RunFolderError(f"{self.folder} has no model {name!r}; {closest(name, known)}")
        place = self.folder / "model" if name == TRAINED else self.folder / "config.yaml"
        key = name, place.stat().st_mtime
        if key not in self._loaded:
            while len(self._loaded) >= MODELS_AT_ONCE:
                del self._loaded[next(iter(self._loaded))]
            policy = self._built(name)
            self._loaded[key] = policy, build_engine(policy, self.config.rollout)
        self._loaded[key] = self._loaded.pop(key)
        return self._loaded[key]

    def _built(self, name: str) -> Policy:
        changes: dict[str, Any] = {"compile": False}
        if name == TRAINED:  # adapters are merged in it, and the critic has gone
            changes |= {"model": str(self.folder / "model"), "lora": None, "value_head": None}
        settings = self.config.policy.model_copy(update=changes)
        policy = build_policy(self.config.model_copy(update={"policy": settings}))
        if name.startswith("step-"):
            load_weights(self.folder / "checkpoints" / f"step-{int(name[5:]):06d}", policy)
        return policy

    def _newest_loaded(self) -> str | None:
        """A model that is in memory already, for what any of them can tell; else the newest is loaded."""
        return next((name for name, _ in reversed(self._loaded)), None)

    def _asked(self, sample: str, policy: Policy) -> Asked:
        record, step = self._record(sample, policy.eos_ids)
        if not any(record["tokens"]["action"]):
            raise RunFolderError(f"{self.folder}: sample {sample} has no token that the model chose")
        episode = episode_of(record, Item(str(record["item"]), record["prompt"] or "", record.get("answer")))
        earned = {
            name.removeprefix("reward/"): sum(number or 0.0 for number in numbers)
            for name, numbers in record["streams"].items()
            if name.startswith("reward/")
        }
        return Asked(episode, step, earned, [column for column, acts in enumerate(episode.action_mask) if acts])

    def _record(self, sample: str, eos_ids: Sequence[int]) -> tuple[dict[str, Any], int]:
        """The line of a sample as an episode has it, and its step."""
        *split, step, place = ["", "", *sample.split(".")][-3 if sample.count(".") > 1 else -2 :]
        if not (step.isdigit() and place.isdigit()):
            raise ConfigError(f"sample {sample!r}: expected STEP.SAMPLE, or SPLIT.STEP.SAMPLE of an evaluation")
        rows = self._held_out(split[0], int(step)) if split else self.reader.episodes(int(step))
        if int(place) >= len(rows):
            raise RunFolderError(f"{self.folder} has no sample {sample}: there are {len(rows)} of this step")
        row = rows[int(place)]
        if "tokens" not in row or "logprob" not in (row.get("streams") or {}):
            raise RunFolderError(f"{self.folder}: sample {sample} was logged without its tokens")
        if split:
            ended = row["tokens"]["id"][-1] in eos_ids
            row = row | {"item": row["id"], "group": 0, "stop": "eos" if ended else "length"}
            row["policy_version"] = [int(step)] * 2
        return row, int(step)

    def _held_out(self, split: str, step: int) -> list[dict[str, Any]]:
        """The items of an evaluation in the order of the report."""
        comparison = compare(self.reader.evaluations())
        if comparison is None or comparison.split != split:
            return []
        at = [comparison.before["step"], comparison.after["step"]]
        return [pair[at.index(step)] for pair in held_out_rows(self.reader, comparison)] if step in at else []

    def _with_item(self, episode: Episode) -> Episode:
        return replace(episode, item=self.items.get(episode.item.id, episode.item))

    def _paid(
        self, asked: Asked, texts: Sequence[Episode], tokenizer: Any
    ) -> tuple[list[dict[str, float]] | None, list[str]]:
        """What the rewards pay for `texts`, the first of which is the sample itself; or None, and a note why."""
        try:
            found = questions.paid(self.rewards, [self._with_item(text) for text in texts], tokenizer, asked.step)
        except PertokenError as error:
            return None, [f"not rewarded: {error}"]
        return found, _changed(asked, found[0])


def _changed(asked: Asked, now: Mapping[str, float]) -> list[str]:
    """A note for each part that pays the sample something else than in the run."""
    return [
        f"reward {name!r} pays this text {now[name]:.4g} here and paid {was:.4g} in the run: it looks at other samples "
        "too, or has changed"
        for name, was in asked.earned.items()
        if name in now and name != "total" and abs(now[name] - was) > 1e-3 * (1 + abs(was))
    ]


def _left_open(scores: Mapping[str, Attribution]) -> list[str]:
    """A note for each score of which the integral has not found all."""
    return [
        f"{name}: the attributions sum to {sum(found.values):.4g} where the score differs by "
        f"{found.score - found.neutral:.4g}: it bends more than {found.points} points of the integral can follow"
        for name, found in scores.items()
        if abs(found.open) > OPEN_SHARE * sum(map(abs, found.values))
    ]
