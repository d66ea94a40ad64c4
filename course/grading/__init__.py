"""Grades handed-in notebooks."""

from course.grading.grade import *  # noqa: F403
