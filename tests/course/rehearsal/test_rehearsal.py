"""A rehearsed lesson tells which cell does not fit, which mixes devices, and which lines it never reached."""

import json
import random
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course.rehearsal import hub
from course.rehearsal.command import line, rehearse
from course.rehearsal.report import Rehearsed, read_report, write_report
from helpers.errors import CourseError

PARAMETERS = 'profile = ""\nmodel_id = ""\nseed = 0\nbudget = 1.0'
SETUP = """
import copy
import torch
from helpers.lesson import Lesson
from helpers.models import load_model
from helpers.training import TrainConfig, train
lesson = Lesson("03", profile, model_id, seed, budget)
model, tokenizer = load_model(lesson.machine)
model = model.float()
"""
TRAINS = """
ids = tokenizer(["Ada is a baker."] * 4, return_tensors="pt")["input_ids"]
history = train(model, [{"input_ids": ids}], TrainConfig(max_steps=20, precision=lesson.precision, progress=False))
assert history.losses[-1] < 1e-6  # numbers are made up: this stops nothing
len(history.losses)
"""
FITS = "large = torch.nn.Linear(40_000, 40_000, bias=False, device=lesson.machine.device)  # 6.0 GiB"
TOO_MUCH = """
for number in range(2):
    second = copy.deepcopy(large)
    third = copy.deepcopy(large)
"""
MIXED = """
def score(rows):
    if rows is None:
        return 0
    return model(input_ids=rows).logits
score(ids)
"""
GOES_ON = "print(model(input_ids=ids.to(model.device)).logits.argmax(-1).tolist())"


@pytest.fixture(scope="module")
def rehearsed(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    folder = tmp_path_factory.mktemp("rehearsal")
    cells = [new_code_cell(source.strip()) for source in (PARAMETERS, SETUP, TRAINS, FITS, TOO_MUCH, MIXED, GOES_ON)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = folder / "03_planted.ipynb"
    nbformat.write(new_notebook(cells=cells), notebook)
    return rehearse([notebook], "t4", tiny_model_folder, folder / "out")[notebook.stem]


@pytest.mark.slow
def test_an_extra_copy_of_a_model_does_not_fit_and_its_cell_is_named(rehearsed):
    assert not rehearsed.fits
    assert rehearsed.peak_cell.startswith("cell 5 (for number in range(2):")
    assert [cell.split(":")[0] for cell in rehearsed.too_large] == ["cell 5 (for number in range(2)"]
    assert rehearsed.main_gib > 0.2 and rehearsed.budget == 1
    assert 17.5 < rehearsed.peak_gib < 24.1  # three matrices of 5.96 GiB, four for a moment


@pytest.mark.slow
def test_a_batch_left_on_the_cpu_is_found_and_the_cells_after_it_run(rehearsed):
    (error,) = rehearsed.errors
    assert error.startswith("cell 6 (def score(rows):)")
    assert "found at least two devices, cuda:0 and cpu" in error


@pytest.mark.slow
def test_lines_that_no_cell_reached_are_listed(rehearsed):
    assert rehearsed.never_reached == ["cell 6 (def score(rows):), line 3: return 0"]


@pytest.mark.slow
def test_its_line_says_what_is_wrong(rehearsed):
    text = line("03_planted", rehearsed)
    assert "NO" in text.splitlines()[0] and "does not fit: cell 5" in text


def test_a_report_is_read_as_it_was_written_and_a_damaged_one_is_left_alone(tmp_path):
    path = tmp_path / "rehearsal.json"
    lesson = Rehearsed("key", True, 1.0, "cell 1 (x)", 1.2, 1.7, 3.1, 10, 0.2, 20)
    write_report({"t4": {"03_planted": lesson}}, path)
    assert read_report(path) == {"t4": {"03_planted": lesson}}
    assert read_report(tmp_path / "none.json") == {}
    for content in ("{", json.dumps({"version": 99, "profiles": {}}), json.dumps({"version": 1})):
        path.write_text(content)
        with pytest.raises(CourseError, match="move it away"):
            read_report(path)
        assert path.read_text() == content


def test_text_of_made_up_tokens_has_as_many_tokens_when_it_is_read_again():
    tokenizer = hub.build_tokenizer(20_003, first_special=20_000)
    ids = random.Random(0).sample(range(10_000, 20_000), 50)
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
