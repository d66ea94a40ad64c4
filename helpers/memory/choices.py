"""The choices that the estimates know, and one sentence for everything else."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from helpers.errors import CourseError

PRECISIONS = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16-mixed": 4, "fp16-mixed": 4}  # bytes of a weight
METHODS = ("full", "lora", "qlora", "frozen")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor")
ATTENTION = ("sdpa", "eager")
QUANTISATIONS = ("nf4", "int4", "int8")
CACHE_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8.5, "int4": 4.5}  # int: 16-bit scale, zero per 64


def _nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that looks most like the word; a common beginning counts more than letters elsewhere."""
    import difflib

    def likeness(choice: str) -> float:
        first, second = str(word).lower(), str(choice).lower()
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
        return difflib.SequenceMatcher(None, first, second).ratio() + 0.1 * same

    return max(choices, key=likeness)


def choose(field_name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise CourseError if the value is not among the choices."""
    if value not in (choices := list(choices)):
        raise CourseError(
            f"{field_name} is {value!r}, which is not known here: the nearest choice is {_nearest(value, choices)!r}, "
            f"of {', '.join(map(str, choices))}."
        )


def positive(**values: Any) -> None:
    """Raise CourseError for the first value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CourseError(f"{name} is {value!r} and has to be a whole number of at least 1: try {name}=1.")


@dataclass(frozen=True)
class Settings:
    """How the model is run."""

    batch_size: int
    seq_len: int
    method: str = "full"
    optimizer: str = "adamw"
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    lora_rank: int = 16
    lora_targets: str | tuple[str, ...] = "all-linear"
    zero_stage: int = 0
    num_gpus: int = 1
    padded: bool = True
    device: str = "cuda"
    loss_chunks: int = 1
    weights: str | None = None

    @property
    def autocast(self) -> bool:
        """Whether matrix products run in 16 bit over fp32 weights."""
        return self.precision.endswith("-mixed")

    @property
    def quantisation(self) -> str | None:
        """How linear weights are stored."""
        return "nf4" if self.method == "qlora" else self.weights

    @property
    def gradient_shards(self) -> int:
        """Over how many GPUs the gradients are divided."""
        return self.num_gpus if self.zero_stage >= 2 else 1

    @property
    def tokens(self) -> int:
        """Tokens in a batch."""
        return self.batch_size * self.seq_len
