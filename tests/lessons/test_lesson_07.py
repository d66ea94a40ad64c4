"""Lesson 07: its formulas hold on other models, its checks tell right from wrong, its cells run on a hub model."""

import ast

import pytest
from transformers import AutoModelForCausalLM

from course import notebooks
from helpers.memory import ModelShape, estimate_training
from helpers.models import tiny_config
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "07_gpu_memory.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = {cell.id: cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells}


def definitions(source: str) -> str:
    """The imports, functions and classes of a cell, without what it runs."""
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, kept))


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the exercises and the formulas use, made by the lesson's own cells."""
    names: dict = {"profile": "cpu", "model_id": "", "seed": 0, "budget": 0.1, "carbon_intensity": 481}
    cells = ["settings", "helpers", "count-parameters", "live", "unfused-copy", "layer-bytes", "check-activations"]
    cells += ["my-peak", "step", "fake-step", "kv-cache", "work", "decode-speed", "fit-numbers"]
    exec(CELLS["settings"] + "\n" + CELLS["helpers"], names)
    for cell in cells[2:]:
        exec(definitions(CELLS[cell]), names)
    exec('base, _ = load_model(machine); qwen = config_of("Qwen/Qwen2.5-0.5B")', names)
    exec('llama = config_of("meta-llama/Llama-2-7b-hf"); SPEED_MODEL = "Qwen/Qwen2.5-7B"', names)
    exec("config7 = config_of(SPEED_MODEL)", names)
    return names


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_lessons_count_of_parameters_is_exact(lesson, family, tied):
    config = tiny_config(family, num_key_value_heads=1, tie_word_embeddings=tied, intermediate_size=192)
    assert lesson["count_parameters"](config) == AutoModelForCausalLM.from_config(config).num_parameters()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_lessons_activations_are_what_autograd_keeps(lesson, family, precision):
    config = tiny_config(family, num_hidden_layers=3, intermediate_size=320)
    dtype = lesson["DTYPES"][precision]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    ids = lesson["random_batch"](config, 3, 96)
    found = lesson["saved_bytes"](lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, model)
    assert sum(lesson["kept_bytes"](config, dtype.itemsize, 3, 96).values()) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "seq"), [(1, 128), (4, 512)])
@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "Qwen/Qwen3-0.6B-Base"])
def test_the_lessons_peak_is_that_of_a_model_that_it_does_not_show(lesson, name, checkpointing, batch, seq):
    config = lesson["config_of"](name)
    config.num_hidden_layers = 4
    tracked = lesson["fake_step"](config, batch, seq, checkpointing)
    ours = max(lesson["peak_bytes"](config, 2, batch, seq, checkpointing, padded=True).values())
    assert ours == pytest.approx(tracked, rel=0.05)
    options = {"batch_size": batch, "seq_len": seq, "gradient_checkpointing": checkpointing}
    library = estimate_training(ModelShape.from_config(config), device="cpu", **options)
    assert library.total == pytest.approx(tracked, rel=0.05)


def test_the_check_of_cache_bytes_finds_a_forgotten_factor_and_wrong_windows(lesson):
    source = EXERCISES["7.1"].solution
    wrong = [
        planted(source, "return 2 * kv_heads", "return kv_heads"),
        planted(source, "min(context, window)", "window"),
        planted(source, "min(context, window)", "context"),
        planted(source, "tokens * batch * w", "tokens * w"),
    ]
    prove_check(EXERCISES["7.1"], lesson, wrong)


def test_the_check_of_adam_8bit_bytes_finds_wrong_blocks_and_small_tensors(lesson):
    source = EXERCISES["7.2"].solution
    wrong = [
        planted(source, "size < 4096", "size <= 4096"),
        planted(source, "size < 4096", "False"),
        planted(source, "math.ceil(size / 256)", "(size // 256)"),
        planted(source, "2 * size + 2 * 4", "2 * size + 4"),
    ]
    prove_check(EXERCISES["7.2"], lesson, wrong)


def test_the_check_of_largest_batch_finds_too_many_questions_and_wrong_ends(lesson):
    exercise = EXERCISES["7.3"]
    one_by_one = "    batch = 0\n    while fits(batch + 1):\n        batch += 1\n    return batch"
    wrong = [
        exercise.stub.replace("    raise NotImplementedError", one_by_one),
        planted(exercise.solution, "return low", "return high"),
        planted(exercise.solution, "low, high = 0, 1", "low, high = 1, 2"),
        planted(exercise.solution, "high - low > 1", "high - low > 2"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_best_group_finds_the_square_root_and_rounding_down(lesson):
    exercise = EXERCISES["7.4"]
    root = "    g = round(layers**0.5)\n    return g, math.ceil(layers / g) * input_bytes + g * layer_bytes"
    wrong = [
        exercise.stub.replace("    raise NotImplementedError", root),
        planted(exercise.solution, "math.ceil(layers / group)", "(layers // group)"),
        planted(exercise.solution, "+ group * layer_bytes", "+ layer_bytes"),
        planted(exercise.solution, "range(1, layers + 1)", "range(layers, 0, -1)"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_balanced_batch_finds_a_forgotten_cache_and_impossible_batches(lesson):
    source = EXERCISES["7.5"].solution
    wrong = [
        planted(source, " - cache_bytes / bandwidth", ""),
        planted(source, "None if gained <= 0 else ", ""),
        planted(source, "gained <= 0", "gained < 0"),
        planted(source, "math.ceil(weight_bytes / bandwidth / gained)", "int(weight_bytes / bandwidth / gained)"),
    ]
    prove_check(EXERCISES["7.5"], lesson, wrong)


def test_the_check_of_the_predicted_peak_finds_moments_that_sgd_does_not_have(lesson):
    source = EXERCISES["7.6"].solution
    wrong = [
        planted(source, " - 2 * 4 * count_parameters(config)", ""),
        planted(source, "- 2 * 4 *", "- 4 *"),
        planted(source, "- 2 * 4 *", "- 3 * 4 *"),
        planted(
            source, "max(peak_bytes(config, 4, batch, seq).values())", 'peak_bytes(config, 4, batch, seq)["update"]'
        ),
    ]
    prove_check(EXERCISES["7.6"], lesson, wrong)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_in_hub_format(tiny_model_folder, tmp_path):
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "seed": 1, "budget": 0.1}
    parameters |= {"calculator_model": "meta-llama/Llama-3.2-1B", "calculator_gpu": "L4"}
    notebook, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert f"profile t4: {tiny_model_folder.name}" in said
    assert "meta-llama/Llama-3.2-1B: 1.24 B parameters" in said and "of a L4" in said
    assert "There is nothing here that could show sliders" in said and "widgets" not in notebook.metadata
    assert said.count("not attempted yet") == len(EXERCISES)
