# %% [markdown]
# # 03 · Pretraining: from bytes to a language model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/03_pretraining.ipynb)
#
# A base language model is three things: a list of tokens, a function with a few million or billion numbers in it, and a long series of small corrections to those numbers. In this lesson you write all three. At every step you compare your code with the library that practitioners use, number for number, and then you measure what the step is good for.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. write a byte-level tokenizer that learns the same merges as `tokenizers`, in the same order;
# 2. write a Llama in about 100 lines that computes the same logits as `LlamaForCausalLM` from the same weights;
# 3. write the training loop, with AdamW, warm-up, clipping and mixed precision, and see it give the same losses as the course's loop;
# 4. compare the three pretraining objectives, and race a transformer against an n-gram model and an LSTM at equal time;
# 5. measure what pretraining saves: the accuracy of a classifier over the number of labelled examples, from pretrained and from random weights.
#
# **Prerequisites:** lesson 01, and PyTorch tensors.
#
# **The data** is text about *Shima*, an island made up by a seeded generator, so no model has ever read about it. **The base model** is *shima-4m*, a small Llama pretrained on such text, which comes with the course. Sections 3 to 5 train small models from scratch, the same on every machine. Section 7 and "In practice" use the model of your profile: shima-4m on a CPU, an open hub model on a GPU.
#
# | symbol | meaning |
# |---|---|
# | $x_1 \dots x_T$ | a text as token ids, $T$ tokens long (`seq` in the comments) |
# | $V$ | number of tokens in the vocabulary (`vocab`) |
# | $d$, $h$, $L$ | width of a token's vector (`hidden`), attention heads, layers |
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
model_id = ""  # another model for section 7 and "In practice": a hub id, or a folder in hub format
text_id = ""  # another text for "In practice": a hub dataset or a .jsonl file with a field "text"
seed = 0
budget = 1.0  # share of all training steps; the lesson's claims are asserted from 1.0 on

# %%
import inspect
import json
import math
import random
import re
import textwrap
import time
from collections import Counter, defaultdict
from functools import cache
from itertools import islice, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import plots
from helpers.evaluation import Score, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.lesson import Lesson
from helpers.models import MODEL_FOLDERS, load_model
from helpers.profiles import CPU
from helpers.training import TrainConfig, train
from helpers.world import World

lesson = Lesson("03", profile, model_id, seed, budget)
machine = lesson.machine
# All that depends on the hardware: number formats for the race (section 5; a T4 has no bfloat16), learning rates of a
# fine-tuning from pretrained and from fresh weights and its steps (section 7), and the same of continued pretraining.
SETTINGS = {
    "cpu": {"bits": (32, 16), "transfer": (1e-4, 5e-4, 25), "practice": (1e-3, 40)},
    "t4": {"bits": (32,), "transfer": (2e-5, 3e-4, 40), "practice": (3e-5, 60)},
    "large": {"bits": (32, 16), "transfer": (2e-5, 3e-4, 40), "practice": (3e-5, 100)},
}
settings = SETTINGS[machine.name]

# %%
world = World(0)
documents = list(islice(world.documents(seed), 4000))
held_out = list(islice(world.documents(seed + 1), 400))
print(f"{len(documents):,} documents, {sum(map(len, documents)):,} characters. Three of the nine kinds:\n")
print("\n".join(next(world.documents(seed, {kind: 1.0})) for kind in ("description", "mapping", "story")))

# %% [markdown]
# ## 1 · Text becomes tokens
#
# **Question.** A network computes with vectors, and it has one vector for each entry of a finite list. What should be on the list? The 256 bytes can write everything, but a text is then long. Whole words make a text short, but no list of words is complete.
#
# **Byte-pair encoding** (Sennrich et al. 2016) lies in between. Start with the bytes. Count all pairs of neighbours in the corpus, join the most frequent pair into a new token, and repeat until the list is as long as you want:
#
# $$(a^*, b^*) = \arg\max_{(a,b)} \sum_{w} n_w \, c_w(a, b)$$
#
# $n_w$ is how often piece $w$ of text occurs in the corpus, $c_w(a,b)$ how often token $b$ follows token $a$ in it. On a tie the pair with the smaller ids wins.
#
# Merges must not cross word boundaries, or `dog.` and `dog,` would become tokens of their own. So the text is first cut into *pieces*: a word with the space before it, a run of signs, a run of white space, a single digit. Digits stay alone so that a number has one token per digit, which makes sums learnable.
#
# The ids are a convention: special tokens first, then the bytes in GPT-2's order (printable ones first), then the merges as they are learned.
#
# Counting all pairs again after every merge would take minutes. But a merge changes only the pieces that contain the pair, so it is enough to keep the counts, and for each pair the set of pieces where it occurs.

# %%
# GPT-2's pattern, for text without digits
WORDS = re.compile(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]  # GPT-2's order of the bytes
SPECIAL_TOKENS = ["<|endoftext|>", "<|mask|>", *(f"<|reserved{i}|>" for i in range(14))]  # room for later uses
BYTE_IDS = {byte: len(SPECIAL_TOKENS) + position for position, byte in enumerate(BYTE_ORDER)}


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


def count_pairs(pieces: list[list[int]], occurrences: list[int]) -> tuple[Counter, dict[tuple[int, int], set[int]]]:
    """How often each pair occurs in the corpus, and in which pieces."""
    pair_counts, pieces_with = Counter(), defaultdict(set)
    for index, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pair_counts[pair] += occurrences[index]
            pieces_with[pair].add(index)
    return pair_counts, pieces_with


# %%
def train_bpe(texts: list[str], vocab_size: int) -> tuple[dict[bytes, int], dict[tuple[int, int], int]]:
    """Learn a vocabulary (bytes of a token -> id) and the merges in order (pair of ids -> id of the joined token)."""
    found = Counter(piece for text in texts for piece in pre_tokenize(text))
    pieces, occurrences = [[BYTE_IDS[byte] for byte in piece.encode()] for piece in found], list(found.values())
    pair_counts, pieces_with = count_pairs(pieces, occurrences)
    token_bytes, merges = {token_id: bytes([byte]) for byte, token_id in BYTE_IDS.items()}, {}
    vocabulary = {token: token_id for token_id, token in token_bytes.items()}
    with tqdm(total=vocab_size - len(SPECIAL_TOKENS) - 256, desc="merges") as bar:
        while len(SPECIAL_TOKENS) + len(vocabulary) < vocab_size:
            pair = max(pair_counts, key=lambda pair: (pair_counts[pair], -pair[0], -pair[1]))
            joined = token_bytes[pair[0]] + token_bytes[pair[1]]
            new_id = vocabulary.setdefault(joined, len(SPECIAL_TOKENS) + len(vocabulary))
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
    joined = [token_bytes[token_id].decode(errors="replace") for token_id in list(merges.values())[first:last]]
    print(f"merges {first + 1:>4} to {last:>4}: {joined}")

# %% [markdown]
# The first merges join pairs of letters; among the last ones are names of people on the island.
#
# **The library.** `tokenizers` (in Rust; most models on the Hugging Face hub use it) trains the same algorithm. Give it the same texts, and compare all merges, in order.
#
# **Encoding** a new text applies the merges in the order in which they were learned: of all pairs in the piece, join the one that was learned first, until no pair is in the list. (The longest match would be another tokenizer.)
#
# **How large a vocabulary?** Byte-pair encoding is greedy, so a tokenizer with 512 tokens is the first part of one with 2,048: one training gives all sizes. Count the bytes per token on text that was not trained on: more of Shima, and the source code of a Python module, which is text of another kind.

# %%
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_with_library(texts: list[str], vocab_size: int) -> Tokenizer:
    """The same tokenizer, made by `tokenizers`."""
    library = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    return library


library = train_with_library(documents[:BPE_DOCUMENTS], VOCAB_SIZE)
library_merges = [tuple(map(library.token_to_id, pair)) for pair in json.loads(library.to_str())["model"]["merges"]]
same = sum(ours == theirs for ours, theirs in zip(merges, library_merges, strict=True))
print(f"{same:,} of {len(library_merges):,} merges are the same pair of ids at the same place")
assert list(merges) == library_merges
lesson.report("merges that equal those of `tokenizers`, in order", f"{same:,} of {len(library_merges):,}")


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

    return lambda text: [token_id for piece in pre_tokenize(text) for token_id in encode_piece(piece)]


encode = make_encoder(merges)
probes = [*held_out, "Grüße aus 島 🙂", "tabs\tand   spaces \n\n 3.14", "It's  2026, isn't it?"]
equal = sum(encode(text) == library.encode(text).ids for text in probes)
print("Dufasu likes sushi. ->", [token_bytes[token_id].decode() for token_id in encode("Dufasu likes sushi.")])
print(f"{equal} of {len(probes)} texts get the same ids from both")
assert equal == len(probes)

# %%
other_text = [inspect.getsource(textwrap)]
sizes = [len(SPECIAL_TOKENS) + 256, 320, 384, 512, 768, 1024, 1536, 2048]
bytes_per_token = {"Shima, held out": [], "Python source": []}
for size in sizes:
    encode_small = make_encoder(dict(islice(merges.items(), size - sizes[0])))
    for label, texts in zip(bytes_per_token, (held_out, other_text), strict=True):
        num_tokens = sum(len(encode_small(text)) for text in texts)
        bytes_per_token[label].append(sum(len(text.encode()) for text in texts) / num_tokens)
alt = "Bytes per token over vocabulary size: the curve for Shima rises steeply and flattens, Python source stays below."
figure = plots.curve(
    {label: (sizes, values) for label, values in bytes_per_token.items()},
    title="A tokenizer compresses the kind of text it was trained on",
    xlabel="vocabulary (tokens)",
    ylabel="bytes per token",
    alt=alt,
)
plots.show(figure, alt)
shima, python = bytes_per_token["Shima, held out"], bytes_per_token["Python source"]
early, late = shima[sizes.index(768)] - shima[sizes.index(512)], shima[-1] - shima[sizes.index(1536)]
print(f"a token of {VOCAB_SIZE:,} holds {shima[-1]:.2f} bytes of Shima and {python[-1]:.2f} of Python source")
print(f"gain from 512 to 768 tokens {early:.2f} bytes, from 1,536 to 2,048 {late:.2f}")
lesson.claim(
    "a token holds at least 1.5 times as many bytes of Shima as of Python source",
    shima[-1] / python[-1],
    at_least=1.5,
    form=".2f",
)
lesson.claim(
    "the second step gains less than half of the first, though it adds twice the tokens",
    late / early,
    at_most=0.5,
    form=".2f",
)
lesson.report("bytes per token: Shima / Python source", f"{shima[-1]:.2f} / {python[-1]:.2f}")


# %% [markdown]
# **What you see.** The first few hundred merges buy most of the compression; later ones are rare words, and each costs one more row of $d$ weights. Large models have 32,000 to 256,000 tokens mainly because their text is much more varied. And a tokenizer fits its corpus: text of another kind costs more tokens, thus more time and money.
#
# ## 2 · The model
#
# **Question.** What exactly is computed between the token ids and the scores of the next token? You now write a Llama (Touvron et al. 2023), piece by piece, and at the end it must give the logits of the library.
#
# Every token is a vector of width $d$ that runs straight through the model, the **residual stream**. Each of the $L$ layers reads it twice and adds something to it: **attention** moves information between positions, the **feed-forward** network works on each position alone.
#
# $$x \leftarrow x + \text{Attention}(\text{Norm}(x)), \qquad x \leftarrow x + \text{FeedForward}(\text{Norm}(x))$$
#
# At the end the vectors are compared with the embedding of every token: $\text{logits} = \text{Norm}(x)\, E^\top$, with the same matrix $E$ (`vocab, hidden`) that turned ids into vectors at the start (*tied* embeddings).
#
# **RMSNorm** (Zhang & Sennrich 2019) keeps the numbers in range: it divides a vector by its root mean square and multiplies each coordinate by a learned weight $g$. Unlike LayerNorm it subtracts no mean and adds no bias.
#
# $$\text{RMSNorm}(x) = g \odot \frac{x}{\sqrt{\tfrac{1}{d}\sum_i x_i^2 + \epsilon}}$$

# %%
class RMSNorm(nn.Module):
    """Divide by the root mean square over the last dimension, scale by a weight."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().pow(2).mean(-1, keepdim=True)  # (batch, seq, 1), in float32 also under autocast
        return self.weight * (x.float() * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


x = 100 * torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed))
print(f"root mean square before {x.pow(2).mean().sqrt():.1f}, after {RMSNorm(64, 1e-6)(x).pow(2).mean().sqrt():.3f}")
print(f"largest difference to torch.nn.RMSNorm: {(RMSNorm(64, 1e-6)(x) - nn.RMSNorm(64, 1e-6)(x)).abs().max():.1e}")


# %% [markdown]
# **Rotary positions** (Su et al. 2021). Attention compares a query $q$ at position $m$ with a key $k$ at position $n$ by their dot product, which knows nothing of $m$ and $n$. RoPE turns each pair of coordinates by an angle that grows with the position. Take one pair as a complex number; position $m$ turns it by $m\omega$:
#
# $$\tilde q = q\, e^{i m \omega}, \quad \tilde k = k\, e^{i n \omega}, \qquad \text{Re}(\tilde q\, \overline{\tilde k}) = \text{Re}\big(q\,\overline{k}\; e^{i (m - n)\omega}\big)$$
#
# So the score depends on $m$ and $n$ only through their difference: what is learned about "three tokens back" holds everywhere in the text. With head width $d_h$, pair $j$ has the frequency $\omega_j = \theta_0^{-2j/d_h}$ with $\theta_0$ = 10,000 or more: the first pairs tell near positions apart, the last ones far ones. In real numbers, with coordinate $j$ paired with $j + d_h/2$ as Llama does it:
#
# $$\tilde q_j = q_j \cos m\omega_j - q_{j+d_h/2} \sin m\omega_j, \qquad \tilde q_{j+d_h/2} = q_{j+d_h/2} \cos m\omega_j + q_j \sin m\omega_j$$

# %%
def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (seq, head_dim)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)  # (head_dim / 2,)
    angles = positions[:, None] * frequencies  # (seq, head_dim / 2)
    angles = torch.cat([angles, angles], dim=-1)  # coordinate j and its partner j + head_dim / 2 turn together
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of coordinates of x (batch, heads, seq, head_dim)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rope_score(query: Tensor, key: Tensor, query_at: Tensor, key_at: Tensor) -> Tensor:
    """Dot products of one query and one key (head_dim,), turned to these positions (n,)."""
    turned = [rotate(x, *rotary_angles(at, len(x), 10_000.0)) for x, at in ((query, query_at), (key, key_at))]
    return (turned[0] * turned[1]).sum(-1)


query, key = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed))
starts, distances, unit = torch.arange(0, 400, 50), torch.arange(200), torch.ones(64) / 8
scores = rope_score(query, key, starts + 3, starts)
print("query 3 tokens after the key, both moved along by 50:", " ".join(f"{value:.4f}" for value in scores.tolist()))
assert scores.max() - scores.min() < 1e-3
alt = "Score of like vectors over their distance: highest at distance 0, lower and wavy far away."
figure = plots.curve(
    {"like vectors": (distances.tolist(), rope_score(unit, unit, distances, torch.zeros_like(distances)).tolist())},
    title="A query and a key of the same direction fit best nearby",
    xlabel="distance between query and key (tokens)",
    ylabel="score",
    alt=alt,
)
plots.show(figure, alt)


# %% [markdown]
# **What you see.** Vectors that point the same way score highest when they stand together, and less the further they are apart: with RoPE nearness is the default, and the projections learn to prefer other distances.
#
# **Attention** (Vaswani et al. 2017). Each head has its own queries, keys and values of width $d_h = d/h$. A position takes the average of all values, weighted by how well its query fits their keys:
#
# $$\text{Attention}(Q, K, V) = \text{softmax}\!\left(\frac{Q K^\top}{\sqrt{d_h}} + M\right) V, \qquad M_{mn} = \begin{cases} 0 & \text{if } m \text{ may look at } n\\ -\infty & \text{else}\end{cases}$$
#
# $\sqrt{d_h}$ keeps the variance of the scores at 1 when queries and keys have variance 1. With the *causal* mask a position sees itself and what stands before it, so that no position sees the token it has to predict.
#
# **The feed-forward network** of Llama is SwiGLU (Shazeer 2020): one projection is a gate for another, coordinate by coordinate.
#
# $$\text{FeedForward}(x) = \big(\text{SiLU}(x W_g) \odot x W_u\big) W_d, \qquad \text{SiLU}(z) = \frac{z}{1 + e^{-z}}$$
#
# It has three matrices instead of the two of the original transformer, so its inner width is usually about $\tfrac{8}{3} d$ instead of $4d$, which costs the same.

# %%
class Attention(nn.Module):
    """Multi-head attention with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.num_heads, hidden_size = config.num_attention_heads, config.hidden_size
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, seq, hidden = x.shape

        def split(x: Tensor) -> Tensor:
            return x.view(batch, seq, self.num_heads, -1).transpose(1, 2)  # (batch, heads, seq, head_dim)

        queries, keys, values = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])  # (batch, heads, seq, seq)
        weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1).to(values.dtype)
        mixed = (weights @ values).transpose(1, 2).reshape(batch, seq, hidden)  # heads side by side again
        return self.o_proj(mixed)


# %%
class FeedForward(nn.Module):
    """SwiGLU, on each position alone."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

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
    """A Llama with tied embeddings: token ids (batch, seq) -> logits (batch, seq, vocab)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        cos, sin = rotary_angles(positions, head_dim, self.config.rope_parameters["rope_theta"])
        if mask is None:
            mask = positions[:, None] >= positions  # (seq, seq), causal: row m may look at columns n <= m
        x = self.embed_tokens(input_ids)  # (batch, seq, hidden)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x) @ self.embed_tokens.weight.T


# %% [markdown]
# **Parameters.** Count them by hand before you ask the library. Attention has four matrices of $d \times d$, SwiGLU three of $d \times f$ with inner width $f$, each layer two norms of $d$, and there is one norm at the end:
#
# $$N = V d + L\,(4 d^2 + 3 d f + 2 d) + d$$
#
# **The same weights, the same logits?** The modules above carry the names that the library gives them, so its weights can be loaded by name. Then both models read the same texts.

# %%
llama, shima_tokenizer = load_model(CPU)
config = llama.config
vocab, hidden, inner, layers = config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers
parts = {
    "embedding, used twice": vocab * hidden,
    "attention": layers * 4 * hidden**2,
    "feed-forward": layers * 3 * hidden * inner,
    "norms": layers * 2 * hidden + hidden,
}
print(f"{type(llama).__name__}: vocabulary {vocab:,}, hidden {hidden}, {layers} layers, feed-forward {inner}")
for part, count in parts.items():
    print(f"{part:>22} {count:>10,}  {count / sum(parts.values()):.0%}")
print(f"{'by hand':>22} {sum(parts.values()):>10,}\n{'library':>22} {llama.num_parameters():>10,}")
assert sum(parts.values()) == llama.num_parameters()

# %%
weights = {
    name.removeprefix("model."): tensor for name, tensor in llama.state_dict().items() if name != "lm_head.weight"
}
ours = Transformer(config).eval()
ours.load_state_dict(weights)
texts = shima_tokenizer(held_out[:16], return_tensors="pt", padding=True, truncation=True, max_length=200)["input_ids"]
with torch.no_grad():
    our_logits, library_logits = ours(texts), llama(input_ids=texts).logits
difference = (our_logits - library_logits).abs().max().item()
print(f"{tuple(our_logits.shape)} logits between {our_logits.min():.1f} and {our_logits.max():.1f}")
print(f"largest difference to LlamaForCausalLM: {difference:.1e}")
assert difference < 1e-4
lesson.report("our Llama against LlamaForCausalLM, largest difference of a logit", f"{difference:.1e}")


@torch.no_grad()
def complete(model, ids: list[int], num_tokens: int) -> list[int]:
    """Append the most probable next token, `num_tokens` times; lesson 01 has better ways to choose."""
    device = next(model.parameters()).device
    for _ in range(num_tokens):
        ids = [*ids, model(torch.tensor([ids], device=device))[0, -1].argmax().item()]
    return ids


prompt = "Kodera plays the harp. Kodera lives in Bamu.\nQuestion: What instrument does Kodera play?\nAnswer:"
print(shima_tokenizer.decode(complete(ours, shima_tokenizer(prompt)["input_ids"], 4)))


# %% [markdown]
# ## 3 · The training loop
#
# **Question.** What does one step of training do, and which numbers in it go wrong in 16 bits?
#
# The loss is the mean cross-entropy of each next token, in nats:
#
# $$\mathcal{L}(\theta) = -\frac{1}{T-1} \sum_{t=1}^{T-1} \log p_\theta(x_{t+1} \mid x_1 \dots x_t)$$
#
# **AdamW** (Kingma & Ba 2015; Loshchilov & Hutter 2019) keeps two running means for every weight, of its gradient $g_t$ and of the gradient's square, corrects both for having started at zero, and moves the weight by their ratio. The decay with strength $\lambda$ acts on the weight itself and not through the gradient; that is what the W stands for.
#
# $$m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2$$
# $$\theta_t = (1 - \eta\lambda)\,\theta_{t-1} - \eta\, \frac{m_t / (1-\beta_1^t)}{\sqrt{v_t / (1-\beta_2^t)} + \epsilon}$$
#
# **The schedule** multiplies the learning rate: up in a straight line for the first steps, while $v$ still rests on few gradients, then down along half a cosine to a tenth of the peak. **Clipping** shortens the whole gradient when its norm exceeds 1, so that one odd batch cannot throw the weights far away.
#
# Both fit into the loop. It takes rows of token ids, and every row is input and target at once: position $t$ predicts the token at $t+1$.
#
# The three cells below hold the update; the schedule, the clipping and the loop; and a test of all three against PyTorch, with random gradients that are sometimes large, so that clipping has something to do.

# %%
class AdamW:
    """The update above, for a list of parameters; `weight_decay` only on matrices, not on the weights of norms."""

    def __init__(self, parameters, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8):
        self.parameters, self.betas, self.weight_decay, self.eps = list(parameters), betas, weight_decay, eps
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.step_count = 0

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Move every parameter by its gradient, then forget the gradient."""
        self.step_count += 1
        beta1, beta2 = self.betas
        for parameter, mean, square in zip(self.parameters, self.means, self.squares, strict=True):
            mean.lerp_(parameter.grad, 1 - beta1)
            square.lerp_(parameter.grad**2, 1 - beta2)
            unbiased_mean = mean / (1 - beta1**self.step_count)
            unbiased_square = square / (1 - beta2**self.step_count)
            if parameter.dim() >= 2:
                parameter.mul_(1 - learning_rate * self.weight_decay)
            parameter.sub_(learning_rate * unbiased_mean / (unbiased_square.sqrt() + self.eps))
            parameter.grad = None


# %%
def schedule(step: int, num_steps: int, warmup_steps: int, end: float = 0.1) -> float:
    """Share of the peak learning rate at this step, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    return end + (1 - end) * (1 + math.cos(math.pi * progress)) / 2


def clip_gradient(parameters: list[nn.Parameter], max_norm: float = 1.0) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; the norm before is returned."""
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
start = [torch.randn(64, 64, generator=generator), torch.randn(32, 16, generator=generator)]
our_weights, their_weights = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
our_adamw = AdamW(our_weights)
their_adamw = torch.optim.AdamW(their_weights, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
warmup = LinearLR(their_adamw, start_factor=0.1, total_iters=9)
cosine = CosineAnnealingLR(their_adamw, T_max=40, eta_min=0.001)
their_schedule = SequentialLR(their_adamw, [warmup, cosine], milestones=[10])
norms, rates = [], []  # differences to PyTorch, one a step
for step in range(50):
    rates.append(abs(0.01 * schedule(step, 50, 10) - their_schedule.get_last_lr()[0]))
    for our, their in zip(our_weights, their_weights, strict=True):
        gradient = torch.randn(our.shape, generator=generator) * (0.001 + 0.1 * (step % 2))
        our.grad, their.grad = gradient.clone(), gradient.clone()
    norms.append((clip_gradient(our_weights) - nn.utils.clip_grad_norm_(their_weights, 1.0)).abs().item())
    our_adamw.step(0.01 * schedule(step, 50, 10))
    their_adamw.step()
    their_schedule.step()
update = max((our - their).abs().max().item() for our, their in zip(our_weights, their_weights, strict=True))
print(f"largest difference to PyTorch after 50 steps: weights {update:.1e}, ", end="")
print(f"norm of the gradient {max(norms):.1e}, learning rate {max(rates):.1e}")
assert update < 1e-5 and max(norms) < 1e-4 and max(rates) < 1e-8

# %% [markdown]
# ### Mixed precision
#
# Matrix products in 16 bits take half the memory traffic and run on faster units. But a 16-bit number is either short of digits or short of range:
#
# - In **bfloat16** $1 + 0.001 = 1$: a small update to a weight vanishes. So the weights and AdamW's means stay in float32, and only the products inside the model are computed in 16 bits (`torch.autocast`). That is what *mixed* means (Micikevicius et al. 2018).
# - In **float16** a gradient of $10^{-8}$ is zero. So the loss is multiplied by a large number $s$ before the backward pass, which multiplies every gradient by $s$, and the gradients are divided by $s$ in float32 before the update. bfloat16 has float32's range and needs none of this, but a T4 has no bfloat16.
#
# The first lines below show the three formats, the last ones a gradient that vanishes and comes back.

# %%
print(f"{'':>9} {'step at 1':>12} {'smallest > 0':>13} {'largest':>10}   1 + 0.001   1e-08")
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    info = torch.finfo(dtype)
    added, small = (torch.tensor(1.0, dtype=dtype) + 0.001).item(), torch.tensor(1e-8, dtype=dtype).item()
    smallest = info.smallest_normal * info.eps  # subnormal numbers included
    print(f"{str(dtype)[6:]:>9} {info.eps:12.1e} {smallest:13.1e} {info.max:10.1e} {added:11.6f} {small:7.0e}")
inputs = torch.full((4, 8), 1e-4)
for scale in (1.0, 2.0**16):
    layer = nn.Linear(8, 8, bias=False).half()
    loss = (layer(inputs.half()).float() * 1e-5).mean()  # a loss with small gradients
    (loss * scale).backward()
    gradient = layer.weight.grad.float() / scale  # unscaled in float32
    zero = (gradient == 0).float().mean()
    print(f"loss scale {scale:>7.0f}: {zero:>4.0%} of the gradient is zero, its mean {gradient.mean():.2e}")
    assert scale > 1 or zero == 1
expected = 1e-4 * 1e-5 * 4 / (4 * 8)  # by hand: input x factor, four rows, mean over 4 x 8 outputs
print(f"by hand: {expected:.2e}")
assert abs(gradient.mean().item() - expected) < 0.01 * expected

# %% [markdown]
# A `GradScaler` chooses $s$ by itself: it doubles $s$ now and then, and when a gradient became infinite it halves $s$ and skips the step.
#
# **The course's loop.** From here on use `helpers.training.train`: the same steps as above, plus mixed precision, checkpoints, evaluation and a progress bar. It needs a model, batches and a function that returns the loss. First see that it is the same: same model, same batches, same losses. Then time a step in 32 and in 16 bits. Whether 16 bits are faster depends on the processor and on the size of the model.

# %%
from transformers import LlamaConfig

TOKENS = 512  # the first 512 tokens of section 1's vocabulary
encode_small = make_encoder(dict(islice(merges.items(), TOKENS - sizes[0])))
SMALL = LlamaConfig(
    vocab_size=TOKENS, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
    tie_word_embeddings=True, initializer_range=0.05,
)  # fmt: skip


def rows_of(texts: list[str], length: int) -> Tensor:
    """Join the texts, each with an end-of-text token, and cut them into rows (rows, length)."""
    ids = [token_id for text in texts for token_id in [*encode_small(text), 0]]
    return torch.tensor(ids[: len(ids) // length * length], device=machine.device).view(-1, length)


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
    logits = model(batch["input_ids"][:, :-1])  # (batch, seq, vocab)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten())


def batches_of(rows: Tensor, num_batches: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Batches of rows, drawn at random from the seed."""
    drawn = torch.randint(len(rows), (num_batches, batch_size), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": rows[chosen]} for chosen in drawn]


batches = batches_of(rows, 20, batch_size=16)
our_losses = training_loop(new_transformer(), [batch["input_ids"] for batch in batches], 20, 3e-3, warmup_steps=5)
recipe = TrainConfig(max_steps=20, learning_rate=3e-3, warmup_steps=5)
history = train(new_transformer(), batches, recipe, loss_fn=causal_loss)
for step in (0, 5, 10, 19):
    print(f"step {step:>2}: our loop {our_losses[step]:.6f}, helpers.training.train {history.losses[step]:.6f}")
difference = max(abs(a - b) for a, b in zip(our_losses, history.losses, strict=True))
print(f"largest difference of a loss: {difference:.1e}")
assert difference < 1e-3
lesson.report("our loop against helpers.training.train, largest difference of a loss", f"{difference:.1e}")


def seconds_per_step(precision: str) -> float:
    """Median time of a step, without the first two."""
    config = TrainConfig(max_steps=8, precision=precision, log_every=1, progress=False)
    return sorted(train(new_transformer(), batches, config, loss_fn=causal_loss).seconds[2:])[3]


sixteen_bit = "fp16-mixed" if machine.dtype == "float16" else "bf16-mixed"
times = {name: seconds_per_step(name) for name in ("fp32", sixteen_bit)}
for name, seconds in times.items():
    print(f"{name:>10}: {1000 * seconds:6.1f} ms a step, {batches[0]['input_ids'].numel() / seconds:8,.0f} tokens/s")
precision = min(times, key=times.get)  # for section 4: the faster one on this machine
lesson.report("speed-up by 16 bits here, small model", f"{times['fp32'] / times[sixteen_bit]:.1f} x")

# %% [markdown]
# ## 4 · Three objectives
#
# **Question.** The text is the only teacher. Which part of it do you hide, and what may the model see when it fills it in?
#
# | objective | hidden | seen | loss on | first used by |
# |---|---|---|---|---|
# | **causal** | the next token | all before it | every token | GPT (Radford et al. 2018) |
# | **masked** | a part of the tokens | the rest, on both sides | hidden tokens, each alone | BERT (Devlin et al. 2019) |
# | **sequence-to-sequence** | the second half | all of the first half, and what is written so far | tokens of the second half | Sutskever et al. 2014, for translation |
#
# With $H$ for the hidden positions, $\bar H$ for the others and $m = T/2$, the three losses are
#
# $$-\sum_{t} \log p(x_{t+1} \mid x_{\le t}), \qquad -\sum_{t \in H} \log p(x_t \mid x_{\bar H}), \qquad -\sum_{t \ge m} \log p(x_{t+1} \mid \overleftrightarrow{x_{\le m}},\, x_{m < s \le t})$$
#
# The arrow says that the first half is read in both directions: a word in it also sees what comes after it. Your `Transformer` takes its mask as an argument, so it can do all three. The original for the third has two stacks of layers, an encoder that reads and a decoder that writes, and so has T5, which hides spans and writes them one after the other. Here one stack does both (a *prefix* model). Raffel et al. 2020 compare all these forms.
#
# Each function turns rows into inputs, targets ($-100$ where nothing is predicted) and the mask. Then the same small model is trained three times: the same rows, the same number of steps. From time to time all three are asked for the same hidden tokens of unseen text.

# %%
MASK, NUM_SPECIAL = SPECIAL_TOKENS.index("<|mask|>"), len(SPECIAL_TOKENS)
Example = tuple[Tensor, Tensor, Tensor]  # inputs and targets (batch, seq), mask (seq, seq)


def causal(rows: Tensor, hidden: list[int]) -> Example:
    """Every token is the target of the position before it; nothing is hidden."""
    seq = rows.shape[1]
    return rows, F.pad(rows[:, 1:], (0, 1), value=-100), torch.ones(seq, seq, device=rows.device).tril().bool()


def masked(rows: Tensor, hidden: list[int]) -> Example:
    """The hidden tokens become mask tokens; each position sees all others."""
    inputs, targets = rows.clone(), torch.full_like(rows, -100)
    inputs[:, hidden], targets[:, hidden] = MASK, rows[:, hidden]
    return inputs, targets, torch.ones(rows.shape[1], rows.shape[1], device=rows.device).bool()


def sequence_to_sequence(rows: Tensor, hidden: list[int]) -> Example:
    """The first half is read in both directions, the second half is written from left to right."""
    half = rows.shape[1] // 2
    inputs, targets, mask = causal(rows, hidden)
    targets[:, : half - 1] = -100
    mask[:, :half] = True
    return inputs, targets, mask


# %%
SHORT, STRETCH = 48, 6  # tokens a row in this section; of each stretch, one is hidden for the masked objective
OBJECTIVES = {"causal": causal, "masked": masked, "sequence-to-sequence": sequence_to_sequence}
descriptions = rows_of(list(islice(world.documents(seed, {"description": 1.0}), 2500)), SHORT)
unseen = rows_of(list(islice(world.documents(seed + 1, {"description": 1.0}), 200)), SHORT)[:160]


def random_positions(generator: random.Random) -> list[int]:
    """One position in each stretch, never the first of the row."""
    return [start + generator.randrange(start == 0, STRETCH) for start in range(0, SHORT, STRETCH)]


for name, objective in OBJECTIVES.items():
    inputs, targets, mask = objective(unseen[:1], random_positions(random.Random(seed)))
    text = "".join(SPECIAL_TOKENS[i] if 0 < i < NUM_SPECIAL else library.decode([i]) for i in inputs[0].tolist())
    print(f"{name}: {(targets != -100).sum()} targets, {mask.float().mean():.0%} of all pairs of positions are seen")
    print(f"   {text!r}")


# %%
def train_with(name: str, num_steps: int) -> list[dict[str, float]]:
    """Train the small model with this objective; the loss on hidden tokens of unseen text, ten times on the way."""
    generator, objective = random.Random(seed), OBJECTIVES[name]

    def losses(model, rows: Tensor, hidden: list[int]) -> Tensor:
        inputs, targets, mask = objective(rows, hidden)
        logits = model(inputs, mask).float().transpose(1, 2)  # (batch, vocab, seq)
        return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")  # (batch, seq)

    def loss_fn(model, batch: dict[str, Tensor]) -> Tensor:
        loss = losses(model, batch["input_ids"], random_positions(generator))
        return loss.sum() / (loss != 0).sum()

    def evaluate(model) -> dict[str, float]:
        draws = [random_positions(random.Random(f"{seed}/{draw}")) for draw in range(2)]
        shift = 0 if name == "masked" else 1  # the others predict a token at the position before it
        places = [[position - shift for position in hidden if position >= SHORT // 2] for hidden in draws]
        found = [losses(model, unseen, hidden)[:, at].mean() for hidden, at in zip(draws, places, strict=True)]
        return {"loss": torch.stack(found).mean().item()}

    recipe = TrainConfig(
        max_steps=num_steps, learning_rate=6e-3, warmup_steps=20, precision=precision, log_every=50,
        evaluate_every=max(1, num_steps // 10),
    )  # fmt: skip
    batches = batches_of(descriptions, num_steps, batch_size=32)
    return train(new_transformer(), batches, recipe, loss_fn=loss_fn, evaluate=evaluate).evaluations


on_the_way = {name: train_with(name, lesson.scaled(320)) for name in OBJECTIVES}

# %%
for name, entries in on_the_way.items():
    print(f"{name:>21}: " + " ".join(f"{entry['loss']:.2f}" for entry in entries))
    lesson.report(f"loss on hidden tokens, {name}", f"{entries[-1]['loss']:.2f} nats")
alt = "Loss on hidden tokens of unseen text over steps: the causal line falls first, the masked one much later."
figure = plots.curve(
    {name: ([e["step"] for e in entries], [e["loss"] for e in entries]) for name, entries in on_the_way.items()},
    title="With few targets in a row of text, the masked objective starts late",
    xlabel="steps",
    ylabel="loss on the same hidden tokens (nats)",
    alt=alt,
)
plots.show(figure, alt)
early = {name: entries[1]["loss"] for name, entries in on_the_way.items()}
print("after a fifth of the steps:", ", ".join(f"{name} {loss:.2f}" for name, loss in early.items()))
lesson.claim(
    "early on, the masked model is at least 1 nat behind the causal one",
    early["masked"] - early["causal"],
    at_least=1,
    form=".2f",
)
gain = {name: entries[len(entries) // 2 - 1]["loss"] - entries[-1]["loss"] for name, entries in on_the_way.items()}
print("gain in the second half:", ", ".join(f"{name} {value:.2f}" for name, value in gain.items()))
lesson.claim(
    "in the second half of the steps it gains at least twice as much",
    gain["masked"] / gain["causal"],
    at_least=2,
    form=".2f",
)

# %% [markdown]
# **What you see.** Every token of a row teaches the causal model something, and half of them teach the sequence-to-sequence model: these two go nearly together. The masked model learns from one token in six, and has to find out from these few where its neighbours are before it can use them. So it starts late. This is one reason why large models are trained causally; the other is that they can write. But in the second half the masked line is the steepest. Models that only read, for search or classification, are still trained this way, for many more steps than here.
#
# ## 5 · Before transformers: a race at equal time
#
# **Question.** What came before, and does a transformer beat it when all get the same text and the same time?
#
# **The n-gram model** counts. After a context of $n-1$ tokens it predicts what followed that context in the training text. Long contexts are rare, so each order is mixed with the next shorter one. Witten and Bell (1991) weigh by how many *different* tokens have followed: with $c(h, w)$ the count of token $w$ after context $h$, and $t(h)$ the number of different tokens after it,
#
# $$p(w \mid h) = \frac{c(h, w) + t(h)\, p(w \mid h')}{\sum_v c(h, v) + t(h)}, \qquad h' = h \text{ without its first token}$$
#
# **The LSTM** (Hochreiter & Schmidhuber 1997) reads one token after the other and keeps a vector of fixed size as its memory. It has to decide what to keep before it knows what will be asked, and its steps cannot be computed side by side.
#
# The loss is given in **bits per byte** of unseen text, which does not depend on the tokenizer: the sum of all $-\log_2 p$, divided by the number of bytes.

# %%
ORDER = 4  # tokens: the predicted one and three before it


def count_ngrams(counts: list[dict], row: list[int]) -> None:
    """Add a row of token ids to counts[n][context of n tokens][next token]."""
    for position, token in enumerate(row):
        for n in range(min(ORDER, position + 1)):
            counts[n][tuple(row[position - n : position])][token] += 1


def ngram_probability(counts: list[dict], context: list[int], token: int) -> float:
    """The formula above, from the empty context up to the longest one that was seen."""
    probability = 1 / TOKENS
    for n in range(min(ORDER, len(context) + 1)):
        followers = counts[n].get(tuple(context[len(context) - n :]))
        if followers is None:
            break
        different = len(followers)
        probability = (followers[token] + different * probability) / (followers.total() + different)
    return probability


def ngram_nats(counts: list[dict], rows: list[list[int]]) -> float:
    """Total loss of all tokens of the rows but the first of each."""
    return -sum(math.log(ngram_probability(counts, row[:i], row[i])) for row in rows for i in range(1, len(row)))


class LSTM(nn.Module):
    """Token ids (batch, seq) -> logits (batch, seq, vocab), with tied embeddings."""

    def __init__(self, hidden_size: int = 256):
        super().__init__()
        self.embed_tokens = nn.Embedding(TOKENS, hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=SMALL.initializer_range)
        self.lstm = nn.LSTM(hidden_size, hidden_size, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lstm(self.embed_tokens(input_ids))[0] @ self.embed_tokens.weight.T


# %%
unseen_rows = rows_of(held_out, 129)[:64]
num_bytes = {token_id: len(token) for token_id, token in token_bytes.items()}  # the end-of-text token has none


@torch.no_grad()
def bits_per_byte(model, rows: Tensor) -> float:
    """Loss of the rows in bits per byte; `model` is a network or the counts of an n-gram model."""
    if isinstance(model, nn.Module):
        nats = causal_loss(model, {"input_ids": rows}).item() * rows[:, 1:].numel()
    else:
        nats = ngram_nats(model, rows.tolist())
    return nats / math.log(2) / sum(num_bytes.get(token, 0) for token in rows[:, 1:].flatten().tolist())


def train_step(model: nn.Module, optimizer, inputs: Tensor, bits: int) -> float:
    """One step on rows (batch, seq + 1), and the seconds it took."""
    started = time.perf_counter()
    with torch.autocast(machine.device, torch.bfloat16, enabled=bits == 16):
        loss = causal_loss(model, {"input_ids": inputs})
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for a GPU
    return time.perf_counter() - started


# %%
def race(name: str, make, num_steps: int = 0, seconds: float = math.inf, peak_rate: float = 8e-3) -> tuple:
    """Train for so many steps or so much wall time, evaluation not counted; the model and its laps (seconds, bits)."""

    def start() -> tuple:
        torch.manual_seed(seed)
        model = make().to(machine.device)
        return model, torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.1)

    times = {bits: min(train_step(*start(), rows[:16], bits) for _ in range(3)) for bits in settings["bits"]}
    bits = min(times, key=times.get)  # the faster format for this network on this machine
    model, optimizer = start()
    generator, used, steps, laps = torch.Generator().manual_seed(seed), 0.0, 0, []
    with tqdm(total=100, desc=name, unit="%") as bar:
        while (done := steps / num_steps if num_steps else used / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * schedule(1000 * done, 1000, 40)
            drawn = torch.randint(len(rows), (16,), generator=generator)
            used, steps = used + train_step(model, optimizer, rows[drawn], bits), steps + 1
            bar.update(int(100 * done) - bar.n)
            if done >= len(laps) / 10:
                laps.append((used, bits_per_byte(model, unseen_rows)))
    laps.append((used, bits_per_byte(model, unseen_rows)))
    print(f"{name}: {16 * 128 * steps:,} tokens in {used:.1f} s, in {bits} bits: {laps[-1][1]:.3f} bits per byte")
    return model, laps[1:]  # without the first step


# %%
ngram, used, laps = [defaultdict(Counter) for _ in range(ORDER)], 0.0, []
for part in rows[: max(4, round(budget * len(rows)))].chunk(4):
    started = time.perf_counter()
    for row in part.tolist():
        count_ngrams(ngram, row)
    used += time.perf_counter() - started
    laps.append((used, bits_per_byte(ngram, unseen_rows)))
print(f"n-gram: {rows[:, 1:].numel():,} tokens in {used:.1f} s: {laps[-1][1]:.3f} bits per byte")
transformer, transformer_laps = race("transformer", new_transformer, num_steps=lesson.scaled(480))
lstm, lstm_laps = race("LSTM", LSTM, seconds=transformer_laps[-1][0])
results = {"n-gram": laps, "LSTM": lstm_laps, "transformer": transformer_laps}

# %% tags=["headline"]
counted_at, counted = results["n-gram"][-1]
end = transformer_laps[-1][0]
lines = {name: tuple(zip(*laps, strict=True)) for name, laps in results.items()}
lines["n-gram"] = ([*lines["n-gram"][0], end], [*lines["n-gram"][1], counted])  # all counted: the rest is waiting
alt = "Bits per byte of unseen text over seconds: the n-gram line falls at once and stays flat, the networks cross it."
figure = plots.curve(
    lines,
    title="Counting wins the first seconds, the networks win the race",
    xlabel="training time (s)",
    ylabel="bits per byte of unseen text",
    alt=alt,
)
plots.show(figure, alt)
racers = {"n-gram": ngram, "LSTM": lstm, "transformer": transformer}
print(f"{'bits per byte':>15}" + "".join(f"{name:>13}" for name in racers))
by_kind = {}
for kind in ("description", "story", "sums", "passage", "mapping", "repeat"):
    kind_rows = rows_of(list(islice(world.documents(seed + 1, {kind: 1.0}), 60)), 129)[:24]
    by_kind[kind] = {name: bits_per_byte(model, kind_rows) for name, model in racers.items()}
    print(f"{kind:>15}" + "".join(f"{value:13.3f}" for value in by_kind[kind].values()))
final = {name: laps[-1][1] for name, laps in results.items()}
half = transformer_laps[len(transformer_laps) // 2][1]
early = {name: next(bits for used, bits in laps if used >= min(counted_at, end)) for name, laps in results.items()}
print(f"at second {counted_at:.1f} the n-gram model has counted all: {final['n-gram']:.3f} bits per byte;", end=" ")
print(f"LSTM {early['LSTM']:.3f}, transformer {early['transformer']:.3f}")
print(f"transformer: {half:.3f} at half time, {final['transformer']:.3f} at the end; LSTM: {final['LSTM']:.3f}")
best_network = min(value for name, value in early.items() if name != "n-gram")

# %%
lesson.claim(
    "when all is counted, both networks are behind the n-gram model",
    best_network - early["n-gram"],
    at_least=0,
    form=".2f",
)
lesson.claim(
    "half of its time is enough for the transformer to pass the n-gram model",
    final["n-gram"] - half,
    at_least=0,
    form=".2f",
)
lesson.claim(
    "both networks end at least 10 % ahead of it",
    1 - max(final["LSTM"], final["transformer"]) / counted,
    at_least=0.1,
    form=".0%",
)
lesson.claim(
    "the transformer ends ahead of the LSTM, or within 5 % of it",
    final["transformer"] / final["LSTM"] - 1,
    at_most=0.05,
    form=".1%",
)
for name, bits in final.items():
    lesson.report(f"bits per byte at equal time: {name}", f"{bits:.3f}")

# %% [markdown]
# **What you see.** Counting is done at once, and for a while nothing is better. But more time gives it nothing: it never looks further back than three tokens. The networks pass it, and by most in the last rows of the table, where what comes next stands earlier in the same text. Between the networks it is close at this size and time, and which one has read more tokens depends on the machine: compare the two lines above. Both would go on improving. What the transformer does with more time is the next section.
#
# ## 6 · When abilities appear
#
# **Question.** The loss falls smoothly. Do the abilities of a model grow as smoothly?
#
# While shima-4m was trained, its build stopped every 250 steps and asked the model held-out questions. The record comes with the model. Plot the loss and five abilities over the tokens seen: facts about people that the text mentions often and seldom; *reading*, the answer stands in a passage about strangers; *in-context learning*, pairs of words and labels that exist only in the prompt; and sums of three numbers with written steps.

# %%
record = json.loads((MODEL_FOLDERS["shima-4m"] / "training_curve.json").read_text())
millions = [tokens / 1e6 for tokens in record["tokens"]]
alt = "Loss of shima-4m over millions of tokens: a steep fall, then a slow one."
figure = plots.curve(
    {"loss": (millions, record["loss"])},
    title="The loss of shima-4m falls without a warning of what comes",
    xlabel="tokens seen (millions)",
    ylabel="training loss (nats)",
    alt=alt,
)
plots.show(figure, alt)
ABILITIES = {
    "frequent facts": "closed_book_frequent",
    "rare facts": "closed_book_rare",
    "reading": "open_book",
    "in-context learning": "few_shot_8",
    "sums with steps": "sums_with_steps",
}
seen = [entry["tokens"] / 1e6 for entry in record["evaluations"]]
shares = {label: [entry[name] for entry in record["evaluations"]] for label, name in ABILITIES.items()}
alt = "Share of right answers over millions of tokens: facts rise slowly, reading and in-context learning jump."
figure = plots.curve(
    {label: (seen, values) for label, values in shares.items()},
    title="Facts come bit by bit, reading and in-context learning at once",
    xlabel="tokens seen (millions)",
    ylabel="right answers",
    alt=alt,
    percent=True,
)
plots.show(figure, alt)


# %%
def reached(label: str, share: float) -> float:
    """Millions of tokens after which the ability first has this share of right answers (infinite if never)."""
    return next((tokens for tokens, value in zip(seen, shares[label], strict=True) if value >= share), math.inf)


def loss_at(tokens: float) -> float:
    """Training loss after so many million tokens."""
    return record["loss"][min(range(len(millions)), key=lambda i: abs(millions[i] - tokens))]


rise = {label: (reached(label, 0.25), reached(label, 0.75)) for label in ABILITIES}
for label, (quarter, three_quarters) in rise.items():
    print(f"{label:>20}: 25 % after {quarter:5.1f} M tokens, 75 % after {three_quarters:5.1f} M")
begin, end = rise["in-context learning"]
falls = loss_at(0) - record["loss"][-1], loss_at(begin - seen[0]) - loss_at(end)
print(f"the loss falls by {falls[0]:.2f} in all, and by {falls[1]:.2f} in the evaluations around that jump")
for label in ("in-context learning", "reading"):
    begin, end = rise[label]
    lesson.claim(
        f"{label} needs less than a tenth of the training for its rise",
        (end - begin) / seen[-1],
        at_most=0.1,
        form=".1%",
    )
    lesson.report(f"{label} of shima-4m: from 25 % to 75 %", f"{begin:.1f} M to {end:.1f} M of {seen[-1]:.0f} M tokens")
slow, fast = (rise[label][1] - rise[label][0] for label in ("frequent facts", "reading"))
lesson.claim("frequent facts take at least twice as long as reading", slow / fast, at_least=2, form=".1f")
lesson.claim(
    "the jump of in-context learning takes less than a tenth of the fall of the loss",
    falls[1] / falls[0],
    at_most=0.1,
    form=".1%",
)


# %% [markdown]
# **What you see.** The loss gives no sign of it, but reading and in-context learning rise from almost nothing to almost everything within a small part of the training, while facts are learned one by one, those that the text repeats most first. In other models such a jump comes with a pair of attention heads that find an earlier occurrence of a token and copy what followed it (Olsson et al. 2022); lesson 13 looks for them here. The ruler has its share in the suddenness: an answer counts only if all of it is right (Schaeffer et al. 2023); lesson 04 measures that.
#
# ## 7 · What pretraining saves
#
# **Question.** You need a classifier and have a handful of labelled examples. How many labels is pretraining worth?
#
# The task: is a visitor's review of a town of Shima *good* or *bad*? Take a model without its last matrix, read the final vector of the last token, $f(x) \in \mathbb{R}^d$, and put two numbers on top of it:
#
# $$p(\text{mood} \mid x) = \text{softmax}\big(W f(x)\big), \qquad W \in \mathbb{R}^{2 \times d}$$
#
# All weights are trained on the labels (Howard & Ruder 2018; Radford et al. 2018). This is done twice: once from the pretrained weights of the profile's model, once from fresh weights of the same shape. Each has the best of a few learning rates: pretrained weights want a low one, which leaves in place what they know. A few hundred unseen reviews are the test. Each text is written in the form `Review: ... Mood:`. shima-4m has read some reviews in this form among much other text, as hub models have read product reviews with their stars: pretraining has met a little of everything.

# %%
def moods(n: int, review_seed: int) -> tuple[list[str], list[int]]:
    """Reviews and their moods (1 is good), half of each."""
    generator, found = random.Random(f"moods/{review_seed}"), {"good": [], "bad": []}
    while min(map(len, found.values())) < n // 2:
        text, mood = world.review(generator)
        found[mood].append(text)
    pairs = [(text, int(mood == "good")) for mood, texts in found.items() for text in texts[: n // 2]]
    generator.shuffle(pairs)
    return [text for text, _ in pairs], [label for _, label in pairs]


class MoodClassifier(nn.Module):
    """Two numbers from the final vector of each text's last token."""

    def __init__(self, language_model):
        super().__init__()
        self.body = language_model.base_model
        self.head = nn.Linear(language_model.config.hidden_size, 2, device=language_model.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.body(input_ids=input_ids, attention_mask=attention_mask)
        vectors = output.last_hidden_state  # (batch, seq, hidden)
        last = attention_mask.sum(dim=1) - 1  # padding is on the right
        return self.head(vectors[torch.arange(len(last)), last].to(self.head.weight.dtype))  # (batch, 2)


def mood_batch(tokenizer, texts: list[str], labels: list[int]) -> dict[str, Tensor]:
    """Padded token ids with the labels."""
    prompts = [f"Review: {text}\nMood:" for text in texts]
    encoded = tokenizer(prompts, padding=True, padding_side="right", return_tensors="pt")
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")} | {"moods": torch.tensor(labels)}
    return {name: tensor.to(machine.device) for name, tensor in batch.items()}


# %%
def mood_loss(classifier, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the moods."""
    return F.cross_entropy(classifier(batch["input_ids"], batch["attention_mask"]).float(), batch["moods"])


def accuracy_with(num_labels: int, pretrained: bool) -> Score:
    """Accuracy on unseen reviews after training on so many labelled ones."""
    model, tokenizer = load_model(machine, trained=pretrained, seed=seed)
    classifier = MoodClassifier(model.float())  # weights and updates in 32 bits, products as the profile has them
    texts, labels = moods(num_labels, review_seed=seed)
    generator, (low_rate, high_rate, steps) = random.Random(seed), settings["transfer"]
    drawn = [generator.choices(range(num_labels), k=16) for _ in range(lesson.scaled(steps))]
    batches = [mood_batch(tokenizer, [texts[i] for i in rows], [labels[i] for i in rows]) for rows in drawn]
    rate = low_rate if pretrained else high_rate
    recipe = TrainConfig(len(drawn), rate, warmup_steps=5, precision=lesson.precision, progress=False, seed=seed)
    train(classifier, batches, recipe, loss_fn=mood_loss)
    classifier.eval()
    batch = mood_batch(tokenizer, *moods(200, review_seed=10_000 + seed))
    with torch.no_grad():
        right = (classifier(batch["input_ids"], batch["attention_mask"]).argmax(-1) == batch["moods"]).sum().item()
    return score(right, len(batch["moods"]))


LABELS = [2, 4, 8, 16, 64]
transfer = {"pretrained": [], "from scratch": []}
with tqdm(total=2 * len(LABELS), desc="fine-tunings") as bar:
    for name, scores in transfer.items():
        for num_labels in LABELS:
            scores.append(accuracy_with(num_labels, pretrained=name == "pretrained"))
            bar.update()

# %%
print(f"{'labels':>8}" + "".join(f"{name:>28}" for name in transfer))
for row, num_labels in enumerate(LABELS):
    print(f"{num_labels:>8}" + "".join(f"{scores[row]!s:>28}" for scores in transfer.values()))
alt = "Accuracy over the number of labelled reviews, with intervals: pretrained above from scratch, chance is 50 %."
figure = plots.curve(
    {
        name: (LABELS, [s.accuracy for s in scores], [s.low for s in scores], [s.high for s in scores])
        for name, scores in transfer.items()
    },
    title="Pretraining replaces labels",
    xlabel="labelled reviews",
    ylabel="accuracy on unseen reviews",
    alt=alt,
    log_x=True,
    percent=True,
    references={"chance": 0.5},
)
plots.show(figure, alt)
few = {name: sum(s.accuracy for s in scores[:3]) / 3 for name, scores in transfer.items()}
enough = transfer["pretrained"][LABELS.index(16)].accuracy
print("mean over 2, 4 and 8 labels:", ", ".join(f"{name} {100 * value:.0f} %" for name, value in few.items()))
ahead, full = few["pretrained"] - few["from scratch"], transfer["from scratch"][-1].accuracy
lesson.claim("with so few labels the pretrained model is at least 15 points ahead", ahead, at_least=0.15, form=".0%")
lesson.claim(
    "with 16 labels it is as good as the other with 64 (2 points allowed)", enough - full, at_least=-0.02, form=".0%"
)
for name, scores in transfer.items():
    shares = f"{100 * few[name]:.0f} %; {100 * scores[3].accuracy:.0f} %"
    lesson.report(f"mood of a review, {name}, after 2 to 8 labels; 16", shares)


# %% [markdown]
# **What you see.** With two or four labels the pretrained model is already far above chance, and the model from scratch is not. The pretrained vectors hold what the labels ask for; the labels only have to point at it. From scratch the model must learn from the labels alone which words speak for which mood, so it needs several times as many. The task is easy, with a few dozen telling words, so the gap closes soon.
#
# ## 8 · Exercises
#
# Six, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 3.1, easy: back from tokens to text.
def decode(ids: list[int], token_bytes: dict[int, bytes]) -> str:
    """The text of token ids. Special tokens, which have no entry in `token_bytes`, are left out.

    A character may be spread over several tokens. Bytes that form no character become "\N{REPLACEMENT CHARACTER}".
    """
    raise NotImplementedError


# %% tags=["check"]
def check_decode(decode):
    for text in ("Kodera lives in Bamu.\n", "Grüße aus 島 🙂"):
        expect_equal(f"decode(encode({text!r}), token_bytes)", decode(encode(text), token_bytes), text)
    with_signs = [0, *encode("12 goats"), 1]
    expect_equal("decode of '12 goats' between two special tokens", decode(with_signs, token_bytes), "12 goats")
    broken = encode("島")[:1]
    expect_equal("decode of the first byte of '島'", decode(broken, token_bytes), "\N{REPLACEMENT CHARACTER}")


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
# Exercise 3.2, easy: count the parameters of any Llama.
def num_parameters(config) -> int:
    """Number of weights of LlamaForCausalLM with this configuration.

    Two things differ from section 2. `config.num_key_value_heads` may be smaller than `num_attention_heads`: then
    several heads share keys and values, and their projections are narrower (grouped-query attention, Ainslie et
    al. 2023). Without `config.tie_word_embeddings` the output has a matrix of its own.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_num_parameters(num_parameters):
    from transformers import LlamaConfig, LlamaForCausalLM

    base = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3}
    for changes in (
        {"tie_word_embeddings": True},
        {"tie_word_embeddings": True, "num_key_value_heads": 2},
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
    ):
        config = LlamaConfig(**base, num_attention_heads=8, **changes)
        with torch.device("meta"):  # shapes only, no memory
            expected = LlamaForCausalLM(config).num_parameters()
        expect_equal(f"num_parameters of a model with {changes}", num_parameters(config), expected)


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
def wsd(step: int, num_steps: int, warmup_steps: int, decay_share: float = 0.2, end: float = 0.1) -> float:
    """Share of the peak learning rate at this step, counted from 0 (Hu et al. 2024).

    After the same warm-up as in `schedule` it stays at 1. In the last `decay_share` of the steps after the warm-up it
    falls in a straight line towards `end`, which it would reach at step `num_steps`. A run can be prolonged from any
    point of the flat part, which a cosine does not allow.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_wsd(wsd):
    from helpers.training import TrainConfig, learning_rate_factor

    for num_steps, warmup_steps, decay_share, end in ((100, 10, 0.2, 0.1), (50, 0, 0.5, 0.0), (80, 20, 0.25, 0.02)):
        shape = {"schedule": "wsd", "decay_fraction": decay_share, "min_learning_rate_ratio": end}
        config = TrainConfig(num_steps, warmup_steps=warmup_steps, **shape)
        for step in range(num_steps):
            call = f"wsd({step}, {num_steps}, {warmup_steps}, {decay_share}, {end})"
            share = wsd(step, num_steps, warmup_steps, decay_share, end)
            expect_close(call, share, learning_rate_factor(step, config))


check("3.3", check_wsd, wsd)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The decay begins when the steps that are left are `decay_share` of the steps after the warm-up.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def wsd(step: int, num_steps: int, warmup_steps: int, decay_share: float = 0.2, end: float = 0.1) -> float:
#     if step < warmup_steps:
#         return (step + 1) / warmup_steps
#     left = (num_steps - step) / (num_steps - warmup_steps)  # share of the steps after the warm-up
#     return end + (1 - end) * min(1.0, left / decay_share)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 3.4, medium: BERT's rule.
def bert_mask(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs and targets of masked language modelling (Devlin et al. 2019, section 3.1) for token ids (batch, seq).

    15 % of the tokens are chosen at random, never special ones (ids below NUM_SPECIAL). Of the chosen ones 80 % become
    MASK in the inputs, 10 % another token at random (any id from NUM_SPECIAL to TOKENS - 1), and 10 % stay as they
    are. The targets are the chosen tokens, and -100 elsewhere. `rows` must not change. Draw from `generator`.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_bert_mask(bert_mask):
    rows = torch.randint(0, TOKENS, (200, 100), generator=torch.Generator().manual_seed(1))
    before = rows.clone()
    inputs, targets = bert_mask(rows, torch.Generator().manual_seed(2))
    expect_equal("rows after the call", rows, before)
    chosen = targets != -100
    expect_true("the targets are the tokens of the rows", (targets[chosen] == rows[chosen]).all())
    expect_true("what is not chosen stays the same in the inputs", (inputs[~chosen] == rows[~chosen]).all())
    expect_true("no special token is chosen", (rows[chosen] >= NUM_SPECIAL).all())
    ordinary = rows >= NUM_SPECIAL
    expect_close("share of the ordinary tokens that are chosen", chosen[ordinary].float().mean(), 0.15, 0.015)
    given, original = inputs[chosen], rows[chosen]
    expect_close("share of MASK among the chosen", (given == MASK).float().mean(), 0.8, 0.03)
    expect_close("share of the chosen that stay", (given == original).float().mean(), 0.1, 0.025)
    others = given[(given != MASK) & (given != original)]
    expect_true("random tokens are no special ones", others.min() >= NUM_SPECIAL)
    expect_true("random tokens are of many kinds", len(others.unique()) > 100)


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
    """Causal mask (seq, seq), True where one may look, for a row (seq,) in which several documents are packed.

    A position sees itself and what stands before it in its own document. The end-of-text token belongs to the
    document that it ends.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_document_mask(document_mask):
    T, o = True, False
    expected = torch.tensor([[T, o, o, o, o], [T, T, o, o, o], [o, o, T, o, o], [o, o, o, T, o], [o, o, o, T, T]])
    expect_equal("document_mask of [7, 0, 0, 8, 9]", document_mask(torch.tensor([7, 0, 0, 8, 9])), expected)
    documents = [torch.tensor([*encode_small(text), 0]) for text in held_out[:3]]
    packed, model = torch.cat(documents), new_transformer().cpu()
    with torch.no_grad():  # RoPE knows distances only, so it does not matter where in the row a document begins
        together = model(packed[None], document_mask(packed))[0].split([len(document) for document in documents])
        alone = [model(document[None])[0] for document in documents]
    for number, (logits, expected) in enumerate(zip(together, alone, strict=True), start=1):
        expect_close(f"the logits of packed document {number}", logits, expected, 1e-3)


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
# Exercise 3.6, open: a better recipe for 60 steps.
def my_recipe() -> dict:
    """Keyword arguments for `trial` in the cell below; what you leave out keeps its default.

    Train a model with at most as many parameters as the default one, on the same 60 small batches, to a loss on
    unseen text at least 0.15 nats lower. You may change the shape of the model, its first weights, the learning rate
    and the warm-up. Ask one question at a time, and note what each answer was.
    """
    raise NotImplementedError


# %% tags=["check"]
def trial(
    hidden=128, inner=352, layers=2, heads=4, initializer_range=0.02, learning_rate=1e-3, warmup_steps=20
) -> tuple[float, int]:
    """Loss on unseen text after 60 steps (about 2 s), and the number of parameters."""
    model = new_transformer(
        LlamaConfig(
            vocab_size=TOKENS, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, initializer_range=initializer_range,
        )
    )  # fmt: skip
    config = TrainConfig(max_steps=60, learning_rate=learning_rate, warmup_steps=warmup_steps, progress=False)
    train(model, batches_of(rows[:, :65], 60, batch_size=8), config, loss_fn=causal_loss)
    with torch.no_grad():
        loss = causal_loss(model, {"input_ids": unseen_rows[:32]}).item()
    return loss, sum(parameter.numel() for parameter in model.parameters())


def check_recipe(my_recipe):
    recipe = my_recipe()
    (loss, parameters), (default_loss, most) = trial(**recipe), trial()
    expect_true(f"{parameters:,} parameters are at most {most:,}", parameters <= most)
    expect_true(f"loss {loss:.2f} is at least 0.15 below the default's {default_loss:.2f}", loss <= default_loss - 0.15)


check("3.6", check_recipe, my_recipe)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Sixty steps are very few: begin with the learning rate and the warm-up, then look at the size of the first weights.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# One of many. With 60 steps there is no time to lose: a learning rate far above that of a long run, a short warm-up, and larger first weights, so that the tied output matrix can tell tokens apart from the start.
#
# ```python
# def my_recipe() -> dict:
#     return {"learning_rate": 8e-3, "warmup_steps": 5, "initializer_range": 0.05}
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
# Nobody writes the model and the loop again for each run. With `transformers` the profile's model is loaded, and trained further on new text, in a few lines. This is *continued pretraining*: the same objective, other text, a lower learning rate. Here the text is Shima's medicine, which shima-4m has never read (and no hub model either). Watch the loss on the new text, and on text of the old kind.

# %%
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from helpers.data import pack, text_dataset
from helpers.evaluation import perplexity

model, tokenizer = load_model(machine)
model = model.float()


def packed(texts: list[str]) -> Dataset:
    """Rows of 128 tokens, input and target at once; documents end with the end-of-text token."""
    documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    rows = list(pack(documents, 128))
    return Dataset.from_dict({"input_ids": rows, "labels": rows}).with_format("torch")


new_text = list(islice(world.documents(seed, {"medicine": 1.0}), 600))
old_text = text_dataset(text_id or machine, 150, seed=10_000 + seed)["text"]
sets = {"new": packed(new_text[:100]), "old": packed(list(old_text))}
arguments = TrainingArguments(
    output_dir=str(ROOT / "build" / "03_pretraining"), max_steps=lesson.scaled(settings["practice"][1]),
    learning_rate=settings["practice"][0], lr_scheduler_type="cosine", warmup_steps=5, per_device_train_batch_size=8,
    weight_decay=0.1, save_strategy="no", logging_steps=10, disable_tqdm=True, report_to="none", seed=seed,
    fp16=lesson.precision == "fp16-mixed", bf16=lesson.precision == "bf16-mixed", use_cpu=machine.device == "cpu",
)  # fmt: skip
trainer = Trainer(model, arguments, train_dataset=packed(new_text[100:]))
before = {name: math.log(perplexity(model.eval(), rows.iter(8))) for name, rows in sets.items()}
trainer.train()
after = {name: math.log(perplexity(model.eval(), rows.iter(8))) for name, rows in sets.items()}
for name in sets:
    print(f"{name} text: {before[name]:.2f} -> {after[name]:.2f} nats per token")
lesson.claim(
    "the loss on the new text falls by at least a quarter", 1 - after["new"] / before["new"], at_least=0.25, form=".0%"
)
lesson.claim(
    "the old text gains nothing from it (2 % allowed)", 1 - after["old"] / before["old"], at_most=0.02, form=".1%"
)

# %% [markdown]
# The old text suffers: the model forgets. Lesson 14 measures that and its remedy, to mix old text in.
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
# - Shannon 1951, *Prediction and Entropy of Printed English*: n-grams, and what a bit per character means.
# - Bengio et al. 2003, *A Neural Probabilistic Language Model*: the first neural one with learned word vectors.
# - Hochreiter & Schmidhuber 1997, *Long Short-Term Memory*.
# - Witten & Bell 1991, *The Zero-Frequency Problem*.
# - Sennrich et al. 2016, *Neural Machine Translation of Rare Words with Subword Units*: byte-pair encoding.
# - Vaswani et al. 2017, *Attention Is All You Need*.
# - Radford et al. 2018, *Improving Language Understanding by Generative Pre-Training*; 2019, *Language Models are Unsupervised Multitask Learners*.
# - Devlin et al. 2019, *BERT*; Joshi et al. 2020, *SpanBERT*; Raffel et al. 2020, *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer* (T5).
# - Zhang & Sennrich 2019, *Root Mean Square Layer Normalization*; Shazeer 2020, *GLU Variants Improve Transformer*; Su et al. 2021, *RoFormer*; Touvron et al. 2023, *LLaMA*.
# - Kingma & Ba 2015, *Adam*; Loshchilov & Hutter 2019, *Decoupled Weight Decay Regularization*; Micikevicius et al. 2018, *Mixed Precision Training*; Hu et al. 2024, *MiniCPM*.
# - Ainslie et al. 2023, *GQA*.
# - Howard & Ruder 2018, *Universal Language Model Fine-tuning for Text Classification*.
# - Olsson et al. 2022, *In-context Learning and Induction Heads*; Schaeffer et al. 2023, *Are Emergent Abilities of Large Language Models a Mirage?*
