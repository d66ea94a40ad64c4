"""Which kernel `scaled_dot_product_attention` takes on a GPU, since that decides what it holds in memory.

The rules are those of aten/src/ATen/native/transformers/cuda/sdp_utils.cpp: flash attention from compute capability 8.0
on, in 16 bits and without a mask; the memory-efficient kernel for equal numbers of heads, in 16 or 32 bits (bfloat16
from 8.0 on); else the plain computation, which holds all scores.
"""

import torch
import torch.nn.functional as F

from course.rehearsal.autocast import cast
from course.rehearsal.device import DeviceTensor

aten = torch.ops.aten
_elsewhere = F.scaled_dot_product_attention


def choose_kernel(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, grouped: bool, capability: tuple[int, int]
) -> str:
    """ "flash", "efficient" or "math"; the tensors are (batch, heads, seq, head_dim)."""
    head_dim, half = query.shape[-1], query.dtype in (torch.float16, torch.bfloat16)
    if query.dim() != 4:
        return "math"
    if capability >= (8, 0) and half and mask is None and head_dim <= 256 and head_dim % 8 == 0:
        return "flash"
    formats = (torch.float16, torch.float32) + ((torch.bfloat16,) if capability >= (8, 0) else ())
    same_heads = query.shape[1] == key.shape[1]
    aligned = head_dim % (8 if half else 4) == 0
    masked_with_gradient = mask is not None and mask.requires_grad
    if query.dtype in formats and same_heads and aligned and not masked_with_gradient:
        return "efficient"
    return "math"


def install(capability: tuple[int, int]) -> None:
    """From now on attention between tensors of the device takes the kernel of a GPU of that capability."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if not isinstance(query, DeviceTensor):
            return _elsewhere(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            query, key, value = (cast(tensor, dtype) for tensor in (query, key, value))
            attn_mask = cast(attn_mask, dtype)
        if len({query.dtype, key.dtype, value.dtype}) > 1:
            raise RuntimeError(
                "Expected query, key, and value to have the same dtype, but got query.dtype: "
                f"{query.dtype} key.dtype: {key.dtype} and value.dtype: {value.dtype} instead."
            )
        kernel = choose_kernel(query, key, attn_mask, enable_gqa, capability)
        if kernel == "math":
            return _plain(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        if kernel == "flash":
            if enable_gqa:
                key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needs, dropout_p, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = attention


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The mask as numbers to add, for every head, its rows in memory a multiple of 16 long."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(query.dtype)
    length = mask.shape[-1]
    if length % 16:
        mask = F.pad(mask, (0, 16 - length % 16))[..., :length]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _plain(query, key, value, mask, dropout_p, is_causal, scale, grouped) -> torch.Tensor:
    """All scores at once; in 16 bits it computes in 32."""
    dtype = query.dtype
    if grouped:
        key, value = (tensor.repeat_interleave(query.shape[-3] // key.shape[-3], -3) for tensor in (key, value))
    with torch.autocast("cuda", enabled=False):
        query, key, value = (tensor.float() for tensor in (query, key, value))
        root = (scale if scale is not None else query.shape[-1] ** -0.5) ** 0.5
        scores = (query * root) @ (key * root).transpose(-2, -1)
        if is_causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = torch.where(allowed, 0.0, float("-inf"))
        elif mask is not None and mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, float("-inf"))
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(-1), dropout_p) if dropout_p else scores.softmax(-1)
        return (weights @ value).to(dtype)
