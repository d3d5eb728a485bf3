"""A block on packed tokens, computed from its weights: crops of all sizes in one pass that saves few tensors.

Token-wise work (norms, linear layers, FFN) runs on the (T, D) concatenation of all crops, attention on each segment.
The block's modules are not called, so this replaces :class:`block.Block` only if all of them are as they were built
(``unmodified``). Only training uses it; ``model(x)`` calls the modules. ``residual`` adds a branch to the stream,
``lean`` has its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinov2_custom.layers import backend as kernels
from dinov2_custom.layers.drop_path import Subset
from dinov2_custom.layers.lean import activation_linear, compute_dtype, gated_activation, gelu_activation, norm_linear
from dinov2_custom.layers.pieces import EAGER, Pieces
from dinov2_custom.layers.residual import Owned, add_residual_subset
from dinov2_custom.layers.segments import Segments, split_segments
from dinov2_custom.layers.swiglu_ffn import SwiGLUFFN


class Packed(NamedTuple):
    """How a pass runs a backbone's blocks.

    Attributes:
        blocks: the blocks computed from their weights; the others are called as modules.
        recompute: what the backward pass recomputes: "none"; "selective": the FFN; "full": everything.
        pieces: the pieces for blocks computed from their weights, compiled or not.
    """

    blocks: frozenset[nn.Module] = frozenset()
    recompute: str = "none"
    pieces: Pieces = EAGER


def forward_packed(
    block: nn.Module,
    x_TD: Tensor,
    subsets: Sequence[Subset],
    owned: Owned = Owned(),  # noqa: B008 - immutable
    recompute: str = "none",
    pieces: Pieces = EAGER,
) -> Tensor:
    """Run a block whose modules are all unmodified.

    Args:
        x_TD: (T, D), the crops of all segments concatenated.
        subsets: the rows that the attention branch and the FFN branch are computed for.
        owned: whether x and the gradient of the result may be overwritten.
        recompute, pieces: see :class:`Packed`.
    """
    if recompute == "full" and torch.is_grad_enabled():
        owned = owned._replace(x=False)  # x is what is saved
        return checkpoint(
            _forward, block, x_TD, subsets, owned, False, pieces, use_reentrant=False, preserve_rng_state=False
        )
    return _forward(block, x_TD, subsets, owned, recompute == "selective" and torch.is_grad_enabled(), pieces)


def _forward(
    block: nn.Module, x_TD: Tensor, subsets: Sequence[Subset], owned: Owned, ffn_again: bool, pieces: Pieces
) -> Tensor:
    attention, ffn = subsets
    options = compute_dtype(x_TD), pieces
    # between the two branches, nothing else reads x or its gradient
    first = Owned(owned.x, ffn.rows is not None)
    x_TD = add_residual_subset(x_TD, partial(_attention_branch, block, pieces), attention, first, *options)
    last = Owned(attention.rows is not None, owned.gradient)
    branch = partial(_ffn_branch_again if ffn_again else _ffn_branch, block, pieces)
    return add_residual_subset(x_TD, branch, ffn, last, *options)


def _attention_branch(block: nn.Module, pieces: Pieces, x_TD: Tensor, segments: Segments, scale: float) -> Tensor:
    attn = block.attn
    qkv_TE = norm_linear(x_TD, block.norm1, attn.qkv, pieces)
    attended = attend(qkv_TE, segments, attn.num_heads, attn.backend)
    return activation_linear(attended, None, attn.proj, getattr(block.ls1, "gamma", None), scale, pieces)


def _ffn_branch(block: nn.Module, pieces: Pieces, x_TD: Tensor, segments: Segments, scale: float) -> Tensor:
    mlp = block.mlp
    if isinstance(mlp, SwiGLUFFN):
        first, activation, second = mlp.w12, gated_activation(pieces), mlp.w3
    else:
        first, activation, second = mlp.fc1, gelu_activation(mlp.act.approximate, pieces), mlp.fc2
    hidden = norm_linear(x_TD, block.norm2, first, pieces)
    return activation_linear(hidden, activation, second, getattr(block.ls2, "gamma", None), scale, pieces)


def _ffn_branch_again(block: nn.Module, pieces: Pieces, x_TD: Tensor, segments: Segments, scale: float) -> Tensor:
    x_TD = x_TD.to(compute_dtype(x_TD))  # the saved tensor
    branch = partial(_ffn_branch, block, pieces)
    return checkpoint(branch, x_TD, segments, scale, use_reentrant=False, preserve_rng_state=False)


def attend(qkv_TE: Tensor, segments: Segments, num_heads: int, backend: str = "auto") -> Tensor:
    """Map (T, 3 D) queries, keys and values to (T, D), within each sequence; ``backend``: see :mod:`backend`."""
    parts = _SplitHeads.apply(qkv_TE, segments, num_heads)
    outputs = []
    for q, k, v in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        out = kernels.attention(q, k, v, backend=backend)
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def split_heads(qkv_TE: Tensor, segments: Segments, num_heads: int) -> tuple[Tensor, ...]:
    """Return views (num_sequences, heads, length, head_dim) of packed (T, 3 D): q, k and v of each segment in turn."""
    head_dim = qkv_TE.shape[-1] // (3 * num_heads)
    parts = []
    for segment, qkv in zip(segments, split_segments(qkv_TE, segments), strict=True):
        parts += qkv.view(*segment, 3, num_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return tuple(parts)


class _SplitHeads(torch.autograd.Function):
    """:func:`split_heads`, whose backward writes each gradient in place; autograd would make three passes."""

    @staticmethod
    def forward(ctx, qkv_TE: Tensor, segments: Segments, num_heads: int) -> tuple[Tensor, ...]:
        ctx.shape, ctx.segments, ctx.num_heads = qkv_TE.shape, segments, num_heads
        return split_heads(qkv_TE, segments, num_heads)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        of_qkv = gradients[0].new_empty(ctx.shape)
        for place, gradient in zip(split_heads(of_qkv, ctx.segments, ctx.num_heads), gradients, strict=True):
            place.copy_(gradient)
        return of_qkv, None, None
