"""GPU memory of a decoder-only model: will it fit, and what would make it fit? `python -m helpers.memory --help`.

    shape = ModelShape.from_config("Qwen/Qwen2.5-7B")
    estimate = estimate_training(shape, method="qlora", optimizer="paged_adamw_8bit", batch_size=4, seq_len=2048)
    estimate.total, estimate.activations, estimate.fits(GPUS["T4"])      # bytes, bytes, bool

How it counts: the training step that transformers runs is performed on *sizes*. A `Tensor` here has a number of
elements and a lifetime but no data; each operation allocates its result and keeps what autograd keeps for it
(https://github.com/pytorch/pytorch/blob/main/tools/autograd/derivatives.yaml), and the backward pass frees it again
in the same order. The peak over the step is the answer, and its parts are those at that moment. Nothing is fitted:
every line of `_layer` stands for a line of transformers' modeling_*.py. `tests/test_memory.py` compares with a real
step of the real models. The module needs no torch; it does not know kernels' workspaces, the CUDA context or
fragmentation, which `Estimate.overhead` states apart. Bytes everywhere; printed in GiB (2**30 bytes).
"""

import argparse
import html
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from helpers.errors import CourseError, exit_cleanly
from helpers.profiles import ROOT

GIB = 2**30
PARTS = ("parameters", "gradients", "optimizer", "activations", "logits")
INFERENCE_PARTS = ("parameters", "kv_cache", "activations", "logits")
METHODS = ("full", "lora", "qlora", "frozen")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor")
PRECISIONS = {"fp32": 4, "bf16": 2, "fp16": 2, "bf16-mixed": 4, "fp16-mixed": 4}  # bytes of a weight
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


def is_linear(name: str) -> bool:
    """Whether it is the weight of an nn.Linear or Conv1D: experts and routers are bare parameters in transformers."""
    return name.endswith("_proj")


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
    import difflib

    choices = list(choices)
    lowered = {str(choice).lower(): choice for choice in choices}
    found = difflib.get_close_matches(str(word).lower(), lowered, n=1, cutoff=0)
    return lowered[found[0]] if found else choices[0]


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
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CourseError(f"{path} is no JSON ({error}): save the model's config there again.") from None
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
    if config.get("kv_lora_rank") or config.get("q_lora_rank"):
        raise CourseError("kv_lora_rank is set: multi-head latent attention (MLA) is not modelled, use a GQA model.")
    if config.get("is_encoder_decoder"):
        raise CourseError("is_encoder_decoder is true: only decoder-only models are modelled, such as llama.")
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
    if values.get("num_experts"):
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        layers = range(values["num_layers"])
        values["dense_layers"] = tuple(i for i in layers if i in dense or (i + 1) % step)
        values["dense_intermediate_size"] = config.get("intermediate_size") or 0
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and values["family"] in ("llama", "phi3"):
        kinds = config.get("layer_types") or ["sliding_attention"] * values["num_layers"]
        values |= {"sliding_window": window, "num_sliding_layers": kinds.count("sliding_attention")}
    if values["family"] == "gpt2" and "activation_function" not in config:
        values["activation"] = "gelu_new"
    return ModelShape(**values)


# Tensors without data, and autograd over them


class Storage:
    """Bytes that are allocated until the last reference is gone: CPython counts references just as torch does."""

    __slots__ = ("memory", "part", "size")

    def __init__(self, memory: "Memory", size: int, part: str) -> None:
        self.memory, self.size, self.part = memory, size, part
        memory.add(part, size)

    def __del__(self) -> None:
        self.memory.live[self.part] -= self.size
        self.memory.total -= self.size

    def move(self, part: str, size: int) -> None:
        """Count it as another part, of another size."""
        self.memory.live[self.part] -= self.size
        self.memory.total -= self.size
        self.part, self.size = part, size
        self.memory.add(part, size)


class Leaf:
    """Where gradients end: a trained parameter, or the input of a recomputed layer."""

    def __init__(self, is_parameter: bool) -> None:
        self.is_parameter = is_parameter
        self.uses = 0  # a tied embedding is used twice, and its gradient complete when both have arrived
        self.gradient: Tensor | None = None


@dataclass(slots=True, eq=False)
class Node:
    """A recorded operation: where its gradients go, how they are made, and what is kept for them."""

    inputs: list["Tensor"]  # without their storage
    kind: str
    saved: list[Storage]
    scratch: int


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One of several results of an operation, whose gradients are put together."""

    node: Node


class Tensor:
    """`elements` numbers of `width` bytes in a storage, and what computes its gradient, if it needs one."""

    __slots__ = ("elements", "part", "source", "storage", "width")

    def __init__(self, elements: int, width: float, storage: Storage, source: Any = None) -> None:
        self.elements, self.width, self.storage, self.source = elements, width, storage, source
        self.part = "activations" if storage.part == "parameters" else storage.part  # what its gradient counts as

    def without_storage(self) -> "Tensor":
        """What a gradient of this tensor needs to know."""
        edge = Tensor(self.elements, self.width, self.storage, self.source)
        edge.storage = None
        return edge


class Memory:
    """Live bytes by part, the peak of each phase of the step, and the operations of which the step consists."""

    def __init__(self, settings: "Settings") -> None:
        self.settings = settings
        self.live: dict[str, int] = dict.fromkeys((*PARTS, *INFERENCE_PARTS), 0)
        self.total = self.highest = 0
        self.peaks: dict[str, dict[str, int]] = {}
        self.phase, self.part = "forward", "activations"
        self.training = settings.method != "frozen"
        self.tape: list[Node] | None = (
            [] if self.training else None
        )  # None: nothing is recorded, as under torch.no_grad()
        self.cast_weights: dict[Tensor, Tensor] = {}  # autocast keeps 16-bit copies of trained weights

    def add(self, part: str, size: int) -> None:
        """Count an allocation."""
        self.live[part] += size
        self.total += size
        if self.total > self.highest:
            self.highest = self.total
            self.peaks[self.phase] = self.live.copy()

    def enter(self, phase: str) -> None:
        """Begin a phase of the step."""
        self.phase, self.highest = phase, 0
        self.add("activations", 0)

    def new(self, elements: int, width: float, part: str = "") -> Tensor:
        """Allocate a tensor."""
        return Tensor(elements, width, Storage(self, int(elements * width), part or self.part))

    def op(
        self,
        elements: int,
        width: float,
        inputs: Iterable[Tensor | None],
        saves: Iterable[Tensor | None] = (),
        kind: str = "own",
        save_result: bool = False,
        scratch: float = 0,
        view: bool = False,
    ) -> Tensor:
        """Result of an operation; a view has the storage of the first input.

        `kind` says what the gradients of the inputs are: "own" allocates one of the size of each input; "same" hands
        the incoming one on, as an addition does; "full" computes one of the size of the result, which is then summed
        or cast to that of the input, as a product does. `scratch`: bytes that the backward needs besides.
        """
        inputs = [x for x in inputs if x is not None]
        result = Tensor(elements, width, inputs[0].storage) if view else self.new(elements, width)
        needing = [x for x in inputs if x.source is not None]
        if self.tape is not None and needing:
            saved = [x.storage for x in saves if x is not None] + [result.storage] * save_result
            result.source = Node([x.without_storage() for x in needing], kind, saved, int(scratch))
            self.tape.append(result.source)
            for x in needing:
                if isinstance(x.source, Leaf):
                    x.source.uses += 1
        return result

    def backward(self, tape: list[Node], gradients: dict[Any, Tensor]) -> None:
        """Run autograd's engine over the tape, newest operation first, freeing what each operation saved."""
        while tape:
            node = tape.pop()
            gradient = gradients.pop(node, None)
            if gradient is None:  # no path to the loss
                continue
            if isinstance(node, Checkpoint):
                node.backward(self, gradient, gradients)
                continue
            scratch = Storage(self, node.scratch, node.inputs[0].part)
            made = []
            for x in node.inputs:
                if node.kind == "own":
                    made.append(self.new(x.elements, x.width, x.part))
                elif node.kind == "same":
                    made.append(gradient)
                else:
                    made.append(self.new(gradient.elements, gradient.width, gradient.part))
            node.saved.clear()
            del gradient, scratch
            for x in node.inputs:
                raw = made.pop(0)
                if (raw.elements, raw.width) != (x.elements, x.width):
                    raw = self.new(x.elements, x.width, x.part)  # summed to the input's shape, cast to its type
                self.accumulate(x.source, raw, gradients)
                del raw

    def accumulate(self, source: Any, gradient: Tensor, gradients: dict[Any, Tensor]) -> None:
        """Add a gradient to what has arrived there before."""
        if isinstance(source, Leaf):
            source.uses -= 1
            if source.gradient is not None:
                gradient = self.new(gradient.elements, gradient.width, gradient.part)
            source.gradient = gradient
            if source.is_parameter and not source.uses:
                gradient.storage.move("gradients", -(-gradient.storage.size // self.settings.gradient_shards))
        elif isinstance(source, Part):
            gradients.setdefault(source.node, []).append(gradient)
        elif source in gradients:
            gradients[source] = self.new(gradient.elements, gradient.width, gradient.part)
        else:
            gradients[source] = gradient

    # Operations: what each allocates, and what it saves for the backward pass

    def cast(self, x: Tensor, width: float) -> Tensor:
        """`x.to(dtype)`: a copy, unless it has that type."""
        return x if x.width == width else self.op(x.elements, width, [x])

    def split(self, x: Tensor, sizes: Iterable[int], scratch: float = 0) -> list[Tensor]:
        """Views of parts of x; the backward joins their gradients in a new tensor."""
        whole = self.op(x.elements, x.width, [x], view=True, scratch=scratch)
        source = whole.source and Part(whole.source)
        return [Tensor(size, x.width, x.storage, source) for size in sizes]

    def transpose(self, x: Tensor) -> Tensor:
        """Heads before positions: a view, whose gradient has to be copied back into order."""
        return self.op(x.elements, x.width, [x], view=True)

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        """`x + y`: saves nothing, and both get the incoming gradient."""
        return self.op(x.elements, max(x.width, y.width), [x, y], kind="same")

    def scale(self, x: Tensor, width: float = 0) -> Tensor:
        """Product with a constant: saves nothing of x."""
        return self.op(x.elements, max(width, x.width), [x], kind="full")

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        """`x * y`: each is saved if the other needs a gradient."""
        saves = [x if y.source else None, y if x.source else None]
        return self.op(max(x.elements, y.elements), max(x.width, y.width), [x, y], saves, kind="full")

    def power(self, x: Tensor) -> Tensor:
        """`x.pow(n)`: saves x; the backward computes n * x^(n-1) in two steps before the product."""
        return self.op(x.elements, x.width, [x], [x], scratch=2 * x.elements * x.width)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Saves a mask: one byte each on CUDA (native_dropout); on the CPU, numbers of x's type."""
        if not probability or not self.training:
            return x
        mask = self.new(x.elements, 1 if self.settings.device == "cuda" else x.width)
        return self.op(x.elements, x.width, [x], [mask], kind="full")

    def matmul(self, x: Tensor, weight: Tensor, elements: int, bias: Tensor | None = None) -> Tensor:
        """`F.linear`: saves x if the weight is trained, and the weight if x needs a gradient."""
        if self.settings.autocast:
            x, bias = self.cast(x, 2), bias and self.cast_weight(bias)
            weight = self.cast_weight(weight)
        saves = [x if weight.source else None, weight if x.source else None]
        return self.op(elements, x.width, [x, weight, bias], saves)

    def cast_weight(self, weight: Tensor) -> Tensor:
        """Autocast's 16-bit copy of a weight, which it caches if the weight is trained."""
        if weight in self.cast_weights:
            return self.cast_weights[weight]
        copy = self.cast(weight, 2)
        if weight.source is not None and copy is not weight:
            self.cast_weights[weight] = copy
        return copy

    def rms_norm(self, x: Tensor, weight: Tensor, gemma: bool = False) -> Tensor:
        """LlamaRMSNorm: in fp32, then `weight * hidden.to(dtype)`; Gemma multiplies before it casts."""
        rows = x.elements // weight.elements
        high = self.cast(x, 4)
        variance = self.op(rows, 4, [self.power(high)])  # pow and mean
        inverse = self.op(rows, 4, [variance], save_result=True)  # rsqrt
        normed = self.multiply(high, inverse)
        del high, variance, inverse
        if gemma:
            factor = self.scale(self.cast(weight, 4))  # 1 + weight
            normed = self.multiply(normed, factor)
            return self.cast(normed, x.width)
        normed = self.cast(normed, x.width)
        return self.multiply(weight, normed)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """native_layer_norm: saves its input, and mean and inverse deviation of each row."""
        statistics = self.new(2 * x.elements // weight.elements, x.width)
        return self.op(x.elements, x.width, [x, weight, bias], [x, statistics])

    def activation(self, x: Tensor, name: str) -> Tensor:
        """silu and gelu save their input; transformers writes gelu_new out, and each product there saves its factors."""
        if name not in ("gelu_new", "gelu_fast"):
            return self.op(x.elements, x.width, [x], [x])
        half = self.scale(x)  # 0.5 * x
        inner = self.add_(x, self.scale(self.power(x)))
        tanh = self.op(x.elements, x.width, [self.scale(inner)], save_result=True)
        del inner
        shifted = self.op(x.elements, x.width, [tanh], kind="same")  # 1 + tanh
        del tanh
        return self.multiply(half, shifted)

    def rotate(self, x: Tensor, width: float) -> Tensor:
        """Rotary embedding, `x * cos + rotate_half(x) * sin`: cosine and sine need no gradient, so x is not saved."""
        first = self.scale(x, width)
        half = self.new(x.elements // 2, x.width)
        turned = self.op(x.elements, x.width, [x], scratch=x.elements * x.width)
        del half
        second = self.scale(turned, width)
        del turned
        return self.add_(first, second)


class Checkpoint(Node):
    """A layer of which only the input is kept; the backward runs it again (torch.utils.checkpoint, not reentrant)."""

    def __init__(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> None:
        super().__init__([x.without_storage()], "own", [x.storage], 0)
        self.layer = layer

    def backward(self, memory: Memory, gradient: Tensor, gradients: dict[Any, Tensor]) -> None:
        """Run the layer on its input, then go back through it."""
        x, outer = self.inputs[0], memory.tape
        start = Leaf(is_parameter=False) if x.source is not None else None
        memory.tape = []
        result = self.layer(Tensor(x.elements, x.width, self.saved.pop(), start))
        self.layer = None  # it holds the mask
        memory.cast_weights.clear()
        inner, memory.tape = memory.tape, outer
        seed = {result.source: gradient}
        del result, gradient
        memory.backward(inner, seed)
        if start is not None:
            gradient, start.gradient = start.gradient, None
            memory.accumulate(x.source, gradient, gradients)


# The model, as transformers runs it


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


class Model:
    """The weights of one model, and its forward pass in the order of transformers' modeling files."""

    def __init__(self, shape: ModelShape, memory: Memory) -> None:
        self.shape, self.memory, self.settings = shape, memory, memory.settings
        self.trained: list[tuple[int, ...]] = []
        self.outer = {name: self.weight(name, size) for name, size in shape.outer_weights().items()}
        self.layers = [
            {name: self.weight(name, size) for name, size in shape.layer_weights(layer).items()}
            for layer in range(shape.num_layers)
        ]
        frequencies = 0 if shape.family == "gpt2" else 4 * int(shape.head_dim * shape.rotary_fraction)
        self.buffers = Storage(memory, frequencies, "parameters")  # of the rotary embedding, in fp32, twice
        self.adapters: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in self.layers]
        if self.settings.method in ("lora", "qlora"):
            for layer, adapters in enumerate(self.adapters):
                for name, size in shape.layer_weights(layer).items():
                    if targeted(name, self.settings.lora_targets):
                        adapters[name] = self.adapter(name, size)

    @property
    def head(self) -> Tensor:
        """The output matrix."""
        return self.outer.get("lm_head", self.outer["embed_tokens"])

    def weight(self, name: str, size: tuple[int, ...]) -> Tensor:
        """A parameter of the model."""
        settings, elements = self.settings, math.prod(size)
        width = PRECISIONS[settings.precision]
        shards = settings.num_gpus if settings.zero_stage == 3 else 1
        stored = (
            quantised_size(size, settings.quantisation)
            if settings.quantisation and is_linear(name)
            else elements * width
        )
        trained = settings.method == "full"
        if trained:
            self.trained.append(size)
        storage = Storage(self.memory, -(-stored // shards), "parameters")
        return Tensor(elements, width, storage, Leaf(is_parameter=True) if trained else None)

    def adapter(self, name: str, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The two matrices of LoRA, which peft keeps in fp32; twice the rank where gate and up are one matrix."""
        pair, shards = [], self.settings.num_gpus if self.settings.zero_stage == 3 else 1
        rank = self.settings.lora_rank * (size[0] if len(size) == 3 else 1) * (2 if name == "experts_up" else 1)
        for shape in ((rank, size[-1]), (size[-2], rank)):
            self.trained.append(shape)
            storage = Storage(self.memory, -(-4 * math.prod(shape) // shards), "parameters")
            pair.append(Tensor(math.prod(shape), 4, storage, Leaf(is_parameter=True)))
        return pair[0], pair[1]

    def linear(self, x: Tensor, layer: int, name: str) -> Tensor:
        """A linear layer of the model, with its adapter if it has one; peft runs adapters in fp32."""
        memory, settings = self.memory, self.settings
        weight, bias = self.layers[layer][name], self.layers[layer].get(f"{name}.bias")
        outputs, inputs = self.shape.layer_weights(layer)[name]
        rows = x.elements // inputs
        if settings.quantisation:  # bitsandbytes: the backward makes the weight 16 bit again
            low = memory.cast(x, 2 if settings.autocast else x.width)
            result = memory.op(rows * outputs, low.width, [low], [weight], scratch=weight.elements * low.width)
            result = memory.cast(result, x.width)
        else:
            result = memory.matmul(x, weight, rows * outputs, bias)
        if name not in self.adapters[layer]:
            return result
        width = result.width
        if settings.method == "qlora":
            result = memory.op(result.elements, width, [result], kind="same")  # peft clones it
        down, up = self.adapters[layer][name]
        if not (settings.method == "qlora" and settings.autocast):
            x = memory.cast(x, 4)
        change = memory.matmul(memory.matmul(x, down, rows * settings.lora_rank), up, rows * outputs)
        change = memory.scale(change)
        if settings.method == "qlora" and not settings.autocast:
            change = memory.cast(change, width)
        result = memory.add_(result, change)
        return memory.cast(result, width) if settings.method == "lora" else result

    def adapted(self, layer: int, name: str) -> Tensor:
        """The weights of the experts with their adapters, which peft adds to them as one matrix."""
        memory, weight = self.memory, self.layers[layer][name]
        if name not in self.adapters[layer]:
            return weight
        down, up = (memory.cast(matrix, weight.width) for matrix in self.adapters[layer][name])
        return memory.op(weight.elements, weight.width, [down, up], [down, up])

    def norm(self, x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
        """The family's normalisation."""
        if f"{name}.bias" in weights:
            return self.memory.layer_norm(x, weights[name], weights[f"{name}.bias"])
        return self.memory.rms_norm(x, weights[name], gemma=self.shape.family == "gemma")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over all heads. Result: (batch, seq, heads * head_dim)."""
        memory, shape, settings = self.memory, self.shape, self.settings
        groups = shape.num_heads // shape.num_kv_heads
        repeat = groups > 1 and (mask is not None or settings.attention == "eager")
        if repeat:  # repeat_kv; without a mask SDPA shares the heads by itself
            key = memory.op(groups * key.elements, key.width, [key])
            value = memory.op(groups * value.elements, value.width, [value])
        rows = settings.batch_size * shape.num_heads * settings.seq_len
        if settings.attention == "eager":
            return self.attend_eagerly(query, key, value, rows, repeat)
        if settings.autocast:
            query, key, value = (memory.cast(x, 2) for x in (query, key, value))
        if shape.attention_dropout and memory.training and settings.device == "cpu":
            return self.attend_in_fp32(query, key, value, rows)  # the CPU has no fused kernel with dropout
        bias = mask and memory.new(mask.elements, query.width)  # the boolean mask as 0 and -inf, in each layer
        normaliser = memory.new(rows, 4)  # log-sum-exp, instead of the attention matrix
        saves = [query, key, value, bias, normaliser]
        result = memory.op(query.elements, query.width, [query, key, value], saves, save_result=True)
        if shape.family in ("gpt_neox", "phi3") and settings.device == "cpu":
            result = memory.op(result.elements, result.width, [result])  # its kernel keeps the queries' layout
        return result

    def attend_eagerly(self, query: Tensor, key: Tensor, value: Tensor, rows: int, repeated: bool) -> Tensor:
        """The attention matrix in full: scores, scaled, masked, softmax in fp32, and its 16-bit copy."""
        memory, shape, settings = self.memory, self.shape, self.settings
        elements = rows * settings.seq_len
        if settings.autocast:
            query, key, value = (memory.cast(x, 2) for x in (query, key, value))
        if settings.batch_size > 1:  # the batched product wants contiguous inputs; repeated or joined ones are
            joined = shape.family == "gpt_neox"
            query = query if joined else memory.op(query.elements, query.width, [query])
            key = key if joined or repeated else memory.op(key.elements, key.width, [key])
            value = value if repeated else memory.op(value.elements, value.width, [value])
        width = query.width
        scores = memory.op(elements, width, [query, key], [query, key])
        scores = memory.scale(scores)
        scores = memory.op(elements, width, [scores], kind="same")  # + mask
        if self.shape.family != "gpt2":
            scores = memory.cast(scores, 4)
        probabilities = memory.op(elements, scores.width, [scores], save_result=True)
        del scores
        probabilities = memory.dropout(memory.cast(probabilities, width), self.shape.attention_dropout)
        result = memory.op(query.elements, width, [probabilities, value], [probabilities, value])
        return memory.op(query.elements, width, [result])  # transposed back

    def attend_in_fp32(self, query: Tensor, key: Tensor, value: Tensor, rows: int) -> Tensor:
        """SDPA's own fallback, written out in fp32."""
        memory, elements, width = self.memory, rows * self.settings.seq_len, query.width
        query, key, value = (memory.cast(x, 4) for x in (query, key, value))
        query, key = memory.scale(query), memory.scale(key)
        query, key = memory.op(query.elements, 4, [query]), memory.op(key.elements, 4, [key])
        scores = memory.op(elements, 4, [query, key], [query, key])
        scores = memory.op(elements, 4, [scores], kind="same")
        probabilities = memory.op(elements, 4, [scores], save_result=True)
        del scores
        probabilities = memory.dropout(probabilities, self.shape.attention_dropout)
        value = memory.op(value.elements, 4, [value])
        result = memory.op(query.elements, 4, [probabilities, value], [probabilities, value])
        result = memory.cast(result, width)
        return memory.op(query.elements, width, [result])

    def attention(self, x: Tensor, layer: int, mask: Tensor | None, rotary_width: float) -> Tensor:
        """Self-attention of a layer."""
        memory, shape, weights = self.memory, self.shape, self.layers[layer]
        tokens = self.settings.tokens
        q, kv = tokens * shape.num_heads * shape.head_dim, tokens * shape.num_kv_heads * shape.head_dim
        if "qkv_proj" in weights:
            joint = self.linear(x, layer, "qkv_proj")
            query, key, value = memory.split(joint, (q, kv, kv))
            del joint
        else:
            query, key, value = (self.linear(x, layer, name) for name in ("q_proj", "k_proj", "v_proj"))
            if shape.qk_norm:
                query, key = memory.rms_norm(query, weights["q_norm"]), memory.rms_norm(key, weights["k_norm"])
            query, key = memory.transpose(query), memory.transpose(key)
        if shape.family != "gpt2":
            query, key = (self.rotary(x, rotary_width) for x in (query, key))
        result = self.attend(query, key, value, mask)
        del query, key, value
        return self.linear(result, layer, "o_proj")

    def rotary(self, x: Tensor, width: float) -> Tensor:
        """Rotary embedding of queries or keys; GPT-NeoX and Phi-3 turn a part and put the rest beside it again."""
        memory, fraction = self.memory, self.shape.rotary_fraction
        if self.shape.family not in ("gpt_neox", "phi3"):
            return memory.rotate(x, width)
        size = int(x.elements * fraction)
        turned, rest = memory.split(x, (size, x.elements - size), scratch=2 * x.elements * x.width)
        turned = memory.rotate(turned, width)
        return memory.op(x.elements, turned.width, [turned, rest])

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        """The feed-forward part of a layer."""
        memory, name, weights = self.memory, self.shape.activation, self.layers[layer]
        if "router" in weights:
            return self.experts(x, layer)
        if "gate_proj" in weights:
            active = memory.activation(self.linear(x, layer, "gate_proj"), name)
            product = memory.multiply(active, self.linear(x, layer, "up_proj"))
            del active
        elif "gate_up_proj" in weights:
            joint = self.linear(x, layer, "gate_up_proj")
            gate, up = memory.split(joint, (joint.elements // 2,) * 2)
            product = memory.multiply(up, memory.activation(gate, name))
            del joint, gate, up
        else:
            product = memory.activation(self.linear(x, layer, "up_proj"), name)
        return self.linear(product, layer, "down_proj")

    def experts(self, x: Tensor, layer: int) -> Tensor:
        """Mixture of experts with grouped products: each token is copied once for each of its experts."""
        memory, shape, weights, tokens = self.memory, self.shape, self.layers[layer], self.settings.tokens
        copies = tokens * shape.experts_per_token
        h, i, width = shape.hidden_size, shape.intermediate_size, x.width
        logits = memory.matmul(x, weights["router"], tokens * shape.num_experts)
        scores = memory.op(tokens * shape.num_experts, 4, [memory.cast(logits, 4)], save_result=True)
        chosen = memory.op(copies, 4, [scores], [memory.new(copies, 8)])
        order = memory.new(copies, 8)
        selected = memory.op(copies * h, width, [x], [order], scratch=x.elements * width)
        if "experts_up" in self.adapters[layer]:  # peft makes both matrices once to register them, and again for use
            tape, memory.tape = memory.tape, None
            registered = [self.adapted(layer, name) for name in ("experts_down", "experts_up")]
            memory.tape = tape
            del registered
        up = self.adapted(layer, "experts_up")
        saves = [selected if up.source else None, up if selected.source else None]
        joint = memory.op(copies * 2 * i, width, [selected, up], saves)
        del selected
        gate, linear = memory.split(joint, (copies * i,) * 2)
        product = memory.multiply(memory.activation(gate, shape.activation), linear)
        del joint, gate, linear
        down = self.adapted(layer, "experts_down")
        saves = [product if down.source else None, down if product.source else None]
        result = memory.op(copies * h, width, [product, down], saves)
        del product
        weighted = memory.multiply(result, chosen)  # fp32, since the router's scores are
        del result
        sorted_back = memory.op(copies * h, 4, [weighted], [order], scratch=copies * h * 4)
        del weighted
        return memory.cast(memory.op(tokens * h, 4, [sorted_back]), width)

    def layer(self, x: Tensor, layer: int, mask: Tensor | None, rotary_width: float) -> Tensor:
        """One decoder layer: norm, attention, norm, feed-forward, with residual connections."""
        memory, shape, weights = self.memory, self.shape, self.layers[layer]
        normed = self.norm(x, weights, "input_norm")
        attended = memory.dropout(self.attention(normed, layer, mask, rotary_width), shape.residual_dropout)
        del normed
        if shape.parallel_residual:  # GPT-NeoX: both parts read the layer's input
            changed = memory.dropout(
                self.feed_forward(self.norm(x, weights, "post_norm"), layer), shape.residual_dropout
            )
            return memory.add_(memory.add_(changed, attended), x)
        residual = memory.add_(x, attended)
        del x, attended
        changed = self.feed_forward(self.norm(residual, weights, "post_norm"), layer)
        return memory.add_(residual, memory.dropout(changed, shape.residual_dropout))

    def hidden_states(self) -> Tensor:
        """Embedding, all layers and the last norm."""
        memory, shape, settings = self.memory, self.shape, self.settings
        batch, seq, tokens = settings.batch_size, settings.seq_len, settings.tokens
        ids = memory.new(tokens, 8)
        table = self.outer["embed_tokens"]
        x = memory.op(tokens * shape.hidden_size, table.width, [table], [ids])
        if settings.gradient_checkpointing and settings.method in ("lora", "qlora") and memory.tape is not None:
            x.source = Leaf(is_parameter=False)  # transformers lets it require a gradient, and so it stays to the end
            self.embedded = x
        if shape.family == "gemma":
            x = memory.scale(x)
        if "positions" in self.outer:
            positions = self.outer["positions"]
            place = memory.op(seq * shape.hidden_size, positions.width, [positions])
            x = memory.op(x.elements, x.width, [x, place], kind="same")
        x = memory.dropout(x, shape.embedding_dropout)
        rotary_width, angles = x.width, None
        if shape.family != "gpt2":
            angles = memory.new(2 * seq * int(shape.head_dim * shape.rotary_fraction), rotary_width)  # noqa: F841
        mask = None
        if settings.attention == "eager":
            mask = memory.new(batch * seq * seq, x.width)  # 0 and -inf
        elif settings.padded or (shape.sliding_window or seq) < seq:
            mask = memory.new(batch * seq * seq, 1)
        for layer in range(shape.num_layers):
            if not (settings.gradient_checkpointing and memory.tape is not None):
                x = self.layer(x, layer, mask, rotary_width)
                continue
            checkpoint = Checkpoint(lambda y, layer=layer: self.layer(y, layer, mask, rotary_width), x)
            tape, memory.tape = memory.tape, None
            result = self.layer(x, layer, mask, rotary_width)
            memory.tape = tape
            if x.source is not None or self.trained:
                result.source = checkpoint
                tape.append(checkpoint)
            x = result
            del result, checkpoint
        return self.norm(x, self.outer, "norm")

    def loss(self) -> Tensor:
        """Cross-entropy of the next token: the logits, their fp32 copy and the log-probabilities."""
        memory, rows = self.memory, -(-self.settings.tokens // self.settings.loss_chunks)
        x, head = self.hidden_states(), self.head
        if self.settings.autocast:
            x, head = memory.cast(x, 2), memory.cast_weight(head)
        memory.part = "logits"
        logits = memory.matmul(x, head, rows * self.shape.vocab_size)
        high = memory.cast(logits, 4)
        log_probabilities = memory.op(high.elements, 4, [high], save_result=True)
        targets = memory.new(self.settings.tokens, 8)
        return memory.op(1, 4, [log_probabilities], [log_probabilities, targets])


# Estimates


def targeted(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether LoRA adapts this weight; "all-linear" is every matrix of the layers, as in peft, experts included."""
    if targets == "all-linear":
        return is_linear(name) or name in ("router", "experts_up", "experts_down")
    return name in targets


def quantised_size(size: tuple[int, ...], quantisation: str) -> int:
    """Bytes of a quantised matrix.

    nf4: bitsandbytes with double quantisation (Dettmers et al. 2023, section 3): half a byte for each weight, a byte
    for each block of 64 (its absolute maximum), an fp32 number for each 256 such blocks, two code books, an offset.
    int4: GPTQ and AWQ, half a byte, and a 16-bit scale and 4-bit zero for each group of 128. int8: LLM.int8, a byte
    and an fp32 scale for each row.
    """
    elements = math.prod(size)
    if quantisation == "int8":
        return elements + 4 * size[0]
    if quantisation == "int4":
        return math.ceil(elements * (0.5 + 2.5 / 128))
    blocks = -(-elements // 64)
    return -(-elements // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)


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
    def __missing__(self, name: str) -> GPU:
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
        try:
            return self.phases[self.phase][name]
        except KeyError:
            raise AttributeError(name) from None

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
        lines = [f"{self.shape.name}: {self.shape.num_parameters / 1e9:.2f} B parameters; peak in {self.phase}"]
        rows = [*self.parts.items(), ("total", self.total), ("context and fragmentation", self.overhead)]
        lines += [f"  {name:<26}{size / GIB:>9.2f} GiB" for name, size in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A stacked bar with its numbers."""
        colours = dict(zip(self.parts, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"), strict=False))
        whole = max(1, self.total)
        bar = "".join(
            f'<span style="display:inline-block;height:1.4em;width:{100 * size / whole:.2f}%;background:{colours[name]}"'
            f' title="{name} {size / GIB:.2f} GiB"></span>'
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
        lora_targets = (lora_targets,) if isinstance(lora_targets, str) else tuple(lora_targets)
        names = sorted({name for name, _ in shape.linear_weights()})
        for name in lora_targets:
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

    `settings` are those of `estimate_training`. Changes are tried from the cheapest to the dearest until it fits;
    those that turn out not to be needed are left out again.
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
    current, used = start, dict(settings)
    for change, price in ladder:
        if current.fits(gpu):
            break
        if current.settings["method"] == "qlora" and change.get("method") == "lora":
            continue
        tried = estimate_training(shape, **(used | change))
        if tried.total < current.total:
            chosen, used, current = [*chosen, (change, price)], used | change, tried
    if current.fits(gpu):
        for change in list(chosen):
            rest = [other for other in chosen if other is not change]
            if estimate_training(shape, **_merged(settings, rest)).fits(gpu):
                chosen = rest
        chosen = [c for i, c in enumerate(chosen) if not any(set(c[0]) <= set(later[0]) for later in chosen[i + 1 :])]
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
