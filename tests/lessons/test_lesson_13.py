"""Lesson 13: its checks tell right from wrong answers, its functions have their properties, it runs on a hub model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course import notebooks
from helpers.models import load_tokenizer
from helpers.profiles import ROOT
from helpers.world import RELATIONS, ask
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "13_analysis_and_theory.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
SOURCES = [cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells if cell.cell_type == "code"]
NAMES = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "np": np, "partial": partial}
NAMES |= {"Callable": Callable, "Iterator": Iterator, "Mapping": Mapping, "Sequence": Sequence}
NAMES |= {"contextmanager": contextmanager, "RELATIONS": RELATIONS}


def defined(*functions: str, **names: object) -> dict:
    """The lesson's own functions, over stand-ins for the names that they use."""
    space = NAMES | names
    for function in functions:
        source = next(source for source in SOURCES if f"def {function}(" in source)
        lines = source.split("\n")
        start = next(i for i, line in enumerate(lines) if line.startswith(f"def {function}("))
        end = next((i for i in range(start + 1, len(lines)) if lines[i][:1] not in ("", " ", ")")), len(lines))
        start -= lines[start - 1].startswith("@")
        exec("\n".join(lines[start:end]), space)
    return space


def test_there_are_the_exercises_of_the_first_half() -> None:
    assert list(EXERCISES)[:3] == ["13.1", "13.2", "13.3"]


def test_the_check_of_the_recovered_share_finds_other_ends_absolute_values_and_limits() -> None:
    solution = EXERCISES["13.1"].solution
    wrong = [
        planted(solution, "(patched - corrupted)", "(clean - patched)"),
        planted(solution, "(patched - corrupted) / (clean - corrupted)", "patched / clean"),
        planted(solution, "/ (clean - corrupted)", "/ abs(clean - corrupted)"),
        planted(solution, "return (patched", "return abs(patched"),
        planted(solution, "return (patched - corrupted) / (clean - corrupted)",
                "return min(1.0, max(0.0, (patched - corrupted) / (clean - corrupted)))"),
        planted(solution, "        return 0.0", "        return 1.0"),
    ]  # fmt: skip
    prove_check(EXERCISES["13.1"], NAMES, wrong)


def test_the_check_of_the_joint_edit_finds_edits_in_turn_another_norm_and_changes_in_place() -> None:
    solution = EXERCISES["13.2"].solution
    signature = "def joint_edit(weight: Tensor, keys: Tensor, changes: Tensor, moment: Tensor) -> Tensor:\n"
    wrong = [
        planted(solution, "torch.linalg.solve(moment, keys.T)", "keys.T"),
        planted(solution, "torch.linalg.solve(moment, keys.T)", "moment @ keys.T"),
        planted(solution, "return weight + changes", "return changes"),
        planted(solution, "return weight + changes.T @", "return weight.add_(changes.T @").rstrip() + ")\n",
        signature
        + "    for key, change in zip(keys, changes, strict=True):\n"
        + "        u = torch.linalg.solve(moment, key)\n"
        + "        weight = weight + torch.outer(change, u) / (u @ key)\n"
        + "    return weight\n",
        signature + "    return weight + changes.T @ torch.linalg.pinv(keys.T)\n",
        signature + "    return weight + changes.T @ keys @ torch.linalg.inv(moment + keys.T @ keys)\n",
    ]
    prove_check(EXERCISES["13.2"], NAMES, wrong)


def test_the_check_of_one_head_left_finds_wrong_heads_and_a_missing_prediction() -> None:
    """Over a stand-in for the model: each head of the last layer adds its own share."""
    state = {"out": ()}

    @contextmanager
    def without(heads, outputs):
        state["out"] = tuple(heads)
        yield
        state["out"] = ()

    def accuracy(*_):
        lost = sum(0.25 - 0.05 * head for layer, head in state["out"] if layer == 3)
        return SimpleNamespace(accuracy=1.0 - lost - 0.01 * sum(layer != 3 for layer, _ in state["out"]))

    names = NAMES | {"num_heads": 4, "num_layers": 4, "usual": {}, "fresh": (), "accuracy": accuracy}
    names |= {"without": without, "nullcontext": nullcontext}
    solution = EXERCISES["13.3"].solution
    wrong = [
        planted(solution, "other != head", "other == head"),
        planted(solution, "num_layers - 1, other", "num_layers - 2, other"),
        planted(solution, "without([(num_layers - 1, other) for other in range(num_heads) if other != head], usual)",
                "nullcontext()"),
        planted(solution, "PREDICTION = 0.5", "PREDICTION = None"),
        planted(solution, "PREDICTION = 0.5", "PREDICTION = 50"),
        planted(solution, "    return shares", "    return sorted(shares)"),
    ]  # fmt: skip
    prove_check(EXERCISES["13.3"], names, wrong)


def test_a_hook_sees_the_input_may_replace_it_and_is_gone_afterwards() -> None:
    at_inputs = defined("at_inputs")["at_inputs"]
    network, x, seen = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), torch.ones(1, 3), []
    plain = network(x)
    with at_inputs({network[1]: seen.append}):
        assert torch.equal(network(x), plain)
    with at_inputs({network[1]: torch.zeros_like}):
        assert torch.equal(network(x), network[1].bias[None])
    with pytest.raises(RuntimeError), at_inputs({network[1]: lambda state: state[:, :1]}):
        network(x)
    assert torch.equal(network(x), plain)
    assert torch.equal(seen[0], network[0](x))


def test_the_advantage_of_the_right_option_ignores_what_is_added_to_all() -> None:
    advantage = defined("advantage")["advantage"]
    logits, options = torch.tensor([[5.0, 1.0, 3.0, 9.0]]), torch.tensor([0, 1, 2])
    assert advantage(logits, torch.tensor([0]), options).item() == pytest.approx(3.0)
    assert advantage(logits + 7, torch.tensor([0]), options).item() == pytest.approx(3.0)


def test_a_question_in_pieces_has_the_tokens_of_the_whole_and_the_name_where_it_says() -> None:
    tokenizer = load_tokenizer("shima-4m")
    about = defined("about", tokenizer=tokenizer, machine=SimpleNamespace(device="cpu"))["about"]
    for relation in RELATIONS.values():
        for form in relation.questions:
            ids, span = about(form, ["Mijozo"])
            assert ids[0].tolist() == tokenizer(ask(form.format(name="Mijozo")))["input_ids"]
            assert tokenizer.decode(ids[0, span]) == " Mijozo"


def test_a_rank_one_edit_gives_the_value_and_leaves_keys_across_in_the_norm_alone() -> None:
    rank_one = defined("rank_one")["rank_one"]
    generator = torch.Generator().manual_seed(0)
    weight, key, change = (torch.randn(*shape, generator=generator).double() for shape in ((4, 6), (6,), (4,)))
    root = torch.randn(6, 6, generator=generator).double()
    moment = root @ root.T + torch.eye(6)
    edit = rank_one(weight, key, change, moment) - weight
    assert torch.allclose(edit @ key, change)
    across = torch.randn(6, generator=generator).double()
    direction = torch.linalg.solve(moment, key)
    across -= key * (across @ direction) / (key @ direction)
    assert (edit @ across).abs().max() < 1e-12


def test_a_probe_learns_labels_that_are_there_and_guesses_the_mean_where_none_are() -> None:
    ridge_probe = defined("ridge_probe")["ridge_probe"]
    labels = torch.arange(60) % 3
    states = F.one_hot(labels, 3).float() + 0.01
    assert (ridge_probe(states, labels, 3, strength=1.0)(states).argmax(-1) == labels).all()
    nothing = ridge_probe(torch.zeros(60, 3), labels, 3)(torch.zeros(2, 3))
    assert torch.allclose(nothing, torch.full((2, 3), 1 / 3))


SOURCES = [cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells if cell.cell_type == "code"]
# For every exercise what is right in its solution, and two or more mistakes that students make in its place.
WRONG = {
    "13.4": [
        ("error / (values - 1)", "error"),
        ("error / (values - 1)", "error / values"),
        ("log_likelihood.softmax(0)", "log_likelihood.exp() / log_likelihood.exp().sum()"),
        ("log_likelihood.softmax(0)", "log_likelihood.exp()"),
        ("torch.where(agrees, right, wrong)", "torch.where(agrees, wrong, right)"),
    ],
    "13.5": [
        ('"solves"', '"guesses"'),
        ("torch.arange(PAIRS) % ROW_KEYS", "torch.arange(PAIRS) // ROW_KEYS"),
        ("labels = KEYS + ", "labels = "),
        ("keys = torch.rand(models, rows, KEYS,", "keys = torch.rand(1, 1, KEYS,"),
        ("keys = torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]",
         "keys = torch.arange(ROW_KEYS).expand(models, rows, -1)"),
        ("labels = KEYS + torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]",
         "labels = KEYS + keys"),
        ("labels = KEYS + torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]",
         "labels = KEYS + torch.randint(KEYS, (models, rows, ROW_KEYS), generator=generator)"),
    ],
    "13.6": [
        ("cos_a * cos_b - sin_a * sin_b", "cos_a * cos_b + sin_a * sin_b"),
        ("cos_sum @ cos_c.T + sin_sum @ sin_c.T", "cos_sum @ cos_c.T - sin_sum @ sin_c.T"),
        ("cos_sum @ cos_c.T + sin_sum @ sin_c.T", "cos_sum @ cos_c.T"),
        ("    return cos_sum", "    angle = torch.atan2(sin_a, cos_a) + torch.atan2(sin_b, cos_b)\n"
         "    cos_sum, sin_sum = angle.cos(), angle.sin()\n    return cos_sum"),
    ],
}  # fmt: skip


def cell(start: str, names: dict) -> None:
    """Run the one code cell of the lesson that holds this text, up to its first statement of a measurement."""
    (source,) = [source for source in SOURCES if start + "(" in source and "NotImplementedError" not in source]
    exec(source.split("\n\n\nexample, which")[0].split("\n\n\nsmooth =")[0].split("\n\n\nx, y, _ =")[0], names)


def lesson_names() -> dict:
    """The names that the cells with functions define, for seed 0."""
    names = {
        "math": math,
        "torch": torch,
        "F": F,
        "Tensor": Tensor,
        "Callable": Callable,
        "partial": partial,
        "seed": 0,
    }
    for start in (
        "def side_by_side", "def mapping_rows", "def attention_only", "def read_rows", "def label_accuracy",
        "def attention_scores", "def ridge", "def new_regressor", "def regress", "def prompts",
        "def bayes", "def new_functioner", "def functioner", "def new_adder",
    ):  # fmt: skip
        cell(start, names)
    return names


LESSON = lesson_names()


def test_every_exercise_of_this_half_has_planted_mistakes() -> None:
    assert set(WRONG) <= set(EXERCISES)


@pytest.mark.parametrize("number", ["13.4", "13.6"])
def test_a_check_tells_right_from_wrong(number: str) -> None:
    wrong = [planted(EXERCISES[number].solution, right, mistake) for right, mistake in WRONG[number]]
    prove_check(EXERCISES[number], LESSON, wrong)


@pytest.mark.parametrize("solved", [True, False])
def test_the_check_of_the_ordered_rows_finds_wrong_rows_and_the_other_prediction(solved: bool) -> None:
    """Over a stand-in for the training: the check compares with what was measured, whatever that is."""

    def train_on_mappings(layers, heads, steps, draw):
        assert (layers, heads) == (1, 8) and draw(torch.Generator(), 1, 1)[0].shape == (1, 1, 32)
        return {}, torch.full((steps, 3), 1.0 if solved else 0.3)

    class StandIn:
        scaled = staticmethod(lambda number, least=4: number)

    names = LESSON | {"train_on_mappings": train_on_mappings, "lesson": StandIn}
    exercise = EXERCISES["13.5"]
    if solved:
        prove_check(exercise, names, [planted(exercise.solution, right, mistake) for right, mistake in WRONG["13.5"]])
    else:
        with pytest.raises(AssertionError):
            prove_check(exercise, names, [exercise.solution + "\n", exercise.solution + "\n\n"])


@pytest.mark.slow
def test_one_layer_solves_rows_in_a_fixed_order() -> None:
    """What the solution of exercise 13.5 says, with the real training."""
    names = dict(LESSON)
    exec(EXERCISES["13.5"].solution, names)
    _, curve = names["train_on_mappings"](1, 8, 150, names["ordered_rows"])
    assert curve[-10:].mean() > 0.9


def test_only_labels_of_keys_that_were_told_count() -> None:
    ids, which = LESSON["mapping_rows"](torch.Generator().manual_seed(1), 2, 50)
    told = LESSON["told_before"](which).any(-1)
    logits = torch.zeros(2, 50, 32, 32)
    logits[:, :, ::2].scatter_(-1, ids[:, :, 1::2, None], told[..., None].float())  # right where told, else token 0
    assert torch.equal(LESSON["label_accuracy"](logits, ids, which), torch.ones(2))
    labels = ids[:, :, 1::2]
    for row in range(50):  # a key has one label, and different keys have different ones
        pairs = {(k, v) for k, v in zip(which[0, row].tolist(), labels[0, row].tolist(), strict=True)}
        assert len(pairs) == len({k for k, _ in pairs}) == len({v for _, v in pairs})


def test_attention_scores_are_one_for_a_perfect_circuit() -> None:
    _, which = LESSON["mapping_rows"](torch.Generator().manual_seed(2), 1, 20)
    same = LESSON["told_before"](which)
    perfect = torch.zeros(1, 20, 1, 32, 32)
    perfect[..., ::2, 1::2] = (same / same.sum(-1, keepdim=True).clamp(min=1))[:, :, None]
    place = torch.arange(0, 32, 2)
    perfect[..., place + 1, place] = 1.0
    previous, induction = LESSON["attention_scores"](perfect, which)
    assert previous.item() == 1.0 and abs(induction.item() - 1.0) < 1e-6


def test_models_side_by_side_do_not_touch_each_other() -> None:
    draw = LESSON["attention_only"](2, 4)
    ids, _ = LESSON["mapping_rows"](torch.Generator().manual_seed(3), 1, 4)
    alone = LESSON["side_by_side"](draw, [7])
    both = LESSON["side_by_side"](draw, [5, 7])
    ours, _ = LESSON["read_rows"](both, ids.expand(2, -1, -1))
    theirs, _ = LESSON["read_rows"](alone, ids)
    assert torch.allclose(ours[1], theirs[0], atol=1e-5)
    ours[1].sum().backward()
    assert all(part.grad[0].abs().max() == 0 for part in both.values() if part.grad is not None)


def test_no_prediction_sees_its_own_answer_or_later_pairs() -> None:
    weights = LESSON["side_by_side"](LESSON["new_regressor"], LESSON["SEEDS"] * 2)
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(6, 5, 8, 2, generator=generator), torch.randn(6, 5, 8, generator=generator)
    tasks = torch.randn(6, 2, 2, generator=generator)
    changed = y.clone()
    changed[..., 4:] += 1.0
    for predict in (
        lambda y: LESSON["regress"](weights, x, y), lambda y: LESSON["ridge"](x, y),
        lambda y: LESSON["dmmse"](x, y, tasks),
    ):  # fmt: skip
        before, after = predict(y), predict(changed)
        assert torch.allclose(before[..., :5], after[..., :5], atol=1e-5)
        assert (before[..., 5:] - after[..., 5:]).abs().max() > 1e-6


def test_bayes_predicts_a_distribution_and_is_sure_when_only_one_function_is_left() -> None:
    _, words, values = LESSON["function_rows"](torch.Generator().manual_seed(5), 200)
    best = LESSON["bayes"](words, values)
    assert torch.allclose(best.sum(-1), torch.ones(best.shape[:-1]), atol=1e-5)
    right = best.gather(-1, values[..., None])[..., 0]
    assert (right > 0).all()  # the function that made the row is never ruled out
    assert right[:, :, -1].mean() > right[:, :, 0].mean() + 0.2


def test_in_narrow_models_a_word_sees_only_itself_and_the_separator_before_it() -> None:
    free, narrow = (~LESSON["blocked"][model, 0, 0] for model in (0, 5))
    length = len(free)
    assert torch.equal(free, torch.ones(length, length, dtype=torch.bool).tril())
    for place in range(length):
        seen = narrow[place].nonzero().flatten().tolist()
        assert seen == ([place - 1, place] if place % 3 == 1 else list(range(place + 1)))


def test_no_test_pair_of_the_sums_is_a_training_pair_in_the_other_order() -> None:
    first, second = LESSON["first"], LESSON["second"]
    for train, test in zip(LESSON["train_pairs"], LESSON["test_pairs"], strict=True):
        seen = {frozenset(pair) for pair in zip(first[train].tolist(), second[train].tolist(), strict=True)}
        asked = {frozenset(pair) for pair in zip(first[test].tolist(), second[test].tolist(), strict=True)}
        assert not seen & asked and len(seen) + len(asked) == 59 * 60 // 2


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_in_the_hubs_format(tiny_model_folder: Path, tmp_path: Path) -> None:
    parameters = {"profile": "t4", "model_id": str(tiny_model_folder), "budget": 0.04}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert "profile t4: tiny-qwen2" in said
    assert (
        "DOES NOT HOLD: in each seed two layers are ahead of one layer by 40 points" in said
    )  # it reports, and goes on
    assert "holds: linear attention layers are steps of gradient descent" in said
    assert "holds: a hook on a block reads what output_hidden_states returns" in said
    assert said.count("not attempted yet") == len(EXERCISES)


@pytest.mark.slow
def test_the_core_path_runs_alone(tmp_path: Path) -> None:
    _, said = run_lesson(NOTEBOOK, tmp_path, {"profile": "cpu", "budget": 0.05}, core=True)
    assert said.count("not attempted yet") == len(EXERCISES)
