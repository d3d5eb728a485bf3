"""Teacher assignments kept small: one buffer in the precision of the logits it is written over, and two vectors.

Not the formulas' definition for users (``DINOLoss``, ``iBOTPatchLoss``). Read :class:`SoftTargets` first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinov2_custom.layers.prototype_loss import chunk_size
from dinov2_custom.layers.weight_norm import row_chunks


class SoftTargets:
    """Probabilities kernel * per_row * per_prototype of R rows over K prototypes; each row sums to 1, padding to 0.

    Attributes:
        kernel: (R, K), 16 or 32 bits.
        per_row: (R,) float32.
        per_prototype: (K,) float32, or None for 1.
    """

    def __init__(self, kernel: Tensor, per_row: Tensor, per_prototype: Tensor | None = None) -> None:
        self.kernel, self.per_row, self.per_prototype = kernel, per_row, per_prototype

    def __len__(self) -> int:
        return len(self.kernel)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the probabilities of some rows, (stop - start, K) float32, in memory of their own."""
        probabilities = self.kernel[start:stop].to(torch.float32, copy=True).mul_(self.per_row[start:stop, None])
        return probabilities if self.per_prototype is None else probabilities.mul_(self.per_prototype)

    def chunks(self):
        """Yield all rows, some at a time."""
        for rows in row_chunks(len(self), chunk_size(self.kernel.shape[1], self.kernel.device)):
            yield self.rows(rows.start, rows.stop)


@torch.no_grad()
def centered_targets_(
    logits: Tensor, center: Tensor, teacher_temp: float, real_rows: Tensor | None = None
) -> tuple[SoftTargets, Tensor]:
    """Write softmax((logits - center) / temp) over ``logits`` (R, K); return it, and the column sums of the logits.

    Where ``real_rows`` (R,) is 0, not 1, is padding: zeros in the result, and in no sum.

    Source: Caron et al. 2021, section 3.1.
    """
    kernel, center = kernel_buffer(logits), center.flatten()
    sums = torch.zeros(logits.shape[1], dtype=torch.float32, device=logits.device)
    per_row = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in row_chunks(len(logits), chunk_size(logits.shape[1], logits.device)):
        chunk = logits[rows].to(torch.float32, copy=True)
        sums += chunk.sum(dim=0) if real_rows is None else real_rows[rows] @ chunk
        chunk.sub_(center).mul_(1.0 / teacher_temp)
        kernel[rows] = chunk.sub_(chunk.amax(dim=1, keepdim=True)).exp_()
        per_row[rows] = 1.0 / kernel[rows].sum(dim=1, dtype=torch.float32)  # of what was stored
    return SoftTargets(kernel, per_row if real_rows is None else per_row * real_rows), sums


def kernel_buffer(logits: Tensor) -> Tensor:
    """Return ``logits``' memory for the kernel: as bf16 where it was fp16, whose range is too small."""
    return logits.view(torch.bfloat16) if logits.dtype == torch.float16 else logits
