"""Grammar as a reward: what a checker finds costs the very tokens that it is about."""

from pertoken.rewards.grammar.base import Finding, GrammarReward, protected_spans
from pertoken.rewards.grammar.harper import Harper
from pertoken.rewards.grammar.language_tool import LanguageTool
from pertoken.rewards.grammar.link_grammar import LinkGrammar
from pertoken.rewards.grammar.rule_pack import Rule, RulePack, load_pack

__all__ = [
    "Finding",
    "GrammarReward",
    "Harper",
    "LanguageTool",
    "LinkGrammar",
    "Rule",
    "RulePack",
    "load_pack",
    "protected_spans",
]
