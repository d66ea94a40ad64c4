"""What instructors, maintainers and CI run: `python -m course COMMAND`, and `python -m course --help` lists them.

A command is a module with `add_arguments(parser)` and `command(options)`, which is imported when it is asked for.
"""

import argparse
import sys
from importlib import import_module

from helpers.errors import exit_cleanly

COMMANDS = {  # name -> module, prefix of its two functions, what it does
    "list": ("course.runner.command", "list_", "the lessons with their measured budget"),
    "run": ("course.runner.command", "run_", "execute the notebooks and report"),
    "refresh": ("course.runner.command", "refresh_", "run, and write outputs, budgets and figures to the repository"),
    "sync": ("course.twins", "", "bring notebooks and their sources in line"),
    "rehearse": ("course.rehearsal.command", "", "run the lessons as on a GPU, without one: what fits, what fails"),
    "claims": ("course.claims", "", "fill the ledger of claims"),
    "progress": ("course.progress", "", "what is solved, and a certificate"),
    "student": ("course.student", "", "write the edition without solutions"),
    "grade": ("course.grading", "", "run the checks on handed-in notebooks"),
    "competition": ("course.competition", "", "check, reproduce and rank what is handed in to the competition"),
    "slides": ("course.slides", "", "lecture slides and time plan from the notebooks"),
    "site": ("course.site", "", "build the book"),
    "translate": ("course.translation", "", "bring the Japanese catalogues and README.ja.md in line"),
    "publish": ("course.publish", "", "put the models and Shima on the Hugging Face hub"),
    "links": ("course.links", "", "say where the course is published"),
    "new-lesson": ("course.new_lesson", "", "start a lesson that runs"),
}


def main(arguments: list[str] | None = None) -> int | None:
    """Command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m course", description="Run and keep the course.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    for name, (module, prefix, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == chosen:
            found = import_module(module)
            getattr(found, f"add_{prefix}arguments")(command)
            command.set_defaults(run=getattr(found, f"{prefix}command"))
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    exit_cleanly(main)
