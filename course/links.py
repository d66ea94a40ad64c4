"""Where the course is published: `python -m course links [owner/name] [--version 1.0.0]`, or `make links REPO=...`.

`REPOSITORY` and `TAG` in `helpers.colab` say it. The badges and the setup cell of every notebook and its twin,
README.md, pyproject.toml and the documentation repeat it, and this command brings them all in line. It changes nothing
else: the setup cell does the same as before outside of Colab, so outputs that belonged to their notebook still do.
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from course.notebooks import read_notebook, select_notebooks, source_hash, tags
from course.twins import FORMAT, as_source, contents_hash, twin
from helpers.colab import REPOSITORY, SETUP_CELL, TAG
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

GITHUB = "https://github.com/"
DOCUMENTS = ("*.md", "docs/**/*.md", "data/*/README.md", "*.cff")
PLACES = r"(?:(?<=https://colab\.research\.google\.com/github/)|(?<=welcome\?src=https://github\.com/))"
BADGE = re.compile(PLACES + r"[^/\s]+/[^/\s]+/blob/[^/\s]+(?=/notebooks/\d\d_)")
# GitHub's own rules: no hyphen at the ends of an owner, no name that is only dots.
NAME = re.compile(r"[A-Za-z0-9](?:-?[A-Za-z0-9]){0,38}/(?!\.+$)[A-Za-z0-9._-]{1,100}(?<!\.git)")
VERSION = re.compile(r"\d+\.\d+\.\d+")


def relink(root: Path, repository: str, tag: str) -> list[Path]:
    """Make everything below `root` name this repository (owner/name) and this tag; return the files that changed.

    A notebook whose outputs were those of its sources before remains so; one that was stale remains stale. In the same
    way a notebook and its twin that were in line remain so, and where one was edited it is known which.
    """
    old = REPOSITORY.removeprefix(GITHUB)
    setup = SETUP_CELL.replace(f'"{TAG}", "{REPOSITORY}"', f'"{tag}", "{GITHUB}{repository}"').strip()

    def relinked(text: str) -> str:
        text = re.sub(rf"(?<={re.escape(GITHUB)}){re.escape(old)}(?![\w-])", repository, text)
        return BADGE.sub(f"{repository}/blob/{tag}", text)

    def relink_cells(notebook: NotebookNode) -> None:
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = relinked(cell.source)
            elif "setup" in tags(cell):
                cell.source = setup

    texts = {}
    for path in select_notebooks(root / "notebooks"):
        notebook = read_notebook(path)
        workbook = notebook.metadata.get("workbook", {})
        fresh = workbook.get("source_hash") == source_hash(notebook)
        sides = [notebook]
        if twin(path).exists():
            sides.append(jupytext.read(twin(path), fmt=FORMAT))
        last = next((side for side in sides if contents_hash(side) == workbook.get("twin")), None)
        for side in sides:
            relink_cells(side)
        if fresh:
            workbook["source_hash"] = source_hash(notebook)
        if last:
            workbook["twin"] = contents_hash(last)
        texts[path] = nbformat.writes(notebook) + "\n"
        if len(sides) > 1:
            texts[twin(path)] = as_source(sides[1])
    documents = [path for pattern in DOCUMENTS for path in root.glob(pattern)]
    for path in [*documents, root / "pyproject.toml"]:
        texts[path] = relinked(path.read_text(encoding="utf-8"))
        if path.suffix in (".cff", ".toml"):
            texts[path] = re.sub(r'(?m)^(version(?:: | = )"?)[\d.]+', rf"\g<1>{tag.removeprefix('v')}", texts[path])
    # Last the constants: a run that was stopped before can be repeated.
    constants = root / "helpers" / "colab.py"
    texts[constants] = re.sub(r'(?m)^TAG = "[^"]*"', f'TAG = "{tag}"', relinked(constants.read_text(encoding="utf-8")))

    changed = [path for path, text in texts.items() if text != path.read_text(encoding="utf-8")]
    for path in changed:
        write_atomically(path, texts[path])
    return changed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("repository", nargs="?", default=REPOSITORY.removeprefix(GITHUB), help="owner/name on GitHub")
    parser.add_argument("--version", default=TAG.removeprefix("v"), help="of the release whose tag is fetched")


def command(options: argparse.Namespace) -> None:
    """Relink this repository; CourseError for what is no repository or no version."""
    if not NAME.fullmatch(options.repository):
        raise CourseError(f"{options.repository!r} is no GitHub repository: give owner/name, such as ada/llm-course.")
    if not VERSION.fullmatch(options.version):
        raise CourseError(f"{options.version!r} is no version: give three numbers, such as 1.0.0.")
    changed = relink(ROOT, options.repository, f"v{options.version}")
    for path in changed:
        print(f"changed {path.relative_to(ROOT)}")
    print(f"{options.repository} at v{options.version}: {len(changed)} files changed.")
