"""What a run is told: its length, schedule, precision, and where it saves."""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from helpers.errors import CourseError


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


def check_arguments(model: nn.Module, config: TrainConfig, resume: bool) -> None:
    """CourseError in a sentence for settings that cannot be meant; nothing has been done then."""
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


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """The settings as a checkpoint keeps them."""
    return json.loads(json.dumps(asdict(config), default=str))


def check_same(
    path: Path, stored: dict[str, tuple[tuple[int, ...], torch.dtype]], tensors: dict[str, torch.Tensor], part: str
) -> None:
    """CourseError if a checkpoint holds other tensors than this run."""
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
