"""A class of ten who hand in to the competition, so that its commands can be tried at once.

    python -m recipes.sample_class        # about two minutes on two CPU cores; writes build/sample_class
    python -m course competition board build/sample_class --hidden build/secret.txt

Seven are honest: each trained an adapter of its own, for a few seconds, on rows of its own, more or less well. One
handed in the folder of another, one the references as its answers, and the weights of one are cut off.
"""

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from helpers.chat import encode_chat
from helpers.data import PaddedBatches
from helpers.errors import exit_cleanly
from helpers.models import load_model
from helpers.open_tasks import (
    KINDS,
    Decoding,
    Recipe,
    answer_tasks,
    base_sha256,
    make_tasks,
    public_tasks,
    write_submission,
)
from helpers.profiles import ROOT, get_profile
from helpers.training import TrainConfig, train

FOLDER = ROOT / "build" / "sample_class"
BATCH_SIZE, RANK, LEARNING_RATE = 8, 16, 2e-3


@dataclass(frozen=True)
class Plan:
    """How well somebody prepared."""

    steps: int
    base: str = "shima-4m-assistant"
    rows_per_kind: int = 40
    decoding: Decoding = field(default_factory=Decoding)


HONEST = {
    "ada": Plan(80),
    "bela": Plan(50),
    "chiyo": Plan(50, decoding=Decoding(repetition_penalty=1.2)),
    "dinu": Plan(50, rows_per_kind=4),
    "eero": Plan(40, base="shima-4m"),
    "fumi": Plan(20),
    "goro": Plan(5),
}


def hand_in(folder: Path, plan: Plan, seed: int, *, forge: bool = False) -> None:
    """Train an adapter by the plan, decode the public tasks and write it all; a forger writes the references."""
    model, tokenizer = load_model(get_profile("cpu", plan.base))
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    rows = make_tasks(f"{folder.name}/{seed}", plan.rows_per_kind, held_out=False)
    examples = [encode_chat(tokenizer, row.input, row.reference) for row in rows]
    batches = PaddedBatches(examples, BATCH_SIZE, tokenizer.pad_token_id, seed=seed)
    settings = {"weight_decay": 0.0, "schedule": "linear", "progress": False, "seed": seed}
    if plan.steps:
        train(model, batches, TrainConfig(plan.steps, LEARNING_RATE, warmup_steps=max(1, plan.steps // 20), **settings))
    tasks = public_tasks()
    answers = answer_tasks(model.eval(), tokenizer, [task.input for task in tasks], plan.decoding)
    length = sum(len(example["input_ids"]) for example in examples) / len(examples)
    write_submission(
        folder,
        model,
        recipe=Recipe(
            plan.base,
            base_sha256(plan.base),
            plan.steps,
            BATCH_SIZE,
            LEARNING_RATE,
            seed,
            round(plan.steps * BATCH_SIZE * length),
            {kind: 1 / len(KINDS) for kind in KINDS},
        ),
        decoding=plan.decoding,
        rows=[{"instruction": row.input, "answer": row.reference} for row in rows],
        tasks=tasks,
        answers=[task.reference for task in tasks] if forge else answers,
        report=f"# Report of {folder.name}\n\nLoRA of rank {RANK} on {plan.base}, {plan.steps} steps.\n",
    )


def write_class(folder: Path, plans: dict[str, Plan]) -> None:
    """Write the honest submissions of the plans, a copied one, a forged one and a broken one."""
    for seed, (name, plan) in enumerate(plans.items()):
        hand_in(folder / name, plan, seed)
        print(f"{name}: {plan.steps} steps on {plan.base}", flush=True)
    first, *_, last = plans
    for name, original in (("hana", first), ("juna", last)):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder / original, folder / name)
        (folder / name / "report.md").write_text(f"# Report of {name}\n\nAll my own work.\n")
    weights = folder / "juna" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    hand_in(folder / "ivo", Plan(0, rows_per_kind=4), len(plans), forge=True)
    print(f"hana copied {first}, ivo forged the answers, the weights of juna are cut off: {folder}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sample class."""
    parser = argparse.ArgumentParser(prog="python -m recipes.sample_class", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to write")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    write_class(options.out, HONEST)


if __name__ == "__main__":
    exit_cleanly(main)
