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
from course.links import relink
from course.notebooks import read_notebook, select_notebooks, tags
from course.twins import bring_in_line, pending, twin
from helpers.colab import REPOSITORY, TAG
from helpers.errors import CourseError
from helpers.profiles import ROOT

HERE = REPOSITORY.removeprefix("https://github.com/")
OTHER = "ada-l/LLM_course.2"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The course without its models in a folder of its own, with its first and last notebooks and their twins."""
    folder = tmp_path_factory.mktemp("links") / "original"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("build", "runs", "*.safetensors", ".*", "__pycache__"))
    for path in select_notebooks(folder / "notebooks")[1:-1]:
        path.unlink()
        twin(path).unlink(missing_ok=True)
    for path in select_notebooks(folder / "notebooks"):
        bring_in_line(path, "notebook")
    return folder


@pytest.fixture(scope="module")
def moved(original: Path) -> Path:
    """A copy of it that says it is published elsewhere."""
    folder = original.with_name("moved")
    shutil.copytree(original, folder)
    result = links(folder, OTHER, "--version", "12.3.4")
    assert result.returncode == 0, result.stderr
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


@pytest.mark.slow
def test_every_place_of_the_course_says_what_the_constants_say(original):
    before = files(original)
    assert links(original).stdout == f"{HERE} at {TAG}: 0 files changed.\n" and files(original) == before


@pytest.mark.slow
def test_there_and_back_is_byte_for_byte_the_same(original, moved, tmp_path):
    before, there = files(original), files(moved)
    assert there.keys() == before.keys()
    for name, content in there.items():
        if not name.startswith("tests/"):
            assert REPOSITORY.encode() not in content and f"github/{HERE}".encode() not in content, name
    back = tmp_path / "back"
    shutil.copytree(moved, back)
    assert links(back, HERE, "--version", TAG.removeprefix("v")).returncode == 0
    assert files(back) == before


@pytest.mark.slow
def test_only_badges_addresses_and_the_setup_cell_change(original, moved):
    for path in select_notebooks(original / "notebooks"):
        old, new = read_notebook(path), read_notebook(moved / "notebooks" / path.name)
        for was, cell in zip(old.cells, new.cells, strict=True):
            if "setup" in tags(was):
                assert cell.source.count(f'"v12.3.4", "https://github.com/{OTHER}"') == 1
            else:
                back = cell.source.replace(OTHER, HERE).replace("/blob/v12.3.4/", "/blob/X/")
                assert back == re.sub(r"(?<=/blob/)[\w.]+(?=/notebooks/)", "X", was.source)
            was.source = cell.source
        assert f"github/{OTHER}/blob/v12.3.4/notebooks/{path.name}" in new.cells[0].source
        for name in ("source_hash", "twin"):
            old.metadata.workbook[name] = new.metadata.workbook[name]
        assert new == old
    project = tomllib.loads((moved / "pyproject.toml").read_text())["project"]
    assert project["version"] == "12.3.4" and project["urls"]["repository"] == f"https://github.com/{OTHER}"


CONVENTIONS = """
from helpers.colab import badges
from course.notebooks import select_notebooks
from course.twins import pending
from helpers.profiles import ROOT
from tests.support import notebook_structure as structure

for path in select_notebooks():
    for check in structure.CHECKS:
        for problem in check(structure.read(path), path.stem):
            print(path.stem, check.__name__, problem)
    if badges(path.stem) not in (ROOT / "README.md").read_text():
        print(f"{path.stem}: README.md lacks its badges")
    print(pending(path))
"""


@pytest.mark.slow
def test_the_notebooks_keep_and_break_the_same_conventions_as_before_and_are_in_line_with_their_twins(original, moved):
    before, after = (
        subprocess.run([sys.executable, "-c", CONVENTIONS], cwd=folder, capture_output=True, text=True, check=True)
        for folder in (original, moved)
    )
    assert after.stdout == before.stdout and after.stdout.count("None\n") == 2


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """The original, to be changed in this process."""
    shutil.copytree(original, tmp_path / "copy")
    return tmp_path / "copy"


def test_outputs_that_were_stale_remain_stale(copy):
    path = select_notebooks(copy / "notebooks")[0]
    notebook = read_notebook(path)
    notebook.cells[-1].source += " More."
    nbformat.write(notebook, path)
    relink(copy, OTHER, TAG)
    assert read_notebook(path).metadata.workbook.source_hash == notebook.metadata.workbook.source_hash


@pytest.mark.parametrize("edited", ["notebook", "source"])
def test_which_of_notebook_and_twin_was_edited_stays_known(copy, edited):
    path = select_notebooks(copy / "notebooks")[0]
    side = path if edited == "notebook" else twin(path)
    side.write_text(side.read_text(encoding="utf-8").replace("## What we saw", "## What we have seen"))
    relink(copy, OTHER, TAG)
    assert pending(path) == edited
    assert OTHER in path.read_text(encoding="utf-8") and OTHER in twin(path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["course", "a/b/c", "-a/b", "a--b/c", "a/..", "a/b c", "a/b.git", "https://x.org/a/b", "a/b'"]
)
def test_what_is_no_repository_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr("course.links.relink", lambda *_: pytest.fail("files were about to change"))
    with pytest.raises(
        CourseError, match=f"^{re.escape(repr(name))} is no GitHub repository: give owner/name, such as"
    ):
        main(["links", "--", name])


def test_what_is_no_version_is_one_sentence(monkeypatch):
    monkeypatch.setattr("course.links.relink", lambda *_: pytest.fail("files were about to change"))
    with pytest.raises(CourseError, match=r"^'v1' is no version: give three numbers, such as 1\.0\.0\.$"):
        main(["links", OTHER, "--version", "v1"])


def test_a_damaged_notebook_is_named_and_nothing_is_changed(copy):
    path = select_notebooks(copy / "notebooks")[-1]
    path.write_text("{")
    before = files(copy)
    with pytest.raises(CourseError, match=f"{path.name} is not a readable notebook"):
        relink(copy, OTHER, TAG)
    assert files(copy) == before
