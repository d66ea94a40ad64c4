"""One command says where the course is published, in every place, and changes nothing else."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from course.__main__ import main
from course.notebooks import tags
from helpers.colab import REPOSITORY, TAG
from helpers.errors import CourseError
from helpers.profiles import ROOT

HERE = REPOSITORY.removeprefix("https://github.com/")
OTHER = "ada-l/LLM_course.2"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The course without its data in a folder of its own, with its first and last notebooks."""
    folder = tmp_path / "copy"
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("build", "runs", "data", ".*", "__pycache__"))
    for path in notebooks[1:-1]:
        (folder / "notebooks" / path.name).unlink()
    return folder


def links(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "course", "links", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_there_and_back_is_byte_for_byte_the_same_and_a_second_time_changes_nothing(copy):
    assert links(copy).returncode == 0  # the constants, in every place
    before = files(copy)
    again = links(copy)
    assert again.stdout == f"{HERE} at {TAG}: 0 files changed.\n" and files(copy) == before

    there = links(copy, OTHER, "--version", "12.3.4")
    assert there.returncode == 0, there.stderr
    moved = files(copy)
    assert moved.keys() == before.keys()
    for name, content in moved.items():
        if not name.startswith("tests/"):
            assert REPOSITORY.encode() not in content and f"github/{HERE}".encode() not in content, name
    assert links(copy, OTHER, "--version", "12.3.4").stdout.endswith(": 0 files changed.\n") and files(copy) == moved

    assert links(copy, HERE, "--version", TAG.removeprefix("v")).returncode == 0
    assert files(copy) == before


def test_only_badges_addresses_and_the_setup_cell_change(copy):
    before = {path.name: nbformat.read(path, as_version=4) for path in (copy / "notebooks").glob("*.ipynb")}
    links(copy, OTHER, "--version", "12.3.4")
    for name, old in before.items():
        new = nbformat.read(copy / "notebooks" / name, as_version=4)
        for was, cell in zip(old.cells, new.cells, strict=True):
            if "setup" in tags(was):
                assert cell.source.count(f'"v12.3.4", "https://github.com/{OTHER}"') == 1
            else:
                back = cell.source.replace(OTHER, HERE).replace("/blob/v12.3.4/", "/blob/X/")
                assert back == re.sub(r"(?<=/blob/)[\w.]+(?=/notebooks/)", "X", was.source)
            was.source = cell.source
        assert f"github/{OTHER}/blob/v12.3.4/notebooks/{name}" in new.cells[0].source
        old.metadata.workbook.source_hash = new.metadata.workbook.source_hash
        assert new == old
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert project["version"] == "12.3.4" and project["urls"]["repository"] == f"https://github.com/{OTHER}"


CONVENTIONS = """
from helpers.colab import badge
from course.notebooks import select_notebooks
from helpers.profiles import ROOT
from tests.support import notebook_structure as structure

for path in select_notebooks():
    for check in structure.CHECKS:
        print(*(f"{path.stem}: {problem}" for problem in check(structure.read(path), path.stem)), sep="\\n", end="")
    if badge(path.stem) not in (ROOT / "README.md").read_text():
        print(f"{path.stem}: README.md lacks its badge")
print("looked at", len(select_notebooks()))
"""


def test_the_conventions_of_notebooks_hold_afterwards_and_the_readme_has_the_new_badges(copy):
    links(copy, OTHER, "--version", "12.3.4")
    result = subprocess.run(
        [sys.executable, "-c", CONVENTIONS], cwd=copy, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout == "looked at 2\n", result.stderr


def test_outputs_that_were_stale_remain_stale(copy):
    path = next((copy / "notebooks").glob("*.ipynb"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source += " More."
    nbformat.write(notebook, path)
    stale = notebook.metadata.workbook.source_hash
    links(copy, OTHER)
    assert nbformat.read(path, as_version=4).metadata.workbook.source_hash == stale


@pytest.mark.parametrize(
    "name", ["course", "a/b/c", "-a/b", "a--b/c", "a/..", "a/b c", "a/b.git", "https://x.org/a/b", "a/b'"]
)
def test_what_is_no_repository_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr("course.links.relink", lambda *_: pytest.fail("files were about to change"))
    with pytest.raises(
        CourseError, match=f"^{re.escape(repr(name))} is no GitHub repository: give owner/name, such as"
    ):
        main(["links", "--", name])


def test_what_is_no_version_is_one_sentence_and_changes_nothing(copy):
    before = files(copy)
    result = links(copy, OTHER, "--version", "v1")
    assert result.returncode == 2
    assert result.stderr == "error: 'v1' is no version: give three numbers, such as 1.0.0.\n"
    assert files(copy) == before


def test_a_damaged_notebook_is_named_and_nothing_is_changed(copy):
    path = max((copy / "notebooks").glob("*.ipynb"))
    path.write_text("{")
    before = files(copy)
    result = links(copy, OTHER)
    assert result.returncode == 2 and f"{path.name} is not a readable notebook" in result.stderr
    assert files(copy) == before
