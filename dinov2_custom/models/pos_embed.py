"""Resampling position embeddings to another patch grid."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def resample_pos_embed(
    pos_embed: Tensor,
    grid: tuple[int, int],
    *,
    source_grid: tuple[int, int] | None = None,
    antialias: bool = False,
    offset: float = 0.0,
) -> Tensor:
    """Return (1, 1 + rows * columns, D) from (1, 1 + M, D), bicubically, in float32.

    Args:
        grid: (rows, columns) of patches wanted. Under ``torch.jit.trace`` they may be scalar tensors.
        source_grid: (rows, columns) of the M given positions; None for a square.
        offset: when not 0, the scale factor is (rows + offset) / source rows instead of giving the size. The values
            differ slightly, and the released models without registers were trained with 0.1.

    Raises:
        ValueError: M is not the size of ``source_grid``.
    """
    num_positions = pos_embed.shape[1] - 1
    source_rows, source_columns = source_grid or (math.isqrt(num_positions),) * 2
    if source_rows * source_columns != num_positions:
        wanted = f"a {source_rows}x{source_columns}" if source_grid else "a square"
        raise ValueError(f"pos_embed: expected {wanted} grid to resample from, got {num_positions} positions")
    rows, columns = grid
    pos_embed = pos_embed.float()
    patches = pos_embed[:, 1:].reshape(1, source_rows, source_columns, -1).permute(0, 3, 1, 2)
    if offset:
        # float: a trace records the factors as numbers; interpolate rejects tensors
        factors = float(rows + offset) / source_rows, float(columns + offset) / source_columns
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", antialias=antialias)
    elif antialias and torch.onnx.is_in_onnx_export():  # the exporter of traced graphs lacks this operator
        vertical, horizontal = _cubic_weights(int(rows), source_rows), _cubic_weights(int(columns), source_columns)
        patches = vertical.to(patches) @ patches @ horizontal.to(patches).T
    else:
        patches = F.interpolate(patches, size=(rows, columns), mode="bicubic", antialias=antialias)
    if tuple(map(int, patches.shape[-2:])) != (int(rows), int(columns)):
        raise ValueError(f"pos_embed: expected {rows}x{columns} after resampling, got {tuple(patches.shape[-2:])}")
    return torch.cat((pos_embed[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)


def _cubic_weights(size: int, source_size: int) -> Tensor:
    """Return (size, source_size): row i holds the input weights of ``F.interpolate(mode="bicubic", antialias=True)``.

    Source: Keys 1981, eq. 4 with a = -1/2; stretched by the ratio of the sizes when downsampling.
    """
    ratio = source_size / size
    stretch = max(ratio, 1.0)
    rows = []
    for index in range(size):
        center = (index + 0.5) * ratio
        distances = [abs(position + 0.5 - center) / stretch for position in range(source_size)]
        weights = [_keys_cubic(distance) for distance in distances]
        rows.append([weight / sum(weights) for weight in weights])
    return torch.tensor(rows)


def _keys_cubic(x: float) -> float:
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0
