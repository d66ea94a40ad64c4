"""Makes lecture slides from the notebooks: `python -m course slides export`, and the time plan of a lecture.

The slides follow from the anatomy that all lessons share, so that a lesson needs no second text for them. Each section
becomes a column: its question; from its text the first sentence of each paragraph, with all formulas, lists and tables;
under a formula the first short function that computes it; every figure, with the claims printed below it; what was
seen. The rest of the text stands in the speaker notes (key S). Other code and its printed tables are left out, and
solutions and hints never appear. A cell can say otherwise: the tag `skip` leaves it out, `slide` shows it whole.

nbconvert writes the pages; reveal.js and MathJax are copied beside them from installed packages, so that nothing is
fetched while a lecture is held. The module knows nothing about what a notebook teaches.
"""

import argparse
import ast
import html
import math
import re
import shutil
import struct
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from itertools import groupby
from pathlib import Path

from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell, new_notebook

from course.arguments import add_notebooks
from course.notebooks import BUDGET, read_notebook, select_notebooks, tags
from helpers.errors import CourseError
from helpers.profiles import ROOT

OUT = ROOT / "build" / "slides"
TEMPLATE = ROOT / "docs" / "slides"
ROOM = 14.0  # lines of text that a page holds under its heading
LINE = 74  # characters in a line of text
CODE_LINES, MAX_CODE_WIDTH = range(5, 20), 98
NEVER_SHOWN = {"setup", "parameters", "check", "solution", "skip"}
PROTECTED = re.compile(r"\$[^$]+\$|`[^`]+`")  # formulas and code, in which no sentence ends
SENTENCE_END = re.compile(r"(?<!\bal)(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?][*\")]*\s+(?=[A-Z*\"(\x00])")
LEAD = re.compile(r"\*\*[^*]+[.?:]\*\*\s+")  # such as **What you see.**
MEASURED = "**Measured here**"
SPEAKING_RATE = 130  # words of a lesson's text that a lecturer covers in a minute
FIGURE_MINUTES, CODE_MINUTES = 2.0, 0.5  # for a figure, and for a code cell that is shown
LECTURE = 90  # minutes


@dataclass
class Slide:
    """One page: its kind is title, text, code, figure or tall (a figure that is as high as it is wide).

    One of kind notes is no page; its notes belong to the next one.
    """

    kind: str
    heading: str
    body: str  # markdown
    notes: list[str] = field(default_factory=list)  # markdown


@dataclass
class Section:
    """A part of a lesson under one heading of level 2; the part before the first one has the lesson's title."""

    title: str
    cells: list[NotebookNode]


# Reading a lesson


def sections(notebook: NotebookNode) -> list[Section]:
    """The lesson's parts in order, without what is folded. A markdown cell that holds headings is divided at them."""
    found = [Section("", [])]
    for cell in notebook.cells:
        if cell.cell_type != "markdown" or tags(cell):
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


def blocks(text: str) -> list[str]:
    """Paragraphs, formulas, lists, tables, headings and code of a markdown text."""
    text = re.sub(r"^(\$\$.+?\$\$)$", r"\n\1\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"([^\n])\n((?:[-*]|\d+\.) )", lambda m: "\n".join(m.groups()), text)
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph; its bold lead belongs to the first of them."""
    kept = PROTECTED.findall(text)
    plain = PROTECTED.sub("\x00", text.replace("\n", " "))
    start = lead.end() if (lead := LEAD.match(plain)) else 0
    ends = [match.end() for match in SENTENCE_END.finditer(plain) if match.end() > start]
    pieces = [plain[a:b].strip() for a, b in zip([0, *ends], [*ends, len(plain)], strict=True)]
    originals = iter(kept)
    return [re.sub("\x00", lambda _: next(originals), piece) for piece in pieces if piece]


def kind_of(block: str) -> str:
    """What a block is: heading, formula, table, list, code, image or text."""
    if block.startswith("$$"):
        return "formula"
    starts = {"#": "heading", "|": "table", "```": "code", "[![": "image", "![": "image", "<": "image"}
    if found := next((kind for start, kind in starts.items() if block.startswith(start)), None):
        return found
    return "list" if re.match(r"([-*]|\d+\.) ", block) else "text"


def items(block: str) -> list[tuple[str, str]]:
    """The items of a list as pairs of mark and text."""
    return [
        (mark, " ".join(text.split()))
        for mark, text in (item.split(" ", 1) for item in re.split(r"\n(?=(?:[-*]|\d+\.) )", block))
    ]


def condensed(text: str) -> list[str]:
    """What of a text stands on the slides: first sentences, formulas, lists and tables."""
    chosen = []
    parts = blocks(text)
    for block, after in zip(parts, [*parts[1:], ""], strict=True):
        kind = kind_of(block)
        if kind == "text":
            said = sentences(block)
            leads_on = block.endswith(":") and kind_of(after) != "text" and len(said) > 1
            chosen.append(" ".join([said[0], *([said[-1]] if leads_on else [])]))
        elif kind == "list":
            chosen.append("\n".join(f"{mark} {sentences(item)[0]}" for mark, item in items(block)))
        elif kind == "formula":
            chosen.append(in_lines(block))
        elif kind == "table":
            chosen.append(block)
    return chosen


def in_lines(formula: str) -> str:
    """A long formula that consists of several, each on a line of its own."""
    parts = formula.strip("$").split(r"\qquad")
    if len(parts) == 1 or drawn_length(formula) < LINE or "&" in formula or r"\begin" in formula:
        return formula
    below = r" \\[6pt] ".join(part for part in parts if part.strip())
    return rf"$$\begin{{gathered}} {below} \end{{gathered}}$$"


def leads_nowhere(chosen: list[str]) -> bool:
    """Whether the blocks are sentences without a bold lead, which only lead over to the next cell."""
    return all(kind_of(block) == "text" and not block.startswith("**") for block in chosen)


# Pages


def height(block: str) -> float:
    """Lines of text that a block takes on a page."""
    kind = kind_of(block)
    if kind == "formula":
        return 1.6 + 1.5 * block.count(r"\\") + 1.1 * (r"\frac" in block) + 0.6 * (r"\sum" in block)
    if kind == "table":
        return sum(row_height(row) for row in block.split("\n") if not re.fullmatch(r"[|\s:-]+", row)) + 0.4
    if kind == "list":
        return sum(math.ceil(drawn_length(item) / (LINE - 4)) + 0.25 for _, item in items(block)) + 0.4
    return math.ceil(drawn_length(block) / LINE) + 0.45


def drawn_length(text: str) -> int:
    """Characters of a text as it is drawn: a formula is shorter than its source."""
    return len(re.sub(r"\\[a-z]+", "x", text).translate(str.maketrans("", "", "$*{}^_")))


def row_height(row: str) -> float:
    """Lines of a row of a table, whose letters are smaller; long cells share what width there is."""
    lengths = [len(cell) for cell in row.strip("| ").split("|")]
    widths = [max(length, 12) ** 0.7 for length in lengths]
    share = LINE * 1.3 / sum(widths)
    lines = max(math.ceil(length / (width * share)) for length, width in zip(lengths, widths, strict=True))
    return 0.82 * lines + 0.2


def divided(block: str, room: float) -> list[str]:
    """A list or a table in parts, the first not higher than `room`; each part of a table has its head."""
    kind = kind_of(block)
    if kind not in ("list", "table"):
        return [block]
    lines = [" ".join(item) for item in items(block)] if kind == "list" else block.split("\n")
    head, lines = ([], lines) if kind == "list" else (lines[:2], lines[2:])
    parts: list[list[str]] = [[]]
    for line in lines:
        if parts[-1] and height("\n".join([*head, *parts[-1], line])) > (ROOM if len(parts) > 1 else room):
            parts.append([])
        parts[-1].append(line)
    return ["\n".join([*head, *part]) for part in parts]


def pages(chosen: list[str]) -> list[str]:
    """The blocks, put together so that each page is full but not too full."""
    packed: list[list[str]] = [[]]
    for block in chosen:
        left = ROOM - sum(map(height, packed[-1]))
        if height(block) <= left:
            packed[-1].append(block)
            continue
        if left < min(ROOM / 2, height(block)):  # too little to begin it here
            # What announces a formula, a list or a table stays with it.
            announces = kind_of(block) == "formula" or (kind_of(block) != "text" and packed[-1][-1].endswith(":"))
            announces = announces and len(packed[-1]) > 1 and kind_of(packed[-1][-1]) == "text"
            packed.append([packed[-1].pop()] if announces else [])
            left = ROOM - sum(map(height, packed[-1]))
        first, *others = divided(block, left)
        packed[-1].append(first)
        packed += [[part] for part in others]
    return ["\n\n".join(page) for page in packed if page]


def text_slides(heading: str, chosen: list[str], notes: str) -> Iterator[Slide]:
    """Slides with the chosen blocks; the first has the whole text in its notes, also what no page is left for."""
    for number, page in enumerate(pages(chosen)):
        if number and leads_nowhere(page.split("\n\n")):
            continue
        yield Slide("text", heading, page, [notes] if number == 0 else [])


def figures(cell: NotebookNode) -> Iterator[tuple[str, str]]:
    """The images of a code cell as base64, each with its alt text."""
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            yield data["image/png"].replace("\n", ""), output.metadata.get("image/png", {}).get("alt", "")


def claims(cell: NotebookNode) -> list[str]:
    """What a code cell printed about its numbers: claims that held, and differences to a library."""
    lines = "\n".join(output.get("text", "") for output in cell.get("outputs", [])).split("\n")
    held = [line.removeprefix("holds: ") for line in lines if line.startswith("holds: ")]
    equal = [" ".join(line.split()) for line in lines if "largest difference" in line][:1]
    return [html.escape(line, quote=False) for line in held + equal]


def figure_slide(heading: str, image: str, alt: str, found: list[str]) -> Slide:
    """A page with a figure, and under or beside it what was claimed about it."""
    width, high = struct.unpack(">II", b64decode(image[:64])[16:24])
    kind = "tall" if high > 0.9 * width else "figure"
    beside = found[: 3 if kind == "figure" else 6]
    pixels = 610 - (kind == "figure") * 34 * (len(beside) + sum(len(claim) > LINE * 1.3 for claim in beside))
    style = f"max-height: {pixels}px"
    plot = f'<div class="plot"><img alt="{html.escape(alt)}" style="{style}" src="data:image/png;base64,{image}"></div>'
    listed = [f"- {claim}" for claim in found]
    return Slide(kind, heading, "\n\n".join([plot, "\n".join(listed[: len(beside)])]), [alt, "\n".join(listed)])


def short_function(cell: NotebookNode) -> str:
    """The source of the cell's first function, if it is neither trivial nor too long for a page; otherwise nothing."""
    try:
        tree = ast.parse(cell.source)
    except SyntaxError:  # a magic
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            source = ast.get_source_segment(cell.source, node)
            lines = source.split("\n")
            return source if len(lines) in CODE_LINES and max(map(len, lines)) <= MAX_CODE_WIDTH else ""
    return ""


def code_slides(heading: str, cells: list[NotebookNode], after_formula: bool) -> Iterator[Slide]:
    """Slides of the code cells between two texts: the method, the figures, and what was claimed."""
    shown: Slide | tuple[str, str] | None = None  # a page of code or a figure, which waits for the claims below it
    found: list[str] = []
    for cell in cells:
        source = cell.source if "slide" in tags(cell) else short_function(cell) if after_formula else ""
        if source:
            yield from claimed(heading, shown, found)
            shown, found, after_formula = Slide("code", heading, f"```python\n{source}\n```"), [], False
        for image in figures(cell):
            yield from claimed(heading, shown, found)
            shown, found = image, []
        found += claims(cell)
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
    listed = [f"- **{number}** ({level}) {sentences(task)[0].rstrip('.')}" for number, level, task in named]
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


def section_slides(section: Section) -> Iterator[Slide]:
    """One column of slides."""
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
        shown = [cell for cell in shown if "exercise" not in tags(cell) and cell.cell_type == "code"]
    after_formula = False
    for is_text, group in groupby(shown, key=lambda cell: cell.cell_type == "markdown"):
        cells = list(group)
        if not is_text:
            printed = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
            # A double bar is a sign of mathematics, and would break the table.
            tables = [data["text/markdown"].replace("||", r"\|\|") for data in printed if "text/markdown" in data]
            yield from text_slides(section.title, tables, "")
            yield from code_slides(section.title, cells, after_formula)
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


def joined(slides: Iterable[Slide]) -> Iterator[Slide]:
    """The slides of a column, where short pages of text are put together."""
    last: Slide | None = None
    waiting: list[str] = []
    for slide in slides:
        slide.notes, waiting = waiting + slide.notes, []
        if slide.kind == "notes":
            waiting = slide.notes
            continue
        both = f"{last.body}\n\n{slide.body}" if last and last.kind == slide.kind == "text" else ""
        both = re.sub(rf"({re.escape(MEASURED)}\n\n(?:- .*\n)+)\n{re.escape(MEASURED)}\n\n", r"\1", both)
        if both and sum(map(height, both.split("\n\n"))) <= ROOM:
            last = Slide("text", last.heading, both, [*last.notes, *slide.notes])
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
    columns = [list(joined(opening_slides(opening, stem)))]
    for section in others:  # one whose text only leads over to code has its heading
        columns.append(list(joined(section_slides(section))) or [Slide("title", section.title, "")])
    cells = []
    for column in columns:
        for number, slide in enumerate(column):
            mark = "##" if slide.kind == "title" else "###"
            metadata = {"slideshow": {"slide_type": "subslide" if number else "slide"}, "kind": slide.kind}
            cells.append(new_markdown_cell(f"{mark} {slide.heading}\n\n{slide.body}", metadata=metadata))
            if notes := "\n\n".join(note for note in slide.notes if note):
                cells.append(new_markdown_cell(notes, metadata={"slideshow": {"slide_type": "notes"}}))
    return new_notebook(cells=cells, metadata={"title": opening.title})


# Files


def export(notebook_path: Path, out: Path = OUT) -> Path:
    """Write the slides of a lesson as NN_name.slides.html into `out`, and what the page needs into `out`/assets."""
    from nbconvert import SlidesExporter
    from traitlets.config import Config

    style = {"style": "default", "highlight_class": ".highlight"}
    exporter = SlidesExporter(
        extra_template_basedirs=[str(TEMPLATE.parent)],
        template_name=TEMPLATE.name,
        config=Config({"CSSHTMLHeaderPreprocessor": style}),
    )
    page, _ = exporter.from_notebook_node(deck(read_notebook(notebook_path), notebook_path.stem))
    copy_assets(out / "assets")
    path = out / f"{notebook_path.stem}.slides.html"
    path.write_text(page, encoding="utf-8")
    return path


def copy_assets(folder: Path) -> None:
    """Copy reveal.js, MathJax and the style into the folder; CourseError if a package is missing."""
    reveal = package_file("sphinx-revealjs", "sphinx_revealjs/_static/revealjs")
    mathjax = package_file("sphinx-mathjax-offline", "sphinx-mathjax-offline/static/mathjax")
    sources = {
        "reveal/reset.css": reveal / "dist" / "reset.css",
        "reveal/reveal.css": reveal / "dist" / "reveal.css",
        "reveal/reveal.js": reveal / "dist" / "reveal.js",
        "reveal/notes.js": reveal / "plugin" / "notes" / "notes.js",
        "reveal/LICENSE": reveal / "LICENSE",
        "mathjax/tex-svg.js": mathjax / "tex-svg.js",
        "slides.css": TEMPLATE / "slides.css",
    }
    for name, source in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)


def package_file(package: str, path: str) -> Path:
    """A folder of an installed package, found without importing it."""
    try:
        return Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        raise CourseError(f"The slides need the package {package}: install requirements.txt.") from None


# How long a lecture takes


def minutes(notebook: NotebookNode, total: int = LECTURE) -> dict[str, int]:
    """Minutes of a lecture of `total` for each section up to the exercises, by title, in whole numbers.

    A section's share is that of its words, figures and code cells. The opening also has the time that the lesson takes
    to run on a CPU, since the lecturer starts it there. Exercises and all after them are for the laboratory.
    """
    shares = {}
    for section in sections(notebook):
        if any("exercise" in tags(cell) for cell in section.cells):
            break
        words = sum(len(cell.source.split()) for cell in section.cells if cell.cell_type == "markdown")
        code = [c for c in section.cells if c.cell_type == "code" and not NEVER_SHOWN & set(tags(c))]
        images = sum(len(list(figures(cell))) for cell in code)
        shares[section.title] = words / SPEAKING_RATE + FIGURE_MINUTES * images + CODE_MINUTES * len(code)
    budget = notebook.metadata.get("workbook", {}).get("budget", {}).get("cpu", {})
    shares[next(iter(shares))] += budget.get("seconds", 0) / 60
    exact = {title: share * total / sum(shares.values()) for title, share in shares.items()}
    whole = {title: int(share) for title, share in exact.items()}
    by_rest = sorted(exact, key=lambda title: whole[title] - exact[title])
    for title in by_rest[: total - sum(whole.values())]:
        whole[title] += 1
    return whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("what", choices=("export", "minutes"), help="write slides, or print minutes for each section")
    parser.add_argument("--only", nargs="+", metavar="NN", help="these lessons, such as 03 05")
    add_notebooks(parser)
    parser.add_argument("--out", type=Path, default=OUT, help="where the slides go")


def command(options: argparse.Namespace) -> None:
    """Write the slides of the lessons, or print their time plan."""
    for path in select_notebooks(options.notebooks.resolve(), options.only):
        if options.what == "export":
            print(export(path, options.out.resolve()))
        else:
            print(f"{path.stem}: {LECTURE} minutes")
            for title, number in minutes(read_notebook(path)).items():
                print(f"  {number:>3}  {title}")
