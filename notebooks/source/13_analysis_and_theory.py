# %% [markdown]
# # 13 · Analysis and theory: what happens inside, and how to be sure
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/13_analysis_and_theory.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/13_analysis_and_theory.ipynb)
#
# A language model is a list of matrices that you can read, stop and change at any place. That is not yet understanding: it is easy to tell a story about what a part does, and hard to make a measurement that would have refuted it. In this lesson you open a trained model with eight methods: attribution, attention patterns, ablation, patching, lenses, probes, editing and steering. Each comes with the control that keeps it honest. Some textbook findings come out here exactly as in the papers. Others do not, and then the lesson says so. In its second half you train small models in which theory can be checked: a circuit that appears late and fast, regression in a forward pass, Bayes, features in superposition.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. take the logits apart into what every head and every layer wrote, find the induction heads, and see that no single head is needed, but one pair is;
# 2. follow the person who is asked about from the name to the answer by exchanging parts of two runs, and see a probe that is always right and has found nothing;
# 3. train one and two layers on the same task, and see the induction head appear in two layers only;
# 4. find a linear attention layer equal to a step of gradient descent, and a small transformer that comes near ridge regression, or nearer to the Bayes estimator over few tasks, by what it was trained on;
# 5. count how many features a layer of five numbers holds.
#
# **Prerequisites:** lesson 03.
#
# **The model** is *shima-4m*, a small Llama that comes with the course: four layers of four heads, trained on texts about the made-up island Shima and nothing else. All these methods need are forward passes and hooks in plain PyTorch.
#
# | symbol | meaning |
# |---|---|
# | $L$, $d$ | number of layers, and size of the residual stream (`hidden_size`) |
# | $h^{(l)}_t$ | the residual stream: the vector of token $t$ before layer $l$, for $l = 0, \dots, L - 1$; $h^{(L)}_t$ is what the last layer leaves |
# | $a^{l,h}_t$, $m^l_t$ | what head $h$ of layer $l$, and the MLP of layer $l$, add to it |
# | $W_U$, $\gamma$ | the unembedding (`lm_head`), and the scales of the last norm |
# | head 1.2 | the head with number 2 in the layer with number 1; both count from 0 |
# | $x_i$, $y_i$ | an example in the prompt: an input and its target; $x_q$ is the input that is asked |
# | $w$ | the weights of a linear task, $y = w \cdot x$ plus noise of variance $\sigma^2$ |
# | $\eta$ | a learning rate |
# | $f$, $p(f \mid \text{prompt})$ | a function that the prompt may show, and its posterior probability |
# | $n$, $m$ | features of an input, and the fewer numbers that they are pressed into |

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
budget = 1.0  # share of all steps and items; the lesson's claims are asserted from 1.0 on

# %%
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import combinations, combinations_with_replacement, islice

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.metrics import f1_score, r2_score
from torch import Tensor, nn

from helpers import plots
from helpers.data import pack
from helpers.evaluation import Score, score
from helpers.exercises import check, expect_close, expect_shape, expect_true
from helpers.lesson import Lesson, show_table
from helpers.models import load_model
from helpers.world import LABELS, MOODS, RELATIONS, Question, World

lesson = Lesson("13", profile, model_id, seed, budget)
machine = lesson.machine
SETTINGS = {  # heads that are tried in pairs, step size of the tuned lens, documents for the autoencoder
    "cpu": {"heads_in_pairs": 16, "lens_rate": 2e-3, "documents": 140},
    "t4": {"heads_in_pairs": 12, "lens_rate": 1e-3, "documents": 140},
    "large": {"heads_in_pairs": 12, "lens_rate": 1e-3, "documents": 140},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. `lesson.scaled` makes a number of items or steps smaller on a smaller budget.
#
# **The tools.** Load the model, and beside it an *untrained* model of the same shape: what it can do is not learned. Attention runs in its plain form (`eager`), which hands out its patterns. A *hook* is a function that PyTorch calls when a module runs. One kind is enough for this whole lesson: it sees the input of a module, and may put something else in its place.

# %%
world = World()
eager = replace(machine, attention="eager")
model, tokenizer = load_model(eager)
untrained, _ = load_model(eager, trained=False, seed=seed)
for network in (model, untrained):
    network.requires_grad_(False)
layers = model.model.layers
num_layers, num_heads = len(layers), model.config.num_attention_heads
places = [*layers, model.model.norm]  # the input of places[l] is the residual stream h(l)


@contextmanager
def at_inputs(changes: Mapping[nn.Module, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """While open, each module shows its input (batch, seq, size) to a function.

    What the function returns goes into the module instead; nothing, if it is None.
    """

    def hook(change: Callable, module: nn.Module, arguments: tuple) -> tuple | None:
        new = change(arguments[0])
        return None if new is None else (new, *arguments[1:])

    handles = [m.register_forward_pre_hook(partial(hook, change)) for m, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# %% [markdown]
# Texts of different length are padded on the right. Attention only looks back, so no token of a text can see the padding. The answers to all questions of this lesson are single tokens for *shima-4m*; for another tokenizer the first token of the answer counts.


# %%
def read(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids (texts, seq), padded on the right, and the position of each text's last token (texts,)."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    return ids.to(machine.device), torch.tensor([len(row) - 1 for row in rows], device=machine.device)


def first_tokens(words: Sequence[str]) -> Tensor:
    """The first token of each word after a space (words,)."""
    rows = tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    return torch.tensor([row[0] for row in rows], device=machine.device)


def at(states: Tensor, ends: Tensor) -> Tensor:
    """One position of each text: (texts, seq, size) -> (texts, size)."""
    return states[torch.arange(len(states), device=states.device), ends]


def next_logits(ids: Tensor, ends: Tensor) -> Tensor:
    """Logits of the token that follows each text (texts, vocab)."""
    normed = model.model(input_ids=ids, use_cache=False).last_hidden_state  # (texts, seq, hidden)
    return model.lm_head(at(normed, ends)).float()


def accuracy(ids: Tensor, ends: Tensor, answers: Tensor) -> Score:
    """Share of texts that the model continues with the right token."""
    return score(int((next_logits(ids, ends).argmax(-1) == answers).sum()), len(ids))


def inputs_of(modules: Sequence[nn.Module], ids: Tensor, network: nn.Module = model) -> list[Tensor]:
    """What goes into each of the modules when the network reads the ids: (texts, seq, size) each."""
    seen: dict[nn.Module, Tensor] = {}
    with at_inputs({module: partial(seen.__setitem__, module) for module in modules}):
        network.model(input_ids=ids, use_cache=False)
    return [seen[module] for module in modules]


# %% [markdown] tags=["core"]
# ## 1 · Who wrote the answer?
#
# **Question.** The model answers with a token. Which of its parts put it there?
#
# A transformer layer only *adds* to the residual stream. So what the last layer leaves at position $t$ is a plain sum of the embedding $e_t$ and of what each head and each MLP wrote:
#
# $$h^{(L)}_t = e_t + \sum_{l=0}^{L-1} \Big( \sum_h a^{l,h}_t + m^l_t \Big), \qquad \text{logits}_t = W_U \, \Big( \gamma \odot \frac{h^{(L)}_t}{\text{rms}(h^{(L)}_t)} \Big)$$
#
# The norm divides by one number per position. Take this number as given, and the logits are linear in $h^{(L)}_t$: each part $p$ contributes $W_U (\gamma \odot p) / \text{rms}(h^{(L)}_t)$. This is *direct logit attribution* (Elhage et al. 2021). A head's part comes from its own columns of the output matrix, because $W_O$ applied to the heads side by side is the sum of $W_O^h$ applied to each.


# %%
def residual_parts(ids: Tensor) -> dict[str, Tensor]:
    """What each part adds to the residual stream, name -> (texts, seq, hidden)."""
    outputs = [matrix for layer in layers for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    start, *inputs = inputs_of([layers[0], *outputs], ids)
    parts = {"embedding": start}
    for number in range(num_layers):
        mixed, inner = inputs[2 * number : 2 * number + 2]
        mixed = mixed.unflatten(-1, (num_heads, -1))  # (texts, seq, heads, head_dim)
        weights = outputs[2 * number].weight.unflatten(1, (num_heads, -1))  # (hidden, heads, head_dim)
        for head in range(num_heads):
            parts[f"{number}.{head}"] = mixed[:, :, head] @ weights[:, head].T
        parts[f"MLP {number}"] = outputs[2 * number + 1](inner)
    return parts


def direct_logits(part: Tensor, final: Tensor) -> Tensor:
    """The part's share of the logits (..., vocab), given the final residual stream `final` (..., hidden)."""
    norm = model.model.norm
    scale = (final.float().square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
    return model.lm_head(part * (norm.weight * scale).to(part.dtype)).float()


# %% [markdown]
# The prompts show a mapping from words to colours that training never had, and ask for a word that was shown: `Pairs: pig pink; bee red; ... pig`. Lesson 02 found that the model gets these right.


# %%
def asked(questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, last positions and right answers (first tokens) of questions."""
    return *read([question.prompt for question in questions]), first_tokens([q.answer for q in questions])


few_shot = asked(world.few_shot(lesson.scaled(48, 8), seed, shots=8))
ids, ends, answers = few_shot
parts = residual_parts(ids)
final = inputs_of(places, ids)[-1]
ours = direct_logits(sum(parts.values()), final)  # (texts, seq, vocab)
difference = (ours - model(input_ids=ids).logits.float()).abs().max().item()
lesson.equal("the parts' shares of the logits sum to the model's logits", difference, within=1e-3)
library = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
pairs = zip(inputs_of(layers, ids), library[:-1], strict=True)  # the library's last entry is normed
gap = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
lesson.equal("the inputs of the layers are transformers' hidden states", gap, within=1e-6)
print(f"{len(parts)} parts; right answers {accuracy(*few_shot)}, for example")
print(tokenizer.decode(ids[0, : ends[0] + 1]))

# %% [markdown]
# A logit alone says little, since a constant added to all of them changes nothing. Ask by how much each part prefers the right colour to the other colours.


# %%
def advantage(logits: Tensor, answers: Tensor, options: Tensor) -> Tensor:
    """Logit of the right option minus the mean of the others: (texts, vocab) -> (texts,)."""
    right = logits.gather(1, answers[:, None]).squeeze(1)
    return right - (logits[:, options].sum(1) - right) / (len(options) - 1)


ids, ends, answers = few_shot
colours, last = first_tokens(LABELS), at(final, ends)
given = {}  # name of a part -> its preference for the right colour, mean over the prompts
for name, part in parts.items():
    given[name] = advantage(direct_logits(at(part, ends), last), answers, colours).mean().item()
bars = {"embedding": given["embedding"]}
for number in range(num_layers):
    bars[f"attention {number}"] = sum(given[f"{number}.{head}"] for head in range(num_heads))
    bars[f"MLP {number}"] = given[f"MLP {number}"]
figure, axes = plt.subplots()
axes.bar(range(len(bars)), bars.values(), color=plots.COLORS[0])
axes.set_xticks(range(len(bars)), bars, rotation=40, ha="right")
axes.set(title="The last layer writes the answer", ylabel="preference for the right colour (logits)")
plots.show(figure, alt="Bars for the embedding and for each layer's attention and MLP: the last layer's MLP "
                       "stands out, its attention follows, and all others are near zero.")  # fmt: skip
print(", ".join(f"{name}: {value:+.1f}" for name, value in bars.items()))
latest = bars[f"attention {num_layers - 1}"] + bars[f"MLP {num_layers - 1}"]
earlier = sum(bars.values()) - latest
lesson.claim("the last layer prefers the right colour by more logits than all before it",
             latest - earlier, at_least=2.0)  # fmt: skip

# %% [markdown]
# **What you see.** The parts' shares sum to the logits. The last layer writes the preference for the right colour: its attention a small part, and its MLP, which reads what that attention brought, most. What the layers before it wrote hardly prefers any colour. Whatever they do for the answer, they do indirectly, through what the last layer reads. Attribution shows which part writes the answer. It does not show which parts the answer needs. Sections 3 and 4 ask that.

# %% [markdown] tags=["core"]
# ## 2 · Heads that copy
#
# **Question.** How does the last layer know the colour?
#
# The simplest mechanism that could work has two steps. An *induction head* looks for the token after an earlier copy of the current one, and predicts it again (Olsson et al. 2022). To find that place, each token must carry the name of its predecessor, and a *previous-token head* in an earlier layer writes it there. Both are visible in the attention patterns of a list that is said twice.


# %%
def said_twice(number: int, tokens: Sequence[int], generator: random.Random, length: int = 12) -> Tensor:
    """Token ids of rows `Repeat: a b c | a b c` with a new list of tokens each (number, seq)."""
    start, bar = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Repeat:", " |"))
    lists = [generator.sample(tokens, length) for _ in range(number)]
    return torch.tensor([start + said + bar + said for said in lists], device=machine.device)


def head_scores(network: nn.Module, ids: Tensor, length: int = 12) -> tuple[Tensor, Tensor]:
    """Mean attention from the second list, (layers, heads) each.

    First to the token after the earlier copy of the current one, then to the token just before.
    """
    patterns = network.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    patterns = torch.stack(patterns).float()  # (layers, texts, heads, seq, seq)
    second = torch.arange(ids.shape[1] - length, ids.shape[1])  # positions of the second list
    after_copy = second - (length + 1) + 1  # a list and its bar back, and one on
    return patterns[..., second, after_copy].mean((1, 3)), patterns[..., second, second - 1].mean((1, 3))


words = sorted(set(first_tokens(world.words).tolist()))
any_token = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
lists = {
    name: said_twice(lesson.scaled(48, 8), tokens, random.Random(f"{name}/{seed}"))
    for name, tokens in (("words", words), ("any tokens", any_token))
}
induction, previous = head_scores(model, lists["words"])
induction_any, _ = head_scores(model, lists["any tokens"])
induction_blank, previous_blank = head_scores(untrained, lists["words"])
print(tokenizer.decode(lists["words"][0]))

# %%
figure, sides = plt.subplots(1, 2, figsize=(8, 3.8))
titles = ("to the token after the earlier copy", "to the token just before")
for axes, scores, title in zip(sides, (induction, previous), titles, strict=True):
    axes.imshow(scores.cpu(), vmin=0, vmax=1, cmap="Blues", origin="lower", aspect="auto")
    for (layer, head), value in np.ndenumerate(scores.cpu().numpy()):
        axes.text(head, layer, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set(xlabel="head", ylabel="layer", xticks=range(num_heads), yticks=range(num_layers))
    axes.set_title(title, fontsize=10, weight="normal")
    axes.grid(False)
figure.suptitle("The last layer copies, two heads before it look one token back", x=0.02, ha="left", weight="bold")
plots.show(figure, alt="Two maps of layers by heads: all heads of the last layer attend to the token after the "
                       "earlier copy; one head each of the two middle layers attends to the token before.")  # fmt: skip
strongest = previous.flatten().topk(2)
two_best = sorted(divmod(index, num_heads) for index in strongest.indices.tolist())
print("strongest previous-token heads:", ", ".join(f"{layer}.{head}" for layer, head in two_best))
print(f"untrained model, best head: {induction_blank.max():.2f} and {previous_blank.max():.2f}")
print(
    f"best head for the token after the copy: {induction.max():.2f} on words, {induction_any.max():.2f} on any tokens"
)
lesson.claim("on lists of words the best induction head attends to the token after the copy",
             induction.max().item(), at_least=0.5)  # fmt: skip
lesson.claim("both strongest previous-token heads attend to the token before", strongest.values[1].item(), at_least=0.4)
lesson.claim("the best induction head is weaker on lists of any tokens than on lists of words",
             (induction.max() - induction_any.max()).item(), at_least=0.2)  # fmt: skip

# %% [markdown]
# **What you see.** Every head of the last layer is an induction head, and two heads in the middle layers are previous-token heads. The untrained model has neither. One textbook point fails: induction heads are usually *defined* on lists of random tokens, since no meaning can help there. On such lists these heads are clearly weaker. A likely reason: this model was only ever trained to repeat words and names.

# %% [markdown] tags=["core"]
# ## 3 · Take heads out
#
# **Question.** Which heads are *needed*?
#
# Attention that goes to the right place proves nothing: the head may be ignored. So take it out. The simplest way is to set its output to zero. But zero is a value that the next layers have never met; the mean of its outputs over other prompts is the milder choice. *Mean ablation* keeps what the head says always and removes what it says about this prompt.


# %%
def mean_outputs(ids: Tensor) -> dict[int, Tensor]:
    """Mean output of each head over texts and positions, layer -> (heads, head_dim)."""
    mixed = inputs_of([layer.self_attn.o_proj for layer in layers], ids)  # (texts, seq, heads * head_dim)
    return {number: m.mean((0, 1)).unflatten(0, (num_heads, -1)) for number, m in enumerate(mixed)}


def without(heads: Sequence[tuple[int, int]], outputs: Mapping[int, Tensor]):
    """While open, each head (layer, head) gives its entry of `outputs` in place of what it computes."""

    def change(number: int, mixed: Tensor) -> Tensor:
        mixed = mixed.unflatten(-1, (num_heads, -1)).clone()  # (texts, seq, heads, head_dim)
        for head in (head for layer, head in heads if layer == number):
            mixed[:, :, head] = outputs[number][head]
        return mixed.flatten(-2)

    return at_inputs({layers[n].self_attn.o_proj: partial(change, n) for n in {layer for layer, _ in heads}})


usual = mean_outputs(asked(world.few_shot(lesson.scaled(48, 8), seed + 1000, shots=8))[0])
nothing = {number: torch.zeros_like(output) for number, output in usual.items()}
with without([(0, 1)], nothing):
    hooked = next_logits(*few_shot[:2])
matrix = layers[0].self_attn.o_proj
kept, size = matrix.weight.data, matrix.in_features // num_heads
matrix.weight.data = kept.index_fill(1, torch.arange(size, 2 * size, device=kept.device), 0.0)
difference = (next_logits(*few_shot[:2]) - hooked).abs().max().item()
matrix.weight.data = kept
lesson.equal("a head with output 0 is a model in which its columns of the output matrix are 0", difference, within=1e-4)


# %% [markdown]
# Now take out every single head, and every *pair* of heads, on a few prompts. That is the whole search: there is nothing to choose by hand. On a model with hundreds of heads only the strongest previous-token heads are tried.

# %% tags=["headline"]
def colours_in(ids: Tensor) -> Tensor:
    """Which colours stand in each prompt (texts, colours)."""
    return (ids[:, :, None] == colours).any(1)


def blind_guess(ids: Tensor) -> float:
    """Share that a guess among the colours of the prompt gets right."""
    return (1 / colours_in(ids).sum(1).clamp(min=1)).mean().item()


strongest = sorted(np.ndindex(num_layers, num_heads), key=lambda head: -previous[head].item())
tried = sorted(strongest[: lesson.scaled(settings["heads_in_pairs"], 4)])
search = asked(world.few_shot(lesson.scaled(24, 6), seed + 2000, shots=8))
grid = np.ones((len(tried), len(tried)))  # accuracy without heads i and j; on the diagonal, without head i
for i, j in combinations_with_replacement(range(len(tried)), 2):
    with without({tried[i], tried[j]}, usual):
        grid[i, j] = grid[j, i] = accuracy(*search).accuracy
pairs = sorted(combinations(range(len(tried)), 2), key=lambda pair: grid[pair])
worst, next_worst = ([tried[i] for i in pair] for pair in pairs[:2])
names = [f"{layer}.{head}" for layer, head in tried]
print(f"{len(names)} heads one by one: at least {grid.diagonal().min():.0%} right; {len(pairs)} pairs:", end=" ")
print("; ".join(f"{names[i]} and {names[j]} {grid[i, j]:.0%}" for i, j in pairs[:3]), "...")
figure, axes = plt.subplots(figsize=(6.4, 5.4))
picture = axes.imshow(grid, vmin=0, vmax=1, cmap="Blues_r")
axes.set_xticks(range(len(names)), names, rotation=90)
axes.set(yticks=range(len(names)), yticklabels=names, xlabel="head taken out", ylabel="head taken out as well",
         title="No single head is needed, one pair is")  # fmt: skip
axes.grid(False)
bar = figure.colorbar(picture, format=plots.PERCENT, label="right answers (diagonal: one head out)", shrink=0.8)
bar.ax.axhline(guessed := blind_guess(search[0]), color=plots.COLORS[1])
print(f"orange line on the bar: a guess among the colours of the prompt, {guessed:.0%} right")
plots.show(figure, alt="A square of heads by heads. It is light everywhere, the diagonal included, except in one "
                       "cell and its mirror image, which are dark: heads 1.1 and 2.2 together.")  # fmt: skip
lesson.claim("each head can be taken out alone, and most answers stay right", grid.diagonal().min(), at_least=0.85)
lesson.claim("both heads of the worst pair are among the two strongest previous-token heads",
             len(set(worst) & set(two_best)), at_least=1.5)  # fmt: skip

# %% [markdown]
# The pair was *selected* as the worst of many, so its number is flattering. Measure it again on other prompts, beside the runner-up and whole layers. Right answers alone are a coarse measure: they are all there until they break. So add the preference for the right colour of section 1, and the share of answers that are one of the colours in the prompt.


# %%
def said_in_prompt(ids: Tensor, logits: Tensor) -> float:
    """Share of answers that are a colour of the prompt."""
    return (colours_in(ids) & (logits.argmax(-1)[:, None] == colours)).any(1).float().mean().item()


fresh = asked(world.few_shot(lesson.scaled(96, 8), seed + 3000, shots=8))
out = {"none": []} | {f"{layer}.{head}": [(layer, head)] for layer, head in worst}
out |= {"both": worst, "runner-up pair": next_worst}
every = {number: [(number, head) for head in range(num_heads)] for number in range(num_layers)}
out |= {f"all of layer {number}": every[number] for number in range(num_layers)}
right, prefers, shown = {}, {}, {}
for name, heads in out.items():
    with without(heads, usual):
        logits = next_logits(*fresh[:2])
    right[name] = score(int((logits.argmax(-1) == fresh[2]).sum()), len(logits))
    prefers[name], shown[name] = advantage(logits, fresh[2], colours).mean().item(), said_in_prompt(fresh[0], logits)
rows = {name: [str(right[name]), f"{prefers[name]:.1f}", f"{shown[name]:.0%}"] for name in out}
show_table(rows, ["right answers", "preference (logits)", "answers that stand in the prompt"])
print(f"a guess among the colours of the prompt would be right in {blind_guess(fresh[0]):.0%}")
alone = {}
for layer, head in tried:
    with without([(layer, head)], usual):
        alone[f"{layer}.{head}"] = advantage(next_logits(*fresh[:2]), fresh[2], colours).mean().item()
least = sorted(alone, key=alone.get)[:3]
print("single heads that cost most preference:", ", ".join(f"without {name} {alone[name]:.1f}" for name in least))
fall = right["runner-up pair"].accuracy - right["both"].accuracy
lesson.claim("the worst pair costs more right answers than the runner-up pair", fall, at_least=0.3, form=".0%")
fall = right["none"].accuracy - right[f"all of layer {num_layers - 1}"].accuracy
lesson.claim("without the heads of the last layer most right answers are lost", fall, at_least=0.6, form=".0%")

# %% [markdown]
# Now look at two attentions. Does the last layer still look at the colour that follows the asked word? And what does the *second* head of the pair do when the first is out? Wang et al. (2022) found *backup heads* in GPT-2. A backup head changes its attention when another head is removed. A redundant head does the same work all along.


# %%
def colour_attention(ids: Tensor, ends: Tensor) -> float:
    """Attention of the last layer, from the last token to all tokens after its earlier copies; mean over heads."""
    patterns = model.model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    after = F.pad(ids[:, :-1] == at(ids, ends)[:, None], (1, 0))  # (texts, seq)
    from_end = at(patterns[-1].transpose(1, 2), ends)  # (texts, heads, seq)
    return (from_end * after[:, None]).sum(-1).float().mean().item()


first, other = worst
kept_one = f"layer {first[0]} except {first[0]}.{first[1]}"
out[kept_one] = [head for head in every[first[0]] if head != first]
looked = ("none", *(f"{layer}.{head}" for layer, head in worst), "both", kept_one, f"all of layer {first[0]}")
to_colour, second = {}, {}
for name in looked:
    with without(out[name], usual):
        to_colour[name] = colour_attention(*fresh[:2])
        second[name] = head_scores(model, lists["words"])[1][other].item()
rows = {f"without {name}": [f"{to_colour[name]:.2f}", f"{second[name]:.2f}"] for name in looked}
show_table(rows, ["last layer to the colour", f"head {other[0]}.{other[1]} to the token before"])
one_left = min(to_colour[f"{layer}.{head}"] for layer, head in worst)
lesson.claim("one head of the pair keeps the last layer's attention on the colour", one_left - to_colour["both"],
             at_least=0.4)  # fmt: skip

# %% [markdown]
# **What you see.** (A pattern is computed also where the head's output is then replaced.) Taking out any one head changes no answer, and nor does a whole layer before the last. It is not without effect: without single heads the preference for the right colour falls, only not so far that another colour wins. Had you stopped at the diagonal, you would have concluded that the previous-token heads are unimportant, and you would have been wrong. Of all pairs one breaks the answer, and it is these two. With both out, the last layer no longer finds the colour. The model still knows which colours occur, since most of its answers are among them. How far it does more than guess among them tells the line under the table.
#
# Is the second head a backup? Without 1.1 it attends about as before, so the two are redundant. Without the *other* heads of layer 1 it looks back more, so it does react, but not to 1.1. If two heads do the same job, removing either one changes no answer: ablation of single parts finds only what is needed *alone*.

# %% [markdown] tags=["core"]
# ## 4 · Exchange parts of two runs
#
# **Question.** Where in the model is a fact on its way from the name to the answer?
#
# Ablation destroys. *Activation patching* exchanges: run the question about person A and keep the residual stream. Run the same question about person B, but at one place $h^{(l)}_t$ put in what A's run had there. If the answer becomes A's, this place carried what makes the difference between the two runs. Is that the *fact*, or only the *person*? For an answer, take the name's states from another question about A, that for A's trade. If they bring A's town as well, they need not hold the town.


# %%
def about(form: str, names: Sequence[str]) -> tuple[Tensor, slice]:
    """Token ids of a question about each name (names, seq), and where the names stand; they are equally long."""
    before, after = f"Question: {form}\nAnswer:".split(" {name}")
    prefix, suffix = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    named = tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prefix + tokens + suffix for tokens in named], device=machine.device)
    return ids, slice(len(prefix), len(prefix) + len(named[0]))


def last_positions(ids: Tensor) -> Tensor:
    """The last position of each text, where all are equally long (texts,)."""
    return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)


def answers_to(ids: Tensor) -> Tensor:
    """The token that the model gives after each text."""
    return next_logits(ids, last_positions(ids)).argmax(-1)


def patched(ids: Tensor, place: int, positions: Sequence[int], source: Tensor, origins: Sequence[int] = ()) -> Tensor:
    """Answers (texts,) with the residual stream before layer `place` taken from `source` at some positions.

    `origins` says where these positions stand in the source, if that is another question.
    """

    def change(state: Tensor) -> Tensor:
        state = state.clone()
        state[:, positions] = source[:, origins or positions]
        return state

    with at_inputs({places[place]: change}):
        return answers_to(ids)


# %% [markdown]
# The people are well known to the model (rank 1 to 300), their names have equally many tokens, and the three towns of a triple differ. The question is in a phrasing that training never used.

# %%
well_known = world.people[:300]
lengths = [len(row) for row in tokenizer([f" {p.name}" for p in well_known], add_special_tokens=False)["input_ids"]]
usual_length = Counter(lengths).most_common(1)[0][0]
known = [person for person, length in zip(well_known, lengths, strict=True) if length == usual_length]
TOWN = RELATIONS["town"]
generator, triples = random.Random(f"triples/{seed}"), []
while len(triples) < lesson.scaled(40, 6):
    people = generator.sample(known, 3)
    if len({person.facts["town"] for person in people}) == 3:
        triples.append(people)
form = TOWN.held_out_questions[1]
(ids_a, span), (ids_b, _), (ids_c, _) = (about(form, [people[i].name for people in triples]) for i in range(3))
town_a, town_b, town_c = (first_tokens([people[i].facts["town"] for people in triples]) for i in range(3))
trade_a, span_trade = about(RELATIONS["trade"].held_out_questions[0], [people[0].name for people in triples])
states_a, states_c, states_trade = (inputs_of(places, ids) for ids in (ids_a, ids_c, trade_a))
differ = (patched(ids_b, 1, range(ids_b.shape[1]), states_a[1]) != answers_to(ids_a)).sum().item()
lesson.equal("a patch of all positions is the other person's run", differ)
unpatched = score(int((answers_to(ids_a) == town_a).sum()), len(triples))
print(f"{len(known)} people; {tokenizer.decode(ids_a[0])!r}; A's town without a patch: {unpatched}")

# %%
depths = sorted({round(x) for x in np.linspace(0, num_layers, min(num_layers, 6) + 1)})
header = [f"before {depth}" if depth < num_layers else "end" for depth in depths]
ticks = [str(depth) if depth < num_layers else "end" for depth in depths]
end = ids_b.shape[1] - 1
name_at = list(range(span.start, span.stop))
where = {
    "before the name": list(range(span.start)), "whole name": name_at, "last token of the name": name_at[-1:],
    "between name and end": list(range(span.stop, end)), "last position": [end],
    "name and last position": [*name_at, end],
}  # fmt: skip


def moved(
    positions: list[int], states: Sequence[Tensor], to: Tensor = town_a, origins: Sequence[int] = ()
) -> list[float]:
    """Share of answers that are the town `to`, for a patch before each of the depths."""
    return [(patched(ids_b, d, positions, states[d], origins) == to).float().mean().item() for d in depths]


effect = {name: moved(positions, states_a) for name, positions in where.items()}
effect["whole name, from A's trade question"] = moved(name_at, states_trade, town_a, range(*span_trade.indices(99)))
from_c = {f"from C: becomes {who}": moved(name_at, states_c, to) for who, to in (("C's", town_c), ("A's", town_a))}
from_c["from C: stays B's"] = moved(name_at, states_c, town_b)
show_table({name: [f"{share:.0%}" for share in row] for name, row in (effect | from_c).items()}, header)

# %%
lines = ("whole name", "whole name, from A's trade question", "last token of the name", "last position")
figure = plots.curve(
    {name: (depths, effect[name]) for name in lines}, title="Who is asked about leaves the name in the last two layers",
    xlabel="layer before which the residual stream is exchanged", ylabel="answers that become A's town", percent=True,
)  # fmt: skip
figure.axes[0].set_xticks(depths, ticks)
figure.axes[0].lines[1].set(linestyle=(0, (2, 2)), marker="")  # it lies on the line of the whole name
plots.show(figure, alt="The whole name's line is at the top for the early layers and falls to zero at the end. The "
                       "dashed line of the patch from the trade question lies on it. The last position's is at zero "
                       "and rises to the top after the last layer.")  # fmt: skip
early = slice(1, max(2, len(depths) - 2))  # from layer 1 to all but before the last layer, and the end
whole, from_trade, part_of_it, final_position = (effect[name] for name in lines)
lesson.claim("before the early layers a patch of the whole name moves the answer", min(whole[early]), at_least=0.85,
             control=max(effect["between name and end"]))  # fmt: skip
lesson.claim("so does a patch of the name from a question about another fact", min(from_trade[early]), at_least=0.85,
             control=max(from_c["from C: becomes A's"]))  # fmt: skip
lesson.claim("a patch of the name's last token alone mostly does not", max(part_of_it), at_most=0.4,
             control=min(whole[early]))  # fmt: skip
lesson.claim("nor does a patch of the last position before the early layers", max(final_position[early]), at_most=0.1,
             control=final_position[-1])  # fmt: skip

# %% [markdown]
# **What you see.** (Before layer 0 the patch only exchanges words: it *is* the question about A. So the claims start at layer 1.) Before the early layers the answer hangs on the tokens of the name, and not on the last one alone: that mostly does not do it. In GPT, Meng et al. (2022) found the last token of the subject to be the decisive place. The last position carries nothing yet. Before the last layer the name alone brings A's town in a part of the cases, and so does the last position; only both together bring it always. After it everything is at the last position. A patch from C brings C's town, so the answer follows the patch and is not merely disturbed.
#
# Is the *fact* at the name? The patch cannot tell you. Even name states from a question about A's *trade* bring A's *town*, just as often. So the patch moves the *person*. Which of the person's facts is read is decided later. Section 6 asks with another method whether the town itself is there.

# %% [markdown] tags=["further"]
# ## 5 · Read the answer early
#
# *Further: no core section needs this one.*
#
# **Question.** Does the model know its answer before the last layer?
#
# Every layer writes in the same stream, so apply the last norm and the unembedding early, as if the remaining layers added nothing: $W_U\,\text{norm}(h^{(l)}_t)$. This is the *logit lens* (nostalgebraist 2020). In GPT-2 the answer often appears in it many layers before the end.


# %%
def lens(states: Tensor) -> Tensor:
    """Logits of any residual stream (..., hidden) -> (..., vocab), as if the remaining layers added nothing."""
    return model.lm_head(model.model.norm(states)).float()


tasks = {
    "facts": world.closed_book(lesson.scaled(64, 8), seed, range(1, 101)),
    "reading": world.open_book(lesson.scaled(64, 8), seed),
    "few-shot": world.few_shot(lesson.scaled(64, 8), seed, shots=8),
}
at_end = {}  # task -> the residual stream at the last position, (depths, texts, hidden), and the answers
for task, questions in tasks.items():
    ids, ends, answers = asked(questions)
    states = inputs_of([places[depth] for depth in depths], ids)
    at_end[task] = torch.stack([at(state, ends) for state in states]), answers
difference = (lens(at_end["few-shot"][0][-1]) - next_logits(*asked(tasks["few-shot"])[:2])).abs().max().item()
lesson.equal("after the last layer the lens is the model", difference, within=1e-4)


def right_by_depth(read_out: Callable[[Tensor, int], Tensor]) -> dict[str, list[float]]:
    """Share of right answers, task -> one for each depth; `read_out` gives logits of states at a depth."""
    return {
        task: [(read_out(states[i], i).argmax(-1) == answers).float().mean().item() for i in range(len(states))]
        for task, (states, answers) in at_end.items()
    }


by_logit_lens = right_by_depth(lambda states, _: lens(states))
show_table({task: [f"{share:.0%}" for share in row] for task, row in by_logit_lens.items()}, header)

# %% [markdown]
# Is the answer not there, or only written in another basis? The *tuned lens* (Belrose et al. 2023) learns a translation for each depth, an affine map that starts as the identity,
#
# $$\text{lens}_l(h) = W_U\,\text{norm}(A_l h + b_l), \qquad \min_{A_l, b_l} \; \mathbb{E}\, \mathrm{KL}\big(\text{model} \,\|\, \text{lens}_l\big)$$
#
# It is trained on ordinary text to imitate the model's own final distribution, never on answers.


# %%
def text_states(start: int, number: int) -> Tensor:
    """Residual streams of rows of Shima's texts that pretraining did not use: (depths, tokens, hidden)."""
    texts = list(islice(world.documents(5000 + seed, start=start), 12 * number))
    rows = torch.tensor(list(pack(tokenizer(texts, add_special_tokens=False)["input_ids"], 128))[:number])
    parts = [torch.stack(inputs_of([places[d] for d in depths], part.to(machine.device))) for part in rows.split(8)]
    return torch.cat(parts, 1).flatten(1, 2).float()


train_states, test_states = text_states(0, lesson.scaled(64, 8)), text_states(100_000, lesson.scaled(12, 4))
hidden, before_end = train_states.shape[-1], len(depths) - 1
norm_scale, unembedding = model.model.norm.weight.float(), model.lm_head.weight.float()


def lens_log_probs(states: Tensor) -> Tensor:
    """Log-probabilities (..., vocab) of residual streams, in 32 bits."""
    return (F.rms_norm(states, (hidden,), norm_scale, model.config.rms_norm_eps) @ unembedding.T).log_softmax(-1)


def kl(target: Tensor, states: Tensor) -> Tensor:
    """KL divergence of each depth's lens from the model (depths,), in nats, averaged over tokens."""
    log_p = lens_log_probs(target)
    return (log_p.exp() * (log_p - lens_log_probs(states))).sum(-1).mean(-1)


# %%
def train_lens(run: int, steps: int) -> tuple[Tensor, Tensor]:
    """A (depths, hidden, hidden) and b (depths, 1, hidden), after some steps of Adam on 256 tokens each."""
    A = torch.eye(hidden, device=machine.device).repeat(before_end, 1, 1).requires_grad_()
    b = torch.zeros(before_end, 1, hidden, device=machine.device, requires_grad=True)
    optimizer = torch.optim.Adam([A, b], lr=settings["lens_rate"])
    generator = torch.Generator().manual_seed(run)
    for step in range(steps):
        chosen = torch.randint(train_states.shape[1], (256,), generator=generator).to(machine.device)
        batch = train_states[:, chosen]
        loss = kl(batch[-1], batch[:-1] @ A + b).sum()
        optimizer.param_groups[0]["lr"] = settings["lens_rate"] * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return A.detach(), b.detach()


steps = lesson.scaled(80)
tuned_lenses = [train_lens(100 * seed + run, steps) for run in range(3)]
logit_kl = kl(test_states[-1], test_states[:-1])  # (depths,)
tuned_kl = torch.stack([kl(test_states[-1], test_states[:-1] @ A + b) for A, b in tuned_lenses])  # (runs, depths)
rows = {"logit lens": logit_kl} | {f"tuned lens, run {run}": values for run, values in enumerate(tuned_kl)}
show_table({name: [f"{value:.2f}" for value in row.tolist()] for name, row in rows.items()}, header[:-1])
print(f"nats from the model's distribution; {steps} steps, {test_states.shape[1]} held-out tokens")
ratio = (tuned_kl[:, 1:] / logit_kl[1:]).max().item()
lesson.claim("after the first layer the tuned lens is nearer to the model than the logit lens, as a ratio",
             ratio, at_most=0.75)  # fmt: skip


# %%
def tuned(states: Tensor, depth: int, run: int = 0) -> Tensor:
    """Log-probabilities of a tuned lens for states at the depth with this index; at the end, the model's own."""
    A, b = tuned_lenses[run]
    return lens_log_probs(states.float() @ A[depth] + b[depth] if depth < before_end else states.float())


by_tuned_lens = [right_by_depth(partial(tuned, run=run)) for run in range(3)]
show_table({f"tuned, {task}": [f"{share:.0%}" for share in row] for task, row in by_tuned_lens[0].items()}, header)
by_run = {task: np.array([run[task] for run in by_tuned_lens]) for task in tasks}  # (runs, depths) each
figure = plots.curve(
    {task: (depths, shares.mean(0), shares.min(0), shares.max(0)) for task, shares in by_run.items()},
    title="The tuned lens finds few answers before the last layer", percent=True,
    xlabel="layer before which the lens looks", ylabel="right answers",
    references={"a guess of 24": 1 / len(world.towns)},
)  # fmt: skip
figure.axes[0].set_xticks(depths, ticks)
plots.show(figure, alt="Three lines for three tasks, each the mean of three tuned lenses: all are low before every "
                       "layer and jump to the top at the end.")  # fmt: skip
best_logit = max(max(row[:-1]) for row in by_logit_lens.values())
best_tuned = max(max(row[:-1]) for run in by_tuned_lens for row in run.values())
control = min(row[-1] for row in by_logit_lens.values())
lesson.claim("before the last layer the logit lens misses most answers, on its best task", best_logit, at_most=0.5,
             control=control, form=".0%")  # fmt: skip
lesson.claim("so does a tuned lens, in the best of three runs on its best task", best_tuned, at_most=0.5,
             control=control, form=".0%")  # fmt: skip

# %% [markdown]
# A wrong guess may still be a guess of the right *kind*: a trade where a trade was asked for. Count these for the facts. And where in the lens's order of all tokens does the right answer stand?


# %%
def right_kind(guesses: Tensor) -> float:
    """Share of guesses that are a value of the relation that was asked for."""
    values = {name: set(first_tokens(world.values[name]).tolist()) for name in world.values}
    relations = [question.about["relation"] for question in tasks["facts"]]
    pairs = zip(guesses.tolist(), relations, strict=True)
    return float(np.mean([guess in values[name] for guess, name in pairs]))


def median_rank(logits: Tensor, answers: Tensor) -> float:
    """Place of the right answer in the order of all tokens, 1 is the first; median of the texts."""
    return ((logits > logits.gather(1, answers[:, None])).sum(1) + 1).float().median().item()


fact_states, fact_answers = at_end["facts"]
kinds = {"logit lens": [right_kind(lens(fact_states[i]).argmax(-1)) for i in range(len(depths))],
         "tuned lens": [right_kind(tuned(fact_states[i], i).argmax(-1)) for i in range(len(depths))]}  # fmt: skip
rows = {f"{name}, right kind": [f"{share:.0%}" for share in row] for name, row in kinds.items()}
ranks = [median_rank(tuned(fact_states[i], i), fact_answers) for i in range(len(depths))]
rows["tuned lens, median rank of the fact"] = [f"{rank:.0f}" for rank in ranks]
show_table(rows, header)
lesson.report("median rank of the right fact in the tuned lens before the last layer", ranks[-2], form=".0f")
lesson.claim("before the last layer the tuned lens names the right kind of thing", kinds["tuned lens"][-2],
             at_least=0.7, form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Here the textbook picture holds only in part. Before the last layer both lenses miss most answers. The basis is not the whole reason, since on ordinary text the tuned lens comes much nearer to the model than the logit lens, and its answers are hardly better. What both see is the *kind* of the answer. Yet the facts do take shape a little: before the last layer the lenses are right more often than a guess among the values of the kind, and from layer to layer the right fact moves up in the order of tokens. This fits section 4, by another method: there, too, the last position moved a small part of the answers before the last layer, and all of them at the end. A model of four layers has little room for an early answer; do not carry this over to a model of eighty.

# %% [markdown] tags=["core"]
# ## 6 · A probe that is always right
#
# **Question.** Is the town written in the residual stream at the name?
#
# The usual tool is a *probe*: a linear classifier trained on $h^{(l)}_t$. Take the simplest, ridge regression onto one column per town, whose solution is a formula. With states $X$ (rows, hidden) and towns $Y$ (rows, towns), both centred,
#
# $$W = (X^\top X + \lambda I)^{-1} X^\top Y$$
#
# and the largest entry of $x W + \bar y$ is the guess. Here $x$ is a new state without the mean of the training states, $\bar y$ the mean of the rows of $Y$ before it was taken out, and $\lambda$ the penalty on large weights. Half of the people are for training, in three phrasings of the question. The test is a fourth phrasing, which pretraining never used.


# %%
def ridge_probe(states: Tensor, labels: Tensor, classes: int, strength: float = 100.0) -> Callable[[Tensor], Tensor]:
    """Scores (rows, classes) for states (rows, hidden): linear regression on centred one-hot labels."""
    mean, spread = states.mean(0), states.std(0) + 1e-6
    x, y = (states - mean) / spread, F.one_hot(labels, classes).to(states.dtype)
    gram = x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)  # (hidden, hidden)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))  # (hidden, classes)
    return lambda new: (new - mean) / spread @ weights + y.mean(0)


generator = torch.Generator().manual_seed(seed)
x, y = torch.randn(60, 9, generator=generator).double(), torch.randint(4, (60,), generator=generator)
scaled = ((x - x.mean(0)) / (x.std(0) + 1e-6)).numpy()
library = Ridge(alpha=100.0).fit(scaled, F.one_hot(y, 4).numpy()).predict(scaled)
difference = (ridge_probe(x, y, 4)(x) - torch.from_numpy(library)).abs().max().item()
lesson.equal("the probe is sklearn's Ridge", difference, within=1e-8)

# %%
probed = known[: lesson.scaled(200, 12)]
forms = [*TOWN.training_questions[:3], TOWN.held_out_questions[1]]


def probe_states(network: nn.Module) -> tuple[Tensor, Tensor]:
    """States at the name's last token and at the last position, (forms, depths, people, hidden) each."""
    named, ended = [], []
    for form in forms:
        ids, span = about(form, [person.name for person in probed])
        modules = [*network.model.layers, network.model.norm]
        states = torch.stack(inputs_of([modules[d] for d in depths], ids, network)).float()
        named.append(states[:, :, span.stop - 1])
        ended.append(states[:, :, -1])
    return torch.stack(named), torch.stack(ended)


at_name, at_last = probe_states(model)
at_name_untrained, _ = probe_states(untrained)
towns = torch.tensor([world.towns.index(person.facts["town"]) for person in probed], device=machine.device)
half = len(probed) // 2
told = answers_to(about(forms[-1], [person.name for person in probed])[0])
knows = told == first_tokens([person.facts["town"] for person in probed])
print(
    f"{half} people to train on and {len(probed) - half} new ones; the model is right about {knows.float().mean():.0%}"
)
print(f"states of {at_name.shape[-1]} numbers")

# %% [markdown]
# Three controls. **Random labels:** every person gets a town by lot. Whatever the probe then gets right it has memorised (Hewitt and Liang 2019 call the difference to the true labels *selectivity*). **Untrained model:** nothing is known there. **New people:** the model knows their towns as well, so a probe that reads the *town*, and not the person, works for them too.


# %%
def probe_accuracy(states: Tensor, labels: Tensor, seen: Tensor, tested: Tensor) -> list[float]:
    """Share of right guesses in the last phrasing, one for each depth; trained on `seen` in the other phrasings."""
    right = []
    for depth in range(len(depths)):
        rows = states[:-1, depth, seen].flatten(0, 1)  # (forms * people, hidden)
        probe = ridge_probe(rows, labels[seen].repeat(len(forms) - 1), len(world.towns))
        right.append((probe(states[-1, depth, tested]).argmax(-1) == labels[tested]).float().mean().item())
    return right


found = {name: [] for name in ("seen people", "the same, random labels", "the same, untrained model", "new people",
                               "new people, last position", "the same, random labels, last position")}  # fmt: skip
for split in range(3):  # three ways to halve the people, and three lots
    generator = torch.Generator().manual_seed(3 * seed + split)
    order = torch.randperm(len(probed), generator=generator).to(machine.device)
    by_lot = torch.randint(len(world.towns), (len(probed),), generator=generator).to(machine.device)
    seen, new = order[:half], order[half:]
    tests = [(at_name, towns, seen), (at_name, by_lot, seen), (at_name_untrained, towns, seen), (at_name, towns, new),
             (at_last, towns, new), (at_last, by_lot, new)]  # fmt: skip
    for rows, (states, labels, tested) in zip(found.values(), tests, strict=True):
        rows.append(probe_accuracy(states, labels, seen, tested))
found = {name: np.array(rows) for name, rows in found.items()}  # (splits, depths) each
show_table({name: [f"{share:.0%}" for share in rows.mean(0)] for name, rows in found.items()}, header)

# %%
shown = {name: (depths, rows.mean(0), rows.min(0), rows.max(0)) for name, rows in list(found.items())[:5]}
figure = plots.curve(
    shown, title="The probe has learned the people, not the towns", percent=True, ylabel="right towns, new phrasing",
    xlabel="layer before which the probe looks", references={"chance": 1 / len(world.towns)},
)  # fmt: skip
figure.axes[0].set_xticks(depths, ticks)
plots.show(figure, alt="Three lines are high: seen people, the same with random labels, and in an untrained model. New "
                       "people stay near chance, except at the last position after the last layer.")  # fmt: skip
deepest = len(depths) - 2  # before the last layer
named, by_lots, news, at_the_end, lots_at_the_end = (found[name].mean(0) for name in found if "untrained" not in name)
lesson.claim("a probe on the name is no better on towns than on random labels", named[deepest] - by_lots[deepest],
             at_most=0.1, control=at_the_end[-1] - lots_at_the_end[-1])  # fmt: skip
lesson.claim("it does not find the towns of new people", news[deepest], at_most=0.2, control=named[deepest])
lesson.claim("the same probe finds the towns of new people where the answer stands", at_the_end[-1], at_least=0.2)

# %% [markdown]
# **What you see.** Without controls this would be a success: before layers 2 and 3 the probe nearly always names the town from the name's state, in a phrasing it was not trained on. But it is as good on towns given by lot. In a model that was never trained it is good as well, at some depths even better. From layer 2 on nearly each name has a state of its own, and a state has more numbers than there are people, so nearly any labels can be read off. (At the input the state is only that of the name's last token, which several names may share.) On new people it fails, though the model knows their towns. The method is not broken: at the last position after the last layer the same probe works for new people far more often than chance. So before the last layer the *person* is at the name. The town is not there yet, or not in a form that a probe trained on so few people could read for others. (Its failure alone does not prove that no linear map could: at the last position after the last layer the unembedding, a linear map, names more of the towns than the probe does.) This agrees with section 4, where the patch of a name moved the person. Always repeat a probe with random labels: here they score as high as the true ones.

# %% [markdown] tags=["further"]
# ## 7 · Change one fact
#
# *Further: no core section needs this one.*
#
# **Question.** Can a fact be changed by changing one matrix, and nothing else with it?
#
# Look at the second matrix of an MLP as a memory: for the key $k$ that comes in at the name's last token it gives the value $Wk$. ROME (Meng et al. 2022) asks for a matrix $W'$ that gives another value for this key, and otherwise changes as little as possible what comes out for ordinary text. Let $C = \mathbb{E}[k k^\top]$ be the mean over the keys of such text:
#
# $$\min_{W'} \; \mathrm{tr}\big((W' - W)\, C\, (W' - W)^\top\big) \quad \text{such that} \quad W' k = W k + \delta$$
#
# At such a minimum the gradient of the first term is a multiple of that of the condition (this is Lagrange's rule): $2 (W' - W) C = \mu k^\top$ with some vector $\mu$. Multiply by $C^{-1}$ from the right: $W' - W = \tfrac12 \mu\, (C^{-1} k)^\top$. The change has rank one. Put it into the condition, $(W' - W)\, k = \tfrac12 \mu\, (k^\top C^{-1} k)$, and you know $\mu$:
#
# $$W' = W + \frac{\delta\,(C^{-1} k)^\top}{k^\top C^{-1} k}$$
#
# The key $k$ is the mean over a few phrasings of the question. Use this same $k$ wherever the formula has a $k$: the first implementation of ROME mixed it with the key of one phrasing, and some edits destroyed the model (Gupta et al. 2024).
#
# The change of value $\delta$ is found by gradient: what must be added at the name's last token, so that the model answers with the new town? To see what the *matrix* adds to the error, measure also what happens if $\delta$ itself is added at that place, without any edit.


# %%
def rank_one(weight: Tensor, key: Tensor, change: Tensor, moment: Tensor) -> Tensor:
    """The matrix (hidden, inner) that adds `change` to the value of `key`; nearest to `weight` in the norm of C."""
    direction = torch.linalg.solve(moment, key)  # C^-1 k
    return weight + torch.outer(change, direction) / (direction @ key)


def wanted_changes(layer: int, names: Sequence[str], targets: Tensor, steps: int) -> Tensor:
    """What to add at each name's last token after this layer, so that the answer is the target (names, hidden)."""
    change = torch.zeros(len(names), hidden, device=machine.device, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=0.5)
    for _ in range(steps):
        loss = 0.001 * change.square().sum(-1).mean()  # no larger than needed
        for form in edit_forms:
            ids, span = about(form, names)
            mask = torch.arange(ids.shape[1], device=ids.device)[:, None] == span.stop - 1  # (seq, 1)
            add = partial(lambda mask, state: state + (mask * change[:, None]).to(state.dtype), mask)
            with at_inputs({places[layer + 1]: add}):
                logits = next_logits(ids, last_positions(ids))
            loss = loss + F.cross_entropy(logits, targets) / len(edit_forms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return change.detach()


edit_forms = TOWN.training_questions[:3]

# %%
frequent = [person for person in known if person.rank <= 100]
generator = random.Random(f"edits/{seed}")
moving = generator.sample(frequent, lesson.scaled(12, 3))
names = [person.name for person in moving]
new_towns = [generator.choice([town for town in world.towns if town != p.facts["town"]]) for p in moving]
targets = first_tokens(new_towns)
neighbours = generator.sample([person for person in frequent if person not in moving], 16)
OTHERS = [name for name in RELATIONS if name != "town"]


def says(form: str, people: Sequence, wanted: Tensor, add: tuple = ()) -> float:
    """Share of the people about whom the model gives the wanted answer.

    `add` is (layer, change): after this layer the change is added at the last token of the name.
    """
    ids, span = about(form, [person.name for person in people])
    added = {}
    if add:
        mask = torch.arange(ids.shape[1], device=ids.device)[:, None] == span.stop - 1  # (seq, 1)
        added = {places[add[0] + 1]: lambda state: state + (mask * add[1]).to(state.dtype)}
    with at_inputs(added):
        return (answers_to(ids) == wanted).float().mean().item()


def consequences(person, target: Tensor, add: tuple = ()) -> list[float]:
    """Shares: the new town in the edit's phrasings, in new ones; others' towns and the person's other facts kept."""
    held_out, own = TOWN.held_out_questions, first_tokens([person.facts[name] for name in OTHERS])
    other_facts = [says(RELATIONS[name].held_out_questions[0], [person], own[i], add) for i, name in enumerate(OTHERS)]
    return [
        float(np.mean([says(form, [person], target, add) for form in edit_forms])),
        float(np.mean([says(form, [person], target, add) for form in held_out])),
        says(held_out[1], neighbours, first_tokens([p.facts["town"] for p in neighbours])),
        float(np.mean(other_facts)),
    ]


# %% [markdown]
# Edit each person alone, in the first layer and in a later one. Beside ROME stand two simpler ways: the same rank-one edit with $C = I$, and fine-tuning of the same matrix on the same three questions, for a few steps and for more.


# %%
@contextmanager
def edited(matrix: nn.Linear, weight: Tensor) -> Iterator[nn.Parameter]:
    """While open, the matrix has another weight, which may be trained."""
    kept, matrix.weight = matrix.weight, nn.Parameter(weight.to(matrix.weight.dtype))
    try:
        yield matrix.weight
    finally:
        matrix.weight = kept


def fine_tuned(matrix: nn.Linear, name: str, target: Tensor, stops: Sequence[int], rate: float = 1e-3) -> list[Tensor]:
    """The matrix after each number of steps of Adam on the questions of the edit, all other weights frozen."""
    with edited(matrix, matrix.weight.data.clone()) as weight:
        optimizer, seen = torch.optim.Adam([weight], lr=rate), {}
        for step in range(1, max(stops) + 1):
            optimizer.zero_grad()
            for form in edit_forms:
                ids, _ = about(form, [name])
                F.cross_entropy(next_logits(ids, last_positions(ids)), target[None]).backward()
            optimizer.step()
            seen[step] = weight.detach().clone()
        return [seen[stop] for stop in stops]


def keys_of(layer: int) -> Tensor:
    """Each name's key: what enters the matrix at its last token, averaged over the phrasings (names, inner)."""
    asked_about = [about(form, names) for form in edit_forms]
    matrix = layers[layer].mlp.down_proj
    return torch.stack([inputs_of([matrix], ids)[0][:, span.stop - 1] for ids, span in asked_about]).mean(0).float()


# %%
texts = list(islice(world.documents(6000 + seed), 200))
rows = torch.tensor(list(pack(tokenizer(texts, add_special_tokens=False)["input_ids"], 128))[:16])


def second_moment(layer: int) -> Tensor:
    """C = E[k k^T] over ordinary text, with a little on the diagonal so that it can be inverted (inner, inner)."""
    matrix = layers[layer].mlp.down_proj
    keys = torch.cat([inputs_of([matrix], part.to(machine.device))[0].flatten(0, 1) for part in rows.split(8)]).float()
    moment = keys.T @ keys / len(keys)
    return moment + 1e-3 * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)


first_layer, late_layer = 0, num_layers - 2
changes = {layer: wanted_changes(layer, names, targets, lesson.scaled(30)) for layer in (first_layer, late_layer)}
weights, excess, misses = {}, [], []  # weights: way -> (matrix, one new weight a person)
for layer in (first_layer, late_layer):
    matrix, keys, moment = layers[layer].mlp.down_proj, keys_of(layer), second_moment(layer)
    old, plain = matrix.weight.data.float(), torch.eye(len(moment), device=moment.device)
    rome, simple = [], []
    for key, change in zip(keys, changes[layer], strict=True):
        rome.append(rank_one(old, key, change, moment))
        simple.append(rank_one(old, key, change, plain))
        misses.append(((rome[-1] - old) @ key - change).abs().max())
        size = [((way[-1] - old) @ moment @ (way[-1] - old).T).trace().item() for way in (rome, simple)]
        excess.append(size[0] - size[1])
    weights |= {f"ROME, layer {layer}": (matrix, rome), f"C = I, layer {layer}": (matrix, simple)}
lesson.equal("the edited matrix gives the wanted value for the key", max(misses).item(), within=1e-3)
print(f"ROME's change is no larger than that with C = I in {np.mean(np.array(excess) <= 1e-9):.0%} of the edits")

# %%
matrix = layers[late_layer].mlp.down_proj
stops = lesson.scaled(4), lesson.scaled(10)  # so few that about as many people move as with ROME, and more
tuned_weights = [fine_tuned(matrix, *pair, stops) for pair in zip(names, targets, strict=True)]
for stop, column in zip(stops, zip(*tuned_weights, strict=True), strict=True):
    weights[f"fine-tuning, {stop} steps, layer {late_layer}"] = matrix, column
results = {"no edit": np.mean([consequences(*pair) for pair in zip(moving, targets, strict=True)], 0).tolist()}
for layer, change in changes.items():
    added = [consequences(*pair, (layer, delta)) for *pair, delta in zip(moving, targets, change, strict=True)]
    results[f"delta added, layer {layer}"] = np.mean(added, 0).tolist()
for way, (matrix, new_weights) in weights.items():
    rows_of_way = []
    for person, target, weight in zip(moving, targets, new_weights, strict=True):
        with edited(matrix, weight):
            rows_of_way.append(consequences(person, target))
    results[way] = np.mean(rows_of_way, 0).tolist()
columns = ["new town", "in new phrasings", "others' towns kept", "own other facts kept"]
order = sorted(results, key=lambda way: way.rpartition(" ")[2])  # "no edit", then by layer
show_table({way: [f"{share:.0%}" for share in results[way]] for way in sorted(order, key=lambda w: w != "no edit")},
           columns)  # fmt: skip
half_of_them = score(len(names) // 2, len(names))
print(f"{len(names)} people are few: a share of one half would be {half_of_them}")
early_rome, late_rome = results[f"ROME, layer {first_layer}"], results[f"ROME, layer {late_layer}"]
gentle = results[f"fine-tuning, {stops[0]} steps, layer {late_layer}"]
lesson.report("own other facts kept by few steps of fine-tuning beyond ROME in that layer", gentle[3] - late_rome[3],
              form=".0%")  # fmt: skip
lesson.claim("an edit in the later layer moves people, in new phrasings", late_rome[1], at_least=0.5,
             control=results["no edit"][1], form=".0%")  # fmt: skip
lesson.claim("others stay where they live", late_rome[2], at_least=0.9, form=".0%")
kept = late_rome[3] - early_rome[3]
lesson.claim("an edit in the later layer keeps more of the person's other facts than one in the first", kept,
             at_least=0.2, form=".0%")  # fmt: skip

# %% [markdown]
# And the *last* layer? After it no attention follows, so nothing that its MLP writes at the name can reach the last position. The gradient of the answer with respect to $\delta$ must then be exactly 0.

# %%
probe_change = torch.zeros(len(names), hidden, device=machine.device, requires_grad=True)
ids, span = about(edit_forms[0], names)
mask = torch.arange(ids.shape[1], device=ids.device)[:, None] == span.stop - 1
sizes = {}
for layer in (late_layer, num_layers - 1):
    with at_inputs({places[layer + 1]: lambda state: state + (mask * probe_change[:, None]).to(state.dtype)}):
        loss = F.cross_entropy(next_logits(ids, last_positions(ids)), targets)
    sizes[layer] = torch.autograd.grad(loss, probe_change)[0].abs().max().item()
    print(f"layer {layer}: largest gradient {sizes[layer]:.1e}")
lesson.equal("no change at the name after the last layer moves the answer", sizes[num_layers - 1])

# %% [markdown]
# **What you see.** The edit does what it promises: most people move, in phrasings that it never saw, and nearly nobody else does. Adding $\delta$ itself moves about as many. So the rank-one edit loses next to nothing: mostly it is $\delta$ itself that does not suffice. A likely reason, not tested here: it got few steps, and a penalty on its length.
#
# What the edit does not promise is what happens to the person's *other* facts. In the first layer many of them break; in the later layer fewer do. With $\delta$ alone it is the same, so the matrix is not to blame. A likely reason, not tested here: in the first layer the key knows the name and hardly the question, so that all questions about the person meet the same change.
#
# And the simple ways hold their own. Without $C$ the table hardly changes. A few steps of fine-tuning on the same matrix move about as many people as ROME, and lose fewer of their other facts; more steps move more people and lose more facts. So compare ways of editing at equal success, and in all four columns: judged by the first one alone, ten steps of fine-tuning look perfect, and in their layer they keep the fewest other facts. (With so few people, do not read differences of ten points in the first two.)
#
# Section 4 would have advised against this place: the name's last token alone mostly did not move the answer. An edit there works all the same. Where a patch finds a fact does not tell you where to change it (Hase et al. 2023).

# %% [markdown] tags=["further"]
# ## 8 · Push in a direction
#
# *Further: no core section needs this one.*
#
# **Question.** Can you change what the model writes without changing a weight?
#
# Take the mean residual stream over good reviews and over bad ones. The difference is a direction $v$. While the model writes, add $\alpha v$ to the stream before a middle layer, at all positions (Rimsky et al. 2023; Turner et al. 2023 took the difference of a single pair of prompts). The prompt says nothing about the mood: `Review: The soup in Guze was`. Measure the share of good words among the good and bad ones that may follow. Two controls have the same length: eight random directions, and eight differences of means of the same reviews with *shuffled* labels.

# %%
generator = random.Random(f"reviews/{seed}")
reviews = [world.review(generator) for _ in range(lesson.scaled(96, 16))]
good = torch.tensor([mood == "good" for _, mood in reviews], device=machine.device)
middle = num_layers // 2
ids, ends = read([f"Review: {text}" for text, _ in reviews])
inside = (torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]).unsqueeze(-1)  # (texts, seq, 1)
(states,) = inputs_of([places[middle]], ids)
means = (states.float() * inside).sum(1) / inside.sum(1)  # (texts, hidden): of each review's own tokens
direction = means[good].mean(0) - means[~good].mean(0)
good_words, bad_words = (set(first_tokens(MOODS[mood][0]).tolist()) for mood in ("good", "bad"))
good_words, bad_words = good_words - bad_words, bad_words - good_words  # tokens that begin words of both are left out
openings = [f"Review: The {generator.choice(('soup', 'room', 'tea', 'boat'))} in {generator.choice(world.towns)} was"
            for _ in range(32)]  # fmt: skip
opening_ids, opening_ends = read(openings)
length = states.float()[inside.squeeze(-1)].norm(dim=-1).mean().item()
print(f"length of the direction {direction.norm():.1f}, of a residual stream {length:.1f}; e.g. {openings[0]!r}")

# %%
STRENGTHS = [-4, -2, -1, 0, 1, 2, 4]


def steered(vector: Tensor, strength: float) -> tuple[float, float]:
    """Share of good words among good and bad ones, and the probability of both together, as the next token."""
    with at_inputs({places[middle]: lambda state: state + (strength * vector).to(state.dtype)}):
        probabilities = next_logits(opening_ids, opening_ends).softmax(-1)
    up, down = (probabilities[:, sorted(words)].sum(1) for words in (good_words, bad_words))
    return (up / (up + down)).mean().item(), (up + down).mean().item()


noise = torch.randn(8, hidden, generator=torch.Generator().manual_seed(seed)).to(machine.device)
noise = noise / noise.norm(dim=1, keepdim=True) * direction.norm()
orders = [torch.randperm(len(good), generator=torch.Generator().manual_seed(8 * seed + i)) for i in range(8)]
by_lot = [good[order.to(machine.device)] for order in orders]
lots = torch.stack([means[marked].mean(0) - means[~marked].mean(0) for marked in by_lot])
lots = lots / lots.norm(dim=1, keepdim=True) * direction.norm()
along = [steered(direction, strength) for strength in STRENGTHS]
random_lines, lot_lines = (
    np.array([[steered(vector, strength)[0] for strength in STRENGTHS] for vector in vectors])
    for vectors in (noise, lots)
)

# %%
rows = {"good among good and bad": [f"{share:.0%}" for share, _ in along]}
rows["both together"] = [f"{both:.0%}" for _, both in along]
show_table(rows, [f"{strength:+d}" for strength in STRENGTHS])
figure = plots.curve(
    {"mood direction": (STRENGTHS, [share for share, _ in along]),
     "8 random directions": (STRENGTHS, *(f(random_lines, 0) for f in (np.mean, np.min, np.max))),
     "8 with shuffled labels": (STRENGTHS, *(f(lot_lines, 0) for f in (np.mean, np.min, np.max)))},
    title="One added vector turns the mood of a review", xlabel="strength (multiples of the difference of the means)",
    ylabel="good words among good and bad", percent=True,
)  # fmt: skip
plots.show(figure, alt="The share of good words rises with the strength along the mood direction; for random "
                       "directions and for shuffled labels the mean stays flat, within bands.")  # fmt: skip
swing = along[-1][0] - along[0][0]
print(f"from -4 to +4: mood direction {swing:+.0%}; controls, mean and most of eight, either sign:")
largest = 0.0
for name, lines in {"random directions": random_lines, "shuffled labels": lot_lines}.items():
    swings = np.abs(lines[:, -1] - lines[:, 0])
    print(f"  {name}: {swings.mean():.0%} and {swings.max():.0%}")
    largest = max(largest, swings.max())
lesson.claim("the mood direction turns the share of good words", swing, at_least=0.5, control=largest, form=".0%")


# %%
def written(strength: float, tokens: int = 24) -> str:
    """The first opening and what the model writes after it, the likeliest token each time."""
    ids = opening_ids[:1, : opening_ends[0] + 1]
    with at_inputs({places[middle]: lambda state: state + (strength * direction).to(state.dtype)}):
        for _ in range(tokens):
            following = next_logits(ids, last_positions(ids)).argmax(-1)
            ids = torch.cat([ids, following[:, None]], 1)
    return tokenizer.decode(ids[0])


for strength in (-4, 0, 4):
    print(f"{strength:+d}: {written(strength)!r}")

# %% [markdown]
# **What you see.** The share of good words rises with the strength, on both sides of zero, and the three texts are reviews at each strength. Random directions of the same length do much less. They do not do nothing, and not all the same, so one of them is not enough as a control. Shuffled labels do more than random directions, though less than the true ones. A likely reason: reviews differ in their mood above all, so labels by lot hold a little of it by chance, and stretched to the same length this little counts. Such a control is the harder one to beat, and it tells you what the *labels* add. Steering is cheap, and it is a push, not an understanding: it shows that the direction is *enough* to change the mood, not that the model uses it by itself.

# %% [markdown] tags=["core"]
# ## 9 · A phase change: the induction head is born
#
# **Question.** Why do induction heads need two layers, and how do they come about?
#
# The task is a mapping that stands nowhere but in the prompt. A row has sixteen pairs, a *key* and its *label*: `k3 l7 k1 l2 k3 l7 ...`. Each row draws four keys, gives each a label of its own, and then draws the sixteen pairs from these four at random. Where a key returns, its label can be known. Where it is new, it can't.
#
# What can **one layer** of attention do? The query at a key token sees the embeddings of the earlier tokens. It can find the earlier places of the same key, but the *key* stands there, not the label. It can collect the labels of the row, but an embedded label does not know which key stood before it. So it can guess among the labels seen so far, and no better.
#
# **Two layers** can compose. Layer 1 looks at the previous token and writes the key into the residual stream *at the label*. Layer 2 searches for positions where the written key is its own, and copies their label. That is an induction head.
#
# To be fair, the one-layer model has eight heads and the two-layer model two times four: the same number of heads and of attention weights. All that is small here is trained three times from three seeds, side by side: each weight has a leading dimension of models.

# %%
SEEDS = [3 * seed, 3 * seed + 1, 3 * seed + 2]  # of the small models of this lesson


def side_by_side(new_weights: Callable[[torch.Generator], dict], seeds: list[int]) -> dict[str, Tensor]:
    """Weights of several small models, name -> (models, ...), each drawn from its own seed."""
    drawn = [new_weights(torch.Generator().manual_seed(number)) for number in seeds]
    return {name: torch.stack([one[name] for one in drawn]).requires_grad_() for name in drawn[0]}


def normed(hidden: Tensor) -> Tensor:
    """RMSNorm without a scale."""
    return hidden * (hidden.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()


def fit(weights: dict, losses: Callable[[int], Tensor], steps: int, rate: float, fall=True, decay=0.0) -> None:
    """AdamW on losses(step), one loss a model (models,): a short warm-up, then constant, or a linear fall."""
    optimizer = torch.optim.AdamW(list(weights.values()), lr=rate, betas=(0.9, 0.98), weight_decay=decay)
    for step in range(steps):
        factor = max(0.03, 1 - step / steps) if fall else 1.0
        optimizer.param_groups[0]["lr"] = rate * factor * min(1.0, (step + 1) / 20)
        losses(step).sum().backward()  # no model's loss touches another model's weights
        optimizer.step()
        optimizer.zero_grad()


# %%
KEYS, PAIRS, ROW_KEYS = 16, 16, 4  # keys in the vocabulary, as many labels; pairs of a row; keys of a row


def mapping_rows(generator: torch.Generator, models: int, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens (models, rows, 2 * PAIRS), a key and its label in turn, and which of the row's keys (.., PAIRS) it is."""
    keys = torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]
    labels = KEYS + torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]
    which = torch.randint(ROW_KEYS, (models, rows, PAIRS), generator=generator)
    return torch.stack([keys.gather(-1, which), labels.gather(-1, which)], -1).flatten(2), which


def told_before(which: Tensor) -> Tensor:
    """For each pair (.., PAIRS, PAIRS): which earlier pairs of the row have the same key."""
    return (which[..., :, None] == which[..., None, :]).tril(-1)


example, which = mapping_rows(torch.Generator().manual_seed(seed), 1, 1)
names = [f"k{t}" if t < KEYS else f"l{t - KEYS}" for t in example.flatten().tolist()]
print(" ".join(names[:20]), "...")
print(f"{told_before(which).any(-1).sum()} of {PAIRS} labels of this row can be known")

# %% [markdown]
# **The model** has nothing but embeddings, attention and an unembedding. Positions enter as a learned number for each head and distance, which is added to the attention scores (a relative bias, as in T5). With heads $h$ and distance $i - j$:
#
# $$a_{ij} = \operatorname{softmax}_j\big(q_i \cdot k_j / \sqrt{d_h} + b_{h,\, i - j}\big), \qquad x_i \leftarrow x_i + \sum_h W^O_h \sum_{j \le i} a_{ij} v_j$$
#
# Here $x_i$ is the residual stream of token $i$ (in section 10 it will be an input), $q_i$, $k_j$ and $v_j$ are the head's query, key and value, and $d_h = 16$ is their size.

# %%
WIDTH, HEAD, SEQ = 48, 16, 2 * PAIRS
DISTANCE = (torch.arange(SEQ)[:, None] - torch.arange(SEQ)).clamp(min=0)  # (seq, seq)
FUTURE = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)


def attention_only(layers: int, heads: int) -> Callable[[torch.Generator], dict]:
    """Draws the weights of one model."""

    def new_weights(generator: torch.Generator) -> dict[str, Tensor]:
        drawn = partial(torch.randn, generator=generator)
        return {
            "embed": drawn(2 * KEYS, WIDTH),
            "bias": torch.zeros(layers, heads, SEQ),  # by distance
            "qkv": drawn(3, layers, heads, HEAD, WIDTH) / WIDTH**0.5,
            "out": drawn(layers, heads, WIDTH, HEAD) / (2 * heads * HEAD) ** 0.5,
            "unembed": drawn(2 * KEYS, WIDTH) / WIDTH**0.5,
        }

    return new_weights


# %%
def read_rows(weights: dict, ids: Tensor, without: tuple = ()) -> tuple[Tensor, list[Tensor]]:
    """Logits (models, rows, seq, vocab) and each layer's attention (models, rows, heads, seq, seq).

    `without` names a head (layer, head) whose output is left out.
    """
    hidden = torch.stack([table[row] for table, row in zip(weights["embed"], ids, strict=True)])
    patterns = []
    for layer in range(weights["bias"].shape[1]):
        q, k, v = (
            torch.einsum("mbsd,mhkd->mbhsk", normed(hidden), matrix[:, layer])  # (models, rows, heads, seq, head_dim)
            for matrix in weights["qkv"].unbind(1)
        )
        bias = weights["bias"][:, layer][..., DISTANCE][:, None]  # (models, 1, heads, seq, seq)
        scores = q @ k.transpose(-1, -2) / HEAD**0.5 + bias
        patterns.append(scores.masked_fill(FUTURE, -math.inf).softmax(-1))
        mixed = patterns[-1] @ v
        if without and without[0] == layer:
            mixed = mixed.index_fill(2, torch.tensor([without[1]]), 0.0)
        hidden = hidden + torch.einsum("mbhsk,mhdk->mbsd", mixed, weights["out"][:, layer])
    return torch.einsum("mbsd,mvd->mbsv", normed(hidden), weights["unembed"]), patterns


# %%
one_model = side_by_side(attention_only(1, 4), [seed])
with torch.no_grad():
    one_model["bias"].normal_(generator=torch.Generator().manual_seed(seed))
    _, (pattern,) = read_rows(one_model, example)
    embedded = normed(one_model["embed"][0][example[0]])  # (rows, seq, width)
    q, k, v = (torch.einsum("bsd,hkd->bhsk", embedded, m[0, 0]) for m in one_model["qkv"].unbind(1))
    mask = one_model["bias"][0, 0][:, DISTANCE].masked_fill(FUTURE, -math.inf)  # (heads, seq, seq)
    library = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    difference = (pattern[0] @ v - library).abs().max().item()
lesson.equal("the small model's attention is PyTorch's", difference, within=1e-5)


# %%
def label_accuracy(logits: Tensor, ids: Tensor, which: Tensor) -> Tensor:
    """Share (models,) of right labels among those that the row has told before."""
    told = told_before(which).any(-1)  # (models, rows, PAIRS)
    right = logits[:, :, ::2].argmax(-1) == ids[:, :, 1::2]
    return (right & told).sum((1, 2)) / told.sum((1, 2))


def train_on_mappings(layers: int, heads: int, steps: int, draw: Callable = mapping_rows) -> tuple[dict, Tensor]:
    """Weights of three models, and their accuracy at each step (steps, models) on rows that are always new."""
    weights, curve = side_by_side(attention_only(layers, heads), SEEDS), []
    generator = torch.Generator().manual_seed(1000 + seed)

    def losses(step: int) -> Tensor:
        ids, which = draw(generator, len(SEEDS), 16)
        logits, _ = read_rows(weights, ids)
        curve.append(label_accuracy(logits.detach(), ids, which))
        of_labels = logits[:, :, ::2].log_softmax(-1).gather(-1, ids[:, :, 1::2, None])
        return -of_labels.mean((1, 2, 3))

    fit(weights, losses, steps, rate=5e-3, fall=False)
    return weights, torch.stack(curve)


# %%
STEPS = lesson.scaled(500, 20)
two_layers, two_curve = train_on_mappings(2, 4, STEPS)
one_layer, one_curve = train_on_mappings(1, 8, STEPS)
test_ids, test_which = mapping_rows(torch.Generator().manual_seed(77 + seed), 3, 128)
with torch.no_grad():
    (two_logits, two_patterns), (one_logits, one_patterns) = (
        read_rows(weights, test_ids) for weights in (two_layers, one_layer)
    )
two_right = label_accuracy(two_logits, test_ids, test_which)
one_right = label_accuracy(one_logits, test_ids, test_which)
told = told_before(test_which).any(-1)  # (models, rows, PAIRS)
labels_seen = (~told).cumsum(-1)  # each pair that is new brings a label
chance = (1 / labels_seen[told]).mean().item()  # of a uniform guess among the labels seen so far
for name, right in {"two layers": two_right, "one layer": one_right}.items():
    print(f"{name}: " + ", ".join(f"{share:.0%}" for share in right) + f" right; guessing gives {chance:.0%}")

# %%
WINDOW = max(2, STEPS // 50)  # steps that are averaged: a step has 48 rows
series, steps_shown = {}, range(WINDOW, STEPS + 1)
for name, curve in {"two layers": two_curve, "one layer": one_curve}.items():
    smooth = curve.unfold(0, WINDOW, 1).mean(-1)  # (steps, models)
    series[name] = (steps_shown, smooth.mean(1).tolist(), smooth.amin(1).tolist(), smooth.amax(1).tolist())
figure = plots.curve(
    series, title="Two layers find the labels, suddenly; one layer goes on guessing",
    xlabel="training step", ylabel="labels that were told before, right", percent=True,
    references={"guessing": chance},
)  # fmt: skip
plots.show(figure, alt="Accuracy over training steps, bands over three seeds: one layer stays near the dashed line of "
           "guessing; two layers stay there too at first and then climb steeply to nearly all.")  # fmt: skip
least = two_right.min()
lesson.report("labels that two layers give right, the worst of three seeds", least.item(), form=".0%")
ahead = (two_right - one_right).min()
lesson.claim("in each seed two layers are ahead of one layer by 40 points", ahead, at_least=0.4, form=".0%")

# %% [markdown]
# Up to a point both models do the same: they learn which labels are in the row, and guess. Then the two-layer models leave, and the one-layer models stay. How sudden is it, and is the circuit what the derivation says? Measure which share of the training the climb from 40 % to 80 % takes. Then measure how much attention labels pay in layer 1 to the token before them, and how much returning keys pay in the last layer to the labels of the same key. At last take out the best head of each kind.


# %%
def attention_scores(pattern: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Attention (models, heads): of labels to the token before, and of told keys to all labels of the same key."""
    place, same = torch.arange(0, SEQ, 2), told_before(which)
    previous = pattern[..., place + 1, place].mean((1, 3))
    to_labels = (pattern[..., ::2, 1::2] * same[:, :, None]).sum(-1)  # (models, rows, heads, PAIRS)
    return previous, to_labels.sum((1, 3)) / same.any(-1).sum((1, 2))[:, None]  # a new key has no such labels


smooth = two_curve.unfold(0, WINDOW, 1).mean(-1)  # (steps, models)
climb = ((smooth > 0.4) & (smooth < 0.8)).float().mean(0) / (smooth.amax(0) > 0.8)  # no number without a climb
lesson.claim("the climb takes at most a quarter of the steps, mean of seeds", climb.mean(), at_most=0.25, form=".0%")
previous, induction = (attention_scores(two_patterns[layer], test_which)[layer] for layer in (0, 1))
single = attention_scores(one_patterns[0], test_which)[1]
gaze = {"layer 1 of 2, to the token before": previous, "layer 2 of 2, to the labels": induction, "one layer": single}
table = {name: [f"{best:.2f}" for best in scores.amax(1)] for name, scores in gaze.items()}
show_table(table, [f"best head, seed {number}" for number in SEEDS])
of_key = told_before(test_which).sum(-1) / torch.arange(PAIRS).clamp(min=1)  # an even gaze over all earlier labels
print(f"an even gaze over all labels before would pay {of_key[told].mean():.2f} to those of the key")
lesson.claim("in each seed a head of layer 2 pays half of its attention to the key's labels",
             induction.amax(1).min(), at_least=0.5, control=single.amax(1).max(), form=".2f")  # fmt: skip
for layer, scores in enumerate((previous, induction)):
    lost = []
    for number, best in enumerate(scores.argmax(1).tolist()):
        logits, _ = read_rows(two_layers, test_ids, without=(layer, best))
        lost.append((two_right - label_accuracy(logits, test_ids, test_which))[number].item())
    print(f"without the best head of layer {layer + 1}: accuracy falls by", ", ".join(f"{loss:.0%}" for loss in lost))

# %% [markdown]
# **What you see.** The circuit of the derivation is there, in each seed, and nothing like it in one layer. It comes late and fast. A likely reason: each half is of no use without the other, so little pulls towards either of them at first. The single layer's best head pays the labels of the key no more than an even gaze over all labels would, or hardly. The last cell shows how much hangs on one head of each kind. Where it is little, other heads of the layer probably do the same work. That one layer cannot do this task, unless it is very large, is a theorem (Sanford, Hsu and Telgarsky 2024).

# %% [markdown] tags=["core"]
# ## 10 · A prompt as a training set: linear regression in a forward pass
#
# **Question.** What does a transformer compute when it learns from the examples of a prompt?
#
# Take the smallest learning problem: $y_i = w \cdot x_i$ plus noise, a new $w$ for each prompt, and examples $(x_1, y_1), \dots, (x_N, y_N), x_q$ as tokens. One step of gradient descent from $w = 0$ on $\frac{1}{2N} \sum_i (w \cdot x_i - y_i)^2$ gives $w = \frac{\eta}{N} \sum_i y_i x_i$, and predicts $\frac{\eta}{N} \sum_i y_i\, (x_i \cdot x_q)$.
#
# Read this as attention **without softmax**: the query is $x_q$, the keys are the $x_i$, the values are the $y_i$. So a layer with $W_Q = W_K$ reading $x$ out of the token $(x, y)$, and $W_V$ reading $y$, does the step (von Oswald et al. 2023). With output $-\frac{\eta}{N}$ it also subtracts from each example's $y_i$ what the step predicts there, and leaves the residual. The gradient at the new $w$ is made of just these residuals, so the same layer applied again does the next step. The query's token begins with $y = 0$ and ends at *minus* the prediction.


# %%
def linear_attention(tokens: Tensor, w_query: Tensor, w_key: Tensor, w_value: Tensor, w_out: Tensor) -> Tensor:
    """One layer without softmax; tokens (seq, size), the last one is the query and is attended to by none."""
    context = tokens[:-1]
    scores = (tokens @ w_query.T) @ (context @ w_key.T).T  # (seq, seq - 1)
    return tokens + scores @ (context @ w_value.T) @ w_out.T


generator = torch.Generator().manual_seed(seed)
size, examples, rate, gd_steps = 5, 12, 0.4, 6
x, true_w = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(examples + 1, size), (size,)])
y = x[:-1] @ true_w
reads_x = torch.diag(torch.tensor([1.0] * size + [0.0], dtype=torch.float64))  # (x, y) -> (x, 0)
reads_y = torch.eye(size + 1, dtype=torch.float64) - reads_x
tokens = torch.cat([x, F.pad(y, (0, 1))[:, None]], -1)  # (examples + 1, size + 1)
w, by_layers, by_descent = torch.zeros_like(true_w), [], []
for _ in range(gd_steps):
    tokens = linear_attention(tokens, reads_x, reads_x, reads_y, -rate / examples * reads_y)
    by_layers.append(-tokens[-1, -1].item())
    variable = w.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((x[:-1] @ variable - y).pow(2).mean() / 2, variable)
    w = w - rate * gradient
    by_descent.append((w @ x[-1]).item())
print("layers: ", [round(value, 6) for value in by_layers], f"the truth: {x[-1] @ true_w:.6f}")
gap = max(abs(one - other) for one, other in zip(by_layers, by_descent, strict=True))
lesson.equal("linear attention layers are steps of gradient descent", gap, within=1e-10)

# %% [markdown]
# This was written by hand. Does *training* find something like it? And which estimator should it find? That depends on the tasks of pretraining:
#
# - **A new task each time**, $w \sim \mathcal{N}(0, I)$. Then no predictor is better on average than the mean of the posterior, which for a normal prior and noise of variance $\sigma^2$ is **ridge regression** with penalty $\sigma^2$: $\hat w = (X^\top X + \sigma^2 I)^{-1} X^\top y$.
# - **A few fixed tasks** $w_1, \dots, w_M$, equally often. Picture two of them, $w$ and $-w$, for inputs of one number: two lines through the origin, one up and one down. A few examples tell you which of the two it is, and from then on you know the task exactly. In general the best predictor weighs the *known* tasks by how well they explain the prompt: $\hat w = \sum_k p_k w_k$ with $p_k \propto \exp\big(-\sum_i (y_i - w_k \cdot x_i)^2 / 2 \sigma^2\big)$. Raventós et al. (2023) call it **dMMSE**. On a task that is none of the $M$, such as a line in another direction, it is still sure that it is one of them.
#
# Both can be written for all prefixes of a prompt at once, with sums over the examples before each query.

# %%
SIZE, EXAMPLES, NOISE, FEW = 2, 8, 0.5, 2  # of x; pairs of a prompt; standard deviation; tasks of a poor pretraining


def before(sums: Tensor, dim: int) -> Tensor:
    """Running sums along `dim` over the items before each one, 0 for the first."""
    return sums.cumsum(dim) - sums


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """Prediction (.., EXAMPLES) at each x (.., EXAMPLES, SIZE) from the pairs before it."""
    gram = before(x[..., :, None] * x[..., None, :], -3)  # X^T X, (.., EXAMPLES, SIZE, SIZE)
    moment = before(x * y[..., None], -2)  # X^T y, (.., EXAMPLES, SIZE)
    weights = torch.linalg.solve(gram + NOISE**2 * torch.eye(SIZE), moment)
    return (weights * x).sum(-1)


def dmmse(x: Tensor, y: Tensor, tasks: Tensor) -> Tensor:
    """The same for a prior over few tasks (models, FEW, SIZE)."""
    each = torch.einsum("mbnd,mtd->mbnt", x, tasks)  # what each task predicts
    log_likelihood = before(-(y[..., None] - each).pow(2) / (2 * NOISE**2), 2)
    return (log_likelihood.softmax(-1) * each).sum(-1)


# %% [markdown]
# **The model** is a small transformer: two layers of the linear attention above, with learned matrices, two heads and a causal mask, each followed by a feed-forward layer. A pair stands twice in the prompt, first as $(x_i, ?)$, where the prediction is read, then as $(x_i, y_i)$. Six models are trained side by side on equally many prompts: three on two opposite tasks, $w$ and $-w$ (each model has its own pair), three on a new task in each prompt. Tasks of both kinds have the same mean square. The target of the loss is $w \cdot x$ without its noise, which has the same best predictor.

# %%
LAYERS, UNITS, NUM_HEADS = 2, 32, 2
TOKENS = 2 * EXAMPLES
SEEN = torch.ones(TOKENS, TOKENS).tril() / torch.arange(1, TOKENS + 1)[:, None]  # causal, and a mean


def matrix_of(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers that keep the size of what is multiplied with them: (.., from, to)."""
    return torch.randn(*shape, generator=generator) / shape[-2] ** 0.5


def new_regressor(generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of a model; what writes into the residual stream begins smaller."""
    drawn = partial(matrix_of, generator=generator)
    small = (2 * LAYERS) ** -0.5
    return {
        "embed": drawn(SIZE + 2, UNITS),
        "qkv": drawn(LAYERS, UNITS, 3 * UNITS),
        "out": drawn(LAYERS, UNITS, UNITS) * small,
        "up": drawn(LAYERS, UNITS, 2 * UNITS),
        "down": drawn(LAYERS, 2 * UNITS, UNITS) * small,
        "read": drawn(UNITS, 1) / 10,
    }


# %%
def regress(weights: dict, x: Tensor, y: Tensor) -> Tensor:
    """Prediction (models, prompts, EXAMPLES) at each x from the pairs before it."""
    models, prompts = y.shape[:2]
    asked, given = (torch.cat([x, v[..., None], f[..., None]], -1) for v, f in ((0 * y, 0 * y), (y, 0 * y + 1)))
    tokens = torch.stack([asked, given], 3).view(models, -1, SIZE + 2)  # (models, prompts * TOKENS, SIZE + 2)
    hidden = tokens @ weights["embed"]
    for layer in range(LAYERS):
        qkv = (normed(hidden) @ weights["qkv"][:, layer]).view(models, prompts, TOKENS, 3, NUM_HEADS, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (models, prompts, heads, TOKENS, head_dim)
        mixed = (q @ k.transpose(-1, -2) * SEEN / q.shape[-1] ** 0.5) @ v
        hidden = hidden + mixed.transpose(2, 3).reshape(hidden.shape) @ weights["out"][:, layer]
        hidden = hidden + (normed(hidden) @ weights["up"][:, layer]).relu() @ weights["down"][:, layer]
    return (normed(hidden) @ weights["read"]).view(models, prompts, TOKENS)[..., ::2]


# %%
turns = torch.stack([torch.rand(1, generator=torch.Generator().manual_seed(500 + number)) for number in SEEDS])
angles = 2 * math.pi * (turns + torch.arange(FEW) / FEW)  # (models, FEW): evenly spaced, the first at random
few_tasks = 2**0.5 * torch.stack([angles.cos(), angles.sin()], -1)  # (models, FEW, SIZE)


def prompts(generator: torch.Generator, number: int, few: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x (3, number, EXAMPLES, SIZE), y and the noise-free target (3, number, EXAMPLES), a prompt for each model."""
    x = torch.randn(3, number, EXAMPLES, SIZE, generator=generator)
    w = torch.randn(3, number, SIZE, generator=generator)
    if few:
        chosen = torch.randint(FEW, (3, number, 1), generator=generator).expand(-1, -1, SIZE)
        w = few_tasks.gather(1, chosen)
    target = torch.einsum("mbnd,mbd->mbn", x, w)
    return x, target + NOISE * torch.randn(target.shape, generator=generator), target


# %%
x, y, _ = (part[0, 0] for part in prompts(torch.Generator().manual_seed(seed), 1, few=False))
library = [
    Ridge(alpha=NOISE**2, fit_intercept=False).fit(x[:i].numpy(), y[:i].numpy()).predict(x[i : i + 1].numpy())[0]
    for i in range(1, EXAMPLES)
]
difference = (ridge(x, y)[1:] - torch.tensor(library)).abs().max().item()
lesson.equal("ridge over all prefixes is sklearn's Ridge", difference, within=1e-4)

regressors = side_by_side(new_regressor, SEEDS * 2)  # first three: few tasks; last three: a new task each time
training = torch.Generator().manual_seed(2000 + seed)


def regression_losses(step: int) -> Tensor:
    parts = [prompts(training, 32, few) for few in (True, False)]
    x, y, target = (torch.cat(both) for both in zip(*parts, strict=True))  # (6, 32, ..)
    return (regress(regressors, x, y) - target).pow(2).mean((1, 2))


fit(regressors, regression_losses, lesson.scaled(1000, 20), rate=1e-2)

# %% [markdown]
# Ask all of them about **new tasks**, that none has seen. Compare the errors, and then the predictions themselves: are they nearer to ridge or to dMMSE over the few tasks? The mean squared distance to each tells.

# %%
with torch.no_grad():
    x, y, target = prompts(torch.Generator().manual_seed(3000 + seed), 512, few=False)
    few_guess, many_guess = regress(regressors, *(torch.cat([part, part]) for part in (x, y))).chunk(2)
guesses = {"few tasks": few_guess, "a new task each time": many_guess, "ridge": ridge(x, y),
           "dMMSE over the few": dmmse(x, y, few_tasks), "always 0": 0 * target}  # fmt: skip


def apart(one: Tensor, other: Tensor) -> float:
    """Mean squared difference in the second half of the prompts, where there is evidence."""
    return (one - other)[..., EXAMPLES // 2 :].pow(2).mean().item()


references = {"error": target, "from ridge": guesses["ridge"], "from dMMSE": guesses["dMMSE over the few"]}
gaps = {name: {of: apart(guess, reference) for of, reference in references.items()} for name, guess in guesses.items()}
show_table({name: [f"{gap:.2f}" for gap in row.values()] for name, row in gaps.items()}, list(references))
few_gap, many_gap = gaps["few tasks"], gaps["a new task each time"]
times = few_gap["error"] / many_gap["error"]
lesson.report("on new tasks, error after few tasks of pretraining over that after many", times, form=".1f")
few_ratio, many_ratio = (gap["from dMMSE"] / gap["from ridge"] for gap in (few_gap, many_gap))
lesson.claim("after many tasks, predictions are four times as far from dMMSE as from ridge",
             many_ratio, at_least=4, control=few_ratio, form=".1f")  # fmt: skip
lesson.claim("after few tasks, predictions are at most half as far from dMMSE as from ridge",
             few_ratio, at_most=0.5, control=many_ratio, form=".2f")  # fmt: skip

# %%
bands = {}
for name in ("few tasks", "a new task each time", "ridge", "dMMSE over the few"):
    by_place = (guesses[name] - target).pow(2).mean(1)  # (models, EXAMPLES)
    bands[name] = (range(EXAMPLES), by_place.mean(0).tolist(), by_place.amin(0).tolist(), by_place.amax(0).tolist())
figure = plots.curve(
    bands, title="New tasks: rich pretraining near ridge, poor nearer to dMMSE",
    xlabel="examples in the prompt", ylabel="mean squared error",
)  # fmt: skip
plots.show(figure, alt="Error against the number of examples, bands over three seeds. Ridge falls steadily, and the "
           "models trained on many tasks above it. dMMSE and the models trained on few tasks stay high.")  # fmt: skip

# %% [markdown]
# **What you see.** The same architecture, trained equally long, becomes two different learners. After poor pretraining it mostly *recognises*: its predictions are nearer to those of the known tasks, and on all others it stays wrong, however many examples it sees. After rich pretraining it *learns*: on tasks it has never met its error falls as the examples come. The table also shows that neither reaches its estimator in this short training: the one is near ridge, the other nearer to dMMSE than to ridge. "In-context learning" can mean either, and only new tasks tell them apart. The poor pretraining here is very poor: with one task less there would be nothing to recognise. Four tasks were tried first, and then the claim did not hold: with `FEW = 4` the models lie between the two estimators. Try it (set `budget = 0.999` first, since at 1 the lesson insists on its claims), and read the claim as one about two opposite tasks.

# %% [markdown] tags=["further"]
# ## 11 · Bayes with ambiguous examples, and where a task vector lives
#
# *Further: no core section needs this one.*
#
# **Question.** Does a trained model weigh the evidence of its prompt as Bayes' rule says? And is there one place that holds the task?
#
# Large models seem to compress the examples of a prompt into a *task vector*: add it to the state of a prompt without examples, and the model does the task (Hendel et al. 2023, Todd et al. 2023). Shima is no place to look for it, since there the kind of a word already gives its function away. In this toy it does not: four functions map **the same** eight words to four values, and each is as frequent as the others. A prompt is `; w3 v1 ; w7 v0 ; w2`, and the model says the value of the last word.
#
# With uniform prior and examples without error, the posterior of a function is proportional to 1 if it agrees with all examples so far, and 0 else. The best prediction is the posterior's mean over the functions' values.

# %%
WORDS, VALUES, FUNCTIONS, SHOTS = 8, 4, 4, 4
tables = torch.stack(
    [torch.randint(VALUES, (FUNCTIONS, WORDS), generator=torch.Generator().manual_seed(900 + n)) for n in SEEDS]
)  # (3, FUNCTIONS, WORDS): other functions for each seed
tables = torch.cat([tables, tables])  # for six models


def function_rows(generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (6, rows, 3 * SHOTS + 2), and their words and right values, both (6, rows, SHOTS + 1)."""
    function = torch.randint(FUNCTIONS, (6, rows, 1), generator=generator).expand(-1, -1, WORDS)
    words = torch.rand(6, rows, WORDS, generator=generator).argsort(-1)[..., : SHOTS + 1]
    values = tables.gather(1, function).gather(-1, words)
    separator = torch.full_like(words, WORDS + VALUES)
    return torch.stack([separator, words, WORDS + values], -1).flatten(2)[..., :-1], words, values


def bayes(words: Tensor, values: Tensor) -> Tensor:
    """Best prediction (6, rows, SHOTS + 1, VALUES) for each word from the pairs before it."""
    of_words = torch.stack([table[:, word] for table, word in zip(tables, words, strict=True)])
    of_words = of_words.permute(0, 2, 3, 1)  # (6, rows, SHOTS + 1, FUNCTIONS): what each function says
    wrong = (of_words != values[..., None]).float()
    agrees = (wrong.cumsum(2) - wrong == 0).float()  # with all examples before this one
    posterior = agrees / agrees.sum(-1, keepdim=True)
    return (posterior[..., None] * F.one_hot(of_words, VALUES)).sum(-2)


# %% [markdown]
# **Two kinds of models**, three of each. In the *free* ones every token sees all tokens before it. In the *narrow* ones a word sees only itself and the separator just before it, so all that it knows of the examples went through that one token:
#
# ```
# prompt                 ;  w3  v1  ;  w7  v0  ;  w2
# w2 sees, free model    x  x   x   x  x   x   x  x
# w2 sees, narrow model                        x  x
# ```
#
# The separators and values see all before them in both. All else is equal: three layers with softmax attention, a relative bias and feed-forward layers.

# %%
DEPTH, STATE_SIZE, BRANCHES, LONGEST = 3, 48, 4, 3 * SHOTS + 2
place = torch.arange(LONGEST)
steps_back = (place[:, None] - place).clamp(min=0)
future = place[:, None] < place
hidden_from_words = (place[:, None] % 3 == 1) & ~((place == place[:, None]) | (place == place[:, None] - 1))
blocked = torch.stack([future] * 3 + [future | hidden_from_words] * 3)[:, None, None]  # (6, 1, 1, seq, seq)


def new_functioner(generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of one model."""
    drawn = partial(matrix_of, generator=generator)
    small = (2 * DEPTH) ** -0.5
    return {
        "embed": torch.randn(WORDS + VALUES + 1, STATE_SIZE, generator=generator),
        "bias": torch.zeros(DEPTH, BRANCHES, LONGEST),
        "qkv": drawn(DEPTH, STATE_SIZE, 3 * STATE_SIZE),
        "out": drawn(DEPTH, STATE_SIZE, STATE_SIZE) * small,
        "up": drawn(DEPTH, STATE_SIZE, 2 * STATE_SIZE),
        "down": drawn(DEPTH, 2 * STATE_SIZE, STATE_SIZE) * small,
        "unembed": drawn(STATE_SIZE, VALUES),
    }


# %%
def functioner(weights: dict, ids: Tensor, patch: tuple = ()) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities (6, rows, words, VALUES) at each word, and the states (6, rows, seq, size) after each layer.

    `patch` is (layer, place, state): after that layer the token at this place gets the state (6, rows, size).
    """
    models, rows, seq = ids.shape
    hidden = torch.stack([table[row] for table, row in zip(weights["embed"], ids, strict=True)]).flatten(1, 2)
    states = []
    for layer in range(DEPTH):
        qkv = (normed(hidden) @ weights["qkv"][:, layer]).view(models, rows, seq, 3, BRANCHES, -1)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (models, rows, heads, seq, head_dim)
        bias = weights["bias"][:, layer][..., steps_back[:seq, :seq]][:, None]
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).masked_fill(blocked[..., :seq, :seq], -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(2, 3).reshape(hidden.shape)
        hidden = hidden + mixed @ weights["out"][:, layer]
        hidden = hidden + (normed(hidden) @ weights["up"][:, layer]).relu() @ weights["down"][:, layer]
        states.append(hidden.view(models, rows, seq, -1))
        if patch and patch[0] == layer:
            changed = states[-1].index_copy(2, torch.tensor([patch[1]]), patch[2][:, :, None])
            hidden = changed.flatten(1, 2)
    logits = (normed(hidden) @ weights["unembed"]).view(models, rows, seq, -1)
    return logits[:, :, 1::3].log_softmax(-1), states


# %%
functioners = side_by_side(new_functioner, SEEDS * 2)  # first three: free; last three: narrow
generator = torch.Generator().manual_seed(4000 + seed)


def function_losses(step: int) -> Tensor:
    ids, _, values = function_rows(generator, 24)
    log_probs, _ = functioner(functioners, ids)
    return -log_probs.gather(-1, values[..., None]).mean((1, 2, 3))


fit(functioners, function_losses, lesson.scaled(350, 20), rate=5e-3)

# %%
ids, words, values = function_rows(torch.Generator().manual_seed(5000 + seed), 256)
best = bayes(words, values)  # (6, rows, SHOTS + 1, VALUES)
with torch.no_grad():
    log_probs, _ = functioner(functioners, ids)
frequent = F.one_hot(tables, VALUES).float().mean(1)  # (6, WORDS, VALUES): how many functions say each value
no_examples = torch.stack([table[word] for table, word in zip(frequent, words, strict=True)])


def nats_from_bayes(log_probs: Tensor) -> Tensor:
    """Mean KL divergence (6, SHOTS + 1) of predictions from the best ones, by the number of examples."""
    return (torch.xlogy(best, best) - best * log_probs).sum(-1).mean(1)


lost = nats_from_bayes(log_probs)
ignored = nats_from_bayes(no_examples.clamp(min=1e-6).log())[:3].mean(0)
print("free models, nats from Bayes after 0, 1, ... examples:", [f"{nats:.3f}" for nats in lost[:3].mean(0)])
print("a predictor that ignores the examples:               ", [f"{nats:.3f}" for nats in ignored])
free_lost = lost[:3].mean()
lesson.claim(
    "free models lose at most 0.1 nats to Bayes, mean over prompts and seeds", free_lost, at_most=0.1, form=".3f"
)
lesson.report("nats that narrow models lose to Bayes", lost[3:].mean().item(), form=".3f")

# %%
by_shots = {"free, trained": lost[:3], "narrow, trained": lost[3:], "ignores the examples": ignored[None]}
figure = plots.curve(
    {name: (range(SHOTS + 1), nats.mean(0).tolist(), nats.amin(0).tolist(), nats.amax(0).tolist())
     for name, nats in by_shots.items()},
    title="Free models come close to Bayes' rule",
    xlabel="examples before the word", ylabel="divergence from Bayes (nats)",
)  # fmt: skip
figure.axes[0].set_xticks(range(SHOTS + 1))
plots.show(figure, alt="Divergence from the exact Bayes prediction against the number of examples, bands over three "
           "seeds: near zero for the free models, somewhat higher for the narrow ones, and high for one that ignores "
           "the examples.")  # fmt: skip

# %% [markdown]
# **The task vector.** Take the state of the last separator, just before the asked word, and average it over many prompts of the same function. Put it in the place of the separator of a prompt that is only `; w`, for every word. If the separator holds the task, then the answer is that function's value. Then a harder test: put the vector in a prompt whose examples show *another* function. Which of the two does the model follow? And perhaps the task stands at the word itself. There the state also says which word it is, so in `; w` *add* to it: the mean state of the function's words minus that of words without examples.

# %%
with torch.no_grad():
    long_ids, long_words, long_values = function_rows(torch.Generator().manual_seed(6000 + seed), 512)
    _, states = functioner(functioners, long_ids)
    told = torch.stack([table[:, word] for table, word in zip(tables, long_words, strict=True)])
    shows = (told == long_values[:, None]).all(-1).float()  # (6, FUNCTIONS, rows): which function a prompt shows
    share = shows / shows.sum(-1, keepdim=True)
    asked = torch.arange(WORDS).repeat(FUNCTIONS)  # every word for every function
    short = torch.stack([torch.full_like(asked, WORDS + VALUES), asked], -1).expand(6, -1, -1)
    right = tables.flatten(1)  # (6, FUNCTIONS * WORDS): the function's value
    plain, short_states = functioner(functioners, short)
    target = (shows.argmax(1) + 1) % FUNCTIONS  # (6, rows): another function than a prompt shows
    wanted = tables.gather(1, target[..., None].expand(-1, -1, WORDS)).gather(-1, long_words[..., -1:])[..., 0]
    unpatched = functioner(functioners, long_ids)[0][:, :, -1].argmax(-1)
    rows = {"; w, no patch": (plain[:, :, 0].argmax(-1) == right).float().mean(1),
            "another's examples, no patch": (unpatched == wanted).float().mean(1)}  # fmt: skip
    for layer in range(DEPTH):
        of_task, of_word = (share @ states[layer][:, :, place] for place in (-2, -1))  # (6, FUNCTIONS, size)
        in_long = of_task.gather(1, target[..., None].expand(-1, -1, STATE_SIZE))
        of_task, of_word = (vectors.repeat_interleave(WORDS, 1) for vectors in (of_task, of_word))
        of_word = of_word + short_states[layer][:, :, 1] - short_states[layer][:, :, 1].mean(1, keepdim=True)
        for name, ids, patch, values in (
            ("; w, separator", short, (0, of_task), right), ("; w, word", short, (1, of_word), right),
            ("another's examples, separator", long_ids, (LONGEST - 2, in_long), wanted),
        ):  # fmt: skip
            answers = functioner(functioners, ids, (layer, *patch))[0][:, :, -1].argmax(-1)
            rows[f"{name}, layer {layer + 1}"] = (answers == values).float().mean(1)  # (6,)
rows = {name: rows[name] for name in sorted(rows)}
show_table({name: [f"{part.mean():.0%}" for part in row.chunk(2)] for name, row in rows.items()}, ["free", "narrow"])
most = frequent.amax(-1).mean().item()
print("answers that are the vector's function's; "
      f"in ; w the most frequent value of a word would be right in {most:.0%}")  # fmt: skip
free_gain, narrow_gain = (rows["; w, separator, layer 2"] - rows["; w, no patch"]).view(2, 3).mean(1)
lesson.claim("in narrow models the task vector of layer 2 answers 15 points more than no patch, mean of seeds",
             narrow_gain, at_least=0.15, control=free_gain, form=".0%")  # fmt: skip
turned = rows["another's examples, separator, layer 2"].view(2, 3).mean(1)
lesson.claim("in narrow models the task vector of layer 2 overrules the examples mostly, mean of seeds", turned[1],
             at_least=0.5, control=rows["another's examples, no patch"].mean(), form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** Without a patch the models name the value that most functions give to the word; that is what "no patch" measures. The narrow models have a task vector at the separator, after the layer in which the separator has read the examples and before the one in which the word reads the separator. (A part is there after layer 1 already: in a prompt with other examples its vector turns the answer in 63 % of the cases, while after a bare separator it does nothing.) It even overrules the examples of another function. In the free models such a vector is neither at the separator nor at the word: no mean state does much more than the most frequent value. A likely reason, not tested here: their word reads the examples where they stand, so that the separator has nothing to hold. (Other places, such as the last value, which has also seen all examples, were not tried.) The price of the narrow way stands in the figure: it loses more to Bayes than the free one. So learning in context does not need a task vector just before the asked word, or at it. Here one appears where the evidence has to pass through that one place.

# %% [markdown] tags=["core"]
# ## 12 · Superposition: more features than numbers
#
# **Question.** Can a layer of $m$ numbers hold more than $m$ features?
#
# The toy of Elhage et al. (2022): an input has $n = 20$ features, each between 0 and 1, and each is zero most of the time. They are pressed into $m = 5$ numbers and rebuilt:
#
# $$h = W x, \qquad \hat x = \operatorname{ReLU}(W^\top h + b), \qquad \mathcal{L} = \sum_i I_i\, (x_i - \hat x_i)^2$$
#
# The importance $I_i = 0.9^i$ says which features count. Without the ReLU the best one can do is known: keep the $m$ most important features, one direction each, as principal component analysis does. With it there is another way. Give *more* than $m$ features a direction, not at right angles. Then two features disturb each other, $W_i \cdot W_j \ne 0$, but only when both are there at once, and the ReLU with a negative bias cuts small disturbances off. Does it pay, and when? If features are **sparse**, such meetings are rare.
#
# Feature $i$ alone comes back as $\lVert W_i \rVert^2 x_i$ before bias. Count it as *held* if that is at least half of it.

# %%
FEATURES, NUMBERS = 20, 5
DENSITIES = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02]  # how often a feature is not zero


def new_toy(generator: torch.Generator) -> dict[str, Tensor]:
    return {"matrix": 0.3 * torch.randn(NUMBERS, FEATURES, generator=generator), "bias": torch.zeros(1, FEATURES)}


def rebuild(weights: dict, x: Tensor, relu: bool) -> Tensor:
    raw = x @ weights["matrix"].transpose(1, 2) @ weights["matrix"] + weights["bias"]
    return raw.relu() if relu else raw


def held_features(relu: bool) -> tuple[dict, Tensor, Tensor]:
    """Weights of the models, how many features each holds, and its loss: (DENSITIES, seeds), trained at once."""
    weights = side_by_side(new_toy, SEEDS * len(DENSITIES))
    density = torch.tensor(DENSITIES).repeat_interleave(len(SEEDS))[:, None, None]
    importance, generator = 0.9 ** torch.arange(FEATURES), torch.Generator().manual_seed(7000 + seed)

    def losses(step: int) -> Tensor:
        x, there = torch.rand(2, len(density), 256, FEATURES, generator=generator)
        x = x * (there < density)  # (models, rows, FEATURES)
        error = importance * (x - rebuild(weights, x, relu)).pow(2)
        return error.mean((1, 2)) / density.flatten()  # of equal size at each density

    fit(weights, losses, lesson.scaled(700, 20), rate=1e-2)
    held = weights["matrix"].detach().pow(2).sum(1) >= 0.5  # (models, FEATURES)
    with torch.no_grad():
        loss = torch.stack([losses(0) for _ in range(16)]).mean(0)  # on new inputs
    return weights, *(part.view(len(DENSITIES), len(SEEDS)) for part in (held.sum(1).float(), loss))


# %%
with_relu, held, loss = held_features(relu=True)
_, linear_held, linear_loss = held_features(relu=False)
keep = (0.9 ** torch.arange(FEATURES))[NUMBERS:].sum() / FEATURES  # times the variance of a feature: loss of the others
with torch.no_grad():
    x = torch.rand(len(SEEDS) * len(DENSITIES), 4, FEATURES, generator=torch.Generator().manual_seed(seed))
    matrix, bias = with_relu["matrix"][0], with_relu["bias"][0, 0]
    library = F.relu(F.linear(F.linear(x[0], matrix), matrix.T, bias))
    difference = (rebuild(with_relu, x, relu=True)[0] - library).abs().max().item()
lesson.equal("a model of the batch is two tied torch linear layers and a ReLU", difference, within=1e-5)
table = {}
for i, density in enumerate(DENSITIES):
    counts = [", ".join(f"{count:.0f}" for count in row) for row in (held[i], linear_held[i])]
    variance = 1 / 3 - density / 4  # of a feature, over its density
    table[f"not zero in {density:.0%}"] = [*counts, *(f"{part:.3f}" for part in (loss[i].mean(), linear_loss[i].mean(),
                                                                                keep * variance))]  # fmt: skip
show_table(table, ["held, ReLU", "held, linear", "loss, ReLU", "loss, linear", "keep the best five"])

# %%
figure = plots.curve(
    {name: (DENSITIES, counts.mean(1).tolist(), counts.amin(1).tolist(), counts.amax(1).tolist())
     for name, counts in {"with ReLU": held, "linear": linear_held}.items()},
    title="The rarer the features, the more of them share five numbers", xlabel="how often a feature is there (share)",
    ylabel="features held, of 20", log_x=True, limits_y=(0, FEATURES),
)  # fmt: skip
figure.axes[0].set_yticks(range(0, FEATURES + 1, NUMBERS))
plots.show(figure, alt="Features held against how often a feature is there, bands over three seeds. The linear models "
           "stay at five at each density; with ReLU the line rises from five to more than three "
           "times as many as features get rare.")  # fmt: skip
dense_gap = (held[0] - NUMBERS).abs().max()
lesson.report(
    "dense features held beyond, or short of, the number of numbers, worst seed", dense_gap.item(), form=".0f"
)
sparse = DENSITIES.index(0.05)
per_number, linear_per_number = held[sparse].min() / NUMBERS, linear_held[sparse].max() / NUMBERS
ratios = loss.mean(1) / linear_loss.mean(1)
lesson.claim("where a feature is there in 5 %, the ReLU saves a quarter of the linear loss", 1 - ratios[sparse],
             at_least=0.25, control=1 - ratios[0], form=".0%")  # fmt: skip
lesson.claim("each seed holds at least 1.5 features a number where a feature is there in 5 %",
             per_number, at_least=1.5, control=linear_per_number, form=".1f")  # fmt: skip

# %% [markdown]
# **What you see.** When all features are always there, each model holds about five, the most important ones, with or without ReLU. (Their *number* is counted here, and one seed in some runs is off by one.) As features get rarer, only the models with a ReLU hold more, several for each number. And it pays: the loss with ReLU is the smaller one as soon as features are sparse, and the rarer they are the larger is its share of the linear loss that it saves. The linear models do just as well as keeping the best five. This layer has no preferred axes: you may turn its five numbers together, and $W^\top W$ stays as it is. So a single number of it need not stand for anything. If real models keep more features than numbers, too, then one has to look for *directions*, more of them than there are neurons. That is what the next section tries.

# %% [markdown] tags=["further"]
# ## 13 · A sparse autoencoder, beside its baselines
#
# *Further: no core section needs this one.*
#
# **Question.** Are there directions in this lesson's language model that stand for something, and does a sparse autoencoder find them better than chance?
#
# A **sparse autoencoder** (SAE) writes a state $x$ as a sum of few directions out of many. The TopK variant (Gao et al. 2024) keeps the $k$ largest entries of the code:
#
# $$z = \operatorname{TopK}\big(W_\text{enc}\, x + b\big), \qquad \hat x = W_\text{dec}\, z, \qquad \lVert W_{\text{dec}, j} \rVert = 1$$
#
# **What to look for.** Shima's descriptions name towns, trades, animals, dishes and instruments, twenty-four words of each kind. Is there a feature that is on at the last token of a *town*, whichever, and off elsewhere? Take the feature and the threshold that separate best on the training tokens, and measure $F_1$ (the harmonic mean of precision and recall) on tokens of other documents. The same 120 words occur in both. So measure a second time: choose on twelve words of each kind, and test on the *other* twelve.
#
# **Baselines** decide what the number means (Heap et al. 2025, Korznikov et al. 2026, Kantamneni et al. 2025).
#
# - *Without labels*, like the SAE: the best *neuron*, which means a coordinate of the state, with either sign; the best *principal component*; a *random dictionary* that was never trained; an SAE whose *decoder is frozen* at random directions, so that only the encoder learns; and a trained SAE on the states of a *random model*.
# - *With labels*, which is what you would try first if you know what to look for: a *look-up*, how often each token ended each kind in training; and one direction per kind, the *difference of the means* of its tokens and all others.

# %%
KINDS = list(world.values)  # town, trade, animal, dish, instrument
named_words = {word: i for i, word in enumerate(w for kind in KINDS for w in world.values[kind])}
NAMED = re.compile(r"\b(" + "|".join(map(re.escape, named_words)) + r")\b")
LAYER = max(1, model.config.num_hidden_layers // 2)
texts = [world.document(8000 + seed, i, {"description": 1.0}) for i in range(lesson.scaled(settings["documents"], 12))]


@torch.no_grad()
def states_of(network: torch.nn.Module, layer: int) -> tuple[Tensor, Tensor]:
    """States (tokens, hidden) after a layer, and the word that ends at each token (tokens,): its number, or -1."""
    states, words = [], []
    for text in texts:
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, return_tensors="pt")
        ends = encoded["offset_mapping"][0, :, 1]  # (tokens,)
        ids = encoded["input_ids"].to(network.device)
        hidden = network.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[layer]
        word = torch.full_like(ends, -1)
        for match in NAMED.finditer(text):
            word[ends == match.end()] = named_words[match[1]]
        states.append(hidden[0].float().cpu())
        words.append(word)
    return torch.cat(states), torch.cat(words)


# %%
(trained_states, which_word), (random_states, _) = states_of(model, LAYER), states_of(untrained, LAYER)
embeddings, _ = states_of(model, 0)
token_ids = torch.cat([torch.tensor(row) for row in tokenizer(texts, add_special_tokens=False)["input_ids"]])
per_kind = len(named_words) // len(KINDS)
kinds = which_word.div(per_kind, rounding_mode="floor")  # (tokens,): place in KINDS, or -1
CUT = int(0.7 * len(kinds))  # tokens of the first documents train, those of the others test
early_tokens = torch.arange(len(kinds)) < CUT
for_choice, for_test = (which_word < 0) | (which_word % 2 == 0), (which_word < 0) | (which_word % 2 == 1)


def centred(states: Tensor) -> Tensor:
    """Without the mean, and with length 1 on average, both of the training tokens."""
    states = states - states[:CUT].mean(0)
    return states / states[:CUT].norm(dim=1).mean()


sources = {"layer": centred(trained_states), "random model": centred(random_states), "embeddings": centred(embeddings)}
print(f"layer {LAYER}: {len(kinds)} tokens of size {trained_states.shape[1]}, {CUT} of them to train on")
print({name: (kinds == place).sum().item() for place, name in enumerate(KINDS)})

# %%
DIRECTIONS, ACTIVE = 512, 16


def code(dictionary: dict, states: Tensor) -> Tensor:
    """Codes (tokens, DIRECTIONS) with at most ACTIVE entries above 0."""
    raw = states @ dictionary["encoder"].T + dictionary["bias"]
    values, places = raw.topk(ACTIVE, dim=-1)
    return torch.zeros_like(raw).scatter(-1, places, values.relu())


def new_dictionary(states: Tensor, number: int, steps: int, frozen: bool = False) -> dict[str, Tensor]:
    """A dictionary from random directions, trained for some steps on the first CUT states."""
    generator = torch.Generator().manual_seed(number)
    directions = F.normalize(torch.randn(DIRECTIONS, states.shape[1], generator=generator), dim=1)
    dictionary = {"encoder": directions.clone(), "bias": torch.zeros(DIRECTIONS), "decoder": directions}
    learned = {name: part.requires_grad_() for name, part in dictionary.items() if not (frozen and name == "decoder")}

    def losses(step: int) -> Tensor:
        with torch.no_grad():
            directions.copy_(F.normalize(directions, dim=1))
        batch = states[torch.randint(CUT, (256,), generator=generator)]
        return (code(dictionary, batch) @ directions - batch).pow(2).sum(-1).mean()

    fit(learned, losses, steps, rate=1e-2)
    return {name: part.detach() for name, part in dictionary.items()}


# %%
THRESHOLDS = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])  # of a feature's largest value
IS_KIND = F.one_hot(kinds + 1, len(KINDS) + 1)[:, 1:].float()  # (tokens, KINDS)


def all_f1(features: Tensor, truth: Tensor, highest: Tensor) -> Tensor:
    """F1 (THRESHOLDS, features, KINDS) of each feature above each threshold."""
    scores = []
    for threshold in THRESHOLDS:
        on = (features > threshold * highest).float()  # (tokens, features)
        scores.append(2 * on.T @ truth / (on.sum(0)[:, None] + truth.sum(0)).clamp(min=1))
    return torch.stack(scores)


def best_f1(features: Tensor, learn: Tensor, test: Tensor) -> Tensor:
    """F1 (KINDS,) on some tokens of the feature and threshold that are best on others."""
    highest = features[learn].amax(0).clamp(min=1e-9)
    chosen = all_f1(features[learn], IS_KIND[learn], highest).flatten(0, 1).argmax(0)  # (KINDS,)
    place, feature = chosen // features.shape[1], chosen % features.shape[1]
    on = features[test][:, feature] > THRESHOLDS[place] * highest[feature]  # (tokens, KINDS)
    truth = IS_KIND[test]
    return 2 * (on * truth).sum(0) / (on.sum(0) + truth.sum(0)).clamp(min=1)


SPLITS = {  # tokens to choose on, tokens to test on
    "same words": (early_tokens, ~early_tokens),
    "new words": (early_tokens & for_choice, ~early_tokens & for_test),
}


# %%
SAE_STEPS = lesson.scaled(200, 20)
plans = {
    "sparse autoencoder": ("layer", SEEDS, SAE_STEPS, False),
    "frozen decoder": ("layer", SEEDS, SAE_STEPS, True),
    "random dictionary": ("layer", SEEDS, 0, False),
    "SAE on the embeddings": ("embeddings", SEEDS[:1], SAE_STEPS, False),
    "SAE on a random model": ("random model", SEEDS[:1], SAE_STEPS, False),
}
f1, explained = {}, {}  # f1: name -> one tensor (SPLITS, KINDS) for each seed
for name, (source, seeds, steps, frozen) in plans.items():
    states, f1[name], explained[name] = sources[source], [], []
    for number in seeds:
        dictionary = new_dictionary(states, number, steps, frozen)
        codes = code(dictionary, states)
        f1[name].append(torch.stack([best_f1(codes, *split) for split in SPLITS.values()]))
        left = (codes[CUT:] @ dictionary["decoder"] - states[CUT:]).pow(2).sum()
        explained[name].append(1 - (left / (states[CUT:] - states[CUT:].mean(0)).pow(2).sum()).item())

# %% [markdown]
# Check the two measures against scikit-learn, on the last dictionary of the loop.

# %%
highest = codes[:CUT].amax(0).clamp(min=1e-9)
ours = all_f1(codes[CUT:, :3], IS_KIND[CUT:], highest[:3])[0, :, 0]
library = [f1_score(IS_KIND[CUT:, 0], codes[CUT:, j] > THRESHOLDS[0] * highest[j], zero_division=0) for j in range(3)]
difference = (ours - torch.tensor(library)).abs().max().item()
rebuilt = (codes[CUT:] @ dictionary["decoder"]).numpy()
r2 = r2_score(states[CUT:].numpy(), rebuilt, multioutput="variance_weighted")
difference = max(difference, abs(r2 - explained[list(plans)[-1]][-1]))
lesson.equal("F1 and the explained variance are sklearn's", difference, within=1e-4)

# %% [markdown]
# Now the baselines that train nothing.


# %%
def both_signs(features: Tensor) -> list[Tensor]:
    """F1 (SPLITS, KINDS) of the best feature, as it is or negative."""
    return [torch.stack([best_f1(torch.cat([features, -features], 1), *split) for split in SPLITS.values()])]


def with_labels(states: Tensor | None) -> list[Tensor]:
    """F1 (SPLITS, KINDS) of a feature per kind: a difference of means or, without states, a look-up of the token."""
    rows = []
    for learn, test in SPLITS.values():
        truth = IS_KIND[learn]
        if states is None:
            counts = torch.zeros(len(tokenizer), len(KINDS)).index_add_(0, token_ids[learn], truth)
            times = torch.bincount(token_ids[learn], minlength=len(tokenizer)).clamp(min=1)
            features = (counts / times[:, None])[token_ids]
        else:
            inside = truth.T @ states[learn] / truth.sum(0)[:, None]  # (KINDS, hidden)
            outside = (1 - truth).T @ states[learn] / (1 - truth).sum(0)[:, None]
            features = states @ (inside - outside).T
        rows.append(best_f1(features, learn, test))
    return [torch.stack(rows)]


components = torch.linalg.svd(sources["layer"][:CUT].T @ sources["layer"][:CUT]).U  # (hidden, hidden)
f1 |= {"neurons": both_signs(sources["layer"]), "principal components": both_signs(sources["layer"] @ components)}
f1["neurons of a random model"] = both_signs(sources["random model"])
f1["labels: look-up of the token"] = with_labels(None)
f1 |= {f"labels: means, {source}": with_labels(sources[source]) for source in ("embeddings", "layer")}
same, new = ({name: torch.stack(rows)[:, i] for name, rows in f1.items()} for i in (0, 1))  # (seeds, KINDS)
means, new_means = ({name: part.mean(1) for name, part in parts.items()} for parts in (same, new))  # (seeds,)
columns = {name: [*same[name].mean(0), means[name].mean(), new_means[name].mean()] for name in f1}
header_of_f1 = [*KINDS, "mean", "new words"]
show_table({name: [f"{value:.2f}" for value in values] for name, values in columns.items()}, header_of_f1)

# %%
order = sorted((name for name in means if not name.startswith("labels")), key=lambda name: means[name].mean())
order += [name for name in means if name.startswith("labels")]
figure, axes = plt.subplots(figsize=(7, 4.4))
colours_of_bars = [plots.COLORS[1 if name.startswith("labels") else 0] for name in order]
axes.barh(order, [means[name].mean().item() for name in order], color=colours_of_bars)
for name in order:
    axes.plot(means[name], [name] * len(means[name]), "o", color=plots.INK, markersize=4)
axes.set(title="The SAE beats the baselines without labels", xlabel="held-out F1, mean over five kinds", xlim=(0, 1.02))
plots.show(figure, alt="Bars of held-out F1. In another colour, with labels: look-up and means are at or near one. "
           "Without labels the sparse autoencoder is highest; both bars of a random model are near zero.")  # fmt: skip
for name, shares in explained.items():
    print(f"{name}: explains {sum(shares) / len(shares):.0%} of the variance of held-out states")
unlabelled = [name for name in order if not name.startswith("labels") and name != "sparse autoencoder"]
for what, found in {"": means, " on words that did not choose it": new_means}.items():
    ahead = found["sparse autoencoder"].mean() - max(found[name].mean() for name in unlabelled)
    lesson.claim(f"the SAE's best features beat each baseline without labels by 0.1 in F1{what}", ahead, at_least=0.1,
                 form=".2f")  # fmt: skip
best_labelled = max(means[name].mean() for name in means if name.startswith("labels"))
behind = best_labelled - means["sparse autoencoder"].mean()
lesson.report("F1 of the best baseline with labels beyond the SAE's", behind, form=".2f")
gain = sum(explained["sparse autoencoder"]) / 3 - sum(explained["frozen decoder"]) / 3
lesson.report("variance that the SAE explains beyond one with a frozen decoder", gain, form=".0%")

# %% [markdown]
# **What you see.** Once you have labels, you need no SAE. A list of last tokens finds the kinds nearly without error on the words that it lists (on new words it finds nothing), and one labelled direction in the *embeddings* does so even for words that its labels left out: with labels, nothing here needs a deep model. (Without them the layer counted: an SAE on the embeddings, one seed, is far below the one on the layer.) What the SAE adds is that it found such directions *without labels*, in the mean of the five kinds better than random directions, neurons and principal components; labels only chose among them. Its features also hold for words that did not choose them. (The SAE itself has read all words; only the choice of the feature has not.) The first thing to try is thus the simple baseline: on large models, too, SAEs did not win consistently against plain probes (Kantamneni et al. 2025).
#
# Look at the other baselines as well. A dictionary of random directions, which never learned anything, is about as good as the best neurons. And an SAE rebuilds a good part of a *random* model's states, in which no kind can be found: explained variance says nothing about meaning. On large models random baselines came close to trained SAEs, for example 0.87 against 0.90 in a score of interpretability (Korznikov et al. 2026). A score without them is not evidence.

# %% [markdown] tags=["further"]
# ## 14 · Grokking: first memorised, then computed
#
# *Further: no core section needs this one.*
#
# **Question.** Can a network that has long fitted its training data still learn to generalise, and what does it compute then?
#
# Add two numbers modulo $p = 59$: each pair $(a, b)$ is an example with the class $(a + b) \bmod p$. Train on 60 % of the pairs, test on the others. Sums don't depend on the order, so take only pairs with $a \le b$; otherwise a network that treats both alike had seen most test pairs in training (Power et al. 2022 used all pairs). The network embeds both numbers with the same table $E$, adds them, and has one hidden layer: $\operatorname{logits} = U \operatorname{ReLU}(W (E_a + E_b))$. Train it with and without weight decay, on all training pairs in each step.

# %%
PRIME, EMBED, HIDDEN = 59, 64, 128
first, second = torch.triu_indices(PRIME, PRIME)  # all pairs a <= b
total = (first + second) % PRIME
shuffled = torch.stack([torch.randperm(len(total), generator=torch.Generator().manual_seed(n)) for n in SEEDS])
train_pairs, test_pairs = shuffled.split([round(0.6 * len(total)), len(total) - round(0.6 * len(total))], dim=1)


def new_adder(generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "embed": torch.randn(PRIME, EMBED, generator=generator) / EMBED**0.5,
        "hidden": torch.randn(EMBED, HIDDEN, generator=generator) / EMBED**0.5,
        "out": torch.randn(HIDDEN, PRIME, generator=generator) / HIDDEN**0.5,
    }


def add(weights: dict, pairs: Tensor) -> Tensor:
    """Logits (models, pairs, PRIME)."""
    tables_and_pairs = zip(weights["embed"], pairs, strict=True)
    embedded = torch.stack([table[first[row]] + table[second[row]] for table, row in tables_and_pairs])
    return (embedded @ weights["hidden"]).relu() @ weights["out"]


@torch.no_grad()
def share_right(weights: dict, pairs: Tensor) -> Tensor:
    """Accuracy (models,) on pairs (models, pairs)."""
    return (add(weights, pairs).argmax(-1) == total[pairs]).float().mean(1)


# %%
def train_adder(decay: float) -> tuple[dict, list, Tensor]:
    """Weights, the steps that were looked at, and accuracy (steps, 2, models) on training and on test pairs."""
    weights, steps, curve = side_by_side(new_adder, SEEDS), [], []

    def losses(step: int) -> Tensor:
        if step % 10 == 0:
            steps.append(step + 1)
            curve.append(torch.stack([share_right(weights, pairs) for pairs in (train_pairs, test_pairs)]))
        log_probs = add(weights, train_pairs).log_softmax(-1)
        return -log_probs.gather(-1, total[train_pairs][..., None]).mean((1, 2))

    fit(weights, losses, lesson.scaled(600, 20), rate=1e-2, fall=False, decay=decay)
    return weights, steps, torch.stack(curve)


# %%
start = side_by_side(new_adder, SEEDS)
adder, looked_at, grokked = train_adder(decay=1.0)
_, _, undecayed = train_adder(decay=0.0)
lines = {"training pairs": grokked[:, 0], "test pairs": grokked[:, 1],
         "training pairs, no decay": undecayed[:, 0], "test pairs, no decay": undecayed[:, 1]}  # fmt: skip
figure = plots.curve(
    {name: (looked_at, part.mean(1).tolist(), part.amin(1).tolist(), part.amax(1).tolist())
     for name, part in lines.items()},
    title="Training is done early; with weight decay the test follows late",
    xlabel="training step", ylabel="pairs summed right", percent=True, log_x=True, references={"chance": 1 / PRIME},
)  # fmt: skip
plots.show(figure, alt="Accuracy against training steps on a logarithmic axis, bands over three seeds. Training pairs "
           "reach 100 percent early. Test pairs stay near zero, then rise to nearly 100 percent; without decay they "
           "do not.")  # fmt: skip


# %%
def steps_to(level: float, curve: Tensor) -> float:
    """The first step looked at where all three models are at least at a level; nan if there is none."""
    reached = (curve.amin(1) >= level).nonzero()
    return looked_at[reached[0]] if len(reached) else math.nan


train_done, test_done = steps_to(0.99, grokked[:, 0]), steps_to(0.9, grokked[:, 1])
print(f"all training pairs right after {train_done} steps; 90 % of the test pairs after {test_done}")
print("test pairs right at the end:", [f"{share:.0%}" for share in grokked[-1, 1]], "with decay,",
      [f"{share:.0%}" for share in undecayed[-1, 1]], f"without; chance is {1 / PRIME:.1%}")  # fmt: skip
delay = test_done / train_done
lesson.claim("the test pairs need at least three times the steps of the training pairs", delay, at_least=3, form=".1f")
lesson.claim("with weight decay the test pairs are right in each seed", grokked[-1, 1].min(), at_least=0.9,
             control=undecayed[-1, 1].max(), form=".0%")  # fmt: skip

# %% [markdown]
# **What has it learned?** Numbers modulo $p$ lie on a circle. A network can give each number a place on several circles, one for each *frequency* $k$, with coordinates $\cos(2\pi k a / p)$ and $\sin(2\pi k a / p)$. Then a sum of numbers is a sum of angles. So look at the embedding table as a signal along $a$ and take its Fourier transform. Which share of its power lies in its strongest frequencies? And are they what the network computes with? Keep only the ten strongest of the 29 frequencies in the table, then only the 19 others, and for comparison any ten.

# %%
KEPT = 10


def power(table: Tensor) -> Tensor:
    """Power (models, frequencies) of an embedding table (models, PRIME, EMBED) at frequencies 1, 2, ..."""
    return torch.fft.rfft(table.detach(), dim=1).abs().pow(2).sum(-1)[:, 1:]


def filtered(weights: dict, keep: Tensor) -> dict:
    """The network with only some frequencies (models, frequencies) of its table; the mean stays."""
    spectrum = torch.fft.rfft(weights["embed"].detach(), dim=1)
    return weights | {"embed": torch.fft.irfft(spectrum * F.pad(keep, (1, 0), value=True)[..., None], n=PRIME, dim=1)}


strength = power(adder["embed"])
strongest = strength >= strength.topk(KEPT, dim=-1).values[:, -1:]
ranks = [torch.randperm(strength.shape[1], generator=torch.Generator().manual_seed(number)) for number in SEEDS]
shares = [power(weights["embed"]).sort(-1, descending=True).values for weights in (start, adder)]
at_start, at_end = (((part[:, :KEPT].sum(-1)) / part.sum(-1)).mean().item() for part in shares)
print(f"share of power in the strongest {KEPT} of {strength.shape[1]}: {at_start:.0%} at the start, {at_end:.0%} now")
choices = {"strongest": strongest, "all others": ~strongest, "any ten": torch.stack(ranks) < KEPT}
kept = {name: share_right(filtered(adder, choice), test_pairs) for name, choice in choices.items()}
show_table({name: [f"{share:.0%}" for share in shares] for name, shares in kept.items()}, [f"seed {n}" for n in SEEDS])
lesson.report("share of power in the strongest ten frequencies", at_end, form=".0%")
lesson.claim("the ten strongest frequencies alone sum at least half of the test pairs, mean of seeds",
             kept["strongest"].mean(), at_least=0.5, control=kept["all others"].mean(), form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** The network first stores its training pairs, and much later computes sums. It does so with waves: the strongest frequencies alone carry the result, and the others, though there are more of them, carry next to nothing. Ten frequencies at random do partly, probably since some strong ones are among them. *How* sums of waves become the wave of the sum is not shown here. Two proposals are the *clock*, which multiplies the waves of both numbers (Nanda et al. 2023), and the *pizza*, which needs only their sums (Zhong et al. 2023). This network adds the two embeddings before its ReLU, and that is the setting of the pizza. Without weight decay the test pairs stay wrong over the same number of steps, even more often than by chance. A likely reason: all training pairs that share a number with a test pair have another sum, and these are what the network has stored. Once the training pairs are right, the loss hardly pulls any more, and the decay goes on pulling towards small weights; that the solution of waves is the one with small weights is what Nanda et al. argue, and is not measured here.

# %% [markdown]
# ## 15 · Exercises
#
# Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.


# %% tags=["exercise"]
# Exercise 13.1, easy: a patch between nothing and everything.
def recovered(clean: float, corrupted: float, patched: float) -> float:
    """How far a patch brings a logit difference back, from that of the corrupted run (0) to that of the clean one (1).

    All three are logit differences. More than 1 and less than 0 are possible. If clean and corrupted are equal there
    was nothing to bring back, and the result is 0.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_recovered(recovered):
    expect_close("recovered(4.0, -2.0, 1.0)", recovered(4.0, -2.0, 1.0), 0.5)
    expect_close("recovered(4.0, -2.0, 4.0)", recovered(4.0, -2.0, 4.0), 1.0)
    expect_close("recovered(4.0, -2.0, -2.0)", recovered(4.0, -2.0, -2.0), 0.0)
    expect_close("recovered(-3.0, 1.0, 0.0)", recovered(-3.0, 1.0, 0.0), 0.25)
    expect_close("recovered(2.0, 0.0, -1.0), worse than the corrupted run", recovered(2.0, 0.0, -1.0), -0.5)
    expect_close("recovered(2.0, 0.0, 3.0), better than the clean run", recovered(2.0, 0.0, 3.0), 1.5)
    expect_close("recovered(1.0, 1.0, 3.0), nothing to bring back", recovered(1.0, 1.0, 3.0), 0.0)


check("13.1", check_recovered, recovered)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# It is the position of one number on the straight line between two others.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The share of right answers, which the lesson used, does not see a patch that brings an answer half-way back. This number does.
#
# ```python
# def recovered(clean: float, corrupted: float, patched: float) -> float:
#     if clean == corrupted:
#         return 0.0
#     return (patched - corrupted) / (clean - corrupted)
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 13.2, hard: change several facts at once, with one change of one matrix.
def joint_edit(weight: Tensor, keys: Tensor, changes: Tensor, moment: Tensor) -> Tensor:
    """The matrix (hidden, inner) nearest to `weight` that adds `changes[i]` to the value of `keys[i]` for all i.

    keys (facts, inner), changes (facts, hidden), moment (inner, inner): C, symmetric. Minimise
    trace((W' - W) C (W' - W)^T) such that W' k_i = W k_i + change_i. Ask Lagrange, once for each fact.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_joint_edit(joint_edit):
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 7), (3, 7), (3, 4), (7, 7)
    weight, keys, changes, root = (torch.randn(*shape, generator=generator).double() for shape in shapes)
    moment, kept = root @ root.T + 0.1 * torch.eye(7, dtype=torch.float64), weight.clone()
    new = joint_edit(weight, keys, changes, moment)
    expect_shape("joint_edit(weight, keys, changes, moment)", new, (4, 7))
    for i in range(3):
        expect_close(f"what it adds for key {i}", (new - weight) @ keys[i], changes[i], 1e-6)
    expect_true("the matrix that was given is not changed", torch.equal(weight, kept))
    gradient = (new - weight) @ moment  # at the minimum a combination of the keys: no part stands across them
    across = gradient - gradient @ torch.linalg.pinv(keys) @ keys
    expect_true("no other matrix that keeps the constraints is nearer in the norm of C", across.abs().max() < 1e-6)
    one = joint_edit(weight, keys[:1], changes[:1], moment)
    direction = torch.linalg.solve(moment, keys[0])
    expect_close("one fact", one, weight + torch.outer(changes[0], direction) / (direction @ keys[0]), 1e-6)


check("13.2", check_joint_edit, joint_edit)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With the keys as columns of $K$ and the changes as columns of $D$, the condition on the gradient is $(W' - W) C = M K^\top$ for some $M$. Insert it in $(W' - W) K = D$ and solve for $M$.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# $W' = W + D (K^\top C^{-1} K)^{-1} K^\top C^{-1}$. One edit after the other is not the same: the second one moves the value of the first key, unless $k_1^\top C^{-1} k_2 = 0$. MEMIT (Meng et al. 2023) edits thousands of facts in this manner, with a soft constraint.
#
# ```python
# def joint_edit(weight: Tensor, keys: Tensor, changes: Tensor, moment: Tensor) -> Tensor:
#     directions = torch.linalg.solve(moment, keys.T)  # (inner, facts): C^-1 K
#     overlap = keys @ directions  # (facts, facts): K^T C^-1 K
#     return weight + changes.T @ torch.linalg.solve(overlap, directions.T)
# ```
#
# </details>

# %% tags=["exercise"]
# Exercise 13.3, easy: predict, then measure. All heads of the last layer are induction heads. How many are enough?
PREDICTION = None  # your guess, before you run anything: share of right answers (0 to 1) with the best single one left


def with_one_head_left() -> list[float]:
    """Share of right answers on `fresh` with only one head of the last layer left, for each of its heads in order.

    The others give their usual output, as in section 3 (`without`, `usual`, `accuracy`).
    """
    raise NotImplementedError


# %% tags=["check"]
def check_one_head_left(with_one_head_left, prediction):
    shares = with_one_head_left()
    guessed = isinstance(prediction, int | float) and 0 <= prediction <= 1
    expect_true("PREDICTION is a number between 0 and 1, written before you measured", guessed)
    expect_true(f"there is one number for each of the {num_heads} heads", len(shares) == num_heads)
    for head in range(num_heads):
        out = [(num_layers - 1, other) for other in range(num_heads) if other != head]
        with without(out, usual):
            expect_close(
                f"with head {num_layers - 1}.{head} left", float(shares[head]), accuracy(*fresh).accuracy, 1e-6
            )
    print(f"you predicted {prediction:.0%} for the best, it is {max(shares):.0%}; the worst has {min(shares):.0%}")


check("13.3", check_one_head_left, with_one_head_left, PREDICTION)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `accuracy(*fresh)` is a `Score`; its share is `.accuracy`. Which heads do you have to take out so that one is left?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Single heads are far from equal: some are almost enough, others are not. They all find the same token, but each brings only its share of the right colour to the MLP. With a smaller margin over the other colours more answers are lost.
#
# ```python
# PREDICTION = 0.5
#
# def with_one_head_left() -> list[float]:
#     shares = []
#     for head in range(num_heads):
#         with without([(num_layers - 1, other) for other in range(num_heads) if other != head], usual):
#             shares.append(accuracy(*fresh).accuracy)
#     return shares
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 13.4, easy: Bayes when examples may be wrong.
def noisy_posterior(agrees: Tensor, error: float, values: int) -> Tensor:
    """Posterior (functions,) of functions that are equally likely before, after examples that may be wrong.

    `agrees` (examples, functions) says whether a function gives the value that an example shows. With probability
    `error` an example shows another value than the right one: each of the other `values - 1` equally often.
    There may be hundreds of examples.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_noisy_posterior(noisy_posterior):
    agrees = torch.tensor([[True, True, False], [True, False, False]])
    expected = torch.tensor([0.8 * 0.8, 0.8 * 0.1, 0.1 * 0.1])
    found = noisy_posterior(agrees, 0.2, 3)
    expect_shape("noisy_posterior(agrees, 0.2, 3)", found, (3,))
    expect_close("of two examples, error 0.2, 3 values", found, expected / expected.sum())
    expect_close("of no examples", noisy_posterior(agrees[:0], 0.2, 3), torch.full((3,), 1 / 3))
    many = torch.zeros(900, 2, dtype=torch.bool)
    many[:450, 0] = many[:451, 1] = True
    expect_close("of 900 examples", noisy_posterior(many, 0.5, 4), torch.tensor([0.25, 0.75]), 1e-3)


check("13.4", check_noisy_posterior, noisy_posterior)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What is the probability of an example under a function that agrees with it, and under one that does not? Add logarithms, so that hundreds of factors do not become 0.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def noisy_posterior(agrees: Tensor, error: float, values: int) -> Tensor:
#     right, wrong = math.log(1 - error), math.log(error / (values - 1))
#     log_likelihood = torch.where(agrees, right, wrong).sum(0)  # (functions,)
#     return log_likelihood.softmax(0)
# ```
#
# With `error` near 0 this is the posterior of section 11.
#
# </details>


# %% tags=["exercise"]
# Exercise 13.5, medium: predict, then measure. What if the pairs of a row always come in the same order?
def ordered_rows(generator: torch.Generator, models: int, rows: int) -> tuple[Tensor, Tensor]:
    """Like `mapping_rows`, but `which` is 0, 1, 2, 3, 0, 1, 2, 3, ... in each row: rounds in the same order."""
    raise NotImplementedError


def one_layer_now() -> str:
    """Your prediction, before you run the check: on such rows the one-layer model "guesses" as before, or "solves"."""
    raise NotImplementedError


# %% tags=["check"]
def check_ordered(ordered_rows, one_layer_now):
    predicted = one_layer_now()
    expect_true('the prediction is "guesses" or "solves"', predicted in ("guesses", "solves"))
    ids, which = ordered_rows(torch.Generator().manual_seed(5), 3, 40)
    expect_shape("the tokens of ordered_rows(generator, 3, 40)", ids, (3, 40, SEQ))
    expect_close("which", which, (torch.arange(PAIRS) % ROW_KEYS).expand(3, 40, PAIRS))
    rounds = ids.view(3, 40, -1, 2 * ROW_KEYS)
    expect_true("each round is the first one again", (rounds == rounds[:, :, :1]).all())
    keys, labels = rounds[:, :, 0, ::2], rounds[:, :, 0, 1::2]
    expect_true("keys come before labels", (keys < KEYS).all() and (labels >= KEYS).all())
    for what, tokens in {"keys": keys, "labels": labels}.items():
        expect_true(f"the {what} of a row differ", (tokens.sort(-1).values.diff(dim=-1) > 0).all())
        expect_true(f"other rows have other {what}", len(tokens.flatten(0, 1).unique(dim=0)) > 100)
    expect_true("the label is not the key's number", (labels - KEYS != keys).any())
    _, curve = train_on_mappings(1, 8, lesson.scaled(150, 150), ordered_rows)
    right = curve[-10:].mean().item()
    print(f"one layer, rows in order, after {len(curve)} steps: {right:.0%} of the told labels right")
    measured = "solves" if right > 0.8 else "guesses"
    expect_true(f"your prediction, {predicted}, is what was measured", predicted == measured)


check("13.5", check_ordered, ordered_rows, one_layer_now)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# For the rows: `which` is given now, all else is as in `mapping_rows`. For the prediction: where, seen from a key, does the label stand that is asked for? What can the bias $b_{h,\,i-j}$ do?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def ordered_rows(generator: torch.Generator, models: int, rows: int) -> tuple[Tensor, Tensor]:
#     keys = torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]
#     labels = KEYS + torch.rand(models, rows, KEYS, generator=generator).argsort(-1)[..., :ROW_KEYS]
#     which = (torch.arange(PAIRS) % ROW_KEYS).expand(models, rows, PAIRS)
#     return torch.stack([keys.gather(-1, which), labels.gather(-1, which)], -1).flatten(2), which
#
#
# def one_layer_now() -> str:
#     return "solves"
# ```
#
# The label stands always seven tokens before the place that asks for it, so a head that looks seven tokens back copies it, and needs no induction. Many tests of in-context copying have such a way round. Repeat a text after a *random* distance, or not at all in order.
#
# </details>


# %% tags=["exercise"]
# Exercise 13.6, medium: add two numbers with waves, without adding them.
def clock_logits(cos_a, sin_a, cos_b, sin_b, cos_c, sin_c) -> Tensor:
    """Logits (pairs, p): for each c the sum over frequencies k of cos(2 pi k (a + b - c) / p).

    You get only the cosines and sines of the angles 2 pi k a / p and 2 pi k b / p, each (pairs, frequencies), and those
    of 2 pi k c / p, each (p, frequencies). That is what an embedding and an unembedding of waves can hold. Use sums and
    products only: no inverse functions such as atan2, which would give the angles back.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_clock(clock_logits):
    p, frequencies = 23, torch.tensor([1, 4, 9])
    a, b = (grid.flatten() for grid in torch.meshgrid(torch.arange(p), torch.arange(p), indexing="ij"))
    angles = [2 * math.pi * numbers[:, None] * frequencies / p for numbers in (a, b, torch.arange(p))]
    waves = [wave for angle in angles for wave in (angle.cos(), angle.sin())]
    found = clock_logits(*waves)
    expect_shape("clock_logits(...)", found, (p * p, p))
    apart = a[:, None] + b[:, None] - torch.arange(p)  # (pairs, p)
    expected = (2 * math.pi * apart[..., None] * frequencies / p).cos().sum(-1)
    expect_close("the logits", found, expected, 1e-4)
    expect_true("the largest logit is that of (a + b) mod p", (found.argmax(-1) == (a + b) % p).all())
    doubled = clock_logits(*(2 * wave for wave in waves[:2]), *waves[2:])  # of sums and products, not of angles
    expect_close("with the waves of a twice as high, the logits", doubled, 2 * expected, 1e-4)


check("13.6", check_clock, clock_logits)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# $\cos(\alpha + \beta)$ and $\sin(\alpha + \beta)$ follow from products of the cosines and sines of $\alpha$ and $\beta$. Then $\cos(\gamma - \delta) = \cos\gamma\cos\delta + \sin\gamma\sin\delta$ is a dot product of the pair with $c$: a matrix product over frequencies.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def clock_logits(cos_a, sin_a, cos_b, sin_b, cos_c, sin_c) -> Tensor:
#     cos_sum = cos_a * cos_b - sin_a * sin_b  # (pairs, frequencies)
#     sin_sum = sin_a * cos_b + cos_a * sin_b
#     return cos_sum @ cos_c.T + sin_sum @ sin_c.T
# ```
#
# At $c = a + b$ all waves are at their top at once. Elsewhere they disagree, the more so the more frequencies there are.
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson: those of sections 3 and 9. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. You train another model, draw the figure "No single head is needed, one pair is" for it, and find no dark cell, neither on the diagonal nor beside it. Without all heads of the last layer its answers are wrong, too. What follows?**
#
# - A. The new model has no induction heads, nor previous-token heads.
# - B. No job that the answer needs is done by one or two heads alone.
# - C. The search went wrong: some pair of heads must break the answer.
# - D. Any three heads of the new model can be removed at once.
#
# <details><summary>Answer</summary>
#
# B. If three heads do the same job, removing any two changes no answer. A is as wrong as it would have been to conclude from the diagonal in section 3 that the previous-token heads are unimportant. D asks about triples, and no triple was removed.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. A probe on a large model's hidden states names the country of a city in 98 % of the test sentences. The cities of the test sentences are also in the training sentences. What would you measure first?**
#
# - A. The accuracy of a larger probe, such as a network with one hidden layer.
# - B. The same probe on other sentences about the same cities.
# - C. The accuracy for countries given to the cities by lot, and for cities that the probe has never seen.
# - D. The norm of the probe's weights.
#
# <details><summary>Answer</summary>
#
# C. The probe may have learned the list of cities. New sentences about the same cities, B, do not change that: in section 6 the phrasing was new, too.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. In another model, name states from a question about A's trade, put into the question about B's town, bring A's *trade* as the answer. What does this say that section 4 did not find here?**
#
# - A. What was asked about is already mixed into the states of the name.
# - B. The patch has broken the model, so nothing follows.
# - C. The trade stands in the name states, and the town does not.
# - D. The last position is not used for the answer.
#
# <details><summary>Answer</summary>
#
# A. In section 4 the same patch brought A's town: what it moved was the person, and which fact is read was decided elsewhere. Here the relation comes along with the patch. C goes too far: the town may stand there as well. In shima's questions that the lesson uses, the words before the name say already what is asked.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. In the figure of section 9, the line of the one-layer models stays at the dashed line. What would change that?**
#
# - A. Training them ten times longer.
# - B. Eight more heads in the same layer.
# - C. A second layer, even with half of the heads in each.
# - D. A larger vocabulary of labels.
#
# <details><summary>Answer</summary>
#
# C. At a label, one layer's input is that label's embedding alone: no head of this layer can know which key stood before it. Something has to write the key there first, and that takes a layer of its own. The two-layer models of the figure have just as many heads.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. Somebody trains a sparse autoencoder on a model, finds a feature with a high F1 for a concept, and explains 95 % of the variance. What is missing before this says something about the model?**
#
# - A. A larger dictionary.
# - B. The same numbers for simple baselines and for a random model.
# - C. More training steps, until the explained variance no longer rises.
# - D. A smaller number of active features, so that each one means more.
#
# <details><summary>Answer</summary>
#
# B. In section 13, on words that it has seen, a look-up of the token is better than the SAE, random directions reach a good part of its F1, and much of a random model's variance can be explained. What counts is the distance to these baselines.
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
# For models from the hub, `transformers` itself gives what most analyses need: `output_attentions=True` returns the attention of every head (with `attn_implementation="eager"`; the fused kernels don't keep it), `output_hidden_states=True` the states after every layer, and a forward hook reads or changes any state on the way. The cells below find induction heads and read a layer in this way, on the profile's model. The lists are harder than those of section 2: longer, from the rarer tokens only, and without the words `Repeat:` and `|`. Expect a lower number.
#
# | library | what it is good for | note |
# |---|---|---|
# | `nnsight` | reading and changing any inner value inside a `with model.trace(...)` block, also on remote models | lean; works with the model as it is |
# | `captum` | attribution: integrated gradients, layer attributions, ablations | for any PyTorch module |
# | SAELens | training, loading and evaluating sparse autoencoders | in an environment of its own: it pins other versions |

# %%
eager, _ = load_model(replace(machine, attention="eager"))
period, vocabulary = 20, model.config.vocab_size
half = torch.randint(vocabulary // 4, vocabulary, (16, period), generator=torch.Generator().manual_seed(seed))
twice = torch.cat([half, half], 1).to(machine.device)  # random tokens, said twice
with torch.no_grad():
    attentions = eager(input_ids=twice, output_attentions=True, use_cache=False).attentions
place = torch.arange(period, 2 * period)
to_next = [layer[..., place, place - period + 1].float().mean((0, 2)).cpu() for layer in attentions]
scores = torch.stack(to_next)  # (layers, heads)
best_layer, best_head = divmod(scores.argmax().item(), scores.shape[1])
print(f"on random tokens, head {best_layer}.{best_head} pays most attention to the token that came next last time: "
      f"{scores.max():.2f}; an even gaze would pay {(1 / (place + 1)).mean():.2f}")  # fmt: skip
lesson.report("attention of the best induction head on random tokens", scores.max().item(), form=".2f")

# %%
kept = {}
middle = model.config.num_hidden_layers // 2
block = model.base_model.layers[middle - 1]  # blocks count from 0; state 0 is the embedding


def keep(module, inputs, output):
    kept["state"] = output[0] if isinstance(output, tuple) else output


handle = block.register_forward_hook(keep)
with torch.no_grad():
    library = model(input_ids=twice, output_hidden_states=True, use_cache=False).hidden_states[middle]
handle.remove()
lesson.equal("a hook on a block reads what output_hidden_states returns", (kept["state"] - library).abs().max().item())

# %% [markdown]
# ## Read on
#
# - Elhage et al. 2021, *A Mathematical Framework for Transformer Circuits*: the residual stream as a sum, heads as circuits.
# - Olsson et al. 2022, *In-context Learning and Induction Heads* (arXiv 2209.11895): how the heads of section 2 were found, and their phase change in small and large models.
# - Wang et al. 2022, *Interpretability in the Wild* (arXiv 2211.00593): a whole circuit in GPT-2, with backup heads.
# - Meng et al. 2022, *Locating and Editing Factual Associations in GPT* (arXiv 2202.05262): patching and ROME. Gupta et al. 2024, *Rebuilding ROME* (arXiv 2403.07175): why some edits destroyed the model. Meng et al. 2023, *Mass-Editing Memory in a Transformer* (arXiv 2210.07229): MEMIT, for exercise 13.2. Hase et al. 2023, *Does Localization Inform Editing?* (arXiv 2301.04213): it hardly does.
# - nostalgebraist 2020, *interpreting GPT: the logit lens*; Belrose et al. 2023, *Eliciting Latent Predictions from Transformers with the Tuned Lens* (arXiv 2303.08112).
# - Hewitt and Liang 2019, *Designing and Interpreting Probes with Control Tasks* (arXiv 1909.03368).
# - Turner et al. 2023, *Steering Language Models With Activation Engineering* (arXiv 2308.10248); Rimsky et al. 2023, *Steering Llama 2 via Contrastive Activation Addition* (arXiv 2312.06681): differences of means.
# - Sanford, Hsu and Telgarsky 2024, *One-layer transformers fail to solve the induction heads task* (arXiv 2408.14332).
# - von Oswald et al. 2023, *Transformers Learn In-Context by Gradient Descent*, arXiv:2212.07677; Raventós et al. 2023, *Pretraining task diversity and the emergence of non-Bayesian in-context learning for regression*, arXiv:2306.15063: where between few and many tasks the change lies.
# - Hendel et al. 2023, *In-Context Learning Creates Task Vectors*, arXiv:2310.15916; Todd et al. 2023, *Function Vectors in Large Language Models*, arXiv:2310.15213.
# - Elhage et al. 2022, *Toy Models of Superposition*, arXiv:2209.10652: what the directions look like, and when they jump.
# - Gao et al. 2024, *Scaling and evaluating sparse autoencoders*, arXiv:2406.04093; Heap et al. 2025, *Sparse Autoencoders Can Interpret Randomly Initialized Transformers*, arXiv:2501.17727; Korznikov et al. 2026, *Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?*, arXiv:2602.14111; Kantamneni et al. 2025, *Are Sparse Autoencoders Useful? A Case Study in Sparse Probing*, arXiv:2502.16681: read the last three before you train one.
# - Power et al. 2022, *Grokking*, arXiv:2201.02177; Nanda et al. 2023, *Progress measures for grokking via mechanistic interpretability*, arXiv:2301.05217; Zhong et al. 2023, *The Clock and the Pizza*, arXiv:2306.17844.
