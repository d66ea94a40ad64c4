"""The catalogues in site/locale: for each message of the English sources the Japanese one.

A catalogue belongs to a document: a page of the book, a lesson, README.md, or the words of the program itself. A
message that several documents have stands in the first of them. Only this module knows which language it is.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.pofile import read_po, write_po
from nbformat import NotebookNode

from course.notebooks import read_notebook, select_notebooks, tags
from course.translation.markdown import MEASURED, Say, differences, messages, translated
from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

LANGUAGE, NAME = "ja", "日本語"
CATALOGUES = ROOT / "site" / "locale" / LANGUAGE / "LC_MESSAGES"
PAGES = ("index", "glossary", "lesson_map")  # those of site/ that are translated
WHOLE: tuple[str, ...] = ()  # lessons such as "01_overview" that are translated as a whole; of others see `edition`
INTERFACE = (  # what the program says
    *MEASURED,
    "runs for",
    "to study",
    "after {}",
    "the start",
    "Map of the lessons",
    "The same as a list",
    "Figure of lesson {}: {}",
    "The lesson in English",
    "Open in Colab",
    "Open in Kaggle",
    "Here are the summary, the symbols and the quiz. The text of the lesson and its figures are in English; questions "
    "that name a figure or a section mean those.",
)
README, TRANSLATED_README = "README.md", f"README.{LANGUAGE}.md"
# The line with the languages, in the English file and in the translated one
LANGUAGES = (
    f'<p>English · <a href="{TRANSLATED_README}">{NAME}</a></p>',
    f'<p><a href="{README}">English</a> · {NAME}</p>',
)
FIGURE = re.compile(r'(?<=!\[)[^]]*(?=\]\(figures/(\d\d)_)|(?<=<img )(src="figures/(\d\d)_\w+\.png") alt="[^"]*"')
# Of the header stays what a reader of the file needs; git knows who wrote when.
HEADER = re.compile(r'^"(?:Project|Report|POT|PO|Last|Language-Team|Generated)[\w-]*: .*\n', re.MULTILINE)


def edition(path: Path) -> NotebookNode:
    """What is translated of a lesson: its summary and quiz, or all of it if it is in `WHOLE`."""
    notebook = read_notebook(path)
    if path.stem not in WHOLE:
        first = notebook.cells[0]
        first.source = summary(first.source)
        quiz = [cell for cell in notebook.cells if "quiz" in tags(cell) or cell.source.startswith("## Quiz\n")]
        notebook.cells = [first, *quiz]
    return notebook


def summary(source: str) -> str:
    """Of the first cell of a lesson: title, badge, promise, "You will" and symbols."""
    parts = source.split("\n\n")
    promise = next((i for i, part in enumerate(parts) if part[:1] not in "#[*|<"), 0)
    kept = [part for part in parts[:promise] if part[:1] in "#["] + [parts[promise]]
    if "**You will**" in parts:
        start = parts.index("**You will**")
        kept += parts[start : start + 2]
    return "\n\n".join(kept + [part for part in parts if part.startswith("| symbol")])


def documents() -> dict[str, list[str]]:
    """The messages of each document, without those that an earlier document has."""
    texts = {}
    for path in select_notebooks():
        texts[path.stem] = [cell.source for cell in edition(path).cells if cell.cell_type == "markdown"]
    for name in PAGES:
        texts[name] = [(ROOT / "site" / f"{name}.md").read_text(encoding="utf-8")]
    texts["README"] = [(ROOT / README).read_text(encoding="utf-8")]
    found, seen = {"interface": list(INTERFACE)}, {*INTERFACE}
    for name, parts in texts.items():
        new = dict.fromkeys(message for part in parts for message in messages(part) if message not in seen)
        found[name] = list(new)
        seen |= new.keys()
    return found


def load(name: str) -> Catalog:
    """The catalogue of a document, empty if there is none; CourseError if it cannot be read."""
    path = CATALOGUES / f"{name}.po"
    if not path.exists():
        return new_catalogue(name)
    try:
        with path.open("rb") as file:
            return read_po(file, locale=LANGUAGE, domain=name, abort_invalid=True)
    except ValueError as error:
        raise CourseError(f"{path.name} is not a readable catalogue ({error}): mend that line.") from None


def new_catalogue(name: str) -> Catalog:
    """An empty catalogue."""
    title = f"# {NAME}: {name}. `python -m course translate` brings it in line with the English."
    return Catalog(locale=LANGUAGE, domain=name, header_comment=title, fuzzy=False)


def update() -> list[Path]:
    """Bring all catalogues in line with the sources; return those that changed. A changed message becomes fuzzy."""
    wanted, changed = documents(), []
    CATALOGUES.mkdir(parents=True, exist_ok=True)
    for name, ids in wanted.items():
        template = new_catalogue(name)
        for message in ids:
            template.add(message)
        catalogue = load(name)
        catalogue.update(template)
        if write(name, catalogue):
            changed.append(CATALOGUES / f"{name}.po")
    for path in CATALOGUES.glob("*.po"):
        if path.stem not in wanted:
            path.unlink()
            changed.append(path)
    return changed


def write(name: str, catalogue: Catalog) -> bool:
    """Write the catalogue, one line a message; whether that changed the file.

    What a message was before it changed is kept, as a comment, until its translation is no longer fuzzy.
    """
    path = CATALOGUES / f"{name}.po"
    for message in catalogue:
        if not message.fuzzy:
            message.user_comments = [line for line in message.user_comments if not line.startswith("|")]
    written = io.BytesIO()
    write_po(written, catalogue, width=0, ignore_obsolete=True, include_previous=True)
    text = HEADER.sub("", written.getvalue().decode())
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    write_atomically(path, text)
    return True


def speaker() -> Say:
    """Says a message in Japanese, or as it is where the catalogues have no certain translation."""
    known = {}
    for path in sorted(CATALOGUES.glob("*.po")):
        known |= {entry.id: entry.string for entry in load(path.stem) if entry.id and not entry.fuzzy}
    return lambda message: known.get(message) or message


def name_figures(text: str, say: Say) -> str:
    """The text with the titles of the lessons as alternative texts of their headline figures, which are in English."""
    titles = {path.stem[:2]: read_notebook(path).metadata.workbook.title for path in select_notebooks()}

    def named(found: re.Match) -> str:
        number = found[1] or found[3]
        alt = say("Figure of lesson {}: {}").format(number, say(titles[number]))
        return alt if found[1] else f'{found[2]} alt="{alt}"'

    return FIGURE.sub(named, text)


def readme() -> str:
    """README.md in Japanese."""
    say = speaker()
    text = translated((ROOT / README).read_text(encoding="utf-8"), say)
    return name_figures(text, say).replace(*LANGUAGES)


def problems() -> Iterator[str]:
    """What is wrong with the catalogues: messages without a certain translation, and translations without a message."""
    wanted = documents()
    for name in sorted(wanted.keys() | {path.stem for path in CATALOGUES.glob("*.po")}):
        catalogue, ids = load(name), wanted.get(name, [])
        for message in ids:
            entry = catalogue.get(message)
            if entry is None or not entry.string:
                yield f"{name}.po has no Japanese for: {message}"
            elif entry.fuzzy:
                yield f"{name}.po has a fuzzy one, mend it and delete the line with 'fuzzy': {message}"
            else:
                for difference in differences(message, entry.string):
                    yield f"{name}.po, {difference}: {message}"
        for entry in (*catalogue, *catalogue.obsolete.values()):
            if entry.id and entry.id not in ids:
                yield f"{name}.po translates what is no longer there: {entry.id}"
    path = ROOT / TRANSLATED_README
    if not path.exists() or path.read_text(encoding="utf-8") != readme():
        yield f"{TRANSLATED_README} is not what {README} and the catalogues say: run python -m course translate"
