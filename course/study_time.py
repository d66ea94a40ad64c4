"""How long a student needs for a lesson: minutes to read it and to do its exercises, from words, lines and figures.

It is an estimate by rule, the same for all lessons, so that a plan of a week can be made. It is not measured.
"""

import re

from nbformat import NotebookNode

from course.notebooks import core_path, tags

WORDS, LINES, FIGURES = 150, 15, 1  # read in a minute: words of text, lines of code; looked at: figures
EXERCISE = {"easy": 5, "medium": 10, "hard": 20, "open": 30}  # minutes
LEVEL = re.compile(r"^# Exercise [\d.]+, (\w+)", re.MULTILINE)
FOLDED = {"exercise", "check", "hint", "solution", "quiz"}


def study_time(notebook: NotebookNode) -> str:
    """Such as "core 45 min, all 90 min | exercises 60 min"; core is without the further sections."""
    core, whole = (reading_minutes(part) for part in (core_path(notebook), notebook))
    levels = [level for cell in notebook.cells if "exercise" in tags(cell) for level in LEVEL.findall(cell.source)]
    return f"core {core} min, all {whole} min | exercises {sum(EXERCISE[level] for level in levels)} min"


def reading_minutes(notebook: NotebookNode) -> int:
    """Minutes for text, code and figures, without setup, exercises and quiz, to the next 5."""
    minutes = 0.0
    for cell in notebook.cells:
        if FOLDED & {*tags(cell)} or "setup" in tags(cell):
            continue
        if cell.cell_type == "markdown":
            minutes += len(cell.source.split()) / WORDS
        else:
            images = sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
            minutes += len(cell.source.splitlines()) / LINES + images / FIGURES
    return 5 * max(1, round(minutes / 5))
