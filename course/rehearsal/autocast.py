"""Autocast as on CUDA, for the tensors of a device that is not there: the same operations in the same formats.

PyTorch's own casts ask a tensor in C++ whether it is one of CUDA. The lists are those of its "CUDA Op-Specific
Behavior": in 16 bits, in 32 bits, and in the widest format among the arguments. A copy in 16 bits of a weight that is
trained is kept until the context ends, as PyTorch does: for a whole model that is memory to be counted.
"""

import warnings
import weakref

import torch

KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
LOWER = (
    "_convolution conv1d conv2d conv3d conv_transpose1d addmm addmv addr matmul einsum mm mv linalg_vecdot "
    "linalg_multi_dot baddbmm bmm addbmm linear prelu chain_matmul scaled_dot_product_attention"
)
FULL = (
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow softplus layer_norm "
    "native_layer_norm group_norm frobenius_norm nuclear_norm cosine_similarity poisson_nll_loss cosine_embedding_loss "
    "nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss "
    "multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits "
    "dist pdist cdist renorm logsumexp prod softmax log_softmax cumprod cumsum sum norm"
)
WIDEST = "addcdiv addcmul atan2 bilinear cross dot grid_sampler index_put tensordot scatter_add"

_library = torch.library.Library("aten", "IMPL")
_copies: dict[int, tuple[weakref.ref, torch.Tensor]] = {}  # id of a weight -> the weight, its copy


def install() -> None:
    """From now on autocast on "cuda" casts the device's tensors."""
    warnings.filterwarnings("ignore", message=r"[\s\S]*Overriding a previously registered kernel")
    for names, choose in ((LOWER, _lower), (FULL, _full), (WIDEST, _widest)):
        for name in names.split():
            packet = getattr(torch.ops.aten, name)
            for overload in packet.overloads():
                if "out" not in overload and "dimname" not in overload:
                    operation = getattr(packet, overload)
                    _library.impl(operation, _casting(operation, choose), "AutocastCUDA", allow_override=True)
    clear = torch.clear_autocast_cache

    def clear_all() -> None:
        _copies.clear()
        clear()

    torch.clear_autocast_cache = clear_all


def cast(value, dtype: torch.dtype):
    """A floating-point tensor in that format; anything else as it is. Copies of weights are kept."""
    if isinstance(value, (list, tuple)):
        return type(value)(cast(part, dtype) for part in value)
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.is_cuda:
        return value
    if value.dtype in (dtype, torch.float64):
        return value
    keep = dtype != torch.float32 and value.dtype == torch.float32 and value.requires_grad and value.is_leaf
    if not (keep and torch.is_autocast_cache_enabled()):
        return value.to(dtype)
    kept = _copies.get(id(value))
    # a copy that was made without gradients does not serve where there are some
    if kept is None or kept[0]() is not value or (torch.is_grad_enabled() and not kept[1].requires_grad):
        kept = _copies[id(value)] = (weakref.ref(value), value.to(dtype))
    return kept[1]


def _casting(operation, choose):
    def run(*arguments, **settings):
        dtype = choose(arguments, settings)
        with torch._C._ExcludeDispatchKeyGuard(KEYS):
            if dtype is None:
                return operation(*arguments, **settings)
            settings = {name: cast(value, dtype) for name, value in settings.items()}
            return operation(*cast(arguments, dtype), **settings)

    return run


def _lower(arguments, settings) -> torch.dtype:
    return torch.get_autocast_dtype("cuda")


def _full(arguments, settings) -> torch.dtype | None:
    """32 bits, unless the caller asked for a format of the result."""
    return None if any(isinstance(v, torch.dtype) for v in (*arguments, *settings.values())) else torch.float32


def _widest(arguments, settings) -> torch.dtype:
    tensors = [value for value in arguments if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.float32 if any(tensor.dtype == torch.float32 for tensor in tensors) else torch.float16
