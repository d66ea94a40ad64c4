"""Checkpoints that survive a kill at any instant: named tensors and a JSON state in one folder per step.

A checkpoint is written into a hidden folder beside its place, flushed to the disk and then renamed, so that
`step-00000100` is either there in full or not at all. Its last file is `manifest.json`, which holds the size and the
SHA-256 of every other file; a folder that does not agree with its manifest is damaged. Tensors are stored as
safetensors: one file from a single process, and one shard per process, through `torch.distributed.checkpoint`, when
several train together. Both are read back on any number of processes. Nothing is pickled on the disk.

This module knows files and processes, not training: what the tensors and the state mean is the caller's affair.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from helpers.errors import CourseError
from helpers.files import sha256

Result = TypeVar("Result")
MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors.safetensors"


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write the checkpoint of `step` into `folder` and remove all but the newest `keep` of the run.

    With a process group every process calls this with its own shards; `folder` must then be visible to all of them.
    Needs room for one checkpoint more than it keeps. A failure to write raises `CourseError`, leaves no half-written
    folder and does not touch the earlier checkpoints.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    path = folder / f"step-{step:08d}"
    partial = folder / f".partial-{path.name}"
    try:
        on_first_process(lambda: _make_empty(partial))
        _write_tensors(partial, tensors)
        on_first_process(lambda: _complete(partial, path, state))
    except (OSError, SafetensorError, CheckpointException) as error:
        on_first_process(lambda: shutil.rmtree(partial, ignore_errors=True))
        causes = [str(cause[0]) for cause in getattr(error, "failures", {}).values()] or [str(error)]
        raise CourseError(
            f"The checkpoint {path} could not be written ({causes[0]}): free some space or choose another "
            "checkpoint_dir, then resume; the earlier checkpoints are intact."
        ) from error
    on_first_process(lambda: _remove_others(folder, path, keep))
    return path


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder` that agrees with its manifest, or None if there is none at all.

    Damaged ones are named in a warning and passed over; `CourseError` if every one is damaged.
    """

    def search() -> Path | None:
        damaged = []
        for path in sorted(folder.glob("step-*"), reverse=True):
            damage = find_damage(path)
            if damage is None:
                if damaged:
                    warnings.warn(f"Damaged checkpoint {'; '.join(damaged)}: using {path}.", stacklevel=4)
                return path
            damaged.append(f"{path} ({damage})")
        if damaged:
            raise CourseError(
                f"No usable checkpoint is left, damaged: {'; '.join(damaged)}; delete {folder} to start anew."
            )
        return None

    return on_first_process(search)


def find_damage(path: Path) -> str | None:
    """Compare a checkpoint with its manifest: what is wrong with it, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        if STATE not in files:
            return f"{MANIFEST} does not list {STATE}"
        for name, expected in files.items():
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has {(path / name).stat().st_size} bytes, expected {expected['bytes']}"
            if sha256(path / name) != expected["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return f"{MANIFEST} cannot be read"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint."""
    return json.loads((path / STATE).read_text())


def stored_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the full shape and the dtype of every tensor of a checkpoint under its name, however it was sharded."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    stored = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    return {name: (tuple(tensor.size), tensor.properties.dtype) for name, tensor in stored.items()}


def load_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill `tensors` in place from a checkpoint; each may be whole, or a shard of a `DTensor`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with warnings.catch_warnings():  # it says that a single process reads: that is what we asked for
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not dist.is_initialized())


def on_first_process(action: Callable[[], Result]) -> Result:
    """Run `action` in the process of rank 0; all processes get its result, or raise its error."""
    if not dist.is_initialized():
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:  # the others wait for an answer, whatever it is
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_tensors(partial: Path, tensors: dict[str, torch.Tensor]) -> None:
    if not dist.is_initialized():
        from safetensors.torch import save_file

        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
        return
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    # The default storage of torch.distributed.checkpoint pickles its metadata; this one writes safetensors only.
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True))


def _complete(partial: Path, path: Path, state: dict[str, Any]) -> None:
    (partial / STATE).write_text(json.dumps(state))
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
    for written in (*partial.iterdir(), partial):
        _flush_to_disk(written)
    if path.exists():  # a damaged one: a run only reaches a step again after passing over its checkpoint
        shutil.rmtree(path)
    partial.rename(path)
    _flush_to_disk(path.parent)


def _remove_others(folder: Path, newest: Path, keep: int) -> None:
    """Remove the oldest checkpoints, those of later steps that a resumed run left behind, and half-written folders."""
    kept = sorted(path for path in folder.glob("step-*") if path.name <= newest.name)[-keep:]
    for path in folder.glob("step-*"):
        if path not in kept:  # renamed first, so that a kill in the middle leaves nothing that looks damaged
            path.rename(path.with_name(f".partial-{path.name}"))
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
