"""Puts what a run measured into the committed notebooks, their figures and the tables of README.md."""

import base64
import copy
import html
from pathlib import Path
from textwrap import shorten

import nbformat
from nbformat import NotebookNode

from course.notebooks import (
    BUDGET,
    MACHINE_PATH,
    clean_output,
    gigabytes,
    output_text,
    read_notebook,
    select_notebooks,
    source_hash,
    tags,
)
from course.runner.report import Row
from course.study_time import study_time
from course.translation import write_readme
from helpers.colab import badges
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT


def write_back(path: Path, out: Path, row: Row, alone: bool) -> None:
    """Put the outputs of an executed notebook into the committed one, or say in `row` why not.

    Its time and memory are written down if it ran `alone`.

    Its headline figure goes to the folder figures/ beside the notebooks' folder, if that is there.
    """
    try:
        notebook = with_outputs(read_notebook(path), read_notebook(out / path.name), row if alone else None)
    except CourseError as error:
        row.status, row.error = "failed", str(error)
        return
    write_atomically(path, nbformat.writes(notebook) + "\n")
    figure, folder = headline(notebook), path.parent.parent / "figures"
    if figure and folder.is_dir():
        (folder / f"{path.stem}.png").write_bytes(base64.b64decode(figure.data["image/png"]))


def headline(notebook: NotebookNode) -> NotebookNode | None:
    """The output with the figure that stands for the lesson: the first of the cell tagged `headline`."""
    cells = [cell for cell in notebook.cells if "headline" in tags(cell)]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return next((output for output in outputs if "image/png" in output.get("data", {})), None)


def with_outputs(source: NotebookNode, executed: NotebookNode, row: Row | None) -> NotebookNode:
    """The source notebook with the outputs of its execution, and nothing else that execution leaves behind."""
    notebook = copy.deepcopy(source)
    ran = [cell for cell in executed.cells if "injected-parameters" not in tags(cell)]
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise CourseError("it was changed while it ran: refresh it again")
    header = notebook.cells[0]
    if not (said := BUDGET.search(header.source)):
        raise CourseError("its first cell has no line for the budget: write 'cpu 0 s · 0 GB' there")
    measured = f"cpu {row.seconds:.0f} s · {gigabytes(row.gib)}" if row else said[1]
    count = 0
    for cell, done in zip(notebook.cells, ran, strict=True):
        for leftover in ("execution", "papermill"):
            cell.metadata.pop(leftover, None)
        if cell.cell_type == "code":
            cell.outputs = [clean for output in done.outputs if (clean := clean_output(output))]
            cell.execution_count = (count := count + 1) if cell.source.strip() else None
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
                if found := MACHINE_PATH.search(output_text(output)):
                    raise CourseError(f"code cell {count} prints {found[0]}: print no path, or one relative to ROOT")
    header.source = BUDGET.sub(f"{measured} | {study_time(notebook)}", header.source)
    for leftover in ("widgets", "papermill"):
        notebook.metadata.pop(leftover, None)
    workbook = notebook.metadata.setdefault("workbook", {})
    if row:
        workbook.setdefault("budget", {})["cpu"] = {"seconds": round(row.seconds), "gib": round(row.gib, 2)}
    workbook["source_hash"] = source_hash(notebook)
    return notebook


def lessons(notebooks: list[Path]) -> list[list[str]]:
    """Number, title, time, memory, minutes of study and prerequisites of each lesson, as its notebook says."""
    rows = []
    for path in notebooks:
        notebook = read_notebook(path)
        workbook = notebook.metadata.get("workbook", {})
        budget = workbook.get("budget", {}).get("cpu")
        measured = [f"{budget['seconds'] / 60:.1f} min", gigabytes(budget["gib"])] if budget else ["-", "-"]
        after = ", ".join(workbook.get("prerequisites", [])) or "-"
        rows.append([path.stem[:2], workbook.get("title", path.stem[3:]), *measured, study_time(notebook), after])
    return rows


def lesson_table(notebooks: list[Path]) -> str:
    """The lessons as the table of README.md."""
    lines = ["| lesson | notebook | cpu | memory | study | after | open |", "|---|---|---|---|---|---|---|"]
    for path, (number, title, minutes, memory, study, after) in zip(notebooks, lessons(notebooks), strict=True):
        link = f"[{title}]({path.parent.name}/{path.name})"
        study = study.replace(" | ", "; ")
        lines.append(f"| {number} | {link} | {minutes} | {memory} | {study} | {after} | {badges(path.stem)} |")
    return "\n".join(lines)


def gallery(notebooks: list[Path]) -> str:
    """The headline figures of the lessons as HTML for README.md, each a link to its lesson."""
    lines = []
    for path in notebooks:
        figure = headline(read_notebook(path))
        if figure and (path.parent.parent / "figures" / f"{path.stem}.png").exists():
            alt = html.escape(shorten(figure.data.get("text/plain", path.stem), 160, placeholder=" ..."))
            image = f'<img src="figures/{path.stem}.png" alt="{alt}" width="49%">'
            lines.append(f'<a href="{path.parent.name}/{path.name}">{image}</a>')
    return "\n".join(lines)


def update_readme(folder: Path) -> None:
    """Write the table and the figures of the lessons in `folder` into the README.md beside it, between its markers.

    That of the course has a translation, which follows.
    """
    readme = folder.parent / "README.md"
    if not readme.exists():
        return
    text = readme.read_text(encoding="utf-8")
    notebooks = select_notebooks(folder)
    for name, content in {"lessons": lesson_table(notebooks), "figures": gallery(notebooks)}.items():
        before, begin, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if begin and end:
            text = f"{before}{begin}{content}\n{end}{after}"
    write_atomically(readme, text)
    if folder.parent == ROOT:
        write_readme()
