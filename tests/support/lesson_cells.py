"""The code cells of a lesson, found by what is in them: used by the tests of the lessons."""

from pathlib import Path

from course.notebooks import read_notebook


def code_cells(notebook: Path) -> list[str]:
    """The sources of the notebook's code cells, in order."""
    return [cell.source for cell in read_notebook(notebook).cells if cell.cell_type == "code"]


def cell_with(cells: list[str], text: str) -> str:
    """The one cell that holds the text."""
    (found,) = [source for source in cells if text in source]
    return found
