"""A notebook and its source are brought in line from the side that was edited, and nothing is lost if both were."""

from pathlib import Path

import jupytext
import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.__main__ import main
from course.notebooks import read_notebook, select_notebooks
from course.twins import FORMAT, as_source, contents, twin
from helpers.errors import CourseError


@pytest.fixture
def lesson(tmp_path: Path) -> Path:
    """A lesson in line with its source."""
    path = tmp_path / "03_lines.ipynb"
    cells = [
        new_markdown_cell("# Lines\n\n**cpu 12 s · 1.2 GB**"),
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        new_code_cell("print(1)", execution_count=1, outputs=[new_output("stream", text="1\n")]),
        new_code_cell("print(2)", execution_count=2, outputs=[new_output("stream", text="2\n")]),
    ]
    nbformat.write(new_notebook(cells=cells), path)
    sync(path)
    return path


def sync(path: Path, *arguments: str) -> int | None:
    return main(["sync", "--notebooks", str(path.parent), *arguments])


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def source(path: Path) -> NotebookNode:
    return jupytext.read(twin(path), fmt=FORMAT)


@pytest.mark.parametrize("path", select_notebooks(), ids=lambda path: path.stem)
def test_a_lesson_survives_being_written_as_a_source(path: Path) -> None:
    notebook = read_notebook(path)
    assert contents(jupytext.reads(as_source(notebook), fmt=FORMAT)) == contents(notebook)


def test_an_edit_of_the_source_reaches_the_notebook_and_keeps_ids_and_other_outputs(lesson: Path) -> None:
    before = read_notebook(lesson)
    edit(twin(lesson), "print(2)", "print(3)")
    edit(twin(lesson), "# # Lines", "# # Straight lines")
    assert sync(lesson, "--check") == 1 and sync(lesson) == 0 and sync(lesson, "--check") == 0
    after = read_notebook(lesson)
    assert after.cells[3].source == "print(3)" and after.cells[2].outputs[0].text == "1\n"
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert after.cells[0].source == "# Straight lines\n\n**cpu 12 s · 1.2 GB**"


def test_a_new_cell_in_the_source_becomes_a_cell_and_one_taken_out_is_gone(lesson: Path) -> None:
    edit(twin(lesson), "# %%\nprint(1)\n", '# %%\nprint(0)\n\n# %% tags=["skip"]\nprint(1)\n')
    edit(twin(lesson), "# %%\nprint(2)\n", "")
    sync(lesson)
    cells = read_notebook(lesson).cells
    assert [cell.source for cell in cells[1:]] == ["seed = 0", "print(0)", "print(1)"]
    assert cells[3].metadata.tags == ["skip"]


def test_an_edit_of_the_notebook_reaches_the_source(lesson: Path) -> None:
    edit(lesson, '"print(2)"', '"print(4)"')
    assert sync(lesson, "--check") == 1
    sync(lesson)
    assert source(lesson).cells[3].source == "print(4)"


def test_a_new_measurement_changes_no_source(lesson: Path) -> None:
    text = twin(lesson).read_text()
    edit(lesson, "cpu 12 s", "cpu 95 s")
    assert sync(lesson, "--check") == 0 and twin(lesson).read_text() == text


def test_edits_on_both_sides_are_named_and_neither_is_lost(lesson: Path) -> None:
    edit(twin(lesson), "print(2)", "print(3)")
    edit(lesson, '"print(2)"', '"print(4)"')
    texts = [path.read_bytes() for path in (lesson, twin(lesson))]
    with pytest.raises(CourseError, match=r"03_lines was edited in the notebook and in .*cell 3 .*git checkout"):
        sync(lesson)
    assert [path.read_bytes() for path in (lesson, twin(lesson))] == texts


def test_the_same_edit_on_both_sides_is_fine(lesson: Path) -> None:
    edit(twin(lesson), "print(2)", "print(3)")
    edit(lesson, '"print(2)"', '"print(3)"')
    sync(lesson)
    assert sync(lesson, "--check") == 0


def test_a_missing_source_is_written_and_one_without_a_notebook_refused(lesson: Path) -> None:
    twin(lesson).unlink()
    assert sync(lesson, "--check") == 1
    sync(lesson)
    assert contents(source(lesson)) == contents(read_notebook(lesson))
    (twin(lesson).parent / "04_lost.py").write_text("1\n")
    with pytest.raises(CourseError, match=r"source/04_lost\.py has no notebook"):
        sync(lesson)
