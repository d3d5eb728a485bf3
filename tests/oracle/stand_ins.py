"""Stand-ins for the libraries upstream imports and a CPU test does not have: xformers (attention over packed sequences)
and fvcore (checkpoint files).

Written as the plainest formula, so that they are a reference and not a second fast implementation. ``SwiGLU`` and
``cross_entropy`` are left out on purpose: upstream then uses its own torch versions. The fvcore classes are empty,
since no test lets upstream write its sharded checkpoints. Read :func:`modules` first.
"""

from __future__ import annotations

from itertools import groupby
from types import ModuleType

import torch


class BlockDiagonalMask:
    """Sequences laid end to end along dim 1 of a (1, tokens, ...) tensor, each attending to itself only.

    ``_batch_sizes`` (upstream sets it itself too) says how many sequences in a row make one tensor for :meth:`split`.
    """

    def __init__(self, seqlens, batch_sizes=None):
        self.seqlens = list(seqlens)
        self._batch_sizes = batch_sizes

    @classmethod
    def from_seqlens(cls, seqlens):
        return cls(seqlens)

    @classmethod
    def from_tensor_list(cls, tensors):
        """Return the mask and the (1, tokens, ...) concatenation of (batch, length, ...) tensors."""
        batch_sizes = [t.shape[0] for t in tensors]
        seqlens = [t.shape[1] for t in tensors for _ in range(t.shape[0])]
        return cls(seqlens, batch_sizes), torch.cat([t.flatten(0, 1) for t in tensors]).unsqueeze(0)

    def split(self, packed):
        """Undo the packing: a list of (batch, length, ...) tensors."""
        batch_sizes = self._batch_sizes or [1] * len(self.seqlens)
        tensors, sequence, start = [], 0, 0
        for batch_size in batch_sizes:
            length = self.seqlens[sequence]
            stop = start + batch_size * length
            tensors.append(packed[0, start:stop].unflatten(0, (batch_size, length)))
            sequence, start = sequence + batch_size, stop
        return tensors


def memory_efficient_attention(q, k, v, attn_bias=None, op=None):
    """softmax(q k^T / sqrt(head_dim)) v for (batch, tokens, heads, head_dim) tensors, per sequence of the mask."""
    if attn_bias is None:
        return _attention(q, k, v)
    outputs, start = [], 0
    for length, run in groupby(attn_bias.seqlens):
        count = len(list(run))
        stop = start + count * length
        parts = [t[0, start:stop].unflatten(0, (count, length)) for t in (q, k, v)]
        outputs.append(_attention(*parts).flatten(0, 1))
        start = stop
    return torch.cat(outputs).unsqueeze(0)


def _attention(q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def index_select_cat(sources, indices):
    """Rows ``indices[i]`` of each 2-D ``sources[i]``, flattened and concatenated."""
    return torch.cat([source[index].flatten() for source, index in zip(sources, indices, strict=True)])


def scaled_index_add(x, index, source, scaling=None, alpha=1.0):
    """x with ``alpha * scaling * source`` added to its rows ``index``."""
    return torch.index_add(x, 0, index, source if scaling is None else source * scaling, alpha=alpha)


def modules() -> dict[str, ModuleType]:
    """Return name -> module, to stand in ``sys.modules`` while upstream is being imported, and no longer."""
    names = ["xformers", "xformers.ops", "xformers.ops.fmha", "fvcore", "fvcore.common", "fvcore.common.checkpoint"]
    made = {name: ModuleType(name) for name in names}
    for name in names:  # `import a.b` needs a.__path__; `from a import b` needs a.b
        made[name].__path__ = []
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(made[parent], child, made[name])
    fmha, ops, checkpoint = made["xformers.ops.fmha"], made["xformers.ops"], made["fvcore.common.checkpoint"]
    fmha.BlockDiagonalMask = BlockDiagonalMask
    fmha.MemoryEfficientAttentionFlashAttentionOp = None
    ops.memory_efficient_attention = memory_efficient_attention
    ops.unbind = torch.unbind
    ops.index_select_cat = index_select_cat
    ops.scaled_index_add = scaled_index_add
    checkpoint.Checkpointer = type("Checkpointer", (), {})
    checkpoint.PeriodicCheckpointer = type("PeriodicCheckpointer", (), {})
    return made
