"""The book of the course, built from the committed notebooks: `python -m course site`, or `make site`."""

from course.site.build import add_arguments, command

__all__ = ["add_arguments", "command"]
