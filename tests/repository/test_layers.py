"""The contracts of import-linter in pyproject.toml: the repository keeps them, and they find an upward import."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.profiles import ROOT

ROOMS = ("helpers", "recipes", "course", "tests")


def lint(folder: Path) -> subprocess.CompletedProcess:
    """Check the contracts over the rooms in the folder."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the rooms and their contracts, to plant imports into."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_repository_keeps_its_contracts() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "module", "contract"),
    [
        ("helpers/data.py", "course.notebooks", "Helpers import only helpers"),
        ("recipes/assistant.py", "course.runner", "Recipes import only helpers"),
        ("course/links.py", "recipes.assistant", "The course imports no recipe"),
        ("helpers/errors.py", "helpers.plots", "A helper imports only those below it"),
        ("course/runner/keys.py", "course.student", "Commands stand above the runner"),
    ],
)
def test_a_planted_import_is_found_and_named(copy: Path, file: str, module: str, contract: str) -> None:
    path = copy / file
    path.write_text(f"{path.read_text()}\n\ndef planted():\n    import {module}\n")  # also within a function
    result = lint(copy)
    assert result.returncode == 1
    broken = [line for line in result.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith(contract) for line in broken), result.stdout
    assert f"{file.removesuffix('.py').replace('/', '.')} -> {module}" in result.stdout


def test_two_modules_that_import_each_other_are_found(copy: Path) -> None:
    path = copy / "helpers" / "world" / "words.py"
    path.write_text(f"{path.read_text()}\nfrom helpers.world import world\n")
    result = lint(copy)
    assert result.returncode == 1 and ".words -> .world (1 import)" in result.stdout


def test_a_new_helper_needs_a_place_in_the_layers(copy: Path) -> None:
    (copy / "helpers" / "misplaced.py").write_text('"""Belongs nowhere yet."""\n')
    result = lint(copy)
    assert result.returncode == 1 and "misplaced" in result.stdout
