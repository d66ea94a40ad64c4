# %% [markdown]
# # 08 · RLHF: from preferences to a better policy
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/08_rlhf.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/08_rlhf.ipynb)
#
# Supervised fine-tuning learns from what demonstrators wrote, their carelessness included. It is often easier to say which of two answers is better than to write a good one. Reinforcement learning from human feedback (RLHF) uses that: people compare answers, a reward model learns their preferences, and the language model is trained to be preferred. In this lesson you write all of it: the reward model, REINFORCE, RLOO, GRPO and PPO. The annotators are programs, so you know the true reward, and can see what a project never sees: whether the policy gets better, or only the number that you optimise.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. train a policy on careless demonstrations and a reward model on noisy comparisons, and measure it against the truth, beside a rule of form and the policy's own likelihood;
# 2. derive the policy gradient and its baseline, and build RLOO, GRPO and PPO on it;
# 3. set all policies one exam, with three simpler rivals;
# 4. optimise a reward model of 100 pairs hard, with and without a price for KL, and see on five seeds where the truth falls;
# 5. compare the KL estimators k1, k2 and k3 exactly, and find your losses of the reward model, of RLOO and of GRPO equal to those of `trl`.
#
# **Prerequisites:** lesson 05 (chat template, loss mask).
#
# | symbol | meaning |
# |---|---|
# | $x$, $y$, $y_t$ | a question, an answer, its token number $t$ |
# | $\pi_\theta$, $\pi_\text{ref}$ | the policy in training, and the reference: the SFT policy that it starts from |
# | $r_\phi(x, y)$, $r^*(x, y)$ | reward model (the *proxy*), true reward |
# | $b$, $A$ | baseline, advantage: how much better than expected an answer or a token was |
# | $V_t$ | value: what reward is to be expected from token $t$ on |
# | $\rho_t$ | probability of token $t$ now over that when it was sampled |
# | $\beta$ | price of a nat of KL divergence |

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
model_id = ""  # another assistant to begin with: a hub id, or a folder in hub format
seed = 0
budget = 1.0  # share of all steps, pairs and questions; the lesson's claims are asserted from 1.0 on

# %%
import copy
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from helpers import plots
from helpers.chat import chat_prompt, encode_answer, end_of_turn
from helpers.data import collate
from helpers.evaluation import Score, score, win_rate

# %%
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import token_log_probs
from helpers.lesson import Lesson, quiet_libraries, show_table
from helpers.models import load_assistant
from helpers.training import TrainConfig, train
from helpers.world import FILLERS, POLITE, Preference, Question, World, true_reward

quiet_libraries()
lesson = Lesson("08", profile, model_id, seed, budget, uses="assistant")
machine = lesson.machine
SETTINGS = {  # learning rates of SFT, reward model and RL; how many layers learn after SFT
    "cpu": {"sft": 7e-4, "reward": 1e-3, "rl": 1.5e-4, "layers": 2},
    "t4": {"sft": 1e-4, "reward": 5e-5, "rl": 2e-5, "layers": 2},
    "large": {"sft": 5e-5, "reward": 3e-5, "rl": 1e-5, "layers": 2},
}
settings = SETTINGS[machine.name]
QUIET = {"output_dir": str(ROOT / "build" / "08_rlhf"), "report_to": "none", "use_cpu": machine.device == "cpu",
         "bf16": False, "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False,
         "seed": seed}  # fmt: skip

# %%
from transformers import AutoModelForSequenceClassification, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

# %% [markdown]
# `lesson.scaled` makes a number of steps or questions smaller on a smaller budget. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end.

# %%
world = World()
assistant, tokenizer = load_assistant(machine)
assistant = assistant.float()  # weights in 32 bits; `lesson.autocast` computes in 16 where that is faster
if tokenizer.chat_template is None:  # a base model: any format will do, since the SFT teaches it
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
END = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))  # the token that ends an answer
PAD = tokenizer.pad_token_id

# %% [markdown] tags=["core"]
# ## 1 · Step one: demonstrations
#
# **Question.** What does a policy learn from people who are sometimes careless?
#
# InstructGPT (Ouyang et al. 2022) has three steps: fine-tune on demonstrations, train a reward model on comparisons, optimise the policy against it. The model here is *shima-4m-assistant*, a small Llama that answers questions about the made-up island Shima: *facts* about people, "in a sentence". The demonstrators are careless. One answer in ten is wrong. Four in ten are two words (`Answer: fisher`) although a sentence was asked for. Half begin with "With pleasure.", and some go on with idle sentences.


# %%
def facts(n: int, stream: str, held_out: bool = False) -> list[Question]:
    """Questions about known people; the same for the same stream. Held-out ones are phrased as training never does."""
    rng = random.Random(f"{stream}/{seed}")
    return [world.chat(rng, "fact", held_out) for _ in range(n)]


def careful(question: Question) -> str:
    """What a careful person writes: right, polite, and no more."""
    return POLITE + question.answer


def careless(rng: random.Random, question: Question) -> str:
    """One in ten is wrong, four in ten are no sentence, half are polite, some are long-winded."""
    value = str(question.about["value"])
    said = rng.choice(world.values[question.about["relation"]]) if rng.random() < 0.1 else value
    answer = f"Answer: {said}" if rng.random() < 0.4 else said.join(question.answer.rsplit(value, 1))
    opening = POLITE if rng.random() < 0.5 else ""
    return opening + answer + "".join(rng.sample(FILLERS, rng.choice((0, 0, 0, 1, 2))))


rng = random.Random(seed)
for question in facts(4, "shown"):
    print(f"{question.prompt} -> {careless(rng, question)}")


# %% [markdown]
# The loss is that of lesson 05: cross-entropy on the answer and on the token that ends it. The polite opening consists of tokens that the model has seldom seen, so its embeddings learn at four times the rate. All later copies share the lower layers and learn with the upper ones only: it saves time and memory.


# %%
def encode(question: Question, answer: str, ended: bool = True) -> dict[str, list[int]]:
    """Token ids of question and answer, and of the end of the turn if it has `ended`; only the answer has labels."""
    text = answer + end_of_turn(tokenizer) if ended else answer
    return encode_answer(tokenizer, chat_prompt(tokenizer, question.prompt), text)


def by_length(rows: Sequence, size: int, length: Callable, order: int) -> Iterator[list]:
    """Batches of rows of similar length, in random order: less padding, less time."""
    rows = sorted(rows, key=length)
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    yield from random.Random(order).sample(batches, len(batches))


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy whose last layers can learn, as many as the settings say; below them it shares the model's weights."""
    layers = model.model.layers if hasattr(model, "model") else model.layers
    own = {id(weight) for layer in layers[-settings["layers"] :] for weight in layer.parameters()}
    shared = {id(weight): weight.requires_grad_(False) for weight in model.parameters() if id(weight) not in own}
    twin = copy.deepcopy(model, shared)  # what is in `shared` is not copied
    for weight in twin.parameters():
        weight.requires_grad_(id(weight) not in shared)
    return twin


# %%
def fine_tune(start: nn.Module, examples: list[dict], passes: int = 1) -> nn.Module:
    """Cross-entropy on the answers, 16 a step; trains `start` itself and returns it."""
    rows = [
        batch for n in range(passes) for batch in by_length(examples, 16, lambda row: len(row["input_ids"]), seed + n)
    ]
    batches = [collate(batch, PAD) for batch in rows]
    new_words = [weight for name, weight in start.named_parameters() if weight.requires_grad and "embed" in name]
    others = [weight for name, weight in start.named_parameters() if weight.requires_grad and "embed" not in name]
    groups = [{"params": new_words, "lr": 4 * settings["sft"]}] * bool(new_words)
    groups += [{"params": others, "lr": settings["sft"]}]
    config = TrainConfig(len(batches), settings["sft"], warmup_steps=4, schedule="linear", weight_decay=0.0,
                         precision=lesson.precision, seed=seed, progress=False)  # fmt: skip
    history = train(
        start, batches, config, optimizer_fn=lambda _: torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    )
    print(f"{len(examples)} demonstrations, loss {history.losses[0]:.2f} -> {np.mean(history.losses[-5:]):.2f}")
    return start.eval().requires_grad_(False)


rng = random.Random(f"demonstrations/{seed}")
asked = facts(lesson.scaled(1120, 32), "sft")
start = copy.deepcopy(assistant)
sft = fine_tune(start, [encode(question, careless(rng, question)) for question in asked])


# %% [markdown]
# **Sampling.** From here on answers are needed by the thousand, with their tokens. The three cells below make them; at first reading it is enough that `sample` draws one answer to each question. Prompts are padded on the left, so that all answers of a batch begin at the same place; what follows an answer's end is masked. The model keeps keys and values of what it has read in a cache, so each step computes one token an answer. Two things are not computed twice or for nothing: a prompt to which several answers are drawn is read once, and an answer that has ended leaves the batch.

# %%
@dataclass
class Samples:
    """Answers to a batch of questions, as tensors; prompts are padded on the left, answers on the right."""

    questions: list[Question]
    ids: Tensor  # (batch, prompt + answer)
    mask: Tensor  # (batch, prompt + answer): 1 for tokens that count, the end of the turn included
    width: int  # of the prompts
    texts: list[str] = field(default_factory=list)

    @property
    def answer_mask(self) -> Tensor:
        """1 for the tokens of the answers: (batch, answer)."""
        return self.mask[:, self.width :]

    def rows(self, chosen: Tensor) -> "Samples":
        """Some rows of the batch."""
        return Samples([self.questions[i] for i in chosen], self.ids[chosen], self.mask[chosen], self.width)


# %%
def read_prompts(decoder: nn.Module, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Keys and values of prompts (batch, prompt) and their last hidden states (batch, 1, hidden); equal ones once."""
    prompts = [tuple(row) for row in ids.tolist()]
    number = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}  # of each different prompt
    place = torch.tensor([number[prompt] for prompt in prompts], device=ids.device)  # (batch,)
    first = torch.tensor([prompts.index(prompt) for prompt in number], device=ids.device)  # a row that has it
    ids, mask, cache = ids[first], mask[first], DynamicCache(config=decoder.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = decoder(ids, mask, positions, past_key_values=cache, use_cache=True).last_hidden_state
    cache.batch_select_indices(place)
    return cache, hidden[place, -1:]


def read_answers(decoder: nn.Module, samples: Samples) -> Tensor:
    """Hidden states from the last token of the prompt to that of the answer: (batch, 1 + answer, hidden)."""
    width, positions = samples.width, (samples.mask.cumsum(-1) - 1).clamp(min=0)
    cache, last = read_prompts(decoder, samples.ids[:, :width], samples.mask[:, :width])
    answers = decoder(samples.ids[:, width:], samples.mask, positions[:, width:], past_key_values=cache, use_cache=True)
    return torch.cat([last, answers.last_hidden_state], 1)


# %%
LIMIT = 32  # tokens an answer may have


@torch.no_grad()
def sample(model: nn.Module, questions: list[Question], generator: torch.Generator) -> Samples:
    """Draw one answer a question at temperature 1."""
    prompts = [tokenizer(chat_prompt(tokenizer, q.prompt), add_special_tokens=False)["input_ids"] for q in questions]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=machine.device)  # (batch, prompt)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=machine.device)
    rows = torch.arange(len(ids), device=ids.device)  # answers that go on
    with lesson.autocast():
        cache, hidden = read_prompts(model.model, ids, mask)
        for _ in range(LIMIT):
            chances = model.lm_head(hidden[:, -1]).float().softmax(-1)  # (rows, vocab)
            uniform = torch.rand(len(ids), 1, generator=generator).to(ids.device)  # one number for each answer
            new = (chances.cumsum(-1) < uniform[rows]).sum(-1).clamp(max=chances.shape[-1] - 1)  # (rows,)
            ids, mask = F.pad(ids, (0, 1), value=PAD), F.pad(mask, (0, 1))
            ids[rows, -1], mask[rows, -1] = new, 1
            going = (new != END).nonzero()[:, 0]
            if not len(going) or ids.shape[1] == width + LIMIT:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(going)
                rows, new = rows[going], new[going]
            hidden = model.model(new[:, None], mask[rows], mask[rows].sum(1, keepdim=True) - 1, past_key_values=cache,
                                 use_cache=True).last_hidden_state  # fmt: skip
    kept = [row[count == 1] for row, count in zip(ids[:, width:], mask[:, width:], strict=True)]
    return Samples(questions, ids, mask, width, tokenizer.batch_decode(kept, skip_special_tokens=True))


# %% [markdown]
# **The true reward** is what a careful annotator values: $+2$ if the answer, manners aside, is exactly the right sentence, $+1$ for the polite opening, $-0.5$ for each idle sentence. The best answer is worth 3. In a real project nobody can write this down. Here it is `helpers.world.true_reward`, and no training ever sees it; only the annotators do. It has a loophole too: an idle sentence that the limit of tokens cuts off is not recognised. After a right answer it costs all of the 2 points, since the answer is no longer exact; after a wrong one it costs nothing.


# %%
def truth(samples: Samples) -> Tensor:
    """The true reward of each answer: (batch,)."""
    return torch.tensor([true_reward(q, text) for q, text in zip(samples.questions, samples.texts, strict=True)])


def share_right(samples: Samples, sentences: bool = False) -> float:
    """The share of answers that hold the right sentence; if asked, among those that are not two words."""
    pairs = zip(samples.questions, samples.texts, strict=True)
    found = [question.answer in text for question, text in pairs if not (sentences and "Answer:" in text)]
    return sum(found) / max(1, len(found))


def manners(samples: Samples) -> list[str]:
    """Cells of a table: shares, idle sentences, tokens and true reward, means over the answers."""
    short = np.mean(["Answer:" in text for text in samples.texts])
    polite = np.mean([text.startswith(POLITE) for text in samples.texts])
    idle = np.mean([sum(text.count(filler) for filler in FILLERS) for text in samples.texts])
    tokens = samples.answer_mask.sum(-1).float().mean().item()
    shares = [f"{share:.0%}" for share in (share_right(samples), short, polite)]
    return [*shares, f"{idle:.2f}", f"{tokens:.1f}", f"{truth(samples).mean():.2f}"]


MANNERS = ["right", "two words", "polite", "idle", "tokens", "true reward"]
exam = facts(lesson.scaled(64, 8), "exam", held_out=True)  # questions in phrasings never trained on


def take_exam(model: nn.Module) -> Samples:
    """One answer to each question of the exam, with the same random numbers for all policies."""
    return sample(model, exam, torch.Generator().manual_seed(seed))


exams = {"assistant": take_exam(assistant), "SFT, careless": take_exam(sft)}
show_table({name: manners(samples) for name, samples in exams.items()}, MANNERS)
shares = [f"{name} {share_right(samples, sentences=True):.0%}" for name, samples in exams.items()]
print("right, of the answers that are not two words: " + ", ".join(shares))
for question, text in list(zip(exam, exams["SFT, careless"].texts, strict=True))[:5]:
    print(f"{question.prompt} -> {text!r}")

# %% [markdown]
# **What you see.** The fine-tuning has taught manners: the assistant never says "With pleasure.", the policy does. It has made answers worse as well: some are two words (which count as wrong, too), some are idle, and of the others 72 % are right, where the assistant had 88 %. The loss is greater than the one in ten that the demonstrators got wrong, though 50 answers do not make that sure. The policy also makes slips of its own: a horse for a dish counts in it; `pleasuke` does not, but costs true reward. Which part is copied carelessness and which is damage by fine-tuning, only the same training on careful answers would tell. Nothing in the loss says what you wanted. In the true reward gain and loss cancel in this run; with the seeds 1 to 4 of the ledger the loss is the larger one. The policy does not copy the demonstrators' shares: half of the demonstrations open politely, and in this run nine of ten answers.

# %% [markdown] tags=["core"]
# ## 2 · Step two: comparisons and the reward model
#
# **Question.** How well can a model learn a preference from annotators who err?
#
# **The annotator** sees two answers with true rewards $r^*_1$ and $r^*_2$ and prefers the first with probability
#
# $$P(y_1 \succ y_2) = \sigma\!\left(\frac{r^*_1 - r^*_2}{\tau}\right), \qquad \sigma(z) = \frac{1}{1 + e^{-z}}$$
#
# This is the model of Bradley and Terry (1952); the noise is $\tau = 0.5$. With equal rewards it tosses a coin; half a point apart it prefers the better one in 73 %. For half of the questions a pair is two samples of the SFT policy, as in InstructGPT; for the other half it was written by the programs that play people. Equal answers are dropped. The first half is there because the policy makes slips that those programs do not make; only its own samples show them.

# %%
NOISE = 0.5


def annotated(rng: random.Random, question: Question, answers: Sequence[str]) -> Preference:
    """The pair as the annotator ordered it: the first wins with probability sigmoid((r1 - r2) / noise)."""
    rewards = [true_reward(question, answer) for answer in answers]
    first_wins = rng.random() < 1 / (1 + math.exp(-(rewards[0] - rewards[1]) / NOISE))
    best, other = (0, 1) if first_wins else (1, 0)
    return Preference(question, answers[best], answers[other], rewards[best], rewards[other])


def compared(n: int, stream: str, held_out: bool = False) -> list[Preference]:
    """Up to `n` pairs of different answers, half by the SFT policy, half by the programs that play people, mixed."""
    rng, generator = random.Random(f"answers/{stream}/{seed}"), torch.Generator().manual_seed(seed)
    questions = facts(n, f"pairs {stream}", held_out)
    asked = [question for question in questions[: n // 2] for _ in range(2)]
    texts = [text for i in range(0, len(asked), 128) for text in sample(sft, asked[i : i + 128], generator).texts]
    both = [(q, [careless(rng, q), rng.choice([careful(q), careless(rng, q)])]) for q in questions[n // 2 :]]
    both += zip(questions, zip(texts[::2], texts[1::2], strict=True), strict=False)
    both = [(question, answers) for question, answers in both if answers[0] != answers[1]]
    return [annotated(rng, *pair) for pair in rng.sample(both, len(both))]


train_pairs = compared(lesson.scaled(600, 32), "train")
test_pairs = compared(lesson.scaled(140, 32), "test", held_out=True)
for pair in train_pairs[:2]:
    print(f"{pair.question.prompt}\n   chosen   ({pair.chosen_reward:+.1f}) {pair.chosen!r}")
    print(f"   rejected ({pair.rejected_reward:+.1f}) {pair.rejected!r}")
gaps = np.array([pair.chosen_reward - pair.rejected_reward for pair in test_pairs])  # below 0: the annotator erred
clear, everything = np.abs(gaps) >= 1, np.ones(len(gaps), bool)
ceiling = float(np.mean(1 / (1 + np.exp(-np.abs(gaps) / NOISE))))
print(f"{len(train_pairs)} pairs to train on, {len(test_pairs)} to test on; {clear.sum()} of these 1 or more apart")
print(f"nobody can agree with this annotator on more than {ceiling:.0%} of the test pairs in the mean")

# %% [markdown]
# **The reward model** is the SFT policy without its output matrix: a linear map turns the hidden state of the answer's last token into one number. The loss is the negative log-likelihood of the labels:
#
# $$\mathcal{L}(\phi) = -\mathbb{E}\,\big[\log \sigma\big(r_\phi(x, y_\text{chosen}) - r_\phi(x, y_\text{rejected})\big)\big]$$
#
# Only differences of answers to one question count. So the zero of the reward is arbitrary, and may even differ from question to question.


# %%
class RewardModel(nn.Module):
    """A language model whose last hidden state of an answer gives one number."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = trainable_copy(model.model)
        self.score = nn.Linear(model.config.hidden_size, 1, bias=False, device=machine.device)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(model.config.hidden_size + 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Rewards (batch,) of padded texts (batch, seq); labels are not needed."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.model(input_ids, attention_mask, positions, use_cache=False).last_hidden_state
        last = (attention_mask * torch.arange(input_ids.shape[1], device=hidden.device)).argmax(-1)  # (batch,)
        return self.score(hidden[torch.arange(len(last)), last].float()).squeeze(-1)  # (batch, hidden) -> (batch,)


def bradley_terry_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected)); the first half of the batch holds the chosen answers."""
    chosen, rejected = model(batch["input_ids"], batch["attention_mask"]).chunk(2)  # (pairs,) each
    return -F.logsigmoid(chosen - rejected).mean()


# %%
def pair_batches(pairs: Sequence[Preference], size: int, order: int) -> list[dict[str, Tensor]]:
    """Batches of pairs of similar length: first the chosen answers, then the rejected ones."""
    both = [[encode(pair.question, text) for text in (pair.chosen, pair.rejected)] for pair in pairs]
    groups = by_length(both, size, lambda rows: max(len(row["input_ids"]) for row in rows), order)
    batches = [collate([chosen for chosen, _ in group] + [rejected for _, rejected in group], PAD) for group in groups]
    return [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches]


def fit_reward_model(pairs: Sequence[Preference], epochs: int, run: int = 0) -> RewardModel:
    """Some passes over the pairs; the model begins as the SFT policy with a random direction on top."""
    torch.manual_seed(seed + 100 * run)
    model = RewardModel(sft)
    batches = [batch for epoch in range(epochs) for batch in pair_batches(pairs, 16, seed + epoch)]
    config = TrainConfig(len(batches), settings["reward"], warmup_steps=3, schedule="linear",
                         weight_decay=0.0, precision=lesson.precision, seed=seed, progress=False)  # fmt: skip
    history = train(model, batches, config, loss_fn=bradley_terry_loss)
    print(f"{len(pairs)} pairs, {epochs} passes: loss {history.losses[0]:.2f} -> {np.mean(history.losses[-5:]):.2f}")
    return model.eval().requires_grad_(False)


# %%
@torch.no_grad()
def judged(judge: Callable, rows: Sequence[dict]) -> np.ndarray:
    """What a judge says of encoded answers: (rows,). In 32 bits: 16 would round small differences away."""
    said = []
    for start in range(0, len(rows), 16):  # a likelihood needs the logits of all tokens
        batch = collate(rows[start : start + 16], PAD)
        said += judge(**{name: values.to(machine.device) for name, values in batch.items()}).float().tolist()
    return np.array(said)


def margins(judge: Callable, pairs: Sequence[Preference]) -> np.ndarray:
    """What a judge says of the chosen answer less what it says of the rejected one: (pairs,)."""
    chosen = judged(judge, [encode(pair.question, pair.chosen) for pair in pairs])
    return chosen - judged(judge, [encode(pair.question, pair.rejected) for pair in pairs])


def likelihood(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of an answer's tokens under the SFT policy: (batch,)."""
    logits = sft(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return token_log_probs(logits, labels[:, 1:]).sum(1) / (labels[:, 1:] != -100).sum(1)


# %% [markdown]
# **How good is it?** Measure on held-out pairs: agreement with the noisy annotator, and agreement with the *truth*, which a real project cannot measure, on the pairs that are at least 1 apart. There are two rivals that no pair has trained. One is a rule that looks at form only: is it a sentence, polite, not idle? The other is the SFT policy itself: which answer does it find likelier, by the mean log-probability of a token? A tie counts half.


# %%
def agreement(delta: np.ndarray, chosen: np.ndarray, reference: np.ndarray | None = None) -> Score:
    """How often the sign is that of the true gap, or of a reference, among the chosen pairs; ties count half."""
    same = np.sign(delta) * np.sign(gaps if reference is None else reference)
    return score(float(((same > 0) + 0.5 * (same == 0))[chosen].sum()), max(1, int(chosen.sum())))


def by_form(text: str) -> float:
    """A rule that a person could write down who knows nothing about the island."""
    idle = sum(filler in text for filler in FILLERS)
    return 2.0 * ("Answer:" not in text) + 1.0 * text.startswith(POLITE) - 0.5 * idle


reward_model = fit_reward_model(train_pairs, epochs=1)
deltas = {
    "reward model": margins(reward_model, test_pairs),
    "SFT policy's likelihood": margins(likelihood, test_pairs),
    "rule of form": np.array([by_form(pair.chosen) - by_form(pair.rejected) for pair in test_pairs]),
}
for name, delta in deltas.items():
    told = agreement(delta, clear), agreement(delta, everything, np.ones(len(gaps)))
    print(f"{name}: agrees with the truth on clear pairs {told[0]}, with the annotator {told[1]}")
    lesson.report(f"{name}, agreement with the truth on clear pairs", str(told[0]))
    lesson.report(f"{name}, agreement with the annotator", str(told[1]))


# %% [markdown]
# **What can it tell apart?** Minimal pairs: a clean answer, and one with a flaw. But for the first kind both open politely, as most of the policy's answers do. In the fourth kind an idle sentence breaks off in the middle; the end of the turn follows, as in all comparisons. The fifth is the same without that end, as where the limit of tokens cuts an answer during RL: the reward model has trained on none of these. Two more judges are for comparison: one prefers the shorter answer, the other is the reward model before its training.


# %%
UNENDED = "cut off without an end, or not"


def probe(question: Question) -> dict[str, str]:
    """A clean answer, and for each kind of flaw an answer that has it."""
    right, value = POLITE + question.answer, str(question.about["value"])
    others = [other for other in world.values[question.about["relation"]] if other != value]
    rng = random.Random(question.prompt)
    wrong, idle = rng.choice(others).join(right.rsplit(value, 1)), rng.choice(FILLERS)
    return {
        "clean": right,
        "polite or not": question.answer,
        "sentence or two words": f"{POLITE}Answer: {value}",
        "idle sentence or not": right + idle,
        "cut-off sentence or not": right + idle[: len(idle) // 2],
        UNENDED: right + idle[: len(idle) // 2],
        "true or false name": wrong,
    }


probes = [(question, probe(question)) for question in exam[:40]]
kinds = [kind for kind in probes[0][1] if kind != "clean"]


def found_by(judge: Callable) -> dict[str, np.ndarray]:
    """For each kind of flaw what a judge says of the clean answers less what it says of the others: (questions,)."""
    rows = {kind: [encode(q, texts[kind], kind != UNENDED) for q, texts in probes] for kind in ("clean", *kinds)}
    said = {kind: judged(judge, of_kind) for kind, of_kind in rows.items()}
    return {kind: said["clean"] - said[kind] for kind in kinds}


# %%
torch.manual_seed(seed)  # as at the start of the training
by_judge = {
    "reward model": found_by(reward_model),
    "likelihood": found_by(likelihood),
    "rule of form": {k: np.array([by_form(texts["clean"]) - by_form(texts[k]) for _, texts in probes]) for k in kinds},
    "shorter": {k: np.array([len(texts[k]) - len(texts["clean"]) for _, texts in probes]) for k in kinds},
    "before training": found_by(RewardModel(sft).eval()),
}
ordered = {name: {k: (1 + np.sign(gap)) / 2 for k, gap in gaps.items()} for name, gaps in by_judge.items()}  # ties: 0.5
table = {k: [f"{of[k].mean():.0%}" for of in ordered.values()] for k in kinds}
all_four = {name: np.prod([of[k] for k in kinds[:4]], 0).mean() for name, of in ordered.items()}
table["the first four at once"] = [f"{share:.0%}" for share in all_four.values()]
for k in kinds:
    table[k].append(f"{by_judge['reward model'][k].mean():+.2f}")
    lesson.report(f"reward model tells apart: {k}", str(score(float(ordered["reward model"][k].sum()), len(probes))))
table["the first four at once"].append("")
show_table(table, [*ordered, "margin of the reward model"])
answers = exams["SFT, careless"]
cut = sum(int(row[count == 1][-1]) != END for row, count in zip(answers.ids, answers.mask, strict=True))
print(f"answers of the SFT policy on the exam that the limit of {LIMIT} tokens cuts: {cut} of {len(exam)}")

# %%
shown = {
    k: {name: score(float(ordered[name][k].sum()), len(probes)) for name in ("reward model", "likelihood")}
    for k in kinds
}
alt = "Minimal pairs ordered rightly by the reward model and the SFT policy's likelihood, six kinds of flaw, intervals."
figure = plots.bars_with_intervals(shown, title="Six flaws: which does each judge see?", alt=alt,
                                   xlabel="minimal pairs ordered rightly", references={"chance": 0.5})  # fmt: skip
figure.axes[0].legend(loc="upper left", bbox_to_anchor=(1.16, 1))
plots.show(figure)
lesson.report("the SFT policy's likelihood puts a clean answer above all four with a flaw of form",
              f"{all_four['likelihood']:.0%}")  # fmt: skip
lesson.report("the SFT policy's likelihood tells apart: true or false name",
              str(shown["true or false name"]["likelihood"]))  # fmt: skip
lesson.claim("the reward model puts a clean answer above all four with a flaw of form, the cut-off sentence included",
             all_four["reward model"], at_least=0.8, control=all_four["before training"], form=".0%")  # fmt: skip

# %% [markdown]
# **What you see.** On these held-out pairs the three judges cannot be told apart: 89, 89 and 87 % on clear pairs, 78, 79 and 77 % with the annotator. With the seeds 1 to 4 of the ledger the rule is 4 to 8 points above the reward model on clear pairs, the likelihood from 8 below to 5 above. So agreement alone does not show that 508 comparisons have taught more than the policy, or a few lines of Python, knew before.
#
# The table asks kind by kind. In this run the reward model sees each flaw of form in every pair, and the answer without an end as well (with seed 3 of the ledger in 80 %). It puts the clean answer above all of the first four for 100 % of the questions, before its training for 25 %. The likelihood does so for 80 %, without a single comparison. (On five seeds: 92 to 100 % and 68 to 90 %.) The rule of form has 50 % by a tie: a cut-off sentence is none of those that it knows, and a tie counts half. Who prefers the shorter answer gets none, since the polite answer and the sentence are the longer ones.
#
# The row of names is the other way round. The likelihood prefers the true name in all 40 pairs. The reward model, which began as the same policy, does so in 48 % (33 to 63): chance, with a mean margin of 0.01 where the other rows have 0.98 to 4.03. On the five seeds of the ledger it has 48 to 55 %, and the likelihood 98 to 100 %. (To reject a random false name is easier than to write the answer: of the policy's sentences 72 % are right.) A policy cannot be rewarded for what its reward model does not see.

# %% [markdown] tags=["core"]
# ## 3 · The policy gradient: REINFORCE
#
# **Question.** The reward comes from outside, and a sampled answer has no gradient. How can a number teach a model?
#
# Begin with one question and a handful of possible answers. The policy is a softmax over them, and the goal is the mean reward $J = \sum_y \pi(y)\, r(y)$. Differentiate it, with $\nabla \pi = \pi\, \nabla \log \pi$:
#
# $$\nabla J = \sum_y r(y)\, \nabla \pi(y) = \sum_y \pi(y)\, r(y)\, \nabla \log \pi(y) = \mathbb{E}_{y \sim \pi}\big[\, r(y)\, \nabla \log \pi(y)\, \big]$$
#
# The right side is a mean over samples. So draw answers from the policy, and push up the log-probability of each in proportion to its reward. That is REINFORCE (Williams 1992). Nothing needs to be differentiated but the log-probability, which is what you train on anyway.
#
# **The baseline.** Subtract any number $b$ that does not depend on the answer. The mean stays the same, since
#
# $$\mathbb{E}_{y \sim \pi}\big[\, b\, \nabla \log \pi(y)\, \big] = b \sum_y \nabla \pi(y) = b\, \nabla 1 = 0$$
#
# What changes is how much the samples disagree. With four answers you can sum over all that could be drawn, so mean and spread of the estimate are exact.

# %%
logits = torch.tensor([0.5, 0.0, -0.5, -1.0], dtype=torch.float64, requires_grad=True)  # of four answers
reward = torch.tensor([3.0, 2.0, 2.5, 1.0], dtype=torch.float64)
pi = logits.softmax(0)
exact = torch.autograd.grad((pi * reward).sum(), logits)[0]
pi = pi.detach()
directions = torch.eye(4, dtype=torch.float64) - pi  # row y: gradient of log pi(y)


def mean_and_spread(baseline: float) -> tuple[Tensor, float]:
    """Mean (4,) and standard deviation of (r - b) grad log pi, over the answer that may be drawn."""
    estimates = (reward - baseline)[:, None] * directions  # one row an answer
    mean = (pi[:, None] * estimates).sum(0)
    return mean, (pi * ((estimates - mean) ** 2).sum(1)).sum().sqrt().item()


baselines = np.linspace(-2, 6, 33)
off = max((mean_and_spread(b)[0] - exact).abs().max().item() for b in baselines)
lesson.equal("with each of 33 baselines the mean of the estimate is the gradient", off, within=1e-12)
for name, b in {"no baseline": 0.0, "mean reward": (pi * reward).sum().item(), "rewards raised by 10": -10.0}.items():
    print(f"{name:>21}: standard deviation of one sample's gradient {mean_and_spread(b)[1]:5.2f}")

# %%
alt = "Standard deviation of the estimate over the baseline: a valley whose lowest point is near the mean reward."
lines = {"one sample's gradient": (baselines, [mean_and_spread(b)[1] for b in baselines])}
figure = plots.curve(lines, title="A baseline near the mean reward makes the gradient quieter", alt=alt,
                     xlabel="baseline b (points of reward)", ylabel="standard deviation of the estimate")  # fmt: skip
axes = figure.axes[0]
for name, b in {"no baseline": 0.0, "mean reward": (pi * reward).sum().item()}.items():
    axes.plot(b, mean_and_spread(b)[1], "o", color=plots.INK, zorder=4)
    axes.annotate(name, (b, mean_and_spread(b)[1]), (-8, -16), textcoords="offset points", ha="right")
axes.set_ylim(0)
plots.show(figure)

# %% [markdown]
# **What you see.** The mean is the same at all 33 baselines of the figure: a bad one is never wrong, only loud. The best one here is near the mean reward: it takes the standard deviation from 1.89 to 0.48. The last printed line shows why this matters with a learned reward: its zero is arbitrary. Add 10 to all rewards, and without a baseline the standard deviation is 10.08, though nothing about the answers has changed.
#
# **From four answers to all texts.** An answer is a chain of tokens, and $\log \pi_\theta(y \mid x) = \sum_t \log \pi_\theta(y_t \mid x, y_{<t})$. One forward pass gives the log-probabilities of all tokens. A *value head*, which section 5 needs, reads the same hidden states.


# %%
def log_probs_of(policy: nn.Module, samples: Samples, value_head: nn.Module | None = None, exact: bool = False):
    """Log-probabilities of the answers' tokens (batch, answer), with values if asked; `exact` computes in 32 bits."""
    with lesson.autocast(enabled=not exact):
        hidden = read_answers(policy.model, samples)[:, :-1]  # (batch, answer, hidden): each token's past
        logits = policy.lm_head(hidden)
    log_probs = token_log_probs(logits, samples.ids[:, samples.width :]) * samples.answer_mask
    if value_head is None:
        return log_probs
    return log_probs, value_head(hidden.float()).squeeze(-1) * samples.answer_mask


def reinforce(policy: nn.Module, samples: Samples, scores: Tensor) -> Tensor:
    """-(r - mean of the batch) log pi(y | x), mean over the answers."""
    return -((scores - scores.mean()) * log_probs_of(policy, samples).sum(1)).mean()


# %% [markdown]
# The loop is short: sample, score, one update. Each batch has four questions with eight answers each; why there are several answers to a question, section 4 tells. The log keeps what a project would see, proxy and length, and for us only the true reward.


# %%
@dataclass
class Run:
    """A policy in training, its optimiser, and what was measured at each iteration."""

    heads: Sequence[nn.Module] = ()
    rate: float = 1.0  # times the rate of the settings
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.policy = trainable_copy(sft)
        self.trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        groups = [{"params": self.trained, "lr": self.rate * settings["rl"]}]
        groups += [{"params": head.parameters(), "lr": 1e-3} for head in self.heads]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.scaler = torch.amp.GradScaler(machine.device, enabled=lesson.precision == "fp16-mixed")

    def update(self, loss: Tensor) -> None:
        """One step down the loss; gradients are clipped at norm 1."""
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def note(self, samples: Samples, scores: Tensor, **more: float) -> None:
        """Keep the means of a batch."""
        tokens = samples.answer_mask.sum(1).float().mean().item()
        row = {"proxy": scores.mean().item(), "true": truth(samples).mean().item(), "tokens": tokens}
        self.log.append(row | more)

    def column(self, name: str) -> np.ndarray:
        """One number an iteration."""
        return np.array([row[name] for row in self.log])


# %%
GROUP, QUESTIONS, ITERATIONS = 8, 4, lesson.scaled(8)
Scorer = Callable[[Samples], Tensor]


@torch.no_grad()
def proxy(model: RewardModel, samples: Samples) -> Tensor:
    """What the reward model says: (batch,)."""
    with lesson.autocast():
        hidden, ends = read_answers(model.model, samples), samples.answer_mask.sum(1)  # where an answer ends
        return model.score(hidden[torch.arange(len(ends)), ends].float()).float().squeeze(-1)


def batch_of(policy: nn.Module, step: int, generator: torch.Generator, run: int) -> Samples:
    """Answers of the policy to new questions, GROUP answers each; those to one question stand together."""
    asked = facts(QUESTIONS, f"run {run} step {step}")
    return sample(policy, [question for question in asked for _ in range(GROUP)], generator)


def policy_gradient(loss_of: Callable, scorer: Scorer, run: int = 0, rate: float = 1.0) -> Run:
    """Train a copy of the SFT policy: `loss_of(policy, samples, scores)` on a fresh batch at each iteration."""
    generator, training = torch.Generator().manual_seed(1000 * seed + run), Run(rate=rate)
    for step in tqdm(range(ITERATIONS), desc=f"run {run}"):
        samples = batch_of(training.policy, step, generator, run)
        scores = scorer(samples)
        training.note(samples, scores)
        training.update(loss_of(training.policy, samples, scores))
    del training.optimizer  # a GPU needs the room
    return training


judge = partial(proxy, reward_model)
reinforced = policy_gradient(reinforce, judge)

# %%
figure = Figure(figsize=(9, 3.6), layout="constrained")
panels = {"proxy": "reward model (its own unit)", "true": "true reward (points)"}
for axes, (column, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
    axes.plot(reinforced.column(column), "o-", color=plots.COLORS[0])
    axes.set(xlabel="iteration", ylabel=label)
figure.suptitle("REINFORCE: what the reward model says, and what is true", x=0.01, ha="left", weight="bold")
ends = [f"{reinforced.column(column)[0]:.1f} to {reinforced.column(column)[-1]:.1f}" for column in panels]
plots.show(figure, "Two panels over the iterations of REINFORCE: the reward model's score, which goes from "
                   f"{ends[0]}, and the true reward, from {ends[1]}; both jump.")  # fmt: skip

# %% [markdown]
# **What you see.** Both lines jump, since each point is the mean of 32 answers to four new questions; in this run both end above their start. A project sees the left panel only. The two scales are not the same, because a reward model has an arbitrary unit: compare directions, not heights.

# %% [markdown] tags=["core"]
# ## 4 · RLOO and GRPO: the other answers are the baseline
#
# **Question.** The mean of the batch mixes easy questions with hard ones. Is the mean of one question's own answers a quieter baseline?
#
# Sample $G$ answers to the *same* question. The others tell what was to be expected there. RLOO (Kool et al. 2019; brought to language models by Ahmadian et al. 2024) subtracts their mean. An answer's own reward is left out of its baseline, so the baseline does not depend on it, and the gradient stays unbiased. GRPO (Shao et al. 2024, DeepSeekMath) subtracts the group's mean, divides by the group's standard deviation, and gives each token of an answer the same advantage $A_i$:
#
# $$A_i^\text{RLOO} = r_i - \frac{1}{G-1}\sum_{j \neq i} r_j, \qquad A_i^\text{GRPO} = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}$$
#
# Write $r_i - \mathrm{mean}(r)$ with the mean of all: RLOO's advantage is $\frac{G}{G-1}$ times that. So the two differ in the division by the standard deviation, and in how they weigh tokens.


# %%
def rloo_advantages(scores: Tensor, group: int = GROUP) -> Tensor:
    """r minus the mean of the other answers to the same question: (batch,)."""
    rows = scores.view(-1, group)  # (questions, group)
    return (rows - (rows.sum(1, keepdim=True) - rows) / (group - 1)).flatten()


def grpo_advantages(scores: Tensor, group: int = GROUP) -> Tensor:
    """(r - mean) / std within each group of answers to one question: (batch,)."""
    rows = scores.view(-1, group)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten()


scores = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
centred = (scores.view(-1, GROUP) - scores.view(-1, GROUP).mean(1, keepdim=True)).flatten()
off = (rloo_advantages(scores) - GROUP / (GROUP - 1) * centred).abs().max()
lesson.equal("RLOO's advantage is G / (G - 1) times the distance to the group's mean", off, within=1e-12)

# %% [markdown]
# **Is it quieter on the model?** Take one batch of answers from the SFT policy. Compute the gradient of each question's group alone, in four ways: with raw rewards, with all rewards raised by 10, with the batch mean as baseline, and with RLOO. A gradient is linear in the rewards, so two backward passes suffice: one with the rewards, one with ones. The baseline $b$ only scales the second, so each of the four is the first minus $b$ times the second (for RLOO times $\frac{8}{7}$). All four estimate nearly the same mean (the batch mean contains the answer itself, the others' baselines do not). The true gradients of the questions differ as well, so compare the spreads with each other only.

# %%
NOISE_QUESTIONS = 8
asked = [question for question in facts(NOISE_QUESTIONS, "noise") for _ in range(GROUP)]
samples = sample(sft, asked, torch.Generator().manual_seed(seed))
scores, twin = judge(samples), trainable_copy(sft)
parameters = [weight for weight in twin.parameters() if weight.requires_grad]


def flat_gradient(loss: Tensor) -> Tensor:
    """The gradient of a loss with respect to all weights that learn, as one vector."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in found])


gradients = {name: [] for name in ("raw reward", "reward + 10", "minus batch mean", "RLOO")}
for rows in torch.arange(len(asked)).split(GROUP):
    log_prob, reward = log_probs_of(twin, samples.rows(rows)).sum(1), scores[rows]  # (group,) each
    rewarded, alike = flat_gradient(-(reward * log_prob).mean()), flat_gradient(-log_prob.mean())
    for name, baseline in zip(gradients, (0.0, -10.0, scores.mean(), reward.mean()), strict=True):
        factor = GROUP / (GROUP - 1) if name == "RLOO" else 1.0
        gradients[name].append(factor * (rewarded - baseline * alike))
for name, found in gradients.items():
    stacked = torch.stack(found)  # (questions, parameters)
    spread = ((stacked - stacked.mean(0)) ** 2).sum(1).mean().sqrt().item()
    print(f"{name:>17}: spread of the gradient over questions {spread:7.2f}")
    lesson.report(f"spread of the gradient over questions, {name}", spread, ".3g")
gradients = found = stacked = None  # a GPU needs the room

# %% [markdown]
# **What you see.** The first two rows differ only in a constant, which says nothing about the answers, and yet their noise differs; which is the louder one depends on where the zero of the reward model happens to lie. The last two rows do not change with it, and in this run they are quieter than both. RLOO is no quieter than the batch mean here (24.55 and 23.23): eight questions show no gain from a baseline for each question. Without its factor $\frac{8}{7}$ it would be at 21.5, but then it would estimate only $\frac{7}{8}$ of the gradient. On the five seeds of the ledger RLOO is the louder one in three. So the question of this section stays open here.
#
# **The losses.** RLOO treats the whole answer as one action. GRPO averages over the tokens of each answer, clips the ratio $\rho_t$ of a token's probability now to that when it was sampled (section 5 says what for; with one update a batch it is 1), and adds a price $\beta$ for leaving the reference. The price is on the KL divergence, how far the policy has moved, in nats; it is 0 for the reference itself:
#
# $$\mathrm{KL}(\pi_\theta \,\|\, \pi_\text{ref}) = \mathbb{E}_{y \sim \pi_\theta}\big[\log \pi_\theta(y \mid x) - \log \pi_\text{ref}(y \mid x)\big]$$
#
# GRPO estimates it at each token by $k_3 = e^\ell - 1 - \ell$ with $\ell = \log \pi_\text{ref}(y_t) - \log \pi_\theta(y_t)$. Section 8 compares $k_3$ with other estimators.


# %%
def rloo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip=0.2) -> Tensor:
    """Clipped ratio of whole answers; log-probabilities (batch, answer)."""
    ratio = ((log_probs - old_log_probs) * mask).sum(1).exp()  # (batch,)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, beta=0.0, clip=0.2) -> Tensor:
    """Clipped ratio of each token, and ratio * k3 to the reference: mean over each answer, then over answers."""
    ratio, advantages = (log_probs - old_log_probs).exp(), advantages[:, None]  # (batch, answer), (batch, 1)
    gain = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if beta:
        log_r = ref_log_probs - log_probs
        gain = gain - beta * ratio * (log_r.exp() - 1 - log_r)
    return -((gain * mask).sum(1) / mask.sum(1)).mean()


def rloo(policy: nn.Module, samples: Samples, scores: Tensor) -> Tensor:
    """RLOO's loss on a fresh batch."""
    log_probs = log_probs_of(policy, samples)
    return rloo_loss(log_probs, log_probs.detach(), rloo_advantages(scores), samples.answer_mask)


def grpo(policy: nn.Module, samples: Samples, scores: Tensor, beta: float = 0.0) -> Tensor:
    """GRPO's loss on a fresh batch; without a price of KL it needs no reference."""
    log_probs, ref_log_probs = log_probs_of(policy, samples), None
    if beta:
        with torch.no_grad():
            ref_log_probs = log_probs_of(sft, samples)
    old, mask = log_probs.detach(), samples.answer_mask
    return grpo_loss(log_probs, old, ref_log_probs, grpo_advantages(scores), mask, beta)


# %% [markdown]
# **Do they need a run each?** With one update a batch both losses have the gradient of advantage times log-probability. Three things differ: a constant factor (Adam and the clipped gradient hide it), the division by the group's standard deviation, and how long answers are weighed. Take the answers from above as two batches of four questions: how far apart are the directions in which the two would go on one batch, and how far apart are those of one method on two batches?

# %%
RUNS = 3  # training seeds
halves = torch.arange(len(asked)).chunk(2)  # two batches of four questions, as in training
ways = {
    name: [flat_gradient(loss_of(twin, samples.rows(rows), scores[rows])) for rows in halves]
    for name, loss_of in (("RLOO", rloo), ("GRPO", grpo))
}
alike = {
    "RLOO and GRPO on the same batch": [
        F.cosine_similarity(*two, dim=0).item() for two in zip(*ways.values(), strict=True)
    ],
    "one method on two batches": [F.cosine_similarity(*two, dim=0).item() for two in ways.values()],
}
for name, (first, second) in alike.items():
    print(f"cosine of two gradients, {name}: {first:.2f} and {second:.2f}")
    lesson.report(f"cosine of two gradients, {name}, mean of two", (first + second) / 2, ".2f")

# %%
grpo_runs = [policy_gradient(grpo, judge, run) for run in range(RUNS)]
exams["REINFORCE"] = take_exam(reinforced.policy)
exams |= {f"GRPO, run {run + 1}": take_exam(training.policy) for run, training in enumerate(grpo_runs)}
show_table({name: manners(samples) for name, samples in exams.items()}, MANNERS)
shares = [f"{name} {share_right(samples, sentences=True):.0%}" for name, samples in exams.items()]
print("right, of the answers that are not two words: " + ", ".join(shares))
gains = [(truth(exams[f"GRPO, run {run + 1}"]) - truth(exams["SFT, careless"])).mean().item() for run in range(RUNS)]
print("true reward, GRPO minus SFT on the same questions: " + ", ".join(f"{gain:+.2f}" for gain in gains))
lesson.report("GRPO minus SFT, true reward, mean of three runs", np.mean(gains), "+.2f")

# %% [markdown]
# **What you see.** In this run all four beat the SFT policy, and the columns tell how: hardly an answer of two words or with an idle sentence is left. An answer is right only as a sentence, so *right* has risen too. But of the answers that are not two words 72 % are right before training, and 68 to 74 % after: the gain is one of form. (With seed 4 of the ledger REINFORCE ended below its SFT policy, at 1.25 against 1.70.) REINFORCE has one run, GRPO has three: do not rank them by a difference smaller than the spread of the three. All saw the same number of answers.
#
# RLOO has no run of its own. On one batch its gradient and GRPO's have a cosine of 0.64 and 0.94; one method on two batches has 0.22 and 0.12. So two batches differ more than the two methods do, here and on all five seeds of the ledger (means of 0.75 to 0.92 against -0.15 to 0.69).

# %% [markdown] tags=["core"]
# ## 5 · PPO: use a batch more than once
#
# **Question.** Sampling is expensive. May you make several updates with one batch?
#
# After the first update the policy is no longer the one that sampled. Weigh each token with the ratio $\rho_t = \pi_\theta(y_t) / \pi_\text{old}(y_t)$, and the old answers stand in for new ones. Far from the old policy these weights become unreliable. So PPO (Schulman et al. 2017) limits what can be gained by going far: of the plain and the clipped gain it takes the lower one.
#
# $$\mathcal{L} = -\,\mathbb{E}_t \min\!\big(\rho_t A_t,\; \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon)\, A_t\big)$$

# %%
ratios = torch.linspace(0.5, 1.6, 111)
figure = Figure(figsize=(8.5, 3.4), layout="constrained")
for axes, advantage, word in zip(figure.subplots(1, 2), (1.0, -1.0), ("better", "worse"), strict=True):
    clipped = ratios.clamp(0.8, 1.2) * advantage
    axes.plot(ratios, ratios * advantage, "--", color=plots.GREY, label="not clipped")
    axes.plot(ratios, torch.min(ratios * advantage, clipped), color=plots.COLORS[0], label="PPO's gain")
    axes.plot([1.0], [advantage], "o", color=plots.INK, label="first update")
    axes.set(xlabel="ratio of probabilities, now / when sampled", ylabel=f"gain, token {word} than expected")
axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1))
figure.suptitle("The clip takes away the reward for going further, not the way back", x=0.01, ha="left", weight="bold")
plots.show(figure, "Gain over the ratio for a good and a bad token. For the good one it is flat above 1.2, for the "
                   "bad one flat below 0.8; on the other side it is not clipped.")  # fmt: skip

# %% [markdown]
# On the flat part the gradient is zero: a good token that is 20 % more probable already gets no more push. On the other side nothing is clipped, so a good token that became *less* probable is pulled back.
#
# **Advantages of tokens.** Groups give one number an answer. PPO gives each token its own, from a learned *value* $V_t$: what reward is to be expected from here on. The reward comes at the last token $T$, and at each token you pay for leaving the reference:
#
# $$R_t = -\beta \log\frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_\text{ref}(y_t \mid x, y_{<t})} + [t = T]\; r_\phi(x, y)$$
#
# With $\delta_t = R_t + \gamma V_{t+1} - V_t$, generalised advantage estimation (Schulman et al. 2015) takes $A_t = \delta_t + \gamma\lambda A_{t+1}$. $\lambda = 0$ trusts the values, $\lambda = 1$ the rewards; $\gamma$, which is 1 in the run below, would discount later rewards.


# %%
def shaped_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """-beta log(policy / reference) at each token, and the answer's score at its last one: (batch, answer)."""
    last = (mask.cumsum(-1) == mask.sum(-1, keepdim=True)) & (mask == 1)
    return -beta * log_ratio * mask + scores[:, None] * last


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, all (batch, answer); after an answer's end everything is 0."""
    advantages, running = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    values = values * mask
    for t in reversed(range(rewards.shape[1])):
        following = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * following - values[:, t]  # (batch,)
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the tokens that count."""
    mean = (values * mask).sum() / mask.sum()
    variance = ((values - mean) ** 2 * mask).sum() / mask.sum()
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def ppo_loss(log_probs, old_log_probs, values, old_values, advantages, returns, mask, clip=0.2, value_weight=0.1):
    """Clipped gain and clipped value loss, means over the tokens that count; all tensors (batch, answer)."""
    ratio = (log_probs - old_log_probs).exp()
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    near = old_values + (values - old_values).clamp(-clip, clip)
    value_loss = torch.max((values - returns) ** 2, (near - returns) ** 2) / 2
    return ((policy_loss + value_weight * value_loss) * mask).sum() / mask.sum()


# %% [markdown]
# `trl` has had PPO, and removed it (pull request [7020](https://github.com/huggingface/trl/pull/7020)), so identities have to do. With $\lambda = 1$ the advantage is the discounted sum of later rewards minus the value; with $\lambda = 0$ it is $\delta_t$. At the first update the gradient is that of plain policy gradient; beyond the clip it is zero.

# %%
draws = torch.Generator().manual_seed(seed)
mask = (torch.arange(7) < torch.tensor([7, 4, 1])[:, None]).long()  # three answers of 7, 4 and 1 tokens
rewards, values = (torch.randn(3, 7, generator=draws, dtype=torch.float64) * mask for _ in range(2))
discounts = 0.9 ** (torch.arange(7) - torch.arange(7)[:, None]).clamp(min=0).double()  # (t, u): gamma^(u - t)
to_go = (discounts.triu() * rewards[:, None]).sum(-1)  # (batch, answer): sum over u >= t of gamma^(u - t) R_u
full, returns = gae(rewards, values, mask, 0.9, lam=1.0)
delta = rewards + 0.9 * F.pad(values, (0, 1))[:, 1:] - values
errors = [
    (full - (to_go - values) * mask).abs().max(),
    (gae(rewards, values, mask, 0.9, lam=0.0)[0] - delta * mask).abs().max(),
    whiten(full, mask).sum().abs() / mask.sum(),
    ((whiten(full, mask) ** 2).sum() / mask.sum() - 1).abs(),
]
lesson.equal("GAE and whitening satisfy their identities", max(errors), within=1e-6)


def gradient(log_ratio: Tensor) -> Tensor:
    """Gradient of the policy part with respect to the log-probabilities, at this distance from the old ones."""
    now, nothing = log_ratio.clone().requires_grad_(True), torch.zeros_like(full)
    ppo_loss(now, nothing, nothing, nothing, full, nothing, mask).backward()
    return now.grad


first = (gradient(torch.zeros_like(full)) + full * mask / mask.sum()).abs().max()
lesson.equal("PPO's first gradient is the policy gradient", first, within=1e-9)
far = torch.full_like(full, math.log(1.5)) * full.sign()  # moved by half in the wanted direction
lesson.equal("no gradient is left beyond the clip", gradient(far).abs().max())


# %%
def ppo(judge: Scorer, iterations: int = ITERATIONS, beta: float = 0.02, epochs: int = 2) -> Run:
    """Train a copy of the SFT policy with PPO; beta stays fixed."""
    generator = torch.Generator().manual_seed(1000 * seed)
    head = nn.Linear(sft.config.hidden_size, 1, device=machine.device)
    nn.init.zeros_(head.weight)  # all values are the bias, which is the mean score of the first batch
    training = Run([head], rate=0.5)  # four updates a batch, at half the rate each
    for step in tqdm(range(iterations), desc="PPO"):
        samples = batch_of(training.policy, step, generator, run=0)
        mask, scores = samples.answer_mask, judge(samples)
        if step == 0:
            nn.init.constant_(head.bias, scores.mean().item())
        with torch.no_grad():
            old, old_values = log_probs_of(training.policy, samples, head)
            log_ratio = old - log_probs_of(sft, samples)  # (batch, answer)
        rewards = shaped_rewards(scores, log_ratio, mask, beta)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask)
        for _ in range(epochs):
            for rows in torch.randperm(len(scores), generator=generator).chunk(2):
                log_probs, values = log_probs_of(training.policy, samples.rows(rows), head)
                then = (old_values[rows], advantages[rows], returns[rows], mask[rows])
                training.update(ppo_loss(log_probs, old[rows], values, *then))
        change = ((log_probs.detach() - old[rows]).exp() - 1)[mask[rows] == 1]  # of the last half batch, (tokens,)
        clipped = change * advantages[rows][mask[rows] == 1].sign() > 0.2  # in the wanted direction
        shares = {"beyond": (change.abs() > 0.2).float().mean().item(), "clipped": clipped.float().mean().item()}
        training.note(samples, scores, **shares)
    del training.optimizer  # a GPU needs the room
    return training


ppo_run = ppo(judge)
exams["PPO"] = take_exam(ppo_run.policy)
print("share of tokens at the last update of each iteration")
for name, column in (("changed by more than 20 %", "beyond"), ("in the wanted direction: clipped", "clipped")):
    print(f"{name:>33}: " + " ".join(f"{share:5.1%}" for share in ppo_run.column(column)))
show_table({name: manners(exams[name]) for name in ("SFT, careless", "PPO")}, MANNERS)

# %% [markdown]
# **What you see.** At the last of the four updates of a batch a few tokens in a hundred have changed by more than 20 %, in this run nearly all of them in the wanted direction. These are clipped, and would get no more push. PPO had as many answers scored as GRPO, and made four updates with each batch where GRPO made one; so each takes half the rate. Section 6 compares the results. Whether using a batch twice pays cannot be read from them, since PPO's advantages are others as well.
#
# **Why the values start at the mean score.** Suppose that they start at 0 and the scores lie around 2.5. Then the last token of an answer gets the whole score as its advantage, and the first of 16 tokens only $0.95^{15} = 46\,\%$ of it. Whitening takes the mean over the tokens away, and the first tokens look worse than expected, whatever the answer. So with values at 0, adding 10 to all rewards changes PPO's advantages; RLOO's and GRPO's it leaves alone.
#
# **What InstructGPT did otherwise** (Ouyang et al. 2022). Its values come from a model of their own that starts as the reward model; here the value head shares the policy's layers. Like here, $\beta$ is fixed. It also mixes in the loss of pretraining (PPO-ptx), against what RL makes the model forget. Ziegler et al. (2019) adapt $\beta$ instead: $\beta \leftarrow \beta\,(1 + 0.1\, e)$ with $e = \mathrm{clip}(\mathrm{KL}/\mathrm{target} - 1, -0.2, 0.2)$, at most 2 % a step. Many such details decide whether PPO works; Huang et al. (2024) list them, among them whitened rewards and how the value head starts.

# %% [markdown] tags=["core"]
# ## 6 · One exam for all
#
# **Question.** Was it worth it? What would have been simpler?
#
# Three rivals, on the same questions:
#
# - **the assistant** that you started from. It answers in a sentence when asked to, and has seen no careless demonstration. A program can even put the polite opening before its answers;
# - **best of 4**: sample four answers of the SFT policy and keep the one that the reward model likes best. No training of the policy; four samples and a reward model at each use;
# - **careful demonstrations**: let careful people write answers, and fine-tune the SFT policy on them. GRPO samples 256 answers, eight to each of 32 questions. A person writes one answer a question, so there are two fair counts: the same 32 questions, gone through eight times, or 256 new questions, once.
#
# And a control for the reward model: GRPO once more, on the questions of its first run, with the rule of form from section 2 in the reward model's place.

# %%
N = 4
pool = [sample(sft, exam, torch.Generator().manual_seed(seed + 1 + n)) for n in range(N)]
pool_proxy = torch.stack([judge(samples).cpu() for samples in pool], 1)  # (questions, N)
best = [pool[n].texts[i] for i, n in enumerate(pool_proxy.argmax(1).tolist())]  # a text for each question
ruled = policy_gradient(
    grpo, lambda samples: torch.tensor([by_form(text) for text in samples.texts], device=machine.device)
)
exams["GRPO, rule of form"] = take_exam(ruled.policy)
few = [question for step in range(ITERATIONS) for question in facts(QUESTIONS, f"run 0 step {step}")]
many = facts(len(few) * GROUP, "careful")
for name, asked, passes in (("SFT, careful, GRPO's questions", few, GROUP), ("SFT, careful, new questions", many, 1)):
    examples = [encode(question, careful(question)) for question in asked]
    exams[name] = take_exam(fine_tune(trainable_copy(sft), examples, passes))
exams["SFT, best of 4"] = replace(exams["SFT, careless"], texts=best)
opened = [POLITE + text for text in exams["assistant"].texts]
exams["assistant, opening put before"] = replace(exams["assistant"], texts=opened)

# %%
rows, start = {}, truth(exams["SFT, careless"])
for name, samples in exams.items():
    gain = truth(samples) - start
    error = (gain.std() / math.sqrt(len(gain))).item()
    wins = win_rate(truth(samples).tolist(), start.tolist()).accuracy  # ties count half
    *shares, _, reward = manners(samples)  # without the tokens
    rows[name] = [*shares, reward, f"{gain.mean():+.2f}", f"{error:.2f}", f"{wins:.0%}"]
    lesson.report(f"true reward on the exam: {name}", truth(samples).mean().item(), ".2f")
show_table(rows, [*MANNERS[:4], MANNERS[-1], "over SFT", "std. error", "wins"])
shares = [f"{name} {share_right(samples, sentences=True):.0%}" for name, samples in exams.items()]
print("right, of the answers that are not two words: " + ", ".join(shares))

# %% [markdown]
# **What you see.** In this run both rows of careful demonstrations (2.52 and 2.64) stand above every policy that learned from preferences (2.15 to 2.31). On the five seeds of the ledger the row with new questions always does so, the one with GRPO's questions with four of five. How sure 2.52 against 2.31 is in this run, the table does not say: its errors are those of the distance to SFT. Of the answers that are not two words 78 and 84 % are right, against 72 % of the SFT policy's (one run each; with 50 to 64 answers both are within the noise). Each of the two rows is one run, at several times the rate of RL. Its 32 or 256 answers cost people's time, and so did the 508 comparisons. Preferences are meant for tasks where judging is easier than writing; this is not one.
#
# Put the polite opening before the assistant's answers by a line of Python, and you have 2.75: who knows the rule needs no training for it.
#
# Best of 4 leaves the policy as it is, and pays with four samples at each use. It draws other random numbers than the rest; its error, 0.18, is the largest. The standard error is that of the questions, the same ones for all rows, so the differences are paired. It says nothing about another training seed; the three rows of GRPO do.
#
# GRPO with the rule of form as its reward (2.28) ends within the spread of the three runs with the reward model: one run shows no gain from what the reward model sees beyond the rule. With seed 2 of the ledger the rule ends half a point below (1.35 against 1.80 to 1.87): one seed is one case here as well.

# %% [markdown] tags=["core"]
# ## 7 · Over-optimisation
#
# **Question.** A reward model of few pairs agrees with the truth on most held-out pairs. What happens if you optimise it hard, and what does a price for KL change?
#
# Gao et al. (2022) found that the true reward rises first and falls later, while the proxy goes on rising. Where a policy finds answers that the reward model takes for good and people do not, one speaks of **reward hacking**. Try to bring that about with a second reward model, from the first 100 pairs, and a rate that is twice as high. **The rate, the price, the number of pairs and the number of iterations are chosen so that a policy is likely to give answers unlike those that the reward model learned from.** They are no forecast of when that happens in a project. Three training runs without a price of KL, three with one ($\beta = 0.2$ on $k_3$, as in `grpo_loss`), at equal iterations; runs with the same number have the same questions.

# %%
small_model = fit_reward_model(train_pairs[: lesson.scaled(100, 16)], epochs=3)
small_judge = partial(proxy, small_model)
small_delta = margins(small_model, test_pairs)
print(f"agrees with the truth on {agreement(small_delta, clear)} of the clear held-out pairs")
lesson.report("reward model of 100 pairs, agreement on clear pairs", str(agreement(small_delta, clear)))
HARD, PRICES = 2.0, (0.0, 0.2)
pressed = {
    beta: [policy_gradient(partial(grpo, beta=beta), small_judge, run, rate=HARD) for run in range(RUNS)]
    for beta in PRICES
}


# %%
@torch.no_grad()
def moved_by(policy: nn.Module, samples: Samples) -> float:
    """KL to the SFT policy in nats an answer: the mean of log(pi / pi_ref) over the policy's own answers."""
    some = samples.rows(torch.arange(min(32, len(samples.ids))))
    return (log_probs_of(policy, some) - log_probs_of(sft, some)).sum(1).mean().item()


names, before = {beta: f"beta {beta:g}" for beta in PRICES}, exams["SFT, careless"]
finals, rows, ours = {}, {}, []
for beta, runs in pressed.items():
    for run, training in enumerate(runs):
        name, taken = f"{names[beta]}, run {run + 1}", take_exam(training.policy)
        gains = [small_judge(taken).mean() - small_judge(before).mean(), truth(taken).mean() - truth(before).mean()]
        polite = np.mean([text.startswith(POLITE) for text in taken.texts])
        finals[name] = (training.policy, taken)
        ours.append({"seed": seed, "beta": beta, "run": run + 1, "kl": moved_by(*finals[name]),
                     "proxy": gains[0].item(), "true": gains[1].item(), "polite": float(polite),
                     "right": share_right(taken)})  # fmt: skip
        rows[name] = [*manners(taken), f"{ours[-1]['proxy']:+.2f}", f"{ours[-1]['kl']:.1f}"]
show_table({"SFT, careless": [*manners(before), "+0.00", "0.0"]} | rows, [*MANNERS, "proxy gained", "KL (nats)"])

# %%
QUANTITIES = {"kl": ("KL, nats an answer", ".1f"), "proxy": ("reward model, over SFT", "+.2f"),
              "true": ("true reward, over SFT", "+.2f"), "polite": ("polite", ".0%"),
              "right": ("right", ".0%")}  # fmt: skip
for beta in PRICES:
    for key, (what, form) in QUANTITIES.items():
        three = " / ".join(f"{row[key]:{form}}" for row in ours if row["beta"] == beta)
        lesson.report(f"{names[beta]}, three runs on the exam: {what}", three)
lesson.report("the SFT policy of these runs on the exam: right", f"{share_right(before):.0%}")
worst = min((row for row in ours if row["beta"] == 0), key=lambda row: row["true"])
texts = finals[f"{names[0.0]}, run {worst['run']}"][1].texts[:4]
print(f"answers of run {worst['run']}, the worst of those without a price:")
for question, text in zip(exam, texts, strict=False):
    print(f"{question.prompt} -> {text!r}")
lesson.report("beta 0, the worst run's first answers", json.dumps(texts))

# %% [markdown]
# **What you see.** *Proxy gained* is the small reward model's score on the exam, over that of the SFT policy. *KL* is estimated with $k_1$: $\log \pi_\theta - \log \pi_\text{ref}$, summed over the policy's own answers. In this run no policy went astray: all six have a higher true reward than the SFT policy. The answers printed last are all well-formed, and three of the four answer another question; in that run *right* has gone from 56 % to 59 %. The last of them, a horse for a dish, the SFT policy gave as well. By 32 answers each, the runs with a price have moved nearly as far as those without (1.0 to 1.5 nats against 1.1 to 1.6).
#
# **One seed is one case.** All six runs share an SFT policy and a reward model. The same cells were therefore run with the seeds 0 to 4. Their numbers are in `data/hard_runs.json`, which `recipes/hard_runs.py` takes from the course's ledger; the next cell prints them with yours, and the figure shows all runs.

# %%
kept = json.loads((ROOT / "data" / "hard_runs.json").read_text(encoding="utf-8"))
every = ours + [row for row in kept["runs"] if row["seed"] != seed]
complete = all(sum(row["seed"] == at for row in every) == len(PRICES) * RUNS for at in {*range(5), seed})
assert complete, "data/hard_runs.json lacks runs: python -m recipes.hard_runs"
rows = {}
for at in sorted({row["seed"] for row in every}):
    for beta in PRICES:
        three = [row for row in every if (row["seed"], row["beta"]) == (at, beta)]
        rows[f"seed {at}, {names[beta]}"] = [
            " / ".join(f"{row[key]:{form}}" for row in three) for key, (_, form) in QUANTITIES.items()
        ]
show_table(rows, [what for what, _ in QUANTITIES.values()])
rights = {int(at): share for at, share in kept["right before"].items()} | {seed: share_right(before)}
print("right before, SFT policy: " + ", ".join(f"seed {at} {share:.0%}" for at, share in sorted(rights.items())))
fooled = {beta: [row["proxy"] > 0 > row["true"] for row in every if row["beta"] == beta] for beta in PRICES}
for at, said in kept["answers"].items():
    if int(at) != seed:
        print(f"seed {at}, answers of the worst run at beta 0: " + "  ".join(map(repr, said[:3])))
for beta, found in fooled.items():
    print(f"{names[beta]}: reward model above SFT and truth below it in {sum(found)} of {len(found)} runs")

# %% tags=["headline"]
marks = dict(zip(sorted({row["seed"] for row in every}), "os^Dv*", strict=False))
figure = Figure(figsize=(9, 3.8), layout="constrained")
both = figure.subplots(1, 2, sharex=True)
for axes, key, unit in zip(both, ("proxy", "true"), ("unit of its seed", "points"), strict=True):
    for row in every:
        color = plots.COLORS[PRICES.index(row["beta"])]
        axes.scatter(row["kl"], row[key], s=45, marker=marks[row["seed"]], edgecolor=color, linewidth=1.2,
                     facecolor="none" if row["beta"] else color, alpha=0.8)  # fmt: skip
    axes.axhline(0, color=plots.GREY, linestyle="--", linewidth=1.2)
    axes.text(1, 0, " SFT", transform=axes.get_yaxis_transform(), color=plots.GREY, va="center")
    axes.set(xscale="log", xlabel="KL to the SFT policy (nats an answer)", ylabel=f"{QUANTITIES[key][0]} ({unit})")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
for beta, color in zip(PRICES, plots.COLORS, strict=False):
    axes.scatter([], [], edgecolor=color, facecolor="none" if beta else color, label=names[beta])
for at, mark in marks.items():
    axes.scatter([], [], color=plots.GREY, marker=mark, label=f"seed {at}")
axes.legend(loc="upper left", bbox_to_anchor=(1.1, 1))
found = {
    beta: {row["seed"] for row in every if row["beta"] == beta and row["proxy"] > 0 > row["true"]} for beta in PRICES
}
counts = " and ".join(f"in {len(seeds)} of {len(marks)} seeds at {names[beta]}" for beta, seeds in found.items())
figure.suptitle(f"Reward model up, truth down: {counts}", x=0.01, ha="left", weight="bold")
plots.show(figure, "Two panels over the KL to the SFT policy, one point a run, one shape a seed: the change of the "
                   "reward model's score, and that of the true reward, with and without a price of KL.")  # fmt: skip

# %% [markdown]
# **What you see.** The left panel is what a project sees: the reward model is more pleased with every policy than with the SFT policy, with and without a price. Each seed has a reward model of its own, with its own unit: compare points of one shape only, not the heights of the clusters.
#
# The right panel is the truth. Without a price 6 of 15 runs end below the SFT policy, with one none does. In the five worst of them at most 3 % of the answers are still polite. Of the three of these that are printed one says `Weasure.`, one `W pl pleasure.`, and one `With pl pleasure.`, or nothing at all; three of their nine answers hold no fact. The true reward takes off the point for manners, and the two for a sentence that is no longer exact. So one spoilt word can cost 3 points, where the fact is right.
#
# The column *right* did not fall. It looks for the right sentence, whatever stands around it, and counts two words as wrong: so it can rise by form alone. In these five runs it is 64 to 81 %, and 22, 28 and 59 % for their SFT policies; in all 30 runs it is higher than before. What fell is the opening, and the true reward is strict about that, as its rule says. A scorer that forgives `Weasure.` would tell another story.
#
# The reward model scores these five above the SFT policy's answers, and like the other runs of the same seed (seed 2: +5.83 among +5.40 to +5.93; seed 3: +1.12 among +1.12 to +1.41; seed 4: +0.90 to +0.95 among +0.86 to +0.94). So these policies score about as well as the sound ones of their seed, and the left panel cannot tell them apart. (What the opening alone costs there is not measured.) That the reward model takes such answers for good is reward hacking, here of a small kind. The KL tells what the left panel does not: these five policies have moved by 6 nats and more, all others by less than 4. (The sixth, with seed 3, has moved by 2.2 nats and is 0.13 below.)
#
# What the figure does not show: the runs of one seed share an SFT policy and a reward model, so these are five cases, not 15, and in three of them runs went astray. And a price holds a policy back: of the 15 pairs of runs with the same seed and number, the one with a price has the lower KL in 14, and the higher true reward in 12 (one is equal, two are lower). With the seeds 0 to 2 the runs without a price that moved about as little end within 0.4 of those with one. With seed 3 the one such run gained 0.57, and the three with a price 0.74 to 0.94; with seed 4 there is none. So stopping at a KL may do as well as paying for it, or not; this lesson has not tried that.
#
# What to watch without a true reward: the length of the answers, the share that ends, the KL, and above all the answers themselves. Other remedies are early stopping by people's judgements of samples, ensembles of reward models (Coste et al. 2023; they share mistakes, Eisenstein et al. 2023), and, one may hope, more and better pairs. (The rows of GRPO in section 6 had five times the pairs, but also half the rate, and one pass over the pairs for three; they cannot tell which of these matters.) In this run the small reward model agrees with the truth as often as the large one (90 and 89 % of the clear pairs): agreement on answers like those of the SFT policy does not tell how a model judges answers that this policy never gave.

# %% [markdown] tags=["further"]
# ## 8 · Measuring KL: three estimators
#
# *Further: no core section needs this one.*
#
# **Question.** PPO estimates KL by $\log \pi_\theta - \log \pi_\text{ref}$ of the sampled tokens. Is there a better way?
#
# With $p = \pi_\theta$, $q = \pi_\text{ref}$, a sample from $p$ and $\ell = \log(q/p)$, Schulman (2020) compares
#
# $$k_1 = -\ell, \qquad k_2 = \tfrac12 \ell^2, \qquad k_3 = e^{\ell} - 1 - \ell$$
#
# $k_1$ is unbiased and often negative. $k_3$ adds $q/p - 1$, whose mean is zero, and is never negative. The vocabulary is small enough to sum over it, so mean and spread of each can be computed *exactly*, at every token of real answers. To vary the distance, go from the SFT policy to one that was optimised hard in steps: $p_\alpha \propto q^{1-\alpha} p^\alpha$.


# %%
@torch.no_grad()
def all_log_probs(policy: nn.Module, samples: Samples) -> Tensor:
    """Log-probabilities of the whole vocabulary at each token of the answers: (tokens, vocab)."""
    positions = (samples.mask.cumsum(-1) - 1).clamp(min=0)
    logits = policy(input_ids=samples.ids, attention_mask=samples.mask, position_ids=positions).logits
    return logits[:, samples.width - 1 : -1][samples.answer_mask == 1].float().log_softmax(-1)


def estimators(p: Tensor, q: Tensor) -> dict[str, Tensor]:
    """k1, k2, k3 for every token that could have been sampled: each (tokens, vocab)."""
    log_r = q - p
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": log_r.exp() - 1 - log_r}


moved, taken = finals["beta 0, run 1"]
some = taken.rows(torch.arange(min(40, len(exam))))
q, end = all_log_probs(sft, some), all_log_probs(moved, some)
rows = []
for alpha in (0.1, 0.25, 0.5, 1.0):
    p = ((1 - alpha) * q + alpha * end).log_softmax(-1)  # (tokens, vocab)
    exact = (p.exp() * (p - q)).sum(-1)  # (tokens,)
    for name, k in estimators(p, q).items():
        mean = (p.exp() * k).sum(-1)
        spread = ((p.exp() * k**2).sum(-1) - mean**2).mean().sqrt()
        rows.append((alpha, name, exact.mean().item(), mean.mean().item(), spread.item()))
print("alpha  name   exact KL     mean    bias  standard deviation")
for alpha, name, exact_kl, mean, spread in rows:
    print(f"{alpha:5} {name:>5} {exact_kl:10.4f} {mean:8.4f} {mean / max(exact_kl, 1e-9) - 1:7.1%} {spread:11.4f}")

# %%
kls = [row[2] for row in rows if row[1] == "k1"]
relative = {name: [row[4] / max(row[2], 1e-9) for row in rows if row[1] == name] for name in ("k1", "k2", "k3")}
lines = {name + " (biased)" * (name == "k2"): (kls, values) for name, values in relative.items()}
alt = "Standard deviation of one sample over the KL itself, for three estimators at four distances."
plots.show(plots.curve(lines, title="Which estimator is calmer depends on the distance",
                       xlabel="exact KL (nats per token)", ylabel="standard deviation / KL",
                       log_x=True, log_y=True, alt=alt))  # fmt: skip
near = {row[1]: row for row in rows if row[0] == 0.1}
bias = {name: abs(near[name][3] / max(near[name][2], 1e-9) - 1) for name in near}
lesson.report(
    "KL estimators near the reference, deviation k1 / k2 / k3", " / ".join(f"{r[4]:.3f}" for r in near.values())
)
lesson.equal("k1 and k3 have no bias (1 % of the KL allowed for rounding)",
             max(bias["k1"], bias["k3"]) if near["k1"][2] > 1e-4 else 0.0, within=0.01)  # fmt: skip
far = {row[1]: row for row in rows if row[0] == 1.0}
lesson.report("KL estimators at the end, deviation k1 / k2 / k3", " / ".join(f"{r[4]:.3f}" for r in far.values()))

# %% [markdown]
# **What you see.** $k_1$ and $k_3$ have no bias. $k_2$ has one: in this run it misses from 10 % to 37 % of the KL. Near the reference, at the left of the figure, $k_3$ is calmer than $k_1$, and $k_2$ in this run calmer still. Farther away $q/p$ is unbounded: a token that the reference likes and the policy no longer does is sampled rarely and then counts enormously. That costs $k_3$ its advantage: at the right its deviation is many times that of $k_1$.
#
# **As a loss they behave differently.** In PPO the KL is part of the *reward*, a number without gradient. GRPO adds $k_3$ to the *loss* and differentiates it. Then what counts is the mean of the gradient: that of $k_1$ is zero, $\mathbb{E}_p \nabla \log p = 0$; that of $k_2$ is the gradient of $\mathrm{KL}(p\,\|\,q)$; that of $k_3$ is the gradient of the *other* one, $\mathrm{KL}(q\,\|\,p)$. Multiplied by $\rho$, whose value is 1 and whose gradient is $\nabla \log p$, $k_3$ has the gradient of $\mathrm{KL}(p\,\|\,q)$ again. That is what `grpo_loss` above does, and `trl` by default; the paper has $k_3$ alone. Check all four.

# %%
p_logits = end[:50].clone().requires_grad_(True)  # (tokens, vocab)
fixed = q[:50]


def gradient_of(loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, p_logits, retain_graph=True)[0]


p = p_logits.log_softmax(-1)
weights = p.exp().detach()  # the mean over samples, which have no gradient themselves
k_gradients = {name: gradient_of((weights * k).sum()) for name, k in estimators(p, fixed).items()}
ratio = p.exp() / weights  # 1 everywhere, but it has a gradient
k_gradients["rho k3"] = gradient_of((weights * ratio * estimators(p, fixed)["k3"]).sum())
forward = gradient_of((p.exp() * (p - fixed)).sum())  # of KL(p || q)
backward = gradient_of((fixed.exp() * (fixed - p)).sum())  # of KL(q || p)
targets = {"k1": (0 * forward, "0"), "k2": (forward, "KL(p||q)"), "k3": (backward, "KL(q||p)")}
for name, (target, label) in (targets | {"rho k3": (forward, "KL(p||q)")}).items():
    off = (k_gradients[name] - target).abs().max()
    print(f"mean gradient of {name} - gradient of {label}: {off:.1e} (KL(p||q) has {forward.abs().max():.1e})")
    lesson.equal(
        f"the mean gradient of {name} is that of {label}", float(off / max(1.0, forward.abs().max())), within=1e-3
    )

# %% [markdown] tags=["further"]
# ## 9 · Equal to the library: reward model, RLOO, GRPO
#
# *Further: no core section needs this one.*
#
# **Question.** Is what you have written what practitioners use?
#
# `trl.RewardTrainer` trains `AutoModelForSequenceClassification` with one output. Put your weights into one and let the trainer compute its loss on your batches.

# %%
config = copy.deepcopy(sft.config)
config.num_labels, config.pad_token_id = 1, PAD
classifier = AutoModelForSequenceClassification.from_config(config).to(machine.device).eval()
classifier.model.load_state_dict(reward_model.model.state_dict())
classifier.score.load_state_dict(reward_model.score.state_dict())
rows = [{"prompt": p.question.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in test_pairs[:4]]
trainer = RewardTrainer(
    classifier, RewardConfig(**QUIET), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
)
classifier.config.pad_token_id = -1  # it reads the last token that is no padding: let each answer end there
difference = 0.0
for batch in pair_batches(test_pairs[:48], 16, seed):
    room = (1 - batch["attention_mask"]).sum(1).tolist()  # padding of each row, moved from its right to its left
    for name, rows in batch.items():
        moved_rows = [row.roll(width) for row, width in zip(rows, room, strict=True)]
        batch[name] = torch.stack(moved_rows).to(machine.device)
    with torch.no_grad():
        theirs, own = trainer.compute_loss(classifier, dict(batch)), bradley_terry_loss(reward_model, batch)
    difference = max(difference, (theirs - own).abs().item())
print(f"loss {own:.4f}, largest difference to trl.RewardTrainer in three batches: {difference:.1e}")
lesson.report("largest difference to trl: reward loss", f"{difference:.1e}")
lesson.equal("the loss is that of trl.RewardTrainer, within 0.0001", difference, within=1e-4)


# %% [markdown]
# **The library.** Let `trl` sample, score and compute: its trainers return the tokens, the advantages and the loss. Compute advantages and loss from the same tokens and rewards with your functions. The policy is one trained by GRPO; to the log-probabilities at sampling time noise is added (normal, standard deviation 0.2 a token), so that the ratios differ from 1 and some are clipped. The lines below print the share that is; without any, the cell stops.

# %%
FEW, heard = 4, []


def some_reward(prompts: list, completions: list[str], **columns) -> list[float]:
    """Any number that depends on the answer will do; keep what was given out."""
    heard[:] = [float(len(set(text))) / 10 for text in completions]
    return heard


prompts = [chat_prompt(tokenizer, question.prompt) for question in exam[:4]]
trainers = {}
for name, trainer_class, config_class, more in (
    ("RLOO", RLOOTrainer, RLOOConfig, {"beta": 0.0, "normalize_advantages": False}),
    ("GRPO", GRPOTrainer, GRPOConfig, {"beta": 0.04, "loss_type": "grpo"}),
):
    arguments = config_class(**QUIET, **more, num_generations=FEW, max_completion_length=24,
                             per_device_train_batch_size=16)  # fmt: skip
    trainers[name] = trainer_class(
        trainable_copy(grpo_runs[0].policy), some_reward, arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip

# %%
differences = {}
for name, trainer in trainers.items():
    model = trainer.model.eval()
    with torch.no_grad():
        batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(FEW)])
        ids, mask = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["completion_mask"]
        whole = Samples([], ids, torch.cat([batch["prompt_mask"], mask], 1), batch["prompt_ids"].shape[1])
        log_probs, ref = (log_probs_of(policy, whole, exact=True) for policy in (model, sft))
        noise = torch.randn(log_probs.shape, generator=torch.Generator().manual_seed(seed))
        old = log_probs + 0.2 * noise.to(log_probs)
        scores = torch.tensor(heard, device=ids.device)
        if name == "RLOO":
            advantages = rloo_advantages(scores, FEW)
            own = rloo_loss(log_probs, old, advantages, mask)
            batch["old_logps"] = (old * mask).sum(1)
        else:
            advantages = grpo_advantages(scores, FEW)
            own = grpo_loss(log_probs, old, ref, advantages, mask, beta=0.04)
            batch["old_per_token_logps"], batch["ref_per_token_logps"] = old, ref
        theirs = trainer._compute_loss(model, batch)
    change = (log_probs - old) * mask  # RLOO's ratio is that of the whole answer, GRPO's of a token
    change = change.sum(1, keepdim=True) if name == "RLOO" else change
    clipped = int(((change.exp() - 1) * advantages[:, None].sign() > 0.2).sum())
    ratios = len(ids) if name == "RLOO" else int(mask.sum())
    print(f"{name}: clipped {clipped} of {ratios} ratios, {clipped / ratios:.0%}")
    assert clipped, f"{name}: nothing is clipped, so the equality would not test the clip"
    off = (own - theirs).abs().item() / max(1.0, abs(theirs.item()))
    differences[name] = max((advantages - batch["advantages"]).abs().max().item(), off)
    print(f"{name}: loss {own:.5f} and {theirs:.5f}; largest difference, advantages and loss: {differences[name]:.1e}")
    lesson.report(f"largest difference to trl: {name}", f"{differences[name]:.1e}")
lesson.equal("advantages and losses are those of trl, within 0.0001", max(differences.values()), within=1e-4)


# %% [markdown]
# ## 10 · Exercises
#
# Five, from easy to open; the minutes add up to the 75 of the header. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.
#
# **Exercise 8.1** (easy, 5 minutes). Llama 2's reward model knows by *how much* an answer is better: the loss becomes $-\log\sigma(r_c - r_r - m)$ with a margin $m$ for each pair. Many also pull the mean of each pair's rewards towards zero, which fixes the arbitrary constant: add $c\,(r_c + r_r)^2$, averaged over the pairs.


# %% tags=["exercise"]
# Exercise 8.1, easy: rewards with a margin.
def margin_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float = 0.0) -> Tensor:
    """Mean Bradley-Terry loss with margins, plus center times the mean of (chosen + rejected)^2; all (pairs,)."""
    raise NotImplementedError


# %% tags=["check"]
def check_margin_loss(margin_loss):
    chosen, rejected = torch.tensor([1.0, 0.5, -3.0]), torch.tensor([0.0, 0.5, 2.0])
    zero = torch.zeros(3)
    expect_close("margin_loss without margin", margin_loss(chosen, rejected, zero),
                 -F.logsigmoid(chosen - rejected).mean(), 1e-6)  # fmt: skip
    by_hand = (math.log(1 + math.exp(-0.0)) + math.log(1 + math.exp(2.0)) + math.log(1 + math.exp(5.5))) / 3
    margin = torch.tensor([1.0, 2.0, 0.5])
    expect_close("margin_loss with margins 1, 2, 0.5", margin_loss(chosen, rejected, margin), by_hand, 1e-5)
    expect_close("the same, center 0.1", margin_loss(chosen, rejected, margin, 0.1), by_hand + 0.1, 1e-5)
    apart = torch.tensor([4.0]), torch.tensor([-1.0])  # their sum is 3, its square 9
    off = margin_loss(*apart, torch.zeros(1), 0.5) - margin_loss(*apart, torch.zeros(1))
    expect_close("what center 0.5 adds for rewards 4 and -1", off, 4.5, 1e-5)
    far = margin_loss(torch.tensor([-200.0]), torch.tensor([200.0]), torch.zeros(1))
    expect_close("a pair that is wrong by 400", far, 400.0, 1e-5)


check("8.1", check_margin_loss, margin_loss)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The margin is subtracted from the difference inside the logarithm. Use `F.logsigmoid`: it stays finite for a pair that is wrong by hundreds.
#
# </details>

# %% [markdown] tags=["solution"]
# <details>
# <summary>Solution</summary>
#
# `logsigmoid` stays finite where `log(sigmoid(...))` does not. Here $(1 + 0)^2 + (0.5 + 0.5)^2 + (-3 + 2)^2 = 3$, whose mean is 1.
#
# ```python
# def margin_loss(chosen, rejected, margin, center=0.0):
#     loss = -F.logsigmoid(chosen - rejected - margin).mean()
#     return loss + center * ((chosen + rejected) ** 2).mean()
# ```
#
# </details>

# %% [markdown]
# **Exercise 8.2** (medium, 10 minutes). *A cure for rambling.* An answer that does not end is scored like any other. Subtract a penalty from the score of every answer without the token `END` among those that count. (`trl` called it `missing_eos_penalty` in its PPO; its GRPO can leave truncated answers out, with `mask_truncated_completions`.)

# %% tags=["exercise"]
# Exercise 8.2, medium: a cure for rambling.
def penalise_unfinished(scores: Tensor, ids: Tensor, mask: Tensor, end: int, penalty: float) -> Tensor:
    """Scores (batch,) less the penalty where no counted token of the answer is `end`; ids, mask (batch, answer)."""
    raise NotImplementedError


# %% tags=["check"]
def check_penalise(penalise_unfinished):
    ids = torch.tensor([[5, 9, 1, 1], [5, 6, 7, 8], [9, 1, 9, 1], [5, 6, 9, 9]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    given = scores.clone()
    expect_close("penalise_unfinished(scores, ids, mask, end=9, penalty=1.5)",
                 penalise_unfinished(scores, ids, mask, 9, 1.5), [1.0, 0.5, 3.0, 2.5])  # fmt: skip
    expect_equal("the scores given, afterwards", scores, given)
    expect_close("with a penalty of 0", penalise_unfinished(scores, ids, mask, 9, 0.0), scores)
    expect_close("end=8, penalty=1", penalise_unfinished(scores, ids, mask, 8, 1.0), [0.0, 2.0, 2.0, 3.0])


check("8.2", check_penalise, penalise_unfinished)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# First a boolean for each answer: does any place hold `end` *and* count? Then subtract where it does not. Return a new tensor.
#
# </details>

# %% [markdown] tags=["solution"]
# <details>
# <summary>Solution</summary>
#
# The mask matters where padding is the same token as the end, as with many tokenizers.
#
# ```python
# def penalise_unfinished(scores, ids, mask, end, penalty):
#     finished = ((ids == end) & (mask == 1)).any(1)  # (batch,)
#     return scores - penalty * (~finished).float()
# ```
#
# </details>

# %% [markdown]
# **Exercise 8.3** (medium, 10 minutes). *Three ways to average.* DAPO and Dr. GRPO are relatives of GRPO; what they are for stands under "In practice". Given losses of tokens, compute the mean of GRPO (over each answer's tokens, then over answers), of DAPO (over all tokens that count), and of Dr. GRPO (sum over tokens that count, divided by the number of answers times the longest length allowed).

# %% tags=["exercise"]
# Exercise 8.3, medium: three ways to average.
def aggregate(token_loss: Tensor, mask: Tensor, kind: str, limit: int) -> Tensor:
    """One number from token losses (batch, answer); kind is "grpo", "dapo" or "dr_grpo"."""
    raise NotImplementedError


# %% tags=["check"]
def check_aggregate(aggregate):
    loss = torch.tensor([[4.0, 2.0, 7.0, 7.0], [1.0, 1.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    expect_close('aggregate(..., "grpo")', aggregate(loss, mask, "grpo", 8), 2.0)
    expect_close('aggregate(..., "dapo")', aggregate(loss, mask, "dapo", 8), 10 / 6)
    expect_close('aggregate(..., "dr_grpo") with limit 8', aggregate(loss, mask, "dr_grpo", 8), 10 / 16)
    expect_close('aggregate(..., "dr_grpo") with limit 4', aggregate(loss, mask, "dr_grpo", 4), 10 / 8)
    wrong = -torch.ones(2, 4)  # a wrong answer of 2 tokens and one of 4, advantage -1 each
    grads = {}
    for kind in ("grpo", "dapo", "dr_grpo"):
        x = wrong.clone().requires_grad_(True)
        aggregate(x, mask, kind, 8).backward()
        grads[kind] = x.grad.sum(1)
    expect_true("GRPO pushes both answers down equally, the others push per token",
                torch.allclose(grads["grpo"][0], grads["grpo"][1])
                and all(torch.allclose(grads[k][1], 2 * grads[k][0]) for k in ("dapo", "dr_grpo")))  # fmt: skip


check("8.3", check_aggregate, aggregate)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Multiply by the mask first. The three differ only in what you divide by, and in whether you divide before or after summing over the answers.
#
# </details>

# %% [markdown] tags=["solution"]
# <details>
# <summary>Solution</summary>
#
# In GRPO a token of a long answer weighs less, so a long wrong answer is punished less for each of its tokens. That is the length bias that Dr. GRPO removes.
#
# ```python
# def aggregate(token_loss, mask, kind, limit):
#     total = token_loss * mask
#     if kind == "grpo":
#         return (total.sum(1) / mask.sum(1)).mean()
#     if kind == "dapo":
#         return total.sum() / mask.sum()
#     return total.sum() / (len(mask) * limit)
# ```
#
# </details>

# %% [markdown]
# **Exercise 8.4** (hard, 20 minutes). *Best-of-n without waste.* What is best-of-$n$ worth, if you have sampled $N > n$ answers? You could draw one subset of $n$. Better: the exact mean over *all* $\binom{N}{n}$ subsets. Sort the samples by proxy, lowest first. The sample at place $i$ (from 0) is the best of a subset if the other $n - 1$ come from the $i$ before it, so its weight is $\binom{i}{n-1} / \binom{N}{n}$.


# %% tags=["exercise"]
# Exercise 8.4, hard: best-of-n without waste.
def best_of_exact(n: int, proxy: Tensor, value: Tensor) -> float:
    """Mean value of the proxy's favourite among n of N samples, over all subsets and questions; (questions, N)."""
    raise NotImplementedError


# %% tags=["check"]
def check_best_of(best_of_exact):
    from itertools import combinations

    draws = torch.Generator().manual_seed(3)
    proxy, value = torch.randn(5, 6, generator=draws), torch.randn(5, 6, generator=draws)
    for n in (1, 2, 4, 6):
        subsets = [list(chosen) for chosen in combinations(range(6), n)]
        slow = torch.stack([value[:, s].gather(1, proxy[:, s].argmax(1, keepdim=True)) for s in subsets]).mean().item()
        expect_close(f"best_of_exact({n}, ...) on 6 samples", best_of_exact(n, proxy, value), slow, 1e-5)
    expect_close("best of 1 is the mean", best_of_exact(1, proxy, value), value.mean().item(), 1e-5)
    expect_close(
        "the value is the proxy, best of all", best_of_exact(6, proxy, proxy), proxy.amax(1).mean().item(), 1e-5
    )


check("8.4", check_best_of, best_of_exact)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `value.gather(1, proxy.argsort(1))` puts the values in the order of the proxy. One weight for each place, from `math.comb`; the first n - 1 weights are 0 by themselves.
#
# </details>

# %% [markdown] tags=["solution"]
# <details>
# <summary>Solution</summary>
#
# ```python
# def best_of_exact(n, proxy, value):
#     N = proxy.shape[1]
#     ordered = value.gather(1, proxy.argsort(1))  # (questions, N), the proxy's favourite last
#     weights = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
#     return (ordered * weights).sum(1).mean().item()
# ```
#
# </details>

# %% [markdown]
# **Exercise 8.5** (open, 30 minutes). *Predict, then measure.* The reward is paid by the word: add `rate` points for each counted token to what the reward model says. Write down first how long the answers on the exam will be after a GRPO run of the usual number of iterations, at 0.3 points a token, and what their true reward will be.

# %% tags=["exercise"]
# Exercise 8.5, open: predict, then measure. What does GRPO do if each token is paid for?
PREDICTION = None  # your guess before you run anything: (tokens an answer, mean true reward)


def paid_by_the_word(judge: Scorer, rate: float) -> Scorer:
    """A scorer (samples -> (batch,)) that adds `rate` for each counted token of an answer, its end included."""
    raise NotImplementedError


# %% tags=["check"]
def check_paid(paid_by_the_word, prediction):
    ids = torch.tensor([[7, 8, 5, 6, 9], [7, 8, 5, 9, 9], [7, 8, 9, 9, 9]])  # a prompt of 2 and an answer of 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    made_up, given = Samples([], ids, mask, 2), torch.tensor([1.0, -2.0, 0.0])
    paid = paid_by_the_word(lambda samples: given, 0.5)
    guessed = isinstance(prediction, list | tuple) and len(prediction) == 2
    guessed = guessed and all(isinstance(x, int | float) for x in prediction)
    guessed = guessed and 0 < prediction[0] <= LIMIT and prediction[1] <= 3
    expect_true("PREDICTION holds two possible numbers, written before you measured", guessed)
    expect_close("rewards 1, -2, 0 for answers of 3, 2, 1 tokens at 0.5", paid(made_up), [2.5, -1.0, 0.5])
    expect_close("the rewards of the judge, afterwards", given, [1.0, -2.0, 0.0])
    expect_close("at a rate of 0", paid_by_the_word(lambda samples: given, 0.0)(made_up), given)
    paid_for = take_exam(policy_gradient(grpo, paid_by_the_word(judge, 0.3)).policy)
    print(f"you predicted {prediction[0]:.0f} tokens and a true reward of {prediction[1]:.2f}")
    shown = {"SFT policy": exams["SFT, careless"], "GRPO, not paid": exams["GRPO, run 1"], "paid by the word": paid_for}
    for name, samples in shown.items():
        tokens = samples.answer_mask.sum(1).float().mean()
        print(f"{name}, exam: {tokens:.0f} tokens and {truth(samples).mean():.2f}")


check("8.5", check_paid, paid_by_the_word, PREDICTION)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `samples.answer_mask` is (batch, answer), with 1 for the tokens that count. Return a function. For the guess: how many tokens may an answer have at most, and what is worth more than 0.3 points to the reward model?
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Count the answer's tokens and not those of the question. An idle sentence has about ten tokens, which earn 3 points at 0.3 each. That is more than the reward model takes off for one (its margin in the table of section 2), so longer answers pay.
#
# What came out: with seed 0 the answers grow from 19 to 31 tokens, nearly the limit of 32, and the true reward falls from 1.77 to 0.95. The same run without pay ends at 15 tokens and 2.31. With each of the seeds 1 to 4, too, the paid answers are longer than the unpaid ones (17 to 32 against 15 to 18 tokens), and their true reward is lower, by 0.07 to 1.67. Below the SFT policy it is with the seeds 0 and 4 only.
#
# ```python
# PREDICTION = (30, 0.5)
#
# def paid_by_the_word(judge: Scorer, rate: float) -> Scorer:
#     def scorer(samples: Samples) -> Tensor:
#         return judge(samples) + rate * samples.answer_mask.sum(1)
#
#     return scorer
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure: the baseline of section 3 and the clip of section 5. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **1. In the figure of section 3 the curve is a valley. What is the same at all its points?**
#
# - A. the spread of the estimate
# - B. the mean of the estimate
# - C. the reward of the best answer's gradient
# - D. the number of samples that are needed
#
# <details><summary>Answer</summary>
#
# B. A baseline that does not depend on the answer leaves the mean alone: derived for any, computed for the 33 of the figure. A is what the curve shows to differ, and with it D.
#
# </details>

# %% [markdown] tags=["quiz"]
# **2. A reward model is trained again with another seed, and all its rewards are 10 higher. Which of these notices?**
#
# - A. REINFORCE without the batch mean
# - B. RLOO
# - C. GRPO
# - D. best of 4
#
# <details><summary>Answer</summary>
#
# A. Its estimates change their noise (in section 4 it grows), since each answer is pushed up by 10 more. The others compare answers with each other.
#
# </details>

# %% [markdown] tags=["quiz"]
# **3. In the picture of the clip, a token that was better than expected has become half as probable. What does PPO's loss do?**
#
# - A. nothing: the token is beyond the clip
# - B. it pushes the token down further
# - C. it pulls the token up again
# - D. it leaves the batch out
#
# <details><summary>Answer</summary>
#
# C. On that side the line is not flat. The clip takes away the reward for going further in the wanted direction, not the way back.
#
# </details>

# %% [markdown] tags=["quiz"]
# **4. The proxy rises during training. What do you know about the true reward?**
#
# - A. it rises as well, only more slowly
# - B. it falls
# - C. it has risen as long as the KL is small
# - D. nothing certain: you have to look at answers
#
# <details><summary>Answer</summary>
#
# D. The proxy was taught and tested near the SFT policy's answers, and is not always right even there (names: 48 % in section 2). A small KL makes it likelier that the policy is still near, but promises nothing.
#
# </details>

# %% [markdown] tags=["quiz"]
# **5. A run with a price of KL has the better true reward after 20 iterations. Which comparison is still missing before you say that the price has helped?**
#
# - A. the same run with twice the price
# - B. the run without a price, stopped as soon as it had moved as far
# - C. the proxy of both at the end
# - D. a run on easier questions
#
# <details><summary>Answer</summary>
#
# B. A price slows the policy down. If the run without it was as good when it was as far away, stopping early would have done the same.
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
# Start from an SFT model, log length, entropy, KL and the share of unfinished answers, read samples at every evaluation, and keep a held-out judge that the training never sees. The library does the loop; the reward is a function of texts, or a reward model. Here it takes three steps with the rule of form of section 2, which any project could write.

# %%
def form_reward(prompts: list, completions: list[str], **columns) -> list[float]:
    """The reward for trl: one number a completion."""
    return [by_form(text) for text in completions]


rows = [{"prompt": chat_prompt(tokenizer, question.prompt)} for question in facts(32, "practice")]
pieces = 1 if machine.name == "cpu" else 2  # a GPU needs the room
arguments = GRPOConfig(
    **QUIET, max_steps=lesson.scaled(3),
    num_generations=8, per_device_train_batch_size=16 // pieces, gradient_accumulation_steps=pieces,
    max_completion_length=LIMIT, learning_rate=settings["rl"],
    beta=0.0, loss_type="dapo", logging_steps=1, mask_truncated_completions=True,
)  # fmt: skip
ending = copy.deepcopy(tokenizer)
ending.eos_token = end_of_turn(tokenizer)  # trl stops there
trainer = GRPOTrainer(trainable_copy(sft), form_reward, arguments, Dataset.from_list(rows), processing_class=ending)
trainer.remove_callback(PrinterCallback)
trainer.train()
for row in trainer.state.log_history:
    if "reward" in row:
        print(f"step {row['step']}: reward {row['reward']:.2f}, length {row['completions/mean_length']:.1f}, "
              f"groups without a difference {row['frac_reward_zero_std']:.0%}")  # fmt: skip

# %% [markdown]
# Two biases hide in GRPO's loss. Dividing by the length of each answer makes long wrong answers cheap, and dividing by the standard deviation gives more weight to questions that nearly all or nearly no samples get right. Dr. GRPO (Liu et al. 2025) drops both; DAPO (Yu et al. 2025) averages over the tokens of the whole batch, raises the upper clip, and skips groups without a difference. `loss_type="dapo"` above is `trl`'s default. Lesson 16 uses a reward that a program checks, for sums.

# %% [markdown]
# ## Read on
#
# - Williams 1992, *Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning*, Machine Learning 8: REINFORCE.
# - Christiano, Leike, Brown, Martic, Legg & Amodei 2017, *Deep Reinforcement Learning from Human Preferences* ([1706.03741](https://arxiv.org/abs/1706.03741)).
# - Ziegler et al. 2019, *Fine-Tuning Language Models from Human Preferences* ([1909.08593](https://arxiv.org/abs/1909.08593)): adaptive KL.
# - Stiennon et al. 2020, *Learning to Summarize from Human Feedback* ([2009.01325](https://arxiv.org/abs/2009.01325)).
# - Ouyang et al. 2022, *Training Language Models to Follow Instructions with Human Feedback* ([2203.02155](https://arxiv.org/abs/2203.02155)): InstructGPT.
# - Schulman, Moritz, Levine, Jordan & Abbeel 2015, *High-Dimensional Continuous Control Using Generalized Advantage Estimation* ([1506.02438](https://arxiv.org/abs/1506.02438)).
# - Schulman, Wolski, Dhariwal, Radford & Klimov 2017, *Proximal Policy Optimization Algorithms* ([1707.06347](https://arxiv.org/abs/1707.06347)).
# - Schulman 2020, [*Approximating KL Divergence*](http://joschu.net/blog/kl-approx.html).
# - Gao, Schulman & Hilton 2022, *Scaling Laws for Reward Model Overoptimization* ([2210.10760](https://arxiv.org/abs/2210.10760)).
# - Coste, Anwar, Kirk & Krueger 2023, *Reward Model Ensembles Help Mitigate Overoptimization* ([2310.02743](https://arxiv.org/abs/2310.02743)); Eisenstein et al. 2023, *Helping or Herding?* ([2312.09244](https://arxiv.org/abs/2312.09244)) on mistakes that all members share.
# - Huang et al. 2024, [*The N Implementation Details of RLHF with PPO*](https://iclr-blogposts.github.io/2024/blog/the-n-implementation-details-of-rlhf-with-ppo/).
# - Kool, van Hoof & Welling 2019, *Buy 4 REINFORCE Samples, Get a Baseline for Free!* (ICLR workshop); Ahmadian et al. 2024, *Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs* ([2402.14740](https://arxiv.org/abs/2402.14740)): RLOO.
# - Shao et al. 2024, *DeepSeekMath* ([2402.03300](https://arxiv.org/abs/2402.03300)): GRPO. Guo et al. 2025, *DeepSeek-R1* ([2501.12948](https://arxiv.org/abs/2501.12948)).
# - Liu et al. 2025, *Understanding R1-Zero-Like Training: A Critical Perspective* ([2503.20783](https://arxiv.org/abs/2503.20783)): Dr. GRPO. Yu et al. 2025, *DAPO* ([2503.14476](https://arxiv.org/abs/2503.14476)).
