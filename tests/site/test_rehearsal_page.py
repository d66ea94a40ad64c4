"""The page of the rehearsal says of each lesson what it found, and where there is nothing to say yet."""

from dataclasses import replace
from pathlib import Path

import pytest

from course.notebooks import select_notebooks
from course.rehearsal.report import Rehearsed, write_report
from course.site.rehearsal import EMPTY, page, row

LESSONS = select_notebooks()[:2]
FOUND = Rehearsed(
    key="key",
    fits=False,
    peak_gib=15.02,
    peak_cell="cell 4 (train())",
    reserved_gib=15.5,
    device_gib=16.0,
    main_gib=3.2,
    seconds=133,
    budget=0.1,
    statements=682,
    too_large=["cell 4 (train()): 15.0 GiB of tensors"],
    errors=["cell 5 (a | b): NameError: name '<b>' is not defined"],
    never_reached=["cell 6 (def f(), line 2: return `x`", "cell 6 (def f(), line 3: return 2"],
)


def test_a_row_has_what_was_found_and_a_lesson_without_it_is_not_rehearsed_yet(tmp_path: Path) -> None:
    write_report({"t4": {LESSONS[0].stem: FOUND}}, tmp_path / "rehearsal.json")
    text = page(LESSONS, tmp_path / "rehearsal.json")
    assert text.startswith("## T4 with 14.6 GiB, profile t4\n")
    first, second = (line for line in text.split("\n") if line.startswith("| [0"))
    assert first.endswith("| 15.0 | −1.4 | **no** | 1 | 133 | 10 % | 2 of 682 |")
    assert "not rehearsed yet" in second and first.count("|") == second.count("|")
    assert text.count("\n### ") == 1
    for line in ("Cells that do not fit: 1", "Cells that raised: 1", "Lines never reached: 2", FOUND.errors[0]):
        assert line in text
    assert "Formats" not in text


def test_without_a_report_the_page_says_how_to_make_one(tmp_path: Path) -> None:
    assert page(LESSONS, tmp_path / "rehearsal.json") == EMPTY


@pytest.mark.parametrize(
    ("fits", "errors", "said"), [(True, [], "yes"), (True, ["cell 5"], "not known"), (False, ["cell 5"], "**no**")]
)
def test_a_lesson_fits_only_if_all_of_it_ran(fits: bool, errors: list[str], said: str) -> None:
    assert row(replace(FOUND, fits=fits, errors=errors), memory=16 * 2**30)[2] == said
