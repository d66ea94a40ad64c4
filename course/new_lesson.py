"""Starts a new lesson: `python -m course new-lesson 18_topic` writes a notebook that runs, its twin and its test.

The notebook has every part that a lesson must have, around a small measurement that the author replaces. What it holds
stands in course/template: lesson.py in jupytext's percent format, and the test.
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from course.twins import FORMAT, bring_in_line, twin
from helpers.colab import SETUP_CELL, badges
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

TEMPLATE = ROOT / "course" / "template"
NAME = re.compile(r"\d\d_[a-z][a-z0-9_]*")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("name", help="number and name of the lesson, such as 18_topic")


def command(options: argparse.Namespace) -> None:
    """Start the lesson in this repository."""
    for path in write_lesson(options.name):
        print(f"wrote {path.relative_to(ROOT)}")
    print(f"Now change them, and run: python -m course refresh --only {options.name[:2]}")


def filled(template: str, name: str) -> str:
    """The text of a file of the template, for a lesson of this name ("18_topic")."""
    values = {
        "number": name[:2],
        "name": name,
        "title": title_of(name),
        "exercise": str(int(name[:2])),  # of exercise 1.1
        "badges": badges(name),
        "setup": SETUP_CELL.strip(),
    }
    text = (TEMPLATE / template).read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: values[found[1]], text)


def title_of(name: str) -> str:
    """A title to begin with, such as "Topic"."""
    return name[3:].replace("_", " ").capitalize()


def lesson_notebook(name: str) -> NotebookNode:
    """A lesson of that name ("18_topic") with all its parts, not yet run."""
    number = name[:2]
    notebook = jupytext.reads(filled("lesson.py", name), fmt=FORMAT)
    notebook.metadata = NotebookNode(
        kernelspec={"name": "python3", "display_name": "Python 3", "language": "python"},
        language_info={"name": "python"},
        workbook={"lesson": number, "title": title_of(name), "prerequisites": ["01"] if number > "01" else []},
    )
    return notebook


def write_lesson(name: str, folder: Path = ROOT) -> tuple[Path, Path, Path]:
    """Write the lesson into notebooks/ and tests/lessons/ of the folder; return paths of notebook, twin and test.

    Raises CourseError for a name that no lesson may have, and where one of them, or a lesson of that number, is there.
    """
    if not NAME.fullmatch(name):
        raise CourseError(
            f"{name!r} is no name for a lesson: give two digits and words in small letters, such as 18_topic."
        )
    notebook = folder / "notebooks" / f"{name}.ipynb"
    test = folder / "tests" / "lessons" / f"test_lesson_{name[:2]}.py"
    sources = twin(notebook).parent.glob(f"{name[:2]}_*.py")
    taken = [*sorted(notebook.parent.glob(f"{name[:2]}_*.ipynb")), *sorted(sources), *([test] if test.exists() else [])]
    if taken:
        raise CourseError(f"{taken[0].name} is there already: choose another number, or delete it first.")
    try:
        write_atomically(test, filled("test_lesson.py", name))
        write_atomically(notebook, nbformat.writes(lesson_notebook(name)) + "\n")
        bring_in_line(notebook, "notebook")
    except OSError as error:
        raise CourseError(
            f"Cannot write {error.filename} ({error.strerror}): make room, or run in the course."
        ) from None
    return notebook, twin(notebook), test
