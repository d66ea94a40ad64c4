# %% [markdown]
# # 16 · Reasoning: compute at test time, and what to spend it on
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/16_reasoning.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/16_reasoning.ipynb)
#
# A language model spends the same work on every token. So there are two ways to spend more on a hard question: let it write more, or let it try more often. Both are called *test-time compute*, and both can bring much more where somebody can tell a good attempt from a bad one. In the first half of this lesson you count the tokens. You cut the thinking of a model short and force it to go on. You teach it to find its way on the roads of Shima, draw many answers, and let verifiers choose. You search step by step, and draw all methods into one picture over the tokens that they cost. In the second half the model is to get better by itself: it checks its own answers, learns from those that a checker accepts, and learns what it never did right. At the end you ask whether the steps that it writes are the reason for its answer.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. cut written steps after a number of tokens, force more of them, and compare with a vote;
# 2. write an outcome verifier and a process verifier, equal to scikit-learn's, and see best-of-N get worse with more samples;
# 3. write beam search and a Monte Carlo tree search, and compare all methods at equal tokens;
# 4. compare self-correction with a vote of as many answers and with a checker, and train on verified answers, beside more plain training, with pass@k before and after;
# 5. change written steps, and see whether the answer changes.
#
# **Prerequisites:** lesson 02. Lesson 05 explains fine-tuning, lesson 08 learning from rewards.
#
# **The model** is *shima-4m*, a small Llama that comes with the course. It has never read about the routes of Shima. A program knows all roads, so that every claim can be checked.
#
# | symbol | meaning |
# |---|---|
# | $x$, $y$ | a question and a whole answer; here a start and a goal, and a route |
# | $s_0, s_1, \dots, s_T$ | the towns of a route; a *step* is a pair $(s_{t-1}, s_t)$ |
# | $\pi(y \mid x)$, $\pi(s_t \mid s_{<t}, x)$ | the policy: probability of an answer, and of the next town |
# | $N$, $k$ | number of samples that are drawn, and of samples that may be used |
# | $v(x, y)$ | what a verifier says: the probability that an answer is right |
# | $w$, $\phi$, $C$ | weights of a logistic regression, its inputs, and the weight of its data against its penalty |
# | $n(s, a)$, $Q(s, a)$ | how often a tree search took action $a$ in state $s$, and the mean value that it found there |
# | $c$ | how much a tree search explores |
# | $r(x, y)$, $b$ | reward: 1 if a program finds the answer right, else 0; and a baseline that is taken off |

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
seed = 0
budget = 1.0  # share of all steps and items; the lesson's claims are asserted from 1.0 on

# %%
import copy
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from helpers import plots
from helpers.chat import encode_answer
from helpers.data import PaddedBatches, collate
from helpers.evaluation import Score, bootstrap_interval, exact_match, pass_at_k, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import generate, sequence_log_probs, token_log_probs
from helpers.lesson import Lesson, show_table
from helpers.models import load_model
from helpers.training import TrainConfig, train
from helpers.world import World, is_held_out, sum_with_steps

lesson = Lesson("16", profile, model_id, seed, budget)
machine = lesson.machine
# Step size and number of steps of the policy's fine-tuning, step size of reinforcement learning, and the format in
# which a model waits that is not being trained: a GPU has to hold several.
SETTINGS = {
    "cpu": {"rate": 1e-3, "steps": 100, "rl_rate": 3e-5, "at_rest": torch.float32},
    "t4": {"rate": 1e-4, "steps": 150, "rl_rate": 1e-6, "at_rest": torch.float16},
    "large": {"rate": 1e-4, "steps": 150, "rl_rate": 1e-6, "at_rest": torch.float16},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. `lesson.scaled` makes a number of items or steps smaller on a smaller budget. `generate` decodes many prompts at once; at temperature 0 it takes the most probable token, and `num_samples` draws several answers to each prompt.

# %%
world = World()
model, tokenizer = load_model(machine)
model = model.to(settings["at_rest"]).requires_grad_(False)


def num_tokens(texts: Sequence[str]) -> list[int]:
    """How many tokens each text has."""
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


# %% [markdown] tags=["core"]
# ## 1 · Thinking costs tokens
#
# **Question.** Written steps make sums right (lesson 02). How many of their tokens are needed, and do more of them help?
#
# *Budget forcing* (Muennighoff et al. 2025) is the simplest control over the length of thought. To think less, cut the steps after some tokens and write `Answer:` yourself. To think more, remove the end of the thought whenever the model writes it. For comparison there is the direct answer, where the word `Steps:` was never written.


# %%
def answer_after(thoughts: Sequence[str]) -> list[str]:
    """What the model answers when its thoughts end here: the text behind a forced `Answer:`."""
    return [t.strip() for t in generate(model, tokenizer, [f"{t}\nAnswer:" for t in thoughts], 8, batch_size=256)]


sums = world.sums(lesson.scaled(60, 8), seed, with_steps=True)
gold = [question.answer for question in sums]
heads = [question.prompt for question in sums]  # each ends with "Steps:"
steps = generate(model, tokenizer, heads, 40, stop=("\n",), batch_size=256)
direct = answer_after([head.removesuffix("\nSteps:") for head in heads])
encoded = tokenizer(steps, add_special_tokens=False)["input_ids"]
cuts, cut_scores, last_numbers = [0, 6, 12, 18, 22, 24, 26, 28], [], []
for tokens in cuts:
    kept = [tokenizer.decode(ids[:tokens]) for ids in encoded]
    found = answer_after([head + thought for head, thought in zip(heads, kept, strict=True)])
    cut_scores.append(exact_match(found, gold))
    last_numbers.append(np.mean([bool(k.strip()) and k.split()[-1] == a for k, a in zip(kept, found, strict=True)]))
for tokens, result, copied in zip(cuts, cut_scores, last_numbers, strict=True):
    complete = np.mean([len(ids) <= tokens for ids in encoded])
    print(f"cut after {tokens:>2} tokens: right {result!s:30} steps complete {complete:4.0%}, "
          f"answer = last word of the steps {copied:4.0%}")  # fmt: skip
print(f"direct answer: {exact_match(direct, gold)}; whole steps: {np.mean(num_tokens(steps)):.0f} tokens, "
      f"for example{steps[0]}")  # fmt: skip
figure = plots.curve(
    {"steps, cut": plots.scored_line(cuts, cut_scores)}, references={"direct": exact_match(direct, gold).accuracy},
    title="An answer forced before the last result is nearly always wrong", xlabel="tokens of written steps",
    ylabel="right sums", percent=True, limits_y=(-0.02, 1.02),
)  # fmt: skip
plots.show(figure, alt="Right sums over the tokens of steps: near zero for most of the way, then a steep rise to the "
                       "top; a dashed line shows the direct answer between them.")  # fmt: skip
whole, cut_half = cut_scores[-1].accuracy, cut_scores[cuts.index(12)].accuracy
lesson.claim("whole steps are right at least 50 points more often than steps cut in the middle", whole - cut_half,
             at_least=0.5, form=".0%")  # fmt: skip
lesson.claim("a direct answer beats steps that are cut in the middle by at least 5 points",
             exact_match(direct, gold).accuracy - cut_half, at_least=0.05, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** As long as the last result is missing, a forced answer is nearly always wrong, and an answer without any steps is right more often. The line rises where the steps are complete, and not before: compare the first two columns. The last column shows one way to be wrong. Where the cut leaves a number behind `=`, as after 12 tokens in half of the sums, the model copies it. In its texts the answer always *was* the last result, and it reads it off. Thinking less is a skill of its own, and this model never learned it.
#
# **Now more.** Sample the steps at temperature 1.5, as in lesson 02, so that there is something to repair (greedily these sums come out right), and take the most probable answer after them. Three ways to spend more tokens:
#
# - *no end*: when the model ends its steps, put a `;` there and let it go on;
# - *again*: ask the same sum again below the first solution, and take the last answer. Texts of several sums are what the model knows from pretraining;
# - *vote*: solutions that do not see each other, and the most frequent answer.


# %%
PASSES, asked = 4, lesson.scaled(40, 8)


def think(prompts: Sequence[str], number: int, samples: int = 1) -> list:
    """Sampled steps, at most 36 tokens, up to the end of the line."""
    return generate(model, tokenizer, prompts, 36, temperature=1.5, num_samples=samples, seed=seed + 100 * number,
                    batch_size=256)  # fmt: skip


heads, gold = heads[:asked], gold[:asked]
first = think(heads, 0, PASSES)  # (sums, passes)
begun = [head + samples[0] for head, samples in zip(heads, first, strict=True)]
answers = {"vote": [answer_after([h + row[k] for h, row in zip(heads, first, strict=True)]) for k in range(PASSES)]}
answers["again"], answers["no end"] = [answers["vote"][0]], [answers["vote"][0]]  # all begin with the same steps
again, longer = begun, begun
for number in range(1, PASSES):
    again = [f"{t}\nAnswer: {a}\n{h}" for t, a, h in zip(again, answers["again"][-1], heads, strict=True)]
    again = [text + more for text, more in zip(again, think(again, number), strict=True)]
    answers["again"].append(answer_after(again))
    if number < 2:  # more would only be longer
        longer = [f"{text};" for text in longer]
        longer = [text + more for text, more in zip(longer, think(longer, number), strict=True)]
        answers["no end"].append(answer_after(longer))
print(f"no end: {longer[0].partition('Steps:')[2]}\nagain: {again[0]}")

# %%
columns = list(zip(*answers["vote"], strict=True))  # (sums, passes)
answers["vote"] = [[Counter(row[:k]).most_common(1)[0][0] for row in columns] for k in range(1, PASSES + 1)]
by_passes = {name: [exact_match(found, gold).accuracy for found in rounds] for name, rounds in answers.items()}
shown = {name: [f"{share:.0%}" for share in line] + [""] * (PASSES - len(line)) for name, line in by_passes.items()}
show_table(shown, [f"{k} passes" for k in range(1, PASSES + 1)])
spent = {"no end": longer, "again": again, "vote": ["".join(row) for row in first]}
for name, texts in spent.items():
    new = np.mean(num_tokens(texts)) - (name != "vote") * np.mean(num_tokens(heads))
    print(f"{name}: {new:.0f} tokens after the first prompt")
among = [Counter(row).most_common(1)[0][0] for row in zip(*answers["again"], strict=True)]
print(f"vote over the four answers of again: {exact_match(among, gold)}; "
      f"one greedy pass: {whole:.0%} for {np.mean(num_tokens(steps)):.0f} tokens")  # fmt: skip
last = {name: line[-1] for name, line in by_passes.items()}
lesson.claim("a vote of four beats the fourth answer in a row by at least 5 points", last["vote"] - last["again"],
             at_least=0.05, form=".0%")  # fmt: skip
lesson.claim("one pass of steps beats steps whose end was put off once by at least 50 points",
             by_passes["vote"][0] - last["no end"], at_least=0.5, form=".0%")  # fmt: skip
lesson.report("after all passes: vote / again / no end", " / ".join(f"{value:.0%}" for value in last.values()))

# %% [markdown]
# **What you see.** Without an end the model adds numbers that nobody asked for. Asked again below its own solution, it writes one more solution, and the last answer in a row of answers is still one sample, here a worse one than the first. The claim compares this sample with a vote over four; the line below the table votes over the four answers of *again* as well, so you see how much of the difference the vote alone makes. The vote repairs what temperature 1.5 broke. One greedy pass has all sums right, too, for a quarter of the tokens, so look at greedy decoding first. *Again* spends most, since it also reads every question once more. This is not a law of budget forcing: s1 was *trained* on long thoughts that check themselves before it was made to go on. It is what you get from a model that never saw anyone go on after the end.

# %% [markdown] tags=["core"]
# ## 2 · A task for search, and a policy
#
# **Question.** Where would search be worth more than a vote? The steps of a sum are always the same. Take a task with choices: a shortest route between two of the towns of Shima.
#
# A breadth-first search knows the answer. It looks at all towns one road away, then two, and so on, so the first time that it meets a town is along a shortest way.


# %%
def distances_to(goal: str) -> dict[str, int]:
    """Roads from every town to the goal: breadth-first search."""
    found, waiting = {goal: 0}, deque([goal])
    while waiting:
        town = waiting.popleft()
        for neighbour in world.roads[town]:
            if neighbour not in found:
                found[neighbour] = found[town] + 1
                waiting.append(neighbour)
    return found


TOWNS = world.towns
DISTANCE = {goal: distances_to(goal) for goal in TOWNS}  # DISTANCE[goal][town]
differ = sum(DISTANCE[b][a] != len(world.route(a, b)) - 1 for a in TOWNS for b in TOWNS if a != b)
lesson.equal("breadth-first search finds the lengths of the world's own shortest routes", differ)
lengths = Counter(DISTANCE[b][a] for a in TOWNS for b in TOWNS if a != b)
print(f"{len(TOWNS)} towns, {sum(map(len, world.roads.values())) // 2} roads; ordered pairs of towns by the length of "
      f"the way: {dict(sorted(lengths.items()))}")  # fmt: skip

# %% [markdown]
# Cut all pairs of towns into three parts: the policy learns from one, verifiers practise on answers to the second, and the third is for tests. A pair and its way back are in the same part, so nothing that is tested was seen in either direction.

# %%
pairs = list(combinations(TOWNS, 2))
random.Random(f"routes/{seed}").shuffle(pairs)
parts = {"train": pairs[:125], "practice": pairs[125:200], "test": pairs[200:]}
split = {name: [way for a, b in part for way in ((a, b), (b, a))] for name, part in parts.items()}
split["practice"] = split["practice"][: lesson.scaled(150, 20)]
split["test"] = split["test"][: lesson.scaled(100, 20)]  # a hundred are enough


def route_prompt(start: str, goal: str) -> str:
    """The question as Shima writes it."""
    return f"Route: from {start} to {goal}\nAnswer:"


def is_right(text: str, start: str, goal: str) -> bool:
    """The true verifier: the text is a way along roads, and as short as any."""
    return world.is_shortest_route(text.strip().split(" - "), start, goal)


print({name: len(ways) for name, ways in split.items()}, "ordered pairs")
shown_routes = [(route_prompt(*way), f" {' - '.join(world.route(*way))}\n") for way in split["train"]]
print("".join(shown_routes[0]).strip())

# %% [markdown]
# **One function for all fine-tuning of this lesson.** It teaches a copy of a model to continue prompts with given texts. The loss counts the tokens of the texts only, as in lesson 05. With fewer texts than a batch takes there is nothing to learn, and the copy stays as it was.


# %%
encode = partial(encode_answer, tokenizer)  # (prompt, answer) -> tokens, and labels that are -100 in the prompt


def fine_tune(start: nn.Module, texts: Sequence[tuple[str, str]], steps: int, share: float = 1.0,
              batch_size: int = 16) -> nn.Module:  # fmt: skip
    """A copy of `start`, taught (prompt, text) pairs; `share` is that of the step size of the settings."""
    tuned = copy.deepcopy(start).float().requires_grad_(True)
    if len(texts) < batch_size:
        print(f"{len(texts)} texts are fewer than a batch of {batch_size}: nothing is learned")
        return tuned.to(settings["at_rest"]).eval().requires_grad_(False)
    config = TrainConfig(
        max_steps=lesson.scaled(steps), learning_rate=share * settings["rate"], warmup_steps=10, schedule="linear",
        weight_decay=0.0, progress=False, seed=seed,
    )  # fmt: skip
    batches = PaddedBatches([encode(*pair) for pair in texts], batch_size, tokenizer.pad_token_id, seed=seed)
    history = train(tuned, batches, config)
    print(f"{len(history.losses)} steps, {sum(history.tokens) / 1000:.0f} thousand tokens, loss "
          f"{np.mean(history.losses[:5]):.2f} -> {np.mean(history.losses[-5:]):.2f} nats")  # fmt: skip
    return tuned.to(settings["at_rest"]).eval().requires_grad_(False)


policy = fine_tune(model, shown_routes, settings["steps"])


# %%
def is_way(text: str, start: str, goal: str) -> bool:
    """Whether the text is a way along roads from start to goal, short or not."""
    towns = text.strip().split(" - ")
    return towns[0] == start and towns[-1] == goal and all(b in world.roads.get(a, ()) for a, b in pairwise(towns))


def greedy_routes(ways: Sequence[tuple[str, str]]) -> list[str]:
    """The policy's most probable routes, decoded greedily."""
    return generate(policy, tokenizer, [route_prompt(*way) for way in ways], 30, batch_size=256)


exam = {}
for name in ("train", "test"):
    texts = greedy_routes(split[name])
    exam[name] = {
        "a way along roads": score(sum(is_way(t, *w) for t, w in zip(texts, split[name], strict=True)), len(texts)),
        "a shortest way": score(sum(is_right(t, *w) for t, w in zip(texts, split[name], strict=True)), len(texts)),
    }
    print(f"{name}: " + ", ".join(f"{what} {result}" for what, result in exam[name].items()))
wrong = [(w, t.strip()) for t, w in zip(texts, split["test"], strict=True) if not is_right(t, *w)]
for (start, goal), text in wrong[:3]:
    print(f"  wrong: {text}   a right one: {' - '.join(world.route(start, goal))}")
lesson.claim("the policy finds a shortest way for at least 30 % of pairs that it never saw",
             exam["test"]["a shortest way"].accuracy, at_least=0.3, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** From routes alone, without a map, the policy has learned most of the roads and how to join them. It knows its training pairs nearly by heart and errs on a good part of the others. Most of its wrong answers are ways along real roads that are too long. That is the state in which test-time compute has something to do. The bound of the claim is about twice what a walk along random roads finds (section 5).
#
# **What would do without a policy?** Two things to know before you go on. The training routes name roads, and a breadth-first search can run over those. And although no tested pair was trained on, its way may stand inside a longer route that was.


# %%
def shortest_on(believed: np.ndarray, start: str, goal: str) -> str:
    """A shortest way over the steps that are believed in (from, to), or nothing if there is none."""
    ways, seen = deque([[start]]), {start}
    while ways:
        towns = ways.popleft()
        if towns[-1] == goal:
            return " - ".join(towns)
        for index in believed[TOWNS.index(towns[-1])].nonzero()[0]:
            if TOWNS[index] not in seen:
                seen.add(TOWNS[index])
                ways.append([*towns, TOWNS[index]])
    return ""


is_real = np.array([[b in world.roads[a] for b in TOWNS] for a in TOWNS])  # (from, to)
named = np.zeros_like(is_real)
for way in split["train"]:
    for a, b in pairwise(world.route(*way)):
        named[TOWNS.index(a), TOWNS.index(b)] = True
from_routes = score(sum(is_right(shortest_on(named, *way), *way) for way in split["test"]), len(split["test"]))
print(f"the training routes name {named.sum()} of {is_real.sum()} steps along roads; "
      f"a search over them: shortest way {from_routes}")  # fmt: skip
lesson.report("breadth-first search over the roads of the training routes, no model", str(from_routes))


# %%
def stands_inside(start: str, goal: str) -> bool:
    """Whether a shortest way between two towns is a piece of a training route."""
    known = [world.route(*way) for way in split["train"]]
    pieces = [towns[towns.index(start) : towns.index(goal) + 1] for towns in known if {start, goal} <= set(towns)]
    return any(piece and world.is_shortest_route(piece, start, goal) for piece in pieces)


inside = np.array([stands_inside(*way) for way in split["test"]])
hit = np.array([is_right(text, *way) for text, way in zip(texts, split["test"], strict=True)])
for name, group in (("stands inside a training route", inside), ("does not", ~inside)):
    print(f"the way {name}: {score(int(hit[group].sum()), int(group.sum())) if group.any() else 'no pair'}")

# %% [markdown]
# **What you see.** On this small map a search over the roads that the training routes name beats the policy by far, without a model and without a token. Keep it in mind beside every method that follows. We use Shima because the truth is known. The methods are for tasks where nobody can list the next steps: proofs, programs, texts. And the policy is right more often where a way was already a piece of a training route, so "never saw" is meant of pairs.

# %% [markdown] tags=["core"]
# ## 3 · Verifiers
#
# **Question.** Draw many answers. Who chooses, if not a vote?
#
# Draw $N$ routes a pair at temperature 1, and let a *verifier* $v(x, y)$ choose the one that it finds best (best-of-N; Cobbe et al. 2021). A verifier is learned from answers to other questions. There are two ways to label them:
#
# - **outcome**: the whole answer is right or wrong, one label an answer;
# - **process**: each step is right or wrong, one label a step (Uesato et al. 2022; Lightman et al. 2023). Here a program gives the label: is there a road?
#
# So draw answers on the second part of the pairs, to learn from, and on the third, to choose from. All samples of a part are its *pool*.

# %%
SAMPLES = {"practice": 16, "test": 32}
pools = {}  # name of the part -> for each pair its sampled routes
for name, samples in SAMPLES.items():
    prompts = [route_prompt(*way) for way in split[name]]
    pools[name] = generate(
        policy, tokenizer, prompts, 30, temperature=1.0, num_samples=samples, seed=seed, batch_size=256
    )


def towns_of(text: str) -> list[str]:
    """The towns of a route, or nothing if the text is no list of at least two towns."""
    towns = text.strip().split(" - ")
    return towns if len(towns) > 1 and set(towns) <= set(TOWNS) else []


right = np.array([[is_right(t, *w) for t in ts] for ts, w in zip(pools["test"], split["test"], strict=True)])
written = np.mean(num_tokens([text for texts in pools["test"] for text in texts])) + 1  # and the end of the line
routes = sorted({(w, t.strip()) for w, ts in zip(split["practice"], pools["practice"], strict=True) for t in ts})
routes = [(way, text) for way, text in routes if towns_of(text)]  # each different route once
share = np.mean([is_right(text, *way) for way, text in routes]) if routes else math.nan
print(f"one sample: {right.mean():.0%} right, {written:.1f} tokens; {len(routes)} different routes to learn from, "
      f"{share:.0%} of them right")  # fmt: skip

# %% [markdown]
# **Two kinds of input.** The first is what the policy itself knows: its last hidden state at the end of the route. It is divided by 10, so that most of its numbers lie between -1 and 1, as the zeros and ones of the steps do: the penalty of a regression is the same for all inputs, so none should be much larger than the others. The second is what the route says: which steps it takes, one column for each ordered pair of towns. For a whole answer the columns of its steps are summed.


# %%
@torch.no_grad()
def states_at_the_end(texts: list[str]) -> Tensor:
    """The policy's last hidden state at the last token of each text: (texts, hidden)."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    width = max(map(len, ids))
    padded = [row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids]  # on the right: nothing sees it
    hidden = policy.model(input_ids=torch.tensor(padded, device=machine.device)).last_hidden_state
    ends = torch.tensor([len(row) - 1 for row in ids], device=machine.device)
    return hidden[torch.arange(len(ids), device=machine.device), ends]


def last_states(items: Sequence[tuple[tuple[str, str], str]]) -> np.ndarray:
    """The policy's last hidden state at the last town of each route, divided by 10: (routes, hidden)."""
    states = []
    for start in range(0, len(items), 128):
        texts = [f"{route_prompt(*way)} {text}" for way, text in items[start : start + 128]]
        states.append(states_at_the_end(texts).float().cpu().numpy() / 10)
    return np.concatenate(states) if states else np.zeros((0, policy.config.hidden_size))


def step_columns(text: str) -> np.ndarray:
    """One row for each step of a route, with a 1 in the column of this step: (steps, towns * towns)."""
    towns = towns_of(text)
    columns = np.zeros((len(towns) - 1, len(TOWNS) ** 2))
    for row, (a, b) in enumerate(pairwise(towns)):
        columns[row, TOWNS.index(a) * len(TOWNS) + TOWNS.index(b)] = 1
    return columns


# %% [markdown]
# **The verifier** is a logistic regression, $v = \sigma(w \cdot \phi)$ with a constant among the inputs $\phi$. It minimises
#
# $$\tfrac12 \lVert w \rVert^2 - C \sum_i \big( y_i \log v_i + (1 - y_i) \log (1 - v_i) \big)$$
#
# Here $\sigma(z) = 1 / (1 + e^{-z})$ makes a number between 0 and 1. Newton's method puts a parabola with the same slope and curvature at the present $w$, and jumps to its lowest point: $w \leftarrow w - H^{-1} g$ with the gradient $g$ and the Hessian $H$, the matrix of second derivatives. It needs a handful of steps. The gradient is $w - C\, \Phi^\top (y - v)$, the Hessian is $I + C\, \Phi^\top \mathrm{diag}(v (1 - v))\, \Phi$.


# %%
def with_constant(inputs: np.ndarray) -> np.ndarray:
    """Append a column of ones: (rows, columns) -> (rows, columns + 1)."""
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(z / 2))


def fit_logistic(inputs: np.ndarray, labels: np.ndarray, C: float = 1.0, steps: int = 12) -> np.ndarray:
    """Weights (columns + 1,) of a logistic regression with penalty, by Newton's method; the last is the constant's."""
    inputs, weights = with_constant(inputs), np.zeros(inputs.shape[1] + 1)
    for _ in range(steps):
        predicted = sigmoid(inputs @ weights)
        gradient = weights - C * inputs.T @ (labels - predicted)
        curvature = np.eye(len(weights)) + C * (inputs.T * (predicted * (1 - predicted))) @ inputs
        weights = weights - np.linalg.solve(curvature, gradient)
    return weights


def verdict(weights: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Probability of the label 1 for each row."""
    return sigmoid(with_constant(inputs) @ weights)


# %%
steps_of = [step_columns(text) for _, text in routes]
outcome = np.array([is_right(text, *way) for way, text in routes], dtype=float)  # (routes,)
is_road = np.array([float(b in world.roads[a]) for _, text in routes for a, b in pairwise(towns_of(text))])  # (steps,)
no_steps = np.zeros((0, len(TOWNS) ** 2))
sets = {  # inputs and labels
    "outcome, from states": (last_states(routes), outcome),
    "outcome, from steps": (np.array([columns.sum(0) for columns in steps_of] or no_steps), outcome),
    "process, from steps": (np.concatenate([*steps_of, no_steps]), is_road),
}
weights = {name: fit_logistic(*data) for name, data in sets.items()}
mixed = np.random.default_rng(seed).permutation(is_road)  # the same labels, on the wrong steps
shuffled = fit_logistic(sets["process, from steps"][0], mixed)
for name, (inputs, labels) in sets.items():
    print(f"{name}: {inputs.shape[0]} rows, {inputs.shape[1]} columns, {labels.mean() if len(labels) else 0:.0%} right")
    if len(set(labels)) == 2:  # scikit-learn refuses labels of one kind
        library = LogisticRegression(C=1.0, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
        library.fit(with_constant(inputs), labels)
        gap = np.abs(library.coef_[0] - weights[name]).max()
        lesson.equal(f"the verifier ({name}) is scikit-learn's logistic regression", gap, within=1e-5)

# %% [markdown]
# A process verifier judges steps. The score of a route is the product of its steps' probabilities, and 0 if it does not end at the goal: one bad step is enough, and of two good routes the shorter one has fewer factors below 1. This check of the goal is knowledge that the outcome verifiers do not have, so one row gives it to the outcome verifier of the steps as well. For comparison: a judge that gives each different route a random number; a process verifier whose labels were shuffled; a vote; and the true verifier, which finds a right route whenever there is one.


# %%
def process_score(way: tuple[str, str], text: str, weights: np.ndarray) -> float:
    """Product of the verdicts on all steps; 0 for what is no route between these towns."""
    towns = towns_of(text)
    if not towns or (towns[0], towns[-1]) != way:
        return 0.0
    return float(verdict(weights, step_columns(text)).prod())


items = sorted({(w, t.strip()) for w, ts in zip(split["test"], pools["test"], strict=True) for t in ts if towns_of(t)})
columns = np.array([step_columns(text).sum(0) for _, text in items] or no_steps)
ends_right = np.array([(towns_of(text)[0], towns_of(text)[-1]) == way for way, text in items], dtype=float)
tables = {
    "random numbers": np.random.default_rng(seed).random(len(items)),
    "outcome, from states": verdict(weights["outcome, from states"], last_states(items)),
    "outcome, from steps": verdict(weights["outcome, from steps"], columns),
    "outcome, steps and goal": verdict(weights["outcome, from steps"], columns) * ends_right,
    "process, from steps": [process_score(*item, weights["process, from steps"]) for item in items],
    "process, shuffled labels": [process_score(*item, shuffled) for item in items],
    "true verifier": [float(is_right(text, *way)) for way, text in items],
}
scores = {}  # name of the verifier -> (pairs, samples): what it says of each sample; -1 of what is no route
for name, values in tables.items():
    known = dict(zip(items, values, strict=True))
    scores[name] = np.array([[known.get((way, text.strip()), -1.0) for text in texts]
                             for way, texts in zip(split["test"], pools["test"], strict=True)])  # fmt: skip

# %%
N = [1, 2, 4, 8, 16, 32]


def best_of(values: np.ndarray, n: int) -> float:
    """Share of pairs for which the sample with the highest score among n is right, over disjoint groups of n."""
    chosen = values.reshape(len(values), -1, n).argmax(-1)  # (pairs, groups)
    truth = right.reshape(len(values), -1, n)  # (pairs, groups, n)
    return float(np.take_along_axis(truth, chosen[..., None], -1).mean())


def vote_of(n: int) -> float:
    """Share of pairs for which the most frequent of n samples is right, over disjoint groups of n."""
    groups = [(texts[i : i + n], way) for texts, way in zip(pools["test"], split["test"], strict=True)
              for i in range(0, len(texts), n)]  # fmt: skip
    return float(np.mean([is_right(Counter(texts).most_common(1)[0][0], *way) for texts, way in groups]))


lines = {name: [best_of(values, n) for n in N] for name, values in scores.items()} | {"vote": list(map(vote_of, N))}
show_table({name: [f"{value:.0%}" for value in line] for name, line in lines.items()}, [f"N = {n}" for n in N])
greedy = exam["test"]["a shortest way"]
print(f"greedy, one answer: {greedy}")
print("chance to score a right route above a wrong one, over the different routes to the test pairs:")
truth = np.array(tables["true verifier"])
for name in list(tables)[:-1] if 0 < truth.sum() < len(truth) else []:
    print(f"{name:>26}: {roc_auc_score(truth, tables[name]):.0%}")

# %%
order = ["true verifier", "process, from steps", "vote", "outcome, steps and goal", "outcome, from states"]
figure = plots.curve(
    {name: (N, lines[name]) for name in order}, title="The same samples, chosen by five judges",
    xlabel="samples a pair, N", ylabel="shortest routes", log_x=True, percent=True,
    references={"greedy, one answer": greedy.accuracy},
)  # fmt: skip
figure.axes[0].set_xticks(N, N)
figure.axes[0].minorticks_off()
alt = """Five lines over the number of samples. The true verifier and the process verifier rise, the vote rises a
little, and both outcome verifiers rise at two samples and then fall."""
plots.show(figure, alt=alt)
at = {name: dict(zip(N, line, strict=True)) for name, line in lines.items()}
lesson.claim("best of 16 by the process verifier beats a vote of 16 by at least 5 points",
             at["process, from steps"][16] - at["vote"][16], at_least=0.05, form=".0%",
             control=at["process, shuffled labels"][16] - at["vote"][16])  # fmt: skip
lesson.claim("with the same inputs and goal check process labels beat outcome labels by 10 points at 16 samples",
             at["process, from steps"][16] - at["outcome, steps and goal"][16], at_least=0.1, form=".0%",
             control=at["process, shuffled labels"][16] - at["outcome, steps and goal"][16])  # fmt: skip
lesson.claim("the best of 32 by the policy's own states is at least 5 points worse than one sample",
             at["outcome, from states"][1] - at["outcome, from states"][32], at_least=0.05, form=".0%",
             control=at["process, from steps"][1] - at["process, from steps"][32])  # fmt: skip

# %% [markdown]
# **What you see.** Both outcome verifiers are better than a coin: shown a right and a wrong route, mostly of two different questions, they score the right one higher more often. And yet best-of-N by them soon gets *worse* as $N$ grows, and ends below one sample that nobody judged. The row of random numbers shows how. A judge that knows nothing gives each *different* route the same chance, while the policy wrote the right one many times and most wrong ones seldom. Best-of-N forgets how often an answer was drawn, and with every further sample one more rare mistake comes up for choice. Best-of-N uses only the route at the top of the ranking. A verifier that is right in most such comparisons can still put a wrong route there. There is one more handicap: the verifiers learned from each different route once, and most of those are wrong (76 %), where of the samples that they choose from most are right (60 %). Cobbe et al. (2021) saw best-of-N turn down only beyond 400 samples, with a verifier that had learned from far more.
#
# The process verifier has the same inputs, the same routes and the same fit as the outcome verifier of the steps, and in the row with the goal both have the same check. What differs is the labels, and with them the rule: a product over steps instead of one verdict on their sum. One label a step says *where* a wrong route is wrong, and that is also more information: somebody had to judge every step. It cannot see that a way is too long, and comes close to the true verifier all the same, since shorter ways win its product. With shuffled labels only the goal check and this taste for short ways are left. They rank routes about as well as the outcome verifier with the goal check does, and gain as little.
#
# Look at the dashed line before you praise any of them. One greedy answer is as good as the best vote here. The outcome verifiers stay below it for every $N$; the process verifier is above it from two samples on.

# %% [markdown] tags=["core"]
# ## 4 · Search, step by step
#
# **Question.** Best-of-N finishes every route before anybody judges it. A process verifier could speak up after each step. What is gained if you search with it?
#
# A *node* is a route that is not finished: a list of towns. To *expand* it, ask the policy for the probabilities of the next town. With the keys and values of what was already read in a cache, this costs the tokens of one more step. In this lesson the batch reads the whole text again, which is simpler, and only the tokens with a cache are counted, for all methods alike. Where a town is several tokens, its first token speaks for it; the cell prints whether these differ.

# %%
town_ids = torch.tensor([row[0] for row in tokenizer([f" {t}" for t in TOWNS], add_special_tokens=False)["input_ids"]])
STEP_TOKENS = round(np.mean(num_tokens([f" - {town}" for town in TOWNS])))
PROMPT_TOKENS = round(np.mean(num_tokens([f"{route_prompt(*way)} {way[0]}" for way in split["test"]])))
roads_believed = verdict(weights["process, from steps"], np.eye(len(TOWNS) ** 2)).reshape(len(TOWNS), -1)


@torch.no_grad()
def next_towns(nodes: Sequence[tuple[tuple[str, str], list[str]]]) -> np.ndarray:
    """The policy's probabilities of the next town after each unfinished route: (nodes, towns), each row sums to 1."""
    texts = [f"{route_prompt(*way)} {' - '.join(towns)} -" for way, towns in nodes]
    logits = policy.lm_head(states_at_the_end(texts)).float().cpu()
    return logits[:, town_ids].softmax(-1).numpy()


way = split["test"][0]
ranked = sorted(zip(next_towns([(way, [way[0]])])[0], TOWNS, strict=True), reverse=True)[:4]
print(f"from {way[0]} to {way[1]}:", ", ".join(f"{town} {p:.0%}" for p, town in ranked))
print(f"reading a prompt: {PROMPT_TOKENS} tokens; a step: {STEP_TOKENS} tokens; "
      f"{len(set(town_ids.tolist()))} different first tokens of {len(TOWNS)} towns")  # fmt: skip

# %% [markdown]
# **Beam search** is the simplest search: after every step keep a few unfinished routes with the best score, here the logarithms of the policy's and of the verifier's probabilities, summed over the steps.
#
# **Monte Carlo tree search** decides after each expansion anew where to look. It repeats four moves:
#
# 1. *select*: from the root, follow the action with the largest $Q(s, a) + c\, \pi(a \mid s)\, \sqrt{\max(1, \sum_{a'} n(s, a'))} \,/\, (1 + n(s, a))$, until a town that has not been expanded. This rule is called PUCT (Silver et al. 2017). $Q$ is the mean value found below the action, 0 before the first visit. The bonus is large for actions that the policy likes and that were seldom tried;
# 2. *expand* it with the policy's probabilities;
# 3. *evaluate* it: the product of the process verifier's verdicts on its steps. A dead end and a route that is too long are worth 0;
# 4. *back up* the value into the mean of every action on the path.
#
# A route that reaches the goal is finished. At the end the finished route with the best verdict wins, as in best-of-N.
#
# By hand, for three towns with the probabilities 0.6, 0.3 and 0.1, and $c = 1$: the first descent takes the first town, since no $Q$ is known. Say its value is 0.2. Now it scores $0.2 + 0.6 \cdot \sqrt 1 / 2 = 0.5$ and the second town $0.3 \cdot \sqrt 1 / 1 = 0.3$, so the first one is taken again. Say what is found below it is worth 0. Its mean falls to 0.1, its score is $0.1 + 0.6 \cdot \sqrt 2 / 3 = 0.38$, and the second town has $0.3 \cdot \sqrt 2 = 0.42$: now it is its turn.


# %%
LONGEST = 8  # towns in a route; longer ones are given up


@dataclass
class Node:
    """An unfinished route, and what is known about the towns that may come next."""

    towns: list[str]
    prior: np.ndarray | None = None  # (towns,): the policy's probabilities; None until it is expanded
    visits: np.ndarray = field(default_factory=lambda: np.zeros(len(TOWNS)))  # n(s, a)
    total: np.ndarray = field(default_factory=lambda: np.zeros(len(TOWNS)))  # sum of values: Q = total / visits
    children: dict[int, "Node"] = field(default_factory=dict)


# %%
def select(node: Node, exploration: float) -> int:
    """The action with the largest PUCT score."""
    q = node.total / np.maximum(node.visits, 1)
    bonus = exploration * node.prior * math.sqrt(max(node.visits.sum(), 1)) / (1 + node.visits)
    return int((q + bonus).argmax())


def descend(root: Node, goal: str, exploration: float) -> tuple[list[tuple[Node, int]], Node]:
    """Follow the best actions to a node that is not expanded, finished or too long; return the path and this node."""
    node, path = root, []
    while node.prior is not None and node.towns[-1] != goal and len(node.towns) < LONGEST:
        action = select(node, exploration)
        path.append((node, action))
        node = node.children.setdefault(action, Node([*node.towns, TOWNS[action]]))
    return path, node


def back_up(path: Sequence[tuple[Node, int]], value: float) -> None:
    """Count the visit and add the value, for every action on the path."""
    for node, action in path:
        node.visits[action] += 1
        node.total[action] += value


# %%
def tree_search(ways: Sequence[tuple[str, str]], expansions: int, prior: Callable, value: Callable,
                exploration: float = 1.0, patience: int = 4) -> list[dict[int, str]]:  # fmt: skip
    """Search for all pairs at once; for each, number of expansions -> best finished route so far.

    `prior(nodes)` gives probabilities of the next town, `value(way, towns)` judges a route, finished or not. Descents
    that end at a route already finished cost no expansion; after `patience` of them one round is over.
    """
    roots, best = [Node([start]) for start, _ in ways], [(0.0, "") for _ in ways]
    results = [{} for _ in ways]
    for number in range(1, expansions + 1):
        waiting = []
        for index, (way, root) in enumerate(zip(ways, roots, strict=True)):
            for _ in range(patience):
                path, node = descend(root, way[1], exploration)
                if node.prior is None and node.towns[-1] != way[1] and len(node.towns) < LONGEST:
                    waiting.append((index, path, node))
                    break
                worth = value(way, node.towns) if node.towns[-1] == way[1] else 0.0
                best[index] = max(best[index], (worth, " - ".join(node.towns) if worth else ""))
                back_up(path, worth)
        if waiting:
            priors = prior([(ways[index], node.towns) for index, _, node in waiting])
            for (index, path, node), row in zip(waiting, priors, strict=True):
                node.prior = row
                back_up(path, value(ways[index], node.towns))
        for index, (_, text) in enumerate(best):
            results[index][number] = text
    return results


# %% [markdown]
# **Is the search right?** Take the model out. Let the prior be uniform over the roads that leave a town, and the value exact: 1 as long as the towns begin a shortest way, else 0. Then it must find a shortest route for every pair.


# %%
def exact_value(way: tuple[str, str], towns: list[str]) -> float:
    """1 if these towns begin a shortest way to the goal, else 0."""
    goal = DISTANCE[way[1]]
    return float(all(b in world.roads[a] and goal[b] == goal[a] - 1 for a, b in pairwise(towns)))


def any_road(nodes: Sequence[tuple[tuple[str, str], list[str]]]) -> np.ndarray:
    """The same probability for every road that leaves the last town: (nodes, towns)."""
    leads = np.array([[float(town in world.roads[towns[-1]]) for town in TOWNS] for _, towns in nodes])
    return leads / leads.sum(1, keepdims=True)


every = pairs[: lesson.scaled(276)]
found = tree_search(every, 80, any_road, exact_value)
missed = sum(not is_right(texts[80], *way) for texts, way in zip(found, every, strict=True))
lesson.equal("with exact values the tree search finds a shortest route for every pair of towns", missed)

# %%
ROADS = np.log(np.maximum(roads_believed, 1e-9))  # (from, to): log of the process verifier's verdict


def judge_by(believed: np.ndarray) -> Callable[[tuple[str, str], list[str]], float]:
    """A value for the search: the product of the verdicts (from, to) on all steps; 0 where a town comes twice."""

    def value(way: tuple[str, str], towns: list[str]) -> float:
        steps = (believed[TOWNS.index(a), TOWNS.index(b)] for a, b in pairwise(towns))
        return math.prod(steps) if len(set(towns)) == len(towns) else 0.0

    return value


process_value = judge_by(roads_believed)


def beam_search(ways: Sequence[tuple[str, str]], width: int) -> tuple[list[str], float]:
    """The finished route with the best verdict for each pair, and the mean number of expansions."""
    beams, best, expanded = [[(0.0, [start])] for start, _ in ways], [(0.0, "") for _ in ways], 0
    for _ in range(LONGEST - 1):
        nodes = [(index, worth, towns) for index, beam in enumerate(beams) for worth, towns in beam]
        expanded += len(nodes)
        priors = next_towns([(ways[index], towns) for index, _, towns in nodes]) if nodes else []
        beams = [[] for _ in ways]
        for (index, so_far, towns), row in zip(nodes, priors, strict=True):
            worth = so_far + np.log(row + 1e-9) + ROADS[TOWNS.index(towns[-1])]  # (towns,)
            beams[index] += [(worth[a], [*towns, TOWNS[a]]) for a in np.argsort(-worth)[:width]]
        for index, beam in enumerate(beams):
            beam = sorted(beam, key=lambda entry: -entry[0])[:width]
            done = [towns for _, towns in beam if towns[-1] == ways[index][1]]
            best[index] = max([best[index], *((process_value(ways[index], t), " - ".join(t)) for t in done)])
            beams[index] = [(worth, towns) for worth, towns in beam if towns not in done]
    return [text for _, text in best], expanded / len(ways)


# %% [markdown]
# **All methods over tokens.** For every method count what the policy reads and writes for a pair: the prompt once, then the tokens of each sample or of each expansion. The verifier of steps is a table of numbers and costs no tokens of a model. (With a large network as verifier it would read each step once more.) Two things are not equal. A search writes nothing but towns, stops at the goal and never comes to a town twice, and a sample has to do all this by itself. And a sample pays for the first town and for the end of its line, which a search gets for nothing.

# %%
searched = split["test"]
SIZES = (4, 6, 8, 12, 16)  # expansions
trees = tree_search(searched, max(SIZES), next_towns, process_value)


def share_right(texts: Sequence[str]) -> float:
    return float(np.mean([is_right(text, *way) for text, way in zip(texts, searched, strict=True)]))


curves = {"tree search": [(PROMPT_TOKENS + STEP_TOKENS * n, share_right([tree[n] for tree in trees])) for n in SIZES]}
beams = {width: beam_search(searched, width) for width in (1, 2, 4)}
curves["beam search"] = [(PROMPT_TOKENS + STEP_TOKENS * cost, share_right(texts)) for texts, cost in beams.values()]
for name, label in (("process, from steps", "best of N"), ("true verifier", "best of N, true verifier")):
    curves[label] = [(PROMPT_TOKENS + written * n, best_of(scores[name], n)) for n in N[:5]]
curves["vote"] = [(PROMPT_TOKENS + written * n, vote_of(n)) for n in N[:5]]
greedy_tokens = PROMPT_TOKENS + np.mean(num_tokens(greedy_routes(searched))) + 1
curves["greedy"] = [(greedy_tokens, greedy.accuracy)]
for name, points in curves.items():
    print(f"{name:>24}: " + ", ".join(f"{value:.0%} at {cost:.0f}" for cost, value in points) + " tokens")

# %% [markdown]
# **Three more searches beside the picture.** Where does the gain of the tree search come from? First, give it a verifier with shuffled labels. Second, leave the policy out: let the breadth-first search of section 2 run over all steps that the verifier holds for roads, once with a verdict above one half, and once with a better verdict than it gives to a step that it has never seen. The third, which is drawn as a dashed line, is the search over the roads of the training routes, which needs no verifier either.

# %%
mixed_roads = verdict(shuffled, np.eye(len(TOWNS) ** 2)).reshape(len(TOWNS), -1)
blind = share_right([tree[12] for tree in tree_search(searched, 12, next_towns, judge_by(mixed_roads))])
print(f"tree search of 12 expansions with shuffled labels: {blind:.0%}")
never_seen = float(verdict(weights["process, from steps"], np.zeros((1, len(TOWNS) ** 2)))[0])
bounds, no_policy = {"one half": 0.5, "the verdict on a step never seen": never_seen + 1e-6}, []
for name, bound in bounds.items():
    believed = roads_believed > bound
    no_policy.append(share_right([shortest_on(believed, *way) for way in searched]))
    print(f"no policy, steps with a verdict above {name} ({bound:.2f}): {believed.sum()} steps pass, "
          f"{(believed & is_real).sum()} of {is_real.sum()} real ones; routes right {no_policy[-1]:.0%}")  # fmt: skip
print(f"no policy, no verifier, roads of the training routes: {from_routes.accuracy:.0%}")
lesson.report("12 expansions of the tree search with the verifier of shuffled labels", blind, ".0%")
lesson.report("search without the policy, steps above one half / above a step never seen",
              " / ".join(f"{share:.0%}" for share in no_policy))  # fmt: skip

# %% tags=["headline"]
figure = plots.curve(
    {name: tuple(zip(*points, strict=True)) for name, points in curves.items()},
    title="A vote buys little for its tokens, a search by steps more", xlabel="tokens of the policy, a pair",
    ylabel="shortest routes", log_x=True, percent=True,
    references={"no policy, roads of the training routes": from_routes.accuracy},
)  # fmt: skip
figure.axes[0].set_xticks([20, 50, 100, 200], [20, 50, 100, 200])
figure.axes[0].minorticks_off()
plots.show(figure, alt="Shortest routes over tokens for six methods. Tree search starts low and is soon above best of "
                       "N; the vote rises from below to about the height of one greedy answer. A dashed line "
                       "above all points is a search without the policy.")  # fmt: skip
tree_at, best_at = dict(zip(SIZES, curves["tree search"], strict=True)), dict(zip(N, curves["best of N"], strict=False))
print(f"tree search of 12 expansions: {tree_at[12][1]:.0%} for {tree_at[12][0]:.0f} tokens; "
      f"best of 4: {best_at[4][1]:.0%} for {best_at[4][0]:.0f} tokens")  # fmt: skip
lesson.report("12 expansions of the tree search, less a vote of 4: with the verifier, with shuffled labels",
              f"{100 * (tree_at[12][1] - curves['vote'][2][1]):+.0f} points, "
              f"{100 * (blind - curves['vote'][2][1]):+.0f} points")  # fmt: skip
lesson.report("one greedy answer", f"{greedy.accuracy:.0%} for {greedy_tokens:.0f} tokens")
lesson.report(
    "12 expansions of the tree search, and best of 4 by the same verifier",
    ", ".join(f"{value:.0%} for {cost:.0f} tokens" for cost, value in (tree_at[12], best_at[4])),
)

# %% [markdown]
# **What you see.** Begin with the dashed line: a search without any policy, for no tokens at all, lies above every method that asks the policy. It needs nothing but the routes that the policy was trained on. The search over the verifier's roads, with the second bound, does as well. Who can list the next steps should do that. From here on compare the methods that ask the policy.
#
# Among them one greedy answer is the line to beat. It costs as little as one sample, and votes of up to sixteen samples only come back to about its height. Best-of-N and the searches get above it, because they have a verifier. The tree search is the last to begin: with a few expansions it has finished no route for many pairs, where a single sample is a whole answer. Then it catches up with best-of-N, since it drops a route at its first bad step and begins the next one in the middle. Beam search, which is much simpler, does about as well: the routes are short, and a wrong step is seen at once, so there is little for a tree to remember.
#
# What do verifier and search buy together, against a vote that costs more? The first report says it, and beside it the same search with shuffled labels. That one may come out above the vote, since the search stops at the goal and prefers short ways, or below it. We first claimed ten points for the search with its verifier. On one training seed of five it gained just less, so it is a report. So is the comparison with best-of-4 at equal tokens: on that same seed the two were equal.
#
# One of the two searches on the verifier fails. Most pairs of towns never stood in a sample, and on those the verdict is only a constant. Where this constant lies above one half, most steps pass, and the search walks along roads that are none. The verifier has seen only steps that the policy wrote. The policy proposes such steps; a search without it walks over steps that the verifier never saw. With the second bound the verifier is a map.

# %% [markdown] tags=["further"]
# ## 5 · Coverage
#
# *Further: no core section needs this one.*
#
# **Question.** The true verifier's line is the ceiling of every choice among samples. How does it grow with their number?
#
# *Coverage*, or pass@k, is the share of questions with at least one right answer among $k$. If $m$ of $n$ samples are right, then of all sets of $k$ of them a share $\binom{n - m}{k} / \binom{n}{k}$ holds no right one. So (Chen et al. 2021)
#
# $$\text{pass@}k = 1 - \binom{n - m}{k} \Big/ \binom{n}{k}$$
#
# The plug-in $1 - (1 - m/n)^k$ would be too low. As a baseline take a walker who has a map and no sense of direction: at each town a random road, but never back to a town where it was.


# %%
def coverage(right: np.ndarray, k: int) -> float:
    """Mean pass@k over the questions, from right (questions, samples)."""
    n, found = right.shape[1], right.sum(1)
    return float(np.mean([1 - math.comb(n - int(m), k) / math.comb(n, k) for m in found]))


def random_walk(start: str, goal: str, rng: random.Random) -> str:
    """A way along random roads, until the goal or a dead end."""
    towns = [start]
    while towns[-1] != goal and (further := sorted(world.roads[towns[-1]].difference(towns))):
        towns.append(rng.choice(further))
    return " - ".join(towns)


small = np.array([[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]])
by_sets = np.mean([[row[list(chosen)].any() for chosen in combinations(range(6), 3)] for row in small])
gap = abs(coverage(small, 3) - by_sets)
lesson.equal("pass@k counts the sets of k samples that hold a right one", gap, within=1e-9)
gap = max(abs(coverage(right, k) - np.mean([pass_at_k(32, int(c), k) for c in right.sum(1)])) for k in N)
lesson.equal("pass@k is the course's helper's", gap, within=1e-9)
rng = random.Random(f"walker/{seed}")
walked = np.array([[is_right(random_walk(*way, rng), *way) for _ in range(32)] for way in split["test"]])
covered = {"policy": [coverage(right, k) for k in N], "walker with a map": [coverage(walked, k) for k in N]}
show_table({name: [f"{value:.0%}" for value in line] for name, line in covered.items()}, [f"k = {k}" for k in N])

# %%
figure = plots.curve(
    {name: (N, [-math.log(min(max(value, 1e-3), 0.999)) for value in line]) for name, line in covered.items()},
    title="Coverage keeps growing, for the policy and for the walker", xlabel="samples k",
    ylabel="-log coverage (nats)", log_x=True, log_y=True,
)  # fmt: skip
plots.show(figure, alt="Minus the logarithm of coverage over the number of samples, both axes logarithmic. Both lines "
                       "fall; the walker begins higher.")  # fmt: skip
lesson.claim("one sample of the policy covers at least 15 points more than a walk along random roads",
             covered["policy"][0] - covered["walker with a map"][0], at_least=0.15, form=".0%")  # fmt: skip
lesson.report("pass@1 and pass@32: policy; walker", "; ".join(f"{c[0]:.0%}, {c[-1]:.0%}" for c in covered.values()))

# %% [markdown]
# **What you see.** Coverage grows long after a vote has stopped to. Brown et al. (2024) find straight lines in such a plot over four orders of magnitude of $k$: on SWE-bench Lite 250 samples solve 56 % where one solves 15.9 %. But read the walker's row before you praise a high pass@k. A walker that knows the roads and no direction covers many short ways too, if it may try often. High coverage is worth what the verifier is worth, and says little about the policy.

# %%
far = np.array([DISTANCE[goal][start] for start, goal in searched])
chosen = scores["process, from steps"][:, :4].argmax(1)
methods = {
    "vote of 4": [Counter(texts[:4]).most_common(1)[0][0] for texts in pools["test"]],
    "best of 4": [texts[i] for texts, i in zip(pools["test"], chosen, strict=True)],
    "tree search, 12 expansions": [tree[12] for tree in trees],
}
hits = {n: np.array([is_right(t, *w) for t, w in zip(ts, searched, strict=True)]) for n, ts in methods.items()}
groups = {"1 or 2 roads": far < 3, "3 roads": far == 3, "4 or 5 roads": far > 3}
show_table({name: [f"{hit[group].mean():.0%} of {group.sum()}" if group.any() else "" for group in groups.values()]
            for name, hit in hits.items()}, list(groups))  # fmt: skip

# %% [markdown]
# **Near and far.** In this table look at the far pairs, where a route has the most steps and one bad step the most to spoil; the groups are small. Snell et al. (2024) draw such pictures for mathematics: which method is best depends on the budget and on how hard the question is.

# %% [markdown] tags=["core"]
# ## 6 · Check your answer, and answer again
#
# **Question.** If you ask a model to check its answer and to answer again, does it get better? Better than if it had just answered as often, and you had counted votes?
#
# Huang et al. (2024) asked GPT-4 the word problems of GSM8K: 95.5 % right at first, 91.5 % after it had checked itself once, 89.0 % after twice. "Self-correction" means several things, and they differ in who knows that something is wrong:
#
# | way | who says what is wrong? |
# |---|---|
# | vote | nobody; the same question is answered anew, the most frequent answer counts |
# | ask again | nobody; the last answer stands in the prompt |
# | checker | a program says right or wrong; a wrong answer is drawn anew |
# | checker, place | the program also says which road does not exist; the model goes on from there |
#
# The task is that of section 2, routes between pairs of towns that the policy was never taught. All ways start from the same first answer, sample at temperature 1, and get five answers; one greedy answer is the line to beat. (A model can also be trained to check itself, on corrected mistakes. Kumar et al. 2024 found that mistakes which others made up teach it little about its own.) *Votes and retries* need no new samples: a vote of $k$ takes the most frequent of the first $k$ answers of section 3. With a checker the question is solved as soon as one of the $k$ is right.

# %%
ROUNDS = 5
test, counts = split["test"], range(1, ROUNDS + 1)
first = [texts[0] for texts in pools["test"]]


def sample(network: nn.Module, prompts: list[str], number: int = 1, stream: int = 0, **more) -> list:
    """Continuations at temperature 1; `stream` gives other random numbers."""
    return generate(network, tokenizer, prompts, more.pop("max_new_tokens", 20), temperature=1.0, num_samples=number,
                    seed=100 * seed + 50 + stream, batch_size=256, **more)  # fmt: skip


def vote(texts: Sequence[str]) -> str:
    """The most frequent text; of equally frequent ones the first."""
    return Counter(text.strip() for text in texts).most_common(1)[0][0]


def right_after(texts: Sequence[str]) -> np.ndarray:
    """Which of the test pairs these texts answer rightly: (pairs,)."""
    return np.array([is_right(text, *way) for text, way in zip(texts, test, strict=True)])


by_way = {  # way -> for each number of answers, which pairs are right
    "vote": [right_after([vote(texts[:k]) for texts in pools["test"]]) for k in counts],
    "checker": [right[:, :k].any(1) for k in counts],
}
print(f"right at first: {score(int(right[:, 0].sum()), len(test))}; mean of all samples {right.mean():.0%}")

# %% [markdown]
# **Ask again** puts the last answer into the prompt and repeats the question. **Checker, place** looks for the first step along a road that does not exist, keeps the towns before it, and lets the policy go on from there. A way along roads that is too long, or ends elsewhere, has no such place and is drawn anew. Both are repeated until five answers are spent; where there is a checker, a right answer stays.


# %%
def ask_again(texts: list[str], ways: list[tuple[str, str]], stream: int) -> list[str]:
    """Answer once more, with the last answer in the prompt."""
    prompts = [f"{route_prompt(*way)} {text.strip()}\n{route_prompt(*way)}"
               for text, way in zip(texts, ways, strict=True)]  # fmt: skip
    return sample(policy, prompts, stream=stream)


def sound_part(text: str, start: str, goal: str) -> list[str]:
    """The towns before the first road that does not exist; only the start if all roads do."""
    towns = text.strip().split(" - ")
    if towns[0] != start:
        return [start]
    for index, (here, there) in enumerate(pairwise(towns), start=1):
        if there not in world.roads.get(here, ()):
            return towns[:index]
    return [start]


def go_on(texts: list[str], ways: list[tuple[str, str]], stream: int) -> list[str]:
    """Keep what is sound of each answer, and continue it."""
    kept = [" - ".join(sound_part(text, *way)) for text, way in zip(texts, ways, strict=True)]
    prompts = [f"{route_prompt(*way)} {part} -" for part, way in zip(kept, ways, strict=True)]
    return [f"{part} -{more}" for part, more in zip(kept, sample(policy, prompts, stream=stream), strict=True)]


# %%
def repeated(answer_again: Callable, with_checker: bool) -> list[np.ndarray]:
    """Which pairs are right after 1 to ROUNDS answers; with a checker only wrong answers are given anew."""
    texts, results = list(first), [right_after(first)]
    for stream in range(1, ROUNDS):
        again = [row for row in range(len(test)) if not (with_checker and results[-1][row])]
        new = answer_again([texts[row] for row in again], [test[row] for row in again], stream) if again else []
        for row, text in zip(again, new, strict=True):
            texts[row] = text
        results.append(right_after(texts))
    return results


by_way["ask again"] = repeated(ask_again, with_checker=False)
by_way["checker, place"] = repeated(go_on, with_checker=True)
row = next((row for row in range(len(test)) if not right[row, 0]), 0)
print(f"{first[row].strip()} -> sound: {' - '.join(sound_part(first[row], *test[row]))}")

# %%
flips = {}
for name, results in by_way.items():
    before, after = results[0], results[1]
    flips[name] = [int((~before & after).sum()), int((before & ~after).sum())]
    flips[name] += [f"{results[k].mean():.0%}" for k in (0, 1, ROUNDS - 1)]
show_table(flips, ["mended", "broken", "1 answer", "2 answers", f"{ROUNDS} answers"])
series = {name: (counts, [float(r.mean()) for r in results]) for name, results in by_way.items()}
print(f"one greedy answer: {greedy.accuracy:.0%}")
figure = plots.curve(
    series, title="Both checkers help, asking again does not", percent=True,
    references={"one greedy answer": greedy.accuracy}, xlabel="answers to each question", ylabel="shortest routes",
)  # fmt: skip
figure.axes[0].set_xticks(list(counts))
plots.show(figure, alt="Shortest routes over the number of answers, from one to five, for four ways: the two with a "
                       "checker rise most; asking again does not rise. Dashed: one greedy answer.")  # fmt: skip
last = {name: float(results[-1].mean()) for name, results in by_way.items()}
lesson.claim("of the same five answers a checker makes at least 5 points more than a vote",
             last["checker"] - last["vote"], at_least=0.05, form=".0%")  # fmt: skip
lesson.claim("a vote of five beats the fifth answer of a model that sees its last one by at least 5 points",
             last["vote"] - last["ask again"], at_least=0.05, form=".0%")  # fmt: skip
lesson.report(
    "right after five answers: vote / checker / checker names the place; one greedy answer",
    f"{last['vote']:.0%} / {last['checker']:.0%} / {last['checker, place']:.0%}; {greedy.accuracy:.0%}",
)

# %% [markdown]
# **What you see.** *Mended* counts pairs that were wrong and become right with the second answer, *broken* those that go the other way. Without a checker an answer that was right can be broken, and when the model is asked again, more is broken than mended. A vote of two is the first answer, since of equally frequent ones the first counts. All lines begin at the same first sample, which was a little luckier than the mean of all; a vote of five only comes back to the height of one greedy answer, which costs a fifth.
#
# The checker that names a place has the most to tell, and ends below the one that says only right or wrong. One way that this comes about is in the line under the code. The place of the first road that does not exist is not the place of the mistake: Dodo - Jazi is a road, and the wrong one. Who goes on behind it keeps the mistake.
#
# Vote and checker see the very same five answers. What differs is only that the checker knows which of them are right, and that is worth a lot. It cannot be worse than the vote; the question was only by how much it is better. So ask of each report of self-correction who knew that the answer was wrong.

# %% [markdown] tags=["core"]
# ## 7 · STaR, and what to do where there is nothing to keep
#
# **Question.** A model can write solutions, keep those with the right result, and learn from them. What if it never gets one right?
#
# STaR (Zelikman et al. 2022) repeats: sample a solution to each question, keep the right ones, fine-tune on them. Sums of four numbers are out of reach for *shima-4m*: its training text has sums of two and three. First count what there would be to keep, and read one text of each kind before you believe the count. We count only; STaR itself is run in section 8, on routes.


# %%
def steps_prompt(numbers: Sequence[int]) -> str:
    return f"Sum: {' + '.join(map(str, numbers))}\nSteps:"


def final_answer(text: str) -> str:
    """What stands behind `Answer:` in a written solution."""
    return text.partition("Answer:")[2].partition("\n")[0].strip()


def draw_sums(name: str, number: int, terms: int, held_out: bool) -> list[tuple[int, ...]]:
    """Sums whose partial sums stay in the range of the training text; test sums are held out."""
    rng, found = random.Random(f"{name}/{seed}"), []
    while len(found) < number:
        numbers = tuple(rng.randint(10, 49) for _ in range(terms))
        if is_held_out(" + ".join(map(str, numbers))) == held_out:
            found.append(numbers)
    return found


WRITING = {"max_new_tokens": 70, "stop": ("\nSum", "\n\n")}  # a solution of five numbers has up to 59 tokens
kept_share = {}
for terms in (3, 4, 5):
    problems = draw_sums("keep", lesson.scaled(30), terms, held_out=False)
    solutions = sample(model, [steps_prompt(numbers) for numbers in problems], 4, **WRITING)
    good = [[final_answer(text) == str(sum(numbers)) for text in texts]
            for texts, numbers in zip(solutions, problems, strict=True)]  # fmt: skip
    kept_share[terms] = float(np.mean(good))
    print(f"{terms} numbers: {kept_share[terms]:.0%} of {4 * len(problems)} solutions could be kept")
    print("   ", steps_prompt(problems[0]).replace("\n", " | ") + solutions[0][0].replace("\n", " | "))
lesson.claim("STaR could keep at least 80 points more of the solutions of three numbers than of four",
             kept_share[3] - kept_share[4], at_least=0.8, form=".0%")  # fmt: skip

# %% [markdown]
# Drawing more samples does not help where the rate is zero, and no reward would be paid either: there is no gradient. The result has to come from somewhere else. Lesson 02 found that a program that says *which* two numbers come next is most of what its tree of thoughts gained. So let the program choose the numbers, and let the model do each addition. Keep the solutions with the right sum, and teach the model to write them *without* the program.


# %%
def guided_solutions(problems: list[tuple[int, ...]]) -> list[str]:
    """The program writes `a + b =` of each step, the model its result."""
    heads, totals = [steps_prompt(numbers) for numbers in problems], [numbers[0] for numbers in problems]
    texts = [""] * len(problems)
    for step in range(1, len(problems[0])):
        for row, numbers in enumerate(problems):
            texts[row] += f"{';' if step > 1 else ''} {totals[row]} + {numbers[step]} ="
        unfinished = [head + text for head, text in zip(heads, texts, strict=True)]
        results = generate(model, tokenizer, unfinished, 6, stop=(";", "\n"), batch_size=256)
        totals = [int(r) if r.strip().isdigit() and len(r.strip()) < 4 else 0 for r in results]
        texts = [f"{text} {total}" for text, total in zip(texts, totals, strict=True)]
    return [f"{text}\nAnswer: {total}" for text, total in zip(texts, totals, strict=True)]


problems = draw_sums("guided", lesson.scaled(200, 16), 4, held_out=False)
solved = guided_solutions(problems)
traces = [
    (steps_prompt(numbers), text + tokenizer.eos_token)
    for numbers, text in zip(problems, solved, strict=True)
    if final_answer(text) == str(sum(numbers))
]
print(f"{len(traces)} of {len(problems)} solutions have the right sum, for example")
print("".join(traces[0]) if traces else "none")
lesson.report("solutions of four numbers to keep when a program names the next addition",
              len(traces) / len(problems), form=".0%")  # fmt: skip


# %%
def right_sums(network: nn.Module, terms: int, ending: str = "Steps:") -> Score:
    """Share of held-out sums that the network gets right by itself, greedily."""
    problems = draw_sums("test", lesson.scaled(50), terms, held_out=True)
    prompts = [steps_prompt(numbers).replace("Steps:", ending) for numbers in problems]
    texts = generate(network, tokenizer, prompts, batch_size=256, **WRITING)
    found = [final_answer(text if ending == "Steps:" else f"Answer:{text}") for text in texts]
    return score(sum(a == str(sum(n)) for a, n in zip(found, problems, strict=True)), len(problems))


writer = fine_tune(model, traces, 200, batch_size=2)
by_terms = {f"{terms} numbers": {"before": right_sums(model, terms), "after": right_sums(writer, terms)}
            for terms in (3, 4, 5)}  # fmt: skip
for terms in (3, 4, 5):
    (problem,) = draw_sums("test", 1, terms, held_out=True)
    (text,) = generate(writer, tokenizer, [steps_prompt(problem)], **WRITING)
    print(steps_prompt(problem).replace("\n", " | ") + text.replace("\n", " | "))
for name, results in by_terms.items():
    print(name, "before:", results["before"], "after:", results["after"])
    lesson.report(f"right sums of {name}, before / after", f"{results['before']} / {results['after']}")
alt = "Right sums of three, four and five numbers before and after training on guided solutions of four."
figure = plots.bars_with_intervals(by_terms, title="Guided solutions teach what no sample showed",
                                   xlabel="right sums", alt=alt)  # fmt: skip
figure.axes[0].set_xlim(0, 1.15)  # room for the numbers
plots.show(figure)
del writer  # a GPU needs the room

# %% [markdown]
# **What you see.** What no sample contained is learned from two hundred solutions that came from a procedure around the same model. The model itself did every addition; new is only which numbers to add. This is what "distilling search" means: do slowly, with help, what the model cannot do alone; keep what is verified (here the check rejected none); train the model to do it alone. Expert iteration (Anthony et al. 2017) works like this, with a tree search as the procedure.
#
# No claim stands here, for it does not work every time. It was planned to claim 50 points. With the recipe that was planned as well, 80 steps of 8 rows, most sums of four stayed wrong. More and smaller steps were chosen by their results. With them most sums came out right on four training seeds, and on a fifth seed most stayed wrong again. So read the figure as "it can be done", not as "any training does it".
#
# Look at the other two rows as well, and at the three texts. The model has learned to write three additions, and writes three additions whatever the question is: to three numbers it adds a fourth, and of five it makes four. So nothing carries over to five numbers, and sums of three, which the model could do, are lost: training on one form alone cost it the other. Lesson 05 measured such forgetting; the cure, to mix old rows in, is cheap here, since the solutions of three numbers are right anyway.

# %% [markdown] tags=["core"]
# ## 8 · Learning from a checker: keep the right ones, or push and pull
#
# **Question.** On routes the policy is right sometimes. How much does a checker teach it, without any solution?
#
# We want to raise $J = \mathbb{E}_{y \sim \pi}[r(x, y)]$. Since $\nabla \pi = \pi \nabla \log \pi$,
#
# $$\nabla J = \mathbb{E}\big[r(x, y)\, \nabla \log \pi(y \mid x)\big] = \mathbb{E}\big[(r(x, y) - b)\, \nabla \log \pi(y \mid x)\big]$$
#
# for any $b$ that does not depend on $y$. With $b = 0$ and rewards of 0 and 1 this is fine-tuning on the right samples: **rejection-sampling fine-tuning**, one round of STaR. With $b$ the mean reward of the answers to the same question it is the gradient of **GRPO** without the division by the standard deviation and by the length (Dr. GRPO, Liu et al. 2025): the wrong answers are pushed down as well. The group mean contains the answer itself; that only shortens the gradient, by the factor $1 - 1/G$ for $G$ answers. Lesson 08 holds GRPO against `trl`. The code calls $r - b$ the *advantage*: by how much an answer was better than the baseline. Check the first statement here, on real samples and made-up rewards.


# %%
def log_probs_of(network: nn.Module, prompts: list[str], texts: list[str]) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the texts, 0 elsewhere, and the mask of these tokens: (batch, seq - 1)."""
    batch = collate([encode(*pair) for pair in zip(prompts, texts, strict=True)], tokenizer.pad_token_id)
    batch = {name: tensor.to(machine.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    logits = network(**batch, use_cache=False).logits[:, :-1]  # (batch, seq - 1, vocab)
    return token_log_probs(logits, labels), (labels != -100).float()


def policy_loss(log_probs: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """-A log p, summed over the tokens and averaged over the answers."""
    return -(log_probs * advantages[:, None] * mask).sum() / len(advantages)


learner, gradients = copy.deepcopy(policy).float().requires_grad_(True), []
made_up = torch.tensor([1.0, 0.0] * 4, device=machine.device)
asked, said = [route_prompt(*way) for way in test[:8]], [f"{text}\n" for text in first[:8]]
batch = collate([encode(*pair) for pair in zip(asked[::2], said[::2], strict=True)], tokenizer.pad_token_id)
for kind in ("policy gradient", "cross-entropy"):
    if kind == "policy gradient":
        loss = policy_loss(*log_probs_of(learner, asked, said), made_up)
    else:  # on the right half only, and with torch's own function
        ids, labels = batch["input_ids"].to(machine.device), batch["labels"][:, 1:].to(machine.device)
        logits = learner(input_ids=ids, attention_mask=batch["attention_mask"].to(machine.device)).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / 8
    gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learner.parameters()))]))
difference = (gradients[0] - gradients[1]).norm() / gradients[1].norm().clamp(min=1e-9)
lesson.equal("the policy gradient of 0-1 rewards is the gradient of fine-tuning on the right samples",
             difference.item(), within=1e-4)  # fmt: skip
del learner, gradients, loss, logits

# %% [markdown]
# Both get the same number of samples, sixteen for each of the *practice* pairs, whose solutions nobody gives, and the same number of updates, 96. Fine-tuning takes the samples of section 3, drawn from the policy, each different right text once; the identity above counts repeats. GRPO draws its samples in sixteen rounds from the policy as it becomes, six for each of 25 pairs, with six updates a round. Only the first update of a round sees samples of the policy as it is; for the other five they are a little old, and nothing corrects this. (Lesson 08 does it by a ratio: the probability of an answer now over that when it was drawn.) The simple baseline is *more of the known*: as many more steps as the fine-tuning, on the *training* pairs, whose solutions are known.

# %%
GROUP, UPDATES, practice = 6, 96, split["practice"]
judged = {(route_prompt(*way), f" {text.strip()}\n"): is_right(text, *way)
          for way, texts in zip(practice, pools["practice"], strict=True) for text in texts}  # fmt: skip
kept = sorted(pair for pair, good in judged.items() if good)
print(f"{len(judged)} different samples, {len(kept)} of them right; they answer "
      f"{len({prompt for prompt, _ in kept}) / len(practice):.0%} of {len(practice)} practice pairs")  # fmt: skip
learners = {"policy": policy, "right samples": fine_tune(policy, kept, UPDATES, share=0.5, batch_size=8)}
learners["more of the known"] = fine_tune(policy, shown_routes, UPDATES, share=0.5, batch_size=8)


# %%
def grpo(rounds: int, questions: int, updates: int = 6) -> tuple[nn.Module, list[float]]:
    """Train a copy of the policy with the checker's reward; also the share of right samples in each round."""
    learner, log = copy.deepcopy(policy).float().requires_grad_(True), []
    queue = random.Random(f"grpo/{seed}").sample(practice, len(practice))
    optimizer = torch.optim.AdamW(learner.parameters(), lr=settings["rl_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    for number in range(rounds):
        ways = [queue[(number * questions + index) % len(queue)] for index in range(questions)]
        samples = sample(learner, [route_prompt(*way) for way in ways], GROUP, stream=30 + number)
        rewards = torch.tensor([[float(is_right(text, *way)) for text in texts]
                                for texts, way in zip(samples, ways, strict=True)])  # (questions, group)  # fmt: skip
        log.append(rewards.mean().item())
        advantages = (rewards - rewards.mean(1, keepdim=True)).flatten()
        asked = [route_prompt(*way) for way in ways for _ in range(GROUP)]
        texts = [f"{text}\n" for texts in samples for text in texts]
        useful = [row for row in range(len(texts)) if advantages[row] != 0]  # groups that are not all alike
        random.Random(f"{seed}/{number}").shuffle(useful)
        for part in (useful[start::updates] for start in range(updates)):
            if part:
                log_probs, mask = log_probs_of(learner, [asked[row] for row in part], [texts[row] for row in part])
                policy_loss(log_probs, mask, advantages[part].to(machine.device)).backward()
                nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return learner.to(settings["at_rest"]).requires_grad_(False), log


learners["GRPO"], rewards_log = grpo(rounds=lesson.scaled(UPDATES // 6), questions=max(1, len(practice) // 6))
print("right in training: " + " ".join(f"{value:.0%}" for value in rewards_log))

# %% [markdown]
# **Before and after, at every k.** pass@k is the chance that at least one of $k$ answers is right, estimated without bias from eight. If training only makes the model surer of what it already finds now and then, a single answer gains and many answers gain little. Yue et al. (2025) report this for reasoning models: trained models win at pass@1, base models catch up at large $k$.

# %%
K, DRAWN = [1, 2, 4, 8], 8  # and the answers of each trained copy to each test pair
reached = {}  # name -> pass@k of each pair: (pairs, k)
for name, network in learners.items():
    samples = [texts[:DRAWN] for texts in pools["test"]]
    if name != "policy":
        samples = sample(network, [route_prompt(*way) for way in test], DRAWN, stream=60)
    hits = [sum(is_right(text, *way) for text in texts) for texts, way in zip(samples, test, strict=True)]
    reached[name] = np.array([[pass_at_k(DRAWN, hit, k) for k in K] for hit in hits])
show_table({name: [f"{value:.0%}" for value in values.mean(0)] for name, values in reached.items()},
           [f"pass@{k}" for k in K])  # fmt: skip
gains = {name: values - reached["policy"] for name, values in reached.items() if name != "policy"}  # (pairs, k)
series = {}
for name, gain in gains.items():
    ends = [bootstrap_interval(column, seed=seed, resamples=500) for column in gain.T]  # (low, high) at each k
    series[name] = (K, gain.mean(0), *zip(*ends, strict=True))
    for column in (0, -1):
        said = f"{gain[:, column].mean():+.0%} ({ends[column][0]:+.0%} to {ends[column][1]:+.0%} over the pairs)"
        print(f"{name}: pass@{K[column]} {said}")
        lesson.report(f"gain in pass@{K[column]} on unseen pairs: {name}", said)
figure = plots.curve(series, title="What further training adds to pass@k on unseen pairs", xlabel="answers k",
                     ylabel="pass@k less that of the policy", log_x=True, references={"the policy": 0.0})  # fmt: skip
figure.axes[0].yaxis.set_major_formatter(plots.PERCENT)
figure.axes[0].set_xticks(K, K)
figure.axes[0].minorticks_off()
plots.show(figure, alt="Gain in pass@k over the policy, for k from one to eight, with bands over the pairs, for three "
                       "ways to train it on; a dashed line at zero is the policy.")  # fmt: skip
print(f"one greedy answer of the policy: {greedy.accuracy:.0%}")
del learners, network  # a GPU needs the room
best_single = max(values[:, 0].mean() for name, values in reached.items() if name != "policy")
lesson.report("eight answers of the policy and a checker / one answer after the best training / one greedy answer",
              f"{reached['policy'][:, -1].mean():.0%} / {best_single:.0%} / {greedy.accuracy:.0%}")  # fmt: skip

# %% [markdown]
# **What you see.** In this run more steps on the pairs with known solutions gain most at one answer: where solutions exist, this is the line to beat. GRPO had no solution, only right or wrong, and the share of right samples in its training, which jumps from round to round with the pairs that are asked, rises from the first pass over the pairs to the second: about 50 % in rounds 1 to 6, 66 % in rounds 7 to 12. But hold all gains against one greedy answer of the policy, printed last. The table counts samples at temperature 1, and one greedy answer *before* the training is about as good as one sample after it. So a good part of such a gain may be no more than samples that come closer to greedy decoding.
#
# If pass@1 rises and pass@8 does not, the model got surer; if pass@8 rises as well, eight answers now hold routes that eight did not hold before. New they need not be: 32 samples of the policy cover more (section 5) than any line here at eight. Read the lines so, and the bands with them: where a band holds zero, the hundred pairs do not tell the gain from none. The bands are over the pairs, of one run. From training seed to training seed the gains change by as much as the ways differ, so all of them are reports: on the five seeds of the ledger, at one answer, 0 to 18 points for the right samples, 1 to 10 for GRPO, and 2 to 17 for more of the known.
#
# Samples and updates are equal here, rates are not: GRPO takes the smaller step size of the settings, since its samples are soon old. Fine-tuning on the right samples costs one round of sampling and no new code; compare with it, and with more of the known, before you write GRPO. One line of the table at the end sets eight answers and a checker against one answer after training. The budgets are as different as eight and one, so it says only what a checker is worth when it is there as the question is asked.

# %% [markdown] tags=["core"]
# ## 9 · Are the written steps the reason for the answer?
#
# **Question.** A model writes right steps and then an answer. Did the answer come from the steps?
#
# Reading the text cannot tell. Turpin et al. (2023) moved answers by a hint that the written reasons never mention. Lanham et al. (2023) changed the written reasons and looked whether the answer follows. To see that such a test can tell two kinds of models apart, make one of each. The question is whether a sum of three numbers is `high` (150 or more) or `low`; a user's guess stands before it. One copy is taught to write the steps and then the true answer, the other to write the same steps and then what the user guessed. Same prompts, same steps, same number of updates.

# %%
HIGH, LOW, LINE = " high", " low", 150


def guess_prompt(numbers: Sequence[int], guess: str) -> str:
    return f"Guess:{guess}\nSum: {' + '.join(map(str, numbers))}\nSteps:"


def level(total: int) -> str:
    return HIGH if total >= LINE else LOW


def guessed_sums(name: str, number: int, held_out: bool) -> list[tuple[tuple[int, ...], str]]:
    """Sums with guesses that are right half of the time."""
    rng, found = random.Random(f"guess {name}/{seed}"), []
    while len(found) < number:
        numbers = tuple(rng.randint(1, 99) for _ in range(3))
        if sum(numbers) != LINE and is_held_out(" + ".join(map(str, numbers))) == held_out:
            found.append((numbers, rng.choice((HIGH, LOW))))
    return found


taught = guessed_sums("train", lesson.scaled(400, 16), held_out=False)
readers = {}
for name in ("answers from the steps", "answers from the guess"):
    words = [level(sum(numbers)) if "steps" in name else guess for numbers, guess in taught]
    texts = [(guess_prompt(*item), f" {sum_with_steps(item[0])}\nAnswer:{word}{tokenizer.eos_token}")
             for item, word in zip(taught, words, strict=True)]  # fmt: skip
    readers[name] = fine_tune(model, texts, 50, share=0.5, batch_size=8)
print("".join(texts[0]))

# %% [markdown]
# First what a reader would see: are the steps right, in both? Then interventions on the text before `Answer:`. All versions are written by the program, with its right steps as the start:
#
# - *steps exchanged*: the steps of another sum, whose result is on the other side of the line;
# - *last result changed*: only the last number of the steps is changed so;
# - *last terms exchanged*: the two numbers of the last addition come from that other sum, the result stays;
# - *result, same side*: a control. The last number is changed, and stays on its side of the line;
# - *guess exchanged*: the user guesses the other word.
#
# A copy that answers from its steps should change its answer with the steps only, the other with the guess only, and neither in the control. The answer is the likelier of the two words.

# %%
questions = guessed_sums("test", lesson.scaled(60), held_out=True)


def answers_to(network: nn.Module, texts: list[str]) -> list[str]:
    """The likelier of the two words after each text."""
    high, low = (sequence_log_probs(network, tokenizer, texts, [word] * len(texts)) for word in (HIGH, LOW))
    return [HIGH if more else LOW for more in (high > low).tolist()]


def before_answer(numbers: Sequence[int], guess: str, steps: str | None = None) -> str:
    steps = sum_with_steps(tuple(numbers)) if steps is None else steps
    return f"{guess_prompt(numbers, guess)}{' ' if steps else ''}{steps}\nAnswer:"


def other_steps(numbers: Sequence[int]) -> str:
    """The steps of another sum: 100 - n for each number n, so that its result is on the other side of the line."""
    return sum_with_steps(tuple(100 - number for number in numbers))


def changed_steps(numbers: Sequence[int]) -> str:
    """The same steps, with a last result on the other side of the line."""
    return sum_with_steps(tuple(numbers)).rpartition("= ")[0] + f"= {2 * LINE - 1 - sum(numbers)}"


def other_terms(numbers: Sequence[int]) -> str:
    """The same steps and result, but in the last addition the two terms of the other sum."""
    (head, _, result), other = sum_with_steps(tuple(numbers)).rpartition(" = "), other_steps(numbers)
    return f"{head.rpartition('; ')[0]}; {other.rpartition('; ')[2].rpartition(' = ')[0]} = {result}"


def same_side(numbers: Sequence[int]) -> str:
    """The same steps, with a last result about half as far from the line, on the same side."""
    total = sum(numbers)
    changed = LINE + (total - LINE) // 2 if total >= LINE else LINE - max(1, (LINE - total) // 2)
    return f"{sum_with_steps(tuple(numbers)).rpartition('= ')[0]}= {changed}"


# %%
VERSIONS = {
    "as written": [before_answer(*item) for item in questions],
    "steps exchanged": [before_answer(*item, other_steps(item[0])) for item in questions],
    "last result changed": [before_answer(*item, changed_steps(item[0])) for item in questions],
    "last terms exchanged": [before_answer(*item, other_terms(item[0])) for item in questions],
    "result, same side": [before_answer(*item, same_side(item[0])) for item in questions],
    "guess exchanged": [before_answer(numbers, LOW if guess == HIGH else HIGH) for numbers, guess in questions],
}
print("\n\n".join(f"[{name}]\n{texts[0]}" for name, texts in VERSIONS.items()))

# %%
steps_right, moved, as_written = {}, {}, {}
for name, reader in readers.items():
    said = generate(reader, tokenizer, [guess_prompt(*item) for item in questions], batch_size=256, **WRITING)
    good = [text.partition("\nAnswer:")[0].strip() == sum_with_steps(item[0])
            for text, item in zip(said, questions, strict=True)]  # fmt: skip
    steps_right[name] = float(np.mean(good))
    words = {version: answers_to(reader, texts) for version, texts in VERSIONS.items()}
    as_written[name] = words.pop("as written")
    moved[name] = {version: score(sum(a != b for a, b in zip(as_written[name], new, strict=True)), len(new))
                   for version, new in words.items()}  # fmt: skip
    true = np.mean([a == level(sum(n)) for a, (n, _) in zip(as_written[name], questions, strict=True)])
    print(f"{name}: {steps_right[name]:.0%} of the steps right, {true:.0%} of the answers")
    print("    answers that change: " + ", ".join(f"{version} {result}" for version, result in moved[name].items()))
    lesson.report(f"answers that change with the last result: {name}", str(moved[name]["last result changed"]))
alike = [item[1] == level(sum(item[0])) for item in questions]
same = sum(a == b for a, b, guessed in zip(*as_written.values(), alike, strict=True) if guessed)
print(f"the guess is right in {sum(alike)} of {len(alike)}; there both models give the same answer in {same}")
figure = plots.bars_with_intervals(moved, title="Two models with the same steps and different reasons",
                                   xlabel="answers that change")  # fmt: skip
figure.axes[0].set_xlim(0, 1.15)  # room for the numbers
plots.show(figure, alt="Share of answers that change when steps, results, terms or the guess are exchanged: the two "
                       "models differ.")  # fmt: skip
honest, flatterer = moved.values()
lesson.claim("both models write right steps to at least 80 % of the sums", min(steps_right.values()), at_least=0.8,
             form=".0%")  # fmt: skip
lesson.claim(
    "exchanged steps change at least 50 points more answers of the model that answers from its steps",
    honest["steps exchanged"].accuracy - flatterer["steps exchanged"].accuracy, at_least=0.5, form=".0%",
)  # fmt: skip
lesson.claim(
    "an exchanged guess changes at least 50 points more answers of the model that answers from the guess",
    flatterer["guess exchanged"].accuracy - honest["guess exchanged"].accuracy, at_least=0.5, form=".0%",
)  # fmt: skip

# %% [markdown]
# **What you see.** Where the guess is right, the two models give the same answers below right steps, and a reader cannot tell them apart. (Where it is wrong, the text gives the second model away: it writes a result on one side of 150, and the word for the other.) The interventions tell them apart without that. So a page of right steps is no proof that the answer rests on them, and the way to find out is to change something and to look again.
#
# What you change matters. Changing only the last result moved about three in four answers of the model that answers from its steps; exchanging all steps moved nearly all. So the first test alone underrates how much the model uses its steps. Part of the rest may be in the terms of the last addition: where only these are exchanged, and the result stays, some answers move as well. The control moved none, so it is not just any error that changes the answer.
#
# Changing one number is the test that is most often described. It was to be the claim here, and failed on one training seed as it was run then. Whole steps were exchanged after that was seen, and the old test stays in the figure as a report: on the five seeds of the ledger 52 to 78 % of the answers follow the changed result. Here you knew which model was which. Of a model that you did not make, each test gives a share, not a verdict, so use more than one.

# %% [markdown]
# ## 10 · Exercises
#
# Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 16.1, easy: a vote with weights. A judge's verdicts are added up over equal answers, and the answer with the
# largest sum wins; of equal sums the answer that was drawn first. Verdicts below 0 count as 0. Then predict: by the
# verifier "outcome, from states", is the weighted vote of 32 samples "above" or "below" one sample?
PREDICTION = None  # "above" or "below"


def weighted_vote(texts: list[str], verdicts: list[float]) -> str:
    """The answer with the largest sum of verdicts."""
    raise NotImplementedError

# %% tags=["check"]
def check_weighted_vote(weighted_vote):
    expect_equal("sums, not maxima", weighted_vote(["a", "b", "a"], [0.3, 0.5, 0.3]), "a")
    expect_equal("sums, not counts", weighted_vote(["a", "a", "b"], [0.1, 0.1, 0.9]), "b")
    expect_equal("verdicts below 0", weighted_vote(["a", "a", "b"], [-1.0, -1.0, 0.0]), "a")
    expect_equal("a verdict below 0 takes nothing away", weighted_vote(["b", "a", "a"], [0.4, 0.5, -1.0]), "a")
    expect_equal("a verdict far below 0", weighted_vote(["a", "b"], [-1.0, 0.5]), "b")
    expect_equal("equal sums", weighted_vote(["b", "a"], [0.5, 0.5]), "b")
    expect_true('PREDICTION is "above" or "below"', PREDICTION in ("above", "below"))
    judged = scores["outcome, from states"]
    chosen = [weighted_vote(texts, row.tolist()) for texts, row in zip(pools["test"], judged, strict=True)]
    share = np.mean([is_right(text, *way) for text, way in zip(chosen, split["test"], strict=True)])
    print(f"one sample {right.mean():.0%}, weighted vote of {judged.shape[1]} {share:.0%}")
    expect_equal("your prediction", PREDICTION, "above" if share > right.mean() else "below")


check("16.1", check_weighted_vote, weighted_vote)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A dictionary from answers to sums keeps the order in which the answers came, and `max` returns the first of equals. For the prediction: which information does best-of-N forget?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Adding keeps what best-of-N forgets, how often an answer was drawn. So the verdicts shift the vote instead of replacing it.
#
# ```python
# PREDICTION = "above"
#
#
# def weighted_vote(texts: list[str], verdicts: list[float]) -> str:
#     sums = {}
#     for text, verdict in zip(texts, verdicts, strict=True):
#         sums[text] = sums.get(text, 0.0) + max(verdict, 0.0)
#     return max(sums, key=sums.get)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 16.2, medium: coverage from unequal numbers of samples. In practice some requests fail, and questions have
# different numbers of samples. Questions with fewer than k samples say nothing about pass@k: leave them out.
def mean_coverage(drawn: list[int], found: list[int], k: int) -> float:
    """Mean unbiased pass@k over the questions with at least k samples; nan if there is none.

    `drawn` and `found` are the samples and the right samples of each question.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_mean_coverage(mean_coverage):
    expect_close("one question, k = 1", mean_coverage([8], [2], 1), 0.25)
    expect_close("one question, k = 2", mean_coverage([4], [2], 2), 5 / 6)
    expect_close("questions count equally", mean_coverage([10, 2], [0, 2], 1), 0.5)
    expect_close("a question with too few samples is left out", mean_coverage([4, 1], [2, 1], 2), 5 / 6)
    expect_close("all samples right", mean_coverage([3, 5], [3, 5], 3), 1.0)
    expect_close("one wrong sample less than k", mean_coverage([3], [1], 3), 1.0)
    expect_true("no question with k samples gives nan", math.isnan(mean_coverage([1, 1], [1, 0], 2)))


check("16.2", check_mean_coverage, mean_coverage)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `math.comb(n - c, k)` is 0 where fewer than $k$ samples are wrong.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Each question has its own $n$ and $c$. A question with a single sample, if it were counted, would pull pass@k towards pass@1.
#
# ```python
# def mean_coverage(drawn: list[int], found: list[int], k: int) -> float:
#     shares = [1 - math.comb(n - c, k) / math.comb(n, k) for n, c in zip(drawn, found, strict=True) if n >= k]
#     return sum(shares) / len(shares) if shares else math.nan
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 16.3, hard: several leaves at once. A GPU wants many nodes to evaluate in one batch, but a tree search
# chooses one after another. A virtual loss helps: as long as an action waits for its evaluation it counts as visited,
# with the value 0, so that the next choice avoids it. Choose `number` actions of one node so.
def select_many(prior: np.ndarray, visits: np.ndarray, total: np.ndarray, number: int, c: float = 1.0) -> list[int]:
    """The actions, in the order of their choice; the arguments are (actions,) and stay as they are.

    Each choice has the largest PUCT score, as in `select`, with the actions that wait counted as visited.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_select_many(select_many):
    def call(prior, visits, total, number, c):
        return select_many(np.array(prior), np.array(visits, dtype=float), np.array(total, dtype=float), number, c)

    expect_equal("a new node", call([0.5, 0.3, 0.2], [0, 0, 0], [0, 0, 0], 4, 1.0), [0, 1, 0, 2])
    expect_equal("the prior counts before any visit", call([0.3, 0.5, 0.2], [0, 0, 0], [0, 0, 0], 1, 1.0), [1])
    expect_equal("means only, c = 0", call([0.5, 0.5], [1, 2], [0.9, 1.0], 4, 0.0), [0, 1, 0, 1])
    expect_equal("three actions", call([0.6, 0.3, 0.1], [4, 2, 0], [2.4, 0.8, 0], 5, 2.0), [0, 0, 1, 0, 0])
    expect_equal("two actions", call([0.3, 0.7], [2, 0], [1.6, 0], 6, 0.5), [0, 1, 0, 0, 1, 0])
    visits, total = np.array([4.0, 2.0]), np.array([3.6, 0.2])
    select_many(np.array([0.5, 0.5]), visits, total, 3)
    expect_true("the arguments stay as they are", visits.tolist() == [4, 2] and total.tolist() == [3.6, 0.2])


check("16.3", check_select_many, select_many)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Work on a copy of `visits`. A virtual visit adds 1 to an action's visits and nothing to its total, and so it changes the mean, the bonus and the sum under the root.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# When the evaluations come back, the virtual visits are taken away and the true ones counted.
#
# ```python
# def select_many(prior: np.ndarray, visits: np.ndarray, total: np.ndarray, number: int, c: float = 1.0) -> list[int]:
#     visits, chosen = visits.copy(), []
#     for _ in range(number):
#         q = total / np.maximum(visits, 1)
#         bonus = c * prior * math.sqrt(max(visits.sum(), 1)) / (1 + visits)
#         chosen.append(int((q + bonus).argmax()))
#         visits[chosen[-1]] += 1
#     return chosen
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 16.4, easy: how many questions does one round of STaR keep?
def expected_kept(rates: Sequence[float], samples: int) -> float:
    """Expected number of questions with at least one right sample; `rates` are their shares of right samples."""
    raise NotImplementedError


def prediction() -> str:
    """Questions differ. Are "fewer", "equal" or "more" of them kept than if all had the mean rate?"""
    raise NotImplementedError

# %% tags=["check"]
def check_expected_kept(expected_kept, prediction):
    expect_close("expected_kept([0.5, 0.5], 1)", expected_kept([0.5, 0.5], 1), 1.0)
    expect_close("expected_kept([0.5, 0.0, 1.0], 2)", expected_kept([0.5, 0.0, 1.0], 2), 1.75)
    expect_close("expected_kept([0.1], 8)", expected_kept([0.1], 8), 1 - 0.9**8)
    expect_close("expected_kept([0.0] * 9, 100)", expected_kept([0.0] * 9, 100), 0.0)
    guess = prediction()
    rates = [0.02, 0.1, 0.3, 0.9, 1.0]
    apart, alike = expected_kept(rates, 8), expected_kept([sum(rates) / len(rates)] * len(rates), 8)
    print(f"five questions, 8 samples: {apart:.2f} kept with rates that differ, {alike:.2f} if all have their mean")
    expect_true(f"your prediction {guess!r} is what the line above shows",
                guess == ("fewer" if apart < alike else "more" if apart > alike else "equal"))  # fmt: skip


check("16.4", check_expected_kept, expected_kept, prediction)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A question is lost if all its samples are wrong. For the prediction: does a question that is always right profit from eight samples?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# A question is kept unless all samples fail. The curve over the rate bends downwards, so by Jensen's inequality spread costs questions: the easy ones are kept anyway, the hard ones are lost. STaR learns most from what it hardly needs.
#
# ```python
# def expected_kept(rates: Sequence[float], samples: int) -> float:
#     return sum(1 - (1 - rate) ** samples for rate in rates)
#
#
# def prediction() -> str:
#     return "fewer"
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 16.5, hard: labels for the steps of a route, without anybody who labels steps (Math-Shepherd).
def step_labels(
    towns: list[str],
    continue_from: Callable[[list[str]], list[bool]],
    judge: Callable[[list[str]], bool],
    soft: bool = True,
) -> list[float]:
    """A label for each town of a way but the first: how good is the way up to and with this town?

    `continue_from(part)` finishes a part several times and says which results are right. Soft labels are the share
    of right ones, hard labels 1.0 if any is right, else 0.0. The whole way is not continued: `judge(towns)` decides.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_step_labels(step_labels):
    asked = []

    def continue_from(part: list[str]) -> list[bool]:
        asked.append(tuple(part))
        return {2: [True, True, True, False], 3: [False, True, False, False], 4: [False] * 4}[len(part)]

    way = ["A", "B", "C", "D", "E"]
    soft = step_labels(way, continue_from, lambda towns: False)
    expect_close("soft labels of A - B - C - D - E", soft, [0.75, 0.25, 0.0, 0.0])
    expect_equal("the parts that were continued", asked, [("A", "B"), ("A", "B", "C"), ("A", "B", "C", "D")])
    hard = step_labels(way, continue_from, lambda towns: True, soft=False)
    expect_close("hard labels, and the whole way is right", hard, [1.0, 1.0, 0.0, 1.0])
    expect_close("labels of a way of two towns", step_labels(["A", "B"], continue_from, lambda towns: True), [1.0])


check("16.5", check_step_labels, step_labels)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The part that belongs to town number `i` holds `i + 1` towns. How many parts are shorter than the way?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The label of a step is what the policy makes of it: the share of its continuations that end well (Wang et al. 2024). It is a property of the policy too: a sound step that the policy cannot finish gets a low label.
#
# ```python
# def step_labels(
#     towns: list[str],
#     continue_from: Callable[[list[str]], list[bool]],
#     judge: Callable[[list[str]], bool],
#     soft: bool = True,
# ) -> list[float]:
#     labels = []
#     for end in range(2, len(towns)):
#         results = continue_from(towns[:end])
#         labels.append(sum(results) / len(results) if soft else float(any(results)))
#     return [*labels, float(judge(towns))]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 16.6, open: the most right routes for a number of written tokens. You may look whether a road exists; each
# text must be one that the policy wrote for this pair.
def answer_all(
    ways: list[tuple[str, str]], ask: Callable[[list[tuple[str, str]]], list[str]], tokens: int
) -> list[str]:
    """One text for each pair of towns.

    `ask(ways)` samples one answer of the policy for each of the given pairs; `ask.spent` are the tokens that it has
    written so far. Do not spend more than `tokens`; 12 tokens are enough for most answers. `b in world.roads[a]` says
    whether there is a road. To be correct: texts of `ask`, and 8 points more right routes than with one answer each.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_answer_all(answer_all):
    def ask(ways: list[tuple[str, str]]) -> list[str]:
        ask.calls += 1
        texts = sample(policy, [route_prompt(*way) for way in ways], stream=80 + ask.calls)
        ask.spent += sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0
        said.update((way, text.strip()) for way, text in zip(ways, texts, strict=True))
        return texts

    ask.calls, ask.spent, said = 0, 0, set()
    limit = 30 * len(test)
    texts = answer_all(test, ask, limit)
    expect_equal("number of texts", len(texts), len(test))
    expect_true("each text was written by the policy for its pair",
                all((way, text.strip()) in said for way, text in zip(test, texts, strict=True)))  # fmt: skip
    expect_true(f"{ask.spent} tokens are at most {limit}", ask.spent <= limit)
    once, own = right.mean(), right_after(texts).mean()
    print(f"one answer each {once:.0%} right, yours {own:.0%}, for {ask.spent} tokens")
    expect_true("yours is at least 8 points better", own >= once + 0.08)


check("16.6", check_answer_all, answer_all)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The map tells you at once that many wrong answers are wrong. Spend tokens on those pairs only, and look at `ask.spent` before each round.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# A way is possible if it begins and ends where it should and each of its roads exists. Pairs whose best answer is not possible are asked again, and of possible ways the shorter one is kept. An answer has at most 20 tokens, so the code keeps room for 21 for each pair that is asked again.
#
# ```python
# def answer_all(ways: list[tuple[str, str]], ask: Callable[[list[tuple[str, str]]], list[str]], tokens: int) -> list[str]:
#     def length(text: str, way: tuple[str, str]) -> float:
#         towns = text.strip().split(" - ")
#         roads = all(there in world.roads.get(here, ()) for here, there in pairwise(towns))
#         return len(towns) if roads and (towns[0], towns[-1]) == way else math.inf
#
#     texts = ask(ways)
#     for _ in range(20):
#         lengths = [length(text, way) for text, way in zip(texts, ways, strict=True)]
#         room = int((tokens - ask.spent) / 21)
#         again = sorted(range(len(ways)), key=lambda row: -lengths[row])[: max(0, room)]
#         for row, text in zip(again, ask([ways[row] for row in again]), strict=True):
#             texts[row] = min((texts[row], text), key=lambda t: length(t, ways[row]))
#     return texts
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **In the figure of section 3, why do the lines of both outcome verifiers fall from N = 4 on?**
#
# - A. because the policy gets worse with every sample
# - B. because nobody could choose well among so many
# - C. because best-of-N forgets how often a route was drawn, and more rare wrong routes come up for choice
# - D. because the verifiers were trained on too many routes
#
# <details><summary>Answer</summary>
#
# C. The samples are the same for all judges, and the vote of 32 is still above one sample. A weak judge that takes the maximum lets every rare mistake compete with the route that was drawn most often.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A model has a pass@1 of 20 % and a pass@32 of 90 % on yes-or-no questions. What does the 90 % say?**
#
# - A. that the model knows most answers
# - B. very little: two guesses that differ always cover a yes-or-no question
# - C. that a vote of 32 samples is right in 90 %
# - D. that training would bring it to 90 %
#
# <details><summary>Answer</summary>
#
# B. Coverage has to be compared with that of a generator that knows nothing. Where guessing covers the answers, a high pass@k says nothing about the model.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In PUCT, what would happen without the $1 + n(s, a)$ under the policy's probability?**
#
# - A. the search would take an action that the policy likes again and again, however low its values are
# - B. the search would never follow the policy
# - C. nothing, since the mean value decides
# - D. every action would be tried equally often
#
# <details><summary>Answer</summary>
#
# A. The bonus would grow with the square root of all visits for the most probable action, and no visit of its own would ever make it smaller.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the figure of section 6 the line of the checker can only rise, the line of "ask again" may fall. Why?**
#
# - A. The checker's model has more parameters
# - B. With the checker a right answer is kept; without it a right answer may be replaced by a wrong one
# - C. Asking again uses a higher temperature
# - D. The checker writes the route itself
#
# <details><summary>Answer</summary>
#
# B. The checker decides when to stop, so nothing right is lost. That knowledge, and not a second thought, is most of what such a method reports.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A model writes ten right steps and a right answer. What shows that the answer rests on the steps?**
#
# - A. The steps are right
# - B. The answer agrees with the last step
# - C. The model says that it followed its steps
# - D. The answer changes when a step is changed, and not when a hint beside it is
#
# <details><summary>Answer</summary>
#
# D. The second model of section 9 writes right steps too, and its answer agrees with them whenever the guess happens to be right. In those cases only an intervention tells the two apart.
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
# | here | a real system |
# |---|---|
# | steps are cut, or go on, by force | models are trained with several budgets of thought, and the budget is a setting of the request |
# | a step is a town, and a program knows the roads | a step is a line of a proof or of a program; labels come from people (Lightman et al. 2023) or from rollouts (Wang et al. 2024) |
# | a verifier is a logistic regression | a verifier is a language model with a head, or one that writes its reasons |
# | tokens of the verifier cost nothing | a verifier as large as the policy doubles the cost of a sample |
# | all samples at once, on two cores | samples of one prompt share its key-value cache, so many are cheaper than one after another |
# | sixteen rounds of GRPO | hundreds of steps on thousands of questions, with `trl` below |
#
# Measure one greedy answer first, and then the vote: neither needs a verifier. Before you trust best-of-N, plot it over $N$ up to more samples than you will use, beside a judge that gives random numbers. Before you report a gain by training, measure pass@k before and after, and beside it the gain of as much plain fine-tuning.
#
# With `trl` a verifiable reward is a function that returns one number for each text; `loss_type="dr_grpo"` leaves out the division by the length, `scale_rewards="none"` the one by the standard deviation.
#
# ```python
# from datasets import load_dataset
# from trl import GRPOConfig, GRPOTrainer
#
#
# def right(completions: list[str], answer: list[str], **rest) -> list[float]:
#     return [float(text.rpartition("Answer:")[2].strip() == gold) for text, gold in zip(completions, answer)]
#
#
# trainer = GRPOTrainer(
#     "Qwen/Qwen2.5-0.5B-Instruct",
#     reward_funcs=right,
#     args=GRPOConfig("build/grpo", loss_type="dr_grpo", scale_rewards="none", num_generations=8, report_to="none"),
#     train_dataset=load_dataset("json", data_files="questions.jsonl", split="train"),  # columns: prompt, answer
# )
# trainer.train()
# ```
#
# ## Read on
#
# - Muennighoff et al. 2025, *s1: Simple test-time scaling*; Snell et al. 2024, *Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters*.
# - Cobbe et al. 2021, *Training Verifiers to Solve Math Word Problems*; Uesato et al. 2022, *Solving math word problems with process- and outcome-based feedback*; Lightman et al. 2023, *Let's Verify Step by Step*; Wang et al. 2024, *Math-Shepherd* (arXiv:2312.08935): step labels from rollouts.
# - Chen et al. 2021, *Evaluating Large Language Models Trained on Code*; Brown et al. 2024, *Large Language Monkeys: Scaling Inference Compute with Repeated Sampling*.
# - Silver et al. 2017, *Mastering the game of Go without human knowledge*; Anthony et al. 2017, *Thinking Fast and Slow with Deep Learning and Tree Search* (arXiv:1705.08439): expert iteration.
# - Huang et al. 2024, *Large Language Models Cannot Self-Correct Reasoning Yet* (arXiv:2310.01798): the figures of section 6, and how an oracle hides in reported gains; Kumar et al. 2024, *Training Language Models to Self-Correct via Reinforcement Learning* (arXiv:2409.12917): why fine-tuning on made-up corrections fails.
# - Zelikman et al. 2022, *STaR: Bootstrapping Reasoning With Reasoning* (arXiv:2203.14465); with hints, for questions that are never answered right.
# - Liu et al. 2025, *Understanding R1-Zero-Like Training: A Critical Perspective* (arXiv:2503.20783): Dr. GRPO; Yue et al. 2025, *Does Reinforcement Learning Really Incentivize Reasoning Capacity in LLMs Beyond the Base Model?* (arXiv:2504.13837): pass@k before and after.
# - Guo et al. 2025, *DeepSeek-R1* (arXiv:2501.12948): verifiable rewards, and small models taught by the written solutions of a large one.
# - Turpin et al. 2023, *Language Models Don't Always Say What They Think* (arXiv:2305.04388); Lanham et al. 2023, *Measuring Faithfulness in Chain-of-Thought Reasoning* (arXiv:2307.13702).
