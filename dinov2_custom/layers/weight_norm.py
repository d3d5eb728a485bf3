"""Weight-normalised matrices processed a few rows at a time, so that large ones are read once and never copied.

The parameters are held by ``dino_head.WeightNormLinear``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 8192


def row_chunks(num_rows: int, at_most: int) -> Iterator[slice]:
    """Yield slices of ``at_most`` rows that cover ``num_rows``, at least one; the last may be shorter."""
    step = max(1, at_most)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


@torch.no_grad()
def normalised(weight_v: Tensor, weight_g: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows weight_g v / |v| of the (K, D) ``weight_v`` in ``dtype``, computed in the parameters' precision.

    Source: Salimans & Kingma 2016, eq. 2.
    """
    weight = weight_v.new_empty(weight_v.shape, dtype=dtype)
    for rows in row_chunks(len(weight_v), _ROWS_AT_A_TIME):
        v = weight_v[rows]
        weight[rows] = v * (weight_g[rows] / v.norm(dim=1, keepdim=True))
    return weight


@torch.no_grad()
def normalised_backward_(gradient: Tensor, weight_v: Tensor, weight_g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of v and g (K, 1) from that of the normalised matrix; the first overwrites ``gradient``.

    Source: Salimans & Kingma 2016, eq. 3.
    """
    of_g = torch.empty_like(weight_g)
    for rows in row_chunks(len(weight_v), _ROWS_AT_A_TIME):
        v, of_w = weight_v[rows], gradient[rows]
        norm = v.norm(dim=1, keepdim=True)
        of_g[rows] = (of_w * v).sum(dim=1, keepdim=True) / norm
        of_w.addcmul_(v, of_g[rows] / norm, value=-1.0).mul_(weight_g[rows] / norm)
    return gradient, of_g
