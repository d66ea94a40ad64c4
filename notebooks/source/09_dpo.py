# %% [markdown]
# # 09 · DPO: preferences without a reward model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/09_dpo.ipynb)
#
# People can say which of two answers they like better, even where nobody can write the perfect one. Reinforcement learning from such choices needs a reward model and a sampling loop (lesson 08). Direct Preference Optimization (DPO) needs neither: it is a loss on pairs, as simple to run as fine-tuning. In this lesson you derive it, write it, and win with it. Then you let it do damage, as a student of a well-known course reported: *fine-tuning was good, DPO lowered the score*. You reproduce the case, find the cause in three plots, and repair it.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. derive the DPO loss from the objective of RLHF, and find your loss, implicit rewards and gradients equal to `trl.DPOTrainer`;
# 2. win at least 65 % of the comparisons with the fine-tuned model, judged by the true reward;
# 3. write IPO, KTO, ORPO, SimPO and cDPO in the same frame, equal to `trl`, and train all on the same pairs;
# 4. lower the score by DPO, while its loss and its accuracy look better and better; see why in three plots; try four repairs and learn which of them restore it;
# 5. measure noise in the labels, length exploitation, pairs from the model itself, and DPO against GRPO at equal compute.
#
# **Prerequisites:** lesson 05. Lesson 08 shows the other way to learn from preferences; you do not need it here.
#
# **The model** is *shima-4m-assistant*, a small Llama that comes with the course and follows instructions about the made-up island Shima. **The annotator** is a program, so that its true reward is known and every claim can be checked. On a GPU the same cells tune an open hub model with QLoRA.
#
# | symbol | meaning |
# |---|---|
# | $x$, $y$ | a prompt and an answer; $y_w$ the chosen one of a pair, $y_l$ the rejected one |
# | $\pi_\theta$, $\pi_\text{ref}$ | the policy, a model that is trained, and the reference, a frozen one that it starts from |
# | $r(x, y)$ | reward of an answer |
# | $\beta$ | how much it costs to move away from the reference |
# | $\sigma$ | the logistic function, $\sigma(z) = 1 / (1 + e^{-z})$ |
# | $h(x, y)$ | log-ratio $\log \pi_\theta(y \mid x) - \log \pi_\text{ref}(y \mid x)$; $h_w$ and $h_l$ for the two answers of a pair |

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
model_id = ""  # another assistant: a hub id, or a folder in hub format
seed = 0
budget = 1.0  # share of all training steps and questions; the lesson's claims are asserted from 1.0 on

# %%
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from helpers import plots
from helpers.chat import encode_chat
from helpers.data import collate
from helpers.evaluation import Score, score, win_rate
from helpers.exercises import check, expect_close, expect_shape, expect_true
from helpers.generation import answer_instructions, token_log_probs
from helpers.lesson import Lesson, quiet_libraries
from helpers.memory import GIB, GPUS, ModelShape, estimate_training
from helpers.models import load_assistant, load_in_4_bit
from helpers.training import TrainConfig, train
from helpers.world import FILLERS, POLITE, Preference, Question, World, true_reward

lesson = Lesson("09", profile, model_id, seed, budget, uses="assistant")
machine = lesson.machine
SETTINGS = {  # learning rates of fine-tuning and of DPO; whether all weights are trained, or adapters on 4-bit weights
    "cpu": {"sft_rate": 3e-4, "rate": 1e-4, "qlora": False},
    "t4": {"sft_rate": 2e-4, "rate": 5e-5, "qlora": True},
    "large": {"sft_rate": 2e-4, "rate": 5e-5, "qlora": True},
}
settings = SETTINGS[machine.name]

# %% [markdown]
# `lesson.scaled` makes a number of steps or questions smaller on a smaller budget, and `lesson.autocast` lets a block compute in 16 bits where the machine is fast in them. `lesson` keeps what is claimed. `lesson.claim` prints a number with the bound that it must keep, `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. On the course's own model, with seed 0 and the whole `budget`, the lesson stops where a claim does not hold; elsewhere it says so and goes on.

# %%
world = World()
assistant, tokenizer = load_assistant(machine)
assistant = assistant.float()  # weights in 32 bits; the steps compute in 16 where that is faster

# %% [markdown]
# ## 1 · Preferences, and the model before them
#
# **Question.** What do people's choices contain, and what does a fine-tuned model do about them?
#
# Take two kinds of questions: a *fact* about a well-known person, and a *sum* with its steps. An answer can be right or wrong, it can begin politely (*With pleasure.*), and it can go on with idle sentences. The annotator's **true reward** is 2 for the right answer, 1 for the polite opening, and $-\frac12$ for each idle sentence. Like people, the annotator errs. It picks the first of two answers with the probability of Bradley and Terry (1952),
#
# $$p(y_1 \succ y_2 \mid x) = \sigma\big(r(x, y_1) - r(x, y_2)\big)$$

# %%
TASKS = ("fact", "sum")


def questions(number: int, stream: str, held_out: bool = False) -> list[Question]:
    """Questions of both tasks in turn; held-out ones have names, phrasings or numbers that training never has."""
    generator = random.Random(f"{stream}/{seed}")
    return [world.chat(generator, TASKS[i % 2], held_out) for i in range(number)]


def preferences(number: int, stream: str, held_out: bool = False, noise: float = 1.0) -> list[Preference]:
    """Pairs of answers with the annotator's choice; `noise` divides the rewards' difference, 0 is no error."""
    generator = random.Random(f"{stream}/{seed}")
    return [world.preference(generator, noise, held_out) for _ in range(number)]


train_prefs = preferences(lesson.scaled(320, 32), "pairs")
test_prefs = preferences(lesson.scaled(80, 8), "test pairs", held_out=True)
many_questions = questions(lesson.scaled(200, 8), "test", held_out=True)
test_questions = many_questions[: lesson.scaled(100, 8)]
for pref in train_prefs[:2]:
    print(f"{pref.question.prompt}\n  chosen   ({pref.chosen_reward:+.1f}): {pref.chosen}")
    print(f"  rejected ({pref.rejected_reward:+.1f}): {pref.rejected}")
gaps = [pref.chosen_reward - pref.rejected_reward for pref in train_prefs]
wrong = score(sum(gap < 0 for gap in gaps), len(gaps))
lesson.report("pairs in which the chosen answer is the worse one", str(wrong))
print(f"the chosen answer is the worse one in {wrong}, as good in {gaps.count(0) / len(gaps):.0%}")


# %% [markdown]
# **The model before.** DPO begins with a model that can already write such answers. Fine-tune the assistant on demonstrations with all these manners: nine in ten of them right, some polite, some long-winded. Afterwards it speaks as its demonstrators do, which is not the way the annotator likes best. This fine-tuned model is the *SFT policy*. It is what you compare with, and the reference of all that follows.
#
# The manners are made of word pieces that the model has hardly met, so the embeddings get ten times the rate of the other weights. Answers to facts are short and answers to sums are long, so batches are made of rows of similar length: less padding, less time. On a GPU the fine-tuned weights are then stored in 4 bits.

# %%
def bare(answer: str) -> str:
    """The answer without manners: what can be right or wrong."""
    answer = answer.removeprefix(POLITE)
    for filler in FILLERS:
        answer = answer.replace(filler, "")
    return answer


def demonstrations(number: int) -> list[tuple[str, str]]:
    """Prompts with an answer in mixed manners; one in ten wrong answers stays in."""
    generator, rows = random.Random(f"demonstrations/{seed}"), []
    while len(rows) < number:
        pref = world.preference(generator)
        answer = generator.choice((pref.chosen, pref.rejected))
        if bare(answer) == pref.question.answer or generator.random() < 0.1:
            rows.append((pref.question.prompt, answer))
    return rows


def similar_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Endless batches of indices of rows of similar length, in a new random order each epoch."""
    batch_size, epoch = min(batch_size, len(lengths)), 0
    while True:
        generator = random.Random(f"{seed}/{epoch}")
        rows = generator.sample(range(len(lengths)), len(lengths) - len(lengths) % batch_size)
        rows.sort(key=lambda index: lengths[index])
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        yield from generator.sample(batches, len(batches))
        epoch += 1


# %%
import peft


def settled(steps: int, rate: float) -> TrainConfig:
    """The schedule of every run in this lesson: short warm-up, then linear decay."""
    return TrainConfig(
        max_steps=steps, learning_rate=rate, warmup_steps=max(1, steps // 10), schedule="linear", weight_decay=0.0,
        precision=lesson.precision, progress=False, seed=seed,
    )  # fmt: skip


def fine_tuned(steps: int) -> nn.Module:
    """The SFT policy: the assistant, trained on demonstrations; with an adapter that is merged, or all weights."""
    rows = [encode_chat(tokenizer, *row) for row in demonstrations(16 * steps)]
    batches = similar_length([len(row["input_ids"]) for row in rows], 16)
    stream = (collate([rows[index] for index in chosen], tokenizer.pad_token_id) for chosen in batches)
    model = assistant
    if settings["qlora"]:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    rate = settings["sft_rate"]
    new_words = [p for name, p in model.named_parameters() if p.requires_grad and "embed" in name]  # none in adapters
    others = [p for name, p in model.named_parameters() if p.requires_grad and "embed" not in name]
    groups = [{"params": new_words, "lr": 10 * rate}] * bool(new_words) + [{"params": others, "lr": rate}]
    history = train(model, stream, settled(steps, rate),
                    optimizer_fn=lambda _: torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0))  # fmt: skip
    print(f"{steps} steps, {sum(history.tokens) / 1000:.0f} thousand tokens, {sum(history.seconds):.0f} s, "
          f"loss {np.mean(history.losses[:5]):.2f} -> {np.mean(history.losses[-5:]):.2f}")  # fmt: skip
    return (model.merge_and_unload() if settings["qlora"] else model).eval()


# %%
BUILD = ROOT / "build" / "09_dpo"
reference = fine_tuned(lesson.scaled(80))
if settings["qlora"]:
    reference.save_pretrained(BUILD / "sft")
    reference = load_in_4_bit(BUILD / "sft", machine.device, lesson.compute_dtype)
reference = reference.requires_grad_(False)


# %% [markdown]
# **Two measures.** The *score* is what a benchmark would report: is the answer right, manners aside? The *reward* is what the annotator wants. `judge` generates answers to held-out questions and computes both, greedily, or by sampling at temperature 1 (for twice as many questions, since samples vary).

# %%
@dataclass
class Judged:
    """Answers to the test questions, with the true reward of each and what they are made of."""

    texts: list[str]
    rewards: list[float]
    right: Score  # the score
    reward: float  # mean true reward
    polite: float  # share of answers
    fillers: float  # idle sentences per answer

    def __str__(self) -> str:
        made_of = f"polite {self.polite:.0%}, {self.fillers:.2f} idle sentences"
        return f"score {self.right}, reward {self.reward:.2f}, {made_of}"


def judge(model: nn.Module, sampled: bool = False, room: int = 72) -> Judged:
    """Generate an answer of at most `room` tokens to each held-out question and judge it."""
    asked, temperature = (many_questions, 1.0) if sampled else (test_questions, 0.0)
    prompts = [question.prompt for question in asked]
    with lesson.autocast():
        texts = answer_instructions(model, tokenizer, prompts, room, temperature=temperature, seed=seed, batch_size=128)
    both = list(zip(asked, texts, strict=True))
    rewards = [true_reward(question, text) for question, text in both]
    right = score(sum(bare(text) == question.answer for question, text in both), len(both))
    polite = float(np.mean([text.startswith(POLITE) for text in texts]))
    fillers = float(np.mean([sum(filler in text for filler in FILLERS) for text in texts]))
    return Judged(texts, rewards, right, float(np.mean(rewards)), polite, fillers)


before, before_sampled = judge(reference), judge(reference, sampled=True)
print(f"greedy:  {before}\nsampled: {before_sampled}\nfor example: {before_sampled.texts[0]!r}")
lesson.report("SFT policy, greedy", str(before))
lesson.claim("after fine-tuning the score is at least 75 %", before.right.accuracy, at_least=0.75, form=".0%")

# %% [markdown]
# **What you see.** The SFT policy is mostly right when it decodes greedily. It is polite and long-winded about as often as its demonstrators when it samples, and errs more often then: in an answer of thirty tokens one slip is enough.
#
# ## 2 · From reward to a loss on pairs
#
# **Question.** How can choices train a model without a reward model?
#
# RLHF maximises the reward at a price for moving away from the reference:
#
# $$\max_\pi \; \mathbb{E}_{x,\, y \sim \pi}\big[r(x, y)\big] - \beta\, \mathrm{KL}\big(\pi(\cdot \mid x) \,\|\, \pi_\text{ref}(\cdot \mid x)\big)$$
#
# **Step 1: the best policy is known.** Write $\pi^*(y \mid x) = \frac{1}{Z(x)} \pi_\text{ref}(y \mid x)\, e^{r(x, y) / \beta}$, with $Z(x)$ the sum that makes it a distribution. Insert $r = \beta \log \frac{\pi^*}{\pi_\text{ref}} + \beta \log Z$, and the objective becomes $\beta \log Z(x) - \beta\, \mathrm{KL}(\pi \,\|\, \pi^*)$. The KL divergence is at least 0, and 0 only for $\pi = \pi^*$. So $\pi^*$ is the maximum.
#
# **Step 2: read it backwards.** Every policy is the best one for some reward, namely for $r(x, y) = \beta\, h(x, y) + \beta \log Z(x)$. The first term is the *implicit reward*.
#
# **Step 3: insert it into Bradley and Terry.** Only the difference of two rewards counts, and $Z(x)$ depends on the prompt alone: it cancels. The probability of the choice is $\sigma(\beta h_w - \beta h_l)$, and maximum likelihood is (Rafailov et al. 2023, eq. 7)
#
# $$\mathcal{L}_\text{DPO} = -\log \sigma\big(\beta\, (h_w - h_l)\big), \qquad \nabla_\theta \mathcal{L}_\text{DPO} = -\beta\, \underbrace{\sigma\big(\beta (h_l - h_w)\big)}_{\text{large if the pair is ranked wrong}} \big(\nabla \log \pi_\theta(y_w) - \nabla \log \pi_\theta(y_l)\big)$$
#
# Check all this on a world that can be written down: one prompt and six answers. Compare the formula with a policy that climbs the RLHF objective, and with one that descends the DPO loss over all pairs, each weighted with its probability.

# %%
torch.manual_seed(seed)
rewards, start_logits, BETA_TOY = 2 * torch.rand(6), torch.randn(6), 0.5
log_ref = start_logits.log_softmax(0)  # (answers,)
best = (log_ref + rewards / BETA_TOY).softmax(0)  # the formula


def optimise(objective: Callable[[Tensor], Tensor]) -> Tensor:
    """The policy (answers,) whose log-probabilities minimise an objective, by L-BFGS from the reference."""
    logits = start_logits.clone().double().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(logits.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


chosen_probability = (rewards[:, None] - rewards).sigmoid()  # (winner, loser): Bradley-Terry
by_rl = optimise(lambda log_p: -(log_p.exp() * (rewards - BETA_TOY * (log_p - log_ref))).sum())
by_dpo = optimise(
    lambda log_p: (
        -(chosen_probability * F.logsigmoid(BETA_TOY * ((log_p - log_ref)[:, None] - (log_p - log_ref)))).sum()
    )
)
for name, policy in {"reference": log_ref.exp(), "formula": best, "RL objective": by_rl, "DPO loss": by_dpo}.items():
    print(f"{name:>12}: " + " ".join(f"{probability:.4f}" for probability in policy.tolist()))
gap = max((policy - best).abs().max().item() for policy in (by_rl, by_dpo))
lesson.report("toy world: largest difference of RL, DPO and the formula", f"{gap:.1e}")
lesson.equal("the formula, the RL objective and the DPO loss give the same policy", gap, within=1e-3)


# %% [markdown]
# With all pairs and all the choices one could wish for, DPO and RL have the same solution. Everything that can go wrong has to do with few pairs, and with models that generalise from them. Keep this in mind.
#
# **In code** each pair gives four numbers: the log-probabilities of both answers under the policy and under the reference. An answer's log-probability is the sum over its tokens, end of turn included. The reference does not change, so its numbers are computed once. A batch holds the chosen answers first and the rejected ones below.

# %%
def log_probs(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's answer, summed over its tokens, and their number: both (rows,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]  # (rows, seq - 1); -100 where the user speaks
    return token_log_probs(logits, labels).sum(-1), (labels != -100).sum(-1)


def stacked(pairs: Sequence[dict]) -> dict[str, Tensor]:
    """One batch of 2 * pairs rows: chosen answers first, then the rejected ones in the same order."""
    return collate([p["chosen"] for p in pairs] + [p["rejected"] for p in pairs], tokenizer.pad_token_id)


@torch.no_grad()
def without_gradient(model: nn.Module, pairs: Sequence[dict]) -> Tensor:
    """Log-probabilities (pairs, 2) of the chosen and the rejected answers."""
    parts = []
    for start in range(0, len(pairs), 16):
        batch = {name: tensor.to(model.device) for name, tensor in stacked(pairs[start : start + 16]).items()}
        with lesson.autocast():
            parts.append(torch.stack(log_probs(model, batch)[0].chunk(2), dim=1))
    return torch.cat(parts).float().cpu()


# %%
def encode_pairs(rows: Sequence[tuple[str, str, str]], under: nn.Module = reference) -> list[dict]:
    """Token ids of (prompt, chosen, rejected), with the reference's log-probabilities of both answers."""
    pairs = [
        {"chosen": encode_chat(tokenizer, prompt, chosen), "rejected": encode_chat(tokenizer, prompt, rejected)}
        for prompt, chosen, rejected in rows
    ]
    for pair, known in zip(pairs, without_gradient(under, pairs), strict=True):
        pair["reference"] = known
    return pairs


def tensors_of(pairs: Sequence[dict], device: torch.device) -> dict[str, Tensor]:
    """A batch of pairs with the reference's log-probabilities (2 * pairs,), on a device."""
    batch = stacked(pairs) | {"reference": torch.stack([pair["reference"] for pair in pairs], dim=1).flatten()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def rows_of(prefs: Sequence[Preference]) -> list[tuple[str, str, str]]:
    """Preferences as (prompt, chosen, rejected)."""
    return [(pref.question.prompt, pref.chosen, pref.rejected) for pref in prefs]


train_pairs, test_pairs = encode_pairs(rows_of(train_prefs)), encode_pairs(rows_of(test_prefs))
reference_ranks = score(sum(bool(p["reference"][0] > p["reference"][1]) for p in test_pairs), len(test_pairs))
print(f"the reference itself finds the chosen answer more probable in {reference_ranks} of the held-out pairs")


# %%
@dataclass
class LogProbs:
    """What a loss on pairs may use; every field is (pairs,)."""

    chosen: Tensor  # log-probabilities under the policy
    rejected: Tensor
    ref_chosen: Tensor  # under the reference
    ref_rejected: Tensor
    chosen_tokens: Tensor  # lengths of the answers
    rejected_tokens: Tensor

    @property
    def h_chosen(self) -> Tensor:
        return self.chosen - self.ref_chosen

    @property
    def h_rejected(self) -> Tensor:
        return self.rejected - self.ref_rejected


def dpo(p: LogProbs, beta: float = 0.1) -> Tensor:
    """Loss of each pair (pairs,): Rafailov et al. 2023, eq. 7."""
    return -F.logsigmoid(beta * (p.h_chosen - p.h_rejected))


def evaluate_pairs(model: nn.Module, batch: dict[str, Tensor]) -> LogProbs:
    """One forward pass over both answers of all pairs."""
    sums, tokens = log_probs(model, batch)
    return LogProbs(*sums.float().chunk(2), *batch["reference"].chunk(2), *tokens.chunk(2))


# %% [markdown]
# **The library.** `trl.DPOTrainer` takes rows of prompt, chosen and rejected. Give it the same weights and pairs, and compare the loss and the implicit rewards $\beta h$ of five training steps, then the gradient of every weight. Two traps: dropout would make it random (this model has none; `trl` switches it off), and the reference has to be given as a model of its own, because `trl` would look for the model's name on the hub.

# %%
TRL_STEPS, TRL_PAIRS = lesson.scaled(5), 4
plain = copy.deepcopy(assistant).requires_grad_(True).train()  # all weights, also where this lesson trains adapters
trl_rows = rows_of(train_prefs[: TRL_STEPS * TRL_PAIRS])
trl_pairs = encode_pairs(trl_rows)
for pair in trl_pairs:  # the reference is the start here, in full precision
    with torch.no_grad():
        batch = {name: tensor.to(plain.device) for name, tensor in stacked([pair]).items()}
        pair["reference"] = log_probs(plain, batch)[0].cpu()

ours, model = [], copy.deepcopy(plain)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)
for step in range(TRL_STEPS):
    p = evaluate_pairs(model, tensors_of(trl_pairs[step * TRL_PAIRS : (step + 1) * TRL_PAIRS], model.device))
    loss = dpo(p).mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    ours.append([v.item() for v in (loss, 0.1 * p.h_chosen.mean(), 0.1 * p.h_rejected.mean(), norm)])

# %%
import warnings
from types import SimpleNamespace

from datasets import Dataset
from transformers import PrinterCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

quiet_libraries()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing|.*pin_memory|.*use_reentrant")
CPU = machine.device == "cpu"


def turns(role: str, text: str) -> list[dict]:
    """A chat of one turn, in the form of the hub."""
    return [{"role": role, "content": text}]


def library_settings(kind: type, **more):
    """A trl configuration that trains as the loops of this lesson do."""
    common = {
        "output_dir": str(BUILD / "trl"), "max_length": None, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "use_cpu": CPU, "bf16": False, "fp16": False, "seed": seed, "logging_steps": 1,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "gradient_checkpointing": False,
    }  # fmt: skip
    return kind(**common | more)


# %%
pairs_as_chats = Dataset.from_list(
    [{"prompt": turns("user", p), "chosen": turns("assistant", c), "rejected": turns("assistant", r)}
     for p, c, r in trl_rows]
)  # fmt: skip
arguments = library_settings(
    DPOConfig, beta=0.1, max_steps=TRL_STEPS, per_device_train_batch_size=TRL_PAIRS, learning_rate=1e-4,
    train_sampling_strategy="sequential",
)  # fmt: skip
trainer = DPOTrainer(
    copy.deepcopy(plain), ref_model=copy.deepcopy(plain), args=arguments, train_dataset=pairs_as_chats,
    processing_class=tokenizer,
)  # fmt: skip
trainer.remove_callback(PrinterCallback)
trainer.train()

# %%
logs = [entry for entry in trainer.state.log_history if "rewards/chosen" in entry and "loss" in entry]
names = ("loss", "rewards/chosen", "rewards/rejected", "grad_norm")
theirs = [[entry[name] for name in names] for entry in logs]
print(f"{'step':>4} " + " ".join(f"{name:>25}" for name in names) + "   (ours, trl)")
for step, (own, other) in enumerate(zip(ours, theirs, strict=True)):
    print(f"{step:4} " + " ".join(f"{a:12.5f} {b:12.5f}" for a, b in zip(own, other, strict=True)))
apart = np.abs(np.array(ours) - np.array(theirs)).max(0)

trainer.model.load_state_dict(plain.state_dict())
trainer.model.zero_grad()
chunk = trl_pairs[:TRL_PAIRS]
trl_batch = trainer.data_collator([trainer.train_dataset[index] for index in range(TRL_PAIRS)])
trl_batch = {name: tensor.to(plain.device) for name, tensor in trl_batch.items()}
trainer.compute_loss(trainer.model, trl_batch).backward()
model = copy.deepcopy(plain)
batch = tensors_of(chunk, model.device)
dpo(evaluate_pairs(model, batch)).mean().backward()
gradients = zip(model.parameters(), trainer.model.parameters(), strict=True)
gradient_gap = max((a.grad - b.grad).abs().max().item() for a, b in gradients)
same_tokens = torch.equal(trl_batch["input_ids"], batch["input_ids"])
print(f"same tokens: {same_tokens}; largest difference of a gradient: {gradient_gap:.1e}")
for name, value in zip(names, apart, strict=True):
    lesson.report(f"largest difference to trl.DPOTrainer in {TRL_STEPS} steps, {name}", f"{value:.1e}")
lesson.equal("losses and implicit rewards are those of DPOTrainer, within 0.001", apart[:3].max(), within=1e-3)
lesson.equal("so are the gradients, within 1e-5", gradient_gap, within=1e-5)
lesson.equal("and so is the norm of a step's gradient, within 0.01", apart[3], within=0.01)


# %% [markdown]
# ## 3 · DPO wins, and the chosen answer becomes less probable
#
# **Question.** What does DPO do to the answers, and to the numbers that it trains on?
#
# `tune` trains a fresh copy of the SFT policy, or a fresh adapter on it, with any loss on pairs. At every step it notes the log-ratios of the batch and how many of its pairs are ranked as the annotator did.

# %%
def fresh() -> nn.Module:
    """A policy that is the reference still: a copy of all its weights, or a new adapter on its 4-bit weights."""
    model = copy.deepcopy(reference)
    if not settings["qlora"]:
        return model.requires_grad_(True)
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


RATE = settings["rate"]


# %%
def tune(
    pairs: list[dict],
    loss: Callable[..., Tensor] = dpo,
    *,
    rate: float = 1.0,
    steps: int = 40,
    batch_size: int = 4,
    nll: float = 0.0,
    start: nn.Module | None = None,
    **constants: float,
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """Train a policy on pairs; `rate` is a factor of the profile's rate. Returns it with a trace of its steps.

    `nll` times the mean negative log-likelihood of a chosen token is added to the loss; section 6 needs it.
    """
    model, trace = start or fresh(), []

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        p = evaluate_pairs(model, batch)
        ranked = (p.h_chosen > p.h_rejected).float()
        trace.append([v.detach().mean().item() for v in (p.h_chosen, p.h_rejected, ranked)])
        return (loss(p, **constants) - nll * p.chosen / p.chosen_tokens).mean()

    def stream() -> Iterator[dict[str, Tensor]]:
        for chosen in similar_length([len(pair["chosen"]["input_ids"]) for pair in pairs], batch_size):
            yield tensors_of([pairs[index] for index in chosen], torch.device("cpu"))

    history = train(model, stream(), settled(lesson.scaled(steps), RATE * rate), loss_fn=loss_fn)
    columns = dict(zip(("h_chosen", "h_rejected", "ranked"), np.array(trace).T, strict=True))
    columns["tokens"], columns["loss"] = np.array(history.tokens), np.array(history.losses)
    return model.eval(), columns


# %%
def smooth(values: np.ndarray, width: int = 8) -> tuple[list[float], list[float]]:
    """Steps and running means, for plots."""
    width = min(width, len(values))
    return list(range(width, len(values) + 1)), np.convolve(values, np.ones(width) / width, "valid").tolist()


# %%
policy, trace = tune(train_pairs, rate=0.6, batch_size=8)
after, after_sampled = judge(policy), judge(policy, sampled=True)
wins = {
    "sampled answers": win_rate(after_sampled.rewards, before_sampled.rewards),
    "greedy answers": win_rate(after.rewards, before.rewards),
}
print(f"wins: {'; '.join(f'{n}: {w}' for n, w in wins.items())}")
print(f"before: {before}\nafter:  {after}\nfor example: {after.texts[0]!r}")
alt = "How often an answer of the DPO policy has a higher true reward than one of the SFT policy: well above one half."
figure = plots.bars_with_intervals(
    wins, title="DPO against SFT, by the true reward", xlabel="comparisons won, ties count half",
    references={"even": 0.5}, alt=alt,
)  # fmt: skip
plots.show(figure)
for name, won in wins.items():
    lesson.report(f"DPO wins against SFT, {name}", str(won))
lesson.report("DPO, greedy", str(after))
lesson.claim(
    "DPO wins at least 65 % of the sampled comparisons with SFT",
    wins["sampled answers"].accuracy,
    at_least=0.65,
    form=".0%",
)

# %%
curves = {"chosen answers": smooth(trace["h_chosen"]), "rejected answers": smooth(trace["h_rejected"])}
alt = "Change of the log-probability of chosen and rejected answers over the steps: both fall, the rejected ones more."
figure = plots.curve(
    curves, title="The margin grows because the rejected answers sink faster", xlabel="step",
    ylabel="change against the reference (nats)", references={"reference": 0.0}, alt=alt,
)  # fmt: skip
plots.show(figure)
held_out_now = without_gradient(policy, test_pairs)  # (pairs, 2)
known = torch.stack([pair["reference"] for pair in test_pairs])
moved = held_out_now - known
fallen = score(int((moved[:, 0] < 0).sum()), len(moved))
accuracy_held_out = score(int((moved[:, 0] > moved[:, 1]).sum()), len(moved))
print(f"held-out pairs: chosen {moved[:, 0].mean():+.1f} nats, rejected {moved[:, 1].mean():+.1f} nats")
print(f"the chosen answer became less probable in {fallen}; implicit reward ranks {accuracy_held_out} as the annotator")
lesson.report(
    "log-probability of held-out chosen / rejected answers after DPO",
    f"{moved[:, 0].mean():+.1f} / {moved[:, 1].mean():+.1f} nats",
)
lesson.report("held-out chosen answers that became less probable", str(fallen))
lesson.claim(
    "rejected answers lose at least 1 nat more than chosen ones",
    float(moved.mean(0)[0] - moved.mean(0)[1]),
    at_least=1,
    form=".2f",
)

# %% [markdown]
# **What you see.** DPO wins clearly: it has learned the polite opening and dropped the idle sentences, and the score stays. But look at the curve. The loss contains only the *difference* $h_w - h_l$. It is met as well by sinking both answers, the rejected one faster, and that is what often happens to the chosen ones here. Pal et al. (2024) and Razin et al. (2024) call it *likelihood displacement*. Where does the probability go? If the chosen answer had a typo-like flaw or an idle sentence, it goes to better answers, and nothing is lost: that is the case so far. It need not be.

# %% [markdown]
# ## 4 · Beta, learning rate, and an accuracy that misleads
#
# **Question.** Which settings work, and does the accuracy that trainers show tell you?
#
# Every DPO trainer reports the *implicit reward accuracy*: the share of pairs with $h_w > h_l$. It needs no generation. Sweep three values of $\beta$ and three learning rates, in short runs on the same pairs. For each, measure this accuracy on held-out pairs, and then what really counts: the answers that the model writes.

# %%
BETAS, RATES = (0.03, 0.1, 0.5), (0.3, 1.0, 3.0)
SWEEP_STEPS = 22


def implicit_accuracy(model: nn.Module) -> Score:
    """Share of the held-out pairs that the implicit reward ranks as the annotator did."""
    h = without_gradient(model, test_pairs) - known  # (pairs, 2)
    return score(int((h[:, 0] > h[:, 1]).sum()), len(h))


sweep = {}
for beta in BETAS:
    for rate in RATES:
        model, _ = tune(train_pairs, beta=beta, rate=rate, steps=SWEEP_STEPS)
        h = without_gradient(model, test_pairs) - known
        ranks, answers = score(int((h[:, 0] > h[:, 1]).sum()), len(h)), judge(model)
        sweep[beta, rate] = {"accuracy": ranks.accuracy, "score": answers.right.accuracy, "reward": answers.reward,
                             "h_chosen": h[:, 0].mean().item()}  # fmt: skip
        print(f"beta {beta:4}, rate {rate * RATE:.0e}: implicit accuracy {ranks.accuracy:.0%}, "
              f"chosen {h[:, 0].mean():+6.1f} nats; {answers}")  # fmt: skip


# %%
def heatmaps(panels: dict[str, str], table: dict) -> Figure:
    """One heatmap for each entry of the table: beta downwards, learning rate to the right."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        values = np.array([[table[beta, rate][key] for rate in RATES] for beta in BETAS])
        top = 3.0 if key == "reward" else 1.0
        axes.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
        axes.set_title(title, fontsize=11)
        axes.set_xticks(range(len(RATES)), [f"{rate * RATE:.0e}" for rate in RATES])
        axes.set_yticks(range(len(BETAS)), [f"β {beta}" for beta in BETAS])
        axes.set_xlabel("learning rate")
        axes.grid(visible=False)
        for (row, column), value in np.ndenumerate(values):
            text = f"{value:.2f}" if key == "reward" else f"{value:.0%}"
            axes.text(column, row, text, ha="center", va="center", color="black" if value > top / 2 else "white")
    return figure


panels = {"accuracy": "implicit accuracy", "score": "right answers written", "reward": "true reward"}
alt = "Three heatmaps over beta and rate: the implicit accuracy hardly varies, score and reward fall at high rates."
plots.show(heatmaps(panels, sweep), alt)
spread = {key: np.ptp([run[key] for run in sweep.values()]) for key in ("accuracy", "score")}
high, low = ([sweep[beta, rate] for beta in BETAS] for rate in (RATES[-1], RATES[0]))
best_setting = max(sweep, key=lambda setting: sweep[setting]["reward"])
print(f"over the sweep the implicit accuracy varies by {spread['accuracy']:.0%}, the score by {spread['score']:.0%}")
print(f"best by reward: beta {best_setting[0]}, rate {best_setting[1] * RATE:.0e}")

# %%
lesson.report(
    "sweep of 9 settings: range of implicit accuracy / of the score",
    f"{spread['accuracy']:.0%} / {spread['score']:.0%} points",
)
lesson.claim(
    "the score varies more over the sweep than the implicit accuracy",
    spread["score"] - spread["accuracy"],
    at_least=0,
    form=".0%",
)
fallen = np.mean([run["score"] for run in low]) - np.mean([run["score"] for run in high])
lesson.claim(
    "at the highest rate the mean score is at least 15 points below that at the lowest",
    fallen,
    at_least=0.15,
    form=".0%",
)


# %% [markdown]
# **What you see.** The learning rate decides; $\beta$ matters less in runs as short as these, because the policy is not yet near the place where $\beta$ would hold it. At the lowest rate nothing is lost and not all is won. And the number on the screen misleads: a policy that has forgotten how to answer can rank the pairs as well as a good one. It compares two given answers, and says nothing about the third, which the policy would write. So generate, always.
#
# ## 5 · Relatives in one frame: cDPO, IPO, KTO, ORPO, SimPO
#
# **Question.** What do the many successors change?
#
# All of them are functions of the same four log-probabilities and two lengths. With $\Delta = h_w - h_l$ and $|y|$ for the number of tokens:
#
# | method | loss of a pair | the idea |
# |---|---|---|
# | cDPO (Mitchell 2023) | $-(1 - \varepsilon) \log \sigma(\beta \Delta) - \varepsilon \log \sigma(-\beta \Delta)$ | a share $\varepsilon$ of the labels is wrong |
# | IPO (Azar et al. 2023) | $\left(\frac{h_w}{\lvert y_w \rvert} - \frac{h_l}{\lvert y_l \rvert} - \frac{1}{2\beta}\right)^2$ | aim at a finite margin, not at infinity; per token, as the authors ran it according to `trl` |
# | KTO (Ethayarajh et al. 2024) | $1 - \sigma(\beta (h_w - z)) + 1 - \sigma(\beta (z - h_l))$ | good and bad answers need not come in pairs; $z \ge 0$ estimates the KL divergence |
# | ORPO (Hong et al. 2024) | $-\frac{\log \pi(y_w)}{\lvert y_w \rvert} - \lambda \log \sigma\left(\log \frac{p_w}{1 - p_w} - \log \frac{p_l}{1 - p_l}\right)$ | no reference; likelihood of the chosen answer plus odds, $p = \pi(y)^{1 / \lvert y \rvert}$ |
# | SimPO (Meng et al. 2024) | $-\log \sigma\left(\frac{\beta}{\lvert y_w \rvert} \log \pi(y_w) - \frac{\beta}{\lvert y_l \rvert} \log \pi(y_l) - \gamma\right)$ | no reference; mean per token, as in decoding; a margin $\gamma$ |
#
# KTO estimates $z$ from prompts with the answers of other prompts, which costs one more forward pass. Here $z$ is the mean of all $h$ in the batch, if positive; for the comparison with `trl` it is an argument.

# %%
def cdpo(p: LogProbs, beta: float = 0.1, epsilon: float = 0.1) -> Tensor:
    margin = beta * (p.h_chosen - p.h_rejected)
    return -(1 - epsilon) * F.logsigmoid(margin) - epsilon * F.logsigmoid(-margin)


def ipo(p: LogProbs, beta: float = 1.0) -> Tensor:
    return (p.h_chosen / p.chosen_tokens - p.h_rejected / p.rejected_tokens - 1 / (2 * beta)) ** 2


def kto(p: LogProbs, beta: float = 0.1, z: Tensor | None = None) -> Tensor:
    if z is None:
        z = torch.cat([p.h_chosen, p.h_rejected]).mean().clamp(min=0).detach()
    return 2 - (beta * (p.h_chosen - z)).sigmoid() - (beta * (z - p.h_rejected)).sigmoid()


def orpo(p: LogProbs, weight: float = 1.0) -> Tensor:
    chosen, rejected = p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens  # log p per token
    log_odds = chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return -chosen - weight * F.logsigmoid(log_odds)


def simpo(p: LogProbs, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    return -F.logsigmoid(beta * (p.chosen / p.chosen_tokens - p.rejected / p.rejected_tokens) - gamma)


FAMILY = {"DPO": dpo, "cDPO": cdpo, "IPO": ipo, "KTO": kto, "ORPO": orpo, "SimPO": simpo}

# %% [markdown]
# **Equal to the library.** `DPOTrainer` has IPO and a *robust* loss; twice $(1 - \varepsilon)$ times its DPO loss minus $(1 - 2\varepsilon)$ times the robust one is cDPO, so its weighted sum of losses serves. SimPO and ORPO live in `trl.experimental` and their loss functions take log-probabilities. KTO has a trainer of its own, which estimates $z$ from mismatched answers, so it gets a batch of its own, and our function gets its $z$. The policy is the SFT policy with noise on its weights, so that the log-ratios are not 0.

# %%
moved = copy.deepcopy(plain)
with torch.no_grad():
    for parameter in moved.parameters():  # somewhere away from the reference
        parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    p = evaluate_pairs(moved, batch)
trainer.model.load_state_dict(moved.state_dict())
slot = {"accelerator": SimpleNamespace(device=plain.device), "label_smoothing": 0.0, "alpha": 0.0}


def from_dpo_trainer(kinds: Sequence[str], weights: Sequence[float], beta: float) -> float:
    """The loss of trl's DPOTrainer on its own batch."""
    trainer.loss_types, trainer.loss_weights, trainer.beta, trainer.label_smoothing = list(kinds), weights, beta, 0.1
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, trl_batch).item()


mean_chosen, mean_rejected = p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens
simpo_trl = CPOTrainer.cpo_loss(
    SimpleNamespace(loss_type="simpo", beta=2.0, simpo_gamma=1.0, **slot), mean_chosen, mean_rejected
)[0]
odds_trl = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=1.0, **slot), mean_chosen, mean_rejected)[0]
in_trl = {
    "DPO": from_dpo_trainer(["sigmoid"], [1.0], 0.1),
    "cDPO": from_dpo_trainer(["sigmoid", "robust"], [2 * 0.9, -0.8], 0.1),
    "IPO": from_dpo_trainer(["ipo"], [1.0], 1.0),
    "ORPO": (-mean_chosen - odds_trl).mean().item(),
    "SimPO": simpo_trl.mean().item(),
}
gaps = {}
for name, other in in_trl.items():
    own = FAMILY[name](p).mean().item()
    gaps[name] = abs(own - other) / max(1.0, abs(own))
    print(f"{name:>5}: ours {own:.6f}, trl {other:.6f}, difference {gaps[name]:.1e}")

# %%
kto_rows = [
    {"prompt": turns("user", prompt), "completion": turns("assistant", answer), "label": good}
    for prompt, chosen, rejected in trl_rows[:TRL_PAIRS]
    for answer, good in ((chosen, True), (rejected, False))
]
arguments = library_settings(KTOConfig, beta=0.1, max_steps=1, per_device_train_batch_size=len(kto_rows))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    kto_trainer = KTOTrainer(
        copy.deepcopy(trainer.ref_model), ref_model=trainer.ref_model, args=arguments,
        train_dataset=Dataset.from_list(kto_rows), processing_class=tokenizer,
    )  # fmt: skip
kto_batch = kto_trainer.data_collator([kto_trainer.train_dataset[index] for index in range(len(kto_rows))])
kto_batch = {n: t.to(plain.device) if torch.is_tensor(t) else t for n, t in kto_batch.items()}
kto_trainer.model.load_state_dict(moved.state_dict())


@torch.no_grad()
def h_of(prefix: str) -> Tensor:
    """Log-ratio of each row of trl's batch (rows,)."""
    ids, mask = (kto_batch[prefix + name] for name in ("input_ids", "attention_mask"))
    labels = ids.masked_fill(kto_batch[prefix + "completion_mask"] == 0, -100)
    rows = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    tuned, untuned = (log_probs(model, rows)[0] for model in (moved, plain))
    return tuned - untuned


h, label = h_of(""), torch.as_tensor(kto_batch["label"], dtype=torch.bool, device=plain.device)
nothing, ones = torch.zeros(int(label.sum()), device=plain.device), torch.ones(int(label.sum()), device=plain.device)
z = h_of("KL_").mean().clamp(min=0)
own = kto(LogProbs(h[label], h[~label], nothing, nothing, ones, ones), z=z).mean().item() / 2
with torch.no_grad():
    other = kto_trainer.compute_loss(kto_trainer.model, kto_batch).item()
gaps["KTO"] = abs(own - other)
print(f"  KTO: ours {own:.6f}, trl {other:.6f} (mean over answers, z = {z:.3f}), difference {gaps['KTO']:.1e}")
lesson.report("relatives of DPO: largest difference to trl", f"{max(gaps.values()):.1e}")
lesson.equal("all six losses are those of trl, within 0.001", max(gaps.values()), within=1e-3)
del trainer, kto_trainer

# %% [markdown]
# **The same pairs for all.** Same start, pairs, steps and learning rate. The constants are those above; each paper searches its own, so read the result as a first look and not as a ranking.

# %%
FAMILY_STEPS = 40
family, traces = {}, {}
for name, loss in FAMILY.items():
    model, traces[name] = tune(train_pairs, loss, steps=FAMILY_STEPS)
    family[name] = judge(model)
    print(f"{name:>6}: {family[name]}; chosen {np.mean(traces[name]['h_chosen'][-8:]):+.1f} nats, "
          f"rejected {np.mean(traces[name]['h_rejected'][-8:]):+.1f}")  # fmt: skip
    lesson.report(
        f"{name}, {FAMILY_STEPS} steps: wins against SFT", str(win_rate(family[name].rewards, before.rewards))
    )
family_wins = {name: win_rate(answers.rewards, before.rewards) for name, answers in family.items()}
alt = "How often six methods win against the fine-tuned model by the true reward, with intervals."
figure = plots.bars_with_intervals(
    family_wins, title="One set of pairs, six losses", xlabel="comparisons with SFT won, ties count half",
    references={"even": 0.5}, alt=alt,
)  # fmt: skip
plots.show(figure)
curves = {name: smooth(trace["h_chosen"]) for name, trace in traces.items()}
alt = "Change of the log-probability of the chosen answers over the steps, for six losses; ORPO raises it."
figure = plots.curve(
    curves, title="Only some losses keep the chosen answer probable", xlabel="step",
    ylabel="chosen answers, against the reference (nats)", alt=alt,
)  # fmt: skip
plots.show(figure)
lesson.claim(
    "DPO, cDPO and KTO win more than half of the comparisons",
    min(family_wins[name].accuracy for name in ("DPO", "cDPO", "KTO")),
    at_least=0.5,
    form=".0%",
)
ends = {name: np.mean(traces[name]["h_chosen"][-8:]) for name in ("ORPO", "DPO")}
lesson.claim(
    "ORPO, with its likelihood term, leaves the chosen answers more probable than DPO does",
    ends["ORPO"] - ends["DPO"],
    at_least=0,
    form=".2f",
)

# %% [markdown]
# **What you see.** Once the constants are sensible, the losses resemble each other more than their papers do. They differ in what they do to the chosen answers: a likelihood term holds them up, a mere difference does not.
#
# ## 6 · SFT was good, DPO lowered the score
#
# **Question.** *"Our fine-tuned model had a good score. Then we ran DPO. The loss went down, the accuracy on the pairs went up, and the score collapsed. What happened?"*
#
# Here is the case, with three ordinary habits in it: the learning rate of fine-tuning was kept; the pairs are few and are read several times; and they were written by others and chosen with errors. Nothing in the training log gives an alarm.

# %%
BAD_RATE, CASE_STEPS = settings["sft_rate"] / RATE, 40
few_pairs = train_pairs[: lesson.scaled(48, 8)]
print(f"fine-tuning ran at {settings['sft_rate']:.0e}, this DPO runs at {BAD_RATE * RATE:.0e}; "
      f"{len(few_pairs)} pairs, read {lesson.scaled(CASE_STEPS) * 4 / len(few_pairs):.1f} times")  # fmt: skip
bad_policy, bad_trace = tune(few_pairs, rate=BAD_RATE, steps=CASE_STEPS)
bad = judge(bad_policy)
bad_accuracy = implicit_accuracy(bad_policy)
tail = slice(-8, None)
print(f"training log: loss {np.mean(bad_trace['loss'][:4]):.2f} -> {np.mean(bad_trace['loss'][tail]):.2f}, "
      f"accuracy {np.mean(bad_trace['ranked'][2:10]):.0%} -> {np.mean(bad_trace['ranked'][tail]):.0%}, "
      f"margin {0.1 * np.mean((bad_trace['h_chosen'] - bad_trace['h_rejected'])[tail]):.2f}")  # fmt: skip
print(f"implicit accuracy on held-out pairs: {bad_accuracy}")
print(f"before: {before}\nafter:  {bad}")
for question, text in list(zip(test_questions, bad.texts, strict=True))[:4]:
    print(f"  {question.prompt} -> {text[:70]!r}")
lesson.report("the case: score before and after DPO", f"{before.right} -> {bad.right}")
lesson.report("the case: implicit accuracy on held-out pairs", str(bad_accuracy))
fall = np.mean(bad_trace["loss"][:4]) - np.mean(bad_trace["loss"][tail])
lesson.claim("its loss falls", fall, at_least=0, form=".3f")
rise = np.mean(bad_trace["ranked"][tail]) - np.mean(bad_trace["ranked"][2:10])
lesson.claim("its accuracy on the pairs that it trains on rises", rise, at_least=0, form=".0%")
lesson.claim(
    "the bad setting lowers the score by at least 20 points",
    before.right.accuracy - bad.right.accuracy,
    at_least=0.2,
    form=".0%",
)

# %% [markdown]
# **Three plots for a diagnosis.** First, the log-probabilities themselves and not their difference. Second, the same for an answer that is in no pair: the right answer to a held-out question, as the SFT policy would say it. Third, where the probability went: the answer that lost most, token by token, and what the policy would say instead.

# %% tags=["headline"]
curves = {
    "chosen, this case": smooth(bad_trace["h_chosen"]),
    "rejected, this case": smooth(bad_trace["h_rejected"]),
    "chosen, section 5": smooth(traces["DPO"]["h_chosen"]),
}
alt = "Log-probability of chosen and rejected answers in the bad case: both sink by far more than in section 5."
figure = plots.curve(
    curves, title="Plot 1: both answers sink", xlabel="step", ylabel="change against the reference (nats)",
    references={"reference": 0.0}, alt=alt,
)  # fmt: skip
plots.show(figure)


def sinking(model: nn.Module) -> list[float]:
    """Change of the log-probability of what the SFT policy wrote to the test questions, per question."""
    return (without_gradient(model, own_answers) - own_known)[:, 0].tolist()


asked = [(question.prompt, text, text) for question, text in zip(test_questions, before.texts, strict=True)][:40]
own_answers = encode_pairs(asked)
own_known = torch.stack([pair["reference"] for pair in own_answers])
falls = {"SFT's own answers, this case": sinking(bad_policy), "SFT's own answers, section 3": sinking(policy)}
figure = Figure(figsize=(7, 3), layout="constrained")
axes = figure.subplots()
axes.boxplot(list(falls.values()), orientation="horizontal", tick_labels=list(falls), widths=0.6)
axes.axvline(0, color=plots.GREY, linestyle="--")
axes.set(title="Plot 2: answers that are in no pair sink as well", xlabel="change of the log-probability (nats)")
plots.show(figure, "Box plots: in the bad case the model's own earlier answers lose far more probability.")
for name, values in falls.items():
    print(f"{name}: median {np.median(values):+.1f} nats")
lost_nats = np.median(falls["SFT's own answers, this case"])
lesson.report("the case: log-probability of SFT's own answers, median change", f"{lost_nats:+.1f} nats")


# %%
@torch.no_grad()
def token_by_token(model: nn.Module, pair: dict) -> Tensor:
    """Log-probabilities (seq - 1, vocab) of every next token along the chosen answer."""
    ids = torch.tensor([pair["chosen"]["input_ids"]], device=model.device)
    return model(ids).logits[0, :-1].float().log_softmax(-1).cpu()


shown = int(np.argmin(falls["SFT's own answers, this case"]))  # the answer that lost most
pair = own_answers[shown]
labels = torch.tensor(pair["chosen"]["labels"][1:])
places = (labels != -100).nonzero()[:, 0]  # (answer tokens,)
steps = {name: token_by_token(model, pair)[places] for name, model in (("SFT", reference), ("DPO", bad_policy))}
change = [(steps["DPO"] - steps["SFT"])[row, labels[place]].item() for row, place in enumerate(places)]
words = [tokenizer.decode([token]).replace("\n", "\\n") for token in labels[places]]
figure = Figure(figsize=(9, 2.8), layout="constrained")
axes = figure.subplots()
axes.bar(range(len(words)), change, color=plots.COLORS[0])
axes.set_xticks(range(len(words)), words, rotation=60, fontsize=8)
axes.set(title="Plot 3: an answer of the SFT policy, token by token", ylabel="change (nats)")
plots.show(figure, "Change of each token's log-probability along one answer: a few tokens have lost nearly everything.")
row = int(np.argmin(change))
for name, log_p in steps.items():
    top = log_p[row].exp().topk(3)
    found = [f"{tokenizer.decode([t])!r} {v:.0%}" for v, t in zip(*map(Tensor.tolist, top), strict=True)]
    print(f"{name}, after {''.join(words[:row])!r}: {', '.join(found)}")


# %% [markdown]
# **The diagnosis.** The rejected answers have been pushed down so hard that everything near them went down as well: the chosen answers, and the model's own good answers, which no pair protects. Plot 3 shows where: not everywhere, but in a few tokens, above all in digits, in the opening and at the ends of sentences. That is where chosen and rejected answers differ, so that is where the loss can pull, and a rejected wrong digit drags the skill of adding with it. The probability has gone to texts that nobody rejected because nobody ever wrote them. The loss does not see them: with the pairs of others there is no force against a text that is in no pair. That is the gap between the toy world of section 2, where all pairs were compared, and yours.
#
# **Four repairs**, each alone, with all else as it was:
#
# 1. **A smaller rate**: a tenth of it. Fewer nats are moved.
# 2. **An NLL term** (Pang et al. 2024; in `trl`: the loss type `sft` with a weight): add $-\log \pi_\theta(y_w) / |y_w|$, so that the chosen answer cannot sink.
# 3. **Better pairs**: more of them, each read once at most, and only those whose two answers differ clearly (a true difference of at least 1; in a real project, pairs on which several annotators agree).
# 4. **On-policy pairs**: as many as in the case, but two samples of the SFT policy itself, shown to the same noisy annotator. Now what gets pushed down is what the model really says, and what it would drift to gets rejected in its turn (Tajwar et al. 2024).

# %%
def compare_own(prompts: list[Question], model: nn.Module, stream: str) -> list[tuple[str, str, str]]:
    """Two sampled answers of the model to each question, with the noisy annotator's choice."""
    generator, rows = random.Random(f"{stream}/{seed}"), []
    number = generator.randrange(10**6)
    asked = [question.prompt for question in prompts]
    with lesson.autocast():
        both = answer_instructions(
            model, tokenizer, asked, 72, temperature=1.0, num_samples=2, seed=number, batch_size=128
        )
    for question, (one, two) in zip(prompts, both, strict=True):
        gap = true_reward(question, one) - true_reward(question, two)
        if one != two:
            first = generator.random() < 1 / (1 + math.exp(-gap))
            rows.append((question.prompt, *((one, two) if first else (two, one))))
    return rows


own_rows = compare_own(questions(lesson.scaled(60, 16), "own"), reference, "own")
own_pairs = encode_pairs(own_rows)[: len(few_pairs)]
clear = [pair for pair, gap in zip(train_pairs, [p.chosen_reward - p.rejected_reward for p in train_prefs], strict=True)
         if gap >= 1]  # fmt: skip
print(f"{len(own_pairs)} pairs of the model's own answers, {len(clear)} clear pairs of {len(train_pairs)}")
print(f"for example: {own_rows[0]}")
given, sampled = (torch.stack([p["reference"] for p in pairs]).mean().item() for pairs in (train_pairs, own_pairs))
print(f"mean log-probability under the SFT policy: {given:.1f} nats for the given answers, {sampled:.1f} for its own")

# %%
REPAIRS = {
    "smaller rate": (few_pairs, {"rate": BAD_RATE / 10}),
    "NLL term": (few_pairs, {"rate": BAD_RATE, "nll": 1.0}),
    "better pairs": (clear, {"rate": BAD_RATE}),
    "on-policy pairs": (own_pairs, {"rate": BAD_RATE}),
    "rate, NLL and pairs": (clear + own_pairs, {"rate": BAD_RATE / 4, "nll": 0.2}),
}
repaired, repair_traces = {}, {}
for name, (pairs, changes) in REPAIRS.items():
    model, repair_traces[name] = tune(pairs, steps=CASE_STEPS, **changes)
    repaired[name] = judge(model)
    print(f"{name:>16}: {repaired[name]}; chosen {np.mean(repair_traces[name]['h_chosen'][tail]):+.1f} nats")
bars = {"SFT": before.right, "the case": bad.right} | {name: answers.right for name, answers in repaired.items()}
alt = "Score of SFT, of the bad case and of five repairs: high, near zero, and partly or wholly restored."
figure = plots.bars_with_intervals(
    bars, title="The score, lost and restored", xlabel="right answers (greedy, held-out questions)", alt=alt
)
plots.show(figure)

# %%
for name, answers in repaired.items():
    lesson.report(f"repair: {name}", str(answers))
lost = max(0.01, before.right.accuracy - bad.right.accuracy)
back = {name: (answers.right.accuracy - bad.right.accuracy) / lost for name, answers in repaired.items()}
print("share of the loss that came back: " + ", ".join(f"{name} {share:.0%}" for name, share in back.items()))
lesson.claim(
    "the smaller rate restores the score to within 10 points of SFT",
    before.right.accuracy - repaired["smaller rate"].right.accuracy,
    at_most=0.1,
    form=".0%",
)
lesson.claim(
    "the NLL term alone brings back at least half of what was lost", back["NLL term"], at_least=0.5, form=".0%"
)
together = repaired["rate, NLL and pairs"]
lesson.claim(
    "rate, NLL term and pairs together restore the score to within 10 points",
    before.right.accuracy - together.right.accuracy,
    at_most=0.1,
    form=".0%",
)
lesson.claim(
    "together they give a higher true reward than SFT", together.reward - before.reward, at_least=0, form=".2f"
)

# %% [markdown]
# **What you see.** The rate is the cheapest repair and the strongest. The NLL term brings back most of the score even at the high rate, since it gives the probability a place to go. Clearer pairs or the model's own, alone, bring back a part with one seed and little or nothing with another: at ten times a good rate, no data save you. Tajwar et al. (2024) find on-policy pairs important in long and careful training, which this is not. Together the repairs do more than restore the score: the true reward is then above that of SFT. When DPO lowers your score, look at the log-probability of the chosen answers first, lower the rate second, and change the data third.
#
# ## 7 · Noise in the labels
#
# **Question.** How many wrong labels can DPO bear, and does cDPO help?
#
# Take pairs that are labelled without any error, and swap a share of them. (With three in ten swapped, the labels still point the right way on average; with half of them swapped they are thrown coins.)

# %%
NOISE_STEPS = 32
clean_rows = rows_of(preferences(lesson.scaled(140, 16), "clean", noise=0.0))
clean_pairs = encode_pairs(clean_rows)


def swapped(pairs: list[dict], share: float) -> list[dict]:
    """The pairs, a random share of them with chosen and rejected exchanged."""
    generator, result = random.Random(f"swap/{seed}"), []
    for pair in pairs:
        if generator.random() < share:
            exchanged = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
            pair = exchanged | {"reference": pair["reference"].flip(0)}
        result.append(pair)
    return result


noise = {}
for share in (0.0, 0.3, 0.5):
    label = f"{share:.0%} swapped".replace("%", " %")
    noise[label] = {}
    for name, loss, constants in (("DPO", dpo, {}), ("cDPO", cdpo, {"epsilon": 0.3})):
        if name == "cDPO" and share != 0.3:
            continue
        model, trace = tune(swapped(clean_pairs, share), loss, steps=NOISE_STEPS, **constants)
        answers = judge(model)
        noise[label][name] = win_rate(answers.rewards, before.rewards)
        print(f"{label}, {name:>4}: {answers}; wins {noise[label][name]}")
        lesson.report(f"labels {label}, {name}: wins against SFT", str(noise[label][name]))
alt = "Wins against SFT with no, 30 and 50 percent of the labels swapped: fewer with more noise."
figure = plots.bars_with_intervals(
    noise, title="Wrong labels", xlabel="comparisons with SFT won", references={"even": 0.5}, alt=alt
)
plots.show(figure)
no_noise, some_noise, coin = (entry["DPO"].accuracy for entry in noise.values())
lesson.claim(
    "with right labels DPO wins at least 10 points more often than with labels by a coin",
    no_noise - coin,
    at_least=0.1,
    form=".0%",
)


# %% [markdown]
# **What you see.** Wrong labels cost a part of the gain, and most of it where three in ten are wrong: the errors have no system and cancel over many pairs, but here there are few. cDPO expects errors and moves less; with so few steps that makes little difference to the answers. Labels by a coin teach nothing, and the training still moves the model: the score falls, with some seeds to nearly nothing.
#
# ## 8 · Length exploitation
#
# **Question.** What if the annotator likes long answers a little too much?
#
# People and judges do (Park et al. 2024). Let one annotator choose by the true reward plus 1 for each idle sentence, so that an idle sentence gains a net half point. DPO learns that, and its answers grow. Park et al. put a price $\alpha$ on each token into the objective; the derivation of section 2 then gives *R-DPO*, in which the difference in length explains a part of the choice:
#
# $$\mathcal{L}_\text{R-DPO} = -\log \sigma\big(\beta (h_w - h_l) + \alpha (|y_w| - |y_l|)\big)$$

# %%
def rdpo(p: LogProbs, beta: float = 0.1, alpha: float = 0.05) -> Tensor:
    """Park et al. 2024: the longer a chosen answer, the less its tokens have to explain the choice."""
    return -F.logsigmoid(beta * (p.h_chosen - p.h_rejected) + alpha * (p.chosen_tokens - p.rejected_tokens))


def by_length_lover(rows: list[tuple[str, str, str]], prefs: Sequence[Preference]) -> list[dict]:
    """The same pairs, chosen by an annotator who adds 1 to the true reward for each idle sentence."""
    generator, chosen = random.Random(f"length/{seed}"), []
    for (prompt, one, two), pref in zip(rows, prefs, strict=True):
        idle = [sum(filler in text for filler in FILLERS) for text in (one, two)]
        gap = pref.chosen_reward - pref.rejected_reward + idle[0] - idle[1]
        chosen.append((prompt, one, two) if generator.random() < 1 / (1 + math.exp(-gap)) else (prompt, two, one))
    return encode_pairs(chosen)


long_prefs = train_prefs[: lesson.scaled(140, 16)]
long_pairs = by_length_lover(rows_of(long_prefs), long_prefs)
longer = np.mean([len(p["chosen"]["input_ids"]) - len(p["rejected"]["input_ids"]) for p in long_pairs])
print(f"the chosen answer is {longer:+.1f} tokens longer in the mean")
lengths = {"SFT": before}
for name, loss in {"DPO": dpo, "R-DPO": rdpo}.items():
    model, _ = tune(long_pairs, loss, steps=NOISE_STEPS)
    lengths[name] = judge(model, room=120)  # room for four idle sentences
tokens = {name: np.mean([len(tokenizer(text)["input_ids"]) for text in a.texts]) for name, a in lengths.items()}
for name, answers in lengths.items():
    print(f"{name:>6}: {tokens[name]:.0f} tokens in the mean; {answers}")
    lesson.report(f"annotator who likes length, {name}", f"{tokens[name]:.0f} tokens, reward {answers.reward:.2f}")
lesson.claim(
    "DPO writes longer answers than R-DPO, by at least a fifth",
    tokens["DPO"] / tokens["R-DPO"],
    at_least=1.2,
    form=".2f",
)
lesson.claim("and has the lower true reward", lengths["R-DPO"].reward - lengths["DPO"].reward, at_least=0, form=".2f")


# %% [markdown]
# **What you see.** With an annotator who likes length, DPO writes it, although every single choice looks reasonable, and some answers grow until the room is used up. R-DPO takes most of that back; how much depends on $\alpha$, which has to be chosen. In practice nobody hands you the true reward: compare the lengths of chosen and rejected answers before you train, and those of the answers before and after.
#
# ## 9 · Pairs on the way: iterative DPO, and GRPO at equal compute
#
# **Question.** Is it better to sample new answers during training, and is reinforcement learning better than DPO then?
#
# **Iterative DPO** (Xiong et al. 2023) repeats three steps: sample two answers from the *present* policy, let the annotator choose, and run DPO with the present policy as the new reference.
#
# **GRPO** (Shao et al. 2024; lesson 08) samples a group of answers to each prompt, scores them, and raises the log-probability of those that are better than their group's mean. With one update for each batch of samples there is nothing to clip, and the loss is $-A \log \pi_\theta(y \mid x) / |y|$ with the advantage $A = (R - \bar R) / s_R$, mean and deviation taken in the group. To climb the very objective of section 2, take $R = r(x, y) - \beta\, h(x, y)$ with the same $\beta$.
#
# **Equal compute.** Count tokens: a forward pass over a token is 1 unit, a backward pass 2, and a generated token 1. A token of a DPO pair costs 4 units (policy forward and backward, reference forward), one of the model's own pairs 5 (it is generated as well), and a token of GRPO 5 (generated, policy forward and backward, reference forward). All methods get what 40 steps of DPO cost.
#
# **Unequal information.** That is the fine print of such comparisons. DPO gets one noisy choice for each pair, from a list made beforehand. Iterative DPO gets the same kind of choices, on its own answers. GRPO needs a number for each answer. Give it once a reward model that was learned from the same choices as DPO's, and once the true reward, which no human project has, but a task with verifiable answers does. The reward model is the smallest there is: the hidden states of the frozen SFT policy, averaged over the answer, and a linear layer fitted by Bradley and Terry.

# %%
@torch.no_grad()
def features(rows: Sequence[dict]) -> Tensor:
    """Mean hidden state of the SFT policy over each answer, and the answer's length: (rows, hidden + 1)."""
    parts = []
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32], tokenizer.pad_token_id)
        said = (batch.pop("labels") != -100).to(reference.device)  # (rows, seq)
        with lesson.autocast():
            inputs = {name: tensor.to(reference.device) for name, tensor in batch.items()}
            states = reference(**inputs, output_hidden_states=True).hidden_states[-1].float()
        mean = (states * said[..., None]).sum(1) / said.sum(1, keepdim=True)
        parts.append(torch.cat([mean, said.sum(1, keepdim=True) / 20], dim=1))
    return torch.cat(parts).cpu()


def fit_reward(pairs: list[dict], decay: float = 0.1) -> Tensor:
    """Weights (hidden + 1,) of a linear reward that makes the choices most probable."""
    difference = features([p["chosen"] for p in pairs]) - features([p["rejected"] for p in pairs])
    weights = torch.zeros(difference.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -F.logsigmoid(difference @ weights).mean() + decay * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


reward_weights = fit_reward(train_pairs)
sides = [features([pair[side] for pair in test_pairs]) @ reward_weights for side in ("chosen", "rejected")]
reward_ranks = score(int((sides[0] > sides[1]).sum()), len(test_pairs))
print(f"the learned reward ranks {reward_ranks} of the held-out pairs as the annotator did")

# %%
Groups = list[list[str]]  # for each question its sampled answers


def encoded(asked: list[Question], groups: Groups) -> list[dict]:
    """All questions with their answers, one after the other."""
    return [encode_chat(tokenizer, q.prompt, text) for q, texts in zip(asked, groups, strict=True) for text in texts]


def learned_reward(asked: list[Question], groups: Groups) -> Tensor:
    """Scores of the reward model (questions, answers)."""
    return (features(encoded(asked, groups)) @ reward_weights).view(len(asked), -1)


def told_reward(asked: list[Question], groups: Groups) -> Tensor:
    """The true reward (questions, answers)."""
    return torch.tensor([[true_reward(q, text) for text in texts] for q, texts in zip(asked, groups, strict=True)])


# %%
def grpo(reward_of: Callable, units: float, rate: float, beta: float = 0.1) -> tuple[nn.Module, int]:
    """Policy gradient with advantages within groups, until the units are used up; returns the number of steps."""
    model, spent, step = fresh(), 0, 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    while spent < units:
        asked = questions(8, f"grpo {step}")
        with lesson.autocast():
            groups = answer_instructions(model, tokenizer, [q.prompt for q in asked], 72, temperature=1.0,
                                         num_samples=4, seed=1000 * seed + step, batch_size=32)  # fmt: skip
        batch = collate(encoded(asked, groups), tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with lesson.autocast():
            known = log_probs(reference, batch)[0].detach()  # no gradient: its weights are frozen
            sums, tokens = log_probs(model, batch)
        rewards = reward_of(asked, groups) - beta * (sums.detach().float() - known.float()).view(8, 4).cpu()
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 0.1)  # (8, 4)
        loss = -(advantages.flatten().to(model.device) * sums / tokens).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent, step = spent + 5 * batch["input_ids"].numel(), step + 1
    return model.eval(), step


# %%
UNITS = 4 * float(traces["DPO"]["tokens"].sum())  # what 40 steps of DPO took in section 5
print(f"{UNITS / 1000:.0f} thousand units for each method")
online = {"DPO, given pairs": family["DPO"]}
ROUNDS, STEPS_PER_ROUND = 3, int(FAMILY_STEPS * 4 / 5 / 3)  # a token of an own pair costs 5 units and not 4
model = None
for turn in range(ROUNDS):
    present = reference if model is None else model
    number = lesson.scaled(4 * STEPS_PER_ROUND + 6, 6)
    rows = compare_own(questions(number, f"round {turn}"), present, f"round {turn}")
    pairs = encode_pairs(rows, under=present)
    model, _ = tune(pairs, start=model, steps=STEPS_PER_ROUND, rate=0.6)
    answers = judge(model)
    print(f"iterative DPO, round {turn + 1}: {answers}")
online["iterative DPO"] = answers
for name, reward_of in {"GRPO, learned reward": learned_reward, "GRPO, true reward": told_reward}.items():
    model, steps = grpo(reward_of, UNITS, RATE)
    online[name] = judge(model)
    print(f"{name}, {steps} steps: {online[name]}")
online_wins = {name: win_rate(answers.rewards, before.rewards) for name, answers in online.items()}
alt = "Wins against SFT at equal compute for DPO on given pairs, iterative DPO, and GRPO with two rewards."
figure = plots.bars_with_intervals(
    online_wins, title="Equal compute, unequal information", xlabel="comparisons with SFT won",
    references={"even": 0.5}, alt=alt,
)  # fmt: skip
plots.show(figure)
for name, answers in online.items():
    lesson.report(f"equal compute, {name}", f"reward {answers.reward:.2f}, score {answers.right}")
for name in ("DPO, given pairs", "iterative DPO", "GRPO, true reward"):
    lesson.claim(
        f"at equal compute it raises the true reward: {name}",
        online[name].reward - before.reward,
        at_least=0,
        insist=name != "iterative DPO",  # it gains on some machines and loses politeness on others
        form=".2f",
    )

# %% [markdown]
# **What you see.** The order follows the information, not the name of the method. GRPO with the true reward keeps up with DPO in a few steps or overtakes it: it learns from what the model really writes, and its numbers have no noise. With a reward model made from the same noisy choices as DPO's, it depends on the seed: that model ranks held-out pairs only somewhat better than chance, and the policy can gain as much as with the true reward, or be drawn to where the model errs and end below SFT. DPO needs neither samples nor a reward model. Iterative DPO adds samples and fresh choices of its own answers. After so few steps it is level with DPO on some machines; on others its answers stay right but lose their politeness, and its reward ends below that of SFT: rounding in 16 bits is enough to decide which. The ledger of claims lists it as a claim that does not survive. Xu et al. (2024) find PPO with a good reward model ahead of DPO, most of all where the pairs come from another distribution; Tajwar et al. (2024) say the same of on-policy data. If you can check answers by a program, use the check as a reward; if all you have is choices, DPO is hard to beat at this price.
#
# ## 10 · A T4 is enough
#
# **Question.** DPO holds a policy and a reference. What does that take on a GPU with 16 GB?
#
# A second copy of the model for the reference is needed only if all weights are trained. With an adapter, *the reference is the model with its adapter switched off*: the log-probabilities of the reference come from a forward pass under `disable_adapter()`. With QLoRA the frozen weights are in 4 bits. `helpers.memory` follows a training step on a batch of 4 pairs, which are 8 rows. The reference's pass keeps nothing for a backward pass and comes before it, so it adds no peak of its own; a reference of its own adds its weights.

# %%
shape = ModelShape.from_config("Qwen/Qwen2.5-0.5B")
plan = {"batch_size": 8, "seq_len": 512, "precision": "fp16"}
second = shape.num_parameters * 2  # bytes of a reference of its own, in 16 bits
plans = {
    "all weights in fp32, fp16 steps": ({"method": "full", "precision": "fp16-mixed"}, second),
    "LoRA": ({"method": "lora", "lora_rank": 16}, 0),
    "QLoRA": ({"method": "qlora", "lora_rank": 16, "optimizer": "paged_adamw_8bit"}, 0),
    "QLoRA, checkpointing": (
        {"method": "qlora", "lora_rank": 16, "optimizer": "paged_adamw_8bit", "gradient_checkpointing": True}, 0,
    ),
}  # fmt: skip
needs = {}
for name, (changes, extra) in plans.items():
    estimate = estimate_training(shape, **(plan | changes))
    needs[name] = estimate.total + extra
    full = (needs[name] + estimate.overhead) / GPUS["T4"].memory
    print(f"{name:>32}: {needs[name] / GIB:5.1f} GiB, {extra / GIB:.1f} of it for a second model; "
          f"logits {estimate.logits / GIB:.1f}; a T4 is {full:.0%} full")  # fmt: skip
    lesson.report(f"DPO on a 0.5 B model, 4 pairs of 512 tokens, {name}", f"{needs[name] / GIB:.1f} GiB")
lesson.claim("QLoRA DPO with checkpointing fits a T4", full, at_most=1, form=".0%")


# %% [markdown]
# **What you see.** The vocabulary of this model is large and its width small, so the logits of 8 rows are a good part of everything, with or without quantisation. Checkpointing and 4 bits leave ample room; longer answers or more pairs per batch would fill it with logits first. `trl` computes them in pieces for that reason.
#
# ## 11 · Exercises
#
# Four, from easy to open. Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.

# %% tags=["exercise"]
# Exercise 9.1, easy: how hard does a pair pull?
def pull(p: LogProbs, beta: float) -> Tensor:
    """The factor (pairs,) in front of (grad log pi(y_w) - grad log pi(y_l)) in DPO's descent direction, see section 2.

    It is near 0 for a pair that is ranked right with a large margin, and beta / 2 before training. No gradient.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_pull(pull):
    values = torch.tensor([-3.0, -1.0, 0.0, 4.0, 40.0])
    for beta in (0.1, 0.7):
        chosen = (values - 7).requires_grad_()
        p = LogProbs(chosen, torch.full((5,), -9.0), torch.full((5,), -7.0), torch.full((5,), -9.0), values, values)
        (gradient,) = torch.autograd.grad(-F.logsigmoid(beta * (p.h_chosen - p.h_rejected)).sum(), chosen)
        found = pull(p, beta)
        expect_shape("pull(p, beta)", found, (5,))
        expect_close(f"pull(p, {beta})", found, -gradient, 1e-6)
        expect_true("it has no gradient", not found.requires_grad)
    swapped_sides = LogProbs(p.rejected, p.chosen.detach(), p.ref_rejected, p.ref_chosen, values, values)
    expect_close("with the answers exchanged", pull(swapped_sides, 0.7), 0.7 * (0.7 * values).sigmoid(), 1e-6)


check("9.1", check_pull, pull)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Differentiate $-\log \sigma(z)$ by $z$, then $z$ by $\log \pi_\theta(y_w)$.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def pull(p: LogProbs, beta: float) -> Tensor:
#     return (beta * torch.sigmoid(beta * (p.h_rejected - p.h_chosen))).detach()
# ```
#
# The pull never becomes 0, so a pair that is ranked right goes on being pushed apart. IPO stops at its target instead.
#
# </details>

# %% tags=["exercise"]
# Exercise 9.2, medium: DPOP, a floor under the chosen answer.
def dpop(p: LogProbs, beta: float = 0.1, weight: float = 5.0) -> Tensor:
    """Loss of each pair (pairs,), Pal et al. 2024: DPO with a penalty inside the sigmoid,

    -log sigmoid(beta * (h_w - h_l - weight * max(0, -h_w))).

    The penalty acts only where the chosen answer is less probable than under the reference.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_dpop(dpop):
    generator = torch.Generator().manual_seed(3)
    sides = [-10 * torch.rand(6, generator=generator) for _ in range(4)]
    sides[0] = (sides[2] + torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0, -1.0])).requires_grad_()
    ones = torch.ones(6)
    p = LogProbs(*sides, ones, ones)
    expect_shape("dpop(p)", dpop(p), (6,))
    above = p.h_chosen.detach() > 0
    expect_close("where h_w > 0 it is DPO", dpop(p, 0.3)[above], dpo(p, 0.3)[above], 1e-6)
    expect_close("with weight 0 it is DPO", dpop(p, 0.3, 0.0), dpo(p, 0.3), 1e-6)
    sunk = LogProbs(*(torch.tensor([value]) for value in (-6.0, -9.0, -4.0, -5.0)), ones[:1], ones[:1])
    expect_close("h_w = -2, h_l = -4, beta 0.5, weight 3", dpop(sunk, 0.5, 3.0), torch.tensor([2.1269280]), 1e-5)
    (gradient,) = torch.autograd.grad(dpop(p).sum(), sides[0])
    expect_true("a smaller log-probability of a chosen answer means a larger loss", (gradient <= 0).all())


check("9.2", check_dpop, dpop)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The penalty is `clamp(min=0)` of something, and stands inside the sigmoid, multiplied by beta.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def dpop(p: LogProbs, beta: float = 0.1, weight: float = 5.0) -> Tensor:
#     penalty = weight * (-p.h_chosen).clamp(min=0)
#     return -F.logsigmoid(beta * (p.h_chosen - p.h_rejected - penalty))
# ```
#
# Run `tune(train_pairs, dpop, rate=BAD_RATE)` and look at the score.
#
# </details>

# %% tags=["exercise"]
# Exercise 9.3, medium: an unbiased loss for labels of known quality.
def robust(p: LogProbs, beta: float, epsilon: float) -> Tensor:
    """Loss of each pair (pairs,) whose mean over swapped labels is the DPO loss of the right label.

    A label is exchanged with probability epsilon < 1/2. With L the DPO loss of the pair as labelled and L' that of the
    exchanged pair, find a L + b L' such that (1 - epsilon) * loss(right label) + epsilon * loss(exchanged label) = L of
    the right label, whatever L and L' are. (Chowdhury et al. 2024. cDPO does not have this property.)
    """
    raise NotImplementedError


# %% tags=["check"]
def check_robust(robust):
    generator = torch.Generator().manual_seed(4)
    one, two, ref_one, ref_two = (-10 * torch.rand(7, generator=generator) for _ in range(4))
    ones = torch.ones(7)
    right = LogProbs(one, two, ref_one, ref_two, ones, ones)
    exchanged = LogProbs(two, one, ref_two, ref_one, ones, ones)
    for beta, epsilon in ((0.1, 0.2), (1.0, 0.4)):
        mean = (1 - epsilon) * robust(right, beta, epsilon) + epsilon * robust(exchanged, beta, epsilon)
        expect_close(f"the mean over labels, beta {beta}, epsilon {epsilon}", mean, dpo(right, beta), 1e-4)
        mean = (1 - epsilon) * robust(exchanged, beta, epsilon) + epsilon * robust(right, beta, epsilon)
        expect_close("the same for the exchanged pair", mean, dpo(exchanged, beta), 1e-4)
    expect_close("without errors it is DPO", robust(right, 0.5, 0.0), dpo(right, 0.5), 1e-6)


check("9.3", check_robust, robust)


# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write the mean over both labels as a factor times L plus a factor times L'. The first must be 1, the second 0.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Two equations, $(1 - \varepsilon)(aL + bL') + \varepsilon(aL' + bL) = L$ for all $L$, $L'$: the factor of $L$ is 1 and that of $L'$ is 0.
#
# ```python
# def robust(p: LogProbs, beta: float, epsilon: float) -> Tensor:
#     margin = beta * (p.h_chosen - p.h_rejected)
#     as_labelled, exchanged = -F.logsigmoid(margin), -F.logsigmoid(-margin)
#     return ((1 - epsilon) * as_labelled - epsilon * exchanged) / (1 - 2 * epsilon)
# ```
#
# The price is variance: the second term rewards without bound for ranking a pair against its label.
#
# </details>

# %% tags=["exercise"]
# Exercise 9.4, open: repair the case your own way.
def repair(pairs: list[dict]) -> nn.Module:
    """A policy tuned on the few pairs of the case, at its rate, whose score stays within 25 points of SFT's.

    Call `tune(..., rate=BAD_RATE, steps=40)` with any loss and constants, on any of these pairs (they have "chosen",
    "rejected" and "reference" only). You may not lower the rate or the number of steps, and not use other pairs.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_repair(repair):
    given = [dict(pair) for pair in few_pairs]
    calls = []
    original = globals()["tune"]

    def watched(pairs, *arguments, **options):
        own = all(any(pair["chosen"] is p["chosen"] for p in given) for pair in pairs)
        calls.append((own, options.get("rate", 1.0), options.get("steps", 40)))
        return original(pairs, *arguments, **options)

    globals()["tune"] = watched
    try:
        answers = judge(repair(given))
    finally:
        globals()["tune"] = original
    expect_true("tune was called, with the given pairs only", calls and all(own for own, *_ in calls))
    expect_true("its rate was BAD_RATE", all(rate == BAD_RATE for _, rate, _ in calls))
    expect_true("it took 40 steps", all(steps == 40 for *_, steps in calls))
    lowest = before.right.accuracy - 0.25
    expect_true(f"the score, {answers.right.accuracy:.0%}, is at least {lowest:.0%}", answers.right.accuracy >= lowest)


check("9.4", check_repair, repair)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Which term of section 6 gives the probability a place to go? It may weigh more than it did there.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Hold the chosen answers up, strongly, and the rate does less harm.
#
# ```python
# def repair(pairs: list[dict]) -> nn.Module:
#     model, _ = tune(pairs, rate=BAD_RATE, steps=40, nll=5.0)
#     return model
# ```
#
# Other ways: DPOP of exercise 9.2, or ORPO, whose likelihood term is built in.
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
# With `trl` and `peft` DPO with QLoRA is a configuration: the base in 4 bits, a LoRA configuration, no reference model. `DPOTrainer` takes the reference's log-probabilities from the same model with the adapter disabled. The cell below runs it on the profile's assistant, with an NLL term (`loss_type` and `loss_weights`), and checks by hand that the disabled adapter is the reference. Watch `logps/chosen` in the log, not only `rewards/accuracies`.

# %%
assistant.save_pretrained(BUILD / "sft")
practice_rows = rows_of(train_prefs[: lesson.scaled(48, 8)])
as_chats = Dataset.from_list(
    [{"prompt": turns("user", p), "chosen": turns("assistant", c), "rejected": turns("assistant", r)}
     for p, c, r in practice_rows]
)  # fmt: skip
arguments = library_settings(
    DPOConfig, beta=0.1, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2], max_steps=lesson.scaled(12),
    logging_steps=4, per_device_train_batch_size=4, learning_rate=10 * RATE if CPU else RATE,
    lr_scheduler_type="cosine", gradient_checkpointing=not CPU, optim="adamw_torch" if CPU else "paged_adamw_8bit",
    fp16=lesson.precision == "fp16-mixed", bf16=lesson.precision == "bf16-mixed",
)  # fmt: skip
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trainer = DPOTrainer(
        load_in_4_bit(BUILD / "sft", machine.device, lesson.compute_dtype), args=arguments,
        train_dataset=as_chats, processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if not CPU:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
for entry in trainer.state.log_history:
    if "rewards/accuracies" in entry and "loss" in entry:
        print(f"loss {entry['loss']:.3f}, accuracy {entry['rewards/accuracies']:.0%}, "
              f"log-probability of the chosen answers {entry['logps/chosen']:.1f}")  # fmt: skip
if not CPU:
    print(f"peak of this process on the GPU: {torch.cuda.max_memory_allocated() / GIB:.1f} GiB, all models included")

# %%
tuned = trainer.model.eval()
few = encode_pairs(practice_rows[:8], under=tuned)
with tuned.disable_adapter():
    disabled = without_gradient(tuned, few)
untouched = load_in_4_bit(BUILD / "sft", machine.device, lesson.compute_dtype)
gap = (disabled - without_gradient(untouched, few)).abs().max().item()
moved_by = (disabled - torch.stack([pair["reference"] for pair in few])).abs().mean().item()
print(f"adapter disabled against a model loaded anew: largest difference {gap:.1e} nats")
print(f"adapter on against off: mean difference {moved_by:.2f} nats")
lesson.report("QLoRA: disabled adapter against the untouched 4-bit model", f"{gap:.1e} nats")
lesson.claim("the model with its adapter disabled is the reference", gap, at_most=0.5, form=".2g")
lesson.claim("with the adapter on it is further away", moved_by - gap, at_least=0, form=".2f")

# %% [markdown]
# **What is different at scale**
#
# | here | a model of billions of parameters |
# |---|---|
# | learning rate 1e-4, all weights | 5e-7 to 5e-6 for all weights (Zephyr: 5e-7), about ten times as much for LoRA: 10 to 100 times below fine-tuning |
# | $\beta$ 0.03 to 0.5 | 0.01 to 0.5; small for large models that have been fine-tuned well (Zephyr: 0.1) |
# | 160 to 320 pairs, an annotator with a known error | ten thousands to millions; the error is unknown, so hold some pairs out and label them twice |
# | the true reward | human judges, or a model as a judge, which likes length: control for it |
# | greedy score on 100 questions | the benchmarks of the SFT model, before and after, every time |
# | one to three rounds | several rounds on-policy, filtered by a reward model or by verifiable answers |
#
# **When DPO lowers your score**
#
# 1. Plot the log-probability of the chosen answers. If it falls by many nats, lower the rate, then add an NLL term.
# 2. Generate at every evaluation. Accuracy on pairs is no substitute.
# 3. Compare the log-probability of your pairs under the SFT policy with that of its own samples. If they are far apart, fine-tune on the chosen answers first, or sample pairs from your model.
# 4. Read fifty pairs. Is the chosen answer better? Longer?
# 5. Stop early: one epoch, often less.
#
# ## Read on
#
# - Rafailov et al. 2023, *Direct Preference Optimization: Your Language Model is Secretly a Reward Model*, arXiv:2305.18290.
# - Azar et al. 2023, *A General Theoretical Paradigm to Understand Learning from Human Preferences* (IPO), arXiv:2310.12036; Mitchell 2023, *A note on DPO with noisy preferences and relationship to IPO* (cDPO); Chowdhury et al. 2024, *Provably Robust DPO*, arXiv:2403.00409.
# - Ethayarajh et al. 2024, *KTO: Model Alignment as Prospect Theoretic Optimization*, arXiv:2402.01306; Hong et al. 2024, *ORPO: Monolithic Preference Optimization without Reference Model*, arXiv:2403.07691; Meng et al. 2024, *SimPO: Simple Preference Optimization with a Reference-Free Reward*, arXiv:2405.14734.
# - Pal et al. 2024, *Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive*, arXiv:2402.13228; Razin et al. 2024, *Unintentional Unalignment: Likelihood Displacement in Direct Preference Optimization*, arXiv:2410.08847; Pang et al. 2024, *Iterative Reasoning Preference Optimization* (the NLL term), arXiv:2404.19733.
# - Park et al. 2024, *Disentangling Length from Quality in Direct Preference Optimization*, arXiv:2403.19159.
# - Xu et al. 2024, *Is DPO Superior to PPO for LLM Alignment? A Comprehensive Study*, arXiv:2404.10719; Tajwar et al. 2024, *Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data*, arXiv:2404.14367; Xiong et al. 2023, *Iterative Preference Learning from Human Feedback*, arXiv:2312.11456; Shao et al. 2024, *DeepSeekMath* (GRPO), arXiv:2402.03300.
# - Tunstall et al. 2023, *Zephyr: Direct Distillation of LM Alignment*, arXiv:2310.16944: a complete recipe with its settings.
