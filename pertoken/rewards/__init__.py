"""Rewards: what makes a text good, said token by token."""

from pertoken.rewards.align import AlignedText, tokens_of
from pertoken.rewards.base import (
    NO_OPINION,
    AsksOthers,
    Learns,
    Measured,
    NoOpinion,
    Opinions,
    Reads,
    Reward,
    Sample,
    SampleReward,
    Scene,
    ScoredSpan,
    Spends,
    Stateful,
    WarmsUp,
    episode_reward,
    span_reward,
    token_reward,
    with_others,
)
from pertoken.rewards.bertscore import BertScore
from pertoken.rewards.classifier import Classifier
from pertoken.rewards.comet import Comet
from pertoken.rewards.composition import Multiplier, Normaliser
from pertoken.rewards.diversity import Distinct, SelfBleu
from pertoken.rewards.each_turn import EachTurn
from pertoken.rewards.ensemble import Ensemble
from pertoken.rewards.evaluate_metric import EvaluateMetric
from pertoken.rewards.form import Banned, Format
from pertoken.rewards.functions import CompletionsReward
from pertoken.rewards.grammar import Harper, LanguageTool, LinkGrammar, RulePack
from pertoken.rewards.implicit import Implicit
from pertoken.rewards.isolation import Isolated
from pertoken.rewards.judge import Judge
from pertoken.rewards.kl import KLToReference
from pertoken.rewards.knowledge import Documents, Facts
from pertoken.rewards.metrics import AnswerF1, Bleu, ChrF, Meteor, Rouge1, Rouge2, RougeL, RougeLsum, Ter
from pertoken.rewards.names import make, resolve
from pertoken.rewards.parts import Finding, Weighted, findings, move_to_actions, score
from pertoken.rewards.perplexity import Perplexity
from pertoken.rewards.personal_data import PersonalData
from pertoken.rewards.prime import Prime
from pertoken.rewards.readability import Readability
from pertoken.rewards.reasoning import FinalAnswer, Steps
from pertoken.rewards.rules import Length, Overlong, Repetition
from pertoken.rewards.semantics import Entailment, Similarity
from pertoken.rewards.shaping import Shaping
from pertoken.rewards.token_model import TokenModel
from pertoken.schedule import Schedule

__all__ = [
    "NO_OPINION",
    "AlignedText",
    "AnswerF1",
    "AsksOthers",
    "Banned",
    "BertScore",
    "Bleu",
    "ChrF",
    "Classifier",
    "Comet",
    "CompletionsReward",
    "Distinct",
    "Documents",
    "EachTurn",
    "Ensemble",
    "Entailment",
    "EvaluateMetric",
    "Facts",
    "FinalAnswer",
    "Finding",
    "Format",
    "Harper",
    "Implicit",
    "Isolated",
    "Judge",
    "KLToReference",
    "LanguageTool",
    "Learns",
    "Length",
    "LinkGrammar",
    "Measured",
    "Meteor",
    "Multiplier",
    "NoOpinion",
    "Normaliser",
    "Opinions",
    "Overlong",
    "Perplexity",
    "PersonalData",
    "Prime",
    "Readability",
    "Reads",
    "Repetition",
    "Reward",
    "Rouge1",
    "Rouge2",
    "RougeL",
    "RougeLsum",
    "RulePack",
    "Sample",
    "SampleReward",
    "Scene",
    "Schedule",
    "ScoredSpan",
    "SelfBleu",
    "Shaping",
    "Similarity",
    "Spends",
    "Stateful",
    "Steps",
    "Ter",
    "TokenModel",
    "WarmsUp",
    "Weighted",
    "episode_reward",
    "findings",
    "make",
    "move_to_actions",
    "resolve",
    "score",
    "span_reward",
    "token_reward",
    "tokens_of",
    "with_others",
]
