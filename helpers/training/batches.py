"""Batches on their way into a step: endless, divided over processes, moved to the device, counted."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from helpers.errors import CourseError

Batch = dict[str, Any]
IGNORED = -100  # a label that takes no part in the loss, as in transformers


def endless(batches: Iterable[Batch], position: int) -> Iterator[Batch]:
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


def labels_of(batch: Batch) -> torch.Tensor:
    """Labels of a batch: its own, or the inputs, with padding ignored."""
    if "labels" in batch:
        return batch["labels"]
    if "attention_mask" in batch:
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    return batch["input_ids"]


def count_targets(batch: Batch, shifted: bool) -> torch.Tensor:
    """Over how many items the loss of a batch is a mean: labels that count, or rows where there are none."""
    if shifted:
        return (labels_of(batch)[:, 1:] != IGNORED).sum()
    if "labels" in batch:
        return (batch["labels"] != IGNORED).sum()
    return torch.tensor(len(next(iter(batch.values()))))


def count_tokens(batch: Batch) -> int:
    """Tokens in a batch, padding included."""
    return sum(value.numel() for name, value in batch.items() if name.endswith("input_ids"))


def rows_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of a batch that belong to the process `rank` of `world_size`."""
    if world_size == 1:
        return batch
    rows = len(next(iter(batch.values())))
    if rows < world_size:
        raise CourseError(f"A batch has {rows} rows for {world_size} processes: give each process at least one.")
    return {name: value.tensor_split(world_size)[rank] for name, value in batch.items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
