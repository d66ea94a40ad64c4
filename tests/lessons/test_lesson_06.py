"""Lesson 06: its checks tell right from wrong answers, its parts equal the libraries, and it runs on a hub model."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_cells import cell_with, code_cells
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "06_peft.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = code_cells(NOTEBOOK)
NAMES = {"math": math, "torch": torch, "nn": nn, "Tensor": Tensor, "Callable": Callable, "Sequence": Sequence}


def defined(*starts: str) -> dict:
    """The names that some cells define, each found by a text in it; these cells run nothing."""
    names = NAMES | {"F": torch.nn.functional, "machine": type("Machine", (), {"device": "cpu"})}
    for start in starts:
        exec(cell_with(CELLS, start), names)
    return names


def test_there_are_five_exercises() -> None:
    assert list(EXERCISES) == ["6.1", "6.2", "6.3", "6.4", "6.5"]


def test_the_check_of_the_count_finds_other_layers_and_missing_factors() -> None:
    solution = EXERCISES["6.1"].solution
    wrong = [
        planted(solution, "layer.in_features + layer.out_features", "layer.in_features * layer.out_features"),
        planted(solution, "layer.in_features + layer.out_features", "2 * layer.in_features"),
        planted(solution, "rank * (", "("),
        planted(solution, 'name.split(".")[-1] in targets', "any(target in name for target in targets)"),
        planted(solution, 'name.split(".")[-1] in targets', "any(name.endswith(target) for target in targets)"),
        planted(solution, "isinstance(layer, nn.Linear) and ", ""),
    ]
    prove_check(EXERCISES["6.1"], NAMES, wrong)


def test_the_check_of_the_sum_finds_summed_factors_weights_counted_twice_and_changed_arguments() -> None:
    solution = EXERCISES["6.2"].solution
    A, B = "torch.cat([A1, A2])", "torch.cat([weights[0] * B1, weights[1] * B2], dim=1)"
    wrong = [
        planted(solution, f"{A}, {B}", "weights[0] * A1 + weights[1] * A2, B1 + B2"),  # cross terms, equal ranks only
        planted(solution, A, "torch.cat([weights[0] * A1, weights[1] * A2])"),
        planted(solution, B, "torch.cat([B1, B2], dim=1)"),
        planted(solution, B, "torch.cat([weights[1] * B2, weights[0] * B1], dim=1)"),
        planted(solution, B, "torch.cat([B1.mul_(weights[0]), B2.mul_(weights[1])], dim=1)"),
    ]
    prove_check(EXERCISES["6.2"], NAMES, wrong)


def test_the_check_of_the_first_step_finds_the_two_optimisers_confused_and_a_scale_counted_once() -> None:
    solution = EXERCISES["6.3"].solution
    answer = 'factor**2 if optimizer == "sgd" else factor'
    wrong = [
        planted(solution, answer, "factor"),
        planted(solution, answer, "factor**2"),
        planted(solution, answer, 'factor if optimizer == "sgd" else factor**2'),
        planted(solution, answer, 'factor if optimizer == "sgd" else 1.0'),
    ]
    prove_check(EXERCISES["6.3"], NAMES, wrong)


def test_the_check_of_pissa_finds_wrong_scales_small_directions_and_uneven_factors() -> None:
    solution = EXERCISES["6.4"].solution
    wrong = [
        planted(solution, "(s[:rank] / scale).sqrt()", "s[:rank].sqrt()"),  # the residual is right, the scale is not
        planted(solution, "roots[:, None] * vh[:rank], u[:, :rank] * roots", "vh[-rank:], u[:, -rank:]"),
        planted(solution, "weight - scale * B @ A", "weight - B @ A"),
        planted(solution, "weight - scale * B @ A", "weight"),
        planted(
            solution,
            "roots[:, None] * vh[:rank], u[:, :rank] * roots",
            "vh[:rank], u[:, :rank] * roots**2",
        ),
        planted(  # equal norms of the whole factors, unequal rows
            solution,
            "roots[:, None] * vh[:rank], u[:, :rank] * roots",
            "vh[:rank] * (c := (roots**4).sum() / rank) ** 0.25, u[:, :rank] * roots**2 / c**0.25",
        ),
    ]
    prove_check(EXERCISES["6.4"], NAMES, wrong)


def test_the_check_of_the_gentle_lora_finds_too_many_parameters_a_goal_not_reached_and_too_much_lost() -> None:
    runs = {
        (2, 32, 5e-4): {"steps": 56, "rise": 0.08},
        (2, 2, 5e-4): {"steps": None, "rise": 0.002},  # kind, but never there
        (2, 32, 2e-3): {"steps": 21, "rise": 0.5},
        (4, 32, 5e-4): {"steps": 40, "rise": 0.1},  # too large
    }
    names = NAMES | {
        "SIZE": 3_606_784,
        "LIMIT": 72,
        "fresh": lambda: None,
        "lora": lambda rank=4, scale=2: lambda _: (rank, scale),
        "num_trained": lambda model: 19_712 * model[0],
        "reach": lambda method, rate: runs[*method(None), rate],
    }
    solution = EXERCISES["6.5"].solution
    wrong = [
        planted(solution, "scale=32", "scale=2"),
        planted(solution, "5e-4", "2e-3"),
        planted(solution, "rank=2", "rank=4"),
    ]
    prove_check(EXERCISES["6.5"], names, wrong)


def test_lora_starts_as_its_layer_and_its_factors_have_the_right_shapes() -> None:
    names = defined("class LoRALinear(")
    layer = nn.Linear(6, 4)
    adapted = names["LoRALinear"](layer, rank=2, alpha=8)
    x = torch.randn(3, 5, 6)
    assert torch.equal(adapted(x), layer(x))
    assert (tuple(adapted.A.shape), tuple(adapted.B.shape), adapted.scale) == ((2, 6), (4, 2), 4.0)


def test_a_4_bit_layer_gives_the_product_and_the_gradient_of_its_own_matrix() -> None:
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import get_4bit_type

    names = defined("def nf4_levels(", "def quantize(", "class Dequantised(", "class NF4Linear(")
    names["NF4"], names["DYNAMIC"] = get_4bit_type("nf4", device="cpu"), names["dynamic_levels"]()
    torch.manual_seed(0)
    layer = names["NF4Linear"](nn.Linear(128, 64).requires_grad_(False))
    x = torch.randn(2, 3, 128, requires_grad=True)
    weight = layer.dequantize()
    gradient = torch.randn(2, 3, 64)
    (found,) = torch.autograd.grad(layer(x), x, gradient)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    assert torch.allclose(found, gradient @ weight, atol=1e-6)


@pytest.mark.slow
def test_the_notebook_runs_with_a_model_from_the_hub(tiny_model_folder: Path, tmp_path: Path) -> None:
    """The cells of the GPU profile on a tiny Qwen2 in hub format: bitsandbytes' real 4-bit layers, and peft on them."""
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "budget": 0.05}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters, cell_timeout=120, timeout=400)
    assert "profile t4: tiny-qwen2 on cpu in float32" in said
    assert "Linear4bit" in said
    for name in ("LoRA", "DoRA", "QLoRA", "prompt tuning"):
        assert f"holds: {name} equals peft" in said
    assert "DOES NOT HOLD: full fine-tuning: at least 50 points more held-out instructions than one constant" in said
    assert "holds: our merged model is peft's merge_and_unload" in said
    assert said.count("not attempted yet") == len(EXERCISES)
