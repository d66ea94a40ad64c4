"""The shape of a decoder-only model, from a bundled table, a folder, a configuration or the hub."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.errors import CourseError
from helpers.memory.choices import _nearest, choose, positive
from helpers.profiles import ROOT


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
    qk_norm: bool = False  # Qwen3 and Gemma 3 normalise queries and keys
    norms_after: bool = False  # Gemma 3 also normalises what attention and feed-forward give
    num_experts: int = 0
    experts_per_token: int = 0
    dense_layers: tuple[int, ...] = ()  # layers of a mixture that have no experts
    dense_intermediate_size: int = 0
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()  # where there is a window, the layers that see further
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
        if self.norms_after:
            weights |= {"attended_norm": (h,), "fed_norm": (h,)}
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

    def slides(self, layer: int) -> bool:
        """Whether the attention of this layer sees only a window."""
        return self.sliding_window is not None and layer not in self.full_layers

    @property
    def num_sliding_layers(self) -> int:
        """Layers that keep only a window of keys and values."""
        return sum(map(self.slides, range(self.num_layers)))

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
    "smollm3": {"tied_embeddings": True, "num_kv_heads": 4},
    "gemma": {"family": "gemma", "activation": "gelu_pytorch_tanh", "tied_embeddings": True, "head_dim": 256},
    "gemma3_text": {
        "family": "gemma",
        "activation": "gelu_pytorch_tanh",
        "tied_embeddings": True,
        "head_dim": 256,
        "num_kv_heads": 4,
        "qk_norm": True,
        "norms_after": True,
    },
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
    choose("model_type", config.get("model_type"), FAMILIES)
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
        positive(**{ALIASES[required][0]: values[required]})
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
    positive(
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
    if values["family"] == "gemma":
        optional["activation"] = ()  # Gemma's checkpoints say "gelu"; the family's own default is the tanh form
    for field_name, aliases in optional.items():
        for alias in aliases:
            if config.get(alias) is not None and (not field_name.startswith("num_exp") or "num_experts" in values):
                values[field_name] = config[alias]
    if "attention_bias" in config and model_type not in ("qwen2", "mistral", "mixtral", "phi3", "gpt2"):
        values["qkv_bias"] = values["output_bias"] = bool(config["attention_bias"])
    if values["family"] == "gpt_neox":
        rope = config.get("rope_parameters") or {}
        values["rotary_fraction"] = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
        values["residual_dropout"] = values["embedding_dropout"] = config.get("hidden_dropout", 0.0)
    if "num_experts" in values:
        step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        positive(
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
        positive(sliding_window=window)
    if (
        window
        and config.get("use_sliding_window", True)
        and (values["family"] in ("llama", "phi3") or model_type == "gemma3_text")
    ):
        layers, kinds = range(values["num_layers"]), config.get("layer_types")
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        if kinds:
            full = [i for i in layers if kinds[i] == "full_attention"]
        else:
            full = [i for i in layers if model_type == "gemma3_text" and not (i + 1) % pattern]
        values |= {"sliding_window": window, "full_layers": tuple(full)}
    if values["family"] == "gpt2" and "activation_function" not in config:
        values["activation"] = "gelu_new"
    return ModelShape(**values)


def is_linear(name: str) -> bool:
    """Whether it is the weight of an nn.Linear or Conv1D: experts and routers are bare parameters in transformers."""
    return name.endswith("_proj")
