"""Progress: what the checks of a notebook keep, what the command says about it, and the certificate."""

import json

import pytest

from course.__main__ import main
from course.notebooks import select_notebooks
from course.progress import certificate, exercises
from helpers import exercises as checks
from helpers.errors import CourseError


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file in which checks keep their results, as in a notebook."""
    path = tmp_path / "build" / "progress.json"
    monkeypatch.setattr(checks, "PROGRESS", path)
    monkeypatch.setattr(checks, "get_ipython", object)
    return path


def attempt(number, value):
    checks.check(number, lambda found: checks.expect_equal("f()", found, 1), value)


def test_attempts_are_kept_and_what_was_correct_once_stays_so(kept):
    attempt("3.1", 1)
    attempt("3.1", 2)
    attempt("3.2", 2)
    progress = checks.read_progress(kept)
    assert {number: entry["status"] for number, entry in progress.items()} == {"3.1": "correct", "3.2": "not yet"}


def test_nothing_is_kept_outside_of_a_notebook_and_of_a_stub(kept, monkeypatch):
    def stub():
        raise NotImplementedError

    checks.check("3.1", lambda f: f(), stub)
    monkeypatch.setattr(checks, "get_ipython", lambda: None)
    attempt("3.1", 1)
    assert not kept.exists()


def test_a_damaged_file_is_named_and_left_alone_and_the_check_still_answers(kept, capsys):
    kept.parent.mkdir()
    for text in ("{", "[]", '{"3.1": "correct"}'):
        kept.write_text(text)
        with pytest.raises(CourseError, match=r"progress\.json is damaged"):
            checks.read_progress(kept)
        attempt("3.1", 1)
        assert "3.1: correct" in capsys.readouterr().out and kept.read_text() == text


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(kept, capsys):
    kept.parent.write_text("a file where the folder should be")
    attempt("3.1", 1)
    assert "3.1: correct" in capsys.readouterr().out


def test_the_command_names_what_is_open_and_writes_a_page(tmp_path, monkeypatch, capsys):
    path = tmp_path / "progress.json"
    path.write_text(json.dumps({"3.1": {"status": "correct", "day": "2026-11-27"}}))
    monkeypatch.setattr("course.progress.PROGRESS", path)
    monkeypatch.setattr("course.progress.read_progress", lambda: checks.read_progress(path))
    main(["progress", "--certificate", "Ada <3"])
    said = capsys.readouterr().out
    assert "1 of 6, open: 3.2" in said and "wrote build/certificate.html" in said
    page = (tmp_path / "certificate.html").read_text()
    assert "Ada &lt;3" in page and "1 of 6" in page and "2026-11-27" in page


def test_without_a_solved_exercise_there_is_no_certificate():
    with pytest.raises(CourseError, match="No exercise is solved yet"):
        certificate("Ada", exercises(select_notebooks()), {"3.1": {"status": "not yet", "day": "2026-11-27"}})
