"""`python -m course slides`."""

import argparse
from pathlib import Path

from course.arguments import add_notebooks
from course.notebooks import read_notebook, select_notebooks
from course.slides.export import export
from course.slides.time_plan import LECTURE, minutes
from helpers.profiles import ROOT

OUT = ROOT / "build" / "slides"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("what", choices=("export", "minutes"), help="write slides, or print minutes for each section")
    parser.add_argument("--only", nargs="+", metavar="NN", help="these lessons, such as 03 05")
    add_notebooks(parser)
    parser.add_argument("--out", type=Path, default=OUT, help="where the slides go")


def command(options: argparse.Namespace) -> None:
    """Write the slides of the lessons, or print their time plan."""
    for path in select_notebooks(options.notebooks.resolve(), options.only):
        if options.what == "export":
            print(export(path, options.out.resolve()))
        else:
            print(f"{path.stem}: {LECTURE} minutes")
            for title, number in minutes(read_notebook(path)).items():
                print(f"  {number:>3}  {title}")
