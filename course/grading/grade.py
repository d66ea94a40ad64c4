"""Grades all submissions: what has not changed is not graded again, and one of them never stops the others."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

from course.grading import sandbox
from course.grading.attempts import grade_submission
from course.grading.lessons import Lesson, read_lesson
from course.grading.report import Row, print_submission, read_state, write_report
from course.grading.session import EndedError, Settings, session
from course.grading.submissions import Submission, find_attempts, find_submissions, parse_notebook, readable
from course.notebooks import one_line, select_notebooks
from course.runner.run import locked
from helpers.errors import CourseError

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
        known = {} if fresh else read_state(out)
        state: dict[str, list[Row]] = {}
        reports: dict[int, list[Row]] = {}
        waiting = []
        for place, submission in enumerate(found):
            if submission.problem:
                name = readable(submission.path)
                reports[place] = [Row(submission.student, name, "", "rejected", submission.problem)]
            elif submission.key in known:
                reports[place] = state[submission.key] = known[submission.key]
            else:
                waiting.append(place)
                continue
            print_submission(submission, reports[place], "unchanged" if submission.key else "")
        write_report(out, reports, state)
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
                    write_report(out, reports, state)
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
    return [row for place in sorted(reports) for row in reports[place]]


def _grade(submission: Submission, settings: Settings, users: SimpleQueue, stop: threading.Event) -> list[Row]:
    """Rows of a submission, whatever it is."""
    student, lesson = submission.student, submission.lesson
    try:
        notebook = parse_notebook(submission.path.read_bytes())
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


def _probe(settings: Settings, unseen: list[Path], user: int, stop: threading.Event) -> None:
    """Look from inside whether the sandbox holds; CourseError if not."""
    few = 48
    limits = sandbox.Limits(settings.limits.gib, settings.limits.disk_mib, few)
    careful = Settings(limits, one_thread=True)
    source = PROBE.format(hidden=[str(path) for path in unseen], processes=few)
    try:
        with session(careful, user, stop) as worker:
            problem = worker.ask(60, do="context", source=source).get("error")
    except EndedError as ended:
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
