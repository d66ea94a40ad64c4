"""Writes the pages of a lesson, and beside them all that they load."""

import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from course.notebooks import read_notebook
from course.slides.deck import deck
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

TEMPLATE = ROOT / "docs" / "slides"


def export(notebook_path: Path, out: Path) -> Path:
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
    write_atomically(path, page)
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
        raise CourseError(f"The slides need the package {package}: install requirements-dev.txt.") from None
