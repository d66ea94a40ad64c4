"""Lesson 10: its checks tell right from wrong answers, and its cells run on a model in hub format."""

import ast
import functools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from course import notebooks
from helpers.profiles import ROOT
from tests.support.exercise_proof import planted, prove_check, read_exercises
from tests.support.lesson_run import run_lesson

NOTEBOOK = ROOT / "notebooks" / "10_compression.ipynb"
EXERCISES = read_exercises(NOTEBOOK)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def lesson() -> dict:
    """The functions of the lesson that exercises and tests use, taken from its own cells."""
    wanted = {"absmax", "zero_point", "gptq", "from_codes", "pack_bits", "unpack_bits", "pack_2_4", "unpack_2_4"}
    wanted |= {"distribution", "keep_or_replace", "keep_largest", "to_4_bits", "from_4_bits", "sparse_gpt"}
    wanted |= {"upper_factor", "mean", "NgramDrafter", "speculative", "plain_decoding", "advance", "forget"}
    names: dict = {
        "math": math,
        "np": np,
        "torch": torch,
        "Tensor": torch.Tensor,
        "F": torch.nn.functional,
        "functools": functools,
    }
    names |= {"Counter": Counter, "DynamicCache": DynamicCache, "LOSS": 0, "AWAY": 1}
    found = set()
    for cell in notebooks.read_notebook(NOTEBOOK).cells:
        if cell.cell_type == "code" and not notebooks.tags(cell):
            for node in ast.parse(cell.source).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in wanted:
                    exec(ast.unparse(node), names)
                    found.add(node.name)
    assert found == wanted
    return names


def test_the_check_of_double_quantise_finds_a_forgotten_mean_and_wrong_groups(lesson):
    exercise = EXERCISES["10.1"]
    wrong = [
        planted(exercise.solution, "largest - mean", "largest"),
        planted(exercise.solution, ", 8)", ", 4)"),
        planted(exercise.solution, "view(-1, block)", "view(block, -1)"),
        planted(exercise.solution, "largest.mean()", "largest.min()"),
        planted(
            exercise.solution,
            "codes, scales = absmax((largest - mean).view(-1, block), 8)",
            "codes, scales = absmax((largest - mean)[None], 8)\n"
            "    codes, scales = codes.view(-1, block), scales.expand(len(largest) // block, 1)",
        ),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_3_bits_finds_wrong_orders_and_whole_bytes(lesson):
    exercise = EXERCISES["10.2"]
    wrong = [
        planted(exercise.solution, "groups[:, i] << (21 - 3 * i)", "groups[:, i] << (3 * i)"),
        planted(exercise.solution, "number >> (21 - 3 * i) & 7", "number >> (3 * i) & 7"),
        planted(exercise.solution, "(16, 8, 0)", "(0, 8, 16)"),
        planted(exercise.solution, "& 7", "& 15"),
        planted(
            exercise.solution, "for i in range(8)], 1).flatten().to(torch.uint8)", "for i in range(8)], 1).flatten()"
        ),
        exercise.stub.replace("    raise NotImplementedError", "    return codes.to(torch.uint8)", 1).replace(
            "    raise NotImplementedError", "    return packed"
        ),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_gptq_in_order_finds_other_orders_and_columns_left_permuted(lesson):
    exercise = EXERCISES["10.3"]
    wrong = [
        planted(exercise.solution, "descending=True", "descending=False"),
        planted(exercise.solution, "[:, order.argsort()]", ""),
        planted(exercise.solution, "[:, order.argsort()]", "[:, order]"),
        planted(exercise.solution, "moments[order][:, order]", "moments"),
        planted(exercise.solution, "weight.shape[1])", "8)"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_draft_length_finds_equal_chances_free_passes_and_sums_that_are_off_by_one(lesson):
    exercise = EXERCISES["10.4"]
    wrong = [
        planted(exercise.solution, "stands *= chance", "stands = chance**k"),
        planted(exercise.solution, "stands *= chance", "stands = (sum(kept) / len(kept)) ** k"),
        planted(exercise.solution, "stands *= chance", "stands = chance"),
        planted(exercise.solution, "tokens = stands = 1.0", "tokens, stands = 0.0, 1.0"),
        planted(exercise.solution, "(k * c + v[k])", "(c + v[k])"),
        planted(exercise.solution, "(k * c + v[k])", "(k * c + 1)"),
        planted(exercise.solution, "(k * c + v[k])", "(k * c + v[k - 1])"),
        planted(exercise.solution, "speedups = [1.0]", "speedups = [0.0]"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_the_allocation_finds_uniform_bits_and_broken_budgets(lesson):
    exercise = EXERCISES["10.5"]
    uniform = "    return {name: max(b for b in (2, 3, 4, 8) if b <= mean_bits) for name in errors}"
    wrong = [
        exercise.stub.replace("    raise NotImplementedError", uniform),
        planted(exercise.solution, "total <= room and ", ""),
        planted(exercise.solution, "bits * sizes[name] // 1000", "bits * 4"),
        planted(exercise.solution, "error + more < longer", "error + more > longer"),
    ]
    prove_check(exercise, lesson, wrong)


def test_the_check_of_random_rows_finds_guesses_that_are_missing_and_draws_that_are_not_uniform(lesson):
    exercise = EXERCISES["10.6"]
    names = {
        "base": SimpleNamespace(config=SimpleNamespace(vocab_size=1536)),
        "input_statistics": lambda model, batches: {},
        "by_gptq": lambda found, bits: None,
        "compressed": lambda model, method: model,
        "measure": lambda model: np.ones((4, 4)),
        "away": {("round to nearest", 3): np.ones((4, 4))},
        "share_left": lambda bits, label: 0.5,
    }
    draw = "torch.randint(base.config.vocab_size, (number, length))"
    wrong = [
        planted(exercise.solution, "PREDICTION = 0.8", "PREDICTION = None"),
        planted(exercise.solution, "PREDICTION = 0.8", "PREDICTION = True"),
        planted(exercise.solution, draw, f"{draw}.float()"),
        planted(exercise.solution, draw, "torch.randint(base.config.vocab_size - 1, (number, length))"),
        planted(exercise.solution, draw, "torch.randint(256, (number, length))"),
        planted(exercise.solution, draw, "torch.randint(base.config.vocab_size, (number, 1)).expand(-1, length // 2)"),
        planted(exercise.solution, draw, "torch.arange(number * length).view(number, length) % base.config.vocab_size"),
    ]
    prove_check(exercise, lesson | names, wrong)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_packed_codes_come_back_and_take_their_bits_in_storage(lesson, bits):
    codes = torch.randint(0, 2**bits, (128,), dtype=torch.uint8)
    packed = lesson["pack_bits"](codes, bits)
    assert packed.untyped_storage().nbytes() == 128 * bits // 8
    assert torch.equal(lesson["unpack_bits"](packed, bits), codes)


def test_a_2_4_weight_comes_back_also_where_more_than_two_of_four_are_zero(lesson):
    weight = torch.randn(16, 32)
    weight = weight * lesson["keep_largest"](weight.abs(), "2:4")
    weight[0, :8] = 0
    assert torch.equal(lesson["unpack_2_4"](**lesson["pack_2_4"](weight), shape=weight.shape), weight)
    pruned = lesson["sparse_gpt"](torch.randn(8, 64), torch.eye(64) + 0.1, "2:4")
    assert (pruned.view(-1, 4) != 0).sum(1).eq(2).all()


def test_the_speculative_rule_gives_the_target_distribution_for_any_draft(lesson):
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(1, 6, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    draws = 200_000
    drafted = torch.multinomial(q.expand(draws, -1), 1, generator=generator)[:, 0]
    _, tokens = lesson["keep_or_replace"](p.expand(draws, -1), q.expand(draws, -1), drafted, generator)
    share = torch.bincount(tokens, minlength=6) / draws
    assert (share - p[0]).abs().max() < 0.005


def test_gptq_on_a_diagonal_is_rounding_to_nearest(lesson):
    weight = torch.randn(16, 64)
    codes, scales, zeros = lesson["zero_point"](weight, 3)
    found = lesson["from_codes"](*lesson["gptq"](weight, torch.rand(64).diag() + torch.eye(64), 3, 64))
    assert torch.allclose(found, (codes - zeros) * scales, atol=1e-5)


def test_gptq_gives_the_weights_of_llmcompressor(lesson):
    """Runs where that library is installed: the course does not need it."""
    library = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(24, 128, generator=generator), torch.randn(500, 128, generator=generator).cumsum(1)
    moments = x.T @ x
    _, scale, zero = lesson["zero_point"](weight, 4)
    settings = quantization.QuantizationArgs(num_bits=4, symmetric=False, strategy="channel")
    theirs, *_ = library.quantize_weight(
        weight[None].clone(), moments[None].clone(), scale[None], zero[None] - 8, None, settings
    )  # theirs are codes from -8 to 7
    ours = lesson["from_codes"](*lesson["gptq"](weight, moments, 4, 128))
    assert ((ours - theirs[0]).abs() < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_n_grams_draft_for_the_program_and_the_text_stays_the_models(lesson, tiny_model_folder, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder).float().eval()
    names = lesson["speculative"].__globals__
    names["base"] = model
    rows = torch.randint(model.config.vocab_size, (20, 32), generator=torch.Generator().manual_seed(0))
    drafter, prompt = lesson["NgramDrafter"](rows), rows[0, :10].tolist()
    if temperature == 0:
        found = lesson["speculative"](model, drafter, prompt, 12, 4)
        assert found[0] == lesson["plain_decoding"](model, prompt, 12)
    else:
        found = lesson["speculative"](model, drafter, prompt, 12, 4, 1.0, torch.Generator().manual_seed(1))
    assert len(found[0]) == 12 and found[1] <= 12


@pytest.fixture(scope="module")
def chat_model_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-chat"
    AutoModelForCausalLM.from_pretrained(tiny_model_folder).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_lesson_runs_on_a_model_and_data_in_the_hubs_formats(chat_model_folder, text_file, messages_file, tmp_path):
    parameters = {"profile": "t4", "model_id": str(chat_model_folder), "text_id": str(text_file), "budget": 0.02}
    _, said = run_lesson(NOTEBOOK, tmp_path, parameters | {"chat_id": str(messages_file)})
    assert "profile t4: tiny-chat on cpu in float32" in said
    assert "nf4: " in said and "texts are identical, token for token" in said
    assert said.count("not attempted yet") == len(EXERCISES)
