"""Resampling position embeddings to another patch grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_pos_embed(
    pos_embed: Tensor, grid: tuple[int, int], *, antialias: bool = False, offset: float = 0.0
) -> Tensor:
    """Return (1, 1 + rows * columns, D) from a square (1, 1 + M * M, D), bicubically, in float32.

    Args:
        grid: (rows, columns) of patches wanted.
        offset: when not 0, the scale factor is (side + offset) / M instead of an exact size. The values differ a
            little, and the released models without registers were trained with 0.1.

    Raises:
        ValueError: the given positions form no square.
    """
    num_positions = pos_embed.shape[1] - 1
    side = math.isqrt(num_positions)
    if side * side != num_positions:
        raise ValueError(f"pos_embed: expected a square grid to resample from, got {num_positions} positions")
    rows, columns = grid
    if offset:
        target = {"scale_factor": ((rows + offset) / side, (columns + offset) / side)}
    else:
        target = {"size": (rows, columns)}
    pos_embed = pos_embed.float()
    patches = pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, mode="bicubic", antialias=antialias, **target)
    if patches.shape[-2:] != (rows, columns):
        raise ValueError(f"pos_embed: expected {rows}x{columns} after resampling, got {tuple(patches.shape[-2:])}")
    return torch.cat((pos_embed[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)
