"""The Japanese part of the book and README.ja.md: `python -m course translate` brings the catalogues in line."""

import argparse

from course.translation.catalogue import (
    CATALOGUES,
    LANGUAGE,
    NAME,
    PAGES,
    TRANSLATED_README,
    WHOLE,
    edition,
    name_figures,
    problems,
    readme,
    speaker,
    update,
)
from course.translation.markdown import Say, block, translated
from helpers.files import write_atomically
from helpers.profiles import ROOT

__all__ = [
    "LANGUAGE",
    "NAME",
    "PAGES",
    "WHOLE",
    "Say",
    "block",
    "edition",
    "name_figures",
    "speaker",
    "translated",
    "write_readme",
]


def write_readme() -> None:
    """Write README.ja.md from README.md and the catalogues."""
    write_atomically(ROOT / TRANSLATED_README, readme())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command: none."""


def command(options: argparse.Namespace) -> int:
    """Update the catalogues and README.ja.md, and say what is to be translated; exit status 1 if something is."""
    changed = update()
    write_readme()
    for path in changed:
        print(f"changed {path.relative_to(ROOT)}")
    open_ones = list(problems())
    for problem in open_ones:
        print(problem)
    print(f"{len(open_ones)} to do in {CATALOGUES.relative_to(ROOT)}")
    return 1 if open_ones else 0
