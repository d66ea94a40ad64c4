"""What the book changes in the sources while Sphinx reads them; the files themselves stay as they are committed.

A lesson's badges, images on other servers, become a bar with buttons of its own. Marked, so
that scripts find them in the browser, are further sections and the right choice of each question of the quiz. Links to
files that are no page of the book lead to the repository. Images get the alternative text that the notebook keeps
beside them.
"""

import importlib.util
import json
import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import SphinxError

from course.site import quiz
from helpers.colab import REPOSITORY, TAG
from helpers.profiles import ROOT

BADGES = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\(([^)]*)\) \[!\[Open in Kaggle\]\([^)]*\)\]\(([^)]*)\)")
RELATIVE_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")
FURTHER = "*Further: no core section needs this one.*"  # in each heading cell that is tagged so; book.js folds it
MATHJAX = ("tex-chtml.js", "output/chtml/fonts")


def prepare_source(app: Sphinx, name: str, source: list[str]) -> None:
    """Change the text of a page before it is parsed."""
    suffix = Path(app.env.doc2path(name)).suffix
    if suffix == ".md":
        source[0] = lead_to_repository(app, name, source[0])
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        if "quiz" in tags:
            cell["source"] = quiz.mark("".join(cell["source"]), f"{posixpath.basename(name)}.{cell['id']}")
        if cell["cell_type"] == "markdown":
            text = BADGES.sub(lambda found: buttons(name, *found.groups()), "".join(cell["source"]))
            text = text.replace(FURTHER, f'<p class="further">{FURTHER.strip("*")}</p>')
            cell["source"] = lead_to_repository(app, name, text)
        elif "setup" in tags:
            tags.append("hide-input")
    app.env.metadata[name]["alternatives"] = [
        output["metadata"].get("image/png", {}).get("alt", "")
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    source[0] = json.dumps(notebook)


def buttons(name: str, colab: str, kaggle: str) -> str:
    """The bar at the top of a lesson."""
    notebook = f"{posixpath.basename(name)}.ipynb"
    return (
        f'<p class="lesson-buttons"><a href="{colab}">Open in Colab</a> <a href="{kaggle}">Open in Kaggle</a> '
        f'<a href="../_sources/{name}.ipynb" download="{notebook}">Download the notebook</a></p>'
    )


def lead_to_repository(app: Sphinx, name: str, text: str) -> str:
    """Links to files that are no page of the book, but are in the repository, lead there."""

    def address(found: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), found[1]))
        if (Path(app.srcdir) / path).is_file() or not (ROOT / path).exists():
            return found[0]
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/{TAG}/{path}{found[2] or ''}"

    return RELATIVE_LINK.sub(address, text)


def describe_images(app: Sphinx, doctree: nodes.document) -> None:
    """Give the figures of a notebook their alternative texts, in order."""
    name = app.env.current_document.docname
    texts: list[Any] = app.env.metadata[name].pop("alternatives", [])
    outputs = [node for node in doctree.findall(nodes.container) if node.get("nb_element") == "cell_code_output"]
    images = [image for output in outputs for image in output.findall(nodes.image)]
    if len(images) != len(texts):
        raise SphinxError(f"{name} shows {len(images)} figures, and its notebook holds {len(texts)}: look at both.")
    for image, text in zip(images, texts, strict=True):
        image["alt"] = text


def mathjax() -> Path:
    """The folder of MathJax among the installed packages."""
    package = importlib.util.find_spec("sphinx-mathjax-offline")
    if package is None or package.origin is None:
        raise SphinxError("MathJax is not installed: pip install sphinx-mathjax-offline, or make site.")
    return Path(package.origin).parent / "static/mathjax"


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax and its fonts into the book for the browser."""
    if error or app.builder.name != "html":
        return
    source, target = mathjax(), Path(app.outdir) / "_static/mathjax"
    for name in MATHJAX:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
        else:
            shutil.copy(source / name, target / name)
