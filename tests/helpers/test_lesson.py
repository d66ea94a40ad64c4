"""A lesson's claims: what holds, on what it insists, what it records; and what else every lesson does."""

import json
import logging
import math
from collections.abc import Iterator

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from helpers.errors import CourseError
from helpers.lesson import RECORD, Claim, Lesson, quiet_libraries, show_table
from helpers.profiles import CPU


@pytest.fixture(autouse=True)
def insisting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a student's notebook, where nothing is recorded and no profile is chosen by the environment."""
    for name in (RECORD, "LLM_WORKBOOK_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def lesson(capsys: pytest.CaptureFixture) -> Lesson:
    """The complete run of seed 0; what it says when it begins is read already."""
    begun = Lesson("08", "cpu")
    capsys.readouterr()
    return begun


# Bounds


@pytest.mark.parametrize(
    ("bounds", "kept", "broken"),
    [
        ({"at_least": 0.5}, [0.5, 7, torch.tensor(0.75)], [0.49, -1]),
        ({"at_most": 0.5}, [0.5, -7, True - 1], [0.51, 1e30]),
        ({"at_least": 0.2, "at_most": 0.5}, [0.2, 0.3, 0.5], [0.1, 0.6]),
        ({"at_least": 0.0}, [0.0, 1e-9], [-1e-9]),
    ],
)
def test_a_claim_holds_within_its_bounds_and_on_them(lesson: Lesson, bounds: dict, kept: list, broken: list) -> None:
    for value in kept:
        lesson.claim("it grows", value, **bounds)
        assert lesson.claims["it grows"].holds
    for value in broken:
        with pytest.raises(AssertionError, match="it grows"):
            lesson.claim("it grows", value, **bounds)
        assert not lesson.claims["it grows"].holds


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_never_holds(lesson: Lesson, value: float) -> None:
    for bound in ("at_least", "at_most"):
        with pytest.raises(AssertionError):
            lesson.claim("it is a number", value, **{bound: 0.0})
    with pytest.raises(AssertionError):
        lesson.equal("it is peft's", value, within=1e-6)
    assert not any(claim.holds for claim in lesson.claims.values())
    assert not Claim("any", "effect", 1.0, "1", at_least=-math.inf).keeps(value)


def test_another_number_can_be_held_against_a_claim(lesson: Lesson) -> None:
    lesson.claim("it grows", 0.9, at_least=0.5, control=torch.tensor(0.25))
    claim = lesson.claims["it grows"]
    assert claim.control == 0.25 and not claim.keeps(claim.control) and claim.keeps(0.5)


def test_a_claim_without_a_bound_is_one_sentence(lesson: Lesson) -> None:
    with pytest.raises(CourseError, match="The claim 'it grows' has no bound: give at_least or at_most") as caught:
        lesson.claim("it grows", 0.9)
    assert "\n" not in str(caught.value) and lesson.claims == {}


def test_each_claim_is_one_line_with_its_number_and_its_bound(lesson: Lesson, capsys: pytest.CaptureFixture) -> None:
    lesson.claim("it grows", 0.8765, at_least=0.5, form=".0%")
    lesson.equal("it is peft's", 1e-7, within=1e-6)
    lesson.equal("it is the same tokens", 0)
    lesson.claim("it is small", 3.14159, at_least=1, at_most=2, insist=False)
    assert capsys.readouterr().out.splitlines() == [
        "holds: it grows (88%, at least 50%)",
        "holds: it is peft's (difference 1.0e-07, at most 1.0e-06)",
        "holds: it is the same tokens (0 differ)",
        "DOES NOT HOLD: it is small (3.14, at least 1 and at most 2)",
    ]


# Insisting


@pytest.mark.parametrize(
    ("arguments", "on_effects", "on_identities"),
    [
        ({}, True, True),
        ({"budget": 2.0}, True, True),
        ({"seed": 1}, False, True),
        ({"budget": 0.5}, False, False),
        ({"model_id": "owner/another"}, False, False),
        ({"profile": "t4", "model_id": "owner/another"}, False, False),
        ({"uses": "assistant"}, True, True),
    ],
)
def test_effects_are_insisted_on_in_the_complete_run_of_seed_0_and_identities_on_every_seed(
    arguments: dict, on_effects: bool, on_identities: bool
) -> None:
    lesson = Lesson("08", **{"profile": "cpu"} | arguments)
    assert lesson.complete == on_identities

    def insists(say, **bound: float) -> bool:
        try:
            say("it holds", 1.0, **bound)
        except AssertionError:
            return True
        return False

    assert insists(lesson.claim, at_most=0.5) == on_effects
    assert insists(lesson.equal, within=0.5) == on_identities
    assert not insists(lesson.claim, at_most=0.5, insist=False)


def test_where_claims_are_recorded_none_is_insisted_on(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(RECORD, "record")
    lesson.claim("it grows", 0.1, at_least=0.5)
    lesson.equal("it is peft's", 1.0)
    assert capsys.readouterr().out.count("DOES NOT HOLD") == 2
    monkeypatch.setenv(RECORD, "insist")
    with pytest.raises(AssertionError, match="it grows"):
        lesson.claim("it grows", 0.1, at_least=0.5)


# The closing table


@pytest.fixture
def shell() -> Iterator[InteractiveShell]:
    """What a notebook's kernel shows outputs through."""
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_the_summary_shows_a_table_and_its_metadata_hold_the_record(lesson: Lesson, shell: InteractiveShell) -> None:
    lesson.claim("P(a|b) grows", 0.9, at_least=0.5, control=0.1)
    lesson.claim("it is fast", 0.9, at_most=0.5, insist=False)
    lesson.equal("it is peft's", 0.0, within=1e-6)
    lesson.report("reward", torch.tensor(1.5), form=".2f")
    lesson.report("model", "shima-4m")
    with capture_output() as captured:
        lesson.summary()
    (output,) = captured.outputs
    assert output.data["text/markdown"].splitlines() == [
        "| what was measured | number | |",
        "|---|---|---|",
        r"| P(a\|b) grows | 0.9, at least 0.5; control 0.1 | holds |",
        "| it is fast | 0.9, at most 0.5 | **does not hold** |",
        "| it is peft's | difference 0.0e+00, at most 1.0e-06 | holds |",
        "| reward | 1.50 |  |",
        "| model | shima-4m |  |",
    ]
    record = json.loads(json.dumps(output.metadata["workbook"]))
    assert {name: record[name] for name in ("lesson", "seed", "complete")} == {
        "lesson": "08",
        "seed": 0,
        "complete": True,
    }
    assert [Claim(**claim) for claim in record["claims"]] == list(lesson.claims.values())
    assert record["claims"][0]["control"] == 0.1 and record["claims"][3]["value"] == 1.5


def test_a_claim_said_twice_is_kept_once_with_its_last_number(lesson: Lesson) -> None:
    for value in (0.6, 0.7):
        lesson.claim("it grows", value, at_least=0.5)
    assert [claim.value for claim in lesson.claims.values()] == [0.7]


# What else a lesson does


def test_a_lesson_begins_with_one_line_about_its_machine(capsys: pytest.CaptureFixture) -> None:
    lesson = Lesson("05", "cpu", seed=3, budget=0.25, uses="assistant")
    assert capsys.readouterr().out == (
        "lesson 05, profile cpu: shima-4m-assistant on cpu in float32, seed 3, budget 0.25\n"
    )
    assert lesson.machine == CPU
    assert logging.getLogger("bitsandbytes").level == logging.ERROR


@pytest.mark.parametrize("budget", [0, -1.0])
def test_a_budget_that_is_no_share_is_one_sentence(budget: float) -> None:
    with pytest.raises(CourseError, match=rf"^The budget is {budget}: give a share above 0; [^\n]*\.$"):
        Lesson("05", "cpu", budget=budget)


def test_work_is_scaled_by_the_budget_and_never_below_the_least() -> None:
    lesson = Lesson("05", "cpu", budget=0.1)
    assert [lesson.scaled(100), lesson.scaled(10), lesson.scaled(10, least=1)] == [10, 4, 1]


@pytest.mark.parametrize(
    ("in_hardware", "precision", "dtype"),
    [(True, "bf16-mixed", torch.bfloat16), (False, "fp32", torch.float32)],
)
def test_matrices_are_multiplied_in_bfloat16_where_the_cpu_does_it_in_hardware(
    lesson: Lesson, monkeypatch: pytest.MonkeyPatch, in_hardware: bool, precision: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: in_hardware, raising=False)
    assert lesson.precision == precision and lesson.compute_dtype == dtype
    matrix = torch.ones(2, 2)
    with lesson.autocast():
        assert (matrix @ matrix).dtype == dtype
    with lesson.autocast(enabled=False):
        assert (matrix @ matrix).dtype == torch.float32


def test_a_table_is_aligned_under_its_columns(capsys: pytest.CaptureFixture) -> None:
    show_table({"PPO": ["0.9", "12 s"], "best of N": ["0.875", "1 s"]}, ["reward", "time"])
    assert capsys.readouterr().out.splitlines() == [
        "            reward   time",
        "PPO            0.9   12 s",
        "best of N    0.875    1 s",
    ]


def test_quiet_libraries_show_no_progress_bars_and_no_remarks() -> None:
    import datasets
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    try:
        quiet_libraries()
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert datasets.are_progress_bars_disabled()
    finally:
        transformers_logging.set_verbosity(before)
        datasets.enable_progress_bars()
