"""Arguments that several commands of the course take."""

import argparse
from collections.abc import Callable
from pathlib import Path

from course.notebooks import NOTEBOOKS


def add_notebooks(parser: argparse.ArgumentParser) -> None:
    """The folder that the command works on."""
    parser.add_argument("--notebooks", type=Path, default=NOTEBOOKS, help="folder with the notebooks")


def natural(low: int = 0) -> Callable[[str], int]:
    """A parser of whole numbers of at least `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {low}")
        return int(text)

    return parse
