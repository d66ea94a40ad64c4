"""What was graded: a line for each exercise, as a table, a page, and the state of an interrupted run."""

import csv
import html
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

from course.grading.submissions import Submission, readable
from course.notebooks import gigabytes, one_line
from helpers.files import write_atomically

COLUMNS = ["student", "notebook", "exercise", "status", "message", "seconds", "memory"]


@dataclass
class Row:
    """One exercise of one submission, or a file that could not be graded."""

    student: str
    notebook: str
    exercise: str
    status: str  # correct, not yet, not attempted, error, missing, rejected, not graded
    message: str = ""
    seconds: float = 0.0
    gib: float = 0.0


def print_submission(submission: Submission, rows: list[Row], note: str = "") -> None:
    """Print the submission's line."""
    exercises = [row for row in rows if row.exercise]
    correct = sum(row.status == "correct" for row in exercises)
    result = f"{correct}/{len(exercises)} correct" if exercises else f"{rows[0].status}: {rows[0].message}"
    wrong = [f"{row.exercise} {row.status}" for row in exercises if row.status not in ("correct", "not attempted")]
    seconds, gib = sum(row.seconds for row in rows), max(row.gib for row in rows)
    name = f"{submission.student}/{readable(submission.path)}"
    line = f"{one_line(name):<44}{seconds:>7.0f} s{gigabytes(gib):>9}  {result}"
    if wrong:
        line += f"; {', '.join(wrong)}"
    print(f"{line} ({note})" if note else line, flush=True)


def read_state(out: Path) -> dict[str, list[Row]]:
    """Rows of earlier runs by the key of their submission."""
    try:
        state = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
        return {key: [Row(**row) for row in rows] for key, rows in state.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_report(out: Path, reports: dict[int, list[Row]], state: dict[str, list[Row]]) -> None:
    """Write the table, the page and what the next run wants to know."""
    rows = [row for place in sorted(reports) for row in reports[place]]
    write_table(out, COLUMNS, map(_fields, rows))
    state_text = json.dumps({key: [asdict(row) for row in rows] for key, rows in state.items()})
    write_atomically(out.with_suffix(".json"), state_text + "\n")
    lines = [
        f'<tr class="{row.status.replace(" ", "-")}">'
        + "".join(f"<td>{html.escape(value)}</td>" for value in _fields(row))
        + "</tr>"
        for row in rows
    ]
    points = Counter(row.student for row in rows if row.status == "correct")
    graded = Counter(row.student for row in rows if row.exercise)
    students = [
        f"<tr><td>{html.escape(student)}</td><td>{points[student]}</td><td>{graded[student]}</td></tr>"
        for student in sorted(graded)
    ]
    page = PAGE.substitute(students="\n".join(students), lines="\n".join(lines), count=len(graded))
    write_atomically(out.with_suffix(".html"), page)


def _fields(row: Row) -> list[str]:
    return [row.student, row.notebook, row.exercise, row.status, row.message, f"{row.seconds:.1f}", gigabytes(row.gib)]


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """Write CSV that a spreadsheet may open: what students wrote stays text in it, and is never computed."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_plain(str(value)) for value in row] for row in rows)
    write_atomically(path, table.getvalue())


def _plain(value: str) -> str:
    """The value as text for a spreadsheet, which would compute what begins with one of these signs."""
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width" />
<title>Grades of $count students</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin-bottom: 2rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
.correct td:nth-child(4) { color: #1a7f37; } .error td:nth-child(4), .rejected td:nth-child(4) { color: #d1242f; }
</style>
</head>
<body>
<h1>Grades</h1>
<table>
<tr><th>student</th><th>correct</th><th>checked</th></tr>
$students
</table>
<table>
<tr><th>student</th><th>notebook</th><th>exercise</th><th>status</th><th>message</th><th>seconds</th><th>memory</th></tr>
$lines
</table>
</body>
</html>
""")
