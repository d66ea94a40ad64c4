"""Reading a lesson: its sections, and the figures and claims that its cells have put out."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass

from nbformat import NotebookNode

from course.notebooks import core_path, tags
from helpers.errors import CourseError

CLAIM = re.compile(r"(holds|DOES NOT HOLD): ")
NEVER_SHOWN = {"setup", "parameters", "check", "solution", "quiz", "skip"}


@dataclass
class Section:
    """A part of a lesson under one heading of level 2; the part before the first one has the lesson's title."""

    title: str
    cells: list[NotebookNode]


def sections(notebook: NotebookNode) -> list[Section]:
    """The parts of the core path in order, without what is folded. A cell that holds headings is divided at them."""
    found = [Section("", [])]
    for cell in core_path(notebook).cells:
        if cell.cell_type != "markdown" or {*tags(cell)} - {"core"}:
            found[-1].cells.append(cell)
            continue
        open_text = re.sub(r"<details>.*?</details>", "", cell.source, flags=re.DOTALL)
        for number, part in enumerate(re.split(r"^## +", open_text, flags=re.MULTILINE)):
            if number:
                title, _, part = part.partition("\n")
                found.append(Section(title.strip(), []))
            if part.strip():
                found[-1].cells.append(NotebookNode({**cell, "source": part.strip()}))
    title = re.match(r"# +(.+)", found[0].cells[0].source if found[0].cells else "")
    if not title:
        raise CourseError("A lesson must begin with a markdown cell whose first line is its title: add '# NN · Title'.")
    found[0].title = title[1].strip()
    return found


def figures(cell: NotebookNode) -> Iterator[tuple[str, str]]:
    """The images of a code cell as base64, each with its alt text."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            yield data["image/png"].replace("\n", ""), output.metadata.get("image/png", {}).get("alt", "")


def printed(cell: NotebookNode) -> str:
    """What a code cell printed, without its claims."""
    outputs = [output for output in cell.get("outputs", []) if output.get("name") == "stdout"]
    lines = "".join(output.text for output in outputs).rstrip().split("\n")
    return "\n".join(line for line in lines if not CLAIM.match(line)).strip("\n")


def claims(cell: NotebookNode) -> list[str]:
    """What a code cell printed about its numbers: claims that held; without any, a difference to a library."""
    lines = "\n".join(output.get("text", "") for output in cell.get("outputs", [])).split("\n")
    held = [line.removeprefix("holds: ") for line in lines if line.startswith("holds: ")]
    equal = [" ".join(line.split()) for line in lines if "largest difference" in line][:1]
    return [unbroken(html.escape(line, quote=False)) for line in held or equal]


def unbroken(text: str) -> str:
    """The text with hyphens in its numbers, as in 1e-05, at which no line is broken."""
    return re.sub(r"(\de)-(?=\d)", "\\1\u2011", text)
