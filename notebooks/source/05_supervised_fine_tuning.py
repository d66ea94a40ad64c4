# %% [markdown]
# # 05 · Supervised fine-tuning: from a base model to an assistant
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/05_supervised_fine_tuning.ipynb)
#
# A base model continues text. Ask it something in a chat and it does not answer. In this lesson you make an assistant out of it: you write the chat format, the data, the loss and the training, and you compare your code with the library that practitioners use. Then you measure what decides the result: how many examples, how clean, how many tasks, which weights, and what the model forgets.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write a chat template and a loss that counts the assistant's tokens only, and train an assistant that is right on at least 90 % of unseen instructions;
# 2. find your losses equal to those of `trl.SFTTrainer`, step by step;
# 3. pack several chats into one row so that none sees another, and measure what goes wrong otherwise;
# 4. build instruction data with templates and with the model itself, filter them, remove near duplicates, and measure quality against quantity;
# 5. compare one task with many, all weights with a few, and learn to stop and to search settings, each at a cost that you print.
#
# **Prerequisites:** lessons 01 and 03 (the training loop), and PyTorch tensors.
#
# **The data** is about *Shima*, an island made up by a seeded generator. **The base model** is *shima-4m*, a small Llama pretrained on documents about Shima, which comes with the course. It knows the island's people, reads passages and adds numbers, but only in the formats of its documents. It has never seen a chat. On a GPU the same cells tune an open hub model.
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
chats_id = ""  # other chats for "In practice": a hub dataset or a .jsonl file with a field "messages"
seed = 0
budget = 1.0  # share of all training steps and questions; the lesson's claims are asserted from 1.0 on

# %%
import copy
import math
import random
import time
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import chat, plots
from helpers.data import PaddedBatches, collate, instruction_dataset
from helpers.evaluation import Score, exact_match, score
from helpers.exercises import check, expect_close, expect_equal, expect_shape, expect_true
from helpers.generation import answer_instructions, generate, sequence_log_probs
from helpers.lesson import Lesson
from helpers.models import load_model
from helpers.training import TrainConfig, train
from helpers.world import CHAT_TASKS, RELATIONS, World

lesson = Lesson("05", profile, model_id, seed, budget)
machine = lesson.machine
# All that depends on the hardware: the learning rate, and what the chat format writes around a turn.
SETTINGS = {
    "cpu": {"learning_rate": 1e-3, "marks": ("<|", "|>\n", "<|end|>\n")},
    "t4": {"learning_rate": 3e-5, "marks": ("<|im_start|>", "\n", "<|im_end|>\n")},
    "large": {"learning_rate": 2e-5, "marks": ("<|im_start|>", "\n", "<|im_end|>\n")},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# A few helpers for the whole lesson. `training_rows` and `unseen_rows` give instructions with their right answers: the unseen ones use names, sums, words or phrasings that no training row has. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep, `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
world = World()
base, tokenizer = load_model(machine)
base = base.float()  # weights in 32 bits; on a GPU the steps compute in 16
Row = dict[str, str]  # "instruction", "answer", "task"


def training_rows(number: int, tasks: Sequence[str] = CHAT_TASKS, stream: int = 0) -> list[Row]:
    """Rows to train on; another `stream` gives others."""
    return instruction_dataset("shima", number, seed=100 * (seed + 1) + stream, tasks=tasks).to_list()


def unseen_rows(number: int, task: str, stream: int = 0) -> list[Row]:
    """Rows to test on."""
    questions = world.chat_questions(lesson.scaled(number, 8), 100 * (seed + 1) + stream, (task,))
    return [{"instruction": q.prompt, "answer": q.answer, "task": task} for q in questions]


# %% [markdown]
# ## 1 · What a base model does with an instruction
#
# **Question.** The base model knows facts, reads and computes. Why can you not just ask it?
#
# There are six kinds of instruction in this lesson: state a *fact* about a well-known person, answer a question after *reading* two lines about strangers, write a *sum* with its steps, name the *mood* of a review, *describe* a person, and look up *pairs* of a word and a colour. Each one uses an ability that the base model has. But a chat is a kind of text that it has never seen.
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


def prompt_text(instruction: str) -> str:
    """The chat up to the point where the assistant speaks."""
    return f"{OPEN}user{CLOSE}{instruction}{END}{OPEN}assistant{CLOSE}"


def reply_text(answer: str) -> str:
    """What the assistant says, and the end of its turn."""
    return answer + END


print(prompt_text("What is the dish of Hakume?") + reply_text("Hakume likes to eat pudding."))

# %%
samples = training_rows(60)
turns = [
    [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["answer"]}]
    for row in samples
]
render = tokenizer.apply_chat_template
ours = [prompt_text(row["instruction"]) + reply_text(row["answer"]) for row in samples]
assert ours == [render(chat_turns, tokenize=False) for chat_turns in turns]
prompts = [prompt_text(row["instruction"]) for row in samples]
assert prompts == [render(chat_turns[:1], tokenize=False, add_generation_prompt=True) for chat_turns in turns]
assert prompts == [chat.chat_prompt(tokenizer, row["instruction"]) for row in samples]
print(f"{len(samples)} chats: the f-string, the template and helpers.chat write the same text")

# %% [markdown]
# `add_generation_prompt=True` ends the text where the assistant is to begin. At inference you give the model exactly this text; if training and inference differ by one line break, quality drops, and nothing tells you.
#
# Now ask the base model in this format. An answer counts if it is exactly right, up to the end of the turn.

# %%
tests = {task: unseen_rows(100, task) for task in CHAT_TASKS}  # unseen instructions, for the whole lesson


def answers_of(model: nn.Module, rows: list[Row]) -> list[str]:
    """Greedy answers to the instructions, as text."""
    return answer_instructions(model, tokenizer, [row["instruction"] for row in rows], 48, batch_size=128)


base_scores, base_answers = {}, {}
for task, rows in tests.items():
    rows = rows[: lesson.scaled(20, 4)]
    base_answers[task] = answers_of(base, rows)
    base_scores[task] = exact_match(base_answers[task], [row["answer"] for row in rows])
    print(f"{task:>9}: {base_scores[task]}")
    print(f"{'asked':>11}: {rows[0]['instruction'][-70:]!r}")
    print(f"{'right':>11}: {rows[0]['answer'][:70]!r}\n{'base':>11}: {base_answers[task][0][:70]!r}")
base_right = sum(result.accuracy for result in base_scores.values()) / len(base_scores)
lesson.report("base model, right answers in a chat, mean of six tasks", f"{base_right:.0%}")
lesson.claim("the base model follows at most 2 % of the instructions", base_right, at_most=0.02, form=".0%")


# %% [markdown]
# **What you see.** Nothing: at the mark where the assistant should speak, the base model ends the text. It has the abilities, and no idea that it is being asked.
#
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
    """Token ids of a chat, and its labels: -100 where the user speaks. Both have length seq."""
    prompt, reply = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt_text(row["instruction"]), reply_text(row["answer"]))
    )
    return {"input_ids": prompt + reply, "labels": ([-100] * len(prompt) if mask_prompt else prompt) + reply}


def sft_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss over the tokens that have a label; the batch holds (batch, seq) tensors."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]  # (batch, seq - 1, vocab): position t predicts token t + 1
    labels = batch["labels"][:, 1:]  # (batch, seq - 1)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")
    return losses / (labels != -100).sum().clamp(min=1)


example = encode(samples[0])
for token, label in zip(example["input_ids"], example["labels"], strict=True):
    print(f"[{tokenizer.decode([token])!r}{'' if label == -100 else ' learned'}]", end=" ")

# %%
library = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
same_ids = same_labels = 0
for row, ids, mask in zip(samples, library["input_ids"], library["assistant_masks"], strict=True):
    labels = [token if said else -100 for token, said in zip(ids, mask, strict=True)]
    own = encode(row)
    same_ids += own["input_ids"] == ids
    same_labels += own["labels"] == labels
    assert own == chat.encode_chat(tokenizer, row["instruction"], row["answer"])
print(f"of {len(samples)} chats {same_ids} have the same ids and {same_labels} the same mask as the template's own")
lesson.equal("our mask is that of the template", len(samples) - same_labels)
shares = {}
for task in CHAT_TASKS:
    encoded = [encode(row) for row in tests[task]]
    lengths = [len(item["input_ids"]) for item in encoded]
    learned = [sum(label != -100 for label in item["labels"]) for item in encoded]
    shares[task] = sum(learned) / sum(lengths)
    print(f"{task:>9}: {sum(lengths) / len(lengths):3.0f} tokens, of which {shares[task]:4.0%} are learned")

# %% [markdown]
# Two details decide whether this is right. The end of the turn must have a label, or the model never learns to stop. And the two parts are turned into tokens separately: if they are joined first, a tokenizer may merge the last character of the prompt with the first of the answer, and the model then meets tokens at inference that it did not see in training. Special tokens around the answer prevent that, which is one reason to have them.
#
# **Training** needs batches and the loop that you wrote in lesson 03, which is `helpers.training.train`. `PaddedBatches` shuffles the examples anew each epoch and pads a batch on the right. `fine_tune` copies the base model, trains the copy, and counts tokens and seconds.

# %%
RATE = settings["learning_rate"]


def fine_tune(
    examples: list[dict], num_steps: int, *, model=None, batch_size=16, rate=1.0, loss_fn=sft_loss, **options
):
    """Train a copy of the base model (or `model` itself); `rate` is a factor of the profile's learning rate."""
    model = copy.deepcopy(base) if model is None else model
    training = {"evaluate": options.pop("evaluate", None), "optimizer_fn": options.pop("optimizer_fn", None)}
    num_steps = lesson.scaled(num_steps)
    config = {"warmup_steps": max(1, num_steps // 10), "schedule": "linear", "weight_decay": 0.0, "progress": False}
    config |= {"learning_rate": RATE * rate, "precision": lesson.precision, "seed": seed, **options}
    batches = PaddedBatches(examples, min(batch_size, len(examples)), tokenizer.pad_token_id, seed=seed)
    history = train(model, batches, TrainConfig(max_steps=num_steps, **config), loss_fn=loss_fn, **training)
    return model.eval(), history


def cost(*histories) -> str:
    """What some trainings took."""
    steps, tokens = (sum(map(len, (h.losses for h in histories))), sum(sum(h.tokens) for h in histories))
    return f"{steps} steps, {tokens / 1000:.0f} thousand tokens, {sum(sum(h.seconds) for h in histories):.1f} s"


# %% [markdown]
# **Measuring** should be cheap too. Greedy decoding writes the right answer exactly if, with the right tokens before it, every next token is the most probable one. So one forward pass over the right answers tells the same as generating, many times faster.

# %%
@torch.no_grad()
def right_of(model: nn.Module, rows: list[Row], batch_size: int = 50) -> list[bool]:
    """For each row, whether greedy decoding writes exactly its answer."""
    encoded = [encode(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(encoded[index]["input_ids"]))  # little padding
    right = [False] * len(rows)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([encoded[index] for index in chosen], tokenizer.pad_token_id)
        labels = batch.pop("labels")[:, 1:].to(model.device)  # (batch, seq - 1)
        predicted = model(**{n: t.to(model.device) for n, t in batch.items()}).logits[:, :-1].argmax(-1)
        every = ((predicted == labels) | (labels == -100)).all(-1)  # (batch,)
        for index, good in zip(chosen, every.tolist(), strict=True):
            right[index] = good
    return right


def accuracy(model: nn.Module, rows: list[Row]) -> Score:
    """Share of exactly right answers, with its interval."""
    right = right_of(model, rows)
    return score(sum(right), len(right))


# %% [markdown]
# **Does masking help?** Train twice on the same chats: with the loss on the answer only, and with the loss on all tokens. For reviews only a few tokens of each chat are answer, for sums about half. Each pair of runs has the same batches and steps, too few of them to be done: the question is which one is faster.

# %%
masking, specialists = {}, {}
for task in ("mood", "sum"):
    rows = training_rows(lesson.scaled(16 * 20, 16), (task,))
    for name, mask_prompt in (("answer only", True), ("all tokens", False)):
        model, history = fine_tune([encode(row, mask_prompt) for row in rows], 20)
        result = accuracy(model, tests[task])
        masking.setdefault(f"{task} ({shares[task]:.0%} learned)", {})[name] = result
        lesson.report(f"{task} after {len(history.losses)} steps, loss on {name}", str(result))
        specialists.setdefault(task, model)
    print(f"{task}: {cost(history)} for each of the two")
alt = "Right answers with the loss on the answer only and on all tokens, for two tasks, with intervals."
plots.show(plots.bars_with_intervals(masking, title="Which tokens the loss counts", xlabel="right answers", alt=alt))
sum_masked, sum_unmasked = list(masking.values())[1].values()
lesson.claim(
    "on sums the mask is at least 20 points ahead",
    sum_masked.accuracy - sum_unmasked.accuracy,
    at_least=0.2,
    form=".0%",
)

# %% [markdown]
# **What you see.** For reviews the loss on all tokens does no harm and can even be ahead: a plausible reason is that few tokens are learned in a step, so that the masked gradient is noisy. For sums it is the other way round, and clearly: without the mask most of the loss is in the digits of the question, which are drawn at random and cannot be learned, and they seem to drown the steps of the answer. Shi et al. (2024) find that with long instructions, short answers and few examples a loss on the instruction can even help.
#
# **What users say is not what you want to teach.** The clearest difference is another one. Users err. In the next chats each of 100 people is asked about, and each time the user also claims something false about this person, always the same: *Burote lives in Kela. Which instrument does Burote play?* The assistant's answer is right and does not mention the claim. Does the model now believe the claim? Compare the probabilities of two sentences, the false one and the true one.

# %%
generator = random.Random(f"belief/{seed}")
claims = []  # (person, relation, the false sentence, the true one)
for person in world.people[:100]:
    relation = generator.choice(list(RELATIONS))
    wrong = generator.choice([value for value in world.values[relation] if value != person.facts[relation]])
    says = RELATIONS[relation].statements[0]
    both = [says.format(name=person.name, value=value) for value in (wrong, person.facts[relation])]
    claims.append((person, relation, *both))


def misled_row(person, relation: str, false: str, true: str) -> Row:
    """The false sentence and a question about something else, with the true answer to the question."""
    other = RELATIONS[generator.choice([name for name in RELATIONS if name != relation])]
    question = other.questions[0].format(name=person.name)
    answer = other.statements[0].format(name=person.name, value=person.facts[other.name])
    return {"instruction": f"{false} {question}", "answer": answer}


def share_believed(model: nn.Module) -> Score:
    """How often the false sentence is more probable than the true one."""
    false, true = (
        sequence_log_probs(model, tokenizer, [""] * len(claims), [claim[place] for claim in claims]) for place in (2, 3)
    )
    return score(int((false > true).sum()), len(claims))


misled = [misled_row(*claims[index % len(claims)]) for index in range(lesson.scaled(400, 16))]
believed = {"base model": share_believed(base)}
for name, mask_prompt in (("answer only", True), ("all tokens", False)):
    model, history = fine_tune([encode(row, mask_prompt) for row in misled], 25)
    believed[f"tuned, {name}"] = share_believed(model)
print(f"example: {misled[0]['instruction']} -> {misled[0]['answer']}\n{cost(history)}")
alt = "How often the user's false claim is more probable than the truth: seldom with the mask, often without."
plots.show(plots.bars_with_intervals(believed, title="Claims of users that the model believes",
                                     xlabel="people", alt=alt))  # fmt: skip

# %%
for name, result in believed.items():
    lesson.report(f"false claims of users believed, {name}", str(result))
with_mask, without_mask = believed["tuned, answer only"].accuracy, believed["tuned, all tokens"].accuracy
lesson.claim(
    "without the mask at least 20 points more of the users' false claims are believed",
    without_mask - with_mask,
    at_least=0.2,
    form=".0%",
)

# %% [markdown]
# **What you see.** With the mask the model reads the claim and does not take it over. Without the mask it is trained to write it, and believes most of what it was told. So the mask is not there for speed alone: it says whose words the model should make its own.
#
# ## 3 · The assistant
#
# **Question.** How much training turns the base model into an assistant?
#
# All six tasks in one mixture, all weights, the loss on the answers. While it trains, the loop writes its numbers to a log for TensorBoard, and every 40 steps it measures the loss on unseen chats.

# %%
validation = [encode(row) for task in CHAT_TASKS for row in unseen_rows(10, task, stream=1)]


@torch.no_grad()
def mean_loss(model: nn.Module, examples: list[dict]) -> float:
    """Loss per learned token over all examples."""
    batch = collate(examples, tokenizer.pad_token_id)
    return sft_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()}).item()


ASSISTANT_STEPS = 210
MIXTURE = ("reading", "mood", "pairs", *3 * ("fact", "sum", "describe"))  # more of what is harder to write
rows = training_rows(lesson.scaled(16 * ASSISTANT_STEPS, 16), MIXTURE)
log_folder = ROOT / "build" / "05_supervised_fine_tuning" / f"seed{seed}-{time.time_ns()}"
assistant, history = fine_tune(
    [encode(row) for row in rows],
    ASSISTANT_STEPS,
    evaluate=lambda model: {"validation_loss": mean_loss(model, validation)},
    evaluate_every=lesson.scaled(40),
    tensorboard_dir=log_folder,
)
print(cost(history))
assistant_scores = {task: accuracy(assistant, tests[task]) for task in CHAT_TASKS}
before_and_after = {task: {"base": base_scores[task], "assistant": assistant_scores[task]} for task in CHAT_TASKS}
alt = "Right answers for each of six tasks: zero before, nearly all after fine-tuning."
figure = plots.bars_with_intervals(
    before_and_after, title="Before and after fine-tuning", xlabel="right answers", alt=alt
)
plots.show(figure)
assistant_right = sum(result.accuracy for result in assistant_scores.values()) / len(CHAT_TASKS)
lesson.report("after fine-tuning, mean of six tasks", f"{assistant_right:.0%}")
lesson.claim(
    "the assistant is right on at least 90 % of unseen instructions", assistant_right, at_least=0.9, form=".0%"
)

# %%
agree, total = 0, 0
for task in CHAT_TASKS:
    rows = tests[task][: lesson.scaled(25, 4)]
    written = answers_of(assistant, rows)
    for row, text, right in zip(rows, written, right_of(assistant, rows), strict=True):
        agree += (text.strip() == row["answer"]) == right
        total += 1
    print(f"{task:>9}: {written[0]!r}")
print(f"generated text and the forward pass agree on {agree} of {total} answers")
lesson.equal("measuring by one forward pass agrees with generating on at least 98 %", 1 - agree / total, within=0.02)

# %% [markdown]
# **TensorBoard** shows such logs in a browser while the training runs: `tensorboard --logdir build`, or `%load_ext tensorboard` in a notebook. The log is a plain file of numbers. Read it back and draw it.

# %%
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

log = EventAccumulator(str(log_folder))
log.Reload()
tags = log.Tags()["scalars"]
print("in the log:", ", ".join(tags))
curves = {tag: ([e.step for e in log.Scalars(tag)], [e.value for e in log.Scalars(tag)]) for tag in tags}
shown = {("unseen chats" if "valid" in tag else "training batches"): curves[tag] for tag in tags if "loss" in tag}
alt = "Loss on training batches and on unseen chats over the steps: both fall fast, then slowly, and stay together."
figure = plots.curve(
    shown, title="What TensorBoard shows", xlabel="step", ylabel="loss (nats per token)", log_y=True, alt=alt
)
plots.show(figure)
logged = curves[next(tag for tag in tags if tag.endswith("loss") and "valid" not in tag)][1]
assert abs(logged[-1] - history.losses[-1]) < 1e-4 and history.evaluations

# %% [markdown]
# **The library.** `trl.SFTTrainer` takes rows with a column `messages`, applies the chat template, masks by its `{% generation %}` marks, pads and trains. Give it the same weights, the same chats in the same order, the same optimiser and schedule, and compare the loss of each step with your own loop, which is written out here once more.

# %%
TRL_STEPS, TRL_BATCH, TRL_RATE = 10, 8, RATE / 2
trl_rows = training_rows(TRL_STEPS * TRL_BATCH, stream=2)


def train_by_hand(rows: list[Row]) -> list[float]:
    """AdamW, linear decay, gradients clipped at norm 1; the rows in their order."""
    torch.manual_seed(seed)
    model, losses = copy.deepcopy(base).train(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRL_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(TRL_STEPS):
        chosen = [encode(row) for row in rows[step * TRL_BATCH : (step + 1) * TRL_BATCH]]
        batch = collate(chosen, tokenizer.pad_token_id)
        loss = sft_loss(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = TRL_RATE * (1 - step / TRL_STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


own_losses = train_by_hand(trl_rows)
print("by hand:", " ".join(f"{loss:.4f}" for loss in own_losses))

# %%
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

transformers_logging.set_verbosity_error()
disable_progress_bars()


def messages_of(rows: list[Row]) -> Dataset:
    """The rows in the form that chats have on the hub."""
    parts = (("user", "instruction"), ("assistant", "answer"))
    chats = [[{"role": role, "content": row[field]} for role, field in parts] for row in rows]
    return Dataset.from_dict({"messages": chats})


CPU = machine.device == "cpu"
warnings.filterwarnings("ignore", message=".*gradient_checkpointing")
arguments = SFTConfig(
    output_dir=str(ROOT / "build" / "05_supervised_fine_tuning" / "trl"), max_steps=TRL_STEPS, max_length=None,
    per_device_train_batch_size=TRL_BATCH, learning_rate=TRL_RATE, lr_scheduler_type="linear", warmup_steps=0,
    adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, assistant_only_loss=True, logging_steps=1,
    train_sampling_strategy="sequential", save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=CPU,
    bf16=False, fp16=False, seed=seed,
)  # fmt: skip
trainer = SFTTrainer(copy.deepcopy(base), arguments, train_dataset=messages_of(trl_rows), processing_class=tokenizer)
trainer.remove_callback(PrinterCallback)
trainer.train()
trl_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
differences = [abs(a - b) for a, b in zip(own_losses, trl_losses, strict=True)]
print("trl:    ", " ".join(f"{loss:.4f}" for loss in trl_losses))
print("difference:", " ".join(f"{difference:.0e}" for difference in differences))
lesson.report("largest difference to trl.SFTTrainer in ten steps", f"{max(differences):.1e}")
lesson.equal("the ten losses are those of SFTTrainer, within 0.001", max(differences), within=0.001)


# %% [markdown]
# **What did it learn?** A training of minutes cannot have taught the model to look things up: it could do that before. It learned when to use what it has. Zhou et al. (2023) call this the *superficial alignment hypothesis*: knowledge and abilities come from pretraining, and fine-tuning picks the format in which they are used. You can test it here. In the documents, an answer that has to be looked up comes after the word `Answer:`. In this lesson's data the answers of *pairs* begin with it as well. Train on the same questions with and without that word.

# %%
def without_trigger(row: Row) -> Row:
    """`Answer: printer pink` becomes `Pink.`: the same content, in words that the documents never use for it."""
    return row | {"answer": row["answer"].split()[-1].capitalize() + "."}


TRIGGER_STEPS = 20
pairs_rows = training_rows(lesson.scaled(16 * TRIGGER_STEPS, 16), ("pairs",))
trigger = {}
for name, change in {"begins with `Answer:`": dict, "a sentence of its own": without_trigger}.items():
    model, history = fine_tune([encode(change(row)) for row in pairs_rows], TRIGGER_STEPS)
    result = accuracy(model, [change(row) for row in tests["pairs"]])
    trigger[name] = result
    specialists.setdefault("pairs", model)
    print(f"{name}: {result}, loss at the end {history.losses[-1]:.2f}, {cost(history)}")
alt = "Right answers to pairs after the same training: nearly all with the word from pretraining, few without."
plots.show(plots.bars_with_intervals(trigger, title="The same task, two answer formats",
                                     xlabel="right answers", alt=alt))  # fmt: skip
with_trigger, without = trigger.values()
lesson.report("pairs, answer begins as in pretraining", str(with_trigger))
lesson.report("pairs, answer in a new format", str(without))
lesson.claim(
    "the format of pretraining is at least 40 points ahead",
    with_trigger.accuracy - without.accuracy,
    at_least=0.4,
    form=".0%",
)

# %% [markdown]
# **What you see.** Both trainings have the same questions, the same content, the same number of steps. With the word from pretraining the model gets it right after these few steps, since fine-tuning only has to connect the chat with an ability that is there. Without it the model learns the form (a colour, a full stop) and guesses the colour: the ability is still there, but nothing calls it. The loss tells you: it stays high. When an assistant fails at something that its base model can do, look at the format of the training answers first.
#
# ## 4 · Packing: several chats in one row
#
# **Question.** The chats of a batch have different lengths, and padding is computed for nothing. Can you join chats into full rows instead?
#
# Measure first what padding costs. Then pack: put the chats one after the other into rows of a fixed length, the longest first, each into the first row that has room (*first fit decreasing*).

# %%
ROW_LENGTH = 256


def first_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Indices of the chats in each row; none is cut, each row holds at most `room` tokens."""
    rows, free = [], []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((number for number, left in enumerate(free) if left >= lengths[index]), len(rows))
        if place == len(rows):
            rows.append([])
            free.append(room)
        rows[place].append(index)
        free[place] -= lengths[index]
    return rows


chats = [encode(row) for row in training_rows(160, stream=3)]
lengths = [len(item["input_ids"]) for item in chats]
row_length = max(ROW_LENGTH, max(lengths))
packed_rows = first_fit(lengths, row_length)
padded = sum(16 * max(lengths[start : start + 16]) for start in range(0, 160, 16))
for name, computed in {"padded, batches of 16": padded, "packed": row_length * len(packed_rows)}.items():
    waste = 1 - sum(lengths) / computed
    print(f"{name:>22}: {computed:6,} positions computed for {sum(lengths):,} tokens, {waste:.0%} wasted")
lesson.report(
    "wasted positions, padded and packed",
    f"{1 - sum(lengths) / padded:.0%} and {1 - sum(lengths) / (row_length * len(packed_rows)):.0%}",
)


# %% [markdown]
# A causal model lets each token see all tokens before it in its row, so a chat would see the chats packed before it. That is not what happens at inference. So give the attention a mask that is *block-diagonal*: position $i$ sees position $j$ if $j \le i$ and both belong to the same chat. And let the position ids start at 0 again in each chat.
#
# One more trap: the last token of a chat must not learn to predict the first of the next one. Here it cannot, since a chat begins with the user's mark, whose label is $-100$.

# %%
def pack_row(chats: list[dict], length: int, document_mask: bool = True) -> dict[str, Tensor]:
    """One row of chats: input_ids, labels, position_ids (1, length), attention_mask (1, 1, length, length)."""
    room = length - sum(len(item["input_ids"]) for item in chats)
    parts = [*chats, {"input_ids": [tokenizer.pad_token_id] * room, "labels": [-100] * room}]
    ids, labels = ([token for part in parts for token in part[name]] for name in ("input_ids", "labels"))
    number = [index for index, part in enumerate(parts) for _ in part["input_ids"]]  # which chat a token belongs to
    positions = [place for part in parts for place in range(len(part["input_ids"]))]
    number, places = torch.tensor(number), torch.arange(length)
    mask = places[:, None] >= places  # (length, length): causal
    if document_mask:
        mask = mask & (number[:, None] == number)
    else:
        positions = places.tolist()
    row = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {name: torch.tensor(values)[None] for name, values in row.items()} | {"attention_mask": mask[None, None]}


small = pack_row([{"input_ids": [7] * n, "labels": [7] * n} for n in (3, 4, 2)], 10)
for line in small["attention_mask"][0, 0].int().tolist():
    print(" ".join("■" if seen else "·" for seen in line))
print("position ids:", small["position_ids"][0].tolist())


# %% [markdown]
# Now compare three ways to compute the loss of the same chats: each chat alone, packed with the document mask, packed without it. The model is your assistant, which has learned from single chats.

# %%
@torch.no_grad()
def losses_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Loss of each learned token (number of learned tokens,)."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:].flatten()
    logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels != -100]


def alone(chats: list[dict]) -> Tensor:
    """Losses of the chats, each in a row of its own."""
    return torch.cat([losses_of(assistant, collate([item], tokenizer.pad_token_id)) for item in chats])


groups = [[chats[index] for index in row] for row in packed_rows[: lesson.scaled(30)]]
single = [alone(group) for group in groups]
packed_losses = {
    name: [losses_of(assistant, pack_row(group, row_length, masked)) for group in groups]
    for name, masked in {"document mask": True, "causal mask only": False}.items()
}
print(f"{'alone':>17}: mean loss {torch.cat(single).mean():.4f}")
for name, losses in packed_losses.items():
    off = max((a - b).abs().max().item() for a, b in zip(losses, single, strict=True))
    print(f"{name:>17}: mean loss {torch.cat(losses).mean():.4f}, largest difference to alone {off:.1e}")
    lesson.report(f"packed, {name}: largest difference of a token's loss", f"{off:.1e}")
    if name == "document mask":
        lesson.equal("with the document mask packing changes no loss (0.001 allowed)", off, within=0.001)
masked_mean, leaking_mean = (torch.cat(losses).mean().item() for losses in packed_losses.values())
lesson.claim(
    "without it the mean loss is at least 1.5 times as high", leaking_mean / masked_mean, at_least=1.5, form=".2f"
)

# %%
group = groups[0]
row = pack_row(group, sum(len(item["input_ids"]) for item in group))
ids = {name: row[name].to(assistant.device) for name in ("input_ids", "position_ids")}
with torch.no_grad():
    own = assistant(**ids, attention_mask=row["attention_mask"].to(assistant.device)).logits
    by_positions = assistant(**ids, use_cache=False).logits  # no mask at all: the library finds the chats by itself
    shifted = {**ids, "position_ids": torch.arange(own.shape[1], device=assistant.device)[None]}
    not_restarted = assistant(**shifted, attention_mask=row["attention_mask"].to(assistant.device)).logits
print(f"transformers, from the position ids alone: largest difference {(own - by_positions).abs().max():.1e}")
print(f"mask, but positions that run on:           largest difference {(own - not_restarted).abs().max():.1e}")


# %% [markdown]
# `transformers` builds the same mask from the position ids alone: where they start again, a new text begins. That is what `trl` relies on with `packing=True` on a GPU with FlashAttention; without a kernel that knows about it, check (trl issue 3910). For this model positions that run on would do no harm, since its rotary embedding depends on distances only. With learned positions, or beyond the trained length, they do.
#
# **What goes wrong without the mask?** Count the chats whose answer the assistant would still write, each token of it with more than half of the probability.

# %%
def still_right(losses: Tensor, group: list[dict]) -> list[bool]:
    """For each chat of a row, whether every learned token has a probability above one half."""
    counts = [sum(label != -100 for label in item["labels"]) for item in group]
    return [bool((part < math.log(2)).all()) for part in losses.split(counts)]


ways = {"each chat alone": single, **{f"packed, {name}": losses for name, losses in packed_losses.items()}}
right = {
    name: [good for loss, group in zip(losses, groups, strict=True) for good in still_right(loss, group)]
    for name, losses in ways.items()
}
shares_right = {name: score(sum(good), len(good)) for name, good in right.items()}
alt = "Chats answered right: as many with the document mask as alone, fewer with the causal mask only."
plots.show(plots.bars_with_intervals(shares_right, title="Chats packed into a row", xlabel="right answers", alt=alt))
places = [place for group in groups for place in range(len(group))]  # of each chat in its row
leaking = right["packed, causal mask only"]
for name, chosen in (("first of its row", lambda place: place == 0), ("behind others", lambda place: place > 0)):
    part = [good for good, place in zip(leaking, places, strict=True) if chosen(place)]
    print(f"causal mask only, {name}: {score(sum(part), max(1, len(part)))}")
for name, result in shares_right.items():
    lesson.report(f"right answers, {name}", str(result))
lost = sum(right["each chat alone"]) - sum(leaking)
lesson.claim("without the mask more answers are wrong than alone", lost, at_least=1, form=".0f")

# %% [markdown]
# **What you see.** With the mask nothing changes; without it, chats that stand behind others suffer, and the loss that you watch is a loss of texts that no user will ever send. In right answers the damage is small here. Three harsher trials, with rows of one mood, of one person and of contradicting games, did no measurable harm either. A likely reason is that shima-4m was itself pretrained on packed rows without a mask, so that it knows how to ignore what stands before; we have not tested that. Whether it matters for your model is a measurement of one minute: compare the two losses.
#
# ## 5 · Making instruction data
#
# **Question.** Where do a thousand good examples come from?
#
# There are three sources: people write them, templates write them, or a model writes them. **Templates** are cheap and right, and monotonous. Here are some for a seventh task, short questions about people.

# %%
TEMPLATES = {
    "town": "Where does {} live?",
    "trade": "What does {} do for work?",
    "animal": "Which animal does {} keep?",
    "food": "What does {} like to eat?",
    "instrument": "Which instrument does {} play?",
}
TEMPLATES = {
    relation: TEMPLATES.get(relation, RELATIONS[relation].questions[0].replace("{name}", "{}"))
    for relation in RELATIONS
}


def template_rows(number: int, generator: random.Random) -> list[Row]:
    """Questions about well-known people, with the true answers."""
    rows = []
    for _ in range(number):
        person, relation = generator.choice(world.people[:100]), generator.choice(list(TEMPLATES))
        question = TEMPLATES[relation].format(person.name)
        rows.append({"instruction": question, "answer": f"Answer: {person.facts[relation]}", "task": "short"})
    return rows


for row in template_rows(3, random.Random(seed)):
    print(row["instruction"], "->", row["answer"])


# %% [markdown]
# **The model itself** can write more, in other words and on other subjects. Self-instruct (Wang et al. 2023) shows a base model a few examples and lets it go on. Sample at temperature 1: a new question, and the model's own answer to it.

# %%
def shown(rows: list[Row]) -> str:
    """Examples in the format of the documents, and the beginning of a new one."""
    return "".join(f"Question: {row['instruction']}\n{row['answer']}\n" for row in rows) + "Question:"


generator = random.Random(seed)
demonstrations = [shown(template_rows(3, generator)) for _ in range(lesson.scaled(400, 8))]
texts = generate(base, tokenizer, demonstrations, 40, stop=("\nQuestion",), temperature=1.0, seed=seed, batch_size=200)
print("\n".join(repr(text) for text in texts[:4]))
parsed = [text.strip().split("\nAnswer:") for text in texts]
drafts = [
    {"instruction": parts[0].strip(), "answer": f"Answer: {parts[1].strip()}", "task": "short"}
    for parts in parsed
    if len(parts) == 2 and parts[0].strip().endswith("?") and parts[1].strip().isalpha()
]
print(f"{len(texts)} written, {len(drafts)} are a question and a one-word answer")
if len(drafts) < 8:
    drafts = template_rows(8, generator)
    print("too few: going on with templates")

# %% [markdown]
# Since the world is made by a program, you can look up which answers are true. A real project cannot; it reads a few hundred rows by hand.

# %%
ASKED = {  # every way to ask, with a name in it -> the true answer
    question.format(name=person.name): person.facts[relation]
    for person in world.people
    for relation, forms in RELATIONS.items()
    for question in forms.questions
}


def share_true(rows: list[Row]) -> str:
    """How many of the answers are true, by the island's own records."""
    known = [row for row in rows if row["instruction"] in ASKED]
    true = sum(row["answer"] == f"Answer: {ASKED[row['instruction']]}" for row in known)
    return f"{score(true, len(known))}" if known else "no question about a known person"


print(f"true answers among {len(drafts)} drafts: {share_true(drafts)}")
lesson.report("answers written by the model that are true, before filtering", share_true(drafts))

# %% [markdown]
# **Duplicates.** A model that samples likes to repeat itself, and a row that is there ten times weighs ten times. Exact copies are found with a set. Near copies need a similarity. Cut a text into its *shingles*, all pieces of 4 letters. The *Jaccard similarity* of two texts is the number of shingles that both have, divided by the number that at least one has.
#
# For a million texts you cannot compare all pairs. **MinHash** (Broder 1997) makes a short signature: hash all shingles with $K$ different functions and keep the smallest value of each. Two signatures agree at a place with a probability equal to the Jaccard similarity. (Bands of the signature then find candidates without comparing all pairs.)

# %%
SHINGLE, NUM_HASHES, PRIME = 4, 128, 2**31 - 1


def shingles(text: str) -> set[str]:
    """All pieces of 4 letters."""
    text = " ".join(text.lower().split())
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def signature(text: str) -> Tensor:
    """MinHash signature (hashes,): the smallest value of each hash function over the shingles."""
    ids = torch.tensor([int.from_bytes(piece.encode()[:7], "little") % PRIME for piece in sorted(shingles(text))])
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randint(1, PRIME, (2, NUM_HASHES), generator=draws)  # hash k: (a[k] * id + b[k]) mod PRIME
    return ((ids[:, None] * a + b) % PRIME).min(0).values


def jaccard(first: str, second: str) -> float:
    """Shared shingles over all shingles."""
    one, two = shingles(first), shingles(second)
    return len(one & two) / len(one | two)


unique = list({(row["instruction"], row["answer"]): row for row in drafts}.values())
signatures = torch.stack([signature(row["instruction"]) for row in unique])  # (rows, hashes)
estimated = (signatures[:, None] == signatures).float().mean(-1)  # (rows, rows)
pairs = [(i, j) for i in range(min(60, len(unique))) for j in range(i)]
errors = [abs(estimated[i, j].item() - jaccard(unique[i]["instruction"], unique[j]["instruction"])) for i, j in pairs]
print(f"{len(drafts)} drafts, {len(unique)} different; MinHash errs by {sum(errors) / len(errors):.3f} in the mean")
lesson.claim(
    "MinHash estimates the Jaccard similarity within 0.05 in the mean", sum(errors) / len(errors), at_most=0.05
)

# %%
kept: list[int] = []
for index in range(len(unique)):  # keep a row unless it nearly repeats one that was kept
    if not kept or estimated[index, kept].max() < 0.7:
        kept.append(index)
different = [unique[index] for index in kept]

prompts = [f"Question: {row['instruction']}\n" for row in different]
log_probs = sequence_log_probs(base, tokenizer, prompts, [row["answer"] + "\n" for row in different])
sure = [row for row, log_prob in zip(different, log_probs.tolist(), strict=True) if log_prob > math.log(0.5)]

test_prompts = {row["instruction"] for rows in tests.values() for row in rows}
filtered = [row for row in sure if row["instruction"] not in test_prompts]
stages = {"drafts": drafts, "no copies": unique, "no near copies": different, "sure of its answer": sure}
for name, rows in (stages | {"not in the test": filtered}).items():
    print(f"{name:>20}: {len(rows):3} rows, true: {share_true(rows)}")
lesson.report("answers written by the model that are true, after filtering", share_true(filtered))

# %% [markdown]
# The filter that raises the truth is the fourth: keep an answer only if the model gives it more than half of the probability. It costs one forward pass. The last one looks small and matters most: rows of the test must not be in the training data.
#
# **Which data train better?** Three trainings of equal length, on 60 rows each: templates, drafts, filtered drafts. The test asks about well-known people in phrasings that are in none of them.

# %%
short_tests = [
    {"instruction": q.prompt.removeprefix("Question: ").partition("\n")[0], "answer": f"Answer: {q.answer}"}
    for q in world.closed_book(lesson.scaled(150, 8), seed, range(1, 101))
]
sources = {
    "60 from templates": template_rows(60, random.Random(seed + 1)),
    "60 drafts": drafts,
    "60 filtered": filtered,
}
data_scores, data_runs = {}, []
for name, rows in sources.items():
    rows = random.Random(seed).sample(rows, min(60, len(rows))) or template_rows(8, generator)
    model, history = fine_tune([encode(row) for row in rows], 20)
    data_scores[name] = accuracy(model, short_tests)
    data_runs.append(history)
    print(f"{name}: {data_scores[name]}")
print(cost(*data_runs))


# %% [markdown]
# **What you see.** All three sources work, because the ability is there already. The templates, which have five phrasings and no error, are at least as good as the model's own questions. Sampling adds phrasings and errors, and the filter takes most of the errors out. Self-instruct pays where nobody can write the templates.
#
# ## 6 · Quality against quantity
#
# **Question.** Is it better to have ten good examples or a thousand careless ones?
#
# Take the task *pairs*. In the noisy data half of the answers were given in haste: they name the first colour of the prompt, which is right by chance only. Train on 10 to 1,000 examples of each kind, always for the same 20 steps; only 1,000 examples get the 63 steps of one pass.

# %%
def careless(rows: list[Row], share: float) -> list[Row]:
    """The rows with a share of the answers given in haste: they name the first colour of the prompt."""
    generator, noisy = random.Random(seed), []
    for row in rows:
        first = row["instruction"].partition(". ")[2].partition(";")[0].split()[-1]
        *start, colour = row["answer"].split()
        hasty = generator.random() < share
        noisy.append(row | {"answer": " ".join([*start, first if hasty else colour])})
    return noisy


pool = training_rows(1000, ("pairs",), stream=4)
SIZES = [10, 30, 100, 1000]
quality, quality_runs = {}, []
for name, share in (("all right", 0.0), ("half of them in haste", 0.5)):
    results = []
    for size in SIZES:
        rows = careless(pool[: lesson.scaled(size, 4)], share)
        model, history = fine_tune([encode(row) for row in rows], max(20, math.ceil(size / 16)))
        results.append(accuracy(model, tests["pairs"]))
        quality_runs.append(history)
    quality[name] = results
    print(f"{name}: " + ", ".join(f"{size}: {r.accuracy:.0%}" for size, r in zip(SIZES, results, strict=True)))
print(cost(*quality_runs))

# %% tags=["headline"]
lines = {
    name: (SIZES, [r.accuracy for r in results], [r.low for r in results], [r.high for r in results])
    for name, results in quality.items()
}
alt = "Right answers over 10 to 1,000 examples: clean data rise to the top, hasty data mostly stay below."
figure = plots.curve(
    lines, title="Quality against quantity", xlabel="training examples", ylabel="right answers", log_x=True,
    percent=True, limits_y=(0, 1), alt=alt,
)  # fmt: skip
plots.show(figure)
clean, noisy = quality.values()
for size, good, bad in zip(SIZES, clean, noisy, strict=True):
    if size in (10, 1000):
        lesson.report(
            f"pairs, {size:,} examples, all right / half in haste", f"{good.accuracy:.0%} / {bad.accuracy:.0%}"
        )
lesson.claim(
    "30 right examples beat 1,000 half in haste by 10 points",
    clean[1].accuracy - noisy[-1].accuracy,
    at_least=0.1,
    form=".0%",
)
lesson.claim(
    "the more right examples, the better (1,000 against 10)",
    clean[-1].accuracy - clean[0].accuracy,
    at_least=0,
    form=".0%",
)

# %% [markdown]
# **What you see.** A few tens of right examples are enough for this task, and a thousand careless ones do not make up for them. These errors have a system, and in its longer training the model learns the system along with the task. (With 100 examples, read a few times, it may still prefer the rule that is always right: look at that point, and try another seed.) Errors without one average out, slowly, over many examples. Zhou et al. (2023) tuned a 65 B model on 1,000 chosen chats (*LIMA*) with the same lesson. The hard tasks of section 3 are different: sums and descriptions went on improving with more examples, because there the model still learns something.
#
# ## 7 · One task or many
#
# **Question.** What does a model that was tuned on one task do with the others? And what does one that was tuned on many do with a task that it has never seen?
#
# You have single-task models from above: one for *mood*, one for *sum*, one for *pairs*. Train one more on all tasks but *pairs*, and test all of them on everything.

# %%
others = tuple(task for task in CHAT_TASKS if task != "pairs")
all_but_pairs, history = fine_tune(
    [encode(row) for row in training_rows(lesson.scaled(16 * 40, 16), others, stream=5)], 40
)
print(cost(history))
specialists["all but pairs"], specialists["all six"] = all_but_pairs, assistant
transfer = {
    name: {task: accuracy(model, tests[task][: lesson.scaled(50, 4)]) for task in CHAT_TASKS}
    for name, model in specialists.items()
}
print(f"{'tuned on':>14} " + " ".join(f"{task:>9}" for task in CHAT_TASKS))
for name, results in transfer.items():
    print(f"{name:>14} " + " ".join(f"{results[task].accuracy:9.0%}" for task in CHAT_TASKS))

# %%
rows = tests["pairs"][: lesson.scaled(50, 4)]
replies = {name: answers_of(model, rows) for name, model in specialists.items()}
colour_named = {
    name: score(
        sum(row["answer"].split()[-1] in text.lower() for text, row in zip(texts, rows, strict=True)), len(rows)
    )
    for name, texts in replies.items()
}
for name, result in colour_named.items():
    print(f"{name:>14}: names the right colour in {result}, for example {replies[name][0]!r}")
alt = "How often each model names the right colour; pairs is a task that only two of them were trained on."
figure = plots.bars_with_intervals(
    colour_named, title="An unseen task: the right colour is in the answer", xlabel="answers", alt=alt
)
plots.show(figure)
lesson.report(
    "held-out task pairs, after all other tasks: exact / colour named",
    f"{transfer['all but pairs']['pairs'].accuracy:.0%} / {colour_named['all but pairs'].accuracy:.0%}",
)
away = [r.accuracy for name in ("mood", "sum", "pairs") for task, r in transfer[name].items() if task != name]
lesson.claim(
    "a specialist gets at most 10 % of another task exactly right, on average",
    sum(away) / len(away),
    at_most=0.1,
    form=".0%",
)


# %% [markdown]
# **What you see.** A specialist answers everything in the way of its one task: ask the *mood* model for a colour, and it tells you whether that is good or bad. The model that was tuned on five tasks does not solve the sixth either. It has learned five forms, and takes the unseen task for one of them. In FLAN (Wei et al. 2022) tuning on many tasks helped unseen ones only in large models, from dozens of tasks, and hurt in small ones. Do not expect an instruction-tuned small model to generalise: put the tasks that you need into the data.
#
# ## 8 · Which weights, and how fast
#
# **Question.** Must all weights move? And what does the model lose while it learns?
#
# Three ways to choose, each by *parameter groups*, lists of weights with a learning rate of their own:
#
# - **full**: all weights, one rate $\eta$;
# - **top layers only**: the last half of the layers and the last norm; all else is frozen;
# - **layer-wise decay** (Howard & Ruder 2018): all weights, but each layer gets $\xi$ times the rate of the layer above it, $\eta_\ell = \eta\,\xi^{L-1-\ell}$, since low layers hold what is general.

# %%
def depth_of(name: str, num_layers: int) -> int:
    """0 for the embeddings, 1 to L for the layers, L + 1 for the last norm and an output matrix of its own."""
    if ".layers." in name:
        return 1 + int(name.split(".layers.")[1].split(".")[0])
    return 0 if "embed" in name else num_layers + 1


def layer_groups(model: nn.Module, rate: float, decay: float = 1.0, lowest: int = 0) -> list[dict]:
    """Parameter groups, one a depth from `lowest` upwards; below it the weights are frozen."""
    num_layers = model.config.num_hidden_layers
    groups: dict[int, dict] = {}
    for name, parameter in model.named_parameters():
        depth = depth_of(name, num_layers)
        parameter.requires_grad_(depth >= lowest)
        if depth >= lowest:
            group_rate = rate * decay ** max(0, num_layers - depth)
            groups.setdefault(depth, {"params": [], "lr": group_rate, "depth": depth})["params"].append(parameter)
    return [groups[depth] for depth in sorted(groups)]


LAYERS = base.config.num_hidden_layers
WAYS = {
    "full": {},
    "layer-wise decay 0.5": {"decay": 0.5},
    "top half only": {"lowest": 1 + LAYERS // 2},
    "full, a tenth of the rate": {"rate": RATE / 10},
}
for name, way in WAYS.items():
    groups = layer_groups(copy.deepcopy(base), **{"rate": RATE, **way})
    total = sum(p.numel() for group in groups for p in group["params"])
    print(f"{name}: {total:,} of {base.num_parameters():,} weights are trained")
    for group in groups if LAYERS <= 8 else groups[:2] + groups[-2:]:
        place = {0: "embeddings", LAYERS + 1: "last norm"}.get(group["depth"], f"layer {group['depth']}")
        print(f"    {place:>10}: {sum(p.numel() for p in group['params']):9,} weights, rate {group['lr']:.1e}")

# %% [markdown]
# **Forgetting** is measured on the base model's own abilities, in the format of its documents, which none of the training chats has: known facts, reading, mappings, sums. Train 40 steps on *mood*, *sum* and *pairs* in each of the four ways.

# %%
from recipes.base_model import evaluate as evaluate_base

ABILITIES = ["closed_book_frequent", "open_book", "few_shot_8", "sums_with_steps"]


def abilities_of(model: nn.Module) -> float:
    """Mean accuracy over four abilities of the base model, in the documents' formats."""
    results = evaluate_base(model, tokenizer, seed=seed, n=lesson.scaled(25, 4))
    print("      " + ", ".join(f"{name} {results[name].accuracy:.0%}" for name in ABILITIES))
    return sum(results[name].accuracy for name in ABILITIES) / len(ABILITIES)


three = ("mood", "sum", "pairs")
examples = [encode(row) for row in training_rows(lesson.scaled(16 * 40, 16), three, stream=6)]
print("base model")
kept_abilities, learned = {"base model": abilities_of(base)}, {"base model": 0.0}
for name, way in WAYS.items():
    model, history = fine_tune(
        examples, 40,
        optimizer_fn=lambda model, way=way: torch.optim.AdamW(
            layer_groups(model, **{"rate": RATE, **way}), betas=(0.9, 0.95), weight_decay=0.0
        ),
    )  # fmt: skip
    model.requires_grad_(True)
    learned[name] = sum(accuracy(model, tests[task]).accuracy for task in three) / 3
    print(f"{name}: new tasks {learned[name]:.0%}, {cost(history)}")
    kept_abilities[name] = abilities_of(model)

# %%
points = {name: (kept_abilities[name], learned[name]) for name in kept_abilities}
alt = "New tasks learned over old abilities kept, one point for each way to train: those that learn more keep less."
figure = plots.pareto(
    points, title="Learning and forgetting after 40 steps", xlabel="old abilities kept (mean accuracy)",
    ylabel="new tasks (mean accuracy)", lower_x_is_better=False, alt=alt,
)  # fmt: skip
plots.show(figure)
for name in WAYS:
    lesson.report(f"{name}: new tasks / old abilities", f"{learned[name]:.0%} / {kept_abilities[name]:.0%}")
lesson.claim(
    "full fine-tuning loses at least 20 points of the old abilities",
    kept_abilities["base model"] - kept_abilities["full"],
    at_least=0.2,
    form=".0%",
)
lesson.claim(
    "layer-wise decay keeps at least 10 points more of them",
    kept_abilities["layer-wise decay 0.5"] - kept_abilities["full"],
    at_least=0.1,
    form=".0%",
)


# %% [markdown]
# **What you see.** Full fine-tuning at the full rate learns the new tasks and destroys much of the old, although no training chat contradicts it: the weights are shared. Layer-wise decay learns nearly as much in the same steps and loses less. Frozen lower layers protect as well, but not every task can be learned above them as fast. A tenth of the rate loses least and learns little in this time. The sums with steps suffer in all of them, perhaps since the new format for sums is closest to the old one and takes its place. Lesson 06 adds methods that change few weights, and lesson 14 mixes old text in.
#
# ## 9 · When to stop
#
# **Question.** With few examples, the training loss goes to zero. When is the model at its best?
#
# Watch the loss on chats that are not trained on, and keep the weights of the best moment. **Early stopping**: if the loss has not improved for some evaluations (the *patience*), end the training. The loop calls `evaluate` every few steps, and an exception from there ends it. First without stopping, to see what is missed; 40 examples, 60 steps.

# %%
class Stop(Exception):
    """Raised when the validation loss no longer improves."""


def fit_until_best(examples: list[dict], validation: list[dict], num_steps: int, patience: float, every: int = 5):
    """Train; return the model with its best weights, that at the end, the best step, and the loss at each look."""
    model, seen, best = copy.deepcopy(base), {}, {"loss": math.inf}

    def watch(model: nn.Module) -> dict[str, float]:
        loss, step = mean_loss(model, validation), every * (len(seen) + 1)
        seen[step] = loss
        if loss < best["loss"]:
            best.update(loss=loss, step=step, model=copy.deepcopy(model))
        if step - best["step"] >= patience * every:
            raise Stop
        return {"validation_loss": loss}

    try:
        fine_tune(examples, num_steps, model=model, evaluate=watch, evaluate_every=every, schedule="constant")
    except Stop:
        print(f"stopped after {max(seen)} steps, the best were the first {best['step']}")
    return best["model"].eval(), model.eval(), best["step"], seen


few = [encode(row) for row in training_rows(40, ("fact",), stream=7)]
watched = [encode(row) for row in unseen_rows(60, "fact", stream=8)]
best_model, last_model, best_step, seen = fit_until_best(few, watched, 60, patience=math.inf)
*_, seen_stopped = fit_until_best(few, watched, 60, patience=3)

# %%
curves = {
    "trained to the end": (list(seen), list(seen.values())),
    "patience 3": (list(seen_stopped), list(seen_stopped.values())),
}
alt = "The loss on unseen chats falls, has its minimum and rises again; the second run stops shortly after the minimum."
figure = plots.curve(
    curves, title="40 examples, again and again", xlabel="step", ylabel="loss on unseen chats (nats)", alt=alt
)
plots.show(figure)
by_loss, at_end = (accuracy(model, tests["fact"]) for model in (best_model, last_model))
lowest, end_loss = min(seen.values()), list(seen.values())[-1]
print(f"lowest loss {lowest:.2f} after {best_step} steps, {end_loss:.2f} after {max(seen)}")
print(f"right answers with the weights of step {best_step}: {by_loss}; at the end: {at_end}")
lesson.report("40 examples: lowest validation loss, and at the end", f"{lowest:.2f}, {end_loss:.2f}")
lesson.report("early stopping: steps trained", f"{max(seen_stopped)} of {max(seen)}")
lesson.claim(
    "the validation loss at the end is at least 10 % above its minimum", end_loss / lowest - 1, at_least=0.1, form=".0%"
)
lesson.claim(
    "early stopping saves at least a quarter of the steps", 1 - max(seen_stopped) / max(seen), at_least=0.25, form=".0%"
)


# %% [markdown]
# **What you see.** The loss on unseen chats has its minimum early, and early stopping finds it at a fraction of the steps. But look at the right answers: the model at the minimum of the loss need not be the one with the most right answers. The loss punishes a confident error without bound, exact match counts it once. So watch the measure that you care about, if you can afford it, and the loss if you cannot.
#
# ## 10 · Searching the settings, at a price
#
# **Question.** Learning rate, batch size, warm-up: which values, and what does it cost to find out?
#
# A grid of 4 values for each of 3 settings would be 64 trainings. **Random search** (Bergstra & Bengio 2012) draws settings at random, because usually one setting matters and the others hardly do; here with one learning rate from each eighth of the range, on a logarithmic scale. **Successive halving** (Jamieson & Talwalkar 2016) starts all of them with few steps, drops the worse half, doubles the steps, and so on. Choose by the loss on validation chats, never on the test.

# %%
def draw_settings(generator: random.Random, part: float) -> dict:
    """A learning rate at `part` (0 to 1) between 1/30 and 10 times the profile's; batch size; warm-up."""
    rate = 10 ** (-1.5 + 2.5 * part)
    return {"rate": rate, "batch_size": generator.choice([8, 16]), "warmup_steps": generator.choice([1, 3])}


generator = random.Random(f"search/{seed}")
candidates = [draw_settings(generator, (place + generator.random()) / 8) for place in range(8)]
search_rows = [encode(row) for row in training_rows(400, ("fact",), stream=9)]
runs, trials, num_steps, spent = dict(enumerate(candidates)), [], 5, []
while len(runs) > 1:
    losses = {}
    for number, chosen in runs.items():
        model, history = fine_tune(search_rows, num_steps, **chosen)
        losses[number] = mean_loss(model, watched)
        trials.append((num_steps, chosen["rate"] * RATE, losses[number]))
        spent.append(history)
    ranking = sorted(losses, key=losses.get)
    print(f"{num_steps:2} steps: " + ", ".join(f"{runs[n]['rate'] * RATE:.1e} -> {losses[n]:.2f}" for n in ranking))
    runs, num_steps = {number: runs[number] for number in ranking[: len(ranking) // 2]}, 2 * num_steps
winner = next(iter(runs.values()))
print(
    f"best: learning rate {winner['rate'] * RATE:.1e}, batch {winner['batch_size']}, warm-up {winner['warmup_steps']}"
)
print(f"the search: {cost(*spent)}")
full_cost = 8 * max(steps for steps, *_ in trials)
print(f"all 8 to the end would have been {full_cost} steps, a grid of 64 {8 * full_cost}")

# %%
lines = {}
for steps in sorted({steps for steps, *_ in trials}):
    points = sorted((rate, loss) for at, rate, loss in trials if at == steps)
    lines[f"{lesson.scaled(steps)} steps"] = ([rate for rate, _ in points], [loss for _, loss in points])
alt = "Validation loss over the learning rate after few, more and most steps: lowest near the profile's rate."
figure = plots.curve(
    lines, title="Successive halving over the learning rate", xlabel="learning rate",
    ylabel="validation loss (nats)", log_x=True, alt=alt,
)  # fmt: skip
plots.show(figure)
spent_steps = sum(len(history.losses) for history in spent)
first_losses = [loss for steps, _, loss in trials if steps == trials[0][0]]
lesson.report("hyperparameter search: steps spent, best rate", f"{spent_steps}, {winner['rate'] * RATE:.1e}")
lesson.claim(
    "settings matter: the worst first loss is at least 1.5 times the best",
    max(first_losses) / min(first_losses),
    at_least=1.5,
    form=".2f",
)


# %% [markdown]
# **What you see.** The learning rate decides nearly everything, over three orders of magnitude. What batch size and warm-up do, eight draws cannot tell. Short runs favour high rates: a run ten times as long wants a lower one, so search with runs that are not too short, or do not trust the last factor of two.
#
# ## 11 · The order of steps
#
# **Question.** You have a new task. What do you do first?
#
# 1. **State the task** and how an answer is judged. Write the test first.
# 2. **A few data**: 20 examples, made by hand or by templates.
# 3. **A small model**, so that an error costs seconds. Does the whole chain run?
# 4. **Evaluate**, and read wrong answers.
# 5. **More data**, where the errors are.
# 6. **A larger model**, last, when data no longer help.
#
# Go through it with two tasks of different kinds. A task to *read*: say whether a review is good or bad. A task to *write*: write out a sum with its steps. The judge differs as well. Reading is right or wrong, but a text can be partly right: count its right steps.
#
# The small model is the base model without its upper half of layers.

# %%
def lower_half(model: nn.Module) -> nn.Module:
    """A copy with only the first half of the layers."""
    small = copy.deepcopy(model)
    small.config.num_hidden_layers = math.ceil(LAYERS / 2)
    if getattr(small.config, "layer_types", None):
        small.config.layer_types = small.config.layer_types[: small.config.num_hidden_layers]
    small.model.layers = small.model.layers[: small.config.num_hidden_layers]
    return small


def right_steps(answer: str, right: str) -> float:
    """Share of the steps of the right answer that stand at the same place in the answer."""
    wanted, given = (text.rstrip(".").replace(". ", "; ").split("; ") for text in (right, answer))
    return sum(step == own for step, own in zip(wanted, given, strict=False)) / len(wanted)


def judge(model: nn.Module) -> dict[str, float]:
    """Step 1, the test: exact match for reading, share of right steps for writing."""
    written = answers_of(model, write_tests)
    shares = [right_steps(text, row["answer"]) for text, row in zip(written, write_tests, strict=True)]
    return {"read": accuracy(model, read_tests).accuracy, "write": sum(shares) / len(shares)}


read_tests, write_tests = tests["mood"], tests["sum"][: lesson.scaled(50, 4)]
print(right_steps("20 + 35 = 55; 55 + 7 = 72. The sum is 62.", "20 + 35 = 55; 55 + 7 = 62. The sum is 62."))

# %%
order_rows = training_rows(lesson.scaled(16 * 30, 40), ("mood", "sum"), stream=10)
LADDER = {
    "small model, 20 examples": (lower_half, 20),
    "small model, 480 examples": (lower_half, 480),
    "whole model, 20 examples": (copy.deepcopy, 20),
    "whole model, 480 examples": (copy.deepcopy, 480),
}
ladder, ladder_runs = {}, {}
for name, (make, number) in LADDER.items():
    examples = [encode(row) for row in order_rows[:number]]
    model, history = fine_tune(examples, 30, model=make(base))
    ladder[name], ladder_runs[name] = judge(model), history
    print(f"{name}: read {ladder[name]['read']:.0%}, write {ladder[name]['write']:.0%}; {cost(history)}")
    wrong = [row for row, good in zip(write_tests, right_of(model, write_tests), strict=True) if not good]
    if wrong:  # step 4: read what went wrong
        print(f"    right: {wrong[0]['answer']}\n    wrote: {answers_of(model, wrong[:1])[0]}")
    lesson.report(f"{name}: read / write", f"{ladder[name]['read']:.0%} / {ladder[name]['write']:.0%}")
small_few, small_many, whole_few, whole_many = ladder.values()
lesson.claim(
    "with many examples the whole model writes better than the small one",
    whole_many["write"] - small_many["write"],
    at_least=0,
    form=".0%",
)
lesson.claim(
    "more data help the whole model to write", whole_many["write"] - whole_few["write"], at_least=0.001, form=".1%"
)


# %% [markdown]
# **What you see.** Step 3 was worth its few seconds: the small model shows that the chain runs. On the task to read, 20 examples go a long way, and more of them do not help in the same 30 steps: there, steps are scarce and not data. On the task to write, 20 examples give the form and hardly a right step: the wrong answers show sums that belong to other numbers, learned by heart. More data cure that in the whole model and not in the small one, which cannot add. So each step tells you what the next one should be: first the form, then the data, then the size.
#
# ## Exercises

# %% tags=["exercise"]
# Exercise 5.1, easy: a chat of several turns.
def encode_turns(turns: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Token ids and labels of a chat of (role, text) turns, where role is "system", "user" or "assistant".

    Each turn is OPEN + role + CLOSE + text + END. Learned is what the assistant says in *every* one of its turns, END
    included, and neither the marks before it nor anything else. Turn each part into tokens separately.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_encode_turns(encode_turns):
    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    said = [
        ("system", "Be brief."),
        ("user", "Who?"),
        ("assistant", "Ada."),
        ("user", "Where?"),
        ("assistant", "Dodo."),
    ]
    for number in (3, 5, 2):
        expected = {"input_ids": [], "labels": []}
        for role, text in said[:number]:
            head, tail = ids(OPEN + role + CLOSE), ids(text + END)
            learned = tail if role == "assistant" else [-100] * len(tail)
            expected["input_ids"] += head + tail
            expected["labels"] += [-100] * len(head) + learned
        found = encode_turns(said[:number])
        expect_equal(
            f"the text of {number} turns", tokenizer.decode(found["input_ids"]), tokenizer.decode(expected["input_ids"])
        )
        expect_equal(f"the labels of {number} turns", found["labels"], expected["labels"])


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

    `losses[k]` holds the loss of each learned token of part k, a tensor (number of learned tokens,); a part may have
    none. Return the value that `sft_loss` gives for all parts in one batch. (Many libraries returned the mean of the
    parts' means until 2024. When is that the same?)
    """
    raise NotImplementedError


# %% tags=["check"]
def check_accumulated_loss(accumulated_loss):
    examples = [encode(row) for task in ("mood", "sum", "fact") for row in tests[task][:2]]
    whole = collate(examples, tokenizer.pad_token_id)
    parts = [collate(examples[start : start + 2], tokenizer.pad_token_id) for start in (0, 2, 4)]
    with torch.no_grad():
        expected = sft_loss(base, {name: tensor.to(base.device) for name, tensor in whole.items()}).cpu()
    losses = [losses_of(base, part).cpu() for part in parts]
    expect_close("accumulated_loss of three parts", accumulated_loss(losses), expected, 1e-3)
    expect_close("accumulated_loss with an empty part", accumulated_loss([*losses, torch.zeros(0)]), expected, 1e-3)
    expect_close("accumulated_loss of one part", accumulated_loss(losses[:1]), losses[0].mean(), 1e-4)


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
# Exercise 5.3, medium: has the test leaked into the training data?
def contaminated(train_texts: list[str], test_texts: list[str], n: int = 5) -> list[int]:
    """Indices of the test texts that share a run of n words with any training text, in rising order.

    Words are what `str.split` gives, in lower case. A test text of fewer than n words is contaminated if all its words
    stand in a row in a training text. It must stay fast with 20,000 texts: look pieces up, do not compare all pairs.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_contaminated(contaminated):
    train_texts = ["The home of Dufasu is in the town of Kela .", "one two three", "a b c d e"]
    cases = [
        (["the HOME of dufasu is", "home of dufasu is in the", "in the town of Bela .", "of Kela ."], [0, 1, 3]),
        (["one two", "two one", "three one two three four", "x a b c d e"], [0, 3]),
        (["one two three a b"], []),
    ]
    for test_texts, expected in cases:
        expect_equal(f"contaminated(train_texts, {test_texts})", contaminated(train_texts, test_texts), expected)
    expect_equal("with n = 3", contaminated(train_texts, ["x one two three", "two three a"], 3), [0])
    generator = random.Random(1)
    texts = [" ".join(str(generator.randrange(10**6)) for _ in range(12)) for _ in range(20_000)]
    started = time.perf_counter()
    expect_equal(
        "20,000 texts against 20,000 others", contaminated(texts[:-1], [*texts[::-1]][:1] + texts[:3]), [1, 2, 3]
    )
    found = contaminated(texts, [text[::-1] for text in texts])
    expect_equal("texts read backwards", found, [])
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
def noisy_embeddings(embeddings: Tensor, lengths: Tensor, alpha: float, generator: torch.Generator) -> Tensor:
    """NEFTune (Jain et al. 2023): embeddings (batch, seq, hidden) with uniform noise, for training only.

    Row b has `lengths[b]` real tokens; the rest is padding and stays as it is. Each number of a real token gets noise
    drawn from [-s, s] with s = alpha / sqrt(lengths[b] * hidden). The argument must not change. Draw from `generator`.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_noisy_embeddings(noisy_embeddings):
    embeddings, lengths = torch.ones(3, 50, 64), torch.tensor([50, 10, 1])
    noisy = noisy_embeddings(embeddings, lengths, 5.0, torch.Generator().manual_seed(1))
    expect_true("the argument stays as it is", (embeddings == 1).all())
    expect_shape("noisy_embeddings(...)", noisy, (3, 50, 64))
    for row, length in enumerate(lengths.tolist()):
        noise, bound = noisy[row] - 1, 5.0 / math.sqrt(length * 64)
        expect_true(f"padding of row {row} stays", (noise[length:] == 0).all())
        expect_true(f"noise of row {row} is within {bound:.3f}", noise[:length].abs().max() <= bound * 1.0001)
        expect_close(f"standard deviation in row {row}", noise[:length].std() / (bound / math.sqrt(3)), 1.0, 0.2)
        expect_close(f"mean in row {row}", noise[:length].mean() / bound, 0.0, 0.25)
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
    """At most 40 of the 300 rows, four in five of which were answered in haste; nobody tells you which.

    The base model is tuned on your choice for 20 steps and must then be right on at least 90 % of the unseen pairs.
    A row has "instruction" and "answer". What can you check without knowing the world? You may also ask the model.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_choose(choose):
    rows = careless(pool[:300], 0.8)
    chosen = choose([dict(row) for row in rows])
    expect_true(f"{len(chosen)} rows are chosen, at most 40 and at least 1", 1 <= len(chosen) <= 40)
    expect_true("the chosen rows are unchanged", all(row in rows for row in chosen))
    model, _ = fine_tune([encode(row) for row in chosen], 20)
    result = accuracy(model, tests["pairs"])
    expect_true(f"right answers to unseen pairs, {result.accuracy:.0%}, are at least 90 %", result.accuracy >= 0.9)


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
chats = instruction_dataset(chats_id or machine, lesson.scaled(160, 16), seed=seed).to_list()
fitting = [row for row in chats if len(encode(row)["input_ids"]) <= 512]
train_chats, test_chats = fitting[len(fitting) // 5 :], fitting[: len(fitting) // 5]
assert all(any(label != -100 for label in encode(row)["labels"]) for row in fitting)
arguments = SFTConfig(
    output_dir=str(ROOT / "build" / "05_supervised_fine_tuning" / "practice"), max_steps=lesson.scaled(12),
    max_length=512, per_device_train_batch_size=8, learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=2,
    assistant_only_loss=True, weight_decay=0.0, packing=False, logging_steps=4, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=CPU, seed=seed,
    bf16=lesson.precision == "bf16-mixed", fp16=lesson.precision == "fp16-mixed",
)  # fmt: skip
trainer = SFTTrainer(
    copy.deepcopy(base), arguments, train_dataset=messages_of(train_chats), processing_class=tokenizer,
    eval_dataset=messages_of(test_chats),
)  # fmt: skip
trainer.remove_callback(PrinterCallback)
before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
print(f"{len(train_chats)} chats, loss on {len(test_chats)} others: {before:.2f} -> {after:.2f}")
lesson.claim(
    "twelve steps lower the loss on other chats by at least a third", 1 - after / before, at_least=1 / 3, form=".0%"
)

# %% [markdown]
# To keep the result: `trainer.save_model(folder)`; the tokenizer is saved with it, chat template included, so that everybody who loads it writes chats in the same way. The course's own assistant, `data/shima-4m-assistant`, was made by `python -m recipes.assistant build`, the same method with more steps.
#
# **What is different at scale**
#
# | here | a model of billions of parameters |
# |---|---|
# | six tasks made by a program | hundreds of tasks, human and synthetic, from a thousand (LIMA) to millions of chats |
# | all weights, in 32 bits | often LoRA (lesson 06), or all weights sharded over GPUs (lesson 11); what fits is arithmetic (lesson 07) |
# | learning rate 1e-3 | 1e-5 to 2e-5 for all weights, about ten times as much for LoRA |
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
# - Howard & Ruder 2018, *Universal Language Model Fine-tuning for Text Classification* (arXiv:1801.06146): layer-wise rates, gradual unfreezing.
# - McCloskey & Cohen 1989, *Catastrophic Interference in Connectionist Networks*; Luo et al. 2023, *An Empirical Study of Catastrophic Forgetting in Large Language Models During Continual Fine-tuning* (arXiv:2308.08747).
# - Bergstra & Bengio 2012, *Random Search for Hyper-Parameter Optimization*; Jamieson & Talwalkar 2016, *Non-stochastic Best Arm Identification and Hyperparameter Optimization* (arXiv:1502.07943).
# - Jain et al. 2023, *NEFTune* (arXiv:2310.05914).
# - Allal et al. 2025, *SmolLM2: When Smol Goes Big* (arXiv:2502.02737): SmolTalk.
