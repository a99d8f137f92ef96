"""Training and measuring learned rewards: out of preferences, labelled spans, labelled steps, or labelled pairs."""

from pertoken.reward_models.evaluation import evaluate
from pertoken.reward_models.settings import RewardTraining, load_training
from pertoken.reward_models.training import Trained, train

__all__ = ["RewardTraining", "Trained", "evaluate", "load_training", "train"]
