# %% [markdown]
# # 04 · Scaling laws: what to expect from more parameters, more data and more thinking
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/04_scaling_laws.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/04_scaling_laws.ipynb)
#
# A large training run can be done only once, so its size, its data and its result must be known before it starts. Scaling laws are how that is done: train many small models, fit a curve with five numbers, extrapolate. In this lesson you fit such curves to a sweep of real runs, on a text whose true entropy you can compute. So for once you can check what a fitted law says about the text. You find out what such a fit can be trusted with and what not, one reason why two famous laws disagreed, and what a law of the loss does not tell.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. compute the entropy of a stream of text exactly, and see how little a fitted law knows about it;
# 2. write the three approaches of Chinchilla, and see them recover published constants from data made with them;
# 3. train four runs and forecast the loss of each above the entropy, beside the simplest forecast there is;
# 4. compute from Chinchilla's law an exponent near the one that Kaplan et al. found, by leaving the embeddings out;
# 5. see where scores mislead: "emergent" abilities, tasks that get worse with scale, many samples beside a guesser.
#
# **Prerequisites:** lesson 01 (cross-entropy) and lesson 03 (how a model is trained).
#
# **The text** is about *Shima*, an island made up by a seeded generator. Here it has 20,000 people instead of the 1,000 that the course's base model *shima-4m* knows, and of all its documents only one kind is used: questions on people, with their answers. **The models** are small Llamas of 12,000 to 290,000 parameters. Training them all takes about 20 minutes on one core, so 70 runs come with the course; you train a few more.
#
# | symbol | meaning |
# |---|---|
# | $N$ | parameters of a model, all of them unless said otherwise |
# | $D$ | tokens that it is trained on, each once |
# | $C$ | compute of the training in floating-point operations, $C \approx 6ND$ |
# | $L(N, D)$ | loss on unseen text, nats per token |
# | $E$ | irreducible loss of a law: its loss for endless $N$ and $D$ |
# | excess | loss above the true entropy of the text |
# | $A, \alpha, B, \beta$ | how the loss above $E$ falls with parameters and with tokens |
# | $a$ | exponent of the best size: $N_{\text{opt}} \propto C^{a}$ |

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
model_id = ""  # another model for section 14 and "In practice": a hub id, or a folder in hub format
seed = 0
budget = 1.0  # share of the live runs, samples and bootstraps; the claims are asserted from 1.0 on

# %% [markdown]
# The settings hold what depends on the hardware: how many processes train cells, and how many texts are decoded at once. The sweep itself is the same everywhere, one thread a cell, because its models are too small for a GPU. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.
#
# Most numbers of this lesson come from runs that were made once and are shipped with it. They are the same for every reader, so they are reported and not claimed. What is claimed is about the runs and samples that you make yourself.

# %%
import itertools
import math
import os
import time
from collections import Counter

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: threads slow such small fits down

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize
from scipy.special import logsumexp
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from helpers import plots
from helpers.evaluation import pass_at_k, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import generate
from helpers.lesson import Lesson, show_table
from helpers.models import load_model
from helpers.world import RELATIONS, World
from recipes import scaling_sweep as sweep
from recipes.scaling_sweep import Cell

lesson = Lesson("04", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {
    "cpu": {"processes": 2, "decoded_at_once": 128},
    "t4": {"processes": 2, "decoded_at_once": 256},
    "large": {"processes": 8, "decoded_at_once": 512},
}
settings = SETTINGS[machine.name]

# %% [markdown] tags=["core"]
# ## 1 · A text whose entropy is known
#
# **Question.** How low can the loss go at all?
#
# The lowest loss that any model can reach on a text is the **entropy** of the source that wrote it. For English nobody knows that number, so the $E$ of every published law is a fit that cannot be checked. Here the source is a program, and we can read it. A document of our stream is made by six rounds of three choices:
#
# 1. a person, out of 20,000, with probability $p_r \propto 1 / r^{1.5}$ for the person of rank $r$ (Zipf's law: a few are met all the time, most hardly ever);
# 2. one of 5 relations (town, trade, animal, dish, instrument), all equally likely;
# 3. one of 8 ways to ask for it, all equally likely.
#
# The answer is no choice: the world fixes it. So for a reader who knows the whole island, one round has the entropy
#
# $$H = \underbrace{-\sum_r p_r \ln p_r}_{\text{who}} + \underbrace{\ln 5}_{\text{what}} + \underbrace{\ln 8}_{\text{how}}$$
#
# provided that the text shows each choice: two different choices must never give the same text. The next cell checks that.

# %%
island = sweep.world()
print(island.document(1, 0, {"questions": 1.0}))
forms = [form for r in RELATIONS.values() for form in r.training_questions]
assert len(set(forms)) == len(forms) == 40
assert len(island.person) == len(island.people) == 20_000  # no name is used twice
chances = np.array([island.mention_probability(person) for person in island.people])
who = -(chances * np.log(chances)).sum()
what, how = math.log(len(RELATIONS)), math.log(len(forms) / len(RELATIONS))
round_entropy = who + what + how
print(f"nats: who {who:.3f}, what {what:.3f}, how {how:.3f};", end=" ")
print(f"a document {6 * round_entropy:.2f}")
print(f"the best-known person is in {chances[0]:.0%} of all questions,", end=" ")
print(f"the last 10,000 together in {chances[10_000:].sum():.2%}")

# %% [markdown]
# A loss is counted per token, so the entropy has to be divided by the number of tokens of a document. Every document is one row of its own, begun and closed by the end token. The token that begins the row is given, all others are predicted, so nothing is left out of the count.
#
# All models below are tested on the same 500 documents. For these we know the surprise of the perfect reader, document by document: read off the choices and add up their $-\ln p$. A model's loss on these documents can be compared with that number directly, because both share the luck of the draw. (A model might still come out below it by luck. Only in expectation can nobody beat the perfect reader.)

# %%
names = [person.name for person in island.people]
person_nats = dict(zip(names, -np.log(chances), strict=True))


def perfect_nats(document: str) -> float:
    """Surprise of a document to a reader who knows the island and its generator."""
    asked = [line for line in document.splitlines() if line.startswith("Question: ")]
    words = [line.rstrip("?").split()[1:] for line in asked]
    named = [next(word for word in line if word in person_nats) for line in words]
    return sum(person_nats[name] + math.log(40) for name in named)


test_texts = [island.document(1000, i, {"questions": 1.0}) for i in range(500)]
test_tokens = sum(len(row) - 1 for row in sweep.stream(1000, 500))
ENTROPY = sum(map(perfect_nats, test_texts)) / test_tokens
mean_tokens = np.mean([len(row) - 1 for row in sweep.stream(1, 5000)])
expected = 6 * round_entropy / mean_tokens
print(f"perfect reader on {test_tokens:,} test tokens: {ENTROPY:.4f} nats per token")
print(f"expected over all documents: {expected:.4f} ({mean_tokens:.1f} tokens each)")
lesson.report("true entropy of the test documents, nats per token", f"{ENTROPY:.4f}")
assert abs(ENTROPY / expected - 1) < 0.03


# %% [markdown]
# **What is not counted.** $E$ is the surprise that remains when the facts are known. The facts themselves have to be learnt from the text: 20,000 names with five facts each. That cost appears nowhere in $E$. It is a part of the loss *above* $E$, which this lesson calls the **excess**.

# %% [markdown] tags=["core"]
# ## 2 · One cell of the sweep
#
# **Question.** What is one run, what does it cost, and how is it measured?
#
# A *cell* is one training run of a given width and number of tokens. All cells share: two layers, heads of 8 numbers (at width 12 one head of 12), tied embeddings over the 714 tokens that the stream can hold, 12 documents a step, AdamW, no weight decay. Two things depend on the cell:
#
# - **the schedule ends with the run**: a cosine that reaches 5 % of its peak at the last step of *this* number of tokens. Section 9 shows what happens otherwise;
# - **the peak learning rate falls with the width**, $0.75 / \text{width}$. Adam moves every weight by about the learning rate, and a wider layer sums more of them (Yang et al. 2022 derive the rule). Section 3 shows trials at half and twice the rate.
#
# Here is a cell in full, on one thread.

# %%
def train(cell: Cell) -> tuple[LlamaForCausalLM, list[float]]:
    """Train one cell of the sweep and return the model and the loss of each step."""
    model, losses = sweep.new_model(cell.width, cell.seed), []
    peak, options = cell.rate * 0.75 / cell.width, {"weight_decay": 0.0, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), peak, (0.9, 0.95), **options)
    batches = list(sweep.training_batches(cell))
    warmup = max(1, round(0.1 * min(len(batches), 1000)))
    for step, documents in enumerate(batches):
        progress = max(0.0, (step - warmup) / (len(batches) - warmup))
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * min(cosine, (step + 1) / warmup)
        inputs, targets = sweep.batch_of(documents)  # (12, seq) each
        logits = model(input_ids=inputs, use_cache=False).logits  # (batch, seq, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # skips -100
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return model, losses


# %%
threads = torch.get_num_threads()
torch.set_num_threads(1)
small = Cell(width=24, tokens=125_000, seed=seed)
small_model, losses = train(small)
ours = sweep.test_loss(small_model)
theirs = sweep.train_cell(small)
torch.set_num_threads(threads)
print(f"N = {theirs['parameters']:,}, D = {theirs['tokens_seen']:,},", end=" ")
print(f"{len(losses)} steps, first loss {losses[0]:.3f} (ln 714 = {math.log(714):.3f})")
print(f"test loss: {ours:.5f}; by the recipe {theirs['loss']:.5f};", end=" ")
print(f"perfect reader {ENTROPY:.4f}")
lesson.equal("the cell is the recipe's", abs(ours - theirs["loss"]), within=1e-3)
names_only = (math.log(len(chances)) + math.log(24) - who) * 6 / mean_tokens
first, last = losses[0] - ENTROPY, ours - ENTROPY
print(f"excess at first {first:.2f}, at the end {last:.2f};", end=" ")
print(f"of a reader who knows format and names only {names_only:.2f}")
lesson.claim("after 125,000 tokens the excess is a fifth below that of format and names",
             1 - last / names_only, at_least=0.2, control=1 - first / names_only, form=".0%")  # fmt: skip


# %% [markdown]
# A falling loss alone says little: most of the fall is the format of the text, which any model learns in no time. So the claim compares with a reader who knows the format, the 20,000 names and the 24 values of each relation, but neither how often a name is asked nor any fact.
#
# **What does it cost?** A matrix with $n$ parameters multiplies and adds once per parameter and token, so the forward pass takes $2N$ operations a token. The backward pass does that twice, once for the gradients of the inputs and once for those of the weights. Together $6N$ a token:
#
# $$C \approx 6 N D$$
#
# Three things hide in the $\approx$. Attention also multiplies the tokens with each other: $12 \cdot \text{layers} \cdot T \cdot d$ more a token for rows of length $T$ and width $d$. The vectors of the norms multiply nothing worth counting. And the embedding is a table to look things up in, which costs nothing, but when the same table is the output matrix ("tied") it is multiplied like any other. PyTorch counts what really runs:

# %%
def counted_flops(width: int, batch: int = 12, seq: int = 84) -> int:
    """Operations of one training step as torch counts them: forward and backward."""
    model = sweep.new_model(width)
    model.set_attn_implementation("eager")  # its matrix products can be counted
    tokens = torch.randint(0, 714, (batch, seq))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return counter.get_total_flops()


rows, exactness = {}, []
for width in (12, 16, 64, 96, 192):
    tokens, counted = 12 * 84, counted_flops(width)
    total, embedding = sweep.new_model(width).num_parameters(), 714 * width
    attention = 12 * 2 * 84 * width * tokens
    exactness.append((6 * total * tokens + attention) / counted)
    parts = [6 * (total - embedding) * tokens, 6 * total * tokens]
    shares = [f"{part / counted:.0%}" for part in (*parts, parts[1] + attention)]
    rows[f"width {width}, N = {total:,}"] = [f"{embedding / total:.0%}", *shares]
show_table(rows, ["embedding", "6ND without it", "6ND", "6ND and attention"])
largest = max(abs(x - 1) for x in exactness)
lesson.equal("6ND with attention is within 1 % of the count", largest, within=0.01)

# %% [markdown]
# **What you see.** The first column is the embedding's share of the parameters, the others are shares of the counted operations. With the attention term the formula is the count. Without it, $6ND$ misses a part that shrinks with the width, because $N$ grows with the square of the width and attention with its first power. Leaving the embedding out misses most of the smallest model's operations and under a fifth of the largest's. Remember that column: it is where Kaplan et al. (2020) and Hoffmann et al. (2022) part ways in section 8. From here on $C = 6ND$ with all parameters, as in the Chinchilla paper.

# %% [markdown] tags=["core"]
# ## 3 · The sweep
#
# **Question.** How do you run many cells, here or on a cluster, without losing any?
#
# Cells do not depend on each other, so they can run wherever there is room. All that is asked of a runner is one call, `submit(function, cell)`, which returns at once something with `done()` and `result()`. Python's process pool offers exactly that, and so does [submitit](https://github.com/facebookincubator/submitit) for a Slurm cluster: there the executor is `sweep.slurm("build/sweep", slurm_partition="cpu")`, and nothing else changes. `sweep.run_sweep` submits what is not done yet and replaces its file of results after each cell, so that a sweep which is stopped goes on where it was.
#
# The shipped results were made with `python -m recipes.scaling_sweep`, one process, one thread. You now run four cells of widths and budgets that are not in the file, in processes of your own. (About a minute.)

# %%
LIVE_CELLS = ((20, 350_000), (40, 400_000), (56, 300_000), (80, 350_000))
wanted = [(width, lesson.scaled(tokens, 20_000)) for width, tokens in LIVE_CELLS]
live_cells = [Cell(width, tokens, seed=seed) for width, tokens in wanted]
path = sweep.ROOT / "build" / "04_scaling_laws" / f"live-{seed}.json"
started = time.perf_counter()
with sweep.processes(settings["processes"]) as executor:
    live = sweep.run_sweep(live_cells, executor, path, resume=False, progress=False)
print(f"{len(live)} cells in {time.perf_counter() - started:.0f} s")
with sweep.processes(1) as executor:  # again: everything is there, nothing is trained
    again = sweep.run_sweep(live_cells, executor, path, progress=False)
assert again == live
LIVE = list(live.values())
for row in LIVE:
    print(f"width {row['width']}: N = {row['parameters']:,},", end=" ")
    print(f"D = {row['tokens_seen']:,}, loss {row['loss']:.4f}")

# %% [markdown]
# Now the shipped sweep. `RUNS` holds the cells that follow the rule: fresh text, the full cosine, the rule's learning rate. Runs of 125,000 tokens are in the file, too. They are left out of everything below. Some cells were run with two or three seeds. All cells of 2 M tokens, and all of the largest model, are single runs.

# %%
everything = list(sweep.read_results(sweep.RESULTS).values())
rule = {"epochs": 1, "rate": 1, "schedule": "cosine"}
RUNS = [r for r in everything if r["tokens"] >= 250_000 and rule.items() <= r.items()]
WIDTHS = sorted({row["width"] for row in RUNS})
BUDGETS = sorted({row["tokens"] for row in RUNS})
SIZE = {row["width"]: row["parameters"] for row in RUNS}  # width -> parameters
NAME = {width: f"{size / 1e3:,.0f} k" for width, size in SIZE.items()}
MILLIONS = [f"{tokens / 1e6:g} M" for tokens in BUDGETS]


def losses_of(width: int, tokens: int) -> list[float]:
    """Losses of the runs with this width and budget, one for each seed."""
    return [r["loss"] for r in RUNS if (r["width"], r["tokens"]) == (width, tokens)]


rows = {}
for width in WIDTHS:
    cells = [losses_of(width, tokens) for tokens in BUDGETS]
    shown = [f"{np.mean(cell):.3f} ({len(cell)})" for cell in cells]
    rows[f"width {width:3}, N = {SIZE[width]:,}"] = shown
show_table(rows, MILLIONS)
minutes = sum(row["seconds"] for row in everything) / 60
print(f"{len(everything)} runs in the file ({minutes:.0f} minutes of one core):")
print(f"{len(RUNS)} in the table, in brackets the number of seeds")


# %% [markdown]
# How much do two runs differ that differ in the seed alone? That is the noise of every point below. A cell's test loss comes from one initialisation and one stream of documents.

# %%
def spread(cells: list[np.ndarray], floor: float) -> float:
    """Standard deviation between the seeds of a cell, of the logarithm above a floor."""
    return float(np.sqrt(np.mean([np.var(np.log(x - floor), ddof=1) for x in cells])))


repeats = {(w, d): np.array(losses_of(w, d)) for w in WIDTHS for d in BUDGETS}
NOISE, rows = {}, {}
for tokens in BUDGETS:
    several = [x for (_, d), x in repeats.items() if d == tokens and len(x) > 1]
    if not several:  # 2 M tokens: nothing was repeated
        NOISE[tokens] = NOISE[tokens // 2]
        continue
    groups = {w < 24: [] for w in WIDTHS}  # the two smallest sizes, and the others
    for (width, d), x in repeats.items():
        if d == tokens and len(x) > 1:
            groups[width < 24].append(x)
    NOISE[tokens] = float(spread(several, 0))
    shares = [spread(group, ENTROPY) for group in (several, groups[True], groups[False])]
    rows[f"{tokens / 1e6:g} M"] = [len(several), f"{NOISE[tokens]:.1%}", *(f"{x:.0%}" for x in shares)]
print("spread between seeds (standard deviation)")
show_table(rows, ["sizes with two or three seeds", "of the loss", "of the excess",
                  "widths 12 and 16", "larger widths"])  # fmt: skip
lowest = min(row["loss"] for row in (*everything, *LIVE))
print(f"lowest loss of all runs: {lowest:.4f}, the entropy {ENTROPY:.4f}")
lesson.report(
    "spread of the excess between seeds, at 0.25, 0.5 and 1 M tokens", ", ".join(row[2] for row in rows.values())
)

# %% [markdown]
# **What you see.** A spread of a few percent of the loss looks small. But the loss consists mostly of entropy that nobody can avoid. What a law of scaling predicts is the excess, and of that the spread is several times more. It is largest at the smallest two sizes. Judge every fit and every forecast below on the excess.
#
# **A second yardstick.** Besides the perfect reader, imagine a *learning reader*: one who knows the language, the names and how often each is asked, but no facts. Such a reader remembers each fact from the first time on, and guesses among the 24 values where a fact was not met yet. After $D$ tokens with $m$ tokens a document, a fact of person $r$ was never met with probability $(1 - p_r / 5)^{6 D / m}$.

# %%
def learning_reader(tokens: float) -> float:
    """Excess (nats per token) of a reader who learns each fact when first met."""
    never_met = chances * (1 - chances / 5) ** (6 * tokens / mean_tokens)  # (people,)
    return never_met.sum() * math.log(24) * 6 / mean_tokens


COLOR = dict(zip(WIDTHS, plt.cm.viridis(np.linspace(0, 0.88, 7)), strict=True))
EXCESS = {w: [np.mean(losses_of(w, d)) - ENTROPY for d in BUDGETS] for w in WIDTHS}
figure, axes = plt.subplots()
for width, values in EXCESS.items():
    axes.plot(BUDGETS, values, "o-", color=COLOR[width], label=NAME[width])
reader = [learning_reader(d) for d in BUDGETS]
axes.plot(BUDGETS, reader, "k--", label="learning reader")
axes.set(title="The loss above the entropy falls with tokens and with size")
axes.set(xlabel="training tokens", ylabel="excess (nats per token)")
axes.loglog()
axes.set_xticks(BUDGETS, MILLIONS)
axes.set_yticks(*[(0.005, 0.01, 0.02, 0.05, 0.1, 0.2)] * 2)
axes.minorticks_off()
axes.legend(title="parameters", bbox_to_anchor=(1.01, 1), loc="upper left")
plots.show(figure, alt="Falling lines, one per size; a learning reader's far below.")
told = f"{EXCESS[WIDTHS[-1]][-1]:.3f}, {reader[-1]:.3f}"
print(f"excess at {MILLIONS[-1]} tokens, largest model and learning reader: {told}")
lesson.report("excess of the largest run, and of a learning reader", told)

# %% [markdown]
# **What you see.** All lines fall, those of the models faster at first than at the end. With size they fall, too, but neighbouring sizes cross within the noise. On logarithmic axes a power law would be a straight line. And the learning reader is far below all models. So the excess of these models is *not* mainly facts that their text did not hold. The rest is facts that they read and did not learn, and what this reader is given: the language, the names and how often each is asked.
#
# A further section beside this one measures how steep each line is, and tries other learning rates.

# %% [markdown] tags=["further"]
# ## Beside section 3 · Slopes and learning rates
#
# *Further: no core section needs this one.*
#
# **Question.** How steep is each line, and would another learning rate have moved it?

# %%
rows, lines = {}, {f"width {w}": EXCESS[w] for w in WIDTHS}
for name, values in {**lines, "learning reader": reader}.items():
    slopes = [math.log(a / b) / math.log(2) for a, b in itertools.pairwise(values)]
    rows[name] = [f"{slope:.2f}" for slope in slopes]
print("exponent of each line between two budgets (1: halved when the tokens double)")
show_table(rows, [f"{a / 1e6:g} to {2 * a / 1e6:g} M" for a in BUDGETS[:-1]])

# %% [markdown]
# **What you see.** The slopes of neighbouring sizes scatter, because each comes from two points with the noise of section 3. So a single line is no measurement of an exponent. What holds for the sizes together: the first doubling of the tokens takes away more of the excess than the last. Now the learning rate. If the rule suited large models better than small ones, part of the "law" would be bad tuning. The file holds runs at half and at twice the rate.

# %%
rows = {}
for width in (16, 32, 64):
    base = losses_of(width, 500_000)
    same = [r for r in everything if (r["width"], r["tokens"]) == (width, 500_000)]
    other = {r["rate"]: r["loss"] for r in same if r["rate"] != 1}
    rule_loss = f"{np.mean(base):.3f} ({min(base):.3f} to {max(base):.3f})"
    rows[f"width {width}"] = [f"{other[0.5]:.3f}", rule_loss, f"{other[2.0]:.3f}"]
show_table(rows, ["half the rate", "the rule (range over seeds)", "twice the rate"])


# %% [markdown]
# **What you see.** Half and twice the rate are one run each. All but one of them lie within the range that the rule's own seeds span; twice the rate at the smallest width is clearly worse. So these trials find no better rate, and they are too few to exclude one that is better by a few percent.

# %% [markdown] tags=["core"]
# ## 4 · Approach 3: a law with five numbers
#
# **Question.** Which curve has both shortages in it, of parameters and of text, and how do you fit it?
#
# Hoffmann et al. (2022) split the loss into what nobody can avoid, what a finite model lacks, and what finite data lack:
#
# $$L(N, D) = E + \frac{A}{N^{\alpha}} + \frac{B}{D^{\beta}}$$
#
# With infinite data only the first two terms remain, with an infinite model the first and the last. The fit minimises the **Huber loss** ($\delta = 10^{-3}$) of the difference in *logarithms*: quadratic for small errors, linear for larger ones, so that single bad runs do not drag the curve. $E$, $A$ and $B$ must be positive, so the fit moves $a = \ln A$, $b = \ln B$ and $e = \ln E$. The logarithm of the prediction is then a log-sum-exp (LSE), which cannot overflow:
#
# $$\ln L = \operatorname{LSE}\big(a - \alpha \ln N,\; b - \beta \ln D,\; e\big) \qquad \min_{a, b, e, \alpha, \beta} \sum_i \operatorname{Huber}_\delta\big(\ln \hat L_i - \ln L_i\big)$$
#
# The gradient is short, because the gradient of LSE is a softmax: the share of each of the three terms in the loss.

# %%
def huber_and_gradient(theta, log_n, log_d, log_loss, delta=1e-3):
    """Sum of Huber losses at theta = (a, b, e, alpha, beta), and its gradient (5,)."""
    a, b, e, alpha, beta = theta
    rest = np.full_like(log_n, e)
    terms = np.stack([a - alpha * log_n, b - beta * log_d, rest])  # (3, runs)
    predicted = logsumexp(terms, axis=0)  # (runs,)
    share = np.exp(terms - predicted)  # (3, runs): the softmax
    error = predicted - log_loss
    linear = delta * (abs(error) - delta / 2)
    huber = np.where(abs(error) <= delta, error**2 / 2, linear)
    slope = error.clip(-delta, delta)  # derivative of the Huber loss
    by_exponent = [-share[0] * log_n @ slope, -share[1] * log_d @ slope]
    return huber.sum(), np.array([*(share @ slope), *by_exponent])


# %% [markdown]
# The function has many flat valleys. L-BFGS is an optimiser for few parameters: it asks for the value and the gradient on all data, and guesses the curvature from its last steps. It ends in a valley near its start, so it is started from a grid of points, and the best end is kept. The sum of the Huber losses is tiny. It is multiplied by a million before the optimiser sees it, with a tight tolerance: otherwise the optimiser may stop before it has arrived (the section beside this one shows it).

# %%
def lowest_end(objective, starts, options):
    """Run L-BFGS from every start and keep the end with the lowest value."""
    settings = {"jac": True, "method": "L-BFGS-B", "options": options}
    ends = [minimize(objective, start, **settings) for start in starts]
    return min(ends, key=lambda end: end.fun)


def loss_by(law: dict, n, d):
    """The law's loss for n parameters and d tokens."""
    n, d = np.asarray(n, float), np.asarray(d, float)
    with np.errstate(over="ignore", invalid="ignore"):
        return law["E"] + law["A"] / n ** law["alpha"] + law["B"] / d ** law["beta"]


# %%
GRID = ((2, 6, 12), (2, 6, 12), (-1, 0.5), (0.25, 0.7), (0.25, 0.7))
STARTS = list(itertools.product(*GRID))  # a, b, e, alpha, beta
TIGHT = {"maxiter": 500, "maxfun": 2000, "ftol": 1e-13, "gtol": 1e-8}
LAW_KEYS = ("E", "A", "B", "alpha", "beta")


def fit_law(n, d, loss, starts=STARTS, scale=1e6, options=TIGHT) -> dict[str, float]:
    """The law that fits best to runs of n parameters and d tokens, from many starts."""
    data = [np.log(np.asarray(x, float)) for x in (n, d, loss)]

    def objective(theta):
        value, gradient = huber_and_gradient(theta, *data)
        return scale * value, scale * gradient

    a, b, e, alpha, beta = lowest_end(objective, starts, options).x
    with np.errstate(over="ignore"):  # a fit without a bottom may run off to infinity
        numbers = (*np.exp([e, a, b]).tolist(), float(alpha), float(beta))
    return dict(zip(LAW_KEYS, numbers, strict=True))


# %% [markdown]
# **Does the code find what is there?** A fit is tested on data whose answer is known. Three sets of constants were published for one experiment: those printed in Hoffmann et al. (2022), the same with more digits in the TeX source of that paper, and the replication by Besiroglu et al. (2024). Make losses with each at 144 sizes and budgets of the paper's range, and fit.

# %%
PUBLISHED = {  # E, A, B, alpha, beta
    "Hoffmann, printed": (1.69, 406.4, 410.7, 0.34, 0.28),
    "Hoffmann, TeX": (1.6934, 406.4, 410.7, 0.3392, 0.2849),
    "Besiroglu": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}
PUBLISHED = {k: dict(zip(LAW_KEYS, v, strict=True)) for k, v in PUBLISHED.items()}
grid = np.meshgrid(np.geomspace(7e7, 1.6e10, 12), np.geomspace(5e9, 5e11, 12))
sizes, tokens = (x.ravel() for x in grid)
rows, worst = {}, 0.0
for name, law in PUBLISHED.items():
    found = fit_law(sizes, tokens, loss_by(law, sizes, tokens), STARTS[::6])
    worst = max(worst, *(abs(found[key] / law[key] - 1) for key in law))
    rows[name] = [f"{law[key]:g}" for key in law]
    rows[f"  recovered, {name}"] = [f"{found[key]:.5g}" for key in law]
show_table(rows, LAW_KEYS)
lesson.equal("all fifteen constants are recovered within 2 %", worst, within=0.02)

# %% [markdown] tags=["further"]
# ## Beside section 4 · A fit that stops too early
#
# *Further: no core section needs this one.*
#
# **Question.** Can two fits to the same runs differ as much as Hoffmann's and Besiroglu's?
#
# Besiroglu et al. (2024) name two causes of the difference. One is rounding, which section 7 shows. The other is an optimiser that stopped too early, because the scale of its objective was badly chosen: a mean over the runs is far smaller than a sum. Try both: sum or mean, each with a tight tolerance and with the optimiser's default. The data are five draws of the replication's law with noise of 0.3 %.

# %%
law, fits = PUBLISHED["Besiroglu"], {}
for draw in range(5):
    noise = np.random.default_rng(draw).standard_normal(len(sizes))
    noisy = loss_by(law, sizes, tokens) * np.exp(0.003 * noise)
    for total, scale in {"sum": 1.0, "mean": 1 / len(sizes)}.items():
        for tolerance, options in {"tight": TIGHT, "default": {}}.items():
            found = fit_law(sizes, tokens, noisy, STARTS[::6], scale, options)
            fits.setdefault(f"{total}, {tolerance} tolerance", []).append(found)
rows = {"truth": [f"{law['E']:.2f}, {law['beta']:.2f}"] * 5}
for name, laws in fits.items():
    rows[name] = [f"{found['E']:.2f}, {found['beta']:.2f}" for found in laws]
    exponents = [found["beta"] / (found["alpha"] + found["beta"]) for found in laws]
    told = f"{min(exponents):.2f} to {max(exponents):.2f}"
    lesson.report(f"exponent a in five draws, {name}", told)
print("fitted E and beta")
show_table(rows, [f"draw {draw}" for draw in range(5)])

# %% [markdown]
# **What you see.** With a tight tolerance, sum and mean give the same law in every draw, close to the truth. With the default tolerance the mean ends far from it each time. The sum arrives in most draws; in one it stops early, too, with a $\beta$ near the published one and an $E$ halfway to it. The optimiser stops when a step improves the objective by less than a fixed amount. A mean over many runs is that many times smaller than the sum, so it stops earlier. None of these fits gave a warning. That this happened in 2022 is what the authors of the replication conclude. The cell shows only that it can happen.

# %% [markdown] tags=["core"]
# ## 5 · The law of our sweep
#
# **Question.** Does the law hold here, does its $E$ equal the true entropy, and does it predict new runs?
#
# Fit the runs of up to width 64. Width 96 is kept away from the fit. For intervals, draw the runs with replacement and fit again (a bootstrap); each new fit starts from the first one's result and two points beside it.

# %%
FITTED = [row for row in RUNS if row["width"] < 96]
LARGER = [row for row in RUNS if row["width"] >= 96]


def columns_of(runs: list[dict]) -> tuple:
    """Parameters, tokens and losses of some runs, each (runs,)."""
    keys = ("parameters", "tokens_seen", "loss")
    return tuple(np.array([row[key] for row in runs], float) for key in keys)


def interval(values) -> tuple[float, float]:
    """The middle 95 % of the values."""
    low, high = np.percentile(list(values), [2.5, 97.5])
    return float(low), float(high)


LAW = fit_law(*columns_of(FITTED))
n, d, loss = columns_of(FITTED)
print(", ".join(f"{key} = {value:.4g}" for key, value in LAW.items()))
predicted = loss_by(LAW, n, d)
of_loss = np.sqrt(np.mean(np.log(predicted / loss) ** 2))
of_excess = np.sqrt(np.mean(np.log((predicted - ENTROPY) / (loss - ENTROPY)) ** 2))
print(f"{len(FITTED)} runs; error of the fit (root mean square):", end=" ")
print(f"{of_loss:.1%} of the loss, {of_excess:.0%} of the excess")

# %%
rng, logs = np.random.default_rng(seed), [math.log(LAW[key]) for key in ("A", "B", "E")]
near = np.array([*logs, LAW["alpha"], LAW["beta"]])
starts = [near + step * np.array([1, 1, 0, 0.1, 0.1]) for step in (-1, 0, 1)]
draws = [rng.integers(0, len(FITTED), len(FITTED)) for _ in range(lesson.scaled(150))]
BOOTSTRAP = [fit_law(*(x[draw] for x in (n, d, loss)), starts) for draw in draws]
for key, value in LAW.items():
    low, high = interval(law[key] for law in BOOTSTRAP)
    print(f"{key:>5} {value:9.4g}   95 % interval {low:.4g} to {high:.4g}")
below = np.mean([law["E"] < ENTROPY for law in BOOTSTRAP])
print(f"true entropy: {ENTROPY:.4f}, percentile {100 * below:.1f} of the bootstrap's E")
low, high = interval(law["E"] for law in BOOTSTRAP)
lesson.report("fitted E (95 % interval)", f"{LAW['E']:.4f} ({low:.4f} to {high:.4f})")
lesson.report("percentile of the true entropy among the bootstrap's E", 100 * below)
above = [f"{value / ENTROPY - 1:+.1%}" for value in (LAW["E"], loss.min())]
lesson.report("fitted E and lowest fitted loss, above the true entropy", ", ".join(above))

# %% [markdown]
# **What you see.** Over all runs the error of the fit is of the size of the noise between seeds. It is not of its kind: look at the curves below, where small models begin above the law and end below it, and those of widths 48 and 64 the other way round. A sum of two powers has no term for that. The best value of $E$ lies clearly above the true entropy. The interval is wide, and whether it holds the truth depends on the draws: it does with four of five seeds of the bootstrap (the ledger), and only just. Such a fit hardly says where the truth is. It is 8.9 % above the truth, the lowest loss among the runs that it was fitted to 11.4 %: more than three quarters of that distance remain.
#
# **How well do the runs determine $E$ at all?** Hold $E$ at a value, fit the other four numbers, and note the misfit. Repeat for many values: the *profile* of $E$. Where it is flat, the runs cannot tell the values apart.

# %%
def fit_with_e(runs: list[dict], known: float, starts) -> tuple[float, np.ndarray]:
    """Misfit and other four numbers (a, b, alpha, beta) of the best law with this E."""
    data = [np.log(x) for x in columns_of(runs)]

    def objective(theta):
        full = np.insert(theta, 2, math.log(known))
        value, gradient = huber_and_gradient(full, *data)
        return 1e6 * value, 1e6 * np.delete(gradient, 2)

    best = lowest_end(objective, starts, TIGHT)
    return best.fun, best.x


def profile(runs: list[dict], values) -> list[tuple[float, np.ndarray]]:
    """Misfit and law at each E; fits start at the neighbour's end and elsewhere."""
    found, away = [], [np.delete(start, 2) for start in STARTS[7::36]]
    for known in values:
        found.append(fit_with_e(runs, known, [*(x for _, x in found[-1:]), *away]))
    return found


# %%
ES = np.array([0.535, 0.53, 0.52, 0.51, 0.5, ENTROPY, 0.475, 0.46, 0.445, 0.43])
LONG = [row for row in FITTED if row["tokens"] >= 1_000_000]
series, rows = {}, {f"{e:.3f}": [] for e in ES}
for name, runs in {"0.25 M to 2 M tokens": FITTED, "1 M and 2 M only": LONG}.items():
    found = profile(runs, ES)
    misfits = np.array([misfit for misfit, _ in found])
    series[f"runs of {name}"] = (ES[::-1], misfits[::-1] / misfits.min() - 1)
    for e, misfit, (_, (_, _, alpha, beta)) in zip(ES, misfits, found, strict=True):
        cells = [f"{misfit / misfits.min() - 1:.1%}", f"{beta:.2f}"]
        rows[f"{e:.3f}"] += [*cells, f"{beta / (alpha + beta):.2f}"]
print("the first three columns: all runs; the others: only those of 1 M and 2 M tokens")
show_table(rows, ["misfit", "beta", "a", "misfit", "beta", "a"])
for name, (_, values) in series.items():
    lesson.report(f"misfit at the worst E, {name}", max(values), form=".1%")
figure = plots.curve(
    series, title="Runs at two budgets fit all these E equally well",
    xlabel="E held at (nats per token)", ylabel="misfit above the best", percent=True,
    limits_y=(-0.005, 0.15),
)  # fmt: skip
figure.axes[0].axvline(ENTROPY, color="black", linestyle="--", linewidth=1.2)
figure.axes[0].text(ENTROPY, 0.14, " true entropy", va="top")
bound = math.exp(1.92 / len(FITTED)) - 1  # 95 % bound if errors follow Laplace's law
figure.axes[0].axhline(bound, color="grey", linestyle=":", linewidth=1.2)
figure.axes[0].text(0.43, bound, "rough 95 % bound, four budgets", va="bottom", fontsize=9)
alt = "Misfit over E: flat for two budgets; shallow, lowest above the truth, for four."
plots.show(figure, alt=alt)

# %% [markdown]
# **What you see.** With runs at only two numbers of tokens, the misfit is the same for every $E$: a larger $\beta$ makes up exactly for a larger $E$. Two budgets fix only two values, $E + B / D_1^{\beta}$ and $E + B / D_2^{\beta}$, and there are three numbers to choose. With four budgets the misfit does depend on $E$. It prefers an $E$ above the truth. By the dotted line, a rough bound of 95 % that takes all errors as independent and alike (1.92 in the code is half the 95 % point of a chi-squared variable with one degree of freedom), the truth is just excluded; by the bootstrap it is at the edge. A likely reason is in the figure of section 3: the excess falls fast at first and slowly later. A law with one exponent for all of it follows such a bend by taking the slow end for the approach to a floor.
#
# Look at the columns $a = \beta / (\alpha + \beta)$ as well. It is the exponent with which the best size grows with compute (section 6). With two budgets, laws of the same misfit have an $a$ from 0.10 to 0.54; with four, those below the dotted line have 0.47 to 0.53, and the law with the true $E$ has 0.38. **A law can be good for predicting runs nearby and say little about its own constants.** On real text, where nobody knows $E$, nothing would warn you.

# %% [markdown]
# **New runs.** The four cells that you trained in section 3 have widths and budgets that the fit never saw. Ask the law for their excess, and ask two forecasts that know no law: straight lines in $\ln N$ and $\ln D$ *between the neighbours*, and the loss of the *smaller run*, the fitted one that is next below in width and tokens.

# %%
NARROW = [width for width in WIDTHS if width < 96]  # those that were fitted


def by_law(row: dict) -> float:
    """Loss that the fitted law expects."""
    return float(loss_by(LAW, row["parameters"], row["tokens_seen"]))


def between(row: dict) -> float:
    """Loss by straight lines between the fitted runs around (outside: the edge's)."""
    means = [[math.log(np.mean(losses_of(w, d))) for d in BUDGETS] for w in NARROW]
    log_d, log_n = math.log(row["tokens_seen"]), math.log(row["parameters"])
    column = [np.interp(log_d, np.log(BUDGETS), line) for line in means]  # (widths,)
    return math.exp(np.interp(log_n, [math.log(SIZE[w]) for w in NARROW], column))


def smaller_run(row: dict) -> float:
    """Loss of the fitted runs next below in width and tokens (mean over seeds)."""
    width = max(w for w in NARROW if w <= row["width"])
    tokens = max((d for d in BUDGETS if d <= row["tokens"]), default=BUDGETS[0])
    return float(np.mean(losses_of(width, tokens)))


# %%
def forecast_errors(runs: list[dict]) -> np.ndarray:
    """Mean error of the three forecasts, as a share of the excess (3,)."""
    errors, rows = [], {}
    for row in runs:
        guesses = [forecast(row) for forecast in (by_law, between, smaller_run)]
        errors.append((np.array(guesses) - row["loss"]) / (row["loss"] - ENTROPY))
        shown = [f"{row['loss']:.4f}", f"{guesses[0]:.4f}"]
        name = f"N = {row['parameters']:,}, D = {row['tokens_seen']:,}"
        rows[name] = [*shown, *(f"{error:+.0%}" for error in errors[-1])]
    rows["mean error"] = ["", "", *(f"{e:.0%}" for e in np.abs(errors).mean(0))]
    show_table(rows, ["measured", "by law", "error: law", "neighbours", "smaller run"])
    return np.abs(errors).mean(0)


print("your runs; errors are shares of the excess")
yours = forecast_errors(LIVE)
print("\nlarger than any that was fitted")
beyond = forecast_errors(LARGER)
most = [max(r["parameters"] * r["tokens_seen"] for r in x) for x in (LARGER, FITTED)]
print(f"largest compute: {most[0] / most[1]:.1f} times that of the largest fitted run")
lesson.claim("the law predicts the excess of your runs within 20 % on average",
             yours[0], at_most=0.2, control=yours[2], form=".0%")  # fmt: skip
for name, means in {"your runs": yours, "larger": beyond}.items():
    told = ", ".join(f"{mean:.0%}" for mean in means)
    lesson.report(f"error of the excess, {name}: law, neighbours, smaller run", told)

# %% tags=["headline"]
x = np.geomspace(2.2e5, 2.3e6, 60)
figure, axes = plt.subplots()
for width in WIDTHS:
    label = NAME[width] + (", not fitted" if width >= 96 else "")
    axes.plot(x, loss_by(LAW, SIZE[width], x), color=COLOR[width], label=label)
    points = [(r["tokens_seen"], r["loss"]) for r in RUNS if r["width"] == width]
    axes.plot(*zip(*points, strict=True), "o", color=COLOR[width], markersize=4)
points = [(row["tokens_seen"], row["loss"]) for row in LIVE]
axes.plot(*zip(*points, strict=True), "x", color="black", markersize=9, label="yours")
axes.axhline(ENTROPY, color="black", linestyle="--", label="true entropy")
axes.axhline(LAW["E"], color=plots.GREY, linestyle=":", label="fitted E")
axes.set(title="The law follows the runs, and its floor is not the true one")
axes.set(xscale="log", xlabel="training tokens", ylabel="loss (nats per token)")
axes.set_xticks(BUDGETS, MILLIONS)
axes.minorticks_off()
axes.legend(title="parameters", bbox_to_anchor=(1.01, 1), loc="upper left")
alt = "Curves of the law with dots near them; its floor lies above the true entropy."
plots.show(figure, alt=alt)


# %% [markdown]
# **What you see.** Your first three runs lie between those that were fitted. The fourth, of 212,400 parameters, is larger than any of them (143,296), and its *neighbours* are only the edge. On these four the law is a good forecast, far better than the smaller run. But so are straight lines between the neighbours, which know no law; which of the two is closer depends on the seed. So the claim says that the loss is smooth, and not that the law is right. Look at the signs, too: most of the errors are above zero, so the law expects too high a loss where the training is short and the model is not tiny. A law is needed where there are no neighbours on the far side. There, at 290,208 parameters, it is not clearly better than taking the result of the size below. As a share of the *loss* the law's errors are all below 5 %, because most of the loss is entropy. Each of the larger runs was made once, and single runs scatter by the spread of section 3. Whether the law reaches far, this sweep cannot say: its largest run has only about twice the compute of the largest fitted one.

# %% [markdown] tags=["core"]
# ## 6 · The best size for a budget
#
# **Question.** A budget of compute is given. How large should the model be?
#
# The law answers by calculus. With $C = 6ND$, minimise $L(N, C/6N)$ over $N$; the derivative vanishes where
#
# $$N_{\text{opt}} = G \left(\frac{C}{6}\right)^{a}, \quad D_{\text{opt}} = \frac{1}{G} \left(\frac{C}{6}\right)^{b}, \qquad a = \frac{\beta}{\alpha + \beta}, \quad b = \frac{\alpha}{\alpha + \beta}, \quad G = \left(\frac{\alpha A}{\beta B}\right)^{\frac{1}{\alpha + \beta}}$$
#
# Hoffmann et al. also found $N_{\text{opt}}$ in two ways that assume no law for $L$:
#
# - **Approach 1, the envelope.** Draw the loss of every size over the compute spent. For each $C$ take the size that is lowest there, and fit a power law to those sizes.
# - **Approach 2, IsoFLOP.** For each of a few $C$, plot the loss of all sizes over $\ln N$. The points lie on a valley; fit a parabola and take its lowest point. Fit a power law to these.
#
# Both need the loss of a size at any compute. Between two budgets we interpolate its measured losses (a monotone curve through the means over seeds).

# %%
def curves(runs: list[dict], count: str = "parameters") -> dict[int, tuple]:
    """Size -> (lowest, highest ln C, interpolation ln C -> ln loss)."""
    points: dict[int, dict[float, list]] = {}
    for row in runs:
        at = points.setdefault(row[count], {})
        log_c = math.log(6 * row[count] * row["tokens"])
        at.setdefault(log_c, []).append(math.log(row["loss"]))
    found = {}
    for size, at in sorted(points.items()):
        x = sorted(at)
        curve = PchipInterpolator(x, [np.mean(at[c]) for c in x])
        found[size] = (x[0], x[-1], curve)
    return found


def in_reach(found: dict, number: int, sizes: int) -> np.ndarray:
    """Values of ln C between which at least so many sizes were measured."""
    starts, ends = (sorted(edges[i] for edges in found.values()) for i in (0, 1))
    return np.linspace(starts[sizes - 1], ends[-sizes], number)


# %%
def measured_at(found: dict, log_c: float) -> tuple[np.ndarray, np.ndarray]:
    """ln N and ln loss of all sizes measured at this compute, (sizes,) each."""
    near = {size: max(lo - log_c, log_c - hi) for size, (lo, hi, _) in found.items()}
    there = [size for size, outside in near.items() if outside <= 1e-9]
    return np.log(there), np.array([float(found[size][2](log_c)) for size in there])


def envelope(found: dict, log_c) -> list[float]:
    """Approach 1: for each ln C the ln N with the lowest loss there."""
    points = [measured_at(found, c) for c in log_c]
    return [float(x[y.argmin()]) for x, y in points]


def valleys(found: dict, log_c) -> list[tuple[float, float]]:
    """Approach 2: (ln C, lowest ln N) of each parabola that has its bottom inside."""
    bottoms = []
    for c in log_c:
        x, y = measured_at(found, c)
        bent, slope, _ = np.polyfit(x, y, 2) if len(x) >= 3 else (0, 0, 0)
        if bent > 0 and x.min() < -slope / (2 * bent) < x.max():
            bottoms.append((float(c), float(-slope / (2 * bent))))
    return bottoms


# %% [markdown]
# Try both on a sweep whose answer is known: losses by the replication's law, 12 sizes and 8 budgets without noise. Then on ours, and there with a choice that one has to make: how many sizes must be measured at a compute before it is used? Few give a long range with short curves, many a short range.

# %%
def exponent(points) -> float:
    """Slope of ln N over ln C by least squares; not a number below three points."""
    if len(points) < 3:
        return math.nan
    return float(np.polyfit(*zip(*points, strict=True), 1)[0])


def both(found: dict, sizes: int) -> tuple[float, float, int]:
    """Exponents of approaches 1 and 2, and the number of valleys."""
    fine, coarse = in_reach(found, 60, sizes), in_reach(found, 9, sizes)
    one = exponent(list(zip(fine, envelope(found, fine), strict=True)))
    return one, exponent(valleys(found, coarse)), len(valleys(found, coarse))


# %%
law, made = PUBLISHED["Besiroglu"], []
grid = np.geomspace(7e7, 1.6e10, 12), np.geomspace(2e9, 6e11, 8)
for n_made, d_made in itertools.product(*grid):
    loss_made = float(loss_by(law, n_made, d_made))
    made.append({"parameters": n_made, "tokens": d_made, "loss": loss_made})
rows, errors = {}, []
truth = law["beta"] / (law["alpha"] + law["beta"])
for name, runs, numbers in (("made", made, (4, 6)), ("ours", RUNS, (3, 4, 5))):
    found = curves(runs)
    for sizes in numbers:
        one, two, count = both(found, sizes)
        low, high = np.exp(in_reach(found, 2, sizes))
        cells = [f"{low:.0e} to {high:.0e}", f"{one:.2f}", f"{two:.2f}", count]
        rows[f"{name}, {sizes} sizes"] = cells
        errors += [abs(one - truth), abs(two - truth)] if name == "made" else []
show_table(rows, ["compute", "a by approach 1", "a by approach 2", "valleys of 9"])
print(f"true a of the made sweep: {truth:.2f}")
lesson.equal("both approaches find the a of the made sweep", max(errors), within=0.05)

# %%
found, sizes = curves(RUNS), 4
inside = [c for c, _ in valleys(found, in_reach(found, 9, sizes))]
figure, axes = plt.subplots()
shades = plt.cm.plasma(np.linspace(0, 0.85, 3))
chosen = (inside[0], inside[len(inside) // 2], inside[-1])
for c, shade in zip(chosen, shades, strict=True):
    x, y = measured_at(found, c)
    fine = np.linspace(x.min(), x.max(), 50)
    parabola = np.polyfit(x, y, 2)
    axes.plot(np.exp(fine), np.exp(np.polyval(parabola, fine)), color=shade)
    axes.plot(np.exp(x), np.exp(y), "o", color=shade, label=f"C = {math.exp(c):.0e}")
    for _, bottom in valleys(found, [c]):
        axes.plot(*np.exp([bottom, np.polyval(parabola, bottom)]), "v", color="black")
axes.set(title="With more compute the lowest point lies lower, at a larger size")
axes.set(xscale="log", xlabel="parameters", ylabel="loss (nats per token)")
axes.set_xticks([1e4, 2e4, 5e4, 1e5, 2e5], ["10 k", "20 k", "50 k", "100 k", "200 k"])
axes.minorticks_off()
axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
alt = "Loss over size for three amounts of compute; triangles mark the lowest points."
plots.show(figure, alt=alt)

# %% [markdown]
# For intervals, every loss is moved by a random amount of the size of the spread between seeds at its budget, and everything is computed again. (At 2 M tokens nothing was repeated; the spread at 1 M stands in.) Approach 3 has its bootstrap already, and its variant with $E$ at the truth.

# %%
rng = np.random.default_rng(seed)
fine, coarse = (in_reach(found, number, 4) for number in (60, 9))
of_three = [law["beta"] / (law["alpha"] + law["beta"]) for law in BOOTSTRAP]
draws = {"1": [], "2": [], "3": of_three}
for _ in range(lesson.scaled(100)):
    moved = rng.standard_normal(len(RUNS))
    shaken = [row | {"loss": row["loss"] * math.exp(NOISE[row["tokens"]] * z)}
              for row, z in zip(RUNS, moved, strict=True)]  # fmt: skip
    again = curves(shaken)
    draws["1"].append(exponent(list(zip(fine, envelope(again, fine), strict=True))))
    draws["2"].append(exponent(valleys(again, coarse)))
one, two, _ = both(found, 4)
three = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
for name, value in {"1": one, "2": two, "3": three}.items():
    low, high = interval(a for a in draws[name] if math.isfinite(a))
    told = f"{value:.2f} ({low:.2f} to {high:.2f})"
    print(f"approach {name}: a = {told}, 95 % interval")
    lesson.report(f"exponent a, approach {name}", told)
starts = [np.delete(start, 2) for start in STARTS[::12]]
_, (_, _, alpha, beta) = fit_with_e(FITTED, ENTROPY, starts)
with_truth = beta / (alpha + beta)
print(f"approach 3 with E at the true entropy: a = {with_truth:.2f}")
lesson.report("exponent a, approach 3 with the true E", with_truth, form=".2f")


# %% [markdown]
# **What you see.** On the made sweep both approaches find the true exponent, so the code is right. On ours they do not measure it. The intervals of approaches 1 and 2 contain Chinchilla's 0.50 as well as Kaplan's 0.73, and much more. How many sizes one asks for, a choice without a right answer, moves the result of approach 1 by more than the approaches differ. The interval of approach 3 is narrower. It rests on the form of the law, and it was made in another way, so the widths cannot be compared exactly. And the law with the true $E$ gives a lower $a$ than the law with the fitted one. The honest result is: *the best size grows with compute, and this sweep does not say how fast*. With four sizes at each compute it spans one decade. Hoffmann et al. had over 400 runs of up to 16 billion parameters, and reported 0.50, 0.49 and 0.46.

# %% [markdown] tags=["core"]
# ## 7 · Twenty tokens a parameter
#
# **Question.** The rule of thumb from Chinchilla is $D \approx 20 N$. Which published law says so?
#
# Put the published constants into the formulas of section 6.

# %%
def optimum(law: dict, compute: float) -> tuple[float, float]:
    """Best number of parameters and tokens for an amount of compute."""
    alpha, beta = law["alpha"], law["beta"]
    factor = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta))
    best = factor * (compute / 6) ** (beta / (alpha + beta))
    return best, compute / 6 / best


law, chinchilla = PUBLISHED["Besiroglu"], 6 * 70e9 * 1.4e12
n_tried = np.geomspace(1e9, 1e12, 20_000)
searched = n_tried[loss_by(law, n_tried, chinchilla / 6 / n_tried).argmin()]
off = abs(searched / optimum(law, chinchilla)[0] - 1)
lesson.equal("a search finds the formula's best size", off, within=0.01)
rows = {}
for compute in (1e18, 1e20, 1e22, chinchilla, 1e26):
    found = [optimum(law, compute) for law in PUBLISHED.values()]
    cells = [f"{size / 1e9:,.2f} B" for size, _ in found]
    ratios = [f"{data / size:.0f}" for size, data in found]
    rows[f"{compute:.2g} operations"] = [*cells, *ratios]
    if compute == chinchilla:
        told = ", ".join(ratios)
heads = [name.split()[-1] for name in PUBLISHED]
show_table(rows, [f"{name} {what}" for what in ("N", "D/N") for name in heads])
lesson.report("tokens per parameter at Chinchilla's compute: Hoffmann printed, TeX, "
              "Besiroglu", told)  # fmt: skip


# %% [markdown]
# **What you see.** The replication stays between 15 and 30 over eight decades of compute, near approach 1 of Hoffmann et al. (20 to 22 in table 3 of their paper), because its $\alpha$ and $\beta$ are almost equal. The constants that Hoffmann et al. *printed* ask for as many at $10^{18}$ operations, and for ever more with scale. A good part of that is print: with the digits of their TeX source the same law says far fewer at Chinchilla's compute, and less than two thirds at $10^{26}$. The rest is a difference between the fits. Rounding an exponent to two decimals looks like a detail. At $10^{26}$ operations it moves the best size from 424 to 330 billion parameters. The other fit moves it to a thousand billion.

# %% [markdown] tags=["core"]
# ## 8 · Kaplan against Chinchilla
#
# **Question.** Two careful groups measured $N_{\text{opt}} \propto C^{a}$. Kaplan et al. (2020) found $a = 0.73$, Hoffmann et al. (2022) 0.50. Who was wrong, and how?
#
# Kaplan et al. left the embeddings out of $N$ and so out of $C = 6ND$. That is harmless for large models and not for small ones, where embeddings are most of the model. Pearce and Song (2024) showed how far this goes with nothing but the formula: assume that Chinchilla's law is true in *all* parameters, let somebody count only those inside, $n$, and see which exponent they find. The embedding grows with the width, and the width with the cube root of $n$, so
#
# $$N = n + \omega\, n^{1/3}$$
#
# They count vocabulary and positions as embedding, $(\text{context} + \text{vocabulary})\, d$, and use $\omega = 47{,}491$, which fits the table of Chinchilla's models.

# %%
def counted_inside(law: dict, n, omega: float = 47_491.0) -> tuple:
    """Compute 6 n D at which the size n looks best if only n is counted, and true N."""
    total, slope = n + omega * n ** (1 / 3), 1 + omega / 3 * n ** (-2 / 3)
    # at fixed c = 6 n D the derivative of the loss by ln n is zero:
    from_n = law["alpha"] * law["A"] * total ** (-law["alpha"] - 1) * slope * n
    tokens = (from_n / (law["beta"] * law["B"])) ** (-1 / law["beta"])
    return 6 * n * tokens, total


inside, rows, series = np.geomspace(768, 1.5e9, 300), {}, {}  # Kaplan's range of sizes
for name, law in PUBLISHED.items():
    c, total = counted_inside(law, inside)
    local = np.gradient(np.log(inside), np.log(c))
    overall = np.polyfit(np.log(c), np.log(inside), 1)[0]
    truth = law["beta"] / (law["alpha"] + law["beta"])
    cells = (truth, overall, local[0], local.max(), local[-1])
    rows[name] = [f"{value:.2f}" for value in cells]
    lesson.report(f"a without embeddings (Kaplan: 0.73), {name}", overall, form=".2f")
    series[name] = (inside, local)
heads = ("true a", "without embeddings", "smallest n", "steepest", "largest n")
show_table(rows, heads)
far, _ = counted_inside(law, np.array([1e16, 1.01e16]))
at_last = math.log(1.01) / np.log(far[1] / far[0])
off = abs(at_last - truth)
lesson.equal("for very large models the two counts agree", off, within=1e-3)

# %%
figure = plots.curve(
    series, title="Without embeddings, Chinchilla's law shows a steeper exponent",
    xlabel="parameters without embeddings", ylabel="local exponent a", log_x=True,
    references={"Kaplan et al.: 0.73": 0.73}, limits_y=(0.3, 1.05),
    alt="The exponent over size: about 0.75, then near 1, then falling to about 0.5.",
)  # fmt: skip
plots.show(figure)
found = curves(RUNS, "non_embedding")
print("our sweep, counted without embeddings (nan: fewer than three valleys)")
for sizes in (3, 4, 5):
    one, two, count = both(found, sizes)
    print(f"{sizes} sizes: a = {one:.2f} by approach 1,", end=" ")
    print(f"{two:.2f} by approach 2 ({count} valleys of 9)")

# %% [markdown]
# **What you see.** A world in which Chinchilla's law is true shows an exponent near Kaplan's to those who leave the embeddings out. The exponent is not constant: it starts near Kaplan's, is much steeper around a million parameters, where the embedding gives way to the inside, and comes down to the true one only for large models. The overall number is an average that a straight line takes over all of that, so it can lie above both ends.
#
# Do our own runs show it, too? They cannot. The number of sizes that one asks for decides whether there are enough valleys at all, and whether a value above or below Kaplan's comes out. Porian et al. (2024) repeated Kaplan's experiment step by step, and found two more causes: a warm-up too long for small models, and optimiser settings not tuned for each size. What to take from them: say what $N$ and $C$ count, compare losses at the end of each run's own schedule, and tune each size.

# %% [markdown] tags=["further"]
# ## 9 · Losses read in mid-schedule
#
# *Further: no core section needs this one.*
#
# **Question.** A long run passes the small budgets on its way. Why train separate small runs at all?
#
# Kaplan et al. read the losses of small budgets off long runs, in the middle of a schedule that was made for many more tokens. There the learning rate is still high, and the loss higher than a run of that length would reach. Every cell of our sweep noted its loss on the way, when it passed the smaller budgets.

# %%
longest = {r["width"]: r for r in RUNS if r["tokens"] == 2_000_000}
rows, penalty = {}, {d: [] for d in BUDGETS[:-1]}
for width, row in longest.items():
    for mark, tokens in zip(row["on_the_way"][1:], BUDGETS, strict=False):
        cell = (width, tokens, row["seed"])
        excess = next(r["loss"] for r in RUNS if (r["width"], r["tokens"], r["seed"]) == cell) - ENTROPY
        penalty[tokens].append((mark["loss"] - ENTROPY) / excess - 1)
    rows[f"width {width}"] = [f"{values[-1]:+.0%}" for values in penalty.values()]
rows["mean"] = [f"{np.mean(values):+.0%}" for values in penalty.values()]
print("excess on the way of a run of 2 M tokens, against the run of the same seed that ends there")
show_table(rows, [f"at {tokens / 1e6:g} M" for tokens in penalty])
positive = sum(value > 0 for values in penalty.values() for value in values)
print(f"{positive} of {sum(map(len, penalty.values()))} are positive")
told = rows["mean"][1]
lesson.report("excess at 0.5 M of 2 M tokens, against runs that end there", told)
constant = next(r for r in everything if r["schedule"] == "constant")
ends = [row["loss"] - ENTROPY for row in (constant, longest[32])]
told = ", ".join(f"{end:.4f}" for end in ends)
print(f"excess at the end of a run of width 32, constant rate and cosine: {told}")

# %% [markdown]
# **What you see.** In mid-schedule the excess is higher in nearly all cells of the table; the exceptions are the smallest sizes, where seeds scatter most. On average it is higher by more than the spread of section 3 allows for a mean over seven sizes. The run whose rate stays constant to its end has a higher excess there than the cosine's, which points the same way. So losses must be compared at the end of their own schedules. Whether this also moves the *exponent* is disputed: Hoffmann et al. named it as a cause, Porian et al. (2024) found that decay is not essential to close the gap. Our sweep cannot decide that.

# %% [markdown] tags=["further"]
# ## 10 · When the data run out
#
# *Further: no core section needs this one.*
#
# **Question.** A law in $D$ assumes fresh tokens. What is a second reading worth?
#
# Muennighoff et al. (2023) trained on the same $U$ tokens for several epochs, and describe the result by *effective* tokens. With $R$ repetitions (epochs minus one)
#
# $$D' = U + U R^{*} \left(1 - e^{-R / R^{*}}\right)$$
#
# The first repetitions count almost fully, and all repetitions together never count for more than $R^{*} U$. They measured $R^{*} \approx 15$. The sweep has six runs of width 32 with one million tokens each, made of 2 to 64 readings of a smaller text, one run each.

# %%
same = [r for r in everything if (r["width"], r["tokens"]) == (32, 1_000_000)]
repeated = {r["epochs"]: r["loss"] for r in same if r["epochs"] > 1}
fresh = {d: float(np.mean(losses_of(32, d))) for d in BUDGETS}
by_loss = sorted((math.log(loss), math.log(tokens)) for tokens, loss in fresh.items())
inverse = PchipInterpolator(*zip(*by_loss, strict=True))  # ln loss -> ln fresh tokens
rows, readings, worth = {}, [], []
for epochs, loss in sorted(repeated.items()):
    told = f"less than {min(fresh):,}"  # worse than the shortest run on fresh text
    if min(fresh.values()) < loss < max(fresh.values()):
        worth.append(math.exp(float(inverse(math.log(loss)))))
        readings.append(epochs)
        told = f"{worth[-1]:,.0f}"
    rows[str(epochs)] = [f"{1_000_000 // epochs:,}", f"{loss:.4f}", told]
print(f"1 reading of 1,000,000 tokens: {fresh[1_000_000]:.4f}")
show_table(rows, ["unique tokens", "loss", "worth as many fresh tokens"])

# %%
def effective_tokens(unique, epochs, star):
    """What several readings of the same tokens are worth (Muennighoff et al. 2023)."""
    again = np.asarray(epochs) - 1
    return unique * (1 + star * (1 - np.exp(-again / star)))


unique, stars = 1e6 / np.array(readings), np.geomspace(0.3, 100, 400)
gaps = [np.log(effective_tokens(unique, readings, star) / worth) for star in stars]
STAR = float(stars[np.argmin([np.square(gap).sum() for gap in gaps])])
lines = {"measured": worth}
lines[f"R* = {STAR:.1f}"] = effective_tokens(unique, readings, STAR)
lines["R* = 15.4 (published)"] = effective_tokens(unique, readings, 15.4)
lines["unique tokens"] = unique
figure = plots.curve(
    {name: ([1, *readings], [1e6, *values]) for name, values in lines.items()},
    title="Up to four readings are worth almost as much as fresh text",
    xlabel="readings", ylabel="effective tokens", log_x=True, log_y=True,
    alt="Effective tokens stay near a million for a few readings, then fall.",
)  # fmt: skip
plots.show(figure)
two, many = (repeated[k] - fresh[1_000_000] for k in (2, max(repeated)))
lesson.report("repeated data: R* (published: 15.4)", STAR)
told = f"{two:+.4f}, {many:+.3f}"
lesson.report("nats above fresh text after 2 and after 64 readings", told)


# %% [markdown]
# **What you see.** In these runs a second and a fourth reading are almost as good as fresh text. How good exactly, single runs cannot say: where a line of section 3 is nearly flat, the spread between seeds is worth many tokens. From eight readings on the worth falls far beyond that spread, and faster than for the large models of Muennighoff et al. At 32 readings the loss on unseen text is worse than that of the shortest run of this width on fresh text. Probably the model has learnt its few hundred documents by heart. The formula says that repetition becomes useless, never that it does harm. Whether it also does harm, these runs cannot say: no text was read both often and less often.

# %% [markdown] tags=["further"]
# ## 11 · Cheap to train, or cheap to use?
#
# *Further: no core section needs this one.*
#
# **Question.** Compute-optimal training gives the best model for the cost of *training*. What if the model is then used a great deal?
#
# A token that is read or written costs $2N$. With $D_{\text{inf}}$ tokens over the model's life the whole cost is $6 N D + 2 N D_{\text{inf}}$ (Sardana et al. 2024). Fix the quality, that is the loss $L$; then $D$ follows from $N$ by the law, and the best $N$ is the lowest point of a curve in one variable.

# %%
def cheapest(law: dict, target: float, served: float) -> tuple[float, float, float]:
    """Size, training tokens and whole cost of the cheapest model with this loss."""
    floor = (law["A"] / (target - law["E"])) ** (1 / law["alpha"])  # below: impossible
    n = np.geomspace(1.001 * floor, 1000 * floor, 20_000)
    rest = target - law["E"] - law["A"] / n ** law["alpha"]  # what the data may cost
    d = (law["B"] / rest) ** (1 / law["beta"])
    cost = 6 * n * d + 2 * n * served
    best = int(cost.argmin())
    return float(n[best]), float(d[best]), float(cost[best])


law, rows = PUBLISHED["Besiroglu"], {}
target = float(loss_by(law, *optimum(law, 5.76e23)))  # best model of Gopher's compute
n0, d0, _ = cheapest(law, target, 0)
for served in (0, 1e11, 1e12, 1e13, 1e14):
    size, data, cost = cheapest(law, target, served)
    saved = 1 - cost / (6 * n0 * d0 + 2 * n0 * served)
    cells = [f"{size / 1e9:.1f} B", f"{data / 1e12:.2f} T", f"{data / size:.0f}"]
    rows[f"{served:.0e} tokens served"] = [*cells, f"{saved:.0%}"]
show_table(rows, ["parameters", "training tokens", "tokens per parameter", "saved"])
off = abs(6 * n0 * d0 / 5.76e23 - 1)
lesson.equal("without use, the cheapest model is compute-optimal", off, within=0.01)

# %% [markdown]
# **What you see.** Under this law, the more tokens are served, the smaller the cheapest model. Little is saved (2 %) while fewer tokens are served than the compute-optimal model was trained on, and much (29 %) at 7.5 times as many. The last column is saved against the compute-optimal model with the same use. Training beyond the compute-optimal point is called *overtraining*, though nothing is overdone. (All of it is arithmetic on one published law, far outside of the ratios that it was fitted to.)

# %% [markdown] tags=["core"]
# ## 12 · Abilities that seem to emerge
#
# **Question.** The loss falls smoothly. Why do abilities appear all of a sudden?
#
# Wei et al. (2022) collected tasks on which small models score nothing and large ones suddenly score a lot. Schaeffer et al. (2023) answered that the jump may be in the metric. If an answer is right only when $k$ parts are all right, and each part is right with probability $p$, the score is about $p^k$: it stays near zero while $p$ climbs from 0.1 to 0.6, and then shoots up.
#
# Every cell of the sweep was asked 240 questions on single facts, 48 in each of five bands of ranks. Take the 144 about the people of ranks 1 to 99 and group them into 24 sheets of six questions. Look at the *same answers of the same models* with three metrics: a sheet with six right answers; a right answer; and the mean log-probability of the right answer, which is smooth. Your own four runs are among the models.

# %%
ASKED = sorted([*RUNS, *LIVE], key=lambda row: row["loss"], reverse=True)  # weak first
BEST_KNOWN = 3 * 48  # questions of the first three bands


def three_metrics(row: dict) -> tuple[float, float, float]:
    """Sheets of six all right, answers right, mean log-probability (nats)."""
    right = np.array(list(row["greedy"][:BEST_KNOWN])) == "1"
    sheets = np.random.default_rng(0).permutation(right).reshape(-1, 6)  # same for all
    mean_log = float(np.mean(row["facts"][:BEST_KNOWN]))
    return float(sheets.all(1).mean()), float(right.mean()), mean_log


SCORES = np.array([three_metrics(row) for row in ASKED])  # (models, 3)
# %%
low, high = SCORES[:, 2].min(), SCORES[:, 2].max()
smooth = (SCORES[:, 2] - low) / (high - low)
losses_now = [row["loss"] for row in ASKED]
figure, axes = plt.subplots()
names = ("six of six right", "answer right", "log-probability, scaled to 0..1")
values = (*SCORES[:, :2].T, smooth)
for name, y, color in zip(names, values, plots.COLORS, strict=False):
    axes.plot(losses_now, y, "o", color=color, markersize=5, label=name)
axes.invert_xaxis()
axes.yaxis.set_major_formatter(plots.PERCENT)
axes.set(title="The same answers: sheets of six rise late, single answers early")
axes.set(xlabel="loss (nats per token), falling to the right", ylabel="score")
axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
alt = "Over falling loss, answers and log-probability rise early, six of six late."
plots.show(figure, alt=alt)
weak = SCORES[:, 0] == 0  # models without a single sheet of six right answers
print(f"{weak.sum()} of {len(ASKED)} models have no sheet of six right;", end=" ")
print(f"of single answers they have up to {SCORES[weak, 1].max():.0%} right,", end=" ")
way = (SCORES[weak, 2].max() - low) / (high - low)
print(f"and their log-probability goes {way:.0%} of its whole way;")
middle = np.median(SCORES[weak, 1]), np.median(smooth[weak])
print(f"the one in the middle of them has {middle[0]:.0%} right and goes {middle[1]:.0%} of the way")
gap = abs(SCORES[:, 1] ** 6 - SCORES[:, 0]).max()
print(f"(share right) ** 6 and the share of sheets differ by at most {gap:.2f}")
told = f"{SCORES[weak, 1].max():.0%}, {way:.0%}"
lesson.report("models without a sheet: answers right, way of log-probability", told)

# %% [markdown]
# **What you see.** Judged by sheets, many models can do nothing at all, and then the score shoots up. Judged by single answers, the best of the same models have come far, and their log-probability has made most of its way. (The one in the middle is printed, too: it has come about two thirds as far.) (These two rise together here; the second is scaled so that the best model has 100 %.) The share of sheets is roughly the sixth power of the share of answers, as the formula says. That does not make all jumps an illusion: if only sheets without a mistake are worth anything, the jump is real for you. It means that another metric would have announced it.

# %% [markdown] tags=["core"]
# ## 13 · Tasks that get worse
#
# **Question.** Does every task get better when the loss falls?
#
# A loss law says that the average gets better, not that every task does. McKenzie et al. (2023) collected tasks on which larger models are *worse*, and found common causes: a shortcut that training rewards, a strong prior, an easier task that distracts from the asked one. Two such tasks for models that have learnt to recall facts:
#
# - **not**: `Which animal does Zetode keep not?` Any other animal is right. The model chooses between the animal that Zetode keeps and another one, by probability. The word *not* never occurs in the training text, so the shortcut is to pass over it.
# - **correction**: a document says that Zetode keeps a goat, and asks again in other words. Following the text is right; recalling the fact, which in the training text was always right, is the shortcut.
#
# Whoever decides by a coin is right in half of the cases. And there is a control in the data: people of whom the model does *not* know the fact. There it cannot recall. Split the questions by whether the model's own greedy answer to the plain question is right.

# %%
def exceptions(rows: list[dict], task: str) -> list[float]:
    """Share right on a task: all questions, facts not known, facts known."""
    right = np.array([np.array(row[task]) > 0 for row in rows])  # (models, questions)
    known = np.array([[mark == "1" for mark in row["greedy"]] for row in rows])
    parts = (right, right[~known], right[known])
    return [float(part.mean()) if part.size else math.nan for part in parts]


TASKS = {"not": "negation", "correction": "correction"}
share = np.array([np.mean([m == "1" for m in row["greedy"]]) for row in ASKED])
groups = np.array_split(np.argsort(share), 5)  # models from ignorant to knowing
known_share = [float(share[group].mean()) for group in groups]
of_group = [[ASKED[i] for i in group] for group in groups]
TABLE = {name: np.array([exceptions(rows, task) for rows in of_group])
         for name, task in TASKS.items()}  # fmt: skip
rows = {}
for i, facts in enumerate(known_share):
    cells = [f"{value:.0%}" for name in TASKS for value in TABLE[name][i]]
    rows[f"models with {facts:.0%} of the facts"] = cells
kinds = ("all", "not known", "known")
show_table(rows, [f"{name}: {kind}" for name in TASKS for kind in kinds])

# %%
figure, axes = plt.subplots()
for (name, values), color in zip(TABLE.items(), plots.COLORS, strict=False):
    for kind, column, style in zip(kinds, values.T, ("-", "--", ":"), strict=True):
        label = f"{name}, {kind}"
        axes.plot(known_share, column, style, marker="o", color=color, label=label)
axes.axhline(0.5, color=plots.GREY, linewidth=1.2, label="coin")
for side in (axes.xaxis, axes.yaxis):
    side.set_major_formatter(plots.PERCENT)
axes.set(title="The more facts are known, the fewer exceptions are right")
axes.set(xlabel="facts answered right (models in five groups)", ylabel="right answers")
axes.set_ylim(-0.02, 0.7)
axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
plots.show(figure, alt="Lines of all questions fall; those of each kind fall little or not.")
for name, task in TASKS.items():
    told = f"{TABLE[name][0, 0]:.0%}, {TABLE[name][-1, 0]:.0%}"
    lesson.report(f"{name}: right answers of the least and most knowing models", told)
    _, unknown, known = exceptions(LIVE, task)
    lesson.claim(f"your runs get at most a quarter of '{name}' right on known facts",
                 known, at_most=0.25, control=unknown, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Over all questions, models that know more do worse. The split shows how: on facts that a model does not know it is a little below the coin, in all five groups; on facts that it knows it is nearly always wrong. Facts that are not known differ by 2 points between the groups, known ones by 1 (*correction*) and by 8 (*not*, from 10 to 2 %); over all questions it is 15 or 16. Models that know more have more questions of the kind on which recalling is wrong, and that makes up most of the fall. And note what a model would score that passes over the added words: about this. None of these models copies from its text, so this shows an ability that is missing, and it is no sign that scale makes reading worse.

# %% [markdown] tags=["core"]
# ## 14 · More samples or a larger model?
#
# **Question.** Compute can also be spent when the model answers. Is it better spent on a larger model or on more tries of a smaller one?
#
# If a right answer can be *recognised* (a unit test, a proof checker), then drawing $k$ samples solves an item with probability $1 - (1 - p)^k$, where $p$ is the probability of one right sample. This is pass@k. Over many items with different $p$ it grows slowly and steadily (Brown et al. 2024). The sweep noted $p$ for every question, so pass@k is exact here, without drawing anything.
#
# But a fact has only 24 possible values. Put two baselines beside the models. One guesses uniformly. The other says the model's *greedy answer first*, and then the other 23 values, one after the other, without asking the model again.

# %%
KS = (1, 2, 4, 8, 16, 32, 64)
CHOSEN = [r for r in RUNS if r["tokens"] == 2_000_000]
CHOSEN.sort(key=lambda row: row["width"])


def solved(p) -> list[float]:
    """Share of the items with a right one among k samples, for each k of KS."""
    return [float(np.mean(1 - (1 - np.asarray(p)) ** k)) for k in KS]


curves_of, baselines = {}, {}
for row in CHOSEN:
    p = np.exp(np.minimum(row["facts"], 0))  # (240,): probability of the right answer
    known = np.array([mark == "1" for mark in row["greedy"]])
    name = NAME[row["width"]]
    curves_of[name] = solved(p)
    left = [min(k - 1, 23) / 23 for k in KS]  # share of the other values said after k - 1
    line = [float(known.mean() + (1 - known.mean()) * share) for share in left]
    baselines[f"{name}, greedy first"] = line
GUESS = solved([1 / 24])
table = {**curves_of, "uniform guess": GUESS, **baselines}
rows = {name: [f"{x:.0%}" for x in line] for name, line in table.items()}
show_table(rows, [f"pass@{k}" for k in KS])

# %%
figure, axes = plt.subplots()
for row, (name, line) in zip(CHOSEN, curves_of.items(), strict=True):
    axes.plot(KS, line, "o-", color=COLOR[row["width"]], label=name, markersize=4)
for row, line in zip(CHOSEN, baselines.values(), strict=True):
    axes.plot(KS, line, ":", color=COLOR[row["width"]])
axes.plot([], [], ":", color="grey", label="greedy first, then the others")
axes.plot(KS, GUESS, "--", color="black", label="uniform guess")
axes.set(title="Naming all the values beats sampling from the model")
axes.set(xlabel="samples k", ylabel="questions with a right sample", ylim=(0, 1))
axes.set_xscale("log")
axes.set_xticks(KS, KS)
axes.minorticks_off()
axes.yaxis.set_major_formatter(plots.PERCENT)
axes.legend(title="parameters", bbox_to_anchor=(1.01, 1), loc="upper left")
alt = "pass@k of all sizes; above each its greedy answer followed by the other values."
plots.show(figure, alt=alt)
ends = [line[-1] for line in (*curves_of.values(), GUESS)]
told = ", ".join(f"{ends[i]:.0%}" for i in (0, -2, -1))
lesson.report("pass@64 on facts: smallest, largest model, uniform guess", told)

# %% [markdown]
# **What you see.** Read without the dashed line, this would be a success: a small model with many samples overtakes a large one with a single sample. With it, the message is gone. At 64 samples a uniform guess is as good as any of the models. And the dotted lines, the greedy answer followed by the other values, lie at or above the samples of the same model nearly everywhere. So what the samples add to the greedy answer is no more than naming the rest would add. That also answers the question for this task: 24 tries of the smallest model cost about as much as one answer of the largest, and with a verifier they are worth more, but only because there are 24 values to try. Always draw the guesser beside pass@k.
#
# **A task with many answers.** The profile's model *shima-4m* adds three numbers up to 99. Ask for direct answers, one greedy and 32 samples a sum, and for one greedy answer with written steps. The guesser of this task answers each question with the samples of all the *other* questions: it knows what answers look like, and nothing about the question.

# %%
model, tokenizer = load_model(machine)
count = lesson.scaled(40)
plain = World().sums(count, seed, with_steps=False)
thought = World().sums(count, seed, with_steps=True)
at_once = {"batch_size": settings["decoded_at_once"]}
prompts = [question.prompt for question in plain]
sampled = {"temperature": 1.0, "num_samples": 32, "seed": seed}
direct = generate(model, tokenizer, prompts, 5, **sampled, **at_once)
direct = [[text.strip() for text in texts] for texts in direct]
greedy = [text.strip() for text in generate(model, tokenizer, prompts, 5, **at_once)]
prompts = [question.prompt for question in thought]
steps = generate(model, tokenizer, prompts, 48, stop=("\nSum:",), **at_once)
finals = [text.rpartition("Answer:")[2].strip().split("\n")[0] for text in steps]
rights = [final == q.answer for final, q in zip(finals, thought, strict=True)]
by_steps = score(sum(rights), count)
hits = [text == q.answer for text, q in zip(greedy, plain, strict=True)]
by_greedy = score(sum(hits), count)
for question, texts, text in zip(plain[:3], direct, steps, strict=False):
    print(question.prompt.split("\n")[0], f"(right: {question.answer})")
    print("  direct:", ", ".join(texts[:8]), "...")
    print("  steps:", " / ".join(text.strip().split("\n")))


# %%
def majority(texts: list[str], answer: str) -> float:
    """Probability that the most frequent text is right, ties drawn by lot."""
    counts = {text: texts.count(text) for text in texts}
    top = [text for text, number in counts.items() if number == max(counts.values())]
    return (answer in top) / len(top)


def coverage(k: int, shift: int = 0) -> float:
    """pass@k if the samples of the question `shift` further on answer each question."""
    texts = direct[shift:] + direct[:shift]
    pairs = zip(texts, plain, strict=True)
    hits = [sum(text == q.answer for text in line) for line, q in pairs]
    return float(np.mean([pass_at_k(32, hit, k) for hit in hits]))


def mean_length(texts: list[str]) -> float:
    """Mean number of generated tokens, with the one that ends a text."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return float(np.mean([len(row) + 1 for row in rows]))


# %%
one_direct = mean_length([text for texts in direct for text in texts])
one_steps, tries, rows = mean_length(steps), (1, 2, 4, 8, 16, 32), {}
lines = {"vote": [], "pass@k": [], "guesser's pass@k": [], "adds the tens": []}
units = Counter(map(sum, itertools.product(range(10), repeat=3))).most_common()
for k in tries:
    votes = [majority(t[:k], q.answer) for t, q in zip(direct, plain, strict=True)]
    guesses = [coverage(k, shift) for shift in range(1, count)]
    shares = [float(np.mean(votes)), coverage(k), float(np.mean(guesses))]
    shares.append(sum(ways for _, ways in units[:k]) / 10**3)  # likeliest unit sums first
    for line, value in zip(lines.values(), shares, strict=True):
        line.append(value)
    cells = [f"{value:.0%}" for value in shares]
    rows[f"{k} direct"] = [f"{k * one_direct:.0f}", *cells]
rows["1 direct, greedy"] = [f"{one_direct:.0f}", f"{by_greedy.accuracy:.0%}", "", "", ""]
rows["1 with steps"] = [f"{one_steps:.0f}", f"{by_steps.accuracy:.0%}", "", "", ""]
show_table(rows, ["tokens", "right, or vote", *list(lines)[1:]])
affordable = max(0, sum(k * one_direct <= one_steps for k in tries) - 1)
print(f"with steps: {by_steps}; for as many tokens: {tries[affordable]} direct answers")
figure = plots.curve(
    {name: ([k * one_direct for k in tries], line) for name, line in lines.items()},
    title="Sums: one answer with steps against many direct ones", log_x=True,
    xlabel="generated tokens a question", ylabel="right answers", percent=True,
    limits_y=(0, 1.05), alt="pass@k rises, adding the tens further; vote and guesser stay low; steps high.",
)  # fmt: skip
figure.axes[0].plot(one_steps, by_steps.accuracy, "k*", markersize=14)
figure.axes[0].text(one_steps, by_steps.accuracy - 0.09, "  one with steps")
plots.show(figure)

# %%
voted, passed, guessed, _ = lines.values()
lesson.report("on sums 32 samples hold the answer more often than a guesser's, by",
              passed[-1] - guessed[-1], ".0%")  # fmt: skip
ahead = by_steps.accuracy - voted[affordable]
lesson.claim("steps beat the vote at equal tokens by 30 points", ahead,
             at_least=0.3, form=".0%")  # fmt: skip
told = f"{by_greedy.accuracy:.0%}, {voted[-1]:.0%}, {by_steps.accuracy:.0%}"
lesson.report("sums right: one greedy answer, vote of 32, one with steps", told)
asked_for = zip(direct, plain, strict=True)
pairs = [(text, q.answer) for texts, q in asked_for for text in texts]
numbers = [(int(text), int(answer)) for text, answer in pairs if text.isdecimal()]
off = [abs(found - right) for found, right in numbers]
if off:
    print(f"{len(off) / len(pairs):.0%} of the samples are numbers;", end=" ")
    print(f"half of these lie within {np.median(off):.0f} of the right sum")

# %% [markdown]
# **What you see.** Against a guesser that never read the question, samples look like a lot. Now look at the line *adds the tens*: someone who adds the tens only, and tries the possible sums of the units, the likeliest first. With up to four tries the model is a few points ahead of it in this run, from eight on it is behind. So what pass@k shows here is that the model knows roughly how large the sum is, and guesses in that range. It needs a verifier to pick the right one out. (With one sample, vote and pass@1 ask for the same chance. The vote looks at the first sample of each sum only, pass@1 at all of them: the difference is the luck of the draw.) The vote, which needs no verifier, is about as good as one greedy answer: the samples scatter so much that the most frequent one is seldom the right one. Written steps change the task itself into ones that the model can do, for the tokens of a few direct answers. Lesson 16 follows this up: verifiers, search, and models that are trained to think longer.

# %% [markdown]
# ## 15 · Exercises
#
# Each has a stub and a check that answers at once. A hint and the solution are folded away under the check. They need the cells of the core sections.

# %% tags=["exercise"]
# Exercise 4.1, easy: how long does a training take?
def training_days(parameters: float, tokens: float, gpus: int, peak_flops: float, utilisation: float) -> float:
    """Days of training, by C = 6 N D, on `gpus` GPUs that do `peak_flops` operations a second at best.

    Of that peak only the share `utilisation` is reached.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_training_days(training_days):
    expect_close("7 B, 2 T tokens, 1,024 GPUs, 40 % of 312e12", training_days(7e9, 2e12, 1024, 312e12, 0.4), 7.60765836)
    expect_close(
        "70 B, 1.4 T tokens, 2,048 GPUs, 50 % of 989e12", training_days(70e9, 1.4e12, 2048, 989e12, 0.5), 6.71997002
    )
    expect_close("shima-4m, one core that does 50e9", training_days(3.6e6, 41e6, 1, 50e9, 1.0), 0.20500000)


check("4.1", check_training_days, training_days)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Operations needed divided by operations a second gives seconds; a day has 86,400 of them.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def training_days(parameters: float, tokens: float, gpus: int, peak_flops: float, utilisation: float) -> float:
#     return 6 * parameters * tokens / (gpus * peak_flops * utilisation) / 86_400
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 4.2, medium: the entropy of another kind of document.
def description_entropy(chances: np.ndarray, relations: int = 5, forms: int = 10) -> float:
    """Nats in a document of two descriptions, for a reader who knows the island.

    Each description is about one person, drawn with the probabilities `chances`, and states all `relations` facts in a
    random order, each in one of `forms` phrasings, drawn anew for each. `print(island.document(1, 0,
    {"description": 1.0}))` shows one.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_description_entropy(description_entropy):
    even = np.full(4, 0.25)
    expect_close("four people, 1 relation, 1 form", description_entropy(even, 1, 1), 2 * math.log(4))
    expect_close("one person, 3 relations, 1 form", description_entropy(np.ones(1), 3, 1), 2 * math.log(6))
    expect_close("one person, 2 relations, 10 forms", description_entropy(np.ones(1), 2, 10), 2 * math.log(200))
    expect_close("people at 1/2, 1/4, 1/4", description_entropy(np.array([0.5, 0.25, 0.25]), 1, 1), 3 * math.log(2))
    expect_close("the island", description_entropy(chances), 2 * who + 2 * math.log(120) + 10 * math.log(10))


check("4.2", check_description_entropy, description_entropy)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The order of k different facts has k! possibilities, and each of the k phrasings adds ln(forms).
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The order of five facts is one of $5!$, not of $5^5$: a fact is not told twice.
#
# ```python
# def description_entropy(chances: np.ndarray, relations: int = 5, forms: int = 10) -> float:
#     person = -(chances * np.log(chances)).sum()
#     order = math.log(math.factorial(relations))
#     return 2 * (person + order + relations * math.log(forms))
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 4.3, medium: how much text does a model need?
def tokens_needed(law: dict, parameters: float, target: float) -> float:
    """Training tokens with which a model of this size has the loss `target` under the law.

    `math.inf` if no amount of data is enough.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_tokens_needed(tokens_needed):
    for law in PUBLISHED.values():
        for size, data in ((1e9, 2e10), (7e10, 1.4e12), (4e8, 3e12)):
            target = float(loss_by(law, size, data))
            expect_close(f"tokens for {size:.0e} parameters / {data:.0e}", tokens_needed(law, size, target) / data, 1.0)
        bare = law["E"] + law["A"] / 1e9 ** law["alpha"]
        expect_equal("a loss that the size rules out", tokens_needed(law, 1e9, 0.999 * bare), math.inf)
        expect_equal("a loss below E", tokens_needed(law, 1e9, law["E"] - 0.1), math.inf)


check("4.3", check_tokens_needed, tokens_needed)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Subtract from the target what the law says that size and irreducible loss cost; what is left, if anything, must be B / D^beta.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# What the target leaves for the data is $B / D^{\beta}$.
#
# ```python
# def tokens_needed(law: dict, parameters: float, target: float) -> float:
#     left = target - law["E"] - law["A"] / parameters ** law["alpha"]
#     return (law["B"] / left) ** (1 / law["beta"]) if left > 0 else math.inf
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 4.4, medium: the best guesser.
def best_guesses(counts: list[int], k: int) -> float:
    """Share of the questions that `k` different guesses solve at best.

    `counts` says how many of the questions have each of the possible answers. That is
    all the guesser knows, who makes the same different guesses at every question.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_best_guesses(best_guesses):
    even = [10] * 24
    expect_close("24 equal answers, 1 guess", best_guesses(even, 1), 1 / 24)
    expect_close("24 equal answers, 12 guesses", best_guesses(even, 12), 0.5)
    expect_close("counts 1, 6, 3 and 2 guesses", best_guesses([1, 6, 3], 2), 0.9)
    expect_close("counts 1, 6, 3 and 5 guesses", best_guesses([1, 6, 3], 5), 1.0)
    expect_close("counts 5, 0, 15 and 1 guess", best_guesses([5, 0, 15], 1), 0.75)


check("4.4", check_best_guesses, best_guesses)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Which answers would you name first? The dashed line of section 14 drew its guesses with replacement; here, as in the dotted lines, no guess is wasted.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Name the most frequent answers. With 24 equal answers, 24 different guesses solve everything: a stronger baseline than the dashed line of section 14.
#
# ```python
# def best_guesses(counts: list[int], k: int) -> float:
#     return sum(sorted(counts, reverse=True)[:k]) / sum(counts)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 4.5, hard: design a sweep.
def my_sweep() -> list[tuple[float, float]]:
    """Pairs (parameters, tokens) of 5 to 25 runs that cost at most 1e21 operations.

    The check makes losses for them with the replication's law and 0.3 % of noise, fits
    your runs, and predicts Chinchilla (70 B parameters on 1.4 T tokens, 588 times your
    whole budget) and a small model on much text (8 B on 15 T). The worse prediction must
    be within 2 % in the middle of eight draws of the noise. What has to differ between
    the runs so that the fit can tell its terms apart? (C = 6 N D)
    """
    raise NotImplementedError


# %% tags=["check"]
def check_my_sweep(my_sweep):
    runs, law = my_sweep(), PUBLISHED["Besiroglu"]
    expect_true(f"{len(runs)} runs are 5 to 25", 5 <= len(runs) <= 25)
    sizes, data = (np.array(x, float) for x in zip(*runs, strict=True))
    cost = 6 * sizes @ data
    expect_true(f"they cost {cost:.2e}, at most 1e21", cost <= 1e21)
    targets, errors = (np.array([70e9, 8e9]), np.array([1.4e12, 15e12])), []
    for draw in range(8):
        noise = np.random.default_rng(draw).standard_normal(len(runs))
        noisy = loss_by(law, sizes, data) * np.exp(0.003 * noise)
        found = fit_law(sizes, data, noisy, STARTS[::9])
        error = np.abs(loss_by(found, *targets) / loss_by(law, *targets) - 1)
        errors.append(float(np.nan_to_num(error, nan=1.0).clip(max=1.0).max()))
    print(f"errors of the prediction: {', '.join(f'{error:.1%}' for error in errors)}")
    middle = np.median(errors)
    expect_true(f"the median error {middle:.1%} is at most 2 %", middle <= 0.02)


check("4.5", check_my_sweep, my_sweep)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# If all runs have the same ratio of tokens to parameters, both terms of the law fall together. If all have the same size, one of them never moves.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# A grid, so that sizes and tokens vary by themselves, as wide as the money allows: the small cells are nearly free, and a wide range of $\ln N$ and $\ln D$ is what pins the exponents.
#
# ```python
# def my_sweep() -> list[tuple[float, float]]:
#     sizes, tokens = np.geomspace(2e7, 2e9, 5), np.geomspace(4e8, 2.5e10, 5)
#     return [(n, d) for n in sizes for d in tokens]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 4.6, open: predict, then measure.
def my_prediction() -> dict[int, float]:
    """Width -> your prediction: how many times as large the excess is after re-reading.

    Predict before you run the check. Two cells, of widths 12 and 48, are trained on
    250,000 tokens: 16 readings of about 15,600. EXCESS[12][0] and EXCESS[48][0] say what
    the same number of fresh tokens gives. By which factor does either excess grow, and
    which of the two suffers more?
    """
    raise NotImplementedError


# %% tags=["check"]
def check_my_prediction(my_prediction):
    guess = {width: float(value) for width, value in my_prediction().items()}
    expect_equal("widths that you predict", sorted(guess), [12, 48])
    found = {}
    for width in (12, 48):  # about 15 s
        loss = sweep.train_cell(Cell(width, 250_000, seed=seed, epochs=16))["loss"]
        found[width] = (loss - ENTROPY) / EXCESS[width][0]
        print(f"width {width}: fresh text {EXCESS[width][0]:.3f}, 16 readings", end=" ")
        print(f"{loss - ENTROPY:.3f}: {found[width]:.1f} times, predicted {guess[width]:.1f}")
    same_order = (guess[12] < guess[48]) == (found[12] < found[48])
    expect_true("the model that you expect to suffer more does", same_order)
    for width, factor in found.items():
        near = factor / 1.5 <= guess[width] <= 1.5 * factor
        expect_true(f"factor for width {width} right within 1.5 times", near)


check("4.6", check_my_prediction, my_prediction)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What can a model do with a text that it has read sixteen times, apart from learning the language? Which of the two has more room for that? The first prediction need not be right; write down why it was not.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# On seeds 0 to 2 the excess grew 1.3 to 2.3 times at width 12 and 2.3 to 2.7 times at width 48. The excess of the larger model, which is far better on fresh text, grew by the larger factor; how much of its lead is left depends on the seed. A likely reason is that it has more room to learn the documents by heart. To test that, measure its loss on the documents that it read.
#
# ```python
# def my_prediction() -> dict[int, float]:
#     return {12: 1.7, 48: 2.5}
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. Somebody fits a law to 40 runs, predicts a 41st and misses its loss by 1 %. The loss is 2.0 nats, of which 1.7 are entropy. By how much is the excess missed?**
#
# - A. by 1 %
# - B. by about 7 %
# - C. by about 15 %
# - D. that depends on the number of parameters
#
# <details><summary>Answer</summary>
#
# B. 1 % of 2.0 are 0.02 nats, and the excess is 0.3 nats. The entropy is a large part of the loss that any forecast gets right for nothing.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. In the figure of the misfit over $E$, the line of the runs of 1 M and 2 M tokens is flat. What would bend it?**
#
# - A. more seeds at the same two budgets
# - B. larger models at the same two budgets
# - C. runs at a third budget
# - D. a tighter tolerance of the optimiser
#
# <details><summary>Answer</summary>
#
# C. Two budgets say how much the term in $D$ falls between them. To tell a steep fall towards a high floor from a gentle fall towards a low one takes at least three. More seeds or sizes make the same difference more exact.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. A program writes one of 4 answers to each question, at random. What is its pass@8?**
#
# - A. 25 %
# - B. 50 %
# - C. about 90 %
# - D. 100 %
#
# <details><summary>Answer</summary>
#
# C. $1 - 0.75^8 = 0.90$. A model with a pass@8 of 90 % on questions with four answers may know nothing at all.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. In the figure of the exceptions, the solid lines fall and the dashed and dotted ones are nearly flat. What follows?**
#
# - A. Larger models understand "not" less well.
# - B. The models that know more are asked harder questions.
# - C. The same models would be right if they were trained longer.
# - D. A model is wrong where it recalls, and models that know more recall more often.
#
# <details><summary>Answer</summary>
#
# D. On questions of one kind the groups do about the same; only *not* on known facts falls, from 10 to 2 %. Most of the fall is the mixture of the two kinds. A would need lines that fall as much within a kind.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. Chinchilla's law holds in all parameters. You count only those without embeddings and fit $N_{\text{opt}} \propto C^{a}$ to models from a thousand to a billion parameters. How does your $a$ compare with the true one?**
#
# - A. It is larger, because in small models the embedding hides most of the growth.
# - B. It is smaller, because you leave out parameters.
# - C. It is the same, because an exponent does not depend on how one counts.
# - D. It is larger for large models and the same for small ones.
#
# <details><summary>Answer</summary>
#
# A. From a small model to one twice as large in all, the inside grows by much more than twice, since the embedding grows only with the width. D has it the wrong way round: for large models the two counts agree.
#
# </details>

# %% [markdown]
# ## What we saw
#
# All numbers of this table come from above: measured in this run or in the shipped sweep, or computed from published constants.

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# Before a run is started, three numbers stand on one sheet: the parameters, the operations and the tokens. Count the first two for the profile's model with the library, and place it among models whose sizes and tokens were published. "Times compute-optimal" compares its tokens per parameter with what the replication's law asks for at the same compute.

# %%
ids = torch.randint(10, 100, (1, 128), device=machine.device)
with FlopCounterMode(display=False) as counter, torch.no_grad():
    model(input_ids=ids, use_cache=False)
counted, parameters = counter.get_total_flops() / ids.numel(), model.num_parameters()
table = model.get_input_embeddings().weight.numel()
matrices = parameters - (0 if model.config.tie_word_embeddings else table)
ratio = counted / (2 * matrices)
name = machine.model_id.split("/")[-1]
print(f"{name}: {parameters:,} parameters; a forward pass costs", end=" ")
print(f"{counted:.3e} operations a token, {ratio:.2f} x 2 N of its matrices", end=" ")
print("(norms are left out, and attention where torch has no formula for its kernel)")
lesson.equal("a forward pass costs 2 N within 15 %", abs(ratio - 1), within=0.15)

# %%
PUBLIC = {  # parameters and training tokens, as published by their makers
    "shima-4m": (3.6e6, 41e6),
    "GPT-3 (2020)": (175e9, 300e9),
    "Gopher (2021)": (280e9, 300e9),
    "Chinchilla (2022)": (70e9, 1.4e12),
    "LLaMA 7B (2023)": (6.7e9, 1.0e12),
    "Llama 3 8B (2024)": (8.0e9, 15e12),
    "Qwen2.5 0.5B (2024)": (0.49e9, 18e12),
}
law, rows = PUBLISHED["Besiroglu"], {}
for name, (size, data) in PUBLIC.items():
    best, best_data = optimum(law, 6 * size * data)
    times = (data / size) / (best_data / best)
    rows[name] = [f"{6 * size * data:.1e}", f"{data / size:,.0f}", f"{times:,.1f}"]
heads = ("training operations", "tokens per parameter", "times compute-optimal")
show_table(rows, heads)

# %% [markdown]
# The models of 2020 and 2021 had few tokens for their size, as Kaplan's law asked. Chinchilla is near the optimum by design. The later ones are trained far beyond it, because they are used by millions (section 11). For shima-4m the comparison is only an exercise: Shima's text has a law of its own.
#
# **What is different at scale**
#
# | here | a large laboratory |
# |---|---|
# | 70 runs, about 20 minutes of one core | hundreds of runs, and many GPU-years |
# | a text with known entropy | $E$ is a fit that nobody can check |
# | predict twice the compute | predict 100 to 10,000 times the compute, and then train it |
# | the loss on the text itself | losses on held-out code, mathematics and questions, and laws from loss to score |
# | one learning rate rule, tried at three sizes | learning rate, batch size, schedule, data mixture each with their own law |
# | one architecture | every change of architecture is judged by whether it shifts the law, not by one run |
#
# ## Read on
#
# - Kaplan et al. 2020, *Scaling Laws for Neural Language Models*, arXiv 2001.08361.
# - Hoffmann et al. 2022, *Training Compute-Optimal Large Language Models* (Chinchilla), arXiv 2203.15556.
# - Besiroglu, Erdil, Barnett & You 2024, *Chinchilla Scaling: A Replication Attempt*, arXiv 2404.10102.
# - Pearce & Song 2024, *Reconciling Kaplan and Chinchilla Scaling Laws*, arXiv 2406.12907; Porian, Wortsman, Jitsev, Schmidt & Carmon 2024, *Resolving Discrepancies in Compute-Optimal Scaling of Language Models*, arXiv 2406.19146.
# - Muennighoff et al. 2023, *Scaling Data-Constrained Language Models*, arXiv 2305.16264.
# - Sardana, Portes, Doubov & Frankle 2024, *Beyond Chinchilla-Optimal: Accounting for Inference in Language Model Scaling Laws*, arXiv 2401.00448.
# - Wei et al. 2022, *Emergent Abilities of Large Language Models*, arXiv 2206.07682; Schaeffer, Miranda & Koyejo 2023, *Are Emergent Abilities of Large Language Models a Mirage?*, arXiv 2304.15004.
# - McKenzie et al. 2023, *Inverse Scaling: When Bigger Isn't Better*, arXiv 2306.09479.
# - Brown et al. 2024, *Large Language Monkeys: Scaling Inference Compute with Repeated Sampling*, arXiv 2407.21787; Snell et al. 2024, *Scaling LLM Test-Time Compute Optimally Can Be More Effective than Scaling Model Parameters*, arXiv 2408.03314.
# - Hutter 2021, *Learning Curve Theory*, arXiv 2102.04074; Michaud et al. 2023, *The Quantization Model of Neural Scaling*, arXiv 2303.13506: why many skills that are met ever more rarely can make a power law.
# - Yang et al. 2022, *Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer*, arXiv 2203.03466.
