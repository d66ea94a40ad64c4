"""GPU memory of a decoder-only model: will it fit, and what would make it fit? `python -m helpers.memory --help`.

    shape = ModelShape.from_config("Qwen/Qwen2.5-7B")
    estimate = estimate_training(shape, method="qlora", optimizer="paged_adamw_8bit", batch_size=4, seq_len=2048)
    estimate.total, estimate.activations, estimate.fits(GPUS["T4"])      # bytes, bytes, bool

How it counts: `helpers.memory.step` performs the training step of transformers on sizes instead of tensors. The peak
over the step is the answer, and its parts are those at that moment. Nothing is fitted: each allocation stands for one
of torch's, and `tests/test_memory.py` compares with real steps of the real models. No torch is needed. What is not
known: kernels' workspaces, the CUDA context and fragmentation, of which `Estimate.overhead` is a rule of thumb.
Bytes everywhere; printed in GiB (2**30 bytes).
"""

import argparse
import html
import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from helpers.errors import CourseError, exit_cleanly
from helpers.memory.step import (
    INFERENCE_PARTS,
    PARTS,
    PRECISIONS,
    Memory,
    Model,
    Settings,
    Storage,
    is_linear,
)
from helpers.profiles import ROOT

GIB = 2**30
METHODS = ("full", "lora", "qlora", "frozen")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor")
ATTENTION = ("sdpa", "eager")
QUANTISATIONS = ("nf4", "int4", "int8")
CACHE_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8.5, "int4": 4.5}  # int: 16-bit scale, zero per 64


# The model


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide about memory, named as transformers names them."""

    name: str
    family: str  # "llama", "gemma", "phi3", "gpt2" or "gpt_neox": whose modeling_*.py it runs
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert, where there are experts
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied_embeddings: bool = False
    max_positions: int = 0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # Qwen3 normalises queries and keys
    num_experts: int = 0
    experts_per_token: int = 0
    dense_layers: tuple[int, ...] = ()  # layers of a mixture that have no experts
    dense_intermediate_size: int = 0
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    activation: str = "silu"
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    parallel_residual: bool = False
    rotary_fraction: float = 1.0

    @classmethod
    def from_config(cls, source: Any) -> "ModelShape":
        """Read a PretrainedConfig, its dict, a name in data/model_shapes.json, a local folder, or a hub id.

        Raises CourseError that names the field and the nearest valid choice.
        """
        if isinstance(source, ModelShape):
            return source
        if isinstance(source, dict):
            return _parse(source, source.get("_name_or_path") or source.get("model_type", "model"))
        if hasattr(source, "to_dict"):
            return _parse(source.to_dict(), source.name_or_path or source.model_type)
        return _parse(_find_config(str(source)), str(source))

    def layer_weights(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of a layer."""
        h, q, kv = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        weights: dict[str, tuple[int, ...]] = {"input_norm": (h,), "post_norm": (h,)}
        if self.family in ("gpt2", "gpt_neox"):
            weights |= {"input_norm.bias": (h,), "post_norm.bias": (h,)}
        if self.family in ("gpt2", "gpt_neox", "phi3"):
            weights["qkv_proj"] = (q + 2 * kv, h)
            if self.qkv_bias:
                weights["qkv_proj.bias"] = (q + 2 * kv,)
        else:
            weights |= {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h)}
            if self.qkv_bias:
                weights |= {"q_proj.bias": (q,), "k_proj.bias": (kv,), "v_proj.bias": (kv,)}
        weights["o_proj"] = (h, q)
        if self.output_bias:
            weights["o_proj.bias"] = (h,)
        if self.qk_norm:
            weights |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        if self.has_experts(layer):
            i, experts = self.intermediate_size, self.num_experts
            return weights | {
                "router": (experts, h),
                "experts_up": (experts, 2 * i, h),
                "experts_down": (experts, h, i),
            }
        i = self.dense_intermediate_size if self.num_experts else self.intermediate_size
        names = {"up_proj": (i, h), "down_proj": (h, i)}
        if self.family == "phi3":
            names = {"gate_up_proj": (2 * i, h), "down_proj": (h, i)}
        elif self.family in ("llama", "gemma"):
            names = {"gate_proj": (i, h)} | names
        if self.mlp_bias:
            names |= {f"{name}.bias": (shape[0],) for name, shape in names.items()}
        return weights | names

    def outer_weights(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter outside the layers; a tied output head is no parameter of its own."""
        weights: dict[str, tuple[int, ...]] = {"embed_tokens": (self.vocab_size, self.hidden_size)}
        weights["norm"] = (self.hidden_size,)
        if self.family in ("gpt2", "gpt_neox"):
            weights["norm.bias"] = (self.hidden_size,)
        if self.family == "gpt2":
            weights["positions"] = (self.max_positions, self.hidden_size)
        if not self.tied_embeddings:
            weights["lm_head"] = (self.vocab_size, self.hidden_size)
        return weights

    def has_experts(self, layer: int) -> bool:
        """Whether the feed-forward of this layer is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @property
    def num_parameters(self) -> int:
        """Exactly what `model.num_parameters()` says in transformers."""
        layers = sum(math.prod(s) for i in range(self.num_layers) for s in self.layer_weights(i).values())
        return layers + sum(math.prod(s) for s in self.outer_weights().values())

    def linear_weights(self) -> Iterable[tuple[str, tuple[int, ...]]]:
        """The matrices that LoRA may adapt and bitsandbytes quantises: every nn.Linear of the layers."""
        for layer in range(self.num_layers):
            for name, shape in self.layer_weights(layer).items():
                if is_linear(name):
                    yield name, shape


ALIASES = {  # transformers' name -> our field; the first that is there counts
    "vocab_size": ("vocab_size",),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size", "n_inner"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "max_positions": ("max_position_embeddings", "n_positions"),
}
FAMILIES = {  # model_type -> what the family has, and transformers' default where a config.json is silent
    "llama": {},
    "mistral": {},
    "mixtral": {"num_experts": 8, "experts_per_token": 2},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "qwen3_moe": {"qk_norm": True, "num_experts": 128, "experts_per_token": 8},
    "gemma": {"family": "gemma", "activation": "gelu_pytorch_tanh", "tied_embeddings": True, "head_dim": 256},
    "phi3": {"family": "phi3"},
    "gpt2": {
        "family": "gpt2",
        "activation": "gelu_new",
        "tied_embeddings": True,
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
    },
    "gpt_neox": {
        "family": "gpt_neox",
        "activation": "gelu",
        "qkv_bias": True,
        "output_bias": True,
        "mlp_bias": True,
        "parallel_residual": True,
        "rotary_fraction": 0.25,
    },
}


def _nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that looks most like the word; a common beginning counts more than letters elsewhere."""
    import difflib

    def likeness(choice: str) -> float:
        first, second = str(word).lower(), str(choice).lower()
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
        return difflib.SequenceMatcher(None, first, second).ratio() + 0.1 * same

    return max(choices, key=likeness)


def _choose(field_name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise CourseError if the value is not among the choices."""
    if value not in (choices := list(choices)):
        raise CourseError(
            f"{field_name} is {value!r}, which is not known here: the nearest choice is {_nearest(value, choices)!r}, "
            f"of {', '.join(map(str, choices))}."
        )


def _positive(**values: Any) -> None:
    """Raise CourseError for the first value that is not a whole number of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CourseError(f"{name} is {value!r} and has to be a whole number of at least 1: try {name}=1.")


def bundled_shapes() -> dict[str, dict]:
    """Configurations in data/model_shapes.json by hub id."""
    return json.loads((ROOT / "data" / "model_shapes.json").read_text(encoding="utf-8"))["models"]


def _find_config(name: str) -> dict:
    """The config of a bundled model, a local folder, or the hub."""
    bundled = bundled_shapes()
    if name in bundled:
        return bundled[name]
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CourseError(f"{path} is no JSON ({error}): save the model's config there again.") from None
        if not isinstance(config, dict):
            raise CourseError(f"{path} holds no JSON object: save the model's config there again.")
        return config
    nearest = f"the nearest bundled model is {_nearest(name, bundled)}"
    if Path(name).is_dir():
        raise CourseError(f"model {name!r} is a folder without a config.json: save the model there, or {nearest}.")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise CourseError(f"model {name!r} is neither bundled, nor a folder, nor a hub id owner/name: {nearest}.")
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.utils import get_session

        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=5)  # the hub's own client would retry for half a minute
        return json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
    except Exception as error:  # no network, no such model, a gated one: the hub's client has an error for each
        reason = type(error).__name__
        raise CourseError(f"model {name!r} could not be fetched from the hub ({reason}): {nearest}.") from None


def _parse(config: dict, name: str) -> ModelShape:
    """ModelShape of a config in transformers' format."""
    for lora_rank in ("kv_lora_rank", "q_lora_rank"):
        if config.get(lora_rank):
            raise CourseError(
                f"{lora_rank} is {config[lora_rank]}: multi-head latent attention (MLA) is not modelled, "
                "the nearest model_type that is has grouped queries, 'llama'."
            )
    if config.get("is_encoder_decoder"):
        raise CourseError("is_encoder_decoder is true: only decoder-only models are modelled, the nearest is 'llama'.")
    _choose("model_type", config.get("model_type"), FAMILIES)
    model_type = config["model_type"]
    values: dict[str, Any] = {"name": str(name), "family": "llama"} | FAMILIES[model_type]
    for field_name, aliases in ALIASES.items():
        for alias in aliases:
            if config.get(alias) is not None:
                values[field_name] = config[alias]
                break
    if model_type == "gpt2":
        values["intermediate_size"] = config.get("n_inner") or 4 * values.get("hidden_size", 0)
    heads = values.get("num_heads")
    for required in ("vocab_size", "hidden_size", "num_layers", "num_heads"):
        if required not in values:
            raise CourseError(f"{required} is missing in the config of {name}: write {ALIASES[required][0]} there.")
        _positive(**{ALIASES[required][0]: values[required]})
    hidden = values["hidden_size"]
    if "head_dim" not in values:
        if hidden % heads:
            near = min((n for n in range(1, hidden + 1) if hidden % n == 0), key=lambda n: abs(n - heads))
            raise CourseError(
                f"num_attention_heads is {heads}, which does not divide hidden_size {hidden}: the nearest is {near}."
            )
        values["head_dim"] = hidden // heads
    if values["family"] in ("gpt2", "gpt_neox"):
        values["num_kv_heads"] = heads
    values.setdefault(
        "num_kv_heads", 32 if model_type == "qwen2" else 8 if model_type in ("mistral", "mixtral") else heads
    )
    values.setdefault("intermediate_size", 4 * hidden)
    _positive(
        num_key_value_heads=values["num_kv_heads"],
        head_dim=values["head_dim"],
        intermediate_size=values["intermediate_size"],
    )
    if values["head_dim"] % 2 and model_type != "gpt2":
        raise CourseError(
            f"head_dim is {values['head_dim']}, and rotary embeddings turn pairs: "
            f"the nearest is {values['head_dim'] + 1}."
        )
    if heads % values["num_kv_heads"]:
        near = min((n for n in range(1, heads + 1) if heads % n == 0), key=lambda n: abs(n - values["num_kv_heads"]))
        raise CourseError(
            f"num_key_value_heads is {values['num_kv_heads']}, which does not divide num_attention_heads {heads}: "
            f"the nearest is {near}."
        )
    optional = {
        "tied_embeddings": ("tie_word_embeddings",),
        "activation": ("hidden_act", "activation_function"),
        "embedding_dropout": ("embd_pdrop",),
        "attention_dropout": ("attn_pdrop", "attention_dropout"),
        "residual_dropout": ("resid_pdrop",),
        "parallel_residual": ("use_parallel_residual",),
        "mlp_bias": ("mlp_bias",),
        "num_experts": ("num_local_experts", "num_experts"),
        "experts_per_token": ("num_experts_per_tok",),
    }
    if model_type == "phi3":
        optional["embedding_dropout"] = ()  # in the config, not in the code
    if model_type == "gemma":
        optional["activation"] = ()  # Gemma's checkpoints say "gelu"; the family's own default is the tanh form
    for field_name, aliases in optional.items():
        for alias in aliases:
            if config.get(alias) is not None and (not field_name.startswith("num_exp") or "num_experts" in values):
                values[field_name] = config[alias]
    if "attention_bias" in config and model_type in ("llama", "qwen3", "qwen3_moe", "gpt_neox", "gemma"):
        values["qkv_bias"] = values["output_bias"] = bool(config["attention_bias"])
    if values["family"] == "gpt_neox":
        rope = config.get("rope_parameters") or {}
        values["rotary_fraction"] = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        values["residual_dropout"] = values["embedding_dropout"] = config.get("hidden_dropout", 0.0)
    if "num_experts" in values:
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        _positive(
            num_experts=values["num_experts"], num_experts_per_tok=values["experts_per_token"], decoder_sparse_step=step
        )
        if values["experts_per_token"] > values["num_experts"]:
            raise CourseError(
                f"num_experts_per_tok is {values['experts_per_token']} of {values['num_experts']} experts: "
                f"use at most {values['num_experts']}."
            )
        layers = range(values["num_layers"])
        values["dense_layers"] = tuple(i for i in layers if i in dense or (i + 1) % step)
        values["dense_intermediate_size"] = config.get("intermediate_size") or 0
    window = config.get("sliding_window")
    if window is not None:
        _positive(sliding_window=window)
    if window and config.get("use_sliding_window", True) and values["family"] in ("llama", "phi3"):
        kinds = config.get("layer_types") or ["sliding_attention"] * values["num_layers"]
        values |= {"sliding_window": window, "num_sliding_layers": kinds.count("sliding_attention")}
    if values["family"] == "gpt2" and "activation_function" not in config:
        values["activation"] = "gelu_new"
    return ModelShape(**values)


# Estimates


def optimizer_state(optimizer: str, sizes: Iterable[tuple[int, ...]], width: int) -> tuple[int, int]:
    """Bytes that the optimiser keeps on the GPU, and in pages that can leave it.

    adamw: two moments in the weight's type and a step count (torch.optim.AdamW(fused=True)); adamw_8bit: two moments
    of a byte and an fp32 maximum for each 256, or fp32 below 4,096 elements (bitsandbytes); adafactor: row and column
    means (torch.optim.Adafactor; Shazeer and Stern 2018); sgd without momentum: nothing.
    """
    kept = paged = 0
    for size in sizes:
        elements = math.prod(size)
        if optimizer == "adamw":
            kept += 2 * elements * width + 4
        elif optimizer == "adafactor":
            rows = elements // size[-1]
            columns = elements // size[-2] if len(size) > 1 else 0
            kept += 4 + width * (rows + columns if len(size) > 1 else elements)
        elif optimizer.endswith("8bit"):
            state = 8 * elements if elements < 4096 else 2 * elements + 8 * -(-elements // 256)
            if optimizer.startswith("paged") and elements >= 1e5:  # smaller ones are not paged
                paged += state
            else:
                kept += state
    return kept, paged


@dataclass(frozen=True)
class GPU:
    """A device. Matrix rates are dense, in TFLOP/s (int8: TOP/s), and None where the device has no such units."""

    name: str
    memory: int  # bytes that the driver reports
    bandwidth: float  # GB/s
    tflops: dict[str, float | None]  # "fp32", "fp16", "bf16", "int8", "fp8"
    power: int  # watts
    compute_capability: tuple[int, int] | None
    year: int
    source: str


def _load_gpus() -> dict[str, GPU]:
    rows = json.loads((ROOT / "data" / "gpus.json").read_text(encoding="utf-8"))["gpus"]
    gpus = {}
    for name, row in rows.items():
        capability = tuple(row.pop("compute_capability") or ()) or None
        gpus[name] = GPU(name=name, memory=row.pop("memory_mib") * 2**20, compute_capability=capability, **row)
    return gpus


class _GPUs(dict):
    """Devices by name."""

    def __missing__(self, name: str) -> GPU:
        """Name the nearest device."""
        _choose("gpu", name, self)
        raise AssertionError  # not reached: a missing name is not among the choices


GPUS: dict[str, GPU] = _GPUs(_load_gpus())

CONTEXT = GIB // 2  # CUDA context and the libraries' kernels: 0.3 to 0.6 GiB, by GPU and version
FRAGMENTATION = 0.04  # of the total, held by the caching allocator in pieces that nothing fits; 2 to 10 % is usual


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
    _choose("method", method, METHODS)
    _choose("optimizer", optimizer, OPTIMIZERS)
    _choose("precision", precision, PRECISIONS)
    _choose("attention", attention, ATTENTION)
    _choose("zero_stage", zero_stage, (0, 1, 2, 3))
    _choose("device", device, ("cuda", "cpu"))
    _positive(batch_size=batch_size, seq_len=seq_len, lora_rank=lora_rank, num_gpus=num_gpus, loss_chunks=loss_chunks)
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
            _choose("lora_targets", name, names)
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


ADAFACTOR_COPIES = 1  # of the largest weight: its update, which is made in one buffer


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
    _choose("precision", precision, ("fp32", "fp16", "bf16"))
    _choose("cache_precision", cache_precision, CACHE_BITS)
    _choose("attention", attention, ATTENTION)
    if quantization is not None:
        _choose("quantization", quantization, QUANTISATIONS)
    _positive(batch_size=batch_size, context_len=context_len)
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


# What would make it fit


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


# The command


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0 if it fits or no GPU was named, 1 if it does not."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.memory", description="GPU memory of training or running a decoder-only model, in GiB."
    )
    parser.add_argument("model", help="a bundled name such as Qwen/Qwen2.5-7B, a folder, or a hub id")
    parser.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--inference", action="store_true", help="generation instead of training")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", "--context-len", type=int, default=2048, help="tokens in a row (default 2048)")
    parser.add_argument("--precision", help=f"one of {', '.join(PRECISIONS)}")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--json", action="store_true", help="everything in bytes as JSON")
    training = parser.add_argument_group("training")
    training.add_argument("--method", default="full", help=", ".join(METHODS))
    training.add_argument("--optimizer", default="adamw", help=", ".join(OPTIMIZERS))
    training.add_argument("--checkpointing", action="store_true", help="keep only the layers' inputs")
    training.add_argument("--lora-rank", type=int, default=16)
    training.add_argument("--zero-stage", type=int, default=0)
    training.add_argument("--num-gpus", type=int, default=1)
    inference = parser.add_argument_group("inference")
    inference.add_argument("--quantization", help=", ".join(QUANTISATIONS))
    inference.add_argument("--cache-precision", help=", ".join(CACHE_BITS))
    options = parser.parse_args(arguments)

    gpu = GPUS[options.gpu] if options.gpu else None
    shape = ModelShape.from_config(options.model)
    common = {"batch_size": options.batch_size, "attention": options.attention}
    advice = None
    if options.inference:
        estimate = estimate_inference(
            shape,
            precision=options.precision or "fp16",
            context_len=options.seq_len,
            quantization=options.quantization,
            cache_precision=options.cache_precision,
            **common,
        )
    else:
        capable = gpu is None or gpu.compute_capability is None or gpu.compute_capability >= (8, 0)
        settings = common | {
            "precision": options.precision or ("bf16" if capable else "fp16"),
            "seq_len": options.seq_len,
            "method": options.method,
            "optimizer": options.optimizer,
            "gradient_checkpointing": options.checkpointing,
            "lora_rank": options.lora_rank,
            "zero_stage": options.zero_stage,
            "num_gpus": options.num_gpus,
        }
        estimate = estimate_training(shape, **settings)
        if gpu and not estimate.fits(gpu):
            advice = recommend(shape, gpu, **settings)
    fits = estimate.fits(gpu) if gpu else None
    if options.json:
        print(json.dumps(estimate.to_dict() | {"gpu": gpu and asdict(gpu), "fits": fits}, indent=1))
    else:
        _print_table(estimate, gpu, fits)
        if advice:
            print(advice)
    return 1 if fits is False else 0


def _print_table(estimate: Estimate, gpu: GPU | None, fits: bool | None) -> None:
    from rich.console import Console
    from rich.table import Table

    shape = estimate.shape
    table = Table(title=f"{shape.name}, {shape.num_parameters / 1e9:.2f} B parameters: GiB (2^30 bytes) on each GPU")
    table.add_column("part")
    for phase in estimate.phases:
        table.add_column(f"{phase} (peak)" if phase == estimate.phase else phase, justify="right")
    for part in estimate.parts:
        table.add_row(part, *(f"{parts[part] / GIB:.2f}" for parts in estimate.phases.values()))
    table.add_section()
    table.add_row("total", *(f"{sum(parts.values()) / GIB:.2f}" for parts in estimate.phases.values()), style="bold")
    console = Console()
    console.print(table)
    console.print(f"CUDA context and fragmentation, a rule of thumb: {estimate.overhead / GIB:.2f} GiB more.")
    if estimate.host:
        console.print(f"Paged optimiser state in main memory: {estimate.host / GIB:.2f} GiB.")
    if gpu:
        verdict = "fits" if fits else "does not fit"
        console.print(f"It {verdict} in the {gpu.memory / GIB:.1f} GiB of a {gpu.name}.")


if __name__ == "__main__":
    exit_cleanly(main)
