"""Runs the notebooks and reports what happened. Every notebook is executed by papermill in a process of its own.

So a cell that fails, hangs or is killed is one line of the report, and the other notebooks still run.
"""

from course.runner.report import Row
from course.runner.run import run

__all__ = ["Row", "run"]
