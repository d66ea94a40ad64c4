# %% [markdown]
# # 15 · Control: a language model that acts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/15_control.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/15_control.ipynb)
#
# An answer is judged and forgotten. An action changes the world, and the next question comes from the world that it has changed. That is the whole difference between a model that talks and one that drives a robot, calls a tool or clicks through a shop, and it has consequences that you can measure. A plan that is right may fail on a slippery floor. A wish is no plan where the thing is not there. A copy of an expert fails in places where no expert goes. In this lesson you build each of these situations small enough to know the right answer, measure the failure, and repair it. Then you build the program that lets a model act by writing: tool calls that can always be parsed, a loop in which it reads what its calls brought, a shop behind two browsers, and tools in another process. You measure what each of these guarantees, and what it does not.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write a robot's world that passes `gymnasium`'s own checks, teach a language model to drive in it by imitation, and measure what it costs not to look;
# 2. see a perfect copy of an expert fail, and compare ways to spend the same number of labels on it;
# 3. turn typed functions into schemas, schemas into an automaton and the automaton into masks, equal to `outlines_core` state by state and to `generate` token by token, and see what a mask does not repair;
# 4. measure recovery from a tool's errors, with and without the message, and drive a shop through a text browser and through Chromium;
# 5. talk to tools in another process by the Model Context Protocol.
#
# **Prerequisites:** lesson 05.
#
# **The model** is *shima-4m*, a small Llama that comes with the course. It has read about the made-up island Shima, and never about a robot.
#
# | symbol | meaning |
# |---|---|
# | $s$, $a$ | a state of the world (here: where the robot, its goal and the blocked cells are), and an action (a move) |
# | $p$ | slip: the probability that a move goes to the left or right of where it was meant to go |
# | $P(s' \mid s, a)$ | probability of the next state |
# | $V(s)$ | value: the negative number of moves that the best policy still needs from $s$, on average |
# | $\pi(a \mid x)$ | policy: probability that the model chooses move $a$ after reading the text $x$ |
# | $L$ | number of moves of a plan |
# | $i$, $k$ | an instruction, and a skill, such as fetching a thing |
# | $\mathcal{L}$, $\mathcal{L}_1 \mathcal{L}_2$ | a language, which is a set of texts; a text of the first followed by one of the second |
# | $\partial_b \mathcal{L}$ | what may follow in $\mathcal{L}$ once the byte $b$ is read |
# | $y$, $\mathcal{V}$ | a text that a model writes; the set of valid ones |
# | $p(y)$, $q(y)$ | probability of a text under the model, and under the model with a mask |
# | $a_t$ | share of probability that the mask allows at token $t$ |

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
import json
import math
import random
import re
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial, reduce
from itertools import product
from typing import Literal, NamedTuple, get_args, get_origin, get_type_hints

import gymnasium
import matplotlib.pyplot as plt
import networkx
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from torch import Tensor, nn

from helpers import plots
from helpers.chat import encode_answer
from helpers.data import collate
from helpers.evaluation import Score, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import generate, sequence_log_probs
from helpers.lesson import Lesson, show_table
from helpers.models import load_model
from helpers.training import TrainConfig, train

lesson = Lesson("15", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # learning rates of the robot and the assistant, factor for its embeddings, number format
    "cpu": {"rate": 1e-3, "tool_rate": 1.5e-3, "embedding_factor": 4.0, "precision": "fp32"},
    "t4": {"rate": 2e-5, "tool_rate": 1e-5, "embedding_factor": 1.0, "precision": lesson.precision},
    "large": {"rate": 1e-5, "tool_rate": 1e-5, "embedding_factor": 1.0, "precision": lesson.precision},
}
settings = SETTINGS[machine.name]
model, tokenizer = load_model(machine)

# %% [markdown]
# `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. `lesson.scaled` makes a number of steps or items smaller on a smaller budget.

# %% [markdown] tags=["core"]
# ## 1 · A world with rules
#
# **Question.** What must be fixed before anyone can say that one robot drives better than another?
#
# A *Markov decision process*: states $s$, actions $a$, the probability $P(s' \mid s, a)$ of what comes next, and a reward. The robot lives on a square of 6 by 6 cells. Some are blocked. It has one goal and four moves. A move into a wall leaves it where it is. The floor may be slippery: with probability $p$ a move goes to the left or to the right of its direction, either with $p/2$. Each move costs 1, so the return of an episode is minus the number of moves.

# %%
SIZE = 6
Cell = tuple[int, int]
DIRECTIONS = {"east": (1, 0), "north": (0, 1), "west": (-1, 0), "south": (0, -1)}  # each a left turn from the last
ACTIONS = list(DIRECTIONS)
CELLS = [(x, y) for x in range(SIZE) for y in range(SIZE)]
OPEN: frozenset[Cell] = frozenset()  # no cell is blocked


def neighbour(cell: Cell, action: str, blocked: frozenset[Cell]) -> Cell:
    """The cell in that direction, or the same one if a wall is there."""
    x, y = cell[0] + DIRECTIONS[action][0], cell[1] + DIRECTIONS[action][1]
    return (x, y) if 0 <= x < SIZE and 0 <= y < SIZE and (x, y) not in blocked else cell


def outcomes(cell: Cell, action: str, blocked: frozenset[Cell], slip: float) -> list[tuple[float, Cell]]:
    """What may come of a move: three pairs (probability, cell)."""
    turn = ACTIONS.index(action)
    left, right = ACTIONS[(turn + 1) % 4], ACTIONS[(turn - 1) % 4]
    chances = [(1 - slip, action), (slip / 2, left), (slip / 2, right)]
    return [(chance, neighbour(cell, direction, blocked)) for chance, direction in chances]


print("a move east from (0, 0), slip 0.2:", outcomes((0, 0), "east", OPEN, 0.2))

# %% [markdown]
# `breadth_first` counts the moves to the goal from every cell, without slip. It also tells whether a layout is fair: every free cell must have a way to the goal.


# %%
class Layout(NamedTuple):
    """Where things are when an episode begins."""

    robot: Cell
    goal: Cell
    blocked: frozenset[Cell]


def breadth_first(goal: Cell, blocked: frozenset[Cell]) -> dict[Cell, int]:
    """Cell -> least number of moves to the goal; cells without a way are missing."""
    moves, queue = {goal: 0}, deque([goal])
    while queue:
        cell = queue.popleft()
        for near in (neighbour(cell, action, blocked) for action in ACTIONS):
            if near not in moves:
                moves[near] = moves[cell] + 1
                queue.append(near)
    return moves


def random_layout(generator: np.random.Generator, number_blocked: int = 6) -> Layout:
    """Robot, goal and blocked cells at random, such that the goal can be reached from every free cell."""
    while True:
        cells = [CELLS[index] for index in generator.permutation(len(CELLS))]
        layout = Layout(cells[0], cells[1], frozenset(cells[2 : 2 + number_blocked]))
        if len(breadth_first(layout.goal, layout.blocked)) == len(CELLS) - number_blocked:
            return layout


layouts = [random_layout(np.random.default_rng([seed, 1, number])) for number in range(lesson.scaled(50))]
wrong, floor = 0, networkx.grid_2d_graph(SIZE, SIZE)
for layout in layouts:
    free = floor.subgraph(set(CELLS) - layout.blocked)
    library = dict(networkx.single_source_shortest_path_length(free, layout.goal))
    wrong += library != breadth_first(layout.goal, layout.blocked)
lesson.equal("breadth-first search counts the moves that networkx counts", wrong)

# %% [markdown]
# A `gymnasium.Env` wraps this in the interface that all tools for control expect: `reset` begins an episode, `step` takes an action and returns what is seen, the reward, whether the goal is reached, and whether time is up (here never: the lesson counts moves itself). `check_env` is the library's own list of what such an environment must keep.


# %%
class ShimaGrid(gymnasium.Env):
    """A robot on a floor with walls, which may be slippery."""

    def __init__(self, slip: float = 0.0) -> None:
        square = spaces.MultiDiscrete([SIZE, SIZE])
        walls = spaces.MultiBinary((SIZE, SIZE))
        self.observation_space = spaces.Dict({"robot": square, "goal": square, "blocked": walls})
        self.action_space, self.slip = spaces.Discrete(4), slip

    def _seen(self) -> dict[str, np.ndarray]:
        walls = np.array([[(x, y) in self.at.blocked for y in range(SIZE)] for x in range(SIZE)], dtype=np.int8)
        return {"robot": np.array(self.at.robot), "goal": np.array(self.at.goal), "blocked": walls}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)  # makes self.np_random anew
        self.at = (options or {}).get("layout") or random_layout(self.np_random)
        return self._seen(), {}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        chances, cells = zip(*outcomes(self.at.robot, ACTIONS[action], self.at.blocked, self.slip), strict=True)
        self.at = self.at._replace(robot=cells[self.np_random.choice(3, p=chances)])
        return self._seen(), -1.0, self.at.robot == self.at.goal, False, {}


with warnings.catch_warnings(record=True) as remarks:
    warnings.simplefilter("always")
    check_env(ShimaGrid(slip=0.2), skip_render_check=True)  # raises where a rule is broken
print("\n".join(str(remark.message) for remark in remarks))
lesson.equal("gymnasium's check finds nothing to remark on the environment", len(remarks))


# %% [markdown]
# **What you see.** Both searches agree in every cell, and the library has no remark. Without slip we know the least number of moves, and so which moves are best. Section 3 counts against them.

# %% [markdown] tags=["further"]
# ## 2 · The best moves on a slippery floor
#
# *Further: no core section needs this one.*
#
# **Question.** With slip no single path is sure. What does *best* mean then?
#
# The value of a state obeys Bellman's equation
#
# $$V(s) = \max_a \Big( -1 + \sum_{s'} P(s' \mid s, a)\, V(s') \Big), \qquad V(\text{goal}) = 0$$
#
# *Value iteration* starts with $V = 0$ and applies the right side until nothing changes. Without slip the result must be minus the number of moves that breadth-first search counts.

# %%
def transitions(goal: Cell, blocked: frozenset[Cell], slip: float) -> np.ndarray:
    """P(s' | s, a) as an array (actions, cells, cells); the robot stays at the goal, and in blocked cells."""
    chances = np.zeros((4, len(CELLS), len(CELLS)))
    for (number, action), (row, cell) in product(enumerate(ACTIONS), enumerate(CELLS)):
        stays = cell == goal or cell in blocked
        for chance, end in [(1.0, cell)] if stays else outcomes(cell, action, blocked, slip):
            chances[number, row, CELLS.index(end)] += chance
    return chances


def value_iteration(goal: Cell, blocked: frozenset[Cell], slip: float) -> tuple[np.ndarray, np.ndarray]:
    """Values (cells,) and values of each action (actions, cells)."""
    chances = transitions(goal, blocked, slip)
    cost = np.array([0.0 if cell == goal or cell in blocked else 1.0 for cell in CELLS])
    values, change = np.zeros(len(CELLS)), 1.0
    while change > 1e-10:
        of_actions = chances @ values - cost  # (actions, cells)
        change = np.abs(of_actions.max(0) - values).max()
        values = of_actions.max(0)
    return values, of_actions


wrong = 0
for layout in layouts[:20]:
    values, _ = value_iteration(layout.goal, layout.blocked, slip=0.0)
    moves = breadth_first(layout.goal, layout.blocked)
    wrong += sum(values[CELLS.index(cell)] != -count for cell, count in moves.items())
lesson.equal("without slip value iteration counts the moves of breadth-first search", wrong)

# %% [markdown]
# On the slippery floor the values can be checked by another road: fix the best action in each cell; then the expected numbers of moves solve a system of linear equations.

# %%
layout = layouts[0]
values, of_actions = value_iteration(layout.goal, layout.blocked, slip=0.2)
chosen = transitions(layout.goal, layout.blocked, 0.2)[of_actions.argmax(0), range(len(CELLS))]  # (cells, cells)
going = [index for index, cell in enumerate(CELLS) if cell != layout.goal and cell not in layout.blocked]
among = chosen[np.ix_(going, going)]  # moves between cells from which the robot still has to go
expected = np.linalg.solve(np.eye(len(going)) - among, np.ones(len(going)))
gap = np.abs(expected + values[going]).max()
lesson.equal("value iteration on a slippery floor solves the linear equations", gap, within=1e-6)
figure, axes = plt.subplots(figsize=(4.6, 4.6))
for index in going:
    (x, y), (dx, dy) = CELLS[index], DIRECTIONS[ACTIONS[of_actions[:, index].argmax()]]
    axes.annotate("", (x + 0.4 * dx, y + 0.4 * dy), (x, y), arrowprops={"arrowstyle": "->", "color": plots.COLORS[0]})
    axes.text(x - 0.45, y + 0.28, f"{-values[index]:.1f}", fontsize=7, color=plots.GREY)
for x, y in layout.blocked:
    axes.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=plots.GREY))
axes.text(*layout.goal, "goal", ha="center", va="center", weight="bold", color=plots.COLORS[1])
axes.set(xlim=(-0.5, 5.5), ylim=(-0.5, 5.5), aspect="equal", title="Best moves on a slippery floor",
         xlabel="cells to the east", ylabel="cells to the north")  # fmt: skip
axes.grid(False)
plots.show(figure, alt="A floor of six by six cells with six blocked ones. In each free cell an arrow shows the best "
                       "move and a number the expected moves to the goal, which grow with the distance.")  # fmt: skip
fewest = np.array([breadth_first(layout.goal, layout.blocked)[CELLS[index]] for index in going])
lesson.report("expected moves for each move of the shortest way, slip 0.2", -values[going].sum() / fewest.sum())

# %% [markdown]
# **What you see.** All ways to compute it agree. The arrows show the best moves on the slippery floor, the small numbers how many moves are still to be expected. To compute this number one must know the floor, the probabilities $P$. The robot of the next section has none.

# %% [markdown] tags=["core"]
# ## 3 · Imitation: from words to moves
#
# **Question.** Can a language model learn to drive from examples alone?
#
# The simplest thing that could work is *behaviour cloning* (Pomerleau 1989): write each state down in words, let the expert say its move, and fine-tune on the pairs as in lesson 05. The text gives the goal *relative* to the robot, and the walls around it. The answer is one word, so a move costs one forward pass. Note what the text leaves out: the walls further away. The expert sees the whole floor, the model only what it is told.


# %%
def describe(robot: Cell, goal: Cell, blocked: frozenset[Cell]) -> str:
    """The state in words, as the robot sees it."""
    walls = [action for action in ACTIONS if neighbour(robot, action, blocked) == robot]
    return f"The goal is {relative(robot, goal)}. Blocked: {', '.join(walls) or 'nothing'}. Which way?"


def relative(robot: Cell, goal: Cell) -> str:
    """Where the goal is, for example `2 east and 3 north`."""
    east, north = goal[0] - robot[0], goal[1] - robot[1]
    along = [f"{abs(east)} {'east' if east > 0 else 'west'}"] * (east != 0)
    return " and ".join(along + [f"{abs(north)} {'north' if north > 0 else 'south'}"] * (north != 0))


def best_moves(layout: Layout, moves: Mapping[Cell, int]) -> list[str]:
    """All actions that bring the robot closer; `moves` is what `breadth_first` found. The expert takes the first."""
    ends = {action: neighbour(layout.robot, action, layout.blocked) for action in ACTIONS}
    return [action for action, end in ends.items() if moves[end] < moves[layout.robot]]


def states(layout: Layout) -> list[Layout]:
    """The layout with the robot in each free cell but the goal."""
    free = [cell for cell in CELLS if cell != layout.goal and cell not in layout.blocked]
    return [layout._replace(robot=cell) for cell in free]


moves = breadth_first(layout.goal, layout.blocked)
print(describe(*layout), best_moves(layout, moves))

# %% [markdown]
# The robot learns three things in one run. *Moves*: four states of each of many layouts. *Plans*: all moves at once, on an open floor, for section 4; a fifth of the goals is kept out, chosen by lot. *Wishes*: what a user who says something wants to have, for section 5. A demonstrator fetches the usual thing three times in four, and otherwise a second one that would do.

# %%
NEEDS = {  # what the user says: the usual thing, and one that would do
    "The user is thirsty.": ("tea", "milk"),
    "The user is hungry.": ("pie", "cheese"),
    "The user wants music.": ("flute", "drum"),
    "The user has a parcel to open.": ("knife", "saw"),
    "The user has a fence to mend.": ("hammer", "rope"),
}
AWAY = [(x, y) for x in range(1 - SIZE, SIZE) for y in range(1 - SIZE, SIZE) if (x, y) != (0, 0)]  # goal minus robot


def plan(away: Cell) -> list[str]:
    """The expert's moves on an open floor: first along one street, then along the other."""
    east, north = away
    return abs(east) * ["east" if east > 0 else "west"] + abs(north) * ["north" if north > 0 else "south"]


def move_rows(number: int, stream: int) -> list[tuple[Layout, str]]:
    """States of new layouts, four of each, with the expert's move."""
    rows = []
    for index in range(math.ceil(number / 4)):
        generator = np.random.default_rng([seed, stream, index])
        layout = random_layout(generator)
        moves, places = breadth_first(layout.goal, layout.blocked), states(layout)
        for place in generator.choice(len(places), 4, replace=False):
            rows.append((places[place], best_moves(places[place], moves)[0]))
    return rows[:number]


BATCH = 32
taught = move_rows(BATCH * lesson.scaled(80), stream=2)
kept_out = random.Random(f"goals/{seed}").sample(AWAY, len(AWAY) // 5)
told = [away for away in AWAY if away not in kept_out]

# %%
generator = random.Random(f"rows/{seed}")


def plan_prompt(away: Cell) -> str:
    return f"The goal is {relative((0, 0), away)}. Plan:"


goals = [generator.choice(told) for _ in range(BATCH * lesson.scaled(32))]
parts = {
    "moves": [(describe(*layout), f" {action}") for layout, action in taught],
    "plans": [(plan_prompt(away), f" {' '.join(plan(away))}.\n") for away in goals],
    "wishes": [  # each need equally often, and every fourth time the second thing
        (f"{wish} Fetch what?", f" {things[index % 4 == 3]}.\n")
        for index in range(BATCH * lesson.scaled(8) // len(NEEDS)) for wish, things in NEEDS.items()
    ],
}  # fmt: skip
for part in parts.values():
    print(*part[0], "|", len(tokenizer("".join(part[0]))["input_ids"]), "tokens")


encode = partial(encode_answer, tokenizer)  # (prompt, answer) -> tokens, and labels that are -100 in the prompt
# each part is spread evenly over the run
encoded = [(index / len(part), encode(*row)) for part in parts.values() for index, row in enumerate(part)]
examples = [example for _, example in sorted(encoded, key=lambda pair: pair[0])]

# %% [markdown]
# The loss is that of fine-tuning: the mean of $-\log \pi$ over the tokens of the answers, and nothing for the prompt. Only the positions that predict an answer need logits at all.


# %%
def imitation_loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of -log probability of the answers' tokens, in nats."""
    seen = {name: batch[name] for name in ("input_ids", "attention_mask")}
    states = network.model(**seen, use_cache=False).last_hidden_state[:, :-1]  # (batch, seq - 1, hidden)
    labels = batch["labels"][:, 1:]  # (batch, seq - 1): the token after each position
    asked = labels != -100
    log_probs = network.lm_head(states[asked]).float().log_softmax(-1)  # (answers' tokens, vocab)
    return -log_probs.gather(1, labels[asked][:, None]).mean()


@torch.no_grad()
def ask(network: nn.Module, texts: Sequence[str]) -> np.ndarray:
    """Probability of each of the four moves after each text (texts, 4), from one forward pass."""
    words = tokenizer([f" {action}" for action in ACTIONS], add_special_tokens=False)["input_ids"]
    network.eval()
    found = []
    for start in range(0, len(texts), 128):
        ids = tokenizer(list(texts[start : start + 128]), add_special_tokens=False)["input_ids"]
        batch = collate([{"input_ids": row} for row in ids], tokenizer.pad_token_id)
        inputs = batch["input_ids"].to(network.device)  # padded on the right, which no earlier token can see
        states = network.model(input_ids=inputs, use_cache=False).last_hidden_state  # (texts, seq, hidden)
        last = states[torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])]  # (texts, hidden)
        found.append(network.lm_head(last).float()[:, [word[0] for word in words]].softmax(-1).cpu())
    return torch.cat(found).double().numpy()


robot = copy.deepcopy(model).float()
batch = {name: part.to(robot.device) for name, part in collate(examples[:8], tokenizer.pad_token_id).items()}
with torch.no_grad():
    theirs = robot(**batch).loss.item()
    difference = abs(imitation_loss(robot, batch).item() - theirs)
lesson.equal("the imitation loss is transformers' loss with labels", difference, within=1e-4)

# %% [markdown]
# **Measure and baselines.** A move is right if it is *one* of the best ones in that state of a layout that training never had. The states as *texts* are not all new, since the text is short. So the fair rivals are simple: a *table* that answers with what the expert said most often after the same text; the same table, which *guesses* any free direction where the text is new; a *decision tree* and the *nearest example*, both on six numbers (goal east, goal north, four walls); a *rule of thumb* (the longer way first, if it is free); and a robot that takes any free direction. The *ceiling* is the most that anyone can reach in this test who sees the text only: after each text the move that is right in most of the test's own states.


# %%
def with_best(layouts: Sequence[Layout]) -> list[tuple[Layout, list[str]]]:
    """All states of the layouts, each with its best moves."""
    found = []
    for layout in layouts:
        moves = breadth_first(layout.goal, layout.blocked)
        found += [(state, best_moves(state, moves)) for state in states(layout)]
    return found


def right(answers: Mapping[str, str], among: Sequence[tuple[Layout, list[str]]]) -> Score:
    """Share of states in which the move that follows the text is one of the best."""
    return score(sum(answers.get(describe(*state)) in best for state, best in among), len(among))


def most_often(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Text -> the move that stands beside it most often."""
    counts = defaultdict(Counter)
    for text, action in pairs:
        counts[text][action] += 1
    return {text: count.most_common(1)[0][0] for text, count in counts.items()}


def answers_of(network: nn.Module, texts: Sequence[str]) -> dict[str, str]:
    """Text -> the model's most probable move."""
    texts = sorted(set(texts))
    return {text: ACTIONS[best] for text, best in zip(texts, ask(network, texts).argmax(1), strict=True)}


def new_layouts(number: int, stream: int, number_blocked: int = 6) -> list[Layout]:
    return [random_layout(np.random.default_rng([seed, stream, n]), number_blocked) for n in range(number)]


tested = with_best(new_layouts(lesson.scaled(30), stream=3))
test_texts = [describe(*state) for state, _ in tested]
untrained = right(answers_of(robot, test_texts), tested)
print(f"before training: {untrained}, {len(tested)} states, {len(set(test_texts))} different texts")

# %%
steps = len(examples) // BATCH
looked_at = tested[:: max(1, len(tested) // 150)]  # a part of the states, during training
batches = [collate(examples[BATCH * n : BATCH * (n + 1)], tokenizer.pad_token_id) for n in range(steps)]
config = TrainConfig(
    max_steps=steps, learning_rate=settings["rate"], warmup_steps=steps // 10, schedule="linear", weight_decay=0.0,
    precision=settings["precision"], progress=False, seed=seed, evaluate_every=math.ceil(steps / 4),
)  # fmt: skip
history = train(
    robot, batches, config, loss_fn=imitation_loss,
    evaluate=lambda network: {
        "right": right(answers_of(network, [describe(*state) for state, _ in looked_at]), looked_at).accuracy
    },
)  # fmt: skip
robot.eval().requires_grad_(False)
print(f"{steps} steps, {sum(history.tokens) / 1000:.0f} thousand tokens, "
      f"loss {history.losses[0]:.2f} -> {np.mean(history.losses[-5:]):.2f}")  # fmt: skip

# %%
pairs = [(describe(*layout), action) for layout, action in taught]


def numbers(layout: Layout) -> list[int]:
    """The state as six numbers: goal east, goal north, four walls."""
    walls = [int(neighbour(layout.robot, action, layout.blocked) == layout.robot) for action in ACTIONS]
    return [layout.goal[0] - layout.robot[0], layout.goal[1] - layout.robot[1], *walls]


def rule_of_thumb(layout: Layout) -> str:
    """The free direction that brings the robot furthest: the longer way first."""
    east, north, *walls = numbers(layout)
    worth = dict(zip(ACTIONS, (east, north, -east, -north), strict=True))
    return max((action for action, wall in zip(ACTIONS, walls, strict=True) if not wall), key=worth.get)


def by_numbers(rule, number: int) -> dict[str, str]:
    """Answers of a rule of scikit-learn that was fitted to the first rows, as six numbers each."""
    rule.fit([numbers(layout) for layout, _ in taught[:number]], [action for _, action in taught[:number]])
    return dict(zip(test_texts, rule.predict([numbers(state) for state, _ in tested]), strict=True))


def any_free(among: Sequence[tuple[Layout, list[str]]]) -> float:
    """Share of best moves of a robot that takes any free direction."""
    return float(np.mean([len(best) / (4 - sum(numbers(state)[2:])) for state, best in among]))


def with_a_guess(answers: Mapping[str, str], among: Sequence[tuple[Layout, list[str]]]) -> float:
    """Share of best moves if any free direction is taken where the text has no answer."""
    new = [pair for pair in among if describe(*pair[0]) not in answers]
    hits = right(answers, among).accuracy * len(among) + (any_free(new) * len(new) if new else 0)
    return hits / len(among)

# %%
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

tree, nearest = DecisionTreeClassifier(random_state=0), KNeighborsClassifier(1)
ceiling = right(most_often([(describe(*state), action) for state, best in tested for action in best]), tested)
by_model, by_table = answers_of(robot, test_texts), most_often(pairs)
by_rule = {text: rule_of_thumb(state) for text, (state, _) in zip(test_texts, tested, strict=True)}
show_table(
    {"any free direction": [f"{any_free(tested):.0%}"], "rule of thumb": [right(by_rule, tested)],
     "table": [right(by_table, tested)], "table that may guess": [f"{with_a_guess(by_table, tested):.0%}"],
     "decision tree": [right(by_numbers(tree, len(taught)), tested)],
     "nearest example": [right(by_numbers(nearest, len(taught)), tested)],
     "language model": [right(by_model, tested)], "ceiling of the text": [ceiling]},
    ["best moves on new layouts"],
)  # fmt: skip

# %% tags=["headline"]
seen_rows = [round(len(taught) * entry["step"] / steps) for entry in history.evaluations]
line = {"language model": (seen_rows, [entry["right"] for entry in history.evaluations])}
tables = [most_often(pairs[:number]) for number in seen_rows]
line["table"] = (seen_rows, [right(answers, looked_at).accuracy for answers in tables])
line["table that may guess"] = (seen_rows, [with_a_guess(answers, looked_at) for answers in tables])
line["decision tree"] = (seen_rows, [right(by_numbers(tree, number), looked_at).accuracy for number in seen_rows])
figure = plots.curve(
    line, title="A table that may guess needs no more examples than the model", xlabel="moves that were shown (rows)",
    ylabel="best moves on new layouts", percent=True, references={"ceiling": ceiling.accuracy},
)  # fmt: skip
plots.show(
    figure, alt="Best moves over rows shown: the table without guesses begins lowest; with guesses it is about as good "
    "as the language model; the decision tree is above them, all below the ceiling.",
)  # fmt: skip
unknown = [pair for pair in tested if describe(*pair[0]) not in by_table]
new_texts = right(by_model, unknown) if unknown else score(0, 1)
by_chance = any_free(unknown) if unknown else 0.0
print(f"states whose text training never had: {len(unknown) / len(tested):.0%}; best moves there {new_texts}; "
      f"any free direction {by_chance:.0%}")  # fmt: skip
lesson.report("best moves in states of new layouts: after imitation, before it",
              f"{right(by_model, tested).accuracy:.0%}, {untrained.accuracy:.0%}")  # fmt: skip
lesson.report("after texts that training never had: best moves, and those of any free direction",
              f"{new_texts.accuracy:.0%}, {by_chance:.0%}")  # fmt: skip
model_first, table_first, guess_first, _ = (values[0] for _, values in line.values())
lesson.report("with a quarter of the rows: language model, table, and table that may guess",
              f"{model_first:.0%}, {table_first:.0%}, {guess_first:.0%}")  # fmt: skip

# %% [markdown]
# **What you see.** A model that had never read about a robot takes mostly best moves on floors that nobody showed it. The first lines look as if it learned from fewer examples than the table. It does not: that table answers nothing to an unknown text, and such an answer counts as wrong. Let it guess a free direction there, and the head start is gone. On unknown texts the model is better than a guess in this run and with four of the ledger's five seeds, but they are only a small part. The rule of thumb is better than the model, and it took one line. A decision tree, on the same facts as six numbers, gets there with fewer rows, and simply looking up the nearest example comes as far. Where a state *is* six numbers, words bring no saving. What they buy comes next: the same model also says plans and knows what users want, with no second interface. (The curve's points before the last are from the middle of a run whose learning rate is still high; table and tree are fitted anew for each point.)

# %% [markdown] tags=["core"]
# ## 4 · A plan, or one move at a time?
#
# **Question.** The model can say a whole plan at once, or be asked again after each move. Plans are cheaper. What do they cost?
#
# *Open loop*: decide everything now, then act with closed eyes. *Closed loop*: look, act, look again. On a floor that never slips both are the same, if the plan is right. With slip a plan of $L$ moves comes out as meant only if no move slips, which has the probability
#
# $$(1 - p)^L$$
#
# A right plan with a slip in it may still end at the goal, so for right plans this is a lower bound. (Exercise 15.1 asks for the exact number.) The closed loop sees where it has landed. Its errors do not add up, they are only longer ways.
#
# Take the open floor, where a plan needs no walls. First: does the robot know plans? A fifth of the goals was kept out of all training plans.

# %%
def spoken_plans(network: nn.Module) -> dict[Cell, list[str]]:
    """Goal minus robot -> the plan that the model says; it ends at the first word that is no move."""
    said = generate(network, tokenizer, [plan_prompt(away) for away in AWAY], 2 * SIZE, stop=(".", "\n"))
    plans = {}
    for away, text in zip(AWAY, said, strict=True):
        words = text.split()
        plans[away] = words[: next((n for n, word in enumerate(words) if word not in ACTIONS), len(words))]
    return plans


def arrives(moves: Sequence[str], away: Cell) -> bool:
    """Whether the moves lead there without slip, by a shortest way."""
    steps = [DIRECTIONS[action] for action in moves]
    return (sum(x for x, _ in steps), sum(y for _, y in steps)) == away and len(steps) == abs(away[0]) + abs(away[1])


plans = spoken_plans(robot)
plans_right = {
    name: score(sum(arrives(plans[away], away) for away in part), len(part))
    for name, part in {"told": told, "kept out": kept_out}.items()
}
print(f"right plans: goals of training {plans_right['told']}, goals kept out {plans_right['kept out']}")
print("for example", plan_prompt(kept_out[0]), " ".join(plans[kept_out[0]]))
lesson.claim("the model says right plans for goals that no plan of training had",
             plans_right["kept out"].accuracy, at_least=0.75, form=".0%")  # fmt: skip

# %% [markdown]
# Now let it act. `play` is one episode in the environment, with at most 20 moves. The *same* model answers the *same* prompt in all cases. All that differs is after how many moves it may look again. Two more rows keep the comparison fair. The open loop stops after $L$ moves, while the closed loop may use 20; so a third robot says its plan *again and again with closed eyes* until 20 moves are over. A fourth looks, but only when its plan is through.
#
# And a fifth never looks, and is no fool: its plan *reckons with slip*. It keeps a probability for each cell where it could be by now, and each time takes the move after which the expected square root of the distance is least. (The root makes it finish one goal rather than come close to all.) Its success is exact, and it needs no model.


# %%
MOST_MOVES = 20


def play(
    env: ShimaGrid, layout: Layout, planned: Callable[[Cell], Sequence[str]], look_after: int, seed: int
) -> tuple[bool, int, int]:
    """One episode: whether it reaches the goal, how often the robot looked, and its moves.

    `planned` gets goal minus robot. The robot looks again after `look_after` moves, or when its plan is through;
    never, if `look_after` is 0.
    """
    env.reset(seed=seed, options={"layout": layout})
    looks, moves, waiting, done = 0, 0, [], False
    while moves < MOST_MOVES and not done:
        if not waiting:
            if looks and not look_after:
                break
            away = env.at.goal[0] - env.at.robot[0], env.at.goal[1] - env.at.robot[1]
            waiting, looks = list(planned(away)), looks + 1
            waiting = waiting[: look_after or None]
        if not waiting:
            break  # the model said no move
        _, _, done, _, _ = env.step(ACTIONS.index(waiting.pop(0)))
        moves += 1
    return done, looks, moves


# %%
def careful_blind_plan(episodes: Sequence[Layout], slip: float) -> float:
    """Exact share of goals reached by plans that reckon with slip, without one look."""
    chances = np.zeros((4, len(CELLS), len(CELLS)))  # (moves, from, to)
    for (number, action), (row, cell) in product(enumerate(ACTIONS), enumerate(CELLS)):
        for chance, end in outcomes(cell, action, OPEN, slip):
            chances[number, row, CELLS.index(end)] += chance
    reached = 0.0
    for layout in episodes:
        place, goal = np.eye(len(CELLS))[CELLS.index(layout.robot)], CELLS.index(layout.goal)  # (cells,)
        moves = breadth_first(layout.goal, OPEN)
        roots = np.sqrt([moves[cell] for cell in CELLS])
        for _ in range(MOST_MOVES):
            options = place @ chances  # (moves, cells): where the robot may be after each move
            place = options[(options @ roots).argmin()]
            reached += place[goal]
            place[goal] = 0.0  # what has arrived stays
    return reached / len(episodes)


ways = {  # name -> (plan, look after how many moves)
    "a look after every move": (plans.get, 1),
    "a look after every plan": (plans.get, MOST_MOVES),
    "plan repeated blindly": (lambda away: MOST_MOVES * plans[away], 0),
    "plan once": (plans.get, 0),
}
SLIPS = (0.0, 0.05, 0.1, 0.2, 0.3)
episodes = new_layouts(lesson.scaled(300), stream=5, number_blocked=0)
played = {}  # way -> (slips, episodes, 3): goal reached, questions to the model, moves
for name, way in ways.items():
    games = [[play(ShimaGrid(slip), e, *way, seed=n) for n, e in enumerate(episodes)] for slip in SLIPS]
    played[name] = np.array(games, dtype=float)
reached = {name: [score(game[:, 0].sum(), len(game)) for game in games] for name, games in played.items()}
lengths = np.array([breadth_first(e.goal, OPEN)[e.robot] for e in episodes])
theory = [float(np.mean((1 - slip) ** lengths)) for slip in SLIPS]
careful = [careful_blind_plan(episodes, slip) for slip in SLIPS]

# %%
series = {name: plots.scored_line(SLIPS, scores) for name, scores in reached.items()}
figure = plots.curve(
    series | {"blind plan that reckons with slip": (SLIPS, careful), "(1 - p)^L": (SLIPS, theory)},
    title="A plan decays with slip, a robot that looks does not",
    xlabel="probability that a move slips", ylabel="episodes that reach the goal", percent=True,
)  # fmt: skip
plots.show(figure, alt="Episodes that reach the goal over slip: with a look after every move nearly all at any slip; "
                       "with one plan the share falls steeply, close to the theory's line; repeated blindly it falls "
                       "too; a blind plan that reckons with slip falls least.")  # fmt: skip
show_table({name: [f"{s.accuracy:.0%}" for s in scores] for name, scores in reached.items()}
           | {"blind plan that reckons with slip": [f"{share:.0%}" for share in careful],
              "theory (1 - p)^L": [f"{share:.0%}" for share in theory]},
           [f"slip {slip:g}" for slip in SLIPS])  # fmt: skip
print(f"mean length of the plans: {lengths.mean():.1f} moves")
gap = {way: [a.accuracy - b.accuracy for a, b in zip(reached["a look after every move"], reached[way], strict=True)]
       for way in ways}  # fmt: skip
at = SLIPS.index(0.2)
for name, games in played.items():
    print(f"slip 0.2, {name}: {games[at, :, 1].mean():.1f} questions and {games[at, :, 2].mean():.1f} moves an episode")
lesson.claim("on a slippery floor looking after every move reaches more goals than one plan",
             gap["plan once"][at], at_least=0.3, control=gap["plan once"][0], form=".0%")  # fmt: skip
looking = reached["a look after every move"]
lesson.report("looking after every move, minus the blind plan that reckons with slip, at slip 0.2 and 0.3 (points)",
              ", ".join(f"{100 * (looking[n].accuracy - careful[n]):.0f}" for n in (at, at + 1)))  # fmt: skip
questions = [played[f"a look after every {what}"][at, :, 1].mean() for what in ("plan", "move")]
lesson.report("slip 0.2: questions with a look after every plan, as a share of those after every move",
              questions[0] / questions[1], form=".0%")  # fmt: skip

# %% [markdown]
# **With walls** a new fault appears. Section 3 counted best moves in single states. What is that worth over a whole way? For a policy that depends on the state only, the probability $r_m(s)$ to reach the goal within $m$ moves is exact: it is 1 at the goal, and elsewhere $r_m(s) = \sum_{s'} P(s' \mid s, \pi(s))\, r_{m-1}(s')$, with $r_0 = 0$.


# %%
def within(driver: Callable[[Layout], str], layout: Layout, slip: float, moves: int) -> dict[Cell, float]:
    """Exact probability, from each free cell, to reach the goal within so many moves."""
    ends = {state.robot: outcomes(state.robot, driver(state), layout.blocked, slip) for state in states(layout)}
    reach = dict.fromkeys(ends, 0.0) | {layout.goal: 1.0}
    for _ in range(moves):
        after_one = {cell: sum(chance * reach[end] for chance, end in options) for cell, options in ends.items()}
        reach = after_one | {layout.goal: 1.0}
    return reach


tested_layouts = new_layouts(lesson.scaled(30), stream=3)  # those of section 3
arrived = {}
drivers = {"rule of thumb": rule_of_thumb, "language model": lambda state: by_model[describe(*state)]}
for name, driver in drivers.items():
    for slip in SLIPS:
        shares = [within(driver, layout, slip, MOST_MOVES) for layout in tested_layouts]
        both = zip(shares, tested_layouts, strict=True)
        arrived.setdefault(name, []).append(np.mean([share[s.robot] for share, floor in both for s in states(floor)]))
show_table({name: [f"{share:.0%}" for share in line] for name, line in arrived.items()},
           [f"slip {slip:g}" for slip in SLIPS])  # fmt: skip
print(f"best moves of the language model in single states: {right(by_model, tested).accuracy:.0%}")
lesson.report("with walls, goals reached on a dry floor and at slip 0.2",
              f"{arrived['language model'][0]:.0%}, {arrived['language model'][SLIPS.index(0.2)]:.0%}")  # fmt: skip

# %% [markdown]
# **What you see.** The line of one plan follows $(1 - p)^L$ (it begins a little below, since a few of the model's plans are wrong). With a look after every move slip hardly matters. What lies between is not all feedback. The plans here were made for a dry floor, and fail on a wet one though nearly all are right. Repeating them blindly brings a good part of the goals back. A blind plan that reckons with slip brings back most of the rest. What only a look can give is at most the distance from there to the top, since a cleverer blind plan may do better still; it is largest where the floor is most slippery. But note what the careful plan needed: it had to know the slip. A robot that looks does not.
#
# How often must one look? On the open floor a look after each *whole plan* reaches about as many goals, with a fraction of the questions, and hardly more moves. (A robot that looks after every move needs only the first word of each answer, the other the whole plan and a stop. So about as much has to be written, and what is saved is prompts that must be read.) Here a slip can be made good at any later time, so nothing is lost by noticing it late. Where a late correction is dear, near an edge or in traffic, it is not so; measure it for your own task.
#
# With walls the last table adds a warning. A share of best moves in single states is not a share of goals reached. One state with a wrong answer lies on many ways, and a robot that always answers alike may turn back into it again and again. Compare the model's goals on the dry floor and on the most slippery one: chance may even help it out.

# %% [markdown] tags=["further"]
# ## 5 · What is wanted, and what can be done
#
# *Further: no core section needs this one.*
#
# **Question.** The user is thirsty. The usual thing is tea, but there is no tea in this room, or it stands too far away. How does a language model learn what the robot can do?
#
# It does not have to. SayCan (Ahn et al. 2022) multiplies two numbers for each skill $k$: how probable the model finds it as an answer to the instruction, and how probable it is to succeed in this state,
#
# $$k^* = \arg\max_k \; p(k \mid i) \cdot p(\text{success} \mid k, s)$$
#
# The first factor knows the user and not the room; the second, the *affordance*, knows the room and not the user. Here a skill is *fetch the tea*, *fetch the drum* and so on. The model scores each of them as a text.

# %%
THINGS = [thing for pair in NEEDS.values() for thing in pair]
asked = [(wish, thing) for wish in NEEDS for thing in THINGS]
log_probs = sequence_log_probs(
    robot, tokenizer, [f"{wish} Fetch what?" for wish, _ in asked], [f" {thing}.\n" for _, thing in asked]
)
said = log_probs.exp().view(len(NEEDS), len(THINGS)).numpy()  # (wishes, things): p(k | i)
wanted = dict(zip(NEEDS, said, strict=True))
show_table({wish: [f"{value:.2f}" for value in row] for wish, row in wanted.items()}, THINGS)

# %% [markdown]
# **The room.** Each thing is there with probability one half, somewhere on an open but slippery floor. The battery lasts for eight moves. The robot drives as in section 3, one look a move. How likely a fetch succeeds, it learns from its own experience: it tries *random* skills in random rooms and counts. All that it counts by is what it sees: is the thing there, and how many cells away?

# %%
BATTERY, SLIP = 8, 0.2
open_states = [Layout(a, b, OPEN) for a in CELLS for b in CELLS if a != b]
drives = answers_of(robot, [describe(*state) for state in open_states])
del robot  # it has done its work
Room = tuple[Cell, dict[str, Cell]]  # where the robot is, and the things that are there


def random_room(generator: np.random.Generator) -> Room:
    cells = [CELLS[index] for index in generator.permutation(len(CELLS))]
    there = [thing for thing in THINGS if generator.random() < 0.5]
    return cells[0], dict(zip(there, cells[1:], strict=False))


def distance(room: Room, thing: str) -> int | None:
    """Cells between robot and thing, or None if it is not there."""
    place = room[1].get(thing)
    return None if place is None else abs(place[0] - room[0][0]) + abs(place[1] - room[0][1])


def fetch(room: Room, thing: str, seed: int) -> bool:
    """Drive to the thing; whether the robot arrives before its battery is empty."""
    if thing not in room[1]:
        return False
    env = ShimaGrid(SLIP)
    env.reset(seed=seed, options={"layout": Layout(room[0], room[1][thing], OPEN)})
    return any(env.step(ACTIONS.index(drives[describe(*env.at)]))[2] for _ in range(BATTERY))


rooms = [random_room(np.random.default_rng([seed, 6, number])) for number in range(lesson.scaled(2000))]
tries, successes = Counter(), Counter()
for number, room in enumerate(rooms):
    thing = THINGS[np.random.default_rng([seed, 7, number]).integers(len(THINGS))]
    tries[distance(room, thing)] += 1
    successes[distance(room, thing)] += fetch(room, thing, number)

# %% [markdown]
# The counts become probabilities by Laplace's rule, one success and one failure added. Section 4's `within` gives the exact answer to hold them against.


# %%
def affordance(room: Room, thing: str) -> float:
    """p(success) from the counts."""
    key = distance(room, thing)
    return (successes[key] + 1) / (tries[key] + 2)


floors = [Layout(goal, goal, OPEN) for goal in CELLS]
exact = {floor.goal: within(lambda state: drives[describe(*state)], floor, SLIP, BATTERY) for floor in floors}


def exact_success(room: Room, thing: str) -> float:
    return exact[room[1][thing]][room[0]] if thing in room[1] else 0.0


fresh = [random_room(np.random.default_rng([seed, 8, number])) for number in range(lesson.scaled(500))]
off = np.mean([abs(affordance(room, thing) - exact_success(room, thing)) for room in fresh for thing in THINGS])
lesson.report("counted success against exact probability, mean difference over new rooms", off)
far = sorted(key for key in tries if key is not None)
show_table({"counted": [f"{(successes[k] + 1) / (tries[k] + 2):.2f}" for k in [*far, None]],
            "tries": [tries[k] for k in [*far, None]]}, [*map(str, far), "not there"])  # fmt: skip

# %% [markdown]
# Now choose, and fetch. An episode counts if the robot brings one of the two things that would do. Beside the product stand its two factors alone; a *filter*, which takes the most probable wish among the things that are there, and needs no counting; the product with exact probabilities; and a *control*, the product with the affordances of another room. Look at the rooms that differ from the usual: those without the usual thing.

# %%
pickers = {
    "what is wanted alone": lambda w, room, other, k: w[k],
    "what can be done alone": lambda w, room, other, k: affordance(room, THINGS[k]),
    "filter: wanted, and there": lambda w, room, other, k: w[k] * (THINGS[k] in room[1]),
    "product": lambda w, room, other, k: w[k] * affordance(room, THINGS[k]),
    "product, exact": lambda w, room, other, k: w[k] * exact_success(room, THINGS[k]),
    "control: another room": lambda w, room, other, k: w[k] * affordance(other, THINGS[k]),
}
served = {name: {"usual thing there": [], "not there": []} for name in pickers}
for number, room in enumerate(fresh):
    wish = list(NEEDS)[number % len(NEEDS)]
    kind = "usual thing there" if NEEDS[wish][0] in room[1] else "not there"
    for name, worth in pickers.items():
        values = [worth(wanted[wish], room, fresh[number - 1], k) for k in range(len(THINGS))]
        thing = THINGS[int(np.argmax(values))]
        served[name][kind].append(thing in NEEDS[wish] and fetch(room, thing, number))
pairs_of = [NEEDS[list(NEEDS)[number % len(NEEDS)]] for number in range(len(fresh))]
second = [other in room[1] for (usual, other), room in zip(pairs_of, fresh, strict=True) if usual not in room[1]]
print(f"of the rooms without the usual thing, {np.mean(second):.0%} have the other one")
shares = {name: {kind: score(sum(done), len(done)) for kind, done in parts.items()} for name, parts in served.items()}
figure = plots.bars_with_intervals(shares, title="Knowing what is there serves users in unusual rooms",
                                   xlabel="users who got what would do")  # fmt: skip
plots.show(figure, alt="For each way of choosing, the share of users served in rooms with and without the usual thing: "
                       "what is wanted alone serves nobody without it, filter and product serve many.")  # fmt: skip
for name, parts in shares.items():
    print(f"{name:<27}", "; ".join(f"{kind} {share}" for kind, share in parts.items()))
without = {name: parts["not there"].accuracy for name, parts in shares.items()}
lesson.claim("without the usual thing, what this room holds serves more users than what another room holds",
             without["product"] - without["control: another room"], at_least=0.1, form=".0%")  # fmt: skip
picked = [[int(np.argmax([pickers[name](wanted[list(NEEDS)[number % 5]], room, None, k) for k in range(len(THINGS))]))
           for name in ("product", "filter: wanted, and there")] for number, room in enumerate(fresh)]  # fmt: skip
print(f"product and filter choose different things in {np.mean([a != b for a, b in picked]):.0%} of the rooms")
total = {name: np.mean([done for part in parts.values() for done in part]) for name, parts in served.items()}
lesson.report("all rooms: product minus filter (points)", 100 * (total["product"] - total["filter: wanted, and there"]))

# %% [markdown]
# **What you see.** What is wanted alone asks for tea that is not there, and serves nobody in such a room. What can be done alone fetches whatever is near. The product serves most of those who can be served at all, and the control shows that the affordances must be those of this room.
#
# Two things should keep you modest. The rooms were built such that the usual thing is often missing: where the usual thing is there, the product gains next to nothing on what is wanted alone. And the plain filter, *is it there?*, does as well here. The counted probabilities choose differently in only a few rooms. They are needed where skills fail for reasons that nobody can see or list, and it is worth checking first whether that is your case.

# %% [markdown] tags=["core"]
# ## 6 · A perfect copy that fails
#
# **Question.** A model copies its expert without a single mistake. Will it do as well as the expert?
#
# Imitation is trained on the states that the *expert* visits, and used in the states that the *copy* visits. Where these differ, the copy can only hope that its answers carry over. Make the difference large, in a way that is easy to overlook: the robot starts at its depot, the corner (0, 0) of an open floor. It is sent to sixteen goals north-east of it. The demonstrations were made on a dry floor. Then the floor gets wet.
#
# Everything else is easy: there is nothing to see but where the goal is, and nearly every goal that is tested was also demonstrated. Since there are only sixteen goals, success is computed exactly with section 4's `within`, for at most 24 moves.

# %%
DEPOT, WET, TIME = (0, 0), 0.2, 24
GOALS = [(x, y) for x in range(2, SIZE) for y in range(2, SIZE)]
depot_states = {goal: states(Layout(DEPOT, goal, OPEN)) for goal in GOALS}


def tell(state: Layout) -> str:
    """The state in words: the floor is open, so only the goal is told."""
    return f"The goal is {relative(state.robot, state.goal)}. Which way?"


def expert(state: Layout) -> str:
    return best_moves(state, breadth_first(state.goal, state.blocked))[0]


def walk(driver: Callable[[Layout], str], slip: float, generator: random.Random) -> Iterator[Layout]:
    """The states that a driver visits from the depot, until the goal is reached or time is up."""
    state = Layout(DEPOT, generator.choice(GOALS), OPEN)
    for _ in range(TIME):
        yield state
        chances, cells = zip(*outcomes(state.robot, driver(state), OPEN, slip), strict=True)
        state = state._replace(robot=generator.choices(cells, chances)[0])
        if state.robot == state.goal:
            return


def collect(driver: Callable[[Layout], str], slip: float, number: int, stream: str) -> list[tuple[str, str]]:
    """The first states that a driver visits, each with the expert's move."""
    generator, rows = random.Random(f"{stream}/{seed}"), []
    while len(rows) < number:
        rows += [(tell(state), expert(state)) for state in walk(driver, slip, generator)]
    return rows[:number]


depot_texts = sorted({tell(state) for goal in GOALS for state in depot_states[goal]})
print(f"{len(depot_texts)} texts around the depot, for example {collect(expert, 0.0, 9, 'example')[-2:]}")

# %%
at_rest = torch.float32 if machine.name == "cpu" else torch.float16  # of a model that waits: a GPU has to hold several


def fitted(network: nn.Module, rows: Sequence[tuple[str, str]], steps: int, shuffle: int = seed) -> nn.Module:
    """The network, trained further on (text, move) for so many steps, in an order drawn with the seed `shuffle`."""
    generator, order, batches, batch_size = random.Random(f"{len(rows)}/{shuffle}"), [], [], 12
    for _ in range(steps):
        if len(order) < batch_size:
            order = generator.sample(range(len(rows)), len(rows))
        chosen = [rows[order.pop()] for _ in range(min(batch_size, len(rows)))]
        encoded = [encode(text, f" {action}") for text, action in chosen]
        batches.append(collate(encoded, tokenizer.pad_token_id))
    config = TrainConfig(max_steps=steps, learning_rate=settings["rate"] / 2, warmup_steps=min(5, steps),
                         schedule="linear", weight_decay=0.0, precision=settings["precision"], progress=False,
                         seed=seed)  # fmt: skip
    train(network.float(), batches, config, loss_fn=imitation_loss)
    return network.eval()


def success(choices: Mapping[str, str], slip: float) -> float:
    """Exact share of episodes from the depot that reach their goal in time, mean over all goals."""
    floors = [Layout(DEPOT, goal, OPEN) for goal in GOALS]
    return float(np.mean([within(lambda s: choices[tell(s)], floor, slip, TIME)[DEPOT] for floor in floors]))


shown = collect(expert, 0.0, lesson.scaled(200), "demonstrations")
first_of_each = [Layout(DEPOT, goal, OPEN) for goal in GOALS]
print(f"{len({tell(e) for e in first_of_each} & {text for text, _ in shown})} of {len(GOALS)} first texts were shown")
clone = fitted(copy.deepcopy(model), shown, lesson.scaled(40)).to(at_rest)
clone_choices = answers_of(clone, depot_texts)
expert_choices = {tell(state): expert(state) for goal in GOALS for state in depot_states[goal]}
both = {"expert": expert_choices, "clone": clone_choices}
reaches = {name: [success(choices, slip) for slip in (0.0, WET)] for name, choices in both.items()}
show_table({name: [f"{share:.0%}" for share in shares] for name, shares in reaches.items()}, ["dry", "wet"])
lost = {name: dry - wet for name, (dry, wet) in reaches.items()}
lesson.claim("on a wet floor the copy loses goals that it reached on a dry one", lost["clone"], at_least=0.1,
             control=lost["expert"], form=".0%")  # fmt: skip

# %% [markdown]
# Where does it fail? Let it drive on the wet floor, and split the states that it visits: texts that stand in the demonstrations, and texts that do not.

# %%
generator = random.Random(f"visits/{seed}")
visited = [s for _ in range(lesson.scaled(300)) for s in walk(lambda s: clone_choices[tell(s)], WET, generator)]
familiar = {text for text, _ in shown}
parts = {"in the demonstrations": [], "never demonstrated": []}
for state in visited:
    text = tell(state)
    is_right = clone_choices[text] in best_moves(state, breadth_first(state.goal, OPEN))
    parts["in the demonstrations" if text in familiar else "never demonstrated"].append(is_right)
for name, hits in parts.items():
    share = len(hits) / len(visited)
    print(f"{name}: {share:.0%} of the visited states; best moves {score(sum(hits), max(1, len(hits)))}")
worst = Counter(tell(state) for state in visited if tell(state) not in familiar).most_common(2)
for text, count in worst:
    print(f"{count} times: {text} -> {clone_choices[text]}")

# %% [markdown]
# **Four ways to spend labels.** Start each time from the same clone, add 150 labelled states in each of two rounds, and train a few more steps on everything so far. Labels and steps are equal; all that differs is *which* states are labelled. Each way runs three times, with other labels and another order of them, and the table has the means. Beside the learner stands what a *table* would do with the same labels: it answers what it was told, and `east` where it was told nothing. It shows what is in the labels; the rest is training.
#
# - *more demonstrations*, as before;
# - *demonstrations on a wet floor*: the expert drives, the floor slips (in the spirit of DART, Laskey et al. 2017);
# - *DAgger* (Ross et al. 2011): the *learner* drives on the wet floor, the expert only says what it would have done;
# - *any states*: robot and goal drawn at random, no driving at all.
#
# And one way that needs no expert, *own successes*: the learner drives, sampling its moves, and what it did in episodes that reached the goal is trained on. This filtered imitation is the simplest form of self-improvement.


# %%
def own_successes(chances: Mapping[str, np.ndarray], number: int, stream: str) -> list[tuple[str, str]]:
    """What the learner itself did, sampled, in episodes that reached the goal."""
    generator, rows, trail = random.Random(f"{stream}/{seed}"), [], []

    def driver(state: Layout) -> str:
        action = generator.choices(ACTIONS, chances[tell(state)])[0]
        trail.append((tell(state), action))
        return action

    for _ in range(5 * number):  # a learner that never succeeds has nothing to keep
        trail = []
        if len(rows) < number and len(list(walk(driver, WET, generator))) < TIME:
            rows += trail
    return rows[:number]


def policy(network: nn.Module) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The learner's probabilities in all states around the depot, and its choices."""
    chances = dict(zip(depot_texts, ask(network, depot_texts), strict=True))
    return chances, {text: ACTIONS[row.argmax()] for text, row in chances.items()}


def any_states(number: int, stream: str) -> list[tuple[str, str]]:
    """States drawn at random, each with the expert's move."""
    generator = random.Random(f"{stream}/{seed}")
    drawn = [generator.choice(depot_states[generator.choice(GOALS)]) for _ in range(number)]
    return [(tell(state), expert(state)) for state in drawn]


def more_labels(way: str, chances: Mapping[str, np.ndarray], number: int, stream: str) -> list[tuple[str, str]]:
    """So many rows (text, move), collected in one of five ways; `chances` are the learner's, text -> (4,)."""
    if way == "own successes":
        return own_successes(chances, number, stream)
    if way == "any states":
        return any_states(number, stream)
    if way == "DAgger":
        return collect(lambda state: ACTIONS[chances[tell(state)].argmax()], WET, number, stream)
    return collect(expert, WET if "wet" in way else 0.0, number, stream)


# %%
WAYS = ("DAgger", "any states", "demonstrations on a wet floor", "own successes", "more demonstrations")
ROUNDS, LABELS, STEPS = 2, lesson.scaled(150), lesson.scaled(12)
wet, more, first = {way: [] for way in WAYS}, {way: [] for way in WAYS}, policy(clone)
for again, way in product(range(lesson.scaled(3, 1)), WAYS):  # other labels and another order of them each time
    learner, rows, (chances, choices) = copy.deepcopy(clone), list(shown), first
    wet[way].append([success(choices, WET)])
    for number in range(ROUNDS):
        rows += more_labels(way, chances, LABELS, f"round {number}, {again}")
        chances, choices = policy(fitted(learner, rows, STEPS, seed + 100 * again))
        wet[way][-1].append(success(choices, WET))
    off_path = np.mean([text not in familiar for text, _ in rows[len(shown) :]])
    table = success(dict.fromkeys(depot_texts, "east") | most_often(rows), WET)
    more[way].append((success(choices, 0.0), off_path, table))
labels = [len(shown) + LABELS * number for number in range(ROUNDS + 1)]
del learner
mean_of = {way: [*np.mean(wet[way], 0), *np.mean(more[way], 0)] for way in WAYS}
show_table({way: [f"{share:.0%}" for share in shares] for way, shares in mean_of.items()},
           [f"{n} labels" for n in labels] + ["dry, at the end", "new texts", "a table"])  # fmt: skip
blind = {action: success(dict.fromkeys(depot_texts, action) | most_often(shown), WET) for action in ACTIONS}
print("the demonstrations, and elsewhere always:", *(f"{action} {share:.0%};" for action, share in blind.items()))
bands = {way: (labels, np.mean(runs, 0), np.min(runs, 0), np.max(runs, 0)) for way, runs in wet.items()}
figure = plots.curve(bands,
                     title="What is labelled counts more than how much",
                     xlabel="labelled states (for own successes: kept ones)",
                     ylabel="goals reached on the wet floor", percent=True, limits_y=(0.6, 1.01),
                     references={"expert": success(expert_choices, WET)})  # fmt: skip
plots.show(figure, alt="Goals reached on the wet floor over labelled states: more demonstrations and own successes "
                       "stay where the clone was; DAgger, any states and wet demonstrations rise. The bands "
                       "reach from the worst to the best of three runs.")  # fmt: skip
end = {way: mean_of[way][ROUNDS] for way in WAYS}
other_states = np.mean([end[way] for way in WAYS[:3]])
lesson.report("goals that labels from wet floors and random states bring more than as many from a dry floor",
              other_states - end["more demonstrations"], ".0%")  # fmt: skip
for way in ("DAgger", "own successes"):
    lesson.report(f"on the wet floor {way} gained (points)", 100 * (end[way] - mean_of[way][0]))

# %% [markdown]
# **What you see.** The clone is perfect on the dry floor and hardly errs in states that were demonstrated. On the wet one it gets off the path. No demonstration ever went west or south, so past the goal it goes on east, into the wall, until time is up. In this run more demonstrations of the same kind do not repair it. Its own successes do not either: the episodes in which it got stuck are the ones that are thrown away. (With one of the ledger's five seeds they gain six points, with the others none.)
#
# Section 3's model was mostly right on texts that it had not met, and this clone is mostly wrong. There the unknown texts needed the same four answers as the known ones. Here training never once said west or south.
#
# What repairs it is labels on *other* states. The column "new texts" says how many of each way's labels were about texts that no demonstration had: the two ways with hardly any stay where the clone was, the three with more rise, with as many labels. Among these three the column does not tell which gains most: DAgger has fewer new texts than states drawn at random, and ends about as high in this run. DAgger needs nobody to know beforehand which states to label: the learner shows them, one kind after another, since it comes to new places only once it is out of the old ones. A wet demonstration brings few, since the expert corrects a slip at once.
#
# Three warnings. Look at the line of fixed answers: `west` or `south` in place of `east` in unknown texts already buys half of DAgger's gain, and nearly all of that of wet demonstrations. Look at the last column: where the table does better than the learner, the labels held more than a few steps of training took from them. And the bands are wide: how far a way gets differs from run to run, and all runs start from one clone. We first claimed ten points for the mean of the three ways. On five training seeds it lies between seven and sixteen points, so it is a report now, and the ledger of claims has its values. (We first expected DAgger alone to do at least as well.) The price of DAgger stands in no table: an expert must be at hand while the learner drives, and the learner drives badly at first.

# %% [markdown] tags=["core"]
# ## 7 · Tool calls that cannot be malformed
#
# **Question.** A program can only run what it can read. How do you make a model write a call that always can be read?
#
# A *tool* is a function that the model may ask for. Here are three tools of a small kitchen on Shima. Their type hints say what an argument may be; `Literal["tea", "milk"]` would be one of these two values. The model never runs anything. It writes text, and your program looks up the tool's name in a list of allowed tools.

# %%
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import get_json_schema

from helpers.world import World
from helpers.world.words import DISHES

world = World()
model.requires_grad_(False)  # it stays as it is: what is trained from here on is a copy
FACTS = ("trade", "animal", "dish", "instrument")
LIMITS = {"count": (1, 60)}  # smallest and largest value of an argument


def order(item: Literal[tuple(DISHES)], count: int) -> str:
    """Order a dish.

    Args:
        item: The dish.
        count: How many portions.
    """
    return f"{count} {item} ordered"


def price(item: Literal[tuple(DISHES)]) -> str:
    """Say what a portion costs.

    Args:
        item: The dish.
    """
    return f"{len(item)} coins"


def look_up(town: str, fact: Literal[FACTS]) -> str:
    """Look up a fact about a town.

    Args:
        town: The town.
        fact: What to look up.
    """
    return f"no entry for {town}"

# %% [markdown]
# **A schema from a function.** Type hints say what each argument may be, the docstring says what it is for. Together they make a *JSON schema*, the form in which tools are described to a model. `transformers` has a function for it; write your own in a few lines, and compare.

# %%
import inspect

TOOLS = {tool.__name__: tool for tool in (order, price, look_up)}  # the list of what is allowed
KINDS = {str: "string", int: "integer"}


def schema_of(tool: Callable) -> dict:
    """The JSON schema of a function with type hints and a docstring with a part `Args:`."""
    summary, _, described = inspect.getdoc(tool).partition("\n\nArgs:\n")
    said = dict(line.strip().split(": ", 1) for line in described.splitlines())
    hints = get_type_hints(tool)
    returned, properties = {"type": KINDS[hints.pop("return")]}, {}
    for name, hint in hints.items():
        choices = list(get_args(hint)) if get_origin(hint) is Literal else []
        kind = {"type": KINDS[type(choices[0]) if choices else hint]}
        properties[name] = kind | ({"enum": choices} if choices else {}) | {"description": said[name]}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    about = {"name": tool.__name__, "description": summary, "parameters": parameters, "return": returned}
    return {"type": "function", "function": about}


different = sum(schema_of(tool) != get_json_schema(tool) for tool in TOOLS.values())
print(json.dumps(schema_of(look_up)["function"]["parameters"], indent=1))
lesson.equal("schemas of the tools that differ from transformers'", different)

# %% [markdown]
# **The simplest thing that could work** is a list of all valid calls: at each step, allow the tokens that go on with one of them. For `price` that list is short. For `look_up` it is not, because a town may be any word: with a capital and one to eleven small letters after it there are

# %%
names = 26 * sum(26**small for small in range(1, 12))
print(f"price: {len(DISHES)} calls; order: {len(DISHES) * LIMITS['count'][1]:,}; look_up: {names * len(FACTS):,}")

# %% [markdown]
# **So describe the calls instead of listing them.** A *language* is a set of texts. Build it from four pieces: one byte out of a set, one language after another, one of several languages, and a language repeated between `low` and `high` times. Two rules keep it tidy: nothing can follow `NEVER`, the empty set, and nothing needs to be said after `END`, the set that holds only the empty text.

# %%
NEVER, END = ("never",), ("end",)


def byte_in(characters: str) -> tuple:
    """One of these characters, all of them ASCII."""
    return ("byte", frozenset(characters.encode()))


def then(first: tuple, second: tuple) -> tuple:
    """A text of the first language, followed by one of the second."""
    if NEVER in (first, second):
        return NEVER
    if END in (first, second):
        return second if first == END else first
    return ("then", first[1], then(first[2], second)) if first[0] == "then" else ("then", first, second)


def either(*parts: tuple) -> tuple:
    """A text of any of the languages."""
    kept = {option for part in parts for option in (part[1] if part[0] == "either" else [part])} - {NEVER}
    return NEVER if not kept else kept.pop() if len(kept) == 1 else ("either", frozenset(kept))


def times(part: tuple, low: int, high: int) -> tuple:
    """Between `low` and `high` texts of a language, one after another."""
    return ("times", part, low, high) if high else END


def exactly(text: str) -> tuple:
    """This text and no other."""
    return reduce(lambda rest, character: then(byte_in(character), rest), reversed(text), END)

# %% [markdown]
# **The automaton.** Which texts may still follow after you have read one byte $b$? That set is the language's *derivative*, and Brzozowski (1964) found that it can be computed piece by piece. Write $\mathcal{L}_1 \mathcal{L}_2$ for one language after another, and $\partial_b \mathcal{L}$ for the derivative:
#
# $$\partial_b (\mathcal{L}_1 \cup \mathcal{L}_2) = \partial_b \mathcal{L}_1 \cup \partial_b \mathcal{L}_2, \qquad \partial_b (\mathcal{L}_1 \mathcal{L}_2) = (\partial_b \mathcal{L}_1) \mathcal{L}_2 \;\cup\; \begin{cases} \partial_b \mathcal{L}_2 & \text{if } \mathcal{L}_1 \text{ holds the empty text} \\ \varnothing & \text{otherwise} \end{cases}$$
#
# For one byte out of a set the derivative is the empty text (`END` in the code) if $b$ is in the set, and no text at all (`NEVER`) otherwise. For a language repeated between `low` and `high` times it is the derivative of one copy, and then one repetition less.
#
# Take the texts `ab` and `ac`. After `a`, what may follow is `b` or `c`; after `ab`, only the empty text, so `ab` is complete; after `ax`, nothing at all, so no valid text begins like this. A derivative is a language again. So languages are the *states* of an automaton, and reading a byte moves from one to the next. A text is valid if the state at its end holds the empty text.

# %%
@cache
def may_end(language: tuple) -> bool:
    """Whether the empty text belongs to the language."""
    kind, *parts = language
    if kind == "either":
        return any(map(may_end, parts[0]))
    if kind == "then":
        return may_end(parts[0]) and may_end(parts[1])
    return kind == "end" or (kind == "times" and (parts[1] == 0 or may_end(parts[0])))


@cache
def after(language: tuple, byte: int) -> tuple:
    """The derivative: what may follow once this byte is read."""
    kind, *parts = language
    if kind == "byte":
        return END if byte in parts[0] else NEVER
    if kind == "either":
        return either(*(after(part, byte) for part in parts[0]))
    if kind == "then":
        rest = then(after(parts[0], byte), parts[1])
        return either(rest, after(parts[1], byte)) if may_end(parts[0]) else rest
    if kind == "times":
        part, low, high = parts
        return then(after(part, byte), times(part, max(low - 1, 0), high - 1))
    return NEVER


def is_valid(language: tuple, text: str) -> bool:
    """Whether the text belongs to the language."""
    return may_end(reduce(after, text.encode(), language))

# %% [markdown]
# **From schema to language.** A call is a JSON object with the tool's name and its arguments. Two choices keep every call short. There is *no free white space*, and numbers and names are *bounded*. JSON itself has no such limits: a text of spaces without end would be the beginning of a valid one.

# %%
CAPITALS, SMALL = (byte_in("".join(map(chr, range(start, start + 26)))) for start in (65, 97))


def value_language(schema: dict, limits: tuple[int, int] | None) -> tuple:
    """The values of one argument as JSON."""
    if "enum" in schema:
        return either(*(exactly(json.dumps(choice)) for choice in schema["enum"]))
    if schema["type"] == "integer":
        return either(*(exactly(str(number)) for number in range(limits[0], limits[1] + 1)))
    return then(exactly('"'), then(CAPITALS, then(times(SMALL, 1, 11), exactly('"'))))


def call_language(schema: dict, limits: dict[str, tuple[int, int]]) -> tuple:
    """All calls of one tool, arguments in the order of its schema."""
    language, said = exactly("}}"), schema["function"]
    for place, (name, kind) in reversed(list(enumerate(said["parameters"]["properties"].items()))):
        key = exactly((", " if place else "") + json.dumps(name) + ": ")
        language = then(key, then(value_language(kind, limits.get(name)), language))
    return then(exactly(f'{{"name": "{said["name"]}", "arguments": {{'), language)


CALLS = either(*(call_language(schema_of(tool), LIMITS) for tool in TOOLS.values()))
for text in ('{"name": "price", "arguments": {"item": "curry"}}', '{"name": "price", "arguments": {"item": "gold"}}'):
    print(is_valid(CALLS, text), text)

# %% [markdown]
# **From bytes to tokens.** The model writes tokens, and a token is several bytes. So a token is allowed in a state if the automaton can read all its bytes without falling into `NEVER`. The end token is allowed where a text may end. Tokens are sorted by their first byte, so that most of them need not be looked at. Each state's answer is kept.

# %%
def token_bytes(tokens) -> dict[int, bytes]:
    """The bytes of each token of a byte-level tokenizer, special tokens left out."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    spelled = {index: text for text, index in tokens.get_vocab().items() if index not in tokens.all_special_ids}
    return {index: bytes(map(byte_of.get, text)) for index, text in spelled.items() if set(text) <= set(byte_of)}


BYTES, STOP = token_bytes(tokenizer), tokenizer.eos_token_id
beginning_with = defaultdict(list)
for token, spelling in BYTES.items():
    beginning_with[spelling[0]].append(token)


@cache
def next_states(language: tuple) -> dict[int, tuple]:
    """Each token that is allowed in this state, with the state that it leads to."""
    possible = [token for byte in beginning_with if after(language, byte) != NEVER for token in beginning_with[byte]]
    reached = {token: reduce(after, BYTES[token], language) for token in possible}
    stop = {STOP: END} if may_end(language) else {}
    return {token: state for token, state in reached.items() if state != NEVER} | stop


first = sorted(tokenizer.decode([token]) for token in next_states(CALLS))
print(f"of {len(BYTES):,} tokens the first of a call is one of {len(first)}: {first}")

# %% [markdown]
# **Writing under a mask.** Before each token is chosen, the logits of all tokens that are not allowed become $-\infty$. That is all. The loop below reads the prompts once, keeps keys and values of what it has read, and then goes token by token, greedily or by sampling. Shorter prompts are padded on the left, so that all end at the same place; `places` counts real tokens only. It also keeps the logarithm of each $a_t$, the share of the probability that the mask allowed at token $t$: the sum of $e^{\text{logit}}$ over the allowed tokens, divided by that over all tokens. Logarithms are added where shares are multiplied. Section 8 uses the result.

# %%
@cache
def allowed(language: tuple, size: int) -> Tensor:
    """Which tokens a state allows, (vocab,)."""
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(next_states(language))] = True
    return mask


@torch.no_grad()
def write(asked: nn.Module, prompts: Sequence[str], language: tuple | None = None, temperature: float = 0.0,
          room: int = 90) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token ids (prompts, tokens) that the model writes, all of them allowed if a language is given.

    With them the log of the share of probability that the mask allowed, multiplied along each text: (prompts,).
    """
    batch = tokenizer(list(prompts), padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    inputs, attention = batch["input_ids"].to(asked.device), batch["attention_mask"].to(asked.device)
    states, cached, written, kept = [language] * len(prompts), None, [], torch.zeros(len(prompts))
    while len(written) < room and not (written and bool(torch.stack(written).eq(STOP).any(0).all())):
        places = (attention.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        output = asked(input_ids=inputs, attention_mask=attention, position_ids=places, past_key_values=cached)
        scores, cached = output.logits[:, -1].float(), output.past_key_values  # (prompts, vocab)
        if language is not None:
            masks = torch.stack([allowed(state, scores.shape[-1]) for state in states]).to(scores.device)
            free, scores = scores, scores.masked_fill(~masks, -math.inf)
            share = scores.logsumexp(-1) - free.logsumexp(-1)  # (prompts,): log of a_t
            kept += share.cpu() * torch.tensor([state != END for state in states])  # not after the end
        chosen = torch.multinomial((scores / temperature).softmax(-1), 1)[:, 0] if temperature else scores.argmax(-1)
        if language is not None:
            states = [next_states(state)[token] for state, token in zip(states, chosen.tolist(), strict=True)]
        written.append(chosen)
        inputs, attention = chosen[:, None], nn.functional.pad(attention, (0, 1), value=1)
    return torch.stack(written, dim=1), kept


def text_of(ids: Tensor) -> str:
    """What was written before the end token; nothing is added or cleaned up."""
    before = ids[: int(ids.eq(STOP).cumsum(0).eq(0).sum())]
    return tokenizer.decode(before, clean_up_tokenization_spaces=False)

# %% [markdown]
# **The library** here is `model.generate`, which takes a function `prefix_allowed_tokens_fn`: from the tokens so far to the tokens that are allowed next. Give it the same automaton. With the same random numbers both must write the same tokens, greedily and sampled. The model has never seen a call, so without the mask it would write something else; under the mask it writes valid calls about nothing.

# %%
PROBES = [f"Request: {text}\nCall:\n" for text in ("three bowls of soup", "who is there", "buy 7 toast", "a town")]


def library_write(temperature: float, room: int = 90) -> Tensor:
    """The same by `generate`: token ids (prompts, tokens)."""
    batch = tokenizer(PROBES, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    width = batch["input_ids"].shape[1]

    def allowed_tokens(row: int, ids: Tensor) -> list[int]:
        return list(next_states(reduce(lambda state, token: next_states(state)[token], ids[width:].tolist(), CALLS)))

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    written = model.generate(**batch.to(model.device), max_new_tokens=room, pad_token_id=STOP, eos_token_id=STOP,
                             prefix_allowed_tokens_fn=allowed_tokens, **({"do_sample": False} | sampling))  # fmt: skip
    return written[:, width:]


for name, temperature in {"greedily": 0.0, "by sampling": 1.0}.items():
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mine = write(model, PROBES, CALLS, temperature)[0].cpu()
        torch.manual_seed(seed)
        theirs = library_write(temperature).cpu()
    same = mine.shape == theirs.shape and mine.equal(theirs)
    print(f"{name}: {text_of(mine[0])}")
    lesson.equal(f"tokens under the mask that differ from generate's, {name}", 0 if same else int(mine.numel()))

# %% [markdown]
# **Teach the model to call.** A valid call is not yet a right one. Make requests in several wordings, with the call that each asks for. Dishes, towns and facts stand in quotation marks in the request, because then they are cut into the same tokens as in the call; copying them is easier for so small a model. A few wordings of each tool are kept for the test: most of their words occur in training, in other sentences.

# %%
WORDINGS = {
    "order": ('buy "{item}", count {count}', 'order "{item}", count {count}', 'I need count {count} of "{item}"',
              'we want "{item}" in town, count {count}', 'count {count} of "{item}"'),
    "price": ('is there "{item}"', 'the price of "{item}"', 'are you out of "{item}"', 'what is the price of "{item}"',
              'is there "{item}" today', 'I need the price of "{item}"'),
    "look_up": ('what is the "{fact}" of "{town}"', 'tell the "{fact}" of "{town}"',
                'find out about "{town}" the "{fact}"'),
}  # fmt: skip
KEPT_BACK = {
    "order": ('we need "{item}" soon, count {count}', 'buy count {count} of "{item}"'),
    "price": ('the price of "{item}" today', 'we need the price of "{item}"', 'tell the price of "{item}"'),
    "look_up": ('I must find out the "{fact}" of "{town}"', 'find the "{fact}" of "{town}"'),
}


def request(generator: random.Random, held_out: bool = False) -> tuple[str, dict]:
    """A prompt and the call that it asks for."""
    tool = generator.choice(("order", "order", "price", "look_up"))
    values = {"item": generator.choice(list(DISHES)), "count": generator.randint(*LIMITS["count"]),
              "town": generator.choice(list(world.values["town"])), "fact": generator.choice(FACTS)}  # fmt: skip
    said = generator.choice((KEPT_BACK if held_out else WORDINGS)[tool]).format(**values)
    arguments = {name: values[name] for name in get_type_hints(TOOLS[tool]) if name != "return"}
    return f"Request: {said}\nCall:\n", {"name": tool, "arguments": arguments}


generator = random.Random(f"requests/{seed}")
print(*request(generator), sep="")

# %% [markdown]
# **A second job,** learned at the same time because both need the same skill, copying from the prompt into the right place. Some questions take two calls: *Which dish has the twin of Kuku?* First look up the twin town, then its dish. The tool is a directory of towns, written anew for each set of questions, so that no answer can be known by heart. To save tokens these calls are short, `dish of Kuku`. `answer_call` takes a line apart; its pattern is the whole list of what is allowed, and nothing else has any effect. A town may have been *renamed*, or the directory may be *busy* once.

# %%
CALL = re.compile(rf"Call: (twin|{'|'.join(FACTS)}) of ([A-Z][a-z]+)")


def directory(stream: int) -> dict[str, dict[str, str]]:
    """Every town with invented facts and a twin."""
    generator, towns = random.Random(f"directory/{stream}"), list(world.values["town"])
    return {
        town: {fact: generator.choice(world.values[fact]) for fact in FACTS}
        | {"twin": generator.choice([other for other in towns if other != town])}
        for town in towns
    }


def answer_call(line: str, book: dict, busy: set[str], renamed: dict[str, str]) -> str:
    """What the directory says to a line `Call: ...`; a town that is `busy` is so once."""
    if not (call := CALL.fullmatch(line)):
        return "this is no call"
    fact, town = call.groups()
    if town in busy:
        busy.remove(town)
        return "busy, call again"
    if town in renamed:
        return f"renamed to {renamed[town]}"
    return book[town][fact] if town in book else f"no town {town}"


def is_error(result: str) -> bool:
    """Whether the directory did not answer."""
    return result.startswith(("busy", "renamed", "no town", "this is no"))


book = directory(200)
one, other = list(book)[:2]
for line in (f"Call: dish of {one}", f"Call: dish of {other}", f"Call: erase {one}"):
    print(line, "->", answer_call(line, book, set(), {other: one}))

# %% [markdown]
# **Demonstrations.** A program that knows the right next step writes *traces*: calls and an answer, which the model is to learn, and results, which the tool gives. It can be sent through trouble, at the first call or at the second: a town has been renamed, or the directory is busy. What it does next depends on what the result says. All questions are about dishes: with four facts to choose from, a model as small as this one followed the towns in our runs and chose the fact at random in some of them.

# %%
ASKED = ("Which dish has the twin of {}?", "What is the dish of the twin of {}?", "Find the dish of the twin of {}.")
ASKED_LATER = ("Say the dish of the twin of {}.", "I must know the dish of the twin of {}.")
TROUBLES = ("renamed first", "renamed second", "busy first", "busy second")


def task(generator: random.Random, book: dict, trouble: str = "", later: bool = False) -> dict:
    """A question of two steps with its right answer, and what will go wrong on the way."""
    town = generator.choice(list(book))
    question = generator.choice(ASKED_LATER if later else ASKED).format(town)
    renamed, busy = {}, set()
    for name in ("first", "second"):
        if trouble == f"renamed {name}":
            renamed[town] = generator.choice([other for other in book if other not in (town, book[town]["twin"])])
        elif trouble == f"busy {name}":
            busy.add(town)
        town = renamed.get(town, town)
        answer = book[town]["dish"]
        town = book[town]["twin"] if name == "first" else town
    return {"question": question, "busy": busy, "renamed": renamed, "answer": answer}


def demonstrate(item: dict, book: dict) -> list[tuple[str, bool]]:
    """A trace in parts, each with whether the model is to write it."""
    parts = [(f"Question: {item['question']}\n", False)]
    fact, town, busy = "twin", item["question"].split()[-1][:-1], set(item["busy"])
    while True:
        result = answer_call(line := f"Call: {fact} of {town}", book, busy, item["renamed"])
        parts += [(line + "\n", True), (f"Result: {result}\n", False)]
        if result.startswith("renamed"):
            town = result.split()[-1]
        elif result.startswith("busy"):
            continue  # the same call again
        elif fact == "twin":
            fact, town = "dish", result
        else:
            return [*parts, (f"Answer: {result}\n", True)]


trouble = task(random.Random(seed), book, "renamed first")
print("".join(text for text, _ in demonstrate(trouble, book)))

# %% [markdown]
# **Training** is that of lesson 05: the loss is taken over what the model is to write, the call and the end token. Its embeddings learn faster than its other weights, since it has hardly ever met braces and quotation marks. A batch holds rows of similar length. Most tokens of a call are braces and names that are always the same. So two in three requests are answered in a short form, the tool's name and the arguments: there the model learns to choose and to copy at a third of the tokens.

# %%
def encode_parts(parts: Sequence[tuple[str, bool]], stop: bool = False) -> dict[str, list[int]]:
    """Token ids and labels of parts of text, each with whether the model is to write it; `stop` adds the end."""
    row = {"input_ids": [], "labels": []}
    for text, learned in parts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        row["input_ids"] += ids
        row["labels"] += ids if learned else [-100] * len(ids)
    return {name: ids + [STOP] * stop for name, ids in row.items()}


def tune(start: nn.Module, rows: Sequence[dict], batch_tokens: int = 560, speed: float = 1.0) -> nn.Module:
    """A copy of a model, trained once over the rows, in batches of about so many tokens."""
    tuned, generator = copy.deepcopy(start).float().requires_grad_(True), random.Random(f"order/{seed}")
    rows = sorted(generator.sample(rows, len(rows)), key=lambda row: len(row["input_ids"]) // 8)
    batches = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * len(row["input_ids"]) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    generator.shuffle(batches)
    rate = speed * settings["tool_rate"]
    embeddings = list(tuned.get_input_embeddings().parameters())
    others = [weight for weight in tuned.parameters() if all(weight is not known for known in embeddings)]
    groups = [{"params": embeddings, "lr": settings["embedding_factor"] * rate}, {"params": others, "lr": rate}]
    config = TrainConfig(max_steps=len(batches), learning_rate=rate, warmup_steps=max(1, len(batches) // 10),
                         schedule="linear", progress=False, precision=settings["precision"], seed=seed)  # fmt: skip
    history = train(tuned, [collate(batch, tokenizer.pad_token_id) for batch in batches], config,
                    optimizer_fn=lambda _: torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0))  # fmt: skip
    print(f"{len(batches)} steps, {sum(history.tokens):,} tokens, {sum(history.seconds):.0f} s, "
          f"loss {np.mean(history.losses[:5]):.2f} -> {np.mean(history.losses[-5:]):.2f}")  # fmt: skip
    return tuned.to(at_rest).eval().requires_grad_(False)

# %%
def traces(tokens: int, troubles: Sequence[str], stream: int) -> list[dict]:
    """Encoded demonstrations from sixty directories, as many as make so many tokens."""
    generator, rows = random.Random(f"traces/{stream}/{seed}"), []
    books = [directory(201 + index) for index in range(60)]
    while sum(len(row["input_ids"]) for row in rows) < tokens:
        book = generator.choice(books)
        rows.append(encode_parts(demonstrate(task(generator, book, generator.choice(troubles)), book)))
    return rows


def short_row(prompt: str, call: dict) -> dict[str, list[int]]:
    """The same request with a short answer, `order "tofu" 41`: a third of the tokens, and all that is hard."""
    answer = " ".join([call["name"], *map(json.dumps, call["arguments"].values())])
    return encode_parts([(prompt.replace("Call:", "Short:"), False), (answer, True)], stop=True)


examples = [request(generator) for _ in range(lesson.scaled(1400, 24))]
whole, short = examples[::3], examples[1::3] + examples[2::3]
rows = [encode_parts([(prompt, False), (json.dumps(call), True)], stop=True) for prompt, call in whole]
rows += [short_row(*example) for example in short]
assistant = tune(model, rows + traces(lesson.scaled(9_000, 800), [""], 0))

# %% [markdown]
# **Measure.** Ask in the wordings that were kept back, greedily and at temperature 1.2, each without and with the mask. A call is *unreadable* if the automaton does not take it, *right* if it is the call that was asked for, and otherwise valid and wrong. The fair rival is a *rule of keywords*: the word `count` means an order, a fact in quotation marks means the directory, and anything else a price.

# %%
def by_keywords(prompt: str) -> str:
    """The call by a rule; what stands in quotation marks is copied."""
    quoted, count = re.findall(r'"(\w+)"', prompt), re.search(r"count (\d+)", prompt)
    if count:
        return json.dumps({"name": "order", "arguments": {"item": quoted[0], "count": int(count[1])}})
    if len(quoted) == 1:
        return json.dumps({"name": "price", "arguments": {"item": quoted[0]}})
    town, fact = sorted(quoted, key=FACTS.__contains__)
    return json.dumps({"name": "look_up", "arguments": {"town": town, "fact": fact}})


generator = random.Random(f"test requests/{seed}")
asked_for = [request(generator, held_out=True) for _ in range(lesson.scaled(64, 8))]
prompts, wanted = [prompt for prompt, _ in asked_for], [json.dumps(call) for _, call in asked_for]
written_calls, kept_along, counted = {}, {}, {}
with torch.random.fork_rng():
    torch.manual_seed(seed)
    for way, temperature in {"greedy": 0.0, "temperature 1.2": 1.2}.items():
        for language in (None, CALLS):
            ids, kept = write(assistant, prompts, language, temperature)
            key = (way, "with mask" if language else "without mask")
            written_calls[key], kept_along[key] = [text_of(row) for row in ids], kept
            hits = sum(text == call for text, call in zip(written_calls[key], wanted, strict=True))
            valid = sum(is_valid(CALLS, text) for text in written_calls[key])
            counted[key] = {"right": hits, "valid and wrong": valid - hits, "unreadable": len(ids) - valid}

rule = sum(by_keywords(prompt) == call for prompt, call in zip(prompts, wanted, strict=True))
show_table({", ".join(key): list(counts.values()) for key, counts in counted.items()}
           | {"rule of keywords": [rule, len(wanted) - rule, 0]},
           ["right", "valid and wrong", "unreadable"])  # fmt: skip
by_tool = {name: [0, 0] for name in TOOLS}  # right under the mask, asked for; greedy
for text, call in zip(written_calls["greedy", "with mask"], wanted, strict=True):
    by_tool[json.loads(call)["name"]][0] += text == call
    by_tool[json.loads(call)["name"]][1] += 1
print("greedy, with mask, right:", *(f"{name} {score(*counts)};" for name, counts in by_tool.items() if counts[1]))
broken = [text for text in written_calls["temperature 1.2", "without mask"] if not is_valid(CALLS, text)]
print("unreadable, for example:", *broken[:2], sep="\n  ")
both = zip(prompts, written_calls["temperature 1.2", "with mask"], wanted, strict=True)
missed = [f"{prompt.splitlines()[0]} -> {text}" for prompt, text, call in both if text != call]
print("valid under the mask and wrong, for example:", *missed[:3], sep="\n  ")

# %%
shares = {key: {what: score(count, len(wanted)) for what, count in counts.items()} for key, counts in counted.items()}
bars = {f"{what}, {way}": {mask: shares[way, mask][what] for mask in ("without mask", "with mask")}
        for way in ("greedy", "temperature 1.2") for what in ("right", "valid and wrong", "unreadable")}  # fmt: skip
figure = plots.bars_with_intervals(bars, title="A mask turns unreadable calls into right and wrong ones",
                                   xlabel="share of calls")  # fmt: skip
plots.show(figure, alt="Right, valid and wrong, and unreadable calls, greedy and at temperature 1.2: with the mask "
                       "none is unreadable, and more are right, and more are valid and wrong.")  # fmt: skip
free, masked = (counted["temperature 1.2", mask] for mask in ("without mask", "with mask"))
lesson.claim("most trained calls are right in wordings that training did not have",
             shares["greedy", "without mask"]["right"].accuracy, at_least=0.5, form=".0%")  # fmt: skip
lesson.claim("at temperature 1.2 calls without a mask break the schema", free["unreadable"] / len(wanted),
             at_least=0.05, control=masked["unreadable"] / len(wanted), form=".0%")  # fmt: skip
in_place = [masked[what] - free[what] for what in ("right", "valid and wrong")]
print(f"temperature 1.2: in place of {free['unreadable']} unreadable calls the mask brought {in_place[0]} more right "
      f"ones and {in_place[1]} more wrong ones")  # fmt: skip
lesson.report("temperature 1.2: more right and more wrong calls in place of unreadable ones",
              f"{in_place[0]} and {in_place[1]} in place of {free['unreadable']}, of {len(wanted)}")  # fmt: skip

# %% [markdown]
# **What you see.** Under the mask every call can be read; that is guaranteed, for any model and any temperature. In place of most unreadable calls stand right ones. But in place of some stands a call that is *valid and wrong*: another argument, or another tool, in perfect form. The printed line counts both for the higher temperature; the two rows are separate samples, so it is a balance and not the fate of single calls. That is the price of the mask. An unreadable call does nothing, and can be asked for again. A wrong one is carried out, and no parser finds it. (Section 8 tries a number that may.)
#
# Look at the rule of keywords, too: for requests as regular as these you need no model. And look at the line by tool. Here one call separates the tools; in other runs more may, and a mean over tools would hide it.

# %% [markdown] tags=["further"]
# ## 8 · A closer look: two libraries, and probabilities
#
# *Further: no core section needs this one.*
#
# **Question.** Does the automaton agree with tools that others use, is sampling under a mask the same as sampling and keeping only what is valid, and does the mask know when it had to force something?
#
# **Python has such languages too,** as regular expressions. Write the language as a pattern, and ask both about calls with random mistakes in them: a character removed, doubled, or replaced.

# %%
def pattern(language: tuple) -> str:
    """The language as a regular expression."""
    kind, *parts = language
    if kind == "byte":
        return "[" + "".join(re.escape(chr(byte)) for byte in sorted(parts[0])) + "]"
    if kind == "either":
        return "(?:" + "|".join(sorted(map(pattern, parts[0]))) + ")"
    if kind == "times":
        return f"(?:{pattern(parts[0])}){{{parts[1]},{parts[2]}}}"
    return "".join(map(pattern, parts))  # "then", and "end", which has no parts


def with_mistakes(text: str, generator: random.Random) -> str:
    """The text with up to two characters removed, doubled or replaced."""
    for _ in range(generator.randint(0, 2)):
        place = generator.randrange(len(text))
        middle = generator.choice(("", 2 * text[place], generator.choice('0127aZ"} ,')))
        text = text[:place] + middle + text[place + 1 :]
    return text


generator = random.Random(f"mistakes/{seed}")
written = ['{"name": "order", "arguments": {"item": "tofu", "count": 60}}',
           '{"name": "look_up", "arguments": {"town": "Kuku", "fact": "dish"}}']  # fmt: skip
texts = [with_mistakes(generator.choice(written), generator) for _ in range(lesson.scaled(1000, 100))]
ours, compiled = [is_valid(CALLS, text) for text in texts], re.compile(pattern(CALLS))
differing = sum(mine != bool(compiled.fullmatch(text)) for mine, text in zip(ours, texts, strict=True))
print(f"{sum(ours)} of {len(texts)} texts are valid")
lesson.equal("texts about which the automaton and Python's regular expressions disagree", differing)

# %% [markdown]
# **The library** `outlines_core` compiles a regular expression into such masks, in Rust; it is one of several that serve models use. Walk through all states that can be reached, of both at once, and compare the sets of allowed tokens. Where it is not installed, one sentence says so.

# %%
import importlib.util


def differing_states(language: tuple) -> tuple[int, int]:
    """How many states outlines_core knows, and in how many the allowed tokens differ from ours."""
    from outlines_core import Index, Vocabulary

    spelled = defaultdict(list)
    for token, spelling in BYTES.items():
        spelled[spelling].append(token)
    index = Index(pattern(language), Vocabulary(STOP, dict(spelled)))
    seen, differing = {(language, index.get_initial_state())}, 0
    waiting = list(seen)
    while waiting:
        state, theirs = waiting.pop()
        differing += set(next_states(state)) != set(index.get_allowed_tokens(theirs) or [])
        both = [
            (reached, index.get_next_state(theirs, token))
            for token, reached in next_states(state).items()
            if token != STOP
        ]
        waiting += (new := set(both) - seen)
        seen |= new
    return len(seen), differing


if importlib.util.find_spec("outlines_core"):
    number, differing = differing_states(CALLS)
    print(f"{number} states compared")
    lesson.equal("states in which the mask differs from outlines_core's", differing)
else:
    print("outlines_core is not installed: this comparison is left out.")

# %% [markdown]
# **Probabilities.** Is sampling under a mask the same as sampling until a text is valid? It sounds so, and it is not. Let $p(y)$ be the probability of a text $y$ under the model, and $\mathcal{V}$ the valid texts. Sampling until a text is valid gives
#
# $$p(y \mid \mathcal{V}) = \frac{p(y)}{p(\mathcal{V})}, \qquad y \in \mathcal{V}.$$
#
# A mask instead renormalises at *every token*: with $a_t$ the share of probability that is allowed at token $t$, it gives $q(y) = \prod_t p(y_t \mid y_{<t}) / a_t = p(y) / \prod_t a_t$. The product differs from text to text. A path that begins with a likely token and then has nowhere good to go keeps the probability of its beginning. Park et al. (2024) call this a distortion of the model's distribution.
#
# **By hand.** Two numbers are allowed, 2 and 15. The model wants 17: its first token is `1` with probability 0.98 and `2` with 0.02. After `1` it says `5` with probability 0.01, and `7`, which is not allowed, with 0.99. After `2` it stops. So $p(15) = 0.98 \cdot 0.01$ and $p(2) = 0.02$: given that the number is valid, 2 is twice as probable as 15. Under the mask the first token is hardly restricted, $a_1 = 1$, and `1` is chosen nearly always; then only `5` is left, $a_2 = 0.01$.

# %%
p = np.array([0.98 * 0.01, 0.02])  # of 15 and of 2
product_of_shares = np.array([1.0 * 0.01, 1.0 * 1.0])
given_valid, under_mask = p / p.sum(), p / product_of_shares
drawn = np.random.default_rng(seed).multinomial(1_000_000, [*p, 1 - p.sum()])[:2]  # the third is never valid
ways_to_draw = {"p given a valid number": given_valid, "until valid, a million draws": drawn / drawn.sum(),
                "under the mask": under_mask}  # fmt: skip
show_table({name: [f"{share:.3f}" for share in shares] for name, shares in ways_to_draw.items()}, ["15", "2"])
gap = np.abs(drawn / drawn.sum() - given_valid).max()
lesson.equal("sampling until valid is p given a valid number", gap, within=0.02)

# %% [markdown]
# **A warning light?** The product of the $a_t$ is small where the mask had to force the model off its way. It costs nothing to compute, since the logits are there anyway; `write` returned its logarithm for every call of section 7. Does it tell the wrong calls from the right ones? Measure by AUROC: the share of pairs of a right and a wrong call in which the right one has the larger number, one half by chance. The fair rival is the probability of the call itself.

# %%
from sklearn.metrics import roc_auc_score

lights = {}
for way in ("greedy", "temperature 1.2"):
    texts = written_calls[way, "with mask"]
    is_right = [text == call for text, call in zip(texts, wanted, strict=True)]
    probable = sequence_log_probs(assistant, tokenizer, prompts, texts)
    signals = {"product of the shares": kept_along[way, "with mask"], "probability of the call": probable}
    for name, values in signals.items():
        told_apart = roc_auc_score(is_right, values.cpu()) if len(set(is_right)) == 2 else math.nan
        lights.setdefault(name, []).append(f"{told_apart:.2f}")
show_table(lights, ["AUROC, greedy", "AUROC, temperature 1.2"])
lesson.report("AUROC of right against wrong calls under the mask, greedy and at 1.2: shares; probability",
              "; ".join(", ".join(values) for values in lights.values()))  # fmt: skip

# %% [markdown]
# **What you see.** The masks are those of outlines_core in every state, and Python's regular expressions agree on all of the thousand texts. Sampling under a mask is another distribution than sampling until valid, and in the small example it favours the other number: the mask does not refuse, it sends something else, in perfect form.
#
# At temperature 1.2 a right call has the larger product in most pairs, so the product of the shares is a warning light. But the plain probability of the call is the better one there, in four of the ledger's five seeds, and in the fifth as good. Greedily the product was once below chance. So take the probability: it comes with the logits, with or without a mask. Log it, choose a threshold on calls of your own, and ask the user before a call below it is carried out. These are a few wrong calls of one small model.

# %% [markdown] tags=["core"]
# ## 9 · Call, result, and when the tool says no
#
# **Question.** What does a model need in order to recover from a tool's error?
#
# ReAct (Yao et al. 2023) lets a model write *thoughts* and *calls* in turn, and puts each *result* into the same text, where the next step can read it. The loop around it is yours: it stops the model at the end of a line, runs the call if it is on the list of what is allowed, and appends the result. This model writes calls only. We gave it thoughts at first; in some runs it wrote the wrong fact into its thought and then followed it, so at this size a thought was one more line to get wrong. `assistant` has learned from traces in which every call succeeds.
#
# Train it a little more in two ways, on equally many tokens. `smooth` sees more traces that go well. `recovering` sees traces of which four in five have a trouble in them.

# %%
more = lesson.scaled(16_000, 800)  # tokens
smooth = tune(assistant, traces(more, [""], 1), speed=0.5)
recovering = tune(assistant, traces(more, ["", *TROUBLES], 1), speed=0.5)

# %% [markdown]
# **The loop.** All questions are worked on at once, one line each per round. Your program writes the first word, `Call:`. A question may use at most five calls. The tool's message can be kept from the model: `Result: error` then stands in its place.

# %%
def solve(asked: nn.Module, items: Sequence[dict], book: dict, messages: bool = True,
          most_calls: int = 5) -> list[dict]:  # fmt: skip
    """Each item's text, number of calls, and the answer that was given, if any."""
    runs = [{"text": f"Question: {item['question']}\nCall:", "calls": 0, "said": None,
             "busy": set(item["busy"]), "renamed": item["renamed"]} for item in items]  # fmt: skip
    for _ in range(most_calls + 1):
        lengths = [len(ids) for ids in tokenizer([run["text"] for run in runs])["input_ids"]]
        open_runs = [run for run, length in zip(runs, lengths, strict=True) if run["said"] is None and length < 400]
        if not open_runs:
            break
        lines = generate(asked, tokenizer, [run["text"] for run in open_runs], 32, stop=("\n",), batch_size=128)
        for run, written in zip(open_runs, lines, strict=True):
            run["text"] += written + "\n"
            line = run["text"].splitlines()[-1]
            if line.startswith("Call:") and run["calls"] < most_calls:
                result = answer_call(line, book, run["busy"], run["renamed"])
                run["text"] += f"Result: {result if messages or not is_error(result) else 'error'}\n"
                run["calls"] += 1
            else:
                run["said"] = line.removeprefix("Answer:").strip()
    return runs


def solved(asked: nn.Module, items: Sequence[dict], **ways) -> Score:
    """How many items get the right answer."""
    runs = solve(asked, items, test_book, **ways)
    return score(sum(run["said"] == item["answer"] for run, item in zip(runs, items, strict=True)), len(items))

# %%
test_book, generator = directory(199), random.Random(f"test tasks/{seed}")
plain_tasks = [task(generator, test_book, later=True) for _ in range(lesson.scaled(24, 4))]
hard_tasks = [task(generator, test_book, TROUBLES[index % 4], later=True) for index in range(lesson.scaled(40, 8))]
prompts = [f"Question: {item['question']}\nAnswer:" for item in plain_tasks]
guesses = generate(smooth, tokenizer, prompts, 8, stop=("\n",), batch_size=128)
hits = sum(guess.strip() == item["answer"] for guess, item in zip(guesses, plain_tasks, strict=True))
answered = {
    "answer at once": score(hits, len(guesses)),
    "with calls": solved(smooth, plain_tasks),
    "with calls, traces with troubles": solved(recovering, plain_tasks),
}  # fmt: skip
recovered = {
    "perfect traces, messages": solved(smooth, hard_tasks),
    "traces with troubles, messages": solved(recovering, hard_tasks),
    "traces with troubles, bare error": solved(recovering, hard_tasks, messages=False),
}
show_table({name: [str(share)] for name, share in (answered | recovered).items()}, ["right"])
busy_share = float(np.mean([bool(item["busy"]) for item in hard_tasks]))
figure = plots.bars_with_intervals(recovered, title="Right answers where something went wrong on the way",
                                   xlabel="questions with a trouble in them that are answered right",
                                   references={"the most without messages": busy_share})  # fmt: skip
plots.show(figure, alt="Right answers after an error: few by the model trained on perfect traces, many by the "
                       "one trained on troubles, and fewer if the tool only says error.")  # fmt: skip
untaught, informed, _ = (share.accuracy for share in recovered.values())
lesson.claim("with a tool the model answers questions of two steps that it cannot know",
             answered["with calls"].accuracy, at_least=0.6, control=answered["answer at once"].accuracy,
             form=".0%")  # fmt: skip
lesson.claim("a model trained on errors recovers from more of them than one trained on perfect traces",
             informed - untaught, at_least=0.2, form=".0%")  # fmt: skip
lesson.report("right with messages after training on troubles, and the most without messages",
              f"{informed:.0%}, {busy_share:.0%}")  # fmt: skip
lesson.report("two-step questions: at once, with calls, with calls after training on troubles",
              ", ".join(f"{share.accuracy:.0%}" for share in answered.values()))  # fmt: skip
print(solve(recovering, hard_tasks[:1], test_book)[0]["text"])

# %% [markdown]
# **What you see.** An answer at once can only be a guess, since every directory is invented. The bars are about questions with a trouble in them. Between the first two only the last traces of the training differ, equal in tokens. The table's first rows show whether training on troubles cost anything where nothing goes wrong.
#
# The dashed line is the most that anyone can reach, luck aside, if the directory only says *error*, whatever the training: a busy directory answers when it is called again, and a new name cannot be guessed. The third bar is the same model after a bare *error*, which it has never met, so it may lie below the line. With the five seeds of the ledger the second bar stands at 98 to 100 %. In earlier versions of this lesson it sometimes stayed low: there the model had followed the message and lost its place in the task. So let your tools say what is wrong, and what would be right. Our first directory said *Guze is now Fegu*, and the model often went on with a wrong name: a message is easier to use if it holds only what is needed next.

# %% [markdown] tags=["further"]
# ## 10 · A shop behind a browser
#
# *Further: no core section needs this one.*
#
# **Question.** Can the same loop work a web page, and does it matter which browser stands between them?
#
# The kitchen has a web site: a menu, a page for each dish with a field for the number and a button, a basket, and a page that says that it is done. It runs in this notebook, on this machine alone. The task is to order a number of one dish. It takes four actions, and on every page the elements stand in another order. Reading a page must change nothing, so links and the basket's form use the method GET of HTTP. Paying changes something, so its form uses POST, and the site enters an order for nothing else.

# %%
import importlib.util
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html import escape
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import parse_qsl, urlencode, urlsplit
from urllib.request import ProxyHandler, Request, build_opener

MENU, LIMIT_OF_SHOP = 4, 9  # dishes on offer, and the largest number that anybody orders

# %%
def kitchen_page(address: str, orders: dict[str, list], method: str = "get") -> str:
    """The page at `/visit/name?fields` as HTML; paying by "post" enters the visit's order into `orders`."""
    path, fields = urlsplit(address).path, dict(parse_qsl(urlsplit(address).query))
    _, visit, kind, *rest = [*path.split("/"), ""]  # a browser also asks for an icon, /favicon.ico
    order_of = random.Random(address)  # the same address has the same page
    hidden = "".join(
        f'<input type="hidden" name="{escape(name)}" value="{escape(value)}">' for name, value in fields.items()
    )
    link = '<a href="/{}/{}">{}</a>'.format
    if kind == "menu":
        offered = random.Random(f"menu/{visit}").sample(list(DISHES), MENU)
        parts = [link(visit, f"dish/{dish}", dish) for dish in offered] + [link(visit, "help", "help")]
    elif kind == "dish" and rest[0] in DISHES:
        parts = [f"<p>{rest[0]}</p>", link(visit, "menu", "back"),
                 f'<form action="/{visit}/basket"><input type="hidden" name="dish" value="{rest[0]}">'
                 '<input name="number" aria-label="number"> <button>add</button></form>']  # fmt: skip
    elif kind == "basket" and fields.get("number"):
        parts = [f"<p>{escape(fields['number'])} {escape(fields.get('dish', ''))}</p>", link(visit, "menu", "back"),
                 f'<form method="post" action="/{visit}/paid">{hidden}<button>pay</button></form>']  # fmt: skip
    elif kind == "paid" and method == "post":
        orders[visit].append((fields.get("number"), fields.get("dish")))
        parts = ["<p>done</p>"]
    else:
        parts = ["<p>help</p>", link(visit, "menu", "back")]
    order_of.shuffle(parts)
    return "<!doctype html><title>Kitchen</title>" + "".join(parts)

# %% [markdown]
# **A text browser** in two steps. `Elements` reads HTML and keeps what a person could see or use: texts, links, fields and buttons. The browser offers two functions, and nothing else: `observe()` says what is on the page, in one line, and `act(action)` carries out one word: a number is typed into the field, any other word is clicked, if the page has such an element. Any other text does nothing.

# %%
class Elements(HTMLParser):
    """The visible elements of a page, in order: dicts with kind, text, and what a click or the form needs."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found, self.form = [], None
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        if tag == "form":
            self.form = {"action": given["action"], "method": given.get("method", "get"), "fields": {}}
        elif tag == "input" and given.get("type") == "hidden":
            self.form["fields"][given["name"]] = given["value"]
        elif tag in ("a", "p", "button", "input"):
            self.found.append({"kind": tag, "text": given.get("aria-label", ""), "value": "", "form": self.form,
                               "name": given.get("name"), "href": given.get("href")})  # fmt: skip

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1]["kind"] != "input":
            self.found[-1]["text"] += data.strip()


ACTION = re.compile(r"(\d+)|([a-z]+)")  # a number is typed, a word is clicked

# %%
class TextBrowser:
    """A browser without pictures or scripts; `fetch` turns an address and a method into HTML."""

    def __init__(self, fetch: Callable[[str, str], str]) -> None:
        self.fetch = fetch

    def open(self, address: str, method: str = "get") -> None:
        self.elements = Elements(self.fetch(address, method)).found

    def observe(self) -> str:
        return " ".join(f"{element['text']} {element['value']}".strip() + ";" for element in self.elements)

    def act(self, action: str) -> None:
        number, word = matched.groups() if (matched := ACTION.fullmatch(action)) else ("", "")
        for element in self.elements:
            if number and element["kind"] == "input":
                element["value"] = number
            elif word and element["text"] == word and element["kind"] in ("a", "button"):
                self.open(element["href"]) if element["href"] else self._submit(element["form"])
                break

    def _submit(self, form: dict) -> None:
        typed = {element["name"]: element["value"] for element in self.elements if element["kind"] == "input"}
        self.open(f"{form['action']}?{urlencode(form['fields'] | typed)}", form["method"])

# %% [markdown]
# **Demonstrations** come from a program that knows the site. Each page is a row of its own: the page, the task, and the right action. Finding the dish on the menu is the hardest part, so three in four visits end after their first page, which mostly is the menu. A third of the dishes is never ordered in them.

# %%
NEW_DISHES = list(DISHES)[::3]
TASK = "order {} {}"


def page_prompt(seen: str, wish: str) -> str:
    """What the model reads before it acts."""
    return f"Page: {seen}\nTask: {wish}\nAction:"


def best_action(seen: str, number: str, dish: str) -> str:
    """The right action on a page."""
    elements = seen.removesuffix(";").split("; ")
    if "add" in elements:
        return "add" if f"number {number}" in elements else number
    return next((word for word in ("pay", dish) if word in elements), "back")

# %%
def demonstrated_pages(visits: int, generator: random.Random) -> list[dict]:
    """Encoded rows of complete orders, a page each."""
    rows, orders = [], defaultdict(list)
    browser = TextBrowser(lambda address, method: kitchen_page(address, orders, method))
    for visit in range(visits):
        offered = random.Random(f"menu/d{seed}-{visit}").sample(list(DISHES), MENU)
        known = [dish for dish in offered if dish not in NEW_DISHES]
        if not known:
            continue
        dish = generator.choice(known)
        number = str(generator.randint(1, LIMIT_OF_SHOP))
        wish = TASK.format(number, dish)
        browser.open(f"/d{seed}-{visit}/{generator.choice(('menu', 'menu', 'menu', 'help'))}")
        while not orders[f"d{seed}-{visit}"]:
            action = best_action(browser.observe(), number, dish)
            rows.append(encode_parts([(page_prompt(browser.observe(), wish), False), (f" {action}\n", True)]))
            browser.act(action)
            if visit % 4:
                break
    return rows


smooth = recovering = None  # a GPU needs the room
clerk = tune(assistant, demonstrated_pages(lesson.scaled(700, 16), random.Random(f"pages/{seed}")))

# %% [markdown]
# **Two browsers behind one interface.** The site goes online, on an address that only this machine can reach. `Chromium` is driven by `playwright`, whose simple interface refuses to run where an event loop runs already, as in a notebook. So all its work is done in a thread of its own. Observations are read from the page by one line of JavaScript. Where there is no Chromium, one sentence says so.

# %%
ORDERS = defaultdict(list)


class Site(BaseHTTPRequestHandler):
    """Answers each request with the kitchen's page."""

    def do_GET(self) -> None:
        self.answer(self.path, "get")

    def do_POST(self) -> None:
        fields = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(f"{self.path}?{fields}", "post")

    def answer(self, address: str, method: str) -> None:
        page = kitchen_page(address, ORDERS, method).encode()
        with suppress(ConnectionError):  # a browser may turn away before it has the page
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

    def log_message(self, *_) -> None:
        """Print nothing."""


server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
threading.Thread(target=server.serve_forever, daemon=True).start()
SITE = f"http://127.0.0.1:{server.server_port}"
direct = build_opener(ProxyHandler({}))  # not through a proxy, whatever this machine has set

# %%
def read_page(address: str, method: str = "get") -> str:
    """The page at this address of the site; by "post" the fields behind `?` go into the request's body."""
    path, _, fields = address.partition("?")
    asked = Request(SITE + path, fields.encode()) if method == "post" else SITE + address
    with direct.open(asked, timeout=10) as answer:
        return answer.read().decode()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SEEN = """() => [...document.querySelectorAll('a, p, button, input:not([type=hidden])')].map(e =>
    ((e.ariaLabel || e.textContent).trim() + ' ' + (e.value || '')).trim() + ';').join(' ')"""

# %%
class ChromiumBrowser:
    """The same interface over a real browser, on this site only; every method works in one thread."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.thread.submit(self._start).result()

    def _start(self) -> None:
        from playwright.sync_api import sync_playwright

        self.driver = sync_playwright().start()
        # containers need --no-sandbox; it is safe only because the one site is our own
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server"]
        self.chromium = self.driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        self.page = self.chromium.new_page(viewport={"width": 360, "height": 200})
        self.page.route(lambda address: not address.startswith(SITE), lambda route: route.abort())

    def open(self, address: str) -> None:
        self.thread.submit(self.page.goto, SITE + address).result()

    def observe(self) -> str:
        return self.thread.submit(self.page.evaluate, SEEN).result()

    def act(self, action: str) -> None:
        if matched := ACTION.fullmatch(action):
            self.thread.submit(self._act, *matched.groups()).result()

    def _act(self, number: str | None, word: str | None) -> None:
        field, named = self.page.locator("input:not([type=hidden])"), self.page.locator("a, button")
        if (target := field if number else named.filter(has_text=re.compile(f"^{word}$"))).count():
            target.first.fill(number) if number else target.first.click()
            self.page.wait_for_load_state()  # a click returns when the next page begins to arrive

    def picture(self) -> bytes:
        """The page as PNG."""
        return self.thread.submit(self.page.screenshot).result()

    def close(self) -> None:
        self.thread.submit(lambda: (self.chromium.close(), self.driver.stop())).result()
        self.thread.shutdown()

# %% [markdown]
# **Measure.** Each wish gets a text browser of its own, and the model one action at a time, at most eight. Half of the wishes are for dishes that no demonstration on this site ordered (though `assistant` has ordered them by calls). An order counts if it is the only one of its visit, with the right number of the right dish. The baseline clicks and types at random.

# %%
def shop(act: Callable[[list[str]], list[str]], browsers: Sequence, wishes: Sequence[tuple]) -> list[list[tuple]]:
    """Let `act` turn prompts into actions, at most eight a wish; the (page, action) steps of each wish."""
    steps = [[] for _ in wishes]
    for browser, (visit, _, _) in zip(browsers, wishes, strict=True):
        ORDERS.pop(visit, None)
        browser.open(f"/{visit}/menu")
    for _ in range(8):
        open_wishes = [row for row, (visit, _, _) in enumerate(wishes) if not ORDERS[visit]]
        seen = [browsers[row].observe() for row in open_wishes]
        prompts = [
            page_prompt(page, TASK.format(*wishes[row][1:])) for page, row in zip(seen, open_wishes, strict=True)
        ]
        for row, page, action in zip(open_wishes, seen, act(prompts) if prompts else [], strict=True):
            steps[row].append((page, action))
            browsers[row].act(action)
    return steps


def act_by_model(prompts: list[str]) -> list[str]:
    """The clerk's next action for each prompt."""
    return [text.strip() for text in generate(clerk, tokenizer, prompts, 12, stop=("\n",), batch_size=128)]


def act_at_random(prompts: list[str]) -> list[str]:
    """Any element of the page is clicked, or a number typed."""
    pages = [prompt.split("\n")[0].removeprefix("Page: ").removesuffix(";").split("; ") for prompt in prompts]
    numbers = [str(chance.randint(1, LIMIT_OF_SHOP)) for _ in pages]
    return [chance.choice([*page, number]) for page, number in zip(pages, numbers, strict=True)]


# %%
def wishes_for(name: str, number: int, new: bool) -> list[tuple[str, str, str]]:
    """(visit, number, dish) with the dish on that visit's menu; new dishes, or those of the demonstrations."""
    found, visit = [], 0
    while len(found) < number:
        offered = random.Random(f"menu/{name}{visit}").sample(list(DISHES), MENU)
        fitting = [dish for dish in offered if (dish in NEW_DISHES) == new]
        if fitting:
            found.append((f"{name}{visit}", str(chance.randint(1, LIMIT_OF_SHOP)), chance.choice(fitting)))
        visit += 1
    return found

# %%
chance, done = random.Random(f"wishes/{seed}"), {}
number = lesson.scaled(32, 4)
for name, act, new in (("known dishes", act_by_model, False), ("other dishes", act_by_model, True),
                       ("at random, known dishes", act_at_random, False)):  # fmt: skip
    wishes = wishes_for(f"{'new' if new else 'known'}-{act.__name__}-", number, new)
    steps = shop(act, [TextBrowser(read_page) for _ in wishes], wishes)
    done[name] = score(sum(ORDERS[visit] == [(count, dish)] for visit, count, dish in wishes), len(wishes))
    print(f"{name}: {done[name]} of the orders done; the first: {[action for _, action in steps[0]]}")
    failed = Counter(dish for visit, count, dish in wishes if ORDERS[visit] != [(count, dish)])
    print("   failed:", ", ".join(f"{dish} {times_failed}" for dish, times_failed in failed.most_common(6)) or "none")
figure = plots.bars_with_intervals(
    done, title="Orders done by the model and by random clicks", xlabel="orders done right"
)
plots.show(
    figure, alt="Orders done by the model for dishes of the demonstrations and for others, and by random clicks."
)
lesson.report(
    "orders done: known dishes, other dishes, random clicks", ", ".join(f"{s.accuracy:.0%}" for s in done.values())
)

# %% [markdown]
# **The real browser.** A few more wishes for known dishes, in Chromium. The text browser then replays the same actions; on every page both must have made the same observation, word for word.

# %%
def with_chromium(wishes: Sequence[tuple]) -> tuple[list[list[tuple]], bytes]:
    """The steps of each wish in Chromium, and a picture of the second page of the first."""
    browser, steps, pictures = ChromiumBrowser(), [], []
    try:
        for wish in wishes:

            def act(prompts: list[str]) -> list[str]:
                pictures.append(browser.picture())
                return act_by_model(prompts)

            steps += shop(act, [browser], [wish])
    finally:
        browser.close()
    return steps, pictures[min(1, len(pictures) - 1)]

# %%
if CHROMIUM and importlib.util.find_spec("playwright"):
    wishes = wishes_for("chromium-", lesson.scaled(3, 2), False)
    all_steps, picture = with_chromium(wishes)
    differing = 0
    replayed = TextBrowser(lambda address, method: kitchen_page(address, defaultdict(list), method))
    for (visit, _, _), steps in zip(wishes, all_steps, strict=True):
        replayed.open(f"/{visit}/menu")
        for page, action in steps:
            differing += page != replayed.observe()
            replayed.act(action)
    finished = sum(ORDERS[visit] == [(count, dish)] for visit, count, dish in wishes)
    print(f"{sum(map(len, all_steps))} pages; {finished} of {len(wishes)} orders done in Chromium")
    lesson.equal("pages that the two browsers observe differently", differing)
    figure, axes = plt.subplots(figsize=(4.5, 2.8))
    axes.imshow(plt.imread(BytesIO(picture)))
    axes.set_title("A page of the shop in Chromium")
    axes.axis("off")
    plots.show(figure, alt="A page of the shop in Chromium, as the first action of the model left it.")
else:
    print("Chromium or playwright is not installed: the text browser is the only one here.")

# %% [markdown]
# **What you see.** Both browsers saw the same on every page that was looked at. The clerk has never heard of HTTP, HTML or Chromium. It reads a line and writes a line; what stands between the two lines can be exchanged. So you can test an agent on text, and change the browser later. The shop is as small as it is because the model is. Look at the dishes that failed. In this run the clerk orders every dish that the demonstrations of this site ordered, and none of the others. There it clicks a dish that it knows, even one that is not on the page: it has learned which words are clicked, and not to copy the word of the task. Over five seeds (in the ledger) it gets 100, 22, 100, 84 and 100 % of the known dishes and 0, 3, 44, 0 and 25 % of the others. So some runs copy in part, one learns little of either, and these numbers are reports. A mask over the elements of the page would forbid the clicks on nothing, and could not make them right. (A first version of this section let a demonstration order one of the other dishes where the menu had nothing else. That was in a handful of visits, and yet most of its score for the other dishes came from the dishes of these visits. A leak need not be large: count what the training has seen.)
#
# **A page can lie.** Whoever writes the page writes into the model's prompt; lesson 12 has attacks and defences. The prompt has no place where only the user can write, so what an action may do has to be limited outside of the model. Here `act` can click and type, and both browsers reach this site and no other. That is not enough: no link of this site orders anything, but a button that says `help` may send the form that pays. What must not happen by one click, the server has to ask about, and the user has to confirm.

# %% [markdown] tags=["further"]
# ## 11 · Tools in another process: the Model Context Protocol
#
# *Further: no core section needs this one.*
#
# **Question.** How do a model's program and a tool talk, if different people wrote them?
#
# With an agreement about messages. The *Model Context Protocol* (MCP) sends JSON-RPC 2.0, one JSON object a line, over a process's standard input and output. (RPC is *remote procedure call*: one program asks another to run a function. Standard input and output are the two streams of text that every process has, as `input` and `print` use them.) A request has an `id`, and its answer carries the same; a message without `id` expects none. Four methods are enough for tools: `initialize` agrees on a version, `notifications/initialized` ends the greeting, `tools/list` gives the schemas, and `tools/call` calls. (Revision 2026-07-28 of the protocol does without the greeting; this server speaks 2025-11-25, and clients negotiate.)
#
# Here is a whole server. It is a small program of its own, with a list of what is allowed. Two kinds of failure are kept apart: a *protocol error* for a tool that does not exist, and a *result* with `isError` for arguments that are wrong. The second is meant for the model, which can read it and try again, as in section 9.

# %%
FAULT = '''"""A tool server: one JSON-RPC message a line, from standard input to standard output."""
import json
import sys

TOOLS = json.loads(open(sys.argv[1], encoding="utf-8").read())
ALLOWED = {"price": lambda item: f"{len(item)} coins", "order": lambda item, count: f"{count} {item} ordered"}


def fault(schema, given):
    """What is wrong with the arguments, or nothing."""
    if set(given) != set(schema["required"]):
        return "expected the arguments " + ", ".join(schema["required"])
    for name, kind in schema["properties"].items():
        if type(given[name]) is not {"string": str, "integer": int}[kind["type"]]:
            return f"{name} must be of type {kind['type']}"
        if given[name] not in kind.get("enum", [given[name]]):
            return f"{name} must be one of {', '.join(kind['enum'])}"
        if "minimum" in kind and not kind["minimum"] <= given[name] <= kind["maximum"]:
            return f"{name} must be from {kind['minimum']} to {kind['maximum']}"
'''

# %%
SERVER = (
    FAULT
    + '''

def answer(method, given):
    """The result of a request, or its error."""
    if method == "initialize":
        about = {"name": "kitchen", "version": "1.0"}
        return {"result": {"protocolVersion": "2025-11-25", "capabilities": {"tools": {}}, "serverInfo": about}}
    if method == "tools/list":
        return {"result": {"tools": TOOLS}}
    if method != "tools/call":
        return {"result": {}} if method == "ping" else {"error": {"code": -32601, "message": f"no method {method}"}}
    tool = next((tool for tool in TOOLS if tool["name"] == given.get("name")), None)
    if tool is None:
        return {"error": {"code": -32602, "message": f"no tool {given.get('name')}"}}
    arguments = given.get("arguments", {})
    wrong = fault(tool["inputSchema"], arguments)
    text = wrong or ALLOWED[tool["name"]](**arguments)
    return {"result": {"content": [{"type": "text", "text": text}], "isError": bool(wrong)}}


for line in sys.stdin:
    try:
        message = json.loads(line)
    except ValueError:
        error = {"code": -32700, "message": "this is no JSON"}
        print(json.dumps({"jsonrpc": "2.0", "id": None, "error": error}), flush=True)
        continue
    if "id" in message:
        said = {"jsonrpc": "2.0", "id": message["id"], **answer(message["method"], message.get("params") or {})}
        print(json.dumps(said), flush=True)
'''
)

# %% [markdown]
# **The client.** The schemas of `order` and `price` go into a file beside the server, in MCP's spelling; the number's limits are added. Then the server is started as a process, greeted, and asked.

# %%
import subprocess
import tempfile


def mcp_tool(tool: Callable) -> dict:
    """The description of a tool as MCP lists it, with the limits of its numbers."""
    said = schema_of(tool)["function"]
    schema = copy.deepcopy(said["parameters"])
    for name, (low, high) in LIMITS.items():
        if name in schema["properties"]:
            schema["properties"][name] |= {"minimum": low, "maximum": high}
    return {"name": said["name"], "description": said["description"], "inputSchema": schema}

# %%
class Client:
    """Starts a server in a folder and sends it requests; use it in a `with` statement."""

    def __init__(self, folder: Path) -> None:
        (folder / "server.py").write_text(SERVER, encoding="utf-8")
        (folder / "tools.json").write_text(json.dumps([mcp_tool(price), mcp_tool(order)]), encoding="utf-8")
        command = [sys.executable, "-I", str(folder / "server.py"), str(folder / "tools.json")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.number = 0

    def __enter__(self) -> "Client":
        about = {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "lesson", "version": "1.0"},
        }
        self.hello = self.request("initialize", about)
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()

    def send(self, message: dict) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def request(self, method: str, params: dict) -> dict:
        """The answer to a request, as it came."""
        self.number += 1
        self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})
        return json.loads(self.process.stdout.readline())

# %%
REQUESTS = ['order "tofu", count 7', 'is there "curry"', 'the price of "pudding"', 'I need count 12 of "jam"']
written = [text_of(ids) for ids in write(assistant, [f"Request: {text}\nCall:\n" for text in REQUESTS], CALLS)[0]]
with tempfile.TemporaryDirectory() as folder, Client(Path(folder)) as client:
    print("server:", client.hello["result"]["serverInfo"]["name"], client.hello["result"]["protocolVersion"])
    listed = client.request("tools/list", {})["result"]["tools"]
    answers = {text: client.request("tools/call", json.loads(text)) for text in written}
    too_many = client.request("tools/call", {"name": "order", "arguments": {"item": "jam", "count": 99}})
    forbidden = client.request("tools/call", {"name": "erase", "arguments": {}})
for asked, text in zip(REQUESTS, written, strict=True):
    print(asked, "->", text, "\n    ->", answers[text].get("result", answers[text].get("error")))
print("too many ->", too_many["result"], "\nnot allowed ->", forbidden["error"])

# %%
def without_limits(schema: dict) -> dict:
    """The schema as `get_json_schema` knows it."""
    properties = {name: {key: value for key, value in kind.items() if key not in ("minimum", "maximum")}
                  for name, kind in schema["properties"].items()}  # fmt: skip
    return schema | {"properties": properties}


theirs = {tool.__name__: get_json_schema(tool)["function"]["parameters"] for tool in (price, order)}
differing = sum(without_limits(tool["inputSchema"]) != theirs[tool["name"]] for tool in listed)
lesson.equal("listed schemas that differ from transformers'", differing)
here = {text: TOOLS[call["name"]](**call["arguments"]) for text in written
        if (call := json.loads(text))["name"] in theirs}  # fmt: skip
differing = sum(answers[text]["result"]["content"][0]["text"] != said for text, said in here.items())
lesson.equal("results over the wire that differ from those of the functions", differing)

# %% [markdown]
# **What you see.** The protocol is small, and the division of work is the same as before: the model writes a text, your program decides whether it is a call that is allowed, and only then something happens. Read each request beside its call. Where a call is not what was asked for, the protocol carries it out all the same. Before a call that costs something, such as `order`, a host should ask its user. A server that you did not write can lie in its descriptions and in its results, as a page can.

# %% [markdown]
# ## 12 · Exercises
#
# From easy to open, with one more easy one at the end. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 15.1, easy: what a plan is worth, exactly. Section 4 has only the lower bound (1 - p)^L.
# First predict, then measure: two plans of four moves on an open floor, slip 0.2. One goes straight, from (1, 2) four
# cells east; the other round a corner, from (1, 2) two cells east and then two north. Which arrives more often?
def predicted() -> str:
    """Your prediction: "straight", "corner" or "equal"."""
    raise NotImplementedError


def open_loop_success(plan: Sequence[str], start: Cell, goal: Cell, slip: float) -> float:
    """Exact probability that a robot on an open floor reaches the goal, if it acts out the plan with closed eyes.

    Walls are those of section 1, and the robot stays at the goal as soon as it is there.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_open_loop(open_loop_success, predicted):
    run = open_loop_success
    expect_close("a plan without slip", run(["east", "north"], (0, 0), (1, 1), 0.0), 1.0)
    expect_close("one move, slip 0.2", run(["east"], (2, 2), (3, 2), 0.2), 0.8)
    expect_close("a plan that misses", run(["west"], (2, 2), (3, 2), 0.0), 0.0)
    expect_close("a second try after a bump into the wall", run(["east", "east"], (0, 0), (1, 0), 0.2), 0.88)
    expect_close("no plan, at the goal", run([], (2, 2), (2, 2), 0.2), 1.0)
    straight = run(4 * ["east"], (1, 2), (5, 2), 0.2)
    corner = run(2 * ["east"] + 2 * ["north"], (1, 2), (3, 4), 0.2)
    expect_close("four moves east", straight, 0.8**4)
    larger = "equal" if abs(straight - corner) < 1e-9 else "straight" if straight > corner else "corner"
    expect_true("your prediction is what your function measures", predicted() == larger)


check("15.1", check_open_loop, open_loop_success, predicted)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Keep a probability for each cell, and let each move of the plan spread it with `outcomes`. For the prediction: after a slip on the straight way, how many moves does the robot still need, and how many are left?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# On the straight way every slip costs a move that the plan does not have. Round the corner a slip to the north in the first half can be made good by a slip to the east in the second.
#
# ```python
# def predicted() -> str:
#     return "corner"
#
#
# def open_loop_success(plan: Sequence[str], start: Cell, goal: Cell, slip: float) -> float:
#     chances = {start: 1.0}
#     for action in plan:
#         after = defaultdict(float)
#         for cell, share in chances.items():
#             ends = [(1.0, cell)] if cell == goal else outcomes(cell, action, OPEN, slip)
#             for chance, end in ends:
#                 after[end] += share * chance
#         chances = after
#     return chances.get(goal, 0.0)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 15.2, medium: a mask for whole numbers in a range that is too long to list.
def may_follow(written: str, token: str, low: int, high: int) -> bool:
    """Whether `token` may come after `written`, the part of a number that stands already.

    A text is valid if it is a number from `low` to `high` (1 or more), without leading zeros, and one "}" right after
    it. `written` has no "}" in it and can still become valid. A token may hold several characters, "}" among them.
    """
    raise NotImplementedError

# %% tags=["check"]
TOKENS = [*map(str, range(11)), "20", "24", "100"]


def check_may_follow(may_follow):
    for low, high in ((1, 24), (15, 24), (95, 102), (7, 7)):
        texts = [f"{number}}}" for number in range(low, high + 1)]
        begun = {text[:place] for text in texts for place in range(len(text))} - set(texts)
        for written in sorted(begun):
            for token in (*TOKENS, "", "}", "2}", "4}", "0}", "7}", "}}", "2}}", "a", " ", "-1"):
                right = bool(token) and any(text.startswith(written + token) for text in texts)
                expect_equal(
                    f"may_follow({written!r}, {token!r}, {low}, {high})", may_follow(written, token, low, high), right
                )
    expect_equal("a number of 15 digits", may_follow("4", "2", 10**14, 10**15), True)
    expect_equal("the end of a number that is too small", may_follow("4", "2}", 10**14, 10**15), False)
    expect_equal("one digit too many", may_follow("2" + "0" * 15, "0", 10**14, 10**15), False)


check("15.2", check_may_follow, may_follow)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With $k$ more digits the number $d$ becomes one from $d \cdot 10^k$ to $d \cdot 10^k + 10^k - 1$. When does that interval meet the range?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# What stands before the brace must be digits, with none of them a leading zero. If the brace is there, the number is complete. If not, some number of further digits must lead into the range.
#
# ```python
# def may_follow(written: str, token: str, low: int, high: int) -> bool:
#     digits, brace, rest = (written + token).partition("}")
#     if not token or rest or not digits.isdecimal() or digits.startswith("0"):
#         return False
#     if brace:
#         return low <= int(digits) <= high
#     number, width = int(digits), 1
#     while number * width <= high:
#         if number * width + width - 1 >= low:
#             return True
#         width *= 10
#     return False
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 15.3, medium: try again, within a budget. Section 5 chooses once. A robot whose try has failed may try again,
# the same skill or another, as long as its battery lasts. A try costs its moves, whether it succeeds or not.
def attempts(options: Mapping[str, tuple[float, int]], battery: int) -> list[str]:
    """Skills to try in turn, until one succeeds, so that most probably one does.

    `options` is skill -> (probability of success, moves). Tries are independent; all together cost at most `battery`.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_attempts(attempts):
    def chance(options, battery):
        tried = attempts(options, battery)
        cost = sum(options[name][1] for name in tried)
        expect_true(f"{tried} costs {cost} moves, and the battery has {battery}", cost <= battery)
        return 1 - math.prod(1 - options[name][0] for name in tried)

    fetch = {"near": (0.5, 2), "far": (0.8, 5)}
    for battery, best in [(1, 0.0), (2, 0.5), (4, 0.75), (5, 0.8), (6, 0.875), (7, 0.9), (9, 0.95), (10, 0.96875)]:
        expect_close(f"chance of success with a battery of {battery}", chance(fetch, battery), best)
    three = {"tea": (0.3, 3), "milk": (0.45, 4), "juice": (0.6, 6)}
    for battery, best in [(3, 0.3), (4, 0.45), (7, 0.615), (8, 0.6975), (10, 0.78), (11, 0.78825)]:
        expect_close(f"three skills, a battery of {battery}", chance(three, battery), best)


check("15.3", check_attempts, attempts)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Neither the surest skill nor the one with the most success a move is always right: some moves may be left over. Solve all smaller batteries first.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# All tries fail with the product of their chances to fail, in any order. So the best list for a battery is one skill and the best list for what it leaves: dynamic programming, as in value iteration.
#
# ```python
# def attempts(options: Mapping[str, tuple[float, int]], battery: int) -> list[str]:
#     best = [(1.0, [])]  # for each battery from 0: (chance that all fail, skills)
#     for left in range(1, battery + 1):
#         lists = [best[left - 1]]
#         for name, (chance, moves) in options.items():
#             if moves <= left:
#                 fails, names = best[left - moves]
#                 lists.append(((1 - chance) * fails, [name, *names]))
#         best.append(min(lists, key=lambda entry: entry[0]))
#     return best[battery][1]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 15.4, hard: from samples under the mask to samples of p given a valid call, with a bounded number of tries.
def aligned(draw: Callable[[], tuple[str, float]], tries: int, generator: random.Random) -> str:
    """One valid call. `draw()` samples a call under the mask: the call, and the product of the masses kept along it.

    At most `tries` calls are drawn, and no more than needed. Calls that are accepted must have the distribution
    p given a valid call (section 8). If none is accepted, return one of those that were drawn, each
    chosen with the weights that would make the choice right if there were very many of them.
    """
    raise NotImplementedError

# %% tags=["check"]
def check_aligned(aligned):
    kept, drawn = {"a": 0.02, "b": 0.2}, []

    def share_of_a(tries: int, runs: int = 3000) -> float:
        generator, source = random.Random(5), random.Random(6)

        def draw() -> tuple[str, float]:
            drawn.append(source.choice("ab"))  # under the mask both are equally likely
            return drawn[-1], kept[drawn[-1]]

        return sum(aligned(draw, tries, generator) == "a" for _ in range(runs)) / runs

    expect_close("share of a with 1 try, where there is no choice", share_of_a(1), 0.5, tolerance=0.04)
    expect_close("share of a with 200 tries", share_of_a(200), 1 / 11, tolerance=0.03)
    expect_close(
        "share of a with 4 tries, most of which end without an acceptance", share_of_a(4), 0.15, tolerance=0.04
    )
    drawn.clear()
    share_of_a(200)
    expect_close("draws for each call", len(drawn) / 3000, 1 / 0.11, tolerance=0.1)
    drawn.clear()
    share_of_a(3, runs=100)
    expect_true("there are no more draws than tries", len(drawn) <= 300)


check("15.4", check_aligned, aligned)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Under the mask $q(y) = p(y) / \prod_t a_t$. With which probability must a call be accepted, so that $q(y)$ times it is proportional to $p(y)$? It is a number between 0 and 1 that `draw` gives you.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Accept with the probability $a = \prod_t a_t$, the mass that was kept: $q(y)\, a = p(y)$. If none is accepted, all calls that were drawn were refused, and so have the distribution $q(y) (1 - a)$ up to a constant. The weight that brings it back to $p$ is $a / (1 - a)$. Where little mass is kept, it is nearly $a$ itself.
#
# ```python
# def aligned(draw: Callable[[], tuple[str, float]], tries: int, generator: random.Random) -> str:
#     calls, weights = [], []
#     for _ in range(tries):
#         call, kept = draw()
#         if generator.random() < kept:
#             return call
#         calls.append(call)
#         weights.append(kept / (1 - kept))  # a call that is refused has kept < 1
#     return generator.choices(calls, weights)[0]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 15.5, open: ten labels. In section 6 each way had three hundred. Choose ten states to be labelled such
# that the clone, trained on them and on its demonstrations, wins back half of what it lost on the wet floor.
def ten_labels(choices: Mapping[str, str], generator: random.Random) -> list[tuple[str, str]]:
    """At most 10 rows (text, the expert's move). `choices` is what the clone does after each text."""
    raise NotImplementedError

# %% tags=["check"]
def check_ten_labels(ten_labels):
    rows = ten_labels(clone_choices, random.Random(f"ten/{seed}"))
    expect_true("there are at most ten labels, and at least one", 1 <= len(rows) <= 10)
    expect_true("all labels are the expert's", all(expert_choices.get(text) == action for text, action in rows))
    taught_on = fitted(
        copy.deepcopy(clone), shown + 10 * rows, lesson.scaled(45)
    )  # each label often enough to be learned
    before, now = success(clone_choices, WET), success(answers_of(taught_on, depot_texts), WET)
    print(f"on the wet floor your robot goes from {before:.0%} to {now:.0%}")
    expect_true("it wins back half of what was lost", now - before >= (success(expert_choices, WET) - before) / 2)


check("15.5", check_ten_labels, ten_labels)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A label is wasted on a text that was demonstrated, and on one at which the clone is right. Of the others, which cost the most? And once a label there sends the robot on, where does it come next?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# One of many: let the clone drive on the wet floor, label the text at which it errs most often, assume that it will follow the label, and let it drive again. Looking ten times is better than once: the next label is for where it comes to *then*.
#
# ```python
# def ten_labels(choices: Mapping[str, str], generator: random.Random) -> list[tuple[str, str]]:
#     labels = {}
#     for _ in range(10):
#         driven = dict(choices) | labels
#         errors = Counter()
#         for _ in range(200):
#             for state in walk(lambda s: driven[tell(s)], WET, generator):
#                 if driven[tell(state)] not in best_moves(state, breadth_first(state.goal, OPEN)):
#                     errors[tell(state)] += 1
#         if errors:
#             worst = errors.most_common(1)[0][0]
#             labels[worst] = expert_choices[worst]
#     return list(labels.items())
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 15.6, easy: how much of a call is forced? Guess first, then count.
prediction = None  # your guess: at what share of the characters of a call does the language leave no choice?


def forced(language: tuple, text: str) -> int:
    """At how many characters of a valid text only one byte may follow. Where the text may end, there is a choice."""
    raise NotImplementedError

# %% tags=["check"]
def check_forced(forced):
    fork = either(exactly("abc"), exactly("abd"))
    expect_equal("of abc, out of abc and abd", forced(fork, "abc"), 2)
    expect_equal("of ab, out of a and ab", forced(either(exactly("a"), exactly("ab")), "ab"), 1)
    expect_equal("of aa, out of one to three a", forced(times(byte_in("a"), 1, 3), "aa"), 1)
    call = '{"name": "order", "arguments": {"item": "curry", "count": 7}}'
    counted = forced(CALLS, call)
    expect_true("the prediction is a share from 0 to 1", prediction is not None and 0 <= prediction <= 1)
    print(f"you predicted {prediction:.0%}, and {counted / len(call):.0%} are forced")


check("15.6", check_forced, forced)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Walk through the text with `after`. In each state try all 256 bytes, and ask `may_end`.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Most of a call is decided by the schema. Servers use this: what is forced need not be computed by the model at all, it is appended, which makes calls faster.
#
# ```python
# prediction = 0.8
#
#
# def forced(language: tuple, text: str) -> int:
#     count = 0
#     for byte in text.encode():
#         choices = sum(after(language, other) != NEVER for other in range(256))
#         count += choices == 1 and not may_end(language)
#         language = after(language, byte)
#     return count
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **In the figure of section 4, why does the line of one plan lie so close to $(1 - p)^L$?**
#
# - A. because the model's plans are wrong in that share of cases
# - B. because most plans with a slip in them end beside the goal, and nobody looks
# - C. because a slip always ends the episode
# - D. because $L$ grows with $p$
#
# <details><summary>Answer</summary>
#
# B. The formula counts plans without any slip. Few of the others happen to end at the goal, so the bound is nearly the truth. The episode goes on after a slip; the robot only does not know of it.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A language model gives 0.9 to *fetch the tea* and 0.1 to *fetch the milk*; the tea is fetched with probability 0.05, the milk with 0.8. What does the product choose?**
#
# - A. the tea, because 0.9 is the largest number
# - B. nothing, because no skill is both wanted and sure
# - C. the milk, because 0.08 is more than 0.045
# - D. either, with equal probability
#
# <details><summary>Answer</summary>
#
# C. The product is the probability that the skill is wanted *and* succeeds, if the two are independent.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A clone copies its expert without a mistake on the demonstrations, and fails on the wet floor. Why do its own successful episodes not repair it?**
#
# - A. because they are fewer than the demonstrations
# - B. because episodes that got stuck are filtered out, and with them the states in which it would have to learn something
# - C. because it needs a larger learning rate
# - D. because success cannot be measured
#
# <details><summary>Answer</summary>
#
# B. What it did right, it can do already. In the states where it fails there is hardly a success to imitate; an expert's label, or a reward and a search, would have to say what to do there.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the figure of section 7 the mask leaves no unreadable call, and more wrong ones. What can be wrong with these?**
#
# - A. a brace that is missing
# - B. a tool that does not exist
# - C. a dish of the list that nobody asked for
# - D. a number above the limit
#
# <details><summary>Answer</summary>
#
# C. A missing brace, an unknown tool and a number out of range are not in the language, so the mask makes them impossible. A wrong dish from the list is in it.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A directory answers *renamed to Fegu* in place of *error*. Why does that help a model?**
#
# - A. the message becomes part of the prompt, so the next call can use it
# - B. the message changes the model's weights
# - C. longer results make a model more careful
# - D. it does not, since models ignore results
#
# <details><summary>Answer</summary>
#
# A. The result stands in the text that the model reads next. That is the only way in which the tool can tell it something.
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
# A hub model brings its own format for tools in its chat template: `tokenizer.apply_chat_template(messages, tools=[order, price])` turns typed functions into the schemas of section 7. Servers such as vLLM apply masks like yours to thousands of requests at once.

# %% [markdown]
# ## Read on
#
# - Sutton and Barto 2018, *Reinforcement Learning: An Introduction*, chapters 3 and 4: Markov decision processes and value iteration.
# - Towers et al. 2024, *Gymnasium: A Standard Interface for Reinforcement Learning Environments*, arXiv:2407.17032.
# - Pomerleau 1989, *ALVINN: An Autonomous Land Vehicle in a Neural Network*: behaviour cloning on a real road, and already the problem of section 6.
# - Ross et al. 2011, *A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning*, arXiv:1011.0686: DAgger, and why errors of a clone can grow with the square of the time.
# - Laskey et al. 2017, *DART: Noise Injection for Robust Imitation Learning*, arXiv:1703.09327: let the expert feel the noise.
# - Ahn et al. 2022, *Do As I Can, Not As I Say: Grounding Language in Robotic Affordances*, arXiv:2204.01691: the product of section 5.
# - Zhao et al. 2023, *Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware*, arXiv:2304.13705: chunks of actions.
# - Brzozowski 1964, *Derivatives of Regular Expressions*, Journal of the ACM 11: the automaton of section 7.
# - Willard and Louf 2023, *Efficient Guided Generation for Large Language Models*, arXiv:2307.09702: from regular expressions to token masks, the idea of outlines.
# - Park et al. 2024, *Grammar-Aligned Decoding*, NeurIPS, arXiv:2405.21047: what masks do to probabilities, and an algorithm that corrects it.
# - Yao et al. 2023, *ReAct: Synergizing Reasoning and Acting in Language Models*, ICLR, arXiv:2210.03629: thoughts and calls in turn.
# - The specification of the Model Context Protocol, modelcontextprotocol.io: messages, versions and what a host must ask its user for.
