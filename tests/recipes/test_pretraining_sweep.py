"""The sweep of lesson 11: its cells, its parametrisation, and that a cell is the same in every process."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recipes import pretraining_sweep as sweep
from recipes.pretraining_sweep import Cell
from recipes.scaling_sweep import processes, read_results, run_sweep

TINY = Cell(16, 0.02, steps=12)


def test_the_plan_has_no_cell_twice_and_the_committed_results_hold_every_cell() -> None:
    cells = sweep.planned_cells()
    results = read_results(sweep.RESULTS)
    assert len({cell.key for cell in cells}) == len(cells)
    assert {cell.key for cell in cells} == set(results)
    assert all(1.5 < row["loss"] < 7.5 and len(row["curve"]) == 20 for row in results.values())


def test_at_the_base_width_both_parametrisations_are_the_same_model() -> None:
    standard, mup = (sweep.new_model(sweep.BASE_WIDTH, kind) for kind in ("standard", "mup"))
    assert all(torch.equal(a, b) for a, b in zip(standard.parameters(), mup.parameters(), strict=True))
    assert {group["lr"] for group in sweep.groups(mup, 0.1, "mup")} == {0.1}


def test_in_mup_rates_of_matrices_and_the_size_of_the_output_fall_with_the_width() -> None:
    model = sweep.new_model(64, "mup")
    assert model.lm_head.weight.std().item() == pytest.approx(math.sqrt(16) / 64, rel=0.02)
    names = [name for name, _ in model.named_parameters()]
    rates = dict(zip(names, (group["lr"] for group in sweep.groups(model, 0.1, "mup")), strict=True))
    assert rates["model.layers.0.self_attn.q_proj.weight"] == rates["lm_head.weight"] == pytest.approx(0.025)
    assert rates["model.embed_tokens.weight"] == rates["model.norm.weight"] == 0.1


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_schedule_warms_up_to_its_peak_and_ends_where_it_says(schedule: str) -> None:
    cell = Cell(16, 0.1, schedule=schedule)
    factors = [sweep.rate_factor(step, cell) for step in range(cell.steps)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(factors) == 1.0
    assert factors[-1] == 1.0 if schedule == "constant" else factors[-1] < 0.04
    if schedule == "wsd":
        assert all(factor == 1.0 for factor in factors[10:128]) and factors[150] < 0.4


@pytest.mark.slow
def test_a_cell_gives_the_same_numbers_in_another_process_and_others_on_another_seed(tmp_path: Path) -> None:
    with processes(1) as executor:
        results = run_sweep(
            [TINY], executor, tmp_path / "r.json", progress=False, job=sweep.train_cell, recipe=sweep.RECIPE
        )
    threads = torch.get_num_threads()
    here, other = sweep.train_cell(TINY), sweep.train_cell(replace(TINY, seed=1))
    torch.set_num_threads(threads)
    assert here["loss"] == pytest.approx(results[TINY.key]["loss"], abs=1e-3)
    assert other["loss"] != here["loss"]
    assert '"python -m recipes.pretraining_sweep"' in (tmp_path / "r.json").read_text()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = sweep.new_model(32)
    muon, adamw = sweep.optimisers(model, Cell(32, 0.01, optimiser="muon"))
    counts = [sum(p.numel() for group in each.param_groups for p in group["params"]) for each in (muon, adamw)]
    assert counts[0] == sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)
    assert sum(counts) == model.num_parameters()
