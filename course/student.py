"""The student edition of the lessons: the same notebooks without solutions, and with folded hints.

A cell tagged `solution` is left out, and so are the outputs of exercises and their checks. A markdown cell tagged
`hint` becomes a folded one. The rest of a lesson, its outputs included, stays: they show what to expect. Beside the
notebooks stand the code and the data that they need and a README, so that the folder can be handed out as it is.
"""

import argparse
import copy
import re
import shutil
from pathlib import Path

import nbformat
from nbconvert.preprocessors import TagRemovePreprocessor
from nbformat import NotebookNode

from course.arguments import add_notebooks
from course.notebooks import read_notebook, select_notebooks, tags
from helpers.colab import badges
from helpers.errors import CourseError
from helpers.files import replacing_folder
from helpers.profiles import ROOT

README = """\
# LLM Workbook: the lessons to work in

On Linux or macOS (on Windows in WSL), with Python 3.11 to 3.13:

    python3 -m venv .venv
    .venv/bin/pip install -r requirements.txt -c constraints.txt
    .venv/bin/jupyter lab notebooks

Open the lessons in the order of their numbers, and run each from its first cell on. Solve an exercise in its cell; the
cell below it checks what you wrote. `.venv/bin/python -m course progress` says what is solved, and
`.venv/bin/python -m course competition --help` what you can do with a submission of lesson 17.
"""
NEEDED = (
    "helpers",
    "course",  # for lesson 17, which runs its commands, and for `python -m course progress`
    "recipes",
    "data",
    "requirements.txt",
    "constraints.txt",
)  # besides the notebook
# What a text says about the folded solutions: a part of a sentence, or a sentence.
ABOUT_SOLUTIONS = re.compile(r",? and a folded solution|[ \t]*[^.\n]*\bsolutions? (?:is|are) folded\b[^.\n]*\.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    add_notebooks(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "student", help="folder, which is replaced")


def command(options: argparse.Namespace) -> None:
    """Write the student edition of all lessons."""
    notebooks = select_notebooks(options.notebooks.resolve())
    write_student_edition(notebooks, out := options.out.resolve())
    without = len(exercises_without_hint(notebooks))
    print(f"{len(notebooks)} notebooks without solutions are in {out}; exercises without a hint: {without}")


def student_edition(notebook: NotebookNode, stem: str) -> NotebookNode:
    """A copy of the lesson without its solutions; `stem` is its file name without .ipynb."""
    edition = copy.deepcopy(notebook)
    remover = TagRemovePreprocessor(
        enabled=True, remove_cell_tags={"solution"}, remove_all_outputs_tags={"exercise", "check"}
    )
    edition, _ = remover.preprocess(edition, {})
    for cell in edition.cells:
        cell.metadata.pop("transient", None)  # the preprocessor's own note
        if cell.cell_type == "markdown":
            # The badges open the edition with the solutions.
            cell.source = ABOUT_SOLUTIONS.sub("", cell.source.replace(badges(stem), "")).strip()
            if "hint" in tags(cell) and "<details>" not in cell.source:
                cell.source = f"<details><summary>Hint</summary>\n\n{cell.source}\n\n</details>"
        elif {"exercise", "check"} & set(tags(cell)):
            cell.execution_count = None
    edition.metadata.get("workbook", {}).pop("source_hash", None)  # it is that of the other edition
    return edition


def write_student_edition(notebooks: list[Path], out: Path) -> None:
    """Write the student edition of the notebooks, with all that they need, to the folder `out`, which is replaced.

    CourseError if `out` holds something else.
    """
    if out.exists() and not (out / NEEDED[0]).is_dir() and any(out.iterdir()):
        raise CourseError(f"{out} holds something else than a student edition: empty it, or choose another --out.")
    with replacing_folder(out) as beside:
        (beside / "notebooks").mkdir()
        for path in notebooks:
            nbformat.write(student_edition(read_notebook(path), path.stem), beside / "notebooks" / path.name)
        for name in NEEDED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, beside / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, beside / name)
        (beside / "README.md").write_text(README, encoding="utf-8")


def exercises_without_hint(notebooks: list[Path]) -> list[str]:
    """First lines of the exercises, such as "Exercise 3.1, easy: ...", that no cell tagged `hint` follows."""
    found = []
    for path in notebooks:
        cells = read_notebook(path).cells
        starts = [index for index, cell in enumerate(cells) if "exercise" in tags(cell)]
        for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
            if not any("hint" in tags(cell) for cell in cells[start:end]):
                found.append(cells[start].source.partition("\n")[0].removeprefix("# "))
    return found
