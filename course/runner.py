"""Runs the notebooks and reports what happened: `python -m course.runner list`, `run` and `refresh`.

Every notebook is executed by papermill in a process of its own, so that a cell that fails, hangs or is killed is one
line of the report and the other notebooks still run. What passed and has not changed since is not run again.
The module knows nothing about what a notebook teaches, only its cells, tags and metadata.
"""

import argparse
import copy
import fcntl
import hashlib
import html
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from string import Template

import nbformat
import psutil
from nbformat import NotebookNode

from course.notebooks import (
    BUDGET,
    MACHINE_PATH,
    NOTEBOOKS,
    clean_output,
    code_cells,
    gigabytes,
    one_line,
    output_text,
    read_notebook,
    select_notebooks,
    source_hash,
    tags,
)
from helpers.errors import CourseError, exit_cleanly
from helpers.profiles import ROOT, get_profile

START_TIMEOUT = 120  # seconds that a kernel may take to start
POLL_INTERVAL = 0.2  # seconds between two looks at the processes
CLEAR_LINE = "\r\x1b[K"
WORKER = (
    "import json, sys; from course.runner import execute; from helpers.errors import exit_cleanly; "
    "exit_cleanly(lambda: execute(**json.loads(sys.argv[1])))"
)
# tqdm.auto draws widgets in every kernel, which nobody sees in a headless run; plain bars also reach the log.
PLAIN_BARS = "__import__('sys').modules['tqdm.auto'] = __import__('tqdm.std').std;"


@dataclass
class Row:
    """One notebook's line in the report."""

    notebook: str  # file name without .ipynb
    key: str  # changes with everything that the result depends on
    status: str = "waiting"  # then running, and in the end ok, failed or interrupted
    cells_run: int = 0
    cells: int = 0  # code cells that are not empty
    seconds: float = 0.0  # wall time, with the start of the kernel
    gib: float = 0.0  # peak of the resident memory of the kernel and the processes it started
    error: str = ""
    finished: str = ""  # UTC


@dataclass
class Job:
    """A notebook that is being executed."""

    row: Row
    worker: subprocess.Popen
    output: Path
    started: float = field(default_factory=time.monotonic)
    children: set[psutil.Process] = field(default_factory=set)  # every process ever seen below the worker


# Notebooks and what their results depend on


def surroundings_hash() -> str:
    """Hash of everything outside the notebooks that they use: helpers, data, pins and the Python version."""
    files = [*ROOT.glob("helpers/*.py"), *ROOT.glob("data/**/*"), ROOT / "requirements.txt", ROOT / "constraints.txt"]
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def cache_key(path: Path, surroundings: list[object]) -> str:
    """Key under which a result stays valid; a damaged notebook has one too, and fails when it is executed."""
    try:
        source = source_hash(read_notebook(path))
    except CourseError as error:
        source = str(error)
    return hashlib.sha256(json.dumps([source, surroundings]).encode()).hexdigest()


# One notebook, in a process of its own


def execute(source: str, output: str, parameters: dict[str, object], timeout: int) -> None:
    """Execute the notebook `source` with papermill and write it to `output`; the worker process runs this.

    `timeout` is the number of seconds that one cell may take, 0 for no limit. CourseError says which cell failed.
    """
    threading.Thread(target=end_with_the_runner, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets import default

    class OwnInterpreter(AsyncKernelManager):
        """Starts the interpreter that runs this process, whatever kernels are installed on the machine."""

        @default("kernel_spec_manager")
        def _no_installed_kernels(self) -> KernelSpecManager:
            return KernelSpecManager(kernel_dirs=[])

    notebook = read_notebook(Path(source))
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    if not any("parameters" in tags(cell) for cell in notebook.cells):
        raise CourseError("no cell is tagged parameters: tag the one that assigns profile, seed and model_id")
    try:
        known = papermill.inspect_notebook(notebook)
        if unknown := sorted(parameters.keys() - known.keys()):
            raise CourseError(f"unknown parameter {', '.join(unknown)}: the cell tagged parameters must assign it")
        papermill.execute_notebook(
            notebook,
            output,
            parameters,
            cwd=str(Path(source).parent),
            progress_bar=False,
            log_output=True,
            start_timeout=START_TIMEOUT,
            execution_timeout=timeout or None,
            kernel_manager_class=OwnInterpreter,
            extra_arguments=[f"--IPKernelApp.exec_lines={PLAIN_BARS}"],
        )
    except CourseError:
        raise
    except PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except CellTimeoutError:
        reason = f"it did not end within {timeout} s (--timeout)"
    except DeadKernelError:
        reason = "the kernel was killed, most likely out of memory"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    else:
        # papermill takes sys.exit() for a success
        if not any(output.output_type == "error" for cell in code_cells(Path(output)) for output in cell.outputs):
            return
        reason = "it ended the notebook (sys.exit?) and the cells below did not run"
    raise CourseError(f"{last_cell_begun(Path(output))}{one_line(reason)}")


def end_with_the_runner() -> None:
    """Wait for the runner to be gone, which holds the other end of standard input; then end the kernel and this."""
    os.read(0, 1)
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(1)


def last_cell_begun(path: Path) -> str:
    """Where an executed notebook stopped, as the beginning of a sentence."""
    begun = [cell for cell in code_cells(path) if cell.metadata.get("papermill", {}).get("start_time")]
    return f"code cell {len(begun)} ({one_line(begun[-1].source, 40)}): " if begun else ""


# All notebooks


def start(row: Row, source: Path, out: Path, parameters: dict[str, object], timeout: int, one_thread: bool) -> Job:
    """Start the process that executes the notebook; what it and its kernel print goes to a log beside the output."""
    output = out / source.name
    output.unlink(missing_ok=True)
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "TQDM_MININTERVAL": "5",
        "TOKENIZERS_PARALLELISM": "false",
        "JUPYTER_RUNTIME_DIR": str(out / ".jupyter"),
    }
    if parameters["profile"] == "cpu":
        environment["HF_HUB_OFFLINE"] = "1"
    if one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    arguments = {"source": str(source), "output": str(output), "parameters": parameters, "timeout": timeout}
    with output.with_suffix(".log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # an interrupt on the terminal reaches the runner alone
        )
    return Job(row, worker, output)


def sample_memory(job: Job) -> None:
    """Look at the processes below the worker, and remember them and the most memory they held together."""
    with suppress(psutil.NoSuchProcess):
        job.children.update(children := psutil.Process(job.worker.pid).children(recursive=True))
        resident = 0
        for child in children:
            with suppress(psutil.NoSuchProcess):
                resident += child.memory_info().rss
        job.row.gib = max(job.row.gib, resident / 2**30)


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
        return "ok", ""
    log = job.output.with_suffix(".log").read_text(errors="replace")
    if job.worker.returncode == 2 and (errors := re.findall(r"^error: (.+)$", log, re.MULTILINE)):
        return "failed", errors[-1]
    last_line = one_line(log.strip().rpartition("\n")[2])
    return "failed", f"its process ended with status {job.worker.returncode}: {last_line}"


def run(
    notebooks: list[Path],
    out: Path,
    *,
    profile: str = "cpu",
    seed: int = 0,
    jobs: int = 1,
    timeout: int = 600,
    fresh: bool = False,
    refresh: bool = False,
) -> list[Row]:
    """Execute the notebooks, write report.json and report.html to `out`, and return the rows of these notebooks.

    `timeout` is in seconds for each cell, 0 for none. `refresh` writes what passed back as the committed notebook.
    With `jobs` above 1 each notebook gets one thread. OSError where `out` cannot be written, CourseError if another
    run writes to it.
    """
    parameters = {"profile": get_profile(profile).name, "seed": seed}
    threads = "1" if jobs > 1 else os.environ.get("OMP_NUM_THREADS", "all")  # decides the time, which refresh keeps
    surroundings = [surroundings_hash(), parameters, threads]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        previous = {row.notebook: row for row in read_report(out)}
        sources = {path.stem: path for path in notebooks}
        report, waiting, running = [], [], []
        for path in select_notebooks(notebooks[0].parent):
            key = cache_key(path, surroundings)
            row = previous.get(path.stem)
            if row and row.key != key:
                row = None
            if path.stem in sources and (fresh or not passed(row, out)):
                waiting.append(row := Row(path.stem, key, cells=len(code_cells(path))))
            elif path.stem in sources:
                if refresh:
                    write_back(path, out, row)
                print_row(row, "unchanged")
            if row:  # also what an earlier run found about other notebooks, if it is still true
                report.append(row)
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    row = waiting.pop(0)
                    row.status = "running"
                    write_report(out, report, parameters)
                    running.append(start(row, sources[row.notebook], out, parameters, timeout, jobs > 1))
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
                        write_back(sources[job.row.notebook], out, job.row)
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
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CourseError(
                f"Another run (process {file.read()}) writes to {out}: wait until it ends, or choose another --out."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


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


# The report


def print_row(row: Row, note: str = "") -> None:
    """Print the notebook's line."""
    result = f"{row.status} ({note})" if note else row.status
    cells = f"{row.cells_run}/{row.cells} cells"
    line = f"{row.notebook:<28}{cells:>12}{row.seconds:>7.0f} s{gigabytes(row.gib):>9}  {result}"
    if sys.stdout.isatty():
        line = CLEAR_LINE + line
    print(f"{line}: {row.error}" if row.error else line, flush=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by the text; a reader sees the old or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def read_report(out: Path) -> list[Row]:
    """Rows of the last report in the folder; none if there is no report or it is of another version."""
    try:
        rows = [Row(**row) for row in json.loads((out / "report.json").read_text(encoding="utf-8"))["notebooks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    for row in rows:
        if row.status == "running":  # the run was killed
            row.status = "interrupted"
    return rows


def write_report(out: Path, rows: list[Row], parameters: dict[str, object]) -> None:
    """Write report.json and report.html."""
    report = {"parameters": parameters, "python": sys.version.split()[0], "notebooks": [asdict(row) for row in rows]}
    write_atomically(out / "report.json", json.dumps(report, indent=1) + "\n")
    lines = []
    for row in rows:
        name, error = html.escape(row.notebook), html.escape(row.error)
        executed = f'<a href="{name}.ipynb">{name}</a>' if (out / f"{row.notebook}.ipynb").exists() else name
        log = f' <a href="{name}.log">log</a>' if row.status in ("failed", "interrupted") else ""
        fields = [
            executed,
            f"{row.cells_run} / {row.cells}",
            f"{row.seconds:.0f} s",
            gigabytes(row.gib),
            f"<b>{row.status}</b> {error}{log}",
            row.finished.replace("T", " ").replace("+00:00", " UTC"),
        ]
        lines.append(f'<tr class="{row.status}">' + "".join(f"<td>{field}</td>" for field in fields) + "</tr>")
    counts = Counter(row.status for row in rows)
    summary = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    total = f"{sum(row.seconds for row in rows) / 60:.1f} minutes"
    settings = html.escape(", ".join(f"{name} {value}" for name, value in parameters.items()))
    page = PAGE.substitute(summary=summary, total=total, settings=settings, lines="\n".join(lines))
    write_atomically(out / "report.html", page)


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width" />
<title>LLM Workbook: $summary</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
td:nth-child(2), td:nth-child(3), td:nth-child(4), td:nth-child(6) { white-space: nowrap; }
.ok b { color: #1a7f37; } .failed b, .interrupted b { color: #d1242f; } .running b { color: #9a6700; }
</style>
</head>
<body>
<h1>LLM Workbook</h1>
<p>$summary; $total; $settings</p>
<table>
<tr><th>notebook</th><th>cells run</th><th>time</th><th>peak memory</th><th>result</th><th>finished</th></tr>
$lines
</table>
</body>
</html>
""")


# The committed notebooks


def write_back(path: Path, out: Path, row: Row) -> None:
    """Put outputs and measured budget of an executed notebook into the committed one, or say in `row` why not."""
    try:
        notebook = with_outputs(read_notebook(path), read_notebook(out / path.name), row)
    except CourseError as error:
        row.status, row.error = "failed", str(error)
    else:
        write_atomically(path, nbformat.writes(notebook) + "\n")


def with_outputs(source: NotebookNode, executed: NotebookNode, row: Row) -> NotebookNode:
    """The source notebook with the outputs of its execution, and nothing else that execution leaves behind."""
    notebook = copy.deepcopy(source)
    ran = [cell for cell in executed.cells if "injected-parameters" not in tags(cell)]
    if [cell.source for cell in ran] != [cell.source for cell in notebook.cells]:
        raise CourseError("it was changed while it ran: refresh it again")
    header = notebook.cells[0]
    if not BUDGET.search(header.source):
        raise CourseError("its first cell has no line for the budget: write 'cpu 0 s · 0 GB' there")
    header.source = BUDGET.sub(f"cpu {row.seconds:.0f} s · {gigabytes(row.gib)}", header.source)
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
    for leftover in ("widgets", "papermill"):
        notebook.metadata.pop(leftover, None)
    workbook = notebook.metadata.setdefault("workbook", {})
    workbook.setdefault("budget", {})["cpu"] = {"seconds": round(row.seconds), "gib": round(row.gib, 2)}
    workbook["source_hash"] = source_hash(notebook)
    return notebook


# The commands


def lessons(notebooks: list[Path]) -> list[list[str]]:
    """Number, title, time, memory and prerequisites of each lesson, as its notebook says."""
    rows = []
    for path in notebooks:
        workbook = read_notebook(path).metadata.get("workbook", {})
        budget = workbook.get("budget", {}).get("cpu")
        measured = [f"{budget['seconds'] / 60:.1f} min", gigabytes(budget["gib"])] if budget else ["-", "-"]
        after = ", ".join(workbook.get("prerequisites", [])) or "-"
        rows.append([path.stem[:2], workbook.get("title", path.stem[3:]), *measured, after])
    return rows


def lesson_table(notebooks: list[Path]) -> str:
    """The lessons as the table of README.md."""
    from helpers.colab import badge

    lines = ["| lesson | notebook | cpu | memory | after | open |", "|---|---|---|---|---|---|"]
    for path, (number, title, minutes, memory, after) in zip(notebooks, lessons(notebooks), strict=True):
        link = f"[{title}]({path.parent.name}/{path.name})"
        lines.append(f"| {number} | {link} | {minutes} | {memory} | {after} | {badge(path.stem)} |")
    return "\n".join(lines)


def update_readme(folder: Path) -> None:
    """Write the table of the lessons in `folder` into the README.md beside it, between its two markers."""
    readme = folder.parent / "README.md"
    if readme.exists():
        before, begin, rest = readme.read_text(encoding="utf-8").partition("<!-- lessons -->\n")
        _, end, after = rest.partition("<!-- /lessons -->")
        if begin and end:
            write_atomically(readme, f"{before}{begin}{lesson_table(select_notebooks(folder))}\n{end}{after}")


def natural(text: str, low: int = 0) -> int:
    """The whole number, of at least `low`, in an argument."""
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {low}")
    return int(text)


def main(arguments: list[str] | None = None) -> int | None:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m course.runner", description="Run the notebooks of the course.")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="the lessons with their measured budget")
    listing.add_argument("--markdown", action="store_true", help="as the table of README.md")
    running = commands.add_parser("run", help="execute the notebooks and report")
    refreshing = commands.add_parser(
        "refresh", help="run, and write outputs and measured budgets to the notebooks and README.md"
    )
    for command in (listing, running, refreshing):
        command.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder with the notebooks")
    for command in (running, refreshing):
        command.add_argument("--only", nargs="+", metavar="LESSON", help="lessons to run, such as 03 05")
        command.add_argument("--out", type=Path, default=ROOT / "build" / "course", help="folder for the report")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--timeout", type=natural, default=600, help="seconds for each cell, 0 for no limit")
        command.add_argument("--fresh", action="store_true", help="run also what passed and has not changed")
    running.add_argument("--profile", default="cpu", help="cpu, t4, large or auto")
    running.add_argument(
        "--jobs", type=partial(natural, low=1), default=1, help="notebooks at a time; above 1 each has one thread"
    )
    refreshing.set_defaults(refresh=True)
    handing_out = commands.add_parser("student", help="write the edition without solutions")
    handing_out.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder with the notebooks")
    handing_out.add_argument("--out", type=Path, default=ROOT / "build" / "student", help="folder, which is replaced")
    grading = commands.add_parser("grade", help="run the checks on handed-in notebooks")
    grading.add_argument("submissions", type=Path, help="folder that holds <student>/<NN_name>.ipynb")
    grading.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder with the notebooks")
    grading.add_argument("--out", type=Path, default=ROOT / "build" / "grades" / "grades.csv", help="table to write")
    grading.add_argument("--hidden", type=Path, help="folder with further checkers, NN_name.py")
    grading.add_argument("--jobs", type=partial(natural, low=1), default=1, help="submissions at a time")
    grading.add_argument("--timeout", type=partial(natural, low=1), default=120, help="seconds for each cell")
    grading.add_argument("--notebook-timeout", type=partial(natural, low=1), default=1800, help="seconds for each file")
    grading.add_argument("--memory", type=float, default=4.0, help="GiB for each submission")
    grading.add_argument("--disk", type=partial(natural, low=1), default=512, help="MiB that each may write")
    grading.add_argument("--processes", type=partial(natural, low=16), default=256, help="and threads, for each")
    grading.add_argument("--fresh", action="store_true", help="grade again what has not changed")
    grading.add_argument("--unsafe", action="store_true", help="without a sandbox: only in a container to throw away")
    options = vars(parser.parse_args(arguments))

    command, folder, only = options.pop("command"), options.pop("notebooks").resolve(), options.pop("only", None)
    notebooks = select_notebooks(folder, only)
    if command == "list":
        if options["markdown"]:
            print(lesson_table(notebooks))
        else:
            for number, title, minutes, memory, after in lessons(notebooks):
                print(f"{number}  {title:<40}{minutes:>9}{memory:>9}  after {after}")
        return 0
    if command == "student":
        from course.student import exercises_without_hint, write_student_edition

        write_student_edition(notebooks, out := options["out"].resolve())
        without = len(exercises_without_hint(notebooks))
        print(f"{len(notebooks)} notebooks without solutions are in {out}; exercises without a hint: {without}")
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill stops the kernels as Ctrl-C does
    if command == "grade":
        from course.grading import grade_command

        return grade_command(folder, options)
    out = options.pop("out").resolve()
    try:
        rows = run(notebooks, out, **options)
        if command == "refresh":
            update_readme(folder)
    except OSError as error:
        raise CourseError(f"Cannot write {error.filename or out} ({error.strerror}): make room or use --out.") from None
    good = sum(row.status == "ok" for row in rows)
    print(f"{good} of {len(rows)} notebooks passed; report: {out / 'report.html'}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    exit_cleanly(main)
