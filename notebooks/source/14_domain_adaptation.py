# %% [markdown]
# # 14 · Domain adaptation: one model, a new field
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/14_domain_adaptation.ipynb) [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/llm-workbook/llm-workbook/blob/v0.1.0/notebooks/14_domain_adaptation.ipynb)
#
# A hospital and a bank ask the same thing: here is a good general model, make it useful in *our* field. Four ways are on offer. Write a better prompt, look facts up, pretrain further on the field's texts, or fine-tune on its questions. People choose by habit. In this lesson you choose by measurement: one exam for all four, their cost in one unit, what reading on breaks, and whether a difference of a few points means anything.
#
# **cpu 0 s · 0 GB**
#
# **You will**
#
# 1. give a base model the medicine of Shima in four ways, compare right answers and cost, and compute the number of questions at which training pays;
# 2. see what the wording of the training text does to facts that are asked for in other words;
# 3. measure what continued pretraining destroys, and how much of it replay and weight interpolation bring back;
# 4. see what fine-tuning teaches, and what it does not;
# 5. decide whether one system is better than another, and whether it knows when it is wrong.
#
# **Prerequisites:** lessons 02 (retrieval), 03 (pretraining) and 05 (fine-tuning).
#
# **The data.** *shima-4m* is a small Llama that comes with the course. It was pretrained on documents about the made-up island Shima: its people, stories, sums. Two fields were kept out of them, *medicine* (40 illnesses, each with a first sign, a herb and a dose) and *finance* (40 companies, each with a product, a seat and a profit). Nobody can have read about them before: what the model knows of them at the end, you taught it. On a GPU the same cells adapt an open hub model with LoRA.
#
# | symbol | meaning |
# |---|---|
# | $N$, $T$ | parameters of the model, tokens that it is trained on |
# | $\theta_0$, $\theta_1$ | weights before and after the adaptation |
# | $r$ | replay: the share of general text among the training tokens |
# | $\lambda$ | interpolation: $\theta = (1 - \lambda)\,\theta_0 + \lambda\,\theta_1$ |
# | $n_{10}$, $n_{01}$ | questions that only the first of two systems answers right, or only the second |
# | $\hat p$, $\tau$ | confidence, the model's probability of its own answer; temperature |

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
model_id = ""  # another base model: a hub id, or a folder in hub format
seed = 0
budget = 1.0  # share of all training steps and questions; the lesson's claims are asserted from 1.0 on

# %%
import copy
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from helpers import plots
from helpers.chat import chat_prompt
from helpers.data import PaddedBatches, collate, pack, text_dataset
from helpers.evaluation import Score, score
from helpers.exercises import check, expect_close, expect_equal, expect_true
from helpers.generation import answer_instructions, generate
from helpers.lesson import Lesson, show_table
from helpers.models import load_assistant, load_model
from helpers.training import History, TrainConfig, train
from helpers.world import DOMAIN_RELATIONS, RELATIONS, Question, World, ask

lesson = Lesson("14", profile, model_id, seed, budget)
machine = lesson.machine
# All that depends on the hardware: learning rates for reading and for chats, adapters in place of all weights, and the
# number formats, in training and of a trained model that waits. (On a CPU 16 bits are slower for rows this short.)
SETTINGS = {
    "cpu": {"rate": 1.5e-3, "chat_rate": 5e-4, "adapters": False, "precision": "fp32", "at_rest": torch.float32},
    "t4": {"rate": 2e-4, "chat_rate": 2e-4, "adapters": True, "precision": lesson.precision, "at_rest": torch.float16},
}
SETTINGS["large"] = SETTINGS["t4"]
settings = SETTINGS[machine.name]
IN_16_BITS = settings["precision"] != "fp32"

# %% [markdown]
# `lesson.scaled` makes a number of steps or questions smaller on a smaller budget, and `lesson.autocast` lets a block compute in 16 bits where the machine is fast in them. `lesson.claim` prints a number with the bound that it must keep (and as *control* the same number where the effect should be absent, if that was measured), `lesson.equal` the difference of two computations that must agree, and `lesson.report` keeps a number for the table at the end. Every training below is **one run**; the course's ledger of claims repeats all of them with five seeds.

# %%
world = World()
base, tokenizer = load_model(machine)
base = base.float().eval()  # weights in 32 bits; the steps compute in 16 where that is faster
TOLD = {domain: entities[:16] for domain, entities in world.domains.items()}  # what the exam is about
PRACTICE = {domain: entities[16:28] for domain, entities in world.domains.items()}  # in one text, as exercises
UNTOLD = {domain: entities[28:] for domain, entities in world.domains.items()}  # no model is trained on them
for domain, entities in TOLD.items():
    facts = [form.statements[0].format(name=entities[0].name, value=entities[0].facts[name])
             for name, form in DOMAIN_RELATIONS[domain].items()]  # fmt: skip
    print(f"{domain}: {' '.join(facts)}")

# %% [markdown] tags=["core"]
# ## 1 · An exam, and its floor
#
# **Question.** What does the model know of the new fields before you do anything, and which score means nothing?
#
# The exam is about the first 16 illnesses (or companies), 48 facts. It asks for each of them in two wordings that no text of this lesson uses otherwise: each relation has six question forms and ten statements, and two of each are *held out*. So an answer shows knowledge and not a remembered sentence. (Two questions on one fact are no independent witnesses, so the intervals below are somewhat too narrow.) The last 12 illnesses will be told to no model. They are the **control**: a method that improves *them* has taught something else than facts.
#
# **The floor.** Even a student who knows nothing gets points. One who picks a value of the right kind by chance is right once in as many values as there are. One who has seen last year's exam answers with the most frequent value of each kind. Below that line a score says nothing about illnesses.


# %%
def some(questions: Sequence[Question], least: int = 8) -> list[Question]:
    """The first questions, as many as the budget allows."""
    return list(questions)[: lesson.scaled(len(questions), least)]


def exam(domain: str, entities: Sequence, forms: str = "held_out_questions", wordings: int = 2) -> list[Question]:
    """Each fact, asked for in so many of its wordings one after the other; the facts in random order."""
    generator = random.Random(f"exam/{domain}/{forms}/{seed}")
    facts, items = list(itertools.product(entities, DOMAIN_RELATIONS[domain].values())), []
    for entity, relation in generator.sample(facts, len(facts)):
        about = {"name": entity.name, "relation": relation.name}
        for form in generator.sample(getattr(relation, forms), wordings):
            items.append(Question(ask(form.format(name=entity.name)), entity.facts[relation.name], domain, about))
    return items


# %%
def best_constant(questions: Sequence[Question]) -> Score:
    """The score of whoever answers each kind of question with its most frequent answer."""
    kinds = {relation: Counter() for relation in {str(q.about["relation"]) for q in questions}}
    for question in questions:
        kinds[str(question.about["relation"])][question.answer] += 1
    return score(sum(counts.most_common(1)[0][1] for counts in kinds.values()), len(questions))


exams = {domain: some(exam(domain, entities)) for domain, entities in TOLD.items()}
floor = {domain: best_constant(questions) for domain, questions in exams.items()}
for domain, questions in exams.items():
    values = [len({e.facts[relation] for e in TOLD[domain]}) for relation in DOMAIN_RELATIONS[domain]]
    print(f"{domain}: {len(questions)} questions, such as {questions[0].prompt!r} -> {questions[0].answer!r}")
    chance = np.mean([1 / number for number in values])
    print(f"  a random value of the right kind: {chance:.0%}; the most frequent ones: {floor[domain]}")

# %% [markdown]
# Whatever a model is made into, it should still do what it could before. So there is a second exam of four *general* abilities: facts about well-known people, reading a passage about strangers, a mapping shown in the prompt, and sums with written steps.


# %%
def short_answer(question: Question, text: str) -> str:
    """What counts: of a mapping the first label, of a sum what the last step gives, of a sentence all of it."""
    cut = {
        "few_shot": text.partition(";")[0],
        "sums": text.rpartition("=")[2],
        "sentence": text.partition(".")[0] + ".",
    }
    return cut.get(question.ability, text).strip()


def answers(model: nn.Module, questions: Sequence[Question], room: int = 8) -> list[str]:
    """The model's answers, greedily decoded up to the end of the line."""
    with lesson.autocast(IN_16_BITS):
        texts = generate(model, tokenizer, [q.prompt for q in questions], room, batch_size=128)
    return [short_answer(question, text) for question, text in zip(questions, texts, strict=True)]


# %%
def right(model: nn.Module, questions: Sequence[Question], room: int = 8) -> list[bool]:
    """For each question, whether the answer is exactly the right one."""
    given = answers(model, questions, room)
    return [text == question.answer for text, question in zip(given, questions, strict=True)]


def share(hits: Sequence[bool]) -> Score:
    """The share of right answers with its interval."""
    return score(sum(hits), len(hits))


GENERAL = {
    "people": some(world.closed_book(40, 100 + seed, range(1, 101))),
    "reading": some(world.open_book(40, 100 + seed)),
    "mapping": some(world.few_shot(40, 100 + seed, shots=8)),
    "sums": some(world.sums(40, 100 + seed, with_steps=True)),
}


def general(model: nn.Module) -> dict[str, Score]:
    """The scores of the four general abilities."""
    return {name: share(right(model, items, 40 if name == "sums" else 8)) for name, items in GENERAL.items()}


# %%
untold = some(exam("medicine", UNTOLD["medicine"]))
general_before = general(base)
before = {f"{domain}, no help": share(right(base, questions)) for domain, questions in exams.items()}
figure = plots.bars_with_intervals(
    before | general_before, title="It knows people and reads, and nothing of the fields",
    xlabel="right answers", references={"best constant": floor["medicine"].accuracy},
)  # fmt: skip
plots.show(
    figure, alt="Bars: both fields at or near zero, below the constant guess; four general abilities near 100 %."
)
print("asked about medicine it says", Counter(answers(base, exams["medicine"][:8])).most_common(4))
lesson.report("medicine, base model without help", str(before["medicine, no help"]))

# %% [markdown]
# The base model is below even the constant guess: it does not know yet what kind of thing the answer is. It answers with words of the kinds that it knows. A rise to the floor would only show that it learned the *form* of the answers. That is why the floor is drawn.
#
# **Words cost more, too.** A tokenizer made for general text cuts a field's words into more pieces. *Fertility* is the number of tokens per word. It decides how much text fits into a prompt, and how much a look-up costs.


# %%
def fertility(words: Sequence[str]) -> float:
    """Tokens per word, each word standing after a space."""
    return float(np.mean([len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words]))


terms = sorted({e.facts[kind] for e in world.domains["medicine"] for kind in ("symptom", "herb")})
common = sorted({value for kind in ("trade", "animal", "dish") for value in world.values[kind]})
halves = [common[::2], common[1::2]]
text = " ".join(["", *terms])
offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
pieces = Counter(len(text[:end].split()) for _, end in offsets)  # word number -> its tokens, all words in one text
lesson.equal("fertility by word is that of the whole text", abs(np.mean([*pieces.values()]) - fertility(terms)),
             within=1e-9)  # fmt: skip
for name, words in {"signs and herbs": terms, "trades, animals, dishes": common}.items():
    print(f"{name}: {fertility(words):.2f} tokens a word, such as {tokenizer.tokenize(' ' + words[-1])}")
lesson.claim("a medical word costs at least 1.5 times the tokens of a common word",
             fertility(terms) / fertility(common), at_least=1.5,
             control=fertility(halves[0]) / fertility(halves[1]))  # fmt: skip

# %% [markdown] tags=["core"]
# ## 2 · Show it: examples, and a look-up
#
# **Question.** How far do you get without training?
#
# The simplest thing is a prompt. Put four solved questions of the same kind before the question, about other illnesses. They show what kind of thing the answer is, and no fact about the illness that is asked for. (The examples come from the question forms that are not held out.)

# %%
solved = {domain: exam(domain, entities, "training_questions", 1) for domain, entities in world.domains.items()}


def with_examples(question: Question, number: int = 4) -> Question:
    """The question after some solved ones of its kind, about others."""
    same = [q for q in solved[question.ability] if q.about["relation"] == question.about["relation"]]
    others = [q for q in same if q.about["name"] != question.about["name"]]
    shown = random.Random(f"examples/{seed}/{question.prompt}").sample(others, number)
    return replace(question, prompt="".join(f"{q.prompt} {q.answer}\n" for q in shown) + question.prompt)


examples = {domain: right(base, [with_examples(q) for q in questions]) for domain, questions in exams.items()}
for domain, hits in examples.items():
    print(f"{domain}: without help {before[f'{domain}, no help']}, four examples {share(hits)}, "
          f"best constant {floor[domain]}")  # fmt: skip
    lesson.report(f"{domain}, four examples in the prompt", str(share(hits)))

# %% [markdown]
# Four examples do not lift this model to the floor: it does not take up the kind of the answer from them, although it reads a mapping of labels from eight examples without a mistake (section 1). A larger model may take up the form. Neither would take up a fact, since none is shown.
#
# **Retrieval-augmented generation** (RAG, lesson 02) puts the page that may hold the answer before the question. Each illness and each company has a page; pages on 300 people stand between them. A page is found by *tf-idf*: text $d$ becomes a vector with one entry per word, how often it occurs there times how rare it is,
#
# $$v_w(d) = f_{w,d} \cdot \Big(1 + \ln \frac{1 + D}{1 + D_w}\Big)$$
#
# with $D$ texts, of which $D_w$ contain the word $w$. The page whose vector has the smallest angle to the question's wins.


# %%
def page(domain: str, entity, generator: random.Random) -> str:
    """The facts of an illness or a company in random order, each in a wording that is not held out."""
    forms = list(DOMAIN_RELATIONS[domain].values())
    said = [
        generator.choice(form.training_statements).format(name=entity.name, value=entity.facts[form.name])
        for form in generator.sample(forms, len(forms))
    ]
    return " ".join(said)


shelf = random.Random(f"library/{seed}")
library = [page(domain, entity, shelf) for domain, entities in world.domains.items() for entity in entities]
library += [world.describe(shelf, person) for person in world.people[:300]]
print(len(library), "pages, such as:", library[0])


# %%
def words_of(text: str) -> list[str]:
    """Words of two letters or more, in small letters."""
    return re.findall(r"\w\w+", text.lower())


def tf_idf(texts: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """Cosine of the angle between each query and each text: (queries, texts)."""
    place = {word: i for i, word in enumerate(sorted({word for text in texts for word in words_of(text)}))}

    def counts(lines: Sequence[str]) -> np.ndarray:
        table = np.zeros((len(lines), len(place)))  # (lines, words)
        for row, line in enumerate(lines):
            for word in words_of(line):
                if word in place:
                    table[row, place[word]] += 1
        return table

    found = counts(texts)
    rarity = 1 + np.log((1 + len(texts)) / (1 + (found > 0).sum(0)))  # (words,)
    vectors = [table * rarity for table in (counts(queries), found)]
    units = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in vectors]
    return units[0] @ units[1].T  # (queries, words) x (words, texts)


# %%
from sklearn.feature_extraction.text import TfidfVectorizer

asked = [question.prompt for questions in exams.values() for question in questions]
cosines = tf_idf(library, asked)  # (questions, pages)
vectorizer = TfidfVectorizer().fit(library)
theirs = (vectorizer.transform(asked) @ vectorizer.transform(library).T).toarray()
lesson.equal("our cosines are those of sklearn's TfidfVectorizer", np.abs(cosines - theirs).max(), within=1e-9)
best = dict(zip(asked, cosines.argmax(1).tolist(), strict=True))
named = [str(q.about["name"]) in library[best[q.prompt]] for questions in exams.values() for q in questions]
print(f"the page on the right illness or company comes first for {share(named)}")


# %%
def looked_up(question: Question, number: int | None = None) -> Question:
    """The question after the page that the search puts first, or after page `number`."""
    return replace(
        question, prompt=f"{library[best[question.prompt] if number is None else number]}\n{question.prompt}"
    )


def neighbours_page(question: Question) -> int:
    """The number of the page of the next illness, or the next company, of the exam."""
    first = 0 if question.ability == "medicine" else len(world.domains["medicine"])
    return first + (best[question.prompt] - first + 1) % len(TOLD[question.ability])


retrieved = {domain: right(base, [looked_up(q) for q in questions]) for domain, questions in exams.items()}
misled = {domain: right(base, [looked_up(q, neighbours_page(q)) for q in questions])
          for domain, questions in exams.items()}  # fmt: skip
rows, by_kind = {}, {}
for domain, questions in exams.items():
    lesson.report(f"{domain}, RAG", str(share(retrieved[domain])))
    for kind in DOMAIN_RELATIONS[domain]:
        its = [i for i, question in enumerate(questions) if question.about["relation"] == kind]
        by_kind[kind] = [share([found[domain][i] for i in its]) for found in (retrieved, misled)]
        rows[f"{domain}, {kind}"] = [f"{fertility([questions[i].answer for i in its]):.1f}", *by_kind[kind]]
show_table(rows, ["tokens of an answer", "right with its page", "right with the neighbour's page"])
lesson.claim("with the page found for it, the base model says at least 60 % of the companies' seats",
             by_kind["seat"][0].accuracy, at_least=0.6, control=by_kind["seat"][1].accuracy, form=".0%")  # fmt: skip

# %% [markdown]
# The control is the page of the neighbour: what the answers follow is the page. But look at the other rows. The search has found every page, and the answer stands on it. So it is the *reader* that fails. A seat is a town, a word that this model has often answered with. Herbs, signs, doses and products are words that it has never answered with.
#
# Is it the words, or is it the unfamiliar questions? Take the passages about people that it reads without a mistake, with their familiar questions, and put another word into the place of the one that is asked for: another of the same kind, one of another kind that the model also knows (a town where an instrument is asked for), and a herb.

# %%
herbs = sorted({entity.facts["herb"] for entity in world.domains["medicine"]})
kind_of = {value: kind for kind, values in world.values.items() for value in values}


def swapped(question: Question, word: str) -> Question:
    """The question with another word in the place of its answer."""
    passage = re.sub(rf"\b{re.escape(question.answer)}\b", word, question.prompt)
    return replace(question, prompt=passage, answer=word)


generator, versions = random.Random(f"swaps/{seed}"), {"as they are": GENERAL["reading"]}
versions |= {name: [] for name in ("another word of its kind", "a known word of another kind", "a herb")}
for question in GENERAL["reading"]:
    own = kind_of[question.answer]
    same = [word for word in world.values[own] if word not in question.prompt]
    other = [word for word, kind in kind_of.items() if kind != own and word not in question.prompt]
    for name, choices in zip(list(versions)[1:], (same, other, herbs), strict=True):
        versions[name].append(swapped(question, generator.choice(choices)))
read = {name: share(right(base, questions)) for name, questions in versions.items()}
show_table({name: [str(found)] for name, found in read.items()}, ["passages read"])
said = answers(base, versions["a herb"])
kinds_said = np.mean([kind_of.get(text) == kind_of[q.answer] for text, q in zip(said, GENERAL["reading"], strict=True)])
print(versions["a herb"][0].prompt, said[0], f"   (right: {versions['a herb'][0].answer})")
print(f"answers that are a known word of the asked kind, though a herb stands there: {kinds_said:.0%}")
unread = {name: read["as they are"].accuracy - found.accuracy for name, found in read.items()}
lesson.claim("with a herb in the place of the word that is asked for, at least 50 points fewer passages are read",
             unread["a herb"], at_least=0.5, control=unread["another word of its kind"], form=".0%")  # fmt: skip

# %% [markdown]
# It is the kind of the word; whether a word of another kind is known adds little, if anything. After *Which instrument* this model nearly always says an instrument, whatever stands in the passage. Another instrument is always read, a known word of another kind seldom, a herb seldom or never. So it has learned to find *which of its words of the asked kind* stands in the passage, and not to copy any word. A model that has read more of the world copies new words; on a GPU, the same cells measure that of a hub model. The rule holds for both: **test the reader on the words of the field before you build the search.** Two other things are easy here. The names are rare words, so the search cannot miss (lesson 02 has searches that do), and the facts are stated one by one.

# %% [markdown] tags=["core"]
# ## 3 · Tell it: continued pretraining
#
# **Question.** Can the facts be put into the weights by reading on, so that no page is needed? And does it matter how they are worded?
#
# Continued pretraining is pretraining (lesson 03) with other text: the loss of every next token, from the weights $\theta_0$. The learning rate is warmed up and decayed once more, as Ibrahim et al. (2024) do it. One token in five comes from general text, so that the model does not lose the habit of answering questions; section 6 takes that away.
#
# There are four versions of the field's texts, **the same number of tokens** each:
#
# - *one wording*: each fact always in the same sentence;
# - *eight wordings*: in eight different ones;
# - *questions on others*: half of the documents as before, and half about 12 other illnesses, each with questions on it and their answers;
# - *with questions*: eight wordings, and after each text the questions on it with their answers. Cheng et al. (2024) make such reading exercises of raw text.
#
# What is not equal: where questions, or others, take up tokens, each fact of the exam is told less often. The table after the training counts how often.

# %%
MEDICINE = DOMAIN_RELATIONS["medicine"]
VERSIONS = {  # wordings of a statement, and whom the questions are about
    "one wording": (1, "nobody"), "eight wordings": (8, "nobody"), "questions on others": (8, "others"),
    "with questions": (8, "all"),
}  # fmt: skip


def field_text(version: str) -> Iterator[str]:
    """An endless stream of documents on the illnesses of the exam, and in one version on others."""
    generator, (wordings, asked_of) = random.Random(f"{version}/{seed}"), VERSIONS[version]
    while True:
        other = asked_of == "others" and generator.random() < 0.5
        entity = generator.choice((PRACTICE if other else TOLD)["medicine"])
        relations = generator.sample(list(MEDICINE.values()), len(MEDICINE))
        told = [form.statements[generator.randrange(wordings)] for form in relations]
        pairs = zip(told, relations, strict=True)
        text = " ".join(said.format(name=entity.name, value=entity.facts[form.name]) for said, form in pairs) + "\n"
        if other or asked_of == "all":
            for form in generator.sample(relations, len(relations)):
                question = generator.choice(form.training_questions).format(name=entity.name)
                text += ask(question, entity.facts[form.name])
        yield text


for version in ("one wording", "eight wordings", "with questions"):
    print(f"--- {version}\n{next(field_text(version))}", end="")

# %%
SEQ, ROWS, STEPS = 64, 8, lesson.scaled(96)  # tokens of a row, rows of a step, steps
general_documents = text_dataset(machine, 600, seed=10 + seed)["text"]  # shima-4m has not read these


def packed(documents: Iterator[str]) -> Iterator[list[int]]:
    """Rows of SEQ tokens, cut from the documents joined by the end-of-text token."""
    end = [tokenizer.eos_token_id]
    return pack((tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in documents), SEQ)


def interleaved(field: Iterator, general_text: Iterator, share_of_general: float) -> Iterator:
    """Rows of both streams; of any first n rows, the given share (rounded down) is general."""
    for number in itertools.count(1):
        due = math.floor(share_of_general * number) > math.floor(share_of_general * (number - 1))
        yield next(general_text if due else field)


# %%
import peft


def schedule(steps: int, rate: float, look_every: int = 0) -> TrainConfig:
    """Every run of this lesson: a short warm-up to the full rate, then linear decay."""
    return TrainConfig(
        max_steps=steps, learning_rate=rate, warmup_steps=max(1, steps // 8), schedule="linear", weight_decay=0.0,
        precision=settings["precision"], evaluate_every=look_every, progress=False, seed=seed,
    )  # fmt: skip


def adapted(batches, config: TrainConfig, look=None) -> tuple[nn.Module, History]:
    """A copy of the base model, trained on the batches; `look` measures it on the way."""
    model = copy.deepcopy(base).train()
    if settings["adapters"]:
        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    history = train(model, batches, config, evaluate=look)
    model = model.merge_and_unload() if settings["adapters"] else model
    return model.to(settings["at_rest"]).eval(), history


def read_on(version: str, replay: float) -> tuple[nn.Module, History]:
    """Continued pretraining on a version of the field's texts, with a share of general text."""
    rows = interleaved(packed(field_text(version)), packed(itertools.cycle(general_documents)), replay)
    batches = ({"input_ids": torch.tensor([next(rows) for _ in range(ROWS)])} for _ in itertools.count())
    return adapted(batches, schedule(STEPS, settings["rate"]))


# %%
example = {"input_ids": torch.tensor([next(packed(field_text("with questions"))) for _ in range(2)])}
example = {name: tensor.to(base.device) for name, tensor in example.items()}
with torch.no_grad():
    logits = base(**example).logits[:, :-1].float()  # (rows, seq - 1, vocab)
    following = example["input_ids"][:, 1:, None]  # (rows, seq - 1, 1)
    ours = (logits.logsumexp(-1, keepdim=True) - logits.gather(-1, following)).mean()
    theirs = base(**example, labels=example["input_ids"]).loss
lesson.equal("the loss of continued pretraining is transformers'", (ours - theirs).abs().item(), within=1e-4)

# %% [markdown]
# **Two ways of asking.** Besides the exam's questions there are *sentences to complete*: the two statements of each relation that no text uses, up to the value. A fact that a model can complete is stored in it, whether or not a question finds it.


# %%
def sentences(entities: Sequence) -> list[Question]:
    """Statements in held-out wordings up to the value; the answer is the rest of the sentence."""
    items = []
    for entity, relation in itertools.product(entities, MEDICINE.values()):
        for form in relation.held_out_statements:
            start, value, rest = form.partition("{value}")
            about = {"name": entity.name, "relation": relation.name}
            items.append(Question(start.format(name=entity.name).rstrip(),
                                  (value + rest).format(value=entity.facts[relation.name]), "sentence",
                                  about))  # fmt: skip
    return items


to_complete = some(random.Random(seed).sample(sentences(TOLD["medicine"]), 6 * len(TOLD["medicine"])))
print("to complete:", to_complete[0].prompt, "->", to_complete[0].answer)


def packed_times(version: str, tokens: float) -> int:
    """How many documents on an illness of the exam stand in so many tokens of a version."""
    names, count = {entity.name for entity in TOLD["medicine"]}, 0
    for text in field_text(version):
        tokens -= len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        if tokens < 0:
            return count
        count += any(name in text for name in names)
    return count


models, hits, completed, told = {}, {}, {}, {}
for version in VERSIONS:
    models[version], history = read_on(version, replay=0.2)
    hits[version] = right(models[version], exams["medicine"])
    completed[version] = right(models[version], to_complete)
    documents = packed_times(version, STEPS * ROWS * SEQ * 0.8)
    told[version] = documents / len(TOLD["medicine"])
    print(f"{version:>19}: {sum(history.tokens):,} tokens, each fact told {told[version]:.0f} times, loss "
          f"{history.losses[0]:.2f} -> {np.mean(history.losses[-5:]):.2f}; sentences {share(completed[version])}, "
          f"questions {share(hits[version])}")  # fmt: skip
    lesson.report(f"medicine, continued pretraining, {version}", str(share(hits[version])))

# %%
figure = plots.bars_with_intervals(
    {version: {"completes a sentence": share(completed[version]), "answers a question": share(hits[version])}
     for version in VERSIONS},
    title="Answers beat a constant only if the facts were asked",
    xlabel="right in medicine, unseen wordings",
    references={"best constant, sentences": best_constant(to_complete).accuracy},
)  # fmt: skip
plots.show(figure, alt="For each version of the text two bars: sentences completed, and questions answered.")
on_untold = share(right(models["with questions"], untold))
reached = {version: share(found).accuracy for version, found in hits.items()}
stored = {version: share(found).accuracy for version, found in completed.items()}
print(f"best constant {floor['medicine']}; illnesses that no text tells of: {on_untold}")
lesson.claim("after reading texts with questions, at least half of the questions on medicine are answered",
             reached["with questions"], at_least=0.5, control=on_untold.accuracy, form=".0%")  # fmt: skip
lesson.report("sentences completed, eight wordings more than one",
              stored["eight wordings"] - stored["one wording"], ".0%")  # fmt: skip
lesson.claim("at equal tokens, questions on the same facts are worth at least 30 points more than eight wordings",
             reached["with questions"] - reached["eight wordings"], at_least=0.3, form=".0%")  # fmt: skip
lesson.report("questions on the same facts, more than questions on others (facts told less often)",
              reached["with questions"] - reached["questions on others"], ".0%")  # fmt: skip

# %% [markdown]
# The dashed line is the floor of the sentences; that of the questions is printed below the figure. The control of the first claim are the illnesses of which no text tells, asked of the same model. Eight wordings let more sentences be completed than one, in wordings that neither text has. How many more depends much on the run, so it is a report here and not a claim; Ovadia et al. (2024) and Allen-Zhu & Li (2023) find the same direction for answers to questions.
#
# **Which mistakes?** An answer can be right, another fact of the same illness, a fact of another illness of the right kind, or something else.


# %%
def kind_of_answer(question: Question, text: str) -> str:
    """What the answer is, if not the right one."""
    own = next(e.facts for e in TOLD["medicine"] if e.name == question.about["name"])
    same_kind = {e.facts[str(question.about["relation"])] for e in TOLD["medicine"]}
    if text == question.answer:
        return "right"
    if text in own.values():
        return "its other fact"
    return "another illness's" if text in same_kind else "something else"


kinds = ("right", "its other fact", "another illness's", "something else")
counted = {}
for version, model_read in models.items():
    given = answers(model_read, exams["medicine"])
    counted[version] = Counter(itertools.starmap(kind_of_answer, zip(exams["medicine"], given, strict=True)))
    print(f"{version}: for example {given[:4]}")
show_table({version: [count[kind] for kind in kinds] for version, count in counted.items()}, kinds)

# %% [markdown]
# After statements alone, no answer is right or of the asked kind, and those printed are words and numbers of other kinds: the habit of section 2. With eight wordings the sentences stand clearly above the best constant: these facts are stored, and a question does not reach them. With one wording a few more are completed than by the constant, with questions on others hardly more, so those runs say little about what is stored. With questions on the same facts the answers are of medicine, and a frequent mistake is another fact of the same illness: it finds the illness, and misses what is asked. With questions on *others* its answers begin to look like medicine and stay below the floor; but its facts were told 15 times, against 50 with statements alone and 20 with questions on the same facts, so asking and telling are mixed in this row. Allen-Zhu & Li (2023) describe facts that are stored and not to be extracted; there, questions on half of the people were enough for the other half.
#
# At these token counts, only facts that were asked in training were answered above the floor; whether telling them more often would do was not tested. Keep that in mind for the next section: is it then not simpler to train on questions alone?

# %% [markdown] tags=["core"]
# ## 4 · Ask it: what fine-tuning teaches
#
# **Question.** Supervised fine-tuning (SFT) on questions and answers is what most people mean by "training on our data". Does it teach facts?
#
# Train the base model on questions with their answers, in the form that it knows, with the loss on the answers only (lesson 05). Half of the rows are the 48 facts of medicine, half are 48 facts about well-known people, each in one question form. To the base model the first are *unknown* and the second *known*. There are no more tokens than in section 3, padding counted. Watch four groups: the two kinds of training rows, *other* facts about people, and the untold illnesses. The last two are in no training row.

# %%
names = {entity.name for entity in TOLD["medicine"]}
unknown = some([question for question in solved["medicine"] if question.about["name"] in names])
pairs = [(person, relation) for person in world.people[:100] for relation in RELATIONS.values()]
pairs = random.Random(f"people/{seed}").sample(pairs, 3 * 48)
people = [
    Question(ask(form.questions[-1 if 48 <= i < 96 else 0].format(name=person.name)), person.facts[form.name], "people")
    for i, (person, form) in enumerate(pairs)
]
known, others, more_known = some(people[:48]), some(people[48:96]), some(people[96:])
groups = {"unknown, trained": unknown, "known, trained": known, "known, not trained": others,
          "unknown, not trained": untold}  # fmt: skip


def chat_rows(questions: Sequence[Question]) -> list[dict[str, list[int]]]:
    """Token ids and labels of questions with their answers; the question's labels are -100."""
    rows = []
    for question in questions:
        prompt, reply = tokenizer([question.prompt, f" {question.answer}\n"], add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply})
    return rows


# %%
rows = chat_rows(unknown + known)
batch_size = min(24, len(rows))
steps = max(4, STEPS * ROWS * SEQ // (batch_size * max(len(row["input_ids"]) for row in rows)))


def tuned_on(questions: Sequence[Question], look=None) -> tuple[nn.Module, History]:
    """The base model, fine-tuned on the answers."""
    batches = PaddedBatches(chat_rows(questions), batch_size, tokenizer.pad_token_id, seed=seed)
    return adapted(batches, schedule(steps, settings["chat_rate"], max(1, steps // 7)), look)


def look(model: nn.Module) -> dict[str, float]:
    """Right answers in each group."""
    return {name: share(right(model, questions)).accuracy for name, questions in groups.items()}


tuned, history = tuned_on(unknown + known, look)
looks = [{"step": 0} | look(base), *history.evaluations]
chat_tokens = sum(history.tokens)
print(f"{steps} steps of {batch_size} rows, {chat_tokens:,} tokens; at the end",
      {name: f"{looks[-1][name]:.0%}" for name in groups})  # fmt: skip

# %%
series = {name: ([found["step"] for found in looks], [found[name] for found in looks]) for name in groups}
figure = plots.curve(series, title="Fine-tuning learns the facts of its rows, and no others",
                     xlabel=f"step of {batch_size} rows", ylabel="right answers", percent=True)  # fmt: skip
plots.show(figure, alt="Known facts stay high; unknown rows climb over the steps; illnesses in no row stay low.")
hits["SFT"] = right(tuned, exams["medicine"])
four_forms = some(exam("medicine", TOLD["medicine"], "training_questions", 4))
hits["SFT, four wordings"] = right(tuned_on(four_forms + known)[0], exams["medicine"])
by_rows = looks[-1]["unknown, trained"] - looks[-1]["unknown, not trained"]
lesson.claim("fine-tuning puts the facts of its rows into the model, asked in its words: 40 points more than others",
             by_rows, at_least=0.4, form=".0%")  # fmt: skip
halfway_there = next((found["step"] for found in looks if found["unknown, trained"] >= 0.5), math.nan)
print(f"half of the unknown rows are right from step {halfway_there} on; all facts in unseen wordings: "
      f"{share(hits['SFT'])}, and after rows in four wordings {share(hits['SFT, four wordings'])}")  # fmt: skip
lesson.report("share of the steps after which half of the unknown rows are learned", halfway_there / steps, ".0%")
lesson.report("medicine, SFT, asked in unseen wordings", str(share(hits["SFT"])))

# %% [markdown]
# The known rows are right from the first look; the unknown ones have to be learned, row by row. Fine-tuning does teach facts, then: those of its rows and no others. Asked in other words, fewer of them come out; rows in four wordings, at the same steps, are the fair comparison with the last version of section 3: the line above has the one, section 3 the other. The two lines of the figure are not asked alike: the rows in the words of training, the illnesses in no row in held-out ones. In held-out words for both, compare the line above with the last point of the lowest curve. The line of the illnesses in no row stays near the bottom. Nothing was learned there but what an answer looks like.
#
# **Does learning unknown facts do harm?** Gekhman et al. (2024) report that examples with new knowledge are learned more slowly, and that a model which has learned them errs more often about what it knew. The control is the same run with known facts in place of the unknown ones: the same number of steps and rows.

# %%
control, _ = tuned_on(more_known + known)
with_new, without_new = share(right(tuned, others)), share(right(control, others))
print(f"other facts about people: {share(right(base, others))} before, {with_new} after rows with new facts, "
      f"{without_new} after rows without")  # fmt: skip
lesson.report("known facts lost: after rows with new facts, less after rows without",
              without_new.accuracy - with_new.accuracy, ".0%")  # fmt: skip
del control, models["one wording"]  # a GPU needs the room

# %% [markdown]
# Compare the last two numbers, with their intervals. In this run the rows with new facts do no more harm than rows with old ones; if anything less, and the control's rows on other people may do harm of their own. The finding is not repeated. It is not refuted either. Here half of the rows were old facts, which is replay by another name, the training was short, and 48 questions do not show a harm of a few points (section 8). To look further, train longer and leave out the known rows.

# %% [markdown] tags=["core"]
# ## 5 · Which one, and when?
#
# **Question.** All four ways have been tried. What does each cost?
#
# One unit is the *forward pass of one token*, about $2N$ operations. Training on a token costs about $6N$, so 3 units (lesson 04). Retrieval pays for the page with every question, training pays once. For $q$ questions of $p$ tokens with $e$ extra tokens each, and a training on $T$ tokens, the totals are
#
# $$\text{RAG: } q\,(p + e) \qquad\qquad \text{training: } 3T + q\,p$$
#
# and they meet at $q^* = 3T / e$.


# %%
def tokens_of(questions: Sequence[Question]) -> float:
    """Tokens of a prompt, on average."""
    return float(np.mean([len(ids) for ids in tokenizer([q.prompt for q in questions])["input_ids"]]))


medicine, trained_on = exams["medicine"], STEPS * ROWS * SEQ
plain, shown = tokens_of(medicine), tokens_of([with_examples(q) for q in medicine])
with_page = tokens_of([looked_up(q) for q in medicine])
costs = {"no help": (0, plain), "four examples": (0, shown), "RAG": (0, with_page),
         **dict.fromkeys(VERSIONS, (trained_on, plain)),
         **dict.fromkeys(("SFT", "SFT, four wordings"), (chat_tokens, plain)),
         "with questions, RAG": (trained_on, with_page)}  # fmt: skip
hits |= {"no help": right(base, medicine), "four examples": examples["medicine"], "RAG": retrieved["medicine"]}
hits["with questions, RAG"] = right(models["with questions"], [looked_up(q) for q in medicine])
show_table({name: [f"{trained:,}", f"{each:.0f}", share(hits[name])] for name, (trained, each) in costs.items()},
           ["training tokens", "tokens a question", "right in medicine"])  # fmt: skip
pages_of = [next(page for page in library if str(q.about["name"]) in page) for q in untold]
with_pages = [replace(q, prompt=f"{text}\n{q.prompt}") for q, text in zip(untold, pages_of, strict=True)]
print(f"untold illnesses, each question after its page: {share(right(models['with questions'], with_pages))}, without "
      f"the page {on_untold}")  # fmt: skip
extra = with_page - plain
meet = 3 * trained_on / extra
print(f"a page costs {extra:.0f} tokens more a question: training and RAG cost the same at {meet:,.0f} questions")
lesson.report("questions at which continued pretraining and RAG cost the same", meet, ",.0f")

# %% tags=["headline"]
order = ["no help", "four examples", "RAG", *VERSIONS, "SFT", "SFT, four wordings", "with questions, RAG"]
figure = plots.bars_with_intervals(
    {name: share(hits[name]) for name in order}, title="One exam for all: what each way of adapting gives",
    xlabel="right answers in medicine, unseen wordings", references={"best constant": floor["medicine"].accuracy},
)  # fmt: skip
plots.show(figure, alt="Bars of right answers: a prompt, a look-up, four kinds of continued pretraining, fine-tuning.")

# %%
numbers = np.geomspace(100, 100_000, 13)
lines = {"RAG": (numbers, numbers * with_page), "four examples": (numbers, numbers * shown),
         "continued pretraining": (numbers, 3 * trained_on + numbers * plain)}  # fmt: skip
figure = plots.curve(lines, title="Training pays once, a look-up pays with every question",
                     xlabel="number of questions", ylabel="cost (forward passes of a token)", log_x=True,
                     log_y=True)  # fmt: skip
plots.show(
    figure,
    alt="Cost over number of questions, both logarithmic: training's line, flat at first, meets the rising one of RAG.",
)

# %% [markdown]
# The rows above the floor are those whose facts were *asked* in training, at about the same training tokens as the told ones. Did the model that read on learn to read pages as well? For facts that it was told of, compare the last row with *with questions*; for facts that it was not, see the line on untold illnesses. In this run of shima-4m a page raises neither: no. (A practitioner would train the reader on pages with questions: Zhang et al. 2024, *RAFT*, arXiv:2403.10131. That row is missing here.) The crossing of the two lines is arithmetic, and holds for a reader that can read: below it, looking up is cheaper, above it, training. For the seats of companies (section 2) this model is such a reader, and there no training was needed at all.
#
# The arithmetic leaves out what often decides. A page can be corrected today, and be shown to the user as the source; weights cannot. If the facts change every month, the training is paid every month (exercise 14.3). Without a network there is no look-up; then the facts must be in the weights.
#
# **How it went elsewhere.** *Prompt.* Nori et al. (2023) let GPT-4 without any medical training beat the best specialist models on MedQA by prompting alone: 27 % fewer errors, and more than 90 % right for the first time. *Train.* Kawakami et al. (2025) continued the pretraining of Qwen2.5-72B on Japanese medical text and then optimised its reasoning by preferences: on the Japanese medical licensing examinations of 2018 to 2022 its model card gives it 431.2 points on average, Qwen2.5-72B 398.4 and GPT-4o 430.4. (Is a lead of 0.8 points one? Section 8.) Hirano & Imajo (2024) found continued pretraining of a Japanese model of about 10 billion parameters of help on financial benchmarks. *From scratch.* Bloomberg trained 50 billion parameters on a corpus of 363 billion tokens of finance and 345 billion of general text (Wu et al. 2023); Cheng et al. (2024) report that their continued pretraining of a model of 7 billion competes with it. *Look up.* Ovadia et al. (2024) found RAG ahead of continued pretraining, for old knowledge and for new, and many wordings of a fact of help. There is no winner; there is a measurement to make.

# %% [markdown] tags=["core"]
# ## 6 · What was lost: forgetting, replay, interpolation
#
# **Question.** The model of section 3 read one part of general text in five. What would it have forgotten without?
#
# **Replay** mixes a share $r$ of general text into the training, at the same number of tokens in all, so less is left for medicine. Rows have equal length here, so a share of rows is a share of tokens. **Interpolation** costs no training: take the weights on the straight line between before and after (Wortsman et al. 2022),
#
# $$\theta(\lambda) = (1 - \lambda)\,\theta_0 + \lambda\,\theta_1 .$$


# %%
def interpolated(start: nn.Module, end: nn.Module, weight: float) -> nn.Module:
    """The model whose weights are (1 - weight) * start + weight * end."""
    between = copy.deepcopy(start)
    with torch.no_grad():
        for parameter, old, new in zip(between.parameters(), start.parameters(), end.parameters(), strict=True):
            parameter.copy_((1 - weight) * old + weight * new)
    return between


def kept_of(model: nn.Module) -> dict[str, Score]:
    """Medicine, and the general abilities."""
    return {"medicine": share(right(model, exams["medicine"])), **general(model)}


outcomes = {"before": {"medicine": before["medicine, no help"], **general_before}}
models["no replay"], _ = read_on("with questions", replay=0.0)
models["no replay"].float()  # from here to the base model a line is drawn, in 32 bits
for name, model_kept in {"replay 20 %": models["with questions"], "no replay": models["no replay"]}.items():
    outcomes[name] = kept_of(model_kept)

# %%
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

halfway = interpolated(base, models["no replay"], 0.5)
averaged = AveragedModel(base, multi_avg_fn=get_ema_multi_avg_fn(0.5))
averaged.update_parameters(base)  # the first call copies, the second one averages
averaged.update_parameters(models["no replay"])
gaps = [(a - b).abs().max().item() for a, b in zip(averaged.parameters(), halfway.parameters(), strict=True)]
lesson.equal("halfway is torch's AveragedModel with decay 0.5", max(gaps), within=1e-6)
del averaged
outcomes["no replay, 1/2 of the way"] = kept_of(halfway)
del halfway  # a GPU needs the room
outcomes["no replay, 3/4 of the way"] = kept_of(interpolated(base, models["no replay"], 0.75))
outcomes["replay 20 %, 3/4 of the way"] = kept_of(interpolated(base, models["with questions"], 0.75))
show_table({name: [f"{found.accuracy:.0%}" for found in scores.values()] for name, scores in outcomes.items()},
           ["medicine", *GENERAL])  # fmt: skip
kept = {name: float(np.mean([found[ability].accuracy for ability in GENERAL])) for name, found in outcomes.items()}
points = {name: (kept[name], found["medicine"].accuracy) for name, found in outcomes.items()}
lost, saved = kept["before"] - kept["no replay"], kept["replay 20 %"] - kept["no replay"]

# %%
figure = plots.pareto(points, title="Without general text in the training, most of the general abilities are lost",
                      xlabel="general abilities, mean score", ylabel="right answers in medicine",
                      lower_x_is_better=False)  # fmt: skip
plots.show(
    figure, alt="Medicine over general abilities for the model before, without replay, with replay, and in between."
)
lesson.claim("reading only medicine costs at least 20 points of the general abilities", lost, at_least=0.2, form=".0%")
lesson.claim("a fifth of replay saves at least half of what is lost without it", saved / lost if lost > 0 else math.nan,
             at_least=0.5, form=".0%")  # fmt: skip
behind = points["no replay"][1] - points["replay 20 %"][1]
lesson.report("medicine, points given up for a fifth of replay", behind, ".0%")

# %% [markdown]
# Reading only medicine, the model no longer knows people, does not read and does not add; only the mapping of labels survives. A fifth of replay saves most of what it says about people and of its reading, and least of the sums. Weights between before and after cost no training, and no step back keeps both: three quarters of the way keep most of the medicine and return a part of the rest, half of the way returns most of the rest and loses most of the medicine. A fifth of replay costs some points of medicine, as the report says, and no tokens. A point is on the *frontier* if no other is at least as good in both scores and better in one. All points lie on it, or near it: which one is best depends on what a general point is worth to you.

# %% [markdown] tags=["further"]
# ## 7 · Token by token: how deep does an assistant go?
#
# *Further: no core section needs this one.*
#
# **Question.** Fine-tuning made an assistant of a base model. At how many places does it say anything that the base model would not have said?
#
# Lin et al. (2024) let the assistant write, and at each of its tokens ask the base model, given everything before: at which rank is this token? Rank 1 is *unshifted*, 2 or 3 *marginal*, everything else *shifted*. They found shifted tokens at 5 to 8 % of the positions, mostly words of style, and mostly early. The idea that tuning teaches a form, and the rest comes from pretraining, is known as *superficial alignment* (Zhou et al. 2023).
#
# The base model has never seen the marks of the chat format. So it is asked twice: with the same chat before it, and with the same words without marks.

# %%
assistant, chat_tokenizer = load_assistant(machine)
instructions = [question.prompt for question in world.chat_questions(lesson.scaled(90, 12), 100 + seed)]
with lesson.autocast(IN_16_BITS):
    replies = answer_instructions(assistant, chat_tokenizer, instructions, 60, batch_size=128)


@torch.no_grad()
def ranks(prompt: str, reply: str) -> list[int]:
    """Rank of each token of the reply under the base model, 1 for its first choice."""
    before_it, ids = chat_tokenizer([prompt, reply], add_special_tokens=False)["input_ids"]
    together = torch.tensor([before_it + ids], device=base.device)  # (1, seq)
    logits = base(input_ids=together).logits[0, len(before_it) - 1 : -1]  # (reply, vocab)
    chosen = logits.gather(-1, together[0, len(before_it) :, None])  # (reply, 1)
    return (1 + (logits > chosen).sum(-1)).tolist()


contexts = {"the same chat": [chat_prompt(chat_tokenizer, text) for text in instructions],
            "the same words": [f"{text}\n" for text in instructions]}  # fmt: skip
found = {name: [ranks(*pair) for pair in zip(prompts, replies, strict=True) if pair[1]]
         for name, prompts in contexts.items()}  # fmt: skip


# %%
def shifted(answers_ranks: list[list[int]], start: int, stop: int) -> float:
    """The share of the tokens from `start` up to `stop` that are not among the base model's first three."""
    places = [place for answer in answers_ranks for place in answer[start:stop]]
    return float(np.mean([place > 3 for place in places])) if places else math.nan


for name, answers_ranks in found.items():
    places = np.array([place for answer in answers_ranks for place in answer])
    print(f"{name}: {np.mean(places == 1):.0%} unshifted, {np.mean((places == 2) | (places == 3)):.0%} marginal, "
          f"{np.mean(places > 3):.0%} shifted, of {len(places)} tokens")  # fmt: skip
series = {name: (range(1, 13), [shifted(r, i, i + 1) for i in range(12)]) for name, r in found.items()}
figure = plots.curve(series, title="The assistant differs from the base model most where an answer begins",
                     xlabel="token of the answer", ylabel="not among the base's first three", percent=True)  # fmt: skip
plots.show(figure, alt="The share of shifted tokens over the position in the answer: high at first, lower later.")
words = found["the same words"]
first_choice = float(np.mean([place == 1 for answer in words for place in answer]))
counted = Counter(token for reply in replies for token in chat_tokenizer(reply, add_special_tokens=False).input_ids)
commonest = max(counted.values(), default=0) / max(counted.total(), 1)  # right for whoever always names this token
lesson.claim("more than half of the assistant's tokens are the base model's first choice after the same words",
             first_choice, at_least=0.5, control=commonest, form=".0%")  # fmt: skip
lesson.claim("the first three tokens are shifted at least 20 points more often than those after the fifth",
             shifted(words, 0, 3) - shifted(words, 5, 60), at_least=0.2, form=".0%")  # fmt: skip

# %% [markdown]
# It says *superficial* in a precise sense: given the beginning of an answer, the base model continues it as the assistant would, at most places. And it says nothing about the beginning itself, which is where the assistant decides to answer at all, and in which form. The two curves differ at the first tokens: part of what looks like tuning there is only that the base model has never seen the marks of a chat. Lin et al. found far fewer shifted tokens, 5 to 8 %; our assistant answers many of its tasks with a single word in a form of its own, and only the long replies reach the later places of the figure. Section 4 showed the limit: new facts in no training row stayed near the bottom.

# %% [markdown] tags=["core"]
# ## 8 · Is it better, or was it luck?
#
# **Question.** One system is a few points ahead on the exam. Would it be ahead on the next exam?
#
# Both systems answered the *same* questions. Where both are right, or both wrong, nothing is learned about which is better. Only the $n_{10} + n_{01}$ questions that divide them count. If the systems were equally good, each of these would be a coin toss. So the probability of a division at least as uneven is a sum of binomial terms (McNemar's test in its exact form),
#
# $$p = \min\Big(1,\; 2 \sum_{k=0}^{\min(n_{10},\, n_{01})} \binom{n_{10} + n_{01}}{k}\, 2^{-(n_{10} + n_{01})}\Big)$$


# %%
def paired_test(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value for the same questions answered by two equally good systems."""
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    dividing, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(dividing, k) for k in range(fewer + 1)) / 2**dividing)


differences = []
for n10, n01 in itertools.product(range(1, 15), range(15)):
    p_value = paired_test([True] * n10 + [False] * n01, [False] * n10 + [True] * n01)
    differences.append(abs(p_value - binomtest(n10, n10 + n01).pvalue))
lesson.equal("our paired test is scipy's binomtest", max(differences), within=1e-9)
for one, two in itertools.combinations(["RAG", "eight wordings", "questions on others", "with questions", "SFT"], 2):
    first, second = hits[one][::2], hits[two][::2]  # one question of each fact: independent of one another
    n10 = sum(a and not b for a, b in zip(first, second, strict=True))
    n01 = sum(b and not a for a, b in zip(first, second, strict=True))
    print(f"{one:>19} against {two:<19} {n10:>3} to {n01:<3} p = {paired_test(first, second):.2g}")

# %% [markdown]
# **How large must an exam be?** Test power by simulation: let two systems differ by a known amount, hold the exam many times, and count how often the test finds the difference. Here the first system is right on 70 % of the questions, the second on 75 %. A test *at the 5 % level* calls a difference found where $p < 0.05$, and its *power* is how often it finds one that is there. Two close versions of one model (another prompt, a little more training) may agree on most questions: for such *similar* systems we let 10 % of the questions divide them. Systems that know different facts agree on fewer, even if they come from one base: above, half of the questions divide *with questions* and *SFT*. For such pairs, called *unrelated*, we take 40 %. The *unpaired* test knows only the two scores.

# %%
from scipy.stats import norm


def power(items: int, gain: float, dividing: float, paired: bool, trials: int = 1000) -> float:
    """How often a test at the 5 % level finds a system that is better by `gain`, on exams of so many items."""
    generator = np.random.default_rng(seed)
    first_only, second_only = (dividing - gain) / 2, (dividing + gain) / 2
    both = 0.7 - first_only  # the first system is right on 70 %
    cells = generator.multinomial(items, [both, first_only, second_only, 1 - both - dividing], size=trials)
    n11, n10, n01 = cells[:, 0], cells[:, 1], cells[:, 2]
    if paired:
        found = [binomtest(int(b), int(a + b)).pvalue < 0.05 if a + b else False for a, b in zip(n10, n01, strict=True)]
        return float(np.mean(found))
    shares = np.stack([n11 + n10, n11 + n01]) / items  # (2, trials)
    pooled = shares.mean(0)
    error = np.sqrt(2 * pooled * (1 - pooled) / items)
    return float(np.mean(2 * norm.sf(np.abs(shares[1] - shares[0]) / error) < 0.05))


# %%
SIZES = (50, 100, 200, 400, 800)
powers = {f"{name}, {'paired' if paired else 'unpaired'} test": [power(n, 0.05, dividing, paired) for n in SIZES]
          for name, dividing in {"similar systems": 0.10, "unrelated systems": 0.40}.items()
          for paired in (True, False)}  # fmt: skip
figure = plots.curve({name: (SIZES, values) for name, values in powers.items()},
                     title="A gain of 5 points is easily missed; pairing can help",
                     xlabel="questions in the exam", ylabel="exams that find it", log_x=True, percent=True)  # fmt: skip
plots.show(
    figure,
    alt="Power over the number of questions: the paired test on similar systems rises far earlier than the rest.",
)
gains = {name: powers[f"{name}, paired test"][2] - powers[f"{name}, unpaired test"][2]
         for name in ("similar systems", "unrelated systems")}  # fmt: skip
show_table({name: [f"{value:.0%}" for value in values] for name, values in powers.items()}, [str(n) for n in SIZES])
lesson.claim("with 200 questions on similar systems, pairing raises the power by at least 20 points",
             gains["similar systems"], at_least=0.2, control=gains["unrelated systems"], form=".0%")  # fmt: skip

# %% [markdown]
# A true gain of five points is found by few exams of 50 questions, whatever the test. Pairing helps where two systems agree on most questions, and does not where they do not: the control is the gain for unrelated systems. So count the dividing questions first: where they are as many as between *with questions* and *SFT*, expect nothing from pairing. Two consequences. Compare systems on the same questions, and keep every answer. And compute the size of the exam before it is held (exercise 14.4); an exam of some 50 facts, like ours, separates only large differences. The test is over questions. It knows nothing of another training seed, and over seeds the rows of section 5 change more than that: on five seeds *with questions* minus *SFT* was 11, 46, 46, 9 and 20 points. And a large $p$ does not say *equal*, it says *not separated*.

# %% [markdown] tags=["core"]
# ## 9 · Does it know when it is wrong?
#
# **Question.** In medicine a wrong answer is worse than none. Can the model's own probability of its answer tell which ones to trust?
#
# The *confidence* $\hat p$ is the product of the probabilities of the answer's tokens. A model is *calibrated* if of all answers with $\hat p$ near 0.7, about 70 % are right. Put the answers into ten bins of equal width. The **expected calibration error** is the gap between confidence and accuracy, weighted with the bins' sizes:
#
# $$\text{ECE} = \sum_{k} \frac{n_k}{n} \big|\,\text{acc}_k - \overline{p}_k\,\big|$$
#
# **Temperature scaling** (Guo et al. 2017) divides all logits by one number $\tau$, chosen so that the right answers of *other* questions become as probable as possible. It changes no greedy answer. Ask the base model, and the model that read on, about people of rank 101 to 1,000. Pretraining mentioned them from often to hardly ever, so there are all degrees of knowing.

# %%
asked_about = some(world.closed_book(400, 200 + seed, range(101, 1001)), least=16)
one_half, other_half = asked_about[::2], asked_about[1::2]  # to choose the temperature, and to measure


@torch.no_grad()
def answer_logits(model: nn.Module, questions: Sequence[Question], texts: Sequence[str]) -> tuple[Tensor, ...]:
    """Logits (tokens, vocab) of all answers' tokens, the tokens, and the number of the question of each."""
    rows = chat_rows([replace(q, answer=text) for q, text in zip(questions, texts, strict=True)])
    parts = []
    for start in range(0, len(rows), 64):
        batch = {
            name: t.to(model.device) for name, t in collate(rows[start : start + 64], tokenizer.pad_token_id).items()
        }
        labels = batch.pop("labels")[:, 1:]  # (rows, seq - 1)
        logits = model(**batch).logits[:, :-1].float()  # (rows, seq - 1, vocab)
        counted = labels != -100
        parts.append((logits[counted].cpu(), labels[counted].cpu(), start + counted.nonzero()[:, 0].cpu()))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def log_probability(logits: Tensor, tokens: Tensor, question: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each answer at a temperature: (questions,)."""
    each = (logits / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)  # (tokens,)
    return torch.zeros(int(question.max()) + 1).index_add(0, question, each)


# %%
TEMPERATURES = np.geomspace(0.1, 10, 81)


def tested(model: nn.Module) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """The temperature from one half; of the other half which answers are right, and confidence before and after."""
    gold = answer_logits(model, one_half, [question.answer for question in one_half])
    surprise = [-log_probability(*gold, float(t)).mean().item() for t in TEMPERATURES]
    temperature = float(TEMPERATURES[int(np.argmin(surprise))])
    given = answers(model, other_half)
    is_right = np.array([text == question.answer for text, question in zip(given, other_half, strict=True)])
    written = answer_logits(model, other_half, given)
    confidences = [log_probability(*written, t).exp().numpy() for t in (1.0, temperature)]
    return temperature, is_right, *confidences


for name, model_asked in {"model that read on": models["with questions"], "base model": base}.items():
    temperature, is_right, plain_confidence, scaled_confidence = tested(model_asked)
    print(f"{name}: right on {share(is_right.tolist())}, mean confidence {plain_confidence.mean():.0%}, "
          f"at temperature {temperature:.2f} {scaled_confidence.mean():.0%}")  # fmt: skip
confidence = {"as it is": plain_confidence, "scaled": scaled_confidence}  # of the base model

# %%
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score


def bins_of(confidence: np.ndarray, is_right: np.ndarray, number: int = 10) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and size of each bin of equal width that holds an answer."""
    place = np.searchsorted(np.linspace(0, 1, number + 1)[1:-1], confidence)
    return [(float(confidence[place == k].mean()), float(is_right[place == k].mean()), int((place == k).sum()))
            for k in np.unique(place)]  # fmt: skip


def calibration_error(bins: Sequence[tuple[float, float, int]]) -> float:
    """Gap between confidence and accuracy, weighted with the sizes of the bins."""
    return sum(size * abs(sure - hit) for sure, hit, size in bins) / sum(size for *_, size in bins)


bins = {name: bins_of(values, is_right) for name, values in confidence.items()}
accuracy, sureness = calibration_curve(is_right, confidence["as it is"], n_bins=10, strategy="uniform")
difference = max(np.abs(np.array(bins["as it is"])[:, :2] - np.stack([sureness, accuracy], 1)).max(), 0)
lesson.equal("our bins are those of sklearn's calibration_curve", difference, within=1e-6)
errors = {name: calibration_error(found) for name, found in bins.items()}
print(", ".join(f"calibration error {name} {error:.3f}" for name, error in errors.items()))

# %%
figure = plots.curve({name: tuple(np.array(found)[:, :2].T) for name, found in bins.items()}
                     | {"calibrated": ([0, 1], [0, 1])},
                     title="One number brings the base model nearer to calibrated",
                     xlabel="confidence", ylabel="right answers", percent=True)  # fmt: skip
plots.show(
    figure, alt="Right answers over confidence: as it is the base model lies off the diagonal, scaled it lies nearer."
)
lesson.claim("one temperature, chosen on other questions, lowers the calibration error by at least 0.05",
             errors["as it is"] - errors["scaled"], at_least=0.05)  # fmt: skip

# %% [markdown]
# A temperature below 1 says that the base model is right more often than it believes: it is too unsure, which is the less common fault. The model that read on is too sure by some points, and one temperature takes back only a part: the fit raises the probability of the *right* answers, which this model mostly does not give. So a temperature repairs one kind of fault, and calibration is not quality; it only says how far a confidence can be taken at its word.
#
# **Answer less, err less.** Let the system pass on what it is least sure of. *Coverage* is the share that it answers.

# %%
ranked = is_right[np.argsort(-confidence["as it is"], kind="stable")]  # the surest answers first
coverage = np.arange(1, len(ranked) + 1) / len(ranked)
kept_right = ranked.cumsum() / np.arange(1, len(ranked) + 1)
shuffled = np.random.default_rng(seed).permutation(ranked)
by_chance = shuffled.cumsum() / np.arange(1, len(ranked) + 1)
figure = plots.curve({"by confidence": (coverage[9:], kept_right[9:])}, references={"of all": ranked.mean()},
                     title="The surest answers are right far more often", xlabel="share of questions answered",
                     ylabel="right among these", percent=True)  # fmt: skip
plots.show(figure, alt="Right answers over coverage: by confidence the line falls from high to the share of all.")
half = len(ranked) // 2
lesson.claim("passing on the least sure half raises the share of right answers by at least 15 points",
             kept_right[half - 1] - ranked.mean(), at_least=0.15,
             control=by_chance[half - 1] - ranked.mean(), form=".0%")  # fmt: skip

# %% [markdown]
# **Does it know what it was never told?** A ward asks about illnesses that are in the texts, and about others that are not.

# %%
ward = medicine + untold
asked_in = {"told of": np.arange(len(medicine)), "not told of": np.arange(len(medicine), len(ward))}
systems = {"eight wordings": models["eight wordings"], "questions on others": models["questions on others"],
           "with questions": models["with questions"], "SFT": tuned}  # fmt: skip
replies_of = {name: answers(model_asked, ward) for name, model_asked in systems.items()}
sure_of = {name: log_probability(*answer_logits(systems[name], ward, given)).exp().numpy()
           for name, given in replies_of.items()}  # fmt: skip
right_in = {name: np.array([text == q.answer for text, q in zip(given, ward, strict=True)])
            for name, given in replies_of.items()}  # fmt: skip
show_table({f"{name}, {group}": [share(right_in[name][where].tolist()), f"{sure_of[name][where].mean():.0%}"]
            for name in ("with questions", "SFT") for group, where in asked_in.items()},
           ["right", "mean confidence"])  # fmt: skip
for name in ("with questions", "SFT"):
    is_told = np.arange(len(ward)) < len(medicine)
    print(f"{name}: area under the ROC curve of the confidence, told against not told: "
          f"{roc_auc_score(is_told, sure_of[name]):.2f} (0.5 is chance)")  # fmt: skip

# %% [markdown]
# Asked about an illness that it was never told of, a model does not say so: it answers. The table says whether its confidence at least differs from that for what it knows. Two means may hide a lot, so look at the area under the ROC curve, the probability that a question on a told illness, drawn by lot, gets a higher confidence than one on an untold illness: near one half, the confidence hardly tells an illness that it was told of from one that it was not.
#
# **Not all mistakes are equal.** A dose off by one spoon is not a wrong herb. Write down what each mistake costs before you look at results, and compare systems by it. A question that is *passed on* costs something too: somebody must look it up. Here it costs 1; an answer that is no sign, herb or dose at all costs the same, because anyone sees it. The system passes on each question on which its confidence is below a threshold; the threshold is the one that does the least harm on half of the facts, and the rows of the systems show the other half.

# %%
SPOONS = ("one", "two", "three", "four", "five")
READABLE = {kind: {e.facts[kind] for e in world.domains["medicine"]} for kind in MEDICINE}


def harm(question: Question, text: str) -> float:
    """0 for a right answer, 1 for none of the right kind, the spoons that a dose is off, 2 for a sign, 5 for a herb."""
    kind = str(question.about["relation"])
    if text == question.answer:
        return 0.0
    if text not in READABLE[kind]:
        return 1.0
    if kind == "dose":
        return float(abs(SPOONS.index(text.split()[0]) - SPOONS.index(question.answer.split()[0])))
    return 5.0 if kind == "herb" else 2.0


choose = np.arange(len(ward)) % 4 < 2  # every other fact, with both of its wordings
rows, harm_of = {}, {}
for name, pick in {"least harmful constants": min, "random values": np.mean}.items():
    of_kinds = [pick([np.mean([harm(q, value) for q in ward if q.about["relation"] == kind])
                      for value in READABLE[kind]]) for kind in MEDICINE]  # fmt: skip
    rows[name] = ["-", f"{100 * np.mean(of_kinds):.0f}", "-", "100%"]
for name, given in replies_of.items():
    harms, sure = np.array([harm(*pair) for pair in zip(ward, given, strict=True)]), sure_of[name]
    limits = np.append(np.unique(sure[choose]), 2.0)
    limit = min(limits, key=lambda least: np.where(sure >= least, harms, 1.0)[choose].mean())
    passing = np.where(sure >= limit, harms, 1.0)
    harm_of[name] = [float(values[~choose].mean()) for values in (harms, passing)]
    rows[name] = [share(right_in[name][~choose].tolist()), *(f"{100 * value:.0f}" for value in harm_of[name]),
                  f"{(sure >= limit)[~choose].mean():.0%}"]  # fmt: skip
    lesson.report(f"harm of 100 answers, {name}: all answered, and with passing", f"{rows[name][1]}, {rows[name][2]}")
show_table(rows, ["right", "harm of 100", "harm of 100 with passing", "answered"])
lesson.claim("the model that was asked about others only does at least a fifth more harm than passing on everything",
             harm_of["questions on others"][0], at_least=1.2, control=harm_of["questions on others"][1])  # fmt: skip

# %% [markdown]
# The first two rows are floors: whoever says the least harmful constant of each kind, or any value of the right kind. Passing on every question costs 100, by definition; so does the model that was only told, since anyone sees that its answers are none. The model that was asked about *others* gets some answers right and does more harm than doing nothing: many of its wrong answers are real signs, herbs and doses, so nobody sees that they are wrong. Ranked by right answers it would be better than the model that was only told. Compare the other systems with 100, too. With passing, by a threshold chosen on other facts, only a system below 100 is worth being switched on, and by how much is in the table. The threshold rests on few questions, so do not expect a gain in every row. Over five seeds (in the ledger) *with questions* did a harm of 76 to 118 when it answered all, and of 68 to 93 with passing: only with passing was it below 100 each time.
#
# The costs are ours, and another table of costs gives another order. That is why they are written down first.

# %% [markdown]
# ## 10 · Exercises
#
# Write your answer in place of `raise NotImplementedError`, run the cell and then the check below it, which answers at once. A hint and the solution are folded away under the check.


# %% tags=["exercise"]
# Exercise 14.1, easy: a calibration error without thin bins.
# Bins of equal width can be almost empty. Use bins of equal size instead.
def equal_size_error(confidence: Sequence[float], is_right: Sequence[bool], number: int) -> float:
    """ECE over `number` bins that hold equally many answers: the least sure first, the next ones in the second, ...

    Where the answers do not divide evenly, the first bins hold one more (as `np.array_split` does).
    """
    raise NotImplementedError


# %% tags=["check"]
def check_equal_size_error(equal_size_error):
    sure, hit = [0.9, 0.1, 0.95, 0.2], [True, False, False, True]
    expect_close("equal_size_error(0.9 right, 0.1 wrong, 0.95 wrong, 0.2 right; 2 bins)",
                 equal_size_error(sure, hit, 2), (abs(0.15 - 0.5) + abs(0.925 - 0.5)) / 2)  # fmt: skip
    expect_close("the same in 4 bins", equal_size_error(sure, hit, 4), (0.1 + 0.8 + 0.1 + 0.95) / 4)
    expect_close("too sure here, too unsure there, 3 answers in 2 bins",
                 equal_size_error([0.1, 0.3, 0.6], [True, True, False], 2), (2 * 0.8 + 0.6) / 3)  # fmt: skip
    crowded = [0.91, 0.92, 0.93, 0.94]
    expect_close("all answers nearly as sure", equal_size_error(crowded, [True, True, False, False], 2),
                 (0.085 + 0.935) / 2)  # fmt: skip
    given = list(sure)
    equal_size_error(given, hit, 2)
    expect_equal("the confidences after the call", given, sure)


check("14.1", check_equal_size_error, equal_size_error)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Sort the answers by confidence first (`np.argsort`), and cut the sorted list. The gap of each bin is taken absolute before the bins are averaged, and the average is weighted with their sizes.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Every bin now rests on equally many answers, give or take one; with far fewer bins than answers, no bin's gap is a matter of one answer. With signed gaps, too sure here and too unsure there would cancel.
#
# ```python
# def equal_size_error(confidence: Sequence[float], is_right: Sequence[bool], number: int) -> float:
#     sure, hit = np.array(confidence, dtype=float), np.array(is_right, dtype=float)
#     parts = np.array_split(np.argsort(sure, kind="stable"), number)
#     gaps = [len(part) * abs(sure[part].mean() - hit[part].mean()) for part in parts if len(part)]
#     return float(sum(gaps) / len(sure))
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 14.2, medium: replay with documents of any length.
# Section 6 mixes rows of equal length. A data pipeline mixes documents, and those of one source are longer.
def replay_by_tokens(field: list[list[int]], old: list[list[int]], ratio: float) -> list[list[int]]:
    """The documents (lists of token ids) in the order in which they are trained on, all of `field` once, in order.

    Begin with a document of the field. Before each of its further documents, and after its last one, add the next old
    documents as long as the old tokens so far are less than `ratio` of all tokens so far. When `old` is used up,
    begin it again.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_replay_by_tokens(replay_by_tokens):
    field, old = [[1] * 10, [2] * 10, [3] * 10], [[7] * 4, [8] * 2]
    expect_equal("without replay", replay_by_tokens(field, old, 0.0), field)
    expect_equal("a fifth of old tokens: documents of 10 and of 4, 2 tokens", replay_by_tokens(field, old, 0.2),
                 [field[0], old[0], field[1], old[1], field[2], old[0]])  # fmt: skip
    expect_equal("half of old tokens, one document of 10", replay_by_tokens(field[:1], old, 0.5),
                 [field[0], old[0], old[1], old[0]])  # fmt: skip
    generator = random.Random(14)
    field = [[1] * generator.randint(5, 40) for _ in range(200)]
    old = [[2] * generator.randint(60, 120) for _ in range(7)]
    mixed = replay_by_tokens(field, old, 0.3)
    tokens = [token for document in mixed for token in document]
    expect_true("of the tokens of a long mixture 30 % are old, up to the length of one document",
                abs(tokens.count(2) / len(tokens) - 0.3) < 120 / len(tokens))  # fmt: skip
    expect_equal("the field's documents of it", [d for d in mixed if d[0] == 1], field)


check("14.2", check_replay_by_tokens, replay_by_tokens)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Keep two counts, of old tokens and of all tokens. `itertools.cycle` begins a list again when it ends. A `while` after each document of the field does both "before the next one" and "after the last one".
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# The counts are of tokens, so long documents come less often. Counted by documents, a ratio of 0.3 would be far more than 0.3 of the training where old documents are longer.
#
# ```python
# def replay_by_tokens(field: list[list[int]], old: list[list[int]], ratio: float) -> list[list[int]]:
#     mixed, replayed, total, again = [], 0, 0, itertools.cycle(old)
#     for document in field:
#         mixed.append(document)
#         total += len(document)
#         while replayed < ratio * total:
#             mixed.append(next(again))
#             replayed += len(mixed[-1])
#             total += len(mixed[-1])
#     return mixed
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 14.3, medium: when the facts change.
# Predict first: the facts change every month. Does training pay earlier or later than without changes?
def questions_a_month(months: int, first: int, update: int, page: float) -> int:
    """The smallest whole number of questions a month for which training is cheaper than RAG over so many months.

    Training reads `first` tokens at the start, and `update` tokens at the start of every later month. RAG reads `page`
    tokens more with every question; changing a page costs nothing. A token in training costs 3 forward passes.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_questions_a_month(questions_a_month):
    expect_equal("one month, 1,000 tokens, pages of 50 (at 60 questions both cost 3,000)",
                 questions_a_month(1, 1000, 700, 50.0), 61)  # fmt: skip
    expect_equal("a year without updates", questions_a_month(12, 100_000, 0, 40.0), 626)
    expect_equal("a year with updates of 20,000 tokens", questions_a_month(12, 100_000, 20_000, 40.0), 2001)
    expect_true("many questions pay for training: cheaper at the answer, and not at one less",
                all(3 * (90_000 + 5 * u) < (q := questions_a_month(6, 90_000, u, 37.0)) * 6 * 37.0
                    and 3 * (90_000 + 5 * u) >= (q - 1) * 6 * 37.0 for u in (0, 10_000, 90_000)))  # fmt: skip


check("14.3", check_questions_a_month, questions_a_month)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write down what each way costs over all months, beyond the questions themselves, and set them equal. "Cheaper" is less than, so at equality it takes one question more.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# Later: each update is one more training to pay for, while the pages are changed for nothing.
#
# ```python
# def questions_a_month(months: int, first: int, update: int, page: float) -> int:
#     training = 3 * (first + (months - 1) * update)
#     return math.floor(training / (months * page)) + 1
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 14.4, hard: how many questions does the exam need?
def items_needed(gain: float, dividing: float, power: float = 0.8, level: float = 0.05) -> int:
    """Questions that a paired, two-sided test at this level needs to find a true gain with this power (Connor 1987).

    `gain` is the difference of the shares of right answers, `dividing` the share of questions on which exactly one of
    the two systems is right. Rounded up to a whole number.
    """
    raise NotImplementedError


# %% tags=["check"]
def check_items_needed(items_needed):
    expect_equal("items_needed(0.05, 0.10)", items_needed(0.05, 0.10), 312)
    expect_equal("items_needed(0.04, 0.12)", items_needed(0.04, 0.12), 587)
    expect_equal("items_needed(0.05, 0.40)", items_needed(0.05, 0.40), 1254)
    expect_equal("with power 0.9", items_needed(0.05, 0.10, power=0.9), 417)
    expect_equal("at the level 0.01", items_needed(0.05, 0.10, level=0.01), 465)


check("14.4", check_items_needed, items_needed)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Each question gives $+1$, $-1$ or $0$. Its mean is the gain $g$; its variance is $d - g^2$ with $d$ the share of dividing questions, and $d$ if there is no gain. The mean over $n$ questions is nearly normal. The test finds the gain if that mean exceeds $z_{1 - \alpha/2} \sqrt{d / n}$, and this must happen with the wanted power. Solve for $n$. Here $z_q$ is the value below which a standard normal number lies with probability $q$, and $\alpha$ is `level`; `statistics.NormalDist().inv_cdf` gives $z$.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# From $g - z_{1-\alpha/2} \sqrt{d/n} = z_\text{power} \sqrt{(d - g^2)/n}$. It grows with the number of questions that divide the systems, and with the square of one over the gain.
#
# ```python
# def items_needed(gain: float, dividing: float, power: float = 0.8, level: float = 0.05) -> int:
#     at_level, at_power = norm.ppf(1 - level / 2), norm.ppf(power)
#     root = at_level * math.sqrt(dividing) + at_power * math.sqrt(dividing - gain**2)
#     return math.ceil(root**2 / gain**2)
# ```
#
# </details>


# %% tags=["exercise"]
# Exercise 14.5, open: forget less, at the same price.
# Beat a fifth of replay: lower rates, adapters (peft), interpolation, another mixture, or several of them. Write down
# what you expect before you run it.
def my_adaptation() -> tuple[nn.Module, int, float]:
    """Your model, the tokens it was trained on, and the mean general score that you predicted for it (0 to 1)."""
    raise NotImplementedError


# %% tags=["check"]
def check_my_adaptation(my_adaptation):
    mine, tokens, expected = my_adaptation()
    expect_true("no more training tokens than in the lesson", 0 < tokens <= STEPS * ROWS * SEQ)
    scores = kept_of(mine)
    mean = float(np.mean([scores[ability].accuracy for ability in GENERAL]))
    print(f"medicine {scores['medicine']}, general {mean:.0%}, predicted {expected:.0%}")
    bar, learned = points["replay 20 %"]
    expect_true(f"general abilities at least {bar:.0%}", mean >= bar)
    expect_true(f"medicine at most 5 points below {learned:.0%}", scores["medicine"].accuracy >= learned - 0.05)
    expect_true(
        "your prediction was within 15 points: think again about what you changed", abs(mean - expected) <= 0.15
    )


check("14.5", check_my_adaptation, my_adaptation)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Begin with the two remedies of section 6 together: some replay, then weights between before and after. Interpolation costs no tokens, so the budget is still yours. Choose on the general documents, not on the exam.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# One of many: replay of 30 %, and then nine tenths of the way. Whether it is enough depends on the run, and that is a result too.
#
# ```python
# def my_adaptation() -> tuple[nn.Module, int, float]:
#     end, history = read_on("with questions", 0.3)
#     return interpolated(base, end, 0.9), sum(history.tokens), 0.9
# ```
#
# </details>

# %% [markdown]
# ## Quiz
#
# Five questions, two of them on a figure of this lesson. Choose before you unfold the answer.

# %% [markdown] tags=["quiz"]
# **A model scores 20 % on a new field, where the most frequent answers would score 25 %. What has it shown that it knows?**
#
# - A. a fifth of the facts
# - B. nothing about the field's facts
# - C. the facts with short names
# - D. that the exam is too hard
#
# <details><summary>Answer</summary>
#
# B. Whoever knows no fact and answers with the most frequent value of each kind does better. Only points above such a floor *show* knowledge.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the figure of section 3 the bars differ, although all four models read the same number of tokens. What is *not* equal between them?**
#
# - A. the learning rate
# - B. how often each fact of the exam is told, and in how many ways it is said and asked
# - C. the exam
# - D. the model that they start from
#
# <details><summary>Answer</summary>
#
# B. Rate, schedule, tokens, exam and start are the same. Where questions take up tokens, or other illnesses do, a fact of the exam is stated less often.
#
# </details>

# %% [markdown] tags=["quiz"]
# **In the figure of section 5 with two logarithmic axes, what would move the point where training and RAG cost the same to the right?**
#
# - A. longer pages
# - B. fewer training tokens
# - C. a new training every month
# - D. a larger model
#
# <details><summary>Answer</summary>
#
# C. It adds to the cost of training. Longer pages and fewer training tokens move it to the left; the size of the model multiplies both lines and moves nothing.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Two systems answer the same 200 questions: both right on 150, both wrong on 40, only the first right on 7, only the second on 3. Which numbers enter the paired test?**
#
# - A. 157 and 153
# - B. 150 and 40
# - C. 7 and 3
# - D. 200 and 10
#
# <details><summary>Answer</summary>
#
# C. Where both are right or both are wrong, the questions say nothing about which system is better. Seven to three is an ordinary result of ten coin tosses.
#
# </details>

# %% [markdown] tags=["quiz"]
# **Temperature scaling halves the calibration error of a model. What happens to its greedy answers?**
#
# - A. more of them are right
# - B. fewer of them are right
# - C. they stay the same; only the confidence changes
# - D. they become more varied
#
# <details><summary>Answer</summary>
#
# C. Dividing all logits by one number leaves the largest one the largest. What can change is which answers are passed on by a threshold on the confidence.
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
# Start with the exam, then with what is set up soonest: a prompt, then retrieval, then training. Soonest is not cheapest: in section 5 a prompt with four examples costs more a question than one with a page. For continued pretraining `trl` takes a column `text`; the loss is the one you checked in section 3. Each file is one document, and `wrapped` cuts long ones into rows, where the default would cut their ends off.
#
# ```python
# from datasets import concatenate_datasets, load_dataset
# from peft import LoraConfig
# from trl import SFTConfig, SFTTrainer
#
# field = load_dataset("text", data_files="field/*.txt", split="train", sample_by="document")
# old = load_dataset("HuggingFaceFW/fineweb-edu", "sample-10BT", split="train[:1%]").select_columns(["text"])
# trainer = SFTTrainer(
#     "Qwen/Qwen3-0.6B-Base",
#     SFTConfig("build/field", packing=True, packing_strategy="wrapped", max_length=2048, learning_rate=2e-4,
#               warmup_steps=50, report_to="none"),
#     train_dataset=concatenate_datasets([field, old]).shuffle(seed=0),
#     peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear"),
# )
# trainer.train()
# trainer.save_model()
# ```
#
# Choose how much of `old` by tokens, not by documents. Measure before and after, with the same harness: `lm_eval --model hf --model_args pretrained=Qwen/Qwen3-0.6B-Base,peft=build/field --tasks mmlu,gsm8k`, and your own exam beside it, whose wordings are in no training text. `--log_samples` keeps each answer, which the paired test needs.
#
# | here | a real field |
# |---|---|
# | 48 facts, stated one by one | text in which a fact is implied, dated, contradicted, and different in the next edition |
# | an exam that no text has leaked into | benchmarks that may stand in the pretraining data; write new questions, or date them |
# | the page on the name | passages in the wrong words: dense retrieval and reranking (lesson 02) |
# | exact match | experts with a rubric, blind, two for each answer, and their agreement |
# | a cost of mistakes set by us | one set by those who bear it, before the results are seen |
#
# **A small weight file is not a safe doctor.** None of the numbers here says that an answer about real medicine can be relied on.
#
# ## Read on
#
# - Cheng, Huang & Wei 2024, *Adapting Large Language Models via Reading Comprehension* (arXiv:2309.09530): raw text hurts prompting, exercises made of it repair that.
# - Allen-Zhu & Li 2023, *Physics of Language Models: Part 3.1, Knowledge Storage and Extraction* (arXiv:2309.14316): facts told in one wording may be stored and still not be found.
# - Ovadia et al. 2024, *Fine-Tuning or Retrieval?* (arXiv:2312.05934): RAG against continued pretraining on new facts.
# - Ibrahim et al. 2024, *Simple and Scalable Strategies to Continually Pre-train Large Language Models* (arXiv:2403.08763): warm up again, decay again, replay.
# - Wortsman et al. 2022, *Robust Fine-Tuning of Zero-Shot Models* (arXiv:2109.01903): interpolation between the weights before and after.
# - Gekhman et al. 2024, *Does Fine-Tuning LLMs on New Knowledge Encourage Hallucinations?* (arXiv:2405.05904).
# - Zhou et al. 2023, *LIMA* (arXiv:2305.11206); Lin et al. 2024, *The Unlocking Spell on Base LLMs* (arXiv:2312.01552): superficial alignment, and its measure token by token.
# - Nori et al. 2023, *Can Generalist Foundation Models Outcompete Special-Purpose Tuning?* (arXiv:2311.16452); Kawakami et al. 2025 (arXiv:2504.18080); Hirano & Imajo 2024 (arXiv:2404.10555); Wu et al. 2023, *BloombergGPT* (arXiv:2303.17564): the cases of section 5.
# - McNemar 1947, *Note on the Sampling Error of the Difference Between Correlated Proportions or Percentages*; Connor 1987, *Sample Size for Testing Differences in Proportions for the Paired-Sample Design*.
# - Guo et al. 2017, *On Calibration of Modern Neural Networks* (arXiv:1706.04599).
