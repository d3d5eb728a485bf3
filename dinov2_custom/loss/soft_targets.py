"""Teacher assignments kept small: in the logits' buffer with two vectors, or not at all until they are asked for.

Not the formulas' definition for users (``DINOLoss``, ``iBOTPatchLoss``). Read :class:`SoftTargets` first, which
may be read again and again; :class:`CenteredTargets` are computed each time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dinov2_custom.layers.prototype_loss import chunk_size
from dinov2_custom.layers.weight_norm import row_chunks


class Assignments:
    """Probabilities of R rows over K prototypes, of which some rows are had at a time."""

    num_prototypes: int
    device: torch.device

    def __len__(self) -> int:
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the probabilities of some rows, (stop - start, K) float32, in memory of their own."""
        raise NotImplementedError

    def chunks(self) -> Iterator[Tensor]:
        """Yield all rows, some at a time."""
        for rows in row_chunks(len(self), chunk_size(self.num_prototypes, self.device)):
            yield self.rows(rows.start, rows.stop)


class SoftTargets(Assignments):
    """Probabilities kernel * per_row * per_prototype of R rows over K prototypes; each row sums to 1, padding to 0.

    Attributes:
        kernel: (R, K), 16 or 32 bits.
        per_row: (R,) float32.
        per_prototype: (K,) float32, or None for 1.
    """

    def __init__(self, kernel: Tensor, per_row: Tensor, per_prototype: Tensor | None = None) -> None:
        self.kernel, self.per_row, self.per_prototype = kernel, per_row, per_prototype
        self.num_prototypes, self.device = kernel.shape[1], kernel.device

    def __len__(self) -> int:
        return len(self.kernel)

    def rows(self, start: int, stop: int) -> Tensor:
        probabilities = self.kernel[start:stop].to(torch.float32, copy=True).mul_(self.per_row[start:stop, None])
        return probabilities if self.per_prototype is None else probabilities.mul_(self.per_prototype)


class CenteredTargets(Assignments):
    """Probabilities softmax((features weight^T - center) / temp) of R rows over K prototypes; padding is 0.

    Attributes:
        features, weight: (R, D) and (K, D), whose product the logits are, in the precision to compute it in.
        center: (K,) float32, which must not change as long as rows are asked for.
        real_rows: (R,) 1, or 0 for rows of padding; None: all are real.

    Source: Caron et al. 2021, section 3.1.
    """

    def __init__(
        self, features: Tensor, weight: Tensor, center: Tensor, teacher_temp: float, real_rows: Tensor | None = None
    ) -> None:
        self.features, self.weight, self.center = features, weight, center
        self.teacher_temp, self.real_rows = teacher_temp, real_rows
        self.num_prototypes, self.device = len(weight), weight.device

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def rows(self, start: int, stop: int) -> Tensor:
        with torch.autocast(self.features.device.type, enabled=False):
            logits = self.features[start:stop] @ self.weight.T
        logits = logits.to(torch.float32).sub_(self.center).mul_(1.0 / self.teacher_temp)
        probabilities = torch.softmax(logits, dim=-1)
        return probabilities if self.real_rows is None else probabilities.mul_(self.real_rows[start:stop, None])

    @torch.no_grad()
    def sum_of_logits(self) -> Tensor:
        """Return the logits' sum over all rows but padding, (K,) float32: the sum of the features times the weights."""
        with torch.autocast(self.features.device.type, enabled=False):
            total = sum_of_rows(self.features.float(), self.real_rows)
            chunks = row_chunks(len(self.weight), 2**21 // self.weight.shape[1])
            return torch.cat([self.weight[rows].float() @ total for rows in chunks])


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
        sums += sum_of_rows(chunk, None if real_rows is None else real_rows[rows])
        chunk.sub_(center).mul_(1.0 / teacher_temp)
        kernel[rows] = chunk.sub_(chunk.amax(dim=1, keepdim=True)).exp_()
        per_row[rows] = 1.0 / kernel[rows].sum(dim=1, dtype=torch.float32)  # of what was stored
    return SoftTargets(kernel, per_row if real_rows is None else per_row * real_rows), sums


def sum_of_rows(rows: Tensor, real_rows: Tensor | None) -> Tensor:
    """Return the sum (K,) of ``rows`` (R, K), of those only that are 1, not 0, in ``real_rows`` (R,)."""
    return rows.sum(dim=0) if real_rows is None else real_rows @ rows


def kernel_buffer(logits: Tensor) -> Tensor:
    """Return ``logits``' memory for the kernel: as bf16 where it was fp16, whose range is too small."""
    return logits.view(torch.bfloat16) if logits.dtype == torch.float16 else logits
