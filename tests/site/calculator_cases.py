"""Writes site/calculator_cases.json: questions to the memory calculator, and the answers of `helpers.memory`.

The table is what Python and the page in the browser are both checked against. Run it after changing the estimates:
`python -m tests.site.calculator_cases`.
"""

import json
import random
from dataclasses import replace
from typing import Any

from helpers.errors import exit_cleanly
from helpers.memory import (
    ATTENTION,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    QUANTISATIONS,
    Estimate,
    ModelShape,
    bundled_shapes,
    estimate_inference,
    estimate_training,
)
from helpers.profiles import ROOT

CASES = ROOT / "site/calculator_cases.json"
TRAINING = {
    "method": METHODS,
    "optimizer": OPTIMIZERS,
    "precision": tuple(PRECISIONS),
    "batch_size": (1, 2, 3, 16),
    "seq_len": (1, 33, 512, 1000, 1024, 2048, 8192),
    "gradient_checkpointing": (False, True),
    "attention": ATTENTION,
    "lora_rank": (1, 8, 64),
    "zero_stage": (0, 0, 1, 2, 3),
    "num_gpus": (2, 3, 64),
    "padded": (False, True),
    "loss_chunks": (1, 1, 8),
}
INFERENCE = {
    "precision": ("fp32", "fp16", "bf16"),
    "batch_size": (1, 3, 64),
    "context_len": (1, 77, 1024, 8192, 32768),
    "quantization": (None, *QUANTISATIONS),
    "cache_precision": (None, "fp8", "int8", "int4"),
    "attention": ATTENTION,
}
CHANGES = (  # sizes of models that do not exist, as the form lets one enter them
    {},
    {},
    {"num_layers": 7, "vocab_size": 32768},
    {"hidden_size": 1152, "num_heads": 12, "num_kv_heads": 12, "head_dim": 96, "tied_embeddings": True},
)


def changed_shape(model: str, changes: dict[str, Any]) -> ModelShape:
    """The bundled shape with other sizes."""
    return replace(ModelShape.from_config(model), **changes)


def estimate(case: dict[str, Any]) -> Estimate:
    """What `helpers.memory` says."""
    ask = estimate_training if case["purpose"] == "training" else estimate_inference
    return ask(changed_shape(case["model"], case["changes"]), **case["settings"])


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """What is compared, in bytes."""
    result = estimate(case)
    return {
        "num_parameters": result.shape.num_parameters,
        "phase": result.phase,
        "parts": result.parts,
        "total": result.total,
        "host": result.host,
        "phases": result.phases,
    }


def draw_cases(seed: int, rounds: int) -> list[dict[str, Any]]:
    """In each round a question about training and one about generation for every bundled model."""
    draw, cases = random.Random(seed), []
    for _ in range(rounds):
        for model in bundled_shapes():
            for purpose, grid in (("training", TRAINING), ("inference", INFERENCE)):
                settings = {name: draw.choice(values) for name, values in grid.items()}
                if not settings.get("zero_stage"):
                    settings.pop("num_gpus", None)
                case = {"model": model, "purpose": purpose, "changes": draw.choice(CHANGES), "settings": settings}
                for length in ("seq_len", "context_len"):
                    if length in settings and "gpt2" in model:
                        settings[length] = min(settings[length], 1024)
                cases.append(case | {"expected": answer(case)})
    return cases


def main() -> None:
    """Write the table."""
    lines = [json.dumps(case, separators=(", ", ":")) for case in draw_cases(seed=0, rounds=1)]
    CASES.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"{len(lines)} cases in {CASES.relative_to(ROOT)}")


if __name__ == "__main__":
    exit_cleanly(main)
