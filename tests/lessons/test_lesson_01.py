"""Lesson 01: its checks tell right from wrong answers, and its cells run on a model and a text in the hub's formats."""

import math
import re
import time
from itertools import product

import pytest
import torch

from course import notebooks
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "01_overview.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CELLS = {cell.id: cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells}


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The names that the exercises use, made by the lesson's own cells from a small part of the text."""
    names: dict = {"profile": "cpu", "model_id": "", "text_id": "", "seed": 0, "budget": 0.1}
    cells = ["settings", "profile-settings", "read-text", "tokenizer", "count-pairs", "seen-share"]
    for cell in [*cells, "kneser-ney-code", "kneser-ney-probability", "recall-rows"]:
        exec(CELLS[cell], names)
    exec("ngram = kneser_ney(rows.flatten().tolist(), 4)", names)
    for cell in ("networks", "no-peeking", "training-step", "train"):
        exec(CELLS[cell], names)
    names["clock"] = time.process_time
    exec('networks = {name: [new_network(name, 0)] for name in ("LSTM", "transformer")}', names)
    exec('train(networks["LSTM"][0], 0.02, 0)\ntrain(networks["transformer"][0], 0.01, 0)', names)
    exec(CELLS["row-memory"], names)
    return names


def test_the_probabilities_of_the_lessons_kneser_ney_model_are_those_computed_by_hand(lesson):
    lesson = {**lesson}
    lesson["VOCAB"] = 3
    exec(CELLS["kneser-ney-code"] + "\n\n" + CELLS["kneser-ney-probability"], lesson)
    unigrams, bigrams = tables = lesson["kneser_ney"]([0, 1, 0, 1, 0, 2, 0], 2)
    assert bigrams.counts == {(0, 1): 2, (1, 0): 2, (0, 2): 1, (2, 0): 1}
    assert unigrams.counts == {(0,): 2, (1,): 1, (2,): 1}  # 0 follows 1 and 2; 1 and 2 follow 0 only
    assert (bigrams.discount, unigrams.discount) == (2 / (2 + 2 * 2), 2 / (2 + 2 * 1))
    of_one = (1 - 0.5) / 4 + 0.5 * 3 / 4 / 3
    expected = (2 - 1 / 3) / 3 + 1 / 3 * 2 / 3 * of_one
    assert lesson["ngram_probability"](tables, [0], 1) == pytest.approx(expected)
    for context in ([], [0], [1], [2]):
        assert sum(lesson["ngram_probability"](tables, context, token) for token in range(3)) == pytest.approx(1)


def test_the_probabilities_of_the_lessons_kneser_ney_model_sum_to_one_after_any_context(lesson):
    tokens = lesson["rows"].flatten().tolist()
    contexts = [tokens[start : start + length] for start, length in product(range(0, 2000, 400), range(6))]
    for context in [*contexts, [0, 0, 0], [511, 511]]:
        total = sum(lesson["ngram_probability"](lesson["ngram"], context, token) for token in range(lesson["VOCAB"]))
        assert total == pytest.approx(1)


def test_an_answer_of_the_recall_task_stands_so_far_back_in_its_row_and_is_the_box_that_is_asked(lesson):
    for boxes, dots in ((2, 0), (2, 5), (4, 0), (16, 0)):
        rows, answers, distances = lesson["recall_rows"](boxes, 50, torch.Generator().manual_seed(1), dots)
        asked = min(boxes, lesson["ASKED"])
        assert rows.shape == (50, boxes + dots + asked)
        for row, right, far in zip(rows.tolist(), answers.tolist(), distances.tolist(), strict=True):
            assert sorted(token // lesson["LETTERS"] for token in row[:boxes]) == [*range(boxes)]
            for place, (answer, distance) in enumerate(zip(right, far, strict=True), boxes + dots):
                assert row[place - distance] == answer
                assert row[place] == boxes * lesson["LETTERS"] + answer // lesson["LETTERS"]


def test_the_map_of_the_methods_names_every_other_lesson():
    numbers = set(re.findall(r"\b(?:0[1-9]|1[0-7])\b", CELLS["map"]))
    assert numbers == {f"{number:02}" for number in range(1, 18)}


def test_the_check_of_convert_perplexity_finds_the_inverse_and_plain_scaling(lesson):
    exercise = EXERCISES["1.1"]
    right = "perplexity ** (num_tokens / other_num_tokens)"
    wrong = [
        planted(exercise.solution, right, "perplexity ** (other_num_tokens / num_tokens)"),
        planted(exercise.solution, right, "perplexity * num_tokens / other_num_tokens"),
        planted(exercise.solution, right, "perplexity"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_typical_finds_other_orders_a_lost_token_and_changed_logits(lesson):
    exercise = EXERCISES["1.2"]
    source = exercise.solution
    wrong = [
        planted(source, "(-log_p - entropy).abs().argsort(-1)", "(-log_p).argsort(-1)"),
        planted(source, "(-log_p - entropy).abs().argsort(-1)", "(-log_p - entropy).argsort(-1)"),
        planted(source, "ordered.cumsum(-1) - ordered", "ordered.cumsum(-1)"),
        planted(source, ".gather(-1, order.argsort(-1))", ".gather(-1, order)"),
        planted(source, ".gather(-1, order.argsort(-1))", ""),
        planted(source, "logits.masked_fill(", "logits.masked_fill_("),
        planted(source, "return logits.masked_fill", "return log_p.masked_fill"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_predicted_share_finds_another_length_another_part_and_no_prediction(lesson):
    exercise = EXERCISES["1.3"]
    source = exercise.solution
    wrong = [
        planted(source, "seen_share(tokens, 3)", "seen_share(tokens, 2)"),
        planted(source, "// 10], 3)", "// 10], 2)"),
        planted(source, "tokens[: len(tokens) // 10]", "tokens[::10]"),
        planted(source, "PREDICTION = 0.4", "PREDICTION = None"),
        planted(source, "PREDICTION = 0.4", "PREDICTION = 40"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_beam_search_finds_greedy_search_wrong_scores_and_forgotten_starts(lesson):
    exercise = EXERCISES["1.4"]
    source = exercise.solution
    wrong = [
        planted(source, "[:width]", "[:1]"),
        planted(source, "[:width]", "[: width ** (len(longer[0][0]) - len(start))]"),
        planted(source, "score + added", "added"),
        planted(source, ", reverse=True", ""),
        planted(source, "(list(start), 0.0)", "([], 0.0)"),
        planted(source, "range(num_tokens)", "range(num_tokens - 1)"),
        planted(
            source,
            "for token, added in enumerate(log_probabilities(ids).tolist())",
            "for added, token in [max((p, t) for t, p in enumerate(log_probabilities(ids).tolist()))]",
        ),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_mixture_finds_no_gain_what_is_no_distribution_and_what_looks_ahead(lesson):
    exercise = EXERCISES["1.5"]
    source = exercise.solution
    wrong = [
        planted(source, "((1, 0.05), (2, 0.4))", "()"),
        planted(source, '("LSTM", "transformer")', '("LSTM",)'),
        planted(source, "(1 - weight) * mixed[place - 1] + weight", "mixed[place - 1] + weight"),
        planted(source, "range(place - length)", "range(len(row) - length)"),
        planted(source, "range(place - length)", "range(place - length + 1)"),
        planted(source, "((1, 0.05), (2, 0.4))", "((1, 1.0),)"),
        planted(source, "return mixed", "return mixed.log()"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_row_look_up_counts_only_what_stood_before_a_place_and_its_mixture_sums_to_one(lesson):
    names = {**lesson}
    row = [1, 2, 3, 1, 2, 4, 1, 2]
    _, shares = names["evidence"](names["ngram"], [row], [row])
    assert shares[:, 0].nan_to_num(-1).tolist() == [-1, -1, -1, 1, 0, -1, 1]
    assert shares[:, 1].nan_to_num(-1).tolist() == [-1, -1, -1, -1, 0, -1, -1]
    every = [[*row, token] for token in range(names["VOCAB"])]
    found = names["evidence"](names["ngram"], every, every, first=len(row))
    total = sum(math.exp(-names["mixed_nats"](p[None], s[None], (0.1, 0.4))) for p, s in zip(*found, strict=True))
    assert total == pytest.approx(1)


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_and_a_text_in_the_hubs_formats(tiny_model_folder, text_file, tmp_path):
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "text_id": str(text_file), "budget": 0.01}
    notebook, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert f"profile t4: {tiny_model_folder.name}" in said
    assert "There is nothing here that could show sliders" in said and "widgets" not in notebook.metadata
    assert said.count("not attempted yet") == len(EXERCISES)
