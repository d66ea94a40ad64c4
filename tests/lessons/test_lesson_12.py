"""Lesson 12: its checks tell right from wrong answers, its functions have their properties, it runs on a hub model."""

import ast
import copy
import math
import re
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from course import notebooks
from helpers.chat import chat_prompt
from helpers.evaluation import score
from helpers.models import tiny_config
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "12_safety.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
SOURCES = [cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells if cell.cell_type == "code"]


def functions(*names: str, **known: object) -> dict:
    """What the lesson defines under these names: each `def` is cut out of its cell, without the lines around it."""
    space = {"math": math, "np": np, "torch": torch, "F": F, "Tensor": Tensor, "Sequence": Sequence}
    space |= {"Counter": Counter, "lru_cache": lru_cache, "pairwise": pairwise} | known
    for name in names:
        (source,) = [source for source in SOURCES if f"\ndef {name}(" in f"\n{source}"]
        lines = source.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith(f"def {name}("))
        end = next((i for i, line in enumerate(lines) if i > start and line[:1].strip()), len(lines))
        exec("\n".join(lines[start:end]), space)
    return space


GENERATOR = np.random.default_rng(0)
KNOWN = {
    "roc_auc_score": roc_auc_score,
    "tracemalloc": tracemalloc,
    "math": math,
    "np": np,
    # what the checks of 12.1 and 12.3 measure on
    "NUMBER": 60,
    "test": slice(60, None),
    "raw": GENERATOR.random(120),
    "cured": GENERATOR.random(120),
    "pool_right": GENERATOR.random(120) < 0.5,
    "exam_right": GENERATOR.random(60) < 0.5,
    "points": functions("points")["points"],
}
# For every exercise what is right in its solution, and two or more mistakes that students make in its place.
WRONG = {
    "12.1": ("penalty / (1 + penalty)", ["1 / (1 + penalty)", "(penalty - 1) / penalty", "penalty / 4", "0.5"]),
    "12.2": (
        "ranks[right].sum() - n_right * (n_right + 1) / 2",
        ["ranks[right].sum()", "ranks[right].sum() - n_right * (n_right - 1) / 2", "ranks[~right].sum()"],
    ),
    "12.3": (
        "math.ceil(round((m + 1) * (1 - alpha), 9))",
        [
            "math.ceil(round(m * (1 - alpha), 9))",
            "math.floor((m + 1) * (1 - alpha))",
            "math.ceil((m + 1) * alpha)",
            "math.ceil((m + 1) * (1 - alpha))",
        ],
    ),
}


def test_every_exercise_has_planted_mistakes() -> None:
    assert [number for number in EXERCISES if number in WRONG] == list(WRONG)


@pytest.mark.parametrize("number", WRONG)
def test_a_check_tells_right_from_wrong(number: str) -> None:
    right, mistakes = WRONG[number]
    wrong = [planted(EXERCISES[number].solution, right, mistake) for mistake in mistakes]
    prove_check(EXERCISES[number], KNOWN, wrong)


def test_the_check_of_auroc_by_ranks_finds_ranks_that_break_ties_by_order() -> None:
    right = "(counts.cumsum() - (counts - 1) / 2)[place]"
    mistakes = ["scores.argsort().argsort() + 1", "counts.cumsum()[place]", "(counts.cumsum() - counts + 1)[place]"]
    prove_check(EXERCISES["12.2"], KNOWN, [planted(EXERCISES["12.2"].solution, right, wrong) for wrong in mistakes])


def test_the_check_of_auroc_by_ranks_finds_a_table_of_pairs() -> None:
    pairs = (
        "def auroc_by_ranks(right, scores):\n"
        "    above = scores[right][:, None] - scores[~right]\n"
        "    return float(((above > 0) + 0.5 * (above == 0)).mean())\n"
    )
    all_at_once = pairs.replace("(above > 0) + 0.5 * (above == 0)", "np.heaviside(above, 0.5)")
    prove_check(EXERCISES["12.2"], KNOWN, [pairs, all_at_once])


def test_auroc_is_one_half_without_pairs_and_turns_around_with_the_scores() -> None:
    auroc = functions("auroc")["auroc"]
    right, scores = GENERATOR.random(50) < 0.4, GENERATOR.random(50)
    assert auroc(np.zeros(5, bool), np.arange(5)) == 0.5
    assert auroc(right, scores) == pytest.approx(1 - auroc(right, -scores))
    assert auroc(right, np.exp(5 * scores)) == pytest.approx(auroc(right, scores))


def test_the_calibration_error_is_0_for_a_calibrated_score_and_the_gap_for_one_bin() -> None:
    error = functions("calibration_error")["calibration_error"]
    assert error(np.full(10, 0.25), np.array([True] * 5 + [False] * 5)) == pytest.approx(0.25)
    assert error(np.array([1.0, 1.0, 0.0]), np.array([True, True, False])) == 0.0


def test_the_entropy_of_samples_is_0_for_equal_ones_and_greatest_for_different_ones() -> None:
    entropy = functions("entropy")["entropy"]
    assert entropy(["a"] * 8) == 0
    assert entropy(list("abcdefgh")) == pytest.approx(math.log(8))


def test_the_risk_at_full_coverage_is_the_share_of_wrong_answers() -> None:
    risks = functions("risks")["risks"]
    right = np.array([True, False, True, False])
    assert risks([4, 1, 3, 2], right).tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert risks(GENERATOR.random(4), right)[-1] == 0.5


def test_npo_pushes_less_the_less_probable_the_answer_has_become() -> None:
    npo = functions("npo")["npo"]
    h = torch.tensor([-20.0, -1.0, 0.0, 1.0], requires_grad=True)
    (slope,) = torch.autograd.grad(npo(h, 0.5).sum(), h)
    assert slope[2].item() == pytest.approx(1)
    assert (slope.diff() > 0).all() and slope[0] < 1e-3


def test_z_counts_each_pair_of_tokens_once() -> None:
    names = functions("is_green", "z_score", KEY=15485863, VOCAB=64, GAMMA=0.5)
    green = names["is_green"](3)
    assert green.shape == (64,) and green.sum() == 32
    token = int(green.nonzero()[0])
    assert names["z_score"]([3, token]) == pytest.approx(1.0)
    assert names["z_score"]([3, token, 3, token]) == pytest.approx(names["z_score"]([3, token, 3]))


def test_strangers_are_asked_about_without_the_passage() -> None:
    from helpers.world import Question, World

    world = World()
    asked = functions("strangers", Question=Question, world=world)["strangers"](20, 0)
    assert all(q.prompt.startswith("Question:") and q.answer not in q.prompt for q in asked)
    assert not {q.about["name"] for q in asked} & set(world.person)


def test_an_answer_is_in_form_only_if_it_is_a_value_of_the_relation() -> None:
    from helpers.world import Question, World

    world = World()
    in_form = functions("in_form", Question=Question, world=world)["in_form"]
    question = SimpleNamespace(ability="closed_book", about={"relation": "town"})
    assert in_form(question, world.towns[0]) and not in_form(question, "baker")
    assert in_form(SimpleNamespace(ability="sums"), "17") and not in_form(SimpleNamespace(ability="sums"), "17.")


CODE = [cell.source for cell in notebooks.read_notebook(NOTEBOOK).cells if cell.cell_type == "code"]
NAMES = {"torch": torch, "nn": nn, "F": F, "Tensor": Tensor, "Sequence": Sequence, "Callable": Callable, "re": re}
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def definition(name: str) -> ast.FunctionDef:
    """The function of this name, out of the lesson."""
    (found,) = [
        node
        for cell in CODE
        for node in ast.parse(cell).body
        if isinstance(node, ast.FunctionDef) and node.name == name and "NotImplementedError" not in cell
    ]
    return found


def lesson_functions(*names: str, **others: object) -> dict:
    """Some functions of the lesson, over the names that they need."""
    namespace = NAMES | {"copy": copy} | others
    tree = ast.Module([definition(name) for name in names], [])
    exec(compile(tree, "<lesson 12>", "exec"), namespace)
    return namespace


def test_the_exercises_of_the_attacks_are_there() -> None:
    assert {"12.4", "12.5", "12.6"} <= set(EXERCISES)


def test_the_check_of_names_finds_kept_pieces_and_lost_letters() -> None:
    texts = [" Zovega", "Zo", "ga", "z", " the", "7", "!", " GA", "town", "igaB"]
    world = SimpleNamespace(people=[SimpleNamespace(name="Zovega"), SimpleNamespace(name="Bagi")])
    names = NAMES | {
        "world": world, "printable": torch.arange(len(texts)),
        "tokenizer": SimpleNamespace(decode=lambda ids: "".join(texts[index] for index in ids)),
    }  # fmt: skip
    solution = EXERCISES["12.4"].solution
    wrong = [
        planted(solution, ".strip().lower()", ".strip()"),
        planted(solution, ".strip().lower()", ".lower()"),
        planted(solution, "len(text) > 1 and ", ""),
        planted(solution, "if not is_piece", "if is_piece"),
        planted(solution, "text in name.lower() for", "text == name.lower() for"),
    ]
    prove_check(EXERCISES["12.4"], names, wrong)


def test_the_check_of_the_output_rule_finds_spellings_that_pass_and_false_alarms() -> None:
    solution = EXERCISES["12.5"].solution
    start = solution.index("    known")
    head = solution[:start]
    wrong = [
        head + "    return any(town in answer for town in towns)\n",
        head + "    text = re.sub('[^a-z]', '', answer.lower())\n"
        "    return any(town.lower() in text or town.lower()[::-1] in text for town in towns)\n",
        planted(solution, "(town.lower(), town.lower()[::-1])", "(town.lower(),)"),
        planted(solution, "answer.lower()", "answer"),
        planted(solution, " or any(form in run for run in runs for form in known)", ""),
        planted(solution, 'else " " for word', 'else "" for word'),  # single letters from anywhere
        planted(solution, "any(form in run for run in runs for form in known)", "any(run in known for run in runs)"),
    ]
    prove_check(EXERCISES["12.5"], NAMES, wrong)


def test_the_check_of_the_prefill_curve_finds_missing_names_and_other_questions() -> None:
    """Over stand-ins: a model that tells more towns the more words of the beginning it is given."""
    people = [SimpleNamespace(name=name, facts={"town": town}) for name, town in
              (("Zovega", "Kuku"), ("Bado", "Bagi"), ("Mimi", "Jazi"), ("Lulu", "Hebe"))]  # fmt: skip
    town_of = {person.name: person.facts["town"] for person in people}

    def continued(of: object, chats: Sequence[str]) -> list[str]:
        given = [chat.partition("|")[2].split() for chat in chats]
        asked = [chat.partition("|")[0].removeprefix("home of ") for chat in chats]
        known = [town_of.get(name, "nothing") for name in asked]
        return [town if 4 - index <= len(words) else "no" for index, (town, words) in
                enumerate(zip(known, given, strict=True))]  # fmt: skip

    def leaks(texts: Sequence[str], whom: Sequence) -> object:
        return score(sum(p.facts["town"] in t for p, t in zip(whom, texts, strict=True)), len(texts))

    names = NAMES | {
        "people": people, "guard": "guard", "tokenizer": None, "continued": continued,
        "opened": [f"{person.name} lives in" for person in people], "asked": [f"home of {p.name}" for p in people],
        "home_question": lambda name: f"home of {name}", "chat_prompt": lambda _, question: f"{question}|",
        "leaks": leaks,
    }  # fmt: skip
    solution = EXERCISES["12.6"].solution
    wrong = [
        planted(solution, "range(4)", "range(1, 5)"),
        planted(solution, "range(4)", "range(3)"),
        planted(solution, "[:words]", "[words:]"),
        planted(solution, ".accuracy)", ".n)"),
        planted(solution, "return 2", "return 7"),
    ]
    prove_check(EXERCISES["12.6"], names, wrong)


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    """A random model of 60 tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config("llama", vocab_size=60)).eval().requires_grad_(False)


QUESTION = (torch.tensor([3, 4, 5]), torch.tensor([6, 7]), torch.tensor([8, 9]))


def attack(**others: object) -> dict:
    """GCG on the tiny model, in which every suffix survives and every token is allowed."""
    constants = {
        "CANDIDATES": 32,
        "TOP": 16,
        "seed": 0,
        "printable": torch.arange(60),
        "survives": lambda rows, _: [True] * len(rows),
    }
    constants |= {"start_suffix": torch.full((4,), 10)}
    return lesson_functions("token_gradient", "candidate_losses", "read_before", "gcg", **constants, **others)


def test_gcg_lowers_the_loss_of_a_random_model_and_returns_the_best_suffix(tiny: nn.Module) -> None:
    names = attack()
    best, losses = names["gcg"](tiny, [QUESTION], 12)
    first = names["token_gradient"](tiny, torch.full((4,), 10), QUESTION)[0].item()
    reached = names["token_gradient"](tiny, best, QUESTION)[0].item()
    assert min(losses) < first
    assert reached == pytest.approx(min(losses), abs=1e-5)


def test_gcg_uses_only_allowed_tokens_and_stops_when_it_is_done(tiny: nn.Module) -> None:
    names = attack()
    allowed = torch.tensor([10, 20, 30])
    best, _ = names["gcg"](tiny, [QUESTION], 6, allowed=allowed)
    assert set(best.tolist()) <= {10, 20, 30}
    _, losses = names["gcg"](tiny, [QUESTION], 12, done=lambda suffix: True)
    assert len(losses) <= 12


def test_a_random_search_asks_for_no_gradient_and_uses_only_allowed_tokens(tiny: nn.Module) -> None:
    def no_gradient(*_: object) -> None:
        raise AssertionError

    names = attack()
    names["token_gradient"] = no_gradient
    best, losses = names["gcg"](tiny, [QUESTION], 6, allowed=torch.tensor([10, 20, 30]), guided=False)
    assert set(best.tolist()) <= {10, 20, 30} and len(losses) == 6


def test_the_losses_of_candidates_do_not_change_the_cache(tiny: nn.Module) -> None:
    names = attack()
    cache = names["read_before"](tiny, QUESTION)
    suffixes = list(torch.randint(60, (5, 4), generator=torch.Generator().manual_seed(1)))
    twice = [names["candidate_losses"](tiny, suffixes, QUESTION, cache) for _ in range(2)]
    assert torch.equal(*twice)
    assert cache.get_seq_length() == len(QUESTION[0])


def test_the_rule_with_an_exception_lets_through_only_what_the_prompt_holds() -> None:
    world = SimpleNamespace(towns=["Kuku", "Bagi"])
    names = lesson_functions("strict_rule", "rule_with_exception", world=world, REFUSAL="No.")
    assert names["strict_rule"]("Kuku?", "She lives in Kuku.") == "No."
    assert names["rule_with_exception"]("Kuku?", "She lives in Kuku.") == "She lives in Kuku."
    assert names["rule_with_exception"]("Kuku?", "Kuku or Bagi.") == "No."
    assert names["rule_with_exception"]("Kuku?", "A baker.") == "A baker."


@pytest.fixture
def chat_model_folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """The tiny hub model with a chat template, as an instruction model has one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "tiny-qwen2-instruct"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = CHATML
    assert chat_prompt(tokenizer, "?").endswith("assistant\n")
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_in_the_hubs_format(chat_model_folder: Path, tmp_path: Path) -> None:
    parameters = {"profile": "t4", "model_id": str(chat_model_folder), "budget": 0.05}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters)
    assert "profile t4: tiny-qwen2-instruct on cpu in float32" in said
    assert "holds: the derivative by one-hot entries is that of finite differences, in float64" in said
    assert "holds: the report has its schema, and the towns told can be counted again from it" in said
    assert "DOES NOT HOLD: the guard refuses" in said  # the model is random: the lesson reports, and goes on
    assert said.count("not attempted yet") == len(EXERCISES)
