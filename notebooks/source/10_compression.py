# %% [markdown]
# # 10 · Compression: the same model in fewer bytes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/10_compression.ipynb)
#
# A trained model is a list of numbers, and most of those numbers say more than they need to. In this lesson you write them with 8, 4, 3 and 2 bits, you set half of them to zero, you cut out whole heads and layers, and you teach a smaller model to imitate the large one. Every method is written out. Every size is read from a file or from a tensor's storage, every speed is taken with a clock, and every loss of quality has an interval.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. quantise weights per tensor, per channel and per group, and see what a single outlier does to 8 bits;
# 2. rebuild NF4 and FP4, bit for bit as `bitsandbytes` stores them;
# 3. write GPTQ in its Cholesky form and AWQ's scaling, and measure what they gain over rounding at 4 and 3 bits;
# 4. prune by magnitude, by Wanda and by SparseGPT, then heads, neurons and layers, with a short recovery;
# 5. distil a student from labels, logits, hidden states and its own samples, and use it to decode faster **without changing a single word**.
#
# **Prerequisites:** lessons 01 and 03 (the parts of a transformer), 05 (instruction tuning) is of use.
#
# **The models** are *shima-4m*, the course's base model, and *shima-4m-assistant*, the same after supervised fine-tuning. The base is judged by its perplexity on text that it has not read. The assistant is judged by its answers to instructions that it has not seen. On a GPU both are open hub models.
#
# | symbol | meaning |
# |---|---|
# | $W$, $x$ | weights of a linear layer (out, in); its input (in) |
# | $b$, $s$, $z$ | bits of a code, scale, zero point |
# | $H = X X^\top$ | second moments of the inputs of a layer, summed over calibration tokens (in, in) |
# | $p$, $q$ | next-token distribution of the large model (teacher, target) and of the small one (student, draft) |
# | $T$, $k$, $a$ | temperature, tokens drafted at a time, chance that a drafted token is accepted |

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
model_id = ""  # another model, used as base and as assistant: a hub id, or a folder in hub format
text_id = ""  # another text for the base model: a hub dataset or a .jsonl file with a field "text"
chat_id = ""  # other instructions: a hub dataset or a .jsonl file with a field "messages"
seed = 0
budget = 1.0  # share of all training steps; the lesson's claims are asserted from 1.0 on

# %%
import copy
import math
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache

from helpers import plots
from helpers.chat import encode_chat
from helpers.data import PaddedBatches, collate, instruction_dataset, pack, text_dataset
from helpers.evaluation import bootstrap_interval, exact_match, score
from helpers.exercises import check, expect_close, expect_equal, expect_shape, expect_true
from helpers.generation import answer_instructions, token_log_probs
from helpers.lesson import PRECISIONS, Lesson
from helpers.models import load_assistant, load_model
from helpers.training import TrainConfig, train
from helpers.world import CHAT_TASKS, World

lesson = Lesson("10", profile, model_id, seed, budget)
machine = lesson.machine
# All that depends on the hardware: tasks of the assistant, the longest chat that is learned from (tokens), learning
# rates of the recovery after pruning and of the students, layers of the student.
SETTINGS = {
    "cpu": {"tasks": CHAT_TASKS, "longest": 192, "recovery": 3e-4, "student": 2e-3, "layers": 2},
    "t4": {"tasks": ("reading", "mood", "pairs"), "longest": 256, "recovery": 2e-5, "student": 1e-4, "layers": 8},
    "large": {"tasks": ("reading", "mood", "pairs"), "longest": 256, "recovery": 2e-5, "student": 1e-4, "layers": 8},
}
settings = SETTINGS[machine.name]

# %%
base, tokenizer = load_model(machine)
assistant, chat_tokenizer = load_assistant(machine)
layers = base.config.num_hidden_layers
for name, model in {"base": base, "assistant": assistant}.items():
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters in {layers} layers")


# %% [markdown]
# ## 1 · What counts
#
# **Question.** How do you know that a smaller model is still good enough? You need numbers from text that the model was not trained on, and you need to know how far they move by chance.
#
# Two measures serve the whole lesson. For the base model: perplexity on held-out rows of 128 tokens. For the assistant: the share of right answers, and the loss on the right answers, which sees small damage long before an answer turns wrong. `losses` gives one row a text: the sum of its losses and its number of tokens. So two models can be compared on **the same** texts: the bootstrap resamples the texts and takes the difference each time, and what is hard about a text cancels.
#
# A third measure compares a compressed model with its original directly: the divergence $\mathrm{KL}(p \,\|\, \hat p) = \sum_v p_v \log (p_v / \hat p_v)$ of the next-token distributions. A loss can go down by luck when the weights are disturbed. The divergence cannot: it is 0 for the same function and positive for any other.
#
# The *calibration* text is what a method may look at. It comes from the training distribution and never from the text of the measurement.

# %%
def rows_of(texts: list[str], num_rows: int) -> Tensor:
    """Packed rows (num_rows, 128) of token ids, documents joined by the end-of-text token."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor(list(pack([[*document, tokenizer.eos_token_id] for document in ids], 128))[:num_rows])


texts = list(text_dataset(text_id or machine, 700, seed=seed)["text"])
rows = rows_of(texts, 640)
tenth = len(rows) // 10
text_calibration, text_test, text_train = rows[:tenth], rows[tenth : 2 * tenth], rows[2 * tenth :]
questions = World().chat_questions(240, seed, settings["tasks"])
chats = instruction_dataset(chat_id or machine, 2200, seed=1000 + seed)  # seed 0 made the assistant
chats = [(chat["instruction"], chat["answer"]) for chat in chats]
# Shima's questions are new in name, number or phrasing; chats of other sources are split.
asked = (
    [(question.prompt, question.answer) for question in questions]
    if machine.name == "cpu"
    else chats[: len(chats) // 10]
)
encoded = [[encode_chat(chat_tokenizer, *chat) for chat in part] for part in (asked, chats[len(chats) // 10 :])]
chat_test, chat_train = [[c for c in part if len(c["input_ids"]) <= settings["longest"]] for part in encoded]
parts = {"calibrate": text_calibration, "measure": text_test, "train": text_train}
print("rows of text to " + ", ".join(f"{purpose}: {tuple(part.shape)}" for purpose, part in parts.items()))
print(f"chats: {len(chat_train):,} to learn from, {len(chat_test)} and {len(questions)} questions to measure")
print(f"\n{questions[0].prompt}\n -> {questions[0].answer}")


# %%
@torch.no_grad()
def losses(model, batches, new_cache=None) -> np.ndarray:
    """One row a text: the sum of its losses in nats, and how many tokens were predicted (texts, 2)."""
    found = []
    for batch in batches:
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch.pop("labels", batch["input_ids"])[:, 1:]
        cache = new_cache() if new_cache else None
        logits = model(**batch, past_key_values=cache, use_cache=cache is not None).logits  # (batch, seq, vocab)
        scores = token_log_probs(logits[:, :-1], labels)  # (batch, seq - 1)
        found.append(torch.stack([-scores.sum(-1), (labels != -100).sum(-1)], 1).cpu())
    return torch.cat(found).numpy()


def mean_loss(table: np.ndarray) -> float:
    return table[:, 0].sum() / table[:, 1].sum()


def gain(worse: np.ndarray, better: np.ndarray) -> tuple[float, float, float]:
    """How much lower the second loss is on the same texts, in nats per token, and its 95 % interval."""
    paired = np.stack([worse[:, 0] - better[:, 0], better[:, 1]], 1)
    return mean_loss(paired), *bootstrap_interval(paired, mean_loss, seed)


@torch.no_grad()
def divergence(model, reference) -> np.ndarray:
    """One row a text: KL(reference || model) summed over its positions, and their number (texts, 2)."""
    found = []
    for ids in text_test[:32].to(model.device).split(16):
        target, logs = (m(ids, use_cache=False).logits.float().log_softmax(-1) for m in (reference, model))
        each = (target.exp() * (target - logs)).sum(-1)  # (batch, seq)
        found.append(torch.stack([each.sum(1), torch.full_like(each[:, 0], each.shape[1])], 1).cpu())
    return torch.cat(found).numpy()


text_batches = [{"input_ids": part} for part in text_test.split(32)]
text_losses = partial(losses, batches=text_batches)
chat_batches = [collate(chat_test[i : i + 40], chat_tokenizer.pad_token_id) for i in range(0, len(chat_test), 40)]
chat_losses = partial(losses, batches=chat_batches)


# %%
def accuracy(model):
    """Share of right answers, greedy. Hub models need not keep to Shima's forms of answers: the value is enough."""
    answers = answer_instructions(model, chat_tokenizer, [question.prompt for question in questions], batch_size=120)
    if machine.model_id == "shima-4m":
        return exact_match(answers, [question.answer for question in questions])
    wanted = [str(question.about.get("value", question.answer.strip("."))).lower() for question in questions]
    return score(sum(value in answer.lower() for value, answer in zip(wanted, answers, strict=True)), len(wanted))


full_text, full_chat, full_accuracy = text_losses(base), chat_losses(assistant), accuracy(assistant)
low, high = (math.exp(edge) for edge in bootstrap_interval(full_text, mean_loss, seed))
print(f"base: perplexity {math.exp(mean_loss(full_text)):.3f} ({low:.3f} to {high:.3f}) on {len(text_test)} rows")
print(f"assistant: {full_accuracy} right, loss {mean_loss(full_chat):.4f} on {len(chat_test)} answers")
lesson.report(
    "before: perplexity of the base, right answers of the assistant",
    f"{math.exp(mean_loss(full_text)):.2f}, {full_accuracy}",
)


# %% [markdown]
# ## 2 · Integers and a scale
#
# **Question.** A weight is stored in 16 bits. What is lost with 8, 4, 3 or 2?
#
# Take a block of weights, find a step size $s$, and store for each weight how many steps it is from zero. With $b$ bits:
#
# $$\text{absmax:}\quad s = \frac{\max |w|}{2^{b-1}-1},\quad c = \mathrm{round}(w/s) \qquad\qquad \text{zero point:}\quad s = \frac{\max w - \min w}{2^b - 1},\quad c = \mathrm{round}(w/s + z)$$
#
# $\hat w = s\,c$ or $s\,(c - z)$ is what the model computes with afterwards; $z = \mathrm{round}(-\min w / s)$ is the code of zero. Absmax is symmetric and wastes codes if the weights lie on one side. The zero point uses all codes and costs one more number a block.
#
# The error of a weight is at most $s/2$, so **the largest weight of a block sets the error of all others**. That is why the size of the block matters: one for the whole tensor, one for each row (*channel*: all weights of one output), or one for each group of 64 along a row.

# %%
def absmax(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of blocks (blocks, size), symmetric around 0."""
    largest = 2 ** (bits - 1) - 1
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest  # (blocks, 1)
    return (blocks / scale).round().clamp(-largest, largest).to(torch.int8), scale


def zero_point(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 to 2^bits - 1, scales and zero points; the range always contains 0."""
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-12) / (2**bits - 1)
    zero = (-low / scale).round()
    return (blocks * (1 / scale) + zero).round().clamp(0, 2**bits - 1).to(torch.uint8), scale, zero


def in_blocks(weight: Tensor, block: str | int) -> Tensor:
    """View of a weight (out, in) as (blocks, size): one "tensor", one block a "channel", or groups of `block`."""
    return weight.reshape({"tensor": 1, "channel": len(weight)}.get(block, -1), -1 if isinstance(block, str) else block)


def rounded(weight: Tensor, bits: int, block: str | int, symmetric: bool = False) -> Tensor:
    """The weight after a trip through the codes: round to nearest."""
    blocks = in_blocks(weight, block)
    if symmetric:
        codes, scale = absmax(blocks, bits)
        return (codes * scale).view_as(weight)
    codes, scale, zero = zero_point(blocks, bits)
    return ((codes - zero) * scale).view_as(weight)


print(absmax(torch.tensor([[0.1, -0.2, 0.35, 1.4]]), bits=4))
print(zero_point(torch.tensor([[0.1, -0.2, 0.35, 1.4]]), bits=4))

# %% [markdown]
# **The library.** `torch.fake_quantize_per_channel_affine` makes the same trip, in the kernel that PyTorch uses to train with quantisation. Give it your scales and zero points.

# %%
GROUP, BITS, BLOCKS = 64, (8, 4, 3, 2), ("tensor", "channel", 64)


def linears(model) -> dict[str, nn.Linear]:
    """The linear layers of all blocks; embeddings and the output matrix stay in 16 bits, as is usual."""
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and "layers" in name}


def compressed(model, method):
    """Copy of the model with each linear layer's weight replaced by `method(name, weight)`."""
    copied = copy.deepcopy(model)
    for name, layer in linears(copied).items():
        layer.weight.data = method(name, layer.weight.data.float()).to(layer.weight.dtype)
    return copied


def to_nearest(bits: int, block: str | int, symmetric: bool = False):
    """`method` for `compressed`: round to nearest."""
    return lambda _, weight: rounded(weight, bits, block, symmetric)


differing = elsewhere = total = 0
for layer in linears(base).values():
    weight = layer.weight.detach().float()
    for bits in BITS:
        codes, scale, zero = zero_point(weight, bits)
        theirs = torch.fake_quantize_per_channel_affine(
            weight, scale.flatten(), zero.flatten().int(), 0, 0, 2**bits - 1
        )
        other_code = ((codes - zero) * scale - theirs).abs() > scale / 2
        at_a_half = ((weight.double() / scale + zero) % 1 - 0.5).abs() < 1e-4
        differing, total = differing + other_code.sum().item(), total + weight.numel()
        elsewhere += (other_code & ~at_a_half).sum().item()
print(f"{differing:,} of {total:,} weights get another code from torch, {elsewhere} of them away from an exact half")
assert elsewhere == 0
lesson.report("weights with another code than torch's, away from exact halves", f"{elsewhere} of {total:,}")

# %%
table = {}
print("perplexity of the base     " + "".join(f"{bits} bits".rjust(10) for bits in BITS))
for symmetric, block in ((True, "channel"), *((False, block) for block in BLOCKS)):
    for bits in BITS:
        table[symmetric, block, bits] = text_losses(compressed(base, to_nearest(bits, block, symmetric)))
    label = f"{'absmax' if symmetric else 'zero point'}, {'group of 64' if block == 64 else 'per ' + block}"
    found = [math.exp(mean_loss(table[symmetric, block, bits])) for bits in BITS]
    print(f"{label:27}" + "".join(f"{value:10.2f}" for value in found))


alt = "Loss above 16 bits over bits, logarithmic: one scale per tensor lies far above per channel and groups of 64."
series = {}
for block, label in zip(BLOCKS, ("one scale per tensor", "per channel", "per group of 64"), strict=True):
    above = [mean_loss(table[False, block, bits]) - mean_loss(full_text) for bits in BITS[1:]]
    series[label] = (BITS[1:], [max(value, 1e-4) for value in above])
figure = plots.curve(
    series,
    title="Small groups keep the loss down as bits get few",
    xlabel="bits per weight (without scales and zero points)",
    ylabel="loss above 16 bits (nats per token)",
    alt=alt,
    log_y=True,
)
plots.show(figure, alt)
for bits in (4, 3):
    change, low, high = gain(table[False, "tensor", bits], table[False, 64, bits])
    print(f"{bits} bits: groups of 64 lower the loss by {change:.3f} nats ({low:.3f} to {high:.3f}) against per tensor")
    lesson.claim(f"group-wise beats per-tensor at {bits} bits (low end of the interval)", low, at_least=0, form=".4f")
    lesson.report(
        f"groups of 64 against one scale per tensor, {bits} bits: loss lower by",
        f"{change:.3f} nats ({low:.3f} to {high:.3f})",
    )


# %% [markdown]
# 8 bits cost nothing that you could measure here, whatever the block. At 4 bits the block begins to matter, and below it decides. The zero point helps most where codes are few: absmax uses only 3 of the 4 codes that 2 bits give.
#
# ## 3 · Activations, and a few columns that ruin them
#
# **Question.** Integer arithmetic is fast only if both factors are integers. Can the inputs of a layer be quantised too?
#
# For 8 bits, *vector-wise* quantisation is the usual way: one scale $s_x$ for each token, one scale $s_w$ for each output, and the product of the integers is exact in 32 bits:
#
# $$y_{tj} \approx s_x^{(t)}\, s_w^{(j)} \sum_i c_x^{(ti)}\, c_w^{(ji)}$$
#
# Large models have a difficulty: a few columns of $x$ are 20 to 100 times larger than the rest (Dettmers et al. 2022, who find them in all layers from 6.7 B parameters on; Xiao et al. 2023). They set $s_x$, and the other columns get a handful of codes. **LLM.int8** takes out the columns in which some $|x_i| > 6$ and multiplies them in 16 bits.

# %%
def int8_linear(x: Tensor, weight: Tensor, threshold: float = math.inf) -> Tensor:
    """x (tokens, in), weight (out, in): 8-bit product, columns with an entry above the threshold in full precision."""
    large = x.abs() >= threshold
    outliers = large.any(0)  # (in,)
    codes_x, scale_x = absmax(x.masked_fill(large, 0.0), 8)  # one scale a token: (tokens, 1)
    codes_x[:, outliers] = 0
    codes_w, scale_w = absmax(weight, 8)  # one scale an output: (out, 1)
    product = torch._int_mm(codes_x, codes_w.T.contiguous())  # (tokens, out) in int32: a real integer kernel
    rest = x[:, outliers] @ (codes_w * scale_w)[:, outliers].T  # only the 8-bit weights are stored
    return product * scale_x * scale_w.T + rest


def with_int8_layers(model, threshold: float = math.inf):
    """Copy of the model whose linear layers compute with `int8_linear`."""
    copied = copy.deepcopy(model)
    for layer in linears(copied).values():

        def forward(x: Tensor, layer=layer) -> Tensor:
            y = int8_linear(x.flatten(0, -2).float(), layer.weight.float(), threshold).to(x.dtype)
            return y.view(*x.shape[:-1], -1) + (0 if layer.bias is None else layer.bias)

        layer.forward = forward
    return copied


# %%
@torch.no_grad()
def input_statistics(model, batches) -> dict[str, dict[str, Tensor]]:
    """For each linear layer: moments X X^T (in, in), largest |x| (in,), and some inputs (512, in)."""
    found, hooks = {}, []

    def look(layer, inputs, name):
        x = inputs[0].flatten(0, -2).float()  # (tokens, in)
        seen = found.setdefault(name, {"moments": 0, "largest": torch.zeros_like(x[0]), "inputs": x[:512]})
        seen["moments"] = seen["moments"] + x.T @ x
        seen["largest"] = torch.maximum(seen["largest"], x.abs().amax(0))

    for name, layer in linears(model).items():
        hooks.append(
            layer.register_forward_pre_hook(partial(lambda layer, inputs, name: look(layer, inputs, name), name=name))
        )
    for batch in batches:
        model(**{name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


statistics = input_statistics(base, [{"input_ids": part} for part in text_calibration.split(32)])
print("inputs of            largest |x|   over the median column   columns above 6 (the layer with most)")
for part in ("q_proj", "o_proj", "gate_proj", "down_proj"):  # k and v read what q reads, up what gate reads
    columns = [seen["largest"] for name, seen in statistics.items() if part in name]
    ratio = max(value.max() / value.median() for value in columns)
    above = max((value > 6).sum() for value in columns)
    print(f"{part:18}{max(value.max() for value in columns):10.1f}{ratio:20.1f}{above:20} of {len(columns[0])}")


# %% [markdown]
# What attention and the first feed-forward matrices read has columns of similar size: the largest is about three times the median one. Some pass 6, but because all are large, not because they stand out. So **shima-4m has no outlier columns where large models have them**; it is too small to have grown them. The inputs of `down_proj` are larger still. A threshold of 6 takes out most of their columns, so that LLM.int8 would hardly compute in 8 bits there: the threshold was chosen for activations of another scale.
#
# So plant some, without changing the model: multiply three entries of each norm's weight by 150, and divide the same columns of the matrices that read the norm's output by 150. The function is the same, up to rounding, and the activations now look like those of a large model. This is a construction, so the damage below tells what outliers *do*, not how often they occur.
#
# **SmoothQuant** (Xiao et al. 2023) is the same trick in the other direction. It moves a part of each column's size from the activations into the weights, where it does no harm:
#
# $$s_j = \frac{\max|x_j|^{\alpha}}{\max|w_j|^{1-\alpha}}, \qquad x'_j = x_j / s_j, \qquad w'_j = s_j\, w_j$$
#
# The division is folded into the norm before the layer, so it costs nothing.

# %%
def readers(block) -> list[tuple[str, nn.Module, list[nn.Linear]]]:
    """The two norms of a block, a layer that reads each, and all linear layers that read it."""
    attention, mlp = block.self_attn, block.mlp
    return [
        ("self_attn.q_proj", block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        ("mlp.gate_proj", block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


@torch.no_grad()
def rescaled(model, factors_of):
    """Copy of the same function, in which the inputs of layers that follow a norm are divided by factors (in,)."""
    copied = copy.deepcopy(model)
    for index, block in enumerate(copied.model.layers):
        for name, norm, layers_after in readers(block):
            weights = torch.cat([layer.weight for layer in layers_after]).float()  # (sum of outs, in)
            factors = factors_of(f"model.layers.{index}.{name}", weights).to(norm.weight.dtype)
            norm.weight /= factors
            for layer in layers_after:
                layer.weight *= factors
    return copied


# %%
def plant(name: str, weights: Tensor) -> Tensor:
    factors = torch.ones_like(weights[0])
    factors[torch.randperm(len(factors), generator=torch.Generator().manual_seed(seed))[:3].to(factors.device)] = (
        1 / 150
    )
    return factors


calibration = [{"input_ids": part} for part in text_calibration.split(32)]
planted = rescaled(base, plant)
planted_statistics = input_statistics(planted, calibration)


def smooth(name: str, weights: Tensor, alpha: float = 0.5) -> Tensor:
    return (planted_statistics[name]["largest"] ** alpha / weights.abs().amax(0) ** (1 - alpha)).clamp(min=1e-4)


smoothed = rescaled(planted, smooth)
first = text_test[:4].to(base.device)
with torch.no_grad():
    change = (planted(first).logits - base(first).logits).abs().max().item()
print(f"planting changes the logits by at most {change:.1e}")

# %%
outcomes = {"16-bit activations": full_text}
outcomes["8 bits, the model as it is"] = text_losses(with_int8_layers(base))
outcomes["8 bits, outliers planted"] = text_losses(with_int8_layers(planted))
outcomes["8 bits, columns above 6 kept (LLM.int8)"] = text_losses(with_int8_layers(planted, threshold=6.0))
outcomes["8 bits, smoothed (SmoothQuant)"] = text_losses(with_int8_layers(smoothed))
for label, table_of_losses in outcomes.items():
    print(f"{label:42} perplexity {math.exp(mean_loss(table_of_losses)):.3f}")
largest = {name: seen["largest"] for name, seen in planted_statistics.items()}
for part in ("q_proj", "gate_proj", "down_proj"):
    share = np.mean([(value > 6).float().mean().item() for name, value in largest.items() if part in name])
    print(f"columns of the inputs of {part} above 6: {share:.1%}")
hurt, kept, smoothing = (outcomes[label] for label in list(outcomes)[2:])
for label, cure in (("LLM.int8", kept), ("SmoothQuant", smoothing)):
    change, low, high = gain(hurt, cure)
    print(f"{label} lowers the loss by {change:.4f} nats ({low:.4f} to {high:.4f})")
    lesson.claim(
        f"planted outliers hurt 8-bit activations, and {label} cures it (low end of the interval)",
        low,
        at_least=0,
        form=".4f",
    )
    lesson.report(
        f"{label} against plain 8-bit products, outliers planted: loss lower by",
        f"{change:.3f} nats ({low:.3f} to {high:.3f})",
    )

# %% [markdown]
# **The library.** `bitsandbytes` does the same for `load_in_8bit=True`. Compare what it stores and what it computes, on the inputs of one planted layer. It rounds the inputs to 16 bits first, so give yours the same ones.

# %%
import bitsandbytes as bnb

name = "model.layers.0.mlp.gate_proj"
x = planted_statistics[name]["inputs"].half()  # (tokens, in)
weight = linears(planted)[name].weight.detach().half()
codes, row_maxima, outlier_columns = bnb.functional.int8_vectorwise_quant(x, threshold=6.0)
outliers = (x.abs() >= 6.0).any(0)
ours, scale = absmax(x.float().masked_fill(x.abs() >= 6.0, 0.0), 8)
ours[:, outliers] = 0
same_columns = torch.equal(outliers.nonzero().flatten(), outlier_columns.sort().values)
print(f"the same {len(outlier_columns)} columns are taken out: {same_columns}")
off = (ours != codes).float().mean().item()
print(f"codes that differ: {off:.3%}; scales differ by at most {(scale.flatten() * 127 - row_maxima).abs().max():.1e}")
module = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
module.load_state_dict({"weight": weight})
with torch.no_grad():
    theirs = module.to(base.device)(x).float()
y = int8_linear(x.float(), weight.float(), threshold=6.0)
exact = x.float() @ weight.float().T
print(f"largest entry {exact.abs().max():.2f}; ours and theirs differ by at most {(y - theirs).abs().max():.4f},")
print(f"ours and the exact product by {(y - exact).abs().max():.4f}")


# %% [markdown]
# ## 4 · Codes that are not equally spaced: NF4 and FP4
#
# **Question.** Weights of a trained layer are distributed roughly like a normal distribution: many small ones, few large ones. Why should the 16 codes of 4 bits be equally far apart?
#
# **NF4** (Dettmers et al. 2023) puts them at quantiles of the normal distribution, so that each code is used about equally often. Zero must be a code (padding and pruned weights stay exact), so the two sides get 8 positive and 7 negative values: quantiles at equal steps of probability from $\delta$ to one half, where $\delta = 1 - 0.9677083$, divided by the largest.
#
# **FP4** is a tiny floating-point number: a sign, two bits of exponent $e$ and one bit of mantissa $m$. In the variant of bitsandbytes the value is $2^{4-e}(1 + m/2)$ for $e \ge 1$ and $m/16$ for $e = 0$, divided by the largest, 12.
#
# Both share the rest: blocks of 64 weights, each divided by its absolute maximum, and the nearest code by value. Two codes go into a byte, the first in the upper half.

# %%
def normal_quantiles(number: int, edge: float = 0.9677083) -> Tensor:
    """Quantiles of a normal distribution at equal steps of probability from `edge` to 1/2, the last left out."""
    return torch.special.ndtri(torch.linspace(edge, 0.5, number + 1, dtype=torch.float64))[:-1]


positive, negative = normal_quantiles(8), -normal_quantiles(7)
NF4 = torch.cat([negative, torch.zeros(1), positive]).sort().values
NF4 = (NF4 / NF4.max()).float()

float4 = [m / 16 if e == 0 else 2.0 ** (4 - e) * (1 + m / 2) for e in range(4) for m in range(2)]
FP4 = torch.tensor(float4 + [-value for value in float4]) / 12  # index = bits: sign, exponent, mantissa
FP4[8] = 0.0  # no minus zero
print("NF4:", [round(value, 3) for value in NF4.tolist()])
print("FP4:", [round(value, 3) for value in FP4.sort().values.tolist()])


def to_4_bits(weight: Tensor, codebook: Tensor, block: int = 64) -> tuple[Tensor, Tensor]:
    """Two codes a byte (numbers / 2,), and the absolute maximum of each block (blocks,)."""
    blocks = weight.float().reshape(-1, block)
    largest = blocks.abs().amax(-1, keepdim=True)
    values, order = codebook.to(weight.device).sort(stable=True)
    borders = (values[1:] + values[:-1]) / 2  # halfway between neighbours
    codes = order[torch.bucketize(blocks * (1 / largest.clamp(min=1e-38)), borders)].flatten().to(torch.uint8)
    return codes[0::2] << 4 | codes[1::2], largest.flatten()


def from_4_bits(packed: Tensor, largest: Tensor, codebook: Tensor, shape: tuple) -> Tensor:
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    return (codebook.to(packed.device)[codes].view(len(largest), -1) * largest[:, None]).reshape(shape)


# %%
for kind, codebook in (("nf4", NF4), ("fp4", FP4)):
    equal = total = 0
    worst_code = worst_weight = 0.0
    for layer in linears(base).values():
        weight = layer.weight.detach().float()
        packed, largest = to_4_bits(weight, codebook)
        theirs, state = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
        equal, total = equal + (packed == theirs.flatten()).sum().item(), total + len(packed)
        worst_code = max(worst_code, (codebook.to(state.code.device) - state.code).abs().max().item())
        ours_back = from_4_bits(packed, largest, codebook, weight.shape)
        theirs_back = bnb.functional.dequantize_4bit(theirs, state)
        worst_weight = max(worst_weight, (ours_back - theirs_back).abs().max().item())
    print(f"{kind}: {equal:,} of {total:,} bytes are equal to those of bitsandbytes; the codebooks differ by at most")
    print(f"     {worst_code:.1e}, the weights that come back by {worst_weight:.1e}")
    lesson.report(f"{kind.upper()}: bytes equal to bitsandbytes'", f"{equal:,} of {total:,}")
    lesson.equal(f"our {kind.upper()} equals bitsandbytes byte for byte", total - equal)


# %%
def four_bits(codebook: Tensor):
    return lambda _, weight: from_4_bits(*to_4_bits(weight, codebook), codebook, weight.shape)


kinds = {
    "integers, absmax": to_nearest(4, 64, symmetric=True),
    "integers, zero point": to_nearest(4, 64),
    "FP4": four_bits(FP4),
    "NF4": four_bits(NF4),
}
print("4 bits, groups of 64        error of the weights   base: loss above 16 bits (95 % interval)")
four_bit_losses, errors = {}, {}
for label, method in kinds.items():
    smaller = compressed(base, method)
    pairs = zip(linears(base).values(), linears(smaller).values(), strict=True)
    errors[label] = error = np.mean([((a.weight - b.weight).norm() / a.weight.norm()).item() for a, b in pairs])
    four_bit_losses[label] = text_losses(smaller)
    change, low, high = gain(four_bit_losses[label], full_text)
    print(f"{label:27} {error:16.1%} {change:16.4f} ({low:.4f} to {high:.4f})")
lesson.claim(
    "NF4 is closer to the weights than FP4 and than absmax integers",
    errors["NF4"] / min(errors["FP4"], errors["integers, absmax"]),
    at_most=0.95,
    form=".2f",
)
change, low, high = gain(four_bit_losses["FP4"], four_bit_losses["NF4"])
print(f"NF4 against FP4: the loss is lower by {change:.4f} nats ({low:.4f} to {high:.4f})")
lesson.report("error of the weights, NF4 and FP4", f"{errors['NF4']:.1%} and {errors['FP4']:.1%}")
lesson.report("NF4 against FP4: loss lower by", f"{change:.4f} nats ({low:.4f} to {high:.4f})")


# %% [markdown]
# At 4 bits and in groups of 64, all four are within a few thousandths of a nat of the full model. NF4 is the closest to the weights among the symmetric codes, without calibration and without a zero point, which is why QLoRA uses it (lesson 06). Integers with a zero point are as close, and hardware computes with them directly.
#
# ## 5 · Bytes that are really there, and kernels
#
# **Question.** "4 bits" is a statement about codes. How large is the file, how much memory is used, and is it any faster?
#
# Up to here the weights went through the codes and back: the tensors above are as large as before. Now store them. Two codes share a byte, scales and zero points are 16-bit numbers and bytes beside them. All sizes below are read from `untyped_storage().nbytes()` and from the file system, never computed from bits.

# %%
def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes of 8, 4, 2 or 1 bits, in bytes: the first code in the upper bits."""
    codes = codes.flatten().view(-1, 8 // bits)
    return sum(codes[:, i] << (8 - bits * (i + 1)) for i in range(8 // bits)).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    return torch.stack([packed >> (8 - bits * (i + 1)) & (2**bits - 1) for i in range(8 // bits)], 1).flatten()


class PackedLinear(nn.Module):
    """A linear layer that stores packed codes (out, in) with scales and zero points (out, groups)."""

    def __init__(self, layer: nn.Linear, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor):
        super().__init__()
        self.bits, self.codes_shape, self.bias = bits, codes.shape, layer.bias
        self.register_buffer("packed", pack_bits(codes, bits))  # (out * in * bits / 8,) bytes
        self.register_buffer("scales", scales.to(torch.float16))  # (out, groups)
        self.register_buffer("zeros", zeros.to(torch.uint8))  # (out, groups)

    def dequantised(self) -> Tensor:
        codes = unpack_bits(self.packed, self.bits).view(*self.scales.shape, -1)  # (out, groups, size)
        return ((codes - self.zeros[..., None].float()) * self.scales[..., None].float()).view(self.codes_shape)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised().to(x.dtype), self.bias)


def packed_model(model, bits: int, encode):
    """Copy whose linear layers are packed; `encode(name, weight)` gives codes, scales and zero points."""
    copied = copy.deepcopy(model)
    for name, layer in linears(copied).items():
        parent, _, child = name.rpartition(".")
        module = PackedLinear(layer, bits, *encode(name, layer.weight.data.float()))
        setattr(copied.get_submodule(parent), child, module)
    return copied


# %%
def nearest_codes(_, weight: Tensor, bits: int = 4, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, zero = zero_point(in_blocks(weight, group), bits)
    return codes.view_as(weight), scale.view(len(weight), -1), zero.view(len(weight), -1)


def stored(model) -> dict[str, Tensor]:
    """Every tensor of a model once: tied weights share their storage."""
    return dict({t.untyped_storage().data_ptr(): (name, t) for name, t in model.state_dict().items()}.values())


def memory_bytes(model) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in stored(model).values())


FILE = ROOT / "build" / "10_compression" / "model.safetensors"


def file_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of a safetensors file with these tensors; numbers of 32 bits are written with 16."""
    FILE.parent.mkdir(parents=True, exist_ok=True)
    halves = {name: t.bfloat16() if t.dtype == torch.float32 else t for name, t in tensors.items()}
    save_file({name: tensor.contiguous().cpu() for name, tensor in halves.items()}, FILE)
    return FILE.stat().st_size


# %%
print("base                     in memory      in a file")
for label, model in {
    f"as loaded, {machine.dtype}": base,
    "8 bits, groups of 64": packed_model(base, 8, partial(nearest_codes, bits=8)),
    "4 bits, groups of 64": packed_model(base, 4, nearest_codes),
    "2 bits, groups of 64": packed_model(base, 2, partial(nearest_codes, bits=2)),
}.items():
    print(f"{label:22} {memory_bytes(model) / 1e6:8.2f} MB {file_bytes(stored(model)) / 1e6:11.2f} MB")
packed = packed_model(base, 4, nearest_codes)
full_bytes, packed_bytes = file_bytes(stored(base)), file_bytes(stored(packed))
restored = packed_model(base, 4, lambda _, weight: [part * 0 for part in nearest_codes(_, weight)])
restored.load_state_dict(load_file(FILE), strict=False)
with torch.no_grad():
    difference = (restored.to(base.device)(first).logits - packed(first).logits).abs().max().item()
print(f"read back from the file: largest difference of the logits {difference:.1e}")
linear_bytes = sum(layer.weight.numel() * 2 for layer in linears(base).values())
print(
    f"file, 4 against 16 bits: {full_bytes / packed_bytes:.2f} times smaller, since {1 - linear_bytes / full_bytes:.0%}"
)
print("of it are embeddings and norms in 16 bits, and each group of 64 codes brings 3 bytes of its own")
assert difference == 0
lesson.report(
    "file of the base in 16 bits and with 4-bit codes", f"{full_bytes / 1e6:.2f} MB and {packed_bytes / 1e6:.2f} MB"
)

# %% [markdown]
# **Is it faster?** A layer that unpacks its weights and then multiplies does *more* work than before. Codes save time only with a *kernel* that reads the codes and computes with them directly. Generating one token at a time reads every weight once for two operations, so the time is the time of reading (lesson 07), and fewer bytes should mean less time. Measure one layer with 2,048 x 2,048 weights, one token at a time.
#
# On this course's CPU there are real kernels for 8 bits in PyTorch itself. For 4 bits there is none that the course installs: `bitsandbytes` unpacks and multiplies as you do, and so do you. On a GPU it is the other way round for `bitsandbytes`: its 4-bit kernel is real.

# %%
import warnings


def milliseconds(call, repeats: int = 40) -> list[float]:
    """Lower quartile, median and upper quartile of the time of a call."""
    times = []
    for _ in range(repeats + 5):
        started = time.perf_counter()
        call()
        if machine.device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return np.quantile(times[5:], [0.25, 0.5, 0.75]).tolist()


def int8_kernel(model, names):
    """The model with PyTorch's 8-bit linear kernel for the CPU: inputs are quantised as they come."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will move to torchao
        return quantize_dynamic(model, dict.fromkeys(names, per_channel_dynamic_qconfig), dtype=torch.qint8)


# %%
wide = nn.Linear(2048, 2048, bias=False).to(base.device)
layer_4bit = bnb.nn.Linear4bit(2048, 2048, bias=False, quant_type="nf4", compute_dtype=getattr(torch, machine.dtype))
layer_4bit.load_state_dict(wide.state_dict())
layer_4bit = layer_4bit.to(base.device)
nf4_bytes = sum(t.untyped_storage().nbytes() for t in (layer_4bit.weight, layer_4bit.weight.quant_state.absmax))
half = torch.bfloat16 if machine.dtype != "float16" else torch.float16
half_layer = copy.deepcopy(wide).to(half)
ours = PackedLinear(wide, 4, *nearest_codes(None, wide.weight.data)).to(base.device)
layers_to_time = {
    "32 bits": (wide, torch.float32, wide.weight.untyped_storage().nbytes()),
    "16 bits": (half_layer, half, half_layer.weight.untyped_storage().nbytes()),
    "4 bits, unpacked in PyTorch": (ours, half, memory_bytes(ours)),
    "NF4, bitsandbytes": (layer_4bit, getattr(torch, machine.dtype), nf4_bytes),
}
if machine.device == "cpu":
    layer_8bit = int8_kernel(nn.Sequential(wide), ["0"])
    layers_to_time["8 bits, kernel of torch"] = (
        layer_8bit,
        torch.float32,
        layer_8bit[0].weight().untyped_storage().nbytes(),
    )

# %%
timings = {}
with torch.no_grad():
    for label, (layer, dtype, size) in layers_to_time.items():
        x = torch.randn(1, 2048, device=base.device, dtype=dtype)
        timings[label] = milliseconds(partial(layer, x))
        low, middle, high = timings[label]
        print(f"{label:28} {size / 1e6:6.2f} MB {middle:8.3f} ms ({low:.3f} to {high:.3f})")
if machine.device == "cpu":
    speedup = timings["32 bits"][1] / timings["8 bits, kernel of torch"][1]
    print(
        f"the 8-bit kernel is {speedup:.1f} times as fast as 32 bits; unpacking 4 bits in PyTorch is slower than both"
    )
    lesson.claim("with a kernel, a quarter of the bytes takes less time", speedup, at_least=1.2, form=".2f")
    lesson.claim(
        "without one, an eighth of the bytes takes more",
        timings["4 bits, unpacked in PyTorch"][1] / timings["32 bits"][1],
        at_least=1,
        form=".2f",
    )
    lesson.report("8-bit kernel against 32 bits, one layer of 2,048 x 2,048", f"{speedup:.1f} times as fast")


# %% [markdown]
# ## 6 · GPTQ: let the other weights make up for it
#
# **Question.** Rounding to nearest looks at one weight at a time. But a layer should give the same *outputs* on the inputs that occur. Can the error of one weight be made up for by the others?
#
# For one row $w$ of $W$ the error of the outputs is $\|(\hat w - w) X\|^2 = (\hat w - w) H (\hat w - w)^\top$ with $H = XX^\top$. Fix weight $i$ at its code and ask which change of the weights that are still free is best. Minimising the quadratic form (optimal brain surgeon, Hassibi & Stork 1993) gives
#
# $$\delta = -\frac{w_i - \hat w_i}{[H^{-1}]_{ii}}\, [H^{-1}]_{i,:}$$
#
# Then column $i$ leaves the problem, and $H^{-1}$ must be taken over the columns that remain: one step of Gaussian elimination. All rows of $W$ share $H$, so all rows can go through the columns in the same order.
#
# **The Cholesky form** (Frantar et al. 2023): the rows of $H^{-1}$ that the eliminations will produce are, up to scale, the rows of the upper Cholesky factor $U$ with $H^{-1} = U^\top U$. One factorisation replaces all eliminations, and it is far more stable: $\delta = -\frac{w_i - \hat w_i}{U_{ii}}\, U_{i, i:}$. A *damping* of 1 % of the mean diagonal is added to $H$ first.

# %%
def gptq(
    weight: Tensor, moments: Tensor, bits: int, group: int, damping: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), scales and zero points (out, groups) of a weight; moments = X X^T (in, in)."""
    weight, columns = weight.clone(), weight.shape[1]
    h = moments.double() + damping * moments.diagonal().mean() * torch.eye(columns, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True).float()  # (in, in), inverse = upper^T upper
    codes, scales, zeros = [], [], []
    for i in range(columns):
        if i % group == 0:  # the grid of a group comes from its weights as they are by now
            _, scale, zero = zero_point(weight[:, i : i + group], bits)
            scales.append(scale)
            zeros.append(zero)
        column = weight[:, i : i + 1]  # (out, 1)
        codes.append((column / scale + zero).round().clamp(0, 2**bits - 1))
        error = (column - (codes[-1] - zero) * scale) / upper[i, i]
        weight[:, i + 1 :] -= error * upper[i, i + 1 :]
    return torch.cat(codes, 1).to(torch.uint8), torch.cat(scales, 1), torch.cat(zeros, 1)


def from_codes(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Weight (out, in) of codes (out, in) and their grids (out, groups)."""
    grouped = codes.float().view(*scales.shape, -1)  # (out, groups, size)
    return ((grouped - zeros[..., None]) * scales[..., None]).view(codes.shape)


# %% [markdown]
# **Is the Cholesky form right?** Write the slow one, exactly as derived: after each column, the inverse of what remains of $H$ is computed afresh. On a small layer both must give the same codes. (No library for GPTQ is part of the course; its formulas are checked against their own definition.)

# %%
def optimal_brain_quantiser(weight: Tensor, moments: Tensor, bits: int, damping=0.01) -> Tensor:
    """The same by definition: a new inverse for each column, in float64. One scale a channel."""
    weight = weight.double().clone()
    _, scale, zero = zero_point(weight, bits)
    h = moments.double() + damping * moments.diagonal().mean().double() * torch.eye(len(moments), device=weight.device)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(h[i:, i:])  # columns before i are fixed
        column = weight[:, i : i + 1]
        fixed = ((column / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        weight[:, i:] -= (column - fixed) / inverse[0, 0] * inverse[0]
        weight[:, i : i + 1] = fixed
    return weight


generator = torch.Generator().manual_seed(seed)
small, x = torch.randn(32, 48, generator=generator), torch.randn(400, 48, generator=generator).cumsum(1)
moments = x.T @ x
fast, slow = from_codes(*gptq(small, moments, 3, group=48)), optimal_brain_quantiser(small, moments, 3)
nearest = rounded(small, 3, "channel")
print(f"largest difference of the two forms: {(fast - slow).abs().max():.1e}")
for label, candidate in (("round to nearest", nearest), ("GPTQ", fast)):
    print(f"{label:17} error of the weights {(candidate - small).norm() / small.norm():.2f}, ", end="")
    print(f"of the outputs {((candidate - small) @ x.T).norm() / (small @ x.T).norm():.3f}")
assert (fast - slow).abs().max() < 1e-4
lesson.report("GPTQ, Cholesky form against the direct form", f"{(fast - slow).abs().max():.0e}")


# %% [markdown]
# GPTQ moves weights **further** from where they were, and the outputs come closer.
#
# **AWQ** (Lin et al. 2024) uses the same statistics in another way. Some columns of $x$ are large, and errors in their weights cost more. Multiply these weights by $s_j > 1$ before rounding and divide $x_j$ by the same $s_j$: they get a finer grid, relative to their size. With $s_j = (\text{mean } |x_j|)^{\alpha}$ there is one number to find, and a grid search over $\alpha$ does it: the one with the smallest error of the outputs. As with SmoothQuant the division can be folded into whatever comes before the layer; here the scaled and rounded weight is divided again at once, which computes the same function.

# %%
def output_error(change: Tensor, moments: Tensor) -> float:
    """Squared error of a layer's outputs, over the calibration tokens, if its weights change by `change` (out, in)."""
    return ((change @ moments) * change).sum().item()


def awq(weight: Tensor, seen: dict[str, Tensor], bits: int, group: int) -> Tensor:
    """Round to nearest after scaling the columns; seen = statistics of the layer's inputs."""
    size = seen["inputs"].abs().mean(0).clamp(min=1e-4)  # (in,)
    candidates = []
    for alpha in torch.linspace(0, 1, 11).tolist():
        scales = size**alpha / (size.max() * size.min()) ** (alpha / 2)
        candidate = rounded(weight * scales, bits, group) / scales
        candidates.append((output_error(candidate - weight, seen["moments"]), candidate))
    return min(candidates, key=lambda pair: pair[0])[1]


def weight_method(kind: str, statistics: dict, bits: int, group: int = 0):
    """`method` for `compressed`; group 0 is one grid a channel."""

    def method(name: str, weight: Tensor) -> Tensor:
        size = group or weight.shape[1]
        if kind == "gptq":
            return from_codes(*gptq(weight, statistics[name]["moments"], bits, size))
        return awq(weight, statistics[name], bits, size) if kind == "awq" else rounded(weight, bits, size)

    return method


# %%
def mean_output_error(model, smaller, statistics) -> float:
    """Relative error of the outputs of a linear layer, mean over the layers."""
    found = []
    for name, layer in linears(model).items():
        weight, moments = layer.weight.detach().float(), statistics[name]["moments"]
        change = linears(smaller)[name].weight.detach().float() - weight
        found.append(math.sqrt(output_error(change, moments) / output_error(weight, moments)))
    return float(np.mean(found))


outcomes, errors, away = {}, {}, {}
KINDS = {"nearest": "round to nearest", "awq": "AWQ", "gptq": "GPTQ"}
print("base, one grid a channel: error of the outputs, divergence from 16 bits in nats, perplexity")
print(" " * 18 + "".join(f"{bits} bits".rjust(28) for bits in (4, 3, 2)))
for kind, label in KINDS.items():
    for bits in (4, 3, 2):
        smaller = compressed(base, weight_method(kind, statistics, bits))
        outcomes[kind, bits], errors[kind, bits] = text_losses(smaller), mean_output_error(base, smaller, statistics)
        away[kind, bits] = divergence(smaller, base)
    cells = [(errors[kind, b], mean_loss(away[kind, b]), math.exp(mean_loss(outcomes[kind, b]))) for b in (4, 3, 2)]
    print(f"{label:18}" + "".join(f"{cell[0]:.1%} {cell[1]:9.5f} {cell[2]:7.3f}".rjust(28) for cell in cells))
for bits in (4, 3):
    change, low, high = gain(away["nearest", bits], away["gptq", bits])
    print(f"{bits} bits: GPTQ lowers the divergence by {change:.5f} nats ({low:.5f} to {high:.5f})")
    better = errors["gptq", bits] < 0.8 * errors["nearest", bits]
    lesson.claim(
        f"GPTQ beats round to nearest at {bits} bits, in its outputs",
        errors["gptq", bits] / errors["nearest", bits],
        at_most=0.8,
        form=".2f",
    )
    lesson.claim(
        f"GPTQ beats round to nearest at {bits} bits, in the divergence (low end of the interval)",
        low,
        at_least=0,
        form=".5f",
    )
    share = mean_loss(away["gptq", bits]) / mean_loss(away["nearest", bits])
    lesson.report(f"GPTQ against round to nearest, {bits} bits: divergence", f"{share:.0%} of it")

# %%
print("4 bits, one grid a channel, on the base with planted outliers (section 3)")
for kind, label in KINDS.items():
    smaller = compressed(planted, weight_method(kind, planted_statistics, 4))
    away[kind, "planted"] = divergence(smaller, planted)
    error = mean_output_error(planted, smaller, planted_statistics)
    print(f"{label:18} error of the outputs {error:6.1%}, divergence {mean_loss(away[kind, 'planted']):.5f} nats")
for case, label in ((4, "as it is"), ("planted", "outliers planted")):
    change, low, high = gain(away["nearest", case], away["awq", case])
    print(f"{label}: AWQ lowers the divergence by {change:.5f} nats ({low:.5f} to {high:.5f}) against round to nearest")
    lesson.report(
        f"AWQ against round to nearest, 4 bits, {label}: divergence lower by",
        f"{change:.4f} nats ({low:.4f} to {high:.4f})",
    )
lesson.claim("where columns of x stand out, AWQ beats rounding (low end of the interval)", low, at_least=0, form=".5f")

# %% [markdown]
# GPTQ halves the error of the outputs, and the divergence with it. The perplexity hardly shows that at 4 and 3 bits, since so little is lost in the first place: this is why the claims are about the divergence. On shima-4m as it is, AWQ moves the divergence only a little, up or down: no column stands out, and its scaling also widens the range of the rows. With planted outliers it gains clearly.
#
# ## 7 · The other memory: keys and values
#
# **Question.** While a model writes, each token leaves a key and a value in each layer. With long contexts and many users this cache is larger than the weights (lesson 07). Can it be quantised too, although it is only known while it grows?
#
# For each token and head there is a vector of 64 numbers: one scale and one smallest value each, and a code per number. **KIVI** (Liu et al. 2024) makes one change: keys have channels that are large for all tokens, so keys are grouped *along the tokens*, a scale for each channel of 32 tokens, while values stay grouped by token. The newest tokens wait in full precision until 32 are together.

# %%
from transformers.cache_utils import DynamicLayer


def encode(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes of x (batch, heads, 32, head_dim) with one smallest value and scale along `dim`."""
    low = x.amin(dim, keepdim=True).half()
    scale = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-6).half()
    codes = ((x - low) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return pack_bits(codes, bits), low, scale


class QuantisedCacheLayer(DynamicLayer):
    """Keys and values of a layer: groups of 32 tokens as packed codes, the newest tokens as they are."""

    def __init__(self, bits: int, keys_by_channel: bool):
        super().__init__()
        self.bits, self.dims, self.groups = bits, (-2 if keys_by_channel else -1, -1), []

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        super().update(key_states, value_states)  # self.keys and self.values hold the newest tokens only
        while self.keys.shape[-2] >= 32:
            oldest = (self.keys[..., :32, :], self.values[..., :32, :])
            self.groups.append([encode(x, self.bits, dim) for x, dim in zip(oldest, self.dims, strict=True)])
            self.keys, self.values = self.keys[..., 32:, :].clone(), self.values[..., 32:, :].clone()
        whole = [[], []]  # keys, values
        for group in self.groups:
            for (packed, low, scale), parts in zip(group, whole, strict=True):
                shape = (*self.keys.shape[:2], 32, self.keys.shape[-1])
                codes = unpack_bits(packed, self.bits).view(shape)
                parts.append((codes * scale.float() + low.float()).to(self.keys.dtype))
        return torch.cat([*whole[0], self.keys], -2), torch.cat([*whole[1], self.values], -2)

    def get_seq_length(self) -> int:
        return 32 * len(self.groups) + super().get_seq_length()


# %%
def new_cache(bits: int, keys_by_channel: bool) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [QuantisedCacheLayer(bits, keys_by_channel) for _ in range(layers)]
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all tensors that a cache keeps."""
    kept = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    kept += [t for layer in cache.layers for group in getattr(layer, "groups", []) for part in group for t in part]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


with torch.no_grad():
    plain = base(first, use_cache=True).past_key_values
    print(f"cache of {tuple(first.shape)} tokens, {machine.dtype}: {cache_bytes(plain) / 1e6:.2f} MB")
    kv_losses, kv_sizes = {}, {}
    for bits, by_channel in ((8, False), (4, False), (4, True), (2, False), (2, True)):
        make = partial(new_cache, bits, by_channel)
        kv_sizes[bits, by_channel] = cache_bytes(base(first, past_key_values=make()).past_key_values)
        kv_losses[bits, by_channel] = losses(base, text_batches, make)
        change, low, high = gain(kv_losses[bits, by_channel], full_text)
        label = f"{bits} bits, keys by {'channel' if by_channel else 'token'}"
        size = kv_sizes[bits, by_channel] / 1e6
        print(f"{label:24} {size:6.2f} MB, loss {change:+.4f} nats ({low:+.4f} to {high:+.4f})")
    step_by_step = new_cache(4, True)
    for token in first[:1].T:  # the same cache, one token at a time
        last = base(token[None], past_key_values=step_by_step).logits[0, -1]
    whole = base(first[:1], past_key_values=new_cache(4, True)).logits[0, -1]
print(f"token by token, the last logits differ from those in one go by {(last - whole).abs().max():.3f}: a token then")
print("sees the newest ones unquantised")
change, low, high = gain(kv_losses[2, False], kv_losses[2, True])
print(f"2 bits: keys by channel lower the loss by {change:.4f} nats ({low:.4f} to {high:.4f})")
lesson.claim("at 2 bits keys want their scales by channel (low end of the interval)", low, at_least=0, form=".4f")
share, change = kv_sizes[4, True] / cache_bytes(plain), gain(kv_losses[4, True], full_text)[0]
lesson.report("cache with 4 bits: size, loss", f"{share:.0%} of {machine.dtype}, {change:+.4f} nats")


# %% [markdown]
# ## 8 · Zeros: magnitude, Wanda, SparseGPT
#
# **Question.** Instead of fewer bits a weight, fewer weights: which half of them can go?
#
# - **Magnitude**: the smallest $|w|$ of a layer go.
# - **Wanda** (Sun et al. 2024): a small weight on a large input matters more than a large weight on a small one. The score is $|w_{ij}| \cdot \|X_j\|_2$, and each output (row) loses the same share. $\|X_j\|_2^2$ is the diagonal of $H$. No weight changes.
# - **SparseGPT** (Frantar & Alistarh 2023): GPTQ with the codes replaced by zero. The score is $w_{ij}^2 / [H^{-1}]_{jj}$, what optimal brain surgeon says it costs, and the weights that stay make up for those that go.
#
# *Unstructured* means anywhere. **2:4** means two zeros in every four neighbours, which the matrix units of NVIDIA's GPUs from Ampere on can skip. It costs quality, since the choice is less free.

# %%
def keep_largest(scores: Tensor, pattern: str) -> Tensor:
    """Mask (out, in) of the half that stays: of the whole "layer", of each "row", or two of four neighbours "2:4"."""
    groups = scores.reshape({"layer": (1, -1), "row": scores.shape, "2:4": (-1, 4)}[pattern])
    best = groups.topk(groups.shape[-1] // 2, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, best, True).view_as(scores)


def magnitude(weight: Tensor, moments: Tensor, pattern: str | None = None) -> Tensor:
    return weight * keep_largest(weight.abs(), pattern or "layer")


def wanda(weight: Tensor, moments: Tensor, pattern: str | None = None) -> Tensor:
    return weight * keep_largest(weight.abs() * moments.diagonal().sqrt(), pattern or "row")


def sparse_gpt(weight: Tensor, moments: Tensor, pattern: str | None = None, damping: float = 0.01) -> Tensor:
    """Columns from left to right; which weights go is decided for 64 columns at a time."""
    weight, columns = weight.clone(), weight.shape[1]
    h = moments.double() + damping * moments.diagonal().mean() * torch.eye(columns, device=weight.device)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    for i in range(columns):
        if i % 64 == 0:
            here = slice(i, i + 64)
            keep = keep_largest(weight[:, here] ** 2 / upper.diagonal()[here] ** 2, pattern or "layer")
        fixed = weight[:, i : i + 1] * keep[:, i % 64, None]
        error = (weight[:, i : i + 1] - fixed) / upper[i, i]
        weight[:, i + 1 :] -= error * upper[i, i + 1 :]
        weight[:, i : i + 1] = fixed
    return weight


# %%
def with_pruner(prune, found: dict, pattern: str | None):
    """`method` for `compressed`, with the statistics of the layers' inputs."""
    return lambda name, weight: prune(weight, found[name]["moments"], pattern)


PRUNERS = {"magnitude": magnitude, "Wanda": wanda, "SparseGPT": sparse_gpt}
pruned = {}
pruned_away = {}
print("base, half of the weights zero: divergence from the full model in nats, perplexity")
print(" " * 14 + "anywhere".rjust(24) + "2:4".rjust(24))
for label, prune in PRUNERS.items():
    for pattern in (None, "2:4"):
        smaller = compressed(base, with_pruner(prune, statistics, pattern))
        pruned[label, pattern], pruned_away[label, pattern] = text_losses(smaller), divergence(smaller, base)
        zeros = np.mean([(layer.weight == 0).float().mean().item() for layer in linears(smaller).values()])
        assert abs(zeros - 0.5) < 0.01
    cells = [(mean_loss(pruned_away[label, p]), math.exp(mean_loss(pruned[label, p]))) for p in (None, "2:4")]
    print(f"{label:14}" + "".join(f"{cell[0]:.4f} {cell[1]:8.3f}".rjust(24) for cell in cells))
for pattern, place in ((None, "anywhere"), ("2:4", "2:4")):
    for worse, better in (("magnitude", "Wanda"), ("Wanda", "SparseGPT")):
        change, low, high = gain(pruned_away[worse, pattern], pruned_away[better, pattern])
        print(f"{better} against {worse} at 50 %, {place}: divergence lower by {change:.4f} ({low:.4f} to {high:.4f})")
        lesson.claim(f"{better} beats {worse} at 50 %, {place} (low end of the interval)", low, at_least=0, form=".4f")
        name = f"{better} against {worse} at 50 %, {place}: divergence lower by"
        lesson.report(name, f"{change:.4f} nats ({low:.4f} to {high:.4f})")


# %% [markdown]
# **Zeros do not save a byte by themselves.** A dense tensor stores them like any other number. 2:4 is stored as the two values of each four, and their two places in 2 bits each. Write it, read it back, and look at the size. There is no 2:4 kernel for the CPU. On GPUs from Ampere on `torch.sparse.to_sparse_semi_structured` has one.

# %%
def pack_2_4(weight: Tensor) -> dict[str, Tensor]:
    """A 2:4 weight (out, in) as its values (out * in / 2,) and the places of two of them a nibble."""
    groups = weight.reshape(-1, 4)
    places = (groups != 0).int().topk(2, dim=-1).indices.sort(-1).values  # (groups, 2); zeros fill what is missing
    return {"values": groups.gather(1, places).flatten(), "places": pack_bits(places.to(torch.uint8), 2)}


def unpack_2_4(values: Tensor, places: Tensor, shape: tuple) -> Tensor:
    places = unpack_bits(places, 2).view(-1, 2).long()
    return (
        torch.zeros(len(places), 4, dtype=values.dtype, device=values.device)
        .scatter(1, places, values.view(-1, 2))
        .view(shape)
    )


sparse_base = compressed(
    base, lambda name, weight: sparse_gpt(weight, statistics[name]["moments"], "2:4").bfloat16().float()
)


def sparse_tensors(model) -> dict[str, Tensor]:
    """All tensors of a 2:4 model, its linear layers in the packed form."""
    found = {name: t for name, t in stored(model).items() if name.removesuffix(".weight") not in linears(model)}
    for name, layer in linears(model).items():
        found |= {f"{name}.{part}": tensor for part, tensor in pack_2_4(layer.weight.data).items()}
        found |= {f"{name}.bias": layer.bias.data} if layer.bias is not None else {}
    return found


# %%
same = all(
    torch.equal(unpack_2_4(**pack_2_4(layer.weight.data), shape=layer.weight.shape), layer.weight.data)
    for layer in linears(sparse_base).values()
)
dense_bytes, sparse_bytes = file_bytes(stored(sparse_base)), file_bytes(sparse_tensors(sparse_base))
print(f"file of the 2:4 base: dense {dense_bytes / 1e6:.2f} MB, packed {sparse_bytes / 1e6:.2f} MB")
print(f"unpacked weights equal those before: {same}")
assert same
lesson.report(
    "file of the base with half of the weights zero: dense, packed 2:4",
    f"{dense_bytes / 1e6:.2f} MB, {sparse_bytes / 1e6:.2f} MB",
)


# %% [markdown]
# ## 9 · Cut out whole parts
#
# **Question.** Sparse matrices need special kernels. What if whole heads, neurons or layers go, so that what remains is an ordinary, smaller model, faster on any machine?
#
# - **Heads**: a head's worth is the energy it sends through the output matrix, $\sum_{j \in \text{head}} \|X_j\|^2 \|W^o_{:,j}\|^2$. (Where query heads share keys and values, the whole group goes.)
# - **Neurons** of the feed-forward part: the same with the matrix that reads them, one column each.
# - **Layers**: a layer that hardly changes the direction of its input can go. Its *influence* is $1 - \cos(x_\text{in}, x_\text{out})$, averaged over tokens (Men et al. 2024).
#
# Such cuts hurt much more, so a short *recovery* follows: a few steps of training on text.

# %%
def cut_linear(layer: nn.Linear, outs: Tensor | None = None, ins: Tensor | None = None) -> nn.Linear:
    """A smaller linear layer: rows `outs` and columns `ins` of the weight."""
    weight = layer.weight.data if outs is None else layer.weight.data[outs]
    weight = weight if ins is None else weight[:, ins]
    smaller = nn.Linear(
        weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype, device=weight.device
    )
    smaller.weight.data = weight.clone()
    if layer.bias is not None:
        smaller.bias.data = layer.bias.data.clone() if outs is None else layer.bias.data[outs].clone()
    return smaller


def energies(statistics: dict, name: str, layer: nn.Linear) -> Tensor:
    """Energy that each input column of a layer sends to its outputs (in,)."""
    return statistics[name]["moments"].diagonal() * layer.weight.detach().float().square().sum(0)


def without_neurons(model, statistics: dict, share: float):
    """Copy with that share of the feed-forward neurons removed from each layer."""
    copied = copy.deepcopy(model)
    for index, block in enumerate(copied.model.layers):
        energy = energies(statistics, f"model.layers.{index}.mlp.down_proj", block.mlp.down_proj)
        keep = energy.topk(round(len(energy) * (1 - share))).indices.sort().values
        block.mlp.gate_proj, block.mlp.up_proj = (
            cut_linear(part, outs=keep) for part in (block.mlp.gate_proj, block.mlp.up_proj)
        )
        block.mlp.down_proj = cut_linear(block.mlp.down_proj, ins=keep)
    return copied


# %%
def without_heads(model, statistics: dict, groups_to_cut: int):
    """Copy with that many key-value heads, and the query heads that share them, removed from each layer."""
    copied = copy.deepcopy(model)
    num_groups, head_dim = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    for index, block in enumerate(copied.model.layers):
        part = block.self_attn
        energy = energies(statistics, f"model.layers.{index}.self_attn.o_proj", part.o_proj).view(num_groups, -1).sum(1)
        keep = energy.topk(num_groups - groups_to_cut).indices.sort().values
        queries = torch.arange(part.q_proj.out_features, device=keep.device).view(num_groups, -1)[keep].flatten()
        shared = torch.arange(num_groups * head_dim, device=keep.device).view(num_groups, -1)[keep].flatten()
        part.q_proj, part.o_proj = cut_linear(part.q_proj, outs=queries), cut_linear(part.o_proj, ins=queries)
        part.k_proj, part.v_proj = (cut_linear(layer, outs=shared) for layer in (part.k_proj, part.v_proj))
    return copied


def with_layers(model, keep: list[int]):
    """Copy of the model that has only these layers."""
    copied = copy.deepcopy(model)
    copied.model.layers = nn.ModuleList([copied.model.layers[index] for index in keep])
    for index, block in enumerate(copied.model.layers):
        block.self_attn.layer_idx = index  # its place in the cache
    copied.config.num_hidden_layers = len(keep)
    if getattr(copied.config, "layer_types", None):
        copied.config.layer_types = [copied.config.layer_types[index] for index in keep]
    return copied


@torch.no_grad()
def influence(model, batches) -> list[float]:
    """1 - cosine between the input and the output of each layer, mean over the tokens."""
    states = [
        model(input_ids=b["input_ids"].to(model.device), output_hidden_states=True).hidden_states for b in batches
    ]
    return [
        np.mean([1 - F.cosine_similarity(s[i], s[i + 1], dim=-1).mean().item() for s in states]) for i in range(layers)
    ]


print("influence of the layers:", [round(float(value), 2) for value in influence(base, calibration[:1])])


# %%
def text_stream(rows_to_read: Tensor, batch_size: int, length: int = 64):
    """Endless batches of rows of `length` tokens, in a new order each time."""
    pieces, generator = rows_to_read.reshape(-1, length), torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(pieces), generator=generator).split(batch_size):
            yield {"input_ids": pieces[part]}


def recover(model, batches, steps: int, loss_fn=None, rate: float = settings["recovery"]):
    """Train all weights for a few steps and return the model, ready to be measured."""
    shape = {
        "precision": PRECISIONS[machine.dtype],
        "warmup_steps": 3,
        "schedule": "linear",
        "weight_decay": 0.0,
        "progress": False,
        "seed": seed,
    }
    config = TrainConfig(lesson.scaled(steps), learning_rate=rate, **shape)
    train(model.float(), batches, config, loss_fn=loss_fn)
    return model.to(getattr(torch, machine.dtype)).eval()


by_influence = np.argsort(influence(base, calibration[:1]))
cuts = {
    "half of the neurons": without_neurons(base, statistics, 0.5),
    "half of the heads": without_heads(base, statistics, max(1, base.config.num_key_value_heads // 2)),
    "the layer of least influence": with_layers(base, sorted(by_influence[1:])),
}
print(f"{'base without'.ljust(30)}{'parameters':>12}{'perplexity':>12}{'after recovery':>16}")
recovered = {}
for label, smaller in cuts.items():
    before = text_losses(smaller.eval())
    recovered[label] = text_losses(recover(smaller, text_stream(text_train, 16), 20))
    numbers = sum(p.numel() for p in smaller.parameters())
    print(f"{label:30}{numbers:12,}{math.exp(mean_loss(before)):12.2f}{math.exp(mean_loss(recovered[label])):16.2f}")
    change, low, high = gain(before, recovered[label])
    print(f"without {label}, recovery lowers the loss by {change:.2f} nats ({low:.2f} to {high:.2f})")
    lesson.claim(f"without {label}, recovery lowers the loss (low end of the interval)", low, at_least=0, form=".2f")

# %% [markdown]
# Half of the neurons go more easily than half of the heads or a whole layer, and a few steps bring back a good part of what was lost. What is left is an ordinary model, smaller in memory and faster with any kernel.
#
# ## 10 · Distillation: a small model learns from a large one
#
# **Question.** A student with half of the layers starts from its teacher's own first and last layers. What should it learn from: the text, or the teacher?
#
# | signal | loss for each token |
# |---|---|
# | text, no teacher | $-\log q(x_{t+1})$ |
# | hard labels | $-\log q(\arg\max p)$ |
# | logits (Hinton et al. 2015) | $T^2\, \mathrm{KL}(p_T \,\|\, q_T)$, with $p_T \propto p^{1/T}$ |
# | logits and hidden states | the same at $T = 1$, and the mean squared error of each layer's output, relative to its size |
#
# The factor $T^2$ keeps the gradient at the same size for all $T$. A text names one next token. A teacher gives a number for each of the tokens that could have come, so each position teaches more.

# %%
student_layers = np.linspace(0, layers - 1, max(1, layers // 2)).round().astype(int).tolist()


def logits_loss(student, batch, temperature: float = 1.0) -> Tensor:
    with torch.no_grad():
        p = base(**batch).logits
    q = student(**batch).logits  # (batch, seq, vocab)
    logs = [(x.float() / temperature).log_softmax(-1).flatten(0, 1) for x in (q, p)]
    return temperature**2 * F.kl_div(*logs, log_target=True, reduction="batchmean")


def hard_loss(student, batch) -> Tensor:
    with torch.no_grad():
        labels = base(**batch).logits.argmax(-1)  # (batch, seq)
    return F.cross_entropy(student(**batch).logits.flatten(0, 1).float(), labels.flatten())


def hidden_loss(student, batch) -> Tensor:
    with torch.no_grad():
        taught = base(**batch, output_hidden_states=True)
    own = student(**batch, output_hidden_states=True)
    logs = [output.logits.float().log_softmax(-1).flatten(0, 1) for output in (own, taught)]
    loss = F.kl_div(*logs, log_target=True, reduction="batchmean")
    for place, source in enumerate(student_layers, start=1):  # the output of a student's layer, and of its origin
        target = taught.hidden_states[source + 1].float()
        loss = loss + F.mse_loss(own.hidden_states[place].float(), target) / target.square().mean()
    return loss


# %%
SIGNALS = {
    "text, no teacher": None,
    "hard labels": hard_loss,
    "logits, T = 1": logits_loss,
    "logits, T = 2": partial(logits_loss, temperature=2.0),
    "logits and hidden states": hidden_loss,
}
STEPS = 50
students, student_losses = {}, {}


@torch.no_grad()
def agreement(student) -> float:
    """Share of the positions of the measured text where student and teacher hold the same token for the best."""
    best = [model(text_test.to(model.device)).logits.argmax(-1) for model in (base, student)]
    return (best[0] == best[1]).float().mean().item()


for label, loss_fn in SIGNALS.items():
    student = with_layers(base, student_layers)
    students[label] = recover(student, text_stream(text_train, 16), STEPS, loss_fn, settings["student"])
    student_losses[label] = text_losses(student)
number = sum(p.numel() for p in student.parameters())
print(f"students of {len(student_layers)} layers, {number:,} parameters, {lesson.scaled(STEPS)} steps each")
alone = student_losses["text, no teacher"]
for label, table_of_losses in student_losses.items():
    change, low, high = gain(alone, table_of_losses)
    perplexity_now = math.exp(mean_loss(table_of_losses))
    agrees = agreement(students[label])
    print(
        f"{label:25} perplexity {perplexity_now:.3f}, loss lower by {change:+.3f} ({low:+.3f} to {high:+.3f})", end=""
    )
    print(f", best token as the teacher's {agrees:.1%}")

# %%
for label in ("logits, T = 1", "logits and hidden states"):
    change, low, high = gain(alone, student_losses[label])
    lesson.claim(
        f"a student that learns from {label} beats the same student without a teacher (low end of the interval)",
        low,
        at_least=0,
        form=".3f",
    )
    lesson.report(
        f"student from {label}, against no teacher: loss lower by", f"{change:.3f} nats ({low:.3f} to {high:.3f})"
    )


# %% [markdown]
# Logits beat the text alone, and hidden states add to that. The hard labels lose in perplexity: they say "certain" wherever the teacher was not, and the student believes it. Look at the last column before you call them useless: their student names the teacher's best token most often, and for greedy drafts (section 11) that is what counts. $T = 2$ spends its effort on the unlikely tokens, which 50 steps do not pay back.
#
# **On-policy distillation** (Agarwal et al. 2024). All students above have read other people's text. When a student writes on its own, it soon stands where no training text ever stood. So let it write, and let the teacher say at each token of the *student's* text what it would have done. The usual loss is then the reverse divergence $\mathrm{KL}(q \,\|\, p)$: it punishes what the student does and the teacher would not, and does not ask a small student to cover everything.
#
# For a fair comparison, continue the student of the logits for the same number of steps in both ways, and measure both divergences on fresh text that the student wrote.

# %%
@torch.no_grad()
def write(student, prompts: Tensor, new_tokens: int, generator: torch.Generator) -> Tensor:
    """Sample from the student: prompts (batch, seq) -> (batch, seq + new_tokens)."""
    cache, ids = DynamicCache(), prompts.to(student.device)
    part = ids
    for _ in range(new_tokens):
        logits = student(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        part = torch.multinomial(logits.float().softmax(-1).cpu(), 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, part], 1)
    return ids


def on_own_text(student, batch) -> tuple[Tensor, Tensor]:
    """KL(q || p) and KL(p || q) per token of what was written after the first 16 tokens."""
    with torch.no_grad():
        p = base(**batch).logits[:, 15:].float().log_softmax(-1)
    q = student(**batch).logits[:, 15:].float().log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1).mean(), (p.exp() * (p - q)).sum(-1).mean()


def own_text(student, prompts: Tensor, number: int):
    """Endless batches that the student writes as it is at that moment."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = prompts[torch.randperm(len(prompts), generator=generator)[:number]]
        yield {"input_ids": write(student, starts, 32, generator)}


# %%
prompts = text_train.reshape(-1, 64)[:, :16]
fresh_prompts = text_test.reshape(-1, 64)[:, :16]
MORE = 20
continued = {name: copy.deepcopy(students["logits, T = 1"]) for name in ("more text", "its own text")}
rate = settings["student"] / 4
recover(continued["more text"], text_stream(text_train, 16), MORE, logits_loss, rate)
stream = own_text(continued["its own text"], prompts, 16)
recover(continued["its own text"], stream, MORE, lambda student, batch: on_own_text(student, batch)[0], rate)
reverse = {}
for label, student in {"before": students["logits, T = 1"], **continued}.items():
    fresh = write(student, fresh_prompts, 32, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        backwards, forwards = (value.item() for value in on_own_text(student, {"input_ids": fresh}))
    reverse[label] = backwards
    perplexity_now = math.exp(mean_loss(text_losses(student)))
    print(f"{label:14} on its own text: KL(q || p) {backwards:.3f}, KL(p || q) {forwards:.3f}", end="")
    print(f"; perplexity on text {perplexity_now:.3f}")
lesson.claim(
    "on-policy steps bring the student's own text closer to the teacher",
    reverse["before"] - reverse["its own text"],
    at_least=0,
    form=".3f",
)
lesson.report(
    "KL(q ‖ p) on the student's text: before, after text, after its own text",
    ", ".join(f"{value:.3f}" for value in reverse.values()),
)


# %% [markdown]
# On-policy steps do what they promise, on the student's own text and in the reverse divergence. The price stands beside it: the student is more certain than before, so its perplexity on other people's text is higher. Choose the signal by what the student will be used for.
#
# ## 11 · Speculative decoding: the student drafts, the teacher decides
#
# **Question.** The student is faster but worse. Can it save time without costing quality?
#
# One pass of the teacher over $k + 1$ tokens takes hardly longer than over one, since its time goes into reading the weights. So let the student draft $k$ tokens, and let the teacher read them all at once (Leviathan et al. 2023, Chen et al. 2023). For a drafted token $x$, with $q$ the student's distribution at that place and $p$ the teacher's:
#
# 1. keep $x$ with probability $\min(1, p(x)/q(x))$;
# 2. if it is not kept, draw the token from the *rest*, $\propto \max(0, p - q)$, and forget the drafts after it;
# 3. if all $k$ are kept, draw one more from $p$, for free.
#
# Then the token is distributed as $p$, **exactly**. It is $v$ in two ways: drafted and kept, $q(v)\min(1, p(v)/q(v)) = \min(q(v), p(v))$; or drawn from the rest. Something is refused with probability $1 - \sum_u \min(q(u), p(u)) = \sum_u \max(0, p(u) - q(u))$, which is just the constant that the rest is divided by, so the second way has probability $\max(0, p(v) - q(v))$. The sum is $p(v)$.
#
# If each draft is kept with probability $a$, independently, one pass of the teacher yields on average $1 + a + \dots + a^k = \frac{1 - a^{k+1}}{1 - a}$ tokens.

# %%
def distribution(logits: Tensor, temperature: float) -> Tensor:
    """Next-token distribution (..., vocab) in float64; at temperature 0 all of it on the best token."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).double()
    return (logits.double() / temperature).softmax(-1)


def keep_or_replace(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row: is the drafted token (rows,) kept, and what stands there. p, q (rows, vocab), on the CPU."""
    ratio = p.gather(1, drafted[:, None]) / q.gather(1, drafted[:, None])
    kept = torch.rand(len(drafted), generator=generator, dtype=torch.float64) < ratio[:, 0]
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)  # p = q: everything is kept
    return kept, torch.where(kept, drafted, torch.multinomial(rest, 1, generator=generator)[:, 0])


@torch.no_grad()
def advance(model, cache: DynamicCache, ids: list[int]) -> Tensor:
    """Read the tokens that the cache has not seen; logits (new tokens, vocab), on the CPU."""
    new = torch.tensor([ids[cache.get_seq_length() :]], device=model.device)
    return model(new, past_key_values=cache, use_cache=True).logits[0].cpu()


def forget(cache: DynamicCache, length: int) -> None:
    """Cut a cache back to its first `length` tokens."""
    if (extra := cache.get_seq_length() - length) > 0:
        cache.crop(-extra)


# %%
def speculative(target, draft, prompt: list[int], new_tokens: int, k: int, temperature=0.0, generator=None):
    """Decode `new_tokens` tokens; return them, the passes of the target, the drafts tested and the drafts kept."""
    ids, passes, tested, kept_drafts = list(prompt), 0, 0, 0
    target_cache, draft_cache = DynamicCache(), DynamicCache()
    while len(ids) < len(prompt) + new_tokens:
        drafts, q = [], []
        for _ in range(min(k, len(prompt) + new_tokens - len(ids) - 1)):
            q.append(distribution(advance(draft, draft_cache, ids + drafts)[-1:], temperature))  # (1, vocab)
            drafts.append(torch.multinomial(q[-1], 1, generator=generator).item())
        p = distribution(advance(target, target_cache, ids + drafts)[-len(drafts) - 1 :], temperature)
        passes += 1
        good = 0  # drafts before the first that is refused
        if drafts:
            kept, tokens = keep_or_replace(p[:-1], torch.cat(q), torch.tensor(drafts), generator)
            good = int(kept.int().cumprod(0).sum())
            ids += tokens[: good + 1].tolist()
            tested, kept_drafts = tested + min(good + 1, len(drafts)), kept_drafts + good
        if good == len(drafts):
            ids.append(torch.multinomial(p[-1:], 1, generator=generator).item())
        for cache in (target_cache, draft_cache):
            forget(cache, len(ids) - 1)
    return ids[len(prompt) :], passes, tested, kept_drafts


def plain_decoding(model, prompt: list[int], new_tokens: int, temperature=0.0, generator=None) -> list[int]:
    ids, cache = list(prompt), DynamicCache()
    for _ in range(new_tokens):
        p = distribution(advance(model, cache, ids)[-1:], temperature)
        ids.append(torch.multinomial(p, 1, generator=generator).item())
    return ids[len(prompt) :]


# %% [markdown]
# **Is it exact?** Three tests, from arithmetic to the running program.
#
# 1. *Arithmetic*: for distributions $p$ and $q$ of the real models, add up both ways and compare with $p$.
# 2. *The rule*: draft from $q$ and apply `keep_or_replace` 400 times at each of 100 places, and compare the counts with $p$ by a chi-square test. To see that the test can fail, give it a wrong rule too: one that draws a refused token from $p$ instead of from the rest.
# 3. *The program*: greedily, the text must be identical to that of plain decoding. With sampling, the pairs of the first two tokens of many runs must have the same distribution as from plain decoding.

# %%
from scipy.stats import chi2, chi2_contingency

drafter = students["logits and hidden states"]
with torch.no_grad():
    ids = text_batches[0]["input_ids"].to(base.device)
    places = torch.randperm(ids.numel(), generator=torch.Generator().manual_seed(seed))[:100]
    p, q = (distribution(model(ids).logits.flatten(0, 1)[places].cpu(), 1.0) for model in (base, drafter))
acceptance = torch.minimum(p, q).sum(1, keepdim=True)
rest = (p - q).clamp(min=0)
total = torch.minimum(p, q) + (1 - acceptance) * rest / rest.sum(1, keepdim=True)
print(f"1. both ways add up to p: largest difference {(total - p).abs().max():.1e}")
assert (total - p).abs().max() < 1e-12


# %%
def fit(tokens: Tensor, p: Tensor) -> float:
    """Chance of counts as far from p or farther: the likeliest tokens of each place, the others in one class."""
    statistic = freedom = 0
    for drawn, chances in zip(tokens, p, strict=True):  # drawn (draws,)
        expected = chances * len(drawn)
        top = expected.argsort(descending=True)[: int((expected >= 5).sum())]
        if len(drawn) - expected[top].sum() < 5:
            top = top[:-1]  # the class of the others must not be too rare either
        counts = torch.stack([(drawn == token).sum() for token in top] + [(~torch.isin(drawn, top)).sum()])
        expected = torch.cat([expected[top], len(drawn) - expected[top].sum(0, keepdim=True)])
        statistic += ((counts - expected) ** 2 / expected).sum().item()
        freedom += len(top)
    return float(chi2.sf(statistic, freedom)) if freedom else 1.0


generator, DRAWS = torch.Generator().manual_seed(seed), 400
drafted = torch.multinomial(q, DRAWS, replacement=True, generator=generator)  # (places, draws)
by_rule, by_wrong_rule = torch.empty_like(drafted), torch.empty_like(drafted)
for place, drafts in enumerate(drafted):
    pair = [x[place].expand(DRAWS, -1) for x in (p, q)]
    kept, by_rule[place] = keep_or_replace(*pair, drafts, generator)
    by_wrong_rule[place] = torch.where(kept, drafts, torch.multinomial(p[place], DRAWS, True, generator=generator))
right_fit, wrong_fit = fit(by_rule, p), fit(by_wrong_rule, p)
print(f"2. 40,000 draws: chance of such counts {right_fit:.3f}; with the wrong rule {wrong_fit:.1e}")
lesson.claim("the rule's tokens are distributed as the teacher's", right_fit, at_least=1e-3)
lesson.claim("the test finds a wrong rule", wrong_fit, at_most=1e-3)
lesson.report(
    "speculative sampling: chance of the counts, by the rule and by a wrong one", f"{right_fit:.2f}, {wrong_fit:.0e}"
)

# %%
starts = [row[:24].tolist() for row in text_test[:8]]
same = [plain_decoding(base, start, 32) == speculative(base, drafter, start, 32, k=4)[0] for start in starts]
print(f"3. greedy: {sum(same)} of {len(same)} continuations are identical, token for token")
lesson.equal("greedy speculative decoding gives the text of plain decoding", list(same).count(False))
RUNS = 200
generator = torch.Generator().manual_seed(seed + 5)
first_tokens = [distribution(advance(base, DynamicCache(), start)[-1], 1.0) for start in starts]
unsure = starts[int(np.argmin([p.square().sum().item() for p in first_tokens]))]  # where the teacher is least certain
pairs = [
    [tuple(plain_decoding(base, unsure, 2, 1.0, generator)) for _ in range(RUNS)],
    [tuple(speculative(base, drafter, unsure, 2, 2, 1.0, generator)[0]) for _ in range(RUNS)],
]
frequent = [pair for pair in set(pairs[0] + pairs[1]) if (pairs[0] + pairs[1]).count(pair) >= 10]
counts = np.array([[sample.count(pair) for pair in frequent] for sample in pairs])
counts = np.concatenate([counts, RUNS - counts.sum(1, keepdims=True)], 1)
counts = counts[:, counts.sum(0) > 0]
chance = chi2_contingency(counts).pvalue if counts.shape[1] > 1 else 1.0
print(
    f"   sampling: {RUNS} runs each way, {counts.shape[1]} kinds of pairs: chance of counts as different {chance:.3f}"
)
lesson.claim("with sampling, the first two tokens come as from plain decoding", chance, at_least=0.001)
lesson.report("greedy speculative decoding: identical continuations", f"{sum(same)} of {len(same)}")


# %% [markdown]
# **How much faster?** It depends on how often a draft is kept, and on the price of a draft. Let $c$ be the time of a pass of the draft model divided by that of the teacher. A round costs $kc + 1$ passes, so the expected speed-up is $\frac{1 - a^{k+1}}{(1 - a)(kc + 1)}$. Sampled drafts are kept with $a = \sum_v \min(p_v, q_v)$, the overlap of the two distributions. Try three drafters: the student without a teacher, the one that was distilled, and a copy of the teacher with 4-bit weights, which is nearly always right but not cheaper.

# %%
def timed(function, *arguments) -> tuple[float, object]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


NEW = 32
drafters = {
    "student, no teacher": students["text, no teacher"],
    "student, distilled": drafter,
    "teacher in 4 bits": compressed(base, to_nearest(4, GROUP)),
}
plain_seconds = sum(timed(plain_decoding, base, start, NEW)[0] for start in starts)
print(f"plain: {len(starts) * NEW / plain_seconds:.0f} tokens/s\n")
print("draft model               c   k   kept a   tokens a pass   (1-a^(k+1))/(1-a)   speed-up   expected")
rounds = {}
for label, draft in drafters.items():
    c = sum(timed(plain_decoding, draft, start, NEW)[0] for start in starts) / plain_seconds
    for k in (1, 2, 4, 6) if label == "student, distilled" else (4,):
        runs = [timed(speculative, base, draft, start, NEW, k) for start in starts]
        passes, tested, kept = (sum(run[1][i] for run in runs) for i in (1, 2, 3))
        a, per_pass = kept / tested, len(starts) * NEW / passes
        formula = (1 - a ** (k + 1)) / (1 - a) if a < 1 else k + 1
        speedup = plain_seconds / sum(run[0] for run in runs)
        rounds[label, k] = (a, per_pass, formula, speedup)
        print(f"{label:22} {c:5.2f} {k:3} {a:7.2f} {per_pass:13.2f} {formula:17.2f} {speedup:14.2f}", end="")
        print(f" {formula / (k * c + 1):10.2f}")
distilled = {k: values for (label, k), values in rounds.items() if label == "student, distilled"}

# %%
alt = "Tokens per pass of the teacher over k: measured points lie close to the formula's line, which flattens."
figure = plots.curve(
    {
        "measured": (list(distilled), [values[1] for values in distilled.values()]),
        "formula, with a measured": (list(distilled), [values[2] for values in distilled.values()]),
        "speed-up by the clock": (list(distilled), [values[3] for values in distilled.values()]),
    },
    title="Tokens a pass follow the formula; the clock also counts the drafts",
    xlabel="tokens drafted at a time, k",
    ylabel="tokens per teacher's pass, or times as fast",
    alt=alt,
    references={"plain decoding": 1.0},
)
plots.show(figure, alt)
lesson.claim(
    "the formula predicts the tokens a pass within a quarter",
    max(abs(per_pass / formula - 1) for _, per_pass, formula, _ in distilled.values()),
    at_most=0.25,
    form=".0%",
)


# %%
@torch.no_grad()
def overlap(draft) -> np.ndarray:
    """Mean chance that a sampled draft is kept, for each of 32 texts."""
    pairs = ([distribution(model(row[None]).logits[0], 1.0) for model in (base, draft)] for row in ids)
    return np.array([torch.minimum(*pair).sum(-1).mean().item() for pair in pairs])


overlaps = {label: overlap(drafters[label]) for label in list(drafters)[:2]}
more = overlaps["student, distilled"] - overlaps["student, no teacher"]  # (texts,)
low, high = bootstrap_interval(more, np.mean, seed)
a = overlaps["student, distilled"].mean()
print(
    f"sampled drafts on text: kept with a = {a:.3f}, {more.mean():+.3f} ({low:+.3f} to {high:+.3f}) against no teacher"
)
lesson.claim(
    "the distilled student's drafts are kept more often than the other student's (low end of the interval)",
    low,
    at_least=0,
    form=".3f",
)
best_k = max(distilled, key=lambda k: distilled[k][3])
lesson.report(
    "sampled drafts kept: student without a teacher, distilled",
    ", ".join(f"{overlap.mean():.1%}" for overlap in overlaps.values()),
)
lesson.report(
    "speculative decoding at its best k, by the clock", f"{distilled[best_k][3]:.2f} times as fast at k = {best_k}"
)


# %% [markdown]
# The words are the teacher's, whoever drafts them: a bad student costs time and nothing else. For a model as small as this one a pass takes a few milliseconds whatever it computes, so a student of half the layers is nowhere near twice as cheap, the Python around the passes counts as well, and the clock shows little gain or none. Where the teacher is 20 times the size of the student, $c$ is near 0.05 and the same formula promises two to three times the speed.
#
# ## 12 · Everything in one picture
#
# **Question.** You have bytes to save. Which method gives the most for them?
#
# Seven versions of both models: the base for the perplexity, the assistant for the right answers. The assistant is compressed with statistics of its own, from 64 training chats. Cut and distilled versions get a short training on chats, with the assistant as teacher on the tokens of the answers.

# %%
def answer_loss(student, batch) -> Tensor:
    """KL(p || q) against the assistant, on the tokens of the answers."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    answers = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100  # the next token belongs to an answer
    with torch.no_grad():
        p = assistant(**inputs).logits[answers].float().log_softmax(-1)
    return F.kl_div(
        student(**inputs).logits[answers].float().log_softmax(-1), p, log_target=True, reduction="batchmean"
    )


chat_stream = partial(PaddedBatches, chat_train, 16, chat_tokenizer.pad_token_id, seed=seed)
chat_calibration = [collate(chat_train[i : i + 32], chat_tokenizer.pad_token_id) for i in (0, 32)]
chat_statistics = input_statistics(assistant, chat_calibration)
narrow = recover(without_neurons(assistant, chat_statistics, 0.5), chat_stream(), 25, answer_loss)
pupil = copy.deepcopy(drafter)
pupil = recover(pupil, chat_stream(), 60, answer_loss, settings["student"])


def gptq_codes(found: dict, bits: int):
    return lambda name, weight: gptq(weight, found[name]["moments"], bits, GROUP)


def sparse(found: dict):
    return lambda name, weight: sparse_gpt(weight, found[name]["moments"], "2:4").bfloat16().float()


on_cpu = machine.device == "cpu"
eight_bits = [packed_model(m, 8, partial(nearest_codes, bits=8)) for m in (base, assistant)]
versions = {"16 bits": (base, assistant, file_bytes(stored(base)))}
fast = [int8_kernel(copy.deepcopy(m), linears(m)) for m in (base, assistant)] if on_cpu else eight_bits
versions["8 bits"] = (*fast, file_bytes(stored(eight_bits[0])))
for bits in (4, 2):
    pair = [packed_model(m, bits, gptq_codes(s, bits)) for m, s in ((base, statistics), (assistant, chat_statistics))]
    versions[f"{bits} bits, GPTQ"] = (*pair, file_bytes(stored(pair[0])))
versions["2:4, SparseGPT"] = (sparse_base, compressed(assistant, sparse(chat_statistics)), sparse_bytes)
half_base = cuts["half of the neurons"]
versions["half of the neurons"] = (half_base, narrow, file_bytes(stored(half_base)))
versions["distilled student"] = (drafter, pupil, file_bytes(stored(drafter)))


# %%
def speeds(model, repeats: int = lesson.scaled(7, 2), new_tokens: int = 24) -> np.ndarray:
    """Tokens per second of plain greedy decoding, one text at a time."""
    plain_decoding(model, starts[0], 2)
    return np.sort([new_tokens / timed(plain_decoding, model, starts[i], new_tokens)[0] for i in range(repeats)])


results = {}
print(f"{'':22}{'file':>8}{'perplexity (95 %)':>28}{'right answers':>30}{'tokens/s (range)':>24}")
for label, (own_base, own_assistant, size) in versions.items():
    table_of_losses, right, speed = text_losses(own_base), accuracy(own_assistant), speeds(own_base)
    middle = math.exp(mean_loss(table_of_losses))
    low, high = (math.exp(edge) for edge in bootstrap_interval(table_of_losses, mean_loss, seed))
    results[label] = (size / 1e6, (middle, low, high), right, (np.median(speed), speed[0], speed[-1]))
    text = f"{middle:.2f} ({low:.2f} to {high:.2f})"
    print(f"{label:22}{size / 1e6:5.2f} MB{text:>28}{right!s:>30}", end="")
    print(f"{np.median(speed):10.0f} ({speed[0]:.0f} to {speed[-1]:.0f})")

# %% tags=["headline"]
from matplotlib.figure import Figure

figure = Figure(figsize=(10, 4.4))
panels = {
    "perplexity of the base": {label: result[1] for label, result in results.items()},
    "right answers of the assistant": {label: (r[2].accuracy, r[2].low, r[2].high) for label, r in results.items()},
    "tokens per second": {label: result[3] for label, result in results.items()},
}
for axes, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
    sign = 1 if title.startswith("perplexity") else -1  # what is better is lower after this
    for number, (label, (middle, low, high)) in enumerate(values.items()):
        size = results[label][0]
        beaten = any(
            results[other][0] <= size and sign * v[0] <= sign * middle and other != label for other, v in values.items()
        )
        color = plots.GREY if beaten else plots.COLORS[0]
        axes.errorbar(size, middle, [[middle - low], [high - middle]], fmt="o", color=color, capsize=3)
        axes.annotate("ABCDEFG"[number], (size, middle), (5, 5), textcoords="offset points", color=color)
    axes.set(title=title, xlabel="file (MB)")
    axes.margins(0.12)
    axes.title.set_fontsize(10)
    if title.startswith("perplexity"):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
figure.suptitle(
    "At 4 bits a third of the bytes gives all of the quality; what the kernels give is another matter",
    x=0.01,
    ha="left",
)
alt = "Three panels over file size: perplexity, right answers and tokens per second of seven versions, with intervals."
plots.show(figure, alt)
print("  ".join(f"{letter}: {label}" for letter, label in zip("ABCDEFG", results, strict=False)))

# %%
whole, four, two = results["16 bits"], results["4 bits, GPTQ"], results["2 bits, GPTQ"]
lesson.claim("4 bits take less than half of the file", four[0] / whole[0], at_most=0.5, form=".0%")
lesson.claim(
    "with 4 bits right answers stay within 5 points", whole[2].accuracy - four[2].accuracy, at_most=0.05, form=".1%"
)
# The fastest run of each, since whatever else the machine does only slows a run down.
lesson.claim(
    "the student writes faster than its teacher",
    results["distilled student"][3][2] / whole[3][2],
    at_least=1.1,
    form=".2f",
)
for label in ("4 bits, GPTQ", "2 bits, GPTQ", "2:4, SparseGPT", "half of the neurons", "distilled student"):
    size, (middle, _, _), right, (_, _, speed) = results[label]
    lesson.report(
        f"{label}: file, perplexity, right answers, speed",
        f"{size / whole[0]:.0%}, {middle:.2f}, {right.accuracy:.0%}, {speed / whole[3][2]:.1f} times",
    )


# %% [markdown]
# Points that no other beats in both respects of a panel are blue. Bits are the cheapest way to save bytes: 4 bits cost nothing that these tests can see, and 2 bits with GPTQ keep about nine right answers of ten in a quarter of the bytes. What the codes do not give here is speed, since this CPU has no kernel for them; 8 bits have one, which pays a little perplexity because it takes a single scale for all tokens of an input, and 2:4 runs as a dense model. The narrow model and the student lose more quality for their bytes, with a few seconds of training, but they are faster **without** any special kernel.
#
# ## 13 · Exercises
#
# Five, from easy to hard. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it.

# %% tags=["exercise"]
# Exercise 10.1, easy: double quantisation (QLoRA).
def double_quantise(largest: Tensor, block: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Compress the absolute maxima (blocks,) of NF4's blocks, whose number is a multiple of `block`.

    They are all positive, so subtract their mean first. Then quantise groups of `block` of them with `absmax` at
    8 bits. Return the codes (groups, block), the scales (groups, 1) and the mean (a tensor with one number).
    """
    raise NotImplementedError


# %% tags=["check"]
def check_double_quantise(double_quantise):
    largest = torch.rand(1024, generator=torch.Generator().manual_seed(4)) * 0.1 + 0.2
    codes, scales, mean = double_quantise(largest)
    expect_shape("the codes of 1,024 maxima", codes, (4, 256))
    expect_shape("their scales", scales, (4, 1))
    expect_true("the codes are int8", codes.dtype == torch.int8)
    expect_close("the mean", float(mean), largest.mean().item())
    back = (codes * scales + mean).flatten()
    error = (back - largest).abs().max().item()
    expect_true(f"the largest error {error:.5f} is at most half a step, 0.0003", error < 0.0003)
    expect_true("the codes use both signs", codes.min() < -100 and codes.max() > 100)
    expect_shape("the codes of 96 maxima in groups of 32", double_quantise(largest[:96], 32)[0], (3, 32))


check("10.1", check_double_quantise, double_quantise)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Subtract the mean, view the rest as rows of `block` numbers, and let `absmax` do what it did for the weights.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def double_quantise(largest: Tensor, block: int = 256) -> tuple[Tensor, Tensor, Tensor]:
#     mean = largest.mean()
#     codes, scales = absmax((largest - mean).view(-1, block), 8)
#     return codes, scales, mean
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 10.2, medium: eight codes of 3 bits in three bytes.
def pack_3_bits(codes: Tensor) -> Tensor:
    """Codes (n,) from 0 to 7, n a multiple of 8, as bytes (3 n / 8,), dtype uint8.

    Eight codes are 24 bits, the first code in the highest three bits of the first byte. A code may lie in two bytes.
    """
    raise NotImplementedError


def unpack_3_bits(packed: Tensor) -> Tensor:
    """The codes (n,) of the bytes (3 n / 8,), dtype uint8."""
    raise NotImplementedError


# %% tags=["check"]
def check_3_bits(pack_3_bits, unpack_3_bits):
    one = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)  # 001 010 011 100 101 110 111 000
    expect_equal(
        "pack_3_bits([1, 2, 3, 4, 5, 6, 7, 0])", pack_3_bits(one).tolist(), [0b00101001, 0b11001011, 0b10111000]
    )
    codes = torch.randint(0, 8, (800,), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    packed = pack_3_bits(codes)
    expect_equal("bytes in the storage for 800 codes", packed.untyped_storage().nbytes(), 300)
    expect_true("the bytes are uint8", packed.dtype == torch.uint8)
    expect_equal("unpack_3_bits(pack_3_bits(codes))", unpack_3_bits(packed), codes)
    expect_equal(
        "unpack_3_bits of three bytes",
        unpack_3_bits(torch.tensor([255, 0, 7], dtype=torch.uint8)).tolist(),
        [7, 7, 6, 0, 0, 0, 0, 7],
    )


check("10.2", check_3_bits, pack_3_bits, unpack_3_bits)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Put eight codes into one integer of 24 bits with shifts, and take three bytes out of it with shifts; unpacking is the same backwards.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Go through one number of 24 bits: shift the codes into it, then the bytes out of it.
#
# ```python
# def pack_3_bits(codes: Tensor) -> Tensor:
#     groups = codes.int().view(-1, 8)
#     number = sum(groups[:, i] << (21 - 3 * i) for i in range(8))  # 24 bits
#     return torch.stack([number >> shift & 255 for shift in (16, 8, 0)], 1).flatten().to(torch.uint8)
#
#
# def unpack_3_bits(packed: Tensor) -> Tensor:
#     first, second, third = packed.int().view(-1, 3).unbind(1)
#     number = first << 16 | second << 8 | third
#     return torch.stack([number >> (21 - 3 * i) & 7 for i in range(8)], 1).flatten().to(torch.uint8)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 10.3, medium: GPTQ in order of importance ("act-order").
def gptq_in_order(weight: Tensor, moments: Tensor, bits: int) -> Tensor:
    """Weight (out, in) after GPTQ with one grid a channel, its columns taken by falling moments[j, j].

    Columns on large inputs come first, while many others are still free to make up for their errors. The grid of a
    row is that of the whole row. Use `gptq` and `from_codes`. The columns of the result stand in their old places.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_gptq_in_order(gptq_in_order):
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(24, 40, generator=generator)
    sizes = torch.rand(40, generator=generator) * 3 + 0.1
    x = torch.randn(300, 40, generator=generator) @ torch.randn(40, 40, generator=generator) * sizes
    moments = x.T @ x
    result = gptq_in_order(weight, moments, 3)
    expect_shape("the result", result, (24, 40))
    expected = weight.double().clone()
    _, scale, zero = zero_point(expected, 3)
    h = moments.double() + 0.01 * moments.diagonal().mean().double() * torch.eye(40)
    free = moments.diagonal().argsort(descending=True).tolist()
    while free:  # by definition: a new inverse over the columns that are free
        inverse = torch.linalg.inv(h[free][:, free])
        column = expected[:, free[0]].clone()
        fixed = ((column[:, None] / scale + zero).round().clamp(0, 7) - zero) * scale
        expected[:, free] -= (column[:, None] - fixed) / inverse[0, 0] * inverse[0]
        expected[:, free[0]] = fixed[:, 0]
        free = free[1:]
    agree = ((result - expected).abs() < 1e-3).double().mean().item()
    expect_true(f"{agree:.1%} of the weights are as by the definition", agree > 0.99)


check("10.3", check_gptq_in_order, gptq_in_order)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Permute the columns of the weight and both rows and columns of the moments, and undo it at the end: the inverse of a permutation is its argsort.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Permute the columns of the weight, and rows and columns of the moments. Then undo it: `argsort` of a permutation is its inverse.
#
# ```python
# def gptq_in_order(weight: Tensor, moments: Tensor, bits: int) -> Tensor:
#     order = moments.diagonal().argsort(descending=True)
#     codes = gptq(weight[:, order], moments[order][:, order], bits, weight.shape[1])
#     return from_codes(*codes)[:, order.argsort()]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 10.4, medium: how many tokens to draft.
def best_draft_length(a: float, c: float, most: int = 16) -> tuple[int, float]:
    """The k from 0 to `most` with the largest expected speed-up of speculative decoding, and that speed-up.

    a is the chance that a draft is kept (0 <= a <= 1), c the time of a draft's pass over that of a teacher's pass.
    k = 0 is plain decoding, speed-up 1. Of equal speed-ups the smaller k wins. Mind a = 1.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_draft_length(best_draft_length):
    for a, c in ((0.8, 0.1), (0.6, 0.3), (0.3, 0.5), (0.95, 0.02), (0.0, 0.2)):
        options = [sum(a**i for i in range(k + 1)) / (k * c + 1) for k in range(17)]
        best = max(range(17), key=lambda k: (round(options[k], 12), -k))
        k, speedup = best_draft_length(a, c)
        expect_equal(f"k of best_draft_length({a}, {c})", k, best)
        expect_close(f"the speed-up at a = {a}, c = {c}", speedup, options[best])
    expect_close("best_draft_length(1.0, 0.1, 4)", list(best_draft_length(1.0, 0.1, 4)), [4, 5 / 1.4])
    expect_close("best_draft_length(0.2, 0.5)", list(best_draft_length(0.2, 0.5)), [0, 1.0])


check("10.4", check_draft_length, best_draft_length)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The expected number of tokens from k drafts is 1 + a + a^2 + ... + a^k, a sum that needs no special case for a = 1.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The sum of the powers needs no case for $a = 1$.
#
# ```python
# def best_draft_length(a: float, c: float, most: int = 16) -> tuple[int, float]:
#     speedups = [sum(a**i for i in range(k + 1)) / (k * c + 1) for k in range(most + 1)]
#     k = speedups.index(max(speedups))
#     return k, speedups[k]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 10.5, hard: bits where they matter.
def allocate_bits(errors: dict[str, dict[int, float]], sizes: dict[str, int], mean_bits: float) -> dict[str, int]:
    """Choose the bits of each layer so that the sum of the errors is small.

    errors[layer][bits] is the error that a layer causes with so many bits (it falls as bits grow), sizes[layer] the
    number of its weights. The mean number of bits per weight must not exceed `mean_bits`; the fewest bits everywhere
    do not. The sum of the errors must be at most 5 % above the best that is possible. Layers are few (at most 8).
    """
    raise NotImplementedError


# %% tags=["check"]
def check_allocate_bits(allocate_bits):
    from itertools import product

    generator = np.random.default_rng(7)
    for number, mean_bits in ((1, 4.0), (3, 3.0), (5, 3.2), (6, 4.5)):
        names = [f"layer {i}" for i in range(number)]
        sizes = {name: int(generator.integers(1, 9)) * 1000 for name in names}
        scale = {name: float(generator.lognormal(0, 1.5)) for name in names}
        fall = {name: float(generator.uniform(2, 5)) for name in names}
        errors = {name: {bits: scale[name] * fall[name] ** -bits for bits in (2, 3, 4, 8)} for name in names}
        chosen = allocate_bits(errors, sizes, mean_bits)
        expect_equal(f"layers of the answer for {number} layers", sorted(chosen), sorted(names))
        spent = sum(chosen[name] * sizes[name] for name in names) / sum(sizes.values())
        expect_true(f"{spent:.2f} bits a weight are at most {mean_bits}", spent <= mean_bits + 1e-9)
        best = min(
            sum(errors[name][bits] for name, bits in zip(names, choice, strict=True))
            for choice in product((2, 3, 4, 8), repeat=number)
            if sum(bits * sizes[name] for name, bits in zip(names, choice, strict=True))
            <= mean_bits * sum(sizes.values())
        )
        total = sum(errors[name][chosen[name]] for name in names)
        expect_true(f"the error {total:.4g} is at most 5 % above the best, {best:.4g}", total <= 1.05 * best)


check("10.5", check_allocate_bits, allocate_bits)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With at most eight layers and four widths you can try every combination.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# With few layers, try all choices. With many, this is a knapsack problem: a table over the bits spent, layer by layer, solves it exactly, and taking again and again the step with the largest fall of error per bit comes close. The errors can be the `output_error` of each layer, or better the divergence of the model with this layer alone compressed.
#
# ```python
# from itertools import product
#
#
# def allocate_bits(errors: dict[str, dict[int, float]], sizes: dict[str, int], mean_bits: float) -> dict[str, int]:
#     names, budget_in_bits = list(errors), mean_bits * sum(sizes.values())
#     best, best_error = None, math.inf
#     for choice in product(*(errors[name] for name in names)):
#         spent = sum(bits * sizes[name] for name, bits in zip(names, choice, strict=True))
#         error = sum(errors[name][bits] for name, bits in zip(names, choice, strict=True))
#         if spent <= budget_in_bits and error < best_error:
#             best, best_error = dict(zip(names, choice, strict=True)), error
#     return best
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
# Two lines cover most of what practitioners do. `BitsAndBytesConfig` loads any model of the hub with 4-bit weights, NF4 with double quantisation, without calibration. And `generate(assistant_model=...)` decodes speculatively with any smaller model that has the same tokenizer. Check both against what you wrote.

# %%
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

transformers.logging.set_verbosity_error()  # `generate` warns about its own calls of itself
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=getattr(torch, machine.dtype),
)
loaded = AutoModelForCausalLM.from_pretrained(
    base.config._name_or_path,
    quantization_config=config,
    device_map=machine.device,
    dtype=getattr(torch, machine.dtype),
)
change, low, high = gain(text_losses(loaded.eval()), full_text)
print(f"bitsandbytes, NF4 with double quantisation: loss {change:+.4f} nats ({low:+.4f} to {high:+.4f})")
footprints = [loaded.get_memory_footprint() / 1e6, memory_bytes(packed) / 1e6]
print(f"in memory: {footprints[0]:.2f} MB, ours in 4 bits {footprints[1]:.2f} MB")
ids = torch.tensor([starts[0]], device=base.device)
settings_of_decoding = {
    "max_new_tokens": 32,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": tokenizer.pad_token_id,
}
theirs = base.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=drafter, **settings_of_decoding)[
    0, ids.shape[1] :
]
ours = speculative(base, drafter, starts[0], 32, k=4)[0]
print(f"generate(assistant_model=...) gives the same {len(ours)} tokens: {theirs.tolist() == ours}")
lesson.equal("assisted decoding of transformers writes the same tokens", int(theirs.tolist() != ours))

# %% [markdown]
# **What is different at scale**
#
# | here | a model of billions of parameters |
# |---|---|
# | 11 % of the file is embeddings | 13 % in Llama 3 8B with its large vocabulary, 3 % in the 70B: there 4 bits come close to a quarter of the size |
# | no outlier columns, we planted them | they are there from a few billion parameters on |
# | round to nearest is good at 4 bits in groups of 64 | the same; 3 bits and fewer want GPTQ, AWQ or training with quantisation |
# | reading codes in PyTorch is slower than 32 bits | fused kernels (Marlin, ExLlama, llama.cpp, torchao) compute from the codes, up to nearly 4 times as fast as from 16 bits (Frantar et al. 2024, arXiv:2408.11743) |
# | 2:4 saves bytes only | Ampere and later skip the zeros: up to twice the arithmetic |
# | the student has half of the layers, $c$ near one half | draft models 10 to 100 times smaller, or extra heads on the model itself |
# | calibration on 64 rows of its own kind of text | 128 to 1,024 sequences of general text; another domain may suffer more than the average says |
# | quality is perplexity and six tasks | check the tasks you need: rare knowledge, long contexts and other languages go first |
#
# ## Read on
#
# - LeCun, Denker & Solla 1989, *Optimal Brain Damage*; Hassibi & Stork 1993, *Second Order Derivatives for Network Pruning: Optimal Brain Surgeon*.
# - Dettmers et al. 2022, *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*, arXiv:2208.07339.
# - Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized LLMs*, arXiv:2305.14314: NF4 and double quantisation.
# - Frantar et al. 2023, *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, arXiv:2210.17323.
# - Lin et al. 2024, *AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration*, arXiv:2306.00978; Xiao et al. 2023, *SmoothQuant*, arXiv:2211.10438.
# - Liu et al. 2024, *KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache*, arXiv:2402.02750.
# - Frantar & Alistarh 2023, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*, arXiv:2301.00774; Sun et al. 2024, *A Simple and Effective Pruning Approach for Large Language Models* (Wanda), arXiv:2306.11695.
# - Men et al. 2024, *ShortGPT: Layers in Large Language Models are More Redundant Than You Expect*, arXiv:2403.03853; Ma, Fang & Wang 2023, *LLM-Pruner*, arXiv:2305.11627.
# - Hinton, Vinyals & Dean 2015, *Distilling the Knowledge in a Neural Network*, arXiv:1503.02531; Kim & Rush 2016, *Sequence-Level Knowledge Distillation*, arXiv:1606.07947; Sanh et al. 2019, *DistilBERT*, arXiv:1910.01108.
# - Agarwal et al. 2024, *On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes*, arXiv:2306.13649; Gu et al. 2024, *MiniLLM*, arXiv:2306.08543.
# - Leviathan, Kalman & Matias 2023, *Fast Inference from Transformers via Speculative Decoding*, arXiv:2211.17192; Chen et al. 2023, *Accelerating Large Language Model Decoding with Speculative Sampling*, arXiv:2302.01318.
