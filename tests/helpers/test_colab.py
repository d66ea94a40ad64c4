import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

from course.runner.keys import imported_files
from helpers import colab
from helpers.colab import (
    NEVER_MOVED,
    REPOSITORY,
    SETUP_CELL,
    TAG,
    badges,
    lesson_packages,
    on_colab,
    plan,
    prepare,
    read_requirements,
    replaced_while_loaded,
    set_up,
)
from helpers.errors import CourseError
from helpers.profiles import ROOT

REQUIREMENTS = read_requirements(ROOT / "requirements.txt")
RUNTIMES = json.loads((ROOT / "data" / "colab_packages.json").read_text())["runtimes"]


@pytest.fixture(params=RUNTIMES, ids=lambda runtime: runtime["date"])
def runtime(request):
    """What a published Colab runtime has installed: name -> version."""
    return {name.replace("_", "-"): number for name, number in request.param["packages"].items()}


@pytest.fixture
def no_colab(monkeypatch):
    for name in ("COLAB_RELEASE_TAG", "LLM_WORKBOOK_COLAB"):
        monkeypatch.delenv(name, raising=False)


# ---------------------------------------------------------------- requirements.txt and Colab


def test_every_requirement_is_met_by_what_colab_comes_with(runtime):
    for name, requirement in REQUIREMENTS.items():
        if name in runtime:
            assert requirement.specifier.contains(runtime[name]), f"Colab has {name} {runtime[name]}, not {requirement}"
    assert {"torch", "numpy", "transformers"} <= set(runtime) & set(REQUIREMENTS)


def test_the_exact_versions_of_the_tests_are_within_the_requirements():
    exact = read_requirements(ROOT / "constraints.txt")
    for name, requirement in REQUIREMENTS.items():
        assert requirement.specifier.contains(next(iter(exact[name].specifier)).version), f"{exact[name]}"


def test_lesson_packages_are_those_of_the_lessons_and_not_those_of_the_tests(tmp_path):
    packages = set(lesson_packages(ROOT / "requirements.txt"))
    assert {*NEVER_MOVED, "trl", "bitsandbytes", "bm25s"} <= packages
    assert packages.isdisjoint({"pytest", "papermill", "jupyterlab", "ruff"})
    path = tmp_path / "requirements.txt"
    path.write_text("wheel\n# the lessons\nnumpy>=2.0  # arrays\nScikit_Learn\n\n# the tests\npytest\n")
    assert lesson_packages(path) == ["numpy", "scikit-learn"]


def imported(source: str) -> set[str]:
    """First names of the modules that some Python code imports, anywhere in it; helpers with their module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "helpers":
            found |= {f"helpers.{name.name}" for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name if name.startswith("helpers.") else name.split(".")[0] for name in found}


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_package_that_a_lesson_imports_is_one_that_the_setup_sees_to(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    modules = set().union(*(imported(TransformerManager().transform_cell(cell.source)) for cell in cells))
    modules |= set().union(*(imported(file.read_text()) for file in imported_files(path)))
    provided = {*lesson_packages(ROOT / "requirements.txt"), *RUNTIMES[0]["packages"], "sklearn"}
    provided |= {"IPython", "matplotlib_inline", "cycler", "google"}  # come with these, or are Colab's own
    provided |= {"submitit"}  # for clusters, and only there
    provided |= {"networkx"}  # comes with torch
    provided |= {"outlines_core", "playwright"}  # lesson 15 compares itself with them where they are installed
    missing = (
        {name for name in modules if not name.startswith(("helpers", "recipes"))} - provided - sys.stdlib_module_names
    )
    assert missing == set()


def test_requirements_are_parsed_without_comments_under_canonical_names(tmp_path):
    path = tmp_path / "requirements.txt"
    path.write_text("# a comment\n\nHuggingface_Hub>=1.0,<2  # the hub\nnumpy>=2.0\n")
    assert {name: str(line.specifier) for name, line in read_requirements(path).items()} == {
        "huggingface-hub": "<2,>=1.0",
        "numpy": ">=2.0",
    }


# ---------------------------------------------------------------- the plan


def test_nothing_is_installed_where_everything_is_there():
    installed = {"torch": "2.10.0+cu128", "peft": "0.18.1", "torchao": "0.16.0"}
    todo = plan(["torch", "peft"], REQUIREMENTS, installed)
    assert (todo.install, todo.remove) == ((), ())


def test_on_colab_only_missing_packages_are_installed_and_the_old_torchao_goes(runtime):
    todo = plan(["torch", "peft", "trl", "bitsandbytes"], REQUIREMENTS, runtime)
    assert [Requirement(line).name for line in todo.install] == ["trl", "bitsandbytes"]
    assert todo.remove == ("torchao",)


def test_everything_else_that_colab_has_is_held_at_its_version(runtime):
    held = dict(line.split("==") for line in plan(["trl", "bitsandbytes"], REQUIREMENTS, runtime).constraints)
    assert all(held[name] == runtime[name] for name in NEVER_MOVED if name in runtime)
    assert set(runtime) - set(held) == {*colab.FREE_TO_MOVE, "torchao"} & set(runtime)
    assert colab.FREE_TO_MOVE.isdisjoint(NEVER_MOVED)


def test_a_package_too_old_for_the_course_may_be_replaced_by_name():
    todo = plan(["peft"], REQUIREMENTS, {"peft": "0.10.0", "numpy": "2.0.2"})
    assert todo.install == (str(REQUIREMENTS["peft"]),)
    assert todo.constraints == ("numpy==2.0.2",)


@pytest.mark.parametrize("name", NEVER_MOVED)
def test_a_runtime_too_old_for_the_course_is_left_as_it_is(name, runtime):
    old = runtime | {"pandas": "2.2.2", name: "1.0.0"}
    with pytest.raises(CourseError, match=f"^This runtime has {name} 1.0.0 and the course needs {name}[<>].*latest"):
        plan(lesson_packages(ROOT / "requirements.txt"), REQUIREMENTS, old)


def test_all_that_the_lessons_need_leaves_what_colab_has(runtime):
    todo = plan(lesson_packages(ROOT / "requirements.txt"), REQUIREMENTS, runtime)
    assert {Requirement(line).name for line in todo.install}.isdisjoint(runtime)
    assert {"trl", "bitsandbytes", "bm25s"} <= {Requirement(line).name for line in todo.install}


def test_packages_without_a_proper_version_are_left_out_of_the_constraints():
    todo = plan([], REQUIREMENTS, {"odd": "unknown", "none": None, "numpy": "2.0.2"})
    assert todo.constraints == ("numpy==2.0.2",)


def test_a_package_that_requirements_txt_does_not_know_is_named():
    with pytest.raises(CourseError, match=r"requirements\.txt has no line for goats: add one, or mend the name"):
        plan(["torch", "goats"], REQUIREMENTS, {})


def test_a_package_that_moved_under_a_running_session_is_noticed():
    before = {"pyarrow": "18.1.0", "datasets": "4.0.0", "torchao": "0.10.0", "typing-extensions": "4.15.0"}
    after = {"pyarrow": "24.0.0", "datasets": "4.8.0", "trl": "1.16.0", "typing-extensions": "4.16.0"}
    assert replaced_while_loaded(before, after, ["pyarrow", "torchao", "os"]) == ["pyarrow"]
    assert replaced_while_loaded(before, after, ["typing_extensions"]) == ["typing-extensions"]
    assert replaced_while_loaded(before, before, ["pyarrow"]) == []


def test_kaggle_is_told_by_its_own_variable_and_has_its_own_menus(monkeypatch, no_colab):
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")  # Kaggle's image has it too
    assert colab.on_colab() and not colab.on_kaggle()
    assert colab.how_to("restart").startswith("Runtime >")
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert colab.on_colab() and colab.on_kaggle()
    assert colab.how_to("restart").startswith("Run >") and "T4 x2" in colab.how_to("gpu")


# ---------------------------------------------------------------- the plan carried out by a real pip


def make_wheel(folder, name, number, *requires):
    """A package that holds nothing but its version."""
    info = f"{name}-{number}.dist-info"
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", f"__version__ = '{number}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture(scope="module")
def runtime_python(tmp_path_factory):
    """A Python with Colab's versions of a few packages (empty ones), and an index that offers newer ones of all."""
    folder = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip())
    for name in ("pip", "packaging"):
        for part in (name, f"{name}-{version(name)}.dist-info"):
            shutil.copytree(Path(sysconfig.get_path("purelib")) / part, site / part)

    colabs, index = folder / "colab", folder / "index"
    for place in (colabs, index):
        place.mkdir()
    have = RUNTIMES[0]["packages"]
    for name in ("torch", "numpy", "transformers", "datasets", "pyarrow", "torchao"):
        make_wheel(colabs, name, have[name])
        make_wheel(index, name, have[name])
    make_wheel(index, "numpy", "2.4.0")
    make_wheel(index, "torch", "2.13.0")
    make_wheel(index, "transformers", "5.23.0", "torch>=2.13")
    make_wheel(index, "pyarrow", "24.0.0")
    make_wheel(index, "datasets", "4.8.0", "pyarrow>=21", "numpy")
    make_wheel(index, "trl", "1.16.0", "datasets>=4.7", "transformers>=4.56", "numpy", "torch")
    environment = {
        "PATH": os.environ["PATH"],
        "LLM_WORKBOOK_COLAB": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", *sorted(colabs.iterdir())]
    subprocess.run(command, env=environment, check=True)

    def run(code, **more):
        command = [python, "-c", f"from helpers.colab import *\nfrom helpers.errors import exit_cleanly\n{code}"]
        return subprocess.run(
            command, cwd=ROOT, env=environment | more, capture_output=True, text=True, timeout=400, check=False
        )

    return run


def test_prepare_installs_what_is_missing_holds_the_rest_and_asks_for_a_restart(runtime_python):
    show = (
        "from helpers.colab import _installed; have = _installed(); have.pop('pip'); have.pop('packaging'); print(have)"
    )
    failed = runtime_python("exit_cleanly(lambda: prepare('trl'))", PIP_FIND_LINKS="/nowhere")
    assert failed.returncode == 2
    assert re.fullmatch(r"error: pip could not do its part \(.*trl.*\): check the network, or .*\n", failed.stderr)

    first = runtime_python("import pyarrow, numpy\nexit_cleanly(lambda: prepare('trl'))")
    assert first.returncode == 2
    assert first.stdout.startswith("Installing trl<2,>=1.0; this takes up to a minute")
    assert first.stderr.startswith("error: The session still runs the old pyarrow: choose Runtime > Restart session")
    have = RUNTIMES[0]["packages"]
    expected = {name: have[name] for name in ("torch", "numpy", "transformers")}
    expected |= {"trl": "1.16.0", "datasets": "4.8.0", "pyarrow": "24.0.0"}
    assert eval(runtime_python(show).stdout) == expected

    second = runtime_python("import pyarrow, numpy\nexit_cleanly(lambda: prepare('trl'))")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_elsewhere_nothing_happens(no_colab, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    prepare("no-such-package")


def test_elsewhere_the_setup_does_nothing(no_colab, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    set_up()
    assert capsys.readouterr() == ("", "")


def test_in_colab_the_setup_says_versions_and_profile(no_colab, monkeypatch, capsys):
    monkeypatch.setenv("LLM_WORKBOOK_COLAB", "1")
    monkeypatch.setenv("LLM_WORKBOOK_PROFILE", "cpu")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("everything is here, and pip was started"))
    set_up()
    versions, profile = capsys.readouterr().out.splitlines()
    assert versions.startswith(f"Python {sys.version.split()[0]}, torch {version('torch')}, numpy {version('numpy')}, ")
    assert profile == "profile cpu: shima-4m in float32 on the CPU"


def test_colab_is_recognised_and_may_be_overridden(no_colab, monkeypatch):
    assert not on_colab()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260801")
    assert on_colab()
    monkeypatch.setenv("LLM_WORKBOOK_COLAB", "0")
    assert not on_colab()
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    monkeypatch.setenv("LLM_WORKBOOK_COLAB", "1")
    assert on_colab()


# ---------------------------------------------------------------- the badge and the setup cell


def test_the_badges_open_the_notebook_of_the_release_in_colab_and_kaggle():
    path = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/{TAG}/notebooks/03_pretraining.ipynb"
    assert badges("03_pretraining") == (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{path}) "
        "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        f"(https://kaggle.com/kernels/welcome?src=https://github.com/{path})"
    )


def test_the_address_and_the_tag_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["repository"] == REPOSITORY
    assert f"v{project['version']}" == TAG
    assert SETUP_CELL.count(REPOSITORY) == SETUP_CELL.count(f'"{TAG}"') == 1


def run_setup_cell(folder, address=REPOSITORY, **environment):
    """Run the cell as the first one of a notebook in `folder`, twice, and say where the course was found.

    It fetches, and installs nothing: tests/helpers/test_colab_runtime.py does that, in an environment of its own.
    """
    cell = SETUP_CELL.replace(REPOSITORY, address)
    code = f"{cell}\n{cell}\nimport helpers.profiles\nprint(ROOT, helpers.profiles.ROOT, sys.path.count(str(ROOT)))"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "LLM_WORKBOOK_COLAB": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def repository(tmp_path):
    """A repository of its own with what the setup cell looks for, under the tag; later commits are broken."""
    folder = tmp_path / "origin"
    shutil.copytree(ROOT / "helpers", folder / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"], ["tag", TAG]):
        subprocess.run([*git, *arguments], check=True)
    (folder / "helpers" / "profiles.py").write_text("raise SystemExit('this is what came after the release')")
    subprocess.run([*git, "commit", "--quiet", "--all", "--message", "more"], check=True)
    return f"file://{folder}"


@pytest.mark.parametrize("place", [".", "notebooks"])
def test_the_setup_cell_finds_the_course_from_its_folder_and_from_that_of_the_notebooks(place):
    result = run_setup_cell(ROOT / place)
    assert result.stdout.split() == [str(ROOT), str(ROOT), "1"], result.stderr


def test_the_setup_cell_fetches_the_course_in_colab_once(tmp_path, repository):
    content = tmp_path / "content"
    content.mkdir()
    clone = content / "llm-workbook"
    for address in (repository, "file:///nowhere"):  # the second session finds what the first has fetched
        result = run_setup_cell(content, address, COLAB_RELEASE_TAG="release-colab_20260801")
        assert result.stdout.split() == [str(clone), str(clone), "1"], result.stderr
        assert result.stderr == ""


def test_the_setup_cell_names_a_tag_that_is_missing(tmp_path, repository):
    subprocess.run(["git", "-C", repository.removeprefix("file://"), "tag", "--delete", TAG], check=True)
    result = run_setup_cell(tmp_path, repository, COLAB_RELEASE_TAG="release-colab_20260801")
    assert result.returncode == 1 and f"Remote branch {TAG} not found" in result.stderr
    assert result.stderr.splitlines()[-1].endswith("in Colab, git says why above.")


def test_the_setup_cell_fetches_nothing_outside_of_colab(tmp_path, repository):
    result = run_setup_cell(tmp_path, repository)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("FileNotFoundError: The course's files are not here: start")
    assert not (tmp_path / "llm-workbook").exists()


def test_the_setup_cell_says_what_to_do_where_colab_cannot_fetch_the_course(tmp_path):
    result = run_setup_cell(tmp_path, "file:///nowhere", COLAB_RELEASE_TAG="release-colab_20260801")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("in Colab, git says why above.")
    assert not (tmp_path / "llm-workbook").exists()
