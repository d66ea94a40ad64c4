"""What would make it fit?"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from helpers.memory.estimate import Estimate, estimate_inference, estimate_training
from helpers.memory.gpus import GIB, GPU, GPUS
from helpers.memory.shape import ModelShape


@dataclass(frozen=True)
class Change:
    """A change of settings that saves memory, what it costs, and the estimate once it is made."""

    settings: dict[str, Any]
    price: str
    estimate: Estimate


@dataclass(frozen=True)
class Recommendation:
    """The changes in the order in which to make them; `fits` says whether they are enough."""

    gpu: GPU
    start: Estimate
    changes: tuple[Change, ...]

    @property
    def estimate(self) -> Estimate:
        """After all changes."""
        return self.changes[-1].estimate if self.changes else self.start

    @property
    def fits(self) -> bool:
        """Whether the last estimate is within the GPU's memory."""
        return self.estimate.fits(self.gpu)

    def __str__(self) -> str:
        """The changes with their prices, one a line."""
        need = f"{(self.start.total + self.start.overhead) / GIB:.1f} GiB of {self.gpu.memory / GIB:.1f} GiB"
        lines = [f"{self.start.shape.name} on {self.gpu.name}: as asked, {need}."]
        for number, change in enumerate(self.changes, 1):
            what = ", ".join(f"{name}={value}" for name, value in change.settings.items())
            size = (change.estimate.total + change.estimate.overhead) / GIB
            lines.append(f"{number}. {what}: {size:.1f} GiB. Price: {change.price}.")
        lines.append("It fits." if self.fits else "It does not fit: take a larger GPU or a smaller model.")
        return "\n".join(lines)


def recommend(shape: ModelShape | str, gpu: GPU | str, **settings: Any) -> Recommendation:
    """The cheapest changes that make training fit, in order, each with its price.

    `settings` are those of `estimate_training`. The cheapest change that lowers the peak is made until
    it fits; those that turn out not to be needed are left out again, the dearest first.
    """
    gpu = GPUS[gpu] if isinstance(gpu, str) else gpu
    shape = ModelShape.from_config(shape)
    start = estimate_training(shape, **settings)
    batch = start.settings["batch_size"]
    ladder: list[tuple[dict[str, Any], str]] = [
        ({"loss_chunks": 8}, "none in the result; needs a fused or chunked loss"),
        ({"gradient_checkpointing": True}, "a third more computing, since each layer runs forward twice"),
        ({"batch_size": 1}, f"accumulate gradients over {batch} batches; less parallel work at a time"),
        ({"optimizer": "adamw_8bit"}, "moments rounded to 8 bit"),
        ({"method": "lora"}, "only low-rank changes are learned"),
        ({"method": "qlora"}, "base weights rounded to 4 bit, and slower for it"),
        ({"optimizer": "paged_adamw_8bit"}, "moments move over the bus at each update"),
    ]
    for num_gpus in (2, 4, 8, 16, 64):
        ladder.append(({"zero_stage": 3, "num_gpus": num_gpus}, f"{num_gpus} GPUs, and weights sent at each layer"))
    chosen: list[tuple[dict[str, Any], str]] = []
    current, helps = start, True
    while helps and not current.fits(gpu):
        helps = False
        for step in ladder:  # from the cheapest again, since another phase may now have the peak
            if current.settings["method"] == "qlora" and step[0].get("method") == "lora":
                continue
            tried = estimate_training(shape, **_merged(settings, [*chosen, step]))
            if tried.total < current.total:
                chosen = [other for other in chosen if not set(other[0]) <= set(step[0])] + [step]
                current, helps = tried, True
                break
    if current.fits(gpu):
        for step in sorted(chosen, key=ladder.index, reverse=True):
            rest = [other for other in chosen if other is not step]
            if estimate_training(shape, **_merged(settings, rest)).fits(gpu):
                chosen = rest
    changes = []
    for count, (change, price) in enumerate(chosen, 1):
        changes.append(Change(change, price, estimate_training(shape, **_merged(settings, chosen[:count]))))
    return Recommendation(gpu, start, tuple(changes))


def _merged(settings: dict[str, Any], changes: Iterable[tuple[dict[str, Any], str]]) -> dict[str, Any]:
    merged = dict(settings)
    for change, _ in changes:
        merged |= change
    return merged


def max_batch_size(shape: ModelShape | str, gpu: GPU | str, *, inference: bool = False, **settings: Any) -> int:
    """Largest batch size that fits, 0 if none does; `settings` of estimate_training or estimate_inference."""
    return _largest(shape, gpu, inference, "batch_size", settings)


def max_context(shape: ModelShape | str, gpu: GPU | str, *, inference: bool = False, **settings: Any) -> int:
    """Longest sequence (training) or context (inference) that fits, 0 if none does; the model's own limit is kept."""
    return _largest(shape, gpu, inference, "context_len" if inference else "seq_len", settings)


def _largest(shape: ModelShape | str, gpu: GPU | str, inference: bool, name: str, settings: dict[str, Any]) -> int:
    shape, gpu = ModelShape.from_config(shape), GPUS[gpu] if isinstance(gpu, str) else gpu
    estimate = estimate_inference if inference else estimate_training
    limit = shape.max_positions if name != "batch_size" and shape.max_positions else 2**20

    def fits(value: int) -> bool:
        return estimate(shape, **(settings | {name: value})).fits(gpu)

    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
