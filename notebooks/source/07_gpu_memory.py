# %% [markdown]
# # 07 · GPU memory: will it fit, and how fast will it run?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/07_gpu_memory.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/07_gpu_memory.ipynb)
#
# "Will it fit my GPU?" is the first question of every project, and the usual answers are rules of thumb, often wrong by a factor of two. In this lesson you count every byte of a training step yourself: weights, gradients, optimiser, activations, logits, and the cache of generation. The formulas are checked against bytes counted on this machine, and the peak of a step also against a real model of half a billion parameters that is followed through it without being allocated. Then you measure what decides the speed, and turn both into money, energy and carbon.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. count a Llama's parameters, and say why training one takes 16 bytes where using it takes 2, or half a byte;
# 2. derive what a layer keeps for its backward pass, within a thousandth of what autograd keeps, and predict the peak of whole steps within 5 %;
# 3. compute which models fit which GPUs for inference, full training, LoRA and QLoRA, and what to change when one does not;
# 4. measure this machine's roofline, place prefill and decoding on it, and predict how fast a 7 B model decodes on a T4, A100 or H100;
# 5. estimate energy, cost and carbon of a million tokens and of a whole training, and read from eight GPUs what became the bottleneck.
#
# **Prerequisites:** lessons 01 and 03; lesson 06 for LoRA and QLoRA.
#
# **The model** measured here is *shima-4m*, a small Llama that comes with the course; on a GPU profile it is an open hub model. The formulas do not care about the size.
#
# **Units.** 1 GB is $10^9$ bytes and 1 GiB is $2^{30}$ bytes, 7 % more. Papers say GB, and `nvidia-smi` says MiB. This lesson says which it means.
#
# | symbol | meaning |
# |---|---|
# | $P$, $w$ | number of parameters; bytes of one number (4 in fp32, 2 in bf16 and fp16) |
# | $b$, $s$ | sequences in a batch, tokens in a sequence (`batch`, `seq`) |
# | $h$, $L$, $V$ | width of the hidden states, layers, vocabulary (`hidden`, `layers`, `vocab`) |
# | $i$ | width of the feed-forward part (`intermediate`) |
# | $a$, $a_{kv}$, $d$ | query heads, key-value heads, width of a head; $q = a d$ and $k = a_{kv} d$ (`heads`, `kv_heads`, `head_dim`) |

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
model_id = ""  # another model to measure: a hub id, or a folder in hub format
seed = 0
budget = 1.0  # share of the repetitions when time is measured; speeds are asserted from 1.0 on
calculator_model = "Qwen/Qwen2.5-7B"  # for the calculator of section 8: a name in data/model_shapes.json
calculator_gpu = "T4"  # a name in data/gpus.json
carbon_intensity = 481  # g of CO2 per kWh of electricity (section 11): the world's average in 2023

# %% [markdown]
# The next cell holds all that depends on the hardware, one row per profile. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
import weakref
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from helpers import plots
from helpers.exercises import check, expect_equal, expect_true
from helpers.lesson import Lesson, show_table
from helpers.models import load_model

lesson = Lesson("07", profile, model_id, seed, budget)
machine = lesson.machine
# half: the 16-bit format; live: batch and length of the steps that are measured; big: a shape whose speed is
# measured besides, with two layers and random weights; batches: of decoding
TINY_LLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
SETTINGS = {
    "cpu": {"half": "bf16", "live": (4, 128), "big": TINY_LLAMA, "batches": (1, 4, 16, 64)},
    "t4": {"half": "fp16", "live": (2, 256), "big": "", "batches": (1, 4, 16, 64, 256)},
    "large": {"half": "bf16", "live": (2, 512), "big": "", "batches": (1, 4, 16, 64, 256)},
}
settings = SETTINGS[machine.name]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
half = settings["half"]
torch.manual_seed(seed)
warnings.filterwarnings("ignore", message=".*checkpointing.*")

# %%
GIB = 2**30
clock = time.process_time if machine.device == "cpu" else time.perf_counter  # section 4 says why

# %% [markdown] tags=["core"]
# ## 1 · The weights
#
# **Question.** How much memory do the weights take, before anything is computed?
#
# Number of parameters times bytes of a parameter: a model of 1 B parameters in fp32, 4 bytes each, takes 4 GB. Both factors deserve a look.
#
# **Bytes.** fp32 takes 4 bytes, bf16 and fp16 take 2, int8 takes 1. "4 bit" is more than half a byte, because the 16 levels of a 4-bit number have to be scaled to the weights. QLoRA's NF4 (Dettmers et al. 2023) cuts a matrix into blocks of 64 weights and keeps the largest absolute value of each block. In fp32 these scales would add $32/64 = 0.5$ bit a weight. So they are quantised again (*double quantisation*): 8 bits each, with one fp32 number for every 256 of them:
#
# $$4 + \frac{8}{64} + \frac{32}{64 \cdot 256} = 4.127 \text{ bits a weight}$$
#
# Beside that lie two code books, 16 and 256 fp32 numbers, and one offset. The next cell counts the bytes of a matrix that `bitsandbytes` has really quantised.
#
# **Parameters.** A Llama has in each layer four attention matrices, of which keys and values are narrower where heads share them (*grouped-query attention*, GQA), three feed-forward matrices (gate, up, down), and two norms. Around the layers are the embedding, one more norm, and the output matrix, unless that is *tied*, which means that it is the embedding itself:
#
# $$P = \underbrace{(1 \text{ or } 2)\, V h}_{\text{embedding, output}} + L\,\big(\underbrace{2 h q + 2 h k}_{\text{attention}} + \underbrace{3 h i}_{\text{feed-forward}} + \underbrace{2h}_{\text{norms}}\big) + h$$
#
# Qwen2 has biases of $q + 2k$ numbers a layer besides. Qwen3 has none, but normalises each query and each key: two more norms, each as long as a head is wide. The cells after the next compare with the library: with the model of this profile, and with larger ones built on torch's *meta* device, where tensors have a shape but no memory.

# %%
from bitsandbytes.functional import quantize_4bit

from helpers.memory import quantised_size


def nf4_bytes(rows: int, columns: int) -> int:
    """Bytes of an NF4 matrix with double quantisation."""
    blocks = math.ceil(rows * columns / 64)
    code_books = 4 * (16 + 256 + 1)
    return math.ceil(rows * columns / 2) + blocks + 4 * math.ceil(blocks / 256) + code_books


rows, columns = 1024, 2816
matrix = torch.randn(rows, columns, device=machine.device)
packed, state = quantize_4bit(matrix, compress_statistics=True, quant_type="nf4")
scales = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
really = sum(tensor.nbytes for tensor in [packed, *scales])
table = {name: [f"{dtype.itemsize}", f"{matrix.numel() * dtype.itemsize:,}"] for name, dtype in DTYPES.items()}
table["NF4, by hand"] = [f"{nf4_bytes(rows, columns) / matrix.numel():.4f}", f"{nf4_bytes(rows, columns):,}"]
table["NF4, bitsandbytes"] = [f"{really / matrix.numel():.4f}", f"{really:,}"]
show_table(table, ["bytes each", f"matrix of {rows} x {columns}"])
lesson.equal("the bytes counted by hand are those of bitsandbytes", abs(nf4_bytes(rows, columns) - really))
lesson.equal("helpers.memory says the same", abs(quantised_size((rows, columns), "nf4") - really))
lesson.report("bits of a 4-bit weight with its scales", f"{8 * really / matrix.numel():.3f}")

# %%
from helpers.memory import ModelShape, bundled_shapes


def config_of(name: str) -> PretrainedConfig:
    """The configuration of an open model, from the table that comes with the course."""
    fields = {key: value for key, value in bundled_shapes()[name].items() if key != "source"}
    return AutoConfig.for_model(fields.pop("model_type"), **fields, pad_token_id=None)


def widths(config: PretrainedConfig) -> tuple[int, int]:
    """q and k: the widths of all queries and of all keys of a token."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of a Llama, Qwen2 or Qwen3."""
    h, (q, k) = config.hidden_size, widths(config)
    extra = {"qwen2": q + 2 * k, "qwen3": 2 * (q // config.num_attention_heads)}.get(config.model_type, 0)
    layer = 2 * h * q + 2 * h * k + 3 * h * config.intermediate_size + 2 * h + extra
    outside = config.vocab_size * h * (1 if config.tie_word_embeddings else 2) + h
    return outside + config.num_hidden_layers * layer


# %%
base, tokenizer = load_model(machine)
name = machine.model_id.split("/")[-1]
counted = {name: (base.config, base.num_parameters())}
for other in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen3-0.6B-Base", "meta-llama/Meta-Llama-3-8B"):
    with torch.device("meta"):  # shapes only
        model = AutoModelForCausalLM.from_config(config_of(other))
    counted[other] = model.config, model.num_parameters()
table = {}
for other, (config, library) in counted.items():
    ours, theirs = count_parameters(config), ModelShape.from_config(config).num_parameters
    table[other] = [f"{ours:,}", f"{library:,}", f"{theirs:,}", f"{2 * ours / 1e9:.2f} GB"]
    lesson.equal(
        f"{other}: our formula, transformers and helpers.memory agree",
        max(ours, library, theirs) - min(ours, library, theirs),
    )
show_table(table, ["our formula", "transformers", "helpers.memory", "in 16 bit"])
storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
print(f"\nbytes of {name} in memory: {sum(storages.values()):,} = ", end="")
print(f"{base.num_parameters():,} x {base.dtype.itemsize}")
assert sum(storages.values()) == base.num_parameters() * base.dtype.itemsize

# %% [markdown] tags=["core"]
# ## 2 · Gradients and optimiser: what training adds
#
# **Question.** The weights fit twice over. Why does training fail?
#
# Each trained parameter has a gradient, and AdamW keeps two more numbers for it, the running means $m$ of the gradient and $v$ of its square. What that takes depends on the number formats, and there are three common recipes:
#
# | recipe | weight | gradient | fp32 copy of the weight | $m$, $v$ | bytes a parameter |
# |---|---|---|---|---|---|
# | classical mixed precision (Micikevicius et al. 2018; Rajbhandari et al. 2020) | 2 | 2 | 4 | 4 + 4 | **16** |
# | torch autocast: weights in fp32, matrix products in 16 bit | 4 | 4 | | 4 + 4 | **16** |
# | everything in 16 bit: small updates are rounded away | 2 | 2 | | 2 + 2 | **8** |
#
# The first two need the same, in different places. The cell below builds all three for the model of this profile, makes a step each and counts the bytes of weights, gradients and optimiser state.


# %%
def training_state(recipe: str) -> dict[str, int]:
    """Bytes by part after a backward pass, with the optimiser's state of the step before still there."""
    dtype = torch.float32 if recipe == "autocast" else DTYPES[half]
    model = copy.deepcopy(base).to(dtype).train()
    weights = list(model.parameters())
    masters = [p.detach().float() for p in weights] if recipe == "classical" else []
    optimizer = torch.optim.AdamW(masters or weights, fused=True)
    ids = torch.randint(model.config.vocab_size, (1, 16), device=machine.device)
    with torch.autocast(machine.device, DTYPES[half], enabled=recipe == "autocast"):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for master, weight in zip(masters, weights if masters else [], strict=True):
        master.grad = weight.grad.float()
    optimizer.step()  # makes m and v
    kept = [v for state in optimizer.state.values() for v in state.values() if v.numel() > 1]
    parts = {"weights": weights, "gradients": [p.grad for p in weights], "fp32 copy": masters, "m, v": kept}
    return {part: sum(tensor.nbytes for tensor in tensors) for part, tensors in parts.items()}


table = {}
for recipe in ("classical", "autocast", "all in 16 bit"):
    parts = training_state(recipe)
    each = [size / base.num_parameters() for size in parts.values()]
    table[recipe] = [*(f"{size:.2f}" for size in each), f"{sum(each):.2f}"]
show_table(table, ["weights", "gradients", "fp32 copy", "m, v", "all"])
expected = {"classical": 16, "autocast": 16, "all in 16 bit": 8}
lesson.equal("bytes a parameter are 16, 16 and 8", max(abs(float(table[r][-1]) - n) for r, n in expected.items()))
lesson.report("bytes a parameter: classical, autocast, all in 16 bit", ", ".join(row[-1] for row in table.values()))

# %% [markdown]
# **Backwards: how many parameters fill a board?** Divide its memory by the bytes of a parameter. The table takes boards of 16 to 80 GB (sections 7 and 12 have larger ones). This is an upper limit, since nothing but the state is counted; sections 3 to 7 add the rest.

# %%
each = {"fp32, use": 4, "16 bit, use": 2, "4 bit, use": nf4_bytes(rows, columns) / matrix.numel(), "training": 16}
boards = {f"{size} GB": [f"{size / width:.1f}" for width in each.values()] for size in (16, 40, 80)}
show_table(boards, [f"{name}: B parameters" for name in each])
lesson.report("B parameters that fill 80 GB: in 16 bit, in training", f"{80 / 2:.0f}, {80 / 16:.0f}")

# %% [markdown]
# That is the *state*. The *peak* is higher, because a step also makes temporary tensors. To see it we need a counter for the bytes that are alive at each moment. On CUDA the allocator has one, `torch.cuda.max_memory_allocated()`. The class below does the same on any device: torch calls `__torch_dispatch__` for every operation, also those of the backward pass and the optimiser, and we count each new storage until the last reference to it is gone.
#
# **Its first use: the copy that nobody mentions.** `torch.optim.AdamW` has three implementations. The loop updates one tensor after the other. `foreach`, the default on CUDA, does each arithmetic operation for all tensors at once, so its intermediate result is as large as all parameters together. `fused` does everything in one kernel and needs no intermediate result. We start from weights, gradients and state, and look at the peak of the step alone. Then the same for a model that we do not have: under `FakeTensorMode` tensors have shape, type and lifetime, but no data.

# %%
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of all storages while they are alive, beginning with those of the tensors given."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakSet()
        self.count(tensors)

    def count(self, tensors) -> None:
        for storage in (t.untyped_storage() for t in tensors if isinstance(t, Tensor)):
            if storage not in self.seen:  # views share a storage
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count(tree_leaves(result))
        return result


# %%
from torch._subclasses import FakeTensorMode

VARIANTS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Gradients are made of nothing, then a step makes the optimiser's state."""
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return [value for state in optimizer.state.values() for value in state.values()]


def extra_copies(model: nn.Module) -> list[float]:
    """What the update of each variant needs besides what is there, in sizes of the model."""
    weights, found = list(model.parameters()), []
    for options in VARIANTS.values():
        optimizer = torch.optim.AdamW(weights, **options)
        with Live(*weights, *state_of(optimizer), *(p.grad for p in weights)) as live:
            before = live.now
            optimizer.step()
        found.append((live.peak - before) / sum(p.nbytes for p in weights))
    return found


# %%
extra = {name: extra_copies(copy.deepcopy(base))}
with FakeTensorMode():
    fake = AutoModelForCausalLM.from_config(config_of("Qwen/Qwen2.5-1.5B"), dtype=torch.bfloat16)
    extra["Qwen2.5-1.5B, fake"] = extra_copies(fake)
    in_gib = sum(p.nbytes for p in fake.parameters()) / GIB
show_table({other: [f"{v:.2f}" for v in row] for other, row in extra.items()}, [*VARIANTS])
print(f"\n1.00 is one more copy of all weights: {in_gib:.2f} GiB for Qwen2.5-1.5B in bf16")
copied = [row[1:] for row in extra.values()]
least, most = min(foreach for foreach, _ in copied), max(fused for _, fused in copied)
lesson.claim("a foreach step needs one more copy of the weights", least, at_least=0.9, control=most, form=".2f")
lesson.claim("a fused step needs no copy of the weights", most, at_most=0.05, control=least, form=".2f")
lesson.report(
    "extra copies of the weights in a foreach step; in a fused one", f"{copied[1][0]:.2f}; {copied[1][1]:.2f}"
)
del fake


# %% [markdown]
# **What you see.** One argument, `fused=True`, saves a whole copy of the weights at the moment of the update. (It only helps where the update is the peak of the step; section 5 shows when that is.) `helpers.training` and `helpers.memory` mean the fused one when they say `adamw`.

# %% [markdown] tags=["core"]
# ## 3 · Activations: what a layer keeps
#
# **Question.** State does not depend on the batch. What grows with it?
#
# The backward pass of an operation needs some of the numbers of its forward pass: a product needs its factors, since $\partial (xW) / \partial W$ contains $x$; a sum needs nothing. Autograd keeps those tensors from the forward pass until the backward pass has used them. Go through one layer of a Llama, line by line, and write down what each line keeps for each token:
#
# - **norm** (twice): in fp32, whatever the format of the model. It keeps its input in fp32 ($4h$ bytes; in 16 bit that is a copy), $1/\sqrt{\text{mean square}}$ (4), the normalised vector ($wh$), needed for the gradient of the norm's weight, and its product with that weight ($wh$), which is the input of the next matrix.
# - **attention**: the rotated queries ($wq$), the keys and values ($2wk$), the result ($wq$), and for each head the logarithm of the softmax's denominator ($4a$). Fused attention (SDPA, FlashAttention: Dao et al. 2022) does not keep the $s \times s$ probabilities; it computes them again. Qwen3's norms of queries and keys keep $(4 + w)(q + k)$ besides, and 4 for each head.
# - **feed-forward**: $\text{down}\big(\text{silu}(\text{gate}(x)) \cdot \text{up}(x)\big)$ keeps the output of gate for silu, the outputs of silu and of up for the product, and the product for down: $4wi$.
# - **residual sums** keep nothing. The rotation needs cosines and sines only, which all layers share.
#
# $$\frac{\text{bytes}}{\text{token, layer}} = \underbrace{2\,(4h + 4 + 2wh)}_{\text{norms}} + \underbrace{w\,(2q + 2k) + 4a}_{\text{attention}} + \underbrace{4wi}_{\text{feed-forward}}$$
#
# Where a batch has padding, transformers hands SDPA a mask. Then keys and values are copied once for each query head ($k$ becomes $q$), and each layer keeps the mask as numbers ($ws$ for each token).
#
# **Measured.** `torch.autograd.graph.saved_tensors_hooks` calls a function for each tensor that autograd keeps. Ours notes the storages, each once, and leaves out the model's own weights.


# %%
def layer_bytes(config: PretrainedConfig, w: int, seq: int = 0, padded: bool = False) -> dict[str, int]:
    """What a layer keeps for each token."""
    h, i, heads, (q, k) = config.hidden_size, config.intermediate_size, config.num_attention_heads, widths(config)
    norm = 4 * h + 4 + w * h + w * h  # input in fp32, inverse, normalised, times weight
    of_heads = (4 + w) * (q + k) + 4 * (heads + config.num_key_value_heads)  # the product is turned, and not kept
    return {
        "norms": 2 * norm + (of_heads if config.model_type == "qwen3" else 0),
        "queries, keys, values": w * (q + 2 * (q if padded else k)),
        "mask": w * seq if padded else 0,
        "result of attention": w * q + 4 * heads,
        "feed-forward": 4 * w * i,
    }


def kept_bytes(config: PretrainedConfig, w: int, batch: int, seq: int, padded: bool = False) -> dict[str, int]:
    """What a forward pass keeps for the backward pass."""
    tokens, h = batch * seq, config.hidden_size
    head_dim = widths(config)[0] // config.num_attention_heads
    return {
        "layers": config.num_hidden_layers * tokens * sum(layer_bytes(config, w, seq, padded).values()),
        "last norm": tokens * (4 * h + 4 + 2 * w * h),
        "log-probabilities": tokens * 4 * config.vocab_size,  # in fp32, for the loss
        "token ids, cosines, sines": 2 * 8 * tokens + 2 * seq * head_dim * w,
    }


# %%
def saved_bytes(run, model: nn.Module) -> int:
    """Bytes that autograd keeps while `run()` computes a loss."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # holding it keeps its address from being given out again
        return tensor.detach()  # the tensor itself would hold its graph, and the graph the tensor, for ever

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def random_batch(config: PretrainedConfig, batch: int, seq: int) -> Tensor:
    """Token ids (batch, seq): how many bytes a step takes does not depend on which they are."""
    return torch.randint(config.vocab_size, (batch, seq), device=machine.device)


# %%
(batch, seq), table, errors = settings["live"], {}, []
for precision in ("fp32", half):
    model = copy.deepcopy(base).to(DTYPES[precision]).train()
    for rows, length in ((batch, seq), (2 * batch, seq), (batch, 2 * seq)):
        ids = random_batch(model.config, rows, length)
        found = saved_bytes(lambda m=model, i=ids: m(input_ids=i, labels=i, use_cache=False).loss, model)
        ours = sum(kept_bytes(model.config, DTYPES[precision].itemsize, rows, length).values())
        errors.append(abs(ours / found - 1))
        table[f"{precision}, {rows} x {length}"] = [f"{ours:,}", f"{found:,}", f"{ours - found:+,}"]
show_table(table, ["our formula", "kept by autograd", "difference"])
print(f"\nof one layer and token, in {half}:", layer_bytes(base.config, 2))
lesson.equal("the formula is within 0.1 % of what autograd keeps", max(errors), within=0.001)
lesson.report("kept for the backward pass: our formula against autograd, largest error", f"{max(errors):.5%}")


# %% [markdown]
# **Logits.** The output layer is special, since $V$ is large. The loss takes the logits ($w V$ for each token), a copy of them in fp32 ($4V$) and their log-probabilities ($4V$). The first two can go when the loss is there. The backward pass then has the log-probabilities, their gradient and the gradient of the fp32 logits at the same time: $12 V$ bytes for each token, whatever the format of the model. For Qwen2.5 with its 151,936 tokens that is 1.8 MB for every token of the batch.

# %% [markdown] tags=["further"]
# ## Beside section 3 · The published formula
#
# *Further: no core section needs this one.*
#
# Korthikanti et al. 2022 derived for the layer of a GPT in 16 bit, without fused attention:
#
# $$s\,b\,h \left(34 + 5\,\frac{a s}{h}\right) \text{ bytes}$$
#
# It is quoted everywhere, for all kinds of models. Let us see what it describes by building that layer: two LayerNorms, full-width keys and values, a feed-forward part of width $4h$ with GELU, attention with all its probabilities, and three dropouts, each of which keeps a mask of one byte a number. (On a CPU torch's own dropout keeps a wider mask, so the cell has one like that of CUDA.)


# %%
class ByteDropout(torch.autograd.Function):
    """Dropout that keeps a byte for each number."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        mask = torch.rand(x.shape, device=x.device) > 0.1
        ctx.save_for_backward(mask)
        return x * mask / 0.9


class GPTLayer(nn.Module):
    def __init__(self, h: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(h), nn.LayerNorm(h)
        self.qkv, self.out = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.up, self.down = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, h)
        drop = ByteDropout.apply
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous() for y in parts)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (batch, heads, seq, seq)
        attended = (drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        x = x + drop(self.out(attended))
        return x + drop(self.down(F.gelu(self.up(self.norm2(x)))))


# %%
h, heads, rows, table, errors = 256, 8, 2, {}, []
layer = GPTLayer(h, heads).to(machine.device, DTYPES[half])
for length in (64, 256):
    x = torch.randn(rows, length, h, device=machine.device, dtype=DTYPES[half], requires_grad=True)
    found = saved_bytes(lambda x=x: layer(x), layer)
    published = rows * length * h * (34 + 5 * heads * length / h)
    errors.append(abs(found / published - 1))
    table[f"seq {length}"] = [f"{published:,.0f}", f"{found:,}", f"{errors[-1]:.3%}"]
show_table(table, ["s b h (34 + 5 a s / h)", "kept by autograd", "difference"])
lesson.equal("the published formula is right for the layer it describes, to 0.5 %", max(errors), within=0.005)

# %%
llama = config_of("meta-llama/Llama-2-7b-hf")
ours, h, heads = sum(layer_bytes(llama, 2).values()), llama.hidden_size, llama.num_attention_heads
print("\na layer of Llama-2 7B, bytes for each token divided by h:", end=" ")
print({part: round(size / h, 2) for part, size in layer_bytes(llama, 2).items()}, f"sum {ours / h:.1f}")
lengths = [512 * 2**n for n in range(7)]
sizes = {
    "GPT formula, all probabilities kept": [n * (34 * h + 5 * heads * n) / GIB for n in lengths],
    "GPT formula, probabilities computed again": [n * 34 * h / GIB for n in lengths],
    "Llama with fused attention": [n * ours / GIB for n in lengths],
    "only the layer's input": [n * 2 * h / GIB for n in lengths],
}
figure = plots.curve(
    {label: (lengths, values) for label, values in sizes.items()},
    title="Fused attention makes activations grow with the length, not its square",
    xlabel="tokens in the sequence",
    ylabel="kept by one layer (GiB)",
    log_x=True,
    log_y=True,
)
last = "; ".join(f"{label} {values[-1]:.1f} GiB" for label, values in sizes.items())
plots.show(figure, f"Kept by one layer of Llama-2 7B over the length. At {lengths[-1]:,} tokens: {last}.")
ratio = (34 * h + 5 * heads * 4096) / ours
lesson.report("activations of Llama-2 7B at 4,096 tokens: GPT formula divided by ours", f"{ratio:.1f}")


# %% [markdown]
# **What you see.** The published formula is right within 0.1 % for the layer that it describes. Fused attention computes the probabilities again in the backward pass, and the paper's formula then has its first term only, $34\,s b h$ (Korthikanti et al. call this selective recomputation). A Llama's layer keeps more than 34: the sum is printed above the plot. Four things differ. There is no dropout and so no mask; RMSNorm in transformers works in fp32 and keeps more; the gated feed-forward part keeps four tensors of width $i$ instead of two of width $4h$; and in models with GQA keys and values are narrower. Both lines are proportional to the number of tokens.

# %% [markdown] tags=["core"]
# ## 4 · Gradient checkpointing: keep less, compute twice
#
# **Question.** Activations can be larger than the model. Which of them do we need?
#
# Only the input of each layer ($wh$ for each token, the lowest line of the plot). With *gradient checkpointing* (Chen et al. 2016) the backward pass runs each layer forward again from its input, and keeps that one layer's activations while it goes back through it:
#
# $$\text{kept} = b s \,\big(\underbrace{L\, w h}_{\text{all inputs}} + \underbrace{2(4h+4+2wh) + w(2q+2k) + 4a + 4wi}_{\text{one layer at a time}}\big)$$
#
# The price is one more forward pass. A backward pass costs twice a forward pass, since it has two products where the forward pass has one. So a step should take $(1 + 1 + 2)/(1 + 2) = 4/3$ of the time.
#
# Times in this lesson are the shortest of several tries. On a CPU they are taken with one thread, as processor time, which other programs disturb least; on a quiet machine it is the time that passes.


# %%
def seconds(run, repeats: int = 5) -> float:
    """Shortest time of a call."""
    times = []
    for _ in range(max(2, round(repeats * budget))):
        start = clock()
        run()
        if machine.device == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times)


threads, _ = torch.get_num_threads(), torch.set_num_threads(1)
rows, length = 4, 256
ids = random_batch(base.config, rows, length)


def forward_backward(checkpointing: bool) -> tuple[int, int, float]:
    """Bytes kept by the formula, bytes alive after the forward pass, and seconds of both passes."""
    model = copy.deepcopy(base).to(DTYPES["fp32" if machine.device == "cpu" else half]).train()
    w, h = model.dtype.itemsize, model.config.hidden_size
    parts = kept_bytes(model.config, w, rows, length)
    if checkpointing:
        model.activation_checkpointing_enable()
        parts["layers"] = model.config.num_hidden_layers * rows * length * w * h
    with Live(*model.parameters(), *model.buffers(), ids) as live:
        before = live.now
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        kept = live.now - before
    del loss
    duration = seconds(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    return sum(parts.values()), kept, duration


# %%
tries = {"everything kept": False, "everything kept, again": False, "checkpointing": True}
runs = {label: forward_backward(checkpointing) for label, checkpointing in tries.items()}
torch.set_num_threads(threads)
table = {
    label: [f"{formula / 2**20:.2f}", f"{kept / 2**20:.2f}", f"{duration * 1e3:.0f} ms"]
    for label, (formula, kept, duration) in runs.items()
}
show_table(table, ["formula, MiB", "alive after the forward pass, MiB", "forward and backward"])
error = max(abs(formula / kept - 1) for formula, kept, _ in runs.values())
lesson.equal("the bytes alive after the forward pass are those of the formula, to 5 %", error, within=0.05)
once, again, recomputed = (duration for *_, duration in runs.values())
lesson.claim(
    "checkpointing makes a step longer, by 10 % to 80 % (by operations 33 %)",
    recomputed / once - 1,
    at_least=0.1,
    at_most=0.8,
    control=again / once - 1,  # the same work measured twice
    form=".0%",
)
kept = ", ".join(table[label][1] for label in ("everything kept", "checkpointing"))
lesson.report("checkpointing: MiB kept without and with it; time of a step", f"{kept}; {recomputed / once:.2f} x")

# %% [markdown] tags=["core"]
# ## 5 · The peak of a step
#
# **Question.** We have all parts. Is their sum the memory that a step needs?
#
# No: they are not all there at the same time. A step runs through phases, and the answer is the largest of them. After the first step the weights $P$ and the optimiser's state $O$ are always there. Then:
#
# | moment | besides $P$ and $O$ |
# |---|---|
# | end of the forward pass | all that is kept, logits, fp32 copy, log-probabilities |
# | start of the backward pass | all that is kept ($4V$ of it log-probabilities), and $8V$ more for each token |
# | a layer in the backward pass (the last one comes first) | what is still kept, gradients so far, with checkpointing this layer's activations, and gradients on their way through it |
# | the embedding, last of all | all gradients $G$; if it is tied, also its second gradient and the sum of both |
# | update | $G$ (and a copy of the weights with the `foreach` optimiser) |
#
# With small batches the end of the backward pass is the peak, with large ones its start. Write it as a function, and compare it with steps on this machine.
#
# **A real model, without allocating it.** Under `FakeTensorMode` the same step runs on Qwen2.5-0.5B, on any machine: transformers' real code, torch's real autograd, storages without data. Our `Live` counts them. (The further section below runs torch's own counter, `MemTracker`, and finds the same bytes.)
#
# (Fake tensors have no data, so transformers cannot see that the mask is all ones, and treats the batch as if it had padding. That is the `padded` of our formula.)


# %%
def peak_bytes(
    config: PretrainedConfig, w: int, batch: int, seq: int, checkpointing: bool = False, padded: bool = False
) -> dict[str, int]:
    """Peaks of the phases of a training step with fused AdamW, all numbers of w bytes."""
    tokens, h, vocab = batch * seq, config.hidden_size, config.vocab_size
    weights = w * count_parameters(config)
    always = weights + 2 * weights  # and AdamW's two moments
    parts = kept_bytes(config, w, batch, seq, padded)
    layer = parts["layers"] // config.num_hidden_layers
    if checkpointing:
        parts["layers"] = config.num_hidden_layers * tokens * w * h
    kept = sum(parts.values())
    copied = 4 if w == 2 else 0  # the logits in fp32
    passing = tokens * w * 2 * (config.intermediate_size + h)  # gradients on their way through a layer
    table = w * vocab * h  # embedding, or output matrix
    tables = w * h * (vocab * (1 if config.tie_word_embeddings else 2) + 1)
    one_layer = (weights - tables) // config.num_hidden_layers
    return {
        "forward": always + kept + tokens * vocab * (w + copied),
        "start of backward": always + kept + tokens * 8 * vocab,  # 4 V of the 12 V are in `kept`
        "last layer": always + kept - tokens * 4 * vocab + table + checkpointing * layer + passing,
        "first layer": always + weights - one_layer + layer + passing,
        "embedding": always + weights + tokens * w * h + config.tie_word_embeddings * 2 * table,
        "update": always + weights,
    }


# %%
def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> int:
    """Peak of live bytes in a training step that is not the first."""
    state = state_of(optimizer)
    optimizer.zero_grad()
    with Live(*model.parameters(), *model.buffers(), *state, ids) as live:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return live.peak


def live_step(precision: str, batch: int, seq: int, checkpointing: bool) -> tuple[int, int]:
    """The same for this profile's model; and what CUDA's allocator says, where there is one."""
    model = copy.deepcopy(base).to(DTYPES[precision]).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = random_batch(model.config, batch, seq)
    if machine.device != "cuda":
        return train_step(model, optimizer, ids), 0
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated() - sum(p.nbytes for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    return train_step(model, optimizer, ids), torch.cuda.max_memory_allocated() - others


# %%
from helpers.memory import estimate_training

shape = replace(ModelShape.from_config(base.config), name=name)
batch, seq = settings["live"]
live_steps = [("fp32", batch, seq, False), (half, batch, seq, False), (half, batch, seq, True), (half, 1, 16, False)]
table, errors = {}, []
for precision, rows, length, checkpointing in live_steps:
    ours = max(peak_bytes(base.config, DTYPES[precision].itemsize, rows, length, checkpointing).values())
    options = {"batch_size": rows, "seq_len": length, "gradient_checkpointing": checkpointing}
    library = estimate_training(shape, precision=precision, padded=False, device=machine.device, **options).total
    found, allocated = live_step(precision, rows, length, checkpointing)
    state = 4 * DTYPES[precision].itemsize * base.num_parameters()  # weights, gradients, two moments
    errors += [(ours / found - 1, library / found - 1, state / found - 1)]
    row = [f"{n / 2**20:.1f}" for n in (ours, library, found, allocated)]
    label = f"{precision}, {rows} x {length}" + ", checkpointing" * checkpointing
    table[label] = [*row, f"{errors[-1][0]:+.1%}", f"{errors[-1][1]:+.1%}"]
show_table(table, ["ours, MiB", "helpers.memory", "counted", "max_memory_allocated", "ours", "helpers"])
*worst, of_state = [max(abs(found[i]) for found in errors) for i in range(3)]
lesson.claim(
    "both predictions are within 5 % of the bytes counted in real steps",
    max(worst),
    at_most=0.05,
    control=of_state,  # a rule that knows weights, gradients and moments only
    form=".1%",
)
lesson.report("peak of a step here, largest error: ours, helpers.memory", f"{worst[0]:.1%}, {worst[1]:.1%}")


# %%
def fake_step(config: PretrainedConfig, batch: int, seq: int, checkpointing: bool, count=train_step) -> int:
    """Peak of a step in bf16 with fused AdamW, of a model that is never allocated."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
        if checkpointing:
            model.activation_checkpointing_enable()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        return count(model, optimizer, torch.zeros(batch, seq, dtype=torch.long))


qwen = config_of("Qwen/Qwen2.5-0.5B")

# %%
FAKE = [(2, 1024, False), (2, 1024, True), (1, 64, False), (8, 512, False), (1, 4096, True), (1, 8192, False)]
FAKE = FAKE[: lesson.scaled(len(FAKE), 2)]
rows, errors = {}, []
for batch, seq, checkpointing in FAKE:
    tracked = fake_step(qwen, batch, seq, checkpointing)
    phases = peak_bytes(qwen, 2, batch, seq, checkpointing, padded=True)
    options = {"batch_size": batch, "seq_len": seq, "gradient_checkpointing": checkpointing}
    library = estimate_training("Qwen/Qwen2.5-0.5B", device="cpu", **options).total
    label = f"{batch} x {seq}" + ", checkpointing" * checkpointing
    rows[label] = max(phases.values()), library, tracked, max(phases, key=phases.get)
table = {}
for label, (ours, library, tracked, moment) in rows.items():
    state = 8 * count_parameters(qwen)  # weights, gradients and two moments of 2 bytes
    errors.append((ours / tracked - 1, library / tracked - 1, state / tracked - 1))
    sizes = [f"{size / GIB:.2f}" for size in (ours, library, tracked)]
    table[label] = [*sizes, f"{errors[-1][0]:+.1%}", f"{errors[-1][1]:+.1%}", moment]
show_table(table, ["ours, GiB", "helpers.memory", "tracked", "ours", "helpers", "the peak is at the"])
*worst, of_state = [max(abs(found[i]) for found in errors) for i in range(3)]
lesson.claim(
    "both predictions are within 5 % of the tracked peaks of Qwen2.5-0.5B",
    max(worst),
    at_most=0.05,
    control=of_state,
    form=".1%",
)
lesson.report("peak of a step of Qwen2.5-0.5B, largest error: ours, helpers.memory", f"{worst[0]:.1%}, {worst[1]:.1%}")

# %%
figure, axes = plt.subplots(figsize=(plots.WIDTH, 3.4))
for place, (ours, library, tracked, _) in enumerate(rows.values()):
    axes.barh(place, tracked / GIB, height=0.6, color=plots.COLORS[5], label="tracked" if not place else None)
    axes.barh(place, 0.1 * tracked / GIB, left=0.95 * tracked / GIB, height=0.25, color=plots.GREY, alpha=0.5)
    axes.plot(ours / GIB, place, "o", color=plots.COLORS[1], label="our formula" if not place else None)
    axes.plot(library / GIB, place, "x", color=plots.INK, label="helpers.memory" if not place else None)
axes.set_yticks(range(len(rows)), rows)
axes.invert_yaxis()
axes.set_title("All predictions are within 5 % (grey)")
axes.set_xlabel("peak of a training step of Qwen2.5-0.5B (GiB)")
axes.grid(axis="y", visible=False)
axes.legend(loc="upper right")
alt = "Tracked peak and predictions of six steps: " + "; ".join(
    f"{label}: {r[2] / GIB:.1f} GiB tracked, {r[0] / GIB:.1f} by our formula" for label, r in rows.items()
)
plots.show(figure, alt)

# %% [markdown] tags=["further"]
# ## Beside section 5 · 132 steps of 22 models, and what other estimators say
#
# *Further: no core section needs this one.*
#
# Our formula knows one family, one optimiser and two formats. `helpers.memory` does the same for the others, with LoRA, QLoRA, autocast, eager attention, mixtures of experts and sharding: it performs the step on sizes, allocation by allocation. `data/memory_truth.json` holds 132 steps of 22 models from 0.1 to 13 B parameters, followed on fake tensors as above. The same cells show what three estimators say that people use: `accelerate estimate-memory`, DeepSpeed's formula for ZeRO-2 on one GPU, and EleutherAI's *Transformer Math 101* (Anthony et al. 2023). Those know full fine-tuning with Adam only, and the first two do not know the batch, so they appear on the 74 cells that they speak about.

# %%
from helpers.profiles import ROOT

cells = json.loads((ROOT / "data" / "memory_truth.json").read_text(encoding="utf-8"))["cells"]
pairs = {"helpers.memory": [], "accelerate": [], "deepspeed": [], "eleuther": [], "our formula": []}
for cell in cells:
    truth, options = cell["truth"]["total"], dict(cell["settings"])
    if "rank" in options:
        options["lora_rank"] = options.pop("rank")
    pairs["helpers.memory"].append((truth, estimate_training(cell["model"], device="cpu", **options).total))
    for other, value in cell["published"].items():
        pairs[other] += [(truth, value)] if value else []
    plain = {"batch_size", "seq_len", "gradient_checkpointing", "precision"} >= options.keys()
    config = config_of(cell["model"]) if plain and options.get("precision", "bf16") in DTYPES else None
    if config is not None and config.model_type in ("llama", "qwen2", "qwen3"):
        checkpointing = options.get("gradient_checkpointing", False)
        w = DTYPES[options.get("precision", "bf16")].itemsize
        phases = peak_bytes(config, w, options["batch_size"], options["seq_len"], checkpointing, padded=True)
        pairs["our formula"].append((truth, max(phases.values())))

# %%
errors = {who: [abs(said / truth - 1) for truth, said in found] for who, found in pairs.items()}
table = {
    who: [len(e), f"{statistics.median(e):.2%}", f"{max(e):.2%}", f"{sum(x < 0.05 for x in e) / len(e):.0%}"]
    for who, e in errors.items()
}
show_table(table, ["steps", "median error", "largest", "within 5 %"])
others = {
    who: statistics.median(found) for who, found in errors.items() if who in ("accelerate", "deepspeed", "eleuther")
}
for who in ("helpers.memory", "our formula"):
    lesson.claim(
        f"{who} is within 5 % on every step that it describes",
        max(errors[who]),
        at_most=0.05,
        control=min(others.values()),  # the median error of the best of the three rules
        form=".1%",
    )
recipes = ("bf16-mixed", "fp32", "fp16", "bf16")
rows = {}
for who in ("accelerate", "deepspeed", "eleuther"):
    found = {recipe: [] for recipe in recipes}
    for cell in cells:
        value, recipe = cell["published"].get(who), cell["settings"].get("precision", "bf16")
        if value and recipe in found:
            found[recipe].append(value / cell["truth"]["total"])
    rows[who] = [f"{statistics.median(e):.2f} ({len(e)})" if e else "-" for e in found.values()]
show_table(rows, [f"{recipe}: median ratio (steps)" for recipe in recipes])
for who, found in errors.items():
    lesson.report(f"{who}: {len(found)} steps, median error, within 5 %", ", ".join(table[who][i] for i in (1, 3)))

# %%
figure, axes = plt.subplots(figsize=(plots.WIDTH, 4.6))
shown = {"eleuther": (4, "^"), "deepspeed": (3, "s"), "accelerate": (1, "v"), "helpers.memory": (0, "o")}
for who, (color, marker) in shown.items():
    truth, said = zip(*pairs[who], strict=True)
    axes.plot(
        [t / GIB for t in truth],
        [s / t for s, t in zip(said, truth, strict=True)],
        marker,
        color=plots.COLORS[color],
        markersize=5,
        alpha=0.75,
        label=f"{who} ({sum(x < 0.05 for x in errors[who]) / len(errors[who]):.0%} within 5 %)",
    )
axes.axhspan(0.95, 1.05, color=plots.GREY, alpha=0.25, zorder=0)
axes.set(xscale="log", yscale="log", xlabel="tracked peak of the step (GiB)", ylabel="predicted / tracked")
axes.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
axes.yaxis.set_minor_formatter(lambda *_: "")
axes.set_title("Performing the step predicts all 132 peaks")
axes.legend(loc="lower right", fontsize=8.5)
alt = "Predicted divided by tracked peak over the tracked peak. " + "; ".join(
    f"{who}: {table[who][0]} steps, median error {table[who][1]}, largest {table[who][2]}" for who in shown
)
plots.show(figure, alt)

# %% [markdown]
# **What you see.** accelerate's estimate counts no activations, and is too low for most steps. DeepSpeed's and EleutherAI's are mostly too high, and the second table says why: they assume mixed precision, 16 to 20 bytes a parameter, where most steps of our table had less. On the steps in mixed precision EleutherAI's rule comes close. So ask of an estimator first which recipe it is about. (`helpers.memory` was written beside these steps, and both are computed on sizes alone; on a GPU profile, what the board says is the column `max_memory_allocated` of section 5's first table.)
#
# **The same counted by torch.** torch has a counter of its own, which also says what belongs to which module, and takes its time.

# %%
from torch.distributed._tools.mem_tracker import MemTracker


def mem_tracker_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> int:
    """The same, counted by torch's MemTracker."""
    state_of(optimizer)
    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer, ids)
    with tracker:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


start = time.perf_counter()
tested = copy.deepcopy(qwen)
tested.num_hidden_layers = lesson.scaled(qwen.num_hidden_layers)
theirs, middle = fake_step(tested, 2, 1024, False, mem_tracker_step), time.perf_counter()
ours, end = fake_step(tested, 2, 1024, False), time.perf_counter()
print(f"MemTracker {theirs / GIB:.3f} GiB in {middle - start:.1f} s, Live {ours / GIB:.3f} GiB in {end - middle:.1f} s")
lesson.equal("our counter says the same as torch's MemTracker, to 0.1 %", abs(ours / theirs - 1), within=0.001)

# %% [markdown] tags=["core"]
# ## 6 · The cache of generation
#
# **Question.** Inference has no gradients. What grows there?
#
# To produce one token, attention needs the keys and values of all tokens before it. They are kept in the *KV cache*: two tensors in each layer, of $k = a_{kv} d$ numbers for each token.
#
# $$\text{KV cache} = 2 \cdot L \cdot a_{kv} \cdot d \cdot s \cdot b \cdot w$$
#
# For Llama-3 8B ($L = 32$, $a_{kv} = 8$, $d = 128$) at $s = 8192$ in 16 bit: $2 \cdot 32 \cdot 8 \cdot 128 \cdot 8192 \cdot 2 = 2^{30}$ bytes, exactly 1 GiB for each conversation.

# %%
from helpers.memory import estimate_inference


def kv_cache(config: PretrainedConfig, context: int, batch: int, w: int) -> int:
    """Bytes of keys and values."""
    return 2 * config.num_hidden_layers * widths(config)[1] * context * batch * w


rows, length = 2, 48
with torch.no_grad():
    cache = base(random_batch(base.config, rows, length), use_cache=True).past_key_values
found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
ours = kv_cache(base.config, length, rows, base.dtype.itemsize)
print(f"here, {rows} x {length} tokens: {ours:,} bytes by the formula, {found:,} in the model's cache")
llama3 = config_of("meta-llama/Meta-Llama-3-8B")
eight = kv_cache(llama3, 8192, 1, 2)
library = estimate_inference("meta-llama/Meta-Llama-3-8B", context_len=8192).kv_cache
print(f"Llama-3 8B at 8,192 tokens: {eight:,} bytes = {eight / GIB} GiB; helpers.memory {library / GIB} GiB")

# %%
lesson.equal(
    "formula, model and helpers.memory agree to the byte",
    max(abs(ours - found), abs(eight - library), abs(library - GIB)),
)
lesson.report("KV cache of Llama-3 8B at 8,192 tokens, GiB", f"{eight / GIB:.3f}")

several = ["meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-0.5B"]
contexts = [1024 * 2**n for n in range(8)]
series = {}
for model_name in several:
    config = config_of(model_name)
    label = f"{model_name.split('/')[-1]}: {config.num_key_value_heads} of {config.num_attention_heads} heads"
    series[label] = contexts, [kv_cache(config, n, 1, 2) / GIB for n in contexts]
figure = plots.curve(
    series,
    title="Llama-3 8B: a quarter of the heads, a quarter of the cache",
    xlabel="tokens of context, one sequence",
    ylabel="KV cache in 16 bit (GiB)",
    log_x=True,
    log_y=True,
)
alt = "KV cache over context. " + "; ".join(
    f"{label}: {y[-1]:.1f} GiB at {x[-1]:,}" for label, (x, y) in series.items()
)
plots.show(figure, alt)

# %% [markdown] tags=["core"]
# ## 7 · Which model fits which GPU
#
# **Question.** What can be done with a V100 of 16 GB, a T4, an A100, an RTX PRO 6000 (Colab's G4), an H200? (An H100 has 80 GB as well, and holds what an A100 of 80 GB holds.)
#
# Everything is there to compute the table. Four things to do with a model:
#
# - **I**, inference: weights in 16 bit, one conversation of 2,048 tokens;
# - **F**, full training: autocast, 16 bytes a parameter, AdamW, one sequence of 1,024 tokens, checkpointing;
# - **L**, LoRA: frozen weights in 16 bit, adapters of rank 16 on all matrices;
# - **Q**, QLoRA: frozen weights in 4 bit, the same adapters, paged 8-bit AdamW.
#
# We use fp16, since V100 and T4 have no bf16; the bytes are the same. Beside what torch allocates a GPU holds the CUDA context, and the allocator loses some memory in pieces that nothing fits in. `Estimate.overhead` puts that at 0.5 GiB and 4 %. It is a rule of thumb, not a measurement. `fits` includes it. What it is compared with is what CUDA offers a process: 14.56 GiB on a T4 whose board has 15, 15.77 on a V100 of 16 GB, as out-of-memory messages of PyTorch print it (`data/gpus.json`).

# %%
from helpers.memory import GPUS

MODELS = [
    *("Qwen/Qwen3-0.6B-Base", "llm-jp/llm-jp-3-980m", "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-1.7B-Base"),
    *("meta-llama/Llama-3.2-3B", "meta-llama/Llama-2-7b-hf", "meta-llama/Meta-Llama-3-8B"),
    *("meta-llama/Llama-2-13b-hf", "Qwen/Qwen2.5-32B", "meta-llama/Llama-2-70b-hf"),
]
BOARDS = ["V100-16GB", "T4", "A10G", "A100-40GB", "A100-80GB", "RTX PRO 6000", "H200"]
TRAINING = {"batch_size": 1, "seq_len": 1024, "gradient_checkpointing": True}
USES = {
    "I": lambda m: estimate_inference(m, precision="fp16", context_len=2048),
    "F": lambda m: estimate_training(m, precision="fp16-mixed", **TRAINING),
    "L": lambda m: estimate_training(m, method="lora", precision="fp16", **TRAINING),
    "Q": lambda m: estimate_training(m, method="qlora", precision="fp16", optimizer="paged_adamw_8bit", **TRAINING),
}
needs = {model_name: {use: run(model_name) for use, run in USES.items()} for model_name in MODELS}
table = {}
for model_name, estimates in needs.items():
    billions = ModelShape.from_config(model_name).num_parameters / 1e9
    sizes = [f"{(e.total + e.overhead) / GIB:.1f}" for e in estimates.values()]
    table[model_name.split("/")[-1]] = [f"{billions:.2f}", *sizes]
show_table(table, ["B parameters", "inference", "full training", "LoRA", "QLoRA"])
print("GiB with context and fragmentation. The GPUs offer:", end=" ")
print(", ".join(f"{board} {GPUS[board].memory / GIB:.2f}" for board in BOARDS))

# %% tags=["headline"]
fits = {m: {g: [u for u in USES if needs[m][u].fits(g)] for g in BOARDS} for m in MODELS}
counts = [[len(fits[m][g]) for g in BOARDS] for m in MODELS]
figure, axes = plt.subplots(figsize=(plots.WIDTH, 4.8))
axes.imshow(counts, cmap="Blues", vmin=0, vmax=6, aspect="auto")
for row, model_name in enumerate(MODELS):
    for column, board in enumerate(BOARDS):
        axes.text(column, row, " ".join(fits[model_name][board]) or "none", ha="center", va="center")
labels = [f"{m.split('/')[-1]} ({ModelShape.from_config(m).num_parameters / 1e9:.1f} B)" for m in MODELS]
axes.set_yticks(range(len(MODELS)), labels)
names = [g.replace("RTX ", "RTX\n") + f"\n{GPUS[g].memory / GIB:.0f} GiB" for g in BOARDS]
axes.set_xticks(range(len(BOARDS)), names, fontsize=8.5)
axes.xaxis.tick_top()
axes.tick_params(length=0)
axes.grid(visible=False)
axes.set_title("What fits: I inference, F full training, L LoRA, Q QLoRA")
alt = "Uses that fit, by GPU. " + "; ".join(
    f"{g}: " + ", ".join(f"{m.split('/')[-1]} {''.join(fits[m][g]) or 'none'}" for m in MODELS) for g in BOARDS
)
plots.show(figure, alt)


# %%
def largest(board: str, use: str) -> tuple[float, str]:
    """Billions of parameters and name of the largest model of the table with which this fits."""
    return max(
        (ModelShape.from_config(m).num_parameters / 1e9, m.split("/")[-1]) for m in MODELS if use in fits[m][board]
    )


for board in ("V100-16GB", "T4", "H200"):
    text = ", ".join(f"{use} {largest(board, use)[1]} ({largest(board, use)[0]:.1f} B)" for use in USES)
    print(f"{board}, largest of the table: {text}")


# %%
def share(model_name: str, use: str, board: str) -> float:
    """What this use of the model takes, as a share of what the board offers."""
    estimate = needs[model_name][use]
    return (estimate.total + estimate.overhead) / GPUS[board].memory


whole = [estimate_inference(m, precision="fp32", context_len=2048).fits("V100-16GB") for m in MODELS]
in_fp32 = max(ModelShape.from_config(m).num_parameters / 1e9 for m, fit in zip(MODELS, whole, strict=True) if fit)
lesson.claim(
    "a V100 with 16 GB holds about 7 B for inference in 16 bit",
    largest("V100-16GB", "I")[0],
    at_least=6.5,
    at_most=8.5,
    control=in_fp32,  # the largest one with 4 bytes a parameter
    form=".1f",
)
with_lora, with_qlora = largest("T4", "L")[0], largest("T4", "Q")[0]
lesson.claim("QLoRA trains 7 B or more on a T4", with_qlora, at_least=6.5, control=with_lora, form=".1f")
small = "llm-jp/llm-jp-3-980m"
lesson.claim(
    "full training of 1 B takes more than a T4 offers, by at least 5 %",
    share(small, "F", "T4"),
    at_least=1.05,
    control=share(small, "L", "T4"),  # the same with LoRA
    form=".0%",
)
lesson.report(
    "full training of llm-jp-3 980 M, share of what a V100 with 16 GB offers",
    share(small, "F", "V100-16GB"),
    form=".1%",
)
for use, what in {"I": "inference", "F": "full training", "L": "LoRA", "Q": "QLoRA"}.items():
    names = [f"{board} {largest(board, use)[0]:.1f}" for board in ("V100-16GB", "T4", "A100-80GB", "H200")]
    lesson.report(f"largest model of the table for {what}, B parameters", ", ".join(names))


# %% [markdown]
# **What you see.** A V100 with 16 GB holds about 7 B for inference. Full training of the 980 M model is at the edge of the V100: by our estimate it takes 100.5 % of it (the table at the end); of a T4 it takes 109 %, the last line above. The rule of thumb for context and fragmentation may be off by some percent, and so close to 100 % it decides nothing. The same holds for inference and LoRA of Llama-2 7B on a T4 (14.8 and 14.7 GiB of 14.56) for LoRA of 70 B on an H200 (138.6 of 139.72), and for QLoRA of 32 B on an A10G (22.2 of 22.20). The next smaller model of the table fits easily, and one sequence of 1,024 tokens is all that we asked for.

# %% [markdown]
# **More than one GPU.** Data parallelism keeps the whole state on every GPU. ZeRO (Rajbhandari et al. 2020) divides it among $N$ GPUs in three stages: the optimiser's bytes, then also the gradients, then also the weights. With the classical recipe of section 2 (2 + 2 + 12 bytes, the 12 with the fp32 copy of the weights) a GPU then holds
#
# $$16 P \;\to\; \Big(4 + \frac{12}{N}\Big) P \;\to\; \Big(2 + \frac{14}{N}\Big) P \;\to\; \frac{16}{N} P$$
#
# The paper's example is 7.5 B parameters on 64 GPUs. With autocast the parts are 4 + 4 + 8 bytes, so the stages are $16$, $8 + \frac{8}{N}$, $4 + \frac{12}{N}$ and $\frac{16}{N}$. The table below is about autocast in both of its columns. The formula counts the state only. `helpers.memory` adds the activations, what a stage-3 step gathers, and the 16-bit copies that autocast makes of all weights.

# %%
RECIPES = {"classical": (2, 2, 12), "autocast": (4, 4, 8)}  # bytes of a parameter's weight, gradient, optimiser


def zero_bytes(parameters: float, stage: int, gpus: int, recipe: str) -> float:
    """Bytes of weights, gradients and optimiser on each GPU: a stage divides the last `stage` of the three."""
    each = RECIPES[recipe]
    divided = [width / gpus if place >= 3 - stage else width for place, width in enumerate(each)]
    return parameters * sum(divided)


stages = [round(zero_bytes(7.5e9, stage, 64, "classical") / 1e9, 1) for stage in range(4)]
print("7.5 B parameters on 64 GPUs, stages 0 to 3:", " -> ".join(f"{size} GB" for size in stages))
lesson.equal(
    "these are the paper's 120, 31.4, 16.6 and 1.9 GB",
    sum(a != b for a, b in zip(stages, [120.0, 31.4, 16.6, 1.9], strict=True)),
)
table = {}
for stage in range(4):
    devices = 8 if stage else 1
    options = {"precision": "bf16-mixed", "zero_stage": stage, "num_gpus": devices, **TRAINING}
    estimate = estimate_training("meta-llama/Llama-2-7b-hf", **options)
    parameters = ModelShape.from_config("meta-llama/Llama-2-7b-hf").num_parameters
    state = zero_bytes(parameters, stage, devices, "autocast")
    fitting = [g for g in ("A100-40GB", "A100-80GB", "H200") if estimate.fits(g)]
    sizes = [f"{size / GIB:.1f}" for size in (state, 2 * parameters, estimate.total)]
    row = [*sizes, estimate.phase, ", ".join(fitting) or "none"]
    table[f"stage {stage}, {devices} GPU" + "s" * (devices > 1)] = row
print("\nLlama-2 7B:")
show_table(table, ["state, GiB", "16-bit copies, GiB", "peak, GiB", "phase of the peak", "fits"])
lesson.report("7.5 B on 64 GPUs, GB each at ZeRO stages 0 to 3", ", ".join(map(str, stages)))

# %% [markdown]
# **It does not fit. What now?** Changes have prices, so take the cheapest first: a chunked loss costs nothing in the result, checkpointing costs time, a smaller batch with accumulation costs parallel work, an 8-bit optimiser costs precision of the moments, LoRA restricts what can be learned, and 4-bit weights are less exact. `recommend` tries them in this order, stops when it fits, and drops those that turned out not to be needed. The worked example: "How do I train a 7 B model on a T4?"

# %%
from helpers.memory import max_batch_size, max_context, recommend

plan = {"seq_len": 1024, "batch_size": 8, "precision": "fp16-mixed"}
advice = recommend("meta-llama/Llama-2-7b-hf", "T4", **plan)
print(advice)
filled = [(e.total + e.overhead) / GPUS["T4"].memory for e in (advice.start, advice.estimate)]
asked, advised = filled
lesson.claim("Llama-2 7B as asked takes more than a T4 offers", asked, at_least=1, control=advised, form=".0%")
lesson.claim("the advice makes Llama-2 7B fit a T4", advised, at_most=1, control=asked, form=".0%")
chosen = plan | {key: value for change in advice.changes for key, value in change.settings.items()}
print("\nparts at the peak, in GiB:")
for part in advice.estimate.parts:
    print(f"  {part:<12}{advice.start.parts[part] / GIB:>8.1f} -> {advice.estimate.parts[part] / GIB:.2f}")
lesson.report(
    "Llama-2 7B on a T4, without context and fragmentation: as asked, after the advice (GiB)",
    f"{advice.start.total / GIB:.0f}, {advice.estimate.total / GIB:.1f}",
)
rest = {key: value for key, value in chosen.items() if key != "batch_size"}
print(f"\nlargest batch then: {max_batch_size('meta-llama/Llama-2-7b-hf', 'T4', **rest)} sequences")


# %% [markdown] tags=["further"]
# ## Beside section 7 · What FSDP2 really keeps
#
# *Further: no core section needs this one.*
#
# By the table, 16-bit copies are half of stage 3's peak: 12.6 of 25.1 GiB. Does autocast really keep them all? The script below asks autograd. Two processes divide a small Llama with `fully_shard`, which is stage 3. In one run the weights are in fp32 and the forward pass is under `torch.autocast`; in the other a `MixedPrecisionPolicy` gathers them in bf16. After the forward pass we count the bytes of gathered weights that are still kept for the backward pass.

# %%
SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

dist.init_process_group("gloo")
sizes = dict(hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=4, vocab_size=512)
for how in ("autocast", "policy"):
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    parameters = sum(p.numel() for p in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if how == "policy" else MixedPrecisionPolicy()
    for layer in [*model.model.layers, model]:
        fully_shard(layer, mp_policy=policy)
    kept, ids = {}, torch.zeros(1, 8, dtype=torch.long)

    def pack(tensor):  # weights have two sides of at least 256, activations of 8 tokens do not
        if tensor.ndim == 2 and min(tensor.shape) >= 256:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            model(input_ids=ids, labels=ids, use_cache=False)
    if dist.get_rank() == 0:
        print(how, sum(storage.nbytes() for storage in kept.values()) / parameters)
dist.destroy_process_group()
"""

# %%
import subprocess

script = ROOT / "build" / "lesson_07" / "sharded.py"
script.parent.mkdir(parents=True, exist_ok=True)
script.write_text(SHARDED, encoding="utf-8")
command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
assert done.returncode == 0, done.stderr[-2000:]
copies = {how: float(value) for how, value in map(str.split, done.stdout.splitlines())}
print("gathered weights kept for the backward pass, bytes a parameter on each process:", copies)
lesson.claim(
    "under autocast FSDP2 keeps a 16-bit copy of nearly all weights until the backward pass",
    copies["autocast"],
    at_least=1.5,
    control=copies["policy"],  # gathered in bf16 instead, and given back after each layer
    form=".2f",
)

# %% [markdown]
# **What you see.** Yes. Autocast saves its copy of each gathered weight for the backward pass, so after the forward pass every process holds nearly the whole model in 16 bits, although it owns a part only. With the policy each layer is given back after its use and gathered again in the backward pass. This is why training scripts for FSDP2 set `mp_policy` and leave autocast out; at stage 3 most of the column *16-bit copies* should then come off the peak.

# %% [markdown] tags=["further"]
# ## 8 · The calculator
#
# *Further: no core section needs this one.*
#
# The sliders below call the same functions. They appear where something can show them (Jupyter, Colab, VS Code). Below them the same cell does it with plain parameters: `calculator_model` and `calculator_gpu` stand in the parameters cell at the top. On a command line it is `python -m helpers.memory Qwen/Qwen2.5-7B --method qlora --gpu T4`.


# %%
def calculate(model_name: str, gpu: str, method: str, batch_size: int, seq_len: int, checkpointing: bool) -> None:
    """Print the parts of a training step, and what would make it fit."""
    precision = "fp16-mixed" if method == "full" else "fp16"
    options = {"method": method, "batch_size": batch_size, "seq_len": seq_len, "precision": precision}
    options |= {"gradient_checkpointing": checkpointing}
    estimate = estimate_training(model_name, **options)
    print(estimate)
    print("fits" if estimate.fits(gpu) else "does not fit", f"in the {GPUS[gpu].memory / GIB:.1f} GiB of a {gpu}")
    if not estimate.fits(gpu):
        print(recommend(model_name, gpu, **options))


frontend = {"JPY_SESSION_NAME", "COLAB_RELEASE_TAG"} & os.environ.keys() or "__vsc_ipynb_file__" in globals()
if frontend:
    from ipywidgets import Dropdown, IntSlider, interact

    interact(
        calculate,
        model_name=Dropdown(options=sorted(bundled_shapes()), value=calculator_model),
        gpu=Dropdown(options=list(GPUS), value=calculator_gpu),
        method=Dropdown(options=["full", "lora", "qlora"], value="qlora"),
        batch_size=IntSlider(1, min=1, max=64, continuous_update=False),
        seq_len=IntSlider(1024, min=128, max=8192, step=128, continuous_update=False),
        checkpointing=True,
    )
else:
    print("There is nothing here that could show sliders: here is the same without.\n")

for method in ("full", "qlora"):
    calculate(calculator_model, calculator_gpu, method, batch_size=1, seq_len=1024, checkpointing=True)
    print()
longest = max_context(calculator_model, calculator_gpu, inference=True, quantization="nf4")
print(f"4-bit inference on a {calculator_gpu}: up to {longest:,} tokens of context")

# %% [markdown] tags=["core"]
# ## 9 · How fast: the roofline
#
# **Question.** It fits. How fast will it run?
#
# A processor does two things: it moves bytes from memory, at $\beta$ bytes a second, and it computes, at $\pi$ operations (FLOP) a second. Work that needs $F$ operations and moves $M$ bytes takes at least $\max(F/\pi,\ M/\beta)$, since the two overlap at best. Divide by the work, and it depends on one property, the *arithmetic intensity* $I = F/M$ (Williams, Waterman and Patterson 2009):
#
# $$\text{rate} \le \min(\pi,\ \beta I)$$
#
# Plotted over $I$ this is a roof: a slope where memory is the limit, a flat part where computing is. The edge is at $I^* = \pi / \beta$.
#
# First measure the two numbers of this machine: $\beta$ by copying a large block (it is read and written; on a server the largest cache may hold a part of it), $\pi$ by a product of large matrices.
#
# **The model's two kinds of work.** *Prefill* reads a prompt: all its tokens at once. *Decoding* makes one token for each sequence, and needs all weights for it. Each weight is used for one multiplication and one addition for each token, and is read once for all of them. With $b$ sequences, $t$ new tokens each and $c$ tokens in the cache:
#
# $$F \approx 2\,P_{\text{mat}}\, b\,t + 4\,L\,q\,b\,t\,\big(c + \tfrac{t}{2}\big) \qquad M \approx w\,P_{\text{mat}} + \text{KV cache}$$
#
# $P_{\text{mat}}$ are the parameters that take part in products: without an embedding, which is only looked up. So a decoding step with a short context has an intensity of about $2b/w$: half a FLOP for each byte at $b = 1$ in fp32. A prefill has up to that times $t$ (less here, since only the last token passes through the output matrix). This is the main reason why prefill is fast, decoding slow, and batching cheap; the measurement shows what it leaves out.
#
# shima-4m is so small that its weights stay in a CPU's cache. To see the memory at work, the cpu profile measures a second model besides: two layers of the shape of TinyLlama, with random weights, since speed does not depend on what the weights are.
#
# **Batch size.** The weights are read once for all sequences of a batch. So below the edge a larger batch should, by the roofline, cost hardly any time; above the edge it costs computing. A larger batch also makes each sequence wait longer for its next token, since a step is over for all at the same time. The dashed lines are the roofline's prediction from four numbers: bytes, operations and this machine's two rates.

# %%
dtype = DTYPES["fp32" if machine.device == "cpu" else half]
torch.set_num_threads(1)


def device_rates(mebibytes: int = 256, size: int = 1024 if machine.device == "cpu" else 8192) -> tuple[float, float]:
    """Bytes a second by a copy, operations a second by a matrix product."""
    source = torch.ones(mebibytes * 2**20 // dtype.itemsize, device=machine.device, dtype=dtype)
    target = torch.zeros_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source), 15)
    left, right = (torch.randn(size, size, device=machine.device, dtype=dtype) for _ in range(2))
    return bandwidth, 2 * size**3 / seconds(lambda: left @ right, 15)


bandwidth, rate = device_rates()
edge = rate / bandwidth
print(f"this machine in {dtype}: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:,.0f} GFLOP/s; edge at {edge:.1f} FLOP/byte")
lesson.report("this machine: GB/s, GFLOP/s, edge in FLOP/byte", f"{bandwidth / 1e9:.1f}, {rate / 1e9:,.0f}, {edge:.1f}")


# %%
def work(config: PretrainedConfig, w: int, batch: int, new: int, cached: int = 0) -> tuple[float, float]:
    """FLOP and bytes of a forward pass that gives the next token of each sequence."""
    h, layers, (q, k) = config.hidden_size, config.num_hidden_layers, widths(config)
    per_layer = 2 * h * q + 2 * h * k + 3 * h * config.intermediate_size
    output = config.vocab_size * h  # only for the last token
    flops = 2 * batch * (new * layers * per_layer + output)
    flops += 4 * layers * q * batch * new * (cached + new / 2)  # scores, and the sum of the values
    moved = w * (layers * per_layer + output) + kv_cache(config, cached + new, batch, w)
    return flops, moved


@torch.inference_mode()
def decoding_time(model: nn.Module, batch: int, prompt: int, steps: int = 8) -> float:
    """Seconds of the fastest of some decoding steps after a short prompt."""
    ids = random_batch(model.config, batch, prompt)
    times = []
    cache = None
    for _ in range(1 + steps):
        start = clock()
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)  # (batch, 1)
        ids.tolist()  # waits for the device
        times.append(clock() - start)
    return min(times[1:])


# %%
small = copy.deepcopy(base).to(dtype).eval()
models = {name: small}
if settings["big"] and not model_id:
    config = config_of(settings["big"])
    config.num_hidden_layers, config.tie_word_embeddings = 2, True
    models["TinyLlama, 2 layers"] = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
big_name = list(models)[-1]
speeds = {}  # name, batch -> seconds of a decoding step
points = []  # name, kind, FLOP, bytes, seconds
for label, model in models.items():
    prompt = 256 if machine.device == "cpu" else 1024
    prompt = min(prompt, model.config.max_position_embeddings // 2)
    with torch.inference_mode():
        ids = random_batch(model.config, 1, prompt)
        duration = seconds(lambda m=model, i=ids: m(i, use_cache=True, logits_to_keep=1).logits.sum().item(), 2)
    points.append((label, f"prefill of {prompt}", *work(model.config, dtype.itemsize, 1, prompt), duration))
    for batch in settings["batches"]:
        duration = speeds[label, batch] = decoding_time(model, batch, 8)
        points.append((label, f"decoding {batch}", *work(model.config, dtype.itemsize, batch, 1, 9), duration))
table = {}
for label, kind, flops, moved, duration in points:
    roof = min(rate, bandwidth * flops / moved)
    row = [
        f"{flops / moved:.1f}",
        f"{flops / duration / 1e9:.2f}",
        f"{roof / 1e9:.2f}",
        f"{flops / duration / roof:.0%}",
    ]
    table[f"{label}, {kind}"] = [*row, "memory" if flops / moved < edge else "computing"]
show_table(table, ["FLOP/byte", "GFLOP/s", "roof", "reached", "limit by the roofline"])

# %%
figure, axes = plt.subplots(figsize=(plots.WIDTH, 4.6))
span = [min(p[2] / p[3] for p in points) / 2, max(max(p[2] / p[3] for p in points), edge) * 2]
grid = [span[0] * (span[1] / span[0]) ** (n / 100) for n in range(101)]
axes.plot(grid, [min(rate, bandwidth * x) / 1e9 for x in grid], color=plots.INK, label="roof, measured")
axes.axvline(edge, color=plots.GREY, linestyle=(0, (4, 3)), linewidth=1)
for color, label in enumerate(models):
    for kind, marker in (("prefill", "s"), ("decoding", "o")):
        chosen = [p for p in points if p[0] == label and p[1].startswith(kind)]
        xy = [p[2] / p[3] for p in chosen], [p[2] / p[4] / 1e9 for p in chosen]
        axes.plot(*xy, marker, color=plots.COLORS[color], label=f"{label}, {kind}")
        for x, y, (_, text, *_) in zip(*xy, chosen, strict=True):
            axes.annotate(text.split()[-1], (x, y), (0, -13), textcoords="offset points", ha="center", fontsize=8)
axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity (FLOP/byte)", ylabel="GFLOP/s")
axes.set_title("A larger batch moves decoding to the right; prefill comes nearest the roof")
axes.legend(loc="lower right", fontsize=8.5)
alt = f"Roofline, its edge at {edge:.1f} FLOP/byte; the numbers at the points are batch or prompt. "
alt += "; ".join(f"{p[0]} {p[1]}: {p[2] / p[3]:.1f} FLOP/byte, {p[2] / p[4] / 1e9:.1f} GFLOP/s" for p in points)
plots.show(figure, alt)

# %%
rates = {kind: flops / duration for label, kind, flops, _, duration in points if label == big_name}
one = next(point for point in points if point[:2] == (big_name, "decoding 1"))
prefill = next(value for kind, value in rates.items() if kind.startswith("prefill"))
crowd = rates[f"decoding {settings['batches'][-1]}"]
reached = one[3] / one[4] / bandwidth
print(
    f"{big_name} decodes one sequence at {one[3] / one[4] / 1e9:.1f} GB/s, {reached:.0%} of the copy's rate;", end=" "
)
print(f"prefill computes {prefill / rates['decoding 1']:.1f} times as fast")
lesson.claim(
    "a prefill computes more than 3 times as fast as decoding one sequence",
    prefill / rates["decoding 1"],
    at_least=3,
    control=prefill / crowd,  # decoding too, but of many sequences: it is the intensity that counts
    form=".1f",
)
lesson.report(f"{big_name}: share of the copy's rate reached in decoding", reached, form=".0%")

# %%
batches, config, predicted = settings["batches"], models[big_name].config, {}
for batch in batches:
    flops, moved = work(config, dtype.itemsize, batch, 1, 9)
    predicted[batch] = max(flops / rate, moved / bandwidth)
now = {batch: speeds[big_name, batch] for batch in batches}

# %%
figure, panels = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.6))
for axes, label, value in (
    (panels[0], "tokens per second, all sequences", lambda b, t: b / t),
    (panels[1], "time of a token (ms)", lambda b, t: 1e3 * t),
):
    axes.plot(batches, [value(b, now[b]) for b in batches], "o-", label="measured")
    axes.plot(batches, [value(b, predicted[b]) for b in batches], "--", color=plots.GREY, label="roofline")
    axes.set(xscale="log", yscale="log", xlabel="sequences in the batch", ylabel=label)
    axes.set_xticks(batches, batches)
    axes.minorticks_off()
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
panels[0].legend()
panels[0].set_title("Batching: more tokens for the same bytes")
table = {
    f"batch {b}": [
        f"{b / now[b]:.0f}",
        f"{now[b] * 1e3:.1f}",
        f"{predicted[b] * 1e3:.1f}",
        f"{now[b] / predicted[b]:.1f}",
    ]
    for b in batches
}
alt = "Tokens per second and time of a token over the batch size. " + "; ".join(
    f"{row}: {cells[0]} tokens/s, {cells[1]} ms, roofline {cells[2]} ms" for row, cells in table.items()
)
plots.show(figure, alt)
show_table(table, ["tokens/s", "ms a token", "roofline, ms", "ratio"])
last, slower = batches[-1], now[batches[-1]] / now[1]


# %%
@torch.inference_mode()
def reading_gain(prompts: int = 8, length: int = 64) -> float:
    """How many times the tokens a second a prefill of several prompts reads, compared with one prompt."""
    model = models[big_name]
    single, several = random_batch(model.config, 1, length), random_batch(model.config, prompts, length)
    times = [seconds(lambda ids=ids: model(ids, logits_to_keep=1).logits.sum().item(), 2) for ids in (single, several)]
    return prompts * times[0] / times[1]


lesson.claim(
    f"decoding in a batch of {last} gives more than 4 times the tokens of batch 1",
    last / slower,
    at_least=4,
    control=reading_gain(),  # batching where there are many tokens already
    form=".1f",
)
over = [now[b] / predicted[b] for b in batches]
lesson.report("roofline: time of a step over its prediction, smallest and largest", f"{min(over):.2f}, {max(over):.2f}")
lesson.report(
    f"{big_name}, batch {last} against 1: tokens/s, time of a token", f"{last / slower:.1f} x, {slower:.1f} x"
)
torch.set_num_threads(threads)
models = small = model = None

# %% [markdown]
# **What you see.** The column of ratios says how far two rates and a count explain the times. A batch of 4 should cost what a batch of 1 costs, and on a CPU it costs clearly more: products of a few rows reach neither of the two roofs, and calling the operations takes time too. On a GPU, where the work of a small step takes microseconds, the calling weighs more. That is why serving systems record the operations of a decoding step and replay them (CUDA graphs), and why a tiny model is not faster in proportion.

# %% [markdown] tags=["core"]
# ## 10 · How fast a 7 B model decodes on a GPU
#
# **Question.** What do a T4, an A100 and an H100 reach at best?
#
# One token needs all weights and the cache of its conversation. So bandwidth divided by those bytes bounds the tokens a second of one conversation, whatever the software. From the data sheets:

# %%
SPEED_MODEL = "Qwen/Qwen2.5-7B"
config7 = config_of(SPEED_MODEL)


def bytes_read(batch: int, context: int, quantization: str | None) -> int:
    """Bytes of a decoding step: all weights but an embedding that is looked up, and the caches."""
    weights = estimate_inference(SPEED_MODEL, quantization=quantization).parameters
    lookup = 0 if config7.tie_word_embeddings else 2 * config7.vocab_size * config7.hidden_size
    return weights - lookup + kv_cache(config7, context, batch, 2)


table, bound = {}, {}
for board in ("T4", "A100-80GB", "H100-SXM", "H200"):
    gpu = GPUS[board]
    row = []
    for quantization in (None, "nf4"):
        read = bytes_read(1, 2048, quantization)
        bound[board, quantization] = gpu.bandwidth * 1e9 / read
        there = estimate_inference(SPEED_MODEL, context_len=2048, quantization=quantization).fits(gpu)
        row += [f"{bound[board, quantization]:.0f}" + ("" if there else " (does not fit)")]
    table[board] = [gpu.bandwidth, *row, f"{gpu.tflops['fp16'] * 1e12 / gpu.bandwidth / 1e9:.0f}"]
print(f"{SPEED_MODEL}: {bytes_read(1, 2048, None) / 1e9:.2f} GB a token in 16 bit,", end=" ")
print(f"{bytes_read(1, 2048, 'nf4') / 1e9:.2f} GB in 4 bit, at 2,048 tokens of context\n")
show_table(table, ["GB/s", "tokens/s at most, 16 bit", "4 bit", "edge: FLOP/byte"])
bounds = bound["H100-SXM", None] / bound["A100-80GB", None]
lesson.equal("the bounds stand to each other as the bandwidths", abs(bounds / (3350 / 2039) - 1), within=1e-9)
lesson.report(
    "7 B at batch 1, 16 bit, tokens/s at most: A100, H100",
    f"{bound['A100-80GB', None]:.0f}, {bound['H100-SXM', None]:.0f}",
)

# %% [markdown]
# **What you see.** An H100 can compute hundreds of operations for each byte that it reads; decoding one sequence in 16 bit asks for one. So more than 99 % of what it can compute is idle, and only bandwidth counts. Four bits bring a factor of about 3, not 4: the output matrix stays in 16 bit, and so does the cache. (The bound assumes that unpacking the 4-bit weights costs nothing, which real kernels do not quite reach.)

# %% [markdown] tags=["further"]
# ## 11 · Energy, cost and carbon
#
# *Further: no core section needs this one.*
#
# **Question.** What does it cost to answer a million tokens, and what did it cost to train the model?
#
# With $r$ tokens a second, power $p$ (watts), a price $c$ per hour and carbon intensity $g$ (grams per kWh):
#
# $$E = \frac{p \cdot u}{r} \text{ joules a token} \qquad \text{cost} = \frac{10^6\, c}{3600\, r} \qquad \text{carbon} = \frac{10^6\, E}{3.6 \cdot 10^6}\, g$$
#
# per million tokens. What is assumed, and easy to change in the cell: the board takes all of its rated power (an upper bound); the data centre needs $u = 1.2$ times that for cooling; real software reaches 60 % of the roofline; prices per hour are round numbers of the size that clouds asked in 2025, not a quotation. The carbon intensity is a parameter at the top. Values for 2023, in grams of CO2 equivalent over the whole life of a power plant, per kWh: world 481, India 713, Germany 381, France 56, Norway 30 (Ember; Our World in Data).

# %%
USD_PER_HOUR = {"T4": 0.40, "A100-80GB": 2.0, "H100-SXM": 3.0, "H200": 4.0}  # assumed
REACHED, COOLING = 0.6, 1.2  # assumed


def per_million(board: str, batch: int, context: int = 2048, quantization: str | None = None) -> dict[str, float]:
    """What a million decoded tokens take."""
    gpu = GPUS[board]
    flops, _ = work(config7, 2, batch, 1, context)
    at_best = max(flops / gpu.tflops["fp16"] / 1e12, bytes_read(batch, context, quantization) / gpu.bandwidth / 1e9)
    rate = REACHED * batch / at_best  # tokens per second
    kwh = gpu.power * COOLING / rate * 1e6 / 3.6e6
    dollars = USD_PER_HOUR[board] / 3600 / rate * 1e6
    return {"tokens/s": rate, "kWh": kwh, "USD": dollars, "kg CO2": kwh * carbon_intensity / 1000}


costs = {}
for board in USD_PER_HOUR:
    quantization = "nf4" if board == "T4" else None  # 16 bit does not fit
    limit = max_batch_size(SPEED_MODEL, board, inference=True, context_len=2048, quantization=quantization)
    for batch in dict.fromkeys((1, min(16, limit), limit)):
        costs[board, batch] = per_million(board, batch, quantization=quantization)
table = {
    f"{board}, batch {batch}" + (", 4 bit" if board == "T4" else ""): [f"{value:,.3g}" for value in row.values()]
    for (board, batch), row in costs.items()
}
show_table(table, ["tokens/s", "kWh", "USD", "kg CO2"])

# %%
boards = list(USD_PER_HOUR)
single = {board: costs[board, 1] for board in boards}
full = {board: costs[max(key for key in costs if key[0] == board)] for board in boards}
figure, panels = plt.subplots(1, 2, figsize=(plots.WIDTH, 3.6))
for axes, unit in zip(panels, ("kWh", "USD"), strict=True):
    for offset, (label, rows) in enumerate({"batch 1": single, "largest that fits": full}.items()):
        places = [place + 0.38 * (offset - 0.5) for place in range(len(boards))]
        axes.bar(places, [rows[board][unit] for board in boards], width=0.36, color=plots.COLORS[offset], label=label)
    axes.set(yscale="log", title=f"{unit} per million tokens")
    axes.set_xticks(range(len(boards)), ["T4, 4 bit" if board == "T4" else board.split("-")[0] for board in boards])
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_ylim(top=3 * max(row[unit] for row in single.values()))
panels[1].legend(fontsize=8.5, loc="upper right", ncols=2)
alt = "Energy and price of a million decoded tokens of a 7 B model. " + "; ".join(
    f"{board}: batch 1 {single[board]['kWh']:.2g} kWh, {single[board]['USD']:.2g} USD, "
    f"largest batch {full[board]['kWh']:.2g} kWh, {full[board]['USD']:.2g} USD"
    for board in boards
)
plots.show(figure, alt)
cheaper = {board: single[board]["USD"] / full[board]["USD"] for board in boards}
prices = [row["USD"] for board, row in single.items() if board != "T4"]  # the T4 computes in 4 bits
print("batching makes a token cheaper by:", ", ".join(f"{board} {x:.0f} times" for board, x in cheaper.items()))
print(
    f"of the boards that hold 16 bits the dearest costs {max(prices) / min(prices):.1f} times the cheapest, at batch 1"
)
lesson.report("a token in the largest batch is cheaper by, smallest of four boards", f"{min(cheaper.values()):.0f} x")
lesson.report(
    "a million tokens of 7 B on an H100, largest batch: kWh, USD, kg CO2 (assumptions of section 11)",
    ", ".join(f"{full['H100-SXM'][unit]:.2g}" for unit in ("kWh", "USD", "kg CO2")),
)

# %% [markdown]
# **What you see.** Under the assumptions above, filling the batch lowers the price of a token by more than the choice among these boards does. The T4 runs 4-bit weights and the others 16 bit, so its bars are not the same work.
#
# **Training.** A training of $P$ parameters on $D$ tokens takes about $6PD$ operations (lesson 04). The share of the hardware's peak rate that a run turns into those operations is called *model FLOP utilisation* (MFU). The model card of Llama 3.1 405B gives the GPU hours, and from them follow MFU and energy. Its tokens are 15.6 T (Llama team 2024).

# %%
HOURS, POWER_KW, TOKENS, MODEL = 30.84e6, 0.7, 15.6e12, 405e9  # model card of Llama 3.1; H100 at its rated power
operations = 6 * MODEL * TOKENS
utilisation = operations / (HOURS * 3600 * GPUS["H100-SXM"].tflops["bf16"] * 1e12)
energy = HOURS * POWER_KW  # kWh
print(f"{operations:.2e} operations, MFU {utilisation:.0%} over all hours; {energy / 1e6:.1f} GWh,", end=" ")
print(f"{energy * carbon_intensity / 1e9:.1f} kt of CO2 equivalent at {carbon_intensity} g per kWh")
answered = energy / full["H100-SXM"]["kWh"] / 1e6  # in units of 10^12 tokens
print(f"the same energy decodes {answered:,.0f} x 10^12 tokens of {SPEED_MODEL} on H100s, largest batch")
lesson.report("Llama 3.1 405B: MFU, GWh", f"{utilisation:.0%}, {energy / 1e6:.1f}")

# %% [markdown]
# The report of the model names an MFU of 38 to 43 % while a step runs (Llama team 2024). The share over all GPU hours is lower, probably since they include restarts, evaluations and waiting.

# %% [markdown] tags=["core"]
# ## 12 · Eight years of GPUs: what became the bottleneck
#
# **Question.** GPUs become faster every two years. At what?
#
# Eight boards for data centres, of the architectures Pascal, Volta, Turing, Ampere, Hopper and Blackwell, from vendors' data sheets (`data/gpus.json` names them). Rates are dense 16-bit matrix rates. There are no prices here: vendors publish none for these boards, and what clouds ask changes by the month, so section 11 has it as a parameter. The second table holds what the vendor's architecture papers say about the chips.

# %%
EIGHT = ["P100-SXM2", "V100-16GB", "T4", "A100-40GB", "A100-80GB", "H100-SXM", "H200", "B200"]
# process, billions of transistors, area (mm2; None: not published), memory, its stacks, NVLink in GB/s both ways
CHIPS = {
    "P100-SXM2": ("16 nm", 15.3, 610, "HBM2", 4, 160),
    "V100-16GB": ("12 nm", 21.1, 815, "HBM2", 4, 300),
    "T4": ("12 nm", 13.6, 545, "GDDR6", None, 0),
    "A100-40GB": ("7 nm", 54.2, 826, "HBM2", 5, 600),
    "A100-80GB": ("7 nm", 54.2, 826, "HBM2e", 5, 600),
    "H100-SXM": ("4N", 80, 814, "HBM3", 5, 900),
    "H200": ("4N", 80, 814, "HBM3e", 6, 900),
    "B200": ("4NP", 208, None, "HBM3e", 8, 1800),
}
gpus = {board: GPUS[board] for board in EIGHT}
table, chips = {}, {}
for board, gpu in gpus.items():
    rate16, (process, transistors, area, kind, stacks, link) = gpu.tflops["fp16"], CHIPS[board]
    row = [gpu.year, rate16, gpu.bandwidth, round(gpu.board / GIB), gpu.power]
    table[board] = [*row, f"{1e3 * rate16 / gpu.bandwidth:.0f}", f"{1e3 * rate16 / gpu.power:.0f}"]
    density = f"{1e3 * transistors / area:.0f}" if area else "-"
    pins = f"{8 * gpu.bandwidth / stacks / 1024:.1f}" if stacks else "-"
    chips[board] = [process, transistors, area or "-", density, kind, stacks or "-", pins, link or "none"]
show_table(table, ["year", "TFLOP/s", "GB/s", "GiB", "W", "FLOP/byte", "GFLOP/s per W"])
print()
show_table(chips, ["TSMC", "10^9 transistors", "mm2", "10^6/mm2", "memory", "stacks", "Gbit/s a line", "NVLink"])

# %%
quantities = {
    "matrix rate, 16 bit (TFLOP/s)": lambda gpu: gpu.tflops["fp16"],
    "memory bandwidth (GB/s)": lambda gpu: gpu.bandwidth,
    "memory (GiB)": lambda gpu: gpu.board / GIB,
    "power (W)": lambda gpu: gpu.power,
    "FLOP for each byte of bandwidth": lambda gpu: 1e3 * gpu.tflops["fp16"] / gpu.bandwidth,
    "GFLOP/s for each watt": lambda gpu: 1e3 * gpu.tflops["fp16"] / gpu.power,
}
first, second, last = (gpus[board] for board in ("P100-SXM2", "V100-16GB", "B200"))
growth = {label: (value(last) / value(first), value(last) / value(second)) for label, value in quantities.items()}
show_table({label: [f"{x:.1f}" for x in pair] for label, pair in growth.items()}, ["from P100 to B200", "from V100"])
rate_growth, bandwidth_growth, memory_growth, power_growth, balance_growth, _ = growth.values()
for label, pair in list(growth.items())[:4]:
    lesson.report(
        f"from P100, and from V100, to B200: {label.split(' (')[0]}", " x, ".join(f"{x:.1f}" for x in pair) + " x"
    )
matrix_units = math.log(balance_growth[0] / balance_growth[1]) / math.log(balance_growth[0])
print(f"of the growth of FLOP for each byte, {matrix_units:.0%} (in logarithms) came with V100's tensor cores")
lesson.report("share of the growth of FLOP/byte that came from P100 to V100", matrix_units, form=".0%")

# %%
figure, panels = plt.subplots(3, 2, figsize=(plots.WIDTH, 7.6))
names = [board.replace("-", "\n").replace("SXM2", "").replace("SXM", "").replace("16GB", "") for board in gpus]
for axes, (label, value) in zip(panels.flat, quantities.items(), strict=True):
    values = [value(gpu) for gpu in gpus.values()]
    axes.plot(range(len(gpus)), values, "o-", color=plots.COLORS[0])
    axes.set(yscale="log", ylim=(min(values) / 1.5, min(values) * 300))  # the same span in each
    axes.set_xticks(range(len(gpus)), names, fontsize=6.5)
    axes.set_title(f"{label}: x {growth[label][0]:.1f}", fontsize=9.5)
alt = "Six panels of eight boards with the same span of the axis, 2016 to 2024; from P100 to B200, and from V100: "
alt += "; ".join(f"{label} times {a:.1f}, {b:.1f}" for label, (a, b) in growth.items())
plots.show(figure, alt)

# %% [markdown]
# **What became the bottleneck.** The matrix rate grew an order of magnitude more than the memory that feeds it. Most of that gap opened at once, with the first matrix units (tensor cores) in the V100. Since then the rate has grown about twice as much as the bandwidth (second column of the table), and power least of all. Where memory got a new generation without new computing (A100 with 80 GB, H200), the operations for each byte fell again.
#
# **The semiconductor picture, in five parts.**
#
# 1. *The process.* The names (16 nm, 7 nm, 4N) are those of a foundry's recipes, not the length of anything. What counts is how many transistors fit on an area: the column of millions for each square millimetre. A chip cannot be larger than what a mask exposes at once, a bit over 800 mm2, and five of these boards are near that limit. So the B200 joins two such chips by a link of 10 TB/s (NVIDIA 2024). This is *packaging*: where one chip cannot grow, several are set side by side.
# 2. *The memory.* HBM is DRAM in stacks that stand beside the processor on the same carrier, with 1,024 data lines each. Bandwidth is stacks times lines times the rate of a line, and the table has all three. From P100 to B200 the stacks doubled and a line became about five times as fast. Both are limited by geometry and signalling, not by the size of a transistor: a stack needs a place at the edge of the chip, and a line is a wire. This is one reason why bandwidth grew more slowly than computing. The T4 has GDDR6 instead, a third of the V100's bandwidth for a quarter of its power.
# 3. *The energy.* A board at its rated power and peak rate has power divided by rate for each operation, and power divided by bandwidth for each byte. The further section below compares them.
# 4. *The number format.* Where a unit multiplies numbers of half the bits, it does twice as many: FP8 since the H100, 4-bit formats (FP4, with a scale for each small block) since the B200. It costs little area, and is a second reason for lesson 10; the first is bytes.
# 5. *The interconnect.* Models no longer fit on one board. Between boards gradients and weights travel at a fraction of the memory's bandwidth. The further section below draws a roofline for that as well.
#
# So the methods of this course follow the hardware: 4-bit weights (lessons 06, 10), shared key-value heads and FlashAttention (lesson 11) and speculative decoding all do more work for each byte.

# %% [markdown] tags=["further"]
# ## Beside section 12 · Energy and wires
#
# *Further: no core section needs this one.*
#
# **Question.** What do a moved byte, and a sent gradient, cost compared with an operation?

# %%
PICOJOULE_A_BIT = 4  # HBM2, the memory alone: about 4 (O'Connor et al. 2017)
table = {}
for board in ("V100-16GB", "A100-80GB", "H100-SXM", "B200"):
    gpu = gpus[board]
    operation = gpu.power / gpu.tflops["fp16"]  # watts / (10^12 operations a second) = picojoules
    memory_power = 8 * PICOJOULE_A_BIT * gpu.bandwidth * 1e-3  # picojoules a byte x 10^9 bytes a second = milliwatts
    eight_bit = f"{gpu.power / gpu.tflops['fp8']:.2f}" if gpu.tflops["fp8"] else "-"
    equal = 8 * PICOJOULE_A_BIT / operation
    table[board] = [
        f"{operation:.2f}",
        eight_bit,
        8 * PICOJOULE_A_BIT,
        f"{equal:.0f}",
        f"{memory_power / gpu.power:.0%}",
    ]
columns = ["pJ an operation", "in FP8", "pJ a byte", "operations for a byte", "memory's share at full bandwidth"]
show_table(table, columns)
lesson.report(
    "energy of a byte from memory in operations of 16 bit: V100, B200", f"{table['V100-16GB'][3]}, {table['B200'][3]}"
)

# %% [markdown]
# **What you see.** The energy of an operation fell from board to board. For a byte from memory we assumed the same for all boards, the value published for HBM2; later generations take somewhat less. Even at half of it on the newest board, a byte would be worth more operations there than on the oldest. (A rated power is a limit and not what a board takes: read the table as an order of magnitude.)
#
# **A roofline for the wires.** Data-parallel training sends each gradient around once a step: $2 (N-1)/N$ times the $2P$ bytes of the gradients in 16 bit (section 7, lesson 11), at $\beta_w$ bytes a second. Computing takes $6 P t$ operations for $t$ tokens on this GPU, at the share $m$ of its peak rate $\pi$. The wires are not the limit if
#
# $$\frac{6 P t}{m \pi} \ge \frac{4 P}{\beta_w} \quad\Longleftrightarrow\quad t \ge \frac{2}{3}\,\frac{m\,\pi}{\beta_w}$$
#
# The size of the model cancels: it is a number of tokens a step, on each GPU.

# %%
WIRES = {
    "NVLink of an H100": 450,
    "InfiniBand, 400 Gbit/s": 50,
    "PCIe 4.0 x16": 32,
    "Ethernet, 10 Gbit/s": 1.25,
}  # GB/s
ASSUMED_MFU = 0.4
least = {name: 2 / 3 * ASSUMED_MFU * GPUS["H100-SXM"].tflops["bf16"] * 1e3 / wire for name, wire in WIRES.items()}
show_table({name: [WIRES[name], f"{tokens:,.0f}"] for name, tokens in least.items()}, ["GB/s one way", "tokens a step"])
names = list(WIRES)
lesson.report(
    "tokens a step on an H100 that hide the gradients: NVLink, 10 Gbit/s",
    f"{least[names[0]]:,.0f}, {least[names[-1]]:,.0f}",
)

# %% [markdown]
# Inside a server a few hundred tokens hide the gradients; over an office network it takes more than two hundred thousand on each GPU.


# %% [markdown]
# ## 13 · Exercises
#
# Six, from easy to hard. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.


# %% tags=["exercise"]
# Exercise 7.1, easy: the cache of a model in which some layers look back a limited distance only.
def cache_bytes(kv_heads: int, head_dim: int, context: int, batch: int, w: int, windows: list[int | None]) -> int:
    """Bytes of all keys and values.

    `windows` has an entry for each layer: None for a layer that sees all of the context, or the number of tokens that
    the layer keeps at most.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_cache_bytes(cache_bytes):
    llama = cache_bytes(8, 128, 8192, 1, 2, [None] * 32)
    expect_equal("cache_bytes(8, 128, 8192, 1, 2, [None] * 32), Llama-3 8B", llama, 2**30)
    for context in (1000, 32768):
        expected = estimate_inference("mistralai/Mistral-7B-v0.1", context_len=context, batch_size=3).kv_cache
        call = f"Mistral 7B, cache_bytes(8, 128, {context}, 3, 2, [4096] * 32)"
        expect_equal(call, cache_bytes(8, 128, context, 3, 2, [4096] * 32), expected)
    mixed = cache_bytes(2, 64, 500, 2, 1, [None, 100, 100])
    expect_equal("cache_bytes(2, 64, 500, 2, 1, [None, 100, 100])", mixed, 2 * 2 * 64 * 2 * 700)


check("7.1", check_cache_bytes, cache_bytes)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Replace "layers times context" of the formula by a sum over the layers of what each of them keeps.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def cache_bytes(kv_heads: int, head_dim: int, context: int, batch: int, w: int, windows: list[int | None]) -> int:
#     tokens = sum(context if window is None else min(context, window) for window in windows)
#     return 2 * kv_heads * head_dim * tokens * batch * w
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 7.2, medium: AdamW with moments of 8 bits (Dettmers et al. 2022), as bitsandbytes stores them.
def adam_8bit_bytes(sizes: list[int]) -> int:
    """Bytes of the optimiser's state for tensors with these numbers of elements.

    Both moments have a byte for each element, and an fp32 number for each block of 256 (a last, shorter block has one
    too). Tensors with fewer than 4,096 elements, such as norms, keep both moments in fp32, without blocks.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_adam_8bit_bytes(adam_8bit_bytes):
    from helpers.memory import optimizer_state

    for sizes in ([256 * 100], [4096], [4095], [5000], [100, 30_000, 576]):
        expected = optimizer_state("adamw_8bit", [(size,) for size in sizes], 2)[0]
        expect_equal(f"adam_8bit_bytes({sizes})", adam_8bit_bytes(sizes), expected)
    sizes = [p.numel() for p in base.parameters()]
    expected = optimizer_state("adamw_8bit", [tuple(p.shape) for p in base.parameters()], 2)[0]
    expect_equal("adam_8bit_bytes of this profile's model", adam_8bit_bytes(sizes), expected)


check("7.2", check_adam_8bit_bytes, adam_8bit_bytes)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Treat every tensor by itself: small ones keep 8 bytes an element, others 2 bytes an element and two fp32 numbers a block.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# For large matrices that is 2.03 bytes a parameter instead of 8.
#
# ```python
# def adam_8bit_bytes(sizes: list[int]) -> int:
#     total = 0
#     for size in sizes:
#         total += 8 * size if size < 4096 else 2 * size + 2 * 4 * math.ceil(size / 256)
#     return total
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 7.3, medium: the largest batch that fits.
def largest_batch(fits) -> int:
    """The largest batch size for which fits(batch) is true, or 0 if not even fits(1) is.

    If a batch fits, every smaller one does. A question may be expensive (a step on a real GPU), so ask few: for a
    result of n at most 2 * log2(n) + 4 questions.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_largest_batch(largest_batch):
    for answer in (0, 1, 2, 3, 7, 8, 100, 1023, 50_000):
        questions = []

        def fits(batch, answer=answer, questions=questions):
            questions.append(batch)
            return batch <= answer

        expect_equal(f"largest_batch(lambda batch: batch <= {answer})", largest_batch(fits), answer)
        allowed = 2 * math.log2(max(answer, 1)) + 4
        expect_true(f"for {answer} at most {allowed:.0f} questions ({len(questions)} now)", len(questions) <= allowed)
        expect_true(f"only batches from 1 on are asked for ({min(questions)} now)", min(questions) >= 1)
    memory = 16 * GIB
    found = largest_batch(lambda batch: max(peak_bytes(qwen, 2, batch, 1024).values()) <= memory)
    expect_true("it also works with peak_bytes", max(peak_bytes(qwen, 2, found, 1024).values()) <= memory)


check("7.3", check_largest_batch, largest_batch)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Double until it no longer fits, then halve the interval between the last size that fitted and the first that did not.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Double until it does not fit, then halve the interval.
#
# ```python
# def largest_batch(fits) -> int:
#     low, high = 0, 1
#     while fits(high):
#         low, high = high, 2 * high
#     while high - low > 1:
#         middle = (low + high) // 2
#         low, high = (middle, high) if fits(middle) else (low, middle)
#     return low
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 7.4, hard: how many layers to checkpoint together.
def best_group(layers: int, input_bytes: int, layer_bytes: int) -> tuple[int, int]:
    """The group size that needs the least memory for activations, and these bytes; the smallest size on a tie.

    Layers are checkpointed in groups of g; the last group may be smaller. The input of each group is kept
    (`input_bytes`). The backward pass runs one group forward again and then holds the activations (`layer_bytes`
    each) of all its layers.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_best_group(best_group):
    expect_equal("best_group(16, 1, 1)", best_group(16, 1, 1), (4, 8))
    expect_equal("best_group(100, 1, 1)", best_group(100, 1, 1), (10, 20))
    expect_equal("best_group(32, 1, 17), as in a Llama", best_group(32, 1, 17), (1, 49))
    expect_equal("best_group(2, 1, 1), a tie", best_group(2, 1, 1), (1, 3))
    expect_equal("best_group(10, 3, 1)", best_group(10, 3, 1), (5, 11))
    expect_equal("best_group(7, 1, 1)", best_group(7, 1, 1), (2, 6))
    expect_equal("best_group(7, 100, 1)", best_group(7, 100, 1), (7, 107))
    llama = config_of("meta-llama/Llama-2-7b-hf")
    size = sum(layer_bytes(llama, 2).values())
    kept = 2 * llama.hidden_size
    group, needed = best_group(llama.num_hidden_layers, kept, size)
    other = min(math.ceil(32 / g) * kept + g * size for g in range(1, 33))
    expect_equal("the bytes for Llama-2 7B, for each token", needed, other)
    expect_equal("its group size", group, 1)


check("7.4", check_best_group, best_group)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write down the memory for one group size, with the number of groups rounded up, and try all sizes.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# With equal costs the best size is $\sqrt{L}$, the result of Chen et al. 2016. A transformer's layer keeps many times its input, so there one layer at a time is best, and that is what libraries do.
#
# ```python
# def best_group(layers: int, input_bytes: int, layer_bytes: int) -> tuple[int, int]:
#     def needed(group: int) -> int:
#         return math.ceil(layers / group) * input_bytes + group * layer_bytes
#
#     best = min(range(1, layers + 1), key=needed)
#     return best, needed(best)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 7.5, hard: from which batch on is decoding limited by computing?
def balanced_batch(weight_bytes: float, cache_bytes: float, flops: float, bandwidth: float, rate: float) -> int | None:
    """The smallest batch whose step takes at least as long to compute as to read, or None if there is none.

    A step reads the weights once, and `cache_bytes` for each sequence, at `bandwidth` bytes a second; it computes
    `flops` for each sequence, at `rate` a second.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_balanced_batch(balanced_batch):
    expect_equal("balanced_batch(100, 0, 2, 1, 1)", balanced_batch(100, 0, 2, 1, 1), 50)
    expect_equal("balanced_batch(101, 0, 2, 1, 1)", balanced_batch(101, 0, 2, 1, 1), 51)
    expect_equal("balanced_batch(100, 1, 2, 1, 1)", balanced_batch(100, 1, 2, 1, 1), 100)
    expect_equal("balanced_batch(100, 3, 2, 1, 1)", balanced_batch(100, 3, 2, 1, 1), None)
    expect_equal("balanced_batch(100, 2, 2, 1, 1)", balanced_batch(100, 2, 2, 1, 1), None)
    for context in (0, 64, 4096):
        flops, cache = work(config7, 2, 1, 1, context)[0], kv_cache(config7, context, 1, 2)
        numbers = (bytes_read(1, 0, None), cache, flops, 3350e9, 989e12)
        found = balanced_batch(*numbers)
        seconds_short = flops / 989e12 - cache / 3350e9  # gained by each further sequence
        if seconds_short <= 0:
            expect_equal(f"a 7 B model on an H100 at context {context}", found, None)
        else:
            expect_equal(
                f"a 7 B model on an H100 at context {context}", found, math.ceil(numbers[0] / 3350e9 / seconds_short)
            )


check("7.5", check_balanced_batch, balanced_batch)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Each further sequence gains computing time and costs reading time: if it costs more than it gains, no batch is enough.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# $(W + bC)/\beta \le bF/\pi$, so $b \ge \frac{W/\beta}{F/\pi - C/\beta}$, if the denominator is positive. Once the cache of a sequence takes longer to read than its token to compute, no batch is large enough: long contexts are limited by memory always. That is what grouped-query attention and cache quantisation are for.
#
# ```python
# def balanced_batch(
#     weight_bytes: float, cache_bytes: float, flops: float, bandwidth: float, rate: float
# ) -> int | None:
#     gained = flops / rate - cache_bytes / bandwidth
#     return None if gained <= 0 else math.ceil(weight_bytes / bandwidth / gained)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 7.6, medium: predict, then measure.
def predicted_peak(config: PretrainedConfig, batch: int, seq: int) -> int:
    """Peak bytes of a training step in fp32 with plain SGD (no momentum), in place of AdamW.

    The check runs such steps of this profile's model and counts. Use what section 5 has; within 5 % is right.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_predicted_peak(predicted_peak):
    for batch, seq in ((1, 16), (4, 128)):
        model = copy.deepcopy(base).float().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, foreach=False)
        counted = train_step(model, optimizer, random_batch(model.config, batch, seq))
        found = predicted_peak(model.config, batch, seq)
        off = found / counted - 1
        expect_true(f"{batch} x {seq}: predicted {found:,}, counted {counted:,}, {off:+.1%}", abs(off) <= 0.05)


check("7.6", check_predicted_peak, predicted_peak)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Plain SGD keeps nothing between two steps. Which term of `peak_bytes` is too much?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Each phase of `peak_bytes` counts AdamW's two moments, which SGD does not have. The gradients stay: they are made in the backward pass, whatever the optimiser.
#
# ```python
# def predicted_peak(config: PretrainedConfig, batch: int, seq: int) -> int:
#     return max(peak_bytes(config, 4, batch, seq).values()) - 2 * 4 * count_parameters(config)
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **Full fine-tuning of a 3 B model fails with out of memory in the first `optimizer.step()`, after a backward pass that fitted. What happened there?**
#
# - A. The activations were kept until then.
# - B. AdamW made its two moments, 8 bytes a parameter in fp32.
# - C. The weights were copied to the CPU.
# - D. The loss was computed a second time.
#
# <details><summary>Answer</summary>
#
# B. The state of an optimiser is made in its first step. In the second step of a run that survives, the memory is already there.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the plot of section 3, which change of the model makes the steepest line as flat as the others?**
#
# - A. a smaller vocabulary
# - B. fewer layers
# - C. attention that computes its probabilities again in the backward pass
# - D. a smaller batch
#
# <details><summary>Answer</summary>
#
# C. The steep line is the only one with a term in the square of the length, and that term is the stored probabilities.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A model decodes one sequence on an H100 at 40 % of the bandwidth. You replace it by a GPU with twice the matrix rate and the same memory. What changes?**
#
# - A. Decoding takes half the time.
# - B. Hardly anything.
# - C. It decodes twice as many sequences in the same time.
# - D. The KV cache takes half the memory.
#
# <details><summary>Answer</summary>
#
# B. Decoding one sequence has about one operation for each byte in 16 bits, far left of the edge of the roofline: the memory sets the pace.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the roofline plot, what moves a point to the right?**
#
# - A. a faster processor
# - B. more tokens for each time that the weights are read
# - C. a longer wait between two requests
# - D. a smaller learning rate
#
# <details><summary>Answer</summary>
#
# B. The horizontal axis is operations for each byte that is moved; a larger batch or a longer prompt does more with the same weights.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Stage 3 of ZeRO on 8 GPUs, torch autocast over fp32 weights: why is the peak of a 7 B model far above its 16 P / 8 bytes of state?**
#
# - A. Stage 3 does not divide the gradients.
# - B. The optimiser is not divided.
# - C. Activations, and 16-bit copies of all gathered weights that autocast keeps for the backward pass.
# - D. The KV cache is not divided.
#
# <details><summary>Answer</summary>
#
# C. The state is divided in all three parts. A mixed-precision policy of FSDP2 instead of autocast gives the copies back after each layer.
#
# </details>

# %% [markdown]
# ## What we saw
#
# All numbers of this table were measured or computed above, in this run. (The peaks of the 132 steps were tracked before, and are read from a file.)

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# Estimate first, on any machine, from the model's name. Then run **two** steps with the largest batch that you will use (the longest sequences, not average ones), and read the allocator's counter. `max_memory_allocated` is what the estimate predicts, `max_memory_reserved` is what the process holds, and `nvidia-smi` shows that plus the CUDA context. In the first step AdamW's moments do not exist yet while the activations do; the second has both. If the second fits, so will the others.

# %%
import subprocess

command = [sys.executable, "-m", "helpers.memory", "Qwen/Qwen2.5-7B", "--method", "qlora", "--precision", "fp16",
           "--optimizer", "paged_adamw_8bit", "--checkpointing", "--gpu", "T4", "--seq-len", "2048"]  # fmt: skip
answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
print("python", " ".join(command[1:]), "\n")
print(answer.stdout or answer.stderr)
rows, length = settings["live"]
precision = "fp32" if machine.device == "cpu" else half
options = {"batch_size": rows, "seq_len": length, "precision": precision, "padded": False, "device": machine.device}
print(estimate_training(shape, **options))
counted, allocated = live_step(precision, rows, length, False)
print(f"\ncounted in a real step: {counted / GIB:.3f} GiB", end="")
print(f"; max_memory_allocated {allocated / GIB:.3f} GiB" if allocated else "; on CUDA the allocator would say it too")

# %% [markdown]
# | you see | do |
# |---|---|
# | out of memory in the forward pass | smaller batch with accumulation, checkpointing, shorter sequences |
# | out of memory at the loss, large vocabulary | a chunked or fused loss (Liger), so that the logits never exist at once |
# | out of memory in `optimizer.step()` of the first step | `fused=True`, an 8-bit optimiser, LoRA |
# | out of memory after many steps | a longer batch than before, or a tensor that somebody keeps (a list of losses with their graphs) |
# | `reserved` far above `allocated` | fragmentation: `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`, batches of equal lengths |
# | it fits, and the GPU idles while it generates | a larger batch: decoding is limited by bandwidth |
#
# ## Read on
#
# - Micikevicius et al. 2018, *Mixed Precision Training* (arXiv:1710.03740).
# - Rajbhandari, Rasley, Ruwase and He 2020, *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models* (arXiv:1910.02054).
# - Korthikanti et al. 2022, *Reducing Activation Recomputation in Large Transformer Models* (arXiv:2205.05198).
# - Chen, Xu, Zhang and Guestrin 2016, *Training Deep Nets with Sublinear Memory Cost* (arXiv:1604.06174).
# - Dao, Fu, Ermon, Rudra and Ré 2022, *FlashAttention* (arXiv:2205.14135); Ainslie et al. 2023, *GQA* (arXiv:2305.13245).
# - Dettmers, Lewis, Shleifer and Zettlemoyer 2022, *8-bit Optimizers via Block-wise Quantization* (arXiv:2110.02861); Dettmers, Pagnoni, Holtzman and Zettlemoyer 2023, *QLoRA* (arXiv:2305.14314).
# - Anthony, Biderman and Schoelkopf 2023, *Transformer Math 101*, EleutherAI's blog.
# - Williams, Waterman and Patterson 2009, *Roofline: An Insightful Visual Performance Model for Multicore Architectures*, Communications of the ACM 52(4).
# - Pope et al. 2022, *Efficiently Scaling Transformer Inference* (arXiv:2211.05102): prefill and decoding on real hardware.
# - Patterson et al. 2021, *Carbon Emissions and Large Neural Network Training* (arXiv:2104.10350); Ember, *Yearly Electricity Data*, by Our World in Data, *Carbon intensity of electricity generation*.
# - O'Connor et al. 2017, *Fine-Grained DRAM: Energy-Efficient DRAM for Extreme Bandwidth Systems* (MICRO-50): where the energy of a bit goes.
# - Llama team 2024, *The Llama 3 Herd of Models* (arXiv:2407.21783), and the model card of Llama 3.1: hours, power, utilisation.
# - NVIDIA's architecture papers: *Tesla P100* 2016, *Tesla V100* 2017, *Turing* 2018, *A100* 2020, *H100* 2022, *Blackwell* 2024; the boards' data sheets are named in `data/gpus.json`.
