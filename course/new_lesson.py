"""Starts a new lesson: `python -m course new-lesson 11_topic` writes a notebook that runs, and the test beside it.

The notebook has every part that a lesson must have, around a small measurement that the author replaces. The module
knows the anatomy of a lesson and nothing about its subject.
"""

import argparse
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from helpers.colab import SETUP_CELL, badge
from helpers.errors import CourseError, exit_cleanly
from helpers.files import write_atomically
from helpers.profiles import ROOT

NAME = re.compile(r"\d\d_[a-z][a-z0-9_]*")

TITLE = """\
# {number} · {title}: say what the reader will find out

{badge}

One paragraph of promise: which question this lesson asks, what the reader will have written, and which numbers they
will have measured at the end.

**cpu 0 s · 0 GB | t4 1 min · 2 GB**

**You will**

1. write the loss of a language model and find it equal to PyTorch's;
2. measure how it falls along a text;
3. end with a table of what you measured.

**Prerequisites:** lesson 01."""

PARAMETERS = """\
profile = ""  # "" chooses by hardware; or "cpu", "t4", "large"
model_id = ""  # another model: a hub id, or a folder in hub format
text_id = ""  # another text: a hub dataset or a .jsonl file with a field "text"
seed = 0
budget = 1.0  # share of all documents; the lesson's claims are asserted from 1.0 on"""

SETTINGS = """\
import math

import torch
import torch.nn.functional as F
from IPython.display import Markdown
from torch import Tensor

from helpers import plots
from helpers.data import pack, text_dataset
from helpers.exercises import check, expect_close
from helpers.models import load_model
from helpers.profiles import get_profile

machine = get_profile(profile, model_id or None)
SETTINGS = {"cpu": {"documents": 120}, "t4": {"documents": 200}, "large": {"documents": 200}}  # all that differs
settings = SETTINGS[machine.name]
plots.use_style()
print(f"profile {machine.name}: {machine.model_id.split('/')[-1]} on {machine.device} in {machine.dtype}, seed {seed}")
"""

CLAIM = """\
measured = {}  # for the table at the end
strict = budget >= 1 and machine.model_id == "shima-4m"


def claim(statement: str, holds: bool) -> None:
    \"\"\"Print a claim about the numbers above; for shima-4m at full budget it must hold.\"\"\"
    print(("holds: " if holds else "DOES NOT HOLD: ") + statement)
    assert holds or not strict, statement


model, tokenizer = load_model(machine)
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")"""

QUESTION = """\
## 1 · The loss along a text

**Question.** Is a token easier to predict when more text stands before it?

The derivation, short. With logits $z$ over the vocabulary and the right token $t$, the loss of one position is
$-\\log p_t = \\log \\sum_v e^{z_v} - z_t$."""

METHOD = """\
def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    \"\"\"Loss of each token but the first, in nats.\"\"\"
    scores = logits[:, :-1].float()  # (batch, seq - 1, vocab)
    right = ids[:, 1:, None]  # (batch, seq - 1, 1)
    return scores.logsumexp(-1) - scores.gather(-1, right).squeeze(-1)  # (batch, seq - 1)


generator = torch.Generator().manual_seed(seed)
logits, ids = torch.randn(2, 5, 11, generator=generator), torch.randint(11, (2, 5), generator=generator)
library = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
difference = (token_losses(logits, ids).flatten() - library).abs().max().item()
print(f"largest difference to PyTorch: {difference:.1e}")
assert difference < 1e-5"""

MEASUREMENT = """\
texts = text_dataset(text_id or machine, max(20, round(settings["documents"] * budget)), seed=seed)["text"]
documents = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
rows = torch.tensor(list(pack(documents, 128)))  # (rows, seq)
parts = [part.to(machine.device) for part in rows.split(16)]
with torch.no_grad():
    losses = torch.cat([token_losses(model(input_ids=part).logits, part).cpu() for part in parts])  # (rows, seq - 1)
by_position = losses.mean(0)
early, late = by_position[:8].mean().item(), by_position[-32:].mean().item()
measured["loss of tokens 2 to 9, of the last 32"] = f"{early:.2f}, {late:.2f} nats ({len(rows)} rows)"
print(f"{len(rows)} rows: {early:.2f} nats at the beginning, {late:.2f} at the end")"""

PLOT = """\
smooth = by_position.unfold(0, 8, 1).mean(-1)  # over 8 positions
figure = plots.curve(
    {"loss": (range(5, 5 + len(smooth)), smooth.tolist())},
    title="The more text before a token, the easier it is",
    xlabel="position in the row (tokens)",
    ylabel="loss (nats)",
)
plots.show(figure, alt="The loss falls steeply over the first tokens of a row, then slowly.")
claim("the last 32 tokens cost at least 0.3 nats less than the first 8", early - late >= 0.3)"""

SEEN = """\
One sentence that says what was seen; its numbers are those that the code printed."""

EXERCISES = """\
## 2 · Exercises

Three to six, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the
check below it, which answers at once. A hint and the solution are folded away under the check."""

# What the student sees, the cases of the check, the hint, and the solution's one line.
EXERCISE_PARTS = [
    (
        "easy: from losses to perplexity",
        'def perplexity(losses: Tensor) -> float:\n    """exp of the mean of the losses (nats), any shape."""',
        ['"of 2 losses", {name}(torch.tensor([0.0, 2.0])), math.e', '"of 0", {name}(torch.zeros(2, 3)), 1.0'],
        "Averaging comes before the exponential.",
        "math.exp(losses.mean())",
    ),
    (
        "medium: the mean over batches of different size",
        "def mean_loss(means: list[float], tokens: list[int]) -> float:\n"
        '    """Loss per token, from the mean loss and the number of tokens of each batch."""',
        ['"of 1 and 3 tokens", {name}([4.0, 0.0], [1, 3]), 1.0', '"of 1 batch", {name}([2.5], [7]), 2.5'],
        "Go back from each mean to the sum that it was made of.",
        "sum(mean * count for mean, count in zip(means, tokens, strict=True)) / sum(tokens)",
    ),
    (
        "open: nats to bits per byte",
        "def bits_per_byte(nats: float, tokens: int, size: int) -> float:\n"
        '    """The loss per token (nats) as bits per byte of a text of so many tokens and bytes."""',
        ['"1 bit a token", {name}(math.log(2), 10, 20), 0.5', '"1 nat a byte", {name}(1.0, 8, 8), 1 / math.log(2)'],
        "How many bits are one nat?",
        "nats * tokens / size / math.log(2)",
    ),
]

TABLE = """\
lines = ["| what | measured |", "|---|---|", *(f"| {what} | {number} |" for what, number in measured.items())]
Markdown("\\n".join(lines))"""

PRACTICE = """\
part = rows[:16].to(machine.device)
with torch.no_grad():
    theirs = model(input_ids=part, labels=part).loss.item()
print(f"transformers: {theirs:.4f}, ours: {losses[:16].mean().item():.4f}")
assert abs(theirs - losses[:16].mean().item()) < (1e-4 if machine.dtype == "float32" else 0.05)"""

READ_ON = """\
## Read on

- Primary sources, each with what it is good for: Shannon 1951, *Prediction and Entropy of Printed English*, Bell System
  Technical Journal 30: how well people guess the next letter."""

TEST = '''\
"""Lesson {number}: its checks tell right from wrong answers, and its cells run on a model in hub format."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "{name}.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
NAMES = {{"math": math, "torch": torch, "Tensor": Tensor}}
# For every exercise what is right in its solution, and two or more mistakes that students make in its place.
WRONG = {{
    "{lesson}.1": ("losses.mean()", ["losses.sum()", "losses.max()", "-losses.mean()"]),
    "{lesson}.2": ("/ sum(tokens)", ["/ len(tokens)", "/ max(tokens)"]),
    "{lesson}.3": ("/ math.log(2)", ["* math.log(2)", "/ math.log(10)"]),
}}


def test_every_exercise_has_planted_mistakes() -> None:
    assert list(EXERCISES) == list(WRONG)


@pytest.mark.parametrize("number", WRONG)
def test_a_check_tells_right_from_wrong(number: str) -> None:
    right, mistakes = WRONG[number]
    wrong = [planted(EXERCISES[number].solution, right, mistake) for mistake in mistakes]
    prove_check(EXERCISES[number], NAMES, wrong)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_and_on_text_in_the_hubs_formats(
    tiny_model_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    parameters = {{"profile": "t4", "model_id": str(tiny_model_folder), "text_id": str(text_file), "budget": 0.1}}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert "profile t4: tiny-qwen2" in said
    assert "DOES NOT HOLD" in said  # the model is random: the lesson reports, and goes on
    assert said.count("not attempted yet") == len(EXERCISES)
'''


def lesson_notebook(name: str) -> NotebookNode:
    """A lesson of that name ("11_topic") with all its parts, not yet run."""
    number, title = name[:2], name[3:].replace("_", " ").capitalize()
    cells = [
        new_markdown_cell(TITLE.format(number=number, title=title, badge=badge(name)), id="title"),
        new_code_cell(SETUP_CELL.strip(), id="setup", metadata={"tags": ["setup"]}),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        new_code_cell(SETTINGS.strip(), id="settings"),
        new_code_cell(CLAIM, id="claim"),
        new_markdown_cell(QUESTION, id="question"),
        new_code_cell(METHOD, id="method"),
        new_code_cell(MEASUREMENT, id="measurement"),
        new_code_cell(PLOT, id="plot"),
        new_markdown_cell(SEEN, id="seen"),
        new_markdown_cell(EXERCISES, id="exercises"),
    ]
    for place, parts in enumerate(EXERCISE_PARTS, start=1):
        cells += _exercise(f"{int(number)}.{place}", *parts)
    cells += [
        new_markdown_cell("## What we saw\n\nAll numbers of this table were measured above, in this run.", id="saw"),
        new_code_cell(TABLE, id="table"),
        new_markdown_cell("## In practice\n\nThe same with the library that a practitioner uses.", id="practice"),
        new_code_cell(PRACTICE, id="practice-run"),
        new_markdown_cell(READ_ON, id="read-on"),
    ]
    metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
        "workbook": {"lesson": number, "title": title, "prerequisites": ["01"] if number > "01" else []},
    }
    return new_notebook(cells=cells, metadata=metadata)


def _exercise(number: str, headline: str, stub: str, cases: list[str], hint: str, answer: str) -> list[NotebookNode]:
    """Stub, check, folded hint and folded solution."""
    function = re.match(r"def (\w+)", stub)[1]
    expectations = "\n".join(f"    expect_close({case.format(name=function)})" for case in cases)
    check = f'def check_{function}({function}):\n{expectations}\n\n\ncheck("{number}", check_{function}, {function})'
    solution = f"{stub.splitlines()[0]}\n    return {answer}"
    texts = {
        "exercise": f"# Exercise {number}, {headline}.\n{stub}\n    raise NotImplementedError",
        "check": check,
        "hint": f"<details><summary>Hint</summary>\n\n{hint}\n\n</details>",
        "solution": f"<details><summary>Solution</summary>\n\nWhy it is so, in a sentence.\n\n"
        f"```python\n{solution}\n```\n\n</details>",
    }
    make = {"exercise": new_code_cell, "check": new_code_cell, "hint": new_markdown_cell, "solution": new_markdown_cell}
    place = number.replace(".", "-")
    return [make[tag](text, id=f"{tag}-{place}", metadata={"tags": [tag]}) for tag, text in texts.items()]


def write_lesson(name: str, folder: Path = ROOT) -> tuple[Path, Path]:
    """Write notebooks/<name>.ipynb and tests/test_lesson_<number>.py to the folder, and return both paths.

    Raises CourseError for a name that no lesson may have, and where one of them, or a lesson of that number, is there.
    """
    if not NAME.fullmatch(name):
        raise CourseError(
            f"{name!r} is no name for a lesson: give two digits and words in small letters, such as 11_topic."
        )
    notebook = folder / "notebooks" / f"{name}.ipynb"
    test = folder / "tests" / f"test_lesson_{name[:2]}.py"
    taken = [*sorted(notebook.parent.glob(f"{name[:2]}_*.ipynb")), *([test] if test.exists() else [])]
    if taken:
        raise CourseError(f"{taken[0].name} is there already: choose another number, or delete it first.")
    try:
        write_atomically(test, TEST.format(number=name[:2], lesson=int(name[:2]), name=name))
        write_atomically(notebook, nbformat.writes(lesson_notebook(name)) + "\n")
    except OSError as error:
        raise CourseError(
            f"Cannot write {error.filename} ({error.strerror}): make room, or run in the course."
        ) from None
    return notebook, test


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m course new-lesson", description="Start a new lesson.")
    parser.add_argument("name", help="number and name of the lesson, such as 11_topic")
    name = parser.parse_args(arguments).name
    for path in write_lesson(name):
        print(f"wrote {path.relative_to(ROOT)}")
    print(f"Now change both, and run: python -m course refresh --only {name[:2]}")


if __name__ == "__main__":
    exit_cleanly(main)
