"""`python -m course claims`: fill the ledger, and say how many claims of each lesson survive it."""

import argparse
from pathlib import Path

from course.claims.collect import collect
from course.claims.ledger import Lesson, read_exceptions
from course.notebooks import NOTEBOOKS, select_notebooks
from helpers.profiles import ROOT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--only", nargs="+", metavar="LESSON", help="lessons, such as 03 05")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="SEED")
    parser.add_argument("--jobs", type=int, default=2, help="notebooks at a time; above 1 each has one thread")
    parser.add_argument("--fresh", action="store_true", help="run also what the ledger knows")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "claims", help="folder for the executed notebooks")


def command(options: argparse.Namespace) -> int:
    """Exit status 1 if a run failed, or a claim that is no exception has a fault."""
    notebooks = select_notebooks(NOTEBOOKS, options.only)
    lessons, failed = collect(notebooks, options.seeds, options.out.resolve(), jobs=options.jobs, fresh=options.fresh)
    exceptions = read_exceptions(lessons)
    for sentence in failed:
        print(f"failed: {sentence}")
    faults = 0
    print(f"{'lesson':<28}{'effects':>8}{'identities':>11}{'reports':>8}{'broken':>8}{'in control':>11}{'close':>7}")
    for name in (path.stem for path in notebooks):
        print(line(name, lessons[name]))
    for name in (path.stem for path in notebooks):
        for row in lessons[name].claims:
            if row.faults and row.statement not in exceptions.get(name, {}):
                faults += 1
                print(f"{name}: {row.statement!r}: {'; '.join(row.faults)}")
    return 1 if failed or faults else 0


def line(name: str, lesson: Lesson) -> str:
    """How many claims of each kind a lesson makes, and how many have a fault."""
    kinds = [sum(row.kind == kind for row in lesson.claims) for kind in ("effect", "identity", "report")]
    broken = sum(bool(row.broken_by) for row in lesson.claims)
    control = sum(row.holds_in_control for row in lesson.claims)
    close = sum(row.is_close for row in lesson.claims)
    return f"{name:<28}{kinds[0]:>8}{kinds[1]:>11}{kinds[2]:>8}{broken:>8}{control:>11}{close:>7}"
