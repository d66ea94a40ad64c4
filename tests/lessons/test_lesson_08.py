"""Lesson 08: its checks tell right from wrong answers, and its cells run on a model in hub format."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_cells import cell_with, code_cells
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "08_rlhf.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = code_cells(NOTEBOOK)
NAMES = {"math": math, "torch": torch, "F": F, "Tensor": torch.Tensor}


def test_there_are_five_exercises():
    assert list(EXERCISES) == ["8.1", "8.2", "8.3", "8.4", "8.5"]


def test_the_check_of_the_margin_loss_finds_wrong_signs_and_overflow():
    source = EXERCISES["8.1"].solution
    wrong = [
        planted(source, "rejected - margin)", "rejected + margin)"),
        planted(source, "-F.logsigmoid(chosen - rejected", "-F.logsigmoid(rejected - chosen"),
        planted(source, "F.logsigmoid(chosen - rejected - margin)", "(chosen - rejected - margin).sigmoid().log()"),
        planted(source, "(chosen + rejected) ** 2", "(chosen - rejected) ** 2"),
        planted(source, "((chosen + rejected) ** 2).mean()", "((chosen + rejected) ** 2).sum()"),
        planted(source, "((chosen + rejected) ** 2)", "((chosen + rejected).abs())"),
        planted(source, "((chosen + rejected) ** 2).mean()", "(chosen + rejected).mean() ** 2"),
        planted(source, "margin).mean()", "margin).sum()"),
    ]
    prove_check(EXERCISES["8.1"], NAMES, wrong)


def test_the_check_of_the_penalty_finds_padding_taken_for_an_end():
    source = EXERCISES["8.2"].solution
    wrong = [
        planted(source, " & (mask == 1)", ""),  # padding may be the same token
        planted(source, "(~finished)", "finished"),
        planted(source, "scores - penalty", "scores + penalty"),
        planted(
            source, "scores - penalty * (~finished).float()", "scores.sub_(penalty * (~finished).float())"
        ),  # changes what it was given
        planted(source, ".any(1)", "[:, -1]"),  # looks at the last place only
    ]
    prove_check(EXERCISES["8.2"], NAMES, wrong)


def test_the_check_of_the_averages_finds_each_kind_taken_for_another():
    source = EXERCISES["8.3"].solution
    wrong = [
        planted(source, "(total.sum(1) / mask.sum(1)).mean()", "total.sum() / mask.sum()"),
        planted(source, "total = token_loss * mask", "total = token_loss"),
        planted(source, "(len(mask) * limit)", "(len(mask) * mask.shape[1])"),
        planted(source, "(len(mask) * limit)", "limit"),
        planted(source, "        return total.sum() / mask.sum()", "        return total.mean()"),
        planted(source, "total.sum(1) / mask.sum(1)", "total.mean(1)"),
    ]
    prove_check(EXERCISES["8.3"], NAMES, wrong)


def test_the_check_of_best_of_finds_wrong_weights_and_orders():
    source = EXERCISES["8.4"].solution
    wrong = [
        planted(source, "proxy.argsort(1)", "value.argsort(1)"),  # the truth chooses
        planted(source, "proxy.argsort(1)", "proxy.argsort(1, descending=True)"),
        planted(source, "math.comb(i, n - 1)", "math.comb(i, n)"),
        planted(source, "ordered = value.gather", "ordered = proxy.gather"),
        planted(source, ".sum(1).mean()", ".mean()"),
        "def best_of_exact(n, proxy, value):\n    chosen = proxy[:, :n].argmax(1, keepdim=True)\n"
        "    return value.gather(1, chosen).mean().item()",  # one subset only
    ]
    prove_check(EXERCISES["8.4"], NAMES, wrong)


def test_the_check_of_pay_by_the_word_finds_prompts_padding_and_changed_rewards():
    sample_class = cell_with(CELLS, "class Samples")
    names = NAMES | {"dataclass": dataclass, "field": field, "Question": object, "Scorer": Callable}
    exec(sample_class, names)
    ids = torch.ones(2, 5, dtype=torch.long)
    taken = names["Samples"]([], ids, ids, 2)  # two answers of three tokens
    names |= {"policy_gradient": lambda loss, scorer: SimpleNamespace(policy=None), "grpo": None, "judge": None}
    names |= {"take_exam": lambda policy: taken, "truth": lambda samples: torch.tensor([0.5, 0.5]), "LIMIT": 32}
    names["exams"] = {"SFT, careless": taken, "GRPO, run 1": taken}
    source = EXERCISES["8.5"].solution
    wrong = [
        planted(source, "samples.answer_mask", "samples.mask"),  # pays for the question
        planted(source, "samples.answer_mask.sum(1)", "samples.answer_mask.shape[1]"),  # pays for padding
        planted(source, "rate * samples", "samples"),
        planted(source, "judge(samples) + rate", "judge(samples) - rate"),
        planted(source, "PREDICTION = (30, 0.5)", "PREDICTION = None"),
        planted(source, "PREDICTION = (30, 0.5)", "PREDICTION = (0, 0)"),
        planted(
            source,
            "judge(samples) + rate * samples.answer_mask.sum(1)",
            "judge(samples).add_(rate * samples.answer_mask.sum(1))",
        ),
    ]
    prove_check(EXERCISES["8.5"], names, wrong)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_in_the_hubs_format(tiny_model_folder, tmp_path):
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "budget": 0.03}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert "profile t4: tiny-qwen2 on cpu" in said
    assert "holds: the loss is that of trl.RewardTrainer, within 0.0001" in said
    assert "holds: advantages and losses are those of trl, within 0.0001" in said
    assert "holds: GAE and whitening satisfy their identities" in said
    assert "DOES NOT HOLD" in said  # it reports what a random model cannot do, and goes on
    assert said.count("not attempted yet") == len(EXERCISES)
