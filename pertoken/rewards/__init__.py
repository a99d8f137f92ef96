"""Rewards: what makes a text good, said token by token."""

from pertoken.rewards.align import AlignedText, tokens_of
from pertoken.rewards.base import (
    Finding,
    Reward,
    Sample,
    SampleReward,
    Scene,
    ScoredSpan,
    Weighted,
    episode_reward,
    findings,
    move_to_actions,
    resolve,
    score,
    span_reward,
    token_reward,
)
from pertoken.rewards.kl import KLToReference
from pertoken.rewards.metrics import Bleu, RougeL
from pertoken.rewards.rules import Length, Repetition

__all__ = [
    "AlignedText",
    "Bleu",
    "Finding",
    "KLToReference",
    "Length",
    "Repetition",
    "Reward",
    "RougeL",
    "Sample",
    "SampleReward",
    "Scene",
    "ScoredSpan",
    "Weighted",
    "episode_reward",
    "findings",
    "move_to_actions",
    "resolve",
    "score",
    "span_reward",
    "token_reward",
    "tokens_of",
]
