"""Lesson 04: its checks tell right from wrong answers, and its cells run on a model in hub format."""

from types import SimpleNamespace

import pytest

from course import notebooks
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "04_scaling_laws.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
SOURCES = [cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the exercises use, made by the lesson's own cells."""
    names: dict = {"profile": "cpu", "model_id": "", "seed": 0, "budget": 0.1, "display": lambda *_, **__: None}
    cells = ["lesson = Lesson(", "island = sweep.world()", "def huber_and_gradient(", "def lowest_end(", "def fit_law("]
    for line in [*cells, "PUBLISHED = {"]:
        (source,) = (source for source in SOURCES if f"\n{line}" in f"\n{source}")
        exec(source, names)
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


def test_the_check_of_best_guesses_finds_repeated_guesses_and_a_wrong_order(lesson):
    exercise = EXERCISES["4.4"]
    wrong = [
        exercise.stub.replace("raise NotImplementedError", "return 1 - (1 - max(counts) / sum(counts)) ** k"),
        planted(exercise.solution, "sorted(counts, reverse=True)", "counts"),
        planted(exercise.solution, ", reverse=True", ""),
        planted(exercise.solution, " / sum(counts)", " / len(counts)"),
        exercise.stub.replace("raise NotImplementedError", "return min(1.0, k / len(counts))"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_prediction_finds_the_wrong_order_and_numbers_that_are_far_off():
    measured = {12: 0.47, 48: 0.36}  # 1.8 and 2.6 times the excess on fresh text
    stand_in = SimpleNamespace(train_cell=lambda cell: {"loss": 0.5 + measured[cell.width]})
    names = {"sweep": stand_in, "Cell": lambda width, *_, **__: SimpleNamespace(width=width), "seed": 0}
    names |= {"ENTROPY": 0.5, "EXCESS": {12: [0.26], 48: [0.14]}}
    exercise = EXERCISES["4.6"]
    wrong = [
        planted(exercise.solution, "{12: 1.7, 48: 2.5}", answer)
        for answer in ("{12: 1.0, 48: 1.0}", "{12: 2.5, 48: 1.9}", "{12: 1.1, 48: 2.5}", "{12: 1.7}", "{}")
    ]
    prove_check(exercise, names, wrong)


@pytest.mark.slow
def test_the_check_of_the_sweep_finds_lines_in_place_of_grids_and_too_much_compute(lesson):
    exercise = EXERCISES["4.5"]
    body = exercise.solution.splitlines()[0]
    wrong = [
        body + "\n    return [(n, 20 * n) for n in np.geomspace(2e6, 1.5e9, 20)]",
        body + "\n    return [(n, 20 * n) for n in 0.99 * (1e21 / 3000) ** 0.5 * np.ones(25)]",
        body + "\n    return [(1e9, d) for d in np.geomspace(1e8, 2e10, 10)]",
        body + "\n    return []",
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
