import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers import colab
from helpers.colab import (
    REPOSITORY,
    SETUP_CELL,
    badge,
    on_colab,
    plan,
    prepare,
    read_requirements,
    replaced_while_loaded,
)
from helpers.errors import CourseError
from helpers.profiles import ROOT

REQUIREMENTS = read_requirements(ROOT / "requirements.txt")
RUNTIMES = json.loads((ROOT / "data" / "colab_packages.json").read_text())["runtimes"]
NEVER_MOVED = ("torch", "numpy", "pandas", "transformers")


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


def test_a_badge_opens_the_notebook_of_this_repository_in_colab():
    assert badge("03_pretraining") == (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/main/notebooks/03_pretraining.ipynb)"
    )


def test_the_address_of_the_repository_is_that_of_the_project():
    assert f'repository = "{REPOSITORY}"' in (ROOT / "pyproject.toml").read_text()
    assert SETUP_CELL.count(REPOSITORY) == 1


def run_setup_cell(folder, address=REPOSITORY, **environment):
    """Run the cell as the first one of a notebook in `folder`, twice, and say where the course was found."""
    cell = SETUP_CELL.replace(REPOSITORY, address)
    code = f"{cell}\n{cell}\nimport helpers.profiles\nprint(ROOT, helpers.profiles.ROOT, sys.path.count(str(ROOT)))"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def repository(tmp_path):
    """A repository of its own with what the setup cell looks for."""
    folder = tmp_path / "origin"
    shutil.copytree(ROOT / "helpers", folder / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", folder, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"]):
        subprocess.run([*git, *arguments], check=True)
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


def test_the_setup_cell_fetches_nothing_outside_of_colab(tmp_path, repository):
    result = run_setup_cell(tmp_path, repository)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("FileNotFoundError: The course's files are not here: start")
    assert not (tmp_path / "llm-workbook").exists()


def test_the_setup_cell_says_what_to_do_where_colab_cannot_fetch_the_course(tmp_path):
    result = run_setup_cell(tmp_path, "file:///nowhere", COLAB_RELEASE_TAG="release-colab_20260801")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("in Colab, check the network.")
    assert not (tmp_path / "llm-workbook").exists()
