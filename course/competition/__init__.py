"""The competition: `python -m course competition ACTION`.

Weights and recipe are handed in, never code, and nothing of a submission is run: docs/competition.md.
"""

from course.competition.command import add_arguments, command

__all__ = ["add_arguments", "command"]
