"""One submission: everything that was handed in, read and checked. Nothing of it is ever run."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig

from course.competition.overlap import tasks_in
from course.competition.reading import (
    KIB,
    check_entries,
    read_object,
    read_plain,
    read_text,
    read_values,
    refuse,
    text_in,
)
from course.competition.tensors import read_header, read_tensors
from helpers.models import MODEL_FOLDERS
from helpers.open_tasks import Decoding, Recipe, base_sha256, public_tasks

FILES = {"adapter", "decode.json", "recipe.json", "train.jsonl", "submission.jsonl", "report.md"}
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
IGNORED = {".DS_Store", "README.md"}  # the second is what peft writes
LARGEST_ADAPTER, LARGEST_SETTINGS, LARGEST_REPORT = 2048 * KIB, 16 * KIB, 64 * KIB
LARGEST_ROWS, LARGEST_ANSWERS = 4096 * KIB, 256 * KIB
MOST_ROWS, LONGEST_ROW, LONGEST_ANSWER, LONGEST_TEMPLATE, MOST_TOKENS = 3000, 2000, 600, 2000, 600_000
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NOT_USED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}

Settings = TypeVar("Settings", Decoding, Recipe)


@dataclass(frozen=True)
class Submission:
    """A folder that passed every check."""

    recipe: Recipe
    decoding: Decoding
    lora: LoraConfig
    adapter: dict[str, torch.Tensor]
    rows: list[dict[str, str]]  # of training
    answers: list[str]  # to the public tasks, in their order
    key: str  # hash of what decides about its answers: base, adapter and decoding


def number(low: float, high: float) -> Callable[[Any], bool]:
    """A check for numbers from `low` to `high`."""
    return lambda value: type(value) in (int, float) and low <= value <= high


def whole(low: int, high: int) -> Callable[[Any], bool]:
    """A check for whole numbers from `low` to `high`."""
    return lambda value: type(value) is int and low <= value <= high


def numbers(value: Any) -> bool:
    """A check for a few named numbers."""
    return isinstance(value, dict) and len(value) <= 50 and all(map(number(-1e9, 1e9), value.values()))


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "template": (
        lambda value: (
            value is None or (isinstance(value, str) and len(value) <= LONGEST_TEMPLATE and value.count("{input}") == 1)
        ),
        f"null, or a text of at most {LONGEST_TEMPLATE} characters with one {{input}}",
    ),
    "stop": (
        lambda value: (
            isinstance(value, list)
            and len(value) <= 4
            and all(isinstance(text, str) and 0 < len(text) <= 20 for text in value)
        ),
        "at most four texts of 1 to 20 characters",
    ),
    "temperature": (number(0, 2), "a number from 0 to 2"),
    "top_p": (number(0.01, 1), "a number from 0.01 to 1"),
    "repetition_penalty": (number(0.5, 3), "a number from 0.5 to 3"),
    "num_samples": (whole(1, 8), "a whole number from 1 to 8"),
    "vote": (lambda value: value in ("frequent", "probable"), "frequent or probable"),
    "max_new_tokens": (whole(1, 128), "a whole number from 1 to 128"),
    "seed": (whole(0, 2**31), "a whole number from 0"),
    "base": (lambda value: isinstance(value, str) and value in MODEL_FOLDERS, " or ".join(MODEL_FOLDERS)),
    "base_sha256": (lambda value: isinstance(value, str), "a text"),
    "steps": (whole(0, 10**6), "a whole number from 0"),
    "batch_size": (whole(1, 10**4), "a whole number from 1"),
    "learning_rate": (number(0, 1), "a number from 0 to 1"),
    "trained_tokens": (whole(0, MOST_TOKENS), f"a whole number of at most {MOST_TOKENS:,}, the budget"),
    "mixture": (numbers, "an object of numbers"),
    "dpo": (lambda value: value is None or numbers(value), "null, or an object of numbers"),
    "r": (whole(1, 64), "a whole number from 1 to 64"),
    "lora_alpha": (number(0.01, 1024), "a number from 0.01 to 1024"),
    "target_modules": (
        lambda value: isinstance(value, list) and value and all(part in LINEAR for part in value),
        f"a list of some of {', '.join(LINEAR)}",
    ),
    "use_rslora": (lambda value: type(value) is bool, "true or false"),
}


def read_submission(folder: Path) -> Submission:
    """Read and check a folder. CourseError with the first reason to refuse it."""
    check_entries(folder, FILES, IGNORED)
    check_entries(folder / "adapter", ADAPTER_FILES, IGNORED)
    decoding = read_settings(folder / "decode.json", Decoding)
    recipe = read_settings(folder / "recipe.json", Recipe)
    if recipe.base_sha256 != base_sha256(recipe.base):
        refuse(f"recipe.json names another {recipe.base} by its hash than this course has")
    lora = read_lora(folder / "adapter" / "adapter_config.json")
    content = read_plain(folder / "adapter" / "adapter_model.safetensors", LARGEST_ADAPTER)
    adapter = read_tensors(content, "adapter_model.safetensors", expected_shapes(recipe.base, lora))
    rows = read_rows(folder / "train.jsonl")
    answers = read_answers(folder / "submission.jsonl")
    if not read_text(folder / "report.md", LARGEST_REPORT).strip():
        refuse("report.md is empty")
    decides = [recipe.base_sha256, lora.r, lora.lora_alpha, sorted(lora.target_modules), lora.use_rslora]
    key = hashlib.sha256(json.dumps([decides, asdict(decoding)]).encode() + content).hexdigest()
    return Submission(recipe, decoding, lora, adapter, rows, answers, key)


def checked(key: str, value: Any, name: str) -> Any:
    """The value of a setting, if it is allowed."""
    check, wanted = CHECKS[key]
    if not check(value):
        refuse(f"{name} has a {key} that is not {wanted}")
    return value


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """The settings of a file: those that the class has, and no others."""
    values = read_object(path, LARGEST_SETTINGS)
    known = {item.name: item for item in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        refuse(f"{path.name} has the unknown key {unknown[0][:40]!a}: allowed are {', '.join(known)}")
    needed = {name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING}
    if missing := sorted(needed - values.keys()):
        refuse(f"{path.name} lacks {missing[0]}")
    for key, value in values.items():
        checked(key, value, path.name)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def read_lora(path: Path) -> LoraConfig:
    """The shape of the adapter. What else peft wrote must be as peft has it for a plain LoRA, and is not used."""
    values = read_object(path, LARGEST_SETTINGS)
    if values.get("peft_type") != "LORA" or values.get("task_type") not in ("CAUSAL_LM", None):
        refuse(f"{path.name} is not that of a LoRA of a causal language model")
    used = {key: checked(key, values.get(key), path.name) for key in ("r", "lora_alpha", "target_modules")}
    used["use_rslora"] = checked("use_rslora", values.get("use_rslora", False), path.name)
    plain = LoraConfig(task_type="CAUSAL_LM", inference_mode=True).to_dict()
    for key, value in values.items():
        if key not in used and key not in NOT_USED | {"peft_type", "task_type"} and value and value != plain.get(key):
            refuse(f"{path.name} sets {key[:40]!a}, which a plain LoRA has not")
    return LoraConfig(task_type="CAUSAL_LM", **used)


@cache
def base_shapes(base: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of a base model."""
    return read_header((MODEL_FOLDERS[base] / "model.safetensors").read_bytes(), base)


def expected_shapes(base: str, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors that such an adapter has on the base model."""
    expected = {}
    for name, shape in base_shapes(base).items():
        module = name.removesuffix(".weight")
        if module.split(".")[-1] in lora.target_modules:
            outputs, inputs = shape
            expected[f"base_model.model.{module}.lora_A.weight"] = (lora.r, inputs)
            expected[f"base_model.model.{module}.lora_B.weight"] = (outputs, lora.r)
    return expected


def read_rows(path: Path) -> list[dict[str, str]]:
    """Training rows: instructions with an answer, or with a chosen and a rejected one. They hold no public task."""
    rows = []
    for place, row in enumerate(read_values(path, LARGEST_ROWS, MOST_ROWS), start=1):
        keys = ("instruction", "answer") if "answer" in row else ("instruction", "chosen", "rejected")
        rows.append({key: text_in(row, key, LONGEST_ROW, f"row {place} of {path.name}") for key in keys})
    if copied := tasks_in(["\n".join(row.values()) for row in rows], public_tasks()):
        refuse(f"{path.name} holds {len(copied)} of the public tasks word for word, task {copied[0].task_id} first")
    return rows


def read_answers(path: Path) -> list[str]:
    """An answer to each public task, once and in any order."""
    tasks = public_tasks()
    answers: dict[str, str] = {}
    for place, row in enumerate(read_values(path, LARGEST_ANSWERS, len(tasks)), start=1):
        task_id = text_in(row, "task_id", 20, f"row {place} of {path.name}")
        if task_id in answers:
            refuse(f"{path.name} answers task {task_id[:20]!a} twice")
        answers[task_id] = text_in(row, "output", LONGEST_ANSWER, f"row {place} of {path.name}")
    if odd := sorted(answers.keys() ^ {task.task_id for task in tasks}):
        refuse(
            f"{path.name} has {len(answers)} rows, and exactly one for each of the {len(tasks)} tasks is expected, "
            f"task {odd[0][:20]!a} differs"
        )
    return [answers[task.task_id] for task in tasks]
