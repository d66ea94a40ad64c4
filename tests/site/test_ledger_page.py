"""The page of the ledger says what each claim is worth, and that there is no ledger where there is none."""

from pathlib import Path

from course.claims.ledger import CONTROL, Lesson, write_ledger
from course.notebooks import select_notebooks
from course.site.ledger import EMPTY, page, table

FIRST = select_notebooks()[:1]


def lesson() -> Lesson:
    """An effect that one seed breaks, an identity and a report, on two seeds and in the control."""
    made = Lesson("key")
    names = ("statement", "kind", "value", "at_least", "at_most", "control")
    for seed, gain in (("0", 0.625), ("1", 0.25)):
        rows = [
            ("a | b gains", "effect", gain, 0.5, None, None),
            ("two ways agree", "identity", 1e-8, None, 1e-6, None),
            ("tokens", "report", "12 (10 to 14)", None, None, None),
        ]
        made.add(seed, [dict(zip(names, row, strict=True)) for row in rows])
    made.add(CONTROL, [dict(zip(names, ("a | b gains", "effect", 0.0, 0.5, None, None), strict=True))])
    return made


def test_a_row_has_bound_values_spread_control_and_what_is_wrong() -> None:
    head, _, effect, identity, report = table(lesson(), {"a | b gains": "to be reworded"}).split("\n")
    assert head == "| claim | kind | bound | seed 0 | seed 1 | spread | control | what is wrong |"
    assert effect.startswith("| a \\| b gains | effect | at least 0.5 | 0.625 | 0.25 | 0.265 | 0 | broken by seed 1; ")
    assert effect.endswith(". Known: to be reworded |")
    assert identity == "| two ways agree | identity | at most 1e-06 | 1e-08 | 1e-08 | 0 |  |  |"
    assert report == "| tokens | report |  | 12 (10 to 14) | 12 (10 to 14) |  |  |  |"


def test_a_lesson_in_the_ledger_has_its_heading_and_without_a_ledger_the_page_says_so(tmp_path: Path) -> None:
    ledger, exceptions = tmp_path / "claims.json", tmp_path / "exceptions.json"
    assert page(FIRST, ledger, exceptions) == EMPTY
    write_ledger({FIRST[0].stem: lesson()}, ledger)
    assert page(FIRST, ledger, exceptions).startswith("## 01 · ")
