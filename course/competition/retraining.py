"""Trains an adapter again from what a submission says about it, to see whether its recipe explains its score.

There is one procedure for all: LoRA of the handed-in shape, with the seed of the recipe; steps of AdamW without weight
decay over the rows with an answer, whose rate warms up over a twentieth and falls along a line; then, if the recipe
has a "dpo", so many steps of DPO (Rafailov et al. 2023, eq. 7) over the rows with a chosen and a rejected answer.
"""

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch import nn

from course.competition.answering import answers_of, base_model
from course.competition.board import grades_of
from course.competition.ranking import interval, resampled_means
from course.competition.reading import refuse
from course.competition.submission import MOST_TOKENS, Submission
from helpers.chat import encode_chat
from helpers.data import PaddedBatches, collate
from helpers.generation import token_log_probs
from helpers.open_tasks import public_tasks
from helpers.training import TrainConfig, train

DIFFERENCE = 0.3  # points from which on the recipe does not explain the score; another trainer's luck is smaller
DPO = {"beta": 0.1, "learning_rate": 1e-4, "steps": 0, "batch_size": 4}  # where a recipe does not say


def compare(submission: Submission, kept: Path) -> str:
    """The score that was handed in beside that of the adapter trained again, on the public tasks.

    CourseError if the second is surely lower by more than `DIFFERENCE`, or if the recipe cannot be followed.
    """
    adapter = train_again(submission)
    digest = hashlib.sha256(save(adapter)).hexdigest()  # answers are kept under their adapter's own name
    again = replace(submission, adapter=adapter, key=f"again {submission.key} {digest}")
    tasks = public_tasks()
    handed_in, anew = (
        np.array(grades_of(tasks, answers)) for answers in (submission.answers, answers_of(again, tasks, kept))
    )
    gap = anew - handed_in
    low, high = interval(resampled_means(gap[None], [task.kind for task in tasks])[:, 0])
    found = (
        f"{handed_in.mean():.2f} handed in, {anew.mean():.2f} trained again, "
        f"difference {gap.mean():+.2f} ({low:+.2f} to {high:+.2f})"
    )
    if high < -DIFFERENCE:
        refuse(f"its recipe does not explain its score: {found}")
    return found


def train_again(submission: Submission) -> dict[str, torch.Tensor]:
    """The tensors of an adapter that was made by the recipe, under the names that peft gives them."""
    recipe = submission.recipe
    base, tokenizer = base_model(recipe.base)
    rows = [row for row in submission.rows if "answer" in row]
    pairs = [row for row in submission.rows if "answer" not in row]
    settings = DPO | (recipe.dpo or {})
    examples = [encode_chat(tokenizer, row["instruction"], row["answer"]) for row in rows]
    sides = [
        [encode_chat(tokenizer, row["instruction"], row[side]) for row in pairs] for side in ("chosen", "rejected")
    ]
    batch, steps = int(settings["batch_size"]), int(settings["steps"])
    if (recipe.steps and not rows) or (steps and (not pairs or batch < 1)):
        refuse("its recipe has steps for which train.jsonl has no rows")
    tokens = recipe.steps * recipe.batch_size * mean_length(examples)
    tokens += steps * batch * sum(map(mean_length, sides))
    if tokens > MOST_TOKENS:
        refuse(f"its recipe trains on {tokens:,.0f} tokens of train.jsonl, and {MOST_TOKENS:,} are allowed")
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = get_peft_model(copy.deepcopy(base), submission.lora)
        if recipe.steps:
            config = TrainConfig(
                recipe.steps,
                recipe.learning_rate,
                warmup_steps=max(1, recipe.steps // 20),
                schedule="linear",
                weight_decay=0.0,
                progress=False,
                seed=recipe.seed,
            )
            train(model, PaddedBatches(examples, recipe.batch_size, tokenizer.pad_token_id, seed=recipe.seed), config)
        if steps:
            prefer(model.eval(), *sides, tokenizer.pad_token_id, settings, recipe.seed)
    return {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def mean_length(examples: Sequence[dict]) -> float:
    """Tokens of an example; 0 if there is none."""
    return float(np.mean([len(example["input_ids"]) for example in examples])) if examples else 0.0


def prefer(model: nn.Module, chosen: list[dict], rejected: list[dict], padding: int, settings: dict, seed: int) -> None:
    """Steps of DPO in place, with the model as it comes as the reference."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps, size = int(settings["steps"]), min(int(settings["batch_size"]), len(chosen))

    def log_probs(drawn: Sequence[int]) -> torch.Tensor:  # (2, pairs): chosen and rejected
        batch = collate([side[i] for side in (chosen, rejected) for i in drawn], padding)
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]  # (2 x pairs, seq - 1, vocab)
        return token_log_probs(logits, labels[:, 1:]).sum(-1).view(2, -1)

    with torch.no_grad():
        reference = torch.cat([log_probs([i]) for i in range(len(chosen))], dim=1)  # (2, pairs)
    optimizer = torch.optim.AdamW(parameters, lr=settings["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    generator = random.Random(seed)
    for step in range(steps):
        drawn = generator.sample(range(len(chosen)), size)
        growth = log_probs(drawn) - reference[:, drawn]
        loss = -F.logsigmoid(settings["beta"] * (growth[0] - growth[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * min((step + 1) / 3, 1 - step / steps)
        optimizer.step()
