"""The choice of the attention kernel, made per call. The only file that may import xformers.

xformers' fused SwiGLU is not used: xformers removed it in 0.0.34, the first one for a torch that is supported here.
It works on tensors, not on tokens or crops.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = ("auto", "sdpa", "products", "xformers")
# On CPUs in bf16 two batched products are faster than the fused kernel, whose backward is slow; above this
# many tokens the (length x length) matrix costs more memory than the products save time.
_PRODUCTS_MAX_LENGTH = 1024
_REPETITIONS = 5


@functools.cache
def xformers_ops():
    """Return ``xformers.ops`` or None. ``XFORMERS_DISABLED`` in the environment is respected, as in upstream."""
    if os.environ.get("XFORMERS_DISABLED") is not None:
        return None
    try:
        import xformers.ops
    except ImportError:
        return None
    return xformers.ops


def xformers_flag(name: str) -> bool:
    """Return upstream's module flag ``name``; called by ``__getattr__``, since xformers is slow to import.

    Raises:
        AttributeError: unknown name.
    """
    if name == "XFORMERS_ENABLED":
        return os.environ.get("XFORMERS_DISABLED") is None
    if name == "XFORMERS_AVAILABLE":
        return xformers_ops() is not None
    raise AttributeError(f"no attribute {name!r}")


def fastest_attention(
    segments: Sequence[tuple[int, int]], num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[str, str]:
    """Time attention forward and backward if xformers can be imported.

    Args:
        segments: [(number of sequences, tokens per sequence), ...] of one step.

    Returns:
        One of :data:`BACKENDS`, and a log line with the reason; empty without xformers.
    """
    if xformers_ops() is None:
        return "auto", ""
    shapes = [(number, length, 3, num_heads, head_dim) for number, length in segments]
    try:
        theirs = _seconds("xformers", shapes, dtype, device)
    except (NotImplementedError, ValueError, RuntimeError) as e:  # unsupported device, dtype, card or torch
        return "auto", f"attention: torch's (xformers: {str(e).strip().splitlines()[0]})"
    ours = _seconds("auto", shapes, dtype, device)
    times = f"{ours * 1e3:.2f} ms a block with torch's, {theirs * 1e3:.2f} ms with xformers'"
    return (
        ("xformers", f"attention: xformers' ({times})") if theirs < ours else ("auto", f"attention: torch's ({times})")
    )


def _seconds(backend: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> float:
    """Return the minimum seconds of ``_REPETITIONS`` passes forward and backward over all ``shapes``."""
    least = float("inf")
    packed = [torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    for _ in range(1 + _REPETITIONS):  # the first repetition loads kernels
        _wait(device)
        start = time.perf_counter()
        for qkv in packed:
            out = attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), backend=backend)
            torch.autograd.grad(out, qkv, torch.zeros_like(out))
        _wait(device)
        least = min(least, time.perf_counter() - start)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_plans() -> AbstractContextManager:
    """Return a context manager, for the forward and backward pass, that disables cuDNN's attention.

    torch prefers it on an H100, but it builds a plan on the host for each new shape; the other kernels need none.
    """
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def choose(q: Tensor) -> str:
    """Return the name of the backend for ``q`` of shape (batch, heads, length, head_dim)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= _PRODUCTS_MAX_LENGTH:
        return "products"
    return "sdpa"


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v.

    Args:
        q, k, v: (batch, heads, length, head_dim), one dtype, one device.
        backend: one of :data:`BACKENDS`; ``auto`` decides from device, dtype and length.
        dropout_p: probability of dropping an attention weight; 0 outside training.
        is_causal: each query attends only to keys up to its own position; always uses ``sdpa``.

    Returns:
        (batch, heads, length, head_dim).

    Raises:
        ValueError: unknown backend, or xformers requested and not importable.
    """
    if is_causal:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True)
    if backend == "auto":
        backend = choose(q)
    if q.numel() == 0:  # an empty drop-path subset: cuDNN's kernel returns None (torch 2.11, sm_90)
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
