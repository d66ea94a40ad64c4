"""Grades handed-in notebooks: `python -m course grade SUBMISSIONS/ --out grades.csv`.

Of a submission only the exercise cells are used. They are placed into the instructor's notebook, which runs in a
sandbox of its own, and the instructor's checks, and hidden ones, say what they are worth. Nothing that a submission
does ends the grading or reaches another submission. docs/grading.md says what is guaranteed and what is not.
"""

from course.grading.command import add_arguments, command
from course.grading.grade import grade
from course.grading.lessons import read_lesson
from course.grading.session import Settings

__all__ = ["Settings", "add_arguments", "command", "grade", "read_lesson"]
