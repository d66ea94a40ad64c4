"""Lesson 04: its checks tell right from wrong answers, and its cells run on a model in hub format."""

import pytest

from course import notebooks
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "04_scaling_laws.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = {cell.id: cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells}


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the exercises use, made by the lesson's own cells."""
    names: dict = {"profile": "cpu", "model_id": "", "seed": 0, "budget": 0.1, "display": lambda *_, **__: None}
    for name in ("settings", "document", "fit-law", "published"):
        exec(CELLS[name], names)
    return names


def test_the_check_of_training_days_finds_wrong_factors_and_units(lesson):
    exercise = EXERCISES["4.1"]
    wrong = [
        planted(exercise.solution, "6 * parameters", "2 * parameters"),
        planted(exercise.solution, " * utilisation", ""),
        planted(exercise.solution, "86_400", "3_600"),
        planted(exercise.solution, "gpus * ", ""),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_description_entropy_finds_a_wrong_count_of_orders_people_and_phrasings(lesson):
    exercise = EXERCISES["4.2"]
    wrong = [
        planted(exercise.solution, "math.log(math.factorial(relations))", "relations * math.log(relations)"),
        planted(exercise.solution, "math.log(math.factorial(relations))", "0.0"),
        planted(exercise.solution, "relations * math.log(forms)", "math.log(forms)"),
        planted(exercise.solution, "return 2 *", "return"),
        planted(exercise.solution, "-(chances * np.log(chances)).sum()", "math.log(len(chances))"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_tokens_needed_finds_a_forgotten_term_and_impossible_targets(lesson):
    exercise = EXERCISES["4.3"]
    wrong = [
        planted(exercise.solution, ' - law["E"]', ""),
        planted(exercise.solution, '(1 / law["beta"])', 'law["beta"]'),
        planted(exercise.solution, " if left > 0 else math.inf", ""),
        planted(exercise.solution, "left > 0", "target > law['E']"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_best_size_finds_hills_and_optima_outside_the_data(lesson):
    exercise = EXERCISES["4.4"]
    wrong = [
        planted(exercise.solution, "np.log(sizes)", "np.array(sizes)"),
        planted(exercise.solution, "if curvature <= 0:", "if False:"),
        planted(exercise.solution, " if x.min() <= lowest <= x.max() else None", ""),
        planted(exercise.solution, "-slope / (2 * curvature)", "-slope / curvature"),
        exercise.stub.replace("raise NotImplementedError", "return sizes[int(np.argmin(losses))]"),
    ]
    prove_check(exercise, lesson, wrong)


@pytest.mark.slow
def test_the_check_of_the_sweep_finds_lines_in_place_of_grids_and_too_much_compute(lesson):
    exercise = EXERCISES["4.5"]
    body = exercise.solution.splitlines()[0]
    wrong = [
        body + "\n    return [(n, 20 * n) for n in np.geomspace(2e6, 1.5e9, 20)]",
        body + "\n    return [(1e9, d) for d in np.geomspace(1e8, 2e10, 10)]",
        planted(exercise.solution, "np.geomspace(2e7, 2e9, 5)", "np.geomspace(2e7, 2e10, 5)"),
        planted(exercise.solution, "np.geomspace(2e7, 2e9, 5)", "np.geomspace(2e6, 2e9, 9)"),
    ]
    prove_check(exercise, lesson, wrong)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_in_the_hubs_format(tiny_model_folder, tmp_path):
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "budget": 0.05}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert f"profile t4: {tiny_model_folder.name}" in said
    assert said.count("not attempted yet") == len(EXERCISES)
