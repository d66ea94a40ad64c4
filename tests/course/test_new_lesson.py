"""A new lesson runs, keeps every convention and comes with a test that passes; bad names are refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course import notebooks
from course.__main__ import main
from course.claims.collect import claims_of
from course.new_lesson import lesson_notebook, write_lesson
from course.runner import run
from course.twins import pending
from helpers.errors import CourseError
from helpers.profiles import ROOT
from tests.support import notebook_structure as structure

NAME = "98_trial_lesson"


def empty_course(root: Path) -> Path:
    """Make a folder like the course's, without lessons."""
    (root / "helpers").symlink_to(ROOT / "helpers")
    for folder in ("notebooks", "tests/lessons"):
        (root / folder).mkdir(parents=True)
    return root


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Notebook and test of a new lesson in a folder like the course's, after `refresh`."""
    root = empty_course(tmp_path_factory.mktemp("course"))
    notebook, _, test = write_lesson(NAME, root)
    (row,) = run([notebook], root / "build", refresh=True)
    assert row.status == "ok", row.error
    return notebook, test


@pytest.mark.slow
@pytest.mark.parametrize("check", structure.CHECKS, ids=lambda check: check.__name__)
def test_a_new_lesson_keeps_the_convention(written: tuple[Path, Path], check: structure.Check) -> None:
    assert list(check(structure.read(written[0]), NAME)) == []


@pytest.mark.slow
def test_a_new_lesson_is_in_line_with_its_twin(written: tuple[Path, Path]) -> None:
    assert pending(written[0]) is None


@pytest.mark.slow
def test_a_new_lesson_measures_and_its_claims_hold(written: tuple[Path, Path]) -> None:
    outputs = [output for _, output in structure.outputs(structure.read(written[0]))]
    said = "".join(map(notebooks.output_text, outputs))
    assert said.count("holds: ") == 3 and "DOES NOT" not in said
    assert said.count("not attempted yet") == 3
    assert [claim["kind"] for claim in claims_of(written[0])] == ["identity", "report", "effect"]


@pytest.mark.slow
def test_the_test_of_a_new_lesson_passes(written: tuple[Path, Path]) -> None:
    notebook, test = written
    source = test.read_text(encoding="utf-8")
    test.write_text(source.replace(f'ROOT / "notebooks" / "{NAME}.ipynb"', f'Path("{notebook}")'), encoding="utf-8")
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", *options, str(test)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "5 passed" in result.stdout, result.stdout + result.stderr


def test_a_new_lesson_is_formatted_and_free_of_lint(tmp_path: Path) -> None:
    root = empty_course(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(ROOT / "tests" / "support", root / "tests" / "support")  # ruff sorts imports by what is there
    write_lesson(NAME, root)
    notebook, test = f"notebooks/{NAME}.ipynb", "tests/lessons"
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", notebook, test]
        result = subprocess.run(ruff, cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    "name", ["topic", "1_topic", "11-topic", "11_Topic", "11_", "18_topic.ipynb", "../18_topic", ""]
)
def test_a_bad_name_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"^'.*' is no name for a lesson: .*18_topic\.$"):
        write_lesson(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    root = empty_course(tmp_path)
    notebook, source, test = write_lesson("18_topic", root)
    notebook.write_text("mine")
    test.write_text("mine")
    for name in ("18_topic", "18_other"):
        with pytest.raises(CourseError, match=r"^18_topic\.ipynb is there already: "):
            write_lesson(name, root)
    notebook.unlink()
    with pytest.raises(CourseError, match=r"^18_topic\.py is there already: "):
        write_lesson("18_other", root)
    source.unlink()
    with pytest.raises(CourseError, match=r"^test_lesson_18\.py is there already: "):
        write_lesson("18_other", root)
    assert test.read_text() == "mine" and list(notebook.parent.iterdir()) == [source.parent]


def test_the_command_refuses_a_number_that_a_lesson_of_the_course_has() -> None:
    with pytest.raises(CourseError, match=r"^05_\w+\.ipynb is there already: "):
        main(["new-lesson", "05_again"])


def test_every_lesson_number_has_its_own_title_and_exercises() -> None:
    notebook = lesson_notebook("01_a_b")
    assert notebook.cells[0].source.startswith("# 01 · A b: ")
    assert notebook.metadata.workbook == {"lesson": "01", "title": "A b", "prerequisites": []}
    assert any('check("1.3"' in cell.source for cell in notebook.cells)
