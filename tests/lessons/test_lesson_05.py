"""Lesson 05: its checks tell right from wrong answers, and its cells run on a model and on chats in hub format."""

import ast

import pytest

from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_cells import cell_with, code_cells
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "05_supervised_fine_tuning.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = [source for source in code_cells(NOTEBOOK) if not source.startswith("# Finds the course's files")]


def definitions(source: str) -> str:
    """The functions of a cell, without what it runs."""
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the exercises use, made by the lesson's own cells."""
    names: dict = {"profile": "cpu", "model_id": "", "chats_id": "", "seed": 0, "budget": 0.5}
    for source in (
        cell_with(CELLS, "import copy"),
        cell_with(CELLS, "lesson = Lesson("),
        cell_with(CELLS, "world = World()"),
        cell_with(CELLS, "CHAT_TEMPLATE = ("),
        cell_with(CELLS, "def prompt_text("),
        'tests = {task: unseen_rows(100, task) for task in ("fact", "sum", "mood", "pairs")}',
        definitions(cell_with(CELLS, "def encode(")),
        cell_with(CELLS, "def fine_tune("),
        cell_with(CELLS, "def right_of("),
        definitions(cell_with(CELLS, "def careless(")),
    ):
        exec(source, names)
    return names


def test_there_are_six_exercises():
    assert list(EXERCISES) == ["5.1", "5.2", "5.3", "5.4", "5.5", "5.6"]


@pytest.mark.parametrize("kind", ["random errors", "systematic errors"])
def test_hasty_answers_spoil_about_as_many_rows_in_both_kinds(lesson, kind):
    rows = lesson["training_rows"](300, ("pairs",))
    hasty = lesson["careless"](rows, kind)
    wrong = sum(row["answer"] != other["answer"] for row, other in zip(rows, hasty, strict=True)) / len(rows)
    assert 0.25 < wrong < 0.5
    assert lesson["careless"](rows, "all right") == rows


def test_the_check_of_encode_turns_finds_wrong_labels(lesson):
    exercise = EXERCISES["5.1"]
    labels = "[-100] * len(head) + (tail if"
    wrong = [
        planted(exercise.solution, labels, "head + (tail if"),  # the marks are learned as well
        planted(exercise.solution, 'role == "assistant"', 'role != "user"'),  # the system's words are learned
        planted(exercise.solution, 'role == "assistant"', "role == turns[-1][0] and text == turns[-1][1]"),  # last only
        planted(exercise.solution, "tokenizer(text + END", "tokenizer(text"),  # turns do not end
        planted(exercise.solution, "(tail if", "(tail[:-2] + [-100] * 2 if"),  # and are not learned to
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_accumulated_loss_finds_the_mean_of_means(lesson):
    exercise = EXERCISES["5.2"]
    wrong = [
        planted(exercise.solution, "torch.cat(losses).mean()", "torch.stack([part.mean() for part in losses]).mean()"),
        planted(
            exercise.solution,
            "torch.cat(losses).mean()",
            "torch.stack([part.mean() for part in losses if len(part)]).mean()",
        ),
        planted(exercise.solution, ".mean()", ".sum()"),
        planted(exercise.solution, "torch.cat(losses)", "torch.cat(losses[:3])[1:]"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_contaminated_finds_missed_leaks_and_false_alarms(lesson):
    exercise = EXERCISES["5.3"]
    source = exercise.solution
    wrong = [
        planted(source, "words = text.lower().split()\n        for", "words = text.split()\n        for"),
        planted(source, "length = min(n, len(words))\n", "length = n\n").replace("{min(n, len(words)) for", "{n for"),
        planted(source, "        if any(", "        if all("),
        planted(source, "known[length] for run in runs)", "known[length] for run in runs if run[0] != words[0])"),
        'def contaminated(train_texts, test_texts, n=5):\n    together = " ".join(train_texts).lower()\n'
        "    return [i for i, text in enumerate(test_texts) if text.lower() in together]",
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_noisy_embeddings_finds_wrong_scales_and_noise_on_padding(lesson):
    exercise = EXERCISES["5.4"]
    source = exercise.solution
    wrong = [
        planted(source, " * real[..., None]", ""),
        planted(source, "(lengths * hidden)", "torch.tensor([seq * hidden] * batch)"),
        planted(source, "(lengths * hidden)", "(lengths * 1.0)"),
        planted(source, "2 * torch.rand(embeddings.shape, generator=generator) - 1", "torch.rand(embeddings.shape)"),
        planted(source, "torch.rand(embeddings.shape, generator=generator) - 1", "torch.rand(embeddings.shape) - 1"),
        planted(source, "return embeddings + ", "return embeddings.add_(1) - 1 + "),
        planted(source, "alpha /", "2 * alpha /"),
        planted(source, "torch.rand(embeddings.shape,", "torch.rand(embeddings[:1].shape,"),  # one noise for all rows
        planted(source, "torch.rand(embeddings.shape,", "torch.rand(embeddings[:, :1].shape,"),  # for all tokens
    ]
    prove_check(exercise, lesson, wrong)


@pytest.mark.slow
def test_the_check_of_choose_finds_unfiltered_too_many_and_invented_rows(lesson):
    exercise = EXERCISES["5.5"]
    wrong = [
        planted(exercise.solution, " if is_supported(row)", ""),  # many of them are wrong
        planted(exercise.solution, "[:40]", ""),
        planted(exercise.solution, "][:40]", "][:0]"),
        planted(exercise.solution, "[row for row", "[row | {'answer': 'Answer: yes'} for row"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_predicted_positions_finds_means_and_places_that_are_off(lesson):
    exercise = EXERCISES["5.6"]
    source = exercise.solution
    wrong = [
        exercise.stub.replace("raise NotImplementedError", "return batch_size * sum(lengths) / len(lengths)"),
        exercise.stub.replace("raise NotImplementedError", "return batch_size * max(lengths)"),
        planted(source, "return batch_size * longest", "return longest"),
        planted(  # drawn with replacement
            source,
            "(math.comb(place, batch_size - 1) / ways)",
            "(((place + 1) / len(lengths)) ** batch_size - (place / len(lengths)) ** batch_size)",
        ),
        planted(source, "math.comb(place, batch_size - 1)", "math.comb(place, batch_size)"),
        planted(source, "sorted(lengths)", "sorted(lengths, reverse=True)"),
    ]
    prove_check(exercise, lesson, wrong)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_and_on_chats_in_the_hubs_formats(tiny_model_folder, messages_file, tmp_path):
    parameters = {
        "profile": "t4",
        "model_id": str(tiny_model_folder),
        "chats_id": str(messages_file),
        "budget": 0.005,
    }
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert "profile t4: tiny-qwen2 on cpu in float32" in said
    assert "holds: the ten losses are those of SFTTrainer, within 0.001" in said
    assert "holds: with the document mask packing changes no loss" in said
    assert "DOES NOT HOLD: the assistant is 50 points ahead of the commonest answer" in said  # it reports, and goes on
    assert said.count("not attempted yet") == len(EXERCISES)
