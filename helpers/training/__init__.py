"""The training loop, its checkpoints, and copies of them that outlive the machine."""

from helpers.training.config import TrainConfig, learning_rate_factor
from helpers.training.history import History
from helpers.training.loop import causal_lm_loss, train
from helpers.training.random_state import random_state

__all__ = ["History", "TrainConfig", "causal_lm_loss", "learning_rate_factor", "random_state", "train"]
