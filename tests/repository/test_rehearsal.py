"""The rehearsal's report, data/rehearsal.json, is of the lessons as they are, and says that each fits its GPU."""

import pytest

from course.notebooks import select_notebooks
from course.rehearsal.keys import code_key
from course.rehearsal.report import Rehearsed, read_report

NOTEBOOKS = {path.stem: path for path in select_notebooks()}
REPORT = read_report()
ROWS = [(profile, name) for profile, lessons in REPORT.items() for name in lessons]
AGAIN = "python -m course rehearse --only {} --profile {} --budget 0.1"


@pytest.fixture(params=ROWS, ids=":".join)
def row(request: pytest.FixtureRequest) -> tuple[str, str, Rehearsed]:
    profile, name = request.param
    return profile, name, REPORT[profile][name]


def test_every_lesson_was_rehearsed_on_a_t4() -> None:
    missing = NOTEBOOKS.keys() - REPORT["t4"].keys()
    assert not missing, AGAIN.format(" ".join(sorted(name[:2] for name in missing)), "t4")


def test_no_row_is_of_a_lesson_that_is_gone() -> None:
    assert {name for _, name in ROWS} <= NOTEBOOKS.keys()


def test_every_lesson_fits_and_no_cell_raised(row) -> None:
    *_, found = row
    assert found.fits and not found.too_large, found.too_large
    assert not found.errors


def test_the_lessons_code_is_what_was_rehearsed(row) -> None:
    profile, name, found = row
    if name in NOTEBOOKS:
        assert found.key == code_key(NOTEBOOKS[name], profile), AGAIN.format(name[:2], profile)
