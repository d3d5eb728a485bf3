"""Upstream's functions for stochastic depth over single tensors and lists of them, for code that imports them.

The model itself does not use them: ``block.py`` packs tokens and draws subsets itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from dinov2_custom.errors import DINOv2Error
from dinov2_custom.layers.drop_path import num_kept
from dinov2_custom.layers.segments import Segments, split_segments


class PackedSequences:
    """Row ranges of the sequences in a (1, T, D) tensor; what upstream passes to attention as ``attn_bias``."""

    def __init__(self, segments: Segments) -> None:
        self.segments = segments

    def split(self, packed: Tensor) -> list[Tensor]:
        """Cut (1, T, D) into one (B, N, D) tensor per segment."""
        parts = split_segments(packed[0], self.segments)
        return [part.view(*segment, -1) for part, segment in zip(parts, self.segments, strict=True)]


def get_branges_scales(x: Tensor, sample_drop_ratio: float = 0.0) -> tuple[Tensor, float]:
    """Draw the samples of ``x`` (B, ...) that a branch is computed for; return their indices and B / count."""
    kept = num_kept(len(x), sample_drop_ratio)
    return torch.randperm(len(x), device=x.device)[:kept], len(x) / kept


def add_residual(
    x: Tensor, brange: Tensor, residual: Tensor, residual_scale_factor: float, scaling_vector: Tensor | None = None
) -> Tensor:
    """Return ``x`` with the scaled ``residual`` added to its samples ``brange``; ``scaling_vector`` is a LayerScale."""
    if scaling_vector is not None:
        residual = residual * scaling_vector
    return torch.index_add(x, 0, brange, residual.to(x.dtype), alpha=residual_scale_factor)


def get_attn_bias_and_cat(
    x_list: Sequence[Tensor], branges: Sequence[Tensor] | None = None
) -> tuple[PackedSequences, Tensor]:
    """Concatenate tensors (B_i, N_i, D), or their samples ``branges``; return their layout and (1, T, D)."""
    if branges is not None:
        x_list = [x[brange] for x, brange in zip(x_list, branges, strict=True)]
    packed = torch.cat([x.flatten(0, 1) for x in x_list])
    return PackedSequences([(x.shape[0], x.shape[1]) for x in x_list]), packed[None]


def drop_add_residual_stochastic_depth(
    x: Tensor, residual_func: Callable[[Tensor], Tensor], sample_drop_ratio: float = 0.0
) -> Tensor:
    """Return x + residual_func(x), computed for a random subset of the samples and scaled to the same expectation.

    Source: DINOv2 (Oquab et al. 2023), section 5, "Efficient stochastic depth".
    """
    brange, scale = get_branges_scales(x, sample_drop_ratio)
    return add_residual(x, brange, residual_func(x[brange]), scale)


def drop_add_residual_stochastic_depth_list(
    x_list: Sequence[Tensor],
    residual_func: Callable[..., Tensor],
    sample_drop_ratio: float = 0.0,
    scaling_vector: Tensor | None = None,
) -> list[Tensor]:
    """Apply the same to several tensors (B_i, N_i, D) with one call of ``residual_func((1, T, D), attn_bias=...)``."""
    drawn = [get_branges_scales(x, sample_drop_ratio) for x in x_list]
    packing, packed = get_attn_bias_and_cat(x_list, [brange for brange, _ in drawn])
    residuals = packing.split(residual_func(packed, attn_bias=packing))
    return [
        add_residual(x, brange, residual, scale, scaling_vector)
        for x, (brange, scale), residual in zip(x_list, drawn, residuals, strict=True)
    ]


class CausalAttentionBlock(nn.Module):
    """Placeholder for the block of dino.txt's text tower, which this package does not have."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise DINOv2Error(
            "CausalAttentionBlock: expected a block of the image backbones, got that of dino.txt's text tower, which "
            "this project does not have; use NestedTensorBlock, or upstream's package for dino.txt"
        )


__all__ = [
    "CausalAttentionBlock",
    "PackedSequences",
    "add_residual",
    "drop_add_residual_stochastic_depth",
    "drop_add_residual_stochastic_depth_list",
    "get_attn_bias_and_cat",
    "get_branges_scales",
]
