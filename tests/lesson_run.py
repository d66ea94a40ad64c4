"""Run a whole lesson in a process of its own, as the runner does: used by the tests of the lessons."""

from pathlib import Path

from nbformat import NotebookNode

from helpers import course


def run_lesson(
    notebook: Path, folder: Path, parameters: dict[str, object], cell_timeout: int = 300, timeout: int = 500
) -> tuple[NotebookNode, str]:
    """Execute the notebook into `folder` and assert that it passed; return it and all that its cells printed.

    Both timeouts are in seconds. (`course.execute` watches standard input, and would end the process of the tests.)
    """
    row = course.Row(notebook.stem, key="")
    job = course.start(row, notebook, folder, parameters, timeout=cell_timeout, one_thread=False)
    try:
        job.worker.wait(timeout=timeout)
    finally:
        course.finish(job, *course.verdict(job))
    assert row.status == "ok", row.error
    executed = course.read_notebook(Path(job.output))
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return executed, "".join(map(course.output_text, outputs))
