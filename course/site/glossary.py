"""The glossary: links to the lessons, and the symbols of all lessons as one table, from those at their beginning."""

import re
from pathlib import Path

from course.notebooks import read_notebook
from course.runner.refresh import lessons
from course.site.lesson_map import short
from course.translation import Say

ROW = re.compile(r"^\| (\$.+?) \| (.+?) \|$", re.MULTILINE)
NUMBER = re.compile(r"\| (\d\d) \|$", re.MULTILINE)


def linked(text: str, notebooks: list[Path]) -> str:
    """The text with a link in the place of each number of a lesson at the end of a table's row."""
    links = {path.stem[:2]: f"[{path.stem[:2]}](notebooks/{path.name})" for path in notebooks}
    return NUMBER.sub(lambda found: f"| {links.get(found[1], found[1])} |", text)


def symbols(notebooks: list[Path], say: Say = str) -> str:
    """Markdown: symbol, meaning, and a link to the lesson, whose title `say` says."""
    lines = ["| symbol | meaning | lesson |", "|---|---|---|"]
    for path, (number, title, *_) in zip(notebooks, lessons(notebooks), strict=True):
        head = "\n".join(cell.source for cell in read_notebook(path).cells[:2] if cell.cell_type == "markdown")
        link = f"[{number} · {short(say(title))}](notebooks/{path.name})"
        lines += [f"| {symbol} | {meaning} | {link} |" for symbol, meaning in ROW.findall(head)]
    return "\n".join(lines)
