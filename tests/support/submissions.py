"""Submissions to the competition, made in a moment: small adapters that decode few tokens."""

import json
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from helpers.models import load_assistant
from helpers.open_tasks import (
    Decoding,
    Recipe,
    answer_tasks,
    base_sha256,
    make_tasks,
    public_tasks,
    write_submission,
)
from helpers.profiles import get_profile

BASE = "shima-4m-assistant"
DECODING = Decoding(max_new_tokens=6)


@cache
def rows() -> list[dict[str, str]]:
    """Honest training rows."""
    return [{"instruction": t.input, "answer": t.reference} for t in make_tasks("rows", 3, held_out=False)]


def write_honest(folder: Path, seed: int = 0) -> Path:
    """A submission with a random adapter of rank 1, whose answers are those of its weights."""
    model, tokenizer = load_assistant(get_profile("cpu"))
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    tasks = public_tasks()
    write_submission(
        folder,
        model,
        recipe=Recipe(BASE, base_sha256(BASE), 1, 1, 1e-3, seed, 1000),
        decoding=DECODING,
        rows=rows(),
        tasks=tasks,
        answers=answer_tasks(model.eval(), tokenizer, [task.input for task in tasks], DECODING),
        report=f"# Report {seed}\n",
    )
    return folder


def change_json(path: Path, **values) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
