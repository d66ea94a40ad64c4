"""The runner, on small notebooks that do what notebooks should not do; every one is executed for real."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from course import notebooks
from course.__main__ import main
from course.runner.keys import lesson_key
from course.runner.refresh import update_readme
from course.runner.report import read_report
from helpers.profiles import ROOT

PARAMETERS = 'profile = "auto"\nseed = 0\nmodel_id = ""'
HEADER = "# Title\n\n" + "cpu 0 s · 0 GB | t4 0 min · 0 GB"
# Leaves the ids of its kernel and of a process started by it, then waits until there is a file named go.
WAITS = """\
import os, subprocess, time
from pathlib import Path
child = subprocess.Popen(["sleep", "300"])
Path("ids.partial").write_text(f"{os.getpid()} {child.pid}")
Path("ids.partial").rename("ids")
while not Path("go").exists():
    time.sleep(0.1)
child.kill()
"""


def write_notebook(path: Path, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    """Write a notebook with a title, a cell tagged `parameters` (unless None) and these code cells."""
    cells = [new_markdown_cell(HEADER)]
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    path.parent.mkdir(exist_ok=True, parents=True)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(new_notebook(cells=[*cells, *map(new_code_cell, sources)], metadata=metadata), path)
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "course", *map(str, arguments)]


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **options
    )


def row(out: Path, name: str) -> dict:
    rows = json.loads((out / "report.json").read_text())["notebooks"]
    return next(row for row in rows if row["notebook"] == name)


def statuses(result: subprocess.CompletedProcess) -> dict[str, str]:
    """The last column of the printed table by notebook."""
    return dict(re.findall(r"^(\d\d_\w+) .* GB  (.*)$", result.stdout, re.MULTILINE))


# Bad notebooks, all in one run


@dataclass
class Course:
    out: Path
    result: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """One run over notebooks that fail in all ways, and two that pass."""
    folder, out = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("bad") / "out"
    write_notebook(folder / "01_good.ipynb", "print(profile, seed, model_id)")
    write_notebook(folder / "02_raises.ipynb", "1", "raise ValueError('\\x1b[31mred <b> & \"x\"\\x1b[0m\\nmore')", "2")
    write_notebook(folder / "03_hangs.ipynb", "import time\ntime.sleep(1000)")
    write_notebook(folder / "04_killed.ipynb", "import os\nos.kill(os.getpid(), 9)")
    write_notebook(folder / "05_exits.ipynb", "import sys\nsys.exit(0)", "1")
    write_notebook(folder / "06_no_tag.ipynb", "1", parameters=None)
    write_notebook(folder / "07_unknown.ipynb", "1", parameters='profile = "auto"\nmodel_id = ""')
    (folder / "08_unreadable.ipynb").write_text('{"cells": [')
    allocate = "import time\nblock = bytearray(b'x') * 300_000_000\ntime.sleep(1)"
    write_notebook(folder / "09_large.ipynb", allocate)
    return Course(out, run("run", "--notebooks", folder, "--out", out, "--jobs", 2, "--timeout", 10, "--seed", 7))


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("02_raises", 'failed: code cell 3 (raise ValueError(\'\\x1b[31mred <b> & "...): ValueError: red <b> & "x"'),
        ("03_hangs", "failed: code cell 2 (import time): it did not end within 10 s (--timeout)"),
        ("04_killed", "failed: code cell 2 (import os): the kernel was killed, most likely out of memory"),
        (
            "05_exits",
            "failed: code cell 2 (import sys): it ended the notebook (sys.exit?) and the cells below did not run",
        ),
        ("06_no_tag", "failed: no cell is tagged parameters: tag the one that assigns profile, seed and model_id"),
        ("07_unknown", "failed: unknown parameter seed: the cell tagged parameters must assign it"),
    ],
)
@pytest.mark.slow
def test_a_bad_notebook_is_one_line_that_says_what_happened(bad: Course, name: str, line: str) -> None:
    assert statuses(bad.result)[name] == line


@pytest.mark.slow
def test_an_unreadable_notebook_is_one_line_that_names_the_file(bad: Course) -> None:
    assert statuses(bad.result)["08_unreadable"].startswith("failed: 08_unreadable.ipynb is not a readable notebook (")


@pytest.mark.slow
def test_notebooks_after_the_bad_ones_still_run_and_the_exit_status_is_1(bad: Course) -> None:
    assert statuses(bad.result)["01_good"] == statuses(bad.result)["09_large"] == "ok"
    assert bad.result.returncode == 1
    assert bad.result.stdout.endswith(f"2 of 9 notebooks passed; report: {bad.out / 'report.html'}\n")
    assert bad.result.stderr == ""
    assert len(bad.result.stdout.splitlines()) == 10  # one a notebook, and the last


@pytest.mark.slow
def test_parameters_reach_the_notebook(bad: Course) -> None:
    executed = nbformat.read(bad.out / "01_good.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "cpu 7 \n"


@pytest.mark.slow
def test_the_row_counts_cells_and_measures_time_and_memory(bad: Course) -> None:
    good, raises, large = (row(bad.out, name) for name in ("01_good", "02_raises", "09_large"))
    assert (good["cells_run"], good["cells"], raises["cells_run"], raises["cells"]) == (2, 2, 3, 4)
    assert good["gib"] < 300e6 / 2**30 < large["gib"] < 0.6
    assert large["seconds"] > 1


@pytest.mark.slow
def test_the_report_is_well_formed_and_its_links_resolve(bad: Course) -> None:
    page = ElementTree.fromstring((bad.out / "report.html").read_text())
    assert len(page.findall(".//tr")) == 10
    links = [link.get("href") for link in page.iter("a")]
    assert {"01_good.ipynb", "02_raises.ipynb", "02_raises.log", "08_unreadable.log"} <= set(links)
    assert all((bad.out / link).is_file() for link in links)
    assert 'ValueError: red <b> & "x"' in "".join(page.itertext())


@pytest.mark.slow
def test_the_report_holds_no_path_of_the_machine(bad: Course) -> None:
    for name in ("report.json", "report.html"):
        assert not notebooks.MACHINE_PATH.search((bad.out / name).read_text())


@pytest.mark.slow
def test_nothing_but_report_notebooks_and_logs_stays_in_the_folder(bad: Course) -> None:
    assert {path.suffix or path.name for path in bad.out.iterdir()} == {".ipynb", ".log", ".json", ".html", ".lock"}


# What has passed is not run again


@pytest.mark.slow
def test_only_what_has_changed_is_run_again(tmp_path: Path) -> None:
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    source = "from pathlib import Path\nwith Path('runs').open('a') as file:\n    file.write('x')"
    notebook = write_notebook(folder / "03_lesson.ipynb", source)
    other = write_notebook(folder / "04_other.ipynb", "1")

    def runs(*arguments: object) -> tuple[str, int]:
        """What the line of the lesson says, and how often it has run so far."""
        result = run("run", "--notebooks", folder, "--out", out, "--only", "3", *arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        assert list(statuses(result)) == ["03_lesson"]
        return statuses(result)["03_lesson"], len((folder / "runs").read_text())

    assert runs() == ("ok", 1)
    assert runs() == ("ok (unchanged)", 1)
    assert runs("--fresh") == ("ok", 2)
    assert runs("--seed", 1) == ("ok", 3)
    write_notebook(notebook, source, "2 + 2")
    assert runs("--seed", 1) == ("ok", 4)
    assert runs("--seed", 1) == ("ok (unchanged)", 4)
    assert not (out / other.name).exists()


def test_the_key_changes_with_what_the_lesson_reaches_and_with_nothing_else(tmp_path: Path) -> None:
    sources = {
        "helpers/__init__.py": "",
        "helpers/used.py": "from helpers.package import name",
        "helpers/package/__init__.py": "from helpers.package.inner import name",
        "helpers/package/inner.py": "import os",
        "helpers/late.py": 'folder = "model"',
        "helpers/command/__init__.py": "",
        "helpers/command/__main__.py": "1",
        "recipes/recipe.py": "1",
        "data/model/weights": "1",
        "data/table.json": "1",
        "requirements.txt": "1",
        "constraints.txt": "1",
    }
    others = ["helpers/unused.py", "course/slides.py", "data/claims.json", "data/other/weights", "data/model/README.md"]
    for name, text in [*sources.items(), *((name, "1") for name in others)]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    notebook = write_notebook(
        tmp_path / "notebooks" / "03_a.ipynb",
        "from helpers import used\n%matplotlib inline",
        'def later():\n    import helpers.late\n\n\ncommand = ["-m", "helpers.command"]',
        'from recipes.recipe import x\n\nopen("data/table.json")',
    )
    seen = {key := lesson_key(notebook, root=tmp_path)}
    for name in others:
        (tmp_path / name).write_text("2")
        assert lesson_key(notebook, root=tmp_path) == key, name
    for name in sources:
        with (tmp_path / name).open("a") as file:
            file.write("\n# edited")
        seen.add(lesson_key(notebook, root=tmp_path))
    assert len(seen) == 1 + len(sources)

    before = lesson_key(notebook)
    assert lesson_key(notebook, ["seed"]) != before
    read = nbformat.read(notebook, as_version=4)
    read.cells[0].source = read.cells[0].source.replace("cpu 0 s · 0 GB", "cpu 95 s · 1.2 GB")
    read.cells[-1].outputs = [new_output("stream", text="1")]
    assert notebooks.source_hash(read) == notebooks.source_hash(nbformat.read(notebook, as_version=4))
    read.cells[-1].metadata.tags = ["check"]
    assert notebooks.source_hash(read) != notebooks.source_hash(nbformat.read(notebook, as_version=4))


# Runs that are interrupted


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_process_behind_and_the_next_one_continues(tmp_path: Path) -> None:
    folder, out = tmp_path / "notebooks", tmp_path / "out"
    write_notebook(folder / "01_quick.ipynb", "1")
    write_notebook(folder / "02_waits.ipynb", WAITS)
    arguments = ["run", "--notebooks", folder, "--out", out]

    def hear_interrupts() -> None:
        """A shell starts its background jobs, such as these tests, deaf to SIGINT, and processes inherit that."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def interrupt(number: int) -> subprocess.Popen:
        """Start a run, send it the signal while the second notebook is running, and see that its processes end."""
        runner = subprocess.Popen(
            command(*arguments),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=hear_interrupts,
        )
        try:
            wait_until(lambda: (folder / "ids").exists())
            processes = [psutil.Process(int(text)) for text in (folder / "ids").read_text().split()]
            if number == signal.SIGINT:
                second = run(*arguments)
                assert (second.returncode, second.stdout) == (2, "")
                assert second.stderr == (
                    f"error: Another run (process {runner.pid}) writes to {out}: "
                    "wait until it ends, or choose another --out.\n"
                )
            runner.send_signal(number)
            runner.wait(timeout=60)
        finally:
            runner.kill()
        wait_until(lambda: not any(map(alive, processes)), seconds=20)
        (folder / "ids").unlink()
        assert not [path for path in out.iterdir() if path.name.startswith(".report")]
        return runner

    stopped = interrupt(signal.SIGINT)
    assert stopped.returncode == 130
    assert "02_waits" in stopped.stdout.read()
    assert (row(out, "01_quick")["status"], row(out, "02_waits")["status"]) == ("ok", "interrupted")

    killed = interrupt(signal.SIGKILL)
    assert "ok (unchanged)" in killed.stdout.read()
    assert [found.status for found in read_report(out)] == ["ok", "interrupted"]

    (folder / "go").touch()
    result = run(*arguments)
    assert statuses(result) == {"01_quick": "ok (unchanged)", "02_waits": "ok"}
    assert result.returncode == 0


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie, which waits for its parent to ask for its exit status, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


# Refresh


@pytest.fixture(scope="module")
def refreshed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes], subprocess.CompletedProcess]:
    """A folder after `refresh`, the files as they were before, and what the command printed."""
    folder = tmp_path_factory.mktemp("refreshed")
    lesson = write_notebook(
        folder / "01_lesson.ipynb",
        "import sys\nfrom pathlib import Path\nfrom tqdm.auto import tqdm\nfor _ in tqdm(range(3)):\n    pass",
        f"print({str(ROOT)[::-1]!r}[::-1] + '/data/shima', Path.home() / 'cache')\nprint('a warning', file=sys.stderr)",
        "",
        "import ipywidgets\nfrom IPython.display import display, HTML\ndisplay(ipywidgets.IntSlider())\n"
        "display(HTML('<progress value=1></progress>'))",
        "40 + 2",
    )
    notebook = nbformat.read(lesson, as_version=4)
    notebook.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {}}
    notebook.metadata.papermill = {"output_path": str(folder)}
    notebook.metadata.workbook = {"lesson": "01", "budget": {"t4": {"seconds": 60, "gib": 2}}}
    nbformat.write(notebook, lesson)
    write_notebook(folder / "02_fails.ipynb", "print('new')", "1 / 0")
    write_notebook(folder / "03_path.ipynb", "import tempfile\nprint(tempfile.mkdtemp())")
    no_budget = nbformat.read(write_notebook(folder / "04_no_budget.ipynb"), as_version=4)
    no_budget.cells[0].source = "# Title"
    nbformat.write(no_budget, folder / "04_no_budget.ipynb")
    before = {path.stem: path.read_bytes() for path in folder.glob("*.ipynb")}
    return folder, before, run("refresh", "--notebooks", folder, "--out", folder / "out")


@pytest.mark.slow
def test_refresh_writes_outputs_back_and_nothing_that_execution_leaves_behind(refreshed) -> None:
    folder, before, result = refreshed
    assert statuses(result)["01_lesson"] == "ok"
    notebook = nbformat.read(folder / "01_lesson.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, None, 4, 5]
    assert code[1].outputs == [] and code[4].outputs == []  # the progress bar and the widget
    assert [output.text for output in code[2].outputs] == ["data/shima ~/cache\n", "a warning"]
    assert code[5].outputs[0].data["text/plain"] == "42"
    assert set(notebook.metadata) == {"kernelspec", "workbook"}
    assert all("papermill" not in cell.metadata and "execution" not in cell.metadata for cell in notebook.cells)
    assert [cell.id for cell in notebook.cells] == [cell["id"] for cell in json.loads(before["01_lesson"])["cells"]]
    assert not notebooks.MACHINE_PATH.search((folder / "01_lesson.ipynb").read_text())


def test_the_readme_gets_the_table_of_the_lessons_and_keeps_the_rest(tmp_path) -> None:
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "01_first.ipynb", "1")
    update_readme(tmp_path / "notebooks")  # no README.md: nothing to do
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("before\n<!-- lessons -->\nold\n<!-- /lessons -->\nafter\n")
    update_readme(tmp_path / "notebooks")
    before, *table, after = (tmp_path / "README.md").read_text().splitlines()
    assert (before, after) == ("before", "after") and "old" not in table
    assert table[1].startswith("| lesson |") and "(notebooks/01_first.ipynb)" in table[3] and len(table) == 5


def test_the_readme_shows_the_headline_figure_of_each_lesson_that_has_one(tmp_path: Path) -> None:
    figure = new_output("display_data", data={"image/png": "aGVsbG8=", "text/plain": "A line & a point."})
    path = write_notebook(tmp_path / "notebooks" / "01_first.ipynb", "draw()")
    write_notebook(tmp_path / "notebooks" / "02_second.ipynb", "1")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].outputs, notebook.cells[-1].metadata["tags"] = [figure], ["headline"]
    nbformat.write(notebook, path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "01_first.png").write_bytes(b"hello")
    (tmp_path / "README.md").write_text("<!-- figures -->\nold\n<!-- /figures -->\n")
    update_readme(tmp_path / "notebooks")
    _, line, _ = (tmp_path / "README.md").read_text().splitlines()
    assert line.startswith('<a href="notebooks/01_first.ipynb"><img src="figures/01_first.png"')
    assert 'alt="A line &amp; a point."' in line


@pytest.mark.slow
def test_refresh_writes_the_measured_budget(refreshed) -> None:
    folder, _, _ = refreshed
    notebook = nbformat.read(folder / "01_lesson.ipynb", as_version=4)
    measured, budget = row(folder / "out", "01_lesson"), notebook.metadata.workbook.budget
    assert budget.cpu == {"seconds": round(measured["seconds"]), "gib": round(measured["gib"], 2)}
    assert budget.t4 == {"seconds": 60, "gib": 2}
    measured = f"cpu {budget.cpu.seconds} s · {budget.cpu.gib * 2**30 / 1e9:.1f} GB"
    assert f"{measured} | core 5 min, all 5 min | exercises 0 min | t4" in notebook.cells[0].source
    assert notebook.metadata.workbook.source_hash == notebooks.source_hash(notebook)


@pytest.mark.slow
def test_refresh_leaves_a_notebook_that_fails_untouched(refreshed) -> None:
    folder, before, result = refreshed
    said = statuses(result)
    assert said["02_fails"] == "failed: code cell 3 (1 / 0): ZeroDivisionError: division by zero"
    assert re.fullmatch(r"failed: code cell 2 prints /\S+: print no path, or one relative to ROOT", said["03_path"])
    assert said["04_no_budget"] == "failed: its first cell has no line for the budget: write 'cpu 0 s · 0 GB' there"
    for name in ("02_fails", "03_path", "04_no_budget"):
        assert (folder / f"{name}.ipynb").read_bytes() == before[name]
    assert result.returncode == 1


@pytest.mark.slow
def test_a_refreshed_notebook_is_unchanged_for_the_next_run(refreshed) -> None:
    folder, _, _ = refreshed
    result = run("run", "--notebooks", folder, "--out", folder / "out", "--only", "01")
    assert statuses(result) == {"01_lesson": "ok (unchanged)"}


# The command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two lessons; the second has been measured."""
    folder = tmp_path_factory.mktemp("course") / "notebooks"
    write_notebook(folder / "01_first.ipynb", "1")
    second = write_notebook(folder / "02_second.ipynb", "1")
    notebook = nbformat.read(second, as_version=4)
    budget = {"cpu": {"seconds": 90, "gib": 1.0}}
    notebook.metadata.workbook = {"lesson": "02", "title": "Second steps", "prerequisites": ["01"], "budget": budget}
    nbformat.write(notebook, second)
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--only", "17"], "There is no lesson 17: choose from 01_first, 02_second."),
        (["--profile", "gpu"], "There is no profile 'gpu': use one of cpu, t4, large, or auto."),
        (
            ["--notebooks", "EMPTY"],
            "There is no notebook named like 03_name.ipynb in EMPTY: give the right --notebooks.",
        ),
        (["--out", "FILE/out"], "Cannot write FILE/out (Not a directory): make room or use --out."),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_status_2(
    tmp_path: Path, folder: Path, arguments: list[str], sentence: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    def fill_in(text: str) -> str:
        return text.replace("EMPTY", f"{tmp_path}/empty").replace("FILE", f"{tmp_path}/file")

    result = run("run", "--notebooks", folder, "--out", tmp_path / "out", *map(fill_in, arguments))
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"error: {fill_in(sentence)}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--jobs", "0"], ["--jobs", "two"], ["--timeout", "-1"]])
def test_a_number_that_makes_no_sense_is_refused(capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["run", *arguments])
    assert refused.value.code == 2
    assert f"{arguments[1]} is not a whole number of at least" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path, folder: Path) -> None:
    # A limit on the size of files stands in for the full disk: the system refuses to write more than that.
    limited = ["bash", "-c", 'ulimit -f 0 && exec "$@"', "bash"]
    result = subprocess.run(
        limited + command("run", "--notebooks", folder, "--out", tmp_path / "out"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: Cannot write .*/out \(File too large\): make room or use --out\.\n", result.stderr)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_list_shows_lessons_budget_and_prerequisites(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["list", "--notebooks", str(folder)])
    first, second = capsys.readouterr().out.splitlines()
    study = "core 5 min, all 5 min | exercises 0 min"
    assert first.split() == ["01", "first", "-", "-", *study.split(), "after", "-"]
    assert second.split() == ["02", "Second", "steps", "1.5", "min", "1.1", "GB", *study.split(), "after", "01"]


def test_list_as_markdown_is_a_table_with_links_and_badges(folder: Path, capsys: pytest.CaptureFixture) -> None:
    main(["list", "--notebooks", str(folder), "--markdown"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {8}
    begin = "| 02 | [Second steps](notebooks/02_second.ipynb) | 1.5 min | 1.1 GB | "
    begin += "core 5 min, all 5 min; exercises 0 min | "
    assert lines[3].startswith(f"{begin}01 | [![Open in")


@pytest.mark.slow
def test_a_terminal_shows_what_is_running(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    write_notebook(folder / "01_slow.ipynb", "import time\ntime.sleep(1)")
    terminal, its_end = pty.openpty()
    runner = subprocess.Popen(
        command("run", "--notebooks", folder, "--out", tmp_path / "out"), cwd=ROOT, stdout=its_end, stderr=its_end
    )
    os.close(its_end)
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    assert runner.wait(timeout=60) == 0
    assert re.search(rb"01_slow: starting, \d s.*01_slow: cell \d, \d+ s", shown, re.DOTALL)
    assert re.search(rb"01_slow +2/2 cells .* ok\r\n", shown)
