"""One training loop in plain PyTorch: for one CPU, one GPU, and many processes started by `torchrun`.

    config = TrainConfig(max_steps=600, learning_rate=1e-3, checkpoint_dir="build/run", checkpoint_every=100)
    history = train(model, batches, config, resume=True)

Read `train` from top to bottom; what a step needs besides stands in the files beside it. The loop knows nothing
about text: it takes batches (dicts of tensors) and a loss function. Sources: decoupled weight decay, Loshchilov and
Hutter 2019; cosine schedule, Loshchilov and Hutter 2017, eq. 5; warm-up, stable, decay (WSD), Hu et al. 2024 (MiniCPM);
loss scaling, Micikevicius et al. 2018; sharding of weights and optimiser, Rajbhandari et al. 2020 (ZeRO).
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from helpers.training.batches import IGNORED, Batch, count_targets, count_tokens, endless, labels_of, rows_of, to_device
from helpers.training.checkpoints import newest_checkpoint
from helpers.training.config import TrainConfig, check_arguments, learning_rate_factor
from helpers.training.history import History, open_tensorboard, record, write_tensorboard
from helpers.training.parallel import join_processes, parallelise, synchronised
from helpers.training.random_state import preserved_random_state, random_state, random_state_swapped, seed_everything
from helpers.training.resume import load, save


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    optimizer_fn: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    resume: bool = False,
) -> History:
    """Train `model` in place, on the device where it is, for `config.max_steps` updates and return the `History`.

    `batches` yields dicts of tensors whose first dimension is the row: {"input_ids": (batch, seq)} and whatever else
    the model or `loss_fn` takes. It is iterated again whenever it ends. A resumed run draws and drops the batches that
    were used before; if that is slow, give `batches` a method `seek(n)`, after which iterating starts at batch n of
    the run, counted from 0 over all epochs. Among several processes all must be given the same batches: each
    takes its share of the rows.
    `loss_fn(model, batch)` returns the mean loss of a batch; without one it is `causal_lm_loss`. Batches accumulated
    into one update, and shares of several processes, are weighted by the labels that are not -100, or else by rows.
    `evaluate(model)` is called in eval mode without gradients; `optimizer_fn(model)` builds another optimiser than
    `adamw`, one that keeps its state in tensors; the schedule multiplies the learning rates of its groups.
    `resume=True` continues from the newest sound checkpoint, if there is one. Only weights that are trained are in it:
    frozen ones are expected to be those of the first start.
    Raises `CourseError` for settings that cannot work, for checkpoints that are all damaged or of another run, when a
    checkpoint cannot be written, and when the loss is no longer finite.
    """
    check_arguments(model, config, resume)
    rank, world_size, device = join_processes(model, config)
    parallel_model = parallelise(model, config, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_fn(model) if optimizer_fn else adamw(model, config)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    dtype = {"fp32": None, "bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}[config.precision]
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    shifted, loss_fn = loss_fn is None, loss_fn or causal_lm_loss
    history, start, was_training = History(), 0, model.training

    with preserved_random_state(device), contextlib.ExitStack() as at_the_end:
        seed_everything(config.seed)
        data_random = random_state()  # batches draw from a stream of their own, the same in all processes
        seed_everything(config.seed + 1 + rank)
        if resume and (path := newest_checkpoint(Path(config.checkpoint_dir))):
            start, history, saved_random = load(path, model, optimizer, scaler, config, device)
            data_random = saved_random if hasattr(batches, "seek") else data_random
        stream = endless(batches, start * config.accumulation_steps)
        writer = open_tensorboard(config, start, rank)
        bar = tqdm(total=config.max_steps, initial=start, unit="step", disable=not config.progress or rank > 0)
        at_the_end.callback(bar.close)
        at_the_end.callback(model.train, was_training)
        if writer:
            at_the_end.callback(writer.close)

        model.train()
        optimizer.zero_grad(set_to_none=True)  # of whatever the caller did before
        pending, clock = [], time.perf_counter()  # steps whose numbers are still on the device
        for step in range(start, config.max_steps):
            with random_state_swapped(data_random):
                micro_batches = [next(stream) for _ in range(config.accumulation_steps)]
            total = sum(count_targets(batch, shifted) for batch in micro_batches)
            step_loss = torch.zeros((), device=device)
            for index, batch in enumerate(micro_batches):
                share = rows_of(batch, rank, world_size)
                weight = count_targets(share, shifted) / total
                with synchronised(parallel_model, only_if=index == len(micro_batches) - 1):
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        loss = loss_fn(parallel_model, to_device(share, device)) * weight
                    scaler.scale(loss * world_size).backward()  # gradients are averaged over the processes
                step_loss += loss.detach()

            factor = learning_rate_factor(step, config)
            for group, peak_rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = peak_rate * factor
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
            scaler.step(optimizer)  # skipped if a gradient overflowed; the scale is then halved
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            bar.update()

            done, last = step + 1, step + 1 == config.max_steps
            pending.append((step_loss, norm, config.learning_rate * factor, sum(map(count_tokens, micro_batches))))
            evaluate_now = evaluate is not None and (last or is_due(done, config.evaluate_every))
            save_now = config.checkpoint_dir is not None and (last or is_due(done, config.checkpoint_every))
            if not (evaluate_now or save_now or last or is_due(done, config.log_every)):
                continue
            record(history, pending, clock, scaler, world_size)
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", refresh=False)
            if evaluate_now:
                history.evaluations.append({"step": done} | _evaluate(evaluate, model, device))
            if writer:
                write_tensorboard(writer, history, pending, done)
            if save_now:
                save(done, model, optimizer, scaler, history, data_random, config, device)
            pending, clock = [], time.perf_counter()
    return history


def causal_lm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats of each next token, given those before it in its row.

    `batch["labels"]` (batch, seq) are the input tokens with -100 where a token is not to be predicted; without labels
    all are, except where an `attention_mask` is 0. Everything else in the batch goes to the model.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits  # (batch, seq, vocab)
    labels = F.pad(labels_of(batch), (0, 1), value=IGNORED)[:, 1:]  # (batch, seq): the token after each position
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel; weight decay on matrices and embeddings, none on norms, biases and other vectors."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [parameter for name, parameter in trained if parameter.ndim >= 2 and not name.endswith("bias")]
    others = [parameter for name, parameter in trained if parameter.ndim < 2 or name.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=True)


def is_due(done: int, every: int) -> bool:
    """Whether something that happens `every` so many steps is due after `done` steps; never for 0."""
    return every > 0 and done % every == 0


def _evaluate(evaluate: Callable, model: nn.Module, device: torch.device) -> dict[str, float]:
    model.eval()
    with preserved_random_state(device), torch.no_grad():
        result = evaluate(model)
    model.train()
    return {name: float(value) for name, value in result.items()}
