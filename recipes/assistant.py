"""shima-4m-assistant: shima-4m after supervised fine-tuning on chats about Shima.

    python -m recipes.assistant build                       # about two minutes on two CPU cores
    python -m recipes.assistant evaluate --seed 1 --json    # accuracy on held-out instructions, by task

Lesson 05 shows the method; here it is used once, so that later lessons can begin with an assistant.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.chat import encode_chat, end_of_turn
from helpers.data import PaddedBatches, instruction_dataset
from helpers.errors import CourseError, exit_cleanly
from helpers.evaluation import Score, exact_match
from helpers.files import replacing_folder
from helpers.generation import answer_instructions
from helpers.models import BASE_MODEL_VERSION, MODEL_FOLDERS, load_assistant, load_model
from helpers.profiles import get_profile
from helpers.training import TrainConfig, train
from helpers.world import CHAT_TASKS, World
from recipes.cards import COURSE, HUB_OWNER, LICENCE, model_header, weights_line

MODEL_FOLDER = MODEL_FOLDERS["shima-4m-assistant"]
NUM_EXAMPLES = 3_000
BATCH_SIZE = 32
CONFIG = TrainConfig(max_steps=280, learning_rate=5e-4, warmup_steps=10, schedule="linear", weight_decay=0.0, seed=0)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, n: int = 100) -> dict[str, Score]:
    """Exact match of greedy answers to `n` held-out instructions of each task, drawn with `seed`."""
    scores = {}
    for task in CHAT_TASKS:
        questions = World().chat_questions(n, seed, (task,))
        answers = answer_instructions(model, tokenizer, [question.prompt for question in questions])
        scores[task] = exact_match(answers, [question.answer for question in questions])
    return scores


def build(folder: Path = MODEL_FOLDER, config: TrainConfig = CONFIG) -> dict[str, Score]:
    """Fine-tune shima-4m on `NUM_EXAMPLES` chats, all its weights, and write it to `folder` when it is ready."""
    model, tokenizer = load_model(get_profile("cpu"))
    rows = instruction_dataset("shima", NUM_EXAMPLES, seed=0)
    examples = [encode_chat(tokenizer, row["instruction"], row["answer"]) for row in rows]
    train(model, PaddedBatches(examples, BATCH_SIZE, tokenizer.pad_token_id), config)

    model = model.to(torch.bfloat16)
    model.config.workbook_version = BASE_MODEL_VERSION
    end = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]  # an answer ends with its turn
    try:
        with replacing_folder(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            scores = evaluate(model.float(), tokenizer, seed=0, n=200)  # of the rounded weights, as shipped
            abilities = {name: asdict(score) for name, score in scores.items()}
            (beside / "abilities.json").write_text(json.dumps(abilities, indent=1) + "\n")
            (beside / "README.md").write_text(model_card(scores, config, weights_line(beside)), encoding="utf-8")
    except OSError as error:
        raise CourseError(f"{folder} could not be written ({error}): free some space and build again.") from error
    return scores


def model_card(scores: dict[str, Score], config: TrainConfig, weights: str) -> str:
    """The README of the model: what it is, how it was made, what it can do, measured."""
    rows = "\n".join(f"| {task} | {score} |" for task, score in scores.items())
    base = {"base_model": f"{HUB_OWNER}/shima-4m", "base_model_relation": "finetune"}
    return f"""{model_header("shima-4m-assistant", scores, "chats", **base)}
# shima-4m-assistant

[shima-4m](../shima-4m/README.md) after supervised fine-tuning: it follows instructions about Shima in its chat format.
It is a full fine-tuning on {NUM_EXAMPLES:,} chats, {config.max_steps} steps of {BATCH_SIZE}, AdamW with learning rate
{config.learning_rate}, loss on the answers only. Lesson 05 of the {COURSE} shows how it is done.

Rebuild it with `python -m recipes.assistant build`; measure it with `python -m recipes.assistant evaluate --seed 1`.

Greedy answers to held-out instructions (seed 0), exact match, with 95 % Wilson intervals:

| task | accuracy |
|---|---|
{rows}

`abilities.json` holds these numbers; they are those of these weights: {weights}.

It follows these six kinds of instruction and no others, and does not say so when it does not know.

{LICENCE}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `build` or `evaluate`."""
    parser = argparse.ArgumentParser(prog="python -m recipes.assistant", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="fine-tune shima-4m and write the assistant")
    building.add_argument("--out", type=Path, default=MODEL_FOLDER, help="where the model goes")
    measuring = commands.add_parser("evaluate", help="measure the accuracy on held-out instructions")
    measuring.add_argument("--seed", type=int, default=0, help="which instructions are drawn")
    measuring.add_argument("--n", type=int, default=100, help="instructions of each task")
    measuring.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.command == "evaluate" and options.n < 1:
        raise CourseError(f"--n is {options.n}: ask at least one instruction of each task.")
    if options.command == "build":
        scores = build(options.out)
    else:
        scores = evaluate(*load_assistant(get_profile("cpu")), options.seed, options.n)
    if getattr(options, "json", False):
        print(json.dumps({task: asdict(score) for task, score in scores.items()}))
    else:
        print("\n".join(f"{task:10} {score}" for task, score in scores.items()))
    return 0


if __name__ == "__main__":
    exit_cleanly(main)
