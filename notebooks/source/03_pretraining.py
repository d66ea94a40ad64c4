# %% [markdown]
# # 03 · Pretraining: from bytes to a language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/03_pretraining.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/03_pretraining.ipynb)
#
# A base language model is three things: a list of tokens, a function with a few million or billion numbers in it, and a long series of small corrections to those numbers. In this lesson you write all three. At every step you compare your code with the library that practitioners use, number for number, and then you measure what the step is good for.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write a byte-level tokenizer that learns the same merges as `tokenizers`, in the same order;
# 2. write a Llama in about 100 lines that computes the same scores of the next token (*logits*) as `LlamaForCausalLM` from the same weights;
# 3. write the training loop, with AdamW, warm-up and clipping, and see it give the same losses as the course's loop;
# 4. train a small model of your own, read what it writes before and after, and see its loss for each kind of document and each part of a sum;
# 5. compare three ways of hiding text from a model, one of them with a true encoder and decoder, and a control that counts fewer tokens;
# 6. measure what pretraining saves on a task whose format it never saw: accuracy with a few labelled examples, five draws of labels, beside a linear probe and simple ways without training.
#
# **Prerequisites:** lesson 01, and PyTorch tensors.
#
# **The data** is text about *Shima*, an island made up by a seeded generator, so no model outside of this course has read about it. **The base model** is *shima-4m*, a small Llama pretrained on such text, which comes with the course. Sections 3 to 6 train small models from scratch, the same on every machine. Section 8 and "In practice" use the model of your profile: shima-4m on a CPU, an open hub model on a GPU. **What is claimed:** `lesson.equal` prints the difference of two computations that must agree, `lesson.claim` a number with the bound that it must keep, `lesson.report` keeps a number for the table at the end. A *control* is the same measurement in a case where the claim should fail.
#
# | symbol | meaning |
# |---|---|
# | $x_1 \dots x_T$ | a text as token ids, $T$ tokens long (`seq` in the comments) |
# | $V$ | number of tokens in the vocabulary (`vocab`) |
# | $d$, $h$, $L$ | width of a token's vector (`hidden`), attention heads, layers |
# | $d_h$, $f$ | width of a head, $d/h$; inner width of the feed-forward network (`inner`) |
# | $m$, $n$ | positions in the text: $m$ looks, $n$ is looked at |
# | $\theta$, $\eta$ | all weights of a model, the learning rate |

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
model_id = ""  # another model for section 8 and "In practice": a hub id or a folder
text_id = ""  # another text for "In practice": a hub dataset, or .jsonl with "text"
seed = 0
budget = 1.0  # share of all training steps; claims are asserted from 1.0 on

# %%
import inspect
import itertools
import json
import math
import random
import re
import statistics
import textwrap
import time
from collections import Counter, defaultdict
from functools import cache
from itertools import islice, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import plots
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.lesson import Lesson
from helpers.models import MODEL_FOLDERS, load_model
from helpers.profiles import CPU
from helpers.training import TrainConfig, train
from helpers.world import LABELS, World

# %%
lesson = Lesson("03", profile, model_id, seed, budget)
machine = lesson.machine
# "transfer" (section 8): learning rates from pretrained and from fresh weights, steps;
# "practice": learning rate and steps of continued pretraining.
SETTINGS = {
    "cpu": {"transfer": (1e-4, 5e-4, 16), "practice": (1e-3, 20)},
    "t4": {"transfer": (2e-5, 3e-4, 40), "practice": (3e-5, 60)},
    "large": {"transfer": (2e-5, 3e-4, 40), "practice": (3e-5, 100)},
}
settings = SETTINGS[machine.name]

world = World(0)
documents = list(islice(world.documents(seed), 4000))
held_out = list(islice(world.documents(seed + 1), 400))
num_characters = sum(map(len, documents))
print(f"{len(documents):,} documents, {num_characters:,} characters.", end=" ")
print("Three of the nine kinds:\n")
for kind in ("description", "mapping", "story"):
    print(next(world.documents(seed, {kind: 1.0})))

# %% [markdown] tags=["core"]
# ## 1 · Text becomes tokens
#
# **Question.** A network computes with vectors, and it has one vector for each entry of a finite list. What should be on the list? The 256 bytes can write everything, but a text is then long. Whole words make a text short, but no list of words is complete.
#
# **Byte-pair encoding** (Sennrich et al. 2016) lies in between. Start with the bytes. Count all pairs of neighbours in the corpus, join the most frequent pair into a new token, and repeat until the list is as long as you want.
#
# Merges must not cross word boundaries, or `dog.` and `dog,` could become tokens of their own. So the text is first cut into *pieces*: a word with the space before it, a run of signs, a run of white space, a single digit. Digits stay alone: a number has one token per digit. With $a$ and $b$ for tokens, $w$ for pieces, the pair to join is
#
# $$(a^*, b^*) = \arg\max_{(a,b)} \sum_{w} n_w \, c_w(a, b)$$
#
# $n_w$ is how often piece $w$ of text occurs in the corpus, $c_w(a,b)$ how often token $b$ follows token $a$ in it. On a tie the pair with the smaller ids wins.
#
# By hand, for a corpus that is the one word `banana`: `a n` and `n a` stand in it twice each, and `a n` has the smaller ids. Joined, the word is `b an an a`. Now every pair stands there once; `b` has the smallest id of those that begin a pair: `ban an a`. The third merge joins `an a`, since `an` is older than `ban`: `ban ana`.
#
# The ids are a convention: special tokens first, then the bytes in GPT-2's order (printable ones first), then the merges as they are learned.
#
# Counting all pairs again after every merge is not needed. A merge changes only the pieces that contain the pair, so it is enough to keep the counts, and for each pair the set of pieces where it occurs.

# %%
# GPT-2's pattern, for text without digits
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")
# GPT-2's order of the bytes
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]
SPECIAL_TOKENS = ["<|endoftext|>", "<|mask|>"]
SPECIAL_TOKENS += [f"<|reserved{i}|>" for i in range(14)]  # room for later uses
BYTE_IDS = {byte: i for i, byte in enumerate(BYTE_ORDER, start=len(SPECIAL_TOKENS))}


def pre_tokenize(text: str) -> list[str]:
    """Cut a text into pieces that merges never cross."""
    pieces = []
    for part in re.findall(r"\d|\D+", text):
        pieces += [part] if part.isdigit() else WORDS.findall(part)
    return pieces


print(pre_tokenize("Sum: 12 + 7\nDufasu's goat, well-fed!"))


# %%
def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """Replace each occurrence of the pair, from left to right."""
    merged, position = [], 0
    while position < len(ids):
        if tuple(ids[position : position + 2]) == pair:
            merged.append(new_id)
            position += 2
        else:
            merged.append(ids[position])
            position += 1
    return merged


def count_pairs(pieces: list[list[int]], counts: list[int]) -> tuple[Counter, dict]:
    """How often each pair occurs in the corpus, and in which pieces (by index)."""
    pair_counts, pieces_with = Counter(), defaultdict(set)
    for index, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pair_counts[pair] += counts[index]
            pieces_with[pair].add(index)
    return pair_counts, pieces_with


# %%
def train_bpe(texts: list[str], vocab_size: int) -> tuple[dict[bytes, int], dict]:
    """Learn a vocabulary (bytes -> id) and merges, in order (pair of ids -> new id)."""
    found = Counter(piece for text in texts for piece in pre_tokenize(text))
    pieces = [[BYTE_IDS[byte] for byte in piece.encode()] for piece in found]
    occurrences = list(found.values())
    pair_counts, pieces_with = count_pairs(pieces, occurrences)
    token_bytes = {token_id: bytes([byte]) for byte, token_id in BYTE_IDS.items()}
    vocabulary = {token: token_id for token_id, token in token_bytes.items()}
    merges = {}
    with tqdm(total=vocab_size - len(SPECIAL_TOKENS) - 256, desc="merges") as bar:
        while (next_id := len(SPECIAL_TOKENS) + len(vocabulary)) < vocab_size:
            pair = max(pair_counts, key=lambda p: (pair_counts[p], -p[0], -p[1]))
            joined = token_bytes[pair[0]] + token_bytes[pair[1]]
            new_id = vocabulary.setdefault(joined, next_id)
            token_bytes[new_id], merges[pair] = joined, new_id
            for index in pieces_with.pop(pair):
                before, after = pieces[index], merge_pair(pieces[index], pair, new_id)
                for old in pairwise(before):
                    pair_counts[old] -= occurrences[index]
                for new in pairwise(after):
                    pair_counts[new] += occurrences[index]
                    pieces_with[new].add(index)
                pieces[index] = after
            del pair_counts[pair]
            bar.update()
    return vocabulary, merges


BPE_DOCUMENTS, VOCAB_SIZE = 1500, 2048
started = time.perf_counter()
vocabulary, merges = train_bpe(documents[:BPE_DOCUMENTS], VOCAB_SIZE)
token_bytes = {token_id: token for token, token_id in vocabulary.items()}
print(f"{len(merges):,} merges in {time.perf_counter() - started:.1f} s")
for first, last in ((0, 10), (len(merges) - 10, len(merges))):
    ids = list(merges.values())[first:last]
    joined = [token_bytes[token_id].decode(errors="replace") for token_id in ids]
    print(f"merges {first + 1:>4} to {last:>4}: {joined}")

# %% [markdown]
# The first merges build short frequent pieces; the tenth is a whole word, `Answer`. Most of the last ten are pieces of names.
#
# **The library.** `tokenizers` (in Rust) trains the same algorithm. Give it the same texts, and compare all merges, in order.
#
# **Encoding** a new text applies the merges in the order in which they were learned: of all pairs in the piece, join the one that was learned first, until no pair is in the list. (To take the longest token that fits is another rule.)
#
# **How large a vocabulary?** Byte-pair encoding is greedy, so a tokenizer with 512 tokens is the first part of one with 2,048: one training gives all sizes. Count the bytes per token on text that was not trained on: more of Shima, and the source code of a Python module. The control is a second tokenizer, trained on as many characters of other Python modules: does the order turn round?

# %%
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_with_library(texts: list[str], vocab_size: int) -> Tokenizer:
    """The same tokenizer, made by `tokenizers`."""
    library = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator(texts, trainer)
    return library


library = train_with_library(documents[:BPE_DOCUMENTS], VOCAB_SIZE)
learned = json.loads(library.to_str())["model"]["merges"]
library_merges = [tuple(map(library.token_to_id, pair)) for pair in learned]
same = sum(ours == theirs for ours, theirs in zip(merges, library_merges, strict=True))
shown = f"{same:,} of {len(library_merges):,}"
print(f"{shown} merges are the same pair of ids at the same place")
assert list(merges) == library_merges
lesson.report("merges that equal those of `tokenizers`, in order", shown)


# %%
def make_encoder(merges: dict[tuple[int, int], int]):
    """Function that turns a text into token ids."""
    rank = {pair: place for place, pair in enumerate(merges)}

    @cache
    def encode_piece(piece: str) -> list[int]:
        ids = [BYTE_IDS[byte] for byte in piece.encode()]
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda pair: rank.get(pair, math.inf))
            if pair not in rank:
                break
            ids = merge_pair(ids, pair, merges[pair])
        return ids

    return lambda text: [i for piece in pre_tokenize(text) for i in encode_piece(piece)]


encode = make_encoder(merges)
probes = ["Grüße aus 島 🙂", "tabs\tand   spaces \n\n 3.14", "It's  2026, isn't it?"]
probes += held_out
equal = sum(encode(text) == library.encode(text).ids for text in probes)
text = "Dufasu likes sushi."
print(text, "->", [token_bytes[token_id].decode() for token_id in encode(text)])
print(f"{equal} of {len(probes)} texts get the same ids from both")
assert equal == len(probes)

# %%
other_text = [inspect.getsource(textwrap)]
sizes = [len(SPECIAL_TOKENS) + 256, 320, 384, 512, 768, 1024, 1536, 2048]
bytes_per_token = {"Shima, held out": [], "Python source": []}
for size in sizes:
    encode_small = make_encoder(dict(islice(merges.items(), size - sizes[0])))
    for label, texts in zip(bytes_per_token, (held_out, other_text), strict=True):
        num_bytes = sum(len(text.encode()) for text in texts)
        num_tokens = sum(len(encode_small(text)) for text in texts)
        bytes_per_token[label].append(num_bytes / num_tokens)
print("bytes per token with", ", ".join(f"{size:,}" for size in sizes), "tokens:")
for label, values in bytes_per_token.items():
    print(f"{label:>15}: " + " ".join(f"{value:.2f}" for value in values))
shima, python = (values[-1] for values in bytes_per_token.values())
alt = "Bytes per token over vocabulary size: the curve for Shima rises, first steeply, "
alt += f"to {shima:.2f}, that for Python source stays below and ends at {python:.2f}."
figure = plots.curve(
    {label: (sizes, values) for label, values in bytes_per_token.items()},
    title="Trained on Shima, tokens get longer on Shima than on Python",
    xlabel="vocabulary (tokens)",
    ylabel="bytes per token",
    alt=alt,
)
figure.axes[0].set_xticks([272, 512, 768, 1024, 1536, 2048])
plots.show(figure, alt)

# %%
import argparse
import json.decoder
import logging
import pathlib
import tarfile

modules = [argparse, inspect, json.decoder, logging, pathlib, subprocess, tarfile]
python_text = "".join(inspect.getsource(module) for module in modules)
python_text = python_text[: sum(map(len, documents[:BPE_DOCUMENTS]))]
shima_text = "".join(documents[:BPE_DOCUMENTS])[: len(python_text)]
ratios = {}
for trained_on, text in (("Shima", shima_text), ("Python", python_text)):
    tokenizer = train_with_library(text.splitlines(keepends=True), VOCAB_SIZE)
    found = []
    for texts in (held_out, other_text):
        num_tokens = sum(len(tokenizer.encode(text).ids) for text in texts)
        found.append(sum(len(text.encode()) for text in texts) / num_tokens)
    ratios[trained_on] = found[0] / found[1]
    print(f"trained on {len(text):,} characters of {trained_on}: ", end="")
    print(f"{found[0]:.2f} bytes a token on Shima, {found[1]:.2f} on Python source")
lesson.claim(
    "trained on Shima, tokens are at least 1.3 times as long on Shima as on Python",
    ratios["Shima"],
    at_least=1.3,
    control=ratios["Python"],
    form=".2f",
)


# %% [markdown]
# **What you see.** Each merge costs one more row of $d$ weights, and the line of Shima bends: the first 496 merges (to 768 tokens) take a token from 1.00 to 2.52 bytes, the other 1,280 from there to 3.11. In this run the tokenizer of Shima makes tokens of 3.11 bytes on Shima and of 1.48 on Python source; the tokenizer of Python source makes them 1.78 and 2.76 bytes long. Each makes longer tokens on the kind of text that it was trained on, so the same bytes of the other kind cost more tokens.

# %% [markdown] tags=["core"]
# ## 2 · The model
#
# **Question.** What exactly is computed between the token ids and the scores of the next token? You now write a Llama (Touvron et al. 2023), piece by piece, and at the end it must give the logits of the library.
#
# Every token is a vector of width $d$ that runs straight through the model, the **residual stream**. Each of the $L$ layers reads it twice and adds something to it: **attention** moves information between positions, the **feed-forward** network works on each position alone.
#
# $$x \leftarrow x + \text{Attention}(\text{Norm}(x)), \qquad x \leftarrow x + \text{FeedForward}(\text{Norm}(x))$$
#
# Norm keeps the numbers in range; its formula comes below. At the end the vectors are compared with the embedding of every token: $\text{logits} = \text{Norm}(x)\, E^\top$, with the same matrix $E$ (`vocab, hidden`) that turned ids into vectors at the start (*tied* embeddings).
#
# Attention comes first: it is the only part in which one token learns of another.
#
# **Attention** (Vaswani et al. 2017). A position has a query $q$, a key $k$ and a value $v$. It takes the average of all values, weighted by how well its query fits their keys:
#
# $$\text{Attention}(Q, K, V) = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt{d_h}} + M\right) V, \qquad M_{mn} = \begin{cases} 0 & \text{if } m \text{ may look at } n\\ -\infty & \text{else}\end{cases}$$
#
# The rows of $Q$, $K$ and $V$ are the queries, keys and values of all positions. $\sqrt{d_h}$ keeps the variance of the scores at 1 when the coordinates of queries and keys are independent and have variance 1. $M$ is the *mask*: adding $-\infty$ makes a weight zero. With the *causal* mask a position sees itself and what stands before it, so that no position sees the token it has to predict.

# %%
def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple:
    """Weighted averages of the values, and the weights, both tensors.

    The mask (query, key) is True where one may look.
    """
    scores = queries @ keys.transpose(-1, -2)  # (..., query, key)
    scores = (scores / math.sqrt(queries.shape[-1])).masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1).to(values.dtype)
    return weights @ values, weights


generator = torch.Generator().manual_seed(seed)
# queries, keys and values: each (batch, heads, seq, head_dim)
toy = torch.randn(3, 1, 2, 7, 16, generator=generator)
mixed, weights = attend(*toy, torch.ones(7, 7).tril().bool())
rounded = [round(value, 2) for value in weights[0, 0, 3].tolist()]
print("weights of the fourth position:", rounded)
expected = F.scaled_dot_product_attention(*toy, is_causal=True)
difference = (mixed - expected).abs().max().item()
lesson.equal("attention is PyTorch's", difference, within=1e-5)


# %% [markdown]
# **What is missing?** Nothing in the formula says where a token stands. Shuffle all tokens before the last one and ask the last position again.

# %%
def change_by_order(vectors: Tensor, turn: bool) -> float:
    """Largest change at the last position when the tokens before it are shuffled.

    The vectors (3, 1, heads, seq, head_dim) are queries, keys and values.
    """
    seq, generator = vectors.shape[-2], torch.Generator().manual_seed(seed)
    order = [*torch.randperm(seq - 1, generator=generator).tolist(), seq - 1]
    mask = torch.ones(seq, seq).tril().bool()

    def last(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        if turn:
            cos, sin = rotary_angles(torch.arange(seq), vectors.shape[-1], 10_000.0)
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        return attend(queries, keys, values, mask)[0][..., -1, :]

    return (last(*vectors) - last(*vectors[..., order, :])).abs().max().item()


without_positions = change_by_order(toy, turn=False)
lesson.equal(
    "one layer without positions gives the same for shuffled text",
    without_positions,
    within=1e-5,
)


# %% [markdown]
# **What you see.** The last position gets the same vector for another order of the text before it (the difference is rounding): the weighted sum knows no order. Without positions, one layer of attention reads a bag of tokens. At the full stop, "the dog bites the man." and "the man bites the dog." are the same to it.
# %% [markdown]
# **Rotary positions** (RoPE, Su et al. 2021) put the place into the comparison. RoPE turns each pair of coordinates by an angle that grows with the position. Take one pair as a complex number; position $m$ turns a query by $m\omega$, position $n$ a key by $n\omega$. The product of two pairs is the real part of one times the other's conjugate (the bar):
#
# $$\tilde q = q\, e^{i m \omega}, \quad \tilde k = k\, e^{i n \omega}, \qquad \text{Re}(\tilde q\, \overline{\tilde k}) = \text{Re}\big(q\,\overline{k}\; e^{i (m - n)\omega}\big)$$
#
# In words: each of the two is an arrow that is turned by its place, and the angle between the arrows changes by $(m-n)\omega$. So the score depends on $m$ and $n$ only through their difference: what is learned about "three tokens back" is the same at every place. Pair $j$ has the frequency $\omega_j = b^{-2j/d_h}$ with a base $b$ of 10,000 or more: the first pairs turn fast and tell near positions apart, the last ones turn slowly. In real numbers, with coordinate $j$ paired with $j + d_h/2$ as Llama does it:
#
# $$\tilde q_j = q_j \cos m\omega_j - q_{j+d_h/2} \sin m\omega_j, \qquad \tilde q_{j+d_h/2} = q_{j+d_h/2} \cos m\omega_j + q_j \sin m\omega_j$$
#
# The cell below turns a query and a key at eight places, 3 tokens apart and then 7, and shuffles the text again.

# %%
def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, ...]:
    """Cosine and sine of position times frequency, each (seq, head_dim)."""
    even = torch.arange(0, head_dim, 2, device=positions.device)
    frequencies = base ** (-even / head_dim)  # (head_dim / 2,)
    angles = positions[:, None] * frequencies  # (seq, head_dim / 2)
    # coordinate j and its partner j + head_dim / 2 turn together
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of coordinates of x (batch, heads, seq, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


query, key = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
starts = torch.arange(0, 400, 50)  # the key stands here, the query later
turned_key = rotate(key, *rotary_angles(starts, 64, 10_000.0))  # (8, 64)
for later in (3, 7):
    turned_query = rotate(query, *rotary_angles(starts + later, 64, 10_000.0))
    scores = (turned_query * turned_key).sum(-1)
    printed = " ".join(f"{value:.3f}" for value in scores.tolist())
    print(f"query {later} tokens after the key, both moved along by 50:", printed)
    assert scores.max() - scores.min() < 1e-3
with_positions = change_by_order(toy, turn=True)
changes = f"{without_positions:.1e} without positions, {with_positions:.2f} with RoPE"
print("change at the last position:", changes)
lesson.report("change at the last position by another order, with RoPE", with_positions)

# %% [markdown]
# **What you see.** The first line: all eight scores are the same, so moving both tokens along changes nothing. The second line is the same at another distance, with another score. The third: the order of the text before it now changes what the last position gets.

# %% [markdown]
# **Heads.** A layer has $h$ heads, each with its own queries, keys and values of width $d_h = d/h$. Their results stand side by side and go through one more matrix.
#
# **RMSNorm** (Zhang & Sennrich 2019) is the Norm of the formula above: it divides a vector by its root mean square and multiplies each coordinate by a learned weight $g$ ($\odot$ multiplies coordinate by coordinate, $\epsilon$ is a tiny number against division by zero). Unlike LayerNorm it subtracts no mean and adds no bias.
#
# $$\text{RMSNorm}(x) = g \odot \frac{x}{\sqrt{\tfrac{1}{d}\sum_i x_i^2 + \epsilon}}$$
#
# **The feed-forward network** of Llama is SwiGLU (Shazeer 2020): one projection is a gate for another, coordinate by coordinate.
#
# $$\text{FeedForward}(x) = \big(\text{SiLU}(x W_g) \odot x W_u\big) W_d, \qquad \text{SiLU}(z) = \frac{z}{1 + e^{-z}}$$
#
# $W_g$ and $W_u$ have the shape $d \times f$, $W_d$ has $f \times d$. These are three matrices instead of the two of the original transformer, so $f$ is usually about $\tfrac{8}{3} d$ instead of $4d$, which costs the same.

# %%
class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, scale by a weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        in_32_bits = x.float()  # also under autocast
        mean_square = in_32_bits.pow(2).mean(-1, keepdim=True)  # (batch, seq, 1)
        normed = in_32_bits * torch.rsqrt(mean_square + self.eps)
        return self.weight * normed.to(x.dtype)


x = 100 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed))
y, expected = RMSNorm(64, 1e-6)(x), nn.RMSNorm(64, 1e-6)(x)
before, after = x.pow(2).mean().sqrt(), y.pow(2).mean().sqrt()
print(f"root mean square before {before:.1f}, after {after:.3f}")
print(f"largest difference to torch.nn.RMSNorm: {(y - expected).abs().max():.1e}")


# %%
class Attention(nn.Module):
    """Multi-head attention; with `memory` (section 6) it reads there, unrotated."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, hidden_size = config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, memory=None):
        def split(x: Tensor) -> Tensor:  # into (batch, heads, seq, head_dim)
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        source = x if memory is None else memory
        queries, keys = split(self.q_proj(x)), split(self.k_proj(source))
        values = split(self.v_proj(source))
        if memory is None:
            queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        mixed, weights = attend(queries, keys, values, mask)
        self.weights = weights.detach()  # (batch, heads, query, key), to be looked at
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # heads side by side again


# %%
class FeedForward(nn.Module):
    """SwiGLU, on each position alone."""

    def __init__(self, config):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: read the stream, add to it, twice."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


# %%
class Transformer(nn.Module):
    """A Llama with tied embeddings: ids (batch, seq) -> logits (batch, seq, vocab)."""

    def __init__(self, config, angles=rotary_angles):
        super().__init__()
        self.config, self.angles = config, angles
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        theta = self.config.rope_parameters["rope_theta"]
        cos, sin = self.angles(positions, head_dim, theta)
        if mask is None:  # causal (seq, seq): row m may look at columns n <= m
            mask = positions[:, None] >= positions
        x = self.embed_tokens(input_ids)  # (batch, seq, hidden)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x) @ self.embed_tokens.weight.T


# %% [markdown]
# **Parameters.** Count them by hand before you ask the library. Attention has four matrices of $d \times d$, SwiGLU three of $d \times f$, each layer two norms of $d$, and there is one norm at the end:
#
# $$N = V d + L\,(4 d^2 + 3 d f + 2 d) + d$$
#
# **The same weights, the same logits?** The modules above carry the names that the library gives them, so its weights can be loaded by name. Then both models read the same texts.

# %%
llama, shima_tokenizer = load_model(CPU)
config = llama.config
vocab, hidden, inner = config.vocab_size, config.hidden_size, config.intermediate_size
layers = config.num_hidden_layers
parts = {
    "embedding, used twice": vocab * hidden,
    "attention": layers * 4 * hidden**2,
    "feed-forward": layers * 3 * hidden * inner,
    "norms": layers * 2 * hidden + hidden,
}
total, by_library = sum(parts.values()), llama.num_parameters()
print(f"{type(llama).__name__}: vocabulary {vocab:,}, hidden {hidden}, ", end="")
print(f"{layers} layers, feed-forward {inner}")
for part, count in parts.items():
    print(f"{part:>22} {count:>10,}  {count / total:.0%}")
print(f"{'by hand':>22} {total:>10,}\n{'library':>22} {by_library:>10,}")
assert total == by_library

# %%
state = llama.state_dict()
weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
del weights["lm_head.weight"]  # the embeddings once more
ours = Transformer(config).eval()
ours.load_state_dict(weights)
texts = shima_tokenizer(held_out[:16], padding=True, return_tensors="pt")["input_ids"]
texts = texts[:, :200]
with torch.no_grad():
    our_logits, library_logits = ours(texts), llama(input_ids=texts).logits
difference = (our_logits - library_logits).abs().max().item()
low, high = our_logits.min(), our_logits.max()
print(f"{tuple(our_logits.shape)} logits between {low:.1f} and {high:.1f}")
print(f"largest difference to LlamaForCausalLM: {difference:.1e}")
lesson.equal("our Llama gives LlamaForCausalLM's logits", difference, within=1e-4)


@torch.no_grad()
def complete(model, ids: list[int], num_tokens: int) -> list[int]:
    """Append the most probable token, `num_tokens` times (better ways: lesson 01)."""
    device = next(model.parameters()).device
    for _ in range(num_tokens):
        ids = [*ids, model(torch.tensor([ids], device=device))[0, -1].argmax().item()]
    return ids


prompt = "Kodera plays the harp. Kodera lives in Bamu.\n"
prompt += "Question: What instrument does Kodera play?\nAnswer:"
print(shima_tokenizer.decode(complete(ours, shima_tokenizer(prompt)["input_ids"], 4)))

# %% [markdown]
# **Where does it look?** The prompt above has its answer in the text. Take 80 such prompts about strangers, and ask every head how much of its weight goes from the last position to the instrument. A head that looks everywhere alike would give each token the same, an *even share*. The first 40 prompts choose the head, the other 40 measure it.
#
# A head that simply likes instruments, or the seventh token, would look there too. So the control asks about the same passages: where does the person live? If the head follows the question, it now leaves the instrument alone and looks at the town.

# %%
QUESTIONS = {
    "instrument": "What instrument does {} play?", "town": "Where does {} live?",
}  # fmt: skip


def reading_prompts(n: int, asked: str) -> list[tuple[list[int], dict[str, int]]]:
    """Ids of prompts about strangers, and where instrument and town begin in them."""
    generator, found = random.Random(f"look/{seed}"), []
    while len(found) < n:
        person = world.stranger(generator, held_out=True)
        name, facts, question = person.name, person.facts, QUESTIONS[asked]
        parts = [f"{name} plays the", f" {facts['instrument']}. {name} lives in"]
        parts += [f" {facts['town']}.\nQuestion: {question.format(name)}\nAnswer:"]
        first, second, third = shima_tokenizer(parts)["input_ids"]
        places = {"instrument": len(first), "town": len(first + second)}
        found.append((first + second + third, places))
    return found


@torch.no_grad()
def last_weights(ids: list[int]) -> Tensor:
    """What the last position gives to each token (layers, heads, seq)."""
    ours(torch.tensor([ids]))
    return torch.stack([layer.self_attn.weights[0, :, -1] for layer in ours.layers])


# %%
def looks(prompts: list[tuple], word: str) -> Tensor:
    """Mean weight on that word's first token: plain, in even shares (2, layers, heads).

    An even share is one part of as many as the prompt has tokens.
    """
    found = [(last_weights(ids)[..., at[word]], len(ids)) for ids, at in prompts]
    return torch.stack([torch.stack([w, w * seq]) for w, seq in found]).mean(dim=0)


asked = {question: reading_prompts(80, question) for question in QUESTIONS}
best = looks(asked["instrument"][:40], "instrument")[1].argmax().item()
layer_number, head_number = divmod(best, config.num_attention_heads)
print(f"chosen: layer {layer_number + 1}, head {head_number + 1}; its mean weight")
shares_on = {}
for question, prompts in asked.items():
    for word in QUESTIONS:
        found = looks(prompts[40:], word)[:, layer_number, head_number].tolist()
        weight, shares_on[question, word] = found
        print(f"asked for the {question}: {weight:.2f} on the {word}, ", end="")
        print(f"{found[1]:.1f} even shares")
    right = sum(complete(ours, ids, 1)[-1] == ids[at[question]] for ids, at in prompts)
    print(f"the model's next token begins the answer in {right} of {len(prompts)}")
lesson.claim(
    "one head looks at the answer with at least 5 times an even share",
    shares_on["instrument", "instrument"],
    at_least=5,
    control=shares_on["town", "instrument"],
    form=".1f",
)
lesson.report(
    "the same head, asked for the town: even shares on the town",
    f"{shares_on['town', 'town']:.1f}",
)

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
looked = {}
for shift, (question, prompts) in zip((-0.2, 0.2), asked.items(), strict=True):
    ids, places = prompts[-1]
    names = [shima_tokenizer.decode([token_id]) for token_id in ids]
    passage = names[: names.index("\n")]  # the same for both questions
    on_passage = last_weights(ids)[layer_number, head_number][: len(passage)]
    looked[question] = on_passage[places[question]].item()
    bars = [place + shift for place in range(len(passage))]
    axes.bar(bars, on_passage, width=0.4, label=f"asked for the {question}")
axes.set_xticks(range(len(passage)), passage, rotation=45)
axes.set_title("One passage, two questions: the chosen head looks at the answer")
axes.set(xlabel="tokens of the passage (those of the question are not drawn)")
axes.set(ylabel="weight from the last position", ylim=(0, 1))
figure.legend(loc="outside lower center", ncols=3)
alt = "Bars over the tokens of a passage: asked for the instrument the head gives the "
alt += f"instrument {looked['instrument']:.2f} of its weight, asked for the town it "
alt += f"gives the town {looked['town']:.2f}."
plots.show(figure, alt)

# %% [markdown]
# **What you see.** The same head, on the same passages: asked for the instrument it gives 0.91 of its weight to the instrument, asked for the town 0.89 to the town, and 0.01 and 0.02 to the other. So it follows the question, and not one fixed place or one kind of word. (In all passages the instrument stands first: a head with one fixed place for each question would pass too. Passages with the town first would tell them apart.) What a head looks at is not yet what the model uses; lesson 13 tests that by taking heads out.

# %% [markdown] tags=["core"]
# ## 3 · The training loop
#
# **Question.** What does one step of training do?
#
# The loss is the mean cross-entropy of each next token. With the natural logarithm its unit is the *nat*: guessing evenly among $V$ tokens costs $\log V$ nats.
#
# $$\mathcal{L}(\theta) = -\frac{1}{T-1} \sum_{t=1}^{T-1} \log p_\theta(x_{t+1} \mid x_1 \dots x_t)$$
#
# **AdamW** (Kingma & Ba 2015; Loshchilov & Hutter 2019) keeps two running means for every weight, of its gradient $g_t$ and of the gradient's square, corrects both for having started at zero, and moves the weight by the first mean over the root of the second. $\beta_1$ and $\beta_2$ say how slowly the means forget. The decay with strength $\lambda$ acts on the weight itself and not through the gradient; that is what the W stands for.
#
# $$m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2$$
# $$\theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}$$
#
# **The schedule** multiplies the learning rate: up in a straight line for the first steps, while $v$ still rests on few gradients, then down along half a cosine to a tenth of the peak. **Clipping** shortens the whole gradient when its norm exceeds 1, so that one odd batch counts less.
#
# All of this fits into one loop. It takes rows of token ids, and every row is input and target at once: position $t$ predicts the token at $t+1$.
#
# The three cells below hold the update; the schedule, the clipping and the loop; and a test of update, schedule and clipping against PyTorch. Every second of its random gradients is large, so that clipping has something to do.

# %%
class AdamW:
    """The update above; `weight_decay` only on matrices, not on weights of norms."""

    def __init__(self, parameters, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8):
        self.parameters, self.betas = list(parameters), betas
        self.weight_decay, self.eps = weight_decay, eps
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.step_count = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every parameter by its gradient, then forget the gradient."""
        self.step_count += 1
        beta1, beta2 = self.betas
        state = zip(self.parameters, self.means, self.squares, strict=True)
        for parameter, mean, square in state:
            mean.lerp_(parameter.grad, 1 - beta1)
            square.lerp_(parameter.grad**2, 1 - beta2)
            unbiased_mean = mean / (1 - beta1**self.step_count)
            root = (square / (1 - beta2**self.step_count)).sqrt()
            if parameter.dim() >= 2:
                parameter.mul_(1 - learning_rate * self.weight_decay)
            parameter.sub_(learning_rate * unbiased_mean / (root + self.eps))
            parameter.grad = None


# %%
def schedule(step: int, num_steps: int, warmup_steps: int, end: float = 0.1) -> float:
    """Share of the peak learning rate at this step, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def clip_gradient(parameters: list[nn.Parameter], max_norm: float = 1.0) -> Tensor:
    """Scale all gradients to a common norm of at most `max_norm`; return the old."""
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    for parameter in parameters:
        parameter.grad *= min(1.0, max_norm / (norm.item() + 1e-6))
    return norm


def training_loop(model, rows, num_steps, peak_rate, warmup_steps) -> list[float]:
    """Train on rows[step] (batch, seq + 1), and return the loss of every step."""
    optimizer, losses = AdamW(model.parameters()), []
    for step in tqdm(range(num_steps), desc="our loop"):
        inputs, targets = rows[step][:, :-1], rows[step][:, 1:]
        logits = model(inputs)  # (batch, seq, vocab)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        clip_gradient(optimizer.parameters)
        optimizer.step(peak_rate * schedule(step, num_steps, warmup_steps))
        losses.append(loss.item())
    return losses


# %%
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

generator = torch.Generator().manual_seed(seed)
start = [torch.randn(shape, generator=generator) for shape in ((64, 64), (32, 16))]
ours_theirs = [[nn.Parameter(tensor.clone()) for _ in range(2)] for tensor in start]
our_weights, their_weights = zip(*ours_theirs, strict=True)
our_adamw = AdamW(our_weights)
theirs = torch.optim.AdamW(their_weights, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
warmup = LinearLR(theirs, start_factor=0.1, total_iters=9)
cosine = CosineAnnealingLR(theirs, T_max=40, eta_min=0.001)
# PyTorch's schedule: the first until step 10, then the second
their_schedule = SequentialLR(theirs, [warmup, cosine], milestones=[10])
clipped, rates = [], []  # differences to PyTorch
for step in range(50):
    rate = 0.01 * schedule(step, 50, 10)
    rates.append(abs(rate - their_schedule.get_last_lr()[0]))
    size = 0.001 + 0.1 * (step % 2)
    for our, their in ours_theirs:
        gradient = size * torch.randn(our.shape, generator=generator)
        our.grad, their.grad = gradient.clone(), gradient.clone()
    clip_gradient(our_weights)
    nn.utils.clip_grad_norm_(their_weights, 1.0)
    clipped += [(o.grad - t.grad).abs().max().item() for o, t in ours_theirs]
    our_adamw.step(rate)
    theirs.step()
    their_schedule.step()
update = max((our - their).abs().max().item() for our, their in ours_theirs)
print(f"largest difference to PyTorch after 50 steps: weights {update:.1e}, ", end="")
print(f"clipped gradient {max(clipped):.1e}, learning rate {max(rates):.1e}")
lesson.equal("AdamW is PyTorch's", update, within=1e-5)
lesson.equal("clipping is PyTorch's", max(clipped), within=1e-6)
lesson.equal("the schedule is PyTorch's", max(rates), within=1e-8)

# %% [markdown]
# **The course's loop.** From here on use `helpers.training.train`: the same steps as above, plus mixed precision, checkpoints, evaluation and a progress bar. It needs a model, batches and a function that returns the loss. First see that it is the same: same model, same batches, same losses.

# %%
from transformers import LlamaConfig

MASK, NUM_SPECIAL = SPECIAL_TOKENS.index("<|mask|>"), len(SPECIAL_TOKENS)
TOKENS = 512  # the first 512 tokens of section 1's vocabulary
encode_small = make_encoder(dict(islice(merges.items(), TOKENS - sizes[0])))
SMALL = LlamaConfig(
    vocab_size=TOKENS, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
    num_attention_heads=4, tie_word_embeddings=True, initializer_range=0.05,
)  # fmt: skip


def rows_of(texts: list[str], length: int) -> Tensor:
    """Join the texts, each with an end-of-text token, and cut rows (rows, length)."""
    ids = [token_id for text in texts for token_id in [*encode_small(text), 0]]
    ids = ids[: len(ids) // length * length]
    return torch.tensor(ids, device=machine.device).view(-1, length)


def new_transformer(config=SMALL, model_seed: int = seed) -> Transformer:
    """Our model with fresh weights that depend only on the seed."""
    torch.manual_seed(model_seed)
    return Transformer(config).to(machine.device)


rows = rows_of(documents, 129)
count = sum(parameter.numel() for parameter in new_transformer().parameters())
print(f"{len(rows):,} rows of {rows.shape[1]} tokens; a model of {count:,} parameters")


# %%
def causal_loss(model, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of each next token in rows (batch, seq + 1)."""
    inputs, targets = batch["input_ids"][:, :-1], batch["input_ids"][:, 1:]
    logits = model(inputs)  # (batch, seq, vocab)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def batches_of(rows: Tensor, num_batches: int, batch_size: int) -> list[dict]:
    """Batches of rows, drawn at random from the seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(rows), (num_batches, batch_size), generator=generator)
    return [{"input_ids": rows[chosen]} for chosen in drawn]


batches = batches_of(rows, 12, batch_size=16)
only_rows = [batch["input_ids"] for batch in batches]
our_losses = training_loop(new_transformer(), only_rows, 12, 3e-3, warmup_steps=5)
recipe = TrainConfig(max_steps=12, learning_rate=3e-3, warmup_steps=5)
losses = train(new_transformer(), batches, recipe, loss_fn=causal_loss).losses
for step in (0, 4, 8, 11):
    print(f"step {step:>2}: our loop {our_losses[step]:.6f}, ", end="")
    print(f"helpers.training.train {losses[step]:.6f}")
difference = max(abs(a - b) for a, b in zip(our_losses, losses, strict=True))
print(f"largest difference of a loss: {difference:.1e}")
lesson.equal(
    "our loop gives the losses of helpers.training.train", difference, within=1e-3
)  # fmt: skip

# %% [markdown] tags=["core"]
# ## 4 · A model of your own
#
# **Question.** What has a small model learned after 200 steps, and which text does it learn first?
#
# Train the small model of section 3 on a part of Shima, with five kinds of document. Before and after, let it write. On the way, measure its loss on new documents of each kind. They are about the same people as the training text, and sentences may stand in both. This is one run; other seeds are in the course's table of claims. Three tables of counts are the simplest comparisons: a *unigram*, which knows how often each token occurs, a *bigram*, which knows how often each token follows each other one, and a *trigram*, which knows how often each token follows each pair. Where a run of tokens is rare, a table leans on the next shorter one. The tables count all rows of the text; the model draws 3,200 rows of it.

# %%
KINDS = ("description", "story", "sums", "mapping", "repeat")
own_text = list(islice(world.documents(seed, dict.fromkeys(KINDS, 1.0)), 5000))
own_rows = rows_of(own_text, 97)
unseen_kind = {}
for kind in KINDS:
    texts = list(islice(world.documents(seed + 1, {kind: 1.0}), 60))
    unseen_kind[kind] = {"input_ids": rows_of(texts, 97)[:24]}
runs, contexts = Counter(), Counter()  # of up to three tokens, of those before the last
for row in own_rows.tolist():
    for length in (1, 2, 3):
        found = list(zip(*(row[start:] for start in range(length)), strict=False))
        runs.update(found)
        contexts.update(run[:-1] for run in found)


def table_probability(run: tuple[int, ...]) -> float:
    """Of a run's last token after the others; a rare run leans on the shorter one."""
    if not run:
        return 1 / TOKENS
    return (runs[run] + table_probability(run[1:])) / (contexts[run[:-1]] + 1)


def table_loss(rows: Tensor, length: int) -> float:
    """Mean loss of each next token from runs of so many tokens, in nats."""
    ends = [row[:end] for row in rows.tolist() for end in range(2, len(row) + 1)]
    losses = [-math.log(table_probability(tuple(ids[-length:]))) for ids in ends]
    return sum(losses) / len(losses)


unigram, bigram, trigram = {}, {}, {}
for kind, new in unseen_kind.items():
    for length, table in enumerate((unigram, bigram, trigram), start=1):
        table[kind] = table_loss(new["input_ids"], length)
print(f"{len(own_rows):,} rows of {own_rows.shape[1]} tokens")


@torch.no_grad()
def losses_by_kind(model) -> dict[str, float]:
    """Loss on unseen documents of each kind, in nats per token."""
    return {kind: causal_loss(model, new).item() for kind, new in unseen_kind.items()}


# %%
@torch.no_grad()
def write(model, start: str, num_tokens: int = 40) -> str:
    """Continue a text by drawing each token from the model's probabilities."""
    torch.manual_seed(seed)
    ids = encode_small(start)
    for _ in range(num_tokens):
        logits = model(torch.tensor([ids[-96:]], device=machine.device))[0, -1]
        ids = [*ids, torch.multinomial(logits.softmax(-1), 1).item()]
    return library.decode(ids)


own, steps = new_transformer(), lesson.scaled(200)
starts = ["One day of rain Zetode the smith left", "Sum: 12 + 7"]
starts += ["Pairs: drum white; goat red; drum"]
written = {start: [write(own, start)] for start in starts}
every = max(1, steps // 10)
recipe = TrainConfig(steps, 6e-3, warmup_steps=20, log_every=50, evaluate_every=every)
own_batches = batches_of(own_rows, steps, 16)
run = train(own, own_batches, recipe, loss_fn=causal_loss, evaluate=losses_by_kind)
for start in starts:
    written[start].append(write(own, start))
    for when, text in zip(("before", "after"), written[start], strict=True):
        print(f"{when:>6}: {text!r}")

# %% tags=["headline"]
by_step = run.evaluations
steps_then = [e["step"] for e in by_step]
figure = plots.curve(
    {kind: (steps_then, [e[kind] for e in by_step]) for kind in KINDS},
    title="Sums start lowest, stories end lowest",
    xlabel="steps",
    ylabel="loss on new documents (nats per token)",
    log_y=True,
)
axes = figure.axes[0]
for line, kind in zip(axes.get_lines(), KINDS, strict=True):
    axes.plot(0, bigram[kind], "x", color=line.get_color())
axes.set_xlabel("steps (crosses at 0: loss of the bigram)")
axes.set_yticks([1, 1.5, 2, 3, 4, 5])
first, half, end = by_step[0], by_step[len(by_step) // 2 - 1], by_step[-1]
alt = "Loss over steps for five kinds of document, on a logarithmic axis; all fall. "
alt += f"Sums start lowest, at {first['sums']:.2f} nats, stories end lowest, at "
alt += f"{end['story']:.2f}; repeats end at {end['repeat']:.2f}."
plots.show(figure, alt)
late = {kind: 1 - end[kind] / half[kind] for kind in KINDS}
columns = ["unigram", "bigram", "trigram"]
columns += [f"step {entry['step']}" for entry in (first, half, end)]
print(f"{'':>12} " + " ".join(f"{name:>8}" for name in columns), end="")
print(f"  unigram to step {first['step']}  step {half['step']} to end")
for kind in KINDS:
    points = [row[kind] for row in (unigram, bigram, trigram, first, half, end)]
    row = " ".join(f"{value:8.2f}" for value in points)
    early, then = unigram[kind] - first[kind], half[kind] - end[kind]
    print(f"{kind:>12} {row} {early:18.2f} {then:13.2f}, {late[kind]:.0%}")

# %%
lesson.claim(
    "on every kind the loss ends at least 20 % below the bigram's",
    min(1 - end[kind] / bigram[kind] for kind in KINDS),
    at_least=0.2,
    form=".0%",
)
by_kind = (f"{kind} {end[kind] - trigram[kind]:+.2f}" for kind in KINDS)
lesson.report("loss at the end minus the trigram's, nats", ", ".join(by_kind))
lesson.claim(
    "in the second half the loss on stories falls at least 10 points more than on sums",
    100 * (late["story"] - late["sums"]),
    at_least=10,
    form=".0f",
)
# digits of unseen sums: the terms are drawn at random, the others follow from them
parts = {"Sum:": [], "Steps:": [], "Answer:": []}
sums = unseen_kind["sums"]["input_ids"]
with torch.no_grad():
    logits = own(sums[:, :-1]).float().transpose(1, 2)  # (batch, vocab, seq)
losses = F.cross_entropy(logits, sums[:, 1:], reduction="none")
for row, row_losses in zip(sums[:, 1:].tolist(), losses.tolist(), strict=True):
    text = ""
    for token_id, loss in zip(row, row_losses, strict=True):
        piece, part = library.decode([token_id]), max(parts, key=text.rfind)
        if piece.isdigit() and "Sum:" in text:
            parts[part].append(loss)
        text += piece
for part, found in parts.items():
    print(f"{len(found)} digits after {part:>7} {sum(found) / len(found):.2f} nats")
print(f"guessing among ten digits costs {math.log(10):.2f} nats")
terms, answers = (sum(parts[p]) / len(parts[p]) for p in ("Sum:", "Answer:"))
lesson.report(
    "loss on unseen digits of terms and of answers, nats",
    f"{terms:.2f}, {answers:.2f}",
)

# %% [markdown]
# **What you see.** Before training the text is noise. Afterwards, in this run, there are words, lines of sums, and pairs that end in a colour: a part of the form is learned. It does not hold: the story breaks off after one made-up word and becomes a sum, and the steps of that sum begin with 96 + 11 and not with its own terms 43 + 46. Stories have the lowest loss nevertheless: a low mean loss on given text does not yet mean that the model goes on well with its own. The content is not learned: $12 + 72 + 93 + 35$ is 212 and not 165, and `drum` was white before and becomes green. (Each is a single sample.)
#
# **Which text first?** At step 20 sums have gained 1.70 nats on the unigram, mappings 0.76, stories 0.51, descriptions 0.44 and repeats 0.28: sums come first. After that it turns: from step 20 to 100 stories gain 3.15 nats and sums 1.07, from 100 to 200 0.62 and 0.17; in both, sums gain the least of the five. One average loss would hide this.
#
# **Against tables of counts.** On every kind the model ends at least 32 % below the bigram. The trigram is the harder comparison, but for repeats, where it is worse than the bigram (4.13 against 3.78). On sums the model ends 0.31 nats below the trigram, on repeats 1.55 (1.21 below the bigram), on stories 0.14, on mappings 0.08, and on descriptions it is level (1.43 and 1.42). On four other seeds it is 0.02 to 0.21 nats behind on descriptions, and once 0.05 behind on mappings. Longer tables were not tried.
#
# **How far can a loss fall?** The terms of a sum are drawn at random, so no model can bring their loss to zero. Here they cost 2.31 nats, a guess among ten digits costs 2.30. Steps and answers follow from the terms, so the 2.16 and 1.99 nats that are left there are something that this model has not learned. Falls in per cent of different kinds are therefore no fair race. Ask for the loss of the text that you care about.

# %% [markdown] tags=["further"]
# ## 5 · Mixed precision
#
# *Further: no core section needs this one.*
#
# Matrix products in 16 bits take half the memory traffic, and many processors have faster units for them. But a 16-bit number is either short of digits or short of range:
#
# - In **bfloat16** $1 + 0.001 = 1$: a small update to a weight vanishes. So the weights and AdamW's means stay in float32, and only the products inside the model are computed in 16 bits (`torch.autocast`). That is what *mixed* means (Micikevicius et al. 2018).
# - In **float16** a gradient of $10^{-8}$ is zero. So the loss is multiplied by a large number $s$ before the backward pass, which multiplies every gradient by $s$, and the gradients are divided by $s$ in float32 before the update. bfloat16 has float32's range and needs none of this, but a T4 has no units for it.
#
# The first lines below show the three formats, the last ones a gradient that vanishes and comes back.

# %%
print("             step at 1  smallest > 0    largest   1 + 0.001   1e-08")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    info = torch.finfo(dtype)
    added = (torch.tensor(1.0, dtype=dtype) + 0.001).item()
    small = torch.tensor(1e-8, dtype=dtype).item()
    smallest = info.smallest_normal * info.eps  # subnormal numbers included
    print(f"{str(dtype)[6:]:>9} {info.eps:12.1e} {smallest:13.1e}", end=" ")
    print(f"{info.max:10.1e} {added:11.6f} {small:7.0e}")
inputs = torch.full((4, 8), 1e-4)
for scale in (1.0, 2.0**16):
    layer = nn.Linear(8, 8, bias=False).half()
    loss = (layer(inputs.half()).float() * 1e-5).mean()  # a loss with small gradients
    (loss * scale).backward()
    gradient = layer.weight.grad.float() / scale  # unscaled in float32
    zero = (gradient == 0).float().mean()
    print(f"loss scale {scale:>7.0f}: {zero:>4.0%} of the gradient is zero, ", end="")
    print(f"its mean {gradient.mean():.2e}")
    assert scale > 1 or zero == 1
# by hand: input x factor, four rows, mean over 4 x 8 outputs
expected = 1e-4 * 1e-5 * 4 / (4 * 8)
print(f"by hand: {expected:.2e}")
assert abs(gradient.mean().item() - expected) < 0.01 * expected


# %% [markdown]
# A `GradScaler` chooses $s$ by itself: it doubles $s$ now and then, and when a gradient became infinite it halves $s$ and skips the step. Whether 16 bits are faster depends on the processor and on the size of the model, so time both.

# %%
def seconds_per_step(precision: str) -> float:
    """Median time of a step, without the first two."""
    config = TrainConfig(max_steps=8, precision=precision, log_every=1, progress=False)
    history = train(new_transformer(), batches, config, loss_fn=causal_loss)
    return statistics.median(history.seconds[2:])


sixteen_bit = "fp16-mixed" if machine.dtype == "float16" else "bf16-mixed"
times = {name: seconds_per_step(name) for name in ("fp32", sixteen_bit)}
num_tokens = batches[0]["input_ids"].numel()
for name, seconds in times.items():
    print(f"{name:>10}: {1000 * seconds:6.1f} ms a step, ", end="")
    print(f"{num_tokens / seconds:8,.0f} tokens/s")
speed_up = times["fp32"] / times[sixteen_bit]
lesson.report("speed-up by 16 bits here, small model", f"{speed_up:.1f} x")

# %% [markdown]
# **What you see.** The two lines hold for this machine, this model and batches of this size: each is the median of six steps. The table at the end keeps their ratio; on five seeds it lay between 1.4 and 1.8. They say nothing about the loss after a training in 16 bits, nor about a model of billions of weights.

# %% [markdown] tags=["further"]
# ## 6 · Which part of the text is hidden?
#
# *Further: no core section needs this one.*
#
# **Question.** The text is the only teacher. Which part of it do you hide, and what may the model see when it fills it in?
#
# | objective | hidden | seen | loss on | known from |
# |---|---|---|---|---|
# | **causal** | the next token | all before it | every token | GPT (Radford et al. 2018) |
# | **masked** | a part of the tokens | the rest, on both sides | hidden tokens, each alone | BERT (Devlin et al. 2019) |
# | **sequence-to-sequence** | the second half | all of the first half, and what is written so far | tokens of the second half | Sutskever et al. 2014, for translation |
#
# With $H$ for the hidden positions, $\bar H$ for the others and $c = T/2$ for the cut in the middle, the three losses are
#
# $$-\sum_{t} \log p(x_{t+1} \mid x_{\le t}), \qquad -\sum_{t \in H} \log p(x_t \mid x_{\bar H}), \qquad -\sum_{t > c} \log p(x_t \mid x_{\le c},\, x_{c < s < t})$$
#
# The third needs two stacks of layers (Vaswani et al. 2017; T5, Raffel et al. 2020). An *encoder* reads the first half, every token sees all others. A *decoder* writes the second half from left to right. In each of its layers a **cross-attention** takes the queries from the decoder and the keys and values from the encoder's result. `Attention` can do that already: give it a `memory`.
#
# The masked model learns from fewer tokens of each row than the causal one. To see what that alone does, there is a control: a causal model whose loss counts only as many tokens, one in each stretch of six.

# %%
class EncoderDecoder(nn.Module):
    """One layer reads, one writes. Halves (batch, seq), logits (batch, seq, vocab)."""

    def __init__(self, config):
        super().__init__()
        self.body = Transformer(config)  # embeddings, two layers and the last norm
        self.cross_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross = Attention(config)
        for matrix in self.cross.parameters():
            nn.init.normal_(matrix, std=config.initializer_range)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        (encoder, decoder), embed = self.body.layers, self.body.embed_tokens
        places, head_dim = torch.arange(first.shape[1], device=first.device), 32
        cos, sin = rotary_angles(places, head_dim, 10_000.0)  # for both halves
        past = places[:, None] >= places
        everything = torch.ones_like(past)
        memory = encoder(embed(first), cos, sin, everything)  # (batch, seq, hidden)
        x = embed(second)
        x = x + decoder.self_attn(decoder.input_layernorm(x), cos, sin, past)
        x = x + self.cross(self.cross_norm(x), cos, sin, everything, memory)
        x = x + decoder.mlp(decoder.post_attention_layernorm(x))
        return self.body.norm(x) @ embed.weight.T


# %%
our_cross = Attention(SMALL)
their_cross = nn.MultiheadAttention(128, 4, bias=False, batch_first=True)
with torch.no_grad():
    projections = [our_cross.q_proj, our_cross.k_proj, our_cross.v_proj]
    their_cross.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
    their_cross.out_proj.weight.copy_(our_cross.o_proj.weight)
    x, memory = torch.randn(2, 5, 128), torch.randn(2, 9, 128)
    mixed = our_cross(x, None, None, torch.ones(5, 9).bool(), memory)
    expected = their_cross(x, memory, memory)[0]
difference = (mixed - expected).abs().max().item()
lesson.equal("cross-attention is nn.MultiheadAttention's", difference, within=1e-5)


# %%
def causal(model, rows: Tensor, hidden: list[int]) -> Tensor:
    """Loss (batch, seq) of every token from those before it; 0 for the first."""
    logits = model(rows[:, :-1]).float().transpose(1, 2)  # (batch, vocab, seq - 1)
    return F.pad(F.cross_entropy(logits, rows[:, 1:], reduction="none"), (1, 0))


def causal_few_targets(model, rows: Tensor, hidden: list[int]) -> Tensor:
    """The same, but only the hidden tokens count."""
    counted = torch.zeros_like(rows)
    counted[:, hidden] = 1
    return causal(model, rows, hidden) * counted


def masked(model, rows: Tensor, hidden: list[int]) -> Tensor:
    """The hidden tokens become mask tokens; each position sees all others."""
    inputs, targets = rows.clone(), torch.full_like(rows, -100)
    inputs[:, hidden], targets[:, hidden] = MASK, rows[:, hidden]
    everything = torch.ones(rows.shape[1], rows.shape[1], device=rows.device).bool()
    logits = model(inputs, everything).float().transpose(1, 2)
    return F.cross_entropy(logits, targets, reduction="none")


def sequence_to_sequence(model, rows: Tensor, hidden: list[int]) -> Tensor:
    """The first half is read, the second half is written."""
    half = rows.shape[1] // 2
    logits = model(rows[:, :half], rows[:, half - 1 : -1]).float().transpose(1, 2)
    return F.pad(F.cross_entropy(logits, rows[:, half:], reduction="none"), (half, 0))


# %%
SHORT, STRETCH = 48, 6  # tokens a row in this section; of each stretch, one is hidden
OBJECTIVES = {
    "causal": causal, "masked": masked, "sequence-to-sequence": sequence_to_sequence,
    "causal, few targets": causal_few_targets,
}  # fmt: skip
only = {"description": 1.0}
descriptions = rows_of(list(islice(world.documents(seed, only), 2500)), SHORT)
unseen = rows_of(list(islice(world.documents(seed + 1, only), 200)), SHORT)[:80]


def random_positions(generator: random.Random) -> list[int]:
    """One position in each stretch, never the first of the row."""
    starts = range(0, SHORT, STRETCH)
    return [start + generator.randrange(start == 0, STRETCH) for start in starts]


HIDDEN_IN_TEST = random_positions(random.Random(f"{seed}/0"))  # the same for all
LATE = [place for place in HIDDEN_IN_TEST if place >= SHORT // 2]  # these are compared

# %%
def train_with(name: str, num_steps: int) -> list[dict[str, float]]:
    """Train the small model; its loss on hidden tokens of unseen text, eight times."""
    generator, objective = random.Random(seed), OBJECTIVES[name]

    def loss_fn(model, batch: dict[str, Tensor]) -> Tensor:
        loss = objective(model, batch["input_ids"], random_positions(generator))
        return loss.sum() / (loss != 0).sum()

    def evaluate(model) -> dict[str, float]:
        return {"loss": objective(model, unseen, HIDDEN_IN_TEST)[:, LATE].mean().item()}

    torch.manual_seed(seed)
    build = EncoderDecoder if name == "sequence-to-sequence" else Transformer
    model, every = build(SMALL).to(machine.device), max(1, num_steps // 8)
    recipe = TrainConfig(
        num_steps, 6e-3, warmup_steps=20, log_every=50, evaluate_every=every
    )  # fmt: skip
    batches = batches_of(descriptions, num_steps, batch_size=16)
    return train(model, batches, recipe, loss_fn=loss_fn, evaluate=evaluate).evaluations


on_the_way = {name: train_with(name, lesson.scaled(96)) for name in OBJECTIVES}

# %%
steps_then = [entry["step"] for entry in on_the_way["causal"]]
losses = {name: [e["loss"] for e in entries] for name, entries in on_the_way.items()}
for name, row in losses.items():
    print(f"{name:>21}: " + " ".join(f"{loss:.2f}" for loss in row))
    lesson.report(f"loss on hidden tokens, {name}, one run", f"{row[-1]:.2f} nats")
counts = torch.bincount(descriptions.flatten(), minlength=TOKENS).float() + 1
unigram_loss = -(counts / counts.sum()).log()[unseen[:, LATE]].mean().item()
print(f"{'unigram':>21}: {unigram_loss:.2f}, on {unseen[:, LATE].numel()} tokens")
alt = "Loss on hidden tokens of unseen text over steps for four objectives: causal "
alt += f"ends at {losses['causal'][-1]:.2f} nats, masked at "
alt += f"{losses['masked'][-1]:.2f}; the unigram is at {unigram_loss:.2f}."
figure = plots.curve(
    {name: (steps_then, row) for name, row in losses.items()},
    title="In these few steps the masked model learns least",
    xlabel="steps",
    ylabel="loss on the same hidden tokens (nats)",
    references={"unigram": unigram_loss},
)
figure.axes[0].get_lines()[-2].set_linestyle("--")  # few targets, over masked at first
plots.show(figure, alt)

# %%
early = {name: row[len(row) // 4] for name, row in losses.items()}
print("early on:", ", ".join(f"{name} {loss:.2f}" for name, loss in early.items()))
lesson.report(
    "early on, nats by which the masked model is behind the causal one",
    early["masked"] - early["causal"],
)
few, all_targets = losses["causal, few targets"], losses["causal"]
shares = []  # at the third evaluation and the last
for i in (2, -1):
    distance = losses["masked"][i] - all_targets[i]
    shares.append((few[i] - all_targets[i]) / distance)
    print(f"step {steps_then[i]}: few targets alone have {shares[-1]:.0%} ", end="")
    print(f"of the masked model's distance of {distance:.2f} nats")
lesson.report(
    "few targets alone: share of the masked model's distance, step 36 and end, one run",
    f"{shares[0]:.0%}, {shares[1]:.0%}",
)

# %% [markdown]
# **What you see.** In these few steps the masked model learns little more than the unigram, which knows only how often each token occurs: 4.80 against 4.92 nats at the end. So the comparison says how fast the objectives start, and not which is better.
#
# The control, a causal model with as few targets, is behind the full one too: 2.84 against 1.41 nats at the end. That is 42 % of the masked model's distance at the end, and 77 % at step 36. (At step 12 no model is below the unigram, so a share would mean nothing there.) It shows what few targets do to a causal model; whether they do as much to a masked one is not tested.
#
# More than that differs. The masked model sees both sides, but it is not told the order by a causal mask and may have to learn it from RoPE. The sequence-to-sequence model has one layer to read and one to write, where a token of the causal model passes through two; its cross-attention gets no positions; it learns from half of the tokens, and has four matrices and a norm more. All are single runs of a small model, tested on 320 tokens of descriptions: they say nothing about the end of a long training. What decides in practice is also what a model is for: a masked model does not write from left to right, and models that only read, for search or classification, are often trained this way.

# %% [markdown] tags=["core"]
# ## 7 · When abilities appear
#
# **Question.** A loss falls. Do the abilities of a model grow in the same way?
#
# While shima-4m was trained, its build stopped every 250 steps and asked the model 100 held-out questions for each ability (so a share near 50 % is known to about 10 points). The record comes with the model: one training run, the same on every seed, so its numbers are reports and not claims. *Reading* means that the answer stands in a passage about strangers. Only the wording of the questions about facts is new, the facts stand in the training text. *In-context learning* is here of the simplest kind: four words stand twice in the prompt, each with its colour, and the model repeats the colour of one. The pairs are new, the format is not: such *mappings* are one of the kinds of document in the training text. A guess among the eight colours is right once in eight, among those that are shown at least once in four. The control asks for a colour with no pair shown.

# %%
record = json.loads((MODEL_FOLDERS["shima-4m"] / "training_curve.json").read_text())
millions = [tokens / 1e6 for tokens in record["tokens"]]
ABILITIES = {
    "frequent facts": "closed_book_frequent",
    "rare facts": "closed_book_rare",
    "reading": "open_book",
    "in-context learning": "few_shot_8",
    "sums with steps": "sums_with_steps",
}
evaluations = record["evaluations"]
seen = [entry["tokens"] / 1e6 for entry in evaluations]
shares = {label: [e[name] for e in evaluations] for label, name in ABILITIES.items()}
none_shown = [entry["few_shot_0"] for entry in evaluations]  # the control
figure = plots.curve(
    {label: (seen, values) for label, values in shares.items()},
    title="In-context learning jumps, facts take longer",
    xlabel="tokens seen (millions)",
    ylabel="right answers",
    percent=True,
    references={"one of the four labels": 0.25},
)
axes = figure.axes[0]
axes.plot(seen, none_shown, color=plots.GREY, linewidth=1.2)
beside = axes.get_yaxis_transform()  # x is a share of the axes
axes.text(1.02, 0.13, "no pairs shown", color=plots.GREY, va="center", transform=beside)
rise = {k: max(b - a for a, b in pairwise(values)) for k, values in shares.items()}
low, high = (round(100 * f(none_shown)) for f in (min, max))
alt = "Share of right answers over millions of tokens: between two evaluations "
alt += f"in-context learning rises by {100 * rise['in-context learning']:.0f} points; "
alt += f"without pairs shown it stays between {low} and {high} %."
plots.show(figure, alt)

# %%
print("million tokens when first 20 % and when first 80 % are right (inf: never):")
for label, values in shares.items():
    print(f"{label:>20}", end="")
    for level in (0.2, 0.8):
        reached = (at for at, share in zip(seen, values, strict=True) if share >= level)
        print(f" {next(reached, math.inf):6.1f}", end="")
    print(f"  largest rise between two evaluations {100 * rise[label]:3.0f} points")
print(f"in-context without a pair shown: {low} to {high} % in all evaluations")
direct = max(entry["sums_direct"] for entry in evaluations)
print(f"sums without steps: at most {direct:.0%}")
labels = shima_tokenizer([f" {label}" for label in LABELS])["input_ids"]
mappings = sum(text.startswith("Pairs:") for text in documents) / len(documents)
print(f"tokens of the {len(labels)} labels: {list(map(len, labels))}", end="; ")
print(f"mappings are {mappings:.0%} of our documents")

# %% [markdown]
# **What you see.** In-context learning goes from below 20 % to above 80 % between two evaluations; without a pair shown, the same question stays between 5 and 18 %. For the same way reading takes 2 million tokens, sums with steps 5, frequent facts 10, though these are the first at 20 %. Rare facts are not at 80 % after 41 million. Sums without written steps never pass 15 %.
#
# The next cell looks at the loss where in-context learning jumps. It takes the interval with the largest rise, the three before it and the two after it: the borders are the evaluations, so they were not chosen to fit. In each interval a straight line is fitted to the training loss, one value for each 0.1 million tokens.

# %%
in_context = shares["in-context learning"]
rises = [after - before for before, after in pairwise(in_context)]
place = rises.index(max(rises))  # the jump: from evaluation `place` to the next one
x, y = np.array(millions), np.array(record["loss"])
near = (x > seen[place - 3]) & (x <= seen[place + 3])
figure = plots.curve(
    {"": (x[near], y[near])},
    title="Where in-context learning jumps, the loss bends at most a little",
    xlabel="tokens seen (millions)",
    ylabel="training loss (nats)",
)
axes, falls = figure.axes[0], []
axes.axvspan(*seen[place : place + 2], color=plots.GREY, alpha=0.2, label="the jump")
print("fall of the loss, nats per million tokens (standard error), and right answers")
for i in range(place - 3, place + 3):
    inside = (x > seen[i]) & (x <= seen[i + 1])
    line, spread = np.polyfit(x[inside], y[inside], 1, cov=True)
    fitted = np.polyval(line, x[inside])
    name = "a straight line for each interval" if not falls else None
    axes.plot(x[inside], fitted, color=plots.INK, linewidth=1.2, label=name)
    falls.append((-line[0], spread[0, 0] ** 0.5))  # with its standard error
    print("{:.1f} to {:.1f} M tokens: ".format(*seen[i : i + 2]), end="")
    print("{:.3f} ({:.3f}), ".format(*falls[-1]), end="")
    print("in-context {:.0%} to {:.0%}, ".format(*in_context[i : i + 2]), end="")
    print("reading {:.0%} to {:.0%}".format(*shares["reading"][i : i + 2]))
(before, e1), (across, e2), (after, e3) = falls[2:5]
for name, more, error in (
    ("before", across - before, math.hypot(e1, e2)),
    ("after", across - after, math.hypot(e2, e3)),
):
    print(f"across the jump minus {name}: {more:.3f}, {more / error:.1f} errors")
figure.legend(loc="outside lower center", ncols=2)
alt = "Training loss near the jump, with a line for each interval: it falls by "
alt += f"{across:.3f} nats per million tokens in the grey interval of the jump, by "
alt += f"{before:.3f} in the one before and by {after:.3f} in the one after."
plots.show(figure, alt)
lesson.report(
    "shima-4m, fall of the loss before, across and after the jump, nats per M tokens",
    f"{before:.3f}, {across:.3f}, {after:.3f}",
)

# %% [markdown]
# **What you see.** In the grey interval in-context learning goes from 11 % to 97 %. There the loss falls by 0.103 nats per million tokens, by 0.071 in the interval before and by 0.028 in the one after. Of the six intervals it is the only one in which the loss falls faster than in the one before it. The difference to before (0.032) is 1.5 standard errors, the one to after (0.075) is 4.9. So the ability shows a jump of 86 points, the loss at most a small bend: 1.5 errors do not show that it falls faster than before, and as clear a slowing as the one after stands at 3.1 M tokens, from 0.193 to 0.071, where neither ability rises much. (The errors take the points as independent, and all this is one run. Reading rises in the same interval, from 2 to 50 %, so a bend need not belong to in-context learning.)
#
# Mappings are only 14 % of the documents, which may be why the loss shows so little. Section 4 shows how to find out: measure the loss of that kind alone. The record does not have it.
#
# Where an answer has several tokens it counts only if all are right, which makes a rise look steeper (Schaeffer et al. 2023; lesson 04). The eight labels are one token each, so that reason falls away here. Another of the same paper remains: right or wrong is a threshold, and the probability of the right label may have risen more smoothly. It was not recorded. Lesson 13 looks for the attention heads that do it (Olsson et al. 2022).

# %% [markdown] tags=["core"]
# ## 8 · What pretraining saves
#
# **Question.** You need a classifier and have a handful of labelled examples. How many labels is pretraining worth?
#
# The format of the task must be one that pretraining did not already teach. A visitor's reviews would not do: shima-4m's text has reviews with their mood, in the very format of the prompt. Here a word is given, and the answer is *dish* or *instrument*. The cell below counts, in a sample from the generator of shima-4m's text, how many documents have this format. What the text does have are sentences in which people eat and play these things.
#
# Take a model without its last matrix, read the final vector of the last token, $u(x) \in \mathbb{R}^d$, and put two numbers on top:
#
# $$p(\text{sort} \mid x) = \text{softmax}\big(W u(x)\big), \qquad W \in \mathbb{R}^{2 \times d}$$
#
# *Fine-tuned*: all weights are trained on the labels (Howard & Ruder 2018; Radford et al. 2018), from the pretrained weights. *From scratch*: the same from fresh weights of the same shape. The words of the test are never among the labelled ones. Each has one learning rate that was set beforehand, a lower one for pretrained weights. Simple ways stand beside them:
#
# - *nearest centre*: a word is the mean of the pretrained input embeddings of its tokens, frozen. Each sort's centre is the mean over its labelled words, and a new word gets the sort of the nearer centre. Nothing is trained. With fresh embeddings (*fresh centre*) it is a control.
# - *linear probe*: a logistic regression on the same frozen embeddings.
# - *final vector, end*: the same regression on the frozen $u(x)$, the vector that fine-tuning reads too.
# - *final vector, word*: the same regression on the frozen final vector of the word's last token, before `Sort` is read.
# - *letters*: a logistic regression on groups of one to three letters. It knows nothing of pretraining.
# - *asked*, without a label: which of the two sorts is the model more likely to write after the prompt? *Corrected*: each probability is first divided by what the same prompt gives with no word in it (the mean over nothing, `N/A` and `[MASK]` in its place; Zhao et al. 2021).
# - *two sentences*, without a label: is the word more probable after "For dinner Kodera wants" or after "Kodera plays the"? Sentences of this kind stand in the text of pretraining; somebody who knows it chose them.
#
# Ways without a label are scored on all 48 words, the others on the 32 words that are never labelled.

# %%
SORTS = {"dish": world.values["dish"], "instrument": world.values["instrument"]}


def prompt_of(word: str) -> str:
    """The text that the classifier reads."""
    return f"Word: {word}\nSort:"


def draw_words(draw: int) -> tuple[list, list]:
    """16 words to label, the sorts in turn, and the others as the test, with 0 or 1."""
    generator = random.Random(f"sorts/{seed}/{draw}")
    sorts = [generator.sample(words, len(words)) for words in SORTS.values()]
    pairs = [[(word, label) for word in words] for label, words in enumerate(sorts)]
    in_turn = zip(pairs[0][:8], pairs[1][:8], strict=True)
    return [pair for two in in_turn for pair in two], pairs[0][8:] + pairs[1][8:]


told = sum("Sort:" in text or "Word:" in text for text in documents)
question = re.compile(r"Question:.*instrument.*\nAnswer: ")
asked_for = sum(bool(question.search(text)) for text in documents)
print(f"{told} of {len(documents):,} documents have the format of the prompt")
print(f"{asked_for:,} ask for somebody's instrument, so pretraining may know the sorts")

# %%
class Classifier(nn.Module):
    """Two numbers from the final vector of each text's last token."""

    def __init__(self, model):
        super().__init__()
        self.body = model.base_model
        self.head = nn.Linear(model.config.hidden_size, 2, device=model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def vectors(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"]
        found = self.body(input_ids=batch["input_ids"], attention_mask=mask)
        last = mask.sum(dim=1) - 1  # padding is on the right
        return found.last_hidden_state[torch.arange(len(last)), last]  # (batch, hidden)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.head(self.vectors(batch).to(self.head.weight.dtype))  # (batch, 2)


def sort_batch(tokenizer, pairs: list[tuple], prompt=prompt_of) -> dict[str, Tensor]:
    """Padded token ids of the prompts of (word, label) pairs, with the labels."""
    prompts = [prompt(word) for word, _ in pairs]
    batch = tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    batch["sorts"] = torch.tensor([label for _, label in pairs])
    return {name: tensor.to(machine.device) for name, tensor in batch.items()}


# %%
def sort_loss(classifier, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the sorts."""
    return F.cross_entropy(classifier(batch).float(), batch["sorts"])


def accuracies_with(num_labels: int, draw: int, pretrained: bool) -> list[float]:
    """Train on so many labelled words: accuracy on the test words, then on these."""
    model, tokenizer = load_model(machine, trained=pretrained, seed=seed)
    classifier = Classifier(model.float())
    labelled, test = draw_words(draw)
    low_rate, high_rate, steps = settings["transfer"]
    steps, generator = lesson.scaled(steps), random.Random(f"{seed}/{draw}")
    chosen = [generator.choices(labelled[:num_labels], k=8) for _ in range(steps)]
    recipe = TrainConfig(
        steps, low_rate if pretrained else high_rate, warmup_steps=5,
        precision=lesson.precision, progress=False, seed=seed,
    )  # fmt: skip
    batches = [sort_batch(tokenizer, pairs) for pairs in chosen]
    train(classifier, batches, recipe, loss_fn=sort_loss)
    shares = []
    with torch.no_grad():
        for pairs in (test, labelled[:num_labels]):
            batch = sort_batch(tokenizer, pairs)
            right = classifier.eval()(batch).argmax(-1) == batch["sorts"]
            shares.append(right.float().mean().item())
    return shares


# %%
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ALL_WORDS = [word for words in SORTS.values() for word in words]


@torch.no_grad()
def word_vectors(pretrained: bool) -> dict[str, dict]:
    """Frozen vectors (hidden,) of each word: mean input embedding, final vectors."""
    model, tokenizer = load_model(machine, trained=pretrained, seed=seed)
    table = model.get_input_embeddings().weight
    ids = [tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in ALL_WORDS]
    found = {"embedding": [table[i].float().mean(dim=0).cpu().numpy() for i in ids]}
    for place, prompt in (("word", "Word: {}".format), ("end", prompt_of)):
        batch = sort_batch(tokenizer, [(word, 0) for word in ALL_WORDS], prompt)
        found[place] = Classifier(model).vectors(batch).float().cpu().numpy()
    return {k: dict(zip(ALL_WORDS, v, strict=True)) for k, v in found.items()}


pretrained, fresh = word_vectors(True), word_vectors(False)
itself = {word: word for word in ALL_WORDS}
letters = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 3))
probe = make_pipeline(StandardScaler(), LogisticRegression())
SIMPLE = {  # what stands for each word, and the classifier that reads it
    "nearest centre": (pretrained["embedding"], NearestCentroid()),
    "linear probe": (pretrained["embedding"], probe),
    "final vector, word": (pretrained["word"], probe),
    "final vector, end": (pretrained["end"], probe),
    "letters": (itself, make_pipeline(letters, LogisticRegression())),
    "fresh centre": (fresh["embedding"], NearestCentroid()),
}

# %%
SENTENCES = ("For dinner Kodera wants", "Kodera plays the")  # a dish, an instrument
WITHOUT_WORD = ("", "N/A", "[MASK]")  # in place of the word, after Zhao et al. 2021


@torch.no_grad()
def guesses_without_labels() -> dict[str, list[int]]:
    """For each of the 48 words the more probable sort, asked in three ways."""
    model, tokenizer = load_model(machine)

    def log_probability(start: str, rest: str) -> float:
        before = tokenizer(start)["input_ids"]
        after = tokenizer(rest, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([before + after], device=machine.device)
        logits = model(input_ids=ids).logits[0, len(before) - 1 : -1].float()
        return logits.log_softmax(dim=-1)[range(len(after)), after].sum().item()

    def asked(word: str) -> Tensor:
        said = [log_probability(prompt_of(word), f" {sort}") for sort in SORTS]
        return torch.tensor(said).softmax(dim=0)  # (2,)

    bias = torch.stack([asked(text) for text in WITHOUT_WORD]).mean(dim=0)
    guesses = {"asked": [], "asked, corrected": [], "two sentences": []}
    for word in ALL_WORDS:
        fits = [log_probability(sentence, f" {word}") for sentence in SENTENCES]
        guesses["asked"].append(asked(word).argmax().item())
        guesses["asked, corrected"].append((asked(word) / bias).argmax().item())
        guesses["two sentences"].append(int(fits[1] > fits[0]))
    return guesses


truth = [label for label, words in enumerate(SORTS.values()) for _ in words]
unlabelled, no_label = guesses_without_labels(), {}
for name, found in unlabelled.items():
    no_label[name] = sum(map(int.__eq__, found, truth)) / len(truth)
    print(f"no label, {name}: {no_label[name]:.0%} right; ", end="")
    print(f"{found.count(0)} of {len(found)} words are called a dish")


# %%
NUM_LABELS, DRAWS = [4, 16], range(5)
FINE_TUNED = {"fine-tuned": True, "from scratch": False}
WAYS = ("nearest centre", "linear probe", "final vector, word", "final vector, end")
WAYS += ("fine-tuned", "letters", "from scratch", "fresh centre")
transfer = {name: {n: [] for n in NUM_LABELS} for name in WAYS}
fitted = {name: {n: [] for n in NUM_LABELS} for name in FINE_TUNED}  # on labelled words
with tqdm(total=2 * len(NUM_LABELS) * len(DRAWS), desc="fine-tunings") as bar:
    for num_labels, draw in itertools.product(NUM_LABELS, DRAWS):
        for name, trained in FINE_TUNED.items():
            share, on_labelled = accuracies_with(num_labels, draw, trained)
            transfer[name][num_labels].append(share)
            fitted[name][num_labels].append(on_labelled)
            bar.update()
        labelled, test = draw_words(draw)
        for name, (given, classifier) in SIMPLE.items():
            words, labels = zip(*labelled[:num_labels], strict=True)
            classifier.fit([given[word] for word in words], labels)
            words, labels = zip(*test, strict=True)
            share = classifier.score([given[word] for word in words], labels)
            transfer[name][num_labels].append(share)
print(f"labels, then mean and lowest to highest of {len(DRAWS)} draws:")
mean = {}
for name, row in transfer.items():
    mean[name] = {n: sum(found) / len(found) for n, found in row.items()}
    print(f"{name:>21}:", end="")
    for n in NUM_LABELS:
        drawn = f"({min(row[n]):.0%} to {max(row[n]):.0%})"
        print(f"  {n:>2} labels {mean[name][n]:>4.0%} {drawn:<14}", end="")
    print()
print(f"{len(test)} test words: one is {1 / len(test):.0%}, one answer for all is 50 %")
without = max(mean["from scratch"][4], mean["letters"][4])
lesson.claim(
    "with 4 labels nearest centre beats from scratch and letters by at least 10 points",
    100 * (mean["nearest centre"][4] - without),
    at_least=10,
    control=100 * (mean["fresh centre"][4] - without),
    form=".0f",
)

# %%
for name, row in mean.items():
    shown = ", ".join(f"{share:.0%}" for share in row.values())
    lesson.report(f"dish or instrument, {name}, with 4 and 16 labels", shown)
for name, row in fitted.items():
    shown = ", ".join(f"{sum(found) / len(found):.0%}" for found in row.values())
    print(f"{name}, on its own labelled words, with 4 and 16: {shown}")
    lesson.report(f"dish or instrument, {name}, its own 4 and 16 labelled words", shown)
for name, share in no_label.items():
    lesson.report(f"dish or instrument, no label, {name}", share, ".0%")
figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
for place, (name, row) in enumerate(transfer.items()):
    for n, shift, color in zip(NUM_LABELS, (-0.15, 0.15), plots.COLORS, strict=False):
        ends, label = (min(row[n]), max(row[n])), f"{n} labels" if place == 0 else None
        axes.plot(ends, [place + shift] * 2, color=color, linewidth=1.5)
        axes.plot(mean[name][n], place + shift, "o", color=color, label=label)
for place, share in enumerate(no_label.values(), start=len(transfer)):
    label = "no label" if place == len(transfer) else None
    axes.plot(share, place, "D", color=plots.INK, label=label)
names = [*transfer, *no_label]
axes.set_yticks(range(len(names)), names)
axes.invert_yaxis()
axes.xaxis.set_major_formatter(plots.PERCENT)
axes.set(xlim=(0.2, 1.03))
axes.set_xlabel("accuracy on words without a label; lines: lowest to highest draw")
compared = (mean[name][4] for name in ("nearest centre", "fine-tuned"))
frozen, tuned = (f"{100 * share:.0f} %" for share in compared)
title = f"Four labels: {frozen} on frozen embeddings, {tuned} after "
axes.set_title(f"{title}{settings['transfer'][2]} steps of fine-tuning")
figure.legend(loc="outside lower center", ncols=3)
alt = "Accuracy of each way with 4 and with 16 labels, mean and range of five draws: "
alt += f"with 4 labels nearest centre is at {frozen}, fine-tuned at {tuned}."
plots.show(figure, alt)

# %% [markdown]
# **What you see.** A line goes from the lowest to the highest of five draws of labels. One test word is 3 %, so 97 % is one error.
#
# *Without pretraining.* From scratch the model is at 50 and 49 % on new words, like one answer for all. On its own labelled words it is at 100 and 88 %: the few steps fit most of these, and nothing carries over. Letters are at 56 and 55 %, on other seeds with 16 labels at up to 66 %, and fresh embeddings at 47 and 48 %: the spelling says little about the sort, fresh vectors nothing.
#
# *Frozen weights.* On the input embeddings four labels are enough for 98 %, with nearest centre as with a linear probe. On the final vector the same probe is at 83 % at the word and at 69 % at the end of the prompt: in this run about 14 points go with the layer, about 14 more with the place that is read (on four other seeds 11 to 20 and 3 to 13). With sixteen labels it is at 100, 96 and 89 %. (At the end the model has to predict the next token of a format that it never read.)
#
# *Fine-tuned.* It reads the vector at the end too, and trains all weights besides. In this run that does not help: 66 % with four labels against 69 % for the frozen probe, and 77 against 89 % with sixteen. On its own labelled words it is at 100 and 94 %.
#
# *Without labels.* *Asked* in a format that it never read, the model calls all 48 words a dish. Corrected for the answer that the format gives without a word, it is right in 65 %, and still calls 35 of 48 a dish. Given two sentences of the kind that it did read, it tells all dishes from all instruments.
#
# So what did pretraining save here? Labels for something that the model had learned already. Always try the ways without training and without labels first. A high score there says that the task is not new to the model; a low one says nothing: *asked* is at 50 %, *two sentences* at 100 %. How many labels is pretraining worth? More than 12 (16 less 4): with 16 labels, letters and these few steps from scratch are at 55 and 49 %, the frozen embeddings with 4 at 98 %. All the words stood in the text of pretraining, with sentences that tell their use; this lesson does not measure words that it never read.

# %% [markdown]
# ## 9 · Exercises
#
# Six, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 3.1, easy: back from tokens to text.
def decode(ids: list[int], token_bytes: dict[int, bytes]) -> str:
    """The text of token ids, without special tokens (these are not in `token_bytes`).

    A character may be spread over several tokens. Bytes that form no character become
    "\N{REPLACEMENT CHARACTER}".
    """
    raise NotImplementedError


# %% tags=["check"]
def check_decode(decode):
    for text in ("Kodera lives in Bamu.\n", "Grüße aus 島 🙂"):
        found = decode(encode(text), token_bytes)
        expect_equal(f"decode(encode({text!r}), token_bytes)", found, text)
    found = decode([0, *encode("12 goats"), 1], token_bytes)
    expect_equal("decode of '12 goats' between two special tokens", found, "12 goats")
    found, expected = decode(encode("島")[:1], token_bytes), "\N{REPLACEMENT CHARACTER}"
    expect_equal("decode of the first byte of '島'", found, expected)


check("3.1", check_decode, decode)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A character may end in the next token, so do not decode before all bytes are joined.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Join the bytes first, and decode once: a single token may be a part of a character.
#
# ```python
# def decode(ids: list[int], token_bytes: dict[int, bytes]) -> str:
#     joined = b"".join(token_bytes.get(token_id, b"") for token_id in ids)
#     return joined.decode(errors="replace")
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 3.2, easy: count the parameters of other Llamas.
def num_parameters(config) -> int:
    """Number of weights of LlamaForCausalLM with this configuration.

    Two things differ from section 2. `config.num_key_value_heads` may be smaller than
    `num_attention_heads`: then several heads share keys and values, and their
    projections are narrower (grouped-query attention, Ainslie et al. 2023). Without
    `config.tie_word_embeddings` the output has a matrix of its own. Heads have the
    width hidden / heads, and no matrix has a bias.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_num_parameters(num_parameters):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 176}
    base |= {"num_hidden_layers": 3, "num_attention_heads": 8}
    for changes in (
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
    ):
        config = LlamaConfig(**base, **changes)
        with torch.device("meta"):  # shapes only, no memory
            expected = LlamaForCausalLM(config).num_parameters()
        found = num_parameters(config)
        expect_equal(f"num_parameters of a model with {changes}", found, expected)


check("3.2", check_num_parameters, num_parameters)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write the shapes of the seven matrices of a block first; only two of them get narrower when heads share keys and values.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Queries and output keep the width $d$; keys and values have the width of their heads only.
#
# ```python
# def num_parameters(config) -> int:
#     d, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
#     shared = d * config.num_key_value_heads // config.num_attention_heads
#     attention = 2 * d * d + 2 * d * shared
#     embeddings = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
#     return embeddings + layers * (attention + 3 * d * inner + 2 * d) + d
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 3.3, medium: warm-up, stable, decay.
def wsd(step: int, num_steps: int, warmup_steps: int, decay=0.2, end=0.1) -> float:
    """Share of the peak learning rate at this step, counted from 0 (Hu et al. 2024).

    After the same warm-up as in `schedule` it stays at 1. In the last share `decay` of
    the steps after the warm-up it falls in a straight line towards `end`, which it
    would reach at step `num_steps`. A run can be prolonged from any point of the flat
    part, which a cosine does not allow.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_wsd(wsd):
    from helpers.training import TrainConfig, learning_rate_factor

    for shape in ((100, 10, 0.2, 0.1), (50, 0, 0.5, 0.0), (80, 20, 0.25, 0.02)):
        num_steps, warmup_steps, decay, end = shape
        config = TrainConfig(
            num_steps, warmup_steps=warmup_steps, schedule="wsd",
            decay_fraction=decay, min_learning_rate_ratio=end,
        )  # fmt: skip
        for step in range(num_steps):
            expected = learning_rate_factor(step, config)
            expect_close(f"wsd{(step, *shape)}", wsd(step, *shape), expected)


check("3.3", check_wsd, wsd)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The decay begins when the steps that are left are the share `decay` of the steps after the warm-up.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def wsd(step: int, num_steps: int, warmup_steps: int, decay=0.2, end=0.1) -> float:
#     if step < warmup_steps:
#         return (step + 1) / warmup_steps
#     left = (num_steps - step) / (num_steps - warmup_steps)  # share of the steps after the warm-up
#     return end + (1 - end) * min(1.0, left / decay)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 3.4, medium: BERT's rule.
def bert_mask(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of masked language modelling for token ids (batch, seq).

    After Devlin et al. 2019, section 3.1: 15 % of the tokens are chosen at random,
    never special ones (ids below NUM_SPECIAL). Of the chosen ones 80 % become MASK in
    the inputs, 10 % another token at random (any id from NUM_SPECIAL to TOKENS - 1),
    and 10 % stay as they are. The targets are the chosen tokens, and -100 elsewhere.
    `rows` must not change. Draw from `generator`.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_bert_mask(bert_mask):
    def seeded(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    rows = torch.randint(0, TOKENS, (200, 100), generator=seeded(1))
    before = rows.clone()
    torch.manual_seed(6)
    inputs, targets = bert_mask(rows, seeded(2))
    expect_equal("rows after the call", rows, before)
    torch.manual_seed(7)
    again, other = bert_mask(rows, seeded(2)), bert_mask(rows, seeded(3))
    same = (again[0] == inputs).all() and (again[1] == targets).all()
    expect_true("the same generator chooses the same again", same)
    expect_true("another generator chooses others", (other[1] != targets).any())
    chosen, ordinary = targets != -100, rows >= NUM_SPECIAL
    given, original = inputs[chosen], rows[chosen]
    expect_true("targets are tokens of the rows", (targets[chosen] == original).all())
    expect_true("what is not chosen stays", (inputs[~chosen] == rows[~chosen]).all())
    expect_true("no special token is chosen", ordinary[chosen].all())
    expect_true("rows differ in which columns are chosen", chosen.any(dim=0).all())
    expect_true("columns differ in which rows are chosen", chosen.any(dim=1).all())
    share = chosen[ordinary].float().mean()
    expect_close("share of the ordinary tokens that are chosen", share, 0.15, 0.015)
    share = (given == MASK).float().mean()
    expect_close("share of MASK among the chosen", share, 0.8, 0.03)
    share = (given == original).float().mean()
    expect_close("share of the chosen that stay", share, 0.1, 0.025)
    others = given[(given != MASK) & (given != original)]
    expect_true("random tokens are no special ones", others.min() >= NUM_SPECIAL)
    expect_true("random tokens are of many kinds", len(others.unique()) > 150)
    expect_true("they go up to the last one", TOKENS - 20 < others.max() < TOKENS)
    for became, picked in ((inputs, chosen), (inputs.T, chosen.T)):  # rows, columns
        fates = [(i[c] == MASK).tolist() for i, c in zip(became, picked, strict=True)]
        mixed = sum(len(set(fate)) == 2 for fate in fates)
        expect_true("each chosen token has its own fate", mixed > len(fates) / 2)


check("3.4", check_bert_mask, bert_mask)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Draw two random tensors of the rows' shape: one decides which tokens are chosen, the other what becomes of them.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The tokens that stay or change at random keep the model from trusting any token that it is shown.
#
# ```python
# def bert_mask(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
#     chosen = (torch.rand(rows.shape, generator=generator) < 0.15) & (rows >= NUM_SPECIAL)
#     fate = torch.rand(rows.shape, generator=generator)
#     others = torch.randint(NUM_SPECIAL, TOKENS, rows.shape, generator=generator)
#     inputs = torch.where(chosen & (fate < 0.8), MASK, rows)
#     inputs = torch.where(chosen & (fate >= 0.9), others, inputs)
#     return inputs, rows.masked_fill(~chosen, -100)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 3.5, hard: packed documents that do not see each other.
def document_mask(row: Tensor, end_of_text: int = 0) -> Tensor:
    """Causal mask (seq, seq) for a row (seq,) in which several documents are packed.

    True where one may look: a position sees itself and what stands before it in its own
    document. The end-of-text token belongs to the document that it ends.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_document_mask(document_mask):
    signs = ["1....", "11...", "..1..", "...1.", "...11"]  # the rows of the mask
    expected = torch.tensor([[sign == "1" for sign in row] for row in signs])
    found = document_mask(torch.tensor([7, 0, 0, 8, 9]))
    expect_equal("document_mask of [7, 0, 0, 8, 9]", found, expected)
    found = document_mask(torch.tensor([0, 5, 5, 8, 9]), end_of_text=5)
    expect_equal("document_mask of [0, 5, 5, 8, 9], end_of_text=5", found, expected)
    documents = [torch.tensor([*encode_small(text), 0]) for text in held_out[:3]]
    packed, model = torch.cat(documents), new_transformer().cpu()
    with torch.no_grad():  # RoPE knows distances only: a document may begin anywhere
        together = model(packed[None], document_mask(packed))[0]
        alone = [model(document[None])[0] for document in documents]
    parts = together.split([len(document) for document in documents])
    for number, (logits, expected) in enumerate(zip(parts, alone, strict=True)):
        expect_close(f"logits of packed document {number + 1}", logits, expected, 1e-3)


check("3.5", check_document_mask, document_mask)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Give every position the number of its document by counting the end tokens strictly before it; two positions may meet if the numbers agree.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Number the documents by counting the ends before each position. Two positions may meet if their numbers agree.
#
# ```python
# def document_mask(row: Tensor, end_of_text: int = 0) -> Tensor:
#     ends = (row == end_of_text).int()
#     number = ends.cumsum(0) - ends  # ends strictly before each position
#     places = torch.arange(len(row), device=row.device)
#     return (number[:, None] == number) & (places[:, None] >= places)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 3.6, open: predict, then measure. What do two layers lose without positions?
# After 60 steps: loss without positions minus loss with them, in nats. Write it first.
PREDICTION = None


def no_positions(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, ...]:
    """Cosine and sine, each (seq, head_dim), with which `rotate` changes nothing."""
    raise NotImplementedError


# %% tags=["check"]
def loss_after_60_steps(angles, model_seed: int) -> float:
    """Loss of the small model on unseen text, trained with these angles (about 3 s)."""
    torch.manual_seed(model_seed)
    model = Transformer(SMALL, angles).to(machine.device)
    config = TrainConfig(60, 6e-3, warmup_steps=10, progress=False)
    short = batches_of(rows[:, :49], 60, batch_size=16)
    train(model, short, config, loss_fn=causal_loss)
    with torch.no_grad():
        return causal_loss(model, {"input_ids": rows_of(held_out, 49)[:64]}).item()


def check_no_positions(no_positions, prediction):
    from helpers.exercises import expect_shape

    x = torch.randn(2, 3, 5, 8)
    cos, sin = no_positions(torch.arange(5), 8, 10_000.0)
    expect_shape("the cosine for 5 positions and heads of 8", cos, (5, 8))
    expect_close("rotate(x, cos, sin)", rotate(x, cos, sin), x)
    guessed = isinstance(prediction, int | float) and -10 < prediction < 10
    expect_true("PREDICTION is a number of nats, written before you measured", guessed)
    found = []
    for number in (seed, seed + 1):  # two sets of fresh weights
        without = loss_after_60_steps(no_positions, number)
        found.append(without - loss_after_60_steps(rotary_angles, number))
    print(f"you predicted {prediction:+.2f} nats, it is {found[0]:+.2f}, ", end="")
    print(f"and {found[1]:+.2f} from other fresh weights")


check("3.6", check_no_positions, no_positions, PREDICTION)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `rotate` multiplies by the cosine and adds something times the sine. For the prediction: a causal model of several layers need not be lost without positions (Haviv et al. 2022).
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# An angle of zero has the cosine 1 and the sine 0. Any prediction is right that was written first; ask why yours was too high or too low. One layer is blind to order. In two, the second reads vectors that already depend on what stands before each place, so the order need not be lost (Haviv et al. 2022).
#
# ```python
# PREDICTION = 0.5
#
#
# def no_positions(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, ...]:
#     cos = torch.ones(len(positions), head_dim, device=positions.device)
#     return cos, torch.zeros_like(cos)
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. A tokenizer was trained on English. Which text of 1,000 bytes costs the most tokens?**
#
# - A. An English news article.
# - B. An English novel.
# - C. A Thai news article.
# - D. All cost the same, for all have 1,000 bytes.
#
# <details><summary>Answer</summary>
#
# C. Its pairs of bytes were rare in the training text, so few merges apply. Section 1 saw something similar: the tokenizer of Shima made tokens of 3.11 bytes on Shima and of 1.48 on Python source.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. You take the rotation out of a model of one causal layer. What can its last position still tell?**
#
# - A. Which tokens stood before it, and in what shares, but not in which order.
# - B. Nothing about the tokens before it.
# - C. Only which token stood directly before it.
# - D. Everything, for the causal mask gives each token its place.
#
# <details><summary>Answer</summary>
#
# A. The weighted average is the same for every order of what it averages: section 2 shuffled the text, and the result changed by 1.2e-07. The mask says over which tokens it averages, and not their order.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. In the figure "Sums start lowest, stories end lowest" the crosses mark the loss of the bigram. What does it show for step 20?**
#
# - A. The model has passed the bigram on sums, since their loss is the lowest.
# - B. The model has passed the bigram on repeats, whose cross is the highest.
# - C. On every kind the bigram is still ahead.
# - D. Mappings and descriptions have the same loss.
#
# <details><summary>Answer</summary>
#
# C. At step 20 sums are at 2.33 nats and their bigram at 1.70, the other kinds at 4.26 to 5.02 and their bigrams at 2.39 to 3.78. A: sums are the lowest for the unigram already, at 4.04, so a low loss is not yet something learned. B: 5.02 against 3.78. D: 4.26 and 4.97; they meet later.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. In the figure on labels, which two rows show that it is pretraining, and not the method, that makes *nearest centre* good?**
#
# - A. *nearest centre* and *fine-tuned*.
# - B. *nearest centre* and *linear probe*.
# - C. *nearest centre* and *letters*.
# - D. *nearest centre* and *fresh centre*.
#
# <details><summary>Answer</summary>
#
# D. Only there is the method the same and the weights differ: with four labels 98 % against 47 %. In A and B the weights are the same and the method differs, in C both differ.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. AdamW's mean of squares starts at zero, and $\beta_2 = 0.95$. The first gradient is $g$. What would the mean be after this step without the correction?**
#
# - A. $0.95\,g^2$
# - B. $0.05\,g^2$
# - C. $g^2$
# - D. 0
#
# <details><summary>Answer</summary>
#
# B. $v_1 = 0.95 \cdot 0 + 0.05\,g^2$. Dividing by $1 - 0.95^1 = 0.05$ gives $g^2$. Without it the root would be too small by a factor of 4.5.
#
# </details>

# %% [markdown]
# ## What we saw
#
# The numbers of this table were measured above, in this run. Those named shima-4m are from the record of its training.

# %%
lesson.summary()

# %% [markdown]
# ## In practice
#
# You need not write the model and the loop again for each run. With `transformers` the profile's model is loaded, and trained further on new text, in a few lines. This is *continued pretraining*: the same objective, other text. Here the text is Shima's medicine, which shima-4m has never read (and no hub model either). Watch the loss on the new text, and on text of the old kind.

# %%
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.data import pack, text_dataset
from helpers.evaluation import perplexity

model, tokenizer = load_model(machine)
model = model.float()


def packed(texts: list[str]) -> Dataset:
    """Rows of 128 tokens, input and target at once; documents end with end-of-text."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    documents = [[*document, tokenizer.eos_token_id] for document in ids]
    rows = list(pack(documents, 128))
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")

# %%
new_text = list(islice(world.documents(seed, {"medicine": 1.0}), 600))
old_text = text_dataset(text_id or machine, 60, seed=10_000 + seed)["text"]
sets = {"new": packed(new_text[:60]), "old": packed(list(old_text))}
rate, steps = settings["practice"]
arguments = TrainingArguments(
    output_dir=str(ROOT / "build" / "03_pretraining"), max_steps=lesson.scaled(steps),
    learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=5, weight_decay=0.1,
    per_device_train_batch_size=8, save_strategy="no", logging_steps=10, seed=seed,
    disable_tqdm=True, report_to="none", use_cpu=machine.device == "cpu",
    fp16=lesson.precision == "fp16-mixed", bf16=lesson.precision == "bf16-mixed",
)  # fmt: skip


def losses_on(sets: dict[str, Dataset]) -> dict[str, float]:
    """Loss on each text, in nats per token."""
    batches = {name: rows.iter(8) for name, rows in sets.items()}
    return {name: math.log(perplexity(model.eval(), b)) for name, b in batches.items()}


trainer = Trainer(model, arguments, train_dataset=packed(new_text[100:]))
before = losses_on(sets)
trainer.train()
after = losses_on(sets)
for name in sets:
    print(f"{name} text: {before[name]:.2f} -> {after[name]:.2f} nats per token")
chance = math.log(len(tokenizer))
print(f"guessing all tokens alike would cost {chance:.2f} nats")

# %% [markdown]
# Before, the model is worse on the new text than guessing all tokens alike (9.19 against 7.34 nats): on (geometric) average it gives the right token less than an even share. Afterwards the new text costs 2.33 nats, and the old text has suffered, from 0.87 to 2.04. New text and a high learning rate came together here. Lesson 14 measures forgetting and its remedy, to mix old text in.
#
# **What is different at scale**
#
# | here | a model of billions of parameters |
# |---|---|
# | a few thousand documents made by a program | trillions of tokens from the web, filtered, without duplicates, mixed by hand and by experiment |
# | a vocabulary of 512 to 2,048 | 32,000 to 256,000, trained on a sample of all languages and of code |
# | one attention function in five lines | fused kernels that never store the matrix of scores, and heads that share keys and values (lesson 11) |
# | one process | thousands of GPUs that share weights, layers and data (lesson 11) |
# | run again if it fails | checkpoints every few minutes, loss spikes that are watched and rolled back |
# | learning rate chosen by trying | chosen on small models and scaled up, as are size and number of tokens (lesson 04) |
# | one seed, seconds | one run, weeks: everything is tested small before |
#
# ## Read on
#
# - Sennrich et al. 2016, *Neural Machine Translation of Rare Words with Subword Units*: byte-pair encoding.
# - Vaswani et al. 2017, *Attention Is All You Need*.
# - Radford et al. 2018, *Improving Language Understanding by Generative Pre-Training*; 2019, *Language Models are Unsupervised Multitask Learners*.
# - Sutskever et al. 2014, *Sequence to Sequence Learning with Neural Networks*; Devlin et al. 2019, *BERT*; Raffel et al. 2020, *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer* (T5).
# - Zhang & Sennrich 2019, *Root Mean Square Layer Normalization*; Shazeer 2020, *GLU Variants Improve Transformer*; Su et al. 2021, *RoFormer*; Haviv et al. 2022, *Transformer Language Models without Positional Encodings Still Learn Positional Information*; Touvron et al. 2023, *LLaMA*.
# - Kingma & Ba 2015, *Adam*; Loshchilov & Hutter 2019, *Decoupled Weight Decay Regularization*; Micikevicius et al. 2018, *Mixed Precision Training*; Hu et al. 2024, *MiniCPM*.
# - Ainslie et al. 2023, *GQA*.
# - Howard & Ruder 2018, *Universal Language Model Fine-tuning for Text Classification*.
# - Zhao et al. 2021, *Calibrate Before Use: Improving Few-Shot Performance of Language Models*.
# - Olsson et al. 2022, *In-context Learning and Induction Heads*; Schaeffer et al. 2023, *Are Emergent Abilities of Large Language Models a Mirage?*
