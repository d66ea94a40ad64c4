import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from helpers.errors import CourseError
from helpers.exercises import check, expect_close, expect_equal, expect_shape, expect_true
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises, run_check

STUB = '''def merge_pair(ids, pair, new_id):
    """Replace every occurrence of the pair by new_id."""
    raise NotImplementedError'''
CHECK = """def checker(merge_pair):
    expect_equal("merge_pair([1, 2, 1, 2], (1, 2), 9)", merge_pair([1, 2, 1, 2], (1, 2), 9), [9, 9])
    expect_equal("merge_pair([1, 1, 1], (1, 1), 9)", merge_pair([1, 1, 1], (1, 1), 9), [9, 1])

check("3.1", checker, merge_pair)"""
SOLUTION = """def merge_pair(ids, pair, new_id):
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged
"""


def cell(kind, source, *tags):
    return getattr(nbformat.v4, f"new_{kind}_cell")(source, metadata={"tags": list(tags)})


def folded(solution):
    return f"<details><summary>Solution</summary>\n\n```python\n{solution}```\n\n</details>"


@pytest.fixture
def write_notebook(tmp_path):
    def write(*cells):
        path = tmp_path / "03_lesson.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
        return path

    return write


@pytest.fixture
def exercise(write_notebook):
    cells = [
        cell("code", "1 + 1"),
        cell("code", "assert True", "check"),
        cell("code", STUB, "exercise"),
        cell("code", CHECK, "check"),
        cell("markdown", folded(SOLUTION), "solution"),
    ]
    return read_exercises(write_notebook(*cells))["3.1"]


def verdict(expectation, *arguments, **settings):
    """Return the message of a check with this single expectation."""
    return check("1.1", lambda: expectation(*arguments, **settings)).message


def test_one_line_is_printed_for_each_of_the_three_outcomes(exercise, capsys):
    run_check(exercise, STUB, {})
    run_check(exercise, SOLUTION, {})
    run_check(exercise, planted(SOLUTION, "i += 2", "i += 1"), {})
    assert capsys.readouterr().out.splitlines() == [
        "Exercise 3.1: not attempted yet",
        "Exercise 3.1: correct (2 checks)",
        "Exercise 3.1: not yet. merge_pair([1, 2, 1, 2], (1, 2), 9) gave [9, 2, 9, 2], expected [9, 9]",
    ]


def test_an_exception_of_the_student_is_told_with_the_call_and_the_line(exercise):
    result = run_check(exercise, planted(SOLUTION, "ids[i : i + 2]", "ids[i + 9]"), {})
    assert result.status == "not yet"
    assert result.message == (
        "not yet. merge_pair([1, 2, 1, 2], (1, 2), 9) raised IndexError: list index out of range, "
        "in your line: if tuple(ids[i + 9]) == pair:"
    )


def test_an_exception_from_inside_a_library_names_the_line_of_the_student(exercise):
    attempt = "import json\ndef merge_pair(ids, pair, new_id):\n    return json.loads('{')"
    message = run_check(exercise, attempt, {}).message
    assert "raised JSONDecodeError" in message and message.endswith("in your line: return json.loads('{')")


def test_a_forgotten_return_is_named(exercise):
    result = run_check(exercise, planted(SOLUTION, "    return merged\n", ""), {})
    assert "returned None: did you forget return?" in result.message
    used = check("1.1", lambda f: expect_true("the result is short", len(f()) < 3), lambda: None)
    assert used.message.endswith("(a result is None: did you forget return?)")


def test_a_wrong_signature_is_an_ordinary_not_yet(exercise):
    message = run_check(exercise, "def merge_pair(ids):\n    return ids", {}).message
    assert message.startswith("not yet. merge_pair([1, 2, 1, 2], (1, 2), 9) raised TypeError: merge_pair() takes 1")


def test_a_stub_that_another_function_or_a_module_calls_counts_as_not_attempted():
    class Stub(torch.nn.Module):
        def forward(self, x):
            raise NotImplementedError("write the forward pass")

    class Empty(torch.nn.Module):
        pass

    for module in (Stub(), Empty()):
        result = check("1.1", lambda module: expect_shape("module(x)", module(torch.ones(1)), (1,)), module)
        assert (result.status, str(result)) == ("not attempted", "Exercise 1.1: not attempted yet")


def test_a_not_implemented_error_of_a_library_is_not_taken_for_a_stub():
    def attempt():
        return torch.ones(2, device="meta").tolist() if False else torch.empty(2, device="meta").cpu()

    result = check("1.1", lambda f: expect_equal("f()", f(), [1, 1]), attempt)
    assert result.status == "not yet" and "raised NotImplementedError" in result.message


def test_numbers_lists_tuples_dicts_and_texts_are_compared_exactly():
    for value in (3, 2.5, "Oro", [1, [2, 3]], (1, 2), {"a": [1.0]}, {1, 2}, None, True, float("nan")):
        assert verdict(expect_equal, "f()", value, value) == "correct (1 check)"
    assert verdict(expect_equal, "f()", (9, 9), [9, 9]) == "not yet. f() gave (9, 9), expected [9, 9]"
    assert verdict(expect_equal, "f()", [1], [1, 2]) == "not yet. f() gave [1], expected [1, 2]"
    assert verdict(expect_equal, "f()", {"a": 1}, {"a": 2}) == "not yet. f() gave {'a': 1}, expected {'a': 2}"
    assert "gave 0.30000000000000004, expected 0.29999999999999999" in verdict(expect_equal, "f()", 0.1 + 0.2, 0.3)


def test_closeness_is_relative_for_large_and_absolute_for_small_numbers():
    assert verdict(expect_close, "f()", 1000.005, 1000.0) == "correct (1 check)"
    assert verdict(expect_close, "f()", [0.1 + 0.2, 1], [0.3, 1.0]) == "correct (1 check)"
    assert verdict(expect_close, "f()", 0.3001, 0.3) == "not yet. f() gave 0.3001, expected 0.3"
    assert verdict(expect_close, "f()", 0.3001, 0.3, tolerance=1e-3) == "correct (1 check)"
    for value in (float("nan"), float("inf"), "0.3", [0.3]):
        assert verdict(expect_close, "f()", value, 0.3).startswith("not yet")


def test_tensors_are_compared_by_shape_first_and_then_by_element():
    expected = torch.arange(12.0).reshape(3, 4)
    assert verdict(expect_equal, "f(x)", expected.clone().requires_grad_(), expected) == "correct (1 check)"
    assert verdict(expect_close, "f(x)", expected.numpy() + 1e-6, expected) == "correct (1 check)"
    assert verdict(expect_equal, "f(x)", expected + 1e-6, expected).startswith("not yet")
    assert verdict(expect_equal, "f(x)", expected.T, expected) == "not yet. f(x) has shape (4, 3), expected (3, 4)"
    wrong = expected.clone()
    wrong[1, 2], wrong[2, 0] = 7.5, float("nan")
    assert verdict(expect_close, "f(x)", wrong, expected) == (
        "not yet. f(x) is wrong in 2 of 12 elements, first at [1, 2]: gave 7.5, expected 6"
    )
    assert verdict(expect_close, "f(x)", torch.tensor([1, 2]), torch.tensor([1.0, 3.0])) == (
        "not yet. f(x) gave [1, 2], expected [1, 3]"
    )
    assert verdict(expect_close, "f(x)", [expected, wrong], [expected, expected]).startswith("not yet")
    assert verdict(expect_equal, "f(x)", "text", expected) == (
        "not yet. f(x) gave 'text', expected a tensor of shape (3, 4)"
    )


def test_a_tensor_may_be_expected_as_a_number_or_a_list():
    assert verdict(expect_close, "f(x)", torch.tensor(2.0), 2.0) == "correct (1 check)"
    assert verdict(expect_equal, "f(x)", np.array([1, 2]), [1, 2]) == "correct (1 check)"
    assert verdict(expect_equal, "f(x)", torch.tensor([2.0]), 2.0) == "not yet. f(x) has shape (1,), expected ()"
    infinite = torch.tensor([0.0, float("-inf")])
    assert verdict(expect_close, "f(x)", infinite, infinite) == "correct (1 check)"
    assert verdict(expect_close, "f(x)", torch.tensor([0.0, -1e9]), infinite).startswith("not yet")


def test_a_shape_and_a_claim_can_be_expected_alone():
    assert verdict(expect_shape, "f(x)", torch.ones(2, 3), (2, 3)) == "correct (1 check)"
    assert verdict(expect_shape, "f(x)", torch.ones(3), (2, 3)) == (
        "not yet. f(x) has shape (3,), expected a tensor of shape (2, 3)"
    )
    assert verdict(expect_shape, "f(x)", None, (2,)).startswith("not yet. f(x) returned None: did you forget return?")
    assert verdict(expect_shape, "f(x)", 4, (2,)) == "not yet. f(x) gave 4, expected a tensor of shape (2,)"
    assert verdict(expect_true, "each row sums to 1", torch.tensor(True)) == "correct (1 check)"
    assert verdict(expect_true, "each row sums to 1", 0) == (
        "not yet. This should hold but does not: each row sums to 1"
    )


def test_a_long_value_is_shortened():
    message = verdict(expect_equal, "f()", list(range(1000)), "x" * 1000)
    assert len(message) < 400 and "..." in message


def test_a_checker_that_expects_nothing_is_refused():
    with pytest.raises(CourseError, match=r"exercise 1\.1 expects nothing"):
        check("1.1", lambda: None)


def test_a_headless_run_shows_one_line_for_an_open_exercise_and_goes_on():
    cells = [cell("code", f"from helpers.exercises import *\n{STUB}"), cell("code", CHECK), cell("code", "6 * 7")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert [dict(output) for output in notebook.cells[1].outputs] == [
        {"output_type": "stream", "name": "stdout", "text": "Exercise 3.1: not attempted yet\n"}
    ]
    assert notebook.cells[2].outputs[0]["data"]["text/plain"] == "42"


def test_the_proof_accepts_a_good_check_and_rejects_one_that_a_wrong_attempt_passes(exercise):
    wrong = [planted(SOLUTION, "i += 2", "i += 1"), "def merge_pair(ids, pair, new_id):\n    return [9, 9]"]
    prove_check(exercise, {}, wrong)
    with pytest.raises(AssertionError, match="although this attempt is wrong"):
        prove_check(exercise, {}, [wrong[0], SOLUTION + "\nmistake = 1"])
    with pytest.raises(AssertionError):
        prove_check(exercise, {}, wrong[:1])


def test_the_names_of_the_lesson_reach_the_attempt_and_do_not_leak_back(exercise):
    setup = {"HELPER": 2}
    assert run_check(exercise, planted(SOLUTION, "i += 2", "i += HELPER"), setup).status == "correct"
    assert setup == {"HELPER": 2}


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([cell("code", STUB, "exercise"), cell("code", CHECK, "check")], "last exercise has no solution"),
        ([cell("code", STUB, "exercise"), cell("code", STUB, "exercise")], "no check and solution"),
        ([cell("markdown", folded(SOLUTION), "solution")], "no exercise and check before it"),
        (
            [cell("code", STUB, "exercise"), cell("code", CHECK, "check"), cell("markdown", "see above", "solution")],
            "no folded Python solution",
        ),
    ],
)
def test_an_incomplete_exercise_in_a_notebook_is_named(cells, message, write_notebook):
    with pytest.raises(AssertionError, match=message):
        read_exercises(write_notebook(*cells))
