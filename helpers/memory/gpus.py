"""GPUs and their memory, from data/gpus.json."""

import json
from dataclasses import dataclass

from helpers.memory.choices import choose
from helpers.profiles import ROOT

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """A device. Matrix rates are dense, in TFLOP/s (int8: TOP/s), and None where the device has no such units."""

    name: str
    memory: int  # bytes that CUDA offers a process where that is known, otherwise those of the board
    board: int  # bytes of the board, as the driver reports them
    bandwidth: float  # GB/s
    tflops: dict[str, float | None]  # "fp32", "fp16", "bf16", "int8", "fp8", "fp4"
    power: int  # watts
    compute_capability: tuple[int, int] | None
    year: int
    source: str


def _load_gpus() -> dict[str, GPU]:
    rows = json.loads((ROOT / "data" / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    gpus = {}
    for name, row in rows.items():
        capability = tuple(row.pop("compute_capability") or ()) or None
        board, offered = row.pop("memory_mib") * 2**20, row.pop("cuda_gib")
        memory = int(offered * GIB) if offered else board
        gpus[name] = GPU(name=name, memory=memory, board=board, compute_capability=capability, **row)
    return gpus


class _GPUs(dict):
    """Devices by name."""

    def __missing__(self, name: str) -> GPU:
        """Name the nearest device."""
        choose("gpu", name, self)
        raise AssertionError  # not reached: a missing name is not among the choices


GPUS: dict[str, GPU] = _GPUs(_load_gpus())
CONTEXT = GIB // 2  # CUDA context and the libraries' kernels: 0.3 to 0.6 GiB, by GPU and version
FRAGMENTATION = 0.04  # of the total, held by the caching allocator in pieces that nothing fits; 2 to 10 % is usual
