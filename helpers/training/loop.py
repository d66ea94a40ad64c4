"""One training loop in plain PyTorch: for one CPU, one GPU, and many processes started by `torchrun`.

    config = TrainConfig(max_steps=600, learning_rate=1e-3, checkpoint_dir="build/run", checkpoint_every=100)
    history = train(model, batches, config, resume=True)

Read `train` from top to bottom; the functions after it are its steps in the order of their use. The loop knows nothing
about text: it takes batches (dicts of tensors) and a loss function. Sources: decoupled weight decay, Loshchilov and
Hutter 2019; cosine schedule, Loshchilov and Hutter 2017, eq. 5; warm-up, stable, decay (WSD), Hu et al. 2024 (MiniCPM);
loss scaling, Micikevicius et al. 2018; sharding of weights and optimiser, Rajbhandari et al. 2020 (ZeRO).
"""

import atexit
import contextlib
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from helpers.errors import CourseError
from helpers.training.checkpoints import load_tensors, newest_checkpoint, read_state, save_checkpoint, stored_tensors

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas
    from torch.utils.tensorboard import SummaryWriter

Batch = dict[str, Any]
IGNORED = -100  # a label that takes no part in the loss, as in transformers


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run; those marked * may be changed when it is resumed."""

    max_steps: int  # updates of the weights; may be raised on a resume if the schedule is constant
    learning_rate: float = 1e-3
    min_learning_rate_ratio: float = 0.1  # where the schedule ends, as a fraction of the learning rate
    warmup_steps: int = 0
    schedule: str = "cosine"  # "cosine", "linear", "wsd" or "constant"
    decay_fraction: float = 0.2  # the last part of a "wsd" run, in which the rate falls
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0  # largest norm of the gradient; 0 for no clipping
    accumulation_steps: int = 1  # batches per update
    precision: str = "fp32"  # "fp32" (as the weights are), "bf16-mixed" or "fp16-mixed"
    parallel: str | None = None  # * None, "ddp" or "fsdp2"; the latter two are started by torchrun
    checkpoint_dir: str | Path | None = None  # *
    checkpoint_every: int = 0  # * steps; 0: only at the end
    keep_checkpoints: int = 2  # *
    evaluate_every: int = 0  # * steps; 0: only at the end
    tensorboard_dir: str | Path | None = None  # *
    log_every: int = 10  # * steps between looks at the loss, each of which waits for the device
    progress: bool = True  # *
    seed: int = 0  # of dropout and of whatever the batches draw from torch, numpy or random


MAY_CHANGE = {  # when a run is resumed
    "parallel",
    "checkpoint_dir",
    "checkpoint_every",
    "keep_checkpoints",
    "evaluate_every",
    "tensorboard_dir",
    "log_every",
    "progress",
}


@dataclass
class History:
    """What happened: one number per step since step 0, also after a resume, and one dict per evaluation."""

    losses: list[float] = field(default_factory=list)  # mean over the tokens of the step, before its update
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # before clipping; not finite where fp16 skipped the update
    tokens: list[int] = field(default_factory=list)  # input tokens of all processes, padding included
    seconds: list[float] = field(default_factory=list)  # without evaluations and checkpoints
    evaluations: list[dict[str, float]] = field(default_factory=list)  # {"step": steps done, ...}

    @property
    def skipped_steps(self) -> int:
        """How many updates the fp16 gradient scaler skipped because a gradient overflowed."""
        return sum(not math.isfinite(norm) for norm in self.grad_norms)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per step: step, loss, learning_rate, grad_norm, tokens, seconds."""
        import pandas

        columns = {"loss": self.losses, "learning_rate": self.learning_rates, "grad_norm": self.grad_norms}
        columns |= {"tokens": self.tokens, "seconds": self.seconds}
        return pandas.DataFrame(columns).rename_axis("step").reset_index()

    def plot(self) -> "matplotlib.figure.Figure":
        """Draw loss, learning rate and gradient norm over the steps."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3), layout="constrained")
        series = {"loss": self.losses, "learning rate": self.learning_rates, "gradient norm": self.grad_norms}
        for axes, (label, values) in zip(figure.subplots(1, len(series)), series.items(), strict=True):
            axes.plot(values, linewidth=1)
            axes.set(xlabel="step", ylabel=label)
        return figure


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
    _check(model, config, resume)
    rank, world_size, device = _join_processes(model, config)
    parallel_model = _parallelise(model, config, device)
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
            start, history, saved_random = _load(path, model, optimizer, scaler, config, device)
            data_random = saved_random if hasattr(batches, "seek") else data_random
        stream = _endless(batches, start * config.accumulation_steps)
        writer = _open_tensorboard(config, start, rank)
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
            total = sum(_count_targets(batch, shifted) for batch in micro_batches)
            step_loss = torch.zeros((), device=device)
            for index, batch in enumerate(micro_batches):
                share = _rows_of(batch, rank, world_size)
                weight = _count_targets(share, shifted) / total
                with _synchronised(parallel_model, only_if=index == len(micro_batches) - 1):
                    with torch.autocast(device.type, dtype, enabled=dtype is not None):
                        loss = loss_fn(parallel_model, _to_device(share, device)) * weight
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
            pending.append((step_loss, norm, config.learning_rate * factor, sum(map(_count_tokens, micro_batches))))
            evaluate_now = evaluate is not None and (last or _is_due(done, config.evaluate_every))
            save_now = config.checkpoint_dir is not None and (last or _is_due(done, config.checkpoint_every))
            if not (evaluate_now or save_now or last or _is_due(done, config.log_every)):
                continue
            _record(history, pending, clock, scaler, world_size)
            bar.set_postfix(loss=f"{history.losses[-1]:.3f}", refresh=False)
            if evaluate_now:
                history.evaluations.append({"step": done} | _evaluate(evaluate, model, device))
            if writer:
                _write_tensorboard(writer, history, pending, done)
            if save_now:
                _save(done, model, optimizer, scaler, history, data_random, config, device)
            pending, clock = [], time.perf_counter()
    return history


def causal_lm_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy in nats of each next token, given those before it in its row.

    `batch["labels"]` (batch, seq) are the input tokens with -100 where a token is not to be predicted; without labels
    all are, except where an `attention_mask` is 0. Everything else in the batch goes to the model.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits  # (batch, seq, vocab)
    labels = F.pad(_labels(batch), (0, 1), value=IGNORED)[:, 1:]  # (batch, seq): the token after each position
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


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The learning rate of update `step` (from 0) as a fraction of its peak, which the last warm-up step reaches."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)  # 0 to just below 1
    if config.schedule == "constant":
        remaining = 1.0
    elif config.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    elif config.schedule == "linear":
        remaining = 1 - progress
    else:
        remaining = min(1.0, (1 - progress) / config.decay_fraction)
    return config.min_learning_rate_ratio + (1 - config.min_learning_rate_ratio) * remaining


# Randomness: the loop leaves the caller's generators as it found them.


def seed_everything(seed: int) -> None:
    """Seed torch (CPU and GPU), Python's random and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of torch's, Python's and numpy's generators, with that of `device` if it is a GPU."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device is not None and device.type == "cuda" else {})


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Whatever is drawn or seeded inside leaves no trace."""
    before = random_state(device)
    try:
        yield
    finally:
        set_random_state(before, device)


@contextlib.contextmanager
def random_state_swapped(state: dict[str, Any]) -> Iterator[None]:
    """Draw from the generators of `state` inside, and keep in `state` where they got to."""
    with preserved_random_state(torch.device("cpu")):
        set_random_state(state)
        yield
        state.update(random_state())


def _random_to_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    _, python, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]
    tensors = {name: state[name] for name in ("torch", "cuda") if name in state}
    tensors["python"] = torch.tensor(python)
    tensors["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss])
    tensors["gauss"] = torch.tensor([math.nan if gauss is None else gauss, cached], dtype=torch.float64)
    return tensors


def _random_from_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    tensors = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    gauss, cached = tensors["gauss"].tolist()
    *keys, position, has_gauss = tensors["numpy"].tolist()
    state = {name: tensors[name] for name in ("torch", "cuda") if name in tensors}
    state["python"] = (3, tuple(tensors["python"].tolist()), None if math.isnan(gauss) else gauss)
    state["numpy"] = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    return state


# Before the loop.


def _check(model: nn.Module, config: TrainConfig, resume: bool) -> None:
    choices = {"schedule": ("cosine", "linear", "wsd", "constant"), "parallel": (None, "ddp", "fsdp2")}
    choices["precision"] = ("fp32", "bf16-mixed", "fp16-mixed")
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            raise CourseError(
                f"{name} is {getattr(config, name)!r} but must be one of {', '.join(map(repr, allowed))}."
            )
    least = dict.fromkeys(("max_steps", "accumulation_steps", "log_every", "keep_checkpoints"), 1)
    least |= dict.fromkeys(("learning_rate", "min_learning_rate_ratio", "warmup_steps", "weight_decay"), 0)
    least |= dict.fromkeys(("clip_norm", "checkpoint_every", "evaluate_every"), 0)
    for name, bound in least.items():
        if not getattr(config, name) >= bound:
            raise CourseError(f"{name} is {getattr(config, name)} but must be at least {bound}.")
    if not 0 < config.decay_fraction <= 1:
        raise CourseError(f"decay_fraction is {config.decay_fraction} but must be above 0 and at most 1.")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise CourseError(f"betas are {config.betas} but each must be at least 0 and below 1.")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise CourseError("The model has no parameter that requires a gradient: unfreeze some, or add an adapter.")
    if config.precision == "fp16-mixed" and any(parameter.dtype == torch.float16 for parameter in trained):
        raise CourseError("fp16-mixed keeps the trained weights in fp32: call model.float() before training.")
    if config.parallel and not (dist.is_initialized() or "RANK" in os.environ):
        raise CourseError(f"parallel={config.parallel!r} needs several processes: start the script with torchrun.")
    if config.checkpoint_dir is None:
        if resume:
            raise CourseError("resume=True needs to know from where: set checkpoint_dir in the TrainConfig.")
        if config.checkpoint_every:
            raise CourseError(f"checkpoint_every={config.checkpoint_every} needs a place: set checkpoint_dir as well.")
        return
    folder = Path(config.checkpoint_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)  # now rather than after hours
    except OSError as error:
        raise CourseError(f"checkpoint_dir {folder} cannot be made ({error.strerror}): choose another one.") from error
    if not resume and any(folder.glob("step-*")):
        raise CourseError(
            f"{folder} already holds checkpoints: pass resume=True to continue that run, "
            "or delete the folder to start anew."
        )


def _join_processes(model: nn.Module, config: TrainConfig) -> tuple[int, int, torch.device]:
    """Return this process's rank, the number of processes and the device."""
    device = next(model.parameters()).device
    if config.parallel is None:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        model.to(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size(), device


def _parallelise(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Replicate (DDP) or shard (FSDP2, in place) the weights of rank 0 over the processes."""
    if config.parallel == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if config.parallel == "fsdp2" and not isinstance(model, FSDPModule):
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for block in (block for blocks in reversed(lists) for block in blocks):  # inner ones first
            fully_shard(block, mesh=mesh)  # gathered when the forward pass comes to it, and freed after it
        fully_shard(model, mesh=mesh)
    return model


def _open_tensorboard(config: TrainConfig, start: int, rank: int) -> "SummaryWriter | None":
    if config.tensorboard_dir is None or rank > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.tensorboard_dir), purge_step=start + 1)  # hides what a killed run wrote after it


# In the loop.


def _endless(batches: Iterable[Batch], position: int) -> Iterator[Batch]:
    """Yield the batches of all epochs, beginning with number `position`."""
    if hasattr(batches, "seek"):
        batches.seek(position)
        position = 0
    number = 0
    while True:
        before = number
        for batch in batches:
            if number >= position:
                yield batch
            number += 1
        if number == before:
            raise CourseError(
                f"There are no more batches after {number}: give a list or an object that can be iterated again, "
                "not a generator, or lower max_steps."
            )


def _labels(batch: Batch) -> torch.Tensor:
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch["input_ids"]


def _count_targets(batch: Batch, shifted: bool) -> torch.Tensor:
    """Over how many items the loss of a batch is a mean: labels that count, or rows where there are none."""
    if shifted:
        return (_labels(batch)[:, 1:] != IGNORED).sum()
    if "labels" in batch:
        return (batch["labels"] != IGNORED).sum()
    return torch.tensor(len(next(iter(batch.values()))))


def _count_tokens(batch: Batch) -> int:
    return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))


def _rows_of(batch: Batch, rank: int, world_size: int) -> Batch:
    if world_size == 1:
        return batch
    rows = len(next(iter(batch.values())))
    if rows < world_size:
        raise CourseError(f"A batch has {rows} rows for {world_size} processes: give each process at least one.")
    return {name: value.tensor_split(world_size)[rank] for name, value in batch.items()}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }


def _synchronised(model: nn.Module, only_if: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients in this backward pass only if it is the last before the update."""
    if isinstance(model, DistributedDataParallel) and not only_if:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(only_if)
    return contextlib.nullcontext()


def _is_due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0


def _record(history: History, pending: list, clock: float, scaler: torch.amp.GradScaler, world_size: int) -> None:
    """Bring the numbers of the steps since `clock` from the device into the history; stop if one is not finite."""
    losses = torch.stack([loss for loss, *_ in pending])
    if world_size > 1:
        dist.all_reduce(losses)  # each process has the part of its own rows
    norms = torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for _, norm, *_ in pending])
    numbers = list(zip(losses.tolist(), norms.tolist(), pending, strict=True))  # waits until the device has them
    seconds = (time.perf_counter() - clock) / len(pending)
    for loss, norm, (*_, rate, tokens) in numbers:
        if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
            raise CourseError(
                f"Step {len(history.losses)} has loss {loss:.4g} and gradient norm {norm:.4g}: lower the learning rate "
                "or warm up longer, and see that the labels of the batch are not all -100."
            )
        history.losses.append(loss)
        history.grad_norms.append(norm)
        history.learning_rates.append(rate)
        history.tokens.append(tokens)
        history.seconds.append(seconds)
    if scaler.is_enabled() and scaler.get_scale() < 1e-3:
        raise CourseError(
            f"The gradients overflow fp16 at every scale ({history.skipped_steps} updates skipped by step "
            f"{len(history.losses)}): lower the learning rate, or use bf16-mixed or fp32."
        )


def _evaluate(evaluate: Callable, model: nn.Module, device: torch.device) -> dict[str, float]:
    model.eval()
    with preserved_random_state(device), torch.no_grad():
        result = evaluate(model)
    model.train()
    return {name: float(value) for name, value in result.items()}


def _write_tensorboard(writer: "SummaryWriter", history: History, pending: list, done: int) -> None:
    writer.add_scalar("loss", history.losses[-1], done)
    writer.add_scalar("learning_rate", history.learning_rates[-1], done)
    writer.add_scalar("grad_norm", history.grad_norms[-1], done)
    recent = len(pending)
    writer.add_scalar("tokens_per_second", sum(history.tokens[-recent:]) / sum(history.seconds[-recent:]), done)
    if history.evaluations and history.evaluations[-1]["step"] == done:
        for name, value in history.evaluations[-1].items():
            writer.add_scalar(f"evaluation/{name}", value, done)
    writer.flush()


# Checkpoints: what of a run goes into them.


def _state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained weights, the saved buffers and the optimiser's tensors under their names, sharded if the model is."""
    saved = model.state_dict().keys()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {f"model.{name}": parameter for name, parameter in trained.items()}
    tensors |= {f"model.{name}": buffer for name, buffer in model.named_buffers() if name in saved}
    for name, parameter in trained.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
            elif value is not None:
                raise CourseError(f"{type(optimizer).__name__} keeps {key!r} outside tensors: unset checkpoint_dir.")
    return tensors


def _save(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: History,
    data_random: dict[str, Any],
    config: TrainConfig,
    device: torch.device,
) -> None:
    rank = dist.get_rank() if config.parallel else 0
    tensors = _state_tensors(model, optimizer)
    tensors |= {f"random.{rank}.{name}": value for name, value in _random_to_tensors(random_state(device)).items()}
    tensors |= {f"random.data.{name}": value for name, value in _random_to_tensors(data_random).items()}
    state = {"step": step, "config": _settings(config), "scaler": scaler.state_dict(), "history": vars(history)}
    save_checkpoint(Path(config.checkpoint_dir), step, tensors, state, config.keep_checkpoints)


def _load(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    device: torch.device,
) -> tuple[int, History, dict[str, Any]]:
    """Put the run back to where it was saved: its next step, its history and the random state of its data."""
    state, stored = read_state(path), stored_tensors(path)
    may_change = MAY_CHANGE | ({"max_steps"} if config.schedule == "constant" else set())
    for name, now in _settings(config).items():
        if name not in may_change and state["config"].get(name) != now:
            raise CourseError(
                f"{path} was made with {name}={state['config'].get(name)!r} and this run has {name}={now!r}: "
                "use the same TrainConfig, or another checkpoint_dir."
            )
    if state["step"] > config.max_steps:
        raise CourseError(
            f"{path} is beyond max_steps={config.max_steps}: raise max_steps, or use another checkpoint_dir."
        )
    _check_same(path, stored, _state_tensors(model, optimizer), "model")
    _allocate_state(model, optimizer, stored)
    tensors = _state_tensors(model, optimizer)
    _check_same(path, stored, tensors, "optimizer")
    rank = dist.get_rank() if config.parallel else 0
    own = {f"random.{rank}.{name}": value for name, value in _random_to_tensors(random_state(device)).items()}
    own = {name: value for name, value in own.items() if name in stored}
    data = {f"random.data.{name}": value for name, value in _random_to_tensors(random_state()).items()}
    load_tensors(path, tensors | own | data)
    scaler.load_state_dict(state["scaler"])
    if own:
        set_random_state(_random_from_tensors(own), device)
    else:  # saved by fewer processes: dropout goes on with numbers that no process has used
        seed_everything(config.seed + 1 + rank + 1_000_003 * state["step"])
    return state["step"], History(**state["history"]), _random_from_tensors(data)


def _settings(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(config), default=str))


def _check_same(
    path: Path, stored: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: dict[str, torch.Tensor], part: str
) -> None:
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | stored.keys()):
        if name.startswith(f"{part}.") and expected.get(name) != stored.get(name):
            there, here = (
                f"{found[1]} {list(found[0])}" if (found := where.get(name)) else "absent"
                for where in (stored, expected)
            )
            raise CourseError(
                f"{path} is of another {part}: {name} is {there} in it and {here} in this run; "
                f"use the {part} of that run, or another checkpoint_dir."
            )


def _allocate_state(model: nn.Module, optimizer: torch.optim.Optimizer, stored: Iterable[str]) -> None:
    """Make the optimiser create the tensors that are stored, which it does in its first step: one of zero length."""
    stepped = {name.rpartition(".")[0] for name in stored}  # not those that never got a gradient
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for name, parameter in model.named_parameters():
        if f"optimizer.{name}" in stepped:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
