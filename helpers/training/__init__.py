"""The training loop, its checkpoints, and copies of them that outlive the machine."""

from helpers.training.loop import History, TrainConfig, causal_lm_loss, learning_rate_factor, random_state, train

__all__ = ["History", "TrainConfig", "causal_lm_loss", "learning_rate_factor", "random_state", "train"]
