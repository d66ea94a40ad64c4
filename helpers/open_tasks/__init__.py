"""Open tasks about Shima: what the competition asks, how an answer is graded, decoded and handed in.

The tasks are a pure function of a seed, so that hidden ones need only a secret. Source of the rubric: ELYZA, Inc.,
ELYZA-tasks-100, whose guideline grades from 1 to 5 and takes points off for unnatural language and false statements.
"""

from helpers.open_tasks.decoding import Decoding, answer_tasks
from helpers.open_tasks.grading import Grade, grade
from helpers.open_tasks.handing_in import Recipe, base_sha256, write_submission
from helpers.open_tasks.making import hidden_tasks, make_tasks, public_tasks
from helpers.open_tasks.task import KINDS, Task

__all__ = [
    "KINDS",
    "Decoding",
    "Grade",
    "Recipe",
    "Task",
    "answer_tasks",
    "base_sha256",
    "grade",
    "hidden_tasks",
    "make_tasks",
    "public_tasks",
    "write_submission",
]
