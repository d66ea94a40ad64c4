"""Run a whole lesson in a process of its own, as the runner does: used by the tests of the lessons."""

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from course.notebooks import core_path, output_text, read_notebook
from course.runner.jobs import finish, start, verdict
from course.runner.report import Row
from helpers.profiles import ROOT


def run_lesson(
    notebook: Path,
    folder: Path,
    parameters: dict[str, object],
    cell_timeout: int = 300,
    timeout: int = 500,
    core: bool = False,
) -> tuple[NotebookNode, str]:
    """Execute the notebook into `folder` and assert that it passed; return it and all that its cells printed.

    With `core` its further sections are left out. Both timeouts are in seconds. (`execute` watches standard input,
    and would end the process of the tests.)
    """
    if core:
        shortened = ROOT / "build" / "core" / notebook.name  # a lesson finds the course's files above its own folder
        shortened.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(core_path(read_notebook(notebook)), shortened)
        notebook = shortened
    row = Row(notebook.stem, key="")
    job = start(row, notebook, folder, {"parameters": parameters, "timeout": cell_timeout})
    try:
        job.worker.wait(timeout=timeout)
    finally:
        finish(job, *verdict(job))
    assert row.status == "ok", row.error
    executed = read_notebook(Path(job.output))
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return executed, "".join(map(output_text, outputs))
