"""Runs a sequence of notebooks: what passed and has not changed is not run again, and a failure stops no other."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from course.notebooks import code_cells, select_notebooks
from course.runner.jobs import Job, finish, hangs, sample_memory, start, verdict
from course.runner.keys import lesson_key
from course.runner.refresh import write_back
from course.runner.report import CLEAR_LINE, Row, print_row, read_report, write_report
from course.runner.worker import last_cell_begun
from helpers.errors import CourseError
from helpers.profiles import get_profile

POLL_INTERVAL = 0.2  # seconds between two looks at the processes


def run(
    notebooks: list[Path],
    out: Path,
    *,
    profile: str = "cpu",
    model_id: str = "",
    seed: int = 0,
    budget: float | None = None,
    jobs: int = 1,
    timeout: int = 600,
    fresh: bool = False,
    refresh: bool = False,
    environment: dict[str, str] | None = None,
    startup: str = "",
    keep_going: bool = False,
) -> list[Row]:
    """Execute the notebooks, write report.json and report.html to `out`, and return the rows of these notebooks.

    `timeout` is in seconds for each cell, 0 for none. `refresh` writes what passed back as the committed notebook, with
    its time and memory only if it had the machine for itself (`jobs` is 1). `model_id` replaces the profile's model;
    `budget` is the lessons' own if None.
    With `jobs` above 1 each notebook gets one thread. `environment` has further variables, `startup` a line of Python
    for the kernel before the first cell. With `keep_going` a cell that raises does not end its notebook, which then
    passes with the failures in its row's `error`. OSError where `out` cannot be written, CourseError if another
    run writes to it.
    """
    parameters = {"profile": get_profile(profile, model_id or None).name, "seed": seed}
    if model_id:
        parameters["model_id"] = model_id
    if budget is not None:
        parameters["budget"] = budget
    threads = "1" if jobs > 1 else os.environ.get("OMP_NUM_THREADS", "all")  # decides the time, which refresh keeps
    conditions = [parameters, threads, environment, startup, keep_going]
    execution = {"parameters": parameters, "timeout": timeout, "startup": startup, "keep_going": keep_going}
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        previous = {row.notebook: row for row in read_report(out)}
        sources = {path.stem: path for path in notebooks}
        report, waiting, running = [], [], []
        for path in select_notebooks(notebooks[0].parent):
            key = lesson_key(path, conditions)
            row = previous.get(path.stem)
            if row and row.key != key:
                row = None
            if path.stem in sources and (fresh or not passed(row, out)):
                waiting.append(row := Row(path.stem, key, cells=len(code_cells(path))))
            elif path.stem in sources:
                if refresh:
                    write_back(path, out, row, jobs == 1)
                print_row(row, "unchanged")
            if row:  # also what an earlier run found about other notebooks, if it is still true
                report.append(row)
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    row.status = "running"
                    write_report(out, report, parameters)
                    source = sources[row.notebook]
                    running.append(start(row, source, out, execution, environment or {}, one_thread=jobs > 1))
                time.sleep(POLL_INTERVAL)
                for job in list(running):
                    sample_memory(job)
                    if job.worker.poll() is not None:
                        finish(job, *verdict(job))
                    elif hangs(job, timeout):
                        finish(job, "failed", f"{last_cell_begun(job.output)}its process no longer answers")
                    else:
                        continue
                    running.remove(job)
                    if refresh and job.row.status == "ok":
                        write_back(sources[job.row.notebook], out, job.row, jobs == 1)
                    print_row(job.row)
                    write_report(out, report, parameters)
                print_progress(running)
        finally:
            for job in running:
                finish(job, "interrupted")
                print_row(job.row)
            shutil.rmtree(out / ".jupyter", ignore_errors=True)
            write_report(out, report, parameters)
    return [row for row in report if row.notebook in sources]


def passed(row: Row | None, out: Path) -> bool:
    """Whether the row tells of a notebook that passed, and the executed notebook is still there."""
    return row is not None and row.status == "ok" and (out / f"{row.notebook}.ipynb").exists()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder for this run. The system frees the lock when the process ends, however it ends."""
    path = out / ".lock"
    try:
        with FileLock(path, timeout=0):
            path.write_text(str(os.getpid()))
            yield
    except Timeout:
        raise CourseError(
            f"Another run (process {path.read_text()}) writes to {out}: wait until it ends, or choose another --out."
        ) from None


def print_progress(running: list[Job]) -> None:
    """On a terminal, keep one line up to date that says what is running, in which cell and for how long."""
    if not sys.stdout.isatty():
        return
    states = []
    for job in running:
        cells = re.findall(rb"^Executing Cell (\d+)", job.output.with_suffix(".log").read_bytes(), re.MULTILINE)
        where = f"cell {cells[-1].decode()}" if cells else "starting"
        states.append(f"{job.row.notebook}: {where}, {time.monotonic() - job.started:.0f} s")
    line = "   ".join(states)[: shutil.get_terminal_size().columns - 1]
    print(f"{CLEAR_LINE}{line}", end="", flush=True)
