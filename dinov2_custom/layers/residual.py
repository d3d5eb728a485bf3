"""Add a branch to some rows of the residual stream; stochastic depth skips the other samples.

Rows are added in place where the buffer is not aliased (:class:`Owned`), which halves the cost. Autograd does not see
this, so that hooks on the stream (FSDP2's) stay in place; it still checks that no overwritten tensor was saved for a
backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_custom.layers.drop_path import Subset
from dinov2_custom.layers.lean import without_autocast
from dinov2_custom.layers.pieces import EAGER, Pieces
from dinov2_custom.layers.segments import Segments


class Owned(NamedTuple):
    """Tensors that may be overwritten.

    Attributes:
        x: the input, if nothing else reads it.
        gradient: the gradient of the result, if it comes from another residual branch only.
    """

    x: bool = False
    gradient: bool = False


def add_residual_subset(
    x_TD: Tensor,
    residual: Callable[[Tensor, Segments, float], Tensor],
    subset: Subset,
    owned: Owned = Owned(),  # noqa: B008 - immutable
    dtype: torch.dtype | None = None,
    pieces: Pieces = EAGER,
) -> Tensor:
    """Return x + residual(x) computed for the rows of ``subset`` only, scaled so that the expectation is unchanged.

    Args:
        residual: (rows of x, in ``dtype`` or x's own; their segments; a factor) -> the branch times the factor.

    Source: DINOv2 (Oquab et al. 2023), section 5, "Efficient stochastic depth".
    """
    rows, segments, scale = subset
    if rows is None:
        return x_TD + residual(x_TD, segments, 1.0)
    x_TD, kept = _Take.apply(x_TD, rows, dtype or x_TD.dtype, owned.gradient, pieces)
    if isinstance(scale, Tensor):
        return _Add.apply(x_TD, residual(kept, segments, 1.0), rows, scale, owned.x, pieces)
    return _Add.apply(x_TD, residual(kept, segments, scale), rows, None, owned.x, pieces)


class _Take(torch.autograd.Function):
    """Return (x, x[rows]). The backward adds the second gradient to the rows of the first: one pass less than for two
    uses of x, whose gradients autograd would materialise and sum."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, dtype: torch.dtype, overwrite: bool, pieces: Pieces):
        ctx.save_for_backward(rows)
        ctx.overwrite, ctx.pieces = overwrite, pieces
        with without_autocast(x):
            return x.view_as(x), pieces.take_rows(x, rows, None, dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor, of_rows: Tensor):
        (rows,) = ctx.saved_tensors
        return _added(gradient, rows, of_rows, None, ctx.overwrite, ctx.pieces), None, None, None, None


class _Add(torch.autograd.Function):
    """Return x with scale * branch added to its rows. Unlike ``index_add`` it does not save ``branch``."""

    @staticmethod
    def forward(ctx, x: Tensor, branch: Tensor, rows: Tensor, scale: Tensor | None, overwrite: bool, pieces: Pieces):
        ctx.save_for_backward(rows, scale)
        ctx.dtype, ctx.pieces = branch.dtype, pieces
        with without_autocast(x):
            return _added(x, rows, branch, scale, overwrite, pieces)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        rows, scale = ctx.saved_tensors
        return gradient, ctx.pieces.take_rows(gradient, rows, scale, ctx.dtype), None, None, None, None


def _added(x: Tensor, rows: Tensor, addend: Tensor, scale: Tensor | None, overwrite: bool, pieces: Pieces) -> Tensor:
    out = x.detach() if overwrite else x.detach().clone(memory_format=torch.contiguous_format)
    pieces.add_rows_(out, rows, addend, scale)
    return out
