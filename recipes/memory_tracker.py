"""Measures what a real training step of a real transformers model holds in memory, without allocating any of it.

The model is built of fake tensors, which have a shape, a dtype and a lifetime but no data, so a 13 B model is followed
on a laptop. `follow` counts every storage while it is alive. It says the same as torch's own `MemTracker`, which
`tests/helpers/test_memory.py` checks, and much faster; it also follows peft's frozen modules and bitsandbytes' 4-bit
weights, over which MemTracker stumbles.
"""

import warnings
import weakref
from collections import Counter

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Tracker(TorchDispatchMode):
    """Counts the bytes of all live storages by part, and remembers the counts at the peak of each phase."""

    def __init__(self, tokens: int, vocab_size: int) -> None:
        """Nothing lives yet; `tokens` and `vocab_size` tell logits from other activations."""
        super().__init__()
        self.tokens, self.vocab_size = tokens, vocab_size
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}
        self.phase = "forward"
        self.parts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # storage -> [part, bytes]

    def count(self, tensor: torch.Tensor, part: str, move: bool = False) -> None:
        """Count the tensor's storage as `part`, if it is not counted yet; with `move` also if it is."""
        storage = tensor.untyped_storage()
        if (entry := self.parts.get(storage)) is None:
            entry = self.parts[storage] = [part, storage.nbytes()]
            self.live[part] += entry[1]
            weakref.finalize(storage, self.forget, entry)
        elif move:
            self.live[entry[0]] -= entry[1]
            entry[0] = part
            self.live[part] += entry[1]

    def forget(self, entry: list) -> None:
        """A storage is gone."""
        self.live[entry[0]] -= entry[1]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Do what was asked, and count what it allocated."""
        result = func(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                is_logits = tensor.numel() == self.tokens * self.vocab_size and tensor.shape[-1] == self.vocab_size
                self.count(tensor, "logits" if is_logits else "activations")
        if self.live.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = Counter(self.live)
        return result


def build(config: PretrainedConfig, method: str, precision: str, attention: str, lora: dict | None = None) -> nn.Module:
    """Build the model on the meta device."""
    dtype = DTYPES.get(precision, torch.float32)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if method == "qlora":
            quantise(model, DTYPES[precision.removesuffix("-mixed")])
        if method in ("lora", "qlora"):
            targets = (lora or {}).get("targets", "all-linear")
            settings = LoraConfig(r=(lora or {}).get("rank", 16), target_modules=targets, task_type="CAUSAL_LM")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(model, settings)
    return model


def quantise(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Put bitsandbytes' 4-bit layers in the place of linear ones, but for the output head, as transformers does."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear | Conv1D) and name not in ("lm_head", "embed_out"):
                inputs, outputs = (
                    (child.in_features, child.out_features) if isinstance(child, nn.Linear) else child.weight.shape
                )
                has_bias = child.bias is not None
                layer = Linear4bit(inputs, outputs, has_bias, compute_dtype, quant_type="nf4")
                if has_bias:
                    layer.bias = child.bias
                setattr(module, name, layer)


def materialise(model: nn.Module) -> None:
    """Replace meta tensors by fake ones on the CPU; a tensor that is shared stays shared."""
    made = {}

    def make(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
            made[id(tensor)] = empty, tensor  # the old one is kept, so that its id is not given to another
        return made[id(tensor)][0]

    for module in model.modules():
        if isinstance(module, Linear4bit):
            full = torch.empty(module.weight.shape, dtype=module.compute_dtype)
            packed, state = functional.quantize_4bit(full, compress_statistics=True, quant_type="nf4")
            weight = module._parameters["weight"] = nn.Parameter(packed, requires_grad=False)
            weight.quant_state = state
            made[id(weight)] = weight, weight
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = make(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = make(buffer)


def measure(
    config: PretrainedConfig,
    *,
    batch_size: int,
    seq_len: int,
    method: str = "full",
    precision: str = "bf16",
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    optimizer: str = "adamw",
    **lora,
) -> dict[str, dict[str, int]]:
    """Peak of each phase of the second training step by part, in bytes; "peak" is that of the whole step."""
    config.use_cache = False
    functional.name2qmap.setdefault("dynamic", functional.create_dynamic_map())  # bitsandbytes would keep a fake one
    model = build(config, method, precision, attention, lora)
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(model)
        model.train(method != "frozen")
        if method == "frozen":
            model.requires_grad_(False)
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
        tracker = Tracker(batch_size * seq_len, config.vocab_size)
        if method != "frozen":
            make = {
                "adamw": lambda: torch.optim.AdamW(trained, fused=True),
                "sgd": lambda: torch.optim.SGD(trained),
                "adafactor": lambda: torch.optim.Adafactor(trained),
            }
            chosen = make[optimizer]()
            for parameter in trained:  # a step makes the optimiser's state
                parameter.grad = torch.empty_like(parameter)
            chosen.step()
            chosen.zero_grad()
            for state in chosen.state.values():
                for value in state.values():
                    if isinstance(value, torch.Tensor):
                        tracker.count(value, "optimizer")
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(lambda p: tracker.count(p.grad, "gradients", move=True))
        states = [m.weight.quant_state for m in model.modules() if isinstance(m, Linear4bit)]
        quantisation = [t for s in states for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]
        for tensor in [*model.parameters(), *model.buffers(), *quantisation]:
            tracker.count(tensor, "parameters")
        tracker.count(ids, "activations")
        mixed = precision.endswith("-mixed")
        autocast = torch.autocast("cpu", DTYPES[precision.removesuffix("-mixed")], enabled=mixed)
        with tracker:
            if method == "frozen":
                with torch.no_grad(), autocast:
                    loss = model(input_ids=ids, labels=ids).loss
            else:
                with autocast:
                    loss = model(input_ids=ids, labels=ids).loss
                tracker.phase = "backward"
                loss.backward()
                tracker.phase = "optimizer"
                chosen.step()
                chosen.zero_grad()
    peaks = {phase: dict(peak) for phase, peak in tracker.peaks.items()}
    peaks["peak"] = max(peaks.values(), key=lambda peak: sum(peak.values()))
    return peaks
