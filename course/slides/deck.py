"""The pages of a lesson, as a notebook of markdown cells."""

import ast
import html
import re
import struct
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from course.notebooks import BUDGET, tags
from course.slides.condensing import LEAD, blocks, condensed, kind_of, leads_nowhere, sentences
from course.slides.layout import LINE, ROOM, SMALL, height, pages
from course.slides.sections import NEVER_SHOWN, Section, claims, figures, printed, sections, unbroken
from course.slides.teaching import read_teaching

CODE_LINES, MAX_CODE_WIDTH = range(5, 20), 98
PRINTED_LINES, MAX_WIDTH = 20, 170  # of what a cell printed; lines wider than the page are broken
TABLE_ROW = re.compile(r"\S {3,}\S")
TALL = 640  # width in pixels of a figure with text beside it
SHORT, LOWEST = 3.5, 430  # lines of a text that may stand over a figure, and the pixels that the figure then has left
SPOKEN = re.compile(r"\b(tables?|rows?|columns?|printed)\b")  # the text is about what was printed
MEASURED = "**Measured here**"


@dataclass
class Slide:
    """One page: its kind is title, text, small (letters), code, figure or tall (a figure as high as it is wide).

    One of kind notes is no page; its notes belong to the next one.
    """

    kind: str
    heading: str
    body: str  # markdown
    notes: list[str] = field(default_factory=list)  # markdown
    image: str = ""  # of a figure, as base64


def text_slides(heading: str, chosen: list[str], notes: str) -> Iterator[Slide]:
    """Slides with the chosen blocks; the first has the whole text in its notes, also what no page is left for."""
    kind, room = ("small", ROOM * SMALL) if heading == "Read on" else ("text", ROOM)
    for number, page in enumerate(pages(chosen, room)):
        if number and leads_nowhere(page.split("\n\n")):
            continue
        yield Slide(kind, heading, page, [notes] if number == 0 else [])


def figure_slide(heading: str, image: str, alt: str, found: list[str]) -> Slide:
    """A page with a figure, and under or beside it what was claimed about it."""
    width, high = struct.unpack(">II", b64decode(image[:64])[16:24])
    pixels = 612 - 34 * len(found[:3]) - 30 * sum(len(claim) > LINE * 1.4 for claim in found[:3])
    kind = "tall" if found and high / width > pixels / TALL else "figure"
    beside = found[: 3 if kind == "figure" else 6]
    pixels = pixels if kind == "figure" else 612
    style = f"max-height: {pixels}px"
    plot = f'<div class="plot"><img alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{image}"></div>'
    listed = [f"- {claim}" for claim in found]
    return Slide(kind, heading, "\n\n".join([plot, "\n".join(listed[: len(beside)])]), [alt, "\n".join(listed)], image)


def short_function(cell: NotebookNode) -> str:
    """The longest function of the cell that is neither trivial nor too long for a page; otherwise nothing."""
    try:
        nodes = ast.parse(cell.source).body
    except SyntaxError:  # a magic
        return ""
    sources = [ast.get_source_segment(cell.source, node) or "" for node in nodes if isinstance(node, ast.FunctionDef)]
    split = [source.split("\n") for source in sources]
    fitting = [lines for lines in split if len(lines) in CODE_LINES and max(map(len, lines)) <= MAX_CODE_WIDTH]
    return "\n".join(max(fitting, key=len, default=[]))


def practice_slides(heading: str, cells: list[NotebookNode]) -> Iterator[Slide]:
    """The longest cell of real use that fits on a page, and what it printed if there is room for that, too."""
    fitting = [cell for cell in cells if height(f"```python\n{cell.source}\n```") <= ROOM + 1]
    for cell in sorted(fitting, key=lambda cell: -len(cell.source))[:1]:
        code, text = f"```python\n{cell.source}\n```", printed(cell)
        both = f"{code}\n\n```text\n{text}\n```"
        yield Slide("code", heading, both if text and height(both) <= ROOM + 1 else code)


def result(cell: NotebookNode, is_last: bool) -> str:
    """What a cell printed, if a page has room for it and it is a table or the last thing before a text."""
    lines = printed(cell).split("\n")
    is_table = sum(TABLE_ROW.search(line) is not None for line in lines) > 1
    if not (is_table or is_last) or max(map(len, lines)) > MAX_WIDTH or not re.search(r"\d|\n", "\n".join(lines)):
        return ""
    return "\n".join([*lines[:PRINTED_LINES], *(["..."] if len(lines) > PRINTED_LINES else [])])


def code_slides(heading: str, cells: list[NotebookNode], after_formula: bool, text: str = "") -> Iterator[Slide]:
    """Slides of the code cells before `text`: the method, the figures, what else was printed, and the claims."""
    shown: Slide | tuple[str, str] | None = None  # a page of code or a figure, which waits for the claims below it
    found: list[str] = []
    last_figure = max((number for number, cell in enumerate(cells) if any(figures(cell))), default=-1)
    about_table = SPOKEN.search(text) is not None
    for number, cell in enumerate(cells):
        source = cell.source if "slide" in tags(cell) else short_function(cell) if after_formula else ""
        if source:
            yield from claimed(heading, shown, found)
            shown, found, after_formula = Slide("code", heading, f"```python\n{source}\n```"), [], False
        lines = result(cell, cell is cells[-1])
        if lines and (number > last_figure or (about_table and TABLE_ROW.search(lines))):
            block = f"```text\n{lines}\n```"
            if isinstance(shown, Slide) and not found and height(f"{shown.body}\n\n{block}") <= ROOM:
                shown.body += f"\n\n{block}"
            else:
                yield from claimed(heading, shown, found)
                shown, found = Slide("text", heading, block), []
        for image in figures(cell):
            if shown or len(found) > 2:  # a claim or two without a page of their own stand with the figure
                yield from claimed(heading, shown, found)
                found = []
            shown = image
        found = claims(cell) + found if isinstance(shown, tuple) else found + claims(cell)
    yield from claimed(heading, shown, found)


def claimed(heading: str, shown: Slide | tuple[str, str] | None, found: list[str]) -> Iterator[Slide]:
    """The page of code or the figure with the claims that followed it; without either, the claims alone."""
    if isinstance(shown, tuple):
        yield figure_slide(heading, *shown, found)
    elif shown or found:
        held = "\n".join(f"- {claim}" for claim in found)
        kind, above = (shown.kind, shown.body) if shown else ("text", MEASURED)
        yield Slide(kind, heading, f"{above}\n\n{held}")


def exercise_slide(heading: str, cells: list[NotebookNode]) -> Slide:
    """A page that lists the exercises, each by the line that names it in its cell or in the text above it."""
    named = []
    for cell in cells:
        if cell.cell_type == "code":
            named += re.findall(r"^# Exercise ([\d.]+), (\w+): (.+)$", cell.source, re.MULTILINE)
        else:
            named += re.findall(r"^\*\*Exercise ([\d.]+)\*\* \((\w+)[^)]*\)\.? (.+)$", cell.source, re.MULTILINE)
    once = {number: (level, task) for number, level, task in named}  # a cell names it more shortly than the text above
    listed = [f"- **{number}** ({level}) {sentences(task)[0].rstrip('.')}" for number, (level, task) in once.items()]
    ask = "Write the answer in place of `raise NotImplementedError`; the check below it answers at once."
    return Slide("text", heading, "\n".join(listed) + f"\n\n{ask}")


def opening_slides(section: Section, stem: str) -> Iterator[Slide]:
    """Title with the promise, what the student will do, and the symbols."""
    parts = [block for block in blocks(section.cells[0].source) if kind_of(block) not in ("image", "heading")]
    parts = [block for block in parts if not BUDGET.search(block)]
    promise = sentences(parts[0])
    told = " ".join(promise[:2])
    yield Slide("title", section.title, f"{told}\n\n`notebooks/{stem}.ipynb`", ["\n\n".join(parts)])
    chosen = [block if kind_of(block) != "text" else sentences(block)[0] for block in parts[1:]]
    yield from text_slides(section.title, chosen, "")


def section_slides(section: Section, core: list[str]) -> Iterator[Slide]:
    """One column of slides; `core` are all claims of the lesson's core path."""
    shown = [cell for cell in section.cells if not NEVER_SHOWN & set(tags(cell))]
    exercises = [cell for cell in shown if "exercise" in tags(cell)]
    texts = [cell for cell in shown if cell.cell_type == "markdown"]
    first = blocks(texts[0].source) if texts else []
    asks = bool(first) and first[0].startswith("**Question.**")
    question = first[0].removeprefix("**Question.**").strip() if asks else ""
    if question:
        yield Slide("title", section.title, question)
    if exercises:
        yield exercise_slide(section.title, [*texts, *exercises])
        shown = [cell for cell in shown if "exercise" not in tags(cell) and any(figures(cell))]
    after_formula = False
    groups = [(is_text, list(group)) for is_text, group in groupby(shown, lambda cell: cell.cell_type == "markdown")]
    for number, (is_text, cells) in enumerate(groups):
        if not is_text:
            data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
            tables = [claims_only(shown["text/markdown"], core) for shown in data if "text/markdown" in shown]
            yield from text_slides(section.title, tables, "")
            if section.title == "In practice":
                yield from practice_slides(section.title, cells)
            else:
                after = groups[number + 1][1][0].source if number + 1 < len(groups) else ""
                yield from code_slides(section.title, cells, after_formula, after)
            continue
        for cell in cells:
            source = cell.source
            if question and cell is texts[0]:
                source = "\n\n".join(first[1:])
            chosen = blocks(source) if "slide" in tags(cell) else condensed(source)
            seen = [block for block in blocks(source) if block.startswith("**What you see.**")]
            chosen = [block for block in chosen if not block.startswith("**What you see.**")]
            for block in seen:
                yield seen_slide(section.title, block)
            if leads_nowhere(chosen):
                yield Slide("notes", "", "", [source])
            else:
                yield from text_slides(section.title, chosen, source)
            after_formula = "$$" in source


def claims_only(table: str, core: list[str]) -> str:
    """The closing table without numbers that promise nothing, and without the claims of further sections."""
    head, line, *rows = table.split("\n")
    rows = [unbroken(row) for row in rows]
    said = [html.escape(row.split(" | ")[0].removeprefix("| ").replace("\\|", "|"), quote=False) for row in rows]
    shown = [row for row, text in zip(rows, said, strict=True) if any(claim.startswith(f"{text} (") for claim in core)]
    return "\n".join([head, line, *shown])


def seen_slide(heading: str, block: str) -> Slide:
    """What was seen, sentence by sentence, as far as a page holds it; all of it in the notes."""
    said = sentences(block)
    said[0] = LEAD.sub("", said[0])
    listed: list[str] = []
    for sentence in said:
        if listed and height("\n".join([*listed, f"- {sentence}"])) > ROOM - 1.5:
            break
        listed.append(f"- {sentence}")
    return Slide("text", heading, "**What you see**\n\n" + "\n".join(listed), [block])


def lead_slide(section: Section) -> Slide:
    """The page of a section that has nothing else to show: its heading, and how its text begins."""
    texts = (cell for cell in section.cells if cell.cell_type == "markdown" and not NEVER_SHOWN & set(tags(cell)))
    text = next((cell.source for cell in texts), "")
    return Slide("title", section.title, "\n\n".join(condensed(text)), [text])


def together(last: Slide, slide: Slide) -> str:
    """What both pages say if one has room for it: a short text joins the page of text, code or figure after it."""
    both = f"{last.body}\n\n{slide.body}"
    if last.kind != "text" or slide.kind not in ("text", "code", "figure", "tall"):
        return ""
    if slide.kind in ("text", "code"):
        both = re.sub(rf"({re.escape(MEASURED)}\n\n(?:- .*\n)+)\n{re.escape(MEASURED)}\n\n", r"\1", both)
        return both if sum(height(block) for block in blocks(both)) <= ROOM + 0.5 else ""
    lines = sum(height(block) for block in blocks(last.body))
    if lines > SHORT or kind_of(blocks(last.body)[0]) != "text" or MEASURED in last.body:
        return ""
    plot, _, listed = slide.body.partition("\n\n")
    if slide.kind == "tall":
        return f"{plot}\n\n{last.body}\n\n{listed}"
    pixels = int(re.search(r"max-height: (\d+)px", plot)[1]) - round(40 * lines)
    return re.sub(r"max-height: \d+px", f"max-height: {pixels}px", both) if pixels >= LOWEST else ""


def joined(slides: Iterable[Slide]) -> Iterator[Slide]:
    """The slides of a column, where short pages are put together."""
    last: Slide | None = None
    waiting: list[str] = []
    for slide in slides:
        slide.notes, waiting = waiting + slide.notes, []
        if slide.kind == "notes":
            waiting = slide.notes
            continue
        if last and (both := together(last, slide)):
            last = Slide(slide.kind, last.heading, both, [*last.notes, *slide.notes], slide.image)
            continue
        if last:
            yield last
        last = slide
    if last:
        last.notes += waiting
        yield last


def deck(notebook: NotebookNode, stem: str) -> NotebookNode:
    """A notebook of markdown cells with the slide types of nbconvert, made from the lesson `stem`."""
    opening, *others = sections(notebook)
    teaching = read_teaching(stem)
    core = [claim for section in others for cell in section.cells for claim in claims(cell)]
    said = {image: teaching.said(cell) for cell in notebook.cells for image, _ in figures(cell)}
    columns = [list(joined(opening_slides(opening, stem)))]
    for section in others:  # one whose text only leads over to code has its first sentences
        columns.append(list(joined(section_slides(section, core))) or [lead_slide(section)])
    cells = []
    for column in columns:
        column[0].notes.insert(0, teaching.minutes.get(column[0].heading, ""))
        for number, slide in enumerate(column):
            slide.notes.insert(0, said.get(slide.image, ""))
            mark = "##" if slide.kind == "title" else "###"
            metadata = {"slideshow": {"slide_type": "subslide" if number else "slide"}, "kind": slide.kind}
            cells.append(new_markdown_cell(f"{mark} {slide.heading}\n\n{slide.body}", metadata=metadata))
            if notes := "\n\n".join(note for note in slide.notes if note):
                cells.append(new_markdown_cell(notes, metadata={"slideshow": {"slide_type": "notes"}}))
    return new_notebook(cells=cells, metadata={"title": opening.title})
