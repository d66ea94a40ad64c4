# %% [markdown]
# # 17 · The competition: from a rubric to a rank you can trust
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/17_competition.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/17_competition.ipynb)
#
# In the last lesson of many courses the students compete: everybody tunes the same small model, answers the same open tasks, and is ranked. This lesson is a whole entry, from the rubric to the folder that is handed in. You write the grader of three kinds of task before you train anything, score two bases, train a LoRA that you wrote yourself on one of them, look at one setting of decoding, and run DPO carelessly and with care. The score goes down after the careless one; you look for the reason in the log-probabilities, in runs that differ in one thing each, and against a baseline that needs no DPO. At the end you measure how sure a rank is, and how far a board can be climbed without a better model.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write out how open answers of three kinds are graded from 1 to 5 by program, equal to the competition's rubric, and measure what fixed or copied answers get;
# 2. train an adapter with a LoRA of your own, save it, and get the same answers from `peft`;
# 3. see what a copied repetition penalty does to the score, lower it by a careless DPO, and change pairs, steps and rate one at a time, beside an imitation that needs no rejected answers;
# 4. train a judge on the choices of people with a bias, and measure what it has learned from them;
# 5. put an interval around your rank, climb a board without a better model, and hand in a folder that is checked, scored and reproduced by the competition's own commands, beside a forged one.
#
# **Prerequisites:** lessons 05, 06 and 09. All that is needed from them is repeated in a sentence or two.
#
# **The task** is about Shima, a made-up island. **The two bases** come with the course: *shima-4m*, a small Llama that has only read texts, and *shima-4m-assistant*, which also answers a few kinds of instruction. On a GPU the same cells tune an open hub model. How an instructor runs the competition is said in `docs/competition.md`.
#
# | symbol | meaning |
# |---|---|
# | $g_i$, $\bar g$ | the grade of the answer to task $i$, from 1 to 5; the mean over tasks, which is the score |
# | $W$, $A$, $B$, $r$, $\alpha$ | a frozen matrix of the base; the two factors of its update, of rank $r$; the factor $\alpha / r$ of the update |
# | $z_v$, $\theta$ | the logit of token $v$; the repetition penalty |
# | $h_w$, $h_l$ | by how much the log-probability of the chosen (rejected) answer has grown since the reference |
# | $\beta$, $\sigma$ | the strength of DPO; the logistic function |

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
model_id = ""  # another assistant: a hub id, or a folder in hub format
seed = 0
budget = 1.0  # share of all training steps and tasks; the lesson's claims are asserted from 1.0 on

# %%
import copy
import json
import random
import re
import warnings
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score
from torch import Tensor, nn
from transformers import RepetitionPenaltyLogitsProcessor

# %%
from helpers import plots
from helpers.chat import chat_prompt, encode_chat
from helpers.data import PaddedBatches, collate, load_rows
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import answer_instructions, token_log_probs
from helpers.hub import hub_is_reachable
from helpers.lesson import Lesson, show_table
from helpers.models import MODEL_FOLDERS, load_assistant, load_model
from helpers.open_tasks import (
    KINDS,
    Decoding,
    Recipe,
    Task,
    answer_tasks,
    base_sha256,
    grade,
    hidden_tasks,
    make_tasks,
    public_tasks,
    write_submission,
)  # fmt: skip
from helpers.open_tasks.language import known_words
from helpers.open_tasks.statements import false_sentences, without
from helpers.training import TrainConfig, train
from helpers.world import FILLERS, POLITE

# %%
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft asks by an old name
lesson = Lesson("17", profile, model_id, seed, budget, uses="assistant")
machine = lesson.machine
# All that depends on the hardware: the learning rates of fine-tuning and of careful DPO, the number format, and how
# many answers are measured, and pairs trained on, in one pass. (The vocabulary of a hub model is a hundred times that
# of shima-4m: the logits of one answer take as much more. On a CPU 16 bits are slower for batches as small as here.)
SETTINGS = {
    "cpu": {"rate": 2e-3, "careful_rate": 2e-4, "precision": "fp32", "measured": 16, "pairs": 4},
    "t4": {"rate": 2e-4, "careful_rate": 2e-5, "precision": lesson.precision, "measured": 4, "pairs": 1},
    "large": {"rate": 2e-4, "careful_rate": 2e-5, "precision": lesson.precision, "measured": 4, "pairs": 2},
}
settings = SETTINGS[machine.name]
IN_16_BITS = settings["precision"] != "fp32"

# %% [markdown]
# `lesson.scaled` makes a number of steps or tasks smaller on a smaller budget. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.
#
# Two rules hold for all claims that compare two models. A difference counts from **0.3 points** on. That is about what 100 tasks can find: section 8 computes 0.16, 0.27 and 0.37 points for three pairs of systems. And every training below is **one run**; the course's ledger of claims (a page of its site, and `data/claims.json`) repeats all of them with four other seeds.

# %% [markdown] tags=["core"]
# ## 1 · The rules, the tasks and the rubric
#
# **Question.** What is a good answer worth, and can a program say so?
#
# The rules are short. You get 100 *public* tasks. You may train on anything but them. You hand in weights and settings, never code, and the ranking is by *hidden* tasks that come from a secret of the instructor. So it is no use to know the public answers by heart.
#
# There are ten kinds of task. They are *open*: many different answers are right.

# %%
tasks = public_tasks()[: lesson.scaled(100, 20)]
kinds = np.array([task.kind for task in tasks])
for task in tasks[: len(KINDS)]:
    print(f"{task.kind:>9}: {task.input.splitlines()[0][:74]}")
shown = tasks[KINDS.index("extract")]
print(f"\nthe task of the kind {shown.kind}, whole:\n{shown.input}")
print(f"\nits reference, an answer of five points:\n{shown.reference}")
print(f"\nwhat it is graded by:\n{shown.aspects}")

# %% [markdown]
# **The points** follow the guideline of ELYZA-tasks-100, a Japanese set of open tasks (ELYZA, Inc. 2023): 1 wrong, 2 wrong but in the right direction, 3 partly right, 4 right, 5 right and helpful. What that means differs from kind to kind. Here it is for three of the ten; `helpers/open_tasks/grading.py` holds all. `sound` is the answer without its false sentences: only what is true earns points. `whole` is all of it: what is wrong costs points even beside something true.

# %%
def mentions(text: str, word: str) -> bool:
    """Whether the word stands in the text, not as a part of another word."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def points_list(key: dict, sound: str, whole: str) -> int:
    right = sum(mentions(sound, name) for name in key["names"])
    wrong = sum(mentions(whole, name) for name in key["others"])
    if right == len(key["names"]) and wrong == 0:
        return 5
    return 3 if right > wrong else 2 if right else 1


def points_extract(key: dict, sound: str, whole: str) -> int:
    lines = {line.strip() for line in sound.split("\n")}
    right = sum(f"{relation}: {value}" in lines for relation, value in key["pairs"].items())
    if right == len(key["pairs"]):
        return 5 if len(whole.split("\n")) == right else 4
    if 2 * right >= len(key["pairs"]):
        return 3
    return 2 if right or all(mentions(sound, value) for value in key["pairs"].values()) else 1


# %%
def points_sum(key: dict, sound: str, whole: str) -> int:
    numbers = re.findall(r"\bis (\d{1,6})\b", sound) or re.findall(r"\b\d{1,6}\b", sound)
    steps = sum(step in sound for step in key["steps"])
    if not numbers:
        return 1
    if int(numbers[-1]) == key["sum"]:
        return 5 if steps == len(key["steps"]) else 4
    if 2 * steps >= len(key["steps"]):
        return 3
    return 2 if abs(int(numbers[-1]) - key["sum"]) <= 10 else 1


POINTS = {"list": points_list, "extract": points_extract, "sum": points_sum}

# %% [markdown]
# **The deductions** are the same for all kinds: a point less for unnatural language, one for a false statement, and one for an answer that is much longer than it needs to be. (The first two are in the guideline; the third is the course's own.) A sentence is false if it contradicts what is known about a person, or says about somebody in the task what the task does not tell. A polite opening neither costs nor earns anything.
#
# Three functions are the competition's own and are used here as they are: `known_words()` is the list of words that may occur, `false_sentences(task, text)` gives the sentences that are false, and `without(text, sentences)` takes sentences out of a text.

# %%
def split_sentences(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]


def unnatural(task: Task, text: str) -> bool:
    """Foreign characters or words, the task repeated, a sentence twice, or a sentence without an end."""
    words, asked = ({word.lower() for word in re.findall("[A-Za-z]+", part)} for part in (text, task.input))
    sentences = split_sentences(text)
    unended = task.kind != "extract" and not all(part.endswith((".", "!", "?")) for part in sentences)
    repeats = task.input in text or len(set(sentences)) < len(sentences)
    return not text.isascii() or bool(words - asked - known_words()) or repeats or unended


def my_grade(task: Task, answer: str) -> int:
    """1 to 5 points for any text."""
    whole = answer.strip().removeprefix(POLITE)
    false = set(false_sentences(task, whole))
    points = POINTS[task.kind](task.key, without(whole, false), whole)
    too_long = len(whole) > 2 * len(task.reference) + 60
    return max(1, points - unnatural(task, whole) - too_long - bool(false))

# %% [markdown]
# Compare with the competition's `grade` on all public tasks of the three kinds and on as many new ones, for answers that are right, wrong, cut off, doubled, polite, padded, or another task's. Where both give the same number for all of them, your rubric gives what theirs gives on these answers. (Both use the same `known_words` and `false_sentences`, so these two are not tested.)

# %%
mine = [task for task in public_tasks() + hidden_tasks("a rehearsal", 10) if task.kind in POINTS]
differ, spread = 0, []
for task, other in zip(mine, mine[3:] + mine[:3], strict=True):  # the kinds come in turn: `other` is of the same kind
    right = task.reference
    for answer in (
        right, other.reference, right[: len(right) // 2], f"{right} {right}", POLITE + right, right + FILLERS[0] * 4,
        f"{right} {task.key}", right.replace("1", "2"), right.replace(" and", "\nand"), task.input, "Yes.", "",
    ):  # fmt: skip
        found = grade(task, answer).points
        differ += my_grade(task, answer) != found
        spread.append(found)
print(f"{len(spread)} answers; how many of them got 1 to 5 points: {np.bincount(spread, minlength=6)[1:].tolist()}")
lesson.equal("the rubric written out is the competition's, on three kinds", differ)

# %% [markdown]
# **Can it be cheated?** What does this rubric give without reading the task? Try what a lazy student would try.

# %%
def graded(tasks: Sequence[Task], answers: Sequence[str]) -> np.ndarray:
    """Points of each answer (tasks,)."""
    return np.array([grade(task, answer).points for task, answer in zip(tasks, answers, strict=True)])


others = tasks[len(KINDS) :] + tasks[: len(KINDS)]  # of the same kind, since the kinds come in turn
ignoring = {
    "nothing": [""] * len(tasks),
    "always: Yes.": ["Yes."] * len(tasks),
    "always: The text does not say.": ["The text does not say."] * len(tasks),
    "the task itself": [task.input for task in tasks],
    "the reference of another task of the kind": [task.reference for task in others],
}
worth = {name: graded(tasks, answers).mean() for name, answers in ignoring.items()}
for name, mean in worth.items():
    print(f"{name:>42}: {mean:.2f}")
right = graded(tasks, [task.reference for task in tasks]).mean()
print(f"{'the reference of the task':>42}: {right:.2f}")

# %% [markdown]
# None of them gets far. A better cheat knows the *kind* of a task (here it is simply given), and has one fixed answer for it, or copies a line or the names. (Its fixed words, such as *Bad.*, were chosen with an eye on the public tasks, so it is tried on new ones as well.)

# %%
FIXED = {"mood": "Bad.", "compare": "No.", "unknown": "The text does not say."}


def unread(task: Task) -> str:
    """One fixed answer for the kind of the task, or a piece that is copied from it."""
    lines = task.input.split("\n")
    if task.kind in ("evidence", "extract"):
        return lines[1]
    if task.kind == "list":
        return " and ".join(dict.fromkeys(re.findall(r"[A-Z]\w{3,}", " ".join(lines[1:-1])))) + "."
    if task.kind == "story":
        return task.input.removeprefix("Write three sentences about ")
    return FIXED.get(task.kind, "Yes.")


floor = graded(tasks, [unread(task) for task in tasks])
fresh = hidden_tasks("a rehearsal", 30)
on_fresh = graded(fresh, [unread(task) for task in fresh]).mean()
print(f"fixed or copied, by kind: {floor.mean():.2f} on the public tasks, {on_fresh:.2f} on {len(fresh)} new ones")
print(", ".join(f"{kind} {floor[kinds == kind].mean():.1f}" for kind in KINDS))
lesson.report("score of an answer that is fixed or copied for each kind", floor.mean(), ".2f")

# %% [markdown]
# **What you see.** Fixed or copied answers get 2.09 points, and 2.01 on new tasks; on `evidence`, `unknown` and `story` about three. So a mean of 2 does not show that a model has read the tasks. These answers come back as the last row of the tables below, *fixed or copied*. Before you trust a rubric of your own, try such answers on it.

# %% [markdown] tags=["core"]
# ## 2 · Baselines
#
# **Question.** What is the score before any training?
#
# Three attempts cost no training: the base as it is, the base with two worked examples of the task's own kind in front of it, and the assistant as it is. Answers are decoded greedily, by the competition's own `answer_tasks`. `Decoding` holds the settings that are handed in.
#
# **The choice of a base.** On a CPU both models are the course's own. With the profile `t4` or `large` the same cells take Qwen2.5-0.5B or -1.5B and the *Instruct* model of that size, each at the commit that is printed, so that everybody starts from the same weights. Another one goes in as `model_id = "owner/name@commit"`, for instance `Qwen/Qwen3-0.6B-Base@da87bfb608c14b7cf20ba1ce41287e8de496c0cd`; it is then base and assistant at once. A tokenizer without a chat format gets a plain one.

# %%
PLAIN_CHAT = (
    "{% for turn in messages %}{{ '### ' + turn['role'] + '\n' + turn['content'] }}"
    "{{ eos_token if turn['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)  # for a tokenizer without a chat format, as that of a hub model which has only read texts
base, tokenizer = load_model(machine)
assistant, tokenizer = load_assistant(machine)
tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT
for role, name, revision in (
    ("base", machine.model_id, machine.revision),
    ("assistant", machine.assistant_id, machine.assistant_revision),
):
    where = "of this course" if name in MODEL_FOLDERS else f"commit {revision}" if revision else "no commit given"
    print(f"{role}: {name.split('/')[-1]}, {where}")


def answers_of(model: nn.Module, asked: Sequence[Task], decoding: Decoding | None = None) -> list[str]:
    """Answers of a model; on the CPU in 32 bits, so that they come out the same everywhere."""
    with lesson.autocast(IN_16_BITS):
        return answer_tasks(model, tokenizer, [task.input for task in asked], decoding or Decoding())


# %%
examples = make_tasks("worked examples", 2, held_out=False)  # two of each kind
with_examples = np.zeros(len(tasks), dtype=int)
for kind in KINDS:
    worked = [f"Question: {task.input}\nAnswer: {task.reference}\n\n" for task in examples if task.kind == kind]
    two_shots = Decoding(template="".join(worked) + "Question: {input}\nAnswer:", stop=("\n\n", "Question:"))
    asked = [task for task in tasks if task.kind == kind]
    with_examples[kinds == kind] = graded(asked, answers_of(base, asked, two_shots))
results = {  # name -> grades of its answers to the public tasks
    "base": graded(tasks, answers_of(base, tasks)),
    "base, two examples": with_examples,
    "assistant": graded(tasks, answers_of(assistant, tasks)),
}
del base  # not needed any more


# %%
def by_kind(grades: np.ndarray, kinds: np.ndarray = kinds) -> list[str]:
    """Mean grade, of all tasks and of each kind."""
    return [f"{grades.mean():.2f}"] + [f"{grades[kinds == kind].mean():.1f}" for kind in KINDS]


def show_kinds(names: Sequence[str]) -> None:
    """A table of results by kind, above that of the fixed or copied answers."""
    table = {name: by_kind(results[name]) for name in names} | {"fixed or copied": by_kind(floor)}
    show_table(table, ["all", *KINDS])


show_kinds(list(results))
lead = (results["assistant"] - results["base"]).mean()
lesson.report("the assistant's lead over the base, before any training here (points)", lead, ".2f")

# %% [markdown]
# **What you see.** The table by kind says more than the mean: look at it after every change. In its mean the assistant is 0.26 points ahead of fixed or copied answers (2.35 against 2.09). By kind it is ahead by 1.5 points or more in `fact`, `describe`, `sum` and `mood`, and behind in the six others. The base stays at 1.04, and at 1.26 with two examples.
#
# The rest of the lesson tunes the assistant. This choice rests on the score *before* training. Whether the base would catch up with the same training is not measured here; whoever competes tries that on development tasks (section 3). All numbers in the text are those of the course's own models; with a hub model you read your own.

# %% [markdown] tags=["core"]
# ## 3 · Training data
#
# **Question.** What do you train on, and is it clean?
#
# `make_tasks(seed, held_out=False)` gives as many tasks as you like with their references. They share the ten kinds with the public tasks, but not the names, numbers and combinations, and in part not the words of the questions. The rules forbid that a public task stands in your data, word for word, and the competition looks for it. Look yourself, before somebody else does: count the public tasks whose every run of eight words stands in one row.

# %%
rows = make_tasks(f"train/{seed}", lesson.scaled(100, 4), held_out=False)


def word_runs(text: str, length: int = 8) -> set[tuple[str, ...]]:
    """All runs of so many words, in small letters."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(max(1, len(words) - length + 1))}


def contained(asked: Sequence[Task], texts: Sequence[str]) -> int:
    """How many tasks stand whole in one of the texts."""
    wanted, found = [word_runs(task.input) for task in asked], [word_runs(text) for text in texts]
    return sum(any(task <= row for row in found) for task in wanted)


texts = [row.input for row in rows]
leaked = texts + [task.input for task in tasks[:7]]  # what a leak would look like
reworded = texts + [re.sub(r"((?:\S+ ){5})", r"\1please ", task.input) for task in tasks[:7]]
clean, planted = contained(tasks, texts), contained(tasks, leaked)
print(f"{len(rows)} rows, {len(set(texts))} of them different; public tasks that stand in them: {clean}")
print(f"with seven public tasks among the rows it finds {planted}; with *please* after every fifth word of the seven, "
      f"{contained(tasks, reworded)}")  # fmt: skip
lesson.equal("no public task stands in the training rows", clean)
lesson.equal("the seven that were planted are found", abs(planted - clean - 7))

# %% [markdown]
# The search finds only word-for-word copies; a leak that was reworded passes. So the ranking does not rest on this search, but on hidden tasks.
#
# The rows hold each kind equally often. That is a choice, too: where points are lacking, more rows may help.
#
# Choices need tasks of their own. *Development* tasks are training tasks that are in no row: what this lesson compares from here on in order to choose, it compares on them. (Rates, numbers of steps and $\beta$ were set without them.) Who chooses by the public tasks can no longer trust the score there (section 9).

# %%
taken = {row.input for row in rows}
development = [
    task for task in make_tasks(f"development/{seed}", lesson.scaled(6, 2), held_out=False) if task.input not in taken
]
dev_kinds = np.array([task.kind for task in development])
print(f"{len(development)} development tasks")

# %% [markdown] tags=["core"]
# ## 4 · An adapter: train, save, reload
#
# **Question.** How do you hand in a tuned model in less than two megabytes?
#
# LoRA (Hu et al. 2022) leaves each matrix $W$ of the base as it is, and learns an update of low rank beside it:
#
# $$y = W x + \frac{\alpha}{r} B A x, \qquad A \in \mathbb{R}^{r \times \text{in}}, \quad B \in \mathbb{R}^{\text{out} \times r}$$
#
# $B$ begins at zero, so the first step starts from the base itself. Only $A$ and $B$ are trained, and only they are handed in.

# %%
class LoRA(nn.Module):
    """A frozen linear layer with a trained update of rank `rank` beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        bound = linear.in_features**-0.5
        factors = {"device": linear.weight.device, "dtype": torch.float32}  # whatever the format of the base
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, **factors).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank, **factors))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, in_features)
        return self.linear(x) + F.linear(F.linear(x, self.a), self.b) * self.scale


# %%
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32


def with_lora(start: nn.Module) -> nn.Module:
    """A copy of a model that is frozen but for a new adapter at every linear layer in its blocks."""
    torch.manual_seed(seed)
    copied = copy.deepcopy(start).requires_grad_(False)
    for name, module in list(copied.named_modules()):
        if name.endswith(LAYERS):
            parent, _, last = name.rpartition(".")
            setattr(copied.get_submodule(parent), last, LoRA(module, RANK, ALPHA))
    return copied

# %% [markdown]
# The loss is taken over the answer only, as in lesson 05. The rate warms up over a twentieth of the steps and then falls along a line.

# %%
BATCH_SIZE = 4


def fine_tuned(start: nn.Module, rows: Sequence[Task], steps: int) -> nn.Module:
    """The model with an adapter trained on the rows."""
    encoded = [encode_chat(tokenizer, row.input, row.reference) for row in rows]
    config = TrainConfig(
        steps, settings["rate"], warmup_steps=max(1, steps // 20), schedule="linear", weight_decay=0.0,
        precision=settings["precision"], progress=False, seed=seed,
    )  # fmt: skip
    tuned = with_lora(start)
    batches = PaddedBatches(encoded, BATCH_SIZE, tokenizer.pad_token_id, seed=seed)
    losses = train(tuned, batches, config).losses
    print(f"{steps} steps of {BATCH_SIZE} rows, loss {np.mean(losses[:10]):.2f} -> {np.mean(losses[-10:]):.2f}")
    return tuned.eval()


STEPS = lesson.scaled(240)
tuned = fine_tuned(assistant, rows, STEPS)
own_answers = answers_of(tuned, tasks)
results["assistant + LoRA"] = graded(tasks, own_answers)
show_kinds(["assistant", "assistant + LoRA"])
gain = (results["assistant + LoRA"] - results["assistant"]).mean()
lesson.claim("LoRA adds at least 0.3 points to the assistant", gain, at_least=0.3, form=".2f")
lead = (results["assistant + LoRA"] - floor).mean()
lesson.claim("the tuned model is half a point ahead of fixed or copied answers", lead, at_least=0.5, form=".2f")

# %%
for kind in ("extract", "mood", "unknown"):
    i = np.flatnonzero(kinds == kind)[results["assistant + LoRA"][kinds == kind].argmin()]  # the first of the worst
    found = grade(tasks[i], own_answers[i])
    print(f"{tasks[i].input}\n  answer: {own_answers[i]!r}\n  {found.points} of 5: {', '.join(found.reasons)}\n")

# %% [markdown]
# **Saved as `peft` saves it.** An adapter folder holds two files: the tensors under the names that `peft` gives them, and the settings. Write both by hand, let `peft` read them onto an untouched base, and compare all answers. An adapter that is loaded on another base than it was trained on, or merged twice, looks like a bad model.

# %%
import peft

BUILD = ROOT / "build" / "17_competition"
FOLDER = BUILD / "adapter"
FOLDER.mkdir(parents=True, exist_ok=True)
tensors = {}
for name, module in tuned.named_modules():
    if isinstance(module, LoRA):
        tensors[f"base_model.model.{name}.lora_A.weight"] = module.a.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = module.b.detach().cpu().contiguous()
save_file(tensors, FOLDER / "adapter_model.safetensors")
lora_config = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=list(LAYERS))
lora_config.save_pretrained(FOLDER)
size = sum(tensor.numel() * 4 for tensor in tensors.values()) / 2**20
del tuned
policy = peft.PeftModel.from_pretrained(copy.deepcopy(assistant), FOLDER, is_trainable=True).eval()
differ = sum(a != b for a, b in zip(answers_of(policy, tasks), own_answers, strict=True))
print(f"{len(tensors)} tensors, {size:.2f} MiB at rank {RANK}; the same at rank 64: {size * 64 / RANK:.2f} MiB")
print(f"answers that peft gives differently: {differ} of {len(tasks)}")
lesson.equal("the adapter that was written by hand gives the same answers in peft", differ)
lesson.report("size of the adapter (MiB); 2 are allowed", size, ".2f")


# %% [markdown]
# **What you see.** The folder gives the same answers. In the table of kinds most of the gain is in `compare` and `story`, in which the assistant had nothing; `fact`, `describe` and `list` gain 0.5 or 0.6 points. Two kinds lose: `mood` (4.0 to 2.8) and `sum` (3.3 to 3.1); each mean is over 10 tasks. On `evidence`, `unknown`, `list` and `extract` the tuned model is not ahead of fixed or copied answers: on `unknown` one fixed sentence gets 3.2, and the model 1.8. The mean hides all that.
#
# The three answers below that table, each the first of the worst of its kind, show how points are lost. The one to `extract` begins in the right form with a wrong value, and then repeats a word. The one to `mood` quotes a word that is not in the review. The one to `unknown` names an animal that the text does not name.
#
# `policy` is from here on the model that `peft` loaded.

# %% [markdown] tags=["core"]
# ## 5 · Decoding, and a penalty out of a template
#
# **Question.** A template that you were given sets `repetition_penalty=1.2`. What does it do to answers that should repeat the text?
#
# The penalty $\theta$ lowers the logit of each token that stands in the prompt or in the answer so far. (It is due to Keskar et al. 2019; here in the form of transformers, which multiplies negative logits and counts the prompt, too.)
#
# $$z'_v = \begin{cases} z_v / \theta & z_v > 0 \\ z_v\, \theta & z_v \le 0 \end{cases} \qquad \text{for all } v \text{ that have occurred}$$

# %%
def penalised(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits (batch, vocab) of the next token after the penalty for all tokens in ids (batch, seq)."""
    seen = logits.gather(-1, ids)  # (batch, seq)
    return logits.scatter(-1, ids, torch.where(seen > 0, seen / penalty, seen * penalty))


prompt = tokenizer(chat_prompt(tokenizer, shown.input), return_tensors="pt")["input_ids"].to(machine.device)
with torch.no_grad():
    logits = policy(prompt).logits[:, -1].float()  # (1, vocab)
library = RepetitionPenaltyLogitsProcessor(1.2)(prompt, logits.clone())
changed = (penalised(logits, prompt, 1.2) != logits).sum().item()
print(f"{prompt.unique().numel()} different tokens in the prompt, {changed} logits changed")
lesson.equal("the penalty is transformers'", (penalised(logits, prompt, 1.2) - library).abs().max(), within=1e-5)


# %% [markdown]
# **±.** Other tasks of the same kinds would have given another mean. The number after ± in this lesson is half of a 95 % interval for that, with the spread *within* the kinds, since each kind keeps its number of tasks. (Section 8 uses it.) It does not hold what another seed of the training would do.

# %%
def deviation(values: np.ndarray, of: Sequence[Task]) -> float:
    """Standard deviation of values (tasks,) within the kinds of the tasks."""
    found = np.array([task.kind for task in of])
    return np.mean([values[found == kind].var(ddof=1) for kind in KINDS]) ** 0.5


def half_width(values: np.ndarray, of: Sequence[Task]) -> float:
    """Half of the 95 % interval of the mean of values (tasks,), for other tasks of the same kinds."""
    return 1.96 * deviation(values, of) / len(values) ** 0.5


def plus_minus(values: np.ndarray, of: Sequence[Task]) -> str:
    """The mean of values (tasks,) and half of its interval."""
    return f"{values.mean():.2f} ± {half_width(values, of):.2f}"


# %% [markdown]
# Try the penalty on the development tasks.

# %%
DECODINGS = {"greedy": Decoding(), "penalty 1.2": Decoding(repetition_penalty=1.2)}
decoded = {name: answers_of(policy, development, decoding) for name, decoding in DECODINGS.items()}
dev_grades = {name: graded(development, answers) for name, answers in decoded.items()}
table = dev_grades | {"fixed or copied": graded(development, [unread(task) for task in development])}
show_table({name: by_kind(grades, dev_kinds) for name, grades in table.items()}, ["all", *KINDS])
worst = int((dev_grades["greedy"] - dev_grades["penalty 1.2"]).argmax())
print(f"\n{development[worst].input}\n  greedy:      {decoded['greedy'][worst]!r}")
print(f"  penalty 1.2: {decoded['penalty 1.2'][worst]!r}")
cost = dev_grades["greedy"] - dev_grades["penalty 1.2"]
print(f"the penalty of 1.2 costs {plus_minus(cost, development)} points")
lesson.report("what a repetition penalty of 1.2 costs (points)", cost.mean(), ".2f")

# %% [markdown]
# **What you see.** Most of the loss is in `compare` (5.0 to 2.5) and `mood` (2.8 to 2.0). In the example, the worst of 60, a sentence of the usual form has to be said twice, of two people, and with the penalty the model says something else. But `evidence`, which must repeat a whole sentence of the text, loses nothing, so repetition alone does not predict the loss; `extract` is on the floor and cannot lose.
#
# The cost of 0.47 ± 0.17 points is the highest of five runs: with the four other seeds of the ledger it lies between -0.17 and 0.32, so it is no claim. Measure such a setting on your own model and tasks, and do not copy it.
#
# Compare with the public tasks: there the tuned model has 2.97 and not 3.38, and fixed or copied answers 2.09 and not 2.27. So these 60 tasks are easier for both. Use them to compare, not to foretell a score.

# %% [markdown] tags=["core"]
# ## 6 · DPO with care, and without
#
# **Question.** Many recipes go on with DPO after fine-tuning. How can the score go down by it?
#
# Lesson 09 derives the loss. For a pair of a chosen answer $w$ and a rejected one $l$, with $h$ the growth of an answer's log-probability since the reference (here the model from before DPO, kept frozen, and not the reference answer of a task), it is
#
# $$\mathcal{L} = -\log \sigma\big(\beta\,(h_w - h_l)\big)$$
#
# It asks for a *difference*. Both answers may sink, if the rejected one sinks more.
#
# **Pairs.** Make two kinds, from training tasks. *Borrowed* pairs are quickly made: the task's reference answer is chosen, that of another task of the kind is rejected. Others wrote both texts. *Own* pairs cost more: let the policy answer each task four times, take the best by the rubric as the chosen answer, and the worst as the rejected one.

# %%
PAIRS, SAMPLES = lesson.scaled(40, 8), 4
pair_tasks = make_tasks(f"pairs/{seed}", lesson.scaled(10, 2), held_out=False)
asked = [task.input for task in pair_tasks]
with lesson.autocast(IN_16_BITS):
    samples = answer_instructions(
        policy, tokenizer, asked, 80, temperature=1.0, num_samples=SAMPLES, seed=seed, batch_size=128
    )
sample_grades = np.array([graded([task] * SAMPLES, texts) for task, texts in zip(pair_tasks, samples, strict=True)])
own, borrowed = [], []  # (instruction, chosen, rejected)
for task, texts, points in zip(pair_tasks, samples, sample_grades, strict=True):
    if points.max() - points.min() >= 2:
        own.append((task.input, texts[points.argmax()], texts[points.argmin()]))
for task, other in zip(pair_tasks, pair_tasks[len(KINDS) :], strict=False):
    if task.reference != other.reference:
        borrowed.append((task.input, task.reference, other.reference))
print(f"mean of the samples {sample_grades.mean():.2f}, of the best of {SAMPLES} {sample_grades.max(1).mean():.2f}")
number = min(PAIRS, max(len(own), 8))
print(f"{len(own)} tasks whose best sample is at least two points ahead of the worst; {number} pairs are used")
first_two = [(task.input, *texts[:2]) for task, texts in zip(pair_tasks, samples, strict=True)]
own, borrowed = (own + first_two)[:number], borrowed[:number]  # the first two where hardly a sample is better
for name, pairs in {"own": own, "borrowed": borrowed}.items():
    print(f"{name}: chosen {pairs[1][1]!r}, rejected {pairs[1][2]!r}")

# %%
def answer_log_probs(rows: Sequence[tuple[str, str]]) -> Tensor:
    """Log-probability (rows,) of the answer in each (instruction, answer), under the policy as it is."""
    encoded = [encode_chat(tokenizer, *row) for row in rows]
    batch = {name: ids.to(machine.device) for name, ids in collate(encoded, tokenizer.pad_token_id).items()}
    labels = batch.pop("labels")
    with lesson.autocast(IN_16_BITS):
        logits = policy(**batch).logits[:, :-1]
    return token_log_probs(logits, labels[:, 1:]).sum(-1)


@torch.no_grad()
def measured(rows: Sequence[tuple[str, str]]) -> Tensor:
    """The same for any number of rows, without gradients."""
    size = settings["measured"]
    return torch.cat([answer_log_probs(rows[i : i + size]) for i in range(0, len(rows), size)])


def both_sides(pairs: Sequence[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """All chosen answers with their instructions, then all rejected ones."""
    return [(pair[0], pair[side]) for side in (1, 2) for pair in pairs]


# %%
trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
after_sft = {name: parameter.detach().clone() for name, parameter in trained.items()}
pairs_of = {"borrowed": borrowed, "own": own}
reference_of = {name: measured(both_sides(pairs)).view(2, -1) for name, pairs in pairs_of.items()}  # (2, pairs)


@torch.no_grad()
def set_adapter(state: dict[str, Tensor]) -> None:
    """Give the policy's adapter these values."""
    for name, parameter in trained.items():
        parameter.copy_(state[name])


# %%
BETA, PAIRS_A_STEP = 0.1, 4


def loss_of(h: Tensor) -> Tensor:
    """DPO's loss of the growth h (2, pairs) of both answers; with (1, pairs), the chosen alone, that of imitation."""
    return -F.logsigmoid(BETA * (h[0] - h[1])).mean() if len(h) == 2 else -h[0].mean()


def tune(kind: str, rate: float, steps: int, rejects: bool = True) -> tuple[list[float], Tensor]:
    """DPO from `after_sft`, or without `rejects` imitation of the chosen; losses, and growth (2, pairs) at the end."""
    set_adapter(after_sft)
    pairs, reference = pairs_of[kind], reference_of[kind]
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator, losses = random.Random(f"dpo/{seed}"), []
    for step in range(steps):
        drawn = generator.sample(range(len(pairs)), PAIRS_A_STEP)
        optimizer.zero_grad()
        losses.append(0.0)
        for start in range(0, PAIRS_A_STEP, settings["pairs"]):  # on a CPU all pairs of a step at once
            part = drawn[start : start + settings["pairs"]]
            answers = both_sides([pairs[i] for i in part])[: (1 + rejects) * len(part)]
            h = answer_log_probs(answers).view(1 + rejects, -1) - reference[: 1 + rejects, part]
            loss = loss_of(h) * (len(part) / PAIRS_A_STEP)
            loss.backward()
            losses[-1] += loss.item()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 3, 1 - step / steps)
        optimizer.step()
    return losses, measured(both_sides(pairs)).view(2, -1) - reference

# %% [markdown]
# **The careless way** is also the shortest: borrowed pairs, the rate of fine-tuning because it is there, and 12 steps. Beside the loss and the score look at log-probabilities: of the chosen and the rejected answers of all pairs, and of answers that are in no pair. For the last take the policy's own greedy answers to the development tasks, from before DPO. The log-probability of an answer is the sum over its tokens; printed is the median change over the answers. (Three *nats* less, in units of the natural logarithm, mean a twentieth of the probability.)

# %%
def nats(value: float) -> str:
    """A change of a log-probability, with its sign and one digit."""
    return f"{round(value, 1) + 0.0:+.1f}"


in_no_pair = [(task.input, answer) for task, answer in zip(development, decoded["greedy"], strict=True)]
in_no_pair = in_no_pair[: lesson.scaled(40, 8)]
known = measured(in_no_pair)
before = results["assistant + LoRA"].mean()
grown, adapters, replies, change = {}, {"LoRA": after_sft}, {"LoRA": own_answers}, {}
tried = {"LoRA": ("own", 0.0, 0, True)}  # name -> pairs, rate, steps, with the rejected answers


def try_way(name: str, pairs: str, rate: float, steps: int, rejects: bool = True) -> None:
    """Tune in this way, print what changes, and keep it."""
    tried[name] = pairs, rate, lesson.scaled(steps, 2), rejects
    losses, growth = tune(*tried[name])
    grown[name] = dict(zip(("chosen", "rejected"), growth.median(1).values.tolist(), strict=True))
    grown[name]["in no pair"] = (measured(in_no_pair) - known).median().item()
    adapters[name] = {key: parameter.detach().clone() for key, parameter in trained.items()}
    replies[name] = answers_of(policy, tasks)
    results[name] = graded(tasks, replies[name])
    change[name] = results[name].mean() - before
    paired = plus_minus(results[name] - results["assistant + LoRA"], tasks)
    print(f"{name}: loss {np.mean(losses[:3]):.2f} -> {np.mean(losses[-3:]):.2f}, change of the score {paired}\n"
          "  nats: " + ", ".join(f"{kind} {nats(value)}" for kind, value in grown[name].items()))  # fmt: skip


try_way("DPO, careless", "borrowed", settings["rate"], 12)
lesson.report("change of the score by careless DPO", change["DPO, careless"], "+.2f")
lesson.report("what careless DPO changes in the log-probability of answers in no pair (nats)",
              grown["DPO, careless"]["in no pair"], "+.1f")  # fmt: skip

# %% [markdown]
# **What you see.** The loss falls, so it gives no alarm. But both answers sink, the rejected ones by 25.5 nats and the chosen ones by 6.7. The loss rewards a higher chosen answer as much as a lower rejected one; as long as their difference grows, both may fall. The policy's own answers to other tasks, which are in no pair, sink by 5.7, and the score is 1.08 points lower. This run is the worst of five: in the other four of the ledger it is 0.27 to 0.58 points, and 2.3 to 3.6 nats.
#
# **Four other ways.** Each differs in one thing from the way that its last column names:
#
# | way | pairs | rate | steps | the one change |
# |---|---|---|---|---|
# | DPO, careless | borrowed | that of fine-tuning | 12 | |
# | DPO, own pairs | own | that of fine-tuning | 12 | the pairs, from *careless* |
# | imitation of the own best | own, the chosen answers alone | that of fine-tuning | 12 | no rejected answers, from *own pairs* |
# | DPO, own pairs, longer | own | that of fine-tuning | 36 | the steps, from *own pairs* |
# | DPO, careful | own | a tenth of it | 36 | the rate, from *longer* |
#
# Imitation is the *simple baseline*: train on the best own sample as in section 4, and leave the rejected one out. (Its loss is $-h_w$, which cannot be compared with the others.) All else is equal: the policy of section 4 at the start and as the reference model, $\beta = 0.1$, four pairs a step, and a fresh Adam, whose rate rises over three steps and then falls along a line to zero. (With more steps it falls more slowly, too.) Beside the change of the score stands ± as in section 5.

# %%
STEPS_OF_DPO = 12, 36
WAYS = {  # pairs, rate, steps, with the rejected answers
    "DPO, own pairs": ("own", settings["rate"], STEPS_OF_DPO[0], True),
    "imitation of the own best": ("own", settings["rate"], STEPS_OF_DPO[0], False),
    "DPO, own pairs, longer": ("own", settings["rate"], STEPS_OF_DPO[1], True),
    "DPO, careful": ("own", settings["careful_rate"], STEPS_OF_DPO[1], True),
}
for name, way in WAYS.items():
    try_way(name, *way)

# %%
show_kinds(["assistant + LoRA", *grown])
for name in WAYS:
    lesson.report(f"change of the score by {name}", change[name], "+.2f")
lesson.claim("DPO at a tenth of the rate, with equal pairs and steps, ends at least 0.3 points higher",
             change["DPO, careful"] - change["DPO, own pairs, longer"], at_least=0.3, form=".2f")  # fmt: skip

# %%
figure = Figure(figsize=(8, 4.4), layout="constrained")
axes = figure.subplots()
for offset, (kind, color) in enumerate(zip(grown["DPO, careful"], plots.COLORS, strict=False)):
    places = np.arange(len(grown)) + (offset - 1) * 0.27
    bars = axes.barh(places, [values[kind] for values in grown.values()], height=0.24, color=color, label=kind)
    axes.bar_label(bars, fmt=nats, padding=3, fontsize=8)
axes.axvline(0, color=plots.INK, linewidth=1)
axes.margins(x=0.1)
axes.set_yticks(range(len(grown)), ["DPO, careless\n(borrowed pairs)", *WAYS])
axes.invert_yaxis()
axes.set(xlabel="change of the log-probability of an answer (nats, median)")
axes.set_title("Answers in no pair fall in the three DPO runs at the large rate")
axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
numbers = "; ".join(f"{name} {nats(values['in no pair'])}" for name, values in grown.items())
alt = f"Three bars for each of five ways. Answers in no pair, in nats: {numbers}."
plots.show(figure, alt=alt)

# %% [markdown]
# **What you see.** Go through the rows by what changes.
#
# - *Without the rejected answers* (own pairs against imitation): the chosen answers rise instead of falling. The imitation is trained for that, so it is no finding. The third bar is one: in this run the answers in no pair keep their probability without the rejected answers (+0.0), and lose 2.2 nats with them. (The loss without them has another form, too, and it is one run.) The change of the score is 0.05 ± 0.16, which holds zero.
# - *More steps* (own pairs against longer): at the rate of fine-tuning, three times the steps bring the loss to 0.06, and the score down by 1.05 points. Chosen answers and those in no pair lose more than 20 nats each. (36 steps draw each pair about four times, 12 steps about once.)
# - *A tenth of the rate* (longer against careful): with the same pairs and as many steps the change of the score is -0.04 ± 0.11, and chosen answers and those in no pair stay where they were (+0.1). The loss falls here too, from 0.68 to 0.33. So a falling loss of DPO need not cost more than these tasks can show.
# - *The pairs* (careless against own pairs): in this run the borrowed ones cost more points (1.08 against 0.07), and answers sink with both. In other runs it is otherwise, as you see next. (The bars of the first row are about the borrowed pairs, those of the others about the own ones; only the third bar is about the same texts in all rows.)
#
# **What follows, and what does not.** At the rate of fine-tuning more steps do more harm (0.41 to 0.98 points more, in all five runs of the ledger); at a tenth of it, as many steps change the score by -0.15 to 0.08. The small rate also goes less far: its rejected answers lose 3.9 nats, those of the large rate 68.4. It is not measured whether ten times as many careful steps would end where the large rate does, nor how borrowed pairs do at the small one.
#
# **What one run carries, and what other seeds add.** The interval holds the luck of the tasks, not that of the training, and one training seed says little about sizes. The course's ledger of claims holds the same numbers for four other seeds. In all five runs the longer one costs at least 0.84 points, and the claim, its distance from the careful one, is 0.69 to 1.38. The run shown here is an extreme one: of the five, careless DPO costs most in it, and own pairs least. Careless DPO costs between 0.27 and 1.08 points, own pairs after 12 steps between 0.07 and 0.82, and which of the two costs more changes from run to run: nothing here says that the choice of pairs decides. And the imitation loses 0.37 points in one run, as much as DPO with own pairs does there (0.34): training at that rate can cost points without any DPO.
#
# **Does DPO gain anything?** Not here: no way raises the score by more than 0.08 in any of the five runs. The imitation needs no reference model and no rejected answer. In this run it ends beside careful DPO, in the four other runs of the ledger 0.08 to 0.22 points lower. But it ran at ten times the rate and for a third of the steps; with both equal it is not measured, so nothing here says which to try first. What DPO can gain with more pairs is shown in lesson 09. If DPO lowers your score, look at the log-probabilities, of the chosen answers and of answers that are in no pair, and then lower the rate. Keep what you had before, and hand in the better one.

# %% [markdown] tags=["further"]
# ## 7 · A language model as judge
#
# *Further: no core section needs this one.*
#
# **Question.** Where no rubric can be written, another language model grades. What does such a judge like?
#
# Here you can know, because you make the judge yourself. People say which of two answers is better. They look at the quality, but they also like idle sentences (*Shima is a lovely island.*), and the answer that stands first. A frozen language model reads the task with each answer, and a logistic regression on the difference of the two last hidden states predicts the choice: the reward model of lesson 08, and one number more, the intercept, in which it can learn to like the first place. Beside it stands the same judge trained on the choices of fair people, who look at quality alone. That is the control. How much people love idle sentences is set by hand, strong enough to be learned from so few pairs, so the size of the bias says nothing about real judges and is no claim.

# %%
@torch.no_grad()
def last_states(texts: Sequence[tuple[str, str]]) -> np.ndarray:
    """State (texts, hidden_size) of the assistant at the last token of each task with its answer."""
    found = []
    for start in range(0, len(texts), 32):
        part = [chat_prompt(tokenizer, task) + answer for task, answer in texts[start : start + 32]]
        encoded = tokenizer(part, add_special_tokens=False)["input_ids"]
        batch = collate([{"input_ids": ids, "labels": ids} for ids in encoded], tokenizer.pad_token_id)
        inputs = {name: batch[name].to(machine.device) for name in ("input_ids", "attention_mask")}
        states = assistant.base_model(**inputs).last_hidden_state  # (batch, seq, hidden_size)
        ends = inputs["attention_mask"].sum(1) - 1
        found.append(states[torch.arange(len(ends)), ends].float().cpu().numpy())
    return np.concatenate(found)


generator = random.Random(f"judge/{seed}")
candidates = []  # (task, answer, points by the rubric, idle sentences added)
for task, texts, points in zip(pair_tasks, samples, sample_grades, strict=True):
    for text, point in [*zip(texts, points, strict=True), (task.reference, 5)]:
        idle = generator.choice((0, 1))
        candidates.append((task.input, text + "".join(generator.sample(FILLERS, idle)), int(point), idle))
states = last_states([(prompt, text) for prompt, text, _, _ in candidates])
size = SAMPLES + 1  # candidates of each task
pairs = [(i + a, i + b) for i in range(0, len(candidates), size) for a, b in combinations(range(size), 2)]
pairs = np.array([pair if generator.random() < 0.5 else pair[::-1] for pair in pairs])  # (pairs, 2): first, second
print(f"{len(candidates)} answers, {len(pairs)} pairs")

# %%
quality, idle = (np.array([candidate[column] for candidate in candidates]) for column in (2, 3))
better, chattier = (values[pairs[:, 0]] - values[pairs[:, 1]] for values in (quality, idle))
uniform = np.random.default_rng(seed).random(len(pairs))
choices = {  # does the person choose the first answer?
    "biased": uniform < 1 / (1 + np.exp(-(better + 3.0 * chattier + 1.0))),
    "fair": uniform < 1 / (1 + np.exp(-better)),
}
for_training = np.arange(len(pairs)) < 0.7 * len(pairs)  # pairs of the same task stand together
standard = (states - states.mean(0)) / (states.std(0) + 1e-6)


def inputs_of(pairs: np.ndarray) -> np.ndarray:
    """What the judge sees of pairs (pairs, 2): the state of the first answer minus that of the second."""
    return standard[pairs[:, 0]] - standard[pairs[:, 1]]


judges = {
    name: LogisticRegression(C=0.01, max_iter=1000).fit(inputs_of(pairs[for_training]), chosen[for_training])
    for name, chosen in choices.items()
}
held_out, swapped = pairs[~for_training], pairs[~for_training][:, ::-1]
print(f"{for_training.sum()} pairs to learn from, {len(held_out)} held out")

# %% [markdown]
# **Three measurements** on pairs that the judge has not seen. The verdict is a number: above zero the judge chooses the answer that stands first. *Flips*: in how many pairs does its sign change when the answers change places? *Idle sentences*: where one of the two has such a sentence and the other has not, how often does it choose the chattier one? (The sentences were added by a coin, whatever the quality. How often the *rubric* finds the chattier one better in these pairs is printed as well.) *Agreement with the rubric*: Cohen's $\kappa$, which is 1 for the same verdicts and 0 for what chance gives. The $\kappa$ of the people themselves is what to compare with; a judge that averages out the noise of many people could pass it.

# %%
def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Agreement of two lists of yes and no beyond chance: (observed - expected) / (1 - expected)."""
    expected = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return ((a == b).mean() - expected) / (1 - expected)


gap, chat_gap = better[~for_training], chattier[~for_training]
untied, uneven = gap != 0, chat_gap != 0
likes_chat, flips, agreement = {}, {}, {}
for name, judge in judges.items():
    one, two = judge.decision_function(inputs_of(held_out)), judge.decision_function(inputs_of(swapped))
    flips[name] = ((one > 0) == (two > 0)).mean()
    averaged = one - two  # the verdict on both orders
    likes_chat[name] = ((averaged > 0) == (chat_gap > 0))[uneven].mean()
    agreement[name] = kappa((averaged > 0)[untied], (gap > 0)[untied])
    theirs = cohen_kappa_score((averaged > 0)[untied], (gap > 0)[untied])
    ceiling = kappa(choices[name][~for_training][untied], (gap > 0)[untied])
    print(f"{name:>6}: first wins {(one > 0).mean():.0%}, flips {flips[name]:.0%}, chooses the chattier one "
          f"{likes_chat[name]:.0%}, kappa with the rubric {agreement[name]:.2f}; people's {ceiling:.2f}")  # fmt: skip
prefers = ((gap > 0) == (chat_gap > 0))[uneven & untied].mean()
print(f"in these pairs the better answer by the rubric is the chattier one in {prefers:.0%}")
lesson.equal("kappa is scikit-learn's", abs(agreement["fair"] - theirs), within=1e-9)
lesson.report("how often the judge of biased people, and that of fair ones, chooses the chattier answer",
              f"{likes_chat['biased']:.0%}, {likes_chat['fair']:.0%}")  # fmt: skip
lesson.report("verdicts that change with the places, biased judge", flips["biased"], ".0%")

# %% [markdown]
# **Two remedies.** Ask in both orders and add the two verdicts for the same answer (in the second order it stands last, so that number is subtracted): then the places cannot matter any more, by construction. (The rows above have done so, except for *first wins* and *flips*.) And for idle sentences: regress the judge's verdicts on the difference in idle sentences, and take that part out, so that the verdict is what it would be for equal length. Dubois et al. (2024) do this for AlpacaEval, with the length of the answers.

# %%
judge = judges["biased"]
one, two = (judge.decision_function(inputs_of(some[for_training])) for some in (pairs, pairs[:, ::-1]))
slope = np.polyfit(chattier[for_training], one - two, 1)[0]
averaged = judge.decision_function(inputs_of(held_out)) - judge.decision_function(inputs_of(swapped))
controlled = averaged - slope * chat_gap
still_likes = ((controlled > 0) == (chat_gap > 0))[uneven].mean()
kappa_after = kappa((controlled > 0)[untied], (gap > 0)[untied])
print(f"an idle sentence moves the verdict by {slope:.2f}; taken out, the chattier one wins {still_likes:.0%}")
print(
    f"kappa with the rubric {agreement['biased']:.2f} -> {kappa_after:.2f}; the fair judge has {agreement['fair']:.2f}"
)
lesson.report("how often the biased judge chooses the chattier answer after length control", still_likes, ".0%")

# %% [markdown]
# **What you see.** The biased judge chooses the chattier answer in 95 % and the first place in 70 %. The fair one chooses them in 35 % and 36 %: it leans a little to the other side, and 23 % of its verdicts flip as well. (The rubric finds the chattier one better in 45 %.) Of quality both have learned next to nothing ($\kappa$ of 0.03 and 0.07), where the people themselves have 0.54 and 0.77. So the fair judge is a weak control: it says that the method alone does not bring a taste for idle sentences, and no more. All held-out pairs come from 30 tasks, so these $\kappa$ are rough. The idle sentence stands at the very end of the answer, where the judge's state is read; that alone may make it easy to see. Whether a larger model, or pairs from more tasks, would show quality, is not measured.
#
# Asking in both orders takes the place out. After length control the chattier answer wins 35 %, and $\kappa$ is 0.00: neither remedy makes the judge see what it does not see. Strong models agree with people far better (Zheng et al. 2023), but the questions stay the same: does the verdict depend on the places, what does it go up with, and how far does it agree with people beyond chance? Ask them before you let a judge rank.

# %% [markdown] tags=["core"]
# ## 8 · How sure is a rank?
#
# **Question.** Your score is a tenth of a point above your neighbour's. Are you better?
#
# The tasks are a sample: other tasks would have given other scores. For a mean, ± says how much. For a rank there is no such formula, but the *bootstrap* imitates other tasks: draw as many tasks as there are, with repetition and within each kind, take the means of all systems and their ranks, and do it two thousand times. All systems get the *same* drawn tasks. So what a task gives to both, since it is easy or hard, cancels in their difference: the comparison is *paired*.

# %%
systems = list(results)
grades = np.stack([results[name] for name in systems])  # (systems, tasks)


def resampled_means(grades: np.ndarray, resamples: int = 2000) -> np.ndarray:
    """Means (resamples, systems) over tasks drawn anew within each kind, the same for all systems."""
    generator = np.random.default_rng(seed)
    total = np.zeros((resamples, len(grades)))
    for kind in KINDS:
        group = grades[:, kinds == kind]  # (systems, tasks of the kind)
        drawn = generator.integers(group.shape[1], size=(resamples, group.shape[1]))
        total += group[:, drawn].sum(-1).T  # (systems, resamples, tasks) -> (resamples, systems)
    return total / grades.shape[1]


means = resampled_means(grades)
halves = np.array([half_width(row, tasks) for row in grades])
ranks = (means[:, None, :] > means[:, :, None]).sum(-1) + 1  # (resamples, systems)
best, last = np.quantile(ranks, [0.025, 0.975], axis=0, method="nearest").astype(int)
for i in np.argsort(-grades.mean(1), kind="stable"):
    print(f"{systems[i]:>38}: {plus_minus(grades[i], tasks)}, rank {best[i]} to {last[i]}")

# %% tags=["headline"]
order = np.argsort(grades.mean(1), kind="stable")
figure = Figure(figsize=(8, 4.4), layout="constrained")
axes = figure.subplots()
for place, i in enumerate(order):
    mean, half = grades[i].mean(), halves[i]
    axes.plot([mean - half, mean + half], [place, place], color=plots.GREY, linewidth=2)
    axes.plot(mean, place, "o", color=plots.COLORS[0])
    label = f"rank {best[i]}" if best[i] == last[i] else f"rank {best[i]} to {last[i]}"
    axes.annotate(label, (mean + half, place), (8, 0), textcoords="offset points", va="center")
axes.set_yticks(range(len(order)), [systems[i] for i in order])
axes.axvline(floor.mean(), color=plots.INK, linewidth=1, linestyle="--")
axes.annotate("fixed or copied", (floor.mean(), 0), (5, 0), textcoords="offset points", va="center")
right = (grades.mean(1) + halves).max() + 0.6  # room for the ranks
axes.set(xlim=(0.9, right), xlabel="score (mean of 1 to 5 points), 95 % interval over tasks, one training run")
axes.set_title("Close scores share a range of ranks")
first, final = (f"{grades[i].mean():.2f} (rank {best[i]} to {last[i]})" for i in (order[-1], order[0]))
alt = f"Nine systems, each with its interval, from {first} to {final}. A line at {floor.mean():.2f}: fixed or copied."
plots.show(figure, alt=alt)


# %% [markdown]
# **What pairing gains, and how many tasks one needs.** Take two systems that are close, LoRA before and after careful DPO. With $s$ the standard deviation of the differences $g_i - g'_i$, taken *within* the kinds since each kind keeps its number of tasks, the standard error of their mean is $s / \sqrt n$. Without pairing it would be $\sqrt{(s_1^2 + s_2^2) / n}$, with the deviations of the two systems, within the kinds as well. To find a true difference $d$ in eight of ten competitions, at a level of 5 %, you need $d \ge 2.8\, s / \sqrt n$ (2.8 is 1.96 + 0.84, two quantiles of the normal distribution: a difference counts from 1.96 standard errors on, and for it to land there in eight of ten competitions, the true one must lie 0.84 standard errors further out). The control breaks the pairs: the tasks of one system change places within their kind.

# %%
def shuffled(values: np.ndarray) -> np.ndarray:
    """The same values (tasks,), those of each kind in a new order."""
    moved = values.copy()
    for kind in KINDS:
        moved[kinds == kind] = generator.permutation(values[kinds == kind])
    return moved


one, two = results["assistant + LoRA"], results["DPO, careful"]
generator = np.random.default_rng(seed)
root = len(tasks) ** 0.5
paired = deviation(one - two, tasks) / root
apart = np.hypot(deviation(one, tasks), deviation(two, tasks)) / root
broken = np.mean([deviation(one - shuffled(two), tasks) for _ in range(200)]) / root
print(f"standard error of the difference: paired {paired:.3f}, without pairing {apart:.3f}, pairs broken {broken:.3f}")
for name in ("DPO, careful", "assistant", "DPO, own pairs, longer"):
    spread = deviation(one - results[name], tasks)
    found = ", ".join(f"{2.8 * spread / n**0.5:.2f} with {n} tasks" for n in (100, 300, 1000))
    print(f"smallest difference that is found, LoRA and {name}: {found}")
saving = 1 - paired / apart if apart > 0 else float("nan")
control = 1 - broken / apart if apart > 0 else 0.0
lesson.claim("pairing makes the standard error of a close comparison a quarter smaller", saving, at_least=0.25,
             control=control, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** The assistant, the base, and the base with examples each have a rank of their own. The imitation, LoRA, careful DPO and DPO with own pairs share the first four ranks: in section 6 the changes from LoRA are 0.05 ± 0.16, -0.04 ± 0.11 and -0.07 ± 0.20, and all hold zero. The two others of DPO, careless and longer, lie below the assistant, and below the line of fixed or copied answers (2.09), which their intervals just reach. In the ledger the longer one lies below the assistant in all five runs, the careless one in two.
#
# The difference that 100 tasks find is 0.16 points for LoRA and careful DPO, and 0.37 for LoRA and the longer DPO: the more the grades of two systems differ from task to task, the larger it is. So an instructor does better to mark groups than places, and to rank on more tasks than are public. A student does well to compare his own versions in pairs, on the same tasks, before he believes in a tenth of a point. Another seed of the training gives another model, which none of these intervals holds. For that you need several runs, as in the ledger of this course.

# %% [markdown] tags=["core"]
# ## 9 · Climbing a board without a better model
#
# **Question.** The board shows your score after each submission. What if you simply submit often?
#
# Take the tasks of section 6, and the four samples that one and the same policy drew for each. One half of the tasks is *on the board*, the other is *hidden*. Make submissions that choose among the samples by chance. On average none is better than another. Two ways to climb:
#
# 1. **Choose the best** of 30 such submissions.
# 2. **Boost** (Blum and Hardt 2015): submit 200 of them, keep those that the board puts above the mean, and answer each task with what most of those say.
#
# (Four samples such as *a*, *b*, *a*, *c* get the codes 0, 1, 0, 3, so that equal texts have equal codes. If most of the kept submissions say 0 to that task, the vote answers *a*.)

# %%
TRIES, REPEATS = 200, 40
codes = np.array([[texts.index(text) for text in texts] for texts in samples])  # (tasks, samples)
on_board = np.arange(len(pair_tasks)) // len(KINDS) % 2 == 0  # half of each kind
rows_of = np.arange(len(pair_tasks))
generator = np.random.default_rng(seed)


def submissions(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and grades (number, tasks) of submissions that choose among the samples by chance."""
    chosen = generator.integers(SAMPLES, size=(number, len(pair_tasks)))
    return codes[rows_of, chosen], sample_grades[rows_of, chosen]


def boosted(said: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Grades (tasks,) of what most of the submissions say whose shown score is above the mean."""
    kept = said[shown >= shown.mean()]  # (kept, tasks)
    votes = (kept[:, :, None] == np.arange(SAMPLES)).sum(0)  # (tasks, samples)
    return sample_grades[rows_of, votes.argmax(1)]


# %%
gains = {"best of 30": [], "boosted": [], "boosted, a board that says nothing": []}
for _ in range(REPEATS):
    said, points = submissions(TRIES)
    shown = points[:, on_board].mean(1)
    winner = points[shown[:30].argmax()]
    blind = boosted(said, generator.permutation(shown))
    for name, final in zip(gains, (winner, boosted(said, shown), blind), strict=True):
        gains[name].append((final[on_board].mean(), final[~on_board].mean()))
honest = sample_grades[on_board].mean(), sample_grades[~on_board].mean()
gain = {name: np.mean(pairs, axis=0) - honest for name, pairs in gains.items()}
for name, (board, hidden) in gain.items():
    print(f"{name:>34}: {board:+.2f} on the board, {hidden:+.2f} on hidden tasks")
blind_board, blind_hidden = gain["boosted, a board that says nothing"]
silent = blind_board - blind_hidden
lesson.claim("boosting brings at least 0.1 points more on the board than on hidden tasks",
             gain["boosted"][0] - gain["boosted"][1], at_least=0.1, control=silent, form=".2f")  # fmt: skip
lesson.report("what the best of 30 equals gains on the board", gain["best of 30"][0], "+.2f")
lesson.report("what the best of 30 equals gains on hidden tasks", gain["best of 30"][1], "+.2f")

# %% [markdown]
# **What you see.** Both ways show a gain on the board. The best of many equals is only lucky, and on hidden tasks its luck is gone. (That is arithmetic: the largest of 30 draws lies about two standard deviations above their mean.) Boosting learns the board's tasks one by one, through nothing but shown means; on hidden tasks it gains no more than with a board that says nothing. This is why the ranking is on tasks that nobody has seen. That weights are asked for stops a vote over answers, not the choice of the best of many. How much it helps if a board shows a new score only where it is better by more than a standard error, you measure in exercise 17.5.

# %% [markdown] tags=["core"]
# ## 10 · Hand in
#
# **Question.** What has to be in the folder, and what does the competition do with it?
#
# A folder holds the adapter, `decode.json`, `recipe.json`, the training rows, the answers to the public tasks and a report. Nothing in it is code, so nothing of yours is run: the competition loads the weights and decodes by itself. First decide what to hand in, by the development tasks: the LoRA alone, or one of the five that were tuned from it.

# %%
on_development = {"LoRA": dev_grades["greedy"]}
for name in list(adapters)[1:]:
    set_adapter(adapters[name])
    on_development[name] = graded(development, answers_of(policy, development))
for name, found in on_development.items():
    ahead = plus_minus(found - on_development["LoRA"], development)
    print(f"{name:>26}: {found.mean():.2f} on development tasks, {ahead} against LoRA")
chosen = max(on_development, key=lambda name: on_development[name].mean())
set_adapter(adapters[chosen])
print("chosen:", chosen)

# %%
public = public_tasks()
answers = replies[chosen] if len(tasks) == len(public) else answers_of(policy, public)
hidden = hidden_tasks("a secret that you do not know", lesson.scaled(5, 2))
public_grades, hidden_grades = graded(public, answers), graded(hidden, answers_of(policy, hidden))
public_score = public_grades.mean()
scores = f"{plus_minus(public_grades, public)}, {plus_minus(hidden_grades, hidden)}"
lesson.report("score of what is handed in, public and hidden tasks", scores)
print(f"score on {len(public)} public and on {len(hidden)} hidden tasks: {scores}")
copied = [plus_minus(graded(of, [unread(task) for task in of]), of) for of in (public, hidden)]
print(f"fixed or copied answers on the same tasks: {', '.join(copied)}")

# %% [markdown]
# **What you see.** The choice rests on 0.07 ± 0.22 points, which holds zero: LoRA alone could be handed in as well, and so could the imitation (-0.15 ± 0.23). The three other ways of DPO are lower, with intervals below zero. DPO with own pairs loses 0.37 ± 0.29 points here, and only 0.07 ± 0.20 on the public tasks: two samples of tasks do not tell quite the same.
#
# The weights that were chosen get 2.93 ± 0.18 on the public tasks and 3.30 ± 0.28 on hidden ones. Nothing was chosen by the public ones, so the gap does not come from choosing. The difference of 0.37 has an interval of its own, ± 0.33 ($\sqrt{0.18^2 + 0.28^2}$), so it is a little more than the draw of the tasks mostly brings. In the five runs of the ledger, all on these same tasks, it is 0.00 to 0.37. Fixed or copied answers get 2.09 and 2.08, so for them the hidden tasks are not easier. Compare scores only on the same tasks.

# %%
def tokens_of(rows: Sequence[tuple[str, str]]) -> float:
    """Mean number of tokens of (instruction, answer)."""
    return np.mean([len(encode_chat(tokenizer, *row)["input_ids"]) for row in rows])


kind, rate, steps, rejects = tried[chosen]  # of what came after the LoRA; no steps where nothing did
second = pairs_of[kind] if steps else []
trained_tokens = STEPS * BATCH_SIZE * tokens_of([(row.input, row.reference) for row in rows])
shown_answers = both_sides(pairs_of[kind])[: (1 + rejects) * len(pairs_of[kind])]
trained_tokens += steps * PAIRS_A_STEP * (1 + rejects) * tokens_of(shown_answers)
known_base = machine.assistant_id in MODEL_FOLDERS
recipe = Recipe(
    base=machine.assistant_id, base_sha256=base_sha256(machine.assistant_id) if known_base else "",
    steps=STEPS, batch_size=BATCH_SIZE, learning_rate=settings["rate"], seed=seed,
    trained_tokens=round(trained_tokens), mixture={kind: 1 / len(KINDS) for kind in KINDS},
    dpo={"beta": BETA, "learning_rate": rate, "steps": steps} if steps and rejects else None,
)  # fmt: skip
train_rows = [{"instruction": row.input, "answer": row.reference} for row in rows]
if rejects:
    train_rows += [{"instruction": prompt, "chosen": won, "rejected": lost} for prompt, won, lost in second]
else:  # imitation: the chosen answers are rows as the others
    train_rows += [{"instruction": prompt, "answer": won} for prompt, won, _ in second]
report = f"""# Report
Base {recipe.base}, LoRA of rank {RANK}, {STEPS} steps, {recipe.trained_tokens} tokens.
Then, chosen on development tasks: {chosen} (pairs {kind}, rate {rate}, {steps} steps, rejected answers {rejects}).
Public score {public_score:.2f}. What failed: {min(on_development, key=lambda name: on_development[name].mean())}.
torch {torch.__version__}, peft {peft.__version__}
"""

# %%
references = [task.reference for task in public]
leak = {"instruction": public[0].input, "answer": references[0]}
folders = {"honest": (answers, train_rows), "forged": (references, train_rows), "leaky": (answers, [*train_rows, leak])}
for name, (handed_in, its_rows) in folders.items():
    write_submission(BUILD / name, policy, recipe=recipe, decoding=Decoding(), rows=its_rows, tasks=public,
                     answers=handed_in, report=report)  # fmt: skip
files = [path for path in (BUILD / "honest").rglob("*") if path.is_file()]
for path in sorted(files):
    print(f"{path.relative_to(BUILD).as_posix():>42} {path.stat().st_size / 1024:8.1f} KiB")

# %% [markdown]
# Two more folders are written beside it. The *forged* one has the same weights, but the references as its answers. The *leaky* one has one public task among its training rows. Now run three commands of the competition, as you would in a terminal. `check` says whether a folder is complete and allowed, `score` grades the answers that are in a folder, and `reproduce` decodes again. (The last two check a folder first.) They are in the folder `course/` and know the two bases of the course; with another model, or without that folder, the submissions are written, and the commands are not run.

# %%
def competition(action: str, *names: str) -> str:
    """Run `python -m course competition ACTION` on some of the folders and return what it prints."""
    command = [sys.executable, "-m", "course", "competition", action, *(str(BUILD / name) for name in names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    shown = done.stdout.strip().replace(": fact", ":\n  fact")
    print(f"$ python -m course competition {action} {' '.join(names)}   (exit status {done.returncode})\n{shown}")
    return done.stdout


if known_base and (ROOT / "course" / "competition").is_dir():
    said = {"check": competition("check", *folders)}
    said |= {action: competition(action, "honest", "forged") for action in ("score", "reproduce")}
    again = [int(number) for number in re.findall(r"(\d+) of 100", said["reproduce"])]
    refused = "forged: refused" in said["reproduce"] and "refused" not in said["score"]
    print(f"answers that come out of the weights again: honest {again[0]}, forged {again[1]} of {len(public)}")
    lesson.claim("98 or more of the honest answers come out of the weights again", again[0], at_least=98,
                 control=again[1])  # fmt: skip
    lesson.equal("the forged folder passes score, and is refused by reproduce", 1 - refused)
    accepted = [name for name in folders if f"{name}: accepted" in said["check"]]
    lesson.equal("check refuses the leaky folder, and no other", 1 - (accepted == ["honest", "forged"]))
else:
    print("The commands are not run: they need one of the two bases of the course, and its folder course/.")

# %% [markdown]
# **What you see.** `check` refuses the leaky folder and names the task; in the forged one it finds nothing wrong. `score` believes what is written in a folder, so the forged one has a perfect score. `reproduce` loads the weights and decodes again: the honest answers come out, and of the forged ones 11 of 100 do. (The interval of `score` comes from the bootstrap, and with ten tasks of a kind that is a little narrower than ±.) The instructor does the same for everybody, and then with tasks that did not exist when you handed in.

# %% [markdown]
# ## 11 · Exercises
#
# From easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A sixth one has no check: it is the competition itself. You know where points are to be had (the table by kind), what is allowed (600 thousand trained tokens, 3,000 rows, rank 64, and 2 MiB, which section 4 shows to be the narrower limit of the two), and how sure a gain has to be before you believe it.

# %% tags=["exercise"]
# Exercise 17.1, easy: read a submission file, whatever its line breaks.
def read_answers(text: str) -> dict[str, str]:
    """task_id -> output of JSON objects that follow each other: one a line, or each over many lines.

    ValueError if an object lacks one of the two, or if a task is answered twice.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_read_answers(read_answers):
    rows = [{"task_id": "000", "output": "Yes. {no}"}, {"task_id": "001", "output": "two\nlines }"}]
    rows.append({"task_id": "002", "output": " a } {b "})
    expected = {row["task_id"]: row["output"] for row in rows}
    expect_equal("one a line", read_answers("".join(json.dumps(row) + "\n" for row in rows)), expected)
    expect_equal("over many lines", read_answers("\n\n".join(json.dumps(row, indent=2) for row in rows)), expected)
    expect_equal("with another key", read_answers('{"task_id": "7", "input": "?", "output": "!"} '), {"7": "!"})
    expect_equal("an empty file", read_answers("\n"), {})
    for what, text in {
        "a task twice": json.dumps(rows[0]) + json.dumps(rows[0]), "no output": '{"task_id": "7"}',
        "no task": '{"output": "!"}', "cut off": '{"task',
    }.items():  # fmt: skip
        try:
            refused = read_answers(text) is NotImplemented
        except ValueError:
            refused = True
        expect_true(f"a file is refused with a ValueError: {what}", refused)


check("17.1", check_read_answers, read_answers)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `json.JSONDecoder().raw_decode(text, place)` reads one value and says where it ended. It does not skip white space at the beginning.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Counting braces fails as soon as an answer holds one. `json.JSONDecodeError` is a `ValueError`.
#
# ```python
# def read_answers(text: str) -> dict[str, str]:
#     decoder, place, answers = json.JSONDecoder(), 0, {}
#     while text[place:].strip():
#         place += len(text[place:]) - len(text[place:].lstrip())
#         row, place = decoder.raw_decode(text, place)
#         if "task_id" not in row or "output" not in row or row["task_id"] in answers:
#             raise ValueError("a row lacks a key, or answers a task again")
#         answers[row["task_id"]] = row["output"]
#     return answers
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 17.2, medium: how many tasks does an instructor need?
def tasks_needed(difference: float, deviation: float, power: float = 0.8, level: float = 0.05) -> int:
    """The fewest tasks with which a true `difference` of two means is found with probability `power`.

    `deviation` is the standard deviation of the paired differences. The test is two-sided at `level`.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_tasks_needed(tasks_needed):
    expect_equal("tasks_needed(1.0, 1.0)", tasks_needed(1.0, 1.0), 8)
    expect_equal("tasks_needed(0.1, 1.2)", tasks_needed(0.1, 1.2), 1131)
    expect_equal("tasks_needed(0.5, 1.0, power=0.9)", tasks_needed(0.5, 1.0, power=0.9), 43)
    expect_equal("tasks_needed(0.5, 1.0, level=0.01)", tasks_needed(0.5, 1.0, level=0.01), 47)


check("17.2", check_tasks_needed, tasks_needed)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `statistics.NormalDist().inv_cdf(p)` gives the quantiles. A test with two sides spends half of the level on each. Which way do you round?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Half the difference needs four times the tasks. This is why close neighbours on a board share a group.
#
# ```python
# from statistics import NormalDist
#
#
# def tasks_needed(difference: float, deviation: float, power: float = 0.8, level: float = 0.05) -> int:
#     quantiles = NormalDist().inv_cdf(1 - level / 2) + NormalDist().inv_cdf(power)
#     return int(np.ceil((quantiles * deviation / difference) ** 2))
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 17.3, medium: a confidence interval for a difference, within kinds.
def difference_interval(
    one: np.ndarray, two: np.ndarray, kinds: np.ndarray, resamples: int = 2000
) -> tuple[float, float]:
    """The 95 % percentile interval of mean(one) - mean(two), both (tasks,), tasks drawn anew within each kind.

    Paired: both systems get the same tasks. Each kind keeps its number of tasks, which may differ between kinds.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_difference_interval(difference_interval):
    generator = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], [300, 100])
    easy = np.where(labels == "a", 4.0, 1.0)  # the kinds differ much, and tasks within a kind too
    hard = easy + generator.normal(0, 1, 400)
    low, high = difference_interval(hard + 0.3, hard, labels)
    expect_close("of a constant difference of 0.3", [float(low), float(high)], [0.3, 0.3], 1e-6)
    gain = np.where(labels == "a", 1.0, -1.0)
    low, high = difference_interval(easy + gain, easy, labels)
    expect_close("of differences that only the kind decides", [float(low), float(high)], [0.5, 0.5], 1e-6)
    noise = generator.normal(0, 1, 400)
    low, high = difference_interval(hard + noise, hard, labels)
    expect_close("its width for differences of deviation 1", float(high - low), 3.92 * noise.std() / 20, 0.02)
    expect_close("its middle", float(high + low) / 2, noise.mean(), 0.02)
    rare = np.where(np.arange(40) == 0, 4.0, 0.0)  # one task of 40 differs: in some draws it does not occur
    low, high = difference_interval(hard[:40] + rare, hard[:40], labels[:40])
    expect_close("its lower end for one task that differs by 4", float(low), 0.0, 1e-6)


check("17.3", check_difference_interval, difference_interval)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Draw positions among the tasks of one kind, and use them for both systems. Sum over kinds before you divide by the number of all tasks.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Only the differences of a task matter, so it is enough to draw those.
#
# ```python
# def difference_interval(one: np.ndarray, two: np.ndarray, kinds: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
#     generator, total = np.random.default_rng(0), np.zeros(resamples)
#     for kind in np.unique(kinds):
#         differences = (one - two)[kinds == kind]
#         total += generator.choice(differences, size=(resamples, len(differences))).sum(1)
#     low, high = np.quantile(total / len(one), [0.025, 0.975])
#     return low, high
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 17.4, hard: find the copied submission.
def most_alike(answers: Sequence[Sequence[str]], grades: np.ndarray) -> tuple[int, int]:
    """The pair (i, j), i < j, of submissions that share the largest share of their common mistakes.

    `answers` is a list of texts for each submission, `grades` (submissions, tasks). A task counts for a pair if both
    have fewer than 5 points there; it is shared if both say the same. A pair without such a task counts as 0.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_most_alike(most_alike):
    generator = random.Random(0)
    people = [[generator.choice("abc") if generator.random() < 0.5 else "right" for _ in range(60)] for _ in range(4)]
    touched = [generator.choices(("same", "right", "d"), (0.35, 0.6, 0.05))[0] for _ in range(60)]
    people.append([old if new == "same" else new for old, new in zip(people[1], touched, strict=True)])  # a copy
    people += [[generator.choice("ab") for _ in range(60)] for _ in range(2)]  # two who are always wrong
    people += [["right"] * 58 + end for end in (["x", "y"], ["y", "x"], ["right"] * 2)]  # and three good ones
    people.append(people[5][:6] + ["d"] + ["right"] * 53)  # and one with few mistakes, most of them another's as well
    points = np.array([[5 if word == "right" else 2 for word in words] for words in people])
    expect_equal("a copied one among eleven", tuple(map(int, most_alike(people, points))), (1, 4))
    order = [4, 7, 8, 0, 9, 1, 3, 5, 6, 10]
    shuffled = [people[i] for i in order]
    expect_equal("in another order", tuple(map(int, most_alike(shuffled, points[order]))), (0, 5))


check("17.4", check_most_alike, most_alike)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Two good submissions agree on most tasks without having seen each other: there is one right answer and many wrong ones. What do you divide by?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Equal right answers prove nothing. Equal wrong ones do, as a share of the tasks where both are wrong. The competition also asks how much of this is usual in the class, since a common base makes some mistakes common; and whether so many could be equal by chance, since one of one is a share of 1 too.
#
# ```python
# from itertools import combinations
#
#
# def most_alike(answers: Sequence[Sequence[str]], grades: np.ndarray) -> tuple[int, int]:
#     texts, share = np.array(answers), {}
#     for i, j in combinations(range(len(texts)), 2):
#         both = (grades[i] < 5) & (grades[j] < 5)
#         share[i, j] = (texts[i] == texts[j])[both].mean() if both.any() else 0.0
#     return max(share, key=share.get)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 17.5, open: a board that shows only what is clearly better. First write your guess.
PREDICTION = None  # by how much does the shown score of the Ladder pass the mean, after 200 equal submissions? (points)


def ladder(points: np.ndarray, step: float = 0.05) -> list[float]:
    """What the board shows after each submission; `points` (submissions, tasks) in the order in which they came.

    The first score is shown as it is. A later one is shown only if it is above the shown score by more than `step`,
    and by more than one standard error of the difference: std over the tasks (numpy's) of its grades minus those of the
    submission that is shown, divided by the root of the number of tasks. Until then the old score stays.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_ladder(ladder, prediction):
    rows = [[2, 3, 2, 3], [5, 1, 5, 1], [3, 4, 3, 4], [3, 4, 3, 4], [5, 5, 5, 5], [3, 3, 3, 3]]
    points = np.array(rows, dtype=float)
    expect_close("better by less than a standard error", ladder(points[:2]), [2.5, 2.5])
    expect_close("of six submissions", ladder(points), [2.5, 2.5, 3.5, 3.5, 5.0, 5.0])
    expect_close("one task better", ladder(np.array([[2, 2, 2, 2], [2, 2, 2, 3]])), [2.0, 2.25])
    expect_close("better everywhere", ladder(np.array([[1, 4, 1, 4], [1.5, 4.5, 1.5, 4.5]])), [2.5, 3.0])
    small = np.full((3, 100), 2.0) + np.array([[0.0], [0.04], [0.08]])
    expect_close("a step of 0.05", ladder(small), [2.0, 2.0, 2.08])
    expect_true("PREDICTION is a number, written before you measured", isinstance(prediction, int | float))
    equal = np.random.default_rng(1).choice([1.0, 2.0, 3.0, 4.0, 5.0], size=(20, 200, 50))
    shown = np.mean([ladder(board)[-1] - board.mean() for board in equal])
    best = np.mean([board.mean(1).max() - board.mean() for board in equal])
    print(f"you predicted {prediction:+.2f}; the Ladder shows {shown:+.2f}, a plain board {best:+.2f}")


check("17.5", check_ladder, ladder, PREDICTION)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Keep two things: the score that is shown, and the grades it rests on. Compare each new submission with those, and not with the one before.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# On 50 tasks and after 200 tries the check prints 0.50 points too much for the Ladder, and 0.58 for a plain board. So this board can be climbed by trying as well, almost as high: with so many tries some submission is lucky by more than a standard error. So the ranking itself is done on tasks that nobody could try.
#
# ```python
# PREDICTION = 0.5
#
#
# def ladder(points: np.ndarray, step: float = 0.05) -> list[float]:
#     kept, shown = points[0], []
#     for row in points:
#         error = (row - kept).std() / len(row) ** 0.5
#         if row.mean() > kept.mean() + max(step, error):
#             kept = row
#         shown.append(float(kept.mean()))
#     return shown
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **Why does the rubric take points from the whole answer, but give points only for what is left without the false sentences?**
#
# - A. It saves time
# - B. So that naming every possible answer does not earn full points
# - C. Because false sentences are longer
# - D. Because a program cannot read
#
# <details><summary>Answer</summary>
#
# B. An answer that says everything is right somewhere. It has to cost something to be wrong elsewhere. (A little it earns even so: section 1 copies every name for `list`.)
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the figure of section 6, how can the loss of DPO fall while the chosen answers sink?**
#
# - A. It cannot: the figure shows noise
# - B. The reference sinks too
# - C. The loss sees only the difference, and the rejected answers sink more
# - D. The penalty on the KL divergence makes it fall
#
# <details><summary>Answer</summary>
#
# C. $h_w - h_l$ grows when both fall and $h_l$ falls faster. The loss is content with that: it asks for the difference alone.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the figure of section 8 the intervals of two systems overlap. What follows?**
#
# - A. They are equally good
# - B. The one with the higher score is better for sure
# - C. One of them has cheated
# - D. Not much: the interval of their paired difference decides
#
# <details><summary>Answer</summary>
#
# D. Both systems met the same easy and hard tasks, and that part cancels in the difference. (Section 8 prints how much smaller the standard error gets, for two systems that are close.)
#
# </details>

# %% [markdown] tags=["quiz"]
# **You tried 30 settings on the public tasks and hand in the best. What do you expect on hidden tasks?**
#
# - A. A lower score than on the public ones
# - B. The same score
# - C. A higher score, because the model has adapted
# - D. The score of the base
#
# <details><summary>Answer</summary>
#
# A. On average: the best of many is partly lucky, and on new tasks the lucky part is gone. (In section 10 the hidden score is the higher one. Nothing was chosen there by the public tasks, and the hidden ones are another sample.) Choose on development tasks that you can make anew.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Why does the competition ask for weights, when it already has your answers?**
#
# - A. To train on them
# - B. Because the public answers can be written by hand, and only weights can answer tasks that come later
# - C. Because files of weights are smaller
# - D. To see who used which base
#
# <details><summary>Answer</summary>
#
# B. The forged folder of section 10 had a perfect score until its weights were asked.
#
# </details>

# %% [markdown]
# ## What we saw
#
# All numbers of this table were measured above, in this run. Those without *holds* are one run, and several of them lie at the end of what five seeds give (sections 5 and 6).

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# The same pipeline with the libraries: `trl.SFTTrainer` and `trl.DPOTrainer` with a `peft.LoraConfig` (lessons 05, 06 and 09 find them equal to the code here), and for a model of 13 billion parameters the base in 4 bits. What changes at scale:
#
# | here | with an open model of 1 to 13 billion parameters |
# |---|---|
# | a program grades | people grade, or a strong model with the task, a reference and the rubric in its prompt; ask it in both orders, and check it against people |
# | the rate of fine-tuning was too much for 36 steps of DPO | DPO is usually run at a tenth of the rate or less, for one to three epochs |
# | 100 tasks | the 100 of ELYZA-tasks-100 (`elyza/ELYZA-tasks-100` on the hub, CC BY-SA 4.0): as few; how wide the intervals are depends on how the grades spread, too |
# | `peft` reads an adapter | pin the revision of the base, and load the adapter on a fresh copy before you hand it in |
#
# With the profile `t4` or `large`, or with a `model_id`, the cells above have tuned an open model on the same tasks. A Japanese base such as `llm-jp/llm-jp-3-1.8b` is given as `model_id`, with its commit; if its tokenizer has no chat template, section 2 sets one. The cell below asks the tuned model the first tasks of ELYZA-tasks-100, where the hub can be reached, and writes the answers in the format of such competitions.

# %%
if machine.device != "cpu" and hub_is_reachable():
    elyza = load_rows("elyza/ELYZA-tasks-100", ["input", "output", "eval_aspect"], 8, split="test", seed=seed)
    with lesson.autocast():
        replies = answer_instructions(policy, tokenizer, elyza["input"], 200)
    both = enumerate(zip(elyza["input"], replies, strict=True))
    lines = [json.dumps({"task_id": i, "input": q, "output": a}, ensure_ascii=False) for i, (q, a) in both]
    (BUILD / "elyza.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(lines[0])
else:
    print("ELYZA-tasks-100 is asked on a GPU, where the hub can be reached.")

# %% [markdown]
# ## Read on
#
# - ELYZA, Inc. 2023, [*ELYZA-tasks-100*](https://huggingface.co/datasets/elyza/ELYZA-tasks-100): 100 open tasks in Japanese, each with what it is graded by. The rubric here follows its guideline.
# - Hu et al. 2022, [*LoRA: Low-Rank Adaptation of Large Language Models*](https://arxiv.org/abs/2106.09685); Keskar et al. 2019, [*CTRL*](https://arxiv.org/abs/1909.05858), section 4.1: the repetition penalty.
# - Rafailov et al. 2023, [*Direct Preference Optimization*](https://arxiv.org/abs/2305.18290), and Pal et al. 2024, [*Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive*](https://arxiv.org/abs/2402.13228): how the chosen answer loses probability.
# - Zheng et al. 2023, [*Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena*](https://arxiv.org/abs/2306.05685): biases of place, length and self; Dubois et al. 2024, [*Length-Controlled AlpacaEval*](https://arxiv.org/abs/2404.04475): taking length out by regression.
# - Blum and Hardt 2015, [*The Ladder: A Reliable Leaderboard for Machine Learning Competitions*](https://arxiv.org/abs/1502.04585): the boosting attack, and a board that resists it for longer.
