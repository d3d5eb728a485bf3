"""The DINO loss: cross-entropy between student and teacher assignments of class tokens (Caron et al. 2021, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_custom.loss.centering import CenteredLoss
from dinov2_custom.loss.sinkhorn import sinkhorn_knopp


class DINOLoss(CenteredLoss):
    """Cross-entropy over ``out_dim`` prototypes; ``center`` is (1, out_dim)."""

    def __init__(self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(self, teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
        """Return assignments (B, K) balanced over the rows of all ranks."""
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, over_all_ranks=self.over_all_ranks)

    def forward(
        self, student_output_list: Sequence[Tensor], teacher_out_softmaxed_centered_list: Sequence[Tensor]
    ) -> Tensor:
        """Return the sum over all (student, teacher) pairs of the mean cross-entropy of their rows.

        Args:
            student_output_list: logits (B, K) each.
            teacher_out_softmaxed_centered_list: probabilities (B, K) each.
        """
        targets = sum(teacher_out_softmaxed_centered_list)
        total = targets.new_zeros(())
        for logits in student_output_list:
            log_probs = F.log_softmax(logits.float() / self.student_temp, dim=-1)
            total = total - (targets * log_probs).sum(dim=-1).mean()
        return total
