"""Grades handed-in notebooks: `python -m course.runner grade SUBMISSIONS/ --out grades.csv`.

Of a submission only the exercise cells are used. They are placed into the instructor's notebook, which runs in a
sandbox of its own, and the instructor's checks, and hidden ones, say what they are worth. Nothing that a submission
does ends the grading or reaches another submission. docs/grading.md says what is guaranteed and what is not.
"""

import ast
import csv
import hashlib
import hmac
import html
import io
import json
import os
import re
import secrets
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from string import Template
from typing import Any

import psutil
from nbformat import NotebookNode

from course.grading import sandbox
from course.notebooks import gigabytes, one_line, read_notebook, select_notebooks, source_hash, tags
from course.runner import locked, surroundings_hash
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

START_SECONDS = 120  # for the sandbox and the imports
GRACE_SECONDS = 5  # between asking a cell to stop and killing it
POLL_SECONDS = 0.1
LARGEST_FILE = 50 * 2**20  # bytes of a handed-in notebook
LONGEST_ANSWER = 2**16  # bytes
NUMBER = re.compile(r"\bcheck\(\s*[\"']([\d.]+)[\"']")  # of an exercise, in its check cell
# What honest answers to exercises have no use for.
SUSPICIOUS = re.compile(
    r"\b(?:gc|ctypes|inspect|_getframe|__globals__|__builtins__|f_back|sys\.modules|settrace|setprofile|__eq__|socket"
    r"|helpers\.exercises|subprocess|os\.(?:system|fork|kill|_exit|write))\b|globals\(|/proc\b"
)
STATUSES = ("correct", "not yet", "not attempted", "error")  # of an exercise that was run
ANSWERS = {  # of the worker, by what it was asked to do
    "context": {"error": str},
    "attempt": {"error": str, "missing": list, "replaced": list},
    "check": {"status": str, "message": str},
}
COLUMNS = ["student", "notebook", "exercise", "status", "message", "seconds", "memory"]
WORKER = [sys.executable, "-s", "-m", "course.grading.worker"]

# Run in a sandbox before the first submission: says what does not hold there.
PROBE = """\
import os, socket, time
if any(name != "lo" for _, name in socket.if_nameindex()):
    raise RuntimeError("there is a network")
if seen := [path for path in {hidden!r} if os.path.exists(path)]:
    raise RuntimeError(f"{{seen[0]}} can be seen")
if writable := [path for path in ("/usr", "/course/helpers", "/course/data") if os.access(path, os.W_OK)]:
    raise RuntimeError(f"{{writable[0]}} can be written to")
children = []
try:
    for _ in range({processes}):
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
        children.append(child)
except BlockingIOError:
    pass
finally:
    for child in children:
        os.kill(child, 9)
        os.waitpid(child, 0)
if len(children) == {processes}:
    raise RuntimeError("the number of processes is not limited")
"""


@dataclass(frozen=True)
class Settings:
    """How submissions are run."""

    limits: sandbox.Limits = field(default_factory=sandbox.Limits)
    cell_seconds: int = 120  # for each cell, and each check
    notebook_seconds: int = 1800  # for all of a submission
    one_thread: bool = False
    unsafe: bool = False  # without a sandbox, in processes of their own only


@dataclass(frozen=True)
class Exercise:
    """An exercise of the instructor's notebook."""

    number: str
    cell_id: str
    stub: str
    names: tuple[str, ...]  # what the cell defines
    checks: tuple[tuple[str, str], ...]  # name of the row, and source: the public check, then perhaps a hidden one
    solution: str


@dataclass(frozen=True)
class Lesson:
    """What the grader needs of an instructor's notebook."""

    stem: str
    steps: tuple[str | Exercise, ...]  # sources of the lesson's cells and exercises, in order, up to the last check
    sources: frozenset[str]  # of all its code cells
    key: str  # changes with everything that the grades depend on, but for the submissions

    @property
    def exercises(self) -> list[Exercise]:
        """Its exercises in order."""
        return [step for step in self.steps if isinstance(step, Exercise)]


@dataclass
class Row:
    """One exercise of one submission, or a file that could not be graded."""

    student: str
    notebook: str
    exercise: str
    status: str  # correct, not yet, not attempted, error, missing, rejected, not graded
    message: str = ""
    seconds: float = 0.0
    gib: float = 0.0


@dataclass
class Submission:
    """A handed-in file."""

    student: str
    path: Path
    lesson: Lesson | None
    problem: str = ""
    key: str = ""


class _EndedError(Exception):
    """The processes of a submission are gone; the message says why."""


class _LessonError(Exception):
    """A cell of the lesson itself failed."""


# The instructor's side


def read_lesson(path: Path, hidden: Path | None, settings: Settings) -> Lesson:
    """The lesson in the notebook, with the checkers that `hidden`/NN_name.py adds; CourseError if they do not fit."""
    notebook = read_notebook(path)
    extra = (hidden / f"{path.stem}.py") if hidden else None
    extra_source = extra.read_text(encoding="utf-8") if extra and extra.exists() else ""
    checkers = _checkers(extra_source, extra)
    steps: list[str | Exercise] = []
    stub: NotebookNode | None = None
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        if "exercise" in tags(cell):
            stub = cell
        elif "check" in tags(cell) and stub:
            if not (found := NUMBER.search(cell.source)):
                raise CourseError(f"{path.name}: a check cell calls no check(number, ...): mend it.")
            checks = [(found[1], cell.source)]
            if parameters := checkers.pop(found[1], None):
                name = f"check_{found[1].replace('.', '_')}"
                call = f"check({found[1]!r}, {', '.join([name, *parameters])})"
                checks.append((f"{found[1]} hidden", f"{extra_source}\n\n{call}\n"))
            after = next(
                (later for later in notebook.cells[index:] if {"solution", "exercise"} & set(tags(later))), None
            )
            solution = after.source if after and "solution" in tags(after) else ""
            blocks = re.findall(r"```python\n(.*?)```", solution, re.DOTALL)
            names = [node.name for node in ast.parse(stub.source).body if isinstance(node, _DEFINITIONS)]
            steps.append(Exercise(found[1], stub.id, stub.source, tuple(names), tuple(checks), "\n".join(blocks)))
            stub = None
        else:
            steps.append(cell.source)
            if "parameters" in tags(cell):
                steps.append('profile = "cpu"\nseed = 0')
    if checkers:
        raise CourseError(f"{extra} has a checker for {next(iter(checkers))}, which is no exercise of {path.stem}.")
    while steps and isinstance(steps[-1], str):  # what comes after the last check changes nothing
        steps.pop()
    if not steps:
        raise CourseError(f"{path.name} has no exercises: hand in another lesson, or tag its exercises and checks.")
    parts = [source_hash(notebook), extra_source, surroundings_hash(), asdict(settings)]
    sources = frozenset(cell.source.strip() for cell in notebook.cells if cell.cell_type == "code")
    return Lesson(path.stem, tuple(steps), sources, hashlib.sha256(json.dumps(parts).encode()).hexdigest())


_DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def _checkers(source: str, path: Path | None) -> dict[str, list[str]]:
    """Parameters of the functions named like check_3_1, by exercise."""
    try:
        functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise CourseError(f"{path} is not Python (line {error.lineno}: {error.msg}): mend it.") from None
    found = {function.name: [argument.arg for argument in function.args.args] for function in functions}
    return {name[6:].replace("_", "."): args for name, args in found.items() if re.fullmatch(r"check_\d+_\d+", name)}


# The student's side


def find_submissions(folder: Path, lessons: dict[str, Lesson], known: list[str]) -> list[Submission]:
    """What was handed in: FOLDER/<student>/<NN_name>.ipynb. Anything else is one that has a problem."""
    found = []
    for student in sorted(folder.iterdir()):
        if student.name.startswith("."):
            continue
        if student.is_symlink() or not student.is_dir():
            found.append(Submission("", student, None, "expected a folder for each student"))
            continue
        try:
            files = sorted(path for path in student.iterdir() if not path.name.startswith("."))
        except OSError as error:
            found.append(Submission("", student, None, f"cannot be read ({error.strerror})"))
            continue
        for path in files:
            lesson = lessons.get(path.stem) if path.suffix == ".ipynb" else None
            submission = Submission(_readable(student), path, lesson)
            if path.is_symlink() or not path.is_file():
                submission.problem = "not a plain file"
            elif lesson is None:
                submission.problem = f"no lesson has this name: expected for example {known[0]}.ipynb"
            elif path.stat().st_size > LARGEST_FILE:
                submission.problem = f"larger than {LARGEST_FILE >> 20} MiB"
            else:
                try:
                    owned = os.fsencode(f"{lesson.key}/{student.name}/") + path.read_bytes()
                    submission.key = hashlib.sha256(owned).hexdigest()
                except OSError as error:
                    submission.problem = f"cannot be read ({error.strerror})"
            found.append(submission)
    return found


def _readable(path: Path) -> str:
    """Its name as text that can be written; Linux allows names that are none."""
    return path.name.encode("utf-8", "replace").decode()


def find_attempts(lesson: Lesson, notebook: NotebookNode) -> tuple[dict[str, str], int]:
    """Sources of the exercises' cells by number, and the number of other code cells that the lesson does not have.

    An exercise is found by the id of its cell, by its first line (`# Exercise 3.1`), or by what it defines.
    """
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and isinstance(cell.source, str)]
    attempts: dict[str, str] = {}
    for exercise in lesson.exercises:
        title = re.compile(rf"#\s*Exercise\s+{re.escape(exercise.number)}\b(?!\.?\d)")
        defines = re.compile(rf"^(?:def|class)\s+(?:{'|'.join(exercise.names)})\b", re.MULTILINE)
        for matches in (
            lambda cell, wanted=exercise.cell_id: cell.get("id") == wanted,
            lambda cell, wanted=title: wanted.match(cell.source),
            lambda cell, wanted=defines: wanted.search(cell.source),
        ):
            if cells := [cell for cell in code if matches(cell)]:
                attempts[exercise.number] = cells[-1].source
                break
    known = lesson.sources | {source.strip() for source in attempts.values()}
    return attempts, sum(bool(cell.source.strip()) and cell.source.strip() not in known for cell in code)


# One submission


class Session:
    """A worker in a sandbox, and the most memory that its processes held together."""

    def __init__(self, process: subprocess.Popen, settings: Settings, complaints: Path, stop: threading.Event) -> None:
        """Greet the worker, which has just been started."""
        self.process, self.settings, self.complaints, self.stop = process, settings, complaints, stop
        self.token = secrets.token_hex(16)
        self.gib = 0.0
        self.received = b""
        self.started = False
        os.set_blocking(process.stdin.fileno(), False)
        self.unsent = json.dumps({"token": self.token}).encode() + b"\n"

    def ask(self, seconds: int, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer; _EndedError if there is none."""
        self.unsent += json.dumps({**request, "seconds": seconds}).encode() + b"\n"
        end = time.monotonic() + seconds + GRACE_SECONDS + (0 if self.started else START_SECONDS)
        answers, requests = self.process.stdout.fileno(), self.process.stdin.fileno()
        while b"\n" not in self.received:
            if self.stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > end:
                raise _EndedError(f"did not end within {seconds} s and had to be killed")
            self._watch_memory()
            readable, writable, _ = select.select([answers], [requests] if self.unsent else [], [], POLL_SECONDS)
            if writable:
                try:
                    self.unsent = self.unsent[os.write(requests, self.unsent) :]
                except BrokenPipeError:  # nobody reads any more, and the other pipe says why
                    self.unsent = b""
            if readable:
                if not (chunk := os.read(answers, LONGEST_ANSWER)):
                    raise _EndedError(self._why())
                self.received += chunk
            if len(self.received) > LONGEST_ANSWER:
                raise _EndedError("wrote to the grader's channel")
        line, _, self.received = self.received.partition(b"\n")
        try:
            answer = json.loads(line)
            genuine = hmac.compare_digest(str(answer.pop("token")).encode(), self.token.encode())
            genuine = genuine and all(isinstance(answer.get(k), kind) for k, kind in ANSWERS[request["do"]].items())
            genuine = genuine and answer.get("status", "correct") in STATUSES
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            genuine = False
        if not genuine or self.received:
            raise _EndedError("wrote to the grader's channel")
        self.started = True
        return answer

    def _watch_memory(self) -> None:
        processes = []
        with suppress(psutil.NoSuchProcess):
            processes = psutil.Process(self.process.pid).children(recursive=True)
        gib = _resident(processes)
        if gib > self.settings.limits.gib:
            gib = _resident(processes, shared_once=True)  # dear, and a fork shares nearly everything
        self.gib = max(self.gib, gib)
        if gib > self.settings.limits.gib:
            raise _EndedError(f"held more than {gigabytes(self.settings.limits.gib)} of memory")

    def _why(self) -> str:
        if not self.started:
            text = self.complaints.read_text(errors="replace")
            return f"the worker did not start: {one_line(text.strip().rpartition(chr(10))[2]) or 'no reason given'}"
        return "ended its process (os._exit, a crash, or a kill)"


def _resident(processes: list[psutil.Process], shared_once: bool = False) -> float:
    """GiB of memory that the processes hold; what they share counts for each, or in equal parts for all."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            try:
                total += process.memory_full_info().pss if shared_once else process.memory_info().rss
            except psutil.AccessDenied:
                total += process.memory_info().rss
    return total / 2**30


@contextmanager
def session(settings: Settings, user: int, stop: threading.Event) -> Iterator[Session]:
    """A worker of its own, in a folder of its own; nothing of it is left afterwards."""
    environment = {
        "HOME": "/tmp",
        "USER": "student",
        "LANG": "C.UTF-8",
        "PYTHONPATH": sandbox.COURSE,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "LLM_WORKBOOK_PROFILE": "cpu",
        "MPLBACKEND": "agg",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }
    if settings.one_thread:
        environment["OMP_NUM_THREADS"] = "1"
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True)))
        (root := folder / "root").mkdir()
        complaints = stack.enter_context((folder / "complaints").open("wb"))
        if settings.unsafe:
            process = _start_unsafe(root, environment, complaints.fileno())
        else:
            process = sandbox.start(WORKER, root, settings.limits, environment, user, complaints.fileno())
        try:
            yield Session(process, settings, folder / "complaints", stop)
        finally:
            _kill(process)


def _start_unsafe(root: Path, environment: dict[str, str], errors: int) -> subprocess.Popen:
    """The worker without a sandbox."""
    for name in sandbox.SEEN:
        (root / name).symlink_to(ROOT / name)
    (root / "notebooks").mkdir()
    return subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=root / "notebooks",
        env={"PATH": os.environ.get("PATH", ""), **environment, "PYTHONPATH": str(root), "HOME": str(root)},
        start_new_session=True,
    )


def _kill(process: subprocess.Popen) -> None:
    """End the process and everything below it."""
    below = []
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
    for child in below:  # in a sandbox the kernel does this, and here we wait for it
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(below, timeout=10)


def grade_submission(
    student: str, lesson: Lesson, attempts: dict[str, str], settings: Settings, user: int, stop: threading.Event
) -> list[Row]:
    """Rows of a submission whose exercise cells are `attempts`, by number.

    An exercise that ends its process costs nothing but itself: the others are run again without it.
    """
    rows: dict[str, Row] = {}
    end = time.monotonic() + settings.notebook_seconds

    def note(
        exercise: Exercise, status: str, message: str, seconds: float = 0.0, gib: float = 0.0, only: str = ""
    ) -> None:
        """Fill in the rows of the exercise that are still empty, or only one of them."""
        row = Row(student, lesson.stem, "", status, one_line(message), round(seconds, 1), round(gib, 2))
        for name, _ in exercise.checks:
            if only in ("", name):
                rows.setdefault(name, replace(row, exercise=name))

    pending = []
    for exercise in lesson.exercises:
        source = attempts.get(exercise.number)
        if source is None:
            note(exercise, "missing", f"no cell begins with # Exercise {exercise.number} or defines its function")
        elif source.strip() == exercise.stub.strip():
            note(exercise, "not attempted", "not attempted yet")
        else:
            pending.append(exercise)
    while pending:
        begun: list[Exercise] = []
        try:
            with session(settings, user, stop) as worker:
                for exercise in _run(worker, lesson, pending, settings, end, begun):
                    started, worker.gib = time.monotonic(), 0.0
                    try:
                        for name, status, message in _judge(worker, exercise, attempts[exercise.number], settings):
                            note(exercise, status, message, time.monotonic() - started, worker.gib, only=name)
                            started = time.monotonic()
                    except _EndedError as ended:
                        note(exercise, "error", f"it {ended}", time.monotonic() - started, worker.gib)
                        raise
        except (_EndedError, _LessonError) as error:
            if not begun:  # the lesson itself, so there is nothing to try again
                late = time.monotonic() >= end
                for exercise in pending:
                    note(exercise, "error" if late else "not graded", str(error))
                break
        pending = [exercise for exercise in pending if exercise not in begun]
    order = [name for exercise in lesson.exercises for name, _ in exercise.checks]
    for exercise in lesson.exercises:
        if odd := sorted(set(SUSPICIOUS.findall(attempts.get(exercise.number, "")))):
            rows[exercise.number].message += f" (read it: it uses {', '.join(odd)})"
    return [rows[name] for name in order]


def _run(
    worker: Session,
    lesson: Lesson,
    pending: list[Exercise],
    settings: Settings,
    end: float,
    begun: list[Exercise],
) -> Iterator[Exercise]:
    """Run the lesson's cells and yield each pending exercise at its place; `begun` gets those that were yielded."""
    left = len(pending)
    for step in lesson.steps:
        if not left:
            return
        remaining = int(end - time.monotonic())
        if remaining <= 0:
            begun.clear()
            raise _LessonError(f"the {settings.notebook_seconds} s for a notebook were over before it")
        if isinstance(step, str):
            answer = worker.ask(min(settings.cell_seconds, remaining), do="context", source=step)
            if answer.get("error"):
                raise _LessonError(f"the lesson's cell {one_line(step, 40)!r} {answer['error']}")
        elif step in pending:
            begun.append(step)
            left -= 1
            yield step


def _judge(worker: Session, exercise: Exercise, source: str, settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Run an attempt and its checks; yield name of the row, status and message of each check."""
    answer = worker.ask(settings.cell_seconds, do="attempt", source=source, names=list(exercise.names))
    problem, note = "", ""
    if answer["error"]:
        problem = f"the cell {answer['error']}"
    elif answer["missing"]:
        names = ", ".join(map(str, answer["missing"]))
        problem = f"the cell does not define {names}: its name must stay as it is"
    if answer["replaced"]:
        note = f" (put back what the cell replaced: {', '.join(map(str, answer['replaced']))})"
    for name, check in exercise.checks:
        if problem:
            yield name, "error", problem + note
        else:
            found = worker.ask(settings.cell_seconds, do="check", source=check)
            yield name, found["status"], found["message"] + note


# All submissions


def grade(
    submissions: Path,
    out: Path,
    *,
    notebooks: Path,
    hidden: Path | None = None,
    jobs: int = 1,
    settings: Settings | None = None,
    fresh: bool = False,
) -> list[Row]:
    """Grade what lies in `submissions`, write `out` and an .html and a .json beside it, and return the rows.

    What has been graded before and has not changed is not run again, unless `fresh`.
    """
    settings = settings or Settings()
    if not submissions.is_dir():
        raise CourseError(f"{submissions} is no folder: give the one that holds a folder for each student.")
    if hidden and not hidden.is_dir():
        raise CourseError(f"{hidden} is no folder: give the one that holds files such as 03_name.py.")
    if out.suffix != ".csv":
        raise CourseError(f"{out} does not end in .csv: name the table, such as grades.csv.")
    if not settings.unsafe and (reason := sandbox.missing()):
        raise CourseError(
            f"Submissions cannot be shut in here ({reason}): grade on Linux, or in a container that you throw away "
            "with --unsafe."
        )
    paths = {path.stem: path for path in select_notebooks(notebooks)}
    handed_in = {path.stem for path in submissions.glob("*/*.ipynb")}
    lessons = {stem: read_lesson(paths[stem], hidden, settings) for stem in sorted(paths) if stem in handed_in}
    found = find_submissions(submissions, lessons, sorted(paths))
    out.parent.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    first_user = 1_000_000 + os.getpid() * 64  # users of this run alone
    with locked(out.parent):
        known = {} if fresh else _read_state(out)
        state: dict[str, list[Row]] = {}
        reports: dict[int, list[Row]] = {}
        waiting = []
        for place, submission in enumerate(found):
            if submission.problem:
                name = _readable(submission.path)
                reports[place] = [Row(submission.student, name, "", "rejected", submission.problem)]
            elif submission.key in known:
                reports[place] = state[submission.key] = known[submission.key]
            else:
                waiting.append(place)
                continue
            print_submission(submission, reports[place], "unchanged" if submission.key else "")
        _write(out, reports, state)
        if waiting and not settings.unsafe:
            _probe(settings, [submissions, out.parent, notebooks, *([hidden] if hidden else [])], first_user, stop)
        for stem in sorted({found[place].lesson.stem for place in waiting}):
            key = f"reference {lessons[stem].key}"
            state[key] = known.get(key) or _reference(lessons[stem], settings, first_user, stop)
        users: SimpleQueue[int] = SimpleQueue()  # that nothing is running as
        for number in range(1, jobs + 1):
            users.put(first_user + number)
        with ThreadPoolExecutor(jobs) as pool:
            try:
                futures = {pool.submit(_grade, found[place], settings, users, stop): place for place in waiting}
                for future in as_completed(futures):
                    place = futures[future]
                    reports[place] = future.result()
                    if all(row.status != "not graded" for row in reports[place]):
                        state[found[place].key] = reports[place]
                    print_submission(found[place], reports[place])
                    _write(out, reports, state)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return [row for place in sorted(reports) for row in reports[place]]


def grade_command(notebooks: Path, options: dict[str, Any]) -> int:
    """`python -m course.runner grade`; exit status 0 when everything was graded or rejected."""
    settings = Settings(
        sandbox.Limits(options["memory"], options["disk"], options["processes"]),
        options["timeout"],
        options["notebook_timeout"],
        one_thread=options["jobs"] > 1,
        unsafe=options["unsafe"],
    )
    out = options["out"].resolve()
    hidden = options["hidden"] and options["hidden"].resolve()
    try:
        rows = grade(
            options["submissions"].resolve(),
            out,
            notebooks=notebooks,
            hidden=hidden,
            jobs=options["jobs"],
            settings=settings,
            fresh=options["fresh"],
        )
    except OSError as error:
        raise CourseError(f"Cannot use {error.filename or out} ({error.strerror}): mend that, or use --out.") from None
    counts = Counter(row.status for row in rows)
    print(", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "nothing was handed in")
    print(f"table: {out}; page: {out.with_suffix('.html')}")
    return 0


def _grade(submission: Submission, settings: Settings, users: SimpleQueue, stop: threading.Event) -> list[Row]:
    """Rows of a submission, whatever it is."""
    student, lesson = submission.student, submission.lesson
    try:
        notebook = _parse(submission.path.read_bytes())
        attempts, extra = find_attempts(lesson, notebook)
    except Exception as error:  # whatever nbformat makes of a damaged file
        return [Row(student, lesson.stem, "", "rejected", f"not a readable notebook ({one_line(error)})")]
    user = users.get()
    try:
        rows = grade_submission(student, lesson, attempts, settings, user, stop)
    except Exception as error:  # one submission is not to end the grading of all
        return [Row(student, lesson.stem, "", "not graded", f"{type(error).__name__}: {one_line(error)}")]
    finally:
        users.put(user)
    if extra:
        message = f"not run, since new or changed: {extra} code cell{'s' if extra > 1 else ''}"
        rows.append(Row(student, lesson.stem, "", "note", message))
    return rows


def _parse(content: bytes) -> NotebookNode:
    import nbformat

    return nbformat.reads(content.decode("utf-8"), as_version=4)


def _probe(settings: Settings, unseen: list[Path], user: int, stop: threading.Event) -> None:
    """Look from inside whether the sandbox holds; CourseError if not."""
    few = 48
    limits = sandbox.Limits(settings.limits.gib, settings.limits.disk_mib, few)
    careful = Settings(limits, one_thread=True)
    source = PROBE.format(hidden=[str(path) for path in unseen], processes=few)
    try:
        with session(careful, user, stop) as worker:
            problem = worker.ask(60, do="context", source=source).get("error")
    except _EndedError as ended:
        problem = str(ended)
    if problem:
        raise CourseError(f"The sandbox does not hold here ({one_line(problem)}): nothing was graded.")


def _reference(lesson: Lesson, settings: Settings, user: int, stop: threading.Event) -> list[Row]:
    """Grade the lesson's own solutions; CourseError if one does not pass, since then no grade means anything."""
    solutions = {exercise.number: exercise.solution for exercise in lesson.exercises if exercise.solution}
    rows = grade_submission("", lesson, solutions, settings, user, stop)
    for row in rows:
        if row.exercise.partition(" ")[0] in solutions and row.status != "correct":
            raise CourseError(
                f"The lesson's own solution of {lesson.stem} {row.exercise} is graded {row.status!r} ({row.message}): "
                "raise the limits, or mend the check."
            )
    return rows


# The report


def print_submission(submission: Submission, rows: list[Row], note: str = "") -> None:
    """Print the submission's line."""
    exercises = [row for row in rows if row.exercise]
    correct = sum(row.status == "correct" for row in exercises)
    result = f"{correct}/{len(exercises)} correct" if exercises else f"{rows[0].status}: {rows[0].message}"
    wrong = [f"{row.exercise} {row.status}" for row in exercises if row.status not in ("correct", "not attempted")]
    seconds, gib = sum(row.seconds for row in rows), max(row.gib for row in rows)
    name = f"{submission.student}/{_readable(submission.path)}"
    line = f"{one_line(name):<44}{seconds:>7.0f} s{gigabytes(gib):>9}  {result}"
    if wrong:
        line += f"; {', '.join(wrong)}"
    print(f"{line} ({note})" if note else line, flush=True)


def _read_state(out: Path) -> dict[str, list[Row]]:
    """Rows of earlier runs by the key of their submission."""
    try:
        state = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        return {key: [Row(**row) for row in rows] for key, rows in state.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(out: Path, reports: dict[int, list[Row]], state: dict[str, list[Row]]) -> None:
    """Write the table, the page and what the next run wants to know."""
    rows = [row for place in sorted(reports) for row in reports[place]]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([_plain(value) for value in _fields(row)])
    write_atomically(out, table.getvalue())
    state_text = json.dumps({key: [asdict(row) for row in rows] for key, rows in state.items()})
    write_atomically(out.with_suffix(".json"), state_text + "\n")
    lines = [
        f'<tr class="{row.status.replace(" ", "-")}">'
        + "".join(f"<td>{html.escape(value)}</td>" for value in _fields(row))
        + "</tr>"
        for row in rows
    ]
    points = Counter(row.student for row in rows if row.status == "correct")
    graded = Counter(row.student for row in rows if row.exercise)
    students = [
        f"<tr><td>{html.escape(student)}</td><td>{points[student]}</td><td>{graded[student]}</td></tr>"
        for student in sorted(graded)
    ]
    page = PAGE.substitute(students="\n".join(students), lines="\n".join(lines), count=len(graded))
    write_atomically(out.with_suffix(".html"), page)


def _fields(row: Row) -> list[str]:
    return [row.student, row.notebook, row.exercise, row.status, row.message, f"{row.seconds:.1f}", gigabytes(row.gib)]


def _plain(value: str) -> str:
    """The value as text for a spreadsheet, which would compute what begins with one of these signs."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width" />
<title>Grades of $count students</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
.correct td:nth-child(4) { color: #1a7f37; } .error td:nth-child(4), .rejected td:nth-child(4) { color: #d1242f; }
</style>
</head>
<body>
<h1>Grades</h1>
<table>
<tr><th>student</th><th>correct</th><th>checked</th></tr>
$students
</table>
<table>
<tr><th>student</th><th>notebook</th><th>exercise</th><th>status</th><th>message</th><th>seconds</th><th>memory</th></tr>
$lines
</table>
</body>
</html>
""")
