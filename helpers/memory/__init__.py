"""GPU memory of a decoder-only model: will it fit, and what would make it fit? `python -m helpers.memory --help`.

    shape = ModelShape.from_config("Qwen/Qwen2.5-7B")
    estimate = estimate_training(shape, method="qlora", optimizer="paged_adamw_8bit", batch_size=4, seq_len=2048)
    estimate.total, estimate.activations, estimate.fits(GPUS["T4"])      # bytes, bytes, bool

How it counts: `helpers.memory.transformer` performs the training step of transformers on sizes instead of tensors. The
peak over the step is the answer, and its parts are those at that moment. Nothing is fitted: each allocation stands for
one of torch's, and `tests/helpers/test_memory.py` compares with real steps of the real models. No torch is needed. What
is not known: kernels' workspaces, the CUDA context and fragmentation, of which `Estimate.overhead` is a rule of thumb.
Bytes everywhere; printed in GiB (2**30 bytes).
"""

from helpers.memory.advice import Recommendation, max_batch_size, max_context, recommend
from helpers.memory.choices import ATTENTION, METHODS, OPTIMIZERS, PRECISIONS, QUANTISATIONS
from helpers.memory.estimate import Estimate, estimate_inference, estimate_training
from helpers.memory.gpus import CONTEXT, FRAGMENTATION, GIB, GPU, GPUS
from helpers.memory.optimizers import optimizer_state
from helpers.memory.shape import FAMILIES, ModelShape, bundled_shapes
from helpers.memory.transformer import quantised_size

__all__ = [
    "ATTENTION",
    "CONTEXT",
    "FAMILIES",
    "FRAGMENTATION",
    "GIB",
    "GPU",
    "GPUS",
    "METHODS",
    "OPTIMIZERS",
    "PRECISIONS",
    "QUANTISATIONS",
    "Estimate",
    "ModelShape",
    "Recommendation",
    "bundled_shapes",
    "estimate_inference",
    "estimate_training",
    "max_batch_size",
    "max_context",
    "optimizer_state",
    "quantised_size",
    "recommend",
]
