"""Collects the sources of the book, and has Sphinx build it, without a network.

The sources are collected in a folder that mirrors the repository: the pages in site/, every lesson, docs/*.md, the
model cards and the headline figures. What is drawn from the notebooks' metadata, the ledger of claims, what the
rehearsal found, and the tables of the calculator, are written beside them.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from sphinx.cmd.build import build_main

from course.notebooks import read_notebook, select_notebooks, tags
from course.site import glossary, japanese, ledger, lesson_map, rehearsal
from course.site.chromium import chromium
from course.site.pdf import print_book
from course.slides.sections import figures
from course.translation import LANGUAGE
from helpers.errors import CourseError
from helpers.files import replacing_folder
from helpers.memory import CONTEXT, FRAGMENTATION, GPUS, ModelShape, bundled_shapes
from helpers.profiles import ROOT

SITE = ROOT / "site"
NAME = "llm-workbook"
FILES = {"epub": "EPUB for e-readers", "pdf": "PDF for paper"}
SOURCES = (
    "notebooks/[0-9][0-9]_*.ipynb",
    "figures/*.png",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/**/*.svg",
    "data/*/README.md",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", help="folder, which is replaced")
    parser.add_argument("--epub", action="store_true", help=f"put {NAME}.epub into it, too (needs Chromium)")
    parser.add_argument("--pdf", action="store_true", help=f"put {NAME}.pdf into it, too (needs Chromium)")


def command(options: argparse.Namespace) -> None:
    """Build the book, and leave an older one alone until the new one is complete; CourseError if Sphinx complains."""
    out = options.out.resolve()
    files = {kind: label for kind, label in FILES.items() if getattr(options, kind)}
    if files:
        chromium()  # before the minutes that the rest takes
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, replacing_folder(out) as made:
        sources, reading = Path(name) / "sources", Path(name) / "reading"
        sources.mkdir()
        collect(sources, files)
        build(sources, made, "html", static=sources / "static")
        translation = Path(name) / LANGUAGE / "sources"
        translation.mkdir(parents=True)
        japanese.collect(translation, sources, headline_figures(select_notebooks()))
        build(translation, made / LANGUAGE, "html", static=sources / "static", language=LANGUAGE)
        (made / "llms.txt").write_text(outline(select_notebooks()), encoding="utf-8")
        if files:
            build(sources, reading, "epub", static=SITE / "reading")
        if "pdf" in files:
            print_book(reading, reading / f"{NAME}.pdf")
        for kind in files:
            shutil.copy(reading / f"{NAME}.{kind}", made)
    print(f"The book is ready: open {out / 'index.html'}")
    for kind in files:
        file = out / f"{NAME}.{kind}"
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def build(sources: Path, out: Path, builder: str, static: Path, language: str = "en") -> None:
    """Have Sphinx build the sources into the folder; CourseError if it complains."""
    flags = ["--quiet", "--fail-on-warning", "--define", f"html_static_path={static}", "--builder", builder]
    flags += ["--define", f"language={language}"]
    folders = ["--conf-dir", str(SITE), "--doctree-dir", str(sources.parent / "read"), str(sources), str(out)]
    if build_main([*flags, *folders]):
        raise CourseError("The book was not built: mend what Sphinx says above, and run make site again.")


def collect(folder: Path, files: dict[str, str]) -> None:
    """Copy and write all sources of the book into the folder. The start page leads to the files that will be there."""
    for page in SITE.glob("*.md"):
        shutil.copy(page, folder / page.name)
    shutil.copytree(SITE / "static", folder / "static")
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    lessons = select_notebooks()
    cards = sorted(path.parent.name for path in folder.glob("data/*/README.md"))
    entries = [f"Model card: {name} <data/{name}/README>" for name in cards]
    for path in sorted(folder.glob("docs/*.md")):
        entries.append(f"docs/{path.stem}")
        if parts := sorted(path.with_suffix("").glob("*.md")):  # the parts of docs/NAME.md are in docs/NAME/
            names = "\n".join(f"{path.stem}/{part.stem}" for part in parts)
            text = path.read_text(encoding="utf-8")
            path.write_text(f"{text}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n", encoding="utf-8")
    fill(
        folder / "index.md",
        lessons=lesson_map.table(lessons),
        files=" ".join(f'<a href="{NAME}.{kind}" download="">{label}</a>' for kind, label in files.items()),
        figures=headline_figures(lessons),
        documents="\n".join(entries),
    )
    fill(folder / "claims.md", claims=ledger.page(lessons))
    fill(folder / "rehearsal.md", rehearsal=rehearsal.page(lessons))
    fill(folder / "glossary.md", symbols=glossary.symbols(lessons))
    words = glossary.linked((folder / "glossary.md").read_text(encoding="utf-8"), lessons)
    (folder / "glossary.md").write_text(words, encoding="utf-8")
    fill(folder / "lesson_map.md", map=lesson_map.draw(lessons))
    tables = "const CALCULATOR = " + json.dumps(calculator_tables(), separators=(",", ":")) + ";\n"
    (folder / "static/calculator_tables.js").write_text(tables, encoding="utf-8")


def fill(page: Path, **values: str) -> None:
    """Replace each {{ name }} in the page."""
    text = page.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{{ {name} }}}}", value)
    page.write_text(text, encoding="utf-8")


def outline(lessons: list[Path]) -> str:
    """The book for programs that read: what it is, and each lesson with its promise (https://llmstxt.org)."""
    lines = [
        "# LLM Workbook",
        "",
        "> A course on large language models in notebooks that run on a CPU.",
        "",
        "## Lessons",
        "",
    ]
    for path in lessons:
        notebook = read_notebook(path)
        paragraphs = notebook.cells[0].source.split("\n\n")
        promise = next(" ".join(text.split()) for text in paragraphs if text[:1] not in "#[*|<")
        title = f"{path.stem[:2]} {notebook.metadata.workbook.title}"
        lines.append(f"- [{title}](_sources/notebooks/{path.name}): {promise}")
    lines += ["", "## For helpers", "", "- [Hints first, never the solution](docs/tutors.html)"]
    return "\n".join(lines) + "\n"


def headline_figures(lessons: list[Path]) -> str:
    """Markdown of the figures in figures/, each a link to its lesson."""
    found = []
    for path in lessons:
        if (ROOT / "figures" / f"{path.stem}.png").exists():
            cells = [cell for cell in read_notebook(path).cells if "headline" in tags(cell)]
            alt = next((alt for cell in cells for _, alt in figures(cell)), path.stem)
            alt = alt.replace("[", "\\[").replace("]", "\\]")
            found.append(f"[![{alt}](figures/{path.stem}.png)](notebooks/{path.name})")
    return "\n".join(found)


def calculator_tables() -> dict:
    """What the calculator in the browser has to know: the bundled models, the GPUs, and the rule of thumb."""
    return {
        "shapes": {name: asdict(ModelShape.from_config(name)) for name in bundled_shapes()},
        "gpus": {name: gpu.memory for name, gpu in GPUS.items()},
        "context": CONTEXT,
        "fragmentation": FRAGMENTATION,
    }
