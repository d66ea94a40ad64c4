"""The board: ranks with their uncertainty, twins, the log, the live board, the blind final."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from sklearn.metrics import cohen_kappa_score

from course.__main__ import main
from course.competition.agreement import krippendorff_alpha, weighted_kappa
from course.competition.ladder import climb
from course.competition.log import START, append, read_log
from course.competition.overlap import tasks_in
from course.competition.ranking import resampled_means, standings
from course.competition.submission import read_submission
from course.competition.tensors import read_header
from course.competition.twins import cosine, twins
from helpers.errors import CourseError
from helpers.models import MODEL_FOLDERS
from helpers.open_tasks import KINDS, make_tasks, public_tasks
from tests.support.submissions import write_honest

KINDS_OF_300 = list(KINDS) * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three honest submissions, a copied one, one that cannot be read, and a file."""
    folder = tmp_path_factory.mktemp("class") / "submissions"
    for seed, name in enumerate(("ada", "島 bela", "<b>chiyo")):
        write_honest(folder / name, seed)
    shutil.copytree(folder / "ada", folder / "=copy")
    shutil.copytree(folder / "ada", folder / "broken")
    (folder / "broken" / "recipe.json").write_text("{")
    (folder / "notes.txt").write_text("")
    (folder.parent / "secret.txt").write_text("a secret of more than twenty characters\n")
    return folder


def run(folder, *arguments):
    return main(["competition", *map(str, arguments)])


@pytest.fixture(scope="module")
def out(folder):
    out = folder.parent / "out"
    secret = folder.parent / "secret.txt"
    arguments = ["board", folder, "--hidden", secret, "--per-kind", 1, "--out", out, "--kept", folder.parent / "kept"]
    assert run(folder, *arguments) == 0
    table = (out / "board.csv").read_text()
    assert run(folder, *arguments) == 0  # another one, from what was kept
    assert (out / "board.csv").read_text() == table
    return out


@pytest.mark.slow
def test_everybody_is_on_the_board_or_refused_with_the_reason(out):
    rows = list(csv.DictReader((out / "board.csv").open(encoding="utf-8")))
    assert {row["name"] for row in rows} == {"ada", "島 bela", "<b>chiyo", "'=copy"}
    assert {row["reproduced"] for row in rows} == {"100"}
    page = (out / "board.html").read_text()
    assert "&lt;b&gt;chiyo" in page and "<b>chiyo" not in page and "<script" not in page
    assert "recipe.json is not JSON" in page and "notes.txt is no folder" in page


@pytest.mark.slow
def test_the_copied_submission_is_named_and_no_other(out):
    rows = {row["name"]: row["note"] for row in csv.DictReader((out / "board.csv").open(encoding="utf-8"))}
    assert "like ada: equal adapters" in rows["'=copy"] and "like =copy: equal adapters" in rows["ada"]
    assert rows["島 bela"] == rows["<b>chiyo"] == ""


@pytest.mark.slow
def test_the_log_has_a_line_for_each_and_the_page_its_last_hash(out):
    entries = read_log(out / "log.jsonl")
    assert len(entries) == 2 * 6
    assert append(out / "log.jsonl", []) in (out / "board.html").read_text()


@pytest.mark.slow
def test_the_live_board_grades_each_submission_once_and_few_a_day(folder, tmp_path, capsys):
    secret, few = folder.parent / "secret.txt", tmp_path / "few"
    shutil.copytree(folder / "ada", few / "ada")
    arguments = ["board", few, "--hidden", secret, "--live", "--per-day", 1, "--out", tmp_path, "--kept", tmp_path]
    assert run(folder, *arguments) == 0
    assert "100 answers reproduced" in capsys.readouterr().out
    assert run(folder, *arguments) == 0
    assert "unchanged" in capsys.readouterr().out
    shutil.rmtree(few / "ada")
    shutil.copytree(folder / "<b>chiyo", few / "ada")
    assert run(folder, *arguments) == 0
    assert "has had its 1 submissions of today" in capsys.readouterr().out
    assert len(read_log(tmp_path / "live.jsonl")) == 1


@pytest.mark.slow
def test_the_blind_final_names_nobody_and_is_joined_again(out, tmp_path, capsys):
    assert run(out, "blind", "--board", out / "board.json", "--out", tmp_path, "--top", 3, "--raters", 2) == 0
    key = json.loads((tmp_path / "key.json").read_text())
    orders = []
    for rater in (1, 2):
        path = tmp_path / f"rater_{rater}.csv"
        assert not re.search("ada|bela|chiyo|copy", path.read_text())
        rows = list(csv.DictReader(path.open(encoding="utf-8")))
        orders.append([(key[row["item"]]["name"], key[row["item"]]["place"]) for row in rows])
        with path.open("w", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows([row | {"score": key[row["item"]]["rubric"]} for row in rows])
    assert len(orders[0]) == 30 and set(orders[0]) == set(orders[1]) and orders[0] != orders[1]
    assert run(out, "unblind", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "rater 2 and the rubric: weighted kappa 1.00 on 30 answers" in printed and "alpha 1.00" in printed
    (tmp_path / "rater_1.csv").write_text("item,score\nabc,9\n")
    with pytest.raises(CourseError, match="unknown item 'abc'"):
        run(out, "unblind", tmp_path)


def test_hidden_tasks_are_written_without_what_grades_them(folder, tmp_path):
    path = tmp_path / "new" / "hidden.jsonl"
    assert run(folder, "hidden", "--hidden", folder.parent / "secret.txt", "--out", path) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 300 and set(rows[0]) == {"task_id", "kind", "input"}


def test_commit_makes_a_secret_once_and_refuses_a_short_one(tmp_path, capsys):
    path = tmp_path / "secret.txt"
    assert main(["competition", "commit", str(path)]) == main(["competition", "commit", str(path)]) == 0
    first, second = capsys.readouterr().out.split()
    assert first == second and len(first) == 64 and path.read_text().strip() not in first
    path.write_text("shima 2026")
    with pytest.raises(CourseError, match="shorter than 20"):
        main(["competition", "commit", str(path)])


# Ranks


def some_grades(means, seed=0):
    return np.random.default_rng(seed).normal(np.array(means)[:, None], 1.0, (len(means), 300))


def test_equal_submissions_share_place_and_group_and_far_ones_do_not():
    same = some_grades([3])
    found = standings(np.concatenate([same, same, some_grades([2], 1), some_grades([4], 2)]), KINDS_OF_300)
    assert [s.place for s in found] == [2, 2, 4, 1] and [s.group for s in found] == [2, 2, 3, 1]
    assert [(s.best_rank, s.worst_rank) for s in found] == [(2, 2), (2, 2), (4, 4), (1, 1)]


def test_the_paired_bootstrap_keeps_the_number_of_tasks_of_each_kind():
    by_kind = np.array([[KINDS.index(kind) for kind in KINDS_OF_300]], dtype=float)  # nothing varies within a kind
    assert resampled_means(by_kind, KINDS_OF_300).std() < 1e-9


def test_the_interval_is_that_of_a_normal_mean_and_pairing_makes_differences_sharper():
    grades = some_grades([3])
    drawn = resampled_means(grades, KINDS_OF_300)[:, 0]
    assert drawn.std() == pytest.approx(1 / 300**0.5, rel=0.15)
    (worse, better) = standings(np.concatenate([grades, grades + 0.01]), KINDS_OF_300)
    assert better.low < worse.mean and (better.group, worse.group) == (1, 2)


def test_a_score_is_shown_only_where_it_is_surely_better():
    first = climb(None, (3,) * 50 + (4,) * 50)
    assert first.score == 3.5
    assert climb(first, (3,) * 49 + (4,) * 51) is first  # one point more on one task
    assert climb(first, (3,) * 44 + (4,) * 56).score == 3.55
    assert climb(first, (4,) * 100).score == 4.0
    assert climb(first, (1,) * 100) is first


# Twins


def test_a_scaled_copy_has_the_same_direction_and_another_training_has_not(folder):
    ada, bela = read_submission(folder / "ada"), read_submission(folder / "島 bela")
    scaled = read_submission(folder / "=copy")
    for name, tensor in scaled.adapter.items():
        tensor.mul_(3.0 if "lora_A" in name else 0.5)
    assert cosine(ada, scaled) == pytest.approx(1) and abs(cosine(ada, bela)) < 0.5


def test_a_noisy_copy_is_found_by_its_wrong_answers_in_a_class_that_shares_few(folder):
    rng = np.random.default_rng(0)
    paths = ("ada", "島 bela", "<b>chiyo")
    submissions = [read_submission(folder / paths[i % 3]) for i in range(9)]
    for submission in submissions:
        for tensor in submission.adapter.values():
            tensor.normal_()
    answers = [[str(rng.integers(10)) for _ in range(300)] for _ in range(9)]
    answers[7] = [text if rng.random() < 0.8 else "another" for text in answers[2]]
    grades = rng.integers(1, 6, size=(9, 300))
    assert [(i, j) for i, j, _ in twins(submissions, answers, grades)] == [(2, 7)]


# Parts


def test_a_changed_a_missing_and_a_cut_line_of_the_log_are_found(tmp_path):
    path = tmp_path / "log.jsonl"
    append(path, [{"n": n} for n in range(4)])
    lines = path.read_text().splitlines()
    assert json.loads(lines[0])["previous"] == START
    for changed in (
        [lines[0].replace("0,", "7,", 1), *lines[1:]],
        [lines[0], *lines[2:]],
        [*lines[:3], lines[3][:20]],
    ):
        path.write_text("\n".join(changed) + "\n")
        with pytest.raises(CourseError, match="was changed in or before line"):
            append(path, [{"n": 4}])


def test_agreement_is_that_of_sklearn_and_of_the_definition():
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 6, (2, 80))
    assert weighted_kappa(first, second) == pytest.approx(cohen_kappa_score(first, second, weights="quadratic"))
    grades = np.array([[1, 2, 3, np.nan], [1, 2, 4, 5]])
    pairs = [(1, 1), (2, 2), (3, 4)]  # the last item has one grade only
    pooled = [value for pair in pairs for value in pair]
    within = np.mean([(a - b) ** 2 for a, b in pairs])
    chance = np.mean([(a - b) ** 2 for i, a in enumerate(pooled) for j, b in enumerate(pooled) if i != j])
    assert krippendorff_alpha(grades) == pytest.approx(1 - within / chance)


def test_only_rows_that_hold_a_whole_task_count_as_overlap():
    tasks = public_tasks()
    rows = [f"{task.input} {task.reference}" for task in make_tasks("rows", 100, held_out=False)]
    assert tasks_in(rows, tasks) == []
    assert tasks_in([*rows, "Well: " + tasks[7].input.replace("\n", "  ")], tasks) == [tasks[7]]


def test_the_header_read_by_hand_is_that_of_safetensors():
    path = MODEL_FOLDERS["shima-4m"] / "model.safetensors"
    with safe_open(path, "pt") as file:
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert read_header(path.read_bytes(), "base") == expected
