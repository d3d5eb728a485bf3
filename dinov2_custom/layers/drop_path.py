"""Stochastic depth, in its two forms: zeroed samples (:class:`DropPath`) and skipped samples (:func:`draw_kept`).

DINOv2 trains with the second: a residual branch is computed for a random subset of the samples only, which saves the
cost, and the result is scaled by batch / kept so that its expectation is unchanged. The samples are drawn on the CPU,
optionally for a whole pass at once; :func:`restrict` cuts such a draw for passes over parts of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dinov2_custom.layers.segments import Segments
from dinov2_custom.utils.transfer import to_device


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


class Kept(NamedTuple):
    """The sequences of one tensor that a residual branch is computed for: their indices, in the order drawn, and the
    factor total / kept of their results."""

    sequences: Tensor
    scale: float


# For one branch: its Kept for each tensor, or None if it is computed for all sequences.
Draw = list[Kept] | None


class Subset(NamedTuple):
    """A draw in terms of rows of the packed tensor.

    Attributes:
        rows: (T_kept,) indices of the kept token rows, or None for all.
        segments: the kept sequences' segments, in the same order.
        scale: the factor of all kept rows, or (T_kept, 1) if segments differ.
    """

    rows: Tensor | None
    segments: Segments
    scale: float | Tensor


def draw_kept(num_sequences: Sequence[int], drop_ratio: float, generator: torch.Generator | None) -> Draw:
    """Draw for each tensor the first ``num_kept`` of a random permutation, as upstream's list mode does.

    ``generator`` is a CPU generator (None: torch's global one), so the draw is the same on every device.
    """
    if drop_ratio == 0.0:
        return None
    draw = []
    for total in num_sequences:
        kept = num_kept(total, drop_ratio)
        draw.append(Kept(torch.randperm(total, generator=generator)[:kept], total / kept))
    return draw


def restrict(draw: Draw, parts: Sequence[tuple[int, range]]) -> Draw:
    """Return the part of ``draw`` in ``parts``, each (tensor index, range of its sequences); indices restart at 0.

    The factors stay those of the whole, so that passes over parts add up to one pass over everything.
    """
    if draw is None:
        return None
    restricted = []
    for tensor, within in parts:
        sequences, scale = draw[tensor]
        inside = (sequences >= within.start) & (sequences < within.stop)
        restricted.append(Kept(sequences[inside] - within.start, scale))
    return restricted


def to_subsets(draws: Sequence[Draw], segments: Segments, device: torch.device) -> list[Subset]:
    """Turn draws over the tensors that ``segments`` describes into rows on ``device``, with a single transfer."""
    starts = [0]
    for total, length in segments:
        starts.append(starts[-1] + total * length)
    rows, scales = [], []
    for draw in draws:
        for (sequences, scale), (_, length), start in zip(draw or (), segments, starts, strict=False):
            rows.append((sequences[:, None] * length + torch.arange(length) + start).flatten())
            scales.append(torch.full((len(rows[-1]), 1), scale) if len(segments) > 1 else scale)
    if not rows:
        return [Subset(None, segments, 1.0) for _ in draws]
    rows_on = iter(_moved(rows, device))
    scales_on = iter(_moved(scales, device) if len(segments) > 1 else scales)
    subsets = []
    for draw in draws:
        if draw is None:
            subsets.append(Subset(None, segments, 1.0))
            continue
        kept = [(len(one.sequences), length) for one, (_, length) in zip(draw, segments, strict=True)]
        own_rows, own_scales = [next(rows_on) for _ in kept], [next(scales_on) for _ in kept]
        single = len(kept) == 1
        subsets.append(
            Subset(
                own_rows[0] if single else torch.cat(own_rows), kept, own_scales[0] if single else torch.cat(own_scales)
            )
        )
    return subsets


def _moved(tensors: list[Tensor], device: torch.device) -> tuple[Tensor, ...]:
    return to_device(torch.cat(tensors), device).split([len(tensor) for tensor in tensors])
