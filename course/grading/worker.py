"""Runs a lesson with a student's exercises inside the sandbox, and tells the grader what their checks say.

The grader sends one request a line and waits for its answer. It sends a check only after the student's cell has run,
so that there is nothing to read before. Student and checks share one interpreter, as in a notebook. So this guards
against what is simple: printed verdicts, replaced checks, replaced functions of the libraries that checks use, results
that call themselves equal to anything. It cannot guard against code that searches the interpreter for this module.
"""

import builtins
import importlib.util
import json
import math
import os
import random
import signal
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

import helpers
from helpers import exercises

EXERCISES_SPEC = importlib.util.find_spec("helpers.exercises")
EXERCISES_CODE = EXERCISES_SPEC.loader.get_code("helpers.exercises")
HEAP_TYPE = 1 << 9  # flag of a class that was made by Python code (or by a library that makes them so)
LONGEST = 2000  # characters of a message


class TookTooLong(BaseException):
    """The time of a cell is over. No Exception, so that `except Exception` does not catch it."""


class Worker:
    """One lesson with the names that its cells have made so far."""

    def __init__(self) -> None:
        """Start an IPython shell without a history."""
        config = Config()
        config.HistoryManager.enabled = False
        self.shell = InteractiveShell.instance(config=config)
        self.names: dict[str, Any] = self.shell.user_ns
        self.own = os.getpid()
        self.lesson = _public(self.names)  # what the lesson's own cells have defined
        self.guarded: list[tuple[Any, dict[str, Any]]] = []

    def run(self, source: str, seconds: int) -> str:
        """Run a cell; return what it raised, "" for nothing."""
        signal.signal(signal.SIGALRM, _interrupt)
        signal.alarm(seconds)
        try:
            outcome = self.shell.run_cell(source, silent=True)
            error = outcome.error_before_exec or outcome.error_in_exec
        except BaseException as failure:  # also what comes late
            error = failure
        finally:
            signal.alarm(0)
            if os.getpid() != self.own:  # a child that the cell has forked
                os._exit(0)
        if isinstance(error, TookTooLong):
            return f"took more than {seconds} s"
        return f"raised {type(error).__name__}: {_text(error)}"[:LONGEST] if error else ""

    def context(self, source: str, seconds: int) -> dict[str, Any]:
        """Run a cell of the lesson."""
        before = dict(self.names)
        error = self.run(source, seconds)
        self.lesson = {
            name: value
            for name, value in _public(self.names).items()
            if name in self.lesson or before.get(name, self) is not value
        }
        return {"error": error}

    def attempt(self, source: str, names: list[str], seconds: int) -> dict[str, Any]:
        """Run a student's cell, which should define `names`; put back what else it replaced of the lesson."""
        for name in names:
            self.names.pop(name, None)
            self.lesson.pop(name, None)
        self.guarded = [(owner, dict(vars(owner))) for owner in _owners()]
        error = self.run(source, seconds)
        missing = [name for name in names if name not in self.names]
        replaced = [name for name, value in self.lesson.items() if self.names.get(name, self) is not value]
        self.names.update(self.lesson)
        return {"error": error, "missing": missing, "replaced": replaced + self._put_back()}

    def check(self, source: str, seconds: int) -> dict[str, Any]:
        """Run a check cell with a fresh copy of the functions that it calls; return what it found."""
        private, results = self._fresh_exercises()
        mine = {name: value for name, value in vars(private).items() if name == "check" or name.startswith("expect_")}
        self.names.update(mine)
        error = self.run(source, seconds)
        replaced = [name for name, value in mine.items() if self.names.get(name) is not value] + self._put_back()
        self.names.update(self.lesson)
        if replaced:
            return {"status": "error", "message": f"replaced {', '.join(replaced)} while it was being checked"}
        if error or len(results) != 1:
            return {"status": "error", "message": error or f"its check gave {len(results)} results"}
        return {"status": results[0].status, "message": results[0].message[:LONGEST]}

    def _fresh_exercises(self) -> tuple[ModuleType, list[exercises.CheckResult]]:
        """A new module `helpers.exercises` in the place of the old one, and the list that its results go to."""
        private, results = importlib.util.module_from_spec(EXERCISES_SPEC), []
        sys.modules["helpers.exercises"] = helpers.exercises = private
        exec(EXERCISES_CODE, vars(private))
        difference, check = private._difference, private.check

        def strict_difference(actual: Any, expected: Any, tolerance: float) -> str | None:
            if type(actual) is not type(expected) and self._has_own_class(actual):
                return f"gave an object of the class {type(actual).__name__}, expected {private._short(expected)}"
            return difference(actual, expected, tolerance)

        def recorded_check(*arguments: Any) -> exercises.CheckResult:
            results.append(check(*arguments))
            return results[-1]

        private._difference, private.check = strict_difference, recorded_check
        return private, results

    def _has_own_class(self, value: Any) -> bool:
        """Whether the class of the value is the student's, whose == may say anything."""
        kind = type(value)
        if not kind.__flags__ & HEAP_TYPE:
            return False
        home = sys.modules.get(kind.__module__)
        if home is None or home is self.shell.user_module:
            return self.lesson.get(kind.__qualname__) is not kind
        found: Any = home
        for part in kind.__qualname__.split("."):
            found = getattr(found, part, None)
        return found is not kind

    def _put_back(self) -> list[str]:
        """Undo replacements of functions and classes in the guarded modules; return their names."""
        replaced = []
        for owner, before in self.guarded:
            now = vars(owner)
            for name, value in before.items():
                # torch itself exchanges torch.Storage when the default number format changes.
                if callable(value) and now.get(name) is not value and name != "Storage":
                    setattr(owner, name, value)
                    replaced.append(f"{owner.__name__}.{name}")
        return replaced


def _public(names: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.items() if not name.startswith("_")}


def _owners() -> Iterable[Any]:
    """What checks rely on and anybody can change."""
    course = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("helpers.") and name != "helpers.exercises" and isinstance(module, ModuleType)
    ]
    return [builtins, math, random, np, torch, torch.nn.functional, torch.linalg, torch.Tensor, *course]


def _interrupt(*_: object) -> None:
    raise TookTooLong


def _text(error: BaseException) -> str:
    """The message of an error, whose class may be the student's."""
    try:
        return str(error).strip().partition("\n")[0]
    except BaseException:
        return "an error that has no text"


def main() -> None:
    """Answer requests from standard input on standard output, which the cells do not see."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    worker, token = Worker(), json.loads(requests.readline())["token"]
    actions = {"context": worker.context, "attempt": worker.attempt, "check": worker.check}
    while line := requests.readline():
        request = json.loads(line)
        answer = actions[request.pop("do")](**request)
        line = memoryview(json.dumps({"token": token, **answer}).encode() + b"\n")
        while line:
            line = line[os.write(answers, line) :]


if __name__ == "__main__":
    main()
