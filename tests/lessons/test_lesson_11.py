"""Lesson 11: its checks tell right from wrong answers, and its cells run on a model in hub format."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "11_advanced_pretraining.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
NAMES = {"math": math, "torch": torch, "Tensor": Tensor}
# For every exercise what is right in its solution, and two or more mistakes that students make in its place.
WRONG = {
    "11.1": ("losses.mean()", ["losses.sum()", "losses.max()", "-losses.mean()"]),
    "11.2": ("/ sum(tokens)", ["/ len(tokens)", "/ max(tokens)"]),
    "11.3": ("/ math.log(2)", ["* math.log(2)", "/ math.log(10)"]),
}


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
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "text_id": str(text_file), "budget": 0.1}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert "profile t4: tiny-qwen2" in said
    assert "DOES NOT HOLD" in said  # the model is random: the lesson reports, and goes on
    assert said.count("not attempted yet") == len(EXERCISES)
