"""`python -m course grade`."""

import argparse
import signal
from collections import Counter
from pathlib import Path

from course.arguments import add_notebooks, natural
from course.grading import sandbox
from course.grading.grade import grade
from course.grading.sample_class import LESSON, Expected, surprises, write_class
from course.grading.session import Settings
from course.notebooks import select_notebooks
from helpers.errors import CourseError
from helpers.profiles import ROOT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("submissions", type=Path, help="folder that holds <student>/<NN_name>.ipynb")
    add_notebooks(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "grades" / "grades.csv", help="table to write")
    parser.add_argument("--hidden", type=Path, help="folder with further checkers, NN_name.py")
    parser.add_argument("--jobs", type=natural(1), default=1, help="submissions at a time")
    parser.add_argument("--timeout", type=natural(1), default=120, help="seconds for each cell")
    parser.add_argument("--notebook-timeout", type=natural(1), default=1800, help="seconds for each file")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for each submission")
    parser.add_argument("--disk", type=natural(1), default=512, help="MiB that each may write")
    parser.add_argument("--processes", type=natural(16), default=256, help="and threads, for each")
    parser.add_argument("--fresh", action="store_true", help="grade again what has not changed")
    parser.add_argument("--sample", action="store_true", help="first write a class of thirty there, to try the grader")
    parser.add_argument("--unsafe", action="store_true", help="without a sandbox: only in a container to throw away")


def command(options: argparse.Namespace) -> int:
    """Exit status 0 when everything was graded or rejected; 1 if a sample class is not graded as it should be."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill stops the workers as Ctrl-C does
    settings = Settings(
        sandbox.Limits(options.memory, options.disk, options.processes),
        options.timeout,
        options.notebook_timeout,
        one_thread=options.jobs > 1,
        unsafe=options.unsafe,
    )
    out = options.out.resolve()
    hidden = options.hidden and options.hidden.resolve()
    expected: Expected = {}
    if options.sample:
        (lesson,) = select_notebooks(options.notebooks.resolve(), [LESSON])
        expected = write_class(options.submissions.resolve(), lesson)
    try:
        rows = grade(
            options.submissions.resolve(),
            out,
            notebooks=options.notebooks.resolve(),
            hidden=hidden,
            jobs=options.jobs,
            settings=settings,
            fresh=options.fresh,
        )
    except OSError as error:
        raise CourseError(f"Cannot use {error.filename or out} ({error.strerror}): mend that, or use --out.") from None
    counts = Counter(row.status for row in rows)
    print(", ".join(f"{number} {status}" for status, number in sorted(counts.items())) or "nothing was handed in")
    print(f"table: {out}; page: {out.with_suffix('.html')}")
    if wrong := surprises(expected, rows):
        print(f"graded otherwise than the sample class should be: {', '.join(wrong)}")
    return int(bool(wrong))
