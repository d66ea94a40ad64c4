"""The slides hold what a lecture needs and no solution, fit on their pages, and load only the files beside them."""

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.notebooks import NOTEBOOKS, core_path, read_notebook, select_notebooks, tags
from course.slides.condensing import blocks, first_sentences, sentences
from course.slides.deck import deck
from course.slides.export import export, package_file
from course.slides.layout import ROOM, height, in_lines, pages
from course.slides.sections import figures
from course.slides.teaching import read_teaching
from course.slides.time_plan import LECTURE, minutes
from helpers.errors import CourseError
from tests.support import notebook_structure
from tests.support.exercise_proof import read_exercises

LESSONS = select_notebooks()
EXPORTED = ["01_overview", "07_gpu_memory"]
# Two pixels, as PNG in base64.
PIXELS = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAC0lEQVR4nGNgQAcAABIAAa5EvTsAAAAASUVORK5CYII="
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What a page loads, in its own tags and in style sheets.
LOADED = re.compile(
    r"""<(?:script|img|link|iframe)[^>]*?\b(?:src|href)="([^"]*)"|url\(["']?([^"')]+)|@import\s+["']([^"']+)"""
)
REPORT = """<script>
setInterval(() => {
  if (!document.body.dataset.ready || document.body.dataset.report) return;
  const pages = [...document.querySelectorAll(".slides section section")];
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  document.body.dataset.report = JSON.stringify({loaded, pages: pages.map(page => [page.textContent.trim().slice(0, 60),
    page.scrollHeight, page.scrollWidth, page.querySelectorAll("mjx-merror").length,
    [...page.querySelectorAll("img")].every(image => image.naturalWidth > 0)])});
}, 100);
</script></body>"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of two lessons."""
    folder = tmp_path_factory.mktemp("slides")
    return {stem: export(NOTEBOOKS / f"{stem}.ipynb", folder) for stem in EXPORTED}


@cache
def made(path: Path) -> NotebookNode:
    """The slides of a lesson."""
    return deck(read_notebook(path), path.stem)


def everything(path: Path) -> str:
    """All markdown of a lesson's slides, notes included."""
    return "\n\n".join(cell.source for cell in made(path).cells)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_section_and_every_figure_of_a_lesson_has_a_slide(path):
    notebook, text = core_path(read_notebook(path)), everything(path)
    for section in notebook_structure.sections(notebook):
        assert re.search(rf"^##+ {re.escape(section)}$", text, re.MULTILINE), section
    images = [image for cell in notebook.cells for image in figures(cell)]
    assert images
    for image, alt in images:
        assert text.count(image) == 1, alt
        assert f'alt="{html.escape(alt)}"' in text


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_no_solution_no_check_and_no_hint_is_in_the_slides(path):
    notebook, text = read_notebook(path), everything(path)
    others = "\n".join(cell.source for cell in notebook.cells if not {"solution", "check"} & set(tags(cell)))
    secret = [line.strip() for exercise in read_exercises(path).values() for line in exercise.solution.splitlines()]
    secret = [line for line in secret if len(line) > 20 and line not in others]
    assert len(secret) >= 3
    assert not [line for line in secret if line in text]
    assert "<details>" not in text and "Solution</summary>" not in text


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_row_of_a_table_has_as_many_cells_as_its_head(path):
    for cell in made(path).cells:
        for table in re.findall(r"(?:^\|.*\n?){2,}", cell.source, re.MULTILINE):
            rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
            assert len(set(rows)) == 1, table


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_slides_list_every_exercise_by_number(path):
    text = everything(path)
    assert all(f"- **{number}** (" in text for number in read_exercises(path))


@pytest.mark.slow
@pytest.mark.parametrize("stem", EXPORTED)
def test_a_page_loads_nothing_but_files_beside_it(exported, stem):
    page = exported[stem].read_text(encoding="utf-8")
    loaded = ["".join(found) for found in LOADED.findall(page)]
    style = exported[stem].parent / "assets" / "slides.css"
    loaded += [f"assets/{''.join(found)}" for found in LOADED.findall(style.read_text())]
    files = [address for address in loaded if not address.startswith("data:")]
    assert "assets/reveal/reveal.js" in files and "assets/mathjax/tex-svg.js" in files
    for address in files:
        assert (exported[stem].parent / address).is_file(), address


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(exported: dict[str, Path]) -> Iterator[str]:
    """Address at which a server on this machine has the pages: a browser lists what it loads only from servers."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=exported[EXPORTED[0]].parent)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("stem", EXPORTED)
def test_in_a_browser_every_slide_fits_on_its_page_and_nothing_is_fetched(exported, address, stem, tmp_path):
    page = exported[stem]
    measured = page.with_name(f"measured_{page.name}")
    measured.write_text(page.read_text(encoding="utf-8").replace("</body>", REPORT), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,720", "--virtual-time-budget=60000"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path}", "--dump-dom", address + measured.name]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'data-report="([^"]*)"', dom)
    assert found, "the page was never ready"
    report = json.loads(html.unescape(found[1]))
    assert len(report["pages"]) > 30
    for text, high, width, errors, has_images in report["pages"]:
        assert high <= 720 and width <= 1280, f"does not fit: {text}"
        assert not errors and has_images, f"is not drawn: {text}"
    assert f"{address}assets/reveal/reveal.js" in report["loaded"]
    assert not [name for name in report["loaded"] if not name.startswith((address, "data:", "blob:"))]


def small_lesson(*cells):
    """A notebook with a title and these cells in one section."""
    return new_notebook(
        cells=[new_markdown_cell("# 99 · Title\n\nA promise."), new_markdown_cell("## 1 · One"), *cells]
    )


def printing(text):
    """A code cell that has printed the text."""
    return new_code_cell("show()", outputs=[new_output("stream", name="stdout", text=text)])


def test_a_cell_tagged_skip_is_left_out_and_one_tagged_slide_is_shown_whole():
    text = "**Lead.** First sentence. Second sentence."
    cells = [
        new_markdown_cell(text.replace("Lead", "Kept"), metadata={"tags": ["slide"]}),
        new_code_cell("answer = 42", metadata={"tags": ["slide"]}),
        new_markdown_cell(text.replace("Lead", "Gone"), metadata={"tags": ["skip"]}),
        new_code_cell("question = None"),
    ]
    shown = "\n".join(cell.source for cell in deck(small_lesson(*cells), "99_title").cells)
    assert "**Kept.** First sentence. Second sentence." in shown and "answer = 42" in shown
    assert "Gone" not in shown and "question = None" not in shown


def test_further_sections_and_the_questions_of_the_quiz_are_left_out_and_the_next_core_section_is_back():
    parts = [("## 1 · Kept", "core"), ("## 2 · Gone", "further"), ("## 3 · Back", "core"), ("**Asked?**", "quiz")]
    cells = [new_markdown_cell(text, metadata={"tags": [tag]}) for text, tag in parts]
    shown = "\n".join(cell.source for cell in deck(small_lesson(*cells), "99_title").cells)
    assert [word for word in ("Kept", "Gone", "Back", "Asked") if word in shown] == ["Kept", "Back"]


def test_a_slide_has_first_sentences_and_the_notes_have_the_whole_text():
    text = "**Lead.** Smith et al. 2020 found for all such pairs, i.e. $a. B$, that it holds. The proof is long."
    found = deck(small_lesson(new_markdown_cell(text)), "99_title").cells
    kinds = {cell.metadata.slideshow.slide_type: cell.source for cell in found[2:]}
    assert kinds["notes"] == text
    assert "**Lead.** Smith et al. 2020 found for all such pairs, i.e. $a. B$, that it holds." in kinds["slide"]
    assert "proof" not in kinds["slide"]


def test_the_closing_table_has_a_slide_with_its_claims_and_a_bar_in_a_cell_divides_nothing():
    table = "| what was measured | number | |\n|---|---|---|\n| p(a \\| b) | 0.62, at least 0.5 | holds |"
    rows = f"{table}\n| a report | 3 |  |\n| of a further section | 1, at least 0 | holds |"
    cell = new_code_cell("lesson.summary()", outputs=[new_output("display_data", {"text/markdown": rows})])
    core = printing("holds: p(a | b) (0.62, at least 0.5)\n")
    (page,) = (cell.source for cell in deck(small_lesson(core, cell), "99_title").cells if "| what" in cell.source)
    assert table in page and "a report" not in page and "further" not in page


def test_a_text_that_only_leads_over_stands_in_the_notes_of_the_next_slide():
    cells = [new_markdown_cell("Now the sum."), new_code_cell("x = 1"), new_markdown_cell("**Lead.** It holds.")]
    (notes,) = (c.source for c in deck(small_lesson(*cells), "99_title").cells[2:] if "Now" in c.source)
    assert notes == "Now the sum.\n\n**Lead.** It holds."


def test_a_long_row_of_formulas_is_drawn_one_below_the_other():
    first, second = "a = " + " + ".join("bcdefgh"), "y = " + " + ".join("zxwvut" * 6)
    assert in_lines(f"$${first} \\qquad {second}$$").count("\\\\") == 1
    assert in_lines(f"$${first} \\qquad {first}$$") == f"$${first} \\qquad {first}$$"


def test_claims_that_a_cell_printed_stand_under_its_figure():
    picture = new_output("display_data", {"image/png": PIXELS}, metadata={"image/png": {"alt": "two pixels"}})
    printed = new_output(
        "stream", name="stdout", text="some table\nholds: it is wide & <low> (0.62, at least 0.5)\nlast line\n"
    )
    cells = deck(small_lesson(new_code_cell("draw()", outputs=[picture, printed])), "99_title").cells
    (figure,) = (cell for cell in cells if cell.metadata.get("kind") == "figure")
    assert "- it is wide &amp; &lt;low&gt; (0.62, at least 0.5)" in figure.source and "some table" not in figure.source


TABLE = "          right   wrong\nmodel       88%     12%\nguess        5%     95%\n"


def test_a_printed_table_has_a_page_with_its_claims_unless_a_figure_of_the_same_cells_shows_it():
    seen = new_markdown_cell("**What you see.** The model is better.")
    figure = new_code_cell("draw()", outputs=[new_output("display_data", {"image/png": PIXELS})])
    table = printing(f"{TABLE}holds: it is right (88%, at least 50%)\n")
    alone, drawn = (
        "\n".join(cell.source for cell in deck(small_lesson(*cells, seen), "99_title").cells)
        for cells in ([table], [table, figure])
    )
    assert f"```text\n{TABLE}```\n\n- it is right (88%, at least 50%)" in alone
    assert "guess" not in drawn and "- it is right (88%, at least 50%)" in drawn


def test_what_was_printed_is_shown_before_a_text_and_cut_where_a_page_ends():
    text = "\n".join(f"sample {number}" for number in range(30))
    cells = [printing("loss 1\nloss 2"), printing(text), new_markdown_cell("**What you see.** Samples.")]
    shown = "\n".join(cell.source for cell in deck(small_lesson(*cells), "99_title").cells)
    assert "sample 0" in shown and "sample 29" not in shown and "\n...\n```" in shown and "loss 1" not in shown


def test_an_exercise_named_in_its_text_and_in_its_cell_is_listed_once():
    cells = [
        new_markdown_cell("**Exercise 99.1** (easy, 5 minutes). *Add.* The sum of two numbers."),
        new_code_cell("# Exercise 99.1, easy: the sum\ndef add(): ...", metadata={"tags": ["exercise"]}),
    ]
    shown = "\n".join(cell.source for cell in deck(small_lesson(*cells), "99_title").cells)
    assert re.findall(r"- \*\*99\.1.*", shown) == ["- **99.1** (easy) the sum"]


def test_a_short_first_sentence_is_not_left_alone_and_an_abbreviation_ends_none():
    said = first_sentences(
        "**The samples.** Numbers are half. See Dr. GRPO for why it is so in the longest of texts. More."
    )
    assert said == "**The samples.** Numbers are half. See Dr. GRPO for why it is so in the longest of texts."


def test_a_section_with_nothing_to_show_has_more_than_its_heading():
    cells = [
        new_markdown_cell("## Quiz\n\nFive questions."),
        new_markdown_cell("**Why?**", metadata={"tags": ["quiz"]}),
    ]
    last = deck(small_lesson(*cells), "99_title").cells[-2].source
    assert last == "## Quiz\n\nFive questions."


def test_a_table_is_shown_beside_its_figure_where_the_text_speaks_of_its_rows():
    figure = new_code_cell("draw()", outputs=[new_output("display_data", {"image/png": PIXELS})])
    cells = [printing(TABLE), figure, new_markdown_cell("**What you see.** Look at the last row.")]
    kinds = [
        cell.metadata.get("kind") for cell in deck(small_lesson(*cells), "99_title").cells if "guess" in cell.source
    ]
    assert kinds == ["text"]


def test_a_short_text_stands_on_the_page_of_the_figure_that_it_announces():
    figure = new_code_cell("draw()", outputs=[new_output("display_data", {"image/png": PIXELS})])
    cells = [new_markdown_cell("**A threshold.** Answer only what is sure."), figure]
    (page,) = (cell for cell in deck(small_lesson(*cells), "99_title").cells if "image/png" in cell.source)
    assert page.metadata["kind"] == "figure" and "Answer only what is sure." in page.source


def test_no_sentence_ends_inside_emphasis_or_brackets_and_code_with_empty_lines_stays_whole():
    assert sentences("See *Is it so? A study*, 2024 (or not. Or so). Then rest.") == [
        "See *Is it so? A study*, 2024 (or not. Or so).",
        "Then rest.",
    ]
    ordered = "**Order.** 1. Write it. 2. Run it as in section 8."
    assert sentences(f"{ordered} Done.") == [ordered, "Done."]
    assert blocks("One.\n\n```python\nx = 1\n\ny = 2\n```\n\nTwo.") == [
        "One.",
        "```python\nx = 1\n\ny = 2\n```",
        "Two.",
    ]


def test_a_single_row_that_is_left_over_gets_no_page_of_its_own():
    head, row = "| a | b |\n|---|---|\n", "| 1 | word |\n"
    fits = max(number for number in range(2, 40) if height((head + row * number).strip()) <= ROOM)
    assert len(pages([(head + row * (fits + 1)).strip()])) == 1
    assert len(pages([(head + row * (fits + 5)).strip()])) == 2


def test_real_use_is_shown_as_code():
    cells = [new_markdown_cell("## In practice\n\nSo it is done."), new_code_cell("model = load()\nmodel.generate()")]
    assert "```python\nmodel = load()" in deck(small_lesson(*cells), "99_title").cells[-2].source


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_notes_of_every_figure_say_what_the_teachers_page_says_of_it(path):
    cells, said = made(path).cells, list(read_teaching(path.stem).plots.values())
    drawn = [number for number, cell in enumerate(cells) if cell.metadata.get("kind") in ("figure", "tall")]
    assert drawn and all(any(text in cells[number + 1].source for text in said) for number in drawn)


def test_exercises_are_named_in_their_cells_or_in_the_text_above_them():
    cells = [
        new_markdown_cell("**Exercise 99.1** (easy, 5 minutes). *Add.* The sum of two numbers. Mind the sign."),
        new_code_cell("def add(a, b):\n    raise NotImplementedError", metadata={"tags": ["exercise"]}),
        new_code_cell("# Exercise 99.2, hard: divide.\ndef divide(): ...", metadata={"tags": ["exercise"]}),
    ]
    (page,) = (c.source for c in deck(small_lesson(*cells), "99_title").cells if "99.1" in c.source)
    assert "- **99.1** (easy) *Add.*\n" in page and "- **99.2** (hard) divide\n" in page


def test_long_lists_and_tables_are_divided_and_each_part_of_a_table_has_its_head():
    table = "\n".join(["| a | b |", "|---|---|", *(f"| {i} | {'word ' * 30} |" for i in range(30))])
    parts = pages([table])
    assert len(parts) > 2 and all(part.startswith("| a | b |\n|---|---|\n") for part in parts)
    assert sum(part.count("word word") > 0 for part in parts) == len(parts)
    assert all(height(part) <= ROOM for part in parts)


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_minutes_of_a_lecture_add_up_and_end_before_the_exercises(path):
    found = minutes(read_notebook(path))
    assert sum(found.values()) == LECTURE and min(found.values()) >= 1
    assert not [title for title in found if "Exercises" in title or title == "What we saw"]


def test_a_missing_package_is_one_sentence_that_says_what_to_install():
    with pytest.raises(CourseError, match=r"need the package no-such-package: install requirements-dev\.txt"):
        package_file("no-such-package", "static")
