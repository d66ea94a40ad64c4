"""The ledger: what each lesson claims, on several seeds and where it must not hold: `python -m course claims`."""

from course.claims.command import add_arguments, command

__all__ = ["add_arguments", "command"]
