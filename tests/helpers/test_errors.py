import re
import subprocess
import sys

import pytest
from IPython.core.interactiveshell import InteractiveShell

from helpers.errors import CourseError, exit_cleanly
from helpers.profiles import ROOT


def status_of(main):
    with pytest.raises(SystemExit) as caught:
        exit_cleanly(main)
    return caught.value.code


def fail(error):
    raise error


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1), (3, 3)])
def test_a_command_ends_with_the_status_that_its_main_returns(returned, status, capsys):
    assert status_of(lambda: returned) == status
    assert capsys.readouterr() == ("", "")


def test_a_course_error_is_one_sentence_on_standard_error_and_status_2(capsys):
    assert status_of(lambda: fail(CourseError("There is no goat: buy one."))) == 2
    assert capsys.readouterr() == ("", "error: There is no goat: buy one.\n")


def test_an_interrupt_is_status_130(capsys):
    assert status_of(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_an_error_in_the_code_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        exit_cleanly(lambda: 1 // 0)


def test_a_process_ends_with_these_statuses():
    code = "from helpers.errors import *; exit_cleanly(lambda: (_ for _ in ()).throw(CourseError('No goat: buy one.')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "error: No goat: buy one.\n")


@pytest.fixture
def shell():
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_a_notebook_shows_the_sentence_of_a_course_error_and_no_stack_trace(shell, capsys):
    shell.run_cell("from helpers.errors import CourseError\ndef load():\n    raise CourseError('No goat: buy one.')")
    result = shell.run_cell("load()")
    shown = capsys.readouterr()
    assert isinstance(result.error_in_exec, CourseError)
    assert (shown.out + shown.err).strip() == "CourseError: No goat: buy one."


def test_other_errors_keep_their_stack_trace_in_a_notebook(shell, capsys):
    shell.run_cell("def load():\n    return 1 // 0\nload()")
    assert "return 1 // 0" in re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # without its colours
