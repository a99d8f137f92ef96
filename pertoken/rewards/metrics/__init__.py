"""Text metrics paid out token by token; `base.py` says how, each other module holds one family."""

from pertoken.rewards.metrics.answer import AnswerF1
from pertoken.rewards.metrics.base import MetricDelta, PrefixScore, references
from pertoken.rewards.metrics.bleu import Bleu
from pertoken.rewards.metrics.chrf import ChrF
from pertoken.rewards.metrics.meteor import Meteor
from pertoken.rewards.metrics.rouge import Rouge1, Rouge2, RougeL, RougeLsum
from pertoken.rewards.metrics.ter import Ter

__all__ = [
    "AnswerF1",
    "Bleu",
    "ChrF",
    "Meteor",
    "MetricDelta",
    "PrefixScore",
    "Rouge1",
    "Rouge2",
    "RougeL",
    "RougeLsum",
    "Ter",
    "references",
]
