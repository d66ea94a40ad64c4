"""The teacher's pages name the sections, plots and exercises that the lessons have, all of them and no others."""

import re
from functools import cache
from pathlib import Path

import pytest

from course import notebooks
from course.notebooks import output_text, select_notebooks
from course.slides.sections import figures, sections
from course.slides.teaching import FOLDER, titles_of
from course.slides.time_plan import LECTURE, minutes
from helpers.profiles import ROOT
from tests.support.exercise_proof import read_exercises

PLAN = ROOT / "docs" / "teaching.md"
LESSONS = select_notebooks()
read_notebook = cache(notebooks.read_notebook)
NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?![\w])")


def page(path: Path) -> str:
    """The teacher's page of a lesson."""
    return (FOLDER / f"{path.stem}.md").read_text(encoding="utf-8")


def part(text: str, heading: str) -> str:
    """What stands under a heading of level 2."""
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_minutes_are_those_of_the_lessons_sections_and_fill_the_lecture(path):
    planned = minutes(read_notebook(path))
    rows = re.findall(r"^\| (.+?) \| (\d+) \|", part(page(path), "Minutes"), re.MULTILINE)
    assert [title for title, _ in rows] == list(planned)
    assert sum(int(number) for _, number in rows) == LECTURE
    for title, number in rows:
        assert abs(int(number) - planned[title]) <= 3, f"{title}: {planned[title]} minutes by the lesson"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_plot_of_the_lesson_is_explained_under_its_title(path):
    named = re.findall(r'^- \*\*"(.+?)"\*\*: \S', part(page(path), "What to say at each plot"), re.MULTILINE)
    left = list(named)
    for cell in read_notebook(path).cells:
        images = len(list(figures(cell))) if cell.cell_type == "code" else 0
        patterns = titles_of(cell.source) if images else []
        here = [title for title in left if any(pattern.fullmatch(title) for pattern in patterns)]
        assert len(here) >= images, f"{images} plots, explained: {here}\n{cell.source[:300]}"
        left = [title for title in left if title not in here]
    assert not left, "no plot of the lesson has this title"


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_of_the_lesson_has_its_wrong_answers(path):
    named = re.findall(r"^- \*\*(\d+\.\d+)\*\* \S", part(page(path), "Common wrong answers"), re.MULTILINE)
    assert named == list(read_exercises(path))


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_every_number_of_the_page_stands_in_the_lesson(path):
    notebook = read_notebook(path)
    outputs = [output_text(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    lesson = set(NUMBER.findall("\n".join([*(cell.source for cell in notebook.cells), *outputs])))
    headings = ("What to say at each plot", "Common wrong answers", "To discuss")
    said = "\n".join(part(page(path), heading) for heading in headings)
    said = re.sub(
        r"\*\*\d+\.\d+\*\*|\b(lessons?|sections?|exercises?) [\d., to and]+|`[^`]*`|\d+\.\d+ (and|for)", "", said
    )
    assert not set(NUMBER.findall(said)) - lesson


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_page_has_the_lessons_title_and_something_to_discuss(path):
    text = page(path)
    assert text.startswith(f"# {sections(read_notebook(path))[0].title}\n")
    assert len(re.findall(r"^- .+", part(text, "To discuss"), re.MULTILINE)) >= 2
    assert "**Before:**" in text


def test_the_plan_has_twelve_weeks_and_links_the_page_of_every_lesson():
    text = PLAN.read_text(encoding="utf-8")
    weeks = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert weeks == [str(week) for week in range(1, 13)]
    linked = re.findall(r"\]\(teaching/(\w+)\.md\)", text)
    assert {path.stem for path in LESSONS} <= set(linked)
    assert all((FOLDER / f"{stem}.md").is_file() for stem in linked)
    assert {path.stem for path in FOLDER.glob("*.md")} == set(linked)
