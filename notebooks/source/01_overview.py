# %% [markdown]
# # 01 · Overview: three generations of language models
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/01_overview.ipynb)
#
# A language model assigns a probability to every possible next piece of a text. In this lesson you build three of them on the same text with the same number of seconds: a table of counts, a recurrent network and a transformer. You learn the number that compares them, turn probabilities into text, and get a map of everything this course does to a model afterwards.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. compute perplexity in three ways that agree, and see why bits per byte is the fairer unit;
# 2. write an interpolated Kneser-Ney model whose probabilities sum to one, and an LSTM step that equals `nn.LSTM`;
# 3. race counts, LSTM and transformer at equal time, and compare perplexity, samples, time and memory;
# 4. write temperature, top-k, top-p, min-p and repetition penalty, each equal to the one in `transformers`, and measure what they do to a text;
# 5. compare the methods of the course by what they change, what they cost and when to use them.
#
# **Prerequisites:** Python and PyTorch tensors; no other lesson.
#
# **The text** is about *Shima*, an island made up by a seeded generator, so no model has ever read about it. **The base model** is *shima-4m*, a small Llama pretrained on other such text, which comes with the course. On a GPU profile the text is short stories in simple English and the model an open one from the hub.
#
# | symbol | meaning |
# |---|---|
# | $x_1 \dots x_T$ | a text as token ids, $T$ tokens long (`seq` in the comments) |
# | $V$ | number of tokens in the vocabulary (`vocab`) |
# | $h$ | the context: the tokens before the one that is predicted |
# | $p(w \mid h)$ | probability that token $w$ comes next |

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
model_id = ""  # another model for sections 1, 2, 7 and 8: a hub id, or a folder in hub format
text_id = ""  # another text: a hub dataset or a .jsonl file with a field "text"
seed = 0
budget = 1.0  # share of the seconds and documents; the lesson's claims are asserted from 1.0 on

# %% [markdown]
# The next cell holds what depends on the hardware: one row of settings per profile, and nothing else in this notebook looks at the hardware. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep, `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
import copy
import math
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from helpers import evaluation, plots
from helpers.data import pack, text_dataset
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.lesson import Lesson, show_table
from helpers.models import load_model

lesson = Lesson("01", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # widths: of LSTM and transformer; layers: of the transformer; base_rows: test rows for the base model
    "cpu": {"documents": 2400, "vocab": 512, "seconds": 24, "widths": (256, 128), "layers": 2, "base_rows": 48},
    "t4": {"documents": 6000, "vocab": 2048, "seconds": 60, "widths": (640, 384), "layers": 6, "base_rows": 8},
    "large": {"documents": 9000, "vocab": 4096, "seconds": 60, "widths": (1024, 512), "layers": 8, "base_rows": 16},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# ## 1 · What a language model is
#
# **Question.** What does a model have to know to be good at text?
#
# Any text has a probability, and the chain rule splits it into one factor per token without any approximation:
#
# $$p(x_1 \dots x_T) = \prod_{t=1}^{T} p(x_t \mid x_1 \dots x_{t-1})$$
#
# So a model of texts is nothing but a function from a context to $V$ probabilities that sum to one. Everything that helps to guess the next token helps: spelling, grammar, facts about the world, arithmetic. That is why one simple objective is enough to learn so much, and why the three generations below differ only in how they compute $p(w \mid h)$.
#
# First the text. A tenth of it is held out, and one half of that tenth is for choosing settings (*validation*), the other for the numbers that we report (*test*). A held-out document that also stands in the training text would test memory only, so such documents are dropped.
#
# **Tokens.** A model does not see letters but *tokens*, pieces of text from a fixed list. Lesson 03 writes the algorithm that finds a good list (byte-pair encoding); here the library finds one on the training text. All three models of the race use it. The text is then one long row of numbers, with an end-of-text token (number 0) after each document, cut into rows of 129: each token of a row but the first is predicted from those before it.

# %%
texts = list(text_dataset(text_id or machine, max(600, round(settings["documents"] * budget)), seed=seed)["text"])
num_held_out = len(texts) // 11
training_texts = texts[:-num_held_out]
seen = set(training_texts)
held_out = [text for text in texts[-num_held_out:] if text not in seen]
validation_texts, test_texts = held_out[::2], held_out[1::2]
print(f"{len(training_texts):,} documents to train on, {len(validation_texts)} + {len(test_texts)} held out", end=" ")
print(f"({num_held_out - len(held_out)} dropped). A document:\n")
print(min(training_texts[:50], key=lambda text: abs(len(text) - 250)))

# %%
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB, END = settings["vocab"], "<|endoftext|>"
bpe = Tokenizer(models.BPE())
digits_alone = pre_tokenizers.Digits(individual_digits=True)
bpe.pre_tokenizer = pre_tokenizers.Sequence([digits_alone, pre_tokenizers.ByteLevel(add_prefix_space=False)])
bpe.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
bpe.train_from_iterator(training_texts[:2000], trainer)
VOCAB = bpe.get_vocab_size()  # a short text may not have enough pairs to merge


def rows_of(some_texts: list[str]) -> Tensor:
    """The texts, joined and cut: (rows, 129)."""
    documents = [[*encoding.ids, 0] for encoding in bpe.encode_batch(some_texts)]
    return torch.tensor(list(pack(documents, 129)), device=machine.device)


rows, validation_rows, test_rows = rows_of(training_texts), rows_of(validation_texts)[:64], rows_of(test_texts)[:64]
test_bytes = sum(len(bpe.decode(row).encode()) for row in test_rows[:, 1:].tolist())  # END counts none
print(f"{rows.numel():,} training tokens; {test_rows[:, 1:].numel():,} test tokens are {test_bytes:,} bytes")
print(" | ".join(bpe.decode([token]) for token in test_rows[0, :40].tolist() if token).replace("\n", "\\n"))

# %% [markdown]
# **A first model.** The profile's base model was trained before you came, for far longer than a lesson lasts. Give it the beginning of a held-out document and look at the whole of what it can say: a list of probabilities.

# %%
base, base_tokenizer = load_model(machine)
text = max(test_texts[:50], key=len)
ids = base_tokenizer(text, return_tensors="pt")["input_ids"][:, :40].to(machine.device)
cut = ids.shape[1] // 2
with torch.no_grad():
    probabilities = base(ids[:, :cut]).logits[0, -1].float().softmax(-1)  # (vocab,)
print(f"{machine.model_id}: {base.num_parameters():,} parameters, {len(probabilities):,} tokens\n")
print("..." + base_tokenizer.decode(ids[0, :cut])[-80:], end="\n\n")
for probability, token in zip(*probabilities.topk(5), strict=True):
    print(f"{probability.item():7.1%}  {base_tokenizer.decode(token)!r}")
actual = ids[0, cut]
print(f"\nthe text goes on with {base_tokenizer.decode(actual)!r}, which had {probabilities[actual].item():.1%}")
print(f"sum of all probabilities: {probabilities.sum().item():.6f}")


# %% [markdown]
# ## 2 · Perplexity: one number for a model
#
# **Question.** How good are these probabilities, in one number that can be compared?
#
# A good model gives high probability to what really comes. The usual measure is the mean *surprise* of a token of held-out text, the **cross-entropy**, and its exponential, the **perplexity**:
#
# $$H = -\frac{1}{T} \sum_{t=1}^{T} \ln p(x_t \mid x_1 \dots x_{t-1}) \qquad\qquad \text{PPL} = e^{H}$$
#
# The same number has three readings, and you compute each in its own way:
#
# 1. **$e$ to the mean surprise**, as above. This is what the training loss of a language model is.
# 2. **One over the geometric mean of the probabilities**, $\big(\prod_t p_t\big)^{-1/T}$: the chain rule, corrected for the length of the text.
# 3. **A number of equally likely choices.** With surprise in bits, $-\log_2 p$, the perplexity is $2^{\text{bits}}$: a model with perplexity 8 is as unsure as someone who has to guess a throw of an eight-sided die, which takes 3 bits to write down.
#
# Multiplying the probabilities of a long text directly does not work: see what the first line of the output says.
#
# **A perplexity belongs to its tokenizer.** A model that knows nothing gives each of its $V$ tokens the same probability, and its perplexity is exactly $V$. With a longer list of tokens that is a larger number, though the model is no worse: it also needs fewer tokens for the same text. What can be compared is the surprise of the whole text, in bits, over something that no tokenizer changes, the number of bytes $B$:
#
# $$\text{bits per byte} = \frac{T \, \log_2 \text{PPL}}{B}$$

# %%
def base_rows(some_texts: list[str]) -> Tensor:
    """The texts in tokens of the base model, joined and cut: (rows, 129)."""
    documents = [[*ids, base_tokenizer.eos_token_id] for ids in base_tokenizer(some_texts)["input_ids"]]
    return torch.tensor(list(pack(documents, 129)), device=machine.device)


base_test = base_rows(test_texts)[: settings["base_rows"]]  # (batch, seq + 1)
with torch.no_grad():
    logits = base(base_test).logits[:, :-1].float()  # the last position predicts what is not there
    library_loss = base(base_test, labels=base_test).loss.item()
targets = base_test[:, 1:, None]  # (batch, seq, 1)
log_probabilities = logits.log_softmax(-1).gather(-1, targets).flatten().double()
probabilities = logits.softmax(-1).gather(-1, targets).flatten().double()
product = probabilities.prod().item()
print(f"{len(probabilities):,} tokens; the product of their probabilities is {product}: too small for any number")

ways = {
    "1. e to the mean surprise": math.exp(-log_probabilities.mean().item()),
    "2. inverse geometric mean": (probabilities ** (-1 / len(probabilities))).prod().item(),
    "3. 2 to the bits": 2 ** F.cross_entropy(logits.flatten(0, 1), targets.flatten()).div(math.log(2)).item(),
    "transformers' loss": math.exp(library_loss),
    "helpers.evaluation": evaluation.perplexity(base, [{"input_ids": base_test}]),
}
for way, value in ways.items():
    print(f"{way:<28}{value:.6f}")
spread = max(ways.values()) / min(ways.values()) - 1
assert spread < (1e-4 if machine.dtype == "float32" else 2e-2)
lesson.report("perplexity in five computations, largest relative difference", f"{spread:.1e}")


# %%
def report(nats: float, num_tokens: int, num_bytes: int) -> list[str]:
    """A row of the table: surprise of a text in nats -> perplexity, tokens per byte, bits per byte."""
    perplexity = math.exp(nats / num_tokens)
    bits = evaluation.bits_per_byte(perplexity, num_tokens, num_bytes)
    assert abs(bits - nats / math.log(2) / num_bytes) < 1e-9
    return [f"{perplexity:,.2f}", f"{num_tokens / num_bytes:.2f}", f"{bits:.3f}"]


base_name, base_targets = machine.model_id.split("/")[-1], base_test[:, 1:]
base_bytes = sum(len(base_tokenizer.decode(row, skip_special_tokens=True).encode()) for row in base_targets.tolist())
count = base_targets.numel(), base_bytes
ours = test_rows[:, 1:].numel(), test_bytes
frequencies = torch.bincount(rows.flatten(), minlength=VOCAB).double() + 1  # add one: none may be impossible
unigram_nats = -(frequencies / frequencies.sum()).log()[test_rows[:, 1:]].sum().item()
table = {
    "knows nothing, tokens of the base model": report(count[0] * math.log(logits.shape[-1]), *count),
    "knows nothing, our tokens": report(ours[0] * math.log(VOCAB), *ours),
    "frequencies only, our tokens": report(unigram_nats, *ours),
    base_name: report(-log_probabilities.sum().item(), *count),
}
show_table(table, ["perplexity", "tokens/byte", "bits/byte"])
base_bits = float(table[base_name][-1])


# %% [markdown]
# **What you see.** The two models that know nothing have very different perplexities, and the one with the larger perplexity needs fewer bits. From here on the three models of the race share one tokenizer, so both units rank them alike; when a model with other tokens joins, only bits per byte count.
#
# ## 3 · First generation: counting
#
# **Question.** How far does one get by counting what followed what?
#
# An **n-gram model** looks at the last $n-1$ tokens only and asks what followed them in the training text. Long contexts say more but are rarely seen, so every such model mixes long with short ones. The best classical mixture is **interpolated Kneser-Ney** (Kneser & Ney 1995; Chen & Goodman 1999). With $c(hw)$ the count of context $h$ followed by $w$, and $h'$ the context without its first token:
#
# $$p(w \mid h) = \frac{\max(c(hw) - D, 0)}{\sum_v c(hv)} + \frac{D \cdot N_{1+}(h\,\cdot)}{\sum_v c(hv)} \; p(w \mid h')$$
#
# - **The discount** $D$ is taken from every count that was seen, because what was seen once is usually overcounted. A good estimate comes from the number of n-grams seen once and twice, $D = n_1 / (n_1 + 2 n_2)$.
# - **What was saved goes to the shorter context.** $N_{1+}(h\,\cdot)$ is the number of different tokens after $h$, so the two parts sum to one.
# - **Shorter contexts count differently**, and this is Kneser and Ney's idea. They are asked only when the longer one failed, so what matters is not how often $w$ occurs but after how many *different* tokens: $c(h'w) = N_{1+}(\cdot\, h'w)$. *Francisco* is frequent, but it only ever follows *San*, and so it is a bad guess after anything else.
#
# At the bottom stands $1/V$. The code needs one table for each length of n-gram, and each is made from the distinct entries of the one above.
#
# **How long a context?** Measure on the validation text, with half of the training text and with all of it.

# %%
@dataclass
class Table:
    """What is known about the n-grams of one length."""

    counts: Counter  # n-gram -> times seen (longest ones), or different tokens seen before it (shorter ones)
    totals: Counter  # context -> sum of the counts of its n-grams
    followers: Counter  # context -> number of different tokens after it
    discount: float


def kneser_ney(tokens: list[int], order: int) -> list[Table]:
    """The tables for n-grams of length 1 up to `order`."""
    tables, counts = [], Counter(zip(*(tokens[start:] for start in range(order)), strict=False))
    for _ in range(order):
        totals, followers = Counter(), Counter()
        for ngram, count in counts.items():
            totals[ngram[:-1]] += count
            followers[ngram[:-1]] += 1
        once, twice = (max(1, sum(count == times for count in counts.values())) for times in (1, 2))
        tables.append(Table(counts, totals, followers, once / (once + 2 * twice)))
        counts = Counter(ngram[1:] for ngram in counts)  # every distinct n-gram is one token before the shorter one
    return tables[::-1]


# %%
def ngram_probability(tables: list[Table], context: list[int], token: int) -> float:
    """The formula above, from the empty context up to the longest one that was seen."""
    probability = 1 / VOCAB
    for length, table in enumerate(tables[: len(context) + 1]):
        h = tuple(context[len(context) - length :])
        if h not in table.totals:
            break
        kept = max(table.counts[(*h, token)] - table.discount, 0)
        saved = table.discount * table.followers[h]
        probability = (kept + saved * probability) / table.totals[h]
    return probability


def ngram_nats(tables: list[Table], rows: list[list[int]]) -> float:
    """Surprise of all tokens of the rows but the first of each; only the last tokens of a context matter."""
    longest = len(tables) - 1
    return -sum(
        math.log(ngram_probability(tables, row[max(0, position - longest) : position], row[position]))
        for row in rows
        for position in range(1, len(row))
    )


# %%
tokens = rows.flatten().tolist()
trigrams = kneser_ney(tokens, 3)
contexts = [[], tokens[:1], tokens[5:7], test_rows[0, 10:12].tolist(), [VOCAB - 1, VOCAB - 1]]
sums = [sum(ngram_probability(trigrams, context, token) for token in range(VOCAB)) for context in contexts]
print("sums of the probabilities after five contexts:", ", ".join(f"{total:.8f}" for total in sums))
assert all(abs(total - 1) < 1e-9 for total in sums)
lesson.report("Kneser-Ney, largest distance of a sum of probabilities from 1", f"{max(abs(s - 1) for s in sums):.0e}")

bottom = trigrams[0]
share = {(token,): count / len(tokens) for token, count in Counter(tokens).items()}
after = {word: count / bottom.totals[()] for word, count in bottom.counts.items()}
common = [word for word in share if share[word] > 0.002 and bpe.decode(list(word)).strip().isalpha()]
word = max(common, key=lambda word: share[word] / after[word])
print("discounts for one, two and three tokens:", ", ".join(f"{table.discount:.2f}" for table in trigrams))
print(f"this text's Francisco is {bpe.decode(list(word))!r}: {share[word]:.2%} of all tokens,")
print(f"but it follows only {bottom.counts[word]} different tokens, and gets {after[word]:.2%} without a context")

# %%
ORDERS = range(1, 7)
validation, sweep, stored = validation_rows.tolist(), {"half of the text": [], "all of the text": []}, {}
for name, part in tqdm({"half of the text": len(tokens) // 2, "all of the text": len(tokens)}.items(), desc="texts"):
    for order in ORDERS:
        tables = kneser_ney(tokens[:part], order)
        sweep[name].append(math.exp(ngram_nats(tables, validation) / validation_rows[:, 1:].numel()))
        stored[name, order] = sum(len(table.counts) for table in tables)
alt = "Perplexity over the length of the n-grams: steep from 2 to 3 tokens, then flat; more text is a little lower."
figure = plots.curve(
    {name: (ORDERS[1:], values[1:]) for name, values in sweep.items()},
    title="Three tokens bring most of what counting can bring",
    xlabel="length of the n-grams (tokens)",
    ylabel="perplexity of validation text",
    alt=alt,
)
figure.axes[0].set_xticks(ORDERS[1:])
plots.show(figure, alt)
show_table(
    {name: [f"{value:.2f}" for value in values] for name, values in sweep.items()}
    | {f"n-grams stored, {name}": [f"{stored[name, order]:,}" for order in ORDERS] for name in sweep},
    [f"n = {order}" for order in ORDERS],
)

# %%
whole = dict(zip(ORDERS, sweep["all of the text"], strict=True))
order = min(whole, key=whole.get)
gained = (math.log(whole[1]) - math.log(whole[3])) / (math.log(whole[1]) - math.log(whole[order]))
growth = stored["all of the text", order] / stored["half of the text", order]
print(f"best length on validation text: {order} tokens; n = 3 has {gained:.0%} of what it gains over n = 1")
print(f"twice the text: {growth:.2f} times the n-grams to store")
lesson.claim(
    "three tokens bring more than 80 % of what counting gains over single tokens", gained, at_least=0.8, form=".0%"
)
lesson.claim(
    "the table grows with the text: twice the text needs at least 1.3 times the n-grams",
    growth,
    at_least=1.3,
    form=".2f",
)


# %% [markdown]
# **What you see.** Each further token helps less, because most long contexts of the validation text never occurred in training: the table has nothing to say about them, however large it grows. It cannot know that two contexts are alike, that what it learned about one name holds for the next.
#
# ## 4 · Second generation: a memory of fixed size
#
# **Question.** How can a model use everything before, when it cannot store every context?
#
# A recurrent network reads one token after the other and keeps a *state*, a vector that it updates at every step. Tokens are vectors too, so that similar ones can be treated alike. The **LSTM** (Hochreiter & Schmidhuber 1997) has two vectors, a memory $c$ and an output $s$. Three gates between 0 and 1 decide what to forget, what to write and what to show ($\odot$ multiplies element by element):
#
# $$\begin{aligned}
# i, f, o &= \sigma(W_{i,f,o}\, x_t + U_{i,f,o}\, s_{t-1} + b_{i,f,o}) & g &= \tanh(W_g x_t + U_g s_{t-1} + b_g) \\
# c_t &= f \odot c_{t-1} + i \odot g & s_t &= o \odot \tanh(c_t)
# \end{aligned}$$
#
# The sum in $c_t$ is the point: where $f$ stays near one, the memory and its gradient survive many steps. Write the step, and hold it against the library.

# %%
def lstm_step(x: Tensor, state: tuple[Tensor, Tensor], weights: nn.LSTM) -> tuple[Tensor, Tensor]:
    """One step: x (batch, input), state of two tensors (batch, hidden) -> the next state (output, memory)."""
    output, memory = state
    sums = x @ weights.weight_ih_l0.T + weights.bias_ih_l0 + output @ weights.weight_hh_l0.T + weights.bias_hh_l0
    write, forget, new, show = sums.chunk(4, dim=-1)  # the order in which nn.LSTM stacks its matrices
    memory = forget.sigmoid() * memory + write.sigmoid() * new.tanh()
    return show.sigmoid() * memory.tanh(), memory


torch.manual_seed(seed)
library = nn.LSTM(16, 32, batch_first=True)
x = torch.randn(3, 50, 16)  # (batch, seq, input)
state, outputs = (torch.zeros(3, 32), torch.zeros(3, 32)), []
with torch.no_grad():
    for t in range(x.shape[1]):
        state = lstm_step(x[:, t], state, library)
        outputs.append(state[0])
    expected, (_, expected_memory) = library(x)
differences = (torch.stack(outputs, 1) - expected).abs().max(), (state[1] - expected_memory[0]).abs().max()
print(f"largest difference to nn.LSTM after 50 steps: outputs {differences[0]:.1e}, memory {differences[1]:.1e}")
assert max(differences) < 1e-5
lesson.report("our LSTM step against nn.LSTM, largest difference", f"{max(differences):.0e}")

# %% [markdown]
# A language model around it needs two things more: a vector for each token on the way in, and a score for each token on the way out. One matrix $E$ of shape $(V, d)$ serves both.
#
# ## 5 · Third generation: look back at everything
#
# **Question.** The state must hold whatever may be asked later. What if nothing has to be held?
#
# A **transformer** (Vaswani et al. 2017) keeps the vectors of all earlier tokens and lets each position look back at them. From its own vector a position computes a *query* $q_t$; every position offers a *key* $k_j$ and a *value* $v_j$. The better a key fits the query, the more of its value is taken:
#
# $$a_t = \sum_{j \le t} \frac{e^{q_t \cdot k_j / \sqrt{d}}}{\sum_{i \le t} e^{q_t \cdot k_i / \sqrt{d}}} \; v_j$$
#
# There is no loop over time, so all positions of a text are trained side by side, and a token 100 places back is as close as the last one. The price is that the work grows with the square of the length. Lesson 03 writes every line of it; here the library's `LlamaForCausalLM` does, with a tiny configuration.

# %%
from transformers import LlamaConfig, LlamaForCausalLM


class LSTM(nn.Module):
    """Token ids (batch, seq) -> logits (batch, seq, vocab), with one matrix for input and output."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=0.05)
        self.lstm = nn.LSTM(hidden_size, hidden_size, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lstm(self.embed_tokens(input_ids))[0] @ self.embed_tokens.weight.T


class Transformer(nn.Module):
    """Token ids (batch, seq) -> logits (batch, seq, vocab)."""

    def __init__(self, hidden_size: int, layers: int):
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=hidden_size, intermediate_size=hidden_size * 11 // 4,
            num_hidden_layers=layers, num_attention_heads=hidden_size // 32, tie_word_embeddings=True,
            initializer_range=0.05,
        )  # fmt: skip
        self.llama = LlamaForCausalLM(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.llama(input_ids=input_ids, use_cache=False).logits


# %%
torch.manual_seed(seed)
lstm_width, transformer_width = settings["widths"]
networks = {"LSTM": LSTM(lstm_width), "transformer": Transformer(transformer_width, settings["layers"])}
original, position = test_rows[:1, :32], 20
changed = original.clone()
changed[0, position] = (changed[0, position] + 1) % VOCAB
for name, network in networks.items():
    network.to(machine.device)
    with torch.no_grad():
        moved = (network(original) - network(changed)).abs().amax(-1)[0]  # (seq,)
    print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters. Token {position} changed:", end=" ")
    print(f"predictions before it move by {moved[:position].max():.0e}, the one at it by {moved[position]:.0e}")
    assert moved[:position].max() < 1e-5 < moved[position]


# %% [markdown]
# Neither network can peek: a prediction depends on what stands before it and on nothing after. That has to be so, or training would only teach copying.
#
# ## 6 · The race
#
# **Question.** One text, one tokenizer, the same number of seconds each: who predicts unseen text best, and what does it cost?
#
# **The rules.** Each model gets the training text and so many seconds of wall time on this machine. The n-gram model uses the length of n-grams that the validation text chose, and is done when it has counted everything once. The networks draw rows at random until their time is over, with AdamW and a learning rate that rises for 5 % of the time and then falls. Evaluation does not count as time. On a slow or busy machine everyone gets more seconds, enough for about 300 steps of the transformer (at most 60 s each). The cell that runs the race takes about a minute on two cores.
#
# The networks compute in 32 or in 16 bits, whatever is faster on this machine (lesson 03).
#
# **Memory** is counted, not estimated: for the n-gram model the bytes of its tables as Python holds them; for a network the weights to *use* it, and to *train* it also a gradient and AdamW's two means for each weight, and everything that the forward pass keeps for the backward pass.

# %%
def training_step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> None:
    """One update on rows (batch, seq + 1)."""
    with torch.autocast(machine.device, torch.bfloat16, enabled=use_bfloat16):
        logits = network(batch[:, :-1])  # (batch, seq, vocab)
    F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()).backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_for(network: nn.Module, seconds: float, name: str, peak_rate: float = 8e-3) -> list[tuple[float, float, int]]:
    """Train for so long; return (seconds, bits per byte of the test rows, steps) ten times on the way."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=peak_rate, betas=(0.9, 0.95), weight_decay=0.1)
    generator, used, steps, laps = torch.Generator().manual_seed(seed), 0.0, 0, []
    with tqdm(total=10, desc=name, unit="lap") as bar:
        while used < seconds or not steps:
            started, done = time.perf_counter(), min(1.0, used / seconds)
            for group in optimizer.param_groups:
                group["lr"] = peak_rate * min((done + 0.002) / 0.05, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
            training_step(network, optimizer, rows[torch.randint(len(rows), (16,), generator=generator)])
            used, steps = used + time.perf_counter() - started, steps + 1
            if used >= (len(laps) + 1) * seconds / 10:
                laps.append((used, network_nats(network, test_rows) / math.log(2) / test_bytes, steps))
                bar.update()
    print(f"{name}: {steps} steps, {steps * 16 * 128:,} tokens, {steps * 16 / len(rows):.1f} passes over the text")
    return laps


# %%
def table_bytes(tables: list[Table]) -> int:
    """Memory of the dictionaries and of the tuples in them; the numbers in them are small and mostly shared."""
    dictionaries = [d for table in tables for d in (table.counts, table.totals, table.followers)]
    keys = {id(key): sys.getsizeof(key) for dictionary in dictionaries for key in dictionary}
    return sum(map(sys.getsizeof, dictionaries)) + sum(keys.values())


def network_bytes(network: nn.Module) -> tuple[int, int]:
    """Memory to use a network, and to train it on 16 rows."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in network.parameters()}  # not counted twice

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = F.cross_entropy(network(rows[:16, :-1]).flatten(0, 1), rows[:16, 1:].flatten())
    del loss
    return weights, 4 * weights + sum(kept.values())


# %%
def seconds_per_step(network: nn.Module, repeats: int = lesson.scaled(2, 1)) -> float:
    """Mean time of a training step of a copy, after one to warm up."""
    trial = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(trial.parameters())
    training_step(trial, optimizer, rows[:16])
    started = time.perf_counter()
    for _ in range(repeats):
        training_step(trial, optimizer, rows[:16])
    return (time.perf_counter() - started) / repeats


speed = {}
for use_bfloat16 in (False, True):
    speed[use_bfloat16] = {name: seconds_per_step(network) for name, network in networks.items()}
    times = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in speed[use_bfloat16].items())
    print(f"one step in {'bfloat16' if use_bfloat16 else 'float32'}: {times}")
use_bfloat16 = machine.dtype != "float16" and sum(speed[True].values()) < sum(speed[False].values())
per_step = speed[use_bfloat16]["transformer"]
SECONDS = budget * min(60, max(settings["seconds"], 300 * per_step))
print(f"The race is in {'bfloat16' if use_bfloat16 else 'float32'}; everyone gets {SECONDS:.1f} s.")


# %%
@torch.no_grad()
def network_nats(network: nn.Module, rows: Tensor) -> float:
    """Surprise of all tokens of the rows but the first of each."""
    return F.cross_entropy(network(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()


memory = {name: network_bytes(network) for name, network in networks.items()}
started = time.perf_counter()
ngram = kneser_ney(tokens, order)
counting_seconds = time.perf_counter() - started
memory["n-gram"] = (table_bytes(ngram),) * 2
ngram_bits = ngram_nats(ngram, test_rows.tolist()) / math.log(2) / test_bytes
print(f"n-gram, n = {order}: {len(tokens):,} tokens counted in {counting_seconds:.1f} s")
laps = {name: train_for(network, SECONDS, name) for name, network in networks.items()}

# %% tags=["headline"]
final = {"n-gram": ngram_bits} | {name: points[-1][1] for name, points in laps.items()}
lines = {name: tuple(zip(*points, strict=True))[:2] for name, points in laps.items()}
lines["n-gram"] = ([counting_seconds, max(counting_seconds, SECONDS)], [ngram_bits] * 2)
alt = "Bits per byte of unseen text over seconds: the n-gram line is flat from its start, those of the networks fall."
figure = plots.curve(
    lines,
    title="Counting is done at once, the networks go on learning",
    xlabel="training time (s)",
    ylabel="bits per byte of test text",
    alt=alt,
)
plots.show(figure, alt)
parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
parameters["n-gram"] = sum(len(table.counts) + 2 * len(table.totals) for table in ngram)
seconds = {name: points[-1][0] for name, points in laps.items()} | {"n-gram": counting_seconds}
rows_to_show = {}
for name, bits in final.items():
    perplexity = 2 ** (bits * test_bytes / test_rows[:, 1:].numel())
    megabytes = [f"{size / 1e6:,.0f} MB" for size in memory[name]]
    numbers = [f"{perplexity:.2f}", f"{bits:.3f}", f"{seconds[name]:.1f} s", f"{parameters[name]:,}"]
    rows_to_show[name] = [*numbers, *megabytes]
    lesson.report(f"bits per byte at the end of the race: {name}", f"{bits:.3f}")
rows_to_show[base_name] = ["", f"{base_bits:.3f}", "", f"{base.num_parameters():,}", "", ""]
show_table(rows_to_show, ["perplexity", "bits/byte", "training", "numbers stored", "to use it", "to train it"])

# %%
early = {name: next((bits for used, bits, _ in laps[name] if used >= counting_seconds), math.inf) for name in laps}
lesson.claim(
    "when the n-gram model has counted everything, both networks are behind it",
    min(early.values()) - ngram_bits,
    at_least=0,
    form=".3f",
)
num_steps = laps["transformer"][-1][2]
enough = num_steps >= 250
if not enough:
    print("This machine is too busy for the race, so the claims about the networks are not insisted on.")
ahead = ngram_bits - max(final["LSTM"], final["transformer"])
lesson.claim("at the end both networks are ahead of it", ahead, at_least=0, insist=enough, form=".3f")
as_many = next((bits for _, bits, steps in laps["LSTM"] if steps >= num_steps), final["LSTM"])
print(
    f"after the {num_steps} steps that the transformer made: LSTM {as_many:.3f}, transformer {final['transformer']:.3f}"
)
ahead = as_many - final["transformer"]
lesson.claim(
    "for the same number of tokens the transformer is ahead of the LSTM", ahead, at_least=0, insist=enough, form=".3f"
)
lesson.report(
    "bits per byte by which the transformer is ahead of the LSTM at the same seconds",
    final["LSTM"] - final["transformer"],
)
largest = max(memory[name][0] for name in laps)
lesson.claim(
    "the tables take more than ten times the memory of either network",
    memory["n-gram"][0] / largest,
    at_least=10,
    form=".1f",
)


# %% [markdown]
# **What you see.** The n-gram model is finished after a moment and leads the first seconds; counting needs no second look at anything. Then the networks pass it, in a small part of its memory, because what they learn about one word serves for similar ones. Between the two networks the race is close. The transformer learns more from each token, but on a processor without a GPU one of its steps takes longer than one of this LSTM, so after so few seconds either may be ahead (the last claim is reported, not insisted on). What decided for the transformer in practice is that it computes all positions side by side: the hardware for that is the GPU, and there the time per token counts and not the number of steps through a text. The last row of the table is a transformer that read other text of the same kind for an hour: most of what can be predicted, nobody in this race has found yet.
#
# **The samples.** Numbers are one half. Let each model continue the same beginning, one token at a time, each drawn from the model's own probabilities.
#
# All three write something that looks like the text. The difference is in what a sentence has to do with the one before it. That can be measured.
#
# **What does each model make of its context?** Hide all but the last $k$ tokens before the one to be predicted, and see how the surprise falls as $k$ grows. For every $k$ the predicted tokens are the same ones.

# %%
def next_probabilities(model, context: list[int]) -> Tensor:
    """The distribution (vocab,) after a context, of a network or of the tables of an n-gram model."""
    if isinstance(model, list):
        longest = len(model) - 1
        recent = context[max(0, len(context) - longest) :]
        return torch.tensor([ngram_probability(model, recent, token) for token in range(VOCAB)])
    with torch.no_grad():
        return model(torch.tensor([context], device=machine.device))[0, -1].softmax(-1).cpu()


contestants = {"n-gram": ngram, **networks}
start = bpe.encode(max(test_texts[:50], key=len)).ids[:16]
print("the beginning:", repr(bpe.decode(start)))
for name, model in contestants.items():
    generator, ids = torch.Generator().manual_seed(seed), list(start)
    for _ in range(64):
        ids.append(torch.multinomial(next_probabilities(model, ids), 1, generator=generator).item())
    print(f"\n{name}:\n{bpe.decode(ids[len(start) :])}")

# %%
LENGTHS = [1, 2, 3, 4, 8, 16, 32, 64, 96]
windows = test_rows[:48].unfold(1, max(LENGTHS) + 1, 2).flatten(0, 1)  # (48 * 17, 97): every second place of a row


@torch.no_grad()
def surprise(model, context_length: int) -> Tensor:
    """-ln p of the last token of each window, given so many tokens before it: (windows,)."""
    short = windows[:, -context_length - 1 :]
    if isinstance(model, list):
        return torch.tensor([-math.log(ngram_probability(model, row[:-1], row[-1])) for row in short.tolist()])
    parts = [(model(part[:, :-1])[:, -1], part[:, -1]) for part in short.split(128)]  # (128, vocab), (128,)
    return torch.cat([F.cross_entropy(logits, targets, reduction="none") for logits, targets in parts]).cpu()


by_length = {name: [surprise(model, length).mean().item() for length in LENGTHS] for name, model in contestants.items()}
alt = "Surprise over the context that a model may see: the n-gram line is soon flat, those of the networks fall on."
figure = plots.curve(
    {name: (LENGTHS, values) for name, values in by_length.items()},
    title="The table stops reading after a few tokens, the networks read on",
    xlabel="tokens of context that the model may see",
    ylabel="surprise of the next token (nats)",
    alt=alt,
    log_x=True,
)
plots.show(figure, alt)

# %%
rows_to_show = {name: [f"{value:.2f}" for value in values] for name, values in by_length.items()}
show_table(rows_to_show, [f"k = {k}" for k in LENGTHS])
late = {name: values[LENGTHS.index(8)] - values[-1] for name, values in by_length.items()}
for name, gain in late.items():
    print(f"{name}: what stands more than 8 tokens back takes {gain:.2f} nats off the surprise of a token")
    lesson.report(f"gain from what stands more than 8 tokens back, nats per token: {name}", f"{gain:.2f}")
lesson.equal(
    "the n-gram model gains nothing from what stands more than 8 tokens back", abs(late["n-gram"]), within=1e-6
)
lesson.claim(
    "the transformer gains at least 0.05 nats from it", late["transformer"], at_least=0.05, insist=enough, form=".2f"
)
lesson.claim("the LSTM gains at least 0.02 nats from it", late["LSTM"], at_least=0.02, insist=enough, form=".2f")


# %% [markdown]
# **What you see.** The nearest tokens say most, to all three. Then the line of the table ends: what stands further back does not exist for it. The networks go on gaining, from names, numbers and rules that stood earlier in the document. The transformer could look at any of it directly; how much it makes of that after so short a training is what the numbers show.
#
# ## 7 · From probabilities to text
#
# **Question.** A model gives probabilities. Which token should you take?
#
# The most probable one (*greedy*) sounds right, and a text made so soon repeats itself. Drawing from $p$ itself is faithful, but among thousands of improbable tokens one is drawn now and then, and the text goes astray from there. So the logits $z$ (the scores before the softmax) are changed before the draw:
#
# | rule | what it does to the logits $z$ with $p = \text{softmax}(z)$ |
# |---|---|
# | **temperature** $\tau$ | divides: $z / \tau$. Below 1 the favourites get more, above 1 less; greedy is $\tau \to 0$ |
# | **top-k** | keeps the $k$ most probable tokens, whatever they have (Fan et al. 2018) |
# | **top-p** | keeps the smallest set of most probable tokens that holds at least $p$ of the probability (Holtzman et al. 2020) |
# | **min-p** | keeps the tokens with at least the share $m$ of the favourite's probability (Nguyen et al. 2024) |
# | **repetition penalty** $\theta$ | for tokens that have occurred, divides a positive logit by $\theta$ and multiplies a negative one by it (Keskar et al. 2019) |
#
# What is not kept gets $-\infty$. Each rule is a few lines. They take the tokens so far, ids `(batch, seq)`, and the logits `(batch, vocab)`.
#
# Hold each of them against the class that `transformers` uses, on the base model's own logits at many places of the test text.

# %%
def temperature(value: float):
    return lambda ids, logits: logits / value


def top_k(k: int):
    return lambda ids, logits: logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def top_p(share: float):
    def rule(ids: Tensor, logits: Tensor) -> Tensor:
        ordered, tokens = logits.softmax(-1).sort(descending=True)  # (batch, vocab)
        before = ordered.cumsum(-1) - ordered  # probability of all that are better
        return logits.masked_fill((before >= share).gather(-1, tokens.argsort(-1)), -torch.inf)

    return rule


def min_p(share: float):
    def rule(ids: Tensor, logits: Tensor) -> Tensor:
        probabilities = logits.softmax(-1)
        return logits.masked_fill(probabilities < share * probabilities.amax(-1, keepdim=True), -torch.inf)

    return rule


def repetition_penalty(penalty: float):
    def rule(ids: Tensor, logits: Tensor) -> Tensor:
        found = logits.gather(-1, ids)  # (batch, seq): the logit of each token that has occurred
        return logits.scatter(-1, ids, torch.where(found < 0, found * penalty, found / penalty))

    return rule


# %%
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

places = base_test[:, :32].flatten()[:, None]  # (batch * 32, 1): one token has occurred at each place
some_logits = logits[:, :32].flatten(0, 1)  # (batch * 32, vocab)
pairs = {
    "temperature": (temperature(0.7), TemperatureLogitsWarper(0.7)),
    "top-k": (top_k(20), TopKLogitsWarper(20)),
    "top-p": (top_p(0.9), TopPLogitsWarper(0.9)),
    "min-p": (min_p(0.1), MinPLogitsWarper(0.1)),
    "repetition penalty": (repetition_penalty(1.3), RepetitionPenaltyLogitsProcessor(1.3)),
}
for name, (our_rule, their_rule) in pairs.items():
    our_logits, their_logits = our_rule(places, some_logits), their_rule(places, some_logits)
    kept, kept_by_library = our_logits.isfinite(), their_logits.isfinite()
    difference = (our_logits[kept & kept_by_library] - their_logits[kept & kept_by_library]).abs().max().item()
    disagree = (kept != kept_by_library).sum().item()
    print(f"{name:>18}: keeps {kept.sum(-1).float().mean():7.1f} tokens a place,", end=" ")
    print(f"largest difference to transformers {difference:.0e}, other tokens kept: {disagree}")
    assert difference < 1e-6 and disagree <= 2  # sums in another order may move a token on the border of top-p
lesson.report("sampling rules against transformers, largest difference of a logit", f"{difference:.0e}")

# %% [markdown]
# **How do the three cut-offs differ?** Not in how many tokens they keep on average, but in *where*. Sort the places by how unsure the model is (by the perplexity of its own prediction, $e^{\text{entropy}}$), and count what each rule keeps.

# %%
probabilities = some_logits.softmax(-1)
choices = (-(probabilities * some_logits.log_softmax(-1)).sum(-1)).exp()  # (places,)
groups = choices.argsort().chunk(8)  # from sure to unsure
kept_by_rule = {}
for name, rule in {"top-k 20": top_k(20), "top-p 0.9": top_p(0.9), "min-p 0.1": min_p(0.1)}.items():
    kept = rule(places, some_logits).isfinite().sum(-1).float()
    kept_by_rule[name] = [kept[group].mean().item() for group in groups]
unsure = [choices[group].mean().item() for group in groups]
alt = (
    "Tokens kept over the perplexity of the prediction: top-k is flat, top-p and min-p rise as the model is less sure."
)
figure = plots.curve(
    {name: (unsure, kept) for name, kept in kept_by_rule.items()},
    title="Top-k keeps as many when the model is sure as when it is not",
    xlabel="equally likely choices that the model sees (perplexity of its prediction)",
    ylabel="tokens kept",
    alt=alt,
    log_x=True,
    log_y=True,
)
plots.show(figure, alt)
sure = {name: kept[0] for name, kept in kept_by_rule.items()}
print("where the model is surest:", ", ".join(f"{name} keeps {kept:.1f} tokens" for name, kept in sure.items()))
fewer = max(sure["top-p 0.9"], sure["min-p 0.1"])
lesson.claim("where the model is surest, top-p and min-p keep fewer than two tokens", fewer, at_most=2, form=".1f")
lesson.claim("there top-k keeps twenty", sure["top-k 20"], at_least=20, form=".1f")


# %% [markdown]
# **The sampler.** Read the prompt once; then feed one token at a time. What the attention of earlier tokens needs, their keys and values, is kept in a *cache* and not computed again (lesson 07 counts its bytes). The rules are applied in the order of the list.
#
# **What do the rules do to a text?** Two measurements on 32 continuations for each setting, and the same two on real held-out text:
#
# - **known words**: the share of words that occur somewhere in the training text. Names of strangers are new even in real text, so the real share is not 100 %, but a text that has gone astray is full of words that do not exist;
# - **repeated phrases**: of the runs of four words in a text, the share that stood in the same text before. A model that goes in circles has many.
#
# The best text is not the one with the most known words, but the one that is like real text in both.

# %%
@torch.inference_mode()
def sample(ids: Tensor, num_tokens: int, rules: list, generator: torch.Generator | None = None) -> Tensor:
    """Continue ids (batch, seq) by so many tokens; without a generator, greedily."""
    cache, new = None, ids
    for _ in range(num_tokens):
        output = base(input_ids=new, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()  # (batch, vocab)
        for rule in rules:
            logits = rule(ids, logits)
        if generator is None:
            new = logits.argmax(-1, keepdim=True)  # (batch, 1)
        else:
            new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], dim=1)
    return ids


encoded = [base_tokenizer(text)["input_ids"] for text in test_texts]
prompts = torch.tensor([ids[:8] for ids in encoded if len(ids) >= 8][:32], device=machine.device)  # (batch, 8)
rules = [repetition_penalty(1.1), temperature(0.8), top_k(50), top_p(0.95), min_p(0.02)]
generator = torch.Generator(machine.device).manual_seed(seed)
our_ids = sample(prompts[:4], 40, rules, generator)
torch.manual_seed(seed)
their_ids = base.generate(
    prompts[:4], attention_mask=torch.ones_like(prompts[:4]), do_sample=True, max_new_tokens=40, min_new_tokens=40,
    repetition_penalty=1.1, temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, eos_token_id=None,
)  # fmt: skip
agree = (our_ids == their_ids).float().mean().item()
print(f"all five rules at once: {agree:.0%} of the tokens are those of base.generate with the same seed\n")
print(base_tokenizer.decode(our_ids[0]))
lesson.equal("our sampler draws the tokens that transformers draws", (our_ids != their_ids).sum().item())
lesson.report("our sampler against generate, same tokens with the same seed", f"{agree:.0%}")

# %%
WORD = re.compile(r"[^\W\d_]+|[^\s]")
known = {word for text in training_texts for word in WORD.findall(text)}


def known_words(texts: list[str]) -> float:
    """Share of the words that occur in the training text; the last one may be cut off."""
    words = [word for text in texts for word in WORD.findall(text)[:-1] if word.isalpha()]
    return sum(word in known for word in words) / max(1, len(words))


def repeated_phrases(texts: list[str]) -> float:
    """Share of runs of four words that stood in the same text before."""
    words = [WORD.findall(text) for text in texts]
    phrases = [[tuple(text[i : i + 4]) for i in range(len(text) - 3)] for text in words]
    return sum(len(text) - len(set(text)) for text in phrases) / max(1, sum(map(len, phrases)))


def continuations(rules: list, num_tokens: int = 64, draw: bool = True) -> list[str]:
    """New tokens after each prompt."""
    generator = torch.Generator(machine.device).manual_seed(seed) if draw else None
    new = sample(prompts, num_tokens, rules, generator)[:, prompts.shape[1] :]  # (batch, num_tokens)
    return base_tokenizer.batch_decode(new, skip_special_tokens=True)


joined = [token for ids in encoded for token in ids]
real = base_tokenizer.batch_decode([joined[start : start + 128] for start in range(0, 32 * 128, 128)])
reference = known_words(real), repeated_phrases(real)
print(f"real text: {reference[0]:.1%} known words, {reference[1]:.1%} repeated phrases")

# %%
TEMPERATURES = [0.5, 1.0, 1.5, 2.0]
CUTOFFS = {"no cut-off": [], "top-k 20": [top_k(20)], "top-p 0.9": [top_p(0.9)], "min-p 0.1": [min_p(0.1)]}
PENALTIES = [1.0, 1.1, 1.3]
results = {name: [] for name in CUTOFFS}
with tqdm(total=len(CUTOFFS) * len(TEMPERATURES) + len(PENALTIES), desc="settings") as bar:
    for name, cutoff in CUTOFFS.items():
        for value in TEMPERATURES:
            results[name].append(continuations([temperature(value), *cutoff]))
            bar.update()
    greedy = {}
    for penalty in PENALTIES:
        greedy[penalty] = repeated_phrases(continuations([repetition_penalty(penalty)], 128, draw=False))
        bar.update()
shares = {name: [known_words(written) for written in texts] for name, texts in results.items()}
alt = "Share of known words over the temperature: without a cut-off it falls far below real text."
figure = plots.curve(
    {name: (TEMPERATURES, values) for name, values in shares.items()},
    title="Without a cut-off a high temperature invents words",
    xlabel="temperature",
    ylabel="share of words that occur in the training text",
    alt=alt,
    percent=True,
    limits_y=(0.5, 1.0),
    references={"real text": reference[0]},
)
plots.show(figure, alt)

# %%
rows_to_show = {f"{name}, known words": [f"{value:.0%}" for value in values] for name, values in shares.items()}
for name, written in results.items():
    rows_to_show[f"{name}, repeated phrases"] = [f"{repeated_phrases(texts):.0%}" for texts in written]
show_table(rows_to_show, [f"{value}" for value in TEMPERATURES])
print(f"real text: {reference[0]:.0%} known words, {reference[1]:.0%} repeated phrases")
for penalty, repeated in greedy.items():
    print(f"greedy, 128 tokens, repetition penalty {penalty}: {repeated:.0%} repeated phrases")
hot = {name: values[-1] for name, values in shares.items()}
astray = reference[0] - hot["no cut-off"]
lesson.claim(
    "greedy text repeats at least twice as many phrases as real text",
    greedy[1.0] / max(reference[1], 1e-9),
    at_least=2,
    form=".1f",
)
lesson.claim(
    "a repetition penalty of 1.3 takes away at least half of that",
    1 - greedy[1.3] / max(greedy[1.0], 1e-9),
    at_least=0.5,
    form=".0%",
)
lesson.claim(
    "at temperature 2 without a cut-off at least 8 points fewer words are known than in real text",
    astray,
    at_least=0.08,
    form=".0%",
)
lesson.claim(
    "there min-p brings back at least 5 points", hot["min-p 0.1"] - hot["no cut-off"], at_least=0.05, form=".0%"
)
lesson.report(
    "repeated phrases: real text; greedy; with a repetition penalty of 1.3",
    f"{reference[1]:.0%}; {greedy[1.0]:.0%}; {greedy[1.3]:.0%}",
)
lesson.report(
    "known words: real text; temperature 2 without a cut-off; with min-p 0.1",
    f"{reference[0]:.0%}; {hot['no cut-off']:.0%}; {hot['min-p 0.1']:.0%}",
)


# %% [markdown]
# **What you see.** Greedy text goes in circles, and the repetition penalty stops that. At temperature 1 a sample is much like real text, as it should be if the probabilities are right. Hotter, and without a cut-off, it fills with words that do not exist. Top-k and min-p prevent most of that. Top-p does not: at a high temperature the improbable tokens together have so much probability that they belong to the 90 % that it keeps.
#
# **Try it yourself.** In Jupyter, Colab and VS Code the next cell shows sliders. Elsewhere it says so, and the cell after it does the same with settings that you write into it.

# %%
def write(prompt: str, tau: float = 1.0, k: int = 0, p: float = 1.0, floor: float = 0.0, penalty: float = 1.0) -> str:
    """60 new tokens; tau 0 is greedy, and k 0, p 1, floor 0 and penalty 1 switch a rule off."""
    rules = [repetition_penalty(penalty)] * (penalty != 1) + [temperature(tau)] * (tau not in (0, 1))
    rules += [top_k(k)] * (k > 0) + [top_p(p)] * (p < 1) + [min_p(floor)] * (floor > 0)
    ids = base_tokenizer(prompt or base_tokenizer.eos_token, return_tensors="pt")["input_ids"].to(machine.device)
    generator = torch.Generator(machine.device).manual_seed(seed) if tau > 0 else None
    return base_tokenizer.decode(sample(ids, 60, rules, generator)[0])


opening = base_tokenizer.decode(prompts[0])
frontend = {"JPY_SESSION_NAME", "COLAB_RELEASE_TAG"} & os.environ.keys() or "__vsc_ipynb_file__" in globals()
if frontend:
    from ipywidgets import FloatSlider, IntSlider, Text, interact

    @interact(
        prompt=Text(opening, continuous_update=False),
        tau=FloatSlider(1.0, min=0, max=3, step=0.1, continuous_update=False, description="temperature"),
        k=IntSlider(0, min=0, max=100, continuous_update=False, description="top-k"),
        p=FloatSlider(1.0, min=0.05, max=1, step=0.05, continuous_update=False, description="top-p"),
        floor=FloatSlider(0.0, min=0, max=0.5, step=0.01, continuous_update=False, description="min-p"),
        penalty=FloatSlider(1.0, min=1, max=2, step=0.05, continuous_update=False, description="repetition"),
    )
    def show_text(prompt, tau, k, p, floor, penalty):
        print(write(prompt, tau, k, p, floor, penalty))

else:
    print("There is nothing here that could show sliders: use the next cell.")

# %%
for options in ({"tau": 0.0}, {"tau": 0.0, "penalty": 1.3}, {"p": 0.9}, {"tau": 2.0}, {"tau": 2.0, "floor": 0.1}):
    print(f"--- {options}\n{write(opening, **options)}\n")


# %% [markdown]
# ## 8 · A map of the methods
#
# **Question.** The base model is there. How do you make it do what you want, and what does each way cost?
#
# The cheapest way that works is the right one, and the table is in that order. *FT* is fine-tuning; $N$ is the number of parameters, $D$ the number of training tokens; training costs about $6ND$ operations and reading a token $2N$.
#
# | method | what changes | what it costs | use it when | lesson |
# |---|---|---|---|---|
# | **decoding**: temperature, cut-offs, beams | how a token is chosen | nothing | always, and first | 01 |
# | **prompt**: instruction, role, examples | the text before the question | longer input, at every call | you have a handful of examples, or none | 02 |
# | **chain of thought, self-consistency, tree of thought** | the model writes steps; several answers vote | 5 to 100 times the output | an answer needs several steps | 02, 16 |
# | **retrieval (RAG)** | passages found for the question join the prompt | an index, a search, longer input | facts are rare, private or change | 02 |
# | **tools, constrained decoding** | which tokens are allowed, who computes | a parser, a sandbox | the format must hold, the model must act | 15 |
# | **best-of-N, verifiers, search** | N answers, a score picks one | N times the output and a scorer | answers can be checked | 16 |
# | **steering, task vectors, editing** | a vector added inside, or one fact in one matrix | minutes; side effects | to understand a model more than to ship it | 13 |
# | **prompt and prefix tuning, IA3, BitFit, norms** | some vectors; the model stays frozen | under 0.1 % of the parameters | many small tasks on one base | 06 |
# | **adapter, LoRA, DoRA** | small matrices beside the large ones | 0.1 to 2 % of the parameters; gradients and optimiser for these only | the default for a task of your own | 06 |
# | **QLoRA** | the same, on a base of 4 bits | a quarter of the base's memory, slower steps | one small GPU | 06 |
# | **supervised FT** | all weights, or some layers | 16 bytes per parameter; 1,000 good examples | format, style, many tasks at once | 05 |
# | **continued pretraining** | all weights, on raw text | $6ND$ on the new text; forgetting | a whole field of new language | 14 |
# | **reward model and PPO** | all weights, or LoRA | up to four models in memory, sampling while training | people can compare answers but not write them | 08 |
# | **GRPO, RLOO** | the same without a value model | several answers per prompt | the reward is a program; short of memory | 08, 16 |
# | **DPO, IPO, KTO, ORPO, SimPO** | all weights, or LoRA, from pairs | like supervised FT with two answers and a reference | preference pairs are there already | 09 |
# | **STaR, RL with verifiable reward** | the model learns from its own checked answers | sampling, and a checker | reasoning with answers that can be checked | 16 |
# | **quantisation** | numbers of 8 or 4 bits instead of 16 | minutes to hours, a little quality | serving, small devices | 10 |
# | **pruning** | weights or whole parts become zero | minutes to hours; needs hardware that gains by it | a smaller model from a larger one | 10 |
# | **distillation** | a small model learns from a large one | training, and the teacher's passes | one task at large volume | 10 |
# | **pretraining** | all weights, from random ones | $6ND$ on everything: from an hour on two cores (shima-4m) to months on thousands of GPUs | there is no base for your language or data | 03, 04 |
# | **another architecture**: mixture of experts, shared keys, state space | the network itself | a new pretraining | speed or length at scale | 11 |
#
# Three lessons are about all of these: **07** what fits into a GPU, **12** what can go wrong and be attacked, and **17** a whole pipeline from base to submission.
#
# **What must be in memory?** In mixed precision a trainable parameter takes 16 bytes: 2 for the weight, 2 for its gradient, and 12 for the 32-bit copy and AdamW's two means (Rajbhandari et al. 2020). A frozen one takes 2, or about half a byte in 4 bits. What a forward pass keeps for the backward pass comes on top (lesson 07). Count the trainable parameters from the shapes of the matrices, for the base model and for the shape of Llama-2 7B.

# %%
def trainable_parameters(model, rank: int = 8, virtual_tokens: int = 16, bottleneck: int = 64) -> dict[str, int]:
    """Number of parameters that each method trains."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.dim() == 2 and not re.search("embed|lm_head", name)]
    config = model.config
    hidden, layers = config.hidden_size, config.num_hidden_layers
    shared = hidden * config.num_key_value_heads // config.num_attention_heads  # width of keys and of values
    return {
        "prompt, RAG, decoding": 0,
        "prompt tuning": virtual_tokens * hidden,
        "IA3": layers * (2 * shared + config.intermediate_size),
        "norms only": sum(p.numel() for name, p in named.items() if "norm" in name),
        "prefix tuning": virtual_tokens * layers * 2 * shared,
        "LoRA, QLoRA": sum(rank * (p.shape[0] + p.shape[1]) for p in matrices),
        "adapter": layers * 2 * 2 * hidden * bottleneck,
        "full fine-tuning": sum(p.numel() for p in named.values()),
    }


with torch.device("meta"):  # shapes only, no memory
    seven_billion = LlamaForCausalLM(LlamaConfig())  # the defaults are the shape of Llama-2 7B
counts = {name: trainable_parameters(model) for name, model in {"base": base, "7B": seven_billion}.items()}
total = counts["7B"]["full fine-tuning"]
table, needed = {}, {}
for method, count in counts["7B"].items():
    small, all_of_it = counts["base"][method], counts["base"]["full fine-tuning"]
    needed[method] = (2 * total + 16 * count if count < total else 16 * total) / 1e9
    table[method] = [f"{small:,}", f"{small / all_of_it:.2%}", f"{count:,}", f"{count / total:.3%}"]
    table[method].append(f"{needed[method]:.1f} GB")
show_table(table, [base_name, "share", "7B shape", "share", "memory, 7B"])
assert counts["base"]["full fine-tuning"] == base.num_parameters()

# %%
import matplotlib.pyplot as plt

bars = {
    "full fine-tuning": needed["full fine-tuning"],
    "adapter": needed["adapter"],
    "LoRA": needed["LoRA, QLoRA"],
    "prefix tuning": needed["prefix tuning"],
    "only use it": needed["prompt, RAG, decoding"],
    "QLoRA": (4.127 / 8 * total + 16 * counts["7B"]["LoRA, QLoRA"]) / 1e9,  # 4 bits, and 0.127 for the scales
}
figure, axes = plt.subplots(figsize=(plots.WIDTH, 3.2))
axes.barh(list(bars), list(bars.values()), color=plots.COLORS[0])
for row, size in enumerate(bars.values()):
    axes.text(max(size, 16) + 1, row, f"{size:.1f} GB", va="center")
for gpu, size in {"T4 16": 16, "A100 80": 80}.items():
    axes.axvline(size, color=plots.GREY, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.text(size, 5.9, f" {gpu} GB", color=plots.GREY, fontsize=9)
axes.set_title("Training all of a 7B model takes eight times its own memory")
axes.set_xlabel("weights, gradients and optimiser (GB)")
axes.set_xlim(0, 122)
axes.set_ylim(6.1, -0.6)  # the first on top
axes.grid(axis="y", visible=False)
alt = "Memory for a 7B model: " + ", ".join(f"{method} {size:.1f} GB" for method, size in bars.items())
plots.show(figure, alt)
lesson.claim(
    "the 7B shape takes more than 80 GB with full fine-tuning", bars["full fine-tuning"], at_least=80, form=".1f"
)
lesson.claim("it takes less than 16 GB with LoRA", bars["LoRA"], at_most=16, form=".1f")
lesson.claim("it takes less than 5 GB with QLoRA", bars["QLoRA"], at_most=5, form=".1f")
lesson.report(
    "7B shape, GB without activations: full, LoRA, QLoRA",
    ", ".join(f"{bars[name]:.1f}" for name in ("full fine-tuning", "LoRA", "QLoRA")),
)


# %% [markdown]
# **What you see.** What costs memory is to *train* a parameter, eight times as much as to have it there in 16 bits. All methods that freeze the base cost about the same; what is left is the base itself, and QLoRA shrinks that.
#
# ## 9 · Exercises
#
# Four, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 1.1, easy: a perplexity in the tokens of another model.
def convert_perplexity(perplexity: float, num_tokens: int, other_num_tokens: int) -> float:
    """The perplexity per token that an equally good model would have with another tokenizer.

    The text has `num_tokens` tokens for the model that was measured and `other_num_tokens` for the other one. Equally
    good means the same bits per byte.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_convert_perplexity(convert_perplexity):
    expect_close("convert_perplexity(8, 100, 100)", convert_perplexity(8, 100, 100), 8.0)
    expect_close("convert_perplexity(8, 100, 200)", convert_perplexity(8, 100, 200), math.sqrt(8))
    for perplexity, num_tokens, other in ((5.5, 1000, 700), (12.0, 300, 450)):
        converted = convert_perplexity(perplexity, num_tokens, other)
        expect_close(
            f"bits per byte of convert_perplexity({perplexity}, {num_tokens}, {other})",
            evaluation.bits_per_byte(converted, other, 2000),
            evaluation.bits_per_byte(perplexity, num_tokens, 2000),
        )


check("1.1", check_convert_perplexity, convert_perplexity)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The total surprise of the text, tokens times ln(perplexity), must be the same number before and after.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The surprise of the whole text stays the same: $T \ln \text{PPL} = T' \ln \text{PPL}'$.
#
# ```python
# def convert_perplexity(perplexity: float, num_tokens: int, other_num_tokens: int) -> float:
#     return perplexity ** (num_tokens / other_num_tokens)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 1.2, medium: locally typical sampling (Meister et al. 2023).
def typical(mass: float):
    """A rule like those of section 7: rule(ids, logits (batch, vocab)) -> logits, with -inf for what is not kept.

    People rarely say the most probable thing, nor a very improbable one. So sort the tokens by how far their surprise
    -ln p is from the expected one, the entropy H = -sum p ln p: the nearest first. Keep the smallest number of them
    that holds at least `mass` of the probability.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_typical(typical):
    from transformers import TypicalLogitsWarper

    example = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    kept = typical(0.2)(None, example).isfinite()[0].tolist()
    expect_equal("tokens that typical(0.2) keeps of p = [0.5, 0.25, 0.15, 0.1]", kept, [False, True, False, False])
    random_logits = 3 * torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    before = random_logits.clone()
    for mass in (0.2, 0.6, 0.9):
        expected = TypicalLogitsWarper(mass)(None, random_logits)
        expect_equal(f"the logits of typical({mass})", typical(mass)(None, random_logits), expected)
    expect_equal("the logits that went in, after the calls", random_logits, before)


check("1.2", check_typical, typical)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Copy the top-p rule of section 7 and change only what the tokens are sorted by; remember to undo the sorting with a second argsort.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# It is top-p with another order.
#
# ```python
# def typical(mass: float):
#     def rule(ids: Tensor, logits: Tensor) -> Tensor:
#         log_p = logits.log_softmax(-1)  # (batch, vocab)
#         entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
#         order = (-log_p - entropy).abs().argsort(-1)
#         ordered = log_p.exp().gather(-1, order)
#         before = ordered.cumsum(-1) - ordered
#         return logits.masked_fill((before >= mass).gather(-1, order.argsort(-1)), -torch.inf)
#
#     return rule
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 1.3, hard: beam search.
def beam_search(log_probabilities, start: list[int], num_tokens: int, width: int) -> tuple[list[int], float]:
    """The best continuation that a beam finds, and the sum of its log-probabilities.

    log_probabilities(ids) gives ln p of each token after the ids: (vocab,). Keep the `width` best sequences found so
    far; at each step extend each of them by every token and again keep the `width` best. Width 1 is greedy search.
    Returns the whole sequence, start included.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_beam_search(beam_search):
    trap = {1: [0.55, 0.45, 0.0], 2: [0.4, 0.3, 0.3], 3: [0.05, 0.05, 0.9]}  # after 0 the favourite leads nowhere

    def chain(ids):
        return torch.tensor(trap[1] if len(ids) == 1 else trap[2] if ids[-1] == 0 else trap[3]).clamp(min=1e-9).log()

    greedy_ids, greedy_score = beam_search(chain, [2], 2, 1)
    expect_equal("beam_search(..., width=1), which is greedy", greedy_ids, [2, 0, 0])
    expect_close("its score", greedy_score, math.log(0.55 * 0.4), 1e-4)
    ids, score = beam_search(chain, [2], 2, 2)
    expect_equal("beam_search(..., width=2)", ids, [2, 1, 2])
    expect_close("its score", score, math.log(0.45 * 0.9), 1e-4)
    table = torch.randn(6, 6, 6, generator=torch.Generator().manual_seed(11)).log_softmax(-1)

    def random_model(ids):
        return table[ids[-2], ids[-1]]

    best = max(
        table[0, 1, a] + table[1, a, b] + table[a, b, c] for a in range(6) for b in range(6) for c in range(6)
    ).item()
    _, found = beam_search(random_model, [0, 1], 3, 36)
    expect_close("the score with width 36, which loses nothing", found, best, 1e-4)


check("1.3", check_beam_search, beam_search)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Keep a list of (ids, score) pairs; at each step build all extensions of all of them in one list, sort it by score and cut it to `width`.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def beam_search(log_probabilities, start: list[int], num_tokens: int, width: int) -> tuple[list[int], float]:
#     beams = [(list(start), 0.0)]
#     for _ in range(num_tokens):
#         longer = [
#             ([*ids, token], score + added)
#             for ids, score in beams
#             for token, added in enumerate(log_probabilities(ids).tolist())
#         ]
#         beams = sorted(longer, key=lambda beam: beam[1], reverse=True)[:width]
#     return beams[0]
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 1.4, open: bring the n-gram model closer to the networks.
def better_probability(tables: list[Table], context: list[int], token: int) -> float:
    """p(token | context) of a better model made of the same tables. `context` is all of the row before the token.

    It must be a distribution: over all tokens it sums to one. On the test rows it must need at least 3 % fewer bits
    than ngram_probability. What does the table not see that stands in the context? One idea: a name that has just
    occurred comes again (a cache model, Kuhn & De Mori 1990).
    """
    raise NotImplementedError


# %% tags=["check"]
def check_better_probability(better_probability):
    some_rows = test_rows[:12].tolist()
    for length in (0, 3, 40):
        context = some_rows[0][:length]
        total = sum(better_probability(ngram, context, token) for token in range(VOCAB))
        expect_close(f"the sum of the probabilities after {length} tokens", total, 1.0, 1e-6)
    given = [better_probability(ngram, row[:i], row[i]) for row in some_rows for i in range(1, len(row))]
    nats = [-math.log(max(probability, 1e-30)) for probability in given]
    saved = 1 - sum(nats) / ngram_nats(ngram, some_rows)
    expect_true(f"it needs at least 3 % fewer bits than ngram_probability ({saved:.1%} now)", saved >= 0.03)


check("1.4", check_better_probability, better_probability)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Look for the last one, two or three tokens of the context earlier in the context, and mix the share of what followed them there into the n-gram's probability, with weights that sum to one.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# One of many: look for the last tokens of the context earlier in the context itself, and mix in what followed them there. The share of this cache grows with the length of what was found. (A transformer learns to do just this; lesson 13 shows the heads that do.)
#
# ```python
# def better_probability(tables: list[Table], context: list[int], token: int) -> float:
#     probability = ngram_probability(tables, context, token)
#     for length, share in ((1, 0.05), (2, 0.15), (3, 0.2)):
#         recent = context[len(context) - length :]
#         followers = [
#             context[i + length] for i in range(len(context) - length) if context[i : i + length] == recent
#         ]
#         if followers:
#             probability = (1 - share) * probability + share * followers.count(token) / len(followers)
#     return probability
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
# Nobody writes the sampler again for each model. With `transformers` the settings go into one object that is saved beside the weights, and `pipeline` does the rest. Two traps: many hub models bring their own settings, so that two calls without arguments sample differently; and a perplexity from a library counts a text's first tokens with hardly any context, so that it depends on how the text was cut.

# %%
from transformers import GenerationConfig, pipeline

common = {"max_new_tokens": 50, "pad_token_id": base_tokenizer.pad_token_id}
creative = GenerationConfig(do_sample=True, temperature=1.2, min_p=0.1, **common)
careful = GenerationConfig(do_sample=False, repetition_penalty=1.2, **common)
writer = pipeline("text-generation", model=base, tokenizer=base_tokenizer)
for name, settings_of_call in {"creative": creative, "careful": careful}.items():
    torch.manual_seed(seed)
    print(f"--- {name}\n{writer(opening, generation_config=settings_of_call)[0]['generated_text']}\n")

# %% [markdown]
# | task | a setting to start from |
# |---|---|
# | one right answer, extraction, code that must run | greedy, or temperature up to 0.3 |
# | several different tries, to vote or to choose from (lessons 02, 16) | temperature 0.7 to 1, top-p 0.95 or min-p 0.05 |
# | stories, brainstorming | temperature 1 to 1.5 with min-p 0.05 to 0.1 |
# | training on the model's own samples (lessons 08, 09, 16) | temperature 1 and no cut-off: what is trained must be what was sampled |
# | a small model that repeats itself | repetition penalty 1.1 to 1.3; not where the answer has to repeat the question |
#
# ## Read on
#
# - Shannon 1951, *Prediction and Entropy of Printed English*: n-grams, and what a bit per letter means.
# - Kneser & Ney 1995, *Improved Backing-off for M-gram Language Modeling*; Chen & Goodman 1999, *An Empirical Study of Smoothing Techniques for Language Modeling*.
# - Kuhn & De Mori 1990, *A Cache-Based Natural Language Model for Speech Recognition*.
# - Bengio et al. 2003, *A Neural Probabilistic Language Model*.
# - Hochreiter & Schmidhuber 1997, *Long Short-Term Memory*; Cho et al. 2014, *Learning Phrase Representations using RNN Encoder-Decoder*.
# - Vaswani et al. 2017, *Attention Is All You Need*; Touvron et al. 2023, *LLaMA*.
# - Fan et al. 2018, *Hierarchical Neural Story Generation* (top-k); Holtzman et al. 2020, *The Curious Case of Neural Text Degeneration* (top-p); Nguyen et al. 2024, *Turning Up the Heat: Min-p Sampling*; Meister et al. 2023, *Locally Typical Sampling*; Keskar et al. 2019, *CTRL* (repetition penalty).
# - Rajbhandari et al. 2020, *ZeRO* (bytes per parameter); Hu et al. 2021, *LoRA*; Dettmers et al. 2023, *QLoRA*.
# - The papers of the other methods stand in their lessons.
