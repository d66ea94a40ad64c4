"""`python -m course list`, `run` and `refresh`."""

import argparse
import signal
from pathlib import Path

from course.arguments import add_notebooks, natural
from course.notebooks import select_notebooks
from course.runner.refresh import lesson_table, lessons, update_readme
from course.runner.run import run
from helpers.errors import CourseError
from helpers.profiles import ROOT


def add_list_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `list`."""
    add_notebooks(parser)
    parser.add_argument("--markdown", action="store_true", help="as the table of README.md")


def list_command(options: argparse.Namespace) -> None:
    """Print the lessons with their measured budget."""
    notebooks = select_notebooks(options.notebooks.resolve())
    if options.markdown:
        print(lesson_table(notebooks))
        return
    for number, title, minutes, memory, study, after in lessons(notebooks):
        print(f"{number}  {title:<40}{minutes:>9}{memory:>9}  {study}  after {after}")


def add_refresh_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `refresh`."""
    add_notebooks(parser)
    parser.add_argument("--only", nargs="+", metavar="LESSON", help="lessons to run, such as 03 05")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "course", help="folder for the report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=natural(), default=600, help="seconds for each cell, 0 for no limit")
    parser.add_argument("--fresh", action="store_true", help="run also what passed and has not changed")
    parser.add_argument("--jobs", type=natural(1), default=1, help="notebooks at a time; above 1 each has one thread")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `run`."""
    add_refresh_arguments(parser)
    parser.add_argument("--profile", default="cpu", help="cpu, t4, large or auto")


def refresh_command(options: argparse.Namespace) -> int:
    """Run, and write outputs and measured budgets to the notebooks, README.md and figures/."""
    return run_command(argparse.Namespace(**vars(options), profile="cpu"), refresh=True)


def run_command(options: argparse.Namespace, refresh: bool = False) -> int:
    """Execute the notebooks; exit status 1 if one failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill stops the kernels as Ctrl-C does
    folder, out = options.notebooks.resolve(), options.out.resolve()
    settings = {name: getattr(options, name) for name in ("profile", "seed", "jobs", "timeout", "fresh")}
    try:
        rows = run(select_notebooks(folder, options.only), out, **settings, refresh=refresh)
        if refresh:
            update_readme(folder)
    except OSError as error:
        raise CourseError(f"Cannot write {error.filename or out} ({error.strerror}): make room or use --out.") from None
    good = sum(row.status == "ok" for row in rows)
    print(f"{good} of {len(rows)} notebooks passed; report: {out / 'report.html'}")
    return 0 if good == len(rows) else 1
