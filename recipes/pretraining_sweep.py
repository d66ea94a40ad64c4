"""The sweep of lesson 11: how learning rates transfer over widths, what Muon gains, and what a schedule costs.

    python -m recipes.pretraining_sweep --workers 1                # resumes; about 25 minutes of one core in all

A *cell* is one training run: a width, a learning rate and what differs from the rule. `train_cell` turns it into one
dict of measurements; the runner is that of `recipes.scaling_sweep`. Lesson 11 writes out what the cells are about,
the maximal update parametrisation and Muon, and compares its own with those used here.
"""

import argparse
import math
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.data import pack
from helpers.errors import CourseError, exit_cleanly
from helpers.models import load_tokenizer
from helpers.profiles import ROOT
from helpers.world import World
from recipes.scaling_sweep import processes, run_sweep

RESULTS = ROOT / "data" / "pretraining_sweep.json"
BASE_WIDTH, HEAD_SIZE, EMBEDDING_STD = 16, 8, 0.1  # at the base width both parametrisations are the same model
BATCH, SEQ_LEN, WARMUP = 16, 64, 10  # rows; tokens; steps
STEPS, EVALUATE_EVERY = 160, 8
WIDTHS, SEEDS = (16, 64, 128), (0, 1, 2)
RATES = (0.004, 0.008, 0.016, 0.032, 0.064, 0.128)


@dataclass(frozen=True)
class Cell:
    """One run of the sweep: 2 layers of so many features, `steps` steps of 16 rows of 64 tokens."""

    width: int
    rate: float  # the peak, for a matrix of the base width
    parametrisation: str = "standard"  # or "mup"
    optimiser: str = "adamw"  # or "muon", for the matrices of the layers
    schedule: str = "cosine"  # "wsd", or "constant"
    steps: int = STEPS
    seed: int = 0

    @property
    def key(self) -> str:
        """A name that no other cell has."""
        return "-".join(str(value) for value in asdict(self).values())


def planned_cells() -> list[Cell]:
    """All cells of the committed sweep, seed after seed."""
    cells = []
    for seed in SEEDS:
        for width in WIDTHS:
            kinds = ("standard",) if width == BASE_WIDTH else ("standard", "mup")
            cells += [Cell(width, rate, kind, seed=seed) for kind in kinds for rate in RATES]
        cells += [Cell(64, rate, optimiser="muon", seed=seed) for rate in RATES[:5]]
        cells += [Cell(64, rate, schedule=name, seed=seed) for name in ("wsd", "constant") for rate in RATES[:4]]
    return cells


# The text: documents of Shima that shima-4m has not read, in rows of 64 tokens.


@lru_cache(maxsize=4)
def rows(stream: int, count: int) -> Tensor:
    """The first rows of a stream of documents (count, SEQ_LEN)."""
    tokenizer = load_tokenizer("shima-4m")
    texts = World().documents(stream)
    encoded = (tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts)
    return torch.tensor(list(islice(pack(encoded, SEQ_LEN), count)))


def training_rows(seed: int, steps: int) -> Tensor:
    """The rows of each step (steps, BATCH, SEQ_LEN)."""
    return rows(2000 + seed, steps * BATCH).view(steps, BATCH, SEQ_LEN)


# One cell.


def new_model(width: int, parametrisation: str = "standard", seed: int = 0) -> LlamaForCausalLM:
    """A fresh two-layer Llama whose matrices keep the size of what passes through them."""
    config = LlamaConfig(
        vocab_size=len(load_tokenizer("shima-4m")), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=width // HEAD_SIZE, num_key_value_heads=width // HEAD_SIZE,
        max_position_embeddings=SEQ_LEN, tie_word_embeddings=False, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for name, matrix in model.named_parameters():
            if matrix.ndim == 2:
                deviation = EMBEDDING_STD if "embed" in name else 1 / math.sqrt(matrix.shape[1])
                if "lm_head" in name and parametrisation == "mup":
                    deviation *= math.sqrt(BASE_WIDTH / width)
                nn.init.normal_(matrix, std=deviation)
    return model


def groups(model: LlamaForCausalLM, rate: float, parametrisation: str) -> list[dict[str, Any]]:
    """Parameters with their peak rates: in muP that of a matrix falls with the number of its inputs."""
    found = []
    for name, parameter in model.named_parameters():
        scaled = parametrisation == "mup" and parameter.ndim == 2 and "embed" not in name
        factor = BASE_WIDTH / model.config.hidden_size if scaled else 1.0
        found.append({"params": [parameter], "lr": rate * factor, "peak": rate * factor})
    return found


def optimisers(model: LlamaForCausalLM, cell: Cell) -> list[torch.optim.Optimizer]:
    """AdamW for everything; or Muon for the matrices of the layers, and AdamW for the rest."""
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.0}
    if cell.optimiser == "adamw":
        return [torch.optim.AdamW(groups(model, cell.rate, cell.parametrisation), **settings)]
    if not hasattr(torch.optim, "Muon"):
        raise CourseError("torch.optim.Muon needs torch 2.9 or newer: update torch, or leave out the cells of Muon.")
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    muon = torch.optim.Muon(
        [{"params": hidden, "peak": cell.rate}], lr=cell.rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW([{"params": others, "peak": cell.rate}], lr=cell.rate, **settings)]


def rate_factor(step: int, cell: Cell) -> float:
    """The rate of a step as a share of its peak; "wsd" falls in the last fifth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - WARMUP) / (cell.steps - WARMUP)
    if cell.schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return min(1.0, (1 - progress) / 0.2) if cell.schedule == "wsd" else 1.0


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Mean loss (nats per token) of rows (batch, seq)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits  # (batch, seq - 1, vocab)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def test_loss(model: LlamaForCausalLM) -> float:
    """Mean loss on 64 rows that no cell is trained on."""
    return loss_of(model, rows(1999, 64)).item()


def train_cell(cell: Cell, stop: int | None = None) -> dict[str, Any]:
    """Train one cell on one thread, or only its first steps, and return what it is and what it reached."""
    torch.set_num_threads(1)
    started, model = time.process_time(), new_model(cell.width, cell.parametrisation, cell.seed)
    optims, curve = optimisers(model, cell), []
    for step, batch in enumerate(training_rows(cell.seed, cell.steps)[:stop]):
        for group in (group for optim in optims for group in optim.param_groups):
            group["lr"] = group["peak"] * rate_factor(step, cell)
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad(set_to_none=True)
        if (step + 1) % EVALUATE_EVERY == 0:
            curve.append(round(test_loss(model), 4))
    seconds = round(time.process_time() - started, 1)
    return {**asdict(cell), "key": cell.key, "loss": curve[-1], "curve": curve, "seconds": seconds}


RECIPE = {
    "command": "python -m recipes.pretraining_sweep",
    "stream": f"World().documents(2000 + seed), rows of {SEQ_LEN} tokens; two-layer Llamas; AdamW betas 0.9 and 0.95",
}


def main() -> None:
    """Run or resume the committed sweep."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pretraining_sweep", description=main.__doc__)
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of results, resumed if it is there")
    options = parser.parse_args()
    run_sweep(planned_cells(), processes(options.workers), options.out, job=train_cell, recipe=RECIPE)


if __name__ == "__main__":
    exit_cleanly(main)
