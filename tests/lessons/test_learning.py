"""Training still improves, by a stated margin, with every trainer that the lessons use, and would be missed if not.

A library may change what an argument means, and a training loop then runs to its end without any effect. So each
trainer here trains a small model for some seconds and is measured from outside, on held-out data, before and after.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from helpers.chat import encode_chat
from helpers.data import PaddedBatches, collate, instruction_dataset, pack, text_dataset
from helpers.generation import generate, sequence_log_probs
from helpers.models import load_model, tiny_config
from helpers.profiles import get_profile
from helpers.training import TrainConfig, train

pytestmark = pytest.mark.slow

BASE, TOKENIZER = load_model(get_profile("cpu"))
STEPS, BATCH = 10, 4
COMMON = {  # for the trainers of the libraries; a literal, which tests/test_drift.py can read
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}
CHATS = instruction_dataset("shima", STEPS * BATCH + 20, seed=3, tasks=("mood", "pairs")).to_list()
ROWS = [encode_chat(TOKENIZER, row["instruction"], row["answer"]) for row in CHATS]


def loss(model: nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Mean loss of the labelled tokens, in nats, computed here and not by a trainer."""
    batch = collate(rows, TOKENIZER.pad_token_id)
    labels = batch.pop("labels")[:, 1:].flatten()
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels, ignore_index=-100).item()


def held_out(model: nn.Module) -> float:
    return loss(model, ROWS[-20:])


# Each method trains at a rate and returns what was gained. `spoil` may change the model that is given to the trainer.

Spoil = Callable[[nn.Module], object]


def pretraining(rate: float, spoil: Spoil, folder: Path) -> float:
    """Nats a token on held-out text, with the course's loop and a new model."""
    model = LlamaForCausalLM(tiny_config("llama", vocab_size=len(TOKENIZER)))
    ids = TOKENIZER(text_dataset("shima", 100, seed=3)["text"][:], add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": row} for row in pack(ids, 64)]
    before = loss(model, rows[-20:])
    spoil(model)
    config = TrainConfig(2 * STEPS, rate, schedule="constant", weight_decay=0.0, progress=False)
    train(model, PaddedBatches(rows[:-20], BATCH, TOKENIZER.pad_token_id), config)
    return before - loss(model, rows[-20:])


def fine_tuning(rate: float, spoil: Spoil, folder: Path) -> float:
    """Nats a token of held-out answers, with the course's loop and all weights."""
    model = copy.deepcopy(BASE)
    before = held_out(model)
    spoil(model)
    config = TrainConfig(STEPS, rate, schedule="constant", weight_decay=0.0, progress=False)
    train(model, PaddedBatches(ROWS[:-20], BATCH, TOKENIZER.pad_token_id), config)
    return before - held_out(model)


def lora(rate: float, spoil: Spoil, folder: Path) -> float:
    """The same with peft's LoRA."""
    settings = peft.LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(BASE), settings)
    before = held_out(model)
    spoil(model)
    config = TrainConfig(STEPS, rate, schedule="constant", weight_decay=0.0, progress=False)
    train(model, PaddedBatches(ROWS[:-20], BATCH, TOKENIZER.pad_token_id), config)
    return before - held_out(model)


def transformers_trainer(rate: float, spoil: Spoil, folder: Path) -> float:
    """The same with transformers' Trainer."""
    model = copy.deepcopy(BASE)
    before = held_out(model)
    spoil(model)
    Trainer(
        model,
        TrainingArguments(output_dir=str(folder), learning_rate=rate, **COMMON),
        train_dataset=Dataset.from_list(ROWS[:-20]),
        data_collator=lambda rows: collate(rows, TOKENIZER.pad_token_id),
    ).train()
    return before - held_out(model)


def trl_sft(rate: float, spoil: Spoil, folder: Path) -> float:
    """The same with trl's SFTTrainer."""
    model = copy.deepcopy(BASE)
    before = held_out(model)
    spoil(model)
    turns = (("user", "instruction"), ("assistant", "answer"))
    messages = [[{"role": role, "content": row[part]} for role, part in turns] for row in CHATS[:-20]]
    SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), learning_rate=rate, assistant_only_loss=True, **COMMON),
        train_dataset=Dataset.from_dict({"messages": messages}),
        processing_class=TOKENIZER,
    ).train()
    return before - held_out(model)


def trl_dpo(rate: float, spoil: Spoil, folder: Path) -> float:
    """Nats an answer by which held-out right answers gain on the wrong ones, with trl's DPOTrainer."""
    pairs = [
        {"prompt": row["instruction"] + "\n", "chosen": row["answer"], "rejected": other["answer"]}
        for row, other in zip(CHATS, CHATS[1:] + CHATS[:1], strict=True)
        if row["answer"] != other["answer"]
    ]

    def preference(model: nn.Module) -> float:
        prompts = [pair["prompt"] for pair in pairs[-20:]]
        chosen, rejected = (
            sequence_log_probs(model, TOKENIZER, prompts, [pair[side] for pair in pairs[-20:]])
            for side in ("chosen", "rejected")
        )
        return (chosen - rejected).mean().item()

    model = copy.deepcopy(BASE)
    before = preference(model)
    spoil(model)
    DPOTrainer(
        model,
        ref_model=copy.deepcopy(BASE),
        args=DPOConfig(output_dir=str(folder), learning_rate=rate, beta=0.1, **COMMON),
        train_dataset=Dataset.from_list(pairs[:-20]),
        processing_class=TOKENIZER,
    ).train()
    return preference(model) - before


def trl_grpo(rate: float, spoil: Spoil, folder: Path) -> float:
    """Gain in the mean reward of new samples, with trl's GRPOTrainer; the reward is the share of digits."""

    def digits(completions: list[str], **_: object) -> list[float]:
        return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in completions]

    def reward(model: nn.Module) -> float:
        samples = generate(model, TOKENIZER, ["The sum"] * 64, max_new_tokens=12, temperature=1.0, seed=5)
        return sum(digits(samples)) / 64

    model = copy.deepcopy(BASE)
    before = reward(model)
    spoil(model)
    options = {"num_generations": 2 * BATCH, "gradient_accumulation_steps": 2, "max_completion_length": 12}
    GRPOTrainer(
        model,
        reward_funcs=digits,
        args=GRPOConfig(output_dir=str(folder), learning_rate=rate, **options, **COMMON),
        train_dataset=Dataset.from_dict({"prompt": ["The sum"] * 2 * STEPS}),
        processing_class=TOKENIZER,
    ).train()
    return reward(model) - before


METHODS = {  # learning rate, and the least gain
    pretraining: (3e-3, 1.0),
    fine_tuning: (1e-3, 4.0),
    lora: (5e-3, 4.0),
    transformers_trainer: (1e-3, 4.0),
    trl_sft: (1e-3, 4.0),
    trl_dpo: (1e-4, 5.0),
    trl_grpo: (1e-3, 0.1),
}


def nothing(model: nn.Module) -> None:
    """Leave the model as it is."""


def freeze(model: nn.Module) -> None:
    """Freeze all that learns; what stays trainable, so that the trainers run, is one norm or LoRA's first factor.

    As long as LoRA's second factor is zero the first one has no gradient.
    """
    for name, parameter in model.named_parameters():
        adapter = "lora_A" in name
        parameter.requires_grad_(adapter or ("lora" not in name and name.endswith("model.norm.weight")))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_training_improves_by_its_margin(method: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rate, least = METHODS[method]
    assert method(rate, nothing, tmp_path) >= least


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_training_without_effect_misses_its_margin(method: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rate, least = METHODS[method]
    assert method(rate, freeze, tmp_path) < least / 2
