"""Each notebook's twin, notebooks/source/NN_name.py: the same cells in jupytext's percent format, for reviews.

`python -m course sync` brings the two in line. The notebook remembers what both held when they were last in line, so
that the side that was edited is known; where both were edited differently, neither is touched.
"""

import argparse
import copy
import hashlib
import json
from difflib import SequenceMatcher
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from course.arguments import add_notebooks
from course.notebooks import BUDGET, one_line, read_notebook, select_notebooks, tags
from helpers.errors import CourseError
from helpers.files import write_atomically

FORMAT = "py:percent"
PAIRING = {"formats": "ipynb,source//py:percent"}  # jupytext's extension of JupyterLab reads it
ON_A_GPU = {"accelerator": "GPU", "colab": {"gpuType": "T4"}}  # what Colab starts when a badge opens the notebook
UNMEASURED = "cpu 0 s · 0 GB"  # a twin does not change when a lesson is only measured again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_notebooks(parser)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a pair differs")


def command(options: argparse.Namespace) -> int:
    """Bring all pairs in line, or say which are not."""
    notebooks = select_notebooks(options.notebooks.resolve())
    folder = notebooks[0].parent / "source"
    if lost := sorted(path.stem for path in folder.glob("*.py") if path.stem not in {p.stem for p in notebooks}):
        raise CourseError(f"source/{lost[0]}.py has no notebook beside: restore the notebook, or delete the source.")
    differing = 0
    for path in notebooks:
        change = pending(path)
        if change and options.check:
            print(f"{path.stem}: the {change} was edited: make sync")
            differing += 1
        elif change:
            bring_in_line(path, change)
            print(f"{path.stem}: took over what the {change} says")
    return 1 if differing else 0


def twin(path: Path) -> Path:
    """The source of a notebook."""
    return path.parent / "source" / f"{path.stem}.py"


def as_source(notebook: NotebookNode) -> str:
    """The text of the twin."""
    plain = copy.deepcopy(notebook)
    plain.metadata = NotebookNode(
        jupytext={"cell_metadata_filter": "tags", "notebook_metadata_filter": "-all", "main_language": "python"}
    )
    for cell in plain.cells:
        cell.source = BUDGET.sub(UNMEASURED, cell.source)
    return jupytext.writes(plain, fmt=FORMAT)


def contents(notebook: NotebookNode) -> list[list]:
    """What both sides hold of each cell: type, tags and source."""
    return [[cell.cell_type, sorted(tags(cell)), BUDGET.sub(UNMEASURED, cell.source)] for cell in notebook.cells]


def contents_hash(notebook: NotebookNode) -> str:
    """Hash of `contents`, kept as `workbook.twin` in the notebook's metadata."""
    return hashlib.sha256(json.dumps(contents(notebook)).encode()).hexdigest()


def pending(path: Path) -> str | None:
    """Which side was edited since the last time, "notebook" or "source"; None if both say the same.

    CourseError if both were edited and differ.
    """
    notebook = read_notebook(path)
    if not twin(path).exists():
        return "notebook"
    source = jupytext.read(twin(path), fmt=FORMAT)
    if contents(notebook) == contents(source):
        return None if notebook.metadata.get("workbook", {}).get("twin") == contents_hash(notebook) else "notebook"
    last = notebook.metadata.get("workbook", {}).get("twin")
    if last == contents_hash(notebook):
        return "source"
    if last == contents_hash(source):
        return "notebook"
    pairs = zip(contents(notebook), contents(source), strict=False)
    number = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(notebook.cells), len(source.cells)))
    where = next((side.cells[number].source for side in (notebook, source) if number < len(side.cells)), "")
    raise CourseError(
        f"{path.stem} was edited in the notebook and in source/{path.stem}.py, first in cell {number} "
        f"({one_line(where, 50)}); nothing was changed: keep one with git checkout, then edit it."
    )


def bring_in_line(path: Path, edited: str) -> None:
    """Write the side that was not edited anew, and remember what both hold."""
    notebook = read_notebook(path)
    if edited == "source":
        take_over(notebook, jupytext.read(twin(path), fmt=FORMAT))
    notebook.metadata.setdefault("workbook", {})["twin"] = contents_hash(notebook)
    notebook.metadata |= {"jupytext": PAIRING} | ON_A_GPU
    twin(path).parent.mkdir(exist_ok=True)
    write_atomically(twin(path), as_source(notebook))
    write_atomically(path, nbformat.writes(notebook) + "\n")


def take_over(notebook: NotebookNode, source: NotebookNode) -> None:
    """Give the notebook the cells of the source; a cell that is still there keeps its id and its outputs."""
    ours, theirs = contents(notebook), contents(source)
    cells = []
    for kind, begin, end, new_begin, new_end in SequenceMatcher(
        None, *([json.dumps(cell) for cell in side] for side in (ours, theirs)), autojunk=False
    ).get_opcodes():
        if kind == "equal":
            cells += notebook.cells[begin:end]
            continue
        for number, cell in enumerate(source.cells[new_begin:new_end], start=begin):
            old = notebook.cells[number] if number < end else None
            if old is None or old.cell_type != cell.cell_type:
                cells.append(cell)
                continue
            measured = BUDGET.search(old.source)
            old.source = BUDGET.sub(measured[0], cell.source) if measured else cell.source
            old.metadata = cell.metadata
            cells.append(old)
    notebook.cells = cells
