# %% [markdown]
# # 02 · Prompting and RAG: what a model can do before you train it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/02_prompting_and_rag.ipynb)
#
# You have a base language model and you may not change a single weight. What can you still change? The text that goes in. In this lesson you change it in two ways. First by the form of the prompt: examples, instructions, written steps, many samples, a search. Then by its content: you build a library and a retrieval system, so that the model can answer from passages which it has never read. Each change is measured with the same few lines of code.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. measure accuracy over the number of examples, and see what examples can and cannot teach;
# 2. see how much hangs on the format of a prompt, and when the order of the examples matters;
# 3. compare direct answers, written steps, self-consistency and a tree of thoughts, at equal tokens;
# 4. write BM25, a dense encoder with its contrastive loss, rank fusion and the measures of retrieval, and find them equal to `bm25s` and `scikit-learn`;
# 5. measure when retrieval helps, by how often a fact was seen in pretraining, when it hurts, and how often a cited passage supports the answer.
#
# **Prerequisites:** lesson 01, and PyTorch tensors.
#
# **The data** is text about *Shima*, an island made up by a seeded generator, so no model has read about it anywhere else. **The base model** is *shima-4m*, a small Llama pretrained on such text, which comes with the course. It has 1,000 people to know: the person of rank 1 is mentioned all the time, the person of rank 1,000 hardly ever.
#
# The parameters choose the model and the size of the measurements, and the settings cell holds all that depends on the hardware. On a CPU the model is shima-4m. On a GPU it is an open hub model, which knows nothing of Shima and has never seen its formats: compare.
#
# | symbol | meaning |
# |---|---|
# | $q$, $c$ | a question, a chunk of a document |
# | $N$, $n_w$ | number of chunks, number of chunks that contain word $w$ |
# | $k$ | number of samples, or of chunks taken from the top of a ranking |
# | $\tau$ | temperature of a softmax |

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
model_id = ""  # another model: a hub id, or a folder in hub format
encoder_id = ""  # "" trains the encoder of section 10; or for example
# "sentence-transformers/all-MiniLM-L6-v2@c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
seed = 0
budget = 1.0  # share of all questions and training steps; the lesson's claims are asserted from 1.0 on

# %%
import math
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import plots
from helpers.evaluation import Score, bootstrap_interval, exact_match, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import generate, sequence_log_probs
from helpers.lesson import Lesson
from helpers.models import load_model
from helpers.world import LABELS, RELATIONS, Question, World, ask
from recipes.base_model import Recipe

lesson = Lesson("02", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # texts that are decoded at once
    "cpu": {"batch_size": 128},
    "t4": {"batch_size": 256},
    "large": {"batch_size": 512},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# A few helpers for the whole lesson. `answer` continues a list of prompts, greedily unless told otherwise, up to the end of the line. `lesson.scaled` makes a number of questions smaller on a smaller budget. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep, `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
world = World()
model, tokenizer = load_model(machine)
WINDOW = model.config.get_text_config().max_position_embeddings


def num_tokens(texts: list[str]) -> list[int]:
    """Length of each text in tokens."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def fitting(prompt: str, room: int) -> str:
    """The end of a prompt that is longer than `room` tokens (shima-4m's are never), or the prompt."""
    ids = tokenizer(prompt)["input_ids"]
    return prompt if len(ids) <= room else tokenizer.decode(ids[16 - room :], skip_special_tokens=True)


def answer(prompts: list[str], max_new_tokens: int = 10, stop=("\n",), **sampling) -> list:
    """Continuations of the prompts, each up to a stop string."""
    prompts = [fitting(prompt, WINDOW - max_new_tokens) for prompt in prompts]
    return generate(model, tokenizer, prompts, max_new_tokens, stop=stop, batch_size=settings["batch_size"], **sampling)


# %% [markdown]
# ## 1 · A base model completes
#
# **Question.** You ask the model something that it knows. Does it matter how you ask?
#
# A base model was trained on one thing only: $p(x_t \mid x_1 \dots x_{t-1})$, the next token of a document. It does not answer and it does not obey; it goes on with the kind of text that you began. So take 100 facts about the best-known people of Shima and begin different kinds of text: the question format of its documents, a slightly different one, the question alone, an instruction, a role, and the chat format that assistants use. An answer counts if the first line is exactly right.

# %%
known = world.closed_book(lesson.scaled(100), seed, range(1, 101))
examples = world.closed_book(3, seed + 1, range(1, 101))


def asked(question: Question) -> str:
    """The bare question of an item."""
    return question.prompt.rsplit("Question: ", 1)[1].partition("\n")[0]


shots = "".join(f"{asked(example)}\n{example.answer}\n" for example in examples)
FRAMES = {
    "format of the documents": "Question: {}\nAnswer:",
    "Q and A": "Q: {}\nA:",
    "role, then the format": "You are a guide who knows everybody on Shima.\nQuestion: {}\nAnswer:",
    "instruction": "Answer the following question in one word. {}\n",
    "question alone": "{}\n",
    "question alone after 3 examples": shots + "{}\n",
}
prompts = {name: [frame.format(asked(question)) for question in known] for name, frame in FRAMES.items()}
if tokenizer.chat_template:
    chats = [[{"role": "user", "content": asked(question)}] for question in known]
    prompts["chat format"] = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
gold = [question.answer for question in known]
replies = {name: answer(texts, stop=("\n", "<|end|>")) for name, texts in prompts.items()}
frames = {name: exact_match(texts, gold) for name, texts in replies.items()}
print(f"asked: {asked(known[0])} (right: {gold[0]})")
for name, result in frames.items():
    print(f"{name:>32}: {result!s:32} first reply {replies[name][0]!r}")
alt = "Right answers for each way of asking: high in formats like the documents', zero for instruction and chat."
figure = plots.bars_with_intervals(frames, title="The same facts: the format decides", xlabel="right answers", alt=alt)
plots.show(figure)

# %%
for name in ("format of the documents", "instruction", "chat format"):
    if name in frames:
        lesson.report(f"known facts, {name}", str(frames[name]))
formatted, told = frames["format of the documents"].accuracy, frames["instruction"].accuracy
lesson.claim(
    "the documents' format is right at least 80 points more often than an instruction",
    formatted - told,
    at_least=0.8,
    form=".0%",
)

# %% [markdown]
# **What you see.** In the format of its documents the model knows all or nearly all of these facts, and a role in front of that format does no harm. After an instruction or a bare question it does what it learnt to do: it goes on with the text, and writes `Answer:` itself. Three examples without the format do not talk it out of that. The chat format, which it has never seen, gives nothing. None of this is missing knowledge. An instruction is a kind of text that was not in pretraining; lesson 05 adds it.
#
# ## 2 · Examples: what they teach
#
# **Question.** How many examples does a model need, and what do examples do?
#
# Zero-, one- and few-shot prompts hold 0, 1 or several solved examples before the question (Brown et al. 2020). Three tasks, all written as `word answer;` pairs:
#
# - **labels**: four words get arbitrary colours, which exist only in this prompt. The examples show the four in turn, so after $s$ of them the asked word has been shown with probability $\min(1, s/4)$;
# - **a known list**: word pairs such as `goat kid; hen chick;` of which pretraining had lists;
# - **an unknown list**: word pairs such as `flute bamboo;`, whose facts stand in the pretraining text as sentences, never as a list.

# %%
SHOTS = [0, 1, 2, 3, 4, 6, 8, 12, 16]
TASKS = {
    "labels": lambda n, shots: world.few_shot(n, seed, shots),
    "a known list": lambda n, shots: world.few_shot_function(n, seed, shots, held_out=False),
    "an unknown list": lambda n, shots: world.few_shot_function(n, seed, shots, held_out=True),
}


def pairs_accuracy(questions: list[Question]) -> Score:
    """Share of right continuations of `word answer;` prompts."""
    replies = answer([question.prompt for question in questions], 6, stop=(";", "\n"))
    return exact_match(replies, [question.answer for question in questions])


curves = {task: [] for task in TASKS}
with tqdm(total=len(TASKS) * len(SHOTS), desc="shots") as bar:
    for task, make in TASKS.items():
        for shots in SHOTS:
            curves[task].append(pairs_accuracy(make(lesson.scaled(100), shots)))
            bar.update()
print(f"{'shots':>5}" + "".join(f"{task:>30}" for task in curves))
for row, shots in enumerate(SHOTS):
    print(f"{shots:>5}" + "".join(f"{scores[row]!s:>30}" for scores in curves.values()))

# %%
alt = "Accuracy over the number of examples: labels rise until four, a known list is high, an unknown one at zero."
figure = plots.curve(
    {task: plots.scored_line(SHOTS, scores) for task, scores in curves.items()},
    title="Examples select what pretraining has learnt",
    xlabel="examples in the prompt",
    ylabel="right answers",
    alt=alt,
    percent=True,
    limits_y=(-0.02, 1.02),
    references={"chance for labels": 1 / len(LABELS)},
)
plots.show(figure)
at = {shots: curves["labels"][SHOTS.index(shots)] for shots in (0, 8, 16)}
replies = answer([question.prompt for question in TASKS["an unknown list"](lesson.scaled(100), 8)], 6, stop=(";", "\n"))
colours = np.mean([reply.strip() in LABELS for reply in replies])
print(f"unknown list, 8 examples: {colours:.0%} of the answers are colours")
lesson.claim("8 examples beat none by at least 50 points", at[8].accuracy - at[0].accuracy, at_least=0.5, form=".0%")
lesson.claim(
    "from 8 to 16 examples the accuracy moves by at most 5 points",
    abs(at[16].accuracy - at[8].accuracy),
    at_most=0.05,
    form=".0%",
)
for shots, result in at.items():
    lesson.report(f"labels given in the prompt, {shots} examples", str(result))
lesson.report("an unknown list, 16 examples", str(curves["an unknown list"][-1]))


# %% [markdown]
# **What you see.** With labels, accuracy follows the share of prompts in which the asked word has been shown, and from four examples on it stays at the top. The known list needs hardly any example: the prompt only has to say which list is meant. The unknown list stays at zero for any number of examples, although its facts are in the pretraining text: the model takes it for a game of labels and answers with colours. Examples select among the things that pretraining has practised. They do not teach a new one, at least not to this model; large models have practised far more.
#
# ## 3 · Format and order
#
# **Question.** You tell the model the same examples with other signs between them, or in another order. Does the answer change?
#
# First the signs. Eight words with a label each, every one shown once, in seven ways of writing them.

# %%
def label_games(n: int, num_words: int) -> list[tuple[list[tuple[str, str]], tuple[str, str]]]:
    """Pairs of words and labels, and the pair that is asked about."""
    rng = random.Random(f"games/{seed}/{num_words}")
    games = [[(word, rng.choice(LABELS)) for word in rng.sample(world.words, num_words)] for _ in range(n)]
    return [(pairs, rng.choice(pairs)) for pairs in games]


WAYS = {  # head, one pair, the open pair
    "Pairs: goat red; ...": ("Pairs: ", "{} {}; ", "{}"),
    "PAIRS: goat red; ...": ("PAIRS: ", "{} {}; ", "{}"),
    "Pairs: goat red, ...": ("Pairs: ", "{} {}, ", "{}"),
    "one pair a line": ("Pairs:\n", "{} {}\n", "{}"),
    "goat = red;": ("Pairs: ", "{} = {}; ", "{} ="),
    "goat: red, one a line": ("", "{}: {}\n", "{}:"),
    "Question: goat / Answer: red": ("", "Question: {}\nAnswer: {}\n", "Question: {}\nAnswer:"),
}
games = label_games(lesson.scaled(80), num_words=8)
ways = {}
for name, (head, pair, last) in WAYS.items():
    prompts = [head + "".join(pair.format(*shown) for shown in pairs) + last.format(key) for pairs, (key, _) in games]
    replies = answer(prompts, 6, stop=(";", ",", "\n"))
    ways[name] = exact_match(replies, [label for _, (_, label) in games])
    print(f"{name:>30}: {ways[name]!s:30} first reply {replies[0]!r}")
alt = "Accuracy for seven ways to write the same pairs: near 100 % close to the training format, else near zero."
figure = plots.bars_with_intervals(
    ways, title="The signs between examples decide", xlabel="right answers", alt=alt,
    references={"chance": 1 / len(LABELS)},
)  # fmt: skip
plots.show(figure)
best, worst = (pick(ways.values(), key=lambda s: s.accuracy) for pick in (max, min))
lesson.claim(
    "the best way of writing beats the worst by at least 50 points",
    best.accuracy - worst.accuracy,
    at_least=0.5,
    form=".0%",
)
lesson.report("eight labels, best and worst format", f"{best} and {worst}")


# %% [markdown]
# Now the order. Four words, each shown three times: twelve examples. In the first test all twelve are right. In the second the asked word has one example with a wrong label, as real examples often have; the majority is still two to one. Each of 20 random orders of the twelve places is given to the same games.

# %%
def with_one_mistake(pairs, asked_pair, rng) -> list[tuple[str, str]]:
    """Every pair three times, where the asked word once has another label; the wrong one stands last."""
    wrong = rng.choice([label for label in LABELS if label != asked_pair[1]])
    others = [pair for pair in pairs if pair != asked_pair for _ in range(3)]
    return [*others, asked_pair, asked_pair, (asked_pair[0], wrong)]


rng = random.Random(f"order/{seed}")
games = label_games(lesson.scaled(50), num_words=4)
dirty = [with_one_mistake(pairs, pair, rng) for pairs, pair in games]
clean = [[*shown[:-1], pair] for shown, (_, pair) in zip(dirty, games, strict=True)]
orders = [rng.sample(range(12), 12) for _ in range(20)]
by_order = {}
for name, sets in {"all examples right": clean, "one wrong label": dirty}.items():
    prompts = [
        " ".join(["Pairs:", *(f"{key} {label};" for key, label in (shown[i] for i in order)), pair[0]])
        for order in orders
        for shown, (_, pair) in zip(sets, games, strict=True)
    ]
    replies = answer(prompts, 6, stop=(";", "\n"))
    right = np.array([reply.strip() == pair[1] for reply, (_, pair) in zip(replies, games * len(orders), strict=True)])
    by_order[name] = right.reshape(len(orders), len(games)).mean(1)  # (orders,)
    print(f"{name:>20}: {by_order[name].min():.0%} to {by_order[name].max():.0%} over {len(orders)} orders")
place = [[order.index(i) for i in (9, 10, 11)] for order in orders]  # where the two right ones and the wrong one stand
turn = np.array([sorted(places).index(places[2]) for places in place])
for number, name in enumerate(("first", "second", "last")):
    print(f"wrong label {name} of the three: {by_order['one wrong label'][turn == number].mean():.0%} right")

# %%
alt = "Accuracy of 20 orders of the same examples, sorted: flat if all are right, a range with one wrong label."
figure = plots.curve(
    {name: (range(1, len(orders) + 1), sorted(shares)) for name, shares in by_order.items()},
    title="Order decides where the examples disagree",
    xlabel="orders of the same examples, from worst to best",
    ylabel="right answers",
    alt=alt,
    percent=True,
    limits_y=(-0.02, 1.02),
)
plots.show(figure)
spread = {name: shares.max() - shares.min() for name, shares in by_order.items()}
gap = spread["one wrong label"] - spread["all examples right"]
lesson.claim("one wrong example makes the order matter by at least 10 points more", gap, at_least=0.1, form=".0%")
for name, points in spread.items():
    lesson.report(f"worst to best of 20 orders, {name}", f"{100 * points:.0f} points")


# %% [markdown]
# **What you see.** A semicolon against a comma changes nothing, an equals sign changes everything: the model copies a label that stands right behind its key, and has learnt no other form. Order does nothing while all examples agree. As soon as one of them disagrees, the same twelve examples give different accuracies in different orders, and here it is the *first* of the three that carries too much weight. When two prompts differ by a few points, ask how many formats and orders were tried.
#
# ## 4 · Written steps
#
# **Question.** A sum of three numbers is two additions. What does the model gain if it may write the first one down?
#
# A transformer does a fixed amount of computation for each token. A direct answer has to come out of one pass; a chain of thought (Wei et al. 2022) spreads the work over many passes, and each step can read the one before. Shima's documents write sums both ways, so the prompt only has to begin the right one: `Answer:` or `Steps:`. The sums are ones that the training text never contains.

# %%
def final_answer(text: str) -> str:
    """What stands behind `Answer:` in a written solution."""
    return text.partition("Answer:")[2].partition("\n")[0].strip()


direct, stepwise = (world.sums(lesson.scaled(200), seed, with_steps=steps) for steps in (False, True))
gold = [question.answer for question in direct]
direct_replies = answer([question.prompt for question in direct], 8)
step_replies = answer([question.prompt for question in stepwise], 48, stop=("\nSum",))
steps = {
    "direct answer": exact_match(direct_replies, gold),
    "written steps": exact_match([final_answer(text) for text in step_replies], gold),
}
print(stepwise[0].prompt + step_replies[0])
for (name, result), replies in zip(steps.items(), (direct_replies, step_replies), strict=True):
    print(f"{name}: {result}, {np.mean(num_tokens(replies)):.0f} tokens written")
    lesson.report(f"sums of three numbers, {name}", str(result))
given = [(reply, right) for reply, right in zip(direct_replies, gold, strict=True) if reply.strip().isdigit()]
off = [abs(int(reply) - int(right)) for reply, right in given if int(reply) != int(right)]
print(f"a wrong direct answer is off by {np.median(off):.0f} in the median" if off else "no wrong answer is a number")
alt = "Accuracy of direct answers and of written steps, with intervals: steps are far ahead."
title = "Written steps turn guessing into computing"
plots.show(plots.bars_with_intervals(steps, title=title, xlabel="right sums", alt=alt))
gap = steps["written steps"].accuracy - steps["direct answer"].accuracy
lesson.claim("written steps beat direct answers by at least 30 points", gap, at_least=0.3, form=".0%")

# %% [markdown]
# **What you see.** The same weights, the same sums, and a gap of far more than 30 points. The direct answers are not random: the wrong ones are off by a little, as by somebody who estimates. The price is about eight times as many written tokens.
#
# ## 5 · Self-consistency
#
# **Question.** A sampled solution is sometimes wrong. Do several samples help, and what do they cost?
#
# Sample $k$ solutions, throw the steps away, and return the answer that comes most often (Wang et al. 2022):
#
# $$\hat{a} = \arg\max_a \sum_{i=1}^{k} \mathbb{1}[a_i = a]$$
#
# This marginalises over the ways to an answer. If the right answer is the most probable one, a vote finds it more often than one sample does. If it is not, no vote finds it. So there are three sets: sums of three numbers with written steps, the same sums answered directly, and sums of *four* numbers, which pretraining never showed.
#
# With steps shima-4m is too good for this experiment: at temperature 1 there is next to nothing to repair. So the samples are drawn at 1.5, which makes them err. To estimate the accuracy at each $k$ without luck, votes are drawn many times from one pool of samples.

# %%
TEMPERATURE, POOL = 1.5, 16


def long_sums(n: int) -> list[list[int]]:
    """Four numbers each, so small that all partial sums stay in the range that pretraining covers."""
    rng = random.Random(f"four numbers/{seed}")
    return [[rng.randint(10, 49) for _ in range(4)] for _ in range(n)]


def vote(answers: list[str]) -> str:
    """The most frequent answer; of equally frequent ones the first. Solutions without an answer do not vote."""
    counts = Counter(text for text in answers if text)
    return counts.most_common(1)[0][0] if counts else ""


three = [[int(number) for number in re.findall(r"\d+", question.prompt)] for question in stepwise[: lesson.scaled(80)]]
PROBLEMS = {"three numbers": three, "three numbers, direct": three, "four numbers": long_sums(lesson.scaled(40))}
pools = {}
for name, problems in PROBLEMS.items():
    ending = "Answer:" if "direct" in name else "Steps:"
    prompts = [f"Sum: {' + '.join(map(str, numbers))}\n{ending}" for numbers in problems]
    sampling = {"max_new_tokens": 6 if "direct" in name else 48, "stop": ("\n",) if "direct" in name else ("\nSum",)}
    drawn = answer(prompts, temperature=TEMPERATURE, num_samples=POOL, seed=seed, **sampling)
    greedy = answer(prompts, **sampling)
    read = (lambda text: text.strip()) if "direct" in name else final_answer
    pools[name] = {"texts": drawn, "answers": [[read(text) for text in samples] for samples in drawn]}
    result = exact_match([read(text) for text in greedy], [str(sum(numbers)) for numbers in problems])
    print(f"{name}: greedy {result}; a sample: {drawn[0][0].strip()!r}")


# %%
def vote_shares(name: str, k: int, draws: int = 20) -> np.ndarray:
    """For each problem, the share of votes of k samples from its pool that are right: (problems,)."""
    rng = random.Random(f"votes/{seed}/{k}")
    votes = [[vote(rng.sample(found, k)) for _ in range(draws)] for found in pools[name]["answers"]]
    return np.array([np.mean([v == str(sum(p)) for v in vs]) for vs, p in zip(votes, PROBLEMS[name], strict=True)])


K = [1, 2, 3, 5, 8, 12, 16]
LINES = {"three numbers": "with steps", "three numbers, direct": "direct answers", "four numbers": "four numbers"}
series = {}
for name, label in LINES.items():
    shares = [vote_shares(name, k) for k in K]
    ends = [bootstrap_interval(values, seed=seed, resamples=500) for values in shares]
    series[label] = (K, [values.mean() for values in shares], *zip(*ends, strict=True))
written = {name: np.mean([num_tokens(samples) for samples in pool["texts"]]) for name, pool in pools.items()}
print(f"{'k':>3} {'tokens':>7}" + "".join(f"{label:>22}" for label in series))
for row, k in enumerate(K):
    points = [(mean[row], low[row], high[row]) for _, mean, low, high in series.values()]
    shares = "".join(f"{mean:>8.0%} ({low:4.0%} to {high:4.0%})" for mean, low, high in points)
    print(f"{k:>3} {k * written['three numbers']:>7.0f}{shares}")
alt = "Accuracy of the vote over the number of samples: steps rise and flatten, the other two stay low."
figure = plots.curve(
    series, title="A vote removes random mistakes, not systematic ones", xlabel="samples k", ylabel="right sums",
    alt=alt, percent=True, limits_y=(-0.02, 1.02),
)  # fmt: skip
plots.show(figure)
votes_at = dict(zip(K, series["with steps"][1], strict=True))
lesson.claim(
    "a vote of 8 samples gains at least 10 points over one sample", votes_at[8] - votes_at[1], at_least=0.1, form=".0%"
)
lesson.claim(
    "from 8 to 16 samples it gains at most 5 points more", votes_at[16] - votes_at[8], at_most=0.05, form=".0%"
)
lesson.report(
    "self-consistency at temperature 1.5, k = 1 / 8 / 16", " / ".join(f"{votes_at[k]:.0%}" for k in (1, 8, 16))
)


# %% [markdown]
# **What you see.** With steps the vote rises from the first samples on, and saturates before $k = 8$: what the temperature broke, the vote repairs. It does not get better than the greedy answer was, and it costs $k$ times as much. Direct answers gain little, since the right one is seldom the most frequent. And with four numbers all samples leave one number out, in the same way, so there is nothing for a vote to choose. A vote removes random mistakes and keeps systematic ones.
#
# ## 6 · A tree of thoughts
#
# **Question.** Self-consistency throws whole solutions away for one wrong step. What if you judge each step as it is written, and go on only from good ones?
#
# A tree of thoughts (Yao et al. 2023) needs three parts, and here each is a prompt to the same model:
#
# - a **thought** is one partial sum: the program writes `12 + 7 =` and the model proposes $m$ results, sampled;
# - a **value** for each: the log-probability of that result when the model is asked in another format, `Sum: 12 + 7`, `Answer:`. Two formats are two opinions. Only numbers of at most three digits are asked about;
# - a **search**: keep the best $b$ partial solutions after every step (breadth-first, a beam).
#
# Everything costs tokens: those the model reads and those it writes. The budget is stated beforehand, **200 tokens for each problem of three numbers**, and self-consistency may spend as much.

# %%
def tree_of_thoughts(problems: list[list[int]], proposals: int, breadth: int) -> tuple[list[str], np.ndarray]:
    """The final answers, and the tokens read and written for each problem."""
    heads = [f"Sum: {' + '.join(map(str, numbers))}\nSteps:" for numbers in problems]
    beams = [[(0.0, head, numbers[0])] for head, numbers in zip(heads, problems, strict=True)]  # (value, text, total)
    tokens = np.zeros(len(problems))
    for step in range(1, len(problems[0])):
        nodes = [
            (problem, value, f"{text}{';' if step > 1 else ''} {total} + {problems[problem][step]} =", total)
            for problem, beam in enumerate(beams)
            for value, text, total in beam
        ]
        texts = [text for _, _, text, _ in nodes]
        drawn = answer(texts, 6, stop=(";", "\n"), temperature=TEMPERATURE, num_samples=proposals, seed=seed)
        drawn = drawn if proposals > 1 else [[text] for text in drawn]
        children = [
            (problem, value, text, f"Sum: {total} + {problems[problem][step]}\nAnswer:", result)
            for (problem, value, text, total), results in zip(nodes, drawn, strict=True)
            for result in sorted({r.strip() for r in results if r.strip().isdigit() and len(r.strip()) < 4})
        ]
        second_asks, results_again = [child[3] for child in children], [f" {child[4]}\n" for child in children]
        worth = sequence_log_probs(model, tokenizer, second_asks, results_again).tolist()
        for (problem, *_), read, results in zip(nodes, num_tokens(texts), drawn, strict=True):
            tokens[problem] += read + sum(num_tokens(results)) + len(results)
        if breadth * proposals > 1:  # where there is nothing to choose from, no value is needed
            for child, read in zip(children, num_tokens([f"{c[3]} {c[4]}\n" for c in children]), strict=True):
                tokens[child[0]] += read
        beams = [[] for _ in problems]
        for (problem, value, text, _, result), gain in zip(children, worth, strict=True):
            beams[problem].append((value + gain, f"{text} {result}", int(result)))
        beams = [sorted(beam, reverse=True)[:breadth] for beam in beams]
    return [str(beam[0][2]) if beam else "" for beam in beams], tokens


# %%
TOKEN_BUDGET = 200
comparison, spent = {}, {}
for name in ("three numbers", "four numbers"):
    problems, samples = PROBLEMS[name], pools[name]["answers"]
    gold = [str(sum(numbers)) for numbers in problems]
    read = np.mean(num_tokens([f"Sum: {' + '.join(map(str, numbers))}\nSteps:" for numbers in problems]))
    single, single_tokens = tree_of_thoughts(problems, proposals=1, breadth=1)
    tree, tree_tokens = tree_of_thoughts(problems, proposals=4, breadth=2)
    k = int(min(POOL, max(1, (tree_tokens.mean() - read) // written[name])))  # samples for the same tokens
    votes = [vote(found[:k]) for found in samples]
    rows = {
        "one sample": ([found[0] for found in samples], read + written[name]),
        "self-consistency": (votes, read + k * written[name]),
        "step by step, no search": (single, single_tokens.mean()),
        "tree of thoughts": (tree, tree_tokens.mean()),
    }
    comparison[f"{name} to add"] = {method: exact_match(answers, gold) for method, (answers, _) in rows.items()}
    spent[name] = {method: cost for method, (_, cost) in rows.items()}
    for method, (answers, cost) in rows.items():
        print(f"{name}, {method:>24}: {exact_match(answers, gold)!s:30} {cost:4.0f} tokens a problem")
    print(f"self-consistency has k = {k} samples here")
used = spent["three numbers"]["tree of thoughts"] / TOKEN_BUDGET
lesson.claim("on three numbers the tree keeps to the budget of tokens", used, at_most=1, form=".0%")
alt = "Accuracy of one sample, self-consistency, single steps and the tree for sums of three and of four numbers."
title = "At equal tokens the tree beats the vote"
plots.show(plots.bars_with_intervals(comparison, title=title, xlabel="right sums", alt=alt))
four = comparison["four numbers to add"]
lead = comparison["three numbers to add"]
gain = lead["tree of thoughts"].accuracy - lead["step by step, no search"].accuracy
lesson.claim("on three numbers the search gains at least 5 points over single steps", gain, at_least=0.05, form=".0%")
ahead = four["tree of thoughts"].accuracy - four["self-consistency"].accuracy
lesson.claim(
    "on four numbers the tree beats self-consistency at equal tokens by at least 30 points",
    ahead,
    at_least=0.3,
    form=".0%",
)
for name, results in comparison.items():
    for method in ("self-consistency", "tree of thoughts"):
        lesson.report(f"{name}, {method} at equal tokens", str(results[method]))


# %% [markdown]
# **What you see.** For sums of three numbers and the same tokens, a judgement after every step is worth at least as much as more whole solutions: one wrong step no longer spoils the rest. For four numbers the largest part of the gain comes without any search, from the program that says which step is next, and the search does the rest. That is the honest reading of such methods: separate what the decomposition gives from what the search gives, and count the tokens of both.
#
# ## 7 · A library, cut into chunks
#
# So far the prompt changed how the model uses what it knows. Now change what it can know. **Retrieval-augmented generation** (RAG; Lewis et al. 2020) looks for passages that may hold the answer and puts them in front of the question:
#
# $$p(a \mid q) = p_\theta\big(a \mid c_1 \dots c_k, q\big), \qquad c_1 \dots c_k = \text{the top } k \text{ of a ranking of all chunks for } q$$
#
# The library below has a page on each of the 1,000 people, pages on 750 people who do *not* occur in pretraining, stories, and a guest book whose entries name a writer but tell nothing about them. The questions come in four groups, by how often pretraining mentioned the person, all asked in words that neither pretraining nor the library uses. **How often was a fact seen?** The cell counts names in a sample of the text that shima-4m was trained on, and scales up to all of it.

# %%
def make_library(seed: int) -> tuple[list[str], list[Question]]:
    """Documents, and a question about a stranger for each page on strangers."""
    rng = random.Random(f"library/{seed}")
    pages = [world.describe(rng, person) for person in world.people]
    on_strangers = world.open_book(250, seed + 500)
    pages += [question.prompt.partition("Question:")[0].strip() for question in on_strangers]
    pages += [story.strip() for story in islice(world.documents(seed + 700, {"story": 1.0}), lesson.scaled(600))]
    writers = rng.sample(
        [person.name for person in world.people for _ in range(3)], lesson.scaled(3 * len(world.people))
    )
    entries = [f"{writer} signed the guest book. {writer} wrote: {world.review(rng)[0]}" for writer in writers]
    pages += ["\n".join(entries[start : start + 4]) for start in range(0, len(entries), 4)]
    forms = [rng.choice(RELATIONS[str(q.about["relation"])].held_out_questions) for q in on_strangers]
    questions = [
        replace(q, prompt=ask(form.format(name=q.about["name"]))) for q, form in zip(on_strangers, forms, strict=True)
    ]
    return rng.sample(pages, len(pages)), questions


library, about_strangers = make_library(seed)
BANDS = {"rank 1 to 100": range(1, 101), "rank 101 to 500": range(101, 501), "rank 501 to 1,000": range(501, 1001)}
bands = {name: world.closed_book(lesson.scaled(80), seed + 2, ranks) for name, ranks in BANDS.items()}
bands["not in pretraining"] = about_strangers[: lesson.scaled(80)]
questions = [question for band in bands.values() for question in band]
print(f"{len(library):,} documents, {sum(len(page.split()) for page in library):,} words, {len(questions)} questions")
for page in library[:3]:
    print("-", page.replace("\n", "\n  "))
recipe, sample = Recipe(), list(islice(world.documents(Recipe.documents_seed), lesson.scaled(3000)))
documents_read = recipe.steps * recipe.batch_size * recipe.sequence_length / np.mean(num_tokens(sample))
found = Counter(name for text in sample for name in re.findall(r"\b[A-Z]\w{5}\b", text) if name in world.person)
told = sum(found.values()) / len(sample) * documents_read / 5  # a person has five facts, each mention tells one
seen = {
    name: told * np.mean([world.mention_probability(world.people[rank - 1]) for rank in ranks])
    for name, ranks in BANDS.items()
}
seen["not in pretraining"] = 0.0
for name, times in seen.items():
    print(f"{name:>20}: each fact was told about {times:6.1f} times")


# %% [markdown]
# A page is often longer than what should go into a prompt. So it is cut into **chunks** of a fixed number of words. A cut may go through the middle of a sentence and destroy a fact. If neighbouring chunks share $o$ words, then every run of up to $o + 1$ words is whole in some chunk. Shima's facts have 4 to 10 words.

# %%
def cut(text: str, size: int, overlap: int) -> list[str]:
    """Chunks of `size` words; neighbours share `overlap` words."""
    words = text.split()
    return [" ".join(words[start : start + size]) for start in range(0, max(1, len(words) - overlap), size - overlap)]


def states(text: str, question: Question, value: str | None = None) -> bool:
    """Whether the text says, in one whole sentence, the fact that is asked for (or the same with another value)."""
    forms = RELATIONS[str(question.about["relation"])].statements
    return any(form.format(name=question.about["name"], value=value or question.answer) in text for form in forms)


SIZE, OVERLAP = 20, 10
chunks = [chunk for page in library for chunk in cut(page, SIZE, OVERLAP)]
page = next(page for page in library if page.count(world.people[0].name) == 5)
print(page, *cut(page, SIZE, OVERLAP), sep="\n  | ")
print(f"\n{len(chunks):,} chunks of {SIZE} words with an overlap of {OVERLAP}")


# %% [markdown]
# ## 8 · BM25
#
# **Question.** Which chunks share words with the question, if rare words count more than common ones?
#
# BM25 (Robertson & Zaragoza 2009) scores a chunk $c$ by the words of the question in it. A word's weight is its rarity; its count $f_{w,c}$ saturates, so that the tenth occurrence adds less than the first; and long chunks, which contain more of everything, are damped ($|c|$ words, $\overline{|c|}$ on average):
#
# $$s(q, c) = \sum_{w \in q} \underbrace{\ln\!\left(1 + \frac{N - n_w + \frac12}{n_w + \frac12}\right)}_{\text{rarity}} \cdot \frac{f_{w,c}}{f_{w,c} + k_1 \left(1 - b + b \, |c| / \overline{|c|}\right)}, \qquad k_1 = 1.5,\; b = 0.75$$
#
# Nothing in it depends on the question but the choice of words, so the terms are computed once and stored with each word.

# %%
def words_of(text: str) -> list[str]:
    """Words in small letters."""
    return re.findall(r"\w+", text.lower())


class BM25:
    """An inverted index: for each word the chunks that contain it, and what it adds to their scores."""

    def __init__(self, texts: list[str], k1: float = 1.5, b: float = 0.75):
        counts = [Counter(words_of(text)) for text in texts]
        lengths = np.array([count.total() for count in counts])
        damping = k1 * (1 - b + b * lengths / lengths.mean())  # (chunks,)
        postings = defaultdict(list)
        for chunk, count in enumerate(counts):
            for word, occurrences in count.items():
                postings[word].append((chunk, occurrences))
        self.num_chunks, self.postings = len(texts), {}
        for word, entries in postings.items():
            where, occurrences = np.array(entries).T
            rarity = math.log(1 + (len(texts) - len(where) + 0.5) / (len(where) + 0.5))
            self.postings[word] = where, rarity * occurrences / (occurrences + damping[where])

    def scores(self, query: str) -> np.ndarray:
        """Score of every chunk: (chunks,)."""
        total = np.zeros(self.num_chunks)
        for word in words_of(query):
            where, gains = self.postings.get(word, ([], 0.0))
            total[where] += gains
        return total


# %%
import bm25s

bm25 = BM25(chunks)
library_bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
library_bm25.index([words_of(chunk) for chunk in chunks], show_progress=False)
queries = [asked(question) for question in questions]
difference = max(np.abs(bm25.scores(q) - library_bm25.get_scores(words_of(q))).max() for q in queries[:20])
print(f"largest difference to a score of bm25s: {difference:.1e}")
assert difference < 1e-4
lesson.report("our BM25 against bm25s, largest difference", f"{difference:.1e}")
DEPTH = 50  # how much of a ranking is kept


def top(scores: np.ndarray, k: int = DEPTH) -> list[int]:
    """The k chunks with the highest scores, the best first; of equal scores the earlier chunk."""
    return np.argsort(-scores, kind="stable")[:k].tolist()


print(queries[-1])
for chunk in top(bm25.scores(queries[-1]), 5):
    print(f"  {bm25.scores(queries[-1])[chunk]:5.2f}  {chunks[chunk]}")


# %% [markdown]
# The rare name pulls all chunks about the right person to the top. But the question's other words do not help much: it says "lives", the page may say "has a house in".
#
# **What size should a chunk have?** Give the model 80 words from the top of BM25's ranking, whatever the size of a chunk, and ask about people whom it does not know.

# %%
def reading_prompt(passages: list[str], question: Question) -> str:
    """Passages, one a line, and then the question: the form of Shima's passages."""
    return "\n".join([*passages, ask(asked(question))])


CUTS = [(10, 0), (10, 5), (20, 0), (20, 10), (40, 0), (40, 20), (80, 0), (80, 40)]
strangers = bands["not in pretraining"][: lesson.scaled(60)]
gold = [question.answer for question in strangers]
chunk_answers = {}
for size, overlap in tqdm(CUTS, desc="cuts"):
    pieces = [chunk for page in library for chunk in cut(page, size, overlap)]
    index = BM25(pieces)
    picked = [[pieces[i] for i in top(index.scores(asked(question)), 80 // size)] for question in strangers]
    given = list(zip(picked, strangers, strict=True))
    whole = np.mean([any(states(piece, question) for piece in found) for found, question in given])
    chunk_answers[size, overlap] = result = exact_match(answer([reading_prompt(*pair) for pair in given]), gold)
    print(
        f"{size:>2} words, overlap {overlap:>2}: {len(pieces):>6,} chunks; "
        f"the 80 words hold the whole fact for {whole:>4.0%}; right answers {result}"
    )
series = {}
for label, share in {"no overlap": 0, "half overlaps": 0.5}.items():
    series[label] = plots.scored_line(
        (10, 20, 40, 80), [chunk_answers[size, int(share * size)] for size in (10, 20, 40, 80)]
    )
alt = "Right answers over the size of a chunk: without overlap short chunks lose facts, with overlap they lose fewer."
figure = plots.curve(
    series, title="Overlap rescues the facts that a cut destroys", xlabel="words in a chunk", ylabel="right answers",
    alt=alt, log_x=True, percent=True,
)  # fmt: skip
plots.show(figure)
gain = chunk_answers[20, 10].accuracy - chunk_answers[20, 0].accuracy
lesson.claim("with 20 words a chunk, overlap gains at least 5 points", gain, at_least=0.05, form=".0%")
for overlap in (0, 10):
    lesson.report(f"strangers' facts, chunks of 20 words, overlap {overlap}", str(chunk_answers[20, overlap]))


# %% [markdown]
# **What you see.** Without overlap, a cut goes through many facts, and small chunks lose many of them. An overlap as long as the longest fact keeps them all, for twice as many chunks. The answers are somewhat better than the share of whole facts, because half a sentence is sometimes enough.
#
# ## 9 · Measures of a ranking
#
# Answers depend on the reader too. To judge a ranking alone, mark which chunks are relevant (here: they state the fact) and compute, for the relevant set $R$ and the ranking $c_1, c_2, \dots$ with $\text{rel}_i \in \{0, 1\}$:
#
# $$\text{recall@}k = \frac{|R \cap \{c_1 \dots c_k\}|}{|R|}, \qquad \text{MRR} = \text{mean over questions of } \frac{1}{\text{rank of the first relevant one}}, \qquad \text{nDCG@}k = \frac{\sum_{i \le k} \text{rel}_i / \log_2(i + 1)}{\sum_{i \le \min(k, |R|)} 1 / \log_2(i + 1)}$$
#
# Recall asks what reaches the reader, MRR how soon the first useful chunk comes, nDCG looks at all of them and discounts late ones.

# %%
def recall_at(k: int, ranking: list[int], relevant: set[int]) -> float:
    """Share of the relevant chunks among the first k."""
    return len(relevant.intersection(ranking[:k])) / len(relevant)


def reciprocal_rank(ranking: list[int], relevant: set[int]) -> float:
    """1 / rank of the first relevant chunk, and 0 if none is ranked."""
    return next((1 / rank for rank, chunk in enumerate(ranking, start=1) if chunk in relevant), 0.0)


def ndcg_at(k: int, ranking: list[int], relevant: set[int]) -> float:
    """Discounted gain of the first k, as a share of the best possible."""
    gains = [1 / math.log2(rank + 1) for rank in range(1, k + 1)]
    reached = sum(gain for gain, chunk in zip(gains, ranking, strict=False) if chunk in relevant)
    return reached / sum(gains[: len(relevant)])


MEASURES = {
    "recall@1": lambda *pair: recall_at(1, *pair),
    "recall@5": lambda *pair: recall_at(5, *pair),
    "MRR": reciprocal_rank,
    "nDCG@10": lambda *pair: ndcg_at(10, *pair),
}
chunks_with = {word: set(where.tolist()) for word, (where, _) in bm25.postings.items()}
relevant = [
    {i for i in chunks_with[question.about["name"].lower()] if states(chunks[i], question)} for question in questions
]
rankings = {"BM25": [top(bm25.scores(query)) for query in queries]}
print(f"{np.mean([len(r) for r in relevant]):.1f} relevant chunks a question")
assert all(relevant)  # the overlap keeps every fact whole

# %%
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, recall_score


def library_measures(rankings: list[list[int]], relevant: list[set[int]]) -> dict[str, float]:
    """The same four with scikit-learn, which wants a row of labels and a row of scores for each question."""
    labels = np.zeros((len(rankings), len(chunks)), dtype=int)
    first, scores = labels.copy(), labels.astype(float)
    for row, (ranking, right) in enumerate(zip(rankings, relevant, strict=True)):
        labels[row, list(right)] = 1
        scores[row, ranking] = 1 / np.arange(1, len(ranking) + 1)
        first[row, next((i for i in ranking if i in right), ranking[-1])] = 1  # average precision of one = 1 / its rank
    recalls = {k: recall_score(labels, scores >= 1 / k, average="samples") for k in (1, 5)}
    mrr = label_ranking_average_precision_score(first, scores)
    return {"recall@1": recalls[1], "recall@5": recalls[5], "MRR": mrr, "nDCG@10": ndcg_score(labels, scores, k=10)}


rows = [row for row in range(0, len(questions), 4) if reciprocal_rank(rankings["BM25"][row], relevant[row])]
subset = [rankings["BM25"][row] for row in rows], [relevant[row] for row in rows]
theirs = library_measures(*subset)
for name, measure in MEASURES.items():
    ours = np.mean([measure(*pair) for pair in zip(*subset, strict=True)])
    print(f"{name:>9}: {ours:.6f}, scikit-learn {theirs[name]:.6f}")
    assert abs(ours - theirs[name]) < 1e-9
lesson.report("our recall, MRR and nDCG against scikit-learn", "equal")


# %% [markdown]
# ## 10 · A dense encoder, trained by contrast
#
# **Question.** BM25 does not know that "lives" and "has a house" belong together. Can that be learnt?
#
# A dense retriever (Karpukhin et al. 2020) maps question and chunk to unit vectors and ranks by their product. It is trained on pairs: a question $q_i$ and a chunk $c_i$ that answers it. The other chunks of the batch serve as wrong ones, which costs nothing (*in-batch negatives*; van den Oord et al. 2018):
#
# $$\mathcal{L} = -\frac1B \sum_{i=1}^{B} \ln \frac{\exp(q_i \cdot c_i / \tau)}{\sum_{j=1}^{B} \exp(q_i \cdot c_j / \tau)}$$
#
# The training pairs are about the people of *another* island, a world with another seed: no name that is asked about later is in them. A batch holds three questions on each person, so that a name alone does not solve it.
#
# The encoder is the smallest that can do it: one vector and one weight for each token, shared by questions and chunks. The weights say which tokens count, and the text's vector is the weighted mean.

# %%
class Encoder(nn.Module):
    """Texts to unit vectors: a mean of token vectors, weighted by a learnt weight of each token."""

    def __init__(self, vocab_size: int, size: int = 128):
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(torch.randn(vocab_size, size) * size**-0.5, freeze=False)
        self.weights = nn.Embedding.from_pretrained(torch.zeros(vocab_size, 1), freeze=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = self.weights(input_ids).squeeze(-1).masked_fill(attention_mask == 0, -torch.inf).softmax(-1)
        return F.normalize((weights[..., None] * self.vectors(input_ids)).sum(1), dim=-1)  # (batch, size)


def contrastive_loss(questions: Tensor, chunks: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss above for unit vectors (batch, size) and (batch, size), where row i belongs to row i."""
    similarity = questions @ chunks.T / temperature  # (batch, batch)
    return F.cross_entropy(similarity, torch.arange(len(questions), device=similarity.device))


def training_pairs(island: World, rng: random.Random, num_people: int) -> tuple[list[str], list[str]]:
    """Three questions on each person with a chunk that answers it, alone or beside another fact."""
    asks, tells = [], []
    for person in rng.sample(island.people, num_people):
        forms = {relation: rng.choice(form.training_statements) for relation, form in RELATIONS.items()}
        said = {name: form.format(name=person.name, value=person.facts[name]) for name, form in forms.items()}
        for relation in rng.sample(list(RELATIONS), 3):
            asks.append(rng.choice(RELATIONS[relation].training_questions).format(name=person.name))
            beside = [said[other] for other in rng.sample(list(RELATIONS), rng.randint(0, 1)) if other != relation]
            tells.append(" ".join(rng.sample([said[relation], *beside], 1 + len(beside))))
    return asks, tells


# %%
def tokenise(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Padded token ids and their mask, each (batch, seq)."""
    batch = tokenizer(texts, padding=True, return_tensors="pt").to(machine.device)
    return batch["input_ids"], batch["attention_mask"]


def train_encoder(steps: int) -> tuple[Encoder, list[float]]:
    """Train with Adam on fresh pairs at every step; returns the encoder and the losses."""
    torch.manual_seed(seed)
    encoder, island, rng = Encoder(len(tokenizer)).to(machine.device), World(seed + 1), random.Random(seed)
    optimizer, losses = torch.optim.Adam(encoder.parameters()), []
    for step in tqdm(range(steps), desc="contrastive training"):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        asks, tells = training_pairs(island, rng, num_people=64)
        loss = contrastive_loss(encoder(*tokenise(asks)), encoder(*tokenise(tells)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return encoder, losses


started = time.perf_counter()
encoder, losses = train_encoder(lesson.scaled(300))
print(f"{time.perf_counter() - started:.1f} s; loss {losses[0]:.2f} -> {losses[-1]:.2f}; chance {math.log(3 * 64):.2f}")
assert time.perf_counter() - started < 60


# %%
def load_pretrained_encoder(name: str):
    """A sentence-transformers model as they use it: the mean of the last vectors, scaled to length 1."""
    from transformers import AutoModel, AutoTokenizer

    name, _, revision = name.partition("@")
    own_tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or None, model_max_length=256)
    body = AutoModel.from_pretrained(name, revision=revision or None, use_safetensors=True).to(machine.device).eval()

    def encode_batch(texts: list[str]) -> Tensor:
        batch = own_tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(machine.device)
        vectors, mask = body(**batch).last_hidden_state, batch["attention_mask"][..., None]  # (batch, seq, size)
        return F.normalize(((vectors * mask).sum(1) / mask.sum(1)).float(), dim=-1)

    return encode_batch


encode_batch = load_pretrained_encoder(encoder_id) if encoder_id else lambda texts: encoder(*tokenise(texts))


@torch.no_grad()
def encode(texts: list[str]) -> Tensor:
    """Unit vectors (texts, size)."""
    return torch.cat([encode_batch(texts[start : start + 512]).cpu() for start in range(0, len(texts), 512)])


vectors = encode(chunks)  # (chunks, size)
similarity = (encode(queries) @ vectors.T).numpy()  # (questions, chunks)
rankings["dense"] = [top(row) for row in similarity]
print(queries[-1])
for chunk in rankings["dense"][-1][:5]:
    print(f"  {similarity[-1, chunk]:5.2f}  {chunks[chunk]}")


# %% [markdown]
# ## 11 · Fusion and reranking
#
# **Question.** One retriever is good at names, the other at meaning. How do you join two scores that have nothing in common?
#
# By rank. **Reciprocal rank fusion** (Cormack et al. 2009) needs no training and no scaling:
#
# $$s(c) = \sum_{\text{rankings } r} \frac{1}{60 + \text{rank}_r(c)}$$
#
# A **reranker** then looks at question and chunk together, which is slower, so it only sees the head of the ranking. Here the language model itself does it, without any training. It reads each chunk alone and answers. A chunk is good if that answer $\hat{a}$ really stands in it; otherwise the model has guessed, or remembered:
#
# $$s(c) = \mathbb{1}\big[\hat{a}(c, q) \text{ occurs in } c\big]$$
#
# Good chunks go ahead of the others; among equals the order of the fusion stays.

# %%
def fuse(ranked_lists: list[list[int]], constant: int = 60) -> list[int]:
    """Chunks by the sum of their reciprocal ranks; of equal sums the one met first."""
    sums = defaultdict(float)
    for ranking in ranked_lists:
        for rank, chunk in enumerate(ranking, start=1):
            sums[chunk] += 1 / (constant + rank)
    return sorted(sums, key=lambda chunk: -sums[chunk])[:DEPTH]


assert fuse([[7, 8, 9], [9, 7, 5]]) == [7, 9, 8, 5]  # 1/61 + 1/62; 1/63 + 1/61; 1/62; 1/63
rankings["hybrid"] = [fuse(list(pair)) for pair in zip(rankings["BM25"], rankings["dense"], strict=True)]


def rerank(rankings: list[list[int]], head: int = 6) -> list[list[int]]:
    """Of the first `head` chunks, those ahead that hold what the model answers from them alone."""
    pairs = [(chunks[i], query) for query, ranking in zip(queries, rankings, strict=True) for i in ranking[:head]]
    guesses = answer([f"{chunk}\n{ask(query)}" for chunk, query in pairs])
    grounded = [bool(text.strip()) and text.strip() in chunk for text, (chunk, _) in zip(guesses, pairs, strict=True)]
    reranked = []
    for row, ranking in enumerate(rankings):
        good = dict(zip(ranking[:head], grounded[head * row : head * (row + 1)], strict=True))
        reranked.append(sorted(good, key=lambda chunk, good=good: not good[chunk]) + ranking[head:])
    return reranked


started = time.perf_counter()
rankings["reranked"] = rerank(rankings["hybrid"])
print(f"reranking took {1000 * (time.perf_counter() - started) / len(queries):.0f} ms a question")


# %%
def values_of(measure, name: str) -> np.ndarray:
    """The measure for each question."""
    return np.array([measure(*pair) for pair in zip(rankings[name], relevant, strict=True)])


print(f"{'':>9}" + "".join(f"{name:>11}" for name in MEASURES))
for name in rankings:
    print(f"{name:>9}" + "".join(f"{values_of(measure, name).mean():>11.3f}" for measure in MEASURES.values()))
DEPTHS = [1, 2, 3, 5, 8, 10, 20]
series = {}
for name in rankings:
    shares = [values_of(lambda *pair, k=k: recall_at(k, *pair), name) for k in DEPTHS]
    ends = [bootstrap_interval(values, resamples=500) for values in shares]
    series[name] = (DEPTHS, [values.mean() for values in shares], *zip(*ends, strict=True))
alt = "Recall over the number of chunks for the four rankings: BM25 starts low and ends high, dense starts high."
figure = plots.curve(
    series, title="BM25 finds the person, the encoder the fact",
    xlabel="chunks taken, k", ylabel="recall@k", alt=alt, log_x=True, percent=True,
)  # fmt: skip
plots.show(figure)
recall5 = {name: values_of(MEASURES["recall@5"], name) for name in rankings}
single = max(("BM25", "dense"), key=lambda name: recall5[name].mean())
low, high = bootstrap_interval(recall5["hybrid"] - recall5[single], seed=seed)
gain = recall5["hybrid"].mean() - recall5[single].mean()
print(f"recall@5 of hybrid minus {single}: {gain:+.3f} ({low:+.3f} to {high:+.3f})")
mrr = {name: values_of(reciprocal_rank, name).mean() for name in rankings}

# %%
lesson.claim(
    "hybrid is as good as the better single retriever in recall@5 within the interval, or better",
    high,
    at_least=0,
    form=".3f",
)
lesson.claim("the encoder beats BM25 in MRR", mrr["dense"] - mrr["BM25"], at_least=0, form=".3f")
lesson.claim(
    "the reranker raises the MRR of the hybrid by at least 0.05",
    mrr["reranked"] - mrr["hybrid"],
    at_least=0.05,
    form=".3f",
)
for name in rankings:
    lesson.report(f"{name}: recall@5, MRR", f"{recall5[name].mean():.2f}, {mrr[name]:.2f}")

# %% [markdown]
# **What you see.** BM25 has nearly everything among its first five, but not in the first place: it finds the person, whose other sentences share just as many words with the question. The encoder puts the right fact first more often, and loses some names altogether, which it only knows in pieces. Fusion keeps the recall of the better one. It does not keep the encoder's first places, because it trusts both alike. The reranker repairs that: it costs one short answer of the model for each chunk.
#
# ## 12 · Answers, by how often a fact was seen
#
# **Question.** For which facts is retrieval worth its price?
#
# Ask every question closed-book, with the top three chunks of each ranking, and with an *oracle* that hands over one chunk which states the fact. The oracle is the upper end: what is missing there is the reader's fault, what is missing between it and a retriever is the retriever's.

# %%
TOP = 3


def picked(name: str, row: int) -> list[str]:
    """The passages that a method puts in front of question number `row`."""
    if name == "closed book":
        return []
    return [chunks[min(relevant[row])]] if name == "oracle" else [chunks[i] for i in rankings[name][row][:TOP]]


METHODS = ["closed book", *rankings, "oracle"]
band_of = [name for name, band in bands.items() for _ in band]
gold = [question.answer for question in questions]
replies, right = {}, {}
for method in tqdm(METHODS, desc="methods"):
    replies[method] = answer([reading_prompt(picked(method, row), question) for row, question in enumerate(questions)])
    right[method] = np.array([text.strip() == value for text, value in zip(replies[method], gold, strict=True)])
by_band = {}
for band in bands:
    members = [row for row, name in enumerate(band_of) if name == band]
    by_band[band] = {method: score(int(right[method][members].sum()), len(members)) for method in METHODS}
print(f"{'':>20}" + "".join(f"{method:>13}" for method in METHODS))
for band, results in by_band.items():
    print(f"{band:>20}" + "".join(f"{result.accuracy:>13.0%}" for result in results.values()))

# %% tags=["headline"]
drawn = ("closed book", "BM25", "reranked", "oracle")
shown = {f"{band} (told {seen[band]:.0f} times)": {name: by_band[band][name] for name in drawn} for band in bands}
alt = "Right answers by how often the fact was told: closed-book falls, with retrieval all stay high."
title = "Retrieval gives most where pretraining gave least"
plots.show(plots.bars_with_intervals(shown, title=title, xlabel="right answers", alt=alt))
lift = {band: results["reranked"].accuracy - results["closed book"].accuracy for band, results in by_band.items()}
for band in bands:
    print(f"{band:>20}: retrieval lifts by {100 * lift[band]:+.0f} points")
    for method in ("closed book", "reranked"):
        lesson.report(f"{band}, {method}", str(by_band[band][method]))
lesson.claim("retrieval lifts rare facts by at least 40 points", lift["rank 501 to 1,000"], at_least=0.4, form=".0%")
lesson.claim("it lifts frequent facts by at most 10 points", lift["rank 1 to 100"], at_most=0.1, form=".0%")
lesson.claim(
    "it lifts facts that pretraining never told by at least 40 points",
    lift["not in pretraining"],
    at_least=0.4,
    form=".0%",
)

# %% [markdown]
# **What you see.** What pretraining told a thousand times the model knows, and retrieval adds nothing. What it told a few dozen times it knows about half of the time, and what it was never told, next to never; there retrieval gives nearly everything. All retrievers come close to the oracle, since this reader finds the right one of three passages. That is Kandpal et al.'s (2023) long tail, and the reason for RAG: more text about a rare fact can't be had, a passage can.
#
# ## 13 · Distractors, position, and harm
#
# **Question.** The right passage is in the prompt. What else in the prompt can spoil the answer?
#
# Take strangers, so that memory cannot help. One sentence states the fact. Add $m$ others, of three kinds: *random chunks* of the library; the same kind of fact about *other people*; and the same about *lookalikes*, whose names differ from the right one in one syllable. The right sentence stands at a random place.
#
# **Does the place matter?** Long-context models read the begin and the end of a prompt better than its middle (Liu et al. 2023). So the second measurement puts the right sentence at several places among random chunks, once in prompts as long as shima-4m's training rows allow, once in longer ones.

# %%
SYLLABLES = sorted({name[i : i + 2].lower() for name in world.person for i in (0, 2, 4)})
rows = [row for row, band in enumerate(band_of) if band == "not in pretraining"][: lesson.scaled(60)]


def lookalike(name: str, rng: random.Random) -> str:
    """The name with one other syllable."""
    place = rng.choice((0, 2, 4))
    other = rng.choice([s for s in SYLLABLES if s != name[place : place + 2].lower()])
    return (name[:place] + other + name[place + 2 :]).capitalize()


def passages_with(kind: str, row: int, m: int, rng: random.Random) -> list[str]:
    """The sentence that answers the question, after m that do not."""
    name, relation = str(questions[row].about["name"]), str(questions[row].about["relation"])
    forms, passages = RELATIONS[relation].training_statements, []
    for _ in range(m):
        if kind == "random chunks":
            passages.append(rng.choice([chunk for chunk in rng.sample(chunks, 3) if name not in chunk]))
            continue
        other = lookalike(name, rng) if kind == "lookalikes" else str(rng.choice(about_strangers).about["name"])
        value = rng.choice(world.values[relation])
        passages.append(rng.choice(forms).format(name=other if other != name else lookalike(name, rng), value=value))
    return [*passages, rng.choice(forms).format(name=name, value=questions[row].answer)]


NUMBERS = [0, 2, 4, 8, 12]
crowded = {"random chunks": [], "other people": [], "lookalikes": []}

# %%
for kind, results in crowded.items():
    for m in NUMBERS:
        rng, prompts = random.Random(f"{kind}/{m}/{seed}"), []
        for row in rows:
            *others, right_one = passages_with(kind, row, m, rng)
            others.insert(rng.randint(0, m), right_one)
            prompts.append(reading_prompt(others, questions[row]))
        results.append(exact_match(answer(prompts), [gold[row] for row in rows]))
        print(f"{m:>2} {kind}: {results[-1]}, {np.mean(num_tokens(prompts)):.0f} tokens a prompt")
alt = "Right answers over the number of distractors, of three kinds: lookalikes cost much, other people little."
figure = plots.curve(
    {kind: plots.scored_line(NUMBERS, results) for kind, results in crowded.items()},
    alt=alt, percent=True, limits_y=(-0.02, 1.02),
    title="Lookalikes and long prompts cost answers",
    xlabel="distractors beside the right sentence", ylabel="right answers",
)  # fmt: skip
plots.show(figure)
cost = {kind: results[0].accuracy - results[NUMBERS.index(8)].accuracy for kind, results in crowded.items()}
lesson.claim("8 lookalikes cost at least 20 points", cost["lookalikes"], at_least=0.2, form=".0%")
lesson.claim("8 facts about other people cost at most 10 points", cost["other people"], at_most=0.1, form=".0%")
for kind, results in crowded.items():
    lesson.report(f"right sentence among 12 distractors: {kind}", str(results[-1]))

# %%
by_place = {}
for m, places in {5: (0, 1, 3, 5), 9: (0, 2, 4, 7, 9)}.items():
    shares = []
    for place in places:
        rng, prompts = random.Random(f"place/{seed}"), []  # the same distractors at every place
        for row in rows[: lesson.scaled(40)]:
            *others, right_one = passages_with("random chunks", row, m, rng)
            prompts.append(reading_prompt([*others[:place], right_one, *others[place:]], questions[row]))
        shares.append(exact_match(answer(prompts), [gold[row] for row in rows[: len(prompts)]]))
    length = np.mean(num_tokens(prompts))
    by_place[f"{m + 1} passages, {length:.0f} tokens"] = plots.scored_line([place / m for place in places], shares)
    print(f"{m + 1} passages, {length:.0f} tokens: " + ", ".join(f"{s.accuracy:.0%}" for s in shares))
    for name, result in {"first": shares[0], "last": shares[-1]}.items():
        lesson.report(f"right sentence {name} of {m + 1} passages", str(result))
print(f"shima-4m was trained on rows of {recipe.sequence_length} tokens")
alt = "Right answers over the place of the right sentence, for short and for long prompts."
title = "The place matters in long prompts"
figure = plots.curve(
    by_place, title=title, alt=alt, percent=True, limits_y=(-0.02, 1.02),
    xlabel="place of the right sentence: 0 is first, 1 is next to the question", ylabel="right answers",
)  # fmt: skip
plots.show(figure)
first, *inside, last = [s.accuracy for s in shares]
lesson.claim(
    "in the longer prompts the best place is neither the first nor the last",
    max(inside) - max(first, last),
    at_least=0,
    form=".0%",
)


# %% [markdown]
# **What you see.** Facts about other people hardly disturb: the model matches names. Lookalikes do disturb, from the first few on, and with enough of them most answers are wrong. Random chunks do no harm until the prompt is longer than anything in training; then reading breaks down. The place of the right sentence tells the same story: it does not matter in prompts that fit into a training row, and does in longer ones. There the two ends are the worst places, the opposite of the U of Liu et al. (2023): the beginning is farther from the question than anything in training was, and the end stands at positions that no training row has. So two causes look alike in a plot over the number of passages: confusion, and length. Fewer and better passages cure both.
#
# **When retrieval hurts.** Ask about the best-known people, whose facts the model knows by heart, from three libraries: a complete one, one that *lacks* the fact (the retriever then returns whatever else mentions the person or resembles the question), and an *outdated* one, in which a sentence carries a value that is no longer true.

# %%
def without_fact(row: int) -> list[str]:
    """The best passages of a library from which the fact is missing."""
    found = [chunks[i] for i in rankings["hybrid"][row]]
    return [chunk for chunk in found if not states(chunk, questions[row]) and questions[row].answer not in chunk][:TOP]


known_rows = [row for row, band in enumerate(band_of) if band == "rank 1 to 100"]
rng = random.Random(f"harm/{seed}")
prompts, stale = defaultdict(list), []
for row in known_rows:
    question, relation = questions[row], str(questions[row].about["relation"])
    stale.append(rng.choice([value for value in world.values[relation] if value != question.answer]))
    outdated = rng.choice(RELATIONS[relation].training_statements).format(name=question.about["name"], value=stale[-1])
    prompts["closed book"].append(question.prompt)
    prompts["complete library"].append(reading_prompt(picked("hybrid", row), question))
    prompts["fact missing"].append(reading_prompt(without_fact(row), question))
    prompts["fact outdated"].append(reading_prompt([outdated, *without_fact(row)[: TOP - 1]], question))
harm_replies = {name: answer(texts) for name, texts in prompts.items()}
harm = {name: exact_match(texts, [gold[row] for row in known_rows]) for name, texts in harm_replies.items()}
for name, result in harm.items():
    lesson.report(f"frequent facts, {name}", str(result))
print(f"answers that repeat the outdated fact: {exact_match(harm_replies['fact outdated'], stale)}")
alt = "Right answers on well-known facts: lower if the library lacks the fact, and far lower if it is outdated."
plots.show(plots.bars_with_intervals(harm, title="A bad library is worse than none", xlabel="right answers", alt=alt))
lost = {name: harm["closed book"].accuracy - result.accuracy for name, result in harm.items()}
lesson.claim("an outdated fact costs at least 20 points", lost["fact outdated"], at_least=0.2, form=".0%")
lesson.claim("a missing fact costs at least 5 points", lost["fact missing"], at_least=0.05, form=".0%")

# %% [markdown]
# **What you see.** The model trusts the prompt more than its memory. If the library lacks the fact, some answers that it knew by heart are replaced by what stands in other passages. If the library is outdated, most answers repeat the old value. Retrieval is worth as much as the library, and the risk is largest for the questions that did not need it.
#
# ## 14 · Citations
#
# **Question.** The answer names its source. How often does the source support it?
#
# A base model cannot be asked to cite. But you can ask which passage its answer comes from: show it each passage alone, and see with which one it finds its own answer most probable. A first version looks at all passages, a second only at those in which the answer occurs:
#
# $$\text{citation} = \arg\max_i \; \ln p_\theta(a \mid c_i, q)$$
#
# A passage **supports** an answer if it states, in a whole sentence, that person, that relation and that value. The test covers all questions with the complete library, and those about strangers once more with the fact missing, where the model can only guess.

# %%
stranger_rows = [row for row, band in enumerate(band_of) if band == "not in pretraining"]
guesses = answer([reading_prompt(without_fact(row), questions[row]) for row in stranger_rows])
cases = [(row, picked("reranked", row), replies["reranked"][row].strip()) for row in range(len(questions))]
cases += [(row, without_fact(row), guess.strip()) for row, guess in zip(stranger_rows, guesses, strict=True)]
alone = [(reading_prompt([passage], questions[row]), f" {given}\n") for row, found, given in cases for passage in found]
worth = sequence_log_probs(model, tokenizer, *zip(*alone, strict=True), batch_size=settings["batch_size"])
worth = worth.view(len(cases), TOP)  # (answers, passages)
contained = torch.tensor([[bool(given) and given in passage for passage in found] for _, found, given in cases])
citations = {
    "by probability": worth.argmax(1).tolist(),
    "by probability, if it occurs": (worth + 1000.0 * contained).argmax(1).tolist(),
    "always the first": [0] * len(cases),
}
supported = {
    method: np.array(
        [bool(a) and states(found[i], questions[row], a) for (row, found, a), i in zip(cases, cited, strict=True)]
    )
    for method, cited in citations.items()
}
for number in (0, len(cases) - 1):
    row, found, given = cases[number]
    print(queries[row], given, f"[{citations['by probability, if it occurs'][number] + 1}]")
    print("".join(f"   [{place}] {passage}\n" for place, passage in enumerate(found, start=1)))


# %%
def share(values: np.ndarray) -> Score:
    """Share of true values with its interval."""
    return score(int(values.sum()), len(values))


library_of = {"fact in the library": slice(0, len(questions)), "fact missing": slice(len(questions), None)}
support = {
    name: {method: share(flags[part]) for method, flags in supported.items()} for name, part in library_of.items()
}
alt = "Answers that their cited passage supports: most if the fact is in the library, hardly any if it is missing."
title = "Citations hold where the library does"
plots.show(plots.bars_with_intervals(support, title=title, xlabel="answers that the citation supports", alt=alt))
flags = supported["by probability, if it occurs"]
correct = np.array([given == gold[row] for row, _, given in cases])
quality = {}
for name, chosen in {"supported": flags, "not supported": ~flags}.items():
    quality[name] = share(correct[chosen]) if chosen.any() else score(0, 1)
    print(f"{name:>13} by the cited passage: {chosen.sum():>3} answers, right: {quality[name]}")
    lesson.report(f"answers that are {name} by their citation: right", str(quality[name]))
for method, result in support["fact in the library"].items():
    lesson.report(f"citation supports the answer, {method}", str(result))
lesson.claim(
    "if the fact is there, the citation supports at least 80 % of the answers",
    flags[: len(questions)].mean(),
    at_least=0.8,
    form=".0%",
)
gap = quality["supported"].accuracy - quality["not supported"].accuracy
lesson.claim("supported answers are right at least 30 points more often", gap, at_least=0.3, form=".0%")


# %% [markdown]
# **What you see.** With the fact in the library most citations support their answer. The probability alone errs for people whom the model knows by heart: then every passage makes the answer probable, and it cannot tell where the answer came from. Citing simply the first passage is best here, but only because the reranker has put a passage there that holds the answer. With the fact missing the model answers all the same, cites all the same, and the citation supports next to nothing. So a check of support tells good answers from bad ones without knowing the truth, which is why systems that answer from documents should make it.
#
# ## 15 · Exercises
#
# Four, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 2.1, easy: a vote with weights.
def weighted_vote(answers: list[str], log_probs: list[float]) -> str:
    """The answer whose samples have the largest sum of probabilities exp(log p).

    Empty answers do not vote; if all are empty, return "". Of equal sums the answer that was sampled first wins.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_weighted_vote(weighted_vote):
    logs = [math.log(p) for p in (0.2, 0.5, 0.2, 0.05)]
    for answers, right in (
        (["7", "8", "7", "9"], "8"),  # one sample of 0.5 against two of 0.2
        (["7", "8", "7", "7"], "8"),
        (["7", "", "7", "9"], "7"),
        (["", "", "", ""], ""),
        (["9", "7", "9", "9"], "7"),
    ):
        expect_equal(f"weighted_vote({answers}, logs of 0.2, 0.5, 0.2, 0.05)", weighted_vote(answers, logs), right)
    expect_equal("weighted_vote(['b', 'a'], [-1.0, -1.0])", weighted_vote(["b", "a"], [-1.0, -1.0]), "b")
    two_of_three = weighted_vote(["a", "b", "b"], [-1.0, -1.5, -1.5])
    expect_equal("weighted_vote(['a', 'b', 'b'], [-1.0, -1.5, -1.5])", two_of_three, "b")


check("2.1", check_weighted_vote, weighted_vote)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Collect the sums in a dictionary, which keeps the order of insertion; `max` with a key returns the first of equal ones.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# `max` returns the first of equal keys, and a dictionary keeps the order in which keys came.
#
# ```python
# def weighted_vote(answers: list[str], log_probs: list[float]) -> str:
#     sums = {}
#     for text, log_prob in zip(answers, log_probs, strict=True):
#         if text:
#             sums[text] = sums.get(text, 0.0) + math.exp(log_prob)
#     return max(sums, key=sums.get, default="")
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 2.2, medium: false negatives.
def masked_contrastive_loss(questions: Tensor, chunks: Tensor, answers: Tensor, temperature: float = 0.1) -> Tensor:
    """In-batch loss where `answers[i, j]` (batch, batch, bool) says that chunk j answers question i as well.

    Such a chunk must not count as a wrong one for question i: leave it out of the sum in the denominator. The pair's
    own chunk i always stays in, whatever `answers[i, i]` is.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_masked_loss(masked_contrastive_loss):
    generator = torch.Generator().manual_seed(3)
    questions, chunks = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    answers = torch.rand(5, 5, generator=generator) < 0.3
    for name, mask in {"no mask": torch.zeros(5, 5, dtype=torch.bool), "a random mask": answers}.items():
        total = 0.0
        for i in range(5):
            others = [math.exp(questions[i] @ chunks[j] / 0.2) for j in range(5) if j == i or not mask[i, j]]
            total -= math.log(math.exp(questions[i] @ chunks[i] / 0.2) / sum(others)) / 5
        given = masked_contrastive_loss(questions, chunks, mask, temperature=0.2)
        expect_close(f"the loss with {name}", given, torch.tensor(total), 1e-4)


check("2.2", check_masked_loss, masked_contrastive_loss)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A score of minus infinity adds nothing to a softmax's denominator; mind the diagonal.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# A score of minus infinity adds nothing to the denominator.
#
# ```python
# def masked_contrastive_loss(questions: Tensor, chunks: Tensor, answers: Tensor, temperature: float = 0.1) -> Tensor:
#     similarity = questions @ chunks.T / temperature
#     own = torch.eye(len(questions), dtype=torch.bool, device=similarity.device)
#     similarity = similarity.masked_fill(answers & ~own, -torch.inf)
#     return F.cross_entropy(similarity, torch.arange(len(questions), device=similarity.device))
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 2.3, hard: relevant and different.
def diverse(query: Tensor, vectors: Tensor, k: int, trade: float) -> list[int]:
    """Maximal marginal relevance (Carbonell & Goldstein 1998) for unit vectors (size,) and (chunks, size).

    Pick k chunks one after the other. Each time take the chunk, not yet picked, with the largest
    trade * similarity to the query - (1 - trade) * largest similarity to a picked chunk;
    the second term is 0 for the first pick. Neighbouring chunks that overlap then no longer fill the prompt.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_diverse(diverse):
    twins = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.11, 0.0], [0.7, 0.0, 0.7], [0.0, 1.0, 0.0]]), dim=-1)
    query = F.normalize(torch.tensor([1.0, 0.1, 0.2]), dim=-1)
    expect_equal("diverse(query, twins, 2, 1.0)", sorted(diverse(query, twins, 2, 1.0)), [0, 1])
    expect_equal("diverse(query, twins, 2, 0.5)[1] avoids the twin", diverse(query, twins, 2, 0.5)[1] in (0, 1), False)
    generator = torch.Generator().manual_seed(4)
    points = F.normalize(torch.randn(12, 4, generator=generator), dim=-1)
    for trade in (0.3, 0.6, 0.9):
        order = []
        while len(order) < 5:
            left = [i for i in range(12) if i not in order]
            near = {i: max((float(points[i] @ points[j]) for j in order), default=0.0) for i in left}
            worth = {i: trade * float(points[i] @ points[0]) - (1 - trade) * near[i] for i in left}
            order.append(max(worth, key=worth.get))
        expect_equal(f"diverse of 12 points, trade {trade}", diverse(points[0], points, 5, trade), order)


check("2.3", check_diverse, diverse)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Keep for every chunk its largest similarity to what has been picked, and update it with one matrix-vector product per pick.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Keep, for every chunk, its largest similarity to what is picked so far, and update it with one row at a time.
#
# ```python
# def diverse(query: Tensor, vectors: Tensor, k: int, trade: float) -> list[int]:
#     relevance, order = vectors @ query, []
#     nearest = torch.zeros(len(vectors))  # (chunks,)
#     for _ in range(k):
#         worth = trade * relevance - (1 - trade) * nearest
#         worth[order] = -torch.inf
#         pick = int(worth.argmax())
#         order.append(pick)
#         similarity = vectors @ vectors[pick]
#         nearest = similarity if len(order) == 1 else torch.maximum(nearest, similarity)
#     return order
# ```
#
# </details>

# %%
# For exercise 2.4: frequent facts that the library lacks, and strangers' facts that it has.
gate_rows = [row for row, band in enumerate(band_of) if band in ("rank 1 to 100", "not in pretraining")]
closed = [f" {replies['closed book'][row].strip()}\n" for row in gate_rows]
gate_confidence = sequence_log_probs(model, tokenizer, [questions[row].prompt for row in gate_rows], closed).tolist()
gate_closed = right["closed book"][gate_rows].tolist()
missing = [text.strip() == gold[row] for row, text in zip(known_rows, harm_replies["fact missing"], strict=True)]
gate_retrieved = missing + right["reranked"][gate_rows[len(missing) :]].tolist()
for name, values in {"closed book": gate_closed, "with retrieval": gate_retrieved}.items():
    print(f"{name:>14}: {np.mean(values):.0%} of {len(values)} right")
print(f"the better of the two each time: {np.mean(np.maximum(gate_closed, gate_retrieved)):.0%}")
print(f"log p of the closed-book answers: {min(gate_confidence):.2f} to {max(gate_confidence):.2f}")


# %% tags=["exercise"]
# Exercise 2.4, open: look it up only when needed.
def retrieve_for(confidence: float) -> bool:
    """Whether to use retrieval, given log p of the model's own closed-book answer (Mallen et al. 2023).

    On the questions of the cell above, your rule must be right at least as often as the better of the two fixed
    choices, never retrieve and always retrieve, and must use retrieval for some questions but not for all. How would
    you choose the threshold without looking at these answers?
    """
    raise NotImplementedError


# %% tags=["check"]
def check_gate(retrieve_for):
    chosen = [bool(retrieve_for(confidence)) for confidence in gate_confidence]
    expect_true("some questions use retrieval and some do not", 0 < sum(chosen) < len(chosen))
    outcome = np.mean([r if use else c for use, c, r in zip(chosen, gate_closed, gate_retrieved, strict=True)])
    fixed = max(np.mean(gate_closed), np.mean(gate_retrieved))
    expect_true(f"the rule's {outcome:.0%} are at least the better fixed choice's {fixed:.0%}", outcome >= fixed)


check("2.4", check_gate, retrieve_for)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Print the confidences of right and of wrong closed-book answers beside each other, and see how clearly a known fact stands out.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# A model that knows a fact gives its answer nearly all of the probability. Any threshold well below that will do. Choose it on other questions, whose answers you know.
#
# ```python
# def retrieve_for(confidence: float) -> bool:
#     return confidence < math.log(0.8)
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
# Nobody writes an index again for each project. The same retrieval with `bm25s`, from texts to results:

# %%
started = time.perf_counter()
retriever = bm25s.BM25()
retriever.index(bm25s.tokenize(chunks, stopwords="en", show_progress=False), show_progress=False)
results, result_scores = retriever.retrieve(
    bm25s.tokenize(queries, stopwords="en", show_progress=False), corpus=np.array(chunks), k=TOP, show_progress=False
)
print(f"{len(chunks):,} chunks indexed and {len(queries)} questions answered in {time.perf_counter() - started:.1f} s")
print(queries[0])
for passage, value in zip(results[0], result_scores[0], strict=True):
    print(f"  {value:5.2f}  {passage}")

# %% [markdown]
# For the dense half, give this notebook an `encoder_id`, for example the sentence-transformers model named beside the parameter. It has read a large part of the web but never a name of Shima: compare its recall with the encoder that you trained in a few seconds.
#
# **What is different at scale**
#
# | here | a real system |
# |---|---|
# | a base model, asked in the format of its documents | a chat model that was tuned to follow instructions (lesson 05); format and order still matter, so test several |
# | 16,000 chunks, all compared | millions to billions, with an approximate index (HNSW, IVF) in a vector database |
# | an encoder trained in seconds on made-up pairs | one trained on hundreds of millions of pairs, with hard negatives, then tuned on your own questions |
# | the language model as reranker | a cross-encoder of its own, for the first 50 to 200 |
# | relevance known, since the world is made by a program | judged by people or by a model, on a few hundred real questions that you keep for testing |
# | a passage is data | a passage may carry instructions to the model: prompt injection (lesson 12) |
# | one question, one retrieval | questions rewritten, split and searched several times, by a model that decides when (lesson 15) |
#
# Measure retrieval and answers apart, keep a closed-book baseline, and look at the questions that retrieval makes worse.
#
# ## Read on
#
# - Brown et al. 2020, *Language Models are Few-Shot Learners*; Min et al. 2022, *Rethinking the Role of Demonstrations*.
# - Zhao et al. 2021, *Calibrate Before Use*; Lu et al. 2022, *Fantastically Ordered Prompts and Where to Find Them*; Sclar et al. 2024, *Quantifying Language Models' Sensitivity to Spurious Features in Prompt Design*.
# - Wei et al. 2022, *Chain-of-Thought Prompting Elicits Reasoning in Large Language Models*; Wang et al. 2022, *Self-Consistency Improves Chain of Thought Reasoning*; Yao et al. 2023, *Tree of Thoughts*.
# - Lewis et al. 2020, *Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks*; Gao et al. 2023, *Retrieval-Augmented Generation for Large Language Models: A Survey*.
# - Robertson & Zaragoza 2009, *The Probabilistic Relevance Framework: BM25 and Beyond*; Lù 2024, *BM25S*.
# - Karpukhin et al. 2020, *Dense Passage Retrieval*; van den Oord et al. 2018, *Representation Learning with Contrastive Predictive Coding*; Reimers & Gurevych 2019, *Sentence-BERT*.
# - Cormack et al. 2009, *Reciprocal Rank Fusion*; Sachan et al. 2022, *Improving Passage Retrieval with Zero-Shot Question Generation*; Carbonell & Goldstein 1998, *The Use of MMR*.
# - Kandpal et al. 2023, *Large Language Models Struggle to Learn Long-Tail Knowledge*; Mallen et al. 2023, *When Not to Trust Language Models*.
# - Liu et al. 2023, *Lost in the Middle*; Gao et al. 2023, *Enabling Large Language Models to Generate Text with Citations*.
