"""What a run measured, step by step."""

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from helpers.errors import CourseError
from helpers.training.config import TrainConfig

if TYPE_CHECKING:
    import matplotlib.figure
    import pandas
    from torch.utils.tensorboard import SummaryWriter


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


def open_tensorboard(config: TrainConfig, start: int, rank: int) -> "SummaryWriter | None":
    """A writer on the first process if one is wanted."""
    if config.tensorboard_dir is None or rank > 0:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(config.tensorboard_dir), purge_step=start + 1)  # hides what a killed run wrote after it


def record(history: History, pending: list, clock: float, scaler: torch.amp.GradScaler, world_size: int) -> None:
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


def write_tensorboard(writer: "SummaryWriter", history: History, pending: list, done: int) -> None:
    """Write what the last step and its evaluation measured."""
    writer.add_scalar("loss", history.losses[-1], done)
    writer.add_scalar("learning_rate", history.learning_rates[-1], done)
    writer.add_scalar("grad_norm", history.grad_norms[-1], done)
    recent = len(pending)
    writer.add_scalar("tokens_per_second", sum(history.tokens[-recent:]) / sum(history.seconds[-recent:]), done)
    if history.evaluations and history.evaluations[-1]["step"] == done:
        for name, value in history.evaluations[-1].items():
            writer.add_scalar(f"evaluation/{name}", value, done)
    writer.flush()
