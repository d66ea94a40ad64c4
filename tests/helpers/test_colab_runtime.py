"""A session in an environment with Colab's published versions: the setup cell, then lesson 06.

Each runtime of data/colab_packages.json is rebuilt in build/colab/, with real packages, in the Python that runs the
tests. torch is the one of constraints.txt: Colab's builds are for CUDA. `make colab-test` runs this; it needs a package
index and, the first time, several minutes for each runtime.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers.colab import FREE_TO_MOVE, NEVER_MOVED, REPOSITORY, SETUP_CELL, TAG, read_requirements
from helpers.profiles import ROOT

pytestmark = [pytest.mark.colab, pytest.mark.timeout(3600)]

RUNTIMES = json.loads((ROOT / "data" / "colab_packages.json").read_text())["runtimes"]
# The list of 2026-08 names eight packages; the others are those of 2026-02, but for these, which its transformers
# refuses. pip chooses them.
REFUSED = {"2026-08": {"safetensors", "huggingface_hub"}}
LESSON = "06_peft"
STAND_IN = {
    "google/colab/__init__.py": "from google.colab import drive\n",
    "google/colab/drive.py": "def mount(*_, **__):\n    raise NotImplementedError('lesson 06 mounts no drive')\n",
}


def pins(runtime: dict) -> list[str]:
    """What to ask of pip for a published runtime."""
    packages = RUNTIMES[0]["packages"] | runtime["packages"]
    packages["torch"] = str(read_requirements(ROOT / "constraints.txt")["torch"].specifier).removeprefix("==")
    refused = REFUSED.get(runtime["date"], set())
    return [f"{name}=={number}" for name, number in packages.items() if name not in refused]


def freeze(python: Path) -> dict[str, str]:
    """What is installed: name -> version."""
    command = [python, "-m", "pip", "list", "--format", "json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {package["name"].lower().replace("_", "-"): package["version"] for package in listed}


@pytest.fixture(params=RUNTIMES, ids=lambda runtime: runtime["date"])
def python(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The interpreter of a fresh environment with the packages of a published runtime."""
    wanted = pins(request.param)
    key = hashlib.sha256("\n".join([sys.version, *wanted]).encode()).hexdigest()[:12]
    kept = ROOT / "build" / "colab" / f"{request.param['date']}-{key}"
    if not (kept / "complete").exists():
        shutil.rmtree(kept, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", kept], check=True)
        command = [kept / "bin" / "python", "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *wanted]
        subprocess.run(command, check=True)
        (kept / "complete").touch()
    folder = tmp_path / "environment"
    # Links suffice: pip never writes into a file that is there. Compiled files are the exception.
    shutil.copytree(
        kept, folder, symlinks=True, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__", "complete")
    )
    site = next((folder / "lib").glob("python*")) / "site-packages"
    for name, source in STAND_IN.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(source)
    return folder / "bin" / "python"


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A repository of its own with these files, under the tag that the setup cell fetches."""
    origin = tmp_path / "origin"
    kept = shutil.ignore_patterns("build", "runs", ".*", "__pycache__")
    shutil.copytree(ROOT, origin, ignore=kept)
    git = ["git", "-C", origin, "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "all"], ["tag", TAG]):
        subprocess.run([*git, *arguments], check=True)
    return f"file://{origin}"


def session(python: Path, content: Path, preloaded: str = "") -> tuple[KernelManager, dict[str, str]]:
    """A kernel of that interpreter as Colab starts one, with `preloaded` run before the first cell."""
    specification = {
        "argv": [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab",
        "language": "python",
    }
    if preloaded:
        specification["argv"].append(f"--IPKernelApp.exec_lines={preloaded}")
    folder = content.parent / "kernels" / "colab"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernel.json").write_text(json.dumps(specification))
    specifications = KernelSpecManager(kernel_dirs=[str(folder.parent)], ensure_native_kernel=False)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLM_WORKBOOK")}
    environment |= {
        "COLAB_RELEASE_TAG": "release-colab_20260801",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(content.parent),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    environment.pop("PYTHONPATH", None)
    return KernelManager(kernel_name="colab", kernel_spec_manager=specifications), environment


def run(notebook: nbformat.NotebookNode, python: Path, content: Path, preloaded: str = "") -> None:
    """Execute the notebook in `content` in a session of its own."""
    manager, environment = session(python, content, preloaded)
    client = NotebookClient(notebook, km=manager, timeout=900, resources={"metadata": {"path": str(content)}})
    client.execute(env=environment, cleanup_kc=True)


def said(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_the_setup_cell_moves_no_pin_of_colab_and_lesson_06_runs_after_it(python, address, tmp_path):
    content = tmp_path / "content"
    content.mkdir()
    cell = SETUP_CELL.replace(REPOSITORY, address)
    before = freeze(python)

    # Colab's kernel has loaded pandas, and pandas pyarrow, before the first cell runs.
    first = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    with pytest.raises(
        CellExecutionError, match=r"The session still runs the old .*pyarrow.*Runtime > Restart session"
    ):
        run(first, python, content, preloaded="import pandas, pyarrow")
    assert "Installing" in said(first.cells[0])

    after = freeze(python)
    changed = {name for name in before if name in after and before[name] != after[name]}
    assert before.keys() - after.keys() == {"torchao"}
    assert changed <= FREE_TO_MOVE, {name: (before[name], after[name]) for name in changed - FREE_TO_MOVE}
    assert all(before[name] == after[name] for name in NEVER_MOVED)
    assert {"trl", "bitsandbytes", "bm25s"} <= after.keys() - before.keys()

    lesson = nbformat.read(ROOT / "notebooks" / f"{LESSON}.ipynb", as_version=4)
    setup = next(cell for cell in lesson.cells if cell.cell_type == "code")
    setup.source = cell
    run(lesson, python, content)
    versions, profile = said(setup).splitlines()  # nothing was installed this time
    for name in (*NEVER_MOVED, "peft", "trl"):
        assert f"{name} {after[name]}" in versions
    assert profile.startswith("profile cpu: shima-4m in float32")
    code = [cell for cell in lesson.cells if cell.cell_type == "code" and cell.source.strip()]
    assert all(cell.execution_count for cell in code)
    assert freeze(python) == after
