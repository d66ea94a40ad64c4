"""The exercises of a lesson, as its notebook and its hidden checkers have them."""

import ast
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from nbformat import NotebookNode

from course.grading.session import Settings
from course.notebooks import EXERCISE, read_notebook, tags
from course.runner.keys import lesson_key
from helpers.errors import CourseError


@dataclass(frozen=True)
class Exercise:
    """An exercise of the instructor's notebook."""

    number: str
    cell_id: str
    stub: str
    names: tuple[str, ...]  # what the cell defines
    checks: tuple[tuple[str, str], ...]  # name of the row, and source: the public check, then perhaps a hidden one
    solution: str


@dataclass(frozen=True)
class Lesson:
    """What the grader needs of an instructor's notebook."""

    stem: str
    steps: tuple[str | Exercise, ...]  # sources of the lesson's cells and exercises, in order, up to the last check
    sources: frozenset[str]  # of all its code cells
    key: str  # changes with everything that the grades depend on, but for the submissions

    @property
    def exercises(self) -> list[Exercise]:
        """Its exercises in order."""
        return [step for step in self.steps if isinstance(step, Exercise)]


class LessonError(Exception):
    """A cell of the lesson itself failed."""


def read_lesson(path: Path, hidden: Path | None, settings: Settings) -> Lesson:
    """The lesson in the notebook, with the checkers that `hidden`/NN_name.py adds; CourseError if they do not fit."""
    notebook = read_notebook(path)
    extra = (hidden / f"{path.stem}.py") if hidden else None
    extra_source = extra.read_text(encoding="utf-8") if extra and extra.exists() else ""
    checkers = _checkers(extra_source, extra)
    steps: list[str | Exercise] = []
    stub: NotebookNode | None = None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if "exercise" in tags(cell):
            stub = cell
        elif "check" in tags(cell) and stub:
            if not (found := EXERCISE.search(cell.source)):
                raise CourseError(f"{path.name}: a check cell calls no check(number, ...): mend it.")
            checks = [(found[1], cell.source)]
            if parameters := checkers.pop(found[1], None):
                name = f"check_{found[1].replace('.', '_')}"
                call = f"check({found[1]!r}, {', '.join([name, *parameters])})"
                checks.append((f"{found[1]} hidden", f"{extra_source}\n\n{call}\n"))
            after = next(
                (later for later in notebook.cells[index:] if {"solution", "exercise"} & set(tags(later))), None
            )
            solution = after.source if after and "solution" in tags(after) else ""
            blocks = re.findall(r"```python\n(.*?)```", solution, re.DOTALL)
            names = [node.name for node in ast.parse(stub.source).body if isinstance(node, _DEFINITIONS)]
            steps.append(Exercise(found[1], stub.id, stub.source, tuple(names), tuple(checks), "\n".join(blocks)))
            stub = None
        else:
            steps.append(cell.source)
            if "parameters" in tags(cell):
                steps.append('profile = "cpu"\nseed = 0')
    if checkers:
        raise CourseError(f"{extra} has a checker for {next(iter(checkers))}, which is no exercise of {path.stem}.")
    while steps and isinstance(steps[-1], str):  # what comes after the last check changes nothing
        steps.pop()
    if not steps:
        raise CourseError(f"{path.name} has no exercises: hand in another lesson, or tag its exercises and checks.")
    parts = [lesson_key(path), extra_source, asdict(settings)]
    sources = frozenset(cell.source.strip() for cell in notebook.cells if cell.cell_type == "code")
    return Lesson(path.stem, tuple(steps), sources, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def _checkers(source: str, path: Path | None) -> dict[str, list[str]]:
    """Parameters of the functions named like check_3_1, by exercise."""
    try:
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise CourseError(f"{path} is not Python (line {error.lineno}: {error.msg}): mend it.") from None
    found = {function.name: [argument.arg for argument in function.args.args] for function in functions}
    return {name[6:].replace("_", "."): args for name, args in found.items() if re.fullmatch(r"check_\d+_\d+", name)}
