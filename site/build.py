"""Builds the book from the committed notebooks: `make site`, or `python site/build.py --out FOLDER`.

Its sources are collected in a folder that mirrors the repository: the pages in site/, every lesson, docs/*.md and the
model cards. What is drawn from the notebooks' metadata, and the tables of the calculator, are written beside them.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import lesson_map
from sphinx.cmd.build import build_main

from course import notebooks
from helpers.errors import CourseError, exit_cleanly
from helpers.memory import CONTEXT, FRAGMENTATION, GPUS, ModelShape, bundled_shapes
from helpers.profiles import ROOT

SITE = ROOT / "site"
SOURCES = ("notebooks/[0-9][0-9]_*.ipynb", "docs/**/*.md", "docs/**/*.png", "docs/**/*.svg", "data/*/README.md")


def collect(folder: Path) -> None:
    """Copy and write all sources of the book into the folder."""
    for page in SITE.glob("*.md"):
        shutil.copy(page, folder / page.name)
    shutil.copytree(SITE / "static", folder / "static")
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    lessons = notebooks.select_notebooks()
    cards = sorted(path.parent.name for path in folder.glob("data/*/README.md"))
    entries = [f"Model card: {name} <data/{name}/README>" for name in cards]
    for path in sorted(folder.glob("docs/*.md")):
        entries.append(f"docs/{path.stem}")
        if parts := sorted(path.with_suffix("").glob("*.md")):  # the parts of docs/NAME.md are in docs/NAME/
            names = "\n".join(f"{path.stem}/{part.stem}" for part in parts)
            text = path.read_text(encoding="utf-8")
            path.write_text(f"{text}\n```{{toctree}}\n:hidden:\n\n{names}\n```\n", encoding="utf-8")
    fill(folder / "index.md", lessons=lesson_map.table(lessons), documents="\n".join(entries))
    fill(folder / "lesson_map.md", map=lesson_map.draw(lessons))
    tables = "const CALCULATOR = " + json.dumps(calculator_tables(), separators=(",", ":")) + ";\n"
    (folder / "static/calculator_tables.js").write_text(tables, encoding="utf-8")


def fill(page: Path, **values: str) -> None:
    """Replace each {{ name }} in the page."""
    text = page.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{{{{ {name} }}}}", value)
    page.write_text(text, encoding="utf-8")


def calculator_tables() -> dict:
    """What the calculator in the browser has to know: the bundled models, the GPUs, and the rule of thumb."""
    return {
        "shapes": {name: asdict(ModelShape.from_config(name)) for name in bundled_shapes()},
        "gpus": {name: gpu.memory for name, gpu in GPUS.items()},
        "context": CONTEXT,
        "fragmentation": FRAGMENTATION,
    }


def main(arguments: list[str] | None = None) -> None:
    """Build the book, and leave an older one alone until the new one is complete."""
    parser = argparse.ArgumentParser(description="Build the book from the committed notebooks, without a network.")
    parser.add_argument("--out", type=Path, default=ROOT / "build/site", help="default: build/site")
    out = parser.parse_args(arguments).out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=out.parent) as name:
        sources, made = Path(name) / "sources", Path(name) / "made"
        sources.mkdir()
        collect(sources)
        options = ["--quiet", "--fail-on-warning", "--define", f"html_static_path={sources / 'static'}"]
        status = build_main([*options, "-b", "html", "-c", str(SITE), "-d", f"{name}/read", str(sources), str(made)])
        if status:
            raise CourseError("The book was not built: mend what Sphinx says above, and run make site again.")
        shutil.rmtree(made / ".doctrees", ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    print(f"The book is ready: open {out / 'index.html'}")


if __name__ == "__main__":
    exit_cleanly(main)
