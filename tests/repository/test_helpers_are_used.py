"""Nothing stands in helpers/ that no lesson needs: every file is reached from a notebook, and every name is used."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from course.notebooks import code_cells, select_notebooks
from course.runner.keys import imported_files
from helpers.profiles import ROOT

MODULES = sorted((ROOT / "helpers").rglob("*.py"))
NOT_IMPORTED = {  # by a lesson, and why it stands in helpers nevertheless
    "helpers/training/copies.py": "the cell in docs/colab.md that a student puts into a lesson imports it",
}
FOR_TESTS = {"tiny_config"}  # a tiny model of a hub model's architecture, by which the tests try the hub's path


def within(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Files


def unreached(modules: list[Path], notebooks: list[Path]) -> list[str]:
    reached = {file for notebook in notebooks for file in imported_files(notebook)}
    return [within(module) for module in modules if module not in reached]


def test_every_file_of_helpers_is_reached_from_a_notebook() -> None:
    assert unreached(MODULES, select_notebooks()) == sorted(NOT_IMPORTED)


@pytest.mark.parametrize("module", NOT_IMPORTED)
def test_what_no_lesson_imports_is_imported_where_it_is_said(module: str) -> None:
    places = [ROOT / "docs" / "colab.md", *(ROOT / "course").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    name = module.removesuffix(".py").replace("/", ".")
    statements = [f"from {name} import", f"from {name.rpartition('.')[0]} import"]  # itself, or its package hands it on
    assert any(statement in place.read_text(encoding="utf-8") for place in places for statement in statements)


def test_a_file_that_only_other_lessons_reach_is_found() -> None:
    assert "helpers/world/world.py" in unreached(MODULES, [])


# Names


def names_of(statement: ast.stmt) -> set[str]:
    """Names that a top-level statement of a module defines: a function, a class or constants."""
    match statement:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return set()


def names_in(tree: ast.AST) -> set[str]:
    """Names that code uses or imports; those in its texts and comments do not count."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name):
                found.add(name)
    return found


@cache
def uses() -> dict[str, set[str]]:
    """Names in each place where a use counts. A package's `__init__` only hands on, which is none."""
    found = {}
    for room in ("helpers", "recipes", "course"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "__init__.py":
                found[within(path)] = names_in(ast.parse(path.read_text(encoding="utf-8")))
    transform = TransformerManager().transform_cell
    for path in select_notebooks():
        found[within(path)] = set().union(*(names_in(ast.parse(transform(cell.source))) for cell in code_cells(path)))
    for path in [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]:
        found[within(path)] = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return found


def unused(module: str, source: str) -> list[str]:
    """Names, private ones too, that no other place uses, nor a statement of the module that is itself in use."""
    others = set().union(*(names for place, names in uses().items() if place != module))
    waiting, used = ast.parse(source).body, others | FOR_TESTS
    while in_use := [node for node in waiting if not (defined := names_of(node)) or defined & used]:
        waiting = [node for node in waiting if node not in in_use]
        used = used.union(*map(names_in, in_use))
    return sorted(name for node in waiting for name in names_of(node) if not name.startswith("__"))


@pytest.mark.parametrize("module", [within(module) for module in MODULES])
def test_every_name_is_used_outside_its_module_or_by_one_that_is(module: str) -> None:
    assert unused(module, (ROOT / module).read_text(encoding="utf-8")) == []


def test_names_that_nothing_uses_are_found() -> None:
    planted = """
import os

UNUSED, _unused = 1, os.sep
USED_HERE: int = 3

class UsedHere:
    pass

def unused_1():
    return unused_2(World, USED_HERE)

def unused_2():
    return unused_1(_unused)

def train():
    return UsedHere(USED_HERE)
"""
    assert unused("helpers/planted.py", planted) == ["UNUSED", "_unused", "unused_1", "unused_2"]
