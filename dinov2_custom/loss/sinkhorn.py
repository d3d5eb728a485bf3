"""Sinkhorn-Knopp: teacher logits to assignments that use all prototypes equally. Shared by the DINO and iBOT losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_custom.layers.prototype_loss import chunk_size
from dinov2_custom.layers.weight_norm import row_chunks
from dinov2_custom.loss.soft_targets import SoftTargets, kernel_buffer

# float32 and bf16 span e-87 to e+88. With each row's largest entry at e+60, a prototype may lie 147 below its rows'
# maxima before it underflows. A row's entries times its prototypes' scales sum to at most 1 / per_row, so that is
# bounded too.
_HEADROOM = 60.0
_LEAST_ROW = 1e-30
_TINY = 1e-37  # keeps 1 / sum finite where every term underflowed


def all_reduce(tensor: Tensor, op=None) -> Tensor:
    """Sum ``tensor`` over all ranks in place (or ``op``); do nothing when there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
    return tensor


@torch.no_grad()
def sinkhorn_targets_(
    logits: Tensor, teacher_temp: float, num_rows: Tensor, n_iterations: int = 3, real_rows: Tensor | None = None
) -> SoftTargets:
    """Write Sinkhorn-Knopp's assignments over ``logits`` (R, K), R >= 0, and return them.

    exp(logits / temp) is scaled alternately by prototype and by sample until both marginals are uniform. Only the two
    scaling vectors are iterated, each iteration reads the kernel once, and each row is shifted by its own maximum, so
    no logit overflows; none of that changes the result.

    Args:
        num_rows: 0-dim, the rows of all ranks together, without padding.
        real_rows: (R,) 1, or 0 for rows of padding, which become zeros and change nothing else; None: all are real.

    Source: Cuturi 2013, algorithm 1; SwAV (Caron et al. 2020), section 3.1; three iterations as in DINOv2.
    """
    kernel = kernel_buffer(logits)
    chunks = list(row_chunks(len(logits), chunk_size(logits.shape[1], logits.device)))
    row_max = logits.amax(dim=1).float() / teacher_temp if len(logits) else logits.new_zeros(0, dtype=torch.float32)
    is_padding = torch.zeros_like(row_max, dtype=torch.bool) if real_rows is None else real_rows == 0
    counted = row_max.masked_fill(is_padding, float("-inf"))
    highest = counted.max() if len(logits) else counted.new_full((), float("-inf"))
    if dist.is_available() and dist.is_initialized():
        all_reduce(highest, dist.ReduceOp.MAX)
    per_row = torch.exp(row_max - highest).clamp_min(_LEAST_ROW).masked_fill(is_padding, 0.0)
    sums = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    for rows in chunks:
        chunk = logits[rows].to(torch.float32, copy=True).div_(teacher_temp)
        kernel[rows] = chunk.sub_(row_max[rows, None] - _HEADROOM).exp_()
        sums += per_row[rows] @ kernel[rows].float()
    per_prototype = sums
    for _ in range(n_iterations):
        per_prototype = 1.0 / (logits.shape[1] * all_reduce(sums)).clamp_min(_TINY)
        sums = torch.zeros_like(sums)
        for rows in chunks:
            chunk = kernel[rows].float()
            row_sums = (num_rows * (chunk @ per_prototype)).clamp_min(_TINY)
            per_row[rows] = (1.0 / row_sums).masked_fill_(is_padding[rows], 0.0)
            sums += per_row[rows] @ chunk
    return SoftTargets(kernel, per_row * num_rows, per_prototype)


def sinkhorn_knopp(
    logits_BK: Tensor, teacher_temp: float, num_rows: Tensor, n_iterations: int = 3, real_rows: Tensor | None = None
) -> Tensor:
    """Return :func:`sinkhorn_targets_` of a copy of the logits (B, K) as float32 probabilities (B, K)."""
    copy = logits_BK.to(torch.float32, copy=True)
    targets = sinkhorn_targets_(copy, teacher_temp, num_rows, n_iterations, real_rows)
    return targets.rows(0, len(targets))
