"""The sweep of lesson 04: many small models on one stream of Shima's questions, and the loss that each reaches.

    python -m recipes.scaling_sweep --workers 2                    # resumes; about 20 minutes of one core in all
    python -m recipes.scaling_sweep --slurm partition=cpu          # the same cells, one job each, through submitit

A *cell* is one training run: a width, a number of tokens and what differs from the rule. `train_cell` turns it into
one dict of measurements, `run_sweep` runs a list of cells through an executor and keeps a JSON line for each one that
is done. The module knows nothing of fits and laws: those stand in the lesson.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.errors import CourseError, exit_cleanly
from helpers.files import write_atomically
from helpers.models import load_tokenizer
from helpers.profiles import ROOT
from helpers.world import RELATIONS, World, ask

RESULTS = ROOT / "data" / "scaling_sweep.json"
NUM_PEOPLE, ZIPF_EXPONENT = 20_000, 1.5  # many more people than in shima-4m's world, with a lighter tail
BATCH, WARMUP_SHARE, END_RATE = 12, 0.1, 0.05  # documents a step; share of the steps; share of the peak rate
WIDTHS = (12, 16, 24, 32, 48, 64, 96)
TOKENS = (125_000, 250_000, 500_000, 1_000_000, 2_000_000)


@dataclass(frozen=True)
class Cell:
    """One run of the sweep. `tokens` are those it is trained on, in `epochs` rounds over a part of the stream."""

    width: int
    tokens: int
    seed: int = 0
    epochs: int = 1
    schedule: str = "cosine"  # or "constant"
    rate: float = 1.0  # times the learning rate of the rule

    @property
    def key(self) -> str:
        """A name that no other cell has."""
        return "-".join(str(value) for value in asdict(self).values())


def planned_cells() -> list[Cell]:
    """All cells of the committed sweep, the cheapest first."""
    cells = [Cell(width, tokens) for width in WIDTHS for tokens in TOKENS]
    cells += [Cell(width, tokens, seed=seed) for seed in (1, 2) for width in (16, 24, 32) for tokens in TOKENS[1:3]]
    cells += [Cell(width, TOKENS[3], seed=1) for width in (16, 24, 32)]
    cells += [Cell(width, tokens, seed=1) for width in (48, 64) for tokens in TOKENS[1:3]]
    cells += [Cell(width, TOKENS[2], rate=rate) for width in (16, 32, 64) for rate in (0.5, 2.0)]
    cells += [Cell(32, TOKENS[3], epochs=epochs) for epochs in (2, 4, 8, 16, 32, 64)]
    cells += [Cell(12, tokens, seed=1) for tokens in TOKENS[1:4]]
    cells += [Cell(32, TOKENS[-1], schedule="constant")]
    return sorted(cells, key=lambda cell: cell.tokens * (cell.width + 30) ** 1.5)  # roughly their seconds


# The text: documents of six questions and answers about people, each a row of its own.


@lru_cache(maxsize=1)
def world() -> World:
    """Shima with more people."""
    return World(0, num_people=NUM_PEOPLE, zipf_exponent=ZIPF_EXPONENT)


@lru_cache(maxsize=1)
def vocabulary() -> dict[int, int]:
    """Id in the course's tokenizer -> id in the sweep, for each token that the stream can hold; 0 ends a document."""
    forms = [(form, value) for r in RELATIONS.values() for form in r.questions for value in world().values[r.name]]
    texts = [ask(form.format(name="Shima"), value) for form, value in forms] + [f" {name}" for name in world().person]
    texts.append(" not")  # no document holds it: for a question of the lesson
    used = {token for ids in load_tokenizer("shima-4m")(texts)["input_ids"] for token in ids}
    return {token: number for number, token in enumerate([0, *sorted(used - {0})])}


def encode(texts: Sequence[str]) -> list[Tensor]:
    """Each text as a row (its tokens + 1,): the end token, then the text."""
    ids = vocabulary()
    return [torch.tensor([0, *map(ids.__getitem__, row)]) for row in load_tokenizer("shima-4m")(texts)["input_ids"]]


@lru_cache(maxsize=4)
def stream(seed: int, count: int) -> list[Tensor]:
    """The first documents of a stream, each begun and closed by the end token."""
    texts = [world().document(seed, index, {"questions": 1.0}) for index in range(count)]
    return [F.pad(row, (0, 1)) for row in encode(texts)]


def batch_of(documents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (batch, longest - 1); a target of -100 does not count."""
    rows = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True, padding_value=-100)
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


# One cell.


def new_model(width: int, seed: int = 0) -> LlamaForCausalLM:
    """A fresh two-layer Llama with heads of size 8 and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=width,
        intermediate_size=8 * round(width / 3),
        num_hidden_layers=2,
        num_attention_heads=width // 8,
        num_key_value_heads=width // 8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        initializer_range=0.4 / math.sqrt(width),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def learning_rate(width: int) -> float:
    """The rule for the peak rate; the sweep holds runs at half and twice of it."""
    return 0.75 / width


def training_batches(cell: Cell) -> Iterator[list[Tensor]]:
    """The documents of each step; with several epochs, each round in a new order."""
    per_document = 84.3  # tokens, on average
    steps = round(cell.tokens / per_document / BATCH)
    unique = max(BATCH, round(steps * BATCH / cell.epochs))
    documents = stream(1 + cell.seed, unique)
    rng, order = random.Random(f"order/{cell.seed}"), []
    for _ in range(steps):
        while len(order) < BATCH:
            order += list(range(unique)) if cell.epochs == 1 else rng.sample(range(unique), unique)
        yield [documents[index] for index in order[:BATCH]]
        order = order[BATCH:]


def train_cell(cell: Cell) -> dict[str, Any]:
    """Train one cell on one thread and return what it is and what it reached."""
    torch.set_num_threads(1)
    started, model = time.process_time(), new_model(cell.width, cell.seed)
    peak = cell.rate * learning_rate(cell.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    batches = list(training_batches(cell))
    warmup, seen, on_the_way = max(1, round(WARMUP_SHARE * min(len(batches), 1000))), 0, []
    marks = [mark for mark in TOKENS if mark < 0.99 * cell.tokens]
    for step, documents in enumerate(batches):
        progress = max(0.0, (step - warmup) / (len(batches) - warmup))
        factor = END_RATE + (1 - END_RATE) * (1 + math.cos(math.pi * progress)) / 2
        factor = 1.0 if cell.schedule == "constant" else factor
        for group in optimizer.param_groups:
            group["lr"] = peak * min(factor, (step + 1) / warmup)
        inputs, targets = batch_of(documents)
        logits = model(input_ids=inputs, use_cache=False).logits  # (batch, seq, vocab)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += (targets >= 0).sum().item()
        if marks and seen >= marks[0]:
            on_the_way.append({"tokens": seen, "loss": round(test_loss(model), 5)})
            marks.pop(0)
    total = model.num_parameters()
    return {
        **asdict(cell),
        "key": cell.key,
        "non_embedding": total - model.get_input_embeddings().weight.numel(),
        "parameters": total,
        "tokens_seen": seen,
        "loss": round(test_loss(model), 5),
        "on_the_way": on_the_way,
        **probe(model),
        "seconds": round(time.process_time() - started, 1),
    }


@torch.no_grad()
def test_loss(model: LlamaForCausalLM, count: int = 500) -> float:
    """Mean surprise in nats per token of documents that no cell is trained on."""
    documents, nats, tokens = stream(1000, count), 0.0, 0
    for start in range(0, count, 50):
        inputs, targets = batch_of(documents[start : start + 50])
        logits = model(input_ids=inputs, use_cache=False).logits
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum").item()
        tokens += (targets >= 0).sum().item()
    return nats / tokens


# What else the lesson asks each model.

BANDS = ((1, 9), (10, 29), (30, 99), (100, 299), (300, 999))  # ranks of the people who are asked about


def probe_questions(per_band: int = 48) -> list[dict[str, Any]]:
    """Questions on single facts, as many from each band of ranks, each with a wrong answer of the same kind."""
    rng, people, questions = random.Random("probe"), world().people, []
    for low, high in BANDS:
        for _ in range(per_band):
            person, relation = people[rng.randint(low, high) - 1], rng.choice(list(RELATIONS.values()))
            asked, again = (form.format(name=person.name) for form in rng.sample(relation.training_questions, 2))
            right = person.facts[relation.name]
            wrong = rng.choice([value for value in world().values[relation.name] if value != right])
            questions.append({"asked": asked, "again": again, "right": right, "wrong": wrong, "rank": person.rank})
    return questions


def negated(question: str) -> str:
    """The question with the word "not" before its question mark."""
    return question.removesuffix("?") + " not?"


@torch.no_grad()
def answer_log_probs(model: LlamaForCausalLM, prompts: Sequence[str], answers: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer with its line end (n,), and whether a greedy answer would be it (n,)."""
    starts = [len(row) for row in encode(prompts)]
    inputs, targets = batch_of(encode([f"{p} {a}\n" for p, a in zip(prompts, answers, strict=True)]))
    logits = model(input_ids=inputs, use_cache=False).logits
    counts = (torch.arange(targets.shape[1]) >= torch.tensor(starts)[:, None] - 1) & (targets >= 0)
    each = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    greedy = (logits.argmax(-1) == targets) | ~counts
    return (each * counts).sum(1), greedy.all(1)


def probe(model: LlamaForCausalLM) -> dict[str, Any]:
    """Facts, and two tasks on which recalling the fact is the wrong thing to do.

    `facts`: log-probability of the right answer; `greedy`: whether it is the greedy one ("1" or "0"); `negation` and
    `correction`: how much more probable the right answer is than the one that recalls the fact, in nats.
    """
    questions = probe_questions()
    asked, again, right, wrong = ([q[name] for q in questions] for name in ("asked", "again", "right", "wrong"))
    facts, greedy = answer_log_probs(model, list(map(ask, asked)), right)
    told = [ask(first, lie) + ask(then) for first, lie, then in zip(asked, wrong, again, strict=True)]
    negative = [ask(negated(question)) for question in asked]
    margins = [answer_log_probs(model, p, wrong)[0] - answer_log_probs(model, p, right)[0] for p in (negative, told)]
    facts, negation, correction = ([round(x, 2) for x in row.tolist()] for row in (facts, *margins))
    marks = "".join("01"[flag] for flag in greedy.tolist())
    return {"facts": facts, "greedy": marks, "negation": negation, "correction": correction}


# Many cells.


def processes(workers: int = 1) -> ProcessPoolExecutor:
    """Fresh processes on this machine."""
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def slurm(folder: str | Path, **parameters: Any) -> Any:
    """Jobs on a Slurm cluster; `parameters` go to `submitit.AutoExecutor.update_parameters`.

    Raises CourseError where submitit is not installed.
    """
    try:
        import submitit
    except ImportError as error:
        raise CourseError(
            "A sweep on Slurm needs the package submitit, which is not installed: run `pip install submitit` on the "
            "cluster, or use processes on this machine."
        ) from error
    executor = submitit.AutoExecutor(folder=str(folder), cluster="slurm")
    executor.update_parameters(**{"timeout_min": 60, "cpus_per_task": 1} | parameters)
    return executor


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> measurements of each finished cell; an empty dict where there is no file."""
    try:
        return {row["key"]: row for row in json.loads(path.read_text())["cells"]} if path.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise CourseError(f"{path.name} holds no results of a sweep: move it away or give another path.") from error


RECIPE = {  # what a file of results says of itself
    "command": "python -m recipes.scaling_sweep",
    "stream": f"World(0, {NUM_PEOPLE}, {ZIPF_EXPONENT}), questions only; two-layer Llamas; peak rate 0.75 / width",
}


def write_results(path: Path, results: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any] = RECIPE) -> None:
    """The file is replaced in one step: it never holds half a cell."""
    recipe = {**recipe, "cpu_seconds": round(sum(row["seconds"] for row in results.values()))}
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in results.values())
    write_atomically(path, f'{{"recipe": {json.dumps(recipe)},\n"cells": [\n{rows}\n]}}\n')


def run_sweep(
    cells: Sequence[Any],
    executor: Any,
    path: Path,
    *,
    resume: bool = True,
    progress: bool = True,
    job: Any = None,
    recipe: Mapping[str, Any] = RECIPE,
) -> dict[str, dict[str, Any]]:
    """Run the cells that `path` does not hold yet; keep each as soon as it is done; return all that it holds.

    `executor` needs only `submit(function, cell)`, which returns at once an object with `done()` and `result()`:
    what concurrent.futures and submitit have in common. `job` is the function that runs, `train_cell` unless given.
    `recipe` is what the file says of itself. A cell that fails is reported at the end, after the others.
    """
    results = read_results(path) if resume else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = {executor.submit(job or train_cell, cell): cell for cell in cells if cell.key not in results}
    failures = []
    with tqdm(total=len(waiting), unit="cell", disable=not progress) as bar:
        while waiting:
            finished = [future for future in waiting if future.done()]
            for future in finished:
                cell = waiting.pop(future)
                try:
                    results[cell.key] = future.result()
                except Exception as error:  # one broken cell must not lose the others
                    failures.append(f"{cell.key} ({type(error).__name__}: {error})")
                else:
                    write_results(path, results, recipe)
                bar.update()
            if not finished:
                time.sleep(0.2)
    if failures:
        raise CourseError(f"{len(failures)} cells failed, the rest is in {path.name}: {'; '.join(failures)}.")
    return results


def main() -> None:
    """Run or resume the committed sweep."""
    parser = argparse.ArgumentParser(prog="python -m recipes.scaling_sweep", description=main.__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--slurm", nargs="*", metavar="name=value", help="submit jobs, with submitit's parameters")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, resumed if it is there")
    options = parser.parse_args()
    if options.slurm is None:
        executor = processes(options.workers)
    else:
        executor = slurm("build/sweep", **dict(pair.split("=", 1) for pair in options.slurm))
    run_sweep(planned_cells(), executor, options.out)


if __name__ == "__main__":
    exit_cleanly(main)
