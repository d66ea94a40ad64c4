"""The sample class is graded as it should be."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import grading
from course.grading import sandbox
from course.grading.sample_class import TROUBLE, surprises, write_class
from course.grading.session import Settings
from helpers.errors import CourseError

SOLUTION = "def total(numbers):\n    return sum(numbers)"


def lesson() -> nbformat.NotebookNode:
    """A lesson of two exercises."""
    cells = [new_code_cell("from helpers.exercises import check, expect_equal")]
    for number in ("7.1", "7.2"):
        checker = 'def checked(total):\n    expect_equal("the sum", total([1, 2]), 3)\n\n\n'
        cells += [
            new_code_cell("def total(numbers):\n    raise NotImplementedError", metadata={"tags": ["exercise"]}),
            new_code_cell(f'{checker}check("{number}", checked, total)', metadata={"tags": ["check"]}),
            new_markdown_cell(
                f"<details>\n\n```python\n{SOLUTION}\n```\n\n</details>", metadata={"tags": ["solution"]}
            ),
        ]
    return new_notebook(cells=cells)


@pytest.mark.slow
@pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox: {sandbox.missing()}")
def test_the_grader_says_of_each_student_what_should_be_said(tmp_path):
    notebooks, handed_in = tmp_path / "notebooks", tmp_path / "handed_in"
    notebooks.mkdir()
    nbformat.write(lesson(), notebooks / "07_sums.ipynb")
    expected = write_class(handed_in, notebooks / "07_sums.ipynb", size=len(TROUBLE) + 5)
    rows = grading.grade(
        handed_in, tmp_path / "grades.csv", notebooks=notebooks, settings=Settings(cell_seconds=8), jobs=2
    )
    assert surprises(expected, rows) == []
    assert {status for answers in expected.values() for status in answers.values()} == {
        *("correct", "not yet", "not attempted", "error", "rejected")
    }
    assert surprises(expected | {"student_01": {"7.1": "correct"}}, rows) == ["student_01"]
    with pytest.raises(CourseError, match="is not empty"):
        write_class(handed_in, notebooks / "07_sums.ipynb")
