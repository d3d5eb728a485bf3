"""Sinkhorn-Knopp: teacher logits to assignments that use all prototypes equally. Shared by the DINO and iBOT losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# float32 spans e-87 to e+88. With each row's largest entry at e+60, a prototype may lie 147 below its rows' maxima
# before it underflows. A row's entries times its prototypes' scales sum to at most 1 / per_row, so that is bounded too.
_HEADROOM = 60.0
_LEAST_ROW = 1e-30
_TINY = 1e-37  # keeps 1 / sum finite where every term underflowed


def all_reduce(tensor: Tensor, op=None) -> Tensor:
    """Sum ``tensor`` over all ranks in place (or ``op``); do nothing when there is one process."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, op=op or dist.ReduceOp.SUM)
    return tensor


@torch.no_grad()
def sinkhorn_knopp(logits_BK: Tensor, teacher_temp: float, num_rows: Tensor, n_iterations: int = 3) -> Tensor:
    """Return assignments (B, K) in float32, each row summing to 1.

    exp(logits / temp) is scaled alternately by prototype and by sample until both marginals are uniform. Only the two
    scaling vectors are iterated, so no (B, K) tensor is rewritten, and each row is shifted by its own maximum, so no
    logit overflows; neither changes the result.

    Args:
        logits_BK: this rank's teacher logits, B >= 0 rows.
        num_rows: 0-dim, the rows of all ranks together.

    Source: Cuturi 2013, algorithm 1; SwAV (Caron et al. 2020), section 3.1; three iterations as in DINOv2.
    """
    scaled = logits_BK.float() / teacher_temp
    num_prototypes = scaled.shape[1]
    if len(scaled):
        row_max = scaled.amax(dim=1)
        highest = row_max.max()
    else:
        row_max = scaled.new_zeros(0)
        highest = scaled.new_tensor(float("-inf"))
    if dist.is_available() and dist.is_initialized():
        all_reduce(highest, dist.ReduceOp.MAX)
    kernel_BK = scaled.sub_(row_max[:, None] - _HEADROOM).exp_()
    per_row = torch.exp(row_max - highest).clamp_min(_LEAST_ROW)
    for _ in range(n_iterations):
        per_prototype = 1.0 / (num_prototypes * all_reduce(per_row @ kernel_BK)).clamp_min(_TINY)
        per_row = 1.0 / (num_rows * (kernel_BK @ per_prototype)).clamp_min(_TINY)
    return kernel_BK.mul_(per_prototype).mul_((per_row * num_rows)[:, None])
