"""The notebooks of the course as files: which there are, their cells and tags, and what an output may hold.

The module knows nothing about what a notebook teaches.
"""

import copy
import hashlib
import json
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.errors import CourseError
from helpers.profiles import ROOT

NOTEBOOKS = ROOT / "notebooks"
# The part of a notebook's header that is written for the author: what was measured, and the minutes of study_time.
BUDGET = re.compile(r"(cpu [\d.]+ s · [\d.]+ GB)( \| core \d+ min, all \d+ min \| exercises \d+ min)?")
EXERCISE = re.compile(r"\bcheck\(\s*[\"']([\d.]+)[\"']")  # the number of an exercise, in its check cell
PROGRESS_BAR = re.compile(r"\[(\d+:)?\d\d:\d\d[<,]")  # tqdm's "[elapsed<remaining, rate]"
# A path that only this machine has; one in a URL or below another folder is not meant.
MACHINE_PATH = re.compile(
    r"(?<![\w.~:/-])/(content|home|mnt|opt|private|root|srv|tmp|Users|usr|var|work|workspace)\b(/[^\s\"'<>()]*)?"
    r"|\b[A-Z]:\\+(Users|Windows|Program)[^\s\"'<>()]*"
)


def select_notebooks(folder: Path = NOTEBOOKS, only: list[str] | None = None) -> list[Path]:
    """Notebooks of the folder in the order of the course, or those of the lessons in `only` ("03" or "03_name")."""
    notebooks = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise CourseError(f"There is no notebook named like 03_name.ipynb in {folder}: give the right --notebooks.")
    if only is None:
        return notebooks
    wanted = {lesson.zfill(2) for lesson in only}
    known = {name for path in notebooks for name in (path.stem[:2], path.stem)}
    if unknown := sorted(wanted - known):
        lessons = ", ".join(path.stem for path in notebooks)
        raise CourseError(f"There is no lesson {', '.join(unknown)}: choose from {lessons}.")
    return [path for path in notebooks if {path.stem[:2], path.stem} & wanted]


def read_notebook(path: Path) -> NotebookNode:
    """The notebook in the file; CourseError if it is none."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:
        raise CourseError(f"{path.name} is not a readable notebook ({one_line(error)}): restore the file.") from None


def tags(cell: NotebookNode) -> list[str]:
    """Tags of the cell."""
    return cell.metadata.get("tags", [])


def source_hash(notebook: NotebookNode) -> str:
    """Hash of what an author writes: the cells' sources and tags, without outputs and the measured budget."""
    cells = [[cell.cell_type, sorted(tags(cell)), BUDGET.sub("", cell.source)] for cell in notebook.cells]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def code_cells(path: Path) -> list[NotebookNode]:
    """Code cells of a notebook that are the author's and not empty; none if it cannot be read."""
    try:
        cells = read_notebook(path).cells
    except CourseError:
        return []
    return [c for c in cells if c.cell_type == "code" and c.source.strip() and "injected-parameters" not in tags(c)]


def core_path(notebook: NotebookNode) -> NotebookNode:
    """A copy without the sections whose heading of level 2 is tagged `further`: what every reader needs."""
    kept, core = [], True
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            core = "further" not in tags(cell)
        if core:
            kept.append(cell)
    return copy.deepcopy(NotebookNode(notebook, cells=kept))


def one_line(text: object, width: int = 300) -> str:
    """The first line that is not empty, shortened to `width` characters, without colours and own folders."""
    plain = relative(re.sub(r"\x1b\[[\d;]*m", "", str(text)))
    line = next((line.strip() for line in plain.splitlines() if line.strip()), "")
    line = "".join(character for character in line if character.isprintable())
    return line if len(line) <= width else line[: width - 3] + "..."


def relative(text: str) -> str:
    """The text without the folder of the repository and the home of the user."""
    text = text.replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    return text if str(Path.home()) == "/" else text.replace(f"{Path.home()}/", "~/")


def clean_output(output: NotebookNode) -> NotebookNode | None:
    """The output without progress bars, widgets and this machine's folders; None if nothing is left."""
    data = output.get("data", {})
    if any("jupyter.widget" in mime for mime in data) or "<progress" in data.get("text/html", ""):
        return None
    if output.output_type == "stream" and output.name == "stderr":
        lines = re.split(r"[\r\n]+", output.text.replace("\x1b[A", ""))
        if not (kept := [line for line in lines if line.strip() and not PROGRESS_BAR.search(line)]):
            return None
        output.text = "\n".join(kept)
    if "text" in output:
        output.text = relative(output.text)
    for mime, value in data.items():
        if not mime.startswith("image/"):
            data[mime] = json.loads(relative(json.dumps(value, ensure_ascii=False)))
    return output


def output_text(output: NotebookNode) -> str:
    """Everything in the output but its pictures."""
    data = [str(value) for mime, value in output.get("data", {}).items() if not mime.startswith("image/")]
    return "\n".join([output.get("text", ""), *output.get("traceback", []), *data])


def gigabytes(gib: float) -> str:
    """GiB as GB, the unit in which memory is sold."""
    return f"{gib * 2**30 / 1e9:.1f} GB"
