"""xformers' functions used by upstream, in plain torch: attention over packed sequences and the two index operations.

They support every device, width and dtype. Training in this project uses ``layers`` instead.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dinov2_custom.layers.backend import attention, xformers_ops

_STAND_IN = "made by dinov2_custom"
_NAMES = ("xformers", "xformers.ops", "xformers.ops.fmha")

unbind = torch.unbind


class BlockDiagonalMask:
    """Mask for sequences concatenated in a (1, tokens, ...) tensor, each attending only to itself.

    ``_batch_sizes``: numbers of consecutive sequences that form one tensor in :meth:`split`; upstream also sets it.
    """

    def __init__(self, lengths: Sequence[int], batch_sizes: Sequence[int] | None = None) -> None:
        self.lengths = list(lengths)
        self._batch_sizes = batch_sizes

    @classmethod
    def from_seqlens(cls, q_seqlen: Sequence[int], kv_seqlen: Any = None) -> BlockDiagonalMask:
        """Create the mask for sequences of these lengths."""
        return cls(q_seqlen)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """Return the mask and the (1, tokens, ...) concatenation of tensors (batch, length, ...)."""
        lengths = [length for batch, length in (t.shape[:2] for t in tensors) for _ in range(batch)]
        packed = torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in tensors], dim=1)
        return cls(lengths, [len(t) for t in tensors]), packed

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Split a packed tensor into the original tensors (batch, length, ...)."""
        rest, parts, first = tensor[0], [], 0
        for count in self._batch_sizes or [1] * len(self.lengths):
            length = self.lengths[first]
            part, rest = rest[: count * length], rest[count * length :]
            parts.append(part.reshape(count, length, *part.shape[1:]))
            first += count
        return parts


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: Any = None,
    *,
    op: Any = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(head_dim)) v for (batch, length, heads, head_dim), within each sequence of the mask.

    Raises:
        ValueError: another kind of mask, or a scale.
    """
    if scale is not None or not (attn_bias is None or isinstance(attn_bias, BlockDiagonalMask)):
        raise ValueError(
            f"expected no scale and a BlockDiagonalMask or none, got {scale} and {type(attn_bias).__name__}"
        )
    runs = [(1, query.shape[1])] if attn_bias is None else [(len(list(g)), n) for n, g in groupby(attn_bias.lengths)]
    outputs, start = [], 0
    for count, length in runs:
        parts = [tensor[:, start : start + count * length] for tensor in (query, key, value)]
        heads = [part.reshape(-1, length, *part.shape[2:]).transpose(1, 2) for part in parts]
        outputs.append(attention(*heads, dropout_p=p).transpose(1, 2).reshape(parts[0].shape))
        start += count * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """Return rows ``indices[i]`` of each ``sources[i]`` (rows, width), flattened and concatenated."""
    return torch.cat([source.index_select(0, rows).flatten() for source, rows in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Return ``input`` with ``alpha * scaling * source`` added to rows ``index``; ``scaling``: one per column."""
    source = source if scaling is None else source * scaling.to(source.dtype)
    return input.index_add(0, index, source, alpha=alpha)


fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, MemoryEfficientAttentionFlashAttentionOp=None)


def stand_in_for_xformers() -> None:
    """Serve ``from xformers.ops import fmha`` until :func:`remove_stand_in`, if xformers cannot be imported."""
    if "xformers" in sys.modules or xformers_ops() is not None:
        return
    for name in _NAMES:
        module = sys.modules[name] = ModuleType(name, _STAND_IN)
        module.__path__ = []
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
    vars(sys.modules["xformers.ops.fmha"]).update(vars(fmha))


def remove_stand_in() -> None:
    """Undo :func:`stand_in_for_xformers`; a real xformers is kept."""
    for name in _NAMES:
        if getattr(sys.modules.get(name), "__doc__", None) == _STAND_IN:
            del sys.modules[name]
