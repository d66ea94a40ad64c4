"""Will it fit? The peak of a training step, or of generation."""

import html
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from helpers.errors import CourseError
from helpers.memory.choices import (
    ATTENTION,
    CACHE_BITS,
    METHODS,
    OPTIMIZERS,
    PRECISIONS,
    QUANTISATIONS,
    Settings,
    choose,
    positive,
)
from helpers.memory.gpus import CONTEXT, FRAGMENTATION, GIB, GPU, GPUS
from helpers.memory.optimizers import ADAFACTOR_COPIES, optimizer_state
from helpers.memory.shape import ModelShape
from helpers.memory.tensors import INFERENCE_PARTS, PARTS, Memory, Storage
from helpers.memory.transformer import Model


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU at the peak of a step, by part; `phases` has the parts at the peak of each phase."""

    shape: ModelShape
    settings: dict[str, Any]
    phase: str  # in which the peak falls
    phases: dict[str, dict[str, int]]
    host: int = 0  # paged optimiser states: in main memory, on the GPU only while they are used

    def __getattr__(self, name: str) -> int:
        """A part at the peak, such as `estimate.activations`."""
        if name not in (*PARTS, *INFERENCE_PARTS) or name not in self.parts:
            raise AttributeError(name)
        return self.parts[name]

    @property
    def parts(self) -> dict[str, int]:
        """The parts at the peak."""
        return self.phases[self.phase]

    @property
    def total(self) -> int:
        """What torch.cuda.max_memory_allocated would say."""
        return sum(self.parts.values())

    @property
    def overhead(self) -> int:
        """What the device holds besides: CUDA context and fragmentation. A rule of thumb, not part of `total`."""
        return CONTEXT + int(FRAGMENTATION * self.total)

    def fits(self, gpu: GPU | str) -> bool:
        """Whether total and overhead are within the GPU's memory."""
        return self.total + self.overhead <= (GPUS[gpu] if isinstance(gpu, str) else gpu).memory

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON would have it."""
        return {
            "model": self.shape.name,
            "num_parameters": self.shape.num_parameters,
            "settings": self.settings,
            "unit": "bytes",
            "phase": self.phase,
            "parts": self.parts,
            "total": self.total,
            "overhead": self.overhead,
            "host": self.host,
            "phases": self.phases,
        }

    def __str__(self) -> str:
        """The parts in GiB, one a line."""
        lines = [f"{self.shape.name}: {self.shape.num_parameters / 1e9:.2f} B parameters; peak in {self.phase}"]
        rows = [*self.parts.items(), ("total", self.total), ("context and fragmentation", self.overhead)]
        lines += [f"  {name:<26}{size / GIB:>9.2f} GiB" for name, size in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A stacked bar with its numbers."""
        colours = dict(zip(self.parts, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"), strict=False))
        whole = max(1, self.total)
        bar = "".join(
            f'<span style="display:inline-block;height:1.4em;background:{colours[name]};'
            f'width:{100 * size / whole:.2f}%" title="{name} {size / GIB:.2f} GiB"></span>'
            for name, size in self.parts.items()
        )
        key = " &nbsp; ".join(
            f'<span style="color:{colours[name]}">&#9632;</span> {name} {size / GIB:.2f}'
            for name, size in self.parts.items()
        )
        title = f"{html.escape(self.shape.name)}: {self.total / GIB:.2f} GiB at the peak ({self.phase})"
        after = f"{title}; context and fragmentation about {self.overhead / GIB:.2f} GiB more"
        return f'<div role="img" aria-label="{title}"><b>{after}</b><div>{bar}</div><div>{key} (GiB)</div></div>'


def estimate_training(
    shape: ModelShape | str,
    *,
    method: str = "full",
    optimizer: str = "adamw",
    precision: str = "bf16",
    batch_size: int = 1,
    seq_len: int = 1024,
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    lora_rank: int = 16,
    lora_targets: str | Iterable[str] = "all-linear",
    zero_stage: int = 0,
    num_gpus: int = 1,
    padded: bool = True,
    device: str = "cuda",
    loss_chunks: int = 1,
) -> Estimate:
    """Peak of a training step after the first: `model(input_ids=ids, labels=ids).loss.backward()`, update, zero_grad.

    method: "full"; "lora" and "qlora" as peft does them (adapters in fp32; 4-bit weights, the rest in `precision`);
    "frozen" is the forward pass of a model that is not trained, such as a reference model.
    batch_size is that of one GPU. `padded`: the batch has padding (or packed documents), for which transformers builds
    a mask; without it SDPA needs none. `device`: "cpu" has no fused attention with dropout. `loss_chunks`: the logits
    are computed in so many pieces, each with its gradient at once (as Liger's fused cross-entropy does).
    zero_stage: 1 divides the optimiser's state among the GPUs, 2 also gradients, 3 also parameters, of which the layer
    in use and the next one, and everything outside the layers, are whole (as in FSDP; Rajbhandari et al. 2020).
    Raises CourseError that names the argument and the nearest valid choice.
    """
    shape = ModelShape.from_config(shape)
    choose("method", method, METHODS)
    choose("optimizer", optimizer, OPTIMIZERS)
    choose("precision", precision, PRECISIONS)
    choose("attention", attention, ATTENTION)
    choose("zero_stage", zero_stage, (0, 1, 2, 3))
    choose("device", device, ("cuda", "cpu"))
    positive(batch_size=batch_size, seq_len=seq_len, lora_rank=lora_rank, num_gpus=num_gpus, loss_chunks=loss_chunks)
    if zero_stage and num_gpus == 1:
        raise CourseError(
            f"zero_stage is {zero_stage} with num_gpus 1, and there is nothing to divide: use num_gpus=2."
        )
    if shape.family == "gpt2" and seq_len > shape.max_positions:
        raise CourseError(
            f"seq_len is {seq_len}, and {shape.name} has only {shape.max_positions} positions: use at most that."
        )
    if lora_targets != "all-linear":
        names = sorted({name for name, _ in shape.linear_weights()})
        lora_targets = tuple(lora_targets) if isinstance(lora_targets, list | tuple | set) else (lora_targets,)
        for name in lora_targets or [None]:
            choose("lora_targets", name, names)
    settings = Settings(
        batch_size,
        seq_len,
        method,
        optimizer,
        precision,
        gradient_checkpointing,
        attention,
        lora_rank,
        lora_targets,
        zero_stage,
        num_gpus,
        padded,
        device,
        loss_chunks,
    )
    return _step(shape, settings)


@lru_cache(maxsize=256)
def _step(shape: ModelShape, settings: Settings) -> Estimate:
    """Perform the step on sizes."""
    memory = Memory(settings)
    model = Model(shape, memory)
    gathered = None
    if settings.zero_stage == 3:
        layer = max(sum(w.elements * w.width for w in weights.values()) for weights in model.layers)
        outside = sum(w.elements * w.width for w in model.outer.values())
        gathered = Storage(memory, int(2 * layer + outside), "parameters")
    adapters = settings.method in ("lora", "qlora")
    width = 4 if adapters else PRECISIONS[settings.precision]
    kept, paged = optimizer_state(settings.optimizer, model.trained, width)
    shards = settings.num_gpus if settings.zero_stage >= 1 else 1
    state = Storage(memory, -(-kept // shards), "optimizer")
    memory.peaks.clear()
    memory.enter("forward")
    loss = model.loss()
    memory.cast_weights.clear()
    memory.part = "activations"
    if memory.tape is not None:
        memory.enter("backward")
        memory.backward(memory.tape, {loss.source: memory.new(1, 4)})
        del gathered
        memory.enter("optimizer")
        if settings.optimizer == "adafactor":
            largest = max(math.prod(size) for size in model.trained)
            scratch = Storage(memory, ADAFACTOR_COPIES * largest * width // shards, "optimizer")
            del scratch
    del state, loss
    phase = max(memory.peaks, key=lambda name: sum(memory.peaks[name].values()))
    phases = {name: {part: peak[part] for part in PARTS} for name, peak in memory.peaks.items()}
    return Estimate(shape, asdict(settings), phase, phases, -(-paged // shards))


def estimate_inference(
    shape: ModelShape | str,
    *,
    precision: str = "fp16",
    batch_size: int = 1,
    context_len: int = 2048,
    quantization: str | None = None,
    cache_precision: str | None = None,
    attention: str = "sdpa",
) -> Estimate:
    """Peak of generation by transformers: the prompt in one pass ("prefill"), then token by token ("decode").

    `context_len` counts prompt and answer together, and the prompt may be all of it. `quantization` of the linear
    weights: "nf4", "int4" (GPTQ, AWQ) or "int8"; `cache_precision`: "fp8", "int8", "int4", or as `precision`.
    `kv_cache` is 2 x layers x KV heads x head_dim x tokens x batch, where a sliding layer keeps only its window.
    Raises CourseError that names the argument and the nearest valid choice.
    """
    shape = ModelShape.from_config(shape)
    cache_precision = cache_precision or precision
    choose("precision", precision, ("fp32", "fp16", "bf16"))
    choose("cache_precision", cache_precision, CACHE_BITS)
    choose("attention", attention, ATTENTION)
    if quantization is not None:
        choose("quantization", quantization, QUANTISATIONS)
    positive(batch_size=batch_size, context_len=context_len)
    if shape.family == "gpt2" and context_len > shape.max_positions:
        raise CourseError(f"context_len is {context_len}: {shape.name} has {shape.max_positions} positions, use these.")
    return _generation(shape, precision, batch_size, context_len, quantization, cache_precision, attention)


@lru_cache(maxsize=256)
def _generation(
    shape: ModelShape,
    precision: str,
    batch_size: int,
    context_len: int,
    quantization: str | None,
    cache_precision: str,
    attention: str,
) -> Estimate:
    """Perform prefill and one decoding step on sizes."""
    row = 2 * shape.num_kv_heads * shape.head_dim * batch_size * CACHE_BITS[cache_precision] / 8  # of one layer
    sliding = shape.num_sliding_layers * min(context_len, shape.sliding_window or context_len)
    cache = math.ceil(row * ((shape.num_layers - shape.num_sliding_layers) * context_len + sliding))
    phases = {}
    for phase, seq_len in (("prefill", context_len), ("decode", 1)):
        settings = Settings(
            batch_size,
            seq_len,
            "frozen",
            precision=precision,
            attention=attention,
            padded=False,
            weights=quantization,
        )
        memory = Memory(settings)
        model = Model(shape, memory)
        kept = Storage(memory, cache, "kv_cache")
        memory.peaks.clear()
        memory.enter(phase)
        if phase == "decode":  # a new token is joined to the keys of a layer by copying them
            Storage(memory, int(row / 2 * context_len), "activations")
        x = model.hidden_states()
        memory.part = "logits"
        logits = memory.new(batch_size * shape.vocab_size, x.width)  # generate() asks for the last position only
        memory.cast(logits, 4)
        phases[phase] = {name: memory.peaks[phase][name] for name in INFERENCE_PARTS}
        del kept, x, logits
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    chosen = {
        "precision": precision,
        "batch_size": batch_size,
        "context_len": context_len,
        "quantization": quantization,
        "cache_precision": cache_precision,
        "attention": attention,
    }
    return Estimate(shape, chosen, phase, phases)
