"""The folder that is handed in: an adapter, how it was made and how it decodes, and its answers. Never code."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from helpers.files import replacing_folder, sha256
from helpers.models import MODEL_FOLDERS
from helpers.open_tasks.decoding import Decoding
from helpers.open_tasks.task import Task


@cache
def base_sha256(base: str) -> str:
    """Hash of a base model's weights, by which a recipe names it beyond doubt."""
    return sha256(MODEL_FOLDERS[base] / "model.safetensors")


@dataclass(frozen=True)
class Recipe:
    """The settings in `recipe.json`: what made the adapter."""

    base: str  # shima-4m or shima-4m-assistant
    base_sha256: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    trained_tokens: int  # all that the adapter was trained on, padding not counted
    mixture: dict[str, float] = field(default_factory=dict)  # kind of row -> share of the training rows
    dpo: dict[str, float] | None = None  # its settings, if there was any


def write_submission(
    folder: Path,
    model,
    *,
    recipe: Recipe,
    decoding: Decoding,
    rows: Sequence[Mapping[str, str]],
    tasks: Sequence[Task],
    answers: Sequence[str],
    report: str,
) -> None:
    """Write a submission of a model of peft, all or nothing."""
    with replacing_folder(folder) as beside:
        model.save_pretrained(beside / "adapter")
        _write_json(beside / "recipe.json", asdict(recipe))
        _write_json(beside / "decode.json", asdict(decoding))
        _write_rows(beside / "train.jsonl", rows)
        answered = zip(tasks, answers, strict=True)
        _write_rows(
            beside / "submission.jsonl", [{"task_id": task.task_id, "output": answer} for task, answer in answered]
        )
        (beside / "report.md").write_text(report, encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_rows(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
