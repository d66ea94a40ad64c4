"""The ledger belongs to the committed notebooks, and every claim survives the seeds that were run, and its control.

What does not survive stands in data/claim_exceptions.json with a reason, until its lesson is revised.
"""

import pytest

from course.claims.collect import claims_of
from course.claims.ledger import read_exceptions, read_ledger
from course.notebooks import select_notebooks

LEDGER = read_ledger()
EXCEPTIONS = read_exceptions(LEDGER)
NOTEBOOKS = {path.stem: path for path in select_notebooks()}


def test_the_ledger_has_all_lessons_and_no_other() -> None:
    assert LEDGER.keys() == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_ledger_says_what_the_committed_notebook_says(name: str) -> None:
    said = {claim["statement"]: claim for claim in claims_of(NOTEBOOKS[name])}
    rows = {row.statement: row for row in LEDGER[name].claims}
    again = f"python -m course claims --only {name[:2]}"
    assert rows.keys() == said.keys(), f"fill the ledger: {again}"
    for statement, claim in said.items():
        row = rows[statement]
        assert (row.kind, row.at_least, row.at_most) == (claim["kind"], claim["at_least"], claim["at_most"]), again


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_claim_was_tried_in_its_control_and_on_each_seed_and_survives_or_is_an_exception(name: str) -> None:
    lesson, reasons = LEDGER[name], EXCEPTIONS.get(name, {})
    assert {"0", "1", "2", "3", "4"} <= lesson.seeds() and lesson.controlled
    faults = {row.statement: row.faults for row in lesson.claims if row.faults}
    assert {statement: found for statement, found in faults.items() if statement not in reasons} == {}
    assert sorted(reasons.keys() - faults.keys()) == [], "these survive: take them out of the exceptions"
    assert all(len(reason.split()) >= 5 for reason in reasons.values()), "give each exception a reason"
