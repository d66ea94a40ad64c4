"""What the tests of training run in processes of their own: runs that are killed, and runs under torchrun.

A run is described by a dict, `perform` does it and writes what came out beside `run["out"]`:
`<out>.<rank>.json` and, from the first process, the weights `<out>.safetensors`.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.errors import CourseError
from helpers.models import tiny_config
from helpers.training import TrainConfig, causal_lm_loss, train
from helpers.training.batches import Batch
from helpers.training.checkpoints import find_damage, load_tensors, newest_checkpoint, read_state, save_checkpoint

VOCAB_SIZE = 64


def tiny_llama(dropout: float = 0.0, **overrides) -> LlamaForCausalLM:
    """Two layers, 37 thousand weights, always the same."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "attention_dropout": dropout} | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_config("llama", vocab_size=VOCAB_SIZE, **sizes))


def random_batches(number: int, rows: int = 4, seq_len: int = 16, seed: int = 0) -> list[Batch]:
    """Batches with labels, of which each row has another number that count."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(number):
        tokens = torch.randint(0, VOCAB_SIZE, (rows, seq_len), generator=generator)  # (batch, seq)
        masked = torch.randint(0, seq_len - 2, (rows, 1), generator=generator)
        batches.append({"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(seq_len) < masked, -100)})
    return batches


class SlowList(list):
    """A list of batches that takes its time, so that there is some to be killed in."""

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches, a hundredth of a second each."""
        for batch in super().__iter__():
            time.sleep(0.01)
            yield batch


class ShuffledEpochs(SlowList):
    """Draws from all three global generators: the order of each epoch, and noise in each batch."""

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches in another order each time."""
        order = random.sample(range(len(self)), len(self))
        for index in order:
            time.sleep(0.01)
            noise = torch.randint(0, VOCAB_SIZE, (1,)) + int(np.random.randint(VOCAB_SIZE))
            yield {"input_ids": (self[index]["input_ids"] + noise) % VOCAB_SIZE}


class SeekableStream:
    """An endless stream that can be entered anywhere, and that draws from all three global generators."""

    position = 0

    def seek(self, position: int) -> None:
        """Continue with batch number `position`."""
        self.position = position

    def __iter__(self) -> Iterator[Batch]:
        """Give the batches from the position on."""
        while True:
            time.sleep(0.01)
            noise = torch.randint(0, VOCAB_SIZE, (1,)) + random.randrange(VOCAB_SIZE) + int(np.random.normal(0, 20))
            tokens = random_batches(1, seed=self.position)[0]["input_ids"]
            self.position += 1
            yield {"input_ids": (tokens + noise) % VOCAB_SIZE}


DATA = {
    "list": lambda: random_batches(6, rows=5),
    "slow list": lambda: SlowList(random_batches(7)),
    "shuffled epochs": lambda: ShuffledEpochs(random_batches(7)),
    "stream": SeekableStream,
}


def overflowing_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Gradients that fp16 holds at a scale of about 1, not at the first scale of 65,536."""
    return 1000 * causal_lm_loss(model, batch)


def small_files_only(step: int) -> Callable[[torch.nn.Module], dict[str, float]]:
    """An evaluation after which, from its `step`th call on, files cannot grow: as on a full disk, for this process."""
    calls = []

    def evaluate(model: torch.nn.Module) -> dict[str, float]:
        calls.append(model)
        if len(calls) >= step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return {}

    return evaluate


def quick_processes() -> ForkServerContext:
    """Processes that start in a moment: each is a fork of one that has done nothing but import this module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_worker"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(Path(__file__).parent), OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return context


def perform(run: dict, started=None) -> None:
    """Train as `run` says and write what came out; `started` is an event to be set when training is about to begin."""
    torch.set_num_threads(1)  # sums in the same order everywhere
    model = tiny_llama(run.get("dropout", 0.0)).to("cuda" if run.get("cuda") else "cpu")
    config = TrainConfig(progress=False, **run["config"])
    if started is not None:
        started.set()
    outcome = {}
    try:
        history = train(
            model,
            DATA[run["data"]](),
            config,
            loss_fn=overflowing_loss if run.get("overflow") else None,
            evaluate=small_files_only(run["full_disk_at"]) if "full_disk_at" in run else None,
            resume=run.get("resume", False),
        )
        outcome = {"losses": history.losses, "skipped": history.skipped_steps, "norms": history.grad_norms}
        outcome["parameters"] = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters())
    except CourseError as error:
        outcome["error"] = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    rank = dist.get_rank() if dist.is_initialized() else 0
    weights = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    Path(f"{run['out']}.{rank}.json").write_text(json.dumps(outcome))
    if rank == 0:
        save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, f"{run['out']}.safetensors")


def die_at_every_operation(folder: Path) -> None:
    """Save a second checkpoint again and again, killed one file operation later each time, until one is through.

    Writes to `folder`/report.json what was there after each kill: [newest, value of its tensor, leftovers].
    """
    report, survived = [], False
    while not survived:
        run = folder / str(len(report))
        save_checkpoint(run, 1, {"x": torch.full((10,), 1.0)}, {"step": 1}, keep=1)
        child = os.fork()
        if child == 0:
            _kill_at_operation(len(report) + 1)
            save_checkpoint(run, 2, {"x": torch.full((10,), 2.0)}, {"step": 2}, keep=1)
            os._exit(0)
        survived = os.waitpid(child, 0)[1] == 0
        leftovers = [path.name for path in run.glob(".partial-*")]
        newest, tensors = newest_checkpoint(run), {"x": torch.zeros(10)}
        load_tensors(newest, tensors)
        assert read_state(newest)["step"] == tensors["x"][3] and find_damage(newest) is None
        save_checkpoint(run, 3, tensors, {"step": 3}, keep=1)  # what a resumed run does next
        report.append([newest.name, tensors["x"][3].item(), leftovers, sorted(path.name for path in run.iterdir())])
    (folder / "report.json").write_text(json.dumps(report))


def _kill_at_operation(number: int) -> None:
    operations = []

    def watch(event: str, arguments: tuple) -> None:
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}:
            operations.append(event)
            if len(operations) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    for described in json.loads(Path(sys.argv[1]).read_text()):
        perform(described)
    # A mesh keeps gloo's threads alive, and one that drops the last gathered tensor while Python ends aborts the
    # process ("terminate called without an active exception", one launch in ten): so Python does not end here.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
