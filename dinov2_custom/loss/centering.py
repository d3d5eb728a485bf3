"""The running mean of teacher logits that prevents one prototype from dominating (Caron et al. 2021, eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_custom import distributed
from dinov2_custom.loss.soft_targets import SoftTargets, TeacherLogits, sum_of_logits, sum_of_rows


class CenteredLoss(nn.Module):
    """Hold ``center`` and update it with each batch's mean, one call late so that the reduction overlaps the backward.

    Args:
        center_shape: (1, K) or (1, 1, K).
        student_temp: temperature of the student's softmax.
        center_momentum: weight of the old centre.

    Attributes:
        hold_center: while set, updates are collected and the centre is unchanged, for the later micro-batches of one
            step.
        over_all_ranks: if False, centre and Sinkhorn-Knopp use the rows of this rank only.
    """

    def __init__(self, center_shape: tuple[int, ...], student_temp: float, center_momentum: float) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(center_shape))
        self.hold_center = False
        self.over_all_ranks = True
        self._pending: list[tuple[Tensor, dist.Work | None]] = []

    @torch.no_grad()
    def softmax_center_teacher(self, teacher_output: Tensor, teacher_temp: float) -> Tensor:
        """Return softmax((teacher_output - center) / teacher_temp), in float32."""
        if not self.hold_center:
            self.apply_center_update()
        return F.softmax((teacher_output.float() - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor, real_rows: Tensor | None = None) -> None:
        """Start the update from this rank's logits (..., K); it takes effect at the next call.

        ``real_rows`` (R,) is 1, or 0 for rows of padding; None if all are real.
        """
        self.reduce_center_update(teacher_output, real_rows)

    @torch.no_grad()
    def reduce_center_update(self, teacher_output: Tensor, real_rows: Tensor | None = None) -> None:
        rows = teacher_output.float().flatten(0, -2)
        self._start_update(sum_of_rows(rows, real_rows), len(rows), real_rows)

    @torch.no_grad()
    def lazy_targets(
        self, features: Tensor, weight: Tensor, teacher_temp: float, real_rows: Tensor | None = None, keep: bool = False
    ) -> SoftTargets:
        """Return :meth:`softmax_center_teacher` of the logits features weight^T, which are never materialised in full,
        and start :meth:`update_center`.

        Args:
            features, weight: (R, D) and (K, D), in the precision to compute the product in.
            real_rows: as in :meth:`update_center`; rows of padding become zeros.
            keep: set if rows are read more than once.
        """
        if not self.hold_center:
            self.apply_center_update()
        self._start_update(sum_of_logits(features, weight, real_rows), len(features), real_rows)
        logits = TeacherLogits.of_factors(features, weight, keep)
        return SoftTargets(logits, self.center.flatten(), teacher_temp, real_rows)

    def _start_update(self, sums: Tensor, num_rows: int, real_rows: Tensor | None) -> None:
        count = sums.new_full((1,), num_rows) if real_rows is None else real_rows.sum().view(1)
        sum_and_count = torch.cat((sums, count))
        parallel = self.over_all_ranks and distributed.is_enabled()
        handle = dist.all_reduce(sum_and_count, async_op=True) if parallel else None
        self._pending.append((sum_and_count, handle))

    @torch.no_grad()
    def cancel_center_update(self, where: Tensor) -> None:
        """Discard the pending updates if the 0-dim ``where`` is 1, as their step is skipped."""
        for sum_and_count in self._finished_updates():
            sum_and_count.masked_fill_(where > 0, 0.0)

    @contextmanager
    def kept_center(self) -> Iterator[None]:
        """Apply the pending update, as the next step would; within the body, the centre is used and stays unchanged."""
        self.apply_center_update()
        held, self.hold_center = self.hold_center, True
        try:
            yield
        finally:
            self._finished_updates()
            self._pending.clear()
            self.hold_center = held

    @torch.no_grad()
    def apply_center_update(self) -> None:
        """Apply the mean over all pending updates; without rows, or if it is not finite, the centre is unchanged."""
        if not self._pending:
            return
        sum_and_count = sum(self._finished_updates())
        self._pending.clear()
        count = sum_and_count[-1]
        mean = (sum_and_count[:-1] / count.clamp_min(1)).view_as(self.center)
        blended = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        usable = (count > 0) & mean.isfinite().all()
        self.center.copy_(torch.where(usable, blended, self.center))

    def _finished_updates(self) -> list[Tensor]:
        """Return the sums of the pending updates, reduced over all ranks."""
        for _, handle in self._pending:
            if handle is not None:
                handle.wait()
        self._pending = [(sums, None) for sums, _ in self._pending]
        return [sums for sums, _ in self._pending]
