# %% [markdown]
# # 11 · Advanced pretraining: what changes when a model gets large
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/11_advanced_pretraining.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/11_advanced_pretraining.ipynb)
#
# The transformer of lesson 03 works at any size, and yet no large model of today is built quite like it. Its cache gets too big, its attention matrix too wide, its layers too dense, one machine too small, its training too fragile. In this lesson you write the answer to each of these troubles in a few lines, find it equal to the library's, and measure what it gains and what it gives up.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. count the bytes that a cached token costs under MHA, MQA, GQA and MLA, and mend a model whose heads were merged;
# 2. write FlashAttention, forward and backward, equal to PyTorch's attention; replace the cache by a state of fixed size, and find out how much such a state can hold;
# 3. turn a dense layer into a mixture of experts without changing one logit, and balance the experts;
# 4. share out one model over real processes, in three ways and then five more, each equal to a single process and, where torch has its like here, to torch, with the bytes that they send;
# 5. see what grows before a run blows up and what holds it, and check in a minute whether a learning rate will fit a wider model.
#
# **Prerequisites:** lessons 01 and 03.
#
# | symbol | meaning |
# |---|---|
# | $n$ | number of tokens so far; in section 10 the number of inputs of a matrix |
# | $d$ | size of one head |
# | $q_t, k_t, v_t$ | query, key and value of token $t$, vectors of size $d$ |
# | $S_t$ | state of a layer after token $t$, a matrix of $d \times d$ |
# | $\alpha_t$, $\beta_t$ | which share of the state stays at token $t$, and how strongly $t$ is written |
# | $E$, $k$ | number of experts, and how many of them each token uses |
# | $p$ | number of processes, or of stages of a pipeline |
# | $N$ | bytes that are shared out: of the parameters, or of the activations |
# | $m$ | micro-batches of a step |
# | $\eta$ | learning rate |
# | $Z$ | sum of the exponentials of the logits, the denominator of the softmax |
# | $J(A, B)$ | Jaccard similarity of two sets, $\lvert A \cap B\rvert / \lvert A \cup B\rvert$ |

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
text_id = ""  # another text: a hub dataset or a .jsonl file with a field "text"
seed = 0
budget = 1.0  # share of all steps and questions; the lesson's claims are asserted from 1.0 on

# %%
import copy
import itertools
import json
import linecache
import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from helpers import plots
from helpers.data import pack, text_dataset
from helpers.errors import CourseError
from helpers.evaluation import score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.lesson import Lesson, quiet_libraries, show_table
from helpers.memory import ModelShape
from helpers.models import load_model, load_tokenizer
from helpers.training import TrainConfig, train
from helpers.world import World
from recipes import pretraining_sweep as sweep

lesson = Lesson("11", profile, model_id, seed, budget)
machine = lesson.machine
quiet_libraries()
SETTINGS = {  # rows of a batch in the trainings of the model, and processes; the toy models are the same everywhere
    "cpu": {"batch": 8, "processes": 4},
    "t4": {"batch": 8, "processes": 4},
    "large": {"batch": 16, "processes": 4},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# `lesson.scaled` makes a number of steps or questions smaller on a smaller budget. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. `train` is the training loop of lesson 03.

# %%
model, tokenizer = load_model(machine)
model = model.float().eval()  # weights in 32 bits; the steps compute in 16 where that is faster


def text_rows(number: int, stream: int, width: int) -> Tensor:
    """Rows of packed text (number, width) that the model has not read; `stream` says which."""
    texts = text_dataset(text_id or machine, 8 + number * width // 20, seed=stream)["text"]
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor(list(pack(ids, width))[:number])


def batches(rows: Tensor, stream: int) -> Iterator[dict[str, Tensor]]:
    """Endless random batches of rows."""
    generator = torch.Generator().manual_seed(stream)
    while True:
        chosen = torch.randint(len(rows), (settings["batch"],), generator=generator)
        yield {"input_ids": rows[chosen]}


def schedule(steps: int, rate: float) -> TrainConfig:
    """Warm-up, then linear decay, for all trainings of the model in this half."""
    return TrainConfig(
        max_steps=steps, learning_rate=rate, warmup_steps=max(1, steps // 5), schedule="linear",
        precision=lesson.precision, progress=False, seed=seed,
    )  # fmt: skip


def two_at_a_time(job: Callable, runs: Sequence[tuple]) -> list:
    """job(*run) for each run, in order; two run at once on a core each, which suits small models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with futures.ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda run: job(*run), runs))
    torch.set_num_threads(threads)
    return results


held_out = text_rows(32, 1000 + seed, 64)

# %% [markdown] tags=["core"]
# ## 1 · What does a cached token cost?
#
# **Question.** A model that writes keeps the key and the value of every token it has seen, in every layer. How small can this cache get?
#
# Per token it holds $2 \cdot \text{layers} \cdot \text{heads} \cdot d$ numbers. The simplest way to make it smaller is to let several query heads share one key and one value. With one pair for all heads this is *multi-query attention* (MQA), with one pair for each group of heads *grouped-query attention* (GQA). The usual attention with a pair for each head is MHA.


# %%
def grouped_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention (batch, heads, seq, d) whose keys and values have fewer heads."""
    group = query.shape[1] // key.shape[1]  # query heads for each key head
    key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])  # (batch, heads, seq, seq)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ value


torch.manual_seed(seed)
query, key, value = (torch.randn(2, heads, 10, 16) for heads in (4, 2, 2))
theirs = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
difference = (grouped_attention(query, key, value) - theirs).abs().max().item()
lesson.equal("grouped attention is PyTorch's", difference, within=1e-5)

# %% [markdown]
# Must a model be trained anew for this? Ainslie et al. (2023) average the key heads and the value heads of each group, and train a little more. Try it on the model of this course, and try the simpler idea too: keep the first head of each group and throw the others away. The cache is measured on the library's own `DynamicCache`.

# %%
attention = model.model.layers[0].self_attn
own_heads, head_dim = model.config.num_key_value_heads, attention.head_dim
fewer = sorted({max(1, own_heads // 2), 1}, reverse=True)  # key-value heads to try


def with_shared_heads(kv_heads: int, how: str = "average") -> nn.Module:
    """A copy of the model with fewer key and value heads: averages, or the first ones."""
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = kv_heads
    weights = model.state_dict()
    for name, weight in weights.items():
        if re.search(r"\.[kv]_proj\.", name):
            heads = weight.unflatten(0, (kv_heads, -1, head_dim))  # (kv_heads, group, d, ...)
            kept = heads.mean(1) if how == "average" else heads[:, 0]
            weights[name] = kept.flatten(0, 1)  # (kv_heads * d, ...)
    shared = type(model)(config)
    shared.load_state_dict(weights)
    return shared.to(model.device).eval()


def held_out_loss(network: nn.Module) -> float:
    """Loss on text that no network of this lesson is trained on, in nats a token."""
    rows = held_out.to(model.device)
    with torch.no_grad(), lesson.autocast():
        return network(input_ids=rows, labels=rows).loss.item()


# %%
def cache_bytes(network: nn.Module) -> float:
    """Bytes that the library's cache holds for each token, in the cache's own format."""
    rows = held_out[:1].to(model.device)
    with torch.no_grad():
        layers = network(input_ids=rows, use_cache=True).past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) / rows.numel()


lines, wrong, layers = {}, 0, model.config.num_hidden_layers
merged = {}  # key-value heads -> loss with averaged heads, and with the first ones
for kv_heads in [own_heads, *fewer]:
    networks = [with_shared_heads(kv_heads, how) for how in ("average", "first")]
    counted, computed = cache_bytes(networks[0]), 2 * layers * kv_heads * head_dim * 4
    wrong += counted != computed
    merged[kv_heads] = [held_out_loss(network) for network in networks]
    lines[f"{kv_heads} key-value heads"] = [f"{counted:,.0f}", *(f"{x:.2f}" for x in merged[kv_heads])]
better = merged[fewer[0]][1] - merged[fewer[0]][0]
show_table(lines, ["bytes a token (32 bits)", "loss, averaged", "loss, first kept"])
lesson.equal("bytes of the cache are 2 x layers x key-value heads x d x 4", wrong)
lesson.claim("averaging heads starts at a lower loss than keeping one of each group",
             better, at_least=0.05)  # fmt: skip

# %% [markdown]
# The first line is the model as it was. Averages start better than a choice of heads, and still cost much loss. Section 1b asks how much of it a little training brings back.
#
# **Cache something else.** *Multi-head latent attention* (MLA, DeepSeek-AI 2024) keeps all heads, but caches none of them. From each token it keeps one short vector $c_t$, the *latent*, out of which keys and values of all heads can be computed again, and one small key with the position in it, $k^R_t$, that all heads share. The score of head $h$ is
#
# $$s_{ij} = \frac{q_i^\top W^K_h c_j + {q^R_i}^\top k^R_j}{\sqrt{d + d_R}}, \qquad v_j = W^V_h c_j$$
#
# where $d_R$ is the size of the part with the position. Write it down naively first: compute all keys and values again, then attend as usual. The weights are those of the library's `DeepseekV3Attention`, small and random.

# %%
from transformers import DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

HEADS, SIZE, ROTARY, RANK = 4, 64, 32, 64  # heads, d, d_R, size of the latent
config = DeepseekV3Config(
    hidden_size=256, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=None,
    kv_lora_rank=RANK, qk_nope_head_dim=SIZE, qk_rope_head_dim=ROTARY, v_head_dim=SIZE,
    num_hidden_layers=1, attn_implementation="eager",
)  # fmt: skip
torch.manual_seed(seed)
mla = deepseek.DeepseekV3Attention(config, layer_idx=0).requires_grad_(False).eval()
hidden = torch.randn(2, 12, 256)  # (batch, seq, hidden_size)
angles = torch.arange(12.0)[:, None] * 10_000 ** (-torch.arange(0, ROTARY, 2) / ROTARY)
causal = torch.full((12, 12), -math.inf).triu(1)  # added to scores: (seq, seq)


def rotate(x: Tensor) -> Tensor:
    """RoPE over neighbouring pairs of the last dimension (..., seq, d_R), as in lesson 03."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * angles.cos() - odd * angles.sin(),
                      odd * angles.cos() + even * angles.sin()], dim=-1)  # fmt: skip


# %%
def latents(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """All that is cached: c (batch, seq, RANK), and the key with the position (.., ROTARY)."""
    latent, position_key = mla.kv_a_proj_with_mqa(hidden).split([RANK, ROTARY], dim=-1)
    return mla.kv_a_layernorm(latent), rotate(position_key)


def queries(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (batch, heads, seq, SIZE), and their part with the position (.., ROTARY)."""
    both = mla.q_proj(hidden).unflatten(-1, (HEADS, SIZE + ROTARY)).transpose(1, 2)
    content, position = both.split([SIZE, ROTARY], dim=-1)
    return content, rotate(position)


def naive_mla(hidden: Tensor) -> Tensor:
    """Compute keys and values of all heads out of the latents, then attend as usual."""
    (latent, position_key), (query, position_query) = latents(hidden), queries(hidden)
    up = mla.kv_b_proj(latent).unflatten(-1, (HEADS, 2 * SIZE)).transpose(1, 2)
    key, value = up.split([SIZE, SIZE], dim=-1)  # (batch, heads, seq, SIZE)
    scores = query @ key.mT + position_query @ position_key[:, None].mT
    weights = (scores / math.sqrt(SIZE + ROTARY) + causal).softmax(-1)  # (.., seq, seq)
    return mla.o_proj((weights @ value).transpose(1, 2).flatten(2))


# %% [markdown]
# Naively, a small cache is paid for with work: each new token has to rebuild the keys and values of all earlier ones. But $q^\top (W^K c) = ({W^K}^\top q)^\top c$. Move the matrix to the side of the query, once for each new token, and attention runs on the latents themselves. The same works for the values: mix the latents first, and multiply by $W^V$ once. This is the *absorbed* form, and no key is ever built.


# %%
def absorbed_mla(hidden: Tensor) -> Tensor:
    """Attend to the latents: the matrices that would rebuild keys and values are moved."""
    (latent, position_key), (query, position_query) = latents(hidden), queries(hidden)
    up = mla.kv_b_proj.weight.view(HEADS, 2 * SIZE, RANK)
    to_key, to_value = up.split([SIZE, SIZE], dim=1)  # (heads, SIZE, RANK)
    scores = (query @ to_key) @ latent[:, None].mT + position_query @ position_key[:, None].mT
    weights = (scores / math.sqrt(SIZE + ROTARY) + causal).softmax(-1)
    mixed = weights @ latent[:, None]  # (batch, heads, seq, RANK)
    return mla.o_proj((mixed @ to_value.mT).transpose(1, 2).flatten(2))


cache, places = DynamicCache(), torch.arange(12)[None]
cosines = deepseek.DeepseekV3RotaryEmbedding(config)(hidden, places)
theirs, _ = mla(hidden, cosines, causal[None, None], past_key_values=cache)
for name, ours in {"naive": naive_mla, "absorbed": absorbed_mla}.items():
    difference = (ours(hidden) - theirs).abs().max().item()
    lesson.equal(f"{name} MLA is transformers'", difference, within=1e-5)
kept = sum(part.numel() for part in latents(hidden))
theirs = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
rebuilt, mixed = 12 * RANK * HEADS * 2 * SIZE, HEADS * 2 * SIZE * RANK
print(f"numbers cached for 2 x 12 tokens: {kept} ours, {theirs} in the library's cache, "
      f"{2 * 12 * HEADS * 2 * SIZE} with MHA")  # fmt: skip
print(f"multiplications for the 12th token besides attention: {rebuilt:,} naive, {mixed:,} absorbed")

# %% [markdown]
# Both forms give the library's output, and absorbed decoding leaves out the rebuilding, which grows with the text. Attention itself then costs more: a query is compared with latents of rank numbers in place of keys of $d$. Here both are 64; in DeepSeek-V3, with a rank of 512 and $d = 128$, a cached token costs each head $(512 + 64) + 512$ products in place of $(128 + 64) + 128$. (Before version 5.23 the library's cache holds the rebuilt keys and values: the two numbers of the line then differ.) What do real models pay? Three sizes are in the course's tables, the fourth is the library's default.

# %%
real = {}  # numbers a token
for name in ("Llama-2-7b-hf", "Meta-Llama-3-8B", "Meta-Llama-3-70B"):
    one = ModelShape.from_config(f"meta-llama/{name}")
    real[name] = 2 * one.num_layers * one.num_kv_heads * one.head_dim
large = DeepseekV3Config()  # its defaults are those of the 671B model
real["DeepSeek-V3 (MLA)"] = large.num_hidden_layers * (large.kv_lora_rank + large.qk_rope_head_dim)
show_table(
    {name: [f"{2 * count / 1024:.0f}", f"{40 * 2**30 / (2 * count):,.0f}"]
     for name, count in real.items()},
    ["KiB a token (16 bits)", "tokens in 40 GiB"],
)  # fmt: skip

# %% [markdown]
# Llama 2 7B has MHA, the two Llama 3 have GQA with 8 key-value heads. DeepSeek-V3 is by far the largest of the four models and has the smallest cache: what it keeps does not depend on the number of heads.

# %% [markdown] tags=["further"]
# ## 1b · Mending a model whose heads were merged
#
# *Further: no core section needs this one.*
#
# **Question.** How much of the loss that merging costs comes back with a little training?
#
# Only the attention weights learn here. The unchanged model gets the same training, since what it gains by that is no merit of the merging. For half of the heads three seeds choose the text and its order; the other two sizes are one run each.

# %%
HEAL_STEPS, HEAL_SEEDS = lesson.scaled(12), (seed, seed + 100, seed + 200)


def healed_loss(kv_heads: int, stream: int) -> float:
    """Loss after training the attention weights of a model with averaged heads."""
    network = with_shared_heads(kv_heads)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("self_attn" in name)
    rows = text_rows(HEAL_STEPS * settings["batch"], 2000 + stream, 64)
    train(network, batches(rows, stream), schedule(HEAL_STEPS, 2e-3))
    return held_out_loss(network.eval())


sizes, averaged = list(merged), [losses[0] for losses in merged.values()]
trained = [[healed_loss(kv, stream) for stream in HEAL_SEEDS[: 3 if place == 1 else 1]]
           for place, kv in enumerate(sizes)]  # fmt: skip
cost = averaged[1] - trained[0][0]  # against the unchanged model with the same training
regained = [(averaged[1] - after) / cost if cost > 0.01 else 0.0 for after in trained[1]]
print("share of the loss regained with half of the heads:", [f"{x:.0%}" for x in regained])
lesson.claim("a little training regains at least half of what merging heads in pairs cost",
             min(regained), at_least=0.5, form=".0%")  # fmt: skip

# %%
kilobytes = [2 * layers * kv_heads * head_dim * 2 / 1024 for kv_heads in sizes]
middle = [sorted(losses)[len(losses) // 2] for losses in trained]
band = [[pick(losses) for losses in trained] for pick in (min, max)]
for size, before, after in zip(kilobytes, averaged, middle, strict=True):
    print(f"{size:.2f} KiB a token in 16 bits: loss {before:.2f} averaged, {after:.2f} trained")
figure = plots.curve(
    {"heads averaged": (kilobytes, averaged), "and trained a little": (kilobytes, middle, *band)},
    title="Merged heads cost loss; a little training regains most",
    xlabel="cache (KiB a token, 16 bits)", ylabel="loss on held-out text (nats)", log_x=True,
)  # fmt: skip
plots.show(figure, alt="Loss over cache size: with averaged heads it rises steeply to the left, after "
           "training much less.")  # fmt: skip

# %% [markdown]
# A few steps bring back most of what averaging broke. What is left over is larger the fewer heads remain. The paper's recipe spends 5 % of the pretraining compute on this (Ainslie et al. 2023), far more than the steps above, so take the lower line as a beginning and not as the best that a small cache can do.

# %% [markdown] tags=["further"]
# ## 2 · Must every token see all others?
#
# *Further: no core section needs this one.*
#
# **Question.** What is lost when a layer sees only the last $w$ tokens?
#
# A *sliding window* keeps the cache at $w$ tokens, however long the text. Information can still travel further, $w - 1$ tokens in each layer, so four layers reach four times as far. Models with windows often let every token see the first few tokens as well. These are called *attention sinks*, since attention that is needed nowhere else goes there (Xiao et al. 2023).

# %%
from contextlib import contextmanager

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM


def window_mask(seq: int, window: int, sinks: int = 0) -> Tensor:
    """What row i sees (seq, seq): itself, the window - 1 tokens before, the first `sinks`."""
    place = torch.arange(seq)
    distance = place[:, None] - place
    return (distance >= 0) & ((distance < window) | (place < sinks))


@contextmanager
def windowed(network: nn.Module, layers: list[int], window: int, sinks: int = 0) -> Iterator[None]:
    """Inside of it these layers of the network see only a window."""

    def narrow(layer, arguments, named):
        mask = window_mask(arguments[0].shape[1], window, sinks)
        return arguments, named | {"attention_mask": mask[None, None].to(arguments[0].device)}

    hooks = [network.model.layers[i].register_forward_pre_hook(narrow, with_kwargs=True)
             for i in layers]  # fmt: skip
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# %% [markdown]
# The library has the window as an option of Mistral, whose weights have the same names as Llama's. Give both the same random weights.

# %%
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
torch.manual_seed(seed)
llama = LlamaForCausalLM(LlamaConfig(**shape)).eval()
mistral = MistralForCausalLM(MistralConfig(**shape, sliding_window=5)).eval()
mistral.load_state_dict(llama.state_dict())
ids = torch.randint(50, (2, 20))  # (batch, seq)
with torch.no_grad(), windowed(llama, [0, 1], window=5):
    difference = (llama(ids).logits - mistral(ids).logits).abs().max().item()
lesson.equal("a window of five tokens is Mistral's", difference, within=1e-5)

# %% [markdown]
# Now narrow the view of the course's model to 32 tokens: in all layers, in the last one alone, and in all but the last. Measure two things: the loss on text, and reading. For reading the model gets a passage about three strangers and a question; every prompt is longer than the window, as the cell prints. An answer counts if each of its tokens is the model's first choice.

# %%
WINDOW, last_layer = 32, layers - 1
questions = World().open_book(lesson.scaled(50), seed=seed + 10)
prompts = tokenizer([q.prompt for q in questions], add_special_tokens=False)["input_ids"]
full = [f"{q.prompt} {q.answer}" for q in questions]
full = tokenizer(full, add_special_tokens=False)["input_ids"]
reading = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in full], batch_first=True)
is_answer = torch.zeros_like(reading, dtype=torch.bool)  # (questions, seq)
for row, (prompt, ids) in enumerate(zip(prompts, full, strict=True)):
    is_answer[row, len(prompt) : len(ids)] = True


def reads() -> Tensor:
    """Which questions have an answer that is the model's first choice at each token."""
    with torch.no_grad(), lesson.autocast():
        guessed = model(input_ids=reading.to(model.device)).logits[:, :-1].argmax(-1).cpu()
    return ((guessed == reading[:, 1:]) | ~is_answer[:, 1:]).all(-1)  # (questions,)


views = {"no window": [], "all layers": list(range(layers)), "the last layer only": [last_layer],
         "all but the last layer": list(range(last_layer))}  # fmt: skip
seen = {}
for name, narrowed in views.items():
    with windowed(model, narrowed, WINDOW):
        seen[name] = (reads(), held_out_loss(model))
with windowed(model, views["all layers"], WINDOW, sinks=4):
    seen["all layers, 4 sinks"] = (reads(), held_out_loss(model))
tokens = sorted(map(len, prompts))
near = torch.tensor([q.answer in tokenizer.decode(ids[-WINDOW + 1 :])
                     for q, ids in zip(questions, prompts, strict=True)])  # fmt: skip
print(f"passage and question: {tokens[0]} to {tokens[-1]} tokens; the answer stands within the last "
      f"{WINDOW} in {near.sum()} of {len(near)}")  # fmt: skip
rows = {name: [f"{right.float().mean():.0%}", f"{right[near].sum()} of {near.sum()}",
               f"{right[~near].sum()} of {(~near).sum()}", f"{loss:.3f}"]
        for name, (right, loss) in seen.items()}  # fmt: skip
show_table(rows, ["reading", "answer in the window", "outside of it", "loss (nats)"])

# %%
asked = len(questions)
bars = {name: score(right.sum().item(), asked) for name, (right, _) in seen.items()}
figure = plots.bars_with_intervals(
    bars, title="A window hurts reading only in the last layer",
    xlabel="questions about a passage answered right",
)  # fmt: skip
plots.show(figure, alt="Bars of right answers: no window and a window in all but the last layer are "
           "high; a window in the last layer, alone or with all others, is low.")  # fmt: skip
lesson.claim("a window in the last layer costs at least 30 points more of reading than in all others",
             sum(seen["all but the last layer"][0] * 1.0 - seen["the last layer only"][0] * 1.0).item() / asked,
             at_least=0.3, form=".0%")  # fmt: skip
lesson.report("loss added by a window of 32 tokens in all layers",
              seen["all layers"][1] - seen["no window"][1])  # fmt: skip

# %% [markdown]
# In this model the answer is fetched from the passage in the last layer, in a single step, so only there does the window hurt. With a window there, most of what is still right are answers that stand inside it. Information does not hop through the layers below, although it could. The loss on text says nearly nothing of this. Its rows have only 64 tokens, so half of the predictions do not meet the window at all, and to the others it hides at most 31 tokens. The sinks bring nothing here; whether this model has tokens that collect idle attention was not measured. Real models mix the two kinds of layer, many with a window and a few that see everything. Which ones must see everything is a question of measuring, as here.

# %% [markdown] tags=["core"]
# ## 3 · Attention without the matrix
#
# **Question.** Attention compares all pairs of tokens. Must all $n^2$ numbers be kept?
#
# The simplest attention writes the matrix of weights to memory, and keeps it for the backward pass. FlashAttention (Dao et al. 2022) works on blocks, so small that they fit into the fast memory of a GPU, and never has the whole matrix. Two tricks make this exact.
#
# **Forward: a softmax in pieces.** For one query keep three things while blocks of keys come by: the largest score so far $m$, the sum $\ell = \sum_j e^{s_j - m}$, and the weighted sum of values $a = \sum_j e^{s_j - m} v_j$. When a block brings a larger maximum $m'$, multiply $\ell$ and $a$ by $e^{m - m'}$, and add the block's part. At the end the output is $a / \ell$. Keep $L = m + \log \ell$ as well, the logarithm of the softmax's denominator.

# %%
BLOCK = 32


def block_scores(query: Tensor, key: Tensor, i: int, j: int) -> Tensor:
    """Scores of a block of queries from row i and of keys from row j; later keys get -inf."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])  # (batch, heads, block, block)
    rows, columns = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
    return scores.masked_fill(j + columns > i + rows[:, None], -math.inf)


def flash_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention (batch, heads, seq, d) by blocks, and L (batch, heads, seq, 1)."""
    outputs, logs = [], []
    for i in range(0, query.shape[2], BLOCK):
        rows = query[:, :, i : i + BLOCK]
        largest = torch.full_like(rows[..., :1], -math.inf)
        total, mixed = torch.zeros_like(largest), torch.zeros_like(rows)
        for j in range(0, i + 1, BLOCK):  # blocks of keys up to the diagonal
            scores = block_scores(rows, key[:, :, j : j + BLOCK], i, j)
            larger = torch.maximum(largest, scores.amax(-1, keepdim=True))
            weights, shrink = (scores - larger).exp(), (largest - larger).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            mixed = mixed * shrink + weights @ value[:, :, j : j + BLOCK]
            largest = larger
        outputs.append(mixed / total)
        logs.append(largest + total.log())
    return torch.cat(outputs, dim=2), torch.cat(logs, dim=2)


# %% [markdown]
# **Backward: compute again instead of keeping.** The weights of a block are $P = e^{S - L}$, one matrix product from $q$, $k$ and $L$. With the incoming gradient $dO$, the softmax's gradient is $dS = P \circ (dP - D)$, where $dP = dO\, V^\top$ and $D_i = \sum_j P_{ij}\, dP_{ij}$. This sum over all keys seems to need the whole row. But $\sum_j P_{ij}\, (dO_i \cdot v_j) = dO_i \cdot \sum_j P_{ij} v_j = dO_i \cdot O_i$: it is a product of two vectors that are already there.


# %%
def flash_backward(query, key, value, output, logs, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, one block of the matrix at a time."""
    grads = grad_query, grad_key, grad_value = [torch.zeros_like(x) for x in (query, key, value)]
    row_sums = (grad * output).sum(-1, keepdim=True)  # D: (batch, heads, seq, 1)
    for i in range(0, query.shape[2], BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(0, i + 1, BLOCK):
            columns = slice(j, j + BLOCK)
            scores = block_scores(query[:, :, rows], key[:, :, columns], i, j)
            weights = (scores - logs[:, :, rows]).exp()
            grad_value[:, :, columns] += weights.mT @ grad[:, :, rows]
            grad_weights = grad[:, :, rows] @ value[:, :, columns].mT
            grad_scores = weights * (grad_weights - row_sums[:, :, rows])
            grad_scores = grad_scores / math.sqrt(query.shape[-1])
            grad_query[:, :, rows] += grad_scores @ key[:, :, columns]
            grad_key[:, :, columns] += grad_scores.mT @ query[:, :, rows]
    return tuple(grads)


# %% [markdown]
# Compare with PyTorch's attention in 64 bits, where a wrong formula could not hide behind rounding. The length is no multiple of the block.

# %%
class FlashAttention(torch.autograd.Function):
    """Causal attention that keeps its inputs, its output and L."""

    @staticmethod
    def forward(context, query, key, value):
        output, logs = flash_forward(query, key, value)
        context.save_for_backward(query, key, value, output, logs)
        return output

    @staticmethod
    def backward(context, grad):
        return flash_backward(*context.saved_tensors, grad)


torch.manual_seed(seed)
inputs = [torch.randn(2, 3, 75, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
grad = torch.randn(2, 3, 75, 16, dtype=torch.float64)
ours = FlashAttention.apply(*inputs)
theirs = F.scaled_dot_product_attention(*inputs, is_causal=True)
difference = (ours - theirs).abs().max().item()
lesson.equal("the output by blocks is PyTorch's attention", difference, within=1e-10)
both = [torch.autograd.grad(output, inputs, grad) for output in (ours, theirs)]
difference = max((a - b).abs().max().item() for a, b in zip(*both, strict=True))
lesson.equal("the gradients by blocks are PyTorch's", difference, within=1e-10)

# %% [markdown]
# What is kept between forward and backward? `saved_tensors_hooks` sees each tensor that autograd stores. Count the bytes of those that are not the same memory twice, for the plain formula of section 1 and for blocks, over the length $n$.


# %%
def kept_bytes(attend, length: int) -> int:
    """Bytes that autograd stores for the backward pass of one head with d = 32."""
    stored = {}
    query, key, value = (torch.randn(1, 1, length, 32, requires_grad=True) for _ in range(3))

    def note(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor  # alive: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = attend(query, key, value)  # noqa: F841, holds what is stored
    return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())


lengths, kept, slope = [128, 256, 512, 1024], {}, {}
for name, attend in (("plain", grouped_attention), ("by blocks", FlashAttention.apply)):
    sizes = kept[name] = [kept_bytes(attend, length) / 1024 for length in lengths]
    slope[name] = math.log2(sizes[-1] / sizes[-2])  # n doubles
    print(f"{name:<9}", *(f"{size:>7,.0f} KiB" for size in sizes), f"   slope {slope[name]:.2f}")
figure = plots.curve(
    {name: (lengths, sizes) for name, sizes in kept.items()},
    title="Blocks keep memory in proportion to n, not to its square", xlabel="length n (tokens)",
    ylabel="kept for the backward pass (KiB a head)", log_x=True, log_y=True,
)  # fmt: skip
plots.show(figure, alt="Two lines in log-log: kept memory of plain attention rises twice as steeply as "
           "that of attention by blocks.")  # fmt: skip
lesson.claim("the memory that attention by blocks keeps grows no faster than the length (slope)",
             slope["by blocks"], at_most=1.1, control=slope["plain"])  # fmt: skip

# %% [markdown]
# A slope of 1 means proportional to $n$, a slope of 2 to $n^2$. The blocks pay with arithmetic: each block of scores is computed a second time in the backward pass. On a GPU it is faster all the same, because writing and reading the matrix took longer than computing it (lesson 07 measures this kind of limit). In plain PyTorch on a CPU the loops are slow; the kernels behind `scaled_dot_product_attention` run this very algorithm.

# %% [markdown] tags=["core"]
# ## 4 · A state instead of a cache
#
# **Question.** Can a layer remember a text in a fixed number of bytes, and what does it forget?
#
# Leave out the softmax, and attention is $o_t = \sum_{j \le t} (q_t \cdot k_j)\, v_j = S_t^\top q_t$ with $S_t = \sum_{j \le t} k_j v_j^\top$. The sum is a matrix of $d \times d$ that each token adds to. This is *linear attention* (Katharopoulos et al. 2020): no cache, the same work for every token. Two ideas improve it.
#
# - **Forget.** Shrink the state by $\alpha_t \le 1$, which the token chooses: $S_t = \alpha_t S_{t-1} + k_t v_t^\top$. This is the *SSD* layer of Mamba-2 (Dao and Gu 2024).
# - **Correct.** Before writing, read what the state says about the key, and write only the difference: $S_t = \alpha_t S_{t-1} + \beta_t\, k_t \big(v_t - (\alpha_t S_{t-1})^\top k_t\big)^\top$. This is the *gated delta rule* (Yang et al. 2024).
#
# As a loop over tokens, all three are the same few lines.


# %%
def recurrent(query, key, value, log_alpha: Tensor, beta: Tensor | None = None) -> Tensor:
    """Outputs (batch, heads, seq, d); log_alpha, beta (batch, heads, seq); no beta: plain sums."""
    state, outputs = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1]), []  # (.., d, d)
    for t in range(query.shape[2]):
        q, k, v = (x[:, :, t, :, None] for x in (query, key, value))  # (batch, heads, d, 1)
        state = state * log_alpha[:, :, t, None, None].exp()
        if beta is not None:
            v = beta[:, :, t, None, None] * (v - state.mT @ k)  # only what is not yet there
        state = state + k @ v.mT
        outputs.append((state.mT @ q).squeeze(-1))
    return torch.stack(outputs, dim=2)


# %% [markdown]
# A loop over tokens is right for decoding, and far too slow for training. So cut the text into chunks. Let $g_t$ be the sum of $\log \alpha$ from the chunk's start to $t$. Within a chunk the layer is attention with the weights $(q_t \cdot k_j)\, e^{g_t - g_j}$ for $j \le t$, all at once; what came before the chunk is in the state, which is read with the factor $e^{g_t}$.
#
# The delta rule needs one more step, because what a token writes depends on what the tokens before it wrote. Call it $u_t$. Inside a chunk $u_t = \beta_t \big(v_t - e^{g_t} S^\top k_t - \sum_{j < t} e^{g_t - g_j} (k_t \cdot k_j)\, u_j\big)$: a triangular system of linear equations, which a matrix library solves in one call.


# %%
def chunked(query, key, value, log_alpha, beta=None, chunk: int = 16) -> Tensor:
    """The same as `recurrent`, one chunk at a time."""
    state, outputs = key.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1]), []  # (.., d, d)
    parts = (x.split(chunk, dim=2) for x in (query, key, value, log_alpha))
    betas = [None] * -(-query.shape[2] // chunk) if beta is None else beta.split(chunk, dim=2)
    for q, k, v, log_a, b in zip(*parts, betas, strict=True):
        g = log_a.cumsum(-1)  # (batch, heads, chunk)
        decay = (g[..., :, None] - g[..., None, :]).tril().exp().tril()  # (.., chunk, chunk)
        since = g[..., None].exp()  # from the chunk's start: (.., chunk, 1)
        written = v
        if b is not None:
            system = torch.eye(k.shape[2]) + (b[..., None] * (k @ k.mT) * decay).tril(-1)
            missing = b[..., None] * (v - since * (k @ state))
            written = torch.linalg.solve_triangular(system, missing, upper=False)
        outputs.append((q @ k.mT * decay) @ written + since * (q @ state))
        to_end = (g[..., -1:] - g)[..., None].exp()
        state = g[..., -1, None, None].exp() * state + (k * to_end).mT @ written
    return torch.cat(outputs, dim=2)


# %% [markdown]
# Compare loop and chunks, and both with the library: SSD with Mamba-2's scan, and the delta rule with that of Qwen3-Next. They take the sequence before the heads; Mamba-2 writes $\alpha = e^{\Delta A}$ and multiplies values by the step $\Delta$; Qwen3-Next divides queries by $\sqrt d$.

# %%
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

torch.manual_seed(seed)
query, key, value = (torch.randn(2, 3, 50, 8) for _ in range(3))  # (batch, heads, seq, d)
key = F.normalize(key, dim=-1)
log_alpha, beta = -torch.rand(2, 3, 50), torch.rand(2, 3, 50)
swapped = [x.transpose(1, 2) for x in (query, key, value, log_alpha, beta)]
q, k, v, step, b = swapped[0], swapped[1], swapped[2], -swapped[3], swapped[4]  # A is -1
scan = mamba2_chunk_scan(v / step[..., None], step, -torch.ones(3), k, q, chunk_size=16)
delta, _ = torch_chunk_gated_delta_rule(q, k, v, -step, b, chunk_size=16)
delta = delta.transpose(1, 2) * math.sqrt(8)  # (batch, heads, seq, d)
library = {"SSD": (None, scan.transpose(1, 2), "Mamba-2's"),
           "the gated delta rule": (beta, delta, "Qwen3-Next's")}  # fmt: skip
for name, (strength, theirs, whose) in library.items():
    by_chunks = chunked(query, key, value, log_alpha, strength)
    by_tokens = recurrent(query, key, value, log_alpha, strength)
    lesson.equal(f"{name}, by chunks and by tokens",
                 (by_chunks - by_tokens).abs().max().item(), within=1e-4)  # fmt: skip
    lesson.equal(f"{name} by chunks is {whose}", (by_chunks - theirs).abs().max().item(), within=1e-4)

# %% [markdown]
# **How much does a state hold?** Store $n$ pairs of a random key of length 1 and a random value, with nothing forgotten ($\alpha = 1$), then ask for each. With plain sums the answer to key $i$ is $v_i + \sum_{j \neq i} (k_i \cdot k_j)\, v_j$. Two random directions of $d$ dimensions have $\mathbb{E}\,(k_i \cdot k_j)^2 = 1/d$, so the error, relative to the length of a value, is about $\sqrt{(n - 1)/d}$. The delta rule ($\beta = 1$) writes only what the state does not yet answer. What it leaves may be for want of room, or because one pass over keys that overlap is too little: so write the same pairs ten times over as well.


# %%
def read_error(pairs: int, correct: bool, rounds: int = 1, new: bool = True, size: int = 64) -> float:
    """Error of reading all pairs, relative to the values; further rounds have new values or the same."""
    generator = torch.Generator().manual_seed(1000 * seed + pairs)
    states = 8 * max(1, 64 // pairs)  # more of them where each answers few questions
    keys = F.normalize(torch.randn(states, 1, pairs, size, generator=generator), dim=-1)
    values = torch.randn(states, 1, (rounds if new else 1) * pairs, size, generator=generator)
    values = values if new else values.repeat(1, 1, rounds, 1)
    written, asked = keys.repeat(1, 1, rounds, 1), torch.zeros_like(keys)
    key, value = torch.cat([written, asked], dim=2), torch.cat([values, asked], dim=2)
    query = torch.cat([torch.zeros_like(written), keys], dim=2)
    all_kept = torch.zeros(states, 1, key.shape[2])  # log alpha
    told = chunked(query, key, value, all_kept, all_kept.exp() if correct else None, chunk=64)
    newest = values[:, :, -pairs:]
    return ((told[:, :, -pairs:] - newest).norm() / newest.norm()).item()


numbers = [4, 8, 16, 32, 64, 128, 256]
by_sum, by_delta = ([read_error(n, correct) for n in numbers] for correct in (False, True))
ten_passes = [read_error(n, True, rounds=10, new=False) for n in numbers]
predicted = [math.sqrt((n - 1) / 64) for n in numbers]
off = [max(abs(found / wanted - 1) for found, wanted in zip(found_all, predicted, strict=True))
       for found_all in (by_sum, by_delta)]  # fmt: skip
lesson.claim("the error of a sum of pairs follows the root of (n - 1) / d (largest deviation)",
             off[0], at_most=0.15, control=off[1], form=".0%")  # fmt: skip
again = [read_error(4, correct, rounds=4) for correct in (False, True)]
print(f"4 keys, each written 4 times with new values: error {again[0]:.2f} by sums, {again[1]:.2f} "
      "with the delta rule")  # fmt: skip
lesson.claim("the delta rule returns the newest value of a key (error)", again[1], at_most=0.5,
             control=again[0])  # fmt: skip

# %%
for n, *errors in zip(numbers, by_sum, predicted, by_delta, ten_passes, strict=True):
    print("{:>4} pairs in a state of 64 x 64: error {:.2f} by sums (formula {:.2f}), {:.2f} with the "
          "delta rule, {:.2f} after ten passes".format(n, *errors))  # fmt: skip
figure = plots.curve(
    {"sum of pairs": (numbers, by_sum), "delta rule": (numbers, by_delta),
     "delta rule, ten passes": (numbers, [max(error, 1e-3) for error in ten_passes])},
    title="A state of fixed size answers worse with each further pair",
    xlabel="pairs stored (state of 64 x 64)", ylabel="error of the answers (1 = length of a value)",
    log_x=True, log_y=True,
)  # fmt: skip
figure.axes[0].plot(numbers, predicted, ":", color=plots.INK, zorder=4)  # the formula, on the sum
plots.show(figure, alt="Error over the number of pairs, log-log: the sum lies on its dotted formula, the delta "
           "rule below it, and after ten passes far below where pairs are few.")  # fmt: skip

# %% [markdown]
# A sum of pairs follows its formula: with as many pairs as dimensions the error is as large as the values. The delta rule errs less at every number, and it can overwrite, which a sum cannot. It too answers worse with each pair. Ten passes tell why. With few pairs they take the error away (the figure draws errors below 0.001 at 0.001): what was missing was passes. With more pairs than dimensions they do not: $d$ dimensions hold at most $d$ keys that do not disturb each other. A model reads its text once, so both limits count. A cache has neither: it grows.

# %% [markdown] tags=["further"]
# ## 4b · A hybrid on a recall task
#
# *Further: no core section needs this one.*
#
# **Question.** A trained layer with a state forgets long lists. Has it too little room, or too little training? And what does attention in one of two layers change?
#
# A test that language models of any kind find hard when their memory is small is *associative recall* (Arora et al. 2023): a list of pairs, then the keys again in another order, and at each the model must say its value. Train a model of one attention layer, one of two gated delta layers, and one with a layer of each kind. Size, short convolution (it lets a token see its neighbours), data, steps and rate are equal. A head has $d = 16$, so the delta layers have a state of $16 \times 16$. Then train the two delta layers again, once with twice the $d$ and once with twice the steps.

# %%
SYMBOLS, WIDTH, HEAD = 32, 64, 16  # keys, and values; size of a model; size d of its head
LISTS = (2, 4, 8, 16)  # pairs of the training lists; 32 pairs are only tested


def recall_batch(rows: int, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lists (rows, 3 pairs): key, value, key, value .. then all keys; and what to say there."""
    keys = torch.rand(rows, SYMBOLS, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(SYMBOLS, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(-1)
    told = torch.stack([keys, SYMBOLS + values], dim=-1).flatten(1)  # (rows, 2 pairs)
    return torch.cat([told, keys.gather(1, order)], dim=1), values.gather(1, order)


class Mixer(nn.Module):
    """One head over a short convolution: softmax attention, or the gated delta rule."""

    def __init__(self, kind: str, head: int):
        super().__init__()
        self.kind = kind
        self.inward = nn.Linear(WIDTH, 3 * head, bias=False)
        self.outward = nn.Linear(head, WIDTH, bias=False)
        self.near = nn.Conv1d(3 * head, 3 * head, 3, groups=3 * head, padding=2, bias=False)
        self.gates = nn.Linear(WIDTH, 2)
        nn.init.constant_(self.gates.bias, 2.0)  # forget little, write much

    def forward(self, hidden: Tensor) -> Tensor:
        near = self.near(self.inward(hidden).mT)[..., : hidden.shape[1]].mT  # sees 3 tokens
        query, key, value = near[:, None].chunk(3, dim=-1)  # (batch, 1, seq, head)
        if self.kind == "attention":
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            keep, write = self.gates(hidden)[:, None].unbind(-1)  # (batch, 1, seq)
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
            mixed = chunked(query, key, value, F.logsigmoid(2 * keep), write.sigmoid(), chunk=96)
        return self.outward(mixed[:, 0])


# %%
class RecallModel(nn.Module):
    """Symbols (batch, seq) -> logits of values (batch, seq, SYMBOLS)."""

    def __init__(self, kinds: list[str], head: int):
        super().__init__()
        self.embed = nn.Embedding(2 * SYMBOLS, WIDTH)
        self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.mixers = nn.ModuleList(Mixer(kind, head) for kind in kinds)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(len(kinds) + 1))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        for mixer, norm in zip(self.mixers, self.norms, strict=False):
            hidden = hidden + mixer(norm(hidden))
        return self.head(self.norms[-1](hidden))


def new_model(kinds: list[str], stream: int, head: int) -> nn.Module:
    """A fresh model."""
    torch.manual_seed(stream)
    return RecallModel(kinds, head)


def recalls(network: nn.Module, stream: int, steps: int) -> list[float]:
    """Train on lists of all lengths in turn; share of right values for 2 to 32 pairs."""
    generator = torch.Generator().manual_seed(stream)
    optimizer = torch.optim.AdamW(network.parameters(), lr=8e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 8e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        ids, values = recall_batch(32, LISTS[step % 4], generator)
        logits = network(ids)[:, -values.shape[1] :]  # where the keys are asked
        F.cross_entropy(logits.flatten(0, 1), values.flatten()).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        tests = [recall_batch(128, pairs, generator) for pairs in (*LISTS, 32)]
        return [(network(ids)[:, -len(values[0]) :].argmax(-1) == values).float().mean().item()
                for ids, values in tests]  # fmt: skip


# %%
RECALL_STEPS, RECALL_SEEDS = lesson.scaled(180), (seed, seed + 100, seed + 200)
contests = {  # name -> layers, steps, size of the head, training seeds
    "attention alone": (["attention"], RECALL_STEPS, HEAD, RECALL_SEEDS[:1]),
    "delta, attention": (["delta", "attention"], RECALL_STEPS, HEAD, RECALL_SEEDS),
    "delta, delta": (["delta"] * 2, RECALL_STEPS, HEAD, RECALL_SEEDS),
    "delta, delta, twice the d": (["delta"] * 2, RECALL_STEPS, 2 * HEAD, RECALL_SEEDS[:1]),
    "delta, delta, twice the steps": (["delta"] * 2, 2 * RECALL_STEPS, HEAD, RECALL_SEEDS[:1]),
}
runs = [(new_model(kinds, stream, head), stream, steps)
        for kinds, steps, head, streams in contests.values() for stream in streams]  # fmt: skip
results = iter(two_at_a_time(recalls, runs))
recall = {name: [next(results) for _ in streams] for name, (*_, streams) in contests.items()}
asked = [*LISTS, 32]
for name, runs in recall.items():
    told = [" ".join(f"{share:.0%}" for share in shares) for shares in zip(*runs, strict=True)]
    print(f"{name:<31}", "; ".join(f"{n} pairs: {x}" for n, x in zip(asked, told, strict=True)))
gain = min(mixed[-1] - pure[-1] for mixed, pure in
           zip(recall["delta, attention"], recall["delta, delta"], strict=True))  # fmt: skip
lesson.claim("at equal steps, attention in one of two layers recalls at least 30 points more of 32 pairs",
             gain, at_least=0.3, form=".0%")  # fmt: skip
for name in ("twice the d", "twice the steps"):
    more = recall[f"delta, delta, {name}"][0][-1] - recall["delta, delta"][0][-1]
    lesson.report(f"32 pairs that two delta layers recall more with {name}, one run", more, form=".0%")

# %% tags=["headline"]
lines = {}
for name, runs in recall.items():
    by_length = list(zip(*runs, strict=True))  # the seeds of each length
    lines[name] = (asked, *(list(map(pick, by_length)) for pick in (np.median, min, max)))
figure = plots.curve(
    lines, title="Long lists need a larger state, more training, or attention",
    xlabel="pairs in the list (training: up to 16)", ylabel="values recalled", log_x=True,
    percent=True, limits_y=(0, 1.05), references={"guessing": 1 / SYMBOLS},
)  # fmt: skip
plots.show(figure, alt="Recall over pairs in the list: attention and the hybrid stay at the top, two "
           "delta layers fall for long lists, less so with a larger state or more steps.")  # fmt: skip

# %% [markdown]
# At equal steps the model with attention recalls long lists and the two delta layers do not. It would be wrong to call that the limit of their state: with twice the steps the same state holds many more of 32 pairs, and with twice the $d$ (four times the state, and twice the weights of a layer's projections) it does so without more steps, in one run each. So what you saw first was too little training for this room, at least in part. An undertrained model fails on long lists first, so its curve looks like that of a full memory. One attention layer alone solves the task too; in the hybrid the delta layer may do nothing. Large models mix the kinds: in Qwen3-Next three layers of four are of the delta kind. How many layers of attention a model needs is found by training some, for long enough.

# %% [markdown] tags=["core"]
# ## 5 · A mixture of experts
#
# **Question.** Can a model have more parameters at the same cost for each token?
#
# Make $E$ copies of a feed-forward layer, the *experts*, and let each token use only $k$ of them. A *router*, a matrix, scores the experts for each token: $p = \mathrm{softmax}(W_r x)$. The token goes to the $k$ experts with the largest scores, and the output is $\sum_{e \in \text{top-}k} \frac{p_e}{\sum_{\text{top-}k} p}\, \mathrm{FFN}_e(x)$. The parameters grow with $E$, the work of a token with $k$.


# %%
def route(tokens: Tensor, router: Tensor, k: int, bias: Tensor | float = 0.0):
    """Probabilities (tokens, E); weights and indices (tokens, k) of the chosen experts."""
    probabilities = (tokens @ router.mT).softmax(-1)
    chosen = (probabilities.detach() + bias).topk(k, dim=-1).indices
    weights = probabilities.gather(-1, chosen)
    return probabilities, weights / weights.sum(-1, keepdim=True), chosen


def apply_experts(tokens: Tensor, gate_up: Tensor, down: Tensor, weights, chosen) -> Tensor:
    """Each expert's SwiGLU on the tokens that chose it, added up: (tokens, hidden_size)."""
    output = torch.zeros_like(tokens)
    for expert, (inward, outward) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        gate, up = (tokens[token] @ inward.mT).chunk(2, dim=-1)
        result = weights[token, place, None] * ((F.silu(gate) * up) @ outward.mT)
        output = output.index_add(0, token, result.to(output.dtype))
    return output


# %% [markdown]
# This is Mixtral's block. A router left to itself may send most tokens to a few experts, so Mixtral adds a loss for balance (Fedus et al. 2021), $E \sum_e f_e\, \bar p_e$, with $f_e$ the number of choices of expert $e$ for each token and $\bar p_e$ its mean probability. Only $\bar p_e$ has a gradient: it falls where $f_e$ is large.

# %%
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral as mixtral


def balancing_loss(probabilities: Tensor, chosen: Tensor) -> Tensor:
    """E times the sum over experts of choices per token times mean probability."""
    experts = probabilities.shape[-1]
    share = F.one_hot(chosen, experts).float().sum(1).mean(0)  # (E,)
    return experts * (share * probabilities.mean(0)).sum()


torch.manual_seed(seed)
small_moe = {"hidden_size": 32, "num_experts_per_tok": 2, "num_local_experts": 8}
block = mixtral.MixtralSparseMoeBlock(MixtralConfig(**small_moe, intermediate_size=48))
for weights in block.parameters():
    nn.init.normal_(weights.requires_grad_(False), std=0.3)
hidden = torch.randn(2, 9, 32)  # (batch, seq, hidden_size)
tokens = hidden.flatten(0, 1)  # (tokens, hidden_size)
probabilities, weights, chosen = route(tokens, block.gate.weight, k=2)
own = block.experts
ours = apply_experts(tokens, own.gate_up_proj, own.down_proj, weights, chosen)
difference = (ours - block(hidden).flatten(0, 1)).abs().max().item()
lesson.equal("the mixture is Mixtral's block", difference, within=1e-5)
theirs = mixtral.load_balancing_loss_func((tokens @ block.gate.weight.mT,), 8, top_k=2)
difference = (balancing_loss(probabilities, chosen) - theirs).abs().item()
lesson.equal("the balancing loss of one layer is Mixtral's", difference, within=1e-5)

# %% [markdown]
# (In the library Mixtral's loss is only added with `output_router_logits=True`, and it pools all layers before it multiplies; with one layer, as here, that is the same.) Section 5b trains with it.
#
# **What are more parameters good for?** For remembering (Jelassi et al. 2024 find so at scale: experts help where facts are asked, much less where steps of thought are). Try it where memory is all that counts: 3,000 facts, each a random key vector with one of 32 answers. No rule relates them. Compare a dense layer, a mixture of 8 such layers of which each key uses one, the same with a router that never learns, and a dense layer with as many parameters as the whole mixture, which costs 8 times the work.

# %%
FACTS, ANSWERS, KEY, HIDDEN = 3000, 32, 32, 32


def remembered(experts: int, hidden: int, stream: int, learn_router: bool = True) -> int:
    """Facts that are right after training a layer, or a mixture with one expert for each key."""
    generator = torch.Generator().manual_seed(stream)
    keys = math.sqrt(KEY) * F.normalize(torch.randn(FACTS, KEY, generator=generator), dim=-1)
    answers = torch.randint(ANSWERS, (FACTS,), generator=generator)
    up = torch.randn(experts, KEY, hidden, generator=generator) / math.sqrt(KEY)
    down = torch.randn(experts, hidden, ANSWERS, generator=generator) / math.sqrt(hidden)
    router = torch.randn(experts, KEY, generator=generator) / math.sqrt(KEY)
    parameters = [x.requires_grad_() for x in ((up, down, router) if learn_router else (up, down))]
    optimizer, steps = torch.optim.AdamW(parameters, weight_decay=0.0), lesson.scaled(120)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * min(1, (step + 1) / 10) * (1 - step / steps)
        probabilities = (keys @ router.mT).softmax(-1)  # (facts, experts)
        weight, choice = probabilities.max(-1)  # one expert: its probability is its weight
        logits = torch.zeros(FACTS, ANSWERS)
        for expert in range(experts):
            own = (choice == expert).nonzero().squeeze(-1)
            told = F.relu(keys[own] @ up[expert]) @ down[expert]
            logits = logits.index_add(0, own, weight[own, None] * told)
        F.cross_entropy(logits, answers).backward()
        optimizer.step()
        optimizer.zero_grad()
    return int((logits.argmax(-1) == answers).sum())


# %%
contests = {"dense layer": (1, HIDDEN), "8 experts, 1 used": (8, HIDDEN),
            "8 experts, router fixed": (8, HIDDEN),
            "dense, 8 times as wide": (1, 8 * HIDDEN)}  # fmt: skip
runs = [(experts, inner, seed + 100 * i, "fixed" not in name)
        for name, (experts, inner) in contests.items() for i in range(3)]  # fmt: skip
results = iter(two_at_a_time(remembered, runs))
facts = {name: [next(results) for _ in range(3)] for name in contests}
for name, (experts, inner) in contests.items():
    one, routing = inner * (KEY + ANSWERS), experts * KEY if experts > 1 else 0
    print(f"{name:<24}{experts * one + routing:>7,} parameters, {one + routing:>7,} multiplications"
          " a key, right:", *(f"{right / FACTS:.0%}" for right in facts[name]))  # fmt: skip
figure = plots.bars_with_intervals(
    {name: score(sum(right), 3 * FACTS) for name, right in facts.items()},
    title="More parameters hold more facts at about equal work for each token",
    xlabel="facts remembered after 120 steps (3 seeds)", references={"guessing": 1 / ANSWERS},
)  # fmt: skip
plots.show(figure, alt="Bars: a dense layer remembers few facts; 8 experts, with a learned or a fixed "
           "router, and the wide dense layer nearly all.")  # fmt: skip
pairs = zip(facts["8 experts, 1 used"], facts["dense layer"], strict=True)
lesson.claim("for about the same work eight experts remember at least 30 points more facts than one",
             min(many - one for many, one in pairs) / FACTS, at_least=0.3, form=".0%")  # fmt: skip

# %% [markdown]
# The mixture remembers as much as the wide layer, for little more work than the narrow one; the router is the small extra that the table counts. A router that never learned comes close, though the learned one is ahead by a few points: for random keys a fixed division nearly does, as with hashing. What a learned router adds where keys are related, this toy cannot show.

# %% [markdown] tags=["further"]
# ## 5b · Upcycling, and equal work for all experts
#
# *Further: no core section needs this one.*
#
# **Question.** Can a trained dense model become a mixture, and does each of its experts get its share of the work?
#
# DeepSeek-V3's mixture differs from Mixtral's in three things. It takes a sigmoid for each expert in place of the softmax, it chooses by the score *plus a bias* that the weights do not see, and it adds one *shared expert* that all tokens pass.

# %%
torch.manual_seed(seed)
deep = deepseek.DeepseekV3MoE(DeepseekV3Config(**small_moe, moe_intermediate_size=48, n_group=1, topk_group=1))
for weights in [*deep.parameters(), deep.gate.e_score_correction_bias]:
    nn.init.normal_(weights.requires_grad_(False), std=0.3)
scores = (tokens @ deep.gate.weight.mT).sigmoid()  # (tokens, E)
chosen = (scores + deep.gate.e_score_correction_bias).topk(2, dim=-1).indices
weights = scores.gather(-1, chosen)
weights = weights / weights.sum(-1, keepdim=True) * deep.gate.routed_scaling_factor
own = deep.experts
ours = apply_experts(tokens, own.gate_up_proj, own.down_proj, weights, chosen)
ours = ours + deep.shared_experts(tokens)
difference = (ours - deep(hidden).flatten(0, 1)).abs().max().item()
lesson.equal("sigmoid, bias and shared expert are DeepSeek-V3's block", difference, within=1e-5)

# %% [markdown]
# **Upcycling** (Komatsuzaki et al. 2022). A mixture need not begin from nothing. Copy a trained layer $E$ times and add a random router: since the weights of the chosen experts sum to 1, and all experts are alike, the output does not change. Do this to the last layer of the course's model, and train only this layer. All below it can then be computed once.

# %%
EXPERTS, PICK = 8, 2
last = model.requires_grad_(False).model.layers[-1]
dense = last.mlp


class Upcycled(nn.Module):
    """The last layer's feed-forward part as a mixture of copies, and what comes after it."""

    def __init__(self, stream: int):
        super().__init__()
        generator = torch.Generator().manual_seed(stream)
        gate_up = torch.cat([dense.gate_proj.weight, dense.up_proj.weight]).detach()
        self.gate_up = nn.Parameter(gate_up.repeat(EXPERTS, 1, 1))
        self.down = nn.Parameter(dense.down_proj.weight.detach().repeat(EXPERTS, 1, 1))
        router = 0.02 * torch.randn(EXPERTS, gate_up.shape[-1], generator=generator)
        self.router = nn.Parameter(router.to(gate_up.device))
        self.bias = torch.zeros(EXPERTS, device=gate_up.device)  # moved by hand, not by a gradient

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States before the layer's second norm -> logits, and how each token was routed."""
        tokens = last.post_attention_layernorm(states).flatten(0, 1)
        probabilities, weights, chosen = route(tokens, self.router, PICK, self.bias)
        mixed = apply_experts(tokens, self.gate_up, self.down, weights, chosen)
        states = model.model.norm(states + mixed.view_as(states))
        return model.lm_head(states), probabilities, chosen


def states_of(rows: Tensor) -> Tensor:
    """What comes to the last layer's second norm: (rows, seq, hidden_size)."""
    seen = []
    norm = last.post_attention_layernorm
    hook = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(input_ids=rows.to(model.device))
    hook.remove()
    return seen[0]


# %%
held_out_states = states_of(held_out)
with torch.no_grad():
    before = model(input_ids=held_out.to(model.device)).logits
    after, _, chosen = Upcycled(seed)(held_out_states)
difference = ((after - before).norm() / before.norm()).item()
lesson.equal("an upcycled model has the logits of the dense one (relative)", difference, within=1e-4)
share = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel() * EXPERTS
print("load of the experts, 1 is an equal share:", " ".join(f"{x:.2f}" for x in share.tolist()))

# %% [markdown]
# The logits stay, and the load is unequal from the start: a random router has its favourites. Now train the layer in three ways: without balancing, with the loss, and with DeepSeek's bias (Wang et al. 2024). The bias is moved by hand after each step, up for experts with less than their share and down for those with more; by 0.02, since there are only few steps. The expert whose device has most to do is the one all others wait for, so measure the largest load.

# %%
MOE_STEPS = lesson.scaled(30)
moe_rows = text_rows(16 * settings["batch"], 3000 + seed, 64)
moe_states = torch.cat([states_of(part) for part in moe_rows.split(16)])


def balanced(how: str) -> tuple[list[float], float]:
    """Loads of the experts on held-out text, and the loss there, after training the mixture."""
    mixture, generator = Upcycled(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(MOE_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / MOE_STEPS)
        picked = torch.randint(len(moe_rows), (settings["batch"],), generator=generator)
        with lesson.autocast():
            logits, probabilities, chosen = mixture(moe_states[picked.to(moe_states.device)])
        targets = moe_rows[picked, 1:].to(logits.device)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
        extra = 0.01 * balancing_loss(probabilities, chosen) if how == "loss" else 0.0
        (loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
        if how == "bias":
            load = torch.bincount(chosen.flatten(), minlength=EXPERTS).float()
            mixture.bias += 0.02 * (load.mean() - load).sign()
    with torch.no_grad():
        logits, _, chosen = mixture(held_out_states)
    targets = held_out[:, 1:].to(logits.device)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).item()
    load = torch.bincount(chosen.flatten(), minlength=EXPERTS) / chosen.numel() * EXPERTS
    return load.sort(descending=True).values.tolist(), loss


# %%
loads = {name: balanced(how) for name, how in
         {"no balancing": "", "balancing loss": "loss", "bias": "bias"}.items()}  # fmt: skip
for name, (load, loss) in loads.items():
    print(f"{name:<15} largest load {load[0]:.2f}, smallest {load[-1]:.2f}; loss {loss:.3f}")
figure = plots.curve(
    {name: (range(1, EXPERTS + 1), load) for name, (load, _) in loads.items()},
    title="The load of the experts, with and without balancing",
    xlabel="experts, the busiest first", ylabel="load (1 = an equal share of the tokens)",
    references={"equal share": 1.0},
)  # fmt: skip
plots.show(figure, alt="Load of eight experts, sorted: without balancing from far above to far below the "
           "equal share; in this run the line is flatter with the loss or the bias.")  # fmt: skip
excess = share.max().item() - 1  # of the busiest expert before the training
gone = {name: 1 - (load[0] - 1) / excess for name, (load, _) in loads.items()}
print("extra load of the busiest expert taken away:", {name: f"{x:.0%}" for name, x in gone.items()})
for name, part in gone.items():
    lesson.report(f"extra load of the busiest expert taken away: {name}", part, form=".0%")

# %% [markdown]
# Compare the three lines with the load before training. Each way is a single run of few steps, so do not rank the loss and the bias by it: on other seeds their order changes, and there are seeds on which the bias takes nothing away. (`data/claims.json` has the numbers of five seeds.) The losses of the three runs are close together: this is about balance, and not about loss. The experts began alike, and 30 steps are few to become different. (Some models add a *z-loss* on the router, the mean of $(\log \sum_e e^{x_e})^2$ over tokens, so that its logits $x$ stay small: Zoph et al. 2022.)

# %% [markdown] tags=["further"]
# ## 6 · Two tokens at a time
#
# *Further: no core section needs this one.*
#
# **Question.** Could the model guess the token after the next, and write faster by it?
#
# *Multi-token prediction* (MTP) adds one more block. In DeepSeek-V3 (2024) it gets the state $h_t$ of the last layer and the embedding of the next token $x_{t+1}$, joins both by a matrix, and predicts $x_{t+2}$ with the model's own head. Train such a block here, on the frozen model; it begins as a copy of the last layer.

# %%
trunk = model.model
norm_epsilon = model.config.rms_norm_eps


class Ahead(nn.Module):
    """States of tokens (batch, seq, hidden_size) and the next tokens -> logits of those after."""

    def __init__(self):
        super().__init__()
        size = model.config.hidden_size
        self.norm_state, self.norm_token = (nn.RMSNorm(size, eps=norm_epsilon) for _ in range(2))
        self.join = nn.Linear(2 * size, size, bias=False)
        self.join.weight.data = torch.cat([torch.eye(size), torch.eye(size)], dim=1) / 2
        self.block = copy.deepcopy(trunk.layers[-1]).requires_grad_(True)
        self.norm = copy.deepcopy(trunk.norm)

    def forward(self, states: Tensor, next_ids: Tensor) -> Tensor:
        tokens = trunk.embed_tokens(next_ids)
        hidden = self.join(torch.cat([self.norm_state(states), self.norm_token(tokens)], dim=-1))
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        turned = trunk.rotary_emb(hidden, position_ids=places)
        hidden = self.block(hidden, attention_mask=None, position_ids=places,
                            position_embeddings=turned)  # fmt: skip
        return model.lm_head(self.norm(hidden))


def ahead_loss(ahead: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the token after the next; the model below is frozen."""
    ids = batch["input_ids"]
    with torch.no_grad():
        states = trunk(input_ids=ids[:, :-2]).last_hidden_state
    return F.cross_entropy(ahead(states, ids[:, 1:-1]).float().flatten(0, 1), ids[:, 2:].flatten())


# %%
model.requires_grad_(False)
torch.manual_seed(seed)
untrained, ahead = Ahead().to(model.device).eval(), Ahead().to(model.device)
AHEAD_STEPS = lesson.scaled(50)
rows = text_rows(AHEAD_STEPS * settings["batch"], 4000 + seed, 64)
history = train(ahead, batches(rows, seed), schedule(AHEAD_STEPS, 3e-3), loss_fn=ahead_loss)
ahead.eval()
print(f"loss of the token after the next: {history.losses[0]:.2f} at first, "
      f"{sum(history.losses[-5:]) / len(history.losses[-5:]):.2f} at the end")  # fmt: skip

# %% [markdown]
# **Self-speculation.** The block drafts a token, and the model checks the draft while it computes the next step anyway: give it the last token *and* the draft in one pass. If its own choice after the last token is the draft, then its choice after the draft counts as well, and the pass has brought two tokens. If not, throw the draft away. Whatever the draft, each token is the model's own choice, so the text cannot change.


# %%
def speculate(ahead: nn.Module, prompt: list[int], number: int) -> tuple[list[int], int]:
    """Greedy text of `number` tokens, and the passes through the model that it took."""
    cache, device = DynamicCache(), model.device
    given = torch.tensor([prompt], device=device)
    states = trunk(input_ids=given, past_key_values=cache).last_hidden_state  # (1, seq, size)
    ids, passes = [*prompt, model.lm_head(states[:, -1]).argmax().item()], 1
    while len(ids) < len(prompt) + number:
        draft = ahead(states, torch.tensor([ids[1:]], device=device))[0, -1].argmax().item()
        pair = torch.tensor([[ids[-1], draft]], device=device)
        new = trunk(input_ids=pair, past_key_values=cache).last_hidden_state  # (1, 2, size)
        own, after = model.lm_head(new)[0].argmax(-1).tolist()
        passes += 1
        if own == draft:
            ids, states = [*ids, draft, after], torch.cat([states, new], dim=1)
        else:
            ids, states = [*ids, own], torch.cat([states, new[:, :1]], dim=1)
            cache.crop(-1)  # forget the draft
    return ids[len(prompt) :][:number], passes


def greedy(prompts: list[list[int]], number: int) -> list[list[int]]:
    """The same texts, one token a pass; prompts of equal length, all in one batch."""
    cache, told = DynamicCache(), [torch.tensor(prompts, device=model.device)]
    for _ in range(number):
        logits = model(input_ids=told[-1], past_key_values=cache).logits[:, -1:]
        told.append(logits.argmax(-1))  # (prompts, 1)
    return torch.cat(told[1:], dim=1).tolist()


# %%
starts = [row[:12] for row in text_rows(lesson.scaled(12), 5000 + seed, 64).tolist()]
LENGTH, per_pass = 32, {}
with torch.no_grad():
    plain = greedy(starts, LENGTH)
    for name, network, texts in (("untrained block", untrained, 4), ("trained block", ahead, len(starts))):
        runs = [speculate(network, start, LENGTH) for start in starts[:texts]]
        changed = sum(ids != text for (ids, _), text in zip(runs, plain, strict=False))
        per_pass[name] = len(runs) * LENGTH / sum(passes for _, passes in runs)
        print(f"{name}: {per_pass[name]:.2f} tokens a pass, {changed} of {len(runs)} texts changed")
lesson.equal("texts that self-speculation changes", changed)
lesson.claim("with a trained block each pass through the model brings at least 1.3 tokens",
             per_pass["trained block"], at_least=1.3, control=per_pass["untrained block"])  # fmt: skip
block_cost = 1 / layers
print(f"with the block's own work, {block_cost:.0%} of the model's layers, that is "
      f"{per_pass['trained block'] / (1 + block_cost):.2f} tokens for the work of one pass")  # fmt: skip

# %% [markdown]
# The text is the same, and a pass brings more than one token. In a model of few layers the block's own work eats much of the gain, as the last line says (it counts layers only, and takes a pass over two tokens for as dear as one over one); in a deep model it is a small part. DeepSeek-V3's report gives 85 to 90 % of the drafts accepted, and 1.8 times the tokens per second (2024, section 5.4.3).

# %% [markdown] tags=["core"]
# ## 7 · Many processes
#
# **Question.** How do several processes train one model, and what do they have to tell each other?
#
# A single process computes the gradients of a batch. Several can share out the **rows** of the batch, the **state** that is kept for each weight, the **matrices**, or the **layers**. Each way saves something and sends something. You write each of them for $p$ real processes, and compare with a single process and with torch.
#
# Everything that is sent passes through one function, which counts the bytes. `dist` is torch's library of messages between processes; with the backend *gloo* it needs no GPU. The cells up to the run define functions and run nothing: the processes will be started from a script that is made of these very cells.

# %%
import socket

import torch.distributed as dist

BYTES = 8  # of a number: 64 bits, so that rounding hides no mistake
SENT = {"bytes": 0}  # by this process


def exchange(outgoing: Tensor, destination: int, source: int, incoming: Tensor | None = None) -> Tensor:
    """Send a tensor to one process while receiving another from one, and count what is sent."""
    incoming = torch.empty_like(outgoing) if incoming is None else incoming
    sending = dist.isend(outgoing.contiguous(), destination)
    dist.recv(incoming, source)
    sending.wait()
    SENT["bytes"] += outgoing.numel() * outgoing.element_size()
    return incoming


# %% [markdown]
# **The sum over all processes.** The simplest way: everyone sends everything to process 0, which adds up and sends the sum back. Then process 0 sends and receives $(p - 1) N$ bytes each way, while the others wait. In a **ring** all links work at once. Cut the $N$ bytes into $p$ parts. In each of $p - 1$ steps every process passes one part to its neighbour, who adds its own: afterwards process $i$ holds part $i$ of the sum (*reduce-scatter*). Another $p - 1$ steps hand the finished parts round (*all-gather*). Each step sends $N / p$ bytes, so each process sends
#
# $$\underbrace{\tfrac{p - 1}{p} N}_{\text{reduce-scatter}} + \underbrace{\tfrac{p - 1}{p} N}_{\text{all-gather}} = 2\, \tfrac{p - 1}{p} N \quad \text{for both together, an } \textit{all-reduce}$$
#
# This is less than $2 N$ for any number of processes.


# %%
def reduce_scatter(values: Tensor) -> Tensor:
    """Process i gets part i of the sum over all processes; (n,) -> (n / processes,), in a ring."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = list(values.clone().chunk(size))
    for step in range(size - 1):
        received = exchange(parts[(rank - step - 1) % size], (rank + 1) % size, (rank - 1) % size)
        parts[(rank - step - 2) % size] += received
    return parts[rank]


def all_gather(part: Tensor) -> Tensor:
    """Each process gets the parts of all; (n / processes,) -> (n,), in a ring."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = {rank: part}
    for step in range(size - 1):
        parts[(rank - step - 1) % size] = exchange(parts[(rank - step) % size], (rank + 1) % size, (rank - 1) % size)
    return torch.cat([parts[index] for index in range(size)])


def all_reduce(values: Tensor) -> Tensor:
    """Each process gets the sum over all processes, of any shape."""
    return all_gather(reduce_scatter(values.flatten())).view_as(values)


# %% [markdown]
# **What is trained.** Four small residual blocks on 16 rows. `one_process` is the truth that every way has to reproduce. All numbers have 64 bits here, so that rounding cannot hide a mistake: what is left of a difference is far below any effect.


# %%
class Block(nn.Module):
    """A residual feed-forward block: what the processes share out in most of this section."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.up = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.down = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(hidden)))


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """Four blocks, 16 inputs and 16 targets (rows, hidden): the same in every process."""
    torch.manual_seed(int(os.environ["LESSON_SEED"]))
    return nn.Sequential(*[Block(32) for _ in range(4)]), torch.randn(16, 32), torch.randn(16, 32)


def one_process() -> list[Tensor]:
    """The gradients of the whole batch, as a single process computes them."""
    model, inputs, targets = problem()
    F.mse_loss(model(inputs), targets).backward()
    return [parameter.grad for parameter in model.parameters()]


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two lists of tensors, as a share of the largest number."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.numel()]  # an expert that no row chose has none
    if not pairs:
        return 0.0
    return max((a - b).abs().max().item() for a, b in pairs) / max(b.abs().max().item() for _, b in pairs)


# %% [markdown]
# **Data parallel.** Every process has all weights and its own part of the rows. The gradient of a mean over rows is the mean of the parts' gradients, so one all-reduce makes them equal everywhere. torch calls this `DistributedDataParallel`; it begins to send while the backward pass still runs.


# %%
def data_parallel() -> dict[str, float]:
    """Each process has all weights and a part of the rows; the gradients are averaged."""
    from torch.nn.parallel import DistributedDataParallel

    rank, size = dist.get_rank(), dist.get_world_size()
    model, inputs, targets = problem()
    mine = inputs.chunk(size)[rank], targets.chunk(size)[rank]  # (rows / processes, hidden)
    F.mse_loss(model(mine[0]), mine[1]).backward()
    gradients = [all_reduce(parameter.grad) / size for parameter in model.parameters()]

    theirs = DistributedDataParallel(problem()[0])
    F.mse_loss(theirs(mine[0]), mine[1]).backward()
    return {
        "to one process": largest(gradients, one_process()),
        "to torch": largest(gradients, [parameter.grad for parameter in theirs.parameters()]),
        "bytes by formula": 2 * (size - 1) / size * BYTES * sum(g.numel() for g in gradients),
        "weights kept": sum(parameter.numel() for parameter in model.parameters()),
    }


# %% [markdown]
# **Sharded.** Data parallelism keeps weights, gradients and the optimiser's state $p$ times. *ZeRO* (Rajbhandari et al. 2020) keeps one part of each in every process. Stage 1 shares out the optimiser's state, stage 2 the gradients too, stage 3 the weights as well: a block's weights are gathered just before they are needed, and forgotten afterwards. torch calls stage 3 *fully sharded data parallel*, FSDP.
#
# As a function of autograd this is short. Forward, the whole is gathered from its parts. Backward, every process has a gradient of the whole; each keeps its own part of the mean, which is a reduce-scatter.


# %%
class Gathered(torch.autograd.Function):
    """The whole weights of a block from the parts of all processes; backward, the part's averaged gradient."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        return all_gather(part)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return reduce_scatter(gradient) / dist.get_world_size()


def block_from_parts(block: Block, part: Tensor, hidden: Tensor) -> Tensor:
    """A block whose weights exist in full only while it computes."""
    whole = Gathered.apply(part)  # (parameters of the block,)
    sizes = [parameter.numel() for parameter in block.parameters()]
    weights = [w.view_as(p) for w, p in zip(whole.split(sizes), block.parameters(), strict=True)]
    names = [name for name, _ in block.named_parameters()]
    return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (hidden,))


# %% [markdown]
# Kept from the forward to the backward pass, the gathered weights would take up the memory that was to be saved. So they are forgotten and gathered once more: three passes of $\frac{p-1}{p} N$ bytes, half as much again as data parallelism. Here `checkpoint` does that by running the block again (section 8 writes it); FSDP gathers again without computing again.


# %%
def sharded() -> dict[str, float]:
    """Each process keeps a part of the weights, of their gradients and of the optimiser's state."""
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    rank, size = dist.get_rank(), dist.get_world_size()
    model, inputs, targets = problem()
    flats = [nn.utils.parameters_to_vector(block.parameters()).detach() for block in model]
    parts = [flat.chunk(size)[rank].clone().requires_grad_() for flat in flats]
    hidden, mine = inputs.chunk(size)[rank], targets.chunk(size)[rank]
    for block, part in zip(model, parts, strict=True):  # checkpoint: gather again for the backward pass
        hidden = checkpoint(block_from_parts, block, part, hidden, use_reentrant=False)
    F.mse_loss(hidden, mine).backward()
    sent = SENT["bytes"]

    theirs = problem()[0]
    for layer in [*theirs, theirs]:
        fully_shard(layer)
    F.mse_loss(theirs(inputs.chunk(size)[rank]), mine).backward()
    ours = torch.cat([all_gather(part.grad) for part in parts])
    library = torch.cat([parameter.grad.full_tensor().flatten() for parameter in theirs.parameters()])
    truth = torch.cat([gradient.flatten() for gradient in one_process()])
    SENT["bytes"] = sent  # what follows is for the comparison only
    return {
        "to one process": largest([ours], [truth]),
        "to torch": largest([ours], [library]),
        "bytes by formula": 3 * (size - 1) / size * BYTES * sum(flat.numel() for flat in flats),
        "weights kept": sum(part.numel() for part in parts),
    }


# %% [markdown]
# **Tensor parallel.** Now every process has all rows and a part of each matrix (Shoeybi et al. 2019). Cut `up` so that each process computes some of the inner features, and cut `down` to match: each process then has a summand of the output, $\text{down}(\text{up}(x)) = \sum_i \text{down}_i(\text{up}_i(x))$, since the activation function acts on each inner feature alone. One all-reduce in the forward pass adds them up. In the backward pass each process knows only its own part of the gradient with respect to $x$, so there is one all-reduce there as well. What is sent are activations, not weights.


# %%
class Copied(torch.autograd.Function):
    """Forward: the same activations for every process. Backward: the sum of their gradients."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        return hidden

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)


class Summed(torch.autograd.Function):
    """Forward: the sum of what the processes hold. Backward: the same gradient for each."""

    @staticmethod
    def forward(ctx, hidden: Tensor) -> Tensor:
        return all_reduce(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


# %%
def tensor_parallel() -> dict[str, float]:
    """Each process has a part of every matrix and all rows: columns of `up`, rows of `down`."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    rank, size = dist.get_rank(), dist.get_world_size()
    model, inputs, targets = problem()
    ups = [block.up.weight.detach().chunk(size, 0)[rank].clone().requires_grad_() for block in model]
    downs = [block.down.weight.detach().chunk(size, 1)[rank].clone().requires_grad_() for block in model]
    hidden = inputs.requires_grad_()
    for up, down in zip(ups, downs, strict=True):
        inner = F.gelu(Copied.apply(hidden) @ up.T)  # (rows, 2 * hidden / processes)
        hidden = hidden + Summed.apply(inner @ down.T)  # (rows, hidden)
    F.mse_loss(hidden, targets).backward()
    ours = [part.grad for pair in zip(ups, downs, strict=True) for part in pair]

    theirs, mesh = problem()[0], dist.init_device_mesh("cpu", (size,))
    plan = {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}
    F.mse_loss(parallelize_module(theirs, mesh, plan)(inputs), targets).backward()
    truth = [grad.chunk(size, i % 2)[rank] for i, grad in enumerate(one_process())]
    return {
        "to one process": largest(ours, truth),
        "to torch": largest(ours, [parameter.grad.to_local() for parameter in theirs.parameters()]),
        "bytes by formula": 4 * 2 * 2 * (size - 1) / size * BYTES * inputs.numel(),
        "weights kept": sum(part.numel() for part in ups + downs),
    }


# %% [markdown]
# **The script and its processes.** Processes of a notebook cannot be shared out, so the cells above become a script, each function with the cell that it stands in. On a cluster, `torchrun` starts such a script $p$ times and tells each process its number, its *rank*. Each process then loads torch for itself, which takes much longer than our four blocks. Here the script loads torch once, and then splits into $p$ processes (`fork`) that get from it what `torchrun` would have told them.


# %%
def main() -> None:
    """Run the ways that the command line names; process 0 writes down what every process found."""
    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in sys.argv[2:]:
        SENT["bytes"] = 0
        row = globals()[name]()
        row["bytes sent"] = SENT["bytes"]
        found[name] = [None] * dist.get_world_size()
        dist.all_gather_object(found[name], row)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


def as_rank(rank: int, processes: int, port: int) -> None:
    """One of the processes that the script has split into."""
    place = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    main()


def start() -> None:
    """Split into as many processes as `PROCESSES` says; without it, be one that torchrun has started."""
    if "PROCESSES" in os.environ:
        processes = int(os.environ["PROCESSES"])
        with socket.socket() as free:
            free.bind(("localhost", 0))  # a port that nobody uses
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(as_rank, (processes, port), processes, start_method="fork")
    else:
        main()


# %%
BUILD = ROOT / "build" / "11_advanced_pretraining"
IMPORTS = """import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed.pipelining  # brings all that the ways import, once for all processes
import torch.nn.functional as F
from torch import Tensor, nn"""
PARTS = [exchange, reduce_scatter, one_process, data_parallel, block_from_parts, sharded, Copied.forward]
PARTS += [tensor_parallel, main]


def run_processes(parts: Sequence[Callable], ways: Sequence[str], processes: int) -> dict[str, list[dict]]:
    """Write the cells that hold these functions as a script, and run its `ways` on so many processes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = ["".join(linecache.getlines(part.__code__.co_filename)) for part in parts]
    (BUILD / "parallel.py").write_text("\n\n".join([IMPORTS, *sources, 'if __name__ == "__main__":\n    start()\n']))
    command = [sys.executable, "parallel.py", "found.json", *ways]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LESSON_SEED": str(seed), "PROCESSES": str(processes)}
    script = subprocess.Popen(command, cwd=BUILD, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        _, said = script.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        script.terminate()  # its processes end with it
        _, said = script.communicate()
    if script.returncode:
        raise CourseError(f"The processes failed: {said[:3000]}")
    return json.loads((BUILD / "found.json").read_text())


# %%
def show_ways(found: dict[str, list[dict]]) -> None:
    """A table of the ways, over all processes: largest differences, and the bytes of the one that sends most."""
    rows = {}
    for way, each in found.items():
        worst = [f"{max(row[name] for row in each):.0e}" if name in each[0] else "-"
                 for name in ("to one process", "to torch")]  # fmt: skip
        kept = each[0].get("weights kept", "")
        rows[way] = [*worst, max(row["bytes sent"] for row in each), kept]
    show_table(rows, ["to one process", "to torch", "bytes sent", "weights kept"])


found = run_processes(PARTS, ["data_parallel", "sharded", "tensor_parallel"], settings["processes"])
show_ways(found)
every_row = [row for each in found.values() for row in each]
miscounted = sum(abs(row["bytes sent"] - row["bytes by formula"]) for row in every_row)
lesson.equal(
    "data, sharded and tensor parallelism give the gradients of one process",
    max(row["to one process"] for row in every_row),
    within=1e-12,
)
lesson.equal(
    "they give the gradients of DistributedDataParallel, fully_shard and parallelize_module",
    max(row["to torch"] for row in every_row),
    within=1e-12,
)
lesson.equal("bytes sent by data, sharded and tensor parallelism, against their formulas", miscounted)

# %% [markdown]
# **What you see.** Three ways, the same gradients. The sharded and the tensor-parallel processes keep only their share of the weights; the data-parallel ones keep all. Sharding sends one and a half times the bytes of data parallelism, by its formula. Tensor parallelism sends few bytes here, because 16 rows are few: its bytes grow with the rows, those of the other two with the weights. It also has to wait for them in every layer, so it is used within a machine, where links are fast.
#
# (Some versions of torch add gradients up under gloo where they should average them, silently: pytorch issue 162338. Such a version does not pass the second line. So compare with one process before you trust many.)

# %% [markdown] tags=["further"]
# ## 7b · Pipelines, ZeRO, long sequences and experts
#
# *Further: no core section needs this one.*
#
# **Question.** If each process has some of the *layers*, how long does it wait for the others? And what if a single *sequence* is too long for a process, or if there are many *experts*?

# %% [markdown]
# Stage 2 cannot begin before stage 1 has finished. With one batch only one of $p$ stages works at a time. So cut the batch into $m$ **micro-batches** and let them follow each other. *GPipe* (Huang et al. 2019) runs all forward passes, then all backward passes. *1F1B* (Narayanan et al. 2019; as here, with all weights updated together, 2021) starts a backward pass as soon as it can, so that fewer activations have to be kept. A schedule is a list of actions for each stage.

# %%
Action = tuple[str, int]  # ("F", 3) is the forward pass of micro-batch 3, ("B", 3) its backward pass


def gpipe(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """All forward passes, then all backward passes."""
    return [(kind, index) for kind in "FB" for index in range(micro_batches)]


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """As few forward passes as fill the pipeline, then backward and forward in turn."""
    ahead = min(stages - stage - 1, micro_batches)
    actions = [("F", index) for index in range(ahead)]
    for index in range(micro_batches):
        actions += [("F", index + ahead)] * (index + ahead < micro_batches) + [("B", index)]
    return actions


# %% [markdown]
# Now let time run: an action begins when its stage is free and its input is there. A forward pass takes 1 unit of time, a backward pass 2. In both schedules every stage works $3 m$ units, and the first stage waits $3 (p - 1)$ units between its first and last action, since the last micro-batch has to pass down the other stages and back again. The **bubble** is the share of time in which a stage is idle:
#
# $$\text{bubble} = \frac{3 (p - 1)}{3 m + 3 (p - 1)} = \frac{p - 1}{m + p - 1}$$


# %%
def timeline(schedule: Callable[[int, int, int], list[Action]], stages: int, count: int) -> list[tuple]:
    """When each stage works: (stage, "F" or "B", micro-batch, start, end)."""
    plans = [schedule(stage, stages, count) for stage in range(stages)]
    free, ended, rows = [0] * stages, {}, []
    while any(plans):
        for stage, plan in enumerate(plans):
            if not plan:
                continue
            kind, index = plan[0]
            before = stage - 1 if kind == "F" else stage + 1  # the stage that the input comes from
            ready = 0 if before in (-1, stages) else ended.get((kind, index, before))
            if ready is not None:
                start = max(free[stage], ready)
                free[stage] = ended[kind, index, stage] = start + (1 if kind == "F" else 2)
                rows.append((stage, *plan.pop(0), start, free[stage]))
    return rows


def bubble(rows: Sequence[tuple], stages: int) -> float:
    """Share of the time in which stages are idle."""
    work = sum(end - start for *_, start, end in rows)
    return 1 - work / (stages * max(end for *_, end in rows))


def most_kept(rows: Sequence[tuple]) -> int:
    """The largest number of micro-batches whose activations the first stage keeps at once."""
    steps = [1 if kind == "F" else -1 for stage, kind, *_ in rows if stage == 0]
    return int(np.cumsum(steps).max())


# %%
SCHEDULES = {"GPipe": gpipe, "1F1B": one_forward_one_backward}
figure = Figure(figsize=(plots.WIDTH, plots.HEIGHT))
for axes, (name, schedule) in zip(figure.subplots(2, 1, sharex=True), SCHEDULES.items(), strict=True):
    for stage, kind, index, start, end in timeline(schedule, 4, 8):
        axes.barh(stage, end - start, left=start, color=plots.COLORS["FB".index(kind)], edgecolor="white")
        axes.text((start + end) / 2, stage, index, ha="center", va="center", color="white", fontsize=8)
    axes.set(yticks=range(4), yticklabels=range(1, 5), ylabel="stage", title=name)
    axes.invert_yaxis()
    axes.grid(visible=False)
axes.set_xlabel("time (forward passes of a micro-batch); blue: forward, orange: backward")
plots.show(figure, alt="Two time tables of four stages and eight micro-batches. GPipe runs all forward passes before "
    "all backward ones, 1F1B alternates; both end at the same time and have the same idle gaps.")  # fmt: skip
rows, wrong = {}, 0.0
for stages, count in [(4, 1), (4, 8), (4, 32), (8, 32)]:
    times = {name: timeline(schedule, stages, count) for name, schedule in SCHEDULES.items()}
    formula = (stages - 1) / (count + stages - 1)
    wrong = max(wrong, *(abs(bubble(each, stages) - formula) for each in times.values()))
    kept = [most_kept(each) for each in times.values()]
    rows[f"{stages} stages, {count} micro-batches"] = [f"{formula:.0%}", *kept]
show_table(rows, ["bubble", "kept by GPipe", "kept by 1F1B"])
lesson.equal("the bubble of both schedules, against its formula", wrong, within=1e-12)

# %% [markdown]
# **What you see.** Both schedules wait equally long: 1F1B does not shrink the bubble. It keeps at most $p$ micro-batches in the first stage, whatever $m$ is, while GPipe keeps all $m$. So 1F1B can afford many micro-batches, and *they* shrink the bubble.

# %% [markdown]
# **A pipeline that trains.** `run_stage` follows its list of actions. The first stage takes rows from the batch, the others receive activations; the last stage knows the loss, the others receive gradients. Sending does not wait (`isend`), so that two neighbours who send to each other at once do not block each other. The bytes of a batch: its activations once in each direction, at each border between stages.


# %%
def run_stage(stage: nn.Module, actions: list[Action], inputs: Tensor, targets: Tensor, count: int) -> None:
    """One process's part of the model, over its actions; neighbours get activations and give gradients."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    rows, goals, kept, sending = inputs.chunk(count), targets.chunk(count), {}, []

    def send(tensor: Tensor, to: int, tag: int) -> None:
        SENT["bytes"] += BYTES * tensor.numel()
        sending.append((dist.isend(tensor, to, tag=tag), tensor))

    for kind, index in actions:
        if kind == "F":
            entering = rows[index].clone()  # its values count in the first stage only
            if rank > 0:
                dist.recv(entering, rank - 1, tag=index)
            leaving = stage(entering.requires_grad_())
            kept[index] = entering, leaving
            if rank < last:
                send(leaving.detach(), rank + 1, index)
            continue
        entering, leaving = kept.pop(index)
        if rank == last:
            (F.mse_loss(leaving, goals[index]) / count).backward()
        else:
            gradient = torch.empty_like(leaving)
            dist.recv(gradient, rank + 1, tag=count + index)
            leaving.backward(gradient)
        if rank > 0:
            send(entering.grad, rank - 1, count + index)
    for handle, _ in sending:
        handle.wait()


# %%
def pipeline(schedule, library_schedule: str, count: int = 8) -> dict[str, float]:
    """Each process has some of the layers; micro-batches of rows pass from one to the next."""
    from torch.distributed import pipelining

    rank, size = dist.get_rank(), dist.get_world_size()
    model, inputs, targets = problem()
    per_stage = len(model) // size
    layers = slice(rank * per_stage, (rank + 1) * per_stage)
    run_stage(model[layers], schedule(rank, size, count), inputs, targets, count)
    ours = [parameter.grad for parameter in model[layers].parameters()]

    theirs = problem()[0][layers]
    stage = pipelining.PipelineStage(theirs, rank, size, torch.device("cpu"))
    runner = getattr(pipelining, library_schedule)(stage, count, loss_fn=F.mse_loss)
    runner.step(*[inputs] * (rank == 0), target=targets if rank == size - 1 else None)
    neighbours = (rank > 0) + (rank < size - 1)
    return {
        "to one process": largest(ours, one_process()[2 * layers.start : 2 * layers.stop]),
        "to torch": largest(ours, [parameter.grad for parameter in theirs.parameters()]),
        "bytes by formula": neighbours * BYTES * inputs.numel(),
        "weights kept": sum(gradient.numel() for gradient in ours),
    }


def pipeline_gpipe() -> dict[str, float]:
    return pipeline(gpipe, "ScheduleGPipe")


def pipeline_1f1b() -> dict[str, float]:
    return pipeline(one_forward_one_backward, "Schedule1F1B")


# %% [markdown]
# **ZeRO, stage 1.** In between data parallelism and full sharding: all weights everywhere, but AdamW's two moments only for a part. (Stage 2 also drops the gradients of the other parts as soon as they are sent; here they stay until the step ends.) Reduce-scatter the gradients, update the part, all-gather the new weights. That is an all-reduce with the update in its middle, so it costs no more bytes than data parallelism. The comparison is with three steps of AdamW in one process.


# %%
def zero() -> dict[str, float]:
    """As above, but each process keeps the optimiser's state of a part of the weights, and updates that part."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    rank, size = dist.get_rank(), dist.get_world_size()
    model, inputs, targets = problem()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()  # (parameters,)
    part = flat.chunk(size)[rank].clone().requires_grad_()
    optimizer = torch.optim.AdamW([part], lr=0.01)
    theirs, single = problem()[0], problem()[0]
    wrapped = ZeroRedundancyOptimizer(theirs.parameters(), torch.optim.AdamW, lr=0.01)
    plain = torch.optim.AdamW(single.parameters(), lr=0.01)
    for _ in range(3):
        F.mse_loss(model(inputs.chunk(size)[rank]), targets.chunk(size)[rank]).backward()
        part.grad = reduce_scatter(torch.cat([p.grad.flatten() for p in model.parameters()])) / size
        optimizer.step()
        nn.utils.vector_to_parameters(all_gather(part.detach()), model.parameters())
        model.zero_grad()
        for other, stepper in ((theirs, wrapped), (single, plain)):  # both on the whole batch
            other.zero_grad()
            F.mse_loss(other(inputs), targets).backward()
            stepper.step()
    ours = [p.detach() for p in model.parameters()]
    return {
        "to one process": largest(ours, list(single.parameters())),
        "to torch": largest(ours, list(theirs.parameters())),
        "bytes by formula": 3 * 2 * (size - 1) / size * BYTES * flat.numel(),
        "weights kept": flat.numel(),
        "moments kept": sum(m.numel() for m in optimizer.state[part].values() if m.ndim),
    }


# %% [markdown]
# **Context parallel.** A long sequence is cut along its length. Each process has its queries, and needs the keys and values of all. In *ring attention* (Liu et al. 2023) these go round, one part a step, and each process keeps three things for each query: the largest score so far, the sum of the weights, and the weighted sum of the values. When a larger score comes, what was summed is shrunk to match. In the backward pass the gradients of keys and values go round the other way.


# %%
class Shifted(torch.autograd.Function):
    """Forward: pass on to the next process. Backward: hand the gradient back to where the tensor came from."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        return exchange(tensor, (rank + 1) % size, (rank - 1) % size)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        rank, size = dist.get_rank(), dist.get_world_size()
        return exchange(gradient, (rank - 1) % size, (rank + 1) % size)


# %%
def ring_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of this process's part of the sequence; all are (batch, heads, seq / processes, head_dim)."""
    rank, size, length = dist.get_rank(), dist.get_world_size(), query.shape[2]
    places, both = torch.arange(length), torch.stack([key, value])
    top = torch.full((*query.shape[:-1], 1), -torch.inf)  # largest score so far (batch, heads, seq, 1)
    total, mixed = torch.zeros_like(top), torch.zeros_like(query)
    for step in range(size):
        both = Shifted.apply(both) if step else both
        owner = (rank - step) % size  # of the keys and values that are here now
        scores = query @ both[0].transpose(-1, -2) / query.shape[-1] ** 0.5
        later = owner * length + places > rank * length + places[:, None]  # (seq, seq)
        scores = scores.masked_fill(later, -torch.inf)
        new_top = torch.maximum(top, scores.detach().amax(-1, keepdim=True))
        weights, shrink = (scores - new_top).exp(), (top - new_top).exp()
        total, mixed = total * shrink + weights.sum(-1, keepdim=True), mixed * shrink + weights @ both[1]
        top = new_top
    return mixed / total


# %%
def context_parallel() -> dict[str, float]:
    """Each process has a part of one long sequence; keys and values go round."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(int(os.environ["LESSON_SEED"]))
    whole = torch.randn(3, 2, 4, 64, 16, requires_grad=True)  # (q k v, batch, heads, seq, head_dim)
    weight = torch.randn(2, 4, 64, 16)
    mine = whole.detach().chunk(size, 3)[rank].clone().requires_grad_()
    ours = ring_attention(*mine)
    (ours * weight.chunk(size, 2)[rank]).sum().backward()

    theirs = F.scaled_dot_product_attention(*whole, is_causal=True)
    (theirs * weight).sum().backward()
    difference = largest([ours, mine.grad], [theirs.chunk(size, 2)[rank], whole.grad.chunk(size, 3)[rank]])
    return {
        "to one process": difference,
        "bytes by formula": 2 * (size - 1) * BYTES * 2 * mine[0].numel(),
    }


# %% [markdown]
# **Expert parallel.** In a mixture of experts each process has one expert and a part of the rows. A row goes to the process of its expert and its result comes back: two *all-to-all* exchanges, and two more in the backward pass. How many rows go where is known only when the router has spoken, so the counts are exchanged first.


# %%
def all_to_all(rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
    """Send `going[i]` of the rows to process i and receive `coming[i]` from it; (rows, hidden), in ranks' order."""
    rank, size = dist.get_rank(), dist.get_world_size()
    leaving = list(rows.split(going))
    arriving = [rows.new_empty(count, *rows.shape[1:]) for count in coming]
    arriving[rank] = leaving[rank]
    for step in range(1, size):
        to, source = (rank + step) % size, (rank - step) % size
        arriving[source] = exchange(leaving[to], to, source, arriving[source])
    return torch.cat(arriving)


class Exchanged(torch.autograd.Function):
    """Rows to the processes that they belong to; backward, their gradients the same way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, going: list[int], coming: list[int]) -> Tensor:
        ctx.counts = coming, going
        return all_to_all(rows, going, coming)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_to_all(gradient, *ctx.counts), None, None


# %%
def expert_parallel() -> dict[str, float]:
    """Each process has some rows and one expert; a row goes to its expert and comes back."""
    rank, size = dist.get_rank(), dist.get_world_size()
    _, inputs, _ = problem()
    experts, router = [Block(32) for _ in range(size)], torch.randn(32, size)
    mine = inputs.chunk(size)[rank].clone().requires_grad_()
    chosen = (mine @ router).argmax(-1)  # (rows,): the expert of each row
    order = chosen.argsort(stable=True)
    going = chosen.bincount(minlength=size)  # (processes,)
    coming = all_to_all(going, [1] * size, [1] * size)
    counts = going.tolist(), coming.tolist()
    there = Exchanged.apply(mine[order], *counts)
    back = Exchanged.apply(experts[rank](there), *counts[::-1])
    ours = torch.empty_like(mine).index_copy(0, order, back)
    ours.square().sum().backward()

    whole = inputs.clone().requires_grad_()
    routed = (whole @ router).argmax(-1)
    truth = torch.stack([experts[e](row) for e, row in zip(routed.tolist(), whole, strict=True)])
    truth.square().sum().backward()
    library = torch.empty(sum(counts[1]), 32)
    dist.all_to_all_single(library, mine.detach()[order], counts[1], counts[0])
    away = going.sum() - going[rank]  # rows that leave; as many gradients as results of `coming` go back
    foreign = coming.sum() - coming[rank]
    return {
        "to one process": largest([ours, mine.grad], [truth.chunk(size)[rank], whole.grad.chunk(size)[rank]]),
        "to torch": largest([there], [library]),
        "bytes by formula": float(2 * BYTES * 32 * (away + foreign) + 8 * (size - 1)),
    }


# %% [markdown]
# **The five other ways.** The same script, with the new cells in it. The table has the three of section 7 as well.

# %%
ALL_PARTS = [*PARTS[:-1], gpipe, run_stage, pipeline, zero, Shifted.forward, ring_attention, context_parallel]
ALL_PARTS += [all_to_all, expert_parallel, main]
NEW_WAYS = ["zero", "pipeline_gpipe", "pipeline_1f1b", "context_parallel", "expert_parallel"]
all_found = found | run_processes(ALL_PARTS, NEW_WAYS, settings["processes"])
show_ways(all_found)
every_row = [row for each in all_found.values() for row in each]
miscounted = sum(abs(row["bytes sent"] - row["bytes by formula"]) for row in every_row)
zero_rank = all_found["zero"][0]
print(f"ZeRO keeps {zero_rank['moments kept']:,} of AdamW's {2 * zero_rank['weights kept']:,} moments")
lesson.equal(
    "all eight ways give what one process gives", max(row["to one process"] for row in every_row), within=1e-12
)
lesson.equal("seven of them give what torch's own give (of the experts, the exchange of rows)",
             max(row.get("to torch", 0.0) for row in every_row), within=1e-12)  # fmt: skip
lesson.equal("bytes sent in all eight ways, against their formulas", miscounted)

# %% [markdown]
# **What you see.** Eight ways, one result. ZeRO's bytes are for three steps: per step they are those of data parallelism. The two pipelines send the same: the order of actions does not change what crosses a border.
#
# ### Past one machine
#
# **Question.** What changes with 8, 64 or 1,024 GPUs?
#
# In the functions, nothing. On each of the hosts one line starts the script; the hosts find each other at an address. Slurm runs that line on every host:
#
# ```bash
# # 8 hosts with 8 GPUs each, on every host:
# export LESSON_SEED=0  # the script reads its seed from here
# torchrun --nnodes=8 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$FIRST_HOST:29500 --rdzv-id=run1 parallel.py found.json data_parallel
#
# # the same from Slurm, in a file for sbatch:
# #SBATCH --nodes=8 --ntasks-per-node=1 --gpus-per-node=8
# export FIRST_HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# export LESSON_SEED=0
# srun torchrun --nnodes=$SLURM_NNODES --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$FIRST_HOST:29500 --rdzv-id=$SLURM_JOB_ID parallel.py found.json data_parallel
# ```
#
# (With GPUs the backend is `"nccl"` and each process first takes its own GPU: `torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))`. Our problem's 16 rows and 4 blocks would have to grow with the number of processes.)
#
# Bytes and bubble follow from the formulas. Take 7 billion parameters, 16 bytes of state for each (lesson 07), gradients and weights sent in 16 bits, and a fixed batch of 1,024 sequences a step. Tensor parallelism stays within a host of 8 GPUs, with four all-reduces of the activations a layer (two forward, two backward); pipelines have 8 stages.

# %%
PARAMETERS, BATCH_ROWS = 7e9, 1024
LAYERS_7B, ROW_BYTES = 32, 2 * 4096 * 4096  # activations of one row: 4,096 tokens of 4,096 features, 16 bits
layouts = {8: (8, 1, 1), 64: (8, 8, 1), 1024: (8, 8, 16)}  # GPUs: tensor, pipeline, data parallel
rows = {}
for gpus, (tensor, pipe, data) in layouts.items():
    micro_batches = BATCH_ROWS // data  # of one sequence each
    rows[f"{gpus:,} GPUs"] = [
        f"{2 * (gpus - 1) / gpus * 2 * PARAMETERS / 1e9:.1f} GB",
        f"{3 * (gpus - 1) / gpus * 2 * PARAMETERS / 1e9:.1f} GB",
        f"{16 * PARAMETERS / gpus / 1e9:.1f} GB",
        f"{tensor} x {pipe} x {data}",
        f"{2 * (data - 1) / data * 2 * PARAMETERS / (tensor * pipe) / 1e9:.2f} GB",
        f"{4 * LAYERS_7B / pipe * 2 * (tensor - 1) / tensor * BATCH_ROWS / data * ROW_BYTES / 1e9:,.0f} GB",
        f"{(pipe - 1) / (micro_batches + pipe - 1):.1%}",
        BATCH_ROWS / gpus,
    ]
columns = [
    "data: sent",
    "sharded: sent",
    "sharded: state",
    "tensor x pipe x data",
    "its data part sends",
    "tensor part (inside a host)",
    "bubble",
    "rows a GPU",
]
show_table(rows, columns)

# %% [markdown]
# **What you see.** The bytes that a GPU sends for data or sharded parallelism hardly depend on the number of GPUs, while its work falls with it, down to the last column's one row: at some size sending takes longer than computing. Splitting in three directions (*3D parallelism*) makes the part that is averaged over hosts small. It pays twice: inside a host tensor parallelism sends more bytes than the split saves outside, which only the fast links there can carry, and there is a bubble that grows when the data-parallel part eats up the micro-batches. The table counts bytes and time slots. It knows nothing of latency, of overlap and of slow hosts.

# %% [markdown] tags=["further"]
# ## 8 · Keep less: activation checkpointing
#
# *Further: no core section needs this one.*
#
# **Question.** The backward pass needs what the forward pass computed. Must all of that be kept?
#
# No: keep only the input of a block, and compute the rest again when the backward pass arrives there. As a function of autograd: forward without a graph, and in the backward pass forward once more with one. If the block draws random numbers, as dropout does, the second pass has to draw the same ones, so the state of the generator is kept too.

# %%
from torch.utils.checkpoint import checkpoint


class Recomputed(torch.autograd.Function):
    """run(hidden), keeping only `hidden` for the backward pass."""

    @staticmethod
    def forward(ctx, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        ctx.run, ctx.random_state = run, torch.get_rng_state()
        ctx.save_for_backward(hidden)
        return run(hidden)  # autograd records nothing in here

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random_state)
            output = ctx.run(hidden)
        torch.autograd.backward(output, gradient)  # adds to the gradients of the block's weights
        return None, hidden.grad


# %% [markdown]
# The simplest choice checkpoints every block. In general $L$ blocks are cut into segments: $L / s$ segments of $s$ blocks keep $L / s$ inputs, and while the backward pass is in a segment, the tensors of its $s$ blocks live too. With $a$ for the inside of a block, counted in inputs, the peak is $L / s + a s$, least at $s = \sqrt{L / a}$ (Chen et al. 2016). The cell counts what autograd is given to keep, with a hook that sees each saved tensor.


# %%
def kept_bytes(run: Callable[[], Tensor]) -> tuple[float, int]:
    """The output's mean after a backward pass, and the bytes that the forward pass keeps, weights not counted."""
    seen = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.data_ptr() not in weights:
            seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        total = run().mean()
    total.backward()
    return total.item(), sum(seen.values())


# %%
torch.manual_seed(seed)
deep = nn.Sequential(*[nn.Sequential(Block(64), nn.Dropout(0.1)) for _ in range(16)])
weights = {parameter.data_ptr() for parameter in deep.parameters()}
entering = torch.randn(256, 64, requires_grad=True)
ways = {
    "keep everything": lambda: deep(entering),
    "own, every block": lambda: chained(entering, list(deep), Recomputed.apply),
    "torch's, every block": lambda: chained(entering, list(deep), library_checkpoint),
    "own, segments of 4": lambda: chained(entering, [deep[i : i + 4] for i in range(0, 16, 4)], Recomputed.apply),
}


def chained(hidden: Tensor, segments: Sequence[nn.Module], apply: Callable) -> Tensor:
    for segment in segments:
        hidden = apply(segment, hidden)
    return hidden


def library_checkpoint(run: nn.Module, hidden: Tensor) -> Tensor:
    return checkpoint(run, hidden, use_reentrant=False)


# %%
gradients, kept = {}, {}
for name, run in ways.items():
    deep.zero_grad()
    torch.manual_seed(seed + 1)  # the same dropout for all
    _, kept[name] = kept_bytes(run)
    gradients[name] = torch.cat([parameter.grad.flatten() for parameter in deep.parameters()])
everything = gradients["keep everything"]
input_bytes = entering.nbytes
inside = kept["keep everything"] / 16 / input_bytes  # a
peaks = {"keep everything": 16 * inside, "own, every block": 16 + inside, "torch's, every block": 16 + inside}
peaks["own, segments of 4"] = 4 + 4 * inside
rows = {
    name: [f"{kept[name] / 1024:,.0f} KiB", f"{peaks[name] * input_bytes / 1024:,.0f} KiB",
           f"{(gradients[name] - everything).abs().max().item():.0e}"]
    for name in ways
}  # fmt: skip
show_table(rows, ["kept after the forward pass", "peak by the formula", "largest difference of a gradient"])
print(f"a = {inside:.0f}, so the formula's best segment has {math.sqrt(16 / inside):.1f} blocks")
difference = (gradients["own, every block"] - gradients["torch's, every block"]).abs().max().item()
lesson.equal("the gradients of checkpointed blocks are those of torch.utils.checkpoint", difference, within=1e-6)
difference = max((each - everything).abs().max().item() for each in gradients.values())
lesson.equal("checkpointing leaves all gradients as they are, with dropout", difference, within=1e-6)
lesson.equal(
    "bytes kept: one input for each segment",
    abs(kept["own, every block"] - 16 * input_bytes) + abs(kept["own, segments of 4"] - 4 * input_bytes),
)
share = kept["own, every block"] / kept["keep everything"]
lesson.report("bytes kept with a checkpoint at every block, against keeping everything", f"{share:.0%}")

# %% [markdown]
# **What you see.** The gradients stay what they were, dropout included, and what is kept falls to the inputs of the segments. The price is a second forward pass: with 2 units for a backward pass and 1 for a forward pass, a step takes 4 units in place of 3. Segments of four blocks keep the least after the forward pass, and have the higher peak by the formula: while the backward pass is inside a segment, the tensors of all its blocks live.

# %% [markdown] tags=["core"]
# ## 9 · What grows before a run blows up
#
# **Question.** A loss that fell for days suddenly rises. What can go out of bounds, and what keeps it in?
#
# Small models at too high a learning rate show the same symptoms as large ones at a usual rate (Wortsman et al. 2023), so we can study them here. All runs of this section are two-layer models on rows of Shima's documents that *shima-4m* has not read. `trained` is the usual loop with AdamW: a warm-up of 10 steps, then a rate that falls to 0 in a straight line.

# %%
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

torch.set_num_threads(1)  # models as small as these wait longer for a second thread than it works
STEPS, ROWS = lesson.scaled(60, 12), 8  # steps; rows of 64 tokens a step
TRAINING_SEEDS = [3 * seed + number for number in range(3)]
ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def small_model(kind: str, width: int, model_seed: int) -> nn.Module:
    """A fresh model of two layers with two heads; a Qwen3 is a Llama with norms on queries and keys."""
    shape = {"vocab_size": 1536, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": width // 2}
    rest = {"max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0}
    config_class, model_class = ARCHITECTURES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_seed)
        return model_class(config_class(**shape, **heads, **rest, attn_implementation="eager"))


def batches_of(rows: Tensor) -> Tensor:
    """The first rows as batches (steps, rows, seq)."""
    return rows[: STEPS * ROWS].view(STEPS, ROWS, -1)


# %%
def trained(small: nn.Module, batches: Tensor, rate: float, clip: float = 1.0, z_weight: float = 0.0) -> nn.Module:
    """Train on the batches; `clip` bounds the norm of the gradient, `z_weight` is the price of (log Z) squared."""
    optimizer = torch.optim.AdamW(small.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    small.norms = []  # of the gradient, before it is clipped
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, (len(batches) - step) / (len(batches) - 9))
        logits = small(input_ids=batch[:, :-1], use_cache=False).logits  # (rows, seq - 1, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        if z_weight:
            loss = loss + z_weight * logits.logsumexp(-1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        small.norms.append(nn.utils.clip_grad_norm_(small.parameters(), clip).item())
        optimizer.step()
    return small


# %% [markdown]
# **Attention's scores.** A score is a product of a query and a key, $q \cdot k / \sqrt{d}$. Nothing bounds it: when both grow, it grows as their product, the softmax puts all its weight on one position, and its gradient vanishes. **QK-norm** (Dehghani et al. 2023) normalises each head's query and key (there by LayerNorm, in Qwen3 by their root mean square), and gives each feature a learned scale. With scales of 1, $\lvert q \cdot k\rvert / \sqrt{d} \le \sqrt{d}$. Qwen3 is a Llama with this norm, so the two can be compared as they are. The scores, written out:

# %%
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def head_norm(heads: Tensor, scale: Tensor) -> Tensor:
    """Root-mean-square norm of each head (batch, seq, heads, head_dim)."""
    return scale * heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def attention_scores(attention: nn.Module, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """What goes into the softmax (batch, heads, seq, seq), before the mask."""
    shape = (*hidden.shape[:-1], -1, attention.head_dim)  # (batch, seq, heads, head_dim)
    query, key = attention.q_proj(hidden).view(shape), attention.k_proj(hidden).view(shape)
    if hasattr(attention, "q_norm"):
        query, key = head_norm(query, attention.q_norm.weight), head_norm(key, attention.k_norm.weight)
    query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), *rotation)
    return query @ key.transpose(-1, -2) * attention.scaling


@torch.no_grad()
def look(small: nn.Module, rows: Tensor) -> tuple[float, float]:
    """The largest score of all layers, and the largest difference of our softmax to the library's."""
    entered = []
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, _, given: entered.append((module, given)), with_kwargs=True
        )
        for layer in small.model.layers
    ]
    weights = small(input_ids=rows, use_cache=False, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    largest, wrong = 0.0, 0.0
    for (attention, given), theirs in zip(entered, weights, strict=True):
        scores = attention_scores(attention, given["hidden_states"], given["position_embeddings"])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)  # (seq, seq)
        largest = max(largest, scores.masked_fill(later, 0).abs().max().item())
        wrong = max(wrong, (scores.masked_fill(later, -math.inf).softmax(-1) - theirs).abs().max().item())
    return largest, wrong


# %%
test_rows = sweep.rows(1999, 64)
RATES, NAMES = (0.01, 0.03, 0.1), {"llama": "without QK-norm", "qwen3": "with QK-norm"}
good_rows = {number: batches_of(sweep.rows(2000 + number, 640)) for number in TRAINING_SEEDS}
tried = list(itertools.product(NAMES, RATES, TRAINING_SEEDS))
runs = [(small_model(kind, 32, number), good_rows[number], rate) for kind, rate, number in tried]
models = dict(zip(tried, two_at_a_time(trained, runs), strict=True))
after, wrong = {}, 0.0  # (kind, rate) -> (loss, largest score) of each training seed
for (kind, rate, _), small in models.items():
    highest, difference = look(small, test_rows[:8])
    after.setdefault((kind, rate), []).append((sweep.test_loss(small), highest))
    wrong = max(wrong, difference)
lesson.equal("attention with and without QK-norm is that of Qwen3 and Llama", wrong, within=1e-4)

# %%
rows = {}
for (kind, rate), each in after.items():
    losses, scores = zip(*each, strict=True)
    rows[f"{NAMES[kind]}, rate {rate}"] = [f"{np.mean(losses):.2f}", f"{np.std(losses):.2f}", f"{np.mean(scores):,.0f}"]
show_table(rows, ["loss (nats)", "spread", "largest score"])
gaps = {rate: np.mean(after["llama", rate], 0) - np.mean(after["qwen3", rate], 0) for rate in RATES}
times = np.mean(after["llama", 0.1], 0)[1] / np.mean(after["qwen3", 0.1], 0)[1]
lesson.report("loss without QK-norm minus loss with it, at the highest rate (nats)", gaps[0.1][0])
lesson.claim("at the highest rate the largest score is many times as large without QK-norm", times, at_least=10)
lesson.report("the same difference at the lowest rate (nats)", gaps[0.01][0])
series = {}
for kind, name in NAMES.items():
    highest = np.array([[each[1] for each in after[kind, rate]] for rate in RATES])  # (rates, seeds)
    series[name] = (RATES, highest.mean(1), highest.min(1), highest.max(1))
figure = plots.curve(
    series,
    title="Without QK-norm the largest score grows with the learning rate",
    xlabel="learning rate",
    ylabel="largest score in attention",
    log_x=True,
    log_y=True,
)
plots.show(figure, alt="Largest score against learning rate, bands over three seeds. It rises steeply without "
    "QK-norm and stays small with it.")  # fmt: skip

# %% [markdown]
# **What you see.** No run of the table blows up; what you see is what grows before one would. Without the norm the largest score grows steeply from the lowest rate to the highest. With it the score grows as well, but stays small (it may exceed $\sqrt d = 4$, since the scales are learned). The loss says less: in this run the norm wins clearly at the highest rate, loses at the middle one, and makes hardly a difference at the lowest. So at this size QK-norm keeps the scores small, and whether it helps the loss depends on the rate; it is an insurance for larger runs. Against a rate that is too high, the first cure is a lower rate: compare the rows.

# %% [markdown] tags=["further"]
# ## 9b · Broken batches, and logits that drift
#
# *Further: no core section needs this one.*
#
# **Question.** What does one broken file in the corpus cost, and what holds the output's logits in place?
#
# **A corrupted batch.** One broken file in the corpus, and a batch is the same token again and again. Its gradient is large, and AdamW's momentum carries it on for many steps. **Clipping** scales a gradient down to a largest norm. (Simpler still: skip a batch whose norm is far above the last ones.) We break 3 of the batches and compare with the same run on good batches, with clipping at norm 1 and without.


# %%
def with_broken_batches(batches: Tensor, data_seed: int) -> Tensor:
    """The same batches, of which three hold nothing but one token."""
    broken, generator = batches.clone(), torch.Generator().manual_seed(data_seed)
    for step in (STEPS // 3, STEPS // 2, STEPS * 2 // 3):
        broken[step] = torch.randint(1536, (1,), generator=generator).item()
    return broken


clips, runs = (math.inf, 1.0), []
for number, batches in good_rows.items():
    broken = with_broken_batches(batches, number)
    for data, clip in ((batches, math.inf), (broken, math.inf), (broken, 1.0)):
        runs.append((small_model("llama", 32, number), data, 0.01, clip))
good_models = [models["llama", 0.01, number] for number in TRAINING_SEEDS]  # clipped at 1 in section 9
good, bad, bad_clipped = (found[place::3] for found in [two_at_a_time(trained, runs)] for place in range(3))
damage = {clip: [sweep.test_loss(b) - sweep.test_loss(g) for b, g in zip(*pair, strict=True)]
          for clip, pair in zip(clips, ((bad, good), (bad_clipped, good_models)), strict=True)}  # fmt: skip
for clip, each in damage.items():
    print(f"clipped at {clip}: three broken batches cost {np.mean(each):.2f} nats (of three seeds: "
          f"{', '.join(f'{value:.2f}' for value in each)})")  # fmt: skip
places = [STEPS // 3, STEPS // 2, STEPS * 2 // 3]
norms = bad_clipped[-1].norms
print("norm of the gradient at the broken batches", [f"{norms[place]:.0f}" for place in places],
      f"and usually {np.median(norms):.1f} (one clipped run)")  # fmt: skip
parts = [1 - clipped / plain if plain else math.nan
         for plain, clipped in zip(damage[math.inf], damage[1.0], strict=True)]  # fmt: skip
print("part of the damage that clipping saves:", ", ".join(f"{part:.0%}" for part in parts))
saved = np.mean(damage[math.inf]) - np.mean(damage[1.0])
lesson.claim("clipping saves part of what broken batches cost, in nats", saved, at_least=0.05)

# %% [markdown]
# **The output's logits.** The loss of a token is $\log Z - z_t$. Add a constant to all logits of a position and nothing changes, so nothing holds $\log Z$ in its place: in long runs it drifts, and in 16 bits large logits are coarse. The **z-loss** (Chowdhery et al. 2022) adds a price, $\lambda (\log Z)^2$. They took $\lambda = 10^{-4}$; in a run as short as ours that would do nothing visible, so we take a hundred times as much. First the coarseness: the same logits, moved by a constant, in bfloat16. Then a run with the price.

# %%
logits = torch.randn(1000, 1536, generator=torch.Generator().manual_seed(seed))
exact = logits.logsumexp(-1) - logits[:, 0]  # (positions,)
errors = {}
for shift in (0, 10, 100, 1000):
    coarse = (logits + shift).bfloat16().float()
    errors[shift] = (coarse.logsumexp(-1) - coarse[:, 0] - exact).abs().mean().item()
    print(f"logits moved by {shift:>4}: in bfloat16 the loss of a token is off by {errors[shift]:.3f} nats")
lesson.claim("logits that have drifted by 100 make the loss wrong in bfloat16, by nats", errors[100], at_least=0.05,
             control=errors[0])  # fmt: skip
runs = [(small_model("llama", 32, number), good_rows[number], 0.01, 1.0, 0.01) for number in TRAINING_SEEDS]
sizes = {0.0: [], 0.01: []}  # price -> (|log Z|, loss) of each training seed
for weight, smalls in zip(sizes, (good_models, two_at_a_time(trained, runs)), strict=True):
    for small in smalls:
        with torch.no_grad():
            size = small(input_ids=test_rows).logits.logsumexp(-1).abs().mean().item()
        sizes[weight].append((size, sweep.test_loss(small)))
for weight, each in sizes.items():
    size, loss = np.mean(each, axis=0)
    print(f"z-loss {weight}: |log Z| is {size:.2f} on average, loss {loss:.2f} nats")
lower = np.mean(sizes[0.0], 0)[0] - np.mean(sizes[0.01], 0)[0]
lesson.report("by how much the z-loss lowers |log Z| in a run of this length (nats)", lower)
lesson.report("what the z-loss costs (nats of held-out loss)", np.mean(sizes[0.01], 0)[1] - np.mean(sizes[0.0], 0)[1])

# %% [markdown]
# **What you see.** The norm of the gradient shows the broken batches at once, and clipping saves the part of the damage that the cell prints. A constant added to all logits changes no probability, and makes 16-bit numbers coarser and coarser. The z-loss has little to do in a run as short as this one, where nothing has drifted yet, and it costs a little. Watch three numbers in a run: the norm of the gradient, the largest score, and $\log Z$. In this section the first went wrong, because we made it so; the second grew in section 9 at the highest rate.
#

# %% [markdown] tags=["core"]
# ## 10 · A learning rate that fits every width
#
# **Question.** The best learning rate of a large model is too costly to search for. Can it be found on a small one?
#
# Take a matrix with $n$ inputs, $y = W x$, with entries of $W$ of size $1 / \sqrt n$, so that $y$ is as large as $x$. One step of Adam moves each weight by about $\eta$, in the direction of its gradient's sign. The gradient is a product of $x$ and of what comes from above, so these $n$ moves all push $y$ the same way, and they add up:
#
# $$\lvert \Delta y \rvert = \Big\lvert \sum_{j=1}^{n} \Delta W_j\, x_j \Big\rvert \approx \eta\, n \, \overline{\lvert x \rvert}$$
#
# At a fixed $\eta$ a model twice as wide moves twice as far in its first step. The **maximal update parametrisation**, muP (Yang et al. 2022), takes $\eta \propto 1 / n$ for matrices whose number of inputs grows with the model, and leaves $\eta$ alone for embeddings (one input is on at a time) and norms. The output matrix begins smaller, with entries of size $1 / n$. At a base width, here 16, both parametrisations are the same model. (If heads grow instead of becoming more, scores are divided by $d$ in place of $\sqrt d$; our heads have 8 features at every width.)
#
# Whether an implementation is right is seen by a **coordinate check**: train models of several widths for a few steps and look at how far their activations moved.

# %%
BASE_WIDTH, CHECK_WIDTHS = 16, (16, 32, 64, 128)


def muP_model(width: int, model_seed: int) -> nn.Module:
    """A model whose output matrix begins with entries of size 1 / width."""
    small = sweep.new_model(width, "standard", model_seed)  # entries of size 1 / sqrt(inputs) everywhere
    with torch.no_grad():
        small.lm_head.weight.mul_(math.sqrt(BASE_WIDTH / width))
    return small


def muP_groups(small: nn.Module, rate: float) -> list[dict]:
    """Each parameter with its learning rate: that of a matrix falls with the width."""
    width, groups = small.config.hidden_size, []
    for name, parameter in small.named_parameters():
        matrix = parameter.ndim == 2 and "embed" not in name
        groups.append({"params": [parameter], "lr": rate * BASE_WIDTH / width if matrix else rate})
    return groups


ours, theirs = muP_model(64, seed), sweep.new_model(64, "mup", seed)
wrong = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
rates = zip(muP_groups(ours, 0.02), sweep.groups(theirs, 0.02, "mup"), strict=True)
lesson.equal("our muP has the weights of the sweep's", wrong, within=1e-6)
lesson.equal("our muP has the rates of the sweep's", max(abs(a["lr"] - b["lr"]) for a, b in rates), within=1e-9)


# %%
def moved(width: int, kind: str, model_seed: int, steps: int = 3, rate: float = 0.016) -> list[float]:
    """How far the outputs of attention and feed-forward of layer 2, and the logits, move in a few steps."""
    small = muP_model(width, model_seed) if kind == "muP" else sweep.new_model(width, "standard", model_seed)
    plain = [{"params": list(small.parameters()), "lr": rate}]
    optimizer = torch.optim.AdamW(muP_groups(small, rate) if kind == "muP" else plain, weight_decay=0.0)
    last, seen = small.model.layers[-1], []
    for part in (last.self_attn.o_proj, last.mlp.down_proj, small.lm_head):
        part.register_forward_hook(lambda module, given, output: seen.append(output.detach()))
    rows = sweep.rows(2000 + model_seed, 640)[: 8 * steps].split(8)
    for batch in rows:
        optimizer.zero_grad()
        sweep.loss_of(small, batch).backward()
        optimizer.step()
    with torch.no_grad():
        sweep.loss_of(small, rows[0])  # once more on the rows of the first step
    return [(after - before).abs().mean().item() for before, after in zip(seen[:3], seen[-3:], strict=True)]


# %%
distances = {  # (seeds, widths, 3)
    kind: np.array([[moved(width, kind, number) for width in CHECK_WIDTHS] for number in TRAINING_SEEDS])
    for kind in ("standard", "muP")
}
logs = {kind: np.log(np.maximum(each, 1e-9)).mean(0) for kind, each in distances.items()}  # (widths, 3)
slopes = {kind: np.polyfit(np.log(CHECK_WIDTHS), each, 1)[0] for kind, each in logs.items()}  # (3,)
rows = {kind: [f"{slope:+.2f}" for slope in each] for kind, each in slopes.items()}
show_table(rows, ["slope: attention", "feed-forward", "logits"])
inside = {kind: each[:2].mean() for kind, each in slopes.items()}
lesson.claim(
    "in the standard parametrisation wider models move further: slope in log-log", inside["standard"], at_least=0.3
)
lesson.claim("in muP all widths move equally far: slope in log-log, without its sign", abs(inside["muP"]), at_most=0.15,
             control=abs(inside["standard"]))  # fmt: skip
figure = plots.curve(
    {kind: (CHECK_WIDTHS, np.exp(each[:, :2].mean(1)).tolist()) for kind, each in logs.items()},
    title="In muP, activations of all widths move equally far",
    xlabel="width (features)",
    ylabel="mean distance after 3 steps",
    log_x=True,
    log_y=True,
)
figure.axes[0].set_xticks(CHECK_WIDTHS, CHECK_WIDTHS)
plots.show(figure, alt="Distance moved against width: it grows for the standard parametrisation, and is flat for muP.")

# %% [markdown]
# **What you see.** The slopes tell the parametrisations apart. In the standard one, each doubling of the width moves the activations of layer 2 further; in muP it does not. (The estimate said twice as wide, twice as far, a slope of 1. It is less: $x$ is not all of one sign with the gradient, and three steps are not one.) The logits of muP move *less* in wide models at the very beginning, when the small output matrix still passes on little. A slope that is not flat inside the model is the sign of a mistake, and costs no training run to find.
#

# %% [markdown] tags=["further"]
# ## 10b · Rates that transfer, Muon, and schedules
#
# *Further: no core section needs this one.*
#
# **Question.** Does the best rate of a narrow model then fit a wide one? And what do a newer optimiser and a newer schedule gain?
#
# These questions need many runs. They ship as a table, `data/pretraining_sweep.json`, made by `python -m recipes.pretraining_sweep` on one core: two-layer Llamas, 160 steps of 16 rows of 64 tokens, three seeds each. First you run half of one of its cells here, so that the table is not taken on trust.

# %%
table = {row["key"]: row for row in json.loads(sweep.RESULTS.read_text())["cells"]}


def from_table(**settings) -> np.ndarray:
    """Test losses along the run (seeds, points), one point each 8 steps; the last is the end."""
    return np.array([table[sweep.Cell(**settings, seed=number).key]["curve"] for number in sweep.SEEDS])


live_cell = sweep.Cell(16, 0.032, seed=seed % 3, steps=lesson.scaled(160, 16))
half = live_cell.steps // 2
live = sweep.train_cell(live_cell, stop=half)  # the first half of its schedule
shipped = from_table(width=16, rate=0.032)[seed % 3, : len(live["curve"])]
print(f"your run after {half} steps: {live['loss']:.4f} nats, the table there: {shipped[-1]:.4f}")
lesson.claim(
    "half a cell of the shipped sweep, run here, keeps to the table, largest distance in nats",
    np.abs(np.array(live["curve"]) - shipped).max(),
    at_most=0.03,
)

# %%
transfer = {}  # parametrisation -> width -> losses at the end (rates, seeds)
for kind in ("standard", "mup"):
    transfer[kind] = {
        width: np.array([
            from_table(width=width, rate=rate, parametrisation="standard" if width == 16 else kind)[:, -1]
            for rate in sweep.RATES
        ])
        for width in sweep.WIDTHS
    }  # fmt: skip
rows, cost = {}, {}
for kind, by_width in transfer.items():
    best = {width: int(losses.mean(1).argmin()) for width, losses in by_width.items()}
    wide = by_width[128].mean(1)
    cost[kind] = wide[best[16]] - wide.min()
    seeds = ", ".join(f"{loss:.2f}" for loss in by_width[128][best[128]])
    rows[kind] = [*(sweep.RATES[index] for index in best.values()), f"{wide.min():.2f} ({seeds})", f"{cost[kind]:.2f}"]
columns = [f"best rate, width {width}" for width in sweep.WIDTHS]
show_table(rows, [*columns, "loss at 128 (each seed)", "more with the rate of 16"])
lesson.claim(
    "with muP the best rate of width 16 costs hardly anything at width 128, in nats",
    cost["mup"],
    at_most=0.05,
    control=cost["standard"],
)

# %%
figure = Figure(figsize=(plots.WIDTH, 3.4))
for axes, (kind, by_width) in zip(figure.subplots(1, 2, sharey=True), transfer.items(), strict=True):
    for (width, losses), color in zip(by_width.items(), plots.COLORS, strict=False):
        axes.plot(sweep.RATES, losses.mean(1), "o-", color=color, label=f"width {width}")
        axes.fill_between(sweep.RATES, losses.min(1), losses.max(1), color=color, alpha=0.18, linewidth=0)
        best = int(losses.mean(1).argmin())
        axes.plot(sweep.RATES[best], losses.mean(1)[best], "*", color=color, markersize=14, zorder=4)
    axes.set_xscale("log")
    axes.set_xticks(sweep.RATES, [f"{rate:g}" for rate in sweep.RATES], fontsize=8)
    axes.minorticks_off()
    label = "learning rate" if kind == "standard" else "learning rate at width 16"
    axes.set(xlabel=label, title="standard" if kind == "standard" else "muP")
figure.axes[0].set_ylabel("held-out loss (nats per token)")
figure.axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
figure.suptitle("With muP the best learning rate stays where it is", fontweight="bold", x=0.01, ha="left")
alt = "Loss against learning rate for three widths, in two panels. In the standard parametrisation the "
alt += "minimum moves to lower rates as the width grows; with muP the minima stand above each other."
plots.show(figure, alt)

# %% [markdown]
# **What you see.** The stars of the left panel move to the left as the model becomes wider; those of the right panel stay together. The rate found at width 16 is wrong for width 128 in the standard parametrisation, by as many nats as the table says, and right with muP. At its own best rate muP ends lower too, as the fourth column shows. A likely reason: in muP the embeddings take larger steps than the matrices, and a single rate for both is a compromise. So it saves the search, and here it also lowers the loss a little. (What transfers is the rate over widths. Depth, batch and length of the run have rules of their own.)
#
# **Muon** (Jordan 2024). Adam treats a matrix as a bag of numbers. Muon takes the momentum of a matrix, $M = U S V^\top$, and steps in the direction $U V^\top$: all singular values become about 1, so directions in which the gradient is small are learned as quickly as the others. An SVD would be slow; a polynomial $X \leftarrow a X + b\, (X X^\top) X + c\, (X X^\top)^2 X$, five times, pushes all singular values towards 1 by products of matrices alone (a *Newton-Schulz* iteration). It is for matrices inside the layers; embeddings, output and norms stay with AdamW.


# %%
def orthogonalised(matrix: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of a matrix U S V^T, in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.bfloat16()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G G
        x = torch.addmm(x, polynomial, x, beta=a)  # a X + (b G + c G G) X
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@torch.no_grad()
def muon_step(weight: Tensor, momentum: Tensor, rate: float, beta: float = 0.95) -> None:
    """One update in place; the size is that of an AdamW update (Liu et al. 2025)."""
    momentum.lerp_(weight.grad, 1 - beta)
    direction = orthogonalised(weight.grad.lerp(momentum, beta))  # Nesterov's momentum
    weight.add_(direction, alpha=-rate * 0.2 * math.sqrt(max(weight.shape)))


# %%
generator = torch.Generator().manual_seed(seed)
start = torch.randn(96, 64, generator=generator)
left, right = (torch.linalg.qr(torch.randn(3, n, 64, generator=generator))[0] for n in (96, 64))
gradients_seen = left * torch.logspace(0, -2, 64) @ right.mT  # (steps, 96, 64), from strong to weak directions
ours, momentum = start.clone().requires_grad_(), torch.zeros(96, 64)
for gradient in gradients_seen:
    ours.grad = gradient.clone()
    muon_step(ours, momentum, 0.02)
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for gradient in gradients_seen:
        theirs.grad = gradient.clone()
        optimizer.step()
    lesson.equal("three steps of Muon are those of torch.optim.Muon", (ours - theirs).abs().max().item(), within=1e-5)
first_steps = {
    "the gradient": gradients_seen[0],
    "Adam's first step": gradients_seen[0].sign(),
    "Muon's": orthogonalised(gradients_seen[0]),
}
values = {name: torch.linalg.svdvals(each.float()) for name, each in first_steps.items()}
for name, each in values.items():
    print(f"{name}: singular values from {each.min():.3g} to {each.max():.3g}")
shares = [(each.min() / each.max()).item() for each in values.values()]
lesson.claim(
    "Muon's smallest singular value is not far from its largest: ratio", shares[2], at_least=0.3, control=shares[0]
)


# %%
def best_of(**settings) -> tuple[float, np.ndarray]:
    """The best rate of a kind of run at width 64, and its losses (seeds, points)."""
    rates = [rate for rate in sweep.RATES if sweep.Cell(64, rate, **settings).key in table]
    runs = {rate: from_table(width=64, rate=rate, **settings) for rate in rates}
    best = min(runs, key=lambda rate: runs[rate][:, -1].mean())
    return best, runs[best]


kinds = {"AdamW, cosine": {}, "AdamW with muP's rates": {"parametrisation": "mup"}}
kinds |= {
    "Muon, cosine": {"optimiser": "muon"},
    "AdamW, WSD": {"schedule": "wsd"},
    "AdamW, constant": {"schedule": "constant"},
}
tuned = {name: best_of(**given) for name, given in kinds.items()}


def seconds_of(rate: float, given: dict) -> float:
    """Mean time of a run in the sweep, on one core."""
    return np.mean([table[sweep.Cell(64, rate, **given, seed=number).key]["seconds"] for number in sweep.SEEDS])


def share_of_steps(runs: np.ndarray, goal: str) -> float:
    """Share of the steps after which runs are as low as those of `goal` at their end, mean over seeds."""
    goals = tuned[goal][1][:, -1:]  # (seeds, 1)
    reached = np.where((runs <= goals).any(1), (runs <= goals).argmax(1) + 1.0, np.nan)
    return float(np.mean(reached)) / runs.shape[1]


# %%
rows = {}
for name, (rate, runs) in tuned.items():
    spread = f"{runs[:, -1].min():.3f} to {runs[:, -1].max():.3f}"
    shares = [share_of_steps(runs, goal) for goal in ("AdamW, cosine", "AdamW with muP's rates")]
    steps = ["not all" if math.isnan(share) else f"{share:.0%}" for share in shares]
    rows[name] = [rate, f"{runs[:, -1].mean():.3f}", spread, *steps, f"{seconds_of(rate, kinds[name]):.1f}"]
columns = ["best rate", "loss (nats)", "of three seeds", "steps to AdamW's", "steps to muP's", "seconds a run"]
show_table(rows, columns)
muon = tuned["Muon, cosine"][1]
lesson.report("share of the steps in which Muon reaches the loss of AdamW", share_of_steps(muon, "AdamW, cosine"),
              form=".0%")  # fmt: skip
lesson.report("the same against AdamW with muP's rates", share_of_steps(muon, "AdamW with muP's rates"), form=".0%")

# %% [markdown]
# **What you see.** Muon's step has singular values near each other, where the gradient's lie far apart. All rows were tuned over the same rates (Muon over one less, the schedules over four), on the same batches. The fourth column is the number that papers like to print: the share of the steps after which a method is as low as AdamW with cosine at its end ("not all": in some seed it never is). Now look at the baseline. AdamW whose matrices and embeddings have rates of their own, which is no further arithmetic, already needs fewer steps than AdamW with one rate; against it, the fifth column, less of Muon's lead is left. And a step of Muon takes more time, as the last column says: its own products of matrices come on top, and where the rest of a step is cheap, as here, they weigh more. Multiply the share of the steps by the ratio of the seconds, and for the clock the lead is smaller still. (The seconds scatter: the three schedules do the same work as AdamW.) Who compares optimisers has to tune the baseline first.
#
# **WSD** (Hu et al. 2024): *warm-up, stable, decay*. A cosine has to know the end of the run from its beginning. WSD keeps the rate constant and lets it fall in the last fifth only. So one long constant run can be ended wherever one likes, by a decay that starts from a checkpoint. What does the decay gain?

# %%
falls = {}
for name in ("wsd", "constant"):
    runs = np.array([from_table(width=64, rate=rate, schedule=name) for rate in sweep.RATES[:4]])
    falls[name] = runs  # (rates, seeds, points)
points = falls["wsd"].shape[-1]
before, end = int(0.8 * points) - 1, points - 1
gain = (falls["constant"] - falls["wsd"]).mean((0, 1))  # (points,)
lesson.claim("a falling rate in the last fifth ends lower than a constant one, at equal rates and steps, in nats",
             gain[end], at_least=0.02, control=gain[before])  # fmt: skip
difference = tuned["AdamW, WSD"][1][:, -1].mean() - tuned["AdamW, cosine"][1][:, -1].mean()
lesson.report("WSD against cosine, each at its best rate (nats; below 0: WSD is lower)", difference)
steps = [8 * (point + 1) for point in range(points)]
named = {"cosine": tuned["AdamW, cosine"][1], "WSD": tuned["AdamW, WSD"][1], "constant": tuned["AdamW, constant"][1]}
figure = plots.curve(
    {name: (steps[6:], runs.mean(0)[6:], runs.min(0)[6:], runs.max(0)[6:]) for name, runs in named.items()},
    title="A falling rate at the end brings WSD below a constant one",
    xlabel="step",
    ylabel="held-out loss (nats per token)",
)
plots.show(
    figure, alt="Loss along the run for cosine, WSD and a constant rate, each at its best rate, bands over three seeds."
)

# %% [markdown]
# **What you see.** Up to the last fifth WSD and the constant rate are the same run; the decay is what sets them apart. (Their lines lie on each other until then.) Against cosine, too, WSD ends lower here, each at its best rate (the table above has both losses); with only 160 steps that says little about long runs. WSD's merit is another: it need not know its end.
#

# %% [markdown] tags=["further"]
# ## 11 · Which text?
#
# *Further: no core section needs this one.*
#
# **Question.** Text from the web is full of copies and of garbage. What do they cost, and how are they found?
#
# ### Copies
#
# The corpus of this section is made of Shima's documents. Eight of them stand in it again and again, each time with one word changed, as pages do that differ in a date. The simplest way to find copies is a hash of each document. It finds exact ones only. Near copies have most of their **shingles** in common, here all runs of three words; the measure is Jaccard's, $J(A, B) = \lvert A \cap B \rvert / \lvert A \cup B \rvert$.

# %%
world, small_tokenizer = World(), load_tokenizer("shima-4m")
COPIES, UNIQUE = 45, lesson.scaled(330, 60)


def corpus_with_copies(data_seed: int) -> tuple[list[str], list[int]]:
    """Documents in random order, and for each the number of the document that it is a near copy of, or -1."""
    generator = random.Random(f"copies/{data_seed}")
    names = [person.name for person in world.people[:100]]
    found = [(world.document(3000 + data_seed, index), -1) for index in range(UNIQUE)]
    for number in range(8):
        words = world.document(3500 + data_seed, number, {"description": 1.0, "story": 1.0}).split(" ")
        for _ in range(COPIES):
            place = generator.randrange(len(words))
            copy = [*words[:place], generator.choice(names), *words[place + 1 :]]
            found.append((" ".join(copy), number))
    generator.shuffle(found)
    return [text for text, _ in found], [number for _, number in found]


def shingles(text: str) -> set[str]:
    """All runs of three words."""
    words = text.split()
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def jaccard(left: set, right: set) -> float:
    common = len(left & right)
    return common / (len(left) + len(right) - common)


# %%
texts, origin = corpus_with_copies(seed)
sets = [shingles(text) for text in texts]
pairs = [(i, j) for i in range(len(texts)) for j in range(i)]
alike = np.array([jaccard(sets[i], sets[j]) for i, j in pairs])  # the truth, by looking at every pair
same = np.array([origin[i] == origin[j] >= 0 for i, j in pairs])
print(f"{len(texts)} documents, {len(pairs):,} pairs; exact copies: {len(texts) - len(set(texts))}")
print(
    f"near copies have J from {alike[same].min():.2f} to {alike[same].max():.2f}, others up to {alike[~same].max():.2f}"
)

# %% [markdown]
# Looking at every pair is out of the question for a billion documents. **MinHash** (Broder 1997): hash all shingles of a document and keep the smallest hash. Two documents have the same smallest hash with probability $J$, because the smallest of $A \cup B$ lies in $A \cap B$ with that probability. With 64 hash functions a document has a *signature* of 64 numbers, and the share of equal ones estimates $J$. Cut the signatures into $b$ bands of $r$ numbers. Documents that agree in a whole band meet in a bucket; that has the probability $1 - (1 - J^r)^b$, which is steep around $(1/b)^{1/r}$. Only documents in a common bucket are compared. (Lesson 05 used this to clean instructions.)

# %%
HASHES, BANDS = 64, 16  # 16 bands of 4 numbers
PRIME = (1 << 31) - 1


def signatures(sets: Sequence[set[str]], hash_seed: int) -> np.ndarray:
    """Smallest value of each of the hash functions a x + b mod PRIME (documents, HASHES)."""
    generator = np.random.default_rng(hash_seed)
    a, b = generator.integers(1, PRIME, size=(2, HASHES, 1))
    numbers = [np.array([int.from_bytes(blake2b(s.encode(), digest_size=4).digest(), "big") % PRIME for s in each])
               for each in sets]  # fmt: skip
    return np.array([((a * each + b) % PRIME).min(1) for each in numbers])


def kept_documents(signature: np.ndarray, threshold: float = 0.5) -> list[int]:
    """The documents that are like no earlier one that was kept, by buckets and then by signatures."""
    buckets, kept = {}, []
    for index, bands in enumerate(signature.reshape(len(signature), BANDS, -1)):
        keys = [(band, *numbers) for band, numbers in enumerate(bands.tolist())]
        met = {other for key in keys for other in buckets.get(key, ())}
        if all((signature[other] == signature[index]).mean() < threshold for other in met):
            kept.append(index)
            for key in keys:
                buckets.setdefault(key, []).append(index)
    return kept


# %%
signature = signatures(sets, seed)
equal = (signature[:, None] == signature)[np.tril_indices(len(texts), -1)]  # (pairs, HASHES)
estimate = equal.mean(1)
kept = kept_documents(signature)
copies = sum(number >= 0 for number in origin) - 8  # one of each may stay
removed = {"hash of the document": len(texts) - len(set(texts))}
starts = {" ".join(text.split()[:20]): index for index, text in reversed(list(enumerate(texts)))}
removed["hash of the first 20 words"] = copies + 8 - sum(origin[index] >= 0 for index in starts.values())
removed["MinHash"] = copies + 8 - sum(origin[index] >= 0 for index in kept)
wrongly = sum(number < 0 for number in origin) - sum(origin[index] < 0 for index in kept)
for name, number in removed.items():
    print(f"{name}: takes out {number} of {copies} copies")
print(f"taken out by MinHash without being a copy: {wrongly}")
lesson.claim("MinHash takes out nearly all near copies", removed["MinHash"] / copies, at_least=0.9,
             control=removed["hash of the document"] / copies, form=".0%")  # fmt: skip
error = np.abs(estimate - alike)[alike > 0.1].mean()
expected = np.sqrt(alike * (1 - alike) / HASHES)[alike > 0.1].mean() * math.sqrt(2 / math.pi)
lesson.report("mean error of the estimated similarity, and what chance allows", f"{error:.3f}, {expected:.3f}")

# %%
generator, versions = random.Random(f"versions/{seed}"), []
for original in [text for text in texts if len(text.split()) >= 30][:40]:  # with 1 to 16 words changed
    for changes in (1, 2, 4, 6, 8, 12, 16):
        words = original.split()
        for place in generator.sample(range(len(words)), changes):
            words[place] = "else"
        versions.append((shingles(original), shingles(" ".join(words))))
similar = np.array([jaccard(*version) for version in versions])
first, second = (signatures([version[side] for version in versions], seed + 1) for side in (0, 1))
meets = (first == second).reshape(len(versions), BANDS, -1).all(2).any(1)
middles, shares = [], []
for low, high in itertools.pairwise(np.linspace(0, 1, 11)):
    inside = (similar >= low) & (similar < high)
    if inside.sum() >= 15:
        middles.append(similar[inside].mean())
        shares.append(meets[inside].mean())
far = np.abs(np.array(shares) - (1 - (1 - np.array(middles) ** 4) ** 16)).max()
lesson.report("share of pairs that meet in a bucket: largest distance from the formula", far, form=".0%")
grid = np.linspace(0, 1, 101)
figure = plots.curve(
    {"formula": (grid, 1 - (1 - grid**4) ** 16)},
    title="Documents that are alike meet in a bucket, others seldom do",
    xlabel="Jaccard similarity of a pair",
    ylabel="pairs that meet in a bucket",
    percent=True,
)
figure.axes[0].plot(middles, shares, "o", color=plots.COLORS[1], zorder=4, clip_on=False, label="measured")
figure.axes[0].legend(loc="upper left")
plots.show(figure, alt="An S-shaped curve, steep around one half, with measured points near it.")

# %% [markdown]
# **What you see.** Documents with ever more words changed follow the curve, down its steep part too. A hash of the whole document is nearly blind to copies that differ in a word. A hash of the first 20 words finds those whose change comes later. MinHash finds them wherever the change is, and the line about what was taken out without being a copy says what it takes out besides.
#
# **What do copies cost?** Train on the corpus with its copies, and on the corpus without, for the same number of steps and so of tokens; no text is repeated in either but the copies themselves. The copies are all descriptions and stories, so removing them also changes the mixture of kinds. The third corpus tells the two apart: in place of each copy it has another document of the same two kinds. All are tested on documents that neither has seen. The second number is the loss on the eight copied documents.


# %%
def packed(documents: Sequence[str]) -> Tensor:
    """Rows of 64 tokens; the documents begin again if they do not suffice for the steps."""
    encoded = [[*ids, 0] for ids in small_tokenizer(list(documents))["input_ids"]]
    rows = torch.tensor(list(pack(encoded, 64)))
    return rows.repeat(math.ceil(STEPS * ROWS / len(rows)), 1)


def run_on(documents: Sequence[str], model_seed: int) -> tuple:
    """What `trained` needs to train a fresh model on these documents."""
    return small_model("llama", 32, model_seed), batches_of(packed(documents)), 0.01


# %%
outcomes, runs, copied = {"with copies": [], "other documents in their place": [], "without": []}, [], []
for number in TRAINING_SEEDS:
    texts, origin = corpus_with_copies(number)
    kept = kept_documents(signatures([shingles(text) for text in texts], number))
    copied.append(packed([text for text, which in zip(texts, origin, strict=True) if which >= 0])[:64])
    fresh = [world.document(3700 + number, index, {"description": 1.0, "story": 1.0}) for index in range(len(texts))]
    others = [new if which >= 0 else text for text, which, new in zip(texts, origin, fresh, strict=True)]
    corpora = [texts, others, [texts[index] for index in kept]]
    runs += [run_on(documents, number) for documents in corpora]
found = two_at_a_time(trained, runs)  # three corpora for each seed
for place, name in enumerate(outcomes):
    for small, rows in zip(found[place::3], copied, strict=True):
        with torch.no_grad():
            outcomes[name].append((sweep.test_loss(small), sweep.loss_of(small, rows).item()))
for name, each in outcomes.items():
    unseen, remembered = np.mean(each, 0)
    print(f"{name}: {unseen:.2f} nats on unseen documents (each seed: {', '.join(f'{a:.2f}' for a, _ in each)}), "
          f"{remembered:.2f} on the copied ones")  # fmt: skip
means = {name: np.mean(each, 0) for name, each in outcomes.items()}
for name in ("other documents in their place", "without"):
    lesson.report(f"loss on unseen documents, with copies minus {name}, at equal tokens (nats)",
                  means["with copies"][0] - means[name][0])  # fmt: skip
lesson.claim("copies lower the loss on what is copied, against other documents of the same kinds, by nats",
             means["other documents in their place"][1] - means["with copies"][1], at_least=0.3)  # fmt: skip

# %% [markdown]
# **What you see.** On unseen text the run with copies ends highest; read the seeds, not only the means. Part of that is the mixture of kinds: other documents of the same two kinds, in place of the copies, end between the two. Without this third corpus all of the difference would have been blamed on repetition. What the copies do for sure is lower the loss on what is copied. That is not yet knowing it by heart: the number is still some nats a token. Lesson 12 shows when a text can be read out.
#
# ### Garbage
#
# **Question.** How is bad text told from good, if nobody has labelled it?
#
# A common recipe (Brown et al. 2020): take some text that is known to be good, take the crawl itself as the other class, train a linear classifier on hashed words or pairs of words, and keep what it takes for good. The crawl holds good text too, so half the "bad" labels are wrong; the classifier can still rank. Our garbage is keyword spam: real documents with their words in random order. Single words are then the same in both, so the features have to be pairs.
#
# **Logistic regression** minimises, over weights $w$ and an offset $b$, with features $x_i$ and labels $y_i = \pm 1$,
#
# $$\tfrac{1}{2} \lVert w \rVert^2 + C \sum_i \log\big(1 + e^{-y_i (w^\top x_i + b)}\big)$$

# %%
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

FEATURES = 1024


def features(text: str, run: int) -> np.ndarray:
    """Hashed counts of all runs of so many words, of length 1 (FEATURES,)."""
    words, counts = text.split(), np.zeros(FEATURES)
    for start in range(len(words) - run + 1):
        digest = blake2b(" ".join(words[start : start + run]).encode(), digest_size=4).digest()
        counts[int.from_bytes(digest, "big") % FEATURES] += 1
    return counts / max(1.0, np.linalg.norm(counts))


def fit_logistic(x: Tensor, y: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights (features,) and offset of logistic regression; y is 1 or -1 (rows,)."""
    weight, offset = x.new_zeros(x.shape[1], requires_grad=True), x.new_zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, offset], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum() / 2 + strength * F.softplus(-y * (x @ weight + offset)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), offset.detach()


# %%
def crawl(data_seed: int, count: int) -> tuple[list[str], np.ndarray]:
    """Documents of which every second is spam, and for each whether it is good."""
    generator, found = random.Random(f"spam/{data_seed}"), []
    for index in range(count):
        words = world.document(4000 + data_seed, index).split(" ")
        found.append(" ".join(generator.sample(words, len(words)) if index % 2 else words))
    return found, np.arange(count) % 2 == 0


# %%
known_good = [world.document(5000 + seed, index) for index in range(lesson.scaled(200, 40))]
sample, _ = crawl(seed, lesson.scaled(200, 40))
unseen, good = crawl(seed + 500, 300)
areas = {}
for run, name in ((1, "single words"), (2, "pairs of words")):
    x = torch.tensor(np.array([features(text, run) for text in [*known_good, *sample]]))
    y = torch.tensor([1.0] * len(known_good) + [-1.0] * len(sample), dtype=x.dtype)
    weight, offset = fit_logistic(x, y)
    library = LogisticRegression(C=1.0, tol=1e-10, max_iter=2000).fit(x.numpy(), y.numpy())
    difference = np.abs(weight.numpy() - library.coef_[0]).max()
    scores = np.array([features(text, run) for text in unseen]) @ weight.numpy()
    areas[name] = roc_auc_score(good, scores)
    print(f"{name}: area under the ROC curve {areas[name]:.2f} (n = {len(unseen)})")
lesson.equal("our logistic regression is that of sklearn", difference, within=1e-4)
lesson.claim("pairs of words rank good text above spam: area under the ROC curve", areas["pairs of words"],
             at_least=0.85, control=areas["single words"])  # fmt: skip

# %% [markdown]
# **What is the filter worth?** Three models, equal in steps and tokens: on the crawl as it is, on the half of it that the filter ranks highest, and on the good half, which nobody knows outside of a course.

# %%
weight_of_pairs = weight.numpy()
runs = []
for number in TRAINING_SEEDS:
    texts, good = crawl(number, lesson.scaled(700, 120))
    scores = np.array([features(text, 2) for text in texts]) @ weight_of_pairs
    highest = scores >= np.median(scores)
    for mask in (np.ones_like(good), highest, good):
        runs.append(run_on([text for text, stays in zip(texts, mask, strict=True) if stays], number))
losses = [sweep.test_loss(small) for small in two_at_a_time(trained, runs)]
choices = {"the crawl": losses[::3], "filtered": losses[1::3], "only good text": losses[2::3]}
print(
    f"of what the filter keeps, {(good & highest).sum() / highest.sum():.0%} is good; of the crawl, {good.mean():.0%}"
)
for name, each in choices.items():
    print(f"{name}: {np.mean(each):.2f} nats on unseen good documents ({min(each):.2f} to {max(each):.2f})")
gained = np.mean(choices["the crawl"]) - np.mean(choices["filtered"])
lesson.claim("filtered text gives a lower loss than the crawl at equal tokens, in nats", gained, at_least=0.2)

# %% [markdown]
# **What a filter does besides.** It knows only its example of good text. Suppose someone gives it *descriptions and stories* as good text, and then filters clean documents of every kind. Ask the first filter the same, to have something to compare with. Each keeps half of all.

# %%
narrow = [world.document(6000 + seed, index, {"description": 1.0, "story": 1.0}) for index in range(len(known_good))]
everything = [world.document(4500 + seed, index) for index in range(len(known_good))]
x = torch.tensor(np.array([features(text, 2) for text in [*narrow, *everything]]))
weight, _ = fit_logistic(x, y)
kinds = ("description", "story", "passage", "questions", "sums", "mapping", "review")
by_kind = {kind: [world.document(6500 + seed, index, {kind: 1.0}) for index in range(40)] for kind in kinds}
kept_shares = {}
for name, weights_of_filter in {"all kinds": weight_of_pairs, "descriptions and stories": weight.numpy()}.items():
    each_kind = [np.array([features(text, 2) for text in by_kind[kind]]) @ weights_of_filter for kind in kinds]
    middle = np.median(np.concatenate(each_kind))
    kept_shares[name] = [float((scores >= middle).mean()) for scores in each_kind]
rows = {kind: [f"{share:.0%}" for share in shares] for kind, *shares in zip(kinds, *kept_shares.values(), strict=True)}
show_table(rows, [f"kept, shown {name}" for name in kept_shares])
asked_kind = kinds.index("questions")
lesson.report("questions kept by the first filter, and by the one shown descriptions and stories",
              ", ".join(f"{shares[asked_kind]:.0%}" for shares in kept_shares.values()))  # fmt: skip

# %% [markdown]
# **What you see.** The filter gains nearly what the knowledge of the good half would gain. The second filter keeps what looks like its examples and throws whole kinds away, though nothing was wrong with them. The first one, just praised, does so too: look at its sums and mappings, which stood among its good examples. A filter decides what a model can do, also one that lowers the mean loss.
#
# **Mixing.** If sources are of different size, how often should each be drawn? In proportion to its size $s_i$ the small ones hardly appear; equally often, they are repeated many times. A *temperature* lies in between: $p_i \propto s_i^{1/T}$.

# %%
source_sizes = {"web": 1000.0, "code": 100.0, "books": 10.0, "sums": 1.0}  # billions of tokens
budget_tokens, rows = 500.0, {}
for temperature in (1.0, 2.0, 4.0, 1e9):
    weights_of = {name: size ** (1 / temperature) for name, size in source_sizes.items()}
    shares_of = {name: weight / sum(weights_of.values()) for name, weight in weights_of.items()}
    name = "equal shares" if temperature == 1e9 else f"T = {temperature:g}"
    rows[name] = [
        f"{share:.1%}, {budget_tokens * share / source_sizes[source]:.3g}x" for source, share in shares_of.items()
    ]
show_table(rows, [f"{name} ({size:g} B)" for name, size in source_sizes.items()])

# %% [markdown]
# **What you see.** Each entry is the share of a source and how often it is read in a run of 500 billion tokens. At $T = 1$ every source is read less than once. As $T$ grows, the smallest is read again and again, which is what the copies above did. A mixture is chosen by small runs that measure the loss of each source, and by a limit on repetition.
#

# %% [markdown]
# ## 12 · Exercises
#
# Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.


# %% tags=["exercise"]
# Exercise 11.1, easy: two machines attended to one half of the keys each. Merge what they send.
def merge_halves(output_a, log_a, output_b, log_b) -> tuple[Tensor, Tensor]:
    """Attention over both halves, from each half's output (.., d) and L (.., 1); L of both, too."""
    raise NotImplementedError


# %% tags=["check"]
def check_merge_halves(merge_halves):
    generator = torch.Generator().manual_seed(5)
    scores = 3 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    values = torch.randn(2, 7, 4, generator=generator, dtype=torch.float64)

    def attend(part: slice, shift: float = 0.0) -> tuple[Tensor, Tensor]:
        log = scores[..., part].logsumexp(-1, keepdim=True)
        return scores[..., part].softmax(-1) @ values[:, part], shift + log

    whole, first, second = slice(0, 7), slice(0, 2), slice(2, 7)
    output, log = merge_halves(*attend(first), *attend(second))
    expect_close("the output of 2 and 5 keys", output, attend(whole)[0])
    expect_close("L of 2 and 5 keys", log, attend(whole)[1])
    output, log = merge_halves(*attend(first, 900.0), *attend(second, 900.0))
    expect_close("the output with scores near 900", output, attend(whole)[0])
    expect_close("L with scores near 900", log, attend(whole, 900.0)[1])
    output, _ = merge_halves(*attend(first), *attend(second, -math.inf))
    expect_close("the output if the second half is all masked", output, attend(first)[0])


check("11.1", check_merge_halves, merge_halves)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# $e^L$ is the sum of all $e^{s}$ of a half. How much of the whole sum does each half bring? `torch.logaddexp` adds two numbers that are given as logarithms, and does not overflow.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Each output is a mean with weights that sum to 1. The whole is the mean of both, weighted by each half's part of the denominator.
#
# ```python
# def merge_halves(output_a, log_a, output_b, log_b) -> tuple[Tensor, Tensor]:
#     log = torch.logaddexp(log_a, log_b)
#     return (log_a - log).exp() * output_a + (log_b - log).exp() * output_b, log
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 11.2, medium: how many key-value heads could GQA have in the room of an MLA cache?
# First write down what you expect for a latent of 512, a position key of 64 and heads of 128.
prediction = None  # a whole number


def heads_in_the_room(kv_lora_rank: int, qk_rope_head_dim: int, head_dim: int) -> int:
    """The most key-value heads whose cache is no larger than that of MLA, in one layer."""
    raise NotImplementedError


# %% tags=["check"]
def check_heads_in_the_room(heads_in_the_room):
    def cached(*shapes: tuple[int, int]) -> int:  # measured on the library's cache, one token
        cache = DynamicCache()
        cache.update(*(torch.zeros(1, heads, 1, size) for heads, size in shapes), 0)
        return cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes

    for rank, rotary, size in ((512, 64, 128), (64, 32, 16), (256, 64, 64), (96, 32, 128), (512, 64, 80)):
        room, heads = cached((1, rank), (1, rotary)), heads_in_the_room(rank, rotary, size)
        call = f"heads_in_the_room({rank}, {rotary}, {size})"
        expect_true(f"{call} is a whole number", isinstance(heads, int))
        taken, more = (cached(*2 * [(heads + extra, size)]) for extra in (0, 1))
        expect_true(f"the cache of {call} heads fits into {room} bytes", taken <= room)
        expect_true(f"one head more than {call} does not fit", more > room)
    print(f"predicted {prediction}, measured {heads_in_the_room(512, 64, 128)}")


check("11.2", check_heads_in_the_room, heads_in_the_room)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# How many numbers does MLA keep for a token, and how many does one key-value head?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# A key-value head keeps a key *and* a value. The latent is both at once, and the key with the position is kept once for all heads. So DeepSeek-V3 caches little more than GQA with two heads would (2.25 heads), and has 128.
#
# ```python
# prediction = 2
#
#
# def heads_in_the_room(kv_lora_rank: int, qk_rope_head_dim: int, head_dim: int) -> int:
#     return (kv_lora_rank + qk_rope_head_dim) // (2 * head_dim)
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 11.3, hard: experts with room for a fixed number of tokens. Who is dropped?
def kept_tokens(chosen: Tensor, num_experts: int, capacity_factor: float) -> Tensor:
    """Which choices (tokens, k) are served, True or False, in the same shape.

    Each expert has room for ceil(capacity_factor * tokens * k / num_experts) tokens. All first
    choices come before all second ones; among choices of the same rank the earlier token comes first.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_kept_tokens(kept_tokens):
    def kept(rows: list, experts: int, factor: float) -> list:
        return torch.as_tensor(kept_tokens(torch.tensor(rows), experts, factor)).tolist()

    one = [[0], [0], [1], [0], [0]]
    expect_equal("one choice, factor 1", kept(one, 2, 1.0), [[True], [True], [True], [True], [False]])
    expect_equal("factor 0.5", kept(one, 2, 0.5), [[True], [True], [True], [False], [False]])
    two = [[1, 0], [2, 0], [0, 1], [0, 2]]  # first choices of 0 come late, and still come first
    expected = [[True, False], [True, False], [True, True], [True, True]]
    expect_equal("two choices of 3 experts, factor 0.75", kept(two, 3, 0.75), expected)
    chosen = torch.randint(8, (4000, 1), generator=torch.Generator().manual_seed(1))
    served = torch.as_tensor(kept_tokens(chosen, 8, 1.0))
    room = torch.bincount(chosen[:, 0], minlength=8).clamp(max=500).sum().item()
    expect_equal("number of served among 4,000 tokens of a fair router", int(served.sum()), room)
    print(f"a fair router drops {1 - room / 4000:.1%} at factor 1")


check("11.3", check_kept_tokens, kept_tokens)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Put all choices into one line in the order in which they come: `chosen.T.flatten()`. The place of a choice in its expert's queue is the number of equal entries up to it: a `cumsum` over one-hot rows.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Counting along the queue replaces a loop over tokens; this is how Switch Transformers do it too (Fedus et al. 2021).
#
# ```python
# def kept_tokens(chosen: Tensor, num_experts: int, capacity_factor: float) -> Tensor:
#     tokens, k = chosen.shape
#     capacity = math.ceil(capacity_factor * tokens * k / num_experts)
#     queue = chosen.T.flatten()  # first choices of all tokens, then second ones
#     places = F.one_hot(queue, num_experts).cumsum(0).gather(1, queue[:, None])  # from 1
#     return (places <= capacity).view(k, tokens).T
# ```
#
# </details>

# %% [markdown]
# **Exercise 11.4, easy.** In an *interleaved* pipeline a process holds several pieces of the model in place of one: of 8 layers on 4 processes, the first has layers 1 and 5, the second 2 and 6, and so on, so that a micro-batch goes round twice. A process works through piece 1 of all micro-batches, then through piece 2 of all. Each piece takes `1 / chunks` of the time that the whole part of a process takes. Predict the bubble, as a share of the whole time; the check lets time run and compares. There are at least as many micro-batches as processes.


# %% tags=["exercise"]
# Exercise 11.4, easy: the bubble of an interleaved pipeline.
def interleaved_bubble(stages: int, micro_batches: int, chunks: int) -> float:
    """Share of the time in which processes are idle."""
    raise NotImplementedError


# %% tags=["check"]
def measured_bubble(stages: int, micro_batches: int, chunks: int) -> float:
    """Let time run over forward passes: every process works in the order of pieces, then of micro-batches."""
    ended, free = {}, [0.0] * stages
    for chunk in range(chunks):
        for index in range(micro_batches):
            ready = ended.get((chunk - 1, index), 0.0)  # when the micro-batch has come round
            for stage in range(stages):
                ready = free[stage] = max(free[stage], ready) + 1 / chunks
            ended[chunk, index] = ready
    return 1 - micro_batches / max(free)


def check_interleaved_bubble(interleaved_bubble):
    for setting in ((4, 8, 1), (4, 8, 2), (4, 4, 4), (8, 16, 3), (1, 5, 2)):
        expect_close(f"interleaved_bubble{setting}", interleaved_bubble(*setting), measured_bubble(*setting))


check("11.4", check_interleaved_bubble, interleaved_bubble)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# How long does a process work? How long does the last process wait before its first piece arrives, in units in which a whole part takes 1? Bubble is waiting over waiting and working.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Working takes as long as before, $m$. Filling the pipeline takes $p - 1$ pieces, each of length $1 / v$ with $v$ pieces to a process (`chunks`). The price: activations cross a border more than $v$ times as often, since the way back from the last process to the first comes on top.
#
# ```python
# def interleaved_bubble(stages: int, micro_batches: int, chunks: int) -> float:
#     waiting = (stages - 1) / chunks
#     return waiting / (micro_batches + waiting)
# ```
#
# </details>

# %% [markdown]
# **Exercise 11.5, medium.** In ring attention with a causal mask, a query at position $i$ needs the keys 0 to $i$, which is $i + 1$ products. If 64 positions are cut into 4 parts one after the other, how many times as much does the last process have to compute as the first? Write your guess into `predicted_ratio` *before* you run anything; the check prints what is true. Then give each process its positions so that all have equally many of them and exactly equal work. `length` is a multiple of `2 * processes`.

# %% tags=["exercise"]
# Exercise 11.5, medium: a fair cut of a causal sequence.
predicted_ratio = None  # your guess: work of the last process over that of the first


def fair_parts(length: int, processes: int) -> list[list[int]]:
    """For each process the positions of the sequence that it has."""
    raise NotImplementedError


# %% tags=["check"]
def work_of(positions: Sequence[int]) -> int:
    """Products of queries and keys under a causal mask."""
    return sum(position + 1 for position in positions)


def check_fair_parts(fair_parts):
    for length, processes in ((64, 4), (32, 2), (48, 3), (16, 8)):
        call, parts = f"fair_parts({length}, {processes})", fair_parts(length, processes)
        expect_equal(f"the number of parts of {call}", len(parts), processes)
        everything = sorted(position for part in parts for position in part)
        expect_equal(f"all positions of {call}", everything, list(range(length)))
        expect_equal(f"positions in each part of {call}", {len(part) for part in parts}, {length // processes})
        expect_equal(f"how many amounts of work there are in {call}", len({work_of(part) for part in parts}), 1)
    expect_true("predicted_ratio holds your guess", predicted_ratio is not None)
    ratio = work_of(range(48, 64)) / work_of(range(16))
    print(f"you guessed {predicted_ratio}; one after the other, the last process has {ratio:.1f} times the work")


check("11.5", check_fair_parts, fair_parts)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Cut the sequence into twice as many pieces as there are processes. Whoever takes an early piece should take a late one too.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Process $i$ takes the pieces $i$ and $2p - 1 - i$: their positions add up to the same sum for every $i$. Libraries call it *zigzag*. (Every $p$-th position, *striped*, is nearly fair, and not exactly.)
#
# ```python
# predicted_ratio = 7.0
#
#
# def fair_parts(length: int, processes: int) -> list[list[int]]:
#     size = length // (2 * processes)
#     pieces = [list(range(start, start + size)) for start in range(0, length, size)]
#     return [pieces[i] + pieces[2 * processes - 1 - i] for i in range(processes)]
# ```
#
# </details>

# %% [markdown]
# **Exercise 11.6, hard: a bug hunt.** A colleague wrote a tensor-parallel layer with its backward pass by hand. Its output equals that of one process, the loss falls, and yet the model is worse than it should be. Compare its gradients with those of one process (autograd will give them to you), find out which is wrong and on which processes, and write the layer right. `all_reduce(values)` gives every process the sum over all; the check runs your function in threads that act as the processes.


# %% tags=["exercise"]
# Exercise 11.6, hard: find what is missing.
def suspect_layer(hidden: Tensor, up: Tensor, down: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> tuple:
    """Output (rows, hidden), and a function from its gradient to those of hidden, of our part of up, and of down."""
    inner = hidden @ up.T  # (rows, inner / processes); up is (inner / processes, hidden)
    output = hidden + all_reduce(inner.relu() @ down.T)  # down is (hidden, inner / processes)

    def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        to_inner = (gradient @ down) * (inner > 0)
        return gradient + to_inner @ up, to_inner.T @ hidden, gradient.T @ inner.relu()

    return output, backward


def mended_layer(hidden: Tensor, up: Tensor, down: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> tuple:
    """The same, right."""
    raise NotImplementedError


# %% tags=["check"]
import threading
from concurrent.futures import ThreadPoolExecutor


def in_threads(layer: Callable, processes: int, hidden: Tensor, up: Tensor, down: Tensor, gradient: Tensor) -> list:
    """What the layer gives in each of several threads: output and three gradients."""
    barrier, held = threading.Barrier(processes, timeout=3), [None] * processes

    def run(rank: int) -> tuple:
        def all_reduce(values: Tensor) -> Tensor:
            held[rank] = values
            barrier.wait()
            total = torch.stack(held).sum(0)
            barrier.wait()  # nobody writes before all have read
            return total

        output, backward = layer(hidden, up.chunk(processes, 0)[rank], down.chunk(processes, 1)[rank], all_reduce)
        return output, *backward(gradient)

    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(run, range(processes)))


def check_mended_layer(mended_layer):
    generator = torch.Generator().manual_seed(3)
    shapes = (3, 5), (8, 5), (5, 8), (3, 5)
    hidden, up, down, gradient = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    whole = [tensor.clone().requires_grad_() for tensor in (hidden, up, down)]
    truth = whole[0] + (whole[0] @ whole[1].T).relu() @ whole[2].T
    truth.backward(gradient)
    for processes in (2, 4):
        for rank, found in enumerate(in_threads(mended_layer, processes, hidden, up, down, gradient)):
            where = f"on process {rank} of {processes}"
            expect_close(f"the output {where}", found[0], truth.detach())
            expect_close(f"the gradient of hidden {where}", found[1], whole[0].grad)
            expect_close(f"the gradient of up {where}", found[2], whole[1].grad.chunk(processes, 0)[rank])
            expect_close(f"the gradient of down {where}", found[3], whole[2].grad.chunk(processes, 1)[rank])


check("11.6", check_mended_layer, mended_layer)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# In section 7 the layer stood between two functions, one that adds up in the forward pass and one that adds up in the backward pass. Which of the two is here? What may be added up only once?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Each process knows only its part of the inner features, so `to_inner @ up` is one summand of the gradient of `hidden`. Without the sum, all layers *below* get a wrong gradient, and another one on each process: their copies of norms and embeddings drift apart. The gradient that arrives through the residual path is whole already and stays outside of the sum.
#
# ```python
# def mended_layer(hidden: Tensor, up: Tensor, down: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> tuple:
#     inner = hidden @ up.T
#     output = hidden + all_reduce(inner.relu() @ down.T)
#
#     def backward(gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
#         to_inner = (gradient @ down) * (inner > 0)
#         to_hidden = gradient + all_reduce(to_inner @ up)
#         return to_hidden, to_inner.T @ hidden, gradient.T @ inner.relu()
#
#     return output, backward
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **Two delta layers lose long lists in the figure of section 4b. Which runs tell too little training from too little room?**
#
# - A. The same runs with other seeds.
# - B. The same state with more steps, and the same steps with a larger state.
# - C. Runs on shorter lists.
# - D. A run with attention in all layers.
#
# <details><summary>Answer</summary>
#
# B. Change one of the two and keep the other. Here both helped, so the first line is not simply the limit of the state. (Twice the $d$ brings more weights too.) Success on short lists says nothing: an undertrained model learns those first.
#
# </details>

# %% [markdown] tags=["quiz"]
# **FlashAttention keeps $L$, one number for each query. What for?**
#
# - A. To stop the training if scores get too large.
# - B. To choose the size of the blocks.
# - C. So that the backward pass can compute any block of the weights again without looking at the other blocks.
# - D. To leave out blocks whose weights are small.
#
# <details><summary>Answer</summary>
#
# C. $P = e^{S - L}$ needs the scores of this block alone, since the denominator over all keys is in $L$. The result is exact; nothing is left out.
#
# </details>

# %% [markdown] tags=["quiz"]
# **A mixture of 8 experts with $k = 2$ is loaded for decoding one text. Compared with a dense model of the same work for each token, what does it need?**
#
# - A. the same memory for weights and the same work.
# - B. more memory for weights and about the same work.
# - C. the same memory for weights and less work.
# - D. four times the key-value cache.
#
# <details><summary>Answer</summary>
#
# B. Any expert may be the next token's, so all must be in memory; each token still uses only two. The cache belongs to attention and does not change.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the time tables of the two pipelines (section 7b), GPipe and 1F1B end at the same time. What does 1F1B gain?**
#
# - A. It sends fewer bytes from stage to stage.
# - B. Its bubble is smaller.
# - C. Each stage keeps the activations of fewer micro-batches.
# - D. Its gradients are more exact.
#
# <details><summary>Answer</summary>
#
# C. A backward pass follows as soon as it can and frees what its forward pass kept. Bubble and bytes are those of GPipe, and so are the gradients. With the memory that is saved, more micro-batches fit, and they make the bubble smaller.
#
# </details>

# %% [markdown] tags=["quiz"]
# **You double the width of a model in the standard parametrisation, keep the learning rate, and the run diverges. In a coordinate check the activations of the wide model move about twice as far in the first steps. What follows?**
#
# - A. The rate has to fall with the number of inputs of each matrix, which is what muP does.
# - B. The initial weights are too small.
# - C. The batch is too small for the wide model.
# - D. The wide model needs gradient checkpointing.
#
# <details><summary>Answer</summary>
#
# A. Every weight moves by about the learning rate, and the moves of all inputs of a neuron add up, so twice the inputs move its output twice as far. Neither the batch nor what is kept for the backward pass has a part in that.
#
# </details>

# %% [markdown]
# ## What we saw
#
# The rows that hold were printed above; some of those with an empty last column are printed only here. All were measured in this run, but for those of section 10b on the best rate of width 16, on the share of steps that Muon needs, and on schedules: these come from the shipped sweep.

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# On a real model checkpointing is one call, and the ways of section 7 are settings. With this course's loop: `TrainConfig(schedule="wsd", clip_norm=1.0, parallel="fsdp2")`, a script, and the `torchrun` line of section 7b.

# %%
texts = [World().document(7000, index) for index in range(40)]
rows = torch.tensor(list(pack(tokenizer(texts, add_special_tokens=False)["input_ids"], 128)))[:4].to(machine.device)
gradients, kept, known = [], [], {parameter.data_ptr() for parameter in model.parameters()}
seen = {}  # place in memory -> bytes


def note(tensor: Tensor) -> Tensor:
    """Called for each tensor that autograd keeps."""
    seen[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor


model.requires_grad_(True).train()
model.zero_grad()
for checkpointed in (False, True):
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seen.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    kept.append(sum(size for place, size in seen.items() if place not in known))
    gradients.append(torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()]))
    model.zero_grad()
model.gradient_checkpointing_disable()
model.eval()
print(f"kept for the backward pass: {kept[0] / 2**20:.1f} MiB, with checkpointing {kept[1] / 2**20:.1f} MiB")
difference = ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item()
lesson.equal("gradient checkpointing leaves the model's gradients as they are", difference,
             within=1e-4 if machine.dtype == "float32" else 0.05)  # fmt: skip

# %% [markdown]
# ## Read on
#
# - Shazeer 2019, *Fast Transformer Decoding: One Write-Head is All You Need*: MQA. Ainslie et al. 2023, *GQA*: merging heads of a trained model. DeepSeek-AI 2024, *DeepSeek-V2*: MLA and its absorbed form.
# - Xiao et al. 2023, *Efficient Streaming Language Models with Attention Sinks*: windows that keep the first tokens.
# - Dao et al. 2022, *FlashAttention*, and Dao 2023, *FlashAttention-2*: the algorithm of section 3, and what a GPU makes of it.
# - Katharopoulos et al. 2020, *Transformers are RNNs*; Dao and Gu 2024, *Transformers are SSMs*; Yang et al. 2024, *Gated Delta Networks*; Arora et al. 2023, *Zoology*: states, and what they recall.
# - Fedus et al. 2021, *Switch Transformers*; Komatsuzaki et al. 2022, *Sparse Upcycling*; Wang et al. 2024, *Auxiliary-Loss-Free Load Balancing*; Zoph et al. 2022, *ST-MoE*; Jelassi et al. 2024, *Mixture of Parrots*: mixtures of experts.
# - Gloeckle et al. 2024, *Better & Faster Large Language Models via Multi-token Prediction*; DeepSeek-AI 2024, *DeepSeek-V3 Technical Report*: the block of section 6.
# - Rajbhandari et al. 2020, *ZeRO: Memory Optimizations Toward Training Trillion Parameter Models*, arXiv:1910.02054: the three stages and their bytes.
# - Shoeybi et al. 2019, *Megatron-LM*, arXiv:1909.08053: tensor parallelism with two functions that are each other's backward pass; Narayanan et al. 2021, arXiv:2104.04473: it together with pipelines, and the interleaved schedule.
# - Huang et al. 2019, *GPipe*, arXiv:1811.06965; Narayanan et al. 2019, *PipeDream*, SOSP: 1F1B.
# - Liu et al. 2023, *Ring Attention with Blockwise Transformers for Near-Infinite Context*, arXiv:2310.01889.
# - Chen et al. 2016, *Training Deep Nets with Sublinear Memory Cost*, arXiv:1604.06174.
# - Wortsman et al. 2023, *Small-scale proxies for large-scale Transformer training instabilities*, arXiv:2309.14322: which faults of large runs small models show, and QK-norm and z-loss against them.
# - Dehghani et al. 2023, *Scaling Vision Transformers to 22 Billion Parameters*, arXiv:2302.05442: QK-norm. Chowdhery et al. 2022, *PaLM*, arXiv:2204.02311: the z-loss. Broder 1997, *On the Resemblance and Containment of Documents*: MinHash. Brown et al. 2020, *Language Models are Few-Shot Learners*, arXiv:2005.14165: its appendix has the quality filter.
# - Yang et al. 2022, *Tensor Programs V*, arXiv:2203.03466: muP and the transfer of hyperparameters.
# - Jordan 2024, *Muon: An optimizer for hidden layers in neural networks* (blog); Liu et al. 2025, *Muon is Scalable for LLM Training*, arXiv:2502.16982. Hu et al. 2024, *MiniCPM*, arXiv:2404.06395: WSD.
# - Lee et al. 2022, *Deduplicating Training Data Makes Language Models Better*, arXiv:2107.06499; Li et al. 2024, *DataComp-LM*, arXiv:2406.11794: filters compared at equal compute.
