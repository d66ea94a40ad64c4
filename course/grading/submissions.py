"""The notebooks that students handed in, and the attempts in them. Nothing of them is run here."""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

from course.grading.lessons import Lesson

LARGEST_FILE = 50 * 2**20  # bytes of a handed-in notebook
# What honest answers to exercises have no use for.
SUSPICIOUS = re.compile(
    r"\b(?:gc|ctypes|inspect|_getframe|__globals__|__builtins__|f_back|sys\.modules|settrace|setprofile|__eq__|socket"
    r"|helpers\.exercises|subprocess|os\.(?:system|fork|kill|_exit|write))\b|globals\(|/proc\b"
)


@dataclass
class Submission:
    """A handed-in file."""

    student: str
    path: Path
    lesson: Lesson | None
    problem: str = ""
    key: str = ""


def find_submissions(folder: Path, lessons: dict[str, Lesson], known: list[str]) -> list[Submission]:
    """What was handed in: FOLDER/<student>/<NN_name>.ipynb. Anything else is one that has a problem."""
    found = []
    for student in sorted(folder.iterdir()):
        if student.name.startswith("."):
            continue
        if student.is_symlink() or not student.is_dir():
            found.append(Submission("", student, None, "expected a folder for each student"))
            continue
        try:
            files = sorted(path for path in student.iterdir() if not path.name.startswith("."))
        except OSError as error:
            found.append(Submission("", student, None, f"cannot be read ({error.strerror})"))
            continue
        for path in files:
            lesson = lessons.get(path.stem) if path.suffix == ".ipynb" else None
            submission = Submission(readable(student), path, lesson)
            if path.is_symlink() or not path.is_file():
                submission.problem = "not a plain file"
            elif lesson is None:
                submission.problem = f"no lesson has this name: expected for example {known[0]}.ipynb"
            elif path.stat().st_size > LARGEST_FILE:
                submission.problem = f"larger than {LARGEST_FILE >> 20} MiB"
            else:
                try:
                    owned = os.fsencode(f"{lesson.key}/{student.name}/") + path.read_bytes()
                    submission.key = hashlib.sha256(owned).hexdigest()
                except OSError as error:
                    submission.problem = f"cannot be read ({error.strerror})"
            found.append(submission)
    return found


def readable(path: Path) -> str:
    """Its name as text that can be written; Linux allows names that are none."""
    return path.name.encode("utf-8", "replace").decode()


def find_attempts(lesson: Lesson, notebook: NotebookNode) -> tuple[dict[str, str], int]:
    """Sources of the exercises' cells by number, and the number of other code cells that the lesson does not have.

    An exercise is found by the id of its cell, by its first line (`# Exercise 3.1`), or by what it defines.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and isinstance(cell.source, str)]
    attempts: dict[str, str] = {}
    for exercise in lesson.exercises:
        title = re.compile(rf"#\s*Exercise\s+{re.escape(exercise.number)}\b(?!\.?\d)")
        defines = re.compile(rf"^(?:def|class)\s+(?:{'|'.join(exercise.names)})\b", re.MULTILINE)
        for matches in (
            lambda cell, wanted=exercise.cell_id: cell.get("id") == wanted,
            lambda cell, wanted=title: wanted.match(cell.source),
            lambda cell, wanted=defines: wanted.search(cell.source),
        ):
            if cells := [cell for cell in code if matches(cell)]:
                attempts[exercise.number] = cells[-1].source
                break
    known = lesson.sources | {source.strip() for source in attempts.values()}
    return attempts, sum(bool(cell.source.strip()) and cell.source.strip() not in known for cell in code)


def parse_notebook(content: bytes) -> NotebookNode:
    """The notebook in these bytes; an error of any kind if it is none."""
    import nbformat

    return nbformat.reads(content.decode("utf-8"), as_version=4)
