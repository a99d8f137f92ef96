"""Which reward a name stands for: a built-in one, `module:attribute`, or what an installed package offers."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import entry_points
from typing import Any, cast

from pertoken.errors import ConfigError, PertokenError, closest
from pertoken.rewards.base import DecoratedReward, Learns, Reward, Stateful
from pertoken.rewards.functions import CompletionsReward, takes_completions

BUILT_IN = {
    "rouge_1": "pertoken.rewards.metrics:Rouge1",
    "rouge_2": "pertoken.rewards.metrics:Rouge2",
    "rouge_l": "pertoken.rewards.metrics:RougeL",
    "rouge_lsum": "pertoken.rewards.metrics:RougeLsum",
    "bleu": "pertoken.rewards.metrics:Bleu",
    "chrf": "pertoken.rewards.metrics:ChrF",
    "ter": "pertoken.rewards.metrics:Ter",
    "meteor": "pertoken.rewards.metrics:Meteor",
    "answer_f1": "pertoken.rewards.metrics:AnswerF1",
    "final_answer": "pertoken.rewards.reasoning:FinalAnswer",
    "steps": "pertoken.rewards.reasoning:Steps",
    "bertscore": "pertoken.rewards.bertscore:BertScore",
    "repetition": "pertoken.rewards.rules:Repetition",
    "length": "pertoken.rewards.rules:Length",
    "overlong": "pertoken.rewards.rules:Overlong",
    "format": "pertoken.rewards.form:Format",
    "banned": "pertoken.rewards.form:Banned",
    "personal_data": "pertoken.rewards.personal_data:PersonalData",
    "distinct": "pertoken.rewards.diversity:Distinct",
    "self_bleu": "pertoken.rewards.diversity:SelfBleu",
    "perplexity": "pertoken.rewards.perplexity:Perplexity",
    "readability": "pertoken.rewards.readability:Readability",
    "harper": "pertoken.rewards.grammar:Harper",
    "language_tool": "pertoken.rewards.grammar:LanguageTool",
    "link_grammar": "pertoken.rewards.grammar:LinkGrammar",
    "rule_pack": "pertoken.rewards.grammar:RulePack",
    "similarity": "pertoken.rewards.semantics:Similarity",
    "entailment": "pertoken.rewards.semantics:Entailment",
    "classifier": "pertoken.rewards.classifier:Classifier",
    "token_model": "pertoken.rewards.token_model:TokenModel",
    "facts": "pertoken.rewards.knowledge:Facts",
    "evaluate": "pertoken.rewards.evaluate_metric:EvaluateMetric",
    "documents": "pertoken.rewards.knowledge:Documents",
    "judge": "pertoken.rewards.judge:Judge",
    "comet": "pertoken.rewards.comet:Comet",
    "ensemble": "pertoken.rewards.ensemble:Ensemble",
    "each_turn": "pertoken.rewards.each_turn:EachTurn",
    "implicit": "pertoken.rewards.implicit:Implicit",
    "prime": "pertoken.rewards.prime:Prime",
    "shaping": "pertoken.rewards.shaping:Shaping",
    "kl": "pertoken.rewards.kl:KLToReference",
}
"""Names that a configuration may use, and where each reward lives."""

ENTRY_POINTS = "pertoken.rewards"
"""Entry-point group by which installed packages add names."""


def resolve(name: str) -> Callable[..., Reward]:
    """The factory of a reward by name: `resolve("rouge_l")(granularity="word")` is a reward.

    name: a built-in reward, `module:attribute`, or a name that an installed package offers under the entry-point
    group `pertoken.rewards`. A class is a factory as it stands; for anything else the factory binds keyword
    parameters of the function, if it has any.
    """
    offered = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)} | BUILT_IN
    path = name if ":" in name else offered.get(name)
    if path is None:
        raise ConfigError(f"unknown reward {name!r}: {closest(name, offered)}; your own is named module:function")
    found = load_attribute(path, name)
    if not callable(found):
        raise ConfigError(f"reward {name!r} is {type(found).__name__}, expected a decorated function or a class")
    return cast("Callable[..., Reward]", found) if inspect.isclass(found) else functools.partial(_bind, name, found)


def make(name: str, parameters: Mapping[str, Any], where: str) -> Reward:
    """The reward `name` with `parameters`; ConfigError, which begins with `where`, if it does not take them."""
    factory: Any = resolve(name)
    if is_dataclass(factory):
        known = [field.name for field in fields(factory)]
        for parameter in parameters:
            if parameter not in known:
                raise ConfigError(f"{where}.{parameter}: {name} has no such field; {closest(parameter, known)}")
    try:
        return cast("Reward", factory(**parameters))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where} ({name}): {error}") from error
    except PertokenError:
        raise
    except Exception as error:  # whatever a class of one's own does when it is made
        raise ConfigError(f"{where} ({name}): raised {type(error).__name__}: {error}") from error


def make_entry(entry: Any, where: str) -> tuple[Reward, float]:
    """A reward within another one, and its weight: written as an entry of `rewards`. What it remembers or learns would
    be in no checkpoint, so that it may do neither."""
    if not isinstance(entry, Mapping) or not (entry.get("name") or entry.get("fn")):
        raise ConfigError(f"{where}: expected a mapping with `name` or `fn`, got {entry!r}")
    parameters = {key: value for key, value in entry.items() if key not in ("name", "fn", "weight")}
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"{where}.weight: expected a number, got {weight!r}")
    name = str(entry.get("fn") or entry["name"])
    reward = make(name, parameters, where)
    if isinstance(reward, Stateful | Learns):
        raise ConfigError(
            f"{where}: {name} remembers or learns, which a reward within another one hands on to no checkpoint: use it "
            "as a part of its own"
        )
    return reward, float(weight)


def load_attribute(path: str, name: str, kind: str = "reward") -> Any:
    """What `path`, module:attribute, names; `name` is how the configuration calls it, and `kind` what it should be."""
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{kind} {name!r}: cannot import the module {module_name!r} ({type(error).__name__}: {error}); "
            f"is its folder on PYTHONPATH?"
        ) from error
    if not hasattr(module, attribute):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{kind} {name!r}: module {module_name!r} has no {attribute!r}; {closest(attribute, known)}")
    return getattr(module, attribute)


def make_with(path: str, parameters: Mapping[str, Any], kind: str) -> Any:
    """What the class or function at `path`, module:attribute, makes of `parameters`; ConfigError if it takes others."""
    maker = load_attribute(path, path, kind)
    if not callable(maker):
        raise ConfigError(f"{kind} {path!r}: expected a class or function, got {type(maker).__name__}")
    try:
        inspect.signature(maker).bind(**parameters)
    except TypeError as error:
        raise ConfigError(f"{kind} {path!r}: {error}; its signature is {inspect.signature(maker)}") from error
    try:
        return maker(**parameters)
    except PertokenError:
        raise
    except Exception as error:
        raise ConfigError(f"{kind} {path!r}: raised {type(error).__name__}: {error}") from error


def _bind(name: str, reward: Any, /, **parameters: Any) -> Reward:
    """`reward` with its keyword parameters set; unknown ones are a mistake in the configuration."""
    if takes_completions(reward):
        return CompletionsReward(reward, parameters)
    try:
        inspect.signature(reward).bind(None, **parameters)
    except TypeError as error:
        raise ConfigError(f"reward {name!r}: {error}; its signature is {inspect.signature(reward)}") from error
    if isinstance(reward, DecoratedReward):
        return reward.bind(**parameters)
    bound: Reward = functools.partial(reward, **parameters) if parameters else reward
    return bound
