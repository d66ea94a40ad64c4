# %% [markdown]
# # {{ number }} · {{ title }}: say what the reader will find out
#
# {{ badges }}
#
# One paragraph of promise: which question this lesson asks, what the reader will have written, and which numbers they
# will have measured at the end.
#
# **cpu 0 s · 0 GB | t4 1 min · 2 GB**
#
# **You will**
#
# 1. write the loss of a language model and find it equal to PyTorch's;
# 2. measure how it falls along a text;
# 3. end with a table of what you measured.
#
# **Prerequisites:** lesson 01.

# %% tags=["setup"]
{{ setup }}

# %% tags=["parameters"]
profile = ""  # "" chooses by hardware; or "cpu", "t4", "large"
model_id = ""  # another model: a hub id, or a folder in hub format
text_id = ""  # another text: a hub dataset or a .jsonl file with a field "text"
seed = 0
budget = 1.0  # share of all documents; the lesson's claims are asserted from 1.0 on

# %%
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import plots
from helpers.data import pack, text_dataset
from helpers.exercises import check, expect_close
from helpers.lesson import Lesson
from helpers.models import load_model

lesson = Lesson("{{ number }}", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {"cpu": {"documents": 120}, "t4": {"documents": 200}, "large": {"documents": 200}}  # all that differs
settings = SETTINGS[machine.name]

# %% [markdown] tags=["core"]
# ## 1 · The loss along a text
#
# **Question.** Is a token easier to predict when more text stands before it?
#
# The derivation, short. With logits $z$ over the vocabulary and the right token $t$, the loss of one position is
# $-\log p_t = \log \sum_v e^{z_v} - z_t$.

# %%
def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss of each token but the first, in nats."""
    scores = logits[:, :-1].float()  # (batch, seq - 1, vocab)
    right = ids[:, 1:, None]  # (batch, seq - 1, 1)
    return scores.logsumexp(-1) - scores.gather(-1, right).squeeze(-1)  # (batch, seq - 1)


generator = torch.Generator().manual_seed(seed)
logits, ids = torch.randn(2, 5, 11, generator=generator), torch.randint(11, (2, 5), generator=generator)
library = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
difference = (token_losses(logits, ids).flatten() - library).abs().max().item()
lesson.equal("the loss is PyTorch's", difference, within=1e-5)

# %%
model, tokenizer = load_model(machine)
texts = text_dataset(text_id or machine, lesson.scaled(settings["documents"], least=20), seed=seed)["text"]
documents = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
rows = torch.tensor(list(pack(documents, 128)))  # (rows, seq)
parts = [part.to(machine.device) for part in rows.split(16)]
with torch.no_grad():
    losses = torch.cat([token_losses(model(input_ids=part).logits, part).cpu() for part in parts])  # (rows, seq - 1)
by_position = losses.mean(0)
early, late = by_position[:8].mean().item(), by_position[-32:].mean().item()
print(f"{len(rows)} rows: {early:.2f} nats at the beginning, {late:.2f} at the end")
lesson.report("nats of tokens 2 to 9, and of the last 32", f"{early:.2f}, {late:.2f}")

# %% tags=["headline"]
smooth = by_position.unfold(0, 8, 1).mean(-1)  # over 8 positions
figure = plots.curve(
    {"loss": (range(5, 5 + len(smooth)), smooth.tolist())},
    title="The more text before a token, the easier it is",
    xlabel="position in the row (tokens)",
    ylabel="loss (nats)",
)
plots.show(figure, alt="The loss falls steeply over the first tokens of a row, then slowly.")
lesson.claim("the last 32 tokens of a row cost fewer nats than the first 8", early - late, at_least=0.3)

# %% [markdown]
# One sentence that says what was seen; its numbers are those that the code printed.

# %% [markdown]
# ## 2 · Exercises
#
# Three to six, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the
# check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise {{ exercise }}.1, easy: from losses to perplexity.
def perplexity(losses: Tensor) -> float:
    """exp of the mean of the losses (nats), any shape."""
    raise NotImplementedError

# %% tags=["check"]
def check_perplexity(perplexity):
    expect_close("of 2 losses", perplexity(torch.tensor([0.0, 2.0])), math.e)
    expect_close("of 0", perplexity(torch.zeros(2, 3)), 1.0)


check("{{ exercise }}.1", check_perplexity, perplexity)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Averaging comes before the exponential.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Why it is so, in a sentence.
#
# ```python
# def perplexity(losses: Tensor) -> float:
#     return math.exp(losses.mean())
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise {{ exercise }}.2, medium: the mean over batches of different size.
def mean_loss(means: list[float], tokens: list[int]) -> float:
    """Loss per token, from the mean loss and the number of tokens of each batch."""
    raise NotImplementedError

# %% tags=["check"]
def check_mean_loss(mean_loss):
    expect_close("of 1 and 3 tokens", mean_loss([4.0, 0.0], [1, 3]), 1.0)
    expect_close("of 1 batch", mean_loss([2.5], [7]), 2.5)


check("{{ exercise }}.2", check_mean_loss, mean_loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Go back from each mean to the sum that it was made of.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Why it is so, in a sentence.
#
# ```python
# def mean_loss(means: list[float], tokens: list[int]) -> float:
#     return sum(mean * count for mean, count in zip(means, tokens, strict=True)) / sum(tokens)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise {{ exercise }}.3, open: nats to bits per byte.
def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """The loss per token (nats) as bits per byte of a text of so many tokens and bytes."""
    raise NotImplementedError

# %% tags=["check"]
def check_bits_per_byte(bits_per_byte):
    expect_close("1 bit a token", bits_per_byte(math.log(2), 10, 20), 0.5)
    expect_close("1 nat a byte", bits_per_byte(1.0, 8, 8), 1 / math.log(2))


check("{{ exercise }}.3", check_bits_per_byte, bits_per_byte)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# How many bits are one nat?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Why it is so, in a sentence.
#
# ```python
# def bits_per_byte(nats: float, tokens: int, size: int) -> float:
#     return nats * tokens / size / math.log(2)
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **What is the loss of a token to which the model gives the probability 1?**
#
# - A. 0 nats
# - B. 1 nat
# - C. infinite
# - D. as many nats as the vocabulary has tokens
#
# <details><summary>Answer</summary>
#
# A. $-\log 1 = 0$: there is nothing left to be surprised about.
#
# </details>

# %% [markdown] tags=["quiz"]
# **The figure falls steeply at first. What does the model have later that it lacks there?**
#
# - A. more weights
# - B. text before the token that tells what the document is about
# - C. shorter tokens
# - D. a smaller vocabulary
#
# <details><summary>Answer</summary>
#
# B. The weights are the same at all positions; what differs is the text that a token can look back at.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Which point of the figure would a model without attention to earlier tokens change?**
#
# - A. none
# - B. only the first
# - C. all but the first ones: its line would be flat
# - D. only the last
#
# <details><summary>Answer</summary>
#
# C. Without a view of earlier tokens, no position can be easier than another on average.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Two models have different vocabularies. Which number compares them?**
#
# - A. loss per token
# - B. bits per byte
# - C. perplexity per token
# - D. the number of parameters
#
# <details><summary>Answer</summary>
#
# B. A larger vocabulary makes fewer and harder tokens of the same text; bytes are the same for both.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Why are the losses of many rows averaged at each position?**
#
# - A. to save memory
# - B. because PyTorch asks for it
# - C. because one row has easy and hard words at any position
# - D. to train the model
#
# <details><summary>Answer</summary>
#
# C. The average over rows leaves what the position does; a single row shows mostly its own words.
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
# The same with the library that a practitioner uses.

# %%
part = rows[:16].to(machine.device)
with torch.no_grad():
    theirs = model(input_ids=part, labels=part).loss.item()
difference = abs(theirs - losses[:16].mean().item())
lesson.equal("the loss is transformers'", difference, within=1e-4 if machine.dtype == "float32" else 0.05)

# %% [markdown]
# ## Read on
#
# - Primary sources, each with what it is good for: Shannon 1951, *Prediction and Entropy of Printed English*, Bell System
#   Technical Journal 30: how well people guess the next letter.
