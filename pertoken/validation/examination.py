"""A suite from its first check to its last: who is asked what, once for all checks that want to know."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pertoken import assembly
from pertoken.config import RewardConfig, RunConfig
from pertoken.errors import ConfigError, TaskError
from pertoken.evaluation import Evaluator
from pertoken.jobs.run import load_policy
from pertoken.prompts import prompt_ids
from pertoken.rewards import Banned, Classifier, Isolated, PersonalData, Weighted
from pertoken.rollout.collect import collect
from pertoken.sampling import Controls
from pertoken.tasks.mixture import evenly
from pertoken.text_metrics import ITEM_METRICS, words
from pertoken.tracking.runlog import now, prompt_text, versions
from pertoken.types import Item
from pertoken.validation import checks as judge
from pertoken.validation.forgetting import Scored, forgotten, harness
from pertoken.validation.outcomes import Outcome, Report
from pertoken.validation.suite import (
    AnyCheck,
    BannedContent,
    Harness,
    Injection,
    Measuring,
    PersonalDataLeak,
    Quality,
    Regression,
    Robustness,
    Slice,
    Suite,
    Toxicity,
)
from pertoken.validation.variants import asked_otherwise, attacked, canary_of, in_template


def validate(
    suite: Suite, model: str, *, against: str | None = None, on_note: Callable[[str], None] = lambda note: None
) -> Report:
    """What comes of the checks of `suite` on `model`, a name, folder or run folder.

    against: the earlier model, in place of `suite.baseline`. `on_note` hears of what is done.
    Raises ConfigError where the suite asks for what cannot be had: a slice without items, an earlier model that is not
    named, data that cannot be read.
    """
    baseline = against or suite.baseline
    comparing = [check.type for check in suite.checks if isinstance(check, Regression | Harness)]
    if comparing and baseline is None:
        raise ConfigError(
            f"checks of type {comparing[0]} compare with an earlier model: set `baseline` in the suite, or --against"
        )
    items = items_of(suite)
    parts = _measures(suite), _findings(suite)
    try:
        earlier = _Earlier(suite, str(baseline), items, parts, on_note) if comparing else None
        subject = _Subject(suite.run, model, items, *parts)
        outcomes: list[Outcome] = []
        for place, check in enumerate(suite.checks):
            on_note(f"{check.type} ({place + 1} of {len(suite.checks)})")
            outcomes += _outcomes(suite, place, check, subject, earlier)
    finally:
        for part in (*parts[0].values(), *parts[1].values()):
            if isinstance(part.reward, Isolated):
                part.reward.close()
    return Report(suite.name, model, str(baseline) if comparing else None, now(), versions(), outcomes, suite.shown)


def items_of(suite: Suite) -> list[Item]:
    """The held-out items that a model is asked; ConfigError if there are none, or none in a slice that is checked."""
    evaluation = suite.run.evaluation
    try:
        items = evenly(assembly.build_task(suite.run.task).items(evaluation.split), evaluation.items)
    except TaskError as error:
        raise ConfigError(f"recipe: {error}") from error
    if not items:
        raise ConfigError(f"recipe: the {evaluation.split} split is empty; set evaluation.split in `overrides`")
    for check in suite.checks:
        if check.slice is not None and not any(_is_in(suite.slices[check.slice], item) for item in items):
            raise ConfigError(f"slices.{check.slice}: none of the {len(items)} {evaluation.split} items is in it")
    return items


def _is_in(part: Slice, item: Item) -> bool:
    if part.column is not None:
        found = item.task if part.column == "task" else item.info.get(part.column)
        if found != part.value and str(found) != str(part.value):  # what a CSV file holds is text
            return False
    lengths = ((part.prompt_words, prompt_text(item.prompt)), (part.answer_words, item.answer or ""))
    return all(bounds is None or bounds[0] <= len(words(text)) <= bounds[1] for bounds, text in lengths)


def _measures(suite: Suite) -> dict[str, Weighted]:
    """The rewards of the recipe that checks go by, with weight 1."""
    wanted = [check.metric for check in suite.checks if isinstance(check, Measuring)]
    configs: list[RewardConfig] = [
        reward for name, reward in suite.rewards.items() if name in wanted and name not in ITEM_METRICS
    ]
    return {part.name: replace(part.fixed(), weight=1.0) for part in assembly.build_rewards(configs)}


def _findings(suite: Suite) -> dict[str, Weighted]:
    """What looks for the content that checks count, by the place of the check."""
    found = dict[str, Weighted]()
    for place, check in enumerate(suite.checks):
        reward: Banned | PersonalData | Classifier
        if isinstance(check, BannedContent):
            reward = Banned(check.words, check.patterns, check.file, ignore_case=check.ignore_case)
        elif isinstance(check, PersonalDataLeak):
            reward = PersonalData(check.kinds, check.patterns, count_given=check.count_given)
        elif isinstance(check, Toxicity):
            reward = Classifier(check.model, check.label)
        else:
            continue
        found[_part(place)] = Weighted(reward, 1.0, _part(place))
    return found


def _part(place: int) -> str:
    return f"checks.{place}"


class _Subject:
    """A model that is asked; every answer is made once."""

    def __init__(
        self, run: RunConfig, model: str, items: Sequence[Item], measures: Mapping[str, Weighted],
        findings: Mapping[str, Weighted],
    ) -> None:  # fmt: skip
        self.policy = load_policy(run, model)
        self.items = list(items)
        self._engine = assembly.build_engine(self.policy, run.rollout)
        self._controls = Controls.resolve(run.evaluation.sampling, self.policy.tokenizer, self.policy.eos_ids)
        self._gather = assembly.build_turns(run, self.policy) or collect
        self._measures, self._findings = list(measures.values()), list(findings.values())
        self._known: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def answers(self) -> list[dict[str, Any]]:
        """To all items, with everything that checks look for."""
        return self._ask("", self.items, [*self._measures, *self._findings])

    def answers_to(self, variant: str, items: Sequence[Item]) -> list[dict[str, Any]]:
        """To other wordings of items, with what is measured; variant: names the wording."""
        return self._ask(variant, items, self._measures)

    def _ask(self, variant: str, items: Sequence[Item], rewards: Sequence[Weighted]) -> list[dict[str, Any]]:
        key = (variant, *(item.id for item in items))
        if key not in self._known:
            self._refuse_too_long(items)
            evaluator = Evaluator(items, self._controls, metric="words", gather=self._gather)
            self._known[key] = evaluator(self._engine, self.policy, None, rewards).rows
        return self._known[key]

    def _refuse_too_long(self, items: Sequence[Item]) -> None:
        for item in items:
            length = len(prompt_ids(item, self.policy.tokenizer))
            if length >= self.policy.context_length:
                raise ConfigError(
                    f"item {item.id}: its prompt has {length} tokens as a check asks it, and this model's context is "
                    f"{self.policy.context_length}: shorten the prompt template of the recipe"
                )


class _Earlier:
    """What is known of the earlier model, which is not kept in memory: its answers, and its figures of the harness."""

    def __init__(
        self, suite: Suite, model: str, items: Sequence[Item],
        parts: tuple[Mapping[str, Weighted], Mapping[str, Weighted]], on_note: Callable[[str], None],
    ) -> None:  # fmt: skip
        on_note(f"the earlier model, {model}")
        subject = _Subject(suite.run, model, items, parts[0], {})
        compared = any(isinstance(check, Regression) for check in suite.checks)
        self.rows = subject.answers() if compared else []
        self.harness: dict[int, dict[str, Scored]] = {
            place: harness(check, subject.policy)
            for place, check in enumerate(suite.checks)
            if isinstance(check, Harness)
        }


COUNTED = {"banned": "banned content", "personal_data": "personal data"}
"""What checks count, in words."""


def _outcomes(  # noqa: PLR0911 - a return for each kind
    suite: Suite, place: int, check: AnyCheck, subject: _Subject, earlier: _Earlier | None
) -> list[Outcome]:
    """What comes of one check: one outcome, or one for each wording, attack, or metric of the harness."""
    if isinstance(check, Harness):
        assert earlier is not None
        return forgotten(check, earlier.harness[place], harness(check, subject.policy))
    part = None if check.slice is None else suite.slices[check.slice]
    chosen = [k for k, item in enumerate(subject.items) if part is None or _is_in(part, item)]
    items = [subject.items[k] for k in chosen]
    if isinstance(check, Injection):
        return [_injection(suite, check, attack, items[: check.items], subject) for attack in check.attacks]
    rows = [subject.answers()[k] for k in chosen]
    if isinstance(check, Robustness):
        return _robustness(suite, check, items, rows, subject)
    if isinstance(check, Quality):
        return [judge.quality(check, rows, items)]
    if isinstance(check, Regression):
        assert earlier is not None
        return [judge.regression(check, [earlier.rows[k] for k in chosen], rows)]
    if isinstance(check, Toxicity):
        return [judge.share(check, _part(place), rows, least=check.above, of=check.label)]
    return [judge.share(check, _part(place), rows, of=COUNTED[check.type])]


def _injection(suite: Suite, check: Injection, attack: str, items: Sequence[Item], subject: _Subject) -> Outcome:
    text = check.attacks[attack]
    asked = [attacked(item, text, canary_of(item, attack, suite.seed), check.place) for item in items]
    rows = subject.answers_to(f"attack {text} at the {check.place}", asked)
    return judge.injection(check, attack, items, rows, seed=suite.seed)


def _robustness(
    suite: Suite, check: Robustness, items: Sequence[Item], rows: Sequence[Mapping[str, Any]], subject: _Subject
) -> list[Outcome]:
    ways: dict[str, Callable[[Item], Item]] = {
        kind: partial(asked_otherwise, kind=kind, strength=check.strength, seed=suite.seed)
        for kind in check.perturbations
    }
    ways |= {name: partial(in_template, template=text) for name, text in check.templates.items()}
    return [
        judge.robustness(
            check,
            name,
            rows,
            subject.answers_to(f"{name} {check.strength} {check.templates.get(name)}", list(map(way, items))),
        )
        for name, way in ways.items()
    ]
