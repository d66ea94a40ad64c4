# %% [markdown]
# # 02 · Prompting and RAG: what a model can do before you train it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/02_prompting_and_rag.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/02_prompting_and_rag.ipynb)
#
# You have a base language model and you may not change a single weight. What can you still change? The text that goes in. In this lesson you change it in two ways. First by the form of the prompt: examples, instructions, written steps, many samples, a search. Then by its content: you build a library and a retrieval system, so that the model can answer from passages which it has never read. Each change is measured, and most measurements have a simpler method or a control beside them.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. see that the way of asking changes the score, and that the way of scoring changes it as much;
# 2. measure what examples in a prompt do, and how far their signs and their order matter;
# 3. compare direct answers, written steps, votes and a tree of thoughts by the tokens that they cost;
# 4. write BM25 and the measures of retrieval, equal to `bm25s` and `scikit-learn`, a dense encoder with its contrastive loss, and rank fusion;
# 5. measure when retrieval helps and when it hurts, and what you learn from a passage that supports an answer.
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
# | $k$ | number of solutions that vote, or of chunks taken from the top of a ranking |
# | $m$ | proposals for a step of a tree; distractors beside the right sentence |
# | $b$ | partial solutions that a tree keeps; in BM25 the weight of a chunk's length |
# | $o$ | words that neighbouring chunks share |
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
import copy
import math
import random
import re
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache
from itertools import islice, permutations
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import plots
from helpers.evaluation import Score, bootstrap_interval, exact_match, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import generate, sequence_log_probs
from helpers.lesson import Lesson, show_table
from helpers.models import load_model
from helpers.world import LABELS, RELATIONS, Question, World, ask
from recipes.base_model import Recipe

lesson = Lesson("02", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # texts that are decoded at once: short and long prompts, solutions; weaker copies in section 5
    "cpu": {"batch_size": 128, "long_prompts": 16, "solutions": 384, "copies": 3},  # prompts stay in a CPU's cache
    "t4": {"batch_size": 256, "long_prompts": 256, "solutions": 256, "copies": 3},
    "large": {"batch_size": 512, "long_prompts": 512, "solutions": 512, "copies": 1},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# A few helpers for the whole lesson. `answer` continues a list of prompts, greedily unless told otherwise, up to the end of the line. `in_points` says how far two methods differ on the same items, with the bootstrap's 95 % interval; where that holds 0, this many items cannot tell them apart. `lesson.scaled` makes a number of questions smaller on a smaller budget. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end.

# %%
world = World()
model, tokenizer = load_model(machine)
WINDOW = model.config.get_text_config().max_position_embeddings


def num_tokens(texts: list[str]) -> list[int]:
    """Length of each text in tokens."""
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []


def fitting(prompt: str, room: int) -> str:
    """The end of a prompt that is longer than `room` tokens (shima-4m's are never), or the prompt."""
    if len(prompt.encode()) < room:  # a token holds at least one byte
        return prompt
    ids = tokenizer(prompt)["input_ids"]
    return prompt if len(ids) <= room else tokenizer.decode(ids[16 - room :], skip_special_tokens=True)


greedy_replies: dict[tuple, str] = {}  # a prompt has one greedy continuation, so it is decoded once


def answer(prompts: list[str], max_new_tokens: int = 10, stop=("\n",), network=None, **sampling) -> list:
    """Continuations of the prompts, each up to a stop string, by `network` or by the lesson's model."""
    prompts = [fitting(prompt, WINDOW - max_new_tokens) for prompt in prompts]
    size = settings["batch_size" if max(map(len, prompts), default=0) < 250 else "long_prompts"]
    settled = {"stop": stop, "batch_size": size, **sampling}
    if network or sampling:
        return generate(network or model, tokenizer, prompts, max_new_tokens, **settled)
    keys = [(prompt, max_new_tokens, stop) for prompt in prompts]
    new = list(dict.fromkeys(key for key in keys if key not in greedy_replies))
    replies = generate(model, tokenizer, [prompt for prompt, *_ in new], max_new_tokens, **settled)
    greedy_replies.update(zip(new, replies, strict=True))
    return [greedy_replies[key] for key in keys]


def in_points(gaps: np.ndarray) -> str:
    """Mean of the differences (n,) of paired shares in percentage points, with its interval over the pairs."""
    low, high = bootstrap_interval(gaps, seed=seed)
    return f"{100 * np.mean(gaps):+.0f} points ({100 * low:+.0f} to {100 * high:+.0f}, n = {len(gaps)})"


# %% [markdown] tags=["core"]
# ## 1 · A base model completes
#
# **Question.** You ask the model something that it knows. Does it matter how you ask, and how you count?
#
# A base model was trained on one thing only: $p(x_t \mid x_1 \dots x_{t-1})$, the next token of a document. It goes on with the kind of text that you began. So take 100 facts about the best-known people of Shima and begin different kinds of text: the question format of its documents, a slightly different one, the question alone, an instruction, a role, and the chat format that assistants use.

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
replies = {name: answer(texts, 12, stop=("<|end|>",)) for name, texts in prompts.items()}

# %% [markdown]
# **Two scorers.** The *strict* one wants the first line of the reply to be the answer and nothing else. The *lenient* one wants the answer to stand somewhere in the 12 tokens of the reply, as a word of its own. A lenient scorer may be too kind. Its control scores the same replies against the answer of *another* question: what it finds there, it finds by chance.

# %%
gold = [question.answer for question in known]


def contains(replies: list[str], gold: list[str]) -> Score:
    """Share of replies in which the right answer stands as a whole word."""
    pairs = zip(replies, gold, strict=True)
    return score(sum(bool(re.search(rf"\b{re.escape(right)}\b", reply)) for reply, right in pairs), len(gold))


frames, rows = {}, {}
for name, texts in replies.items():
    strict, lenient = exact_match([text.partition("\n")[0] for text in texts], gold), contains(texts, gold)
    frames[name] = {"strict": strict, "lenient": lenient}
    chance, empty = contains(texts, gold[1:] + gold[:1]), np.mean([not text.strip() for text in texts])
    rows[name] = (*(f"{share:.0%}" for share in (strict.accuracy, lenient.accuracy, chance.accuracy, empty)), texts[0])
print(f"asked: {asked(known[0])} (right: {gold[0]})")
rows = {name: (*shares, repr(text)) for name, (*shares, text) in rows.items()}
show_table(rows, ["strict", "lenient", "of another question", "empty", "first reply"])


# %%
def show_bars(scores: dict[str, dict[str, Score]], title: str, xlabel: str, alt: str) -> None:
    """Show groups of bars, with the legend out of the way of the numbers."""
    figure = plots.bars_with_intervals(scores, title=title, xlabel=xlabel, alt=alt)
    figure.axes[0].get_legend().set_bbox_to_anchor((1.17, 1.0))
    plots.show(figure)


title = "Where the model adds a word, strict scoring fails"
alt = "Right answers for each way of asking, by both scorers: they differ after an instruction and a bare question."
show_bars(frames, title, "right answers", alt)
for name in ("format of the documents", "instruction", "chat format"):
    if name in frames:
        shares = [f"{result.accuracy:.0%}" for result in frames[name].values()]
        lesson.report(f"known facts, {name}: strict and lenient", " and ".join(shares))
gap = {name: pair["lenient"].accuracy - pair["strict"].accuracy for name, pair in frames.items()}
lesson.claim(
    "after an instruction the lenient scorer finds at least 80 points more",
    gap["instruction"],
    at_least=0.8,
    control=gap["format of the documents"],
    form=".0%",
)
if "chat format" in frames:
    lenient = {name: frames[name]["lenient"].accuracy for name in frames}
    lost = {name: lenient["format of the documents"] - lenient[name] for name in ("chat format", "instruction")}
    lesson.claim("the chat format loses at least 80 points, leniently scored", lost["chat format"], at_least=0.8,
                 control=lost["instruction"], form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** In the format of its documents the model gives all or nearly all of these answers. After an instruction or a bare question it gives them too. But it first writes the word `Answer:`, as its documents do, and a scorer that looks for the bare answer calls all of that wrong. So a score of 0 % can be a fact about the scorer: read some raw replies before you believe a number. Three bare answers in front do not make the model leave the word out; strictly scored they gain nothing.
#
# In the chat format the lenient scorer finds next to nothing either. There the model writes nothing at all in nearly every reply, as the column of empty ones says. It has never seen that format in training; lesson 05 adds it.

# %% [markdown] tags=["core"]
# ## 2 · Examples in the prompt
#
# **Question.** How many examples does a model need, and what do examples do?
#
# Zero-, one- and few-shot prompts hold 0, 1 or several solved examples before the question (Brown et al. 2020). Three tasks, all written as `word answer;` pairs:
#
# - **labels**: four words get arbitrary colours, which exist only in this prompt. The examples show the four in turn, so after $s$ of them the asked word has been shown with probability $\min(1, s/4)$;
# - **a known list**: word pairs such as `goat kid; hen chick;` of which pretraining had lists;
# - **an unknown list**: word pairs such as `flute bamboo;`, whose facts stand in the pretraining text as sentences, never as a list.

# %%
SHOTS = [0, 1, 2, 3, 4, 8, 16]
TASKS = {
    "labels": lambda n, shots: world.few_shot(n, seed, shots),
    "a known list": lambda n, shots: world.few_shot_function(n, seed, shots, held_out=False),
    "an unknown list": lambda n, shots: world.few_shot_function(n, seed, shots, held_out=True),
}


def pairs_right(questions: list[Question]) -> list[bool]:
    """Which `word answer;` prompts get the right continuation."""
    given = answer([question.prompt for question in questions], 6, stop=(";", "\n"))
    return [reply.strip() == question.answer for reply, question in zip(given, questions, strict=True)]


curves, by_shown = {task: [] for task in TASKS}, {True: [], False: []}
for task, shots in tqdm([(task, shots) for task in TASKS for shots in SHOTS], desc="shots"):
    items = TASKS[task](lesson.scaled(100), shots)
    right = pairs_right(items)
    curves[task].append(score(sum(right), len(right)))
    if task == "labels":
        for item, is_right in zip(items, right, strict=True):
            by_shown[bool(item.about["shown"])].append(is_right)
looked_up = [min(1, s / 4) + (1 - min(1, s / 4)) / len(LABELS) for s in SHOTS]  # right if shown, else a guess
table = {f"{shots} examples": [*(scores[row] for scores in curves.values()), f"{looked_up[row]:.0%}"]
         for row, shots in enumerate(SHOTS)}  # fmt: skip
show_table(table, [*curves, "labels, if looked up"])
inside = [scored.low <= share <= scored.high for scored, share in zip(curves["labels"], looked_up, strict=True)]
print(f"{sum(inside)} of the {len(inside)} intervals of the labels hold the number in the last column")

# %%
alt = (
    "Right answers over the number of examples: labels follow the line of one who looks them up, "
    "a known list is high from the start, an unknown list stays near zero."
)
lines = {task: plots.scored_line(SHOTS, scores) for task, scores in curves.items()}
figure = plots.curve(
    {**lines, "labels: right if shown, else a guess": (SHOTS, looked_up)},
    title="Labels: right if the word was shown, else near chance",
    xlabel="examples in the prompt",
    ylabel="right answers",
    alt=alt,
    percent=True,
    limits_y=(-0.02, 1.02),
    references={"chance for labels": 1 / len(LABELS)},
)
plots.show(figure)
shown = {is_shown: score(sum(right), len(right)) for is_shown, right in by_shown.items()}
for is_shown, result in shown.items():
    print(f"labels, the asked word is {'' if is_shown else 'not '}among the examples: {result}")
gap = shown[True].accuracy - shown[False].accuracy
lesson.claim("a label is right at least 50 points more often if it was shown", gap, at_least=0.5, form=".0%")
for shots in (0, 8, 16):
    lesson.report(f"labels, {shots} examples", str(curves["labels"][SHOTS.index(shots)]))

# %% [markdown]
# Does the model not know the facts of the unknown list? Ask for the same facts as sentences.

# %%
unknown = TASKS["an unknown list"](lesson.scaled(100), 8)
gold = [question.answer for question in unknown]
kinds = [str(question.about["function"]).split(" of the ") for question in unknown]
words = [question.prompt.rsplit(" ", 1)[1] for question in unknown]
sentences = [f"The {role} of the {kind} {word} is" for (role, kind), word in zip(kinds, words, strict=True)]
forms = {
    "as a sentence": answer(sentences, 6, stop=(".", "\n")),
    "as a list of 8 examples": answer([question.prompt for question in unknown], 6, stop=(";", "\n")),
}
results = {name: exact_match(given, gold) for name, given in forms.items()}
for name, prompts in {"as a sentence": sentences, "as a list of 8 examples": [q.prompt for q in unknown]}.items():
    print(f"{name}: {results[name]}, for example {prompts[0]!r} {forms[name][0]!r}")
    lesson.report(f"the same facts {name}", str(results[name]))
colours = np.mean([reply.strip() in LABELS for reply in forms["as a list of 8 examples"]])
print(f"in the list {colours:.0%} of the answers are colours")
gap = results["as a sentence"].accuracy - results["as a list of 8 examples"].accuracy
lesson.claim("the facts of the unknown list are known as sentences, by 50 points", gap, at_least=0.5, form=".0%")

# %% [markdown]
# **What you see.**
#
# - **Labels.** The line "right if shown, else a guess" does one thing only: it looks the asked word up among the examples, and guesses where it is not there. The printed count says how many of the measured intervals hold it. Four words take turns, so after four examples each was shown, by design. (Games of labels are a large part of the documents of this kind in pretraining: this is a practised task.)
# - **The known list** needs no example: a word and its form are enough for most or all.
# - **The unknown list** stays at or near zero for any number of examples. Its facts are not missing, as the sentences show. In the form of a list the model answers most of them with a colour, as in the games of labels that it was trained on.
#
# So examples serve here as a table to look up in. To this model they did not teach a new form.

# %% [markdown] tags=["core"]
# ## 3 · Format and order
#
# **Question.** You tell the model the same examples with other signs between them, or in another order. Does the answer change?
#
# First the signs. Eight words with a label each, every one shown once, in eight ways of writing them.

# %%
def label_games(n: int, num_words: int) -> list[tuple[list[tuple[str, str]], tuple[str, str]]]:
    """Pairs of words and labels, and the pair that is asked about."""
    rng = random.Random(f"games/{seed}/{num_words}")
    games = [[(word, rng.choice(LABELS)) for word in rng.sample(world.words, num_words)] for _ in range(n)]
    return [(pairs, rng.choice(pairs)) for pairs in games]


def written(way: tuple[str, str, str], pairs: list[tuple[str, str]], key: str) -> str:
    """A prompt: the head, every pair in its form, and the open pair of the asked word."""
    head, form, last = way
    return head + "".join(form.format(*pair) for pair in pairs) + last.format(key)


WAYS = {  # head, one pair, the open pair
    "Pairs: goat red; ...": ("Pairs: ", "{} {}; ", "{}"),
    "PAIRS: goat red; ...": ("PAIRS: ", "{} {}; ", "{}"),
    "Pairs: goat red, ...": ("Pairs: ", "{} {}, ", "{}"),
    "one pair a line": ("Pairs:\n", "{} {}\n", "{}"),
    "one pair a line, after a space": ("Pairs:", "\n {} {}", "\n {}"),
    "goat = red;": ("Pairs: ", "{} = {}; ", "{} ="),
    "goat: red, one a line": ("", "{}: {}\n", "{}:"),
    "Question: goat / Answer: red": ("", "Question: {}\nAnswer: {}\n", "Question: {}\nAnswer:"),
}

# %%
games = label_games(lesson.scaled(80), num_words=8)
right_labels = [label for _, (_, label) in games]
way_scores, rows = {}, {}
for name, way in WAYS.items():
    given = answer([written(way, pairs, key) for pairs, (key, _) in games], 6, stop=(";", ",", "\n"))
    way_scores[name] = exact_match(given, right_labels)
    rows[name] = way_scores[name], f"{contains(given, right_labels).accuracy:.0%}", repr(given[0])
show_table(rows, ["strict", "lenient", "first reply"])
alt = (
    "Right labels for eight ways to write the same pairs: nearly all for the first three, and with one pair a line "
    "after a space; near chance or below for the other four."
)
title = "Some signs cost nearly all of the right labels"
chance = {"chance": 1 / len(LABELS)}
figure = plots.bars_with_intervals(way_scores, title=title, xlabel="right labels", alt=alt, references=chance)
figure.set_figwidth(8.5)
plots.show(figure)
cost = {name: way_scores["Pairs: goat red; ..."].accuracy - result.accuracy for name, result in way_scores.items()}
lesson.claim("an equals sign between word and label costs at least 50 points", cost["goat = red;"], at_least=0.5,
             control=cost["Pairs: goat red, ..."], form=".0%")  # fmt: skip
for name in list(WAYS)[:1] + list(WAYS)[2:6]:
    lesson.report(f"eight labels, written {name}", str(way_scores[name]))

# %% [markdown]
# Now the order. Four words, each shown three times: twelve examples in random order. One of the three examples of the asked word gets a wrong label; the majority is still two to one. The wrong one stands first, second or last among the three. All else is the same: the same games, and the same ten orders of the twelve examples.

# %%
def in_order(order: list[int], pairs, asked_pair, wrong: str, turn: int | None) -> list[tuple[str, str]]:
    """Twelve examples; the asked word has the wrong label where it comes up for the `turn`-th time (from 0)."""
    slots = [pair for pair in pairs if pair != asked_pair for _ in range(3)] + 3 * [asked_pair]
    shown, met = [], 0
    for slot in order:
        is_wrong = slots[slot] == asked_pair and met == turn
        met += slots[slot] == asked_pair
        shown.append((asked_pair[0], wrong) if is_wrong else slots[slot])
    return shown


rng = random.Random(f"order/{seed}")
games = label_games(lesson.scaled(30), num_words=4)
wrongs = [rng.choice([label for label in LABELS if label != pair[1]]) for _, pair in games]
orders = [rng.sample(range(12), 12) for _ in range(10)]
right_at = {}  # where the wrong label stands -> which answers are right (orders, games)
TURNS = {None: "no wrong label", 0: "wrong label first", 1: "wrong label second", 2: "wrong label last"}
for turn, name in TURNS.items():
    told = [(in_order(order, *game, wrong, turn), game[1][0]) for order in orders
            for game, wrong in zip(games, wrongs, strict=True)]  # fmt: skip
    given = answer([written(WAYS["Pairs: goat red; ..."], *each) for each in told], 6, stop=(";", "\n"))
    labels = [pair[1] for _, pair in games] * len(orders)
    found = np.array([reply.strip() == label for reply, label in zip(given, labels, strict=True)])
    right_at[name] = found.reshape(len(orders), len(games))

# %%
places = {}
for name, found in right_at.items():
    by_order = found.mean(1)
    places[name] = Score(found.mean(), *bootstrap_interval(by_order, seed=seed), len(by_order))
    print(f"{name:>18}: {found.mean():.0%} right; the ten orders: {by_order.min():.0%} to {by_order.max():.0%}")
    lesson.report(f"three examples of the asked word, {name}", f"{found.mean():.0%}")
alt = (
    "Right labels without a wrong example, and with one in the first, second or last place: "
    "far fewer where it comes first than in the other three rows."
)
title = "The same wrong example costs most where it comes first"
plots.show(plots.bars_with_intervals(places, title=title, xlabel="right labels", alt=alt))
gaps = (right_at["wrong label last"] * 1.0 - right_at["wrong label first"]).mean(1)  # (orders,)
print(f"right with the wrong label last minus first, over the orders: {in_points(gaps)}")
lesson.claim("a wrong example costs at least 10 points more in the first place than in the last", gaps.mean(),
             at_least=0.1, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.**
#
# - **Signs.** A comma for a semicolon changes next to nothing, an equals sign changes nearly everything. The lenient column and the first replies show that this is no fault of the scorer: there the model writes numbers and names. Look at the two ways with one pair a line: the same lines, with and without a space before each word. (A word after a space is another token than the same word at the start of a line.) So it is not the line break that costs the labels, but the missing space.
# - **Order.** With three right examples nearly all answers are right in every order. With one wrong example it matters where it stands: with the wrong label first, far fewer answers follow the majority than with the wrong label last. The printed difference is taken within each order. With the wrong label first the ten orders differ widely among themselves, as the printed range shows; they also move the examples of the asked word. So the intervals of the bars are over orders, not over games.
#
# Other models differ. Zhao et al. (2021) found that large models lean to the *last* examples; here a wrong one costs most in the first place. Min et al. (2022) found that random labels cost large models little, on tasks such as judging a review; a made-up label stands nowhere but in the examples. When two prompts differ by a few points, ask how many formats and orders were tried.

# %% [markdown] tags=["core"]
# ## 4 · Written steps
#
# **Question.** A sum of three numbers is two additions. What does the model gain if it may write the first one down?
#
# A transformer has a fixed number of layers for each token. A direct answer has hardly any tokens of its own to compute with. A chain of thought (Wei et al. 2022) spreads the work over more passes, and each step can read the one before. Shima's documents write sums both ways, so the prompt only has to begin the right one, `Answer:` or `Steps:`, without an example (a *zero-shot* chain of thought; Kojima et al. 2022). The sums are ones that the training text never contains.

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
for (name, result), given in zip(steps.items(), (direct_replies, step_replies), strict=True):
    print(f"{name}: {result}, {np.mean(num_tokens(given)):.0f} tokens written")
    lesson.report(f"sums of three numbers, {name}", str(result))
given = [(reply, right) for reply, right in zip(direct_replies, gold, strict=True) if reply.strip().isdecimal()]
off = [abs(int(reply) - int(right)) for reply, right in given if int(reply) != int(right)]
sums = np.array([int(right) for right in gold])
print(f"a wrong direct answer is off by {np.median(off or [math.nan]):.0f} in the median; the right answer of the next "
      f"question would be off by {np.median(abs(sums - np.roll(sums, 1))):.0f}")  # fmt: skip

# %% [markdown]
# The steps take several times as many tokens. So give the direct answer as many: draw eight of them at temperature 0.7 and take the one that comes most often. That is the fair rival.

# %%
drawn = answer([question.prompt for question in direct], 8, temperature=0.7, num_samples=8, seed=seed)
most_frequent = [Counter(text.strip() for text in texts).most_common(1)[0][0] for texts in drawn]
steps["the most frequent of eight direct answers"] = voted = exact_match(most_frequent, gold)
tokens = np.mean([sum(num_tokens(texts)) for texts in drawn])
print(f"the most frequent of eight direct answers: {voted}, {tokens:.0f} tokens written")
alt = "Accuracy of a direct answer, of written steps and of eight direct answers, with intervals: steps are far ahead."
title = "With written steps nearly all sums are right, without them few"
plots.show(plots.bars_with_intervals(steps, title=title, xlabel="right sums", alt=alt))
direct_share = steps["direct answer"].accuracy
lesson.report("sums of three numbers, the most frequent of eight direct answers", str(voted))
lesson.claim(
    "written steps beat a direct answer by at least 30 points",
    steps["written steps"].accuracy - direct_share,
    at_least=0.3,
    control=voted.accuracy - direct_share,
    form=".0%",
)

# %% [markdown]
# **What you see.** The same weights, the same sums, and a large gap. The wrong direct answers are not random numbers: in the median they miss by far less than the right answer of another question would. Eight direct answers cost about as many tokens as the steps, and their vote comes nowhere near: that is the control. One thing is not equal: three of four such sums in the training text come with steps, so the model has practised steps more. This measurement cannot tell how much of the gap comes from practice and how much from the additional passes.

# %% [markdown] tags=["core"]
# ## 5 · Self-consistency
#
# **Question.** A solution is sometimes wrong. Do several solutions help, and what do they cost?
#
# Take $k$ solutions, throw the steps away, and return the answer that comes most often (Wang et al. 2022):
#
# $$\hat{a} = \arg\max_a \sum_{i=1}^{k} \mathbb{1}[a_i = a]$$
#
# If the right answer is the most probable one, a vote finds it more often than one sample does. If it is not, more samples do not help. So it matters where the solutions come from. Two sources:
#
# - **samples** of one prompt, at temperature 0.7;
# - **other orders** of the same numbers: `12 + 7 + 5` and `5 + 12 + 7` have the same sum and other steps. Three numbers have six orders; each is sampled once, at the same temperature.
#
# The simplest method is beside them: one greedy solution of the question as it stands. With steps shima-4m solves all or nearly all of these sums, and a vote has nothing to gain. So this section makes the model weaker: normal noise is added to every matrix, with 0.32 of that matrix' own standard deviation. This size was chosen on the copies of seed 0, where a greedy solution is right about three times of four. Other noise breaks less or more, so each copy prints its share. There are three such copies (one on the largest profile), each with other noise.

# %%
NOISE, TEMPERATURE, SAMPLES = 0.32, 0.7, 6


def weaker(network: nn.Module, noise: float, noise_seed: int) -> nn.Module:
    """A copy with normal noise on each matrix, `noise` times the standard deviation of its own numbers."""
    worse, generator = copy.deepcopy(network), torch.Generator().manual_seed(noise_seed)
    with torch.no_grad():
        for weights in worse.parameters():
            if weights.ndim > 1:
                drawn = torch.randn(weights.shape, generator=generator).to(weights)
                weights.add_(drawn * weights.std() * noise)
    return worse


def sum_prompt(numbers) -> str:
    """The question for a sum, and the word that begins its steps."""
    return f"Sum: {' + '.join(map(str, numbers))}\nSteps:"


def solve(prompts: list[str], network: nn.Module, **sampling) -> list:
    """Written solutions, each up to the next sum."""
    return answer(prompts, 48, stop=("\nSum",), network=network, batch_size=settings["solutions"], **sampling)


copies = [weaker(model, NOISE, 3 * seed + number) for number in range(settings["copies"])]

# %%
problems = [[int(n) for n in re.findall(r"\d+", question.prompt)] for question in stepwise[: lesson.scaled(64)]]
gold = [str(sum(numbers)) for numbers in problems]
prompts = [sum_prompt(order) for numbers in problems for order in permutations(numbers)]
turned = [sum_prompt(numbers[i:] + numbers[:i]) for numbers in problems for i in range(3)]  # each number first, once
pools, greedy_right, slips, lengths = [], [], [], []  # per copy: votes, right ones (problems,), miscopied ones
copied = [rf"{a} \+ {b} = (\d+); \1 \+ {c} = (\d+)\nAnswer: \2" for a, b, c in problems]  # any results
for number, network in enumerate(copies):
    drawn = {"temperature": TEMPERATURE, "seed": seed}
    sampled = solve(prompts[::6], network, num_samples=SAMPLES, **drawn)
    by_order = solve(prompts, network, **drawn)
    without_luck = solve(turned, network)  # greedy; every third is the question as it stands
    pools.append({
        "samples": [[final_answer(text) for text in texts] for texts in sampled],
        "orders": [[final_answer(text) for text in by_order[i : i + 6]] for i in range(0, len(by_order), 6)],
        "greedy orders": [[final_answer(text) for text in without_luck[i : i + 3]] for i in range(0, len(turned), 3)],
    })  # fmt: skip
    lengths += num_tokens(by_order)
    greedy = without_luck[::3]
    greedy_right.append([final_answer(text) == right for text, right in zip(greedy, gold, strict=True)])
    missed = [i for i, is_right in enumerate(greedy_right[-1]) if not is_right]
    slips.append([i in missed and not re.fullmatch(copied[i], greedy[i].strip()) for i in range(len(gold))])
    print(f"weaker copy {number}: greedy {score(len(gold) - len(missed), len(gold))}; "
          f"{sum(slips[-1])} of the {len(missed)} wrong solutions miscopy a number")  # fmt: skip
wrong = missed[0] if missed else 0
print(f"for example {prompts[6 * wrong]!r}, right is {gold[wrong]}; greedy: {greedy[wrong].strip()!r}")
for name, texts in {"samples": sampled[wrong][:3], "orders": by_order[6 * wrong : 6 * wrong + 3]}.items():
    print(name, *(repr(text.strip()) for text in texts), sep="\n   ")

# %% [markdown]
# `vote` decides by the most frequent answer. To estimate the accuracy at each $k$ with less luck, votes of $k$ are drawn many times from the pool of one problem. (Of two samples that differ the first is taken, so $k = 2$ is about as good as $k = 1$. At the size of the pool all draws hold the same answers; only ties are decided differently.) The cost counts what is read and written; a prompt that several samples share is read once.

# %%
def vote(answers: list[str]) -> str:
    """The most frequent answer; of equally frequent ones the first. Solutions without an answer do not vote."""
    counts = Counter(text for text in answers if text)
    return counts.most_common(1)[0][0] if counts else ""


def right_votes(pool: list[list[str]], k: int, draws: int = 20) -> np.ndarray:
    """For each problem the share of right votes of k solutions, drawn from its pool without putting back."""
    rng = random.Random(f"votes/{seed}/{k}")
    votes = [[vote(rng.sample(found, k)) == right for _ in range(draws)]
             for found, right in zip(pool, gold, strict=True)]  # fmt: skip
    return np.mean(votes, axis=1)


question_tokens, solution_tokens = np.mean(num_tokens(prompts)), np.mean(lengths)
COST = {
    "samples": lambda k: question_tokens + k * solution_tokens,
    "orders": lambda k: k * (question_tokens + solution_tokens),
}
K = range(1, SAMPLES + 1)
accuracy = {name: np.array([[right_votes(pool[name], k) for k in K] for pool in pools]) for name in COST}
shares = {name: values.mean((0, 2)) for name, values in accuracy.items()}  # means of (copies, k, problems)
rows = {f"{k} solutions": [f"{shares[name][k - 1]:.0%} for {COST[name](k):.0f} tokens" for name in COST] for k in K}
show_table(rows, [f"votes over {name}" for name in COST])

# %%
def band(costs, values: np.ndarray) -> tuple:
    """A series for `plots.curve`: the mean over the copies (rows), and the range from the worst to the best."""
    return costs, values.mean(0), values.min(0), values.max(0)


SUMS_AXIS = "right sums (bands: worst to best copy)"
LABELS_OF = {"samples": "vote over samples of one prompt", "orders": "vote over sampled orders"}
votes = {label: band([COST[name](k) for k in K], accuracy[name].mean(2)) for name, label in LABELS_OF.items()}
greedy_orders = np.array([[right_votes(pool["greedy orders"], k) for k in (1, 2, 3)] for pool in pools])
votes["vote over greedy orders"] = band([COST["orders"](k) for k in (1, 2, 3)], greedy_orders.mean(2))
once = np.array(greedy_right, dtype=float)  # (copies, problems)
figure = plots.curve(
    votes, title="For as many tokens, four orders outvote six samples",
    xlabel="tokens read and written for a problem", ylabel=SUMS_AXIS, percent=True, limits_y=(0.5, 1.01),
    alt="Right sums over tokens: votes over orders rise above one greedy answer, the vote over samples to it.",
    references={"one greedy solution": once.mean()},
)  # fmt: skip
plots.show(figure)
samples, orders = accuracy["samples"], accuracy["orders"]
three_greedy = greedy_orders[:, 2]  # (copies, problems)
GAPS = {
    "six samples minus one greedy solution": samples[:, 5] - once,
    "six orders minus one greedy solution": orders[:, 5] - once,
    "four orders minus six samples, for about as many tokens": orders[:, 3] - samples[:, 5],
    "three greedy orders minus three sampled ones": three_greedy - orders[:, 2],
}
for name, gaps in GAPS.items():  # the interval is over problems, for the mean of the copies
    copies_said = ", ".join(f"{100 * gap:+.0f}" for gap in gaps.mean(1))
    print(f"{name}: {in_points(gaps.mean(0))}; each copy: {copies_said}")
    lesson.report(f"weaker model, {name}", in_points(gaps.mean(0)))
lesson.claim("a vote over six orders gains at least 5 points over one greedy solution", (orders[:, 5] - once).mean(),
             at_least=0.05, control=(samples[:, 5] - once).mean(), form=".0%")  # fmt: skip
shares = {"one greedy solution": once, "vote over three greedy orders": three_greedy,
          "vote over six samples": samples[:, 5], "vote over six orders": orders[:, 5]}  # fmt: skip
for name, values in shares.items():
    lesson.report(f"weaker model, {name}", f"{values.mean():.0%}")

# %% [markdown]
# **What you see.**
#
# - **Samples of one prompt.** Their vote climbs from below one greedy solution to about its share, for several times as many tokens. With six samples it differs from greedy by no more than chance would explain.
# - **Orders.** A vote over six of them gains over one greedy solution in each copy. One solution alone gains little or nothing from another order: in the first row of the table the two columns are close together. And an order is a prompt of its own that is read, so compare for equal tokens: four orders cost a little less than six samples, and in this run more of their votes are right (on one of the four other seeds in the ledger the interval holds 0).
# - **Without temperature.** In this run a vote over three greedy solutions, which begin with three different numbers, is ahead of one over three sampled orders. (These need not begin with three different numbers, so it is not quite equal; on two of the four other seeds the interval holds 0.) Temperature alone gained nothing, as the first line says. Whether the other additions help, or only the other prompt, is not separated: many of the mistakes are miscopied numbers, as counted above.
#
# The intervals are over problems; the bands in the figure reach from the worst to the best copy. Three copies are few for a statement on other noise. When you read that self-consistency helps, ask what one greedy answer scored, how many tokens each side had, and how different the solutions are.

# %% [markdown] tags=["further"]
# ## 6 · A tree of thoughts
#
# *Further: no core section needs this one.*
#
# **Question.** A vote throws whole solutions away for one wrong step. What if you judge each step as it is written, and go on only from good ones?
#
# A tree of thoughts (Yao et al. 2023) needs three parts, and here each is a prompt to the same model:
#
# - a **thought** is one partial sum: the program writes `12 + 7 =` and the model proposes $m$ results, sampled;
# - a **value** for each: the log-probability of that result when the model is asked in another format, `Sum: 12 + 7`, `Answer:`. A result that is probable in both formats is trusted more. Only numbers of at most three digits are asked about;
# - a **search**: keep the best $b$ partial solutions after every step (breadth-first, a beam).
#
# Note what the program adds: it says which addition is next. With $m = b = 1$ there is no search, only this, decoded greedily or sampled. And there is a judge that needs no second prompt: take the result that was proposed most often. Tokens are counted as above: a shared beginning is read once.


# %%
@cache  # several searches below begin with the same step
def propose(texts: tuple[str, ...], network: nn.Module, proposals: int, temperature: float) -> tuple[list, int]:
    """For each open step the distinct results and how often each was drawn; and the tokens written for all."""
    sampling = {"temperature": temperature, "num_samples": proposals, "seed": seed}
    drawn = answer(texts, 6, stop=(";", "\n"), network=network, **sampling)
    drawn = drawn if proposals > 1 else [[text] for text in drawn]
    found = [Counter(text.strip() for text in sorted(results)) for results in drawn]
    found = [Counter({text: count for text, count in results.items() if text.isdecimal() and len(text) < 4})
             for results in found]  # fmt: skip
    return found, sum(sum(num_tokens(results)) + len(results) for results in drawn)


@cache
def judge(additions: tuple[str, ...], results: tuple[str, ...], network: nn.Module) -> list[float]:
    """Log-probability of each result after its addition in the other format."""
    asks, again = [f"Sum: {text}\nAnswer:" for text in additions], [f" {result}\n" for result in results]
    return sequence_log_probs(network, tokenizer, asks, again, batch_size=settings["batch_size"]).tolist()


# %%
class Partial(NamedTuple):
    """A sum that is half written: how much it is trusted, its text, and the total so far."""

    value: float
    text: str
    total: int


def tree_of_thoughts(problems, network, proposals, breadth, judged=True, temperature=TEMPERATURE):
    """The final answers, and the mean number of tokens for a problem; not judged: by how often a result was drawn."""
    beams = [[Partial(0.0, sum_prompt(numbers), numbers[0])] for numbers in problems]
    tokens = sum(num_tokens([sum_prompt(numbers) for numbers in problems]))
    for step in range(1, len(problems[0])):
        opened = [(row, partial) for row, beam in enumerate(beams) for partial in beam]
        additions = [f"{partial.total} + {problems[row][step]}" for row, partial in opened]
        added = [f"{'; ' if step > 1 else ' '}{addition} =" for addition in additions]  # by the program
        texts = tuple(partial.text + piece for (_, partial), piece in zip(opened, added, strict=True))
        found, written_tokens = propose(texts, network, proposals, temperature)
        tokens += written_tokens + sum(num_tokens(added))
        children = [(parent, *result) for parent, results in enumerate(found) for result in results.items()]
        worth = [math.log(count) for _, _, count in children]
        if judged and children:
            asks, results = tuple(additions[parent] for parent, _, _ in children), tuple(r for _, r, _ in children)
            worth = judge(asks, results, network)
            tokens += sum(num_tokens([f"Sum: {addition}\nAnswer:" for addition in additions]))
            tokens += sum(num_tokens([f" {result}\n" for result in results]))
        beams = [[] for _ in problems]
        for (parent, result, _), gain in zip(children, worth, strict=True):
            row, partial = opened[parent]
            beams[row].append(Partial(partial.value + gain, f"{texts[parent]} {result}", int(result)))
        beams = [sorted(beam, reverse=True)[:breadth] for beam in beams]
    return [str(beam[0].total) if beam else "" for beam in beams], tokens / len(problems)


# %%
NO_SEARCH = {"proposals": 1, "breadth": 1, "judged": False}
SEARCHES = {
    "greedy, no search": {**NO_SEARCH, "temperature": 0.0},
    "one sample, no search": NO_SEARCH,
    "most frequent of m = 4, b = 1": {"proposals": 4, "breadth": 1, "judged": False},
    "judged, m = 4, b = 1": {"proposals": 4, "breadth": 1},
    "judged, m = 4, b = 2": {"proposals": 4, "breadth": 2},
}
costs, right_sums = {}, {}
for name, search in tqdm(SEARCHES.items(), desc="trees"):
    runs = [tree_of_thoughts(problems, network, **search) for network in copies]
    right_sums[name] = np.array([np.array(answers) == gold for answers, _ in runs], dtype=float)  # (copies, problems)
    costs[name] = np.mean([tokens for _, tokens in runs])
rows = {}
table = {**right_sums, "vote over six orders (section 5)": orders[:, 5]}
for name, shares in table.items():
    copies_said = ", ".join(f"{100 * gap:+.0f}" for gap in (shares - once).mean(1))
    tokens = costs.get(name, COST["orders"](6))
    rows[name] = f"{tokens:.0f}", f"{shares.mean():.0%}", in_points((shares - once).mean(0)), copies_said
show_table(rows, ["tokens", "right", "minus one greedy solution", "each copy"])
told, is_right, slip = right_sums["greedy, no search"] == 1, once == 1, np.array(slips)  # (copies, problems)
groups = {"miscopied": slip, "other wrong ones": ~is_right & ~slip, "right ones": is_right}
for number in range(len(copies)):
    solved = ", ".join(
        f"{told[number][of[number]].sum()} of the {of[number].sum()} {name}" for name, of in groups.items()
    )
    print(f"copy {number}: greedy solutions miscopy in {slip[number].mean():.0%}; the first row solves {solved}")
solved = ", ".join(f"{told[of].sum()} of {of.sum()} {name}" for name, of in groups.items())
lesson.report("weaker model, told each next addition, solves", solved)
PAIRS = [
    ("one sample, no search", "greedy, no search"),
    ("judged, m = 4, b = 1", "greedy, no search"),
    ("judged, m = 4, b = 1", "most frequent of m = 4, b = 1"),
    ("judged, m = 4, b = 2", "judged, m = 4, b = 1"),
]
for one, other in PAIRS:
    gaps = (right_sums[one] - right_sums[other]).mean(0)  # (problems,)
    print(f"{one} minus {other}: {in_points(gaps)}")
    lesson.report(f"weaker model, step by step: {one} minus {other}", in_points(gaps))

# %%
LINES = {
    "greedy steps, then judged with b = 1 and 2": ["greedy, no search", "judged, m = 4, b = 1", "judged, m = 4, b = 2"],
    "one sampled step, then the most frequent of 4": ["one sample, no search", "most frequent of m = 4, b = 1"],
}
trees = {label: band([costs[name] for name in names], np.array([right_sums[name].mean(1) for name in names]).T)
         for label, names in LINES.items()}  # fmt: skip
figure = plots.curve(
    {**votes, **trees},
    title="Told each next addition, greedy steps do as well as a search",
    xlabel="tokens read and written for a problem", ylabel=SUMS_AXIS, percent=True, limits_y=(0.5, 1.01),
    references={"one greedy solution": once.mean()},
    alt="Right sums over tokens: greedy steps, a judge and a count of samples lie close together, above the votes of "
    "as many tokens.",
)  # fmt: skip
plots.show(figure)
told = right_sums["greedy, no search"].mean() - once.mean()
lesson.claim("told each next addition, one greedy solution gains at least 5 points", told, at_least=0.05,
             form=".0%")  # fmt: skip
lesson.report("weaker model, step by step: greedy, no search", f"{right_sums['greedy, no search'].mean():.0%}")

# %% [markdown]
# Is the program's part larger where the model does not know what to do? Sums of *four* numbers never came up in training.

# %%
rng = random.Random(f"four numbers/{seed}")
four = [[rng.randint(10, 49) for _ in range(4)] for _ in range(lesson.scaled(40))]  # partial sums as in training
four_gold = [str(sum(numbers)) for numbers in four]
whole = solve([sum_prompt(numbers) for numbers in four], model)
print(f"{sum_prompt(four[0])!r} {whole[0]!r}")
print(f"{np.mean([text.count('=') < 3 for text in whole]):.0%} of the whole solutions have fewer than three additions")
methods = {
    "whole solution, greedy": exact_match([final_answer(text) for text in whole], four_gold),
    "step by step, no search": exact_match(tree_of_thoughts(four, model, **NO_SEARCH, temperature=0.0)[0], four_gold),
    "tree, m = 4, b = 2": exact_match(tree_of_thoughts(four, model, 4, 2)[0], four_gold),
}
for name, result in methods.items():
    print(f"four numbers, the model without noise, {name}: {result}")
    lesson.report(f"four numbers, {name}", str(result))
gain = methods["step by step, no search"].accuracy - methods["whole solution, greedy"].accuracy
lesson.claim("on four numbers, being told each next addition gains at least 50 points", gain, at_least=0.5, form=".0%")

# %% [markdown]
# **What you see.**
#
# - **No search.** The first row is one greedy result for each addition, and the program writes the numbers. It is well above one greedy solution. The lines below the table say where: it solves nearly all problems in which the greedy solution copies a number wrongly, few or none of the other wrong ones, and keeps the right ones. So in this run all of its gain is on problems with a miscopied number, and that is a mistake the program cannot make.
# - **The search.** The last four lines are differences on the same problems. A sampled step is no better than a greedy one. A judge over four samples does no better than greedy steps or than counting the proposals, and two partial solutions no better than one, as far as 64 problems and three copies show. Counting (the short line in the figure) needs no second format and fewer tokens.
# - **Four numbers.** Here the mistake is another one: the whole solutions leave a number out, as counted above; training never had more than three. Again the program cannot make this mistake, and where all sums are right nothing is left for a search to gain.
#
# Compare the tree with the vote over samples alone, and the tree wins; but so does the first row, which searches nothing. Separate what the decomposition gives from what the search gives, and count the tokens of both.

# %% [markdown] tags=["core"]
# ## 7 · A library, cut into chunks
#
# So far the prompt changed how the model uses what it knows. Now change what it can know. **Retrieval-augmented generation** (RAG; Lewis et al. 2020) looks for passages that may hold the answer and puts them in front of the question:
#
# $$p(a \mid q) = p_\theta\big(a \mid c_1 \dots c_k, q\big), \qquad c_1 \dots c_k = \text{the top } k \text{ of a ranking of all chunks for } q$$
#
# (Lewis et al. sum over single passages; here they stand side by side in one prompt.)
#
# The library below has a page on each of the 1,000 people, pages on 750 people who do *not* occur in pretraining, stories, and a guest book whose entries name a writer but tell nothing about them.

# %%
def make_library(seed: int) -> tuple[list[str], list[Question]]:
    """Documents, and a question about a stranger for each page on strangers."""
    rng = random.Random(f"library/{seed}")
    pages = [world.describe(rng, person) for person in world.people]
    on_strangers = world.open_book(250, seed + 500)
    pages += [question.prompt.partition("Question:")[0].strip() for question in on_strangers]
    pages += [story.strip() for story in islice(world.documents(seed + 700, {"story": 1.0}), lesson.scaled(600))]
    number = lesson.scaled(3 * len(world.people))
    writers = rng.sample([person.name for person in world.people for _ in range(3)], number)
    entries = [f"{writer} signed the guest book. {writer} wrote: {world.review(rng)[0]}" for writer in writers]
    pages += ["\n".join(entries[start : start + 4]) for start in range(0, len(entries), 4)]
    forms = [rng.choice(RELATIONS[str(q.about["relation"])].held_out_questions) for q in on_strangers]
    asks = [ask(form.format(name=q.about["name"])) for q, form in zip(on_strangers, forms, strict=True)]
    questions = [replace(question, prompt=prompt) for question, prompt in zip(on_strangers, asks, strict=True)]
    return rng.sample(pages, len(pages)), questions


library, about_strangers = make_library(seed)
print(f"{len(library):,} documents, {sum(len(page.split()) for page in library):,} words")
for page in library[:3]:
    print("-", page.replace("\n", "\n  "))

# %% [markdown]
# The questions come in four groups, by how often pretraining mentioned the person. All are asked in forms of question that pretraining never used; single words of them also stand in the library. How often was a fact told? The cell counts names in a sample of the text that shima-4m was trained on, and scales up to all of it.

# %%
BANDS = {"rank 1 to 100": range(1, 101), "rank 101 to 500": range(101, 501), "rank 501 to 1,000": range(501, 1001)}
STRANGERS = "not in pretraining"
bands = {name: world.closed_book(lesson.scaled(80), seed + 2, ranks) for name, ranks in BANDS.items()}
bands[STRANGERS] = about_strangers[: lesson.scaled(80)]
questions = [question for band in bands.values() for question in band]
queries, gold = [asked(question) for question in questions], [question.answer for question in questions]
band_of = np.array([name for name, band in bands.items() for _ in band])
recipe, sample = Recipe(), list(islice(world.documents(Recipe.documents_seed), lesson.scaled(3000)))
documents_read = recipe.steps * recipe.batch_size * recipe.sequence_length / np.mean(num_tokens(sample))
found = Counter(name for text in sample for name in re.findall(r"\b[A-Z]\w{5}\b", text) if name in world.person)
told = sum(found.values()) / len(sample) * documents_read / 5  # a person has five facts, each mention tells one
seen = {}
for name, ranks in BANDS.items():
    times = told * np.mean([world.mention_probability(world.people[rank - 1]) for rank in ranks])
    seen[name] = float(f"{times:.2g}")  # an estimate: two digits are enough
seen[STRANGERS] = 0.0
for name, times in seen.items():
    print(f"{name:>20}: each fact was told about {times:,.0f} times, {len(bands[name])} questions")


# %% [markdown]
# A page is often longer than what should go into a prompt. So it is cut into **chunks** of a fixed number of words. A cut may go through the middle of a sentence and destroy a fact. If neighbouring chunks share $o$ words, then every run of up to $o + 1$ words is whole in some chunk. Shima's facts have 3 to 10 words.

# %%
def cut(text: str, size: int, overlap: int) -> list[str]:
    """Chunks of `size` words; neighbours share `overlap` words."""
    words = text.split()
    return [" ".join(words[start : start + size]) for start in range(0, max(1, len(words) - overlap), size - overlap)]


def states(text: str, question: Question) -> bool:
    """Whether the text says, in one whole sentence, the fact that is asked for: known, since a program wrote it."""
    forms = RELATIONS[str(question.about["relation"])].statements
    return any(form.format(name=question.about["name"], value=question.answer) in text for form in forms)


def reading_prompt(passages: list[str], question: Question) -> str:
    """Passages, one a line, and then the question: the form of Shima's passages."""
    return "\n".join([*passages, ask(asked(question))])


SIZE, OVERLAP = 20, 10
chunks = [chunk for page in library for chunk in cut(page, SIZE, OVERLAP)]
page = next(page for page in library if page.count(world.people[0].name) == 5)
print(page, *cut(page, SIZE, OVERLAP), sep="\n  | ")
print(f"\n{len(chunks):,} chunks of {SIZE} words with an overlap of {OVERLAP}")


# %% [markdown] tags=["core"]
# ## 8 · BM25
#
# **Question.** Which chunks share words with the question, if rare words count more than common ones?
#
# BM25 (Robertson & Zaragoza 2009) scores a chunk $c$ by the words of the question in it. A word's weight is its rarity; its count $f_{w,c}$ saturates, so that the tenth occurrence adds less than the first; and long chunks, which contain more of everything, are damped ($|c|$ words, $\overline{|c|}$ on average):
#
# $$s(q, c) = \sum_{w \in q} \underbrace{\ln\!\left(1 + \frac{N - n_w + \frac12}{n_w + \frac12}\right)}_{\text{rarity}} \cdot \frac{f_{w,c}}{f_{w,c} + k_1 \left(1 - b + b \, |c| / \overline{|c|}\right)}, \qquad k_1 = 1.5,\; b = 0.75$$
#
# Nothing in it depends on the question but the choice of words, so the terms are computed once and stored with each word.
#
# BM25 has variants. This one is called *Lucene (accurate)* by Kamphuis et al. (2020), and `method="lucene"` in `bm25s`. The 1 in the logarithm keeps the weight of a common word above zero; in the original form it can fall below. Lucene itself has this formula since version 8 (before, and in many texts, all is multiplied by $k_1 + 1$, which changes no ranking), with $k_1 = 1.2$ by default, and it stores lengths rounded to one byte. Here $k_1$ is 1.5, the default of `bm25s`, and lengths are exact.

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
        found, self.num_chunks, self.postings = defaultdict(list), len(texts), {}
        for chunk, word, occurrences in ((i, *item) for i, count in enumerate(counts) for item in count.items()):
            found[word].append((chunk, occurrences))
        for word, entries in found.items():
            where, occurrences = np.array(entries).T
            rarity = math.log(1 + (len(texts) - len(where) + 0.5) / (len(where) + 0.5))
            self.postings[word] = where, rarity * occurrences / (occurrences + damping[where])

    def scores(self, query: str) -> np.ndarray:
        """Score of every chunk: (chunks,)."""
        total, nothing = np.zeros(self.num_chunks), ([], 0.0)
        for where, gains in (self.postings.get(word, nothing) for word in words_of(query)):
            total[where] += gains
        return total


# %%
import bm25s

bm25 = BM25(chunks)
library_bm25 = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
library_bm25.index([words_of(chunk) for chunk in chunks], show_progress=False)
difference = max(np.abs(bm25.scores(q) - library_bm25.get_scores(words_of(q))).max() for q in queries[:20])
lesson.equal("our BM25 scores are those of bm25s", difference, within=1e-4)
DEPTH = 50  # how much of a ranking is kept


def top(scores: np.ndarray, k: int = DEPTH) -> list[int]:
    """The k chunks with the highest scores, the best first; of equal scores the earlier chunk."""
    return np.argsort(-scores, kind="stable")[:k].tolist()


print(queries[-1])
for chunk in top(bm25.scores(queries[-1]), 5):
    print(f"  {bm25.scores(queries[-1])[chunk]:5.2f}  {chunks[chunk]}")

# %% [markdown]
# Here the rare name pulls the chunks about the right person to the top. The question's other words help less: the page may say the same in other words, and other pages share the common ones.

# %% [markdown] tags=["further"]
# ## Beside section 8 · What size should a chunk have?
#
# *Further: no core section needs this one.*
#
# Give the model at most 80 words from the top of BM25's ranking, in chunks of 10, 20 or 80 words, and ask about people whom it does not know. (A chunk at the end of a page may be shorter, and a whole page about a stranger has fewer than 80.)

# %%
WORDS, chunk_scores = (10, 20, 80), {}
right_answers = [question.answer for question in bands[STRANGERS]]
for size, overlap in tqdm([(words, shared) for words in WORDS for shared in (0, words // 2)], desc="cuts"):
    pieces = [chunk for page in library for chunk in cut(page, size, overlap)]
    index = BM25(pieces)
    given = [([pieces[i] for i in top(index.scores(asked(q)), 80 // size)], q) for q in bands[STRANGERS]]
    whole = np.array([any(states(piece, question) for piece in passages) for passages, question in given])
    said = answer([reading_prompt(*pair) for pair in given])
    is_right = np.array([text.strip() == right for text, right in zip(said, right_answers, strict=True)])
    chunk_scores[size, overlap] = score(int(is_right.sum()), len(is_right))
    print(f"{size:>2} words, {overlap:>2} shared: {len(pieces):>6,} chunks, {whole.sum()} of {len(whole)} facts whole: "
          f"right {chunk_scores[size, overlap]}; of the {(~whole).sum()} others {is_right[~whole].sum()}")  # fmt: skip

# %%
kinds = {"no overlap": lambda size: 0, "half overlaps": lambda size: size // 2}
figure = plots.curve(
    {name: plots.scored_line(WORDS, [chunk_scores[size, of(size)] for size in WORDS]) for name, of in kinds.items()},
    title="With an overlap, small chunks lose fewer answers",
    xlabel="words in a chunk; the prompt holds at most 80",
    ylabel="right answers (axis from 40 %)",
    alt="Right answers over the size of a chunk: without overlap short chunks lose facts, with overlap fewer.",
    percent=True,
    limits_y=(0.4, 1.02),
)
figure.axes[0].set_xticks(WORDS)
plots.show(figure)
gains = {size: chunk_scores[size, size // 2].accuracy - chunk_scores[size, 0].accuracy for size in WORDS}
gain = np.mean([gains[size] for size in WORDS if size < 80])  # at 80 words only guest book pages are cut
lesson.claim("at 10 and 20 words a chunk, overlap gains at least 5 points on average", gain, at_least=0.05,
             control=gains[80], form=".0%")  # fmt: skip
for overlap in (0, 10):
    lesson.report(f"strangers' facts, chunks of 20 words, overlap {overlap}", str(chunk_scores[20, overlap]))


# %% [markdown]
# **What you see.** Without overlap, a cut goes through many facts, and small chunks lose many of them. With an overlap as long as the longest fact (20 words and 10) whole facts are kept, and there are more chunks to store and search. At 80 words only pages of the guest book are cut, which tell no fact that is asked, so overlap changes nothing: that is the control. The last number of each line counts right answers to the other questions, where no passage in the prompt holds the whole sentence: sometimes its pieces are enough. (This count does not say which pieces, one half or both.) Copying some other value from the passages hardly explains it: section 14 deletes the fact from the library, and strangers then get next to nothing right.

# %% [markdown] tags=["core"]
# ## 9 · Measures of a ranking
#
# Answers depend on the reader too. To judge a ranking alone, mark which chunks are relevant (here: they state the fact) and compute, for the relevant set $R$ and the ranking $c_1, c_2, \dots$ with $\text{rel}_i \in \{0, 1\}$:
#
# $$\text{recall@}k = \frac{|R \cap \{c_1 \dots c_k\}|}{|R|}, \qquad \text{MRR} = \text{mean over questions of } \frac{1}{\text{rank of the first relevant one}}, \qquad \text{nDCG@}k = \frac{\sum_{i \le k} \text{rel}_i / \log_2(i + 1)}{\sum_{i \le \min(k, |R|)} 1 / \log_2(i + 1)}$$
#
# Recall asks what reaches the reader, MRR how soon the first useful chunk comes, nDCG looks at all of them and discounts late ones. Stories that tell a fact in other words do not count as relevant here.

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

# %%
with_word = {word: where for word, (where, _) in bm25.postings.items()}
named = [set(with_word[str(question.about["name"]).lower()].tolist()) for question in questions]
relevant = [{i for i in found if states(chunks[i], q)} for found, q in zip(named, questions, strict=True)]
assert all(relevant)  # the overlap keeps every fact whole
ceiling = np.mean([1 / len(found) for found in relevant])
print(f"{np.mean([len(found) for found in relevant]):.2f} relevant chunks a question: recall@1 can reach {ceiling:.3f}")
rankings = {"BM25": [top(bm25.scores(query)) for query in queries]}
for name, measure in MEASURES.items():
    values = [measure(*pair) for pair in zip(rankings["BM25"], relevant, strict=True)]
    print(f"BM25, {name}: {np.mean(values):.3f}")


# %% [markdown] tags=["further"]
# ## Beside section 9 · The same measures with scikit-learn
#
# *Further: no core section needs this one.*
#
# Its functions want a row of labels and a row of scores for each question. A quarter of the questions will do.

# %%
from sklearn.metrics import label_ranking_average_precision_score, ndcg_score, recall_score


def library_measures(rankings: list[list[int]], relevant: list[set[int]]) -> dict[str, float]:
    """The four measures with scikit-learn."""
    labels = np.zeros((len(rankings), len(chunks)), dtype=int)
    first, scores = labels.copy(), labels.astype(float)
    for row, (ranking, right) in enumerate(zip(rankings, relevant, strict=True)):
        labels[row, list(right)] = 1
        scores[row, ranking] = 1 / np.arange(1, len(ranking) + 1)
        first[row, next((i for i in ranking if i in right), ranking[-1])] = 1  # average precision of one = 1 / its rank
    recalls = {k: recall_score(labels, scores >= 1 / k, average="samples") for k in (1, 5)}
    mrr = label_ranking_average_precision_score(first, scores)
    return {"recall@1": recalls[1], "recall@5": recalls[5], "MRR": mrr, "nDCG@10": ndcg_score(labels, scores, k=10)}


# %%
rows = [row for row in range(0, len(questions), 4) if reciprocal_rank(rankings["BM25"][row], relevant[row])]
subset = [rankings["BM25"][row] for row in rows], [relevant[row] for row in rows]
theirs = library_measures(*subset)
ours = {name: np.mean([of(*pair) for pair in zip(*subset, strict=True)]) for name, of in MEASURES.items()}
for name in MEASURES:
    print(f"{name:>9}: {ours[name]:.6f}, scikit-learn {theirs[name]:.6f}")
difference = max(abs(ours[name] - theirs[name]) for name in MEASURES)
lesson.equal("recall, MRR and nDCG are those of scikit-learn", difference, within=1e-9)


# %% [markdown] tags=["core"]
# ## 10 · A dense encoder, trained by contrast
#
# **Question.** BM25 does not know that "lives" and "has a house" belong together. Can that be learnt?
#
# A dense retriever (Karpukhin et al. 2020) maps question and chunk to vectors and ranks by their product. (Ours have length 1 and share one encoder; theirs do neither.) It is trained on pairs: a question $q_i$ and a chunk $c_i$ that answers it. The other chunks of the batch serve as wrong ones, which costs next to nothing (*in-batch negatives*; van den Oord et al. 2018). Some of them answer the question too; exercise 2.2 leaves those out:
#
# $$\mathcal{L} = -\frac1B \sum_{i=1}^{B} \ln \frac{\exp(q_i \cdot c_i / \tau)}{\sum_{j=1}^{B} \exp(q_i \cdot c_j / \tau)}$$
#
# Ours is very small: one vector and one weight for each token, shared by questions and chunks. The weights say which tokens count, and the text's vector is the weighted mean.

# %%
class Encoder(nn.Module):
    """Texts to unit vectors: a mean of token vectors, weighted by a learnt weight of each token."""

    def __init__(self, vocab_size: int, size: int = 128):
        super().__init__()
        self.vectors = nn.Embedding.from_pretrained(torch.randn(vocab_size, size) * size**-0.5, freeze=False)
        self.weights = nn.Embedding.from_pretrained(torch.zeros(vocab_size, 1), freeze=False)

    def forward(self, texts: list[str]) -> Tensor:
        input_ids, attention_mask = tokenise(texts)
        weights = self.weights(input_ids).squeeze(-1).masked_fill(~attention_mask, -torch.inf).softmax(-1)
        return F.normalize((weights[..., None] * self.vectors(input_ids)).sum(1), dim=-1)  # (batch, size)


def contrastive_loss(questions: Tensor, chunks: Tensor, temperature: float = 0.1) -> Tensor:
    """The loss above for unit vectors (batch, size) and (batch, size), where row i belongs to row i."""
    similarity = questions @ chunks.T / temperature  # (batch, batch)
    return F.cross_entropy(similarity, torch.arange(len(questions), device=similarity.device))


def tokenise(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids, padded with 0, and the mask that is false there, each (batch, seq)."""
    rows = tokenizer(texts)["input_ids"]
    width = max(map(len, rows))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=machine.device)
    return ids.clamp(min=0), ids >= 0


# %% [markdown]
# The training pairs are about the people of *another* island, a world with another seed: hardly any name is on both islands. Their questions are in wordings that the test questions do not use; their statements are in the forms in which the library is written. A batch holds three questions on each person, so that a name alone does not solve it. Three encoders are trained, with other first weights and other pairs; the lesson goes on with the first. A fourth keeps its random weights: it is the baseline, since texts that share tokens are near each other even so.

# %%
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


def train_encoder(train_seed: int, steps: int) -> Encoder:
    """An encoder whose first weights and whose training pairs are those of the seed; 0 steps leave it untrained."""
    torch.manual_seed(train_seed)
    encoder, rng, losses = Encoder(len(tokenizer)).to(machine.device), random.Random(train_seed), []
    optimizer = torch.optim.Adam(encoder.parameters())
    for step in tqdm(range(steps), desc="contrastive training", disable=not steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        asks, tells = training_pairs(island, rng, num_people=64)
        loss = contrastive_loss(encoder(asks), encoder(tells))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if losses:
        print(f"seed {train_seed}: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats; chance {math.log(3 * 64):.2f}")
    return encoder


island = World(seed + 1)
encoders = [train_encoder(train_seed, lesson.scaled(100)) for train_seed in (seed, seed + 100, seed + 200)]


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


chosen = load_pretrained_encoder(encoder_id) if encoder_id else encoders[0]


@torch.no_grad()
def encode(texts: list[str], encoder=chosen) -> Tensor:
    """Unit vectors (texts, size)."""
    return torch.cat([encoder(texts[start : start + 512]).cpu() for start in range(0, len(texts), 512)])


def similarities(encoder) -> np.ndarray:
    """Products of all questions and all chunks: (questions, chunks)."""
    return (encode(queries, encoder) @ encode(chunks, encoder).T).numpy()


similarity = similarities(chosen)
rankings["dense"] = [top(row) for row in similarity]
untrained = [top(row) for row in similarities(train_encoder(seed, steps=0))]
trainings = [[top(row) for row in similarities(encoder)] for encoder in encoders if encoder is not chosen]
trainings += [] if encoder_id else [rankings["dense"]]
print(queries[-1])
for chunk in rankings["dense"][-1][:5]:
    print(f"  {similarity[-1, chunk]:5.2f}  {chunks[chunk]}")


# %% [markdown]
# **What you see.** In section 8 four of BM25's first five chunks hold the name. Here all five tell of a trade, and one of them is about the right person. That is one example; the next section counts.

# %% [markdown] tags=["core"]
# ## 11 · Fusion, filter and reranking
#
# **Question.** You have two rankings of the same chunks. How do you join them, and is it worth it?
#
# Their scores are on different scales, but both give ranks. **Reciprocal rank fusion** (Cormack et al. 2009) needs no training and no scaling:
#
# $$s(c) = \sum_{\text{rankings } r} \frac{1}{60 + \text{rank}_r(c)}$$
#
# Simpler still is a **filter**: keep only chunks that hold the rarest word of the question, in the order of the encoder.
#
# A **reranker** looks at question and chunk together, which is slower, so it only sees the head of the ranking. Here the language model itself does it, without any training. It reads each chunk alone and answers. A chunk is good if that answer $\hat{a}$ really stands in it; otherwise the model has guessed, or remembered:
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


def filtered(query: str, values: np.ndarray) -> list[int]:
    """The chunks with the rarest word of the question, by their value; of all words that the library has."""
    rarest = min((word for word in words_of(query) if word in with_word), key=lambda word: len(with_word[word]))
    where = with_word[rarest]
    return where[top(values[where])].tolist()


assert fuse([[7, 8, 9], [9, 7, 5]]) == [7, 9, 8, 5]  # 1/61 + 1/62; 1/63 + 1/61; 1/62; 1/63
rankings["hybrid"] = [fuse(list(pair)) for pair in zip(rankings["BM25"], rankings["dense"], strict=True)]
rankings["filtered"] = [filtered(*pair) for pair in zip(queries, similarity, strict=True)]


# %%
def rerank(rankings: list[list[int]], head: int = 6) -> list[list[int]]:
    """Of the first `head` chunks, those ahead that hold what the model answers from them alone."""
    pairs = [(chunks[i], query) for query, ranking in zip(queries, rankings, strict=True) for i in ranking[:head]]
    guesses = answer([f"{chunk}\n{ask(query)}" for chunk, query in pairs])
    grounded = [bool(text.strip()) and text.strip() in chunk for text, (chunk, _) in zip(guesses, pairs, strict=True)]
    return [good_first(ranking, grounded[head * row : head * (row + 1)]) for row, ranking in enumerate(rankings)]


def good_first(ranking: list[int], marks: list[bool]) -> list[int]:
    """The ranking, with those of its first chunks ahead that are marked as good."""
    good = dict(zip(ranking, marks, strict=False))
    return sorted(good, key=lambda chunk: not good[chunk]) + ranking[len(good) :]


started = time.perf_counter()
rankings["reranked"] = rerank(rankings["hybrid"])
print(f"reranking took {1000 * (time.perf_counter() - started) / len(queries):.0f} ms a question")
filter_reranked = rerank(rankings["filtered"])


def values_of(measure, ranked: list[list[int]]) -> np.ndarray:
    """The measure for each question."""
    return np.array([measure(*pair) for pair in zip(ranked, relevant, strict=True)])


listed = {"BM25": rankings["BM25"], "dense, untrained": untrained, **rankings, "filtered, reranked": filter_reranked}
means = {name: {of: values_of(measure, ranked).mean() for of, measure in MEASURES.items()}
         for name, ranked in listed.items()}  # fmt: skip
table = {name: [f"{value:.3f}" for value in of.values()] for name, of in means.items()}
best = [[measure(list(found), found) for found in relevant] for measure in MEASURES.values()]  # all relevant ones first
table["best possible"] = [f"{np.mean(values):.3f}" for values in best]
show_table(table, list(MEASURES))
for of in ("recall@5", "MRR"):
    values = [values_of(MEASURES[of], ranked).mean() for ranked in trainings]
    said = f"mean {np.mean(values):.3f}, {min(values):.3f} to {max(values):.3f}"
    print(f"{of} of three trained encoders: {said}")
    lesson.report(f"{of} of three trained encoders", said)
    lesson.report(f"{of} of the untrained encoder", means["dense, untrained"][of], ".3f")

# %%
DEPTHS, series = [1, 2, 3, 5, 8, 10, 20], {}
for name in rankings:
    shares = [values_of(lambda *pair, k=k: recall_at(k, *pair), rankings[name]) for k in DEPTHS]
    ends = [bootstrap_interval(values, seed=seed, resamples=300) for values in shares]
    series[name] = (DEPTHS, [values.mean() for values in shares], *zip(*ends, strict=True))
figure = plots.curve(
    series, title="The rankings differ most in the first places", log_x=True, percent=True,
    xlabel="chunks taken, k", ylabel="recall@k (axis from 50 %)", limits_y=(0.5, 1.01),
    alt="Recall over the number of chunks for five rankings: they start apart; from five on all but dense are close.",
)  # fmt: skip
figure.axes[0].set_xticks(DEPTHS, DEPTHS)
plots.show(figure)
PAIRS = [("dense", "BM25"), ("hybrid", "BM25"), ("hybrid", "dense"), ("filtered", "dense"), ("reranked", "filtered"),
         ("filtered, reranked", "filtered"), ("filtered, reranked", "reranked")]  # fmt: skip
table = {}
for one, other in PAIRS:
    cells = table[f"{one} minus {other}"] = []
    for measure in MEASURES.values():
        gaps = values_of(measure, listed[one]) - values_of(measure, listed[other])
        cells.append("{:+.3f} ({:+.3f} to {:+.3f})".format(gaps.mean(), *bootstrap_interval(gaps, seed=seed)))
    lesson.report(f"recall@1 of {one} minus {other}", cells[0])
    lesson.report(f"MRR of {one} minus {other}", cells[2])
show_table(table, list(MEASURES))

# %%
mrr = {name: means[name]["MRR"] for name in rankings}
rng = random.Random(f"marks/{seed}")
at_random = [good_first(ranking, [rng.random() < 0.5 for _ in range(6)]) for ranking in rankings["hybrid"]]
shuffled = np.mean([reciprocal_rank(*pair) for pair in zip(at_random, relevant, strict=True)])
lesson.claim("the encoder beats BM25 in MRR by at least 0.02", mrr["dense"] - mrr["BM25"], at_least=0.02,
             control=means["dense, untrained"]["MRR"] - mrr["BM25"], form=".3f")  # fmt: skip
lesson.claim(
    "the reranker raises the MRR of the hybrid by at least 0.05",
    mrr["reranked"] - mrr["hybrid"],
    at_least=0.05,
    control=shuffled - mrr["hybrid"],  # marks by chance
    form=".3f",
)
for name in rankings:
    lesson.report(f"{name}: recall@5, MRR", f"{means[name]['recall@5']:.2f}, {mrr[name]:.2f}")
alike = []  # does the statement share a word with the question, beside the name and which, what, where, does?
for query, question, found in zip(queries, questions, relevant, strict=True):
    name, relation = (str(question.about[key]) for key in ("name", "relation"))
    told = [form for form in RELATIONS[relation].statements
            if any(form.format(name=name, value=question.answer) in chunks[i] for i in found)]  # fmt: skip
    words = {word for word in words_of(query) if len(word) > 3} - {name.lower(), "which", "what", "where", "does"}
    alike.append(bool(words & {*words_of(" ".join(told))}))
firsts = {name: values_of(lambda ranking, right: float(ranking[0] in right), ranked) for name, ranked in listed.items()}
for said, of in {"a shared word": np.array(alike), "no shared word": ~np.array(alike)}.items():
    shares = ", ".join(f"{name} {firsts[name][of].mean():.0%}" for name in ("BM25", "dense, untrained", "dense"))
    gap = in_points((firsts["dense"] - firsts["BM25"])[of])
    print(f"{said}: a right chunk first: {shares}; dense minus BM25 {gap}")
    lesson.report(f"{said}: a right chunk first, dense minus BM25", gap)

# %% [markdown]
# **What you see.** The second table has each difference with its interval over the questions; where an interval holds 0, these questions do not decide.
#
# - **BM25** has nearly everything among its first five, but less often in the first place. It finds the person; in the example of section 8 two chunks of that person tie, and only one tells what was asked.
# - **The encoder** puts the right fact first more often, and loses some questions from its first five. The last two lines split the questions. Where the statement shares no word with the question beside the name (and "live" is not "lives" here), the encoder is ahead of BM25. Where it shares one, the interval holds 0 (on one of the four other seeds in the ledger the encoder is ahead there too). The untrained encoder is behind both. So training has taught it which sentences belong to which question. It learned from statements in the same forms as the library's; BM25 has learned nothing. The three trainings differ from each other by much less than they do from the untrained encoder or from BM25 in MRR.
# - **Fusion** does not beat both of its parents here: it has BM25's recall at 5, and its recall at 1 and MRR are below those of the encoder alone.
# - **The filter** has higher means than both parents on all four measures, and asks the language model nothing. (In recall at 5 it is 0.01 or less above BM25 in this run; the second table holds no interval for that.) It needs the name that each of these questions holds.
# - **The reranker** repairs the first places of the fusion, for six short answers of the language model on each question. Marks by chance instead lower the MRR: that is its control. Compare it with the filter measure by measure, recall at 5 too. Reranking the filter's own list changes too little here for these questions to decide; on three of the four other seeds in the ledger it lowers recall at 1.
#
# The last row of the first table is a perfect ranking. A question with more than one fitting chunk cannot have all of them in the first place, so recall at 1 has a ceiling.

# %% [markdown] tags=["core"]
# ## 12 · Answers, by how often a fact was seen
#
# **Question.** For which facts is retrieval worth its price?
#
# Ask every question closed-book, with the top three chunks of each ranking, and with an *oracle* that hands over one chunk which states the fact. With the oracle the passage is right, so what is still wrong is the reader's mistake.

# %%
TOP = 3


def picked(name: str, row: int) -> list[str]:
    """The passages that a method puts in front of question number `row`."""
    if name == "closed book":
        return []
    return [chunks[min(relevant[row])]] if name == "oracle" else [chunks[i] for i in rankings[name][row][:TOP]]


METHODS = [*rankings, "oracle", "closed book"]
prompts, replies, right = {}, {}, {}
for method in tqdm(METHODS, desc="methods"):
    prompts[method] = [reading_prompt(picked(method, row), question) for row, question in enumerate(questions)]
    replies[method] = answer(prompts[method])
    right[method] = np.array([text.strip() == value for text, value in zip(replies[method], gold, strict=True)])
lacking = {}  # the same ranking without the chunks that hold the answer, minus closed book
for band in ("rank 501 to 1,000", STRANGERS):
    rows = np.flatnonzero(band_of == band)
    left = [[chunks[i] for i in rankings["reranked"][row] if gold[row] not in chunks[i]][:TOP] for row in rows]
    given = answer([reading_prompt(passages, questions[row]) for passages, row in zip(left, rows, strict=True)])
    found = np.array([text.strip() == gold[row] for text, row in zip(given, rows, strict=True)], dtype=float)
    lacking[band] = found - right["closed book"][rows]
by_band = {}
for band in bands:
    members = band_of == band
    by_band[band] = {method: score(int(right[method][members].sum()), int(members.sum())) for method in METHODS}
table = {band: [f"{s.accuracy:.0%}" for s in results.values()] for band, results in by_band.items()}
table["tokens in a prompt"] = [f"{np.mean(num_tokens(prompts[method])):.0f}" for method in METHODS]
show_table(table, METHODS)

# %% tags=["headline"]
figure, axes = plt.subplots(figsize=(8, 4))
for number, method in enumerate(METHODS):  # the colours of the rankings are those of the figure above
    scores = [by_band[band][method] for band in bands]
    where, heights = np.arange(len(bands)) + 0.1 * (number - 3), [s.accuracy for s in scores]
    ends = [[s.accuracy - s.low for s in scores], [s.high - s.accuracy for s in scores]]
    axes.errorbar(where, heights, ends, fmt="o", color=plots.COLORS[number], label=method)
axes.set_xticks(range(len(bands)), [f"{band},\ntold {seen[band]:,.0f} times" for band in bands])
axes.set(title="The less often a fact was told, the more retrieval gives", ylabel="right answers")
axes.yaxis.set_major_formatter(plots.PERCENT)
axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
plots.show(
    figure, "Right answers by how often the fact was told: closed-book falls, all ways with retrieval stay high."
)
gaps = {band: (right["reranked"] * 1.0 - right["closed book"])[band_of == band] for band in bands}
lift = {band: values.mean() for band, values in gaps.items()}
for band, values in gaps.items():
    print(f"{band:>20}: reranked passages lift by {in_points(values)}")
    for method in ("closed book", "reranked"):
        lesson.report(f"{band}, {method}", str(by_band[band][method]))
for band, values in lacking.items():
    print(f"{band:>20}: the same without chunks that hold the answer: {in_points(values)}")
lesson.claim("retrieval lifts rare facts by at least 40 points", lift["rank 501 to 1,000"], at_least=0.4,
             control=lacking["rank 501 to 1,000"].mean(), form=".0%")  # fmt: skip
lesson.claim("retrieval lifts facts that pretraining never told by at least 40 points", lift[STRANGERS], at_least=0.4,
             control=lacking[STRANGERS].mean(), form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Facts that pretraining told more than a thousand times the model knows, and there is nothing left to add. Of those that it told about a hundred times or less it knows a part, and of those that it was never told next to none. There retrieval gives nearly everything. Each lift stands with its interval over the questions of its group.
#
# Is it the fact in the passages that helps, or passages as such? The last two lines before the claims keep the ranking and leave out every chunk that holds the answer. The lift is gone; on rare facts the model is now worse than without any passage. That is the control of both claims.
#
# The price stands in the last row of the table: three passages make the prompt several times as long, besides the search. All retrievers are within a few points of the oracle, the simple ones too (once the oracle's one chunk is below three chunks, by one question), and 80 questions a group do not rank them. This is the long tail of Kandpal et al. (2023): you cannot easily find more training text about a rare fact, but you can put one passage about it into the prompt.

# %% [markdown] tags=["further"]
# ## 13 · Distractors and position
#
# *Further: no core section needs this one.*
#
# **Question.** The right passage is in the prompt. What else in the prompt can spoil the answer?
#
# Take strangers, so that memory cannot help. One sentence states the fact. Add $m$ others, of three kinds: *random chunks* of the library; the same kind of fact about *other people*; and the same about *lookalikes*, whose names differ from the right one in one syllable. The right sentence stands at a random place.

# %%
SYLLABLES = sorted({name[i : i + 2].lower() for name in world.person for i in (0, 2, 4)})
unknown_rows = np.flatnonzero(band_of == STRANGERS).tolist()


def lookalike(name: str, rng: random.Random) -> str:
    """The name with one other syllable."""
    place = rng.choice((0, 2, 4))
    other = rng.choice([s for s in SYLLABLES if s != name[place : place + 2].lower()])
    return (name[:place] + other + name[place + 2 :]).capitalize()


def passages_with(kind: str, row: int, m: int, rng: random.Random) -> list[str]:
    """The sentence that answers the question, after m that do not."""
    name, relation = str(questions[row].about["name"]), str(questions[row].about["relation"])
    forms, passages = RELATIONS[relation].training_statements, []
    wrong_values = [value for value in world.values[relation] if value != questions[row].answer]
    for _ in range(m):
        if kind == "random chunks":
            passages.append(rng.choice([chunk for chunk in rng.sample(chunks, 3) if name not in chunk]))
            continue
        other = lookalike(name, rng) if kind == "lookalikes" else str(rng.choice(about_strangers).about["name"])
        value = rng.choice(wrong_values)
        passages.append(rng.choice(forms).format(name=other if other != name else lookalike(name, rng), value=value))
    return [*passages, rng.choice(forms).format(name=name, value=questions[row].answer)]


# %%
NUMBERS, crowded = [0, 2, 8, 12], {"random chunks": [], "other people": [], "lookalikes": []}
rows, table = unknown_rows[: lesson.scaled(40)], {}
for kind, results in crowded.items():
    for m in NUMBERS:
        rng, prompts = random.Random(f"{kind}/{m}/{seed}"), []
        for row in rows:
            *others, right_one = passages_with(kind, row, m, rng)
            others.insert(rng.randint(0, m), right_one)
            prompts.append(reading_prompt(others, questions[row]))
        results.append(exact_match(answer(prompts), [gold[row] for row in rows]))
        table[f"{m} {kind}"] = results[-1], f"{np.mean(num_tokens(prompts)):.0f}"
show_table(table, ["right", "tokens in a prompt"])
figure = plots.curve(
    {kind: plots.scored_line(NUMBERS, results) for kind, results in crowded.items()},
    title="Lookalikes cost answers early, random chunks in long prompts", percent=True, limits_y=(-0.02, 1.02),
    xlabel="distractors beside the right sentence", ylabel="right answers",
    alt="Right answers over the number of distractors, of three kinds: lookalikes cost much, other people little.",
)  # fmt: skip
plots.show(figure)
cost = {kind: results[0].accuracy - results[NUMBERS.index(8)].accuracy for kind, results in crowded.items()}
lesson.claim("8 lookalikes cost at least 20 points", cost["lookalikes"], at_least=0.2,
             control=cost["other people"], form=".0%")  # fmt: skip
for kind, results in crowded.items():
    lesson.report(f"right sentence among 12 distractors: {kind}", str(results[-1]))

# %% [markdown]
# **Does the place matter?** Large models with long prompts read the beginning and the end better than the middle (Liu et al. 2023). Put the right sentence first, in the middle or last among random chunks: once in prompts that fit into shima-4m's training rows, once in longer ones. The chunks and questions are the same at every place, so differences are taken within a question.

# %%
table = {}
for m in (5, 9):
    found = {}
    for name, place in {"first": 0, "middle": m // 2, "last": m}.items():
        rng, prompts = random.Random(f"place/{seed}"), []  # the same distractors at every place
        for row in rows:
            *others, right_one = passages_with("random chunks", row, m, rng)
            prompts.append(reading_prompt([*others[:place], right_one, *others[place:]], questions[row]))
        given = zip(answer(prompts), rows, strict=True)
        found[name] = np.array([text.strip() == gold[row] for text, row in given], dtype=float)
    label = f"{m + 1} passages, {np.mean(num_tokens(prompts)):.0f} tokens"
    table[label] = [f"{values.mean():.0%}" for values in found.values()]
    for name in ("first", "last"):
        table[label].append(in_points(found[name] - found["middle"]))
        lesson.report(f"right sentence {name} of {m + 1} passages, against the middle", table[label][-1])
show_table(table, ["first", "middle", "last", "first minus middle", "last minus middle"])
print(f"shima-4m was trained on rows of {recipe.sequence_length} tokens")

# %% [markdown]
# **What you see.** There are 40 questions in each row, so only large gaps count.
#
# - **Other people** cost little or nothing, although their facts have the same form.
# - **Lookalikes** cost much, and with two of them some answers are lost already.
# - **Random chunks.** Two cost nothing. Eight make a prompt longer than a row of training and cost some answers; with twelve most are lost. But twelve of them fill three times as many tokens as twelve lookalikes, so the two falls need not have the same cause. To see length alone, you would need other people in prompts just as long.
# - **The place.** In prompts that fit into a training row it hardly matters. In the longer ones the last place is behind the middle. For the first place the interval holds 0, so these 40 questions do not decide (on three of the four other seeds in the ledger it is behind too). In the U of Liu et al. (2023) the last place would be ahead of the middle: this is not it. Distance from the question is not the whole cause, since the last place stands right beside it. What the cause is, this measurement does not show.

# %% [markdown] tags=["core"]
# ## 14 · When the library is wrong: harm, and what a citation proves
#
# **Question.** What happens when the library lacks the fact, or holds an old one? And can you notice it from the answer and its source?
#
# Change the library. In the second version every sentence that holds the name and the answer is deleted, in stories too; in the third it is replaced by a statement with another value, as if the fact had changed since. The person's pages are cut again and ranked by the filter of section 11. Ask about the best-known people, whose facts the model knows by heart, and about strangers.

# %%
pages_of = defaultdict(list)  # name -> the pages that mention it
for page in library:
    for name in {*re.findall(r"\b[A-Z][a-z]{5}\b", page)}:
        pages_of[name].append(page)


def passages_after(row: int, instead: str | None) -> list[str]:
    """The best passages once each sentence that tells the fact is replaced: "" deletes it, None keeps it."""
    name, pieces = str(questions[row].about["name"]), []
    for page in pages_of[name]:
        sentences = re.split(r"(?<=[.!?])\s", page)
        if instead is not None:
            tells = [{name, gold[row]} <= {*re.findall(r"\w+", sentence)} for sentence in sentences]
            sentences = [instead if old else sentence for old, sentence in zip(tells, sentences, strict=True)]
        pieces += [chunk for chunk in cut(" ".join(sentences), SIZE, OVERLAP) if name in chunk]
    if not pieces:
        return []
    order = top((encode(pieces) @ encode([queries[row]])[0]).numpy(), TOP)
    return [pieces[i] for i in order]


# %%
GROUPS = {"known by heart": "rank 1 to 100", "strangers": STRANGERS}
LIBRARIES = ("complete", "fact missing", "fact outdated")
rng, stale = random.Random(f"harm/{seed}"), {}  # row -> the sentence that replaces the fact
cases = {}  # (group, library) -> rows, their passages, and the answers
for group, band in GROUPS.items():
    rows = np.flatnonzero(band_of == band).tolist()
    for row in rows:
        relation, name = str(questions[row].about["relation"]), questions[row].about["name"]
        value = rng.choice([value for value in world.values[relation] if value != gold[row]])
        stale[row] = rng.choice(RELATIONS[relation].training_statements).format(name=name, value=value)
    for version in LIBRARIES:
        instead = [{"complete": None, "fact missing": "", "fact outdated": stale[row]}[version] for row in rows]
        found = [passages_after(*pair) for pair in zip(rows, instead, strict=True)]
        given = answer([reading_prompt(passages, questions[row]) for row, passages in zip(rows, found, strict=True)])
        cases[group, version] = rows, found, [text.strip() for text in given]
harm = {}
for group, band in GROUPS.items():
    harm[group] = {"closed book": by_band[band]["closed book"]}
    for version in LIBRARIES:
        rows, _, given = cases[group, version]
        harm[group][version] = exact_match(given, [gold[row] for row in rows])

# %%
alt = "Right answers for known facts and for strangers: closed book, and with three libraries; outdated is worst."
title = "For facts that the model knows, an outdated library is worse than none"
show_bars(harm, title, "right answers", alt)
for group, results in harm.items():
    for name in LIBRARIES:
        lesson.report(f"{group}, {name}", str(results[name]))
mine = harm["known by heart"]
rows, found, given = cases["known by heart", "fact outdated"]
read = np.array([any(stale[row] in passage for passage in passages) for row, passages in zip(rows, found, strict=True)])
kept = np.array([text == gold[row] for text, row in zip(given, rows, strict=True)])
print(f"known by heart, outdated: {kept[read].sum()} of {read.sum()} right with the stale sentence among the passages, "
      f"{kept[~read].sum()} of {(~read).sum()} right without it")  # fmt: skip
lost = {version: mine["closed book"].accuracy - mine[version].accuracy for version in LIBRARIES}
lesson.claim("an outdated fact costs at least 20 points of what was known by heart", lost["fact outdated"],
             at_least=0.2, control=lost["complete"], form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** With the contradicting statement the model mostly repeats what the passage says, also where it knew better. Not always: some known facts are still answered from memory. The printed line counts them, and says in how many cases the stale sentence was among the three passages at all, so that memory is not taken for a miss of the retriever. Strangers have no other source, so read the two groups apart. With the fact deleted the model still answers, from memory or from what else the passages say.
#
# Only facts that the model already knew have much to lose: a missing sentence costs them some points, a contradicting one most.
#
# "Outdated" is our word, and the run itself cannot tell which side is old. If the library is newer than the model, the same behaviour is what you want.
#
# **Citations.** Can you notice it? Let each answer cite a passage, and check whether the passage supports the answer. A program that checks this does not know the truth, nor how Shima phrases facts. So it looks at the text alone: a passage *supports* an answer if one of its sentences holds both the name that was asked about and the answer. Cite the first such passage; without one, call the answer unsupported. First test the checker itself.

# %%
def supports(passage: str, name: str, given: str) -> bool:
    """Whether one sentence of the passage holds the name and the answer as whole words."""
    needed = [re.compile(rf"\b{re.escape(text)}\b") for text in (name, given)]
    sentences = re.split(r"(?<=[.!?])\s", passage)
    return bool(given) and any(all(word.search(sentence) for word in needed) for sentence in sentences)


def supported(rows: list[int], found: list[list[str]], given: list[str]) -> np.ndarray:
    """For each answer, whether one of its passages supports it."""
    names = [str(questions[row].about["name"]) for row in rows]
    return np.array([any(supports(passage, name, text) for passage in passages)
                     for name, passages, text in zip(names, found, given, strict=True)])  # fmt: skip


def both_groups(version: str) -> tuple[list, list, list]:
    """Rows, passages and answers of both groups of questions with one library."""
    return tuple([item for group in GROUPS for item in cases[group, version][part]] for part in range(3))


# %% [markdown]
# The checker is tested on the complete library. Beside it stands what the generator's own forms of sentences say, and the simplest citation: the first passage, whatever it says. The control keeps the passages and the name and takes the answer of *another question*. The trap takes *another fact* of the same person, such as the animal where the trade was asked: a wrong answer that stands in a sentence with the name.

# %%
rows, found, given = both_groups("complete")
claimed = [replace(questions[row], answer=text) for row, text in zip(rows, given, strict=True)]
kind_of = {word: relation for relation, words in world.values.items() for word in words}
tests = {
    "supported, by the checker": supported(rows, found, given),
    "supported, by Shima's own forms": [any(states(p, q) for p in c) for c, q in zip(found, claimed, strict=True)],
    "supported by the first passage": supported(rows, [passages[:1] for passages in found], given),
    "the answer of another question": supported(rows, found, given[1:] + given[:1]),
    "another fact of the same person": [],
}
for row, passages in zip(rows, found, strict=True):
    name, asked_for = (str(questions[row].about[key]) for key in ("name", "relation"))
    words = {word for passage in passages for word in re.findall(r"\w+", passage)}
    others = [word for word in words if kind_of.get(word, asked_for) != asked_for]
    passes = any(supports(passage, name, word) for passage in passages for word in others)
    tests["another fact of the same person"].append(passes)
passed = {name: float(np.mean(flags)) for name, flags in tests.items()}
for name, share in passed.items():
    print(f"{name:>31}: {share:.0%} of {len(rows)}")
    lesson.report(f"complete library, {name}", f"{share:.0%}")
lesson.claim("the checker finds at least 80 % of the answers from the complete library supported",
             passed["supported, by the checker"], at_least=0.8,
             control=passed["the answer of another question"], form=".0%")  # fmt: skip

# %%
table, wrong_but_supported, shown = {}, {}, {}
for version in LIBRARIES:
    rows, found, given = both_groups(version)
    is_right = np.array([text == gold[row] for row, text in zip(rows, given, strict=True)])
    flags = supported(rows, found, given)
    kinds = {"supported, right": flags & is_right, "supported, wrong": flags & ~is_right,
             "unsupported, right": ~flags & is_right, "unsupported, wrong": ~flags & ~is_right}  # fmt: skip
    shown[version] = {kind: score(int(found.sum()), len(found)) for kind, found in kinds.items()}
    possible = [world.values[str(questions[row].about["relation"])] for row in rows]
    of_kind = np.mean([text in values for text, values in zip(given, possible, strict=True)])
    table[version] = [*(f"{result.accuracy:.0%}" for result in shown[version].values()), f"{of_kind:.0%}"]
    of_known = np.isin(rows, cases["known by heart", version][0])  # strangers have no other source
    wrong_but_supported[version] = kinds["supported, wrong"][of_known].mean()
show_table(table, [*shown["complete"], "of the kind asked"])
alt = "Shares of supported and unsupported, right and wrong answers with three libraries."
title = "Support tells whether the library says it, not whether it is true"
show_bars(shown, title, "share of all answers", alt)
lesson.claim(
    "from an outdated library at least 30 % of the answers on well-known facts are supported and wrong",
    wrong_but_supported["fact outdated"],
    at_least=0.3,
    control=wrong_but_supported["complete"],
    form=".0%",
)
for version in LIBRARIES:
    lesson.report(f"supported and right, supported and wrong: {version}", " and ".join(table[version][:2]))

# %% [markdown]
# **What you see.**
#
# - **The checker** needs neither the truth nor the forms of sentences. It rejects nearly all answers that belong to another question, so it can fail. But it does not look at what was asked: some other fact of the same person, of all that the passages tell, passes in all or nearly all cases. (Many facts are tried here, and one answer in the row above.) So it is of use only where answers are of the kind that was asked; the last column of the table says how often they are here. The simplest citation, always the first passage, supports most answers too.
# - **Complete library:** most answers are supported and right.
# - **Outdated:** most answers are supported and *wrong*. The passage says so, and the passage is old.
# - **Fact missing:** no answer can be supported and right, since the sentences that would support it are those that were deleted. Some are right without any support.
#
# Support is a check of the answer against its source. It tells you whether the library says it, which is why a system that answers from documents should make it. It does not tell you whether it is true: that check is the library's.

# %% [markdown]
# ## 15 · Exercises
#
# Five. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

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
# Probabilities are added, not their logarithms: so each further sample helps its answer.
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
    factors = torch.tensor([[4.0, 2.0, 1.0], [1.0, 6.0, 3.0], [2.0, 2.0, 1.0]])  # exp(q_i . c_j / 0.5), row i, column j
    questions, chunks = torch.eye(3), 0.5 * factors.log().T
    some = torch.tensor([[False, True, False], [False, False, True], [True, False, False]])
    for name, mask, shares in (
        ("no chunk marked", torch.zeros(3, 3, dtype=torch.bool), (4 / 7, 6 / 10, 1 / 5)),
        ("one other chunk marked for each question", some, (4 / 5, 6 / 7, 1 / 3)),
        ("own chunks marked too", some | torch.eye(3, dtype=torch.bool), (4 / 5, 6 / 7, 1 / 3)),
    ):
        given = masked_contrastive_loss(questions, chunks, mask, temperature=0.5)
        expect_close(f"the loss with {name}", given, torch.tensor(-math.log(math.prod(shares)) / 3), 1e-5)


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
# `~own` takes the diagonal out of the mask, so the pair's own chunk stays.
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
    away = F.normalize(torch.tensor([[1.0, 0.0], [-0.2, 1.0], [-1.0, 0.3], [0.1, -1.0]]), dim=-1)
    picks = diverse(away[0], away, 3, 0.2)  # similarities to what is picked may all be negative: farther is better
    expect_equal("diverse of four vectors that point away from each other, trade 0.2", picks, [0, 2, 3])
    angles = torch.tensor([20.0, 5.0, 12.0, -15.0, 60.0, -70.0, 140.0, 100.0]).deg2rad()
    fan = torch.stack([angles.cos(), angles.sin()], dim=1)  # the query lies at 0 degrees
    for trade, right in ((0.3, [1, 6, 5, 4, 3]), (0.5, [1, 5, 3, 2, 0]), (0.9, [1, 2, 3, 0, 4])):
        expect_equal(f"diverse of 8 directions, trade {trade}", diverse(torch.tensor([1.0, 0.0]), fan, 5, trade), right)


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
# The zeros before the first pick are replaced, not compared: similarities may be negative.
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
# For exercise 2.5: three more ways to write the pairs of section 3, in the form of its WAYS.
NEW_WAYS = {
    "goat red; without a head": ("", "{} {}; ", "{}"),
    "Pairs: goat is red; ...": ("Pairs: ", "{} is {}; ", "{} is"),
    "Pairs: red goat; ... and the word is asked": ("Pairs: ", "{1} {0}; ", "{}"),
}

# For exercise 2.4: facts known by heart that the library lacks, and strangers' facts that it has.
gate_rows, gate_retrieved = [], []
for group, version in (("known by heart", "fact missing"), ("strangers", "complete")):
    rows, _, given = cases[group, version]
    gate_rows += rows
    gate_retrieved += [text == gold[row] for row, text in zip(rows, given, strict=True)]
closed = [f" {replies['closed book'][row].strip()}\n" for row in gate_rows]
gate_confidence = sequence_log_probs(model, tokenizer, [questions[row].prompt for row in gate_rows], closed).tolist()
gate_closed = right["closed book"][gate_rows].tolist()
for name, values in {"closed book": gate_closed, "with retrieval": gate_retrieved}.items():
    print(f"{name:>14}: {np.mean(values):.0%} of {len(values)} right")
print(f"the better of the two each time: {np.mean(np.maximum(gate_closed, gate_retrieved)):.0%}")
print(f"log p of the closed-book answers: {min(gate_confidence):.2f} to {max(gate_confidence):.2f}")


# %% tags=["exercise"]
# Exercise 2.4, medium: look it up only when needed.
def retrieve_for(confidence: float) -> bool:
    """Whether to use retrieval, given log p of the model's own closed-book answer.

    (Adaptive retrieval; Mallen et al. 2023 decide by the popularity of the person.)

    Find a rule on the first half of the questions above (`gate_confidence[::2]`, `gate_closed[::2]` and
    `gate_retrieved[::2]`). On the second half (`[1::2]`) it is tested: it must be right for at least 95 % of what the
    better of the two choices gets each time, and use retrieval for at most 60 % of the questions.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_gate(retrieve_for):
    held_out = slice(1, None, 2)
    chosen = [bool(retrieve_for(confidence)) for confidence in gate_confidence[held_out]]
    expect_true(f"retrieval for {np.mean(chosen):.0%} of the questions, at most 60 %", np.mean(chosen) <= 0.6)
    answers = gate_closed[held_out], gate_retrieved[held_out]
    outcome = np.mean([r if use else c for use, c, r in zip(chosen, *answers, strict=True)])
    best = np.mean(np.maximum(*answers))
    expect_true(f"the rule's {outcome:.0%} are 95 % of the best choices' {best:.0%}", outcome >= 0.95 * best)


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
# A model that knows a fact gives its answer nearly all of the probability. These two groups are extremes, so a wide range of thresholds passes; other questions lie between them. Choose the threshold on questions whose answers you know, and test it on others.
#
# ```python
# def retrieve_for(confidence: float) -> bool:
#     return confidence < math.log(0.8)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 2.5, easy: predict, then measure. What will the three NEW_WAYS above exercise 2.4 score?
PREDICTION = None  # your guess before you run anything: three shares of right labels (0 to 1), in this order


def score_ways(ways: dict[str, tuple[str, str, str]], games: list) -> list[float]:
    """Share of right labels for each of the ways on the games of `label_games`, as in section 3.

    A reply (`answer` with at most 6 new tokens) ends at ";", "," or the end of the line, and is right if it is the
    label and nothing else but white space.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_score_ways(score_ways, prediction):
    guessed = isinstance(prediction, list | tuple) and len(prediction) == len(NEW_WAYS)
    guessed = guessed and all(isinstance(share, int | float) and 0 <= share <= 1 for share in prediction)
    games = label_games(lesson.scaled(80), num_words=8)  # those of section 3, whose shares are known
    known_shares = score_ways(WAYS, games)
    expect_true("PREDICTION holds three numbers between 0 and 1, written before you measured", guessed)
    expect_equal("the number of shares for the WAYS of section 3", len(known_shares), len(WAYS))
    for (name, result), share in zip(way_scores.items(), known_shares, strict=True):
        expect_close(f"the share of {name!r}", float(share), result.accuracy, 1e-6)
    name, way = next(iter(WAYS.items()))
    longer = {written(way, pairs, key): f" {label} and more" for pairs, (key, label) in games}
    real, globals()["answer"] = answer, lambda prompts, *args, **kwargs: [longer.get(text, "") for text in prompts]
    try:
        share = score_ways({name: way}, games)[0]
    finally:
        globals()["answer"] = real
    expect_close("the share if all replies went on after the label, such as ' red and more'", float(share), 0.0, 1e-6)
    for name, share, guess in zip(NEW_WAYS, score_ways(NEW_WAYS, games), prediction, strict=True):
        print(f"{name}: you predicted {guess:.0%}, measured are {share:.0%}")


check("2.5", check_score_ways, score_ways, PREDICTION)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `written(way, pairs, key)` makes the prompt. A game is a list of pairs and the pair that is asked about.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# In section 3 the label stood right behind its word in the four ways that worked, but also in `one pair a line`, which did not. So that alone is not enough. Compare your three guesses with the shares that the check prints. A wrong guess here is worth more than a right one: it shows what you believed about the model without a measurement.
#
# ```python
# PREDICTION = [0.5, 0.5, 0.5]
#
# def score_ways(ways: dict[str, tuple[str, str, str]], games: list) -> list[float]:
#     shares = []
#     for way in ways.values():
#         given = answer([written(way, pairs, key) for pairs, (key, _) in games], 6, stop=(";", ",", "\n"))
#         shares.append(np.mean([text.strip() == label for text, (_, (_, label)) in zip(given, games, strict=True)]))
#     return shares
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson: those of sections 1 and 5. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. In the figure of section 1 the strict bar of "instruction" is empty and the lenient one is full. Which sentence does the figure support?**
#
# - A. The model does not know the facts when it is instructed.
# - B. The answers are in the replies, but not alone on the first line.
# - C. The lenient scorer accepts any reply.
# - D. The model has learnt to follow instructions.
#
# <details><summary>Answer</summary>
#
# B. The lenient scorer is no rubber stamp: the answers of other questions it hardly ever finds in the same replies, and in the chat format it finds next to nothing. D does not follow: the model goes on with its own kind of text.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. In the figure of section 5 the vote over samples starts below the line of one greedy solution and comes back to it. What would you expect from ten times as many samples?**
#
# - A. All sums right, since every mistake is outvoted in the end.
# - B. A fall, since more samples bring more mistakes.
# - C. The same as one sample.
# - D. Little more: where the most frequent answer is wrong, more samples only make it surer.
#
# <details><summary>Answer</summary>
#
# D. More samples show the most probable answer ever more clearly. They do not change which one it is. Another order of the numbers does.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. A report says: "Eight examples raise the accuracy from 7 % to 100 %, so the model learnt the task from the prompt." Which measurement of section 2 speaks against "learnt the task"?**
#
# - A. Answers are right where the asked word itself was among the examples, and near chance where it was not.
# - B. Accuracy is the same with eight and with sixteen examples.
# - C. The known list is high with one example.
# - D. Chance for labels is one in eight.
#
# <details><summary>Answer</summary>
#
# A. The model looks an answer up in the prompt. That is useful, but it is not a rule that it could apply to a new word.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. Your new reranker raises MRR from 0.88 to 0.98. What do you put beside it before you ship it?**
#
# - A. A larger reranker.
# - B. nDCG, which also rises.
# - C. A filter on the name in the question, which costs next to nothing.
# - D. The training loss of the encoder.
#
# <details><summary>Answer</summary>
#
# C. A method is judged against the simplest one that could do the same job. Here the question always holds a rare name, and a filter uses that.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. A monitor shows that 95 % of a RAG system's answers are supported by the passage that they cite. What follows?**
#
# - A. At least 95 % of the answers are true.
# - B. The library is up to date.
# - C. Most answers say what the library says; whether that is true depends on the library.
# - D. The model no longer uses its memory.
#
# <details><summary>Answer</summary>
#
# C. With the outdated library of section 14 nearly every supported answer is wrong, or all. Support is a check of the answer against its source, not of the source against the world.
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
# Nobody writes an index again for each project. Nearly the same retrieval with `bm25s`, which cuts texts into words in its own way and drops stop words:

# %%
started = time.perf_counter()
retriever = bm25s.BM25()
retriever.index(bm25s.tokenize(chunks, stopwords="en", show_progress=False), show_progress=False)
results, result_scores = retriever.retrieve(
    bm25s.tokenize(queries, stopwords="en", show_progress=False), corpus=np.array(chunks), k=TOP, show_progress=False
)
print(f"{len(chunks):,} chunks indexed and {len(queries)} questions looked up in {time.perf_counter() - started:.1f} s")
print(queries[0])
for passage, value in zip(results[0], result_scores[0], strict=True):
    print(f"  {value:5.2f}  {passage}")

# %% [markdown]
# For the dense half, give this notebook an `encoder_id`, for example the sentence-transformers model named beside the parameter. It was tuned on about a billion pairs of sentences, none with a name of Shima: compare its recall with that of the encoder that you trained here.
#
# **What is different at scale**
#
# | here | a real system |
# |---|---|
# | a base model, asked in the format of its documents | a chat model that was tuned to follow instructions (lesson 05); format and order still matter, so test several |
# | all chunks compared with each question | millions to billions, with an approximate index (HNSW, IVF) in a vector database |
# | an encoder trained in seconds on made-up pairs | one trained on very many pairs, with hard negatives, then tuned on your own questions |
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
# - Wei et al. 2022, *Chain-of-Thought Prompting Elicits Reasoning in Large Language Models*; Kojima et al. 2022, *Large Language Models are Zero-Shot Reasoners*; Wang et al. 2022, *Self-Consistency Improves Chain of Thought Reasoning*; Yao et al. 2023, *Tree of Thoughts*.
# - Lewis et al. 2020, *Retrieval-Augmented Generation for Knowledge-Intensive NLP Tasks*; Gao et al. 2023, *Retrieval-Augmented Generation for Large Language Models: A Survey*.
# - Robertson & Zaragoza 2009, *The Probabilistic Relevance Framework: BM25 and Beyond*; Kamphuis et al. 2020, *Which BM25 Do You Mean?*; Lù 2024, *BM25S*.
# - Karpukhin et al. 2020, *Dense Passage Retrieval*; van den Oord et al. 2018, *Representation Learning with Contrastive Predictive Coding*; Reimers & Gurevych 2019, *Sentence-BERT*.
# - Cormack et al. 2009, *Reciprocal Rank Fusion*; Sachan et al. 2022, *Improving Passage Retrieval with Zero-Shot Question Generation*; Carbonell & Goldstein 1998, *The Use of MMR*.
# - Kandpal et al. 2023, *Large Language Models Struggle to Learn Long-Tail Knowledge*; Mallen et al. 2023, *When Not to Trust Language Models*.
# - Liu et al. 2023, *Lost in the Middle*; Gao et al. 2023, *Enabling Large Language Models to Generate Text with Citations*.
