"""Stochastic depth, in its two forms: zeroed samples (:class:`DropPath`) and skipped samples (:func:`draw_subset`).

DINOv2 trains with the second: a residual branch is computed for a random subset of the samples only, which saves its
cost, and the result is scaled by batch / kept so that its expectation is unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_custom.layers.attention import Segments


def drop_path(x: Tensor, drop_prob: float = 0.0, training: bool = False) -> Tensor:
    """Zero samples of ``x`` (B, ...) with probability ``drop_prob``; scale the others by 1 / (1 - drop_prob)."""
    if drop_prob == 0.0 or not training:
        return x
    keep_prob = 1.0 - drop_prob
    mask = torch.rand(x.shape[0], *([1] * (x.ndim - 1)), device=x.device) < keep_prob
    return x * (mask.to(x.dtype) / keep_prob if keep_prob > 0 else mask.to(x.dtype))


class DropPath(nn.Module):
    """Apply :func:`drop_path` in training mode."""

    def __init__(self, drop_prob: float | None = None) -> None:
        super().__init__()
        self.drop_prob = drop_prob or 0.0

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self.drop_prob, self.training)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}"


def num_kept(batch: int, drop_ratio: float) -> int:
    """Return how many of ``batch`` samples a branch is computed for: max(int(batch * (1 - ratio)), 1)."""
    return max(int(batch * (1 - drop_ratio)), 1)


class Subset:
    """The samples that one residual branch is computed for.

    Attributes:
        rows: (T_kept,) indices of the kept token rows in the packed tensor, or None for all.
        segments: the kept samples' segments, in the same order.
        scale: (T_kept, 1) batch / kept of each row's segment, or None when it is 1 everywhere.
    """

    def __init__(self, rows: Tensor | None, segments: Segments, scale: Tensor | None) -> None:
        self.rows, self.segments, self.scale = rows, segments, scale


def draw_subset(
    segments: Segments, drop_ratio: float, generator: torch.Generator | None, device: torch.device
) -> Subset:
    """Draw one subset a segment: the first ``num_kept`` of a random permutation, as upstream's list mode does.

    ``generator`` is a CPU generator (None: torch's global one), so the draw is the same on every device.
    """
    if drop_ratio == 0.0:
        return Subset(None, segments, None)
    rows, kept_segments, scales, offset = [], [], [], 0
    for num_sequences, length in segments:
        kept = num_kept(num_sequences, drop_ratio)
        sequences = torch.randperm(num_sequences, generator=generator)[:kept]
        rows.append((sequences[:, None] * length + torch.arange(length)).flatten() + offset)
        scales.append(torch.full((kept * length, 1), num_sequences / kept))
        kept_segments.append((kept, length))
        offset += num_sequences * length
    return Subset(
        torch.cat(rows).to(device, non_blocking=True), kept_segments, torch.cat(scales).to(device, non_blocking=True)
    )
