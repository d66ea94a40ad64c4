"""Lesson 03: its checks tell right from wrong answers, and its cells run on a model in hub format."""

import ast

import pytest

from course import notebooks
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "03_pretraining.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = {cell.id: cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells}


def definitions(source: str) -> str:
    """The functions of a cell, without what it runs."""
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the exercises use, made by the lesson's own cells, with a small tokenizer."""
    names: dict = {"profile": "cpu", "model_id": "", "seed": 0, "budget": 0.1, "display": lambda *_, **__: None}
    small = planted(CELLS["train-bpe"], "1500, 2048", "300, 600")
    for source in (
        CELLS["imports"],
        CELLS["settings"],
        CELLS["pre-tokenize"],
        CELLS["merge-pair"],
        small,
        "sizes = [len(SPECIAL_TOKENS) + 256]\n" + definitions(CELLS["encode"]) + "\nencode = make_encoder(merges)",
        definitions(CELLS["attend"]),
        definitions(CELLS["rope"]),
        CELLS["rms-norm"],
        CELLS["attention"],
        CELLS["block"],
        CELLS["transformer"],
        CELLS["rows"],
        definitions(CELLS["same-losses"]),
    ):
        exec(source, names)
    return names


def test_the_check_of_decode_finds_characters_cut_in_two_and_special_tokens(lesson):
    exercise = EXERCISES["3.1"]
    token_by_token = '    return "".join(token_bytes.get(i, b"").decode(errors="replace") for i in ids)'
    wrong = [
        exercise.stub.replace("    raise NotImplementedError", token_by_token),
        planted(exercise.solution, 'token_bytes.get(token_id, b"")', "token_bytes[token_id]"),
        planted(exercise.solution, 'errors="replace"', 'errors="ignore"'),
        planted(exercise.solution, 'joined.decode(errors="replace")', "str(joined)"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_num_parameters_finds_wrong_key_and_value_widths_and_a_forgotten_output_matrix(lesson):
    exercise = EXERCISES["3.2"]
    wrong = [
        planted(exercise.solution, "2 * d * d + 2 * d * shared", "4 * d * d"),
        planted(exercise.solution, "2 * d * d + 2 * d * shared", "d * d + 3 * d * shared"),
        planted(exercise.solution, "(1 if config.tie_word_embeddings else 2)", "1"),
        planted(exercise.solution, "+ 2 * d) + d", "+ 2 * d)"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_wsd_finds_schedules_that_are_off_by_a_step_or_end_elsewhere(lesson):
    exercise = EXERCISES["3.3"]
    wrong = [
        planted(exercise.solution, "(step + 1) / warmup_steps", "step / warmup_steps"),
        planted(exercise.solution, "(num_steps - step)", "(num_steps - step - 1)"),
        planted(exercise.solution, "end + (1 - end) * min(1.0, left / decay)", "min(1.0, left / decay)"),
        planted(exercise.solution, "(num_steps - warmup_steps)", "num_steps"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_bert_mask_finds_wrong_shares_tokens_and_fates_and_changed_rows(lesson):
    exercise = EXERCISES["3.4"]
    source = exercise.solution
    one_row = "torch.rand((1, rows.shape[1]), generator=generator).expand(rows.shape)"
    wrong = [
        planted(source, " & (rows >= NUM_SPECIAL)", ""),
        planted(source, "fate < 0.8", "fate < 1"),
        planted(source, "fate >= 0.9", "fate >= 0.8"),
        planted(source, "torch.randint(NUM_SPECIAL,", "torch.randint(0,"),
        planted(source, "< 0.15", "< 0.3"),
        planted(source, "rows.masked_fill(~chosen", "inputs.masked_fill(~chosen"),
        planted(source, "rows.masked_fill(~chosen, -100)", "rows"),
        planted(source, "return inputs, rows", "rows[chosen] = MASK\n    return inputs, rows"),
        source.replace(", generator=generator", ""),
        planted(source, "NUM_SPECIAL, TOKENS, rows.shape", "NUM_SPECIAL, 1000, rows.shape"),
        planted(source, "NUM_SPECIAL, TOKENS, rows.shape", "NUM_SPECIAL, 272, rows.shape"),
        planted(
            source,
            "fate = torch.rand(rows.shape, generator=generator)",
            "fate = torch.rand((len(rows), 1), generator=generator).expand(rows.shape)",
        ),
        planted(source, "torch.rand(rows.shape, generator=generator) < 0.15", one_row + " < 0.15"),
        planted(source, "fate = torch.rand(rows.shape, generator=generator)", "fate = " + one_row),
        planted(source, "    chosen =", "    generator = torch.Generator().manual_seed(0)\n    chosen ="),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_document_mask_finds_masks_that_leak_or_cut_too_early(lesson):
    exercise = EXERCISES["3.5"]
    wrong = [
        planted(exercise.solution, "(number[:, None] == number) & (places", "(places"),
        planted(exercise.solution, " & (places[:, None] >= places)", ""),
        planted(exercise.solution, "ends.cumsum(0) - ends", "ends.cumsum(0)"),
        planted(exercise.solution, "number[:, None] == number)", "number[:, None] >= number)"),
        planted(exercise.solution, "row == end_of_text", "row == 0"),
    ]
    prove_check(exercise, lesson, wrong)


@pytest.mark.slow
def test_the_check_of_no_positions_finds_turning_vectors_and_a_missing_prediction(lesson):
    exercise = EXERCISES["3.6"]
    wrong = [
        planted(exercise.solution, "torch.zeros_like(cos)", "cos"),
        planted(exercise.solution, "torch.ones(", "torch.zeros("),
        planted(exercise.solution, "len(positions), head_dim", "len(positions), head_dim // 2"),
        planted(exercise.solution, "PREDICTION = 0.5", "PREDICTION = None"),
    ]
    prove_check(exercise, lesson, wrong)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_and_a_text_in_the_hubs_formats(tiny_model_folder, text_file, tmp_path):
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "text_id": str(text_file), "budget": 0.005}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert f"profile t4: {tiny_model_folder.name}" in said
    assert said.count("not attempted yet") == len(EXERCISES)
