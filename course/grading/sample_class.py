"""A class of thirty who hand in a lesson and do not exist, so that the grader can be tried at once.

Most answered some exercises rightly, some wrongly and some not at all. One never comes to an end, one ends the process,
one raises, one leans on a function that stands in another cell, one calls the system, and two handed in no lesson.
"""

import random
from copy import deepcopy
from pathlib import Path

import nbformat

from course.grading.lessons import Exercise, read_lesson
from course.grading.report import Row
from course.grading.session import Settings
from course.notebooks import read_notebook
from helpers.errors import CourseError

SIZE = 30
LESSON = "07"  # one of the shortest
TROUBLE = [  # what somebody wrote for one of the exercises, and what the grader says about it
    ("while True:\n    pass", "error"),
    ("import os\nos._exit(0)", "error"),
    ("raise RuntimeError('I ran out of time')", "error"),
    ("{name} = a_function_of_mine", "error"),
    ("import subprocess\n{solution}", "correct"),
]
Expected = dict[str, dict[str, str]]  # student -> exercise -> status


def write_class(folder: Path, notebook: Path, size: int = SIZE, seed: int = 0) -> Expected:
    """Write folder/<student>/<lesson>.ipynb; return what the grader should say. CourseError if there is something."""
    if folder.exists() and any(folder.iterdir()):
        raise CourseError(f"{folder} is not empty: give a new folder for the sample class.")
    lesson, original = read_lesson(notebook, None, Settings()), read_notebook(notebook)
    generator = random.Random(seed)
    expected: Expected = {}
    for place in range(size):
        target = folder / f"student_{place + 1:02}" / notebook.name
        target.parent.mkdir(parents=True)
        answers = _answers(place, lesson.exercises, generator)
        sources = {exercise.cell_id: answers[exercise.number][0] for exercise in lesson.exercises}
        mine = deepcopy(original)
        for cell in mine.cells:
            cell.source = sources.get(cell.id, cell.source)
        if place == size - 2:
            target = target.with_name("my_homework.ipynb")
        nbformat.write(mine, target)
        if place == size - 1:
            target.write_text("{ this is no notebook", encoding="utf-8")
        rejected = place >= size - 2
        expected[target.parent.name] = (
            {"": "rejected"} if rejected else {number: status for number, (_, status) in answers.items()}
        )
    return expected


def surprises(expected: Expected, rows: list[Row]) -> list[str]:
    """Students of whom the grader says something else."""
    found: Expected = {}
    for row in rows:
        if row.status != "note":
            found.setdefault(row.student, {})[row.exercise] = row.status
    return [student for student in expected if found.get(student) != expected[student]]


def _answers(place: int, exercises: list[Exercise], generator: random.Random) -> dict[str, tuple[str, str]]:
    """For each exercise what the student in this place wrote, and its status."""
    able = generator.random()
    found = {}
    for exercise in exercises:
        luck = generator.random()
        if luck < able:
            found[exercise.number] = exercise.solution, "correct"
        elif luck < (1 + able) / 2:
            found[exercise.number] = _wrong(exercise), "not yet"
        else:
            found[exercise.number] = exercise.stub, "not attempted"
    if place < len(TROUBLE):
        source, status = TROUBLE[place]
        exercise = exercises[place % len(exercises)]
        found[exercise.number] = source.format(name=exercise.names[0], solution=exercise.solution), status
    return found


def _wrong(exercise: Exercise) -> str:
    """The solution with a result that is half as much again, or none at all."""
    name = exercise.names[0]
    return (
        f"{exercise.solution}\n\nexact = {name}\n\n\ndef {name}(*arguments, **options):\n"
        "    found = exact(*arguments, **options)\n"
        "    return 1.5 * found if isinstance(found, (int, float)) else None\n"
    )
