"""The iBOT loss: the same cross-entropy for masked patches (Zhou et al. 2022, eq. 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_custom.loss.centering import CenteredLoss
from dinov2_custom.loss.sinkhorn import sinkhorn_knopp


class iBOTPatchLoss(CenteredLoss):  # noqa: N801 - upstream's name
    """Cross-entropy over ``patch_out_dim`` prototypes; ``center`` is (1, 1, patch_out_dim)."""

    def __init__(self, patch_out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9) -> None:
        super().__init__((1, 1, patch_out_dim), student_temp, center_momentum)

    @torch.no_grad()
    def sinkhorn_knopp_teacher(
        self,
        teacher_output: Tensor,
        teacher_temp: float,
        n_masked_patches_tensor: Tensor,
        n_iterations: int = 3,
        real_rows: Tensor | None = None,
    ) -> Tensor:
        """Return assignments (M, K) balanced over the masked patches of all ranks.

        Args:
            n_masked_patches_tensor: unused, as the number of rows cancels; kept for upstream's signature.
            real_rows: (M,) 1, or 0 for rows of padding, which become zeros; None if all are real.
        """
        return sinkhorn_knopp(teacher_output, teacher_temp, n_iterations, real_rows, self.over_all_ranks)

    def forward(self, student_patch_tokens: Tensor, teacher_patch_tokens: Tensor, student_masks_flat: Tensor) -> Tensor:
        """Return the mean over crops of the mean loss of each crop's masked patches.

        Args:
            student_patch_tokens, teacher_patch_tokens: logits and probabilities (B, N, K).
            student_masks_flat: (B, N) bool.
        """
        masks = student_masks_flat.float()
        losses = self._cross_entropy(student_patch_tokens, teacher_patch_tokens)
        return ((losses * masks).sum(dim=-1) / masks.sum(dim=-1).clamp_min(1.0)).mean()

    def forward_masked(
        self,
        student_patch_tokens_masked: Tensor,
        teacher_patch_tokens_masked: Tensor,
        student_masks_flat: Tensor,
        n_masked_patches: int | None = None,
        masks_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the same loss from the masked patches only.

        Args:
            student_patch_tokens_masked, teacher_patch_tokens_masked: (M, K), crop by crop; rows beyond
                ``n_masked_patches`` are padding.
            student_masks_flat: (B, N) bool.
            masks_weight: (M,) 1 / masked patches of the row's crop; None computes it from the masks.
        """
        if masks_weight is None:
            per_crop = 1.0 / student_masks_flat.sum(dim=-1).float().clamp_min(1.0)
            masks_weight = per_crop.unsqueeze(-1).expand_as(student_masks_flat)[student_masks_flat]
        losses = self._cross_entropy(
            student_patch_tokens_masked[:n_masked_patches], teacher_patch_tokens_masked[:n_masked_patches]
        )
        return (losses * masks_weight).sum() / student_masks_flat.shape[0]

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        return -(targets * F.log_softmax(logits.float() / self.student_temp, dim=-1)).sum(dim=-1)
