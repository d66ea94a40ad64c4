"""How much room blocks of text take on a page, and how they are divided into pages."""

import math
import re

from course.slides.condensing import items, kind_of

ROOM = 15.5  # lines of text that a page holds under its heading
WIDOW = 2.2  # lines that get no page of their own: the page before is drawn a little smaller
LINE = 74  # characters in a line of text
SMALL = 1.8  # times as much stands on a page of small letters
CODE_LINE = 118  # characters in a line of code and of what it printed, at their smallest size


def height(block: str) -> float:
    """Lines of text that a block takes on a page."""
    kind = kind_of(block)
    if kind == "formula":
        return 1.6 + 1.5 * block.count(r"\\") + 1.1 * (r"\frac" in block) + 0.6 * (r"\sum" in block)
    if kind == "table":
        return sum(row_height(row) for row in block.split("\n") if not re.fullmatch(r"[|\s:-]+", row)) + 0.4
    if kind == "list":
        return sum(math.ceil(drawn_length(item) / (LINE - 4)) + 0.25 for _, item in items(block)) + 0.4
    if kind == "code":  # its fences are as high as its margins
        return sum(math.ceil(len(line) / CODE_LINE) or 1 for line in block.split("\n")) * 0.7
    return math.ceil(drawn_length(block) / LINE) + 0.45


def drawn_length(text: str) -> int:
    """Characters of a text as it is drawn: a formula is shorter than its source."""
    return len(re.sub(r"\\[a-z]+", "x", text).translate(str.maketrans("", "", "$*{}^_")))


def row_height(row: str) -> float:
    """Lines of a row of a table, whose letters are smaller; long cells share what width there is."""
    lengths = [len(cell) for cell in re.split(r"(?<!\\)\|", row.strip("| "))]
    if sum(lengths) + 4 * len(lengths) <= LINE * 1.35:
        return 0.91
    widths = [max(length, 12) ** 0.7 for length in lengths]
    share = LINE * 1.3 / sum(widths)
    lines = max(math.ceil(length / (width * share)) for length, width in zip(lengths, widths, strict=True))
    return 0.68 * lines + 0.23


def in_lines(formula: str) -> str:
    """A long formula that consists of several, each on a line of its own."""
    parts = formula.strip("$").split(r"\qquad")
    if len(parts) == 1 or drawn_length(formula) < LINE or "&" in formula or r"\begin" in formula:
        return formula
    below = r" \\[6pt] ".join(part for part in parts if part.strip())
    return rf"$$\begin{{gathered}} {below} \end{{gathered}}$$"


def divided(block: str, left: float, room: float) -> list[str]:
    """A list or a table in parts, the first not higher than `left`; each part of a table has its head."""
    kind = kind_of(block)
    if kind not in ("list", "table"):
        return [block]
    lines = [" ".join(item) for item in items(block)] if kind == "list" else block.split("\n")
    head, lines = ([], lines) if kind == "list" else (lines[:2], lines[2:])
    parts: list[list[str]] = [[]]
    for line in lines:
        if parts[-1] and height("\n".join([*head, *parts[-1], line])) > (room if len(parts) > 1 else left):
            parts.append([])
        parts[-1].append(line)
    if len(parts) > 1 and height("\n".join(parts[-1])) < WIDOW * room / ROOM:
        last = parts.pop()
        parts[-1] += last
    return ["\n".join([*head, *part]) for part in parts]


def pages(chosen: list[str], room: float = ROOM) -> list[str]:
    """The blocks, put together so that each page is full but not too full."""
    packed: list[list[str]] = [[]]
    for block in (in_lines(block) if kind_of(block) == "formula" else block for block in chosen):
        left = room - sum(map(height, packed[-1]))
        if height(block) <= left:
            packed[-1].append(block)
            continue
        if left < min(room / 2, height(block)):  # too little to begin it here
            # What announces a formula, a list or a table stays with it.
            announces = kind_of(block) == "formula" or (
                kind_of(block) != "text" and re.search(r":$|^\*\*[^*]+\*\*$", packed[-1][-1])
            )
            announces = announces and len(packed[-1]) > 1 and kind_of(packed[-1][-1]) == "text"
            packed.append([packed[-1].pop()] if announces else [])
            left = room - sum(map(height, packed[-1]))
        first, *others = divided(block, left, room)
        packed[-1].append(first)
        packed += [[part] for part in others]
    return ["\n\n".join(page) for page in packed if page]
