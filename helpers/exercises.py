"""Instant feedback on exercises: what a check cell calls, and the one line that it prints.

    def checker(merge_pair):
        expect_equal("merge_pair([1, 2, 1, 2], (1, 2), 9)", merge_pair([1, 2, 1, 2], (1, 2), 9), [9, 9])

    check("3.1", checker, merge_pair)

A checker calls the student's function and states what must come out; the first statement that fails ends it. It
knows nothing about any exercise: those stand in the notebooks. In a notebook the result of an attempt is also written
to build/progress.json, which `python -m course progress` reads; it never leaves the machine.
"""

import datetime
import dis
import json
import linecache
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from IPython import get_ipython

from helpers.errors import CourseError
from helpers.files import write_atomically
from helpers.profiles import ROOT

PROGRESS = ROOT / "build" / "progress.json"  # number of an exercise -> its status, and the day it was reached

_passed = 0  # expectations met in the check that is running


class _NotMetError(Exception):
    """An expectation failed; the message says how."""


@dataclass(frozen=True)
class CheckResult:
    """What `check` found: `status` is "not attempted", "correct" or "not yet"; str() is the line printed."""

    number: str
    status: str
    message: str

    def __str__(self) -> str:
        """Return for example "Exercise 3.1: correct (5 checks)"."""
        return f"Exercise {self.number}: {self.message}"

    def _ipython_display_(self) -> None:
        """Show nothing at the end of a cell: the line is already printed."""


def check(number: str, checker: Callable[..., None], *attempts: Any) -> CheckResult:
    """Run `checker(*attempts)`, print one line about it and return the same as a `CheckResult`.

    A wrong or failing attempt never raises, so that a notebook with open exercises runs to its end. Raises
    `CourseError` for a checker that expects nothing.
    """
    global _passed
    _passed = 0
    try:
        checker(*attempts)
    except _NotMetError as unmet:
        result = CheckResult(number, "not yet", f"not yet. {unmet}")
    except Exception as error:
        if _is_untouched_stub(error, checker):
            result = CheckResult(number, "not attempted", "not attempted yet")
        else:
            result = CheckResult(number, "not yet", f"not yet. {_describe(error, checker)}")
    else:
        if _passed == 0:
            raise CourseError(f"The check of exercise {number} expects nothing: call expect_equal or the like in it.")
        result = CheckResult(number, "correct", f"correct ({_passed} check{'s' if _passed > 1 else ''})")
    print(result)
    if get_ipython() is not None and result.status != "not attempted":
        _remember(result)
    return result


def read_progress(path: Path = PROGRESS) -> dict[str, dict[str, str]]:
    """Exercises that were attempted, number -> {"status": "correct" or "not yet", "day": "2026-11-27"}.

    Empty without the file. CourseError if it is damaged; it is left alone.
    """
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else "{}"
        progress = json.loads(text)
        return {str(number): {key: str(entry[key]) for key in ("status", "day")} for number, entry in progress.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        raise CourseError(f"{path.name} is damaged: delete it, and run the checks that you had solved again.") from None


def _remember(result: CheckResult) -> None:
    """Write the result of an attempt down; what was once correct stays so. Without a place to write nothing is kept."""
    try:
        progress = read_progress(PROGRESS)
        if progress.get(result.number, {}).get("status") != "correct":
            progress[result.number] = {"status": result.status, "day": datetime.date.today().isoformat()}
            PROGRESS.parent.mkdir(exist_ok=True)
            write_atomically(PROGRESS, json.dumps(progress, indent=1))
    except CourseError as error:
        print(error)
    except OSError:
        pass


def expect_equal(call: str, actual: Any, expected: Any) -> None:
    """State that `call`, a text that shows how `actual` was made, gives exactly `expected` (values, order, shape)."""
    _expect(call, actual, expected, tolerance=0.0)


def expect_close(call: str, actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """State that the numbers, lists or tensors are equal up to `tolerance` * max(1, |expected|) in every element."""
    _expect(call, actual, expected, tolerance)


def expect_true(claim: str, condition: Any) -> None:
    """State that `claim`, a text such as "each row of weights sums to 1", holds."""
    global _passed
    if not condition:
        raise _NotMetError(f"This should hold but does not: {claim}")
    _passed += 1


def expect_shape(call: str, actual: Any, shape: tuple[int, ...]) -> None:
    """State that `call` gives a tensor or array of this shape."""
    global _passed
    found = tuple(actual.shape) if hasattr(actual, "shape") else None
    if found != tuple(shape):
        what = _missing_return(actual) or (f"gave {_short(actual)}" if found is None else f"has shape {found}")
        raise _NotMetError(f"{call} {what}, expected a tensor of shape {tuple(shape)}")
    _passed += 1


def _expect(call: str, actual: Any, expected: Any, tolerance: float) -> None:
    global _passed
    difference = _difference(actual, expected, tolerance)
    if difference:
        raise _NotMetError(f"{call} {difference}")
    _passed += 1


def _difference(actual: Any, expected: Any, tolerance: float) -> str | None:
    """Say in words how `actual` differs from `expected`, or return None."""
    plain = _gave(actual, expected)
    if actual is None and expected is not None:
        return _missing_return(actual)
    if _is_array(actual) or _is_array(expected):
        return _array_difference(actual, expected, tolerance)
    if isinstance(expected, Number) and isinstance(actual, Number):
        return None if actual == expected or _close(actual, expected, tolerance) else plain
    if isinstance(expected, list | tuple) and type(actual) is type(expected) and len(actual) == len(expected):
        same = all(_difference(a, e, tolerance) is None for a, e in zip(actual, expected, strict=True))
        return None if same else plain
    if isinstance(expected, dict) and isinstance(actual, dict) and actual.keys() == expected.keys():
        same = all(_difference(actual[key], expected[key], tolerance) is None for key in expected)
        return None if same else plain
    return None if actual == expected else plain


def _array_difference(actual: Any, expected: Any, tolerance: float) -> str | None:
    try:
        found, wanted = (torch.as_tensor(value).detach().cpu() for value in (actual, expected))
    except (TypeError, ValueError, RuntimeError):
        return _gave(actual, expected)
    if found.shape != wanted.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    found, wanted = found.to(torch.complex128), wanted.to(torch.complex128)  # holds every kind of number
    close = ((found - wanted).abs() <= tolerance * wanted.abs().clamp(min=1.0)) & wanted.abs().isfinite()
    wrong = ~((found == wanted) | close | (found.isnan() & wanted.isnan()))
    if not wrong.any():
        return None
    if found.numel() <= 8:
        return _gave(actual, expected)
    place = tuple(wrong.nonzero()[0].tolist())
    first = [f"{value[place].real.item():.6g}" for value in (found, wanted)]
    return (
        f"is wrong in {int(wrong.sum())} of {wrong.numel()} elements, "
        f"first at {list(place)}: gave {first[0]}, expected {first[1]}"
    )


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _close(actual: Any, expected: Any, tolerance: float) -> bool:
    if actual != actual and expected != expected:  # both are nan
        return True
    return math.isfinite(abs(expected)) and abs(actual - expected) <= tolerance * max(1.0, abs(expected))


def _missing_return(actual: Any) -> str | None:
    return "returned None: did you forget return?" if actual is None else None


def _gave(actual: Any, expected: Any) -> str:
    found, wanted = _short(actual), _short(expected)
    if found == wanted:  # they differ in what six digits hide
        found, wanted = _short(actual, digits=17), _short(expected, digits=17)
    return f"gave {found}, expected {wanted}"


def _short(value: Any, digits: int = 6, width: int = 160) -> str:
    """Return a value as a student would write it, on one line."""
    if _is_array(value):
        if math.prod(value.shape) > 8:
            return f"a tensor of shape {tuple(value.shape)}"
        value = value.tolist()
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, list | tuple) and value:
        inner = ", ".join(_short(item, digits) for item in value)
        text = f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    else:
        text = " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 10]} ... {text[-5:]}"


def _is_untouched_stub(error: Exception, checker: Callable) -> bool:
    """Tell `raise NotImplementedError` in the notebook from the same error out of a library or a missing kernel."""
    frame, instruction = None, 0
    for entry in _walk(error.__traceback__):
        frame, instruction = entry.tb_frame, entry.tb_lasti
    if not isinstance(error, NotImplementedError) or frame is None:
        return False
    by_statement = dis.opname[frame.f_code.co_code[instruction]] == "RAISE_VARARGS"
    missing_forward = frame.f_code.co_name == "_forward_unimplemented"  # an nn.Module without forward
    return missing_forward or (by_statement and frame.f_globals is checker.__globals__)


def _describe(error: Exception, checker: Callable) -> str:
    """Say which call raised what, and in which line of the student."""
    message = next(iter(str(error).strip().splitlines()), "")
    raised = f"raised {type(error).__name__}" + (f": {message}" if message else "")
    stack = [
        summary
        for entry, summary in zip(_walk(error.__traceback__), traceback.extract_tb(error.__traceback__), strict=True)
        if entry.tb_frame.f_globals is checker.__globals__  # the notebook's own frames, not those of libraries
    ]
    last_line = max(line for *_, line in checker.__code__.co_lines() if line)
    in_checker = [
        frame.filename == checker.__code__.co_filename and checker.__code__.co_firstlineno <= frame.lineno <= last_line
        for frame in stack
    ]
    if not any(in_checker):
        return f"The check {raised}"
    call = _source(stack[in_checker.index(True)]) or "Your code"
    if in_checker[-1]:  # the student's function returned, and its result was of no use
        hint = " (a result is None: did you forget return?)" if "NoneType" in message else ""
        return f"{call} {raised}{hint}"
    line = linecache.getline(stack[-1].filename, stack[-1].lineno).strip()
    return f"{call} {raised}" + (f", in your line: {line}" if line else "")


def _walk(entry: TracebackType | None) -> Iterator[TracebackType]:
    while entry:
        yield entry
        entry = entry.tb_next


def _source(frame: traceback.FrameSummary) -> str:
    """Return the expression that was being evaluated, or "" where the source is not at hand."""
    lines = [linecache.getline(frame.filename, number) for number in range(frame.lineno, frame.end_lineno + 1)]
    if not all(lines) or frame.colno is None:
        return ""
    lines = [line.encode() for line in lines]  # column numbers count bytes
    lines[-1] = lines[-1][: frame.end_colno]
    lines[0] = lines[0][frame.colno :]
    return " ".join(b" ".join(lines).decode().split())
