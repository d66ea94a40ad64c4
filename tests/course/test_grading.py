"""The grader, on submissions that do what submissions should not do; every one is run for real.

A lesson has pairs of exercises. An answer to the first one of a pair misbehaves; the second has a right answer, which
must be graded as right whatever was done before it. One submission holds many pairs, and so shares its sandbox.
"""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course import grading
from course.__main__ import main
from course.grading import sandbox
from course.grading.grade import _probe
from helpers.errors import CourseError
from helpers.profiles import ROOT

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox: {sandbox.missing()}")

TITLE = "# Exercise 1.1, easy: the sum."
STUB = f'{TITLE}\ndef total(numbers):\n    """The sum of the numbers."""\n    raise NotImplementedError'
RIGHT = f"{TITLE}\ndef total(numbers):\n    return sum(numbers)"
RIGHT_2 = "# Exercise 1.2, easy: the longest.\ndef longest(words):\n    return max(words, key=len)"
STUB_2 = RIGHT_2.partition(" return")[0] + " raise NotImplementedError"
CHECK = """\
def check_total(total):
    expect_equal("the sum of [1, 2]", total(names), 3)
    expect_close("the sum of [0.5]", total([0.5]), 0.5)


check("1.1", check_total, total)"""
CHECK_2 = """\
def check_longest(longest):
    expect_equal("the longest", longest(words), "ccc")


check("1.2", check_longest, longest)"""
HIDDEN = """\
def check_1_1(total):
    expect_equal("the sum of an iterator", total(iter([5, -7])), -2)


"""
SETUP = "from helpers.exercises import check, expect_close, expect_equal, expect_true\nimport torch"
BETWEEN = "words = ['a', 'ccc', 'bb']\nassert profile == 'cpu' and mean(names) == 1.5"


def of_pair(pair: int, text: str) -> str:
    """What is written for exercises 1.1 and 1.2, for another pair of exercises, counted from 1."""
    for number, name in ((1, "total"), (2, "longest")):
        mine = 2 * (pair - 1) + number
        text = re.sub(rf"\b1\.{number}\b", f"1.{mine}", text).replace(name, f"{name}_{pair}")
        text = re.sub(rf"\bcheck_1_{number}\b", f"check_1_{mine}", text)
    return text


def lesson_cells() -> list[tuple[str, str, str]]:
    """Id, tag and source of every cell of the lesson."""
    cells = [
        ("text", "", "# A lesson"),
        ("setup", "setup", SETUP),
        ("parameters", "parameters", 'profile = ""\nseed = 1'),
        ("names", "", "names = [1, 2]\n\n\ndef mean(numbers):\n    return sum(numbers) / len(numbers)"),
    ]
    for pair in range(1, PAIRS + 1):
        parts = [("exercise", STUB), ("check", CHECK), ("solution", RIGHT)]
        for number, kinds in ((1, parts), (2, [("exercise", STUB_2), ("check", CHECK_2), ("solution", RIGHT_2)])):
            if number == 2:
                cells.append((f"between-{pair}", "", BETWEEN))
            for tag, source in kinds:
                cells.append((f"{tag}-{2 * (pair - 1) + number}", tag, of_pair(pair, source)))
    return [*cells, ("after", "", "raise RuntimeError('what follows the last check is not run')")]


def notebook(changes: dict[str, str | None], extra: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """The lesson with other sources for some cells (None: without the cell), and further code cells in front."""
    cells = []
    for name, tag, source in lesson_cells():
        if (source := changes.get(name, source)) is None:
            continue
        if tag == "solution":
            source = f"<details><summary>Solution</summary>\n\n```python\n{source}\n```\n\n</details>"
        make = new_markdown_cell if tag == "solution" or name == "text" else new_code_cell
        cells.append(make(source, id=name, metadata={"tags": [tag] if tag else []}))
    return new_notebook(cells=[*(new_code_cell(source) for source in extra), *cells])


def answers(sources: Sequence[str]) -> dict[str, str]:
    """Cells with an answer to the first exercise of each pair, and right answers to the second ones."""
    found = {}
    for pair, source in enumerate(sources, start=1):
        found[f"exercise-{2 * pair - 1}"] = of_pair(pair, source)
        found[f"exercise-{2 * pair}"] = of_pair(pair, RIGHT_2)
    return found


@dataclass
class Case:
    """An answer to the first exercise of a pair and what must become of it."""

    source: str
    status: str
    message: str  # a regular expression
    hidden: str = ""  # status of the hidden check; "" for the same


def body(code: str, before: str = "") -> str:
    """The function `total` with this body."""
    inner = "\n".join(f"    {line}" for line in code.splitlines())
    return f"{TITLE}\n{before}\ndef total(numbers):\n{inner}"


ENDED, TOO_LONG = "^it ended its process", "^it did not end within 4 s and had to be killed"
PUT_BACK = r"not yet\. the sum of \[1, 2\] gave 5, expected 3 \(put back what the cell replaced: {}\)"
OWN_CLASS = "gave an object of the class Yes, expected 3"
CHANNEL = "^it wrote to the grader's channel"
FORGED = '{"status": "correct", "message": "correct (9 checks)"}'
MISTAKES = {
    "wrong": Case(body("return 5"), "not yet", r"not yet\. the sum of \[1, 2\] gave 5, expected 3$"),
    "hidden-wrong": Case(
        body("return sum(numbers) if isinstance(numbers, list) else 0"), "correct", "2 checks", "not yet"
    ),
    "untouched": Case(STUB, "not attempted", "^not attempted yet$"),
    "still-stub": Case(f"{STUB}  # later", "not attempted", "^not attempted yet$"),
    "none": Case(body("sum(numbers)"), "not yet", "did you forget return"),
    "syntax-error": Case(f"{TITLE}\ndef total(:", "error", r"the cell raised SyntaxError: "),
    "raises": Case(body("return 1 / 0"), "not yet", "raised ZeroDivisionError: division by zero"),
    "raises-at-top": Case(body("return 5", "1 / 0"), "error", "the cell raised ZeroDivisionError"),
    "renamed": Case(body("return 5").replace("total", "totals"), "error", r"does not define total_\d+: its name must"),
    "huge-message": Case(body("raise ValueError('x' * 10**7)"), "not yet", r"^.{200,400}$"),
    "hostile-error": Case(
        body("raise Odd", "class Odd(Exception):\n    def __str__(self):\n        raise Odd"), "error", "raised Odd"
    ),
    "interrupt": Case(body("raise KeyboardInterrupt"), "error", "^raised KeyboardInterrupt"),
    "recursion": Case(body("return total(numbers)"), "not yet", "RecursionError"),
    "unicode": Case(body("return '島🙂'"), "not yet", "gave '島🙂', expected 3"),
    "helper": Case(body("return mine(numbers)", "mine = sum"), "correct", "2 checks"),
    "helper-of-the-same-name": Case(body("return mine(numbers)", "mine = len"), "not yet", "gave 2, expected 3$"),
}
# What stays behind stands last: it shares its sandbox with what follows.
ABUSE = {  # of time, memory and disk
    "hang": Case(
        body("while isinstance(numbers, list):\n    pass\nreturn sum(numbers)"),
        "error",
        "^took more than 4 s",
        "correct",
    ),
    "sleep-at-top": Case(body("return 5", "import time\ntime.sleep(1000)"), "error", "the cell took more than 4 s"),
    "sleep-for-ever": Case(
        body("import time\nwhile True:\n    try:\n        time.sleep(1000)\n    except BaseException:\n        pass"),
        "error",
        TOO_LONG,
    ),
    "memory-hog": Case(
        body("blocks = []\nwhile True:\n    blocks.append(bytearray(b'x') * 20_000_000)"),
        "error",
        "^it held more than 1.1 GB of memory",
    ),
    "memory-at-once": Case(body("return bytearray(10**11)"), "not yet", "raised MemoryError"),
    "huge-output": Case(body("print('x' * 10**7)\nreturn sum(numbers)"), "correct", r"correct \(2 checks\)$"),
    "disk-politely": Case(
        body("try:\n    open('big', 'wb').write(b'x' * 2**28)\nexcept OSError:\n    pass\nreturn sum(numbers)"),
        "correct",
        "2 checks",
    ),
    "disk": Case(
        body("with open('/tmp/big', 'wb') as file:\n    while True:\n        file.write(b'x' * 2**20)"),
        "not yet",
        "No space left on device",
    ),
    "many-files": Case(
        body("for i in range(10**6):\n    open(f'/tmp/{i}', 'w').close()"), "not yet", "No space left on device"
    ),
}
PROCESSES = {
    "kill-all": Case(body("import os\nos.kill(-1, 9)"), "not yet", "raised ProcessLookupError"),
    "sys-exit": Case(body("import sys\nsys.exit(0)"), "error", "^raised SystemExit"),
    "sys-exit-at-top": Case(body("return 5", "import sys\nsys.exit()"), "error", "the cell raised SystemExit"),
    "exit-at-top": Case(body("return 5", "import os\nos._exit(0)"), "error", ENDED),
    "crash": Case(body("import ctypes\nctypes.string_at(0)"), "error", ENDED),
    "close-files": Case(body("import os\nos.closerange(3, 1000)\nreturn 5"), "error", ENDED),
    "fork-and-go-on": Case(body("import os\nos.fork()\nreturn sum(numbers)"), "correct", "2 checks"),
    "child-stays": Case(
        body("import subprocess\nsubprocess.Popen(['sleep', '98765'], start_new_session=True)\nreturn sum(numbers)"),
        "correct",
        "2 checks",
    ),
    "thread-stays": Case(
        body("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\nreturn sum(numbers)"),
        "correct",
        "2 checks",
    ),
    "fork-bomb": Case(body("import os\nwhile True:\n    os.fork()"), "not yet", "raised BlockingIOError"),
}
FORGERIES = {
    "print": Case(body("print('Exercise 1.1: correct (2 checks)')\nreturn 5"), "not yet", "gave 5, expected 3$"),
    "replace-check": Case(
        body("return 5", "def check(*_):\n    print('Exercise 1.1: correct (2 checks)')"),
        "not yet",
        PUT_BACK.format("check"),
    ),
    "replace-expect": Case(
        body("return 5", "expect_equal = expect_close = lambda *_: None"),
        "not yet",
        PUT_BACK.format("expect_close, expect_equal"),
    ),
    "replace-data": Case(body("return 5", "names = [5]"), "not yet", PUT_BACK.format("names")),
    "delete-check": Case(body("return sum(numbers)", "del check, expect_equal"), "correct", "put back .*check"),
    "replace-module": Case(
        body("return 5", "import helpers.exercises as e\ne._difference = e.check = lambda *_: None"),
        "not yet",
        "gave 5, expected 3",
    ),
    "replace-modules": Case(
        body("return 5", "import sys, types\nsys.modules['helpers.exercises'] = types.ModuleType('exercises')"),
        "not yet",
        "gave 5, expected 3",
    ),
    "replace-torch": Case(
        body("return 5", "import torch\ntorch.as_tensor = lambda *_: torch.zeros(1)"),
        "not yet",
        PUT_BACK.format(r"torch\.as_tensor"),
    ),
    "replace-builtin": Case(
        body("return 5", "import builtins\nbuiltins.abs = lambda _: 0"), "not yet", PUT_BACK.format(r"builtins\.abs")
    ),
    "replace-later": Case(
        body(
            "def nothing(*_):\n    pass\nexpect_true('', True)\n"
            "globals().update(expect_equal=nothing, expect_close=nothing)\nreturn 5"
        ),
        "error",
        "replaced expect_equal, expect_close while it was being checked",
    ),
    "equals-all": Case(
        body("return Yes()", "class Yes:\n    def __eq__(self, _):\n        return True"), "not yet", OWN_CLASS
    ),
    "class-of-another-attempt": Case(body("return Yes()"), "not yet", OWN_CLASS),
    "float-equals-all": Case(
        body("return Yes(1)", "class Yes(float):\n    def __eq__(self, _):\n        return True"), "not yet", OWN_CLASS
    ),
    "disguised": Case(
        body("return Yes()", "class Yes:\n    __module__ = 'builtins'\n    def __eq__(self, _):\n        return True"),
        "not yet",
        OWN_CLASS,
    ),
    "write-to-all-files": Case(
        body(
            f"import os\nfor number in range(3, 50):\n    try:\n        os.write(number, b'{FORGED}\\n')\n"
            "    except OSError:\n        pass\nreturn 5"
        ),
        "error",
        CHANNEL,
    ),
    "flood-all-files": Case(
        body(
            "import os\nfor number in range(3, 50):\n    try:\n        while True:\n"
            "            os.write(number, b'x' * 4096)\n    except OSError:\n        pass\nreturn 5"
        ),
        "error",
        CHANNEL,
    ),
    "steal-token": Case(  # with the token it could say anything; here it says something that makes no sense
        body(
            "import os, sys\nframe = sys._getframe()\nwhile 'token' not in frame.f_locals:\n    frame = frame.f_back\n"
            'line = \'{"token": "%s", "status": 7}\\n\' % frame.f_locals[\'token\']\n'
            "os.write(frame.f_locals['answers'], line.encode())\nreturn 5"
        ),
        "error",
        CHANNEL + ".*read it: it uses _getframe, f_back, os.write",
    ),
}
BELONGINGS = {  # of others
    "read-solution": Case(body("return open(NOTEBOOK).read()"), "not yet", "raised FileNotFoundError"),
    "read-neighbour": Case(body("return open(NEIGHBOUR).read()"), "not yet", "raised FileNotFoundError"),
    "search-solution": Case(
        body(
            "import os\nfor folder, folders, files in os.walk('/'):\n"
            "    folders[:] = [name for name in folders if name not in ('proc', 'usr', 'lib')]\n"
            "    assert not [file for file in files if file.startswith('01_small')], folder\nreturn sum(numbers)"
        ),
        "correct",
        "2 checks",
    ),
    "write-outside": Case(body("open(OUTSIDE, 'w').write('was here')"), "not yet", "raised (FileNotFound|Permission)"),
    "write-helpers": Case(body("open('/course/helpers/exercises.py', 'w')"), "not yet", "Read-only file system"),
    "only-the-worker": Case(
        body(
            "import os\nfound = [file for _, _, files in os.walk('/course/course') for file in files]\n"
            "assert found == ['worker.py'], found\nreturn sum(numbers)"
        ),
        "correct",
        "2 checks",
    ),
    "own-folder-is-new": Case(
        body("import os\nassert not os.listdir('.')\nreturn sum(numbers)"), "correct", "2 checks"
    ),
    "write-own": Case(body("open('mine', 'w').write('x')\nreturn sum(numbers)"), "correct", "2 checks"),
    "network": Case(
        body("import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)\nreturn 5"),
        "not yet",
        "raised (ConnectionRefused|OSError|Timeout)",
    ),
    "secrets": Case(
        body("import os\nassert 'GRADING_SECRET' not in str(os.environ)\nreturn sum(numbers)"), "correct", "2 checks"
    ),
    "processes-of-others": Case(
        body("import os\nassert sum(name.isdecimal() for name in os.listdir('/proc')) < 10\nreturn sum(numbers)"),
        "correct",
        "2 checks",
    ),
    "first-process": Case(body("return open('/proc/1/environ').read()"), "not yet", "raised PermissionError"),
    "global-state": Case(
        body("import os, torch\ntorch.set_default_dtype(torch.float64)\nos.chdir('/')\nreturn sum(numbers)"),
        "correct",
        "2 checks",
    ),
}
GROUPS = {
    "abuse": ABUSE,  # it takes longest, and by its name begins
    "processes": PROCESSES,
    "forgeries": FORGERIES,
    "mistakes": MISTAKES,
    "belongings": BELONGINGS,
}
PAIRS = max(map(len, GROUPS.values()))
CASES = [(group, name) for group, cases in GROUPS.items() for name in cases]
# A submission whose cells are not where they were, and what becomes of each pair's first exercise.
REARRANGED = {
    "the cell is gone": ("missing", "no cell begins with # Exercise 1.1"),
    "the cell stands elsewhere": ("correct", "2 checks"),
    "the cell stands elsewhere without its title": ("correct", "2 checks"),
    "a helper stands in another cell": ("not yet", "NameError"),
    "the check was changed": ("not yet", "gave 5"),
    "the checks are gone": ("correct", "2 checks"),
}
# Files that are not graded, and why.
REJECTED = {
    "damaged": ("01_small.ipynb", b'{"cells": [', "not a readable notebook"),
    "empty": ("01_small.ipynb", b"", "not a readable notebook"),
    "other-json": ("01_small.ipynb", b"[1, 2]", "not a readable notebook"),
    "deep": ("01_small.ipynb", b"[" * 100_000, "not a readable notebook"),
    "binary": ("01_small.ipynb", bytes(range(256)), "not a readable notebook"),
    "odd-cells": ("01_small.ipynb", b'{"cells": [1], "nbformat": 4, "nbformat_minor": 5}', "not a readable notebook"),
    "unknown-lesson": ("07_other.ipynb", b"{}", "no lesson has this name: expected for example 01_small.ipynb"),
    "script": ("01_small.py", b"1", "no lesson has this name"),
}
HONEST = [STUB, RIGHT, body("return len(numbers)")]
HIDDEN_CHECKS = "from helpers.exercises import expect_equal\n\n\n"
HIDDEN_CHECKS += "".join(of_pair(pair, HIDDEN) for pair in range(1, PAIRS + 1))


def rearranged() -> nbformat.NotebookNode:
    """The submission of `REARRANGED`."""
    attempts = ["", "", "", body("return mine(numbers)"), body("return 5"), RIGHT]
    changes = {**answers(attempts), "check-9": 'print("correct")', "check-11": None, "check-12": None}
    changes |= {"exercise-1": None, "exercise-3": None, "exercise-5": None}
    elsewhere = (of_pair(2, RIGHT), of_pair(3, RIGHT.replace(TITLE, "# mine")))
    return notebook(changes, (*elsewhere, "mine = sum", "while True:\n    pass", "x = 1"))


@dataclass
class Graded:
    submissions: Path
    out: Path
    arguments: list[str]
    result: subprocess.CompletedProcess
    rows: list[dict[str, str]]
    connections: int

    def row(self, student: str, exercise: str = "") -> dict[str, str]:
        found = [row for row in self.rows if (row["student"], row["exercise"]) == (student, exercise)]
        assert len(found) == 1, f"{student} has {len(found)} rows for {exercise!r}"
        return found[0]


def grade(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "course", "grade", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
        **options,
    )


def hand_in(folder: Path, student: str, content: nbformat.NotebookNode | bytes, name: str = "01_small.ipynb") -> Path:
    (folder / student).mkdir(parents=True, exist_ok=True)
    path = folder / student / name
    path.write_bytes(content if isinstance(content, bytes) else nbformat.writes(content).encode())
    return path


@pytest.fixture(scope="module")
def course_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the instructor's lesson in notebooks/ and a hidden check in hidden/."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "notebooks").mkdir()
    nbformat.write(notebook({}), folder / "notebooks" / "01_small.ipynb")
    (folder / "hidden").mkdir()
    (folder / "hidden" / "01_small.py").write_text(HIDDEN_CHECKS)
    return folder


@pytest.fixture(scope="module")
def graded(course_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graded]:
    """All submissions, graded in one run beside a server that nobody may reach."""
    submissions, out = tmp_path_factory.mktemp("handed-in"), tmp_path_factory.mktemp("grades") / "grades.csv"
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    places = {
        "NOTEBOOK": course_folder / "notebooks" / "01_small.ipynb",
        "NEIGHBOUR": submissions / "honest" / "01_small.ipynb",
        "OUTSIDE": out.parent / "outside",
    }
    for group, cases in GROUPS.items():
        text = [case.source.replace("PORT", str(server.getsockname()[1])) for case in cases.values()]
        found = answers([re.sub("NOTEBOOK|NEIGHBOUR|OUTSIDE", lambda m: repr(str(places[m[0]])), t) for t in text])
        hand_in(submissions, group, notebook(found))
    for student, (name, content, _) in REJECTED.items():
        hand_in(submissions, student, content, name)
    hand_in(submissions, "honest", notebook(answers(HONEST)))
    hand_in(submissions, "rearranged", rearranged())
    (submissions / "link-to-neighbour").mkdir()
    (submissions / "link-to-neighbour" / "01_small.ipynb").symlink_to("../honest/01_small.ipynb")
    (submissions / "link-to-student").symlink_to("honest")
    (submissions / "loose.ipynb").write_bytes(b"{}")
    (submissions / "pipe").mkdir()
    os.mkfifo(submissions / "pipe" / "01_small.ipynb")
    with hand_in(submissions, "too-large", b"").open("wb") as file:
        file.truncate(51 * 2**20)
    hand_in(submissions, '=1+1<b>"', notebook({}))
    no_text = submissions / os.fsdecode(b"no-text-\xff")  # a name that is not UTF-8
    hand_in(submissions, no_text.name, notebook({}))

    arguments = [submissions, "--notebooks", course_folder / "notebooks", "--hidden", course_folder / "hidden"]
    arguments += ["--out", out, "--jobs", "2", "--timeout", "4", "--memory", "1", "--disk", "50", "--processes", "64"]
    result = grade(*arguments, env={**os.environ, "GRADING_SECRET": "1"})
    connections = 0
    try:
        while True:
            server.accept()[0].close()
            connections += 1
    except BlockingIOError:
        server.close()
    assert result.returncode == 0, result.stdout + result.stderr
    with out.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    yield Graded(submissions, out, [*map(str, arguments)], result, rows, connections)


slow = pytest.mark.timeout(3600)  # the first test waits for the run of all


@slow
@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), CASES)
def test_an_answer_gets_the_row_that_says_what_it_did_and_does_not_harm_the_next(
    graded: Graded, group: str, name: str
) -> None:
    case, pair = GROUPS[group][name], 1 + list(GROUPS[group]).index(name)
    found, hidden, after = (graded.row(group, of_pair(pair, exercise)) for exercise in ("1.1", "1.1 hidden", "1.2"))
    assert found["status"] == case.status, found
    assert re.search(case.message, found["message"]), found
    assert hidden["status"] == (case.hidden or case.status), hidden
    assert after["status"] == "correct", after


@slow
@pytest.mark.slow
def test_exercises_are_found_where_they_stand_and_other_cells_are_not_run(graded: Graded) -> None:
    for pair, (what, (status, message)) in enumerate(REARRANGED.items(), start=1):
        row = graded.row("rearranged", of_pair(pair, "1.1"))
        assert row["status"] == status and message in row["message"], (what, row)
    assert graded.row("rearranged")["message"].endswith(": 4 code cells")


@slow
@pytest.mark.slow
@pytest.mark.parametrize("student", REJECTED)
def test_a_file_that_cannot_be_graded_is_one_row_that_says_why(graded: Graded, student: str) -> None:
    rows = [row for row in graded.rows if row["student"] == student]
    assert [row["status"] for row in rows] == ["rejected"]
    assert REJECTED[student][2] in rows[0]["message"]


@slow
@pytest.mark.slow
def test_links_pipes_and_loose_files_are_not_opened(graded: Graded) -> None:
    rejected = {(row["student"], row["notebook"]): row["message"] for row in graded.rows if row["status"] == "rejected"}
    assert rejected["link-to-neighbour", "01_small.ipynb"] == rejected["pipe", "01_small.ipynb"] == "not a plain file"
    assert rejected["", "link-to-student"] == rejected["", "loose.ipynb"] == "expected a folder for each student"
    assert rejected["too-large", "01_small.ipynb"] == "larger than 50 MiB"


@slow
@pytest.mark.slow
def test_honest_submissions_are_unaffected_by_the_others(graded: Graded) -> None:
    for pair, status in enumerate(["not attempted", "correct", "not yet"], start=1):
        exercises = [of_pair(pair, exercise) for exercise in ("1.1", "1.1 hidden", "1.2")]
        assert [graded.row("honest", exercise)["status"] for exercise in exercises] == [status, status, "correct"]
    assert not [row for row in graded.rows if row["student"] in ("honest", *GROUPS) and not row["exercise"]]


@slow
@pytest.mark.slow
def test_nothing_reaches_the_network_the_disk_or_stays_behind(graded: Graded) -> None:
    assert graded.connections == 0
    assert sorted(path.name for path in graded.out.parent.iterdir()) == [
        ".lock",
        "grades.csv",
        "grades.html",
        "grades.json",
    ]
    assert not [process for process in psutil.process_iter(["cmdline"]) if "98765" in (process.info["cmdline"] or [])]


@slow
@pytest.mark.slow
def test_the_table_and_the_page_hold_names_as_text(graded: Graded) -> None:
    assert graded.row("'=1+1<b>\"", "1.1")["status"] == graded.row("no-text-?", "1.1")["status"] == "not attempted"
    page = graded.out.with_suffix(".html").read_text()
    assert "=1+1&lt;b&gt;" in page and "<b>" not in page
    lines = graded.result.stdout.splitlines()
    assert len(lines) == len(list(graded.submissions.iterdir())) + 2
    assert lines[-1] == f"table: {graded.out}; page: {graded.out.with_suffix('.html')}"
    said = rf"^rearranged/01_small.ipynb .* \d+/{3 * PAIRS} correct; 1.1 missing, 1.1 hidden missing, "
    assert any(re.search(said, line) for line in lines)


@slow
@pytest.mark.slow
def test_only_what_has_changed_is_graded_again(graded: Graded) -> None:
    hand_in(graded.submissions, "honest", notebook({"exercise-1": of_pair(1, RIGHT)}))
    result = grade(*graded.arguments)
    assert result.returncode == 0, result.stderr
    again = [
        line for line in result.stdout.splitlines() if re.search(r"/\d+ correct", line) and "unchanged" not in line
    ]
    assert [line.split()[0] for line in again] == ["honest/01_small.ipynb"]
    with graded.out.open(newline="", encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [row for row in rows if row["student"] != "honest"] == [r for r in graded.rows if r["student"] != "honest"]
    assert next(row for row in rows if row["student"] == "honest")["status"] == "correct"


# The grader itself


def test_a_sandbox_that_does_not_hold_is_noticed_before_anything_is_run() -> None:
    user = 900_000_000 + os.getpid()
    with pytest.raises(CourseError, match=r"does not hold here \(raised RuntimeError: /usr can be seen\)"):
        _probe(grading.Settings(), [Path("/usr")], user, threading.Event())


def test_a_check_that_the_solution_does_not_pass_stops_the_grading(course_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "01_small.py").write_text(HIDDEN_CHECKS.replace(", -2)", ", 2)"))
    hand_in(tmp_path / "submissions", "ada", notebook({"exercise-1": of_pair(1, RIGHT)}))
    with pytest.raises(CourseError, match=r"^The lesson's own solution of 01_small 1\.1 hidden is graded 'not yet'"):
        grading.grade(
            tmp_path / "submissions",
            tmp_path / "grades.csv",
            notebooks=course_folder / "notebooks",
            hidden=tmp_path,
            settings=grading.Settings(unsafe=True),
        )


@pytest.mark.slow
def test_a_killed_grader_leaves_no_process_behind_and_keeps_what_it_has(course_folder: Path, tmp_path: Path) -> None:
    submissions, out = tmp_path / "submissions", tmp_path / "out" / "grades.csv"
    hand_in(submissions, "ada", notebook({"exercise-1": of_pair(1, RIGHT)}))
    hand_in(
        submissions,
        "bela",
        notebook({"exercise-1": of_pair(1, body("import subprocess\nsubprocess.run(['sleep', '54321'])"))}),
    )
    arguments = [submissions, "--notebooks", course_folder / "notebooks", "--out", out, "--timeout", "500"]
    grader = subprocess.Popen(
        [sys.executable, "-m", "course", "grade", *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL
    )

    def sleepers() -> list[psutil.Process]:
        return [p for p in psutil.process_iter(["cmdline"]) if "54321" in (p.info["cmdline"] or [])]

    def wait_until(condition: object) -> None:
        end = time.monotonic() + 300
        while not condition():
            assert time.monotonic() < end, "it did not happen in time"
            time.sleep(0.1)

    try:
        wait_until(lambda: grader.poll() is not None or sleepers())
        assert grader.poll() is None
        grader.send_signal(signal.SIGKILL)
        grader.wait(timeout=60)
        wait_until(lambda: not sleepers())
    finally:
        grader.kill()
    state = json.loads(out.with_suffix(".json").read_text())
    assert [rows[0]["student"] for key, rows in state.items() if not key.startswith("reference")] == ["ada"]
    with out.open(newline="") as table:
        statuses = [row["status"] for row in csv.DictReader(table)]
    assert statuses[0] == "correct" and {*statuses[1:]} == {"not attempted"}


def test_without_a_sandbox_it_refuses_unless_told_otherwise(
    course_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submissions, notebooks, out = tmp_path / "submissions", course_folder / "notebooks", tmp_path / "grades.csv"
    hand_in(submissions, "ada", notebook({"exercise-1": of_pair(1, RIGHT)}))
    monkeypatch.setattr(sandbox, "missing", lambda: "no namespaces")
    with pytest.raises(CourseError, match=r"cannot be shut in here \(no namespaces\): grade on Linux, or in a contain"):
        grading.grade(submissions, out, notebooks=notebooks)
    rows = grading.grade(submissions, out, notebooks=notebooks, settings=grading.Settings(unsafe=True))
    assert [row.status for row in rows] == ["correct", *["not attempted"] * (2 * PAIRS - 1)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["NOWHERE"], "NOWHERE is no folder: give the one that holds a folder for each student."),
        (["HERE", "--hidden", "NOWHERE"], "NOWHERE is no folder: give the one that holds files such as 03_name.py."),
        (["HERE", "--out", "HERE/grades.txt"], "HERE/grades.txt does not end in .csv: name the table"),
    ],
)
def test_a_wrong_argument_is_one_sentence(
    course_folder: Path, tmp_path: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    def fill_in(text: str) -> str:
        return text.replace("NOWHERE", f"{tmp_path}/nowhere").replace("HERE", str(tmp_path))

    with pytest.raises(CourseError) as refused:
        main(["grade", "--notebooks", str(course_folder / "notebooks"), *map(fill_in, arguments)])
    assert str(refused.value).startswith(fill_in(sentence))


def test_a_hidden_checker_of_no_exercise_is_named(course_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "01_small.py").write_text("def check_1_99(total):\n    pass\n")
    with pytest.raises(CourseError, match=r"01_small.py has a checker for 1.99, which is no exercise of 01_small"):
        grading.read_lesson(course_folder / "notebooks" / "01_small.ipynb", tmp_path, grading.Settings())
