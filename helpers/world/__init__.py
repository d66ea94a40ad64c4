"""Shima."""

from helpers.world.world import *  # noqa: F403
