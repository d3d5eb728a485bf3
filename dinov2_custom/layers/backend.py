"""Which kernel computes attention, decided per call. The only file that may import xformers.

Not a model: it knows tensors, not tokens or crops. Read :func:`attention` first.
"""

from __future__ import annotations

import functools
import os

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "sdpa", "products", "xformers")
# On CPUs in bf16 two batched products beat the fused kernel, whose backward is slow; above this
# many tokens the (length x length) matrix costs more memory than the products save time.
_PRODUCTS_MAX_LENGTH = 1024


@functools.cache
def xformers_ops():
    """Return ``xformers.ops`` or None. ``XFORMERS_DISABLED`` in the environment is honoured, as upstream does."""
    if os.environ.get("XFORMERS_DISABLED") is not None:
        return None
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


def choose(q: Tensor) -> str:
    """Name the backend for ``q`` of shape (batch, heads, length, head_dim)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= _PRODUCTS_MAX_LENGTH:
        return "products"
    return "sdpa"


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", dropout_p: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q, k, v: (batch, heads, length, head_dim), one dtype, one device.
        backend: one of :data:`BACKENDS`; ``auto`` decides from device, dtype and length.
        dropout_p: probability of dropping an attention weight; 0 outside training.

    Returns:
        (batch, heads, length, head_dim).

    Raises:
        ValueError: unknown backend, or xformers asked for and not importable.
    """
    if backend == "auto":
        backend = choose(q)
    if q.numel() == 0:  # a drop-path subset without a sequence: cuDNN's kernel returns None (torch 2.11, sm_90)
        backend = "products"
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    if backend == "products":
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return F.dropout(scores.softmax(dim=-1), dropout_p) @ v
    if backend == "xformers":
        ops = xformers_ops()
        if ops is None:
            raise ValueError("attention backend: expected xformers to be importable, got no xformers; use 'auto'")
        out = ops.memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), p=dropout_p)
        return out.transpose(1, 2)
    raise ValueError(f"attention backend: expected one of {BACKENDS}, got {backend!r}")
