"""The student edition: it holds nothing of a solution, and it runs by itself."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course import notebooks
from course.__main__ import main
from course.student import NEEDED, exercises_without_hint, student_edition, write_student_edition
from helpers.colab import SETUP_CELL, badges
from helpers.errors import CourseError
from helpers.profiles import ROOT

NOTEBOOKS = notebooks.select_notebooks()


def strings(value: object) -> Iterator[str]:
    """Every text in a notebook: sources, outputs and metadata."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def solutions(notebook: nbformat.NotebookNode) -> list[tuple[list[str], list[str]]]:
    """Telling lines of each solution: of its code and of its text. A line that the lesson itself has is not one."""
    cells = [cell for cell in notebook.cells if "solution" not in notebooks.tags(cell)]
    lesson = {line.strip() for cell in cells for line in cell.source.splitlines()}
    found = []
    for cell in notebook.cells:
        if "solution" in notebooks.tags(cell):
            code = "\n".join(re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL))
            text = re.sub(r"```python\n.*?```|</?details>|<summary>.*?</summary>", "", cell.source, flags=re.DOTALL)
            # Shorter ones, such as `return rule` or `total = 0`, tell nothing.
            found.append(
                tuple(
                    [
                        line.strip()
                        for line in part.splitlines()
                        if len(line.strip()) > 15 and line.strip() not in lesson
                    ]
                    for part in (code, text)
                )
            )
    return found


@cache
def handed_out() -> str:
    """The text of all files that the edition has beside its notebooks."""
    files = [
        file for name in NEEDED for file in ((ROOT / name).rglob("*") if (ROOT / name).is_dir() else [ROOT / name])
    ]
    return "\n".join(
        file.read_text(encoding="utf-8") for file in files if file.suffix in (".py", ".md", ".json", ".jsonl", ".txt")
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_line_of_a_solution_is_left(path: Path) -> None:
    notebook = notebooks.read_notebook(path)
    edition = student_edition(notebook, path.stem)
    everything = "\n".join(strings(json.loads(nbformat.writes(edition))))
    found = solutions(notebook)
    assert len(found) == sum("exercise" in notebooks.tags(cell) for cell in edition.cells) > 0
    assert not any("solution" in notebooks.tags(cell) for cell in edition.cells)
    for code, text in found:
        assert code, "this solution has no line of its own, so the test would prove nothing"
        assert [line for line in code if f"\n{line}\n" in re.sub(r"\n\s*", "\n", everything)] == []
        assert [line for line in text if line in everything] == []
        # A line that stands in the helpers as well is looked at by how many there are: the whole is not.
        assert [line for line in code if line in handed_out()] != code


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_rest_of_a_lesson_stays_as_it_is(path: Path) -> None:
    notebook = notebooks.read_notebook(path)
    edition = student_edition(notebook, path.stem)
    nbformat.validate(edition)
    kept = [cell for cell in notebook.cells if "solution" not in notebooks.tags(cell)]
    assert [cell.id for cell in edition.cells] == [cell.id for cell in kept]
    for before, after in zip(kept, edition.cells, strict=True):
        assert notebooks.tags(after) == notebooks.tags(before)
        if {"exercise", "check"} & set(notebooks.tags(before)):
            assert (after.source, after.outputs, after.execution_count) == (before.source, [], None)
        elif before.cell_type == "code":
            assert after == before
        else:
            assert not re.search(r"solutions? (is|are) folded|folded solution", after.source)
            assert badges(path.stem) not in after.source
    assert "source_hash" not in edition.metadata.workbook
    assert edition.metadata.workbook.lesson == path.stem[:2]


STUB = "# Exercise 1.1, easy: sum.\ndef total(numbers):\n    raise NotImplementedError"
CHECK = """\
def check_total(total):
    expect_equal("total([1, 2])", total([1, 2]), 3)


check("1.1", check_total, total)"""


def lesson(folder: Path) -> Path:
    """A lesson with one exercise, its hint and its solution."""

    def tagged(tag: str) -> dict:
        return {"metadata": {"tags": [tag]}}

    cells = [
        new_markdown_cell(f"# A lesson\n\n{badges('01_small')}\n\ntext"),
        new_code_cell(SETUP_CELL, **tagged("setup")),
        new_code_cell('profile = ""\nseed = 0\nmodel_id = ""', **tagged("parameters")),
        new_code_cell("import helpers\nfrom helpers.exercises import check, expect_equal\nprint(helpers.__file__)"),
        new_markdown_cell("One. It answers at once. The solution is folded away under the check."),
        new_code_cell(STUB, **tagged("exercise")),
        new_code_cell(CHECK, outputs=[new_output("stream", text="Exercise 1.1: correct")], **tagged("check")),
        new_markdown_cell("Python has a function for it.", **tagged("hint")),
        new_markdown_cell(
            "<details><summary>Solution</summary>\n\n```python\ndef total(numbers):\n    return sum(numbers)\n```\n\n"
            "</details>",
            **tagged("solution"),
        ),
    ]
    folder.mkdir(exist_ok=True)
    nbformat.write(new_notebook(cells=cells), folder / "01_small.ipynb")
    return folder / "01_small.ipynb"


def test_hints_are_folded_and_nothing_points_to_the_solutions(tmp_path: Path) -> None:
    path = lesson(tmp_path)
    edition = student_edition(notebooks.read_notebook(path), path.stem)
    assert [cell.source for cell in edition.cells if cell.cell_type == "markdown"] == [
        "# A lesson\n\n\n\ntext",
        "One. It answers at once.",
        "<details><summary>Hint</summary>\n\nPython has a function for it.\n\n</details>",
    ]
    assert exercises_without_hint([path]) == []
    notebook = notebooks.read_notebook(path)
    del notebook.cells[7]
    nbformat.write(notebook, path)
    assert exercises_without_hint([path]) == ["Exercise 1.1, easy: sum."]


@pytest.mark.slow
def test_the_folder_runs_by_itself_and_says_not_attempted_yet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, out = lesson(tmp_path / "notebooks").parent, tmp_path / "out"
    main(["student", "--notebooks", str(folder), "--out", str(out)])
    said = f"1 notebooks without solutions are in {out}; exercises without a hint: 0\n"
    assert capsys.readouterr().out == said
    assert {path.name for path in out.iterdir()} == {"notebooks", "README.md", *NEEDED}
    notebook = notebooks.read_notebook(out / "notebooks" / "01_small.ipynb")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(out / "notebooks")}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # The helpers of the folder, not those of the repository, are the ones that ran it.
    assert cells[2].outputs[0].text == f"{out}/helpers/__init__.py\n"
    assert cells[-1].outputs[0].text == "Exercise 1.1: not attempted yet\n"
    # The commands that its README names are there, and are those of the folder.
    for command, said in ((["progress"], "01_small"), (["competition", "check", "nobody"], "nobody")):
        done = subprocess.run([sys.executable, "-m", "course", *command], cwd=out, capture_output=True, text=True)
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path: Path) -> None:
    path = lesson(tmp_path / "notebooks")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CourseError, match="holds something else than a student edition"):
        write_student_edition([path], tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_an_edition_replaces_the_one_before(tmp_path: Path) -> None:
    path = lesson(tmp_path / "notebooks")
    write_student_edition([path], tmp_path / "out")
    (tmp_path / "out" / "notebooks" / "00_old.ipynb").touch()
    (tmp_path / "out" / "old.txt").touch()
    write_student_edition([path], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"notebooks", "README.md", *NEEDED}
    assert [path.name for path in (tmp_path / "out" / "notebooks").iterdir()] == ["01_small.ipynb"]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
