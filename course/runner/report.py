"""What a run found: one row a notebook, printed as it goes, and as report.json and report.html."""

import html
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template

from course.notebooks import gigabytes
from helpers.files import write_atomically

CLEAR_LINE = "\r\x1b[K"  # on a terminal

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width" />
<title>LLM Workbook: $summary</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
td:nth-child(2), td:nth-child(3), td:nth-child(4), td:nth-child(6) { white-space: nowrap; }
.ok b { color: #1a7f37; } .failed b, .interrupted b { color: #d1242f; } .running b { color: #9a6700; }
</style>
</head>
<body>
<h1>LLM Workbook</h1>
<p>$summary; $total; $settings</p>
<table>
<tr><th>notebook</th><th>cells run</th><th>time</th><th>peak memory</th><th>result</th><th>finished</th></tr>
$lines
</table>
</body>
</html>
""")


@dataclass
class Row:
    """One notebook's line in the report."""

    notebook: str  # file name without .ipynb
    key: str  # changes with everything that the result depends on
    status: str = "waiting"  # then running, and in the end ok, failed or interrupted
    cells_run: int = 0
    cells: int = 0  # code cells that are not empty
    seconds: float = 0.0  # wall time, with the start of the kernel
    gib: float = 0.0  # peak of the resident memory of the kernel and the processes it started
    error: str = ""
    finished: str = ""  # UTC


def print_row(row: Row, note: str = "") -> None:
    """Print the notebook's line."""
    result = f"{row.status} ({note})" if note else row.status
    cells = f"{row.cells_run}/{row.cells} cells"
    line = f"{row.notebook:<28}{cells:>12}{row.seconds:>7.0f} s{gigabytes(row.gib):>9}  {result}"
    if sys.stdout.isatty():
        line = CLEAR_LINE + line
    print(f"{line}: {row.error}" if row.error else line, flush=True)


def read_report(out: Path) -> list[Row]:
    """Rows of the last report in the folder; none if there is no report or it is of another version."""
    try:
        rows = [Row(**row) for row in json.loads((out / "report.json").read_text(encoding="utf-8"))["notebooks"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    for row in rows:
        if row.status == "running":  # the run was killed
            row.status = "interrupted"
    return rows


def write_report(out: Path, rows: list[Row], parameters: dict[str, object]) -> None:
    """Write report.json and report.html."""
    report = {"parameters": parameters, "python": sys.version.split()[0], "notebooks": [asdict(row) for row in rows]}
    write_atomically(out / "report.json", json.dumps(report, indent=1) + "\n")
    lines = []
    for row in rows:
        name, error = html.escape(row.notebook), html.escape(row.error)
        executed = f'<a href="{name}.ipynb">{name}</a>' if (out / f"{row.notebook}.ipynb").exists() else name
        log = f' <a href="{name}.log">log</a>' if row.status in ("failed", "interrupted") else ""
        fields = [
            executed,
            f"{row.cells_run} / {row.cells}",
            f"{row.seconds:.0f} s",
            gigabytes(row.gib),
            f"<b>{row.status}</b> {error}{log}",
            row.finished.replace("T", " ").replace("+00:00", " UTC"),
        ]
        lines.append(f'<tr class="{row.status}">' + "".join(f"<td>{field}</td>" for field in fields) + "</tr>")
    counts = Counter(row.status for row in rows)
    summary = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    total = f"{sum(row.seconds for row in rows) / 60:.1f} minutes"
    settings = html.escape(", ".join(f"{name} {value}" for name, value in parameters.items()))
    page = PAGE.substitute(summary=summary, total=total, settings=settings, lines="\n".join(lines))
    write_atomically(out / "report.html", page)
