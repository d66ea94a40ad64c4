"""The book as EPUB and as PDF: one lesson and the pages around it, made once by the command."""

import posixpath
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree as XML

import pytest

from course import notebooks
from course.__main__ import main
from course.site import chromium
from course.site.epub import PROPERTIES
from course.site.pdf import XHTML, join
from helpers.errors import CourseError
from helpers.profiles import ROOT

LESSON = next(path for path in notebooks.select_notebooks() if path.stem.startswith("07"))  # other pages lead to it
PAGE = f"notebooks/{LESSON.stem}.xhtml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a book of one lesson, which has formulas, figures, solutions and further sections."""
    try:
        chromium.chromium()
    except CourseError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("reading")
    for name in ("course", "site", "helpers", "data"):
        ignored = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / name, folder / "course" / name, ignore=ignored)
    (folder / "course/notebooks").mkdir()
    shutil.copy(LESSON, folder / "course/notebooks")
    (folder / "course/docs").mkdir()
    shutil.copy(ROOT / "docs/gpu.md", folder / "course/docs")  # the page of the rehearsal leads to it
    command = [sys.executable, "-m", "course", "site", "--epub", "--pdf", "--out", str(folder / "made")]
    done = subprocess.run(command, cwd=folder / "course", capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "llm-workbook.epub" in done.stdout and "llm-workbook.pdf" in done.stdout
    return folder / "made"


@pytest.fixture(scope="module")
def epub(made: Path) -> Path:
    """The unpacked EPUB."""
    with zipfile.ZipFile(made / "llm-workbook.epub") as file:
        first = file.infolist()[0]
        assert (first.filename, first.compress_type) == ("mimetype", zipfile.ZIP_STORED)
        file.extractall(made.parent / "epub")
    return made.parent / "epub"


@pytest.fixture(scope="module")
def pages(epub: Path) -> dict[str, XML.Element]:
    """Each page, read as the XML that it has to be."""
    return {path.relative_to(epub).as_posix(): XML.parse(path).getroot() for path in epub.rglob("*.xhtml")}


def wrong_addresses(pages: dict[str, XML.Element], folder: Path) -> list[str]:
    """Links and images that lead nowhere, and what is loaded from elsewhere or run."""
    names = {name: {tag.get("id") for tag in page.iter()} for name, page in pages.items()}
    wrong = []
    for name, page in pages.items():
        wrong += [f"{name} runs a script" for _ in page.iter(f"{XHTML}script")]
        for tag in page.iter():
            for address in filter(None, (tag.get("href"), tag.get("src"))):
                parts = urlsplit(address)
                target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path)))
                target = target if parts.path else name
                if parts.scheme or parts.netloc:
                    wrong += [f"{name} loads {address}"] * (not tag.tag.endswith("}a"))
                elif not (folder / target).is_file() and target not in pages:
                    wrong.append(f"{name} leads to {address}, which is not there")
                elif parts.fragment and unquote(parts.fragment) not in names[target]:
                    wrong.append(f"{name} leads to {address}, and there is no such place")
    return wrong


@pytest.mark.slow
def test_the_start_page_of_the_site_leads_to_both_files(made):
    start = (made / "index.html").read_text(encoding="utf-8")
    found = re.findall(r'href="(llm-workbook\.\w+)"', start)
    assert found == ["llm-workbook.epub", "llm-workbook.pdf"] and all((made / name).is_file() for name in found)


@pytest.mark.slow
def test_the_epub_lists_its_pages_and_every_link_and_image_is_in_it(epub, pages):
    listed = {link.get("href", "").partition("#")[0] for link in pages["nav.xhtml"].iter(f"{XHTML}a")}
    assert {"index.xhtml", PAGE, "glossary.xhtml", "data/shima-4m/README.xhtml"} <= listed <= pages.keys()
    assert wrong_addresses(pages, epub) == []


@pytest.mark.slow
def test_formulas_are_mathml_that_keeps_its_tex_and_the_package_says_so(epub, pages):
    formulas = list(pages[PAGE].iter(PROPERTIES["mathml"]))
    assert len(formulas) > 10 and all(formula.get("alttext") and len(formula) for formula in formulas)
    assert not [name for name, page in pages.items() for tag in page.iter() if tag.tag.endswith("}merror")]
    package = (epub / "content.opf").read_text(encoding="utf-8")
    for name, kind in ((PAGE, "mathml"), ("lesson_map.xhtml", "svg")):
        assert re.search(rf'href="{name}"[^>]* properties="{kind}"', package)


@pytest.mark.slow
def test_figures_keep_their_texts_and_solutions_are_folded(pages):
    cells = notebooks.read_notebook(LESSON).cells
    outputs = [output for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    texts = [output.metadata["image/png"]["alt"] for output in outputs]
    shown = [image.get("alt") for image in pages[PAGE].iter(f"{XHTML}img")]
    assert texts and [text for text in texts if text not in shown] == []
    folds = [fold for fold in pages[PAGE].iter(f"{XHTML}details") if "hide" not in fold.get("class", "")]
    assert len(folds) == sum(cell.source.count("<details>") for cell in cells) > 0
    assert not any("open" in fold.attrib for fold in folds)
    assert sum("data-right" in fold.attrib for fold in folds) == 5  # a question of the quiz, as in the notebook


@pytest.mark.slow
def test_pages_joined_for_paper_have_names_of_their_own_that_all_links_find(epub):
    joined = XML.fromstring(join(epub))
    names = [tag.get("id") for tag in joined.iter() if tag.get("id")]
    assert len(names) == len(set(names))
    assert wrong_addresses({"joined.xhtml": joined}, epub) == []


@pytest.mark.slow
def test_the_pdf_has_pages_bookmarks_texts_of_figures_and_a_reasonable_size(made):
    content = (made / "llm-workbook.pdf").read_bytes()
    assert content.startswith(b"%PDF-") and len(content) < 10e6
    assert len(re.findall(rb"/Type\s*/Page\b", content)) > 10
    assert [part for part in (b"/Outlines", b"/StructTreeRoot", b"/Alt") if part not in content] == []


def test_without_a_browser_it_is_one_sentence_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(chromium, "NAMES", ())
    with pytest.raises(CourseError, match=r"^EPUB and PDF need Chromium .* apt-get install chromium\.$"):
        main(["site", "--pdf", "--out", str(tmp_path / "new" / "book")])
    assert list(tmp_path.iterdir()) == []
