# %% [markdown]
# # 06 · PEFT: fine-tune with two percent of the parameters
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/06_peft.ipynb)
#
# Full fine-tuning changes every weight, keeps three more numbers for each of them while it trains, and leaves you with a second model to store. Parameter-efficient fine-tuning (PEFT) freezes the model and trains something small beside it. In this lesson you write eleven such methods, each in at most 30 lines, train all of them on the same data for the same number of steps, and measure what each costs, what it learns and what it makes the model forget. Then you use what is special about small adapters: merge them, swap them, serve several in one batch, add and subtract them.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write LoRA, rsLoRA, DoRA, QLoRA, bottleneck adapters, prefix and prompt tuning, IA3, BitFit, norm tuning and a zero-initialised branch, and find them equal to `peft`: same weights in, same outputs and same gradients out;
# 2. write NF4 with double quantisation, equal to `bitsandbytes` bit for bit;
# 3. look at the update that full fine-tuning makes with the SVD, and choose rank, alpha, learning rate and layers by measurement;
# 4. put all methods in one table: trained parameters, optimiser bytes, peak memory, step time, quality, forgetting;
# 5. merge, unmerge, switch, batch, add and negate adapters, and compute the numbers of the LoRA paper for GPT-3.
#
# **Prerequisites:** lesson 05.
#
# **The model** is *shima-4m*, a small Llama that was pretrained on text about the made-up island Shima and comes with the course. On a GPU the same cells tune an open hub model. **The task** is to follow two kinds of instruction: judge a review, and look up a colour in a list of pairs.
#
# | symbol | meaning |
# |---|---|
# | $W$ | a frozen weight matrix, $(d_\text{out}, d_\text{in})$ |
# | $\Delta W$ | its update, what fine-tuning adds |
# | $r$ | rank of the update, or width of an adapter |
# | $A$, $B$ | the factors of LoRA, $(r, d_\text{in})$ and $(d_\text{out}, r)$ |
# | $\alpha$, $s$ | LoRA's constant and its scale, $s = \alpha / r$ |

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

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from helpers import plots
from helpers.chat import encode_answer
from helpers.data import PaddedBatches, collate, instruction_dataset
from helpers.errors import CourseError
from helpers.evaluation import Score, score
from helpers.exercises import check, expect_close, expect_equal, expect_shape, expect_true
from helpers.generation import generate
from helpers.lesson import Lesson
from helpers.memory import GIB, GPUS, ModelShape, estimate_training, optimizer_state
from helpers.models import load_model
from helpers.training import TrainConfig, causal_lm_loss, train
from helpers.world import MOODS, World, sum_with_steps

warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft asks by an old name
warnings.filterwarnings("ignore", message="Unsupported layer type")  # peft does not know Llama's norm by name
lesson = Lesson("06", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # factor on the learning rates (large models want smaller ones), number format of the computing
    "cpu": {"rate": 1.0, "precision": "fp32"},
    "t4": {"rate": 0.05, "precision": "fp16-mixed"},
    "large": {"rate": 0.05, "precision": "bf16-mixed"},
}
settings = SETTINGS[machine.name] | ({"precision": "fp32"} if machine.device == "cpu" else {})

# %% [markdown]
# `fresh` returns a frozen copy of the base model in fp32, which every method starts from. `lesson.scaled` makes a number of steps or questions smaller on a smaller budget. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep, `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
world = World()
base, tokenizer = load_model(machine)
base = base.float().cpu().requires_grad_(False)
STEPS, BATCH = lesson.scaled(40), 12


def fresh() -> nn.Module:
    """A frozen copy of the base model."""
    return copy.deepcopy(base).to(machine.device)


def num_trained(model: nn.Module) -> int:
    """Number of parameters that the optimiser moves."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


SIZE = sum(parameter.numel() for parameter in base.parameters())
print(f"{SIZE:,} parameters; {STEPS} steps of {BATCH} instructions for every method")

# %% [markdown]
# ## 1 · The task, and what full fine-tuning does with it
#
# **Question.** What can full fine-tuning learn in a few steps, and what does it cost?
#
# Two instructions, in plain text: the instruction, a line break, the answer, a line break. The loss is taken over the answer only. (Not in the chat format of lesson 05: its markers are tokens that shima-4m has never seen, and a method that freezes the embeddings cannot learn them. With `peft` you would train those rows too, with `trainable_token_indices`.)
#
# Greedy decoding gives exactly the right answer if and only if each token of the answer is the most probable one after the tokens before it. So one forward pass over question and answer together scores all questions of a batch, with no decoding.

# %%
TASKS = ("mood", "pairs")
encode = partial(encode_answer, tokenizer)  # (prompt, answer) -> tokens, and labels that are -100 in the prompt


def instructions(n: int, stream: int, tasks: Sequence[str] = TASKS, held_out: bool = False) -> list:
    """`n` instructions, the tasks in turn; held-out ones use words and reviews that training never does."""
    rng = random.Random(f"{stream}/{held_out}")
    items = [world.chat(rng, tasks[i % len(tasks)], held_out) for i in range(n)]
    return [(item.prompt + "\n", item.answer + "\n") for item in items]


tests = {task: instructions(lesson.scaled(80), seed, (task,), held_out=True) for task in TASKS}
held_out = [encode(*pair) for task in TASKS for pair in tests[task]]
for task in TASKS:
    prompt, answer = tests[task][0]
    print(f"{task}: {prompt!r} -> {answer!r}")
print(f"mean length {np.mean([len(row['input_ids']) for row in held_out]):.0f} tokens")


# %%
@torch.no_grad()
def answered(model: nn.Module, rows: list[dict], batch_size: int = 50) -> tuple[list[bool], float]:
    """Whether greedy decoding gives each right answer, and the mean loss of an answer token in nats."""
    right, total, count = [], 0.0, 0
    model.eval()
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], tokenizer.pad_token_id)
        batch = {name: tensor.to(machine.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")[:, 1:]  # (batch, seq - 1): the token after each position
        logits = model(**batch).logits[:, :-1].float()  # (batch, seq - 1, vocab)
        right += ((logits.argmax(-1) == labels) | (labels == -100)).all(dim=1).tolist()
        total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return right, total / count


def quality(model: nn.Module) -> tuple[Score, float]:
    """Exact match on the held-out instructions with its interval, and the loss there."""
    right, loss = answered(model, held_out)
    return score(sum(right), len(right)), loss


before, loss_before = quality(fresh())
print(f"base model: {before}, loss {loss_before:.2f} nats")
lesson.report("base model, held-out instructions", str(before))


# %% [markdown]
# **Forgetting** needs a second yardstick: things that the base model could do before, in the formats of pretraining. Facts about well-known people, reading a passage, mappings shown in the prompt, and sums with written steps; and the loss on fresh documents.

# %%
def ability_rows(n: int) -> dict[str, list[dict]]:
    """Held-out questions on what the base model can do, as rows of tokens, and fresh documents."""
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
            answers = [sum_with_steps([int(term) for term in re.findall(r"\d+", item.prompt)]) for item in items]
        end = ";" if name == "mappings" else "\n"
        pairs = zip(items, answers, strict=True)
        found[name] = [encode(item.prompt, f" {text}{end}") for item, text in pairs]
    stream = world.documents(seed + 500)
    found["documents"] = [encode(tokenizer.eos_token, next(stream)[:800]) for _ in range(n)]
    return found


old = ability_rows(lesson.scaled(20))


def remembered(model: nn.Module) -> tuple[Score, float]:
    """Share of the four abilities' questions that are still right, and the loss on documents in nats."""
    right = [ok for name in old if name != "documents" for ok in answered(model, old[name])[0]]
    return score(sum(right), len(right)), answered(model, old["documents"])[1]


for name, rows in old.items():
    right, loss = answered(fresh(), rows)
    share = str(score(sum(right), len(right))) if name != "documents" else ""
    print(f"{name:>10}: {share:30} loss {loss:.3f}")
kept_before, text_before = remembered(fresh())


# %% [markdown]
# One function trains a method and measures it. A method is a function that takes the frozen model and returns the model to train. `kept_bytes` counts what autograd keeps between the forward and the backward pass: the activations. Peak memory is then weights + gradients + optimiser + activations, counted the same way on every machine.

# %%
def kept_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Bytes that autograd saves for the backward pass of this batch, the model's own weights aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in [*model.parameters(), *model.buffers()]}
    storages = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = causal_lm_loss(model, {name: tensor.to(machine.device) for name, tensor in batch.items()})
    del loss
    return sum(storages.values())


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())


# %%
def fit(model: nn.Module, rate: float, steps: int, tasks=TASKS, optimizer_fn: Callable | None = None, stream=None):
    """Train what requires a gradient for `steps` batches; everything but the method is the same each time."""
    rows = [encode(*pair) for pair in instructions(steps * BATCH, seed if stream is None else stream, tasks)]
    config = TrainConfig(
        max_steps=steps,
        learning_rate=rate * settings["rate"],
        warmup_steps=min(4, steps - 1),
        schedule="linear",
        weight_decay=0.0,
        precision=settings["precision"],
        progress=False,
        seed=seed,
    )
    batches = PaddedBatches(rows, BATCH, tokenizer.pad_token_id, seed=seed)
    return train(model, batches, config, optimizer_fn=optimizer_fn)


results, models = {}, {}


def measure(name: str, method: Callable[[nn.Module], nn.Module], rate: float, keep: bool = False) -> None:
    """Train a method on the task and put its row into `results`; `keep` puts the model into `models`."""
    torch.manual_seed(seed)  # of the new weights
    model = method(fresh())
    batch = collate([encode(*pair) for pair in instructions(BATCH, seed)], tokenizer.pad_token_id)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = optimizer_state("adamw", [tuple(p.shape) for p in trained], width=4)[0]
    peak = weight_bytes(model) + 4 * num_trained(model) + state + kept_bytes(model, batch)
    seconds = float(np.median(fit(model, rate, STEPS).seconds))
    (right, loss), (kept, text) = quality(model), remembered(model)
    row = {"trained": num_trained(model), "optimizer": state, "peak": peak, "seconds": seconds, "rate": rate}
    results[name] = row | {"right": right, "loss": loss, "kept": kept, "text": text}
    print(f"{name}: {num_trained(model):,} trained ({num_trained(model) / SIZE:.2%}), {right}, loss {loss:.3f}", end="")
    print(f"; still right {kept}, documents {text - text_before:+.3f} nats")
    if keep:
        models[name] = model


# %% [markdown]
# Full fine-tuning is the method that unfreezes everything. The learning rate of each method in this lesson was chosen beforehand on another seed, from a few values.

# %%
measure("full fine-tuning", lambda model: model.requires_grad_(True), rate=1e-3, keep=True)
full = models["full fine-tuning"]
sample = [pair for task in TASKS for pair in tests[task][: lesson.scaled(30)]]
written = generate(full, tokenizer, [prompt for prompt, _ in sample], 8, stop=("\n",))
decoded = [text.strip() == answer.strip() for text, (_, answer) in zip(written, sample, strict=True)]
one_pass = answered(full, [encode(*pair) for pair in sample])[0]
print(f"decoded and scored in one pass agree on {sum(map(bool.__eq__, decoded, one_pass))} of {len(sample)} questions")
row = results["full fine-tuning"]
lesson.report("full fine-tuning, held-out instructions", str(row["right"]))
lesson.claim(
    "the base model follows hardly any of these instructions (at most 5 %)", before.accuracy, at_most=0.05, form=".0%"
)
lesson.claim(
    "full fine-tuning answers at least 90 % of held-out instructions", row["right"].accuracy, at_least=0.9, form=".0%"
)
lesson.equal("one pass and decoding agree", sum(map(bool.__ne__, decoded, one_pass)))

# %% [markdown]
# ## 2 · What did full fine-tuning change?
#
# **Question.** The update $\Delta W$ of a weight matrix has as many numbers as $W$. How many directions does it need?
#
# The singular value decomposition writes $\Delta W = \sum_i \sigma_i u_i v_i^\top$ with $\sigma_1 \ge \sigma_2 \ge \dots$. The first $r$ terms are the best approximation of rank $r$. Their share of the energy is $\sum_{i \le r} \sigma_i^2 / \sum_i \sigma_i^2$. The better test: keep only these terms in every linear layer, put everything else back to the base model, and ask the questions again.

# %%
LINEAR = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear) and name != "lm_head"]
RANKS = [1, 3, 8, 16, 64]
updates = {}
for name in LINEAR:
    delta = full.get_submodule(name).weight.detach().float().cpu() - base.get_submodule(name).weight
    updates[name] = torch.linalg.svd(delta, full_matrices=False)  # U (out, k), S (k,), Vh (k, in)


@torch.no_grad()
def truncated(rank: int) -> nn.Module:
    """The base model plus the best update of this rank in each linear layer."""
    model = fresh()
    for name, (u, s, vh) in updates.items():
        model.get_submodule(name).weight += ((u[:, :rank] * s[:rank]) @ vh[:rank]).to(machine.device)
    return model


energy = {}
for rank in RANKS:
    energy[rank] = np.mean([float((s[:rank] ** 2).sum() / (s**2).sum()) for _, s, _ in updates.values()])
from_svd = {rank: quality(truncated(rank)) for rank in RANKS}
for rank, (right, loss) in from_svd.items():
    print(f"rank {rank:>3}: {energy[rank]:5.1%} of the energy, {right}, loss {loss:.3f}")


# %% [markdown]
# **What you see.** A handful of directions holds most of the energy and answers most of the instructions; a few more give nearly all. The loss stops falling well above that of full fine-tuning, however many directions you keep: the rest of the difference lies outside the linear layers, above all in the embeddings, which also write the output. Remember that floor, since most methods below freeze the embeddings.
#
# That few directions are enough is the idea of LoRA (Hu et al. 2021), after the finding of Aghajanyan et al. (2020) that fine-tuning has a low intrinsic dimension. If the useful update is of low rank, learn it as such from the start.
#
# ## 3 · LoRA
#
# Freeze $W$ and learn two thin matrices:
#
# $$y = Wx + s\,B A x, \qquad A \in \mathbb{R}^{r \times d_\text{in}},\; B \in \mathbb{R}^{d_\text{out} \times r},\; s = \alpha / r.$$
#
# $B$ starts at zero, so the model starts as the base model. $A$ starts random, or nothing would ever move. With $g = \partial L / \partial y$, the gradients are $\partial L/\partial B = s\, g (Ax)^\top$ and $\partial L/\partial A = s\, B^\top g\, x^\top$: at the first step only $B$ gets a gradient.
#
# The trained numbers are $r (d_\text{in} + d_\text{out})$ instead of $d_\text{in} d_\text{out}$. rsLoRA (Kalajdzievski 2023) is the same with $s = \alpha / \sqrt{r}$, so that the size of the update does not shrink as $r$ grows.

# %%
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained update of low rank."""

    def __init__(self, layer: nn.Module, rank: int, alpha: float, rank_stabilised: bool = False):
        super().__init__()
        self.layer, self.scale = layer, alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.A = nn.Parameter(torch.empty(rank, layer.in_features, device=machine.device))
        self.B = nn.Parameter(torch.zeros(layer.out_features, rank, device=machine.device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, in) -> (batch, seq, out)
        return self.layer(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def wrap(model: nn.Module, targets: Sequence[str], make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Replace every module of the model whose name ends in one of `targets` by `make(module)`."""
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in targets:
            setattr(model.get_submodule(parent), leaf, make(module))
    return model


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ALL = ATTENTION + FEED_FORWARD


def lora(rank: int = 3, alpha: float = 96, targets: Sequence[str] = ALL, **settings) -> Callable:
    """The method LoRA with these settings."""
    return lambda model: wrap(model, targets, lambda layer: LoRALinear(layer, rank, alpha, **settings))


# %%
def loss_of(model: nn.Module, rows: list[dict]) -> Tensor:
    """Mean loss of the answer tokens, with gradients."""
    model.train()
    batch = collate(rows, tokenizer.pad_token_id)
    return causal_lm_loss(model, {name: tensor.to(machine.device) for name, tensor in batch.items()})


def largest(first: Tensor, second: Tensor) -> float:
    """Largest absolute difference between two tensors."""
    return float((first.detach().float() - second.detach().float()).abs().max())


torch.manual_seed(seed)
probe, rows = lora()(fresh()), held_out[:8]
layer = probe.model.layers[0].self_attn.q_proj
start_difference = (loss_of(probe, rows) - loss_of(fresh(), rows)).item()
loss_of(probe, rows).backward()
print(f"loss with LoRA minus loss of the base model at the start: {start_difference:.1e}")
print(f"largest gradient of B {float(layer.B.grad.abs().max()):.1e}, of A {float(layer.A.grad.abs().max()):.1e}")
lesson.equal("LoRA starts as the base model", abs(start_difference), within=1e-5)
lesson.equal("at the start only B gets a gradient", (layer.A.grad.abs().max() / layer.B.grad.abs().max()).item())

# %% [markdown]
# **Is it LoRA?** The test that counts: give `peft`, the library that practitioners use, the same weights, and compare what comes out, forwards and backwards. `compare` copies your trained tensors into peft's model, in the order of their names in `pairs`, and compares logits and gradients on the same batch. $B$ is set to random numbers first: with $B = 0$ many wrong versions agree.

# %%
import peft

differences = {}


def compare(name: str, ours: nn.Module, theirs: nn.Module, rename: Callable[[str], str]) -> None:
    """Same weights in: the largest differences in logits and gradients; `rename` maps our names to peft's."""
    found = dict(theirs.named_parameters())
    pairs = [(p, found[rename(n)], n) for n, p in ours.named_parameters() if p.requires_grad]
    assert len(pairs) == sum(p.requires_grad for p in found.values()), "not the same trained tensors"
    for mine, other, _ in pairs:
        mine.data += 0.02 * torch.randn_like(mine)  # away from the start, which is special
        other.data.copy_(mine.data.reshape(other.shape))
    batch = {k: v.to(machine.device) for k, v in collate(held_out[:6], tokenizer.pad_token_id).items()}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    length, logits = batch["input_ids"].shape[1], []
    for model in (ours.train(), theirs.train()):  # as in training; there is no dropout
        logits.append(model(**inputs).logits[:, -length:])
        F.cross_entropy(logits[-1][:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    outputs = largest(*logits)
    gradients = max(largest(mine.grad, other.grad.reshape(mine.shape)) for mine, other, _ in pairs)
    size = max(float(mine.grad.abs().max()) for mine, _, _ in pairs)
    differences[name] = (outputs, gradients / size)
    print(f"{name}: largest difference to peft: logits {outputs:.1e}, gradients {gradients:.1e} of {size:.1e}")
    lesson.equal(f"{name} equals peft", max(outputs, gradients / size), within=1e-3)


def peft_name(**changes: str) -> Callable[[str], str]:
    """Our parameter names to those of peft: layer -> base_layer and so on, and peft's prefix."""

    def rename(name: str) -> str:
        for ours, theirs in changes.items():
            name = name.removesuffix(f".{ours}") + f".{theirs}" if name.endswith(f".{ours}") else name
        return f"base_model.model.{name}"

    return rename


# %%
for name, stabilised in {"LoRA": False, "rsLoRA": True}.items():
    config = peft.LoraConfig(r=3, lora_alpha=96, target_modules=list(ALL), use_rslora=stabilised)
    theirs = peft.get_peft_model(fresh(), config)
    names = peft_name(A="lora_A.default.weight", B="lora_B.default.weight")
    compare(name, lora(rank_stabilised=stabilised)(fresh()), theirs, names)

measure("LoRA", lora(), rate=1e-3, keep=True)
measure("rsLoRA", lora(alpha=24, rank_stabilised=True), rate=1.5e-3)
gap = results["full fine-tuning"]["right"].accuracy - results["LoRA"]["right"].accuracy
share = results["LoRA"]["trained"] / SIZE
print(f"full fine-tuning minus LoRA: {100 * gap:.1f} points, with {share:.2%} of the parameters")
lesson.report("LoRA minus full fine-tuning, points", f"{-100 * gap:+.1f}")
lesson.claim("LoRA comes within 3 points of full fine-tuning", gap, at_most=0.03, form=".1%")
lesson.claim("with at most 2 % of the parameters", share, at_most=0.02, form=".1%")

# %% [markdown]
# ## 4 · Rank, alpha, learning rate and layers
#
# **Question.** LoRA has four knobs. Which ones matter?
#
# First $\alpha$ and the learning rate, on a grid. Fourteen steps are enough to see it. The first table is the loss on the held-out instructions, the second the rise of the loss on documents: what is learnt and what is lost.

# %%
ALPHAS, RATES, FEW = [6, 24, 96], [1e-3, 3e-3, 1e-2], lesson.scaled(14)
grid = np.full((2, len(ALPHAS), len(RATES)), math.nan)
with tqdm(total=grid[0].size, desc="alpha and rate") as bar:
    for i, alpha in enumerate(ALPHAS):
        for j, rate in enumerate(RATES):
            torch.manual_seed(seed)
            model = lora(alpha=alpha)(fresh())
            try:
                fit(model, rate, FEW)
            except CourseError:  # a loss that is no longer finite
                continue
            finally:
                bar.update()
            grid[:, i, j] = answered(model, held_out)[1], answered(model, old["documents"])[1] - text_before
for name, numbers in zip(("instructions, loss", "documents, rise"), grid, strict=True):
    print(f"{name:<20}" + "".join(f"rate {rate:<9g}" for rate in RATES))
    for alpha, row in zip(ALPHAS, numbers, strict=True):
        print(f"       alpha {alpha:>4g}   " + "".join(f"{value:<14.3f}" for value in row))

# %% [markdown]
# **What you see.** The good cells lie along a diagonal: a larger $\alpha$ wants a smaller learning rate, for the output moves by $s$ times what the optimiser does to $B$ and $A$. Small in both and little is learnt in time; large in both and training breaks. But the cells of the diagonal are not equal: with the small $\alpha$ and the large rate the documents suffer most. There the optimiser rewrites $A$ in a few steps; with a large $\alpha$ and a small rate $A$ stays near its start and $B$ does the learning. So this lesson takes $\alpha = 96$ with the learning rate of full fine-tuning. (For large models $\alpha$ of one or two times the rank is the custom, with rates about ten times those of full fine-tuning. Fix one, search over the other, and look at what is lost.)
#
# Now the rank, at the same $\alpha$ and learning rate (this is what dividing by $r$ is for), against the best update of that rank that section 2 cut out of full fine-tuning.

# %%
LORA_RANKS = [1, 3, 16]
by_rank = {}
for rank in tqdm(LORA_RANKS, desc="ranks"):
    torch.manual_seed(seed)
    model = lora(rank=rank)(fresh())
    if rank != 3:  # which is trained already
        fit(model, 1e-3, STEPS)
    by_rank[rank] = quality(models["LoRA"] if rank == 3 else model)
for rank, (right, loss) in by_rank.items():
    print(f"rank {rank:>2}: LoRA {right}, loss {loss:.3f}; cut out of full fine-tuning {from_svd[rank][0]}")


def line(scores: dict[int, tuple[Score, float]]) -> tuple:
    """A line with its intervals for `plots.curve`."""
    found = [right for right, _ in scores.values()]
    return list(scores), [s.accuracy for s in found], [s.low for s in found], [s.high for s in found]


figure = plots.curve(
    {"LoRA, trained": line(by_rank), "cut out of full fine-tuning": line(from_svd)},
    title="A few directions are enough, if you train them as such",
    xlabel="rank of the update",
    ylabel="held-out instructions right",
    alt="Right answers over rank: LoRA is high from small ranks on, the truncated full update needs larger ranks.",
    log_x=True,
    percent=True,
    limits_y=(-0.02, 1.02),
    references={"full fine-tuning": results["full fine-tuning"]["right"].accuracy},
)
plots.show(figure)

# %% [markdown]
# Last, where the adapters go. The rank is chosen so that the four choices train about the same number of parameters.

# %%
PLACES = {
    "query and value, r = 16": (("q_proj", "v_proj"), 16),
    "attention, r = 8": (ATTENTION, 8),
    "feed-forward, r = 5": (FEED_FORWARD, 5),
    "all linear, r = 3": (ALL, 3),
}
places = {}
for name, (targets, rank) in tqdm(PLACES.items(), desc="layers"):
    torch.manual_seed(seed)
    model = lora(rank=rank, targets=targets)(fresh())
    if name.startswith("all"):
        places[name] = (results["LoRA"]["right"], results["LoRA"]["loss"])
    else:
        fit(model, 1e-3, STEPS)
        places[name] = quality(model)
    print(f"{name:>24}: {num_trained(model):,} trained, {places[name][0]}, loss {places[name][1]:.3f}")


# %% [markdown]
# **What you see.** At equal cost, a low rank everywhere and the feed-forward alone do well. Attention alone, and with it query and value, the choice of the first paper, stays far behind however high its rank. Dettmers et al. (2023) found the like for large models, and adapters on all linear layers have been the usual choice since.

# %% [markdown]
# ## 5 · DoRA: direction and size apart
#
# **Question.** LoRA changes length and direction of the rows of $W$ together. Does it help to learn them apart?
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


def dora(rank: int = 3, alpha: float = 96) -> Callable:
    """The method DoRA."""
    return lambda model: wrap(model, ALL, lambda layer: DoRALinear(layer, rank, alpha))


config = peft.LoraConfig(r=3, lora_alpha=96, target_modules=list(ALL), use_dora=True)
names = peft_name(
    A="lora_A.default.weight", B="lora_B.default.weight", magnitude="lora_magnitude_vector.default.weight"
)
compare("DoRA", dora()(fresh()), peft.get_peft_model(fresh(), config), names)
measure("DoRA", dora(), rate=1e-3)


# %% [markdown]
# ## 6 · QLoRA: the frozen weights in 4 bits
#
# **Question.** The frozen weights are only read. How few bits do they need?
#
# QLoRA (Dettmers et al. 2023) stores them in 4 bits and trains LoRA in full precision on top. Three ideas.
#
# **NF4.** Cut the weights into blocks of 64 and divide each block by its largest absolute value $c$ (the *absmax*). Weights are roughly normally distributed, so let the 16 levels be quantiles of a normal distribution, scaled to $[-1, 1]$: then each level is used about equally often. Zero must be a level, so eight levels are positive and seven negative. A weight becomes the number of the nearest level; two of them share a byte.
#
# **Double quantisation.** An fp32 absmax for 64 weights costs 0.5 bit a weight. Subtract their mean and quantise them as well, to 8 bits in blocks of 256: $8/64 + 32/(64 \cdot 256) = 0.127$ bit. The 256 levels are Dettmers' dynamic type: seven powers of ten with a growing number of steps in each.
#
# **Paged optimiser** state, which may leave the GPU for main memory; below.

# %%
def nf4_levels() -> Tensor:
    """The 16 levels: quantiles of a normal distribution between its shares 0.0323 and 0.9677."""
    ends = [torch.linspace(0.9677083, 0.5, count, dtype=torch.float64)[:-1] for count in (9, 8)]
    positive, negative = (torch.special.ndtri(share).float() for share in ends)  # 8 and 7 of them
    levels = torch.cat([-negative, torch.zeros(1), positive]).sort().values
    return levels / levels.max()


def dynamic_levels() -> Tensor:
    """The 256 levels of the 8-bit type: in each of seven decades the middles of 1, 2, 4 ... 64 intervals."""
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values))


def quantize(x: Tensor, levels: Tensor, block: int, grid: int = 0) -> tuple[Tensor, Tensor]:
    """Number of the nearest level (n,), and the absmax of each block; `grid` rounds to a table's positions first."""
    flat = x.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)  # (blocks, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax)[:, None]).flatten()[: len(flat)]
    if grid:
        scaled = ((scaled + 1) * 0.5 * grid + 0.5).floor() * (2 / grid) - 1
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2), absmax


# %%
import bitsandbytes as bnb
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit

NF4, DYNAMIC = get_4bit_type("nf4", device="cpu"), dynamic_levels()
print(f"levels: largest difference to bitsandbytes {largest(nf4_levels(), NF4):.1e} (NF4)", end="")
print(f", {largest(DYNAMIC, create_dynamic_map()):.1e} (dynamic)")

wrong, count = {"codes": 0, "absmax": 0, "absmax, 8 bit": 0, "absmax of absmax": 0, "mean": 0}, 0
for name in LINEAR[:28]:
    weight = base.get_submodule(name).weight
    codes, absmax = quantize(weight, NF4, 64)
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)  # (n / 2,): two codes a byte
    codes8, absmax8 = quantize(absmax - absmax.mean(), DYNAMIC, 256, grid=65535)
    theirs, plain = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    _, double = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    wrong["codes"] += int((packed != theirs.flatten()).sum())
    wrong["absmax"] += int((absmax != plain.absmax).sum())
    wrong["absmax, 8 bit"] += int((codes8 != double.absmax.long()).sum())
    wrong["absmax of absmax"] += int((absmax8 != double.state2.absmax).sum())
    wrong["mean"] += int(absmax.mean() != double.offset)
    count += len(absmax)
print(f"{count:,} blocks; numbers that differ from bitsandbytes in any bit: {wrong}")
lesson.report("NF4 with double quantisation, numbers unlike bitsandbytes'", str(sum(wrong.values())))
lesson.equal("our NF4 equals bitsandbytes bit for bit", sum(wrong.values()))


# %% [markdown]
# The levels that we compute differ from the table in bitsandbytes in the last bit of some, so the codes use its table. One detail had to be copied: its CPU kernel for the 8-bit type looks the codes up in a table of 65,536 positions, so a value very close to the middle between two levels may go to the other side. On a GPU it compares with the middles themselves (`grid=0`).
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


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits, with the absmax of its blocks in 8."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.out_features, self.in_features, self.bias = layer.out_features, layer.in_features, layer.bias
        codes, absmax = quantize(layer.weight.cpu(), NF4, 64)
        codes8, absmax8 = quantize(absmax - absmax.mean(), DYNAMIC, 256, grid=65535)
        stored = {"packed": (codes[::2] << 4 | codes[1::2]).to(torch.uint8), "absmax": codes8.to(torch.uint8)}
        for name, tensor in (stored | {"absmax_of_absmax": absmax8, "mean": absmax.mean()}).items():
            self.register_buffer(name, tensor.to(layer.weight.device))

    def dequantize(self) -> Tensor:  # (out, in)
        levels, dynamic = NF4.to(self.packed.device), DYNAMIC.to(self.packed.device)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)  # (256, 2): a byte's values
        scale = dynamic[self.absmax.int()] * self.absmax_of_absmax.repeat_interleave(256)[: len(self.absmax)]
        blocks = F.embedding(self.packed.int(), pairs).view(-1, 64) * (scale + self.mean)[:, None]
        return blocks.view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        y = Dequantised.apply(x, self)
        return y if self.bias is None else y + self.bias


# %%
def qlora(rank: int = 3, alpha: float = 96) -> Callable:
    """The method QLoRA: every linear layer in NF4, and LoRA in fp32 on top."""
    return lambda model: wrap(model, ALL, lambda layer: LoRALinear(NF4Linear(layer), rank, alpha))


only_quantised = wrap(fresh(), ALL, NF4Linear)
errors = []
for name in LINEAR:
    weight = base.get_submodule(name).weight
    errors.append(float((only_quantised.get_submodule(name).dequantize().cpu() - weight).norm() / weight.norm()))
print(f"error of the weights in NF4: {np.mean(errors):.1%} of their norm")
rounded_kept, rounded_text = remembered(only_quantised)
print(f"base model in NF4: old abilities {rounded_kept}, documents {rounded_text - text_before:+.3f} nats")
stored = sum(buffer.nbytes for layer in only_quantised.modules() if isinstance(layer, NF4Linear)
             for buffer in layer.buffers())  # fmt: skip
print(f"{8 * stored / sum(base.get_submodule(name).weight.numel() for name in LINEAR):.3f} bits a weight")
measure("QLoRA", qlora(), rate=1e-3, keep=True)
loss_of_points = 100 * (results["LoRA"]["right"].accuracy - results["QLoRA"]["right"].accuracy)
lesson.report("QLoRA minus LoRA, points", f"{-loss_of_points:+.1f}")
lesson.claim("QLoRA comes within 3 points of LoRA", loss_of_points, at_most=3, form=".1f")

# %% [markdown]
# The library's way: `BitsAndBytesConfig` makes transformers load every linear layer as `bnb.nn.Linear4bit`, and peft puts LoRA on it. Same adapter weights in: do the outputs and gradients agree with our layer?

# %%
from helpers.models import load_in_4_bit

loaded = load_in_4_bit(base.name_or_path, machine.device, torch.float32)
print(type(loaded.model.layers[0].self_attn.q_proj))
theirs = peft.get_peft_model(loaded, peft.LoraConfig(r=3, lora_alpha=96, target_modules=list(ALL)))
compare("QLoRA", qlora()(fresh()), theirs, peft_name(A="lora_A.default.weight", B="lora_B.default.weight"))


# %% [markdown]
# **8-bit and paged optimisers.** Adam keeps two numbers for each trained weight, 8 bytes in fp32. The 8-bit Adam of bitsandbytes (Dettmers et al. 2022) keeps both in the dynamic type of above, in blocks of 256, and computes in fp32. The paged one keeps them in memory that the driver moves between GPU and CPU as needed; on a CPU there is nothing to page, and bitsandbytes says so in a warning and does the rest. With LoRA there is little state to save, and tensors under 4,096 numbers stay in fp32 anyway. So try it where it counts, in full fine-tuning.

# %%
def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimiser's state; the 8-bit levels, which all tensors share, aside."""
    entries = [item for state in optimizer.state.values() for item in state.items()]
    return sum(value.nbytes for name, value in entries if torch.is_tensor(value) and "qmap" not in name)


OPTIMIZERS = {
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, lr=rate, fused=True, weight_decay=0.0),
    "adamw_8bit": lambda parameters, rate: bnb.optim.AdamW8bit(parameters, lr=rate, weight_decay=0.0),
    "paged_adamw_8bit": lambda parameters, rate: bnb.optim.PagedAdamW8bit(parameters, lr=rate, weight_decay=0.0),
}
optimizer_runs = {}
for name, make in OPTIMIZERS.items():
    model = fresh().requires_grad_(True)
    optimizer = make(model.parameters(), 1e-3 * settings["rate"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # paging on a CPU
        history = fit(model, 1e-3, lesson.scaled(12), optimizer_fn=lambda _, given=optimizer: given)
    sizes = [tuple(parameter.shape) for parameter in model.parameters()]
    planned = sum(optimizer_state(name, sizes, width=4))
    optimizer_runs[name] = (history.losses, state_bytes(optimizer), planned)
    print(f"{name:>16}: loss {history.losses[0]:.3f} -> {history.losses[-1]:.3f}, state "
          f"{state_bytes(optimizer) / SIZE:.2f} bytes a parameter (helpers.memory: {planned / SIZE:.2f})")  # fmt: skip
plain, eight = (optimizer_runs[name] for name in ("adamw", "adamw_8bit"))
lesson.report("optimiser bytes a parameter, AdamW and 8-bit", f"{plain[1] / SIZE:.2f} and {eight[1] / SIZE:.2f}")
lesson.claim("the 8-bit state is at most 30 % of the fp32 state", eight[1] / max(1, plain[1]), at_most=0.3, form=".0%")
lesson.equal(
    "helpers.memory plans the state within 1 %", max(abs(p - s) / s for _, s, p in optimizer_runs.values()), within=0.01
)


# %% [markdown]
# ## 7 · Adapters, prefixes, prompts, scales, biases and norms
#
# **Question.** What else can be trained beside frozen weights?
#
# **Bottleneck adapters** (Houlsby et al. 2019) came first: after the attention and after the feed-forward of each layer, a small network with a bottleneck and a residual connection, $y + U\,\phi(D y)$. $U$ starts at zero, so it starts as the identity. Unlike LoRA it has a nonlinearity and cannot be merged into the weights.

# %%
class Bottleneck(nn.Module):
    """A module followed by a small residual network."""

    def __init__(self, module: nn.Module, size: int, width: int):
        super().__init__()
        self.module = module
        self.down, self.up = (nn.Linear(*shape, device=machine.device) for shape in ((size, width), (width, size)))
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)  # (batch, seq, size)
        return y + self.up(F.gelu(self.down(y)))


def bottleneck(width: int = 15) -> Callable:
    """Adapters after the output of attention and of the feed-forward."""
    targets = ("o_proj", "down_proj")
    return lambda model: wrap(model, targets, lambda layer: Bottleneck(layer, layer.out_features, width))


measure("bottleneck adapters", bottleneck(), rate=5e-3)


# %% [markdown]
# **Prompt tuning** (Lester et al. 2021) trains nothing inside the model: $n$ vectors stand before the embeddings of the text, as if there were $n$ more words. They start as embeddings of random tokens.
#
# **Prefix tuning** (Li and Liang 2021) does so in every layer: $n$ trained keys and values that every token may attend to. It is a key-value cache filled by training instead of by reading. (The paper trains it through a small network for stability; peft, by default, and this lesson train the numbers themselves.)

# %%
class PromptTuning(nn.Module):
    """Trained vectors before the embeddings of the text."""

    def __init__(self, model: nn.Module, length: int):
        super().__init__()
        self.model = model
        table = model.get_input_embeddings().weight
        self.prompt = nn.Parameter(table[torch.randint(len(table), (length,)).to(table.device)].clone())

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        batch, length = len(input_ids), len(self.prompt)
        words = self.model.get_input_embeddings()(input_ids)  # (batch, seq, hidden)
        words = torch.cat([self.prompt.expand(batch, -1, -1), words], dim=1)
        mask = torch.cat([attention_mask.new_ones(batch, length), attention_mask], dim=1)
        output = self.model(inputs_embeds=words, attention_mask=mask, use_cache=False)
        output.logits = output.logits[:, length:]
        return output


class PrefixTuning(nn.Module):
    """Trained keys and values before those of the text, in every layer."""

    def __init__(self, model: nn.Module, length: int):
        super().__init__()
        self.model, config = model, model.config
        heads = config.num_key_value_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        prefix = 0.02 * torch.randn(length, config.num_hidden_layers, 2, heads, size)
        self.prefix = nn.Parameter(prefix.to(machine.device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor):
        batch, cache = len(input_ids), DynamicCache()
        for layer, (keys, values) in enumerate(self.prefix.permute(1, 2, 3, 0, 4)):  # each (heads, length, head_dim)
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)
        mask = torch.cat([attention_mask.new_ones(batch, len(self.prefix)), attention_mask], dim=1)
        return self.model(input_ids=input_ids, attention_mask=mask, past_key_values=cache)


# %%
settings_of = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 16}
for name, ours, config, rate in (
    ("prompt tuning", PromptTuning, peft.PromptTuningConfig(**settings_of), 1.0),
    ("prefix tuning", PrefixTuning, peft.PrefixTuningConfig(**settings_of), 0.3),
):
    theirs = peft.get_peft_model(fresh(), config)
    compare(name, ours(fresh(), 16), theirs, lambda _: "prompt_encoder.default.embedding.weight")
    measure(name, lambda model, ours=ours: ours(model, 16), rate)


# %% [markdown]
# **IA3** (Liu et al. 2022) multiplies: one trained factor for each key, each value, and each number inside the feed-forward, starting at one. **BitFit** (Ben Zaken et al. 2022) trains only the biases. A Llama has none, so the lesson adds biases of zero to its linear layers first; models like Qwen2 bring some. **Norm tuning** (Zhao et al. 2024) trains only the weights of the normalisation layers, here RMSNorm.

# %%
class IA3(nn.Module):
    """A linear layer whose output, or input, is multiplied by trained factors."""

    def __init__(self, layer: nn.Linear, on_input: bool):
        super().__init__()
        self.layer, self.on_input = layer, on_input
        size = layer.in_features if on_input else layer.out_features
        self.factors = nn.Parameter(torch.ones(size, device=machine.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.factors) if self.on_input else self.layer(x) * self.factors


def ia3(model: nn.Module) -> nn.Module:
    """Factors on keys, values and the inside of the feed-forward."""
    model = wrap(model, ("k_proj", "v_proj"), lambda layer: IA3(layer, on_input=False))
    return wrap(model, ("down_proj",), lambda layer: IA3(layer, on_input=True))


def bitfit(model: nn.Module) -> nn.Module:
    """Train the biases; linear layers without one get one of zeros."""
    for name in LINEAR:
        layer = model.get_submodule(name)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(layer.out_features, device=machine.device))
        layer.bias.requires_grad_(True)
    return model


def norm_tuning(model: nn.Module) -> nn.Module:
    """Train the weights of the normalisation layers."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    return model


# %%
targets = ["k_proj", "v_proj", "down_proj"]
config = peft.IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
compare("IA3", ia3(fresh()), peft.get_peft_model(fresh(), config), peft_name(factors="ia3_l.default"))
config = peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"])
names = peft_name(weight="ln_tuning_layers.default.weight")
compare("norm tuning", norm_tuning(fresh()), peft.get_peft_model(fresh(), config), names)
measure("IA3", ia3, rate=1e-1)
measure("BitFit", bitfit, rate=2e-2)
measure("norm tuning", norm_tuning, rate=1e-1)
lesson.report("equal to peft: largest difference of logits", f"{max(o for o, _ in differences.values()):.1e}")


# %% [markdown]
# ## 8 · A branch that starts at zero, and what it can carry
#
# **Question.** How do you give a trained model a new input without breaking it?
#
# ControlNet (Zhang et al. 2023) steers an image model by edges or poses. A trainable branch runs beside the frozen network, sees the new input, and is joined to it through a layer whose weights start at zero. So the whole starts as the identity on the old model, and no noise of untrained weights ever reaches it. Is a layer of zeros not stuck? Its output is $Z h$, and $\partial L / \partial Z = g h^\top$ is not zero, since $h$ is not. After one step $Z$ is not zero, and the rest of the branch gets gradients too.
#
# Here the branch stands beside each feed-forward: $\text{FFN}(x) + Z\,\phi(D x + E_c)$, where $E_c$ is a vector for the condition $c$, if there is one. First without a condition, on the same task as the others.

# %%
class ZeroBranch(nn.Module):
    """A module with a trained branch beside it that starts at zero and may see a condition."""

    def __init__(self, module: nn.Module, size: int, width: int, conditions: int = 0):
        super().__init__()
        self.module = module
        self.down = nn.Linear(size, width, device=machine.device)
        self.zero = nn.Linear(width, size, device=machine.device)
        self.embed = nn.Embedding(conditions, width, device=machine.device) if conditions else None
        self.condition = None  # (batch,) or (1,): set before the forward pass
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, hidden)
        inside = self.down(x)
        if self.condition is not None:
            inside = inside + self.embed(self.condition)[:, None]  # (batch, 1, width)
        return self.module(x) + self.zero(F.silu(inside))


def zero_branch(width: int = 32, conditions: int = 0) -> Callable:
    """A branch beside each feed-forward."""
    size = base.config.hidden_size
    return lambda model: wrap(model, ("mlp",), lambda module: ZeroBranch(module, size, width, conditions))


measure("zero branch", zero_branch(), rate=5e-3)


# %% [markdown]
# Now the condition: the mood, good or bad, of a review that the model is to write. The training text is reviews as in pretraining, and nothing in the text says which mood is wanted: only the branch knows. Afterwards the model writes reviews for each mood, sampled at temperature 1, and a review counts if it holds more adjectives of the wanted mood than of the other. Without steering that is a coin toss.

# %%
def steer(model: nn.Module, moods: Tensor | None) -> None:
    """Set the condition of every branch: 0 is good, 1 is bad."""
    for module in model.modules():
        if isinstance(module, ZeroBranch):
            module.condition = moods


def steered_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of a batch of reviews, each under its mood."""
    steer(model, batch["mood"])
    return causal_lm_loss(model, {name: value for name, value in batch.items() if name != "mood"})


rng, batches = random.Random(seed), []
for _ in range(STEPS):
    reviews = [world.review(rng) for _ in range(BATCH)]
    batch = collate([encode("Review:", f" {text}\n") for text, _ in reviews], tokenizer.pad_token_id)
    batches.append(batch | {"mood": torch.tensor([list(MOODS).index(mood) for _, mood in reviews])})
torch.manual_seed(seed)
writer = zero_branch(conditions=2)(fresh())
steer(writer, torch.zeros(1, dtype=torch.long, device=machine.device))
inputs = {"input_ids": batches[0]["input_ids"].to(machine.device)}
with torch.no_grad():
    identity = largest(writer(**inputs).logits, fresh()(**inputs).logits)
print(f"largest difference of the logits to the base model before training: {identity:.1e}")
lesson.equal("the branch starts as the identity", identity)
rate, precision = 1e-2 * settings["rate"], settings["precision"]
config = TrainConfig(max_steps=STEPS, learning_rate=rate, weight_decay=0.0, precision=precision, progress=False)
losses = train(writer, batches, config, loss_fn=steered_loss).losses
print(f"loss {losses[0]:.3f} -> {np.mean(losses[-5:]):.3f}")


# %%
def mood_of(review: str) -> int:
    """+1 if it has more good adjectives than bad ones, -1 if fewer, else 0."""
    good, bad = (sum(review.count(word) for word in MOODS[mood][0]) for mood in ("good", "bad"))
    return (good > bad) - (good < bad)


steered = {}
for index, mood in enumerate(MOODS):
    for name, model in {"steered": writer, "base model": fresh()}.items():
        steer(model, torch.tensor([index], device=machine.device))
        (written,) = generate(
            model,
            tokenizer,
            ["Review:"],
            50,
            num_samples=max(8, lesson.scaled(50)),
            temperature=1.0,
            seed=seed,
            batch_size=128,
        )
        hits = sum(mood_of(text) == (1, -1)[index] for text in written)
        steered.setdefault(mood, {})[name] = score(hits, len(written))
        print(f"{mood}, {name}: {steered[mood][name]}")
    steer(writer, torch.tensor([index], device=machine.device))
    print(f"{mood}: {generate(writer, tokenizer, ['Review:'], 50, temperature=0.7, seed=seed)[0].strip()!r}")
figure = plots.bars_with_intervals(
    steered,
    title="A branch that starts at zero learns to steer",
    xlabel="sampled reviews of the wanted mood",
    alt="Share of reviews of the wanted mood: near all with the steered branch, about half without.",
    references={"coin": 0.5},
)
plots.show(figure)
for mood, found in steered.items():
    lesson.report(f"reviews of the wanted mood ({mood}), steered and not", f"{found['steered']}; {found['base model']}")
lowest = min(found["steered"].accuracy for found in steered.values())
lesson.claim(
    "steered by the branch, at least 70 % of the reviews have the wanted mood", lowest, at_least=0.7, form=".0%"
)

# %% [markdown]
# ## 9 · All methods in one table
#
# **Question.** What does each method cost, what does it learn, and what does the model lose?
#
# The same data, steps and batches for all; the learning rate is each method's own. *Optimiser* is what AdamW keeps, by `helpers.memory`. *Peak* counts weights, gradients, optimiser and activations of one step. *Quality* is exact match on held-out instructions, *old abilities* the share of pretraining's questions that are still right, *documents* the change of the loss on fresh documents, in nats a token.

# %%
from IPython.display import Markdown

ORDER = sorted(results, key=lambda name: -results[name]["trained"])
lines = [
    "| method | trained | share | rate | optimiser | peak | ms a step | quality | loss | old abilities | documents |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
]
for name in ORDER:
    row = results[name]
    lines.append(
        f"| {name} | {row['trained']:,} | {row['trained'] / SIZE:.2%} | {row['rate']:g} "
        f"| {row['optimizer'] / 2**20:.2f} MiB | {row['peak'] / 2**20:.0f} MiB | {1000 * row['seconds']:.0f} "
        f"| {row['right']} | {row['loss']:.3f} | {row['kept']} | {row['text'] - text_before:+.3f} |"
    )
lines.append(f"| base model | 0 | | | | | | {before} | {loss_before:.3f} | {kept_before} | 0 |")
Markdown("\n".join(lines))

# %% tags=["headline"]
places = {}  # methods of nearly the same size and quality share a point
for name, row in results.items():
    key = round(4 * math.log10(row["trained"])), round(10 * row["right"].accuracy)
    places.setdefault(key, []).append((name, row["trained"], row["right"].accuracy))
figure = plots.pareto(
    {", ".join(name for name, *_ in near): near[0][1:] for near in places.values()},
    title="More trained parameters learn faster, but not in proportion",
    xlabel="trained parameters",
    ylabel="held-out instructions right",
    alt="Quality over the number of trained parameters for all methods; full fine-tuning and LoRA are at the top.",
    log_x=True,
)
plots.show(figure)

# %%
figure = plots.bars_with_intervals(
    {name: results[name]["kept"] for name in ORDER} | {"base model": kept_before},
    title="What is left of the old abilities",
    xlabel="questions of pretraining still right",
    alt="Share of old questions still right after each method, with intervals.",
)
plots.show(figure)
full_row, lora_row = results["full fine-tuning"], results["LoRA"]
lesson.report("old abilities after full fine-tuning and LoRA", f"{full_row['kept']}; {lora_row['kept']}")
changes = [f"{row['text'] - text_before:+.3f}" for row in (full_row, lora_row)]
lesson.report("documents, change of the loss, full and LoRA", " and ".join(changes))
print(f"peak memory: full {full_row['peak'] / 2**20:.0f} MiB, LoRA {lora_row['peak'] / 2**20:.0f} MiB, QLoRA "
      f"{results['QLoRA']['peak'] / 2**20:.0f} MiB")  # fmt: skip
lesson.claim(
    "LoRA's optimiser is at most a fortieth of full's",
    full_row["optimizer"] / lora_row["optimizer"],
    at_least=40,
    form=".0f",
)
peaks = [row["peak"] for row in (full_row, lora_row, results["QLoRA"])]
lesson.claim(
    "peak memory falls from full to LoRA to QLoRA",
    min(peaks[0] / peaks[1], peaks[1] / peaks[2]),
    at_least=1,
    form=".2f",
)
lesson.claim(
    "at the same learning rate, LoRA forgets less of the documents than full",
    full_row["text"] - lora_row["text"],
    at_least=0,
    form=".3f",
)


# %% [markdown]
# **What you see.** Full fine-tuning, LoRA and its relatives and the adapters learn the task in these few steps. The methods with only thousands of numbers, and the prefix, have got part of the way when the steps are over: they need larger rates and many more steps, and prompt tuning catches up only in models of billions of parameters (Lester et al. 2021). Large rates also show in what is forgotten: a prefix or a set of factors has no scale that keeps it near its start. The optimiser's bytes shrink with the trained parameters. Peak memory shrinks much less, since the weights and most of the activations stay; and a step is not much faster either, since the backward pass still runs through the whole frozen model.
#
# ### Does LoRA forget less?
#
# "LoRA learns less and forgets less" (Biderman et al. 2024) is the rule for large models and long training. Before you believe it, or the bars above, note that the amount of forgetting depends on how hard you push. So train both once more with half of the learning rate, and look at what each update is made of: its size, and its largest singular value, relative to those of $W$.

# %%
@torch.no_grad()
def update_size(changed: Callable[[str], Tensor]) -> tuple[float, float]:
    """Norm and largest singular value of the updates relative to those of the weights, means over the layers."""
    sizes = []
    for name in LINEAR:
        weight, delta = base.get_submodule(name).weight, changed(name).detach().float().cpu()
        spectral = torch.linalg.matrix_norm(delta, 2) / torch.linalg.matrix_norm(weight, 2)
        sizes.append((float(delta.norm() / weight.norm()), float(spectral)))
    return tuple(np.mean(sizes, axis=0))


def low_rank(name: str) -> Tensor:
    """LoRA's update of a layer."""
    module = models["LoRA"].get_submodule(name)
    return module.scale * module.B @ module.A


changed = {
    "full fine-tuning": lambda name: full.get_submodule(name).weight.cpu() - base.get_submodule(name).weight,
    "LoRA": low_rank,
}
for name, change in changed.items():
    norm, spectral = update_size(change)
    print(f"{name:>17}: size of the update {norm:.1%} of the weights, largest singular value {spectral:.1%} of theirs")
    lesson.report(f"largest singular value of the update, {name}", f"{spectral:.0%} of that of the weights")
measure("full fine-tuning, low rate", lambda model: model.requires_grad_(True), rate=5e-4)
measure("LoRA, low rate", lora(), rate=5e-4)
pushed = {name: results.pop(name) for name in ("full fine-tuning, low rate", "LoRA, low rate")}
pushed |= {"full fine-tuning": full_row, "LoRA": lora_row}
figure = plots.pareto(
    {name: (row["text"] - text_before, row["right"].accuracy) for name, row in pushed.items()},
    title="What is learnt against what is forgotten",
    xlabel="rise of the loss on documents (nats a token)",
    ylabel="held-out instructions right",
    alt="Quality over forgetting for full fine-tuning and LoRA, each at two learning rates.",
)
plots.show(figure)


# %% [markdown]
# **What you see.** At the same learning rate LoRA loses less of the old text than full fine-tuning, and on this task it answers as many instructions. But full fine-tuning at half of its rate still solves the task, and then forgets about as much as LoRA, more or less by the seed, while LoRA at half of its rate has not learnt enough in 40 steps. So it is true here that LoRA learns less and forgets less, and part of it is one and the same thing: it moves less. Section 4 shows the other part: with a small $\alpha$ and a large rate, equally good on the task, LoRA forgets far more than full fine-tuning ever does. Its update must pass through a few directions, and there it is strong, as its largest singular value shows; Shuttleworth et al. (2024) call such directions intruders and link them to forgetting. Measure forgetting on your own old tasks, and take the smallest learning rate that does the job.
#
# ## 10 · Merge and unmerge
#
# **Question.** At run time LoRA costs two more small matrix products in each layer. Can you be rid of them?
#
# LoRA is linear, so $W + sBA$ is a plain matrix of the old shape: merge it and the model is a normal model again. Subtract it and the old model is back, up to rounding. Adapters with a nonlinearity, prefixes and prompts cannot be merged.

# %%
@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """A copy with every LoRA layer replaced by one plain linear layer."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.layer.weight += module.scale * module.B @ module.A
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.layer)
    return model


@torch.no_grad()
def logits_of(model: nn.Module, rows: list[dict]) -> Tensor:
    """Logits of a few rows, (rows, seq, vocab)."""
    batch = collate(rows, tokenizer.pad_token_id)
    model.eval()
    inputs = {key: batch[key].to(machine.device) for key in ("input_ids", "attention_mask")}
    return model(**inputs).logits


tuned = models["LoRA"]
plain = merged(tuned)
gap = largest(logits_of(tuned, held_out[:32]), logits_of(plain, held_out[:32]))
different = sum(map(bool.__ne__, answered(tuned, held_out)[0], answered(plain, held_out)[0]))
print(f"largest difference of the logits after merging: {gap:.1e}; answers that differ: {different}")
restored = 0.0
for name in LINEAR:
    module = tuned.get_submodule(name)
    back = plain.get_submodule(name).weight.detach() - module.scale * (module.B @ module.A).detach()
    restored = max(restored, largest(back.cpu(), base.get_submodule(name).weight))
print(f"largest difference to the base weights after unmerging: {restored:.1e}")
lesson.report("merging: largest difference of the logits", f"{gap:.1e}")
lesson.equal("merging changes no logit", gap, within=1e-3)
lesson.equal("merging changes no answer", different)
lesson.equal("unmerging gives the base model back", restored, within=1e-5)


# %% [markdown]
# **Merging into 4 bits.** After QLoRA the base is in NF4. The merged matrix $\hat W + sBA$ is not on the levels of NF4 any more: storing it in 4 bits rounds it again, and what was learnt can drown in the rounding. The size of the rounding error against the size of the update tells.

# %%
@torch.no_grad()
def merged_4bit(model: nn.Module, again: bool) -> tuple[nn.Module, float, float]:
    """QLoRA merged into fp32 weights, or rounded to NF4 again; size of the update and of the error, relative to W."""
    model, sizes = fresh(), []
    for name in LINEAR:
        module = models["QLoRA"].get_submodule(name)
        update = module.scale * module.B @ module.A
        weight = module.layer.dequantize() + update
        layer = model.get_submodule(name)
        layer.weight.copy_(weight)
        stored = NF4Linear(layer).dequantize() if again else weight
        layer.weight.copy_(stored)
        sizes.append((float(update.norm() / weight.norm()), float((stored - weight).norm() / weight.norm())))
    return model, *np.mean(sizes, axis=0)


rows = {"QLoRA, as trained": (quality(models["QLoRA"]), 0.0)}
for name, again in {"merged, kept in fp32": False, "merged, in NF4 again": True}.items():
    model, update, error = merged_4bit(models["QLoRA"], again)
    rows[name] = (quality(model), error)
for name, ((right, loss), error) in rows.items():
    print(f"{name:>22}: {right}, loss {loss:.3f}, error {error:.2%} of the weights")
print(f"the update is {update:.2%} of the weights")
lesson.report("QLoRA merged and rounded to NF4 again", f"{rows['merged, in NF4 again'][0][0]}, error {error:.1%}")
kept, trained = (rows[name][0][0].accuracy for name in ("merged, kept in fp32", "QLoRA, as trained"))
lesson.equal("merged into fp32, QLoRA answers as before", abs(kept - trained))


# %% [markdown]
# **What you see.** Rounding again costs almost a tenth of the weights' size, as rounding the first time did. Here the update is larger than that, so the answers survive. After long training with a small learning rate the update can be smaller than the rounding, and then it is lost: compare the two numbers before you merge into 4 bits, or keep the adapter beside the 4-bit base.
#
# ## 11 · Many adapters on one base
#
# **Question.** A hundred customers have a hundred fine-tuned models. Do you need a hundred models in memory?
#
# The base is shared and an adapter is small. A *bank* holds the factors of all adapters, and each request says with which weights it wants them: $y_i = W x_i + s \sum_k w_{ik} B_k A_k x_i$. A row of zeros and a one chooses an adapter, and the rows of one batch may choose different ones. (Serving systems, such as S-LoRA of Sheng et al. 2024, gather only the chosen factors with special kernels.) Train one adapter for each of the two tasks.

# %%
class LoRABank(nn.Module):
    """A linear layer with several LoRA updates; `weights` (batch, adapters) says how much of each a row gets."""

    def __init__(self, layers: Sequence[LoRALinear]):
        super().__init__()
        self.layer, self.scale, self.weights = layers[0].layer, layers[0].scale, None
        self.A = nn.Parameter(torch.stack([layer.A.detach() for layer in layers]))  # (adapters, rank, in)
        self.B = nn.Parameter(torch.stack([layer.B.detach() for layer in layers]))  # (adapters, out, rank)

    def forward(self, x: Tensor) -> Tensor:
        low = torch.einsum("bsi,kri->bskr", x, self.A) * self.weights[:, None, :, None]
        return self.layer(x) + self.scale * torch.einsum("bskr,kor->bso", low, self.B)


def choose(model: nn.Module, weights: Sequence[Sequence[float]]) -> nn.Module:
    """Set how much of each adapter each row of the next batch gets; one row serves for all."""
    for module in model.modules():
        if isinstance(module, LoRABank):
            module.weights = torch.tensor(weights, dtype=torch.float32, device=machine.device)
    return model


for number, task in enumerate(TASKS):
    torch.manual_seed(seed + 1 + number)
    models[task] = lora()(fresh())
    fit(models[task], 1e-3, lesson.scaled(30), (task,), stream=seed + 20 + number)
parts = [models[task] for task in TASKS] + [models["LoRA"]]
bank = fresh()
for name in LINEAR:
    parent, _, leaf = name.rpartition(".")
    setattr(bank.get_submodule(parent), leaf, LoRABank([part.get_submodule(name) for part in parts]))
bank_bytes = sum(m.A.nbytes + m.B.nbytes for m in bank.modules() if isinstance(m, LoRABank)) / len(parts)
print(f"base {weight_bytes(base) / 2**20:.1f} MiB, each adapter {bank_bytes / 2**20:.2f} MiB")

# %%
requests = [0, 1, 2, 1, 0, 2, 2, 0]  # which adapter each row of the batch asks for
rows = [held_out[i] if number % 2 else held_out[-1 - i] for i, number in enumerate(requests)]
together = logits_of(choose(bank, np.eye(len(parts))[requests].tolist()), rows)
one_by_one = torch.zeros_like(together)
for row, number in enumerate(requests):
    one_by_one[row] = logits_of(parts[number], rows)[row]
mixed_gap = largest(together, one_by_one)
print(f"one batch with three adapters against three models: largest difference {mixed_gap:.1e}")

config = peft.LoraConfig(r=3, lora_alpha=96, target_modules=list(ALL))
theirs = peft.get_peft_model(fresh(), config, adapter_name="a0")
for number in (1, 2):
    theirs.add_adapter(f"a{number}", config)
found = dict(theirs.named_parameters())
for number, part in enumerate(parts):
    for name in LINEAR:
        for factor in "AB":
            theirs_name = f"base_model.model.{name}.lora_{factor}.a{number}.weight"
            found[theirs_name].data.copy_(getattr(part.get_submodule(name), factor).data)
theirs.eval()
batch = {k: v.to(machine.device) for k, v in collate(rows, tokenizer.pad_token_id).items() if k != "labels"}
with torch.no_grad():
    peft_logits = theirs(**batch, adapter_names=[f"a{number}" for number in requests]).logits
print(f"largest difference to peft's mixed batch: {largest(together, peft_logits):.1e}")
lesson.report("three adapters in one batch: largest difference", f"{mixed_gap:.1e}")
lesson.equal("a mixed batch gives what each adapter gives alone", mixed_gap, within=1e-3)
lesson.equal("and what peft gives", largest(together, peft_logits), within=1e-3)

# %% [markdown]
# **Arithmetic.** With other weights the same bank adds and subtracts what was learnt (Ilharco et al. 2023, *Editing Models with Task Arithmetic*). The sum of the two specialists: does it do both tasks? And the adapter for both tasks minus one specialist: does it lose that task alone?

# %%
MIXES = {
    "mood adapter alone": [1, 0, 0],
    "pairs adapter alone": [0, 1, 0],
    "mood + pairs": [1, 1, 0],
    "half of each": [0.5, 0.5, 0],
    "both-task adapter": [0, 0, 1],
    "both-task - mood": [-1, 0, 1],
    "both-task - pairs": [0, -1, 1],
}
mixes = {}
for name, weights in MIXES.items():
    choose(bank, [weights])
    mixes[name] = {}
    for number, task in enumerate(TASKS):
        right, _ = answered(bank, held_out[number * len(tests["mood"]) :][: len(tests[task])])
        mixes[name][task] = score(sum(right), len(right))
    print(f"{name:>20}: " + ", ".join(f"{task} {right}" for task, right in mixes[name].items()))
figure = plots.bars_with_intervals(
    mixes,
    title="Subtracting removes a task; a sum is not both",
    xlabel="held-out instructions right",
    alt="Right answers on both tasks for single adapters, their sum, their mean and differences.",
)
plots.show(figure)
for name in ("mood + pairs", "both-task - mood", "both-task - pairs"):
    lesson.report(f"adapters: {name}", "; ".join(f"{task} {right}" for task, right in mixes[name].items()))
for gone, left in (TASKS, TASKS[::-1]):
    found = mixes[f"both-task - {gone}"]
    lesson.claim(
        f"minus {gone}: it loses that task, not the other (by at least 50 points)",
        found[left].accuracy - found[gone].accuracy,
        at_least=0.5,
        form=".0%",
    )

# %% [markdown]
# **What you see.** Each specialist does its own task and nothing of the other. Subtraction works: minus one specialist, the adapter for both loses that task and keeps the other. Addition does not: at full strength the two updates disturb each other, and their mean does better. The two were trained apart, each as if it had the model for itself, and where both learnt the same thing, such as to answer instead of going on with the text, the sum does it twice. Merging methods (such as TIES, Yadav et al. 2023, arXiv:2306.01708) try to repair this.
#
# ## 12 · The numbers of the paper
#
# **Question.** LoRA's abstract promises 10,000 times fewer trained parameters and 3 times less GPU memory for GPT-3 with 175 billion parameters. Where do these numbers come from?
#
# GPT-3 has 96 layers of width $d = 12{,}288$. LoRA on query and value trains $96 \cdot 2 \cdot r (d + d)$ numbers. The paper's checkpoint of 35 MB and the factor of 10,000 belong to $r = 4$. For memory, `helpers.memory` follows a training step: full fine-tuning in 16 bit with Adam against LoRA, one row of 2,048 tokens with activation checkpointing, before any division among GPUs.

# %%
GPT3 = ModelShape.from_config(
    {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
)
print(f"GPT-3: {GPT3.num_parameters / 1e9:.1f} B parameters")
counts = {}
for rank in (1, 2, 4, 8):
    counts[rank] = 96 * 2 * rank * (12288 + 12288)
    print(f"r = {rank}: {counts[rank] / 1e6:.1f} M trained, {GPT3.num_parameters / counts[rank]:,.0f} times fewer, "
          f"checkpoint in 16 bit {2 * counts[rank] / 1e6:.0f} MB")  # fmt: skip
common = {"precision": "fp16", "batch_size": 1, "seq_len": 2048, "gradient_checkpointing": True}
everything = estimate_training(GPT3, method="full", **common)
adapted = estimate_training(GPT3, method="lora", lora_rank=4, lora_targets=("qkv_proj",), **common)
ratio = everything.total / adapted.total
for name, estimate in {"full": everything, "LoRA": adapted}.items():
    print(f"{name:>5}: {estimate.total / 1e9:,.0f} GB, of which weights {estimate.parameters / 1e9:,.0f}, gradients "
          f"{estimate.gradients / 1e9:,.1f}, optimiser {estimate.optimizer / 1e9:,.1f}")  # fmt: skip
print(f"{ratio:.1f} times less")
lesson.report("GPT-3 175B, LoRA with r = 4: fewer trained parameters", f"{GPT3.num_parameters / counts[4]:,.0f} times")
lesson.report("GPT-3 175B: memory of full fine-tuning over LoRA's", f"{ratio:.1f} times")
found = [round(counts[rank] / 1e6, 1) for rank in (1, 8)]
lesson.equal("4.7 M parameters at r = 1, 37.7 M at r = 8", sum(a != b for a, b in zip(found, [4.7, 37.7], strict=True)))
lesson.claim("about 10,000 times fewer", GPT3.num_parameters / counts[4], at_least=8000, at_most=12000, form=",.0f")
lesson.claim("at least 3 times less memory", ratio, at_least=3, form=".1f")

# %% [markdown]
# The paper reports 1.2 TB and 350 GB. LoRA's 350 GB are the weights in 16 bit and little else, as here. For full fine-tuning `helpers.memory` counts 8 bytes a parameter (weight, gradient and two moments in 16 bit); 1.2 TB are 6.9 bytes, so something in the paper's setup was stored smaller or elsewhere; it does not say what. With moments in fp32, as mixed precision has them, the factor would be larger.
#
# A hub model on a small card is the case that you will meet. What does QLoRA need for a model with half a billion parameters, batches of 4 rows of 512 tokens, and the paged 8-bit optimiser?

# %%
shape = ModelShape.from_config("Qwen/Qwen2.5-0.5B")
plan = {"batch_size": 4, "seq_len": 512, "precision": "fp16", "lora_rank": 16}
for method, optimizer, extra in (
    ("full", "adamw", {"precision": "fp32"}),
    ("full", "adamw", {}),
    ("lora", "adamw", {}),
    ("qlora", "paged_adamw_8bit", {}),
    ("qlora", "paged_adamw_8bit", {"gradient_checkpointing": True}),
):
    estimate = estimate_training(shape, method=method, optimizer=optimizer, **(plan | extra))
    print(f"{method:>6}, {optimizer:<17} {extra or ''!s:<32} {estimate.total / GIB:6.2f} GiB, fits a T4: "
          f"{estimate.fits(GPUS['T4'])}")  # fmt: skip
lesson.report("0.5 B model by QLoRA on a T4, helpers.memory", f"{estimate.total / 1e9:.1f} GB")
lesson.claim("QLoRA with checkpointing needs at most 7 GB", estimate.total / 1e9, at_most=7, form=".1f")


# %% [markdown]
# ## 13 · Exercises
#
# Four, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 6.1, easy: how many parameters?
def lora_parameters(model: nn.Module, rank: int, targets: Sequence[str]) -> int:
    """Number of parameters that LoRA of this rank trains on every nn.Linear of `model` whose name ends in a target.

    The name of a layer is its path in `model.named_modules()`; the part after the last dot must be in `targets`.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_lora_parameters(lora_parameters):
    block = nn.ModuleDict({"q_proj": nn.Linear(6, 4), "up_proj": nn.Linear(6, 10, bias=False), "norm": nn.LayerNorm(6)})
    small = nn.ModuleDict({"first": block, "q_proj_norm": nn.Linear(3, 3), "v_proj": nn.Linear(6, 2)})
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
# Exercise 6.2, medium: merge DoRA.
def merge_dora(weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """The plain matrix (out, in) that gives what DoRA gives: weight (out, in), A (r, in), B (out, r), magnitude (out,).

    Section 5 has the formula. Do not change any of the arguments.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_merge_dora(merge_dora):
    generator = torch.Generator().manual_seed(5)
    weight, A, B = (torch.randn(*shape, generator=generator) for shape in ((5, 7), (2, 7), (5, 2)))
    magnitude = torch.rand(5, generator=generator) + 0.5
    copies = [tensor.clone() for tensor in (weight, A, B, magnitude)]
    merged_weight = merge_dora(weight, A, B, magnitude, 1.5)
    expect_shape("merge_dora(...)", merged_weight, (5, 7))
    expect_close("the lengths of its rows", merged_weight.norm(dim=1), magnitude, 1e-5)
    x = torch.randn(3, 7, generator=generator)
    rows = weight + 1.5 * (B @ A)
    right = torch.stack([magnitude[i] * (x @ rows[i]) / rows[i].norm() for i in range(5)], dim=1)
    expect_close("x @ merge_dora(...).T", x @ merged_weight.T, right, 1e-5)
    start = merge_dora(weight, A, torch.zeros(5, 2), weight.norm(dim=1), 1.5)
    expect_close("at the start it is the weight", start, weight, 1e-5)
    for name, tensor, copy_ in zip(("weight", "A", "B", "magnitude"), (weight, A, B, magnitude), copies, strict=True):
        expect_close(f"{name} afterwards", tensor, copy_, 0.0)


check("6.2", check_merge_dora, merge_dora)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Form the adapted weight first, then rescale each row to the length in `magnitude`; which dimension is a row?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The norm is over each row, dimension 1.
#
# ```python
# def merge_dora(weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
#     adapted = weight + scale * (B @ A)
#     return adapted * (magnitude / adapted.norm(dim=1))[:, None]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 6.3, hard: start from the largest directions (PiSSA, Meng et al. 2024).
def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Residual (out, in), A (rank, in) and B (out, rank) with residual + scale * B @ A equal to the weight.

    B @ A takes the part of the weight with the `rank` largest singular values, so that training begins in the
    directions that matter most; the square roots of the singular values go half to A and half to B. The residual is
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
        expect_close(f"singular values left in the residual of {call}", torch.linalg.svdvals(residual)[: 6 - rank],
                     s[rank:], 1e-3)  # fmt: skip
        expect_close(f"the norms of A and B of {call}", A.norm(), B.norm(), 1e-3)


check("6.3", check_pissa, pissa)


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

# %%
def trained_quality(method: Callable[[nn.Module], nn.Module], rate: float) -> tuple[int, float]:
    """Trained parameters, and exact match after training a method as all others were. About five seconds on a CPU."""
    torch.manual_seed(seed)
    model = method(fresh())
    fit(model, rate, STEPS)
    return num_trained(model), quality(model)[0].accuracy


# %% tags=["exercise"]
# Exercise 6.4, open: fewer parameters.
def frugal() -> tuple[Callable[[nn.Module], nn.Module], float]:
    """A method, such as lora(rank=..., alpha=..., targets=...), and a learning rate.

    It must train at most 1 % of the parameters and still answer 85 % of the held-out instructions.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_frugal(frugal):
    method, rate = frugal()
    trained, accuracy = trained_quality(method, rate)
    expect_true(f"{trained:,} are at most 1 % of {SIZE:,} parameters", 0 < trained <= 0.01 * SIZE)
    expect_true(f"{accuracy:.0%} are at least 85 %", accuracy >= 0.85)


check("6.4", check_frugal, frugal)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Lower the rank before you leave out layers, and keep alpha where it is.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Rank 1 on every linear layer trains a third of what rank 3 does, 0.55 % of the parameters, and needs no other learning rate, since the scale $s = \alpha / r$ grows as the rank falls.
#
# ```python
# def frugal() -> tuple[Callable[[nn.Module], nn.Module], float]:
#     return lora(rank=1, alpha=96, targets=ALL), 1e-3
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
# QLoRA with the libraries, from loading to a saved adapter: bitsandbytes' 4-bit layers, peft's LoRA, activation checkpointing, and the paged 8-bit optimiser. On a GPU the model is the profile's hub model and the data are chats from the hub; here both are Shima's. Half a billion parameters stay under the 7 GB that section 12 planned.

# %%
rows = []
for row in instruction_dataset(
    machine, lesson.scaled(80), seed=seed, **({} if machine.device == "cuda" else {"tasks": TASKS})
):
    example = encode(row["instruction"] + "\n", row["answer"] + "\n")
    example = {name: values[:512] for name, values in example.items()}
    if any(label != -100 for label in example["labels"]):
        rows.append(example)
dtype = {"fp16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(settings["precision"], torch.float32)
practical = peft.prepare_model_for_kbit_training(
    load_in_4_bit(base.name_or_path, machine.device, dtype), use_gradient_checkpointing=True
)
practical.config.use_cache = False
config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
practical = peft.get_peft_model(practical, config)
config = TrainConfig(
    max_steps=lesson.scaled(16), learning_rate=2e-3 if machine.device == "cpu" else 2e-4, weight_decay=0.0,
    precision=settings["precision"], progress=False, seed=seed,
)  # fmt: skip
if machine.device == "cuda":
    torch.cuda.reset_peak_memory_stats()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # paging on a CPU
    history = train(
        practical, PaddedBatches(rows, min(4, len(rows)), tokenizer.pad_token_id, seed=seed), config,
        optimizer_fn=lambda m: bnb.optim.PagedAdamW8bit(
            [p for p in m.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=0.0
        ),
    )  # fmt: skip
print(f"loss {history.losses[0]:.2f} -> {np.mean(history.losses[-3:]):.2f}, {num_trained(practical):,} trained")
if machine.device == "cuda":
    print(f"peak of this process on the GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB, all models included")

# %%
folder = ROOT / "build" / "lesson06-adapter"
practical.save_pretrained(folder)
size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
print(f"adapter on disk: {size / 2**20:.1f} MiB; the model's own weights: {weight_bytes(base) / 2**20:.1f} MiB in fp32")
again = peft.PeftModel.from_pretrained(load_in_4_bit(base.name_or_path, machine.device, dtype), folder)
names = zip(practical.named_parameters(), again.named_parameters(), strict=True)
same = all(torch.equal(ours.detach().cpu(), read.cpu()) for (n, ours), (_, read) in names if "lora" in n)
print(f"read back, every number of the adapter is the same: {same}")
lesson.equal("an adapter survives saving", int(not same))
lesson.claim("the loss falls", history.losses[0] - np.mean(history.losses[-3:]), at_least=0, form=".2f")

# %% [markdown]
# **What is different at scale**
#
# | here | a real system |
# |---|---|
# | 40 steps on two tasks that full fine-tuning learns perfectly | thousands of steps; on hard tasks with much data full fine-tuning wins (Biderman et al. 2024), on small sets LoRA is its equal |
# | rank 3 on all linear layers | rank 8 to 64 on all linear layers, $\alpha$ of one to two times the rank, learning rates some ten times those of full fine-tuning |
# | activations are small beside the weights | with long rows activations dominate: adapters do not save those, checkpointing does (lesson 07) |
# | NF4 made and unmade by table look-ups in PyTorch | one fused kernel; 4-bit training is still slower than 16-bit training |
# | all adapters of the bank computed for every row | kernels that gather each row's adapter |
# | a plain-text format | the model's chat format; if you add tokens, train their rows too |
#
# When in doubt: LoRA on all linear layers first, and a learning rate sweep before anything else. QLoRA when the weights do not fit. Full fine-tuning when the data are many and the hardware is there.
#
# ## Read on
#
# - Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv:2106.09685; Aghajanyan et al. 2020, *Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning*, arXiv:2012.13255.
# - Kalajdzievski 2023, *A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA*, arXiv:2312.03732; Liu et al. 2024, *DoRA: Weight-Decomposed Low-Rank Adaptation*, arXiv:2402.09353; Meng et al. 2024, *PiSSA*, arXiv:2404.02948.
# - Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv:2305.14314; Dettmers et al. 2022, *8-bit Optimizers via Block-wise Quantization*, arXiv:2110.02861.
# - Houlsby et al. 2019, *Parameter-Efficient Transfer Learning for NLP*, arXiv:1902.00751; He et al. 2022, *Towards a Unified View of Parameter-Efficient Transfer Learning*, arXiv:2110.04366.
# - Li and Liang 2021, *Prefix-Tuning*, arXiv:2101.00190; Lester et al. 2021, *The Power of Scale for Parameter-Efficient Prompt Tuning*, arXiv:2104.08691.
# - Liu et al. 2022, *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning* (IA3), arXiv:2205.05638; Ben Zaken et al. 2022, *BitFit*, arXiv:2106.10199; Zhao et al. 2024, *Tuning LayerNorm in Attention*, arXiv:2312.11420.
# - Zhang et al. 2023, *Adding Conditional Control to Text-to-Image Diffusion Models* (ControlNet), arXiv:2302.05543.
# - Ilharco et al. 2023, *Editing Models with Task Arithmetic*, arXiv:2212.04089; Sheng et al. 2024, *S-LoRA: Serving Thousands of Concurrent LoRA Adapters*, arXiv:2311.03285.
# - Biderman et al. 2024, *LoRA Learns Less and Forgets Less*, arXiv:2405.09673; Shuttleworth et al. 2024, *LoRA vs Full Fine-tuning: An Illusion of Equivalence*, arXiv:2410.21228.
