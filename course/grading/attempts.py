"""Runs the attempts of one submission and judges them by the checks of the lesson."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from course.grading.lessons import Exercise, Lesson, LessonError
from course.grading.report import Row
from course.grading.session import EndedError, Session, Settings, session
from course.grading.submissions import SUSPICIOUS
from course.notebooks import one_line


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
                for exercise in run_attempts(worker, lesson, pending, settings, end, begun):
                    started, worker.gib = time.monotonic(), 0.0
                    try:
                        for name, status, message in judge(worker, exercise, attempts[exercise.number], settings):
                            note(exercise, status, message, time.monotonic() - started, worker.gib, only=name)
                            started = time.monotonic()
                    except EndedError as ended:
                        note(exercise, "error", f"it {ended}", time.monotonic() - started, worker.gib)
                        raise
        except (EndedError, LessonError) as error:
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


def run_attempts(
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
            raise LessonError(f"the {settings.notebook_seconds} s for a notebook were over before it")
        if isinstance(step, str):
            answer = worker.ask(min(settings.cell_seconds, remaining), do="context", source=step)
            if answer.get("error"):
                raise LessonError(f"the lesson's cell {one_line(step, 40)!r} {answer['error']}")
        elif step in pending:
            begun.append(step)
            left -= 1
            yield step


def judge(worker: Session, exercise: Exercise, source: str, settings: Settings) -> Iterator[tuple[str, str, str]]:
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
