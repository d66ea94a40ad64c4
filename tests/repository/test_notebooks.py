"""Every committed notebook keeps the conventions, each convention notices when it is broken, and nbval works."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course.__main__ import main
from course.runner import run
from course.site.pages import FURTHER
from course.twins import ON_A_GPU
from helpers.colab import SETUP_CELL, badges
from helpers.profiles import ROOT
from tests.support import notebook_structure as structure

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NBVAL = ["-m", "pytest", "--nbval-lax", "--nbval-current-env", "-p", "no:cacheprovider", "-q"]
STEM = "03_lines"


# The committed notebooks


@pytest.mark.parametrize("check", structure.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_keeps_the_convention(path: Path, check: structure.Check) -> None:
    assert list(check(structure.read(path), path.stem)) == []


def test_every_notebook_has_a_number_and_a_name_of_its_own() -> None:
    assert [path.name for path in NOTEBOOKS if not re.fullmatch(r"\d\d_[a-z0-9_]+\.ipynb", path.name)] == []
    assert [number for number, times in Counter(path.stem[:2] for path in NOTEBOOKS).items() if times > 1] == []


def test_the_table_of_the_readme_is_the_one_that_the_runner_lists(capsys: pytest.CaptureFixture) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- lessons -->\n(.*?)<!-- /lessons -->", readme, re.DOTALL)
    assert table, "README.md has no table between <!-- lessons --> and <!-- /lessons -->"
    main(["list", "--markdown"])
    assert table[1].strip() == capsys.readouterr().out.strip()


# A small notebook that keeps all conventions


HINT = "<details><summary>Hint</summary>\n\nTwice.\n\n</details>"


CORE = {"tags": ["core"]}
QUIZ = (
    "**Which line rises?**\n\n- A. This one.\n- B. None.\n- C. Both.\n- D. The other.\n\n"
    "<details><summary>Answer</summary>\n\nA. It goes from 0 to 1.\n\n</details>"
)


def exercise(number: int) -> list[NotebookNode]:
    """Stub, check, hint and solution of one exercise."""
    stub = "def double(number):\n    raise NotImplementedError"
    check = (
        "from helpers.exercises import check, expect_equal\n\n\n"
        f'def checker(double):\n    expect_equal("double(2)", double(2), 4)\n\n\ncheck("3.{number}", checker, double)'
    )
    solution = (
        "<details>\n<summary>Solution</summary>\n\n"
        "```python\ndef double(number):\n    return 2 * number\n```\n\n</details>"
    )
    return [
        new_markdown_cell(f"### Exercise 3.{number} (easy)\nWrite `double`."),
        new_code_cell(stub, metadata={"tags": ["exercise"]}),
        new_code_cell(check, metadata={"tags": ["check"]}),
        new_markdown_cell(HINT, metadata={"tags": ["hint"]}),
        new_markdown_cell(solution, metadata={"tags": ["solution"]}),
    ]


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like notebooks/ with one lesson, whose outputs `refresh` wrote."""
    root = tmp_path_factory.mktemp("course")
    (root / "helpers").symlink_to(ROOT / "helpers")
    plot = (
        "from matplotlib.figure import Figure\n\nfrom helpers.plots import show\n\n"
        'figure = Figure()\nfigure.subplots().plot([0, 1])\nshow(figure, alt="A line that rises from 0 to 1.")'
    )
    settings = (
        'from helpers.lesson import Lesson\n\nlesson = Lesson("03", profile, model_id, seed)\nprint("seed", seed)'
    )
    cells = [
        new_markdown_cell(f"# Lines\n\n{badges(STEM)}\n\ncpu 0 s · 0 GB | t4 1 min · 1 GB"),
        new_markdown_cell("**You will** draw a line.\n\nPrerequisites: 01."),
        new_code_cell(SETUP_CELL, metadata={"tags": ["setup"]}),
        new_code_cell('profile = ""\nseed: int = 0\nmodel_id = ""', metadata={"tags": ["parameters"]}),
        new_code_cell(settings),
        new_markdown_cell(
            "## 1 · A line\n\n```python\n## not a heading\n```\n\n![a line](../figures/line.png)", metadata=CORE
        ),
        new_code_cell(plot, metadata={"tags": ["headline"]}),
        new_markdown_cell(f"## 2 · Its ends\n\n{FURTHER}", metadata={"tags": ["further"]}),
        new_code_cell("ends = 0, 1"),
        new_markdown_cell("## Exercises"),
        *(cell for number in (1, 2, 3) for cell in exercise(number)),
        new_markdown_cell("## Quiz"),
        *(new_markdown_cell(QUIZ, metadata={"tags": ["quiz"]}) for _ in range(5)),
        new_markdown_cell("## What we saw"),
        new_code_cell('lesson.claim("it rises", 1, at_least=0)\nlesson.summary()'),
        new_markdown_cell("## In practice\n\nUse matplotlib."),
        new_markdown_cell("## Read on\n\nHunter (2007), https://doi.org/10.1109/MCSE.2007.55"),
    ]
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "workbook": {"lesson": "03", "title": "Lines", "prerequisites": ["01"]},
        **ON_A_GPU,
    }
    folder = root / "notebooks"
    folder.mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=metadata), folder / f"{STEM}.ipynb")
    (row,) = run([folder / f"{STEM}.ipynb"], root / "build", refresh=True)
    assert row.status == "ok", row.error
    return folder


@pytest.fixture
def good(good_folder: Path) -> NotebookNode:
    return deepcopy(structure.read(good_folder / f"{STEM}.ipynb"))


@pytest.mark.parametrize("check", structure.CHECKS, ids=lambda check: check.__name__)
def test_a_refreshed_notebook_keeps_the_convention(good: NotebookNode, check: structure.Check) -> None:
    assert list(check(good, STEM)) == []


# One planted mistake for each way to break a convention


def cell_with(notebook: NotebookNode, text: str) -> NotebookNode:
    return next(cell for cell in notebook.cells if text in cell.source)


def say(notebook: NotebookNode, text: str, name: str = "stdout") -> None:
    """Add an output to the cell that prints the seed."""
    cell_with(notebook, "print(").outputs.append(new_output("stream", name=name, text=text))


def image(notebook: NotebookNode) -> NotebookNode:
    return cell_with(notebook, "Figure()").outputs[0]


VIOLATIONS: dict[structure.Check, list[Callable[[NotebookNode], object]]] = {
    structure.the_file_is_valid: [
        lambda n: n.cells[2].pop("outputs"),
        lambda n: n.update(nbformat_minor=4),
    ],
    structure.every_cell_has_its_own_id: [
        lambda n: n.cells[3].pop("id"),
        lambda n: n.cells[3].update(id=n.cells[4].id),
    ],
    structure.the_kernel_is_python3: [
        lambda n: n.metadata.kernelspec.update(name="llm"),
        lambda n: n.metadata.pop("kernelspec"),
    ],
    structure.the_metadata_describe_the_lesson: [
        lambda n: n.metadata.pop("accelerator"),
        lambda n: n.metadata.colab.update(gpuType="A100"),
        lambda n: n.metadata.workbook.update(lesson="04"),
        lambda n: n.metadata.workbook.update(title=""),
        lambda n: n.metadata.workbook.update(prerequisites="01"),
        lambda n: n.metadata.workbook.update(prerequisites=["05"]),
        lambda n: n.metadata.pop("workbook"),
    ],
    structure.the_measured_budget_is_kept: [
        lambda n: n.metadata.workbook.budget.cpu.update(seconds=180),
        lambda n: n.metadata.workbook.budget.cpu.update(gib=2.8),
        lambda n: n.metadata.workbook.pop("budget"),
    ],
    structure.the_first_cell_has_title_badges_and_budget: [
        lambda n: n.cells[0].update(source=n.cells[0].source.removeprefix("# ")),
        lambda n: n.cells[0].update(source=n.cells[0].source.replace(STEM, "04_other")),
        lambda n: n.cells[0].update(source=n.cells[0].source.replace("cpu", "CPU")),
        lambda n: n.cells.insert(0, new_code_cell("1")),
    ],
    structure.the_header_says_how_long_it_takes_to_study: [
        lambda n: n.cells[0].update(source=n.cells[0].source.replace("core 5 min", "core 10 min")),
        lambda n: n.cells.extend(new_markdown_cell(600 * "word ") for _ in range(3)),
        lambda n: cell_with(n, "raise Not").update(source="# Exercise 3.1, open: a\n    raise NotImplementedError"),
    ],
    structure.the_setup_is_the_first_code_cell_after_you_will: [
        lambda n: cell_with(n, "COLAB").update(source=SETUP_CELL.replace("--quiet", "")),
        lambda n: n.cells.insert(2, new_code_cell("import torch")),
        lambda n: n.cells.append(n.cells.pop(1)),
        lambda n: cell_with(n, "COLAB").metadata.clear(),
    ],
    structure.one_cell_is_tagged_parameters_and_follows_the_setup: [
        lambda n: cell_with(n, "profile =").metadata.update(tags=[]),
        lambda n: cell_with(n, "print(").metadata.update(tags=["parameters"]),
        lambda n: cell_with(n, "profile =").update(source='profile = "auto"\nseed = 0'),
        lambda n: n.cells.insert(3, new_code_cell("1")),
    ],
    structure.sections_end_with_the_closing_ones: [
        lambda n: n.cells.pop(),
        lambda n: n.cells.insert(-1, n.cells.pop()),
        lambda n: [
            n.cells.remove(cell_with(n, heading))
            for heading in ("## 1 · A line", "## 2 · Its ends", "## Exercises", "## Quiz")
        ],
    ],
    structure.the_last_code_cell_before_in_practice_is_the_summary: [
        lambda n: n.cells.remove(cell_with(n, "lesson.summary()")),
        lambda n: n.cells.insert(-2, new_code_cell("1")),
        lambda n: n.cells.append(n.cells.pop(n.cells.index(cell_with(n, "lesson.summary()")))),
    ],
    structure.code_cells_are_short: [
        lambda n: cell_with(n, "print(").update(source="\n".join(["seed"] * 41)),
    ],
    structure.sections_are_core_or_further: [
        lambda n: cell_with(n, "## 1 · A line").metadata.clear(),
        lambda n: cell_with(n, "## 1 · A line").metadata.update(tags=["core", "further"]),
        lambda n: cell_with(n, "## 2 · Its ends").update(source="## 2 · Its ends"),
        lambda n: n.cells.extend(new_code_cell("1") for _ in range(45)),
    ],
    structure.its_core_path_uses_no_name_of_a_further_section: [
        lambda n: cell_with(n, "lesson.summary()").update(source="lesson.summary()\nends"),
    ],
    structure.there_is_a_quiz_of_five_questions: [
        lambda n: n.cells.remove(cell_with(n, "Which line")),
        lambda n: n.cells.remove(cell_with(n, "## Quiz")),
        lambda n: cell_with(n, "Which line").update(source=QUIZ.replace("- D. The other.\n", "")),
        lambda n: cell_with(n, "Which line").update(source=QUIZ.replace("\n\nA. It", "\n\nIt")),
        lambda n: cell_with(n, "Which line").update(source="Which line rises?"),
    ],
    structure.there_are_3_to_6_exercises_with_check_and_solution: [
        lambda n: cell_with(n, "raise Not").metadata.clear(),
        lambda n: n.cells.extend(cell for number in range(4, 8) for cell in exercise(number)),
        lambda n: n.cells.remove(cell_with(n, '"3.2"')),
        lambda n: n.cells.remove(cell_with(n, "<summary>Solution")),
        lambda n: n.cells.append(new_markdown_cell("1", metadata={"tags": ["solution"]})),
        lambda n: n.cells.append(new_code_cell("1", metadata={"tags": ["exercise"]})),
    ],
    structure.an_exercise_is_a_stub: [
        lambda n: cell_with(n, "raise NotImplementedError").update(source="def double(number):\n    return 2 * number"),
    ],
    structure.the_check_of_an_exercise_says_not_attempted_yet: [
        lambda n: cell_with(n, '"3.2"').outputs[0].update(text="Exercise 3.2: correct (1 check)\n"),
        lambda n: cell_with(n, '"3.2"').outputs.clear(),
        lambda n: cell_with(n, '"3.2"').update(deepcopy(cell_with(n, '"3.1"'))),
        lambda n: cell_with(n, '"3.2"').update(source="assert double(2) == 4"),
    ],
    structure.every_exercise_has_a_folded_hint: [
        lambda n: n.cells.remove(cell_with(n, "<summary>Hint")),
        lambda n: cell_with(n, "<summary>Hint").update(source="Twice."),
        lambda n: cell_with(n, "<summary>Hint").update(source=HINT.replace("\n\n", "\n")),
    ],
    structure.solutions_are_folded_markdown: [
        lambda n: cell_with(n, "<summary>Solution").update(source="```python\n2\n```"),
        lambda n: cell_with(n, "<summary>Solution").update(
            source=cell_with(n, "<summary>Solution").source.replace("\n\n", "\n")
        ),
        lambda n: cell_with(n, "<summary>Solution").update(cell_type="code", outputs=[], execution_count=None),
    ],
    structure.outputs_are_those_of_the_sources: [
        lambda n: cell_with(n, "print(").update(source="print(seed)"),
        lambda n: cell_with(n, "print(").metadata.update(tags=["check"]),
        lambda n: n.cells.pop(4),
        lambda n: n.metadata.workbook.pop("source_hash"),
    ],
    structure.cells_ran_once_from_top_to_bottom: [
        lambda n: cell_with(n, "print(").update(execution_count=17),
        lambda n: cell_with(n, "print(").update(execution_count=None),
    ],
    structure.there_are_no_errors: [
        lambda n: cell_with(n, "print(").outputs.append(new_output("error", ename="KeyError", evalue="", traceback=[])),
    ],
    structure.nothing_is_written_to_stderr: [lambda n: say(n, "UserWarning: old", name="stderr")],
    structure.there_are_no_widgets_and_no_traces_of_the_execution: [
        lambda n: n.metadata.update(widgets={}),
        lambda n: n.metadata.update(papermill={}),
        lambda n: n.cells[2].metadata.update(execution={}),
        lambda n: image(n).data.update({"application/vnd.jupyter.widget-view+json": {}}),
    ],
    structure.images_have_a_text_that_stands_in_for_them: [
        lambda n: image(n).metadata.clear(),
        lambda n: image(n).metadata["image/png"].update(alt=" "),
        lambda n: image(n).data.update({"text/plain": "<Figure size 640x480 with 1 Axes>"}),
        lambda n: image(n).data.update({"image/svg+xml": "<svg/>"}),
        lambda n: image(n).data.update({"text/html": "<img src='a.png'>"}),
        lambda n: cell_with(n, "## 1 · A line").update(source="![](../figures/line.png)"),
        lambda n: cell_with(n, "## 1 · A line").update(source='<img src="a.png" alt="" width="10">'),
    ],
    structure.one_figure_is_the_headline: [
        lambda n: cell_with(n, "Figure()").metadata.clear(),
        lambda n: cell_with(n, "print(").metadata.update(tags=["headline"]),
        lambda n: cell_with(n, "Figure()").outputs.clear(),
    ],
    structure.there_are_no_paths_and_names_of_a_machine: [
        *(
            lambda n, text=text: say(n, text)
            for text in (
                "wrote /home/ada/a.txt",
                "/root/.cache/huggingface",
                "('/tmp/x',)",
                "in /work",
                '"/Users/ada"',
                "C:\\Users\\ada",
                "ada@laptop:~$",
            )
        ),
        lambda n: n.cells[4].update(source="open /home/ada/course"),
        lambda n: cell_with(n, "print(").update(source="Path('/tmp/x').touch()"),
        lambda n: image(n).data.update({"application/json": {"path": "/home/ada"}}),
    ],
    structure.the_code_is_safe: [
        *(
            lambda n, source=source: cell_with(n, "print(").update(source=source)
            for source in (
                "AutoModel.from_pretrained(model_id, trust_remote_code=True)",
                "import numpy, pickle",
                "from pickle import loads",
                "weights = torch.load('a.pt', weights_only=True)",
                "exec('1')",
                "print(eval('1'))",
                "import os\nif seed:\n    os.system('ls')",
                "!pip install trl",
                "%pip install trl",
                "!python -m pip install trl",
                "def :",
            )
        ),
        lambda n: cell_with(n, "<summary>Solution").update(source="<details>\n\n```python\neval('1')\n```"),
    ],
}


@pytest.mark.parametrize(
    ("check", "plant"),
    [
        pytest.param(check, plant, id=f"{check.__name__}-{number}")
        for check, plants in VIOLATIONS.items()
        for number, plant in enumerate(plants, start=1)
    ],
)
def test_a_planted_mistake_is_noticed(good: NotebookNode, check: structure.Check, plant: Callable) -> None:
    plant(good)
    problems = list(check(good, STEM))
    assert problems and all(isinstance(problem, str) and problem for problem in problems)


def test_every_convention_has_a_planted_mistake() -> None:
    assert list(VIOLATIONS) == structure.CHECKS


@pytest.mark.parametrize(
    "text",
    [
        "model.eval() and square root, https://example.org/home/page, https://a.org/tmp",
        "saved to build/run/tmp/a.txt and ~/work, ../home/x, 3/work per unit, data/usr",
        "f: X -> Y, $A:\\mathbb{R}$, shapes (2/tmp), user@example.org",
    ],
)
def test_what_only_looks_like_a_path_or_name_is_allowed(good: NotebookNode, text: str) -> None:
    say(good, text)
    good.cells[4].source = text
    assert list(structure.there_are_no_paths_and_names_of_a_machine(good, STEM)) == []


# nbval, as the Makefile runs it


@pytest.mark.slow
def test_nbval_passes_a_good_notebook_and_names_the_cells_that_are_wrong(good_folder: Path, tmp_path: Path) -> None:
    then = [new_output("stream", text="then\n")]
    compared = {"tags": ["nbval-check-output"]}
    bad = new_notebook(
        cells=[
            new_code_cell("assert 1 + 1 == 3", execution_count=1),
            new_code_cell("print('now')", execution_count=2, outputs=then),
            new_code_cell("print('now')", execution_count=3, outputs=then, metadata=compared),
        ]
    )
    nbformat.write(bad, tmp_path / "04_bad.ipynb")
    files = [good_folder / f"{STEM}.ipynb", tmp_path / "04_bad.ipynb"]
    result = subprocess.run(
        [sys.executable, *NBVAL, "-rA", *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    outcomes = re.findall(r"^(PASSED|FAILED) .*?(\w+)\.ipynb::Cell (\d+)", result.stdout, re.MULTILINE)
    wrong = [(name, cell) for outcome, name, cell in outcomes if outcome == "FAILED"]
    assert wrong == [("04_bad", "0"), ("04_bad", "2")], result.stdout
    cells = len(structure.code_cells(structure.read(files[0])))
    assert [outcome for outcome, name, _ in outcomes if name == STEM] == cells * ["PASSED"]
