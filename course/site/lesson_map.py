"""The lessons and what they need, as a table and as a drawing, from the metadata of their notebooks."""

import re
import textwrap
from functools import cache
from html import escape
from pathlib import Path

from course.notebooks import read_notebook
from course.runner.refresh import lessons
from course.translation import Say, block

BOX_WIDTH, BOX_HEIGHT, COLUMN, ROW, MARGIN = 132, 62, 168, 76, 4


def table(notebooks: list[Path]) -> str:
    """Markdown table with a link to each lesson."""
    lines = ["| lesson | runs for | memory | to study | after |", "|---|---|---|---|---|"]
    for path, (number, title, *measured, after) in zip(notebooks, lessons(notebooks), strict=True):
        units = re.compile(r"(?<=\d) (?=min|GB)")  # a number stays with its unit
        cells = [units.sub("\u00a0", value).replace(" | ", "; ") for value in measured]
        lines.append(f"| [{number} · {title}](notebooks/{path.name}) | {' | '.join(cells)} | {after} |")
    return "\n".join(lines)


def short(title: str) -> str:
    """A title without what stands after its colon."""
    return re.split("[:：]", title, maxsplit=1)[0]


def prerequisites(notebooks: list[Path]) -> dict[str, set[str]]:
    """The lessons that a lesson needs, by its number; a lesson that is not there is left out."""
    known = {path.stem[:2] for path in notebooks}
    needs = {}
    for path in notebooks:
        workbook = read_notebook(path).metadata.get("workbook", {})
        needs[path.stem[:2]] = set(workbook.get("prerequisites", [])) & known
    return needs


def direct(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same without what another prerequisite already needs."""

    @cache
    def everything(lesson: str) -> frozenset[str]:
        return frozenset(needs[lesson]).union(*(everything(before) for before in needs[lesson]))

    return {
        lesson: {before for before in needs[lesson] if not any(before in everything(other) for other in needs[lesson])}
        for lesson in needs
    }


def draw(notebooks: list[Path], say: Say = str) -> str:
    """SVG in which lessons stand to the right of those that they need, and the same as a list for every reader.

    `say` says the titles and the few other words.
    """
    needs = direct(prerequisites(notebooks))
    level: dict[str, int] = {}
    for lesson in needs:  # in the order of the course, in which a prerequisite is always earlier
        level[lesson] = 1 + max((level[before] for before in needs[lesson]), default=-1)
    columns = [[lesson for lesson in needs if level[lesson] == number] for number in range(max(level.values()) + 1)]
    tallest = max(map(len, columns))
    place = {}
    for x, column in enumerate(columns):
        for y, lesson in enumerate(column):
            place[lesson] = (MARGIN + x * COLUMN, MARGIN + (y + (tallest - len(column)) / 2) * ROW)
    width = 2 * MARGIN + (len(columns) - 1) * COLUMN + BOX_WIDTH
    height = 2 * MARGIN + (tallest - 1) * ROW + BOX_HEIGHT
    lines = []
    for lesson, earlier in needs.items():
        for before in sorted(earlier):
            (x1, y1), (x2, y2) = place[before], place[lesson]
            x1, y1, x2, y2 = x1 + BOX_WIDTH, y1 + BOX_HEIGHT / 2, x2 - 7, y2 + BOX_HEIGHT / 2
            middle = x2 - (COLUMN - BOX_WIDTH) / 2  # the curve bends in the gap before its lesson
            lines.append(f'<path d="M{x1},{y1:g} H{middle - 20:g} C{middle},{y1:g} {middle},{y2:g} {x2},{y2:g}"/>')
    boxes, items = [], []
    rows = lessons(notebooks)
    for path, (number, title, minutes, memory, *_) in zip(notebooks, rows, strict=True):
        x, y = place[number]
        title, minutes, memory = say(title), block(minutes, say), block(memory, say)
        name = short(title)
        lines_of_title = textwrap.wrap(name, width=16 if name.isascii() else 8)
        text = "".join(f'<tspan x="{x + 10}" dy="17">{escape(line)}</tspan>' for line in lines_of_title)
        boxes.append(
            f'<a href="notebooks/{path.stem}.html"><title>{escape(title)}</title>'
            f'<rect x="{x}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>'
            f'<text x="{x + 10}" y="{y + 19:g}"><tspan class="number">{number}</tspan>{text}</text></a>'
        )
        after = say("after {}").format(", ".join(sorted(needs[number]))) if needs[number] else say("the start")
        items.append(f"- [{number} · {title}](notebooks/{path.name}): {after}; {minutes}, {memory}")
    drawing = (
        f'<div class="lesson-map" tabindex="0" role="region" aria-label="{say("Map of the lessons")}">'
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'xmlns="http://www.w3.org/2000/svg"><defs><marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" '
        'markerWidth="7" markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
        f'<g class="arrows" marker-end="url(#arrow)">{"".join(lines)}</g>{"".join(boxes)}</svg></div>'
    )
    return "\n".join([drawing, "", f"## {say('The same as a list')}", "", *items])
