"""The calculator's table of cases, which the site's JavaScript is held to, is what helpers.memory answers."""

import json

from helpers.memory import METHODS, OPTIMIZERS, PRECISIONS, QUANTISATIONS, bundled_shapes
from tests.site.calculator_cases import CASES, answer

CASE_ROWS = json.loads(CASES.read_text(encoding="utf-8"))


def test_the_table_of_cases_covers_every_model_and_choice():
    assert len(CASE_ROWS) >= 60
    for purpose in ("training", "inference"):
        rows = [case for case in CASE_ROWS if case["purpose"] == purpose]
        assert {case["model"] for case in rows} == set(bundled_shapes())
        assert any(case["changes"] for case in rows)
    training = [case["settings"] for case in CASE_ROWS if case["purpose"] == "training"]
    assert {row["method"] for row in training} == set(METHODS)
    assert {row["optimizer"] for row in training} == set(OPTIMIZERS)
    assert {row["precision"] for row in training} == set(PRECISIONS)
    assert {row["zero_stage"] for row in training} == {0, 1, 2, 3}
    inference = [case["settings"] for case in CASE_ROWS if case["purpose"] == "inference"]
    assert {row["quantization"] for row in inference} == {None, *QUANTISATIONS}


def test_python_answers_as_the_table_says():
    different = [case["model"] for case in CASE_ROWS if answer(case) != case["expected"]]
    assert not different, f"{different}: after a change of helpers.memory, run python -m tests.site.calculator_cases"
