"""The state of all random number generators of a process: kept, set and swapped."""

import contextlib
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


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


def random_to_tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A random state as tensors, as a checkpoint holds it."""
    _, python, gauss = state["python"]
    _, keys, position, has_gauss, cached = state["numpy"]
    tensors = {name: state[name] for name in ("torch", "cuda") if name in state}
    tensors["python"] = torch.tensor(python)
    tensors["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss])
    tensors["gauss"] = torch.tensor([math.nan if gauss is None else gauss, cached], dtype=torch.float64)
    return tensors


def random_from_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The random state that `random_to_tensors` wrote."""
    tensors = {name.rpartition(".")[2]: value for name, value in tensors.items()}
    gauss, cached = tensors["gauss"].tolist()
    *keys, position, has_gauss = tensors["numpy"].tolist()
    state = {name: tensors[name] for name in ("torch", "cuda") if name in tensors}
    state["python"] = (3, tuple(tensors["python"].tolist()), None if math.isnan(gauss) else gauss)
    state["numpy"] = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    return state
