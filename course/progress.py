"""What a student has solved: `python -m course progress`, and with `--certificate NAME` a page to print.

The checks of the notebooks write build/progress.json. Nothing leaves the machine, so a certificate proves nothing to a
stranger: it lists what was solved, and the state of the notebooks in which it was.
"""

import argparse
import datetime
import html
from pathlib import Path

from course.notebooks import EXERCISE, NOTEBOOKS, read_notebook, select_notebooks, source_hash, tags
from helpers.errors import CourseError
from helpers.exercises import PROGRESS, read_progress
from helpers.files import write_atomically

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>LLM Workbook: {name}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 42rem; margin: 4rem auto; padding: 0 1rem; color: #262626 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ccc }}
code {{ font-size: .8rem }}
</style></head>
<body><h1>LLM Workbook</h1>
<p><strong>{name}</strong> solved {solved} of {number} exercises by {day}.</p>
<table><thead><tr><th scope="col">lesson</th><th scope="col">solved</th><th scope="col">last</th>
<th scope="col">notebook</th></tr></thead><tbody>
{rows}
</tbody></table>
<p>The last column begins the SHA-256 of the notebook's cells.</p></body></html>
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--certificate", metavar="NAME", help="write build/certificate.html for a person of this name")


def command(options: argparse.Namespace) -> None:
    """Print what is solved in each lesson, and what is open."""
    progress, lessons = read_progress(), exercises(select_notebooks(NOTEBOOKS))
    for path, numbers in lessons.items():
        done = solved(numbers, progress)
        left = [number for number in numbers if number not in done]
        print(f"{path.stem:<28}{len(done)} of {len(numbers)}" + (f", open: {' '.join(left)}" if left else ""))
    if options.certificate is not None:
        page = certificate(options.certificate, lessons, progress)
        write_atomically(out := PROGRESS.with_name("certificate.html"), page)
        print(f"wrote build/{out.name}")


def exercises(notebooks: list[Path]) -> dict[Path, list[str]]:
    """The numbers of each lesson's exercises, such as "3.1"."""
    found = {
        path: [EXERCISE.search(c.source) for c in read_notebook(path).cells if "check" in tags(c)] for path in notebooks
    }
    return {path: [number[1] for number in numbers if number] for path, numbers in found.items()}


def solved(numbers: list[str], progress: dict[str, dict[str, str]]) -> list[str]:
    """Those of the exercises that were correct once."""
    return [number for number in numbers if progress.get(number, {}).get("status") == "correct"]


def certificate(name: str, lessons: dict[Path, list[str]], progress: dict[str, dict[str, str]]) -> str:
    """An HTML page that lists the lessons with solved exercises; CourseError if there is none."""
    rows, total = [], 0
    for path, numbers in lessons.items():
        if done := solved(numbers, progress):
            total += len(done)
            notebook = read_notebook(path)
            title = html.escape(f"{path.stem[:2]} {notebook.metadata.workbook.title}")
            last = max(progress[number]["day"] for number in done)
            state = f"<code>{source_hash(notebook)[:12]}</code>"
            cells = (title, f"{len(done)} of {len(numbers)}", html.escape(last), state)
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if not rows:
        raise CourseError("No exercise is solved yet: run the check below an exercise in a notebook, then ask again.")
    return PAGE.format(
        name=html.escape(name.strip() or "Somebody"),
        solved=total,
        number=sum(map(len, lessons.values())),
        day=datetime.date.today().isoformat(),
        rows="\n".join(rows),
    )
