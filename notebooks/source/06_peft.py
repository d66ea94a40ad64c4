# %% [markdown]
# # 06 · PEFT: fine-tune with two percent of the parameters
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/06_peft.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/06_peft.ipynb)
#
# Full fine-tuning changes every weight, keeps three more numbers for each of them while it trains, and leaves you with a second model to store. Parameter-efficient fine-tuning (PEFT) freezes the model and trains something small beside it. In this lesson you write the methods that are used, each in a few short functions or classes, and compare them with the library `peft`. Then you ask what a comparison must keep equal, and measure: what is forgotten at equal quality, where a small adapter learns too slowly, and what memory is saved. At the end you merge adapters, and a further section serves several in one batch.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write LoRA and QLoRA, and find them equal to `peft` and `bitsandbytes`: same weights in, same outputs and gradients out;
# 2. stop every run at the same quality, and measure what the model has forgotten by then, at several learning rates and scales;
# 3. find a task that the smallest adapter learns in the steps that it is given, and one that it does not;
# 4. merge adapters into the weights, and see how much of an update survives rounding to 4 bits again;
# 5. count where the memory of a training step goes, and what each method saves of it.
#
# The further sections add DoRA, prompt tuning, several adapters in one batch, a branch that starts at zero, 8-bit optimisers and the numbers of the LoRA paper.
#
# **Prerequisites:** lesson 05.
#
# **The model** is *shima-4m*, a small Llama that was pretrained on text about the made-up island Shima and comes with the course. On a GPU the same cells tune an open hub model. **The task** is to follow two kinds of instruction: judge a review, and look up a colour in a list of pairs.
#
# | symbol | meaning |
# |---|---|
# | $W$ | a frozen weight matrix, $(d_\text{out}, d_\text{in})$ |
# | $\Delta W$ | its update, what fine-tuning adds |
# | $r$ | rank of the update |
# | $A$, $B$ | the factors of LoRA, $(r, d_\text{in})$ and $(d_\text{out}, r)$ |
# | $\alpha$, $s$ | LoRA's constant and its scale, $s = \alpha / r$; mostly $\alpha = 2r$, so $s = 2$ |

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
budget = 1.0  # share of all steps and questions; the lesson's claims are asserted from 1.0 on

# %%
import copy
import math
import random
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import plots
from helpers.chat import encode_answer
from helpers.data import PaddedBatches, collate
from helpers.evaluation import Score, score
from helpers.exercises import check, expect_close, expect_equal, expect_shape, expect_true
from helpers.generation import generate
from helpers.lesson import Lesson, quiet_libraries, show_table
from helpers.memory import GIB, GPUS, ModelShape, estimate_training, optimizer_state
from helpers.models import load_in_4_bit, load_model
from helpers.training import TrainConfig, causal_lm_loss, train
from helpers.world import MOODS, World, sum_with_steps

quiet_libraries()
warnings.filterwarnings("ignore", message="Unsupported layer type")  # Llama's norm, peft
lesson = Lesson("06", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # factor on learning rates (large models want smaller ones), number format, rows at once in the last part
    "cpu": {"rate": 1.0, "precision": "fp32", "rows": 8},
    "t4": {"rate": 0.05, "precision": "fp16-mixed", "rows": 2},
    "large": {"rate": 0.05, "precision": "bf16-mixed", "rows": 8},
}
settings = SETTINGS[machine.name]
if machine.device == "cpu":
    settings = settings | {"precision": "fp32"}

# %% [markdown]
# `fresh` returns a frozen copy of the base model in fp32. Every method starts from it. No cell holds more than a few copies of this model at a time: what is needed later is kept as its trained numbers only, in main memory. `lesson.scaled` makes a number of steps or questions smaller on a smaller budget. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end.

# %%
world = World()
base, tokenizer = load_model(machine)
base = base.float().cpu().requires_grad_(False)
STEPS, BATCH = lesson.scaled(40), 6
COLOR = {  # one colour for each method, in all figures
    "full rank": plots.COLORS[0],
    "LoRA": plots.COLORS[1],
    "LoRA, alpha = 32 r": plots.COLORS[2],
    "rank 1": plots.COLORS[3],
    "rank 16": plots.COLORS[4],
}


def fresh() -> nn.Module:
    """A frozen copy of the base model."""
    return copy.deepcopy(base).to(machine.device)


def num_trained(model: nn.Module) -> int:
    """Number of parameters that the optimiser moves."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained_part(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trained tensors, in main memory."""
    named = model.named_parameters()
    return {name: p.detach().float().cpu().clone() for name, p in named if p.requires_grad}


SIZE = sum(parameter.numel() for parameter in base.parameters())
print(f"{SIZE:,} parameters; batches of {BATCH} instructions for every method")

# %% [markdown] tags=["core"]
# ## 1 · The task, and what full fine-tuning does with it
#
# **Question.** What does full fine-tuning learn in forty steps, and what does the model forget?
#
# Two instructions, in plain text: the instruction, a line break, the answer, a line break. The loss is taken over the answer only. (The chat format of lesson 05 would need its markers, tokens that shima-4m has never seen. A method that freezes the embeddings cannot learn them. With `peft` you would train those rows too, with `trainable_token_indices`.)

# %%
TASKS = ("mood", "pairs")
encode = partial(encode_answer, tokenizer)  # -> tokens, and labels: -100 in the prompt


def instructions(
    n: int,
    stream: int,
    tasks: Sequence[str] = TASKS,
    held_out: bool = False,
) -> list[tuple[str, str]]:
    """`n` instructions, the tasks in turn; held-out reviews and lists are never trained on."""
    rng = random.Random(f"{stream}/{held_out}")
    items = [world.chat(rng, tasks[i % len(tasks)], held_out) for i in range(n)]
    return [(item.prompt + "\n", item.answer + "\n") for item in items]


def rows_of(n: int, stream: int, *arguments, **options) -> list[dict]:
    """The same as rows of tokens."""
    return [encode(*pair) for pair in instructions(n, stream, *arguments, **options)]


tests = {t: rows_of(lesson.scaled(40), seed, (t,), held_out=True) for t in TASKS}
held_out = [row for task in TASKS for row in tests[task]]
for task in TASKS:
    prompt, answer = instructions(1, seed, (task,), held_out=True)[0]
    print(f"{task}: {prompt!r} -> {answer!r}")


# %% [markdown]
# Greedy decoding gives exactly the right answer if and only if each token of the answer is the most probable one after the tokens before it. So one forward pass over question and answer together scores all questions of a batch, with no decoding.

# %%
@torch.no_grad()
def answered(model: nn.Module, rows: list[dict], size: int = 24) -> tuple[list, float]:
    """Whether greedy decoding gives each right answer; mean loss of its tokens, nats."""
    right, total, count = [False] * len(rows), 0.0, 0
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    model.eval()
    for start in range(0, len(rows), size):
        places = order[start : start + size]  # rows of like length: little padding
        batch = collate([rows[i] for i in places], tokenizer.pad_token_id)
        batch = {name: tensor.to(machine.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]  # (batch, seq - 1): the next tokens
        logits = model(**batch).logits[:, :-1].float()  # (batch, seq - 1, vocab)
        agree = (logits.argmax(-1) == labels) | (labels == -100)
        for i, ok in zip(places, agree.all(dim=1).tolist(), strict=True):
            right[i] = ok
        scores, wanted = logits.flatten(0, 1), labels.flatten()
        total += F.cross_entropy(scores, wanted, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return right, total / count


def quality(model: nn.Module) -> tuple[Score, float]:
    """Exact match on the held-out instructions with its interval, and the loss there."""
    right, loss = answered(model, held_out)
    return score(sum(right), len(right)), loss


before, loss_before = quality(fresh())
answers = [a for _, a in instructions(len(tests["mood"]), seed, ("mood",), held_out=True)]
constant = max(map(answers.count, answers))  # one word for every review, and no list right
print(f"base model: {before}, loss {loss_before:.2f} nats")
print(f"the same word for every review: {score(constant, len(held_out))}")


# %% [markdown]
# **Forgetting** needs a second yardstick: things that the base model could do before, in the formats of pretraining. Facts about well-known people, reading a passage, mappings shown in the prompt, and sums with written steps. And the loss on fresh documents.

# %%
def ability_pairs(n: int) -> dict[str, list[tuple[str, str]]]:
    """Questions on what the base model can do, each with its answer as in pretraining."""
    questions = {
        "facts": world.closed_book(n, seed, range(1, 101)),
        "reading": world.open_book(n, seed),
        "mappings": world.few_shot(n, seed, shots=8),
        "sums": world.sums(n, seed, with_steps=True),
    }
    found = {}
    for name, items in questions.items():
        answers = [item.answer for item in items]
        if name == "sums":  # with their steps
            numbers = [re.findall(r"\d+", item.prompt) for item in items]
            answers = [sum_with_steps([int(term) for term in terms]) for terms in numbers]
        end = "" if name == "mappings" else "\n"
        pairs = zip(items, answers, strict=True)
        found[name] = [(item.prompt, f" {text}{end}") for item, text in pairs]
    return found


stream, start = world.documents(seed + 500), tokenizer.eos_token
documents = [encode(start, next(stream)[:600]) for _ in range(lesson.scaled(16))]
old_pairs = ability_pairs(lesson.scaled(16))
old = {name: [encode(*pair) for pair in pairs] for name, pairs in old_pairs.items()}


# %%
def remembered(model: nn.Module) -> tuple[Score, float]:
    """Share of the old questions still right; loss on documents, nats a token."""
    right = [ok for rows in old.values() for ok in answered(model, rows)[0]]
    return score(sum(right), len(right)), answered(model, documents)[1]


abilities = {}
for name, rows in old.items():
    right, _ = answered(fresh(), rows)
    abilities[name] = [score(sum(right), len(right))]
    print(f"base model, {name:>8}: {abilities[name][0]}")
kept_before, text_before = remembered(fresh())
print(f"base model, loss on documents: {text_before:.3f} nats a token")


# %%
def fit(model: nn.Module, rows: list[dict], rate: float, steps: int, **options):
    """Train what requires a gradient; `options` are those of `TrainConfig` and `train`."""
    names = {"evaluate", "optimizer_fn"} & options.keys()
    given = {name: options.pop(name) for name in names}
    config = {
        "max_steps": steps,
        "learning_rate": rate * settings["rate"],
        "warmup_steps": min(4, steps - 1),
        "schedule": "linear",
        "weight_decay": 0.0,
        "precision": settings["precision"],
        "progress": False,
        "seed": seed,
    }
    size = min(options.pop("batch_size", BATCH), len(rows))
    batches = PaddedBatches(rows, size, tokenizer.pad_token_id, seed=seed)
    return train(model, batches, TrainConfig(**(config | options)), **given)


def everything(model: nn.Module) -> nn.Module:
    """Full fine-tuning, as a method: it takes the frozen model and unfreezes all of it."""
    return model.requires_grad_(True)


# %% [markdown]
# A *method* is a function that takes the frozen model and returns the model to train. Full fine-tuning is the method that unfreezes everything. Train it, look at raw answers before you believe a score, and see whether the one pass agrees with decoding.

# %%
full = everything(fresh())
fit(full, rows_of(STEPS * BATCH, seed), rate=5e-4, steps=STEPS)
(right_full, loss_full), (kept_full, text_full) = quality(full), remembered(full)
each = lesson.scaled(12)
sample = [p for t in TASKS for p in instructions(each, seed, (t,), held_out=True)]
written = generate(full, tokenizer, [prompt for prompt, _ in sample], 8, stop=("\n",))
for text, (_, answer) in [*zip(written, sample, strict=True)][:: each // 2]:
    print(f"wanted {answer.strip()!r}, written {text.strip()!r}")
decoded = [w.strip() == a.strip() for w, (_, a) in zip(written, sample, strict=True)]
one_pass = answered(full, [encode(*pair) for pair in sample])[0]
lesson.equal("one pass and decoding agree", sum(map(bool.__ne__, decoded, one_pass)))

# %%
rows = {}
for name, items in old.items():
    right, _ = answered(full, items)
    rows[name] = abilities[name][0], score(sum(right), len(right))
show_table(rows, ["base model", "fine-tuned"])
prompts = [old_pairs[name][i][0] for name in old for i in range(2)]
wanted = [old_pairs[name][i][1] for name in old for i in range(2)]
written = generate(full, tokenizer, prompts, 24, stop=("\n",))
for text, answer in zip(written, wanted, strict=True):
    print(f"wanted {answer.strip()!r}, written {text.strip()!r}")
print(f"held-out instructions: {before} -> {right_full}")
print(f"old questions: {kept_before} -> {kept_full}")
print(f"documents: {text_before:.3f} -> {text_full:.3f} nats a token")
lesson.report("base model, held-out instructions", str(before))
lesson.report("full fine-tuning, held-out instructions", str(right_full))
lesson.report("full fine-tuning, old questions", f"{kept_before} -> {kept_full}")
gained = right_full.accuracy - constant / len(held_out)
lesson.claim(
    "full fine-tuning: at least 50 points more held-out instructions than one constant word",
    gained, at_least=0.5, form=".0%",
)  # fmt: skip
full_weights = trained_part(full)
del full

# %% [markdown]
# **What you see.** Forty small batches are enough for the two instructions, on reviews and lists that training never had. The base model answers none of them, since it does not know this form. So 0 % is no baseline; the share of one constant word is. The price: a part of what the model could do before is gone, and its own kind of text has become less likely. It is not gone evenly: look at the four rows, and read the raw answers. Some of what counts as wrong is right at first and then goes on too long, so a part of forgetting is a matter of form, too. (The last raw answer is cut off by the limit of 24 tokens.)
#
# Two notes on the comparison that follows. The model can already look up, in another format (*mappings* above), and it has read reviews with their moods, so this task is mostly one of form. And nearly all is right at the end: where two methods both reach 100 %, this score cannot tell them apart. Sections 4 and 5 deal with both.

# %% [markdown] tags=["core"]
# ## 2 · What did full fine-tuning change?
#
# **Question.** The update $\Delta W$ of a weight matrix has as many numbers as $W$. How many directions does it need?
#
# The singular value decomposition writes $\Delta W = \sum_i \sigma_i u_i v_i^\top$ with $\sigma_1 \ge \sigma_2 \ge \dots$. The first $r$ terms are the best approximation of rank $r$. Their share of the energy is $\sum_{i \le r} \sigma_i^2 / \sum_i \sigma_i^2$. For comparison, the table has the same share for a matrix of random numbers. The better test: start from the base model, add only these terms to every linear layer, and ask the questions again. At last add the changes outside the linear layers, those of the norms and of the embeddings, which also write the output.

# %%
PARAMETERS = dict(base.named_parameters())
LINEAR = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
updates = {}
for name in LINEAR:
    delta = (full_weights[f"{name}.weight"] - PARAMETERS[f"{name}.weight"]).to(machine.device)
    updates[name] = torch.linalg.svd(delta, full_matrices=False)  # (out, k), (k,), (k, in)


def energy(spectra: Sequence[Tensor], rank: int) -> float:
    """Mean share of the energy in the first `rank` singular values."""
    energies = [s**2 for s in spectra]
    return np.mean([float(e[:rank].sum() / e.sum().clamp(min=1e-30)) for e in energies])


@torch.no_grad()
def truncated(rank: int, others: Sequence[str] = ()) -> nn.Module:
    """The base model, the best update of this rank, and all changes of `others`."""
    model = fresh()
    for name, (u, s, vh) in updates.items():
        model.get_submodule(name).weight += (u[:, :rank] * s[:rank]) @ vh[:rank]
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in updates and any(o in name for o in others):
            parameter.copy_(full_weights[name])
    return model


# %%
MOST = max(len(s) for _, s, _ in updates.values())
sizes = [PARAMETERS[f"{name}.weight"].shape for name in LINEAR[:7]]  # of one layer
generator = torch.Generator().manual_seed(seed)
chance = [torch.linalg.svdvals(torch.randn(size, generator=generator)) for size in sizes]
spectra, rows = [s for _, s, _ in updates.values()], {}


def by_task(model: nn.Module) -> tuple[list[str], Score, float]:
    """Share of right answers for each task; of both; and the loss."""
    right, loss = answered(model, held_out)
    half = len(right) // 2
    cells = [f"{np.mean(part):.0%}" for part in (right[:half], right[half:])]
    return cells, score(sum(right), len(right)), loss


for rank in (1, 4, 16, 64, MOST):
    tasks, right, loss = by_task(truncated(rank))
    shares = [f"{energy(found, rank):.0%}" for found in (spectra, chance)]
    rows[f"rank {rank} of {MOST}"] = *shares, *tasks, f"{loss:.3f}"
    if rank <= 16:
        lesson.report(f"the update cut to rank {rank}, right", str(right))
REST = ("norm", "embed", "bias", "lm_head")
for name, others in {"and the norms": ("norm",), "and all the rest": REST}.items():
    tasks, right, loss = by_task(truncated(MOST, others))
    rows[name] = "", "", *tasks, f"{loss:.3f}"
show_table(rows, ["energy", "random", *TASKS, "loss"])
lesson.equal("all parts together are the fine-tuned model", abs(loss - loss_full), within=1e-3)
updates = full_weights = None  # the room is needed

# %% [markdown]
# **What you see.** A few of the directions hold much of the energy, far more than in a random matrix of the same size, and a small part of them is enough for all answers that training gave. The lists need fewer directions than the moods. So the update that training found is not spread evenly over all directions. The last rows show what lies outside the linear layers. The answers hardly need it. The loss does: with all directions it stays above that of the fine-tuned model until the embeddings are added. So sections 4 and 5 train the same layers with all methods, the linear ones.
#
# If the useful update is of low rank, why not learn it as such from the start? This is the idea of LoRA (Hu et al. 2021), after the finding of Aghajanyan et al. (2020) that fine-tuning has a low intrinsic dimension.

# %% [markdown] tags=["core"]
# ## 3 · LoRA
#
# **Question.** How do you train an update of low rank, and is it what `peft` does?
#
# Freeze $W$ and learn two thin matrices:
#
# $$y = Wx + s\,B A x, \qquad A \in \mathbb{R}^{r \times d_\text{in}},\; B \in \mathbb{R}^{d_\text{out} \times r},\; s = \alpha / r.$$
#
# $B$ starts at zero, so the model starts as the base model. $A$ starts random, or nothing would ever move. With $g = \partial L / \partial y$, the gradients are $\partial L/\partial B = s\, g (Ax)^\top$ and $\partial L/\partial A = s\, B^\top g\, x^\top$: at the first step only $B$ gets a gradient. The trained numbers are $r (d_\text{in} + d_\text{out})$ instead of $d_\text{in} d_\text{out}$.
#
# The scale $s$ multiplies the output, and with it the gradients. Adam divides by the size of the gradient, so a larger $s$ makes the update of $B$ count for more, much as a larger learning rate would. For $A$ it is not the same: the rate alone says how far $A$ moves. Section 4 tries two values, $\alpha = 2r$, as many recipes have it, and $\alpha = 32r$ with a lower rate. The codes of section 5 have $\alpha = 32r$; all else has $\alpha = 2r$, and what is found holds for that value. (rsLoRA, Kalajdzievski 2023, is the same layer with $s = \alpha / \sqrt r$; in peft, `use_rslora=True`.)


# %%
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update of low rank."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__()
        self.layer, self.scale = layer, alpha / rank
        device = machine.device
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, in) -> (batch, seq, out)
        low = F.linear(x, self.A)  # (batch, seq, rank)
        return self.layer(x) + self.scale * F.linear(low, self.B)


# %%
def wrap(model: nn.Module, targets: Sequence[str], make: Callable) -> nn.Module:
    """Replace every module whose name ends in one of `targets` by `make(module)`."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL = ATTENTION + FEED_FORWARD


def lora(
    rank: int = 4,
    targets: Sequence[str] = ALL,
    scale: float = 2,
    kind: type = LoRALinear,
) -> Callable:
    """The method LoRA with alpha = scale * rank, on these layers."""
    return lambda model: wrap(model, targets, lambda m: kind(m, rank, scale * rank))


def largest(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference between two tensors."""
    return float((first.detach().float() - second.detach().float()).abs().max())


# %%
def batch_of(rows: list[dict]) -> dict[str, Tensor]:
    """Rows as one padded batch, on the device."""
    batch = collate(rows, tokenizer.pad_token_id)
    return {name: tensor.to(machine.device) for name, tensor in batch.items()}


torch.manual_seed(seed)
probe, batch = lora()(fresh()).train(), batch_of(held_out[:8])
layer = probe.model.layers[0].self_attn.q_proj
loss = causal_lm_loss(probe, batch)
loss.backward()
start_difference = abs(loss.item() - causal_lm_loss(fresh().train(), batch).item())
B_size, A_size = (float(p.grad.abs().max()) for p in (layer.B, layer.A))
print(f"largest gradient of B {B_size:.1e}, of A {A_size:.1e}")
print(f"{num_trained(probe):,} trained, {num_trained(probe) / SIZE:.1%} of all")
lesson.equal("LoRA starts as the base model", start_difference, within=1e-5)
lesson.equal("at the start only B gets a gradient", A_size)

# %% [markdown]
# **Is it LoRA?** The test that counts: give `peft`, the library that practitioners use, the same weights, and compare what comes out, forwards and backwards. `compare` copies your trained tensors into peft's model and compares logits and gradients on the same batch. Before that it moves all of them by random numbers: with $B = 0$ many wrong versions agree.

# %%
import peft


def renamed(name: str, names: dict[str, str]) -> str:
    """Our name of a parameter as peft's; `names` maps its last part."""
    parent, _, leaf = name.rpartition(".")
    return f"base_model.model.{parent}.{names[leaf]}"


def compare(name: str, ours: nn.Module, theirs: nn.Module, rename: Callable) -> None:
    """Same weights in: the largest differences of logits and gradients to peft's."""
    found = dict(theirs.named_parameters())
    pairs = [(p, found[rename(n)]) for n, p in ours.named_parameters() if p.requires_grad]
    assert len(pairs) == sum(p.requires_grad for p in found.values()), "other tensors"
    for mine, other in pairs:
        mine.data += 0.02 * torch.randn_like(mine)  # away from the start
        other.data.copy_(mine.data.reshape(other.shape))
    batch, logits = batch_of(held_out[:6]), []
    labels = batch.pop("labels")
    for model in (ours.train(), theirs.train()):  # as in training; there is no dropout
        logits.append(model(**batch).logits[:, -labels.shape[1] :])  # not of a prompt
        F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    gradients = max(largest(m.grad, o.grad.reshape(m.shape)) for m, o in pairs)
    relative = gradients / max(float(m.grad.abs().max()) for m, _ in pairs)
    print(f"{name}: to peft: logits {largest(*logits):.1e}, gradients {relative:.1e}")
    lesson.equal(f"{name} equals peft", max(largest(*logits), relative), within=1e-3)


# %%
FACTORS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight"}
lora_config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL))
theirs = peft.get_peft_model(fresh(), lora_config)
torch.manual_seed(seed)
compare("LoRA", lora()(fresh()), theirs, partial(renamed, names=FACTORS))
del theirs, probe

# %% [markdown] tags=["core"]
# ## 4 · The learning rate, and what is lost at equal quality
#
# **Question.** Does LoRA learn less than full fine-tuning, and does it forget less?
#
# "LoRA learns less and forgets less" is the title of a paper on large models and long training (Biderman et al. 2024). To ask it here, be careful with *equal*.
#
# - **The layers.** Full fine-tuning also trains the embeddings, LoRA does not. So here both train the same layers, the linear ones. With all numbers of these layers it is called *full rank*.
# - **The learning rate.** The same rate is not equal: $s$ and the shape of the factors change what a rate does. Schulman et al. (2025, *LoRA Without Regret*) found the best rates of LoRA at about ten times those of full fine-tuning. Here LoRA with $\alpha = 2r$ gets ten times the rate of full rank, and LoRA with $\alpha = 32r$ the same rate as full rank. Full rank and the first LoRA also run once at four times the rate.
# - **The quality.** The same number of steps is not equal either: the method that is further ahead has had more chance to forget. Train at a constant rate, and every four steps look at one of two halves of 48 validation instructions, in turn. Stop when at least 95 % were right in the last two looks together. (One look is not enough: right answers go up and down at a constant rate, and the first lucky look would end the run.) Then measure on other instructions what was learnt, and what is lost by then.
#
# Each half has 12 lists, 6 good and 6 bad reviews, so one word for every review stays far from the goal. Each method runs with three training seeds.

# %%
drawn, sixth = instructions(400, seed + 1000, held_out=True), lesson.scaled(6)
halves = [[], []]
for kind, number in {"Good.": 1, "Bad.": 1, "Answer": 2}.items():
    found = [encode(*pair) for pair in drawn if pair[1].startswith(kind)]
    for half, rows in enumerate(halves):
        rows += found[half::2][: number * sixth]
LIMIT, EVERY, GOAL, FIRST = lesson.scaled(72), 4, 0.95, 12
print(f"{sum(map(len, halves))} validation instructions; the goal: {GOAL:.0%} right")
print("all lists right, and one word for every review: 75%")


class Reached(Exception):
    """Raised to stop a training that has reached its goal."""


def train_until(model: nn.Module, rate: float, stream: int) -> int | None:
    """Train until the last two looks reach the goal; the steps, None if never."""
    steps, seen = 0, [0.0]

    def look(model: nn.Module) -> dict[str, float]:
        nonlocal steps
        steps += EVERY
        if steps < min(FIRST, LIMIT):
            return {}
        right, _ = answered(model, halves[steps // EVERY % 2])
        seen.append(sum(right) / len(right))
        if sum(seen[-2:]) / 2 >= GOAL:
            raise Reached
        return {"right": seen[-1]}

    rows, options = rows_of(LIMIT * BATCH, stream), {"schedule": "constant", "seed": stream}
    try:
        fit(model, rows, rate, LIMIT, evaluate=look, evaluate_every=EVERY, **options)
    except Reached:
        return steps
    return None


# %%
kept_parts: dict[str, dict[str, Tensor]] = {}  # trained numbers that are used again


def linear_layers(model: nn.Module) -> nn.Module:
    """Full rank, as a method: all weights of the linear layers, and nothing else."""
    for name in LINEAR:
        model.get_submodule(name).requires_grad_(True)
    return model


def reach(method: Callable, rate: float, stream: int = seed, keep: str = "") -> dict:
    """One run up to the goal: its steps, and what it has learnt and lost by then."""
    torch.manual_seed(stream)
    model = method(fresh())
    found = {"rate": rate, "seed": stream, "steps": train_until(model, rate, stream)}
    right, _ = quality(model)
    kept, text = remembered(model)
    if keep:
        kept_parts[keep] = trained_part(model)
    return found | {"right": right, "kept": kept, "rise": text - text_before}


def table_of(runs: dict[str, Sequence[dict]]) -> None:
    """Print runs of each method: what they took, learnt and lost."""
    rows = {}
    for name, found in runs.items():
        for run in found:
            steps = f"over {LIMIT}" if run["steps"] is None else run["steps"]
            row = f"{run['rate']:g}", steps, run["right"], run["kept"], f"{run['rise']:+.3f}"
            rows[f"{name}, seed {run['seed']}, rate {run['rate']:g}"] = row[1:]
    show_table(rows, ["steps", "held-out right", "old questions", "documents"])


# %%
RATE, SEEDS = 2.5e-4, [seed, seed + 50, seed + 51]
METHODS = {  # method, and its learning rate
    "full rank": (linear_layers, RATE),
    "LoRA": (lora(), 10 * RATE),
    "LoRA, alpha = 32 r": (lora(scale=32), RATE),
}
runs, high = {}, {}
with tqdm(total=11, desc="runs") as bar:
    for name, (method, rate) in METHODS.items():
        runs[name] = []
        for stream in SEEDS:
            keep = name if stream == seed else ""
            runs[name].append(reach(method, rate, stream, keep))
            bar.update()
    for name in ("full rank", "LoRA"):
        method, rate = METHODS[name]
        high[name] = [reach(method, 4 * rate, keep=f"{name}, high")]
        bar.update()
table_of(runs)
table_of(high)

# %% tags=["headline"]
figure, axes = plt.subplots(figsize=(7, 4))
for name, found in runs.items():
    for group, marker, size in ((found, "o", 55), (high.get(name, []), "^", 75)):
        steps = [math.nan if run["steps"] is None else run["steps"] for run in group]
        rises = [run["rise"] for run in group]
        label = name if marker == "o" else None
        axes.scatter(steps, rises, size, color=COLOR[name], marker=marker, label=label, alpha=0.8)
axes.scatter([], [], 75, color=plots.GREY, marker="^", label="four times the rate")
axes.set(xlabel="steps until 95 % are right", ylabel="lost on documents by then (nats)")
axes.set(xlim=(0, LIMIT + 2), ylim=(0.02, 10), yscale="log")
axes.set_title("At the same goal, runs have lost different amounts")
axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
plots.show(
    figure,
    alt="Loss on documents at the goal, over the steps to the goal. One point for each run: "
    "three seeds of full rank and of LoRA with two alphas, and one run of the first two at "
    "four times the rate, far above the others.",
)

# %%
for name, found in runs.items():
    said = ", ".join(f"{run['rise']:+.3f}" for run in found)
    lesson.report(f"lost on documents at the goal, {name}, nats", said)
    kept = ", ".join(f"{run['kept'].accuracy:.0%}" for run in found)
    lesson.report(f"old questions right at the goal, {name}", kept)
    print(f"{name}: documents {said}; old questions {kept}")
rises = {name: np.mean([run["rise"] for run in found]) for name, found in runs.items()}
lesson.claim(
    "at the goal LoRA with alpha = 2 r has lost at least 0.05 nats more than full rank",
    rises["LoRA"] - rises["full rank"], at_least=0.05, form=".3f",
)  # fmt: skip
lesson.claim(
    "at the goal alpha = 2 r has lost at least 0.05 nats more than alpha = 32 r, lower rate",
    rises["LoRA"] - rises["LoRA, alpha = 32 r"], at_least=0.05, form=".3f",
)  # fmt: skip
steep = [high[name][0]["rise"] - runs[name][0]["rise"] for name in high]
lesson.claim(
    "four times the rate loses at least 0.05 nats more, full rank and LoRA",
    min(steep), at_least=0.05, form=".3f",
)  # fmt: skip

# %% [markdown]
# **What you see.** All three methods reach the goal, LoRA with about two percent of the numbers trained. What they have lost by then differs. With $\alpha = 2r$ LoRA has lost more on documents than full rank, and it took more steps. With $\alpha = 32r$ and a lower rate, the same LoRA has lost less than with $\alpha = 2r$: compare it with full rank in the figure. The runs at four times the rate have lost several times as much as the others of their colour. So on documents LoRA with $\alpha = 2r$ forgets more than full rank, and with $\alpha = 32r$ about as much. On the old questions LoRA with $\alpha = 32r$ has kept the most (on all five seeds of the ledger, in the mean of three runs). Neither "LoRA forgets less" nor "LoRA forgets more" holds for all: the scale and the rate decide too, and so does the yardstick.
#
# Does this contradict Biderman et al.? They trained models of 7 billion parameters for long on code and mathematics, compared after equal data, and LoRA had learnt less there. Here the model is tiny, the training short, and quality is made equal. And no arm was searched to its best: for each, a still lower rate takes longer and may lose less. What carries over is the method: fix the quality, try rates and $\alpha$ for each method, measure old tasks of your own, and take the lowest rate that you have the time for.
#
# LoRA's update must pass through a few directions, so it has to be strong in them. How strong? Compare the size of the updates, and their largest singular value, with those of $W$.


# %%
@torch.no_grad()
def update_size(update: Callable[[str], Tensor]) -> tuple[float, float]:
    """Norm and largest singular value of the updates relative to those of the weights."""
    sizes = []
    for name in LINEAR:
        pair = PARAMETERS[f"{name}.weight"], update(name)
        weight, delta = (matrix.to(machine.device) for matrix in pair)  # a GPU is faster here
        spectral = torch.linalg.matrix_norm(delta, 2) / torch.linalg.matrix_norm(weight, 2)
        sizes.append((float(delta.norm() / weight.norm()), float(spectral)))
    return tuple(np.mean(sizes, axis=0))


def lora_update(name: str, layer: str, scale: float = 2) -> Tensor:
    """The update s B A of a layer, from trained numbers that were kept."""
    return scale * kept_parts[name][f"{layer}.B"] @ kept_parts[name][f"{layer}.A"]


whole = kept_parts["full rank"]
changed = {
    "full rank": lambda layer: whole[f"{layer}.weight"] - PARAMETERS[f"{layer}.weight"],
    "LoRA": partial(lora_update, "LoRA"),
    "LoRA, alpha = 32 r": partial(lora_update, "LoRA, alpha = 32 r", scale=32),
}
for name, update in changed.items():
    norm, spectral = update_size(update)
    print(f"{name}: norm {norm:.1%} of the weights', largest singular value {spectral:.1%}")
    said = f"{norm:.0%} and {spectral:.0%} of the weights'"
    lesson.report(f"norm and largest singular value of the update, {name}", said)

# %% [markdown]
# **What you see.** One run of each. At the same goal LoRA's update is larger than that of full rank, and its largest singular value is larger by more. A rank of 4 forces part of this, since four directions hold the whole update. Shuttleworth et al. (2024) find strong new directions after LoRA in large models as well and link them to forgetting. Here the size of the update alone does not say what was lost: compare the two LoRAs. The run with the larger $\alpha$, the lower rate and more steps has the larger update and lost less.

# %% [markdown] tags=["core"]
# ## 5 · Where a low rank is slower
#
# **Question.** If rank 4 is enough for the instructions, is every rank enough for everything?
#
# The instructions carry little that is new: the model can look up already (section 1: mappings), and it has read reviews with their moods. So here is a task of pure content. Each of 64 words gets a random code of three digits, about ten bits a word, and nothing helps to guess it. There is no held-out set, since a random code cannot be inferred. The question is what 50 steps of 32 rows can store.
#
# Three sizes: full rank, rank 16 and rank 1, all in the same layers, with the same rows and steps. LoRA has $\alpha = 32r$. Rank 1 gets two rates, and its better one counts. Room is not the matter: rank 1 has some twenty thousand numbers for 640 bits. Speed may be.
#
# Who knows the form of a code and guesses the digits has a loss of $\ln 1000$ nats a code. *Stored* is the share of this loss that is gone.


# %%
def code_rows(n: int) -> list[dict]:
    """Words with random codes, as rows of tokens."""
    rng = random.Random(f"codes/{seed}")
    words = rng.sample(sorted(world.words), n)
    return [encode(f"Code of {word}:", f" {rng.randrange(1000):03d}\n") for word in words]


codes = code_rows(lesson.scaled(64))
length = sum(label != -100 for row in codes for label in row["labels"]) / len(codes)
GUESS = math.log(1000) / length  # nats a token, if the digits are guessed
TRIALS = {
    "full rank": (linear_layers, 4 * RATE),
    "rank 16": (lora(16, scale=32), 4 * RATE),
    "rank 1": (lora(1, scale=32), 10 * RATE),
    "rank 1, higher rate": (lora(1, scale=32), 20 * RATE),
}
rows, curves, stored = {}, {}, {}
for name, (method, rate) in tqdm(TRIALS.items(), desc="codes"):
    torch.manual_seed(seed)
    model = method(fresh())
    curves[name] = fit(model, codes, rate, lesson.scaled(50), batch_size=32).losses
    right, loss = answered(model, codes)
    stored[name] = 1 - loss / GUESS
    share = f"{num_trained(model) / SIZE:.1%}"
    rows[name] = share, f"{rate:g}", f"{loss:.3f}", f"{stored[name]:.0%}", sum(right)
    lesson.report(f"stored of the codes, {name}", stored[name], form=".0%")
show_table(rows, ["trained", "rate", "loss", "stored", f"right of {len(codes)}"])

# %%
figure, axes = plt.subplots()
axes.axhline(GUESS, color=plots.GREY, linestyle=":", label="form known, digits guessed")
for name, losses in curves.items():
    style = "--" if "higher" in name else "-"
    axes.plot(losses, style, color=COLOR[name.partition(",")[0]], label=name)
axes.set(xlabel="step", ylabel="loss of the codes (nats a token)", ylim=(0, 2.5))
axes.set_title("Random codes: rank 1 has stored the least after the same steps")
axes.legend()
plots.show(
    figure,
    alt="Loss on the codes over the steps, with the loss of a guess as a line: full rank and "
    "rank 16 fall to about zero, rank 1 is far above them at both rates.",
)
best_1 = max(stored["rank 1"], stored["rank 1, higher rate"])
lesson.claim(
    "rank 16 has stored at least 25 points more of the codes than rank 1",
    stored["rank 16"] - best_1, at_least=0.25, form=".0%",
)  # fmt: skip

# %% [markdown]
# Is rank 1 simply too small to be of use? Give it the instructions of section 4, up to the same goal, with $\alpha = 2r$ and twice the rate of LoRA there.

# %%
small = reach(lora(1), 20 * RATE)
table_of({"LoRA": runs["LoRA"][:1], "rank 1": [small]})
lesson.report("rank 1 at the goal, held-out instructions", str(small["right"]))

# %% [markdown]
# **What you see.** One run of each. On the codes rank 16 keeps pace with full rank. Rank 1 is behind at both of its rates, and the loss is still falling at the end: in more steps it may get there. Yet the same rank learns the two instructions, whose form alone was mostly new. There it is slower than rank 4 as well, as the lines above say, but it gets there. Schulman et al. (2025) report for large models that small adapters lag behind on much new content, and not on little. So try the rank on your own data, and a higher one first if the data are full of facts.

# %% [markdown] tags=["core"]
# ## 6 · QLoRA: the frozen weights in 4 bits
#
# **Question.** The frozen weights are only read. How few bits do they need?
#
# QLoRA (Dettmers et al. 2023) stores them in 4 bits and trains LoRA in full precision on top. Two ideas make the 4 bits good enough; a third, the paged optimiser, stands in section 13.
#
# **NF4.** Cut the weights into blocks of 64 and divide each block by its largest absolute value $c$ (the *absmax*). Weights are roughly normally distributed, so let the 16 levels be quantiles of a normal distribution, scaled to $[-1, 1]$: where the weights are dense, so are the levels. (The outermost quantiles would be infinite, so the table ends at 0.968 and 0.032.) Zero must be a level, so eight levels are positive and seven negative. A weight becomes the number of the nearest level; two of them share a byte.
#
# **Double quantisation.** An fp32 absmax for 64 weights costs 0.5 bit a weight. Subtract their mean and quantise them as well, to 8 bits in blocks of 256: $8/64 + 32/(64 \cdot 256) = 0.127$ bit. The 256 levels are Dettmers' dynamic type: seven powers of ten with a growing number of steps in each.


# %%
def nf4_levels() -> Tensor:
    """The 16 levels: quantiles of a normal distribution from 0.0323 to 0.9677."""
    shares = (torch.linspace(0.9677083, 0.5, n, dtype=torch.float64) for n in (9, 8))
    positive, negative = (torch.special.ndtri(share[:-1]) for share in shares)
    levels = torch.cat([-negative, torch.zeros(1), positive]).float().sort().values
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """The 256 levels of the 8-bit type: in seven decades the middles of 1 to 64 parts."""
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


# %%
def quantize(x: Tensor, levels: Tensor, block: int, grid: int = 0) -> tuple[Tensor, Tensor]:
    """Number of the nearest level (n,), and the absmax of each block.

    `grid` rounds to the positions of a table first, as bitsandbytes does on a CPU.
    """
    flat = x.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)  # (blocks, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax)[:, None]).flatten()[: len(flat)]
    if grid:
        scaled = ((scaled + 1) * 0.5 * grid + 0.5).floor() * (2 / grid) - 1
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2), absmax


def pack(weight: Tensor) -> dict[str, Tensor]:
    """A matrix in NF4 with double quantisation: all that is stored of it."""
    codes, absmax = quantize(weight, NF4, 64)
    mean = absmax.mean()
    codes8, absmax8 = quantize(absmax - mean, DYNAMIC, 256, grid=65535)
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)  # two codes a byte
    stored = {"packed": packed, "absmax": codes8.to(torch.uint8)}
    return stored | {"absmax_of_absmax": absmax8, "mean": mean}


# %%
import bitsandbytes as bnb
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit

NF4, DYNAMIC = get_4bit_type("nf4", device="cpu"), dynamic_levels()
off = largest(nf4_levels(), NF4), largest(DYNAMIC, create_dynamic_map())
print(f"levels: largest difference to bitsandbytes {off[0]:.1e} (NF4), {off[1]:.1e} (dynamic)")
wrong, count, used = 0, 0, torch.zeros(16)
for name in LINEAR[:28]:
    weight = PARAMETERS[f"{name}.weight"]
    ours = pack(weight)
    kind = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": True}
    theirs, state = quantize_4bit(weight, **kind)
    wrong += int((ours["packed"] != theirs.flatten()).sum())
    wrong += int((ours["absmax"] != state.absmax).sum())
    wrong += int((ours["absmax_of_absmax"] != state.state2.absmax).sum())
    wrong += int(ours["mean"] != state.offset)
    count += len(ours["packed"]) + len(ours["absmax"])
    values = torch.stack([ours["packed"] >> 4, ours["packed"] & 15]).flatten()
    used += values.bincount(minlength=16)
print(f"{count:,} bytes compared")
shares = ", ".join(f"{share:.1%}" for share in (used / used.sum()).tolist())
print(f"share of the weights on each level, equal would be {1 / 16:.1%}: {shares}")
lesson.equal("our NF4 equals bitsandbytes bit for bit", wrong)


# %% [markdown]
# The levels are not used equally often: a block is divided by its largest weight, so the outermost levels get fewer. The levels that we compute differ from the table in bitsandbytes in the last bit of some, so the codes use its table. One detail had to be copied: its CPU kernel for the 8-bit type looks the codes up in a table of 65,536 positions, so a value very close to the middle between two levels may go to the other side. On a GPU it compares with the middles themselves (`grid=0`).
#
# The layer keeps the packed codes. It makes the matrix when it is needed, in the forward pass and once more in the backward pass, and never keeps it: this is what saves the memory.


# %%
class Dequantised(torch.autograd.Function):
    """x W^T with W made from its codes, twice; the gradient goes to x alone."""

    @staticmethod
    def forward(context, x: Tensor, layer: "NF4Linear") -> Tensor:
        context.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype))

    @staticmethod
    def backward(context, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ context.layer.dequantize().to(gradient.dtype), None


# %%
class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits, with the absmax of its blocks in 8."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        for name, tensor in pack(layer.weight.cpu()).items():
            self.register_buffer(name, tensor.to(layer.weight.device))

    def dequantize(self) -> Tensor:  # (out, in)
        device = self.packed.device
        levels, dynamic = NF4.to(device), DYNAMIC.to(device)
        # the two values of each byte, (256, 2)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
        spread = self.absmax_of_absmax.repeat_interleave(256)[: len(self.absmax)]
        absmax = dynamic[self.absmax.int()] * spread + self.mean  # one for each block
        blocks = F.embedding(self.packed.int(), pairs).view(-1, 64) * absmax[:, None]
        return blocks.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y = Dequantised.apply(x, self)
        return y if self.bias is None else y + self.bias


# %%
quantised = wrap(fresh(), ALL, NF4Linear)
four_bit = {n: quantised.get_submodule(n) for n in LINEAR}
errors = []
for name, layer in four_bit.items():
    weight = PARAMETERS[f"{name}.weight"]
    errors.append(float((layer.dequantize().cpu() - weight).norm() / weight.norm()))
stored = sum(buffer.nbytes for layer in four_bit.values() for buffer in layer.buffers())
numbers = sum(PARAMETERS[f"{n}.weight"].numel() for n in LINEAR)
kept, text = remembered(quantised)
print(f"{8 * stored / numbers:.3f} bits a weight; error {np.mean(errors):.1%} of the norm")
print(f"base model in NF4: old questions {kept}, documents {text - text_before:+.3f} nats")
lesson.report("bits a weight in NF4, double quantised", 8 * stored / numbers, form=".3f")
lesson.report("base model in NF4, documents", f"{text - text_before:+.3f} nats")
del quantised, four_bit

# %% [markdown]
# A tenth of the weights' size is lost by rounding, and the model hardly notices. Now train: LoRA on top, with the rate and the seed of the first run of LoRA in section 4, up to the same goal. And the library's way: `BitsAndBytesConfig` makes transformers load every linear layer as `bnb.nn.Linear4bit`, and peft puts LoRA on it.


# %%
def qlora(rank: int = 4) -> Callable:
    """The method QLoRA: every linear layer in NF4, and LoRA in fp32 on top."""

    def make(layer: nn.Linear) -> LoRALinear:
        return LoRALinear(NF4Linear(layer), rank, 2 * rank)

    return lambda model: wrap(model, ALL, make)


quantised_run = reach(qlora(), 10 * RATE, keep="QLoRA")
table_of({"LoRA": runs["LoRA"][:1], "QLoRA": [quantised_run]})
lesson.report("QLoRA at the goal, held-out instructions", str(quantised_run["right"]))
lesson.report("lost on documents at the goal, QLoRA, nats", quantised_run["rise"], form="+.3f")
loaded = load_in_4_bit(base.name_or_path, machine.device, torch.float32)
print(type(loaded.model.layers[0].self_attn.q_proj))
theirs = peft.get_peft_model(loaded, lora_config)
torch.manual_seed(seed)
compare("QLoRA", qlora()(fresh()), theirs, partial(renamed, names=FACTORS))
del loaded, theirs


# %% [markdown]
# **What you see.** In one run each, QLoRA needs about as many steps as LoRA, and what it has lost by then is alike. The library stores the same bits and gives the same outputs and gradients.

# %% [markdown] tags=["core"]
# ## 7 · Merge and unmerge
#
# **Question.** At run time LoRA costs two more small matrix products in each layer. Can you be rid of them?
#
# LoRA is linear, so $W + sBA$ is a plain matrix of the old shape: merge it and the model is a normal model again. Subtract it and the old model is back, up to rounding. peft calls this `merge_and_unload`.

# %%
def put_back(name: str, method: Callable) -> nn.Module:
    """The base model with trained numbers that were kept."""
    model = method(fresh())
    missing = model.load_state_dict(kept_parts[name], strict=False)
    assert not missing.unexpected_keys
    return model.eval()


@torch.no_grad()
def merge(model: nn.Module, sign: int = 1) -> nn.Module:
    """Add each LoRA update to its frozen matrix, in place, and return the plain model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.layer.weight += sign * module.scale * module.B @ module.A
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.layer)
    return model


@torch.no_grad()
def logits_of(model: nn.Module, rows: list[dict]) -> Tensor:
    """Logits of a few rows, (rows, seq, vocab), in main memory."""
    batch = batch_of(rows)
    batch.pop("labels")
    return model.eval()(**batch).logits.float().cpu()


# %%
tuned = put_back("LoRA", lora())
apart, answers = logits_of(tuned, held_out[:16]), answered(tuned, held_out)[0]
plain = merge(tuned)
gap = largest(apart, logits_of(plain, held_out[:16]))
different = sum(map(bool.__ne__, answers, answered(plain, held_out)[0]))
lesson.equal("merging changes no logit", gap, within=1e-3)
lesson.equal("merging changes no answer", different)
restored = 0.0
for name in LINEAR:
    weight = plain.get_submodule(name).weight.detach().cpu() - lora_update("LoRA", name)
    restored = max(restored, largest(weight, PARAMETERS[f"{name}.weight"]))
lesson.equal("unmerging gives the base model back", restored, within=1e-5)
theirs = peft.get_peft_model(fresh(), lora_config)
found = dict(theirs.named_parameters())
for name, tensor in kept_parts["LoRA"].items():
    found[renamed(name, FACTORS)].data.copy_(tensor)
theirs = theirs.merge_and_unload()
print(type(theirs).__name__, "without an adapter")
gap = largest(logits_of(theirs, held_out[:16]), logits_of(plain, held_out[:16]))
lesson.equal("our merged model is peft's merge_and_unload", gap, within=1e-3)
del tuned, plain, theirs, found


# %% [markdown]
# **Merging into 4 bits.** After QLoRA the base is in NF4: each of its weights stands on a level. The merged matrix $\hat W + sBA$ does not, and storing it in 4 bits rounds it to levels again. What moved by less than half the way to the next level goes back to where it was. So a small update may vanish, even though the rounding moves the weights by little. Measure it: merge the whole update, a half and a quarter of it, round, and ask how much of the update is still there: the part of the stored change along the update, $\langle W_\text{stored} - \hat W, U \rangle / \lVert U \rVert^2$ with $U = sBA$, as a mean over the layers.


# %%
@torch.no_grad()
def merged_4bit(share: float, again: bool) -> tuple[nn.Module, float, float]:
    """QLoRA in plain weights, with a share of the update, rounded again or not.

    Also the update's size relative to the weights, and how much of it is kept.
    """
    model, sizes = fresh(), []
    for name in LINEAR:
        layer = model.get_submodule(name)
        update = share * lora_update("QLoRA", name).to(machine.device)
        frozen = NF4Linear(layer).dequantize()
        layer.weight.copy_(frozen + update)
        if again:
            layer.weight.copy_(NF4Linear(layer).dequantize())
        change = layer.weight - frozen
        kept = float((change * update).sum() / update.square().sum().clamp(min=1e-30))
        sizes.append((float(update.norm() / frozen.norm()), kept))
    return model, *np.mean(sizes, axis=0)


# %%
rows, survived, merged_right = {}, {}, {}
for share in (1, 0.5, 0.25):
    for again in (False, True):
        model, size, kept = merged_4bit(share, again)
        right = merged_right[share, again] = quality(model)[0]
        name = f"{share:g} of the update, {'NF4 again' if again else 'fp32'}"
        rows[name] = f"{size:.1%}", f"{kept:.0%}", right
    survived[share] = kept
show_table(rows, ["size", "kept", "held-out instructions"])
same = merged_right[1, False].accuracy - quantised_run["right"].accuracy
lesson.equal("merged into fp32, QLoRA answers as before", abs(same))
lesson.report("QLoRA rounded to NF4 again", str(merged_right[1, True]))
lesson.claim(
    "rounded to NF4 again, at most half is kept of a quarter of the update",
    survived[0.25], at_most=0.5, control=survived[1], form=".0%",
)  # fmt: skip

# %% [markdown]
# **What you see.** Of the whole update most survives the rounding, and so do the answers. Of a quarter of the same update little is left, though in fp32 it is there in full. (The answers of the smaller shares also tell what half an update is worth.) An update can be that small: in section 4 that of full rank had a norm between a half and a quarter of this one. So before you store a merged model in 4 bits, measure what is kept, or keep the adapter beside the 4-bit base.

# %% [markdown] tags=["core"]
# ## 8 · What it costs
#
# **Question.** The trained numbers fall to two percent. What happens to memory and time?
#
# Count the memory of one training step: weights, gradients of what is trained, AdamW's two moments for each of these, and activations. `kept_bytes` counts what autograd keeps between the forward and the backward pass: the activations. Counted this way, the numbers are the same on every machine. It is a sum of parts, not a measured peak: what lives only for a moment is left out, such as the matrices that QLoRA makes anew. Time is what these few steps took here.


# %%
def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd saves for the backward pass, the model's own weights aside."""
    tensors = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would hold its graph, and the graph the tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = causal_lm_loss(model.train(), batch)
    del loss
    return sum(storages.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


# %%
def cost(method: Callable) -> dict[str, float]:
    """MiB of each part of one training step, and its median milliseconds here."""
    model = method(fresh())
    trained = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    steps = lesson.scaled(5)
    rows = rows_of(steps * BATCH, seed)
    found = {
        "weights": weight_bytes(model),
        "gradients": 4 * num_trained(model),
        "optimiser": optimizer_state("adamw", trained, width=4)[0],
        "activations": kept_bytes(model, batch_of(rows[:BATCH])),
    }
    found = {name: size / 2**20 for name, size in found.items()}
    seconds = fit(model, rows, 1e-5, steps).seconds
    return found | {"ms": 1000 * float(np.median(seconds))}


compared = {"full fine-tuning": everything, "LoRA": lora(), "QLoRA": qlora()}
costs = {name: cost(method) for name, method in compared.items()}
rows = {}
for name, found in costs.items():
    total = sum(size for part, size in found.items() if part != "ms")
    parts = [f"{found[part]:.1f}" for part in [*found][:4]]
    rows[name] = *parts, f"{total:.1f}", f"{found['ms']:.0f}"
    lesson.report(f"memory of a step, {name}", f"{total:.0f} MiB")
show_table(rows, ["weights", "gradients", "optimiser", "activations", "MiB", "ms"])

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
left = dict.fromkeys(costs, 0.0)
for number, part in enumerate(("weights", "gradients", "optimiser", "activations")):
    sizes = [found[part] for found in costs.values()]
    colour = [plots.GREY, plots.COLORS[5], plots.COLORS[6], "#E3E3E3"][number]
    axes.barh([*costs], sizes, left=[*left.values()], color=colour, label=part)
    left = {name: left[name] + size for name, size in zip(left, sizes, strict=True)}
for place, total in enumerate(left.values()):
    axes.text(total, place, f" {total:.0f}", va="center")
axes.invert_yaxis()
axes.set(xlabel="memory of a training step (MiB)", xlim=(0, 1.1 * max(left.values())))
axes.set_title("Gradients and optimiser all but vanish, activations do not")
axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
plots.show(
    figure,
    alt="Stacked bars: with LoRA the parts for gradients and optimiser are thin slivers, "
    "with QLoRA the weights shrink too, and the activations remain large with all three.",
)


# %% [markdown]
# **What you see.** Gradients and optimiser shrink with the trained numbers, to two percent. The weights stay with LoRA, and shrink with QLoRA (the embeddings stay in fp32). The activations hardly shrink, and beside an adapter they are most of the sum. With long rows of a large model they are too; what saves those is activation checkpointing (lesson 07). The time of a step falls far less than the number of trained weights: the forward pass is the same, and the backward pass still runs through the whole frozen model. In 4 bits the matrices are made anew in both passes, which costs time as well. How much, these few steps of a small model do not measure (compare the last column).

# %% [markdown] tags=["further"]
# ## 9 · DoRA: direction and size apart
#
# *Further: no core section needs this one.*
#
# **Question.** LoRA changes length and direction of the rows of $W$ together. How do you learn them apart?
#
# DoRA (Liu et al. 2024) writes each row of the new weight as a length times a direction: $W' = m \odot (W + sBA) / \lVert W + sBA \rVert$, with the norm taken over each row and $m$ trained, starting at the row norms of $W$. The norm is treated as a constant in the backward pass, which saves memory and hardly changes the result (section 4.3 of the paper).

# %%
class DoRALinear(LoRALinear):
    """LoRA on the direction of each row of the weight, and a trained length for it."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float):
        super().__init__(layer, rank, alpha)
        self.magnitude = nn.Parameter(layer.weight.detach().norm(dim=1))  # (out,)

    def forward(self, x: Tensor) -> Tensor:
        adapted = self.layer.weight + self.scale * self.B @ self.A  # (out, in)
        rows = self.magnitude / adapted.norm(dim=1).detach()  # (out,)
        y = F.linear(x, adapted) * rows
        return y if self.layer.bias is None else y + self.layer.bias


dora = lora(kind=DoRALinear)
config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(ALL), use_dora=True)
theirs = peft.get_peft_model(fresh(), config)
names = FACTORS | {"magnitude": "lora_magnitude_vector.default.weight"}
torch.manual_seed(seed)
compare("DoRA", dora(fresh()), theirs, partial(renamed, names=names))
del theirs

# %%
rows = {}
for name, found in {"LoRA": costs["LoRA"], "DoRA": cost(dora)}.items():
    rows[name] = f"{found['activations']:.1f}", f"{found['ms']:.0f}"
show_table(rows, ["activations, MiB", "ms a step"])

# %% [markdown]
# **What you see.** The layer is peft's, and it has a price: the adapted matrix is made in every step, and autograd keeps it, and what the layer gave before the lengths as well. Whether it is worth it, this lesson does not say: that takes a search of the rate and several seeds for both, on a task where LoRA leaves something to be wanted.

# %% [markdown] tags=["further"]
# ## 10 · Prompt tuning: trained words
#
# *Further: no core section needs this one.*
#
# **Question.** Can the trained numbers stand outside the model altogether?
#
# **Prompt tuning** (Lester et al. 2021) trains nothing inside the model: $n$ vectors stand before the embeddings of the text, as if there were $n$ more words. They start as embeddings of random tokens.


# %%
class PromptTuning(nn.Module):
    """Trained vectors before the embeddings of the text."""

    def __init__(self, model: nn.Module, length: int):
        super().__init__()
        self.model = model
        table = model.get_input_embeddings().weight
        chosen = torch.randint(len(table), (length,)).to(table.device)
        self.prompt = nn.Parameter(table[chosen].clone())  # (length, hidden)

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        batch, length = len(input_ids), len(self.prompt)
        words = self.model.get_input_embeddings()(input_ids)  # (batch, seq, hidden)
        words = torch.cat([self.prompt.expand(batch, -1, -1), words], dim=1)
        mask = attention_mask.new_ones(batch, length)
        mask = torch.cat([mask, attention_mask], dim=1)
        output = self.model(inputs_embeds=words, attention_mask=mask, use_cache=False)
        output.logits = output.logits[:, length:]
        return output


config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16)
theirs = peft.get_peft_model(fresh(), config)
ours = PromptTuning(fresh(), 16)
name = "prompt_encoder.default.embedding.weight"
compare("prompt tuning", ours, theirs, lambda _: name)
count = num_trained(ours)
print(f"{count:,} trained, {count / SIZE:.2%} of all; LoRA {num_trained(lora()(fresh())):,}")

# %% [markdown]
# **What you see.** The layer is peft's, and trains a small part of what LoRA trains. Whether so few numbers are enough, this lesson does not measure: they want large rates and many steps, a search of its own. Prompt tuning comes close to full fine-tuning only in models of billions of parameters (Lester et al. 2021).
#
# The same family, not written here: IA3 (Liu et al. 2022; a trained factor for each key, value and number inside the feed-forward), norm tuning (Zhao et al. 2024; only the weights of the normalisation layers), bottleneck adapters (Houlsby et al. 2019), prefix tuning (Li and Liang 2021; trained keys and values in every layer), BitFit (Ben Zaken et al. 2022; biases only).

# %% [markdown] tags=["further"]
# ## 11 · Many adapters on one base
#
# *Further: no core section needs this one.*
#
# **Question.** A hundred customers have a hundred fine-tuned models. Do you need a hundred models in memory?
#
# The base is shared and an adapter is small. A *bank* holds the factors of all adapters, and each request names the one that it wants: $y_i = W x_i + s\, B_{k(i)} A_{k(i)} x_i$. The rows of one batch may name different ones. (Serving systems, such as S-LoRA of Sheng et al. 2024, do the same with special kernels.) Three adapters are at hand: LoRA at both rates of section 4, and QLoRA's.


# %%
class LoRABank(nn.Module):
    """A linear layer with several LoRA updates; `wanted` (batch,) names one for each row."""

    def __init__(self, layer: nn.Module, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.layer, self.scale, self.wanted = layer, scale, None
        self.register_buffer("A", A)  # (adapters, rank, in)
        self.register_buffer("B", B)  # (adapters, out, rank)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, in) -> (batch, seq, out)
        low = torch.einsum("bsi,bri->bsr", x, self.A[self.wanted])
        return self.layer(x) + self.scale * torch.einsum("bsr,bor->bso", low, self.B[self.wanted])


def choose(model: nn.Module, wanted: Sequence[int]) -> nn.Module:
    """Name the adapter of each row of the next batch."""
    for module in model.modules():
        if isinstance(module, LoRABank):
            module.wanted = torch.tensor(wanted, device=machine.device)
    return model


# %%
ADAPTERS = ["LoRA", "LoRA, high", "QLoRA"]
bank = fresh()
for name in LINEAR:
    stacked = (torch.stack([kept_parts[a][f"{name}.{f}"] for a in ADAPTERS]) for f in "AB")
    A, B = (factors.to(machine.device) for factors in stacked)
    parent, _, leaf = name.rpartition(".")
    layer = LoRABank(bank.get_submodule(name), A, B, scale=2)
    setattr(bank.get_submodule(parent), leaf, layer)
size = sum(tensor.nbytes for tensor in kept_parts["LoRA"].values())
print(f"base {4 * SIZE / 2**20:.1f} MiB, each adapter {size / 2**20:.2f} MiB")
lesson.report("bytes of the base in those of one adapter", 4 * SIZE / size, form=".0f")

# %%
requests = [0, 1, 2, 1, 0, 2]  # which adapter each row of the batch asks for
rows = held_out[:6]
together = logits_of(choose(bank, requests), rows)
one_by_one = torch.zeros_like(together)
for number, name in enumerate(ADAPTERS):
    alone = logits_of(put_back(name, lora()), rows)
    for row in (i for i, asked in enumerate(requests) if asked == number):
        one_by_one[row] = alone[row]
gap, apart = largest(together, one_by_one), largest(together[:1], alone[:1])
print(f"another adapter would have changed a logit by {apart:.1f}")
lesson.equal("a mixed batch gives what each adapter gives alone", gap, within=1e-3)
del bank

# %%
theirs = peft.get_peft_model(fresh(), lora_config, adapter_name="a0")
for number in (1, 2):
    theirs.add_adapter(f"a{number}", lora_config)
found = dict(theirs.named_parameters())
for number, adapter in enumerate(ADAPTERS):
    names = {factor: f"lora_{factor}.a{number}.weight" for factor in "AB"}
    for name, tensor in kept_parts[adapter].items():
        found[renamed(name, names)].data.copy_(tensor)
batch = batch_of(rows)
batch.pop("labels")
with torch.no_grad():
    asked = [f"a{number}" for number in requests]
    mixed = theirs.eval()(**batch, adapter_names=asked).logits.float().cpu()
lesson.equal("and what peft gives", largest(together, mixed), within=1e-3)
del theirs, found

# %% [markdown]
# **What you see.** One base and three small sets of factors answer one batch of three kinds of requests, each as its own model would. The hundredth customer costs one more adapter.

# %% [markdown] tags=["further"]
# ## 12 · A branch that starts at zero
#
# *Further: no core section needs this one.*
#
# **Question.** How do you give a trained model a new input without breaking it?
#
# ControlNet (Zhang et al. 2023) steers an image model by edges or poses. A trainable branch runs beside the frozen network, sees the new input, and is joined to it through a layer whose weights start at zero, like LoRA's $B$. So the whole starts as the old model, and at the start no noise of untrained weights reaches it. Is a layer of zeros not stuck? Its output is $Z h$, and $\partial L / \partial Z = g h^\top$ is not zero, since $h$ is not. After one step $Z$ is not zero, and the rest of the branch gets gradients too.
#
# Here the branch stands beside each feed-forward: $\text{FFN}(x) + Z\,\phi(D x + E_c)$. The condition $c$ is the mood, good or bad, of a review that the model is to write, and $E_c$ a trained vector for it.


# %%
class ZeroBranch(nn.Module):
    """A module with a trained branch beside it that starts at zero and sees a condition."""

    def __init__(self, module: nn.Module, size: int, width: int = 32, conditions: int = 2):
        super().__init__()
        self.module = module
        self.down = nn.Linear(size, width, device=machine.device)
        self.embed = nn.Embedding(conditions, width, device=machine.device)
        self.zero = nn.Linear(width, size, device=machine.device)
        self.condition = torch.zeros(1, dtype=torch.long, device=machine.device)
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, hidden)
        inside = self.down(x) + self.embed(self.condition)[:, None]  # (batch, seq, width)
        return self.module(x) + self.zero(F.silu(inside))


def steer(model: nn.Module, moods: Tensor) -> None:
    """Set the condition of every branch: 0 is good, 1 is bad; (batch,) or (1,)."""
    for module in model.modules():
        if isinstance(module, ZeroBranch):
            module.condition = moods.to(machine.device)


# %% [markdown]
# The training text is reviews as in pretraining, and nothing in the text says which mood is wanted: only the branch knows.

# %%
def steered_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch of reviews, each under its mood."""
    steer(model, batch["mood"])
    inputs = {name: value for name, value in batch.items() if name != "mood"}
    return causal_lm_loss(model, inputs)


rng, batches = random.Random(seed), []
for _ in range(STEPS):
    reviews = [world.review(rng) for _ in range(12)]
    rows = [encode("Review:", f" {text}\n") for text, _ in reviews]
    moods = torch.tensor([list(MOODS).index(mood) for _, mood in reviews])
    batches.append(collate(rows, tokenizer.pad_token_id) | {"mood": moods})
torch.manual_seed(seed)
make = partial(ZeroBranch, size=base.config.hidden_size)
writer = wrap(fresh(), ("mlp",), make)
gap = largest(logits_of(writer, held_out[:4]), logits_of(fresh(), held_out[:4]))
lesson.equal("the branch starts as the base model", gap)
rate, precision = 1e-2 * settings["rate"], settings["precision"]
config = TrainConfig(max_steps=STEPS, learning_rate=rate, weight_decay=0.0,
                     precision=precision, progress=False, seed=seed)  # fmt: skip
losses = train(writer, batches, config, loss_fn=steered_loss).losses
print(f"loss {losses[0]:.3f} -> {np.mean(losses[-5:]):.3f}")

# %% [markdown]
# Now let it write for each mood, sampled at temperature 1. A review counts if it holds more adjectives of the wanted mood than of the other. The control is the same trained model with the other condition: what it writes of the wanted mood when it is asked for the opposite.


# %%
def mood_of(review: str) -> int:
    """+1 if it has more good adjectives than bad ones, -1 if fewer, else 0."""
    words = (MOODS[mood][0] for mood in ("good", "bad"))
    good, bad = (sum(map(review.count, adjectives)) for adjectives in words)
    return (good > bad) - (good < bad)


sampling = {"num_samples": max(8, lesson.scaled(50)), "temperature": 1.0, "batch_size": 64}
found = {}
for index, mood in enumerate(MOODS):
    steer(writer, torch.tensor([index]))
    (written,) = generate(writer, tokenizer, ["Review:"], 40, seed=seed, **sampling)
    found[mood] = [mood_of(text) for text in written]
    for text in written[:3]:
        print(f"{mood} wanted, written: {text.strip()!r}")
steered, moods = {}, [*MOODS]
for mood, opposite, sign in zip(moods, moods[::-1], (1, -1), strict=True):
    asked = {"asked for it": found[mood], "asked for the other": found[opposite]}
    steered[mood] = {name: score(f.count(sign), len(f)) for name, f in asked.items()}
    for name, right in steered[mood].items():
        print(f"{mood} reviews, {name}: {right}")
wanted, other = ([f[name].accuracy for f in steered.values()] for name in steered["good"])
lesson.claim(
    "the branch steers: at least 20 points more reviews of either mood when asked for it",
    min(np.subtract(wanted, other)), at_least=0.2, form=".0%",
)  # fmt: skip
del writer

# %%
figure, axes = plt.subplots(figsize=(7, 2.6))
tints, position = {"asked for it": plots.INK, "asked for the other": plots.GREY}, 0
for found in steered.values():
    for name, hits in found.items():
        label = name if position < 2 else None
        axes.barh(position, hits.accuracy, color=tints[name], label=label)
        axes.plot([hits.low, hits.high], [position] * 2, color="white", linewidth=3)
        axes.plot([hits.low, hits.high], [position] * 2, color=plots.COLORS[5])
        position += 1
axes.set_yticks([0.5, 2.5], [f"{mood} reviews" for mood in steered])
axes.invert_yaxis()
axes.set(xlim=(0, 1), xlabel="share of the sampled reviews")
axes.xaxis.set_major_formatter(plots.PERCENT)
axes.set_title("The branch's condition sets the mood of most reviews")
axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left")
alt = "Share of good and of bad reviews, with intervals: most when the branch is asked for "
plots.show(figure, alt=alt + "that mood, few when it is asked for the other.")

# %% [markdown]
# **What you see.** One run. The frozen weights are the same all the time, and the text before the review too; only the condition differs, and with it the mood of most reviews. Not of all: read a few.

# %% [markdown] tags=["further"]
# ## 13 · 8-bit and paged optimisers
#
# *Further: no core section needs this one.*
#
# **Question.** What does an optimiser with 8-bit state save, and where does it matter?
#
# Adam keeps two numbers for each trained weight, 8 bytes in fp32. The 8-bit Adam of bitsandbytes (Dettmers et al. 2022) keeps both in the dynamic type of section 6, in blocks of 256, and computes in fp32. The paged one keeps them in memory that the driver moves between GPU and CPU as needed; on a CPU there is nothing to page, and bitsandbytes says so in a warning and does the rest. With LoRA there is little state to save, and tensors under 4,096 numbers stay in fp32 anyway. So try it where it counts, in full fine-tuning.


# %%
def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's state; the 8-bit levels, which all tensors share, aside."""
    entries = [item for state in optimizer.state.values() for item in state.items()]
    return sum(v.nbytes for n, v in entries if torch.is_tensor(v) and "qmap" not in n)


OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, fused=True, weight_decay=0.0),
    "adamw_8bit": partial(bnb.optim.AdamW8bit, weight_decay=0.0),
    "paged_adamw_8bit": partial(bnb.optim.PagedAdamW8bit, weight_decay=0.0),
}
rows, off = {}, []
for name, make in OPTIMIZERS.items():
    model, steps = everything(fresh()), lesson.scaled(4)
    optimizer = make(model.parameters(), lr=5e-4 * settings["rate"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paging on a CPU
        given = {"optimizer_fn": lambda _, made=optimizer: made}
        losses = fit(model, rows_of(steps * BATCH, seed), 5e-4, steps, **given).losses
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    planned, found = sum(optimizer_state(name, shapes, width=4)), state_bytes(optimizer)
    off.append(abs(planned - found) / max(1, found))
    rows[name] = f"{losses[0]:.3f}", f"{losses[-1]:.3f}", f"{found / SIZE:.2f}"
    lesson.report(f"{name}, bytes a parameter", found / SIZE, form=".2f")
show_table(rows, ["first loss", f"after {steps} steps", "bytes a parameter"])
del model, optimizer
lesson.equal("helpers.memory plans the state within 1 %", max(off), within=0.01)

# %% [markdown]
# **What you see.** A quarter of the bytes, and over these few steps the same losses in all printed digits.

# %% [markdown] tags=["further"]
# ## 14 · The numbers of the paper
#
# *Further: no core section needs this one.*
#
# **Question.** LoRA's abstract promises 10,000 times fewer trained parameters and 3 times less GPU memory for GPT-3 with 175 billion parameters. Where do these numbers come from?
#
# GPT-3 has 96 layers of width $d = 12{,}288$. LoRA on query and value trains $96 \cdot 2 \cdot r (d + d)$ numbers. The paper's checkpoint of 35 MB and the factor of 10,000 belong to $r = 4$ (38 million bytes are 36 MiB). For memory, `helpers.memory` follows a training step: full fine-tuning in 16 bit with Adam against LoRA, one row of 2,048 tokens with activation checkpointing, before any division among GPUs.

# %%
sizes = {"vocab_size": 50257, "n_embd": 12288, "n_layer": 96, "n_head": 96}
GPT3 = ModelShape.from_config({"model_type": "gpt2", "n_positions": 2048} | sizes)
print(f"GPT-3: {GPT3.num_parameters / 1e9:.1f} B parameters")
counts, rows = {}, {}
for rank in (1, 2, 4, 8):
    counts[rank] = 96 * 2 * rank * (12288 + 12288)
    fewer, size = GPT3.num_parameters / counts[rank], 2 * counts[rank]
    trained = f"{counts[rank] / 1e6:.1f} M"
    rows[f"r = {rank}"] = trained, f"{fewer:,.0f}", f"{size / 1e6:.0f} MB"
show_table(rows, ["trained", "times fewer", "16-bit checkpoint"])
paper = {1: 4.7, 8: 37.7}  # millions, table 4 of the paper
off = max(abs(counts[rank] / 1e6 - said) for rank, said in paper.items())
lesson.equal("our counts are the paper's, in millions", off, within=0.05)
fewer = GPT3.num_parameters / counts[4]
lesson.report("GPT-3, LoRA with r = 4: times fewer", fewer, form=",.0f")

# %%
common = {"precision": "fp16", "batch_size": 1, "seq_len": 2048}
common |= {"gradient_checkpointing": True}
everywhere = estimate_training(GPT3, method="full", **common)
place = {"lora_rank": 4, "lora_targets": ("qkv_proj",)}
adapted = estimate_training(GPT3, method="lora", **place, **common)
rows = {}
for name, found in {"full": everywhere, "LoRA": adapted}.items():
    parts = found.total, found.parameters, found.gradients, found.optimizer
    rows[name] = [f"{part / 1e9:,.1f}" for part in parts]
show_table(rows, ["GB in all", "weights", "gradients", "optimiser"])
ratio = everywhere.total / adapted.total
print(f"{ratio:.1f} times less")
lesson.report("GPT-3: memory of full fine-tuning over LoRA's", ratio, form=".1f")

# %% [markdown]
# The paper reports 1.2 TB and 350 GB. LoRA's 350 GB are the weights in 16 bit and little else, as here. For full fine-tuning `helpers.memory` counts 8 bytes a parameter (weight, gradient and two moments in 16 bit); 1.2 TB are 6.9 bytes, so something in the paper's setup was stored smaller or elsewhere; it does not say what. With moments in fp32, as mixed precision has them, the factor would be larger.
#
# A hub model on a small card is the case that you will meet. What does a model with three billion parameters need on a T4, with batches of 4 rows of 512 tokens? A T4 has no bf16. Training there is mixed: fp16 for the products, fp32 for the weights that are trained, because PyTorch's `GradScaler` refuses gradients in fp16.

# %%
shape = ModelShape.from_config("Qwen/Qwen2.5-3B")
plan = {"batch_size": 4, "seq_len": 512, "precision": "fp16-mixed", "lora_rank": 16}
rows = {}
for method, optimizer, again in (
    ("full", "adamw", True),
    ("lora", "adamw", True),
    ("qlora", "paged_adamw_8bit", False),
    ("qlora", "paged_adamw_8bit", True),
):
    plan["gradient_checkpointing"] = again
    found = estimate_training(shape, method=method, optimizer=optimizer, **plan)
    fits = "yes" if found.fits(GPUS["T4"]) else "no"
    name = f"{method}, {optimizer}, {'checkpointing' if again else 'no checkpointing'}"
    rows[name] = f"{found.total / GIB:.1f}", fits
show_table(rows, ["GiB", "fits a T4"])
lesson.report("3 B model by QLoRA on a T4, helpers.memory", f"{found.total / GIB:.1f} GiB")

# %% [markdown]
# **What you see.** One row of four fits, by estimate. It takes both 4-bit weights and activation checkpointing: without either it is too much for the card. The small optimiser hardly counts, since LoRA has little state (section 13).

# %% [markdown]
# ## 15 · Exercises
#
# Five, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.


# %% tags=["exercise"]
# Exercise 6.1, easy: how many parameters?
def lora_parameters(model: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Number of parameters that LoRA of this rank trains on the nn.Linear layers named in `targets`.

    `model.named_modules()` gives the path of each layer; a layer is adapted if the part of
    its path after the last dot is one of `targets`.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_lora_parameters(lora_parameters):
    block = nn.ModuleDict({"q_proj": nn.Linear(6, 4), "up_proj": nn.Linear(6, 10, bias=False), "norm": nn.LayerNorm(6)})
    others = {"q_proj_norm": nn.Linear(3, 3), "kq_proj": nn.Linear(3, 3)}  # no targets below
    small = nn.ModuleDict({"first": block, "v_proj": nn.Linear(6, 2)} | others)
    expect_equal("of q_proj at rank 1", lora_parameters(small, 1, ["q_proj"]), 10)
    expect_equal("of q_proj and up_proj at rank 3", lora_parameters(small, 3, ["q_proj", "up_proj"]), 78)
    expect_equal("of q_proj, v_proj at rank 2", lora_parameters(small, 2, ("q_proj", "v_proj")), 36)
    expect_equal("of norm, which is no nn.Linear", lora_parameters(small, 2, ["norm"]), 0)


check("6.1", check_lora_parameters, lora_parameters)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A has rank x in numbers and B has out x rank; walk over `named_modules()` and compare the last part of the name.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# $A$ has $r\, d_\text{in}$ numbers and $B$ has $r\, d_\text{out}$; the bias plays no part.
#
# ```python
# def lora_parameters(model: nn.Module, rank: int, targets: Sequence[str]) -> int:
#     total = 0
#     for name, layer in model.named_modules():
#         if isinstance(layer, nn.Linear) and name.split(".")[-1] in targets:
#             total += rank * (layer.in_features + layer.out_features)
#     return total
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 6.2, medium: add two adapters.
def add_adapters(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """One adapter (A, B) whose update B A is weights[0] B1 A1 + weights[1] B2 A2, exactly.

    `first` is (A1, B1) with A1 (r1, in) and B1 (out, r1), `second` likewise with r2. The
    result has the rank r1 + r2. Change no argument.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_add_adapters(add_adapters):
    generator = torch.Generator().manual_seed(5)
    for ranks, weights in (((2, 2), (1.0, 1.0)), ((1, 3), (0.5, -2.0))):
        A1, A2 = (torch.randn(rank, 7, generator=generator) for rank in ranks)
        B1, B2 = (torch.randn(5, rank, generator=generator) for rank in ranks)
        given = {"A1": A1, "B1": B1, "A2": A2, "B2": B2}
        copies = {name: tensor.clone() for name, tensor in given.items()}
        A, B = add_adapters((A1, B1), (A2, B2), weights)
        call = f"add_adapters of the ranks {ranks} with the weights {weights}"
        expect_shape(f"A of {call}", A, (sum(ranks), 7))
        expect_shape(f"B of {call}", B, (5, sum(ranks)))
        parts = weights[0] * copies["B1"] @ copies["A1"], weights[1] * copies["B2"] @ copies["A2"]
        expect_close(f"B A of {call}", B @ A, sum(parts), 1e-4)
        for name, tensor in given.items():
            expect_close(f"{name} afterwards", tensor, copies[name], 0.0)


check("6.2", check_add_adapters, add_adapters)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The sum of the factors is not the answer: $(B_1 + B_2)(A_1 + A_2)$ has four terms. Two rows of A and two columns of B that never meet give two terms.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Stack the rows of the $A$s, and set the columns of the $B$s side by side. The weight goes to one of the factors, not to both. So adapters can be added without loss, and the rank grows; a library that keeps the rank has to approximate.
#
# ```python
# def add_adapters(
#     first: tuple[Tensor, Tensor],
#     second: tuple[Tensor, Tensor],
#     weights: tuple[float, float],
# ) -> tuple[Tensor, Tensor]:
#     (A1, B1), (A2, B2) = first, second
#     return torch.cat([A1, A2]), torch.cat([weights[0] * B1, weights[1] * B2], dim=1)
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 6.3, medium: predict, then measure.
def update_ratio(optimizer: str, factor: float) -> float:
    """How many times longer |s B A| is after one step if alpha is `factor` times as large.

    A LoRA layer starts with B = 0 and takes one step, with the same rate both times.
    "sgd" moves B by the rate times its gradient; "adam" divides the gradient by its size.
    """
    raise NotImplementedError


# %% tags=["check"]
def measured_update(optimizer: str, alpha: float) -> float:
    """Length of s B A of a small layer after one step."""
    generator = torch.Generator().manual_seed(9)
    x, target, A = (torch.randn(*s, generator=generator) for s in ((32, 6), (32, 5), (2, 6)))
    A, B = nn.Parameter(A), nn.Parameter(torch.zeros(5, 2))
    make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    step, scale = make([A, B], lr=1e-3), alpha / 2
    ((scale * x @ A.T @ B.T - target) ** 2).mean().backward()
    step.step()
    return float((scale * B @ A).detach().norm())


def check_update_ratio(update_ratio):
    for optimizer in ("sgd", "adam"):
        for factor in (3.0, 8.0):
            found = measured_update(optimizer, 4 * factor) / measured_update(optimizer, 4)
            near = abs(update_ratio(optimizer, factor) / found - 1) < 0.02
            expect_true(f"update_ratio({optimizer!r}, {factor:g}) is what is measured", near)


check("6.3", check_update_ratio, update_ratio)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Section 3 has the gradient of $B$. How often does $s$ occur in the update of $B$, and how often in $sBA$?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The gradient of $B$ has one factor $s$, the product $sBA$ another one. Adam divides the first one out. So with Adam $\alpha$ acts like a learning rate of $B$; with plain SGD $\alpha^2$ does. $A$ does not move in the first step, since its gradient is zero.
#
# ```python
# def update_ratio(optimizer: str, factor: float) -> float:
#     return factor**2 if optimizer == "sgd" else factor
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 6.4, hard: start from the largest directions (PiSSA, Meng et al. 2024).
def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Residual (out, in), A (rank, in), B (out, rank): residual + scale B A = weight.

    B A takes the part of the weight with the `rank` largest singular values, so that
    training begins in the directions that matter most. Row i of A and column i of B have
    the same length: the square root of the singular value i over `scale`. The residual is
    what stays frozen.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_pissa(pissa):
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(6, 9, generator=generator)
    s = torch.linalg.svdvals(weight)
    for rank, scale in ((1, 1.0), (3, 2.0)):
        residual, A, B = pissa(weight.clone(), rank, scale)
        call = f"pissa(weight, {rank}, {scale})"
        expect_shape(f"A of {call}", A, (rank, 9))
        expect_shape(f"B of {call}", B, (6, rank))
        expect_close(f"residual + scale B A of {call}", residual + scale * B @ A, weight, 1e-4)
        left = torch.linalg.svdvals(residual)[: 6 - rank]
        expect_close(f"singular values left in the residual of {call}", left, s[rank:], 1e-3)
        lengths = torch.diag(s[:rank] / scale)
        expect_close(f"A @ A.T of {call}", A @ A.T, lengths, 1e-3)
        expect_close(f"B.T @ B of {call}", B.T @ B, lengths, 1e-3)


check("6.4", check_pissa, pissa)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `torch.linalg.svd(weight, full_matrices=False)` gives the directions in falling order; the scale has to be divided out of the product of A and B.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The scale is divided out of both factors alike.
#
# ```python
# def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
#     u, s, vh = torch.linalg.svd(weight, full_matrices=False)
#     roots = (s[:rank] / scale).sqrt()
#     A, B = roots[:, None] * vh[:rank], u[:, :rank] * roots
#     return weight - scale * B @ A, A, B
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 6.5, open: forget less with fewer numbers.
def gentle() -> tuple[Callable[[nn.Module], nn.Module], float]:
    """A LoRA, such as lora(rank=..., targets=..., scale=...), and a learning rate.

    It must train at most 1.5 % of the parameters, reach the goal of section 4 within its
    limit of steps, and lose at most 0.2 nats on documents by then.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_gentle(gentle):
    method, rate = gentle()
    trained = num_trained(method(fresh()))
    expect_true(f"{trained:,} are at most 1.5 % of {SIZE:,}", 0 < trained <= 0.015 * SIZE)
    run = reach(method, rate)
    expect_true(f"the goal is reached in {LIMIT} steps", run["steps"] is not None)
    expect_true(f"{run['rise']:+.3f} nats are at most +0.2", run["rise"] <= 0.2)


check("6.5", check_gentle, gentle)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Compare the runs of section 4 and their $\alpha$. A smaller rank is slower: what makes up for it?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# One of several. A larger scale lets $B$ do more of the work, so a rate not far from that of full rank is quick enough. For $B$ alone $\alpha = 32r$ at a tenth of the rate is like 1.6 times the step of $\alpha = 2r$, and in section 4 it lost less all the same. So $\alpha$ is not only another learning rate.
#
# ```python
# def gentle() -> tuple[Callable[[nn.Module], nn.Module], float]:
#     return lora(rank=2, scale=32), 5e-4
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on figures of this lesson: those of sections 4 and 5. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. Someone reports: "At the same learning rate, LoRA forgets less than full fine-tuning." What is the first thing to ask?**
#
# - A. How many parameters LoRA trained.
# - B. How much each of the two had learnt by then.
# - C. Whether the weights were in 4 bits.
# - D. How large the batches were.
#
# <details><summary>Answer</summary>
#
# B. A method that is behind has had less chance to learn and to forget. LoRA wants a larger rate, so at the same rate it is often behind. Section 4 makes the quality equal first.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. In the figure of section 4 the triangles stand far above the discs of their colour, though all runs were stopped at the same goal. What follows for a task of your own?**
#
# - A. Take the highest rate that still reaches the goal, since it needs the fewest steps.
# - B. Rates that reach the same quality may cost different amounts of the old abilities: measure both.
# - C. LoRA forgets more than full fine-tuning, so take full fine-tuning.
# - D. Stop earlier: at equal quality all methods would have lost the same.
#
# <details><summary>Answer</summary>
#
# B. All runs of the figure were stopped at the same goal (against D). Its discs say that the answer to C depends on $\alpha$ and the rate.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. In the figure of section 5 the lines of rank 1 end far above the others. In the table below it, rank 1 reached the goal of section 4. Which reading fits both?**
#
# - A. Rank 1 has too few numbers to hold the codes.
# - B. The instructions use what the model can do already; the codes are new content, which rank 1 learned more slowly here.
# - C. The codes are longer than the instructions.
# - D. Rank 1 saw fewer rows of codes than the other ranks.
#
# <details><summary>Answer</summary>
#
# B. Rank 1 has some thirty numbers for each bit of the codes, and all runs of section 5 have the same steps and rows.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. You fine-tune a model of 7 billion parameters with LoRA, in rows of 8,000 tokens, and run out of memory. What helps most?**
#
# - A. A smaller rank.
# - B. An 8-bit optimiser.
# - C. Activation checkpointing.
# - D. The frozen weights in 4 bits.
#
# <details><summary>Answer</summary>
#
# C. Gradients and optimiser of LoRA are small already (section 8). The weights are about 15 GB in 16 bits, and 4 bits save two thirds of that. With rows this long the activations are several times as much.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. After QLoRA you merge the adapter and store the result in 4 bits again. When is the training most at risk to be lost?**
#
# - A. When it moved each weight by much less than the way to the next level.
# - B. When the rank of the update is high.
# - C. When the base was quantised twice, its absmax values too.
# - D. When the rounding moves the weights by more than a tenth of their size.
#
# <details><summary>Answer</summary>
#
# A. The base stands on the levels, and what moves by less than half the way to the next one is rounded back. D sounds alike, but the smaller the update, the less the rounding moves.
#
# </details>

# %% [markdown]
# ## What we saw
#
# All numbers of this table were measured or calculated above, in this run.

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# With the libraries you write none of this: `SFTTrainer` takes a `peft_config`, freezes the model and trains the adapter. On a GPU the model is the profile's hub model and the data are chats from the hub; here both are Shima's.

# %%
from datasets import Dataset
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from helpers.data import instruction_dataset

CPU, FOLDER = machine.device == "cpu", ROOT / "build" / "lesson06-adapter"
chosen = {"tasks": TASKS} if CPU else {}
source = instruction_dataset(machine, lesson.scaled(96), seed=seed, **chosen)
pairs = [(row["instruction"] + "\n", row["answer"] + "\n") for row in source]
pairs = [(prompt, answer) for prompt, answer in pairs if len(prompt + answer) < 2000]
columns = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
warnings.filterwarnings("ignore", message=".*pin_memory")

# %%
arguments = SFTConfig(
    output_dir=str(FOLDER), max_steps=lesson.scaled(16), per_device_train_batch_size=settings["rows"],
    gradient_accumulation_steps=8 // settings["rows"],
    learning_rate=5e-3 if CPU else 2e-4, lr_scheduler_type="linear", logging_steps=1,
    max_length=512, gradient_checkpointing=False, save_strategy="no", report_to="none",
    disable_tqdm=True, use_cpu=CPU, bf16=settings["precision"] == "bf16-mixed",
    fp16=settings["precision"] == "fp16-mixed", seed=seed,
)  # fmt: skip
adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
trainer = SFTTrainer(
    fresh(), arguments, train_dataset=Dataset.from_list(columns), processing_class=tokenizer,
    peft_config=adapter,
)  # fmt: skip
trainer.remove_callback(PrinterCallback)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {np.mean(losses[-3:]):.2f}, {num_trained(trainer.model):,} trained")
right, _ = quality(trainer.model)
print(f"held-out instructions of section 1: {right}")
lesson.report("SFTTrainer with a peft_config, held-out instructions", str(right))

# %% [markdown]
# (75 % may mean no more than all lists and one word for every review: look by task before you trust such a share.) Save the adapter, read it back on a fresh base, merge it, and you have a plain model again. For QLoRA load the base with a `BitsAndBytesConfig` (section 6) and give that model to `SFTTrainer`; merge into a base that was read in 16 bits, not into the 4-bit one.

# %%
trainer.save_model(str(FOLDER))
size = sum(path.stat().st_size for path in FOLDER.glob("*.safetensors"))
print(f"adapter on disk {size / 2**20:.1f} MiB, the model {4 * SIZE / 2**20:.1f} MiB")
trained = logits_of(trainer.model, held_out[:8])
again = peft.PeftModel.from_pretrained(fresh(), str(FOLDER)).merge_and_unload()
gap = largest(trained, logits_of(again, held_out[:8]))
print(f"{type(again).__name__}, largest difference of the logits {gap:.1e}")
lesson.equal("saved, read back and merged, it is the same model", gap, within=1e-3)

# %% [markdown]
# **What is different at scale**
#
# | here | a real system |
# |---|---|
# | tens of steps on two tasks of form | thousands of steps; with much data on hard tasks full fine-tuning learns more (Biderman et al. 2024), on data that fit into the adapter LoRA is its equal (Schulman et al. 2025) |
# | rank 4, 16 for new content | rank 8 to 64 or more on all linear layers, $\alpha$ of one to two times the rank, learning rates some ten times those of full fine-tuning |
# | beside an adapter, the activations are most of a step's memory | with long rows even more so; checkpointing saves them (lesson 07) |
# | NF4 made and unmade by table look-ups in PyTorch | one fused kernel; 4-bit training is still slower than 16-bit training |
# | the bank copies the factors of each row's adapter, then multiplies | kernels that read each row's adapter where it lies |
# | a plain-text format | the model's chat format; if you add tokens, train their rows too |
#
# When in doubt: LoRA on all linear layers, and a search of the learning rate before anything else. A higher rank if the data are much new content. QLoRA when the weights do not fit. Full fine-tuning when the data are many and the hardware is there.
#
# ## Read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685; Aghajanyan et al. 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning*, arXiv:2012.13255.
# - Schulman et al. 2025, *LoRA Without Regret*, thinkingmachines.ai/blog/lora; Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, arXiv:2405.09673; Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, arXiv:2410.21228.
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, arXiv:2312.03732; Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353; Meng et al. 2024, *PiSSA*, arXiv:2404.02948.
# - Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv:2305.14314; Dettmers et al. 2022, *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861.
# - Lester et al. 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv:2104.08691; Liu et al. 2022, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning* (IA3), arXiv:2205.05638; Zhao et al. 2024, *Tuning LayerNorm in Attention*, arXiv:2312.11420.
# - Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP*, arXiv:1902.00751; Li and Liang 2021, *Prefix-Tuning*, arXiv:2101.00190; Ben Zaken et al. 2022, *BitFit*, arXiv:2106.10199; He et al. 2022, *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv:2110.04366.
# - Zhang et al. 2023, *Adding Conditional Control to Text-to-Image Diffusion Models* (ControlNet), arXiv:2302.05543.
# - Ilharco et al. 2023, *Editing Models with Task Arithmetic*, arXiv:2212.04089; Sheng et al. 2024, *S-LoRA: Serving Thousands of Concurrent LoRA Adapters*, arXiv:2311.03285.
