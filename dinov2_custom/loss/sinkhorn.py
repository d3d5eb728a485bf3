"""Sinkhorn-Knopp: turn teacher logits into assignments that use all prototypes equally. Used by both losses.

Its last normalisation is a softmax of each row, so the algorithm reduces to finding a centre.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_custom import distributed
from dinov2_custom.loss.soft_targets import SoftTargets, TeacherLogits

# Values for a maximum and a sum over no rows: finite, so that rows of padding are finite too.
_LOWEST = -1e30
_LEAST_SUM = 1e-30


@torch.no_grad()
def sinkhorn_targets(
    logits: TeacherLogits,
    teacher_temp: float,
    n_iterations: int = 3,
    real_rows: Tensor | None = None,
    over_all_ranks: bool = True,
) -> SoftTargets:
    """Return Sinkhorn-Knopp assignments for ``logits`` (R, K), R >= 0, balanced over the rows of all ranks.

    exp(logits / temp) is scaled alternately by prototype and by sample, ``n_iterations`` >= 1 times each. A sample's
    scale makes its row a softmax, so the iteration is over the centre: the prototypes' scales are exp(-center / temp),
    initialised from the column sums and then reduced by the column sums of the softmaxes. Each logit is read
    ``n_iterations`` times, and again when its assignment is computed.

    Nothing overflows, as sums are taken relative to their largest term and kept as logarithms. No significant term
    underflows: in each column, once scaled, one entry is at least 1 / R, and no entry of its row is above 1.

    Args:
        real_rows: (R,) 1, or 0 for rows of padding, which become zeros and change nothing else; None if all are real.
        over_all_ranks: if False, balance over the rows of this rank only.

    Source: Cuturi 2013, algorithm 1; SwAV (Caron et al. 2020), section 3.1; three iterations as in DINOv2.
    """
    parallel = over_all_ranks and distributed.is_enabled()
    center = teacher_temp * _log_sums_of_columns(logits, 1.0 / teacher_temp, real_rows, parallel)
    for _ in range(n_iterations - 1):
        sums = SoftTargets(logits, center, teacher_temp, real_rows).sum()
        if parallel:
            dist.all_reduce(sums)
        center = center + teacher_temp * sums.clamp_min(_LEAST_SUM).log()
    return SoftTargets(logits, center, teacher_temp, real_rows)


def _log_sums_of_columns(logits: TeacherLogits, scale: float, real_rows: Tensor | None, parallel: bool) -> Tensor:
    """Return log sum exp(scale * logits) over the real rows, (K,) float32; finite if there are none.

    ``parallel``: over all ranks.
    """
    sums = torch.zeros(logits.num_prototypes, dtype=torch.float32, device=logits.device)
    largest = torch.full_like(sums, _LOWEST)
    for rows in logits.chunks():
        chunk = logits.rows(rows.start, rows.stop).mul_(scale)
        if real_rows is not None:
            chunk.masked_fill_((real_rows[rows] == 0)[:, None], float("-inf"))
        before, largest = largest, torch.maximum(largest, chunk.amax(dim=0))
        sums.mul_((before - largest).exp_()).add_(chunk.sub_(largest).exp_().sum(dim=0))
    own = largest
    if parallel:
        largest = own.clone()
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    sums.mul_((own - largest).exp_())
    if parallel:
        dist.all_reduce(sums)
    return largest + sums.clamp_min(_LEAST_SUM).log()


def sinkhorn_knopp(
    logits_BK: Tensor,
    teacher_temp: float,
    n_iterations: int = 3,
    real_rows: Tensor | None = None,
    over_all_ranks: bool = True,
) -> Tensor:
    """Return :func:`sinkhorn_targets` of logits (B, K) as float32 probabilities (B, K)."""
    targets = sinkhorn_targets(TeacherLogits(logits_BK), teacher_temp, n_iterations, real_rows, over_all_ranks)
    probabilities = torch.empty(logits_BK.shape, dtype=torch.float32, device=logits_BK.device)
    for rows in targets.logits.chunks():
        probabilities[rows] = targets.rows(rows.start, rows.stop)
    return probabilities
