"""A board as one HTML page that needs no network and runs no script."""

import html
from collections.abc import Mapping, Sequence
from string import Template


def page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    refused: Sequence[tuple[str, str]],
    head: str,
) -> str:
    """The page: a table, what was refused and why, and the hash of the log's last line."""
    lines = [_line(columns, "th")]
    groups = [row.get("group") for row in rows]
    for place, row in enumerate(rows):
        begins = ' class="begins"' if place and groups[place] != groups[place - 1] else ""
        lines.append(_line([row[column] for column in columns], "td", begins))
    reasons = [_line(pair, "td") for pair in refused] or [_line(["nothing", ""], "td")]
    return PAGE.substitute(
        title=html.escape(title), lines="\n".join(lines), refused="\n".join(reasons), head=html.escape(head)
    )


def _line(values: Sequence[object], cell: str, attributes: str = "") -> str:
    cells = "".join(
        f"<{cell}>{html.escape(str(value).replace('_', ' ') if cell == 'th' else str(value))}</{cell}>"
        for value in values
    )
    return f"<tr{attributes}>{cells}</tr>"


PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width" />
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 2rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; vertical-align: top; }
.begins td { border-top: 3px double #888; }
code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>$title</h1>
<p>Grades from 1 to 5. Where there are groups, the submissions of one cannot be told apart from its first: the
95&nbsp;% interval of the difference on the same tasks reaches 0. A rank lies between its best and its worst with
95&nbsp;%.</p>
<div><table>
$lines
</table></div>
<h2>Refused</h2>
<div><table>
$refused
</table></div>
<p>Hash of the last line of the log: <code>$head</code></p>
</body>
</html>
""")
