"""The ledger finds a claim that a seed breaks, that its control keeps, or whose bound is too near; it loses nothing."""

import json
from pathlib import Path

import pytest

from course.claims.ledger import CONTROL, Lesson, Row, read_exceptions, read_ledger, write_ledger
from helpers.errors import CourseError


def said(value: object, control: float | None = None, **bounds: float) -> dict:
    return {
        "statement": "training helps",
        "kind": "effect",
        "at_least": bounds.get("at_least", 0.5),
        "at_most": None,
        "value": value,
        "control": control,
    }


def filled(values: list[float], nothing_learns: float, control: float | None = None) -> Row:
    lesson = Lesson("key")
    for seed, value in enumerate(values):
        lesson.add(str(seed), [said(value, control)])
    lesson.add(CONTROL, [said(nothing_learns)])
    (row,) = lesson.claims
    return row


def test_a_claim_that_holds_on_all_seeds_with_room_and_not_in_the_control_has_no_fault() -> None:
    row = filled([0.9, 0.92, 0.88], 0.1)
    assert row.faults == [] and row.control == 0.1 and row.spread == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("values", "nothing_learns", "fault"),
    [
        ([0.9, 0.4, 0.95], 0.1, "broken by seed 1"),
        ([0.9, float("nan"), 0.9], 0.1, "broken by seed 1"),
        ([0.9, 0.92, 0.88], 0.7, "holds in its control"),
        ([0.51, 0.6, 0.5], 0.1, "within one spread"),
    ],
)
def test_each_fault_is_named(values: list[float], nothing_learns: float, fault: str) -> None:
    assert any(fault in found for found in filled(values, nothing_learns).faults)


def test_a_control_that_the_lesson_measures_comes_before_the_null_run() -> None:
    row = filled([0.9, 0.9], nothing_learns=0.8, control=0.2)
    assert (row.control, row.control_from, row.holds_in_control) == (0.2, "lesson", False)


def test_a_claim_that_a_run_did_not_reach_is_broken_there_and_one_of_the_control_alone_is_no_row() -> None:
    lesson = Lesson("key")
    lesson.add("0", [said(0.9)])
    lesson.add("1", [])
    lesson.add(CONTROL, [said(0.1) | {"statement": "only when nothing learns"}])
    (row,) = lesson.claims
    assert row.broken_by == ["1"] and row.control is None and not row.holds_in_control
    assert lesson.seeds() == {"0", "1"}


def test_a_report_has_no_faults() -> None:
    lesson = Lesson("key")
    lesson.add("0", [said("12 of 80") | {"kind": "report", "at_least": None}])
    assert lesson.claims[0].faults == [] and lesson.claims[0].spread is None


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    lesson = Lesson("key")
    lesson.add("0", [said(0.9), said(float("inf")) | {"statement": "another"}])
    write_ledger({"03_pretraining": lesson}, tmp_path / "claims.json")
    assert read_ledger(tmp_path / "claims.json") == {"03_pretraining": lesson}
    assert read_ledger(tmp_path / "missing.json") == {}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"version": 2, "lessons": {}}', "of version 2"),
        ('{"version": 1, "lessons": {"03": {"key": "k"}}}', "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
    ],
)
def test_another_ledger_is_refused_in_a_sentence_and_left_alone(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "claims.json"
    path.write_text(content)
    with pytest.raises(CourseError, match=words):
        read_ledger(path)
    assert path.read_text() == content


def test_an_exception_for_a_claim_that_no_lesson_makes_is_named(tmp_path: Path) -> None:
    lesson = Lesson("key")
    lesson.add("0", [said(0.9)])
    path = tmp_path / "exceptions.json"
    path.write_text(json.dumps({"03": {"training helps": "one seed"}}))
    assert read_exceptions({"03": lesson}, path) == {"03": {"training helps": "one seed"}}
    path.write_text(json.dumps({"03": {"training hurts": "one seed"}}))
    with pytest.raises(CourseError, match="03 does not make: 'training hurts'"):
        read_exceptions({"03": lesson}, path)
