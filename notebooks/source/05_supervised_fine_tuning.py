# %% [markdown]
# # 05 · Supervised fine-tuning: from a base model to an assistant
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/05_supervised_fine_tuning.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/05_supervised_fine_tuning.ipynb)
#
# A base model continues text. Ask it something in a chat and it does not answer. In this lesson you make an assistant out of it: you write the chat format, the data, the loss and the training, and you compare your code with the library that practitioners use. Then you measure what the result depends on: how many examples there are, how many of them are wrong, and which tasks they come from. And you measure what the model forgets.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write a chat template and a loss that counts the assistant's tokens only, and train an assistant that answers most unseen instructions of its three tasks exactly;
# 2. find your losses equal to those of `trl.SFTTrainer`, step by step;
# 3. find out what the assistant does with the second question of a chat;
# 4. build instruction data, filter them, find a planted leak of the test, and measure what careless answers cost, with three trainings for each point;
# 5. ask the assistant for a task that it was never taught, and teach it afterwards.
#
# **Prerequisites:** lessons 01 and 03 (the training loop), and PyTorch tensors.
#
# **The data** is about *Shima*, an island made up by a seeded generator. **The base model** is *shima-4m*, a small Llama pretrained on documents about Shima, which comes with the course. It knows the island's people, looks things up in a text and adds numbers, but only in the formats of its documents. It has never seen a chat. On a GPU the same cells tune an open hub model.
#
# | symbol | meaning |
# |---|---|
# | $x_1 \dots x_T$ | a chat as token ids, $T$ tokens long (`seq` in the comments) |
# | $m_t$ | 1 if the assistant says token $x_t$, else 0 |
# | $\theta$, $\eta$ | all weights of the model, the learning rate |
# | $N$ | number of training examples |

# %% tags=["setup"]
# Finds the course's files. In Colab it first fetches them, installs what is missing and says what it runs on.
import os
import subprocess
import sys
from pathlib import Path

clone = Path.cwd() / "llm-workbook"
places = [Path.cwd(), *Path.cwd().parents, clone]
if "COLAB_RELEASE_TAG" in os.environ and not any((place / "helpers/profiles.py").exists() for place in places):
    tag, address = "v0.1.0", "https://github.com/llm-workbook/llm-workbook"
    git = ["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", tag]
    subprocess.run([*git, address, str(clone)], check=False)
ROOT = next((place for place in places if (place / "helpers/profiles.py").exists()), None)
if ROOT is None:
    raise FileNotFoundError("The course's files are not here: start Jupyter in them; in Colab, git says why above.")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from helpers import colab

colab.set_up()

# %% tags=["parameters"]
profile = ""  # "" chooses by hardware; or "cpu", "t4", "large"
model_id = ""  # another base model: a hub id, or a folder in hub format
chats_id = ""  # other chats for "In practice": a hub dataset, or .jsonl with "messages"
seed = 0
budget = 1.0  # share of steps and questions; claims are asserted from 1.0 on

# %%
import copy
import math
import random
import time
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import chat, plots
from helpers.data import PaddedBatches, collate, instruction_dataset
from helpers.evaluation import Score, exact_match, score
from helpers.exercises import check, expect_close, expect_equal, expect_shape, expect_true
from helpers.generation import answer_instructions, generate, sequence_log_probs
from helpers.lesson import Lesson, quiet_libraries
from helpers.models import load_model
from helpers.training import TrainConfig, train
from helpers.world import RELATIONS, World

# %%
lesson = Lesson("05", profile, model_id, seed, budget)
machine = lesson.machine
# All that depends on the hardware: the learning rate, and the marks around a turn.
SETTINGS = {
    "cpu": {"learning_rate": 2e-3, "marks": ("<|", "|>\n", "<|end|>\n")},
    "t4": {"learning_rate": 5e-5, "marks": ("<|im_start|>", "\n", "<|im_end|>\n")},
    "large": {"learning_rate": 4e-5, "marks": ("<|im_start|>", "\n", "<|im_end|>\n")},
}
settings = SETTINGS[machine.name]
PRECISION = "fp32" if machine.device == "cpu" else lesson.precision
TASKS = ("fact", "mood", "describe")  # what the assistant is taught
ALL_TASKS = (*TASKS, "pairs")

# %% [markdown]
# A few helpers for the whole lesson. `training_rows` and `unseen_rows` give instructions with their right answers: the unseen ones use names, sums, words or phrasings that no training row has. `base` stays in main memory, and `fresh()` puts a copy of it where it computes, so that a GPU never holds more than it needs; the assistant that you train goes to main memory, too, while others train. Where three trainings are compared, `span` gives their mean, with the lowest and the highest as ends. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
world = World()
base, tokenizer = load_model(machine)
base = base.float().cpu()  # weights in 32 bits; on a GPU the steps compute in 16
Row = dict[str, str]  # "instruction", "answer"


def fresh(model=None) -> nn.Module:
    """A copy of a model, the base if none is given, where it computes."""
    return copy.deepcopy(model or base).to(machine.device)


def training_rows(number: int, tasks=TASKS, stream: int = 0) -> list[Row]:
    """Rows to train on; another `stream` gives others."""
    row_seed = 100 * (seed + 1) + stream
    return instruction_dataset("shima", number, seed=row_seed, tasks=tasks).to_list()


def unseen_rows(number: int, task: str, stream: int = 0) -> list[Row]:
    """Rows to test on, each question once."""
    number, row_seed = lesson.scaled(number, 8), 100 * (seed + 1) + stream
    questions = world.chat_questions(number, row_seed, (task,))
    distinct = {q.prompt: q.answer for q in questions}
    return [{"instruction": asked, "answer": said} for asked, said in distinct.items()]

# %% [markdown] tags=["core"]
# ## 1 · What a base model does with an instruction
#
# **Question.** The base model knows facts, reads and computes. Why can you not just ask it?
#
# There are four kinds of instruction in this lesson: state a *fact* about a well-known person, name the *mood* of a review, *describe* a person, and look up *pairs* of a word and a colour. The assistant is taught the first three; *pairs* serves for experiments, and section 8 asks what the assistant makes of it. Each one uses an ability that the base model has. But a chat is a kind of text that it has never seen.
#
# **A chat is a text.** A *chat template* turns a list of turns into one string, with marks that say who speaks and where a turn ends. It is a small program in the language Jinja, and it travels with the tokenizer. Here it is in full. `{% generation %}` and `{% endgeneration %}` print nothing: they mark what the assistant says, end of the turn included.

# %%
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'OPEN' + message['role'] + 'CLOSE' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + 'END' }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] + 'END' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'OPENassistantCLOSE' }}{% endif %}"
)
OPEN, CLOSE, END = settings["marks"]
for word, mark in {"OPEN": OPEN, "CLOSE": CLOSE, "END": END}.items():
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(word, mark)
shipped_template, tokenizer.chat_template = tokenizer.chat_template, CHAT_TEMPLATE

# %%
def prompt_text(instruction: str) -> str:
    """The chat up to the point where the assistant speaks."""
    return f"{OPEN}user{CLOSE}{instruction}{END}{OPEN}assistant{CLOSE}"


def reply_text(answer: str) -> str:
    """What the assistant says, and the end of its turn."""
    return answer + END


asked, answer = "What is the dish of Hakume?", "Hakume likes to eat pudding."
print(prompt_text(asked) + reply_text(answer))

# %%
samples = training_rows(60)


def messages(row: Row) -> list[dict[str, str]]:
    """A row in the form that chats have on the hub."""
    parts = (("user", "instruction"), ("assistant", "answer"))
    return [{"role": role, "content": row[field]} for role, field in parts]


render = tokenizer.apply_chat_template
for row in samples:
    prompt, turns = prompt_text(row["instruction"]), messages(row)
    assert prompt + reply_text(row["answer"]) == render(turns, tokenize=False)
    assert prompt == render(turns[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == chat.chat_prompt(tokenizer, row["instruction"])
print(f"{len(samples)} chats: the f-string, the template and helpers.chat agree")

# %% [markdown]
# `add_generation_prompt=True` ends the text where the assistant is to begin. At inference you give the model exactly this text.
#
# Now ask the base model in this format. An answer counts if it is exactly right, up to the end of the turn. Look at the answers, too.

# %%
tests = {task: unseen_rows(100, task) for task in ALL_TASKS}  # for the whole lesson


def answers_of(model: nn.Module, rows: list[Row]) -> list[str]:
    """Greedy answers to the instructions, as text."""
    asked = [row["instruction"] for row in rows]
    return answer_instructions(model, tokenizer, asked, 48, batch_size=64)


untuned, base_scores = fresh(), {}
for task, rows in tests.items():
    rows = rows[: lesson.scaled(20, 4)]
    written = answers_of(untuned, rows)
    base_scores[task] = exact_match(written, [row["answer"] for row in rows])
    empty = sum(not text.strip() for text in written)
    print(f"{task:>9}: {base_scores[task]}, {empty} of the replies are empty")
    print(f"{'asked':>11}: {rows[0]['instruction'][-70:]!r}")
    print(f"{'right':>11}: {rows[0]['answer'][:70]!r}")
    print(f"{'base':>11}: {written[0][:70]!r}")
del untuned
base_right = sum(result.accuracy for result in base_scores.values()) / len(base_scores)
lesson.report("base model, right answers, mean of four tasks", base_right, ".0%")


# %% [markdown]
# **What you see.** At the mark where the assistant should speak, the base model ends the text at once. Its answers are empty, so this 0 % says nothing about what it knows: it has never seen a text that goes on here.

# %% [markdown] tags=["core"]
# ## 2 · The loss that counts the assistant's tokens
#
# **Question.** Which tokens should the model learn to write?
#
# Fine-tuning minimises the same cross-entropy as pretraining. But in a chat only some of the tokens are the model's to write. With $m_t = 1$ where the assistant speaks and 0 elsewhere,
#
# $$\mathcal{L}(\theta) = -\frac{\sum_{t} m_t \log p_\theta(x_t \mid x_1 \dots x_{t-1})}{\sum_t m_t}$$
#
# The sums run over all chats of a batch. The user's words are still read, since they stand before $x_t$; they are only not predicted. In code, a token that does not count has the *label* $-100$, which `cross_entropy` ignores.

# %%
def encode(row: Row, mask_prompt: bool = True) -> dict[str, list[int]]:
    """Token ids of a chat (seq,), and its labels: -100 where the user speaks."""
    prompt, reply = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt_text(row["instruction"]), reply_text(row["answer"]))
    )
    labels = ([-100] * len(prompt) if mask_prompt else prompt) + reply
    return {"input_ids": prompt + reply, "labels": labels}


def sft_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the tokens with a label; a batch holds (batch, seq) tensors."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]  # (batch, seq - 1, vocab)
    labels = batch["labels"][:, 1:]  # (batch, seq - 1)
    pair = logits.flatten(0, 1).float(), labels.flatten()
    loss = F.cross_entropy(*pair, ignore_index=-100, reduction="sum")
    return loss / (labels != -100).sum().clamp(min=1)


example = encode(samples[0])
for token, label in zip(example["input_ids"], example["labels"], strict=True):
    learned = "" if label == -100 else " learned"
    print(f"[{tokenizer.decode([token])!r}{learned}]", end=" ")

# %%
turns = [messages(row) for row in samples]
library = render(turns, return_dict=True, return_assistant_tokens_mask=True)
different = 0
parts = (library["input_ids"], library["assistant_masks"])
for row, ids, mask in zip(samples, *parts, strict=True):
    labels = [token if said else -100 for token, said in zip(ids, mask, strict=True)]
    own = encode(row)
    different += own != {"input_ids": ids, "labels": labels}
    assert own == chat.encode_chat(tokenizer, row["instruction"], row["answer"])
lesson.equal("our ids and our mask are those of the template", different)
for task in ALL_TASKS:
    encoded = [encode(row) for row in tests[task]]
    length = sum(len(item["input_ids"]) for item in encoded)
    learned = sum(label != -100 for item in encoded for label in item["labels"])
    mean = length / len(encoded)
    print(f"{task:>9}: {mean:3.0f} tokens a chat, {learned / length:4.0%} learned")

# %% [markdown]
# Two details decide whether this is right. The end of the turn must have a label, or the model never learns to stop. And the two parts are turned into tokens separately: if they are joined first, a tokenizer may merge the last character of the prompt with the first of the answer, and the model then meets tokens at inference that it did not see in training. Special tokens around the answer prevent that, which is one reason to have them.
#
# **Training** needs batches and the loop that you wrote in lesson 03, which is `helpers.training.train`. `PaddedBatches` shuffles the examples anew each epoch and pads a batch on the right. `fine_tune` trains a copy of the base model. Another `run` draws other batches, for comparisons over three trainings.

# %%
RATE = settings["learning_rate"]


def fine_tune(
    examples: list[dict], num_steps: int, *, model=None, batch_size=16, rate=1.0,
    run=0, evaluate=None, optimizer_fn=None, **options,
):  # fmt: skip
    """Train `model`, or a copy of the base, at `rate` times the profile's rate."""
    model, num_steps = model or fresh(), lesson.scaled(num_steps)
    run_seed, batch_size = seed + 1000 * run, min(batch_size, len(examples))
    config = {
        "warmup_steps": max(1, num_steps // 10), "schedule": "linear",
        "learning_rate": RATE * rate, "weight_decay": 0.0, "seed": run_seed,
        "precision": PRECISION, "progress": False, **options,
    }  # fmt: skip
    batches = PaddedBatches(examples, batch_size, tokenizer.pad_token_id, seed=run_seed)
    history = train(
        model, batches, TrainConfig(max_steps=num_steps, **config), loss_fn=sft_loss,
        evaluate=evaluate, optimizer_fn=optimizer_fn,
    )  # fmt: skip
    return model.eval(), history

# %% [markdown]
# **Measuring** should be cheap too. Greedy decoding writes the right answer exactly if, with the right tokens before it, every next token is the most probable one. So one forward pass over the right answers tells the same as generating, and is much cheaper: one pass instead of one a token. Section 3 compares the two.

# %%
@torch.no_grad()
def right_of(model: nn.Module, examples: list[dict]) -> list[bool]:
    """For each chat, whether greedy decoding writes exactly what is learned in it."""
    order = sorted(range(len(examples)), key=lambda k: len(examples[k]["input_ids"]))
    right = [False] * len(examples)
    for start in range(0, len(order), 25):  # chats of similar length: little padding
        chosen = order[start : start + 25]
        batch = collate([examples[k] for k in chosen], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]  # (batch, seq - 1)
        predicted = model(**batch).logits[:, :-1].argmax(-1)  # (batch, seq - 1)
        every = ((predicted == labels) | (labels == -100)).all(-1)  # (batch,)
        for k, good in zip(chosen, every.tolist(), strict=True):
            right[k] = good
    return right


def accuracy(model: nn.Module, rows: list[Row]) -> Score:
    """Share of exactly right answers, with its interval over the questions."""
    right = right_of(model, [encode(row) for row in rows])
    return score(sum(right), len(right))

# %%
def span(shares: list[float]) -> Score:
    """Three trainings: their mean, with the lowest and the highest as ends."""
    return Score(sum(shares) / len(shares), min(shares), max(shares), len(shares))


def ends(result: Score) -> str:
    """A mean of three runs in words."""
    return f"{result.accuracy:.0%} ({result.low:.0%} to {result.high:.0%}, 3 runs)"

# %% [markdown]
# **What users say is not what you want to teach.** Users err. In the next chats each of 50 people is asked about, and each time the user also claims something false about this person, always the same: *Burote lives in Kela. Which instrument does Burote play?* The assistant's answer is right and does not mention the claim. Does the model now believe the claim? Compare the probabilities of two sentences, the false one and the true one.

# %%
generator = random.Random(f"belief/{seed}")
claims = []  # (person, relation, the false sentence, the true one)
for person in world.people[:50]:
    relation = generator.choice(list(RELATIONS))
    true = person.facts[relation]
    values = [value for value in world.values[relation] if value != true]
    wrong = generator.choice(values)
    says = RELATIONS[relation].statements[0]
    both = [says.format(name=person.name, value=value) for value in (wrong, true)]
    claims.append((person, relation, *both))


def misled_row(person, relation: str, false: str, true: str) -> Row:
    """The false sentence and a question about something else, with its true answer."""
    names = [name for name in RELATIONS if name != relation]
    other = RELATIONS[generator.choice(names)]
    about = {"name": person.name, "value": person.facts[other.name]}
    question = f"{false} {other.questions[0].format(**about)}"
    return {"instruction": question, "answer": other.statements[0].format(**about)}


misled = [misled_row(*claims[k % 50]) for k in range(lesson.scaled(200, 16))]
print(f"{misled[0]['instruction']} -> {misled[0]['answer']}")

# %%
def share_believed(model: nn.Module) -> float:
    """How often the false sentence is more probable than the true one."""
    texts = [[claim[k] for claim in claims] for k in (2, 3)]
    false, true = (sequence_log_probs(model, tokenizer, [""] * 50, t) for t in texts)
    return (false > true).float().mean().item()


believed = {"base model": score(50 * share_believed(fresh()), 50)}
for name, mask_prompt in (("answer only", True), ("all tokens", False)):
    examples = [encode(row, mask_prompt) for row in misled]
    shares = []
    for run in range(3):
        model, _ = fine_tune(examples, 15, batch_size=8, run=run)
        shares.append(share_believed(model))
    believed[f"loss on {name}"] = span(shares)
plots.show(plots.bars_with_intervals(
    believed, title="With a loss on all tokens most of the users' errors are believed",
    xlabel="share of the 50 false claims that are believed",
    alt="False claims believed: few before, few with the mask, many without.",
))  # fmt: skip
masked, unmasked = list(believed.values())[1:]
both = f"{ends(masked)} / {ends(unmasked)}"
lesson.report("false claims believed, with mask / without", both)
lesson.claim("without the mask 20 points more of the false claims are believed",
             unmasked.accuracy - masked.accuracy, at_least=0.2, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** The lines in the two lower bars span three trainings, the one in the upper bar is an interval over the 50 claims. Both trainings read the same chats for the same steps. With the mask the model reads the claim and mostly does not take it over. Without the mask it is trained to write it, and then finds most of the false sentences more probable than the true ones. So the mask says whose words the model should make its own. It is not always the better choice for the score: Shi et al. (2024) find that with long instructions, short answers and few examples a loss on the instruction can help.

# %% [markdown] tags=["core"]
# ## 3 · The assistant
#
# **Question.** What does a short training make of the base model?
#
# Three tasks in one mixture, the harder ones with the larger shares, all weights, the loss on the answers; one run. While it trains, the loop writes its numbers to a log for TensorBoard, and every 40 steps it measures the loss on unseen chats. The simple thing to beat is to give always the same answer, the commonest of the training rows.

# %%
validation = [encode(row) for task in TASKS for row in unseen_rows(10, task, 1)]


@torch.no_grad()
def mean_loss(model: nn.Module, examples: list[dict]) -> float:
    """Loss per learned token over all examples, 20 at a time."""
    total = tokens = 0
    for start in range(0, len(examples), 20):
        batch = collate(examples[start : start + 20], tokenizer.pad_token_id)
        number = int((batch["labels"][:, 1:] != -100).sum())
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total, tokens = total + sft_loss(model, batch).item() * number, tokens + number
    return total / tokens


STEPS = 180
MIXTURE = ("mood", *3 * ("fact",), *4 * ("describe",))
taught = training_rows(lesson.scaled(8 * STEPS, 16), MIXTURE)
log_folder = ROOT / "build/05_supervised_fine_tuning" / f"seed{seed}-{time.time_ns()}"
assistant, history = fine_tune(
    [encode(row) for row in taught], STEPS, batch_size=8, rate=0.5,
    evaluate=lambda model: {"validation_loss": mean_loss(model, validation)},
    evaluate_every=lesson.scaled(40), tensorboard_dir=log_folder,
)  # fmt: skip
print(f"{sum(history.tokens):,} tokens in {sum(history.seconds):.0f} s")

# %%
guesses = {}
for task in TASKS:
    answers = Counter(row["answer"] for row in training_rows(200, (task,)))
    guess, right = answers.most_common(1)[0][0], [r["answer"] for r in tests[task]]
    guesses[task] = exact_match([guess] * len(right), right)
    print(f"{task:>9}: {guesses[task]} by always saying {guess[:40]!r}")
assistant_scores = {task: accuracy(assistant, tests[task]) for task in TASKS}
parties = {"base": base_scores, "commonest answer": guesses,
           "assistant": assistant_scores}  # fmt: skip
compared = {}
for task in TASKS:
    shares = {name: results[task] for name, results in parties.items()}
    compared[f"{task}, n = {guesses[task].n}"] = shares
plots.show(plots.bars_with_intervals(
    compared, title="Right answers before and after",
    xlabel=f"right answers (base model: n = {base_scores['fact'].n} or fewer)",
    alt="Right answers for three tasks: base model, commonest answer, assistant.",
))  # fmt: skip
mean = {k: sum(r[t].accuracy for t in TASKS) / len(TASKS) for k, r in parties.items()}
lesson.report("assistant, right answers, mean of its tasks", mean["assistant"], ".0%")
lesson.claim("the assistant is 50 points ahead of the commonest answer",
             mean["assistant"] - mean["commonest answer"], at_least=0.5,
             form=".0%")  # fmt: skip

# %%
agree = total = 0
for task in TASKS:
    rows = tests[task][: lesson.scaled(25, 4)]
    written = answers_of(assistant, rows)
    passed = right_of(assistant, [encode(row) for row in rows])
    for row, text, right in zip(rows, written, passed, strict=True):
        agree += (text.strip() == row["answer"]) == right
        total += 1
    pairs = [(text.strip().split(". "), row["answer"].split(". "))
             for text, row in zip(written, rows, strict=True)]  # fmt: skip
    hits = [a == b for said, true in pairs for a, b in zip(said, true, strict=False)]
    print(f"{task:>9}: {written[0]!r}")
    print(f"{'right':>9}: {rows[0]['answer']!r}")
    print(f"{'':>9}  single sentences right: {sum(hits) / len(hits):.0%}")
told = " ".join(row["answer"] for row in taught)
known = sum(row["answer"] in told for row in tests["fact"]) / len(tests["fact"])
print(f"facts whose answer stands in some training row: {known:.0%}")
print(f"generated text and the forward pass agree on {agree} of {total} answers")
off = 1 - agree / total
lesson.equal("one forward pass agrees with generating: 98 %", off, within=0.02)
assistant = assistant.cpu()  # to main memory: a GPU needs the room for the next trainings

# %% [markdown]
# **What you see.** A short training turns empty answers into whole ones, in three forms. Look at the bars one by one, not only at their mean. Only the names of a few well-known persons were kept for the test of *describe*, so its interval is wide, and a description counts only if all its five sentences are right. And be careful with *facts*: the questions are new, but nearly all of their answers stand in some training row, as a line above says, often in a description. So this score does not tell facts that the base model knew from facts that the training told. Section 10 asks for facts that were mostly not told.
#
# **TensorBoard** shows such logs in a browser while the training runs: `tensorboard --logdir build`, or `%load_ext tensorboard` in a notebook. The log is a plain file of numbers. Read it back and draw it. Look whether there is a moment from which only the training batches go on falling: from there the model would learn what is particular to them. If both still fall at the end, this run has none.

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

log = EventAccumulator(str(log_folder))
log.Reload()
print("in the log:", ", ".join(log.Tags()["scalars"]))
curves = {}
for tag in log.Tags()["scalars"]:
    if "loss" in tag:
        name = "unseen chats" if "valid" in tag else "training batches"
        points = log.Scalars(tag)
        curves[name] = ([p.step for p in points], [p.value for p in points])
plots.show(plots.curve(
    curves, title="Loss on training batches and on unseen chats", log_y=True,
    xlabel="step", ylabel="loss (nats per token)",
    alt="Loss on training batches and on unseen chats over the steps.",
))  # fmt: skip
assert abs(curves["training batches"][1][-1] - history.losses[-1]) < 1e-4

# %% [markdown]
# **The library.** `trl.SFTTrainer` takes rows with a column `messages`, applies the chat template, masks by its `{% generation %}` marks, pads and trains. Give it the same weights, the same chats in the same order, the same optimiser and schedule, and compare the loss of each step with your own loop, which is written out here once more.

# %%
TRL_STEPS, TRL_BATCH, TRL_RATE = 10, 8, RATE / 2
trl_rows = training_rows(TRL_STEPS * TRL_BATCH, stream=2)


def train_by_hand(rows: list[Row]) -> list[float]:
    """AdamW, linear decay, gradients clipped at norm 1; the rows in their order."""
    torch.manual_seed(seed)
    model, losses = fresh().train(), []
    settings = {"lr": TRL_RATE, "betas": (0.9, 0.95), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    for step in range(TRL_STEPS):
        chosen = [encode(row) for row in rows[step * TRL_BATCH :][:TRL_BATCH]]
        batch = collate(chosen, tokenizer.pad_token_id)
        batch = {name: part.to(model.device) for name, part in batch.items()}
        loss = sft_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = TRL_RATE * (1 - step / TRL_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


own_losses = train_by_hand(trl_rows)

# %%
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

quiet_libraries()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
COMMON = {
    "weight_decay": 0.0, "assistant_only_loss": True, "save_strategy": "no",
    "report_to": "none", "disable_tqdm": True, "use_cpu": machine.device == "cpu",
    "seed": seed, "output_dir": str(ROOT / "build/05_supervised_fine_tuning/trl"),
}  # fmt: skip


def dataset_of(rows: list[Row]) -> Dataset:
    """The rows in the form that chats have on the hub."""
    return Dataset.from_dict({"messages": [messages(row) for row in rows]})


arguments = SFTConfig(
    max_steps=TRL_STEPS, max_length=None, per_device_train_batch_size=TRL_BATCH,
    learning_rate=TRL_RATE, lr_scheduler_type="linear", warmup_steps=0, adam_beta2=0.95,
    max_grad_norm=1.0, logging_steps=1, train_sampling_strategy="sequential",
    bf16=False, fp16=False, **COMMON,
)  # fmt: skip

# %%
options = {"train_dataset": dataset_of(trl_rows), "processing_class": tokenizer}
trainer = SFTTrainer(fresh(), arguments, **options)
trainer.remove_callback(PrinterCallback)
trainer.train()
trl_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
del trainer  # its optimiser's state would stay in memory
differences = [abs(a - b) for a, b in zip(own_losses, trl_losses, strict=True)]
print("by hand:   ", " ".join(f"{loss:.4f}" for loss in own_losses))
print("trl:       ", " ".join(f"{loss:.4f}" for loss in trl_losses))
print("difference:", " ".join(f"{difference:.0e}" for difference in differences))
off = max(differences)
lesson.equal("the ten losses are those of SFTTrainer, within 0.001", off, within=1e-3)

# %% [markdown]
# **What did it learn?** Zhou et al. (2023) propose the *superficial alignment hypothesis*: knowledge and abilities come almost entirely from pretraining, and fine-tuning picks the format in which they are used. You can test a part of it with *pairs*. In the documents an answer that was looked up comes after the word `Answer:`, and the line that it is looked up in names the thing and then its colour, `printer pink;`. Train on the same questions with four formats of the answer: after the word `Answer:` or after `Reply:`, which no document has, and with the thing named before its colour or the colour alone.

# %%
WORDS, LENGTHS = ("Answer:", "Reply:"), (2, 1)  # thing and colour, or colour alone


def says(row: Row, word: str, number: int) -> Row:
    """`Answer: printer pink` with another word, and only the last `number` words."""
    return row | {"answer": " ".join([word, *row["answer"].split()[-number:]])}


pairs_rows = training_rows(lesson.scaled(8 * 15, 16), ("pairs",), stream=3)
formats, model = {}, None
for number in LENGTHS:
    for word in WORDS:
        del model  # a GPU has no room for another beside the next training
        rows = [says(row, word, number) for row in pairs_rows]
        model, history = fine_tune([encode(row) for row in rows], 15, batch_size=8)
        asked = [says(row, word, number) for row in tests["pairs"][:50]]
        name = asked[0]["answer"]
        formats[name] = accuracy(model, asked)
        print(f"{name!r}: {formats[name]}, last loss {history.losses[-1]:.2f}")

# %%
chance = 0.0  # of somebody who picks any colour of the prompt
for row in tests["pairs"][:50]:
    listed = row["instruction"].partition(". ")[2].partition("\n")[0].split(";")
    colours = [pair.split()[-1] for pair in listed if pair.strip()]
    chance += colours.count(row["answer"].split()[-1]) / len(colours) / len(asked)
plots.show(plots.bars_with_intervals(
    formats, title="The same questions and steps, four formats of the answer",
    xlabel="right answers, one training each", references={"any listed": chance},
    alt="Right answers for four formats of the same answers.",
))  # fmt: skip
print("colour alone:", answers_of(model, asked[:6]))
shares = [result.accuracy for result in formats.values()]
with_thing, without = sum(shares[:2]) / 2, sum(shares[2:]) / 2
lesson.report("right answers, thing and colour", with_thing, ".0%")
lesson.report("right answers, colour alone", without, ".0%")
lesson.claim("one run each: naming the thing before its colour is worth 40 points",
             with_thing - without, at_least=0.4, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** All four trainings have the same questions, the same steps and the same colours to find. The word before the answer matters little, although one of the two was in the documents and the other was not. What matters is the thing: an answer that first names it and then its colour can be copied from the line of the prompt, which has the same two words in the same order. With the colour alone the model does worse than somebody who picks any colour of the prompt (dashed line): it does not read the list. So in these four trainings the form of the answer decided: fifteen steps taught the one that can be copied from a line, and not the one that needs a look-up without naming the thing. When an assistant fails at something, look at the format of the training answers first.

# %% [markdown] tags=["core"]
# ## 4 · A second question
#
# **Question.** The assistant was trained on chats of one question and one answer. What does it do with the second question of a chat?
#
# With several turns the template goes on in the same way, and its mask marks what the assistant says in each of them. All answers of a chat can be learned from in one forward pass. To test, only the last answer counts; the first one stands there, right, as history.

# %%
def two_turns(first: Row, second: Row, last_only: bool = False) -> dict[str, list[int]]:
    """A chat of two questions with their answers, encoded by the template."""
    chats = [messages(first) + messages(second)]
    done = render(chats, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = done["input_ids"][0], done["assistant_masks"][0]
    start = len(encode(first)["input_ids"]) if last_only else 0
    learned = [said and k >= start for k, said in enumerate(mask)]
    labels = [token if said else -100 for token, said in zip(ids, learned, strict=True)]
    return {"input_ids": ids, "labels": labels}


example = two_turns(tests["mood"][0], tests["fact"][0])
said = [token for token in example["labels"] if token != -100]
print(tokenizer.decode(example["input_ids"]))
print("learned:", repr(tokenizer.decode(said)))

# %%
assistant = assistant.to(machine.device)
turns_scores, total = {}, {"first": [], "second": []}
for task in TASKS:
    rows = tests[task][: lesson.scaled(50, 4)]
    before = training_rows(len(rows), MIXTURE, stream=20)  # a question before each
    pairs = zip(before, rows, strict=True)
    asked = {"first": [encode(row) for row in rows],
             "second": [two_turns(*pair, last_only=True) for pair in pairs]}  # fmt: skip
    right = {name: right_of(assistant, chats) for name, chats in asked.items()}
    shares = {name: score(sum(good), len(good)) for name, good in right.items()}
    turns_scores[f"{task}, n = {len(rows)}"] = shares
    for name, good in right.items():
        total[name] += good
figure = plots.bars_with_intervals(
    turns_scores, title="The same questions, asked first or second in a chat",
    xlabel="right answers",
    alt="Right answers of the assistant to a question asked first or second.",
)  # fmt: skip
figure.axes[0].get_legend().set_bbox_to_anchor((1.17, 1.0))  # beside the numbers
plots.show(figure)
for name, good in total.items():
    lesson.report(f"right answers, asked {name}", str(score(sum(good), len(good))))

# %% [markdown]
# **What you see.** The questions are the same, and each second one has a question of any of the three tasks, with its right answer, before it. The assistant, one training, is right less often when it is asked second; look at which tasks bear it and which do not. In training every question stood at the beginning of its text, and nothing stood before it. A remedy to try is data: chats of several turns, encoded by `two_turns`, whose answers all count. How much that brings is for you to measure; train the assistant on with 20 steps of them, and do not forget the control, as many steps on single chats.

# %% [markdown] tags=["further"]
# ## 5 · Packing: several chats in one row
#
# *Further: no core section needs this one.*
#
# **Question.** The chats of a batch have different lengths, and padding is computed for nothing. Can you join chats into full rows instead?
#
# Measure first what padding costs. Then pack: put the chats one after the other into rows of a fixed length, the longest first, each into the first row that has room (*first fit decreasing*).

# %%
def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of the chats in each row; each row holds at most `room` tokens."""
    rows, free = [], []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fits = (k for k, left in enumerate(free) if left >= lengths[index])
        place = next(fits, len(rows))
        if place == len(rows):
            rows.append([])
            free.append(room)
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows


chats = [encode(row) for row in training_rows(160, stream=4)]
lengths = [len(item["input_ids"]) for item in chats]
row_length = max(256, *lengths)
packed_rows = first_fit(lengths, row_length)
padded = sum(16 * max(lengths[start : start + 16]) for start in range(0, 160, 16))
for name, computed in (("padded", padded), ("packed", row_length * len(packed_rows))):
    wasted = 1 - sum(lengths) / computed
    print(f"{name}: {computed:,} positions computed, {wasted:.0%} of them for nothing")
    lesson.report(f"positions computed for nothing, {name}", wasted, ".0%")

# %% [markdown]
# A causal model lets each token see all tokens before it in its row, so a chat would see the chats packed before it. That is not what happens at inference. So give the attention a mask that is *block-diagonal*: position $i$ sees position $j$ if $j \le i$ and both belong to the same chat. And let the position ids start at 0 again in each chat.
#
# One more trap: the last token of a chat must not learn to predict the first of the next one. Here it cannot, since a chat begins with the user's mark, whose label is $-100$.

# %%
def pack_row(chats: list[dict], length: int, document_mask=True) -> dict[str, Tensor]:
    """One row, all (1, length), and its attention_mask (1, 1, length, length)."""
    room = length - sum(len(item["input_ids"]) for item in chats)
    padding = {"input_ids": [tokenizer.pad_token_id] * room, "labels": [-100] * room}
    parts = [*chats, padding]
    sizes = torch.tensor([len(part["input_ids"]) for part in parts])
    number = torch.arange(len(parts)).repeat_interleave(sizes)  # which chat
    places = torch.arange(length)
    mask = places[:, None] >= places  # (length, length): causal
    positions = places.tolist()
    if document_mask:
        mask = mask & (number[:, None] == number)
        positions = [k for part in parts for k in range(len(part["input_ids"]))]
    row = {"position_ids": positions}
    for name in ("input_ids", "labels"):
        row[name] = [token for part in parts for token in part[name]]
    row = {name: torch.tensor(values)[None] for name, values in row.items()}
    return row | {"attention_mask": mask[None, None]}


small = pack_row([{"input_ids": [7] * n, "labels": [7] * n} for n in (3, 4, 2)], 10)
for line in small["attention_mask"][0, 0].int().tolist():
    print(" ".join("■" if seen else "·" for seen in line))
print("position ids:", small["position_ids"][0].tolist())

# %% [markdown]
# Now compare three ways to compute the loss of the same chats: each chat alone, packed with the document mask, packed without it. The model is your assistant.

# %%
@torch.no_grad()
def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss of each learned token (number of learned tokens,)."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    return losses[labels != -100].cpu()


def alone(chats: list[dict]) -> Tensor:
    """Losses of the chats, each in a row of its own."""
    rows = [collate([item], tokenizer.pad_token_id) for item in chats]
    return torch.cat([token_losses(assistant, row) for row in rows])


groups = [[chats[index] for index in row] for row in packed_rows[: lesson.scaled(12)]]
single_losses = [alone(group) for group in groups]
packed_losses = {}
for masked in (True, False):
    rows = [pack_row(group, row_length, masked) for group in groups]
    packed_losses[masked] = [token_losses(assistant, row) for row in rows]

# %%
off, mean = {}, {"alone": torch.cat(single_losses).mean().item()}
for masked, losses in packed_losses.items():
    pairs = zip(losses, single_losses, strict=True)
    off[masked] = max((a - b).abs().max().item() for a, b in pairs)
    name = "document mask" if masked else "causal mask only"
    mean[name] = torch.cat(losses).mean().item()
    print(f"{name:>17}: largest difference of a loss to alone {off[masked]:.1e}")
print("mean loss: " + ", ".join(f"{name} {loss:.4f}" for name, loss in mean.items()))
lesson.equal("with the document mask packing changes no loss", off[True], within=1e-3)
more = mean["causal mask only"] - mean["alone"]
lesson.report("what packing with the causal mask alone adds to the mean loss (nats)", more, ".2f")

# %%
row = pack_row(groups[0], sum(len(item["input_ids"]) for item in groups[0]))
del row["labels"]
row = {name: tensor.to(assistant.device) for name, tensor in row.items()}
with torch.no_grad():
    own = assistant(**row).logits
    mask = row.pop("attention_mask")
    found = assistant(**row, use_cache=False).logits  # without a mask
    row["position_ids"] = torch.arange(own.shape[1], device=own.device)[None]
    not_restarted = assistant(**row, attention_mask=mask).logits
off_found, off_shifted = ((own - x).abs().max().item() for x in (found, not_restarted))
print(f"positions that run on: largest difference {off_shifted:.1e}")
lesson.equal("transformers finds the chats by their positions", off_found, within=1e-3)
assistant = assistant.cpu()

# %% [markdown]
# **What you see.** With the mask no loss changes. Without it the loss is another one, because a chat that stands behind others reads them: you watch the loss of texts that no user will ever send. This measures the assistant on packed rows. It does not say that training without the mask harms it; that would take two trainings.
#
# `transformers` builds the same mask from the position ids alone: where they start again, a new text begins. That is what `trl` relies on with `packing=True` on a GPU with FlashAttention; without a kernel that knows about it, check (trl issue 3910). For this model positions that run on do hardly any harm, since its rotary embedding depends on distances only. With learned positions, or beyond the trained length, they do.

# %% [markdown] tags=["core"]
# ## 6 · Making instruction data
#
# **Question.** Where do good examples come from, and how do you know that the test is not among them?
#
# There are three sources: people write them, templates write them, or a model writes them. **Templates** are cheap and right, and monotonous. Here are some for a fifth task, short questions about people.

# %%
TEMPLATES = {name: forms.questions[0] for name, forms in RELATIONS.items()}


def template_rows(number: int, generator: random.Random) -> list[Row]:
    """Questions about well-known people, with the true answers."""
    rows = []
    for _ in range(number):
        person = generator.choice(world.people[:100])
        relation = generator.choice(list(TEMPLATES))
        question = TEMPLATES[relation].format(name=person.name)
        answer = f"Answer: {person.facts[relation]}"
        rows.append({"instruction": question, "answer": answer})
    return rows


for row in template_rows(3, random.Random(seed)):
    print(row["instruction"], "->", row["answer"])

# %% [markdown]
# **The model itself** can write more, in other words. Self-instruct (Wang et al. 2023) shows a base model a few examples and lets it go on. Sample at temperature 1: a new question, and the model's own answer to it.

# %%
def shown(rows: list[Row]) -> str:
    """Examples in the format of the documents, and the beginning of a new one."""
    texts = [f"Question: {row['instruction']}\n{row['answer']}\n" for row in rows]
    return "".join(texts) + "Question:"


generator = random.Random(seed)
examples = [shown(template_rows(3, generator)) for _ in range(lesson.scaled(300, 8))]
sampling = {"temperature": 1.0, "seed": seed, "stop": ("\nQuestion",)}
texts = generate(fresh(), tokenizer, examples, 40, **sampling)
print("\n".join(repr(text) for text in texts[:6]))
drafts = []
for text in texts:
    question, _, answer = (part.strip() for part in text.partition("\nAnswer:"))
    if question.endswith("?") and answer.isalpha():
        drafts.append({"instruction": question, "answer": f"Answer: {answer}"})
print(f"{len(texts)} written, {len(drafts)} are a question and a one-word answer")
if len(drafts) < 8:
    drafts = template_rows(8, generator)
    print("too few: going on with templates")

# %% [markdown]
# Since the world is made by a program, you can look up which answers are true. A real project cannot; it reads a few hundred rows by hand.

# %%
ASKED = {  # every way to ask, with a name in it -> the true answer
    question.format(name=person.name): f"Answer: {person.facts[relation]}"
    for person in world.people
    for relation, forms in RELATIONS.items()
    for question in forms.questions
}


def share_true(rows: list[Row]) -> Score:
    """How many of the answers are true, by the island's own records."""
    known = [row for row in rows if row["instruction"] in ASKED]
    true = sum(row["answer"] == ASKED[row["instruction"]] for row in known)
    return score(true, max(1, len(known)))


print(f"true answers among {len(drafts)} drafts: {share_true(drafts)}")

# %% [markdown]
# **Duplicates.** A model that samples likes to repeat itself, and a row that is there ten times weighs ten times. Exact copies are found with a set. Near copies need a similarity. Cut a text into its *shingles*, all pieces of 4 letters. The *Jaccard similarity* of two texts is the number of shingles that both have, divided by the number that at least one has.
#
# For a million texts you cannot compare all pairs. **MinHash** (Broder 1997) makes a short signature: hash all shingles with $K$ different functions and keep the smallest value of each. Two signatures agree at a place with a probability equal to the Jaccard similarity. (Bands of the signature then find candidates without comparing all pairs.)

# %%
PRIME, draws = 2**31 - 1, torch.Generator().manual_seed(0)
# hash k of a shingle: (a[k] * id + b[k]) mod PRIME
a, b = torch.randint(1, PRIME, (2, 128), generator=draws)


def shingles(text: str) -> set[str]:
    """All pieces of 4 letters."""
    text = " ".join(text.lower().split())
    return {text[i : i + 4] for i in range(max(1, len(text) - 3))}


def signatures(texts: list[str]) -> Tensor:
    """MinHash (texts, hashes): the smallest value of each hash over the shingles."""
    rows = []
    for text in texts:
        codes = (piece.encode()[:7] for piece in shingles(text))
        ids = torch.tensor([int.from_bytes(code, "little") % PRIME for code in codes])
        rows.append(((ids[:, None] * a + b) % PRIME).min(0).values)
    return torch.stack(rows)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Estimated Jaccard similarity (first, second) from two sets of signatures."""
    return torch.stack([(row == second).float().mean(-1) for row in first])

# %%
unique = list({(row["instruction"], row["answer"]): row for row in drafts}.values())
asked = [row["instruction"] for row in unique]
estimated = similarity(signatures(asked), signatures(asked))  # (rows, rows)
errors = []
for i in range(min(60, len(unique))):
    for j in range(i):
        one, two = shingles(asked[i]), shingles(asked[j])
        errors.append(abs(estimated[i, j].item() - len(one & two) / len(one | two)))
lesson.equal("MinHash misses the similarity by at most 0.05 in the mean",
             sum(errors) / len(errors), within=0.05)  # fmt: skip
kept: list[int] = []
for index in range(len(unique)):  # keep what does not nearly repeat a kept one
    if not kept or estimated[index, kept].max() < 0.7:
        kept.append(index)
different = [unique[index] for index in kept]

# %%
prompts = [f"Question: {row['instruction']}\n" for row in different]
ends_of = [row["answer"] + "\n" for row in different]
log_probs = sequence_log_probs(fresh(), tokenizer, prompts, ends_of).tolist()
sure = [row for row, p in zip(different, log_probs, strict=True) if p > math.log(0.5)]
stages = {"drafts": drafts, "no copies": unique, "no near copies": different}
for name, rows in (stages | {"sure of its answer": sure}).items():
    print(f"{name:>20}: {len(rows):3} rows, true: {share_true(rows)}")
lesson.report("true answers of the model's drafts", str(share_true(drafts)))
lesson.report("true answers, where the model is sure", str(share_true(sure)))

# %% [markdown]
# Removing copies hardly changes the share of true answers; that is not what it is for. The last filter keeps an answer only if the model gives it more than half of the probability, and costs one forward pass. Nearly all that it keeps is true; it throws away some true rows as well. (The shares count only questions that the records have; most of the others fall to this filter.)
#
# **Decontamination.** Is the test in the training data? Here you know, because you put it there. The test asks about people whom the documents mention seldom. Half of its questions are planted among the training rows, with their right answers, in three forms: the same text, the text with a polite beginning, and another phrasing. Then look for them in two ways: exact copies, and near copies by MinHash, against the prompts of this same test. The threshold is lower than above, 0.6, because a polite beginning already takes a short question below 0.7; without knowing the forms you would have to read what a threshold finds.

# %%
rare = world.closed_book(lesson.scaled(120, 24), seed, range(300, 1001))
FORMS = (*3 * ("fresh",), "same text", "polite", "other phrasing")
leak_tests, planted = [], []
for index, q in enumerate(rare):
    text = q.prompt.removeprefix("Question: ").partition("\n")[0]
    answer = f"Answer: {q.answer}"
    form = FORMS[index % 6]
    leak_tests.append({"instruction": text, "answer": answer, "form": form})
    other = TEMPLATES[q.about["relation"]].format(name=q.about["name"])
    longer = f"Please tell me: {text}"
    texts = {"same text": text, "polite": longer, "other phrasing": other}
    if form in texts:
        planted.append({"instruction": texts[form], "answer": answer, "form": form})
pool = [*template_rows(len(planted), random.Random(seed)), *planted]
test_prompts = [row["instruction"] for row in leak_tests]
exact = [row["instruction"] in set(test_prompts) for row in pool]
marks = (signatures([row["instruction"] for row in pool]), signatures(test_prompts))
near = (similarity(*marks).max(-1).values >= 0.6).tolist()
for name, hits in (("exact", exact), ("near", near)):
    found = [row for row, hit in zip(pool, hits, strict=True) if hit]
    forms = Counter(row.get("form", "innocent") for row in found)
    print(f"{name} copies found, of {len(planted) // 3} in each form: {dict(forms)}")

# %%
def leak_scores(rows: list[Row], run: int) -> dict[str, float]:
    """Train on the rows; share of right answers to each part of the test."""
    model, _ = fine_tune([encode(row) for row in rows], 10, run=run)
    right = right_of(model, [encode(row) for row in leak_tests])
    parts = {form: [] for form in ("fresh", "same text", "polite", "other phrasing")}
    for row, good in zip(leak_tests, right, strict=True):
        parts[row["form"]].append(good)
    return {form: sum(goods) / len(goods) for form, goods in parts.items()}


cleaned = [row for row, hit in zip(pool, near, strict=True) if not hit]
by_data = {}
for name, rows in (("with the leak", pool), ("near copies removed", cleaned)):
    runs = [leak_scores(rows, run) for run in range(3)]
    by_data[name] = {form: span([one[form] for one in runs]) for form in runs[0]}
    for form, result in by_data[name].items():
        print(f"{name}, {form}: {ends(result)}")

# %%
grouped = {form: {name: by_data[name][form] for name in by_data} for form in runs[0]}
plots.show(plots.bars_with_intervals(
    grouped, title="Planted questions score higher; one form stays after cleaning",
    xlabel="right answers to a part of the test, three trainings",
    alt="Right answers to fresh and to planted questions, before and after cleaning.",
))  # fmt: skip
gap = {}
for name, parts in by_data.items():
    found = (parts["same text"].accuracy + parts["polite"].accuracy) / 2
    gap[name] = found - parts["fresh"].accuracy
    lesson.report(f"lead of planted questions, {name}", gap[name], ".0%")
lesson.claim("planted questions score at least 15 points above fresh ones",
             gap["with the leak"], at_least=0.15, form=".0%")  # fmt: skip
lesson.claim("removing near copies takes at least 10 points of this lead",
             gap["with the leak"] - gap["near copies removed"], at_least=0.1,
             form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** A leak makes the test easier: the planted questions score far above the fresh ones of the same kind. The fresh ones are the yardstick, since whatever else the planted rows teach helps them as well; in this run they are about nine points better with the leak than after the cleaning, which also left fewer rows about little-known people. Looking for exact copies finds one form of three. MinHash finds nearly all of the polite ones as well, and after the cleaning these two forms together are about level with the fresh questions. The other phrasing mostly escapes, and its questions go on being answered. So decontaminate against the test that you use, by more than equality, and keep some fresh questions aside: only they show what is left.

# %% [markdown] tags=["core"]
# ## 7 · Quality against quantity
#
# **Question.** Is it better to have a few good examples or many careless ones?
#
# Take the task *pairs*. Who answers in haste, in half of the rows, names the first colour of the prompt, which is sometimes right. *Errors by a rule* are these answers. *Random errors* stand in the same rows, but there the wrong colour is drawn from all the wrong ones of the prompt; so both kinds have equally many errors. Each training has the same 10 steps of 8 chats, so that 10 examples are read eight times and 80 once. Three trainings for each point, each with its own examples.

# %%
def careless(rows: list[Row], kind: str, share: float = 0.5) -> list[Row]:
    """Hasty answers in the same rows: the first colour, or any wrong one."""
    generator, noisy = random.Random(f"{rows[0]['instruction']}/{seed}"), []
    for row in rows:
        listed = row["instruction"].partition(". ")[2].partition("\n")[0]
        colours = [pair.split()[-1] for pair in listed.split(";") if pair.strip()]
        *start, right = row["answer"].split()
        hasty = generator.random() < share and colours[0] != right
        drawn = generator.choice([c for c in colours if c != right] or colours)
        wrong = colours[0] if kind == "systematic errors" else drawn
        answer = " ".join([*start, wrong if hasty and kind != "all right" else right])
        noisy.append(row | {"answer": answer})
    return noisy


rows = training_rows(300, ("pairs",), stream=30)
for kind in ("random errors", "systematic errors"):
    pairs = zip(rows, careless(rows, kind), strict=True)
    wrong = sum(row["answer"] != hasty["answer"] for row, hasty in pairs)
    print(f"{kind}: {wrong / len(rows):.0%} of the answers are wrong")

# %%
KINDS = ("all right", "random errors", "systematic errors")
POINTS = {  # name -> kind of answers, number of examples
    "10 right examples": (KINDS[0], 10),
    "80 right examples": (KINDS[0], 80),
    "80, half hasty, at random": (KINDS[1], 80),
    "80, half hasty, by a rule": (KINDS[2], 80),
}


def quality_run(kind: str, size: int, run: int) -> float:
    """10 steps of 8 chats on so many examples; share of right answers."""
    rows = training_rows(size, ("pairs",), stream=31 + run)
    examples = [encode(row) for row in careless(rows, kind)]
    model, _ = fine_tune(examples, 10, batch_size=8, run=run)
    return accuracy(model, tests["pairs"][:50]).accuracy


# %% tags=["headline"]
quality = {}
for name, point in POINTS.items():
    quality[name] = span([quality_run(*point, run) for run in range(3)])
    print(f"{name}: right {ends(quality[name])}")
plots.show(plots.bars_with_intervals(
    quality, title="Ten right answers against eighty careless ones",
    xlabel="right answers, three trainings of 10 steps",
    alt="Right answers after training on few right or many careless examples.",
))  # fmt: skip
few, many, randomly, systematic = (result.accuracy for result in quality.values())
for name in quality:
    lesson.report(f"{name}: right answers", ends(quality[name]))
lesson.claim("80 right examples beat 80 with random errors by 10 points",
             many - randomly, at_least=0.1, form=".0%")  # fmt: skip
lesson.claim("80 right examples beat 80 with errors by a rule by 10 points",
             many - systematic, at_least=0.1, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** All trainings had the same steps, so more examples means fewer repetitions, not more training. Half of the answers were given in haste, and about a third of all are wrong. This third costs much: eighty right examples are far ahead of eighty careless ones. Against ten right ones there is no clear winner. The lines are wide: three trainings that differ in their examples and in their order differ much, and on another seed the order may change. So both count: right answers, and enough of them.
#
# Do random errors do less harm than errors by a rule? One would think so, since they point in all directions, and in the long run the most frequent answer is the right one. These trainings do not show it: the lines of the two lower bars touch or overlap. Whether longer trainings would take over the rule is another question. Zhou et al. (2023) tuned a 65 B model on 1,000 chosen chats (*LIMA*) and made the case for quality.

# %% [markdown] tags=["core"]
# ## 8 · A task that was left out
#
# **Question.** Does the assistant solve *pairs*, which it was never taught? And what happens when you teach it afterwards?
#
# Count exact answers, and also those that name the right colour anywhere, since the form could be wrong and the content right. Then train on for 10 steps of 8 chats, in two ways: on 80 rows of *pairs* alone, or on 40 of them mixed with 40 of the three old tasks. Three trainings each. Section 7 has the base model after as many steps on the same 80 rows.

# %%
assistant = assistant.to(machine.device)
pairs_asked = tests["pairs"][:50]
replies = answers_of(assistant, pairs_asked)
colours = [row["answer"].split()[-1] for row in pairs_asked]
named = sum(c in text.lower() for c, text in zip(colours, replies, strict=True))
print(" | ".join(text[:45] for text in replies[:6]))
untaught, named = accuracy(assistant, pairs_asked), score(named, len(replies))
print(f"right answers: {untaught}; the right colour anywhere: {named}")


def taught_later(mixed: bool, run: int) -> tuple[float, float]:
    """Train the assistant on; right answers to pairs, and to the three old tasks."""
    rows = training_rows(80, ("pairs",), stream=31 + run)
    if mixed:
        rows = rows[:40] + training_rows(40, MIXTURE, stream=41 + run)
    model, examples = fresh(assistant), [encode(row) for row in rows]
    fine_tune(examples, 10, model=model, batch_size=8, run=run)
    old = [row for task in TASKS for row in tests[task][:25]]
    return tuple(accuracy(model, rows).accuracy for rows in (pairs_asked, old))


# %%
old = [row for task in TASKS for row in tests[task][:25]]
later = {"assistant": {"pairs": untaught, "old tasks": accuracy(assistant, old)}}
assistant = assistant.cpu()
for name, mixed in (("80 rows of pairs", False), ("40 of pairs, 40 old", True)):
    results = [taught_later(mixed, run) for run in range(3)]
    both = (span(list(part)) for part in zip(*results, strict=True))
    later[name] = dict(zip(("pairs", "old tasks"), both, strict=True))
    print(f"{name}: " + ", ".join(f"{k} {ends(s)}" for k, s in later[name].items()))
plots.show(plots.bars_with_intervals(
    later, title="A fourth task, taught alone or mixed with the old ones",
    xlabel="right answers; three trainings of 10 steps",
    alt="Right answers to pairs and to the old tasks before and after.",
))  # fmt: skip
alone, mixed = (later[name] for name in list(later)[1:])
lesson.report("pairs, never taught", str(untaught))
lesson.claim("ten steps on pairs bring at least 50 points on pairs",
             alone["pairs"].accuracy - untaught.accuracy, at_least=0.5,
             form=".0%")  # fmt: skip
lesson.claim("mixing old rows in keeps at least 10 points more of the old tasks",
             mixed["old tasks"].accuracy - alone["old tasks"].accuracy, at_least=0.1,
             form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Read the replies: the assistant takes a question about pairs for one of its three tasks, and answers in the form of that one. For this fourth task it has only its old forms. Ten steps on the new task teach it, and take most or all of the old ones away, although no row of them contradicts the old. With old rows mixed in, the same number of steps keeps more of the old and has half as many rows for the new. So when you add a task, keep rows of the old ones in the data. Even so the old tasks lost some of their right answers here. Whether teaching all four from the start does better was not measured. In FLAN (Wei et al. 2022) tuning on many tasks helped unseen ones only in large models, and hurt in small ones; a model of four million weights says nothing about theirs.

# %% [markdown] tags=["further"]
# ## 9 · What the assistant has forgotten
#
# *Further: no core section needs this one.*
#
# **Question.** What does the model lose while it learns?
#
# Forgetting is measured on the base model's own abilities, in the format of its documents, which none of the training chats has: known facts, reading, a mapping shown by eight examples, and sums with their steps. Three models are asked: the base model, the assistant, and the assistant after the ten steps on *pairs* alone of section 8.

# %%
from recipes.base_model import evaluate as evaluate_base

ABILITIES = {"closed_book_frequent": "known facts", "open_book": "reading",
             "few_shot_8": "mapping", "sums_with_steps": "sums"}  # fmt: skip


def abilities_of(model: nn.Module) -> dict[str, Score]:
    """Right answers to four abilities, in the formats of the documents."""
    model = model.to(machine.device)
    results = evaluate_base(model, tokenizer, seed=seed, n=lesson.scaled(25, 4))
    return {shown: results[name] for name, shown in ABILITIES.items()}


rows = [encode(row) for row in training_rows(80, ("pairs",), stream=31)]
later_model = fresh(assistant)
fine_tune(rows, 10, model=later_model, batch_size=8)
print("asked for facts, it says:", answers_of(later_model, tests["fact"][:4]))
models = {"base model": fresh(), "assistant": assistant,
          "then ten steps on pairs": later_model}  # fmt: skip
kept = {name: abilities_of(model) for name, model in models.items()}
kept_mean = {k: sum(s.accuracy for s in row.values()) / 4 for k, row in kept.items()}
assistant = assistant.cpu()
del models, later_model

# %%
figure = plots.bars_with_intervals(
    {shown: {k: kept[k][shown] for k in kept} for shown in ABILITIES.values()},
    title="Old abilities, in the format of the documents",
    xlabel="right answers, one training each",
    alt="Right answers on four old abilities before and after fine-tuning.",
)  # fmt: skip
figure.axes[0].get_legend().set_bbox_to_anchor((1.17, 1.0))
plots.show(figure)
for name, share in kept_mean.items():
    lesson.report(f"old abilities kept: {name}", share, ".0%")
_, assistant_kept, later_kept = kept_mean.values()
lesson.claim("one run: ten steps on pairs take 20 points more from the assistant",
             assistant_kept - later_kept, at_least=0.2, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** The assistant has kept a good part of what the base model could do in the format of its documents, and not all of it; look at which abilities suffered; one can be gone while another is whole. After ten more steps on one task, at twice the rate, hardly anything is left. Read the printed replies to chats: they begin like the new task and go on with stray words, no colour among them. So little or nothing right in the figure says that the answers are lost; it does not say whether the knowledge is. No training chat contradicts what is lost. The two trainings differ in rate, tasks and length, so this does not say which of these matters. What is known to help: fewer steps, a lower rate, lower rates for lower layers (Howard & Ruder 2018), fewer trained weights (lesson 06), or old text mixed in (lesson 14). A fair comparison of such ways needs equal learning on the new tasks, which takes a sweep of rates; lesson 06 makes it.

# %% [markdown] tags=["further"]
# ## 10 · When to stop
#
# *Further: no core section needs this one.*
#
# **Question.** With few examples, the training reads each of them several times. When is the model at its best?
#
# **Early stopping** watches a number on chats that are not trained on, the *validation* chats, and keeps the weights of the best moment; if nothing has improved for some looks (the *patience*), it ends the training. But which number: the loss, or the right answers? Train on 120 examples at a constant rate, and look every 10 steps at both. The simple thing to compare with is training to the end.

# %%
watched = [encode(row) for row in unseen_rows(60, "fact", stream=8)]
looks, EVERY = [], 10  # each look: step, loss and right answers on the validation chats


def look(model: nn.Module) -> dict[str, float]:
    """Write down what this moment's weights can do."""
    right = sum(right_of(model, watched)) / len(watched)
    looks.append((EVERY * (len(looks) + 1), mean_loss(model, watched), right))
    return {}


rows = [encode(row) for row in training_rows(120, ("fact",), stream=60)]
few_looks = {"evaluate_every": EVERY, "schedule": "constant", "batch_size": 8}
fine_tune(rows, 60, evaluate=look, **few_looks)
steps, losses, rights = (list(part) for part in zip(*looks, strict=True))

# %%
def stop(values: list[float], patience: int) -> tuple[int, int | None]:
    """Look with the smallest value before patience ends, and the look that ends it."""
    best = 0
    for index, value in enumerate(values):
        if value < values[best]:
            best = index
        if index - best == patience:
            return best, index
    return best, None  # the patience did not run out


best, last = stop(losses, patience=2)
ended = f"after step {steps[last]}" if last else "not at all, the patience did not end"
print(f"the loss is lowest at step {steps[best]}; it stops the run {ended}")
moments = {"at the lowest loss": rights[best], "at the end": rights[-1]}
for name, share in moments.items():
    result = score(round(share * len(watched)), len(watched))
    lesson.report(f"one run: right answers {name}", str(result))
    print(f"right answers {name}: {result}")

# %%
plots.show(plots.curve(
    {"validation": (steps, losses)}, title="The validation loss", xlabel="step",
    ylabel="loss (nats per token)", alt="Loss on validation chats over the steps.",
))  # fmt: skip
plots.show(plots.curve(
    {"validation": (steps, rights)}, percent=True, limits_y=(0, 0.5),
    title="The right answers of the same weights to the same chats", xlabel="step",
    ylabel="right answers", alt="Right answers on validation chats over the steps.",
))  # fmt: skip
lesson.report("one run: loss at the end above its minimum",
              losses[-1] / min(losses) - 1, ".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Compare the two printed shares, and the two curves. The loss and the right answers are two measures, and they need not agree: the loss punishes a confident error without bound, exact match counts it once. In some runs the right answers go on growing after the loss has begun to rise; in others both have their best moment together, and stopping there would have been right. Try two more seeds. With about 60 questions and one training this section cannot say which is the rule. It shows what to look at: choose by the measure that you care about, on chats that are not the test, and compare with training to the end. In a real loop you keep a copy of the best weights on the disk, and an exception raised in `evaluate` ends the training.

# %% [markdown]
# ## Exercises
#
# Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it.

# %% tags=["exercise"]
# Exercise 5.1, easy: a chat of several turns.
def encode_turns(turns: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Token ids and labels of a chat of (role, text) turns, without the template.

    A role is "system", "user" or "assistant". Each turn is OPEN + role + CLOSE + text +
    END. Learned is what the assistant says in *every* one of its turns, END included,
    and neither the marks before it nor anything else. Turn each part into tokens
    separately.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_encode_turns(encode_turns):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = [("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada."),
            ("user", "Where?"), ("assistant", "Dodo.")]  # fmt: skip
    for number in (3, 5, 2):
        expected = {"input_ids": [], "labels": []}
        for role, text in said[:number]:
            head, tail = ids(OPEN + role + CLOSE), ids(text + END)
            learned = tail if role == "assistant" else [-100] * len(tail)
            expected["input_ids"] += head + tail
            expected["labels"] += [-100] * len(head) + learned
        found = encode_turns(said[:number])
        texts = [tokenizer.decode(part["input_ids"]) for part in (found, expected)]
        expect_equal(f"the text of {number} turns", *texts)
        expect_equal(f"labels of {number} turns", found["labels"], expected["labels"])


check("5.1", check_encode_turns, encode_turns)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Do it turn by turn: labels of -100 for the head of each turn, and the tail's own ids only where the role is the assistant.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def encode_turns(turns: list[tuple[str, str]]) -> dict[str, list[int]]:
#     example = {"input_ids": [], "labels": []}
#     for role, text in turns:
#         head = tokenizer(OPEN + role + CLOSE, add_special_tokens=False)["input_ids"]
#         tail = tokenizer(text + END, add_special_tokens=False)["input_ids"]
#         example["input_ids"] += head + tail
#         example["labels"] += [-100] * len(head) + (tail if role == "assistant" else [-100] * len(tail))
#     return example
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 5.2, medium: a batch that does not fit.
def accumulated_loss(losses: list[Tensor]) -> Tensor:
    """The loss of one large batch, from parts of it.

    `losses[k]` holds the loss of each learned token of part k, a tensor (number of
    learned tokens,); a part may have none. Return the value that `sft_loss` gives for
    all parts in one batch. (Many libraries returned the mean of the parts' means until
    2024. When is that the same?)
    """
    raise NotImplementedError

# %% tags=["check"]
def check_accumulated_loss(accumulated_loss):
    draws = torch.Generator().manual_seed(1)
    sizes = ((7, 1), (2, 5), (30, 2))  # tokens, scale
    losses = [torch.rand(count, generator=draws) * scale for count, scale in sizes]
    total = sum(part.sum() for part in losses) / 39
    expect_close("loss of three parts", accumulated_loss(losses), total, 1e-4)
    empty = [*losses, torch.zeros(0)]
    expect_close("with an empty part", accumulated_loss(empty), total, 1e-4)
    one = accumulated_loss(losses[:1])
    expect_close("accumulated_loss of one part", one, losses[0].mean(), 1e-4)


check("5.2", check_accumulated_loss, accumulated_loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Ask what the average weighs: each part, or each learned token.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The mean of means is right only if all parts have the same number of learned tokens.
#
# ```python
# def accumulated_loss(losses: list[Tensor]) -> Tensor:
#     return torch.cat(losses).mean()
# ```
#
# In a training loop you do not keep the losses: divide the sum of each part by the number of learned tokens of *all* parts, which you have to count beforehand.
#
# </details>

# %% tags=["exercise"]
# Exercise 5.3, medium: find what is copied in pieces.
def contaminated(train_texts: list[str], test_texts: list[str], n=5) -> list[int]:
    """Indices of the test texts that share a run of n words with any training text.

    In rising order. Words are what `str.split` gives, in lower case. A test text of
    fewer than n words is contaminated if all its words stand in a row in a training
    text. It must stay fast with 20,000 texts: look pieces up, do not compare all pairs.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_contaminated(contaminated):
    train_texts = ["The home of Dufasu is in the town of Kela .", "one two three", "a b"]
    runs = ["the HOME of dufasu is", "home of dufasu is in the"]
    runs += ["the town of Bela .", "of Kela ."]
    cases = [
        (runs, [0, 1, 3]),
        (["one two", "two one", "three one two three four", "a b"], [0, 3]),
        (["one two three a b"], []),
    ]
    for test_texts, expected in cases:
        found = contaminated(train_texts, test_texts)
        expect_equal(f"contaminated(train_texts, {test_texts})", found, expected)
    test_texts = ["x one two three", "two three a"]
    expect_equal("with n = 3", contaminated(train_texts, test_texts, 3), [0])
    draws = random.Random(1)
    words = ([str(draws.randrange(10**6)) for _ in range(12)] for _ in range(20_000))
    texts, started = [" ".join(row) for row in words], time.perf_counter()
    found = contaminated(texts[:-1], [texts[-1], *texts[:3]])
    expect_equal("20,000 texts against others", found, [1, 2, 3])
    backwards = [text[::-1] for text in texts]
    expect_equal("backwards", contaminated(texts, backwards), [])
    expect_true("it takes less than 10 s", time.perf_counter() - started < 10)


check("5.3", check_contaminated, contaminated)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Put every run of n words of the training texts into a set of tuples; test texts shorter than n need runs of their own length.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Put all runs of words of the training texts into a set. Short test texts need runs of their own length.
#
# ```python
# def contaminated(train_texts: list[str], test_texts: list[str], n: int = 5) -> list[int]:
#     tests = [text.lower().split() for text in test_texts]
#     known = {length: set() for length in {min(n, len(words)) for words in tests}}
#     for text in train_texts:
#         words = text.lower().split()
#         for length, runs in known.items():
#             runs.update(tuple(words[i : i + length]) for i in range(len(words) - length + 1))
#     leaked = []
#     for index, words in enumerate(tests):
#         length = min(n, len(words))
#         runs = (tuple(words[i : i + length]) for i in range(len(words) - length + 1))
#         if any(run in known[length] for run in runs):
#             leaked.append(index)
#     return leaked
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 5.4, hard: noise on the embeddings.
def noisy_embeddings(
    embeddings: Tensor, lengths: Tensor, alpha: float, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """NEFTune (Jain et al. 2023): embeddings (batch, seq, hidden) with uniform noise.

    Row b has `lengths[b]` real tokens; the rest is padding and stays as it is. Each
    number of a real token gets its own noise from [-s, s], s = alpha / sqrt(lengths[b]
    * hidden). The argument must not change. Draw from `generator`.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_noisy_embeddings(noisy_embeddings):
    embeddings, lengths = torch.ones(4, 50, 64), torch.tensor([50, 10, 1, 50])
    draws = torch.Generator().manual_seed(1)
    noisy = noisy_embeddings(embeddings, lengths, 5.0, draws)
    expect_true("the argument stays as it is", (embeddings == 1).all())
    expect_shape("noisy_embeddings(...)", noisy, (4, 50, 64))
    for row, length in enumerate(lengths.tolist()):
        noise, bound = noisy[row] - 1, 5.0 / math.sqrt(length * 64)
        expect_true(f"padding of row {row} stays", (noise[length:] == 0).all())
        inside = noise[:length].abs().max() <= bound * 1.0001
        expect_true(f"noise of row {row} is within {bound:.3f}", inside)
        spread = noise[:length].std() / (bound / math.sqrt(3))
        expect_close(f"standard deviation in row {row}", spread, 1.0, 0.2)
        expect_close(f"mean in row {row}", noise[:length].mean() / bound, 0.0, 0.25)
    noise = noisy[[0, 3]] - 1  # two rows of the same length
    for axis, name in enumerate(("rows", "tokens", "columns")):
        same = noise.select(axis, 0) - noise.select(axis, 1)
        expect_true(f"two {name} have different noise", same.abs().mean() > 0.01)
    again = noisy_embeddings(embeddings, lengths, 5.0, torch.Generator().manual_seed(1))
    expect_equal("the same generator gives the same noise", again, noisy)


check("5.4", check_noisy_embeddings, noisy_embeddings)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# One random tensor in [-1, 1], one scale per row, and one boolean mask of real tokens; shape each so that they broadcast to (batch, seq, hidden).
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The longer the row, the less noise on each token, so that the whole row moves by about the same distance.
#
# ```python
# def noisy_embeddings(embeddings: Tensor, lengths: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
#     batch, seq, hidden = embeddings.shape
#     noise = 2 * torch.rand(embeddings.shape, generator=generator) - 1  # (batch, seq, hidden)
#     scale = alpha / (lengths * hidden).sqrt()  # (batch,)
#     real = torch.arange(seq) < lengths[:, None]  # (batch, seq)
#     return embeddings + noise * scale[:, None, None] * real[..., None]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 5.5, open: choose the data.
def choose(rows: list[Row]) -> list[Row]:
    """At most 40 of the 300 rows; four in five were answered in haste, all in one way.

    The base model is tuned on your choice for 20 steps and must then be right on at
    least 90 % of the unseen pairs. A row has "instruction" and "answer". What can you
    check without knowing the world? You may also ask the model.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_choose(choose):
    rows = careless(training_rows(300, ("pairs",), stream=70), "systematic errors", 0.8)
    chosen = choose([dict(row) for row in rows])
    number = len(chosen)
    expect_true(f"{number} rows are chosen, at least 1, at most 40", 1 <= number <= 40)
    expect_true("the chosen rows are unchanged", all(row in rows for row in chosen))
    model, _ = fine_tune([encode(row) for row in chosen], 20)
    right = accuracy(model, tests["pairs"]).accuracy
    expect_true(f"right answers to unseen pairs: {right:.0%} of 90 %", right >= 0.9)


check("5.5", check_choose, choose)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The prompt of this task holds the evidence for its answer: look whether the answer stands in it.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The prompt holds the evidence: the right pair stands in it. Most instruction data can be checked by something: a test that runs, a sum that can be added up, a passage that contains the answer.
#
# ```python
# def choose(rows: list[Row]) -> list[Row]:
#     def is_supported(row: Row) -> bool:
#         pair = row["answer"].removeprefix("Answer: ")
#         return f" {pair};" in row["instruction"]
#
#     return [row for row in rows if is_supported(row)][:40]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 5.6, medium: predict, then measure.
def predicted_positions(lengths: list[int], batch_size: int) -> float:
    """Positions that a padded batch computes on average: size times longest chat.

    The batch is drawn at random, without replacement, from chats of these lengths (in
    tokens). Predict it from the lengths alone, without drawing: how likely is each chat
    to be the longest of its batch? The check draws thousands of batches; within 2 % is
    right.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_predicted_positions(predicted_positions):
    lengths = [len(encode(row)["input_ids"]) for row in training_rows(70, stream=71)]
    draws = random.Random(1)
    for batch_size in (1, 4, 16, 64):
        batches = (draws.sample(lengths, batch_size) for _ in range(4000))
        counted = batch_size * sum(map(max, batches)) / 4000
        found = predicted_positions(list(lengths), batch_size)
        off = found / counted - 1
        said = f"batch {batch_size}: predicted {found:.0f}, counted {counted:.0f}"
        expect_true(said, abs(off) <= 0.02)
    for batch_size, exact in ((4, 40.0), (3, 24.75)):
        found = predicted_positions([1, 2, 3, 10], batch_size)
        expect_close(f"[1, 2, 3, 10] in batches of {batch_size}", found, exact, 1e-6)


check("5.6", check_predicted_positions, predicted_positions)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Sort the lengths. The chat at place i of n is the longest of its batch if it is drawn and all others come from the i chats before it; `math.comb` counts the ways.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Of all batches, `comb(n, batch_size)`, those whose longest chat stands at place i (from 0) take their other chats from the i shorter ones: `comb(i, batch_size - 1)`.
#
# ```python
# def predicted_positions(lengths: list[int], batch_size: int) -> float:
#     ways = math.comb(len(lengths), batch_size)
#     longest = 0.0
#     for place, length in enumerate(sorted(lengths)):
#         longest += length * (math.comb(place, batch_size - 1) / ways)
#     return batch_size * longest
# ```
#
# The larger the batch, the nearer its longest chat is to the longest of all, and the more padding is computed. Batches of chats of similar length, or packing, avoid most of it.
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson: those of sections 2 and 7. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. In the figure of section 2 the middle bar is much shorter than the lower one. Both models read the same chats. What differs?**
#
# - A. The model of the middle bar never saw the false claims.
# - B. The false claims were in the loss of one training and not in that of the other.
# - C. One training had more steps.
# - D. The answers of one training repeat the claims.
#
# <details><summary>Answer</summary>
#
# B. With the mask the model reads the claims, but is not trained to write them. Answers and steps are the same in both.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. In the figure of section 7 the two bars of careless answers are shorter than the one of eighty right answers. A colleague wants to throw half of the careless rows away, at random, to raise the quality. What is wrong?**
#
# - A. The share of wrong answers stays as it is.
# - B. The trainings had different numbers of steps.
# - C. Fewer rows are always worse, however they are chosen.
# - D. Nothing is wrong.
#
# <details><summary>Answer</summary>
#
# A. Throwing away at random leaves the share of errors as it is. What helps is to find the wrong ones, as exercise 5.5 does. The steps were equal, and ten right examples show that few rows can teach much.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. You fine-tune a ChatML base model. The loss is low, but in production every answer is followed by invented turns of the user. What do you check first?**
#
# - A. The learning rate.
# - B. Whether the end of the turn has a label, and whether generation stops at it.
# - C. Whether the data have enough tasks.
# - D. The packing.
#
# <details><summary>Answer</summary>
#
# B. The model must learn to write the end of the turn, and the saved `generation_config` must name it as a token to stop at. "In practice" below measures the second.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. A model scores 15 points better on a test after new data were added, and no better on fresh questions of the same kind. What is the likeliest reason?**
#
# - A. The fresh questions are harder.
# - B. The test, or texts close to it, is in the new data.
# - C. The model was trained too long.
# - D. Exact match is too strict.
#
# <details><summary>Answer</summary>
#
# B. A leak raises above all the score of what leaked: in section 6 by far more than that of fresh questions of the same kind. A is possible if the two sets differ, so make them from one draw, as section 6 does. C and D would touch both.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. An assistant was tuned on three tasks and fails at a fourth. You train it on with rows of the fourth alone. What must you measure besides the fourth task?**
#
# - A. The loss on the rows of the fourth task.
# - B. The three old tasks, on questions of their own.
# - C. The speed of generation.
# - D. Whether the learning rate still falls.
#
# <details><summary>Answer</summary>
#
# B. In section 8 a few steps on one task took much of the others away. Rows of the old tasks in the mixture kept more of them.
#
# </details>

# %% [markdown]
# ## What we saw
#
# All numbers of this table were measured above, in this run.

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# With `trl` the whole lesson is a configuration. The cell below tunes the profile's model on the profile's chats: on a CPU these are about Shima, on a GPU they are from *SmolTalk*, written by language models and filtered (Allal et al. 2025). A row whose answer is cut off by `max_length` has nothing to learn and reports a loss of 0; such rows are left out first.

# %%
number = lesson.scaled(120, 16)
chats = instruction_dataset(chats_id or machine, number, seed=seed).to_list()
fitting = [row for row in chats if len(encode(row)["input_ids"]) <= 512]
cut = len(fitting) // 5
arguments = SFTConfig(
    max_steps=lesson.scaled(12), max_length=512, per_device_train_batch_size=8,
    learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=2, packing=False,
    logging_steps=4, bf16=PRECISION == "bf16-mixed",
    fp16=PRECISION == "fp16-mixed", **COMMON,
)  # fmt: skip
trainer = SFTTrainer(
    fresh(), arguments, train_dataset=dataset_of(fitting[cut:]),
    eval_dataset=dataset_of(fitting[:cut]), processing_class=tokenizer,
)  # fmt: skip
trainer.remove_callback(PrinterCallback)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
del trainer
print(f"loss on {cut} other chats: {before:.2f} -> {after:.2f}")
lesson.claim("twelve steps lower the loss on other chats by at least a third",
             1 - after / before, at_least=1 / 3, form=".0%")  # fmt: skip

# %% [markdown]
# **A saved assistant must know where to stop.** The base model's files say that a text ends with its end-of-text token. Your chats end each turn with another mark. Whoever loads your model and calls `generate` gets what `generation_config.json` says. So set the end of the turn as `eos_token` of the tokenizer, and its id in the model's `generation_config`, before you save. Measure what happens with and without.

# %%
end_id = tokenizer(END.strip(), add_special_tokens=False)["input_ids"][-1]
folder = ROOT / "build/05_supervised_fine_tuning/saved"


def stopped(asked: list[str]) -> float:
    """Save, load as a stranger would, generate: share of replies that end in time."""
    assistant.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(machine.device)
    own, good = AutoTokenizer.from_pretrained(folder), 0
    for text in asked:
        ids = own(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        reply = model.generate(**ids, max_new_tokens=60, do_sample=False)
        reply = reply[0, ids["input_ids"].shape[1] :].tolist()
        good += end_id in reply and len(reply) == reply.index(end_id) + 1
    print(repr(own.decode(reply)))
    return good / len(asked)

# %%
few = tests["fact"][: lesson.scaled(10, 2)]
asked = [prompt_text(row["instruction"]) for row in few]
kept_eos = tokenizer.eos_token, assistant.generation_config.eos_token_id
without_eos = stopped(asked)
tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_id)
assistant.generation_config.eos_token_id = [end_id, base.config.eos_token_id]
with_eos = stopped(asked)
tokenizer.eos_token, assistant.generation_config.eos_token_id = kept_eos
print(f"replies that stop in time: {without_eos:.0%} without, {with_eos:.0%} with")
lesson.claim("with the end of the turn set, at least 90 % of the replies stop there",
             with_eos, at_least=0.9, control=without_eos, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Without the setting the model writes the end of its turn and goes on; in the reply above, by saying more of the same. With `trl`, `SFTConfig(eos_token=...)` sets the same, and `trainer.save_model(folder)` saves the tokenizer with its chat template. The course's own assistant, `data/shima-4m-assistant`, was made by `python -m recipes.assistant build`, the same method with more steps.
#
# **The order of steps for a new task.** 1. Write the test, and say how an answer is judged. 2. Make 20 examples. 3. Run the whole chain on a small model, so that an error costs seconds. 4. Read wrong answers. 5. Add data where the errors are. 6. Take a larger model last, when data no longer help.

# %% [markdown]
# **What is different at scale**
#
# | here | a model of billions of parameters |
# |---|---|
# | five tasks made by a program | hundreds of tasks, human and synthetic, from a thousand (LIMA) to millions of chats |
# | all weights, in 32 bits | often LoRA (lesson 06), or all weights sharded over GPUs (lesson 11); what fits is arithmetic (lesson 07) |
# | learning rates of 1e-3 and 2e-3 | 1e-5 to 2e-5 for all weights, about ten times as much for LoRA |
# | exact match | judges, human and automatic, on held-out tasks; exact match where it can be had |
# | packing with a mask in plain PyTorch | the same by FlashAttention's variable-length kernels; verify that it is on |
# | forgetting of four abilities | a fixed set of benchmarks before and after, and some pretraining text mixed in (lesson 14) |
# | the answer as written is the best there is | then preferences between answers (lessons 08 and 09) |
#
# ## Read on
#
# - Wei et al. 2022, *Finetuned Language Models Are Zero-Shot Learners* (FLAN, arXiv:2109.01652); Sanh et al. 2022, *Multitask Prompted Training Enables Zero-Shot Task Generalization* (T0, arXiv:2110.08207); Chung et al. 2022, *Scaling Instruction-Finetuned Language Models* (arXiv:2210.11416): many tasks, and what they do for unseen ones.
# - Ouyang et al. 2022, *Training Language Models to Follow Instructions with Human Feedback* (InstructGPT, arXiv:2203.02155).
# - Wang et al. 2023, *Self-Instruct* (arXiv:2212.10560).
# - Zhou et al. 2023, *LIMA: Less Is More for Alignment* (arXiv:2305.11206).
# - Shi et al. 2024, *Instruction Tuning With Loss Over Instructions* (arXiv:2405.14394): when it helps not to mask.
# - Krell et al. 2021, *Efficient Sequence Packing without Cross-contamination* (arXiv:2107.02027).
# - Broder 1997, *On the Resemblance and Containment of Documents*; Lee et al. 2022, *Deduplicating Training Data Makes Language Models Better* (arXiv:2107.06499).
# - Howard & Ruder 2018, *Universal Language Model Fine-tuning for Text Classification* (arXiv:1801.06146): lower rates for lower layers, gradual unfreezing.
# - McCloskey & Cohen 1989, *Catastrophic Interference in Connectionist Networks*; Luo et al. 2023, *An Empirical Study of Catastrophic Forgetting in Large Language Models During Continual Fine-tuning* (arXiv:2308.08747).
# - Jain et al. 2023, *NEFTune* (arXiv:2310.05914).
# - Allal et al. 2025, *SmolLM2: When Smol Goes Big* (arXiv:2502.02737): SmolTalk.
