"""GPU memory math."""

from helpers.memory.estimate import *  # noqa: F403
from helpers.memory.step import *  # noqa: F403
