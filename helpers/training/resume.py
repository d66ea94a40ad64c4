"""A run saved and continued: weights, optimiser, random states and position in the data."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from helpers.errors import CourseError
from helpers.training.checkpoints import load_tensors, read_state, save_checkpoint, stored_tensors
from helpers.training.config import MAY_CHANGE, TrainConfig, check_same, settings_of
from helpers.training.history import History
from helpers.training.random_state import (
    random_from_tensors,
    random_state,
    random_to_tensors,
    seed_everything,
    set_random_state,
)


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


def save(
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: History,
    data_random: dict[str, Any],
    config: TrainConfig,
    device: torch.device,
) -> None:
    """Save a checkpoint of the run after `step` steps."""
    rank = dist.get_rank() if config.parallel else 0
    tensors = _state_tensors(model, optimizer)
    tensors |= {f"random.{rank}.{name}": value for name, value in random_to_tensors(random_state(device)).items()}
    tensors |= {f"random.data.{name}": value for name, value in random_to_tensors(data_random).items()}
    state = {"step": step, "config": settings_of(config), "scaler": scaler.state_dict(), "history": vars(history)}
    save_checkpoint(Path(config.checkpoint_dir), step, tensors, state, config.keep_checkpoints)


def load(
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
    for name, now in settings_of(config).items():
        if name not in may_change and state["config"].get(name) != now:
            raise CourseError(
                f"{path} was made with {name}={state['config'].get(name)!r} and this run has {name}={now!r}: "
                "use the same TrainConfig, or another checkpoint_dir."
            )
    if state["step"] > config.max_steps:
        raise CourseError(
            f"{path} is beyond max_steps={config.max_steps}: raise max_steps, or use another checkpoint_dir."
        )
    check_same(path, stored, _state_tensors(model, optimizer), "model")
    _allocate_state(model, optimizer, stored)
    tensors = _state_tensors(model, optimizer)
    check_same(path, stored, tensors, "optimizer")
    rank = dist.get_rank() if config.parallel else 0
    own = {f"random.{rank}.{name}": value for name, value in random_to_tensors(random_state(device)).items()}
    own = {name: value for name, value in own.items() if name in stored}
    data = {f"random.data.{name}": value for name, value in random_to_tensors(random_state()).items()}
    load_tensors(path, tensors | own | data)
    scaler.load_state_dict(state["scaler"])
    if own:
        set_random_state(random_from_tensors(own), device)
    else:  # saved by fewer processes: dropout goes on with numbers that no process has used
        seed_everything(config.seed + 1 + rank + 1_000_003 * state["step"])
    return state["step"], History(**state["history"]), random_from_tensors(data)


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
