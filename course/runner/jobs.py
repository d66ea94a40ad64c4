"""The processes of notebooks that are being executed: started, watched and stopped, whatever becomes of them."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil

from course.notebooks import code_cells, one_line
from course.runner.report import Row
from course.runner.worker import START_TIMEOUT
from helpers.profiles import ROOT

WORKER = (
    "import json, sys; from course.runner.worker import execute; from helpers.errors import exit_cleanly; "
    "exit_cleanly(lambda: execute(**json.loads(sys.argv[1])))"
)


@dataclass
class Job:
    """A notebook that is being executed."""

    row: Row
    worker: subprocess.Popen
    output: Path
    started: float = field(default_factory=time.monotonic)
    children: set[psutil.Process] = field(default_factory=set)  # every process ever seen below the worker
    resident: int = 0  # bytes, the most that they held together, what they share counted for each


def start(
    row: Row,
    source: Path,
    out: Path,
    execution: dict[str, object],
    environment: dict[str, str] | None = None,
    *,
    one_thread: bool = False,
) -> Job:
    """Start the process that executes the notebook; what it and its kernel print goes to a log beside the output.

    `execution` holds the arguments of `worker.execute` besides the files.
    """
    output = out / source.name
    output.unlink(missing_ok=True)
    variables = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TQDM_MININTERVAL": "5",
        "TOKENIZERS_PARALLELISM": "false",
        "JUPYTER_RUNTIME_DIR": str(out / ".jupyter"),
    }
    if execution["parameters"]["profile"] == "cpu":
        variables["HF_HUB_OFFLINE"] = "1"
    if one_thread:
        variables["OMP_NUM_THREADS"] = "1"
    arguments = {"source": str(source), "output": str(output), **execution}
    with output.with_suffix(".log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=variables | (environment or {}),
            start_new_session=True,  # an interrupt on the terminal reaches the runner alone
        )
    return Job(row, worker, output)


def sample_memory(job: Job) -> None:
    """Look at the processes below the worker, and remember them and the most memory they held together."""
    with suppress(psutil.NoSuchProcess):
        job.children.update(children := psutil.Process(job.worker.pid).children(recursive=True))
        resident = _total(children, lambda child: child.memory_info().rss)
        if resident > job.resident:  # to count once what processes share is slow, and only Linux can do it
            job.resident = resident
            held = _total(children, lambda child: child.memory_full_info().pss) if psutil.LINUX else resident
            job.row.gib = max(job.row.gib, held / 2**30)


def _total(processes: Iterable[psutil.Process], memory: Callable[[psutil.Process], int]) -> int:
    """Bytes of those processes that are still there."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += memory(process)
    return total


def stop(job: Job) -> None:
    """End the worker, its kernel and everything that the kernel started."""
    sample_memory(job)
    job.worker.kill()
    job.worker.wait()
    job.worker.stdin.close()
    for process in job.children:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def hangs(job: Job, timeout: int) -> bool:
    """Whether the worker itself is stuck: it logs the beginning of every cell, and a cell has its time limit."""
    silence = time.time() - job.output.with_suffix(".log").stat().st_mtime
    return timeout > 0 and silence > timeout + 2 * START_TIMEOUT


def finish(job: Job, status: str, error: str = "") -> None:
    """Stop what is left of the job and fill in its row."""
    stop(job)
    job.row.status, job.row.error = status, error
    job.row.seconds = time.monotonic() - job.started
    job.row.cells_run = sum(bool(cell.execution_count) for cell in code_cells(job.output))
    job.row.finished = datetime.now(UTC).isoformat(timespec="seconds")


def verdict(job: Job) -> tuple[str, str]:
    """Status and error of a worker that has ended."""
    if job.worker.returncode == 0:
        failed = [cell for cell in code_cells(job.output) if any(o.output_type == "error" for o in cell.outputs)]
        if failed:  # only with keep_going
            return "ok", f"{len(failed)} cells failed, first: {one_line(failed[0].source, 60)}"
        return "ok", ""
    log = job.output.with_suffix(".log").read_text(errors="replace")
    if job.worker.returncode == 2 and (errors := re.findall(r"^error: (.+)$", log, re.MULTILINE)):
        return "failed", errors[-1]
    last_line = one_line(log.strip().rpartition("\n")[2])
    return "failed", f"its process ended with status {job.worker.returncode}: {last_line}"
