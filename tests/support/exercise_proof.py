"""Prove the checks of a notebook's exercises: used by the tests of the lessons.

EXERCISES = read_exercises(ROOT / "notebooks" / "03_pretraining.ipynb")
prove_check(EXERCISES["3.1"], {"torch": torch}, wrong=[planted(EXERCISES["3.1"].solution, "+ 2", "+ 1"), ...])
"""

import ast
import linecache
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat

from helpers import exercises
from helpers.exercises import CheckResult


@dataclass(frozen=True)
class Exercise:
    """The sources of one exercise: the cells tagged `exercise` and `check`, the Python block of the `solution`."""

    number: str
    stub: str
    check: str
    solution: str


def read_exercises(notebook: Path) -> dict[str, Exercise]:
    """Return the exercises of a notebook by number; each is a stub, then a check, then a folded solution."""
    found: dict[str, Exercise] = {}
    stub = check = None
    for cell in nbformat.read(notebook, as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if "exercise" in tags:
            assert stub is None, f"{notebook.name}: an exercise follows one that has no check and solution"
            stub = cell.source
        elif "check" in tags and stub is not None:
            check = cell.source
        elif "solution" in tags:
            assert stub and check, f"{notebook.name}: a solution has no exercise and check before it"
            number = re.search(r"\bcheck\(\s*[\"']([\d.]+)[\"']", check)
            blocks = re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)
            assert number, f"{notebook.name}: this check cell calls no check(number, ...): {check[:80]}"
            assert blocks and "<details>" in cell.source, f"{notebook.name}: {number[1]} has no folded Python solution"
            assert number[1] not in found, f"{notebook.name}: exercise {number[1]} is there twice"
            found[number[1]] = Exercise(number[1], stub, check, "\n".join(blocks))
            stub = check = None
    assert stub is None, f"{notebook.name}: the last exercise has no solution"
    return found


def run_check(exercise: Exercise, attempt: str, setup: dict) -> CheckResult:
    """Run the attempt's source and then the check cell, over a copy of the names in `setup`; return its result."""
    namespace = {**vars(exercises), **setup, "__name__": "__main__"}
    _run(attempt, f"<attempt at {exercise.number}>", namespace)
    result = _run(exercise.check, f"<check of {exercise.number}>", namespace)
    assert isinstance(result, CheckResult), f"the check cell of {exercise.number} does not end in check(...)"
    return result


def prove_check(exercise: Exercise, setup: dict, wrong: Sequence[str]) -> None:
    """Assert what a check must say to the stub, to the solution and to two or more planted wrong attempts."""
    assert len(wrong) >= 2 and len({*wrong, exercise.solution, exercise.stub}) == len(wrong) + 2
    assert run_check(exercise, exercise.stub, setup).status == "not attempted"
    assert run_check(exercise, exercise.solution, setup).status == "correct"
    for attempt in wrong:
        result = run_check(exercise, attempt, setup)
        assert result.status == "not yet", f"{result}, although this attempt is wrong:\n{attempt}"


def planted(source: str, right: str, wrong: str) -> str:
    """Return the source with one mistake in it."""
    assert source.count(right) == 1, f"{right!r} stands {source.count(right)} times in the source, expected once"
    return source.replace(right, wrong)


def _run(source: str, name: str, namespace: dict) -> object:
    """Execute a cell; return the value of its last line when that is an expression."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # messages quote lines
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return eval(compile(ast.Expression(last.value), name, "eval"), namespace) if last else None
