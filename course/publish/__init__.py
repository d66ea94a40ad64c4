"""The models and the data set on the Hugging Face hub: `python -m course publish`."""

from course.publish.upload import add_arguments, command

__all__ = ["add_arguments", "command"]
