"""The sweep: its cells, its text, what a cell measures, and a runner that loses nothing."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.errors import CourseError
from helpers.world import ask
from recipes import scaling_sweep as sweep
from recipes.scaling_sweep import Cell

TINY = Cell(width=12, tokens=4_000)


def fake_row(cell: Cell) -> dict:
    """What a cell returns, without training; a cell of seed 13 breaks."""
    if cell.seed == 13:
        raise RuntimeError("out of memory")
    return {"key": cell.key, "loss": 1.0 / cell.tokens, "seconds": 1.0}


def test_the_plan_has_no_cell_twice_and_holds_at_least_five_sizes_by_five_budgets():
    cells = sweep.planned_cells()
    assert len({cell.key for cell in cells}) == len(cells)
    assert len(sweep.WIDTHS) >= 5 and len(sweep.TOKENS) >= 5
    assert {Cell(width, tokens) for width in sweep.WIDTHS for tokens in sweep.TOKENS} <= set(cells)


def test_the_committed_results_hold_every_planned_cell():
    results = sweep.read_results(sweep.RESULTS)
    assert {cell.key for cell in sweep.planned_cells()} <= set(results)
    assert all(0.4 < row["loss"] < 2 for row in results.values())


def test_a_document_is_a_row_between_two_end_tokens_and_its_tokens_are_those_of_the_text():
    tokenizer, back = sweep.load_tokenizer("shima-4m"), {number: old for old, number in sweep.vocabulary().items()}
    for index, row in enumerate(sweep.stream(7, 20)):
        assert row[0] == row[-1] == 0 and (row[1:-1] > 0).all()
        text = sweep.world().document(7, index, {"questions": 1.0})
        assert tokenizer.decode([back[i] for i in row[1:-1].tolist()]) == text


def test_padding_takes_no_part_in_the_targets():
    inputs, targets = sweep.batch_of([torch.tensor([0, 5, 6, 0]), torch.tensor([0, 7, 0])])
    assert inputs.tolist() == [[0, 5, 6], [0, 7, 0]] and targets.tolist() == [[5, 6, 0], [7, 0, -100]]


def test_epochs_read_the_same_documents_again_in_another_order():
    batches = list(sweep.training_batches(Cell(16, 40_000, epochs=4)))
    documents = [tuple(row.tolist()) for batch in batches for row in batch]
    unique = round(len(documents) / 4)
    assert len(set(documents[:unique])) == unique and set(documents) == set(documents[:unique])
    assert documents[:unique] != documents[unique : 2 * unique]
    fresh = [tuple(row.tolist()) for batch in sweep.training_batches(Cell(16, 40_000)) for row in batch]
    assert len(set(fresh)) == len(fresh) == len(documents)


def test_the_log_probability_of_an_answer_is_the_sum_over_its_tokens():
    model = sweep.new_model(16, seed=3)
    prompts, answers = [ask("Where does Helumu live?"), ask("What is Fesafi by trade?")], ["Kuku", "baker"]
    found, greedy = sweep.answer_log_probs(model, prompts, answers)
    for prompt, answer, value, flag in zip(prompts, answers, found, greedy, strict=True):
        (before,), (row,) = sweep.encode([prompt]), sweep.encode([f"{prompt} {answer}\n"])
        with torch.no_grad():
            each = model(input_ids=row[None, :-1]).logits[0].log_softmax(-1)
        wanted = sum(each[i - 1, row[i]] for i in range(len(before), len(row)))
        assert value == pytest.approx(wanted.item(), abs=1e-4)
        assert bool(flag) == all(each[i - 1].argmax() == row[i] for i in range(len(before), len(row)))


@pytest.mark.slow
def test_a_cell_gives_the_same_numbers_in_another_process(tmp_path: Path):
    with sweep.processes(1) as executor:
        results = sweep.run_sweep([TINY], executor, tmp_path / "r.json", progress=False)
    threads = torch.get_num_threads()
    here = sweep.train_cell(TINY)
    torch.set_num_threads(threads)
    there = results[TINY.key]
    assert there["loss"] == pytest.approx(here["loss"], abs=1e-4)
    assert there["tokens_seen"] == here["tokens_seen"] == pytest.approx(4_000, rel=0.15)
    assert there["parameters"] - there["non_embedding"] == len(sweep.vocabulary()) * 12
    assert len(there["facts"]) == len(there["greedy"]) == len(sweep.probe_questions())
    assert sweep.train_cell(replace(TINY, seed=1))["loss"] != here["loss"]


def test_a_sweep_that_was_stopped_runs_only_what_is_missing(tmp_path: Path):
    cells, done, path = [Cell(16, 1000 * i) for i in range(1, 5)], [], tmp_path / "new" / "r.json"

    def job(cell: Cell) -> dict:
        done.append(cell)
        return fake_row(cell)

    with ThreadPoolExecutor(2) as executor:
        sweep.run_sweep(cells[:3], executor, path, progress=False, job=job)
        path.with_name("r.json.part").write_text('{"cells": [')  # a kill while writing leaves this behind
        results = sweep.run_sweep(cells, executor, path, progress=False, job=job)
        assert sorted(done, key=lambda cell: cell.tokens) == cells
        assert set(results) == {cell.key for cell in cells} == set(sweep.read_results(path))
        sweep.run_sweep(cells[:1], executor, path, progress=False, job=job, resume=False)
    assert len(done) == 5 and list(sweep.read_results(path)) == [cells[0].key]
    assert json.loads(path.read_text())["recipe"]["command"] == "python -m recipes.scaling_sweep"


def test_a_broken_cell_is_named_and_the_others_are_kept(tmp_path: Path):
    cells = [Cell(16, 1000), Cell(16, 1000, seed=13), Cell(16, 2000)]
    with ThreadPoolExecutor(1) as executor, pytest.raises(CourseError, match=r"16-1000-13.*out of memory"):
        sweep.run_sweep(cells, executor, tmp_path / "r.json", progress=False, job=fake_row)
    assert set(sweep.read_results(tmp_path / "r.json")) == {cells[0].key, cells[2].key}


def test_any_executor_with_submit_done_and_result_will_do(tmp_path: Path):
    class Job:  # as submitit's: its result is there some time after it was submitted
        def __init__(self, function, cell):
            self.ready, self.function, self.cell = time.monotonic() + 0.05, function, cell

        def done(self):
            return time.monotonic() > self.ready

        def result(self):
            return self.function(self.cell)

    class Cluster:
        submit = staticmethod(Job)

    results = sweep.run_sweep([Cell(16, 1000)], Cluster(), tmp_path / "r.json", progress=False, job=fake_row)
    assert list(results) == ["16-1000-0-1-cosine-1.0"]


def test_slurm_without_submitit_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(CourseError, match="pip install submitit"):
        sweep.slurm(tmp_path)


def test_slurm_hands_its_parameters_to_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class AutoExecutor:
        def __init__(self, folder, cluster):
            self.seen = {"folder": folder, "cluster": cluster}

        def update_parameters(self, **parameters):
            self.seen |= parameters

    module = ModuleType("submitit")
    module.AutoExecutor = AutoExecutor
    monkeypatch.setitem(sys.modules, "submitit", module)
    seen = sweep.slurm(tmp_path, slurm_partition="cpu", timeout_min=5).seen
    assert seen["cluster"] == "slurm" and seen["slurm_partition"] == "cpu"
    assert seen["timeout_min"] == 5 and seen["cpus_per_task"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cells": [{"loss": 1}]}'])
def test_a_file_that_holds_no_results_is_named(tmp_path: Path, text: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(CourseError, match=r"r\.json holds no results"):
        sweep.read_results(tmp_path / "r.json")
