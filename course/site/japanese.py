"""The sources of the book's part in Japanese, from the English ones and the catalogues.

Its pages have the addresses of the English ones below `ja/`, so that a page finds itself in the other language. Links
to pages that are in English alone lead there.
"""

import posixpath
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from sphinx.application import Sphinx
from sphinx.search.ja import SearchJapanese

from course.notebooks import select_notebooks
from course.site import glossary, lesson_map
from course.site.pages import BADGES
from course.translation import LANGUAGE, NAME, PAGES, WHOLE, Say, edition, name_figures, speaker, translated
from helpers.profiles import ROOT

LINK = re.compile(r"(?<!!)\[([^][]+)\]\((?!\w+:|#|/)([^()\s#]+)(#[^()\s]*)?\)")
CONTENTS = re.compile(r"(?<=```\{toctree\}\n).*?(?=\n```)", re.DOTALL)
ABOUT = (
    "Here are the summary, the symbols and the quiz. The text of the lesson and its figures are in English; questions "
    "that name a figure or a section mean those."
)


class Search(SearchJapanese):
    """Sphinx's search, which knows single words, with what a reader enters besides: compounds, and parts of them.

    The browser looks within longer words only for what is no word of the index.
    """

    def split(self, input: str) -> list[str]:
        """The words of a text for the index."""
        words = [*super().split(input), *re.findall(r"\w+", input)]
        for run in re.findall("[一-鿿ァ-ヶー]+", input):  # kanji and katakana: 報酬モデル, 報酬, モデル
            parts = re.findall("[一-鿿]|[ァ-ヶー]+", run)
            words += ["".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
        return words


def collect(folder: Path, english: Path, figures: str) -> None:
    """Write the sources into the folder; `english` has the English ones, `figures` is the gallery of the start page."""
    say, lessons = speaker(), select_notebooks()
    if (english / "figures").exists():
        shutil.copytree(english / "figures", folder / "figures")
    (folder / "notebooks").mkdir()
    values = {
        "lessons": translated(lesson_map.table(lessons), say),
        "figures": name_figures(figures, say),
        "symbols": translated(glossary.symbols(lessons, say), say),
        "map": lesson_map.draw(lessons, say),
    }
    for name in PAGES:
        text = translated((ROOT / "site" / f"{name}.md").read_text(encoding="utf-8"), say)
        text = re.sub(r"\{\{ (\w+) \}\}", lambda found: values.get(found[1], ""), text)
        if name == "glossary":
            text = glossary.linked(text, lessons)
        text = CONTENTS.sub(lambda found: contents(found[0], say), text)
        (folder / f"{name}.md").write_text(lead_to_english(text, "", english), encoding="utf-8")
    for path in lessons:
        nbformat.write(lesson(path, say, english), folder / "notebooks" / path.name)


def lesson(path: Path, say: Say, english: Path) -> NotebookNode:
    """What there is of a lesson in Japanese, with a bar that leads to the English one, to Colab and to Kaggle."""
    notebook = edition(path)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = lead_to_english(translated(cell.source, say), "notebooks", english)
    bar = f'<p class="lesson-buttons"><a href="../../notebooks/{path.stem}.html">{say("The lesson in English")}</a> '
    places = f'<a href="{{}}">{say("Open in Colab")}</a> <a href="{{}}">{say("Open in Kaggle")}</a></p>'
    note = "" if path.stem in WHOLE else f"\n\n{say(ABOUT)}"
    first = notebook.cells[0]
    first.source = BADGES.sub(lambda found: bar + places.format(*found.groups()) + note, first.source)
    return notebook


def contents(text: str, say: Say) -> str:
    """A list of contents: its caption translated, and without the pages that are in English alone."""
    text = re.sub("(?<=:caption: ).+", lambda found: say(found[0]), text)
    return "\n".join(line for line in text.split("\n") if line[:1] == ":" or "*" in line or line in ("", *PAGES))


def lead_to_english(text: str, place: str, english: Path) -> str:
    """Links to pages that are not translated lead to the English ones; `place` is the folder of this page."""

    def address(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(place, found[2]))
        name = posixpath.splitext(target)[0]
        if name in PAGES or name.startswith("notebooks/") or not (english / target).is_file():
            return found[0]
        there = posixpath.relpath(f"{name}.html", posixpath.join(LANGUAGE, place))
        return f'<a href="{there}{found[3] or ""}">{found[1]}</a>'

    return LINK.sub(address, text)


def offer_the_other_language(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Give each page the address of the same page in the other language, or of its start page, for language.html."""
    there = f"{name}.html"
    if app.config.language == LANGUAGE:
        context["other_language"] = ("en", "English", posixpath.relpath(there, posixpath.join(LANGUAGE, name, "..")))
        return
    if name not in (*PAGES, "search") and not name.startswith("notebooks/"):
        there = "index.html"
    address = posixpath.relpath(posixpath.join(LANGUAGE, there), posixpath.dirname(name) or ".")
    context["other_language"] = (LANGUAGE, NAME, address)
