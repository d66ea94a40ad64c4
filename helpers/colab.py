"""Running a lesson in Google Colab or Kaggle: the badges, the setup cell, and the packages that a runtime lacks.

Kaggle's image is made from Colab's and sets Colab's variables too; its menus have other names.

Colab's own torch, numpy, pandas and transformers are never replaced: pip may install what is missing and move a few
pure data packages, and everything else is held at the version that the runtime came with. Elsewhere nothing happens.
"""

import importlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from helpers.errors import CourseError
from helpers.profiles import ROOT, detect_hardware, get_profile

# `python -m course links` changes these two lines, and with them every place that repeats them.
REPOSITORY = "https://github.com/llm-workbook/llm-workbook"
TAG = "v0.1.0"  # of the release that the badges open and the setup cell fetches: the version in pyproject.toml

# The first code cell of every notebook, word for word.
SETUP_CELL = f"""\
# Finds the course's files. In Colab it first fetches them, installs what is missing and says what it runs on.
import os
import subprocess
import sys
from pathlib import Path

clone = Path.cwd() / "llm-workbook"
places = [Path.cwd(), *Path.cwd().parents, clone]
if "COLAB_RELEASE_TAG" in os.environ and not any((place / "helpers/profiles.py").exists() for place in places):
    tag, address = "{TAG}", "{REPOSITORY}"
    git = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", tag]
    subprocess.run([*git, address, str(clone)], check=False)
ROOT = next((place for place in places if (place / "helpers/profiles.py").exists()), None)
if ROOT is None:
    raise FileNotFoundError("The course's files are not here: start Jupyter in them; in Colab, git says why above.")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from helpers import colab

colab.set_up()
"""

# What a student's session relies on most, and what Colab has often loaded before the first cell runs.
NEVER_MOVED = ("torch", "numpy", "pandas", "transformers")
# trl needs newer ones than Colab has, and nothing that Colab has loaded by then depends on their exact version.
FREE_TO_MOVE = {"datasets", "pyarrow", "fsspec", "dill", "multiprocess"}
MENUS = {
    "Colab": {
        "restart": "Runtime > Restart session",
        "newest": "Runtime > Change runtime type, and the latest version there",
        "gpu": "Runtime > Change runtime type, and a T4 there",
    },
    "Kaggle": {
        "restart": "Run > Restart & clear cell outputs",
        "newest": "Settings > Environment, and the latest one there",
        "gpu": "Settings > Accelerator, and GPU T4 x2 there",
    },
}
SHOWN = (*NEVER_MOVED, "datasets", "peft", "trl", "bitsandbytes")


def badges(notebook_stem: str) -> str:
    """Markdown of the badges that open notebooks/<notebook_stem>.ipynb in Colab and in Kaggle."""
    notebook = f"{REPOSITORY}/blob/{TAG}/notebooks/{notebook_stem}.ipynb"
    colab = notebook.replace("https://github.com/", "https://colab.research.google.com/github/")
    kaggle = f"https://kaggle.com/kernels/welcome?src={notebook}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle})"
    )


def on_kaggle() -> bool:
    """Whether this runs in a Kaggle notebook."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def on_colab() -> bool:
    """Whether this runs in Colab or in Kaggle. LLM_WORKBOOK_COLAB=1 or 0 overrides."""
    override = os.environ.get("LLM_WORKBOOK_COLAB")
    return override == "1" if override else on_kaggle() or "COLAB_RELEASE_TAG" in os.environ


def how_to(what: str) -> str:
    """Where in the menus of this place one can "restart" the session, take the "newest" runtime or change the "gpu"."""
    return MENUS["Kaggle" if on_kaggle() else "Colab"][what]


@dataclass(frozen=True)
class Plan:
    """What to ask of pip."""

    install: tuple[str, ...]  # requirements with their ranges
    remove: tuple[str, ...]  # names
    constraints: tuple[str, ...]  # name==version of what must stay as it is


def plan(packages: Sequence[str], requirements: Mapping[str, Requirement], installed: Mapping[str, str | None]) -> Plan:
    """Decide what pip has to do so that `packages` are there in the ranges of `requirements`.

    `installed` maps the names of what is installed to their versions.
    """
    unknown = [name for name in packages if name not in requirements]
    if unknown:
        raise CourseError(f"requirements.txt has no line for {unknown[0]}: add one, or mend the name.")
    install = [name for name in packages if not _satisfies(installed.get(name), requirements[name])]
    if unfit := [name for name in install if name in NEVER_MOVED and name in installed]:
        raise CourseError(
            f"This runtime has {unfit[0]} {installed[unfit[0]]} and the course needs {requirements[unfit[0]]}: "
            f"choose {how_to('newest')}."
        )
    # peft refuses to add adapters while a torchao older than 0.16 is there, and the course does not use torchao.
    old_torchao = installed.get("torchao") and not _satisfies(installed["torchao"], Requirement("torchao>=0.16"))
    fixed = {
        name: version for name, version in installed.items() if name not in FREE_TO_MOVE.union(install, ["torchao"])
    }
    return Plan(
        install=tuple(str(requirements[name]) for name in install),
        remove=("torchao",) if old_torchao else (),
        constraints=tuple(f"{name}=={version}" for name, version in sorted(fixed.items()) if _is_version(version)),
    )


def set_up() -> None:
    """In Colab and Kaggle, install what any lesson needs and say what it runs on; elsewhere, do nothing.

    The setup cell calls this before anything large is imported, so that a restart is hardly ever needed. Raises
    CourseError as `prepare` does.
    """
    if not on_colab():
        return
    prepare(*lesson_packages(ROOT / "requirements.txt"))
    installed, hardware = _installed(), detect_hardware()
    versions = [f"{name} {installed[name]}" for name in SHOWN if name in installed]
    print(", ".join([f"Python {platform.python_version()}", *versions]))
    profile = get_profile(hardware=hardware)
    place = f"a GPU of {hardware.gpu_memory_gib:.0f} GiB" if profile.device == "cuda" else "the CPU"
    print(f"profile {profile.name}: {profile.model_id} in {profile.dtype} on {place}")
    if hardware.unusable:
        print(f"The GPU here is not used ({hardware.unusable}): for one that is, choose {how_to('gpu')}.")
    if hardware.count > 1:
        print(f"There are {hardware.count} GPUs here, and a lesson uses the first.")


def prepare(*packages: str) -> None:
    """In Colab and Kaggle, install those of `packages` that are missing or too old; elsewhere, do nothing.

    Raises CourseError where pip fails, and where a package that this session has already loaded was replaced: then the
    session has to be restarted.
    """
    if not on_colab():
        return
    before = _installed()
    todo = plan(packages, read_requirements(ROOT / "requirements.txt"), before)
    if todo.remove:
        _pip("uninstall", "--yes", *todo.remove)
    if todo.install:
        print(f"Installing {', '.join(todo.install)}; this takes up to a minute.")
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text("\n".join(todo.constraints))
            _pip("install", "--constraint", str(constraints), *todo.install)
        importlib.invalidate_caches()
    stale = replaced_while_loaded(before, _installed(), sys.modules)
    if stale:
        raise CourseError(
            f"The session still runs the old {', '.join(stale)}: choose {how_to('restart')}, "
            "then run the notebook again from its first cell."
        )


def replaced_while_loaded(
    before: Mapping[str, str | None], after: Mapping[str, str | None], loaded: Iterable[str]
) -> list[str]:
    """Packages whose version changed although the running session has them loaded."""
    loaded = set(loaded)
    return sorted(
        name
        for name in before
        if before[name] != after.get(name) and name.replace("-", "_") in loaded and name in after
    )


def read_requirements(path: Path) -> dict[str, Requirement]:
    """The lines of a requirements file by the canonical name of their package."""
    return _parse(path.read_text())


def lesson_packages(path: Path) -> list[str]:
    """Names of the packages that stand in a requirements file under its heading "# the lessons"."""
    return list(_parse(path.read_text().partition("# the lessons\n")[2].partition("\n#")[0]))


def _parse(text: str) -> dict[str, Requirement]:
    lines = [re.sub(r"\s*#.*", "", line).strip() for line in text.splitlines()]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines if line}


def _installed() -> dict[str, str | None]:
    return {canonicalize_name(found.name): found.version for found in distributions() if found.name}


def _satisfies(version: str | None, requirement: Requirement) -> bool:
    return _is_version(version) and requirement.specifier.contains(version, prereleases=True)


def _is_version(version: str | None) -> bool:
    try:
        return bool(Version(version or ""))
    except InvalidVersion:
        return False


def _pip(*arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True, check=False
    )
    if result.returncode:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.startswith("ERROR: ")]
        reason = errors[-1].rstrip(".") if errors else f"pip {arguments[0]} failed"
        raise CourseError(f"pip could not do its part ({reason}): check the network, or start a new runtime.")
