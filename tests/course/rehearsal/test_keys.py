"""A text does not make a row of the report stale; what a cell does on this profile does."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course.rehearsal.keys import code_key

CELL = '''
def step(rows):
    """One step."""
    return rows[:4]  # a few


SETTINGS = {"cpu": {"rows": 8}, "t4": {"rows": 4}, "large": {"rows": 16}}
%matplotlib inline
print(f"{step([1])} are left")
lesson.claim("it fits", 1.5, at_least=1)
figure = plots.curve({"loss": rows}, title="It falls")
ask("Who is Ada?")
'''


@pytest.fixture
def key(tmp_path: Path):
    def of(*edits: tuple[str, str], profile: str = "t4", text: str = "# Title", setup: str = "import os") -> str:
        source = CELL
        for old, new in edits:
            assert old in source
            source = source.replace(old, new)
        cells = [new_markdown_cell(text), new_code_cell(setup, metadata={"tags": ["setup"]}), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells), tmp_path / "01_lesson.ipynb")
        return code_key(tmp_path / "01_lesson.ipynb", profile)

    return of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("One step.", "One step of many."),
        ("  # a few", ""),
        ("\n\n\n", "\n\n"),
        (" are left", " of the rows are left"),
        ("it fits", "it always fits"),
        ("It falls", "It falls a little"),
        ('"cpu": {"rows": 8}', '"cpu": {"rows": 80}'),
    ],
)
def test_words_layout_and_other_profiles_do_not_count(key, old: str, new: str) -> None:
    assert key((old, new)) == key()


def test_texts_and_the_setup_cell_do_not_count(key) -> None:
    assert key(text="# Another title", setup="import sys") == key()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rows[:4]", "rows[:5]"),
        ('"t4": {"rows": 4}', '"t4": {"rows": 5}'),
        ("step([1])", "step([2])"),
        ("1.5", "measured"),
        ("Who is Ada?", "Who is Bo?"),
    ],
)
def test_what_runs_on_this_profile_counts(key, old: str, new: str) -> None:
    assert key((old, new)) != key()
