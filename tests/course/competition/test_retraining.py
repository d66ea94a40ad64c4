"""Training again by a recipe: the same adapter each time, and no excuse for a score that does not come from it."""

from dataclasses import replace

import pytest
import torch

from course.competition.retraining import compare, train_again
from course.competition.submission import read_submission
from helpers.errors import CourseError
from helpers.open_tasks import public_tasks
from tests.support.submissions import write_honest

PAIR = {"instruction": "Say yes.", "chosen": "Yes.", "rejected": "No."}


@pytest.fixture(scope="module")
def submission(tmp_path_factory):
    return read_submission(write_honest(tmp_path_factory.mktemp("class") / "honest"))


def with_recipe(submission, rows=None, **values):
    rows = submission.rows if rows is None else rows
    return replace(submission, rows=rows, recipe=replace(submission.recipe, **values))


def test_the_same_recipe_gives_the_same_adapter_and_another_seed_another(submission):
    state = torch.get_rng_state()
    first, again = train_again(submission), train_again(submission)
    assert torch.equal(state, torch.get_rng_state())
    assert first.keys() == submission.adapter.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    other = train_again(with_recipe(submission, seed=1))
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_preferences_are_learned_after_the_answers(submission):
    plain = train_again(submission)
    dpo = {"steps": 3, "beta": 0.5, "learning_rate": 1e-2}
    preferring = train_again(with_recipe(submission, [*submission.rows, PAIR], dpo=dpo))
    assert not all(torch.equal(tensor, preferring[name]) for name, tensor in plain.items())


def test_without_steps_the_adapter_changes_nothing(submission):
    untrained = train_again(with_recipe(submission, steps=0))
    assert all(not tensor.any() for name, tensor in untrained.items() if ".lora_B." in name)


def test_a_score_that_the_recipe_does_not_reach_is_refused(submission, tmp_path):
    assert "trained again, difference" in compare(submission, tmp_path)
    forged = replace(submission, answers=[task.reference for task in public_tasks()])
    with pytest.raises(CourseError, match=r"does not explain its score: 5\.00 handed in, 1\.\d\d trained again"):
        compare(forged, tmp_path)


@pytest.mark.parametrize(
    ("rows", "values", "reason"),
    [
        (None, {"steps": 10**6}, r"trains on [\d,]+ tokens of train\.jsonl, and 600,000 are allowed"),
        ([], {}, r"has no rows"),
        (None, {"dpo": {"steps": 1}}, r"has no rows"),
        ([PAIR], {"steps": 0, "dpo": {"steps": 1, "batch_size": 0}}, r"has no rows"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(submission, rows, values, reason):
    with pytest.raises(CourseError, match=reason):
        train_again(with_recipe(submission, rows, **values))
