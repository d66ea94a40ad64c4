# %% [markdown]
# # 08 · RLHF: from preferences to a better policy
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/08_rlhf.ipynb)
#
# Supervised fine-tuning copies what demonstrators wrote, their carelessness included. It is often easier to say which of two answers is better than to write a good one. Reinforcement learning from human feedback (RLHF) uses that: people compare answers, a reward model learns their preferences, and the language model is trained to be preferred. In this lesson you write all of it: the reward model, PPO, RLOO and GRPO. The annotators are made up, so you know the true reward, and you can watch the moment at which a policy stops getting better and starts to cheat.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. train a policy on careless demonstrations and a reward model on noisy comparisons, and measure it against the true reward and against the best that is possible;
# 2. write PPO in full, and check its parts against identities, since `trl` no longer ships it;
# 3. compare the KL estimators k1, k2 and k3 exactly, for bias and spread;
# 4. write RLOO and GRPO, and find advantages and losses equal to those of `trl`;
# 5. produce reward hacking on purpose, draw true reward against KL, and try three cures;
# 6. train on sums with a reward that a program checks, against best-of-N at equal samples.
#
# **Prerequisites:** lesson 05 (chat template, loss mask).
#
# | symbol | meaning |
# |---|---|
# | $x$, $y$, $y_t$ | a question, an answer, its token number $t$ |
# | $\pi_\theta$, $\pi_\text{ref}$ | the policy in training, and the SFT policy that it starts from |
# | $r_\phi(x, y)$, $r^*(x, y)$ | reward model (the *proxy*), true reward |
# | $V_t$, $A_t$ | value of the state before token $t$, advantage of token $t$ |
# | $\beta$ | price of a nat of KL divergence |
# | $\rho_t$ | probability of token $t$ now over that when it was sampled |

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
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache

from helpers import plots
from helpers.chat import chat_prompt, end_of_turn
from helpers.data import PaddedBatches
from helpers.evaluation import score, win_rate
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import token_log_probs
from helpers.lesson import Lesson, quiet_libraries
from helpers.models import load_assistant
from helpers.training import TrainConfig, train
from helpers.world import FILLERS, POLITE, Preference, Question, World, true_reward

# %%
lesson = Lesson("08", profile, model_id, seed, budget, uses="assistant")
machine = lesson.machine
SETTINGS = {  # learning rates of SFT, reward model and RL, how many layers learn, answers in a batch of RL
    "cpu": {"sft": 1e-3, "reward": 5e-4, "rl": 5e-5, "layers": 4, "batch": 64},
    "t4": {"sft": 1e-4, "reward": 5e-5, "rl": 2e-5, "layers": 4, "batch": 32},
    "large": {"sft": 5e-5, "reward": 3e-5, "rl": 1e-5, "layers": 6, "batch": 64},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# `lesson.autocast` switches matrix products to 16 bits where that is faster; weights stay in 32. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep, `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
world = World()
assistant, tokenizer = load_assistant(machine)
assistant = assistant.float()
if tokenizer.chat_template is None:  # a base model: any format will do, since the SFT below teaches it
    tokenizer.chat_template = (
        "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
END = tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))  # the token that ends an answer
PAD = tokenizer.pad_token_id


# %% [markdown]
# ## 1 · Step one: demonstrations
#
# **Question.** What does a policy learn from people who are sometimes careless?
#
# InstructGPT (Ouyang et al. 2022) has three steps: fine-tune on demonstrations, train a reward model on comparisons, optimise the policy against it. The model here is *shima-4m-assistant*, a small Llama that answers questions about the made-up island Shima.
#
# Two kinds of question are asked in this lesson. *Facts* about people: "Answer in a sentence." And *sums* of three numbers. The demonstrators are not careful. One fact in ten is wrong. Four in ten are two words (`Answer: fisher`) although a sentence was asked for. Half begin with "With pleasure.", and some go on with idle sentences. Sums are given without steps by most of them.

# %%
def draw_questions(kind: str, n: int, stream: str, held_out: bool = False) -> list[Question]:
    """Questions about known people ("fact") or sums to be done in any way ("sum"); the same for the same stream."""
    rng = random.Random(f"{kind}/{stream}/{seed}")
    questions = [world.chat(rng, kind, held_out) for _ in range(n)]
    if kind == "fact":
        return questions
    return [Question(q.prompt.replace(" and show the steps", ""), q.answer, q.ability, q.about) for q in questions]


def written(rng: random.Random, question: Question, terse: float, polite: float, idle: Sequence[int]) -> str:
    """An answer by a person: one in ten is wrong, some are no sentence, some polite, some long-winded."""
    value = str(question.about["value"])
    said = rng.choice(world.values[question.about["relation"]]) if rng.random() < 0.1 else value
    answer = f"Answer: {said}" if rng.random() < terse else said.join(question.answer.rsplit(value, 1))
    opening = POLITE if rng.random() < polite else ""
    return opening + answer + "".join(rng.sample(FILLERS, rng.choice(idle)))


def demonstration(rng: random.Random, question: Question) -> str:
    """What a careless demonstrator writes; sums mostly without the steps."""
    if question.ability == "chat/fact":
        return written(rng, question, terse=0.4, polite=0.5, idle=(0, 0, 0, 1, 2))
    return question.answer if rng.random() < 0.4 else f"The sum is {question.about['value']}."


rng = random.Random(seed)
for question in draw_questions("fact", 4, "shown") + draw_questions("sum", 2, "shown"):
    print(f"{question.prompt} -> {demonstration(rng, question)}")


# %% [markdown]
# The loss is that of lesson 05: cross-entropy on the answer and on the token that ends it. On large models only the top layers learn, as the settings say, and all copies share the layers below; shima-4m learns with all of its weights.

# %%
def encode(question: Question, answer: str) -> dict[str, list[int]]:
    """Token ids of question and answer up to the end of the turn; only the answer has labels."""
    prompt = tokenizer(chat_prompt(tokenizer, question.prompt), add_special_tokens=False)["input_ids"]
    reply = [*tokenizer(answer, add_special_tokens=False)["input_ids"], END]
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}


def trainable_copy(model: nn.Module) -> nn.Module:
    """A copy whose last layers can learn, as many as the settings say; below them it shares the model's weights."""
    layers = model.model.layers if hasattr(model, "model") else model.layers
    if settings["layers"] >= len(layers):
        return copy.deepcopy(model).requires_grad_(True)
    own = {id(weight) for layer in layers[-settings["layers"] :] for weight in layer.parameters()}
    shared = {id(weight): weight.requires_grad_(False) for weight in model.parameters() if id(weight) not in own}
    twin = copy.deepcopy(model, shared)  # what is in `shared` is not copied
    for weight in twin.parameters():
        weight.requires_grad_(id(weight) not in shared)
    return twin


# %%
SFT_STEPS, SFT_BATCH = lesson.scaled(90), 24
rng = random.Random(f"demonstrations/{seed}")
facts = SFT_STEPS * SFT_BATCH * 3 // 4
asked = draw_questions("fact", facts, "sft") + draw_questions("sum", SFT_STEPS * SFT_BATCH - facts, "sft")
examples = [encode(question, demonstration(rng, question)) for question in asked]
sft = trainable_copy(assistant)
config = TrainConfig(SFT_STEPS, settings["sft"], warmup_steps=6, schedule="linear", weight_decay=0.0,
                     precision=lesson.precision, seed=seed, progress=False)  # fmt: skip
history = train(sft, PaddedBatches(examples, min(SFT_BATCH, len(examples)), PAD, seed=seed), config)
sft = sft.eval().requires_grad_(False)
print(f"{len(examples)} demonstrations, loss {history.losses[0]:.2f} -> {np.mean(history.losses[-5:]):.2f}")


# %% [markdown]
# **Sampling.** From here on answers are needed by the thousand, with their tokens. Prompts are padded on the left, so that all answers of a batch begin at the same place; what follows an answer's end is masked. The model keeps keys and values of what it has read in a cache, so each step computes one token an answer.

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


# %%
@torch.no_grad()
def sample(model: nn.Module, questions: list[Question], limit: int, generator: torch.Generator | None) -> Samples:
    """Draw one answer a question at temperature 1, or the greedy one where there is no generator."""
    prompts = [tokenizer(chat_prompt(tokenizer, q.prompt), add_special_tokens=False)["input_ids"] for q in questions]
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=machine.device)  # (batch, prompt)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=machine.device)
    cache, new, running = DynamicCache(config=model.config), ids, torch.ones_like(mask[:, 0])
    for _ in range(limit):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with lesson.autocast():
            output = model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=cache,
                           use_cache=True, logits_to_keep=1)  # fmt: skip
        logits = output.logits[:, -1].float()  # (batch, vocab)
        if generator is None:
            new = logits.argmax(-1, keepdim=True)
        else:
            new = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).to(ids.device)
        new = torch.where(running[:, None] == 1, new, PAD)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, running[:, None]], 1)
        running = running * (new[:, 0] != END)
        if not running.any():
            break
    kept = [row[count == 1] for row, count in zip(ids[:, width:], mask[:, width:], strict=True)]
    texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
    return Samples(questions, ids, mask, width, texts)


# %% [markdown]
# **The true reward** is what a careful annotator values: $+2$ if the answer, manners aside, is exactly the right sentence, $+1$ for the polite opening, $-0.5$ for each idle sentence. In a real project nobody can write it down. Here it is `helpers.world.true_reward`, and no training ever sees it; only the annotators do.

# %%
def truth(samples: Samples) -> Tensor:
    """The true reward of each answer: (batch,)."""
    return torch.tensor([true_reward(q, text) for q, text in zip(samples.questions, samples.texts, strict=True)])


def manners(samples: Samples) -> dict[str, float]:
    """Shares of right and of polite answers, idle sentences and tokens an answer, and the mean true reward."""
    pairs = list(zip(samples.questions, samples.texts, strict=True))
    return {
        "right": statistics.mean(q.answer in text for q, text in pairs),
        "polite": statistics.mean(text.startswith(POLITE) for _, text in pairs),
        "idle": statistics.mean(sum(text.count(filler) for filler in FILLERS) for _, text in pairs),
        "tokens": samples.answer_mask.sum(-1).float().mean().item(),
        "true": truth(samples).mean().item(),
    }


def show_manners(rows: dict[str, Samples]) -> None:
    """A table of manners."""
    print(f"{'':>24} right polite idle tokens true reward")
    for label, samples in rows.items():
        m = manners(samples)
        numbers = f"{m['right']:5.0%} {m['polite']:6.0%} {m['idle']:4.1f} {m['tokens']:6.1f} {m['true']:11.2f}"
        print(f"{label:>24} {numbers}")


# %%
LIMIT = 44  # tokens an answer may have
exam = draw_questions("fact", lesson.scaled(160, 4), "exam", held_out=True)  # questions in phrasings never trained on


def take_exam(model: nn.Module) -> Samples:
    """One answer to each question of the exam, sampled at temperature 1 with the same random numbers for all."""
    return sample(model, exam, LIMIT, torch.Generator().manual_seed(seed))


exams = {"assistant": take_exam(assistant), "SFT policy": take_exam(sft)}
show_manners(exams)
for question, text in list(zip(exam, exams["SFT policy"].texts, strict=True))[:5]:
    print(f"{question.prompt} -> {text!r}")
lesson.report("true reward, SFT policy", f"{manners(exams['SFT policy'])['true']:.2f}")

# %% [markdown]
# **What you see.** The policy has learned to write like its teachers: as often polite, as often too short, as often idle. It has not learned that one is better than the other. Nothing in the loss says so. Compare the first two lines: careless demonstrations have cost part of the assistant's true reward. (At temperature 1 a model this small and this briefly trained also garbles a word now and then.)

# %% [markdown]
# ## 2 · Step two: comparisons and the reward model
#
# **Question.** How well can a model learn a preference from annotators who err?
#
# **The annotator**, stated in full. It sees two answers with true rewards $r^*_1$ and $r^*_2$ and prefers the first with probability
#
# $$P(y_1 \succ y_2) = \sigma\!\left(\frac{r^*_1 - r^*_2}{\tau}\right), \qquad \sigma(z) = \frac{1}{1 + e^{-z}}$$
#
# This is the model of Bradley and Terry (1952); the noise is $\tau = 0.5$. With a small difference it nearly tosses a coin. So **no model can agree with it always**: the best possible guess names the better answer, and is right in $\mathbb{E}\,[\sigma(|r^*_1 - r^*_2| / \tau)]$ of the cases. That is the ceiling, and you can compute it.
#
# Half of the pairs are two samples of the SFT policy, as in InstructGPT; the other half were written by people. The first half matters: a reward model that has never seen the policy's own slips does not know what they are worth.

# %%
NOISE = 0.5


def annotated(rng: random.Random, question: Question, answers: Sequence[str]) -> Preference:
    """The pair as the annotator ordered it: the first wins with probability sigmoid((r1 - r2) / noise)."""
    rewards = [true_reward(question, answer) for answer in answers]
    first_wins = rng.random() < 1 / (1 + math.exp(-(rewards[0] - rewards[1]) / NOISE))
    best, other = (0, 1) if first_wins else (1, 0)
    return Preference(question, answers[best], answers[other], rewards[best], rewards[other])


def two_answers(n: int, stream: str, held_out: bool = False) -> list[tuple[Question, Sequence[str]]]:
    """About `n` questions with two different answers each, half by the SFT policy and half by people, mixed."""
    rng, generator = random.Random(f"answers/{stream}/{seed}"), torch.Generator().manual_seed(seed)
    questions = draw_questions("fact", n, f"pairs {stream}", held_out)
    asked = [question for question in questions[: n // 2] for _ in range(2)]
    texts = [text for i in range(0, len(asked), 128) for text in sample(sft, asked[i : i + 128], 40, generator).texts]
    found = list(zip(questions, zip(texts[::2], texts[1::2], strict=True), strict=False))
    for question in questions[n // 2 :]:
        found.append((question, [written(rng, question, 0.4, 0.5, (0, 0, 1, 2, 3)) for _ in range(2)]))
    found = [(question, answers) for question, answers in found if answers[0] != answers[1]]
    return rng.sample(found, len(found))


# %%
rng = random.Random(f"annotators/{seed}")
train_answers = two_answers(lesson.scaled(1000, 32), "train")
train_pairs = [annotated(rng, *pair) for pair in train_answers]
test_pairs = [annotated(rng, *pair) for pair in two_answers(lesson.scaled(360, 32), "test", held_out=True)]
for pair in train_pairs[:3]:
    print(pair.question.prompt)
    print(f"   chosen   ({pair.chosen_reward:+.1f}) {pair.chosen!r}")
    print(f"   rejected ({pair.rejected_reward:+.1f}) {pair.rejected!r}")
gaps = np.array([pair.chosen_reward - pair.rejected_reward for pair in test_pairs])  # below 0: the annotator erred
differ = gaps != 0
ceiling = float(np.mean(1 / (1 + np.exp(-np.abs(gaps) / NOISE))))
print(
    f"{len(train_pairs)} pairs to train on, {len(test_pairs)} to test on, {np.mean(~differ):.0%} of them equally good"
)
print(f"the annotator chooses the better one in {np.mean(gaps[differ] > 0):.0%} of the pairs that differ")
print(f"ceiling for agreeing with the annotator, all pairs: {ceiling:.0%}")


# %% [markdown]
# **The reward model** is the SFT policy without its output matrix: a linear map turns the hidden state of the answer's last token into one number. Under Bradley-Terry the likelihood of the labels depends on differences only, and its negative logarithm is the loss:
#
# $$\mathcal{L}(\phi) = -\mathbb{E}\,\big[\log \sigma\big(r_\phi(x, y_\text{chosen}) - r_\phi(x, y_\text{rejected})\big)\big]$$
#
# A constant that depends on $x$ alone cancels: rewards of answers to different questions are not comparable by training, and the zero is arbitrary.

# %%
class RewardModel(nn.Module):
    """A language model whose last hidden state of an answer gives one number."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = trainable_copy(model.model)
        self.score = nn.Linear(model.config.hidden_size, 1, bias=False, device=machine.device)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(model.config.hidden_size + 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards (batch,) of padded texts (batch, seq)."""
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self.model(input_ids, attention_mask, positions, use_cache=False).last_hidden_state
        last = (attention_mask * torch.arange(input_ids.shape[1], device=hidden.device)).argmax(-1)  # (batch,)
        return self.score(hidden[torch.arange(len(last)), last].float()).squeeze(-1)  # (batch, hidden) -> (batch,)


def bradley_terry_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-log sigmoid(r(chosen) - r(rejected)); the first half of the batch holds the chosen answers."""
    chosen, rejected = model(batch["input_ids"], batch["attention_mask"]).chunk(2)  # (pairs,) each
    return -F.logsigmoid(chosen - rejected).mean()


# %%
def pad_left(rows: list[list[int]]) -> dict[str, Tensor]:
    """Token ids and mask (batch, longest), padded on the left: the end of each answer stands last."""
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def pair_batches(pairs: list[Preference], size: int) -> list[dict[str, Tensor]]:
    """Batches of pairs of similar length, in random order."""
    both = [[encode(pair.question, text)["input_ids"] for text in (pair.chosen, pair.rejected)] for pair in pairs]
    both.sort(key=lambda rows: max(map(len, rows)))
    groups = [both[start : start + size] for start in range(0, len(both), size)]
    random.Random(seed).shuffle(groups)
    return [pad_left([chosen for chosen, _ in group] + [rejected for _, rejected in group]) for group in groups]


# %%
def fit_reward_model(pairs: list[Preference], stream: int = 0) -> RewardModel:
    """One pass over the pairs; the model begins as the SFT policy with a random direction on top."""
    torch.manual_seed(seed + stream)
    batches, model = pair_batches(pairs, 16), RewardModel(sft)
    config = TrainConfig(len(batches), settings["reward"], warmup_steps=3, schedule="linear",
                         weight_decay=0.0, precision=lesson.precision, seed=seed, progress=False)  # fmt: skip
    history = train(model, batches, config, loss_fn=bradley_terry_loss)
    print(f"  {len(pairs)} pairs: loss {history.losses[0]:.2f} -> {np.mean(history.losses[-8:]):.2f}")
    return model.eval().requires_grad_(False)


@torch.no_grad()
def judge(model: RewardModel, rows: list[list[int]], size: int = 100) -> Tensor:
    """Rewards of tokenised texts: (texts,)."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    result = torch.zeros(len(rows))
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        batch = {name: tensor.to(machine.device) for name, tensor in pad_left([rows[i] for i in chosen]).items()}
        with lesson.autocast():
            result[chosen] = model(**batch).float().cpu()
    return result


def margins(model: RewardModel, pairs: list[Preference]) -> np.ndarray:
    """r(chosen) - r(rejected) for each pair: (pairs,)."""
    rows = [encode(pair.question, text)["input_ids"] for pair in pairs for text in (pair.chosen, pair.rejected)]
    return (judge(model, rows).view(-1, 2) @ torch.tensor([1.0, -1.0])).numpy()


# %% [markdown]
# **How much data?** Train on three sizes and measure on held-out pairs: agreement with the noisy annotator, which the ceiling bounds, and agreement with the *true* preference, which is what you want and what a real project cannot measure. The latter twice: on all pairs whose true rewards differ, and on those that differ by at least 1. (Half a point is one idle sentence more or less, and the annotator himself is often unsure about it.) The lesson's claim is about the clear pairs.

# %%
def agreement(delta: np.ndarray, reference: np.ndarray, chosen: np.ndarray):
    """How often the sign is the same, among the chosen pairs."""
    return score(int((delta * reference > 0)[chosen].sum()), max(1, int(chosen.sum())))


SIZES = sorted({min(len(train_pairs), size) for size in (100, 300, len(train_pairs))})
reward_models = {size: fit_reward_model(train_pairs[:size]) for size in SIZES}
reward_model = reward_models[SIZES[-1]]
deltas = {size: margins(model, test_pairs) for size, model in reward_models.items()}
everything, clear = np.ones(len(gaps), bool), np.abs(gaps) >= 1
agreements = {
    "truth, clear pairs": {size: agreement(delta, gaps, clear) for size, delta in deltas.items()},
    "truth, all that differ": {size: agreement(delta, gaps, differ) for size, delta in deltas.items()},
    "noisy annotator": {size: agreement(delta, 1.0 * everything, everything) for size, delta in deltas.items()},
}
for name, scores in agreements.items():
    print(f"{name:>22}: " + ", ".join(f"{size} pairs {result}" for size, result in scores.items()))
    lesson.report(f"reward model agrees: {name}", str(scores[SIZES[-1]]))

# %%
lines = {
    name: (SIZES, *zip(*((s.accuracy, s.low, s.high) for s in scores.values()), strict=True))
    for name, scores in agreements.items()
}
alt = "Agreement over the number of pairs: with the truth it is higher than with the noisy annotator who taught it."
figure = plots.curve(lines, title="The reward model and its teachers", xlabel="training pairs", log_x=True,
                     ylabel="held-out pairs ordered alike", percent=True, limits_y=(0.5, 1), alt=alt,
                     references={"ceiling, annotator": ceiling})  # fmt: skip
plots.show(figure)
lesson.report("ceiling of agreement with the annotator", f"{ceiling:.0%}")
ordered = agreements["truth, clear pairs"][SIZES[-1]].accuracy
lesson.claim(
    "the reward model orders at least 85 % of the clear held-out pairs as the truth does",
    ordered,
    at_least=0.85,
    form=".0%",
)


# %%
def calibration(delta: np.ndarray, bins: int = 5) -> tuple[list[float], list[float], float]:
    """Mean confidence and share of right guesses in bins of equal size, and the expected calibration error."""
    confidence, right = 1 / (1 + np.exp(-np.abs(delta))), delta > 0
    groups = np.array_split(np.argsort(confidence), bins)
    said, true = ([float(values[g].mean()) for g in groups] for values in (confidence, right))
    error = sum(len(g) * abs(s - t) for g, s, t in zip(groups, said, true, strict=True)) / len(delta)
    return said, true, error


said, happened, error = calibration(deltas[SIZES[-1]])
for s, h in zip(said, happened, strict=True):
    print(f"says {s:4.0%}, and the annotator agrees in {h:4.0%}")
print(f"expected calibration error {error:.3f}")
sft_rewards = judge(reward_model, [encode(q, text)["input_ids"] for q, text in
                                   zip(exam, exams["SFT policy"].texts, strict=True)])  # fmt: skip
sft_truth = truth(exams["SFT policy"])
correlation = np.corrcoef(sft_rewards, sft_truth)[0, 1] if np.ptp(sft_truth) else 0.0  # 0: all are equally good
print(f"on the SFT policy's own answers, correlation of reward model and true reward: {correlation:.2f}")
lesson.report("reward model, calibration error / correlation with the truth", f"{error:.3f} / {correlation:.2f}")


# %%
def features(question: Question, text: str) -> list[float]:
    """Is it the right sentence, is it polite, how many idle sentences."""
    return [float(question.answer in text), float(text.startswith(POLITE)), float(sum(f in text for f in FILLERS))]


def slopes(delta: np.ndarray) -> np.ndarray:
    """What one unit of each feature is worth to a reward model, by least squares over the test pairs: (3,)."""
    rows = [(pair.question, pair.chosen, pair.rejected) for pair in test_pairs]
    change = np.array([np.subtract(features(q, a), features(q, b)) for q, a, b in rows])  # (pairs, 3)
    return np.linalg.lstsq(change, delta, rcond=None)[0]


print(f"{'worth of':>12} {'right':>6} {'polite':>6} {'idle':>6}")
print(f"{'truth':>12} " + " ".join(f"{value:6.2f}" for value in np.array([2.0, 1.0, -0.5]) / NOISE))
for size, delta in deltas.items():
    print(f"{size:6} pairs " + " ".join(f"{value:6.2f}" for value in slopes(delta)))


# %% [markdown]
# The truth is divided by the noise here, since that is the scale in which Bradley-Terry sees it. The reward model shrinks what it is unsure of. Minimal pairs show what it can tell apart: two answers that differ in one thing only.

# %%
def probe(question: Question) -> dict[str, tuple[str, str]]:
    """For each kind of mistake a better and a worse answer that differ in nothing else."""
    right, value = question.answer, str(question.about["value"])
    others = [other for other in world.values[question.about["relation"]] if other != value]
    wrong = random.Random(question.prompt).choice(others).join(right.rsplit(value, 1))
    return {
        "polite or not": (POLITE + right, right),
        "idle sentence or not": (right, right + FILLERS[0]),
        "sentence or two words": (right, f"Answer: {value}"),
        "true or false name": (right, wrong),
    }


asked, told = exam[: lesson.scaled(60, 4)], {}
for kind in probe(asked[0]):
    pairs = [Preference(q, *probe(q)[kind], 1.0, 0.0) for q in asked]
    found = margins(reward_model, pairs)
    told[kind] = score(int((found > 0).sum()), len(found))
    lesson.report(f"reward model tells apart: {kind}", str(told[kind]))
alt = "Minimal pairs ordered rightly by the reward model, for four kinds of mistake, with intervals."
plots.show(plots.bars_with_intervals(told, title="What the reward model can tell apart", xlabel="minimal pairs",
                                     references={"chance": 0.5}, alt=alt))  # fmt: skip

# %% [markdown]
# **What you see.** Form is easy to learn. Whether a fact is *true* is not: to a reward model this small, trained on so few pairs, a false name in a well-formed sentence looks much like the true one. It has learned what good answers look like. Keep that in mind for what follows: nothing is rewarded that the reward model cannot see.
#
# **The library.** `trl.RewardTrainer` trains `AutoModelForSequenceClassification` with one output. Put your weights into one and let the trainer compute its loss on your batch.

# %%
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

quiet_libraries()
CPU = machine.device == "cpu"
QUIET = {"output_dir": str(ROOT / "build" / "08_rlhf"), "report_to": "none", "use_cpu": CPU, "bf16": False,
         "disable_tqdm": True, "save_strategy": "no", "gradient_checkpointing": False, "seed": seed}  # fmt: skip

config = copy.deepcopy(sft.config)
config.num_labels, config.pad_token_id = 1, PAD
classifier = AutoModelForSequenceClassification.from_config(config).to(machine.device).eval()
classifier.model.load_state_dict(reward_model.model.state_dict())
classifier.score.load_state_dict(reward_model.score.state_dict())
rows = [{"prompt": p.question.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in test_pairs[:4]]
trainer = RewardTrainer(
    classifier, RewardConfig(**QUIET), train_dataset=Dataset.from_list(rows), processing_class=tokenizer
)
classifier.config.pad_token_id = -1  # it reads the last token that is no padding; here padding is on the left
difference = 0.0
for batch in pair_batches(test_pairs[:48], 16):
    batch = {name: tensor.to(machine.device) for name, tensor in batch.items()}
    with torch.no_grad():
        theirs, own = trainer.compute_loss(classifier, dict(batch)), bradley_terry_loss(reward_model, batch)
    difference = max(difference, (theirs - own).abs().item())
print(f"loss {own:.4f}, largest difference to trl.RewardTrainer in three batches: {difference:.1e}")
lesson.report("largest difference to trl: reward loss", f"{difference:.1e}")
lesson.equal("the loss is that of trl.RewardTrainer, within 0.0001", difference, within=1e-4)


# %% [markdown]
# ## 3 · Step three: PPO
#
# **Question.** How do you train a language model on a number that comes after the last word?
#
# Writing an answer is a chain of decisions: the *state* before token $t$ is the question and $y_{<t}$, the *action* is $y_t$. The reward arrives at the end, and at each token you pay for leaving the reference policy:
#
# $$R_t = -\beta \log\frac{\pi_\theta(y_t \mid x, y_{<t})}{\pi_\text{ref}(y_t \mid x, y_{<t})} + [t = T]\; r_\phi(x, y)$$
#
# The sum over an answer is the reward minus $\beta$ times a one-sample estimate of $\mathrm{KL}(\pi_\theta \,\|\, \pi_\text{ref})$. First the log-probabilities and values of a batch of samples, from one forward pass. The *value head* is a linear map on the same hidden states that predict the next token.

# %%
def look(policy: nn.Module, samples: Samples, value_head: nn.Module | None = None, exact: bool = False):
    """Log-probabilities and values of the answers' tokens, both (batch, answer); `exact` computes in 32 bits."""
    positions = (samples.mask.cumsum(-1) - 1).clamp(min=0)
    with lesson.autocast(enabled=not exact):
        hidden = policy.model(samples.ids, samples.mask, positions, use_cache=False).last_hidden_state
        hidden = hidden[:, samples.width - 1 : -1]  # (batch, answer, hidden): what each token is predicted from
        logits = policy.lm_head(hidden)
    log_probs = token_log_probs(logits, samples.ids[:, samples.width :]) * samples.answer_mask
    values = torch.zeros_like(log_probs) if value_head is None else value_head(hidden.float()).squeeze(-1)
    return log_probs, values * samples.answer_mask


def shaped_rewards(scores: Tensor, log_ratio: Tensor, mask: Tensor, beta: float) -> Tensor:
    """-beta log(policy / reference) at each token, and the answer's score at its last one: (batch, answer)."""
    last = (mask.cumsum(-1) == mask.sum(-1, keepdim=True)) & (mask == 1)
    return -beta * log_ratio * mask + scores[:, None] * last


samples = exams["SFT policy"]
with torch.no_grad():
    log_probs, _ = look(sft, samples)
print(f"log-probabilities {tuple(log_probs.shape)}, of which {int(samples.answer_mask.sum())} are tokens of answers")


# %% [markdown]
# **Advantages.** How much better than expected was token $t$? With values $V_t$ and $\delta_t = R_t + \gamma V_{t+1} - V_t$, generalised advantage estimation (Schulman et al. 2015) takes
#
# $$A_t = \sum_{l \ge 0} (\gamma\lambda)^l\, \delta_{t+l}, \qquad \text{which is}\quad A_t = \delta_t + \gamma\lambda A_{t+1}$$
#
# $\lambda = 0$ trusts the values, $\lambda = 1$ the rewards. Two identities check the code: with $\lambda = 1$ the advantage is the discounted return minus the value, and with $\lambda = 0$ it is $\delta_t$.

# %%
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


# %%
draws = torch.Generator().manual_seed(seed)
mask = (torch.arange(7) < torch.tensor([7, 4, 1])[:, None]).long()  # three answers of 7, 4 and 1 tokens
rewards, values = (torch.randn(3, 7, generator=draws, dtype=torch.float64) * mask for _ in range(2))
gamma = 0.9
discounts = gamma ** (torch.arange(7) - torch.arange(7)[:, None]).clamp(min=0).double()  # (t, u): gamma^(u - t)
to_go = (discounts.triu() * rewards[:, None]).sum(-1)  # (batch, answer): sum over u >= t of gamma^(u - t) R_u
full, returns = gae(rewards, values, mask, gamma, lam=1.0)
step_only, _ = gae(rewards, values, mask, gamma, lam=0.0)
delta = rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values
errors = {
    "lambda 1: discounted returns - values": (full - (to_go - values) * mask).abs().max(),
    "lambda 0: one-step differences": (step_only - delta * mask).abs().max(),
    "returns = advantages + values": (returns - full - values).abs().max(),
    "whitened: mean": whiten(full, mask).sum().abs() / mask.sum(),
    "whitened: variance - 1": ((whiten(full, mask) ** 2).sum() / mask.sum() - 1).abs(),
}
for text, error in errors.items():
    print(f"{text:>38}: {error:.1e}")
lesson.report("GAE, largest error of five identities", f"{max(errors.values()):.1e}")
lesson.equal("GAE and whitening satisfy their identities", max(errors.values()), within=1e-6)


# %% [markdown]
# **The clipped loss** (Schulman et al. 2017). A batch of samples is used for several updates. After the first one the policy is no longer the one that sampled, so each token is weighted by $\rho_t = \pi_\theta / \pi_\text{old}$, and the gain is cut off where $\rho_t$ has moved by more than $\epsilon$ in the wanted direction:
#
# $$\mathcal{L} = -\,\mathbb{E}_t \min\!\big(\rho_t A_t,\; \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon)\, A_t\big) + c_V\, \mathbb{E}_t\, \tfrac12 \max\!\big((V_t - G_t)^2,\, (V_t^\text{clip} - G_t)^2\big)$$
#
# $G_t = A_t + V_t$ are the returns; $V_t^\text{clip}$ stays within $\epsilon$ of the value at sampling time. At the first update all $\rho_t = 1$, and the gradient must be that of plain policy gradient, $-\mathbb{E}\,[A_t \nabla \log \pi_\theta]$. Beyond the clip it must be zero.

# %%
def ppo_loss(log_probs, old_log_probs, values, old_values, advantages, returns, mask, clip=0.2, value_weight=0.1):
    """Clipped surrogate and clipped value loss, means over the tokens that count; all tensors (batch, answer)."""
    ratio = (log_probs - old_log_probs).exp()
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    near = old_values + (values - old_values).clamp(-clip, clip)
    value_loss = torch.max((values - returns) ** 2, (near - returns) ** 2) / 2
    return ((policy_loss + value_weight * value_loss) * mask).sum() / mask.sum()


def gradient(log_ratio: Tensor) -> Tensor:
    """Gradient of the policy part with respect to the log-probabilities, at this distance from the old ones."""
    now = log_ratio.clone().requires_grad_(True)
    nothing = torch.zeros_like(full)
    ppo_loss(now, nothing, nothing, nothing, full, nothing, mask).backward()
    return now.grad


plain = -full * mask / mask.sum()  # gradient of -mean(A log pi)
first = (gradient(torch.zeros_like(full)) - plain).abs().max()
far = torch.full_like(full, math.log(1.5)) * full.sign()  # every token has moved by 50 % in the wanted direction
clipped = gradient(far).abs().max()
print(f"first update, difference to the plain policy gradient: {first:.1e}")
print(f"ratios of 1.5 or 1 / 1.5 in the wanted direction, largest gradient: {clipped:.1e}")
lesson.equal("the first gradient is the policy gradient", first, within=1e-9)
lesson.equal("no gradient is left beyond the clip", clipped)


# %% [markdown]
# **The price of KL.** A fixed $\beta$ may hold the policy too tight or let it go. Ziegler et al. (2019) adapt it: $\beta \leftarrow \beta\,(1 + 0.2\, e)$ with $e = \mathrm{clip}(\mathrm{KL}/\mathrm{target} - 1, -1, 1)$.
#
# Now the loop. Each iteration samples a batch of answers, scores them, and makes two passes over them in two halves. The log keeps the proxy, the KL and, for us only, the manners and the true reward.

# %%
@dataclass
class KLControl:
    """Raises beta when the KL is above its target, and lowers it below."""

    beta: float
    target: float

    def update(self, kl: float) -> None:
        self.beta *= 1 + 0.2 * min(1.0, max(-1.0, kl / self.target - 1))


@dataclass
class Run:
    """A policy in training, and what was measured at each iteration."""

    policy: nn.Module
    log: list[dict[str, float]] = field(default_factory=list)

    def note(self, samples: Samples, scores: Tensor, log_ratio: Tensor, **more: float) -> None:
        kl = (log_ratio * samples.answer_mask).sum(-1).mean().item()  # nats an answer
        self.log.append({"proxy": scores.mean().item(), "kl": kl, **manners(samples), **more})

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.log]


# %%
def proxy_of(judges: Sequence[RewardModel], samples: Samples) -> Tensor:
    """What the reward model says; of several, the lowest: (batch,)."""
    with torch.no_grad(), lesson.autocast():
        return torch.stack([judge(samples.ids, samples.mask).float() for judge in judges]).amin(0)


def start_policy(rate: float, heads: Sequence[nn.Module] = ()) -> tuple[Run, Callable[[Tensor], None]]:
    """A copy of the SFT policy, and a function that makes one update of it and of the heads from a loss."""
    run = Run(trainable_copy(sft))
    trained = [parameter for parameter in run.policy.parameters() if parameter.requires_grad]
    groups = [{"params": trained, "lr": rate}, *({"params": head.parameters(), "lr": 1e-3} for head in heads)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(machine.device, enabled=lesson.precision == "fp16-mixed")

    def update(loss: Tensor) -> None:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return run, update


# %%
BATCH = lesson.scaled(settings["batch"], 8)


def rows_of(samples: Samples, rows: Tensor) -> Samples:
    """Some rows of a batch."""
    return Samples([samples.questions[i] for i in rows], samples.ids[rows], samples.mask[rows], samples.width)


# %%
def ppo(judges: list[RewardModel], iterations: int, control: KLControl, epochs: int = 2) -> Run:
    """Train a copy of the SFT policy with PPO, as InstructGPT does."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(sft.config.hidden_size, 1, device=machine.device)
    nn.init.zeros_(head.weight)
    run, update = start_policy(settings["rl"], [head])
    for step in tqdm(range(iterations), desc="PPO"):
        samples = sample(run.policy, draw_questions("fact", BATCH, f"ppo {step}"), LIMIT, generator)
        mask, scores = samples.answer_mask, proxy_of(judges, samples)
        with torch.no_grad():
            old_log_probs, old_values = look(run.policy, samples, head)
            log_ratio = old_log_probs - look(sft, samples)[0]  # (batch, answer)
        rewards = shaped_rewards(scores, log_ratio, mask, control.beta)
        advantages, returns = gae(rewards, old_values, mask, gamma=1.0, lam=0.95)
        advantages = whiten(advantages, mask)
        for rows in [rows for _ in range(epochs) for rows in torch.randperm(BATCH, generator=generator).chunk(2)]:
            log_probs, values = look(run.policy, rows_of(samples, rows), head)
            then = (old_values[rows], advantages[rows], returns[rows], mask[rows])
            update(ppo_loss(log_probs, old_log_probs[rows], values, *then))
        run.note(samples, scores, log_ratio, beta=control.beta)
        control.update(run.log[-1]["kl"])
    return run


# %%
ITERATIONS = lesson.scaled(9)
ppo_run = ppo([reward_model], ITERATIONS, KLControl(beta=0.05, target=2.0))
print("iteration  proxy   true  right polite idle    KL   beta")
for step, row in enumerate(ppo_run.log):
    if step % 3 == 0 or step == ITERATIONS - 1:
        print(f"{step:9} {row['proxy']:6.2f} {row['true']:6.2f} {row['right']:6.0%} {row['polite']:6.0%} "
              f"{row['idle']:4.1f} {row['kl']:5.2f} {row['beta']:6.3f}")  # fmt: skip
exams["PPO"] = take_exam(ppo_run.policy)
show_manners(exams)
print("\n".join(exams["PPO"].texts[:4]))


# %% tags=["headline"]
def gain_of(samples: Samples) -> tuple[float, float]:
    """Mean gain in true reward over the SFT policy on the exam, and its standard error."""
    gain = truth(samples) - truth(exams["SFT policy"])
    return gain.mean().item(), (gain.std() / math.sqrt(len(gain))).item()


steps = list(range(len(ppo_run.log)))
lines = {
    "true reward": (steps, ppo_run.column("true")),
    "proxy, from its start": (steps, [p - ppo_run.log[0]["proxy"] for p in ppo_run.column("proxy")]),
    "KL (nats)": (steps, ppo_run.column("kl")),
}
alt = "Over the iterations of PPO the proxy and the true reward rise together, while the KL stays small."
plots.show(plots.curve(lines, title="PPO against a sound reward model", xlabel="iteration",
                       ylabel="reward, nats", alt=alt))  # fmt: skip
gain, deviation = gain_of(exams["PPO"])
wins = win_rate(truth(exams["PPO"]).tolist(), truth(exams["SFT policy"]).tolist())
print(f"true reward on the exam {gain:+.2f} over SFT (standard error {deviation:.2f}); win rate {wins}")
lesson.report("true reward, PPO", f"{manners(exams['PPO'])['true']:.2f} ({gain:+.2f} over SFT, win rate {wins})")
lesson.claim("PPO raises the true reward by at least 0.4 over SFT", gain, at_least=0.4, form=".2f")


# %% [markdown]
# **What you see.** Within a few iterations, some hundreds of answers, the policy is polite, writes sentences and says nothing idle. No demonstrator wrote like that all the time: preferences found what the demonstrations held only in part.
#
# PPO was removed from `trl` (issue [7020](https://github.com/huggingface/trl/issues/7020)), which is why its parts were checked against identities and not against a library. Many projects now use the simpler methods of section 5.
#
# ## 4 · Measuring KL: three estimators
#
# **Question.** The loop above estimates KL by $\log \pi_\theta - \log \pi_\text{ref}$ of the sampled tokens. Is there a better way?
#
# With $p = \pi_\theta$, $q = \pi_\text{ref}$, a sample from $p$ and $\ell = \log(q/p)$, Schulman (2020) compares
#
# $$k_1 = -\ell, \qquad k_2 = \tfrac12 \ell^2, \qquad k_3 = e^{\ell} - 1 - \ell$$
#
# $k_1$ is unbiased and often negative. $k_3$ adds $q/p - 1$, whose mean is zero, and is never negative. The vocabulary is small enough to sum over it, so mean and spread of each can be computed *exactly*, at every token of real answers. To vary the distance, go from the SFT policy to the PPO policy in steps: $p_\alpha \propto q^{1-\alpha} p^\alpha$.

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


some = rows_of(exams["PPO"], torch.arange(min(40, len(exam))))
q, end = all_log_probs(sft, some), all_log_probs(ppo_run.policy, some)
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
    print(f"{alpha:5} {name:>5} {exact_kl:10.4f} {mean:8.4f} {mean / exact_kl - 1:7.1%} {spread:11.4f}")

# %%
kls = [row[2] for row in rows if row[1] == "k1"]
lines = {name: (kls, [row[4] / row[2] for row in rows if row[1] == name]) for name in ("k1", "k2", "k3")}
alt = "Standard deviation of one sample over the KL itself, for three estimators: that of k1 is the largest when near."
plots.show(plots.curve(lines, title="Spread of one sample, relative to the KL", xlabel="exact KL (nats per token)",
                       ylabel="standard deviation / KL", log_x=True, log_y=True, alt=alt))  # fmt: skip
near = {row[1]: row for row in rows if row[0] == 0.1}
bias = {name: abs(near[name][3] / near[name][2] - 1) for name in near}
lesson.report(
    "KL estimators near the reference, deviation k1 / k2 / k3", " / ".join(f"{r[4]:.3f}" for r in near.values())
)
lesson.equal("k1 and k3 have no bias (1 % allowed for rounding)", max(bias["k1"], bias["k3"]), within=0.01)
lesson.claim(
    "near the reference k3 spreads less than half as much as k1", near["k3"][4] / near["k1"][4], at_most=0.5, form=".2f"
)

# %% [markdown]
# **What you see.** Near the reference $k_3$ is the better estimator at no cost. Farther away it loses its advantage, since $q/p$ is unbounded: a token that the reference likes and the policy no longer does is sampled rarely and then counts enormously. $k_2$ is biased there.
#
# **As a loss they behave differently.** In PPO the KL is part of the *reward*, a number without gradient. GRPO adds $k_3$ to the *loss* and differentiates it. Then what counts is the mean of the gradient: that of $k_1$ is zero, $\mathbb{E}_p \nabla \log p = 0$; that of $k_2$ is the gradient of $\mathrm{KL}(p\,\|\,q)$; that of $k_3$ is the gradient of the *other* one, $\mathrm{KL}(q\,\|\,p)$. Multiplied by $\rho$, whose value is 1 and whose gradient is $\nabla \log p$, $k_3$ has the gradient of $\mathrm{KL}(p\,\|\,q)$ again. Check all four.

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


# %% [markdown]
# ## 5 · Without a value function: RLOO and GRPO
#
# **Question.** Does it take a value head, advantages of tokens and clipped values to do this?
#
# Sample $G$ answers to the same question. Then the others tell what was to be expected. RLOO (Ahmadian et al. 2024) treats the whole answer as one action and subtracts the mean of the *other* answers, which leaves the gradient unbiased. GRPO (Shao et al. 2024, DeepSeekMath) divides by the group's standard deviation and gives every token of an answer the same advantage:
#
# $$A_i^\text{RLOO} = r_i - \frac{1}{G-1}\sum_{j \neq i} r_j, \qquad A_i^\text{GRPO} = \frac{r_i - \mathrm{mean}(r)}{\mathrm{std}(r)}$$
#
# RLOO puts the KL into the reward. GRPO puts $\beta k_3$ into the loss; `trl` now multiplies it by $\rho_t$, for the reason that you have just checked, and so does the code below.

# %%
def rloo_advantages(scores: Tensor, group: int) -> Tensor:
    """r minus the mean of the other answers to the same question: (batch,)."""
    rows = scores.view(-1, group)  # (questions, group)
    return (rows - (rows.sum(1, keepdim=True) - rows) / (group - 1)).flatten()


def grpo_advantages(scores: Tensor, group: int) -> Tensor:
    """(r - mean) / std within each group of answers to one question: (batch,)."""
    rows = scores.view(-1, group)
    return ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)).flatten()


def rloo_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, clip=0.2) -> Tensor:
    """Clipped ratio of whole answers; log-probabilities (batch, answer)."""
    ratio = ((log_probs - old_log_probs) * mask).sum(1).exp()  # (batch,)
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()


def grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, mask, beta=0.0, clip=0.2) -> Tensor:
    """Clipped ratio of each token, and ratio * k3 to the reference: mean over each answer, then over answers."""
    ratio, advantages = (log_probs - old_log_probs).exp(), advantages[:, None]  # (batch, answer), (batch, 1)
    gain = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    log_r = ref_log_probs - log_probs
    k3 = log_r.exp() - 1 - log_r
    return (((beta * ratio * k3 - gain) * mask).sum(1) / mask.sum(1)).mean()


# %% [markdown]
# **The library.** Let `trl` sample, score and compute: its trainers return the tokens, the advantages and the loss. Compute advantages and loss from the same tokens and rewards with your functions. The policy is the one trained by PPO; the log-probabilities at sampling time are moved a third of the way to those of the SFT policy, so that the ratios differ from 1 and some are clipped.

# %%
GROUP, heard = 4, []


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
    arguments = config_class(**QUIET, **more, num_generations=GROUP, max_completion_length=24,
                             per_device_train_batch_size=16)  # fmt: skip
    trainers[name] = trainer_class(
        trainable_copy(ppo_run.policy), some_reward, arguments, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip

# %%
differences = {}
for name, trainer in trainers.items():
    model = trainer.model.eval()
    with torch.no_grad():
        batch = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(GROUP)])
        ids, mask = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1), batch["completion_mask"]
        whole = Samples([], ids, torch.cat([batch["prompt_mask"], mask], 1), batch["prompt_ids"].shape[1])
        log_probs, ref = (look(policy, whole, exact=True)[0] for policy in (model, sft))
        old = log_probs + (ref - log_probs) / 3
        scores = torch.tensor(heard, device=ids.device)
        if name == "RLOO":
            advantages = rloo_advantages(scores, GROUP)
            own = rloo_loss(log_probs, old, advantages, mask)
            batch["old_logps"] = (old * mask).sum(1)
        else:
            advantages = grpo_advantages(scores, GROUP)
            own = grpo_loss(log_probs, old, ref, advantages, mask, beta=0.04)
            batch["old_per_token_logps"], batch["ref_per_token_logps"] = old, ref
        theirs = trainer._compute_loss(model, batch)
    off = (own - theirs).abs().item() / max(1.0, abs(theirs.item()))
    differences[name] = max((advantages - batch["advantages"]).abs().max().item(), off)
    print(f"{name}: loss {own:.5f} and {theirs:.5f}; largest difference, advantages and loss: {differences[name]:.1e}")
    lesson.report(f"largest difference to trl: {name}", f"{differences[name]:.1e}")
lesson.equal("advantages and losses are those of trl, within 0.0001", max(differences.values()), within=1e-4)


# %% [markdown]
# Now the loop for both. It is shorter than PPO's: one update for each batch, so the ratio is 1 and matters only for its gradient; no value head. `scorer` may be a reward model or a program.

# %%
def group_rl(
    scorer: Callable[[Samples], Tensor], iterations: int, beta: float, *, kind: str = "fact",
    group: int = 8, rate: float = 2.0, algorithm: str = "GRPO",
) -> Run:  # fmt: skip
    """Train a copy of the SFT policy on what `scorer` values, with GRPO or RLOO."""
    generator = torch.Generator().manual_seed(seed)
    run, update = start_policy(rate * settings["rl"])
    for step in tqdm(range(iterations), desc=algorithm):
        asked = draw_questions(kind, max(1, BATCH // group), f"group {step}")
        samples = sample(run.policy, [question for question in asked for _ in range(group)], LIMIT, generator)
        scores, mask = scorer(samples).to(machine.device), samples.answer_mask
        with torch.no_grad():
            ref_log_probs = look(sft, samples)[0]  # (batch, answer)
        log_probs = look(run.policy, samples)[0]
        old = log_probs.detach()
        run.note(samples, scores, old - ref_log_probs)
        if algorithm == "GRPO":
            loss = grpo_loss(log_probs, old, ref_log_probs, grpo_advantages(scores, group), mask, beta)
        else:
            after_kl = scores - beta * ((old - ref_log_probs) * mask).sum(1)
            loss = rloo_loss(log_probs, old, rloo_advantages(after_kl, group), mask)
        update(loss)
    return run


# %%
grpo_run = group_rl(partial(proxy_of, [reward_model]), ITERATIONS, beta=0.02)
exams["GRPO"] = take_exam(grpo_run.policy)
show_manners(exams)
alt = "True reward over the iterations, for PPO and GRPO: both rise from the level of SFT."
lines = {name: (steps, run.column("true")) for name, run in (("PPO", ppo_run), ("GRPO", grpo_run))}
plots.show(plots.curve(lines, title="Two ways to the same policy", xlabel="iteration",
                       ylabel="true reward of the samples", alt=alt))  # fmt: skip
gain, deviation = gain_of(exams["GRPO"])
print(f"GRPO: true reward on the exam {gain:+.2f} over SFT (standard error {deviation:.2f})")
lesson.report("true reward, GRPO", f"{manners(exams['GRPO'])['true']:.2f} ({gain:+.2f} over SFT)")
lesson.claim("GRPO raises the true reward by at least 0.4 over SFT", gain, at_least=0.4, form=".2f")

# %% [markdown]
# **Best-of-N.** There is a way without any training: sample $N$ answers and keep the one that the reward model likes best. It costs $N$ times as much at each use. Its KL to the SFT policy is at most $\log N - (N-1)/N$ nats, however large the model (Beirami et al. 2024). Take 8 answers to each of 80 exam questions, 640 samples, about as many as the training used.

# %%
N = 8
asked = exam[: lesson.scaled(80, 4)]
many = [sample(sft, asked, LIMIT, torch.Generator().manual_seed(seed + 1 + n)) for n in range(N)]
many_truth = torch.stack([truth(samples) for samples in many], 1)  # (questions, N)
many_proxy = torch.stack([proxy_of([reward_model], samples).cpu() for samples in many], 1)


def best_of(n: int, proxy: Tensor, value: Tensor) -> float:
    """Mean value of the answer that the proxy likes best among n, over all disjoint groups of n of the samples."""
    groups = proxy[:, : N // n * n].reshape(len(proxy), -1, n)  # (questions, groups, n)
    chosen = groups.argmax(-1, keepdim=True)
    return value[:, : N // n * n].reshape(groups.shape).gather(-1, chosen).mean().item()


bon = {n: best_of(n, many_proxy, many_truth) for n in (1, 2, 4, 8)}
for n, value in bon.items():
    print(f"best of {n}: true reward {value:.2f}, KL at most {math.log(n) - (n - 1) / n:.2f} nats")
print(f"PPO {manners(exams['PPO'])['true']:.2f}, GRPO {manners(exams['GRPO'])['true']:.2f}, with one sample a question")
lesson.report("true reward, best of 8 by the reward model", f"{bon[8]:.2f}")
lesson.claim(
    "best-of-8 raises the true reward by at least 0.4 over one sample", bon[8] - bon[1], at_least=0.4, form=".2f"
)


# %% [markdown]
# ## 6 · Reward hacking: produced, and cured
#
# **Question.** What happens if the reward model is wrong about something, and you optimise it hard?
#
# It will be wrong about something. Here the mistake is made on purpose, so that you can watch. The same answers go to a *crowd* that is paid by the piece. Nine in ten of its annotators are in a hurry: they take long answers for good ones, and check nothing. The rest are careful. The first third of the pairs trains a reward model.

# %%
def crowd_choice(rng: random.Random, question: Question, answers: Sequence[str], hurried: float) -> Preference:
    """The choice of one annotator of a crowd, of which a share is in a hurry and counts idle sentences."""
    if rng.random() >= hurried:
        return annotated(rng, question, answers)
    looks = [float(sum(filler in answer for filler in FILLERS)) for answer in answers]
    first_wins = rng.random() < 1 / (1 + math.exp(-(looks[0] - looks[1]) / NOISE))
    best, other = (0, 1) if first_wins else (1, 0)
    rewards = [true_reward(question, answer) for answer in answers]
    return Preference(question, answers[best], answers[other], rewards[best], rewards[other])


def crowd_model(hurried: float, third: int) -> RewardModel:
    """A reward model of one third of the answers, as a crowd judged them."""
    rng = random.Random(f"crowd/{hurried}/{seed}")
    return fit_reward_model([crowd_choice(rng, *pair, hurried) for pair in train_answers][third::3], stream=third)


flawed = crowd_model(0.9, third=0)
flawed_deltas = margins(flawed, test_pairs)
flawed_truth = agreement(flawed_deltas, gaps, clear)
print(f"agrees with the true preference on {flawed_truth} of the clear held-out pairs")
print("worth of a right answer {:.2f}, of politeness {:.2f}, of an idle sentence {:.2f}".format(*slopes(flawed_deltas)))
lesson.report("flawed reward model, agreement with the true preference", str(flawed_truth))
lesson.claim("the flawed model likes idle sentences", slopes(flawed_deltas)[2], at_least=0, form=".2f")

# %% [markdown]
# Now optimise it with nothing to hold the policy back: GRPO with $\beta = 0$.

# %%
hacked = group_rl(partial(proxy_of, [flawed]), lesson.scaled(11), beta=0.0)
exams["flawed reward, no KL"] = take_exam(hacked.policy)
show_manners(exams)
for text in exams["flawed reward, no KL"].texts[:3]:
    print(repr(text))
proxy_gain = [value - hacked.log[0]["proxy"] for value in hacked.column("proxy")]
steps = list(range(len(proxy_gain)))
alt = "Over the iterations the proxy rises and levels off, while the true reward falls from the start."
lines = {"proxy, from its start": (steps, proxy_gain), "true reward": (steps, hacked.column("true"))}
plots.show(plots.curve(lines, title="Reward hacking", xlabel="iteration", ylabel="reward", alt=alt))
hack_loss, deviation = gain_of(exams["flawed reward, no KL"])
print(f"proxy {proxy_gain[-1]:+.2f}; true reward on the exam {hack_loss:+.2f} (standard error {deviation:.2f})")
lesson.report("flawed reward, no KL: proxy / true reward, change", f"{proxy_gain[-1]:+.2f} / {hack_loss:+.2f}")
lesson.claim("without KL the proxy rises by 0.3 or more", proxy_gain[-1], at_least=0.3, form=".2f")
lesson.claim("meanwhile the true reward falls by 0.3 or more", -hack_loss, at_least=0.3, form=".2f")

# %% [markdown]
# **What you see.** The policy talks until it is cut off. The proxy is delighted. This is Goodhart's law: a measure that becomes a target stops being a good measure.
#
# **Length drift and format drift** are the first things to watch, since they need no true reward: how long are the answers, and how many of them end at all?

# %%
finished = {
    name: score(int(((samples.ids[:, samples.width :] == END) & (samples.answer_mask == 1)).any(1).sum()), len(exam))
    for name, samples in exams.items()
}
for name, samples in exams.items():
    lengths = samples.answer_mask.sum(1)
    distinct = len(set(samples.texts)) / len(samples.texts)
    print(f"{name:>22}: {lengths.float().mean():4.1f} tokens, {finished[name]} end, {distinct:.0%} distinct answers")
alt = "The share of answers that end: nearly all before, and few after the reward was hacked."
plots.show(plots.bars_with_intervals(finished, title="Answers that come to an end", xlabel="answers", alt=alt))
lengths = [samples.answer_mask.sum(1).float().mean().item() for samples in exams.values()]
lesson.report("tokens an answer: SFT, PPO, hacked", " / ".join(f"{lengths[i]:.1f}" for i in (1, 2, -1)))
lesson.claim(
    "the hacked policy writes answers at least 1.5 times as long as SFT",
    lengths[-1] / lengths[1],
    at_least=1.5,
    form=".2f",
)

# %% [markdown]
# **How far can you go?** Gao et al. (2022) measured true reward against $d = \sqrt{\mathrm{KL}}$ and found
#
# $$R_\text{RL}(d) = d\,(\alpha - \beta \log d), \qquad R_\text{best-of-N}(d) = d\,(\alpha - \beta d)$$
#
# If $\alpha > 0$ both rise first and fall later; if $\alpha < 0$ the mistake is what pays first, and they only fall. Draw the same for the flawed model, with RL from the run above and best-of-N from the 640 samples of section 5, and fit $\alpha$ and $\beta$ by least squares.

# %%
many_flawed = torch.stack([proxy_of([flawed], samples).cpu() for samples in many], 1)  # (questions, N)
sizes = (1, 2, 4, 8)
d_bon = np.sqrt([math.log(n) - (n - 1) / n for n in sizes])
d_rl = np.sqrt(np.maximum(hacked.column("kl"), 1e-6))
bon_true = np.array([best_of(n, many_flawed, many_truth) for n in sizes]) - best_of(1, many_flawed, many_truth)
bon_proxy = np.array([best_of(n, many_flawed, many_flawed) for n in sizes]) - best_of(1, many_flawed, many_flawed)
rl_true = np.array(hacked.column("true")) - hacked.log[0]["true"]


def fit(d: np.ndarray, gain: np.ndarray, shape: Callable) -> np.ndarray:
    """alpha and beta of gain = d (alpha - beta shape(d)), by least squares; points at d = 0 say nothing."""
    d, gain = d[d > 0.05], gain[d > 0.05]
    return np.linalg.lstsq(np.stack([d, -d * shape(d)], 1), gain, rcond=None)[0] if len(d) > 1 else np.zeros(2)


for name, d, gain, shape in (("RL", d_rl, rl_true, np.log), ("best-of-N", d_bon, bon_true, lambda d: d)):
    print("{:>9}: alpha {:+.2f}, beta {:+.2f}".format(name, *fit(d, gain, shape)))
order = np.argsort(d_rl)
lines = {
    "RL, proxy": (d_rl[order], np.array(proxy_gain)[order]), "RL, truth": (d_rl[order], rl_true[order]),
    "best-of-N, proxy": (d_bon, bon_proxy), "best-of-N, truth": (d_bon, bon_true),
}  # fmt: skip
alt = "Gain over the square root of the KL: the proxy rises for RL and best-of-N, and the true reward falls."
plots.show(plots.curve(lines, title="Over-optimisation: the same reward model, proxy and truth",
                       xlabel="square root of the KL (nats)", ylabel="change of reward", alt=alt))  # fmt: skip
print("best of 1, 2, 4, 8, change of the true reward")
for name, judge_model in {
    **{f"{size} careful pairs": m for size, m in reward_models.items()},
    "flawed": flawed,
}.items():
    proxy = torch.stack([proxy_of([judge_model], samples).cpu() for samples in many], 1)
    values = [best_of(n, proxy, many_truth) - best_of(1, proxy, many_truth) for n in sizes]
    print(f"{name:>20}: " + ", ".join(f"{value:+.2f}" for value in values))

# %% [markdown]
# **What you see.** With this flawed model $\alpha$ is negative: the truth falls from the first step on. Idle sentences are in the policy's repertoire, so the mistake is the cheapest way to please. Gao et al. found a rise first, since their reward models were sound and only imprecise. The table shows that other end: the more careful pairs, the more of the true reward best-of-N finds.

# %% [markdown]
# **Cures.** Four, each of which a real project can apply:
#
# - **KL**: $\beta = 1$ in GRPO's loss. It bounds how far a mistake can be driven, and bounds the progress as well.
# - **Early stopping**: let a careful person read a batch of answers at each iteration, and keep the policy of the best one.
# - **Ensemble of one crowd** (Coste et al. 2023): the lowest of three reward models, each of another third of the same crowd's pairs. Rewards have an arbitrary zero and scale, so each is standardised on the SFT policy's answers first.
# - **Ensemble of different crowds**: the flawed model, and the two that learned from 100 and from 300 careful pairs.
#
# Before you spend a run on an ensemble, ask its members what they think of the hacked answers. If all are pleased, their minimum is no protection.

# %%
same_crowd = [flawed, crowd_model(0.9, third=1), crowd_model(0.9, third=2)]
other_crowds = [flawed, *(reward_models[size] for size in SIZES[:2])]


def committee(judges: Sequence[RewardModel]) -> Callable[[Samples], Tensor]:
    """The lowest of the judges' rewards, each with mean 0 and deviation 1 on the SFT policy's answers."""
    before = [proxy_of([judge], exams["SFT policy"]) for judge in judges]

    def lowest(samples: Samples) -> Tensor:
        rewards = [(proxy_of([judge], samples) - b.mean()) / b.std() for judge, b in zip(judges, before, strict=True)]
        return torch.stack(rewards).amin(0)  # (judges, batch) -> (batch,)

    return lowest


for name, judges in (("one crowd", same_crowd), ("different crowds", other_crowds)):
    opinions = [committee([judge])(exams["flawed reward, no KL"]).mean().item() for judge in judges]
    together = committee(judges)(exams["flawed reward, no KL"]).mean().item()
    print(
        f"{name:>16}, on the hacked answers: " + ", ".join(f"{o:+.2f}" for o in opinions) + f"; lowest {together:+.2f}"
    )
    lesson.report(f"hacked answers, lowest standardised reward, {name}", f"{together:+.2f}")

# %%
with_kl = group_rl(partial(proxy_of, [flawed]), lesson.scaled(6), beta=1.0)
ensemble = group_rl(committee(other_crowds), lesson.scaled(6), beta=0.0)
exams["flawed reward, KL"] = take_exam(with_kl.policy)
exams["different crowds, no KL"] = take_exam(ensemble.policy)
show_manners({name: exams[name] for name in list(exams) if name != "assistant"})
best_step = int(np.argmax(hacked.column("true")))
print(f"early stopping: after {best_step} updates, true reward of the batch {max(hacked.column('true')):.2f}")
runs = {"no KL": hacked, "KL": with_kl, "different crowds": ensemble}
lines = {name: (list(range(len(run.log))), run.column("true")) for name, run in runs.items()}
alt = "True reward over the iterations: it falls without KL, stays with KL, and rises with an ensemble that disagrees."
plots.show(plots.curve(lines, title="Three runs on flawed reward models", xlabel="iteration",
                       ylabel="true reward of the samples", alt=alt))  # fmt: skip
ends = {name: gain_of(exams[name])[0] for name in list(exams)[-3:]}
for name, gain in ends.items():
    print(f"{name:>24}: {gain:+.2f} over SFT")
    lesson.report(f"{name}: true reward over SFT", f"{gain:+.2f}")
lesson.claim(
    "with the KL penalty the true reward ends at least 0.15 above the run without it",
    ends["flawed reward, KL"] - hack_loss,
    at_least=0.15,
    form=".2f",
)
lesson.claim(
    "the ensemble of different crowds ends above the SFT policy, without any KL penalty",
    ends["different crowds, no KL"],
    at_least=0,
    form=".2f",
)


# %% [markdown]
# **What you see.** Early stopping and KL limit the damage, and that is all they can do: the direction is wrong. An ensemble helps against mistakes that its members do *not* share. Three models of one crowd have the same taste: each of them likes the hacked answers, only not equally (compare Eisenstein et al. 2023). The best cure is better comparisons.

# %% [markdown]
# ## 7 · A reward that cannot be fooled: sums
#
# **Question.** What if a program can check the answer?
#
# For sums no reward model is needed: the number is right or it is not. Such a *verifiable reward* (RLVR) made the reasoning models (Guo et al. 2025, DeepSeek-R1). The SFT policy has learned from its demonstrators to answer mostly at once, and sometimes in steps. Nobody tells it which is better.

# %%
def says_right_sum(question: Question, text: str) -> bool:
    """Exact match: the answer ends with the right number, and the sentence is complete."""
    return text.endswith(f"The sum is {question.about['value']}.")


def verified(samples: Samples) -> Tensor:
    """1 for a right sum, else 0: (batch,)."""
    return torch.tensor([float(says_right_sum(q, t)) for q, t in zip(samples.questions, samples.texts, strict=True)])


sums = draw_questions("sum", lesson.scaled(150, 8), "exam", held_out=True)


def sum_exam(model: nn.Module, name: str, greedy: bool = True) -> Samples:
    """Answer the sums of the exam and print what came out."""
    samples = sample(model, sums, LIMIT, None if greedy else torch.Generator().manual_seed(seed))
    right, stepwise = verified(samples), torch.tensor([float("=" in text) for text in samples.texts])
    print(f"{name:>22}: {score(right.sum().item(), len(sums))} right, {stepwise.mean():4.0%} in steps, "
          f"{samples.answer_mask.sum(1).float().mean():4.1f} tokens")  # fmt: skip
    return samples


before = sum_exam(sft, "SFT, greedy")
before_sampled = sum_exam(sft, "SFT, sampled", greedy=False)
steps_used = torch.tensor(["=" in text for text in before_sampled.texts])
for name, kind in (("in steps", steps_used), ("at once", ~steps_used)):
    if kind.any():
        print(f"   of those {name}: {score(verified(before_sampled)[kind].sum().item(), int(kind.sum()))} right")

# %%
verified_run = group_rl(verified, lesson.scaled(10), beta=0.0, kind="sum")
after = sum_exam(verified_run.policy, "GRPO, greedy")
sum_exam(verified_run.policy, "GRPO, sampled", greedy=False)
print(after.texts[0])
steps = list(range(len(verified_run.log)))
longest = max(verified_run.column("tokens"))
lines = {
    "right": (steps, verified_run.column("proxy")),
    f"length, of {longest:.0f} tokens": (steps, [tokens / longest for tokens in verified_run.column("tokens")]),
}
alt = "Over the iterations the share of right sums rises together with the length of the answers."
plots.show(plots.curve(lines, title="The answers grow longer because steps pay", xlabel="iteration",
                       ylabel="share", percent=True, alt=alt))  # fmt: skip
sft_right, grpo_right = (score(verified(s).sum().item(), len(sums)) for s in (before, after))
lesson.report("sums, exact match (greedy): SFT / GRPO", f"{sft_right} / {grpo_right}")
lesson.claim(
    "GRPO raises exact match on sums by at least 15 points",
    grpo_right.accuracy - sft_right.accuracy,
    at_least=0.15,
    form=".0%",
)

# %% [markdown]
# **What you see.** The policy discovers that writing steps pays, and the answers grow. It is the small version of what DeepSeek-R1 reports. The skill was there: the base model had learned steps in pretraining, and the demonstrations showed them now and then. RL raised the probability of what already worked; it had to be sampled once to be found.
#
# **At equal samples, is training better than choosing?** The cell prints how many samples each way used. Draw 8 for each of 60 sums from the SFT policy and let the *verifier* choose; that is the share of sums with at least one right answer among them, pass@8. Without a verifier at the time of use, only a majority vote is left.

# %%
few = sums[: lesson.scaled(60, 4)]
draws = [sample(sft, few, LIMIT, torch.Generator().manual_seed(seed + 10 + n)) for n in range(N)]
right = torch.stack([verified(samples) for samples in draws], 1)  # (sums, N)


def voted(texts: list[str]) -> str:
    """The sum that most of the answers name."""
    numbers = [text.removesuffix(".").split()[-1] if text.strip(" .") else "" for text in texts]
    return max(numbers, key=numbers.count)


votes = sum(
    voted([samples.texts[i] for samples in draws]) == str(question.about["value"]) for i, question in enumerate(few)
)
ways = {
    "SFT, one sample": score(right.mean().item() * len(few), len(few)),
    "SFT, majority of 8": score(votes, len(few)),
    "SFT, best of 8 by the verifier": score(right.amax(1).sum().item(), len(few)),
    "GRPO, greedy": score(verified(after)[: len(few)].sum().item(), len(few)),
}
alt = "Right sums for four ways to use the policies: training with the verifier rivals choosing among eight with it."
plots.show(plots.bars_with_intervals(ways, title="Choosing or training", xlabel="right sums", alt=alt))
print(f"samples used: training {sum(BATCH for _ in verified_run.log)}, best of 8 on {len(few)} sums {N * len(few)}")
for name, result in ways.items():
    lesson.report(f"sums: {name}", str(result))
ahead = ways["GRPO, greedy"].accuracy - ways["SFT, one sample"].accuracy
lesson.claim("GRPO without a verifier at test time is above a single sample of SFT", ahead, at_least=0, form=".0%")

# %% [markdown]
# **RLOO on the same task**, for comparison: whole answers as actions, no division by the standard deviation.

# %%
rloo_run = group_rl(verified, lesson.scaled(5), beta=0.0, kind="sum", algorithm="RLOO")
rloo_after = sum_exam(rloo_run.policy, "RLOO, greedy")
rloo_right = score(verified(rloo_after).sum().item(), len(sums))
print("right in training, GRPO: " + " ".join(f"{value:.0%}" for value in verified_run.column("proxy")))
print("right in training, RLOO: " + " ".join(f"{value:.0%}" for value in rloo_run.column("proxy")))
lesson.report("sums, exact match (greedy): RLOO, fewer iterations", str(rloo_right))


# %% [markdown]
# The proxy cannot be hacked here, and yet two biases hide in GRPO's loss. Dividing by the length of each answer makes long wrong answers cheap, and dividing by the standard deviation gives more weight to questions that nearly all or nearly no samples get right. Dr. GRPO (Liu et al. 2025) drops both; DAPO (Yu et al. 2025) averages over tokens of the whole batch, raises the upper clip, and skips groups that are all right or all wrong, whose advantage is zero anyway. `trl`'s default loss is DAPO's.

# %% [markdown]
# ## 8 · Exercises
#
# Four, from easy to hard. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.
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
# **Exercise 8.2** (medium, 10 minutes). *A cure for rambling.* An answer that does not end got its reward for being cut off. Subtract a penalty from the score of every answer without the token `END` among those that count. (`trl` calls it `missing_eos_penalty` in its PPO, and masks truncated answers in GRPO.)

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
# **Exercise 8.3** (medium, 15 minutes). *Three ways to average.* Given losses of tokens, compute the mean of GRPO (over each answer's tokens, then over answers), of DAPO (over all tokens that count), and of Dr. GRPO (sum over tokens that count, divided by the number of answers times the longest length allowed).

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
# **Exercise 8.4** (hard, 20 minutes). *Best-of-n without waste.* Section 5 cut the $N$ samples of a question into groups of $n$. Better: the exact mean over *all* $\binom{N}{n}$ subsets. Sort the samples by proxy, lowest first. The sample at place $i$ (from 0) is the best of a subset if the other $n - 1$ come from the $i$ before it, so its weight is $\binom{i}{n-1} / \binom{N}{n}$.

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
# ## What we saw
#
# All numbers of this table were measured above, in this run.

# %%
lesson.summary()


# %% [markdown]
# ## In practice
#
# Start from an SFT model, log length, entropy, KL and the share of unfinished answers, read samples at every evaluation, and keep a held-out judge that the training never sees. The library does the loop; the reward is a function of texts. Here it takes three steps on the sums, with the profile's own model.
#
# ```python
# RewardTrainer(model, RewardConfig(...), train_dataset=pairs)        # columns prompt, chosen, rejected
# GRPOTrainer(model, reward_funcs=verifier, args=GRPOConfig(...), train_dataset=prompts)
# ```

# %%
def right_sum(prompts: list, completions: list[str], value: list[str], **columns) -> list[float]:
    """The reward for trl: its data's columns come along as lists."""
    return [float(text.endswith(f"The sum is {v}.")) for text, v in zip(completions, value, strict=True)]


asked = draw_questions("sum", 32, "practice")
rows = [{"prompt": chat_prompt(tokenizer, q.prompt), "value": str(q.about["value"])} for q in asked]
arguments = GRPOConfig(
    **QUIET, max_steps=lesson.scaled(3), num_generations=8, per_device_train_batch_size=16, max_completion_length=40,
    learning_rate=settings["rl"], beta=0.0, loss_type="dapo", logging_steps=1, mask_truncated_completions=True,
)  # fmt: skip
ending = copy.deepcopy(tokenizer)
ending.eos_token = end_of_turn(tokenizer)  # trl stops there
model = trainable_copy(sft)
trainer = GRPOTrainer(model, right_sum, arguments, Dataset.from_list(rows), processing_class=ending)
trainer.remove_callback(PrinterCallback)
trainer.train()
for row in trainer.state.log_history:
    if "reward" in row:
        print(f"step {row['step']}: reward {row['reward']:.2f}, length {row['completions/mean_length']:.1f}, "
              f"groups without a difference {row['frac_reward_zero_std']:.0%}")  # fmt: skip
assert trainer.state.global_step == lesson.scaled(3)

# %% [markdown]
# ## Read on
#
# - Christiano, Leike, Brown, Martic, Legg & Amodei 2017, *Deep Reinforcement Learning from Human Preferences* ([1706.03741](https://arxiv.org/abs/1706.03741)).
# - Ziegler et al. 2019, *Fine-Tuning Language Models from Human Preferences* ([1909.08593](https://arxiv.org/abs/1909.08593)): adaptive KL.
# - Stiennon et al. 2020, *Learning to Summarize from Human Feedback* ([2009.01325](https://arxiv.org/abs/2009.01325)).
# - Ouyang et al. 2022, *Training Language Models to Follow Instructions with Human Feedback* ([2203.02155](https://arxiv.org/abs/2203.02155)): InstructGPT.
# - Schulman, Moritz, Levine, Jordan & Abbeel 2015, *High-Dimensional Continuous Control Using Generalized Advantage Estimation* ([1506.02438](https://arxiv.org/abs/1506.02438)).
# - Schulman, Wolski, Dhariwal, Radford & Klimov 2017, *Proximal Policy Optimization Algorithms* ([1707.06347](https://arxiv.org/abs/1707.06347)).
# - Schulman 2020, [*Approximating KL Divergence*](http://joschu.net/blog/kl-approx.html).
# - Gao, Schulman & Hilton 2022, *Scaling Laws for Reward Model Overoptimization* ([2210.10760](https://arxiv.org/abs/2210.10760)).
# - Coste, Anwar, Kirk & Krueger 2023, *Reward Model Ensembles Help Mitigate Overoptimization* ([2310.02743](https://arxiv.org/abs/2310.02743)); Eisenstein et al. 2023, *Helping or Herding?* ([2312.09244](https://arxiv.org/abs/2312.09244)) on mistakes that all members share.
# - Beirami et al. 2024, *Theoretical Guarantees on the Best-of-n Alignment Policy* ([2401.01879](https://arxiv.org/abs/2401.01879)).
# - Ahmadian et al. 2024, *Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs* ([2402.14740](https://arxiv.org/abs/2402.14740)): RLOO.
# - Shao et al. 2024, *DeepSeekMath* ([2402.03300](https://arxiv.org/abs/2402.03300)): GRPO. Guo et al. 2025, *DeepSeek-R1* ([2501.12948](https://arxiv.org/abs/2501.12948)).
# - Liu et al. 2025, *Understanding R1-Zero-Like Training: A Critical Perspective* ([2503.20783](https://arxiv.org/abs/2503.20783)): Dr. GRPO. Yu et al. 2025, *DAPO* ([2503.14476](https://arxiv.org/abs/2503.14476)).
