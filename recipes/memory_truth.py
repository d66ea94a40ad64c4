"""Compares the estimates with real steps on models of 0.1 to 13 B parameters: `python -m recipes.memory_truth`.

Writes data/memory_truth.json: for each cell the settings, the truth and the estimate by part, and what three published
estimators say. Takes about ten minutes and 4 GB on one core; `--only TEXT` runs the cells whose model has TEXT.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import accelerate
import bitsandbytes
import peft
import torch
import transformers
from accelerate.commands.estimate import estimate_training_usage
from transformers import AutoConfig

from helpers.memory import ModelShape, bundled_shapes, estimate_training
from helpers.profiles import ROOT
from recipes.memory_tracker import measure

MODELS = [
    "openai-community/gpt2",
    "HuggingFaceTB/SmolLM2-135M",
    "llm-jp/llm-jp-3-150m",
    "EleutherAI/pythia-160m",
    "Qwen/Qwen2.5-0.5B",
    "Qwen/Qwen3-0.6B",
    "openai-community/gpt2-large",
    "llm-jp/llm-jp-3-980m",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "meta-llama/Llama-3.2-1B",
    "EleutherAI/pythia-1.4b",
    "Qwen/Qwen2.5-1.5B",
    "google/gemma-2b",
    "meta-llama/Llama-3.2-3B",
    "microsoft/Phi-3-mini-4k-instruct",
    "meta-llama/Llama-2-7b-hf",
    "mistralai/Mistral-7B-v0.1",
    "Qwen/Qwen2.5-7B",
    "google/gemma-7b",
    "meta-llama/Meta-Llama-3-8B",
    "EleutherAI/pythia-12b",
    "llm-jp/llm-jp-3-13b",
]
SETTINGS = [
    {"batch_size": 2, "seq_len": 1024},
    {"batch_size": 4, "seq_len": 1024, "gradient_checkpointing": True},
    {"batch_size": 1, "seq_len": 512, "precision": "bf16-mixed"},
    {"batch_size": 1, "seq_len": 1024, "method": "lora", "rank": 8},
    {"batch_size": 2, "seq_len": 1024, "method": "qlora", "gradient_checkpointing": True},
    {"batch_size": 2, "seq_len": 512, "attention": "eager", "precision": "fp16"},
    {"batch_size": 8, "seq_len": 256, "method": "lora", "precision": "fp16-mixed", "gradient_checkpointing": True},
    {"batch_size": 1, "seq_len": 1024, "precision": "fp32", "gradient_checkpointing": True},
    {"batch_size": 1, "seq_len": 128, "precision": "bf16", "optimizer": "sgd"},
]


def cells() -> list[tuple[str, dict]]:
    """Every model with six of the settings, each time others."""
    return [
        (model, setting)
        for number, model in enumerate(MODELS)
        for index, setting in enumerate(SETTINGS)
        if (index + 2 * number) % len(SETTINGS) < 6
    ]


def published(shape: ModelShape, setting: dict) -> dict[str, float | None]:
    """What other estimators say in bytes; they know full fine-tuning with Adam only.

    accelerate estimate-memory: largest of model, gradients, optimiser and step (its code, for a batch of 1).
    DeepSpeed: estimate_zero2_model_states_mem_needs on one GPU without offload, 4 + 16 bytes a parameter.
    EleutherAI, Transformer Math 101 (Anthony et al. 2023): weights, 12 bytes of AdamW, gradients, and
    activations s b h L (10 + 24 + 5 a s / h), or 2 s b h L when all are recomputed.
    """
    if setting.get("method", "full") != "full" or setting.get("optimizer", "adamw") != "adamw":
        return {"accelerate": None, "deepspeed": None, "eleuther": None}
    count, precision = shape.num_parameters, setting.get("precision", "bf16")
    named = "float32" if precision == "fp32" else "bfloat16" if "bf16" in precision else "float16"
    tokens = setting["batch_size"] * setting["seq_len"]
    factor = 34 + 5 * shape.num_heads * setting["seq_len"] / shape.hidden_size
    if setting.get("gradient_checkpointing"):
        factor = 2
    width = 4 if precision == "fp32" else 2
    return {
        "accelerate": max(estimate_training_usage(4 * count, named).values()),
        "deepspeed": 20 * count,
        "eleuther": (width + 12 + width) * count + tokens * shape.hidden_size * shape.num_layers * factor,
    }


def compare(model: str, setting: dict, truth: dict | None = None) -> dict:
    """One cell of the table, measured anew unless the truth is given."""
    fields = {name: value for name, value in bundled_shapes()[model].items() if name not in ("model_type", "source")}
    config = AutoConfig.for_model(bundled_shapes()[model]["model_type"], **fields, pad_token_id=None)
    shape = ModelShape.from_config(model)
    truth = truth or measure(config, **setting)["peak"]
    renamed = {"lora_rank" if name == "rank" else name: value for name, value in setting.items()}
    estimate = estimate_training(shape, device="cpu", **renamed)
    return {
        "model": model,
        "num_parameters": shape.num_parameters,
        "settings": setting,
        "truth": truth | {"total": sum(size for part, size in truth.items() if part != "total")},
        "estimate": estimate.parts | {"total": estimate.total},
        "published": published(shape, setting),
    }


def error(cell: dict, part: str) -> float | None:
    """Relative error; of a part, only where it is at least 1 % of the total."""
    true = cell["truth"].get(part, 0)
    return None if true < 0.01 * cell["truth"]["total"] else cell["estimate"][part] / true - 1


def summary(table: list[dict]) -> dict[str, dict[str, float]]:
    """Median and largest absolute error of the total, of each part, and of the published estimators."""
    rows = {part: [error(cell, part) for cell in table] for part in table[0]["estimate"]}
    for name in table[0]["published"]:
        rows[name] = [c["published"][name] and c["published"][name] / c["truth"]["total"] - 1 for c in table]
    found = {name: [abs(e) for e in errors if e is not None] for name, errors in rows.items()}
    return {
        name: {"cells": len(e), "median": round(statistics.median(e), 5), "largest": round(max(e), 5)}
        for name, e in found.items()
        if e
    }


def main() -> None:
    """Measure all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--estimates", action="store_true", help="keep the measurements, make the estimates anew")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "memory_truth.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    table, known = [], {}
    if options.estimates:
        measured = json.loads(options.out.read_text())["cells"]
        known = {(cell["model"], str(cell["settings"])): cell["truth"] for cell in measured}
    for model, setting in cells():
        if options.only not in model:
            continue
        started = time.perf_counter()
        table.append(compare(model, setting, known.get((model, str(setting)))))
        gc.collect()
        seconds = time.perf_counter() - started
        worst = {part: f"{e:+.2%}" for part in table[-1]["estimate"] if (e := error(table[-1], part)) is not None}
        print(
            f"{model:<36}{table[-1]['truth']['total'] / 2**30:8.2f} GiB {seconds:5.1f} s  {worst} {setting}", flush=True
        )
    modules = (torch, transformers, peft, bitsandbytes, accelerate)
    versions = {module.__name__: module.__version__ for module in modules}
    result = {"unit": "bytes", "versions": versions, "summary": summary(table)}
    lines = ",\n".join(f"  {json.dumps(cell)}" for cell in table)
    options.out.write_text(json.dumps(result, indent=1)[:-2] + f',\n "cells": [\n{lines}\n ]\n}}\n')
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
