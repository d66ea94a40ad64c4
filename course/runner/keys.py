"""What the result of a lesson depends on: its notebook, the modules and data that it reaches, pins and parameters.

An edit of anything else, such as the slides or a helper that the lesson does not import, leaves the key as it is.
"""

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

from course.notebooks import code_cells, read_notebook, source_hash
from helpers.errors import CourseError
from helpers.files import sha256
from helpers.profiles import ROOT

ROOMS = ("helpers", "recipes")  # from which lessons import
MODULE = re.compile(rf"({'|'.join(ROOMS)})(\.\w+)+")


def lesson_key(path: Path, parameters: object = None, root: Path = ROOT) -> str:
    """Key under which a result stays valid; a damaged notebook has one too, and fails when it is executed."""
    try:
        source = source_hash(read_notebook(path))
        modules = imported_files(path, root)
    except CourseError as error:
        source, modules = str(error), []
    files = [*modules, *named_data(path, modules, root), root / "requirements.txt", root / "constraints.txt"]
    contents = [(str(file.relative_to(root)), sha256(file)) for file in sorted(files) if file.is_file()]
    return hashlib.sha256(json.dumps([source, contents, sys.version, parameters]).encode()).hexdigest()


def named_data(path: Path, modules: list[Path], root: Path = ROOT) -> list[Path]:
    """Files of those items in data/ whose names stand in the notebook's code cells or in these modules."""
    sources = [cell.source for cell in code_cells(path)] + [file.read_text(encoding="utf-8") for file in modules]
    items = [item for item in root.glob("data/*") if any(item.name in source for source in sources)]
    return [file for item in items for file in ([item] if item.is_file() else item.rglob("*")) if file.suffix != ".md"]


def imported_files(path: Path, root: Path = ROOT) -> list[Path]:
    """Files of `helpers` and `recipes` that the notebook's code cells import, and those that these import."""
    transform = TransformerManager().transform_cell
    reached: set[Path] = set()
    waiting = [module for cell in code_cells(path) for module in imported_modules(transform(cell.source))]
    while waiting:
        for file in _files_of(waiting.pop(), root) - reached:
            reached.add(file)
            waiting += imported_modules(file.read_text(encoding="utf-8"))
    return sorted(reached)


def imported_modules(source: str) -> Iterator[str]:
    """Names that the source may import from these rooms, also in a function or as `python -m helpers.memory`.

    For `from helpers import plots` these are `helpers` and `helpers.plots`. What is not Python imports nothing.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = [name.name for name in names]
            case ast.ImportFrom(module=str(module), names=names, level=0):
                found = [module, *(f"{module}.{name.name}" for name in names)]
            case ast.Constant(value=str(text)) if MODULE.fullmatch(text):
                found = [text, f"{text}.__main__"]
            case _:
                continue
        yield from (name for name in found if name.partition(".")[0] in ROOMS)


def _files_of(module: str, root: Path) -> set[Path]:
    """The module's file and the `__init__` of each package above it; nothing for a name that is no module."""
    parts = module.split(".")
    places = [root.joinpath(*parts[: depth + 1]) for depth in range(len(parts))]
    files = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return {file for file in files if file.is_file()}
