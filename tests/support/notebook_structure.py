"""The conventions that every committed notebook keeps, each as a function that yields what is wrong.

A function takes the notebook and its file name without .ipynb. The module reads sources, outputs and metadata; it
executes nothing of the notebook.
"""

import ast
import getpass
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode
from nbformat.validator import iter_validate

from course import notebooks
from course.site import pages
from course.site.quiz import QUESTION
from course.study_time import study_time
from course.twins import ON_A_GPU
from helpers.colab import SETUP_CELL, badges

CLOSING = ["What we saw", "In practice", "Read on"]
MAX_LINES, MAX_SECONDS, MAX_GIGABYTES = 40, 180, 3.0
MAX_CORE_CELLS = 45  # code cells of the core path, without exercises
COMMON_NAMES = {"admin", "colab", "jovyan", "localhost", "root", "runner", "student", "ubuntu", "user"}
PROMPT = re.compile(r"\b[\w.-]+@[\w.-]+:[~/]")  # user@host:~
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}
FORBIDDEN_CALLS = {"exec", "eval", "os.system", "torch.load", "__import__"}

Check = Callable[[NotebookNode, str], Iterator[str]]
CHECKS: list[Check] = []


def convention(check: Check) -> Check:
    """Add the function to `CHECKS`."""
    CHECKS.append(check)
    return check


def read(path: Path) -> NotebookNode:
    """The notebook as it is in the file: missing cell ids are not filled in."""
    return nbformat.reader.reads(path.read_text(encoding="utf-8"))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Every output with the number of its code cell, from 1."""
    for number, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            yield number, output


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in notebooks.tags(cell)]


def python_blocks(cell: NotebookNode) -> list[str]:
    """The Python blocks of a markdown cell; a blank line before them makes GitHub render them inside <details>."""
    return re.findall(r"\n\n```python\n(.*?)```", cell.source, re.DOTALL)


def sections(notebook: NotebookNode) -> list[str]:
    """Text of the headings of level 2, in order."""
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    without_code = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    return [text.strip() for text in re.findall(r"^## +(.+)$", without_code, re.MULTILINE)]


# The file


@convention
def the_file_is_valid(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for error in iter_validate(notebook):
        yield notebooks.one_line(error)
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        yield "its format is older than 4.5, which has no cell ids"


@convention
def every_cell_has_its_own_id(notebook: NotebookNode, stem: str) -> Iterator[str]:
    ids = [cell.get("id") for cell in notebook.cells]
    for number, name in enumerate(ids):
        if not name or name in ids[:number]:
            yield f"cell {number} has {'the id of another one' if name else 'no id'}"


@convention
def the_kernel_is_python3(notebook: NotebookNode, stem: str) -> Iterator[str]:
    if (name := notebook.metadata.get("kernelspec", {}).get("name")) != "python3":
        yield f"its kernel is {name}"


@convention
def the_metadata_describe_the_lesson(notebook: NotebookNode, stem: str) -> Iterator[str]:
    workbook = notebook.metadata.get("workbook", {})
    if workbook.get("lesson") != stem[:2]:
        yield f"workbook.lesson is {workbook.get('lesson')}, not {stem[:2]}"
    if not workbook.get("title"):
        yield "workbook.title is empty"
    prerequisites = workbook.get("prerequisites")
    if not isinstance(prerequisites, list) or not all(
        re.fullmatch(r"\d\d", str(p)) and p < stem for p in prerequisites
    ):
        yield f"workbook.prerequisites is {prerequisites}, not a list of earlier lessons such as ['01']"
    if not ON_A_GPU.items() <= notebook.metadata.items():
        yield "it does not ask Colab for a GPU: run python -m course sync"


@convention
def the_measured_budget_is_kept(notebook: NotebookNode, stem: str) -> Iterator[str]:
    budget = notebook.metadata.get("workbook", {}).get("budget", {}).get("cpu")
    if not budget:
        yield "it has no measured budget: run python -m course refresh"
    elif budget["seconds"] >= MAX_SECONDS or budget["gib"] * 2**30 / 1e9 >= MAX_GIGABYTES:
        yield f"it took {budget['seconds']} s and {notebooks.gigabytes(budget['gib'])}"


# Order of the cells


@convention
def the_first_cell_has_title_badges_and_budget(notebook: NotebookNode, stem: str) -> Iterator[str]:
    source = notebook.cells[0].source if notebook.cells[0].cell_type == "markdown" else ""
    if not source.startswith("# "):
        yield "it does not begin with a title"
    if badges(stem) not in source:
        yield "it lacks the badges that helpers.colab.badges gives"
    if not notebooks.BUDGET.search(source):
        yield "it lacks the line with the budget, such as: cpu 95 s · 1.2 GB | t4 6 min · 7 GB"


@convention
def the_header_says_how_long_it_takes_to_study(notebook: NotebookNode, stem: str) -> Iterator[str]:
    if (expected := study_time(notebook)) not in notebook.cells[0].source:
        yield f"its first cell does not say {expected}: python -m course refresh --only {stem[:2]}"


@convention
def the_setup_is_the_first_code_cell_after_you_will(notebook: NotebookNode, stem: str) -> Iterator[str]:
    first = next((i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"), None)
    if first is None or notebook.cells[first].source.strip() != SETUP_CELL.strip():
        yield "the first code cell is not helpers.colab.SETUP_CELL"
    elif "setup" not in notebooks.tags(notebook.cells[first]):
        yield "the first code cell is not tagged setup"
    if not any("You will" in cell.source for cell in notebook.cells[:first]):
        yield 'no cell before the setup says "You will"'


@convention
def one_cell_is_tagged_parameters_and_follows_the_setup(notebook: NotebookNode, stem: str) -> Iterator[str]:
    found = tagged(notebook, "parameters")
    if found != code_cells(notebook)[1:2]:
        yield f"{len(found)} cells are tagged parameters, expected one, the second code cell"
        return
    assigned = {
        target.id
        for statement in ast.parse(found[0].source).body
        for target in getattr(statement, "targets", [getattr(statement, "target", None)])
        if isinstance(target, ast.Name)
    }
    if missing := {"profile", "seed", "model_id"} - assigned:
        yield f"the parameters cell does not assign {', '.join(sorted(missing))}"


@convention
def sections_end_with_the_closing_ones(notebook: NotebookNode, stem: str) -> Iterator[str]:
    found = sections(notebook)
    if found[-3:] != CLOSING:
        yield f"the last headings of level 2 are {found[-3:]}, expected {CLOSING}"
    if len(found) <= 3:
        yield "there are no sections before the closing ones"


@convention
def the_last_code_cell_before_in_practice_is_the_summary(notebook: NotebookNode, stem: str) -> Iterator[str]:
    before = takewhile(lambda cell: cell.cell_type == "code" or "## In practice" not in cell.source, notebook.cells)
    code = [cell for cell in before if cell.cell_type == "code"]
    if not code or "lesson.summary()" not in code[-1].source:
        yield "the last code cell before In practice does not call lesson.summary()"


@convention
def code_cells_are_short(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for number, cell in enumerate(code_cells(notebook), start=1):
        if (lines := len(cell.source.splitlines())) > MAX_LINES:
            yield f"code cell {number} has {lines} lines, more than {MAX_LINES}"


@convention
def sections_are_core_or_further(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for cell in notebook.cells:
        title = cell.source.partition("\n")[0]
        if cell.cell_type != "markdown" or not re.match(r"## \d+ · (?!Exercises)", title):
            continue
        if len({"core", "further"} & {*notebooks.tags(cell)}) != 1:
            yield f"the heading {title!r} has not one of the tags core and further"
        if ("further" in notebooks.tags(cell)) != (cell.source.split("\n")[1:3] == ["", pages.FURTHER]):
            yield f"under the heading {title!r} {pages.FURTHER!r} must stand if it is tagged further, and only then"
    core = [c for c in code_cells(notebooks.core_path(notebook)) if not {"exercise", "check"} & {*notebooks.tags(c)}]
    if len(core) > MAX_CORE_CELLS:
        yield f"its core path has {len(core)} code cells, more than {MAX_CORE_CELLS}: tag a section further"


@convention
def its_core_path_uses_no_name_of_a_further_section(notebook: NotebookNode, stem: str) -> Iterator[str]:
    core = notebooks.core_path(notebook)
    core.cells = [cell for cell in core.cells if not {"exercise", "check"} & {*notebooks.tags(cell)}]
    undefined = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    found = subprocess.run(
        [*undefined, "--stdin-filename", f"{stem}.ipynb", "-"],
        input=nbformat.writes(core),
        capture_output=True,
        text=True,
    )
    for finding in json.loads(found.stdout):
        yield f"without its further sections: {finding['message'].lower()}"


# Exercises and quiz


@convention
def there_is_a_quiz_of_five_questions(notebook: NotebookNode, stem: str) -> Iterator[str]:
    questions = tagged(notebook, "quiz")
    if len(questions) != 5 or "Quiz" not in sections(notebook):
        yield f"it has {len(questions)} cells tagged quiz under a heading Quiz, expected five"
    for number, cell in enumerate(questions, start=1):
        found = QUESTION.fullmatch(cell.source)
        if not found or not found["question"].endswith("?") or "<summary>Answer</summary>" not in cell.source:
            yield f"question {number} is not a bold question, choices - A. to - D., and a folded answer with a reason"


@convention
def there_are_3_to_6_exercises_with_check_and_solution(notebook: NotebookNode, stem: str) -> Iterator[str]:
    # Hints, and text without a tag, may stand between the three.
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" or {*notebooks.tags(cell)} - {"hint"}]
    starts = [i for i, cell in enumerate(cells) if "exercise" in notebooks.tags(cell)]
    if not 3 <= len(starts) <= 6:
        yield f"it has {len(starts)} exercises"
    for number, i in enumerate(starts, start=1):
        for place, tag in enumerate(("check", "solution"), start=1):
            if tag not in notebooks.tags((cells + 2 * [NotebookNode(metadata={})])[i + place]):
                yield f"cell {place} after exercise {number} is not tagged {tag}"
    if len(tagged(notebook, "solution")) != len(starts):
        yield f"it has {len(starts)} exercises and {len(tagged(notebook, 'solution'))} solutions"


@convention
def an_exercise_is_a_stub(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for number, cell in enumerate(tagged(notebook, "exercise"), start=1):
        if cell.cell_type != "code" or not re.search(r"^\s+raise NotImplementedError", cell.source, re.MULTILINE):
            yield f"exercise {number} does not raise NotImplementedError"


@convention
def the_check_of_an_exercise_says_not_attempted_yet(notebook: NotebookNode, stem: str) -> Iterator[str]:
    numbers = []
    after_exercise = False
    for cell in notebook.cells:
        if "check" in notebooks.tags(cell) and after_exercise:
            if number := re.search(r"\bcheck\(\s*[\"']([\d.]+)[\"']", cell.source):
                numbers.append(number[1])
            said = "".join(notebooks.output_text(output) for output in cell.get("outputs", []))
            if not number or f"Exercise {number[1]}: not attempted yet" not in said:
                yield f"a check cell says {notebooks.one_line(said)!r}"
        if cell.cell_type == "code":
            after_exercise = "exercise" in notebooks.tags(cell)
    if len(set(numbers)) < len(numbers):
        yield f"two exercises have the same number: {', '.join(numbers)}"


@convention
def every_exercise_has_a_folded_hint(notebook: NotebookNode, stem: str) -> Iterator[str]:
    hints = tagged(notebook, "hint")
    if len(hints) != len(tagged(notebook, "exercise")):
        yield f"it has {len(tagged(notebook, 'exercise'))} exercises and {len(hints)} hints"
    for number, cell in enumerate(hints, start=1):
        if cell.cell_type != "markdown" or not re.fullmatch(
            r"<details><summary>Hint</summary>\n\n.+\n\n</details>", cell.source, re.DOTALL
        ):
            yield f"hint {number} is not a markdown cell, a text between blank lines in <details>"


@convention
def solutions_are_folded_markdown(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for number, cell in enumerate(tagged(notebook, "solution"), start=1):
        folded = re.search(r"<details>\s*<summary>.+</summary>.*</details>", cell.source, re.DOTALL)
        if cell.cell_type != "markdown" or not folded or not python_blocks(cell):
            yield f"solution {number} is not a markdown cell with <details> and, after a blank line, a python block"


# Outputs


@convention
def outputs_are_those_of_the_sources(notebook: NotebookNode, stem: str) -> Iterator[str]:
    if notebook.metadata.get("workbook", {}).get("source_hash") != notebooks.source_hash(notebook):
        yield f"it was changed after it ran: python -m course refresh --only {stem[:2]}"


@convention
def cells_ran_once_from_top_to_bottom(notebook: NotebookNode, stem: str) -> Iterator[str]:
    counts = [cell.execution_count for cell in code_cells(notebook) if cell.source.strip()]
    if counts != list(range(1, len(counts) + 1)):
        yield f"the execution counts are {counts}"


@convention
def there_are_no_errors(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for number, output in outputs(notebook):
        if output.output_type == "error":
            yield f"code cell {number} raised {output.ename}"


@convention
def nothing_is_written_to_stderr(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for number, output in outputs(notebook):
        if output.get("name") == "stderr":
            yield f"code cell {number} writes to stderr: {notebooks.one_line(output.text)}"


@convention
def there_are_no_widgets_and_no_traces_of_the_execution(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for name in notebook.metadata.keys() & {"widgets", "papermill"}:
        yield f"its metadata hold {name}"
    for number, cell in enumerate(notebook.cells):
        for name in cell.metadata.keys() & {"papermill", "execution"}:
            yield f"the metadata of cell {number} hold {name}"
    for number, output in outputs(notebook):
        if any("jupyter.widget" in mime for mime in output.get("data", {})):
            yield f"code cell {number} shows a widget"


@convention
def images_have_a_text_that_stands_in_for_them(notebook: NotebookNode, stem: str) -> Iterator[str]:
    for number, output in outputs(notebook):
        data = output.get("data", {})
        for mime in data:
            alt = output.metadata.get(mime, {}).get("alt", "").strip()
            if mime.startswith("image/") and not (alt and data.get("text/plain") == alt):
                yield f"the image of code cell {number} has no alt text: show it with helpers.plots.show(figure, alt)"
        yield from images_without_alt(data.get("text/html", ""), f"the output of code cell {number}")
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield from images_without_alt(cell.source, f"cell {number}")


@convention
def one_figure_is_the_headline(notebook: NotebookNode, stem: str) -> Iterator[str]:
    found = tagged(notebook, "headline")
    if len(found) != 1:
        yield f"{len(found)} cells are tagged headline, expected one"
    for cell in found:
        if not any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            yield "the cell tagged headline shows no figure"


def images_without_alt(text: str, where: str) -> Iterator[str]:
    for image in re.findall(r"!\[\s*\]\(\S*|<img\b(?![^>]*\balt=[\"']?\s*[^\s\"'>])[^>]*>", text):
        yield f"{where} has an image without alt text: {image}"


@convention
def there_are_no_paths_and_names_of_a_machine(notebook: NotebookNode, stem: str) -> Iterator[str]:
    texts = [(f"the source of cell {number}", cell.source) for number, cell in enumerate(notebook.cells)]
    texts += [
        (f"the output of code cell {number}", notebooks.output_text(output)) for number, output in outputs(notebook)
    ]
    names = {name for name in (getpass.getuser(), socket.gethostname()) if len(name) > 3} - COMMON_NAMES
    own = [re.compile(rf"\b{re.escape(name)}\b") for name in names]
    for where, text in texts:
        for pattern in (notebooks.MACHINE_PATH, PROMPT, *own):
            if found := pattern.search(text):
                yield f"{where} holds {found[0]!r}"


# Code


@convention
def the_code_is_safe(notebook: NotebookNode, stem: str) -> Iterator[str]:
    code = [(f"code cell {number}", cell.source) for number, cell in enumerate(code_cells(notebook), start=1)]
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            code += [(f"the python block in cell {number}", block) for block in python_blocks(cell)]
    for where, source in code:
        if "trust_remote_code" in source:
            yield f"{where} uses trust_remote_code"
        if re.search(r"^\s*[!%]+\s*(\S*python\S* -m )?(pip|uv|conda)\b", source, re.MULTILINE):
            yield f"{where} installs packages: name them in helpers.colab.prepare"
        try:
            tree = ast.parse(TransformerManager().transform_cell(source))
        except SyntaxError as error:
            yield f"{where} is not Python: {error.msg}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules = {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules = {(node.module or "").split(".")[0]}
            else:
                modules = set()
            used = modules & FORBIDDEN_MODULES
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in FORBIDDEN_CALLS:
                used.add(name)
            for name in sorted(used):
                yield f"{where} uses {name}"
